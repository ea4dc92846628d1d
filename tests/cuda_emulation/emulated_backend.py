"""The kernels of csrc/cuda as a backend named ``cuda_emulation``, on CPU tensors; for tests, by name only."""

from __future__ import annotations

import ctypes

import torch
from emulation_build import COMPILER, build

from cnm_kernels import autograd, native

NAME = "cuda_emulation"
NAMESPACE = "cnm_kernels_emulated"
OPS = {"cpu": native.OPS["cuda"]}
DTYPES = native.DTYPES
BY_NAME_ONLY = True
LOAD_ERRORS: dict[str, str] = {}

if COMPILER is None:
    LOAD_ERRORS["cpu"] = "no C++ compiler"
else:
    library = build()
    torch.ops.load_library(str(library))
    machine = ctypes.CDLL(str(library))
    machine.emulator_set_seed.argtypes = [ctypes.c_uint64]
    machine.emulator_set_shared_bytes.argtypes = [ctypes.c_int64]
    machine.emulator_set_groups.argtypes = [ctypes.c_int32]
    _options = {"linear_nll": {"keeps_expected": lambda *_: True}}
    globals().update(autograd.register(NAMESPACE, library=False, options=_options))


def seed(number: int) -> None:
    """Seeds the order in which threads and blocks run."""
    machine.emulator_set_seed(number)
