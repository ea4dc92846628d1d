"""The output of ``accelerate(model, report=...)``: each module, whether it was replaced, and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from cnm_kernels.drop_in.trial import buffers_kept, random_kept

REPEATS = 5  # of each timing, after one that is not counted


@dataclass
class Row:
    """One module that ``accelerate`` looked at."""

    name: str
    kind: str
    outcome: str
    module: nn.Module
    seconds: list[float] = field(default_factory=list)  # before, after; none without a sample step


class StepTimer:
    """Times a sample step, and the calls of some modules in it, each alone with the arguments that the step gave it."""

    def __init__(self, model: nn.Module, step: Callable[[], Tensor], parts: Iterable[nn.Module]) -> None:
        self.model, self.step = model, step
        self.calls: dict[nn.Module, list[tuple[Any, Any]]] = {part: [] for part in parts}
        hooks = [part.register_forward_pre_hook(self._keep, with_kwargs=True) for part in self.calls]
        try:
            with _unchanged(model):
                loss = step()
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            what = f"{type(loss).__name__} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"accelerate: report must return the loss of a sample batch, a scalar to differentiate, got {what}"
            )

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[module].append(tree_map(_detached, (args, kwargs)))

    def measure(self) -> tuple[float, dict[nn.Module, float]]:
        """Seconds of forward and backward: (the whole step, each module's calls together)."""

        def whole() -> None:
            self.step().backward(retain_graph=True)  # published models write into their batch, which then leads there

        def part(module: nn.Module) -> None:
            for args, kwargs in self.calls[module]:
                results, _ = tree_flatten(module(*args, **kwargs))
                first = next((r for r in results if isinstance(r, Tensor) and r.requires_grad), None)
                if first is not None:
                    first.backward(torch.ones_like(first))

        with _unchanged(self.model):
            parts = {module: self._median(partial(part, module)) for module in self.calls}
            return self._median(whole), parts

    def _median(self, run: Callable[[], None]) -> float:
        on_gpu = any(parameter.is_cuda for parameter in self.model.parameters())
        taken = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])


def table(rows: list[Row], whole: list[float]) -> str:
    """The report as text. ``whole``: seconds of the step before and after, or nothing."""
    cells = [[row.name, row.kind, row.outcome, *_times(row.seconds, whole)] for row in rows]
    head = ["module", "class", "replaced by", *(["before", "share", "after", "share"] if whole else [])]
    if whole:
        cells.append(["the whole step", "", "", *_times(whole, whole)])
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(w) if i < 3 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *cells]
    ]
    note = "A layer's time holds that of its attention. Forward and backward, median of five." if whole else ""
    return "\n".join([*lines, *([note] if note else [])])


def _times(seconds: list[float], whole: list[float]) -> list[str]:
    return [
        text
        for taken, all_ in zip(seconds, whole, strict=False)
        for text in (f"{taken * 1e3:.1f} ms", f"{taken / all_:.0%}")
    ]


def _detached(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random generators are afterwards what they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with buffers_kept(model), random_kept():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
