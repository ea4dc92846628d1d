"""linear_nll: padding, non-constant upstream gradients, frozen weights, any shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.linear_nll import vocabulary
from samples import run, sample, targets

import cnm_kernels

OP = "linear_nll"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_published_values(backend: str, device: str, dtype: torch.dtype) -> None:
    """Uniform logits give log V whatever the smoothing; the accuracy counts valid tokens only."""
    zeros = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7)}
    inputs = {name: tensor.to(device) for name, tensor in zeros.items()}
    inputs |= {
        "target": torch.tensor([[0, 0, 1], [2, 0, 0]], device=device),
        "valid_lengths": torch.tensor([3, 1], device=device),
        "return_accuracy": True,
    }
    nll, accuracy = run(OP, inputs, backend)
    assert nll.tolist() == pytest.approx([math.log(7)] * 2)
    assert accuracy.tolist() == pytest.approx([2 / 3, 0.0])  # argmax of equal logits is word 0


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.bfloat16, torch.float16]))
def test_a_float32_bias_is_not_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(1, 1, 4, device=device, dtype=dtype), torch.zeros(3, 4, device=device, dtype=dtype)
    bias = torch.tensor([10.03, 0.0, -1e5], device=device, requires_grad=True)  # the last word is ruled out
    target = torch.ones(1, 1, dtype=torch.int64, device=device)
    arguments = (hidden, weight, bias, target, torch.ones(1, dtype=torch.int64, device=device))
    with cnm_kernels.use_backend(backend):
        nll = cnm_kernels.linear_nll(*arguments, label_smoothing=0.0)
        (gradient,) = torch.autograd.grad(nll.sum(), bias)
    wanted = math.log1p(math.exp(10.03))
    assert nll.item() == pytest.approx(wanted, rel=1e-6)
    assert gradient.tolist() == pytest.approx([1 - math.exp(-wanted), math.exp(-wanted) - 1, 0.0], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.bfloat16, torch.float16]))
def test_a_float32_weight_is_rounded_once(backend: str, device: str, dtype: torch.dtype, smoothing: float) -> None:
    """Tokens that are sure of their word have a gradient only as large as what products with W, W[y] and the mean of W
    leave of each other: nothing of it is right if they round W differently."""
    draw = Draw("confident", torch.float32, device)
    weight, bias, target = draw.normal(48, 64), torch.zeros(48, device=device), draw.integers(48, 4, 4)
    hidden, lengths = (0.2 * weight[target]).to(dtype), torch.full((4,), 4, device=device)

    def gradient_of(which: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        leaf, bias_there = hidden.clone().requires_grad_(), bias.to(weight.dtype)
        with cnm_kernels.use_backend(which):
            nll = cnm_kernels.linear_nll(leaf, weight, bias_there, target, lengths, label_smoothing=smoothing)
        return torch.autograd.grad(nll.sum(), leaf)[0].double()

    exact = gradient_of("torch", hidden.double(), weight.to(dtype).double())
    found = gradient_of(backend, hidden, weight)
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@on_every_float32
def test_a_likely_word_hides_no_others(backend: str, device: str, dtype: torch.dtype, smoothing: float) -> None:
    """8,000 words of probability 5e-8 each are nearly all of the loss, and the gradient, of one of nearly 1."""
    V = 8001
    bias = torch.full((V,), -16.8, device=device)
    bias[3] = 0
    wide, narrow = bias.double().requires_grad_(), bias.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide[None], torch.tensor([3], device=device), label_smoothing=smoothing)
    zeros = torch.zeros(1, 1, 8, device=device), torch.zeros(V, 8, device=device)
    target, length = torch.tensor([[3]], device=device), torch.tensor([1], device=device)
    with cnm_kernels.use_backend(backend):
        nll = cnm_kernels.linear_nll(*zeros, narrow, target, length, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(nll.sum(), narrow)
    (exact,) = torch.autograd.grad(wanted, wide)
    assert nll.item() == pytest.approx(wanted.item(), abs=4e-5)
    assert gradient[3].item() == pytest.approx(exact[3].item(), abs=4e-5)


@on_every_float32
def test_of_equally_likely_words_the_first_counts(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whatever tiles and parts the vocabulary is worked through in."""
    inputs = {"hidden": torch.zeros(1, 2, 4, device=device), "weight": torch.zeros(700, 4, device=device)}
    inputs |= {"bias": torch.zeros(700, device=device), "valid_lengths": torch.tensor([2], device=device)}
    inputs |= {"target": torch.tensor([[0, 400]], device=device), "return_accuracy": True}
    assert run(OP, inputs, backend)[1].tolist() == [0.5]


@on_every_float32
def test_words_that_cannot_be(backend: str, device: str, dtype: torch.dtype) -> None:
    """Those of bias -inf take no part where nothing is smoothed over them."""
    inputs = sample(OP, "no-smoothing", dtype, device)
    inputs["target"] = inputs["target"] % 7
    inputs["bias"][9] = -torch.inf
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


@on_every_float32
@pytest.mark.parametrize("impossible", [(0, 300), (300, 1030), (100, 900), (0, 1029)])
def test_whole_tiles_of_words_that_cannot_be(
    backend: str, device: str, dtype: torch.dtype, impossible: tuple[int, int]
) -> None:
    """First, last or between: some part of the vocabulary has nothing but -inf."""
    draw = Draw("tiles", dtype, device)
    inputs = vocabulary(draw, 3, 5, 8, 1030, lengths=(5, 0, 3), return_accuracy=True, label_smoothing=0.0)
    first, last = impossible
    possible = [v for v in range(1030) if not first <= v < last]
    inputs["target"] = torch.tensor(possible, device=device)[inputs["target"] % len(possible)]
    inputs["bias"][first:last] = -torch.inf
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)
    smoothed = inputs | {"label_smoothing": 0.1}
    assert run(OP, smoothed, backend)[0].tolist() == [math.inf, 0, math.inf]
    check_gradients(OP, smoothed, backend)


@on_every_float32
def test_without_a_word_that_can_be_there_is_no_result(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "no-smoothing", dtype, device)
    inputs["bias"][:] = -torch.inf
    assert run(OP, inputs, backend)[0].isnan().all()


@on_every_float32
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_nan_reaches_the_gradients(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    """Those of plain PyTorch: a gradient that is finite where the loss is not would go into the weights."""
    inputs = vocabulary(Draw("NaN", dtype, device), 2, 3, 8, 11, lengths=(3, 2))
    inputs[name].view(-1)[8] = torch.nan
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    found, expected = (
        torch.autograd.grad(run(OP, inputs | leaves, which)[0].sum(), list(leaves.values()))
        for which in (backend, "torch")
    )
    assert expected[2].isnan().all()
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.equal(gradient.isnan(), wanted.isnan())


@on_every_float32
@pytest.mark.parametrize("size", [1e6, 1e8])
@pytest.mark.parametrize("D", [64, 200, 600])
def test_probabilities_at_large_logits(backend: str, device: str, dtype: torch.dtype, size: float, D: int) -> None:
    """None is above 1 in the backward, whose logits round as the forward's do, but for chunks of wide rows."""
    draw = Draw("large logits", dtype, device)
    inputs = vocabulary(draw, 40, 1, D, 70, label_smoothing=0.0)
    inputs["hidden"] = inputs["hidden"] * size
    bias = inputs["bias"].requires_grad_()
    run(OP, inputs, backend)[0].sum().backward()
    highest = torch.bincount((inputs["hidden"][:, 0] @ inputs["weight"].T).argmax(-1), minlength=70)
    assert (bias.grad <= highest + 1).all()
    if D <= 256:
        assert abs(bias.grad.sum()) < 1e-4


@on_every_float32
def test_rows_of_length_zero_give_zero_and_no_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "lengths-0-1-odd-over", dtype, device)  # the first length is 0
    hidden = inputs["hidden"].requires_grad_()
    (nll,) = run(OP, inputs, backend)
    assert nll[0] == 0
    nll.sum().backward()
    assert not hidden.grad[0].any()
    assert not hidden.grad[1, 1:].any()
    assert hidden.grad[1, 0].any()


@on_every_float32
def test_padding_is_never_read(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "lengths-0-1-odd-over", dtype, device)
    clean = run(OP, inputs, backend)[0]
    padding = torch.arange(7, device=device) >= inputs["valid_lengths"][:, None]
    inputs["hidden"] = inputs["hidden"].masked_fill(padding[:, :, None], 1e4)
    assert torch.equal(run(OP, inputs, backend)[0], clean)


@on_every_float32
def test_each_row_has_its_own_upstream_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows whose upstream gradient is zero get none, and rows scale with theirs."""
    inputs = sample(OP, "odd", dtype, device) | {"return_accuracy": False}
    hidden = inputs["hidden"].requires_grad_()
    (nll,) = run(OP, inputs, backend)
    (ones,) = torch.autograd.grad(nll, hidden, torch.ones_like(nll), retain_graph=True)
    (mixed,) = torch.autograd.grad(nll, hidden, torch.tensor([0.0, 2.0, -0.5], device=device))
    assert not mixed[0].any()
    torch.testing.assert_close(mixed[1], 2 * ones[1])
    torch.testing.assert_close(mixed[2], -0.5 * ones[2])


@on_every_float32
@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
    seed=st.integers(0, 999),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_any_shape(
    backend: str,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    seed: int,
    label_smoothing: float,
) -> None:
    draw = Draw(f"{sizes} {seed}", dtype, device)
    lengths = draw.integers(sizes[1] + 2, sizes[0]).tolist()
    inputs = vocabulary(draw, *sizes, lengths=lengths, label_smoothing=label_smoothing, return_accuracy=True)
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


def test_autocast_takes_parameters_of_the_other_narrow_dtype() -> None:
    inputs = sample(OP, "plain", torch.float16, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        (nll,) = run(OP, inputs, "torch")[:1]
    assert nll.isfinite().all()
