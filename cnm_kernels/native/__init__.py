"""The C++ backend: loads the compiled module and hands each op to it.

The module registers the operators ``cnm_kernels::<op>`` and ``cnm_kernels::<op>_backward`` with PyTorch; the files of
this package add what only Python can: fake kernels, which tell ``torch.compile`` the shapes, and the autograd formula.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cnm_kernels.registry import OPS as OPS  # all of them

ISA_VARIABLE = "CNM_KERNELS_CPU_ISA"  # forces a lower instruction set: portable, avx2, avx512, avx512bf16, amx


def _load() -> str | None:
    """Why the compiled module cannot be used, or None."""
    try:
        from cnm_kernels import _C_cpu
    except ImportError as error:
        reason = Path(__file__).parents[1] / "native_skipped.txt"
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

if LOAD_ERROR is None:
    from cnm_kernels.native.attention import gaussian_attention as gaussian_attention
    from cnm_kernels.native.attention import weighted_attention as weighted_attention
    from cnm_kernels.native.dropout import dropout as dropout
    from cnm_kernels.native.dropout_add_layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
    from cnm_kernels.native.gaussian_mask import gaussian_mask as gaussian_mask
    from cnm_kernels.native.intra_video_contrastive_loss import (
        intra_video_contrastive_loss as intra_video_contrastive_loss,
    )
    from cnm_kernels.native.linear import linear as linear
    from cnm_kernels.native.linear_nll import contrastive_reconstruction_loss as contrastive_reconstruction_loss
    from cnm_kernels.native.linear_nll import linear_nll as linear_nll
