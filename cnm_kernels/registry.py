"""The choice of a backend per op: one printable table, no nested ifs.

A backend is a module of this package that declares, as module constants,

* ``OPS``: by device type, names of the ops it implements there; each is a function of that name with the signature of
  ``reference``'s,
* ``LOAD_ERRORS``: by device type, why nothing of it can run there in this process,
* ``DTYPES``: floating dtypes it takes,
* ``MIN_CAPABILITY``, if its kernels need a GPU of that compute capability,
* ``refuses_on_gpu(op, tensor)``, if its GPU kernels do not take all shapes: why not this one, or None,
* ``BY_NAME_ONLY``, if it should never run unless asked for by name.

By default the first backend of ``BACKENDS`` that can run an op runs it. A backend asked for by name (``use_backend`` or
the environment variable ``CNM_KERNELS_BACKEND``) runs or raises ``BackendUnavailable`` with the reason; it is never
silently replaced, but for ``LIBRARY_OPS``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cnm_kernels import gpu, op_list

BACKENDS = {
    "native": "native",
    "triton": "triton",
    "torch": "reference",
}  # in order of preference: module
OPS = tuple(op.name for op in op_list.OPS)
# On GPUs vendors' libraries compute these best, or only CPUs gain by them: a backend requested by name may leave them
# to PyTorch.
LIBRARY_OPS = tuple(op.name for op in op_list.OPS if op.library)
ENVIRONMENT_VARIABLE = "CNM_KERNELS_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this op here."""


def _check_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def _load(module: str) -> ModuleType | None:
    name = f"{__package__}.{module}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


_modules: dict[str, ModuleType | None] = {}


class _Block:
    """A ``use_backend`` that was entered and not left."""

    def __init__(self, name: str | None) -> None:
        self.name = name


_default: str | None = None  # of the environment variable
_requested: str | None = None  # of the last block that was entered in any thread, else the default
_blocks: list[_Block] = []  # of all threads
_own_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("cnm_kernels_blocks", default=())
_lock = threading.Lock()


def load() -> None:
    """Imports every backend; called once, at the end of the package's import."""
    global _default, _requested
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        _default = _requested = _check_name(from_environment, ENVIRONMENT_VARIABLE)
    for backend, module in BACKENDS.items():
        _modules[backend] = _load(module)


def add(name: str, backend: ModuleType) -> None:
    """A backend that is not part of the package, last in the order of preference."""
    BACKENDS[name] = backend.__name__
    _modules[name] = backend


def _too_old(wanted: tuple[int, int] | None, tensor: Tensor | None) -> str | None:
    """Why kernels that want a compute capability cannot run on the tensor's GPU, or the current one."""
    if wanted is None or not torch.cuda.is_initialized():
        return None
    index = None if tensor is None else tensor.device.index
    found = gpu.capability(torch.cuda.current_device() if index is None else index)
    if found >= wanted:
        return None
    return f"needs a GPU of compute capability {wanted[0]}.{wanted[1]} or more, this one has {found[0]}.{found[1]}"


def unavailable(op: str, backend: str, device: str, dtype: torch.dtype, tensor: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of this device type and dtype, or None if it can.

    Given the op's first tensor, which they are of, it considers its GPU and shape too.
    """
    module = _modules[backend]
    if module is None:
        return "not part of this installation"
    if device in module.LOAD_ERRORS:
        return str(module.LOAD_ERRORS[device])
    if device not in module.OPS:
        return f"does not run on {device}"
    if op not in module.OPS[device]:
        return f"does not implement {op}"
    if dtype not in module.DTYPES:
        return f"does not take {dtype}"
    if device != "cuda":
        return None
    old = _too_old(getattr(module, "MIN_CAPABILITY", None), tensor)
    if old is not None or tensor is None or not hasattr(module, "refuses_on_gpu"):
        return old
    refused: str | None = module.refuses_on_gpu(op, tensor)
    return refused


def implementation(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that runs ``op`` on such operands; ``tensor`` is the first: hidden states or queries, say.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it.
    """
    return getattr(_modules[choice(op, tensor.device.type, tensor.dtype, tensor)], op)


def requested() -> str | None:
    """The backend asked for by name where this is called, or None: the first that can."""
    if torch.compiler.is_compiling():
        return _requested  # a global: what is compiled is guarded by it
    own = _own_blocks.get()
    if own:
        return own[-1].name
    # A backward runs on threads of PyTorch's; checkpointed forwards run there again.
    return _default if torch._C._current_graph_task_id() == -1 else _requested


def choice(op: str, device: str, dtype: torch.dtype, tensor: Tensor | None = None) -> str:
    """Name of the backend that runs ``op`` there, see ``unavailable``."""
    name = requested()
    if name is not None:
        reason = unavailable(op, name, device, dtype, tensor)
        if reason is not None and op in LIBRARY_OPS:
            return "torch"
        if reason is not None:
            raise BackendUnavailable(
                f"{op}: backend {name!r} was asked for but {reason} (`python -m cnm_kernels` shows what runs here)"
            )
        return name
    for backend in BACKENDS:
        by_name_only = getattr(_modules[backend], "BY_NAME_ONLY", False)
        if not by_name_only and unavailable(op, backend, device, dtype, tensor) is None:
            return backend
    raise BackendUnavailable(f"{op}: no backend takes {dtype} on {device}")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs the block's ops on one backend: ``native``, ``triton`` or ``torch``; None restores the default order.

    The choice holds for this thread (or asyncio task) alone; others, and the environment variable's, stay as they are.
    A backward runs on its forward's backend, wherever and whenever it runs. What ``torch.compile`` compiles cannot tell
    threads apart: it takes the block that was entered last in the process, as do checkpointed forwards that a
    backward runs again on a thread of PyTorch's.

    Raises:
        ValueError: unknown name. An op the backend cannot run raises ``BackendUnavailable`` when it is called.
    """
    global _requested
    block = _Block(None if name is None else _check_name(name, "use_backend"))
    _own_blocks.set((*_own_blocks.get(), block))
    with _lock:
        _blocks.append(block)
        _requested = block.name
    try:
        yield
    finally:  # perhaps in another order than they were entered
        _own_blocks.set(tuple(other for other in _own_blocks.get() if other is not block))
        with _lock:
            _blocks.remove(block)
            _requested = _blocks[-1].name if _blocks else _default


def table() -> str:
    """The ops, for each device type and dtype the backend that would run them, and why others would not."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        torch.cuda.init()
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    width = max(map(len, OPS))
    lines = [
        f"asked for by name: {requested() or 'nothing; the first that can runs, in the order ' + ', '.join(BACKENDS)}",
        "",
    ]
    for device in devices:
        header = "".join(f"{str(dtype).removeprefix('torch.'):>10}" for dtype in dtypes)
        lines.append(f"{'op on ' + device:<{width}}{header}")
        for op in OPS:
            cells = []
            for dtype in dtypes:
                try:
                    cells.append(choice(op, device, dtype))
                except BackendUnavailable:
                    cells.append("-")
            lines.append(f"{op:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
        lines.append("")
    for device in devices:
        for backend in BACKENDS:
            reasons = {unavailable(op, backend, device, torch.float32) for op in OPS}
            state = "; ".join(sorted(reason or "runs" for reason in reasons))
            lines.append(f"{backend} on {device}: {state}")
    return "\n".join(lines)
