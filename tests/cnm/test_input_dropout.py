"""The frames' layer draws its dropout again for the backward: the same gradients, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import cnm_kernels as kernels
from cnm.models.input_dropout import without_keeping
from cnm.models.layers import apply_linear
from cnm_kernels import registry

SEED = torch.tensor(5)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def draw(x: Tensor) -> Tensor:
    return kernels.dropout(x, 0.3, seed=SEED, offset=2)


def run(layer: nn.Linear, x: Tensor) -> Tensor:
    return without_keeping(partial(apply_linear, layer), x, draw)


def test_values_and_gradients_are_those_of_dropout_kept(layer: nn.Linear) -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    out, wanted = run(layer, x), apply_linear(layer, draw(x))
    assert torch.equal(out, wanted)
    inputs = [x, *layer.parameters()]
    for _ in range(2):  # and once more
        found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        for one, other in zip(
            found, torch.autograd.grad(wanted.square().sum(), inputs, retain_graph=True), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_what_is_drawn_is_not_kept(layer: nn.Linear, backend: str | None) -> None:
    """Not even as a view: PyTorch's product keeps one."""
    drawn: list[StorageWeakRef] = []

    def draw_and_note(x: Tensor) -> Tensor:
        found = draw(x)
        drawn.append(StorageWeakRef(found.untyped_storage()))
        return found

    with kernels.use_backend(backend):
        out = without_keeping(partial(apply_linear, layer), torch.randn(2, 5, 6), draw_and_note)
    assert [storage.expired() for storage in drawn] == [True]
    out.sum().backward()
    assert len(drawn) == 2


def test_frames_of_inference_mode_are_taken(layer: nn.Linear) -> None:
    with torch.inference_mode():
        x = torch.randn(2, 5, 6)
    out = run(layer, x)
    (found,) = torch.autograd.grad(out.sum(), [layer.weight])
    (wanted,) = torch.autograd.grad(apply_linear(layer, draw(x.clone())).sum(), [layer.weight])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("forward", "backward"), [("torch", None), (None, "torch")])
def test_the_backward_draws_on_the_forwards_backend(
    layer: nn.Linear, forward: str | None, backward: str | None
) -> None:
    drawn_on: list[str | None] = []

    def draw_and_note(x: Tensor) -> Tensor:
        drawn_on.append(registry.requested())
        return draw(x)

    with kernels.use_backend(forward):
        out = without_keeping(partial(apply_linear, layer), torch.randn(2, 5, 6), draw_and_note)
    with kernels.use_backend(backward):
        out.sum().backward()
    assert drawn_on == [forward, forward]


CHANGES: dict[str, Callable[[nn.Linear, Tensor], object]] = {
    "the frames": lambda layer, x: x.zero_(),
    "the weight": lambda layer, x: layer.weight.mul_(2),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_in_between_is_refused(layer: nn.Linear, what: str) -> None:
    x = torch.randn(2, 5, 6)
    start = x.clone().requires_grad_()
    y = start * 1
    out = run(layer, y)
    with torch.no_grad():
        CHANGES[what](layer, y)
    with pytest.raises(RuntimeError, match="modified"):
        out.sum().backward()
