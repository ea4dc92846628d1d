from __future__ import annotations

from typing import cast

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import autocast, run
from cnm_kernels.ops._checks import finite


def absorbed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention on states of the model's width, the heads' projections absorbed into one side; its heads are added up.

    out_i = sum_h P_hi v_h, with P_h the probabilities of ``weighted_attention`` for scores scale q_i . k_hj + b_hj.
    Since (W_q x) . (W_k y) = x . (W_q^T W_k y), a layer whose few keys have taken W_q^T (and whose values W_o) reads
    its many queries unprojected. The other way round, where queries are few: the H queries of a position, each with
    its head's W_k^T absorbed, are H rows of one head whose keys and values are both the states attended to.
    Differentiable in query, key, value, key_bias and key_weight.

    Args:
        query: [B, Lq, D].
        key: [B, H, Lk, D], the query's dtype.
        value: [B, H, Lk, D], the query's dtype; None: the keys are the values.
        scale: of the scores: d ** -0.5 of the head dim that was absorbed.
        key_bias: b, [B, H, Lk], added to the scores; the query's dtype or float32.
        key_weight: m, [B, Lk], as in ``weighted_attention``.
        query_lengths: [B] int64; queries from there on are padding: they give zeros and take part in no gradient.
        key_lengths: [B] int64, as in ``weighted_attention``.

    Returns:
        [B, Lq, D] in the query's dtype.
    """
    check = Arguments("absorbed_attention")
    given = autocast(query, key) if value is None else autocast(query, key, value)
    check.floating("query", given[0], "B Lq D")
    check.floating("key", given[1], "B H Lk D")
    if given[1].size(1) == 0:
        raise ValueError(f"absorbed_attention: key must have at least one head, got shape {list(given[1].shape)}")
    if value is not None:
        check.floating("value", given[2], "B H Lk D")
    finite(check, "scale", scale)
    if key_bias is not None:
        check.floating("key_bias", key_bias, "B H Lk", own_dtype=True)
    if key_weight is not None:
        check.floating("key_weight", key_weight, "B Lk", own_dtype=True)
    if query_lengths is not None:
        check.integer("query_lengths", query_lengths, "B")
    if key_lengths is not None:
        check.integer("key_lengths", key_lengths, "B")
    value = None if value is None else given[2]
    arguments = (*given[:2], value, key_bias, key_weight, query_lengths, key_lengths, float(scale))
    return cast(Tensor, run("absorbed_attention", given[0], *arguments))
