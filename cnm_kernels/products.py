"""How ``linear`` multiplies float32 on a CPU: by the processor, the shape and PyTorch's switch, never by timing.

The same machine takes the same way every time, so that results repeat bit for bit.

**Split** (``torch.set_float32_matmul_precision("high")``, or "medium", which PyTorch documents to be "high" where a
processor has no faster way): each operand as the sum of two bfloat16 numbers, three products added up in float32. Each
a b is off by 4e-6 |a b| in the mean (float32: 3e-8, bfloat16: 2e-3). PyTorch promises this where a processor has a fast
way to do it, and float32 elsewhere. AMX tiles multiply 16 times as many bfloat16 numbers as vectors multiply float32
ones in the same time, so three products take a fifth of it at best. Vector instructions multiply twice as many: three
products for two are slower on any processor (AMD Zen 4, one thread, 6,400 rows, 256 to 1,024 columns: 49 ms against
float32's 31, with gradients 151 against 99). So tiles split, and vectors compute in float32.

**Library**: PyTorch's own product (oneDNN, MKL). On an Intel Xeon with AVX-512 (Sapphire Rapids, 2 cores) a layer of
512 inputs takes 2.3 ms with it and 4.8 ms with the kernel here; on AMD the kernel is the faster one, by 2.3 times on
Zen 5 and by 1.2 times on Zen 4 (512 to 512 columns). So Intel's processors with AVX-512 take the library's from 512
inputs on. Its results repeat with the same number of threads, those of the kernel with any. Not measured, and left to
the kernel: narrower layers, groups of columns, and rows with lengths, of which the kernel leaves the padding out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY_INPUTS = 512  # the least that is left to PyTorch, where that is faster
WITH_AVX512 = ("avx512", "avx512bf16", "amx")

# Properties of this processor. ``use`` sets them; tests set them to run the code of other processors.
splits = False  # three bfloat16 products are faster than one in float32
library = False  # PyTorch's product is faster from LIBRARY_INPUTS on


def use(vendor: str, isa: str) -> None:
    """Chooses for a processor of this vendor (as CPUID has it) and the instruction set that the kernels run on."""
    global splits, library
    splits = isa == "amx"
    library = vendor == "GenuineIntel" and isa in WITH_AVX512


@torch.compiler.assume_constant_result
def _asked_for() -> bool:
    """PyTorch's switch for CPUs, which ``torch.set_float32_matmul_precision`` turns with those of all others.

    A compiled function is compiled anew when ``torch.set_float32_matmul_precision`` turns it: that state is part of its
    guards. It does not notice the switch of CPUs turned alone.
    """
    cpu: Any = torch.backends.mkldnn  # whose attributes PyTorch makes at run time
    return cpu.matmul.fp32_precision in ("tf32", "bf16")


def split(x: Tensor) -> bool:
    """Whether the products of x are to be split: asked where the op is called, and kept for its backward."""
    return splits and x.dtype == torch.float32 and _asked_for()


def by_library(x: Tensor, weight: Tensor, lengths: Tensor | None) -> bool:
    """Whether PyTorch multiplies x and ``weight`` faster."""
    plain = lengths is None and weight.dim() == 2
    return library and plain and x.dtype == torch.float32 and x.size(-1) >= LIBRARY_INPUTS and not split(x)
