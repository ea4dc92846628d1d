"""Values of the right form and the wrong kind, in every file: one line each, and never another value instead."""

from __future__ import annotations

import collections
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_runs import synthetic_config

from cnm import CNM, checkpoint, configs, plot
from cnm.data import Vocabulary, cache, load_features, plant, read_annotations
from cnm.data.features import FeatureFile
from cnm.errors import InputError
from cnm.files import parse_json
from cnm.training.run_folder import RunFolder

DEEP = "[" * 100_000
NOT_PLAIN = {
    "digits": "1" * 5000,
    "beyond floats": "1" + "0" * 400,
    "1e999": "1e999",
    "nan": "NaN",
    "infinity": "-Infinity",
    "deep": DEEP + "]" * 100_000,
    "unclosed": DEEP,
    "surrogate": r'"\udc80"',
    "surrogate key": r'{"\udc80": 1}',
}


@pytest.mark.parametrize("text", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_json_that_cannot_be_used_is_one_line_in_every_reader(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    readers: list[Callable[[], Any]] = [
        lambda: parse_json(text, str(path)),
        lambda: read_annotations(path),
        lambda: configs.resolve(path),
        lambda: RunFolder(tmp_path).rows(),
        lambda: configs.resolve("synthetic", [f"train.seed={text}"]),
    ]
    path.write_text(text)
    for read in readers:
        with pytest.raises(InputError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value) or "--set train.seed" in str(caught.value)


@pytest.mark.parametrize("row", ["3", "{}", '{"kind": "train"}', '{"kind": "eval", "epoch": "1", "update": 2}'])
def test_rows_of_metrics_are_checked(tmp_path: Path, row: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1: "):
        RunFolder(tmp_path).rows()


def test_a_broken_row_of_metrics_is_the_last_or_an_error(tmp_path: Path) -> None:
    row = '{"kind": "train", "epoch": 1, "update": 2}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(row + row[:9])
    assert len(RunFolder(tmp_path).rows()) == 1
    path.write_text(row + row[:9] + row + row)  # a process that went on behind a line cut short
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: is not JSON; correct the line"):
        RunFolder(tmp_path).rows()


@pytest.mark.parametrize("name", ["a\0b", "", ".", "..", "a//b", "/a", "a/./b", "../a", "\udc80"])
def test_names_that_mean_another_video(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        file["a"] = np.ones((3, 2), np.float32)
    with FeatureFile(tmp_path / "f.hdf5") as features, pytest.raises(InputError, match="is not a video's name"):
        features.frames(name, 2)
    (tmp_path / "a.json").write_text(json.dumps([[name, 10, [1, 2], "text"]]))
    with pytest.raises(InputError, match="row 0"):
        read_annotations(tmp_path / "a.json")


def test_names_with_dots_slashes_and_colons_are_found(tmp_path: Path) -> None:
    rows = [[name, 10, [1, 2], "text"] for name in ("a.mp4", "b/c", "b/d:1")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    vocabulary = Vocabulary(["<pad>"], np.zeros((1, 2), np.float32))
    assert plant([tmp_path / "a.json"], vocabulary, tmp_path / "f.hdf5", frame_dim=2) == 3
    for name, *_ in rows:
        assert load_features(f"{tmp_path / 'f.hdf5'}:{name}", 2, 4).shape == (4, 2)
    (tmp_path / "a.json").write_text(json.dumps([*rows, ["b", 10, [1, 2], "text"]]))
    with pytest.raises(InputError, match="cannot hold both"):
        plant([tmp_path / "a.json"], vocabulary, tmp_path / "g.hdf5", frame_dim=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "f.hdf5"]


@pytest.mark.parametrize("row", [-1, True, 1.0, "0", 10**400])
def test_w2id_is_a_row(tmp_path: Path, row: Any) -> None:
    content = {"w2id": {"a": row}, "id2vec": [np.ones(2)] * 3, "counter": collections.Counter("a")}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"v\.pkl: .*'a'"):
        Vocabulary.from_pickle(tmp_path / "v.pkl", 3, 2)


@pytest.mark.parametrize("vector", [[10**400, 1], ["1.5", "2"], [True, False], [1e300, 1.0]])
def test_vectors_are_numbers(tmp_path: Path, vector: list[Any]) -> None:
    content = {"w2id": {"a": 0}, "id2vec": [vector], "counter": collections.Counter("a")}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"v\.pkl: .*'a'"):
        Vocabulary.from_pickle(tmp_path / "v.pkl", 3, 2)


def test_numpy_integers_are_taken(tmp_path: Path) -> None:
    content = {"w2id": {"a": np.int64(1)}, "id2vec": np.eye(2), "counter": collections.Counter({"a": np.int64(3)})}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(content))
    np.testing.assert_array_equal(Vocabulary.from_pickle(tmp_path / "v.pkl", 3, 2).vectors[1], [0, 1])


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    config = synthetic_config()
    content = {"num_updates": 1, "config": config.to_dict(), "model_parameters": CNM(config).state_dict()}
    return tmp_path / "m.pt", content


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_checkpoints_load_and_say_so(
    model: tuple[Path, dict[str, Any]], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = model
    wrapped = {f"{prefix}{name}": value for name, value in content["model_parameters"].items()}
    torch.save(content | {"model_parameters": wrapped}, path)
    with caplog.at_level(logging.WARNING):
        found = CNM.from_checkpoint(path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in content["model_parameters"].items())
    assert repr(prefix) in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"num_updates": -1},
        {"num_updates": True},
        {"config": {"a": float("nan")}},
        {"config": {1: 2}},
        {"model_parameters": {"w": torch.tensor([float("nan")])}},
        {"model_parameters": {"w": torch.tensor([1])}},
        {"model_parameters": {1: torch.ones(1)}},
        {"vocabulary": 3},
        {"vocabulary": {"words": ["a", 1], "vectors": torch.ones(2, 2)}},
        {"vocabulary": {"words": ["a"], "vectors": torch.ones(2, 2)}},
        {"training": {}},
        {"training": {"epoch": "1"}},
    ],
    ids=repr,
)
def test_fields_of_another_kind(model: tuple[Path, dict[str, Any]], change: dict[str, Any]) -> None:
    path, content = model
    torch.save(content | change, path)
    with pytest.raises(InputError, match=rf"^{path}: .*{next(iter(change))}"):
        checkpoint.load(path)


def test_text_that_no_font_draws_is_drawn() -> None:
    assert plot.localizations([plot.Localization("a \udc80 \0 door", 0.5, 0.2, 5.0)]).startswith(b"\x89PNG")


def test_a_full_disk_does_not_kill_the_cache(tmp_path: Path) -> None:
    code = f"""
import resource, numpy as np
from pathlib import Path
from cnm.data import cache
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
def build(folder):
    with cache.rows_file(folder / "clips.npy", (1000, 100), np.float32) as append:
        raise SystemExit("space was not taken first")
try:
    cache.build_once(Path({str(tmp_path)!r}), {{}}, build)
except cache.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the cache cannot be written (File too large)" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_cache_is_shared_by_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        folder = cache.build_once(tmp_path / "cache", {}, lambda folder: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o775
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.parent.glob("*.lock")] in ([], [0o666])


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    folder = cache.build_once(tmp_path, {}, lambda folder: None)
    left = tmp_path / f".building-{folder.name}"
    folder.rename(left)
    (left / cache.SIZES).unlink()
    cache.build_once(tmp_path, {}, lambda folder: None)
    assert not left.exists()
