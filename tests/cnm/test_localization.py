"""Inputs that people give from Python: unpooled frames, float64, sentences without a known word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import cpl_config, synthetic_config

from cnm import CNM, CPL, InputError
from cnm.data import load_features, load_vocabulary, open_split
from cnm.data.features import pool
from cnm.localizer import LocalizedMoment, Localizer

CONFIG = synthetic_config()
T, FRAME_DIM = CONFIG.dataset.max_num_frames, CONFIG.dataset.frame_dim
VOCABULARY = load_vocabulary(CONFIG.dataset)
QUERY = " ".join(VOCABULARY.words[1:5])


@pytest.fixture(scope="module")
def model() -> CNM:
    torch.manual_seed(0)
    return CNM(CONFIG).eval()


def frames(n: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, FRAME_DIM)).astype(dtype)


def find(model: CNM, features: np.ndarray, query: str) -> LocalizedMoment:
    localizer = Localizer(model, VOCABULARY)
    return localizer.find(localizer.encode(features), [query])[0]


@pytest.mark.parametrize("n", [1, 5, T, 3 * T + 1])
def test_unpooled_frames_are_averaged_as_in_training(model: CNM, tmp_path: object, n: int) -> None:
    path = f"{tmp_path}/video.npy"
    np.save(path, frames(n))
    expected = find(model, load_features(path, FRAME_DIM, T), QUERY)
    assert find(model, frames(n), QUERY) == expected
    assert find(model, frames(n).astype(np.float64), QUERY).center == pytest.approx(expected.center, abs=1e-5)


def test_a_batch_of_unpooled_frames_is_averaged_row_by_row(model: CNM) -> None:
    lengths = torch.tensor([3 * T + 1, T, T - 2, 2 * T])
    batch = torch.zeros(4, 3 * T + 1, FRAME_DIM)
    pooled = torch.zeros(4, T, FRAME_DIM)
    for row, n in enumerate(lengths.tolist()):
        video = frames(n)
        batch[row, :n] = torch.from_numpy(video)
        pooled[row, : min(n, T)] = torch.from_numpy(pool(video, T) if n > T else video)
    words = torch.randn(4, 6, CONFIG.dataset.word_dim)
    word_lengths = torch.tensor([5, 3, 1, 5])
    found = model.localize(batch, lengths, words, word_lengths)
    expected = model.localize(pooled, lengths.clamp_max(T), words, word_lengths)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wide", ["frames", "words", "both"])
def test_float64_inputs_work_beside_float32_ones(model: CNM, wide: str) -> None:
    video, words = torch.from_numpy(frames(T))[None], torch.randn(1, 6, CONFIG.dataset.word_dim)
    lengths, word_lengths = torch.tensor([T]), torch.tensor([5])
    expected = model.localize(video, lengths, words, word_lengths)
    if wide != "words":
        video = video.double()
    if wide != "frames":
        words = words.double()
    for ours, theirs in zip(model.localize(video, lengths, words, word_lengths), expected, strict=True):
        assert torch.equal(ours, theirs)
    encoded = model.encode_video(video, lengths)
    assert torch.equal(model.localize_encoded(encoded, words, word_lengths)[0], expected[0])


@pytest.mark.parametrize("query", ["  ", "xylophone zither"])
def test_messages_name_the_argument(model: CNM, query: str) -> None:
    with pytest.raises(InputError, match=r"^query"):
        find(model, frames(T), query)


@pytest.mark.parametrize("family", [CNM, CPL])
def test_localizing_drops_nothing_in_training_mode(family: type[CNM] | type[CPL]) -> None:
    """And draws no numbers, which training would miss."""
    config = {CNM: synthetic_config, CPL: cpl_config}[family]()
    torch.manual_seed(0)
    model = family(config).eval()
    batch = open_split(config.dataset, "test").batch(np.arange(3))
    wanted, before = model.proposals(batch), torch.get_rng_state()
    found = model.train().proposals(batch)
    assert torch.equal(found.center, wanted.center)
    assert torch.equal(found.score, wanted.score)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
