"""Predictions in QVHighlights' submission form, one JSON object per sentence and line, and anybody's scores."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cnm import metrics, qvhighlights
from cnm.data.annotation_rows import objects, qid_problem
from cnm.data.annotations import Sample
from cnm.errors import InputError
from cnm.files import is_number, read_text, replace_file, shortened

Window = tuple[float, float, float]  # start and end in seconds, score


def qids(samples: Sequence[Sample]) -> list[int | str]:
    """Each sentence's qid; its row's number where the annotations have none."""
    return [row if sample.qid is None else sample.qid for row, sample in enumerate(samples)]


def write_predictions(
    path: str | Path, samples: Sequence[Sample], centers: ArrayLike, widths: ArrayLike, scores: ArrayLike
) -> None:
    """Writes ``{"qid", "query", "vid", "pred_relevant_windows": [[start, end, score], ...]}`` lines, best first.

    Args:
        centers, widths: [N, K], fractions of the video.
        scores: [N, K], the higher the better.

    Raises:
        InputError: the file cannot be written; nothing half-written is left.
    """
    moments = metrics.moments_from_gaussian(centers, widths)
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")
    lines = []
    for sample, qid, of_it, score, best in zip(samples, qids(samples), moments, scores, order, strict=True):
        windows = [[*(of_it[k] * sample.duration).tolist(), float(score[k])] for k in best]
        row = {"qid": qid, "query": sample.sentence, "vid": sample.video, "pred_relevant_windows": windows}
        lines.append(json.dumps(row, allow_nan=False) + "\n")
    replace_file(path, "".join(lines).encode())


def read_predictions(path: str | Path, samples: Sequence[Sample], left_out: Collection[str] = ()) -> list[list[Window]]:
    """Each sentence's predicted windows, as the file orders them, in the order of ``samples``; lines may come in any.

    Args:
        left_out: qids of the annotations' other sentences, see ``Annotations``; predictions for them do not count.

    Raises:
        InputError: the file is unreadable or cut short, a line is malformed or about another sentence or video than the
            annotations say, or a sentence has no line or two.
    """
    row_of = {str(qid): row for row, qid in enumerate(qids(samples))}
    found: dict[int, list[Window]] = {}
    for row, where in objects(read_text(path), str(path)):
        missing = [name for name in ("qid", "pred_relevant_windows") if name not in row]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}; give predictions in QVHighlights' submission form")
        qid_problem(row["qid"], where)
        index = row_of.get(str(row["qid"]))
        if index is None and str(row["qid"]) in left_out:
            continue
        if index is None:
            raise InputError(
                f"{where}: qid {shortened(row['qid'])} is not in the annotations; take those it was made for"
            )
        if index in found:
            raise InputError(f"{where}: qid {shortened(row['qid'])} was there before; remove one of them")
        for name, expected in (("vid", samples[index].video), ("query", samples[index].sentence)):
            if row.get(name, expected) != expected:
                raise InputError(
                    f"{where}: {name} is {shortened(row[name])}, but {shortened(expected)} in the annotations; take "
                    f"those it was made for"
                )
        found[index] = _windows(row["pred_relevant_windows"], where)
    lacking = [qid for row, qid in enumerate(qids(samples)) if row not in found]
    if lacking:
        others = f" (and {len(lacking) - 1:,} others)" if len(lacking) > 1 else ""
        raise InputError(f"{path}: has no prediction for qid {shortened(lacking[0])}{others}; predict every sentence")
    return [found[row] for row in range(len(samples))]


def _windows(value: Any, where: str) -> list[Window]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: pred_relevant_windows is {shortened(value)}, not [[start, end, score], ...]")
    windows = []
    for window in value:
        if not isinstance(window, list) or len(window) != 3 or not all(map(is_number, window)):
            raise InputError(f"{where}: window {shortened(window)} is not [start, end, score] in seconds; correct it")
        if window[0] > window[1]:
            raise InputError(f"{where}: window {shortened(window)} ends before it starts; correct it")
        windows.append((float(window[0]), float(window[1]), float(window[2])))
    return windows


def score(predicted: Sequence[Sequence[Window]], samples: Sequence[Sample]) -> dict[str, float]:
    """R@1 and mIoU of each sentence's first window against the best of its moments, and QVHighlights' mAP.

    As in QVHighlights' own evaluation the file says which window is first and which are the first ten, and their
    scores in which order mAP takes those ten.

    Args:
        predicted: as ``read_predictions`` gives them.

    Returns:
        Keyed by ``cnm.metrics.SCORES`` and ``cnm.qvhighlights.SCORES``.
    """
    ious = [
        float(metrics.best_iou(np.array(windows[0][:2]) / sample.duration, np.array(sample.windows) / sample.duration))
        for windows, sample in zip(predicted, samples, strict=True)
    ]
    precisions = [
        qvhighlights.average_precision(_ranked(windows[: qvhighlights.MAX_WINDOWS]), sample.windows)
        for windows, sample in zip(predicted, samples, strict=True)
    ]
    return metrics.summary(ious) | qvhighlights.summary(precisions)


def _ranked(windows: Sequence[Window]) -> list[tuple[float, float]]:
    """Best first; of equal scores the file's first."""
    return [(start, end) for start, end, _ in sorted(windows, key=lambda window: -window[2])]
