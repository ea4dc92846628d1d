from __future__ import annotations

from typing import cast

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import check_attention, check_key_weight, finite, for_backend


def weighted_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention whose probabilities are reweighted per key and renormalised.

    p_ij = softmax_j(scale q_i . k_j) over the allowed keys; P_ij = p_ij (m_j + 1e-10) / sum_k p_ik (m_k + 1e-10);
    out = P v. It equals softmax(s + log(m + 1e-10)); a row of zero weights is plain softmax. A query that may see
    no key (``key_lengths`` 0) gets zeros and passes no gradient. Differentiable in query, key, value and key_weight.
    Source: published ``MultiheadAttention`` with ``gauss_weight``.

    Args:
        query: [B, H, Lq, d]; without key and value all three packed, [B, L, 3, H, d], as one projection gives them.
        key: [B, H, Lk, d], the query's dtype; without value both packed, [B, Lk, 2, H, d].
        value: [B, H, Lk, d], the query's dtype.
        key_weight: m, [B, Lk] or, for K proposals of each of B / K sentences, [B / K, K, Lk]; >= 0, the query's dtype
            or float32; None weighs all keys alike.
        causal: query i sees keys 0 to i.
        key_lengths: [B] int64; keys from there on are padding. None: all keys are real.
        scale: default d ** -0.5.

    Returns:
        [B, H, Lq, d] in the query's dtype.
    """
    check = Arguments("weighted_attention")
    query, key, value = check_attention(check, query, key, value, key_lengths)
    key_weight = check_key_weight(check, key_weight)
    causal = check.flag("causal", causal)
    scale = query.size(-1) ** -0.5 if scale is None else finite(check, "scale", scale)
    query, key, value = for_backend("weighted_attention", query, key, value)
    arguments = (query, key, value, key_weight, causal, key_lengths, scale)
    return cast(Tensor, run("weighted_attention", query, *arguments))
