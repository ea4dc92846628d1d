"""``--data-dir``: relative paths of a configuration start from another folder."""

from __future__ import annotations

from pathlib import Path

from cnm.config import Config
from cnm.errors import InputError

# Fields of the dataset section.
DATA_PATHS = ("feature_path", "feature_manifest", "vocab_path", "train_data", "val_data", "test_data")


def with_data_dir(config: Config, folder: Path | None, *, stored: bool = False) -> Config:
    """Returns the configuration with the data's relative paths joined to ``folder``.

    Args:
        stored: the configuration is a run's, which holds paths as they were joined before: a file that is not there is
            looked up in ``folder`` by the end of its path, the longest end first.
    """
    if folder is None:
        return config
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder}: is not a folder; give the one that relative paths start from")

    def joined(path: str) -> str:
        places = [folder / path]
        if stored:  # it may begin with the folder where the data was before, or is
            parts = Path(path).parts
            places += [folder.joinpath(*parts[start:]) for start in range(1, len(parts))]
        return str(next(filter(_exists, places), places[0]))

    paths = {name: getattr(config.dataset, name) for name in DATA_PATHS}
    moved = {
        name: [joined(one) for one in path] if isinstance(path, list) else joined(path)
        for name, path in paths.items()
        if path is not None
    }
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=moved)})


def _exists(path: Path) -> bool:
    return any(Path(str(path).replace("{split}", split)).exists() for split in ("train", "val", "test"))
