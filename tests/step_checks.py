"""A small model and batch for tests of the training step, and the check that a backend trains as PyTorch's does."""

from __future__ import annotations

import pytest
import torch
from small_runs import synthetic_config

import cnm.models.base
import cnm_kernels
from cnm import CNM
from cnm.data.batch import Batch
from cnm.training.step import STEPS

B, T, L, V = 5, 16, 7, 40


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 1, 5, 2])
    real = torch.arange(L) < lengths[:, None]
    return Batch(
        frames=torch.randn(B, T, 12, generator=generator),
        frame_lengths=torch.full((B,), T),
        words=torch.randn(B, L + 1, 10, generator=generator),
        word_ids=torch.randint(1, V, (B, L), generator=generator) * real,
        word_lengths=lengths,
        mask_weights=real.float() / lengths[:, None],
    )


def make_model() -> CNM:
    torch.manual_seed(0)
    config = synthetic_config(dataset__vocab_size=V, model__config__DualTransformer__num_decoder_layers1=2)
    return CNM(config)


def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take the way that they take on GPUs."""
    monkeypatch.setattr(cnm.models.base, "MATMUL_BOUND_DEVICES", set())


def assert_trains_as_torch(step: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, norms and updated parameters of the PyTorch backend, with dropout, in the form that GPUs compute."""
    as_on_gpus(monkeypatch)
    metrics, parameters = {}, {}
    batch = make_batch()
    masked = (torch.arange(batch.words.size(1)) == 1).expand(batch.words.size(0), -1)
    for name in ("torch", backend):
        model = make_model().train()
        assert model.dropout > 0
        torch.manual_seed(2)
        with cnm_kernels.use_backend(name):
            metrics[name] = STEPS[step](model, model.config)(batch, masked_words=(masked, masked))
        parameters[name] = dict(model.named_parameters())
    for name, value in metrics["torch"].items():
        torch.testing.assert_close(metrics[backend][name], value, rtol=1e-4, atol=1e-6)
    for name, value in parameters["torch"].items():
        torch.testing.assert_close(parameters[backend][name], value, rtol=1e-4, atol=1e-6)
