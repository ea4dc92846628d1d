"""Files: JSON is read in one place, and nothing half-written is ever found under a final name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from cnm.errors import InputError

MAX_NESTED = 32  # levels of lists and objects; our own files have five
_LARGEST = int(sys.float_info.max)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class NoJson(InputError):
    """Text that is not JSON at all, as against JSON that holds what cannot be used."""


def read_json(path: str | Path) -> Any:
    """Parses a JSON file.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds what ``check_plain`` refuses; the message names the
            file and the place.
    """
    return parse_json(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """The content of a text file.

    Raises:
        InputError: the file cannot be read, or is not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, so not JSON; check the path") from None
    except ValueError as error:  # a path with a NUL
        raise InputError(f"{path}: cannot be read ({error}); check the path") from None


def parse_json(text: str, source: str) -> Any:
    """Parses JSON text; ``source`` is what messages call it.

    Raises:
        NoJson: the text is not JSON.
        InputError: it holds what ``check_plain`` refuses.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=partial(_object, source))
    except json.JSONDecodeError as error:
        raise NoJson(f"{source}: line {error.lineno} column {error.colno} is not JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{source}: is nested more than {MAX_NESTED} deep; correct it") from None
    check_plain(value, source)
    return value


def _object(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two equal names without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source}: {shortened(twice)} is there twice in one object; correct it")
    return found


def _integer(digits: str) -> int | float:
    """Python refuses to parse thousands of digits; what is beyond a float becomes infinity and is refused."""
    return int(digits) if len(digits) <= 310 else math.copysign(math.inf, -1 if digits.startswith("-") else 1)


def check_plain(value: Any, source: str, most: int = sys.maxsize) -> None:
    """Checks that a value is made of what JSON can say and every later step can compute with, draw and store.

    Args:
        most: how many values it may hold.

    Raises:
        InputError: it holds NaN, infinity, an integer beyond a float's range, text with a lone surrogate, another type,
            more than ``most`` values, or is nested too deep; the message begins with ``source`` and names the place.
    """
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    count = 0
    while pending:
        place, item = pending.pop()
        count += 1
        problem = None
        if isinstance(item, str):
            if _SURROGATE.search(item):
                problem = f"{shortened(item)} holds half a character (a lone surrogate)"
        elif isinstance(item, dict):
            odd = next((key for key in item if not isinstance(key, str) or _SURROGATE.search(key)), None)
            if odd is not None:
                problem = f"{shortened(odd)} is not a name"
            pending += [((*place, key), inner) for key, inner in reversed(item.items())]
        elif isinstance(item, (list, tuple)):
            pending += [((*place, index), item[index]) for index in reversed(range(len(item)))]
        elif isinstance(item, float):
            if not math.isfinite(item):
                problem = f"{item} is not a number to compute with"
        elif isinstance(item, int):
            if abs(item) > _LARGEST:
                problem = "the number is too large"
        elif item is not None:
            problem = f"a {type(item).__name__} is not a plain value"
        if problem is None and (len(place) > MAX_NESTED or count + len(pending) > most):
            place = place[:1]
            problem = f"is nested more than {MAX_NESTED} deep" if count <= most else f"holds more than {most} values"
        if problem is not None:
            raise InputError(f"{source}: {_where(place)}{problem}; correct it")


def _where(place: tuple[str | int, ...]) -> str:
    if not place:
        return ""
    first, *rest = place
    words = f"row {first}" if isinstance(first, int) else first
    return words + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest) + ": "


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shortened(value: Any) -> str:
    """A value as a message quotes it."""
    try:
        text = repr(value)
    except Exception:  # digits by the thousand, or nested without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def printable(stream: TextIO) -> None:
    """Makes a stream print what its encoding lacks as escapes, instead of failing in the middle of an output."""
    if hasattr(stream, "reconfigure"):  # not where a test or a notebook put something else in its place
        stream.reconfigure(errors="backslashreplace")


def replace_file(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a temporary file beside it takes its place once it is on disk.

    Raises:
        InputError: the disk is full or the folder cannot be written; the file is as it was before.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from None


def temporary_beside(path: Path) -> Path:
    """Where a file is written until it is whole. The name is short: the file's own may be as long as a name can be."""
    short = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".{short}.{os.getpid()}.tmp")


def append_line(path: str | Path, line: str) -> None:
    """Appends one line to a text file; if that fails, the file is as it was before.

    Raises:
        InputError: the disk is full or the file cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            content = f"{line}\n".encode()
            if file.write(content) != len(content):
                file.truncate(size)
                raise OSError(None, "only a part of the line fitted on the disk")
    except OSError as error:
        raise cannot_write(path, error) from None


def prepare_output(path: str | Path) -> None:
    """Makes the folder of a file that is written after long work.

    Raises:
        InputError: it cannot be made or written to.
    """
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written, {folder} is not yours to write in; choose another folder")


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The one line a user reads when ``path`` could not be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); free disk space or choose another folder"
    )
