"""A sample of ``tools/fuzz_coverage.py``; the script runs 700,000 cases."""

from __future__ import annotations

from pathlib import Path

import fuzz
import fuzz_coverage
import pytest

pytest.importorskip("atheris", reason="has no wheel for this platform")

# Reached byte by byte only by what keeps the inputs that came nearer: at random, once in 2^24 cases. The alarm that
# watches over slow inputs goes off while Python ends.
HIDDEN = """
import atheris, fuzz, signal
@atheris.instrument_func
def nested(path):
    content = path.read_bytes()
    if content[:1] == b"F":
        if content[1:2] == b"U":
            if content[2:3] == b"Z":
                signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
                raise ZeroDivisionError("found")
fuzz.READERS["array"] = (bytes, ".npy", nested)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vocabulary", fuzz.OP])
def test_nothing_is_found(kind: str, tmp_path: Path) -> None:
    outcome = fuzz_coverage.run(kind, 500, tmp_path)
    assert outcome.finding is None
    assert outcome.cases == 500
    assert outcome.covered >= outcome.covered_first > 100  # the code is instrumented
    assert outcome.kept > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_hides_behind_three_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz.READERS, "array", (lambda: bytes(8), ".npy", fuzz.READERS["array"][2]))
    outcome = fuzz_coverage.run("array", 300_000, tmp_path, setup=HIDDEN)
    assert outcome.finding is not None
    assert "ZeroDivisionError: found" in outcome.finding
    (path,) = tmp_path.iterdir()
    assert path.read_bytes()[:3] == b"FUZ"


def test_draws_come_from_the_input() -> None:
    first, second = fuzz_coverage.Draws(b"\x01\x02"), fuzz_coverage.Draws(b"\x03\x02")
    assert [first.getrandbits(8), first.getrandbits(8)] == [1, 2]
    assert second.getrandbits(8) == 3
    assert first.randrange(7) == 0
