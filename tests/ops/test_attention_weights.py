"""``attention_weights``: what is particular to it; what it owes like every op is in ``test_every_op.py``."""

from __future__ import annotations

import pytest
import torch
from samples import run, sample, targets

import cnm_kernels

OP = "attention_weights"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_weights_sum_to_one(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = sample(OP, "weighted-causal-lengths", dtype, device)
    (weights,) = run(OP, inputs, backend)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights.triu(1).any()


@on_every_float32
def test_a_query_without_keys_weighs_none(backend: str, device: str, dtype: torch.dtype) -> None:
    (weights,) = run(OP, sample(OP, "unweighted-lengths-0-1-odd-over", dtype, device), backend)
    assert not weights[0].any()
    assert weights[1:].sum(-1).allclose(torch.ones_like(weights[1:, :, 0]))


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7)], ids=["batch", "queries"])
@on_every_float32
def test_gradients_of_nothing_are_zeros(
    backend: str, device: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    B, Lq, Lk = sizes
    inputs = [torch.randn(B, 3, L, 8, device=device, requires_grad=True) for L in (Lq, Lk)]
    inputs.append(torch.rand(B, Lk, device=device, requires_grad=True))
    with cnm_kernels.use_backend(backend):
        gradients = torch.autograd.grad(cnm_kernels.attention_weights(*inputs).sum(), inputs)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]
    assert not any(gradient.any() for gradient in gradients)


@on_every_float32
def test_they_weigh_the_values_of_weighted_attention(backend: str, device: str, dtype: torch.dtype) -> None:
    """The mean over heads of one head is that head's."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, L, 8, generator=generator).to(device, dtype) for L in (5, 7, 7))
    key_weight = torch.rand(2, 7, generator=generator).to(device, dtype)
    with cnm_kernels.use_backend(backend):
        weights = cnm_kernels.attention_weights(query, key, key_weight)
        out = cnm_kernels.weighted_attention(query, key, value, key_weight)
    torch.testing.assert_close(weights @ value[:, 0], out[:, 0])


def test_packed_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_weights: key must have shape"):
        cnm_kernels.attention_weights(torch.randn(2, 4, 5, 8), torch.randn(2, 5, 2, 4, 8))
