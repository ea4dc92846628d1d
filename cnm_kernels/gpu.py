"""Properties of a GPU that decide which kernels run there. Importing this, or the package, starts no CUDA."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def missing() -> str | None:
    """Why there is no NVIDIA GPU, or None if there is one. PyTorch calls AMD's "cuda" too.

    ``torch.cuda.is_available`` would initialise the driver: a later ``CUDA_VISIBLE_DEVICES`` would do nothing, and
    forked processes could not use CUDA. The count comes from NVML.
    """
    if torch.version.hip is not None:
        return f"needs an NVIDIA GPU, and torch {torch.__version__} is a build for AMD's"
    return None if torch.cuda.device_count() > 0 else "needs an NVIDIA GPU"


@cache
def _kept(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def _properties(index: int) -> Any:
    # torch.compile folds the call itself into a constant, but traces through caches.
    return torch.cuda.get_device_properties(index) if torch.compiler.is_compiling() else _kept(index)


def capability(index: int) -> tuple[int, int]:
    """The GPU's compute capability."""
    found = _properties(index)
    return found.major, found.minor


def shared_memory(index: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    return int(_properties(index).shared_memory_per_block_optin)
