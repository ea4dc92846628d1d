"""How a public op reaches its backend: autocast, and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnm_kernels import registry

_NARROWED = (torch.float32, torch.bfloat16, torch.float16)


def run(op: str, tensor: Tensor, *arguments: Any) -> Any:
    """Calls the backend's function."""
    return outside_autocast(registry.implementation(op, tensor), tensor, *arguments)


def outside_autocast(function: Callable[..., Any], tensor: Tensor, *arguments: Any) -> Any:
    """The ops fix their own precision."""
    if _autocasts(tensor.device.type):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*arguments)
    return function(*arguments)


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Matrix operands in the autocast dtype where autocast is on; float64 and what is no real number is left alone."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors  # the checks that follow name the culprit
    device = tensors[0].device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype in _NARROWED else tensor for tensor in tensors)


def autocast_bias(bias: Tensor, operand: Tensor) -> Tensor:
    """A narrow bias in the dtype of the operands that were cast; a float32 one is added as it is."""
    narrow = isinstance(bias, Tensor) and bias.dtype in (torch.bfloat16, torch.float16)
    return bias.to(operand.dtype) if narrow and _autocasts(operand.device.type) else bias
