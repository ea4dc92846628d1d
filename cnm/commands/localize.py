"""``cnm localize``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cnm.commands.common import (
    CheckpointOption,
    Device,
    DeviceOption,
    JsonOption,
    chosen_device,
    load_model,
    moment_text,
)
from cnm.data import load_features
from cnm.errors import InputError
from cnm.files import replace_file
from cnm.localization import localize_query, picture


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
    as_json: JsonOption = False,
) -> None:
    """Finds when a sentence happens in one video.

    \b
    Example:
      cnm localize --checkpoint runs/first/best.pt --features i3d_features.hdf5:3MSZA \\
          --query "a person turns on the light" --duration 30.96 --plot found.png
    """
    if duration is not None and not 0 < duration < float("inf"):
        raise InputError(f"--duration: must be more than 0 seconds, got {duration:g}")
    model, vocabulary = load_model(checkpoint_path, chosen_device(device), vocab=vocab)
    dataset = model.config.dataset
    found = localize_query(model, vocabulary, load_features(features, dataset.frame_dim, dataset.max_num_frames), query)
    if plot is not None:
        replace_file(plot, picture(found, model, duration))
    if as_json:
        seconds = (
            {} if duration is None else {"start_seconds": found.start * duration, "end_seconds": found.end * duration}
        )
        typer.echo(json.dumps(asdict(found) | seconds))
        return
    if found.unknown:
        typer.echo(f"note: words the model does not know are ignored: {', '.join(found.unknown)}", err=True)
    typer.echo(moment_text(found, duration))
