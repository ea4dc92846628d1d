"""The GPU table: it runs to its end without one, and what it would compare is right where a CPU can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import gpu, rivals

COMPILED = ("compile", "FlexAttention")
NEEDS_A_GPU = ("Liger", "CCE, exact")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_what_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["gpu", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = gpu.rows(quick=False)
    for row in rows:
        assert row.name in printed
    assert "goal 20 / 38 us, floor 15.8 / 27.5 us" in printed
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert {result["status"] for result in results} == {"skipped"}
    assert len(results) == sum(2 + len(row.rivals) for row in rows)


@pytest.mark.parametrize(
    "row", [row for row in gpu.rows(quick=True) if "float32" in row.name], ids=lambda row: row.name
)
def test_rivals_compute_the_same(row: gpu.Row) -> None:
    """Runs in float32: in bfloat16 some contenders are refused, one for its mask."""
    for name, function, backend in gpu.contenders(row):
        missing = name == "R2" and rivals.LINEAR_CROSS_ENTROPY_MISSING
        if backend is None and name not in (*COMPILED, *NEEDS_A_GPU) and not missing:
            gpu.verify(row, function, None, "cpu")


def test_a_wrong_contender_is_refused() -> None:
    row = gpu.rows(quick=True)[0]
    with pytest.raises(AssertionError, match="errs by"):
        gpu.verify(row, lambda **inputs: rivals.sdpa_attention(**inputs) * 1.1, None, "cpu")


@pytest.mark.parametrize(("taken", "verdict"), [((19.0, 37.0), "met"), ((19.0, 39.0), "MISSED")])
def test_goals_are_of_forward_and_backward(taken: tuple[float, float], verdict: str) -> None:
    row = gpu.rows(quick=True)[0]
    result = gpu.Result(row.name, "ours, triton", forward=(taken[0], 1.0), backward=(taken[1], 1.0))
    assert gpu.verdict(row, result) == verdict


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_table_fills_in(tmp_path: Path) -> None:
    assert runner.main(["gpu", "--quick", "--only", "50x50", "--output", str(tmp_path)]) == 0
