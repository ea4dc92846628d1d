"""Elements more than 2^31 apart: an index of 32 bits would miss them, which the emulator's address checks refuse.

Nothing large is touched: the tensors reach over memory that is never read, so that it is never there.
"""

from __future__ import annotations

import pytest
import torch
from emulated_backend import LOAD_ERRORS, NAME
from samples import run

pytestmark = pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")
FAR = 2**31 + 1024


def apart(dense: torch.Tensor) -> torch.Tensor:
    """The same numbers [B, H, L, d], samples ``FAR`` elements apart."""
    B, H, L, d = dense.shape
    memory = torch.empty((B - 1) * FAR + H * L * d, dtype=dense.dtype)
    return memory.as_strided(dense.shape, (FAR, d, H * d, 1)).copy_(dense)


@pytest.mark.parametrize("far", ["query", "key", "value"])
def test_samples_far_apart(far: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(2, 1, 70, 16, generator=generator).bfloat16() for name in ("query", "key", "value")}
    (expected,) = run("weighted_attention", inputs, NAME)
    (got,) = run("weighted_attention", inputs | {far: apart(inputs[far])}, NAME)
    assert torch.equal(got, expected)
