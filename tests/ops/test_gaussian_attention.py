"""gaussian_attention: it is weighted_attention under gaussian_mask, at any shape and moment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.weighted_attention import attention
from samples import run, sample, targets

OP = "gaussian_attention"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
@pytest.mark.parametrize("complement", [False, True])
def test_it_is_weighted_attention_under_the_mask(
    backend: str, device: str, dtype: torch.dtype, complement: bool
) -> None:
    inputs = sample(OP, "causal-lengths", dtype, device) | {"complement": complement}
    moment = {name: inputs[name] for name in ("center", "width", "alpha", "complement")}
    (mask,) = run("gaussian_mask", moment | {"length": inputs["key"].size(2)}, "torch")
    weighted = {name: value for name, value in inputs.items() if name not in moment} | {"key_weight": mask}
    for tensor, wanted in zip(run(OP, inputs, backend), run("weighted_attention", weighted, "torch"), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


@on_every_float32
def test_the_gradient_stays_bounded_where_the_complement_is_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    """A key exactly at the center has weight 1 - g = 0, where d log(1 - g) is infinite."""
    inputs = sample(OP, "complement", dtype, device)
    inputs["center"] = torch.tensor([0.0, 0.5, 1.0], device=device)  # all three are points of an 11-key grid
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


@on_every_float32
def test_moments_in_float32_with_lower_queries(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "causal", torch.bfloat16, device)
    moment = {name: inputs[name].float() for name in ("center", "width")}
    gradients = {}
    for precision, given_moment in (("bfloat16", {}), ("float32", moment)):
        leaves = {name: (inputs | given_moment)[name].detach().requires_grad_() for name in moment}
        (out,) = run(OP, inputs | leaves, backend)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        gradients[precision] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in moment:  # the numbers are the same, so only the gradient's rounding may differ
        assert gradients["float32"][name].dtype == torch.float32
        assert torch.equal(gradients["float32"][name].bfloat16(), gradients["bfloat16"][name]), name


@on_every_float32
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20), st.integers(1, 20), st.integers(1, 40)),
    causal=st.booleans(),
    lengths=st.booleans(),
    complement=st.booleans(),
    center=st.floats(-1, 2, width=32),
    width=st.floats(-1, 2, width=32),
)
def test_any_shape_and_moment(
    backend: str,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    causal: bool,
    lengths: bool,
    complement: bool,
    center: float,
    width: float,
) -> None:
    draw = Draw(str(sizes), dtype, device)
    B, _, _, Lk, _ = sizes
    inputs = attention(draw, *sizes, causal=causal, complement=complement, alpha=5.5)
    inputs |= {"center": draw.values([center] * B), "width": draw.values([width] * B)}
    if lengths:
        inputs["key_lengths"] = draw.integers(Lk + 2, B)
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)
