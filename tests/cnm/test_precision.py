"""``--precision high``: float32 with faster products, where the processor has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import cpl_config, synthetic_config
from test_cli import changes, run

from cnm.commands import evaluate
from cnm.commands.common import Device, Precision, chosen_precision
from cnm.errors import InputError
from cnm.evaluation import evaluate_seeds
from cnm.precision import HIGH, compute_dtype, notes, products_of
from cnm.training.trainer import Interrupted, Trainer
from cnm_kernels import native, products

CPU = torch.device("cpu")
GAINS_NOTHING = "note: --precision high gains nothing on this processor, which has no AMX: it computes as with float32"
splits_here = pytest.mark.skipif(
    "cpu" in native.LOAD_ERRORS or not torch.cpu._is_avx512_bf16_supported(),
    reason="no instruction that multiplies bfloat16",
)


@pytest.fixture
def splitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that this processor gains by ``high``."""
    monkeypatch.setattr(products, "splits", True)


def trained(folder: Path, config: Any, precision: str, **options: Any) -> dict[str, torch.Tensor]:
    trainer = Trainer(config, folder, precision=precision, quiet=True, **options)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_switch_is_turned_for_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with products_of(HIGH):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    for other in ("float32", "bf16"):
        with products_of(other):
            assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), products_of(HIGH):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == before
    assert compute_dtype(HIGH) is None


@pytest.mark.usefixtures("switches")
def test_switches_of_single_backends_are_left_alone() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    with products_of("float32"):
        pass
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with products_of("bf16"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with pytest.raises(InputError, match="precision high: an fp32_precision of"), products_of(HIGH):
        pass


@splits_here
@pytest.mark.usefixtures("splitting")
@pytest.mark.parametrize("make", [synthetic_config, cpl_config])
@pytest.mark.parametrize("step", ["lean", "recompute", "published"])
def test_a_run_differs_by_rounding(make: Any, step: str, tmp_path: Path) -> None:
    config = make(train__max_num_epochs=1)
    high, float32 = (trained(tmp_path / name, config, name, step=step) for name in (HIGH, "float32"))
    assert any(not torch.equal(high[name], float32[name]) for name in float32)
    for name, value in float32.items():
        torch.testing.assert_close(high[name], value, rtol=1e-2, atol=2e-3)
    assert torch.get_float32_matmul_precision() == "highest"


@splits_here
@pytest.mark.usefixtures("splitting")
def test_a_resumed_run_keeps_it_bit_for_bit(tmp_path: Path) -> None:
    config = synthetic_config(train__max_num_epochs=2)
    straight = trained(tmp_path / "straight", config, HIGH)
    broken = Trainer(config, tmp_path / "broken", precision=HIGH, quiet=True)
    step, calls = broken.step, []

    def interrupted(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            broken.stop_signal.received = 2
        return step(batch)

    broken.run_step = interrupted
    with pytest.raises(Interrupted):
        broken.train()
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(InputError, match="was trained with precision high, not float32"):
        Trainer(None, tmp_path / "broken", resume=True, precision="float32", quiet=True)
    again = Trainer(None, tmp_path / "broken", resume=True, quiet=True)
    assert again.options["precision"] == HIGH
    again.train()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, straight[name])


def test_the_commands_say_where_nothing_is_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    for splits, told in ((False, True), (True, False)):
        monkeypatch.setattr(products, "splits", splits)
        assert notes(HIGH, CPU) == ([GAINS_NOTHING.removeprefix("note: ")] if told else [])
        assert notes("float32", CPU) == notes("bf16", CPU) == []
        assert notes(HIGH, torch.device("cuda")) == []
    monkeypatch.setattr(products, "splits", False)
    small = changes(train__max_num_epochs=1)
    result = run("train", "--config", "synthetic", "--run", folder, "--device", "cpu", "--precision", HIGH, *small)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines().count(GAINS_NOTHING) == 1
    assert "; high; " in result.stderr
    result = run("evaluate", "--checkpoint", folder, "--device", "cpu", "--precision", HIGH)
    assert result.exit_code == 0, result.stderr
    assert GAINS_NOTHING in result.stderr
    assert GAINS_NOTHING not in run("evaluate", "--checkpoint", folder, "--device", "cpu").stderr


def test_evaluation_turns_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = changes(train__max_num_epochs=1)
    assert run("train", "--config", "synthetic", "--run", tmp_path / "run", "--device", "cpu", *small).exit_code == 0
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return evaluate_seeds(*arguments)

    monkeypatch.setattr(evaluate, "evaluate_seeds", watched)
    for precision in (HIGH, "float32"):
        run("evaluate", "--checkpoint", tmp_path / "run", "--device", "cpu", "--precision", precision)
    assert seen == ["high", "highest"]


def test_auto_never_takes_it() -> None:
    assert chosen_precision(Precision.auto, Device.cpu) == "float32"
    assert chosen_precision(Precision.high, Device.cpu) == HIGH
    assert "two bfloat16 numbers" in " ".join(run("train", "--help").stdout.replace("│", " ").split())
