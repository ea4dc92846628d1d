"""A clone's sources that hide an installed copy: said, and refused where figures or tests would be of PyTorch alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnm_kernels import installed as installed_copies

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path.insert(0, "")
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""  # `python -m`, without the modules that an editable install of another tree would lend


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, the benchmarks and the tests' settings as git has them."""
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("*.so", "*_skipped.txt", "__pycache__", "test_*.py")
    for name in ("cnm", "cnm_kernels", "benchmarks", "examples", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """An installed copy with a compiled module, which nobody loads here."""
    (tmp_path / "cnm_kernels").mkdir()
    (tmp_path / "cnm_kernels" / "_C_cpu.abi3.so").touch()
    return tmp_path


def python_m(folder: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m`` in ``folder``, with ``path`` among the installed packages."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_table_names_the_hidden_copy_and_the_remedy(clone: Path, installed: Path) -> None:
    outcome = python_m(clone, installed, "cnm_kernels")
    assert outcome.returncode == 0, outcome.stderr
    (line,) = (line for line in outcome.stdout.splitlines() if line.startswith("native on cpu: "))
    assert f"the sources in {clone / 'cnm_kernels'} have no compiled module _C_cpu" in line
    assert f"the installed copy in {installed / 'cnm_kernels'}" in line
    assert "run from another folder" in line
    assert "pip install -e ." in line


def test_benchmarks_refuse_to_measure_pytorch_as_ours(clone: Path, installed: Path) -> None:
    outcome = python_m(clone, installed, "benchmarks", "--help")
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: the sources in ")
    assert "pip install -e ." in line


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_pytest_refuses_to_test_pytorch_as_ours(clone: Path, installed: Path, folder: str) -> None:
    outcome = python_m(clone, installed, "pytest", "-p", "no:cacheprovider", folder)
    assert outcome.returncode == 2
    (line,) = (outcome.stdout + outcome.stderr).splitlines()
    assert line.startswith("error: the sources in ")
    assert f"the installed copy in {installed / 'cnm_kernels'}" in line


def test_an_installation_without_compiled_modules_is_not_refused(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built with CNM_KERNELS_NATIVE=0, the copy beside the sources has nothing that they lack."""
    (tmp_path / "cnm_kernels").mkdir()
    monkeypatch.setattr(installed_copies, "_HERE", clone / "cnm_kernels")
    monkeypatch.setattr(sys, "path", [str(clone), str(tmp_path)])
    assert installed_copies.hidden_copy() is None
    (tmp_path / "cnm_kernels" / "_C_cpu.abi3.so").touch()
    assert installed_copies.hidden_copy() == tmp_path / "cnm_kernels"


def test_sources_compiled_in_place_are_not_refused(clone: Path, installed: Path) -> None:
    compiled = clone / "cnm_kernels" / "_C_cpu.abi3.so"
    compiled.touch()
    try:
        outcome = python_m(clone, installed, "benchmarks", "--help")
    finally:
        compiled.unlink()
    assert outcome.returncode == 0, outcome.stderr
