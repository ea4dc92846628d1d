"""What holds for every op, sample, dtype and backend alike; what is particular to one op is in ``test_<op>.py``."""

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
from references import REFERENCES
from samples import DIFFERENTIABLE, SAMPLES, cases, sample

from cnm_kernels import registry

ARGUMENTS = ("op", "name", "backend", "device", "dtype")
ALL = {op: list(names) for op, names in SAMPLES.items()}
TYPICAL = {  # small ones with every input differentiable and something of each mode
    "gaussian_mask": ["odd-3x5x37-complement"],
    "weighted_attention": ["weighted-causal-lengths-weights"],
    "gaussian_attention": ["causal-lengths-weights", "complement"],
    "branched_attention": ["plain", "lengths-0-1-odd-over"],
    "absorbed_attention": ["weighted", "lengths-0-1-odd-over", "keys-are-values"],
    "linear": ["odd-3x5x37", "lengths-0-1-odd-over", "odd-groups"],
    "linear_nll": ["odd", "lengths-0-1-odd-over"],
    "intra_video_contrastive_loss": ["odd-7"],
    "contrastive_reconstruction_loss": ["plain"],
    "dropout": ["plain"],
    "dropout_add_layer_norm": ["odd-5x37", "chosen-samples"],
}
LARGE = {  # large enough for threads to share the work
    "gaussian_mask": ["published-50"],
    "weighted_attention": ["weighted-frames-200", "weighted-words-20-clips-50"],
    "gaussian_attention": ["frames-200", "complement-words-clips"],
    "branched_attention": ["clips-50"],
    "absorbed_attention": ["frames-200-words-14", "words-13-clips-50"],
    "linear": ["rows-2500", "feed-forward", "words-13-of-256", "heads-of-columns"],
    "linear_nll": ["published-13x256x1112"],
    "intra_video_contrastive_loss": ["published-128"],
    "contrastive_reconstruction_loss": ["published-13x256x1112"],
    "dropout": ["odd-1021"],
    "dropout_add_layer_norm": ["thousand-columns"],
}
AUTOCAST = {  # what autocast casts; everything else runs in the dtype it is given
    "weighted_attention": ("query", "key", "value"),
    "gaussian_attention": ("query", "key", "value"),
    "branched_attention": ("query", "key", "value"),
    "absorbed_attention": ("query", "key", "value"),
    "linear": ("x",),
    "linear_nll": ("hidden", "weight", "bias"),
    "contrastive_reconstruction_loss": ("hidden", "weight", "bias"),
}
SMOOTH = {  # small, and away from kinks and ties, so that finite differences mean something
    "gaussian_mask": ["odd-3x5x37-complement", "length-1", "scalar"],
    "weighted_attention": ["weighted-returned-weights", "weighted-lengths-0-1-odd-over", "unweighted-causal-more-keys"],
    "gaussian_attention": ["causal-more-queries", "complement", "lengths-0-1-odd-over"],
    "branched_attention": ["plain"],
    "absorbed_attention": ["weighted", "lengths-0-1-odd-over"],
    "linear": ["without-bias", "one-row", "odd-groups-without-bias"],
    "linear_nll": ["plain", "lengths-0-1-odd-over", "ignored-targets"],
    "intra_video_contrastive_loss": ["odd-7", "one"],
    "contrastive_reconstruction_loss": ["plain", "ignored-targets"],
    "dropout": ["plain"],
    "dropout_add_layer_norm": ["odd-5x37", "no-dropout"],
}


def test_every_op_has_samples_and_a_reference() -> None:
    assert set(SAMPLES) == set(REFERENCES) == set(DIFFERENTIABLE) == set(registry.OPS)


@pytest.mark.parametrize(ARGUMENTS, cases(ALL))
def test_values(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_values(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(ALL))
def test_gradients(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_gradients(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(ARGUMENTS, cases(TYPICAL, [torch.float32]))
def test_gradients_one_at_a_time(op: str, name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    check_gradients_one_at_a_time(op, sample(op, name, dtype, device), backend)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in SMOOTH.items() for name in names])
def test_gradcheck(op: str, name: str) -> None:
    check_gradcheck(op, sample(op, name, torch.float64))


@pytest.mark.parametrize(ARGUMENTS, cases(LARGE, [torch.float32, torch.bfloat16]))
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
    check_autocast(op, sample(op, name, dtype, device), backend, AUTOCAST.get(op, ()))
