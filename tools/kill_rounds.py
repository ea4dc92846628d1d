"""Kills a training run (SIGKILL) at random moments, resumes it, and compares it with one that nobody killed.

    python tools/kill_rounds.py --rounds 50

In every other round the run kills itself when it has written half of a file, one of the next twenty. After every kill
the folder must hold whole files only and the run must go on; in the end its metrics and parameters must be, bit for
bit, those of the unbroken run. A checkpoint is written after every epoch of a few updates.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "")]  # installed packages first

from small_runs import synthetic_config

from cnm import checkpoint

EPOCHS_PER_ROUND = 60  # more than a round survives
NOT_COMPARED = ("time", "samples_per_second", "epoch_seconds")


# The command line that dies with half of its N-th file on the disk; a file is whole once it is flushed.
DIES_IN_A_WRITE = """
import os, signal, sys
from cnm.cli import main
left, flush = int(sys.argv.pop(1)), os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)
os.fsync = fsync
main()
"""


def train(arguments: list[str], dies_in_write: int | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = ["-m", "cnm"] if dies_in_write is None else ["-c", DIES_IN_A_WRITE, str(dies_in_write)]
    command = [sys.executable, *program, "train", *arguments, "--device", "cpu"]
    where = tempfile.gettempdir()  # not the source tree, where python -m would look first
    return subprocess.Popen(
        command, env=environment, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(arguments: list[str]) -> None:
    process = train(arguments)
    _, said = process.communicate(timeout=600)
    if process.returncode != 0:
        raise AssertionError(f"training failed: {said[-2000:]}")


def unfinished(run: Path) -> bool:
    """Whether a file was being written when its writer died."""
    return any(run.rglob(".*.tmp"))


def rows(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in NOT_COMPARED} for row in found]


def main(rounds: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Counts: rounds, kills before the first checkpoint, kills that left a temporary file (died in a write)."""
    chance = random.Random(seed)
    config, run, whole = folder / "config.json", folder / "killed", folder / "whole"
    content = synthetic_config(dataset__cache_path=str(folder / "cache")).to_dict()
    config.write_text(json.dumps(content))
    counts = {"rounds": rounds, "before the first checkpoint": 0, "in a write": 0}
    epochs = 0
    for turn in range(rounds):
        resumable = (run / "last.pt").exists()
        if not resumable and run.exists():  # killed before its first checkpoint: as a user would, begin again
            counts["before the first checkpoint"] += 1
            subprocess.run(["rm", "-r", str(run)], check=True)
        start = checkpoint.load(run / "last.pt")["training"]["epoch"] if resumable else 0
        epochs = start + EPOCHS_PER_ROUND
        where = ["--resume", str(run)] if resumable else ["--config", str(config), "--run", str(run)]
        dies_in_write = chance.randint(1, 20) if turn % 2 == 1 else None
        process = train([*where, "--set", f"train.max_num_epochs={epochs}"], dies_in_write)
        if dies_in_write is None:
            # Once it trains, which importing takes seconds to come to, it may live for up to half a second.
            before = (run / "last.pt").stat().st_mtime_ns if resumable else 0
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                changed = (run / "last.pt").exists() and (run / "last.pt").stat().st_mtime_ns != before
                if changed or (turn % 10 == 8 and run.exists()):
                    break
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.5))
        else:
            process.wait(timeout=120)
        process.kill()
        _, said = process.communicate()
        if process.returncode not in (-9, 0):
            raise AssertionError(f"round {turn}: {said[-2000:]}")
        counts["in a write"] += unfinished(run)
        for name in ("last.pt", "best.pt"):
            if (run / name).exists():
                checkpoint.load(run / name)
        if (run / "config.json").exists():
            json.loads((run / "config.json").read_text())
        print(f"round {turn + 1}/{rounds}: killed in epoch {start} or later", flush=True)
    final = checkpoint.load(run / "last.pt")["training"]["epoch"] + 3
    finish(["--resume", str(run), "--set", f"train.max_num_epochs={final}"])
    finish(["--config", str(config), "--run", str(whole), "--set", f"train.max_num_epochs={final}"])
    killed, unbroken = (checkpoint.load(path / "last.pt") for path in (run, whole))
    assert killed["num_updates"] == unbroken["num_updates"]
    for name, value in unbroken["model_parameters"].items():
        assert torch.equal(killed["model_parameters"][name], value), f"{name} differs from the unbroken run's"
    assert rows(run) == rows(whole), "metrics differ from the unbroken run's"
    assert not unfinished(run), "left behind: a file half written"
    counts["updates compared"] = killed["num_updates"]
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(main(options.rounds, Path(temporary), options.seed))
