"""contrastive_reconstruction_loss: it is linear_nll and intra_video_contrastive_loss in one call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.linear_nll import vocabulary
from samples import run, sample, targets

OP = "contrastive_reconstruction_loss"
TRAINABLE = ("hidden", "weight", "bias")
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_it_is_the_two_ops_in_one(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "published-13x256x1112", dtype, device)
    margins = {name: inputs.pop(name) for name in ("beta_1", "beta_2")}
    loss, nll = run(OP, inputs | margins, backend)
    for branch, hidden in enumerate(inputs["hidden"]):
        torch.testing.assert_close(run("linear_nll", inputs | {"hidden": hidden}, "torch")[0], nll[branch])
    branches = dict(zip(("positive", "hard", "easy"), nll.detach(), strict=True))
    torch.testing.assert_close(run("intra_video_contrastive_loss", branches | margins, "torch")[0], loss)


@on_every_float32
@pytest.mark.parametrize("output", ["loss", "nll"])
def test_each_output_alone_has_a_gradient(backend: str, device: str, dtype: torch.dtype, output: str) -> None:
    """Update 1 trains on nll alone, update 2 on the loss alone; the other's missing gradient counts as zero."""
    inputs = sample(OP, "plain", dtype, device)
    actual, expected = [], []
    for gradients, which in ((actual, backend), (expected, "torch")):
        leaves = {name: inputs[name].double() if which == "torch" else inputs[name] for name in TRAINABLE}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        loss, nll = run(OP, inputs | leaves, which)
        value = loss if output == "loss" else nll[0].sum() + 2 * nll[1].sum()
        gradients.extend(torch.autograd.grad(value, list(leaves.values())))
    for gradient, wanted in zip(actual, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient.double(), wanted.double(), rtol=1e-4, atol=1e-6)


@on_every_float32
def test_satisfied_margins_pass_no_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "inactive", dtype, device)
    leaves = [inputs[name].requires_grad_() for name in TRAINABLE]
    loss, _ = run(OP, inputs, backend)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert not gradient.any()


@on_every_float32
def test_a_nan_reaches_the_gradients(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = vocabulary(Draw("NaN", dtype, device), 6, 3, 8, 11, branches=True, lengths=(3, 3))
    inputs["hidden"][0, 1] = torch.nan
    leaves = [inputs[name].requires_grad_() for name in TRAINABLE]
    d_hidden, d_weight, d_bias = torch.autograd.grad(run(OP, inputs, backend)[0], leaves)
    assert d_hidden[0, 1].isnan().all()
    assert d_weight.isnan().all()
    assert d_bias.isnan().all()


@on_every_float32
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
    seed=st.integers(0, 999),
)
def test_any_shape(backend: str, device: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], seed: int) -> None:
    B, L, D, V = sizes
    draw = Draw(f"{sizes} {seed}", dtype, device)
    lengths = draw.integers(L + 2, B).tolist()
    # margins wide enough that no hinge is near its kink
    inputs = vocabulary(draw, 3 * B, L, D, V, branches=True, lengths=lengths, beta_1=30.0, beta_2=30.0)
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)
