"""intra_video_contrastive_loss: the kink, inactive hinges, any batch size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_values
from op_records.draw import Draw
from op_records.intra_video_contrastive_loss import three_losses
from samples import run, sample, targets

OP = "intra_video_contrastive_loss"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_by_hand(backend: str, device: str, dtype: torch.dtype) -> None:
    values = {"positive": [2.0, 1.0], "hard": [1.5, 3.0], "easy": [2.0, 1.0]}
    inputs = {name: torch.tensor(value, device=device) for name, value in values.items()}
    (loss,) = run(OP, inputs, backend)  # ((0.6 + 0) + (0.15 + 0.15)) / 2
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.45)


@on_every_float32
def test_at_the_kink_the_gradient_is_one_half(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "ties", dtype, device)  # ties: hard 0, 1; easy 0, 2, 3; the hard hinge of 3 is active
    leaves = {name: inputs[name].requires_grad_() for name in ("positive", "hard", "easy")}
    (4 * run(OP, inputs, backend)[0]).backward()
    assert leaves["hard"].grad.tolist() == [-0.5, -0.5, 0.0, -1.0]
    assert leaves["easy"].grad.tolist() == [-0.5, 0.0, -0.5, -0.5]
    assert leaves["positive"].grad.tolist() == [1.0, 0.5, 0.5, 1.5]


@on_every_float32
def test_a_nan_gets_a_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    """As torch.maximum gives it: what made the NaN is to see that its loss is none."""
    values = {"positive": [1.0, torch.nan, 2.0], "hard": [1.0, 1.0, 9.0], "easy": [9.0, 1.0, torch.nan]}
    leaves = {name: torch.tensor(value, device=device, requires_grad=True) for name, value in values.items()}
    (loss,) = run(OP, leaves, backend)
    assert loss.isnan()
    (3 * loss).backward()
    assert leaves["positive"].grad.tolist() == pytest.approx([1.0, 2.0, 1.0])
    assert leaves["hard"].grad.tolist() == pytest.approx([-1.0, -1.0, 0.0])
    assert leaves["easy"].grad.tolist() == pytest.approx([0.0, -1.0, -1.0])


@on_every_float32
def test_satisfied_margins_cost_nothing(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "inactive", dtype, device)
    positive = inputs["positive"].requires_grad_()
    (loss,) = run(OP, inputs, backend)
    assert loss == 0
    loss.backward()
    assert not positive.grad.any()


@on_every_float32
@given(B=st.integers(1, 300), beta_1=st.floats(-1, 1), beta_2=st.floats(-1, 1))
def test_any_batch(backend: str, device: str, dtype: torch.dtype, B: int, beta_1: float, beta_2: float) -> None:
    inputs = three_losses(Draw(str(B), dtype, device), B, beta_1=beta_1, beta_2=beta_2)
    check_values(OP, inputs, backend)
