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

FORMAT = 1  # raise it whenever what is stored, or how it is computed, changes


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
            a second process waits for the first.

    Raises:
        InputError: the cache cannot be written (a full disk, for one); nothing half-written is left.
    """
    description = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    target = folder / hashlib.sha256(description.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
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
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
