"""The Triton backend on CPU tensors, as a backend: its launches are compiled for an H100 and a few programs counted.

Host code runs as on a GPU, so that configurations, constants and alignments are those of real calls. For ``recorded``
alone, and not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton_programs
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton_resources import compiling, name_of

from cnm_kernels import registry, use_backend
from cnm_kernels import triton as backend

NAME = "triton_launches"
OPS = {"cpu": tuple(op for op in registry.OPS if op not in registry.LIBRARY_OPS)}
LOAD_ERRORS: dict[str, str] = {}
DTYPES = backend.DTYPES
BY_NAME_ONLY = True
H100 = 90
MOST_PROGRAMS = 2000  # of a launch that is run whole: without a product it may list what others read


@dataclass(frozen=True)
class Launch:
    """Of one of our kernels."""

    name: str
    kernel: Any  # as compiled
    programs: int
    memory: int  # bytes of all its tensors
    counts: triton_programs.Counts


@dataclass(frozen=True)
class PyTorchLaunch:
    """Of one of PyTorch's kernels, which our host code calls."""

    name: str
    memory: int


_cache = tempfile.TemporaryDirectory(prefix="cnm_kernels_triton_")
_launches: list[Launch | PyTorchLaunch] = []


def _bytes(arguments: Any) -> int:
    tensors = {leaf.data_ptr(): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _PyTorch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.replace("::", ".")
        if not function.is_view and "empty" not in name:
            _launches.append(PyTorchLaunch(name, _bytes((args, kwargs, result))))
        return result


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with _PyTorch():
            return function(*arguments)

    return call


def _seen(function: Any, kernel: Any, arguments: Any, options: Any, grid: tuple[int, ...]) -> None:
    programs = math.prod(grid)
    whole = "dot" not in kernel.asm["ttgir"] and programs <= MOST_PROGRAMS
    with _disable_current_modes():  # what the interpreter copies is not the host code's doing
        counts = triton_programs.count(function, arguments, options, grid, whole)
    _launches.append(Launch(name_of(function), kernel, programs, _bytes(arguments), counts))


@contextmanager
def recorded() -> Iterator[list[Launch | PyTorchLaunch]]:
    """The launches of the ops that are called within, in order."""
    _launches.clear()
    found: list[Launch | PyTorchLaunch] = []
    # Code from Triton's own cache names the files and lines that it was compiled from, which may have moved since.
    own_cache = mock.patch.dict(os.environ, TRITON_CACHE_DIR=_cache.name)
    with own_cache, use_backend(NAME), compiling(H100, _seen):
        yield found
    found += _launches


globals().update(backend.define_operators("cnm_kernels_triton_launches", "CPU", _watched))
