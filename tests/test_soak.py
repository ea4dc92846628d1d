"""A sample of ``tests/soak.py``; the script takes 2,000 steps."""

from __future__ import annotations

import pytest
import soak
import torch

from cnm.step import LeanStep


@pytest.mark.parametrize("precision", soak.PRECISIONS)
def test_steps_repeat_stay_finite_and_leak_nothing(precision: str) -> None:
    report = soak.soak(precision, 60)
    assert report.last_loss < report.first_loss


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    plain = LeanStep.__call__

    def leaking(self: LeanStep, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        kept.append(torch.ones(1 << 18))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(LeanStep, "__call__", leaking)
    with pytest.raises(AssertionError, match="resident memory grew"):
        soak.soak("bf16", 30)


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
