"""Build entry point: what is static is in pyproject.toml; here the C++ modules are compiled, for CPUs and for GPUs.

Environment:
    CNM_KERNELS_NATIVE=0   leave the C++ modules out: a pure-Python install.
    CNM_KERNELS_NATIVE=1   a failure to compile for CPUs fails the install, instead of being reported and left out.
    CNM_KERNELS_CUDA=0|1   the same for GPUs, which takes nvcc and a CUDA build of torch.
    TORCH_CUDA_ARCH_LIST   the GPUs to compile for, as torch has it: "8.0;9.0a+PTX"; by default all that nvcc knows of
                           8.0, 8.6, 9.0a, 10.0, and PTX for what comes after.
    CUDA_HOME              where CUDA is, if nvcc is not on the PATH.
    CXX, CXXFLAGS          compiler and extra flags, as usual.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, errors, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OLDEST_SETUPTOOLS = 77  # the first that reads license = "Apache-2.0" in pyproject.toml
SOURCES = Path("csrc")
REASON_FILE = "{}_skipped.txt"  # beside native.py: why a C++ module is missing, for `python -m cnm_kernels`
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",  # no global -ffast-math: the order of sums and the handling of NaN are promised
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 reports its own AVX-512 headers
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS: dict[str, list[str]] = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}  # in the order of csrc/cpu/isa.h
MATRIX_ONLY = ("avx512bf16", "amx")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
OLDEST_MAJOR = 8
ARCHITECTURES = ("8.0", "8.6", "9.0a", "10.0+PTX")


class BuildPython(build_py):
    """Removes an earlier build's modules that are left out of this one: from the source tree, where Python would go on
    loading them, and from the folder that becomes the wheel."""

    def run(self) -> None:
        super().run()
        for package in (Path("cnm_kernels"), Path(self.build_lib, "cnm_kernels")):
            for name in left_out():
                for stale in [*package.glob(f"{name}.*so"), *package.glob(REASON_FILE.format(name))]:
                    print(f"{stale}: removed, {name} is left out of this build")
                    stale.unlink()


class BuildNative(build_ext):
    """Compiles the modules; leaves one out where that fails, and says why."""

    nvcc: tuple[str, ...] | list[str] = ()
    nvcc_version = ""
    force: bool | None

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        name = ext.name.rpartition(".")[2]
        reason_file = module.with_name(REASON_FILE.format(name))
        reason_file.unlink(missing_ok=True)
        try:
            self._compile(ext)
        except Exception as error:
            if os.environ.get(SWITCHES[name]) == "1":
                raise
            reason = f"{ext.name} was not built: {error}"
            print(f"\nWARNING: {reason}\ncnm-kernels works without it, on {WITHOUT[name]}.\n")
            module.unlink(missing_ok=True)
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(reason + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Copies, for editable installs, the modules just built, or the reasons; removes those of an earlier build."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("cnm_kernels"))
        for ext in self.extensions:
            module = Path(self.build_lib, self.get_ext_filename(ext.name))  # where it was built
            reason_file = module.with_name(REASON_FILE.format(ext.name.rpartition(".")[2]))
            for stale in (package / module.name, package / reason_file.name):
                stale.unlink(missing_ok=True)
            if reason_file.exists():
                self.copy_file(str(reason_file), str(package))
        super().copy_extensions_to_source()

    def _compile(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise RuntimeError(
                "torch is not installed where the build runs; use plain `pip install .`, "
                "or install torch first and add --no-build-isolation"
            ) from error
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"the kernels need GCC or Clang, found a compiler of type {self.compiler.compiler_type}")
        compiler = self.compiler.compiler_so_cxx[0] if hasattr(self.compiler, "compiler_so_cxx") else "c++"
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler: {compiler} is not on the PATH (CXX names another)")
        self.torch_headers = [flag for path in include_paths() for flag in ("-isystem", path)]
        ext.library_dirs += library_paths()
        # Objects without special instructions come first: the linker keeps the first copy of an inline function.
        sources, depends, forced = ext.sources, ext.depends, self.force
        try:
            ext.extra_objects = self._gpu_objects(ext) if ext.name.endswith("_C_cuda") else self._cpu_objects(ext)
            ext.sources, ext.depends = [], ext.extra_objects  # what is left to do is to link, if an object is new
            super().build_extension(ext)
        finally:
            ext.sources, ext.depends, self.force = sources, depends, forced
        self._stamp(ext).write_text(self.commands, encoding="utf-8")

    def _stamp(self, ext: Extension) -> Path:
        """The file beside the objects that holds the commands they were built by."""
        return Path(self.build_temp, f"{ext.name}.commands")

    def _cpu_objects(self, ext: Extension) -> list[str]:
        """Every kernel once per instruction set, and the rest once."""
        jobs: list[tuple[str, str, list[str]]] = []
        kernels = [source for source in ext.sources if is_kernel(Path(source))]
        for source in ext.sources:
            if source not in kernels:
                jobs.append((source, "common", []))
        for name, flags in instruction_sets().items():
            for source in kernels:
                if name not in MATRIX_ONLY or is_matrix_kernel(Path(source)):
                    jobs.append((source, name, [f"-DCNM_ISA={name}", *flags]))
        return self._objects(ext, jobs)

    def _gpu_objects(self, ext: Extension) -> list[str]:
        """Every kernel once for all architectures by nvcc, and the rest by the C++ compiler."""
        home, nvcc = cuda_toolkit()
        ext.library_dirs.append(str(home / "lib64"))
        self.torch_headers += ["-isystem", str(home / "include")]
        self.nvcc = [nvcc, *NVCC_FLAGS, *(f"-gencode={code}" for code in architectures(nvcc))]
        self.nvcc_version = version_of(nvcc)
        return self._objects(ext, [(source, "cuda", []) for source in ext.sources])

    def _objects(self, ext: Extension, jobs: list[tuple[str, str, list[str]]]) -> list[str]:
        """Compiles the sources that changed, side by side. Jobs are (source, folder, flags).

        All of them, where the last build ran other commands, other GPUs' among them, or with another torch or nvcc.
        """
        import torch

        programs = [getattr(self.compiler, name) for name in self.compiler.executables]
        commands = (torch.__version__, programs, FLAGS, jobs, self.nvcc, self.nvcc_version)
        self.commands = "\n".join(map(repr, commands))
        stamp = self._stamp(ext)
        fresh = not self.force and stamp.exists() and stamp.read_text(encoding="utf-8") == self.commands
        stamp.unlink(missing_ok=True)
        self.force = not fresh
        newest_header = max(Path(path).stat().st_mtime for path in [*ext.depends, __file__])

        def run(job: tuple[str, str, list[str]]) -> str:
            source, folder, flags = job
            output = Path(self.build_temp, folder)
            target = output / Path(source).with_suffix(".o")
            stale = max(newest_header, Path(source).stat().st_mtime)
            if not self.force and target.exists() and target.stat().st_mtime >= stale:
                return str(target)
            try:
                if source.endswith(".cu"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    macros = [f"-D{name}={value}" for name, value in ext.define_macros]
                    headers = [f"-I{path}" for path in ext.include_dirs]
                    subprocess.run([*self.nvcc, *macros, *headers, "-c", source, "-o", str(target)], check=True)
                else:
                    self.compiler.compile(
                        [source],
                        output_dir=str(output),
                        include_dirs=ext.include_dirs,
                        macros=ext.define_macros,
                        extra_postargs=[*FLAGS, *self.torch_headers, *flags],
                    )
            except (errors.CompileError, subprocess.CalledProcessError) as error:
                target.unlink(missing_ok=True)
                raise RuntimeError(
                    f"the compiler failed on {source} for {folder}; `pip install -v .` shows what it said"
                ) from error
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(run, jobs))


def cuda_toolkit() -> tuple[Path, str]:
    """Returns CUDA's folder and its compiler, if torch can use its output."""
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is a build without CUDA")
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(given, "bin")) if given else None) or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the PATH (CUDA_HOME names where CUDA is)")
    release = re.search(r"release (\d+)\.(\d+)", version_of(nvcc))
    if release is None:
        raise RuntimeError(f"{nvcc} --version names no release")
    if release.group(1) != torch.version.cuda.partition(".")[0]:
        raise RuntimeError(
            f"nvcc is of CUDA {'.'.join(release.groups())}, but torch {torch.__version__} is of {torch.version.cuda}: "
            f"install nvcc {torch.version.cuda}, or a torch for the CUDA here"
        )
    home = Path(given) if given else Path(os.path.realpath(nvcc)).parents[1]
    for candidate in (home, Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{'.'.join(release.groups())}")):
        if (candidate / "include" / "cuda_runtime.h").exists():
            return candidate, nvcc
    raise RuntimeError(f"{home} has no include/cuda_runtime.h (CUDA_HOME names where CUDA is)")


def version_of(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def architectures(nvcc: str) -> list[str]:
    """Arguments of -gencode. Older GPUs in a list, as containers set it for all that they build, are left out."""
    given = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    codes: list[str] = []
    for item in [item for item in given if item] or ARCHITECTURES:
        form = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if form is None:
            raise RuntimeError(f'TORCH_CUDA_ARCH_LIST: "{item}" is none; write them like "8.0;9.0a+PTX"')
        major, minor, variant, ptx = form.groups()
        if int(major) < OLDEST_MAJOR:
            print(f"TORCH_CUDA_ARCH_LIST: {item} is left out, the kernels are for GPUs of {OLDEST_MAJOR}.0 and later")
            continue
        if f"sm_{major}{minor}" not in known:
            if any(given):
                raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {nvcc} cannot compile for {item}")
            continue
        number = major + minor + variant
        binary = "90a" if number == "90" else number  # the same GPUs, wgmma among their instructions
        codes.append(f"arch=compute_{binary},code=sm_{binary}")
        if ptx:
            codes.append(f"arch=compute_{number},code=compute_{number}")
    if not codes:
        raise RuntimeError(f'TORCH_CUDA_ARCH_LIST: no GPU of {OLDEST_MAJOR}.0 or later; unset it, or add "8.0"')
    return codes


def is_kernel(source: Path) -> bool:
    """Kernel sources are torch-free and put their code into namespace cnm::CNM_ISA."""
    return "namespace cnm::CNM_ISA" in source.read_text(encoding="utf-8")


def is_matrix_kernel(source: Path) -> bool:
    """Kernels that multiply matrices are worth compiling for the bfloat16 instruction sets too."""
    return '#include "gemm.h"' in source.read_text(encoding="utf-8")


def instruction_sets() -> dict[str, list[str]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return INSTRUCTION_SETS
    return {"portable": []}


FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # such Pythons have no stable ABI
SWITCHES = {"_C_cpu": "CNM_KERNELS_NATIVE", "_C_cuda": "CNM_KERNELS_CUDA"}
WITHOUT = {"_C_cpu": "PyTorch's own operations", "_C_cuda": "Triton or PyTorch's own operations on GPUs"}


def extension(name: str, sources: list[Path], folder: str, libraries: list[str], macros: list[str]) -> Extension:
    headers = [path for where in (SOURCES, SOURCES / folder) for path in where.glob("*.*h")]
    return Extension(
        f"cnm_kernels.{name}",
        sources=sorted(map(str, sources)),
        depends=sorted(map(str, headers)),
        include_dirs=[str(SOURCES), str(SOURCES / folder)],
        define_macros=[
            *([] if FREE_THREADED else [("Py_LIMITED_API", "0x030A0000")]),
            ("TORCH_TARGET_VERSION", "0x020B000000000000"),  # torch 2.11
            *((macro, "1") for macro in macros),
        ],
        libraries=libraries,
        language="c++",
        py_limited_api=not FREE_THREADED,
        optional=True,  # so that a module left out is no error
    )


def left_out() -> list[str]:
    """The modules that the environment asks to leave out; that for GPUs needs that for CPUs."""
    names = list(SWITCHES)
    if os.environ.get(SWITCHES["_C_cpu"]) == "0":
        return names
    return [name for name in names if os.environ.get(SWITCHES[name]) == "0"]


def native() -> dict[str, Any]:
    without = left_out()
    commands: dict[str, Any] = {"build_py": BuildPython}
    if "_C_cpu" in without:
        return {"cmdclass": commands}
    cpu, cuda = SOURCES / "cpu", SOURCES / "cuda"
    modules = [extension("_C_cpu", [*SOURCES.glob("*.cpp"), *cpu.glob("*.cpp")], "cpu", ["torch_cpu"], [])]
    if "_C_cuda" not in without:
        sources = [*SOURCES.glob("*_op.cpp"), *cuda.glob("*.cpp"), *cuda.glob("*.cu")]
        modules.append(
            extension("_C_cuda", sources, "cuda", ["torch_cuda", "torch_cpu", "cudart"], ["CNM_CUDA", "USE_CUDA"])
        )
    return {
        "ext_modules": modules,
        "cmdclass": commands | {"build_ext": BuildNative},
        "options": {} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def check_setuptools() -> None:
    """An older one answers pyproject.toml with a page of validation; --no-build-isolation takes whichever is there."""
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"error: cnm-kernels needs setuptools {OLDEST_SETUPTOOLS} or newer to build, found "
            f"{setuptools.__version__}; run `pip install -U setuptools`, or leave --no-build-isolation out"
        )


check_setuptools()
setup(**native())
