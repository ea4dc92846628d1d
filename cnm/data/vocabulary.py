"""The vocabulary of a model: words, their vectors, and the encoding of sentences."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnm.data import vocabulary_files
from cnm.data.pickles import read_pickle
from cnm.data.tagging import tag
from cnm.errors import InputError

PADDING = "<pad>"


@dataclass(frozen=True)
class EncodedSentence:
    """The known words of a sentence, in order, truncated to the configured number."""

    ids: np.ndarray  # [L] int64
    content: np.ndarray  # [L] bool, True for nouns, verbs, adjectives and adverbs
    unknown: list[str]  # words that the vocabulary lacks
    cut: list[str]  # known words beyond the configured number


class Vocabulary:
    """Words and their vectors. Id 0 is the padding, whose vector is zero.

    Attributes:
        words: V strings; ``words[0]`` is the padding.
        vectors: [V, word_dim] float32.
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray) -> None:
        self.words = list(words)
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._ids = {word: index for index, word in enumerate(self.words) if index > 0}

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int | None:
        """Returns the word's id, or None if it is unknown."""
        return self._ids.get(word)

    def encode(self, sentence: str, max_words: int) -> EncodedSentence:
        """Tokenizes and tags a sentence; keeps its known words, at most ``max_words``."""
        ids: list[int] = []
        content: list[bool] = []
        unknown: list[str] = []
        cut: list[str] = []
        for token, is_content in tag(sentence):
            known = token in self._ids
            if known and len(ids) < max_words:
                ids.append(self._ids[token])
                content.append(is_content)
            elif any(map(str.isalnum, token)):  # nobody misses a full stop
                (cut if known else unknown).append(token)
        return EncodedSentence(np.asarray(ids, dtype=np.int64), np.asarray(content, dtype=bool), unknown, cut)

    def state(self) -> dict[str, Any]:
        """Returns the data that a checkpoint stores, so that it can encode sentences without a vocabulary file."""
        return {"words": self.words, "vectors": torch.from_numpy(self.vectors.copy())}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Vocabulary:
        return cls(state["words"], state["vectors"].numpy())

    @classmethod
    def from_file(cls, path: str | Path, vocab_size: int, word_dim: int) -> Vocabulary:
        """Reads a vocabulary that ``cnm vocabulary`` wrote (``F.safetensors`` and ``F.json``), or the published pickle.

        Args:
            vocab_size: the largest number of words to keep, most frequent first.

        Raises:
            InputError: a file is missing, damaged or hostile, or its vectors are not ``word_dim`` wide.
        """
        if not vocabulary_files.is_safe(path):
            return cls.from_pickle(path, vocab_size, word_dim)
        words, vectors = vocabulary_files.read(path)
        if vectors.shape[1] != word_dim:
            raise InputError(
                f"{path}: its vectors are {vectors.shape[1]} wide, but word_dim is {word_dim}; give word_dim "
                f"{vectors.shape[1]}, or another file"
            )
        padding = np.zeros((1, word_dim), np.float32)
        return cls([PADDING, *words[:vocab_size]], np.concatenate([padding, vectors[:vocab_size]]))

    @classmethod
    def from_pickle(cls, path: str | Path, vocab_size: int, word_dim: int) -> Vocabulary:
        """Reads the published pickle of w2id, id2vec and counter; keeps the ``vocab_size`` most common words.

        Raises:
            InputError: the file is unreadable, hostile, of another shape, or its vectors are not ``word_dim`` wide.
        """
        content = read_pickle(path)
        problem = _problem(content)
        if problem:
            raise InputError(f"{path}: {problem}; a vocabulary holds w2id, id2vec and counter (a Counter of words)")
        words = [word for word, _ in content["counter"].most_common(vocab_size)]
        vectors = np.zeros((len(words) + 1, word_dim), dtype=np.float32)
        for index, word in enumerate(words, start=1):
            try:
                index_of = content["w2id"][word]
                if isinstance(index_of, bool) or not isinstance(index_of, (int, np.integer)) or index_of < 0:
                    raise InputError(f"{path}: w2id of {word!r} is {index_of!r}, not a row of id2vec; correct the file")
                vector = _vector(content["id2vec"][index_of])
            except InputError:
                raise
            except (KeyError, IndexError, TypeError, ValueError, OverflowError):
                raise InputError(f"{path}: word {word!r} is counted but has no vector; fetch the file again") from None
            if vector.shape != (word_dim,):
                raise InputError(
                    f"{path}: the vector of {word!r} has shape {list(vector.shape)}, "
                    f"but word_dim is {word_dim}; give the width of the vectors, or another file"
                )
            if not np.isfinite(vector).all():
                raise InputError(f"{path}: the vector of {word!r} holds NaN or infinity; fetch the file again")
            vectors[index] = vector
        return cls([PADDING, *words], vectors)


def _vector(values: Any) -> np.ndarray:
    """Converts numbers to float32; refuses texts such as "1.5" and booleans, which NumPy would convert."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{array.dtype} is not a number")
    with np.errstate(over="ignore"):  # overflow gives infinity; the caller refuses it
        return array.astype(np.float32)


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}"
    for name, kind in (("w2id", dict), ("id2vec", (list, tuple, dict, np.ndarray)), ("counter", collections.Counter)):
        if name not in content:
            return f"lacks {name!r}"
        if not isinstance(content[name], kind):
            return f"{name!r} is a {type(content[name]).__name__}"
    if not all(
        isinstance(word, str) and isinstance(count, (int, np.integer)) for word, count in content["counter"].items()
    ):
        return "'counter' does not count words"
    return None if content["counter"] else "'counter' is empty"
