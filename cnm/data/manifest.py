"""Surveys a set of features in one pass: lists faults, and writes or compares a manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cnm.data.feature_sources import FeatureSource
from cnm.data.origin import Origin
from cnm.errors import InputError
from cnm.files import read_json, replace_file, shortened

FORMAT = 1
ODD_RATE = 2.0  # reports videos whose clips per second differ from the median by this factor


@dataclass
class Survey:
    """The result of a survey of features.

    Attributes:
        videos: of each readable video ``{"shape": [n, width], "sha256": of the float32 values}``.
        missing: videos without features.
        broken: videos whose features cannot be used, with the reason.
        rates: clips per second of video.
    """

    videos: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def widths(self) -> dict[int, int]:
        """The number of videos for each width of features, most frequent first."""
        return dict(Counter(entry["shape"][1] for entry in self.videos.values()).most_common())

    @property
    def lengths(self) -> tuple[int, float, int] | None:
        """The smallest, median and largest number of clips."""
        lengths = [entry["shape"][0] for entry in self.videos.values()]
        return (min(lengths), float(np.median(lengths)), max(lengths)) if lengths else None

    @property
    def median_rate(self) -> float | None:
        return float(np.median(list(self.rates.values()))) if self.rates else None

    @property
    def odd_rates(self) -> dict[str, float]:
        """Videos with unusual clips per second: truncated features, features of another video, or a wrong duration."""
        median = self.median_rate
        if median is None:
            return {}
        return {v: rate for v, rate in self.rates.items() if not median / ODD_RATE <= rate <= median * ODD_RATE}

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of videos with identical features."""
        groups: dict[str, list[str]] = {}
        for video, entry in self.videos.items():
            groups.setdefault(entry["sha256"], []).append(video)
        return [group for group in groups.values() if len(group) > 1]


def survey(source: FeatureSource, durations: Mapping[str, float], *, progress: bool = False) -> Survey:
    """Reads the features of every video once.

    Args:
        durations: the required videos, with their seconds.
    """
    found = Survey()
    for video in tqdm(durations, desc="checking features", unit="video", disable=None if progress else True):
        try:
            if video not in source:
                found.missing.append(video)
                continue
            frames = source.frames(video, None)
        except InputError as error:
            found.broken[video] = str(error)
            continue
        found.videos[video] = described(frames)
        found.rates[video] = len(frames) / durations[video]
    return found


def write_manifest(path: str | Path, found: Survey, features: list[str], origin: str | None, split: str) -> None:
    """Writes a survey to a manifest, with the features' paths and origin (the user's text, and the record).

    Args:
        split: replaces ``{split}`` in ``features``.

    Raises:
        InputError: the file cannot be written.
    """
    extracted = Origin.of(features, split)
    content = {
        "format": FORMAT,
        "features": features,
        "origin": origin,
        "extracted": None if extracted is None else extracted.to_dict(),
        "videos": found.videos,
    }
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def described(frames: np.ndarray) -> dict[str, Any]:
    """Returns a manifest's entry for one video's features [n, width] float32."""
    return {"shape": list(frames.shape), "sha256": hashlib.sha256(frames.astype("<f4").tobytes()).hexdigest()}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        InputError: the file is missing, or is not a manifest.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("videos"), dict):
        raise InputError(f"{path}: is not a manifest of format {FORMAT}; write it with `cnm features check --manifest`")
    for video, entry in content["videos"].items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: video {shortened(video)} is {shortened(entry)}, not its shape and sha256")
    return content


def difference(video: str, expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Describes how a video differs from its manifest entry; None if it does not."""
    if expected.get("shape") != found["shape"]:
        return f"video {video!r} has shape {found['shape']}, the manifest says {shortened(expected.get('shape'))}"
    if expected.get("sha256") != found["sha256"]:
        return f"video {video!r} has other values than the manifest says"
    return None


def differences(path: str | Path, found: Survey) -> tuple[list[str], int]:
    """Describes each difference from a manifest in a line, and counts the videos of the survey that it holds.

    Raises:
        InputError: the manifest is missing, or the file is not one.
    """
    videos = read_manifest(path)["videos"]
    common = found.videos.keys() & videos.keys()
    lines = [difference(video, videos[video], entry) for video, entry in found.videos.items() if video in common]
    return [line for line in lines if line is not None], len(common)
