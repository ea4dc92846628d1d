"""``pytest benchmarks`` (pytest-benchmark): each table's test gets the calls that ``python -m benchmarks`` measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks at tiny sizes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" not in metafunc.fixturenames:
        return
    cases = metafunc.module.TABLE.cases(metafunc.config.getoption("--quick"))
    pairs = [(case, name) for case in cases for name in case.contenders]
    ids = [f"{case.name}, {case.dtype}-{name}" for case, name in pairs]
    metafunc.parametrize("call", pairs, ids=ids, indirect=True)


@pytest.fixture
def call(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], Any]:
    """A contender's call, after its result has been found right."""
    case, name = request.param
    reason = case.contenders[name].unavailable
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    prepared: Callable[[], Any] = case.prepare(name)
    benchmark.group = f"{case.name}, {case.dtype}"
    benchmark.extra_info["error"] = case.verify(name, prepared)
    return prepared
