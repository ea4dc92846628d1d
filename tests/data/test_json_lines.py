"""Annotations as JSON lines, with several right answers per sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import write_files

from cnm import metrics
from cnm.config import CNMConfig
from cnm.data import open_split, read_annotations
from cnm.data.known_splits import known_split
from cnm.errors import InputError

GOOD: dict[str, Any] = {
    "qid": 7,
    "query": "a person opens the door",
    "vid": "a/b",
    "duration": 20,
    "relevant_windows": [[2, 4], [6, 21], [10.5, 11]],
    "saliency_scores": [[1, 2, 3]],
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_lines_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", GOOD, GOOD | {"qid": "text", "relevant_windows": [[0, 1]]})
    (first, second), notes = read_annotations(path)
    assert (first.video, first.duration, first.sentence, first.qid) == ("a/b", 20.0, GOOD["query"], 7)
    assert first.windows == ((2.0, 4.0), (6.0, 20.0), (10.5, 11.0))
    assert (second.qid, second.windows) == ("text", ((0.0, 1.0),))
    assert notes == [f"{path}: 1 moments end after their video; clipped to its end"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": 7}, "line 3: qid 7 is that of line 1 too"),
        ({"qid": 1.5}, "line 3: qid is 1.5, neither a whole number nor a text"),
        ({"qid": True}, "line 3: qid is True, neither"),
        ({"vid": ".."}, "line 3: video is '..', not a name"),
        ({"relevant_windows": []}, "line 3: relevant_windows is [], not [[start, end], ...]"),
        ({"relevant_windows": [[1, 2], [3, 3]]}, "line 3 (a/b): moment [3, 3] must have 0 <= start < end"),
        ({"duration": "20"}, "line 3 (a/b): duration is '20'"),
        ({"query": ""}, "line 3 (a/b): the sentence is ''"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | {'qid': 8} | change)}\n")
    with pytest.raises(InputError) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_missing_keys_and_lines_cut_short_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {"qid": 1, "vid": "v", "relevant_windows": [[0, 1]]})
    with pytest.raises(InputError, match="line 2 lacks query, duration; take another file"):
        read_annotations(path)
    text = json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"qid": 8})
    for end in range(len(text) - len(json.dumps(GOOD | {"qid": 8})) + 1, len(text)):
        path.write_text(text[:end])
        with pytest.raises(InputError, match=r"a\.jsonl: line 2 is not JSON .* cut short: fetch it again"):
            read_annotations(path)


def test_lines_without_windows_are_read(tmp_path: Path) -> None:
    """QVHighlights' test split, and anybody's pairs of videos and sentences."""
    unknown = {name: GOOD[name] for name in ("query", "vid", "duration")}
    path = write(tmp_path / "a.jsonl", unknown | {"qid": 1}, unknown | {"qid": 2, "relevant_windows": None})
    samples, notes = read_annotations(path)
    assert [(sample.moment, sample.windows, sample.qid) for sample in samples] == [(None, (), 1), (None, (), 2)]
    assert notes == []


def test_a_window_without_length_leaves_the_others(tmp_path: Path) -> None:
    """CASTELLA has some that begin where the video ends."""
    lines = [GOOD | {"qid": index} for index in range(40)]
    path = write(tmp_path / "a.jsonl", *lines, GOOD | {"qid": 40, "relevant_windows": [[20, 21], [1, 2]]})
    samples, notes = read_annotations(path)
    assert samples[-1].windows == ((1.0, 2.0),)
    reason = "line 41 (a/b): moment [20, 21] starts after the video's 20 seconds"
    assert notes[1:] == [f"{path}: 1 moments left out, 0 sentences with them ({reason})"]


def test_the_best_of_several_windows_is_scored(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path)).dataset
    lines = [
        {"qid": 0, "query": "a person opens the door", "vid": "test0", "duration": 20, "relevant_windows": [[0, 5]]},
        {
            "qid": 1,
            "query": "a person opens the door",
            "vid": "test1",
            "duration": 20,
            "relevant_windows": [[0, 5], [10, 20]],
        },
    ]
    path = write(tmp_path / "lines.json", *lines)
    split = open_split(config.model_copy(update={"test_data": str(path)}), "test")
    np.testing.assert_array_equal(split.moments, [[0, 0.25], [0, 0.25]])
    np.testing.assert_array_equal(split.windows, [[[0, 0.25], [0, 0.25]], [[0, 0.25], [0.5, 1]]])
    np.testing.assert_allclose(metrics.best_iou([[0, 0.5], [0.5, 0.75]], split.windows), [0.5, 0.5])
    # The whole video meets the second sentence by half with its second window, by a quarter with its first.
    assert metrics.baselines(split.windows)["whole video"]["mIoU"] == pytest.approx((0.25 + 0.5) / 2)


def test_real_lines(shared_data: Path) -> None:
    known = {
        "lighthouse/charades/charades_train_release.jsonl": "Charades-STA, standard train",
        "lighthouse/charades/charades_test_release.jsonl": "Charades-STA, standard test",
        "lighthouse/qvhighlights/highlight_val_release.jsonl": "QVHighlights, val",
        "charades/train.json": "Charades-STA, CNM's published train",
        "charades/test.json": "Charades-STA, CNM's published test",
    }
    for name, split in known.items():
        samples, notes = read_annotations(shared_data / name)
        assert known_split(samples) == split
        assert notes == []
        assert all(0 <= s < e <= sample.duration for sample in samples for s, e in sample.windows)
    several = read_annotations(shared_data / "lighthouse/qvhighlights/highlight_val_release.jsonl")[0]
    assert sum(len(sample.windows) > 1 for sample in several) == 530
