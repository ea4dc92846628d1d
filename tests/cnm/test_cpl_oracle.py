"""``cnm.models.cpl`` and its steps against the plain transcription in ``published_cpl.py``.

What agrees is stated in ``test_oracle.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import published
import published_cpl
import pytest
import torch
from oracle_checks import dataset_section, randomize, transformer_section
from test_oracle import GRADIENT_NOISE, TOLERANCE, assert_agrees, make_masked_words, oracle_inputs
from test_oracle import Case as Sizes
from test_oracle import make_batch as make_any_batch
from torch import Tensor

import cnm_kernels
from cnm.config import CPLConfig
from cnm.data.batch import Batch
from cnm.models import Scoring, load_checkpoint
from cnm.models.cpl import CPL
from cnm.training.cpl_step import STEPS

MAX_EPOCH = 9
LOSS = {"margin_1": 0.5, "margin_2": 0.7, "lambda": 0.146, "alpha_1": 1.5, "alpha_2": 5.0}  # all hinges are active
OPTIMIZER = {"lr": 4e-3, "warmup_updates": 3, "warmup_init_lr": 1e-4, "weight_decay": 0.02}


@dataclasses.dataclass(frozen=True)
class Case(Sizes):
    """CNM's sizes, and those of the proposals."""

    num_props: int = 4
    sigma: float = 9.0
    gamma: float = 0.5
    epoch: int = 4
    alpha_2: float = LOSS["alpha_2"]


CASES = [
    Case("ragged"),
    Case("one-proposal", num_props=1),
    Case("eight-proposals-first-epoch", num_props=8, epoch=1),
    Case("last-epoch", num_props=3, epoch=MAX_EPOCH),
    Case("grown-at-once", num_props=2, gamma=0.0, epoch=1, frame_lengths=(21, 21), word_lengths=(7, 7)),
    Case("one-word", num_words=1, word_lengths=(1, 1), frame_lengths=(21, 6)),
    Case("one-sentence", num_props=5, word_lengths=(5,), frame_lengths=(13,), sigma=4.0),
    Case("odd-head", d_model=30, num_heads=2),
    Case(
        "published-sizes",
        frame_dim=1024,
        word_dim=300,
        vocab_size=1112,
        d_model=256,
        num_frames=200,
        num_words=13,
        frame_lengths=(200, 137),
        word_lengths=(13, 4),
        num_props=8,
    ),
]
RAGGED = CASES[0]
FULL_VIDEOS = dataclasses.replace(RAGGED, frame_lengths=(21, 20, 19, 21, 18))  # with one clip proposals are equal


def make_config(case: Case, dropout: float = 0.0) -> CPLConfig:
    return CPLConfig.from_json(
        {
            "dataset": dataset_section(case),
            "train": {
                "optimizer": OPTIMIZER,
                "batch_size": len(case.word_lengths),
                "max_num_epochs": MAX_EPOCH,
                "model_saved_path": "unused",
            },
            "model": {
                "name": "CPL",
                "config": {
                    "hidden_size": case.d_model,
                    "num_props": case.num_props,
                    "sigma": case.sigma,
                    "gamma": case.gamma,
                    "dropout": dropout,
                    "DualTransformer": transformer_section(case, dropout),
                },
            },
            "loss": LOSS | {"alpha_2": case.alpha_2},
        }
    )


def oracle_loss(case: Case) -> published_cpl.Loss:
    loss = {name: value for name, value in LOSS.items() if name != "lambda"} | {"alpha_2": case.alpha_2}
    return published_cpl.Loss(own=LOSS["lambda"], **loss)


def make_oracle(case: Case, logit_scale: float = 1.0) -> published_cpl.PublishedCPL:
    """float64, every parameter away from its initial value, exact in float32 (see ``randomize``)."""
    names = {field.name for field in dataclasses.fields(published_cpl.Sizes)}
    sizes = {name: value for name, value in vars(case).items() if name in names}
    oracle = published_cpl.PublishedCPL(published_cpl.Sizes(**sizes, max_epoch=MAX_EPOCH)).double()
    randomize(oracle)
    with torch.no_grad():
        oracle.fc_comp.weight.mul_(logit_scale)
    return oracle


def make_model(case: Case, oracle: published_cpl.PublishedCPL, dtype: torch.dtype) -> CPL:
    model = CPL(make_config(case))
    model.load_state_dict(oracle.state_dict())
    return model.to(dtype).train()


def make_batch(case: Case, dtype: torch.dtype, seed: int = 5) -> Batch:
    return make_any_batch(case, dtype, seed)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest):
    """float64 runs on the reference backend, float32 on whatever runs by default."""
    with cnm_kernels.use_backend("torch" if request.param == torch.float64 else None):
        yield request.param


by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_step = pytest.mark.parametrize("step_name", STEPS)


@by_case
def test_state_dict_names_and_shapes_are_the_published_ones(case: Case) -> None:
    theirs = {name: tensor.shape for name, tensor in make_oracle(case).state_dict().items()}
    ours = {name: tensor.shape for name, tensor in CPL(make_config(case)).state_dict().items()}
    assert ours == theirs


def oracle_backward(
    case: Case, dtype: torch.dtype, masked: Tensor
) -> tuple[published_cpl.PublishedCPL, published_cpl.Output, dict[str, Tensor]]:
    """The oracle with its gradients, its output and losses."""
    oracle = make_oracle(case).to(dtype)
    output = oracle(*oracle_inputs(make_batch(case, dtype)), masked, case.epoch)
    found = published_cpl.losses(output, oracle_loss(case))
    found["loss/total"].backward()
    return oracle, output, found


@by_step
@by_case
def test_losses_and_every_gradient(step_name: str, case: Case, dtype: torch.dtype) -> None:
    model = make_model(case, make_oracle(case), dtype)
    step = STEPS[step_name](model, make_config(case))
    step.begin_epoch(case.epoch)
    masked = make_masked_words(case, 2)
    found, branches = step.losses(make_batch(case, dtype), masked)

    oracle, output, expected = oracle_backward(case, torch.float64, masked)
    for name, value in expected.items():
        assert_agrees(name, found[name], value, TOLERANCE[dtype])
    best, index = output.positive.min(1)
    assert_agrees("positive", branches.positive, best, TOLERANCE[dtype])
    assert_agrees("left", branches.left, output.left.gather(1, index[:, None])[:, 0], TOLERANCE[dtype])
    assert_agrees("right", branches.right, output.right.gather(1, index[:, None])[:, 0], TOLERANCE[dtype])
    assert_agrees("reference", branches.reference, output.reference, TOLERANCE[dtype])

    names = dict(oracle.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in names.values())
    plain = dict(oracle_backward(case, dtype, masked)[0].named_parameters())
    gradients = torch.autograd.grad(found["loss/total"], list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        # Narrow Gaussians magnify rounding: a few times the error that plain PyTorch makes in this dtype is fine too.
        own = 4 * (plain[name].grad.double() - names[name].grad).abs().max().item()
        floor = max(GRADIENT_NOISE[dtype] * largest, own)
        assert_agrees(name, gradient, names[name].grad, TOLERANCE[dtype], floor)


@by_step
@pytest.mark.parametrize("logit_scale", [0.25, 32.0], ids=["free", "clip-binds"])
def test_consecutive_updates(logit_scale: float, step_name: str) -> None:
    """Parameters, their total change, losses and norms over six updates in three epochs: first, middle and last."""
    case = RAGGED if logit_scale > 1 else dataclasses.replace(RAGGED, alpha_2=0.01)
    oracle = make_oracle(case, logit_scale)
    initial = {name: parameter.detach().clone() for name, parameter in oracle.named_parameters()}
    with cnm_kernels.use_backend("torch"):
        model = make_model(case, oracle, torch.float64)
        step = STEPS[step_name](model, make_config(case))
        oracle_step = published_cpl.PublishedCPLStep(oracle, published.Schedule(**OPTIMIZER), oracle_loss(case))
        for update, epoch in enumerate((1, 1, 5, 5, MAX_EPOCH, MAX_EPOCH)):
            batch = make_batch(case, torch.float64, seed=10 + update)
            masked = make_masked_words(case, update)
            step.begin_epoch(epoch)
            actual = step(batch, masked_words=[masked])
            expected = oracle_step(oracle_inputs(batch), masked, epoch)
            for name, value in expected.items():
                assert_agrees(f"update {update}: {name}", actual[name], value, 1e-8)
            assert (expected["grad_norm"] > 10) == (logit_scale > 1), "the case no longer tests what its name says"
        assert step.num_updates == 6
    for name, parameter in oracle.named_parameters():
        moved = dict(model.named_parameters())[name]
        assert_agrees(name, moved, parameter, 1e-9)
        assert_agrees(f"change of {name}", moved - initial[name], parameter - initial[name], 1e-6)


@by_step
def test_of_two_equal_proposals_the_first_learns(step_name: str) -> None:
    """Proposals 1 and 2 are the same Gaussian, and the best: the loss reads one of them, whose gradient is the sum."""
    case = dataclasses.replace(RAGGED, num_props=3)
    oracle = make_oracle(case)
    masked = make_masked_words(case, 2)
    inputs = oracle_inputs(make_batch(case, torch.float64))
    with torch.no_grad():
        best = int(oracle(*inputs, masked, 1).positive.mean(0).argmin())
        for parameter in (oracle.fc_gauss.weight, oracle.fc_gauss.bias):
            rows = parameter.unflatten(0, (3, 2))
            rows.copy_(torch.stack([rows[(best + 1) % 3], rows[best], rows[best]]).clone())
    published_cpl.losses(oracle(*inputs, masked, 1), oracle_loss(case))["loss/total"].backward()
    with cnm_kernels.use_backend("torch"):
        model = make_model(case, oracle, torch.float64)
        step = STEPS[step_name](model, make_config(case))
        losses, _ = step.losses(make_batch(case, torch.float64), masked)
        losses["loss/total"].backward()
        # The overlap's gradients of the two are equal: what they differ by is what the chosen one learns.
        losses, _ = step.losses(make_batch(case, torch.float64), masked)
        of_overlap = torch.autograd.grad(losses["loss/diversity"], model.fc_gauss.weight)[0].unflatten(0, (3, 2))
    ours, theirs = (m.fc_gauss.weight.grad.unflatten(0, (3, 2)) for m in (model, oracle))
    torch.testing.assert_close(ours.sum(0), theirs.sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[2], LOSS["alpha_2"] * of_overlap[2], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours[1], ours[2])


def test_a_published_checkpoint_gives_the_published_proposals(tmp_path: Path) -> None:
    """Three keys, sizes inside model.config as the published trainer leaves them; words masked as given."""
    case = FULL_VIDEOS
    oracle, config = make_oracle(case), make_config(case).to_dict()
    config["model"]["config"] |= {
        "frames_input_size": case.frame_dim,
        "words_input_size": case.word_dim,
        "max_num_words": case.num_words,
        "max_epoch": MAX_EPOCH,
    }
    path = tmp_path / "model-best.pt"
    state = {name: tensor.float() for name, tensor in oracle.state_dict().items()}
    torch.save({"num_updates": 7, "config": config, "model_parameters": state}, path)
    model = load_checkpoint(path)
    assert isinstance(model, CPL)
    assert not model.training

    batch, masked = make_batch(case, torch.float32), make_masked_words(case, 3)
    # Words to hide are drawn by weight: only those of ``masked`` have one.
    weights = masked[:, 1:].float()
    batch = dataclasses.replace(batch, mask_weights=weights)
    expected = oracle(*oracle_inputs(make_batch(case, torch.float64)), masked, 1)
    order = expected.positive.argsort(1)
    for scoring in (Scoring(published=True), Scoring(masks=2)):
        found = model.proposals(batch, scoring=scoring)
        assert_agrees("center", found.center, expected.center.gather(1, order), 1e-5)
        assert_agrees("width", found.width, expected.width.gather(1, order), 1e-5)
        assert_agrees("score", found.score, -expected.positive.gather(1, order), 1e-5)
    center, width = oracle_proposals(oracle, batch, masked, slice(1, 3))
    found = model.proposals(cut(batch, slice(1, 3)), scoring=Scoring(published=True))
    assert_agrees("center of a part", found.center, center, 1e-5)
    assert_agrees("width of a part", found.width, width, 1e-5)


def cut(batch: Batch, rows: slice) -> Batch:
    return Batch(**{field.name: getattr(batch, field.name)[rows] for field in dataclasses.fields(batch)})


def oracle_proposals(
    oracle: published_cpl.PublishedCPL, batch: Batch, masked: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    output = oracle(*oracle_inputs(cut(make_batch(FULL_VIDEOS, torch.float64), rows)), masked[rows], 1)
    order = output.positive.argsort(1)
    return output.center.gather(1, order), output.width.gather(1, order)


def test_scores_depend_on_the_sentence_alone() -> None:
    """Not on the batch, the place in it, the words its longest sentence has, or what was drawn before."""
    model = make_model(RAGGED, make_oracle(RAGGED), torch.float32).eval()
    batch = dataclasses.replace(make_batch(RAGGED, torch.float32))
    together = model.proposals(batch)
    for row in range(len(batch)):
        L = int(batch.word_lengths[row])
        alone = cut(batch, slice(row, row + 1))
        alone = dataclasses.replace(
            alone,
            words=alone.words[:, : L + 1],
            word_ids=alone.word_ids[:, :L],
            mask_weights=alone.mask_weights[:, :L],
        )
        torch.manual_seed(row)
        found = model.proposals(alone)
        assert (found.score.diff() <= 0).all(), "the best first"
        # Where a video is short, proposals tie: rounding alone puts one first.
        order, order_together = found.center[0].argsort(), together.center[row].argsort()
        for name in ("center", "width", "score"):
            assert_agrees(name, getattr(found, name)[0, order], getattr(together, name)[row, order_together], 1e-5)
    other = model.proposals(batch, scoring=Scoring(seed=1))
    assert not torch.equal(other.score, together.score)


def test_with_dropout_the_lean_step_is_the_published_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graded rows drop what they dropped when they were chosen: same losses and gradients from the same seed."""
    # One row of decoding 1 has other masks than all rows; that these are as good is another matter.
    monkeypatch.setattr(CPL, "generate", functools.partialmethod(CPL.generate, last_only=True))
    results = []
    for step_name in STEPS:
        model = CPL(make_config(FULL_VIDEOS, dropout=0.3))
        model.load_state_dict(make_oracle(FULL_VIDEOS).state_dict())
        model = model.to(dtype).train()
        step = STEPS[step_name](model, make_config(FULL_VIDEOS))
        torch.manual_seed(4)
        losses, _ = step.losses(make_batch(FULL_VIDEOS, dtype), make_masked_words(FULL_VIDEOS, 2))
        gradients = torch.autograd.grad(losses["loss/total"], list(model.parameters()))
        results.append([*losses.values(), *gradients])
    largest = max(tensor.abs().max().item() for tensor in results[0])
    tolerance = 10 * TOLERANCE[dtype]
    for first, second in itertools.pairwise(results):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def test_the_packaged_configuration_has_the_published_size() -> None:
    from cnm import configs

    config = configs.resolve("charades_cpl", ["model.config.vocab_size=1112"])
    assert isinstance(config, CPLConfig)
    assert sum(parameter.numel() for parameter in CPL(config).parameters()) == 5_375_680
