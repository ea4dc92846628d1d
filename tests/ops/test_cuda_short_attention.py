"""Attention's kernels of csrc/cuda whose blocks hold all keys of a head, on the emulator: every path through them."""

from __future__ import annotations

import pytest
import torch
from emulated_backend import LOAD_ERRORS, NAME
from op_checks import check_gradients, check_values, gradients_of
from op_records.draw import Draw, Inputs
from op_records.gaussian_attention import gaussian
from op_records.weighted_attention import attention, weighted
from samples import run, with_slow

pytestmark = pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")

CASES = {
    "all-heads-in-a-block": lambda draw: gaussian(draw, 2, 4, 50, 50, 64, causal=True),
    "few-queries": lambda draw: gaussian(draw, 2, 4, 20, 50, 64),
    "key-weights-of-all-heads": lambda draw: weighted(draw, 2, 3, 33, 17, 40, causal=True),
    "a-head-in-a-block": lambda draw: weighted(draw, 1, 2, 40, 200, 48, causal=True),
    "more-queries-than-keys": lambda draw: attention(draw, 1, 1, 100, 30, 64, causal=True),
    "lengths": lambda draw: weighted(draw, 4, 1, 60, 90, 40, causal=True, key_lengths=draw.lengths(90, 0, 33, 1)),
    "rows-not-aligned": lambda draw: gaussian(draw, 2, 2, 37, 70, 39),
    "as-many-keys-as-a-block-holds": lambda draw: attention(draw, 1, 1, 17, 256, 64),
    "one-query-and-key": lambda draw: gaussian(draw, 2, 4, 1, 1, 64),
    "several-rounds-of-queries": lambda draw: weighted(draw, 66, 4, 130, 20, 34, causal=True),
}


def op_of(inputs: Inputs) -> str:
    return "gaussian_attention" if "center" in inputs else "weighted_attention"


@pytest.mark.parametrize("name", with_slow(CASES, {"several-rounds-of-queries"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    inputs = CASES[name](Draw(name, dtype, "cpu"))
    check_values(op_of(inputs), inputs, NAME)
    check_gradients(op_of(inputs), inputs, NAME)


@pytest.mark.parametrize("wanted", ["query", "key", "value", "key_weight"])
def test_only_the_gradient_that_is_wanted(wanted: str) -> None:
    inputs = weighted(Draw("alone", torch.bfloat16, "cpu"), 2, 2, 33, 40, 64, causal=True)
    every = gradients_of(
        lambda **i: run("weighted_attention", i, NAME), inputs, ["query", "key", "value", "key_weight"]
    )
    alone = gradients_of(lambda **i: run("weighted_attention", i, NAME), inputs, [wanted])
    assert torch.equal(alone[wanted], every[wanted])


def test_a_block_sums_its_heads_as_a_launch_would() -> None:
    """Four heads in a block, or 17 which do not fit: the gradient of center and width is the same per head."""
    few = gaussian(Draw("heads", torch.bfloat16, "cpu"), 1, 4, 20, 30, 64)
    many = dict(few)
    for name in ("query", "key", "value"):
        many[name] = torch.cat([few[name], torch.zeros_like(few[name]).repeat(1, 4, 1, 1)], 1)
    names = ["center", "width"]
    one = gradients_of(lambda **i: [out[:, :4] for out in run("gaussian_attention", i, NAME)[:1]], few, names)
    two = gradients_of(lambda **i: [out[:, :4] for out in run("gaussian_attention", i, NAME)[:1]], many, names)
    for name in names:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
