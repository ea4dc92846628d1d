"""``python -m benchmarks.seeds``: does the lean step, in any precision, train as well as the published formulation?

Trains on the embedded data from several seeds in each way and prints the test mIoU's mean and standard deviation.
``--config synthetic_cpl`` trains CPL; ``--quick`` shows that everything works, too short to learn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from cnm import configs
from cnm.training.trainer import Trainer

WAYS = {
    "published, float32": ("published", "float32"),
    "lean, float32": ("lean", "float32"),
    "lean, bf16": ("lean", "bf16"),
    "lean, high": ("lean", "high"),  # on CPUs without AMX this is float32
}


def run(config_name: str, way: str, seed: int, epochs: int | None, videos: int | None) -> float:
    """Test mIoU of one training run, on one thread."""
    torch.set_num_threads(1)
    step, precision = WAYS[way]
    values = {"train.seed": seed, "train.max_num_epochs": epochs, "dataset.num_videos": videos}
    config = configs.resolve(config_name, [f"{name}={value}" for name, value in values.items() if value is not None])
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(config, Path(folder) / "run", step=step, precision=precision, quiet=True).train().scores["mIoU"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--config", default="synthetic", help="packaged, on embedded data (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch, 24 videos")
    parser.add_argument("--seeds", type=int, default=5, help="runs per way (default %(default)s)")
    parser.add_argument("--epochs", type=int, help="default: the demo's")
    parser.add_argument("--videos", type=int, help="default: the demo's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.videos = 2, 1, 24
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(run, options.config, way, seed, options.epochs, options.videos): way
            for seed in range(1, options.seeds + 1)
            for way in WAYS
        }
        for future, way in futures.items():
            scores[way].append(future.result())
            print(f"{way}: {scores[way][-1]:.4f}", file=sys.stderr, flush=True)
    for way, found in scores.items():
        spread = statistics.stdev(found) if len(found) > 1 else float("nan")
        print(f"{way:20} mIoU {statistics.mean(found):.4f} +- {spread:.4f}  {json.dumps([round(x, 4) for x in found])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
