"""The benchmark runner, at tiny sizes: what it measures, what it refuses, what it writes."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import machine, measure, memory, report
from benchmarks.bench_layer_norm import layer_norm_case
from benchmarks.op_case import relative_error
from benchmarks.random_masks import P_DROP, kept_by
from benchmarks.registry import OURS, Case, Contender, Goal, Refused, Table, tables

QUICK_RUN = ["layer_norm", "--quick", "--repeats", "3", "--threads", "1", "--rivals", "eager"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("benchmarks")
    return runner.main([*QUICK_RUN, "--output", str(folder / "made" / "on demand")]), folder / "made" / "on demand"


@pytest.fixture(scope="module")
def results(run: tuple[int, Path]) -> dict[str, Any]:
    return json.loads((run[1] / "results.json").read_text())


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: None)


def first_case(table: str, index: int = 0) -> Case:
    return tables()[table].cases(True)[index]


def measured(case: Case, rivals: set[str] | None = None) -> dict[str, Any]:
    table = Table("made", "made", lambda quick: [case])
    records = measure.measure(table, 0, rivals=rivals, quick=True, repeats=2, threads=1)
    return {record["contender"]: record for record in records}


def test_a_run_writes_records_and_plot(run: tuple[int, Path], results: dict[str, Any]) -> None:
    code, folder = run
    assert code == 0
    assert (folder / "results.png").stat().st_size > 1000
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.png"]
    assert results["format"] == runner.FORMAT
    assert results["repeats"] == 3
    assert [(record["dtype"], record["contender"]) for record in results["measurements"]] == [
        ("float32", OURS),
        ("float32", "eager"),
        ("bfloat16", OURS),
        ("bfloat16", "eager"),
    ]


def test_a_record_holds_what_a_reader_needs(results: dict[str, Any]) -> None:
    for record in results["measurements"]:
        assert record["status"] == "measured"
        assert record["table"] == "layer_norm"
        assert "96x32" in record["case"]
        times = record["milliseconds"]
        assert len(times["samples"]) == 3
        assert 0 < min(times["samples"]) <= times["low"] <= times["median"] <= times["high"] <= max(times["samples"])
        assert record["gigabytes_per_second"] > 0
        assert record["gflops"] is None
        assert set(record["error"]) == {"output 0", *(f"gradient of {x}" for x in ("x", "residual", "weight", "bias"))}
        assert all(0 <= error < 0.05 for error in record["error"].values())
        bytes_ = record["memory"]
        assert bytes_["peak_bytes"] >= 0
        assert bytes_["working_bytes"] == max(bytes_["peak_bytes"] - bytes_["result_bytes"], 0)
    rival = results["measurements"][1]
    pairs = zip(rival["ratio"]["samples"], rival["milliseconds"]["samples"], strict=True)
    ours = results["measurements"][0]["milliseconds"]["samples"]
    assert [ratio for ratio, _ in pairs] == pytest.approx(
        [theirs / mine for theirs, mine in zip(rival["milliseconds"]["samples"], ours, strict=True)]
    )


def test_what_grows_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    report.plot_growth(results, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    grown = copy.deepcopy(results)
    for size, record in zip((64, 128, 64, 128), grown["measurements"], strict=True):
        record["along"] = ("T", size)
    grown["measurements"][0]["memory"] = None
    report.plot_growth(grown, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_the_machine_is_described(results: dict[str, Any]) -> None:
    described = results["machine"]
    assert described["torch"] == torch.__version__
    assert described["threads"] == 1
    assert described["cpu"]
    assert set(described["backends"].values()) <= {"native", "triton", "torch"}
    assert described["malloc"] in ("keeps freed memory", "as it comes")


def test_tables_come_from_the_records(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["measurements"][1]["ratio"] |= {"median": 123.456, "low": 100, "high": 150}
    assert "123.46x [100.00, 150.00]" in report.text(changed)
    assert "Tiny sizes" in report.text(changed)
    assert results["machine"]["cpu"] in report.text(results)


def test_runs_of_several_machines_stand_side_by_side(
    run: tuple[int, Path], results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(results)
    other["machine"]["cpu"] = "Another Processor"
    other["measurements"][1]["ratio"]["median"] = 123.456
    del other["measurements"][2:]  # bfloat16 was not measured there
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert report.main([str(run[1] / "results.json"), str(tmp_path / "other.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"- run 1: {results['machine']['cpu']}")
    assert lines[1].startswith("- run 2: Another Processor")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert [row[1:3] for row in rows] == [[dtype, who] for dtype in ("float32", "bfloat16") for who in (OURS, "eager")]
    ratio = results["measurements"][1]["ratio"]["median"]
    assert rows[1][3:] == [f"{ratio:.2f}x", "123.46x"]
    assert all(row[3] and not row[4] for row in rows[2:])

    (tmp_path / "none.json").write_text("{}")
    assert report.main([str(tmp_path / "none.json")]) == 2


def test_a_wrong_rival_is_refused_and_not_timed(no_memory: None) -> None:
    case = first_case("attention")
    right = case.contenders["eager"].function

    def wrong_value(**arguments: Any) -> torch.Tensor:
        return right(**arguments) * (1 + 1e-4)

    def wrong_gradient(center: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return right(center=center + 1e-3 * (center - center.detach()), **arguments)

    case.contenders["wrong value"] = Contender(wrong_value)
    case.contenders["wrong gradient"] = Contender(wrong_gradient)
    case.contenders["not a number"] = Contender(lambda **arguments: right(**arguments) * math.nan)
    case.contenders["broken"] = Contender(lambda **_: torch.ones(2) @ torch.ones(3))
    records = measured(case, {"eager", "wrong value", "wrong gradient", "not a number", "broken"})
    assert records["eager"]["status"] == "measured"
    for name in ("wrong value", "wrong gradient", "not a number"):
        assert records[name]["status"] == "refused"
        assert "milliseconds" not in records[name]
        assert "ratio" not in records[name]
    assert "gradient of center" in records["wrong gradient"]["reason"]
    assert records["broken"]["status"] == "failed"
    assert "RuntimeError" in records["broken"]["reason"]


def test_a_rival_may_err_as_plain_pytorch_does(no_memory: None) -> None:
    """Whose LayerNorm adds many rows up less exactly than our reference."""
    case = layer_norm_case(25600, 8, torch.bfloat16)
    right = case.contenders["eager"].function
    case.contenders["wrong"] = Contender(lambda weight, **arguments: right(weight=1.5 * weight, **arguments))
    records = measured(case, {"eager", "wrong"})
    assert (records["eager"]["status"], records["wrong"]["status"]) == ("measured", "refused")


def test_nothing_is_timed_when_ours_is_wrong(no_memory: None) -> None:
    case = first_case("loss")
    ours = case.contenders[OURS].function
    case.contenders[OURS] = Contender(lambda **arguments: tuple(1.001 * output for output in ours(**arguments)))
    records = measured(case, {"eager"})
    assert records[OURS]["status"] == "refused"
    assert records["eager"]["status"] == "skipped"
    assert not any("milliseconds" in record for record in records.values())


def test_a_refusal_ends_in_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_memory: None
) -> None:
    case = first_case("attention")
    right = case.contenders["eager"].function
    case.contenders["eager"] = Contender(lambda **arguments: 1.01 * right(**arguments))
    monkeypatch.setattr(runner, "tables", lambda: {"made": Table("made", "made", lambda quick: [case])})
    assert runner.main(["--quick", "--rivals", "eager", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "eager: errs by" in printed.err
    assert "refused: errs by" in printed.out


WHOLE_MODELS = ("accelerate", "cpl", "cpl_growth", "growth", "localize")  # whose many contenders take long to check


@pytest.mark.parametrize(
    "table", [pytest.param(name, marks=pytest.mark.slow) if name in WHOLE_MODELS else name for name in tables()]
)
def test_every_rival_is_right(table: str) -> None:
    """``torch.compile`` aside, which takes its time here and is checked by every run."""
    for case in tables()[table].cases(True):
        for name, contender in case.contenders.items():
            if contender.unavailable is None and not contender.compiled:
                case.verify(name, case.prepare(name))


def test_what_cannot_run_says_why(no_memory: None) -> None:
    case = first_case("attention")
    case.contenders["R1"] = replace(case.contenders["R1"], unavailable="needs another torch")
    records = measured(case, {"R1"})
    assert records["R1"]["status"] == "unavailable"
    goal = next(goal for goal in records[OURS]["goals"] if goal["against"] == "R1")
    assert goal["met"] is None
    line = next(line for line in report.goals_text(list(records.values())).splitlines() if "R1" in line)
    assert "not measured" in line


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("time", "eager", 2.9), True),
        (Goal("time", "eager", 3.0), True),
        (Goal("time", "eager", 3.1), False),
        (Goal("time", "R2", 1.0), None),
        (Goal("time", "eager", 1.5, of="ours, smaller"), True),
        (Goal("time", "eager", 1.6, of="ours, smaller"), False),
        (Goal("peak", "eager", 2.0), True),
        (Goal("peak", "eager", 2.1), False),
        (Goal("peak", "eager", 4.0, of="ours, smaller"), True),
        (Goal("memory", "a twentieth of the logits", 1000), True),
        (Goal("memory", "a twentieth of the logits", 999), False),
    ],
)
def test_goals(goal: Goal, met: bool | None) -> None:
    records = {
        OURS: {"memory": {"peak_bytes": 5000, "result_bytes": 4000, "working_bytes": 1000}},
        "ours, smaller": {"ratio": {"median": 2.0}, "memory": {"peak_bytes": 2500}},
        "eager": {"ratio": {"median": 3.0}, "memory": {"peak_bytes": 10000}},
    }
    assert measure.evaluate(goal, records)["met"] is met


def test_each_ratio_is_of_calls_side_by_side() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    summaries = measure.side_by_side({name: call(name) for name in (OURS, "A", "B")}, repeats=2)
    timed = order[3 * measure.WARM_UP_CALLS :]
    assert timed == [OURS, "A", OURS, "B", "A", OURS, "B", OURS]
    assert len(summaries[OURS]["milliseconds"]["samples"]) == 4
    assert len(summaries["A"]["ratio"]["samples"]) == 2


def test_memory_counts_temporaries_and_not_inputs_or_results() -> None:
    """The quick loss is too small for pages to count: weigh the full dropout, whose needs are known."""
    x_bytes = 4 * 25600 * 1024
    needed = memory.measure("dropout", 0, OURS, quick=False, threads=1)
    eager = memory.measure("dropout", 0, "eager", quick=False, threads=1)
    if needed is None or eager is None:
        pytest.skip("peak memory is measured on Linux only")
    assert needed["result_bytes"] == eager["result_bytes"] == 2 * x_bytes  # the output and the gradient
    assert eager["working_bytes"] == pytest.approx(x_bytes, rel=0.1)  # the scaled mask, kept for the backward
    assert eager["peak_bytes"] == pytest.approx(3 * x_bytes, rel=0.1)


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_gives_no_memory_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_child", killed)
    assert memory.measure("dropout", 0, OURS, quick=True, threads=1) is None


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_an_error_is_not_taken_for_a_want_of_memory() -> None:
    with pytest.raises(RuntimeError, match="'no such contender' in case 0 of 'dropout' failed"):
        memory.measure("dropout", 0, "no such contender", quick=True, threads=1)


@pytest.mark.parametrize("table", tables().values(), ids=tables())
def test_every_case_has_a_quick_twin(table: Table) -> None:
    """The memory of a case is measured after a warm-up by its twin."""
    assert len(table.cases(True)) == len(table.cases(False))


def test_masks_are_read_off_the_gradient() -> None:
    torch.manual_seed(0)
    kept = torch.rand(200, 100) >= P_DROP
    assert torch.equal(kept_by(kept * 1.5), kept)
    with pytest.raises(Refused, match="dropped elements is"):
        kept_by((torch.rand(200, 100) >= 0.2).float())
    with pytest.raises(Refused, match="with their neighbour"):
        kept_by((torch.rand(200, 50) >= P_DROP).float().repeat_interleave(2, 1))


def test_relative_error() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan]), want) == math.inf
    assert relative_error(torch.tensor([3.0, math.inf]), want) == math.inf
    assert relative_error(torch.ones(1), want) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["atention"], "no table 'atention'; there are accelerate,"),
        (["dropout", "--rivals", "eager;R9"], "no 'R9' in these tables; there are compile; eager; ours"),
        (["--repeats", "0"], "--repeats"),
        (["--threads", "two"], "--threads"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runner.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_an_output_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        runner.main(["--quick", "--output", str(tmp_path / "file")])
    assert "cannot be made a folder" in capsys.readouterr().err


def test_load_average_tells_a_busy_machine() -> None:
    assert machine.is_busy({"load_average": 2.0, "cores": 2})
    assert not machine.is_busy({"load_average": 0.1, "cores": 2})
    assert not machine.is_busy({"load_average": None, "cores": 2})
