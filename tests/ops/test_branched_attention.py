"""``branched_attention``: what is particular to it; what it owes like every op is in ``test_every_op.py``."""

from __future__ import annotations

import pytest
import torch
from samples import run, sample, targets

import cnm_kernels

OP = "branched_attention"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
@pytest.mark.parametrize("name", ["plain", "one-branch", "lengths-0-1-odd-over"])
def test_every_branch_is_weighted_attention(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    inputs = sample(OP, name, dtype, device)
    (branches,) = run(OP, inputs, backend)
    for branch, key_weight in zip(branches, inputs.pop("key_weights"), strict=True):
        (wanted,) = run("weighted_attention", inputs | {"key_weight": key_weight}, backend)
        torch.testing.assert_close(branch, wanted)


def test_no_branch_is_refused() -> None:
    inputs = sample(OP, "plain", torch.float32)
    with pytest.raises(ValueError, match=r"key_weights must hold a branch, got shape \[0, 2, 7\]"):
        cnm_kernels.branched_attention(**inputs | {"key_weights": inputs["key_weights"][:0]})
