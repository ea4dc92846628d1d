"""Compiles the kernels of csrc/cuda as C++ against the emulator, once per content of all that goes into them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = Path(os.environ.get("CNM_EMULATION_CSRC", HERE.parents[1] / "csrc"))
COMPILER = os.environ.get("CXX") or next((name for name in ("g++", "clang++") if shutil.which(name)), None)
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fPIC",
    "-DCNM_CUDA",
    "-DCNM_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020B000000000000",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # whose longjmp refuses to leave a fiber
]


def cache_folder() -> Path:
    folder = os.environ.get("CNM_EMULATION_CACHE")
    return Path(folder) if folder else Path(tempfile.gettempdir()) / f"cnm_kernels_emulation_{os.getuid()}"


def compile_object(source: Path, target: Path) -> None:
    """One source; a ``.cu`` as C++."""
    headers = [f"-I{path}" for path in (CSRC, CSRC / "cuda", HERE)]
    torch_headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [str(COMPILER), *FLAGS, *headers, *torch_headers, "-x", "c++", "-c", str(source), "-o"]
    outcome = subprocess.run([*command, str(target)], capture_output=True, text=True)
    if outcome.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile against the emulator:\n{outcome.stderr[-4000:]}")


def run_program(folder: Path, content: str, told: str = "") -> list[list[str]]:
    """Words of the lines that a C++ program on the emulator prints, compiled in this folder and told this."""
    source, program = folder / "program.cpp", folder / "program"
    source.write_text(content, encoding="utf-8")
    flags = [flag for flag in FLAGS if flag != "-fPIC"]
    headers = [f"-I{path}" for path in (CSRC, CSRC / "cuda", HERE)]
    subprocess.run([str(COMPILER), *flags, *headers, str(source), "-o", str(program)], check=True)
    outcome = subprocess.run([str(program)], input=told, capture_output=True, text=True, check=True)
    return [line.split() for line in outcome.stdout.splitlines()]


def with_headers(source: Path) -> list[Path]:
    """The source and what it includes of ours, whoever includes it."""
    found, left = [source], [source]
    while left:
        names = re.findall(r'^#include "([^"]+)"', left.pop().read_text(encoding="utf-8"), re.MULTILINE)
        for path in (folder / name for name in names for folder in (CSRC, CSRC / "cuda", HERE)):
            if path.exists() and path not in found:
                found.append(path)
                left.append(path)
    return [source, *sorted(found[1:], key=lambda path: path.name)]


def build() -> Path:
    """The library that registers ``cnm_kernels_emulated::<op>``."""
    sources = sorted(
        [*CSRC.glob("*.cpp"), *(CSRC / "cuda").glob("*_op.cpp"), *(CSRC / "cuda").glob("*.cu"), HERE / "runtime.cpp"]
    )
    common = hashlib.sha256(repr((FLAGS, torch.__version__, sys.version)).encode())
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)

    def key(*parts: bytes) -> str:
        digest = common.copy()
        for part in parts:
            digest.update(part)
        return digest.hexdigest()[:24]

    def made(path: Path, make: Callable[[Path], None]) -> Path:
        """The file, made elsewhere first: several test runs may want it at once."""
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                unfinished = Path(temporary) / path.name
                make(unfinished)
                unfinished.replace(path)
        return path

    def object_of(source: Path) -> Path:
        path = folder / f"{source.stem}-{key(*(path.read_bytes() for path in with_headers(source)))}.o"
        return made(path, lambda target: compile_object(source, target))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, sources))
    library = folder / f"cnm_kernels_emulated-{key(*(str(path).encode() for path in objects))}.so"
    return made(library, lambda target: link(objects, target))


def link(objects: Sequence[Path], target: Path) -> None:
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = [str(COMPILER), "-shared", *map(str, objects), *libraries, "-ltorch_cpu", "-o", str(target)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not link:\n{outcome.stderr[-4000:]}")
