"""How a public op reaches its backend: autocast, forward-mode derivatives, and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from cnm_kernels import reference, registry

_NARROWED = (torch.float32, torch.bfloat16, torch.float16)


def run(op: str, tensor: Tensor, *arguments: Any) -> Any:
    """Calls the backend's function."""
    function = registry.implementation(op, tensor)
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward_mode and function is not getattr(reference, op) and any(map(_has_tangent, arguments)):
        raise NotImplementedError(f'{op}: forward-mode derivatives want use_backend("torch")')
    return outside_autocast(function, tensor, *arguments)


def _has_tangent(argument: Any) -> bool:
    """Whether its forward-mode derivative is asked for, at this level of ``torch.func`` or one below."""
    if not isinstance(argument, Tensor):
        return False
    tensor = argument
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    forward = {level.level() for level in retrieve_all_functorch_interpreters() if level.key() == TransformType.Jvp}
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.maybe_get_level(tensor) in forward:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


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
