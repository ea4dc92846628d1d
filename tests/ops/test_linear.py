"""linear: what is particular to it; what holds for every op is in ``test_every_op.py``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.linear import layer
from samples import targets

import cnm_kernels
from cnm_kernels import registry

OP = "linear"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))
on_every_target = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP))


@on_every_target
@given(
    rows=st.integers(0, 220),
    K=st.integers(1, 70),
    M=st.integers(1, 70),
    relu=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_size(
    backend: str, device: str, dtype: torch.dtype, rows: int, K: int, M: int, relu: bool, bias: bool, seed: int
) -> None:
    inputs = layer(Draw(f"any size {seed}", dtype, device), rows, K, M=M, relu=relu)
    if not bias:
        inputs["bias"] = None
    check_values(OP, inputs, backend)
    if not relu:  # next to its kink rounding decides
        check_gradients(OP, inputs, backend)


@on_every_float32
def test_relu_stops_gradients_and_keeps_nan(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], device=device)
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.linear(x, weight, relu=True)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out[0].tolist() == [1.0, 0.0, 6.0]
    assert out[1].isnan().all()
    assert gradient.tolist() == [[1.0, 3.0], [0.0, 3.0]]  # F.relu lets gradients through where the output is NaN


@pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.bfloat16, torch.float16]))
def test_a_float32_bias_is_not_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    if device != "cpu":
        pytest.skip("GPUs' libraries add a bias of the operands' dtype")
    x, weight = torch.full((257, 1), -10.0, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    bias = torch.tensor([10.03], requires_grad=True)
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.linear(x, weight, bias)
        (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert out.flatten().tolist() == pytest.approx([0.03] * 257, rel=1e-2)
    assert gradient.dtype == torch.float32
    assert gradient.item() == 257  # which bfloat16 cannot hold


def test_the_bias_alone_is_trained() -> None:
    """x is not kept then, and its gradient not wanted: what is returned for it is empty."""
    if registry.unavailable(OP, "native", "cpu", torch.float32):
        pytest.skip("the C++ module is not built")
    d_out, weight = torch.ones(3, 7), torch.ones(7, 5)
    arguments = (d_out, None, weight, None, None, False, False, False, True)
    torch.library.opcheck(torch.ops.cnm_kernels.linear_backward, arguments)
    d_x, d_weight, d_bias = torch.ops.cnm_kernels.linear_backward(*arguments)
    assert (d_x.shape, d_weight.shape, d_bias.tolist()) == ((0,), (0,), [3.0] * 7)


@pytest.mark.parametrize("grouped", [False, True])
def test_frozen_weight_keeps_no_input(grouped: bool) -> None:
    """x is read for the weight's gradient alone; that of x, and of the bias, come without it."""
    draw = Draw("frozen", torch.float32, "cpu")
    groups = (2,) if grouped else ()
    x, weight, bias = draw.normal(3, 5, *groups, 8), draw.normal(*groups, 7, 8), draw.normal(*groups, 7)
    d_out = draw.normal(3, 5, *groups, 7)
    gradients = []
    for frozen in (True, False):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        with cnm_kernels.use_backend("native"):
            out = cnm_kernels.linear(leaves[0], weight.clone().requires_grad_(not frozen), leaves[1])
        sizes = [saved.shape for saved in out.grad_fn.saved_tensors if saved is not None]
        assert (x.shape in sizes) is not frozen
        gradients.append(torch.autograd.grad(out, leaves, d_out))
    for without, kept in zip(*gradients, strict=True):
        assert torch.equal(without, kept)


@on_every_float32
def test_narrow_inputs_train_float32_parameters(backend: str, device: str, dtype: torch.dtype) -> None:
    draw = Draw("master weights", torch.float32, device)
    weight, bias = draw.normal(5, 8).requires_grad_(), draw.normal(5).requires_grad_()
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.linear(draw.normal(3, 8).bfloat16(), weight, bias)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_a_backend_without_it_leaves_it_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vendors' libraries do plain products best on their processors; every other op is refused by name."""
    monkeypatch.setitem(registry._modules, "triton", None)
    with cnm_kernels.use_backend("triton"):
        assert registry.choice("linear", "cpu", torch.float32) == "torch"
        with pytest.raises(cnm_kernels.BackendUnavailable):
            registry.choice("linear_nll", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_takes_no_other_numbers(dtype: torch.dtype) -> None:
    with torch.autocast("cpu"), pytest.raises(TypeError, match="x must be"):
        cnm_kernels.linear(torch.ones(2, 4, dtype=dtype), torch.ones(3, 4))
