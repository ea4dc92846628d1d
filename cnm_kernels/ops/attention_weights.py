from __future__ import annotations

from typing import cast

from torch import Tensor

from cnm_kernels.checks import Arguments
from cnm_kernels.ops._call import run
from cnm_kernels.ops._checks import check_attention, check_key_weight, finite


def attention_weights(
    query: Tensor,
    key: Tensor,
    key_weight: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The probabilities that ``weighted_attention`` weighs its values with, averaged over the heads.

    For looking at attention maps, or for a loss on them: a training step without either has no use for it.
    Differentiable in query, key and key_weight.

    Args:
        query: [B, H, Lq, d].
        key: [B, H, Lk, d], the query's dtype.
        key_weight, causal, key_lengths, scale: as in ``weighted_attention``. To see ``gaussian_attention``'s weights,
            give ``gaussian_mask(center, width, Lk)``.

    Returns:
        [B, Lq, Lk] in the query's dtype; each row adds up to 1, or to 0 for a query that sees no key.
    """
    check = Arguments("attention_weights")
    query, packed, _ = check_attention(check, query, key, key, key_lengths)
    key = cast(Tensor, packed)
    key_weight = check_key_weight(check, key_weight)
    causal = check.flag("causal", causal)
    scale = query.size(-1) ** -0.5 if scale is None else finite(check, "scale", scale)
    return cast(Tensor, run("attention_weights", query, query, key, key_weight, causal, key_lengths, scale))
