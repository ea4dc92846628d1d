"""accelerate(model): decoder layers, and their dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate_checks import (
    EVERYWHERE,
    FUTURE,
    PREFIX,
    B,
    D,
    H,
    assert_as_good,
    differentiate,
    draw,
    module_in,
)
from torch import Tensor

import cnm_kernels
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer
from examples.research_code.transformer import DecoderLayer

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def layer_call(dtype: torch.dtype, device: str, *, accelerated: bool, cross: bool) -> tuple[Any, list[Tensor]]:
    layer = module_in(lambda: DecoderLayer(D, H, dropout=0.0), dtype, device)
    with torch.no_grad():
        for norm in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm):
            norm.weight.copy_((1 + draw(D, seed=3) / 8).bfloat16())
            norm.bias.copy_(draw(D, seed=4) / 8)
    if accelerated:
        cnm_kernels.accelerate(layer)
        assert isinstance(layer, AcceleratedLayer)
    x, source = (draw(5, B, D, seed=seed).to(device, dtype).requires_grad_() for seed in (1, 2))
    weight = draw(B, 5, seed=7).sigmoid().bfloat16().to(device, dtype).requires_grad_()
    padding, future = PREFIX.byte().to(device), FUTURE.to(device, dtype)
    arguments = (x, padding, source, padding, future, weight, None) if cross else (x, padding, None, None, future)
    options = {} if cross else {"tgt_gauss_weight": weight}
    return lambda: layer(*arguments, **options), [x, source, weight, *layer.parameters()]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("backend", "device", "dtype"), EVERYWHERE)
def test_decoder_layer(backend: str, device: str, dtype: torch.dtype, cross: bool) -> None:
    plain = differentiate(*layer_call(dtype, device, accelerated=False, cross=cross))
    exact = differentiate(*layer_call(torch.float64, device, accelerated=False, cross=cross))
    with cnm_kernels.use_backend(backend):
        found = differentiate(*layer_call(dtype, device, accelerated=True, cross=cross))
    assert_as_good(found, plain, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_under_autocast_a_gpu_s_layer_gives_what_pytorch_s_does() -> None:
    layer = DecoderLayer(D, H, dropout=0.0).cuda()
    fast = cnm_kernels.accelerate(copy.deepcopy(layer))
    x = torch.randn(5, B, D, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        wanted, found = layer(x, None)[0], fast(x, None)[0]
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_a_layer_s_dropout_follows_the_seed_the_rate_and_the_mode() -> None:
    layer = cnm_kernels.accelerate(DecoderLayer(D, H, dropout=0.4))
    x = torch.randn(5, B, D)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x, None)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(layer(x, None)[0], layer(x, None)[0])
    layer.eval()
    assert torch.equal(run(1), run(2))


def test_a_layer_drops_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three sublayers, with masks of its own."""
    drawn: list[tuple[float, Any, int]] = []
    op = cnm_kernels.ops.dropout_add_layer_norm

    def recorded(*arguments: Any, seed: Any, offset: int, **options: Any) -> Tensor:
        drawn.append((arguments[4], int(seed), offset))
        return op(*arguments, seed=seed, offset=offset, **options)

    layer = cnm_kernels.accelerate(DecoderLayer(D, H, dropout=0.4))
    monkeypatch.setattr(cnm_kernels.ops, "dropout_add_layer_norm", recorded)
    x = torch.randn(5, B, D)
    for _ in range(2):
        layer(x, None, x)
    assert [rate for rate, _, _ in drawn] == [0.4] * 6
    assert len({(seed, offset) for _, seed, offset in drawn}) == 6
    drawn.clear()
    layer.eval()(x, None, x)
    assert [rate for rate, _, _ in drawn] == [0.0] * 3


def test_a_hooked_layer_calls_its_parts() -> None:
    layer = DecoderLayer(D, H, dropout=0.0).double()
    cnm_kernels.accelerate(layer)
    x = draw(5, B, D)
    expected = layer(x, None)[0]
    seen: list[torch.Size] = []
    layer.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(layer(x, None)[0], expected)
    assert seen == [torch.Size([5, B, 2 * D])]


@pytest.mark.parametrize("part", ["fc1", "self_attn", "final_layer_norm", "self_attn.out_proj"])
def test_a_forward_set_on_a_part_is_called(part: str) -> None:
    """As tools do that wrap a module's forward in place."""
    layer = DecoderLayer(D, H, dropout=0.0).double()
    cnm_kernels.accelerate(layer)
    x = draw(5, B, D)
    expected = layer(x, None)[0]
    module: Any = layer.get_submodule(part)
    own, calls = module.forward, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(part)
        return own(*arguments, **options)

    module.forward = counted
    torch.testing.assert_close(layer(x, None)[0], expected)
    assert calls == [part]
