"""Work done once: arrays kept in folders named after a hash of everything they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cnm.errors import InputError

FORMAT = 2  # raise it whenever what is stored, or how it is computed, changes


SIZES = "sizes.json"  # of the files beside it, written last


def default_folder() -> Path:
    """The user's cache folder for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnm-kernels"


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
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                _build(folder, target, description, build)
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); make room or set dataset.cache_path"
        ) from None
    return target


def _build(folder: Path, target: Path, description: str, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        build(temporary)
        (temporary / "made_from.json").write_text(description, encoding="utf-8")
        (temporary / SIZES).write_text(json.dumps(_sizes(temporary)), encoding="utf-8")
        if target.exists():  # damaged; who has its files mapped keeps them
            os.replace(target, temporary.with_name(f"{temporary.name}-damaged"))
            _remove(temporary.with_name(f"{temporary.name}-damaged"))
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SIZES}


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / SIZES).read_text(encoding="utf-8")) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
