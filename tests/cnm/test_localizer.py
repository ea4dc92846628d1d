"""From a checkpoint, features and sentences to moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import synthetic_config

import cnm
from cnm import checkpoint, configs, metrics
from cnm.data import load_vocabulary, open_split
from cnm.data.features import pool
from cnm.models import Scoring

CONFIG = synthetic_config(**{"model.config.DualTransformer.num_decoder_layers1": 2})
SENTENCES = [
    "the old man opens a door",
    "a girl quickly washes the cup again",
    "the chef throws a plate",
    "the happy dancer carries a chair slowly",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training writes it."""
    torch.manual_seed(0)
    content = {
        "num_updates": 1,
        "config": CONFIG.to_dict(),
        "model_parameters": cnm.CNM(CONFIG).state_dict(),
        "vocabulary": load_vocabulary(CONFIG.dataset).state(),
    }
    path = tmp_path_factory.mktemp("localizer") / "model.pt"
    checkpoint.save(path, content)
    return path


@pytest.fixture(scope="module")
def localizer(path: Path) -> cnm.Localizer:
    return cnm.Localizer.from_checkpoint(path)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((40, CONFIG.dataset.frame_dim)).astype(np.float32)


def test_moments_are_the_models_in_seconds(localizer: cnm.Localizer, features: np.ndarray) -> None:
    video = localizer.encode(features, duration=30.0)
    clips = torch.from_numpy(pool(features, CONFIG.dataset.max_num_frames))[None]
    for query, found in zip(SENTENCES, localizer.find(video, SENTENCES), strict=True):
        ids = localizer.vocabulary.encode(query, 20).ids
        words = torch.from_numpy(np.concatenate([np.zeros((1, 10)), localizer.vocabulary.vectors[ids]]))[None].float()
        center, width = localizer.model.localize(clips, torch.tensor([16]), words, torch.tensor([len(ids)]))
        assert found.query == query
        assert found.center == pytest.approx(center.item(), abs=1e-6)
        assert found.width == pytest.approx(width.item(), abs=1e-6)
        start, end = metrics.moments_from_gaussian(found.center, found.width) * 30
        assert (found.start, found.end) == pytest.approx((start, end))
        assert found.score == found.best.score == found.proposals[0].score


def test_many_sentences_come_in_their_order(localizer: cnm.Localizer, features: np.ndarray) -> None:
    """More than one batch, of mixed lengths, and one by one: the same answers."""
    video = localizer.encode(features)
    many = [SENTENCES[index % 4] for index in range(150)]
    alone = {query: localizer.find(video, [query])[0] for query in SENTENCES}
    together = localizer.find(video, many)
    assert [found.query for found in together] == many
    for found in together:
        assert found.center == pytest.approx(alone[found.query].center, abs=1e-6)
    assert len({round(found.center, 6) for found in together}) == 4


def test_a_video_is_encoded_once(
    localizer: cnm.Localizer, features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = localizer.model.encode_video
    monkeypatch.setattr(localizer.model, "encode_video", lambda *inputs: (calls.append(1), encode(*inputs))[1])
    video = localizer.encode(features)
    localizer.find(video, SENTENCES)
    localizer.find(video, SENTENCES)
    assert len(calls) == 1


def test_a_level_chooses_the_width_as_in_evaluation(localizer: cnm.Localizer, features: np.ndarray) -> None:
    video, model = localizer.encode(features), localizer.model
    [plain] = localizer.find(video, SENTENCES[:1])
    for level in (0.05, 0.7):
        [found] = localizer.find(video, SENTENCES[:1], scoring=Scoring(select=level))
        width = metrics.width_above(level, plain.width, model.alpha, model.min_width)
        assert (found.start, found.end) == pytest.approx(metrics.moments_from_gaussian(plain.center, width))
        assert found.width == plain.width  # the Gaussian's


def test_all_proposals_of_a_model_come_best_first() -> None:
    config = configs.resolve("synthetic_cpl", ["dataset.num_videos=12"])
    torch.manual_seed(0)
    localizer = cnm.Localizer(cnm.CPL(config).eval(), load_vocabulary(config.dataset))
    split = open_split(config.dataset, "test")
    batch = split.batch(np.arange(3))
    expected = localizer.model.proposals(batch)
    for row, sample in enumerate(split.samples[:3]):
        [found] = localizer.find(localizer.encode(batch.frames[row], duration=10.0), [sample.sentence])
        scores = [proposal.score for proposal in found.proposals]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(expected.score[row].tolist(), abs=1e-5)
        assert [proposal.center for proposal in found.proposals] == pytest.approx(
            expected.center[row].tolist(), abs=1e-5
        )
        assert found.proposals[1].end == pytest.approx(
            10 * min(found.proposals[1].center + found.proposals[1].width / 2, 1)
        )


def test_without_a_duration_moments_are_fractions(localizer: cnm.Localizer, features: np.ndarray) -> None:
    [found] = localizer.find(localizer.encode(torch.from_numpy(features)), "the man opens a door")
    assert 0 <= found.start < found.end <= 1


def test_the_curve_is_the_gaussian(localizer: cnm.Localizer, features: np.ndarray) -> None:
    [found] = localizer.find(localizer.encode(features), SENTENCES[:1])
    curve = localizer.curve(found.best, 101)
    time = np.linspace(0, 1, 101)
    expected = np.exp(-localizer.model.alpha * (time - found.center) ** 2 / max(found.width, 0.1) ** 2)
    assert np.abs(curve - expected).max() < 1e-12


def test_unknown_words_are_named(localizer: cnm.Localizer, features: np.ndarray) -> None:
    found = localizer.find(localizer.encode(features), ["the man opens a xylophone", SENTENCES[0]])
    assert [item.unknown for item in found] == [("xylophone",), ()]


def test_words_that_are_not_read_are_named(localizer: cnm.Localizer, features: np.ndarray) -> None:
    longest = localizer.model.config.dataset.max_num_words
    whole = " ".join(["the man opens a door"] * (longest // 5 + 1))
    read = " ".join(whole.split()[:longest])
    cut, uncut = localizer.find(localizer.encode(features), [whole, read])
    assert cut.cut == tuple(whole.split()[longest:]) != ()
    assert uncut.cut == ()
    assert cut.start == pytest.approx(uncut.start, abs=1e-5)


def test_no_sentences_no_moments(localizer: cnm.Localizer, features: np.ndarray) -> None:
    assert localizer.find(localizer.encode(features), []) == []


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["the man", "xylophone zither"], "query 'xylophone zither': has no word the model knows"),
        (["  "], "query: is empty"),
    ],
)
def test_sentences_refused(localizer: cnm.Localizer, features: np.ndarray, sentences: list[str], message: str) -> None:
    video = localizer.encode(features)
    with pytest.raises(cnm.InputError, match=message):
        localizer.find(video, sentences)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.zeros((5, 3), np.float32), "3 wide, but the model was trained on 12"),
        (np.zeros((0, 12), np.float32), r"shape \[0, 12\]"),
        (np.zeros(12, np.float32), r"shape \[12\]"),
        (np.array([["a"] * 12]), "not numbers"),
        (np.full((4, 12), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_features_refused(localizer: cnm.Localizer, broken: np.ndarray, message: str) -> None:
    with pytest.raises(cnm.InputError, match=message):
        localizer.encode(broken)


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_durations_refused(localizer: cnm.Localizer, features: np.ndarray, duration: float) -> None:
    with pytest.raises(cnm.InputError, match="duration: must be more than 0"):
        localizer.encode(features, duration=duration)


@pytest.mark.parametrize(
    "wrong", [{"select": 1.5}, {"select": 0.0}, {"select": float("nan")}, {"masks": 0}, {"seed": -1}]
)
def test_scoring_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(cnm.InputError, match=r"^Scoring: "):
        Scoring(**wrong)  # type: ignore[arg-type]
