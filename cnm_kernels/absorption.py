"""Cross attention that absorbs projections into the side with fewer rows: the same result with fewer products.

The weights of two projections in a row are multiplied first ("weight absorption", as in DeepSeek-V2's multi-head latent
attention); ``absorbed_attention`` then reads the longer side's states unprojected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cnm_kernels import ops


@dataclass(frozen=True)
class Projections:
    """The parameters of an attention of H heads on states of width D."""

    num_heads: int
    in_weight: Tensor  # [3 D, D], of query, key and value
    in_bias: Tensor | None  # [3 D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor | None  # [D]

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.in_weight, self.in_bias, self.out_weight, self.out_bias

    def of_inputs(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases of query, key and value."""
        biases = (None, None, None) if self.in_bias is None else self.in_bias.chunk(3)
        return self.in_weight.chunk(3), biases


@dataclass(frozen=True)
class Source:
    """The states that a cross attention reads."""

    states: Tensor  # [B, Lk, D]
    lengths: Tensor | None = None  # [B] int64, positions that are real; None: all
    weighting: Tensor | None = None  # [B, Lk], weights of the positions; None: all alike


# (parameters, queries [B, Lq, D], source, number [B] of queries that count or None) -> [B, Lq, D]. Every sample of the
# source must have one real position.
Absorb = Callable[[Projections, Tensor, Source, Tensor | None], Tensor]


def cheapest(D: int, H: int, Lq: int, Lk: int) -> Absorb | None:
    """The function with the fewest products for Lq queries and Lk keys; None: projecting both sides takes fewer, or
    there are no keys, whose values would bring the output's bias."""
    if Lk == 0:
        return None
    scores = 2 * H * Lq * Lk  # against H heads of d = D / H columns; all in products of D numbers
    costs: dict[Absorb | None, int] = {
        None: 2 * (Lq + Lk) * D + 2 * Lq * Lk,
        into_queries: 4 * Lq * D + scores,
        into_keys: 4 * Lk * D + scores,
    }
    return min(costs, key=costs.__getitem__)


def into_queries(p: Projections, x: Tensor, source: Source, rows: Tensor | None) -> Tensor:
    """x [B, Lq, D] -> [B, Lq, D], for few queries.

    q . (W_k y + b_k) = (W_k^T q) . y + q . b_k, constant over keys, which softmax cancels; and
    P (W_v y + b_v) = W_v (P y) + b_v.
    """
    H = p.num_heads
    (W_q, W_k, W_v), (b_q, _, b_v) = p.of_inputs()
    query = ops.linear(x, W_q, b_q, lengths=rows).unflatten(-1, (H, -1))  # [B, Lq, H, d]
    absorbed = ops.linear(query, W_k.unflatten(0, (H, -1)).mT, lengths=rows)  # [B, Lq, H, D]
    out = ops.absorbed_attention(
        absorbed.flatten(1, 2),
        source.states.unsqueeze(1),
        scale=query.size(-1) ** -0.5,
        key_weight=source.weighting,
        query_lengths=None if rows is None else H * rows,
        key_lengths=source.lengths,
    )
    out = out.unflatten(1, (-1, H))  # [B, Lq, H, D]
    heads = ops.linear(out, W_v.unflatten(0, (H, -1)), None if b_v is None else b_v.unflatten(0, (H, -1)), lengths=rows)
    return ops.linear(heads.flatten(2), p.out_weight, p.out_bias, lengths=rows)


def into_keys(p: Projections, x: Tensor, source: Source, rows: Tensor | None) -> Tensor:
    """x [B, Lq, D] -> [B, Lq, D], for few keys.

    (W_q x + b_q) . k = x . (W_q^T k) + b_q . k; W_o of the heads side by side = sum_h P_h (W_oh v_h).
    """
    D, H, lengths = x.size(-1), p.num_heads, source.lengths
    W_q, b_q = p.in_weight.chunk(3)[0], None if p.in_bias is None else p.in_bias.chunk(3)[0].unflatten(0, (H, -1))
    W_o = p.out_weight.unflatten(1, (H, -1)).transpose(0, 1)
    b_o = None if p.out_bias is None else (p.out_bias / H).expand(H, -1)  # of every key: P's rows add up to 1
    packed = ops.linear(source.states, p.in_weight[D:], None if p.in_bias is None else p.in_bias[D:], lengths=lengths)
    key, value = packed.unflatten(-1, (2, H, -1)).unbind(2)  # [B, Lk, H, d]
    absorbed = ops.linear(key, W_q.unflatten(0, (H, -1)).mT, lengths=lengths)  # [B, Lk, H, D]
    output = ops.linear(value, W_o, b_o, lengths=lengths)  # [B, Lk, H, D]
    scale = key.size(-1) ** -0.5
    return ops.absorbed_attention(
        x,
        absorbed.transpose(1, 2),
        output.transpose(1, 2),
        scale=scale,
        key_bias=None if b_q is None else (key * b_q).sum(-1).transpose(1, 2) * scale,
        key_weight=source.weighting,
        query_lengths=rows,
        key_lengths=lengths,
    )
