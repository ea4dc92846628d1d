"""``python -m benchmarks gpu --step``: training steps on an NVIDIA GPU, launched one by one and from a CUDA graph.

Milliseconds are medians of single steps between two events, at the published sizes of Charades-STA; kernels are those
that ``gpu_launches`` counts. A step whose graph could not be captured is said to have failed, not timed as one.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_launches
from benchmarks.report import markdown
from cnm.models.base import PRECISIONS
from cnm.training.cuda_graph import WARM_UP_STEPS, GraphedStep

REPEATS = 30
HEADER = ["model", "precision", "eager ms", "graph ms", "graphs gain", "verdict"]


def median_milliseconds(call: Callable[[], Any]) -> float:
    """Median of ``REPEATS`` calls. The GPU is idle before each, so that the host's time to launch counts."""
    found = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def measure(model: str, precision: str) -> dict[str, Any]:
    """Both ways of one model's step; ``reason`` says what failed."""
    found: dict[str, Any] = {"model": model, "precision": precision, "eager": None, "graph": None, "reason": ""}
    try:
        for way in ("eager", "graph"):
            step, batch = gpu_launches.model_step(model, precision, "cuda")
            call: Any = step if way == "eager" else GraphedStep(step)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # how a graph that cannot be captured is told
                for _ in range(WARM_UP_STEPS + 2):
                    call(batch)
            found[way] = median_milliseconds(partial(call, batch))
    except Exception as error:  # the other rows are still worth having
        found["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return found


def text(results: list[dict[str, Any]]) -> str:
    lines = [HEADER]
    for found in results:
        eager, graph = found["eager"], found["graph"]
        times = ["" if value is None else f"{value:.3f}" for value in (eager, graph)]
        gain = "" if eager is None or graph is None else f"{eager / graph:.2f}"
        lines.append([found["model"], found["precision"], *times, gain, found["reason"] or "measured"])
    return markdown(lines)


def main(output: Path) -> int:
    """Exit code 0: measured; 1: a step failed, or was not captured; 2: there is no GPU."""
    if not torch.cuda.is_available():
        print("training steps are timed on an NVIDIA GPU, and PyTorch finds none here")
        return 2
    results = [measure(model, precision) for model in ("CNM", "CPL") for precision in PRECISIONS]
    print(text(results))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "gpu_step.json"
    path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "results": results}, indent=1) + "\n")
    print(f"\nWritten: {path}")
    return int(any(found["reason"] for found in results))
