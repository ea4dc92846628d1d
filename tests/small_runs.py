"""Experiments small enough for tests: the synthetic one, and files in the published formats."""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cnm import configs
from cnm.config import Config
from cnm.data import Vocabulary, plant

SMALL = {
    "dataset.num_videos": 12,
    "dataset.max_num_frames": 16,
    "dataset.frame_dim": 12,
    "dataset.word_dim": 10,
    "train.batch_size": 8,
    "train.max_num_epochs": 2,
    "train.generator.warmup_updates": 4,
    "train.reconstructor.warmup_updates": 4,
    "model.config.hidden_size": 16,
    "model.config.DualTransformer.d_model": 16,
    "model.config.DualTransformer.num_heads": 2,
    "model.config.DualTransformer.num_decoder_layers1": 1,
    "model.config.DualTransformer.num_decoder_layers2": 1,
    "model.config.dropout": 0.1,
    "model.config.DualTransformer.dropout": 0.1,
}
SENTENCES = ("a person opens the door", "the man closes a window", "a woman reads the book", "the dog runs quickly")


def assignments(changes: dict[str, Any]) -> list[str]:
    """The changes as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def synthetic_config(**changes: Any) -> Any:
    """The synthetic experiment at a size of seconds; ``__`` in a name stands for a dot."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.resolve("synthetic", assignments(SMALL | named))


def cpl_config(**changes: Any) -> Config:
    """The same with CPL: three proposals."""
    content = synthetic_config(**changes).to_dict()
    return Config.from_json(content | with_cpl(content))


def with_cpl(content: dict[str, Any]) -> dict[str, Any]:
    """The sections of a small experiment that make it CPL's."""
    train, model = dict(content["train"]), content["model"]["config"]
    train["optimizer"] = train.pop("reconstructor")
    del train["generator"]
    network = {name: value for name, value in model.items() if name not in ("alpha", "max_width")}
    return {
        "train": train,
        "model": {"name": "CPL", "config": network | {"num_props": 3, "sigma": 9.0, "gamma": 0.5}},
        "loss": {"lambda": 0.146, "alpha_1": 1.0, "alpha_2": 5.0},
    }


def write_files(folder: Path, videos: int = 10) -> Path:
    """Annotations, word vectors, planted features and a configuration over them, as published. Returns the latter."""
    rng = np.random.default_rng(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    with open(folder / "glove.pkl", "wb") as file:
        vectors = rng.standard_normal((len(words), 10)).astype(np.float32)
        w2id = {word: index for index, word in enumerate(words)}
        pickle.dump({"w2id": w2id, "id2vec": vectors, "counter": collections.Counter(words)}, file)
    for name in ("train", "val", "test"):
        rows = []
        for video in range(videos):
            start = round(float(rng.uniform(0, 15)), 1)
            rows.append([f"{name}{video}", 20.0, [start, start + 5], SENTENCES[video % len(SENTENCES)] + "."])
        (folder / f"{name}.json").write_text(json.dumps(rows))
    vocabulary = Vocabulary.from_pickle(folder / "glove.pkl", len(words), 10)
    annotations = [folder / f"{name}.json" for name in ("train", "val", "test")]
    plant(annotations, vocabulary, folder / "features.hdf5", frame_dim=12)
    content = synthetic_config().to_dict()
    content["dataset"] = {
        "dataset": "CharadesSTA",
        "feature_path": str(folder / "features.hdf5"),
        "vocab_path": str(folder / "glove.pkl"),
        "train_data": str(folder / "train.json"),
        "val_data": str(folder / "val.json"),
        "test_data": str(folder / "test.json"),
        "vocab_size": len(words),
        "word_dim": 10,
        "frame_dim": 12,
        "max_num_words": 20,
        "max_num_frames": 16,
        "cache_path": str(folder / "cache"),
    }
    del content["model"]["config"]["vocab_size"]
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path
