"""Reads annotation files: sentences, and the moments that they describe where these are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnm.data.annotation_rows import Row, rows_of
from cnm.data.names import name_problem
from cnm.errors import InputError
from cnm.files import is_number, read_text, shortened

LONGEST_SECONDS = 1e9  # the longest video, 30 years; plots cannot show more
# Files of this field hold a few moments without length, 4 of the 12,408 of Charades-STA for example. More are an error.
MOST_EMPTY = 0.01


@dataclass(frozen=True)
class Sample:
    """One sentence and the moments that it describes. Each moment is a right answer. Times are seconds of the video.

    Attributes:
        moment: the first moment; None where none is known, which training does not need.
        others: the other moments; only JSON lines have them.
        qid: the sentence's number or name in JSON lines; the row's number where rows of the file were left out.
    """

    video: str
    duration: float
    moment: tuple[float, float] | None
    sentence: str
    others: tuple[tuple[float, float], ...] = ()
    qid: int | str | None = None

    @property
    def windows(self) -> tuple[tuple[float, float], ...]:
        """All moments; none where none is known."""
        return () if self.moment is None else (self.moment, *self.others)


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file.

    Attributes:
        notes: on corrections.
        left_out: qids (or numbers of rows) of the sentences that were left out, as texts.
    """

    samples: list[Sample]
    notes: list[str]
    left_out: frozenset[str]


def read_annotations(path: str | Path) -> tuple[list[Sample], list[str]]:
    """Returns the samples and notes of ``load_annotations``."""
    found = load_annotations(path)
    return found.samples, found.notes


def load_annotations(path: str | Path) -> Annotations:
    """Reads an annotation file.

    Moments that end after their video are clipped to its end. Moments without length in their video, which end before
    they start or start after it, are left out, and so are sentences that have no other; a file in which they are more
    than ``MOST_EMPTY`` of all moments is refused.

    Args:
        path: a file in one of the layouts of ``cnm.data.annotation_rows``.

    Raises:
        InputError: the file is unreadable or a row is malformed; the message names the file and the row or line.
    """
    samples: list[tuple[int, Sample]] = []
    clipped, moments = 0, 0
    empty: list[str] = []
    left_out: set[str] = set()
    for index, row in enumerate(rows_of(read_text(path), Path(path))):
        windows, problems = _windows(row)
        moments += len(windows) + len(problems)
        empty += problems
        if windows or row.windows is None:
            clipped += sum(end > row.duration for _, end in windows)
            samples.append((index, _sample(row, [(start, min(end, float(row.duration))) for start, end in windows])))
        else:
            left_out.add(str(index if row.qid is None else row.qid))
    if len(empty) > MOST_EMPTY * moments:
        raise InputError(f"{empty[0]}; correct it")
    if not samples:
        raise InputError(f"{path}: holds no rows; check that it is the right file")
    notes = [f"{path}: {clipped} moments end after their video; clipped to its end"] if clipped else []
    if empty:
        first = empty[0].removeprefix(f"{path}: ")
        notes.append(f"{path}: {len(empty)} moments left out, {len(left_out)} sentences with them ({first})")
    found = [replace(s, qid=i) if left_out and s.qid is None else s for i, s in samples]
    return Annotations(found, notes, frozenset(left_out))


def windows_known(samples: Sequence[Sample], name: str) -> bool:
    """Whether the moments of all sentences are known, as scores need them.

    Raises:
        InputError: some are known and some are not; ``name`` is what the message calls the sentences.
    """
    unknown = [sample for sample in samples if sample.moment is None]
    if unknown and len(unknown) < len(samples):
        raise InputError(
            f"{name}: {len(unknown):,} of {len(samples):,} sentences have no moment, {shortened(unknown[0].sentence)} "
            f"the first; scores need all or none"
        )
    return not unknown


def _sample(row: Row, windows: list[tuple[float, float]]) -> Sample:
    first, others = (windows[0], tuple(windows[1:])) if windows else (None, ())
    return Sample(row.video, float(row.duration), first, row.sentence, others, row.qid)


def _windows(row: Row) -> tuple[list[tuple[float, float]], list[str]]:
    """Checks a row; returns its moments, and what is wrong with those that have no length in the video."""
    video, duration, windows, sentence, _, where = row
    problem = name_problem(video)
    if problem:
        raise InputError(f"{where}: video is {shortened(video)}, not a name: {problem}; correct it")
    where = f"{where} ({video})"
    if not is_number(duration) or not 0 < duration <= LONGEST_SECONDS:
        raise InputError(f"{where}: duration is {shortened(duration)}, not seconds above 0; correct it")
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"{where}: the sentence is {shortened(sentence)}; remove the row or write one")
    moments, empty = [], []
    for window in windows or []:
        if not isinstance(window, list) or len(window) != 2 or not all(map(is_number, window)):
            raise InputError(f"{where}: moment is {shortened(window)}, not [start, end] in seconds; correct it")
        start, end = map(float, window)
        if start < 0:
            raise InputError(f"{where}: moment {shortened(window)} must have 0 <= start < end; correct it")
        if start >= end:
            empty.append(f"{where}: moment {shortened(window)} must have 0 <= start < end")
        elif start >= duration:
            empty.append(f"{where}: moment {shortened(window)} starts after the video's {duration} seconds")
        else:
            moments.append((start, end))
    return moments, empty
