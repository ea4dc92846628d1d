"""Features in folders, side by side, and in HDF5 files of any depth."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_runs import write_files

from cnm.config import CNMConfig
from cnm.data import load_features, open_split
from cnm.data.arrays import array_shape, read_array
from cnm.data.feature_sources import FeatureFolder, open_features
from cnm.data.features import pool
from cnm.errors import InputError

FRAMES = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float16)


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    np.savez_compressed(tmp_path / "v.mp4.npz", features=FRAMES, other=np.zeros(3))
    np.savez(tmp_path / "b/w.npz", anything=FRAMES[:5].T.copy().T)  # Fortran order
    np.save(tmp_path / "x.npy", FRAMES[:2].astype(np.float32))
    folder = open_features(str(tmp_path))
    folder.check(["v.mp4", "b/w", "x"], 3)
    for video, expected in (("v.mp4", FRAMES), ("b/w", FRAMES[:5]), ("x", FRAMES[:2])):
        assert folder.shape(video) == expected.shape
        assert folder.frames(video, 3).dtype == np.float32
        np.testing.assert_array_equal(folder.frames(video, 3), expected.astype(np.float32))
    with pytest.raises(InputError, match=r"has no features for video 'y' \(and 1 others\)"):
        folder.check(["x", "y", "z"], 3)
    with pytest.raises(InputError, match=r"'x' are 3 wide, but 4 are expected"):
        folder.check(["x"], 4)
    with pytest.raises(InputError, match="is not a video's name"):
        folder.frames("../x", 3)
    np.save(tmp_path / "v.mp4.npy", FRAMES)
    with pytest.raises(InputError, match=r"'v\.mp4' is there twice, as \.npz and as \.npy"):
        folder.check(["v.mp4"], 3)
    np.testing.assert_array_equal(load_features(str(tmp_path / "v.mp4.npz"), 3, 4), pool(FRAMES.astype(np.float32), 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": FRAMES, "b": FRAMES}, "holds 2 arrays (a, b) and none called features"),
        ({}, "holds 0 arrays (none)"),
        ({"a": FRAMES[0]}, "holds float16 of shape [3], not numbers [frames, width]"),
        ({"a": np.full((2, 3), np.nan)}, "hold NaN or infinity"),
        ({"a": np.full((2, 3), 1e300)}, "hold NaN or infinity"),
        ({"a": np.array([[{}]])}, "it holds Python objects"),
        ({"a": np.array([["x"]])}, "not numbers"),
    ],
)
def test_archives_that_hold_no_features(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'v.npz'}: ") + ".*" + re.escape(message)):
        FeatureFolder(tmp_path).frames("v", None)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_every_truncation_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v.{suffix}"
    (np.savez if suffix == "npz" else np.save)(path, FRAMES)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as caught:
            read_array(path)
        assert "\n" not in str(caught.value)


def test_an_archive_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    header = str({"descr": "<f4", "fortran_order": False, "shape": (1 << 33, 8)}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match=r"declares .* numbers, where 2048 MB is the most"):
        array_shape(tmp_path / "v.npz")


def test_several_sources_are_joined_and_cut_to_the_shortest(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    np.save(tmp_path / "clip/v.npy", FRAMES)
    with h5py.File(tmp_path / "test.hdf5", "w") as file:
        file["deep/v/rgb"] = FRAMES[:7] * 2
    with open_features([str(tmp_path / "clip"), str(tmp_path / "{split}.hdf5")], "deep/{video}/rgb", "test") as joined:
        joined.check(["v"], 6)
        assert joined.shape("v") == (7, 6)
        expected = np.concatenate([FRAMES[:7], FRAMES[:7] * 2], axis=1).astype(np.float32)
        np.testing.assert_array_equal(joined.frames("v", 6), expected)
        with pytest.raises(InputError, match=r"clip \+ .*test\.hdf5: the features of video 'v' are 6 wide, but 5"):
            joined.check(["v"], 5)
        with pytest.raises(InputError, match=r"clip: has no features for video 'w'"):
            joined.check(["v", "w"], 6)


@pytest.mark.parametrize(
    ("lengths", "fits"),
    [((75, 73), True), ((3, 1), True), ((100, 107), True), ((225, 30), False), ((60, 90), False), ((300, 281), False)],
)
def test_features_of_other_times_are_not_put_side_by_side(tmp_path: Path, lengths: tuple[int, int], fits: bool) -> None:
    for name, length in zip(("clip", "slowfast"), lengths, strict=True):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "v.npy", np.ones((length, 3), np.float32))
    with open_features([str(tmp_path / "clip"), str(tmp_path / "slowfast")]) as joined:
        if fits:
            assert joined.shape("v") == (min(lengths), 6)
            return
        for read in (lambda: joined.shape("v"), lambda: joined.check(["v"], 6), lambda: joined.frames("v", 6)):
            with pytest.raises(InputError, match=rf"features of video 'v' are {lengths[0]}, {lengths[1]} clips long"):
                read()


@pytest.mark.parametrize(("lengths", "fits"), [((30, 32), True), ((30, 33), False), ((300, 235), False)])
def test_extracted_features_side_by_side_are_of_one_rate(tmp_path: Path, lengths: tuple[int, int], fits: bool) -> None:
    paths = [str(tmp_path / name) for name in ("one", "other")]
    for path, length in zip(paths, lengths, strict=True):
        Path(path).mkdir()
        np.save(Path(path) / "v.npy", np.zeros((length, 3), np.float32))
        Path(f"{path}.json").write_text(json.dumps({"encoder": "e", "weights_sha256": "w", "videos": {}}))
    with open_features(paths) as source:
        if fits:
            assert source.shape("v") == (30, 6)
        else:
            with pytest.raises(InputError, match="so extract all at one rate"):
                source.shape("v")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is an empty file"),
        (b"\x80\x04K\x01.", "it is a pickle, which is not read"),
        (b"<html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"\x1f\x8b\x08", "it is a gzip archive"),
        (b"words", "it is a file of no known kind"),
    ],
)
def test_what_a_file_is_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError, match=f"f: is not a readable HDF5 file .*{message}"):
        open_features(str(tmp_path / "f"))
    np.save(tmp_path / "v.npy", FRAMES)
    with pytest.raises(InputError, match=r"v\.npy: is a \.npy array of one video; name the folder"):
        open_features(str(tmp_path / "v.npy"))


def test_a_custom_dataset_needs_a_configuration_alone(tmp_path: Path) -> None:
    content = json.loads(write_files(tmp_path).read_text())
    published = open_split(CNMConfig.from_json(content).dataset, "test")
    halves = [tmp_path / "first", tmp_path / "second"]
    for folder in halves:
        folder.mkdir()
    with h5py.File(tmp_path / "features.hdf5") as file:
        for video, item in file.items():
            np.savez(halves[0] / f"{video}.npz", features=item[:, :5])
            np.save(halves[1] / f"{video}.npy", item[:, 5:])
    content["dataset"] |= {"dataset": "custom", "feature_path": [str(folder) for folder in halves]}
    config = CNMConfig.from_json(content)
    assert CNMConfig.from_json(json.loads(json.dumps(config.to_dict()))) == config
    split = open_split(config.dataset, "test")
    indices = np.arange(len(split))
    assert torch.equal(split.batch(indices).frames, published.batch(indices).frames)
    shutil.copy(halves[0] / "test1.npz", halves[0] / "test0.npz")  # a change of one file is seen
    assert not torch.equal(open_split(config.dataset, "test").batch(indices).frames, published.batch(indices).frames)


def test_wrong_patterns_and_lists_are_refused(tmp_path: Path) -> None:
    content = json.loads(write_files(tmp_path).read_text())
    for key, value in (("feature_pattern", "a/b"), ("feature_path", []), ("feature_path", [1])):
        changed = content | {"dataset": content["dataset"] | {key: value}}
        with pytest.raises(InputError, match=f"dataset.{key}"):
            CNMConfig.from_json(changed)
    for paths in ([""], [content["dataset"]["feature_path"], ""]):
        changed = content | {"dataset": content["dataset"] | {"feature_path": paths}}
        with pytest.raises(InputError, match=r"^config: dataset: feature_path holds an empty path; name a file"):
            CNMConfig.from_json(changed)


def test_a_real_file(shared_data: Path) -> None:
    frames = FeatureFolder(shared_data / "video").frames("vid", 512)
    assert frames.shape == (15, 512)
    with np.load(shared_data / "video/vid.npz") as archive:
        np.testing.assert_array_equal(frames, archive["features"])
