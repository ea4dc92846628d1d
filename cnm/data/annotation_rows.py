"""The layouts of annotation files: each is read into rows, whose values are not checked yet.

What is read: published JSON rows; JSON lines as QVHighlights and Moment-DETR have them; JSON by video, which are
ActivityNet Captions' own files, and TACoS as 2D-TAN has it; and the text of Charades-STA, with the lengths in Charades'
own tables.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cnm.errors import InputError
from cnm.files import NoJson, is_number, parse_json, read_text, shortened

_CHARADES_STA = re.compile(r"(?P<video>\S.*?) (?P<start>\S+) (?P<end>[^\s#]+) ?##(?P<sentence>.*)")
_OF_A_LINE = re.compile(r'"(?:query|vid)"\s*:(?!\s*\{)')  # a video may be called so too
_TABLES = "Charades*.csv"  # Charades_v1_train.csv, Charades_v1_test.csv


class Row(NamedTuple):
    """A sentence as a file has it; ``windows`` [[start, end], ...] seconds, None where the file gives no moment."""

    video: Any
    duration: Any
    windows: list[Any] | None
    sentence: Any
    qid: int | str | None
    where: str  # its place, for messages


def rows_of(text: str, path: Path) -> Iterator[Row]:
    """The rows of an annotation file; its content decides on the layout.

    Raises:
        InputError: the layout is none of those, or a row is not as its layout says; the message names the place.
    """
    source = str(path)
    if _are_json_lines(text):
        return _json_lines(text, source)
    first = text.lstrip().split("\n", 1)[0].rstrip()
    if not first.startswith(("[", "{")) and _CHARADES_STA.fullmatch(first):
        return _charades_sta(text, path)
    try:
        content = parse_json(text, source)
    except NoJson as error:
        raise InputError(
            f"{error}; annotations are a JSON list of rows [video, seconds, [start, end], sentence], or a JSON object "
            f"a line with qid, query, vid, duration and relevant_windows, or the files of ActivityNet Captions, TACoS "
            f"(2D-TAN's) or Charades-STA as they are"
        ) from None
    if not isinstance(content, (list, dict)):
        raise InputError(
            f"{source}: holds a {type(content).__name__}, not a list of rows [video, seconds, [start, end], text]"
        )
    return _published(content, source) if isinstance(content, list) else _by_video(content, source)


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


def qid_problem(qid: Any, where: str) -> None:
    """Raises ``InputError`` where a qid is neither a whole number nor a text."""
    if isinstance(qid, bool) or not isinstance(qid, (int, str)):
        raise InputError(f"{where}: qid is {shortened(qid)}, neither a whole number nor a text; correct it")


def _are_json_lines(text: str) -> bool:
    """Whether the first line is a complete object with a sentence or video, not the start of a JSON document."""
    first = text.lstrip().split("\n", 1)[0]
    return first.startswith("{") and _OF_A_LINE.search(first) is not None


def _json_lines(text: str, source: str) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for row, where in objects(text, source):
        missing = [name for name in ("qid", "query", "vid", "duration") if name not in row]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}; take another file or correct it")
        qid, windows = row["qid"], row.get("relevant_windows")
        qid_problem(qid, where)
        if str(qid) in seen:
            raise InputError(f"{where}: qid {shortened(qid)} is that of {seen[str(qid)]} too; correct one of them")
        seen[str(qid)] = where.removeprefix(f"{source}: ")
        if windows is not None and (not isinstance(windows, list) or not windows):
            raise InputError(
                f"{where}: relevant_windows is {shortened(windows)}, not [[start, end], ...]; correct it, or leave it "
                f"out where no moment is known"
            )
        yield Row(row["vid"], row["duration"], windows, row["query"], qid, where)


def _published(rows: list[Any], source: str) -> Iterator[Row]:
    for index, row in enumerate(rows):
        where = f"{source}: row {index}"
        if not isinstance(row, list) or len(row) != 4:
            raise InputError(f"{where} is {shortened(row)}, not [video, seconds, [start, end], sentence]; correct it")
        video, duration, moment, sentence = row
        yield Row(video, duration, None if moment is None else [moment], sentence, None, where)


def _by_video(videos: dict[str, Any], source: str) -> Iterator[Row]:
    """{video: {"duration", "timestamps", "sentences"}}; or "fps" and "num_frames", and timestamps that are frames."""
    for video, of_it in videos.items():
        where = f"{source}: {shortened(video)}"
        entry = of_it if isinstance(of_it, dict) else {}
        sentences = entry.get("sentences")
        times = entry.get("timestamps", [None] * len(sentences) if isinstance(sentences, list) else None)
        if not isinstance(sentences, list) or not isinstance(times, list):
            raise InputError(
                f"{where} holds {shortened(of_it)}, not duration, timestamps and sentences (or fps, num_frames, "
                f"timestamps and sentences); correct it"
            )
        if len(times) != len(sentences):
            raise InputError(f"{where} has {len(times)} timestamps for {len(sentences)} sentences; correct it")
        duration, rate = entry.get("duration"), None
        if duration is None:
            rate, frames = entry.get("fps"), entry.get("num_frames")
            if not is_number(rate) or not is_number(frames) or rate <= 0:
                raise InputError(
                    f"{where} has no duration, and fps {shortened(rate)} and num_frames {shortened(frames)} give none; "
                    f"correct it"
                )
            duration = frames / rate
        for index, (window, sentence) in enumerate(zip(times, sentences, strict=True)):
            windows = None if window is None else [window if rate is None else _seconds(window, rate)]
            yield Row(video, duration, windows, sentence, None, f"{where}: sentence {index}")


def _seconds(window: Any, rate: float) -> Any:
    """A window of frames in seconds; as it is where it is no window, which is then refused."""
    is_window = isinstance(window, list) and all(map(is_number, window))
    return [frame / rate for frame in window] if is_window else window


def _charades_sta(text: str, path: Path) -> Iterator[Row]:
    """``VIDEO START END##SENTENCE`` lines, with the lengths of the videos in Charades' tables beside the file."""
    durations = _lengths(path.parent)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        found = _CHARADES_STA.fullmatch(line.strip())
        if found is None:
            raise InputError(f"{where} is {shortened(line)}, not VIDEO START END##SENTENCE; correct it")
        video = found["video"]
        if video not in durations:
            raise InputError(
                f"{where}: no {_TABLES} in {path.parent} gives the length of {shortened(video)}; put Charades' "
                f"Charades_v1_train.csv and Charades_v1_test.csv there"
            )
        window = [_number(found["start"]), _number(found["end"])]
        yield Row(video, durations[video], [window], found["sentence"], None, where)


def _lengths(folder: Path) -> dict[str, Any]:
    """Seconds of each video in Charades' tables, whose columns are named ``id`` and ``length`` among others."""
    lengths: dict[str, Any] = {}
    for path in sorted(folder.glob(_TABLES)):
        try:
            for line in csv.DictReader(io.StringIO(read_text(path))):
                if line.get("id") and line.get("length"):
                    lengths[line["id"]] = _number(line["length"])
        except csv.Error as error:
            raise InputError(f"{path}: is not a table of comma-separated values ({error}); fetch it again") from None
    return lengths


def _number(text: str) -> float | str:
    """The number, or the text, which is then refused."""
    try:
        return float(text)
    except ValueError:
        return text
