"""Runs a few programs of a Triton launch in its interpreter, on CPU tensors, and counts what they ask of a GPU.

Products are counted, not computed: which elements a kernel reads and writes must not depend on them, nor on what
programs that are not run would write.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import triton
import triton.language as tl
from triton.language import core
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
)
from triton.runtime.jit import JITFunction
from triton_ir import Site, Stack

__all__ = ["Counts", "core", "count", "tl"]  # the language's modules: the interpreter looks for them, see ``_program``

TRITON = str(Path(triton.__file__).parent)
SECTOR = 32  # bytes that global memory moves at least
SAMPLED = (3, 4, 1 << 30)  # programs along x and y, evenly spaced, and all along z


@dataclass
class Counts:
    """Of the programs that were run, together."""

    programs: int = 0
    # By operation and by what each of its elements takes: bytes, a product's multiply-adds, 1 of an exponential.
    executed: Counter[tuple[Site, int]] = field(default_factory=Counter)
    sectors: set[int] = field(default_factory=set)  # read or written
    sectors_of_programs: int = 0  # the same, distinct in each program, summed over programs
    of_program: set[int] = field(default_factory=set)

    def end_program(self) -> None:
        self.programs += 1
        self.sectors_of_programs += len(self.of_program)
        self.sectors |= self.of_program
        self.of_program.clear()


def places(size: int, most: int) -> list[int]:
    """Evenly spaced places of an axis, as the emulator of csrc/cuda takes them."""
    return list(range(size)) if size <= most else [(2 * i + 1) * size // (2 * most) for i in range(most)]


def count(
    kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any], grid: tuple[int, ...], whole: bool
) -> Counts:
    """Runs a launch, or only some of its programs; what they write is written."""
    counts = Counts()
    grid = grid + (1,) * (3 - len(grid))
    chosen = set(itertools.product(*map(places, grid, grid if whole else SAMPLED)))
    program = _program(InterpretedFunction(kernel.fn).rewrite(), chosen, counts)
    with _counting(counts), numpy.errstate(all="ignore"):
        GridExecutor(program, kernel.arg_names, grid)(*arguments, **options)
    return counts


def _program(function: Callable[..., Any], chosen: set[tuple[int, ...]], counts: Counts) -> Callable[..., None]:
    """The kernel at the chosen places, nothing at the others.

    The interpreter replaces Triton's language in the modules that it finds in this function's globals, and puts it back
    after the launch; functions that kernels call would have it replaced in ``core`` for good, were ``core`` not here.
    """

    @functools.wraps(function)
    def program(**arguments: Any) -> None:
        if tuple(interpreter_builder.grid_idx) in chosen:
            function(**arguments)
            counts.end_program()

    program.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return program


@contextmanager
def _counting(counts: Counts) -> Iterator[None]:
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def moved(kind: str, pointers: TensorHandle, mask: TensorHandle) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at, asked = numpy.broadcast_arrays(pointers.data, mask.data)
        _note(counts, kind, at, size)
        counts.of_program.update(numpy.unique(at[asked] // SECTOR).tolist())

    def counted_load(self: Any, pointers: TensorHandle, mask: TensorHandle, *others: Any) -> Any:
        moved("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def counted_store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *others: Any) -> Any:
        moved("store", pointers, mask)
        return store(self, pointers, value, mask, *others)

    def counted_dot(self: Any, a: TensorHandle, b: TensorHandle, total: TensorHandle, *others: Any) -> TensorHandle:
        _note(counts, "product", total.data, a.data.shape[-1])
        return total

    def counted(exponential: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, argument: TensorHandle) -> Any:
            _note(counts, "exponential", argument.data, 1)
            return exponential(self, argument)

        return call

    def interpreted(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        return InterpretedFunction(self.fn)(*arguments, **options)

    replaced = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_dot": counted_dot,
        "create_exp": counted(InterpreterBuilder.create_exp),
        "create_exp2": counted(InterpreterBuilder.create_exp2),
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, function))
        stack.enter_context(mock.patch.object(JITFunction, "__call__", interpreted))
        yield


def _note(counts: Counts, kind: str, data: numpy.ndarray, size: int) -> None:
    shape = data.shape if data.size > 1 else ()
    counts.executed[(kind, _stack(), shape), size] += 1


def _stack() -> Stack:
    """The lines of kernels that are being executed, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "program":
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(TRITON):
            found.append((file, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)
