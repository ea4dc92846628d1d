"""A few rounds of ``kill_rounds.py``; its own fifty take minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_rounds import main


@pytest.mark.slow
def test_a_killed_run_is_the_unbroken_run(tmp_path: Path) -> None:
    counts = main(4, tmp_path)
    assert counts["updates compared"] > 3
    assert counts["in a write"] == 2
