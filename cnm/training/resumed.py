"""What a resumed run may change: it continues bit for bit."""

from __future__ import annotations

from typing import Any

from cnm.config import Config
from cnm.errors import InputError

RESUMABLE_CHANGES = {"train.max_num_epochs", "train.model_saved_path", "dataset.cache_path"}  # need no new run


def resumed_config(stored: Config, given: Config) -> Config:
    """The configuration given for a resumed run; it may differ from the stored one in ``RESUMABLE_CHANGES`` alone.

    Raises:
        InputError: it differs elsewhere.
    """
    given = with_vocabulary_size(given, stored.model.config.vocab_size or 0)
    planned = getattr(stored.model.config, "max_epoch", None) or stored.train.max_num_epochs
    stored, given = (_with_growth_of(config, planned) for config in (stored, given))
    old, new = _flat(stored.to_dict()), _flat(given.to_dict())
    for name in sorted(old.keys() | new.keys()):
        if name not in RESUMABLE_CHANGES and old.get(name) != new.get(name):
            raise InputError(
                f"--resume: the run was started with {name} = {old.get(name)!r}, not {new.get(name)!r}; leave it as it "
                f"was or start a new run"
            )
    return given


def with_vocabulary_size(config: Config, size: int) -> Config:
    """Gives the model as many words as the data has, which may be fewer than dataset.vocab_size (as published)."""
    content = config.to_dict()
    content["model"]["config"]["vocab_size"] = size
    return Config.from_json(content)


def _with_growth_of(config: Config, epochs: int) -> Config:
    """CPL's negatives grow over the epochs first planned, also in a run that is made longer or shorter."""
    if not hasattr(config.model.config, "max_epoch"):
        return config
    content = config.to_dict()
    content["model"]["config"]["max_epoch"] = config.model.config.max_epoch or epochs
    return Config.from_json(content)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
