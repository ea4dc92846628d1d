"""What the commands share: options, how a device, a precision and a model are chosen, how results are printed."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from cnm import metrics, plot
from cnm.errors import InputError
from cnm.localizer import Found


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    auto = "auto"
    float32 = "float32"
    bf16 = "bf16"


class Step(str, Enum):
    lean = "lean"
    recompute = "recompute"
    published = "published"


class SplitName(str, Enum):
    train = "train"
    val = "val"
    test = "test"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes the GPU where there is one.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="Of activations; parameters, losses and statistics stay in float32. auto: bf16 on GPUs that have it, else "
        "float32; a resumed run's own."
    ),
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="A checkpoint: of a run (last.pt, best.pt), or a published one.")
]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changes a field of the configuration; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def print_notes(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def print_scores(title: str, rows: dict[str, dict[str, float]]) -> None:
    width = max(map(len, (title, *rows)))
    typer.echo(f"{title:<{width}}" + "".join(f"{name.removeprefix('R@1 '):>9}" for name in metrics.SCORES))
    for name, scores in rows.items():
        typer.echo(f"{name:<{width}}" + "".join(f"{scores[score]:>9.4f}" for score in metrics.SCORES))


def moment_text(found: Found, duration: float | None) -> str:
    digits, unit = (3, "of the video") if duration is None else (1, "s")
    return f"{found.start:.{digits}f} to {found.end:.{digits}f} {unit}"


def picture(found: Found, alpha: float, duration: float | None, true: tuple[float, float] | None = None) -> bytes:
    """A PNG of the Gaussian and the moment over time; ``duration`` and the ``true`` moment in seconds."""
    return plot.localizations([plot.Localization(found.query, found.center, found.width, alpha, duration, true)])


def chosen_device(device: Device) -> torch.device:
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    if not available or device is Device.cpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # which torchrun sets


def chosen_precision(precision: Precision, device: Device) -> str:
    if precision is not Precision.auto:
        return precision.value
    return "bf16" if chosen_device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
