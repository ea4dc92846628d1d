"""The C++ backend: loads the compiled modules, for CPUs and for NVIDIA GPUs, and hands each op to them.

The modules register the operators ``cnm_kernels::<op>`` and ``cnm_kernels::<op>_backward`` with PyTorch; the files of
``autograd`` add what only Python can: fake kernels, which tell ``torch.compile`` the shapes, and the autograd formula.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cnm_kernels import autograd, gpu, op_list, products, registry
from cnm_kernels.installed import hidden_reason

ISA_VARIABLE = "CNM_KERNELS_CPU_ISA"  # forces a lower instruction set: portable, avx2, avx512, avx512bf16, amx


def _why_missing(module: str, error: ImportError, switch: str) -> str:
    """Why a compiled module is not there."""
    reason = Path(__file__).parent / f"{module}_skipped.txt"
    if reason.exists():
        return reason.read_text(encoding="utf-8").strip()
    hidden = hidden_reason(module)
    if hidden is not None:
        return hidden
    if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
        return f"this installation has no compiled module {module} (installed with {switch}=0, or never built)"
    return f"cnm_kernels.{module} does not load: {error}"


def _load_cpu() -> str | None:
    """Why the CPU module cannot be used, or None."""
    try:
        from cnm_kernels import _C_cpu
    except ImportError as error:
        return _why_missing("_C_cpu", error, "CNM_KERNELS_NATIVE")
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            _C_cpu.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    products.use(_C_cpu.vendor(), _C_cpu.isa())
    return None


def _load_cuda() -> str | None:
    """Why the GPU module cannot be used, or None."""
    if "cpu" in LOAD_ERRORS:
        return f"needs the CPU module too, and {LOAD_ERRORS['cpu']}"
    try:
        from cnm_kernels import _C_cuda  # noqa: F401
    except ImportError as error:
        return _why_missing("_C_cuda", error, "CNM_KERNELS_CUDA")
    return gpu.missing()


OPS = {"cpu": registry.OPS, "cuda": tuple(op for op in registry.OPS if op not in registry.LIBRARY_OPS)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
MAX_GPU_HEAD = 128
WIDE_FLOAT_HEAD, WIDE_FLOAT_BYTES = 64, 136_448  # float32 heads beyond 64 want so much shared memory of a block
LOAD_ERRORS: dict[str, str] = {}
for _device, _load in (("cpu", _load_cpu), ("cuda", _load_cuda)):
    _error = _load()
    if _error is not None:
        LOAD_ERRORS[_device] = _error

# If the layer itself is not trained, softmax(z) W of every token is kept for the backward: two products instead of
# three. On a CPU it takes the memory of a quarter of the float32 logits at most; GPUs keep it always.
EXPECTED_WORD_SHARE = 4


def keeps_expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if hidden.device.type != "cpu":
        return True
    return weight.size(0) >= EXPECTED_WORD_SHARE * weight.size(1) and not (weight.requires_grad or bias.requires_grad)


def refuses_on_gpu(op: str, tensor: Tensor) -> str | None:
    """Why the GPU's kernels do not take this query, packed or not, or None."""
    if op not in op_list.ATTENTION:
        return None
    width = tensor.size(-1)
    if width > MAX_GPU_HEAD:
        return f"takes heads of at most {MAX_GPU_HEAD}, not {width}"
    if width > WIDE_FLOAT_HEAD and tensor.dtype == torch.float32:
        found = gpu.shared_memory(tensor.device.index)
        if found < WIDE_FLOAT_BYTES:
            return f"needs {WIDE_FLOAT_BYTES:,} bytes of shared memory for float32 heads of {width}, not {found:,}"
    return None


if "cpu" not in LOAD_ERRORS:
    _options = {"linear_nll": {"keeps_expected": keeps_expected}}
    globals().update(autograd.register("cnm_kernels", library=True, options=_options))
