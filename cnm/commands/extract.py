"""``cnm extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnm.commands.common import Device, DeviceOption, chosen_device, print_notes
from cnm.errors import InputError

ENCODER_HELP = (
    "clip-vit-b32 (OpenAI's weights), efficientnet-lite0 (weights come with pip), timm/NAME or torchvision/NAME where "
    "installed."
)
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        help="File of the encoder's weights (.safetensors), for machines that cannot download them. CLIP's must be "
        "OpenAI's: others of the same shape (LAION's) need another activation than QuickGELU."
    ),
]

StrideOption = Annotated[
    int | None, typer.Option(help="Number of frames between features; 8 if neither this nor --rate is given.")
]
RateOption = Annotated[float | None, typer.Option(help="Features per second, at any frame rate.")]


def extract_command(
    videos: Annotated[list[Path], typer.Argument(help="Video files, and folders of them.")],
    output: Annotated[
        Path, typer.Option(help="F.hdf5, or a folder for one .npy per video; an existing output is continued.")
    ],
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "clip-vit-b32",
    weights: WeightsOption = None,
    stride: StrideOption = None,
    rate: RateOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of pictures encoded at once, and the most kept in memory.")
    ] = 32,
    device: DeviceOption = Device.auto,
) -> None:
    """Turns videos into features for training and localizing. Needs `pip install 'cnm-kernels[video]'`.

    Pictures are scaled to the encoder's size on the short side (224) and cropped to the center. OUTPUT.json, beside the
    output, records encoder, checksum of its weights, stride or rate, durations, and the files that could not be read.

    \b
    Example:
      cnm extract videos/*.mp4 --output clip.hdf5
      cnm extract videos --output features --encoder efficientnet-lite0 --rate 2
    """
    from cnm.video.encoders import Encoder
    from cnm.video.extract import Sampling, extract

    sampling = Sampling.default(stride, rate)
    paths = [path for given in videos for path in _files(given)]
    loaded = Encoder(encoder, chosen_device(device), weights=weights)
    result = extract(paths, output, loaded, sampling, batch=batch_size, progress=True)
    for reason in result.broken.values():
        typer.echo(f"skipped: {reason}", err=True)
    if not (result.done or result.already):
        raise InputError(f"none of {len(paths)} videos could be read; see above")
    before = f", {len(result.already)} were there before" if result.already else ""
    typer.echo(
        f"{output}: features of {len(result.done)} videos, {loaded.width} wide{before}; "
        f"{len(result.broken)} could not be read"
    )


def _files(given: Path) -> list[Path]:
    """Returns the given files, and the videos directly inside the given folders; FFmpeg reads texts too."""
    from cnm.video.suffixes import VIDEO_SUFFIXES

    if not given.is_dir():
        return [given]
    files = sorted(path for path in given.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not found:
        raise InputError(f"{given}: holds {len(files)} files, none of them named as a video is; name the files")
    if len(found) < len(files):
        others = ", ".join(sorted({path.suffix or path.name for path in files} - {path.suffix for path in found}))
        print_notes([f"{given}: {len(files) - len(found)} files are not named as videos are ({others}); left out"])
    return found
