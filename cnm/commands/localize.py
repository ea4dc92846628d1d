"""``cnm localize``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from cnm.commands.common import (
    CheckpointOption,
    Device,
    DeviceOption,
    JsonOption,
    MasksOption,
    chosen_device,
    load_model,
    moment_text,
)
from cnm.data import load_features
from cnm.data.annotations import LONGEST_SECONDS
from cnm.errors import InputError
from cnm.files import replace_file
from cnm.localization import localize_query, picture
from cnm.models import Scoring


def localize(
    checkpoint_path: CheckpointOption,
    features: Annotated[
        str, typer.Option(metavar="F.npy|F.hdf5:ID", help="The video's features, [frames, frame_dim].")
    ],
    query: Annotated[str, typer.Option(help="The sentence to find.")],
    duration: Annotated[float | None, typer.Option(help="Length of the video in seconds: answers in seconds.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the Gaussian over time, to this PNG file.")] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Word vectors, for a published checkpoint, which does not hold them.")
    ] = None,
    device: DeviceOption = Device.auto,
    top: Annotated[
        int, typer.Option(min=1, help="How many of the model's proposals to print, best first, with their scores.")
    ] = 1,
    masks: MasksOption = Scoring.masks,
    as_json: JsonOption = False,
) -> None:
    """Finds when a sentence happens in one video.

    \b
    Example:
      cnm localize --checkpoint runs/first/best.pt --features i3d_features.hdf5:3MSZA \\
          --query "a person turns on the light" --duration 30.96 --plot found.png
    """
    if duration is not None and not 0 < duration <= LONGEST_SECONDS:
        raise InputError(f"--duration: must be more than 0 seconds and at most {LONGEST_SECONDS:g}, got {duration:g}")
    model, vocabulary = load_model(checkpoint_path, chosen_device(device), vocab=vocab)
    dataset = model.config.dataset
    clips = load_features(features, dataset.frame_dim, dataset.max_num_frames)
    found = localize_query(model, vocabulary, clips, query, Scoring(masks))
    if plot is not None:
        replace_file(plot, picture(found, model, duration))
    found = replace(found, others=found.others[: top - 1])
    if as_json:
        content = asdict(found)
        if duration is not None:
            for moment in (content, *content["others"]):
                moment |= {f"{name}_seconds": moment[name] * duration for name in ("start", "end")}
        typer.echo(json.dumps(content, allow_nan=False))
        return
    if found.unknown:
        typer.echo(f"note: words the model does not know are ignored: {', '.join(found.unknown)}", err=True)
    typer.echo(moment_text(found, duration) + (f", score {found.score:.3f}" if top > 1 and found.others else ""))
    for other in found.others:
        typer.echo(f"{moment_text(other, duration)}, score {other.score:.3f}")
