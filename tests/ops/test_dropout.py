"""dropout: the Philox generator, the mask it draws, and the same mask on every backend, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_records.draw import Draw
from op_records.dropout import MASK32, keep, philox4x32
from samples import run, targets

from cnm_kernels import reference

OP = "dropout"
on_every_target = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP))
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))
KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32 10; counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    """Two 32-bit words as the int64 that holds them."""
    value = (high << 32) | low
    return value - (1 << 64) if value >= 1 << 63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    index, offset = torch.tensor([signed(*counter[:2])]), signed(*counter[2:])
    words = reference.philox(index, torch.tensor(signed(*key)), offset)
    assert tuple(words[0].tolist()) == expected
    assert tuple(philox4x32(counter, key)) == expected


@given(st.integers(0, 2**40), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
def test_philox_is_the_scalar_one_everywhere(index: int, seed: int, offset: int) -> None:
    counter = (index & MASK32, index >> 32, offset & MASK32, offset >> 32)
    expected = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    assert reference.philox(torch.tensor([index]), torch.tensor(seed), offset)[0].tolist() == expected


@on_every_target
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 4099])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_the_stated_one(backend: str, device: str, dtype: torch.dtype, numel: int, p: float) -> None:
    x = torch.ones(numel, dtype=dtype, device=device)
    (dropped,) = run(OP, {"x": x, "p": p, "seed": 2**40 + 17, "offset": 5}, backend)
    assert (dropped != 0).tolist() == keep(numel, p, 2**40 + 17, 5)


@on_every_float32
def test_shape_and_strides_do_not_change_the_mask(backend: str, device: str, dtype: torch.dtype) -> None:
    """Elements count in row-major order, whatever lies in memory."""
    flat = torch.arange(1.0, 61.0, device=device)
    arguments = {"p": 0.4, "seed": 3, "offset": 1}
    (expected,) = run(OP, {"x": flat, **arguments}, backend)
    transposed = flat.view(3, 20).t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(run(OP, {"x": transposed, **arguments}, backend)[0].reshape(-1), expected)
    assert torch.equal(run(OP, {"x": flat.view(2, 5, 6), **arguments}, backend)[0].reshape(-1), expected)


@on_every_float32
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_keep_rate_and_mean(backend: str, device: str, dtype: torch.dtype, p: float) -> None:
    """Within five standard deviations over a million draws; kept values keep the expectation."""
    count = 1 << 20
    (dropped,) = run(OP, {"x": torch.ones(count, device=device), "p": p, "seed": 11}, backend)
    kept = dropped != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5 + 2**-16
    assert dropped[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-3)


@on_every_float32
def test_seeds_and_offsets_draw_independent_masks(backend: str, device: str, dtype: torch.dtype) -> None:
    """Two draws agree on an element in half the cases, at p = 1/2; so do neighbours within one draw."""
    count = 1 << 18
    draws = [(0, 0), (1, 0), (0, 1), (1, 1), (1 << 32, 0), (0, 1 << 32)]
    masks = [
        run(OP, {"x": torch.ones(count, device=device), "p": 0.5, "seed": seed, "offset": offset}, backend)[0] != 0
        for seed, offset in draws
    ]
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    pairs += [(masks[0][lag:], masks[0][:-lag]) for lag in (1, 2, 8, 16, 256)]
    for a, b in pairs:
        assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / (count - 256) ** 0.5


@on_every_float32
def test_a_seed_tensor_is_that_seed(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.ones(100, device=device)
    (expected,) = run(OP, {"x": x, "p": 0.5, "seed": 42}, backend)
    for seed in (torch.tensor(42, device=device), torch.tensor([42], device=device)):
        assert torch.equal(run(OP, {"x": x, "p": 0.5, "seed": seed}, backend)[0], expected)


@on_every_float32
def test_the_gradient_goes_through_the_same_mask(backend: str, device: str, dtype: torch.dtype) -> None:
    x = Draw("x", dtype, device).normal(5, 37).requires_grad_()
    (dropped,) = run(OP, {"x": x, "p": 0.3, "seed": 1, "offset": 2}, backend)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient * x.detach(), dropped.detach())


@on_every_float32
def test_nothing_and_everything(backend: str, device: str, dtype: torch.dtype) -> None:
    x = Draw("x", dtype, device).normal(5, 7)
    assert torch.equal(run(OP, {"x": x, "p": 0.0, "seed": 1}, backend)[0], x)
    assert not run(OP, {"x": x, "p": 1.0, "seed": 1}, backend)[0].any()


@on_every_float32
def test_a_dropped_infinity_is_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    (dropped,) = run(OP, {"x": torch.full((64,), torch.inf, device=device), "p": 0.5, "seed": 1}, backend)
    assert set(dropped.tolist()) == {0.0, torch.inf}


@on_every_float32
def test_a_narrow_p_of_numpys(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.ones(64, dtype=dtype, device=device)
    (expected,) = run(OP, {"x": x, "p": 0.5, "seed": 3}, backend)
    assert torch.equal(run(OP, {"x": x, "p": np.float16(0.5), "seed": 3}, backend)[0], expected)
