"""The Python side that the compiled backends share: each op's fake kernel and autograd formula.

A backend registers the operators ``<namespace>::<op>`` and ``<namespace>::<op>_backward`` with the schemas that
``csrc/**/<op>_op.cpp`` states; ``register(namespace)`` of an op's file here adds what only Python can, and returns the
function, or functions, that ``registry`` looks for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cnm_kernels import op_list


def register(namespace: str, *, library: bool, options: dict[str, dict[str, Any]]) -> dict[str, Callable[..., Any]]:
    """The functions of every op on the operators of this namespace, by op.

    Args:
        namespace: of the operators, which are defined already.
        library: whether the namespace has the ops that GPUs leave to libraries.
        options: by file, what its ``register`` is told besides: a backend's own choices.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for file in op_list.kernel_files(library=library):
        registered = _module(file).register(namespace, **options.get(file, {}))
        for function in registered if isinstance(registered, tuple) else (registered,):
            functions[function.__name__] = function
    for op in op_list.OPS:
        if op.composed:
            functions[op.name] = _module(op.file).compose(functions)
    return functions


def _module(file: str) -> Any:
    return importlib.import_module(f"{__name__}.{file}")
