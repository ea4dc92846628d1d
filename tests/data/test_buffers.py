"""Memory of batches that is lent, taken back when nobody looks at it any more, and lent again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import synthetic_config

from cnm.data import BatchLoader, Split, open_split
from cnm.data.buffers import BufferPool
from cnm.data.loader import AHEAD


def split() -> Split:
    return open_split(synthetic_config(dataset__num_videos=20).dataset, "train")


def test_what_was_dropped_is_lent_again_in_any_smaller_shape() -> None:
    pool = BufferPool(2)
    tensor = pool.take((4, 5))
    assert tensor.shape == (4, 5)
    assert tensor.dtype == torch.float32
    first = tensor.data_ptr()
    del tensor
    assert pool.take((3, 2, 3)).data_ptr() == first


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[1:].T,
        lambda tensor: tensor.numpy()[1:].T,
        lambda tensor: tensor.data,
    ],
    ids=["tensor", "view", "array", "detached"],
)
def test_what_is_held_is_not_lent_again(hold: Callable[[torch.Tensor], Any]) -> None:
    pool = BufferPool(2)
    tensor = pool.take((4, 5)).fill_(1)
    held = hold(tensor)
    del tensor
    gc.collect()
    other = pool.take((4, 5)).fill_(2)
    assert held.min() == held.max() == 1
    del held, other
    assert len(pool._free) == 2


def test_what_is_too_small_is_replaced() -> None:
    pool = BufferPool(2)
    pool.take((2,))
    assert pool.take((1000,)).shape == (1000,)


def test_no_more_wait_than_were_asked_for() -> None:
    pool = BufferPool(2)
    tensors = [pool.take((3,)) for _ in range(5)]
    tensors.clear()
    assert len(pool._free) == 2


def test_batches_that_are_all_kept_stay_what_they_were() -> None:
    data = split()
    loader = BatchLoader(data, 8, shuffle=True)
    kept = [list(loader.epoch(epoch)) for epoch in range(2)]
    for indices, batch in [pair for epoch in kept for pair in epoch]:
        torch.testing.assert_close(batch.frames, data.batch(indices).frames, rtol=0, atol=0)


def test_epochs_take_turns_with_a_few_buffers() -> None:
    loader = BatchLoader(split(), 8, shuffle=True)
    # Full batches alone: a buffer that was made for a short last one is replaced by a larger one.
    seen = {
        batch.frames.data_ptr()
        for epoch in range(5)
        for indices, batch in loader.epoch(epoch)
        if len(indices) == loader.batch_size
    }
    assert len(seen) <= AHEAD + 2 < len(loader)
