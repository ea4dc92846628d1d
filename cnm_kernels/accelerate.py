"""Drop-in acceleration of published research code: ``accelerate(model)``, ``accelerate_losses(module)``, ``restore``.

Modules and functions are found by what they look like, not by where they were imported from, and each is tried beside
its replacement on a small example before it is replaced: what computes something else is left alone, and said.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cnm_kernels import accelerated_losses
from cnm_kernels.accelerated_attention import AcceleratedAttention
from cnm_kernels.accelerated_losses import DeferredLinear

Model = TypeVar("Model", bound=nn.Module)

FORWARD_ARGUMENTS = [
    "query",
    "key",
    "value",
    "key_padding_mask",
    "incremental_state",
    "need_weights",
    "static_kv",
    "attn_mask",
    "fast_weights",
    "gauss_weight",
]
# ||ours - theirs|| / ||theirs|| on the small example: far above rounding, far below another formula.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def accelerate(model: Model) -> Model:
    """Routes every attention module of ``model`` that has the published interface to ``weighted_attention``.

    Such a module has ``in_proj_weight`` [3D, D], ``in_proj_bias``, ``out_proj``, ``num_heads``, ``head_dim`` and
    ``forward(query, key, value, key_padding_mask, incremental_state, need_weights, static_kv, attn_mask, fast_weights,
    gauss_weight)``, time first. Only its class changes: parameters, state_dict, hooks, train and eval mode, device
    moves, copies, DataParallel and DDP work as before, and ``restore`` undoes it. The attention it returns beside its
    output is computed when it is read. A model pickled whole needs cnm_kernels to be loaded again; a state_dict does
    not.

    Source: the published code of CNM (AAAI 2022) and CPL (CVPR 2022), as behaviour.

    Returns:
        ``model`` itself. A module left alone although it looks the part, and a model without any, give a warning.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    found = 0
    refusals: dict[type, str | None] = {}
    for module in model.modules():
        if isinstance(module, AcceleratedAttention):
            found += 1
            continue
        if not _looks_like_attention(module):
            continue
        kind = type(module)
        if kind not in refusals:
            refusals[kind] = _differs(module)
        reason = _unsupported(module) or refusals[kind]
        if reason is None:
            module.__class__ = _accelerated(kind)
            found += 1
        else:
            warnings.warn(f"accelerate: {kind.__name__} is left alone: {reason}", RuntimeWarning, stacklevel=2)
    if not found:
        warnings.warn(
            f"accelerate: {type(model).__name__} has no attention module with the published interface; nothing changed",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def accelerate_losses(losses: Any, model: nn.Module | None = None) -> None:
    """Replaces ``cal_nll_loss``, ``rec_loss`` and ``ivc_loss`` of a module by fused ones of the same signatures.

    CNM's and CPL's are told apart by their arguments; values, dicts and gradients stay the same. Every loaded module
    that imported one of these functions by name gets the new one too.

    Args:
        losses: the module (or any object with such attributes) that holds the functions.
        model: also give this model's layer over the vocabulary, the ``nn.Linear`` with ``model.vocab_size`` outputs (or
            pass the layer itself), results that are computed when read. These losses never read them: they fuse the
            layer with the cross entropy, and no logits are made. Logits that are read anyway must be read before
            ``optimizer.step()`` changes the layer, and a ``RuntimeError`` says so where they are not.

    Raises:
        ValueError: nothing of that name and signature, or no such layer.
    """
    accelerated_losses.replace(losses, stacklevel=3)
    if model is not None:
        for layer in _vocabulary_layers(model):
            layer.__class__ = DeferredLinear


def restore(target: Any) -> None:
    """Undoes ``accelerate`` on a model, or ``accelerate_losses`` on what holds the losses."""
    if not isinstance(target, nn.Module):
        accelerated_losses.restore(target)
        return
    for module in target.modules():
        if isinstance(module, AcceleratedAttention):
            module.__class__ = type(module)._original  # type: ignore[attr-defined]
        elif isinstance(module, DeferredLinear):
            module.__class__ = nn.Linear


@functools.cache
def _accelerated(original: type[nn.Module]) -> type[nn.Module]:
    """``original`` with the accelerated ``forward``; instances of it are still instances of ``original``."""
    attributes = {"_original": original, "__reduce_ex__": _reduce, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (AcceleratedAttention, original), attributes)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickles and copies by the original class, which can be imported."""
    original = type(self)._original  # type: ignore[attr-defined]
    made_by, arguments, *state = original.__reduce_ex__(self, protocol)
    if made_by is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return (made_by, arguments, *state)
    return (_new, (original,), *state)


def _new(original: type[nn.Module]) -> nn.Module:
    accelerated = _accelerated(original)
    return accelerated.__new__(accelerated)


def _looks_like_attention(module: nn.Module) -> bool:
    names = ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads", "head_dim")
    if not all(hasattr(module, name) for name in names) or "forward" in vars(module):
        return False
    return list(inspect.signature(type(module).forward).parameters)[1:] == FORWARD_ARGUMENTS


def _unsupported(module: Any) -> str | None:
    """Why the published options this module uses have no fast path, or None."""
    D = module.num_heads * module.head_dim
    weight = module.in_proj_weight
    if not isinstance(weight, Tensor) or weight.shape != (3 * D, D):
        return f"in_proj_weight must be a tensor of shape [{3 * D}, {D}]"
    if getattr(module, "bias_k", None) is not None or getattr(module, "bias_v", None) is not None:
        return "it adds a learned key and value (bias_k, bias_v)"
    if getattr(module, "add_zero_attn", False):
        return "it adds a zero key (add_zero_attn)"
    if abs(getattr(module, "scaling", module.head_dim**-0.5) * module.head_dim**0.5 - 1) > 1e-6:
        return "its scaling is not head_dim ** -0.5"
    return None


def _differs(module: nn.Module) -> str | None:
    """What a small example shows: None if the accelerated class gives what the module's own gives, or else why not.

    A module that cannot run by itself (the published one needs fairseq) is taken by its word.
    """
    weight: Tensor = module.in_proj_weight  # type: ignore[assignment]
    if weight.is_meta or _unsupported(module) is not None:
        return None
    L, B, D = 4, 2, weight.size(1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    x, source = draw(L, B, D), draw(L + 1, B, D)
    padding = torch.zeros(B, L, dtype=torch.bool, device=weight.device)
    padding[0, -1] = True
    future = torch.full((L, L), -torch.inf, device=weight.device, dtype=weight.dtype).triu(1)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        ((x, x, x, padding), {"attn_mask": future, "gauss_weight": draw(B, L).sigmoid()}),
        ((x, source, source), {"gauss_weight": draw(B, L + 1).sigmoid()}),
    ]
    own, ours = type(module).forward, _accelerated(type(module))
    with _evaluating(module), torch.no_grad():
        for arguments, options in calls:
            try:
                expected = own(module, *arguments, **options)
            except ImportError:
                return None
            except Exception as error:
                return f"its own forward fails on a small example ({type(error).__name__}: {error})"
            module.__class__ = ours
            try:
                found = ours.forward(module, *arguments, **options)
            finally:
                module.__class__ = ours._original  # type: ignore[attr-defined]
            for name, mine, theirs in zip(("output", "attention"), found, expected, strict=True):
                difference = torch.linalg.vector_norm(mine.double() - theirs.double())
                if not difference <= PROBE_TOLERANCE[weight.dtype] * torch.linalg.vector_norm(theirs.double()):
                    return f"its own forward gives another {name} than the published one on a small example"
    return None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without telling its children."""
    training = module.training
    module.training = False
    try:
        yield
    finally:
        module.training = training


def _vocabulary_layers(model: nn.Module) -> list[nn.Linear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_losses: model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model) in (nn.Linear, DeferredLinear):
        return [model]  # type: ignore[list-item]
    layers = [
        layer
        for module in model.modules()
        for layer in module.children()
        if type(layer) in (nn.Linear, DeferredLinear)
        and layer.out_features == getattr(module, "vocab_size", None)
    ]
    if not layers:
        raise ValueError(
            f"accelerate_losses: model {type(model).__name__} has no nn.Linear with as many outputs as its vocab_size; "
            f"pass the layer that makes the logits instead"
        )
    return layers

