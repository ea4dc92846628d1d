"""The training step on a machine that one other process uses too: against itself undisturbed, and the published code.

The other process computes without a pause, in a session of its own as another user's does. It is stopped (SIGSTOP)
while an undisturbed contender is timed. A fair share costs half as much again: a step on 2 threads that meets one more
on 2 cores keeps two thirds of the machine. Linux with sched_autogroup_enabled shares by session instead: half for each.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.bench_step import CHARADES, TINY, Experiment, Make, make_case, our_step, published_step
from benchmarks.registry import OURS, Case, Goal, Table

BESIDE = ", beside a busy process"


# A stopped process outlives a parent that ends without its exit handlers, as a measuring process does: the kernel kills
# it then (prctl's PR_SET_PDEATHSIG).
COMPUTE = f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})\nwhile True: pass"


class Busy:
    """A process that computes while it is let."""

    def __init__(self) -> None:
        closed = subprocess.DEVNULL  # it must not keep the parent's pipes open
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMPUTE], stdin=closed, stdout=closed, stderr=closed, start_new_session=True
        )
        self._signal(signal.SIGSTOP)
        atexit.register(self.process.kill)

    def __enter__(self) -> None:
        self._signal(signal.SIGCONT)

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


busy = cache(Busy)


def beside(make: Make) -> Make:
    def made(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
        call = make(experiment, dtype, dropout)

        def disturbed() -> Any:
            with busy():
                return call()

        return disturbed

    return made


def cases(quick: bool) -> Sequence[Case]:
    experiment = TINY[CHARADES] if quick else replace(CHARADES, B=32)
    found = []
    for dtype in ("float32", "bfloat16"):
        makers: dict[str, tuple[Make, str]] = {
            OURS: (our_step, dtype),
            OURS + BESIDE: (beside(our_step), dtype),
            "published": (published_step, "float32"),
            "published" + BESIDE: (beside(published_step), "float32"),
        }
        goals = [Goal("slowdown", OURS + BESIDE, 2.2)]
        found.append(make_case("training step", experiment, dtype, makers, goals, trains=True))
    return found


TABLE = Table("shared", "The training step beside another busy process", cases, repeats=15)


def test_shared(benchmark: Any, call: Any) -> None:
    benchmark(call)
