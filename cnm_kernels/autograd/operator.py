"""Registration of one operator's Python side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_map


def _apply(function: Any, *arguments: Any) -> Any:
    """``function.apply`` at the level of ``torch.func`` that is being computed, as an op of PyTorch's own would be.

    Here the dispatcher has already come to one level; ``autograd.Function`` would start again with all of them.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _below_autograd(overload: Any, keyset: Any, inputs: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _in_forward(overload: Any, keyset: Any, inputs: Sequence[Any]) -> Any:
    """``_below_autograd`` in a Function's forward, where gradients and forward mode are off.

    Levels of torch.func below want them, if only to be refused.
    """
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(overload, keyset, inputs)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(overload, keyset, inputs)


def _one_by_one(overload: Any) -> Callable[..., Any]:
    """The op under vmap: each element of the batch by itself, the results stacked."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        size = info.batch_size
        if size == 0:  # one element made up shows the shapes
            inputs = tuple(
                x if dim is None else x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        results = [
            overload(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(max(size, 1))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        outputs = tuple(torch.stack(parts)[:size] for parts in zip(*results, strict=True))
        return outputs, tree_map(lambda _: 0, outputs)

    return batched


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "IMPL")


class Operator:
    """``<namespace>::<op>`` and its ``_backward``, if it has one."""

    def __init__(self, namespace: str, op: str) -> None:
        self.namespace, self.op = namespace, op
        operators = getattr(torch.ops, namespace)
        self.forward = getattr(operators, op).default
        backward = getattr(operators, f"{op}_backward", None)
        self.backward: Any = None if backward is None else backward.default
        for overload in filter(None, (self.forward, self.backward)):
            torch.library.register_vmap(overload, _one_by_one(overload), lib=_library(namespace))

    def register_fake(self, forward: Callable[..., Any], backward: Callable[..., Any] | None = None) -> None:
        """Functions that give empty tensors of the outputs' shapes and dtypes."""
        torch.library.register_fake(f"{self.namespace}::{self.op}", forward)
        if backward is not None:
            torch.library.register_fake(f"{self.namespace}::{self.op}_backward", backward)

    def register_autograd(
        self, setup_context: Callable[..., None], backward: Callable[..., Any], not_differentiable: Sequence[int] = ()
    ) -> None:
        """``setup_context(ctx, inputs, output)`` saves what ``backward(ctx, *d_outputs)`` reads; as in torch.library.

        Outputs ``not_differentiable`` are there for the backward alone. Upstream gradients that are zero come as None.
        A second derivative is refused aloud.

        This is what ``torch.library.register_autograd`` does, less its inspection of the schema on every call, whose
        cost grows with the square of the number of arguments (16 of 27 us at eight, and these schemas have no defaults
        to fill).
        """
        overload = self.forward

        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            output = _in_forward(overload, keyset, inputs)
            ctx.set_materialize_grads(False)
            if not_differentiable:
                ctx.mark_non_differentiable(*(output[i] for i in not_differentiable))
            setup_context(ctx, savable(inputs), output)
            return output

        def differentiate(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            return (*backward(ctx, *d_outputs), None)

        self._dispatch(overload, forward, differentiate)
        if self.backward is not None:
            self._refuse_a_second_derivative()

    def _refuse_a_second_derivative(self) -> None:
        """The backward's results stay connected to its inputs; whoever differentiates them is told."""
        overload, name = self.backward, f"{self.namespace}::{self.op}"

        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            return _in_forward(overload, keyset, inputs)

        def differentiate(ctx: Any, *d_outputs: Tensor | None) -> Any:
            raise NotImplementedError(f"{name} is differentiable once; its gradient is not")

        self._dispatch(overload, forward, differentiate)

    def _dispatch(self, overload: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Makes calls that need gradients go through an ``autograd.Function`` of these two; refuses forward mode.

        Here and not in the public op, since autograd calls a backward, and a compiled public op sees no tangents.
        """
        body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        formula: Any = type(self.op, (_SingleLevelFunction,), body)
        name = f"{self.namespace}::{self.op}"

        def dispatch(keyset: Any, *inputs: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
                raise NotImplementedError(f'{name}: forward-mode derivatives want use_backend("torch")')
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return _apply(formula, *inputs, keyset)
            return _below_autograd(overload, keyset, inputs)

        _library(self.namespace).impl(overload, dispatch, "Autograd", with_keyset=True)


def savable(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs with copies of inference mode's tensors, such as lengths, which autograd does not save."""
    return tuple(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in inputs)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of the same shape, as the kernels allocate."""
    return tensor.new_empty(tensor.shape, dtype=dtype)
