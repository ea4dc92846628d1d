"""The one function of fairseq that the published attention imports when it runs."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_lock = threading.Lock()
_users = 0  # blocks that need the stand-in, of all threads


@contextmanager
def fairseq() -> Iterator[None]:
    """Provides ``fairseq.utils.softmax`` unless fairseq is installed."""
    global _users
    with _lock:
        needed = _users > 0 or ("fairseq" not in sys.modules and importlib.util.find_spec("fairseq") is None)
        if needed and _users == 0:
            package, utils = ModuleType("fairseq"), ModuleType("fairseq.utils")
            utils.softmax = _softmax  # type: ignore[attr-defined]
            package.utils = utils  # type: ignore[attr-defined]
            sys.modules |= {"fairseq": package, "fairseq.utils": utils}
        _users += needed
    try:
        yield
    finally:
        with _lock:
            _users -= needed
            if needed and _users == 0:
                del sys.modules["fairseq"], sys.modules["fairseq.utils"]


def _softmax(x: Tensor, dim: int, onnx_trace: bool = False) -> Tensor:
    return F.softmax(x, dim=dim, dtype=torch.promote_types(x.dtype, torch.float32))
