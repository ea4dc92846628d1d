"""Peak memory of one contender, measured in a process of its own.

Resident memory is what a user runs out of, and it counts everything: PyTorch's allocations, our kernels' scratch, the
libraries' buffers. So that it counts nothing else:

* every contender runs in a fresh process, forked from a server that has only imported the libraries;
* a call at tiny size comes first, which loads code and starts threads (``torch.compile`` compiles at full size there);
* freed memory goes back to the system at once (``mallopt``), so one contender's warm-up leaves nothing to reuse;
* huge pages are off, which would round every block up to 2 MiB;
* the baseline is taken when the inputs exist, and the kernel's high-water mark is reset there.

The peak above the baseline includes the results (outputs and gradients), which every contender must hand back; the
``working_bytes`` are what is left without them. Linux counts in batches of pages: differences below 1 MB are noise.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import tables

STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PR_SET_THP_DISABLE = 41  # sys/prctl.h
SAFE_PATH = sys.version_info >= (3, 11)  # has PYTHONSAFEPATH
LARGE = 1 << 16  # bytes; blocks from here on are mapped and unmapped one by one


def _return_freed_memory() -> None:
    _mallopt({M_MMAP_THRESHOLD: LARGE, M_TRIM_THRESHOLD: 0})


def give_back_freed() -> None:
    """Returns this process's freed memory to the system, whatever malloc was told to keep."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(options: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in options.items())


def measure(table: str, index: int, contender: str, *, quick: bool, threads: int) -> dict[str, int] | None:
    """``peak_bytes`` above the inputs, ``result_bytes`` thereof and ``working_bytes``; None where not measurable.

    Raises:
        RuntimeError: the contender raised an exception.
    """
    if sys.platform != "linux":
        return None
    context = multiprocessing.get_context("forkserver")
    if SAFE_PATH:
        context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, table, index, contender, quick, threads))
    with _same_search_path():
        process.start()
    sender.close()
    try:
        answer: dict[str, int] | None = receiver.recv()
    except EOFError:  # the process died, for want of memory most likely
        answer = None
    process.join()
    if process.exitcode and process.exitcode > 0:  # not a signal: it raised, and has printed its traceback
        raise RuntimeError(f"measuring the memory of {contender!r} in case {index} of {table!r} failed, see above")
    return answer


@contextmanager
def _same_search_path() -> Iterator[None]:
    """The server searches modules where this process does, not in the working directory first."""
    wanted = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child(sender: Connection, table: str, index: int, contender: str, quick: bool, threads: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    _return_freed_memory()
    torch.set_num_threads(threads)
    found = tables()[table]
    found.cases(True)[index].prepare(contender)()
    case = found.cases(quick)[index]
    call = case.prepare(contender)
    if case.contenders[contender].compiled or case.trains:
        call()
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = _status("VmRSS")
    result = call()
    peak = max(_status("VmHWM") - before, 0)
    # Blocks are whole pages; counting storages once, however many views of them are handed back.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(result)}
    handed_back = sum(storages.values())
    sender.send({"peak_bytes": peak, "result_bytes": handed_back, "working_bytes": max(peak - handed_back, 0)})


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)
    elif isinstance(result, dict):
        yield from _tensors(tuple(result.values()))
