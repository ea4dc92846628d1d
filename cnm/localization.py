"""One sentence in one video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cnm import metrics, plot
from cnm.data import Vocabulary
from cnm.data.batch import Batch
from cnm.data.features import clips
from cnm.errors import InputError
from cnm.files import check_plain
from cnm.masking import mask_weights
from cnm.models.base import Model, Proposals, Scoring


@dataclass(frozen=True)
class Moment:
    """A proposal: the Gaussian's center and width and the moment's start and end, fractions of the video."""

    center: float
    width: float
    start: float
    end: float
    score: float


@dataclass(frozen=True)
class Found:
    """Where a query happens.

    Attributes:
        center, width: of the Gaussian, fractions of the video.
        start, end: of the moment, fractions of the video.
        unknown: the query's words that the model does not know and so ignored.
        score: of the moment among the model's proposals, the higher the better.
        others: the model's other proposals, best first.
    """

    query: str
    center: float
    width: float
    start: float
    end: float
    unknown: list[str]
    score: float = 0.0
    others: tuple[Moment, ...] = ()


def localize_query(
    model: Model, vocabulary: Vocabulary, features: np.ndarray, query: str, scoring: Scoring | None = None
) -> Found:
    """Localizes one sentence.

    Args:
        features: [T, frame_dim], as ``cnm.data.load_features`` gives them; of any other number of frames [n, frame_dim]
            they are averaged to T clips as in training.
        scoring: how models that score their proposals do it.
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
    device = model.word_head.weight.device
    ids = torch.as_tensor(np.asarray(encoded.ids, np.int64))
    length = np.array([len(ids)])
    batch = Batch(
        frames=torch.from_numpy(features)[None],
        frame_lengths=torch.tensor([len(features)]),
        words=torch.nn.functional.pad(torch.from_numpy(vocabulary.vectors)[ids], (0, 0, 1, 0))[None],
        word_ids=ids[None],
        word_lengths=torch.from_numpy(length),
        mask_weights=torch.from_numpy(mask_weights(np.asarray(encoded.content)[None], length)),
    ).to(device)
    proposals = model.proposals(batch, scoring=scoring)
    if not torch.isfinite(proposals.center + proposals.width + proposals.score).all():
        raise InputError("the model's answer is not a number; its checkpoint, or the features, hold numbers too large")
    best, *others = _moments(proposals)
    return Found(query, best.center, best.width, best.start, best.end, list(encoded.unknown), best.score, tuple(others))


def _moments(found: Proposals) -> list[Moment]:
    """The proposals of the first row, best first."""
    center, width = found.center[0].double().cpu().numpy(), found.width[0].double().cpu().numpy()
    ends = metrics.moments_from_gaussian(center, width).tolist()
    rows = zip(center.tolist(), width.tolist(), ends, found.score[0].tolist(), strict=True)
    return [Moment(c, w, start, end, score) for c, w, (start, end), score in rows]


def picture(found: Found, model: Model, duration: float | None, true: tuple[float, float] | None = None) -> bytes:
    """A PNG of the Gaussians and the moment over time; ``duration`` and the ``true`` moment in seconds."""
    others = tuple((other.center, other.width) for other in found.others)
    item = plot.Localization(
        found.query, found.center, found.width, model.alpha, duration, true, model.min_width, others
    )
    return plot.localizations([item])
