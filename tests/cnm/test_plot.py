"""Pictures: what is drawn, and that they leave matplotlib's global state alone."""

from __future__ import annotations

import io
import sys

import matplotlib.image
import numpy as np
import pytest

from cnm import plot

ROWS = [
    {"kind": "train", "epoch": 1, "update": 20, "nll/positive": 3.0, "nll/hard": 3.1, "nll/easy": 3.2}
    | {"loss/contrastive": 0.3},
    {"kind": "eval", "epoch": 1, "update": 20, "split": "val", "mIoU": 0.3}
    | {f"R@1 IoU={threshold}": 0.2 for threshold in (0.1, 0.3, 0.5, 0.7, 0.9)},
    {"kind": "result", "epoch": 1, "update": 20, "split": "test", "mIoU": 0.3},
]


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def amount(picture: np.ndarray, colour: str) -> int:
    """Pixels of exactly one colour."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(picture - wanted).max(-1) < 0.01).sum())


def item(**changes: object) -> plot.Localization:
    given = {"query": "a person opens the door", "center": 0.4, "width": 0.2, "alpha": 5.5} | changes
    return plot.Localization(**given)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=["all", "no evaluation", "nothing yet"])
def test_learning_curves(rows: list[dict]) -> None:
    assert pixels(plot.learning_curves(rows)).shape[1] > 1000


def test_the_true_moment_is_drawn_where_it_is_known() -> None:
    without = pixels(plot.localizations([item()]))
    with_true = pixels(plot.localizations([item(duration=30.0, true=[(8.0, 14.0)])]))
    assert amount(without, plot.ORANGE) == 0
    assert amount(with_true, plot.ORANGE) > 500


def test_a_wider_moment_takes_more_room() -> None:
    narrow, wide = (amount(pixels(plot.localizations([item(width=width)])), plot.BLUE) for width in (0.1, 0.4))
    assert wide > 1.5 * narrow


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_any_number_of_panels(count: int) -> None:
    assert pixels(plot.localizations([item(true=[(0.1, 0.3), (0.5, 0.6)])] * count)).size


@pytest.mark.parametrize("query", ["costs $5 or $x^{", "x " * 300, "开门"], ids=["dollar", "long", "other script"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_query_can_be_a_title(query: str) -> None:
    assert pixels(plot.localizations([item(query=query)])).size


def test_pyplot_is_not_touched() -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_all_proposals_are_drawn() -> None:
    """The others thin and grey, which blends with the paper: what differs from the picture without them."""
    alone, together = (pixels(plot.localizations([item(others=others)])) for others in ((), ((0.75, 0.1), (0.1, 0.3))))
    assert alone.shape == together.shape
    assert (np.abs(alone - together).max(-1) > 0.05).sum() > 1000


def test_the_branches_of_any_model_are_drawn() -> None:
    row = {"kind": "train", "epoch": 1, "update": 20, "loss/contrastive": 0.3}
    names = ("positive", "reference", "left", "right")
    four = [row | {f"nll/{name}": 3.0 + 0.1 * i for i, name in enumerate(names)}]
    several = [four[0] | {"update": update} for update in (20, 40)]
    picture = pixels(plot.learning_curves(several))
    for colour in (plot.BLUE, plot.ORANGE, plot.GREEN, plot.GREY):
        assert amount(picture, colour) > 50, colour
