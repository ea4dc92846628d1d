"""A layer on dropped-out input whose backward draws the dropout again: it is large, and soon drawn."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import cnm_kernels as kernels
from cnm_kernels import registry

CHANGED = "{} was modified in place between the forward and the backward that reads it; change a copy of it"


def without_keeping(apply: Callable[[Tensor], Tensor], x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """``apply(draw(x))``; what ``draw`` returns is not kept for the backward, which draws it again.

    Raises:
        RuntimeError: in the backward, if x or a tensor kept was changed in place meanwhile.
    """
    if not torch.is_grad_enabled():
        return apply(draw(x))
    version, backend = x._version, registry.requested()
    dropped = draw(x)
    of_dropped = weakref.ref(dropped)  # autograd holds the hooks, and would hold it by them

    def draw_again() -> Tensor:
        if x._version != version:
            raise RuntimeError(CHANGED.format("the input of a layer with dropout"))
        with torch.no_grad(), kernels.use_backend(backend):
            return draw(x)

    def pack(tensor: Tensor) -> Any:
        return draw_again if tensor is of_dropped() else (tensor, tensor._version)

    def unpack(kept: Any) -> Tensor:
        if kept is draw_again:
            return draw_again()
        tensor, at_first = kept
        if tensor._version != at_first:  # which autograd checks where there are no hooks
            raise RuntimeError(CHANGED.format(f"a tensor of shape {list(tensor.shape)}"))
        return tensor

    with saved_tensors_hooks(pack, unpack):
        return apply(dropped)
