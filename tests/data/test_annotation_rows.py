"""Annotation files in the layouts of their makers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from small_runs import write_files

from cnm.config import CNMConfig
from cnm.data import open_split, read_annotations
from cnm.errors import InputError

ACTIVITYNET = {
    "v_one": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 90]], "sentences": ["A girl.", " She dances."]},
    "v_two": {"duration": 10, "timestamps": [[0, 2.5]], "sentences": ["A dog."]},
}
TACOS = {"s30-d52.avi": {"fps": 29.4, "num_frames": 7346, "timestamps": [[141, 354]], "sentences": ["She took it."]}}
TABLE = 'id,subject,script,length\nAO8RW,A,"A person, ""so"" it says.",33.67\nYVKIV,B,,12\n'
STA = "AO8RW 0.0 6.9##a person is putting a book on a shelf.\n\nYVKIV 4.4 99##it ends## here.\n"


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_activitynet_captions(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", ACTIVITYNET)
    samples, notes = read_annotations(path)
    assert [(sample.video, sample.duration, sample.windows, sample.sentence) for sample in samples] == [
        ("v_one", 82.73, ((0.83, 19.86),), "A girl."),
        ("v_one", 82.73, ((17.37, 82.73),), " She dances."),
        ("v_two", 10.0, ((0.0, 2.5),), "A dog."),
    ]
    assert notes == [f"{path}: 1 moments end after their video; clipped to its end"]


def test_sentences_by_video_need_no_timestamps(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"v": {"duration": 10, "sentences": ["One.", "Two."]}})
    assert [sample.moment for sample in read_annotations(path)[0]] == [None, None]


def test_tacos_counts_frames(tmp_path: Path) -> None:
    ((sample,), _) = read_annotations(write(tmp_path / "train.json", TACOS))
    assert (sample.video, sample.duration) == ("s30-d52.avi", 7346 / 29.4)
    assert sample.windows == ((141 / 29.4, 354 / 29.4),)


def test_charades_sta_has_its_lengths_in_tables_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "Charades_v1_train.csv", TABLE)
    path = write(tmp_path / "charades_sta_train.txt", STA.replace("\n", "\r\n"))
    samples, notes = read_annotations(path)
    assert [(sample.video, sample.duration, sample.windows, sample.sentence) for sample in samples] == [
        ("AO8RW", 33.67, ((0.0, 6.9),), "a person is putting a book on a shelf."),
        ("YVKIV", 12.0, ((4.4, 12.0),), "it ends## here."),
    ]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": "A."}, r"'v' holds \{.*, not duration, timestamps and sentences"),
        ({"timestamps": [[0, 1]]}, "'v' has 1 timestamps for 2 sentences"),
        ({"timestamps": {"a": 1}}, "'v' holds"),
        ({"duration": None}, "'v' has no duration, and fps None and num_frames None give none"),
        ({"duration": "ten"}, r"'v': sentence 0 \(v\): duration is 'ten'"),
        ({"timestamps": [[0, 1], [0, "x"]]}, r"'v': sentence 1 \(v\): moment is \[0, 'x'\]"),
        ({"duration": None, "fps": 0, "num_frames": 9}, "'v' has no duration, and fps 0 and num_frames 9 give none"),
        ({"duration": None, "fps": 9, "num_frames": 90, "timestamps": [[1, None], None]}, r"moment is \[1, None\]"),
    ],
)
def test_what_is_wrong_by_video_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entry = {"duration": 10, "timestamps": [[0, 1], [1, 2]], "sentences": ["A.", "B."]}
    path = write(tmp_path / "a.json", {"v": entry | change})
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "table", "message"),
    [
        (STA, None, r"line 1: no Charades\*\.csv in .* gives the length of 'AO8RW'; put"),
        (STA, TABLE.replace("YVKIV", "OTHER"), r"line 3: no Charades\*\.csv in .* gives the length of 'YVKIV'"),
        (STA, TABLE.replace("33.67", "long"), r"line 1 \(AO8RW\): duration is 'long'"),
        (STA, TABLE.replace("33.67", "nan"), r"line 1 \(AO8RW\): duration is nan"),
        (STA + "AO8RW 1.0##cut\n", TABLE, "line 4 is 'AO8RW 1.0##cut', not VIDEO START END##SENTENCE"),
        (STA + "AO8RW one 2##x\n", TABLE, r"line 4 \(AO8RW\): moment is \['one', 2.0\]"),
        (STA + "AO8RW 1 2##\n", TABLE, r"line 4 \(AO8RW\): the sentence is ''"),
    ],
)
def test_what_is_wrong_in_charades_sta_is_named(tmp_path: Path, text: str, table: str | None, message: str) -> None:
    if table is not None:
        write(tmp_path / "Charades_v1_train.csv", table)
    path = write(tmp_path / "charades_sta_train.txt", text)
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_sentence_may_hold_what_charades_sta_ends_with(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [["v", 10, [1, 2], "text number ## two"]])
    assert read_annotations(path)[0][0].sentence == "text number ## two"


def test_the_cache_follows_the_tables(tmp_path: Path) -> None:
    """A table decides which rows count: sentences never get the words of others."""
    config = CNMConfig.from_json(write_files(tmp_path)).dataset
    words = ["the person opens the door", "a dog runs quickly"]
    lines = [f"train{row % 10} 1.0 4.0##{words[row % 2]}" for row in range(1, 150)]
    path = write(tmp_path / "sta.txt", "\n".join(["gone 5.0 9.0##a woman reads the book", *lines]))
    config = config.model_copy(update={"train_data": str(path)})
    with h5py.File(str(config.feature_path), "a") as file:
        file["gone"] = file["train0"][()]
    for length, count in ((20, 150), (3, 149), (20, 150)):
        rows = [f"gone,{length}", *(f"train{video},20" for video in range(10))]
        write(tmp_path / "Charades_v1_train.csv", "\n".join(["id,length", *rows]))
        split = open_split(config, "train")
        assert len(split) == count
        batch = split.batch(np.arange(count))
        for index, sample in enumerate(split.samples):
            expected = list(split.vocabulary.encode(sample.sentence, 20).ids)
            assert batch.word_ids[index, : len(expected)].tolist() == expected


def test_a_video_may_be_called_as_a_key_of_lines(tmp_path: Path) -> None:
    entry = {"duration": 10, "timestamps": [[0, 1]], "sentences": ["One."]}
    samples, _ = read_annotations(write(tmp_path / "a.json", {"vid": entry, "query": entry}))
    assert [sample.video for sample in samples] == ["vid", "query"]


def test_a_video_that_is_there_twice(tmp_path: Path) -> None:
    entry = json.dumps({"duration": 10, "sentences": ["One."]})
    path = write(tmp_path / "a.json", f'{{"v": {entry}, "v": {entry}}}')
    with pytest.raises(InputError, match="'v' is there twice in one object; correct it"):
        read_annotations(path)
