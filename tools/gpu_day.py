"""Everything to do on the first day with a GPU, in one command and under 25 minutes.

    python tools/gpu_day.py [--output runs/gpu_day]
    python tools/gpu_day.py --rehearse      # without a GPU: all that does not need one runs, the rest is named

Builds for the card alone; runs the `gpu` tests, those most at risk first; compute-sanitizer over one pass of each
kernel; the table of times against goals with the predictions beside; the kernels of a training step as counted, and
training steps on the GPU, with and without CUDA graphs. Goes on after a failure. Writes gpu_day.json and gpu_day.md,
after each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BY_RISK = (
    "tests/ops/test_cuda_layouts.py",  # wrong on the card, wrong everywhere
    "tests/ops/test_every_op.py",
    "tests/ops/test_gpu.py",
    "tests/test_benchmarks_gpu.py",
)
SELECTED = "(cuda or gpu or layouts) and not cuda_emulation"  # the emulator's tests would fill the time
ONE_PASS = "tests/ops/test_gpu.py"
STAGES = ("build", "tests", "sanitizer", "table", "step")
LIMITS = {"build": 300, "tests": 300, "sanitizer": 240, "table": 480, "step": 180}  # seconds: 25 minutes in all


@dataclass
class Stage:
    """One of them, and what became of it."""

    name: str
    commands: list[list[str]]
    needs_gpu: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    said: str = ""


def card() -> tuple[str, str] | None:
    """Name and architecture of the GPU ("9.0a"), or None."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}{'a' if major == 9 else ''}"


def stages(output: Path, architecture: str, rehearse: bool) -> list[Stage]:
    """Returns the stages in order. In a rehearsal, a stage that can run without a GPU does so."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    table = [python, "-m", "benchmarks", "gpu", "--output", str(output)]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    found = [
        Stage(
            "build",
            [[python, "setup.py", "build_ext", "--inplace"]],
            environment={"TORCH_CUDA_ARCH_LIST": architecture, "CNM_KERNELS_CUDA": "1"},
        ),
        Stage("tests", [[*tests, "-m", "gpu or not gpu", "-k", SELECTED, *BY_RISK]], False),
        Stage(
            "sanitizer",
            [
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", "native", ONE_PASS]
                for tool in ("memcheck", "racecheck", "synccheck")
            ],
        ),
        Stage("table", [table, [*table, "--predict"]], False),
        Stage("step", [[*table, "--step"], [*table, "--launches"]]),
    ]
    if rehearse:
        found[1].commands = [[*tests, "--collect-only", "-m", "gpu", *BY_RISK]]
        found[3].commands = [table]
    return found


def run(stage: Stage) -> None:
    """Fills in what became of it; a failure of one command does not keep the next from running."""
    began, stage.status = time.monotonic(), "done"
    for command in stage.commands:
        left = LIMITS[stage.name] - (time.monotonic() - began)
        try:
            outcome = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment,
                capture_output=True,
                text=True,
                timeout=max(left, 1),
            )
        except subprocess.TimeoutExpired as error:
            stage.said += _end(error.stdout, 20000) + _end(error.stderr, 4000)
            stage.status, stage.reason = "failed", f"longer than {LIMITS[stage.name]} s: {' '.join(command)}"
        except FileNotFoundError:
            stage.status, stage.reason = "failed", f"{command[0]} is not here"
        else:
            stage.said += _end(outcome.stdout, 20000) + _end(outcome.stderr, 4000)
            if outcome.returncode != 0:
                stage.status, stage.reason = "failed", f"exit code {outcome.returncode}: {' '.join(command)}"
    stage.seconds = round(time.monotonic() - began, 1)


def _end(printed: bytes | str | None, most: int) -> str:
    """The last characters of what a command printed; of one out of time it comes as bytes."""
    text = printed.decode("utf-8", "replace") if isinstance(printed, bytes) else printed or ""
    return text[-most:]


def write(output: Path, about: dict[str, Any], all_stages: list[Stage]) -> None:
    (output / "gpu_day.json").write_text(
        json.dumps(about | {"stages": [asdict(stage) for stage in all_stages]}, indent=1) + "\n", encoding="utf-8"
    )
    lines = [f"# {about['gpu']}", "", "| stage | status | seconds | reason |", "|---|---|---|---|"]
    lines += [f"| {stage.name} | {stage.status} | {stage.seconds} | {stage.reason} |" for stage in all_stages]
    for stage in all_stages:
        if stage.said:
            lines += ["", f"## {stage.name}", "", "```", stage.said.strip(), "```"]
    (output / "gpu_day.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every stage that could run is done; 1: one failed; 2: no GPU, and no rehearsal asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="up to what needs a GPU")
    parser.add_argument("--only", choices=STAGES, action="append", help="this stage; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_day"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    found = card()
    if found is None and not options.rehearse:
        print("gpu_day: PyTorch finds no NVIDIA GPU here; --rehearse runs what needs none", file=sys.stderr)
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    rehearse = found is None
    about = {"gpu": found[0] if found else "no GPU: a rehearsal", "torch": torch.__version__, "rehearsal": rehearse}
    all_stages = stages(output, found[1] if found else "9.0a", rehearse)
    for stage in all_stages:
        if options.only and stage.name not in options.only:
            stage.status, stage.reason = "left out", "--only"
        elif stage.needs_gpu and found is None:
            stage.status = "needs a GPU"
            stage.reason = "; ".join(" ".join(command) for command in stage.commands)
        else:
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            run(stage)
        print(f"{stage.name}: {stage.status} {stage.reason}", flush=True)
        write(output, about, all_stages)
    print(f"Written: {output / 'gpu_day.json'} and gpu_day.md", file=sys.stderr)
    return int(any(stage.status == "failed" for stage in all_stages))


if __name__ == "__main__":
    sys.exit(main())
