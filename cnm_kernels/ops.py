"""The public ops: what each computes, what it takes, what it refuses.

Every function checks its arguments, applies the autocast rule, and hands over to the backend that ``registry`` picks.
Shapes: B batch, H heads, Lq/Lk query/key positions, d head dim, M rows of L tokens, D model width, V vocabulary.
All ops take float32, bfloat16 and float16 (float64 too where the torch backend runs), accumulate in float32 or wider,
are deterministic bit for bit, and are differentiable once. They raise ``TypeError`` for a wrong dtype and
``ValueError`` for a wrong shape, device or number; each message names the argument, what was given and what is
expected.

Under autocast, attention and ``linear_nll`` cast their matrix operands to the autocast dtype, ``linear`` its input; the
other ops run in the dtype they are given. Losses come back in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from cnm_kernels import reference, registry
from cnm_kernels.autograd.attention import unpack
from cnm_kernels.checks import Arguments
from cnm_kernels.constants import BETA_1, BETA_2, LABEL_SMOOTHING, LAYER_NORM_EPS, MIN_PROPOSAL_WIDTH, MIN_WIDTH


def _run(op: str, tensor: Tensor, *arguments: Any) -> Any:
    """Calls the backend's function."""
    function = registry.implementation(op, tensor)
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward_mode and function is not getattr(reference, op) and any(map(_has_tangent, arguments)):
        raise NotImplementedError(f'{op}: forward-mode derivatives want use_backend("torch")')
    return _outside_autocast(function, tensor, *arguments)


def _has_tangent(argument: Any) -> bool:
    """Whether its forward-mode derivative is asked for, at this level of ``torch.func`` or one below."""
    if not isinstance(argument, Tensor):
        return False
    tensor = argument
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    forward = {level.level() for level in retrieve_all_functorch_interpreters() if level.key() == TransformType.Jvp}
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.maybe_get_level(tensor) in forward:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def _outside_autocast(function: Callable[..., Any], tensor: Tensor, *arguments: Any) -> Any:
    """The ops fix their own precision."""
    if _autocasts(tensor.device.type):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*arguments)
    return function(*arguments)


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Matrix operands in the autocast dtype where autocast is on; float64 is left alone, as PyTorch leaves it."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors  # the checks that follow name the culprit
    device = tensors[0].device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def gaussian_mask(
    center: Tensor,
    width: Tensor,
    length: int,
    *,
    alpha: float | None = None,
    sigma: float | None = None,
    min_width: float | None = None,
    complement: bool = False,
) -> Tensor:
    """A Gaussian over time, sampled at ``length`` equally spaced points of the video.

    With ``alpha``: g_j = exp(-alpha (x_j - center)^2 / max(width, min_width)^2), x = linspace(0, 1, length); a length
    of 1 has x = 0. With ``sigma``: the same Gaussian given by its standard deviation max(width, min_width) / sigma and
    divided by its largest sample, g_j / max_k g_k, whose gradient counts. The gradient to ``width`` is 0 below
    ``min_width`` and passes at equality, as ``torch.clamp`` does. Source: ``alpha``: CNM eq. 3 (published
    ``generate_gauss_weight``); ``sigma``: the function of that name in CPL, where [B, K] centers are K proposals.

    Args:
        center: [...], fraction of the video; may lie outside [0, 1].
        width: [...], fraction of the video.
        length: number of points, >= 0.
        alpha: sharpness (published: 5.5 Charades-STA, 5 ActivityNet).
        sigma: standard deviations in a width, > 0 (published: 9), instead of ``alpha``. Such masks are computed by
            PyTorch whatever the backend: they are small, and a tensor as weight goes anywhere.
        min_width: widths below are clamped to it, > 0; default 0.1, with ``sigma`` 0.01, as published.
        complement: give 1 - g, the easy negative's weight.

    Returns:
        [..., length] in the dtype of ``center``.
    """
    check = Arguments("gaussian_mask")
    check.floating("center", center, "...")
    check.floating("width", width, "...")
    length = check.whole("length", length, 0, 1 << 31)
    complement = check.flag("complement", complement)
    if (alpha is None) == (sigma is None):
        raise ValueError(f"gaussian_mask: give either alpha or sigma, got alpha={alpha} and sigma={sigma}")
    if alpha is not None:
        min_width = MIN_WIDTH if min_width is None else min_width
        _check_gaussian(check, alpha, min_width)
        return _run("gaussian_mask", center, center, width, length, alpha, min_width, complement)
    assert sigma is not None
    min_width = MIN_PROPOSAL_WIDTH if min_width is None else min_width
    check.number("sigma", sigma, -float("inf"), float("inf"))
    if not 0 < sigma < float("inf"):
        raise ValueError(f"gaussian_mask: sigma must be a finite number above 0, got {sigma}")
    _check_gaussian(check, sigma**2 / 2, min_width)
    arguments = (center, width, length, sigma**2 / 2, min_width, complement)
    return _outside_autocast(reference.normalized_gaussian_mask, center, *arguments)


def negative_gaussian_masks(
    center: Tensor, width: Tensor, length: int, *, sigma: float, growth: float | Tensor
) -> tuple[Tensor, Tensor]:
    """CPL's easy negatives: Gaussians in what a proposal leaves free on its left and on its right.

    left = growth / 2 max(center - width / 2, 0) is center and width of the one, right = growth / 2 max(1 - center -
    width / 2, 0) the width of the other, centered at 1 - right; both as ``gaussian_mask`` with ``sigma`` / 2.
    Differentiable in center and width. Source: published CPL, ``negative_proposal_mining``.

    Args:
        center, width, length, sigma: as in ``gaussian_mask``, of the positive.
        growth: how far the negatives have grown, in [0, 1] (published: min(epoch / max_epoch, 1) ** gamma); or a
            tensor [] of that, for a CUDA graph to read anew.

    Returns:
        (left, right), [..., length] each in the dtype of ``center``.
    """
    check = Arguments("negative_gaussian_masks")
    check.floating("center", center, "...")
    check.floating("width", width, "...")
    if isinstance(growth, Tensor):
        check.floating("growth", growth, "", own_dtype=True)
    else:
        check.number("growth", growth, 0, 1)
    left = (center - width / 2).clamp(min=0) * (growth / 2)
    right = (1 - center - width / 2).clamp(min=0) * (growth / 2)
    return (
        gaussian_mask(left, left, length, sigma=sigma / 2),
        gaussian_mask(1 - right, right, length, sigma=sigma / 2),
    )


@overload
def weighted_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_weight: Tensor | None = ...,
    *,
    causal: bool = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def weighted_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_weight: Tensor | None = ...,
    *,
    causal: bool = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def weighted_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
            or float32; None weighs all keys alike. A weight of -1e-10 leaves its key out.
        causal: query i sees keys 0 to i.
        key_lengths: [B] int64; keys from there on are padding. None: all keys are real.
        scale: default d ** -0.5.
        return_weights: also return P averaged over the heads.

    Returns:
        out [B, H, Lq, d]; with ``return_weights`` the pair (out, weights [B, Lq, Lk]).
    """
    check = Arguments("weighted_attention")
    query, key, value = _check_attention(check, query, key, value, key_lengths)
    if key_weight is not None:
        if isinstance(key_weight, Tensor) and key_weight.dim() == 3:
            key_weight = key_weight.flatten(0, 1)
        check.floating("key_weight", key_weight, "B Lk", own_dtype=True)
    causal, return_weights = check.flag("causal", causal), check.flag("return_weights", return_weights)
    scale = query.size(-1) ** -0.5 if scale is None else _finite(check, "scale", scale)
    query, key, value = _for_backend("weighted_attention", query, key, value)
    arguments = (query, key, value, key_weight, causal, key_lengths, scale, return_weights)
    out, weights = _run("weighted_attention", query, *arguments)
    return (out, weights) if return_weights else out


@overload
def gaussian_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    center: Tensor,
    width: Tensor,
    *,
    alpha: float,
    min_width: float = ...,
    complement: bool = ...,
    causal: bool = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def gaussian_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    center: Tensor,
    width: Tensor,
    *,
    alpha: float,
    min_width: float = ...,
    complement: bool = ...,
    causal: bool = ...,
    key_lengths: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gaussian_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    center: Tensor,
    width: Tensor,
    *,
    alpha: float,
    min_width: float = MIN_WIDTH,
    complement: bool = False,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``weighted_attention`` whose key weight is ``gaussian_mask(center, width, Lk)``, without the mask in memory.

    Differentiable in query, key, value, center and width. Source: CNM eq. 5.

    Args:
        query, key, value: as in ``weighted_attention``, packed or not.
        center, width: [B] or, for K proposals of each of B / K sentences, [B / K, K]; fraction of the video, the
            query's dtype or float32.
        alpha, min_width, complement: as in ``gaussian_mask``.
        causal, key_lengths, scale, return_weights: as in ``weighted_attention``.

    Returns:
        out [B, H, Lq, d]; with ``return_weights`` the pair (out, weights [B, Lq, Lk]).
    """
    check = Arguments("gaussian_attention")
    query, key, value = _check_attention(check, query, key, value, key_lengths)
    if isinstance(center, Tensor) and isinstance(width, Tensor) and center.shape == width.shape and center.dim() == 2:
        center, width = center.flatten(), width.flatten()
    check.floating("center", center, "B", own_dtype=True)
    check.floating("width", width, "B", own_dtype=True)
    _check_gaussian(check, alpha, min_width)
    scale = query.size(-1) ** -0.5 if scale is None else _finite(check, "scale", scale)
    causal, return_weights = check.flag("causal", causal), check.flag("return_weights", return_weights)
    gaussian = (center, width, alpha, min_width, check.flag("complement", complement))
    query, key, value = _for_backend("gaussian_attention", query, key, value)
    arguments = (query, key, value, *gaussian, causal, key_lengths, scale, return_weights)
    out, weights = _run("gaussian_attention", query, *arguments)
    return (out, weights) if return_weights else out


def branched_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    key_weights: Tensor,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``weighted_attention`` of the same operands under several weightings of the keys, its scores computed once.

    The branches of CNM's second decoding enter their first layer so, the positive with g, the hard negative with ones
    and the easy one with 1 - g. Differentiable in query, key, value and key_weights.

    Args:
        query, key, value: as in ``weighted_attention``, packed or not.
        key_weights: [n, B, Lk], n >= 1, >= 0, the query's dtype or float32.
        causal, key_lengths, scale: as in ``weighted_attention``.

    Returns:
        [n, B, H, Lq, d] in the query's dtype.
    """
    check = Arguments("branched_attention")
    query, key, value = _check_attention(check, query, key, value, key_lengths)
    check.floating("key_weights", key_weights, "n B Lk", own_dtype=True)
    if key_weights.size(0) == 0:
        raise ValueError(f"branched_attention: key_weights must hold a branch, got shape {list(key_weights.shape)}")
    causal = check.flag("causal", causal)
    scale = query.size(-1) ** -0.5 if scale is None else _finite(check, "scale", scale)
    query, key, value = _for_backend("branched_attention", query, key, value)
    arguments = (query, key, value, key_weights, causal, key_lengths, scale)
    return cast(Tensor, _run("branched_attention", query, *arguments))


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
    given = _autocast(query, key) if value is None else _autocast(query, key, value)
    check.floating("query", given[0], "B Lq D")
    check.floating("key", given[1], "B H Lk D")
    if value is not None:
        check.floating("value", given[2], "B H Lk D")
    check.number("scale", scale, -float("inf"), float("inf"))
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
    return cast(Tensor, _run("absorbed_attention", given[0], *arguments))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """A linear layer, x W^T + b; with ``relu`` negative results are 0.

    Unlike ``torch.nn.functional.linear`` it takes narrow x with float32 parameters, whose gradients then come back in
    float32: training keeps master weights without casting them. It can leave padding out, which then costs nothing,
    and multiply groups of columns (attention's heads) each with a weight of its own. Differentiable in x, weight and
    bias.

    Args:
        x: [..., K], with a grouped weight [..., G, K]; with lengths [B, L, K] or [B, L, G, K].
        weight: [M, K] or [G, M, K], the dtype of x or float32, in any strides.
        bias: [M] or [G, M], likewise.
        lengths: [B] int64; x[b, lengths[b]:] is padding: its results are 0, and it takes part in no gradient.

    Returns:
        [..., M] or [..., G, M] in the dtype of x.
    """
    check = Arguments("linear")
    (x,) = _autocast(x)
    grouped = isinstance(weight, Tensor) and weight.dim() == 3
    group = "G " if grouped else ""
    if lengths is None:
        check.floating("x", x, f"... {group}K")
    else:
        check.floating("x", x, f"B L {group}K")
        check.integer("lengths", lengths, "B")
    check.floating("weight", weight, f"{group}M K", own_dtype=True)
    if bias is not None:
        check.floating("bias", bias, f"{group}M", own_dtype=True)
        if bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
    return _run("linear", x, x, weight, bias, check.flag("relu", relu), lengths)


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = ...,
    return_accuracy: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = ...,
    return_accuracy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = LABEL_SMOOTHING,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label-smoothed negative log likelihood of a linear layer over the vocabulary, averaged per row.

    Per token (1-e)(lse - z_y) + e (lse - mean_v z_v) with z = hidden W^T + b; averaged over the first
    ``valid_lengths[m]`` tokens of row m (a length beyond L counts as L; a row of length 0 has nll 0 and no gradient).
    Differentiable in hidden, weight and bias. Source: published ``cal_nll_loss`` on ``fc_rec``.

    Args:
        hidden: [M, L, D].
        weight: [V, D], bias: [V], the dtype of ``hidden`` or float32; their gradients come in their own.
        target: [M, L] int64 in [0, V); not read beyond the row's length.
        valid_lengths: [M] int64.
        label_smoothing: e, in [0, 1].
        return_accuracy: also return the share of valid tokens whose most likely word is the target.

    Returns:
        nll [M], float32 (float64 for float64); with ``return_accuracy`` the pair (nll, accuracy [M]).
    """
    check = Arguments("linear_nll")
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check.floating("hidden", hidden, "M L D")
    _check_vocabulary(check, weight, bias, label_smoothing)
    check.integer("target", target, "M L")
    check.integer("valid_lengths", valid_lengths, "M")
    return_accuracy = check.flag("return_accuracy", return_accuracy)
    arguments = (hidden, weight, bias, target, valid_lengths, label_smoothing, return_accuracy)
    nll, accuracy = _run("linear_nll", hidden, *arguments)
    return (nll, accuracy) if return_accuracy else nll


def intra_video_contrastive_loss(
    positive: Tensor, hard: Tensor, easy: Tensor, *, beta_1: float = BETA_1, beta_2: float = BETA_2
) -> Tensor:
    """mean relu(positive - hard + beta_1) + mean relu(positive - easy + beta_2); the gradient at a kink is one half.

    Source: CNM eq. 11 (published ``ivc_loss``).

    Args:
        positive, hard, easy: nll of the three branches, [B] each.
        beta_1, beta_2: margins to the hard and the easy negative.

    Returns:
        Scalar, float32 (float64 for float64).
    """
    check = Arguments("intra_video_contrastive_loss")
    check.floating("positive", positive, "B")
    check.floating("hard", hard, "B")
    check.floating("easy", easy, "B")
    margins = _finite(check, "beta_1", beta_1), _finite(check, "beta_2", beta_2)
    return _run("intra_video_contrastive_loss", positive, positive, hard, easy, *margins)


def contrastive_reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    *,
    label_smoothing: float = LABEL_SMOOTHING,
    beta_1: float = BETA_1,
    beta_2: float = BETA_2,
) -> tuple[Tensor, Tensor]:
    """``linear_nll`` of the three branches and ``intra_video_contrastive_loss`` of the result, in one call.

    Args:
        hidden: [3, B, L, D]: positive, hard negative, easy negative.
        weight: [V, D], bias: [V], the dtype of ``hidden`` or float32; their gradients come in their own.
        target: [B, L] int64, valid_lengths: [B] int64, shared by the branches; as in ``linear_nll``.
        label_smoothing, beta_1, beta_2: as in the two ops.

    Returns:
        (loss [], nll [3, B]), float32 (float64 for float64); both differentiable in hidden, weight and bias.
    """
    check = Arguments("contrastive_reconstruction_loss")
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check.floating("hidden", hidden, "3 B L D")
    _check_vocabulary(check, weight, bias, label_smoothing)
    check.integer("target", target, "B L")
    check.integer("valid_lengths", valid_lengths, "B")
    margins = _finite(check, "beta_1", beta_1), _finite(check, "beta_2", beta_2)
    arguments = (hidden, weight, bias, target, valid_lengths, label_smoothing, *margins)
    return _run("contrastive_reconstruction_loss", hidden, *arguments)


def dropout(x: Tensor, p: float, *, seed: int | Tensor, offset: int = 0) -> Tensor:
    """Dropout whose mask depends on (seed, offset, element index) alone: the same on every backend and device.

    Each element is dropped with probability p (to the nearest 1/65,536), the rest scaled to keep the expectation.
    The mask is drawn from Philox4x32-10; ``reference.keep_mask`` states which bits decide which element.

    Args:
        x: any shape; elements count in row-major order whatever the strides.
        p: in [0, 1]; 0 returns x.
        seed: an int, or an int64 tensor of one element on x's device (which a CUDA graph can replay with new values).
        offset: which draw of this seed; use another for every dropout of a step.

    Returns:
        The shape and dtype of x.
    """
    check = Arguments("dropout")
    check.floating("x", x, "...")
    check.number("p", p, 0, 1)
    offset = check.whole("offset", offset, -(1 << 63), (1 << 63) - 1)
    return _run("dropout", x, x, p, _seed(check, seed, x), offset)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: int | Tensor,
    offset: int = 0,
    eps: float = LAYER_NORM_EPS,
    sample_indices: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension, the end of every transformer sublayer.

    Differentiable in x, residual, weight and bias.

    Args:
        x, residual: [..., D], one dtype. Where they differ, as under autocast, both run in the wider one.
        weight, bias: [D], the dtype of x or float32.
        p, seed, offset: as in ``dropout``; p = 0 draws nothing.
        eps: added to the variance.
        sample_indices: [B] int64, >= 0, for x [B, ..., D]: sample i drops what sample ``sample_indices[i]`` of a
            larger batch, of the same shape otherwise, would. None: each its own.

    Returns:
        [..., D] in the dtype of x (the wider one, where x and residual differ).
    """
    floating = all(isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided for t in (x, residual))
    if floating and x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check = Arguments("dropout_add_layer_norm")
    check.floating("x", x, "... D")
    check.floating("residual", residual, "... D")
    check.floating("weight", weight, "D", own_dtype=True)
    check.floating("bias", bias, "D", own_dtype=True)
    check.number("p", p, 0, 1)
    offset = check.whole("offset", offset, -(1 << 63), (1 << 63) - 1)
    check.number("eps", eps, 0, sys.float_info.max)
    arguments = (x, residual, weight, bias, p, _seed(check, seed, x), offset, eps, sample_indices)
    if sample_indices is None:
        return _run("dropout_add_layer_norm", x, *arguments)
    check.integer("sample_indices", sample_indices, "B")
    if x.dim() < 2 or x.size(0) != sample_indices.size(0):
        raise ValueError(
            f"dropout_add_layer_norm: sample_indices must hold an index for each sample of x {list(x.shape)}, got "
            f"{list(sample_indices.shape)}"
        )
    return _run("dropout_add_layer_norm", x, *arguments)


def _check_attention(
    check: Arguments, query: Tensor, key: Tensor | None, value: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The operands in the autocast dtype."""
    given = [query, *(operand for operand in (key, value) if operand is not None)]
    if key is None and value is not None:
        raise TypeError(f"{check.op}: value is given without key; give both, or pack both into key")
    given = list(_autocast(*given))
    if key is None:
        check.floating("query", given[0], "B Lk 3 H d")
    else:
        check.floating("query", given[0], "B H Lq d")
        check.floating("key", given[1], "B H Lk d" if value is not None else "B Lk 2 H d")
    if value is not None:
        check.floating("value", given[2], "B H Lk d")
    if key_lengths is not None:
        check.integer("key_lengths", key_lengths, "B")
    if given[0].size(-1) == 0:
        raise ValueError(f"{check.op}: query must have a head dim of at least 1, got shape {list(given[0].shape)}")
    return given[0], given[1] if key is not None else None, given[2] if value is not None else None


def _for_backend(
    op: str, query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Packed heads as they are where the backend takes them, else as views of each head's rows."""
    if value is not None or hasattr(registry.implementation(op, query), "takes_packed_heads"):
        return query, key, value
    query, key, value = unpack(query, key, value)
    return query, key, value


def _finite(check: Arguments, name: str, value: float) -> float:
    check.number(name, value, -sys.float_info.max, sys.float_info.max)
    return value


def _check_gaussian(check: Arguments, alpha: float, min_width: float) -> None:
    check.number("alpha", alpha, 0, float("inf"))
    check.above_zero("min_width", min_width)


def _check_vocabulary(check: Arguments, weight: Tensor, bias: Tensor, label_smoothing: float) -> None:
    check.floating("weight", weight, "V D", own_dtype=True)
    check.floating("bias", bias, "V", own_dtype=True)
    if weight.size(0) == 0:
        raise ValueError(f"{check.op}: weight must hold at least one word, got shape {list(weight.shape)}")
    check.number("label_smoothing", label_smoothing, 0, 1)


def _seed(check: Arguments, seed: int | Tensor, x: Tensor) -> Tensor:
    """The seed as an int64 tensor [] on x's device."""
    if not isinstance(seed, Tensor):
        seed = check.whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        return torch.tensor(seed, dtype=torch.int64, device=x.device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"{check.op}: seed must be an int or one int64 element on {x.device}, "
            f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed.reshape(())
