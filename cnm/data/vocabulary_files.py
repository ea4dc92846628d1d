"""Vocabulary files that hold only numbers and texts: ``F.safetensors`` and ``F.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cnm.errors import InputError
from cnm.files import read_json, replace_file, shortened

SAFE = (".safetensors", ".json")
_REMEDY = "write both anew with `cnm vocabulary`"


def is_safe(path: str | Path) -> bool:
    """Whether the path names one of the two files (otherwise it is the published pickle)."""
    return Path(path).suffix in SAFE


def words_file(path: str | Path) -> Path:
    """Returns the path of the file that lists the words in order."""
    return Path(path).with_suffix(".json") if is_safe(path) else Path(path)


def write(
    path: str | Path, counts: Sequence[tuple[str, int]], vectors: np.ndarray, unknown: dict[str, int], source: str
) -> None:
    """Writes both files; ``path`` names either.

    Args:
        counts: the V words with their counts, most frequent first.
        vectors: [V, word_dim] float32.
        unknown: words without a vector, with their counts.
        source: the origin of the vectors.

    Raises:
        InputError: the files cannot be written.
    """
    stored = safetensors.numpy.save({"vectors": np.ascontiguousarray(vectors, np.float32)})
    content = {
        "words": [word for word, _ in counts],
        "counts": [count for _, count in counts],
        "unknown": unknown,
        "source": source,
        "sha256": hashlib.sha256(stored).hexdigest(),
    }
    replace_file(Path(path).with_suffix(".safetensors"), stored)
    replace_file(words_file(path), json.dumps(content, indent=1, ensure_ascii=False).encode())


def read(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Reads the words, most frequent first, and their vectors [V, word_dim] float32.

    Raises:
        InputError: a file is missing or damaged, or the two do not belong together.
    """
    content = read_json(words_file(path))
    words = content.get("words") if isinstance(content, dict) else None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise InputError(f"{words_file(path)}: holds no list of words; {_REMEDY}")
    if len(set(words)) != len(words):
        twice = next(word for index, word in enumerate(words) if word in words[:index])
        raise InputError(f"{words_file(path)}: the word {shortened(twice)} is there twice; {_REMEDY}")
    file = Path(path).with_suffix(".safetensors")
    try:
        stored = file.read_bytes()
        tensors: dict[str, Any] = safetensors.numpy.load(stored)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None
    except Exception as error:  # errors of safetensors, and of numpy for unknown types
        raise InputError(f"{file}: is not a safetensors file ({' '.join(str(error).split())}); {_REMEDY}") from None
    if content.get("sha256") != hashlib.sha256(stored).hexdigest():
        raise InputError(f"{file}: is not the file that {words_file(path).name} was written with; {_REMEDY}")
    vectors = tensors.get("vectors")
    if vectors is None or vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(words):
        raise InputError(f"{file}: holds no float32 vectors [{len(words)}, width]; {_REMEDY}")
    if not np.isfinite(vectors).all():
        raise InputError(f"{file}: holds NaN or infinity; {_REMEDY}")
    return words, vectors
