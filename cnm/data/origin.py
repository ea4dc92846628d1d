"""Where features came from: what ``cnm extract`` records beside them, so that a model is not fed others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnm.config import read_json
from cnm.errors import InputError

HDF5_SUFFIXES = (".hdf5", ".h5", ".hdf")


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
        encoder: its name for ``cnm extract``.
        weights_sha256: of the encoder's parameters.
        stride, rate: frames between features, or features a second; the other is None.
    """

    encoder: str
    weights_sha256: str
    stride: int | None
    rate: float | None

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> Origin | None:
        """Of a record, or of what a checkpoint keeps of it; None where it does not say."""
        record = record or {}
        encoder, weights = record.get("encoder"), record.get("weights_sha256")
        if not isinstance(encoder, str) or not isinstance(weights, str):
            return None
        stride, rate = record.get("stride"), record.get("rate")
        return cls(
            encoder,
            weights,
            stride if isinstance(stride, int) and stride > 0 else None,
            float(rate) if isinstance(rate, (int, float)) and rate > 0 else None,
        )

    @classmethod
    def of(cls, output: Any) -> Origin | None:
        """Of a feature file or folder; None where nothing is recorded, or where there are several."""
        return cls.from_record(read_record(output)) if isinstance(output, (str, Path)) else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, other: Origin | None, name: str) -> None:
        """Raises ``InputError`` where features called ``name`` are known to be of another encoder than these."""
        if other is None or (other.encoder, other.weights_sha256) == (self.encoder, self.weights_sha256):
            return
        raise InputError(
            f"{name}: features of {other.encoder} (weights {other.weights_sha256[:8]}), but the model was trained on "
            f"those of {self.encoder} (weights {self.weights_sha256[:8]}); extract them with --encoder {self.encoder}"
        )


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
    return float(duration) if isinstance(duration, (int, float)) and duration > 0 else None
