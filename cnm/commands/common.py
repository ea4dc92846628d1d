"""What the commands share: options, how a device, a precision and a model are chosen, how results are printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from cnm import checkpoint, metrics
from cnm.data import Sample, Vocabulary, load_vocabulary
from cnm.data.known_splits import known_split
from cnm.errors import InputError
from cnm.evaluation import check_vocabulary
from cnm.localization import Found
from cnm.models.cnm import CNM


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


def split_title(name: str, samples: Sequence[Sample]) -> str:
    known = known_split(samples)
    return f"{name} split, {len(samples):,} sentences" + (f" ({known})" if known else "")


def print_scores(title: str, rows: dict[str, dict[str, float]]) -> None:
    width = max(map(len, (title, *rows)))
    typer.echo(f"{title:<{width}}" + "".join(f"{name.removeprefix('R@1 '):>9}" for name in metrics.SCORES))
    for name, scores in rows.items():
        typer.echo(f"{name:<{width}}" + "".join(f"{scores[score]:>9.4f}" for score in metrics.SCORES))


def moment_text(found: Found, duration: float | None) -> str:
    scale, unit = (1.0, "of the video") if duration is None else (duration, "s")
    digits = 3 if duration is None else 1
    return f"{found.start * scale:.{digits}f} to {found.end * scale:.{digits}f} {unit}"


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


def load_model(path: Path, device: torch.device, *, vocab: Path | None = None) -> tuple[CNM, Vocabulary]:
    """A checkpoint's model, and its vocabulary: stored with it, or else in ``vocab`` or its configuration."""
    model = CNM.from_checkpoint(path, device)
    content = checkpoint.load(path)
    if vocab is None and content.get("vocabulary") is not None:
        vocabulary = Vocabulary.from_state(content["vocabulary"])
        width, expected = vocabulary.vectors.shape[1], model.config.dataset.word_dim
        if width != expected:
            raise InputError(
                f"{path}: its word vectors are {width} wide, but its dataset.word_dim is {expected}; write it anew"
            )
    else:
        dataset = model.config.dataset
        if vocab is not None:
            dataset = dataset.model_copy(update={"vocab_path": str(vocab)})
        vocabulary = load_vocabulary(dataset)
    check_vocabulary(model, vocabulary.words)
    return model, vocabulary
