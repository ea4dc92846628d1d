"""The examples run, and the accelerated ones learn what the plain ones learn."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from examples import drop_in_cnm, drop_in_cpl, mixture_of_gaussians


@pytest.mark.parametrize("example", [drop_in_cnm, drop_in_cpl], ids=["cnm", "cpl"])
@pytest.mark.parametrize("plain", [False, True], ids=["accelerated", "plain"])
def test_drop_in(example, plain: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _, score = example.main(epochs=2, videos=40, plain=plain)
    printed = capsys.readouterr().out
    first, second = (
        float(line.split("final_loss ")[1].split(",")[0]) for line in printed.splitlines() if "final_loss" in line
    )
    assert second < first
    assert math.isfinite(score)
    assert 0 < score < 1


def test_mixture_of_gaussians(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = mixture_of_gaussians.main(steps=150)
    assert before < 0.5
    assert after > 0.85
    assert "of the attention is on the signal" in capsys.readouterr().out


def test_examples_run_as_programs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.drop_in_cnm", "--epochs", "1", "--videos", "8"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test mIoU" in done.stdout
