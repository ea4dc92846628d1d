"""Every refusal of the public ops: its type, the argument it names, what was given and what is expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from op_records import DIFFERENTIABLE, RECORDS, SAMPLES
from op_records.draw import Inputs
from samples import sample

import cnm_kernels

VALID = {op: record.valid for op, record in RECORDS.items()}
INTEGERS = {op: record.integers for op, record in RECORDS.items() if record.integers}
OWN_DTYPE = {op: record.own_dtype for op, record in RECORDS.items() if record.own_dtype}
ATTENTION = ("weighted_attention", "gaussian_attention", "branched_attention")
FLOATING = [(op, name) for op, names in DIFFERENTIABLE.items() for name in names]


def valid(op: str) -> Inputs:
    return sample(op, VALID[op], torch.float32)


def refused(op: str, inputs: Inputs, error: type[Exception], *fragments: str) -> None:
    with pytest.raises(error) as caught:
        getattr(cnm_kernels, op)(**inputs)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize("op", VALID)
def test_the_samples_are_accepted(op: str) -> None:
    assert set(VALID) == set(SAMPLES)
    getattr(cnm_kernels, op)(**valid(op))


@pytest.mark.parametrize(("op", "name"), [*FLOATING, *((op, name) for op, names in INTEGERS.items() for name in names)])
def test_no_tensor(op: str, name: str) -> None:
    inputs = valid(op)
    inputs[name] = [1.0, 2.0]
    refused(op, inputs, TypeError, f"{name} must be a tensor, got list")


@pytest.mark.parametrize(("op", "name"), FLOATING)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_no_floating_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    inputs = valid(op)
    inputs[name] = inputs[name].to(dtype)
    refused(op, inputs, TypeError, "must be a float32, bfloat16, float16 or float64 tensor", f"got {dtype}")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in DIFFERENTIABLE.items() for name in names[1:]])
def test_mixed_dtypes(op: str, name: str) -> None:
    inputs = valid(op)
    inputs[name] = inputs[name].bfloat16()
    if op == "dropout_add_layer_norm" and name == "residual":
        getattr(cnm_kernels, op)(**inputs)  # documented: runs in the wider dtype
        return
    own = name in OWN_DTYPE.get(op, ())
    wanted = "torch.float32 or torch.float32" if own else "torch.float32"
    refused(op, inputs, TypeError, f"{name} must be {wanted} as {DIFFERENTIABLE[op][0]} is, got torch.bfloat16")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in OWN_DTYPE.items() for name in names])
def test_some_arguments_may_stay_float32(op: str, name: str) -> None:
    inputs = {
        key: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != name
        else value
        for key, value in valid(op).items()
    }
    getattr(cnm_kernels, op)(**inputs)
    refused(op, inputs | {name: inputs[name].half()}, TypeError, name, "torch.bfloat16 or torch.float32")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in INTEGERS.items() for name in names])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_no_int64(op: str, name: str, dtype: torch.dtype) -> None:
    inputs = valid(op)
    inputs[name] = inputs[name].to(dtype)
    refused(op, inputs, TypeError, f"{name} must be an int64 tensor, got {dtype}")


EVERY_TENSOR = [*FLOATING, *((op, name) for op, names in INTEGERS.items() for name in names)]


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in EVERY_TENSOR if name != "x" and name != DIFFERENTIABLE[op][0]]
)
def test_other_device(op: str, name: str) -> None:
    inputs = valid(op)
    inputs[name] = inputs[name].to("meta")
    first = DIFFERENTIABLE[op][0]
    refused(op, inputs, ValueError, f"{name} is on meta but {first} is on cpu; move one")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in EVERY_TENSOR if (op, name) != ("dropout", "x")])
def test_a_size_that_disagrees(op: str, name: str) -> None:
    """One row more in the last dimension: the message shows the shape that was given."""
    inputs = valid(op)
    tensor = inputs[name]
    inputs[name] = torch.cat([tensor, tensor[..., :1]], -1)
    free = {(attention, "query"): "key" for attention in ATTENTION}
    first = DIFFERENTIABLE[op][0]
    blamed = free.get((op, name)) or (name if name != first else DIFFERENTIABLE[op][1])
    with pytest.raises(ValueError, match=rf"^{op}: {blamed} must have shape \[.*\].*, got \[.*\]$") as error:
        getattr(cnm_kernels, op)(**inputs)
    assert str(error.value).endswith(f"got {list(inputs[blamed].shape)}")


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, name in EVERY_TENSOR
        if op not in ("gaussian_mask", "dropout") and name not in ("x", "residual")
    ],
)
def test_a_dimension_too_many(op: str, name: str) -> None:
    inputs = valid(op)
    inputs[name] = inputs[name][None, None]  # one more may mean K proposals per sentence
    refused(op, inputs, ValueError, f"{name} must have shape [", f"got {list(inputs[name].shape)}")


def test_the_message_shows_what_earlier_arguments_fixed() -> None:
    inputs = valid("weighted_attention")
    inputs["value"] = inputs["value"][:, :, :-1]
    refused(
        "weighted_attention",
        inputs,
        ValueError,
        "value must have shape [B, H, Lk, d] with B = 3, H = 2, Lk = 17, d = 33, got [3, 2, 16, 33]",
    )


def test_three_branches() -> None:
    inputs = valid("contrastive_reconstruction_loss")
    inputs["hidden"] = inputs["hidden"][:2]
    refused(
        "contrastive_reconstruction_loss", inputs, ValueError, "hidden must have shape [3, B, L, D]", "[2, 3, 5, 8]"
    )


@pytest.mark.parametrize("op", ["linear_nll", "contrastive_reconstruction_loss"])
def test_an_empty_vocabulary(op: str) -> None:
    inputs = valid(op)
    inputs |= {"weight": inputs["weight"][:0], "bias": inputs["bias"][:0]}
    refused(op, inputs, ValueError, "weight must hold at least one word", "got shape [0, ")


@pytest.mark.parametrize("op", ["linear_nll", "contrastive_reconstruction_loss"])
def test_words_of_no_columns(op: str) -> None:
    inputs = valid(op)
    inputs |= {"hidden": inputs["hidden"][..., :0], "weight": inputs["weight"][:, :0]}
    refused(op, inputs, ValueError, "weight must have at least one column", ", 0]")


@pytest.mark.parametrize("op", ATTENTION)
def test_heads_of_no_dim(op: str) -> None:
    inputs = valid(op)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name][..., :0]
    refused(op, inputs, ValueError, "query must have a head and a head dim, both >= 1", ", 0]")


@pytest.mark.parametrize("op", ATTENTION)
def test_no_heads(op: str) -> None:
    inputs = valid(op)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name][:, :0]
    refused(op, inputs, ValueError, "query must have a head and a head dim, both >= 1", "0, ")


def test_no_heads_to_absorb() -> None:
    inputs = valid("absorbed_attention")
    for name in ("key", "value", "key_bias"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][:, :0]
    refused("absorbed_attention", inputs, ValueError, "key must have at least one head", "0, ")


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("gaussian_mask", "length", -1, "length must be between 0 and"),
        ("gaussian_mask", "alpha", -0.5, "alpha must be between 0 and 1e+30, got -0.5"),
        ("gaussian_mask", "alpha", float("nan"), "alpha must be between 0 and 1e+30, got nan"),
        ("gaussian_mask", "min_width", 0.0, "min_width must be above 0, got 0.0"),
        ("gaussian_mask", "min_width", float("nan"), "min_width must be above 0, got nan"),
        ("gaussian_attention", "alpha", -1, "alpha must be between 0 and 1e+30, got -1"),
        ("gaussian_attention", "min_width", -1.0, "min_width must be above 0, got -1.0"),
        ("weighted_attention", "scale", float("inf"), "scale must be between -1.79769e+308 and 1.79769e+308, got inf"),
        ("absorbed_attention", "scale", float("inf"), "scale must be between -1.79769e+308 and 1.79769e+308, got inf"),
        ("absorbed_attention", "scale", float("nan"), "scale must be between -1.79769e+308 and 1.79769e+308, got nan"),
        ("linear_nll", "label_smoothing", 1.5, "label_smoothing must be between 0 and 1, got 1.5"),
        ("linear_nll", "label_smoothing", -0.1, "label_smoothing must be between 0 and 1, got -0.1"),
        ("contrastive_reconstruction_loss", "label_smoothing", 2, "label_smoothing must be between 0 and 1, got 2"),
        ("dropout", "p", 1.1, "p must be between 0 and 1, got 1.1"),
        ("dropout", "p", float("nan"), "p must be between 0 and 1, got nan"),
        ("dropout_add_layer_norm", "p", -0.1, "p must be between 0 and 1, got -0.1"),
    ],
)
def test_a_number_out_of_range(op: str, name: str, value: Any, message: str) -> None:
    refused(op, valid(op) | {name: value}, ValueError, message)


@pytest.mark.parametrize("op", ["dropout", "dropout_add_layer_norm"])
@pytest.mark.parametrize(
    "seed",
    [torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor(1, device="meta")],
)
def test_a_seed_that_is_none(op: str, seed: torch.Tensor) -> None:
    refused(op, valid(op) | {"seed": seed}, ValueError, "seed must be an int or one int64 element on cpu", "got torch.")


@pytest.mark.parametrize("op", VALID)
def test_messages_hold_under_compile(op: str) -> None:
    """A refusal while tracing still says what is wrong."""
    inputs = valid(op)
    name = DIFFERENTIABLE[op][-1]
    inputs[name] = inputs[name].to(torch.complex64)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape("must be a float32, bfloat16, float16 or float64 tensor")):
        torch.compile(getattr(cnm_kernels, op), backend="eager")(**inputs)
