"""CNM: weakly supervised video moment localization on fused kernels."""

import cnm_kernels  # isort: skip  # noqa: F401  # before torch, whose threads it sets

from cnm.config import CNMConfig
from cnm.errors import InputError
from cnm.models.cnm import CNM
from cnm.training.step import LeanStep, PublishedStep

__all__ = ["CNM", "CNMConfig", "InputError", "LeanStep", "PublishedStep"]
