"""Tables and a plot from a result file. ``python -m benchmarks.report FILE`` prints the tables of an old one; with
several files, of several runs or machines, it prints them side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import is_busy
from benchmarks.registry import OURS

Record = dict[str, Any]
HEADER = ["contender", "ms", "slower than ours", "GFLOP/s", "GB/s", "peak MB", "working MB", "goal"]
COLOURS = {"met": "#3a7d44", "missed": "#b3423a", "none": "#6b7a8f", "bound": "#c9b458"}


def text(results: dict[str, Any]) -> str:
    """The whole report: the machine, then a Markdown table per case."""
    parts = [machine_text(results["machine"])]
    if results["quick"]:
        parts.append("Tiny sizes: this run shows that everything works, its ratios and goals mean nothing.")
    for (table, case, dtype), records in grouped(results["measurements"]):
        rows = [_row(record, records) for record in records]
        parts.append(f"### {table}: {case}, {dtype}\n\n{markdown([HEADER, *rows])}")
    parts.append(goals_text(results["measurements"]))
    return "\n\n".join(parts)


def grouped(measurements: Iterable[Record]) -> list[tuple[tuple[str, str, str], list[Record]]]:
    """Records by (table, case, dtype), in their order."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in measurements:
        groups.setdefault((record["table"], record["case"], record["dtype"]), []).append(record)
    return list(groups.items())


def machine_text(machine: dict[str, Any]) -> str:
    lines = [
        f"Machine: {machine['cpu']} (family/model/stepping {machine['cpu_family_model_stepping']}), "
        f"{machine['cores']} cores, {' '.join(machine['isa'])}; {machine['system']}, {machine['libc']}",
        f"Run: {machine['threads']} threads, torch {machine['torch']} (BLAS {machine['blas']}, "
        f"oneDNN {machine['onednn']}), "
        f"Python {machine['python']}, malloc {machine['malloc']}, commit {machine['commit']}",
        f"Ours: {', '.join(sorted(set(machine['backends'].values())))} backend. Ratios are medians of pairs "
        "measured one right after the other, [quartiles]; above 1 the contender is slower than ours.",
    ]
    if machine["environment"]:
        lines.append("Environment: " + " ".join(f"{key}={value}" for key, value in machine["environment"].items()))
    if is_busy(machine):
        lines.append(f"The machine was busy (load average {machine['load_average']}): absolute times are not its best.")
    return "\n".join(lines)


def goals_text(measurements: Iterable[Record]) -> str:
    """One line per goal."""
    rows = [["case", "goal", "measured", ""]]
    for (_, case, dtype), records in grouped(measurements):
        for goal in _goals(records):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
            rows.append([f"{case}, {dtype}", *_goal_words(goal), verdict])
    return "### goals\n\n" + (markdown(rows) if len(rows) > 1 else "none set for these cases")


def _goals(records: Iterable[Record]) -> list[Record]:
    return [goal for record in records for goal in record.get("goals", ())]


def _goal_words(goal: Record) -> tuple[str, str]:
    measured = goal["measured"]
    if goal["metric"] in ("time", "slowdown"):
        of = "" if goal["of"] == OURS else f"{goal['of']}: "
        relation = ">=" if goal["metric"] == "time" else "<="
        return f"{of}{relation} {goal['bound']:g}x {goal['against']}", "-" if measured is None else f"{measured:.2f}x"
    if goal["metric"] == "peak":
        return (
            f"{goal['against']}'s peak >= {goal['bound']:g}x {goal['of']}",
            "-" if measured is None else f"{measured:.2f}x",
        )
    words = f"working memory <= {goal['against']} ({goal['bound'] / 1e6:.1f} MB)"
    return words, "-" if measured is None else f"{measured / 1e6:.1f} MB"


def _row(record: Record, records: Sequence[Record]) -> list[str]:
    name = record["contender"] + (" (bound)" if record["bound"] else "")
    if record["status"] != "measured":
        return [name, f"{record['status']}: {record['reason']}", *[""] * (len(HEADER) - 2)]
    times, ratio, memory = record["milliseconds"], record.get("ratio"), record["memory"] or {}
    about = [goal for goal in _goals(records) if goal["against"] == record["contender"]]
    if record["contender"] == OURS:
        about = [goal for goal in _goals(records) if goal["metric"] == "memory"]
    return [
        name,
        f"{times['median']:.2f} [{times['low']:.2f}, {times['high']:.2f}]",
        "" if ratio is None else f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        _number(record["gflops"], ".0f"),
        _number(record["gigabytes_per_second"], ".1f"),
        _number(memory.get("peak_bytes"), ".1f", 1e-6),
        _number(memory.get("working_bytes"), ".1f", 1e-6),
        "; ".join(f"{_goal_words(goal)[0]}: {'met' if goal['met'] else 'MISSED'}" for goal in about),
    ]


def _number(value: float | None, spec: str, factor: float = 1) -> str:
    return "" if value is None else format(value * factor, spec)


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """A bar per rival, its time over ours with quartiles; a tick marks the goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(key, records, rows) for key, records in grouped(results["measurements"]) if (rows := _timed(records))]
    if not groups:
        return
    heights = [len(rows) + 1 for _, _, rows in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.28 * sum(heights) + 1), height_ratios=heights, sharex=True, squeeze=False
    )
    for axis, ((_, case, dtype), records, rows) in zip(axes[:, 0], groups, strict=True):
        goals = {goal["against"]: goal for goal in _goals(records) if goal["metric"] in ("time", "slowdown")}
        for place, record in enumerate(rows):
            ratio, goal = record["ratio"], goals.get(record["contender"])
            state = "none" if goal is None else "met" if goal["met"] else "missed"
            errors = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            colour = COLOURS["bound" if record["bound"] else state]
            axis.barh(place, ratio["median"], xerr=errors, color=colour, error_kw={"elinewidth": 1})
            axis.text(ratio["high"], place, f"  {ratio['median']:.2f}x", va="center", fontsize=7)
            if goal is not None:
                axis.plot([goal["bound"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axis.set_yticks(range(len(rows)), [record["contender"] for record in rows], fontsize=7)
        axis.set_title(f"{case}, {dtype}", fontsize=8, loc="left")
        axis.axvline(1, color="black", linewidth=0.6)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time over ours (green: goal met, red: goal missed, black tick: the goal)", fontsize=8)
    machine = results["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Time and peak memory against each size that grows, a curve per contender; nothing where nothing grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    grown = [record for record in results["measurements"] if record["along"] and record["status"] == "measured"]
    axes_names = list(dict.fromkeys(record["along"][0] for record in grown))
    if not axes_names:
        return
    figure, axes = plt.subplots(2, len(axes_names), figsize=(3.4 * len(axes_names), 5.4), squeeze=False)
    quantities = {
        "seconds per step": lambda record: record["milliseconds"]["median"] / 1e3,
        "peak GB": lambda record: record["memory"] and record["memory"]["peak_bytes"] / 1e9,
    }
    for row, (label, quantity) in zip(axes, quantities.items(), strict=True):
        row[0].set_ylabel(label)
        for axis, size in zip(row, axes_names, strict=True):
            curves: dict[str, list[tuple[int, float]]] = {}
            for record in grown:
                if record["along"][0] == size and (value := quantity(record)) is not None:
                    curves.setdefault(record["contender"], []).append((record["along"][1], value))
            for name, points in curves.items():
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_yticks([], minor=True)
            axis.set_xticks([point[0] for point in points], [str(point[0]) for point in points], fontsize=7)
            axis.set_xticks([], minor=True)
            axis.set_xlabel(size)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _timed(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if "ratio" in record]


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import side_by_side

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a results.json")
    runs = []
    for path in parser.parse_args(arguments).files:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            text(run)  # finds out whether it is one
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path}: no result file of these benchmarks ({error!r})", file=sys.stderr)
            return 2
        runs.append(run)
    print(text(runs[0]) if len(runs) == 1 else side_by_side.text(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
