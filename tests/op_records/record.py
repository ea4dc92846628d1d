"""The record of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from op_records.anything import Anything
from op_records.draw import Builder, Inputs


@dataclass(frozen=True)
class Record:
    """One op.

    Args:
        reference: its math by a second formula, independent of ``cnm_kernels.reference``: what the tests believe. It
            takes the public function's arguments, computes in the dtype it is given and is differentiated by autograd.
        samples: inputs by name; every sample runs on everything that can run the op.
        differentiable: inputs that get gradients, in the order of the arguments.
        typical: small samples with every input differentiable and something of each mode.
        large: samples large enough for threads to share the work.
        smooth: small samples away from kinks and ties, so that finite differences mean something.
        valid: a sample in which every argument is present, for what is refused.
        in_use: the sample that threads, processes and copies run.
        fuzzed: arguments for the fuzzer, of which any may be wrong.
        many: inputs of which every thread gets several chunks, written around the caches; None: a thread runs it alone.
        integers: int64 inputs.
        own_dtype: inputs that may be float32 beside lower or higher ones.
        autocast: inputs that autocast casts; everything else runs in the dtype it is given.
        returns_float32: outputs are float32 for inputs of lower dtypes too.
        ill_conditioned: one rounding of the inputs more may change results by more than the budget of errors.
        softmax_products: its backward multiplies a softmax rounded to the dtype of the hidden states, also for
            parameters in float32.
    """

    reference: Callable[..., tuple[Tensor, ...]]
    samples: dict[str, Builder]
    differentiable: tuple[str, ...]
    typical: tuple[str, ...]
    large: tuple[str, ...]
    smooth: tuple[str, ...]
    valid: str
    in_use: str
    fuzzed: Callable[[Anything], Inputs]
    many: Builder | None = None
    integers: tuple[str, ...] = ()
    own_dtype: tuple[str, ...] = ()
    autocast: tuple[str, ...] = ()
    returns_float32: bool = False
    ill_conditioned: bool = False
    softmax_products: bool = False
