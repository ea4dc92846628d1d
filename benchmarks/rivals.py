"""The strongest ways to compute our ops from PyTorch's parts, each as a practitioner who cares about speed writes it.

Each function takes the named tensors of a case and returns what the public op returns. None copies without need; where
PyTorch offers several ways (logsumexp, log_softmax or cross_entropy, say), the fastest one measured is here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnm_kernels.constants import BETA_1, BETA_2, KEY_WEIGHT_EPS, LABEL_SMOOTHING, MIN_WIDTH

LINEAR_CROSS_ENTROPY_MISSING = (
    None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"
)

# ---- attention ----


def gaussian(center: Tensor, width: Tensor, length: int, alpha: float) -> Tensor:
    """[B, length], as published."""
    x = torch.linspace(0, 1, length, dtype=center.dtype, device=center.device)
    return torch.exp(-alpha * (x - center[:, None]).square() / width[:, None].clamp(min=MIN_WIDTH).square())


def eager_gaussian_attention(
    query: Tensor, key: Tensor, value: Tensor, center: Tensor, width: Tensor, *, alpha: float, causal: bool
) -> Tensor:
    """The published formulation: softmax, reweighted by the Gaussian and renormalised."""
    scores = torch.matmul(query * query.size(-1) ** -0.5, key.transpose(-1, -2))  # [B, H, Lq, Lk]
    if causal:
        scores = scores.masked_fill(_future(scores), -torch.inf)
    probabilities = F.softmax(scores, dim=-1)
    mask = gaussian(center, width, key.size(-2), alpha).to(query.dtype) + KEY_WEIGHT_EPS
    weighted = probabilities * mask[:, None, None, :]
    return torch.matmul(weighted / weighted.sum(-1, keepdim=True), value)


def sdpa_gaussian_attention(
    query: Tensor, key: Tensor, value: Tensor, center: Tensor, width: Tensor, *, alpha: float, causal: bool
) -> Tensor:
    """SDPA with log(m + 1e-10) as a mask that requires a gradient."""
    bias = torch.log(gaussian(center, width, key.size(-2), alpha) + KEY_WEIGHT_EPS).to(query.dtype)[:, None, None, :]
    if causal:
        bias = bias.masked_fill(_future(query.new_empty(query.size(-2), key.size(-2))), -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def augmented_gaussian_attention(
    query: Tensor, key: Tensor, value: Tensor, center: Tensor, width: Tensor, *, alpha: float, causal: bool
) -> Tensor:
    """R1 on the Gaussian."""
    bias = torch.log(gaussian(center, width, key.size(-2), alpha) + KEY_WEIGHT_EPS)
    return sdpa_with_key_bias(query, key, value, bias, causal)


def sdpa_with_key_bias(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, causal: bool) -> Tensor:
    """R1: plain SDPA on q' = [q, 1], k' = [k, bias / scale], v' = [v, 0], with key_bias [B, Lk]: no mask, and the last
    column of dK' is the gradient of the bias. In narrow dtypes the bias is split over two columns, high and low part.
    """
    B, H, Lk, d = key.shape
    scale = d**-0.5
    bias = key_bias / scale
    columns = bias.to(key.dtype)[..., None]
    if columns.dtype != bias.dtype:
        low = (bias.detach() - columns.detach()[..., 0].to(bias.dtype)).to(key.dtype)
        columns = torch.cat([columns, low[..., None]], -1)
    extra = columns.size(-1)
    query = torch.cat([query, query.new_ones(*query.shape[:-1], extra)], -1)
    key = torch.cat([key, columns[:, None].expand(B, H, Lk, extra)], -1)
    value = F.pad(value, (0, extra))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)[..., :d]


def eager_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    scores = torch.matmul(query * query.size(-1) ** -0.5, key.transpose(-1, -2))
    if causal:
        scores = scores.masked_fill(_future(scores), -torch.inf)
    return torch.matmul(F.softmax(scores, dim=-1), value)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _future(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


# ---- contrastive reconstruction loss ----
# hidden [3, B, L, D], weight [V, D], bias [V], target [B, L], valid_lengths [B] -> (loss [], nll [3, B])


def eager_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """The published formulation: logits of every row, padding too."""
    logits = F.linear(hidden, weight, bias).flatten(0, 2)
    token_nll = F.cross_entropy(logits, target.flatten().repeat(3), reduction="none", label_smoothing=LABEL_SMOOTHING)
    return contrast(_mean_of_valid(token_nll.view(hidden.shape[:3]), valid_lengths))


def eager_loss_packed(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """Eager on the valid rows alone."""
    rows, words, places = _pack(hidden, target, valid_lengths)
    logits = F.linear(rows, weight, bias)
    token_nll = F.cross_entropy(logits, words, reduction="none", label_smoothing=LABEL_SMOOTHING)
    return contrast(_mean_of_valid(_unpack(token_nll, places, hidden), valid_lengths))


def linear_cross_entropy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """R2: PyTorch's own fusion of the linear layer and the loss; its reference path, which is the faster one here."""
    token_nll = F.linear_cross_entropy(
        hidden.flatten(0, 2),
        weight,
        target.flatten().repeat(3),
        linear_bias=bias,
        reduction="none",
        label_smoothing=LABEL_SMOOTHING,
    )
    return contrast(_mean_of_valid(token_nll.view(hidden.shape[:3]), valid_lengths))


def linear_cross_entropy_loss_packed(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """R2 on the valid rows alone."""
    rows, words, places = _pack(hidden, target, valid_lengths)
    token_nll = F.linear_cross_entropy(
        rows, weight, words, linear_bias=bias, reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    return contrast(_mean_of_valid(_unpack(token_nll, places, hidden), valid_lengths))


def chunked_linear_cross_entropy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """R2 in chunks, so that the logits are never whole. The chunked path knows no label smoothing:
    (1-e)(lse - z_y) + e (lse - mean z) = (lse - z_y) + e (z_y - mean z).
    """
    words = target.flatten().repeat(3)
    rows = hidden.flatten(0, 2)
    options = torch.nn.LinearCrossEntropyOptions()
    token_nll = F.linear_cross_entropy(rows, weight, words, linear_bias=bias, reduction="none", options=options)
    target_logit = (rows * F.embedding(words, weight)).sum(-1) + bias[words]
    mean_logit = torch.mv(rows, weight.mean(0)) + bias.mean()
    token_nll = token_nll + LABEL_SMOOTHING * (target_logit - mean_logit)
    return contrast(_mean_of_valid(token_nll.view(hidden.shape[:3]), valid_lengths))


def linear_products(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, ...]:
    """The matrix products of the loss on its valid rows and nothing else: z, then dh and dW with z in dz's place."""
    rows, _, _ = _pack(hidden.detach(), target, valid_lengths)
    return Products.apply(hidden, weight, bias, rows)


class Products(torch.autograd.Function):
    """z = h W^T + b; backward z W and z^T h, whatever gradient comes in."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows):  # type: ignore[no-untyped-def]
        logits = F.linear(rows, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, rows, logits)
        return logits.new_zeros((), dtype=torch.float32), hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        hidden, weight, bias, rows, logits = ctx.saved_tensors
        products = logits @ weight, logits.T @ rows
        return hidden, products[1], bias, None  # what else is handed back is at hand and costs nothing


def _pack(hidden: Tensor, target: Tensor, valid_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Valid rows [N, D] of the three branches, their targets [N] and their places among all rows [N]."""
    valid = torch.arange(target.size(1), device=target.device) < valid_lengths[:, None]  # [B, L]
    places = valid.repeat(3, 1).flatten().nonzero().squeeze(-1)
    return hidden.flatten(0, 2).index_select(0, places), target[valid].repeat(3), places


def _unpack(token_nll: Tensor, places: Tensor, hidden: Tensor) -> Tensor:
    everywhere = token_nll.new_zeros(hidden.shape[:3].numel())
    return everywhere.index_copy(0, places, token_nll).view(hidden.shape[:3])


def _mean_of_valid(token_nll: Tensor, valid_lengths: Tensor) -> Tensor:
    """[3, B, L] -> [3, B], in float32 as the published loss under autocast."""
    valid = torch.arange(token_nll.size(-1), device=token_nll.device) < valid_lengths[:, None]  # [B, L]
    return token_nll.float().masked_fill(~valid, 0).sum(-1) / valid_lengths


def contrast(nll: Tensor) -> tuple[Tensor, ...]:
    positive, hard, easy = nll
    zero = torch.zeros_like(positive)
    hinge = torch.max(positive - hard + BETA_1, zero).mean() + torch.max(positive - easy + BETA_2, zero).mean()
    return hinge, nll


# ---- dropout, LayerNorm ----


def eager_dropout(x: Tensor, *, p: float) -> Tensor:
    return F.dropout(x, p)


def eager_dropout_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, p), x.shape[-1:], weight, bias)
