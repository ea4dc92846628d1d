"""``python -m benchmarks gpu --step``: what it says where steps cannot be timed, and what the GPU day runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_day
import pytest
import torch

from benchmarks import gpu, gpu_launches, gpu_step


def test_the_gpu_day_times_steps_on_the_gpu(tmp_path: Path) -> None:
    (step,) = (stage for stage in gpu_day.stages(tmp_path, "9.0a", rehearse=False) if stage.name == "step")
    assert step.needs_gpu
    assert [command[1:5] for command in step.commands] == [["-m", "benchmarks", "gpu", "--output"]] * 2
    assert [command[-1] for command in step.commands] == ["--step", "--launches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--step", "--output", str(tmp_path)]) == 2
    assert "finds none here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_captured_is_not_timed_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(*_: Any) -> tuple[Any, torch.Tensor]:
        return step_that_counts, torch.zeros(())

    class Graphed(gpu_step.GraphedStep):
        def __init__(self, step: Any) -> None:
            self.step = step

        def __call__(self, batch: Any) -> Any:
            gpu_step.warnings.warn("training goes on without CUDA graphs: no capture today", stacklevel=2)

    def step_that_counts(batch: Any) -> dict[str, torch.Tensor]:
        return {}

    monkeypatch.setattr(gpu_launches, "model_step", stand_in)
    monkeypatch.setattr(gpu_step, "GraphedStep", Graphed)
    monkeypatch.setattr(gpu_step, "median_milliseconds", lambda call: 2.0)
    found = gpu_step.measure("CNM", "float32")
    assert (found["eager"], found["graph"]) == (2.0, None)
    assert "no capture today" in found["reason"]
    assert "no capture today" in gpu_step.text([found])
