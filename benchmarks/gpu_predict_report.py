"""``python -m benchmarks gpu --predict``: a table for each backend of what an H100 would take for every op."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import gpu_predict, gpu_predict_triton
from benchmarks.gpu_predict import Prediction, total
from benchmarks.report import markdown

Parts = list[list[Prediction]]  # launches of forward and of backward
Measured = Callable[[Any, str], list[float | None]]  # by row and backend, us of forward and backward

HEADER = ["row", "part", "predicted us", "goal", "floor", "bound by", "launches", "measured us"]
DETAILS = [
    "kernel",
    "blocks",
    "warps",
    "memory",
    "tensor",
    "issue",
    "shared",
    "special",
    "tail",
    "instructions",
    "unexplained",
]


@dataclass(frozen=True)
class Backend:
    """How a backend's launches are predicted, or why they are not."""

    name: str
    why_not: str | None
    predict: Callable[[Any], Parts]
    assumptions: str


def backends() -> list[Backend]:
    model = cache(gpu_predict.Model)  # compiles the sources
    return [
        Backend(
            "native", gpu_predict.why_not(), lambda row: gpu_predict.predict(row, model()), gpu_predict.ASSUMPTIONS
        ),
        Backend("triton", gpu_predict_triton.why_not(), gpu_predict_triton.predict, gpu_predict_triton.ASSUMPTIONS),
    ]


def lines_of(row: Any, parts: Parts, measured: list[float | None]) -> list[list[str]]:
    together = len(row.goal) == 1
    named = (
        {"forward + backward": parts[0] + parts[1]}
        if together
        else dict(zip(("forward", "backward"), parts, strict=True))
    )
    lines = []
    for i, (part, launches) in enumerate(named.items()):
        slowest = max(launches, key=lambda launch: launch.time)
        taken = total(parts[0]) + total(parts[1]) if together else total(launches)
        real = (
            [us for us in measured if us is not None]
            if together
            else [us for us in measured[i : i + 1] if us is not None]
        )
        goal, floor = (f"{numbers[i]:g}" if numbers else "" for numbers in (row.goal, row.floor))
        lines.append([
            row.name, part, f"{taken:.1f}", goal, floor, f"{slowest.bound} ({slowest.kernel})", str(len(launches)),
            f"{sum(real):.1f}" if real else "no GPU here",
        ])  # fmt: skip
    return lines


def details_of(row: Any, parts: Parts) -> str:
    table = [DETAILS]
    for launch in parts[0] + parts[1]:
        times = [f"{getattr(launch, name):.1f}" for name in DETAILS[3:9]]
        table.append([launch.kernel, str(launch.blocks), str(launch.warps), *times, f"{launch.instructions:.0f}",
                      f"{launch.unexplained:.0%}"])  # fmt: skip
    return f"#### {row.name}\n\n{markdown(table)}"


def section(backend: Backend, rows: list[Any], measured: Measured) -> tuple[str, list[dict[str, Any]]]:
    """The text and the records of a backend. A row whose counts cannot be had says why, and has no numbers."""
    lines, details, records = [HEADER], [], []
    for row in rows:
        print(f"counting: {backend.name}, {row.name}", file=sys.stderr, flush=True)
        record: dict[str, Any] = {"row": row.name, "backend": backend.name}
        try:
            parts = backend.predict(row)
        except Exception as error:  # the other rows are still worth having
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            lines.append([row.name, f"refused: {reason}", *[""] * (len(HEADER) - 2)])
            records.append(record | {"refused": reason})
            continue
        lines += lines_of(row, parts, measured(row, backend.name))
        details.append(details_of(row, parts))
        records.append(record | {"forward": total(parts[0]), "backward": total(parts[1]),
                                 "launches": [[asdict(launch) for launch in part] for part in parts]})  # fmt: skip
    table = f"### {backend.name}\n\n{markdown(lines)}\n\nOf an H100, by counting. {backend.assumptions}"
    return "\n\n".join([table, *details]), records


def main(rows: list[Any], output: Path, measured: Measured) -> int:
    """Prints the tables and every launch; writes predicted.json. 1: a row was refused; 2: it cannot be done here."""
    assumptions: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    for backend in backends():
        if backend.why_not is not None:
            print(f"--predict: {backend.name}: {backend.why_not}", file=sys.stderr)
            continue
        text, found = section(backend, rows, measured)
        print(text, end="\n\n", flush=True)
        assumptions[backend.name] = backend.assumptions
        records += found
    if not assumptions:
        return 2
    output.mkdir(parents=True, exist_ok=True)
    path = output / "predicted.json"
    path.write_text(json.dumps({"assumptions": assumptions, "rows": records}, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}", file=sys.stderr)
    return int(any("refused" in record for record in records))
