"""What is particular to the compiled backend: every instruction set's code, and an installation without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnm_kernels import native

TESTS = Path(__file__).parent
ISAS = ["portable", "avx2", "avx512", "avx512bf16"]  # worst to best

pytestmark = pytest.mark.skipif(native.LOAD_ERROR is not None, reason=f"native backend: {native.LOAD_ERROR}")


# Run in the tests folder: the checkout itself would hide an installed package.
def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, cwd=TESTS, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_a_lower_instruction_set_can_be_asked_for(isa: str) -> None:
    runs_on = run("-c", "from cnm_kernels import native; print(native.instruction_set())", CNM_KERNELS_CPU_ISA=isa)
    best = native.instruction_set()
    assert runs_on.strip() == ISAS[min(ISAS.index(isa), ISAS.index(best))]


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_values_and_gradients_on_every_instruction_set(isa: str) -> None:
    """The op tests again, on the code that this machine would not choose."""
    if ISAS.index(isa) >= ISAS.index(native.instruction_set()):
        pytest.skip(f"this machine's best is {native.instruction_set()}, which the op tests run on")
    selected = "native and (test_values or test_gradients) and not one_at_a_time"
    output = run("-m", "pytest", "-q", str(TESTS / "test_every_op.py"), "-k", selected, CNM_KERNELS_CPU_ISA=isa)
    assert " passed" in output


def test_without_the_extension_the_package_says_so_and_works(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["cnm_kernels._C_cpu"] = None  # what an import finds where it was not built
import torch, cnm_kernels
from cnm_kernels import registry
assert registry.choice("dropout", "cpu", torch.float32) == "torch"
assert cnm_kernels.dropout(torch.ones(8), 0.5, seed=1).shape == (8,)
print(registry.unavailable("dropout", "native", "cpu", torch.float32))
try:
    with cnm_kernels.use_backend("native"):
        cnm_kernels.dropout(torch.ones(8), 0.5, seed=1)
except cnm_kernels.BackendUnavailable as error:
    print(error)
"""
    lines = run("-c", code).splitlines()
    assert "the compiled kernels are not there" in lines[0]
    assert "CNM_KERNELS_NATIVE=1" in lines[0]
    assert lines[1].startswith("dropout: backend 'native' was asked for but")
