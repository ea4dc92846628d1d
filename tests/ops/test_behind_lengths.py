"""Elements behind a length are never read: NaN and infinity there change no output and no gradient."""

from __future__ import annotations

import pytest
import torch
from op_checks import gradients_of
from op_records import DIFFERENTIABLE
from op_records.draw import Inputs
from samples import cases, run, sample

KEYS = {"key": 2, "value": 2, "key_weight": 1, "key_weights": 2, "key_bias": 2}
CASES = {
    "weighted_attention": ["weighted-lengths-0-1-odd-over", "weighted-causal-lengths"],
    "attention_weights": ["weighted-lengths-0-1-odd-over"],
    "gaussian_attention": ["lengths-0-1-odd-over"],
    "branched_attention": ["lengths-0-1-odd-over"],
    "absorbed_attention": ["lengths-0-1-odd-over"],
    "linear": ["lengths-0-1-odd-over"],
    "linear_nll": ["lengths-0-1-odd-over"],
    "contrastive_reconstruction_loss": ["lengths-0-1-odd-over"],
}
PADDED = {"hidden": ("valid_lengths", -2), "x": ("lengths", 1)} | {
    name: ("key_lengths", dim) for name, dim in KEYS.items()
}


def _with(inputs: Inputs, garbage: float) -> Inputs:
    filled = dict(inputs)
    for name, (lengths, dim) in PADDED.items():
        tensor = inputs.get(name)
        if tensor is None or inputs.get(lengths) is None:
            continue
        tensor = tensor.clone()
        batch = 1 if name == "key_weights" or (name == "hidden" and tensor.dim() == 4) else 0
        for b, n in enumerate(inputs[lengths].tolist()):
            row = tensor.select(batch, b)
            axis = (dim % tensor.dim()) - 1
            row.narrow(axis, min(n, row.size(axis)), row.size(axis) - min(n, row.size(axis))).fill_(garbage)
        filled[name] = tensor
    return filled


@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases(CASES))
def test_nothing_is_read(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(op, name, dtype, device)
    clean = _with(inputs, 0.0)
    wanted = run(op, clean, backend)
    d_wanted = gradients_of(lambda **i: run(op, i, backend), clean, DIFFERENTIABLE[op])
    for garbage in (torch.nan, torch.inf):
        dirty = _with(inputs, garbage)
        for actual, expected in zip(run(op, dirty, backend), wanted, strict=True):
            assert torch.equal(actual, expected)
        for n, gradient in gradients_of(lambda **i: run(op, i, backend), dirty, DIFFERENTIABLE[op]).items():
            assert torch.equal(gradient, d_wanted[n]), f"d {n}"
