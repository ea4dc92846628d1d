"""Tells whether the data of a resumed run is what it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cnm.data.annotations import Sample

VIDEOS = 16  # evenly over the split, whose features are compared
TOLERANCE = 1e-2  # of a mean: processors round pooled features differently, and bfloat16 by 2^-9


def places(count: int) -> np.ndarray:
    """Which of a split's videos are compared."""
    return np.unique(np.linspace(0, count - 1, min(VIDEOS, count)).astype(int))


def fingerprint(samples: Sequence[Sample], encoded: Sequence[np.ndarray], features: Tensor) -> dict[str, Any]:
    """Describes a split's sentences and features.

    Args:
        samples: the sentences, with videos, durations and moments.
        encoded: their word ids, which words are content words, and numbers of words.
        features: [VIDEOS, T, width], of the videos at ``places``.

    Returns:
        ``sentences`` and ``words``: hashes; ``features``: [VIDEOS, T] mean sizes of a clip's numbers.
    """
    sentences = repr([(s.video, s.duration, s.windows, s.sentence) for s in samples])
    words = hashlib.sha256()
    for array in encoded:
        words.update(np.ascontiguousarray(array).tobytes())
    return {
        "sentences": hashlib.sha256(sentences.encode()).hexdigest(),
        "words": words.hexdigest(),
        "features": features.double().abs().mean(-1).tolist(),
    }


def difference(stored: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What differs, in words that follow "other"; None if nothing does."""
    if stored["sentences"] != found["sentences"]:
        return "sentences"
    if stored["words"] != found["words"]:
        return "words to mask (nltk's tagger or the built-in list chose them, or another version of cnm)"
    if [len(clips) for clips in stored["features"]] != [len(clips) for clips in found["features"]]:
        return "features"
    before, now = np.array(stored["features"]), np.array(found["features"])
    same = np.allclose(before, now, rtol=TOLERANCE, atol=TOLERANCE * now.mean())
    return None if same else "features"
