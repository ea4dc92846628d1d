"""Tensors that are computed when somebody reads them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cnm_kernels.drop_in.deferred import Deferred, defer


def double() -> tuple[Tensor, Tensor]:
    """A tensor yet to be computed, and what it will be."""
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    return defer(lambda x: 2 * x, torch.empty(2, 3, device="meta"), x), 2 * x


def test_it_tells_its_shape_without_being_computed() -> None:
    tensor, value = double()
    assert isinstance(tensor, Deferred)
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.dim()) == (value.shape, value.dtype, value.device, 2)
    assert tensor.size(1) == 3
    assert len(tensor) == 2
    assert tensor.requires_grad
    assert tensor.pending


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.squeeze_(0),
        lambda tensor: tensor.unsqueeze_(1),
        lambda tensor: tensor.transpose_(0, 2),
        lambda tensor: tensor.detach_(),
        lambda tensor: tensor.detach_().requires_grad_(),
    ],
)
def test_it_tells_the_shape_that_changes_in_place_leave(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0).view(1, 2, 3).requires_grad_()
    tensor, value = defer(lambda x: 2 * x, torch.empty(1, 2, 3, device="meta"), x), 2 * x
    change(tensor)
    change(value)
    told, wanted = ((t.shape, t.size(0), len(t), t.dim(), t.requires_grad, t.is_leaf) for t in (tensor, value))
    assert told == wanted


@pytest.mark.parametrize(
    "use",
    [
        lambda tensor: tensor.detach().numpy().tolist(),
        lambda tensor: tensor.tolist(),
        lambda tensor: repr(tensor.detach()),
        lambda tensor: (1 - tensor).tolist(),
        lambda tensor: tensor[0].tolist(),
        lambda tensor: torch.cat([tensor, tensor]).tolist(),
        lambda tensor: [part.tolist() for part in tensor],
        lambda tensor: tensor.max(dim=-1)[1].tolist(),
        lambda tensor: tensor.to(torch.float64).tolist(),
        lambda tensor: copy.deepcopy(tensor.detach()).tolist(),
        lambda tensor: pickle.loads(pickle.dumps(tensor.detach())).tolist(),
        lambda tensor: tensor.data_ptr() != 0,
    ],
)
def test_any_use_computes_it(use: Callable[[Tensor], Any]) -> None:
    tensor, value = double()
    assert use(tensor) == use(value)


def test_it_can_be_saved() -> None:
    tensor, value = double()
    file = io.BytesIO()
    torch.save({"attn_weight": tensor.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["attn_weight"], value.detach())


def test_its_gradient_reaches_what_it_is_made_of() -> None:
    class Triple(torch.autograd.Function):  # what C++ code does: no __torch_function__ on the way
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return 3 * x

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return 3 * d

    x = torch.ones(2, 3, requires_grad=True)
    for function in (Triple.apply, lambda tensor: 3 * tensor):
        tensor = defer(lambda x: x * x, torch.empty(2, 3, device="meta"), x)
        (gradient,) = torch.autograd.grad(function(tensor).sum(), x)
        assert gradient.tolist() == [[6.0] * 3] * 2


def test_inputs_changed_meanwhile_are_refused() -> None:
    x = torch.ones(3)
    tensor = defer(lambda x: 2 * x, torch.empty(3, device="meta"), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="were changed in place; read it before"):
        tensor.sum()


def test_a_function_that_returns_it_gives_it_another_place_in_the_graph() -> None:
    """Reentrant checkpoints run what they checkpoint without gradients, and hang their own node on what comes out."""
    weight = torch.arange(3.0).requires_grad_()
    x = torch.arange(6.0).view(2, 3).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return defer(lambda x, weight: x * weight, torch.empty(2, 3, device="meta"), x, weight)

    out = checkpoint(block, x, use_reentrant=True)
    assert isinstance(out, Deferred)
    (out * out).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach() * weight.detach() ** 2)
    torch.testing.assert_close(weight.grad, (2 * x.detach() ** 2 * weight.detach()).sum(0))


def test_in_inference_mode_it_is_computed_at_once() -> None:
    """There changes in place leave no trace."""
    with torch.inference_mode():
        x = torch.ones(2, 3)
        out = defer(lambda x: 2 * x, torch.empty(2, 3, device="meta"), x)
        x.zero_()
        assert (out == 2).all()


@pytest.mark.parametrize("index", [None, slice(1, None)])
def test_a_first_reader_in_inference_mode_leaves_it_differentiable(index: slice | None) -> None:
    """A metric before the loss."""
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    tensor = defer(lambda x: x * x, torch.empty(2, 3, device="meta"), x, by_row=True)
    part = tensor if index is None else tensor[index]
    with torch.inference_mode():
        assert part.sum().item() == (55 if index is None else 50)
    (gradient,) = torch.autograd.grad(part.sum(), x)
    assert torch.equal(
        gradient, 2 * x * (torch.tensor([[1.0], [1.0]]) if index is None else torch.tensor([[0.0], [1.0]]))
    )


def test_autocast_is_that_of_its_making() -> None:
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = torch.nn.functional.linear(x, weight)
            tensor = defer(
                torch.nn.functional.linear, torch.empty(4, 3, dtype=expected.dtype, device="meta"), x, weight
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
            found = tensor.clone()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_transforms_of_functions_get_the_value_itself() -> None:
    def summed(x: Tensor) -> Tensor:
        return defer(lambda x: x * x, torch.empty(3, device="meta"), x).sum()

    x = torch.arange(3.0)
    assert torch.equal(torch.func.grad(summed)(x), 2 * x)


def test_a_slice_within_a_transform_is_the_value_s() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    outside = defer(lambda x: 2 * x, torch.empty(1, 3, 2, device="meta"), x, by_row=True)
    assert isinstance(outside, Deferred)
    found = torch.func.grad(lambda w: (outside[:, :-1] * w).sum())(torch.ones(1, 2, 2))
    assert torch.equal(found, 2 * x[:, :-1])
