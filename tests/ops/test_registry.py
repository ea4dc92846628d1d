"""The choice of a backend: the default order, the choice by name, and reasons that a person can read."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cnm_kernels
from cnm_kernels import BackendUnavailable, gpu, native, reference, registry, triton


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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, SimpleNamespace]]:
    """The properties of invented GPUs, by index; the first is the current one, and all kernels are installed."""
    invented: dict[int, SimpleNamespace] = {}
    for backend, module in (("native", native), ("triton", triton)):
        monkeypatch.setattr(module, "LOAD_ERRORS", {})
        monkeypatch.setattr(module, "OPS", {"cuda": tuple(set(registry.OPS) - set(registry.LIBRARY_OPS))})
        monkeypatch.setitem(registry._modules, backend, module)
    monkeypatch.setattr(triton, "BY_NAME_ONLY", False)
    monkeypatch.setattr(registry, "_default", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", invented.__getitem__)
    gpu._kept.cache_clear()
    yield invented
    gpu._kept.cache_clear()


def a_gpu(major: int, minor: int, shared: int = 227 << 10) -> SimpleNamespace:
    return SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared)


def on_gpu(index: int, width: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    """What the choice sees of a query."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, size=lambda place: width)


def choice_for(op: str, tensor: Any) -> str:
    return registry.choice(op, "cuda", tensor.dtype, tensor)


@pytest.mark.parametrize("compiling", [False, True])
def test_an_old_gpu_runs_pytorch(
    monkeypatch: pytest.MonkeyPatch, gpus: dict[int, SimpleNamespace], compiling: bool
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    gpus.update({0: a_gpu(7, 5), 1: a_gpu(8, 0), 2: a_gpu(12, 0)})
    assert registry.choice("dropout", "cuda", torch.float32) == "torch"
    assert [choice_for("dropout", on_gpu(index)) for index in gpus] == ["torch", "native", "native"]
    wanted = "needs a GPU of compute capability 8.0 or more, this one has 7.5"
    assert registry.unavailable("dropout", "native", "cuda", torch.float32) == wanted
    assert registry.unavailable("dropout", "triton", "cuda", torch.float32, on_gpu(0)) == wanted


def test_heads_that_kernels_do_not_take_go_to_the_next_backend(gpus: dict[int, SimpleNamespace]) -> None:
    gpus.update({0: a_gpu(9, 0), 1: a_gpu(8, 9, 99 << 10)})
    for op in ("weighted_attention", "gaussian_attention", "attention_weights", "branched_attention"):
        assert [choice_for(op, on_gpu(0, width)) for width in (64, 128, 129, 256)] == ["native"] * 2 + ["torch"] * 2
        assert [choice_for(op, on_gpu(1, width)) for width in (64, 65, 129)] == ["native", "triton", "torch"]
        assert choice_for(op, on_gpu(1, 128, torch.bfloat16)) == "native"
        for backend in ("native", "triton"):
            with cnm_kernels.use_backend(backend), pytest.raises(BackendUnavailable, match="at most 128, not 160"):
                choice_for(op, on_gpu(0, 160))
    assert choice_for("dropout", on_gpu(1, 256)) == "native"


def test_an_amd_gpu_is_no_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's builds for AMD call their GPUs "cuda"."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.missing() is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(triton, "_INTERPRETED", False)
    reasons = {"native": gpu.missing(), "triton": triton._load_error()}
    for backend, module in (("native", native), ("triton", triton)):
        assert "needs an NVIDIA GPU, and torch" in str(reasons[backend])
        monkeypatch.setattr(module, "LOAD_ERRORS", {"cuda": reasons[backend]})
        monkeypatch.setitem(registry._modules, backend, module)
        assert "is a build for AMD's" in str(registry.unavailable("dropout", backend, "cuda", torch.float32))
    assert registry.choice("dropout", "cuda", torch.float32) == "torch"


def test_importing_starts_no_cuda() -> None:
    """Else CUDA_VISIBLE_DEVICES would do nothing afterwards, and forked processes could not use the GPU."""
    code = (
        "import torch\n"
        "def fail(*arguments): raise RuntimeError('CUDA was started')\n"
        "torch.cuda.is_available = torch.cuda.init = torch.cuda._lazy_init = torch.cuda.current_device = fail\n"
        "torch.cuda.device_count = lambda: 1\n"
        "import cnm_kernels, cnm, cnm.cli"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tempfile.gettempdir(), env=environment)


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
