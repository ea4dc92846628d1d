"""Localizing every sentence of a split, and the scores of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from cnm import metrics
from cnm.data import Split, Vocabulary
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.models.base import Model, Proposals, Scoring


@dataclass(frozen=True)
class Evaluation:
    """A model's predictions for the N sentences of a split, K moments each, best first.

    Attributes:
        centers, widths, confidences: [N, K] float64; of the moments, fractions of the video, and ``Proposals.score``.
        scores: R@1 and mIoU of the first, keyed by ``cnm.metrics.SCORES``; and R@5 where there are several. Empty where
            the split's moments are not known.
        by_selection: the same for each way to choose the first, ``cnm.metrics.SELECTIONS``, "nll" being ``scores``.
    """

    centers: metrics.Array
    widths: metrics.Array
    confidences: metrics.Array
    scores: dict[str, float]
    by_selection: dict[str, dict[str, float]]

    @property
    def center(self) -> metrics.Array:
        """[N], of the best moments."""
        return self.centers[:, 0]

    @property
    def width(self) -> metrics.Array:
        """[N], of the best moments."""
        return self.widths[:, 0]


def evaluate(
    model: Model,
    split: Split,
    batch_size: int,
    *,
    check: Callable[[], None] | None = None,
    group: Group | None = None,
    scoring: Scoring | None = None,
) -> Evaluation:
    """Localizes every sentence of ``split`` and scores the moments. The model is put back in the mode it was in.

    Args:
        check: called after each batch; what it raises ends the evaluation.
        scoring: how models that score their proposals do it.
        group: processes that share the split, each a stretch of it; all of them get the whole result.

    Raises:
        InputError: the split's features or word vectors do not have the model's sizes.
    """
    check_fits(model, split)
    device = model.word_head.weight.device
    parts: list[Proposals] = []
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
            parts.append(model.proposals(batch, video=encoded.select(place), scoring=scoring))
            if check is not None:
                check()
    finally:
        model.train(training)
    empty = torch.empty(0, model.num_proposals, device=device)
    arrays: list[metrics.Array] = [
        torch.cat([empty, *(getattr(part, name) for part in parts)]).double().cpu().numpy()
        for name in ("center", "width", "score")
    ]
    if group is not None:
        arrays = [np.concatenate(stretches) for stretches in zip(*group.gather(tuple(arrays)), strict=True)]
    finite = np.isfinite(arrays).all(axis=(0, 2))
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(
            f"{split.name} split: the model's answer to sentence {row} is not a number; its checkpoint, or features of "
            f"video {split.samples[row].video!r}, hold numbers too large"
        )
    if scoring is not None and scoring.select is not None:
        arrays[1] = metrics.width_above(scoring.select, arrays[1], model.alpha, model.min_width)
    moments = metrics.moments_from_gaussian(arrays[0], arrays[1])
    by_selection = metrics.by_selection(moments, split.windows) if split.scored else {}
    return Evaluation(arrays[0], arrays[1], arrays[2], by_selection.get("nll", {}), by_selection)


@dataclass(frozen=True)
class Spread:
    """Scores over several draws of masked words, keyed as ``Evaluation.by_selection``.

    Attributes:
        mean: over the draws.
        deviation: their standard deviation, 0 of a single one.
        first: the first draw's evaluation.
    """

    first: Evaluation
    mean: dict[str, dict[str, float]]
    deviation: dict[str, dict[str, float]]


def evaluate_seeds(model: Model, split: Split, batch_size: int, seeds: int, scoring: Scoring | None = None) -> Spread:
    """``evaluate`` with the draws of seeds 0 to ``seeds`` - 1, otherwise as ``scoring`` says.

    What is drawn as published depends on PyTorch's generator too, which is seeded with each of them.
    """
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found.append(evaluate(model, split, batch_size, scoring=replace(scoring or Scoring(), seed=seed)))
    mean, deviation = (
        {
            selection: {name: float(reduce([one.by_selection[selection][name] for one in found])) for name in names}
            for selection, names in found[0].by_selection.items()
        }
        for reduce in (np.mean, partial(np.std, ddof=min(seeds - 1, 1)))
    )
    return Spread(found[0], mean, deviation)


def check_fits(model: Model, split: Split) -> None:
    """Raises ``InputError`` where a split cannot be fed to a model: sizes differ, or there is nothing in it."""
    if len(split) == 0:
        raise InputError(f"{split.name} split: no sentence left to use; check the annotation file")
    config = model.config.dataset
    batch = split.batch(np.arange(1))
    for name, found, expected in (
        ("frame_dim", batch.frames.size(-1), config.frame_dim),
        ("word_dim", batch.words.size(-1), config.word_dim),
        ("max_num_frames", batch.frames.size(1), config.max_num_frames),
        ("max_num_words", split.max_num_words, config.max_num_words),
    ):
        if found != expected:
            raise InputError(
                f"dataset.{name} is {found}, but the model was made for {expected}; use the configuration it was "
                f"trained with"
            )
    check_vocabulary(model, split.vocabulary)


def check_vocabulary(model: Model, vocabulary: Vocabulary, stored: Vocabulary | None = None) -> None:
    """Raises ``InputError`` where a vocabulary is not the one a model learnt, words and vectors.

    Args:
        stored: the vocabulary in the model's checkpoint, if it has one.
    """
    words, expected = vocabulary.words, model.word_head.out_features
    if len(words) != expected:
        raise InputError(
            f"vocabulary of {len(words)} words (padding included) does not fit the model, which has {expected}; check "
            f"dataset.vocab_path and dataset.vocab_size"
        )
    if stored is None:
        return
    if stored.words != words:
        pairs = enumerate(zip(words, stored.words, strict=True))
        index = next(index for index, (ours, theirs) in pairs if ours != theirs)
        raise InputError(
            f"vocabulary does not fit the checkpoint: word {index} is {words[index]!r}, but the model learnt it as "
            f"{stored.words[index]!r}; check dataset.vocab_path"
        )
    if stored.vectors.shape != vocabulary.vectors.shape:
        raise InputError(
            f"vocabulary does not fit the checkpoint: its vectors are {vocabulary.vectors.shape[1]} wide, those the "
            f"model learnt {stored.vectors.shape[1]}; check dataset.vocab_path and dataset.word_dim"
        )
    others = np.flatnonzero((stored.vectors != vocabulary.vectors).any(1))
    if len(others):
        raise InputError(
            f"vocabulary does not fit the checkpoint: {len(others):,} of its words, {words[others[0]]!r} the first, "
            f"have other vectors than the model learnt; check dataset.vocab_path (of generated data: dataset.seed)"
        )
