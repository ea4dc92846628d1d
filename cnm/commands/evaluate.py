"""``cnm evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from cnm import checkpoint, configs, metrics
from cnm.commands.common import (
    ChangesOption,
    CheckpointOption,
    Device,
    DeviceOption,
    JsonOption,
    Precision,
    PrecisionOption,
    SplitName,
    chosen_device,
    chosen_precision,
    print_notes,
    print_scores,
    split_title,
)
from cnm.data import open_split
from cnm.data.known_splits import known_split
from cnm.errors import InputError
from cnm.evaluation import check_vocabulary, evaluate
from cnm.models.cnm import CNM, PRECISIONS
from cnm.predictions import write_predictions


def evaluate_command(
    checkpoint_path: CheckpointOption,
    config: Annotated[
        str | None,
        typer.Option(help="A JSON file or packaged name: where the data is; otherwise as stored in the checkpoint."),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Which sentences to localize.")] = SplitName.test,
    changes: ChangesOption = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="F.jsonl", help="Also write what was found, in QVHighlights' submission form; see `cnm score`."
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    as_json: JsonOption = False,
) -> None:
    """Scores a checkpoint: R@1 at five IoU thresholds and mIoU, with baselines that need no video beside.

    \b
    Example:
      cnm evaluate --checkpoint runs/first/best.pt --config charades_i3d
    """
    if predictions is not None and predictions.exists():
        raise InputError(f"{predictions}: exists and is not written over; choose another --predictions")
    model = CNM.from_checkpoint(checkpoint_path, chosen_device(device))
    dtype = model.compute_dtype = PRECISIONS[chosen_precision(precision, device)]
    if config is not None:
        chosen = configs.resolve(config, changes or [])
    else:
        chosen = configs.change(model.config.to_dict(), changes or [], str(checkpoint_path))
    data = open_split(chosen.dataset, split.value, progress=not as_json, dtype=dtype or torch.float32)
    stored = checkpoint.load(checkpoint_path).get("vocabulary")
    check_vocabulary(model, data.vocabulary.words, stored and stored["words"])
    found = evaluate(model, data, chosen.train.batch_size)
    if predictions is not None:
        center, width = found.center[:, None], found.width[:, None]
        write_predictions(predictions, data.samples, center, width, np.ones_like(center))
    known = known_split(data.samples)
    baselines = metrics.baselines(data.windows)
    if as_json:
        content = {
            "checkpoint": str(checkpoint_path),
            "split": split.value,
            "sentences": len(data),
            "known_as": known,
            "scores": found.scores,
            "baselines": baselines,
            "notes": data.notes,
        }
        typer.echo(json.dumps(content, allow_nan=False))
        return
    print_notes(data.notes)
    print_scores(split_title(split.value, data.samples), {str(checkpoint_path): found.scores} | baselines)
