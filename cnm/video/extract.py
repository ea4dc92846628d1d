"""Extracts features of videos to files; an interrupted extraction can be continued."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from cnm.config import read_json
from cnm.data.names import name_problem
from cnm.data.origin import HDF5_SUFFIXES, Origin, is_record, record_path
from cnm.errors import InputError
from cnm.files import cannot_write, replace_file, temporary_beside
from cnm.locking import only_writer
from cnm.video.decode import VideoFile, require_av
from cnm.video.encoders import Encoder

STRIDE = 8  # default: frames between features
BATCH = 32  # pictures encoded at once, and the most that are in memory


@dataclass(frozen=True)
class Sampling:
    """Selects the pictures that become features: every ``stride``-th frame, or ``rate`` per second.

    Raises:
        InputError: both or neither are given, or the value is not positive.
    """

    stride: int | None = None
    rate: float | None = None

    @classmethod
    def default(cls, stride: int | None = None, rate: float | None = None) -> Sampling:
        """Returns the requested sampling; by default that of CNM's CLIP features."""
        return cls(STRIDE if stride is None and rate is None else stride, rate)

    @classmethod
    def of(cls, origin: Origin) -> Sampling:
        """Returns the sampling of features of this origin."""
        return cls.default(origin.stride, origin.rate)

    def __post_init__(self) -> None:
        if (self.stride is None) == (self.rate is None):
            raise InputError("give either --stride or --rate, not both")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"--stride: must be at least 1, got {self.stride}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise InputError(f"--rate: must be more than 0 pictures a second, got {self.rate:g}")


@dataclass(frozen=True)
class VideoFeatures:
    """One video's features [clips, width] float32, and the part of the file that was read."""

    features: np.ndarray
    duration: float  # seconds
    frames: int  # number of decoded frames
    fps: float  # declared average frames per second


@dataclass(frozen=True)
class Extracted:
    """The result of ``extract``: names of videos, and the reasons why others could not be read."""

    done: list[str]
    already: list[str]
    broken: dict[str, str]


def video_features(path: str | Path, encoder: Encoder, sampling: Sampling, batch: int = BATCH) -> VideoFeatures:
    """Decodes and encodes one video, with at most ``batch`` pictures in memory.

    Raises:
        InputError: the video cannot be read to its end, see ``VideoFile``.
    """
    parts = []
    with VideoFile(path) as video:
        images = video.images(encoder.size, stride=sampling.stride, rate=sampling.rate)
        while taken := list(islice(images, batch)):
            parts.append(encoder(taken))
        return VideoFeatures(np.concatenate(parts), video.duration, video.frames, float(video.rate))


def extract(
    videos: Sequence[str | Path],
    output: str | Path,
    encoder: Encoder,
    sampling: Sampling,
    *,
    batch: int = BATCH,
    progress: bool = False,
) -> Extracted:
    """Writes the features of videos, under the videos' names, to an HDF5 file or a folder with a .npy per video.

    Skips videos that are in the output already, whichever version of this package read them (see CHANGELOG.md for what
    versions read differently), and lists those that cannot be read. Writes the record
    ``<output>.json``: encoder, checksum of its weights, stride or rate, and each video's duration, frames and clips.

    Raises:
        InputError: two videos have the same name, one of them in the output perhaps; a name cannot be stored; or the
            output cannot be written, was extracted with other settings, or another process writes to it.
    """
    require_av()
    names = _names(videos)
    done, already, broken = [], [], {}
    output = Path(output)
    if output.name in ("", ".."):
        raise InputError(f"--output {output}: has no name, and its record is named after it; write the folder's name")
    busy = "another process extracts to it; wait for it, or choose another --output"
    with only_writer(output, output.parent / f".{output.name}.lock", busy):
        store = _Store(output, encoder, sampling)
        for name, path in names.items():
            store.check_same(name, path)
        for name, path in tqdm(names.items(), desc="extracting", unit="video", disable=None if progress else True):
            if store.has(name):
                already.append(name)
                continue
            try:
                found = video_features(path, encoder, sampling, batch)
            except InputError as error:
                broken[name] = str(error)
                store.note_broken(name, str(error))
                continue
            store.add(name, path, found)
            done.append(name)
        store.finish()
    return Extracted(done, already, broken)


def _names(videos: Sequence[str | Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in map(Path, videos):
        problem = name_problem(path.stem)
        if problem:
            raise InputError(f"{path}: features are stored by name, but {problem}; rename the file")
        if path.stem in names:
            raise InputError(
                f"{path}: has the same name as {names[path.stem]}, and features are stored by name; rename one of them"
            )
        names[path.stem] = path
    return names


class _Store:
    """The growing output. Features for an HDF5 file first go to a folder beside it, so that a kill is harmless."""

    def __init__(self, output: Path, encoder: Encoder, sampling: Sampling) -> None:
        self.output = output
        self.is_hdf5 = output.suffix in HDF5_SUFFIXES
        self.folder = output.with_name(f"{output.name}.parts") if self.is_hdf5 else output
        self.path = record_path(output)
        made_by: dict[str, Any] = {
            "encoder": encoder.name,
            "weights_sha256": encoder.weights_sha256,
            "stride": sampling.stride,
            "rate": sampling.rate,
            "width": encoder.width,
        }
        self.record = self._resumed(made_by) if self.path.exists() else {**made_by, "videos": {}, "broken": {}}
        if not self.path.exists() and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
            raise InputError(f"{output}: exists, but not {self.path}, its record; choose another --output")
        if not self.path.exists() and self.is_hdf5 and any(self.folder.glob("*")):
            raise InputError(
                f"{self.folder}: holds what another extraction left, whose record {self.path} is gone; remove this "
                f"folder or choose another --output"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(output, error) from None
        self._write_record()

    def has(self, name: str) -> bool:
        return name in self.record["videos"]

    def check_same(self, name: str, path: Path) -> None:
        """Raises ``InputError`` for a file that is not the one whose features are there under its name."""
        entry = self.record["videos"].get(name)
        known = entry.get("bytes") if isinstance(entry, dict) else None
        found = path.stat().st_size if path.is_file() else None
        if known is not None and found is not None and known != found:
            raise InputError(
                f"{path}: {self.output} holds features of another {name!r}, of a file of {known} bytes, not {found}; "
                f"features are stored by name, so rename this one or choose another --output"
            )

    def add(self, name: str, path: Path, found: VideoFeatures) -> None:
        buffer = io.BytesIO()
        np.save(buffer, found.features)
        replace_file(self.folder / f"{name}.npy", buffer.getbuffer())
        self.record["videos"][name] = {
            "duration": found.duration,
            "frames": found.frames,
            "clips": len(found.features),
            "fps": found.fps,
            "bytes": path.stat().st_size,
        }
        self.record["broken"].pop(name, None)
        self._write_record()

    def note_broken(self, name: str, reason: str) -> None:
        self.record["broken"][name] = reason
        self._write_record()

    def finish(self) -> None:
        """Moves the kept features into the HDF5 file, atomically."""
        if not self.is_hdf5:
            return
        parts = sorted(self.folder.glob("*.npy"))
        if parts:
            temporary = temporary_beside(self.output)
            try:
                if self.output.exists():
                    shutil.copyfile(self.output, temporary)
                with h5py.File(temporary, "a") as file:
                    for part in parts:
                        if part.stem in file:  # killed after the file was written and before its parts were removed
                            del file[part.stem]
                        file[part.stem] = np.load(part, allow_pickle=False)
                with open(temporary, "rb+") as written:  # on the disk before the parts are removed
                    os.fsync(written.fileno())
                os.replace(temporary, self.output)
            except OSError as error:
                raise cannot_write(self.output, error) from None
            finally:
                temporary.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _resumed(self, made_by: dict[str, Any]) -> dict[str, Any]:
        record = read_json(self.path)
        if not is_record(record):
            raise InputError(f"{self.path}: is not a record of an extraction; choose another --output")
        there = set(self._there())
        for key, value in made_by.items():
            if there and record.get(key) != value:
                raise InputError(
                    f"{self.output}: was extracted with {key} {record.get(key)}, not {value}; choose another --output"
                )
        record["videos"] = {name: entry for name, entry in record["videos"].items() if name in there}
        return {**record, **made_by, "broken": {}}

    def _there(self) -> Iterator[str]:
        """Returns the names of the videos whose features are on disk."""
        yield from (path.stem for path in self.folder.glob("*.npy"))
        if self.is_hdf5 and self.output.exists():
            try:
                with h5py.File(self.output, "r") as file:
                    yield from file
            except OSError as error:
                raise InputError(
                    f"{self.output}: is not a readable HDF5 file ({error}); remove it to start anew"
                ) from None

    def _write_record(self) -> None:
        replace_file(self.path, json.dumps(self.record, indent=1).encode() + b"\n")
