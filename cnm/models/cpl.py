"""CPL (Zheng et al., CVPR 2022): K Gaussian proposals per sentence, each with a negative on its left and right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnm_kernels as kernels
from cnm.config import CPLConfig
from cnm.data.batch import Batch
from cnm.masking import fixed_masked_words, sample_masked_words
from cnm.models.base import Model, Proposals, Scoring, VideoEncoding, downsample, vocabulary_size
from cnm.models.layers import ForwardPass, States
from cnm.models.reconstructor import MaskedSentences, WeightedClips
from cnm_kernels.absorption import Source
from cnm_kernels.constants import MIN_PROPOSAL_WIDTH


@dataclass(frozen=True)
class Reconstruction:
    """The results of ``CPL.reconstruct``.

    Attributes:
        center, width: [B, K], fractions of the video.
        positive, left, right: [B, K], reconstruction errors of the proposals and their negatives.
        reference: [B], of the whole video.
    """

    center: Tensor
    width: Tensor
    positive: Tensor
    left: Tensor
    right: Tensor
    reference: Tensor


class CPL(Model):
    """The published model. ``pred_vec`` stands after the last frame, and its state tells all proposals."""

    config: CPLConfig
    min_width = MIN_PROPOSAL_WIDTH

    def __init__(self, config: CPLConfig) -> None:
        super().__init__(config)
        network = config.model.config
        self.num_proposals = network.num_props
        self.sigma = network.sigma
        self.alpha = network.sigma**2 / 2
        self.pred_vec = nn.Parameter(torch.zeros(self.frame_fc.in_features))
        self.fc_comp = nn.Linear(network.hidden_size, vocabulary_size(config))
        self.fc_gauss = nn.Linear(network.hidden_size, 2 * network.num_props)

    @property
    def word_head(self) -> nn.Linear:
        return self.fc_comp

    @torch.no_grad()
    def encode_video(self, frames: Tensor, frame_lengths: Tensor) -> VideoEncoding:
        frames, frame_lengths = self._pooled(frames, frame_lengths)
        ctx = self.forward_pass(minimize_flops=True, dropout=False)
        states = self._project_frames(self.with_prediction(frames), ctx)
        clips = downsample(states[:, :-1], frame_lengths)
        first, *others = self.trans.decoder1.layers
        if others:
            states = first.self_attention(States.of(states), frame_lengths, ctx).inputs
        return VideoEncoding(states, frame_lengths, clips)

    @torch.no_grad()
    def proposals(
        self, batch: Batch, *, video: VideoEncoding | None = None, scoring: Scoring | None = None
    ) -> Proposals:
        """The K proposals of each sentence, scored by minus the reconstruction error."""
        scoring = scoring or Scoring()
        batch = replace(batch, frames=self._narrowed(batch.frames), words=self._narrowed(batch.words))
        if video is None:
            self._check(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
            video = self.encode_video(batch.frames, batch.frame_lengths)
        self._check_encoded(video, batch.words)
        assert video.clips is not None
        ctx = self.forward_pass(minimize_flops=True, dropout=False)
        words = self._project_words(batch.words, batch.word_lengths, ctx)
        source, decoder = self._sentence_source(words, batch.word_lengths, ctx), self.trans.decoder1
        if len(decoder.layers) > 1:
            states = decoder.last_of_encoded(video.states, video.lengths, ctx, source)
        else:
            states = decoder(video.states, video.lengths, ctx, source=source, last_only=True)
        center, width = self._gaussians(states)  # [B, K]
        clips, clip_lengths = video.clips
        weighted = WeightedClips(self, clips, clip_lengths).under(
            self.positive_weights(center, width, clips.size(1)).transpose(0, 1), ctx
        )
        nll = self._mean_nll(batch, words, weighted, ctx, scoring)
        order = nll.argsort(dim=1, stable=True)
        return Proposals(center.gather(1, order), width.gather(1, order), -nll.gather(1, order))

    def _mean_nll(
        self, batch: Batch, words: Tensor, source: Source, ctx: ForwardPass, scoring: Scoring
    ) -> Tensor:  # fmt: skip
        """Reconstruction error of each sentence from each of its sources, over the draws of masked words. [B, K]"""
        word_ids, lengths = batch.word_ids, batch.word_lengths
        if scoring.published:
            draws = [sample_masked_words(batch.mask_weights, lengths)]
        else:
            draws = fixed_masked_words(batch.mask_weights, lengths, scoring.masks, scoring.seed)
            if word_ids.size(1) < self.config.dataset.max_num_words:  # the longest sentence too has its row of padding
                words, word_ids = F.pad(words, (0, 0, 0, 1)), F.pad(word_ids, (0, 1))
                draws = [F.pad(draw, (0, 1)) for draw in draws]
        found = [MaskedSentences(self, words, draw, word_ids, lengths, ctx).nll(source, ctx) for draw in draws]
        return torch.stack(found).mean(0).transpose(0, 1)

    def reconstruct(
        self,
        batch: Batch,
        masked_words: Tensor | None = None,
        *,
        growth: float | Tensor,
        seed: Tensor | None = None,
    ) -> Reconstruction:
        """Proposes K Gaussians per sentence and reconstructs its masked words from them, their negatives and all.

        Args:
            batch: see ``Batch``.
            masked_words: [B, L + 1] bool, the rows of ``words`` to hide; None draws them.
            growth: of the negatives, 0 to 1, see ``cnm_kernels.negative_gaussian_masks``.
            seed: int64 [] on the model's device, decides the dropout masks in training mode; None draws one.
        """
        self._check(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
        if masked_words is None:
            masked_words = sample_masked_words(batch.mask_weights, batch.word_lengths)
        ctx = self.forward_pass(seed)
        frames, words = self.project_inputs(self.with_prediction(batch.frames), batch.words, batch.word_lengths, ctx)
        center, width = self.generate(frames, batch.frame_lengths, words, batch.word_lengths, ctx)
        clips, clip_lengths = downsample(frames[:, :-1], batch.frame_lengths)
        words, row_lengths = self.reconstructor_words(words, masked_words, batch.word_lengths)

        K, P = self.num_proposals, clips.size(1)
        positive = self.positive_weights(center, width, P)
        left, right = self.negative_weights(center, width, P, growth)
        reference = torch.ones_like(positive[:, :1])
        key_weights = (
            torch.cat([positive, left, right, reference], dim=1).transpose(0, 1).flatten(0, 1)
        )  # [3 K B + B, P]
        n = 3 * K + 1
        clip_lengths, row_lengths = clip_lengths.repeat(n), row_lengths.repeat(n)
        seen = self.trans.decoder1(clips.repeat(n, 1, 1), clip_lengths, ctx, key_weights)
        source = Source(seen, clip_lengths, key_weights)
        hidden = self.trans.decoder2(words.repeat(n, 1, 1), row_lengths, ctx, source=source)
        head = self.fc_comp
        nll = kernels.linear_nll(hidden, head.weight, head.bias, batch.word_ids.repeat(n, 1), row_lengths)
        nll = nll.view(n, -1).transpose(0, 1)  # [B, n]
        positive_nll, left_nll, right_nll = nll[:, :-1].split(K, dim=1)
        return Reconstruction(center, width, positive_nll, left_nll, right_nll, nll[:, -1])

    def with_prediction(self, frames: Tensor) -> Tensor:
        """Frames [B, T, frame_dim] with ``pred_vec`` after the last; it is no clip, and no key to anybody."""
        return torch.cat([frames, self.pred_vec.to(frames.dtype).expand(frames.size(0), 1, -1)], dim=1)

    def _gaussians(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """center and width [B, K] from the last row's state."""
        last = states[:, -1].to(self.fc_gauss.weight.dtype)
        center, width = torch.sigmoid(self.fc_gauss(last)).unflatten(1, (-1, 2)).unbind(-1)
        return center, width

    def positive_weights(self, center: Tensor, width: Tensor, length: int) -> Tensor:
        """Key weights of proposals [...]: [..., length]."""
        return kernels.gaussian_mask(center, width, length, sigma=self.sigma)

    def negative_weights(
        self, center: Tensor, width: Tensor, length: int, growth: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Key weights of the left and the right negatives of proposals [...]: [..., length] each."""
        return kernels.negative_gaussian_masks(center, width, length, sigma=self.sigma, growth=growth)
