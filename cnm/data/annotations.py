"""The published annotation files: JSON rows [video, seconds, [start, end], sentence]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnm.data.names import name_problem
from cnm.errors import InputError
from cnm.files import read_json, shortened

LONGEST_SECONDS = 1e9  # of a video: 30 years; more cannot be drawn


@dataclass(frozen=True)
class Sample:
    """One sentence and the moment it describes; times in seconds, within the video."""

    video: str
    duration: float
    moment: tuple[float, float]
    sentence: str


def read_annotations(path: str | Path) -> tuple[list[Sample], list[str]]:
    """The rows of an annotation file, and notes about what was corrected (moments clipped to their video).

    Raises:
        InputError: the file is unreadable or a row is malformed; the message names the file and the row.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: holds a {type(rows).__name__}, not a list of rows [video, seconds, [start, end], text]"
        )
    if not rows:
        raise InputError(f"{path}: holds no rows; check that it is the right file")
    samples, clipped = [], 0
    for index, row in enumerate(rows):
        sample, was_clipped = _sample(row, f"{path}: row {index}")
        samples.append(sample)
        clipped += was_clipped
    notes = [f"{path}: {clipped} moments end after their video; clipped to its end"] if clipped else []
    return samples, notes


def _sample(row: Any, where: str) -> tuple[Sample, bool]:
    if not isinstance(row, list) or len(row) != 4:
        raise InputError(f"{where} is {shortened(row)}, not [video, seconds, [start, end], sentence]; correct it")
    video, duration, moment, sentence = row
    problem = name_problem(video)
    if problem:
        raise InputError(f"{where}: video is {shortened(video)}, not a name: {problem}; correct it")
    if not _is_number(duration) or not 0 < duration <= LONGEST_SECONDS:
        raise InputError(f"{where} ({video}): duration is {shortened(duration)}, not seconds above 0; correct it")
    if not isinstance(moment, list) or len(moment) != 2 or not all(map(_is_number, moment)):
        raise InputError(f"{where} ({video}): moment is {shortened(moment)}, not [start, end] in seconds; correct it")
    start, end = map(float, moment)
    if start < 0 or start >= end:
        raise InputError(f"{where} ({video}): moment {shortened(moment)} must have 0 <= start < end; correct it")
    if start >= duration:
        raise InputError(
            f"{where} ({video}): moment {shortened(moment)} starts after the video's {duration} seconds; correct it"
        )
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"{where} ({video}): the sentence is {shortened(sentence)}; remove the row or write one")
    return Sample(video, float(duration), (start, min(end, float(duration))), sentence), end > duration


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
