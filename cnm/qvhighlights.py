"""QVHighlights' mean average precision, by the rules of its evaluation (Lei et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cnm.metrics import Array

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
SCORES = ("mAP", "mAP IoU=0.5", "mAP IoU=0.75")
MAX_WINDOWS = 10  # predictions of a sentence that count


def average_precision(predicted: ArrayLike, true: ArrayLike) -> Array:
    """Average precision of one sentence's windows at each of ``THRESHOLDS``.

    A predicted window is right if, of the true ones not yet taken by a better one, some reaches the threshold.
    Precision is interpolated: at each recall the best at that recall or above.

    Args:
        predicted: [K, 2], best first; the first ten count.
        true: [M, 2], in the same unit.

    Returns:
        [10] float64.
    """
    predicted, true = np.asarray(predicted, np.float64)[:MAX_WINDOWS], np.asarray(true, np.float64)
    ious = _ious(predicted, true)
    result = np.zeros(len(THRESHOLDS))
    for place, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(true), dtype=bool)
        right = np.zeros(len(predicted))
        for row, of_it in enumerate(ious):
            candidates = np.where(free, of_it, -1.0)
            best = len(true) - 1 - int(candidates[::-1].argmax())  # of equals the last: published code takes any
            if candidates[best] >= threshold:
                right[row], free[best] = 1, False
        hits = right.cumsum()
        precision = hits / np.arange(1, len(right) + 1)
        interpolated = np.maximum.accumulate(precision[::-1])[::-1]
        result[place] = (interpolated * right).sum() / len(true)
    return result


def summary(precisions: Sequence[Array]) -> dict[str, float]:
    """The mean over sentences: over all thresholds, at 0.5, and at 0.75; keyed by ``SCORES``."""
    mean = np.mean(precisions, axis=0)
    at = [float(mean[THRESHOLDS.index(threshold)]) for threshold in (0.5, 0.75)]
    return dict(zip(SCORES, [float(mean.mean()), *at], strict=True))


def _ious(predicted: Array, true: Array) -> Array:
    """[K, M], intersection over union without the published constant, as QVHighlights has it."""
    first, second = predicted[:, None], true[None]
    shared = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    shared = shared.clip(min=0)
    either = np.diff(first)[..., 0] + np.diff(second)[..., 0] - shared
    return np.asarray(shared / either)
