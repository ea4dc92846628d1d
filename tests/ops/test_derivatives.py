"""Second and forward-mode derivatives are right (plain PyTorch) or refused aloud, never wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_records import DIFFERENTIABLE
from op_records.draw import Inputs
from samples import cases, run, sample
from test_every_op import TYPICAL
from torch import Tensor
from torch.autograd import forward_ad

import cnm_kernels

ARGUMENTS = ("op", "name", "backend", "device", "dtype")
ONE_EACH = {op: names[:1] for op, names in TYPICAL.items() if op not in ("dropout", "linear")}  # these are linear
ONE_EACH["dropout_add_layer_norm"] += ("twice-odd",)  # another way through autograd


def _function(op: str, inputs: Inputs, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns a function of the op's first differentiable input, and that input."""
    name = DIFFERENTIABLE[op][0]

    def function(x: Tensor) -> Tensor:
        return run(op, inputs | {name: x * x}, backend)[0].square().sum()

    return function, inputs[name]


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_a_second_derivative(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    if backend == "torch":
        torch.autograd.grad(first.sum(), x)
        return
    with pytest.raises(NotImplementedError, match="is differentiable once"):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match="is differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_forward_mode(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    if backend == "torch":
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
        return
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("way", ["jvp", "hessian"])
@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_forward_mode_over_a_gradient(
    op: str, name: str, backend: str, device: str, dtype: torch.dtype, way: str
) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    ways: dict[str, Callable[[], Any]] = {
        "jvp": lambda: torch.func.jvp(torch.func.grad(function), (x,), (torch.ones_like(x),)),
        "hessian": lambda: torch.func.hessian(function)(x),
    }
    if backend == "torch":
        ways[way]()
        return
    with pytest.raises(NotImplementedError, match="forward-mode"):
        ways[way]()


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_forward_mode_of_a_gradient(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Where the upstream gradient alone has a tangent, only the backward meets it."""
    function, x = _function(op, sample(op, name, dtype, device), backend)
    value, pull = torch.func.vjp(function, x)
    one = torch.ones_like(value)
    leaf = x.detach().requires_grad_()
    ways: list[Callable[[], Any]] = [
        lambda: torch.func.jvp(lambda upstream: pull(upstream)[0], (one,), (one,))[1],
        lambda: torch.func.jacfwd(lambda upstream: pull(upstream)[0])(one),
        lambda: _tangent_of_the_gradient(function(leaf), leaf),
    ]
    if backend == "torch":
        expected = pull(one)[0]  # it is linear in the upstream gradient
        for way in ways:
            torch.testing.assert_close(way(), expected)
        return
    for way in ways:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            way()


def _tangent_of_the_gradient(value: Tensor, leaf: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        one = torch.ones_like(value)
        (gradient,) = torch.autograd.grad(value, leaf, forward_ad.make_dual(one, one))
        return forward_ad.unpack_dual(gradient).tangent


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
@pytest.mark.parametrize("way", ["jvp", "hessian"])
def test_compiled_forward_mode(way: str, op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "torch":
        pytest.skip("plain PyTorch, which is right")
    inputs, differentiated = sample(op, name, dtype, device), DIFFERENTIABLE[op][0]

    def function(x: Tensor) -> Tensor:
        out = getattr(cnm_kernels, op)(**inputs | {differentiated: x})
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first.square().sum()

    def derivative(x: Tensor) -> Tensor:
        if way == "hessian":
            return torch.func.hessian(function)(x)
        return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    torch._dynamo.reset()
    with cnm_kernels.use_backend(backend), pytest.raises(Exception, match="forward-mode derivatives want"):
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(inputs[differentiated])
    torch._dynamo.reset()


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_torch_func(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    value, pull = torch.func.vjp(function, x)
    ways = (torch.func.grad(function)(x), pull(torch.ones_like(value))[0], torch.func.jacrev(function)(x))
    for found in ways:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_per_sample_gradients(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    batch = torch.stack([x, 0.5 * x, -x])
    expected = torch.stack([torch.func.grad(function)(row) for row in batch])
    with warnings.catch_warnings():
        if backend != "torch":
            warnings.filterwarnings("error", message=".*performance drop.*")
        found = torch.func.vmap(torch.func.grad(function))(batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
@pytest.mark.parametrize("way", ["torch.func", "autograd"])
def test_gradients_of_a_batch(way: str, op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Within vmap the op's own inputs do not say that they want a gradient."""
    function, x = _function(op, sample(op, name, dtype, device), backend)
    batch = torch.stack([x, 0.5 * x, -x])
    expected = torch.stack([torch.func.grad(function)(row) for row in batch])

    def total(batch: Tensor) -> Tensor:
        return torch.func.vmap(function)(batch).sum()

    leaf = batch.detach().requires_grad_()
    found = torch.func.grad(total)(batch) if way == "torch.func" else torch.autograd.grad(total(leaf), leaf)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_no_samples_have_no_gradients(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    function, x = _function(op, sample(op, name, dtype, device), backend)
    nothing = x.new_empty(0, *x.shape)
    assert torch.func.vmap(torch.func.grad(function))(nothing).shape == nothing.shape


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
@pytest.mark.parametrize("way", ["hessian", "grad of grad", "jacrev of jacrev"])
def test_second_derivatives_by_torch_func(
    way: str, op: str, name: str, backend: str, device: str, dtype: torch.dtype
) -> None:
    if backend == "torch":
        pytest.skip("plain PyTorch, which is right")
    function, x = _function(op, sample(op, name, dtype, device), backend)
    second = {
        "hessian": torch.func.hessian(function),
        "grad of grad": torch.func.grad(lambda x: torch.func.grad(function)(x).sum()),
        "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(function)),
    }[way]
    with pytest.raises(NotImplementedError, match=r"differentiable once|forward-mode"):
        second(x)


@pytest.mark.parametrize(ARGUMENTS, cases(ONE_EACH, [torch.float32]))
def test_other_inputs_of_inference_mode(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Lengths, targets and frozen operands may come from a loader or an encoder under torch.inference_mode."""
    if backend == "torch":
        pytest.skip("plain PyTorch, which saves some of them and then refuses")
    inputs = sample(op, name, dtype, device)
    function, x = _function(op, inputs, backend)
    expected = torch.autograd.grad(function(leaf := x.detach().requires_grad_()), leaf)
    with torch.inference_mode():
        made = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    function, _ = _function(op, made, backend)
    found = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(found, expected)
