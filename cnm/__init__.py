"""CNM: weakly supervised video moment localization on fused kernels."""

import cnm_kernels  # isort: skip  # noqa: F401  # before torch, whose threads it sets

from cnm.config import CNMConfig, Config, CPLConfig
from cnm.errors import InputError
from cnm.localizer import Localizer
from cnm.models import load_checkpoint
from cnm.models.cnm import CNM
from cnm.models.cpl import CPL
from cnm.training.step import LeanStep, PublishedStep

__all__ = [
    "CNM",
    "CPL",
    "CNMConfig",
    "CPLConfig",
    "Config",
    "InputError",
    "LeanStep",
    "Localizer",
    "PublishedStep",
    "load_checkpoint",
]
