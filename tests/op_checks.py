"""Checks for every op on every backend: right values and gradients, the same bits again, and a compilable graph.

Error budget. A backend's largest error against float64 may be four times that of plain PyTorch in the dtype under test,
plus a rounding or two of the tensor's scale. Plain PyTorch is the torch backend; the torch backend itself is held to
the test's own formula, computed in float32 and rounded once. Where plain PyTorch happens to be lucky, what one more
rounding of the inputs would change counts as its error (attention next to a complement's zero, for one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_records import DIFFERENTIABLE, RECORDS, REFERENCES
from op_records.draw import Inputs
from samples import run
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cnm_kernels

TIMES_PLAIN = 4
SLACK = {  # of the tensor's scale; float64 has no plain computation to be compared with
    torch.float64: 1e-10,
    torch.float32: 2 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
# Gradients sum products of standard normals: single terms reach this, also where the sum cancels to nothing.
GRADIENT_TERM = 8.0


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Contiguous copies of the floating tensors in another dtype."""
    return {
        name: value.detach().to(dtype).contiguous()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded_once_more(op: str, inputs: Inputs) -> Inputs:
    """Returns float64 inputs; an ill-conditioned op's are moved by half or no float32 rounding, away from zero.

    Not towards it: a width at the clamp must stay at or above it.
    """
    moved = in_dtype(inputs, torch.float64)
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    if not RECORDS[op].ill_conditioned or first.dtype == torch.float64:
        return moved
    generator = torch.Generator().manual_seed(2)
    for name, value in moved.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            step = torch.randint(2, value.shape, generator=generator).to(value.device)
            moved[name] = value * (1 + step * torch.finfo(torch.float32).eps / 2)
    return moved


def nearby(op: str, inputs: Inputs) -> list[Inputs]:
    """Inputs that differ by one more rounding, also of a Gaussian's exponent: exp(-x) is then off by x roundings."""
    near = [rounded_once_more(op, inputs)]
    if "alpha" in inputs and next(v for v in inputs.values() if isinstance(v, Tensor)).dtype != torch.float64:
        steeper = inputs["alpha"] * (1 + torch.finfo(torch.float32).eps)
        near.append(in_dtype(inputs, torch.float64) | {"alpha": steeper})
    return near


def assert_within_budget(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    moved: Sequence[Tensor],
    scale: float,
    operands: torch.dtype | None = None,
) -> None:
    """``exact`` is float64, ``plain`` what plain PyTorch gives in the dtype of ``actual``, ``moved`` what slightly
    different inputs give, ``scale`` the least size of what was summed, ``operands`` the dtype that what was summed was
    rounded to, if not that of ``actual``. NaNs must coincide."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    slack = SLACK[operands or actual.dtype]
    actual, exact, plain = actual.detach().double(), exact.detach(), plain.detach().double()
    assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN where there should be none, or the reverse"
    number = ~exact.isnan()
    if not number.any():
        return
    error = (actual - exact)[number].abs().max().item()
    plain_error = max((other.detach() - exact)[number].abs().max().item() for other in (plain, *moved))
    allowed = TIMES_PLAIN * plain_error + slack * max(scale, exact[number].abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (plain {plain_error:.3g})"


def check_values(op: str, inputs: Inputs, backend: str) -> None:
    """Every output against the test's formula in float64; dtypes as documented."""
    outputs = run(op, inputs, backend)
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    expected_dtype = wide(first.dtype) if RECORDS[op].returns_float32 else first.dtype
    exact = REFERENCES[op](**in_dtype(inputs, torch.float64))
    plain = _plain(op, inputs, backend)
    moved = [REFERENCES[op](**near) for near in nearby(op, inputs)]
    scale = max((output.abs().max().item() for output in exact if output.numel()), default=0.0)
    scale = 0.0 if math.isnan(scale) else scale
    if inputs.get("complement"):
        scale = max(scale, 1.0)  # 1 - g: a rounding of g is left where g is nearly 1
    assert len(outputs) == len(exact)
    for i, output in enumerate(outputs):
        assert output.dtype == expected_dtype, f"output {i} is {output.dtype}, expected {expected_dtype}"
        assert output.device == first.device
        assert_within_budget(
            f"output {i}", output, exact[i], plain[i].to(output.dtype), [near[i] for near in moved], scale
        )


def check_gradients(op: str, inputs: Inputs, backend: str, names: Sequence[str] | None = None) -> None:
    """The gradient of every differentiable input (or of ``names`` alone) against that of the formula in float64."""
    names = [name for name in names or DIFFERENTIABLE[op] if inputs.get(name) is not None]
    actual = gradients_of(lambda **inputs: run(op, inputs, backend), inputs, names)
    exact = gradients_of(REFERENCES[op], in_dtype(inputs, torch.float64), names)
    moved = [gradients_of(REFERENCES[op], near, names) for near in nearby(op, inputs)]
    if backend == "torch":
        plain = gradients_of(REFERENCES[op], in_dtype(inputs, wide(inputs[names[0]].dtype)), names)
    else:
        plain = gradients_of(lambda **inputs: run(op, inputs, "torch"), inputs, names)
    terms = dict.fromkeys(names, GRADIENT_TERM)
    if op in ("weighted_attention", "gaussian_attention", "branched_attention"):
        terms |= attention_terms(inputs, GRADIENT_TERM)
    if op == "gaussian_attention":
        terms |= gaussian_terms(inputs)
    if op == "attention_weights":
        terms |= attention_terms(inputs, GRADIENT_TERM) | key_weight_terms(inputs, 1.0)
    if op == "weighted_attention":
        terms |= key_weight_terms(inputs, GRADIENT_TERM)
    for name in names:
        assert actual[name].dtype == inputs[name].dtype
        plain_gradient = plain[name].to(inputs[name].dtype)
        operands = inputs["hidden"].dtype if RECORDS[op].softmax_products else None
        near = [gradients[name] for gradients in moved]
        assert_within_budget(f"d {name}", actual[name], exact[name], plain_gradient, near, terms[name], operands)


def attention_terms(inputs: Inputs, score_gradient: float) -> dict[str, float]:
    """Size of the terms of d query and d key: a score's gradient, rounded to the dtype as tensor cores need it, times
    scale times the other operand, which extreme logits make large."""
    scale = inputs.get("scale") or inputs["query"].size(-1) ** -0.5

    def size(name: str) -> float:
        operand = inputs[name].detach()
        return abs(scale) * operand.abs().max().item() if operand.numel() else 0.0

    return {
        "query": score_gradient * max(1.0, size("key")),
        "key": score_gradient * max(1.0, size("query")),
    }


def gaussian_terms(inputs: Inputs) -> dict[str, float]:
    """Size of the terms of d center and d width in ``gaussian_attention``: P_ij (dP_ij - delta_i) d log m_j."""
    inputs = in_dtype(inputs, torch.float64)
    mask_inputs = {
        name: inputs[name] for name in ("center", "width", "alpha", "min_width", "complement") if name in inputs
    }
    mask_inputs["length"] = inputs["key"].size(2)
    (mask,) = REFERENCES["gaussian_mask"](**mask_inputs)
    scores = {name: inputs[name] for name in ("query", "key", "causal", "key_lengths", "scale") if name in inputs}
    weights = REFERENCES["attention_weights"](**scores, key_weight=mask)[0].sum(1)  # [B, Lk]

    if mask_inputs["length"] == 0:
        return {}

    def sizes(name: str) -> Tensor:
        def log_mask(moment: Tensor) -> Tensor:
            return torch.log(REFERENCES["gaussian_mask"](**mask_inputs | {name: moment})[0] + 1e-10).sum(0)

        slopes = torch.autograd.functional.jacobian(log_mask, inputs[name])  # [Lk, B]
        return (weights * slopes.abs().T).sum(1)

    return {name: GRADIENT_TERM * max(sizes(name).tolist(), default=0.0) for name in ("center", "width")}


def key_weight_terms(inputs: Inputs, difference: float) -> dict[str, float]:
    """Size of the terms of d key_weight: P_ij / m_j, which small weights make large, times a difference dP_ij - delta_i
    of two numbers of this size."""
    if inputs.get("key_weight") is None or inputs["key_weight"].numel() == 0:
        return {}
    inputs = in_dtype(inputs, torch.float64)
    scores = {name: value for name, value in inputs.items() if name != "value"}
    weights = REFERENCES["attention_weights"](**scores)[0].detach().sum(1)  # [B, Lk]
    ratio = (weights / (inputs["key_weight"].detach() + 1e-10)).max().item()
    return {"key_weight": difference * max(1.0, ratio)}


def check_gradients_one_at_a_time(op: str, inputs: Inputs, backend: str) -> None:
    """A gradient is right whichever others are wanted."""
    for name in DIFFERENTIABLE[op]:
        if inputs.get(name) is not None:
            check_gradients(op, inputs, backend, [name])


def check_deterministic(op: str, inputs: Inputs, backend: str) -> None:
    """The same bits from run to run and, where the reductions are ours, whatever the number of threads."""

    def once(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            outputs = run(op, inputs, backend)
            gradients = gradients_of(lambda **inputs: run(op, inputs, backend), inputs, DIFFERENTIABLE[op])
        finally:
            torch.set_num_threads(before)
        return [*outputs, *gradients.values()]

    first = once(1)
    # PyTorch's own reductions may follow the thread count; Triton has no threads, and its interpreter is slow. The
    # emulator runs a GPU's threads in another order each time.
    for threads in {"native": (1, 2, 3), "torch": (1, 1), "triton": (1,), "cuda_emulation": (1, 1)}[backend]:
        for tensor, again in zip(first, once(threads), strict=True):
            assert torch.equal(tensor, again)


def check_compiles(op: str, inputs: Inputs, backend: str) -> None:
    """torch.compile(fullgraph=True) traces forward and backward, and the graph gives what eager gives."""
    torch._dynamo.reset()
    eager = gradients_of(lambda **inputs: run(op, inputs, backend), inputs, DIFFERENTIABLE[op])
    function = torch.compile(getattr(cnm_kernels, op), fullgraph=True, backend="aot_eager")

    def compiled(**inputs: Any) -> tuple[Tensor, ...]:
        outputs = function(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    with cnm_kernels.use_backend(backend):
        gradients = gradients_of(compiled, inputs, DIFFERENTIABLE[op])
        outputs = compiled(**inputs)
    for actual, expected in zip(outputs, run(op, inputs, backend), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, eager[name])


def check_library_ops(op: str, inputs: Inputs, backend: str) -> None:
    """``torch.library.opcheck`` on every ``cnm_kernels::`` op that one call reaches."""
    calls: list[tuple[Any, Any, Any]] = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            overload = getattr(function, "default", function)
            if isinstance(overload, torch._ops.OpOverload) and overload.namespace.startswith("cnm_kernels"):
                calls.append((overload, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Record():
        run(op, _requiring_gradients(inputs, DIFFERENTIABLE[op]), backend)
    if not calls and backend == "torch":
        pytest.skip("the torch backend is plain PyTorch: no library op to check")
    assert calls, f"{backend} reaches no cnm_kernels library op for {op}"
    for overload, args, kwargs in calls:
        torch.library.opcheck(overload, args, kwargs)


def check_autocast(op: str, inputs: Inputs, backend: str, cast: Sequence[str]) -> None:
    """Under bfloat16 autocast the op runs as if ``cast`` had been given in it; gradients come back in float32."""
    device = inputs[cast[0]].device.type if cast else "cpu"
    with torch.autocast(device, torch.bfloat16):
        actual = run(op, inputs, backend)
    expected = run(op, inputs | {name: inputs[name].bfloat16() for name in cast if name in inputs}, backend)
    for output, wanted in zip(actual, expected, strict=True):
        assert output.dtype == wanted.dtype
        assert torch.equal(output, wanted)

    def under_autocast(**inputs: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            return run(op, inputs, backend)

    for name, gradient in gradients_of(under_autocast, inputs, DIFFERENTIABLE[op]).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


def check_gradcheck(op: str, inputs: Inputs) -> None:
    """Numerical differentiation of the torch backend in float64."""
    names = [name for name in DIFFERENTIABLE[op] if inputs.get(name) is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run(op, inputs | dict(zip(names, tensors, strict=True)), "torch")

    assert torch.autograd.gradcheck(function, [inputs[name].detach().requires_grad_() for name in names])


def _plain(op: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    if backend != "torch":
        return run(op, inputs, "torch")
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    return REFERENCES[op](**in_dtype(inputs, wide(first.dtype)))


def _requiring_gradients(inputs: Inputs, names: Sequence[str]) -> Inputs:
    leaves = {name: inputs[name].detach().requires_grad_() for name in names if inputs.get(name) is not None}
    return inputs | leaves


def gradients_of(
    function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, names: Sequence[str]
) -> dict[str, Tensor]:
    """Gradients of the outputs weighted by fixed normal numbers, rounded to bfloat16 so that every dtype holds them."""
    inputs = _requiring_gradients(inputs, names)
    outputs = [output for output in function(**inputs) if output.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    leaves = {name: inputs[name] for name in names if inputs.get(name) is not None}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
