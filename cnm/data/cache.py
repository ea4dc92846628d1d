"""Caches arrays on disk, in folders named after a hash of all inputs."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cnm.errors import InputError
from cnm.files import read_json

FORMAT = 3  # increase it whenever the stored arrays, or their computation, change


SIZES = "sizes.json"  # sizes of the files beside it; written last


def default_folder() -> Path:
    """Returns the user's cache folder for this package."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnm-kernels"
    except RuntimeError:
        raise InputError(
            "there is no home folder for the cache (this user has no HOME and no passwd entry); set "
            "dataset.cache_path or the variable XDG_CACHE_HOME to a folder"
        ) from None


def identity(path: str | Path) -> dict[str, Any]:
    """Identifies a version of a file: its path, its size, and the times when its content and its status changed.

    Tools can set the first time, so archives and copies give it to other content of the same size; nobody can set the
    second. It moves without a change of content too (new permissions, hard links), which costs a needless rebuild.
    """
    try:
        resolved = Path(path).resolve(strict=True)
        status = resolved.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return {"path": str(resolved), "bytes": status.st_size, "changed": [status.st_mtime_ns, status.st_ctime_ns]}


def content_hash(path: str | Path) -> str:
    """Returns the hash of a small file's content."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def build_once(folder: Path, made_from: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Returns the folder that ``build`` fills for these inputs; builds it if it does not exist.

    Args:
        folder: the cache.
        made_from: JSON values that determine the result; other values give another folder.
        build: writes files into the empty folder that it gets. The folder gets its final name only when it is complete;
            a second process waits for the first. A folder with missing files, or files of another size than written
            (full disk, truncated copy), is built again.

    Raises:
        InputError: the cache cannot be written (for example: full disk); no partial folder remains.
    """
    description = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    target = folder / hashlib.sha256(description.encode()).hexdigest()[:32]
    if _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock file is empty, so all users who can write in the folder may lock it.
        with FileLock(f"{target}.lock", mode=0o666):
            if not _is_whole(target):
                _build(folder, target, description, build)
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); make room or set dataset.cache_path"
        ) from None
    return target


@contextmanager
def rows_file(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends a row to a ``.npy`` file of this shape; the file is never in memory as a whole.

    Reserves the disk space first and maps no memory: on a full disk, a write to a mapped page kills the process.
    """
    with open(path, "wb") as file:
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve space
                    raise

        def append(row: np.ndarray) -> None:
            file.write(row.tobytes())

        yield append
        file.flush()
        os.fsync(file.fileno())


def _build(folder: Path, target: Path, description: str, build: Callable[[Path], None]) -> None:
    for left in folder.glob(f".building-{target.name}*"):  # a killed process left it; we hold the lock
        _remove(left)
    temporary = folder / f".building-{target.name}"
    temporary.mkdir()  # mkdir gives the user's usual permissions; tempfile gives stricter ones
    try:
        build(temporary)
        (temporary / "made_from.json").write_text(description, encoding="utf-8")
        (temporary / SIZES).write_text(json.dumps(_sizes(temporary)), encoding="utf-8")
        if target.exists():  # damaged; processes that have its files mapped keep them
            os.replace(target, temporary.with_name(f"{temporary.name}-damaged"))
            _remove(temporary.with_name(f"{temporary.name}-damaged"))
        os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SIZES}


def _is_whole(folder: Path) -> bool:
    try:
        return bool(read_json(folder / SIZES) == _sizes(folder))
    except (OSError, InputError):  # damaged: it is built again
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
