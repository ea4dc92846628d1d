"""The interface of a model to trainer, evaluation and command line, and the parts that all models share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cnm import checkpoint
from cnm.config import Config
from cnm.data.batch import Batch
from cnm.data.features import pool_batch
from cnm.errors import InputError
from cnm.models.layers import DualTransformer, ForwardPass, apply_linear, sinusoidal_positions
from cnm_kernels.absorption import Source
from cnm_kernels.checks import Arguments

# Matmul-bound devices. GPUs are memory-bound: fewer products would move as many bytes.
MATMUL_BOUND_DEVICES = {"cpu"}

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}  # name: Model.compute_dtype


@dataclass(frozen=True)
class Proposals:
    """K moments for each of B sentences, best first.

    Attributes:
        center, width: [B, K], fractions of the video.
        score: [B, K], the higher the better; what it means is the model's business.
    """

    center: Tensor
    width: Tensor
    score: Tensor


@dataclass(frozen=True)
class Scoring:
    """How a model that orders its proposals by reconstruction hides words for that.

    Attributes:
        masks: draws of masked words to average over. They depend on the sentence and ``seed`` alone.
        seed: of the draws.
        published: one random draw from PyTorch's generator instead, and rows scored up to the longest sentence of the
            batch: figures then depend on the batch, as in the published evaluation.
        select: in (0, 1): a moment is where a proposal's Gaussian lies above this part of its peak. None: center +-
            width / 2, as published.

    Raises:
        InputError: masks < 1, seed < 0, or select outside (0, 1).
    """

    masks: int = 4
    seed: int = 0
    published: bool = False
    select: float | None = None

    def __post_init__(self) -> None:
        if self.masks < 1 or self.seed < 0:
            raise InputError(f"Scoring: masks must be 1 or more and seed 0 or more, got {self.masks} and {self.seed}")
        if self.select is not None and not 0 < self.select < 1:
            raise InputError(f"Scoring: select must lie between 0 and 1, got {self.select:g}")


@dataclass(frozen=True)
class VideoEncoding:
    """The part of N videos' localization that does not depend on the sentence: see ``Model.encode_video``.

    Attributes:
        states: [N, rows, D], after the first self-attention (projected frames where decoder1 has a single layer).
        lengths: [N] int64, clips that are real.
        clips: [N, P, D], projected frames for the reconstructor, and how many are real [N]; None where no proposal is
            scored.
    """

    states: Tensor
    lengths: Tensor
    clips: tuple[Tensor, Tensor] | None = None

    def select(self, index: Tensor) -> VideoEncoding:
        """The videos of these places [M] int64, in this order and as often."""
        clips = None if self.clips is None else (self.clips[0][index], self.clips[1][index])
        return VideoEncoding(self.states[index], self.lengths[index], clips)


class Model(nn.Module, ABC):
    """A localizer of two decoders over projected frames and words, batch first; nothing it is given is mutated.

    Shapes used throughout: frames [B, T, frame_dim] with ``frame_lengths`` [B]; words [B, L + 1, word_dim], whose row 0
    is the start token's place (not read), with ``word_lengths`` [B] counting words 1 to L.

    Attributes:
        num_proposals: K, the moments proposed per sentence.
        alpha, min_width: a proposal as a weight over time x: exp(-alpha (x - center)^2 / max(width, min_width)^2).
        compute_dtype: of activations, see ``PRECISIONS``; None: as the inputs are.
    """

    num_proposals: int
    alpha: float
    min_width: float

    def __init__(self, config: Config) -> None:
        super().__init__()
        network = config.model.config
        transformer = network.DualTransformer
        sizes = (network.frames_input_size, network.words_input_size, network.max_num_words)
        frame_dim, word_dim, max_num_words = (size or 0 for size in sizes)  # filled in by Config
        D = network.hidden_size
        self.config = config
        self.input_dropout = network.dropout
        self.dropout = transformer.dropout

        self.frame_fc = nn.Linear(frame_dim, D)
        self.word_fc = nn.Linear(word_dim, D)
        self.mask_vec = nn.Parameter(torch.zeros(word_dim))
        self.start_vec = nn.Parameter(torch.zeros(word_dim))
        self.trans = DualTransformer(
            D, transformer.num_heads, transformer.num_decoder_layers1, transformer.num_decoder_layers2
        )
        self.compute_dtype: torch.dtype | None = None
        self.seed_shift = 0  # added to the seeds drawn for dropout: processes that share their draws drop differently
        self.positions: Tensor
        self.register_buffer("positions", sinusoidal_positions(max_num_words + 1, D), persistent=False)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a checkpoint, ours or a published one, in evaluation mode. Nothing in the file is executed.

        Raises:
            InputError: the file is missing, no checkpoint, of another model, or its parameters do not fit its
                configuration.
        """
        return cls.from_content(checkpoint.load(path), path, device)

    @classmethod
    def from_content(cls, content: dict[str, Any], path: str | Path, device: torch.device | str = "cpu") -> Self:
        """``from_checkpoint`` of what ``cnm.checkpoint.load`` gave; ``path`` is for messages."""
        config = Config.from_json(content["config"], f"{path}: config")
        if config.model.name != cls.__name__:
            raise InputError(
                f"{path}: holds a {config.model.name}, not a {cls.__name__}; load it with cnm.models.load_checkpoint"
            )
        model = cls(config)
        try:
            model.load_state_dict(content["model_parameters"])
        except RuntimeError as error:
            detail = " ".join(str(error).split("\n", 1)[-1].split())
            raise InputError(f"{path}: parameters do not fit the configuration stored with them: {detail}") from None
        return model.to(device).eval()

    @property
    @abstractmethod
    def word_head(self) -> nn.Linear:
        """The layer that turns states into logits over the vocabulary."""

    @abstractmethod
    def _gaussians(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Center and width of each proposal from the states of decoding 1, [B] or [B, K]."""

    @abstractmethod
    def encode_video(self, frames: Tensor, frame_lengths: Tensor) -> VideoEncoding:
        """Computes once what all sentences about a video share. frames [N, T, frame_dim], frame_lengths [N]."""

    @abstractmethod
    def proposals(
        self, batch: Batch, *, video: VideoEncoding | None = None, scoring: Scoring | None = None
    ) -> Proposals:
        """Proposes moments for each sentence. Without dropout, in training mode too.

        Args:
            batch: the sentences and, unless ``video`` is given, their videos.
            video: the videos encoded, one per sentence (``VideoEncoding.select`` repeats them).
            scoring: how proposals are ordered, for models that have several.
        """

    def project_inputs(
        self, frames: Tensor, words: Tensor, word_lengths: Tensor, ctx: ForwardPass
    ) -> tuple[Tensor, Tensor]:
        """Input dropout and projection: frames [B, T, D] and words [B, L + 1, D], row 0 being the start token."""
        return self._project_frames(frames, ctx), self._project_words(words, word_lengths, ctx)

    def _project_frames(self, frames: Tensor, ctx: ForwardPass) -> Tensor:
        return ctx.projected(self.frame_fc, self._cast(frames))

    def _project_words(self, words: Tensor, word_lengths: Tensor, ctx: ForwardPass) -> Tensor:
        words = self._cast(words)
        start = self.start_vec.to(words.dtype).expand(words.size(0), 1, -1)
        words = ctx.on_input(torch.cat([start, words[:, 1:]], dim=1))
        return apply_linear(self.word_fc, words, word_lengths + 1 if ctx.minimize_flops else None)

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

    def forward_pass(
        self,
        seed: Tensor | None = None,
        *,
        recompute: bool = False,
        minimize_flops: bool = False,
        dropout: bool = True,
    ) -> ForwardPass:
        """One pass with its dropout masks, none in evaluation mode or without ``dropout``; without a seed one is drawn.

        ``minimize_flops`` counts where products are what costs, on ``MATMUL_BOUND_DEVICES``.
        """
        minimize_flops = minimize_flops and self.mask_vec.device.type in MATMUL_BOUND_DEVICES
        if not (dropout and self.training) or self.input_dropout == self.dropout == 0:
            seed = torch.zeros((), dtype=torch.int64, device=self.mask_vec.device)
            return ForwardPass(0.0, 0.0, seed, recompute=recompute, minimize_flops=minimize_flops)
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=self.mask_vec.device)
        seed = seed + self.seed_shift
        return ForwardPass(self.input_dropout, self.dropout, seed, recompute=recompute, minimize_flops=minimize_flops)

    def _positions(self, words: Tensor) -> Tensor:
        if words.size(1) > self.positions.size(0):  # sentences longer than the configuration foresaw
            positions = sinusoidal_positions(words.size(1), self.positions.size(1))
            self.positions = positions.to(self.positions.device, self.positions.dtype)
        return self.positions[: words.size(1)].to(words.dtype)

    def _pooled(self, frames: Tensor, frame_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Videos of more than ``dataset.max_num_frames`` frames, averaged to as many clips, as in training."""
        frames, frame_lengths = pool_batch(frames, frame_lengths, self.config.dataset.max_num_frames)
        return self._narrowed(frames), frame_lengths

    def _narrowed(self, inputs: Tensor) -> Tensor:
        """float64, which NumPy makes where nobody asked for it, as the parameters are."""
        return inputs.to(self.frame_fc.weight.dtype) if inputs.dtype == torch.float64 else inputs

    def generate(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        word_lengths: Tensor,
        ctx: ForwardPass,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Decoding 1: projected frames attend to projected words; the last row's state gives centers and widths.

        ``last_only`` leaves out, in the last layer, what no result depends on.
        """
        source = self._sentence_source(words, word_lengths, ctx)
        return self._gaussians(self.trans.decoder1(frames, frame_lengths, ctx, source=source, last_only=last_only))

    def _sentence_source(self, words: Tensor, word_lengths: Tensor, ctx: ForwardPass) -> Source:
        """Projected words, encoded for the frames to attend to."""
        rows = word_lengths + 1
        return Source(self.trans.decoder2(words + self._positions(words), rows, ctx), rows)

    def _check(self, frames: Tensor, frame_lengths: Tensor, words: Tensor, word_lengths: Tensor) -> None:
        check = Arguments(type(self).__name__)
        check.sizes = {"frame_dim": self.frame_fc.in_features, "word_dim": self.word_fc.in_features}
        check.floating("frames", frames, "B T frame_dim")
        check.integer("frame_lengths", frame_lengths, "B")
        check.floating("words", words, "B rows word_dim", own_dtype=self.compute_dtype is not None)
        check.integer("word_lengths", word_lengths, "B")
        if words.size(1) < 2:
            raise ValueError(
                f"{check.op}: words must hold the start token's row and at least one word, got {list(words.shape)}"
            )

    def _check_encoded(self, video: VideoEncoding, words: Tensor) -> None:
        if len(video.states) != len(words):
            raise ValueError(
                f"{type(self).__name__}: {len(video.states)} encoded videos for {len(words)} sentences; select() one "
                f"for each sentence"
            )


def vocabulary_size(config: Config) -> int:
    """Words the model knows, padding included."""
    return cast(int, config.model.config.vocab_size)


def downsample(frames: Tensor, frame_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The T // 4 frames the reconstructor sees, equally spaced, and how many of them are real: [B, P, D], [B].

    Raises:
        ValueError: T < 4: the reconstructor would see nothing of the video, and rate all proposals alike.
    """
    T = frames.size(1)
    if T < 4:
        raise ValueError(f"frames: needs at least 4 rows, for the reconstructor sees a quarter of them, got {T}")
    index = torch.linspace(0, T - 1, T // 4, device=frames.device).long()
    return frames.index_select(1, index), (index < frame_lengths[:, None]).sum(1)
