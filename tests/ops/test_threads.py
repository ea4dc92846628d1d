"""Idle threads sleep soon, unless the user has decided otherwise or torch is loaded already; busy ones round as their
caller does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

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


@pytest.mark.parametrize("flush", [False, True])
def test_threads_flush_what_their_caller_flushes(flush: bool) -> None:
    """torch.set_flush_denormal is of one thread: those of the pool that were there before know nothing of it."""
    code = f"""if True:
    import torch, cnm_kernels
    torch.set_num_threads(2)
    x, weight = torch.full((4096, 64), 1e-30), torch.full((64, 64), 1e-11)
    with cnm_kernels.use_backend("native"):
        cnm_kernels.linear(x, weight)
        torch.set_flush_denormal({flush})
        out = cnm_kernels.linear(x, weight)
        weight.neg_()  # and again, by whichever threads
        again = cnm_kernels.linear(x, weight)
    assert (out == 0).all() if {flush} else (out > 0).all(), out.count_nonzero()
    assert torch.equal(again, -out)
    """
    spins(code)
