"""Transformer layers of CNM: post-norm, ReLU, causal self-attention, batch first, state_dict names as published."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnm_kernels as kernels


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over time that weights keys; ``complement`` weights by one minus it."""

    center: Tensor  # [B], fraction of the video
    width: Tensor  # [B], fraction of the video
    alpha: float
    complement: bool = False


Weighting = Gaussian | Tensor | None  # of keys: a Gaussian, weights [B, Lk], or all alike


@dataclass(frozen=True)
class Source:
    """What a cross attention reads."""

    states: Tensor  # [B, S, D]
    lengths: Tensor  # [B] int64, positions that are real
    weighting: Weighting = None


class DropoutDraws:
    """The dropout masks of one forward pass: one seed, and the next offset at every site that draws.

    Args:
        input_p: probability of dropping an input feature; 0 draws nothing.
        p: the same for the residual branches.
        seed: int64 [] on the device of the activations.
        recompute: of each layer only the input is kept for the backward, which computes the rest again.
    """

    def __init__(self, input_p: float, p: float, seed: Tensor, *, recompute: bool = False) -> None:
        self.input_p = input_p
        self.p = p
        self.seed = seed
        self.recompute = recompute
        self.offset = 0

    def on_input(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.input_p, seed=self.seed, offset=self._next_offset())

    def add_and_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm(residual + dropout(x))."""
        return kernels.dropout_add_layer_norm(
            x, residual, norm.weight, norm.bias, self.p, seed=self.seed, offset=self._next_offset(), eps=norm.eps
        )

    def layer(self, compute: Callable[[DropoutDraws], Tensor]) -> Tensor:
        """``compute(draws)``, with the same masks whenever it is computed."""
        if not (self.recompute and torch.is_grad_enabled()):
            return compute(self)
        start = copy.copy(self)

        def compute_again() -> tuple[Tensor, int]:
            draws = copy.copy(start)
            return compute(draws), draws.offset

        result, self.offset = checkpoint(compute_again, use_reentrant=False, preserve_rng_state=False)
        return cast(Tensor, result)

    def _next_offset(self) -> int:
        self.offset += 1
        return self.offset - 1


def apply_linear(layer: nn.Linear, x: Tensor, *, relu: bool = False) -> Tensor:
    """The layer on x [..., K], which may be narrower than its parameters."""
    return kernels.linear(x, layer.weight, layer.bias, relu=relu)


class MultiheadAttention(nn.Module):
    """Multi-head attention with one packed input projection and optional key weights."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor) -> Tensor:
        """query, key and value of self-attention over x [B, L, D], packed: [B, L, 3, H, d]."""
        return kernels.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))

    def project_query(self, x: Tensor) -> Tensor:
        """[B, H, L, d]"""
        D = x.size(-1)
        query = kernels.linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D])
        return query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project_key_value(self, source: Tensor) -> Tensor:
        """Packed: [B, S, 2, H, d]."""
        D = source.size(-1)
        packed = kernels.linear(source, self.in_proj_weight[D:], self.in_proj_bias[D:])
        return packed.unflatten(-1, (2, self.num_heads, -1))

    def attend(
        self, query: Tensor, key_value: Tensor | None, key_lengths: Tensor, weighting: Weighting, causal: bool
    ) -> Tensor:
        """[B, Lq, D]; without ``key_value`` self-attention on what ``project`` gives."""
        if isinstance(weighting, Gaussian):
            out = kernels.gaussian_attention(
                query,
                key_value,
                None,
                weighting.center,
                weighting.width,
                alpha=weighting.alpha,
                complement=weighting.complement,
                causal=causal,
                key_lengths=key_lengths,
            )
        else:
            out = kernels.weighted_attention(query, key_value, None, weighting, causal=causal, key_lengths=key_lengths)
        return apply_linear(self.out_proj, out.transpose(1, 2).flatten(2))

    def attend_branches(self, packed: Tensor, key_lengths: Tensor, key_weights: Tensor) -> Tensor:
        """Causal self-attention on what ``project`` gives, under each of n weightings [n, B, L]: [n B, L, D]."""
        out = kernels.branched_attention(packed, key_weights=key_weights, causal=True, key_lengths=key_lengths)
        return apply_linear(self.out_proj, out.flatten(0, 1).transpose(1, 2).flatten(2))


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
        weighting: Weighting = None,
        source: Source | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """x [B, L, D] -> [B, L, D]; with ``last_only`` just the last position's state, [B, 1, D]."""

        def compute(draws: DropoutDraws) -> Tensor:
            attended = self.self_attention(x, lengths, draws, weighting, last_only=last_only)
            return self.after_self_attention(attended, draws, source)

        return draws.layer(compute)

    def self_attention(
        self, x: Tensor, lengths: Tensor, draws: DropoutDraws, weighting: Weighting = None, *, last_only: bool = False
    ) -> Tensor:
        """The layer's first sublayer."""
        attention = self.self_attn
        if last_only:
            # The last query sees every key, so its row of the causal mask is all ones.
            key_value = attention.project_key_value(x)
            x = x[:, -1:]
            attended = attention.attend(attention.project_query(x), key_value, lengths, weighting, causal=False)
        else:
            attended = attention.attend(attention.project(x), None, lengths, weighting, causal=True)
        return draws.add_and_norm(attended, x, self.self_attn_layer_norm)

    def after_self_attention(self, x: Tensor, draws: DropoutDraws, source: Source | None) -> Tensor:
        """The layer's remaining sublayers: cross attention where there is a source, and feed-forward."""
        if source is not None:
            attention = self.encoder_attn
            key_value = attention.project_key_value(source.states)
            query = attention.project_query(x)
            attended = attention.attend(query, key_value, source.lengths, source.weighting, causal=False)
            x = draws.add_and_norm(attended, x, self.encoder_attn_layer_norm)
        hidden = apply_linear(self.fc1, x, relu=True)
        return draws.add_and_norm(apply_linear(self.fc2, hidden), x, self.final_layer_norm)


class Decoder(nn.Module):
    """A stack of decoder layers over x [B, L, D] that share lengths [B], key weights and the source attended to."""

    def __init__(self, num_layers: int, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads) for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        draws: DropoutDraws,
        weighting: Weighting = None,
        source: Source | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """[B, L, D]; with ``last_only`` the last position's state [B, 1, D], the last layer computing nothing else."""
        layers = self.layers
        for layer in layers[:-1]:
            x = layer(x, lengths, draws, weighting, source)
        return layers[-1](x, lengths, draws, weighting, source, last_only=last_only)

    def last_of_encoded(self, x: Tensor, lengths: Tensor, draws: DropoutDraws, source: Source) -> Tensor:
        """``forward`` with ``last_only`` from where the first of at least two layers has done its self-attention."""
        first, *middle, last = self.layers
        x = first.after_self_attention(x, draws, source)
        for layer in middle:
            x = layer(x, lengths, draws, None, source)
        return last(x, lengths, draws, None, source, last_only=True)

    @property
    def layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.decoder_layers))


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
