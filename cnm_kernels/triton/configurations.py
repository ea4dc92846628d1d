"""Tile sizes, warps and pipeline stages of every kernel, by the bytes of an element and the size class.

``python -m cnm_kernels.triton.autotune`` times other configurations on this GPU and stores the best in the user's cache
folder, from which this module reads them. No kernel is tuned while a model runs.

The table was chosen by registers and shared memory, which ``tests/ops/test_triton_compile.py`` checks (no spills on
sm_80, sm_90 and sm_100 with Triton 3.8 and 3.9, except float32 heads of 128 and hidden states of 512). It has not been
timed on a GPU yet.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 2


@dataclass(frozen=True)
class Configuration:
    """The launch settings of a kernel."""

    rows: int  # rows of a tile: queries or tokens
    columns: int = 0  # columns of a tile: keys or words; 0 if the kernel holds all
    num_warps: int = 4
    num_stages: int = 2


# (kernel, bytes of an element) -> (largest size, configuration), in order of size. The size depends on the kernel: keys
# times head dim in ``attention``, the head dim in ``attention_blocked``, the width of a hidden state in ``linear_nll``.
# The sizes that ``autotune`` times are classes' largest: what fits a GPU at the largest size fits at the others.
TABLE: dict[tuple[str, int], list[tuple[int, Configuration]]] = {
    ("attention", 2): [
        (64 * 64, Configuration(64)),
        (128 * 64, Configuration(64)),
        (256 * 64, Configuration(32, num_stages=1)),
    ],
    ("attention", 4): [(64 * 64, Configuration(16, num_warps=8, num_stages=1))],
    ("attention_backward", 2): [
        (64 * 64, Configuration(16, num_stages=1)),
        (256 * 64, Configuration(16, num_warps=8, num_stages=1)),
    ],
    ("attention_backward", 4): [(64 * 32, Configuration(16, num_warps=8, num_stages=1))],
    ("attention_blocked", 2): [(64, Configuration(64, 64)), (128, Configuration(64, 64))],
    ("attention_blocked", 4): [
        (64, Configuration(16, 32, num_warps=8, num_stages=1)),
        (128, Configuration(16, 32, num_warps=8, num_stages=1)),
    ],
    ("attention_blocked_backward", 2): [
        (64, Configuration(64, 32, num_warps=8, num_stages=1)),
        (128, Configuration(32, 32, num_warps=8, num_stages=1)),
    ],
    ("attention_blocked_backward", 4): [
        (64, Configuration(16, 16, num_warps=8, num_stages=1)),
        (128, Configuration(16, 16, num_warps=8, num_stages=1)),
    ],
    ("linear_nll", 2): [
        (256, Configuration(64, 32, num_warps=8)),
        (512, Configuration(32, 64, num_warps=8)),
    ],
    ("linear_nll", 4): [(256, Configuration(16, 32, num_warps=8, num_stages=1))],
    ("linear_nll_backward", 2): [
        (256, Configuration(32, 64, num_warps=8)),
        (512, Configuration(32, 32, num_warps=8)),
    ],
    ("linear_nll_backward", 4): [(256, Configuration(16, 32, num_warps=8, num_stages=1))],
}


Key = tuple[str, int, int]  # kernel, bytes of an element, largest size of the class
_tuning: ContextVar[bool] = ContextVar("cnm_kernels_tuning", default=False)


def class_of(kernel: str, operand: Tensor, size: int) -> Key:
    """Returns the first class that holds ``size``, or else the last, for elements of the operand's size."""
    classes = TABLE[kernel, operand.element_size()]
    most = next((most for most, _ in classes if size <= most), classes[-1][0])
    return kernel, operand.element_size(), most


def configuration(kernel: str, operand: Tensor, size: int) -> Configuration:
    """Returns the launch settings for such operands: those tuned for this GPU, or else those of the table.

    The last class's count for larger sizes too, but only the table's: tuned ones need not fit the GPU there.
    """
    key = class_of(kernel, operand, size)
    if operand.is_cuda and size <= key[2] and not _tuning.get():
        found = tuned(torch.cuda.get_device_name(operand.device))
        if key in found:
            return found[key]
    return dict(TABLE[key[:2]])[key[2]]


@contextmanager
def tuning() -> Iterator[None]:
    """Within, the table alone counts: ``autotune`` times what it puts there, whatever it found before."""
    token = _tuning.set(True)
    try:
        yield
    finally:
        _tuning.reset(token)


def tuned_path(device_name: str) -> Path:
    """Returns the path of a GPU's tuned configurations."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "cnm-kernels" / f"triton-{'-'.join(device_name.split())}.json"


@cache
def tuned(device_name: str) -> dict[Key, Configuration]:
    """Reads the configurations tuned for this GPU; warns and returns none if the file is not valid."""
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
