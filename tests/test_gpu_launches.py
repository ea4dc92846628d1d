"""``python -m benchmarks gpu --launches``: what it counts, and that nothing breaks a step's capture as a CUDA graph."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_backend import LOAD_ERRORS, NAME
from op_checks import gradients_of
from op_records import DIFFERENTIABLE, SAMPLES
from samples import run, sample
from torch import Tensor

from benchmarks import gpu, gpu_launches, gpu_predict
from cnm.data.batch import Batch
from cnm.models.base import PRECISIONS
from cnm.training.step import LeanStep
from cnm.training.steps import STEP_NAMES
from cnm_kernels import native

pytestmark = pytest.mark.skipif("cpu" in native.LOAD_ERRORS, reason="the C++ module is not built")
MOST = {("CNM", "float32"): 959, ("CNM", "bf16"): 991, ("CPL", "float32"): 785, ("CPL", "bf16"): 807}


@pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")
@pytest.mark.parametrize("op", [op for op in SAMPLES if op in native.OPS["cuda"]])
def test_our_operators_launch_what_the_emulator_is_given(op: str) -> None:
    """Every sample, forward and backward; what has no elements launches less, and is left out."""
    for name in SAMPLES[op]:
        inputs = sample(op, name, torch.float32, "cpu")
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        if not all(map(Tensor.numel, tensors)) or inputs.get("length") == 0:
            continue
        with gpu_predict.counting() as launched, gpu_launches.Launches() as counted:
            gradients_of(lambda **inputs: run(op, inputs, NAME), inputs, DIFFERENTIABLE[op])
        ours = {kernel: number for kernel, number in counted.kernels.items() if kernel.startswith("ours.")}
        assert sum(ours.values()) == len(launched), (name, ours, [kernel for kernel, _ in launched])


@pytest.mark.parametrize("heads", [1, 263, 264])
def test_the_backward_is_split_where_heads_are_few(heads: int) -> None:
    q = torch.empty(1, heads, 200, 64, device="meta")
    d_out, needs = q, (True, True, True, False)
    launched = gpu_launches.OURS["attention_backward"](d_out, None, q, q, q, *[None] * 8, *needs)
    assert launched == (1 if heads >= 264 else 2)


def test_multi_tensor_kernels_hold_so_many_tensors_and_chunks() -> None:
    small, large = torch.empty(10, device="meta"), torch.empty(65536 * 320, device="meta")
    assert gpu_launches.multi_tensor([small] * 36, 4) == 1
    assert gpu_launches.multi_tensor([small] * 37, 4) == 2
    assert gpu_launches.multi_tensor([large], 1) == 1
    assert gpu_launches.multi_tensor([large, small], 1) == 2
    assert gpu_launches.multi_tensor([small, large], 1) == 2


def least(call: Any) -> float:
    with gpu_launches.Launches() as counted:
        call()
    return sum(counted.seconds.values())


def test_an_operation_takes_its_bytes_or_its_products() -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, row, bytes_a_second = meta(1000, 500), meta(500), gpu_predict.MEMORY
    assert least(lambda: x + row) == pytest.approx((2 * 500_000 + 500) * 2 / bytes_a_second)
    assert least(lambda: x + row.expand(1000, 500)) == pytest.approx((2 * 500_000 + 500) * 2 / bytes_a_second)
    assert least(lambda: x.add_(row)) == pytest.approx((2 * 500_000 + 500) * 2 / bytes_a_second)
    assert least(lambda: x.view(-1)) == 0
    large, narrow = meta(8192, 8192), meta(8192, 8)
    assert least(lambda: large @ large) == pytest.approx(2 * 8192**3 / gpu_launches.PRODUCTS_PER_SECOND[2])
    assert least(lambda: large @ narrow) == pytest.approx((8192**2 + 2 * 8192 * 8) * 2 / bytes_a_second)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["CNM", "CPL"])
@pytest.mark.parametrize("step", STEP_NAMES)
def test_nothing_breaks_a_capture(step: str, model: str, precision: str) -> None:
    """On a GPU's way through the code: no value is read, no shape depends on one, no host memory is held."""
    found = gpu_launches.count(partial(gpu_launches.meta_step, model, precision, step), model, precision)
    assert found.of_host == []
    assert found.launched <= 18, "copies of the batch, rates, the graph, metrics"
    assert found.in_graph < found.eager
    if step == "lean":
        assert found.eager <= MOST[model, precision], "more kernels than there were: look at what was added"


@pytest.mark.parametrize("model", ["CNM", "CPL"])
def test_what_a_graph_writes_stays_where_it_is(model: str) -> None:
    with gpu_launches.as_on_a_gpu(), gpu_launches.Launches():
        step, batch = gpu_launches.meta_step(model, "float32")
        places: list[list[int]] = []
        for _ in range(3):
            step(batch)
            held = [parameter.grad for parameter in step.model.parameters()]
            for optimizer in step.optimizers.values():
                held += [moment for state in optimizer.adam.state.values() for moment in state.values()]
                held += optimizer.adam._sizes.values()
            places.append(list(map(id, held)))
    assert places[1] == places[2]


class ReadsAValue(LeanStep):
    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        loss = super().reconstruction_loss(batch, masked_words)
        return loss * (2 if loss.item() > 1 else 1)


class ShapedByAValue(LeanStep):
    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        return super().reconstruction_loss(batch, masked_words) + batch.frames[masked_words.any(1)].sum()


class HoldsHostMemory(LeanStep):
    def reconstruction_loss(self, batch: Batch, masked_words: Tensor) -> Tensor:
        scale = torch.ones(1).to(masked_words.device)
        return (super().reconstruction_loss(batch, masked_words) * scale).sum()


def step_of(kind: Any) -> tuple[Any, Any]:
    step, batch = gpu_launches.meta_step("CNM", "float32")
    return kind(step.model, step.model.config), batch


@pytest.mark.parametrize("kind", [ReadsAValue, ShapedByAValue])
def test_what_waits_for_the_host_is_found(kind: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        gpu_launches.count(partial(step_of, kind), "CNM", "float32")


def test_host_memory_is_found() -> None:
    found = gpu_launches.count(partial(step_of, HoldsHostMemory), "CNM", "float32")
    assert set(found.of_host) == {"aten.ones.default", "aten._to_copy.default"}
    assert "no graph may hold aten._to_copy.default, aten.ones.default" in gpu_launches.text([found])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--launches", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Goal: 220 kernels in CNM's step." in said
    assert "| CPL   | bf16 " in said
    counts = json.loads((tmp_path / "gpu_launches.json").read_text())["counts"]
    for found in counts:
        assert sum(found["by_operation"].values()) == found["eager"]
        assert 0.5e-3 < sum(found["seconds"].values()) < 50e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("model", ["CNM", "CPL"])
def test_the_profiler_counts_the_same(model: str) -> None:
    """Within a tenth: libraries split some products, and sort as they like."""
    counted = gpu_launches.count(partial(gpu_launches.meta_step, model, "bf16"), model, "bf16").eager
    step, batch = gpu_launches.model_step(model, "bf16", "cuda")
    for _ in range(2):
        step(batch)
    assert gpu.launches(lambda: step(batch)) == pytest.approx(counted, rel=0.1)
