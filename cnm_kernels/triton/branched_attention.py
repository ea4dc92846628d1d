"""branched_attention in Triton: the kernels of ``attention`` reweight one matrix of scores for each branch in turn."""

from __future__ import annotations

from torch import Tensor

from cnm_kernels.autograd.attention import operand_gradients, sizes, unpack
from cnm_kernels.autograd.branched_attention import out_like
from cnm_kernels.triton import attention_blocked
from cnm_kernels.triton.attention import fits, launch_backward, launch_forward
from cnm_kernels.triton.attention_tiles import gradient_views
from cnm_kernels.triton.common import floats, rows_contiguous
from cnm_kernels.triton.key_weights import KeyWeights

SCHEMAS = {
    "branched_attention": "(Tensor query, Tensor? key, Tensor? value, Tensor key_weights, bool causal, "
    "Tensor? key_lengths, float scale) -> (Tensor, Tensor)",
    "branched_attention_backward": "(Tensor d_out, Tensor query, Tensor? key, Tensor? value, Tensor key_weights, "
    "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, bool need_value, "
    "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _weighting(key_weights: Tensor) -> KeyWeights:
    return KeyWeights.of(key_weights, None, None, 1.0, 1.0, False)


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_weights: Tensor,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, H, Lq, Lk, d = sizes(query, key, value)
    n = key_weights.size(0)
    q, k, v = map(rows_contiguous, unpack(query, key, value))
    out, stats = out_like(query, n, B, H, Lq, d), floats(query, n, B, H, Lq, 2)
    if out.numel() == 0 or Lk == 0:
        return out.zero_(), stats.zero_()
    lengths = None if key_lengths is None else key_lengths.contiguous()
    if fits("attention", k, _weighting(key_weights), False):
        launch_forward(q, k, v, _weighting(key_weights), lengths, causal, scale, out, stats, query.new_empty(0))
    else:
        for branch, weights in enumerate(key_weights.unbind(0)):
            arguments = (_weighting(weights), causal, lengths, scale, out[branch], stats[branch], query.new_empty(0))
            attention_blocked.forward(q, k, v, *arguments)
    return out, stats


def backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_weights: Tensor,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    stats: Tensor,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    B, H, Lq, Lk, d = sizes(query, key, value)
    needs = (need_query, need_key, need_value)
    gradients = operand_gradients(query, key, value, needs)
    d_weights = key_weights.new_empty(key_weights.shape if need_weights else 0)
    if B * H * Lq * d == 0 or Lk == 0:
        return (*(gradient.zero_() for gradient in gradients), d_weights.zero_())
    q, k, v = map(rows_contiguous, unpack(query, key, value))
    d_out = rows_contiguous(d_out)
    lengths = None if key_lengths is None else key_lengths.contiguous()
    if fits("attention_backward", k, _weighting(key_weights), False):
        launch_backward(
            d_out, None, q, k, v, _weighting(key_weights), lengths, causal, scale, stats,
            gradient_views(gradients, key, value, needs), (d_weights, None) if need_weights else None,
        )  # fmt: skip
        return (*gradients, d_weights)
    totals: list[Tensor] = []
    for branch, weights in enumerate(key_weights.unbind(0)):
        of_branch = operand_gradients(query, key, value, needs)
        attention_blocked.backward(
            d_out[branch], None, q, k, v, _weighting(weights), causal, lengths, scale, stats[branch],
            gradient_views(of_branch, key, value, needs), (d_weights[branch], None) if need_weights else None,
        )  # fmt: skip
        wide = [gradient.float() for gradient in of_branch]
        totals = wide if not totals else [total + gradient for total, gradient in zip(totals, wide, strict=True)]
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total)
    return (*gradients, d_weights)


IMPLEMENTATIONS = {"branched_attention": forward, "branched_attention_backward": backward}
