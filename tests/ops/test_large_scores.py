"""Attention and the loss where scores are so large that a product and its rounded self differ by more than 1."""

from __future__ import annotations

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
