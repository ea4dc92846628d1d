"""Checks that several ops share; they return the arguments in the form that backends take."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cnm_kernels import registry
from cnm_kernels.autograd.attention import unpack
from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import autocast

MAX_ALPHA, MAX_SIGMA = 1e30, 1e15  # beyond them float32 overflows, and with it the Gaussian at its own center


def check_attention(
    check: Arguments, query: Tensor, key: Tensor | None, value: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checks the operands and returns them in the autocast dtype."""
    given = [query, *(operand for operand in (key, value) if operand is not None)]
    if key is None and value is not None:
        raise TypeError(f"{check.op}: value is given without key; give both, or pack both into key")
    given = list(autocast(*given))
    if key is None:
        check.floating("query", given[0], "B Lk 3 H d")
    else:
        check.floating("query", given[0], "B H Lq d")
        check.floating("key", given[1], "B H Lk d" if value is not None else "B Lk 2 H d")
    if value is not None:
        check.floating("value", given[2], "B H Lk d")
    if key_lengths is not None:
        check.integer("key_lengths", key_lengths, "B")
    if given[0].size(-1) == 0 or given[0].size(-2 if key is None else 1) == 0:
        raise ValueError(f"{check.op}: query must have a head and a head dim, both >= 1, got {list(given[0].shape)}")
    return given[0], given[1] if key is not None else None, given[2] if value is not None else None


def check_key_weight(check: Arguments, key_weight: Tensor | None) -> Tensor | None:
    """Checks the weights and returns them as [B, Lk]."""
    if key_weight is not None:
        if isinstance(key_weight, Tensor) and key_weight.dim() == 3:
            key_weight = key_weight.flatten(0, 1)
        check.floating("key_weight", key_weight, "B Lk", own_dtype=True)
    return key_weight


def for_backend(
    op: str, query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns packed heads unchanged if the backend takes them, otherwise as views of each tensor's heads."""
    if value is not None or hasattr(registry.implementation(op, query), "takes_packed_heads"):
        return query, key, value
    query, key, value = unpack(query, key, value)
    return query, key, value


def finite(check: Arguments, name: str, value: float) -> float:
    check.number(name, value, -sys.float_info.max, sys.float_info.max)
    return value


def check_gaussian(check: Arguments, alpha: float, min_width: float) -> None:
    check.number("alpha", alpha, 0, MAX_ALPHA)
    check.above_zero("min_width", min_width)


def check_vocabulary(check: Arguments, weight: Tensor, bias: Tensor, label_smoothing: float) -> None:
    check.floating("weight", weight, "V D", own_dtype=True)
    check.floating("bias", bias, "V", own_dtype=True)
    if weight.size(0) == 0:
        raise ValueError(f"{check.op}: weight must hold at least one word, got shape {list(weight.shape)}")
    if weight.size(1) == 0:
        raise ValueError(f"{check.op}: weight must have at least one column, got shape {list(weight.shape)}")
    check.number("label_smoothing", label_smoothing, 0, 1)


def seed_tensor(check: Arguments, seed: int | Tensor, x: Tensor) -> Tensor:
    """Returns the seed as an int64 tensor [] on x's device."""
    if not isinstance(seed, Tensor):
        seed = check.whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        return torch.full((), seed, dtype=torch.int64, device=x.device)  # a copy would wait for the GPU
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"{check.op}: seed must be an int or one int64 element on {x.device}, "
            f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed.reshape(())
