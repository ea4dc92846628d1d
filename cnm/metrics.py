"""How well moments are localized, and what can be had without looking at the video.

Moments are [N, 2] arrays of start and end as fractions of the video (0 to 1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
SCORES = (*(f"R@1 IoU={threshold}" for threshold in THRESHOLDS), "mIoU")
TOP = 5  # proposals of which the best counts in the scores below
TOP_SCORES = (*(f"R@{TOP} IoU={threshold}" for threshold in THRESHOLDS), f"mIoU@{TOP}")
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


def width_above(level: float, width: ArrayLike, alpha: float, min_width: float) -> Array:
    """How wide the part of a Gaussian is that lies above ``level`` of its peak: 2 w sqrt(-ln(level) / alpha).

    With alpha = sigma^2 / 2 (CPL) the boundaries are center +- w sqrt(-2 ln(level)) / sigma, a selection rule of the
    literature that needs no training.

    Args:
        level: in (0, 1).
        width: [...], fractions of the video.
        alpha, min_width: the Gaussian is exp(-alpha (x - center)^2 / max(width, min_width)^2).

    Returns:
        [...] float64.
    """
    return 2 * np.maximum(np.asarray(width, np.float64), min_width) * np.sqrt(-np.log(level) / alpha)


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
    return _summary(ious, SCORES)


def top_summary(ious: ArrayLike) -> dict[str, float]:
    """The same of the best of each sentence's first moments: [N, K] -> scores keyed by ``TOP_SCORES``."""
    return _summary(np.asarray(ious, np.float64)[:, :TOP].max(1, initial=0.0), TOP_SCORES)


def _summary(ious: ArrayLike, names: tuple[str, ...]) -> dict[str, float]:
    ious = np.asarray(ious, np.float64).ravel()
    if ious.size == 0:
        raise ValueError("summary: no sentence to average over")
    values = [float((ious >= threshold).mean()) for threshold in THRESHOLDS] + [float(ious.mean())]
    return dict(zip(names, values, strict=True))


def vote(moments: Array, *, weighted: bool) -> NDArray[np.int64]:
    """Selects the proposal that the others vote for: the first with the largest sum_j IoU(i, j) C_j. [N, K, 2] -> [N]

    C_j = IoU(first, j) where ``weighted`` (published for Charades-STA), else 1 (ActivityNet).
    """
    agreement = iou(moments[:, :, None], moments[:, None])  # [N, K, K]
    weight = agreement[:, :1] if weighted else 1.0
    chosen: NDArray[np.int64] = (agreement * weight).sum(-1).argmax(1)
    return chosen


# Each selects the answer among a sentence's K proposals, best first: [N, K, 2] -> [N].
SELECTIONS: dict[str, Callable[[Array], NDArray[np.int64]]] = {
    "nll": lambda moments: np.zeros(len(moments), np.int64),
    "weighted vote": lambda moments: vote(moments, weighted=True),
    "equal vote": lambda moments: vote(moments, weighted=False),
}


def by_selection(moments: Array, true: ArrayLike) -> dict[str, dict[str, float]]:
    """Scores of proposals [N, K, 2], best first, for each of ``SELECTIONS``; of one proposal R@1 alone, under "nll"."""
    ious = best_iou(moments, _as_windows(true)[:, None])  # [N, K]
    if moments.shape[1] == 1:
        return {"nll": summary(ious)}
    rows, top = np.arange(len(moments)), top_summary(ious)
    return {name: summary(ious[rows, choose(moments)]) | top for name, choose in SELECTIONS.items()}


def best_constant_moment(true: ArrayLike, grid: int = CONSTANT_GRID) -> Array:
    """The moment [s, e] with the highest mIoU when predicted for every sentence; s < e are multiples of 1/grid."""
    return best_constant_moments(true, 1, grid)[0]


def best_constant_moments(true: ArrayLike, count: int, grid: int = CONSTANT_GRID) -> Array:
    """``count`` moments [count, 2] for every sentence, each the one that most raises the mean IoU of the best of them.

    The first is the best single one. Choosing one after the other is within a factor 1 - 1/e of the best set.
    """
    true = _as_windows(true)
    edges = np.arange(grid + 1) / grid
    best, reached = np.zeros((count, 2)), np.zeros(len(true))
    for place in range(count):
        best[place], best_score = [0.0, 1.0], -1.0
        for index, start in enumerate(edges[:-1]):
            ends = edges[index + 1 :]
            candidates = np.stack([np.full_like(ends, start), ends], axis=-1)
            scores = np.maximum(best_iou(candidates[:, None], true), reached).mean(axis=1)
            if scores.max() > best_score:
                best[place], best_score = candidates[scores.argmax()], scores.max()
        reached = np.maximum(reached, best_iou(best[place], true))
    return best


def baselines(true: ArrayLike, seed: int = 0, *, moments: int = 1) -> dict[str, dict[str, float]]:
    """Scores that need no video: what a model must beat, on the same moments.

    Args:
        true: [N, 2], or [N, M, 2] where each sentence has M right answers.
        moments: how many the model proposes. Of several also R@5: of as many constant moments, five at most, that are
            best together, and of as many random ones.

    Returns:
        Scores of the constant moment that is best on these very sentences (its name carries it), so fitted to what it
        is scored on, of the whole video, and of a random moment (the mean
        over moments drawn uniformly from all start < end).
    """
    true = _as_windows(true)
    count = min(TOP, moments)
    constants = best_constant_moments(true, count)
    ends = np.random.default_rng(seed).random((RANDOM_DRAWS, len(true), 2))
    constant = f"best constant [{constants[0, 0]:g}, {constants[0, 1]:g}], fitted to these sentences"
    found = {
        constant: best_iou(constants[:1, None], true),
        "whole video": best_iou([[[0.0, 1.0]]], true),
        "random moment": best_iou(np.sort(ends, axis=-1), true),
    }  # [draws, N] each
    scores = {name: summary(ious) for name, ious in found.items()}
    if moments > 1:
        several = [best_iou(constants[:, None], true).T, found["whole video"].T]
        several.append(_draws_of(found["random moment"], count))
        for row, ious in zip(scores.values(), several, strict=True):
            row.update(top_summary(ious))
    return scores


def _draws_of(ious: Array, size: int) -> Array:
    """[draws, N] in groups of ``size`` draws: [draws // size * N, size]; what is left over is dropped."""
    groups = len(ious) // size
    return ious[: groups * size].reshape(groups, size, -1).swapaxes(1, 2).reshape(-1, size)
