"""CNM: weakly supervised video moment localization on fused kernels."""

from cnm.config import CNMConfig
from cnm.errors import InputError
from cnm.localizer import Localizer
from cnm.models.cnm import CNM
from cnm.training.step import LeanStep, PublishedStep

__all__ = ["CNM", "CNMConfig", "InputError", "LeanStep", "Localizer", "PublishedStep"]
