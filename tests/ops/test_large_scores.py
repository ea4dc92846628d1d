"""Attention and the loss where scores are so large that a product and its rounded self differ by more than 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_checks import attention_terms, gradients_of, in_dtype
from op_records import DIFFERENTIABLE, REFERENCES
from op_records.draw import Draw, Inputs
from samples import cases, run
from torch import Tensor

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
    """Returns float64 inputs whose scores rank alike, small enough for float64's roundings not to matter."""
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
    wide = in_dtype(inputs, torch.float64)
    gradients = gradients_of(REFERENCES[op], wide, _differentiable(op, inputs))
    check_against_float64(op, inputs, backend, list(REFERENCES[op](**wide)), gradients)


def check_against_float64(op: str, inputs: Inputs, backend: str, outputs: list[Tensor], gradients: Inputs) -> None:
    """Values and all gradients, to a few roundings of the largest number of each."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    for actual, exact in zip(run(op, inputs, backend), outputs, strict=True):
        close = tolerance[actual.dtype]
        torch.testing.assert_close(actual.double(), exact, rtol=close, atol=close * exact.abs().max().item())
    actual = gradients_of(lambda **i: run(op, i, backend), inputs, list(gradients))
    terms = attention_terms(in_dtype(inputs, torch.float64), 1.0) if op in ATTENTIONS else {}
    close = tolerance[inputs[DIFFERENTIABLE[op][0]].dtype]
    for name, exact in gradients.items():
        assert exact.isfinite().all()
        largest = max(exact.abs().max().item(), terms.get(name, 0.0))
        error = (actual[name].double() - exact).abs().max().item()
        assert error <= close * largest, f"d {name}: off by {error:.3g} of {largest:.3g}"


def _differentiable(op: str, inputs: Inputs) -> list[str]:
    return [name for name in DIFFERENTIABLE[op] if inputs.get(name) is not None]


SIZES = ("2e1", "2e4", "3e14")  # of queries and keys: scores to 1e10 and 1e31; float16 ends at the first
TIES = {op: [f"{size}-{d}" for size in SIZES for d in (20, 64)] for op in ATTENTIONS}


def _ties(op: str, name: str, dtype: torch.dtype, device: str) -> Inputs:
    """Queries and keys of +-size, a power of two: scores are exact in float32, and several tie for the highest."""
    size, d = 2.0 ** round(math.log2(float(name.split("-")[0]))), int(name.split("-")[1])
    draw, B, H, Lq, Lk = Draw(op + name, dtype, device), 2, 2, 5, 70

    def signs(*shape: int) -> Tensor:
        return draw.integers(2, *shape).double() * 2 - 1

    kinds = signs(B, H, 6, d)[:, :, draw.integers(6, Lk)]  # of keys
    query = draw.cast(signs(B, H, Lq, d) * size)
    inputs: Inputs = {"query": query, "key": draw.cast(kinds * size), "value": draw.normal(B, H, Lk, d)}
    inputs["key_lengths"] = draw.lengths(Lk, 40)
    if op == "absorbed_attention":
        bias = signs(B, H, Lk) * (size * size / 8)
        query = query[:, 0].contiguous()
        return inputs | {"query": query, "key_bias": draw.cast(bias), "key_weight": draw.uniform(B, Lk), "scale": 0.125}
    if op == "weighted_attention":
        return inputs | {"key_weight": draw.uniform(B, Lk), "causal": name.endswith("64")}
    if op == "gaussian_attention":
        return inputs | {"center": draw.uniform(B), "width": draw.uniform(B, low=0.3), "alpha": 5.0}
    return inputs | {"key_weights": draw.uniform(2, B, Lk)}


@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases(TIES))
def test_attention_to_ties(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Every gradient, queries' and keys' too."""
    if dtype == torch.float16 and not name.startswith(SIZES[0]):
        pytest.skip("float16 ends at 65504")
    inputs = _ties(op, name, dtype, device)
    # The same ranking, with scores that do not swallow the logarithm of a weight in float64.
    size, top = inputs["key"].abs().max().item(), 256.0
    wide = in_dtype(inputs, torch.float64)
    wide |= {"query": wide["query"] / size * top, "key": wide["key"] / size}
    if "key_bias" in wide:
        wide["key_bias"] = wide["key_bias"].sign() * top / 8
    gradients = gradients_of(REFERENCES[op], wide, _differentiable(op, inputs))
    gradients["query"] *= size
    gradients["key"] *= size / top
    check_against_float64(op, inputs, backend, list(REFERENCES[op](**wide)), gradients)
