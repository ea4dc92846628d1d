"""The command line. Exit codes: 0 done, 2 wrong input (one line says what), 130 or 143 interrupted."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from cnm.commands.app import app_command
from cnm.commands.config import config_command
from cnm.commands.demo import demo
from cnm.commands.evaluate import evaluate_command
from cnm.commands.extract import extract_command
from cnm.commands.features import features_app
from cnm.commands.localize import localize
from cnm.commands.plant import plant_command
from cnm.commands.report import report_command
from cnm.commands.score import score_command
from cnm.commands.train import train
from cnm.commands.vocabulary import vocabulary_command
from cnm.errors import InputError
from cnm.files import printable
from cnm.training.trainer import Interrupted
from cnm_kernels import BackendUnavailable


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
        except OSError as error:  # what no reader or writer turned into a line of its own
            if error.errno == errno.EPIPE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: {place}{error.strerror or error}; check path, permissions and space", err=True)
            raise typer.Exit(2) from None
        except Interrupted as stop:
            typer.echo(str(stop), err=True)
            raise typer.Exit(128 + stop.signum) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main() -> None:
    """Entry point of the ``cnm`` command."""
    printable(sys.stdout)
    code = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except OSError as error:  # the output itself cannot be written
        code = _lost_output(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _lost_output(error)
    sys.exit(code)


def _lost_output(error: OSError) -> int:
    """The exit code where nobody reads the output, or its disk is full; what is left of it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    with suppress(OSError):
        print(f"error: the output cannot be written ({error.strerror or error}); make room there", file=sys.stderr)
    return 2


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
    """Finds when a sentence happens in a video, trained on pairs of videos and sentences alone (CNM and CPL).

    Start with `cnm demo`, which needs no data. `cnm COMMAND --help` explains each command.
    """


COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help
    "demo": demo,
    "train": train,
    "evaluate": evaluate_command,
    "localize": localize,
    "score": score_command,
    "extract": extract_command,
    "report": report_command,
    "app": app_command,
    "plant": plant_command,
    "vocabulary": vocabulary_command,
    "config": config_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(features_app, name="features")


if __name__ == "__main__":
    main()
