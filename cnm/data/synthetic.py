"""The embedded dataset: generated videos with planted moments, and sentences made by a small grammar.

Every video holds several events at different times. An event has a sentence; while it lasts, each frame carries the
scaled sum of fixed random vectors of the sentence's content words. The other events of the video are its distractors,
and all frames have noise. The scene drifts slowly during each video, as light and camera do: CNM gives frames no
positions, so without a drift the model could not tell early from late. Nothing is downloaded; the seed determines
everything.
"""

from __future__ import annotations

import numpy as np

from cnm.config import DatasetConfig
from cnm.data.annotations import Sample
from cnm.data.vocabulary import PADDING, Vocabulary
from cnm.errors import InputError

ADJECTIVES = "young old tall short happy tired".split()
SUBJECTS = "man woman boy girl chef dancer".split()
VERBS = "opens closes washes lifts carries throws paints cleans".split()
OBJECTS = "door window box plate cup chair lamp guitar bicycle book".split()
ADVERBS = "slowly quickly carefully again".split()
FUNCTION_WORDS = ["the", "a"]

SIGNAL = 3.0  # strength of an event in its frames, per feature; the noise has strength 1
DRIFT = 1.0  # strength of each wave of the drift, per feature
DRIFT_WAVES = 3  # the drift's cosines have 1, 2 and 3 half periods in a video
EVENTS = (2, 3)  # per video, minimum and maximum
GAP = 0.05  # minimum between events, fraction of the video
MIN_LENGTH, MAX_LENGTH = 0.15, 0.4  # length of an event, fraction of the video
SECONDS = (20.0, 60.0)  # duration of a video, seconds
HELD_OUT = 4  # val and test have a quarter as many videos as train


def vocabulary(config: DatasetConfig) -> Vocabulary:
    """Returns all words of the grammar with random vectors of width ``word_dim``."""
    words = [*FUNCTION_WORDS, *ADJECTIVES, *SUBJECTS, *VERBS, *OBJECTS, *ADVERBS]
    if config.vocab_size != len(words):
        raise InputError(f"dataset.vocab_size is {config.vocab_size}, but the synthetic grammar has {len(words)} words")
    vectors = np.random.default_rng([config.seed, 0]).standard_normal((len(words) + 1, config.word_dim))
    vectors[0] = 0
    return Vocabulary([PADDING, *words], vectors)


def generate(config: DatasetConfig, split: str) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """Samples, features [videos, T, frame_dim] float32, and each sample's row in them. Splits share no videos."""
    stream = ("train", "val", "test").index(split) + 2
    rng = np.random.default_rng([config.seed, stream])
    signals = _word_signals(config)
    num_videos = config.num_videos if split == "train" else max(config.num_videos // HELD_OUT, 1)
    T = config.max_num_frames
    time = (np.arange(T) + 0.5) / T
    features = rng.standard_normal((num_videos, T, config.frame_dim)).astype(np.float32) + _drift(config, time)
    samples: list[Sample] = []
    rows: list[int] = []
    for row in range(num_videos):
        duration = round(float(rng.uniform(*SECONDS)), 2)
        for start, end in _moments(rng):
            words = _sentence(rng)
            content = [signals[word] for word in words if word in signals]
            during = (time >= start) & (time < end)
            features[row, during] += SIGNAL * sum(content) / np.sqrt(len(content))
            moment = (round(start * duration, 2), min(round(end * duration, 2), duration))
            samples.append(Sample(f"{split}-{row:05d}", duration, moment, " ".join(words)))
            rows.append(row)
    return samples, features, np.array(rows)


def _word_signals(config: DatasetConfig) -> dict[str, np.ndarray]:
    words = [*ADJECTIVES, *SUBJECTS, *VERBS, *OBJECTS, *ADVERBS]
    vectors = np.random.default_rng([config.seed, 1]).standard_normal((len(words), config.frame_dim))
    return dict(zip(words, vectors.astype(np.float32), strict=True))


def _drift(config: DatasetConfig, time: np.ndarray) -> np.ndarray:
    """The drift at times [T] (fractions of the video), the same in all videos: [T, frame_dim] float32."""
    waves = np.random.default_rng([config.seed, 5]).standard_normal((DRIFT_WAVES, config.frame_dim))
    phases = np.pi * time[:, None] * np.arange(1, DRIFT_WAVES + 1)
    return (DRIFT * np.cos(phases) @ waves).astype(np.float32)


def _moments(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Draws disjoint moments: first their lengths, then how the free time is divided between them."""
    count = int(rng.integers(EVENTS[0], EVENTS[1] + 1))
    longest = min(MAX_LENGTH, (1 - (count - 1) * GAP) / count)
    lengths = rng.uniform(MIN_LENGTH, longest, count)
    free = 1 - lengths.sum() - (count - 1) * GAP
    gaps = rng.dirichlet(np.ones(count + 1)) * free
    moments, at = [], 0.0
    for gap, length in zip(gaps, lengths, strict=False):
        at += gap
        moments.append((float(at), float(at + length)))
        at += length + GAP
    return moments


def _sentence(rng: np.random.Generator) -> list[str]:
    adjective, subject, verb, thing, adverb = (
        str(rng.choice(words)) for words in (ADJECTIVES, SUBJECTS, VERBS, OBJECTS, ADVERBS)
    )
    sentence = ["the", adjective, subject, verb, "a", thing]
    return [*sentence, adverb] if rng.random() < 0.5 else sentence
