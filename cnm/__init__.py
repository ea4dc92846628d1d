"""CNM: weakly supervised video moment localization on fused kernels."""

from cnm.config import CNMConfig
from cnm.errors import InputError

__all__ = ["CNMConfig", "InputError"]
