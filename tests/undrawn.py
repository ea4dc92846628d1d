"""``cnm`` that draws no picture, nine tenths of a small run's time; as a script, the command line."""

from __future__ import annotations

import pytest

from cnm import plot
from cnm.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plot, "localizations", lambda items: PNG)
    patch.setattr(plot, "learning_curves", lambda rows: PNG)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        main()
