"""Idle threads sleep soon, unless the user has decided otherwise or torch is loaded already."""

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
