"""Only plain data is read from a pickle; a hostile one is refused and runs nothing."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnm.data.pickles import read_pickle
from cnm.errors import InputError


class Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_vocabulary_holds(tmp_path: Path, protocol: int) -> None:
    value = {
        "w2id": {"<PAD>": 0, "a": 1},
        "id2vec": [np.zeros(3, np.float32), np.arange(3.0)],
        "matrix": np.ones((2, 3), np.float32),
        "number": np.float32(1.5),
        "counter": collections.Counter("abca"),
    }
    got = read_pickle(write(tmp_path / "v.pkl", value, protocol))
    assert got["w2id"] == value["w2id"]
    assert got["counter"] == value["counter"]
    assert isinstance(got["counter"], collections.Counter)
    assert got["number"] == 1.5
    np.testing.assert_array_equal(got["id2vec"][1], np.arange(3.0))
    np.testing.assert_array_equal(got["matrix"], value["matrix"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), "system"),
        (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: {"w2id": [Calls(exec, f"open({str(mark)!r}, 'w')")]}, "exec"),
        (lambda mark: Calls(getattr, "text", "upper"), "getattr"),
        (lambda mark: Calls(np.fromfile, str(mark)), "fromfile"),
        (lambda mark: Calls(collections.OrderedDict), "OrderedDict"),
        (lambda mark: np.array([Calls(os.system, f"touch {mark}")], dtype=object), "system"),
    ],
    ids=["system", "eval", "nested-exec", "getattr", "numpy-function", "other-class", "inside-an-object-array"],
)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, make: Any, name: str) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "v.pkl", make(mark))
    with pytest.raises(InputError, match=rf"v\.pkl: refused as a vocabulary pickle: it names .*{name}"):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("encoding", ["zip", "rot13", "idna"])
def test_other_codecs_are_refused(tmp_path: Path, encoding: str) -> None:
    import codecs

    with pytest.raises(InputError, match="refused"):
        read_pickle(write(tmp_path / "v.pkl", Calls(codecs.encode, "text", encoding), 2))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04\x95", pickle.dumps(list(range(100)))[:-20]])
def test_what_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"v\.pkl: (is no readable|refused)") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pkl: cannot be read"):
        read_pickle(tmp_path / "none.pkl")
