"""Arguments that may be wrong: what the fuzzer hands to the ops."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class Anything:
    """Mostly what was asked for; else something like it, or nothing like it.

    Args:
        draw: decides.

    Attributes:
        B, H, L, K, d, V: sizes, of which arguments that belong together are made.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self.B, self.H, self.L, self.K, self.d, self.V = (draw.choice((1, 2, 3, 5, 17)) for _ in range(6))

    def choice(self, *options: Any) -> Any:
        return self._draw.choice(options)

    def tensor(self, *shape: int) -> Any:
        """Else another dtype, layout, width, or no tensor at all."""
        draw = self._draw
        kind = draw.randrange(40)
        if kind == 0:
            shape = tuple(draw.choice((0, 1, size, size + 1)) for size in shape)
        elif kind == 1:
            shape = shape[draw.randrange(2) :]
        elif kind == 2:
            return draw.choice((None, 3, "query", [1.0], np.ones(shape)))
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64, torch.bool)
        dtype = draw.choice(dtypes) if kind == 7 else dtypes[0]
        scale = draw.choice((1.0, 1.0, 1e30, float("nan"), float("inf")))
        tensor = (torch.randn(shape) * scale).to(dtype)
        if kind == 3 and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        if kind == 4 and tensor.dim() > 0 and tensor.size(-1) > 1:
            tensor = tensor[..., ::2]
        if kind == 5:
            tensor = tensor.to_sparse() if tensor.dim() > 0 else tensor
        if kind == 6:
            tensor = tensor.to("meta")
        return tensor.requires_grad_() if tensor.is_floating_point() and draw.randrange(2) else tensor

    def integers(self, high: int, *shape: int) -> Any:
        """Else one that is out of range, or what ``tensor`` gives."""
        draw = self._draw
        kind = draw.randrange(20)
        if kind == 0:
            return self.tensor(*shape)
        tensor = torch.randint(high, shape)
        if kind == 1 and tensor.numel():
            tensor.view(-1)[0] = draw.choice((-1, high, 1 << 62, -(1 << 63)))
        return tensor

    def number(self, usual: float) -> Any:
        """Else an extreme one, or none at all."""
        draw = self._draw
        return usual if draw.randrange(12) else draw.choice((0, -1, 1e30, float("nan"), float("inf"), "1", None))
