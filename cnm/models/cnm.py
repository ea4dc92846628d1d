"""CNM (Zheng et al., AAAI 2022): a Gaussian mask generator and a mask-conditioned reconstructor that share weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import cnm_kernels as kernels
from cnm import checkpoint
from cnm.config import CNMConfig
from cnm.data.features import pool_batch
from cnm.errors import InputError
from cnm.models.layers import DualTransformer, ForwardPass, Gaussian, Source, apply_linear, sinusoidal_positions
from cnm_kernels.checks import Arguments


@dataclass(frozen=True)
class Reconstruction:
    """What ``CNM.reconstruct`` finds. Branches are stacked as positive, hard negative, easy negative.

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


@dataclass(frozen=True)
class VideoEncoding:
    """What of N videos' localization does not depend on the sentence: see ``CNM.encode_video``.

    Attributes:
        states: [N, T, D], after the first self-attention (projected frames where decoder1 has a single layer).
        lengths: [N] int64, clips that are real.
    """

    states: Tensor
    lengths: Tensor

    def select(self, index: Tensor) -> VideoEncoding:
        """The videos of these places [M] int64, in this order and as often."""
        return VideoEncoding(self.states[index], self.lengths[index])


# Where products are what costs. GPUs wait for memory, and what is spared in products is moved all the same.
FRUGAL_DEVICES = {"cpu"}

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}  # name: CNM.compute_dtype


class CNM(nn.Module):
    """The published model, batch first; nothing it is given is mutated.

    Shapes used throughout: frames [B, T, frame_dim] with ``frame_lengths`` [B]; words [B, L + 1, word_dim], whose row 0
    is the start token's place (not read), with ``word_lengths`` [B] counting words 1 to L.
    """

    def __init__(self, config: CNMConfig) -> None:
        super().__init__()
        network = config.model.config
        transformer = network.DualTransformer
        sizes = (network.frames_input_size, network.words_input_size, network.vocab_size, network.max_num_words)
        frame_dim, word_dim, vocab_size, max_num_words = (size or 0 for size in sizes)  # filled in by CNMConfig
        D = network.hidden_size
        self.config = config
        self.alpha = network.alpha
        self.max_width = network.max_width
        self.input_dropout = network.dropout
        self.dropout = transformer.dropout

        self.frame_fc = nn.Linear(frame_dim, D)
        self.word_fc = nn.Linear(word_dim, D)
        self.mask_vec = nn.Parameter(torch.zeros(word_dim))
        self.start_vec = nn.Parameter(torch.zeros(word_dim))
        self.trans = DualTransformer(
            D, transformer.num_heads, transformer.num_decoder_layers1, transformer.num_decoder_layers2
        )
        self.fc_rec = nn.Linear(D, vocab_size)
        self.fc_mask_gen = nn.Linear(D, 2)
        self.compute_dtype: torch.dtype | None = None  # of activations, see PRECISIONS; None: as the inputs are
        self.seed_shift = 0  # added to the seeds drawn for dropout: processes that share their draws drop differently
        self.positions: Tensor
        self.register_buffer("positions", sinusoidal_positions(max_num_words + 1, D), persistent=False)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> CNM:
        """The model of a checkpoint, ours or a published one, in evaluation mode. Nothing in the file is executed.

        Raises:
            InputError: the file is missing, no checkpoint, or its parameters do not fit its configuration.
        """
        content = checkpoint.load(path)
        model = cls(CNMConfig.from_json(content["config"], f"{path}: config"))
        try:
            model.load_state_dict(content["model_parameters"])
        except RuntimeError as error:
            detail = " ".join(str(error).split("\n", 1)[-1].split())
            raise InputError(f"{path}: parameters do not fit the configuration stored with them: {detail}") from None
        return model.to(device).eval()

    @torch.no_grad()
    def localize(
        self, frames: Tensor, frame_lengths: Tensor, words: Tensor, word_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where each sentence happens: center and width [B] each, fractions of the video. Without dropout."""
        frames, words = self._narrowed(frames), self._narrowed(words)
        self._check(frames, frame_lengths, words, word_lengths)
        return self.localize_encoded(self.encode_video(frames, frame_lengths), words, word_lengths)

    @torch.no_grad()
    def encode_video(self, frames: Tensor, frame_lengths: Tensor) -> VideoEncoding:
        """Computes once, for ``localize_encoded``, what all sentences about a video share: projection and the first
        self-attention. frames [N, T, frame_dim], frame_lengths [N]; a video of more than ``dataset.max_num_frames``
        frames is averaged to as many clips, as in training."""
        frames, frame_lengths = pool_batch(frames, frame_lengths, self.config.dataset.max_num_frames)
        frames = self._narrowed(frames)
        run = self.forward_pass(frugal=True)
        states = self._project_frames(frames, run)
        first, *others = self.trans.decoder1.layers
        if others:
            states = first.self_attention(states, frame_lengths, run)
        return VideoEncoding(states, frame_lengths)

    @torch.no_grad()
    def localize_encoded(self, video: VideoEncoding, words: Tensor, word_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``localize`` in encoded videos, one per sentence (``VideoEncoding.select`` repeats them)."""
        if len(video.states) != len(words):
            raise ValueError(
                f"CNM: {len(video.states)} encoded videos for {len(words)} sentences; select() one for each sentence"
            )
        words = self._narrowed(words)
        run = self.forward_pass(frugal=True)
        source = self._sentence_source(self._project_words(words, word_lengths, run), word_lengths, run)
        decoder = self.trans.decoder1
        if len(decoder.layers) > 1:
            states = decoder.last_of_encoded(video.states, video.lengths, run, source)
        else:
            states = decoder(video.states, video.lengths, run, source=source, last_only=True)
        return self._gaussian(states)

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
                mask_weights = torch.ones_like(word_ids, dtype=frames.dtype)
            masked_words = sample_masked_words(mask_weights, word_lengths)
        run = self.forward_pass(seed)
        frames, words = self.project_inputs(frames, words, word_lengths, run)
        center, width = self.generate(frames, frame_lengths, words, word_lengths, run)
        clip_frames, clip_lengths = downsample(frames, frame_lengths)
        words, row_lengths = self.reconstructor_words(words, masked_words, word_lengths)

        positive = Gaussian(center, width, self.alpha)
        easy = Gaussian(center, width, self.alpha, complement=True)
        hidden = torch.stack(
            [
                self._reconstruct_branch(clip_frames, clip_lengths, words, row_lengths, gaussian, run)
                for gaussian in (positive, None, easy)
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

    def generate(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        word_lengths: Tensor,
        run: ForwardPass,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Decoding 1: projected frames attend to projected words; the last frame's state gives center and width.

        ``last_only`` leaves out, in the last layer, what no result depends on.
        """
        source = self._sentence_source(words, word_lengths, run)
        return self._gaussian(self.trans.decoder1(frames, frame_lengths, run, source=source, last_only=last_only))

    def _sentence_source(self, words: Tensor, word_lengths: Tensor, run: ForwardPass) -> Source:
        """Projected words, encoded for the frames to attend to."""
        rows = word_lengths + 1
        return Source(self.trans.decoder2(words + self._positions(words), rows, run), rows)

    def _gaussian(self, states: Tensor) -> tuple[Tensor, Tensor]:
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
        gaussian: Gaussian | None,
        run: ForwardPass,
    ) -> Tensor:
        """Decoding 2: masked words attend to the Gaussian-weighted frames. [B, L, D]"""
        frames = self.trans.decoder1(frames, frame_lengths, run, gaussian)
        return self.trans.decoder2(words, row_lengths, run, source=Source(frames, frame_lengths, gaussian))

    def project_inputs(
        self, frames: Tensor, words: Tensor, word_lengths: Tensor, run: ForwardPass
    ) -> tuple[Tensor, Tensor]:
        """Input dropout and projection: frames [B, T, D] and words [B, L + 1, D], row 0 being the start token."""
        return self._project_frames(frames, run), self._project_words(words, word_lengths, run)

    def _project_frames(self, frames: Tensor, run: ForwardPass) -> Tensor:
        return apply_linear(self.frame_fc, run.on_input(self._cast(frames)))

    def _project_words(self, words: Tensor, word_lengths: Tensor, run: ForwardPass) -> Tensor:
        words = self._cast(words)
        start = self.start_vec.to(words.dtype).expand(words.size(0), 1, -1)
        words = run.on_input(torch.cat([start, words[:, 1:]], dim=1))
        return apply_linear(self.word_fc, words, word_lengths + 1 if run.frugal else None)

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def reconstructor_words(self, words: Tensor, masked_words: Tensor, word_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projected words with the masked ones replaced, positions added and the last row dropped; and their lengths.

        Row t predicts word t + 1, and the row after the last word predicts padding (as published).
        """
        mask = apply_linear(self.word_fc, self.mask_vec.to(words.dtype))
        words = torch.where(masked_words.unsqueeze(-1), mask, words) + self._positions(words)
        words = words[:, :-1]  # [B, L, D]
        return words, (word_lengths + 1).clamp(max=words.size(1))

    def forward_pass(self, seed: Tensor | None = None, *, recompute: bool = False, frugal: bool = False) -> ForwardPass:
        """One pass with its dropout masks, none in evaluation mode; without a seed one is drawn.

        ``frugal`` counts where products are what costs, on ``FRUGAL_DEVICES``.
        """
        frugal = frugal and self.mask_vec.device.type in FRUGAL_DEVICES
        if not self.training or self.input_dropout == self.dropout == 0:
            seed = torch.zeros((), dtype=torch.int64, device=self.mask_vec.device)
            return ForwardPass(0.0, 0.0, seed, recompute=recompute, frugal=frugal)
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=self.mask_vec.device)
        seed = seed + self.seed_shift
        return ForwardPass(self.input_dropout, self.dropout, seed, recompute=recompute, frugal=frugal)

    def _positions(self, words: Tensor) -> Tensor:
        if words.size(1) > self.positions.size(0):  # sentences longer than the configuration foresaw
            positions = sinusoidal_positions(words.size(1), self.positions.size(1))
            self.positions = positions.to(self.positions.device, self.positions.dtype)
        return self.positions[: words.size(1)].to(words.dtype)

    def _narrowed(self, inputs: Tensor) -> Tensor:
        """float64, which NumPy makes where nobody asked for it, as the parameters are."""
        return inputs.to(self.frame_fc.weight.dtype) if inputs.dtype == torch.float64 else inputs

    def _check(self, frames: Tensor, frame_lengths: Tensor, words: Tensor, word_lengths: Tensor) -> None:
        check = Arguments("CNM")
        check.sizes = {"frame_dim": self.frame_fc.in_features, "word_dim": self.word_fc.in_features}
        check.floating("frames", frames, "B T frame_dim")
        check.integer("frame_lengths", frame_lengths, "B")
        check.floating("words", words, "B rows word_dim", own_dtype=self.compute_dtype is not None)
        check.integer("word_lengths", word_lengths, "B")
        if words.size(1) < 2:
            raise ValueError(
                f"CNM: words must hold the start token's row and at least one word, got {list(words.shape)}"
            )


def downsample(frames: Tensor, frame_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The T // 4 frames the reconstructor sees, equally spaced, and how many of them are real: [B, P, D], [B]."""
    T = frames.size(1)
    index = torch.linspace(0, T - 1, T // 4, device=frames.device).long()
    return frames.index_select(1, index), (index < frame_lengths[:, None]).sum(1)


def sample_masked_words(mask_weights: Tensor, word_lengths: Tensor, race: Tensor | None = None) -> Tensor:
    """Draws max(l // 3, 1) of each sentence's l words without replacement, in one vectorised race.

    Each word finishes at an exponential time of rate ``mask_weights``; the earliest are masked. That is the law of
    drawing one word after the other with probability proportional to its weight among those left.

    Args:
        mask_weights: [B, L] >= 0, 0 at padding.
        word_lengths: [B] int64.
        race: exponential draws [B, L]; None draws them.

    Returns:
        [B, L + 1] bool: row 0, the start token, is never masked.
    """
    race = torch.empty_like(mask_weights).exponential_() if race is None else race
    finish = race / mask_weights
    rank = finish.argsort(dim=1).argsort(dim=1)
    count = (word_lengths // 3).clamp_min(1).minimum(word_lengths)
    return nn.functional.pad(rank < count[:, None], (1, 0))
