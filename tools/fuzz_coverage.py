"""The readers and calls of ``fuzz.py`` under libFuzzer, by atheris: what reaches new code is kept and damaged further.

    python tools/fuzz_coverage.py --cases 100000

Coverage is that of ``cnm``, ``cnm_kernels`` and what they read files with in Python. Each kind runs in a process of its
own; what counts as a finding is said in ``fuzz.py``. A finding's input is left in the folder of ``--keep``, its
traceback is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SEEDS = 40  # inputs of each kind to begin with: the undamaged file, or random bytes for a call
OP_BYTES = 256
LONGEST = 1 << 14  # bytes of an input; the longest undamaged file has half
PROGRESS = re.compile(r"#(\d+)\s+(INITED|DONE)\s+cov: (\d+) .*corp: (\d+)")
INSTRUMENTED = ["cnm", "cnm_kernels", "zipfile", "json", "pickletools", "tarfile"]


@dataclass(frozen=True)
class Outcome:
    """Results of one kind: cases run, branches seen by the first inputs and by all, inputs kept, and the finding."""

    cases: int
    covered_first: int
    covered: int
    kept: int
    finding: str | None


class Draws(random.Random):
    """Random choices that are read off an input's bytes, so that a changed byte is another choice; zeros at its end."""

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self.content, self.at = content, 0

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        taken = self.content[self.at : self.at + size].ljust(size, b"\0")
        self.at += size
        return int.from_bytes(taken, "little") & ((1 << k) - 1)


def fuzz_kind(kind: str, folder: Path, options: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz

    import torch

    torch.set_num_threads(1)

    def one_input(content: bytes) -> None:
        try:
            one_case(content)
        except BaseException:
            # libFuzzer writes the input after Python has ended, and so after Python took its handler of atheris's alarm
            # down: an alarm in between kills the process.
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise

    def one_case(content: bytes) -> None:
        if kind == fuzz.OP:
            fuzz.fuzz_op(Draws(content))
        elif kind in fuzz.TYPED:
            fuzz.read_file(kind, fuzz.TYPED[kind][0](Draws(content)), folder)
        else:
            fuzz.read_file(kind, content, folder)
        if left := fuzz.left_behind(folder):
            raise RuntimeError(f"left {left} behind")

    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def run(kind: str, cases: int, keep: Path, setup: str = "") -> Outcome:
    """``setup`` is Python to run beforehand in the process that fuzzes."""
    import fuzz

    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place, "cases"), Path(place, "corpus")
        folder.mkdir()
        corpus.mkdir()
        draw = random.Random(0)
        for seed in range(SEEDS):
            if kind == fuzz.OP or kind in fuzz.TYPED:
                content = draw.randbytes(OP_BYTES)
            else:
                content = fuzz.READERS[kind][0]()
                content = fuzz.damaged(content, draw) if seed else content
            (corpus / str(seed)).write_bytes(content)
        options = [
            str(corpus),
            f"-runs={cases}",
            f"-max_len={LONGEST}",
            "-len_control=0",
            f"-timeout={fuzz.CASE_SECONDS}",
            f"-rss_limit_mb={fuzz.MEMORY_BYTES >> 20}",
            "-seed=1",
            f"-artifact_prefix={keep}/{kind}-",
        ]
        start = f"import fuzz_coverage, pathlib\n{setup}\n"
        start += f"fuzz_coverage.fuzz_kind({kind!r}, pathlib.Path({str(folder)!r}), {options!r})"
        # A working directory of its own: what a reader leaves there is seen.
        done = subprocess.run(
            [sys.executable, "-c", start],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    seen = {state: (int(count), int(cov), int(corp)) for count, state, cov, corp in PROGRESS.findall(done.stdout)}
    first, last = seen.get("INITED", (0, 0, 0)), seen.get("DONE", (0, 0, 0))
    failed = done.returncode != 0 or "DONE" not in seen
    return Outcome(last[0], first[1], last[1], last[2], done.stdout[-3000:] if failed else None)


def main() -> int:
    import fuzz

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of each kind; default: %(default)s")
    parser.add_argument("--kind", action="append", choices=fuzz.KINDS, help="default: all")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="default: %(default)s")
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        parser.error("needs atheris, which has wheels for Linux on x86_64: pip install atheris")
    arguments.keep.mkdir(parents=True, exist_ok=True)
    findings = 0
    print(f"{'kind':<22}{'cases':>9}{'branches':>18}{'kept':>7}{'seconds':>9}")
    for kind in arguments.kind or fuzz.KINDS:
        begun = time.monotonic()
        got = run(kind, arguments.cases, arguments.keep.resolve())
        branches = f"{got.covered_first} -> {got.covered}"
        print(f"{kind:<22}{got.cases:>9}{branches:>18}{got.kept:>7}{time.monotonic() - begun:>9.0f}", flush=True)
        if got.finding is not None:
            findings += 1
            print(got.finding)
    with contextlib.suppress(OSError):  # it holds a finding, or another run has removed it
        arguments.keep.rmdir()
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
