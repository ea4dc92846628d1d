"""accelerate(model): training steps of whole models with their losses."""

from __future__ import annotations

import pytest
import torch
from accelerate_checks import EXPERIMENTS, TIMES_PLAIN, assert_as_good, error
from torch import Tensor

import cnm_kernels
from benchmarks.bench_accelerate import LOSS
from cnm_kernels.drop_in.deferred import Deferred
from examples.research_code import cnm_losses, cpl_losses

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def train_once(name: str, dtype: torch.dtype, *, accelerated: str, autocast: bool = False) -> list[Tensor]:
    """Both losses, everything the model returns that is small, and all gradients in one vector."""
    experiment = EXPERIMENTS[name]
    losses = cnm_losses if name == "CNM" else cpl_losses
    model = experiment.model(dropout=0.0).bfloat16().to(dtype)
    if accelerated:
        cnm_kernels.accelerate(model)
    if accelerated == "with losses":
        cnm_kernels.accelerate_losses(losses)
    elif accelerated == "without logits":
        cnm_kernels.accelerate_losses(losses, model)
    options = LOSS if name == "CNM" else LOSS | {"num_props": experiment.K}
    batch = {
        key: value.bfloat16().to(dtype) if key in ("frames_feat", "words_feat") else value
        for key, value in experiment.batch().items()
    }
    batch["frames_len"] = batch["frames_len"] - torch.arange(experiment.B)
    try:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch)
            results = [getattr(losses, loss)(**output, **options) for loss in ("rec_loss", "ivc_loss")]
    finally:
        cnm_kernels.restore(losses)
    total = results[0][0] + results[1][0]
    gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    if accelerated == "without logits":
        assert isinstance(output["words_logit"], Deferred)
        assert output["words_logit"].pending
    numbers = torch.tensor([results[i][1][key] for i in range(2) for key in sorted(results[i][1])])
    tensors = [total, numbers, *(output[key] for key in ("center", "width", "attn_weight", "words_logit"))]
    return [*(tensor.detach().to(dtype) for tensor in tensors), torch.cat([d.flatten() for d in gradients])]


@pytest.mark.parametrize("accelerated", ["model", "with losses", "without logits"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), (None, torch.float32)]
)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_training_step(name: str, backend: str | None, dtype: torch.dtype, accelerated: str) -> None:
    exact, plain = (train_once(name, kind, accelerated="") for kind in (torch.float64, dtype))
    with cnm_kernels.use_backend(backend):
        found = train_once(name, dtype, accelerated=accelerated)
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_training_step_in_bfloat16(name: str, autocast: bool) -> None:
    """All gradients together against float64. (Single losses are a matter of luck: which proposal is the best.)"""
    dtype = torch.float32 if autocast else torch.bfloat16
    exact, plain, found = (
        train_once(name, kind, accelerated=how, autocast=autocast and kind != torch.float64)[-1]
        for kind, how in ((torch.float64, ""), (dtype, ""), (dtype, "without logits"))
    )
    if autocast:
        assert found.dtype == plain.dtype == torch.float32
    assert error([found], [exact]) <= TIMES_PLAIN * error([plain], [exact]) + torch.finfo(torch.bfloat16).eps
