"""Sources of features: an HDF5 file, a folder with a file per video, or several of these, concatenated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from cnm.data import cache
from cnm.data.arrays import array_shape, read_array, what_it_is
from cnm.data.features import FeatureFile
from cnm.data.names import name_problem
from cnm.data.origin import read_record
from cnm.errors import InputError

SUFFIXES = (".npz", ".npy")
# Features of a video that are longer than so many times the shortest, and so many clips, are of another rate. Other
# tools round at a video's end; ``cnm extract`` gives all encoders the same clips.
MOST_LONGER, MORE_CLIPS = 1.05, 2


class FeatureSource(Protocol):
    """Features by video. Messages use ``path`` as the source's name."""

    path: str | Path

    def __enter__(self) -> FeatureSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __contains__(self, video: str) -> bool: ...

    def shape(self, video: str) -> tuple[int, int]:
        """Returns the shape [frames, width] of one video. Raises ``InputError`` if it has no features."""

    def check(self, videos: Iterable[str], frame_dim: int | None) -> None:
        """Raises ``InputError`` for the first video that is missing or, if a width is given, has another width."""

    def frames(self, video: str, frame_dim: int | None) -> np.ndarray:
        """Returns the finite features [n, width] float32 of one video. Raises ``InputError``."""

    def identity(self, videos: Iterable[str]) -> Any:
        """Identifies the version of these videos' files, as JSON."""


class _Checked(ABC):
    """Implements ``check`` for any source, with its ``shape`` and ``__contains__``."""

    path: str | Path

    @abstractmethod
    def __contains__(self, video: str) -> bool: ...

    @abstractmethod
    def shape(self, video: str) -> tuple[int, int]: ...

    def check(self, videos: Iterable[str], frame_dim: int | None) -> None:
        videos = list(videos)
        missing = [video for video in videos if video not in self]
        if missing:
            raise InputError(
                f"{self.path}: has no features for video {missing[0]!r}"
                + (f" (and {len(missing) - 1} others)" if len(missing) > 1 else "")
                + "; take the features that belong to the annotations"
            )
        for video in videos:
            self._check_width(video, self.shape(video)[1], frame_dim)

    def _check_width(self, video: str, width: int, frame_dim: int | None) -> None:
        if frame_dim is not None and width != frame_dim:
            raise InputError(
                f"{self.path}: the features of video {video!r} are {width} wide, but {frame_dim} are expected "
                f"(dataset.frame_dim); correct the configuration or take other features"
            )


class FeatureFolder(_Checked):
    """A folder with ``<video>.npz`` or ``<video>.npy`` for each video, [n, width] of any float or integer type.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        if not Path(path).is_dir():
            raise InputError(f"{path}: there is no such folder of features; check dataset.feature_path")

    def __enter__(self) -> FeatureFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __contains__(self, video: str) -> bool:
        return self._find(video) is not None

    def shape(self, video: str) -> tuple[int, int]:
        n, width = array_shape(self._file(video))
        return n, width

    def frames(self, video: str, frame_dim: int | None) -> np.ndarray:
        frames = read_array(self._file(video))
        self._check_width(video, frames.shape[1], frame_dim)
        return frames

    def identity(self, videos: Iterable[str]) -> Any:
        return [cache.identity(self._file(video)) for video in videos]

    def _find(self, video: str) -> Path | None:
        problem = name_problem(video)
        if problem:
            raise InputError(f"{self.path}: {video!r} is not a video's name: {problem}; correct it")
        found = [file for suffix in SUFFIXES if (file := Path(self.path) / f"{video}{suffix}").is_file()]
        if len(found) > 1:
            raise InputError(f"{self.path}: video {video!r} is there twice, as .npz and as .npy; remove one")
        return found[0] if found else None

    def _file(self, video: str) -> Path:
        found = self._find(video)
        if found is None:
            raise InputError(f"{self.path}: has no features for video {video!r}, neither .npz nor .npy")
        return found


class Joined(_Checked):
    """Concatenates several sources along the width; a video gets the length of its shortest features.

    Refuses features of lengths so different that rows side by side would be of different times.
    """

    def __init__(self, parts: Sequence[FeatureSource]) -> None:
        self.path = " + ".join(str(part.path) for part in parts)
        self.parts = parts
        self._most_longer = 1.0 if all(read_record(part.path) is not None for part in parts) else MOST_LONGER
        self._stack = ExitStack()

    def __enter__(self) -> Joined:
        for part in self.parts:
            self._stack.enter_context(part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, video: str) -> bool:
        return all(video in part for part in self.parts)

    def shape(self, video: str) -> tuple[int, int]:
        lengths, widths = zip(*(part.shape(video) for part in self.parts), strict=True)
        return self._length(video, lengths), sum(widths)

    def check(self, videos: Iterable[str], frame_dim: int | None) -> None:
        videos = list(videos)
        for part in self.parts:  # their messages name the source
            part.check(videos, None)
        super().check(videos, frame_dim)

    def frames(self, video: str, frame_dim: int | None) -> np.ndarray:
        found = [part.frames(video, None) for part in self.parts]
        n = self._length(video, [len(frames) for frames in found])
        joined = np.concatenate([frames[:n] for frames in found], axis=1)
        self._check_width(video, joined.shape[1], frame_dim)
        return joined

    def identity(self, videos: Iterable[str]) -> Any:
        return [part.identity(videos) for part in self.parts]

    def _length(self, video: str, lengths: Sequence[int]) -> int:
        if max(lengths) > self._most_longer * min(lengths) + MORE_CLIPS:
            raise InputError(
                f"{self.path}: the features of video {video!r} are {', '.join(map(str, lengths))} clips long; features "
                f"side by side must be of the same times, so extract all at one rate"
            )
        return min(lengths)


def open_features(paths: str | Sequence[str], pattern: str | None = None, split: str = "") -> FeatureSource:
    """Opens the source at a path, or the joined sources at several paths.

    Args:
        paths: HDF5 files and folders; ``{split}`` is replaced by the split's name.
        pattern: path of a video's dataset in an HDF5 file, such as ``clips/{video}/rgb``; by default ``{video}``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        InputError: the path does not exist, or holds no features; the message says what it holds.
    """
    parts = [
        _open_one(path.replace("{split}", split), pattern) for path in ([paths] if isinstance(paths, str) else paths)
    ]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_one(path: str, pattern: str | None) -> FeatureSource:
    if Path(path).is_dir():
        return FeatureFolder(path)
    if Path(path).suffix in SUFFIXES and Path(path).is_file():
        raise InputError(
            f"{path}: is {what_it_is(path)} of one video; name the folder of such files, or an HDF5 file of all videos"
        )
    return FeatureFile(path, pattern)
