"""Settings of the tests of the package ``cnm``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from undrawn import draw_nothing

# These train dozens of runs, and nobody looks at their pictures; test_plot, test_cpl and test_report look at real ones.
UNDRAWN = ("test_trainer", "test_cli", "test_guards")


@pytest.fixture(autouse=True, scope="module")
def _pictures_are_not_drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] in UNDRAWN:
            draw_nothing(patch)
        yield
