"""``--data-dir``: relative paths of a configuration start from another folder."""

from __future__ import annotations

from pathlib import Path

from cnm.config import Config
from cnm.errors import InputError

# Fields of the dataset section.
DATA_PATHS = ("feature_path", "feature_manifest", "vocab_path", "train_data", "val_data", "test_data")


def with_data_dir(config: Config, folder: Path | None, *, resumed: bool = False) -> Config:
    """Returns the configuration with the data's relative paths joined to ``folder``.

    A resumed run's configuration may hold them joined already: the same command may be given again.
    """
    if folder is None:
        return config
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder}: is not a folder; give the one that relative paths start from")

    def joined(path: str) -> str:
        there, already = (Path(str(one).replace("{split}", "train")) for one in (folder / path, path))
        if resumed and already.is_relative_to(folder) and not there.exists():
            return path
        return str(folder / path)

    paths = {name: getattr(config.dataset, name) for name in DATA_PATHS}
    moved = {
        name: [joined(one) for one in path] if isinstance(path, list) else joined(path)
        for name, path in paths.items()
        if path is not None
    }
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=moved)})
