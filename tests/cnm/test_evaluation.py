"""Evaluation of a split: the same as localizing its sentences one by one."""

from __future__ import annotations

import numpy as np
import torch
from small_runs import synthetic_config

from cnm import CNM
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
