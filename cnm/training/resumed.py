"""What a resumed run may change, for it continues bit for bit, and what it writes before it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnm import checkpoint
from cnm.config import Config
from cnm.data.fingerprint import difference
from cnm.errors import InputError
from cnm.training.run_folder import RunFolder

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


def check_same_data(wanted: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Compares the fingerprints of the splits in use with those that the checkpoint ``path`` holds.

    Raises:
        InputError: a split is another one.
    """
    for name in {**wanted, **found} if wanted else ():  # earlier versions kept none
        both = name in wanted and name in found
        other = difference(wanted[name], found[name]) if both else "lost or gained its moments"
        if other is not None:
            raise InputError(
                f"{path}: was not trained with this data, the {name} split has {other}; give it the files it had, or "
                f"start a new run"
            )


def bring_up_to_date(run: RunFolder, saved: dict[str, Any], config: Config, rows: int) -> None:
    """Writes the configuration, whose data may have moved, everywhere it is read from, and how many rows were kept.

    Args:
        saved: the content of ``run.last``.
    """
    run.create(config)
    new = {"config": config.to_dict()}
    if saved["config"] != new["config"] or saved["training"]["rows"] != rows:
        checkpoint.save(run.last, saved | new | {"training": saved["training"] | {"rows": rows}})
    best = checkpoint.load(run.best) if run.best.is_file() else new
    if best["config"] != new["config"]:  # an earlier version, or a kill, may have left it behind
        checkpoint.save(run.best, best | new)


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
