"""The published decoder layer around an accelerated attention: batch first inside, each sublayer's dropout, residual
and LayerNorm in one op.

``AcceleratedLayer`` is mixed into the class of a module that has the published ``TransformerDecoderLayer`` interface
(see ``accelerate``). Dropout keeps its rate and follows ``torch.manual_seed``, but its masks are not those that PyTorch
would draw.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from cnm_kernels import ops
from cnm_kernels.drop_in.attention import AcceleratedAttention, is_unmodified

ATTENTIONS = ("self_attn", "encoder_attn")
NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
LINEARS = ("fc1", "fc2")
SEEDS = 1 << 62


def can_replace(layer: nn.Module) -> bool:
    """Every submodule of the layer is what ``AcceleratedLayer`` computes in its place."""
    return passed_over(layer) is None


def passed_over(layer: nn.Module) -> str | None:
    """The part of the layer that ``AcceleratedLayer`` cannot compute; None where it computes everything."""
    if not isinstance(getattr(layer, "dropout", None), float | int):
        return f"its dropout must be a rate, got {type(getattr(layer, 'dropout', None)).__name__}"
    for name in (*ATTENTIONS, *NORMS, *LINEARS):
        module = getattr(layer, name, None)
        if not isinstance(module, nn.Module):
            return f"it has no {name}"
        if name in ATTENTIONS and not isinstance(module, AcceleratedAttention):
            return f"its {name} ({type(module).__name__}) is not accelerated"
        kind = type(module) if name in ATTENTIONS else nn.LayerNorm if name in NORMS else nn.Linear
        if not is_unmodified(module, kind):
            return f"its {name} ({type(module).__name__}) is no plain {kind.__name__}, or has hooks"
        if isinstance(module, nn.LayerNorm) and (
            module.weight is None or module.bias is None or module.weight.dim() != 1
        ):
            return f"its {name} has no weight and bias of one dimension"
    return None


class AcceleratedLayer:
    """``forward`` of the published interface. Mixed in before the module's own class, whose attributes it reads."""

    _original: ClassVar[type[nn.Module]]  # the layer's own class
    dropout: float
    training: bool
    self_attn: AcceleratedAttention
    self_attn_layer_norm: nn.LayerNorm
    encoder_attn: AcceleratedAttention
    encoder_attn_layer_norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    final_layer_norm: nn.LayerNorm

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        encoder_out: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        src_gauss_weight: Tensor | None = None,
        tgt_gauss_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(result [L, B, D], the last sublayer's attention); masks are 1 where padded.

        Args:
            x: [L, B, D].
            mask: [B, L], of x.
            encoder_out: [S, B, D], what cross attention reads; None leaves it out.
            encoder_mask: [B, S].
            self_attn_mask: [L, L], added to the scores.
            src_gauss_weight: [B, S], a weight per key of the cross attention.
            tgt_gauss_weight: [B, L], the same of the self-attention.
        """
        if not can_replace(cast(nn.Module, self)):  # hooked or replaced since
            own = super().forward  # type: ignore[misc]
            unweighted = src_gauss_weight is None and tgt_gauss_weight is None  # some have no such arguments
            weights = () if unweighted else (src_gauss_weight, tgt_gauss_weight)
            return cast(
                "tuple[Tensor, Tensor | None]",
                own(x, mask, encoder_out, encoder_mask, self_attn_mask, *weights),
            )
        p = self.dropout if self.training else 0.0
        seed: int | Tensor = torch.randint(SEEDS, (), device=x.device) if p > 0 else 0
        x = x.transpose(0, 1).contiguous()  # [B, L, D], as the layer before left it
        update, attention = self.self_attn.attend((x,), mask, self_attn_mask, tgt_gauss_weight, True)
        x, residual = _add_and_norm(update, x, self.self_attn_layer_norm, p, seed, 0)
        if encoder_out is not None:
            source = encoder_out.transpose(0, 1).contiguous()
            update, attention = self.encoder_attn.attend((x, source), encoder_mask, None, src_gauss_weight, True)
            x, residual = _add_and_norm(update, residual, self.encoder_attn_layer_norm, p, seed, 1)
        hidden = ops.linear(x, self.fc1.weight, self.fc1.bias, relu=True)
        update = ops.linear(hidden, self.fc2.weight, self.fc2.bias)
        x, _ = _add_and_norm(update, residual, self.final_layer_norm, p, seed, 2)
        return x.transpose(0, 1), attention


def _add_and_norm(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, seed: int | Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) for the next sublayer and for the sum after it; under autocast in the wider
    dtype, as PyTorch's, which on GPUs is float32 whatever comes in."""
    if residual.is_cuda and torch.is_autocast_enabled("cuda"):
        residual = residual.float()
    return ops.dropout_add_layer_norm(
        x, residual, norm.weight, norm.bias, p, seed=seed, offset=offset, eps=norm.eps, twice=True
    )
