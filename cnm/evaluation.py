"""Localizing every sentence of a split, and the scores of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cnm import metrics
from cnm.data import Split
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.models.cnm import CNM


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for the N sentences of a split.

    Attributes:
        center, width: [N] float64, fractions of the video.
        scores: R@1 and mIoU, keyed by ``cnm.metrics.SCORES``.
    """

    center: metrics.Array
    width: metrics.Array
    scores: dict[str, float]


def evaluate(
    model: CNM,
    split: Split,
    batch_size: int,
    *,
    check: Callable[[], None] | None = None,
    group: Group | None = None,
) -> Evaluation:
    """Localizes every sentence of ``split`` and scores the moments. The model is put back in the mode it was in.

    Args:
        check: called after each batch; what it raises ends the evaluation.
        group: processes that share the split, each a stretch of it; all of them get the whole result.

    Raises:
        InputError: the split's features or word vectors do not have the model's sizes.
    """
    check_fits(model, split)
    device = model.fc_rec.weight.device
    centers, widths = [], []
    own = np.arange(len(split)) if group is None else np.array_split(np.arange(len(split)), group.size)[group.rank]
    training = model.training
    model.eval()
    try:
        for start in range(0, len(own), batch_size):
            indices = own[start : start + batch_size]
            batch = split.batch(indices).to(device, non_blocking=True)
            # Sentences about one video lie side by side: it is encoded once for all of them in the batch.
            videos = [split.samples[int(index)].video for index in indices]
            _, *found = np.unique(videos, return_index=True, return_inverse=True)
            first, place = (torch.from_numpy(array).to(device) for array in found)
            encoded = model.encode_video(batch.frames[first], batch.frame_lengths[first])
            center, width = model.localize_encoded(encoded.select(place), batch.words, batch.word_lengths)
            centers.append(center)
            widths.append(width)
            if check is not None:
                check()
    finally:
        model.train(training)
    found_center, found_width = (
        torch.cat([torch.empty(0, device=device), *parts]).double().cpu().numpy() for parts in (centers, widths)
    )
    if group is not None:
        stretches = zip(*group.gather((found_center, found_width)), strict=True)
        found_center, found_width = (np.concatenate(parts) for parts in stretches)
    if not np.isfinite(found_center + found_width).all():
        row = int(np.argmin(np.isfinite(found_center + found_width)))
        raise InputError(
            f"{split.name} split: the model's answer to sentence {row} is no number; its checkpoint, or features of "
            f"video {split.samples[row].video!r}, hold numbers too large"
        )
    ious = metrics.best_iou(metrics.moments_from_gaussian(found_center, found_width), split.windows)
    return Evaluation(found_center, found_width, metrics.summary(ious))


def check_fits(model: CNM, split: Split) -> None:
    """Raises ``InputError`` where a split cannot be fed to a model: sizes differ, or there is nothing in it."""
    if len(split) == 0:
        raise InputError(f"{split.name} split: no sentence left to use; check the annotation file")
    config = model.config.dataset
    batch = split.batch(np.arange(1))
    for name, found, expected in (
        ("frame_dim", batch.frames.size(-1), config.frame_dim),
        ("word_dim", batch.words.size(-1), config.word_dim),
    ):
        if found != expected:
            raise InputError(
                f"dataset.{name} is {found}, but the model was made for {expected}; use the configuration it was "
                f"trained with"
            )
    check_vocabulary(model, split.vocabulary.words)


def check_vocabulary(model: CNM, words: list[str], stored: list[str] | None = None) -> None:
    """Raises ``InputError`` where a vocabulary is not the one a model learnt.

    Args:
        words: the vocabulary, ``words[0]`` the padding.
        stored: the vocabulary in the model's checkpoint, if it has one.
    """
    expected = model.fc_rec.out_features
    if len(words) != expected:
        raise InputError(
            f"vocabulary of {len(words)} words (padding included) does not fit the model, which has {expected}; check "
            f"dataset.vocab_path and dataset.vocab_size"
        )
    if stored is not None and stored != words:
        index = next(index for index, (ours, theirs) in enumerate(zip(words, stored, strict=True)) if ours != theirs)
        raise InputError(
            f"vocabulary does not fit the checkpoint: word {index} is {words[index]!r}, but the model learnt it as "
            f"{stored[index]!r}; check dataset.vocab_path"
        )
