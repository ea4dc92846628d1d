"""accelerate_losses: the published functions' values, dicts and gradients, and no logits where a layer can be fused."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnm_kernels
from benchmarks.bench_accelerate import LOSS
from cnm_kernels.drop_in.deferred import Deferred
from cnm_kernels.drop_in.losses import DeferredLinear
from examples.research_code import cnm_losses, cpl_losses

B, K, L, V, D, T = 4, 8, 6, 23, 16, 10
MODULES = {"CNM": cnm_losses, "CPL": cpl_losses}
LOGITS = {
    ("CNM", "rec_loss"): ("words_logit", "hard_neg_words_logit"),
    ("CNM", "ivc_loss"): ("words_logit", "hard_neg_words_logit", "easy_neg_words_logit"),
    ("CPL", "rec_loss"): ("words_logit", "ref_words_logit"),
    ("CPL", "ivc_loss"): ("words_logit", "neg_words_logit_1", "neg_words_logit_2", "ref_words_logit"),
}
MASKS = {
    "prefix": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "scattered": [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests left to the garbage collector
        yield
    for module in MODULES.values():
        cnm_kernels.restore(module)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).bfloat16().double()


def batch(
    family: str, names: tuple[str, ...], dtype: torch.dtype, mask: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments but for the logits, and the states [M, L, D] that each of them is made of."""
    rows = {"words_logit": K, "neg_words_logit_1": K, "neg_words_logit_2": K} if family == "CPL" else {}
    states = {name: draw(B * rows.get(name, 1), L, D, seed=i).to(dtype) for i, name in enumerate(names)}
    arguments: dict[str, Any] = LOSS | {
        "words_id": torch.randint(V, (B, L), generator=torch.Generator().manual_seed(5)),
        "words_mask": torch.tensor(MASKS[mask], dtype=torch.uint8),
    }
    if family == "CPL":
        arguments |= {"num_props": K, "gauss_weight": draw(B * K, T, seed=8).sigmoid().bfloat16().to(dtype)}
        arguments["gauss_weight"].requires_grad_()
    return arguments, states


def evaluate(
    family: str, loss: str, dtype: torch.dtype, names: tuple[str, ...], mask: str = "prefix", fuse: bool = False
) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    """The loss, its dict, and the gradients to states, layer and Gaussians."""
    arguments, states = batch(family, names, dtype, mask)
    layer = nn.Linear(D, V)
    with torch.no_grad():
        layer.weight.copy_(draw(V, D, seed=20) / 2)
        layer.bias.copy_(draw(V, seed=21))
    layer.bfloat16().to(dtype)
    if fuse:
        cnm_kernels.accelerate_losses(MODULES[family], layer)
    leaves = [*(state.requires_grad_() for state in states.values()), *layer.parameters()]
    logits = {name: layer(state) for name, state in states.items()}
    value, numbers = getattr(MODULES[family], loss)(**arguments, **logits)
    if "gauss_weight" in arguments and loss == "ivc_loss":
        leaves.append(arguments["gauss_weight"])
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    if fuse and mask == "prefix":
        assert all(isinstance(tensor, Deferred) and tensor.pending for tensor in logits.values())
    return value.detach(), numbers, [torch.zeros(()) if d is None else d for d in gradients]


def subsets(family: str, loss: str) -> list[tuple[str, ...]]:
    """The first logits alone, each other one beside it, and all."""
    first, *others = LOGITS[family, loss]
    return [(first,), *((first, other) for other in others), (first, *others)]


CASES = [(*key, names) for key in LOGITS for names in subsets(*key)]


@pytest.mark.parametrize("how", ["tensors", "fused"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "loss", "names"), CASES)
def test_values_dicts_and_gradients(
    family: str, loss: str, names: tuple[str, ...], dtype: torch.dtype, mask: str, how: str
) -> None:
    exact = evaluate(family, loss, torch.float64, names, mask)
    plain = evaluate(family, loss, dtype, names, mask)
    cnm_kernels.accelerate_losses(MODULES[family])
    found = evaluate(family, loss, dtype, names, mask, fuse=how == "fused")
    assert found[0].dtype == plain[0].dtype
    assert found[0].shape == ()
    assert set(found[1]) == set(plain[1])
    assert all(type(number) is float for number in found[1].values())

    def vector(result: tuple[Tensor, dict[str, float], list[Tensor]]) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([float(result[0]), *(result[1][key] for key in sorted(result[1]))], dtype=torch.float64)
        return numbers, torch.cat([d.double().flatten() for d in result[2]])

    for mine, other, want in zip(vector(found), vector(plain), vector(exact), strict=True):
        error, plain_error = ((tensor - want).norm() / want.norm().clamp_min(1e-9) for tensor in (mine, other))
        allowed = BOUND[dtype] if dtype in BOUND else 4 * plain_error + torch.finfo(dtype).eps
        assert error <= allowed


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_cal_nll_loss_and_its_accuracy(mask: str, fuse: bool) -> None:
    layer, state = nn.Linear(D, V).double(), draw(B, L, D, seed=1)
    ids = layer(state).argmax(-1)
    ids[:, ::2] = 0
    real = torch.tensor(MASKS[mask], dtype=torch.uint8)
    expected = cnm_losses.cal_nll_loss(layer(state), ids, real)
    cnm_kernels.accelerate_losses(cnm_losses, layer if fuse else None)
    logits = layer(state)
    found = cnm_losses.cal_nll_loss(logits, ids, real)
    if fuse:
        assert logits.pending == (mask == "prefix")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other.double())


def test_weights_in_place_of_the_mask() -> None:
    logits, ids, weights = draw(B, L, V, seed=1), torch.randint(V, (B, L)), draw(B, L, seed=2)
    real = torch.tensor(MASKS["prefix"], dtype=torch.uint8)
    expected = cnm_losses.cal_nll_loss(logits, ids, real, weights)
    cnm_kernels.accelerate_losses(cnm_losses)
    torch.testing.assert_close(cnm_losses.cal_nll_loss(logits, ids, real, weights)[0], expected[0])


def test_rec_and_ivc_share_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPL's two losses ask for six nlls, four of them different."""
    calls: list[int] = []
    op = cnm_kernels.ops.linear_nll

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return op(*arguments, **options)

    monkeypatch.setattr(cnm_kernels.ops, "linear_nll", counted)
    names = LOGITS["CPL", "ivc_loss"]
    arguments, states = batch("CPL", names, torch.float32, "prefix")
    layer = nn.Linear(D, V)
    cnm_kernels.accelerate_losses(cpl_losses, layer)
    logits = {name: layer(state) for name, state in states.items()}
    total = cpl_losses.rec_loss(**arguments, **logits)[0] + cpl_losses.ivc_loss(**arguments, **logits)[0]
    total.backward()
    assert len(calls) == 4


FORK = """
def rec_loss(words_logit, words_id, words_mask, num_props, ref_words_logit=None, **kwargs):
    ids, real = (x.unsqueeze(1).expand(-1, num_props, -1).flatten(0, 1) for x in (words_id, words_mask))
    loss = cal_nll_loss(words_logit, ids, real)[0].mean()
    if ref_words_logit is not None:
        loss = loss + cal_nll_loss(ref_words_logit, words_id, words_mask)[0].mean()
    return 3 * loss, {}
"""


def test_forks_around_cal_nll_loss_share_their_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of their own, ids and masks expanded anew for each: what is equal is computed once."""
    calls: list[int] = []
    op = cnm_kernels.ops.linear_nll

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return op(*arguments, **options)

    monkeypatch.setattr(cnm_kernels.ops, "linear_nll", counted)
    mine = types.ModuleType("losses_of_a_fork")
    mine.__dict__["cal_nll_loss"] = cnm_losses.cal_nll_loss
    exec(FORK, mine.__dict__)
    arguments, states = batch("CPL", LOGITS["CPL", "rec_loss"], torch.float64, "prefix")
    layer = nn.Linear(D, V).double()
    wanted = mine.rec_loss(**arguments, **{name: layer(state) for name, state in states.items()})[0]
    with pytest.warns(RuntimeWarning, match="the cal_nll_loss that it calls is still fused"):
        cnm_kernels.accelerate_losses(mine, layer)
    logits = {name: layer(state) for name, state in states.items()}
    for _ in range(2):
        torch.testing.assert_close(mine.rec_loss(**arguments, **logits)[0], wanted)
    assert len(calls) == 2
    arguments["words_mask"][0, -1] = 0  # asked anew once it is changed
    mine.rec_loss(**arguments, **logits)
    assert len(calls) == 4


@pytest.mark.parametrize("index", [(slice(None), slice(None, -2)), slice(1, 3), (slice(None, None, 2), slice(1, None))])
def test_sliced_logits_are_not_made_either(index: Any) -> None:
    layer, state = nn.Linear(D, V).double(), draw(B, L, D, seed=1).requires_grad_()
    ids = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(5))[index]
    real = torch.ones_like(ids)
    leaves = [state, *layer.parameters()]
    wanted = cnm_losses.cal_nll_loss(layer(state)[index], ids, real)[0]
    d_wanted = torch.autograd.grad(wanted.square().sum(), leaves)
    cnm_kernels.accelerate_losses(cnm_losses, layer)
    logits = layer(state)
    part = logits[index]
    found = cnm_losses.cal_nll_loss(part, ids, real)[0]
    assert logits.pending
    assert part.pending
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), leaves), d_wanted)


def test_sliced_logits_remain_a_view_of_all() -> None:
    layer = nn.Linear(D, V)
    layer.__class__ = DeferredLinear
    with torch.no_grad():
        logits = layer(torch.randn(B, L, D))
        part, one = logits[:, 1:], logits[0]
        assert not isinstance(one, Deferred)
        logits.mul_(0)
        assert part.pending is False
        assert part.abs().sum() == 0
        assert logits[:, :, 1:].shape == (B, L, V - 1)


@pytest.mark.parametrize("hidden", [False, True])
def test_logits_read_after_the_update_are_those_before_it(hidden: bool) -> None:
    """Changes through ``.data``, as some optimizers make them, cannot be noticed."""
    layer = nn.Linear(D, V)
    state = torch.randn(B, L, D)
    expected = layer(state).detach()
    cnm_kernels.accelerate_losses(cnm_losses, layer)
    logits = layer(state)
    for parameter in layer.parameters():
        if hidden:
            parameter.data.add_(1)
        else:
            parameter.grad = -torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), 1.0).step()
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_logits_of_states_that_changed_say_so() -> None:
    layer = nn.Linear(D, V)
    cnm_kernels.accelerate_losses(cnm_losses, layer)
    state = torch.randn(B, L, D)
    logits = layer(state)
    state.add_(1)
    with pytest.raises(RuntimeError, match=r"was read after .* were changed in place"):
        logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_under_autocast_have_its_dtype_wherever_they_are_read(dtype: torch.dtype) -> None:
    layer, state = nn.Linear(D, V, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(state)
    layer.__class__ = DeferredLinear
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(state)
    assert logits.dtype == expected.dtype
    torch.testing.assert_close(logits.detach() + 0, expected)


# ---- whose functions are replaced ----


def test_names_imported_elsewhere_are_replaced_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = types.ModuleType("runner_of_a_published_repository")
    runner.rec_loss = cnm_losses.rec_loss  # from models.loss import rec_loss
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    original = cnm_losses.rec_loss
    cnm_kernels.accelerate_losses(cnm_losses)
    assert runner.rec_loss is cnm_losses.rec_loss is not original
    assert runner.rec_loss.__name__ == "rec_loss"
    accelerated = cnm_losses.rec_loss
    cnm_kernels.accelerate_losses(cnm_losses)
    assert cnm_losses.rec_loss is accelerated
    cnm_kernels.restore(cnm_losses)
    assert runner.rec_loss is cnm_losses.rec_loss is original


def loss_module(**functions: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**functions)


def test_another_formula_of_the_same_signature_is_left_alone() -> None:
    def cal_nll_loss(logit, idx, mask, weights=None):  # no smoothing
        value, accuracy = cnm_losses.cal_nll_loss(logit, idx, mask, weights)
        return 1.05 * value, accuracy

    mine = loss_module(cal_nll_loss=cal_nll_loss, rec_loss=cnm_losses.rec_loss)
    with pytest.warns(RuntimeWarning, match="cal_nll_loss is left alone: it gives other results"):
        cnm_kernels.accelerate_losses(mine)
    assert mine.cal_nll_loss is cal_nll_loss
    assert mine.rec_loss.__wrapped__ is not None


FORKS = {
    "no loss for the first word": lambda logit, idx, nll, mask: (nll.masked_fill(idx == 0, 0), mask),
    "logits clamped": lambda logit, idx, nll, mask: (nll + (logit.clamp(-20, 20) - logit).sum(-1), mask),
    "the first 20 words": lambda logit, idx, nll, mask: (nll[:, :20], mask[:, :20]),
    "losses clamped": lambda logit, idx, nll, mask: (nll.clamp(max=10), mask),
}


@pytest.mark.parametrize("fork", FORKS)
def test_what_few_words_do_not_show_is_left_alone(fork: str) -> None:
    """In every function: none is left to be replaced."""

    def cal_nll_loss(logit, idx, mask, weights=None):
        each = torch.nn.functional.cross_entropy(logit.transpose(1, 2), idx, reduction="none", label_smoothing=0.1)
        each, kept = FORKS[fork](logit, idx, each, mask)
        right = ((logit.argmax(-1) == idx) * mask).sum() / mask.sum()
        if weights is not None:
            return (each * weights[:, : each.size(1)]).sum(-1), right
        return each.masked_fill(kept == 0, 0).sum(-1) / kept.sum(-1), right

    def rec_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, **kwargs):
        nll = cal_nll_loss(words_logit, words_id, words_mask)[0].mean()
        loss, numbers = nll, {"nll_loss": nll.item()}
        if hard_neg_words_logit is not None:
            neg = cal_nll_loss(hard_neg_words_logit, words_id, words_mask)[0].mean()
            loss, numbers = loss + neg, numbers | {"neg_nll_loss": neg.item()}
        return loss, numbers | {"final_loss": loss.item()}

    mine = loss_module(cal_nll_loss=cal_nll_loss, rec_loss=rec_loss)
    with (
        pytest.warns(RuntimeWarning, match="_loss is left alone: it gives other"),
        pytest.raises(ValueError, match="has none of cal_nll_loss, rec_loss, ivc_loss"),
    ):
        cnm_kernels.accelerate_losses(mine)


def test_other_signatures_are_left_alone() -> None:
    mine = loss_module(rec_loss=lambda logits, extra: None)
    with (
        pytest.warns(RuntimeWarning, match="rec_loss is left alone: its arguments"),
        pytest.raises(ValueError, match="has none of cal_nll_loss, rec_loss, ivc_loss"),
    ):
        cnm_kernels.accelerate_losses(mine)


def test_what_cannot_be_tried_is_left_alone() -> None:
    def rec_loss(words_logit, words_id, words_mask, num_props, ref_words_logit=None, **kwargs):
        raise AssertionError("Torch not compiled with CUDA enabled")

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    mine = loss_module(rec_loss=rec_loss)
    with (
        pytest.warns(RuntimeWarning, match="cannot be tried without a GPU"),
        pytest.raises(ValueError, match="has none"),
    ):
        cnm_kernels.accelerate_losses(mine)
    assert mine.rec_loss is rec_loss


def test_margins_as_constants_are_left_alone() -> None:
    def ivc_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, easy_neg_words_logit=None, **kwargs):
        others = (words_id, words_mask, hard_neg_words_logit, easy_neg_words_logit)
        return cnm_losses.ivc_loss(words_logit, *others, beta_1=0.1, beta_2=0.15)

    mine = loss_module(ivc_loss=ivc_loss, rec_loss=cnm_losses.rec_loss)
    with pytest.warns(RuntimeWarning, match="ivc_loss is left alone: it gives other results"):
        cnm_kernels.accelerate_losses(mine)
    assert mine.ivc_loss is ivc_loss


def test_a_loss_that_stops_gradients_is_left_alone() -> None:
    def ivc_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, easy_neg_words_logit=None, **kwargs):
        hard, easy = (x if x is None else x.detach() for x in (hard_neg_words_logit, easy_neg_words_logit))
        return cnm_losses.ivc_loss(words_logit, words_id, words_mask, hard, easy, **kwargs)

    mine = loss_module(ivc_loss=ivc_loss, rec_loss=cnm_losses.rec_loss)
    with pytest.warns(RuntimeWarning, match="ivc_loss is left alone: it gives other gradients"):
        cnm_kernels.accelerate_losses(mine)
    assert mine.ivc_loss is ivc_loss
    with torch.inference_mode():
        cnm_kernels.accelerate_losses(loss_module(rec_loss=cnm_losses.rec_loss))


def test_static_methods_are_replaced_and_methods_named() -> None:
    class Losses:
        rec_loss: Any

    def rec_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, **kwargs):
        return plain(words_logit, words_id, words_mask, hard_neg_words_logit, **kwargs)

    plain = cnm_losses.rec_loss
    Losses.rec_loss = staticmethod(rec_loss)
    cnm_kernels.accelerate_losses(Losses)
    assert hasattr(Losses().rec_loss, "_accelerated")
    cnm_kernels.restore(Losses)
    assert Losses().rec_loss is rec_loss
    with pytest.warns(RuntimeWarning, match="it is a method"), pytest.raises(ValueError, match="has none"):
        cnm_kernels.accelerate_losses(Losses())


def test_one_mask_for_all_rows() -> None:
    layer, hidden, ids = nn.Linear(D, V), draw(B, L, D, seed=1).float(), torch.randint(V, (B, L))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    wanted = cnm_losses.cal_nll_loss(layer(hidden), ids, mask)
    cnm_kernels.accelerate_losses(cnm_losses, layer)
    torch.testing.assert_close(cnm_losses.cal_nll_loss(layer(hidden), ids, mask), wanted)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("multiplies", [False, True])
def test_a_fractional_mask_is_the_original_s_business(multiplies: bool, fuse: bool) -> None:
    """Some multiply by the mask, some leave out its zeros; of zeros and ones both make the same."""

    def cal_nll_loss(logit, idx, mask, weights=None):
        if not multiplies and weights is None:
            weights = (mask != 0) / mask.sum(-1, keepdim=True)
        return plain(logit, idx, mask, weights)

    plain = cnm_losses.cal_nll_loss
    layer = nn.Linear(D, V).double()
    hidden, ids = draw(2, 3, D, seed=1), torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 0.5, 0.5], [1, 0.25, 0]], dtype=torch.float64)
    mine = loss_module(cal_nll_loss=cal_nll_loss)
    wanted = cal_nll_loss(layer(hidden), ids, mask)
    cnm_kernels.accelerate_losses(mine, layer if fuse else None)
    assert mine.cal_nll_loss is not cal_nll_loss
    torch.testing.assert_close(mine.cal_nll_loss(layer(hidden), ids, mask), wanted)


def tempered(loss: Tensor, temperature: float = 1.0, **_: Any) -> Tensor:
    """What a fork's loss hands its options to."""
    return loss / temperature


def test_an_option_of_its_own_is_the_original_s_business() -> None:
    def rec_loss(words_logit, words_id, words_mask, num_props, ref_words_logit=None, **kwargs):
        loss, numbers = plain(words_logit, words_id, words_mask, num_props, ref_words_logit)
        (scale,) = [kwargs.get(name, 1.0) for name in ("scale",)]
        return tempered(scale * loss, **kwargs) + kwargs.get("shift", 0.0), numbers

    plain = cpl_losses.rec_loss
    mine = loss_module(rec_loss=rec_loss)
    arguments, states = batch("CPL", ("words_logit",), torch.float64, "prefix")
    logits = nn.Linear(D, V).double()(states["words_logit"])
    cnm_kernels.accelerate_losses(mine)
    assert mine.rec_loss is not rec_loss
    wanted = plain(logits, **arguments)[0]
    torch.testing.assert_close(mine.rec_loss(logits, **arguments, center=0.5)[0], wanted)
    torch.testing.assert_close(mine.rec_loss(logits, **arguments, scale=3.0)[0], 3 * wanted)
    torch.testing.assert_close(mine.rec_loss(logits, **arguments, shift=3.0)[0], 3 + wanted)
    torch.testing.assert_close(mine.rec_loss(logits, **arguments, temperature=4.0)[0], wanted / 4)


def test_published_options_do_not_wake_the_original() -> None:
    asleep = False

    def ivc_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, easy_neg_words_logit=None, **kwargs):
        assert not asleep
        others = (words_id, words_mask, hard_neg_words_logit, easy_neg_words_logit)
        return plain(words_logit, *others, beta_1=kwargs["beta_1"], beta_2=kwargs["beta_2"])

    plain = cnm_losses.ivc_loss
    mine = loss_module(ivc_loss=ivc_loss)
    cnm_kernels.accelerate_losses(mine)
    asleep = True
    arguments, _ = batch("CNM", (), torch.float64, "prefix")
    mine.ivc_loss(draw(B, L, V, seed=1), **arguments, words_logit_of_another_model=None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_a_mask_with_an_empty_row_is_the_original_s_business(dtype: torch.dtype) -> None:
    def cal_nll_loss(logit, idx, mask, weights=None):
        if weights is None:
            weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        return plain(logit, idx, mask, weights)

    plain = cnm_losses.cal_nll_loss
    mine = loss_module(cal_nll_loss=cal_nll_loss)
    logits, ids = draw(2, 3, V, seed=1), torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=dtype)
    wanted = cal_nll_loss(logits, ids, mask)
    cnm_kernels.accelerate_losses(mine)
    assert mine.cal_nll_loss is not cal_nll_loss
    torch.testing.assert_close(mine.cal_nll_loss(logits, ids, mask), wanted)


def test_a_dict_of_tensors_is_left_alone() -> None:
    """Their gradients may be wanted."""

    def rec_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, **kwargs):
        loss, numbers = plain(words_logit, words_id, words_mask, hard_neg_words_logit)
        return loss, {name: torch.tensor(number) for name, number in numbers.items()}

    plain = cnm_losses.rec_loss
    mine = loss_module(rec_loss=rec_loss, cal_nll_loss=cnm_losses.cal_nll_loss)
    with pytest.warns(RuntimeWarning, match="rec_loss is left alone: it gives other results"):
        cnm_kernels.accelerate_losses(mine)
    assert mine.rec_loss is rec_loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_in_a_checkpoint(reentrant: bool) -> None:
    layer, hidden = nn.Linear(D, V), draw(B, L, D, seed=1).float().requires_grad_()
    ids, mask = torch.randint(V, (B, L)), torch.tensor(MASKS["prefix"])
    wanted = torch.autograd.grad(cnm_losses.cal_nll_loss(layer(hidden), ids, mask)[0].sum(), hidden)
    cnm_kernels.accelerate_losses(cnm_losses, layer)
    logits = layer(hidden)
    nll = checkpoint(lambda z: cnm_losses.cal_nll_loss(z, ids, mask)[0], logits, use_reentrant=reentrant)
    nll.sum().backward()
    torch.testing.assert_close(hidden.grad, wanted[0])


def test_losses_that_move_things_to_a_gpu_are_tried_without_one() -> None:
    """The published losses call ``.cuda()`` in their bodies; equal ones are replaced, others are not."""

    def ivc_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, easy_neg_words_logit=None, **kwargs):
        others = (words_id.cuda(), words_mask, hard_neg_words_logit, easy_neg_words_logit)
        return cnm_losses.ivc_loss(words_logit, *others, **kwargs)

    def rec_loss(words_logit, words_id, words_mask, hard_neg_words_logit=None, **kwargs):
        loss, numbers = cnm_losses.rec_loss(words_logit, words_id.cuda(), words_mask, hard_neg_words_logit)
        return 2 * loss, numbers

    cuda = torch.Tensor.cuda
    mine = loss_module(ivc_loss=ivc_loss, rec_loss=rec_loss)
    with pytest.warns(RuntimeWarning, match="rec_loss is left alone: it gives other results"):
        cnm_kernels.accelerate_losses(mine)
    assert mine.ivc_loss is not ivc_loss
    assert mine.rec_loss is rec_loss
    assert torch.Tensor.cuda is cuda


@pytest.mark.parametrize("family", MODULES)
def test_the_caller_s_default_device_is_not_the_trial_s(family: str) -> None:
    plain = MODULES[family].ivc_loss
    with torch.device("meta"):
        cnm_kernels.accelerate_losses(MODULES[family])
    assert MODULES[family].ivc_loss.__wrapped__ is plain


def test_no_layer_over_the_vocabulary() -> None:
    plain = cnm_losses.rec_loss
    with pytest.raises(ValueError, match=r"has no nn.Linear with as many outputs as its vocab_size"):
        cnm_kernels.accelerate_losses(cnm_losses, nn.Sequential(nn.Linear(3, 4)))
    assert cnm_losses.rec_loss is plain


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_logits_made_without_gradients_have_none(fuse: bool, part: bool) -> None:
    """A view that is taken there of others has, in PyTorch."""
    layer = nn.Linear(D, V)
    if fuse:
        cnm_kernels.accelerate_losses(cnm_losses, layer)
    arguments, states = batch("CNM", ("words_logit",), torch.float32, "prefix")
    hidden = states["words_logit"].requires_grad_()
    with torch.set_grad_enabled(part):
        logits = layer(hidden)
    with torch.no_grad():
        logits = logits[:, :] if part else logits
    assert isinstance(logits, Deferred) == fuse
    nll = cnm_losses.cal_nll_loss(logits, arguments["words_id"], arguments["words_mask"])[0]
    assert nll.requires_grad == part


@pytest.mark.parametrize("fuse", [False, True])
def test_logits_of_a_reentrant_checkpoint_train_their_layer(fuse: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D, V)
    arguments, states = batch("CNM", ("words_logit",), torch.float32, "prefix")
    hidden = states["words_logit"].requires_grad_()
    wanted = cnm_losses.cal_nll_loss(layer(hidden), arguments["words_id"], arguments["words_mask"])[0].sum()
    wanted = torch.autograd.grad(wanted, [hidden, layer.weight, layer.bias])
    if fuse:
        cnm_kernels.accelerate_losses(cnm_losses, layer)
    logits = checkpoint(layer, hidden, use_reentrant=True)
    cnm_losses.cal_nll_loss(logits, arguments["words_id"], arguments["words_mask"])[0].sum().backward()
    for parameter, gradient in zip([hidden, layer.weight, layer.bias], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
