"""Dropout masks from Philox4x32-10: the same bits as ``reference.keep_mask``, drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(group, seed, offset):
    """Draws four words per group of eight elements: counter (group, offset), key seed. [...] int64 -> 4 [...] uint32"""
    offset = offset + group * 0
    return tl.philox(
        seed,
        (group & 0xFFFFFFFF).to(tl.uint32),
        ((group >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (offset & 0xFFFFFFFF).to(tl.uint32),
        ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def keep_groups(group, threshold, seed, offset):
    """Returns the mask of the elements of whole groups that dropout keeps: [..., 8], in order."""
    w0, w1, w2, w3 = _words(group, seed, offset)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2], in the order of the words
    draws = tl.join(words & 0xFFFF, words >> 16)  # [..., 2, 2, 2]
    return draws.to(tl.int32) >= threshold


@triton.jit
def keep_elements(element, threshold, seed, offset):
    """The same for single elements; each draws the words of its whole group."""
    w0, w1, w2, w3 = _words(element >> 3, seed, offset)
    which = element & 7
    low = tl.where((which >> 1) == 0, w0, w1)
    high = tl.where((which >> 1) == 2, w2, w3)
    word = tl.where((which >> 1) < 2, low, high)
    draw = tl.where((which & 1) == 0, word & 0xFFFF, word >> 16)
    return draw.to(tl.int32) >= threshold
