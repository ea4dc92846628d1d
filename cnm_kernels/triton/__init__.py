"""The Triton backend: GPUs, and CPU tensors under the interpreter (``TRITON_INTERPRET=1``), which is for tests.

Each file holds the kernels of one op, its schemas, and the functions that its operators call. ``linear`` and
``absorbed_attention`` have no kernel here: vendors' libraries compute them. Kernels use no atomics and sum in a fixed
order. They never synchronise with the host, and their shapes do not depend on values, so CUDA graphs can capture them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from cnm_kernels import autograd, gpu, op_list, registry

NAMESPACE = "cnm_kernels_triton"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DEVICE = "cpu" if _INTERPRETED else "cuda"
OPS = {_DEVICE: tuple(op for op in registry.OPS if op not in registry.LIBRARY_OPS)}
BY_NAME_ONLY = _INTERPRETED  # the interpreter is thousands of times slower than other backends
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # Triton's own
MAX_HEAD = 128  # wider ones do not fit into any GPU's shared memory


def refuses_on_gpu(op: str, tensor: torch.Tensor) -> str | None:
    """Why the kernels do not take this query, packed or not, or None."""
    if op not in op_list.ATTENTION or tensor.size(-1) <= MAX_HEAD:
        return None
    return f"takes heads of at most {MAX_HEAD}, not {tensor.size(-1)}"


def _load_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    missing = None if _INTERPRETED else gpu.missing()
    return None if missing is None else f"{missing} (TRITON_INTERPRET=1 runs it on CPUs, for tests)"


_LOAD_ERROR = _load_error()
LOAD_ERRORS = {} if _LOAD_ERROR is None else {"cpu": _LOAD_ERROR, "cuda": _LOAD_ERROR}
_libraries: list[torch.library.Library] = []  # operators are removed when their library is deleted


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the tensors' device current, since Triton launches kernels on the current device."""

    def call(*arguments: Any) -> Any:
        tensor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
        with torch.cuda.device(tensor.device):
            return function(*arguments)

    return call


def define_operators(
    namespace: str, dispatch_key: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """Defines every kernel's operators, each called through ``around``, and returns the functions of the ops."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for name in op_list.kernel_files(library=False):
        file = importlib.import_module(f"{__name__}.{name}")
        for op, schema in file.SCHEMAS.items():
            library.define(op + schema)
            library.impl(op, around(file.IMPLEMENTATIONS[op]), dispatch_key)
    options = {"linear_nll": {"keeps_expected": importlib.import_module(f"{__name__}.linear_nll").keeps_expected}}
    return autograd.register(namespace, library=False, options=options)


if not LOAD_ERRORS:
    globals().update(
        define_operators(NAMESPACE, "CPU", lambda function: function)
        if _INTERPRETED
        else define_operators(NAMESPACE, "CUDA", _on_its_device)
    )
