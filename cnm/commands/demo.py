"""``cnm demo``: training on generated videos."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cnm import configs
from cnm.commands.common import (
    Device,
    DeviceOption,
    Precision,
    PrecisionOption,
    chosen_device,
    chosen_precision,
    moment_text,
    picture,
    program,
)
from cnm.commands.train import train_and_report
from cnm.files import replace_file
from cnm.localizer import Localizer
from cnm.training.run_folder import RunFolder
from cnm.training.trainer import Trainer


def demo(
    out: Annotated[Path, typer.Option(help="New folder for checkpoints, metrics and pictures.")] = Path("cnm-demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training videos.")] = None,
    videos: Annotated[int | None, typer.Option(min=4, help="Training videos to generate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the generated videos and of the training.")] = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Trains on generated videos, evaluates on held-out ones and localizes one sentence. Needs no data.

    Training reads videos and sentences, but no times. It takes less than three minutes on two cores.

    \b
    Example:
      cnm demo --out cnm-demo
      cnm demo --out quick --epochs 1 --videos 24     (a look at what it does, too short to learn)
    """
    values = {"train.max_num_epochs": epochs, "dataset.num_videos": videos, "dataset.seed": seed, "train.seed": seed}
    changes = [f"{name}={value}" for name, value in values.items() if value is not None]
    RunFolder(out).check_new("--out")
    config = configs.resolve("synthetic", changes)
    trainer = Trainer(config, out, device=chosen_device(device), precision=chosen_precision(precision, device))
    result = train_and_report(trainer)

    localizer = Localizer.from_checkpoint(result.checkpoint, chosen_device(device))
    split = trainer.test_split
    assert split is not None  # of generated data there is always one
    sample = split.samples[0]
    features = split.batch(np.arange(1)).frames[0].float().numpy()
    np.save(out / "example.npy", features)
    [found] = localizer.find(localizer.encode(features, duration=sample.duration), [sample.sentence])
    plot_path = out / "pictures" / "example.png"
    replace_file(plot_path, picture(found, localizer.model, sample.duration, sample.windows))
    [(start, end)] = sample.windows
    typer.echo(
        f'\n"{sample.sentence}"\n  found: {moment_text(found, sample.duration)}\n  true:  {start:.1f} s to {end:.1f} s'
    )
    command = [*program(), "localize", "--checkpoint", str(result.checkpoint), "--features", str(out / "example.npy")]
    command += ["--query", sample.sentence, "--duration", f"{sample.duration:g}"]
    typer.echo(f"\nThe same from the command line:\n  {shlex.join(command)}\nPictures: {out / 'pictures'}")
