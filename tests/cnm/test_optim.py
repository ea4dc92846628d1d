"""The optimizer against the published formula."""

from __future__ import annotations

import published
import pytest
import torch

from cnm.training.optim import Adam


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_the_published_one(weight_decay: float) -> None:
    """Large, tiny, no and transposed gradients, and a rate that changes."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 5), (4, 6), (7,), ()]]
    ours = [value.clone().requires_grad_() for value in start]
    expected = [value.clone() for value in start]
    adam = Adam(ours, lr=1.0, weight_decay=weight_decay)
    reference = published.PublishedAdam(expected, weight_decay)
    for update in range(5):
        for one, other in zip(ours, expected, strict=True):
            other.grad = torch.randn_like(other) * 10.0 ** (3 - 3 * update)
            one.grad = other.grad.clone()
        ours[1].grad = expected[1].grad.T.contiguous().T  # as a gradient through a transpose lies in memory
        adam.param_groups[0]["lr"] = lr = 0.01 / (update + 1)
        adam.step()
        reference.step(lr)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_stays() -> None:
    still, moving = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    moving.grad = torch.ones(3)
    Adam([still, moving], lr=0.1).step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert not torch.equal(moving.detach(), torch.ones(3))
