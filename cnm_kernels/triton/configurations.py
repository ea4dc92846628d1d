"""Tile sizes, warps and pipeline stages of every kernel, by the width of an element and the size class.

``python -m cnm_kernels.triton.autotune`` times others on the GPU at hand and keeps the best in the user's cache folder,
from where they are read. Nothing is ever tuned while a model runs.

Chosen from the register and shared memory tables that ``tests/ops/test_triton_compile.py`` checks (no spills on sm_80,
sm_90 and sm_100, by Triton 3.8 and 3.9, but for float32 heads of 128), not yet timed on a GPU.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched."""

    rows: int  # of a tile: queries or tokens
    columns: int = 0  # of a tile: keys or words; 0 where the kernel takes all
    num_warps: int = 4
    num_stages: int = 2


# (kernel, bytes of an element) -> (largest size, configuration), sizes rising. The size is that of what a program holds
# whole: the keys times the head dim of ``attention``, the head dim of ``attention_blocked``, the width of a state.
TABLE: dict[tuple[str, int], list[tuple[int, Configuration]]] = {
    ("attention", 2): [
        (128 * 64, Configuration(64)),
        (256 * 64, Configuration(32, num_stages=1)),
    ],
    ("attention", 4): [(64 * 64, Configuration(16, num_warps=8, num_stages=1))],
    ("attention_backward", 2): [
        (64 * 64, Configuration(16, num_stages=1)),
        (256 * 64, Configuration(16, num_warps=8, num_stages=1)),
    ],
    ("attention_backward", 4): [(64 * 32, Configuration(16, num_warps=8, num_stages=1))],
    ("attention_blocked", 2): [(128, Configuration(64, 64))],
    ("attention_blocked", 4): [(128, Configuration(16, 32, num_warps=8, num_stages=1))],
    ("attention_blocked_backward", 2): [
        (64, Configuration(64, 32, num_warps=8, num_stages=1)),
        (128, Configuration(32, 32, num_warps=8, num_stages=1)),
    ],
    ("attention_blocked_backward", 4): [(128, Configuration(16, 16, num_warps=8, num_stages=1))],
    ("linear_nll", 2): [(256, Configuration(64, 32, num_warps=8))],
    ("linear_nll", 4): [(128, Configuration(16, 32, num_warps=8, num_stages=1))],
    ("linear_nll_backward", 2): [
        (256, Configuration(32, 64, num_warps=8)),
        (512, Configuration(32, 32, num_warps=8)),
    ],
    ("linear_nll_backward", 4): [(128, Configuration(16, 32, num_warps=8, num_stages=1))],
}


Key = tuple[str, int, int]  # kernel, bytes of an element, largest size of the class


def class_of(kernel: str, operand: Tensor, size: int) -> Key:
    """The first class that holds ``size``, or the last, for an element as wide as the operand's."""
    classes = TABLE[kernel, operand.element_size()]
    most = next((most for most, _ in classes if size <= most), classes[-1][0])
    return kernel, operand.element_size(), most


def configuration(kernel: str, operand: Tensor, size: int) -> Configuration:
    """How to launch a kernel on operands like this: as tuned for this GPU, or else as the table says."""
    key = class_of(kernel, operand, size)
    if operand.is_cuda and key in (found := tuned(torch.cuda.get_device_name(operand.device))):
        return found[key]
    return dict(TABLE[key[:2]])[key[2]]


def tuned_path(device_name: str) -> Path:
    """Where a GPU's tuned configurations are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "cnm-kernels" / f"triton-{'-'.join(device_name.split())}.json"


@cache
def tuned(device_name: str) -> dict[Key, Configuration]:
    """What was tuned for this GPU; nothing, with a warning, where the file is not one of ours."""
    path = tuned_path(device_name)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return {
            (kernel, int(width), int(most)): Configuration(**found) for kernel, width, most, found in content["table"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path}: no table of configurations ({error}); delete it, or tune again with "
            f"`python -m cnm_kernels.triton.autotune`",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
