"""Fused kernels for weakly supervised video moment localization, behind one API.

Each op runs on the best backend the machine offers and can be checked against a plain PyTorch reference
(``cnm_kernels.reference``); ``python -m cnm_kernels`` prints what runs where.
"""

from cnm_kernels import threads as threads  # isort: skip  # before torch, whose threads it sets
from cnm_kernels import registry
from cnm_kernels.drop_in.accelerate import accelerate, accelerate_losses, restore
from cnm_kernels.ops import (
    absorbed_attention,
    branched_attention,
    contrastive_reconstruction_loss,
    dropout,
    dropout_add_layer_norm,
    gaussian_attention,
    gaussian_mask,
    intra_video_contrastive_loss,
    linear,
    linear_nll,
    negative_gaussian_masks,
    weighted_attention,
)
from cnm_kernels.registry import BackendUnavailable, use_backend

__all__ = [
    "BackendUnavailable",
    "absorbed_attention",
    "accelerate",
    "accelerate_losses",
    "branched_attention",
    "contrastive_reconstruction_loss",
    "dropout",
    "dropout_add_layer_norm",
    "gaussian_attention",
    "gaussian_mask",
    "intra_video_contrastive_loss",
    "linear",
    "linear_nll",
    "negative_gaussian_masks",
    "restore",
    "use_backend",
    "weighted_attention",
]

registry.load()
