"""Reading and writing checkpoints."""

from __future__ import annotations

import io
import logging
import pickle
import re
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError

from cnm.checkpoint_schema import Checkpoint, described
from cnm.config import MAX_VALUES
from cnm.errors import InputError
from cnm.files import check_plain, replace_file

NOT_CONFIGURATION = ("vote",)  # options of the published CPL command that it keeps in the configuration
WRAPPERS = ("module.", "_orig_mod.")
_log = logging.getLogger("cnm")
_REMEDY = "give a file written by `cnm train` or a published CNM or CPL checkpoint"


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all.

    Args:
        content: the published keys ``num_updates``, ``config`` (published layout) and ``model_parameters``, and ours on
            top; tensors and plain values only, so that ``load`` takes them back.

    Raises:
        InputError: the file cannot be written, because the disk is full for one; a checkpoint of that name stays as it
            was.
    """
    buffer = io.BytesIO()  # whole in memory first: torch's own writer hides why the disk refused
    torch.save(content, buffer)
    replace_file(path, buffer.getbuffer())


def load(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, ours or a published one, on the CPU; nothing in it is executed.

    Raises:
        InputError: the file is missing, damaged, no checkpoint, or holds what could run code.
    """
    try:
        with open(path, "rb") as file:
            content = _read(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a checkpoint, it holds a {type(content).__name__}; {_REMEDY}")
    check_plain(content.get("config"), f"{path}: config", MAX_VALUES)
    if isinstance(content.get("config"), dict):
        content["config"] = {name: value for name, value in content["config"].items() if name not in NOT_CONFIGURATION}
    try:
        checked = Checkpoint.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: is not a checkpoint of ours, {described(error)}; {_REMEDY}") from None
    content["model_parameters"], prefix = _unwrapped(checked.model_parameters)
    if prefix:
        _say_once(f"{path}: its parameters were saved from a wrapped model, {prefix!r} before their names is left out")
    return content


def _unwrapped(parameters: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Parameters without what torch.compile and DistributedDataParallel put before all names, and that prefix."""
    prefix = ""
    while parameters and (wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in parameters)), None)):
        parameters = {name.removeprefix(wrapper): value for name, value in parameters.items()}
        prefix += wrapper
    return parameters, prefix


@cache
def _say_once(line: str) -> None:
    _log.warning(line)


def _read(path: str | Path, file: IO[bytes]) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                declared = sum(entry.file_size for entry in archive.infolist())
                if declared > file.seek(0, io.SEEK_END):  # torch compresses nothing
                    raise InputError(f"{path}: declares {declared} bytes, more than it holds; {_REMEDY}")
                damaged = archive.testzip()  # torch.load would not notice a changed byte
            if damaged is not None:
                raise InputError(f"{path}: is damaged ({damaged} does not match its checksum); copy it again")
        file.seek(0)
        with warnings.catch_warnings():  # torch warns of unusual pickle protocols
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refused, it asks for {unsafe[1]}, which could run code" if unsafe else "is not a checkpoint"
        raise InputError(f"{path}: {reason}; {_REMEDY}") from None
    except InputError:
        raise
    except Exception:  # whatever torch's reader stumbles over, the file is to blame
        raise InputError(f"{path}: is not a checkpoint, or is cut short; {_REMEDY}") from None
