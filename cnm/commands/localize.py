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
    MasksOption,
    chosen_device,
    moment_text,
    picture,
)
from cnm.commands.extract import ENCODER_HELP, RateOption, StrideOption, WeightsOption
from cnm.data.annotations import LONGEST_SECONDS
from cnm.errors import InputError
from cnm.files import replace_file
from cnm.localizer import LocalizedMoment, Localizer, Proposal, Video
from cnm.metrics import moments_from_gaussian
from cnm.models import Scoring


def localize(
    checkpoint_path: CheckpointOption,
    query: Annotated[str, typer.Option(help="The sentence to find.")],
    features: Annotated[
        str | None, typer.Option(metavar="F.npy|F.hdf5:ID", help="Features of the video, [frames, frame_dim].")
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="The video, instead of its features; needs the extra [video].")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of the video whose --features are given; answers are then in seconds.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the Gaussian over time, to this PNG file.")] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Word vectors for a published checkpoint, which holds none.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help=ENCODER_HELP)] = None,
    weights: WeightsOption = None,
    stride: StrideOption = None,
    rate: RateOption = None,
    device: DeviceOption = Device.auto,
    top: Annotated[int, typer.Option(min=1, help="Number of proposals to print, best first, with their scores.")] = 1,
    masks: MasksOption = Scoring.masks,
    as_json: JsonOption = False,
) -> None:
    """Finds the moment of one video that a sentence describes.

    \b
    Example:
      cnm localize --checkpoint runs/first --features i3d_features.hdf5:3MSZA \\
          --query "a person turns on the light" --duration 30.96 --plot found.png
      cnm localize --checkpoint runs/first --video 3MSZA.mp4 --query "a person turns on the light"

    The features of a --video are extracted as those of the training (the checkpoint knows how, if `cnm extract` made
    them); --encoder, --weights, --stride and --rate override this.
    """
    if (features is None) == (video is None):
        raise InputError("give either --features or --video, not both")
    if video is not None and duration is not None:
        raise InputError("--duration: a --video has its own; leave it out")
    of_videos = {"--encoder": encoder, "--weights": weights, "--stride": stride, "--rate": rate}
    for name, value in of_videos.items():
        if features is not None and value is not None:
            raise InputError(f"{name}: says how a --video becomes features; leave it out with --features")
    if duration is not None and not 0 < duration <= LONGEST_SECONDS:
        raise InputError(f"--duration: must be more than 0 seconds and at most {LONGEST_SECONDS:g}, got {duration:g}")
    localizer = Localizer.from_checkpoint(checkpoint_path, chosen_device(device), vocab=vocab)
    if video is not None:
        encoded = _encode_video(localizer, video, encoder, weights, stride, rate)
    else:
        encoded = localizer.encode_features(str(features), duration=duration)
    [found] = localizer.find(encoded, [query], scoring=Scoring(masks))
    if plot is not None:
        replace_file(plot, picture(found, localizer.model, encoded.duration))
    shown = found.proposals[:top]
    if as_json:
        typer.echo(json.dumps(_as_json(found, shown, encoded.duration), allow_nan=False))
        return
    if found.unknown:
        typer.echo(f"note: words the model does not know are ignored: {', '.join(found.unknown)}", err=True)
    if found.cut:
        longest = localizer.model.config.dataset.max_num_words
        typer.echo(f"note: words beyond the first {longest} known ones are not read: {', '.join(found.cut)}", err=True)
    for proposal in shown:
        score = f", score {proposal.score:.3f}" if len(shown) > 1 else ""
        typer.echo(moment_text(proposal, encoded.duration) + score)


def _encode_video(
    localizer: Localizer, path: Path, encoder: str | None, weights: Path | None, stride: int | None, rate: float | None
) -> Video:
    from cnm.video.encoders import Encoder
    from cnm.video.extract import Sampling

    if encoder is None and weights is not None and localizer.origin is not None:
        encoder = localizer.origin.encoder
    if encoder is not None:
        localizer.encoder = Encoder(encoder, localizer.device, weights=weights)
    if stride is not None or rate is not None:
        localizer.sampling = Sampling(stride, rate)
    return localizer.encode_video(path)


def _as_json(found: LocalizedMoment, shown: tuple[Proposal, ...], duration: float | None) -> dict[str, Any]:
    """The numbers of the best proposal, and of the others that are shown."""
    best, *others = (_proposal_as_json(proposal, duration) for proposal in shown)
    return {"query": found.query} | best | {"unknown": list(found.unknown), "cut": list(found.cut), "others": others}


def _proposal_as_json(proposal: Proposal, duration: float | None) -> dict[str, float]:
    """A moment in fractions of the video, and in seconds if the duration is known."""
    start, end = moments_from_gaussian(proposal.center, proposal.width).tolist()
    content = {
        "center": proposal.center,
        "width": proposal.width,
        "start": start,
        "end": end,
        "score": proposal.score,
    }
    return content | ({} if duration is None else {"start_seconds": proposal.start, "end_seconds": proposal.end})
