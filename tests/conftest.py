"""Settings of the whole test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():  # Triton's kernels then run too, on the CPU; read when cnm_kernels is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# For tools, the emulation and benchmarks; last, so that installed packages are what is tested.
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tools", "tests/cuda_emulation", "")]

from cnm_kernels.installed import refuse_hidden

refuse_hidden("; or run `pytest`, which takes what is installed, instead of `python -m pytest`")

import emulated_backend  # noqa: E402

from cnm_kernels import registry  # noqa: E402

registry.add(emulated_backend.NAME, emulated_backend)  # the GPU's C++ kernels, run on the CPU

settings.register_profile("deterministic", deadline=None, derandomize=True, max_examples=12, database=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests' tensors are small: on a busy machine threads that wait for each other cost 100 times the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real annotation files; tests over it are skipped where it is absent."""
    folder = Path(os.environ.get("CNM_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real annotation files at {folder}")
    return folder


@pytest.fixture
def switches() -> Iterator[None]:
    """Sets PyTorch's switches for float32 products back afterwards, that of all backends and those of single ones."""
    own = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before, of_each = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in own]
    yield
    torch.set_float32_matmul_precision(before)
    for backend, precision in zip(own, of_each, strict=True):
        backend.fp32_precision = precision
