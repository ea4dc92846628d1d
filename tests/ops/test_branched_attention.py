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


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP))
def test_branches_of_the_gradient_may_lie_any_numbers_apart(backend: str, device: str, dtype: torch.dtype) -> None:
    """As where a caller appends a number to each branch: then only its rows in the first lie on 16 bytes."""
    inputs = sample(OP, "plain", dtype, device)
    query = inputs["query"].requires_grad_()
    (branches,) = run(OP, inputs, backend)
    apart = branches.numel() // len(branches) + 1
    upstream = torch.ones(len(branches), apart, device=device, dtype=dtype)[:, :-1].view_as(branches)
    assert upstream.stride(0) == apart
    found, wanted = (
        torch.autograd.grad(branches, query, d_out, retain_graph=True)[0] for d_out in (upstream, upstream.contiguous())
    )
    torch.testing.assert_close(found, wanted)


def test_no_branch_is_refused() -> None:
    inputs = sample(OP, "plain", torch.float32)
    with pytest.raises(ValueError, match=r"key_weights must hold a branch, got shape \[0, 2, 7\]"):
        cnm_kernels.branched_attention(**inputs | {"key_weights": inputs["key_weights"][:0]})
