"""Settings of the tests of the package ``cnm``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# These train dozens of runs, nine tenths of whose time would go into pictures that nobody looks at.
UNDRAWN = ("test_trainer", "test_cli", "test_guards")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True, scope="module")
def _pictures_are_not_drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """``test_plot``, ``test_cpl`` and ``test_report`` look at real ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] in UNDRAWN:
            patch.setattr("cnm.plot.localizations", lambda items: PNG)
            patch.setattr("cnm.plot.learning_curves", lambda rows: PNG)
        yield
