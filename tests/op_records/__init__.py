"""The records of the ops, for tests and fuzzer: ``<op>.py`` holds that of an op."""

from __future__ import annotations

from importlib import import_module

from cnm_kernels import registry
from op_records.record import Record

RECORDS: dict[str, Record] = {op: import_module(f"op_records.{op}").RECORD for op in registry.OPS}
REFERENCES = {op: record.reference for op, record in RECORDS.items()}
SAMPLES = {op: record.samples for op, record in RECORDS.items()}
DIFFERENTIABLE = {op: record.differentiable for op, record in RECORDS.items()}
