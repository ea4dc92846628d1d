"""Typed damage: valid files in which one value became another that is well written and wrong."""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnm import checkpoint, configs
from cnm.data.annotations import read_annotations
from cnm.data.vocabulary import Vocabulary
from cnm.training.run_folder import RunFolder

ODD = [
    None,
    True,
    -1,
    0,
    2,
    0.25,
    1.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "1",
    "a\0b",
    "\udc80",
    "../a",
    "a//b",
    [],
    {},
    [[]],
]
ODD += [10**400, 10**5000, 2**63, "x" * 5000]


def odd_value(draw: random.Random) -> Any:
    if draw.randrange(20) == 0:
        deep: Any = 1
        for _ in range(200):
            deep = [deep]
        return deep
    return draw.choice(ODD)


def changed(value: Any, draw: random.Random, also: tuple[Any, ...] = ()) -> Any:
    """The same content with one value somewhere inside replaced, removed or doubled."""
    value = copy.deepcopy(value)
    at: Any = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and draw.randrange(4):
            at = inner
            continue
        kind = draw.randrange(8)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[draw.choice(["more", "\udc80", ""])] = inner
        else:
            at[key] = draw.choice(also) if also and draw.randrange(2) else odd_value(draw)
        return value


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # Python writes no number of more than 4,300 digits
        return b"1" * 5000


ROWS = [[f"v{i}", 30.0 + i, [1.0, 5.5], "person opens the door"] for i in range(3)]
BY_VIDEO = {
    "v0": {"duration": 30.0, "timestamps": [[1.0, 5.5], [2, 31]], "sentences": ["person opens", "the door"]},
    "v1": {"fps": 29.4, "num_frames": 900, "timestamps": [[30, 60]], "sentences": ["a person"]},
}
METRICS = {"kind": "train", "epoch": 1, "update": 20, "nll/positive": 1.0}
CONFIG = configs.resolve(
    "synthetic", ["model.config.hidden_size=8", "model.config.DualTransformer.d_model=8"]
).to_dict()
TENSORS = (torch.ones(2), torch.tensor([float("nan")]), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.int64))


def words() -> dict[str, Any]:
    counts = collections.Counter({"a": 2, "b": 1})
    return {"w2id": {"a": 0, "b": 1}, "id2vec": [[1.0] * 8, [2.0] * 8], "counter": counts}


def model() -> dict[str, Any]:
    parameters = {"w": torch.ones(2)}
    vocabulary = {"words": ["<pad>", "a"], "vectors": torch.ones(2, 8)}
    return {"num_updates": 1, "config": CONFIG, "model_parameters": parameters, "vocabulary": vocabulary}


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_metrics(path: Path) -> Any:
    run = RunFolder(path.parent)
    run.metrics = path
    return run.rows()


Typed = tuple[Callable[[random.Random], bytes], str, Callable[[Path], Any]]
TYPED: dict[str, Typed] = {
    "annotation values": (lambda draw: as_json(changed(ROWS, draw)), ".json", read_annotations),
    "values by video": (lambda draw: as_json(changed(BY_VIDEO, draw)), ".json", read_annotations),
    "configuration values": (lambda draw: as_json(changed(CONFIG, draw)), ".json", configs.resolve),
    "metrics values": (lambda draw: as_json(changed([METRICS], draw)[0:1]).strip(b"[]"), ".jsonl", read_metrics),
    "vocabulary values": (
        lambda draw: pickle.dumps(changed(words(), draw, (np.int64(1), np.ones(8)))),
        ".pkl",
        lambda path: Vocabulary.from_pickle(path, 4, 8),
    ),
    "checkpoint values": (lambda draw: saved(changed(model(), draw, TENSORS)), ".pt", checkpoint.load),
}
