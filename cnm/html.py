"""Pieces of HTML pages that stand alone: Gaussians over time as SVG, escaped text, pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from cnm.localizer import LocalizedMoment, Localizer
from cnm.plot import BLUE, GREY, ORANGE

POINTS = 81  # of a drawn Gaussian


def text(value: object) -> str:
    return escape(str(value))


def png(content: bytes, description: str) -> str:
    return f'<img alt="{text(description)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def timeline(
    localizer: Localizer,
    found: LocalizedMoment,
    duration: float | None,
    true: Sequence[tuple[float, float]] = (),
    *,
    width: int = 360,
    height: int = 46,
) -> str:
    """An SVG of all proposals' Gaussians over time, the found moment below them and the true ones below that."""
    scale = width / (duration or 1.0)
    top = height - 14  # of the bars; the curves are above
    parts = []
    for index, proposal in reversed(list(enumerate(found.proposals))):
        curve = localizer.curve(proposal, POINTS)
        points = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in zip(np.linspace(0, width, POINTS), top - 1 - curve * (top - 3), strict=True)
        )
        colour, opacity = (BLUE, 0.15) if index == 0 else (GREY, 0.04)
        parts.append(
            f'<polygon points="0,{top} {points} {width},{top}" fill="{colour}" fill-opacity="{opacity}" '
            f'stroke="{colour}" stroke-opacity="{opacity + 0.35}"/>'
        )
    parts.append(_bar(found.start * scale, found.end * scale, top + 1, BLUE, "found"))
    parts += [_bar(start * scale, end * scale, top + 8, ORANGE, "true") for start, end in true]
    label = f"found {found.start:.1f} to {found.end:.1f}" + (f", true {spans(true)}" if true else "")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f'<rect width="{width}" height="{top}" fill="#f5f5f5"/>{"".join(parts)}</svg>'
    )


def spans(moments: Sequence[tuple[float, float]]) -> str:
    """Moments in words: "1.0 to 2.5, 7.0 to 9.0"."""
    return ", ".join(f"{start:.1f} to {end:.1f}" for start, end in moments)


def _bar(start: float, end: float, top: float, colour: str, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{start:.1f}" y="{top}" width="{max(end - start, 1):.1f}" height="6" fill="{colour}"/>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Cells are HTML already; ``head`` is text."""
    first = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>'
