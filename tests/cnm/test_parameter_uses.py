"""Parameters handed out use by use: the same bits as autograd's own casts and sums, and never stale copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_runs import cpl_config
from step_checks import V, as_on_gpus, make_batch, make_model
from torch import Tensor

import cnm_kernels
from cnm.models import build
from cnm.models.base import Model
from cnm.training.steps import STEP_NAMES, make_step
from cnm_kernels import parameter_uses, reference
from cnm_kernels.parameter_uses import ParameterUses, fused, use

BF16 = torch.bfloat16


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(12, 4))


VIEWS = {
    "itself": lambda weight: weight,
    "rows": lambda weight: weight[4:8],
    "heads": lambda weight: weight.unflatten(0, (3, -1)).mT,
    "a third": lambda weight: weight.chunk(3)[2],
}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("view", VIEWS)
def test_a_use_is_what_a_cast_gives(view: str, dtype: torch.dtype, weight: Tensor) -> None:
    with ParameterUses([weight], BF16) as uses:
        ours, cast = use(VIEWS[view](weight), dtype), VIEWS[view](weight).to(dtype)
        assert torch.equal(ours, cast)
        assert ours.stride() == VIEWS[view](weight).stride()
        upstream = torch.randn(ours.shape, dtype=dtype)
        (found,) = uses.gradients((ours * upstream).sum(), [weight])
        (wanted,) = torch.autograd.grad((cast * upstream).sum(), weight)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
        with torch.no_grad():
            assert not use(VIEWS[view](weight), dtype).requires_grad


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_gradients_of_all_uses_are_added_as_autograd_adds_them(dtype: torch.dtype, weight: Tensor) -> None:
    other = torch.nn.Parameter(torch.randn(4))
    scales = [torch.randn(VIEWS[view](weight).shape) for view in VIEWS]

    def loss(of: object) -> Tensor:
        parts = [(of(VIEWS[view](weight)).float() * scale).sum() for view, scale in zip(VIEWS, scales, strict=True)]
        return sum(parts) * (of(other).float() * 3).sum() + (weight * 1e-3).sum()  # the last use is nobody's

    with ParameterUses([weight, other], BF16) as uses:
        found = uses.gradients(loss(lambda tensor: use(tensor, dtype)), [other, weight])
        wanted = torch.autograd.grad(loss(lambda tensor: tensor.to(dtype)), [other, weight])
        for gradient, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected)
        assert uses._uses == []


def test_a_parameter_without_a_part_in_the_loss_is_named(weight: Tensor) -> None:
    other = torch.nn.Parameter(torch.randn(4))
    with ParameterUses([weight, other], BF16) as uses:
        loss = use(weight, BF16).sum()
        with pytest.raises(RuntimeError, match=r"does not depend on a parameter of shape \[4\]"):
            uses.gradients(loss, [weight, other])


def test_a_gradient_laid_out_otherwise_is_added_too() -> None:
    places = [torch.zeros(2, 3), torch.zeros(3)]
    values = [torch.arange(6.0).view(3, 2).T, torch.ones(3)]
    for times in (1, 2):
        fused("add_", places, values)
        for place, value in zip(places, values, strict=True):
            assert torch.equal(place, times * value)
    fused("copy_", places, values)
    assert torch.equal(places[0], values[0])


def test_a_parameter_that_changed_is_cast(weight: Tensor) -> None:
    def is_copy(tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == uses._copies[weight][0].untyped_storage().data_ptr()

    with ParameterUses([weight], BF16) as uses:
        with torch.no_grad():
            weight.mul_(3)
        assert torch.equal(use(weight, BF16), weight.to(BF16))
        assert not is_copy(use(weight, BF16))
        uses.refresh()
        assert torch.equal(use(weight, BF16), weight.to(BF16))
        assert is_copy(use(weight, BF16))
        assert use(weight, torch.float16).dtype == torch.float16
    assert not parameter_uses._owners
    assert not is_copy(use(weight, BF16))
    assert use(weight) is weight


def test_a_copy_that_changes_before_the_backward_is_noticed(weight: Tensor) -> None:
    x = torch.randn(3, 4, dtype=BF16, requires_grad=True)
    with ParameterUses([weight], BF16) as uses:
        out = x @ use(weight, BF16).T
        uses.refresh()
        with pytest.raises(RuntimeError, match=r"modified.* inplace"):
            uses.gradients(out.sum(), [weight])


@pytest.mark.slow
def test_a_compiled_function_casts_by_itself(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_dtype_of_products", lambda x: x.dtype)
    x = torch.randn(3, 4, dtype=BF16)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight: reference.linear(x, weight, None, False, None), fullgraph=True)
    with ParameterUses([weight], BF16):
        torch.testing.assert_close(compiled(x, weight), reference.linear(x, weight, None, False, None))


def make_cpl() -> Model:
    torch.manual_seed(0)
    return build(cpl_config(dataset__vocab_size=V))


@pytest.mark.parametrize("dtype", [BF16, None])
@pytest.mark.parametrize("step", STEP_NAMES)
@pytest.mark.parametrize("make", [make_model, make_cpl])
def test_a_training_step_is_the_same_to_the_bit(
    make: Callable[[], Model], step: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computes as on GPUs: narrow operands, nothing absorbed."""
    as_on_gpus(monkeypatch)
    monkeypatch.setattr(reference, "_dtype_of_products", lambda x: x.dtype)

    def once(by_uses: bool) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], int]:
        added = []

        def watched(operation: object, places: list[Tensor], values: list[Tensor]) -> None:
            added.append(len(places))
            fused(operation, places, values)

        monkeypatch.setattr(parameter_uses, "fused", watched)
        if not by_uses:  # entered, but nobody's
            monkeypatch.setattr(parameter_uses, "_owners", {})
            monkeypatch.setattr(ParameterUses, "__enter__", lambda self: self)
            monkeypatch.setattr(ParameterUses, "gradients", lambda self, *given: torch.autograd.grad(*given))
        model = make().train()
        model.compute_dtype = dtype
        torch.manual_seed(2)
        with cnm_kernels.use_backend("torch"):
            train = make_step(step, model, model.config)
            train.begin_epoch(1)
            metrics = [train(make_batch()) for _ in range(2)]
        return metrics, dict(model.named_parameters()), sum(added)

    (metrics, parameters, added), (wanted_metrics, wanted, none) = once(True), once(False)
    assert added > 2 * 1.5 * len(parameters) > none == 0
    for of_update, wanted_of_update in zip(metrics, wanted_metrics, strict=True):
        for name, value in of_update.items():
            assert torch.equal(value, wanted_of_update[name]), name
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name]), name
