"""How dropout is checked although every contender draws another mask: the mask is read off the result."""

from __future__ import annotations

from torch import Tensor

from benchmarks.registry import Refused

P_DROP = 6554 / 65536  # the published 0.1, to the nearest probability that every contender can draw exactly
STANDARD_DEVIATIONS = 6  # that the share of dropped elements may be off


def kept_by(gradient_of_x: Tensor) -> Tensor:
    """Returns which elements were kept: those with a gradient, as no upstream gradient is zero.

    Raises:
        Refused: not a share P_DROP of them is zero, or a row's neighbours are dropped together.
    """
    kept = gradient_of_x != 0
    expect_share("dropped elements", ~kept, P_DROP)
    expect_share("elements dropped with their neighbour", ~(kept[:, 1:] | kept[:, :-1]), P_DROP**2)
    return kept


def expect_share(what: str, happened: Tensor, p: float) -> None:
    allowed = STANDARD_DEVIATIONS * (p * (1 - p) / happened.numel()) ** 0.5
    share = happened.double().mean().item()
    if abs(share - p) > allowed:
        raise Refused(f"the share of {what} is {share:.5f}, expected {p:.5f} +- {allowed:.5f}")
