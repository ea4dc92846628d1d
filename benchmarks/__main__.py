"""``python -m benchmarks [TABLE ...]``: checks and measures every case, writes JSON, prints tables, draws a plot."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, machine, measure, report
from benchmarks.registry import tables
from cnm.training.memory import keep_freed_memory

FORMAT = 1  # of the result file


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all that can run here was measured; 1: a contender was wrong or failed; 2: bad usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    known = tables()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(known)} (default: all), or gpu")
    parser.add_argument("--rivals", metavar="NAME[;NAME]", help="only these, of the names in the tables; default: all")
    parser.add_argument(
        "--repeats", type=_positive, default=None, help="pairs per ratio (default: the table's; quick: 3)"
    )
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything works, not how fast")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.tables if name not in known]
    if unknown:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(known)}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: cannot be made a folder ({error.strerror})")

    rivals = options.rivals and set(options.rivals.split(";"))
    chosen = [known[name] for name in options.tables or known]
    named = {name for table in chosen for case in table.cases(options.quick) for name in case.contenders}
    if rivals and not rivals <= named:
        parser.error(f"--rivals: no {min(rivals - named)!r} in these tables; there are {'; '.join(sorted(named))}")

    repeats = options.repeats or (3 if options.quick else None)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "format": FORMAT,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.quick,
        "repeats": repeats,
        "machine": machine.describe(options.threads, keep_freed_memory()),
        "measurements": [],
    }
    path = options.output / "results.json"
    for table in chosen:
        cases = table.cases(options.quick)
        for index, case in enumerate(cases):
            print(f"{table.name} {index + 1}/{len(cases)}: {case.name}, {case.dtype}", file=sys.stderr, flush=True)
            results["measurements"] += measure.measure(
                table,
                index,
                rivals=rivals,
                quick=options.quick,
                repeats=repeats or table.repeats,
                threads=options.threads,
            )
            write_json(path, results)  # what is measured is safe, whatever happens next
    print(report.text(results))
    report.plot(results, options.output / "results.png")
    report.plot_growth(results, options.output / "growth.png")
    print(f"\nWritten: {path} and its plots", file=sys.stderr)
    bad = [record for record in results["measurements"] if record["status"] in ("refused", "failed")]
    for record in bad:
        where = ", ".join(record[key] for key in ("case", "dtype", "contender"))
        print(f"{record['status']}: {where}: {record['reason']}", file=sys.stderr)
    return 1 if bad else 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
