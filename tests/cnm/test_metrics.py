"""Scores and baselines, against plain loops and known values of the real Charades-STA test file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnm import metrics

FRACTIONS = st.floats(0, 1, allow_nan=False)


def plain_iou(predicted: tuple[float, float], true: tuple[float, float]) -> float:
    """Intersection over union of two intervals as the textbook has it."""
    intersection = max(0.0, min(predicted[1], true[1]) - max(predicted[0], true[0]))
    union = (predicted[1] - predicted[0]) + (true[1] - true[0]) - intersection
    return intersection / union if union > 0 else 0.0


@given(st.tuples(FRACTIONS, FRACTIONS).map(sorted), st.tuples(FRACTIONS, FRACTIONS).map(sorted))
def test_iou_is_that_of_intervals(predicted: list[float], true: list[float]) -> None:
    if predicted[1] - predicted[0] > 1e-3 and true[1] - true[0] > 1e-3:
        assert metrics.iou(predicted, true) == pytest.approx(plain_iou(tuple(predicted), tuple(true)), abs=1e-6)


def test_iou_of_disjoint_moments_is_zero_and_of_an_empty_one_with_itself_one() -> None:
    assert metrics.iou([0.0, 0.2], [0.5, 0.9]) == 0.0
    assert metrics.iou([0.3, 0.3], [0.3, 0.3]) == 1.0  # as published: 1e-10 / 1e-10


def test_iou_broadcasts() -> None:
    assert metrics.iou(np.zeros((3, 1, 2)), np.ones((4, 2))).shape == (3, 4)


def test_moments_are_cut_to_the_video() -> None:
    moments = metrics.moments_from_gaussian([0.5, 0.1, 0.9], [0.2, 0.4, 0.5])
    np.testing.assert_allclose(moments, [[0.4, 0.6], [0.0, 0.3], [0.65, 1.0]])


def test_summary_counts_at_or_above_each_threshold() -> None:
    scores = metrics.summary([0.0, 0.1, 0.29, 0.5, 0.95])
    assert scores == pytest.approx(
        {
            "R@1 IoU=0.1": 0.8,
            "R@1 IoU=0.3": 0.4,
            "R@1 IoU=0.5": 0.4,
            "R@1 IoU=0.7": 0.2,
            "R@1 IoU=0.9": 0.2,
            "mIoU": 0.368,
        }
    )


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no sentence"):
        metrics.summary([])


def test_best_constant_moment_is_the_best_of_the_grid() -> None:
    rng = np.random.default_rng(0)
    true = np.sort(rng.random((50, 2)), axis=1)
    best = metrics.best_constant_moment(true, grid=8)
    score = {
        (start / 8, end / 8): np.mean([plain_iou((start / 8, end / 8), tuple(row)) for row in true])
        for start in range(8)
        for end in range(start + 1, 9)
    }
    assert tuple(best) == max(score, key=lambda moment: score[moment])


def test_best_constant_moment_finds_a_moment_all_sentences_share() -> None:
    np.testing.assert_array_equal(metrics.best_constant_moment([[0.25, 0.75]] * 3), [0.25, 0.75])


def test_random_moment_is_the_expectation_over_all_moments() -> None:
    true = np.tile([[0.25, 0.75]], (200, 1))
    steps = (np.arange(200) + 0.5) / 200
    start, end = np.meshgrid(steps, steps, indexing="ij")
    pairs = np.stack([start, end], -1)[start < end]
    expected = metrics.iou(pairs, true[0]).mean()
    found = metrics.baselines(true)["random moment"]["mIoU"]
    assert found == pytest.approx(expected, abs=0.006)  # 25,600 draws; standard error 0.002
    assert found == metrics.baselines(true)["random moment"]["mIoU"]
    assert found != metrics.baselines(true, seed=1)["random moment"]["mIoU"]


def test_baselines_of_the_real_charades_test_file(shared_data: Path) -> None:
    rows = json.loads((shared_data / "charades" / "test.json").read_text())
    true = np.array([[start / seconds, min(end, seconds) / seconds] for _, seconds, (start, end), _ in rows])
    found = metrics.baselines(true)
    constant = found["best constant [0, 0.4375], fitted to these sentences"]
    assert constant["mIoU"] == pytest.approx(0.3600, abs=5e-5)
    assert found["whole video"]["mIoU"] == pytest.approx(0.2720, abs=5e-5)
    assert metrics.iou([0, 0.4375], true).mean() == constant["mIoU"]


def test_votes_by_hand() -> None:
    """Three proposals: the first is alone, the others overlap by half of their hull."""
    moments = np.array([[[0.0, 0.2], [0.5, 0.8], [0.6, 0.9]]])
    # equal: 1, 1 + 1/2, 1 + 1/2; weighted by the overlap with the first, which is 1, 0, 0: 1, 0, 0
    assert metrics.vote(moments, weighted=False).tolist() == [1]
    assert metrics.vote(moments, weighted=True).tolist() == [0]
    scores = metrics.by_selection(moments, np.array([[0.5, 0.8]]))
    assert [scores[name]["mIoU"] for name in ("nll", "weighted vote", "equal vote")] == pytest.approx([0, 0, 1])
    assert scores["nll"]["mIoU@5"] == pytest.approx(1)
    assert metrics.by_selection(moments[:, :1], np.array([[0.1, 0.2]])).keys() == {"nll"}


def test_only_the_first_five_count() -> None:
    ious = np.zeros((2, 7))
    ious[0, 4], ious[1, 5] = 0.8, 1.0
    assert metrics.top_summary(ious)["R@5 IoU=0.7"] == 0.5


def test_five_constants_are_never_worse_than_one() -> None:
    true = np.sort(np.random.default_rng(0).random((50, 2)), axis=1)
    moments = metrics.best_constant_moments(true, 5)
    assert np.array_equal(moments[0], metrics.best_constant_moment(true))
    best = [metrics.iou(moments[:count, None], true).max(0).mean() for count in range(1, 6)]
    assert best == sorted(best)
    assert best[4] > best[0] + 0.1
    rows = metrics.baselines(true, moments=8)
    plain = metrics.baselines(true)
    for name, scores in plain.items():
        assert {score: rows[name][score] for score in metrics.SCORES} == scores
    assert next(iter(rows.values()))["mIoU@5"] == pytest.approx(best[4])
    assert rows["whole video"]["mIoU@5"] == rows["whole video"]["mIoU"]
    assert rows["random moment"]["mIoU@5"] > rows["random moment"]["mIoU"]
    three = metrics.baselines(true, moments=3)  # beside a model that proposes three
    assert next(iter(three.values()))["mIoU@5"] == pytest.approx(best[2])
    assert rows["random moment"]["mIoU@5"] > three["random moment"]["mIoU@5"] > three["random moment"]["mIoU"]


def test_the_width_above_a_level_ends_where_the_gaussian_has_it() -> None:
    sigma, center, width = 9.0, 0.5, np.array([0.3, 0.001])
    start, end = np.moveaxis(
        metrics.moments_from_gaussian(center, metrics.width_above(0.2, width, sigma**2 / 2, 0.01)), -1, 0
    )
    deviation = np.maximum(width, 0.01) / sigma
    for edge in (start, end):
        np.testing.assert_allclose(np.exp(-((edge - center) ** 2) / (2 * deviation**2)), 0.2)
