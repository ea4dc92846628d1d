"""The command line. Exit codes: 0 done, 2 wrong input (one line says what), 130 or 143 interrupted."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from typer.core import TyperGroup

from cnm import checkpoint, configs, metrics
from cnm.config import CNMConfig
from cnm.data import Vocabulary, load_features, load_vocabulary, open_split, plant
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.evaluation import check_vocabulary, evaluate
from cnm.files import replace_file
from cnm.localization import Found, localize_query, picture
from cnm.models.cnm import CNM, PRECISIONS
from cnm.training.run_folder import RunFolder
from cnm.training.trainer import Interrupted, Result, Trainer
from cnm_kernels import BackendUnavailable, registry

ALL_WORDS = 1_000_000  # more than any vocabulary file counts


class _Commands(TyperGroup):
    """Turns what a user can mend into one line, and interruptions into their exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, BackendUnavailable) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:  # PyTorch has no exception of its own for a CPU's memory
            if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
                raise
            reason = " ".join(str(error).split()) or "an allocation failed"
            typer.echo(
                f"error: not enough memory ({reason}); lower train.batch_size or dataset.max_num_frames, try --step "
                f"recompute, or take a smaller model",
                err=True,
            )
            raise typer.Exit(2) from None
        except Interrupted as stop:
            typer.echo(str(stop), err=True)
            raise typer.Exit(128 + stop.signum) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


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


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

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


def main() -> None:
    """Entry point of the ``cnm`` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"cnm {version('cnm-kernels')}")
        except PackageNotFoundError:
            typer.echo("cnm (not installed)")
        raise typer.Exit


@app.callback()
def cnm(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Finds when a sentence happens in a video, trained on pairs of videos and sentences alone (CNM, AAAI 2022).

    Start with `cnm demo`, which needs no data. `cnm COMMAND --help` explains each command.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for checkpoints, metrics and pictures.")] = Path("cnm-demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training videos.")] = None,
    videos: Annotated[int | None, typer.Option(min=4, help="Training videos to generate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the generated videos and of the training.")] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Trains on generated videos, evaluates on held-out ones and localizes one sentence. Needs no data.

    Training sees videos and sentences, never a time. Takes less than three minutes on two cores.

    \b
    Example:
      cnm demo --out cnm-demo
      cnm demo --out quick --epochs 1 --videos 24     (a look at what it does, too short to learn)
    """
    values = {"train.max_num_epochs": epochs, "dataset.num_videos": videos, "dataset.seed": seed, "train.seed": seed}
    changes = [f"{name}={value}" for name, value in values.items() if value is not None]
    RunFolder(out).check_new()
    config = configs.resolve("synthetic", changes)
    trainer = Trainer(config, out, device=_device(device), precision=_precision(precision, device))
    result = _train(trainer)

    model, vocabulary = _load(result.checkpoint, _device(device))
    split = trainer.test_split
    sample = split.samples[0]
    features = split.batch(np.arange(1)).frames[0].float().numpy()
    np.save(out / "example.npy", features)
    found = localize_query(model, vocabulary, features, sample.sentence)
    plot_path = out / "pictures" / "example.png"
    replace_file(plot_path, picture(found, model.alpha, sample.duration, sample.moment))
    start, end = sample.moment
    typer.echo(
        f'\n"{sample.sentence}"\n  found: {_moment(found, sample.duration)}\n  true:  {start:.1f} s to {end:.1f} s'
    )
    command = ["cnm", "localize", "--checkpoint", str(result.checkpoint), "--features", str(out / "example.npy")]
    command += ["--query", sample.sentence, "--duration", f"{sample.duration:g}"]
    typer.echo(f"\nThe same from the command line:\n  {shlex.join(command)}\nPictures: {out / 'pictures'}")


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Option(help=f"A JSON file in the published layout, or a packaged name: {', '.join(configs.names())}."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-folder",  # torchrun takes --run for an option of its own
            help="A new folder for the run; otherwise train.model_saved_path of the configuration.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted run to continue; --config is then not needed.")
    ] = None,
    changes: ChangesOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for --set train.seed=SEED.")] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    step: Annotated[
        Step | None,
        typer.Option(
            help="lean (the default); recompute: in half the memory, a quarter slower; published: without rewrites."
        ),
    ] = None,
    skip_nonfinite: Annotated[
        bool,
        typer.Option(
            "--skip-nonfinite",
            help="Leave out updates whose loss or gradients are not finite, and count them, instead of stopping.",
        ),
    ] = False,
) -> None:
    """Trains a model; evaluates after each epoch on the validation split and at the end on the test split.

    The run's folder holds config.json, metrics.jsonl, last.pt, best.pt, pictures, and TensorBoard events where
    tensorboard is installed. Ctrl-C or SIGTERM saves after the current update; --resume continues bit for bit.

    \b
    Example:
      cnm train --config charades_i3d --run runs/first
      cnm train --config charades_i3d --run runs/small --set train.batch_size=64 --set train.max_num_epochs=5
      cnm train --resume runs/first
      cnm train --resume runs/first --set train.max_num_epochs=80     (longer than first planned)
      torchrun --nproc-per-node 4 -m cnm train --config charades_i3d --run-folder runs/four     (four GPUs)
    """
    changes = [*(changes or []), *([] if seed is None else [f"train.seed={seed}"])]
    options: dict[str, Any] = {
        "device": _device(device),
        "step": None if step is None else step.value,
        "skip_nonfinite": skip_nonfinite,
    }
    if resume is not None and run is not None and run != resume:
        raise InputError(f"--run {run}: a resumed run stays in its folder; leave --run out")
    if resume is None and config is None:
        raise InputError("--config is missing: name a configuration file, or --resume a run")
    with Group.joined(options["device"]) as group:
        if resume is not None:
            RunFolder(resume).check_resumable()
            chosen = _resumed(resume, config, changes)
            kept = None if precision is Precision.auto else precision.value
            trainer = Trainer(chosen, resume, resume=True, precision=kept, group=group, **options)
        else:
            assert config is not None
            chosen = configs.resolve(config, changes)
            folder = run or Path(chosen.train.model_saved_path)
            if group is None or group.rank == 0:
                RunFolder(folder).check_new()
            trainer = Trainer(chosen, folder, precision=_precision(precision, device), group=group, **options)
        _train(trainer)


@app.command("evaluate")
def evaluate_command(
    checkpoint_path: CheckpointOption,
    config: Annotated[
        str | None,
        typer.Option(help="A JSON file or packaged name: where the data is; otherwise as stored in the checkpoint."),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Which sentences to localize.")] = SplitName.test,
    changes: ChangesOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    as_json: JsonOption = False,
) -> None:
    """Scores a checkpoint: R@1 at five IoU thresholds and mIoU, with baselines that need no video beside.

    \b
    Example:
      cnm evaluate --checkpoint runs/first/best.pt --config charades_i3d
    """
    model = CNM.from_checkpoint(checkpoint_path, _device(device))
    dtype = model.compute_dtype = PRECISIONS[_precision(precision, device)]
    if config is not None:
        chosen = configs.resolve(config, changes or [])
    else:
        chosen = configs.change(model.config.to_dict(), changes or [], str(checkpoint_path))
    data = open_split(chosen.dataset, split.value, progress=not as_json, dtype=dtype or torch.float32)
    stored = checkpoint.load(checkpoint_path).get("vocabulary", {}).get("words")
    check_vocabulary(model, data.vocabulary.words, stored)
    found = evaluate(model, data, chosen.train.batch_size)
    baselines = metrics.baselines(data.moments)
    if as_json:
        content = {
            "checkpoint": str(checkpoint_path),
            "split": split.value,
            "sentences": len(data),
            "scores": found.scores,
            "baselines": baselines,
            "notes": data.notes,
        }
        typer.echo(json.dumps(content))
        return
    _print_notes(data.notes)
    _print_scores(f"{split.value} split, {len(data):,} sentences", {str(checkpoint_path): found.scores} | baselines)


@app.command()
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
    model, vocabulary = _load(checkpoint_path, _device(device), vocab=vocab)
    dataset = model.config.dataset
    found = localize_query(model, vocabulary, load_features(features, dataset.frame_dim, dataset.max_num_frames), query)
    if plot is not None:
        replace_file(plot, picture(found, model.alpha, duration))
    if as_json:
        seconds = (
            {} if duration is None else {"start_seconds": found.start * duration, "end_seconds": found.end * duration}
        )
        typer.echo(json.dumps(asdict(found) | seconds))
        return
    if found.unknown:
        typer.echo(f"note: words the model does not know are ignored: {', '.join(found.unknown)}", err=True)
    typer.echo(_moment(found, duration))


@app.command("plant")
def plant_command(
    annotations: Annotated[list[Path], typer.Option(help="An annotation file; repeat for train and test.")],
    vocab: Annotated[Path, typer.Option(help="Word vectors in the published format (glove.pkl).")],
    output: Annotated[Path, typer.Option(help="The HDF5 file to write; must not exist.")],
    frame_dim: Annotated[int, typer.Option(min=1, help="Width of a feature, as in dataset.frame_dim.")] = 256,
    word_dim: Annotated[int, typer.Option(min=1, help="Width of a word vector, as in dataset.word_dim.")] = 300,
    signal: Annotated[float, typer.Option(min=0, help="Strength of the signal; the noise has strength 1.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random vectors and the noise.")] = 0,
) -> None:
    """Writes made-up features in which real annotations can be found: for training without the real features.

    Each annotated moment carries a signal made from the content words of its sentence, under noise.

    \b
    Example:
      cnm plant --annotations train.json --annotations test.json --vocab glove.pkl --output planted.hdf5
      cnm train --config charades_i3d --set dataset.feature_path=planted.hdf5 --set dataset.frame_dim=256
    """
    if output.exists():
        raise InputError(f"{output}: exists and is not written over; choose another --output")
    vocabulary = Vocabulary.from_pickle(vocab, ALL_WORDS, word_dim)
    count = plant(annotations, vocabulary, output, frame_dim=frame_dim, signal=signal, seed=seed, progress=True)
    typer.echo(
        f"{output}: features of {count:,} videos; train on them with --set dataset.feature_path={output} "
        f"--set dataset.frame_dim={frame_dim}"
    )


def _resumed(folder: Path, config: str | None, changes: list[str]) -> CNMConfig | None:
    """The configuration asked for in a resumed run, or None: as it was."""
    if config is not None:
        return configs.resolve(config, changes)
    if not changes:
        return None
    path = RunFolder(folder).last
    return configs.change(checkpoint.load(path)["config"], changes, str(path))


def _train(trainer: Trainer) -> Result:
    """Trains, with what runs where said before and the scores after."""
    if not trainer.writes:  # process 0 speaks for all
        return trainer.train()
    echo = lambda line: typer.echo(line, err=True)  # noqa: E731
    echo(_machine(trainer.device, trainer.options["precision"]))
    sizes = ", ".join(f"{split.name} {len(split):,}" for split in trainer.splits)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    echo(f"sentences: {sizes}; vocabulary {len(trainer.train_split.vocabulary):,}; parameters {parameters:,}")
    for split in trainer.splits:
        _print_notes(split.notes)
    if trainer.val_split is None:
        echo("no validation split is configured: the last epoch is the result")
    elif not trainer.chooses_best:
        echo("validation and test are the same file: no epoch is chosen by it, the last one is the result")
    result = trainer.train()
    title = f"test split, {len(trainer.test_split):,} sentences"
    _print_scores(title, {f"{result.checkpoint} (epoch {result.epoch})": result.scores} | result.baselines)
    return result


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _print_scores(title: str, rows: dict[str, dict[str, float]]) -> None:
    width = max(map(len, (title, *rows)))
    typer.echo(f"{title:<{width}}" + "".join(f"{name.removeprefix('R@1 '):>9}" for name in metrics.SCORES))
    for name, scores in rows.items():
        typer.echo(f"{name:<{width}}" + "".join(f"{scores[score]:>9.4f}" for score in metrics.SCORES))


def _moment(found: Found, duration: float | None) -> str:
    scale, unit = (1.0, "of the video") if duration is None else (duration, "s")
    digits = 3 if duration is None else 1
    return f"{found.start * scale:.{digits}f} to {found.end * scale:.{digits}f} {unit}"


def _device(device: Device) -> torch.device:
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    if not available or device is Device.cpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # which torchrun sets


def _precision(precision: Precision, device: Device) -> str:
    if precision is not Precision.auto:
        return precision.value
    return "bf16" if _device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def _machine(device: torch.device, precision: str) -> str:
    """What computes: device, threads, precision, and the kernels' backends."""
    chosen: dict[str, list[str]] = {}
    for op in registry.OPS:
        chosen.setdefault(registry.choice(op, device.type, torch.float32), []).append(op)
    most = max(chosen, key=lambda backend: len(chosen[backend]))
    rest = "".join(f"; {backend} for {', '.join(ops)}" for backend, ops in chosen.items() if backend != most)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"device: {name}; {precision}; kernels: {most}{rest}"


def _load(path: Path, device: torch.device, *, vocab: Path | None = None) -> tuple[CNM, Vocabulary]:
    """A checkpoint's model, and its vocabulary: stored with it, or else in ``vocab`` or its configuration."""
    model = CNM.from_checkpoint(path, device)
    content = checkpoint.load(path)
    if vocab is None and "vocabulary" in content:
        try:
            vocabulary = Vocabulary.from_state(content["vocabulary"])
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: its vocabulary cannot be read; write the checkpoint anew") from None
    else:
        dataset = model.config.dataset
        if vocab is not None:
            dataset = dataset.model_copy(update={"vocab_path": str(vocab)})
        vocabulary = load_vocabulary(dataset)
    check_vocabulary(model, vocabulary.words)
    return model, vocabulary


if __name__ == "__main__":
    main()
