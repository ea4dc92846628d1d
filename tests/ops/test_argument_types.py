"""Numbers, flags and seeds of every public op: of one type each, NumPy's own beside Python's, nothing else taken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from samples import sample
from test_checks import VALID, refused

import cnm_kernels
from cnm_kernels import registry

FLAGS = {  # bools
    "gaussian_mask": ("complement",),
    "weighted_attention": ("causal",),
    "attention_weights": ("causal",),
    "gaussian_attention": ("complement", "causal"),
    "branched_attention": ("causal",),
    "linear": ("relu",),
    "linear_nll": ("return_accuracy",),
    "dropout_add_layer_norm": ("twice",),
}
NUMBERS = {  # floats, with a value that NumPy's scalars hold exactly
    "gaussian_mask": {"alpha": 5.0, "sigma": 8.0, "min_width": 0.5},
    "weighted_attention": {"scale": 0.5},
    "attention_weights": {"scale": 0.5},
    "gaussian_attention": {"alpha": 5.0, "min_width": 0.5, "scale": 0.5},
    "branched_attention": {"scale": 0.5},
    "absorbed_attention": {"scale": 0.5},
    "linear_nll": {"label_smoothing": 0.5},
    "intra_video_contrastive_loss": {"beta_1": 0.5, "beta_2": 0.25},
    "contrastive_reconstruction_loss": {"label_smoothing": 0.5, "beta_1": 0.5, "beta_2": 0.25},
    "dropout": {"p": 0.5},
    "dropout_add_layer_norm": {"p": 0.5, "eps": 0.5},
}
WHOLE = {
    "gaussian_mask": ("length",),
    "dropout": ("seed", "offset"),
    "dropout_add_layer_norm": ("seed", "offset"),
}
GIVEN = {"gaussian_mask": {"sigma": {"alpha": None}}}  # what goes with an argument
BACKENDS = ["torch", "native"]


def call(op: str, **changes: Any) -> Any:
    return getattr(cnm_kernels, op)(**inputs(op, **changes))


def inputs(op: str, **changes: Any) -> dict[str, Any]:
    also: dict[str, Any] = {}
    for name in changes:
        also |= GIVEN.get(op, {}).get(name, {})
    return sample(op, VALID[op], torch.float32) | changes | also


def flat(table: Any) -> list[tuple[str, str]]:
    return [(op, name) for op, names in table.items() for name in names]


def test_every_argument_that_is_no_tensor_is_tried() -> None:
    tried = {*flat(FLAGS), *flat(NUMBERS), *flat(WHOLE)}
    for op in registry.OPS:
        for name, parameter in inspect.signature(getattr(cnm_kernels, op)).parameters.items():
            if "Tensor" not in parameter.annotation or name == "seed":
                assert (op, name) in tried


@pytest.mark.parametrize(("op", "name"), flat(FLAGS))
@pytest.mark.parametrize("value", [1, 0, 1.0, "yes", None, np.int64(1), torch.tensor(True)], ids=repr)
def test_a_flag_is_a_bool(op: str, name: str, value: Any) -> None:
    refused(op, inputs(op, **{name: value}), TypeError, f"{name} must be True or False, got {type(value).__name__}")


@pytest.mark.parametrize(("op", "name"), flat(NUMBERS))
@pytest.mark.parametrize("value", [True, np.True_, "0.5", [0.5], 0.5j, torch.tensor(0.5)], ids=repr)
def test_a_number_is_a_number(op: str, name: str, value: Any) -> None:
    refused(op, inputs(op, **{name: value}), TypeError, f"{name} must be a number, got {type(value).__name__}")


@pytest.mark.parametrize(("op", "name"), flat(WHOLE))
@pytest.mark.parametrize("value", [True, np.True_, 1.9, np.float64(1.0), "1", None, [1]], ids=repr)
def test_a_whole_number_is_an_int(op: str, name: str, value: Any) -> None:
    refused(op, inputs(op, **{name: value}), TypeError, f"{name} must be an int, got {type(value).__name__}")


@pytest.mark.parametrize("op", ["dropout", "dropout_add_layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_a_seed_is_an_int64_tensor(op: str, dtype: torch.dtype) -> None:
    seed = torch.ones((), dtype=dtype)
    refused(op, inputs(op, seed=seed), ValueError, "seed must be an int or one int64 element on cpu")


NUMPY: list[tuple[str, str, Any, Callable[[Any], Any]]] = [
    *((op, name, True, np.bool_) for op, name in flat(FLAGS)),
    *((op, name, 3, kind) for op, name in flat(WHOLE) for kind in (np.int64, np.uint8)),
    *((op, name, NUMBERS[op][name], kind) for op, name in flat(NUMBERS) for kind in (np.float32, np.float64)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name", "value", "kind"), NUMPY, ids=lambda value: getattr(value, "__name__", None))
def test_numpys_scalars_are_pythons(backend: str, op: str, name: str, value: Any, kind: Callable[[Any], Any]) -> None:
    if registry.unavailable(op, backend, "cpu", torch.float32):
        pytest.skip(f"no {backend} backend here")
    with cnm_kernels.use_backend(backend):
        ours, expected = call(op, **{name: kind(value)}), call(op, **{name: value})
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("growth", [torch.ones(2), torch.ones((), dtype=torch.int64), "1", True])
def test_growth_is_a_number(growth: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^negative_gaussian_masks: growth must "):
        cnm_kernels.negative_gaussian_masks(torch.rand(2), torch.rand(2), 5, sigma=9.0, growth=growth)
