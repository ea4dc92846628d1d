"""Idle threads sleep soon, unless the user has decided otherwise or torch is loaded already."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cnm_kernels import native
from cnm_kernels.threads import POLICY_VARIABLE, SPIN_COUNT, SPIN_VARIABLE


def spins(code: str, **variables: str) -> str:
    """Returns the spin count that GNU OpenMP reports in a process that runs ``code``."""
    environment = {key: value for key, value in os.environ.items() if key not in (SPIN_VARIABLE, POLICY_VARIABLE)}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    outcome = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    said = [line for line in outcome.stderr.splitlines() if SPIN_VARIABLE in line]
    if not said:
        pytest.skip("this torch's OpenMP is not GNU's")
    return said[0].partition("=")[2].strip().strip("'\"")


@pytest.mark.parametrize("package", ["cnm_kernels", "cnm"])
def test_idle_threads_sleep_soon(package: str) -> None:
    assert spins(f"import {package}") == str(SPIN_COUNT)


def test_what_the_user_sets_stays() -> None:
    assert spins("import cnm_kernels", **{SPIN_VARIABLE: "77"}) == "77"
    assert spins("import cnm_kernels", **{POLICY_VARIABLE: "ACTIVE"}) != str(SPIN_COUNT)


def test_the_process_that_loaded_torch_first_is_left_as_it_is() -> None:
    code = f"import os, torch, cnm_kernels; assert '{SPIN_VARIABLE}' not in os.environ"
    assert spins(code) != str(SPIN_COUNT)


BUSY = "while True: pass"
BESIDE = """
import os, threading, time
from pathlib import Path
os.sched_setaffinity(0, CORES)
import torch, cnm_kernels

torch.set_num_threads(2)
x = torch.randn(1 << 20)
caller, expected = threading.get_native_id(), cnm_kernels.dropout(x, 0.5, seed=1)

def ran():
    tasks = Path("/proc/self/task").iterdir()
    times = {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}
    return times.pop(caller), sum(times.values())

for _ in range(200):
    before, end = ran(), time.monotonic() + 0.05
    while time.monotonic() < end:
        got = cnm_kernels.dropout(x, 0.5, seed=1)
    assert bytes(got.numpy()) == bytes(expected.numpy())
    own, others = (after - earlier for after, earlier in zip(ran(), before))
    if others * 10 < own:
        print("alone")
        break
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/thread-self/schedstat").exists(), reason="the system does not say how long threads wait"
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
@pytest.mark.skipif("cpu" in native.LOAD_ERRORS, reason="the C++ module is not built")
def test_beside_busy_processes_the_caller_computes_alone() -> None:
    """Where other processes hold both cores two threads get less than one core's worth; the result is the same."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    busy = []
    try:
        for core in cores * 2:
            busy.append(subprocess.Popen([sys.executable, "-c", BUSY]))
            os.sched_setaffinity(busy[-1].pid, {core})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        outcome = subprocess.run(
            [sys.executable, "-c", BESIDE.replace("CORES", str(cores))],
            env=environment,
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert outcome.stdout == "alone\n", outcome.stderr
