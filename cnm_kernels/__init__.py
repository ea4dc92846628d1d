"""Fused kernels for weakly supervised video moment localization, behind one API.

Each op runs on the best backend the machine offers and can be checked against a plain PyTorch reference
(``cnm_kernels.reference``); ``python -m cnm_kernels`` prints what runs where.
"""

from cnm_kernels import threads as threads  # isort: skip  # before torch, whose threads it sets
from cnm_kernels import ops, registry
from cnm_kernels.drop_in.accelerate import accelerate, accelerate_losses, restore
from cnm_kernels.ops import *  # noqa: F403
from cnm_kernels.registry import BackendUnavailable, use_backend

__all__ = ["BackendUnavailable", "accelerate", "accelerate_losses", "restore", "use_backend"]
__all__ += ops.__all__

registry.load()
