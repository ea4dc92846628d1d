"""One process at a time writes to a run or an output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cnm.errors import InputError
from cnm.files import cannot_write


@contextmanager
def only_writer(output: Path, lock: Path, busy: str) -> Iterator[None]:
    """Holds the file ``lock`` during the block; makes its folder.

    Args:
        busy: what a message says where another process holds it.

    Raises:
        InputError: another process holds it, or the folder or file cannot be made.
    """
    held = FileLock(lock, timeout=0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:  # an OSError too
        raise InputError(f"{output}: {busy}") from None
    except OSError as error:
        raise cannot_write(output, error) from None
    try:
        yield
    finally:
        held.release()
