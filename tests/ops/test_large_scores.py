"""Attention and the loss where scores are so large that a product and its rounded self differ by more than 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_checks import gradients_of, in_dtype
from references import REFERENCES
from samples import DIFFERENTIABLE, Draw, Inputs, cases, run

HEAD_DIMS = ("16", "20", "32", "48", "64")
ATTENTIONS = ("weighted_attention", "gaussian_attention", "branched_attention", "absorbed_attention")
ATTENTION_CASES = {op: [f"{kind}-{d}" for kind in ("equal", "one") for d in HEAD_DIMS] for op in ATTENTIONS}


def _attention(op: str, name: str, dtype: torch.dtype, device: str) -> Inputs:
    """``equal``: all keys score alike, up to 1e30 (1e4 in float16). ``one``: a key scores above all others."""
    kind, dim = name.split("-")
    draw, d, Lk = Draw(op + name, dtype, device), int(dim), 7
    size = 32.0 if dtype == torch.float16 else 2.0**48  # powers of two: a sum is exact in any order
    signs = 1.0 if kind == "equal" else -1.0
    query = torch.full((2, 2, 3, d), size, dtype=torch.float64)
    query[:, :, 1] = size / 16384 if dtype != torch.float16 else size / 2
    key = torch.full((2, 2, Lk, d), signs * size, dtype=torch.float64)
    key[:, :, 2] = size
    inputs: dict[str, Any] = {"query": draw.cast(query), "key": draw.cast(key), "value": draw.normal(2, 2, Lk, d)}
    if op == "absorbed_attention":
        inputs |= {"query": inputs["query"][:, 0].contiguous(), "scale": d**-0.5, "key_weight": draw.uniform(2, Lk)}
    elif op == "weighted_attention":
        inputs |= {"key_weight": draw.uniform(2, Lk)}
    elif op == "gaussian_attention":
        inputs |= {"center": draw.uniform(2), "width": draw.uniform(2, low=0.3), "alpha": 5.0}
    else:
        inputs |= {"key_weights": draw.uniform(2, 2, Lk)}
    return inputs


def _exact(op: str, inputs: Inputs) -> Inputs:
    """In float64 with scores of the same ranking, and small enough for its own roundings not to matter."""
    wide = in_dtype(inputs, torch.float64)
    d = inputs["query"].size(-1)
    wide["key"] = wide["key"] / inputs["key"].double().abs().max()
    wide["query"] = torch.full_like(wide["query"], 100.0)
    return wide | {"scale": d**-0.5 if "scale" not in inputs else inputs["scale"]}


@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases(ATTENTION_CASES))
def test_attention(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = _attention(op, name, dtype, device)
    wide = _exact(op, inputs)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for actual, exact in zip(run(op, inputs, backend), REFERENCES[op](**wide), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    names = [n for n in DIFFERENTIABLE[op] if inputs.get(n) is not None and n not in ("query", "key")]
    actual = gradients_of(lambda **i: run(op, i, backend), inputs, names)
    exact = gradients_of(REFERENCES[op], wide, names)
    for n in names:
        torch.testing.assert_close(actual[n].double(), exact[n], rtol=4 * tolerance, atol=10 * tolerance, msg=f"d {n}")


@pytest.mark.parametrize(
    ("op", "name", "backend", "device", "dtype"), cases({"weighted_attention": ["equal-32"]}, [torch.bfloat16])
)
def test_the_mean_of_equal_values(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 1, 32), 133120.0, dtype=dtype, device=device)
    (out,) = run(op, {"query": x, "key": x, "value": x}, backend)
    assert torch.equal(out, x)


@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases({"linear_nll": ["equal"]}))
def test_loss_of_equal_logits(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """log V, however large the logits are."""
    size = 32.0 if dtype == torch.float16 else 2.0**48
    hidden = torch.full((2, 3, 16), size, dtype=dtype, device=device)
    weight = torch.full((8, 16), size, dtype=dtype, device=device)
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.zeros(8, dtype=dtype, device=device),
        "target": torch.zeros(2, 3, dtype=torch.int64, device=device),
        "valid_lengths": torch.tensor([3, 2], device=device),
        "label_smoothing": 0.0,
    }
    (nll,) = run(op, inputs, backend)
    torch.testing.assert_close(nll.double().cpu(), torch.full((2,), 8.0, dtype=torch.float64).log())


LOSSES = ("linear_nll", "contrastive_reconstruction_loss")
LOSS_SIZES = ("2e1", "3e2", "2e4", "3e14")  # of hidden states and words: logits to 1e9 and 1e30; float16's end at 2e1


def _loss(op: str, name: str, dtype: torch.dtype, device: str) -> Inputs:
    """Words of +-size, a power of two: logits are exact in float32, and many tie for the highest."""
    draw, L, D, V = Draw(op + name, dtype, device), 5, 12, 200
    size = 2.0 ** round(math.log2(float(name)))
    signs = draw.integers(2, 3, L, D).double() * 2 - 1
    words = draw.integers(2, 6, D).double()[draw.integers(6, V)] * 2 - 1  # six kinds of words
    hidden, lengths = signs * size, [5, 3, 1]
    if op != "linear_nll":
        hidden, lengths = hidden[:, None], [5]
    return {
        "hidden": draw.cast(hidden),
        "weight": draw.cast(words * size),
        "bias": draw.cast(torch.zeros(V)),
        "target": draw.integers(V, len(lengths), L),
        "valid_lengths": draw.lengths(*lengths),
        "label_smoothing": 0.1,
    } | ({} if op == "linear_nll" else {"beta_1": size * size, "beta_2": size * size})


@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases(dict.fromkeys(LOSSES, LOSS_SIZES)))
def test_loss_of_ties(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """The logarithm of the sum is not lost in a maximum whose last digit it is less than."""
    if dtype == torch.float16 and name != LOSS_SIZES[0]:
        pytest.skip("float16 ends at 65504")
    inputs = _loss(op, name, dtype, device)
    check_against_float64(op, inputs, backend)


def check_against_float64(op: str, inputs: Inputs, backend: str) -> None:
    """Values and all gradients, to a few roundings of the largest number of each."""
    wide = in_dtype(inputs, torch.float64)
    dtype = inputs[DIFFERENTIABLE[op][0]].dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for actual, exact in zip(run(op, inputs, backend), REFERENCES[op](**wide), strict=True):
        close = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(actual.double(), exact, rtol=close, atol=close * exact.abs().max().item())
    names = [name for name in DIFFERENTIABLE[op] if inputs.get(name) is not None]
    actual = gradients_of(lambda **i: run(op, i, backend), inputs, names)
    exact = gradients_of(REFERENCES[op], wide, names)
    for name in names:
        assert exact[name].isfinite().all()
        largest = exact[name].abs().max().item()
        torch.testing.assert_close(
            actual[name].double(),
            exact[name],
            rtol=tolerance,
            atol=tolerance * largest,
            msg=lambda m, n=name: f"d {n}: {m}",
        )
