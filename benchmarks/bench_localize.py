"""Many sentences in one video: encoded once, against encoding it again for each, and against the published code.

Sentences come as text and moments go as seconds, so that tokenizing and reading results count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.bench_step import ALLOWED, CHARADES, TINY, Experiment, _ours, _published
from benchmarks.registry import OURS, Case, Contender, Goal, Refused, Table
from cnm import Localizer
from cnm.data import Vocabulary
from cnm.data.vocabulary import PADDING
from cnm.metrics import moments_from_gaussian

AGAIN, PUBLISHED, BATCHED = "encoding again each time", "published", "published, in batches"
DURATION = 30.0  # seconds
PUBLISHED_BATCH = 128  # sentences, as its evaluation takes them
ONE_BY_ONE = 100  # sentences at most for those who take them singly: more would take minutes and teach nothing

Moments = np.ndarray  # [N, 2], seconds
Finder = Callable[[Sequence[str]], Moments]


def vocabulary_of(experiment: Experiment) -> Vocabulary:
    vectors = np.random.default_rng(0).standard_normal((experiment.V, experiment.word_dim)).astype(np.float32)
    return Vocabulary([PADDING, *(f"word{index}" for index in range(1, experiment.V))], vectors)


def sentences_of(experiment: Experiment, count: int) -> list[str]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(max(experiment.L // 2, 1), experiment.L + 1, count)
    return [" ".join(f"word{index}" for index in rng.integers(1, experiment.V, length)) for length in lengths]


@cache
def features_of(experiment: Experiment) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((experiment.T, experiment.frame_dim)).astype(np.float32)


def localizer_of(experiment: Experiment, dtype: str) -> Localizer:
    return Localizer(_ours(experiment, dtype, False), vocabulary_of(experiment))


def ours(experiment: Experiment, dtype: str) -> Finder:
    localizer = localizer_of(experiment, dtype)
    video = localizer.encode(features_of(experiment), duration=DURATION)
    return lambda sentences: np.array([(found.start, found.end) for found in localizer.find(video, sentences)])


def again(experiment: Experiment, dtype: str) -> Finder:
    localizer = localizer_of(experiment, dtype)

    def find(sentences: Sequence[str]) -> Moments:
        moments = []
        for sentence in sentences:
            video = localizer.encode(features_of(experiment), duration=DURATION)
            [found] = localizer.find(video, [sentence])
            moments.append((found.start, found.end))
        return np.array(moments)

    return find


def published(experiment: Experiment, batch: int) -> Finder:
    model, vocabulary = _published(experiment, False), vocabulary_of(experiment)
    frames = torch.from_numpy(features_of(experiment))[None]

    def find(sentences: Sequence[str]) -> Moments:
        moments = []
        for start in range(0, len(sentences), batch):
            ids = [vocabulary.encode(sentence, experiment.L).ids for sentence in sentences[start : start + batch]]
            lengths = torch.tensor([len(row) for row in ids])
            words = torch.zeros(len(ids), int(lengths.max()) + 1, experiment.word_dim)
            for row, places in enumerate(ids):
                words[row, 1 : len(places) + 1] = torch.from_numpy(vocabulary.vectors[places])
            with torch.no_grad():
                found = model.localize(
                    frames.expand(len(ids), -1, -1), torch.full((len(ids),), experiment.T), words, lengths
                )
            center, width = (x.double().numpy() for x in found)
            moments.append(moments_from_gaussian(center, width) * DURATION)
        return np.concatenate(moments)

    return find


def case_of(experiment: Experiment, count: int, dtype: str) -> Case:
    makers: dict[str, Callable[[], Finder]] = {OURS: lambda: ours(experiment, dtype)}
    if count <= ONE_BY_ONE:
        makers |= {AGAIN: lambda: again(experiment, dtype), PUBLISHED: lambda: published(experiment, 1)}
    if count > 1:
        makers[BATCHED] = lambda: published(experiment, PUBLISHED_BATCH)
    sentences = sentences_of(experiment, count)

    def prepare(name: str) -> Callable[[], Any]:
        find = makers[name]()
        return lambda: find(sentences)

    def verify(name: str, call: Callable[[], Any]) -> dict[str, float]:
        checked = sentences[:ONE_BY_ONE]
        wanted = published(experiment, PUBLISHED_BATCH)(checked)
        error = float(np.abs(makers[name]()(checked) - wanted).max()) / DURATION
        allowed = ALLOWED["float32" if name in (PUBLISHED, BATCHED) else dtype]
        if not error <= allowed:
            raise Refused(f"its moments are off by {error:.2g} of the video, {allowed:.2g} allowed")
        return {"moments": error}

    what = "one sentence" if count == 1 else f"{count:,} sentences"
    goals = {1: (Goal("time", PUBLISHED, 10),), ONE_BY_ONE: (Goal("time", AGAIN, 10),)}
    return Case(
        f"{what} in a video of {experiment.T} clips",
        dtype,
        {name: Contender(make) for name, make in makers.items()},
        prepare,
        verify,
        goals.get(count, ()),
    )


def cases(quick: bool) -> Sequence[Case]:
    experiment = TINY[CHARADES] if quick else CHARADES
    counts = (1, ONE_BY_ONE, 150) if quick else (1, ONE_BY_ONE, 10_000)
    return [case_of(experiment, count, dtype) for count in counts for dtype in ("float32", "bfloat16")]


TABLE = Table("localize", "Sentences in one video, from text to seconds", cases, repeats=5)


def test_localize(benchmark: Any, call: Any) -> None:
    benchmark(call)
