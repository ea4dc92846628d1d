"""Damages every kind of file that this project reads, and every kind of call that reaches compiled code, many times.

    python tools/fuzz.py --cases 100000

A reader may succeed or raise ``InputError`` that names the file, an op may succeed or raise ``ValueError`` or
``TypeError``; anything else (another exception, a crash, a case of more than 20 seconds, more than 4 GB of memory, a
file left behind) is a finding. Cases run in child processes, so that a crash is seen; the first findings are printed
with the seed that repeats them.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from fuzz_more import MORE_READERS, MORE_TYPED
from fuzz_typed import TYPED as TYPED_FILES

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # where the ops' records are

from op_records import RECORDS
from op_records.anything import Anything

import cnm_kernels
from cnm import checkpoint
from cnm.config import CNMConfig
from cnm.data.annotations import Sample, read_annotations
from cnm.data.features import FeatureFile, load_features
from cnm.data.vocabulary import Vocabulary
from cnm.data.word_vectors import read_vectors
from cnm.errors import InputError
from cnm.predictions import read_predictions

BATCH = 250  # cases of a child process
CASE_SECONDS = 20
MEMORY_BYTES = 4 << 30
CONFIG = Path(sys.modules["cnm"].__file__ or "").parent / "configs" / "charades_i3d.json"
INTERESTING = [
    b"\x00",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00" * 8,
    b"1e999",
    b"-1",
    b"NaN",
    b"{}",
]


def annotation_bytes() -> bytes:
    rows = [[f"v{i}", 30.0 + i, [1.0, 5.5 + i], f"person {i} opens the door"] for i in range(20)]
    return json.dumps(rows).encode()


def vocabulary_bytes() -> bytes:
    words = ["person", "opens", "the", "door"]
    vectors = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    counter = collections.Counter({word: 9 - i for i, word in enumerate(words)})
    return pickle.dumps({"w2id": {word: i for i, word in enumerate(words)}, "id2vec": vectors, "counter": counter})


def checkpoint_bytes() -> bytes:
    buffer = io.BytesIO()
    model = {"frame_fc.weight": torch.randn(8, 8), "frame_fc.bias": torch.randn(8)}
    torch.save({"num_updates": 3, "config": {"a": 1}, "model_parameters": model}, buffer)
    return buffer.getvalue()


def hdf5_bytes() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("v0", data=np.ones((12, 8), np.float32))
        file.create_dataset("v1", data=np.ones((5, 8), np.float32), chunks=(5, 8), compression="gzip")
        file.create_group("v2")["c3d_features"] = np.ones((7, 8), np.float32)
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((12, 8), np.float32))
    return buffer.getvalue()


def read_features(path: Path) -> None:
    with FeatureFile(path) as file:
        file.check(["v0", "v1", "v2"], 8)
        for video in ("v0", "v1", "v2"):
            file.frames(video, 8)


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=np.random.default_rng(0).standard_normal((12, 8)).astype(np.float16))
    return buffer.getvalue()


def annotation_lines() -> bytes:
    rows = [
        {
            "qid": i,
            "query": "person opens",
            "vid": f"v{i}",
            "duration": 30.0,
            "relevant_windows": [[1, 5.5], [7, 9 + i]],
        }
        for i in range(20)
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def prediction_lines() -> bytes:
    rows = [{"qid": i, "vid": "v", "pred_relevant_windows": [[1.0, 5.5, 0.5], [7, 9, 0.25]]} for i in range(8)]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def vector_text() -> bytes:
    return b"".join(b"word%d 1.5 -2 3e-1 4\n" % i for i in range(20))


PREDICTED = [Sample("v", 30.0, (1.0, 5.0), "text", qid=i) for i in range(8)]
READERS: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], Any]]] = {
    "annotations": (annotation_bytes, ".json", read_annotations),
    "configuration": (CONFIG.read_bytes, ".json", CNMConfig.from_json),
    "vocabulary": (vocabulary_bytes, ".pkl", lambda path: Vocabulary.from_pickle(path, 4, 8)),
    "checkpoint": (checkpoint_bytes, ".pt", checkpoint.load),
    "features": (hdf5_bytes, ".hdf5", read_features),
    "annotation lines": (annotation_lines, ".jsonl", read_annotations),
    "predictions": (prediction_lines, ".jsonl", lambda path: read_predictions(path, PREDICTED)),
    "vectors": (vector_text, ".txt", lambda path: read_vectors(path, [f"word{i}" for i in range(20)], 4)),
    "archive": (npz_bytes, ".npz", lambda path: load_features(str(path), 8, 4)),
    "array": (npy_bytes, ".npy", lambda path: load_features(str(path), 8, 4)),
    **MORE_READERS,
}
TYPED = TYPED_FILES | MORE_TYPED


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        span = draw.choice((1, 1, 2, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind == 4:
            value = draw.choice(INTERESTING)
            data[at : at + len(value)] = value
        else:
            del data[at:]
    return bytes(data)


def read_file(kind: str, content: bytes, folder: Path) -> str:
    _, suffix, read = TYPED[kind] if kind in TYPED else READERS[kind]
    path = folder / f"case{suffix}"
    path.write_bytes(content)
    try:
        read(path)
    except InputError as error:
        if str(path) not in str(error):
            raise RuntimeError(f"does not name the file: {error}") from None
        return "refused"
    return "read"


def fuzz_op(draw: random.Random) -> str:
    torch.manual_seed(draw.randrange(1 << 30))
    op = draw.choice(sorted(RECORDS))
    arguments = RECORDS[op].fuzzed(Anything(draw))
    try:
        out = getattr(cnm_kernels, op)(**arguments)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if outputs and not any(o.is_meta for o in outputs):
            sum(o.float().sum() for o in outputs).backward()
    except (ValueError, TypeError):
        return "refused"
    except RuntimeError as error:  # words are looked at by compiled code alone
        if "linear_nll: target holds" not in str(error) and "is out of bounds for dimension" not in str(error):
            raise
        return "refused"
    return "ran"


OP = "op"
KINDS = [*READERS, *TYPED, OP]


def one_case(seed: int, folder: Path, kind: str | None = None) -> str:
    """``kind: outcome``; raises what is a finding."""
    draw = random.Random(seed)
    kind = kind or KINDS[seed % len(KINDS)]
    if kind == OP:
        return f"{kind}: {fuzz_op(draw)}"
    if kind in TYPED:
        return f"{kind}: {read_file(kind, TYPED[kind][0](draw), folder)}"
    return f"{kind}: {read_file(kind, damaged(READERS[kind][0](), draw), folder)}"


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith("case.")]


def child(seeds: range, pipe: int, kind: str | None = None) -> None:
    """Runs cases; writes a JSON line for each."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {CASE_SECONDS} seconds")

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with os.fdopen(pipe, "w") as out, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.chdir(folder)
        for seed in seeds:
            out.write(json.dumps(["begins", seed]) + "\n")
            out.flush()
            signal.alarm(CASE_SECONDS)
            try:
                outcome = one_case(seed, folder, kind)
                for path in left_behind(folder):
                    outcome = f"FINDING: left {path.name} behind"
                    path.unlink()
            except BaseException:
                outcome = f"FINDING: {traceback.format_exc(limit=-3)}"
            finally:
                signal.alarm(0)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            if now - used > MEMORY_BYTES:
                outcome = f"FINDING: took {now - used >> 20} MB"
                used = now
            out.write(json.dumps([outcome, seed]) + "\n")
            out.flush()


def run(
    cases: int, first: int = 0, quiet: bool = True, kind: str | None = None
) -> tuple[collections.Counter[str], list[tuple[int, str]]]:
    """Outcomes by kind, and findings as (seed, what happened)."""
    outcomes: collections.Counter[str] = collections.Counter()
    findings: list[tuple[int, str]] = []
    begun = time.monotonic()
    start = first
    while start < first + cases:
        seeds = range(start, min(start + BATCH, first + cases))
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(read)
            status = 1
            try:
                child(seeds, write, kind)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        under_way = None
        done = start
        with os.fdopen(read) as lines:
            for line in lines:
                outcome, seed = json.loads(line)
                if outcome == "begins":
                    under_way = seed
                    continue
                under_way, done = None, seed + 1
                if outcome.startswith("FINDING"):
                    findings.append((seed, outcome))
                outcomes[outcome if not outcome.startswith("FINDING") else "findings"] += 1
        _, status = os.waitpid(process, 0)
        if under_way is not None:
            findings.append((under_way, f"FINDING: the process ended with status {status}"))
            outcomes["findings"] += 1
            done = under_way + 1
        start = max(done, start + 1)
        if not quiet:
            print(f"\r{start - first}/{cases} cases, {len(findings)} findings", end="", file=sys.stderr, flush=True)
    if not quiet:
        print(f"\n{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--kind", choices=KINDS, help="this alone; default: all in turn")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case; repeats a finding with --cases 1")
    arguments = parser.parse_args()
    outcomes, findings = run(arguments.cases, arguments.first, quiet=False, kind=arguments.kind)
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:<28}{count:>8}")
    for seed, what in findings[:10]:
        print(f"seed {seed}: {what}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
