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


REFUSED = r"v\.pkl: refused as a vocabulary pickle: "


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), "system"),
        (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: {"w2id": [Calls(exec, f"open({str(mark)!r}, 'w')")]}, "exec"),
        (lambda mark: {"counter": collections.Counter({"a": Calls(os.system, f"touch {mark}")})}, "system"),
        (lambda mark: Calls(getattr, "text", "upper"), "getattr"),
        (lambda mark: Calls(np.fromfile, str(mark)), "fromfile"),
        (lambda mark: Calls(np.load, str(mark)), "load"),
        (lambda mark: Calls(collections.OrderedDict), "OrderedDict"),
    ],
    ids="system eval nested-exec in-a-counter getattr fromfile load other-class".split(),
)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, make: Any, name: str) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "v.pkl", make(mark))
    with pytest.raises(InputError, match=rf"{REFUSED}it names .*{name}"):
        read_pickle(path)
    assert not mark.exists()


def test_the_attributes_of_an_admitted_name_are_refused(tmp_path: Path) -> None:
    module, name = b"collections", b"Counter.__init__.__globals__"
    raw = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
    assert isinstance(pickle.loads(raw), dict)  # which is where an attacker gets everything else from
    (tmp_path / "v.pkl").write_bytes(raw)
    with pytest.raises(InputError, match=rf"{REFUSED}it names collections.Counter.__init__"):
        read_pickle(tmp_path / "v.pkl")


BYTES_OF_A_POINTER = bytes(range(8))
OUTSIDE = Calls(np.dtype, "V8")  # a dtype whose only field lies far beyond its 8 bytes
OUTSIDE.call = (*OUTSIDE.call, (3, "|", None, ("a",), {"a": (np.dtype("f8"), 1 << 40)}, 8, 1, 0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(np.ndarray, (1,), np.dtype("O"), BYTES_OF_A_POINTER), "an array of 'O8'"),
        (np.array([{}], dtype=object), "an array of 'O8'"),
        (np.array(["text"]), "an array of 'U4'"),
        (np.array([(1, 2)], dtype="f4,f4"), "an array of 'V8'"),
        (Calls(np.ndarray, (1 << 40,)), "an array in an unusual way"),
        (OUTSIDE, "an array of 'V8'"),
        (np.dtype("f8"), "a function or a type"),
        (collections.Counter, "a function or a type"),
        ({"w2id": {1, 2}}, "it holds a set"),
        ({(1, 2): 3}, "a tuple as a key"),
        (collections.Counter(a=1.5), "counts are not numbers"),
    ],
    ids="pointer objects text fields memory outside dtype class set key counts".split(),
)
def test_what_a_vocabulary_never_holds_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"{REFUSED}.*{message}"):
        read_pickle(write(tmp_path / "v.pkl", value))


@pytest.mark.parametrize(
    "build",
    [
        b"ccollections\nCounter\nN}X\x0b\x00\x00\x00most_commoncnumpy\nndarray\ns\x86b.",
        b"cnumpy.core.multiarray\n_reconstruct\nN}X\x05\x00\x00\x00_callcnumpy\nndarray\ns\x86b.",
        b"cnumpy\ndtype\n}X\x05\x00\x00\x00_callK\x01sb.",
    ],
    ids=["class", "function", "dictionary"],
)
def test_a_pickle_cannot_change_what_it_names(tmp_path: Path, build: bytes) -> None:
    most_common = collections.Counter.most_common
    (tmp_path / "v.pkl").write_bytes(b"\x80\x02" + build)
    with pytest.raises(InputError, match=rf"{REFUSED}it changes what a name stands for"):
        read_pickle(tmp_path / "v.pkl")
    assert collections.Counter.most_common is most_common
    assert read_pickle(write(tmp_path / "good.pkl", {"counter": collections.Counter("aab"), "x": np.ones(2)}))


def test_attributes_hung_on_a_counter_are_dropped(tmp_path: Path) -> None:
    raw = pickle.dumps(collections.Counter("aab"), 2)[:-1] + b"}X\x0b\x00\x00\x00most_commonK\x01sb."
    (tmp_path / "v.pkl").write_bytes(raw)
    assert read_pickle(tmp_path / "v.pkl").most_common(1) == [("a", 2)]


@pytest.mark.parametrize(("size", "length"), [(3, 8), (-2, 8), (2, 7), (1 << 60, 8)])
def test_an_array_must_fill_its_shape(tmp_path: Path, size: int, length: int) -> None:
    state = (1, (size,), np.dtype("f4"), False, b"x" * length)
    array = Calls(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b"b")
    array.call = (*array.call, state)
    with pytest.raises(InputError, match=rf"{REFUSED}it holds an array of shape .* in {length} bytes"):
        read_pickle(write(tmp_path / "v.pkl", array))


def test_a_list_named_a_billion_times_costs_nothing(tmp_path: Path) -> None:
    value: list[Any] = ["text"]
    for _ in range(10):
        value = [value] * 100
    assert read_pickle(write(tmp_path / "v.pkl", value))[7][7][7][7][7][7][7][7][7][7] == ["text"]
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(InputError, match=rf"{REFUSED}it is nested"):
        read_pickle(write(tmp_path / "v.pkl", cycle))


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x3f", b"p1000000000\n"])
def test_a_memo_of_gigabytes_is_refused(tmp_path: Path, put: bytes) -> None:
    """One object, numbered as if it were the billionth."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02K\x01" + put + b".")
    with pytest.raises(InputError, match="it numbers more objects than it can hold"):
        read_pickle(path)


@pytest.mark.parametrize("encoding", ["zip", "rot13", "idna"])
def test_other_codecs_are_refused(tmp_path: Path, encoding: str) -> None:
    import codecs

    with pytest.raises(InputError, match="refused"):
        read_pickle(write(tmp_path / "v.pkl", Calls(codecs.encode, "text", encoding), 2))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04\x95", pickle.dumps(list(range(100)))[:-20]])
def test_what_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"v\.pkl: (is not a readable|refused)") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pkl: cannot be read"):
        read_pickle(tmp_path / "none.pkl")
