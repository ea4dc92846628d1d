"""Features are compared with what is known of them: records of extraction, manifests, and the model's own features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import Result
from small_runs import write_files
from typer.testing import CliRunner
from undrawn import draw_nothing

from cnm import checkpoint, configs
from cnm.cli import app
from cnm.data import open_split
from cnm.data.origin import Origin
from cnm.errors import InputError
from cnm.models import build

GREYS: dict[str, Any] = {"encoder": "greys", "weights_sha256": "0" * 64, "stride": 3, "rate": None}
COLOURS = GREYS | {"encoder": "colours", "weights_sha256": "1" * 64}
REFUSED = "split: features of colours (weights 11111111), but the model was trained on those of greys (weights 000"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")][-1]


def record(folder: Path, made_by: dict[str, Any], name: str = "features.hdf5", **more: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(made_by | {"videos": {}} | more))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_files(tmp_path)
    return tmp_path


def write_checkpoint(folder: Path, features: dict[str, Any] | None) -> Path:
    config = configs.resolve(folder / "config.json")
    vocabulary = open_split(config.dataset, "train").vocabulary
    model = build(config)
    content = {"num_updates": 0, "config": config.to_dict(), "model_parameters": model.state_dict()}
    content |= {"vocabulary": vocabulary.state()} | ({} if features is None else {"features": features})
    checkpoint.save(folder / "model.pt", content)
    return folder / "model.pt"


def test_evaluate_refuses_features_of_another_encoder(files: Path) -> None:
    arguments = ("evaluate", "--checkpoint", write_checkpoint(files, GREYS))
    assert run(*arguments).exit_code == 0  # nobody says what these are
    record(files, GREYS)
    assert run(*arguments).exit_code == 0
    record(files, COLOURS)
    assert f"test {REFUSED}" in error_line(run(*arguments))


def test_a_resumed_run_refuses_features_of_another_encoder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    record(files, GREYS)
    arguments = ("train", "--config", files / "config.json", "--run", files / "run", "--set", "train.max_num_epochs=1")
    assert run(*arguments).exit_code == 0
    record(files, COLOURS)
    resumed = ("train", "--resume", files / "run", "--set", "train.max_num_epochs=2")
    assert f"train {REFUSED}" in error_line(run(*resumed))
    assert f"test {REFUSED}" in error_line(run("report", files / "run", "--output", files / "report.html"))
    record(files, GREYS)
    assert run(*resumed).exit_code == 0


def test_splits_of_one_run_come_from_one_encoder(files: Path) -> None:
    for split, made_by in (("train", GREYS), ("val", GREYS), ("test", COLOURS)):
        (files / f"{split}.hdf5").write_bytes((files / "features.hdf5").read_bytes())
        record(files, made_by, f"{split}.hdf5")
    path = f"dataset.feature_path={files}/{{split}}.hdf5"
    trained = run("train", "--config", files / "config.json", "--run", files / "run", "--set", path)
    assert f"test {REFUSED}" in error_line(trained)
    assert not (files / "run").exists()


def test_features_side_by_side_have_one_origin(tmp_path: Path) -> None:
    record(tmp_path, GREYS, "a")
    record(tmp_path, COLOURS, "b")
    paths = [tmp_path / "a", tmp_path / "b"]
    joint = Origin.of(paths)
    assert joint == Origin("greys + colours", "0" * 64 + " + " + "1" * 64, 3, None)
    assert Origin.of(f"{tmp_path}/{{split}}", "a") == Origin.of(paths[:1]) == Origin.of(paths[0])
    assert Origin.of([*paths, tmp_path / "unknown"]) is Origin.of([]) is Origin.of(None) is None
    assert Origin.from_record(joint.to_dict()) == joint
    joint.check(joint, "features")
    with pytest.raises(
        InputError, match=r"features of colours \(weights 1{8}\) \+ greys \(weights 0{8}\), but the model"
    ):
        joint.check(Origin.of(paths[::-1]), "features")
    record(tmp_path, COLOURS | {"stride": None, "rate": 2}, "b")
    other = Origin.of(paths)
    assert other is not None
    assert (other.stride, other.rate) == (None, None)


@pytest.mark.parametrize("record", [None, [1], 3, {"encoder": 3}, GREYS | {"weights_sha256": None}])
def test_what_says_nothing_is_no_origin(record: Any) -> None:
    assert Origin.from_record(record) is None


def check(files: Path) -> Result:
    splits = [part for name in ("train", "val", "test") for part in ("--annotations", files / f"{name}.json")]
    return run("features", "check", files / "features.hdf5", *splits, "--manifest", files / "manifest.json")


def test_a_manifest_is_compared_by_evaluate_and_training(files: Path) -> None:
    record(files, GREYS)
    assert "written" in check(files).stdout
    assert json.loads((files / "manifest.json").read_text())["extracted"] == GREYS
    manifest = ("--set", f"dataset.feature_manifest={files / 'manifest.json'}")
    evaluate = ("evaluate", "--checkpoint", write_checkpoint(files, COLOURS), *manifest)
    train = ("train", "--config", files / "config.json", "--run", files / "run", *manifest)
    (files / "features.hdf5.json").unlink()  # the manifest still says what they are
    assert "features of greys (weights 00000000), but the model was trained on those of colours" in error_line(
        run(*evaluate)
    )
    write_checkpoint(files, GREYS)
    assert run(*evaluate).exit_code == 0
    with h5py.File(files / "features.hdf5", "a") as file:
        file["test3"][0, 0] += 1
        file["train4"][0, 0] += 1
    problem = "video {!r} has other values than the manifest says ({}"
    assert problem.format("test3", files / "manifest.json") in error_line(run(*evaluate))
    assert problem.format("train4", files / "manifest.json") in error_line(run(*train))
    with h5py.File(files / "features.hdf5", "a") as file:
        frames = file["train4"][:-1]
        del file["train4"]
        file["train4"] = frames
    line = error_line(run(*train))
    assert f"video 'train4' has shape [{len(frames)}, 12], the manifest says [{len(frames) + 1}, 12]" in line
    assert not (files / "run").exists()
    record(files, COLOURS)
    for command in (check(files), run(*train)):
        assert "was written of features of greys (weights 00000000), but these are of colours" in error_line(command)
    (files / "manifest.json").unlink()
    assert "manifest.json: cannot be read" in error_line(run(*evaluate))


@pytest.mark.parametrize("videos", [{"a": 3}, []])
def test_a_damaged_manifest_is_one_line(files: Path, videos: Any) -> None:
    (files / "manifest.json").write_text(json.dumps({"format": 1, "videos": videos}))
    manifest = f"dataset.feature_manifest={files / 'manifest.json'}"
    assert "manifest.json: " in error_line(
        run("train", "--config", files / "config.json", "--run", files / "run", "--set", manifest)
    )


@pytest.mark.parametrize("joined", [False, True])
def test_shapes_are_compared_with_what_was_extracted(files: Path, joined: bool) -> None:
    with h5py.File(files / "features.hdf5") as file:
        clips = len(file["test3"])
    paths = [str(files / "features.hdf5")]
    if joined:
        (files / "more").mkdir()
        for split in ("train", "val", "test"):
            for video in range(10):
                np.save(files / "more" / f"{split}{video}.npy", np.ones((40, 2), np.float32))
        paths.append(str(files / "more"))
    evaluated = {"feature_path": paths, "frame_dim": 14 if joined else 12}
    config = configs.resolve(files / "config.json").dataset.model_copy(update=evaluated)
    record(files, GREYS, width=12, videos={"test3": {"clips": clips}, "test4": {}, "other": {"clips": 1}})
    open_split(config, "test")
    record(files, GREYS, width=12, videos={"test3": {"clips": clips + 1}})
    (files / "features.hdf5").touch()
    expected = rf"features\.hdf5: video 'test3' has shape \[{clips}, 12\], but \[{clips + 1}, 12\] was extracted"
    with pytest.raises(InputError, match=expected):
        open_split(config, "test")
