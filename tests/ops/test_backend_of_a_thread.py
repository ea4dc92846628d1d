"""use_backend is a thread's own; a backward keeps its forward's backend, wherever and whenever it runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from op_records import DIFFERENTIABLE
from samples import cases, run, sample
from test_every_op import TYPICAL
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cnm_kernels
from cnm_kernels import registry

ONE_EACH = {op: names[:1] for op, names in TYPICAL.items()}
OTHER = {"torch": "native", "native": "torch"}


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_other_threads_are_not_disturbed() -> None:
    outside = registry.requested()
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> str | None:
        with cnm_kernels.use_backend("native"):
            entered.set()
            assert may_leave.wait(60)
            return registry.requested()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        assert entered.wait(60)
        assert registry.requested() == outside
        with cnm_kernels.use_backend("torch"):
            assert registry.requested() == "torch"
            assert in_a_thread(registry.requested) == outside
            may_leave.set()
            assert result.result() == "native"
            assert registry.requested() == "torch"
    assert registry.requested() == outside
    assert not registry._blocks


def test_nor_are_other_tasks() -> None:
    async def one(name: str) -> str | None:
        with cnm_kernels.use_backend(name):
            await asyncio.sleep(0)
            return registry.requested()

    async def both() -> list[str | None]:
        return list(await asyncio.gather(one("torch"), one("native")))

    assert asyncio.run(both()) == ["torch", "native"]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "another-thread"])
@pytest.mark.parametrize("block", ["left", "changed"])
@pytest.mark.parametrize(("op", "name", "backend", "device", "dtype"), cases(ONE_EACH, [torch.float32]))
def test_a_backward_keeps_its_forwards_backend(
    op: str, name: str, backend: str, device: str, dtype: torch.dtype, block: str, elsewhere: bool
) -> None:
    names = [n for n in DIFFERENTIABLE[op] if sample(op, name, dtype, device).get(n) is not None]

    def graph() -> tuple[Tensor, list[Tensor]]:
        inputs = sample(op, name, dtype, device)
        leaves = [inputs[n].requires_grad_() for n in names]
        return run(op, inputs, backend)[0].square().sum(), leaves

    def differentiate(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        if block == "left":
            return torch.autograd.grad(loss, leaves)
        with cnm_kernels.use_backend(OTHER.get(backend, "torch")):
            return torch.autograd.grad(loss, leaves)

    with cnm_kernels.use_backend(backend):
        wanted = torch.autograd.grad(*graph())
    loss, leaves = graph()
    found = in_a_thread(lambda: differentiate(loss, leaves)) if elsewhere else differentiate(loss, leaves)
    for ours, expected in zip(found, wanted, strict=True):
        assert torch.equal(ours, expected)


def test_a_checkpointed_forward_runs_again_on_its_backend() -> None:
    ran: list[str | None] = []

    def segment(x: Tensor) -> Tensor:
        ran.append(registry.requested())
        return cnm_kernels.dropout(x, 0.5, seed=1)

    with cnm_kernels.use_backend("torch"):
        checkpoint(segment, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert ran == ["torch", "torch"]


def test_what_is_compiled_follows_the_block() -> None:
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        ran.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: cnm_kernels.dropout(x, 0.5, seed=1), backend=backend, fullgraph=True)
    for name in ("torch", "native", "torch"):
        with cnm_kernels.use_backend(name):
            compiled(torch.ones(3))
    assert len(ran) == 2
    assert ("cnm_kernels" in ran[0], "cnm_kernels" in ran[1]) == (False, True)
