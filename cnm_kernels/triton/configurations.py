"""Tile sizes, warps and pipeline stages of every kernel, by the width of an element and the size class.

Chosen from the register and shared memory tables that ``tests/test_triton_compile.py`` checks (no spills on sm_80,
sm_90 and sm_100), not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    ("attention", 4): [(64 * 64, Configuration(32, num_warps=8, num_stages=1))],
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
    ("attention_blocked_backward", 4): [
        (64, Configuration(16, 32, num_warps=8, num_stages=1)),
        (128, Configuration(16, 16, num_warps=8, num_stages=1)),
    ],
    ("linear_nll", 2): [(256, Configuration(64, 32, num_warps=8))],
    ("linear_nll", 4): [(128, Configuration(16, 32, num_warps=8, num_stages=1))],
    ("linear_nll_backward", 2): [
        (256, Configuration(32, 64, num_warps=8)),
        (512, Configuration(32, 32, num_warps=8)),
    ],
    ("linear_nll_backward", 4): [(128, Configuration(16, 32, num_warps=8, num_stages=1))],
}


def configuration(kernel: str, operand: Tensor, size: int) -> Configuration:
    """The entry for an element as wide as the operand's and the first class that holds ``size``, or the last."""
    classes = TABLE[kernel, operand.element_size()]
    return next((chosen for most, chosen in classes if size <= most), classes[-1][1])
