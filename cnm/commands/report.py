"""``cnm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnm.commands.common import Device, DeviceOption, SplitName, chosen_device, print_notes
from cnm.files import prepare_output, replace_file


def report_command(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; default: RUN/report.html.")] = None,
    split: Annotated[SplitName, typer.Option(help="Split whose sentences are shown and scored.")] = SplitName.test,
    sentences: Annotated[
        int, typer.Option(min=1, help="Number of sentences to show, evenly from the best to the worst.")
    ] = 200,
    device: DeviceOption = Device.auto,
) -> None:
    """Writes a run as one HTML page: curves, scores beside baselines, sentences with their Gaussians, configuration.

    \b
    Example:
      cnm report runs/first
    """
    from cnm.report import write_report
    from cnm.training.finished import FinishedRun

    path = output or run / "report.html"
    finished = FinishedRun(run, chosen_device(device))
    prepare_output(path)
    data = finished.split(split.value)
    print_notes(data.notes)
    replace_file(path, write_report(finished, data, sentences).encode())
    typer.echo(f"{path}: open it in a browser")
