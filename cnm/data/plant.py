"""Planted features: artificial features of annotated videos, whose moments carry a signal of the sentence's words.

With them a model trains on real annotations without the real features, and shows whether it learns to localize.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from cnm.config import MAX_WIDTH
from cnm.data.annotations import Sample, read_annotations
from cnm.data.tagging import tag
from cnm.data.vocabulary import Vocabulary
from cnm.errors import InputError
from cnm.files import shortened

MIN_FRAMES, MAX_FRAMES = 16, 1024
MAX_SIGNAL = 1e6  # features are float32, and a moment of many sentences holds several signals
DISTRACTORS = 2  # number per video; sentences of other videos, planted outside the annotated moments


def plant(
    annotations: Sequence[str | Path],
    vocabulary: Vocabulary,
    output: str | Path,
    *,
    frame_dim: int,
    frames_per_second: float = 2.0,
    signal: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Writes an HDF5 file with planted features of every video in the annotation files.

    Each content word has a fixed random vector. The frames of a moment carry the sum of its sentence's vectors, scaled
    to ``signal`` per feature; some other frames carry other videos' sentences; all frames have noise of strength 1.
    Every video's features depend on its name, its sentences, the vocabulary and the seed, and its distractors on all
    sentences of the files. A file that is named twice counts once.

    Args:
        annotations: files for ``read_annotations``; a video may be in several.
        vocabulary: its words carry signals.
        output: HDF5 file, first written under a temporary name; replaces an existing file.
        frame_dim: width of the features.
        frames_per_second: frames per second of video (16 to 1,024 per video).
        signal: 0 to ``MAX_SIGNAL``.

    Returns:
        The number of videos written.

    Raises:
        InputError: an annotation file is wrong or lacks a moment, a number is out of its range, or the output cannot be
            written.
    """
    if not 0 <= signal <= MAX_SIGNAL:
        raise InputError(f"signal: must be from 0 to {MAX_SIGNAL:g}, got {signal:g}")
    if not 0 < frames_per_second <= MAX_FRAMES:
        raise InputError(f"frames_per_second: must be above 0 and at most {MAX_FRAMES}, got {frames_per_second:g}")
    if not 1 <= frame_dim <= MAX_WIDTH:
        raise InputError(f"frame_dim: must be from 1 to {MAX_WIDTH}, got {frame_dim}")
    samples: dict[str, list[Sample]] = {}
    for path in {os.path.realpath(path): path for path in annotations}.values():  # val and test may be one file
        for sample in read_annotations(path)[0]:
            if sample.moment is None:
                raise InputError(f"{path}: {shortened(sample.sentence)} has no moment to plant it in; give it one")
            samples.setdefault(sample.video, []).append(sample)
    _check_names(samples)
    everything = [sample for of_video in samples.values() for sample in of_video]
    vectors = np.random.default_rng([seed, 0]).standard_normal((len(vocabulary), frame_dim)).astype(np.float32)
    output = Path(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            bar = tqdm(samples.items(), desc="planting features", unit="video", disable=None if progress else True)
            for video, of_video in bar:
                rng = np.random.default_rng([seed, zlib.crc32(video.encode())])
                duration = max(sample.duration for sample in of_video)
                n = int(np.clip(round(duration * frames_per_second), MIN_FRAMES, MAX_FRAMES))
                frames = rng.standard_normal((n, frame_dim), dtype=np.float32)
                time = (np.arange(n) + 0.5) / n * duration
                free = np.ones(n, dtype=bool)
                for sample in of_video:
                    for moment in sample.windows:
                        during = (time >= moment[0]) & (time < moment[1])
                        frames[during] += signal * _signal(sample.sentence, vocabulary, vectors)
                        free &= ~during
                for index in rng.integers(len(everything), size=DISTRACTORS):
                    start = rng.uniform(0, 0.75) * duration
                    during = (time >= start) & (time < start + duration / 4) & free
                    frames[during] += signal * _signal(everything[index].sentence, vocabulary, vectors)
                file.create_dataset(video, data=frames)
        os.replace(temporary, output)
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror or error}); make room or name another"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return len(samples)


def _check_names(videos: Iterable[str]) -> None:
    """Refuses names that collide: HDF5 makes "a" a group if there is "a/b", so "a" cannot be a video too."""
    known = set(videos)
    for video in known:
        parts = video.split("/")
        group = next((name for end in range(1, len(parts)) if (name := "/".join(parts[:end])) in known), None)
        if group is not None:
            raise InputError(f"videos {group!r} and {video!r}: one HDF5 file cannot hold both names; rename one")


def _signal(sentence: str, vocabulary: Vocabulary, vectors: np.ndarray) -> np.ndarray:
    """Sums the content words' vectors, scaled to variance 1 per feature; zero without content words. [frame_dim]"""
    words = {word for word, is_content in tag(sentence) if is_content}
    ids = sorted(index for word in words if (index := vocabulary.id(word)) is not None)
    return vectors[ids].sum(0) / np.sqrt(max(len(ids), 1))
