"""Fixtures of the drop-in's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from cnm_kernels.drop_in import attention


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    """And what is said once is said again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests left to the garbage collector
        attention._said.clear()
        yield
