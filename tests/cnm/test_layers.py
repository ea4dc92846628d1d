"""Attention over a source: every way to compute it is the plain one, and the cheapest is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from small_runs import synthetic_config
from torch import Tensor

from cnm.models.cnm import CNM
from cnm.models.layers import MultiheadAttention
from cnm_kernels import absorption
from cnm_kernels.absorption import Absorb, Source

FORMS = (absorption.into_queries, absorption.into_keys)
D, H = 24, 3


def make(weighted: bool, padded: bool) -> tuple[MultiheadAttention, Source, Tensor, Tensor | None]:
    """Attention, source, queries [4, 6, D] and how many of them count."""
    torch.manual_seed(0)
    attention = MultiheadAttention(D, H).double()
    for parameter in attention.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.3)
    states = torch.randn(4, 5, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 5, dtype=torch.float64, requires_grad=True) if weighted else None
    x = torch.randn(4, 6, D, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([6, 1, 4, 3]) if padded else None
    return attention, Source(states, torch.tensor([5, 2, 1, 4]), weight), x, rows


def results(form: Absorb | None, weighted: bool, padded: bool) -> Iterator[tuple[str, Tensor]]:
    """The output in rows that count, and every gradient."""
    attention, source, x, rows = make(weighted, padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(absorption, "cheapest", lambda *_: form)
        out = attention.attend_to(source, x, rows, minimize_flops=True)
    assert out.shape == x.shape
    if rows is not None:
        out = out * (torch.arange(6) < rows[:, None])[..., None]
    yield "out", out
    inputs = {"x": x, "states": source.states, **dict(attention.named_parameters())}
    if weighted:
        assert isinstance(source.weighting, Tensor)
        inputs["weighting"] = source.weighting
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    yield from zip(inputs, torch.autograd.grad((out * direction).sum(), list(inputs.values())), strict=True)


@pytest.mark.parametrize("padded", [False, True], ids=["all-rows", "lengths"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_absorbing_projections_changes_nothing(form: Absorb, weighted: bool, padded: bool) -> None:
    expected = dict(results(None, weighted, padded))
    assert expected["in_proj_bias"].abs().max() > 0.1
    for name, value in results(form, weighted, padded):
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("queries", "keys", "form"),
    [(200, 14, "into_keys"), (13, 50, "into_queries"), (1, 200, "into_queries")],
    ids=["frames-ask-words", "words-ask-clips", "last-frame-asks-all"],
)
def test_the_cheapest_form_is_taken(queries: int, keys: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MultiheadAttention(256, 4)
    taken: list[str] = []

    def noting(name: str) -> Callable[..., Tensor]:
        def noted(*_: object) -> Tensor:
            taken.append(name)
            return torch.zeros(())

        return noted

    for name in ("into_queries", "into_keys"):
        monkeypatch.setattr(absorption, name, noting(name))
    monkeypatch.setattr(MultiheadAttention, "_project_both", noting("both"))
    source = Source(torch.zeros(2, keys, 256), torch.full((2,), keys))
    attention.attend_to(source, torch.zeros(2, queries, 256), minimize_flops=True)
    attention.attend_to(source, torch.zeros(2, queries, 256))
    weighted = Source(source.states, source.lengths, torch.ones(2, keys))
    attention.attend_to(weighted, torch.zeros(2, queries, 256), minimize_flops=True)
    assert taken == [form, "both", form]


def test_products_of_both_sides_are_the_cheapest_for_wide_sides() -> None:
    assert absorption.cheapest(256, 4, 200, 200) is None


def test_only_the_lean_steps_on_cpus_minimize_flops() -> None:
    model = CNM(synthetic_config(dataset__vocab_size=9))
    assert model.forward_pass(minimize_flops=True).minimize_flops
    assert not model.forward_pass().minimize_flops
    assert not model.to("meta").forward_pass(minimize_flops=True).minimize_flops
