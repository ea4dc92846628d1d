"""Writing files so that nothing half-written is ever found under the final name."""

from __future__ import annotations

import os
from pathlib import Path

from cnm.errors import InputError


def replace_file(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a temporary file beside it takes its place once it is on disk.

    Raises:
        InputError: the disk is full or the folder cannot be written; the file is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The one line a user reads when ``path`` could not be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); free disk space or choose another folder"
    )
