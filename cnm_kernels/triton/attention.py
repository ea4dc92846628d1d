"""weighted_attention and gaussian_attention in Triton, for as many keys as a tile holds (``WHOLE``): no online softmax.

P_ij = e_ij m_j / Z_i, e_ij = exp(s_ij - max), Z_i = sum_j e_ij m_j; with p0 = e / Z
dS = P (dP - delta), delta_i = sum_j P_ij dP_ij, dm_j = sum over heads and queries of p0_ij (dP_ij - delta_i).

A program holds all keys and values of a head and the scores of a tile of queries, from which it computes delta. If the
weights need a gradient, a program processes all heads of a sample in order, so that it needs no atomics.
``attention_blocked`` computes longer sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.autograd.attention import heads_last, operand_gradients, sizes, unpack
from cnm_kernels.triton import attention_blocked
from cnm_kernels.triton.attention_tiles import (
    gradient_views,
    load_rows,
    real_keys,
    store_rows,
    strides,
    visible,
)
from cnm_kernels.triton.common import at_most, block, dot, floats, narrow, rows_contiguous, shared_memory
from cnm_kernels.triton.configurations import configuration
from cnm_kernels.triton.key_weights import (
    NONE,
    TENSOR,
    KeyWeights,
    load_key_weights,
    store_key_weight_gradient,
)

# Maximum number of elements of a head's keys that a program holds, by the bytes of an element; with and without weights
# (of keys, or returned), which need registers too.
WHOLE = {
    "attention": {2: (128 * 64, 256 * 64), 4: (64 * 64, 64 * 64)},
    "attention_backward": {2: (128 * 64, 256 * 64), 4: (64 * 32, 64 * 32)},
}
WHOLE_BYTES = 110_592  # of shared memory, which the largest of them ask for; with less, half as many elements fit


@triton.jit
def _forward_tile(
    q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, out_ptr, stats_ptr, weights_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    b, first_head, rows, limit, Lq, Lk, d, H, scale, alpha, min_width, weights_n, stats_n, out_n,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, RETURN_WEIGHTS: tl.constexpr, BRANCHES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    keys = tl.arange(0, BLOCK_N)
    seen = visible(rows, keys, limit, CAUSAL)
    averaged = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(0, HEADS):
        h = first_head + index
        k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
        q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
        v = load_rows(v_ptr + b * v_b + h * v_h, keys, limit, v_l, d, BLOCK_D)
        s = tl.where(seen, dot(q, tl.trans(k)) * scale, float("-inf"))
        highest = tl.max(s, 1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        unweighted = tl.exp(s - highest[:, None])
        for branch in tl.static_range(BRANCHES):
            branch_first = first_ptr
            if BRANCHES > 1:
                branch_first = first_ptr + branch * weights_n
            m = load_key_weights(branch_first, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
            e = unweighted * m[None, :]
            total = tl.sum(e, 1)
            inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
            p = e * inverse[:, None]
            out = dot(narrow(p, v.dtype), v)
            store_rows(out_ptr + b * out_b + (b * 0 + branch) * out_n + h * out_h, out, rows, Lq, out_l, d, BLOCK_D)
            stats = stats_ptr + branch * stats_n + ((b * H + h) * Lq + rows) * 2
            tl.store(stats, highest, mask=rows < Lq)
            tl.store(stats + 1, inverse, mask=rows < Lq)
            if RETURN_WEIGHTS:
                averaged += p
    if RETURN_WEIGHTS:
        place = weights_ptr + (b * Lq + rows[:, None]) * Lk + keys[None, :]
        inside = (rows[:, None] < Lq) & (keys[None, :] < Lk)
        tl.store(place, narrow(averaged / HEADS, weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, lengths_ptr, out_ptr, stats_ptr, weights_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    Lq, Lk, d, H, scale, alpha, min_width, weights_n, stats_n, out_n,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, RETURN_WEIGHTS: tl.constexpr,
    BRANCHES: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    groups = H // HEADS
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_head = (tl.program_id(0) % groups) * HEADS
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    reach = limit
    if CAUSAL:
        reach = tl.minimum(limit, (tl.program_id(1) + 1) * BLOCK_M)
    if BLOCK_N >= 128 and not RETURN_WEIGHTS and reach <= BLOCK_N // 2:  # with half the keys, half the work
        _forward_tile(
            q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, out_ptr, stats_ptr, weights_ptr,
            q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
            b, first_head, rows, limit, Lq, Lk, d, H, scale, alpha, min_width, weights_n, stats_n, out_n,
            KIND, CAUSAL, RETURN_WEIGHTS, BRANCHES, HEADS, BLOCK_M, BLOCK_N // 2, BLOCK_D,
        )  # fmt: skip
    else:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, out_ptr, stats_ptr, weights_ptr,
            q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
            b, first_head, rows, limit, Lq, Lk, d, H, scale, alpha, min_width, weights_n, stats_n, out_n,
            KIND, CAUSAL, RETURN_WEIGHTS, BRANCHES, HEADS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    d_out_ptr, d_weights_ptr, q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, lengths_ptr, stats_ptr,
    d_q_ptr, d_k_ptr, d_v_ptr, d_first_ptr, d_second_ptr,
    d_out_b, d_out_h, d_out_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    d_q_b, d_q_h, d_q_l, d_k_b, d_k_h, d_k_l, d_v_b, d_v_h, d_v_l,
    Lq, Lk, d, H, scale, alpha, min_width, weights_n, stats_n, d_out_n,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_D_WEIGHTS: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    BRANCHES: tl.constexpr, ROWS_OF_D_M: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    groups = H // HEADS
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_head = (tl.program_id(0) % groups) * HEADS
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    keys = tl.arange(0, BLOCK_N)
    branches = tl.arange(0, ROWS_OF_D_M)  # the number of branches, up to a power of two
    d_m = tl.zeros([ROWS_OF_D_M, BLOCK_N], tl.float32)
    for index in range(0, HEADS):
        h = first_head + index
        k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
        v = load_rows(v_ptr + b * v_b + h * v_h, keys, limit, v_l, d, BLOCK_D)
        d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, Lq, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
            stats = stats_ptr + ((b * H + h) * Lq + rows) * 2
            highest = tl.load(stats, mask=rows < Lq, other=0.0)
            s = dot(q, tl.trans(k)) * scale - highest[:, None]
            unweighted = tl.where(visible(rows, keys, limit, CAUSAL), tl.exp(s), 0.0)
            to_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for branch in tl.static_range(BRANCHES):
                branch_first = first_ptr
                if BRANCHES > 1:
                    branch_first = first_ptr + branch * weights_n
                m = load_key_weights(branch_first, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
                d_out_h_ptr = d_out_ptr + b * d_out_b + (b * 0 + branch) * d_out_n + h * d_out_h
                d_out = load_rows(d_out_h_ptr, rows, Lq, d_out_l, d, BLOCK_D)
                inverse = tl.load(stats + branch * stats_n + 1, mask=rows < Lq, other=0.0)
                p0 = unweighted * inverse[:, None]
                p = at_most(p0 * m[None, :], 1.0)
                d_p = dot(d_out, tl.trans(v))
                if HAS_D_WEIGHTS:
                    place = d_weights_ptr + (b * Lq + rows[:, None]) * Lk + keys[None, :]
                    inside = (rows[:, None] < Lq) & (keys[None, :] < Lk)
                    d_p += tl.load(place, mask=inside, other=0.0).to(tl.float32) / H
                delta = tl.sum(p * d_p, 1)
                centered = d_p - delta[:, None]
                if NEED_WEIGHT:
                    most = 1.0 / tl.where(m > 0, m, 1.0)[None, :]
                    d_m += tl.where(
                        (branches == branch)[:, None], tl.sum(at_most(p0, most) * centered, 0)[None, :], 0.0
                    )
                if NEED_V:
                    d_v += dot(tl.trans(narrow(p, q.dtype)), d_out)
                to_scores += p * centered
            d_s = narrow(to_scores, q.dtype)
            if NEED_K:
                d_k += dot(tl.trans(d_s), q)
            if NEED_Q:
                d_q = dot(d_s, k) * scale
                store_rows(d_q_ptr + b * d_q_b + h * d_q_h, d_q, rows, Lq, d_q_l, d, BLOCK_D)
        if NEED_K:
            store_rows(d_k_ptr + b * d_k_b + h * d_k_h, d_k * scale, keys, Lk, d_k_l, d, BLOCK_D)
        if NEED_V:
            store_rows(d_v_ptr + b * d_v_b + h * d_v_h, d_v, keys, Lk, d_v_l, d, BLOCK_D)
    if NEED_WEIGHT:
        for branch in tl.static_range(BRANCHES):
            d_m_of_branch = tl.sum(tl.where((branches == branch)[:, None], d_m, 0.0), 0)
            store_key_weight_gradient(
                d_first_ptr + branch * weights_n, d_second_ptr, first_ptr, second_ptr, b, keys, d_m_of_branch, Lk,
                alpha, min_width, KIND,
            )  # fmt: skip


def fits(kernel: str, k: Tensor, weighting: KeyWeights, with_weights: bool) -> bool:
    """Whether a program can hold all keys of a head."""
    return kernel_and_size(kernel, k, weighting.kind != NONE or with_weights)[0] == kernel


def kernel_and_size(kernel: str, k: Tensor, weighted: bool) -> tuple[str, Tensor, int]:
    """The size that ``configuration`` expects for keys [B, H, L, d]."""
    most = min(WHOLE[kernel][k.element_size()])
    if not weighted and shared_memory(k) >= WHOLE_BYTES:
        most = max(WHOLE[kernel][k.element_size()])
    if block(k.size(2)) * block(k.size(3)) <= most:
        return kernel, k, block(k.size(2)) * block(k.size(3))
    return kernel.replace("attention", "attention_blocked", 1), k, k.size(3)


SCHEMAS = {
    "attention": "(Tensor query, Tensor? key, Tensor? value, Tensor? key_weight, Tensor? center, Tensor? width, "
    "float alpha, float min_width, bool complement, bool causal, Tensor? key_lengths, float scale, "
    "bool return_weights) -> (Tensor, Tensor, Tensor)",
    "attention_backward": "(Tensor d_out, Tensor? d_weights, Tensor query, Tensor? key, Tensor? value, "
    "Tensor? key_weight, Tensor? center, Tensor? width, float alpha, float min_width, bool complement, "
    "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, "
    "bool need_value, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: KeyWeights,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    stats: Tensor,
    weights: Tensor,
) -> None:
    """Writes out [n, B, H, Lq, d], stats and, unless it is empty, weights; with n > 1 key weights are [n, B, Lk]."""
    (B, H, Lq, d), Lk = q.shape, k.size(2)
    chosen = configuration("attention", q, block(Lk) * block(d))
    return_weights = weights.numel() > 0
    heads = H if return_weights else 1
    BLOCK_M = min(block(Lq), chosen.rows)
    _forward_kernel[(B * H // heads, triton.cdiv(Lq, BLOCK_M))](
        q, k, v, weighting.first, weighting.second, lengths, out, stats, weights, *strides(q, k, v, out[0]),
        Lq, Lk, d, H, scale, weighting.alpha, weighting.min_width, B * Lk, stats.stride(0), out.stride(0),
        weighting.kind, causal, lengths is not None, return_weights, out.size(0), heads, BLOCK_M, block(Lk), block(d),
        num_warps=chosen.num_warps, enable_fp_fusion=False, num_stages=chosen.num_stages,
    )  # fmt: skip


def launch_backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: KeyWeights,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    stats: Tensor,
    gradients: list[Tensor | None],
    d_weighting: tuple[Tensor, Tensor | None] | None,
) -> None:
    """Writes the gradients of q, k, v that are tensors, summed over the n of d_out, and those of the weighting."""
    (B, H, Lq, d), Lk, n = q.shape, k.size(2), d_out.size(0)
    chosen = configuration("attention_backward", q, block(Lk) * block(d))
    heads = 1 if d_weighting is None else H
    _backward_kernel[(B * H // heads,)](
        d_out, d_weights, q, k, v, weighting.first, weighting.second, lengths, stats,
        *gradients, *(d_weighting or (None, None)),
        *strides(d_out[0], q, k, v, *(q if gradient is None else gradient for gradient in gradients)),
        Lq, Lk, d, H, scale, weighting.alpha, weighting.min_width, B * Lk, stats.stride(0), d_out.stride(0),
        weighting.kind, causal, lengths is not None, d_weights is not None,
        *(gradient is not None for gradient in gradients), d_weighting is not None, n, triton.next_power_of_2(n),
        heads, min(block(Lq), chosen.rows), block(Lk), block(d),
        num_warps=chosen.num_warps, enable_fp_fusion=False, num_stages=chosen.num_stages,
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_weight: Tensor | None,
    center: Tensor | None,
    width: Tensor | None,
    alpha: float,
    min_width: float,
    complement: bool,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Lq, Lk, d = sizes(query, key, value)
    q, k, v = map(rows_contiguous, unpack(query, key, value))
    out = heads_last(query, B, H, Lq, d)
    stats = floats(query, B, H, Lq, 2)
    weights = query.new_empty((B, Lq, Lk) if return_weights else (0,))
    if out.numel() == 0 or Lk == 0:
        return out.zero_(), stats.zero_(), weights.zero_()
    weighting = KeyWeights.of(key_weight, center, width, alpha, min_width, complement)
    lengths = None if key_lengths is None else key_lengths.contiguous()
    if not fits("attention", k, weighting, return_weights):
        attention_blocked.forward(q, k, v, weighting, causal, lengths, scale, out, stats, weights)
        return out, stats, weights
    launch_forward(q, k, v, weighting, lengths, causal, scale, out[None], stats[None], weights)
    return out, stats, weights


def backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_weight: Tensor | None,
    center: Tensor | None,
    width: Tensor | None,
    alpha: float,
    min_width: float,
    complement: bool,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    stats: Tensor,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    B, H, Lq, Lk, d = sizes(query, key, value)
    needs = (need_query, need_key, need_value)
    gradients = operand_gradients(query, key, value, needs)
    d_moment = [
        floats(query, 0) if tensor is None else tensor.new_empty(tensor.shape if need_weight else 0)
        for tensor in (key_weight, center, width)
    ]
    if B * H * Lq * d == 0 or Lk == 0:
        return (*(gradient.zero_() for gradient in gradients), *(gradient.zero_() for gradient in d_moment))
    views = gradient_views(gradients, key, value, needs)
    q, k, v = map(rows_contiguous, unpack(query, key, value))
    d_out = rows_contiguous(d_out)
    d_weights = None if d_weights is None else d_weights.contiguous()
    weighting = KeyWeights.of(key_weight, center, width, alpha, min_width, complement)
    need_weight = need_weight and weighting.kind != NONE
    d_first, d_second = (d_moment[0], None) if weighting.kind == TENSOR else (d_moment[1], d_moment[2])
    lengths = None if key_lengths is None else key_lengths.contiguous()
    if not fits("attention_backward", k, weighting, d_weights is not None):
        attention_blocked.backward(
            d_out, d_weights, q, k, v, weighting, causal, lengths, scale, stats, views,
            (d_first, d_second) if need_weight else None,
        )  # fmt: skip
        return (*gradients, *d_moment)
    launch_backward(
        d_out[None], d_weights, q, k, v, weighting, lengths, causal, scale, stats[None], views,
        (d_first, d_second) if need_weight else None,
    )  # fmt: skip
    return (*gradients, *d_moment)


IMPLEMENTATIONS = {"attention": forward, "attention_backward": backward}
