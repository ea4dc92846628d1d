"""The training step as CUDA graphs: one launch instead of a thousand."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cnm.data.batch import Batch
from cnm.training.base import ModelStep

WARM_UP_STEPS = 2  # of each batch shape, run as they are: they train too, and make what a graph must find in place


class GraphedStep:
    """Runs a ``ModelStep`` from a CUDA graph per batch shape; where none can be captured, says so and runs it as is.

    Gradients, optimizer states and the learning rate have fixed places in memory; dropout and word masks are drawn anew
    at every replay, since PyTorch's generator advances with it.
    """

    def __init__(self, step: ModelStep) -> None:
        self.step = step
        step.fixed_gradients = True
        self.seen: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], tuple[Any, Batch, dict[str, Tensor]]] = {}
        self.pool: Any = None
        self.stream: Any = None  # where steps warm up and are captured
        self.gave_up = False

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Trains on one batch on the model's GPU; see ``ModelStep``."""
        with torch.cuda.device_of(next(self.step.model.parameters())):  # streams and captures are the current GPU's
            return self._run(batch)

    def _run(self, batch: Batch) -> dict[str, Tensor]:
        shapes = tuple(getattr(batch, field.name).shape for field in fields(batch))
        if self.gave_up:
            return self.step(batch)
        if shapes not in self.graphs:
            self.seen[shapes] = self.seen.get(shapes, 0) + 1
            if self.seen[shapes] <= WARM_UP_STEPS:
                return self._on_side_stream(batch)
            try:
                self.graphs[shapes] = self._capture(batch)
            except RuntimeError as error:
                self.gave_up = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"training goes on without CUDA graphs: {reason}", stacklevel=3)
                return self.step(batch)
        graph, inputs, metrics = self.graphs[shapes]
        for field in fields(batch):
            getattr(inputs, field.name).copy_(getattr(batch, field.name), non_blocking=True)
        self.step.advance()
        graph.replay()
        return {name: value.clone() for name, value in metrics.items()}

    def _on_side_stream(self, batch: Batch) -> dict[str, Tensor]:
        """Runs a step on another stream: capturing requires that of the steps before it."""
        self.stream = self.stream or torch.cuda.Stream()
        current, side = torch.cuda.current_stream(), self.stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            metrics = self.step(batch)
        current.wait_stream(side)
        return metrics

    def _capture(self, batch: Batch) -> tuple[Any, Batch, dict[str, Tensor]]:
        inputs = Batch(**{field.name: getattr(batch, field.name).clone() for field in fields(batch)})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            metrics = self.step.run(inputs)
        self.pool = graph.pool()
        return graph, inputs, metrics
