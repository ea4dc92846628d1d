"""On a machine that others use too, a caller whose threads get less than one core computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cnm_kernels import native

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
