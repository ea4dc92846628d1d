"""linear_nll in Triton, computed as a flash attention whose keys are the words: logits never reach memory.

The forward keeps O = softmax(z) W; for any g the backward then has dh = g (O - (1-e) W[y] - e mean W) without logits.
For dW the backward recomputes z of each tile of words: dz = g (softmax(z) - (1-e) 1_y - e/V), dW = dz^T h. Tokens that
are padding or have no gradient are omitted (``packed_tokens`` lists the others). If too few tiles would leave a GPU
idle, the words (in the backward the tokens) are split into parts, which a second kernel sums in a fixed order. max z
and log sum exp(z - max) stay two numbers, since a large maximum would absorb the logarithm. W is rounded to the dtype
of h for all of this alike: where O is nearly W[y], dh is what is left of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.triton.common import at_most, block, dot, floats, narrow
from cnm_kernels.triton.configurations import configuration
from cnm_kernels.triton.packed_tokens import pack

MAX_BLOCK_D = {2: 256, 4: 128}  # columns of a hidden state in a tile, by the bytes of an element
PROGRAMS = 256  # fill any GPU once; a constant, so that all GPUs give the same bits
MAX_SPLITS = 8
# The least maximum: words of bias -inf are infinitely below it, also where there are no others.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tile(ptr, rows, inside, columns, D, dtype: tl.constexpr):
    """Loads rows [N] of a matrix [., D] at some columns, with zeros outside."""
    mask = inside[:, None] & (columns[None, :] < D)
    return tl.load(ptr + rows[:, None].to(tl.int64) * D + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, h, w, token, valid, words, D, V, dtype: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes z [T, N]; h and w are the operands if a tile holds all their columns."""
    if CHUNKS == 1:
        z = dot(h, tl.trans(w))
    else:
        z = tl.zeros([token.shape[0], words.shape[0]], tl.float32)
        for chunk in range(0, CHUNKS):
            columns = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            part = _tile(hidden_ptr, token, valid, columns, D, dtype)
            z += dot(part, tl.trans(_tile(weight_ptr, words, words < V, columns, D, dtype)))
    return z + tl.load(bias_ptr + words, mask=words < V, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, offsets_ptr, tokens_ptr, partial_ptr, word_ptr, expected_ptr,
    M, D, V, N, words_per_split,
    ACCURACY: tl.constexpr, EXPECTED: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes for each packed token and split: partial [split, 4, N], the most likely word, O.

    partial: max z, sum exp(z - max), sum (z - max), z_y.
    """
    count = tl.load(offsets_ptr + M)
    split = tl.program_id(1)
    packed = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < count:
        dtype = hidden_ptr.dtype.element_ty
        valid = packed < count
        token = tl.load(tokens_ptr + packed, mask=valid, other=0)
        target = tl.load(target_ptr + token)
        columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        h = _tile(hidden_ptr, token, valid, columns, D, dtype)
        highest = tl.full([BLOCK_T], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        below = tl.zeros([BLOCK_T], tl.float32)
        z_target = tl.zeros([BLOCK_T], tl.float32)
        best = tl.zeros([BLOCK_T], tl.int32)
        expected = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        first = split * words_per_split
        for start in range(first, tl.minimum(first + words_per_split, V), BLOCK_V):
            words = start + tl.arange(0, BLOCK_V)
            w = _tile(weight_ptr, words, words < V, columns, D, dtype)
            z = _logits(hidden_ptr, weight_ptr, bias_ptr, h, w, token, valid, words, D, V, dtype, CHUNKS, BLOCK_D)
            inside = (words < V)[None, :]
            z_target += tl.sum(tl.where(words[None, :] == target[:, None], z, 0.0), 1)
            z = tl.where(inside, z, float("-inf"))
            here = tl.max(z, 1)
            if ACCURACY:  # of equals the first
                best = tl.where(here > highest, start + tl.argmax(z, 1, tie_break_left=True), best)
            higher = tl.maximum(highest, here)
            shrink = tl.exp(highest - higher)
            below += tl.where(highest == _LOWEST, 0.0, highest - higher) * (start - first)
            below += tl.sum(tl.where(inside, z - higher[:, None], 0.0), 1)
            e = tl.exp(z - higher[:, None])
            total = total * shrink + tl.sum(e, 1)
            if EXPECTED:
                expected = expected * shrink[:, None] + dot(narrow(e, dtype), w)
            highest = higher
        z_target = tl.where((target >= 0) & (target < V), z_target, float("nan"))  # a word that is none
        if tl.program_id(2) == 0:
            place_of = partial_ptr + split * 4 * N + packed
            tl.store(place_of, highest, mask=valid)
            tl.store(place_of + N, total, mask=valid)
            tl.store(place_of + 2 * N, below, mask=valid)
            tl.store(place_of + 3 * N, z_target, mask=valid)
            if ACCURACY:
                tl.store(word_ptr + split * N + packed, best, mask=valid)
        if EXPECTED:
            rows = (split * N + packed).to(tl.int64)
            mask = valid[:, None] & (columns[None, :] < D)
            tl.store(expected_ptr + rows[:, None] * D + columns[None, :], expected, mask=mask)


@triton.jit
def _combine_kernel(
    partial_ptr, word_ptr, parts_ptr, target_ptr, offsets_ptr, nll_ptr, accuracy_ptr, stats_ptr, expected_ptr,
    L, D, V, N, splits, words_per_split, smoothing,
    ACCURACY: tl.constexpr, EXPECTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each row: combines the splits of its tokens into statistics, O and the mean nll."""
    row = tl.program_id(0)
    begin = tl.load(offsets_ptr + row)
    length = tl.load(offsets_ptr + row + 1) - begin
    nll = 0.0
    correct = 0.0
    for start in range(0, L, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        valid = place < length
        inside = place < L  # padding stays zero
        packed = begin + place
        highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
        best = tl.zeros([BLOCK_T], tl.int32)
        for split in range(0, splits):
            here = tl.load(partial_ptr + split * 4 * N + packed, mask=valid, other=0.0)
            if ACCURACY:
                word = tl.load(word_ptr + split * N + packed, mask=valid, other=0)
                best = tl.where(here > highest, word, best)
            highest = tl.maximum(highest, here)
        total = tl.zeros([BLOCK_T], tl.float32)
        below = tl.zeros([BLOCK_T], tl.float32)
        z_target = tl.zeros([BLOCK_T], tl.float32)
        for split in range(0, splits):
            place_of = partial_ptr + split * 4 * N + packed
            less = tl.load(place_of, mask=valid, other=0.0) - highest
            words = tl.minimum(words_per_split, V - split * words_per_split)
            total += tl.exp(less) * tl.load(place_of + N, mask=valid, other=1.0)
            below += tl.load(place_of + 2 * N, mask=valid, other=0.0) + less * words
            z_target += tl.load(place_of + 3 * N, mask=valid, other=0.0)
        log_total = tl.log(total)
        smooth = smoothing * tl.where(smoothing > 0.0, below / V, 0.0)  # words with bias -inf make it infinite
        token_nll = log_total + (1.0 - smoothing) * (highest - z_target) - smooth
        nll += tl.sum(tl.where(valid, token_nll, 0.0), 0)
        tl.store(stats_ptr + row * L + place, tl.where(valid, highest, 0.0), mask=inside)
        tl.store(stats_ptr + N + row * L + place, tl.where(valid, log_total, 0.0), mask=inside)
        if ACCURACY:
            target = tl.load(target_ptr + row * L + place, mask=valid, other=-1)
            correct += tl.sum((valid & (best == target)).to(tl.float32), 0)
        if EXPECTED:
            for first in range(0, D, BLOCK_D):
                columns = first + tl.arange(0, BLOCK_D)
                mask = valid[:, None] & (columns[None, :] < D)
                expected = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for split in range(0, splits):
                    here = tl.load(partial_ptr + split * 4 * N + packed, mask=valid, other=0.0)
                    share = tl.exp(here - highest) / total
                    rows = (split * N + packed).to(tl.int64)
                    part = tl.load(parts_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
                    expected += share[:, None] * part
                rows = (row * L + place).to(tl.int64)
                mask = inside[:, None] & (columns[None, :] < D)
                tl.store(expected_ptr + rows[:, None] * D + columns[None, :], expected, mask=mask)
    size = tl.maximum(length, 1).to(tl.float32)
    tl.store(nll_ptr + row, nll / size)
    if ACCURACY:
        tl.store(accuracy_ptr + row, correct / size)


@triton.jit
def _hidden_gradient_kernel(
    d_nll_ptr, weight_ptr, mean_ptr, target_ptr, lengths_ptr, expected_ptr, d_hidden_ptr, M, L, D, V, smoothing,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = token // L
    inside = row < M
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row, mask=inside, other=0), 0), L)
    d_nll = tl.load(d_nll_ptr + row, mask=inside, other=0.0) / tl.maximum(length, 1).to(tl.float32)
    wanted = inside & (token % L < length) & (d_nll != 0.0)
    target = tl.load(target_ptr + token, mask=wanted, other=0)
    known = (target >= 0) & (target < V)
    within = (columns < D)[None, :]
    place = token[:, None] * D + columns[None, :]
    expected = tl.load(expected_ptr + place, mask=wanted[:, None] & within, other=0.0)
    of_target = tl.load(
        weight_ptr + target[:, None] * D + columns[None, :], mask=(wanted & known)[:, None] & within, other=0.0
    ).to(tl.float32)
    of_target = tl.where(known[:, None], of_target, float("nan"))
    mean = tl.load(mean_ptr + columns, mask=columns < D, other=0.0)
    gradient = d_nll[:, None] * (expected - (1.0 - smoothing) * of_target - smoothing * mean[None, :])
    gradient = tl.where(wanted[:, None], gradient, 0.0)
    tl.store(d_hidden_ptr + place, narrow(gradient, d_hidden_ptr.dtype.element_ty), mask=inside[:, None] & within)


@triton.jit
def _word_gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, offsets_ptr, tokens_ptr, targets_ptr, notes_ptr,
    d_weight_ptr, d_bias_ptr, M, N, D, V, smoothing,
    SPLITS: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes dW [split, V, D] and db [split, V] of a tile of words from one split of the tokens."""
    dtype = hidden_ptr.dtype.element_ty
    words = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(offsets_ptr + M)
    share = tl.cdiv(tl.cdiv(count, BLOCK_T), SPLITS) * BLOCK_T
    w = _tile(weight_ptr, words, words < V, columns, D, dtype)
    d_weight = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_V], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, count), BLOCK_T):
        packed = start + tl.arange(0, BLOCK_T)
        valid = packed < count
        token = tl.load(tokens_ptr + packed, mask=valid, other=0)
        h = _tile(hidden_ptr, token, valid, columns, D, dtype)
        z = _logits(hidden_ptr, weight_ptr, bias_ptr, h, w, token, valid, words, D, V, dtype, CHUNKS, BLOCK_D)
        z -= tl.load(notes_ptr + packed, mask=valid, other=0.0)[:, None]
        z -= tl.load(notes_ptr + N + packed, mask=valid, other=0.0)[:, None]
        likely = at_most(tl.exp(z), 1.0) - smoothing / V
        d_nll = tl.load(notes_ptr + 2 * N + packed, mask=valid, other=0.0)
        target = tl.load(targets_ptr + packed, mask=valid, other=-1)
        d_z = tl.where(words[None, :] == target[:, None], likely - (1.0 - smoothing), likely) * d_nll[:, None]
        if NEED_BIAS:
            d_bias += tl.sum(d_z, 0)
        if NEED_WEIGHT:
            d_weight += dot(tl.trans(narrow(d_z, dtype)), h)
    if NEED_WEIGHT:
        rows = (split * V + words).to(tl.int64)
        mask = (words < V)[:, None] & (columns[None, :] < D)
        tl.store(
            d_weight_ptr + rows[:, None] * D + columns[None, :],
            narrow(d_weight, d_weight_ptr.dtype.element_ty),
            mask=mask,
        )
    if NEED_BIAS and tl.program_id(2) == 0:
        tl.store(d_bias_ptr + split * V + words, narrow(d_bias, d_bias_ptr.dtype.element_ty), mask=words < V)


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + split * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, narrow(total, out_ptr.dtype.element_ty), mask=index < size)


SCHEMAS = {
    "linear_nll": "(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
    "float label_smoothing, bool return_accuracy, bool keep_expected) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_nll_backward": "(Tensor d_nll, Tensor hidden, Tensor weight, Tensor bias, Tensor target, "
    "Tensor valid_lengths, float label_smoothing, Tensor stats, Tensor expected, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
}


def keeps_expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Always True: recomputing the logits for dh costs two more products than keeping O."""
    return True


def _splits(tiles: int, most: int) -> int:
    return max(1, min(PROGRAMS // max(tiles, 1), MAX_SPLITS, most))


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    return_accuracy: bool,
    keep_expected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, L, D), V = hidden.shape, weight.size(0)
    nll, accuracy = floats(hidden, M), floats(hidden, M if return_accuracy else 0)
    stats = floats(hidden, 2, M, L)
    expected = floats(hidden, M, L, D) if keep_expected else floats(hidden, 0)
    if M * L == 0:
        return nll.zero_(), accuracy.zero_(), stats, expected
    hidden, weight, bias, target, valid_lengths = (
        tensor.contiguous() for tensor in (hidden, weight.to(hidden.dtype), bias, target, valid_lengths)
    )
    chosen = configuration("linear_nll", hidden, D)
    BLOCK_T, BLOCK_V, BLOCK_D = chosen.rows, chosen.columns, block(D, MAX_BLOCK_D[hidden.element_size()])
    N = M * L
    tiles, chunks, word_tiles = triton.cdiv(N, BLOCK_T), triton.cdiv(D, BLOCK_D), triton.cdiv(V, BLOCK_V)
    splits = _splits(tiles, triton.cdiv(word_tiles, 4))
    per_split = triton.cdiv(word_tiles, splits) * BLOCK_V
    splits = triton.cdiv(V, per_split)
    partial = floats(hidden, splits, 4, N)
    words = torch.empty((splits, N) if return_accuracy else 0, dtype=torch.int32, device=hidden.device)
    parts = floats(hidden, splits, N, D) if keep_expected else None
    active = pack(valid_lengths, L)
    _forward_kernel[(tiles, splits, chunks if keep_expected else 1)](
        hidden, weight, bias, target, active.offsets, active.tokens, partial, words, parts, M, D, V, N, per_split,
        return_accuracy, keep_expected, chunks, BLOCK_T, BLOCK_V, BLOCK_D,
        num_warps=chosen.num_warps, enable_fp_fusion=True, num_stages=chosen.num_stages,
    )  # fmt: skip
    _combine_kernel[(M,)](
        partial, words, parts, target, active.offsets, nll, accuracy, stats, expected, L, D, V, N, splits, per_split,
        label_smoothing, return_accuracy, keep_expected, min(triton.next_power_of_2(L), 16), BLOCK_D,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return nll, accuracy, stats, expected


def backward(
    d_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    stats: Tensor,
    expected: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (M, L, D), V = hidden.shape, weight.size(0)
    wanted = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
    d_hidden, d_weight, d_bias = (tensor.new_empty(tensor.shape if need else 0) for tensor, need in wanted)
    if M * L == 0:
        return d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()
    if need_hidden and expected.numel() == 0:
        raise RuntimeError("linear_nll: hidden's gradient needs what a forward with keep_expected keeps")
    d_nll, hidden, weight, bias, target, valid_lengths = (
        tensor.contiguous() for tensor in (d_nll, hidden, weight.to(hidden.dtype), bias, target, valid_lengths)
    )
    chosen = configuration("linear_nll_backward", hidden, D)
    BLOCK_T, BLOCK_V, BLOCK_D = chosen.rows, chosen.columns, block(D, MAX_BLOCK_D[hidden.element_size()])
    chunks = triton.cdiv(D, BLOCK_D)
    if need_hidden:
        mean = weight.mean(0, dtype=stats.dtype)
        _hidden_gradient_kernel[(triton.cdiv(M * L, 16), chunks)](
            d_nll, weight, mean, target, valid_lengths, expected, d_hidden, M, L, D, V, label_smoothing, 16, BLOCK_D,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if not (need_weight or need_bias):
        return d_hidden, d_weight, d_bias
    tiles = triton.cdiv(V, BLOCK_V)
    splits = _splits(tiles * chunks, triton.cdiv(triton.cdiv(M * L, BLOCK_T), 4))
    active = pack(valid_lengths, L, d_nll, target, stats)
    parts = (d_weight, d_bias)
    if splits > 1:
        parts = (floats(hidden, splits, *d_weight.shape), floats(hidden, splits, *d_bias.shape))
    _word_gradient_kernel[(tiles, splits, chunks if need_weight else 1)](
        hidden, weight, bias, *active, *parts, M, M * L, D, V, label_smoothing,
        splits, need_weight, need_bias, chunks, BLOCK_T, BLOCK_V, BLOCK_D,
        num_warps=chosen.num_warps, enable_fp_fusion=True, num_stages=chosen.num_stages,
    )  # fmt: skip
    if splits > 1:
        for part, out in zip(parts, (d_weight, d_bias), strict=True):
            if out.numel():
                _sum_kernel[(triton.cdiv(out.numel(), 1024),)](
                    part, out, out.numel(), splits, 1024, num_warps=4, enable_fp_fusion=True
                )
    return d_hidden, d_weight, d_bias


IMPLEMENTATIONS = {"linear_nll": forward, "linear_nll_backward": backward}
