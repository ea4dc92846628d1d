"""Cases of one differentiable op: forward and backward, checked against the op in float64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import cnm_kernels
from benchmarks.registry import OURS, Case, Contender, Goal, Refused

Inputs = dict[str, Any]
Result = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs, gradients

# ||result - float64|| / ||float64||, per tensor. Ours may err this many times what the PyTorch reference errs in the
# same dtype, plus one rounding; a rival, which may round every intermediate to its dtype, a few more roundings, or that
# many times what the case's own reference, plain PyTorch as the rivals are, errs in it.
TIMES_REFERENCE = 4
ROUNDINGS_OURS = 1
ROUNDINGS_RIVAL = 16
WIDENED = (torch.float32, torch.float64)


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def arguments_of(inputs: Inputs, differentiable: Sequence[str], dtype: torch.dtype, compute: torch.dtype) -> Inputs:
    """A case's inputs, tensors of its dtype cast to ``compute``, the differentiable ones as leaves of their own.

    What a narrower case keeps in float32 stays so, except in float64.
    """
    arguments = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and (value.dtype == dtype or (value.dtype, compute) == WIDENED):
            value = value.to(compute)
        arguments[name] = value.clone().requires_grad_() if name in differentiable else value
    return arguments


def op_case(
    *,
    name: str,
    dtype: torch.dtype,
    inputs: Callable[[], Inputs],
    differentiable: Sequence[str],
    upstream: Callable[[Inputs], tuple[Tensor | None, ...]],
    ours: Callable[..., Any],
    rivals: dict[str, Contender],
    recover: Callable[[Inputs, Result], Inputs] | None = None,
    reference: Callable[..., Any] | None = None,
    goals: tuple[Goal, ...] = (),
    flops: float | None = None,
    bytes: float | None = None,
) -> Case:
    """A case whose contenders are functions of named tensors, timed forward and backward.

    Args:
        inputs: seeded inputs in the case's dtype (they may hold float32 tensors too), the same on every call.
        differentiable: names of the inputs whose gradients are asked for.
        upstream: arguments of a call -> the outputs' upstream gradients, None for an output without one.
        ours: the public op.
        recover: for ops that draw random numbers: (inputs, result) -> what was drawn, as keywords for ``reference``.
        reference: ``ours`` as it should be, in float64; default: ``ours`` itself on the PyTorch backend.
    """
    contenders = {OURS: Contender(ours), **rivals}
    label = str(dtype).removeprefix("torch.")
    expected: dict[str, tuple[Tensor, ...]] = {}
    reference_errors: dict[torch.dtype, dict[str, float]] = {}

    def call_of(function: Callable[..., Any], compute: torch.dtype) -> Callable[[], Result]:
        arguments = arguments_of(inputs(), differentiable, dtype, compute)
        leaves = tuple(arguments[key] for key in differentiable)
        gradients = upstream(arguments)

        def call() -> Result:
            outputs = function(**arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pulled = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
            return outputs, torch.autograd.grad([pair[0] for pair in pulled], leaves, [pair[1] for pair in pulled])

        return call

    def prepare(contender: str) -> Callable[[], Result]:
        entry = contenders[contender]
        function = torch.compile(entry.function, dynamic=False, fullgraph=True) if entry.compiled else entry.function
        return call_of(function, entry.dtype or dtype)

    def exact(drawn: Inputs) -> tuple[Tensor, ...]:
        """Outputs and gradients in float64, kept between contenders where nothing random was drawn."""
        if drawn or not expected:
            function = reference or ours
            with cnm_kernels.use_backend("torch"):
                outputs, gradients = call_of(lambda **given: function(**given, **drawn), torch.float64)()
            if drawn:
                return (*outputs, *gradients)
            expected["tensors"] = (*outputs, *gradients)
        return expected["tensors"]

    def errors_of(result: Result) -> dict[str, float]:
        outputs, gradients = result
        names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient of {key}" for key in differentiable)]
        wanted = exact(recover(inputs(), result) if recover else {})
        pairs = zip(names, (*outputs, *gradients), wanted, strict=True)
        return {key: relative_error(got, want) for key, got, want in pairs}

    def errors_of_plain(result: Result, compute: torch.dtype) -> dict[str, float]:
        """What the case's own reference errs in this dtype, with what the result drew."""
        if reference is None:
            return {}
        drawn = recover(inputs(), result) if recover else {}
        return errors_of(call_of(lambda **given: reference(**given, **drawn), compute)())

    def verify(contender: str, call: Callable[[], Any]) -> dict[str, float]:
        entry = contenders[contender]
        if entry.bound:
            return {}
        result = call()
        errors = errors_of(result)
        compute = entry.dtype or dtype
        if compute not in reference_errors:
            with cnm_kernels.use_backend("torch"):
                reference_errors[compute] = errors_of(call_of(ours, compute)())
        allowed, roundings = reference_errors[compute], ROUNDINGS_OURS
        if contender != OURS:
            roundings, plain = ROUNDINGS_RIVAL, errors_of_plain(result, compute)
            allowed = {key: max(error, plain.get(key, 0.0)) for key, error in allowed.items()}
        for key, error in errors.items():
            limit = TIMES_REFERENCE * allowed[key] + roundings * rounding(compute)
            if not error <= limit:
                raise Refused(f"errs by {error:.2g} in {key}, {limit:.2g} allowed")
        return errors

    return Case(name, label, contenders, prepare, verify, goals, flops, bytes)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| (or ||got|| where want is zero); NaN and infinities count as infinite."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach(), want.detach()
    difference = torch.linalg.vector_norm(got.double() - want)
    norm = torch.linalg.vector_norm(want)
    error = difference / norm if norm > 0 else difference
    return float(torch.nan_to_num(error, nan=float("inf"), posinf=float("inf")))


def normal_like(tensor: Tensor) -> tuple[Tensor]:
    """An upstream gradient of this shape and dtype: seeded standard normal without zeros, the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(tensor.shape, generator=generator).bfloat16()
    return (drawn.masked_fill_(drawn == 0, 1).to(tensor.device, tensor.dtype),)
