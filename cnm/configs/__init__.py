"""The packaged experiments, by name, and changes to them from the command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnm.config import MAX_VALUES, Config
from cnm.config_fields import did_you_mean
from cnm.errors import InputError
from cnm.files import NoJson, check_plain, parse_json, read_json

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The packaged configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def resolve(source: str | Path, changes: Sequence[str] = ()) -> Config:
    """The configuration in a file, or else of a packaged name, with ``key=value`` changes.

    Args:
        source: path of a JSON file in the published layout, or one of ``names()``.
        changes: see ``change``.

    Raises:
        InputError: there is no such file or name, or a field of the result is wrong.
    """
    path = Path(source)
    exists = os.path.lexists(path)  # unlike Path.exists, it never raises
    if str(source) in names() and (not exists or os.path.isdir(path)):
        path = FOLDER / f"{source}.json"
    elif not exists:
        near = did_you_mean(str(source), names())
        raise InputError(f"{source}: no such file, nor a packaged configuration ({', '.join(names())}){near}")
    if not changes:
        return Config.from_json(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return change(content, changes, str(source))


def change(content: dict[str, Any], changes: Sequence[str], source: str) -> Config:
    """A configuration with some fields set anew.

    Args:
        content: the configuration in the published layout; stays as it is.
        changes: ``dotted.key=value`` each; the value is JSON, and what is not JSON is text.
        source: the configuration's name, for messages.

    Raises:
        InputError: a change is no ``key=value``, or its key or value is not one of a configuration.
    """
    check_plain(content, source, MAX_VALUES)
    content = copy.deepcopy(content)
    for item in changes:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"--set {item}: must be key=value, such as train.batch_size=64")
        try:
            value = parse_json(text, f"--set {item}")
        except NoJson:
            value = text
        section = content
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(f"--set {item}: unknown key, {name} has no fields of its own")
        section[last] = value
    try:
        return Config.from_json(content)
    except InputError as error:
        message = str(error).removeprefix("config: ")
        raise InputError(f"{source} with --set {' --set '.join(changes)}: {message}") from None
