"""Parameters that are cast once per update: the same bits as those cast at every use, and never stale ones."""

from __future__ import annotations

import pytest
import torch
from step_checks import make_batch, make_model
from torch import Tensor

import cnm.models.base
import cnm_kernels
from cnm.training.step import STEPS
from cnm_kernels import narrowed, reference
from cnm_kernels.narrowed import NarrowedParameters, narrow

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


@pytest.mark.parametrize("view", VIEWS)
def test_a_copy_is_what_a_cast_gives(view: str, weight: Tensor) -> None:
    with NarrowedParameters([weight], BF16) as copies:
        ours, cast = narrow(VIEWS[view](weight), BF16), VIEWS[view](weight).to(BF16)
        assert torch.equal(ours, cast)
        assert ours.stride() == cast.stride() or view == "heads"
        assert ours.untyped_storage().data_ptr() == copies.copies[0].untyped_storage().data_ptr()
        upstream = torch.randn(ours.shape, dtype=BF16)
        ours, cast = (torch.autograd.grad(out, weight, upstream)[0] for out in (ours, cast))
        assert ours.dtype == torch.float32
        assert torch.equal(ours, cast)
        with torch.no_grad():
            assert not narrow(VIEWS[view](weight), BF16).requires_grad


def test_a_parameter_that_changed_is_cast(weight: Tensor) -> None:
    with NarrowedParameters([weight], BF16) as copies:
        with torch.no_grad():
            weight.mul_(3)
        assert torch.equal(narrow(weight, BF16), weight.to(BF16))
        copies.refresh()
        assert torch.equal(narrow(weight, BF16), weight.to(BF16))
        assert narrow(weight, BF16)._base is not None
        assert narrow(weight, torch.float16).dtype == torch.float16
        assert narrow(weight, torch.float32) is weight
    assert not narrowed._copies
    assert narrow(weight, BF16)._base is None


def test_a_copy_that_changes_before_the_backward_is_noticed(weight: Tensor) -> None:
    x = torch.randn(3, 4, dtype=BF16, requires_grad=True)
    with NarrowedParameters([weight], BF16) as copies:
        out = x @ narrow(weight, BF16).T
        copies.refresh()
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        out.sum().backward()


@pytest.mark.slow
def test_a_compiled_function_casts_by_itself(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_dtype_of_products", lambda x: x.dtype)
    x = torch.randn(3, 4, dtype=BF16)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight: reference.linear(x, weight, None, False, None), fullgraph=True)
    with NarrowedParameters([weight], BF16):
        torch.testing.assert_close(compiled(x, weight), reference.linear(x, weight, None, False, None))


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_is_the_same_to_the_bit(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes as on GPUs: narrow operands, nothing absorbed."""
    monkeypatch.setattr(cnm.models.base, "MATMUL_BOUND_DEVICES", set())
    monkeypatch.setattr(reference, "_dtype_of_products", lambda x: x.dtype)
    uses = []

    def once(copies: bool) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        def watched(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            found = narrow(tensor, dtype) if copies else tensor.to(dtype)
            uses.append(copies and found._base is not None)
            return found

        monkeypatch.setattr(reference, "narrow", watched)
        model = make_model().train()
        model.compute_dtype = BF16
        torch.manual_seed(2)
        with cnm_kernels.use_backend("torch"):
            train = STEPS[step](model, model.config)
            metrics = [train(make_batch()) for _ in range(2)]
        return metrics, dict(model.named_parameters())

    (metrics, parameters), (wanted_metrics, wanted) = once(True), once(False)
    assert sum(uses) > 0.45 * len(uses)
    for of_update, wanted_of_update in zip(metrics, wanted_metrics, strict=True):
        for name, value in of_update.items():
            assert torch.equal(value, wanted_of_update[name]), name
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name]), name
