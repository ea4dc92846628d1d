"""``cnm evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cnm import checkpoint, configs, metrics
from cnm.commands.common import (
    ChangesOption,
    CheckpointOption,
    DataDirOption,
    Device,
    DeviceOption,
    JsonOption,
    MasksOption,
    Precision,
    SplitName,
    chosen_device,
    print_notes,
    print_scores,
    split_title,
    stored_vocabulary,
)
from cnm.data import open_split
from cnm.data.data_dir import with_data_dir
from cnm.data.known_splits import known_split
from cnm.data.origin import Origin
from cnm.data.tagging import notes as notes_on_tagging
from cnm.errors import InputError
from cnm.evaluation import Spread, check_vocabulary, evaluate_seeds
from cnm.files import prepare_output
from cnm.models import load_checkpoint
from cnm.models.base import Scoring
from cnm.precision import compute_dtype, products_of
from cnm.precision import notes as notes_on_precision
from cnm.predictions import write_predictions


def evaluate_command(
    checkpoint_path: CheckpointOption,
    config: Annotated[
        str | None,
        typer.Option(
            help="A JSON file or packaged name that names the data; default: the configuration in the checkpoint."
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Split whose sentences are localized.")] = SplitName.test,
    changes: ChangesOption = None,
    data_dir: DataDirOption = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="F.jsonl",
            help="Also write the moments found to this file, in QVHighlights' submission form; see `cnm score`. "
            "Of several --seeds those of the first draw.",
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        Precision, typer.Option(help="Of activations; auto: float32, in whatever the run was trained.")
    ] = Precision.auto,
    masks: MasksOption = Scoring.masks,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Repeat with as many draws of masked words; prints means and standard deviations."),
    ] = 1,
    select: Annotated[
        float | None,
        typer.Option(
            metavar="LEVEL",
            help="The moment is the part of a proposal's Gaussian above LEVEL (0 to 1, for example 0.05) of its peak; "
            "default: center +- half the width, as published.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Scores a checkpoint: R@1 at five IoU thresholds and mIoU, beside baselines that need no video.

    Of sentences without moments it writes the --predictions alone.

    For a model with several proposals it scores the best one, two votes among them, and the best of five. The model
    orders its proposals by the reconstruction of masked words. This error is averaged over --masks draws and does not
    depend on the batch. Rows "as published" have one random draw, and the batch's longest sentence counts.

    \b
    Example:
      cnm evaluate --checkpoint runs/first --config charades_i3d
      cnm evaluate --checkpoint runs/cpl/last.pt --config charades_cpl --masks 8 --seeds 5
    """
    if select is not None and not 0 < select < 1:
        raise InputError(f"--select must lie between 0 and 1, got {select:g}")
    for change in changes or []:
        if change.startswith(("model.", "loss.")):
            raise InputError(f"--set {change}: a model is scored as it was trained; change dataset or train.batch_size")
    if predictions is not None and predictions.exists():
        raise InputError(f"{predictions}: exists and is not written over; choose another --predictions")
    if predictions is not None:
        prepare_output(predictions)
    model = load_checkpoint(checkpoint_path, chosen_device(device))
    name = Precision.float32.value if precision is Precision.auto else precision.value
    dtype = model.compute_dtype = compute_dtype(name)
    if config is not None:
        chosen = configs.resolve(config, changes or [])
    else:
        chosen = configs.change(model.config.to_dict(), changes or [], str(checkpoint_path))
    chosen = with_data_dir(chosen, data_dir, stored=config is None)
    stored = stored_vocabulary(checkpoint_path)
    data = open_split(
        chosen.dataset,
        split.value,
        progress=not as_json,
        dtype=dtype or torch.float32,
        stored=stored,
        origin=Origin.from_record(checkpoint.load(checkpoint_path).get("features")),
        keep_wordless=True,
    )
    check_vocabulary(model, data.vocabulary, stored)
    if not data.scored and predictions is None:
        raise InputError(
            f"{split.value} split: not all of its sentences have moments, so nothing can be scored; --predictions "
            f"F.jsonl writes what is found"
        )
    several, batch_size = model.num_proposals > 1 and data.scored, chosen.train.batch_size  # ways to score
    scoring = Scoring(masks, select=select)
    with products_of(name):
        found = {"": evaluate_seeds(model, data, batch_size, seeds if several else 1, scoring)}
        if several:
            found[", as published"] = evaluate_seeds(model, data, batch_size, seeds, Scoring(published=True))
    notes = [*notes_on_precision(name, chosen_device(device)), *(notes_on_tagging() if several else []), *data.notes]
    if data_dir is not None and config is None:  # where files are looked up by the ends of their paths
        notes.append(f"the {split.value} split is {getattr(chosen.dataset, f'{split.value}_data')}")
    if predictions is not None:
        if several and seeds > 1:
            notes.append(f"{predictions}: holds the moments of the first of {seeds} draws")
        first = found[""].first
        write_predictions(predictions, data.samples, first.centers, first.widths, first.confidences)
    baselines = metrics.baselines(data.windows, moments=model.num_proposals) if data.scored else {}
    if as_json:
        ours = found[""]
        content = {
            "checkpoint": str(checkpoint_path),
            "split": split.value,
            "sentences": len(data),
            "known_as": known_split(data.samples),
            "device": chosen_device(device).type,
            "precision": name,
            "select": select,
            "scores": ours.mean.get("nll", {}),
            "baselines": baselines,
            "notes": notes,
        }
        if several:
            content |= {"seeds": seeds, "masks": masks, "by_selection": _plain(ours)}
            content["as_published"] = _plain(found[", as published"])
        typer.echo(json.dumps(content, allow_nan=False))
        return
    print_notes(notes)
    if not data.scored:
        lacks = f"the {split.value} split lacks some to score with"
        typer.echo(f"{predictions}: moments of {len(data):,} sentences; {lacks}")
        return
    if select is not None:
        found = {("" if way else f", above {select:g} of the peak") + way: spread for way, spread in found.items()}
    alone = f"{checkpoint_path}{next(iter(found))}"
    rows = _rows(found, seeds) if several else {alone: next(iter(found.values())).mean["nll"]}
    title = split_title(split.value, data.samples)
    title = title if name == Precision.float32.value else f"{title}, {name}"
    print_scores(title, rows | baselines, model.num_proposals)


def _plain(spread: Spread) -> dict[str, Any]:
    return {"mean": spread.mean, "deviation": spread.deviation}


NAMES = {"nll": "lowest nll"}  # longer names of selections for the table


def _rows(found: dict[str, Spread], seeds: int) -> dict[str, dict[str, float]]:
    """Table rows: one for each selection and way to score; with several seeds, its deviation in the next row."""
    rows: dict[str, dict[str, float]] = {}
    for way, spread in found.items():
        for selection, scores in spread.mean.items():
            name = f"{NAMES.get(selection, selection)}{way}"
            # The best of five does not depend on the selection, so it is printed once.
            kept = [score for score in scores if selection == "nll" or score not in metrics.TOP_SCORES]
            rows[name] = {score: scores[score] for score in kept}
            if seeds > 1:
                rows[f"  +- of {seeds} seeds, {name}"] = {score: spread.deviation[selection][score] for score in kept}
    return rows
