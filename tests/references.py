"""Every op by a second formula, independent of ``reference``: what the tests believe.

Each takes the public function's arguments and is differentiated by autograd; it computes in the dtype it is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnm_kernels import registry

MASK32 = 0xFFFFFFFF


def gaussian_mask(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float = 0.1, complement: bool = False
) -> tuple[Tensor, ...]:
    """Point by point."""
    clamped = torch.where(width < min_width, torch.full_like(width, min_width), width)
    points = []
    for j in range(length):
        x = j / (length - 1) if length > 1 else 0.0
        g = torch.exp(-alpha * ((x - center) / clamped) ** 2)
        points.append(1 - g if complement else g)
    return (torch.stack(points, -1) if points else center.new_zeros(*center.shape, 0),)


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The values by the weights of each head."""
    probability = _weights_of_heads(query, key, key_weight, causal, key_lengths, scale)
    return (torch.einsum("bhij,bhjd->bhid", probability, value),)


def attention_weights(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """The mean over the heads."""
    return (_weights_of_heads(query, key, *arguments, **options).sum(1) / query.size(1),)


def _weights_of_heads(
    query: Tensor,
    key: Tensor,
    key_weight: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(s + log(m + 1e-10)), by an explicit bias; queries that see no key give zeros."""
    B, _, Lq, d = query.shape
    Lk = key.size(2)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (d**-0.5 if scale is None else scale)
    if key_weight is not None:
        scores = scores + torch.log(key_weight.to(query.dtype) + 1e-10)[:, None, None, :]
    hidden = torch.zeros(B, 1, Lq, Lk, dtype=torch.bool, device=query.device)
    for b in range(B):
        for i in range(Lq):
            for_lengths = Lk if key_lengths is None else min(int(key_lengths[b]), Lk)
            last = min(i + 1, for_lengths) if causal else for_lengths
            hidden[b, 0, i, last:] = True
    probability = torch.softmax(scores.masked_fill(hidden, -1e30), -1)  # uniform where all is hidden: zeroed next
    return probability.masked_fill(hidden, 0)


def gaussian_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    width: Tensor,
    alpha: float,
    min_width: float = 0.1,
    complement: bool = False,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """``weighted_attention`` with the mask in memory."""
    (mask,) = gaussian_mask(center.to(query.dtype), width.to(query.dtype), key.size(2), alpha, min_width, complement)
    return weighted_attention(query, key, value, mask, causal, key_lengths, scale)


def branched_attention(
    query: Tensor, key: Tensor, value: Tensor, key_weights: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Every branch by itself."""
    branches = [weighted_attention(query, key, value, weights, **options)[0] for weights in key_weights.unbind(0)]
    return (torch.stack(branches),)


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
) -> tuple[Tensor, ...]:
    """Sample by sample and head by head, on what is real of each."""
    value = key if value is None else value
    outs = []
    for b, (q, keys, values) in enumerate(zip(query, key, value, strict=True)):
        queries = len(q) if query_lengths is None else min(int(query_lengths[b]), len(q))
        n = key.size(2) if key_lengths is None else min(int(key_lengths[b]), key.size(2))
        out = torch.zeros_like(q[:queries])
        for h in range(len(keys)):
            scores = q[:queries] @ keys[h, :n].T * scale
            if key_bias is not None:
                scores = scores + key_bias[b, h, :n].to(q.dtype)
            if key_weight is not None:
                scores = scores + torch.log(key_weight[b, :n].to(q.dtype) + 1e-10)
            out = out + torch.softmax(scores, -1) @ values[h, :n]
        outs.append(torch.cat([out, q.new_zeros(len(q) - queries, q.size(1))]))
    return (torch.stack(outs) if outs else query * key.sum() * value.sum(),)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, lengths: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Group by group, and of padded samples the real rows."""
    if lengths is not None:
        rows = []
        for row, n in zip(x, lengths.tolist(), strict=True):
            (real,) = linear(row[:n], weight, bias, relu)
            rows.append(torch.cat([real, real.new_zeros(len(row[n:]), *real.shape[1:])]))
        return (torch.stack(rows),)
    if weight.dim() == 3:
        biases = [None] * len(weight) if bias is None else list(bias)
        groups = [linear(*group, relu)[0] for group in zip(x.unbind(-2), weight, biases, strict=True)]
        if not groups:  # nothing, of the right shape and with a gradient to each
            nothing = x.sum(-1, keepdim=True) * weight.sum(-1)
            return (nothing if bias is None else nothing + bias,)
        return (torch.stack(groups, -2),)
    out = torch.einsum("...k,mk->...m", x, weight.to(x.dtype))
    if bias is not None:
        out = out + bias.to(x.dtype)
    return (out * (out > 0) if relu else out,)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float = 0.1,
    return_accuracy: bool = False,
) -> tuple[Tensor, ...]:
    """Row by row through ``F.cross_entropy``, whose smoothing spreads over the whole vocabulary too."""
    nll, accuracy = [], []
    for row, labels, length in zip(hidden, target, valid_lengths.tolist(), strict=True):
        logits = F.linear(row[:length], weight, bias)
        labels = labels[:length]
        tokens = max(len(labels), 1)
        nll.append(F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum") / tokens)
        accuracy.append((logits.argmax(-1) == labels).sum().to(hidden.dtype) / tokens)
    if not nll:  # no rows: an empty result that still depends on everything
        nll = accuracy = [hidden.sum() * weight.sum() * bias.sum()]
        return (torch.stack(nll)[:0],) * (2 if return_accuracy else 1)
    return (torch.stack(nll), torch.stack(accuracy)) if return_accuracy else (torch.stack(nll),)


def intra_video_contrastive_loss(
    positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float = 0.1, beta_2: float = 0.15
) -> tuple[Tensor, ...]:
    """relu(x) as (x + |x|) / 2, whose gradient at 0 is one half."""
    hinges = [positive - hard + beta_1, positive - easy + beta_2]
    return (sum(((x + x.abs()) / 2).sum() for x in hinges) / len(positive),)


def contrastive_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float = 0.1,
    beta_1: float = 0.1,
    beta_2: float = 0.15,
) -> tuple[Tensor, ...]:
    """Branch by branch."""
    branches = [linear_nll(h, weight, bias, target, valid_lengths, label_smoothing)[0] for h in hidden]
    return *intra_video_contrastive_loss(*branches, beta_1, beta_2), torch.stack(branches)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011) in plain integers: four 32-bit words."""
    words, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(words[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(words[2] * 0xCD9E8D57, 1 << 32)
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return words


def keep(numel: int, p: float, seed: int, offset: int) -> list[bool]:
    """Element 8 i + j is kept when the j-th 16-bit piece (low half first) of draw i reaches p in 65,536ths."""
    key = (seed & MASK32, (seed >> 32) & MASK32)
    pieces: list[int] = []
    for i in range((numel + 7) // 8):
        counter = (i & MASK32, i >> 32, offset & MASK32, (offset >> 32) & MASK32)
        for word in philox4x32(counter, key):
            pieces += [word & 0xFFFF, word >> 16]
    return [piece >= round(p * 65536) for piece in pieces[:numel]]


def dropout(x: Tensor, p: float, seed: int | Tensor, offset: int = 0) -> tuple[Tensor, ...]:
    """Kept elements are scaled by the inverse of the rate at which 16 bits keep them."""
    dropped = round(p * 65536)
    mask = torch.tensor(keep(x.numel(), p, int(seed), offset), dtype=torch.bool, device=x.device).view(x.shape)
    return (x * mask * (65536 / (65536 - dropped) if dropped < 65536 else 0.0),)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    eps: float = 1e-5,
    sample_indices: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Mean and variance spelt out; of a larger batch the samples asked for."""
    if sample_indices is None or len(sample_indices) == 0:
        total = residual + dropout(x, p, seed, offset)[0]
    else:
        scale = torch.ones(int(sample_indices.max()) + 1, *x.shape[1:], dtype=x.dtype, device=x.device)
        total = residual + x * dropout(scale, p, seed, offset)[0][sample_indices]
    centered = total - total.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return (centered / deviation * weight.to(x.dtype) + bias.to(x.dtype),)


REFERENCES = {op: globals()[op] for op in registry.OPS}
