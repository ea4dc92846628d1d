"""Annotation rows in the published format, and what is wrong with those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnm.data import read_annotations
from cnm.data.annotations import load_annotations
from cnm.errors import InputError

GOOD = ["AO8RW", 33.67, [0.0, 6.9], "a person is putting a book on a shelf."]


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_rows_are_read(tmp_path: Path) -> None:
    (sample,), notes = read_annotations(write(tmp_path / "a.json", [GOOD]))
    assert (sample.video, sample.duration, sample.moment, sample.sentence) == ("AO8RW", 33.67, (0.0, 6.9), GOOD[3])
    assert notes == []


def test_moments_past_the_end_are_clipped_and_counted(tmp_path: Path) -> None:
    rows = [GOOD, ["v", 10, [5, 10.04], "text"], ["v", 10, [5, 99], "text"]]
    samples, notes = read_annotations(write(tmp_path / "a.json", rows))
    assert [sample.moment for sample in samples[1:]] == [(5.0, 10.0)] * 2
    assert notes == [f"{tmp_path / 'a.json'}: 2 moments end after their video; clipped to its end"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "is 'text', not"),
        (["v", 10, [1, 2]], "not [video, seconds, [start, end], sentence]"),
        ([7, 10, [1, 2], "text"], "video is 7, not a name"),
        (["v", "10", [1, 2], "text"], "(v): duration is '10', not seconds above 0"),
        (["v", 0, [0, 2], "text"], "(v): duration is 0, not seconds above 0"),
        (["v", float("nan"), [0, 2], "text"], "row 1[1]: nan is not a number"),
        (["v", True, [0, 1], "text"], "duration is True"),
        (["v", 10, [1], "text"], "moment is [1], not [start, end]"),
        (["v", 10, [1, None], "text"], "moment is [1, None], not [start, end]"),
        (["v", 10, [2, 2], "text"], "moment [2, 2] must have 0 <= start < end"),
        (["v", 10, [5, 2], "text"], "moment [5, 2] must have 0 <= start < end"),
        (["v", 10, [-1, 2], "text"], "must have 0 <= start < end"),
        (["v", 10, [11, 12], "text"], "starts after the video's 10 seconds"),
        (["v", 10, [1, 2], "  "], "the sentence is '  '"),
        (["v", 10, [1, 2], None], "the sentence is None"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.json", [GOOD, row])
    with pytest.raises(InputError) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}: row 1")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("[[1,", "line 1 column 5 is not JSON"), ("7", "holds a int"), ("[]", "holds no rows")]
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=rf"a\.json: .*{message}"):
        read_annotations(tmp_path / "a.json")


def test_real_annotation_files(shared_data: Path) -> None:
    counts = {"charades/train": (10602, 0), "charades/test": (3158, 0), "activitynet/val_data": (17505, 134)}
    for name, (rows, clipped) in counts.items():
        samples, notes = read_annotations(shared_data / f"{name}.json")
        assert len(samples) == rows
        assert all(0 <= s.moment[0] < s.moment[1] <= s.duration for s in samples)
        assert len(notes) == (clipped > 0)
        assert not clipped or f"{clipped} moments" in notes[0]


def test_moments_without_length_are_left_out_where_they_are_few(tmp_path: Path) -> None:
    """4 of Charades-STA's 12,408 end before they start, and nobody counts them."""
    good = [["v", 10, [1, 2], f"text {index}"] for index in range(198)]
    rows = [good[0], ["v", 10, [5, 2], "reversed"], *good[1:], ["v", 10, [10, 12], "after"]]
    path = write(tmp_path / "a.json", rows)
    samples, notes = read_annotations(path)
    assert [sample.sentence for sample in samples] == [f"text {index}" for index in range(198)]
    # Predictions name a sentence by its row.
    assert [sample.qid for sample in samples] == [0, *range(2, 199)]
    assert load_annotations(path).left_out == {"1", "199"}
    reason = "row 1 (v): moment [5, 2] must have 0 <= start < end"
    assert notes == [f"{path}: 2 moments left out, 2 sentences with them ({reason})"]
    with pytest.raises(InputError, match=r"row 1 \(v\): moment \[5, 2\] must have 0 <= start < end; correct it"):
        read_annotations(write(path, rows[:50]))


def test_moments_need_not_be_known(tmp_path: Path) -> None:
    (first, second), notes = read_annotations(write(tmp_path / "a.json", [GOOD, ["v", 10, None, "text"]]))
    assert (first.windows, second.windows, second.moment) == (((0.0, 6.9),), (), None)
    assert notes == []


@pytest.mark.parametrize("text", ["video,start,end\nv,0,1\n", "AO8RW 0.0##a person is putting a book\n"])
def test_other_formats_are_told_what_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"c\.txt: line 1 column 1 is not JSON .*; annotations are a JSON list"):
        read_annotations(path)
