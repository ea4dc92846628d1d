"""The packaged experiments, by name, and changes to them from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnm.config import Config, read_json
from cnm.errors import InputError

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
    if not path.exists() and str(source) in names():
        path = FOLDER / f"{source}.json"
    elif not path.exists():
        raise InputError(f"{source}: no such file, nor a packaged configuration ({', '.join(names())})")
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
        changes: ``dotted.key=value`` each; the value is JSON, and what is no JSON is text.
        source: the configuration's name, for messages.

    Raises:
        InputError: a change is no ``key=value``, or its key or value is not one of a configuration.
    """
    content = json.loads(json.dumps(content))
    for item in changes:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"--set {item}: must be key=value, such as train.batch_size=64")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
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
