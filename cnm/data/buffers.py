"""Memory of large tensors that is used again."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Lends tensors and takes each back when it, every view of it and every array made from it are gone.

    A batch of 105 MB from the system costs 130 ms, mapped and zeroed page by page; to fill one that is there takes 10.

    Args:
        most: how many wait to be lent again; further ones are freed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> Tensor:
        """A tensor of this shape with anything in it. Any thread may ask."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(size, dtype=np.uint8)
        if buffer.size < size:
            buffer = np.empty(size, dtype=np.uint8)
        lent = buffer[:size].view(dtype).reshape(shape)
        # The tensor's storage holds this very object, and nothing else does.
        weakref.finalize(lent, self._give_back, buffer).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < self.most:
            self._free.append(buffer)
