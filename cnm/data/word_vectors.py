"""Word vectors as text (GloVe, word2vec): each line is a word and its numbers; a header line is optional."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cnm.data.annotations import Sample
from cnm.data.tagging import tokenize
from cnm.errors import InputError


def count_words(samples: Sequence[Sample]) -> Counter[str]:
    """Counts the lower-cased tokens of the sentences, with punctuation, as the published vocabularies do."""
    return Counter(token for sample in samples for token in tokenize(sample.sentence))


def read_vectors(
    path: str | Path, words: Iterable[str], word_dim: int | None = None, *, progress: bool = False
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the vectors [word_dim] float32 of the words that the file has, and ``word_dim``.

    Reads the file line by line and never holds all of it. If a word is there twice, the first vector is taken.

    Args:
        word_dim: the expected width; None takes that of the file.

    Raises:
        InputError: the file is unreadable, truncated, not such a text, of another width, or holds NaN or infinity.
    """
    wanted = {word.encode(): word for word in words}
    found: dict[str, np.ndarray] = {}
    width = rows = promised = 0
    last = b""
    try:
        with (
            open(path, "rb") as file,
            tqdm(
                total=os.path.getsize(path),
                desc="reading vectors",
                unit="B",
                unit_scale=True,
                disable=None if progress else True,
            ) as bar,
        ):
            for number, line in enumerate(file, start=1):
                bar.update(len(line))
                fields = line.rstrip()
                if number == 1:
                    fields = fields.removeprefix(codecs.BOM_UTF8)
                if not fields:
                    continue
                if number == 1 and len(fields.split()) == 2 and fields.replace(b" ", b"").isdigit():
                    promised, width = map(int, fields.split())
                    continue
                if not width:
                    width = len(fields.split(b" ")) - 1
                if rows == 0:
                    _check_width(path, number, fields, width, word_dim)
                rows, last = rows + 1, fields
                word = wanted.get(fields.partition(b" ")[0])
                if word is not None and word not in found:
                    numbers = _numbers(path, number, fields, width)
                    if numbers is not None:
                        found[word] = numbers
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if not rows:
        raise InputError(f"{path}: holds no vectors; give a text file of GloVe or word2vec")
    if len(last.rsplit(b" ", width)) != width + 1 or (promised and rows < promised):
        told = f", and its header says {promised:,}" if promised else ""
        raise InputError(f"{path}: is cut short after {rows:,} words{told}; fetch it again")
    return found, width


def _check_width(path: str | Path, number: int, fields: bytes, width: int, word_dim: int | None) -> None:
    """Checks the file's format by its first row, whose word holds no space."""
    try:
        if width < 1 or len(fields.split(b" ")) != width + 1:
            raise ValueError
        [float(field) for field in fields.split(b" ")[1:]]
    except ValueError:
        raise InputError(
            f"{path}: line {number} is not a word and {width or 'its'} numbers; give vectors as text, as GloVe and "
            f"word2vec (not binary) have them"
        ) from None
    if word_dim is not None and width != word_dim:
        raise InputError(
            f"{path}: its vectors are {width} wide, but {word_dim} are expected; take the file of that width"
        )


def _numbers(path: str | Path, number: int, fields: bytes, width: int) -> np.ndarray | None:
    """Returns a line's numbers; None if its word holds a space (GloVe's 840B file has such words)."""
    word, *numbers = fields.rsplit(b" ", width)
    if b" " in word:
        return None
    try:
        with np.errstate(over="ignore"):  # overflow gives infinity; the check below refuses it
            vector = np.array(list(map(float, numbers)), np.float64).astype(np.float32)
    except ValueError:
        vector = np.empty(0, np.float32)
    if len(vector) != width or not np.isfinite(vector).all():
        shown = word.decode(errors="replace")
        raise InputError(
            f"{path}: line {number} ({shown!r}) does not hold {width} finite numbers; fetch the file again"
        )
    return vector
