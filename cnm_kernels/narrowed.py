"""Parameters cast once for all their uses: the master weights of training on GPUs, whose products take narrow ones.

``linear`` in PyTorch casts float32 parameters to the dtype of its input at every use, a kernel each. Within
``NarrowedParameters`` it reads copies that one fused kernel makes of all of them. The numbers are the same to the bit:
gradients come back in the parameters' own dtype, use by use, as autograd's cast gives them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter: its copy, and the version that was copied


class NarrowedParameters:
    """Copies of parameters in a narrower dtype, which ``linear`` reads while this is entered.

    Args:
        parameters: of a wider dtype, on one device.
        dtype: of the copies.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.copies = [torch.empty_like(parameter, dtype=dtype) for parameter in self.parameters]

    def __enter__(self) -> NarrowedParameters:
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            _copies.pop(parameter, None)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the parameters as they are now; whatever was computed from earlier copies has had its backward."""
        torch._foreach_copy_(self.copies, self.parameters)
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            _copies[parameter] = copy, parameter._version


class _Narrow(torch.autograd.Function):
    """A cast whose result is there already; autograd casts the gradient to the dtype of ``tensor``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, copy: Tensor) -> Tensor:
        return _same_view(copy, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _same_view(copy: Tensor, tensor: Tensor) -> Tensor:
    """The view of ``copy`` that ``tensor`` is of its parameter; both have the same layout."""
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, where it is a parameter or a view of one by way of its copy, unless it changed since."""
    if tensor.dtype == dtype or torch.compiler.is_compiling() or not _copies:  # a compiled function casts by itself
        return tensor.to(dtype)
    parameter = tensor if tensor._base is None else tensor._base
    copy, version = _copies.get(parameter, (None, None))
    if copy is None or copy.dtype != dtype or version != parameter._version:
        return tensor.to(dtype)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Narrow.apply(tensor, copy)
    return _same_view(copy.detach(), tensor)
