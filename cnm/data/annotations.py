"""Reads annotation files: published JSON rows [video, seconds, [start, end], sentence], or moment-DETR's JSON lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnm.data.names import name_problem
from cnm.errors import InputError
from cnm.files import NoJson, parse_json, read_text, shortened

LONGEST_SECONDS = 1e9  # the longest video, 30 years; plots cannot show more


@dataclass(frozen=True)
class Sample:
    """One sentence and the moments that it describes. Each moment is a right answer. Times are seconds of the video.

    Attributes:
        moment: the first moment.
        others: the other moments; only JSON lines have them.
        qid: the sentence's number or name in JSON lines.
    """

    video: str
    duration: float
    moment: tuple[float, float]
    sentence: str
    others: tuple[tuple[float, float], ...] = ()
    qid: int | str | None = None

    @property
    def windows(self) -> tuple[tuple[float, float], ...]:
        """All moments; there is at least one."""
        return (self.moment, *self.others)


def read_annotations(path: str | Path) -> tuple[list[Sample], list[str]]:
    """Returns the sentences of an annotation file, and notes on corrections (moments clipped to their video).

    The file's content decides whether it is read as published rows or as JSON lines
    ``{"qid", "query", "vid", "duration", "relevant_windows": [[start, end], ...]}``, other keys are ignored.

    Raises:
        InputError: the file is unreadable or a row is malformed; the message names the file and the row or line.
    """
    text = read_text(path)
    rows = json_lines(text, str(path)) if are_json_lines(text) else _published_rows(text, path)
    samples, clipped = [], 0
    for read, row, where in rows:
        sample, of_it = read(row, where)
        samples.append(sample)
        clipped += of_it
    notes = [f"{path}: {clipped} moments end after their video; clipped to its end"] if clipped else []
    return samples, notes


Row = tuple[Callable[[Any, str], tuple[Sample, int]], Any, str]


def are_json_lines(text: str) -> bool:
    """Whether the first line is a complete object with a sentence or video, not the start of a JSON document."""
    first = text.lstrip().split("\n", 1)[0]
    return first.startswith("{") and ('"query"' in first or '"vid"' in first)


def objects(text: str, source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Returns each object of a JSON lines file with its place for messages ("FILE: line 3"); skips blank lines.

    Raises:
        InputError: a line is not a JSON object; a truncated file ends with such a line.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}: line {number}"
        try:
            row = parse_json(line, where)
        except NoJson:
            raise InputError(
                f"{where} is not JSON ({shortened(line.strip())}); if it is the last one, the file was cut short: "
                f"fetch it again"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is {shortened(row)}, not an object; correct it")
        yield row, where


def json_lines(text: str, source: str) -> Iterator[Row]:
    """The rows of a JSON lines file, and the function that reads one."""
    seen: dict[str, str] = {}
    for row, where in objects(text, source):
        qid = row.get("qid")
        if qid is not None and not isinstance(qid, (list, dict, float)):
            if str(qid) in seen:
                raise InputError(f"{where}: qid {shortened(qid)} is that of {seen[str(qid)]} too; correct one of them")
            seen[str(qid)] = where.removeprefix(f"{source}: ")
        yield _of_object, row, where


def _published_rows(text: str, path: str | Path) -> Iterable[Row]:
    try:
        rows = parse_json(text, str(path))
    except NoJson as error:
        raise InputError(
            f"{error}; annotations are a JSON list of rows [video, seconds, [start, end], sentence], or a JSON object "
            f"a line with qid, query, vid, duration and relevant_windows"
        ) from None
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: holds a {type(rows).__name__}, not a list of rows [video, seconds, [start, end], text]"
        )
    if not rows:
        raise InputError(f"{path}: holds no rows; check that it is the right file")
    return ((_of_row, row, f"{path}: row {index}") for index, row in enumerate(rows))


def _of_row(row: Any, where: str) -> tuple[Sample, int]:
    if not isinstance(row, list) or len(row) != 4:
        raise InputError(f"{where} is {shortened(row)}, not [video, seconds, [start, end], sentence]; correct it")
    video, duration, moment, sentence = row
    return _sample(video, duration, [moment], sentence, None, where)


def _of_object(row: dict[str, Any], where: str) -> tuple[Sample, int]:
    missing = [name for name in ("qid", "query", "vid", "duration", "relevant_windows") if name not in row]
    if missing:
        kept = "; the makers of QVHighlights keep those of its test split" if "relevant_windows" in missing else ""
        raise InputError(f"{where} lacks {', '.join(missing)}{kept}; take another file or correct it")
    qid, windows = row["qid"], row["relevant_windows"]
    qid_problem(qid, where)
    if not isinstance(windows, list) or not windows:
        raise InputError(f"{where}: relevant_windows is {shortened(windows)}, not [[start, end], ...]; correct it")
    return _sample(row["vid"], row["duration"], windows, row["query"], qid, where)


def qid_problem(qid: Any, where: str) -> None:
    """Raises ``InputError`` where a qid is neither a whole number nor a text."""
    if isinstance(qid, bool) or not isinstance(qid, (int, str)):
        raise InputError(f"{where}: qid is {shortened(qid)}, neither a whole number nor a text; correct it")


def _sample(
    video: Any, duration: Any, windows: list[Any], sentence: Any, qid: int | str | None, where: str
) -> tuple[Sample, int]:
    """Checks a row; returns its sample and the number of moments that were clipped."""
    problem = name_problem(video)
    if problem:
        raise InputError(f"{where}: video is {shortened(video)}, not a name: {problem}; correct it")
    if not is_number(duration) or not 0 < duration <= LONGEST_SECONDS:
        raise InputError(f"{where} ({video}): duration is {shortened(duration)}, not seconds above 0; correct it")
    first, *others = (_moment(window, duration, f"{where} ({video})") for window in windows)
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"{where} ({video}): the sentence is {shortened(sentence)}; remove the row or write one")
    clipped = sum(end > duration for _, end in windows)
    return Sample(video, float(duration), first, sentence, tuple(others), qid), clipped


def _moment(moment: Any, duration: float, where: str) -> tuple[float, float]:
    if not isinstance(moment, list) or len(moment) != 2 or not all(map(is_number, moment)):
        raise InputError(f"{where}: moment is {shortened(moment)}, not [start, end] in seconds; correct it")
    start, end = map(float, moment)
    if start < 0 or start >= end:
        raise InputError(f"{where}: moment {shortened(moment)} must have 0 <= start < end; correct it")
    if start >= duration:
        raise InputError(f"{where}: moment {shortened(moment)} starts after the video's {duration} seconds; correct it")
    return start, min(end, float(duration))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
