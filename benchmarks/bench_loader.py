"""The data pipeline: one epoch of batches, from the second epoch on.

The published Dataset opens the HDF5 file, averages the video to clips in a loop, tokenizes and tags the sentence and
looks its words up, for every sample of every epoch; a collate function then pads the batch. Ours did that once.
"""

from __future__ import annotations

import atexit
import json
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.registry import OURS, Case, Contender, Goal, Refused, Table
from cnm.config import CNMConfig
from cnm.data import BatchLoader, load_vocabulary, open_split
from cnm.data.tagging import tag

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
WORDS = "a person the man woman dog opens closes takes puts door window book cup table then and quickly red".split()
WORD_DIM = 300
BATCH = 128
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # error, of a number or of 1 where that is smaller


@cache
def files(videos: int, sentences: int, frames: int, frame_dim: int) -> Path:
    """A folder with features, annotations and word vectors in the published formats, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="cnm-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    with h5py.File(folder / "features.hdf5", "w") as file:
        for video in range(videos):
            length = int(rng.integers(frames // 2, frames + frames // 2))
            file[f"v{video}"] = rng.standard_normal((length, frame_dim), dtype=np.float32)
    vectors = rng.standard_normal((len(WORDS), WORD_DIM)).astype(np.float32)
    with open(folder / "glove.pkl", "wb") as stream:
        w2id = {word: index for index, word in enumerate(WORDS)}
        pickle.dump({"w2id": w2id, "id2vec": vectors, "counter": Counter(WORDS)}, stream)
    rows = [
        [f"v{index % videos}", 30.0, [2.0, 9.0], " ".join(rng.choice(WORDS, int(rng.integers(5, 12)))) + "."]
        for index in range(sentences)
    ]
    for name in ("train", "test"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def config_of(folder: Path, clips: int, frame_dim: int) -> CNMConfig:
    from benchmarks.bench_step import CHARADES

    content = CHARADES.config().to_dict()
    content["dataset"] = {
        "dataset": "CharadesSTA",
        "feature_path": str(folder / "features.hdf5"),
        "vocab_path": str(folder / "glove.pkl"),
        "train_data": str(folder / "train.json"),
        "test_data": str(folder / "test.json"),
        "vocab_size": len(WORDS),
        "word_dim": WORD_DIM,
        "frame_dim": frame_dim,
        "max_num_words": 20,
        "max_num_frames": clips,
        "cache_path": str(folder / "cache"),
    }
    for derived in ("vocab_size", "frames_input_size", "words_input_size", "max_num_words"):
        content["model"]["config"].pop(derived, None)
    return CNMConfig.from_json(content)


class PublishedDataset(Dataset[dict[str, Any]]):
    """Everything anew for every sample."""

    def __init__(self, config: CNMConfig) -> None:
        self.config = config.dataset
        self.rows = json.loads(Path(str(self.config.train_data)).read_text())
        vocabulary = load_vocabulary(config.dataset)
        self.vectors = vocabulary.vectors
        self.ids = {word: index for index, word in enumerate(vocabulary.words)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        video, _, _, sentence = self.rows[index]
        words = [(self.ids[word], content) for word, content in tag(sentence) if word in self.ids]
        words = words[: self.config.max_num_words]
        with h5py.File(self.config.feature_path, "r") as file:
            features = np.asarray(file[video]).astype(np.float32)
        return {
            "frames": self.average(features, self.config.max_num_frames),
            "ids": np.array([word for word, _ in words]),
            "words": np.stack([self.vectors[word] for word, _ in words]),
            "weights": np.array([2.0 if content else 1.0 for _, content in words]),
        }

    @staticmethod
    def average(features: np.ndarray, clips: int) -> np.ndarray:
        edges = np.round(np.arange(clips + 1) / clips * len(features)).astype(int)
        rows = []
        for start, end in pairwise(np.minimum(edges, len(features) - 1)):
            row = features[start:end].mean(axis=0) if start < end else features[start]
            rows.append(row)
        return np.stack(rows)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    L = max(len(sample["ids"]) for sample in samples)
    ids = np.zeros((len(samples), L), dtype=np.int64)
    words = np.zeros((len(samples), L + 1, WORD_DIM), dtype=np.float32)
    weights = np.zeros((len(samples), L), dtype=np.float32)
    for row, sample in enumerate(samples):
        n = len(sample["ids"])
        ids[row, :n], words[row, 1 : n + 1] = sample["ids"], sample["words"]
        exponentials = np.exp(sample["weights"])
        weights[row, :n] = exponentials / exponentials.sum()
    frames = np.stack([sample["frames"] for sample in samples])
    return {name: torch.from_numpy(array) for name, array in locals().items() if name in ("frames", "ids", "words")}


def case_of(videos: int, sentences: int, frames: int, frame_dim: int, clips: int, dtype: torch.dtype) -> Case:
    """``dtype`` of our frames; the published Dataset knows float32 alone."""

    def prepared() -> CNMConfig:
        return config_of(files(videos, sentences, frames, frame_dim), clips, frame_dim)

    def ours() -> Callable[[], Batches]:
        loader = BatchLoader(open_split(prepared().dataset, "train", dtype=dtype), BATCH, shuffle=False)
        return lambda: ((batch.frames, batch.word_ids, batch.words) for _, batch in loader.epoch(1))

    def published(workers: int) -> Callable[[], Callable[[], Batches]]:
        def make() -> Callable[[], Batches]:
            loader = DataLoader(
                PublishedDataset(prepared()),
                BATCH,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=workers > 0,  # a fork each epoch would make every page of ours costly to write
            )
            return lambda: ((batch["frames"], batch["ids"], batch["words"]) for batch in loader)

        return make

    def prepare(name: str) -> Callable[[], None]:
        """Each batch is dropped when the next one comes, as in training."""
        batches = contenders[name].function()

        def call() -> None:
            for _ in batches():
                pass

        return call

    contenders = {
        OURS: Contender(ours),
        "published": Contender(published(0)),
        "published, 2 workers": Contender(published(2)),
    }

    def verify(name: str, call: Callable[[], Any]) -> dict[str, float]:
        error = 0.0
        for got, want in zip(contenders[name].function()(), contenders["published"].function()(), strict=True):
            for g, w in zip(got, want, strict=True):
                difference = (g.double() - w.double()).abs() / w.double().abs().clamp_min(1)
                error = max(error, float(difference.max()) if g.shape == w.shape else float("inf"))
        if not error <= ALLOWED[dtype]:
            raise Refused(f"its batches differ by {error:.2g}")
        return {"batches": error}

    name = f"epoch of {sentences} sentences, {frames} frames of {frame_dim} to {clips} clips"
    return Case(
        name,
        str(dtype).removeprefix("torch."),
        contenders,
        prepare,
        verify,
        (Goal("time", "published", 50),),
    )


def cases(quick: bool) -> Sequence[Case]:
    sizes = (4, 24, 30, 8, 16) if quick else (48, 512, 600, 1024, 200)
    return [case_of(*sizes, dtype) for dtype in ALLOWED]


TABLE = Table("loader", "Batches of an epoch", cases, repeats=5)


def test_loader(benchmark: Any, call: Any) -> None:
    benchmark(call)
