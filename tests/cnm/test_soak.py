"""A sample of ``tools/soak.py``; the script takes 2,000 steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch

from cnm.training.step import LeanStep


@pytest.mark.slow
@pytest.mark.parametrize("precision", soak.PRECISIONS)
def test_steps_repeat_stay_finite_and_leak_nothing(precision: str) -> None:
    report = soak.soak(precision, 60)
    assert report.last_loss < report.first_loss


LEAKING = """
import soak, torch
from cnm.training.step import LeanStep

kept = []
plain = LeanStep.__call__
def leaking(self, *arguments, **options):
    kept.append(torch.ones(1 << 18))
    return plain(self, *arguments, **options)
LeanStep.__call__ = leaking
torch.set_num_threads(1)
soak.soak("bf16", 30)
"""


def test_a_leak_is_seen(tmp_path: Path) -> None:
    """Leaks in a process of its own: a leak first fills memory that was freed before."""
    path = os.pathsep.join([str(Path(soak.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", LEAKING]
    environment = os.environ | {"PYTHONPATH": path}
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert "AssertionError: resident memory grew" in outcome.stderr


def test_a_difference_between_equal_runs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = LeanStep.__call__

    def wavering(self: LeanStep, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        found = plain(self, *arguments, **options)
        return {name: value + 1e-7 * value * (len(calls) == 12) for name, value in found.items()}

    monkeypatch.setattr(LeanStep, "__call__", wavering)
    with pytest.raises(AssertionError, match=r"step 5: .* differs between equal runs"):
        soak.soak("bf16", 30)
