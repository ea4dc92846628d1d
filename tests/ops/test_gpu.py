"""Tests that need a GPU; its backends' numerics are in ``test_every_op.py`` with all the others'."""

from __future__ import annotations

import pytest
import torch
from samples import run, sample

from cnm_kernels import registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def _backend(name: str) -> object:
    reason = registry.unavailable("gaussian_attention", name, "cuda", torch.bfloat16)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


on_backends = pytest.mark.parametrize("backend", [_backend("native"), _backend("triton")])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("gaussian_attention", "frames-200"),
        ("contrastive_reconstruction_loss", "published-13x256x1112"),
        ("dropout_add_layer_norm", "published-12x256"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_backends
def test_a_cuda_graph_holds_forward_and_backward(backend: str, op: str, name: str, dtype: torch.dtype) -> None:
    inputs = sample(op, name, dtype, "cuda")
    leaves = {
        key: value.requires_grad_() for key, value in inputs.items() if getattr(value, "is_floating_point", bool)()
    }
    inputs["seed"] = torch.tensor(7, device="cuda") if "seed" in inputs else None
    inputs = {key: value for key, value in inputs.items() if value is not None}

    def step() -> tuple[torch.Tensor, ...]:
        out = run(op, inputs, backend)[0]
        return (out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values())))

    expected = [tensor.clone() for tensor in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for tensor, wanted in zip(captured, expected, strict=True):
        assert torch.equal(tensor, wanted)


@on_backends
def test_the_loss_never_holds_the_logits(backend: str) -> None:
    V = 8001
    inputs = {
        "hidden": torch.randn(3, 128, 20, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True),
        "weight": torch.randn(V, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True),
        "bias": torch.zeros(V, device="cuda", dtype=torch.bfloat16, requires_grad=True),
        "target": torch.randint(V, (128, 20), device="cuda"),
        "valid_lengths": torch.full((128,), 20, device="cuda"),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run("contrastive_reconstruction_loss", inputs, backend)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 128 * 20 * V * 2 / 2  # half of them, in bfloat16


@on_backends
def test_float32_products_are_not_tf32(backend: str) -> None:
    """Three tf32 products, which tensor cores cut off instead of rounding, err a few times what plain float32 errs; one
    alone errs a thousand times that."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 50, 64, generator=generator) for _ in range(3))
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    plain = torch.softmax(q @ k.mT / 8, -1) @ v
    (ours,) = run("weighted_attention", {"query": q.cuda(), "key": k.cuda(), "value": v.cuda()}, backend)
    assert (ours.cpu().double() - exact).abs().max() <= 16 * (plain.double() - exact).abs().max()
