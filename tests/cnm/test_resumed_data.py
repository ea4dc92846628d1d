"""A run is resumed on the data it was trained on, wherever that lies now, and on no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_runs import write_files

from cnm.config import CNMConfig
from cnm.errors import InputError
from cnm.training.trainer import Trainer


def start(config: CNMConfig, folder: Path) -> Trainer:
    return Trainer(config, folder, quiet=True)


def resume(folder: Path) -> Trainer:
    return Trainer(None, folder, resume=True, quiet=True)


def edit_rows(folder: Path, name: str, change: Callable[[list[Any]], None]) -> None:
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def change_features(change: Callable[[np.ndarray], np.ndarray], videos: str = "") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with h5py.File(folder / "features.hdf5", "a") as file:
            for name in filter(lambda name: name.startswith(videos), file):
                file[name][...] = change(file[name][()])

    return edit


HAD = "give it the files it had"
OTHER_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "a sentence less": (
        lambda folder: edit_rows(folder, "train", list.pop),
        f"train split has other sentences; {HAD}",
    ),
    "another moment": (
        lambda folder: edit_rows(folder, "test", lambda rows: rows[0].__setitem__(2, [0.0, 1.0])),
        f"test split has other sentences; {HAD}",
    ),
    "larger features": (change_features(lambda x: 1.5 * x), f"train split has other features; {HAD}"),
    "negative features": (change_features(np.negative), f"train split has other features; {HAD}"),
    "columns in another order": (change_features(lambda x: x[:, ::-1]), f"train split has other features; {HAD}"),
    "one video's": (change_features(lambda x: x[::-1], "val3"), f"val split has other features; {HAD}"),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_a_run_is_not_resumed_on_other_data(case: str, tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    start(config, tmp_path / "run").train()
    change, message = OTHER_DATA[case]
    change(tmp_path)
    with pytest.raises(InputError, match=rf"last\.pt: was not trained with this data, the {message}"):
        resume(tmp_path / "run")


def test_rounding_does_not_make_other_features(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    start(config, tmp_path / "run").train()
    change_features(lambda x: torch.from_numpy(x).bfloat16().float().numpy())(tmp_path)
    resume(tmp_path / "run")


def test_a_resumed_run_takes_the_same_numbers_from_another_file(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    start(config, tmp_path / "run").train()
    (tmp_path / "features.hdf5").rename(tmp_path / "old.hdf5")
    shutil.copy(tmp_path / "old.hdf5", tmp_path / "features.hdf5")
    edit_rows(tmp_path, "train", lambda rows: None)
    resume(tmp_path / "run")


def test_another_choice_of_content_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    start(config, tmp_path / "run").train()
    for module in ("split", "fingerprint"):
        monkeypatch.setattr(f"cnm.data.{module}.tagger_name", lambda: "another")
    resume(tmp_path / "run")  # it chose the same words
    monkeypatch.setattr("cnm.data.tagging.FUNCTION_WORDS", frozenset())
    for module in ("split", "fingerprint"):
        monkeypatch.setattr(f"cnm.data.{module}.tagger_name", lambda: "a third")
    with pytest.raises(InputError, match="the train split has content words chosen by a third, not"):
        resume(tmp_path / "run")


def test_words_that_another_version_of_nltk_cut_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    start(config, tmp_path / "run").train()
    monkeypatch.setattr("cnm.data.tagging.word_tokenize", lambda text, preserve_line: text.split()[1:])
    monkeypatch.setattr("nltk.__version__", "0.1")
    with pytest.raises(InputError, match=r"split has other words of its sentences \(.*version of nltk than nltk 0\.1,"):
        resume(tmp_path / "run")
