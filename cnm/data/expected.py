"""Compares features with their records (of ``cnm extract``) and with a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnm.config import DatasetConfig
from cnm.data.feature_sources import FeatureSource, Joined
from cnm.data.manifest import described, difference, read_manifest
from cnm.data.origin import Origin, read_record
from cnm.errors import InputError


def origin_of(config: DatasetConfig, split: str) -> Origin | None:
    """Returns the origin of a split's features: from the record beside them, or else from ``config.feature_manifest``.

    Raises:
        InputError: record and manifest name different encoders, or one of them cannot be read.
    """
    recorded = Origin.of(config.feature_path, split)
    return recorded if config.feature_manifest is None else agreed(config.feature_manifest, recorded)


def agreed(manifest: str | Path, recorded: Origin | None) -> Origin | None:
    """Returns the origin in the record, or else in the manifest. Raises ``InputError`` if they differ."""
    stated = Origin.from_record(read_manifest(manifest).get("extracted"))
    if stated is not None and recorded is not None and str(stated) != str(recorded):
        raise InputError(
            f"{manifest}: was written of features of {stated}, but these are of {recorded}; take those it belongs to, "
            f"or write it anew"
        )
    return recorded or stated


class Expected:
    """The shapes that a split's features should have, and their checksums if there is a manifest.

    Raises:
        InputError: the manifest or a record cannot be read.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.path = config.feature_manifest
        self.videos: dict[str, Any] = {} if self.path is None else read_manifest(self.path)["videos"]

    def notes(self, videos: Sequence[str], split: str) -> list[str]:
        """Says where the manifest does not hold all videos of a split."""
        held = sum(video in self.videos for video in videos)
        if self.path is None or held == len(videos):
            return []
        return [f"{self.path}: holds {held:,} of the {split} split's {len(videos):,} videos; others are not compared"]

    def check_shapes(self, source: FeatureSource, videos: Iterable[str]) -> None:
        """Compares shapes with the records beside the features; reads no values.

        Raises:
            InputError: a video has another shape than was extracted.
        """
        videos = list(videos)
        for part in source.parts if isinstance(source, Joined) else [source]:
            record = read_record(part.path) or {"videos": {}}
            for video in videos:
                entry = record["videos"].get(video)
                if not isinstance(entry, dict):
                    continue
                shape = part.shape(video)
                extracted = (entry.get("clips", shape[0]), record.get("width", shape[1]))
                if shape != extracted:
                    raise InputError(
                        f"{part.path}: video {video!r} has shape {list(shape)}, but {list(extracted)} was extracted; "
                        f"extract it again"
                    )

    def check(self, video: str, frames: np.ndarray, source: str | Path) -> None:
        """Compares a video's values with the manifest's.

        Raises:
            InputError: they differ.
        """
        if video in self.videos:
            problem = difference(video, self.videos[video], described(frames))
            if problem is not None:
                raise InputError(f"{source}: {problem} ({self.path}); take the features it was written of")
