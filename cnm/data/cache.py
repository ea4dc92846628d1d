"""Work done once: arrays kept in folders named after a hash of everything they were made from."""

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

FORMAT = 2  # raise it whenever what is stored, or how it is computed, changes


SIZES = "sizes.json"  # of the files beside it, written last


def default_folder() -> Path:
    """The user's cache folder for this package."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnm-kernels"
    except RuntimeError:
        raise InputError(
            "there is no home folder for the cache (this user has no HOME and no passwd entry); set "
            "dataset.cache_path or the variable XDG_CACHE_HOME to a folder"
        ) from None


def identity(path: str | Path) -> dict[str, Any]:
    """What changes when a file does: where it is, its size and its time of change."""
    try:
        resolved = Path(path).resolve(strict=True)
        status = resolved.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return {"path": str(resolved), "bytes": status.st_size, "changed": status.st_mtime_ns}


def content_hash(path: str | Path) -> str:
    """Hash of a small file's content."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def build_once(folder: Path, made_from: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that holds what ``build`` writes for these inputs, built now if it is not there.

    Args:
        folder: the cache.
        made_from: JSON values that determine the result; any change of them gives another folder.
        build: writes into the empty folder it is given. The folder appears under its final name only when it is whole;
            a second process waits for the first. A folder whose files are missing or have another size than they were
            written with (a disk that was full, a copy cut short) is built again.

    Raises:
        InputError: the cache cannot be written (a full disk, for one); nothing half-written is left.
    """
    description = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    target = folder / hashlib.sha256(description.encode()).hexdigest()[:32]
    if _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever may write in the folder may take the lock: it holds nothing.
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
    """Gives a function that appends a row to a ``.npy`` file of this shape, without holding it in memory.

    Disk space is taken before the first row, and no memory is mapped: a write to a mapped page that finds the disk full
    kills the process.
    """
    with open(path, "wb") as file:
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot
                    raise

        def append(row: np.ndarray) -> None:
            file.write(row.tobytes())

        yield append
        file.flush()
        os.fsync(file.fileno())


def _build(folder: Path, target: Path, description: str, build: Callable[[Path], None]) -> None:
    for left in folder.glob(f".building-{target.name}*"):  # by a process that was killed; the lock is ours
        _remove(left)
    temporary = folder / f".building-{target.name}"
    temporary.mkdir()  # with the permissions of this user's other folders, as tempfile's have not
    try:
        build(temporary)
        (temporary / "made_from.json").write_text(description, encoding="utf-8")
        (temporary / SIZES).write_text(json.dumps(_sizes(temporary)), encoding="utf-8")
        if target.exists():  # damaged; who has its files mapped keeps them
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
    except (OSError, InputError):  # another user's mistake, or damage: it is built again
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
