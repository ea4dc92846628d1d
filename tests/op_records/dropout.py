"""``dropout``: its record."""

from __future__ import annotations

import torch
from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Draw, Inputs, misaligned, strided
from op_records.record import Record

MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011) in plain integers: four 32-bit words."""
    words, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(words[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(words[2] * 0xCD9E8D57, 1 << 32)
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return words


def keep(numel: int, p: float, seed: int, offset: int) -> list[bool]:
    """Element 8 i + j is kept when the j-th 16-bit piece (low half first) of draw i reaches p in 65,536ths."""
    key = (seed & MASK32, (seed >> 32) & MASK32)
    pieces: list[int] = []
    for i in range((numel + 7) // 8):
        counter = (i & MASK32, i >> 32, offset & MASK32, (offset >> 32) & MASK32)
        for word in philox4x32(counter, key):
            pieces += [word & 0xFFFF, word >> 16]
    return [piece >= round(p * 65536) for piece in pieces[:numel]]


def dropout(x: Tensor, p: float, seed: int | Tensor, offset: int = 0) -> tuple[Tensor, ...]:
    """Kept elements are scaled by the inverse of the rate at which 16 bits keep them."""
    dropped = round(p * 65536)
    mask = torch.tensor(keep(x.numel(), p, int(seed), offset), dtype=torch.bool, device=x.device).view(x.shape)
    return (x * mask * (65536 / (65536 - dropped) if dropped < 65536 else 0.0),)


def many(draw: Draw) -> Inputs:
    return {"x": draw.normal(2_200_001), "p": 0.1, "seed": 3}


def any_dropout(some: Anything) -> Inputs:
    return {"p": some.number(0.1), "seed": some.choice(1, -1, 1 << 62), "offset": some.number(0)}


def fuzzed(some: Anything) -> Inputs:
    return {"x": some.tensor(some.B, some.d)} | any_dropout(some)


SAMPLES: dict[str, Builder] = {
    "plain": lambda draw: {"x": draw.normal(3, 5, 8), "p": 0.1, "seed": 7},
    "odd-1021": lambda draw: {"x": draw.normal(1021), "p": 0.5, "seed": 8, "offset": 3},
    "rows-of-37": lambda draw: {"x": draw.normal(5, 37), "p": 0.3, "seed": 2**63 - 1, "offset": 2**33 + 5},
    "negative-seed": lambda draw: {"x": draw.normal(33), "p": 0.3, "seed": -5, "offset": 0},
    "seed-tensor": lambda draw: {"x": draw.normal(2, 65), "p": 0.2, "seed": draw.lengths(99)},
    "p-0": lambda draw: {"x": draw.normal(3, 5), "p": 0.0, "seed": 1},
    "p-1": lambda draw: {"x": draw.normal(3, 5), "p": 1.0, "seed": 1},
    "scalar": lambda draw: {"x": draw.normal(), "p": 0.5, "seed": 1},
    "empty": lambda draw: {"x": draw.normal(0, 4), "p": 0.5, "seed": 1},
    "strided": lambda draw: strided({"x": draw.normal(3, 9), "p": 0.5, "seed": 1}),
    "misaligned": lambda draw: misaligned({"x": draw.normal(3, 9), "p": 0.5, "seed": 1}),
}

RECORD = Record(
    reference=dropout,
    samples=SAMPLES,
    differentiable=("x",),
    typical=("plain",),
    large=("odd-1021",),
    smooth=("plain",),
    valid="plain",
    in_use="rows-of-37",
    many=many,
    fuzzed=fuzzed,
)
