"""The models by name, and the layers they share.

A model is a file here (a ``Model``), its training steps a file in ``cnm.training``, its configuration a class in
``cnm.config``; each is entered in the table of its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnm import checkpoint
from cnm.config import Config
from cnm.models.base import Model, Proposals, Scoring, VideoEncoding
from cnm.models.cnm import CNM
from cnm.models.cpl import CPL

__all__ = ["MODELS", "Model", "Proposals", "Scoring", "VideoEncoding", "build", "load_checkpoint", "load_content"]

MODELS: dict[str, type[Model]] = {"CNM": CNM, "CPL": CPL}  # by model.name of the configuration


def build(config: Config) -> Model:
    """A new model of this configuration."""
    return MODELS[config.model.name](config)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model of a checkpoint, of whichever class, in evaluation mode. Nothing in the file is executed.

    Raises:
        InputError: the file is missing, no checkpoint, or its parameters do not fit its configuration.
    """
    return load_content(checkpoint.load(path), path, device)


def load_content(content: dict[str, Any], path: str | Path, device: torch.device | str = "cpu") -> Model:
    """``load_checkpoint`` of what ``cnm.checkpoint.load`` gave; ``path`` is for messages."""
    name = Config.from_json(content["config"], f"{path}: config").model.name
    return MODELS[name].from_content(content, path, device)
