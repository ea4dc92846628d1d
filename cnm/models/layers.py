"""Transformer layers of CNM: post-norm, ReLU, causal self-attention, batch first, state_dict names as published."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cnm_kernels as kernels
from cnm.models.input_dropout import without_keeping
from cnm_kernels import absorption
from cnm_kernels.absorption import Projections, Source

Result = TypeVar("Result")


class States(NamedTuple):
    """One tensor [B, L, D] for its two users. The LayerNorm that made it adds their gradients in its backward.

    Attributes:
        inputs: what the next sublayer reads.
        residual: a term of the sum after that sublayer.
    """

    inputs: Tensor
    residual: Tensor

    @classmethod
    def of(cls, x: Tensor) -> States:
        """A tensor that no LayerNorm made."""
        return cls(x, x)


class Kept:
    """Which results of a recomputed layer are kept all the same: those computed within ``results``."""

    def __init__(self) -> None:
        self._within = False

    @contextmanager
    def results(self) -> Iterator[None]:
        """Results of every op called within are kept."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def policy(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """What PyTorch's selective checkpoint asks of every op."""
        return CheckpointPolicy.MUST_SAVE if self._within else CheckpointPolicy.PREFER_RECOMPUTE


class ForwardPass:
    """One forward pass: its dropout masks (one seed, and the next offset at every site that draws), and what it spares.

    Args:
        input_p: probability of dropping an input feature; 0 draws nothing.
        p: the same for the residual branches.
        seed: int64 [] on the device of the activations.
        recompute: of each layer the backward computes again what takes much memory for the time that it costs.
        minimize_flops: for matmul-bound processors: cross attentions absorb projections into the side that has fewer
            rows, and padding is left out. Results are the same but for rounding.
    """

    def __init__(
        self, input_p: float, p: float, seed: Tensor, *, recompute: bool = False, minimize_flops: bool = False
    ) -> None:
        self.input_p = input_p
        self.p = p
        self.seed = seed
        self.recompute = recompute
        self.minimize_flops = minimize_flops
        self.offset = 0
        self.rows: Tensor | None = None
        self.kept = Kept()

    def of_rows(self, rows: Tensor | None) -> ForwardPass:
        """This pass from here on for a choice of samples, which drop what they would among all: row i of a residual
        branch has the masks of row ``rows[i]`` [M] int64; None: as they are. Its offsets are counted apart."""
        chosen = copy.copy(self)
        chosen.rows = rows
        return chosen

    def on_input(self, x: Tensor) -> Tensor:
        return self._input_dropout()(x)

    def _input_dropout(self) -> Callable[[Tensor], Tensor]:
        """One draw, the same whenever it is called."""
        return partial(kernels.dropout, p=self.input_p, seed=self.seed, offset=self._next_offset())

    def add_and_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> States:
        """LayerNorm(residual + dropout(x))."""
        pair = kernels.dropout_add_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            self.p,
            seed=self.seed,
            offset=self._next_offset(),
            eps=norm.eps,
            sample_indices=self.rows if self.p > 0 else None,
            twice=True,
        )
        return States(*pair)

    def projected(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer on x after input dropout."""
        draw, apply = self._input_dropout(), partial(apply_linear, layer)
        return apply(draw(x)) if self.input_p == 0 else without_keeping(apply, x, draw)

    def layer(self, compute: Callable[[ForwardPass], Result]) -> Result:
        """``compute(ctx)``, with the same masks whenever it is computed."""
        return self._recomputed(compute) if self.recompute else compute(self)

    def _recomputed(self, compute: Callable[[ForwardPass], Result]) -> Result:
        if not torch.is_grad_enabled():
            return compute(self)
        start = copy.copy(self)
        start.kept = Kept()

        def compute_again() -> tuple[Result, int]:
            ctx = copy.copy(start)
            return compute(ctx), ctx.offset

        result, self.offset = checkpoint(
            compute_again,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, start.kept.policy),
        )
        return cast(Result, result)

    def _next_offset(self) -> int:
        self.offset += 1
        return self.offset - 1


def apply_linear(layer: nn.Linear, x: Tensor, rows: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """The layer on x [..., K], which may be narrower than its parameters; ``rows`` [B]: how many of a sample count."""
    return kernels.linear(x, layer.weight, layer.bias, relu=relu, lengths=rows)


class MultiheadAttention(nn.Module):
    """Multi-head attention with one packed input projection and optional key weights.

    ``rows`` [B] are how many of a sample's rows count; the others' results are 0. None: all do.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """query, key and value of self-attention over x [B, L, D], packed: [B, L, 3, H, d]."""
        packed = kernels.linear(x, self.in_proj_weight, self.in_proj_bias, lengths=rows)
        return packed.unflatten(-1, (3, self.num_heads, -1))

    def attend(
        self,
        query: Tensor,
        key_value: Tensor | None,
        key_lengths: Tensor | None,
        weighting: Tensor | None,
        causal: bool,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[B, Lq, D], keys weighted by ``weighting`` [B, Lk]; without ``key_value`` self-attention on what ``project``
        gives."""
        out = kernels.weighted_attention(query, key_value, None, weighting, causal=causal, key_lengths=key_lengths)
        return apply_linear(self.out_proj, out.transpose(1, 2).flatten(2), rows)

    def attend_branches(self, packed: Tensor, key_lengths: Tensor, key_weights: Tensor) -> Tensor:
        """Causal self-attention on what ``project`` gives, under each of n weightings [n, B, L]: [n B, L, D]."""
        out = kernels.branched_attention(packed, key_weights=key_weights, causal=True, key_lengths=key_lengths)
        return apply_linear(self.out_proj, out.flatten(0, 1).transpose(1, 2).flatten(2))

    def attend_to(
        self, source: Source, x: Tensor, rows: Tensor | None = None, *, minimize_flops: bool = False
    ) -> Tensor:
        """Every row of x [B, Lq, D] attends to all of the source: [B, Lq, D].

        ``minimize_flops`` absorbs projections where that saves products; a source must then have one real row at least.
        """
        absorb = absorption.cheapest(x.size(-1), self.num_heads, x.size(1), source.states.size(1))
        if absorb is None or not minimize_flops:
            return self._project_both(source, x, rows)
        out = self.out_proj
        parameters = Projections(self.num_heads, self.in_proj_weight, self.in_proj_bias, out.weight, out.bias)
        return absorb(parameters, x, source, rows)

    def _project_both(self, source: Source, x: Tensor, rows: Tensor | None) -> Tensor:
        D = x.size(-1)
        # Split at once, gradients are put together at once.
        (W_q, W_kv), (b_q, b_kv) = (whole.split([D, 2 * D]) for whole in (self.in_proj_weight, self.in_proj_bias))
        query = kernels.linear(x, W_q, b_q, lengths=rows)
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, Lq, d]
        key_value = kernels.linear(source.states, W_kv, b_kv).unflatten(-1, (2, self.num_heads, -1))
        return self.attend(query, key_value, source.lengths, source.weighting, causal=False, rows=rows)


class DecoderLayer(nn.Module):
    """Self-attention, optional cross attention, feed-forward; each followed by dropout, residual and LayerNorm.

    Args:
        reads_padding: whether anybody reads rows from their length on.
    """

    def __init__(self, d_model: int, num_heads: int, reads_padding: bool) -> None:
        super().__init__()
        self.reads_padding = reads_padding
        self.self_attn = MultiheadAttention(d_model, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.encoder_attn = MultiheadAttention(d_model, num_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, 2 * d_model)
        self.fc2 = nn.Linear(2 * d_model, d_model)
        self.final_layer_norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: States,
        lengths: Tensor,
        ctx: ForwardPass,
        weighting: Tensor | None = None,
        source: Source | None = None,
        *,
        last_only: bool = False,
    ) -> States:
        """x [B, L, D] -> [B, L, D]; with ``last_only`` just the last position's state, [B, 1, D]."""

        def compute(ctx: ForwardPass) -> States:
            attended = self.self_attention(x, lengths, ctx, weighting, last_only=last_only)
            return self.after_self_attention(attended, lengths, ctx, source)

        return ctx.layer(compute)

    def self_attention(
        self, x: States, lengths: Tensor, ctx: ForwardPass, weighting: Tensor | None = None, *, last_only: bool = False
    ) -> States:
        """The layer's first sublayer."""
        attention, rows = self.self_attn, self.rows(lengths, ctx)
        if last_only:
            # The last query sees every key, so its row of the causal mask is all ones.
            source, last = Source(x.inputs, lengths, weighting), x.residual[:, -1:]
            attended = attention.attend_to(source, last, minimize_flops=ctx.minimize_flops)
            return ctx.add_and_norm(attended, last, self.self_attn_layer_norm)
        packed = attention.project(x.inputs, rows)
        with ctx.kept.results():
            attended = attention.attend(packed, None, lengths, weighting, causal=True, rows=rows)
        return ctx.add_and_norm(attended, x.residual, self.self_attn_layer_norm)

    def after_self_attention(self, x: States, lengths: Tensor, ctx: ForwardPass, source: Source | None) -> States:
        """The layer's remaining sublayers: cross attention where there is a source, and feed-forward."""
        rows = self.rows(lengths, ctx)
        if source is not None:
            attended = self.encoder_attn.attend_to(source, x.inputs, rows, minimize_flops=ctx.minimize_flops)
            x = ctx.add_and_norm(attended, x.residual, self.encoder_attn_layer_norm)
        hidden = apply_linear(self.fc1, x.inputs, rows, relu=True)
        with ctx.kept.results():
            return ctx.add_and_norm(apply_linear(self.fc2, hidden, rows), x.residual, self.final_layer_norm)

    def rows(self, lengths: Tensor, ctx: ForwardPass) -> Tensor | None:
        """Number of rows of each sample that products need to compute; None: all."""
        return lengths if ctx.minimize_flops and not self.reads_padding else None


class Decoder(nn.Module):
    """A stack of decoder layers over x [B, L, D] that share lengths [B], key weights and the source attended to."""

    def __init__(self, num_layers: int, d_model: int, num_heads: int, *, reads_padding: bool) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads, reads_padding) for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        ctx: ForwardPass,
        weighting: Tensor | None = None,
        source: Source | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """[B, L, D]; with ``last_only`` the last position's state [B, 1, D], the last layer computing nothing else."""
        *layers, last = self.layers
        states = States.of(x)
        for layer in layers:
            states = layer(states, lengths, ctx, weighting, source)
        return last(states, lengths, ctx, weighting, source, last_only=last_only).inputs

    def last_of_encoded(self, x: Tensor, lengths: Tensor, ctx: ForwardPass, source: Source) -> Tensor:
        """``forward`` with ``last_only`` from where the first of at least two layers has done its self-attention."""
        first, *middle, last = self.layers
        states = first.after_self_attention(States.of(x), lengths, ctx, source)
        for layer in middle:
            states = layer(states, lengths, ctx, None, source)
        return last(states, lengths, ctx, None, source, last_only=True).inputs

    @property
    def layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.decoder_layers))


class DualTransformer(nn.Module):
    """The two decoders: ``decoder1`` reads frames, ``decoder2`` reads words."""

    def __init__(self, d_model: int, num_heads: int, num_decoder_layers1: int, num_decoder_layers2: int) -> None:
        super().__init__()
        # The last frame's state is read whatever the video's length.
        self.decoder1 = Decoder(num_decoder_layers1, d_model, num_heads, reads_padding=True)
        self.decoder2 = Decoder(num_decoder_layers2, d_model, num_heads, reads_padding=False)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """[length, d_model] float32: row i = [sin(i f), cos(i f)], f_j = 10000^(-j / (d_model/2 - 1)); row 0 is zero."""
    half = d_model // 2
    frequency = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angle = torch.arange(length).unsqueeze(1) * frequency
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)
    positions[0] = 0
    return positions
