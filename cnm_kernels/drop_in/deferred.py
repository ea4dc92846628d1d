"""Tensors that are computed when they are first read, for results that published code returns and rarely looks at.

A ``Deferred`` knows its shape, dtype and device. Any torch function, method or operator applied to it computes the real
tensor first, once, with its autograd graph; from then on it is that tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

# What can be told without the numbers.
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
    _grad_enabled: bool
    _versions: tuple[int, ...]

    @property
    def pending(self) -> bool:
        """Nobody has read it yet."""
        return self._value is None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What it would be computed from, unchanged since.

        Raises:
            RuntimeError: an input was changed in place since: the value it stood for is lost.
        """
        if self._versions != _versions(self._inputs):
            raise RuntimeError(
                "a deferred result (logits or attention weights of an accelerated model) was read after the parameters "
                "it depends on had changed; read it before optimizer.step(), or call cnm_kernels.restore(model)"
            )
        return self._inputs

    def read(self) -> Tensor:
        """The tensor itself, differentiable where this one is."""
        if self._value is None:
            with torch.set_grad_enabled(self._grad_enabled):
                self._value = self._function(*self.inputs)
            self._inputs, self._versions = (), ()
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """C++ code that passes by ``__torch_function__`` ends here, below autograd."""
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)


def defer(function: Callable[..., Tensor], like: Tensor, *inputs: Tensor | None) -> Tensor:
    """A tensor of the shape, dtype and device of ``like`` (a meta tensor does) that stands for ``function(*inputs)``.

    Args:
        function: of the inputs alone; it may be called a second time to be differentiated.
        inputs: everything it depends on; they are kept alive, and must not change in place before it is read.
    """
    if torch.compiler.is_compiling() or any(isinstance(tensor, Deferred) for tensor in inputs):
        return function(*inputs)
    device = next(tensor.device for tensor in inputs if tensor is not None)
    result: Deferred = _Defer.apply(function, like, device, *inputs)
    result._grad_enabled = torch.is_grad_enabled()
    return result


class _Defer(torch.autograd.Function):
    """Gives a ``Deferred`` its place in the autograd graph, for what reads it from C++."""

    @staticmethod
    def forward(ctx: Any, function: Any, like: Tensor, device: torch.device, *inputs: Tensor | None) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        result: Any = Tensor._make_wrapper_subclass(Deferred, like.shape, dtype=like.dtype, device=device)
        result._function, result._inputs, result._value = function, inputs, None
        result._versions = _versions(inputs)
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


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Deferred) else value


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference())
