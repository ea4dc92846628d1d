"""How CPL's training step grows with the number of proposals K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.bench_cpl import ALLOWED, CHARADES, LOSSES, TINY, our_recomputing_step, our_step, published_step
from benchmarks.bench_step import RECOMPUTED, Make, make_case
from benchmarks.registry import OURS, Case, Table

PROPOSALS, QUICK_PROPOSALS = (1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 5, 6)


def cases(quick: bool) -> Sequence[Case]:
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_step, "float32"),
        "ours, bf16": (our_step, "bfloat16"),
        RECOMPUTED: (our_recomputing_step, "float32"),
        "published": (published_step, "float32"),
    }
    base = TINY[CHARADES] if quick else CHARADES
    return [
        replace(
            make_case(
                "CPL training step",
                replace(base, K=K, name=f"K={K}"),
                "float32",
                makers,
                (),
                trains=True,
                losses=LOSSES,
                allowed=ALLOWED,
            ),
            along=("K", K),
        )
        for K in (QUICK_PROPOSALS if quick else PROPOSALS)
    ]


TABLE = Table("cpl_growth", "CPL's training step for growing K", cases, repeats=3)


def test_cpl_growth(benchmark: Any, call: Any) -> None:
    benchmark(call)
