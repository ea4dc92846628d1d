"""One sentence in one video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cnm import metrics, plot
from cnm.data import Vocabulary
from cnm.data.features import clips
from cnm.errors import InputError
from cnm.files import check_plain
from cnm.models.cnm import CNM


@dataclass(frozen=True)
class Found:
    """Where a query happens.

    Attributes:
        center, width: of the Gaussian, fractions of the video.
        start, end: of the moment, fractions of the video.
        unknown: the query's words that the model does not know and so ignored.
    """

    query: str
    center: float
    width: float
    start: float
    end: float
    unknown: list[str]


def localize_query(model: CNM, vocabulary: Vocabulary, features: np.ndarray, query: str) -> Found:
    """Localizes one sentence.

    Args:
        features: [T, frame_dim], as ``cnm.data.load_features`` gives them; of any other number of frames [n, frame_dim]
            they are averaged to T clips as in training.
        query: a sentence; what is beyond the model's ``max_num_words`` known words is ignored.

    Raises:
        InputError: the query is empty or has no word of the vocabulary.
    """
    check_plain(query, "--query")
    if not query.strip():
        raise InputError("query: is empty; give a sentence")
    encoded = vocabulary.encode(query, model.config.dataset.max_num_words)
    if len(encoded.ids) == 0:
        raise InputError(
            f"query {query!r}: has no word the model knows ({len(vocabulary) - 1} words); say it in other words"
        )
    features = clips(features, model.config.dataset.max_num_frames)
    device = model.fc_rec.weight.device
    ids = torch.as_tensor(np.asarray(encoded.ids, np.int64))
    words = torch.nn.functional.pad(torch.from_numpy(vocabulary.vectors)[ids], (0, 0, 1, 0))  # [L + 1, word_dim]
    center, width = model.localize(
        torch.from_numpy(features).to(device)[None],
        torch.tensor([len(features)], device=device),
        words.to(device)[None],
        torch.tensor([len(ids)], device=device),
    )
    if not torch.isfinite(center + width).all():
        raise InputError("the model's answer is not a number; its checkpoint, or the features, hold numbers too large")
    start, end = metrics.moments_from_gaussian(center.item(), width.item()).tolist()
    return Found(query, center.item(), width.item(), start, end, list(encoded.unknown))


def picture(found: Found, alpha: float, duration: float | None, true: tuple[float, float] | None = None) -> bytes:
    """A PNG of the Gaussian and the moment over time; ``duration`` and the ``true`` moment in seconds."""
    item = plot.Localization(found.query, found.center, found.width, alpha, duration, true)
    return plot.localizations([item])
