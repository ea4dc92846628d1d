"""How a case is measured: errors first, then times side by side, then memory in fresh processes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import memory
from benchmarks.registry import OURS, Case, Goal, Refused, Table

Record = dict[str, Any]
WARM_UP_CALLS = 2
SLOW_SECONDS = 1.0  # a call that takes longer needs one at most, and its check was one already


def measure(
    table: Table, index: int, *, rivals: set[str] | None, quick: bool, repeats: int, threads: int
) -> list[Record]:
    """One record per contender of a case (ours and ``rivals``; None: all of them).

    A contender that is wrong or cannot run says so in its record instead of a time.
    """
    case = table.cases(quick)[index]
    records: dict[str, Record] = {}
    calls: dict[str, Callable[[], Any]] = {}
    torch.compiler.reset()  # no recompilation limit from other cases
    for name, contender in case.contenders.items():
        if rivals is not None and name not in rivals | {OURS}:
            continue
        record = records[name] = {"table": table.name, "case": case.name, "dtype": case.dtype, "contender": name}
        record |= {"bound": contender.bound, "along": case.along, "status": "measured"}
        if contender.unavailable is not None:
            record |= {"status": "unavailable", "reason": contender.unavailable}
            continue
        try:
            calls[name] = case.prepare(name)
            record["error"] = case.verify(name, calls[name])
        except Refused as reason:
            record |= {"status": "refused", "reason": str(reason)}
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or a construct it does not take
            record |= {"status": "unavailable", "reason": _one_line(error)}
        except Exception as error:  # the other rows are still worth having; the run's exit code tells
            record |= {"status": "failed", "reason": _one_line(error)}
        if record["status"] != "measured":
            calls.pop(name, None)
    if OURS not in calls:  # no ratio without a correct result of ours
        for name in calls:
            records[name] |= {"status": "skipped", "reason": "nothing of ours to compare with"}
        return list(records.values())
    for name, times in side_by_side(calls, repeats).items():
        records[name] |= times
    measured = list(calls)
    calls.clear()
    memory.give_back_freed()  # or this process and the one that is measured would both hold a contender's peak
    for name in measured:
        record = records[name] | rates(case, records[name]["milliseconds"]["median"])
        record["memory"] = None
        try:
            record["memory"] = memory.measure(table.name, index, name, quick=quick, threads=threads)
        except RuntimeError as error:
            record |= {"status": "failed", "reason": _one_line(error)}
        records[name] = record
    records[OURS]["goals"] = [evaluate(goal, records) for goal in case.goals]
    return list(records.values())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def side_by_side(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Record]:
    """Times every contender right beside ours: in each round, for each rival, ours and then the rival, or the rival
    and then ours in every second round. The ratio of such a pair is little disturbed by what else the machine does.

    Returns:
        per contender ``milliseconds`` and, for rivals, ``ratio`` (its time over ours), each with its ``median``, the
        quartiles ``low`` and ``high`` and all ``samples``.
    """
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            if timed(call) > 1e3 * SLOW_SECONDS:
                break
    times: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls if name != OURS}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for rival in ratios or [OURS]:
                pair = (OURS, rival) if turn % 2 == 0 else (rival, OURS)
                taken = {name: timed(calls[name]) for name in pair}
                for name, milliseconds in taken.items():
                    times[name].append(milliseconds)
                if rival != OURS:
                    ratios[rival].append(taken[rival] / taken[OURS])
    finally:
        gc.enable()
    summaries = {name: {"milliseconds": summary(samples)} for name, samples in times.items()}
    for name, samples in ratios.items():
        summaries[name]["ratio"] = summary(samples)
    return summaries


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call; freeing its result is part of it."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def summary(samples: list[float]) -> Record:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * samples
    return {"median": median, "low": low, "high": high, "samples": samples}


def rates(case: Case, milliseconds: float) -> Record:
    """Useful GFLOP/s and GB/s: the least work any implementation has to do, over the time taken."""
    return {
        "gflops": None if case.flops is None else case.flops / milliseconds / 1e6,
        "gigabytes_per_second": None if case.bytes is None else case.bytes / milliseconds / 1e6,
    }


def evaluate(goal: Goal, records: dict[str, Record]) -> Record:
    """The goal beside what was measured; ``met`` is None where it could not be measured."""
    result: Record = {
        "metric": goal.metric,
        "against": goal.against,
        "bound": goal.bound,
        "of": goal.of,
        "measured": None,
    }
    if goal.metric in ("time", "slowdown"):
        ratio = records.get(goal.against, {}).get("ratio")
        own = {"median": 1.0} if goal.of == OURS else records.get(goal.of, {}).get("ratio")
        if ratio is not None and own is not None:
            result["measured"] = ratio["median"] / own["median"]
    elif goal.metric == "peak":
        rival, mine = (records.get(name, {}).get("memory") for name in (goal.against, goal.of))
        if rival and mine:
            result["measured"] = rival["peak_bytes"] / max(mine["peak_bytes"], 1)
    elif records[OURS]["memory"] is not None:
        result["measured"] = records[OURS]["memory"]["working_bytes"]
    measured = result["measured"]
    if measured is None:
        return result | {"met": None}
    at_most = goal.metric in ("memory", "slowdown")
    return result | {"met": measured <= goal.bound if at_most else measured >= goal.bound}
