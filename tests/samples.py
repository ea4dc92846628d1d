"""Samples of every op: the one factory behind the tests of values, gradients, determinism and dispatch.

A sample is the keyword arguments of one call of the public function; the record of its op makes it. Values are drawn in
float64 from a seed that the sample's name fixes and rounded to the dtype under test, so every backend sees the same
numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from op_records import RECORDS
from op_records.draw import Draw, Inputs
from torch import Tensor

import cnm_kernels
from cnm_kernels import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(op: str, name: str, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Fresh keyword arguments for one call of ``op``."""
    return RECORDS[op].samples[name](Draw(f"{op} {name}", dtype, device))


def targets(op: str, dtypes: Sequence[torch.dtype] = DTYPES, *, large: bool = False) -> list[Any]:
    """pytest parameters (backend, device, dtype): everything that can run ``op`` in this process. ``large`` ones are
    slow where a GPU's kernels run on the CPU."""
    return [
        pytest.param(backend, device, dtype, id=name, marks=_marks(marks, backend, device, large))
        for backend, device, dtype, name, marks in _targets(op, dtypes)
    ] + _missing_devices(3)


def cases(
    names: dict[str, Sequence[str]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    large: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Any]:
    """pytest parameters (op, name, backend, device, dtype): these samples on everything that can run them. ``large``
    ones are slow where a GPU's kernels run on the CPU."""
    return [
        pytest.param(
            op,
            name,
            backend,
            device,
            dtype,
            id=f"{op}-{name}-{target}",
            marks=_marks(marks, backend, device, name in large.get(op, ())),
        )
        for op, samples in names.items()
        for backend, device, dtype, target, marks in _targets(op, dtypes)
        for name in samples
    ] + _missing_devices(5)


def with_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """pytest parameters: these names, those of ``slow`` with its mark."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def _marks(marks: list[Any], backend: str, device: str, large: bool) -> list[Any]:
    stands_in = device == "cpu" and backend not in ("native", "torch")
    return [*marks, pytest.mark.slow] if stands_in and large else marks


def _targets(op: str, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, str, torch.dtype, str, list[Any]]]:
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for backend in registry.BACKENDS:
            for dtype in dtypes:
                if registry.unavailable(op, backend, device, dtype) is None:
                    name = f"{backend}-{device}-{str(dtype).removeprefix('torch.')}"
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    if (backend, device, dtype) == ("triton", "cpu", torch.float16):  # bfloat16's code, interpreted
                        marks.append(pytest.mark.slow)
                    yield backend, device, dtype, name, marks


def _missing_devices(arguments: int) -> list[Any]:
    """One visibly skipped parameter where there is no GPU."""
    if torch.cuda.is_available():
        return []
    marks = [pytest.mark.gpu, pytest.mark.skip(reason="needs an NVIDIA GPU")]
    return [pytest.param(*[None] * arguments, id="cuda", marks=marks)]


def run(op: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """The public function's outputs, as a tuple."""
    with cnm_kernels.use_backend(backend):
        outputs = getattr(cnm_kernels, op)(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)
