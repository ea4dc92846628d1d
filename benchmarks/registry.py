"""Everything that is measured: tables of cases, each with contenders and goals.

A table is one file ``bench_<name>.py`` that declares ``TABLE``; ``tables()`` finds it. Nothing else lists tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OURS = "ours"


@dataclass(frozen=True)
class Goal:
    """A bound that ours is to reach.

    ``time``: the rival's time is at least ``bound`` times ours. ``slowdown``: it is at most that; the rival is then
    ourselves under load. ``memory``: ours works in at most ``bound`` bytes
    beyond what every contender has to hold, its inputs and its results; ``against`` then says what the bound is.
    ``peak``: the rival's peak above the inputs is at least ``bound`` times ours. ``of`` names another of our own ways.
    """

    metric: Literal["time", "slowdown", "memory", "peak"]
    against: str
    bound: float
    of: str = OURS


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        function: called with the case's inputs as keywords, returns a tensor or a tuple of tensors.
        dtype: its floating inputs are cast to this dtype beforehand; None: the case's own.
        compiled: goes through ``torch.compile`` first.
        bound: computes only part of the case (its matrix products, say) to show what cannot be beaten; its result is
            therefore not compared with the case's.
        unavailable: why it cannot run here, or None.
    """

    function: Callable[..., Any]
    dtype: Any = None
    compiled: bool = False
    bound: bool = False
    unavailable: str | None = None


@dataclass(frozen=True)
class Case:
    """One op at one size and dtype. ``op_case`` makes the usual kind.

    Attributes:
        name: op, sizes and direction.
        dtype: what the row is labelled with.
        contenders: by name, ``OURS`` first.
        prepare: name of a contender -> a call to be timed; whatever precedes the work itself happens here.
        verify: (name, prepared call) -> relative error per tensor. Raises ``Refused`` when a contender is wrong.
        goals: of ours, here.
        flops, bytes: the least any implementation does; None where it says nothing.
        trains: a call leaves gradients and optimizer states behind; peak memory is that of a later call.
        along: the size that grows from case to case, and its value here; such cases are also drawn as curves.
    """

    name: str
    dtype: str
    contenders: dict[str, Contender]
    prepare: Callable[[str], Callable[[], Any]]
    verify: Callable[[str, Callable[[], Any]], dict[str, float]]
    goals: tuple[Goal, ...] = ()
    flops: float | None = None
    bytes: float | None = None
    trains: bool = False
    along: tuple[str, int] | None = None


class Refused(AssertionError):
    """A contender's result is wrong; it must not be timed."""


@dataclass(frozen=True)
class Table:
    """A named group of cases. ``cases(quick)`` gives the same list in both sizes, tiny ones when quick; ``repeats``
    is how many pairs make a ratio unless the command line says otherwise."""

    name: str
    title: str
    cases: Callable[[bool], Sequence[Case]]
    repeats: int = 11


def tables() -> dict[str, Table]:
    """Every table by name, in order of their files' names."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        table = importlib.import_module(f"{__package__}.{path.stem}").TABLE
        found[table.name] = table
    return found
