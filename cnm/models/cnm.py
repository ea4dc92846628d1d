"""CNM (Zheng et al., AAAI 2022): a Gaussian mask generator and a mask-conditioned reconstructor that share weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cnm_kernels as kernels
from cnm.config import CNMConfig
from cnm.data.batch import Batch
from cnm.masking import sample_masked_words
from cnm.models.base import Model, Proposals, Scoring, VideoEncoding, downsample, vocabulary_size
from cnm.models.layers import ForwardPass, States
from cnm_kernels.absorption import Source
from cnm_kernels.constants import MIN_WIDTH


@dataclass(frozen=True)
class Reconstruction:
    """The results of ``CNM.reconstruct``. Branches are stacked as positive, hard negative, easy negative.

    Attributes:
        center, width: [B], fraction of the video.
        masked_words: [B, L + 1] bool, the words that were hidden.
        hidden: [3, B, L, D], the states ``fc_rec`` turns into word logits.
        nll: [3, B], each branch's reconstruction error.
    """

    center: Tensor
    width: Tensor
    masked_words: Tensor
    hidden: Tensor
    nll: Tensor


class CNM(Model):
    """The published model: one Gaussian per sentence."""

    config: CNMConfig
    num_proposals = 1
    min_width = MIN_WIDTH

    def __init__(self, config: CNMConfig) -> None:
        super().__init__(config)
        network = config.model.config
        self.alpha = network.alpha
        self.max_width = network.max_width
        self.fc_rec = nn.Linear(network.hidden_size, vocabulary_size(config))
        self.fc_mask_gen = nn.Linear(network.hidden_size, 2)

    @property
    def word_head(self) -> nn.Linear:
        return self.fc_rec

    def proposals(
        self, batch: Batch, *, video: VideoEncoding | None = None, scoring: Scoring | None = None
    ) -> Proposals:
        """The one moment of each sentence, of score 0; nothing is scored."""
        words, word_lengths = batch.words, batch.word_lengths
        if video is None:
            center, width = self.localize(batch.frames, batch.frame_lengths, words, word_lengths)
        else:
            center, width = self.localize_encoded(video, words, word_lengths)
        return Proposals(center[:, None], width[:, None], torch.zeros_like(center)[:, None])

    @torch.no_grad()
    def localize(
        self, frames: Tensor, frame_lengths: Tensor, words: Tensor, word_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Localizes each sentence: center and width, [B] each, fractions of the video. Without dropout."""
        frames, words = self._narrowed(frames), self._narrowed(words)
        self._check(frames, frame_lengths, words, word_lengths)
        return self.localize_encoded(self.encode_video(frames, frame_lengths), words, word_lengths)

    @torch.no_grad()
    def encode_video(self, frames: Tensor, frame_lengths: Tensor) -> VideoEncoding:
        """Computes once, for ``localize_encoded``, what all sentences about a video share: projection and the first
        self-attention. frames [N, T, frame_dim], frame_lengths [N]; a video of more than ``dataset.max_num_frames``
        frames is averaged to as many clips, as in training."""
        frames, frame_lengths = self._pooled(frames, frame_lengths)
        ctx = self.forward_pass(minimize_flops=True, dropout=False)
        states = self._project_frames(frames, ctx)
        first, *others = self.trans.decoder1.layers
        if others:
            states = first.self_attention(States.of(states), frame_lengths, ctx).inputs
        return VideoEncoding(states, frame_lengths)

    @torch.no_grad()
    def localize_encoded(self, video: VideoEncoding, words: Tensor, word_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``localize`` in encoded videos, one per sentence (``VideoEncoding.select`` repeats them)."""
        self._check_encoded(video, words)
        words = self._narrowed(words)
        ctx = self.forward_pass(minimize_flops=True, dropout=False)
        source = self._sentence_source(self._project_words(words, word_lengths, ctx), word_lengths, ctx)
        decoder = self.trans.decoder1
        if len(decoder.layers) > 1:
            states = decoder.last_of_encoded(video.states, video.lengths, ctx, source)
        else:
            states = decoder(video.states, video.lengths, ctx, source=source, last_only=True)
        return self._gaussians(states)

    def reconstruct(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        word_ids: Tensor,
        word_lengths: Tensor,
        mask_weights: Tensor | None = None,
        *,
        masked_words: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Reconstruction:
        """Generates each sentence's Gaussian and reconstructs its masked words from the three weightings of the video.

        Args:
            frames, frame_lengths, words, word_lengths: see the class.
            word_ids: [B, L] int64, the words to reconstruct, padding 0.
            mask_weights: [B, L], probability of each word to be the first one masked; None: all words alike.
            masked_words: [B, L + 1] bool, the rows of ``words`` to hide; None draws max(l // 3, 1) words per sentence
                from ``mask_weights`` without replacement.
            seed: int64 [] on the model's device, decides the dropout masks in training mode; None draws one.
        """
        self._check(frames, frame_lengths, words, word_lengths)
        if masked_words is None:
            if mask_weights is None:
                real = torch.arange(word_ids.size(1), device=word_ids.device) < word_lengths[:, None]
                mask_weights = real.to(frames.dtype)
            masked_words = sample_masked_words(mask_weights, word_lengths)
        ctx = self.forward_pass(seed)
        frames, words = self.project_inputs(frames, words, word_lengths, ctx)
        center, width = self.generate(frames, frame_lengths, words, word_lengths, ctx)
        clip_frames, clip_lengths = downsample(frames, frame_lengths)
        words, row_lengths = self.reconstructor_words(words, masked_words, word_lengths)

        positive = kernels.gaussian_mask(center, width, clip_frames.size(1), alpha=self.alpha)
        hidden = torch.stack(
            [
                self._reconstruct_branch(clip_frames, clip_lengths, words, row_lengths, weighting, ctx)
                for weighting in (positive, None, 1 - positive)
            ]
        )
        nll = kernels.linear_nll(
            hidden.flatten(0, 1),
            self.fc_rec.weight,
            self.fc_rec.bias,
            word_ids.repeat(3, 1),
            row_lengths.repeat(3),
        )
        return Reconstruction(center, width, masked_words, hidden, nll.view(3, -1))

    def _gaussians(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """center and width [B] from the last frame's state."""
        last = states[:, -1].to(self.fc_mask_gen.weight.dtype)
        center, width = torch.sigmoid(self.fc_mask_gen(last)).unbind(-1)
        return center, width * self.max_width

    def _reconstruct_branch(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        row_lengths: Tensor,
        weighting: Tensor | None,
        ctx: ForwardPass,
    ) -> Tensor:
        """Decoding 2: masked words attend to the frames, weighted by ``weighting`` [B, P]. [B, L, D]"""
        frames = self.trans.decoder1(frames, frame_lengths, ctx, weighting)
        return self.trans.decoder2(words, row_lengths, ctx, source=Source(frames, frame_lengths, weighting))
