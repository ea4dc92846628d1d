"""Checks names of videos before they are looked up in HDF5 files and folders."""

from __future__ import annotations

import re
from typing import Any

_UNWRITTEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def name_problem(name: Any) -> str | None:
    """Says why a name could find another video or a file outside the folder; None for a valid name."""
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}"
    if not name:
        return "it is empty"
    if _UNWRITTEN.search(name):
        return "it holds a control character or half a character"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "a part of it between slashes is empty or dots alone"
    return None
