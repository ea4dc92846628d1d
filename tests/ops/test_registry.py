"""The choice of a backend: the default order, the choice by name, and reasons that a person can read."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cnm_kernels
from cnm_kernels import BackendUnavailable, native, reference, registry


def a_mask(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return cnm_kernels.gaussian_mask(torch.full((2,), 0.5, dtype=dtype), torch.ones(2, dtype=dtype), 5, alpha=5.0)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Two invented backends before the reference: one that runs on the CPU in float32, one that could not be loaded."""

    def fast(*arguments: object) -> torch.Tensor:
        return reference.gaussian_mask(*arguments) + 100  # type: ignore[arg-type]

    ready = SimpleNamespace(
        OPS={"cpu": ("gaussian_mask",)}, DTYPES=(torch.float32,), LOAD_ERRORS={}, gaussian_mask=fast
    )
    broken = SimpleNamespace(OPS={"cpu": registry.OPS}, DTYPES=(torch.float32,), LOAD_ERRORS={"cpu": "no libfoo.so"})
    monkeypatch.setattr(registry, "BACKENDS", {"native": "native", "triton": "triton", "torch": "reference"})
    monkeypatch.setattr(registry, "_modules", {"native": ready, "triton": broken, "torch": reference})
    monkeypatch.setattr(registry, "_default", None)
    return {"native": ready, "triton": broken}


def test_the_reference_runs_every_op_and_dtype_on_the_cpu() -> None:
    for op in registry.OPS:
        assert callable(getattr(cnm_kernels, op))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert registry.unavailable(op, "torch", "cpu", dtype) is None


def test_the_first_backend_that_can_runs(backends: dict[str, SimpleNamespace]) -> None:
    assert (a_mask() > 50).all()
    assert registry.choice("gaussian_mask", "cpu", torch.float64) == "torch"
    assert (a_mask(torch.float64) <= 1).all()
    assert registry.choice("dropout", "cpu", torch.float32) == "torch"


def test_use_backend_holds_for_the_block_and_nests(backends: dict[str, SimpleNamespace]) -> None:
    with cnm_kernels.use_backend("torch"):
        assert (a_mask() <= 1).all()
        with cnm_kernels.use_backend("native"):
            assert (a_mask() > 50).all()
        assert (a_mask() <= 1).all()
        with cnm_kernels.use_backend(None):
            assert (a_mask() > 50).all()
    with pytest.raises(RuntimeError, match="inside"), cnm_kernels.use_backend("torch"):
        raise RuntimeError("inside")
    assert (a_mask() > 50).all()


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("found", "chosen"), [((7, 5), "torch"), ((8, 0), "native"), ((12, 0), "native")])
def test_an_old_gpu_runs_pytorch(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], chosen: str, compiling: bool
) -> None:
    gpu = SimpleNamespace(major=found[0], minor=found[1])
    kernels = SimpleNamespace(
        OPS={"cuda": ("dropout",)}, DTYPES=(torch.float32,), LOAD_ERRORS={}, MIN_CAPABILITY=native.MIN_CAPABILITY
    )
    monkeypatch.setattr(registry, "_modules", {"native": kernels, "triton": None, "torch": reference})
    monkeypatch.setattr(registry, "_default", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    registry._known_capability.cache_clear()
    try:
        assert registry.choice("dropout", "cuda", torch.float32) == chosen
        reason = registry.unavailable("dropout", "native", "cuda", torch.float32)
    finally:
        registry._known_capability.cache_clear()
    wanted = "needs a GPU of compute capability 8.0 or more, this one has 7.5"
    assert reason == (None if chosen == "native" else wanted)


@pytest.mark.parametrize(
    ("op", "backend", "device", "dtype", "reason"),
    [
        ("gaussian_mask", "triton", "cpu", torch.float32, "no libfoo.so"),
        ("dropout", "native", "cpu", torch.float32, "does not implement dropout"),
        ("gaussian_mask", "native", "cuda", torch.float32, "does not run on cuda"),
        ("gaussian_mask", "native", "cpu", torch.float64, "does not take torch.float64"),
    ],
)
def test_a_backend_asked_for_by_name_runs_or_says_why_not(
    backends: dict[str, SimpleNamespace], op: str, backend: str, device: str, dtype: torch.dtype, reason: str
) -> None:
    assert registry.unavailable(op, backend, device, dtype) == reason
    with cnm_kernels.use_backend(backend), pytest.raises(BackendUnavailable) as error:
        registry.choice(op, device, dtype)
    assert op in str(error.value)
    assert repr(backend) in str(error.value)
    assert reason in str(error.value)
    assert "python -m cnm_kernels" in str(error.value)


def test_a_missing_backend_says_so(backends: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._modules, "triton", None)  # type: ignore[arg-type]
    with cnm_kernels.use_backend("triton"), pytest.raises(BackendUnavailable, match="not part of this installation"):
        a_mask()


def test_nothing_runs_an_unknown_dtype() -> None:
    with cnm_kernels.use_backend(None), pytest.raises(BackendUnavailable, match=r"no backend takes torch.int8 on cpu"):
        registry.choice("dropout", "cpu", torch.int8)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with (
        pytest.raises(ValueError, match="use_backend: unknown backend 'cuda'; choose one of native, triton, torch"),
        cnm_kernels.use_backend("cuda"),
    ):
        pass


def test_the_table_shows_choices_and_reasons(backends: dict[str, SimpleNamespace]) -> None:
    table = registry.table()
    row = next(line for line in table.splitlines() if line.startswith("gaussian_mask"))
    assert row.split()[1:5] == ["native", "torch", "torch", "torch"]  # float32, bfloat16, float16, float64
    assert "triton on cpu: no libfoo.so" in table
    assert "nothing; the first that can runs, in the order native, triton, torch" in table
    with cnm_kernels.use_backend("native"):
        row = next(line for line in registry.table().splitlines() if line.startswith("dropout "))
        assert row.split()[1:5] == ["-"] * 4


@pytest.mark.parametrize(("value", "succeeds", "shown"), [("torch", True, "torch"), ("cuda", False, "unknown backend")])
def test_the_environment_variable_chooses(value: str, succeeds: bool, shown: str) -> None:
    environment = os.environ | {registry.ENVIRONMENT_VARIABLE: value, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-m", "cnm_kernels"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode == 0) is succeeds, result.stderr
    if succeeds:
        assert f"asked for by name: {shown}" in result.stdout
        assert all(op in result.stdout for op in registry.OPS)
    else:
        assert shown in result.stderr
        assert registry.ENVIRONMENT_VARIABLE in result.stderr


def test_blocks_may_be_left_in_another_order_than_entered() -> None:
    before = registry.requested()
    first, second = cnm_kernels.use_backend("torch"), cnm_kernels.use_backend("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert registry.requested() == "native"
    second.__exit__(None, None, None)
    assert registry.requested() == before
