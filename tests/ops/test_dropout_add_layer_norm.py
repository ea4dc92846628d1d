"""dropout_add_layer_norm: F.layer_norm without dropout, the stated mask with it, any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.dropout_add_layer_norm import add_and_norm
from samples import run, sample, targets
from torch.utils._python_dispatch import TorchDispatchMode

import cnm_kernels
from cnm_kernels import native

OP = "dropout_add_layer_norm"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_without_dropout_it_is_layer_norm_of_the_sum(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "no-dropout", dtype, device)
    total = inputs["x"] + inputs["residual"]
    expected = F.layer_norm(total, total.shape[-1:], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(run(OP, inputs, backend)[0], expected)


@on_every_float32
def test_its_mask_is_that_of_dropout(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "odd-5x37", dtype, device)
    drawn = {name: inputs[name] for name in ("x", "p", "seed", "offset")}
    total = inputs["residual"] + run("dropout", drawn, "torch")[0]
    expected = F.layer_norm(total, total.shape[-1:], inputs["weight"], inputs["bias"], inputs["eps"])
    torch.testing.assert_close(run(OP, inputs, backend)[0], expected)


@on_every_float32
def test_dropped_elements_get_no_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "odd-5x37", dtype, device)
    x, residual = inputs["x"].requires_grad_(), inputs["residual"].requires_grad_()
    (out,) = run(OP, inputs, backend)
    gradients = torch.autograd.grad(out.square().sum(), [x, residual])
    drawn = {name: inputs[name] for name in ("p", "seed", "offset")}
    (scale,) = run("dropout", {"x": torch.ones_like(x), **drawn}, "torch")
    torch.testing.assert_close(gradients[0], gradients[1] * scale)


@on_every_float32
@pytest.mark.parametrize("D", [24, 37])
def test_chosen_samples_drop_what_they_drop_among_all(backend: str, device: str, dtype: torch.dtype, D: int) -> None:
    draw = Draw("larger batch", dtype, device)
    whole = add_and_norm(draw, 7, 3, D, p=0.4)
    chosen = draw.lengths(5, 0, 5, 2)
    part = whole | {name: whole[name][chosen] for name in ("x", "residual")}
    d_out = draw.normal(7, 3, D)
    results = []
    for inputs, upstream in ((whole, d_out), (part | {"sample_indices": chosen}, d_out[chosen])):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "residual")}
        (out,) = run(OP, inputs | leaves, backend)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), upstream)))
    for of_all, of_part in zip(*results, strict=True):
        assert torch.equal(of_all[chosen], of_part)


@on_every_float32
@pytest.mark.parametrize("user", [0, 1])
def test_one_of_two_users_may_have_no_gradient(backend: str, device: str, dtype: torch.dtype, user: int) -> None:
    inputs = sample(OP, "twice-odd", dtype, device)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    pair, (once,) = run(OP, inputs, backend), run(OP, inputs | {"twice": False}, backend)
    assert all(torch.equal(out, once) for out in pair)
    d_out = Draw("upstream", dtype, device).normal(*once.shape)
    found, expected = (torch.autograd.grad(out, list(leaves.values()), d_out) for out in (pair[user], once))
    assert all(map(torch.equal, found, expected))


@on_every_float32
def test_two_users_gradients_are_added_by_the_kernel(backend: str, device: str, dtype: torch.dtype) -> None:
    """As one user's who has their sum; autograd, which would add them before, adds nothing."""
    inputs = sample(OP, "twice-odd", dtype, device)
    leaves = [inputs[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]
    draw = Draw("upstream", dtype, device)
    d_out, d_again = draw.normal(5, 37), draw.normal(5, 37)
    (once,), pair = run(OP, inputs | {"twice": False}, backend), run(OP, inputs, backend)
    expected = torch.autograd.grad(once, leaves, d_out + d_again)
    with Additions() as additions:
        found = torch.autograd.grad(pair, leaves, (d_out, d_again))
    assert all(map(torch.equal, found, expected)) or backend == "torch"
    assert (additions.count == 0) == (backend != "torch")


class Additions(TorchDispatchMode):
    """Counts PyTorch's additions of tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        return function(*args, **(kwargs or {}))


@on_every_float32
@pytest.mark.parametrize("user", [0, 1])
def test_a_result_for_two_users_is_not_changed_in_place(
    backend: str, device: str, dtype: torch.dtype, user: int
) -> None:
    if backend == "torch":
        pytest.skip("PyTorch's own ops notice by themselves")
    inputs = sample(OP, "twice-odd", dtype, device)
    inputs["x"].requires_grad_()
    pair = run(OP, inputs, backend)

    def change_one_and_read_the_other() -> None:
        pair[user].mul_(2)
        pair[1 - user].sum().backward()

    with pytest.raises(RuntimeError, match="view"):
        change_one_and_read_the_other()


def test_an_index_for_each_sample_is_asked_for() -> None:
    inputs = sample(OP, "published-12x256", torch.float32)
    with pytest.raises(ValueError, match=r"sample_indices must hold an index for each sample of x \[3, 4, 256\], got"):
        run(OP, inputs | {"sample_indices": torch.zeros(2, dtype=torch.int64)}, "torch")


@on_every_float32
@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_mixed_dtypes_run_in_the_wider_one(backend: str, device: str, dtype: torch.dtype, narrow: str) -> None:
    """Under autocast the sublayer's output is bfloat16 and the residual stream float32."""
    inputs = sample(OP, "published-12x256", dtype, device)
    inputs[narrow] = inputs[narrow].bfloat16().requires_grad_()
    (out,) = run(OP, inputs, backend)
    (expected,) = run(OP, inputs | {narrow: inputs[narrow].float()}, backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[narrow])
    assert gradient.dtype == torch.bfloat16


@on_every_float32
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    D=st.integers(2, 300),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_shape(
    backend: str, device: str, dtype: torch.dtype, shape: list[int], D: int, p: float, seed: int
) -> None:
    inputs = add_and_norm(Draw(f"{shape} {D}", dtype, device), *shape, D, p=p, seed=seed, eps=1e-3)
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


def check_rows_of_size(backend: str, device: str, dtype: torch.dtype, size: float, D: int, **options: float) -> None:
    """Against float64, to a few roundings of the largest number of each tensor."""
    draw = Draw("extreme rows", dtype, device)
    inputs = add_and_norm(draw, 5, D, **{"p": 0.2, **options})
    for name in ("x", "residual"):
        inputs[name] = (inputs[name].double().clamp(-3, 3) * size).to(dtype)
        inputs[name][1] = inputs[name][0].sign()  # a row of the usual size among the others
    d_out = draw.normal(5, D)
    results = []
    for precision, chosen in ((torch.float64, "torch"), (dtype, backend)):
        leaves = {name: inputs[name].to(precision).requires_grad_() for name in ("x", "residual", "weight", "bias")}
        (out,) = run(OP, inputs | leaves, chosen)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), d_out.to(precision))))
    close = 1e-5 if dtype == torch.float32 else 1e-2
    for expected, found in zip(*results, strict=True):
        for rows in ([0, 2, 3, 4], [1]) if expected.dim() > 1 else ([slice(None)],):
            largest = expected[rows].abs().max()
            error = (found.double() - expected)[rows].abs().max()
            below = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0.0  # Triton's interpreter makes these 0
            assert error < close * largest + below, f"off by {error:.3g} of {largest:.3g}"


on_every_backend = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32, torch.bfloat16]))


@on_every_backend
@pytest.mark.parametrize("size", [1e19, 1e25, 1e35, 1e38])
@pytest.mark.parametrize("D", [256, 37, 1100])
def test_rows_whose_squares_overflow(backend: str, device: str, dtype: torch.dtype, size: float, D: int) -> None:
    """Or whose sum does, or at 1e38 the sum of x and residual."""
    check_rows_of_size(backend, device, dtype, size, D)
    check_rows_of_size(backend, device, dtype, size, D, p=0.0)


@on_every_backend
@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-30, 1e-36])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-5])
def test_rows_whose_squares_underflow(backend: str, device: str, dtype: torch.dtype, size: float, eps: float) -> None:
    check_rows_of_size(backend, device, dtype, size, 37, eps=eps)


@on_every_backend
@pytest.mark.parametrize("number", [2.0**127, 1.0, 2.0**-100])  # whose sums are exact in any order
def test_rows_of_one_number_are_zero(backend: str, device: str, dtype: torch.dtype, number: float) -> None:
    """Their deviation is none, and divided by that of eps; without eps there is no result."""
    inputs = add_and_norm(Draw("one number", dtype, device), 2, 256, p=0.0)
    inputs |= {"x": torch.zeros_like(inputs["x"]), "residual": torch.full_like(inputs["residual"], number)}
    inputs["residual"].requires_grad_()
    (out,) = run(OP, inputs, backend)
    assert torch.equal(out, inputs["bias"].expand(2, 256))
    d_out = Draw("upstream", dtype, device).normal(2, 256)
    (found,) = torch.autograd.grad(out, inputs["residual"], d_out)
    g = (d_out * inputs["weight"]).double()
    expected = (g - g.mean(-1, keepdim=True)) / inputs.get("eps", 1e-5) ** 0.5
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1.0)
    assert run(OP, inputs | {"eps": 0.0}, backend)[0].isnan().all()


@pytest.mark.skipif("cpu" in native.LOAD_ERRORS, reason="the C++ module is not built")
def test_negative_indices_are_refused() -> None:
    x, ones = torch.ones(2, 3, 8), torch.ones(8)
    inputs = {"x": x, "residual": x, "weight": ones, "bias": ones, "p": 0.5, "seed": 0}
    with pytest.raises(RuntimeError, match="sample_indices must be >= 0, got -1 for sample 1"):
        run(OP, inputs | {"sample_indices": torch.tensor([0, -1])}, "native")


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.bfloat16]))
@pytest.mark.parametrize("twice", [False, True])
def test_a_float32_bias_has_a_float32_gradient(backend: str, device: str, dtype: torch.dtype, twice: bool) -> None:
    draw = Draw("bias", dtype, device)
    x, residual, weight = draw.normal(257, 8), draw.normal(257, 8), draw.normal(8)
    bias = torch.zeros(8, device=device, requires_grad=True)
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.dropout_add_layer_norm(x, residual, weight, bias, 0.0, seed=0, twice=twice)
        (gradient,) = torch.autograd.grad((out[0] if twice else out).sum(), bias)
    assert gradient.tolist() == [257.0] * 8  # which bfloat16 cannot hold
