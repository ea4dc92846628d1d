"""The fields of a configuration, as its models declare them: for ``cnm config`` and for whoever mistypes one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

NEAREST = 2  # names that are suggested
MOST = 2**31  # bounds from here on are those of memory and numbers, of which nobody has to be told


@dataclass(frozen=True)
class ConfigField:
    """One field or section.

    Attributes:
        name: dotted, as ``--set`` takes it.
        description: what it means.
        kind: the values it takes, in words; empty for a section.
        default: its value where it is not given, as JSON has it; None where it must be given, and for sections.
    """

    name: str
    description: str
    kind: str
    default: str | None


def every_field(config: type[BaseModel], prefix: str = "") -> Iterator[ConfigField]:
    """The sections and fields of a configuration, each section before its fields."""
    schemas = config.model_json_schema()["properties"]
    for attribute, field in config.model_fields.items():
        key = field.alias or attribute
        name = prefix + key
        section = _section(field.annotation)
        if section is not None:
            yield ConfigField(name, field.description or "", "", None)
            yield from every_field(section, f"{name}.")
        else:
            yield ConfigField(name, field.description or "", _kind(schemas[key]), _default(field))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the names that are most like ``name``, or nothing."""
    near = difflib.get_close_matches(name, known, NEAREST)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def suggestion(name: str, config: type[BaseModel]) -> str:
    """``did you mean ...?`` for an unknown field: fields called so elsewhere, or else of a name like it; or nothing."""
    known = [field.name for field in every_field(config)]
    last = name.rpartition(".")[2]
    elsewhere = [field for field in known if field.rpartition(".")[2] == last][:NEAREST]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(name, known).removeprefix("; ")


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _default(field: FieldInfo) -> str | None:
    if field.default is PydanticUndefined:
        return None
    return "none" if field.default is None else json.dumps(field.default)


def _kind(schema: dict[str, Any]) -> str:
    """A field's JSON schema in words."""
    if "anyOf" in schema:  # a value or null
        return " or ".join(_kind(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return ", ".join("true" if value is True else str(value) for value in values)
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "array": "list",
    }
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[bound]:.15g}" for bound, word in bounds.items() if schema.get(bound, MOST) < MOST]
    return " ".join([words.get(schema.get("type", ""), "value"), *limits])
