"""How precisely a model computes: the choices of ``--precision``.

``bf16`` has activations in bfloat16. ``high`` leaves them in float32 and turns PyTorch's switch for float32 products,
``torch.set_float32_matmul_precision``, to "high" while the model runs: CPUs with AMX multiply sums of two bfloat16
numbers (``cnm_kernels.products``), PyTorch's products on GPUs use TF32, and elsewhere nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cnm.errors import InputError
from cnm.models.base import PRECISIONS
from cnm_kernels import products

HIGH = "high"
NAMES = (*PRECISIONS, HIGH)


def compute_dtype(name: str) -> torch.dtype | None:
    """``Model.compute_dtype`` under this precision."""
    return None if name == HIGH else PRECISIONS[name]


@contextmanager
def products_of(name: str) -> Iterator[None]:
    """Multiplies float32 as this precision asks for; under another than ``high`` as PyTorch's switches stand.

    Raises:
        InputError: ``high``, where ``torch.backends`` tells one backend another precision than the others.
    """
    if name != HIGH:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise InputError(
            "precision high: an fp32_precision of torch.backends is set for one backend alone; leave it as PyTorch has "
            "it, or choose float32"
        ) from None
    torch.set_float32_matmul_precision(HIGH)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def notes(name: str, device: torch.device) -> list[str]:
    """Returns what to tell the user about this precision on ``device``: where it gains nothing, that."""
    if name != HIGH or device.type != "cpu" or products.splits:
        return []
    return ["--precision high gains nothing on this processor, which has no AMX: it computes as with float32"]
