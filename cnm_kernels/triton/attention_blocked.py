"""Attention in Triton for sequences that are too long for ``attention``: blocks of keys and an online softmax.

The kernels subtract the largest s + log m from the scores, so that no e m exceeds 1, as float16 needs. They multiply by
m, which rounds less than adding its logarithm. The statistics of a query are this maximum and the inverse of the sum;
from them the backward computes p0 = exp(s - maximum) inverse and P = p0 m.
One backward kernel loops over query tiles (delta, dq), another over key tiles (dk, dv, gradient of the weights).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cnm_kernels.triton.attention_tiles import load_rows, real_keys, store_rows, strides, visible
from cnm_kernels.triton.common import at_most, block, dot, floats, narrow
from cnm_kernels.triton.configurations import configuration
from cnm_kernels.triton.gaussian_mask import moment_gradient, positions
from cnm_kernels.triton.key_weights import COMPLEMENT, NONE, TENSOR, KeyWeights, load_key_weights

_NONE = tl.constexpr(NONE)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, lengths_ptr, out_ptr, stats_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    Lq, Lk, d, H, scale, alpha, min_width,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    reach = limit
    if CAUSAL:
        reach = tl.minimum(limit, (tl.program_id(1) + 1) * BLOCK_M)
    q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, reach, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
        v = load_rows(v_ptr + b * v_b + h * v_h, keys, limit, v_l, d, BLOCK_D)
        s = dot(q, tl.trans(k)) * scale
        m = load_key_weights(first_ptr, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
        seen = visible(rows, keys, limit, CAUSAL) & (m > 0)[None, :]
        reached = s
        if KIND != _NONE:
            reached = s + tl.log(tl.where(m > 0, m, 1.0))[None, :]
        higher = tl.maximum(highest, tl.max(tl.where(seen, reached, float("-inf")), 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(highest - finite)
        e = tl.where(seen, tl.exp(s - finite[:, None]), 0.0) * m[None, :]
        total = total * shrink + tl.sum(e, 1)
        out = out * shrink[:, None] + dot(narrow(e, v.dtype), v)
        highest = higher
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    store_rows(out_ptr + b * out_b + h * out_h, out * inverse[:, None], rows, Lq, out_l, d, BLOCK_D)
    stats = stats_ptr + ((b * H + h) * Lq + rows) * 2
    tl.store(stats, tl.where(highest == float("-inf"), 0.0, highest), mask=rows < Lq)
    tl.store(stats + 1, inverse, mask=rows < Lq)


@triton.jit
def _unweighted(
    q, k, stats_ptr, b, h, rows, keys, limit, m, H, Lq, scale, CAUSAL: tl.constexpr
):  # fmt: skip
    """Computes p0 = e / Z of a tile from the statistics of its queries."""
    stats = stats_ptr + ((b * H + h) * Lq + rows) * 2
    highest = tl.load(stats, mask=rows < Lq, other=0.0)
    inverse = tl.load(stats + 1, mask=rows < Lq, other=0.0)
    s = dot(q, tl.trans(k)) * scale - highest[:, None]
    seen = visible(rows, keys, limit, CAUSAL) & (m > 0)[None, :]
    return tl.where(seen, tl.exp(s), 0.0) * inverse[:, None]


@triton.jit
def _weights_kernel(
    q_ptr, k_ptr, first_ptr, second_ptr, lengths_ptr, stats_ptr, weights_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l,
    Lq, Lk, d, H, scale, alpha, min_width,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Averages P over the heads."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    m = load_key_weights(first_ptr, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in range(0, H):
        q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
        k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
        total += _unweighted(q, k, stats_ptr, b, h, rows, keys, limit, m, H, Lq, scale, CAUSAL)
    place = weights_ptr + (b * Lq + rows[:, None]) * Lk + keys[None, :]
    inside = (rows[:, None] < Lq) & (keys[None, :] < Lk)
    tl.store(place, narrow(total * m[None, :] / H, weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _query_gradient_kernel(
    d_out_ptr, d_weights_ptr, q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, lengths_ptr, stats_ptr, delta_ptr, d_q_ptr,
    d_out_b, d_out_h, d_out_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, d_q_b, d_q_h, d_q_l,
    Lq, Lk, d, H, scale, alpha, min_width,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_D_WEIGHTS: tl.constexpr,
    NEED_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes delta and then dq of a tile of queries."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    reach = limit
    if CAUSAL:
        reach = tl.minimum(limit, (tl.program_id(1) + 1) * BLOCK_M)
    q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
    d_out = load_rows(d_out_ptr + b * d_out_b + h * d_out_h, rows, Lq, d_out_l, d, BLOCK_D)
    delta = tl.zeros([BLOCK_M], tl.float32)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for turn in tl.static_range(2 if NEED_Q else 1):
        for start in range(0, reach, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
            v = load_rows(v_ptr + b * v_b + h * v_h, keys, limit, v_l, d, BLOCK_D)
            m = load_key_weights(first_ptr, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
            p0 = _unweighted(q, k, stats_ptr, b, h, rows, keys, limit, m, H, Lq, scale, CAUSAL)
            p = at_most(p0 * m[None, :], 1.0)
            d_p = dot(d_out, tl.trans(v))
            if HAS_D_WEIGHTS:
                place = d_weights_ptr + (b * Lq + rows[:, None]) * Lk + keys[None, :]
                inside = (rows[:, None] < Lq) & (keys[None, :] < Lk)
                d_p += tl.load(place, mask=inside, other=0.0).to(tl.float32) / H
            if turn == 0:
                delta += tl.sum(p * d_p, 1)
            else:
                d_q += dot(narrow(p * (d_p - delta[:, None]), k.dtype), k)
    tl.store(delta_ptr + (b * H + h) * Lq + rows, delta, mask=rows < Lq)
    if NEED_Q:
        store_rows(d_q_ptr + b * d_q_b + h * d_q_h, d_q * scale, rows, Lq, d_q_l, d, BLOCK_D)


@triton.jit
def _key_gradient_kernel(
    d_out_ptr, d_weights_ptr, q_ptr, k_ptr, v_ptr, first_ptr, second_ptr, lengths_ptr, stats_ptr, delta_ptr,
    d_k_ptr, d_v_ptr, d_m_ptr,
    d_out_b, d_out_h, d_out_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, d_k_b, d_k_h, d_k_l, d_v_b, d_v_h, d_v_l,
    Lq, Lk, d, H, scale, alpha, min_width,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_D_WEIGHTS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes dk, dv and dm of a tile of keys."""
    groups = H // HEADS
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_head = (tl.program_id(0) % groups) * HEADS
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = real_keys(lengths_ptr, b, Lk, HAS_LENGTHS)
    m = load_key_weights(first_ptr, second_ptr, b, keys, limit, Lk, alpha, min_width, KIND)
    d_m = tl.zeros([BLOCK_N], tl.float32)
    begin = 0
    if CAUSAL:  # earlier queries see none of these keys
        begin = tl.program_id(1) * BLOCK_N // BLOCK_M * BLOCK_M
    for index in range(0, HEADS):
        h = first_head + index
        k = load_rows(k_ptr + b * k_b + h * k_h, keys, limit, k_l, d, BLOCK_D)
        v = load_rows(v_ptr + b * v_b + h * v_h, keys, limit, v_l, d, BLOCK_D)
        d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(begin, Lq, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr + b * q_b + h * q_h, rows, Lq, q_l, d, BLOCK_D)
            d_out = load_rows(d_out_ptr + b * d_out_b + h * d_out_h, rows, Lq, d_out_l, d, BLOCK_D)
            p0 = _unweighted(q, k, stats_ptr, b, h, rows, keys, limit, m, H, Lq, scale, CAUSAL)
            p = at_most(p0 * m[None, :], 1.0)
            d_p = dot(d_out, tl.trans(v))
            if HAS_D_WEIGHTS:
                place = d_weights_ptr + (b * Lq + rows[:, None]) * Lk + keys[None, :]
                inside = (rows[:, None] < Lq) & (keys[None, :] < Lk)
                d_p += tl.load(place, mask=inside, other=0.0).to(tl.float32) / H
            centered = d_p - tl.load(delta_ptr + (b * H + h) * Lq + rows, mask=rows < Lq, other=0.0)[:, None]
            if NEED_WEIGHT:
                d_m += tl.sum(at_most(p0, 1.0 / tl.where(m > 0, m, 1.0)[None, :]) * centered, 0)
            if NEED_V:
                d_v += dot(tl.trans(narrow(p, q.dtype)), d_out)
            if NEED_K:
                d_k += dot(tl.trans(narrow(p * centered, q.dtype)), q)
        if NEED_K:
            store_rows(d_k_ptr + b * d_k_b + h * d_k_h, d_k * scale, keys, Lk, d_k_l, d, BLOCK_D)
        if NEED_V:
            store_rows(d_v_ptr + b * d_v_b + h * d_v_h, d_v, keys, Lk, d_v_l, d, BLOCK_D)
    if NEED_WEIGHT:
        tl.store(d_m_ptr + b * Lk + keys, narrow(d_m, d_m_ptr.dtype.element_ty), mask=keys < Lk)


@triton.jit
def _moment_gradient_kernel(
    d_m_ptr, center_ptr, width_ptr, d_center_ptr, d_width_ptr, Lk, alpha, min_width,
    COMPLEMENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Derives the gradients of center and width from dm [B, Lk]."""
    b = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + b).to(tl.float32)
    width = tl.load(width_ptr + b).to(tl.float32)
    d_center = 0.0
    d_width = 0.0
    for start in range(0, Lk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        d_m = tl.load(d_m_ptr + b * Lk + keys, mask=keys < Lk, other=0.0)
        to_center, to_width = moment_gradient(positions(keys, Lk), d_m, center, width, alpha, min_width, COMPLEMENT)
        d_center += to_center
        d_width += to_width
    tl.store(d_center_ptr + b, narrow(d_center, d_center_ptr.dtype.element_ty))
    tl.store(d_width_ptr + b, narrow(d_width, d_width_ptr.dtype.element_ty))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: KeyWeights,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    out: Tensor,
    stats: Tensor,
    weights: Tensor,
) -> None:
    """Writes out, stats and, unless it is empty, weights."""
    B, H, Lq, d = q.shape
    Lk = k.size(2)
    chosen = configuration("attention_blocked", q, d)
    modes = (weighting.kind, causal, lengths is not None)
    numbers = (Lq, Lk, d, H, scale, weighting.alpha, weighting.min_width)
    blocks = (chosen.rows, chosen.columns, block(d))
    tiles = triton.cdiv(Lq, chosen.rows)
    launch = {"num_warps": chosen.num_warps, "enable_fp_fusion": False, "num_stages": chosen.num_stages}
    _forward_kernel[(B * H, tiles)](
        q, k, v, weighting.first, weighting.second, lengths, out, stats, *strides(q, k, v, out),
        *numbers, *modes, *blocks, **launch,
    )  # fmt: skip
    if weights.numel():
        _weights_kernel[(B, tiles, triton.cdiv(Lk, chosen.columns))](
            q, k, weighting.first, weighting.second, lengths, stats, weights, *strides(q, k),
            *numbers, *modes, *blocks, **launch,
        )  # fmt: skip


def backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weighting: KeyWeights,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    stats: Tensor,
    gradients: list[Tensor | None],
    d_weighting: tuple[Tensor, Tensor | None] | None,
) -> None:
    """Writes the gradients of q, k, v that are tensors, and those of the key weights or of center and width."""
    B, H, Lq, d = q.shape
    Lk = k.size(2)
    chosen = configuration("attention_blocked_backward", q, d)
    modes = (weighting.kind, causal, lengths is not None, d_weights is not None)
    numbers = (Lq, Lk, d, H, scale, weighting.alpha, weighting.min_width)
    blocks = (chosen.rows, chosen.columns, block(d))
    launch = {"num_warps": chosen.num_warps, "enable_fp_fusion": False, "num_stages": chosen.num_stages}
    delta = floats(q, B, H, Lq)
    inputs = (d_out, d_weights, q, k, v, weighting.first, weighting.second, lengths, stats, delta)
    d_q, d_k, d_v = gradients
    _query_gradient_kernel[(B * H, triton.cdiv(Lq, chosen.rows))](
        *inputs, d_q, *strides(d_out, q, k, v, q if d_q is None else d_q), *numbers, *modes, d_q is not None, *blocks,
        **launch,
    )  # fmt: skip
    need_weight = d_weighting is not None
    if d_k is None and d_v is None and not need_weight:
        return
    of_tensor = weighting.kind == TENSOR
    d_m = None if d_weighting is None else d_weighting[0] if of_tensor else floats(q, B, Lk)
    heads = H if need_weight else 1
    _key_gradient_kernel[(B * H // heads, triton.cdiv(Lk, chosen.columns))](
        *inputs, d_k, d_v, d_m, *strides(d_out, q, k, v, k if d_k is None else d_k, v if d_v is None else d_v),
        *numbers, *modes, d_k is not None, d_v is not None, need_weight, heads, *blocks, **launch,
    )  # fmt: skip
    if d_weighting is not None and not of_tensor:
        _moment_gradient_kernel[(B,)](
            d_m, weighting.first, weighting.second, *d_weighting, Lk, weighting.alpha, weighting.min_width,
            weighting.kind == COMPLEMENT, 256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
