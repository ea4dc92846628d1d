"""The ops where programs use them: several threads, forked processes, inference mode, vmap, copies and pickles."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_checks import gradients_of
from op_records import DIFFERENTIABLE, RECORDS, SAMPLES
from samples import run, sample
from step_checks import make_batch, make_model
from torch import Tensor

import cnm_kernels
from cnm_kernels import registry
from examples.research_code.attention import MultiheadAttention

BACKENDS = [name for name in ("native", "torch") if registry.unavailable("dropout", name, "cpu", torch.float32) is None]
OPS = {op: record.in_use for op, record in RECORDS.items()}
on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_ops = pytest.mark.parametrize("op", OPS)


def everything(op: str, backend: str) -> list[Tensor]:
    inputs = sample(op, OPS[op], torch.float32, "cpu")
    gradients = gradients_of(lambda **inputs: run(op, inputs, backend), inputs, DIFFERENTIABLE[op])
    return [*run(op, inputs, backend), *gradients.values()]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_samples_are_there() -> None:
    assert set(OPS) == set(registry.OPS)
    assert all(name in SAMPLES[op] for op, name in OPS.items())


def test_ops_may_be_called_from_several_threads() -> None:
    """All of them at once, each many times; the backend is the default one, which threads share."""

    def once(op: str) -> list[Tensor]:
        inputs = sample(op, OPS[op], torch.float32, "cpu")

        def call(**inputs: object) -> tuple[Tensor, ...]:
            outputs = getattr(cnm_kernels, op)(**inputs)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return [*call(**inputs), *gradients_of(call, inputs, DIFFERENTIABLE[op]).values()]

    wanted = {op: once(op) for op in OPS}
    jobs = [op for _ in range(12) for op in OPS]
    with ThreadPoolExecutor(8) as pool:
        for op, found in zip(jobs, pool.map(once, jobs), strict=True):
            assert same(found, wanted[op]), op


def _in_child(connection: object, op: str, backend: str) -> None:
    try:
        found: object = [tensor.detach().numpy() for tensor in everything(op, backend)]
    except Exception as error:
        found = repr(error)
    connection.send(found)  # type: ignore[attr-defined]
    connection.close()  # type: ignore[attr-defined]


@on_backends
def test_ops_run_after_fork(backend: str) -> None:
    """A data loader's worker does so: its parent has used its threads before."""
    torch.set_num_threads(2)
    try:
        wanted = everything("gaussian_attention", backend)
    finally:
        torch.set_num_threads(1)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_in_child, args=(there, "gaussian_attention", backend))
    process.start()
    assert here.poll(60), "the forked process hangs"
    found = here.recv()
    process.join(60)
    assert not isinstance(found, str), found
    assert same([torch.from_numpy(array) for array in found], wanted)


@on_backends
@on_ops
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_the_numbers_are_the_same(op: str, backend: str, mode: type) -> None:
    inputs = sample(op, OPS[op], torch.float32, "cpu")
    wanted = run(op, inputs, backend)
    for name in DIFFERENTIABLE[op]:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].requires_grad_()
    with mode():
        found = run(op, inputs, backend)
    assert same(list(found), list(wanted))
    assert not any(tensor.requires_grad for tensor in found)


@on_backends
@on_ops
def test_vmap_gives_the_right_answer(op: str, backend: str) -> None:
    inputs = sample(op, OPS[op], torch.float32, "cpu")
    name = DIFFERENTIABLE[op][0]
    several = torch.stack([inputs[name], 2 * inputs[name]])

    def call(tensor: Tensor) -> Tensor:
        return run(op, inputs | {name: tensor}, backend)[0]

    wanted = torch.stack([call(tensor) for tensor in several])
    torch.testing.assert_close(torch.vmap(call, randomness="same")(several), wanted)


def test_models_are_copied_and_pickled_with_their_results() -> None:
    model, batch = make_model().eval(), make_batch()
    inputs = (batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
    wanted = model.localize(*inputs)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    restored = make_model().eval()
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        for a, b in zip(other.localize(*inputs), wanted, strict=True):
            assert torch.equal(a, b)


def test_an_accelerated_model_is_copied_and_pickled() -> None:
    module = MultiheadAttention(8, 2)
    query = torch.randn(5, 3, 8)
    cnm_kernels.accelerate(module)
    wanted = module(query, query, query)[0]
    assert torch.equal(copy.deepcopy(module)(query, query, query)[0], wanted)
