"""gaussian_mask: the clamp, the ends of the video, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values, gradients_of, in_dtype
from op_records import DIFFERENTIABLE, RECORDS
from op_records.draw import Draw
from samples import run, sample, targets

import cnm_kernels

OP = "gaussian_mask"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_published_values(backend: str, device: str, dtype: torch.dtype) -> None:
    """At the center 1; one width off exp(-alpha); a width below 0.1 counts as 0.1."""
    inputs = {"center": torch.tensor([0.5, 0.0], device=device), "width": torch.tensor([0.5, 0.01], device=device)}
    (mask,) = run(OP, inputs | {"length": 11, "alpha": 5.0}, backend)
    e = torch.tensor(5.0).neg().exp().item()
    assert mask[0, [0, 5, 10]].tolist() == pytest.approx([e, 1.0, e], rel=1e-5)
    assert mask[1, :2].tolist() == pytest.approx([1.0, e], rel=1e-5)
    (rest,) = run(OP, inputs | {"length": 11, "alpha": 5.0, "complement": True}, backend)
    torch.testing.assert_close(mask + rest, torch.ones_like(mask))


@on_every_float32
def test_the_clamp_passes_the_gradient_at_equality_and_above(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "narrow-and-outside", dtype, device)  # widths 0, 1/8, 1/16, -1, 1 at a clamp of 1/8
    width = inputs["width"].requires_grad_()
    run(OP, inputs, backend)[0].sum().backward()
    assert (width.grad != 0).tolist() == [False, True, False, False, True]


@on_every_float32
def test_a_width_that_is_nan_is_not_hidden(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "narrow-and-outside", dtype, device)
    with torch.no_grad():
        inputs["width"][1] = float("nan")
    width = inputs["width"].requires_grad_()
    out = run(OP, inputs, backend)[0]
    out.sum().backward()
    assert out[1].isnan().all()
    assert width.grad[1].isnan()


@on_every_float32
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("center", [float("inf"), float("-inf"), 1e30])
def test_centers_infinitely_far_away_give_no_gradient(
    center: float, normalized: bool, backend: str, device: str, dtype: torch.dtype
) -> None:
    c, w = (torch.tensor([value], device=device, requires_grad=True) for value in (center, 0.3))
    spread = {"sigma": 9.0} if normalized else {"alpha": 5.5}
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(c, w, 9, **spread)
    mask.sum().backward()
    assert (c.grad.item(), w.grad.item()) == (0, 0)
    assert not mask.isnan().any()


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("min_width", [1e-38, 1e-30, 1e-20, 0.1])
def test_widths_whose_squares_overflow_or_underflow(
    backend: str, device: str, dtype: torch.dtype, min_width: float, complement: bool
) -> None:
    draw = Draw("extreme", dtype, device)
    widths = [1e20, 3e30, 1e-19, 0.0, -1.0, 0.5, 1e-20, 1e-3, 0.1, 1e-38]
    centers = [0.5, 0.3, 0.5, 1.0, 2.0, -1e15, 1e15, 0.0, 5e37, 5e37]  # the last ones are infinitely many widths away
    inputs = {"center": draw.values(centers), "width": draw.values(widths)}
    inputs |= {"length": 9, "alpha": 5.0, "min_width": min_width, "complement": complement}
    wide = in_dtype(inputs, torch.float64)
    close = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(run(OP, inputs, backend)[0].double(), RECORDS[OP].reference(**wide)[0], **close)
    gradients = gradients_of(lambda **inputs: run(OP, inputs, backend), inputs, DIFFERENTIABLE[OP])
    for name, exact in gradients_of(RECORDS[OP].reference, wide, DIFFERENTIABLE[OP]).items():
        torch.testing.assert_close(gradients[name].double(), exact, **close)


@on_every_float32
@given(
    rows=st.integers(0, 5),
    length=st.integers(1, 70),
    alpha=st.floats(0.0, 20.0),
    center=st.floats(-2, 2, width=32),
    width=st.floats(-1, 3, width=32),
    complement=st.booleans(),
)
@example(rows=1, length=2, alpha=1.0, center=1.5, width=0.0, complement=False)
def test_any_shape_and_moment(
    backend: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    alpha: float,
    center: float,
    width: float,
    complement: bool,
) -> None:
    draw = Draw("any", dtype, device)
    inputs = {"center": draw.values([center] * rows), "width": draw.values([width] * rows)}
    inputs |= {"length": length, "alpha": alpha, "complement": complement}
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_center_that_is_no_number_has_no_gradient_that_is_one(backend: str) -> None:
    center = torch.tensor([torch.nan, 0.3], requires_grad=True)
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(center, torch.full((2,), 0.2), 7, sigma=9.0)
    (gradient,) = torch.autograd.grad(mask, center, torch.arange(14.0).view(2, 7))
    assert gradient.isnan().tolist() == [True, False]
