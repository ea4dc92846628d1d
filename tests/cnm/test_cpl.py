"""CPL in use: configurations, runs, resume, processes, evaluation, and every command."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_distributed
import torch
from small_runs import cpl_config, with_cpl, write_files
from step_checks import as_on_gpus
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner
from undrawn import draw_nothing

from cnm import InputError, configs, metrics
from cnm.cli import app
from cnm.config import CONFIGS, CNMConfig, Config, CPLConfig
from cnm.data import open_split
from cnm.distributed import Group
from cnm.evaluation import evaluate, evaluate_seeds
from cnm.models import MODELS, Scoring, build, load_checkpoint
from cnm.models.base import PRECISIONS
from cnm.models.cnm import CNM
from cnm.models.cpl import CPL
from cnm.training.cpl_step import LeanStep
from cnm.training.cuda_graph import WARM_UP_STEPS, GraphedStep
from cnm.training.steps import STEP_NAMES, STEPS, make_step
from cnm.training.trainer import Interrupted, Trainer

runner = CliRunner()
PUBLISHED: dict[str, Any] = {
    "dataset": {
        "dataset": "CharadesSTA",
        "feature_path": "data/charades/i3d_features.hdf5",
        "vocab_size": 1111,
        "word_dim": 300,
        "frame_dim": 1024,
        "max_num_words": 20,
        "max_num_frames": 200,
        "target_stride": 1,
        "train_data": "data/charades/train.json",
        "test_data": "data/charades/test.json",
        "val_data": "data/charades/test.json",
        "vocab_path": "data/charades/glove.pkl",
    },
    "train": {
        "optimizer": {"lr": 4e-4, "weight_decay": 0, "warmup_updates": 400, "warmup_init_lr": 1e-7},
        "batch_size": 32,
        "max_num_epochs": 30,
        "model_saved_path": "checkpoints/charades/",
    },
    "model": {
        "name": "CPL",
        "config": {
            "frames_input_size": 1024,
            "words_input_size": 300,
            "hidden_size": 256,
            "use_negative": True,
            "num_props": 8,
            "sigma": 9,
            "gamma": 0.5,
            "dropout": 0.1,
            "DualTransformer": {
                "d_model": 256,
                "num_heads": 4,
                "num_decoder_layers1": 3,
                "num_decoder_layers2": 3,
                "dropout": 0.1,
            },
        },
    },
    "loss": {"margin_1": 0.1, "margin_2": 0.15, "lambda": 0.146, "alpha_1": 1, "alpha_2": 5},
}


def run(*arguments: str) -> Any:
    return runner.invoke(app, list(arguments))


# ---- configurations ----


def test_every_model_is_in_every_table() -> None:
    assert MODELS.keys() == CONFIGS.keys() == STEPS.keys()
    assert all(set(steps) == set(STEP_NAMES) for steps in STEPS.values())


def test_the_published_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "main.json").write_text(json.dumps(PUBLISHED))
    config = configs.resolve(tmp_path / "main.json")
    assert isinstance(config, CPLConfig)
    assert config.loss.lambda_ == 0.146
    assert Config.from_json(json.loads(json.dumps(config.to_dict()))) == config
    packaged = configs.resolve("charades_cpl").to_dict()
    given = config.to_dict()
    del given["dataset"]["target_stride"], given["train"]["model_saved_path"], packaged["train"]["model_saved_path"]
    assert {name: packaged[name] for name in packaged if name != "train"} == {
        name: given[name] for name in given if name != "train"
    }
    assert packaged["train"] == given["train"]


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model", "name", "CPNet", r"model\.name: no such model, choose one of CNM, CPL; got 'CPNet'"),
        ("loss", "beta_1", 0.1, r"unknown field loss\.beta_1"),
        ("loss", "lambda", -1, r"loss\.lambda: Input should be greater than or equal to 0, got -1"),
        ("train", "generator", {}, r"unknown field train\.generator"),
        ("dataset", "target_stride", 2, r"dataset\.target_stride: Input should be 1"),
    ],
)
def test_what_is_wrong_is_named(section: str, name: str, value: Any, message: str) -> None:
    content = copy.deepcopy(PUBLISHED)
    content[section][name] = value
    with pytest.raises(InputError, match=message):
        Config.from_json(content)


def test_a_checkpoint_that_holds_the_published_commands_option(tmp_path: Path) -> None:
    """The published command keeps its --vote in the configuration that it saves."""
    trainer = Trainer(cpl_config(), tmp_path / "run", quiet=True)
    content = trainer._model_state()
    torch.save(content | {"config": content["config"] | {"vote": False}}, tmp_path / "published.pt")
    model = load_checkpoint(tmp_path / "published.pt", "cpu")
    assert model.config == trainer.config


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(cpl_config(train__max_num_epochs=1), tmp_path / "run", quiet=True)
    trainer.train()
    assert isinstance(load_checkpoint(tmp_path / "run" / "last.pt"), CPL)
    with pytest.raises(InputError, match=r"holds a CPL, not a CNM; load it with cnm\.models\.load_checkpoint"):
        CNM.from_checkpoint(tmp_path / "run" / "last.pt")
    with pytest.raises(InputError, match=r"model\.name: Input should be 'CNM'"):
        CNMConfig.from_json(tmp_path / "run" / "config.json")


# ---- the step ----


def model_and_batch(**changes: Any) -> tuple[CPL, Any]:
    config = cpl_config(**changes)
    split = open_split(config.dataset, "train")
    content = config.to_dict()
    content["model"]["config"]["vocab_size"] = len(split.vocabulary)
    torch.manual_seed(0)
    model = build(Config.from_json(content))
    assert isinstance(model, CPL)
    return model.train(), split.batch(np.arange(6))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("step", STEP_NAMES)
def test_nothing_waits_for_the_host(step: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: a step that runs on them fits into a CUDA graph."""
    as_on_gpus(monkeypatch)
    real, batch = model_and_batch()
    with FakeTensorMode() as mode:
        model = build(real.config).train()
        model.compute_dtype = PRECISIONS[precision]
        train = make_step(step, model, model.config)
        fake = type(batch)(**{name: mode.from_tensor(value) for name, value in vars(batch).items()})
        for epoch in (1, 2):
            train.begin_epoch(epoch)
            found = train(fake)
    assert all(value.shape == () for value in found.values())


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_recomputing_changes_no_bit(dtype: torch.dtype | None) -> None:
    trained = []
    for name in ("lean", "recompute"):
        model, batch = model_and_batch()
        model.compute_dtype = dtype
        step = make_step(name, model, model.config)
        torch.manual_seed(1)
        for _ in range(3):
            step(batch)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*trained)


def test_bf16_follows_float32() -> None:
    losses = {}
    for name, dtype in PRECISIONS.items():
        model, batch = model_and_batch()
        model.eval().compute_dtype = dtype
        masked = (torch.arange(batch.words.size(1)) == 1).expand(len(batch), -1)
        found, _ = LeanStep(model, model.config).losses(batch, masked)
        gradients = torch.autograd.grad(found["loss/total"], list(model.parameters()))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        losses[name] = found["loss/total"].item()
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bf16"] != losses["float32"]


def test_fixed_gradients_change_nothing() -> None:
    trained = []
    for fixed in (False, True):
        model, batch = model_and_batch()
        step = LeanStep(model, model.config)
        step.fixed_gradients = fixed
        torch.manual_seed(1)
        for _ in range(3):
            step(batch)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*trained)


def test_an_update_that_is_not_finite_is_left_out() -> None:
    model, batch = model_and_batch()
    step = LeanStep(model, model.config)
    step.skip_nonfinite = True
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    frames = batch.frames.clone()
    frames[0] = torch.nan
    found = step(type(batch)(**vars(batch) | {"frames": frames}))
    assert found["grad_norm"].isnan()
    assert torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replays_train_as_the_step_does() -> None:
    """Across epochs too: the negatives' growth is read anew."""
    trained = []
    for graphs in (False, True):
        model, batch = model_and_batch()
        model, batch = model.to("cuda").eval(), batch.to("cuda")
        # Sentences of one word, which is the one that is masked: nothing is left to chance.
        short = {"words": batch.words[:, :2], "word_ids": batch.word_ids[:, :1].clamp_min(1)}
        short |= {"word_lengths": torch.ones_like(batch.word_lengths)}
        short |= {"mask_weights": torch.ones_like(batch.mask_weights[:, :1])}
        batch = type(batch)(**vars(batch) | short)
        step = LeanStep(model, model.config)
        call = GraphedStep(step) if graphs else step
        for epoch in (1, 2):
            step.begin_epoch(epoch)
            for _ in range(WARM_UP_STEPS + 2):
                call(batch)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert not graphs or call.graphs
    torch.testing.assert_close(*trained)


# ---- runs ----


class Pretend(Group):
    """Processes that take turns in one: each keeps what it would send."""

    def __init__(self, rank: int, size: int, sent: list[list[Any]]) -> None:
        super().__init__(rank, size)
        self.sent = sent

    def sum(self, tensors: Any, share: float) -> list[torch.Tensor]:
        self.sent[self.rank] = [tensor.detach() * share for tensor in tensors]
        return [torch.stack(parts).sum(0) for parts in zip(*(sent for sent in self.sent if sent), strict=True)]


def test_two_processes_compute_one_batchs_gradients() -> None:
    """Without dropout, the shares of two halves sum to the whole batch's gradient."""
    norms = []
    sent: list[list[Any]] = [[], []]
    for group in (None, Pretend(0, 2, sent), Pretend(1, 2, sent)):
        model, batch = model_and_batch()
        model.eval()
        masked = (torch.arange(batch.words.size(1)) == 1).expand(len(batch), -1)
        step = LeanStep(model, model.config)
        if group is not None:
            rows = torch.from_numpy(group.rows(len(batch)))
            batch = type(batch)(**{name: value[rows] for name, value in vars(batch).items()})
            masked, step.group, step.share = masked[rows], group, group.share(6)
            # Means of metrics are sums too: only the gradients' are of interest.
            step._means = lambda means: means
        norms.append(step(batch, masked_words=[masked])["grad_norm"])
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(tmp_path: Path) -> None:
    config = cpl_config(**test_distributed.NO_DROPOUT, dataset__cache_path=str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ("--config", str(tmp_path / "config.json"), "--run-folder", str(folder))
        done = test_distributed.train(processes, *arguments, drawn=processes > 1)
        assert done.returncode == 0, done.stderr[-3000:]
    test_distributed.assert_same_parameters(tmp_path / "2", tmp_path / "1")


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
    config = cpl_config(train__max_num_epochs=3)
    Trainer(config, tmp_path / "straight", quiet=True).train()

    broken = Trainer(config, tmp_path / "broken", quiet=True)
    step, calls = broken.step, []

    def interrupted(batch: Any) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if len(calls) == 5:  # amid the second epoch
            broken.stop_signal.received = 2
        return step(batch)

    broken.run_step = interrupted
    with pytest.raises(Interrupted):
        broken.train()
    Trainer(None, tmp_path / "broken", resume=True, quiet=True).train()
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken")]
    for name, value in states[0]["model_parameters"].items():
        assert torch.equal(value, states[1]["model_parameters"][name]), name


def test_every_command(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | with_cpl(content)))
    folder = tmp_path / "run"
    result = run("train", "--config", str(path), "--run", str(folder), "--device", "cpu", "--precision", "bf16")
    assert result.exit_code == 0, result.output
    assert "R@5" not in result.output.splitlines()[0]
    assert "best of 3 moments" in result.output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/total", "loss/diversity", "nll/reference", "nll/left"} <= rows[0].keys()
    assert (folder / "pictures" / "learning_curves.png").stat().st_size > 10_000
    assert (folder / "pictures" / "localizations.png").stat().st_size > 10_000

    found = str(tmp_path / "found.jsonl")
    draws = ["--seeds", "2", "--masks", "3", "--predictions", found]
    result = run("evaluate", "--checkpoint", str(folder / "last.pt"), *draws)
    assert result.exit_code == 0, result.output
    assert f"{found}: holds the moments of the first of 2 draws" in result.output
    for name in ("lowest nll", "weighted vote", "equal vote, as published", "+- of 2 seeds", "best of 3 moments"):
        assert name in result.output
    result = run("evaluate", "--checkpoint", str(folder / "last.pt"), "--json")
    scores = json.loads(result.stdout)
    assert set(scores["scores"]) == {*metrics.SCORES, *metrics.TOP_SCORES}
    assert set(scores["as_published"]["mean"]) == set(metrics.SELECTIONS)
    trained = load_checkpoint(folder / "last.pt", torch.device("cpu"))
    published = evaluate_seeds(trained, open_split(trained.config.dataset, "test"), 8, 1, Scoring(published=True))
    assert scores["as_published"]["mean"] == published.mean
    selected = ["evaluate", "--checkpoint", str(folder / "last.pt"), "--select", "0.3"]
    above = json.loads(run(*selected, "--json").stdout)
    assert above["select"] == 0.3
    assert above["as_published"] == scores["as_published"]
    assert above["scores"]["mIoU"] != scores["scores"]["mIoU"]
    assert "lowest nll, above 0.3 of the peak" in run(*selected).output
    refused = run(*selected[:-1], "1.5")
    assert refused.exit_code != 0
    assert "--select must lie between 0 and 1, got 1.5" in refused.output + refused.stderr

    np.save(tmp_path / "video.npy", np.random.default_rng(0).standard_normal((30, 12), dtype=np.float32))
    query = ["--features", str(tmp_path / "video.npy"), "--query", "the dog opens the door", "--duration", "20"]
    command = ["localize", "--checkpoint", str(folder / "last.pt"), *query]
    plain = run(*command, "--plot", str(tmp_path / "found.png"))
    assert plain.exit_code == 0, plain.output
    assert len(plain.stdout.splitlines()) == 1
    assert "score" not in plain.stdout
    assert len(run(*command, "--top", "2").stdout.splitlines()) == 2
    found = json.loads(run(*command, "--top", "9", "--json").stdout)
    assert len(found["others"]) == 2
    assert found["score"] >= found["others"][0]["score"] >= found["others"][1]["score"]
    assert found["others"][0]["start_seconds"] == pytest.approx(20 * found["others"][0]["start"])


# ---- evaluation ----


def test_sentences_that_share_a_video_get_their_own_proposals() -> None:
    model, _ = model_and_batch()
    model.eval()
    with torch.no_grad():
        model.fc_gauss.weight.normal_()
    split = open_split(model.config.dataset, "test")
    found = evaluate(model, split, batch_size=3)
    assert found.centers.shape == (len(split), 3)
    for row in range(len(split)):
        alone = model.proposals(split.batch(np.array([row])))
        np.testing.assert_allclose(found.confidences[row], alone.score[0], rtol=1e-4)
        np.testing.assert_allclose(found.center[row], alone.center[0, 0], rtol=1e-4)
    assert set(found.by_selection) == set(metrics.SELECTIONS)
    assert found.scores == found.by_selection["nll"]


def test_only_the_published_scoring_depends_on_the_draw() -> None:
    model, _ = model_and_batch()
    split = open_split(model.config.dataset, "test")
    first = [evaluate(model, split, 4).confidences for _ in range(2)]
    assert np.array_equal(*first)
    published = [evaluate(model, split, 4, scoring=Scoring(published=True)).confidences for _ in range(2)]
    assert not np.array_equal(*published)


def seeing(model: Any) -> Any:
    """The model with parameters that make its answers depend on the masks drawn."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.fc_gauss.weight.normal_()
    return model


@pytest.mark.parametrize("published", [False, True])
def test_seeds_are_draws_of_their_own(published: bool) -> None:
    torch.manual_seed(3)
    model = seeing(model_and_batch()[0])
    split = open_split(model.config.dataset.model_copy(update={"num_videos": 160}), "test")
    spread = evaluate_seeds(model, split, 4, 3, Scoring(published=published))
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(evaluate(model, split, 4, scoring=Scoring(published=published, seed=seed)).scores["mIoU"])
    assert len(set(found)) == 3
    assert spread.mean["nll"]["mIoU"] == pytest.approx(np.mean(found))
    assert spread.deviation["nll"]["mIoU"] == pytest.approx(np.std(found, ddof=1))
    assert spread.first.scores["mIoU"] == found[0]


def test_the_moment_above_a_level_is_scored() -> None:
    torch.manual_seed(3)
    model = seeing(model_and_batch()[0])
    split = open_split(model.config.dataset, "test")
    found = evaluate(model, split, 4, scoring=Scoring(select=0.3))
    centers, widths = evaluate(model, split, 4).center, evaluate(model, split, 4).width
    above = 2 * np.maximum(widths, model.min_width) * np.sqrt(-2 * np.log(0.3)) / model.config.model.config.sigma
    ious = metrics.best_iou(metrics.moments_from_gaussian(centers, above), split.windows)
    assert found.scores["mIoU"] == pytest.approx(ious.mean())
    assert found.scores["mIoU"] != evaluate(model, split, 4).scores["mIoU"]


def test_a_sentence_without_a_known_word_has_proposals() -> None:
    """Test files have such sentences, and they are localized too."""
    model, batch = model_and_batch()
    lengths, weights = batch.word_lengths.clone(), batch.mask_weights.clone()
    lengths[2], weights[2] = 0, 0
    found = model.eval().proposals(type(batch)(**vars(batch) | {"word_lengths": lengths, "mask_weights": weights}))
    assert found.score.isfinite().all()
    alone = batch.words[2:3, :2], batch.word_ids[2:3, :1], lengths[2:3], weights[2:3, :1]
    names = ("words", "word_ids", "word_lengths", "mask_weights")
    given = {"frames": batch.frames[2:3], "frame_lengths": batch.frame_lengths[2:3]}
    single = model.proposals(type(batch)(**given, **dict(zip(names, alone, strict=True))))
    torch.testing.assert_close(single.score[0], found.score[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 3])
def test_videos_of_which_the_reconstructor_would_see_nothing(T: int) -> None:
    model, batch = model_and_batch()
    short = dataclasses.replace(batch, frames=batch.frames[:, :T], frame_lengths=batch.frame_lengths.clamp(max=T))
    for use in (
        lambda: model.proposals(short),
        lambda: model.encode_video(short.frames, short.frame_lengths),
        lambda: model.reconstruct(short, growth=1.0),
    ):
        with pytest.raises(ValueError, match=rf"^frames: needs at least 4 rows, .*, got {T}$"):
            use()


def test_encoded_videos_must_be_as_many_as_sentences() -> None:
    model, batch = model_and_batch()
    video = model.eval().encode_video(batch.frames[:2], batch.frame_lengths[:2])
    with pytest.raises(ValueError, match="CPL: 2 encoded videos for 6 sentences"):
        model.proposals(batch, video=video)


def test_numpys_float64_is_taken() -> None:
    config = cpl_config()
    model, split = build(config).eval(), open_split(config.dataset, "test")
    batch = split.batch(range(3))
    wide = dataclasses.replace(batch, frames=batch.frames.double(), words=batch.words.double())
    assert torch.equal(model.proposals(wide).center, model.proposals(batch).center)
