"""One table from the result files of several runs or machines: a row per case and contender, a column per run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.registry import OURS
from benchmarks.report import grouped, markdown


def text(runs: Sequence[dict[str, Any]]) -> str:
    """The runs' machines, then a Markdown table per table of the benchmarks.

    A cell holds the contender's time over ours, or for ours its milliseconds; it is empty where that run has no figure.
    """
    heads = [f"run {number}" for number in range(1, len(runs) + 1)]
    parts = ["\n".join(f"- {head}: {_machine(run)}" for head, run in zip(heads, runs, strict=True))]
    rows: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for column, run in enumerate(runs):
        for (table, case, dtype), records in grouped(run["measurements"]):
            for record in records:
                key = (case, dtype, record["contender"])
                cells = rows.setdefault(table, {}).setdefault(key, [""] * len(runs))
                cells[column] = _cell(record)
    for table, lines in rows.items():
        body = [[*key, *cells] for key, cells in lines.items()]
        parts.append(f"### {table}\n\n{markdown([['case', 'dtype', 'contender', *heads], *body])}")
    return "\n\n".join(parts)


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    commit = (machine["commit"] or "unknown")[:9]
    quick = "; tiny sizes, its ratios mean nothing" if run["quick"] else ""
    return (
        f"{machine['cpu']} (family/model/stepping {machine['cpu_family_model_stepping']}), "
        f"{' '.join(machine['isa'])}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}, "
        f"{run['started']}{quick}"
    )


def _cell(record: dict[str, Any]) -> str:
    if record["status"] != "measured":
        return str(record["status"])
    ratio = record.get("ratio")
    if record["contender"] == OURS or ratio is None:
        return f"{record['milliseconds']['median']:.1f} ms"
    return f"{ratio['median']:.2f}x"
