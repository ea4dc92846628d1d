"""The compiled module on every instruction set this machine has: same masks, right values, any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_large_scores as large_scores
import torch
import torch.nn.functional as F
from op_checks import check_gradients, check_values
from op_records import DIFFERENTIABLE, RECORDS, SAMPLES
from op_records.draw import Draw, Inputs
from samples import run, sample
from torch import Tensor

from cnm_kernels import native, reference

if "cpu" in native.LOAD_ERRORS:
    pytest.skip(f"no compiled module: {native.LOAD_ERRORS['cpu']}", allow_module_level=True)

from cnm_kernels import _C_cpu

TESTS = Path(__file__).parent  # where to start Python: the checkout itself would hide an installed package
NAMES = ("portable", "avx2", "avx512", "avx512bf16", "amx")
AVAILABLE = NAMES[: NAMES.index(_C_cpu.best_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in AVAILABLE:
        pytest.skip(f"this machine's best is {_C_cpu.best_isa()}")
    before = _C_cpu.isa()
    _C_cpu.set_isa(request.param)
    yield request.param
    _C_cpu.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", native.OPS["cpu"])
def test_values_and_gradients(op: str, dtype: torch.dtype, isa: str) -> None:
    for name in SAMPLES[op]:
        check_values(op, sample(op, name, dtype, "cpu"), "native")
        check_gradients(op, sample(op, name, dtype, "cpu"), "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*large_scores.TIES, *large_scores.LOSSES])
def test_large_scores(op: str, dtype: torch.dtype, isa: str) -> None:
    names, check = large_scores.TIES.get(op), large_scores.test_attention_to_ties
    if names is None:
        names, check = large_scores.LOSS_SIZES, large_scores.test_loss_of_ties
    for name in names:
        if dtype != torch.float16 or name.startswith(large_scores.SIZES[0]):
            check(op, name, "native", "cpu", dtype)


@pytest.mark.parametrize("numel", [1, 9, 4096, 32768, 100_003])
def test_masks_are_those_of_the_reference(numel: int, isa: str) -> None:
    seed, offset = torch.tensor(-(2**62) + 12345), 2**40 + 3
    for p in (0.001, 0.1, 0.5, 1 - 2**-16, 1.0):
        threshold = reference.dropout_threshold(p)
        expected = reference.keep_mask(numel, threshold, seed, offset)
        assert torch.equal(native.dropout(torch.ones(numel), p, seed, offset) != 0, expected)


@pytest.mark.parametrize("numel", [0, 77, 100_003])
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_memory(numel: int, shift: int, isa: str) -> None:
    storage = torch.randn(numel + shift)
    arguments = {"p": 0.3, "seed": 4, "offset": 1}
    expected = run("dropout", {"x": storage[shift:].clone(), **arguments}, "native")[0]
    assert torch.equal(run("dropout", {"x": storage[shift:], **arguments}, "native")[0], expected)


MANY = [op for op, record in RECORDS.items() if record.many]


def many_chunks(op: str) -> Inputs:
    make = RECORDS[op].many
    assert make is not None
    return make(Draw("large", torch.float32, "cpu"))


@pytest.mark.parametrize("op", MANY)
def test_threads_do_not_change_a_bit(op: str, isa: str) -> None:
    inputs = many_chunks(op)
    names = [name for name in DIFFERENTIABLE[op] if name in inputs]

    def once(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = {name: inputs[name].detach().requires_grad_() for name in names}
            (out,) = run(op, inputs | leaves, "native")
            upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
            return [out, *torch.autograd.grad(out, list(leaves.values()), upstream)]
        finally:
            torch.set_num_threads(before)

    for one, many in zip(once(1), once(3), strict=True):
        assert torch.equal(one, many)


def test_large_values_and_gradients(isa: str) -> None:
    """Results that are written around the caches; without dropout, since the reference draws slowly."""
    inputs = many_chunks("dropout_add_layer_norm") | {"p": 0.0}
    names = DIFFERENTIABLE["dropout_add_layer_norm"]

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: inputs[name].detach().to(dtype).requires_grad_() for name in names}
        out = function(**leaves)
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        return [out.double(), *(d.double() for d in torch.autograd.grad(out, list(leaves.values()), upstream))]

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias)

    actual = results(lambda **leaves: run("dropout_add_layer_norm", inputs | leaves, "native")[0], torch.float32)
    for ours, eager, exact in zip(actual, results(plain, torch.float32), results(plain, torch.float64), strict=True):
        slack = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 4 * (eager - exact).abs().max() + slack


def test_only_what_is_asked_for_is_computed(isa: str) -> None:
    inputs = sample("dropout_add_layer_norm", "odd-5x37", torch.float32, "cpu")
    names = DIFFERENTIABLE["dropout_add_layer_norm"]

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_(name in wanted) for name in names}
        (out,) = run("dropout_add_layer_norm", inputs | leaves, "native")
        return dict(
            zip(wanted, torch.autograd.grad(out.square().sum(), [leaves[name] for name in wanted]), strict=True)
        )

    everything = gradients(names)
    for wanted in [("x",), ("residual",), ("weight",), ("bias",), ("x", "bias")]:
        for name, gradient in gradients(wanted).items():
            assert torch.equal(gradient, everything[name])


def test_a_second_derivative_is_refused() -> None:
    center, width = torch.tensor([0.5], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    (out,) = run("gaussian_mask", {"center": center, "width": width, "length": 5, "alpha": 5.0}, "native")
    (gradient,) = torch.autograd.grad(out.sum(), center, create_graph=True)
    with pytest.raises(NotImplementedError, match="cnm_kernels::gaussian_mask is differentiable once"):
        gradient.sum().backward()


def imported_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import cnm_kernels; from cnm_kernels import _C_cpu; print(_C_cpu.isa())"
    environment = os.environ | {native.ISA_VARIABLE: isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=TESTS, capture_output=True, text=True)


def test_the_environment_chooses() -> None:
    assert imported_with("portable").stdout.strip() == "portable"


def test_the_environment_is_checked() -> None:
    outcome = imported_with("avx1024")
    assert outcome.returncode != 0
    assert "CNM_KERNELS_CPU_ISA: unknown instruction set 'avx1024'; choose one of portable, avx2" in outcome.stderr
