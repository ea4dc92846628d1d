"""``cnm`` against the plain transcription of the published model in ``published.py``.

A tensor agrees with the float64 oracle when its largest absolute error is at most 1e-9 (float64) or 1e-5 (float32) of
the largest absolute value of the oracle's tensor, its scale. Some gradients are differences that nearly cancel (what
flows through the Gaussian, above all), so that their own scale says little about their rounding error. Gradients may
therefore also be off by a few thousand (float64) or ten (float32) roundings of the largest gradient of all parameters.
"""

from __future__ import annotations

import dataclasses

import published
import pytest
import torch
from oracle_checks import dataset_section, randomize, transformer_section
from torch import Tensor

import cnm_kernels
from cnm import CNM, CNMConfig, checkpoint
from cnm.data.batch import Batch
from cnm.training.optim import learning_rate
from cnm.training.step import LeanStep, PublishedStep, RecomputingStep, TrainingStep

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENT_NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest gradient of all parameters
BETAS = {"beta_1": 0.5, "beta_2": 0.7}  # wide enough that the hinges are active in every case
RECONSTRUCTOR = {"lr": 4e-3, "warmup_updates": 3, "warmup_init_lr": 1e-4, "weight_decay": 0.02}
GENERATOR = {"lr": 1e-3, "warmup_updates": 2, "warmup_init_lr": 3e-4, "weight_decay": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model size and a batch shape; lengths are ragged where given."""

    name: str
    frame_dim: int = 12
    word_dim: int = 10
    vocab_size: int = 23
    d_model: int = 32
    num_heads: int = 4
    num_frames: int = 21
    num_words: int = 7
    frame_lengths: tuple[int, ...] = (21, 9, 1, 14, 5)
    word_lengths: tuple[int, ...] = (7, 1, 4, 6, 3)
    alpha: float = 5.5
    max_width: float = 1.0


CASES = [
    Case("ragged"),
    Case("full", frame_lengths=(21, 21), word_lengths=(7, 7)),
    Case("one-word", num_words=1, word_lengths=(1, 1), frame_lengths=(21, 6)),
    Case("one-sentence", word_lengths=(5,), frame_lengths=(13,)),
    Case("four-frames", num_frames=4, frame_lengths=(4, 2, 1), word_lengths=(2, 7, 3)),
    Case("odd-head", d_model=30, num_heads=2, max_width=0.4, alpha=5.0),
    Case(
        "published-sizes",
        frame_dim=1024,
        word_dim=300,
        vocab_size=1112,
        d_model=256,
        num_frames=200,
        num_words=13,
        frame_lengths=(200, 137, 200, 61),
        word_lengths=(13, 4, 8, 10),
    ),
]
RAGGED = CASES[0]


def make_config(case: Case, dropout: float = 0.0) -> CNMConfig:
    return CNMConfig.from_json(
        {
            "dataset": dataset_section(case),
            "train": {
                "generator": GENERATOR,
                "reconstructor": RECONSTRUCTOR,
                "batch_size": len(case.word_lengths),
                "max_num_epochs": 1,
                "model_saved_path": "unused",
            },
            "model": {
                "name": "CNM",
                "config": {
                    "hidden_size": case.d_model,
                    "alpha": case.alpha,
                    "max_width": case.max_width,
                    "dropout": dropout,
                    "DualTransformer": transformer_section(case, dropout),
                },
            },
            "loss": BETAS,
        }
    )


def make_oracle(case: Case, logit_scale: float = 1.0) -> published.PublishedCNM:
    """float64, every parameter away from its initial value (zeros would hide a wrong bias, ones a wrong norm)."""
    names = {field.name for field in dataclasses.fields(published.Sizes)}
    sizes = published.Sizes(**{name: value for name, value in vars(case).items() if name in names})
    oracle = published.PublishedCNM(sizes).double()
    randomize(oracle)
    with torch.no_grad():
        oracle.fc_rec.weight.mul_(logit_scale)
    return oracle


def make_model(case: Case, oracle: published.PublishedCNM, dtype: torch.dtype) -> CNM:
    model = CNM(make_config(case))
    model.load_state_dict(oracle.state_dict())
    return model.to(dtype).train()


def make_batch(case: Case, dtype: torch.dtype, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    B, L = len(case.word_lengths), case.num_words
    frame_lengths, word_lengths = torch.tensor(case.frame_lengths), torch.tensor(case.word_lengths)
    word_ids = torch.randint(1, case.vocab_size, (B, L), generator=generator)
    real = torch.arange(L) < word_lengths[:, None]
    # padding is garbage on purpose (the start row and what lies past a length must never be read)
    return Batch(
        frames=torch.randn(B, case.num_frames, case.frame_dim, generator=generator).to(dtype),
        frame_lengths=frame_lengths,
        words=torch.randn(B, L + 1, case.word_dim, generator=generator).to(dtype),
        word_ids=word_ids * real,
        word_lengths=word_lengths,
        mask_weights=real.to(dtype) / word_lengths[:, None],
    )


def make_masked_words(case: Case, seed: int) -> Tensor:
    """max(l // 3, 1) of each sentence's words. [B, L + 1] bool"""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.zeros(len(case.word_lengths), case.num_words + 1, dtype=torch.bool)
    for row, length in zip(masked, case.word_lengths, strict=True):
        row[1 + torch.randperm(length, generator=generator)[: max(length // 3, 1)]] = True
    return masked


def oracle_inputs(batch: Batch) -> tuple[Tensor, ...]:
    return batch.frames, batch.frame_lengths, batch.words, batch.word_ids, batch.word_lengths


def reconstruct(model: CNM, batch: Batch, masked_words: Tensor):
    return model.reconstruct(*oracle_inputs(batch), masked_words=masked_words)


def assert_agrees(
    name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float, floor: float = 0.0
) -> None:
    """The largest error is at most tolerance times the largest expected value, plus ``floor``."""
    assert actual is not None, f"{name}: missing"
    assert expected is not None, f"{name}: not expected"
    assert actual.shape == expected.shape, name
    allowed = tolerance * expected.abs().max().item() + floor
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def oracle_gradients(case: Case, loss: str, masked: Tensor) -> dict[str, Tensor]:
    oracle = make_oracle(case)
    output = oracle(*oracle_inputs(make_batch(case, torch.float64)), masked)
    value = (
        published.reconstruction_loss(output)
        if loss == "reconstruction"
        else published.contrastive_loss(output, **BETAS)
    )
    value.backward()
    return {name: parameter.grad for name, parameter in oracle.named_parameters()}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest):
    """float64 runs on the reference backend, float32 on whatever runs by default."""
    with cnm_kernels.use_backend("torch" if request.param == torch.float64 else None):
        yield request.param


by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_state_dict_names_and_shapes_are_the_published_ones(case: Case) -> None:
    theirs = {name: tensor.shape for name, tensor in make_oracle(case).state_dict().items()}
    ours = {name: tensor.shape for name, tensor in CNM(make_config(case)).state_dict().items()}
    assert ours == theirs


@by_case
def test_forward_and_losses(case: Case, dtype: torch.dtype) -> None:
    oracle = make_oracle(case)
    model = make_model(case, oracle, dtype)
    masked = make_masked_words(case, 1)
    batch = make_batch(case, dtype)
    expected = oracle(*oracle_inputs(make_batch(case, torch.float64)), masked)
    actual = reconstruct(model, batch, masked)
    tolerance = TOLERANCE[dtype]
    assert_agrees("center", actual.center, expected.center, tolerance)
    assert_agrees("width", actual.width, expected.width, tolerance)
    real = published.within(torch.tensor(case.word_lengths) + 1, case.num_words)  # padded rows are nobody's business
    for i, branch in enumerate(("positive", "hard", "easy")):
        assert_agrees(f"hidden {branch}", actual.hidden[i][real], expected.hidden[i][real], tolerance)
        assert_agrees(f"nll {branch}", actual.nll[i], expected.nll[i], tolerance)
    loss = cnm_kernels.intra_video_contrastive_loss(*actual.nll, **BETAS)
    assert_agrees("contrastive loss", loss, published.contrastive_loss(expected, **BETAS), tolerance)
    center, width = model.eval().localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
    assert_agrees("localized center", center, expected.center, tolerance)
    assert_agrees("localized width", width, expected.width, tolerance)


@pytest.mark.parametrize("loss", ["reconstruction", "contrastive"])
@by_case
def test_every_gradient(case: Case, dtype: torch.dtype, loss: str) -> None:
    """Compares the gradients of all parameters, those that an update freezes too: the step freezes, not the model."""
    if loss == "contrastive" and case.num_frames < 8:
        pytest.skip("with one clip the branches are equal and the contrastive loss has no gradient to compare")
    model = make_model(case, make_oracle(case), dtype)
    masked = make_masked_words(case, 2)
    actual = reconstruct(model, make_batch(case, dtype), masked)
    if loss == "reconstruction":
        (actual.nll[0].mean() + actual.nll[1].mean()).backward()
    else:
        cnm_kernels.intra_video_contrastive_loss(*actual.nll, **BETAS).backward()
    expected = oracle_gradients(case, loss, masked)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert expected["fc_mask_gen.weight"].abs().max() > 1e-6 * largest or case.num_frames < 8
    for name, parameter in model.named_parameters():
        assert_agrees(name, parameter.grad, expected[name], TOLERANCE[dtype], GRADIENT_NOISE[dtype] * largest)


both_steps = pytest.mark.parametrize("step_class", [PublishedStep, LeanStep, RecomputingStep])


@pytest.mark.parametrize("loss", ["reconstruction", "contrastive"])
@by_case
@both_steps
def test_losses_and_gradients_of_each_update(
    step_class: type[TrainingStep], case: Case, dtype: torch.dtype, loss: str
) -> None:
    """The lean step leaves out and shares work, which changes nothing that its update reads, at any shape."""
    model = make_model(case, make_oracle(case), dtype)
    step = step_class(model, make_config(case))
    batch, masked = make_batch(case, dtype), make_masked_words(case, 2)
    output = make_oracle(case)(*oracle_inputs(make_batch(case, torch.float64)), masked)
    if loss == "reconstruction":
        group, value = step.reconstructor.parameters, step.reconstruction_loss(batch, masked)
        wanted = published.reconstruction_loss(output)
    else:
        group, (value, nll) = step.generator.parameters, step.contrastive_loss(batch, masked)
        wanted = published.contrastive_loss(output, **BETAS)
        assert_agrees("nll", nll, torch.stack(output.nll), TOLERANCE[dtype])
    assert_agrees("loss", value, wanted, TOLERANCE[dtype])
    expected = oracle_gradients(case, loss, masked)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    if loss == "contrastive" and case.num_frames < 8:
        largest = (
            100.0  # one clip: equal branches, whose gradients cancel; d log g / d width alone is 2 alpha c^2 / w^3
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, gradient in zip(group, torch.autograd.grad(value, group), strict=True):
        name = names[id(parameter)]
        assert_agrees(name, gradient, expected[name], TOLERANCE[dtype], GRADIENT_NOISE[dtype] * largest)


@both_steps
@pytest.mark.parametrize("logit_scale", [0.25, 32.0], ids=["free", "clip-binds"])
def test_consecutive_updates(logit_scale: float, step_class: type[TrainingStep]) -> None:
    """Parameters, their total change, losses and norms over six updates: warm-up, decay, weight decay, stale norms."""
    oracle = make_oracle(RAGGED, logit_scale)
    initial = {name: parameter.detach().clone() for name, parameter in oracle.named_parameters()}
    with cnm_kernels.use_backend("torch"):
        model = make_model(RAGGED, oracle, torch.float64)
        step = step_class(model, make_config(RAGGED))
        oracle_step = published.PublishedStep(
            oracle, published.Schedule(**RECONSTRUCTOR), published.Schedule(**GENERATOR), *BETAS.values()
        )
        for update in range(6):
            batch = make_batch(RAGGED, torch.float64, seed=10 + update)
            masked = (make_masked_words(RAGGED, 2 * update), make_masked_words(RAGGED, 2 * update + 1))
            actual = step(batch, masked_words=masked)
            expected = oracle_step(oracle_inputs(batch), masked)
            for name, value in expected.items():
                assert_agrees(f"update {update}: {name}", actual[name], value, 1e-8)
            clipped = expected["grad_norm/reconstructor"] > 10
            assert clipped == (logit_scale > 1), "the case no longer tests what its name says"
        assert step.num_updates == 6
    for name, parameter in oracle.named_parameters():
        moved = dict(model.named_parameters())[name]
        assert_agrees(name, moved, parameter, 1e-9)
        assert_agrees(f"change of {name}", moved - initial[name], parameter - initial[name], 1e-6)


@both_steps
def test_the_other_groups_clipped_gradients_count_in_the_norm(step_class: type[TrainingStep]) -> None:
    oracle = make_oracle(RAGGED, 32.0)
    with cnm_kernels.use_backend("torch"):
        model = make_model(RAGGED, oracle, torch.float64)
        metrics = step_class(model, make_config(RAGGED))(make_batch(RAGGED, torch.float64))
    assert metrics["grad_norm/reconstructor"] > 10
    assert metrics["grad_norm/generator"] > 9.999  # the reconstructor's, clipped to 10, plus the generator's own


@both_steps
def test_resumed_step_continues_as_the_uninterrupted_one(step_class: type[TrainingStep]) -> None:
    def run(resume: bool) -> dict[str, Tensor]:
        model = make_model(RAGGED, make_oracle(RAGGED, 32.0), torch.float32)
        step = step_class(model, make_config(RAGGED))
        for update in range(4):
            if resume and update == 2:
                state, parameters = step.state_dict(), model.state_dict()
                model = CNM(make_config(RAGGED)).train()
                model.load_state_dict(parameters)
                step = step_class(model, make_config(RAGGED))
                step.load_state_dict(state)
            masked = (make_masked_words(RAGGED, 2 * update), make_masked_words(RAGGED, 2 * update + 1))
            step(make_batch(RAGGED, torch.float32, seed=update), masked_words=masked)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    resumed = run(True)
    for name, parameter in run(False).items():
        assert torch.equal(parameter, resumed[name]), name


def test_learning_rate_follows_the_published_schedule() -> None:
    config = make_config(RAGGED).train.reconstructor.model_copy(
        update={"lr": 4e-4, "warmup_updates": 400, "warmup_init_lr": 1e-7}
    )
    for updates in (0, 1, 200, 399, 400, 401, 1600, 10_000):
        assert learning_rate(config, updates) == pytest.approx(published.learning_rate(updates, 4e-4, 400, 1e-7), 1e-12)
    assert learning_rate(config, 0) == pytest.approx(1e-7)
    assert learning_rate(config, 1600) == pytest.approx(2e-4)


@both_steps
def test_the_batch_is_not_mutated(step_class: type[TrainingStep]) -> None:
    model = make_model(RAGGED, make_oracle(RAGGED), torch.float32)
    batch = make_batch(RAGGED, torch.float32)
    before = {field.name: getattr(batch, field.name).clone() for field in dataclasses.fields(batch)}
    step_class(model, make_config(RAGGED))(batch)
    model.eval().localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
    for name, tensor in before.items():
        assert torch.equal(getattr(batch, name), tensor), name


@pytest.mark.parametrize("what", ["start row", "words", "frames"])
def test_padding_is_never_read(what: str) -> None:
    """The last frame's own features are read, as published, whatever the length; nothing else past a length is."""
    model = make_model(RAGGED, make_oracle(RAGGED), torch.float32)
    batch = make_batch(RAGGED, torch.float32)
    masked = make_masked_words(RAGGED, 1)
    frames, words = batch.frames.clone(), batch.words.clone()
    if what == "start row":
        words[:, 0] = torch.nan
    elif what == "words":
        words[~published.within(batch.word_lengths + 1, words.size(1))] = 1e3
    else:
        padding = ~published.within(batch.frame_lengths, frames.size(1))
        padding[:, -1] = False
        frames[padding] = 1e3
    before = reconstruct(model, batch, masked)
    after = reconstruct(model, dataclasses.replace(batch, frames=frames, words=words), masked)
    for name in ("center", "width", "nll"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_a_published_checkpoint_loads(tmp_path) -> None:
    """Three keys, the sizes inside model.config as the published trainer leaves them, nothing of ours."""
    oracle = make_oracle(RAGGED)
    config = make_config(RAGGED).to_dict()
    sizes = {"frames_input_size": RAGGED.frame_dim, "words_input_size": RAGGED.word_dim}
    config["model"]["config"] |= sizes | {"max_num_words": config["dataset"]["max_num_words"]}
    path = tmp_path / "model-best.pt"
    state = {name: tensor.float() for name, tensor in oracle.state_dict().items()}
    torch.save({"num_updates": 7, "config": config, "model_parameters": state}, path)
    assert config["model"]["config"]["vocab_size"] == RAGGED.vocab_size
    model = CNM.from_checkpoint(path)
    assert not model.training
    batch = make_batch(RAGGED, torch.float32)
    center, width = model.localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
    double = make_batch(RAGGED, torch.float64)
    expected = oracle.localize(double.frames, double.frame_lengths, double.words, double.word_lengths)
    assert_agrees("center", center, expected[0], 1e-5)
    assert_agrees("width", width, expected[1], 1e-5)
    assert checkpoint.load(path)["num_updates"] == 7
