"""The training step's promises beyond its numbers, which the oracle checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kept_memory import kept_bytes
from small_runs import synthetic_config
from step_checks import B, L, T, V, as_on_gpus, make_batch, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

import cnm.training.base
from cnm import CNM
from cnm.data.batch import Batch
from cnm.models.base import PRECISIONS
from cnm.training.cuda_graph import WARM_UP_STEPS, GraphedStep
from cnm.training.step import STEPS, LeanStep, RecomputingStep


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("step", STEPS)
def test_nothing_waits_for_the_host(step: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asked for one, or made a shape depend on one, would raise here."""
    as_on_gpus(monkeypatch)
    with FakeTensorMode():
        model = make_model().train()
        model.compute_dtype = PRECISIONS[precision]
        train = STEPS[step](model, model.config)
        batch = make_batch()
        for _ in range(2):
            metrics = train(batch)
    assert all(value.shape == () for value in metrics.values())


def test_the_check_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_gpus(monkeypatch)

    class Curious(LeanStep):
        def reconstruction_loss(self, batch: Batch, masked_words: torch.Tensor) -> torch.Tensor:
            loss = super().reconstruction_loss(batch, masked_words)
            return loss * (2 if loss.item() > 1 else 1)

    with FakeTensorMode():
        model = make_model().train()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            Curious(model, model.config)(make_batch())


def test_frames_read_in_bf16_change_no_bit() -> None:
    """A model that computes in bfloat16 rounds its frames before anything else."""
    parameters = []
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = make_model().train(), make_batch()
        model.compute_dtype = torch.bfloat16
        torch.manual_seed(1)
        LeanStep(model, model.config)(dataclasses.replace(batch, frames=batch.frames.to(dtype)))
        parameters.append([parameter.detach() for parameter in model.parameters()])
    for ours, theirs in zip(*parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_the_batch_stays_as_it_is() -> None:
    model, batch = make_model().train(), make_batch()
    before = {field.name: getattr(batch, field.name).clone() for field in dataclasses.fields(batch)}
    LeanStep(model, model.config)(batch)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_recomputing_changes_no_bit_and_keeps_less(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Same parameters after three steps with dropout, which must be drawn the same again."""
    parameters, kept = [], []
    for step_class in (LeanStep, RecomputingStep):
        model, batch = make_model().train(), make_batch()
        model.compute_dtype = dtype
        step = step_class(model, model.config)
        torch.manual_seed(1)
        for _ in range(3):
            step(batch)
        masked = torch.zeros(B, L + 1, dtype=torch.bool)
        kept.append(kept_bytes(partial(step.reconstruction_loss, batch, masked), tmp_path))
        parameters.append([parameter.detach() for parameter in model.parameters()])
    for lean, recomputed in zip(*parameters, strict=True):
        assert torch.equal(lean, recomputed)
    assert kept[1] < 0.6 * kept[0]


def test_dropped_frames_are_not_kept(tmp_path: Path) -> None:
    """Wider frames leave no more memory in use."""
    kept = []
    for width in (12, 512):
        model = CNM(synthetic_config(dataset__vocab_size=V, dataset__frame_dim=width)).train()
        assert model.input_dropout > 0
        batch = dataclasses.replace(make_batch(), frames=torch.ones(B, T, width))
        step = LeanStep(model, model.config)
        masked = torch.zeros(B, L + 1, dtype=torch.bool)
        kept.append(kept_bytes(partial(step.reconstruction_loss, batch, masked), tmp_path))
    assert kept[1] < kept[0] + B * T * 512


def test_bf16_follows_float32() -> None:
    """Losses agree to the precision of bfloat16, and gradients come in float32."""
    batch = make_batch()
    masked = torch.arange(L + 1).expand(B, -1) == 1
    losses = {}
    for name, dtype in PRECISIONS.items():
        model = make_model().eval()
        model.compute_dtype = dtype
        loss = LeanStep(model, model.config).reconstruction_loss(batch, masked)
        gradients = torch.autograd.grad(loss, [model.frame_fc.weight, model.fc_rec.weight])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        losses[name] = loss.item()
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bf16"] != losses["float32"]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_encoded_video_serves_many_sentences(layers: int) -> None:
    torch.manual_seed(0)
    config = synthetic_config(dataset__vocab_size=V, model__config__DualTransformer__num_decoder_layers1=layers)
    model, batch = CNM(config).eval(), make_batch()
    frames = batch.frames[:2]
    index = torch.tensor([0, 0, 1, 0, 1])
    encoded = model.encode_video(frames, batch.frame_lengths[:2])
    center, width = model.localize_encoded(encoded.select(index), batch.words, batch.word_lengths)
    # The training path runs every layer in full.
    wanted = model.reconstruct(
        frames[index], batch.frame_lengths, batch.words, batch.word_ids, batch.word_lengths, batch.mask_weights
    )
    torch.testing.assert_close((center, width), (wanted.center.detach(), wanted.width.detach()))
    with pytest.raises(ValueError, match="2 encoded videos for 5 sentences"):
        model.localize_encoded(encoded, batch.words, batch.word_lengths)


def one_word_batch(device: str) -> Batch:
    """Sentences of one word, which is the one that is masked: nothing is left to chance."""
    batch = make_batch()
    ones = torch.ones(B, dtype=torch.int64)
    return dataclasses.replace(
        batch,
        words=batch.words[:, :2],
        word_ids=batch.word_ids[:, :1].clamp_min(1),
        word_lengths=ones,
        mask_weights=ones[:, None].float(),
    ).to(device)


def test_fixed_gradients_change_nothing() -> None:
    trained = []
    for fixed in (False, True):
        model = make_model().eval()
        step = LeanStep(model, model.config)
        step.fixed_gradients = fixed
        for _ in range(3):
            step(one_word_batch("cpu"))
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
    for free, fixed_one in zip(*trained, strict=True):
        assert torch.equal(free, fixed_one)


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    graphed = GraphedStep(LeanStep(model, model.config))

    attempts = []

    def refuse(batch: Batch) -> None:
        attempts.append(batch)
        raise RuntimeError("no capture today")

    monkeypatch.setattr(graphed, "_on_side_stream", graphed.step)
    monkeypatch.setattr(graphed, "_capture", refuse)
    batch = one_word_batch("cpu")
    for _ in range(WARM_UP_STEPS):
        graphed(batch)
    with pytest.warns(UserWarning, match="without CUDA graphs: no capture today"):
        graphed(batch)
    graphed(batch)
    assert len(attempts) == 1
    assert graphed.step.num_updates == WARM_UP_STEPS + 2


class SeveralGPUs:
    """Stands in for ``torch.cuda``, of whose GPUs 0 is current unless told otherwise, as streams are its."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        for name in ("device_of", "Stream", "current_stream", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def _on(self, gpu: int) -> Iterator[None]:
        before, self.current = self.current, gpu
        yield
        self.current = before

    def device_of(self, tensor: torch.Tensor) -> AbstractContextManager[None]:
        return self._on(tensor.get_device())

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(gpu=self.current, wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream: SimpleNamespace) -> AbstractContextManager[None]:
        return self._on(stream.gpu)

    def graph(self, graph: object, pool: object, stream: SimpleNamespace | None = None) -> AbstractContextManager[None]:
        return self._on(0 if stream is None else stream.gpu)  # PyTorch captures on one stream, which it made first

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(pool=lambda: None, replay=lambda: None)


def test_a_step_is_captured_on_its_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, whose graph would be empty."""
    gpus = SeveralGPUs(monkeypatch)
    parameter = SimpleNamespace(get_device=lambda: 1)
    seen = []

    class Step:
        model = SimpleNamespace(parameters=lambda: iter([parameter]))

        def run(self, batch: Batch) -> dict[str, torch.Tensor]:
            seen.append(gpus.current)
            return {}

        __call__ = run

        def advance(self) -> None:
            pass

    graphed = GraphedStep(Step())
    for _ in range(WARM_UP_STEPS + 2):
        graphed(one_word_batch("cpu"))
    assert seen == [1] * (WARM_UP_STEPS + 1)
    assert gpus.current == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replays_train_as_the_step_does() -> None:
    metrics, trained = [], []
    for graphs in (False, True):
        model = make_model().to("cuda").eval()
        step = LeanStep(model, model.config)
        call = GraphedStep(step) if graphs else step
        metrics.append([call(one_word_batch("cuda"))["loss/reconstruction"].item() for _ in range(WARM_UP_STEPS + 4)])
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert not graphs or call.graphs
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize(("limit", "clipped"), [(10.0, 0), (1e-3, 2)])
def test_small_gradients_are_not_multiplied_by_one(limit: float, clipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnm.training.base, "MAX_GRADIENT_NORM", limit)
    model = make_model().train()
    step = STEPS["lean"](model, model.config)
    calls = []
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *given: (calls.append(given), clip(*given)))
    metrics = step(make_batch())
    norms = [metrics[f"grad_norm/{name}"] for name in ("reconstructor", "generator")]
    assert all(1e-3 < norm < 10 for norm in norms)
    assert len(calls) == clipped
    for (parameters, _, norm), of_all in zip(calls, norms, strict=False):
        assert norm == of_all
        own = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        assert own <= limit * 1.001
