"""Two stacks of post-norm decoder layers, which attend to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.research_code.attention import MultiheadAttention


class DecoderLayer(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = MultiheadAttention(d_model, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.encoder_attn = MultiheadAttention(d_model, num_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, 2 * d_model)
        self.fc2 = nn.Linear(2 * d_model, d_model)
        self.final_layer_norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        encoder_out: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        src_gauss_weight: Tensor | None = None,
        tgt_gauss_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [L, B, D]; masks are 1 where padded -> the layer's result [L, B, D] and its last attention."""
        update, attention = self.self_attn(x, x, x, mask, attn_mask=self_attn_mask, gauss_weight=tgt_gauss_weight)
        x = self.self_attn_layer_norm(x + F.dropout(update, self.dropout, self.training))
        if encoder_out is not None:
            update, attention = self.encoder_attn(
                x, encoder_out, encoder_out, encoder_mask, gauss_weight=src_gauss_weight
            )
            x = self.encoder_attn_layer_norm(x + F.dropout(update, self.dropout, self.training))
        update = self.fc2(F.relu(self.fc1(x)))
        return self.final_layer_norm(x + F.dropout(update, self.dropout, self.training)), attention


class Decoder(nn.Module):
    """Takes [B, L, D] and masks of real positions, works time first."""

    _future: Tensor

    def __init__(self, num_layers: int, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads, dropout) for _ in range(num_layers))
        self._future = torch.empty(0, 0)

    def future(self, x: Tensor) -> Tensor:
        """[L, L], -inf above the diagonal; a view of the largest made so far."""
        L = x.size(0)
        if self._future.size(0) < L or self._future.device != x.device or self._future.dtype != x.dtype:
            self._future = torch.full((L, L), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        return self._future[:L, :L]

    def forward(
        self,
        source: Tensor | None,
        source_real: Tensor | None,
        target: Tensor,
        target_real: Tensor,
        source_weight: Tensor | None = None,
        target_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        source_padding = None if source_real is None else 1 - source_real
        padding = 1 - target_real
        source = None if source is None else source.transpose(0, 1)
        x = target.transpose(0, 1)
        for layer in self.decoder_layers:
            x, attention = layer(x, padding, source, source_padding, self.future(x), source_weight, target_weight)
        return x.transpose(0, 1), attention


class DualTransformer(nn.Module):
    def __init__(
        self, d_model: int, num_heads: int, num_decoder_layers1: int, num_decoder_layers2: int, dropout: float
    ) -> None:
        super().__init__()
        self.decoder1 = Decoder(num_decoder_layers1, d_model, num_heads, dropout)
        self.decoder2 = Decoder(num_decoder_layers2, d_model, num_heads, dropout)

    def ground(self, frames: Tensor, frames_real: Tensor, words: Tensor, words_real: Tensor) -> Tensor:
        """Decoding 1: the frames' states, having read the words."""
        words, _ = self.decoder2(None, None, words, words_real)
        return self.decoder1(words, words_real, frames, frames_real)[0]

    def reconstruct(
        self, frames: Tensor, frames_real: Tensor, words: Tensor, words_real: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decoding 2: the words' states, having read the frames by weight; and the last layer's attention."""
        frames, _ = self.decoder1(None, None, frames, frames_real, target_weight=weight)
        return self.decoder2(frames, frames_real, words, words_real, source_weight=weight)
