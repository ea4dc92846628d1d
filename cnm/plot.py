"""Pictures: learning curves, and Gaussians over time against true moments. All as PNG bytes, with no global state."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cnm import metrics
from cnm.models.base import Model, Proposals
from cnm_kernels.constants import MIN_WIDTH

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"  # Okabe and Ito: told apart by everyone
_LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"), (GREY, "-."))  # of the branches, in the order of a metrics row
_SCORES = {"mIoU": (BLUE, "-"), "R@1 IoU=0.3": (ORANGE, "--"), "R@1 IoU=0.5": (GREEN, ":"), "R@1 IoU=0.7": (GREY, "-.")}
_UNDRAWABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_DOTS_PER_INCH = 130
_CURVE_POINTS = 400  # of a drawn Gaussian


@dataclass(frozen=True)
class Localization:
    """One sentence to draw. ``center`` and ``width`` are fractions of the video, ``duration`` and ``true`` seconds.

    ``true`` are all its true moments. Without a duration the time axis is the fraction of the video, and so are they.
    ``others`` are the centers and widths of further proposals, best first.
    """

    query: str
    center: float
    width: float
    alpha: float
    duration: float | None = None
    true: Sequence[tuple[float, float]] = ()
    min_width: float = MIN_WIDTH
    others: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        found: Proposals,
        row: int,
        query: str,
        duration: float | None,
        true: Sequence[tuple[float, float]] = (),
    ) -> Localization:
        """The proposals of one row of ``found``."""
        (center, width), *others = zip(found.center[row].tolist(), found.width[row].tolist(), strict=True)
        return cls(query, center, width, model.alpha, duration, true, model.min_width, tuple(others))


def localizations(items: Sequence[Localization]) -> bytes:
    """One panel per sentence: its Gaussian, the predicted moment below it and the true ones, where known. PNG"""
    columns = 1 if len(items) == 1 else 2
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(7.2 if columns == 1 else 11, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, item in zip(axes.flat, items, strict=False):
        _localization(panel, item)
    for panel in axes.flat[len(items) :]:
        panel.set_axis_off()
    return _png(figure)


def learning_curves(rows: Sequence[dict[str, Any]]) -> bytes:
    """Reconstruction errors and contrastive loss over updates, and scores over epochs, from a run's metric rows. PNG"""
    train = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    nll, contrastive, score = figure.subplots(1, 3)
    updates = [row["update"] for row in train]
    branches = [name for name in (train[-1] if train else {}) if name.startswith("nll/")]
    for name, (colour, line) in zip(branches, _LINES, strict=False):
        nll.plot(updates, _column(train, name), color=colour, linestyle=line, label=name.removeprefix("nll/"))
    nll.set(title="Reconstruction error by branch", xlabel="update", ylabel="nll per word (nats)")
    contrastive.plot(updates, _column(train, "loss/contrastive"), color=BLUE)
    contrastive.set(title="Contrastive loss", xlabel="update")
    epochs = [row["epoch"] for row in scores]
    for name, (colour, line) in _SCORES.items():
        score.plot(
            epochs,
            _column(scores, name),
            color=colour,
            linestyle=line,
            marker="o",
            ms=3,
            label=name,
        )
    split = scores[-1].get("split", "") if scores else "no validation split"
    score.set(title=f"Scores ({split})", xlabel="epoch", ylim=(0, 1))
    for axes in (nll, contrastive, score):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row.get(name, math.nan) for row in rows]


def _localization(axes: Axes, item: Localization) -> None:
    scale = item.duration or 1.0
    time = np.linspace(0.0, 1.0, _CURVE_POINTS)

    def gaussian_of(center: float, width: float) -> metrics.Array:
        return np.exp(-item.alpha * (time - center) ** 2 / max(width, item.min_width) ** 2)

    for index, other in enumerate(item.others):
        label = None if index else "other proposals"
        axes.plot(time * scale, gaussian_of(*other), color=GREY, linewidth=0.8, alpha=0.6, label=label)
    gaussian = gaussian_of(item.center, item.width)
    axes.plot(time * scale, gaussian, color=BLUE, label="Gaussian")
    axes.fill_between(time * scale, gaussian, color=BLUE, alpha=0.12, linewidth=0)
    start, end = metrics.moments_from_gaussian(item.center, item.width) * scale
    _band(axes, start, end, -0.13, BLUE, None, "predicted moment")
    for index, (start, end) in enumerate(item.true):
        _band(axes, start, end, -0.29, ORANGE, "///", None if index else "true moment")
    title = axes.set_title("\n".join(textwrap.wrap(_drawable(item.query), 68)[:3]), fontsize=10)
    title.set_parse_math(False)  # a dollar sign in a query is a dollar sign
    axes.set(
        xlim=(0, scale),
        ylim=(-0.34, 1.05),
        yticks=[0, 0.5, 1],
        xlabel="seconds" if item.duration else "part of the video",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _drawable(text: str) -> str:
    """Text without what no font can draw, which matplotlib fails at."""
    return _UNDRAWABLE.sub("\ufffd", text)


def _band(
    axes: Axes, start: float, end: float, bottom: float, colour: str, hatch: str | None, label: str | None
) -> None:
    axes.barh(
        bottom + 0.06, end - start, 0.12, start, color=colour, edgecolor="white", hatch=hatch, linewidth=0, label=label
    )


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()
