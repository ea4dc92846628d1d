"""Evaluation of a split: the same as localizing its sentences one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_runs import synthetic_config

import cnm.models.cnm
from cnm import CNM, InputError
from cnm.data import open_split
from cnm.evaluation import evaluate


def test_sentences_that_share_a_video_get_their_own_moments() -> None:
    """Also where a batch ends amid a video's sentences; the videos of a batch are encoded once each."""
    torch.manual_seed(0)
    config = synthetic_config()
    split = open_split(config.dataset, "test")
    videos = [sample.video for sample in split.samples]
    assert len(set(videos)) < len(videos)
    content = config.to_dict()
    content["dataset"]["vocab_size"] = len(split.vocabulary) - 1
    content["model"]["config"]["vocab_size"] = len(split.vocabulary)
    model = CNM(type(config).from_json(content)).eval()
    with torch.no_grad():
        model.fc_mask_gen.weight.normal_()  # moments that differ from sentence to sentence
        model.fc_mask_gen.bias.zero_()
    found = evaluate(model, split, batch_size=3)
    for row in range(len(split)):
        batch = split.batch(np.array([row]))
        center, width = model.localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)
        np.testing.assert_allclose([found.center[row], found.width[row]], [center.item(), width.item()], rtol=1e-4)
    assert np.ptp(found.center) > 1e-3


@pytest.mark.parametrize("name", ["max_num_frames", "max_num_words"])
def test_data_of_another_length_is_refused(name: str) -> None:
    config = synthetic_config()
    split = open_split(synthetic_config(**{f"dataset__{name}": 8}).dataset, "test")
    content = config.to_dict()
    content["model"]["config"]["vocab_size"] = len(split.vocabulary)
    expected = content["dataset"][name]
    with pytest.raises(InputError, match=rf"dataset\.{name} is 8, but the model was made for {expected}; use the conf"):
        evaluate(CNM(type(config).from_json(content)), split, batch_size=3)


def test_words_are_masked_without_weights() -> None:
    """All real words alike, and never padding: max(l // 3, 1) of each sentence."""
    config = synthetic_config()
    split = open_split(config.dataset, "test")
    content = config.to_dict()
    content["model"]["config"]["vocab_size"] = len(split.vocabulary)
    model = CNM(type(config).from_json(content)).eval()
    batch = split.batch(np.arange(len(split)))
    lengths = torch.arange(len(split)) % batch.word_lengths.max() + 1
    real = torch.arange(batch.word_ids.size(1)) < lengths[:, None]
    drawn = []
    sample = cnm.models.cnm.sample_masked_words

    def noted(*arguments: Any) -> Any:
        drawn.append(sample(*arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cnm.models.cnm, "sample_masked_words", noted)
        model.reconstruct(batch.frames, batch.frame_lengths, batch.words, batch.word_ids * real, lengths)
    [masked] = drawn
    assert torch.equal((masked[:, 1:] & real).sum(1), (lengths // 3).clamp_min(1))
