"""Time-first multi-head attention with one packed input projection and a weight per key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        fast_weights: Any = None,
        gauss_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query [Lq, B, D], key and value [Lk, B, D] -> output [Lq, B, D], the heads' mean attention [B, Lq, Lk]."""
        (Lq, B, D), Lk, H = query.shape, key.size(0), self.num_heads
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).reshape(x.size(0), B * H, -1).transpose(0, 1)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        )
        scores = torch.bmm(q * self.head_dim**-0.5, k.transpose(1, 2))  # [B H, Lq, Lk]
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            padded = (key_padding_mask == 1)[:, None, None, :]
            by_head = scores.view(B, H, Lq, Lk)
            filled = (by_head if by_head.dtype == torch.float64 else by_head.float()).masked_fill(padded, -1e30)
            scores = filled.type_as(scores).view(B * H, Lq, Lk)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = torch.softmax(scores, -1, dtype=wide).type_as(scores)
        if gauss_weight is not None:
            weights = weights * (gauss_weight.repeat_interleave(H, 0).unsqueeze(1) + 1e-10)
            weights = weights / weights.sum(-1, keepdim=True)
        weights = F.dropout(weights, self.dropout, self.training)
        output = self.out_proj(torch.bmm(weights, v).transpose(0, 1).reshape(Lq, B, D))
        return output, weights.view(B, H, Lq, Lk).mean(1) if need_weights else None
