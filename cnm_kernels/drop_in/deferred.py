"""Tensors that are computed when they are first read, for results that published code returns and rarely looks at.

A ``Deferred`` knows its shape, dtype and device. Any torch function, method or operator applied to it computes the real
tensor first, once, with its autograd graph; from then on it is that tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

# These can be answered before the tensor is computed.
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "__len__", "get_device", "element_size", "is_floating_point")
    ),
}


class Deferred(Tensor):
    """``function(*inputs)``, not yet computed; see ``defer``."""

    _function: Callable[..., Tensor]
    _inputs: tuple[Tensor | None, ...]
    _value: Tensor | None
    grad_enabled: bool  # whether gradients were recorded when it was made
    _node: Any  # its place in the graph when it was made
    _versions: tuple[int, ...]
    _by_row: bool = False
    _whole: tuple[Deferred, Any] | None = None

    @property
    def pending(self) -> bool:
        """Nobody has read it yet, nor what it is a part of, and ``inputs`` are what its gradient goes to."""
        return self._value is None and not self._moved and (self._whole is None or self._whole[0].pending)

    @property
    def _moved(self) -> bool:
        """A function that it was returned from has given it another place in the graph, as checkpoints do."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self._node

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The inputs it would be computed from, if they are unchanged since.

        Raises:
            RuntimeError: an input was changed in place since: the value it stood for is lost.
        """
        if self._versions != versions(self._inputs):
            raise RuntimeError(
                "a deferred result (logits or attention weights of an accelerated model) was read after the states or "
                "weights of keys that it is computed from were changed in place; read it before, or call "
                "cnm_kernels.restore(model)"
            )
        return self._inputs

    def read(self) -> Tensor:
        """The tensor itself, differentiable where this one is."""
        if self._value is None:
            # Who reads it next may differentiate it, whatever the mode of who reads it first.
            with torch.inference_mode(False), torch.set_grad_enabled(self.grad_enabled):
                if self._whole is None:
                    self._value = self._function(*self.inputs)
                else:
                    whole, index = self._whole  # a view of it, as ever: changes in place show in both
                    self._value = whole.read()[index]
            self._inputs, self._versions, self._whole = (), (), None
        return cast(Tensor, _AtPlaceOf.apply(self, self._value)) if self._moved else self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA and args[0]._value is None:  # squeeze_ and the like change the value's alone
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(args[0], Deferred):
            part = args[0]._part(args[1])
            if part is not None:
                return part
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _part(self, index: Any) -> Tensor | None:
        """``self[index]``, deferred too, where the index slices dimensions before the last; else None."""
        slices = index if isinstance(index, tuple) else (index,)
        if is_traced() or not (self._by_row and self.pending and len(slices) <= self.dim()):
            return None
        bounds = [bound for part in slices if type(part) is slice for bound in (part.start, part.stop, part.step)]
        if any(type(part) is not slice for part in slices) or any(type(b) not in (int, type(None)) for b in bounds):
            return None
        if len(slices) == self.dim() and slices[-1] != slice(None):
            return None
        first, *others = self.inputs
        assert first is not None
        with torch.set_grad_enabled(self.grad_enabled):  # a view's gradient is that of what it views
            rows = first[slices[: first.dim() - 1]]
            if rows.numel() == 0:
                return None
            like = torch.empty(*rows.shape[:-1], self.size(-1), dtype=self.dtype, device="meta")
            part = defer(self._function, like, rows, *others, by_row=True)
        assert isinstance(part, Deferred)
        part._whole = (self, index)
        return part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """C++ code that passes by ``__torch_function__`` ends here, below autograd."""
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)


def defer(function: Callable[..., Tensor], like: Tensor, *inputs: Tensor | None, by_row: bool = False) -> Tensor:
    """A tensor of the shape, dtype and device of ``like`` (a meta tensor does) that stands for ``function(*inputs)``.

    Args:
        function: of the inputs alone; it may be called a second time to be differentiated. The autocast setting is that
            of the call of ``defer``.
        inputs: everything it depends on; they are kept alive, and must not change in place before it is read.
        by_row: the last dimension of the first input alone makes that of the result; slices are deferred too.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    # Inference tensors do not say that they were changed in place.
    known = not any(isinstance(tensor, Deferred) or tensor.is_inference() for tensor in given)
    if not known or is_traced():
        return function(*inputs)
    device = given[0].device
    result: Deferred = _Defer.apply(_under_autocast_of_now(function, device.type), like, device, *inputs)
    result.grad_enabled = torch.is_grad_enabled()
    with torch._C.DisableTorchFunctionSubclass():
        result._node = result.grad_fn
    result._by_row = by_row
    return result


def _under_autocast_of_now(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """``function``, under the autocast setting of this moment whenever it is called."""
    if not torch.amp.is_autocast_available(device):
        return function
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def as_now(*inputs: Tensor | None) -> Tensor:
        with torch.autocast(device, dtype if enabled else None, enabled=enabled):
            return function(*inputs)

    return as_now


class _Defer(torch.autograd.Function):
    """Gives a ``Deferred`` its place in the autograd graph, for what reads it from C++."""

    @staticmethod
    def forward(ctx: Any, function: Any, like: Tensor, device: torch.device, *inputs: Tensor | None) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        result: Any = Tensor._make_wrapper_subclass(Deferred, like.shape, dtype=like.dtype, device=device)
        result._function, result._inputs, result._value = function, inputs, None
        result._versions = versions(inputs)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        leaves = [
            tensor if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            result = ctx.function(*leaves)
        wanted: Any = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        gradients = iter(torch.autograd.grad(result, wanted, d_result, allow_unused=True))
        return (None, None, None, *(next(gradients) if needed else None for needed in needs))


class _AtPlaceOf(torch.autograd.Function):
    """A value whose gradient goes where that of ``place`` goes."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor, None]:
        return d_value, None


def is_traced() -> bool:
    """What runs is to serve other numbers too: ``torch.compile``, ``torch.jit.trace`` or a ``torch.func`` transform."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Deferred) else value


def versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Numbers that change when one of the tensors is changed in place."""
    return tuple(tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference())
