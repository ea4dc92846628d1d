"""Build entry point: what is static is in pyproject.toml; here the C++ CPU module is compiled.

Environment:
    CNM_KERNELS_NATIVE=0   leave the C++ module out: a pure-Python install.
    CNM_KERNELS_NATIVE=1   a failure to compile it fails the install, instead of being reported and left out.
    CXX, CXXFLAGS          compiler and extra flags, as usual.
"""

from __future__ import annotations

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("csrc")
REASON_FILE = "native_skipped.txt"  # beside native.py: why the C++ module is missing, for `python -m cnm_kernels`
MATRIX_KERNELS = {
    "gemm",
    "attention",
    "linear",
    "linear_nll",
}  # these are worth compiling for the bfloat16 instruction sets too
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


class BuildNative(build_ext):
    """Compiles every kernel once per instruction set, and the rest once; leaves the module out where that fails."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        reason_file = module.with_name(REASON_FILE)
        reason_file.unlink(missing_ok=True)
        try:
            self._compile(ext)
        except Exception as error:
            if os.environ.get("CNM_KERNELS_NATIVE") == "1":
                raise
            reason = f"{ext.name} was not built: {error}"
            print(f"\nWARNING: {reason}\ncnm-kernels works without it, on PyTorch's own operations.\n")
            module.unlink(missing_ok=True)
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(reason + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """For editable installs: the module as just built, or the reason, and nothing of an earlier build."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("cnm_kernels"))
        for ext in self.extensions:
            module = Path(self.get_ext_fullpath(ext.name))
            for stale in (package / module.name, package / REASON_FILE):
                stale.unlink(missing_ok=True)
            if module.with_name(REASON_FILE).exists():
                self.copy_file(str(module.with_name(REASON_FILE)), str(package))
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
        ext.extra_objects = self._objects(ext)
        sources, depends = ext.sources, ext.depends
        ext.sources, ext.depends = [], ext.extra_objects  # what is left to do is to link, if an object is new
        try:
            super().build_extension(ext)
        finally:
            ext.sources, ext.depends = sources, depends

    def _objects(self, ext: Extension) -> list[str]:
        jobs: list[tuple[str, str, list[str]]] = []
        kernels = [source for source in ext.sources if is_kernel(Path(source))]
        for source in ext.sources:
            if source not in kernels:
                jobs.append((source, "common", []))
        for name, flags in instruction_sets().items():
            for source in kernels:
                if name not in MATRIX_ONLY or Path(source).stem in MATRIX_KERNELS:
                    jobs.append((source, name, [f"-DCNM_ISA={name}", *flags]))
        newest_header = max(Path(path).stat().st_mtime for path in [*ext.depends, __file__])

        def run(job: tuple[str, str, list[str]]) -> str:
            source, folder, flags = job
            output = Path(self.build_temp, folder)
            target = output / Path(source).with_suffix(".o")
            stale = max(newest_header, Path(source).stat().st_mtime)
            if self.force or not target.exists() or target.stat().st_mtime < stale:
                try:
                    self.compiler.compile(
                        [source],
                        output_dir=str(output),
                        include_dirs=ext.include_dirs,
                        macros=ext.define_macros,
                        extra_postargs=[*FLAGS, *self.torch_headers, *flags],
                    )
                except CompileError as error:
                    raise RuntimeError(
                        f"the compiler failed on {source} for {folder}; `pip install -v .` shows what it said"
                    ) from error
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(run, jobs))


def is_kernel(source: Path) -> bool:
    """Kernel sources are torch-free and put their code into namespace cnm::CNM_ISA."""
    return "namespace cnm::CNM_ISA" in source.read_text(encoding="utf-8")


def instruction_sets() -> dict[str, list[str]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return INSTRUCTION_SETS
    return {"portable": []}


def native() -> dict[str, Any]:
    if os.environ.get("CNM_KERNELS_NATIVE") == "0":
        return {}
    extension = Extension(
        "cnm_kernels._C_cpu",
        sources=sorted(str(path) for path in [*SOURCES.glob("*.cpp"), *(SOURCES / "cpu").glob("*.cpp")]),
        depends=sorted(str(path) for path in [*SOURCES.glob("*.h"), *(SOURCES / "cpu").glob("*.h")]),
        include_dirs=[str(SOURCES), str(SOURCES / "cpu")],
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            ("TORCH_TARGET_VERSION", "0x020B000000000000"),  # torch 2.11
        ],
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
        optional=True,  # so that a module left out is no error
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildNative},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
