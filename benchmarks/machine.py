"""On what a benchmark ran: everything a reader needs to judge or repeat its figures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from cnm_kernels import registry

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
MALLOC_VARIABLES = re.compile(r"MALLOC_|GLIBC_TUNABLES|LD_PRELOAD|JE_MALLOC|_RJEM_|OMP_|MKL_|KMP_|GOMP_|TORCHINDUCTOR_")


def describe(threads: int, freed_memory_kept: bool) -> dict[str, Any]:
    """Plain values for the head of the result file."""
    cpu = _cpuinfo()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model_stepping": "/".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "threads": threads,
        "load_average": _load(),
        "shared_by_session": _autogroups(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": _line(torch.__config__.show(), r"BLAS_INFO=([^,\s]+)"),
        "onednn": _line(torch.__config__.show(), r"oneDNN[^\n]*?(v[\d.]+)|MKL-DNN[^\n]*?(v[\d.]+)"),
        "malloc": "keeps freed memory" if freed_memory_kept else "as it comes",
        "environment": {key: value for key, value in sorted(os.environ.items()) if MALLOC_VARIABLES.match(key)},
        "backends": {op: registry.choice(op, "cpu", torch.float32) for op in registry.OPS},
        "commit": _commit(),
    }


def is_busy(machine: dict[str, Any]) -> bool:
    """Whether other processes took a good part of the machine when the run began."""
    load = machine["load_average"]
    return load is not None and load > 0.25 * machine["cores"]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _autogroups() -> bool | None:
    """Whether Linux shares the cores among sessions (log-ins, containers) first, and then among a session's threads."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _line(text: str, pattern: str) -> str | None:
    found = re.search(pattern, text)
    return next((group for group in found.groups() if group), None) if found else None


def _commit() -> str | None:
    """Commit of this checkout, with a ``+`` where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
