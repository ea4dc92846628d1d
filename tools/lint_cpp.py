"""Checks the C++ and CUDA sources: clang-format on all of them, clang-tidy on those that compile without CUDA.

    python tools/lint_cpp.py [--fix]

Both come with the ``dev`` extra, in the versions that pyproject.toml pins; ``.clang-format`` and ``.clang-tidy`` say
what they hold the sources to. Kernels are checked in their portable form: clang-tidy's package brings no headers of
instruction sets, and takes those of the language from GCC.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def tool(name: str) -> str:
    """The program beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"lint_cpp: {name} is not installed; run `pip install -e '.[dev]'`")
    return found


def format_sources(*, fix: bool) -> bool:
    """Whether every source is formatted; with ``fix`` it is afterwards."""
    files = sorted(str(path) for path in SOURCES.rglob("*") if path.suffix in SUFFIXES)
    mode = ["-i"] if fix else ["--dry-run", "-Werror"]
    return subprocess.run([tool("clang-format"), *mode, *files], cwd=ROOT).returncode == 0


def flags() -> list[str]:
    """The compiler's options for a source of ``csrc``."""
    gcc = subprocess.run(["g++", "-print-file-name=include"], capture_output=True, text=True, check=True).stdout.strip()
    headers = [*include_paths(), gcc, sysconfig.get_path("include")]
    macros = ["CNM_ISA=portable", "Py_LIMITED_API=0x030A0000", "TORCH_TARGET_VERSION=0x020B000000000000"]
    own = ["-std=c++17", f"-I{SOURCES}", f"-I{SOURCES / 'cpu'}"]
    return [*own, *(f"-D{macro}" for macro in macros), *(flag for path in headers for flag in ("-isystem", path))]


def tidy(source: Path, options: list[str]) -> str:
    """Returns the findings of clang-tidy in a source, or an empty text."""
    command = [tool("clang-tidy"), "--quiet", str(source), "--", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="format the sources instead of checking that they are")
    formatted = format_sources(fix=parser.parse_args().fix)
    options = flags()
    sources = sorted([*SOURCES.glob("*.cpp"), *(SOURCES / "cpu").glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        findings = [found for found in pool.map(lambda source: tidy(source, options), sources) if found]
    print("\n".join(findings) or f"clang-tidy: {len(sources)} sources, nothing found")
    return 0 if formatted and not findings else 1


if __name__ == "__main__":
    sys.exit(main())
