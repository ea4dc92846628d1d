"""From a checkpoint, a video and sentences to moments.

What a program needs::

    import cnm

    localizer = cnm.Localizer.from_checkpoint("runs/first/best.pt")
    video = localizer.encode("video.mp4")  # or features: an array, "F.npy" or "F.hdf5:VIDEO"
    for found in localizer.find(video, ["a person opens the door", "a dog runs"]):
        print(f"{found.start:.1f} to {found.end:.1f} s, score {found.score:.2f}: {found.query}")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import cnm_kernels as kernels
from cnm import checkpoint, metrics
from cnm.data import Vocabulary, load_features, load_vocabulary
from cnm.data.batch import Batch
from cnm.data.features import pool
from cnm.data.origin import JOINT, Origin, recorded_duration, split_source
from cnm.data.vocabulary import EncodedSentence
from cnm.errors import InputError
from cnm.evaluation import check_vocabulary
from cnm.files import check_plain
from cnm.masking import mask_weights
from cnm.models import Model, Proposals, Scoring, VideoEncoding, load_content

if TYPE_CHECKING:  # the extra [video]
    from cnm.video.encoders import Encoder
    from cnm.video.extract import Sampling

BATCH = 64  # sentences localized at once; more of them gain no speed and cost memory


@dataclass(frozen=True)
class Video:
    """A video that ``Localizer.encode`` has read; sentences are looked for in it.

    Attributes:
        encoding: what all sentences about it share.
        duration: in seconds; None where nobody said.
    """

    encoding: VideoEncoding
    duration: float | None


@dataclass(frozen=True)
class Proposal:
    """One moment proposed for a sentence.

    Attributes:
        start, end: in seconds; in fractions of the video where its duration is not known.
        score: higher is better, to be compared among the proposals of one sentence. CNM makes one proposal and does
            not rate it: 0.
        center, width: of the Gaussian, fractions of the video.
    """

    start: float
    end: float
    score: float
    center: float
    width: float


@dataclass(frozen=True)
class LocalizedMoment:
    """The moment of a sentence: the fields of its best proposal, and all proposals.

    Attributes:
        query: the sentence.
        proposals: best first, one at least.
        unknown: the sentence's words that the model does not know and so ignored.
        cut: its words beyond the model's ``max_num_words`` known ones, not read either.
    """

    query: str
    proposals: tuple[Proposal, ...]
    unknown: tuple[str, ...]
    cut: tuple[str, ...] = ()

    @property
    def best(self) -> Proposal:
        return self.proposals[0]

    @property
    def start(self) -> float:
        return self.best.start

    @property
    def end(self) -> float:
        return self.best.end

    @property
    def score(self) -> float:
        return self.best.score

    @property
    def center(self) -> float:
        return self.best.center

    @property
    def width(self) -> float:
        return self.best.width


class Localizer:
    """Finds sentences in videos with a trained model.

    Args:
        model: in evaluation mode.
        vocabulary: the words it was trained with.
        origin: of the features it was trained on, where it is known.

    Attributes:
        encoder, sampling: how video files become features; found in ``origin`` when the first one comes, or set by the
            caller before.

    Raises:
        InputError: the vocabulary is not the model's.
    """

    def __init__(self, model: Model, vocabulary: Vocabulary, origin: Origin | None = None) -> None:
        check_vocabulary(model, vocabulary)
        self.model = model
        self.vocabulary = vocabulary
        self.origin = origin
        self.encoder: Encoder | None = None
        self.sampling: Sampling | None = None

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str = "cpu", *, vocab: str | Path | None = None
    ) -> Localizer:
        """The model of a checkpoint, with the vocabulary stored in it, or else in ``vocab`` or its configuration.

        Raises:
            InputError: the checkpoint or the vocabulary is missing, unreadable, or does not fit.
        """
        content = checkpoint.load(path)
        model = load_content(content, path, device)
        state = content.get("vocabulary")
        stored = None if state is None else Vocabulary.from_state(state)
        if stored is not None and vocab is None:
            vocabulary = stored
            width, expected = vocabulary.vectors.shape[1], model.config.dataset.word_dim
            if width != expected:
                raise InputError(
                    f"{path}: its word vectors are {width} wide, but its dataset.word_dim is {expected}; write it anew"
                )
        else:
            dataset = model.config.dataset
            if vocab is not None:
                dataset = dataset.model_copy(update={"vocab_path": str(vocab)})
            vocabulary = load_vocabulary(dataset)
            check_vocabulary(model, vocabulary, stored)
        return cls(model, vocabulary, Origin.from_record(content.get("features")))

    def encode(self, source: np.ndarray | Tensor | str | Path, *, duration: float | None = None) -> Video:
        """Reads and encodes a video, once for all sentences about it.

        Args:
            source: features [n, frame_dim], n >= 1; or where they are, ``F.npy`` or ``F.hdf5:VIDEO``; or a video file.
            duration: of the video in seconds, of features alone. Otherwise as recorded beside them; where neither is
                known, moments come as fractions of the video. A video file has its own.

        Raises:
            InputError: as ``encode_features`` and ``encode_video``; or a video file was given a duration.
        """
        if not isinstance(source, (str, Path)):
            return self._encoded(pool(_checked(source, self._frame_dim), self._num_clips), duration)
        if split_source(str(source)) is not None:
            return self.encode_features(source, duration=duration)
        if duration is not None:
            raise InputError(f"{source}: a video file has its own duration; leave duration out")
        return self.encode_video(source)

    def encode_features(self, source: str | Path, *, duration: float | None = None) -> Video:
        """``encode`` of a file of features.

        Raises:
            InputError: the features are missing, unreadable, of another width or encoder, or hold NaN or infinity; the
                duration is not positive.
        """
        source = str(source)
        clips = load_features(source, self._frame_dim, self._num_clips)
        split = split_source(source)
        if split is not None and self.origin is not None:
            self.origin.check(Origin.of(split[0]), source)
        return self._encoded(clips, recorded_duration(source) if duration is None else duration)

    def encode_video(self, path: str | Path) -> Video:
        """``encode`` of a video file, whose features are extracted as the training's were.

        Raises:
            InputError: the video cannot be read, the training's encoder is not known or cannot be loaded, or its
                features are of another width.
        """
        from cnm.video.extract import video_features

        encoder, sampling = self._extraction(path)
        found = video_features(path, encoder, sampling)
        clips = pool(_checked(found.features, self._frame_dim), self._num_clips)
        return self._encoded(clips, found.duration)

    def find(self, video: Video, sentences: Sequence[str], *, scoring: Scoring | None = None) -> list[LocalizedMoment]:
        """Returns the moment of each sentence in an encoded video, in the given order.

        What is beyond the model's ``max_num_words`` known words of a sentence is ignored, see ``LocalizedMoment.cut``.

        Args:
            scoring: how models that score their proposals do it, and how wide a moment a Gaussian stands for.

        Raises:
            InputError: a sentence is empty or has no word of the vocabulary, or the model's answer is not a number.
        """
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        encoded = [self._encode_sentence(sentence) for sentence in sentences]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))  # alike in length: less padding
        found: list[LocalizedMoment | None] = [None] * len(encoded)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            proposals = self._propose(video, [encoded[place] for place in places], scoring)
            arrays = [x.double().cpu().numpy() for x in (proposals.center, proposals.width, proposals.score)]
            if not np.isfinite(arrays).all():
                raise InputError(
                    "the model's answer is not a number; its checkpoint, or the features, hold numbers too large"
                )
            widths = arrays[1]
            if scoring is not None and scoring.select is not None:
                widths = metrics.width_above(scoring.select, widths, self.model.alpha, self.model.min_width)
            moments = metrics.moments_from_gaussian(arrays[0], widths) * (video.duration or 1.0)  # [B, K, 2]
            for row, place in enumerate(places):
                columns = (moments[row, :, 0], moments[row, :, 1], arrays[2][row], arrays[0][row], arrays[1][row])
                ranked = tuple(Proposal(*map(float, values)) for values in zip(*columns, strict=True))
                unknown, cut = tuple(encoded[place].unknown), tuple(encoded[place].cut)
                found[place] = LocalizedMoment(sentences[place], ranked, unknown, cut)
        return [item for item in found if item is not None]

    def curve(self, proposal: Proposal, points: int) -> np.ndarray:
        """A proposal's Gaussian at ``points`` equal steps from the video's start to its end: float64, 0 to 1."""
        center, width = (torch.tensor([value], dtype=torch.float64) for value in (proposal.center, proposal.width))
        values: np.ndarray = kernels.gaussian_mask(
            center, width, points, alpha=self.model.alpha, min_width=self.model.min_width
        )[0].numpy()
        return values

    def _extraction(self, path: str | Path) -> tuple[Encoder, Sampling]:
        """The encoder and the sampling of video files, loaded once."""
        from cnm.video.encoders import Encoder
        from cnm.video.extract import Sampling

        if self.origin is not None and JOINT in self.origin.encoder:
            raise InputError(
                f"{path}: the model was trained on features of {self.origin} side by side; extract each of them "
                f"and give them together, as an array"
            )
        if self.encoder is None:
            if self.origin is None:
                raise InputError(
                    f"{path}: the checkpoint does not say which encoder made its features; name it (--encoder), or "
                    f"extract the features first"
                )
            self.encoder = Encoder(self.origin.encoder, self.device)
        if self.origin is not None:
            made = Origin(self.encoder.name, self.encoder.weights_sha256, None, None)
            self.origin.check(made, str(path))
        if self.encoder.width != self._frame_dim:
            raise InputError(
                f"{path}: the features of {self.encoder.name} are {self.encoder.width} wide, but the model was trained "
                f"on {self._frame_dim}; name its own encoder"
            )
        if self.sampling is None:
            self.sampling = Sampling.default() if self.origin is None else Sampling.of(self.origin)
        return self.encoder, self.sampling

    def _encoded(self, clips: np.ndarray, duration: float | None) -> Video:
        if duration is not None and not 0 < duration < float("inf"):
            raise InputError(f"duration: must be more than 0 seconds, got {duration:g}")
        frames = torch.from_numpy(clips).to(self.device)[None]
        return Video(self.model.encode_video(frames, torch.tensor([len(clips)], device=self.device)), duration)

    @property
    def _frame_dim(self) -> int:
        return self.model.config.dataset.frame_dim

    @property
    def _num_clips(self) -> int:
        return self.model.config.dataset.max_num_frames

    @property
    def device(self) -> torch.device:
        return self.model.word_head.weight.device

    def _encode_sentence(self, sentence: str) -> EncodedSentence:
        check_plain(sentence, "query")
        if not sentence.strip():
            raise InputError("query: is empty; give a sentence")
        encoded = self.vocabulary.encode(sentence, self.model.config.dataset.max_num_words)
        if len(encoded.ids) == 0:
            raise InputError(
                f"query {sentence!r}: has no word the model knows ({len(self.vocabulary) - 1} words); say it in other "
                f"words"
            )
        return encoded

    def _propose(self, video: Video, sentences: list[EncodedSentence], scoring: Scoring | None) -> Proposals:
        """K proposals for each of B sentences."""
        lengths = np.array([len(sentence.ids) for sentence in sentences])
        longest = int(lengths.max())
        ids = np.zeros((len(sentences), longest), np.int64)
        content = np.zeros((len(sentences), longest), bool)
        for row, sentence in enumerate(sentences):
            ids[row, : lengths[row]] = sentence.ids
            content[row, : lengths[row]] = sentence.content
        vectors = torch.from_numpy(self.vocabulary.vectors)[torch.from_numpy(ids)]
        encoding = video.encoding.select(torch.zeros(len(ids), dtype=torch.int64, device=self.device))
        batch = Batch(
            frames=torch.empty(0),
            frame_lengths=torch.empty(0, dtype=torch.int64),
            words=torch.nn.functional.pad(vectors, (0, 0, 1, 0)),  # row 0: the start token's place
            word_ids=torch.from_numpy(ids),
            word_lengths=torch.from_numpy(lengths),
            mask_weights=torch.from_numpy(mask_weights(content, lengths)),
        ).to(self.device)
        return self.model.proposals(batch, video=encoding, scoring=scoring)


def _checked(features: np.ndarray | Tensor, frame_dim: int) -> np.ndarray:
    """Features given as an array: [n, frame_dim] float32."""
    array = features.detach().cpu().float().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim != 2 or len(array) == 0 or array.dtype.kind not in "fiu":
        raise InputError(f"features: hold {array.dtype} of shape {list(array.shape)}, not numbers [n, {frame_dim}]")
    if array.shape[1] != frame_dim:
        raise InputError(
            f"features: are {array.shape[1]} wide, but the model was trained on {frame_dim}; take features of the same "
            f"kind as in training"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError("features: hold NaN or infinity; extract them again")
    return array
