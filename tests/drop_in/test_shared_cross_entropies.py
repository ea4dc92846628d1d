"""A cross entropy that two losses ask for is computed once, for as long as they ask for the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cnm_kernels.drop_in.losses import DeferredLinear, cal_nll_loss

B, L, V, D = 2, 5, 7, 4


def shorten(mask: Tensor) -> None:
    mask[0, 3:] = 0


def shorten_by_numpy(mask: Tensor) -> None:
    mask.numpy()[0, 3:] = 0


def shorten_data(mask: Tensor) -> None:
    mask.data[0, 3:] = 0


@pytest.mark.parametrize("change", [shorten, shorten_by_numpy, shorten_data])
@pytest.mark.parametrize("changed", ["ids", "mask"])
def test_ids_and_masks_that_change_are_asked_with_again(changed: str, change: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    hidden, layer = torch.randn(B, L, D), DeferredLinear(D, V)
    ids, mask = torch.randint(1, V, (B, L)), torch.ones(B, L, dtype=torch.uint8)
    logits = layer(hidden)
    before = cal_nll_loss(logits, ids, mask)[0]
    change(ids if changed == "ids" else mask)
    after = cal_nll_loss(logits, ids, mask)[0]
    assert after[1] == before[1]
    torch.testing.assert_close(after, cal_nll_loss(layer(hidden), ids, mask)[0])
    assert not torch.allclose(after, before)
