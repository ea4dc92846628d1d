"""A layer on dropped-out input whose backward draws the dropout again: it is large, and soon drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import cnm_kernels as kernels
from cnm_kernels import registry


class _Drawn(NamedTuple):
    """How a tensor lies in what was drawn."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept(NamedTuple):
    tensor: Tensor
    version: int | None


def without_keeping(apply: Callable[[Tensor], Tensor], x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """``apply(draw(x))``; what ``draw`` returns is not kept for the backward, which draws it again.

    Raises:
        RuntimeError: in the backward, if x or a tensor kept was changed in place meanwhile.
    """
    if not torch.is_grad_enabled():
        return apply(draw(x))
    version, backend = _version(x), registry.requested()
    dropped = draw(x)
    storage = StorageWeakRef(dropped.untyped_storage())  # autograd holds the hooks, and would hold a tensor by them

    def pack(tensor: Tensor) -> _Drawn | _Kept:
        if StorageWeakRef(tensor.untyped_storage()) == storage:
            return _Drawn(tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return _Kept(tensor, _version(tensor))

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _Kept):
            _check_same(kept.tensor, kept.version)  # as autograd does where there are no hooks
            return kept.tensor
        _check_same(x, version)
        with torch.no_grad(), kernels.use_backend(backend):
            return draw(x).as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        return apply(dropped)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _check_same(tensor: Tensor, version: int | None) -> None:
    if _version(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} was modified in place between the forward and the backward that "
            f"reads it; change a copy of it"
        )
