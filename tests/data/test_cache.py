"""The cache: built once, never stale, never half-written, safe for two processes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import write_files

from cnm.config import CNMConfig
from cnm.data import cache, open_split
from cnm.errors import InputError


def test_it_builds_once_per_input(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").write_text("1")

    first = cache.build_once(tmp_path, {"a": 1}, build)
    assert cache.build_once(tmp_path, {"a": 1}, build) == first
    assert cache.build_once(tmp_path, {"a": 2}, build) != first
    assert len(calls) == 2
    assert (first / "x").read_text() == "1"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"the cache cannot be written \(No space left.*dataset.cache_path"):
        cache.build_once(tmp_path, {}, build)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(KeyboardInterrupt):
        cache.build_once(tmp_path, {}, lambda folder: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def frames(config: CNMConfig) -> np.ndarray:
    return open_split(config.dataset, "train").batch([0]).frames.numpy()


def test_a_changed_input_or_setting_is_seen(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    config = CNMConfig.from_json(path)
    before = frames(config)
    np.testing.assert_array_equal(frames(config), before)

    dataset = config.dataset.model_copy(update={"max_num_frames": config.dataset.max_num_frames // 2})
    assert open_split(dataset, "train").batch([0]).frames.size(1) == config.dataset.max_num_frames // 2

    import h5py

    time.sleep(0.01)  # the file's time of change must move
    with h5py.File(config.dataset.feature_path, "r+") as file:
        for video in file:
            file[video][...] += 1
    np.testing.assert_allclose(frames(config), before + 1, rtol=1e-4, atol=1e-5)

    annotations = Path(str(config.dataset.train_data))
    annotations.write_text(annotations.read_text().replace("door", "window"))
    words = open_split(config.dataset, "train").batch([0]).word_ids
    assert open_split(config.dataset, "train").vocabulary.words[int(words[0, 4])] == "window"


def test_another_file_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    """As an archive with normalised times unpacks it, or `cp -p` and `rsync -t` put it in place."""
    config = CNMConfig.from_json(write_files(tmp_path))
    path = Path(str(config.dataset.feature_path))
    before, status = frames(config), path.stat()

    import h5py

    time.sleep(0.02)  # file systems count time in steps of some milliseconds
    with h5py.File(path, "r+") as file:
        for video in file:
            file[video][...] += 1
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    np.testing.assert_allclose(frames(config), before + 1, rtol=1e-4, atol=1e-5)


def test_two_processes_build_it_at_once(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from cnm.data import cache
def build(folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    (folder / "x").write_text("whole")
print((cache.build_once(Path({str(tmp_path / "cache")!r}), {{}}, build) / "x").read_text())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["whole", "whole"]
    assert (tmp_path / "log").read_text() == "built\n"


@pytest.mark.parametrize("harm", ["truncated", "missing", "unlisted", "a file in its place"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, harm: str) -> None:
    """And what is mapped of it stays readable."""

    def build(folder: Path) -> None:
        np.save(folder / "clips.npy", np.arange(10_000, dtype=np.float32))

    folder = cache.build_once(tmp_path, {"what": "clips"}, build)
    mapped = np.load(folder / "clips.npy", mmap_mode="r")
    if harm == "truncated":
        mapped = mapped.copy()
        with open(folder / "clips.npy", "r+b") as file:
            file.truncate(1000)
    elif harm == "missing":
        (folder / "clips.npy").unlink()
    elif harm == "unlisted":
        (folder / cache.SIZES).unlink()
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    again = cache.build_once(tmp_path, {"what": "clips"}, build)
    assert again == folder
    np.testing.assert_array_equal(np.load(again / "clips.npy"), mapped)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".building")] == []
