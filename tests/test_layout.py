"""One op, one name: its files are found by it, and "add an op" in HACKING.md lists what a new one touches."""

from __future__ import annotations

import importlib
import inspect
import random
import re
from pathlib import Path

import pytest
import torch
from op_records import RECORDS, REFERENCES, SAMPLES
from op_records.anything import Anything

import cnm_kernels
from cnm_kernels import native, op_list, ops, reference, registry

ROOT = Path(__file__).parents[1]
HACKING = (ROOT / "HACKING.md").read_text(encoding="utf-8")
OPS_WITH_KERNELS = [op for op in op_list.OPS if not op.composed]
ON_GPUS = [op for op in OPS_WITH_KERNELS if not op.library]
PUBLIC_WITHOUT_BACKENDS = {"negative_gaussian_masks"}  # a function of other ops
NAMES = [op.name for op in op_list.OPS]


def names(ops: list[op_list.Op]) -> list[str]:
    return [op.name for op in ops]


def listed(section: str) -> list[str]:
    """The files of a list of HACKING.md."""
    return re.findall(r"^- `(\S+)`: ", section, re.M)


def lists() -> tuple[list[str], list[str]]:
    """The lists of "add an op": files for CPUs, and more files for GPUs."""
    section = HACKING.split("## Add an op")[1].split("\n## ")[0]
    cpu, gpu = section.split("these two besides")
    return listed(cpu), listed(gpu)


def located(path: str, op: op_list.Op) -> str:
    """The file of this op that a path of HACKING.md stands for."""
    name = op.name if path.startswith(("cnm_kernels/ops/", "tests/")) else op.file
    if re.fullmatch(r"csrc/c\w+/<op>\.cpp|csrc/cuda/<op>\.cu", path):
        name = op.cpp or op.file
    if op.library and path in ("csrc/<op>.h", "csrc/<op>_op.cpp"):
        path = path.replace("csrc/", "csrc/cpu/")
    return path.replace("<op>", name)


def test_the_public_functions_are_the_ops() -> None:
    assert set(ops.__all__) == set(NAMES) | PUBLIC_WITHOUT_BACKENDS
    assert tuple(NAMES) == registry.OPS
    for name in NAMES:
        function = getattr(cnm_kernels, name)
        assert function is getattr(ops, name)
        assert (function.__name__, function.__module__) == (name, f"cnm_kernels.ops.{name}")


@pytest.mark.parametrize("op", NAMES)
def test_an_op_has_its_reference_record_samples_and_tests(op: str) -> None:
    assert getattr(reference, op).__name__ == REFERENCES[op].__name__ == op
    record = RECORDS[op]
    used = {*record.typical, *record.large, *record.smooth, record.valid, record.in_use}
    assert used <= SAMPLES[op].keys()
    for seed in range(8):  # the fuzzer hands over arguments that this op has, and all that it must have
        inspect.signature(getattr(ops, op)).bind(**record.fuzzed(Anything(random.Random(seed))))


@pytest.mark.parametrize("op", OPS_WITH_KERNELS, ids=names(OPS_WITH_KERNELS))
def test_an_op_has_the_files_that_hacking_names(op: op_list.Op) -> None:
    cpu, gpu = lists()
    for path in [*cpu, *([] if op.library else gpu)]:
        assert (ROOT / located(path, op)).is_file(), located(path, op)


@pytest.mark.parametrize("op", [op for op in op_list.OPS if op.composed], ids=lambda op: op.name)
def test_a_composed_op_has_its_files_of_python(op: op_list.Op) -> None:
    for path in lists()[0]:
        assert path.startswith("csrc/") or (ROOT / located(path, op)).is_file(), located(path, op)


def test_the_counts_that_hacking_states() -> None:
    cpu, gpu = lists()
    stated = re.search(r"For CPUs (\d+) files.*With GPUs (\d+),", HACKING, re.S)
    assert stated is not None
    assert tuple(map(int, stated.groups())) == (len(cpu), len(cpu) + len(gpu)) == (10, 12)


@pytest.mark.parametrize("file", op_list.kernel_files())
def test_kernels_have_a_schema_and_a_formula_of_their_name(file: str) -> None:
    (binding,) = (ROOT / "csrc").rglob(f"{file}_op.cpp")
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', binding.read_text(encoding="utf-8"))
    assert set(schemas) in ({file}, {file, f"{file}_backward"})
    formula = importlib.import_module(f"cnm_kernels.autograd.{file}")
    assert callable(formula.register)


def test_no_file_is_of_an_op_that_is_not_listed() -> None:
    files = {op.file for op in op_list.OPS}
    for folder, shared in (("ops", {"__init__", "_call", "_checks"}), ("autograd", {"__init__", "operator"})):
        found = {path.stem for path in (ROOT / "cnm_kernels" / folder).glob("*.py")} - shared
        assert found == (set(ops.__all__) if folder == "ops" else files)
    bindings = {path.stem.removesuffix("_op") for path in (ROOT / "csrc").rglob("*_op.cpp")}
    assert bindings == set(op_list.kernel_files())


@pytest.mark.skipif("cpu" in native.LOAD_ERRORS, reason="the C++ module is not built")
def test_the_compiled_backend_has_every_op_and_operator() -> None:
    for op in op_list.OPS:
        assert getattr(native, op.name).__name__ == op.name
    for file in op_list.kernel_files():
        assert hasattr(torch.ops.cnm_kernels, file)
