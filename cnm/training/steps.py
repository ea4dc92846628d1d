"""The training steps of each model, by name."""

from __future__ import annotations

from typing import Any

from cnm.config import Config
from cnm.models.base import Model
from cnm.training import cpl_step, step
from cnm.training.base import ModelStep

STEP_NAMES = ("lean", "recompute", "published")
STEPS: dict[str, dict[str, Any]] = {"CNM": step.STEPS, "CPL": cpl_step.STEPS}  # by model.name, then STEP_NAMES


def make_step(name: str, model: Model, config: Config) -> ModelStep:
    """The step of that name for this model."""
    made: ModelStep = STEPS[config.model.name][name](model, config)
    return made
