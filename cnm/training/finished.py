"""Reads a finished run again: its localizer, its splits, its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnm import checkpoint, metrics
from cnm.data import Sample, Split, open_split
from cnm.errors import InputError
from cnm.localizer import LocalizedMoment, Localizer, Video
from cnm.training.run_folder import RunFolder


@dataclass(frozen=True)
class Answer:
    """A sentence of a split, what was found for it, and how well: IoU with the best of the true moments, 0 to 1; None
    where none is known."""

    sample: Sample
    found: LocalizedMoment
    iou: float | None


class FinishedRun:
    """A folder that ``cnm train`` wrote.

    Attributes:
        checkpoint: the best one, or the last where none was chosen.
        updates: how many the checkpoint has seen.
        rows: of ``metrics.jsonl``.

    Raises:
        InputError: the folder holds no checkpoint.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        folder = RunFolder(path)
        self.path = folder.path
        self.checkpoint = folder.best if folder.best.is_file() else folder.last
        if not self.checkpoint.is_file():
            raise InputError(f"{path}: is not a finished run, it has neither best.pt nor last.pt; give a run's folder")
        self.updates = int(checkpoint.load(self.checkpoint)["num_updates"])
        self.rows = folder.rows()
        self.localizer = Localizer.from_checkpoint(self.checkpoint, device)

    @property
    def config(self) -> dict[str, Any]:
        return self.localizer.model.config.to_dict()

    def split(self, name: str) -> Split:
        """One of the run's splits; ``train``, ``val`` or ``test``."""
        if name not in ("train", "val", "test"):
            raise InputError(f"split {name}: choose train, val or test")
        dataset, origin = self.localizer.model.config.dataset, self.localizer.origin
        return open_split(dataset, name, stored=self.localizer.vocabulary, origin=origin)  # type: ignore[arg-type]

    def encode(self, split: Split, index: int) -> Video:
        """The video of a split's sentence, encoded."""
        features = split.batch(np.array([index])).frames[0].float()
        return self.localizer.encode(features, duration=split.samples[index].duration)

    def answers(self, split: Split) -> Iterator[Answer]:
        """Every sentence of a split that has a known word, localized, video by video.

        Rows of one video may disagree on its duration: each is answered in seconds of its own.
        """
        places: dict[tuple[str, float], list[int]] = {}
        for index, sample in enumerate(split.samples):
            if len(self.localizer.vocabulary.encode(sample.sentence, 1).ids):
                places.setdefault((sample.video, sample.duration), []).append(index)
        for indices in places.values():
            video = self.encode(split, indices[0])
            samples = [split.samples[index] for index in indices]
            for sample, found in zip(
                samples, self.localizer.find(video, [sample.sentence for sample in samples]), strict=True
            ):
                yield Answer(sample, found, _iou(sample, found))


def _iou(sample: Sample, found: LocalizedMoment) -> float | None:
    if sample.moment is None:
        return None
    moment = metrics.moments_from_gaussian(found.center, found.width)
    return float(metrics.best_iou(moment, np.array(sample.windows) / sample.duration))
