"""Names of videos, which are looked up in HDF5 files and folders: as they are written, or not at all."""

from __future__ import annotations

import re
from typing import Any

_UNWRITTEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def name_problem(name: Any) -> str | None:
    """Why a name would find another video than its own, or a file outside its folder; None for a good one."""
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}"
    if not name:
        return "it is empty"
    if _UNWRITTEN.search(name):
        return "it holds a control character or half a character"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "a part of it between slashes is empty or dots alone"
    return None
