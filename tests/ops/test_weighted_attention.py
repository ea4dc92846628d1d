"""weighted_attention: its identities, its edges, any shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import check_gradients, check_values
from op_records.draw import Draw
from op_records.weighted_attention import attention
from samples import run, sample, targets

import cnm_kernels

OP = "weighted_attention"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_without_weights_it_is_scaled_dot_product_attention(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "unweighted-causal", dtype, device)
    expected = F.scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"], is_causal=True)
    torch.testing.assert_close(run(OP, inputs, backend)[0], expected)


@on_every_float32
@pytest.mark.parametrize("weight", [0.0, 1.0, 123.0])
def test_equal_weights_change_nothing(backend: str, device: str, dtype: torch.dtype, weight: float) -> None:
    inputs = sample(OP, "weighted-causal-lengths", dtype, device)
    inputs["key_weight"] = torch.full_like(inputs["key_weight"], weight)
    actual = run(OP, inputs, backend)
    expected = run(OP, inputs | {"key_weight": None}, backend)
    for tensor, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, wanted)


@on_every_float32
def test_a_weight_of_zero_keeps_a_trace(backend: str, device: str, dtype: torch.dtype) -> None:
    """1e-10 stays: a key of weight 0 beside keys of weight 1 gets 1e-10 of their share, not nothing."""
    query = key = torch.zeros(1, 1, 1, 4, device=device)
    key = key.expand(1, 1, 2, 4)
    value = torch.tensor([[[[1.0] * 4, [0.0] * 4]]], device=device)
    inputs = {"query": query, "key": key, "value": value, "key_weight": torch.tensor([[0.0, 1.0]], device=device)}
    assert run(OP, inputs, backend)[0].flatten().tolist() == pytest.approx([1e-10] * 4, rel=1e-4)


@on_every_float32
def test_a_query_without_any_key_gives_zeros_and_no_gradient(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "weighted-lengths-0-1-odd-over", dtype, device)  # the first length is 0
    leaves = {name: inputs[name].requires_grad_() for name in ("query", "key", "value", "key_weight")}
    (out,) = run(OP, inputs, backend)
    assert not out[0].any()
    out.sum().backward()
    for name, leaf in leaves.items():
        assert not leaf.grad[0].any(), name
        assert leaf.grad.isfinite().all(), name


@on_every_float32
def test_padded_keys_are_never_read(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whatever stands behind the length changes no bit of the output and gets no gradient."""
    inputs = sample(OP, "weighted-lengths-0-1-odd-over", dtype, device)
    clean = run(OP, inputs, backend)[0]
    padding = torch.arange(7, device=device) >= inputs["key_lengths"][:, None]
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(padding[:, None, :, None], 1e4).requires_grad_()
    out = run(OP, inputs, backend)[0]
    assert torch.equal(out, clean)
    out.sum().backward()
    for name in ("key", "value"):
        assert not inputs[name].grad[padding[:, None].expand(5, 2, 7)].any(), name


@on_every_float32
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20), st.integers(1, 20), st.integers(1, 40)),
    causal=st.booleans(),
    lengths=st.booleans(),
    weights=st.booleans(),
)
def test_any_shape(
    backend: str,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    causal: bool,
    lengths: bool,
    weights: bool,
) -> None:
    draw = Draw(str(sizes), dtype, device)
    B, _, _, Lk, _ = sizes
    inputs = attention(draw, *sizes, causal=causal)
    if lengths:
        inputs["key_lengths"] = draw.integers(Lk + 2, B)
    if weights:
        inputs["key_weight"] = draw.uniform(B, Lk)
    check_values(OP, inputs, backend)
    check_gradients(OP, inputs, backend)


@on_every_float32
@pytest.mark.parametrize("together", [True, False], ids=["all-three", "key-and-value"])
def test_packed_heads_are_the_same_heads(backend: str, device: str, dtype: torch.dtype, together: bool) -> None:
    """One projection gives packed heads, and takes their gradients packed."""
    draw = Draw("packed", dtype, device)
    B, L, H, d = 3, 11, 2, 7
    packed = draw.normal(B, L, 3, H, d)
    upstream = draw.normal(B, H, L, d)
    lengths = draw.lengths(11, 4, 1)

    def results(pack: bool) -> list[torch.Tensor]:
        leaf = packed.detach().requires_grad_()
        query, key, value = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        operands = ([leaf] if together else [query, leaf[:, :, 1:]]) if pack else [query, key, value]
        with cnm_kernels.use_backend(backend):
            out = cnm_kernels.weighted_attention(*operands, causal=True, key_lengths=lengths)
            return [out, *torch.autograd.grad(out, leaf, upstream)]

    for got, wanted in zip(results(True), results(False), strict=True):
        assert torch.equal(got, wanted)


def test_packed_heads_that_do_not_fit_are_refused() -> None:
    packed = torch.randn(2, 5, 3, 4, 8)
    with pytest.raises(ValueError, match=r"query must have shape \[B, Lk, 3, H, d\] with .*, got \[2, 5, 2, 4, 8\]"):
        cnm_kernels.weighted_attention(packed[:, :, :2])
    with pytest.raises(ValueError, match=r"key must have shape \[B, Lk, 2, H, d\]"):
        cnm_kernels.weighted_attention(torch.randn(2, 4, 5, 8), packed)
    with pytest.raises(TypeError, match="value is given without key"):
        cnm_kernels.weighted_attention(torch.randn(2, 4, 5, 8), None, torch.randn(2, 4, 5, 8))


@on_every_float32
@pytest.mark.parametrize("size", [1e3, 3e4])
@pytest.mark.parametrize("d", [20, 64, 100])
def test_weights_sum_to_one_at_large_scores(backend: str, device: str, dtype: torch.dtype, size: float, d: int) -> None:
    """Scores of 1e6 to 1e9 round alike in forward and backward."""
    inputs = attention(Draw("large scores", dtype, device), 2, 2, 70, 90, d)
    inputs |= {"query": inputs["query"] * size, "key": inputs["key"] * size}
    value = inputs["value"].requires_grad_()
    run(OP, inputs, backend)[0].sum().backward()
    sums = value.grad.sum(-2)
    if backend == "triton":  # the interpreter's products round by the shapes of their tiles
        assert (value.grad <= 70).all()
    else:
        torch.testing.assert_close(sums, torch.full_like(sums, 70.0))


def _small(draw: Draw, n: int) -> torch.Tensor:
    """Weights of 0, 1e-12, 1e-7 and others of these sizes. [n]"""
    return torch.cat([draw.values([0.0, 1e-12, 1e-7]), 10 ** draw.uniform(n - 3, low=-12, high=-5)])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("op", ["weighted_attention", "attention_weights", "branched_attention", "absorbed_attention"])
def test_a_lone_key_has_all_the_weight_whatever_it_is(op: str, backend: str) -> None:
    draw = Draw("lone key", torch.float32, "cpu")
    query, key, value = draw.normal(50, 2, 3, 16), draw.normal(50, 2, 4, 16), draw.normal(50, 2, 4, 16)
    key_weight = _small(draw, 50).expand(4, 50).T.requires_grad_()
    inputs = {"query": query, "key": key, "value": value, "key_weight": key_weight}
    if op == "attention_weights":
        del inputs["value"]
    elif op == "branched_attention":
        inputs["key_weights"] = torch.stack([inputs.pop("key_weight"), torch.ones(50, 4)])
    elif op == "absorbed_attention":
        inputs |= {"query": query[:, 0], "scale": 0.25}
    (out,) = run(op, inputs | {"key_lengths": torch.ones(50, dtype=torch.int64)}, backend)
    (gradient,) = torch.autograd.grad(out, key_weight, draw.normal(*out.shape))
    assert not gradient.any()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_small_weight_of_a_key_that_a_query_sees_alone(backend: str) -> None:
    """The first query of causal attention gives the first key's weight no gradient; the others give it a large one."""
    draw = Draw("alone", torch.float32, "cpu")
    query, key, value, upstream = (draw.normal(40, 2, 5, 16) for _ in range(4))
    key_weight = draw.uniform(40, 5)
    key_weight[:, 0] = _small(draw, 40)

    def gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        leaf = key_weight.to(dtype).requires_grad_()
        inputs = {"query": query.to(dtype), "key": key.to(dtype), "value": value.to(dtype), "key_weight": leaf}
        (out,) = run(OP, inputs | {"causal": True}, backend)
        return torch.autograd.grad(out, leaf, upstream.to(dtype))[0].double()

    expected = gradient("torch", torch.float64)
    error = (gradient(backend, torch.float32) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
