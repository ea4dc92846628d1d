"""Reads one array from a ``.npy`` or ``.npz`` file. Never unpickles, and checks the size before reading."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from cnm.errors import InputError

MAX_BYTES = 2 << 30  # of one video; a tiny file can declare a huge array, and reading it would fill the memory
KEY = "features"  # the array to read from an .npz with several
_KINDS = (  # first bytes of files that users mistake for features
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a .npy array"),
    (b"PK", "a ZIP archive (.npz, or a PyTorch file)"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x80", "a pickle, which is not read; save its arrays with numpy.save"),
    (b"<", "a web page or XML, such as a server sends instead of a file"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself"),
)


def what_it_is(path: str | Path) -> str:
    """Describes the file at a path for messages; its first bytes tell the format."""
    if Path(path).is_dir():
        return "a folder"
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    if not start:
        return "an empty file"
    return next((kind for magic, kind in _KINDS if start.startswith(magic)), "a file of no known kind")


def array_shape(path: str | Path) -> tuple[int, ...]:
    """Returns the shape of the array in the file; reads only the header.

    Raises:
        InputError: as ``read_array``.
    """
    with _opened(path) as file:
        return _header(file, path)[0]


def read_array(path: str | Path) -> np.ndarray:
    """[n, width] float32 from ``.npy``, or from ``.npz`` with one array or one called ``features``.

    Raises:
        InputError: the file is missing, damaged, too large, or holds anything but finite numbers [n, width].
    """
    with _opened(path) as file:
        shape, fortran, dtype = _header(file, path)
        count = math.prod(shape)
        content = file.read(count * dtype.itemsize)
        if len(content) != count * dtype.itemsize:
            raise InputError(f"{path}: is not an array of numbers (cut short); fetch it again")
        frames = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):  # overflow gives infinity; the check below refuses it
        frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise InputError(f"{path}: the features hold NaN or infinity; extract them again")
    return frames


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens the ``.npy`` data: the file itself, or a member of an ``.npz`` archive."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                file.seek(0)
                yield file
                return
            with zipfile.ZipFile(file) as archive, archive.open(_member(archive, path)) as member:
                yield member
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except Exception as error:  # zipfile and numpy's header parser fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: is not an array of numbers ({reason}; it is {what_it_is(path)}); save it with numpy.save"
        ) from None


def _member(archive: zipfile.ZipFile, path: str | Path) -> str:
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    if f"{KEY}.npy" in names:
        return f"{KEY}.npy"
    if len(names) != 1:
        found = ", ".join(name.removesuffix(".npy") for name in names[:5]) or "none"
        raise InputError(f"{path}: holds {len(names)} arrays ({found}) and none called {KEY}; save one per file")
    return names[0]


def _header(file: Any, path: str | Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about headers of old writers
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise InputError(f"{path}: is not an array of numbers (it holds Python objects); save it with numpy.save")
    if len(shape) != 2 or min(shape) < 1 or dtype.kind not in "fiu":
        raise InputError(f"{path}: holds {dtype} of shape {list(shape)}, not numbers [frames, width]")
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise InputError(
            f"{path}: declares {list(shape)} numbers, where {MAX_BYTES >> 20} MB is the most; the file is damaged or "
            f"made to fill the memory"
        )
    return shape, fortran, dtype
