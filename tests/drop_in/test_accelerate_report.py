"""``accelerate(model, report=...)``: every module it looked at is in the table, and the times are of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate_checks import generators
from torch import nn

import cnm_kernels
from cnm_kernels.drop_in import report
from examples.research_code.transformer import DecoderLayer

D, H, B, L = 32, 4, 3, 5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DecoderLayer(D, H, dropout=0.1), DecoderLayer(D, H, dropout=0.1)
        self.second.encoder_attn.bias_k = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x, _ = self.first(x, None, x, None)
        return self.second(x, None)[0]


@pytest.mark.filterwarnings("ignore:accelerate")
def test_every_module_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    cnm_kernels.accelerate(Model(), report=True)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "class", "replaced", "by"]
    found = {line.split()[0]: line for line in lines}
    assert set(found) == {
        f"{layer}{part}" for layer in ("first", "second") for part in ("", ".self_attn", ".encoder_attn")
    }
    assert found["first"].endswith("linear, dropout_add_layer_norm")
    assert found["first.self_attn"].endswith("linear, weighted_attention")
    assert "nothing: it adds a learned key" in found["second.encoder_attn"]
    assert "nothing: its encoder_attn" in found["second"]


@pytest.mark.filterwarnings("ignore:accelerate")
def test_times_of_a_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 1 << 30))
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock) * 1e-3)
    model = Model()
    model.first.fc1.weight.grad = kept = torch.ones_like(model.first.fc1.weight)
    x = torch.randn(L, B, D)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    cnm_kernels.accelerate(model, report=lambda: model(x).square().mean())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["before", "share", "after", "share"]
    assert lines[-2].split() == ["the", "whole", "step", "1.0", "ms", "100%", "1.0", "ms", "100%"]
    assert all(line.split()[-6:] == ["1.0", "ms", "100%", "1.0", "ms", "100%"] for line in lines[1:-1])
    assert model.first.fc1.weight.grad is kept
    assert model.first.fc2.weight.grad is None
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:accelerate")
def test_a_model_that_writes_into_its_batch_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    class Writes(Model):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.zeros(D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[np.random.randint(L)] = self.start * random.random()  # noqa: NPY002
            return super().forward(x)

    model, x = Writes(), torch.randn(L, B, D)
    states = generators()
    cnm_kernels.accelerate(model, report=lambda: model(x).square().mean())
    assert "the whole step" in capsys.readouterr().out
    assert generators() == states


def test_a_step_that_fails_when_accelerated_leaves_nothing_replaced() -> None:
    model, x = Model(), torch.randn(L, B, D)

    def step() -> torch.Tensor:
        if type(model.first) is not DecoderLayer:
            raise ZeroDivisionError
        return model(x).square().mean()

    with pytest.warns(RuntimeWarning, match="left alone"), pytest.raises(ZeroDivisionError):
        cnm_kernels.accelerate(model, report=step)
    assert type(model.first) is DecoderLayer


def test_a_step_without_a_loss_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"report must return the loss of a sample batch, a scalar .*, got NoneType"):
        cnm_kernels.accelerate(model, report=lambda: None)  # type: ignore[arg-type, return-value]
    assert type(model.first) is DecoderLayer
