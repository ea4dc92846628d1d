"""``absorbed_attention``: what is particular to it; what it owes like every op is in ``test_every_op.py``."""

from __future__ import annotations

import pytest
import torch
from samples import targets

import cnm_kernels

OP = "absorbed_attention"
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets(OP, [torch.float32]))


@on_every_float32
def test_absorbed_projections_give_the_layer_s_attention(backend: str, device: str, dtype: torch.dtype) -> None:
    """(W_q x) . (W_k y) = x . (W_q^T W_k y), head by head, and W_o of the heads' values added up."""
    generator = torch.Generator().manual_seed(0)
    B, H, Lq, Lk, D = 2, 4, 9, 3, 16
    d = D // H
    x, y = (torch.randn(B, L, D, generator=generator).to(device, dtype) for L in (Lq, Lk))
    W_q, W_k, W_v, W_o = (torch.randn(D, D, generator=generator).to(device, dtype) / D**0.5 for _ in range(4))
    key_weight = torch.rand(B, Lk, generator=generator).to(device, dtype)

    def heads(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (states @ weight.T).unflatten(-1, (H, d)).transpose(1, 2)

    key = heads(y, W_k) @ W_q.view(H, d, D)  # [B, H, Lk, D]
    value = heads(y, W_v) @ W_o.T.reshape(H, d, D)
    with cnm_kernels.use_backend(backend):
        out = cnm_kernels.absorbed_attention(x, key, value, scale=d**-0.5, key_weight=key_weight)
        plain = cnm_kernels.weighted_attention(heads(x, W_q), heads(y, W_k), heads(y, W_v), key_weight)
    torch.testing.assert_close(out, plain.transpose(1, 2).flatten(2) @ W_o.T, rtol=1e-4, atol=1e-5)
