"""Tells whether the data of a resumed run is what it was trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnm.data.annotations import Sample
from cnm.data.tagging import tagger_name, tokenizer_name

VIDEOS = 128  # at most, evenly over the split, whose features are compared
TOLERANCE = 0.02  # of a number's typical size: processors round pooled features differently, and bfloat16 by 2^-9


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
        ``sentences`` and ``words``: hashes; ``tagger``: what chose the content words; ``features``: [VIDEOS], each
        video's numbers summed with fixed random signs; ``size``: of a typical one of these sums.
    """
    sentences = repr([(s.video, s.duration, s.windows, s.sentence) for s in samples])
    words = hashlib.sha256()
    for array in encoded:
        words.update(np.ascontiguousarray(array).tobytes())
    T, width = features.shape[1:]
    signs = torch.randint(0, 2, (T * width,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    flat = features.flatten(1).double()
    return {
        "sentences": hashlib.sha256(sentences.encode()).hexdigest(),
        "words": words.hexdigest(),
        "tagger": tagger_name(),
        "features": (flat @ signs).tolist(),
        "size": flat.square().mean().sqrt().item() * math.sqrt(T * width),
    }


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What is other in the split that was found; None if nothing is."""
    if wanted["sentences"] != found["sentences"]:
        return "other sentences"
    if wanted["words"] != found["words"] and wanted["tagger"] != found["tagger"]:
        return (
            f"content words chosen by {found['tagger']}, not {wanted['tagger']} (nltk chooses where its data "
            f"averaged_perceptron_tagger_eng is installed, function-words where it is not)"
        )
    if wanted["words"] != found["words"]:
        return (
            f"other words of its sentences (another vocabulary, or another version of nltk than {tokenizer_name()}, "
            f"may be the reason)"
        )
    if len(wanted["features"]) != len(found["features"]):
        return "other features"
    apart = np.abs(np.array(wanted["features"]) - np.array(found["features"])).max(initial=0)
    return "other features" if apart > TOLERANCE * max(wanted["size"], found["size"]) else None
