"""How the training step grows with the length T, the batch B and the vocabulary V; also drawn, as growth.png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.bench_step import (
    CHARADES,
    RECOMPUTED,
    TINY,
    Experiment,
    Make,
    make_case,
    our_recomputing_step,
    our_step,
    published_step,
)
from benchmarks.registry import OURS, Case, Table

SIZES = {"T": (64, 256, 1024, 2048, 4096), "B": (16, 64, 128, 256, 512), "V": (1112, 4000, 16000, 64000, 128000)}
# Sizes that stay fixed; batches are smaller than the published 128, so that the published step fits into 24 GB.
STILL: dict[str, dict[str, Any]] = {"T": {"B": 2}, "B": {"T": 100}, "V": {"B": 64, "T": 100}}
QUICK_SIZES = {"T": (16, 20, 24, 28, 32), "B": (2, 3, 4, 5, 6), "V": (37, 41, 45, 50, 64)}


def grown(axis: str, size: int, quick: bool) -> Experiment:
    base = TINY[CHARADES] if quick else replace(CHARADES, **STILL[axis])
    size_of: dict[str, Any] = {axis: size}
    changed = replace(base, **size_of)
    return replace(changed, name=f"T={changed.T}, V={changed.V}")


def cases(quick: bool) -> Sequence[Case]:
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_step, "float32"),
        "ours, bf16": (our_step, "bfloat16"),
        RECOMPUTED: (our_recomputing_step, "float32"),
        "published": (published_step, "float32"),
    }
    return [
        replace(
            make_case("training step", grown(axis, size, quick), "float32", makers, (), trains=True), along=(axis, size)
        )
        for axis, sizes in (QUICK_SIZES if quick else SIZES).items()
        for size in sizes
    ]


TABLE = Table("growth", "The training step for growing T, B and V", cases, repeats=3)


def test_growth(benchmark: Any, call: Any) -> None:
    benchmark(call)
