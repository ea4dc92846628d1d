"""HDF5 and npy features in the published layouts; pooling; every kind of bad file."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from cnm.data.features import FeatureFile, load_features, pool
from cnm.errors import InputError


@pytest.mark.parametrize(
    ("n", "T"), [(1, 4), (3, 4), (4, 4), (5, 4), (10, 4), (64, 64), (75, 64), (500, 200), (7, 200)]
)
def test_pooling_means_the_frames_between_rounded_bounds(n: int, T: int) -> None:
    frames = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    clips = pool(frames, T)
    for j in range(T):
        start, end = (min(int(np.round(k / T * n)), n - 1) for k in (j, j + 1))
        expected = frames[start] if start == end else frames[start:end].mean(0)
        np.testing.assert_allclose(clips[j], expected, rtol=1e-6)


def write(path: Path, **videos: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for video, frames in videos.items():
            file[video.replace("__", "/")] = frames
    return path


def test_both_published_layouts(tmp_path: Path) -> None:
    frames = np.arange(12, dtype=np.float16).reshape(4, 3)
    path = write(tmp_path / "f.hdf5", plain=frames, v_c3d__c3d_features=frames)
    with FeatureFile(path) as file:
        file.check(["plain", "v_c3d"], 3)
        for video in ("plain", "v_c3d"):
            assert file.frames(video, 3).dtype == np.float32
            np.testing.assert_array_equal(file.frames(video, 3), frames)
    np.testing.assert_array_equal(load_features(f"{path}:v_c3d", 3, 4), pool(frames.astype(np.float32), 4))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 5)), "are 5 wide, but 3 are expected"),
        (np.zeros(3), "not numbers [frames, width]"),
        (np.zeros((0, 3)), "not numbers [frames, width]"),
        (np.array([[1, np.nan, 3]]), "hold NaN or infinity"),
        (np.array([[1, np.inf, 3]]), "hold NaN or infinity"),
        (np.array([[1, 1e300, 3]]), "hold NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_features_are_named(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    path = write(tmp_path / "f.hdf5", video=frames)
    with FeatureFile(path) as file, pytest.raises(InputError, match=re.escape(message)) as caught:
        file.frames("video", 3)
    assert str(path) in str(caught.value)
    assert "'video'" in str(caught.value)


def test_a_missing_video_is_named_before_any_work(tmp_path: Path) -> None:
    with FeatureFile(write(tmp_path / "f.hdf5", a=np.zeros((2, 3)))) as file:
        with pytest.raises(InputError, match=r"no features for video 'b' \(and 1 others\)"):
            file.check(["a", "b", "c"], 3)
        with pytest.raises(InputError, match="no features for video 'b'"):
            file.frames("b", 3)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.hdf5: there is no such feature file"):
        FeatureFile(tmp_path / "none.hdf5")
    path = write(tmp_path / "f.hdf5", a=np.zeros((200, 30)))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"f\.hdf5: is not a readable HDF5 file"):
        FeatureFile(path)


def test_features_in_another_file_are_refused(tmp_path: Path) -> None:
    """The cache knows a version of the file that was named, not of those behind it."""
    frames = np.ones((4, 3), np.float32)
    write(tmp_path / "part.hdf5", a=frames, group__c3d_features=frames)
    path = write(tmp_path / "all.hdf5", own=frames)
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    layout[:] = h5py.VirtualSource(tmp_path / "part.hdf5", "a", frames.shape)
    with h5py.File(path, "a") as file:
        file["alias"] = h5py.SoftLink("/own")
        file["link"] = h5py.ExternalLink("part.hdf5", "a")
        file["group"] = h5py.ExternalLink("part.hdf5", "group")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", data=frames, external=[(tmp_path / "raw.bin", 0, frames.nbytes)])
    with FeatureFile(path) as file:
        file.check(["own", "alias"], 3)
        for video in ("link", "group", "virtual", "raw"):
            for read in (file.shape, lambda name: file.frames(name, 3)):
                with pytest.raises(InputError, match=rf"all\.hdf5: the numbers of video '{video}' are in another file"):
                    read(video)


def test_npy_features(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).standard_normal((9, 3))
    np.save(tmp_path / "f.npy", frames)
    np.testing.assert_allclose(load_features(str(tmp_path / "f.npy"), 3, 4), pool(frames.astype(np.float32), 4))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for source, message in (
        (tmp_path / "none.npy", "cannot be read"),
        (tmp_path / "objects.npy", "is not an array of numbers"),
        (tmp_path / "f.txt", "given as FILE.npy or FILE.hdf5:VIDEO"),
    ):
        with pytest.raises(InputError, match=message):
            load_features(str(source), 3, 4)
    with pytest.raises(InputError, match="are 3 wide, but the model expects 5"):
        load_features(str(tmp_path / "f.npy"), 5, 4)


def test_a_file_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    """A few hundred bytes of HDF5 that would read as terabytes of zeros."""
    path = tmp_path / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("video", shape=(1 << 33, 8), dtype="f4", chunks=(1024, 8), compression="gzip")
    assert path.stat().st_size < 100_000
    with FeatureFile(path) as features, pytest.raises(InputError, match=r"declares .* numbers, 262144 MB"):
        features.check(["video"], 8)
