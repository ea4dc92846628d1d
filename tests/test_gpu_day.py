"""The day a GPU is at hand: its command, rehearsed up to what needs one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_day
import pytest
import torch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


in_place = pytest.mark.skipif(
    not any((gpu_day.ROOT / "cnm_kernels").glob("_C_cpu*.so")),
    reason="this tree has no compiled kernels, which the command's build stage makes",
)


@pytest.mark.slow
@without_gpu
@in_place
def test_the_rehearsal_ends_green(tmp_path: Path) -> None:
    assert gpu_day.main(["--rehearse", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status == {
        "build": "needs a GPU",
        "tests": "done",
        "sanitizer": "needs a GPU",
        "table": "done",
        "step": "needs a GPU",
    }
    said = {stage["name"]: stage["said"] for stage in report["stages"]}
    assert "test_a_cuda_graph_holds_forward_and_backward" in said["tests"]
    assert "goal 20 / 38 us" in said["table"]
    assert (tmp_path / "gpu.json").exists()
    assert "| sanitizer | needs a GPU |" in (tmp_path / "gpu_day.md").read_text()


@without_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_day.main(["--output", str(tmp_path / "none")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_failure_is_kept_and_the_next_command_still_runs() -> None:
    bad, good = [sys.executable, "-c", "raise SystemExit(3)"], [sys.executable, "-c", "print('here')"]
    stage = gpu_day.Stage("step", [bad, ["no-such-program"], good])
    gpu_day.run(stage)
    assert stage.status == "failed"
    assert "no-such-program is not here" in stage.reason
    assert "here" in stage.said


def test_what_a_command_out_of_time_printed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_day.LIMITS, "tests", 3)
    code = "import sys, time; print('passed: \u00fc'); print('warned', file=sys.stderr); time.sleep(60)"
    stage = gpu_day.Stage("tests", [[sys.executable, "-S", "-c", code]], environment={"PYTHONUTF8": "1"})
    gpu_day.run(stage)
    assert stage.status == "failed"
    assert stage.reason.startswith("longer than 3 s")
    assert "passed: \u00fc" in stage.said
    assert "warned" in stage.said


def test_the_emulator_takes_none_of_the_time(tmp_path: Path) -> None:
    tests = gpu_day.stages(tmp_path, "9.0a", False)[1]
    python, *module = tests.commands[0][:3]
    assert module == ["-m", "pytest"]  # here the sources need not be built in place, which that asks for
    tests.commands[0][:3] = [str(Path(python).with_name("pytest")), "--collect-only"]
    gpu_day.run(tests)
    assert tests.status == "done", tests.said
    assert "test_a_cuda_graph_holds_forward_and_backward" in tests.said
    assert "cuda_emulation" not in tests.said


def test_all_stages_fit_in_twenty_five_minutes() -> None:
    assert set(gpu_day.LIMITS) == set(gpu_day.STAGES)
    assert sum(gpu_day.LIMITS.values()) <= 25 * 60


def test_every_file_of_tests_is_there() -> None:
    for path in (*gpu_day.BY_RISK, gpu_day.ONE_PASS):
        assert (gpu_day.ROOT / path).exists(), path
