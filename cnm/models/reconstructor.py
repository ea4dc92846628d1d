"""Decoding 2 under n weightings of the clips at once: what they share is computed once.

All branches enter the first layers of both decoders with the same input: the clips' projections and scores, and the
words' whole first self-attention, are shared; later layers run on all branches as one batch of n B rows.
"""

from __future__ import annotations

from torch import Tensor

import cnm_kernels as kernels
from cnm.models.base import Model
from cnm.models.layers import ForwardPass
from cnm_kernels.absorption import Source


class WeightedClips:
    """The clips, for decoder1 under any weightings.

    Args:
        clips, lengths: projected and downsampled frames [B, P, D], and how many are real [B].
    """

    def __init__(self, model: Model, clips: Tensor, lengths: Tensor) -> None:
        self.decoder = model.trans.decoder1
        self.clips, self.lengths = clips, lengths
        self.projections = self.decoder.layers[0].self_attn.project(clips)

    def under(self, key_weights: Tensor, ctx: ForwardPass) -> Source:
        """The clips encoded under each weighting [n, B, P], as n B sources for the words."""
        n, lengths, weighting = key_weights.size(0), self.lengths.repeat(key_weights.size(0)), key_weights.flatten(0, 1)
        first, *later = self.decoder.layers
        attended = first.self_attn.attend_branches(self.projections, self.lengths, key_weights)
        entered = ctx.add_and_norm(attended, self.clips.repeat(n, 1, 1), first.self_attn_layer_norm)
        clips = ctx.layer(lambda ctx: first.after_self_attention(entered, lengths, ctx, None))
        for layer in later:
            clips = layer(clips, lengths, ctx, weighting)
        return Source(clips.inputs, lengths, weighting)


class MaskedSentences:
    """Sentences with some words hidden, to be reconstructed from any sources.

    Args:
        words: projected, [B, L + 1, D].
        masked_words: [B, L + 1] bool.
        word_ids: [B, L].
        word_lengths: [B].
    """

    def __init__(
        self, model: Model, words: Tensor, masked_words: Tensor, word_ids: Tensor, word_lengths: Tensor,
        ctx: ForwardPass,
    ) -> None:  # fmt: skip
        self.decoder, self.head, self.word_ids = model.trans.decoder2, model.word_head, word_ids
        self.words, self.row_lengths = model.reconstructor_words(words, masked_words, word_lengths)
        first = self.decoder.layers[0]
        attention, rows = first.self_attn, first.rows(self.row_lengths, ctx)
        packed = attention.project(self.words, rows)
        self.attended = attention.attend(packed, None, self.row_lengths, None, causal=True, rows=rows)

    def nll(self, source: Source, ctx: ForwardPass) -> Tensor:
        """Reconstruction error from n B sources: [n, B]."""
        n = source.states.size(0) // self.words.size(0)
        row_lengths = self.row_lengths.repeat(n)
        first, *later = self.decoder.layers
        entered = ctx.add_and_norm(
            self.attended.repeat(n, 1, 1), self.words.repeat(n, 1, 1), first.self_attn_layer_norm
        )
        words = ctx.layer(lambda ctx: first.after_self_attention(entered, row_lengths, ctx, source))
        for layer in later:
            words = layer(words, row_lengths, ctx, source=source)
        nll = kernels.linear_nll(
            words.inputs, self.head.weight, self.head.bias, self.word_ids.repeat(n, 1), row_lengths
        )
        return nll.view(n, -1)
