"""Where features came from: what ``cnm extract`` records beside them, so that a model is not fed others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnm.errors import InputError
from cnm.files import read_json

HDF5_SUFFIXES = (".hdf5", ".h5", ".hdf")
JOINT = " + "  # between the encoders of features that lie side by side


def record_path(output: str | Path) -> Path:
    """Where the record of a feature file or folder lies."""
    output = Path(output)
    return output.with_name(f"{output.name}.json")


def read_record(output: str | Path) -> dict[str, Any] | None:
    """The record of a feature file or folder, None where it has none of ``cnm extract``.

    Raises:
        InputError: there is one that is no JSON.
    """
    path = record_path(output)
    if not path.is_file():
        return None
    content = read_json(path)
    known = isinstance(content, dict) and isinstance(content.get("videos"), dict) and "encoder" in content
    return content if known else None


@dataclass(frozen=True)
class Origin:
    """How features were made.

    Attributes:
        encoder: its name for ``cnm extract``; of features side by side, all names in their order.
        weights_sha256: of the encoder's parameters, likewise.
        stride, rate: frames between features, or features a second; the other is None. Both are, where features side
            by side differ in them.
    """

    encoder: str
    weights_sha256: str
    stride: int | None
    rate: float | None

    @classmethod
    def from_record(cls, record: Any) -> Origin | None:
        """Of a record, or of what a checkpoint keeps of it; None where it does not say."""
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
        """Of a feature file or folder, or of several side by side; None where one of them has no record.

        Args:
            split: what ``{split}`` in a path stands for.
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
        """Raises ``InputError`` where features called ``name`` are known to be of another encoder than these."""
        if other is None or (other.encoder, other.weights_sha256) == (self.encoder, self.weights_sha256):
            return
        raise InputError(
            f"{name}: features of {other}, but the model was trained on those of {self}; extract them with --encoder "
            f"{self.encoder}"
        )

    def __str__(self) -> str:
        pairs = zip(self.encoder.split(JOINT), self.weights_sha256.split(JOINT), strict=False)
        return JOINT.join(f"{encoder} (weights {weights[:8]})" for encoder, weights in pairs)


def split_source(source: str) -> tuple[Path, str] | None:
    """A video's features ``F.hdf5:VIDEO`` or ``FOLDER/VIDEO.npy`` as file or folder and video; None: no features."""
    path, separator, video = source.rpartition(":")
    if separator and Path(path).suffix in HDF5_SUFFIXES:
        return Path(path), video
    if Path(source).suffix in (".npy", ".npz", *HDF5_SUFFIXES):
        return Path(source).parent, Path(source).stem
    return None


def recorded_duration(source: str) -> float | None:
    """Seconds of the video whose features these are, where they are recorded."""
    split = split_source(source)
    record = None if split is None else read_record(split[0])
    if split is None or record is None:
        return None
    entry = record["videos"].get(split[1])
    duration = entry.get("duration") if isinstance(entry, dict) else None
    if not isinstance(duration, (int, float)) or isinstance(duration, bool) or duration <= 0:
        return None
    return float(duration)
