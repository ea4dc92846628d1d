"""Checkpoints: whole or not at all, verified on reading, and nothing in them is ever executed."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnm import checkpoint, files
from cnm.errors import InputError

CONTENT = {"num_updates": 3, "config": {"a": [1, 2.5, None]}, "model_parameters": {"w": torch.arange(4000.0)}}


class Hostile:
    """A pickle that creates ``path`` when it is loaded by anything that executes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.pt"


def refusal(path: Path) -> str:
    """The one line with which a file is refused; it must name the file."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_what_is_saved_is_loaded(path: Path) -> None:
    extra = {"more": {"random": torch.get_rng_state(), "betas": (0.9, 0.999)}}
    checkpoint.save(path, CONTENT | extra)
    found = checkpoint.load(path)
    assert found["config"] == CONTENT["config"]
    assert found["more"]["betas"] == (0.9, 0.999)
    assert torch.equal(found["more"]["random"], extra["more"]["random"])
    assert torch.equal(found["model_parameters"]["w"], CONTENT["model_parameters"]["w"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_checkpoints_load_in_both_of_torchs_formats(path: Path, zipped: bool) -> None:
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    assert checkpoint.load(path)["num_updates"] == 3


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -40, -1], ids=lambda kept: f"first{kept}")
def test_cut_short(path: Path, kept: int) -> None:
    path.write_bytes(as_bytes(CONTENT)[:kept])
    assert "not a checkpoint" in refusal(path)


def test_one_changed_byte_is_noticed(path: Path) -> None:
    content = bytearray(as_bytes(CONTENT))
    weights = CONTENT["model_parameters"]["w"].numpy().tobytes()
    content[content.find(weights) + 100] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_a_name_of_two_lines_is_shown_in_one(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arc\nhive/\x1b[2Jdata.pkl", b"content")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"content", b"c0ntent", 1))
    assert r"is damaged (arc\nhive/\x1b[2Jdata.pkl does not match" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"[1, 2]", b"\x93NUMPY" + bytes(100), b"PK\x05\x06" + bytes(18)],
    ids=["text", "json", "npy", "empty zip"],
)
def test_other_files(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "not a checkpoint" in refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1], "list"),
        ({"weights": 1}, "num_updates"),
        ({**CONTENT, "config": "a.json"}, "'config': Input should be a valid dictionary, found 'a.json'"),
        (
            {**CONTENT, "model_parameters": {"w": 1}},
            "'model_parameters.w': Input should be an instance of",
        ),
        ({**CONTENT, "extra": np.zeros(3)}, "could run code"),
        (torch.nn.Linear(2, 2), "could run code"),
    ],
    ids=["list", "other dict", "ill-typed", "no tensor", "numpy", "module"],
)
def test_other_content(path: Path, content: object, says: str) -> None:
    path.write_bytes(as_bytes(content))
    assert says in refusal(path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, path: Path, zipped: bool, protocol: int) -> None:
    ran = tmp_path / "ran"
    hostile = {**CONTENT, "num_updates": Hostile(ran)}
    if zipped:
        torch.save(hostile, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(Hostile(ran), protocol=protocol))
    message = refusal(path)
    assert "could run code" in message or "not a checkpoint" in message
    assert not ran.exists()
    if not zipped:  # the test's own check: a reader that executes does run it
        pickle.loads(path.read_bytes())
        assert ran.exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(InputError, match=r"some\.pt: cannot be written \(No space left on device\); free disk space"):
        checkpoint.save(path, {**CONTENT, "num_updates": 4})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, CONTENT)
    assert list(path.parent.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/some\.pt: cannot be written \(No such file or directory\)"):
        checkpoint.save(tmp_path / "none" / "some.pt", CONTENT)


def test_an_archive_that_would_unpack_to_much_more(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(1 << 24))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="more than it holds"):
        checkpoint.load(path)
