"""``cnm app``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnm.commands.common import Device, DeviceOption, chosen_device
from cnm.errors import InputError


def app_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold such folders.")],
    videos: Annotated[
        Path | None, typer.Option(help="A folder of the videos to play, named as in the annotations.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the page; default: the first free one.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Serves a web page to try runs: choose a video, type a sentence, see the moment. Needs `cnm-kernels[app]`.

    Only this machine can open the page. Ctrl-C ends it.

    \b
    Example:
      cnm app runs
      cnm app runs/first --videos Charades_v1_480 --open
    """
    from cnm.app import Answerer, find_runs, serve

    if videos is not None and not videos.is_dir():
        raise InputError(f"--videos {videos}: is not a folder; give the folder of the video files")
    serve(Answerer(find_runs(runs), videos, chosen_device(device)), port, open_browser=open_browser)
