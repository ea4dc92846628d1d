"""Reading the published vocabulary pickle without running what a pickle can run.

A pickle may name any importable function and call it. This reader admits only what such a file holds (dictionaries,
lists, strings, numbers, ``collections.Counter`` and numpy arrays) and refuses the rest by name.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cnm.errors import InputError


def _empty_array(subtype: Any, shape: Any, dtype: Any) -> np.ndarray:
    """Stands in for numpy's ``_reconstruct``: an empty array that the pickle's state then fills."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("an array with an unusual layout")
    return np.ndarray((0,), dtype)


def _latin1(text: Any, encoding: Any) -> bytes:
    """Stands in for ``_codecs.encode``, which old pickles use for the bytes of an array."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: Any, data: Any = None) -> Any:
    """Stands in for numpy's ``scalar``: one number."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a scalar that is no number")
    return np.frombuffer(data, dtype, count=1)[0]


def _array(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Stands in for numpy's ``_frombuffer``, which pickles of protocol 5 use."""
    if not isinstance(buffer, (bytes, bytearray)) or not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError("an array that holds no numbers")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


_ADMITTED = {
    ("collections", "Counter"): collections.Counter,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ADMITTED[_module, "_reconstruct"] = _empty_array
    _ADMITTED[_module, "scalar"] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _ADMITTED[_module, "_frombuffer"] = _array


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a vocabulary never does") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle of plain data; nothing in it is executed.

    Raises:
        InputError: the file cannot be read, is no pickle, or holds more than plain data.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused as a vocabulary pickle: {error}; get the file from a trusted source"
        ) from None
    except Exception as error:  # a truncated or malformed pickle can raise almost anything
        raise InputError(f"{path}: is no readable pickle ({type(error).__name__}: {error}); fetch it again") from None
