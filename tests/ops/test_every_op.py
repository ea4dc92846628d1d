"""Tests of all ops, samples, dtypes and backends; tests of one op alone are in ``test_<op>.py``."""

from __future__ import annotations

import pytest
import torch
from op_checks import (
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradcheck,
    check_gradients,
    check_gradients_one_at_a_time,
    check_library_ops,
    check_values,
)
from op_records import RECORDS, REFERENCES, SAMPLES
from samples import cases, sample

from cnm_kernels import registry

ARGUMENTS = ("op", "name", "backend", "device", "dtype")
ALL = {op: list(names) for op, names in SAMPLES.items()}
TYPICAL = {op: record.typical for op, record in RECORDS.items()}
LARGE = {op: record.large for op, record in RECORDS.items()}
SMOOTH = [(op, name) for op, record in RECORDS.items() for name in record.smooth]


def test_every_op_has_samples_a_record_and_a_reference() -> None:
    assert set(SAMPLES) == set(REFERENCES) == set(RECORDS) == set(registry.OPS)


@pytest.mark.parametrize(ARGUMENTS, cases(ALL, large=LARGE))
def test_values(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_values(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(ALL, large=LARGE))
def test_gradients(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_gradients(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(TYPICAL, [torch.float32]))
def test_gradients_one_at_a_time(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_gradients_one_at_a_time(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(("op", "name"), SMOOTH)
def test_gradcheck(op: str, name: str) -> None:
    check_gradcheck(op, sample(op, name, torch.float64))


@pytest.mark.parametrize(ARGUMENTS, cases(LARGE, [torch.float32, torch.bfloat16], LARGE))
def test_deterministic(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_deterministic(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(TYPICAL, [torch.float32]))
def test_compiles(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_compiles(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(TYPICAL, [torch.float32]))
def test_library_ops(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_library_ops(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(TYPICAL, [torch.float32]))
def test_autocast(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_autocast(op, sample(op, name, dtype, device), backend, RECORDS[op].autocast)
