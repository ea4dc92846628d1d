"""linear: what is particular to it; what holds for every op is in ``test_every_op.py``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.linear import SAMPLES, layer
from samples import targets
from torch.profiler import ProfilerActivity, profile

import cnm_kernels
from cnm_kernels import registry
from cnm_kernels.ops.linear import linear_beside

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
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], device=device)
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.linear(x, weight, relu=True)
        (gradient,) = torch.autograd.grad(out[0].sum(), x)
    assert out[0].tolist() == [1.0, 0.0, 0.0]
    assert out[1].isnan().all()
    assert gradient[0].tolist() == [1.0, 0.0]


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


@pytest.mark.parametrize("sample", ["feed-forward", "odd-3x5x37", "words-13-of-256", "groups-lengths", "heads"])
@pytest.mark.parametrize("readers", ["both", "linear", "other"])
@on_every_target
def test_beside_others_the_gradients_are_the_same(
    backend: str, device: str, dtype: torch.dtype, readers: str, sample: str
) -> None:
    """Bit for bit what autograd adds up, rows of padding included."""
    inputs = SAMPLES[sample](Draw(f"beside {sample}", dtype, device))
    options = {name: inputs[name] for name in ("relu", "lengths") if name in inputs}
    gradients = []
    for function in (
        lambda x, *others: (cnm_kernels.linear(x, *others, **options), x),
        partial(linear_beside, **options),
    ):
        leaves = [inputs[name].nan_to_num().requires_grad_() for name in ("x", "weight", "bias")]
        with cnm_kernels.use_backend(backend):
            out, x = function(*leaves)
        draw = Draw(f"gradients {sample}", dtype, device)
        of_out, of_x = (draw.normal(*tensor.shape) for tensor in (out, x))
        roots = {"both": [out, x.abs()], "linear": [out], "other": [x.abs()]}[readers]
        upstream = {"both": [of_out, of_x], "linear": [of_out], "other": [of_x]}[readers]
        gradients.append(torch.autograd.grad(roots, leaves, upstream, allow_unused=True))
    for separate, beside in zip(*gradients, strict=True):
        assert (separate is None) == (beside is None)
        assert separate is None or torch.equal(separate, beside)


@on_every_float32
def test_beside_others_nothing_is_added_up_by_autograd(backend: str, device: str, dtype: torch.dtype) -> None:
    if backend != "native":
        pytest.skip("the native backend's doing")
    draw = Draw("added up", dtype, device)
    x = draw.normal(3, 8).requires_grad_()
    out, passed = linear_beside(x * 2, draw.normal(5, 8))
    loss = out.sum() + passed.abs().sum()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loss.backward()
    assert not {"aten::add", "aten::add_"} & {event.key for event in recorded.key_averages()}


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
