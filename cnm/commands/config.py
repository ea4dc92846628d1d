"""``cnm config``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Annotated

import typer

from cnm import configs
from cnm.commands.common import ChangesOption
from cnm.config import CONFIGS, Config
from cnm.config_fields import ConfigField, did_you_mean, every_field, suggestion
from cnm.errors import InputError

SECTIONS = ("dataset", "train", "model", "loss")


def config_command(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE|FIELD",
            help="A packaged configuration or a file to print; a field or "
            "section to explain; otherwise everything is listed.",
        ),
    ] = None,
    changes: ChangesOption = None,
) -> None:
    """Lists the packaged configurations and every field of one; prints or explains one.

    \b
    Example:
      cnm config train.generator
      cnm config charades_i3d --set dataset.frame_dim=512 > mine.json
    """
    fields = _every_models_fields()
    if what is None:
        _list(fields)
    elif what in configs.names() or (os.path.exists(what) and not os.path.isdir(what)):
        _print(configs.resolve(what, changes or []))
        return
    else:
        found = [field for field in fields if field.name == what or field.name.startswith(f"{what}.")]
        if not found:
            near = did_you_mean(what, configs.names()) or f"; {_field_like(what) or 'see `cnm config`'}"
            raise InputError(f"{what}: no packaged configuration, no file and no field{near}")
        typer.echo("\n".join(map(_explanation, found)))
    if changes:
        raise InputError("--set: changes a configuration that is printed; name one")


def _every_models_fields() -> list[ConfigField]:
    """The fields of all models, each once; a field that not every model has names its models."""
    owners: dict[ConfigField, list[str]] = {}
    for model, config in CONFIGS.items():
        for field in every_field(config):
            owners.setdefault(field, []).append(model)
    return [
        field
        if len(models) == len(CONFIGS)
        else replace(field, description=f"{', '.join(models)}: {field.description}")
        for field, models in sorted(owners.items(), key=lambda item: SECTIONS.index(item[0].name.partition(".")[0]))
    ]


def _field_like(name: str) -> str:
    return next((near for config in CONFIGS.values() if (near := suggestion(name, config))), "")


def _list(fields: list[ConfigField]) -> None:
    typer.echo("Packaged configurations (`cnm config NAME` prints one, `cnm train --config NAME` trains with it):\n")
    width = max(map(len, configs.names()))
    for name in configs.names():
        typer.echo(f"  {name:<{width}}  {_summary(configs.resolve(name))}")
    typer.echo("\nFields (`--set FIELD=VALUE` changes one; a section has its fields below it):\n")
    typer.echo("\n".join(map(_explanation, fields)))


def _summary(config: Config) -> str:
    dataset, train = config.dataset, config.train
    source = f"features {_named(dataset.feature_path)}, " if dataset.feature_path else "no files, features "
    return (
        f"{dataset.dataset}: {source}{dataset.frame_dim} wide; {train.max_num_epochs} epochs of batches of "
        f"{train.batch_size}"
    )


def _named(paths: str | list[str]) -> str:
    return paths if isinstance(paths, str) else " + ".join(paths)


def _explanation(field: ConfigField) -> str:
    if not field.kind:
        return f"{field.name}: {field.description}"
    default = "must be given" if field.default is None else f"default {field.default}"
    return f"  {field.name}  ({field.kind}; {default})\n      {field.description}"


def _print(config: Config) -> None:
    content = config.to_dict()
    if config.model.config.vocab_size == config.dataset.vocab_size + 1:  # the derived value
        del content["model"]["config"]["vocab_size"]
    typer.echo(json.dumps(content, indent=2))
