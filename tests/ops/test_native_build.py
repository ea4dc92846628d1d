"""The build's switches, and what is left when nothing can be compiled: a working package that says why."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import cnm_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources that a build reads, without an earlier build's output."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "*_skipped.txt", "__pycache__")
    for name in ("cnm", "cnm_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("cnm-kernels\n", encoding="utf-8")
    return copy


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds for CPUs only, unless CNM_KERNELS_CUDA is given: nvcc takes minutes."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"]
    environment = os.environ | {"CNM_KERNELS_CUDA": "0"} | environment
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


RUN = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
runpy.run_module("cnm_kernels", run_name="__main__", alter_sys=True)
"""


def table(checkout: Path) -> str:
    """Output of `python -m cnm_kernels` in the build; an editable install would lend it the modules it lacks."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "built")}
    command = [sys.executable, "-c", RUN]
    outcome = subprocess.run(command, cwd=checkout / "built", env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def compiled(checkout: Path) -> list[Path]:
    return list((checkout / "built").rglob("_C_cpu*" + sysconfig.get_config_var("SHLIB_SUFFIX")))


def test_without_native(checkout: Path) -> None:
    assert build(checkout, CNM_KERNELS_NATIVE="0").returncode == 0
    assert not compiled(checkout)
    # Where the tests' own environment has a compiled copy, the table names that one too.
    (line,) = (line for line in table(checkout).splitlines() if line.startswith("native on cpu: "))
    assert "no compiled module _C_cpu" in line


NOTHING = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""


def test_other_commands_compile_everything_again(checkout: Path) -> None:
    """Other flags, or GPUs to compile for, are not seen in the files' times."""
    compiler = checkout / "compiler"
    compiler.write_text(NOTHING)
    compiler.chmod(0o755)

    def times(flags: str) -> dict[str, int]:
        outcome = build(checkout, CXX=str(compiler), CC=str(compiler), CXXFLAGS=flags)
        assert outcome.returncode == 0, outcome.stderr
        objects = list((checkout / "build").rglob("*.o"))
        assert len(objects) > 20
        return {str(path): path.stat().st_mtime_ns for path in [*objects, *compiled(checkout)]}

    first = times("-DONE")
    assert times("-DONE") == first
    assert all(time > first[name] for name, time in times("-DTWO").items())


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


def test_a_module_left_out_leaves_no_earlier_build_in_the_sources(checkout: Path) -> None:
    package = checkout / "cnm_kernels"
    for name in ("_C_cpu.abi3.so", "_C_cuda.abi3.so"):
        (package / name).touch()
    outcome = build(checkout, CNM_KERNELS_NATIVE="0")
    assert outcome.returncode == 0, outcome.stderr
    assert "cnm_kernels/_C_cpu.abi3.so: removed, _C_cpu is left out of this build" in outcome.stdout
    assert not list(package.glob("*.so"))


def test_a_module_left_out_is_not_packed_from_an_earlier_build(checkout: Path) -> None:
    built = checkout / "built" / "cnm_kernels"
    built.mkdir(parents=True)
    for name in ("_C_cpu.abi3.so", "_C_cuda.abi3.so", "_C_cuda_skipped.txt"):
        (built / name).touch()
    assert build(checkout, CNM_KERNELS_NATIVE="0").returncode == 0
    assert (built / "native.py").exists()
    assert not [*built.glob("*.so"), *built.glob("*_skipped.txt")]


@pytest.mark.parametrize("free_threaded", [False, True])
def test_only_pythons_that_have_the_stable_abi_build_for_it(
    free_threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {}
    known = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: int(free_threaded) if name == "Py_GIL_DISABLED" else known(name)
    )
    monkeypatch.setattr(setuptools, "setup", said.update)
    monkeypatch.delenv("CNM_KERNELS_NATIVE", raising=False)
    monkeypatch.setenv("CNM_KERNELS_CUDA", "1")
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert ("bdist_wheel" in said["options"]) is not free_threaded
    assert len(said["ext_modules"]) == 2
    for module in said["ext_modules"]:
        assert module.py_limited_api is not free_threaded
        assert ("Py_LIMITED_API" in dict(module.define_macros)) is not free_threaded


def test_an_old_setuptools_is_one_line(checkout: Path) -> None:
    code = "import runpy, setuptools, sys; setuptools.__version__ = '76.1.0'; sys.argv = ['setup.py', 'build']; "
    command = [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
    outcome = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: cnm-kernels needs setuptools 77 or newer to build, found 76.1.0; run `pip install")


def test_required_native_fails_loudly(checkout: Path) -> None:
    outcome = build(checkout, CXX="no-such-compiler", CC="no-such-compiler", CNM_KERNELS_NATIVE="1")
    assert outcome.returncode != 0
    assert "no C++ compiler" in outcome.stderr


def test_the_source_distribution_holds_all_that_a_build_reads(checkout: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    environment = os.environ | {"CNM_KERNELS_NATIVE": "0"}  # which modules are built must not decide what is packed
    outcome = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = [path for folder in ("cnm", "cnm_kernels", "csrc") for path in (checkout / folder).rglob("*.*")]
    wanted = [str(path.relative_to(checkout)) for path in wanted if path.is_file() and path.suffix != ".so"]
    assert [name for name in wanted if name not in names] == []


NO_CUDA = re.compile("cnm_kernels._C_cuda was not built: (nvcc is not on the PATH|torch .* is a build without CUDA)")
WITHOUT_NVCC = {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "CXX": "false", "CC": "false"}


@pytest.mark.skipif(shutil.which("nvcc", path="/usr/bin:/bin") is not None, reason="nvcc cannot be hidden here")
def test_without_nvcc(checkout: Path) -> None:
    outcome = build(checkout, CNM_KERNELS_CUDA="", **WITHOUT_NVCC)
    assert outcome.returncode == 0, outcome.stderr
    assert NO_CUDA.search(outcome.stdout)
    assert "_C_cuda_skipped.txt" in [path.name for path in (checkout / "built" / "cnm_kernels").iterdir()]


@pytest.mark.skipif(shutil.which("nvcc", path="/usr/bin:/bin") is not None, reason="nvcc cannot be hidden here")
def test_required_cuda_fails_loudly(checkout: Path) -> None:
    outcome = build(checkout, CNM_KERNELS_CUDA="1", **WITHOUT_NVCC)
    assert outcome.returncode != 0
    assert re.search("nvcc is not on the PATH|is a build without CUDA", outcome.stderr)


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is None, reason="needs nvcc and a CUDA torch")
@pytest.mark.parametrize(
    ("given", "said"),
    [("Hopper", '"Hopper" is none; write them like "8.0;9.0a+PTX"'), ("8.0;77.0", "cannot compile for 77.0")],
)
def test_an_unknown_architecture_is_named(checkout: Path, given: str, said: str) -> None:
    outcome = build(checkout, CNM_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=given, CXX="false", CC="false")
    assert outcome.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: " in outcome.stderr
    assert said in outcome.stderr


@pytest.mark.skipif(importlib.util.find_spec("cnm_kernels._C_cuda") is None, reason="the CUDA module is not built here")
def test_the_cuda_module_links_and_imports() -> None:
    """Without a GPU too; what is asked of it on CPU tensors takes the CPU's kernels."""
    importlib.import_module("cnm_kernels._C_cuda")
    for op in ("attention", "branched_attention", "linear_nll", "dropout", "gaussian_mask"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnm_kernels::{op}", "CUDA")
    query = torch.randn(2, 4, 5, 16)
    with cnm_kernels.use_backend("native"):
        out = cnm_kernels.weighted_attention(query, query, query)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, query, query))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("7.5 8.0 8.6 9.0+PTX", ["80,code=sm_80", "86,code=sm_86", "90a,code=sm_90a", "90,code=compute_90"]),
        ("9.0", ["90a,code=sm_90a"]),
        ("8.0;9.0a+PTX", ["80,code=sm_80", "90a,code=sm_90a", "90a,code=compute_90a"]),
        ("", ["80,code=sm_80", "86,code=sm_86", "90a,code=sm_90a"]),  # the default's that this nvcc knows
        ("7.0;7.5", "no GPU of 8.0 or later"),
        ("8.0 12.0", "cannot compile for 12.0"),
        ("Ampere", '"Ampere" is none'),
    ],
)
def test_gpus_to_compile_for(
    given: str, wanted: list[str] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf '%s\\n' sm_75 sm_80 sm_86 sm_90\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.chdir(ROOT)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["architectures"]
    if isinstance(wanted, str):
        with pytest.raises(RuntimeError, match=re.escape(wanted)):
            architectures(str(nvcc))
    else:
        assert architectures(str(nvcc)) == [f"arch=compute_{code}" for code in wanted]
