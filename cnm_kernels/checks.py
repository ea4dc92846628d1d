"""Argument checks of the public ops: each error names the argument, its value and the expected one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Arguments:
    """Checks the tensors of one call: sizes must agree across arguments, and all must have one device and dtype.

    ``floating("key", key, "B H Lk d")`` checks that ``key`` is a floating tensor whose B, H and d agree with what
    earlier arguments bound them to.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.first: Tensor | None = None
        self.first_name = ""

    def floating(self, name: str, tensor: Tensor, shape: str, *, own_dtype: bool = False) -> None:
        """Checks a floating argument of this shape and of the first argument's dtype (``own_dtype``: or float32)."""
        self._tensor(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{self.op}: {name} must be a float32, bfloat16, float16 or float64 tensor, got {tensor.dtype}"
            )
        if self.first is None:
            self.first, self.first_name = tensor, name
        elif tensor.dtype != self.first.dtype and not (own_dtype and tensor.dtype == torch.float32):
            wanted = str(self.first.dtype) + (" or torch.float32" if own_dtype else "")
            raise TypeError(f"{self.op}: {name} must be {wanted} as {self.first_name} is, got {tensor.dtype}")
        self._device(name, tensor)
        self._shape(name, tensor, shape)

    def integer(self, name: str, tensor: Tensor, shape: str) -> None:
        """Checks an int64 argument of this shape."""
        self._tensor(name, tensor)
        if tensor.dtype != torch.int64:
            raise TypeError(f"{self.op}: {name} must be an int64 tensor, got {tensor.dtype}")
        self._device(name, tensor)
        self._shape(name, tensor, shape)

    def number(self, name: str, value: float, low: float, high: float) -> None:
        """Checks a number within [low, high]."""
        self._number(name, value)
        value = float(value) if isinstance(value, np.floating) else value  # float32 would round the bounds
        if not low <= value <= high:
            raise ValueError(f"{self.op}: {name} must be between {low:g} and {high:g}, got {value}")

    def whole(self, name: str, value: int, low: int, high: int) -> int:
        """Checks an int within [low, high]; returns a Python int, since NumPy's narrow ints overflow."""
        if not isinstance(value, (int, np.integer, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be an int, got {type(value).__name__}")
        self.number(name, value, low, high)
        return int(value) if isinstance(value, np.integer) else value

    def flag(self, name: str, value: bool) -> bool:
        """Checks a bool; returns a Python bool. 1 and "no" are refused."""
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{self.op}: {name} must be True or False, got {type(value).__name__}")
        return bool(value)

    def above_zero(self, name: str, value: float) -> None:
        """Checks a number above 0."""
        self._number(name, value)
        if not value > 0:
            raise ValueError(f"{self.op}: {name} must be above 0, got {value}")

    def _number(self, name: str, value: float) -> None:
        number = isinstance(value, (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat))
        if not number or isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be a number, got {type(value).__name__}")

    def _tensor(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{self.op}: {name} must be a dense tensor, got {tensor.layout}; call to_dense() on it")

    def _device(self, name: str, tensor: Tensor) -> None:
        if self.first is not None and tensor.device != self.first.device:
            raise ValueError(
                f"{self.op}: {name} is on {tensor.device} but {self.first_name} is on {self.first.device}; move one"
            )

    def _shape(self, name: str, tensor: Tensor, shape: str) -> None:
        axes = shape.split()
        if axes and axes[0] == "...":
            leading = tensor.shape[: tensor.dim() - len(axes) + 1]
            fits = tensor.dim() >= len(axes) - 1 and self._bind_leading(leading)
            axes, actual = axes[1:], tensor.shape[len(leading) :]
        else:
            fits, actual = tensor.dim() == len(axes), tensor.shape
        if fits:
            for axis, size in zip(axes, actual, strict=True):
                expected = int(axis) if axis.isdigit() else self.sizes.setdefault(axis, size)
                fits = fits and expected == size
        if not fits:
            known = ", ".join(f"{axis} = {self.sizes[axis]}" for axis in axes if axis in self.sizes)
            raise ValueError(
                f"{self.op}: {name} must have shape [{', '.join(shape.split())}]"
                f"{f' with {known}' if known else ''}, got {list(tensor.shape)}"
            )

    def _bind_leading(self, leading: torch.Size) -> bool:
        self.leading: torch.Size
        if not hasattr(self, "leading"):
            self.leading = leading
        return self.leading == leading
