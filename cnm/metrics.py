"""How well moments are localized, and what can be had without looking at the video.

Moments are [N, 2] arrays of start and end as fractions of the video (0 to 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
SCORES = (*(f"R@1 IoU={threshold}" for threshold in THRESHOLDS), "mIoU")
CONSTANT_GRID = 32  # the best constant moment is searched among all pairs of these fractions of the video
RANDOM_DRAWS = 128  # random moments per sentence; the mean's standard error is below 0.001 from 500 sentences on
_EPS = 1e-10  # published: keeps 0 / 0 away for empty moments


def moments_from_gaussian(center: ArrayLike, width: ArrayLike) -> Array:
    """The published reading of a Gaussian as a moment: [max(c - w/2, 0), min(c + w/2, 1)].

    Args:
        center, width: [...], fractions of the video.

    Returns:
        [..., 2] float64.
    """
    center, width = np.asarray(center, np.float64), np.asarray(width, np.float64)
    return np.stack([np.maximum(center - width / 2, 0.0), np.minimum(center + width / 2, 1.0)], axis=-1)


def iou(predicted: ArrayLike, true: ArrayLike) -> Array:
    """Intersection over union in time as published: (intersection + 1e-10) / (union + 1e-10), at least 0.

    The union is the hull of the two moments, so that the ratio of disjoint ones is negative, hence 0.

    Args:
        predicted, true: [..., 2], which broadcast.

    Returns:
        [...] float64, 0 to 1.
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    intersection = np.minimum(predicted[..., 1], true[..., 1]) - np.maximum(predicted[..., 0], true[..., 0])
    hull = np.maximum(predicted[..., 1], true[..., 1]) - np.minimum(predicted[..., 0], true[..., 0])
    return np.maximum((intersection + _EPS) / (hull + _EPS), 0.0)


def best_iou(predicted: ArrayLike, windows: ArrayLike) -> Array:
    """The IoU with the best of several true moments.

    Args:
        predicted: [..., 2].
        windows: [..., M, 2], one right answer per sentence and place, some perhaps twice.

    Returns:
        [...] float64, 0 to 1.
    """
    return np.asarray(iou(np.asarray(predicted, np.float64)[..., None, :], windows).max(-1))


def _as_windows(true: ArrayLike) -> Array:
    """[N, 2] or [N, M, 2] as the latter."""
    true = np.asarray(true, np.float64)
    return true[:, None] if true.ndim == 2 else true


def summary(ious: ArrayLike) -> dict[str, float]:
    """R@1 at each IoU threshold (fraction of sentences at or above it) and mIoU, keyed by ``SCORES``.

    Raises:
        ValueError: there is no sentence to average over.
    """
    ious = np.asarray(ious, np.float64).ravel()
    if ious.size == 0:
        raise ValueError("summary: no sentence to average over")
    values = [float((ious >= threshold).mean()) for threshold in THRESHOLDS] + [float(ious.mean())]
    return dict(zip(SCORES, values, strict=True))


def best_constant_moment(true: ArrayLike, grid: int = CONSTANT_GRID) -> Array:
    """The moment [s, e] with the highest mIoU when predicted for every sentence; s < e are multiples of 1/grid."""
    true = _as_windows(true)
    edges = np.arange(grid + 1) / grid
    best, best_score = np.array([0.0, 1.0]), -1.0
    for index, start in enumerate(edges[:-1]):
        ends = edges[index + 1 :]
        candidates = np.stack([np.full_like(ends, start), ends], axis=-1)
        scores = best_iou(candidates[:, None], true).mean(axis=1)
        if scores.max() > best_score:
            best, best_score = candidates[scores.argmax()], scores.max()
    return best


def baselines(true: ArrayLike, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores that need no video: what a model must beat, on the same moments.

    Args:
        true: [N, 2], or [N, M, 2] where each sentence has M right answers.

    Returns:
        Scores of the best constant moment (its name carries it), of the whole video, and of a random moment (the mean
        over moments drawn uniformly from all start < end).
    """
    true = _as_windows(true)
    constant = best_constant_moment(true)
    ends = np.random.default_rng(seed).random((RANDOM_DRAWS, len(true), 2))
    return {
        f"best constant [{constant[0]:g}, {constant[1]:g}]": summary(best_iou(constant, true)),
        "whole video": summary(best_iou([0.0, 1.0], true)),
        "random moment": summary(best_iou(np.sort(ends, axis=-1), true)),
    }
