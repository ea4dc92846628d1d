"""Registration of one operator's Python side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


class _OnlyOnce(torch.autograd.Function):
    """The identity on a gradient, connected to all that it was computed from: differentiating it is refused."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *_: Any) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.op} is differentiable once; its gradient is not")


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
        overload, name = self.forward, f"{self.namespace}::{self.op}"

        def below_autograd(keyset: Any, inputs: tuple[Any, ...]) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            output = below_autograd(keyset, tuple(inputs))
            ctx.set_materialize_grads(False)
            if not_differentiable:
                ctx.mark_non_differentiable(*(output[i] for i in not_differentiable))
            setup_context(ctx, inputs, output)
            return output

        def differentiate(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *d_outputs)
            if torch.is_grad_enabled():  # somebody may differentiate these again
                made_of = [t for t in (*d_outputs, *ctx.saved_tensors) if t is not None and t.requires_grad]
                gradients = (d if d is None else _OnlyOnce.apply(name, d.detach(), *made_of) for d in gradients)
            return (*gradients, None)

        body = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        formula: Any = type(self.op, (torch.autograd.Function,), body)

        def dispatch(keyset: Any, *inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return formula.apply(*inputs, keyset)
            return below_autograd(keyset, inputs)

        _library(self.namespace).impl(self.op, dispatch, "Autograd", with_keyset=True)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As the kernels allocate: the same shape, contiguous."""
    return tensor.new_empty(tensor.shape, dtype=dtype)
