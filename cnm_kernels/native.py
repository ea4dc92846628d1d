"""The C++ backend: loads the compiled module and hands each op to it.

The module registers the operators ``cnm_kernels::<op>`` and ``cnm_kernels::<op>_backward`` with PyTorch; the files of
``formulas`` add what only Python can: fake kernels, which tell ``torch.compile`` the shapes, and the autograd formula.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cnm_kernels import formulas
from cnm_kernels.registry import OPS as OPS  # all of them

ISA_VARIABLE = "CNM_KERNELS_CPU_ISA"  # forces a lower instruction set: portable, avx2, avx512, avx512bf16, amx


def _load() -> str | None:
    """Why the compiled module cannot be used, or None."""
    try:
        from cnm_kernels import _C_cpu
    except ImportError as error:
        reason = Path(__file__).parent / "native_skipped.txt"
        if reason.exists():
            return reason.read_text(encoding="utf-8").strip()
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return "this installation has no compiled module (installed with CNM_KERNELS_NATIVE=0, or never built)"
        return f"cnm_kernels._C_cpu does not load: {error}"
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            _C_cpu.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return None


DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOAD_ERROR = _load()

# Where the layer itself is not trained, softmax(z) W of every token is kept for the backward: two products instead of
# three. It takes the memory of a quarter of the float32 logits at most.
EXPECTED_WORD_SHARE = 4


def _keeps_expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return weight.size(0) >= EXPECTED_WORD_SHARE * weight.size(1) and not (weight.requires_grad or bias.requires_grad)


if LOAD_ERROR is None:
    gaussian_mask = formulas.gaussian_mask.bind("cnm_kernels")
    weighted_attention, gaussian_attention = formulas.attention.bind("cnm_kernels")
    branched_attention = formulas.branched_attention.branch_by_branch(weighted_attention)
    linear = formulas.linear.bind("cnm_kernels")
    intra_video_contrastive_loss = formulas.intra_video_contrastive_loss.bind("cnm_kernels")
    linear_nll, contrastive_reconstruction_loss = formulas.linear_nll.bind(
        "cnm_kernels", intra_video_contrastive_loss, _keeps_expected
    )
    dropout = formulas.dropout.bind("cnm_kernels")
    dropout_add_layer_norm = formulas.dropout_add_layer_norm.bind("cnm_kernels")
