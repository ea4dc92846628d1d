"""The C++ vector and matrix headers, compiled by the test once per instruction set and checked there against double."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from samples import with_slow

from cnm_kernels import constants

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cpu"
PROGRAMS = ROOT / "tests" / "native"
COMPILER = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BF16 = [*AVX512, "-mavx512bf16"]
EMULATED_AMX = [*BF16, f'-DCNM_AMX_HEADER="{PROGRAMS / "amx_emulated.h"}"']
INSTRUCTION_SETS = {  # name: flags, and what the processor must have
    "portable": ([], []),
    "avx2": (AVX2, ["avx2", "fma", "f16c"]),
    "avx512": (AVX512, ["avx512f", "avx512bw", "avx512dq", "avx512vl"]),
    "avx512bf16": (BF16, ["avx512_bf16"]),
    "amx": (EMULATED_AMX, ["avx512_bf16"]),  # the tile path, on emulated tiles
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def processor_features() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()


def compile_and_run(isa: str, sources: list[Path], folder: Path) -> None:
    flags, needed = INSTRUCTION_SETS[isa]
    missing = sorted(set(needed) - processor_features())
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    program = folder / "check"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-fno-math-errno",
        "-ffp-contract=fast",
        "-w",
        f"-I{KERNELS}",
        f"-I{KERNELS.parent}",
    ]
    command += [f"-DCNM_ISA={isa}", *flags, *map(str, sources), "-o", str(program)]
    subprocess.run([str(part) for part in command], check=True)
    outcome = subprocess.run([program], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_constants_are_those_of_python() -> None:
    found = re.findall(r"^constexpr \w+ (\w+) = ([^;]+?)f?;", (ROOT / "csrc" / "constants.h").read_text("utf-8"), re.M)
    assert found
    assert {name: float(value) for name, value in found} == {name: getattr(constants, name) for name, _ in found}


@pytest.mark.parametrize("isa", list(INSTRUCTION_SETS)[:4])
def test_vectors(isa: str, tmp_path: Path) -> None:
    compile_and_run(isa, [PROGRAMS / "check_simd.cpp"], tmp_path)


@pytest.mark.parametrize("isa", with_slow(INSTRUCTION_SETS, {"avx512bf16", "amx"}))  # long to compile
def test_matrix_products(isa: str, tmp_path: Path) -> None:
    compile_and_run(isa, [PROGRAMS / "check_gemm.cpp", KERNELS / "gemm.cpp"], tmp_path)
