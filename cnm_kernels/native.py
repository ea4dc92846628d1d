"""The compiled CPU kernels: loads the extension, gives its ops shapes for tracing and gradients, and calls them.

Each function below has the signature of ``torch_backend``'s. It lays its arguments out as the kernels want them
(contiguous, statistics in float32) and calls one op of ``torch.ops.cnm_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnm_kernels.constants import DROPOUT_LEVELS

OPS = (
    "gaussian_mask",
    "weighted_attention",
    "gaussian_attention",
    "linear_nll",
    "intra_video_contrastive_loss",
    "contrastive_reconstruction_loss",
    "dropout",
    "dropout_add_layer_norm",
)
DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOAD_ERROR: str | None = None

# linear_nll keeps softmax(z) W of every token for its backward where that is at most a twentieth of the logits.
EXPECTED_WORD_SHARE = 20

try:
    from cnm_kernels import _C_cpu  # type: ignore[attr-defined]  # registers torch.ops.cnm_kernels
except ImportError as error:
    LOAD_ERROR = f"the compiled kernels are not there ({error}); reinstall with CNM_KERNELS_NATIVE=1 to see why"
else:
    _ops = torch.ops.cnm_kernels


def instruction_set() -> str:
    """The CPU instruction set the kernels run on: portable, avx2, avx512 or avx512bf16."""
    return str(_C_cpu.instruction_set())


def _optional(gradient: Tensor, wanted: bool) -> Tensor | None:
    return gradient if wanted else None


# ---- gaussian_mask ----


def gaussian_mask(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool
) -> Tensor:
    shape = center.shape
    flat_center, flat_width = (tensor.float().reshape(-1).contiguous() for tensor in (center, width))
    mask = _ops.gaussian_mask_forward(flat_center, flat_width, length, alpha, min_width, complement)
    return mask.view(*shape, length).to(center.dtype)


def _gaussian_mask_fake(
    center: Tensor, width: Tensor, length: int, alpha: float, min_width: float, complement: bool
) -> Tensor:
    return center.new_empty(center.numel(), length)


def _gaussian_mask_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    center, width, _, *ctx.shape = inputs
    ctx.save_for_backward(center, width)


def _gaussian_mask_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ops.gaussian_mask_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.shape)
    return (*grads, None, None, None, None)


# ---- weighted_attention, gaussian_attention ----


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    if key_weight is not None:
        key_weight = key_weight.float().contiguous()
    gaussian = (None, None, 1.0, 1.0, False)
    return _attention(query, key, value, key_weight, *gaussian, causal, key_lengths, scale, return_weights)


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
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    gaussian = (center.float().contiguous(), width.float().contiguous(), alpha, min_width, complement)
    return _attention(query, key, value, None, *gaussian, causal, key_lengths, scale, return_weights)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor | None,
    center: Tensor | None,
    width: Tensor | None,
    alpha: float,
    min_width: float,
    complement: bool,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    query, key, value = (_rows(tensor) for tensor in (query, key, value))
    lengths = None if key_lengths is None else key_lengths.contiguous()
    gaussian = (key_weight, center, width, alpha, min_width, complement)
    out, _, weights = _ops.attention_forward(query, key, value, *gaussian, causal, lengths, scale, return_weights)
    return out, weights.to(query.dtype) if return_weights else None


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return_weights = rest[-1]
    B, H, Lq, _ = query.shape
    stats = query.new_empty(B, H, Lq, 2, dtype=torch.float32)
    weights = query.new_empty((B, Lq, key.size(2)) if return_weights else (0,), dtype=torch.float32)
    return _heads_like(query), stats, weights


def _heads_like(tensor: Tensor) -> Tensor:
    """Empty [B, H, L, d] in memory as [B, L, H, d], as the kernels write it."""
    B, H, L, d = tensor.shape
    return tensor.new_empty(B, L, H, d).transpose(1, 2)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, key_weight, center, width, alpha, min_width, complement, causal, lengths, scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.options = alpha, min_width, complement, causal, scale
    ctx.save_for_backward(query, key, value, key_weight, center, width, lengths, output[1])


def _attention_backward(
    ctx: Any, grad_out: Tensor | None, _: Any, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, key_weight, center, width, lengths, stats = ctx.saved_tensors
    alpha, min_width, complement, causal, scale = ctx.options
    need_query, need_key, need_value, need_weight, need_center, need_width, *_rest = ctx.needs_input_grad
    grad_out = torch.zeros_like(query) if grad_out is None else _rows(grad_out)
    grad_weights = None if grad_weights is None or grad_weights.numel() == 0 else grad_weights.contiguous()
    gaussian = (key_weight, center, width, alpha, min_width, complement)
    needs = (need_query, need_key, need_value, need_weight or need_center or need_width)
    grads = _ops.attention_backward(
        grad_out, grad_weights, query, key, value, *gaussian, causal, lengths, scale, stats, *needs
    )
    return (
        _optional(grads[0], need_query),
        _optional(grads[1], need_key),
        _optional(grads[2], need_value),
        _optional(grads[3], need_weight),
        _optional(grads[3], need_center),
        _optional(grads[4], need_width),
        *(None,) * 7,
    )


# ---- linear_nll, the contrastive losses ----


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    return_accuracy: bool,
) -> tuple[Tensor, Tensor | None]:
    keep_expected = (
        torch.is_grad_enabled() and hidden.requires_grad and weight.size(0) >= EXPECTED_WORD_SHARE * weight.size(1)
    )
    tensors = (tensor.contiguous() for tensor in (hidden, weight, bias, target, valid_lengths))
    nll, accuracy, _, _ = _ops.linear_nll_forward(*tensors, label_smoothing, return_accuracy, keep_expected)
    return nll, accuracy if return_accuracy else None


def _linear_nll_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid_lengths: Tensor,
    label_smoothing: float,
    want_accuracy: bool,
    want_expected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, L, D = hidden.shape

    def statistics(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    accuracy = statistics(M) if want_accuracy else statistics(0)
    expected = statistics(M, L, D) if want_expected else statistics(0)
    return statistics(M), accuracy, statistics(M, L), expected


def _linear_nll_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, valid_lengths, ctx.label_smoothing, _, _ = inputs
    _, accuracy, lse, expected = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(accuracy, lse, expected)
    ctx.save_for_backward(hidden, weight, bias, target, valid_lengths, lse, expected)


def _linear_nll_backward(ctx: Any, grad_nll: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_nll is None:
        return (None,) * 8
    *inputs, lse, expected = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _ops.linear_nll_backward(grad_nll.contiguous(), *inputs, ctx.label_smoothing, lse, expected, *needs)
    return (*map(_optional, grads, needs), *(None,) * 5)


def intra_video_contrastive_loss(positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float) -> Tensor:
    rows = (tensor.float().contiguous() for tensor in (positive, hard, easy))
    return _ops.intra_video_contrastive_loss_forward(*rows, beta_1, beta_2)


def _contrastive_fake(positive: Tensor, hard: Tensor, easy: Tensor, beta_1: float, beta_2: float) -> Tensor:
    return positive.new_empty(())


def _contrastive_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positive, hard, easy, *ctx.margins = inputs
    ctx.save_for_backward(positive, hard, easy)


def _contrastive_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ops.intra_video_contrastive_loss_backward(grad, *ctx.saved_tensors, *ctx.margins)
    return (*grads, None, None)


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
    targets, lengths = target.repeat(3, 1), valid_lengths.repeat(3)
    nll, _ = linear_nll(hidden.flatten(0, 1), weight, bias, targets, lengths, label_smoothing, False)
    nll = nll.view(3, -1)
    return intra_video_contrastive_loss(nll[0], nll[1], nll[2], beta_1, beta_2), nll


# ---- dropout, dropout_add_layer_norm ----


def _decision(p: float) -> tuple[int, float]:
    """Of the 65,536 values a draw can take how many drop, and the scale of what is kept."""
    threshold = round(p * DROPOUT_LEVELS)
    return threshold, DROPOUT_LEVELS / max(DROPOUT_LEVELS - threshold, 1)


def dropout(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    if p == 0:
        return x
    return _ops.dropout(x.contiguous(), *_decision(p), seed, offset)


def _dropout_fake(x: Tensor, threshold: int, scale: float, seed: Tensor, offset: int) -> Tensor:
    return torch.empty_like(x)


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.decision, seed, ctx.offset = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _ops.dropout(grad.contiguous(), *ctx.decision, *ctx.saved_tensors, ctx.offset), None, None, None, None


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, seed: Tensor, offset: int, eps: float
) -> Tensor:
    if weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    tensors = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    out, _ = _ops.dropout_add_layer_norm_forward(*tensors, *_decision(p), seed, offset, eps)
    return out


def _layer_norm_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = 0 if x.size(-1) == 0 else x.numel() // x.size(-1)
    return torch.empty_like(x), x.new_empty(rows, 2, dtype=torch.float32)


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, *ctx.decision, seed, ctx.offset, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, residual, weight, seed, output[1])


def _layer_norm_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    x, residual, weight, seed, stats = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, *_rest = ctx.needs_input_grad
    drops = ctx.decision[0] > 0
    needs = (need_x and drops, need_residual or (need_x and not drops), need_weight or need_bias)
    grad_x, grad_residual, sums = _ops.dropout_add_layer_norm_backward(
        grad.contiguous(), x, residual, weight, stats, *ctx.decision, seed, ctx.offset, *needs
    )
    if not drops:
        grad_x = grad_residual  # without dropout both inputs enter the sum alike
    return (
        grad_x.view_as(x) if need_x else None,
        grad_residual.view_as(x) if need_residual else None,
        sums[0].to(weight.dtype) if need_weight else None,
        sums[1].to(weight.dtype) if need_bias else None,
        *(None,) * 5,
    )


def _register() -> None:
    """Shapes for tracing (every op) and gradients (the forward ones)."""
    library = torch.library
    for name, fake, context, backward in (
        ("gaussian_mask_forward", _gaussian_mask_fake, _gaussian_mask_context, _gaussian_mask_backward),
        ("attention_forward", _attention_fake, _attention_context, _attention_backward),
        ("linear_nll_forward", _linear_nll_fake, _linear_nll_context, _linear_nll_backward),
        ("intra_video_contrastive_loss_forward", _contrastive_fake, _contrastive_context, _contrastive_backward),
        ("dropout", _dropout_fake, _dropout_context, _dropout_backward),
        ("dropout_add_layer_norm_forward", _layer_norm_fake, _layer_norm_context, _layer_norm_backward),
    ):
        library.register_fake(f"cnm_kernels::{name}", fake)
        library.register_autograd(f"cnm_kernels::{name}", backward, setup_context=context)

    @library.register_fake("cnm_kernels::gaussian_mask_backward")
    def _(grad: Tensor, center: Tensor, width: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(center), torch.empty_like(width)

    @library.register_fake("cnm_kernels::intra_video_contrastive_loss_backward")
    def _(grad: Tensor, positive: Tensor, hard: Tensor, easy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(positive), torch.empty_like(hard), torch.empty_like(easy)

    @library.register_fake("cnm_kernels::attention_backward")
    def _(
        grad_out: Tensor, grad_weights: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        key_weight, center = rest[0], rest[1]
        need_query, need_key, need_value, need_weight = rest[-4:]
        B, Lk = query.size(0), key.size(2)

        def statistics(shape: tuple[int, ...], wanted: bool) -> Tensor:
            return query.new_empty(shape if wanted else (0,), dtype=torch.float32)

        by_key = need_weight and key_weight is not None
        by_gaussian = need_weight and center is not None
        return (
            _heads_like(query) if need_query else query.new_empty(0),
            _heads_like(key) if need_key else key.new_empty(0),
            _heads_like(value) if need_value else value.new_empty(0),
            statistics((B,), True) if by_gaussian else statistics((B, Lk), by_key),
            statistics((B,), by_gaussian),
        )

    @library.register_fake("cnm_kernels::linear_nll_backward")
    def _(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        pairs = zip((hidden, weight, bias), rest[-3:], strict=True)
        return tuple(torch.empty_like(tensor) if wanted else tensor.new_empty(0) for tensor, wanted in pairs)

    @library.register_fake("cnm_kernels::dropout_add_layer_norm_backward")
    def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        need_x, need_residual, need_weight = rest[-3:]
        D = x.size(-1)
        shape = (0 if D == 0 else x.numel() // D, D)
        return (
            x.new_empty(shape if need_x else (0,)),
            x.new_empty(shape if need_residual else (0,)),
            x.new_empty((2, D) if need_weight else (0,), dtype=torch.float32),
        )


if LOAD_ERROR is None:
    _register()
