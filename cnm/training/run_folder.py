"""The folder of one training run: what is where, and metrics as JSON lines."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cnm.config import Config
from cnm.errors import InputError
from cnm.files import NoJson, append_line, cannot_write, parse_json, read_text, replace_file, shortened
from cnm.locking import only_writer

KINDS = ("train", "eval", "epoch", "result")  # epoch: one without a validation split


def check_row(row: Any, source: str) -> None:
    """Raises ``InputError`` where a row of ``metrics.jsonl`` is not one that ``Trainer`` writes."""
    problem = None
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        problem = f"is not a row of metrics, {shortened(row)}"
    else:
        for name, value in row.items():
            wanted: type | tuple[type, ...] = (int, float)
            if name in ("epoch", "update"):
                wanted = int
            elif name in ("kind", "split", "checkpoint"):
                wanted = str
            if not isinstance(value, wanted) or isinstance(value, bool):
                problem = f"{name!r} is {shortened(value)}"
        if not {"epoch", "update"} <= row.keys():
            problem = "lacks its epoch or update"
    if problem:
        raise InputError(f"{source}: {problem}; correct the line, or move the file away to go on without it")


class RunFolder:
    """Paths of a run, and its ``metrics.jsonl``: one JSON object a line, of one of ``KINDS``.

    Attributes:
        config: the configuration as JSON.
        last: the checkpoint to resume from.
        best: the model that did best on the validation split; absent where there is no such split.
        pictures: a folder of PNG files.
        events: a folder of TensorBoard events.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.lock = self.path / ".lock"
        self.pictures = self.path / "pictures"
        self.events = self.path / "tensorboard"

    def check_new(self, option: str = "--run") -> None:
        """Raises ``InputError`` where something is already there: a run is never written over. ``option`` names it."""
        occupied = any(path != self.lock for path in self.path.iterdir()) if self.path.is_dir() else self.path.exists()
        if occupied:
            resume = f", or continue it with `cnm train --resume {self.path}`" if self.last.exists() else ""
            raise InputError(
                f"{self.path}: exists and is not written over; choose another folder for the run ({option}){resume}"
            )

    def check_resumable(self) -> None:
        """Raises ``InputError`` where there is not a checkpoint to resume from."""
        if not self.last.is_file():
            raise InputError(f"{self.path}: no run to resume, it has no {self.last.name}; give the folder of a run")

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from training here during the block."""
        return only_writer(self.path, self.lock, "another process is training in this folder; wait for it or stop it")

    def create(self, config: Config) -> None:
        """Makes the folder and writes the configuration."""
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        replace_file(self.config, json.dumps(config.to_dict(), indent=2).encode() + b"\n")

    def append(self, row: dict[str, Any]) -> None:
        append_line(self.metrics, json.dumps(row, allow_nan=False))

    def rows(self) -> list[dict[str, Any]]:
        """The records in ``metrics.jsonl`` so far; a last line cut short by a crash is left out.

        Raises:
            InputError: the file cannot be read, or a row is not one that a run writes.
        """
        if not self.metrics.exists():
            return []
        rows = []
        lines = read_text(self.metrics).split("\n")
        for number, line in enumerate(lines, start=1):
            source = f"{self.metrics}: line {number}"
            try:
                row = parse_json(line, source)
            except NoJson:
                if number < len(lines):
                    raise InputError(
                        f"{source}: is not JSON; correct the line, or move the file away to go on without it"
                    ) from None
                break
            check_row(row, source)
            rows.append(row)
        return rows

    def clean(self) -> None:
        """Removes what writes that were killed left behind; nobody else writes here, see ``lock``."""
        for path in self.path.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def keep_rows(self, count: int) -> int:
        """Drops what was written after the checkpoint that knew ``count`` rows, a line cut short among it.

        Returns the number of rows, fewer than ``count`` where the file was moved away.
        """
        rows = self.rows()[:count]
        replace_file(self.metrics, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        return len(rows)
