"""Transformer layers of CNM: post-norm, ReLU, causal self-attention, batch first, state_dict names as published."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnm_kernels as kernels


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over time that weights keys; ``complement`` weights by one minus it."""

    center: Tensor  # [B], fraction of the video
    width: Tensor  # [B], fraction of the video
    alpha: float
    complement: bool = False


class DropoutDraws:
    """The dropout masks of one forward pass: one seed, and the next offset at every site that draws.

    Args:
        p: probability of dropping; 0 draws nothing.
        seed: int64 [] on the device of the activations.
    """

    def __init__(self, p: float, seed: Tensor) -> None:
        self.p = p
        self.seed = seed
        self.offset = 0

    def next_offset(self) -> int:
        self.offset += 1
        return self.offset - 1

    def dropout(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.p, seed=self.seed, offset=self.next_offset())

    def add_and_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm(residual + dropout(x))."""
        return kernels.dropout_add_layer_norm(
            x, residual, norm.weight, norm.bias, self.p, seed=self.seed, offset=self.next_offset(), eps=norm.eps
        )


class MultiheadAttention(nn.Module):
    """Multi-head attention with one packed input projection and optional Gaussian key weights."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, source: Tensor | None, source_lengths: Tensor, gaussian: Gaussian | None, causal: bool
    ) -> Tensor:
        """x [B, Lq, D] attends to source [B, Lk, D] (None: to itself) -> [B, Lq, D]."""
        D = x.size(-1)
        if source is None:
            query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(D, -1)
        else:
            query = F.linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D])
            key, value = F.linear(source, self.in_proj_weight[D:], self.in_proj_bias[D:]).split(D, -1)
        query, key, value = (self._heads(tensor) for tensor in (query, key, value))
        if gaussian is None:
            out = kernels.weighted_attention(query, key, value, causal=causal, key_lengths=source_lengths)
        else:
            out = kernels.gaussian_attention(
                query,
                key,
                value,
                gaussian.center,
                gaussian.width,
                alpha=gaussian.alpha,
                complement=gaussian.complement,
                causal=causal,
                key_lengths=source_lengths,
            )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, d]


class DecoderLayer(nn.Module):
    """Self-attention, optional cross attention, feed-forward; each followed by dropout, residual and LayerNorm."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
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
        lengths: Tensor,
        draws: DropoutDraws,
        *,
        gaussian: Gaussian | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        source_gaussian: Gaussian | None = None,
    ) -> Tensor:
        attended = self.self_attn(x, None, lengths, gaussian, causal=True)
        x = draws.add_and_norm(attended, x, self.self_attn_layer_norm)
        if source is not None:
            attended = self.encoder_attn(x, source, source_lengths, source_gaussian, causal=False)
            x = draws.add_and_norm(attended, x, self.encoder_attn_layer_norm)
        return draws.add_and_norm(self.fc2(F.relu(self.fc1(x))), x, self.final_layer_norm)


class Decoder(nn.Module):
    """A stack of decoder layers that share lengths, source and Gaussians.

    x [B, L, D] with its lengths [B]; source [B, S, D] with its lengths [B] feeds the cross attention (None: there is
    none); ``gaussian`` weights the keys of the self-attentions, ``source_gaussian`` those of the cross attentions.
    """

    def __init__(self, num_layers: int, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads) for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        draws: DropoutDraws,
        *,
        gaussian: Gaussian | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        source_gaussian: Gaussian | None = None,
    ) -> Tensor:
        for layer in self.decoder_layers:
            x = layer(
                x,
                lengths,
                draws,
                gaussian=gaussian,
                source=source,
                source_lengths=source_lengths,
                source_gaussian=source_gaussian,
            )
        return x


class DualTransformer(nn.Module):
    """The two decoders: ``decoder1`` reads frames, ``decoder2`` reads words."""

    def __init__(self, d_model: int, num_heads: int, num_decoder_layers1: int, num_decoder_layers2: int) -> None:
        super().__init__()
        self.decoder1 = Decoder(num_decoder_layers1, d_model, num_heads)
        self.decoder2 = Decoder(num_decoder_layers2, d_model, num_heads)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """[length, d_model] float32: row i = [sin(i f), cos(i f)], f_j = 10000^(-j / (d_model/2 - 1)); row 0 is zero."""
    half = d_model // 2
    frequency = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angle = torch.arange(length).unsqueeze(1) * frequency
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)
    positions[0] = 0
    return positions
