"""dropout_add_layer_norm: F.layer_norm without dropout, the stated mask with it, any shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.dropout_add_layer_norm import add_and_norm
from samples import run, sample, targets

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


def test_an_index_for_each_sample_is_asked_for() -> None:
    inputs = sample(OP, "published-12x256", torch.float32)
    with pytest.raises(ValueError, match=r"sample_indices must hold an index for each sample of x \[3, 4, 256\], got"):
        run(OP, inputs | {"sample_indices": torch.zeros(2, dtype=torch.int64)}, "torch")


@on_every_float32
@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_mixed_dtypes_run_in_the_wider_one(backend: str, device: str, dtype: torch.dtype, narrow: str) -> None:
    """As under autocast, where the sublayer's output is bfloat16 and the residual stream float32."""
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


@pytest.mark.parametrize("size", [1e19, 1e25, 1e35])
@pytest.mark.parametrize("D", [256, 37])
def test_rows_whose_squares_overflow(D: int, size: float) -> None:
    draw = Draw("large rows", torch.float32, "cpu")
    inputs = add_and_norm(draw, 3, D, p=0.0)
    inputs = inputs | {"residual": inputs["residual"] * size, "x": inputs["x"] * size}
    d_out = draw.normal(3, D)
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "native")):
        leaves = {name: inputs[name].to(dtype).requires_grad_() for name in ("x", "residual", "weight", "bias")}
        (out,) = run(OP, inputs | leaves, backend)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), d_out.to(dtype))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found.double() / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5
        )
