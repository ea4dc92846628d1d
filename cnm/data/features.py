"""Visual features: reads and checks HDF5 files (published layouts, or a pattern), and averages frames to clips."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from cnm.data import cache
from cnm.data.arrays import MAX_BYTES, read_array, what_it_is
from cnm.data.names import name_problem
from cnm.data.origin import hdf5_and_video
from cnm.errors import InputError

INNER_KEYS = ("c3d_features",)  # the dataset's name if a video is a group
SHOWN = 5  # names in a message


class FeatureFile:
    """An HDF5 file with one dataset [n, frame_dim] per video, or one group with such a ``c3d_features`` inside.

    Args:
        pattern: path of a video's dataset; ``{video}`` is replaced by its name.

    Raises:
        InputError: the file is missing or is not HDF5 (for example: truncated). Features that it takes from other files
            are refused when they are read.
    """

    def __init__(self, path: str | Path, pattern: str | None = None) -> None:
        self.path = path
        self._pattern = pattern or "{video}"
        if not os.path.isfile(path):
            raise InputError(f"{path}: there is no such feature file; check dataset.feature_path")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            reason = " ".join(str(error).split())
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EPERM, errno.ENOLCK):  # the file is complete
                held = "another program is writing it; wait for it, or close the file there"
                remedy = held if "lock" in reason else "check its permissions"
                raise InputError(f"{path}: cannot be opened ({reason}); {remedy}") from None
            raise InputError(
                f"{path}: is not a readable HDF5 file ({reason}); it is {what_it_is(path)}, perhaps truncated: "
                f"fetch it again, or name an HDF5 file or a folder of .npz or .npy"
            ) from None

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, video: str) -> bool:
        with self._readable(video):
            return self._key(video) in self._file

    def shape(self, video: str) -> tuple[int, int]:
        """Returns the shape [frames, width] of one video. Raises ``InputError`` as ``frames`` does."""
        n, width = self._dataset(video, None).shape
        return n, width

    def identity(self, videos: Iterable[str]) -> Any:
        """Identifies the version of the file."""
        found = cache.identity(self.path)
        return found if self._pattern == "{video}" else found | {"pattern": self._pattern}

    def check(self, videos: Iterable[str], frame_dim: int | None) -> None:
        """Refuses the first video that is missing or has another width, before long work begins.

        Raises:
            InputError: as ``frames`` raises it, except for wrong values, which it does not read.
        """
        missing = [video for video in videos if video not in self]
        if missing:
            raise InputError(
                f"{self.path}: has no features for video {missing[0]!r}"
                + (f" (and {len(missing) - 1} others)" if len(missing) > 1 else "")
                + "; take the feature file that belongs to the annotations"
            )
        for video in videos:
            self._dataset(video, frame_dim)

    def frames(self, video: str, frame_dim: int | None) -> np.ndarray:
        """Returns the features [n, frame_dim] float32 of one video.

        Raises:
            InputError: the video is missing, has another shape or width, holds NaN or infinity, or cannot be read.
        """
        dataset = self._dataset(video, frame_dim)
        with self._readable(video), np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
            frames = dataset[()].astype(np.float32, copy=False)
        if not np.isfinite(frames).all():
            raise InputError(f"{self.path}: the features of video {video!r} hold NaN or infinity; extract them again")
        return frames

    @contextmanager
    def _readable(self, video: str) -> Iterator[None]:
        """Turns the many exceptions that h5py raises for damaged files into ``InputError``."""
        problem = name_problem(video)  # HDF5 cuts names at a NUL and drops parts that are a dot
        if problem:
            raise InputError(f"{self.path}: {video!r} is not a video's name: {problem}; correct it")
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = str(error).replace("\n", " ")
            raise InputError(f"{self.path}: video {video!r} cannot be read ({reason}); fetch the file again") from None

    def _key(self, video: str) -> str:
        return self._pattern.replace("{video}", video)

    def _dataset(self, video: str, frame_dim: int | None) -> h5py.Dataset:
        with self._readable(video):
            item = self._file.get(self._key(video))
            if isinstance(item, h5py.Group):
                inner = [key for key in INNER_KEYS if key in item]
                if not inner:
                    raise InputError(
                        f"{self.path}: {item.name!r} holds {', '.join(sorted(item)[:SHOWN]) or 'nothing'}; say which "
                        f"of them the features are, as dataset.feature_pattern={{video}}/NAME (--pattern in `cnm "
                        f"features check`)"
                    )
                item = item[inner[0]]
            if not isinstance(item, h5py.Dataset):
                raise InputError(
                    f"{self.path}: has no features for video {video!r}; take the file of these annotations"
                )
            if item.ndim != 2 or item.shape[0] == 0 or item.dtype.kind not in "fiu":
                raise InputError(
                    f"{self.path}: video {video!r} holds {item.dtype} of shape {list(item.shape)}, "
                    f"not numbers [frames, width]; extract them again"
                )
            if item.file.filename != self._file.filename or item.is_virtual or item.external:
                raise InputError(
                    f"{self.path}: the numbers of video {video!r} are in another file (by a link, or virtual or "
                    f"external storage), and the cache would miss its changes; copy them into this one"
                )
        if item.nbytes > MAX_BYTES:
            raise InputError(
                f"{self.path}: video {video!r} declares {list(item.shape)} numbers, {item.nbytes >> 20} MB, where "
                f"{MAX_BYTES >> 20} MB is the most; the file is damaged or made to fill the memory"
            )
        if frame_dim is not None and item.shape[1] != frame_dim:
            raise InputError(
                f"{self.path}: the features of video {video!r} are {item.shape[1]} wide, but {frame_dim} are expected "
                f"(dataset.frame_dim); correct the configuration or take other features"
            )
        return item


def pool(frames: np.ndarray, num_clips: int) -> np.ndarray:
    """Averages n frames to T clips: clip j is the mean of frames round(j n/T) to round((j+1) n/T).

    An empty range takes its first frame; bounds are clamped to the last frame. Source: published
    ``_sample_frame_features``.

    Args:
        frames: [n, frame_dim], n >= 1.

    Returns:
        [num_clips, frame_dim] float32.
    """
    n = len(frames)
    bounds = np.round(np.arange(num_clips + 1) / num_clips * n).astype(np.int64).clip(max=n - 1)
    clips = np.empty((num_clips, frames.shape[1]), dtype=np.float32)
    for j, (start, end) in enumerate(pairwise(bounds)):
        clips[j] = frames[start] if start == end else frames[start:end].mean(axis=0)
    return clips


def clips(frames: np.ndarray, num_clips: int) -> np.ndarray:
    """Returns a model's input of one video, [num_clips, frame_dim] float32; ``pool`` averages other lengths."""
    return np.asarray(frames, np.float32) if len(frames) == num_clips else pool(frames, num_clips)


def pool_batch(frames: Tensor, lengths: Tensor, num_clips: int) -> tuple[Tensor, Tensor]:
    """Averages the videos of a batch that are longer than ``num_clips`` by ``pool``; shorter ones stay unchanged.

    Args:
        frames: [B, n, frame_dim], floating.
        lengths: [B] int64, number of real frames.

    Returns:
        [B, min(n, num_clips), frame_dim] in the frames' dtype, and lengths [B].
    """
    if frames.size(1) <= num_clips:
        return frames, lengths
    out = frames[:, :num_clips].clone()
    for row, length in enumerate(lengths.tolist()):
        if length > num_clips:
            averaged = pool(frames[row, :length].detach().float().cpu().numpy(), num_clips)
            out[row] = torch.from_numpy(averaged).to(out)
    return out, lengths.clamp_max(num_clips)


def load_features(source: str, frame_dim: int, num_clips: int) -> np.ndarray:
    """Reads one video's clips from ``F.npy`` or ``F.npz`` ([n, frame_dim]), or from ``F.hdf5:VIDEO``.

    Returns:
        [num_clips, frame_dim] float32.

    Raises:
        InputError: the file or video is missing, unreadable, of another shape, or holds NaN or infinity.
    """
    in_file = hdf5_and_video(source)
    if in_file:
        path, video = in_file
        with FeatureFile(path) as file:
            return pool(file.frames(video, frame_dim), num_clips)
    if Path(source).suffix not in (".npy", ".npz"):
        raise InputError(f"{source}: features are given as FILE.npy or FILE.hdf5:VIDEO, or as FILE.npz")
    frames = read_array(source)
    if frames.shape[1] != frame_dim:
        raise InputError(f"{source}: the features are {frames.shape[1]} wide, but the model expects {frame_dim}")
    return pool(frames, num_clips)
