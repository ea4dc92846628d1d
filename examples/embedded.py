"""The embedded data as the published code takes it: batches of its ``net_input``, and scores. Nothing is downloaded."""

from __future__ import annotations

import argparse
import atexit
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnm import configs, metrics
from cnm.data import Batch, BatchLoader, Split, open_split

BATCH_SIZE = 32


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--videos", type=int, default=800, help="to train on; default: %(default)s")
    parser.add_argument("--plain", action="store_true", help="do not accelerate, to compare")
    return parser.parse_args()


def open_data(videos: int) -> tuple[Split, Split, dict[str, Any]]:
    """Training and test split, and the sizes a published configuration would hold."""
    folder = tempfile.mkdtemp(prefix="cnm-examples-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = [f"dataset.num_videos={videos}", f"dataset.cache_path={folder}"]
    dataset = configs.resolve("synthetic", settings).dataset
    sizes = {
        "frames_input_size": dataset.frame_dim,
        "words_input_size": dataset.word_dim,
        "vocab_size": dataset.vocab_size + 1,  # the padding
        "hidden_size": 64,
        "dropout": 0.1,
        "DualTransformer": {
            "d_model": 64,
            "num_heads": 4,
            "num_decoder_layers1": 2,
            "num_decoder_layers2": 2,
            "dropout": 0.1,
        },
    }
    return open_split(dataset, "train"), open_split(dataset, "test"), sizes


def net_input(batch: Batch) -> dict[str, Tensor]:
    return {
        "frames_feat": batch.frames,
        "frames_len": batch.frame_lengths,
        "words_id": batch.word_ids,
        "words_feat": batch.words,
        "words_len": batch.word_lengths,
        "weights": batch.mask_weights,
    }


def epochs(split: Split, count: int) -> Iterator[tuple[int, Iterator[dict[str, Tensor]]]]:
    """Numbers of epochs, each with its batches in an order of its own."""
    loader = BatchLoader(split, BATCH_SIZE, shuffle=True)
    for epoch in range(count):
        yield epoch, (net_input(batch) for _, batch in loader.epoch(epoch))


def train(
    model: torch.nn.Module, split: Split, count: int, step: Callable[[dict[str, Tensor], int], dict[str, float]]
) -> float:
    """Calls ``step(batch, epoch)`` on every batch and prints the mean of what it returns. Gives seconds per batch."""
    seconds, batches = 0.0, 0
    for epoch, inputs in epochs(split, count):
        model.train()
        seen: list[dict[str, float]] = []
        start = time.perf_counter()
        for batch in inputs:
            seen.append(step(batch, epoch))
        seconds, batches = seconds + time.perf_counter() - start, batches + len(seen)
        means = {name: sum(numbers[name] for numbers in seen) / len(seen) for name in seen[0]}
        print(
            f"epoch {epoch + 1}/{count}:", ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()), flush=True
        )
    print(f"{1e3 * seconds / batches:.0f} ms per batch of {BATCH_SIZE}")
    return seconds / batches


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, split: Split, localize: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
) -> float:
    """Mean IoU of ``localize(batch)`` -> center and width [B], printed beside that of the whole video."""
    model.eval()
    found = [localize(net_input(batch)) for _, batch in BatchLoader(split, BATCH_SIZE, shuffle=False).epoch()]
    center, width = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    score = float(metrics.iou(metrics.moments_from_gaussian(center, width), split.moments).mean())
    whole = float(metrics.iou(np.array([0.0, 1.0]), split.moments).mean())
    print(f"test mIoU {score:.3f} (whole video: {whole:.3f})")
    return score
