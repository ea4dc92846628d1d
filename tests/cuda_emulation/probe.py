"""Runs kernels on the emulator and says in its exit code whether anything was wrong with them.

    python probe.py <op>:<sample>[:<dtype>] ...

Prints what was caught first: an access that the emulator refused, other bits in another order of the threads, or
numbers that are not those of the torch backend. CNM_EMULATION_CSRC names other sources than the project's.
"""

from __future__ import annotations

import sys

import emulated_backend
import torch
from op_checks import gradients_of
from op_records import DIFFERENTIABLE
from samples import run, sample

from cnm_kernels import registry

registry.add(emulated_backend.NAME, emulated_backend)
torch.set_num_threads(1)


CLOSE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (5e-2, 1e-2)}  # relative and absolute


def everything(op: str, name: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    inputs = sample(op, name, dtype, "cpu")
    outputs = list(run(op, inputs, backend))
    return outputs + list(gradients_of(lambda **inputs: run(op, inputs, backend), inputs, DIFFERENTIABLE[op]).values())


def main() -> int:
    for case in sys.argv[1:]:
        op, name, *of_dtype = case.split(":")
        dtype = getattr(torch, of_dtype[0]) if of_dtype else torch.float32
        expected = everything(op, name, dtype, "torch")
        first = None
        for seed in range(4):
            emulated_backend.seed(seed)
            try:
                actual = everything(op, name, dtype, emulated_backend.NAME)
            except RuntimeError as error:
                print(f"caught: {str(error).splitlines()[0]}")
                return 1
            if first is not None and not all(map(torch.equal, actual, first)):
                print(f"caught: {case} gives other bits in another order of the threads")
                return 1
            first = actual
            for tensor, wanted in zip(actual, expected, strict=True):
                relative, absolute = CLOSE[dtype]
                if not torch.allclose(tensor, wanted, rtol=relative, atol=absolute):
                    print(f"caught: {case} is not what the torch backend gives")
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
