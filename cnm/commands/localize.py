"""``cnm localize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cnm.commands.common import (
    CheckpointOption,
    Device,
    DeviceOption,
    JsonOption,
    chosen_device,
    moment_text,
    picture,
)
from cnm.errors import InputError
from cnm.files import replace_file
from cnm.localizer import Found, Localizer
from cnm.metrics import moments_from_gaussian


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
    localizer = Localizer.from_checkpoint(checkpoint_path, chosen_device(device), vocab=vocab)
    video = localizer.encode(features, duration=duration)
    [found] = localizer.find(video, [query])
    if plot is not None:
        replace_file(plot, picture(found, localizer.model.alpha, video.duration))
    if as_json:
        typer.echo(json.dumps(_as_json(found, video.duration)))
        return
    if found.unknown:
        typer.echo(f"note: words the model does not know are ignored: {', '.join(found.unknown)}", err=True)
    typer.echo(moment_text(found, video.duration))


def _as_json(found: Found, duration: float | None) -> dict[str, Any]:
    """The best proposal in fractions of the video, and in seconds where they are known."""
    start, end = moments_from_gaussian(found.center, found.width).tolist()
    content = {
        "query": found.query,
        "center": found.center,
        "width": found.width,
        "start": start,
        "end": end,
        "unknown": list(found.unknown),
    }
    return content | ({} if duration is None else {"start_seconds": found.start, "end_seconds": found.end})
