"""Word vectors in text, as GloVe and word2vec come: a word and its numbers per line, perhaps a header line."""

from __future__ import annotations

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
    """How often each lower-cased token occurs in the sentences; marks count too, as in the published vocabularies."""
    return Counter(token for sample in samples for token in tokenize(sample.sentence))


def read_vectors(
    path: str | Path, words: Iterable[str], word_dim: int | None = None, *, progress: bool = False
) -> tuple[dict[str, np.ndarray], int]:
    """The vectors [word_dim] float32 of those of the words that the file has, and ``word_dim``.

    The file is read line by line and never held whole. Where it has a word twice, the first is taken.

    Args:
        word_dim: what the file is expected to have.

    Raises:
        InputError: the file is unreadable, no such text, cut short, of another width, or holds NaN or infinity.
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
    """The first row, whose word holds no space, tells what the file is."""
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
    """A line's numbers; None where its word goes on after the first space (GloVe's 840B file has such)."""
    word, *numbers = fields.rsplit(b" ", width)
    if b" " in word:
        return None
    try:
        with np.errstate(over="ignore"):  # infinity, which is refused by name
            vector = np.array(list(map(float, numbers)), np.float64).astype(np.float32)
    except ValueError:
        vector = np.empty(0, np.float32)
    if len(vector) != width or not np.isfinite(vector).all():
        shown = word.decode(errors="replace")
        raise InputError(
            f"{path}: line {number} ({shown!r}) does not hold {width} finite numbers; fetch the file again"
        )
    return vector
