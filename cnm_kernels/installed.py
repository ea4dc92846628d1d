"""Sources without compiled modules that hide an installed copy which has them.

Python's ``-m`` puts the working directory before what is installed: in a clone's root, ``python -m`` imports the
sources beside it.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def hidden_copy(module: str = "_C_cpu") -> Path | None:
    """Folder of another copy of this package on ``sys.path`` that has the compiled ``module``, which this one lacks."""
    if _has(_HERE, module):
        return None
    for entry in sys.path:
        package = Path(entry or ".").resolve() / _HERE.name
        if package != _HERE and _has(package, module):
            return package
    return None


def hidden_reason(module: str = "_C_cpu") -> str | None:
    """Why ``module`` is missing although it is installed, and what to do; None where no copy is hidden."""
    installed = hidden_copy(module)
    if installed is None:
        return None
    return (
        f"the sources in {_HERE} have no compiled module {module}, and Python took them instead of the installed copy "
        f"in {installed}, which has it; run from another folder, or compile in place with `pip install -e .`"
    )


def refuse_hidden(remedy: str = "") -> None:
    """Ends the process with one line where a copy is hidden: PyTorch's operations would pass for the kernels."""
    reason = hidden_reason()
    if reason is not None:
        print(f"error: {reason}{remedy}", file=sys.stderr)
        raise SystemExit(2)


def _has(package: Path, module: str) -> bool:
    return any((package / f"{module}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
