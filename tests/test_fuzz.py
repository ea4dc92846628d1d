"""A sample of ``tools/fuzz.py``; the script runs 100,000 cases."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import fuzz
import pytest


def test_nothing_crashes_hangs_or_fails_without_a_line_to_read() -> None:
    outcomes, findings = fuzz.run(100 * len(fuzz.KINDS))
    assert findings == []
    for kind in fuzz.KINDS:  # both happen, or the damage is not worth its name
        assert outcomes[f"{kind}: refused"] > 0
        assert outcomes[f"{kind}: {'ran' if kind == 'op' else 'read'}"] > 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "the process ended with status 9"),
        (lambda *_: Path("left_behind").write_text("here"), "left left_behind behind"),
        (lambda *_: (_ for _ in ()).throw(fuzz.InputError("something is wrong")), "does not name the file"),
    ],
    ids=["exception", "crash", "file", "unnamed"],
)
def test_the_fuzzer_finds_what_is_broken(broken: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.READERS, "array", (fuzz.npy_bytes, ".npy", broken))  # type: ignore[arg-type]
    kind = list(fuzz.READERS).index("array")
    _, findings = fuzz.run(len(fuzz.KINDS))
    assert [seed for seed, _ in findings] == [kind]
    assert said in findings[0][1]


def test_damage_repeats() -> None:
    content = fuzz.annotation_bytes()
    assert fuzz.damaged(content, random.Random(3)) == fuzz.damaged(content, random.Random(3)) != content
