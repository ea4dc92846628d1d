"""``cnm train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cnm import checkpoint, configs
from cnm.commands.common import (
    ChangesOption,
    DataDirOption,
    Device,
    DeviceOption,
    Precision,
    PrecisionOption,
    Step,
    chosen_device,
    chosen_precision,
    print_notes,
    print_scores,
    split_title,
)
from cnm.config import Config
from cnm.data.data_dir import with_data_dir
from cnm.data.tagging import notes as notes_on_tagging
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.precision import notes as notes_on_precision
from cnm.training.run_folder import RunFolder
from cnm.training.trainer import Result, Trainer
from cnm_kernels import registry


def train(
    config: Annotated[
        str | None,
        typer.Option(help=f"A JSON file in the published layout, or a packaged name: {', '.join(configs.names())}."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-folder",  # torchrun would take --run as its own option
            help="New folder for the run; default: train.model_saved_path of the configuration.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted run to continue, without --config.")
    ] = None,
    changes: ChangesOption = None,
    data_dir: DataDirOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for --set train.seed=SEED.")] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    step: Annotated[
        Step | None,
        typer.Option(
            help="lean (the default); recompute: half the memory, an eighth slower; published: no work is left out."
        ),
    ] = None,
    skip_nonfinite: Annotated[
        bool | None,
        typer.Option(
            help="Skip and count updates whose loss or gradients are not finite, instead of stopping (the default of a "
            "new run; a resumed one does as before).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Trains a model; evaluates after each epoch on the validation split and at the end on the test split.

    The run's folder holds config.json, metrics.jsonl, last.pt, best.pt (where a validation split, other than the test
    split, chooses it), pictures, and TensorBoard events where tensorboard is installed. Ctrl-C or SIGTERM saves after
    the current update; --resume continues bit for bit.

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
        "device": chosen_device(device),
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
            trainer = Trainer(chosen, resume, resume=True, precision=kept, group=group, data_dir=data_dir, **options)
        else:
            assert config is not None
            chosen = with_data_dir(configs.resolve(config, changes), data_dir)
            folder = run or Path(chosen.train.model_saved_path)
            if group is None or group.rank == 0:
                RunFolder(folder).check_new()
            trainer = Trainer(chosen, folder, precision=chosen_precision(precision, device), group=group, **options)
        train_and_report(trainer)


def _resumed(folder: Path, config: str | None, changes: list[str]) -> Config | None:
    """Returns the configuration that a resumed run is asked for, or None for its own."""
    if config is not None:
        return configs.resolve(config, changes)
    if not changes:
        return None
    path = RunFolder(folder).last
    return configs.change(checkpoint.load(path)["config"], changes, str(path))


def train_and_report(trainer: Trainer) -> Result:
    """Prints the device and kernels, trains, and prints the scores."""
    if not trainer.writes:  # only process 0 prints
        return trainer.train()
    echo = lambda line: typer.echo(line, err=True)  # noqa: E731
    echo(_machine(trainer.device, trainer.options["precision"]))
    print_notes(_fallback(trainer.device))
    print_notes(notes_on_precision(trainer.options["precision"], trainer.device))
    sizes = ", ".join(f"{split.name} {len(split):,}" for split in trainer.splits)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    echo(f"sentences: {sizes}; vocabulary {len(trainer.train_split.vocabulary):,}; parameters {parameters:,}")
    print_notes(notes_on_tagging())
    for split in trainer.splits:
        print_notes(split.notes)
    data = trainer.config.dataset
    if trainer.val_split is None:
        echo(f"{_lacks(data.val_data, 'validation')}: the last epoch is the result")
    elif not trainer.chooses_best:
        echo("validation and test are the same file: no epoch is chosen by it, the last one is the result")
    test = trainer.test_split
    scored = test is not None and test.scored
    if not scored:
        echo(f"{_lacks(data.test_data, 'test')}: the result is not scored")
    result = trainer.train()
    if test is None or not scored:
        echo(f"the result is {result.checkpoint} (epoch {result.epoch})")
        return result
    title = split_title("test", test.samples)
    rows = {f"{result.checkpoint} (epoch {result.epoch})": result.scores} | result.baselines
    print_scores(title, rows, trainer.model.num_proposals)
    return result


def _lacks(path: str | None, split: str) -> str:
    return f"no {split} split is configured" if path is None else f"{path}: no sentence has a moment"


def _fallback(device: torch.device) -> list[str]:
    """Notes why PyTorch's operations replace the kernels, unless the user asked for them."""
    preferred, op = next(iter(registry.BACKENDS)), registry.OPS[0]
    if os.environ.get(registry.ENVIRONMENT_VARIABLE) or registry.choice(op, device.type, torch.float32) != "torch":
        return []
    reason = registry.unavailable(op, preferred, device.type, torch.float32)
    return [f"PyTorch's operations run in place of the kernels, more slowly: {reason}"]


def _machine(device: torch.device, precision: str) -> str:
    """Describes the device, threads, precision, and the kernels' backends."""
    chosen: dict[str, list[str]] = {}
    for op in registry.OPS:
        chosen.setdefault(registry.choice(op, device.type, torch.float32), []).append(op)
    most = max(chosen, key=lambda backend: len(chosen[backend]))
    rest = "".join(f"; {backend} for {', '.join(ops)}" for backend, ops in chosen.items() if backend != most)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"device: {name}; {precision}; kernels: {most}{rest}"
