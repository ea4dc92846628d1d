"""The reference: every op's math in plain PyTorch, differentiated by autograd, on any device.

This file is the specification the other backends are tested against. Inputs in bfloat16 or float16 are computed in
float32 and rounded once at the end; float64 stays float64. Arguments arrive checked (see ``ops``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnm_kernels.constants import DROPOUT_LEVELS, KEY_WEIGHT_EPS
from cnm_kernels.parameter_uses import use
from cnm_kernels.registry import OPS as ALL_OPS

OPS = dict.fromkeys(("cpu", "cuda", "mps", "xpu", "meta"), ALL_OPS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOAD_ERRORS: dict[str, str] = {}


def _wide(tensor: Tensor) -> Tensor:
    """float64 as it is, anything narrower in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _before(lengths: Tensor | None, tensor: Tensor, dim: int) -> Tensor:
    """The tensor, wide, with zeros along ``dim`` from its sample's length on: what lies there may be anything."""
    tensor = _wide(tensor)
    if lengths is None:
        return tensor
    padding = torch.arange(tensor.size(dim), device=tensor.device) >= lengths[:, None]  # [B, L]
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = padding.shape
    return tensor.masked_fill(padding.view(shape), 0)


def gaussian_mask(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool, normalized: bool
) -> Tensor:
    """g_j = exp(-alpha (x_j - c)^2 / max(w, min_width)^2), x = linspace(0, 1, length); over its largest sample where
    ``normalized``; 1 - g for the complement."""
    c = _wide(center).unsqueeze(-1)  # [..., 1]
    w = _wide(width).unsqueeze(-1)
    w = torch.where(w < min_width, min_width, w)  # clamp's gradient at equality changed between versions of torch
    x = torch.linspace(0, 1, length, dtype=c.dtype, device=c.device)
    g = _relative_to_the_largest(x, c, w, alpha) if normalized else _bell(x, c, w, alpha)  # [..., length]
    return (1 - g if complement else g).to(center.dtype)


def _bell(x: Tensor, c: Tensor, w: Tensor, alpha: float) -> Tensor:
    far = _is_far(x - c, w, alpha)
    u = (x - c).masked_fill(far, 0) / torch.where(far, 1, w)  # divided first: w^2 may be 0 or infinite
    return torch.exp(-(alpha * u) * u).masked_fill(far, 0)


def _is_far(distance: Tensor, width: Tensor, alpha: float) -> Tensor:
    """Marks points where a Gaussian and its derivatives are 0 even in float64; tiny widths would give NaN there."""
    u = (distance / width).detach()
    return (alpha * u) * u > 800


def _relative_to_the_largest(x: Tensor, c: Tensor, w: Tensor, alpha: float) -> Tensor:
    """exp(-alpha (u^2 - u_p^2)), u = (x - c) / w, p where x is nearest to c; the difference of squares as a product."""
    if x.numel() == 0:
        return x + c
    peak = x[(x - c.detach().clamp(0, 1)).abs().argmin(-1, keepdim=True)]
    most = torch.finfo(x.dtype).max
    reach = x - c + (peak - c)
    endless = reach.isinf()
    reach = torch.where(endless, reach.detach().clamp(-most, most), reach) / torch.where(endless, 1, w)
    reach = reach.masked_fill((x == peak) & ~reach.isnan(), 0)  # multiplied by 0, as its gradient is
    above = (x - peak) / w * torch.where(reach.isnan(), reach, reach.clamp(-most, most))  # clamp's gradient of NaN is 0
    above = torch.where(above < 0, above - above.detach(), above)  # rounding, where two tie
    return torch.exp(-alpha * above)


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """P = p (m + eps) / sum_k p (m + eps), p = softmax(scale q k^T) over the allowed keys; out = P v."""
    weights = _weights_of_heads(query, key, key_weight, causal, key_lengths, scale)
    return (weights @ _before(key_lengths, value, 2)).to(query.dtype)  # [B, H, Lq, d]


def attention_weights(
    query: Tensor, key: Tensor, key_weight: Tensor | None, causal: bool, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """P of ``weighted_attention``, averaged over the heads."""
    return _weights_of_heads(query, key, key_weight, causal, key_lengths, scale).mean(1).to(query.dtype)


def _weights_of_heads(
    query: Tensor, key: Tensor, key_weight: Tensor | None, causal: bool, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """P [B, H, Lq, Lk] of ``weighted_attention``."""
    key_weight = None if key_weight is None else _before(key_lengths, key_weight, 1)
    scores = scale * (_wide(query) @ _before(key_lengths, key, 2).transpose(-1, -2))
    return _probabilities(scores, key_weight, causal, key_lengths)


def _probabilities(scores: Tensor, key_weight: Tensor | None, causal: bool, key_lengths: Tensor | None) -> Tensor:
    """P of scores [B, H, Lq, Lk]: softmax over the allowed keys, times m + eps, divided by its sum."""
    Lq, Lk = scores.shape[-2:]
    if Lk == 0:
        return scores
    allowed = torch.ones(Lq, Lk, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed.tril()
    if key_lengths is not None:
        within = torch.arange(Lk, device=scores.device) < key_lengths[:, None]  # [B, Lk]
        allowed = allowed & within[:, None, None, :]
    scores = scores.masked_fill(~allowed, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    exponentials = torch.exp(scores - highest)
    if key_weight is not None:
        exponentials = exponentials * (_wide(key_weight).to(scores.dtype) + KEY_WEIGHT_EPS)[:, None, None, :]
    total = exponentials.sum(-1, keepdim=True)
    shares = exponentials / torch.where(total == 0, 1, total).detach()  # a query without any key gets zeros
    # The gradient is taken of shares near 1: of a lone key with a small weight it is 0, and not a large rounding.
    total = shares.sum(-1, keepdim=True)
    return shares / torch.where(total == 0, 1, total)


def gaussian_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    width: Tensor,
    alpha: float,
    min_width: float,
    complement: bool,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """``weighted_attention`` whose key weight is ``gaussian_mask(center, width)`` (not rounded in between)."""
    mask = gaussian_mask(_wide(center), _wide(width), key.size(-2), alpha, min_width, complement, False)  # [B, Lk]
    return weighted_attention(query, key, value, mask, causal, key_lengths, scale)


def branched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weights: Tensor,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """``weighted_attention`` of the same operands under each of n rows of weights. [n, B, H, Lq, d]"""
    arguments = (causal, key_lengths, scale)
    return torch.stack([weighted_attention(query, key, value, weights, *arguments) for weights in key_weights])


def absorbed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_bias: Tensor | None,
    key_weight: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """out_i = sum_h P_hi v_h with P of the scores scale q_i . k_hj + b_hj; zeros for queries from query_lengths on."""
    q, k = _wide(query), _before(key_lengths, key, 2)
    v = k if value is None else _before(key_lengths, value, 2)
    key_bias = None if key_bias is None else _before(key_lengths, key_bias, 2)
    key_weight = None if key_weight is None else _before(key_lengths, key_weight, 1)
    if query_lengths is not None:
        padding = torch.arange(q.size(1), device=q.device)[:, None] >= query_lengths[:, None, None]  # [B, Lq, 1]
        q = q.masked_fill(padding, 0)  # what lies there may be anything
    scores = scale * (q.unsqueeze(1) @ k.transpose(-1, -2))  # [B, H, Lq, Lk]
    if key_bias is not None:
        scores = scores + _wide(key_bias).to(scores.dtype).unsqueeze(2)
    out = (_probabilities(scores, key_weight, False, key_lengths) @ v).sum(1)  # [B, Lq, D]
    return (out if query_lengths is None else out.masked_fill(padding, 0)).to(query.dtype)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """GPUs' libraries multiply narrow operands fast and accumulate in float32 all the same."""
    return x.dtype if x.is_cuda or x.is_meta else _wide(x).dtype  # meta tensors stand for a GPU's


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, lengths: Tensor | None) -> Tensor:
    """x W^T + b, or group by group of columns; negative values 0 with ``relu``; 0 in rows from lengths on."""
    dtype = _dtype_of_products(x)
    padding = None
    if lengths is not None:
        padding = torch.arange(x.size(1), device=x.device) >= lengths[:, None]  # [B, L]
        padding = padding.view(*padding.shape, *[1] * (x.dim() - 2))
        x = x.masked_fill(padding, 0)  # what lies there may be anything
    weight, bias = use(weight, dtype), None if bias is None else use(bias, dtype)
    if weight.dim() == 2:
        out = F.linear(x.to(dtype), weight, bias)
    else:
        out = torch.einsum("...gk,gmk->...gm", x.to(dtype), weight)
        out = out if bias is None else out + bias
    out = F.relu(out) if relu else out
    return (out if padding is None else out.masked_fill(padding, 0)).to(x.dtype)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    return_accuracy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per row the mean over its valid tokens of (1-e)(lse - z_y) + e (lse - mean_v z_v), z = h W^T + b."""
    hidden = _before(valid_lengths, hidden, 1)
    logits = hidden @ weight.to(hidden.dtype).T + bias.to(hidden.dtype)  # [M, L, V]
    L = logits.size(1)
    valid = torch.arange(L, device=hidden.device) < valid_lengths[:, None]  # [M, L]
    target = torch.where(valid, target, 0)
    log_probability = F.log_softmax(logits, -1)  # not z - lse: large logits swallow the logarithm
    of_target = log_probability.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    smooth = label_smoothing
    token_nll = -(1 - smooth) * of_target  # [M, L]
    if smooth > 0:  # words of bias -inf have a log probability that no factor of 0 makes one
        token_nll = token_nll - smooth * log_probability.mean(-1)
    count = valid_lengths.clamp(1, max(L, 1))
    nll = torch.where(valid, token_nll, 0).sum(-1) / count
    if not return_accuracy:
        return nll, None
    correct = (logits.argmax(-1) == target) & valid
    return nll, correct.sum(-1).to(nll.dtype) / count


def intra_video_contrastive_loss(positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float) -> Tensor:
    """mean relu(positive - hard + beta_1) + mean relu(positive - easy + beta_2), gradient 1/2 at the kink."""
    positive, hard, easy = _wide(positive), _wide(hard), _wide(easy)
    zero = torch.zeros_like(positive)
    hard_loss = torch.maximum(positive - hard + beta_1, zero).mean()
    return hard_loss + torch.maximum(positive - easy + beta_2, zero).mean()


def contrastive_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    beta_1: float,
    beta_2: float,
) -> tuple[Tensor, Tensor]:
    """``linear_nll`` of the stacked branches [3, B, L, D], then ``intra_video_contrastive_loss`` of its three rows."""
    _, B, L, D = hidden.shape
    rows = hidden.reshape(3 * B, L, D)
    nll, _ = linear_nll(rows, weight, bias, target.repeat(3, 1), valid_lengths.repeat(3), label_smoothing, False)
    nll = nll.view(3, B)
    return intra_video_contrastive_loss(nll[0], nll[1], nll[2], beta_1, beta_2), nll


def dropout(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    """x / (1 - p) where ``keep_mask`` keeps, else 0."""
    if p == 0:
        return x
    threshold = dropout_threshold(p)
    keep = keep_mask(x.numel(), threshold, seed, offset).view(x.shape)
    scale = DROPOUT_LEVELS / max(DROPOUT_LEVELS - threshold, 1)
    return torch.where(keep, _wide(x) * scale, 0).to(x.dtype)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    eps: float,
    sample_indices: Tensor | None = None,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) over the last dimension; sample i has the mask of sample_indices[i]."""
    wide, residual = _wide(x), _wide(residual)
    size = _power_for(torch.maximum(wide.abs(), residual.abs()), 100, 0)  # at which no sum of a row overflows
    wide = wide * size
    if sample_indices is None or p == 0 or x.numel() == 0:
        dropped = dropout(wide, p, seed, offset)
    else:
        numel = x[0].numel()
        element = sample_indices[:, None] * numel + torch.arange(numel, device=x.device)  # [B, numel]
        threshold = dropout_threshold(p)
        words = philox(element // 8, seed.reshape(()), offset)  # [B, numel, 4]
        word = words.gather(-1, (element % 8 // 2)[..., None])[..., 0]
        keep = (word >> (element % 2 * 16) & 0xFFFF) >= threshold
        scale = DROPOUT_LEVELS / max(DROPOUT_LEVELS - threshold, 1)
        dropped = torch.where(keep.view(x.shape), wide * scale, 0)
    total = residual * size + dropped
    centered = total - total.mean(-1, keepdim=True)
    again = _power_for(centered.abs().clamp_min(eps**0.5 * size), 4, 100)  # at which no square overflows or vanishes
    centered, root_eps = centered * again, eps**0.5 * size * again
    variance = centered.square().mean(-1, keepdim=True)
    normalized = centered * torch.rsqrt(variance + root_eps.square())
    out = (normalized * weight.to(total.dtype) + bias.to(total.dtype)).to(x.dtype)
    return (out, out) if twice else out


def _power_for(sizes: Tensor, goal: int, most: int) -> Tensor:
    """A power of two, [..., 1], that brings the largest of each row to about 2^goal; at most 2^most."""
    if sizes.numel() == 0:
        return torch.ones_like(sizes[..., :1])
    _, exponent = torch.frexp(sizes.detach().amax(-1, keepdim=True))
    return torch.exp2((goal - exponent).clamp_max(most).to(sizes.dtype))


def dropout_threshold(p: float) -> int:
    """How many of the 65,536 values of a 16-bit draw drop an element: p to the nearest 1/65,536."""
    return round(float(p) * DROPOUT_LEVELS)


def keep_mask(numel: int, threshold: int, seed: Tensor, offset: int) -> Tensor:
    """Marks the elements that dropout keeps: their 16 random bits are at least the threshold. [numel] bool

    Elements 8i to 8i+7 (in row-major order) take, in order, the low and high halves of the four words of
    Philox4x32-10 with counter (i low, i high, offset low, offset high) and key (seed low, seed high).
    """
    index = torch.arange((numel + 7) // 8, device=seed.device)
    words = philox(index, seed.reshape(()), offset)  # [N, 4]
    draws = torch.stack([words & 0xFFFF, words >> 16], -1)  # [N, 4, 2]
    return draws.view(-1)[:numel] >= threshold


def philox(index: Tensor, seed: Tensor, offset: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words per counter, as int64. [...] -> [..., 4]"""
    low = 0xFFFFFFFF
    c0, c1 = index & low, (index >> 32) & low
    c2, c3 = torch.full_like(c0, offset & low), torch.full_like(c0, (offset >> 32) & low)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, which keeps all 64 bits
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low) ^ c1 ^ k0,
            product1 & low,
            ((product0 >> 32) & low) ^ c3 ^ k1,
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], -1)
