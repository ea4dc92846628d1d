"""One split of a dataset: samples, encoded sentences and pooled features, ready to be cut into batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from cnm.config import DatasetConfig
from cnm.data import cache, synthetic
from cnm.data.annotations import Sample, read_annotations, windows_known
from cnm.data.batch import Batch
from cnm.data.buffers import BufferPool
from cnm.data.expected import Expected, origin_of
from cnm.data.feature_sources import open_features
from cnm.data.features import pool
from cnm.data.fingerprint import fingerprint, places
from cnm.data.origin import Origin
from cnm.data.tagging import tagger_name, tokenizer_name
from cnm.data.vocabulary import Vocabulary
from cnm.errors import InputError
from cnm.masking import mask_weights

SplitName = Literal["train", "val", "test"]

# The NumPy dtype that stores a torch dtype; NumPy has no bfloat16, so its bits are stored as integers.
STORED = {torch.float32: np.float32, torch.bfloat16: np.uint16}


class Split:
    """Sentences with their videos' features.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        vocabulary: maps word ids to words.
        samples: one per sentence, in the file's order.
        scored: whether the moments of all sentences are known.
        notes: messages for the user on corrected or omitted data.
        dtype: the dtype of the batches' frames.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        samples: Sequence[Sample],
        features: np.ndarray,
        video_rows: np.ndarray,
        encoded: tuple[np.ndarray, np.ndarray, np.ndarray],
        notes: list[str],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.samples = samples
        self.scored = all(sample.moment is not None for sample in samples)
        self.notes = notes
        self.dtype = dtype
        self._features = features  # [videos, T, frame_dim] as STORED, on disk
        self._video_rows = video_rows  # [N], each sample's row in features
        self._ids, self._content, self._lengths = encoded  # [N, max_num_words], [N, max_num_words], [N]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def moments(self) -> np.ndarray:
        """[N, 2] float64, the first of ``windows``; evaluation alone reads it."""
        return self.windows[:, 0]

    @property
    def windows(self) -> np.ndarray:
        """[N, M, 2] float64, all moments of each sentence as fractions; the first moment fills unused places.

        Raises:
            InputError: a sentence's moment is not known.
        """
        return windows_of(self.samples, f"{self.name} split")

    @property
    def max_num_words(self) -> int:
        """Words of a sentence beyond this number were left out."""
        return int(self._ids.shape[1])

    def fingerprint(self) -> dict[str, Any]:
        """Describes the sentences and features, see ``cnm.data.fingerprint``."""
        kept = torch.from_numpy(np.array(self._features[places(len(self._features))])).view(self.dtype)
        return fingerprint(self.samples, (self._ids, self._content, self._lengths), kept)

    def longest(self, indices: np.ndarray) -> int:
        """Returns the number of words in the longest of these sentences, at least 1."""
        return max(int(self._lengths[indices].max(initial=0)), 1)

    def batch(
        self, indices: Sequence[int] | np.ndarray, words: int | None = None, buffers: BufferPool | None = None
    ) -> Batch:
        """Returns these samples on the CPU, padded to ``words`` words (default: those of the longest sentence).

        ``buffers`` lends the memory of the frames; by default it is newly allocated.
        """
        indices = np.asarray(indices)
        lengths = self._lengths[indices]
        L = self.longest(indices) if words is None else words
        ids = self._ids[indices, :L]
        shape = (len(indices), *self._features.shape[1:])
        kind = self._features.dtype
        frames = torch.from_numpy(np.empty(shape, kind)) if buffers is None else buffers.take(shape, kind)
        # All indices are valid. With "raise" NumPy would write to out through a copy.
        np.take(self._features, self._video_rows[indices], axis=0, out=frames.numpy(), mode="clip")
        vectors = np.zeros((len(indices), L + 1, self.vocabulary.vectors.shape[1]), dtype=np.float32)
        np.take(self.vocabulary.vectors, ids, axis=0, out=vectors[:, 1:])
        return Batch(
            frames=frames.view(self.dtype),
            frame_lengths=torch.full((len(indices),), frames.size(1)),
            words=torch.from_numpy(vectors),
            word_ids=torch.from_numpy(ids.astype(np.int64)),
            word_lengths=torch.from_numpy(lengths.astype(np.int64)),
            mask_weights=torch.from_numpy(mask_weights(self._content[indices, :L], lengths)),
        )


def windows_of(samples: Sequence[Sample], name: str) -> np.ndarray:
    """[N, M, 2] float64, all moments as fractions of their video; the first moment fills unused places.

    Raises:
        InputError: a sentence's moment is not known; ``name`` is what the message calls the sentences.
    """
    if not windows_known(samples, name):
        raise InputError(f"{name}: its sentences have no moments, so nothing can be scored; take annotations with them")
    most = max((len(sample.windows) for sample in samples), default=1)
    filled = [(*sample.windows, *sample.windows[:1] * (most - len(sample.windows))) for sample in samples]
    return np.array(
        [
            [[time / sample.duration for time in moment] for moment in windows]
            for sample, windows in zip(samples, filled, strict=True)
        ]
    )


def load_vocabulary(config: DatasetConfig) -> Vocabulary:
    """Reads the vocabulary that a dataset section names.

    Raises:
        InputError: the file is missing, hostile or does not match the configuration.
    """
    if config.dataset == "synthetic":
        return synthetic.vocabulary(config)
    assert config.vocab_path is not None  # DatasetConfig refuses it
    return Vocabulary.from_file(config.vocab_path, config.vocab_size, config.word_dim)


def open_split(
    config: DatasetConfig,
    split: SplitName,
    *,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    stored: Vocabulary | None = None,
    origin: Origin | None = None,
    keep_wordless: bool = False,
) -> Split:
    """Reads a split. The first time it tokenizes sentences and pools features; later it reads both from the cache.

    Args:
        config: the dataset section.
        split: ``train`` omits sentences without a known word; other splits keep and count them.
        keep_wordless: keep them in ``train`` too, to predict every sentence of the file.
        progress: show a bar while features are pooled.
        dtype: of the pooled features, float32 or bfloat16. A model that computes in bfloat16 rounds them anyway, and
            half the bytes take half the time in the cache, in the loader and to the GPU.
        stored: a checkpoint's vocabulary, used if the file ``config.vocab_path`` does not exist.
        origin: the origin of the model's training features, if known; features of another origin are refused.

    Raises:
        InputError: a file is wrong; the message names file, item and remedy.
    """
    missing = config.vocab_path is not None and not Path(config.vocab_path).exists()
    vocabulary = stored if stored is not None and missing else load_vocabulary(config)
    notes: list[str] = []
    if config.dataset == "synthetic":
        samples, features, video_rows = synthetic.generate(config, split)
        features = _as_stored(features, dtype)
        *encoded, cut = _encode(samples, vocabulary, config.max_num_words)
    else:
        path = {"train": config.train_data, "val": config.val_data, "test": config.test_data}[split]
        if path is None:
            raise InputError(f"the configuration has no dataset.{split}_data; name a file there")
        if origin is not None:
            origin.check(origin_of(config, split), f"{split} split")
        samples, notes = read_annotations(path)
        if split != "train":
            windows_known(samples, path)
        *encoded, cut = _cached_encoding(config, samples, vocabulary)
        videos = sorted({sample.video for sample in samples})
        expected = Expected(config)
        notes += expected.notes(videos, split)
        features = _cached_features(config, split, videos, progress, dtype, expected)
        row_of = {video: row for row, video in enumerate(videos)}
        video_rows = np.array([row_of[sample.video] for sample in samples])
    ids, content, lengths = encoded
    if cut.any():
        longer = f"{split}: {int((cut > 0).sum()):,} sentences are longer than {config.max_num_words} known words"
        notes.append(f"{longer}; the rest of them is not read")
    wordless = lengths == 0
    if wordless.any():
        first = samples[int(np.argmax(wordless))].sentence
        skipped = split == "train" and not keep_wordless
        does = "skipped" if skipped else "localized all the same"
        notes.append(f"{split}: {int(wordless.sum())} sentences hold no known word (first: {first!r}); {does}")
        if skipped:
            keep = np.flatnonzero(~wordless)
            # The row in the file identifies a sentence without a qid.
            samples = [replace(samples[i], qid=i if samples[i].qid is None else samples[i].qid) for i in keep.tolist()]
            video_rows = video_rows[keep]
            ids, content, lengths = ids[keep], content[keep], lengths[keep]
    if not samples:
        raise InputError(f"{split}: no sentence holds a word of the vocabulary; vocabulary and annotations do not fit")
    return Split(split, vocabulary, samples, features, video_rows, (ids, content, lengths), notes, dtype)


def _encode(samples: Sequence[Sample], vocabulary: Vocabulary, max_words: int) -> tuple[np.ndarray, ...]:
    """Word ids [N, max_words] int32 (padding 0), content flags of the same shape, lengths and words cut [N] int64."""
    ids = np.zeros((len(samples), max_words), dtype=np.int32)
    content = np.zeros((len(samples), max_words), dtype=bool)
    lengths, cut = np.zeros((2, len(samples)), dtype=np.int64)
    for row, sample in enumerate(samples):
        sentence = vocabulary.encode(sample.sentence, max_words)
        n = lengths[row] = len(sentence.ids)
        ids[row, :n], content[row, :n] = sentence.ids, sentence.content
        cut[row] = len(sentence.cut)
    return ids, content, lengths, cut


def _folder(config: DatasetConfig) -> Path:
    return Path(config.cache_path) if config.cache_path else cache.default_folder()


def _cached_encoding(
    config: DatasetConfig, samples: Sequence[Sample], vocabulary: Vocabulary
) -> tuple[np.ndarray, ...]:
    names = ("ids", "content", "lengths", "cut")

    def build(folder: Path) -> None:
        for name, array in zip(names, _encode(samples, vocabulary, config.max_num_words), strict=True):
            np.save(folder / f"{name}.npy", array)

    sentences = json.dumps([sample.sentence for sample in samples]).encode()
    words = json.dumps(vocabulary.words).encode()
    made_from = {
        "what": "sentences",
        "sentences": hashlib.sha256(sentences).hexdigest(),  # tables beside the file may leave some of them out
        "words": hashlib.sha256(words).hexdigest(),  # a checkpoint's own, where the file is not there
        "max_num_words": config.max_num_words,
        "tokenizer": tokenizer_name(),
        "tagger": tagger_name(),
        "arrays": names,  # an older folder lacks one of them
    }
    folder = cache.build_once(_folder(config), made_from, build)
    return tuple(np.load(folder / f"{name}.npy") for name in names)


def _as_stored(features: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == torch.float32:
        return features
    bits: np.ndarray = torch.from_numpy(features).to(dtype).view(torch.uint16).numpy()
    return bits


def _cached_features(
    config: DatasetConfig, split: str, videos: list[str], progress: bool, dtype: torch.dtype, expected: Expected
) -> np.ndarray:
    shape = (len(videos), config.max_num_frames, config.frame_dim)
    assert config.feature_path is not None  # DatasetConfig refuses it
    with open_features(config.feature_path, config.feature_pattern, split) as source:

        def build(folder: Path) -> None:
            source.check(videos, config.frame_dim)
            expected.check_shapes(source, videos)
            bar = tqdm(videos, desc="pooling features", unit="video", disable=None if progress else True)
            with cache.rows_file(folder / "clips.npy", shape, STORED[dtype]) as append:
                for video in bar:
                    frames = source.frames(video, config.frame_dim)
                    expected.check(video, frames, source.path)
                    clips = pool(frames, config.max_num_frames)
                    append(_as_stored(clips, dtype))

        made_from = {
            "what": "clips",
            "features": source.identity(videos),
            "videos": videos,
            "shape": shape,
            "dtype": str(dtype),
        }
        if config.feature_manifest is not None:
            made_from["manifest"] = cache.content_hash(config.feature_manifest)
        folder = cache.build_once(_folder(config), made_from, build)
    return np.load(folder / "clips.npy", mmap_mode="r")
