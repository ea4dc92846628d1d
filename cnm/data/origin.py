"""The origin of features, as ``cnm extract`` records it: a model refuses features of another origin."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cnm.errors import InputError
from cnm.files import read_json

HDF5_SUFFIXES = (".hdf5", ".h5", ".hdf")
JOINT = " + "  # joins the encoders of concatenated features


def record_path(output: str | Path) -> Path:
    """Returns the path of the record of a feature file or folder."""
    output = Path(os.path.abspath(output))  # "." and ".." have names too
    return output.parent / f"{output.name}.json"


def read_record(output: str | Path) -> dict[str, Any] | None:
    """Reads the record that ``cnm extract`` wrote beside a feature file or folder; None if there is none.

    Raises:
        InputError: the record is not JSON.
    """
    path = record_path(output)
    if not path.is_file():
        return None
    content = read_json(path)
    return content if is_record(content) else None


def is_record(content: Any) -> TypeGuard[dict[str, Any]]:
    """Whether JSON is what ``cnm extract`` wrote; a manifest of features has videos too, but no encoder."""
    return isinstance(content, dict) and isinstance(content.get("videos"), dict) and "encoder" in content


@dataclass(frozen=True)
class Origin:
    """How features were made.

    Attributes:
        encoder: its name for ``cnm extract``; for concatenated features, all names in order.
        weights_sha256: hashes of the encoder's parameters, joined in the same way.
        stride, rate: frames between features, or features per second; the other is None. Both are None if
            concatenated features differ in them.
    """

    encoder: str
    weights_sha256: str
    stride: int | None
    rate: float | None

    @classmethod
    def from_record(cls, record: Any) -> Origin | None:
        """Reads the origin from a record or from a checkpoint; None if it has none."""
        record = record if isinstance(record, dict) else {}
        encoder, weights = record.get("encoder"), record.get("weights_sha256")
        if not isinstance(encoder, str) or not isinstance(weights, str):
            return None
        stride, rate = record.get("stride"), record.get("rate")
        return cls(
            encoder,
            weights,
            stride if type(stride) is int and stride > 0 else None,
            float(rate) if type(rate) in (int, float) and 0 < rate < float("inf") else None,
        )

    @classmethod
    def of(cls, paths: str | Path | Sequence[str | Path] | None, split: str = "") -> Origin | None:
        """Returns the origin of one or several (concatenated) feature files or folders; None if one has no record.

        Args:
            split: replaces ``{split}`` in a path.
        """
        if paths is None:
            return None
        parts = [
            cls.from_record(read_record(str(path).replace("{split}", split)))
            for path in ([paths] if isinstance(paths, (str, Path)) else paths)
        ]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not known:
            return None
        first = known[0]
        return cls(
            JOINT.join(part.encoder for part in known),
            JOINT.join(part.weights_sha256 for part in known),
            first.stride if all(part.stride == first.stride for part in known) else None,
            first.rate if all(part.rate == first.rate for part in known) else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, other: Origin | None, name: str) -> None:
        """Raises ``InputError`` if features called ``name`` are known to come from another encoder."""
        if other is None or (other.encoder, other.weights_sha256) == (self.encoder, self.weights_sha256):
            return
        raise InputError(
            f"{name}: features of {other}, but the model was trained on those of {self}; extract them with --encoder "
            f"{self.encoder}"
        )

    def __str__(self) -> str:
        pairs = zip(self.encoder.split(JOINT), self.weights_sha256.split(JOINT), strict=False)
        return JOINT.join(f"{encoder} (weights {weights[:8]})" for encoder, weights in pairs)


def hdf5_and_video(source: str) -> tuple[Path, str] | None:
    """Splits ``F.hdf5:VIDEO``; None for other texts. A video's name may hold colons."""
    found = re.fullmatch(rf"(.+?(?:{'|'.join(map(re.escape, HDF5_SUFFIXES))})):(.*)", source, re.DOTALL)
    return (Path(found[1]), found[2]) if found else None


def split_source(source: str) -> tuple[Path, str] | None:
    """Splits ``F.hdf5:VIDEO`` or ``FOLDER/VIDEO.npy`` into the file or folder and the video; None for other texts."""
    in_file = hdf5_and_video(source)
    if in_file:
        return in_file
    if Path(source).suffix in (".npy", ".npz", *HDF5_SUFFIXES):
        return Path(source).parent, Path(source).stem
    return None


def recorded_duration(source: str) -> float | None:
    """Returns the duration in seconds of the features' video, if it is recorded."""
    split = split_source(source)
    record = None if split is None else read_record(split[0])
    if split is None or record is None:
        return None
    entry = record["videos"].get(split[1])
    duration = entry.get("duration") if isinstance(entry, dict) else None
    if not isinstance(duration, (int, float)) or isinstance(duration, bool) or duration <= 0:
        return None
    return float(duration)
