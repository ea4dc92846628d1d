"""Damage to what lies beside a model: options, HDF5 layouts, the cache, runs, manifests, vocabularies, predictions."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
import torch
from fuzz_typed import Typed, as_json, changed, odd_value, saved

from cnm import checkpoint, configs
from cnm.config import CNMConfig
from cnm.config_fields import every_field
from cnm.data import cache, vocabulary_files
from cnm.data.annotations import Sample, read_annotations
from cnm.data.expected import agreed
from cnm.data.feature_sources import open_features
from cnm.data.manifest import Survey, differences, read_manifest
from cnm.data.origin import Origin, read_record, recorded_duration
from cnm.errors import InputError
from cnm.predictions import read_predictions, score
from cnm.training.trainer import Trainer

SMALL = [
    "dataset.num_videos=4",
    "dataset.max_num_frames=4",
    "dataset.frame_dim=2",
    "dataset.word_dim=2",
    "model.config.hidden_size=4",
    "model.config.DualTransformer.d_model=4",
    "model.config.DualTransformer.num_heads=1",
    "model.config.DualTransformer.num_decoder_layers1=1",
    "model.config.DualTransformer.num_decoder_layers2=1",
]
FIELDS = [field.name for field in every_field(CNMConfig)]
TEXTS = ["", ".", "..", "a", "é", "\0", "\udc80", "a" * 300, "=", "[", "{}", "1e999", "NaN", "1" * 5000, "[" * 3000]


def named(path: Path, read: Callable[[], Any]) -> Any:
    """Adds the file's name to an error that names only what lies within it."""
    try:
        return read()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# --set


def set_text(draw: random.Random) -> bytes:
    key = draw.choice(FIELDS)
    if draw.randrange(4) == 0:
        parts = key.split(".")
        parts[draw.randrange(len(parts))] = draw.choice(TEXTS)
        key = ".".join(parts)
    kind = draw.randrange(4)
    if kind == 0:
        value = draw.choice(TEXTS)
    elif kind == 1:
        value = as_json(odd_value(draw)).decode()
    else:
        value = draw.choice(["1", "2", "0.5", "64", '"text"'])
    return f"{key}{draw.choice(['=', '=', '=', '=', '', '=='])}{value}".encode("utf-8", "surrogateescape")


def read_set(path: Path) -> Any:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    try:
        return configs.resolve("synthetic", [text])
    except InputError as error:
        if "--set" not in str(error):
            raise RuntimeError(f"does not name the option: {error}") from None
        raise InputError(f"{path}: {error}") from None


# HDF5

VIDEOS = ["v0", "a/b", "a", "é", "x" * 300, ".", "a\0b", "a//b", "c3d_features", "{video}"]
PATTERNS = ["{video}", "{video}/c3d_features", "clips/{video}/rgb", "/{video}", "{video}{video}", "../{video}", "."]


def layout_bytes(draw: random.Random) -> bytes:
    """A well-formed HDF5 file whose datasets, groups, links and types are not always what features are."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["pattern"] = draw.choice(PATTERNS) if draw.randrange(2) else PATTERNS[0]
        for _ in range(draw.choice((1, 1, 2, 4))):
            name = file.attrs["pattern"].replace("{video}", VIDEOS[0] if draw.randrange(4) else draw.choice(VIDEOS))
            try:
                _put(file, name, draw)
            except (ValueError, OSError, TypeError, RuntimeError, KeyError):  # h5py writes no such thing
                continue
    return buffer.getvalue()


def _put(file: h5py.File, name: str, draw: random.Random) -> None:
    kind = draw.randrange(22)
    frames = np.ones((draw.choice((1, 5)), 2), np.float32)
    if kind == 0:
        file.create_group(name)["c3d_features"] = frames
    elif kind == 1:
        file.create_group(name).create_group("c3d_features")
    elif kind == 2:
        file[name] = h5py.SoftLink(draw.choice(["/nowhere", f"/{name}", "/"]))
    elif kind == 3:
        file[name] = h5py.ExternalLink(draw.choice(["nowhere.hdf5", "case.hdf5", ""]), draw.choice(["/", f"/{name}"]))
    elif kind == 4:
        file[name] = draw.choice(["text", b"bytes", 3, 1.5, True])
    elif kind == 5:
        file[name] = np.array(["a", "b"], dtype=h5py.string_dtype())
    elif kind == 6:
        file[name] = np.zeros((2, 2), np.dtype([("a", "f4"), ("b", "i4")]))
    elif kind == 7:
        file[name] = frames.astype(draw.choice(["c8", "?", "f2", "f8", "i1", "u8", ">f4", "S3"]))
    elif kind == 8:
        file[name] = frames.reshape(draw.choice([(-1,), (1, -1, 2), (-1, 1)]))
    elif kind == 9:
        file.create_dataset(
            name, shape=draw.choice([(0, 2), (2, 0), (1 << 40, 2), (3, 1 << 40)]), dtype="f4", chunks=(1, 1)
        )
    elif kind == 10:
        file[name] = h5py.Empty("f4")
    elif kind == 11:
        file[name] = frames * draw.choice([float("nan"), float("inf"), 1e38])
    elif kind == 12:
        file.create_dataset(name, data=frames, maxshape=(None, None), compression="gzip", fletcher32=True)
    elif kind == 13:
        file[name] = np.dtype("f4")  # a named type
    elif kind == 14:
        file.create_dataset(name, data=[[file.ref, file.ref]], dtype=h5py.ref_dtype)
    else:
        file[name] = frames


def read_layout(path: Path) -> None:
    pattern = PATTERNS[0]
    with suppress(OSError), h5py.File(path) as file:  # h5py itself may have left it unfinished: the reader must say so
        pattern = str(file.attrs["pattern"])
    with open_features(str(path), None if pattern == PATTERNS[0] else pattern) as source:
        source.check(VIDEOS[:1], None)
        source.shape(VIDEOS[0])
        source.frames(VIDEOS[0], 2)
        for video in VIDEOS[1:]:
            with suppress(InputError):
                source.frames(video, None)


# The cache


def index_text(draw: random.Random) -> bytes:
    sizes = {"a": 1, "made_from.json": 13}
    return json.dumps(sizes).encode() if draw.randrange(3) == 0 else as_json(changed({"more": sizes} | sizes, draw))


def read_index(path: Path) -> None:
    """Never an error: what is damaged is built again, which is called refused here."""
    folder = path.with_name("case.cache")
    built = []

    def build(into: Path) -> None:
        built.append(into)
        (into / "a").write_text("a")

    target = cache.build_once(folder, {}, build)
    built.clear()
    whole = (target / cache.SIZES).read_bytes()
    content = path.read_bytes()
    (target / cache.SIZES).write_bytes(whole if b"13" in content and b"more" not in content else content)
    cache.build_once(folder, {}, build)
    if (target / cache.SIZES).read_bytes() != whole:
        raise RuntimeError("the index was not mended")
    if built:
        raise InputError(f"{path}: was built again")


# The training section of a checkpoint


@functools.cache
def a_run(_: int) -> tuple[Trainer, dict[str, Any]]:
    """A run about to begin, and what its checkpoint holds; one of each process."""
    trainer = Trainer(configs.resolve("synthetic", SMALL), "case.run", quiet=True)
    state = trainer._model_state()
    training: dict[str, Any] = {
        "options": trainer.options,
        "step": trainer.step.state_dict(),
        "epoch": 1,
        "batch": 0,
        "seconds": 1.5,
        "epoch_began": 0.5,
        "best": {"epoch": 1, "mIoU": 0.5},
        "rows": 2,
        "fingerprints": trainer.fingerprints,
        "metric_names": ["a", "b"],
        "pending": [torch.ones(2)],
        "random": {"torch": torch.get_rng_state()},
    }
    return trainer, state | {"training": training}


TENSORS = (torch.ones(2), torch.zeros(5, dtype=torch.uint8), torch.ones(()), torch.tensor([float("inf")]))


def training_bytes(draw: random.Random) -> bytes:
    content = a_run(os.getpid())[1]
    also = (*TENSORS, 10**9, "lean", (0.9, 0.98), ["a"], {"epoch": 3})
    damaged = changed(content["training"], draw, also) if draw.randrange(8) else content["training"]
    return saved(content | {"training": damaged})


def read_training(path: Path) -> None:
    trainer, _ = a_run(os.getpid())
    trainer.run.last = trainer.run.best = path
    trainer.run.path = path
    trainer.saved = checkpoint.load(path)
    if trainer.saved.get("training") is None:
        raise InputError(f"{path}: no run")
    trainer.origin = Origin.from_record(trainer.saved.get("features"))
    for name, known in (("precision", ["float32", "bf16"]), ("step", ["lean", "recompute", "published"])):
        trainer._choice(name, None, known[0], known)
    trainer._restore(trainer.saved)


# Manifests and records

ORIGIN: dict[str, Any] = {"encoder": "greys", "weights_sha256": "0" * 64, "stride": 3, "rate": None}
ENTRY = {"shape": [3, 2], "sha256": "0" * 64}
MANIFEST = {"format": 1, "features": ["f"], "origin": None, "extracted": ORIGIN, "videos": {"a": ENTRY, "b": ENTRY}}
RECORD = ORIGIN | {"width": 2, "broken": {}, "videos": {"v": {"duration": 3.5, "frames": 9, "clips": 3, "fps": 25.0}}}


def read_a_manifest(path: Path) -> None:
    for line in differences(path, Survey(videos={"a": ENTRY, "c": ENTRY}))[0]:
        if "\n" in line or len(line) > 400:
            raise RuntimeError(f"no line: {line}")
    read_manifest(path)
    agreed(path, Origin.from_record(ORIGIN))


def read_a_record(path: Path) -> None:
    """``case.json`` is the record of ``case``."""
    output = path.with_suffix("")
    record = read_record(output)
    if record is None:
        raise InputError(f"{path}: says nothing")
    origin = Origin.of(output)
    if origin is not None:
        named(path, lambda: origin.check(Origin.from_record(ORIGIN), "features"))
    duration = recorded_duration(str(output / "v.npy"))
    if duration is not None and not 0 < duration < float("inf"):
        raise RuntimeError(f"a duration of {duration}")


# Vocabularies

VECTORS = safetensors.numpy.save({"vectors": np.ones((2, 3), np.float32)})


def vocabulary_json(stored: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(stored).hexdigest()
    return {"words": ["a", "b"], "counts": [2, 1], "unknown": {"c": 1}, "source": "glove", "sha256": digest}


def read_words(path: Path) -> None:
    path.with_suffix(".safetensors").write_bytes(VECTORS)
    named(path, lambda: vocabulary_files.read(path))


def read_tensors(path: Path) -> None:
    """The checksum is the damaged file's: what is read behind it is tried."""
    path.with_suffix(".json").write_text(json.dumps(vocabulary_json(path.read_bytes())))
    named(path, lambda: vocabulary_files.read(path))


# Charades-STA

STA_TEXT = "".join(f"V{i} 1.0 {5 + i}.5##person opens the door.\n" for i in range(9)).encode()
STA_TABLE = ("id,subject,length\n" + "".join(f"V{i},S,3{i}.25\n" for i in range(9))).encode()


def read_charades(path: Path, text: bytes, table: bytes) -> None:
    folder = path.with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    (folder / "Charades_v1_train.csv").write_bytes(table)
    (folder / "train.txt").write_bytes(text)
    named(path, lambda: read_annotations(folder / "train.txt"))


# JSON lines

LINE = {"qid": 1, "query": "person opens", "vid": "v", "duration": 30.0, "relevant_windows": [[1, 5.5], [7, 9]]}
FOUND = {"qid": 1, "query": "text", "vid": "v", "pred_relevant_windows": [[1.0, 5.5, 0.5], [7, 9, 0.25]]}
PREDICTED = [Sample("v", 30.0, (1.0, 5.0), "text", qid=i) for i in range(3)]


def lines(row: dict[str, Any], draw: random.Random) -> bytes:
    """Three rows a line each, one with a value changed, or two on a line, or a line cut."""
    rows = [as_json(row | {"qid": i}) for i in range(3)]
    at = draw.randrange(3)
    rows[at] = as_json(changed(row | {"qid": at}, draw))
    return draw.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b" ", b""]).join(rows)


def read_and_score(path: Path) -> None:
    found = score(read_predictions(path, PREDICTED), PREDICTED)
    if not all(0 <= value <= 1 for value in found.values()):
        raise RuntimeError(f"scores {found}")


MORE_TYPED: dict[str, Typed] = {
    "--set": (set_text, ".txt", read_set),
    "hdf5 layouts": (layout_bytes, ".hdf5", read_layout),
    "cache index": (index_text, ".json", read_index),
    "training section": (training_bytes, ".pt", read_training),
    "manifest values": (lambda draw: as_json(changed(MANIFEST, draw)), ".json", read_a_manifest),
    "record values": (lambda draw: as_json(changed(RECORD, draw)), ".json", read_a_record),
    "word list values": (lambda draw: as_json(changed(vocabulary_json(VECTORS), draw)), ".json", read_words),
    "line values": (lambda draw: lines(LINE, draw), ".jsonl", read_annotations),
    "prediction values": (lambda draw: lines(FOUND, draw), ".jsonl", read_and_score),
}
MORE_READERS: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], Any]]] = {
    "word vectors": (lambda: VECTORS, ".safetensors", read_tensors),
    "manifest": (lambda: json.dumps(MANIFEST).encode(), ".json", read_a_manifest),
    "Charades-STA": (lambda: STA_TEXT, ".txt", lambda path: read_charades(path, path.read_bytes(), STA_TABLE)),
    "Charades' table": (lambda: STA_TABLE, ".csv", lambda path: read_charades(path, STA_TEXT, path.read_bytes())),
}
