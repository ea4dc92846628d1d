"""Reads the published vocabulary pickle without executing code.

A pickle can call any importable function, set attributes of any object that it can name, and give numpy a dtype whose
fields lie outside the array's memory. Therefore a pickle never gets real objects: the few names that a vocabulary needs
(``collections.Counter`` and the constructors of numpy arrays) resolve to stand-ins. A stand-in only records the
arguments of its call; they are checked before an array or a Counter is made. All other names are refused.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnm.errors import InputError

_NUMBER = re.compile(r"[<>=|]?([fiu][1248]|b1)")  # the dtypes that are accepted, in numpy's notation
_MAX_NESTING = 16
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
_EMPTY = (0,)  # the placeholder shape that numpy passes to _reconstruct


class _StandIn:
    """The object that a name in the pickle resolves to: it can be called, and nothing else."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes what a name stands for")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what a name stands for")


class _DType:
    """A numeric dtype; the pickle's state can only set its byte order."""

    __slots__ = ("value",)

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        text = text.decode("latin1") if isinstance(text, bytes) else text
        if not isinstance(text, str) or not _NUMBER.fullmatch(text):
            raise pickle.UnpicklingError(f"it holds an array of {_short(text)}, not of numbers")
        self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 8 and state[2:5] == (None,) * 3 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("it holds an array with an unusual dtype")
        self.value = np.dtype(order + self.value.str[1:])


class _Array:
    """An array under construction: ``_reconstruct`` makes it empty, then the pickle's state fills it."""

    __slots__ = ("value",)

    def __init__(self, subtype: Any, shape: Any, dtype: Any) -> None:
        if subtype is not _NDARRAY or shape != _EMPTY:
            raise pickle.UnpicklingError("it holds an array of an unusual kind")
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], tuple):
            raise pickle.UnpicklingError("it holds an array with an unusual state")
        _, shape, dtype, fortran, data = state
        self.value = _numbers(data, dtype, shape, "F" if fortran else "C")


def _refuse_call(*arguments: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array in an unusual way")


def _numbers(data: Any, dtype: Any, shape: tuple[Any, ...], order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
        raise pickle.UnpicklingError("it holds an array that is not of numbers")
    if not all(type(size) is int and size >= 0 for size in shape) or (
        math.prod(shape) * dtype.value.itemsize != len(data)
    ):
        raise pickle.UnpicklingError(f"it holds an array of shape {_short(shape)} in {len(data)} bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Replaces numpy's ``_frombuffer``, which pickles of protocol 5 use."""
    return _numbers(data, dtype, shape if isinstance(shape, tuple) else (shape,), order)


def _scalar(dtype: Any, data: Any) -> Any:
    """Replaces numpy's ``scalar``: one number."""
    return _numbers(data, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Replaces ``_codecs.encode``: pickles before protocol 3 store bytes as text and encode it."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text encoded as {_short(encoding)}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Replaces ``bytes``: pickles before protocol 3 call it for an empty value."""
    if arguments:
        raise pickle.UnpicklingError("it holds bytes in an unusual way")
    return b""


def _counter(counts: Any = None) -> collections.Counter[Any]:
    if counts is not None and type(counts) is not dict:
        raise pickle.UnpicklingError("it holds a Counter made of something other than counts")
    return collections.Counter(counts)


_NDARRAY = _StandIn(_refuse_call)
_NAMES = {
    ("collections", "Counter"): _StandIn(_counter),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_DType),
    ("_codecs", "encode"): _StandIn(_encode),
    ("builtins", "bytes"): _StandIn(_bytes),
    ("__builtin__", "bytes"): _StandIn(_bytes),
}
for _package in ("numpy.core", "numpy._core"):
    _NAMES[f"{_package}.multiarray", "_reconstruct"] = _StandIn(_Array)
    _NAMES[f"{_package}.multiarray", "scalar"] = _StandIn(_scalar)
    _NAMES[f"{_package}.numeric", "_frombuffer"] = _StandIn(_from_buffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a vocabulary never does") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def _finished(value: Any, done: dict[int, Any], nesting: int = 0) -> Any:
    """Copies the content with every stand-in replaced by the plain data that it describes.

    ``done`` maps objects to their copies: in a few lines a pickle can refer to one list a billion times.
    """
    if nesting > _MAX_NESTING:
        raise pickle.UnpicklingError(f"it is nested more than {_MAX_NESTING} deep")
    if id(value) not in done:
        done[id(value)] = _plain(value, done, nesting)
    return done[id(value)]


def _plain(value: Any, done: dict[int, Any], nesting: int) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("it holds an array without content")
        return value.value
    if isinstance(value, (_StandIn, _DType)):
        raise pickle.UnpicklingError("it holds a function or a type, not data")
    if type(value) is collections.Counter:
        return _plain_counter(value)
    if type(value) is dict:
        return {_plain_key(key): _finished(item, done, nesting + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_finished(item, done, nesting + 1) for item in value)
    if value is None or isinstance(value, (str, bytes, int, float, np.ndarray, np.generic)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def _plain_counter(value: collections.Counter[Any]) -> collections.Counter[Any]:
    """Makes a new Counter: the pickle could have set attributes on its own."""
    if not all(isinstance(count, (int, np.integer)) for count in value.values()):
        raise pickle.UnpicklingError("it holds a Counter whose counts are not numbers")
    return collections.Counter({_plain_key(key): count for key, count in value.items()})


def _plain_key(key: Any) -> Any:
    if not isinstance(key, (str, int)):
        raise pickle.UnpicklingError(f"it holds a {type(key).__name__} as a key")
    return key


def _check_memo(content: bytes) -> None:
    """Refuses huge memo indices: the C unpickler allocates up to the index, so 15 bytes could take gigabytes."""
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name in _MEMO_OPCODES and isinstance(number, int) and number > len(content):
            raise pickle.UnpicklingError("it numbers more objects than it can hold")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_pickle(path: str | Path) -> Any:
    """Reads a pickle of plain data; executes nothing in it.

    Returns:
        Dictionaries, lists, tuples, strings, bytes, numbers, None, ``collections.Counter`` and read-only numpy arrays
        of numbers.

    Raises:
        InputError: the file cannot be read, is not a pickle, or holds other data.
    """
    try:
        content = Path(path).read_bytes()
        _check_memo(content)
        return _finished(_Unpickler(io.BytesIO(content)).load(), {})
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused as a vocabulary pickle: {error}; get the file from a trusted source"
        ) from None
    except Exception as error:  # a truncated or malformed pickle can raise almost any exception
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is not a readable pickle ({reason}); fetch it again") from None
