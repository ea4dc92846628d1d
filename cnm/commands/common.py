"""Code that commands share: options, the choice of device, precision and model, and the printing of results."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from cnm import checkpoint, metrics, plot
from cnm.data import Sample, Vocabulary
from cnm.data.known_splits import known_split
from cnm.errors import InputError
from cnm.localizer import LocalizedMoment, Proposal
from cnm.models import Model
from cnm.training.run_folder import RunFolder


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    auto = "auto"
    float32 = "float32"
    bf16 = "bf16"
    high = "high"


class Step(str, Enum):
    lean = "lean"
    recompute = "recompute"
    published = "published"


class SplitName(str, Enum):
    train = "train"
    val = "val"
    test = "test"


DeviceOption = Annotated[Device, typer.Option(help="Device to compute on; auto takes the GPU if there is one.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="Dtype of activations; parameters, losses and statistics stay in float32. high: float32, multiplied as "
        "sums of two bfloat16 numbers on CPUs with AMX, and as TF32 on GPUs. auto: bf16 on GPUs that have it, else "
        "float32; a resumed run keeps its precision."
    ),
]


def _checkpoint_file(path: Path) -> Path:
    """Resolves a run's folder to its best checkpoint, or to its last one if no best was chosen."""
    run = RunFolder(path)
    if not run.path.is_dir():
        return path
    for file in (run.best, run.last):
        if file.is_file():
            print_notes([f"{path} is a run's folder: {file} is taken"])
            return file
    raise InputError(f"{path}: is a folder without {run.best.name} or {run.last.name}; give a checkpoint or a run")


CheckpointOption = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        callback=_checkpoint_file,
        help="A checkpoint: of a run (last.pt, best.pt, or its folder), or a published one.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder from which the configuration's relative paths (feature_path, train_data, ...) start; default: the "
        "working directory."
    ),
]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changes a field of the configuration; may be repeated."),
]
MasksOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of draws of masked words over which the score of a proposal is averaged; for models with several.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def program() -> list[str]:
    """Returns how this command was started, for printed commands: ``cnm`` alone needs an activated environment."""
    script = Path(sys.argv[0])
    if script.name == "cnm":
        return ["cnm"] if shutil.which("cnm") == str(script.absolute()) else [str(script)]
    return [sys.executable, "-m", "cnm"] if script.name == "__main__.py" else ["cnm"]


def print_notes(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def split_title(name: str, samples: Sequence[Sample]) -> str:
    known = known_split(samples)
    return f"{name} split, {len(samples):,} sentences" + (f" ({known})" if known else "")


def print_scores(title: str, rows: dict[str, dict[str, float]], moments: int = 1) -> None:
    """Prints R@1 and mIoU of each row; below, for rows that have them, those of the best of ``moments``, or five."""
    _print_table(title, rows, metrics.SCORES)
    of_five = {name: scores for name, scores in rows.items() if metrics.TOP_SCORES[0] in scores}
    if of_five:
        _print_table(f"best of {min(metrics.TOP, moments)} moments", of_five, metrics.TOP_SCORES)


def _print_table(title: str, rows: dict[str, dict[str, float]], names: tuple[str, ...]) -> None:
    width = max(map(len, (title, *rows)))
    typer.echo(f"{title:<{width}}" + "".join(f"{name.split(' ')[-1]:>9}" for name in names))
    for name, scores in rows.items():
        typer.echo(f"{name:<{width}}" + "".join(f"{scores[score]:>9.4f}" for score in names))


def moment_text(found: LocalizedMoment | Proposal, duration: float | None) -> str:
    digits, unit = (3, "of the video") if duration is None else (1, "s")
    return f"{found.start:.{digits}f} to {found.end:.{digits}f} {unit}"


def picture(
    found: LocalizedMoment, model: Model, duration: float | None, true: Sequence[tuple[float, float]] = ()
) -> bytes:
    """Draws the Gaussians and the moment over time to a PNG; ``duration`` and the ``true`` moments are seconds."""
    others = tuple((other.center, other.width) for other in found.proposals[1:])
    item = plot.Localization(
        found.query, found.center, found.width, model.alpha, duration, true, model.min_width, others
    )
    return plot.localizations([item])


def chosen_device(device: Device) -> torch.device:
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    if not available or device is Device.cpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun sets it


def chosen_precision(precision: Precision, device: Device) -> str:
    if precision is not Precision.auto:
        return precision.value
    return "bf16" if chosen_device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def stored_vocabulary(path: Path) -> Vocabulary | None:
    """Reads the vocabulary in a checkpoint; published checkpoints hold none."""
    state = checkpoint.load(path).get("vocabulary")
    return None if state is None else Vocabulary.from_state(state)
