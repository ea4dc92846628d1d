"""Builds the compiled kernels; everything static is in pyproject.toml.

CNM_KERNELS_NATIVE=0 installs without them, =1 makes a failed build an error. By default a build that fails says what
failed and leaves a working package, whose ops run on the PyTorch backend.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
NATIVE = os.environ.get("CNM_KERNELS_NATIVE", "")
KERNELS = ["gaussian_mask", "attention", "linear_nll", "dropout", "dropout_add_layer_norm"]
# Each kernel is compiled once per instruction set, into the namespace of that name; the best one is chosen at run time.
AVX512 = "-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512".split()
X86_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = X86_FLAGS if IS_X86 else {"portable": []}
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
    "-Wno-psabi",
]
MACROS = [
    ("Py_LIMITED_API", "0x030A0000"),
    ("TORCH_TARGET_VERSION", "0x020B000000000000"),
    *([("CNM_X86", "1")] if IS_X86 else []),
]


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set, side by side, then links them with the bindings."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if NATIVE == "1":
                raise
            self.extensions: list[Extension] = []
            reason = " ".join(str(error).split())
            print(
                f"\ncnm-kernels: the native CPU kernels were NOT built: {reason}\n"
                f"cnm-kernels: the package works all the same, on PyTorch's operators. To get them, install a C++20 "
                f"compiler (Debian, Ubuntu: apt install g++) and torch >= 2.11, then install again with "
                f"CNM_KERNELS_NATIVE=1, which shows the whole error.\n",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        if not self.force and not newer_group(ext.depends, self.get_ext_fullpath(ext.name)):
            return
        ext.include_dirs = [str(ROOT / "csrc"), *include_paths()]
        ext.library_dirs = library_paths()
        ext.libraries = ["torch", "torch_cpu", "c10"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(self._compile_kernel, [(kernel, isa) for isa in INSTRUCTION_SETS for kernel in KERNELS])
            ext.extra_objects = list(objects)
        super().build_extension(ext)

    def _compile_kernel(self, job: tuple[str, str]) -> str:
        kernel, isa = job
        folder = Path(self.build_temp) / isa
        folder.mkdir(parents=True, exist_ok=True)
        include = [str(ROOT / "csrc"), sysconfig.get_paths()["include"]]
        (built,) = self.compiler.compile(
            [f"csrc/cpu/{kernel}.cpp"],
            output_dir=str(folder),
            macros=[*MACROS, ("CNM_ISA", isa)],
            include_dirs=include,
            extra_postargs=[*COMPILE_FLAGS, *INSTRUCTION_SETS[isa]],
        )
        return str(built)


extension = Extension(
    "cnm_kernels._C_cpu",
    sources=["csrc/ops.cpp", "csrc/cpu/dispatch.cpp"],
    define_macros=MACROS,
    extra_compile_args=COMPILE_FLAGS,
    py_limited_api=True,
    depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()],
    language="c++",
)
if NATIVE == "0":
    setup()
else:
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
