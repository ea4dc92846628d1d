"""The build's switches, and what is left when nothing can be compiled: a working package that says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, without what an earlier one left."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "*_skipped.txt", "__pycache__")
    for name in ("cnm", "cnm_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("cnm-kernels\n", encoding="utf-8")
    return copy


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"]
    return subprocess.run(command, cwd=checkout, env=os.environ | environment, capture_output=True, text=True)


def table(checkout: Path) -> str:
    """What `python -m cnm_kernels` prints in the build."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "built")}
    command = [sys.executable, "-m", "cnm_kernels"]
    outcome = subprocess.run(command, cwd=checkout / "built", env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def compiled(checkout: Path) -> list[Path]:
    return list((checkout / "built").rglob("_C_cpu*" + sysconfig.get_config_var("SHLIB_SUFFIX")))


def test_without_native(checkout: Path) -> None:
    assert build(checkout, CNM_KERNELS_NATIVE="0").returncode == 0
    assert not compiled(checkout)
    assert "native on cpu: this installation has no compiled module (installed with CNM_KERNELS_NATIVE=0" in table(
        checkout
    )


def test_without_a_compiler(checkout: Path) -> None:
    outcome = build(checkout, CXX="no-such-compiler", CC="no-such-compiler")
    assert outcome.returncode == 0, outcome.stderr
    reason = "cnm_kernels._C_cpu was not built: no C++ compiler: no-such-compiler is not on the PATH"
    assert f"WARNING: {reason}" in outcome.stdout
    assert not compiled(checkout)
    assert f"native on cpu: {reason}" in table(checkout)


def test_with_a_compiler_that_fails(checkout: Path) -> None:
    outcome = build(checkout, CXX="false", CC="false")
    assert outcome.returncode == 0, outcome.stderr
    assert "the compiler failed on csrc" in table(checkout)


def test_required_native_fails_loudly(checkout: Path) -> None:
    outcome = build(checkout, CXX="no-such-compiler", CC="no-such-compiler", CNM_KERNELS_NATIVE="1")
    assert outcome.returncode != 0
    assert "no C++ compiler" in outcome.stderr
