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
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cnm_kernels.drop_in import losses as fused_losses
from cnm_kernels.drop_in.attention import AcceleratedAttention, in_silence
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer, passed_over
from cnm_kernels.drop_in.losses import DeferredLinear

Model = TypeVar("Model", bound=nn.Module)

ATTENTION_ARGUMENTS = [
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
LAYER_ARGUMENTS = [
    "x",
    "mask",
    "encoder_out",
    "encoder_mask",
    "self_attn_mask",
    "src_gauss_weight",
    "tgt_gauss_weight",
]
# ||ours - theirs|| / ||theirs|| on the small example: far above rounding, far below another formula.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def accelerate(model: Model) -> Model:
    """Routes every attention module of ``model`` that has the published interface to ``weighted_attention``, and every
    decoder layer that has the published interface to ``dropout_add_layer_norm`` and ``linear`` as well.

    Such an attention has ``in_proj_weight`` [3D, D], ``in_proj_bias``, ``out_proj``, ``num_heads``, ``head_dim`` and
    ``forward(query, key, value, key_padding_mask, incremental_state, need_weights, static_kv, attn_mask, fast_weights,
    gauss_weight)``, time first; such a layer ``self_attn``, ``encoder_attn``, ``fc1``, ``fc2``, their LayerNorms and
    ``forward(x, mask, encoder_out, encoder_mask, self_attn_mask, src_gauss_weight, tgt_gauss_weight)``;
    both may lack the weights. Only their classes change: parameters, state_dict, hooks, train and eval mode, device
    moves, copies, DataParallel and DDP work as before, and ``restore`` undoes it. A layer's dropout keeps its rate and
    follows ``torch.manual_seed``, but its
    masks are not those that PyTorch would draw. The attention returned beside an output is computed when it is read. A
    model pickled whole needs cnm_kernels to be loaded again; a state_dict does not.

    Source: the published code of CNM (AAAI 2022) and CPL (CVPR 2022), as behaviour.

    Returns:
        ``model`` itself. A module left alone although it looks the part, and a model without any, give a warning.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    found = 0
    for mixin, looks_right, differs in (
        (AcceleratedAttention, _looks_like_attention, _attention_differs),
        (AcceleratedLayer, _looks_like_layer, _layer_differs),
    ):
        reasons: dict[type, str | None] = {}  # one of each class is tried
        for module in model.modules():
            if isinstance(module, mixin):
                found += 1
            elif looks_right(module):
                kind = type(module)
                ours = _accelerated(mixin, cast(Any, kind))
                reason = _unsupported(module) if mixin is AcceleratedAttention else passed_over(module)
                if reason is None:
                    if kind not in reasons:
                        reasons[kind] = differs(module, ours)
                    reason = reasons[kind]
                if reason is None:
                    module.__class__ = ours
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
    fused_losses.replace(losses, stacklevel=3)
    if model is not None:
        for layer in _vocabulary_layers(model):
            layer.__class__ = DeferredLinear


def restore(target: Any) -> None:
    """Undoes ``accelerate`` on a model, or ``accelerate_losses`` on what holds the losses."""
    if not isinstance(target, nn.Module):
        fused_losses.restore(target)
        return
    for module in target.modules():
        if isinstance(module, AcceleratedAttention | AcceleratedLayer):
            module.__class__ = type(module)._original  # type: ignore[union-attr]
        elif isinstance(module, DeferredLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


@functools.cache
def _accelerated(mixin: Any, original: Any) -> Any:
    """``original`` with the mixin's ``forward``; instances of it are still instances of ``original``."""
    attributes = {"_mixin": mixin, "_original": original, "__reduce_ex__": _reduce, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (mixin, original), attributes)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles and copies by the original class, which can be imported."""
    kind = type(self)
    made_by, arguments, *state = kind._original.__reduce_ex__(self, protocol)
    if made_by is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return (made_by, arguments, *state)
    return (_new, (kind._mixin, kind._original), *state)


def _new(mixin: Any, original: Any) -> Any:
    kind = _accelerated(mixin, original)
    return kind.__new__(kind)


def _looks_like_attention(module: nn.Module) -> bool:
    names = ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads", "head_dim")
    if not all(hasattr(module, name) for name in names) or "forward" in vars(module):
        return False
    return _arguments(module) in (ATTENTION_ARGUMENTS, ATTENTION_ARGUMENTS[:-1])


def _looks_like_layer(module: nn.Module) -> bool:
    return _arguments(module) in (LAYER_ARGUMENTS, LAYER_ARGUMENTS[:-2]) and "forward" not in vars(module)


def _arguments(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


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


def _attention_differs(module: Any, ours: Any) -> str | None:
    draw = _Draw(module.in_proj_weight)
    L, B, D = 4, 2, module.in_proj_weight.size(1)
    x, source = draw(L, B, D), draw(L + 1, B, D)
    calls = [
        ((x, x, x, draw.padding(B, L)), {"attn_mask": draw.future(L), "gauss_weight": draw(B, L).sigmoid()}),
        ((x, source, source), {"gauss_weight": draw(B, L + 1).sigmoid()}),
    ]
    # Weights near the eps tell its size and place; float16 has no such numbers.
    small = 1e-3 if x.dtype == torch.float16 else 1e-9
    faint = draw(B, L).sigmoid() * small
    faint[:, 1] = 0
    calls += [((x, x, x), {"gauss_weight": faint}), ((x, x, x), {})]
    with _mode(module, training=False):
        reason = _differs(module, ours, calls)
    if reason is not None:
        return reason
    # With dropout, from one seed: where it stands shows.
    dropout = {"dropout": 0.5} if isinstance(getattr(module, "dropout", None), float | int) else {}
    with _mode(module, training=True), _set(module, **dropout), in_silence():
        reason = _differs(module, ours, calls)
    return reason and f"{reason}, in training"


def _layer_differs(module: Any, ours: Any) -> str | None:
    draw = _Draw(module.fc1.weight)
    L, B, D = 4, 2, module.fc1.weight.size(1)
    x, source = draw(L, B, D), draw(L + 1, B, D)
    alone = (x, draw.padding(B, L), None, None, draw.future(L), None, draw(B, L).sigmoid())
    reading = (x, draw.padding(B, L), source, draw.padding(B, L + 1), draw.future(L), draw(B, L + 1).sigmoid(), None)
    with (
        _set(module.self_attn, training=False),
        _set(module.encoder_attn, training=False),
        _set(module, training=True, dropout=0.0),  # whatever else it does in training shows
    ):
        return _differs(module, ours, [(alone, {}), (reading, {})])


def _differs(module: nn.Module, ours: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> str | None:
    """Compares both on small examples: None if ``ours`` gives what the module's own class gives, else why not.

    A module that cannot run by itself (the published attention needs fairseq) is taken at its word.
    """
    own = type(module)
    known = _arguments(module)
    calls = [
        (arguments[: len(known)], {name: value for name, value in options.items() if name in known})
        for arguments, options in calls
    ]
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    for arguments, options in calls:
        with torch.no_grad(), torch.random.fork_rng():
            try:
                torch.manual_seed(0)
                expected = own.forward(module, *arguments, **options)
            except ImportError:
                return None
            except Exception as error:
                return f"its own forward fails on a small example ({type(error).__name__}: {error})"
            with _set(module, __class__=ours):
                torch.manual_seed(0)
                found = ours.forward(module, *arguments, **options)
        if not isinstance(expected, tuple) or len(expected) != len(found):
            return "its own forward does not return an output and its attention"
        for name, mine, theirs in zip(("output", "attention"), found, expected, strict=True):
            difference = torch.linalg.vector_norm(mine.double() - theirs.double())
            if not difference <= PROBE_TOLERANCE[mine.dtype] * torch.linalg.vector_norm(theirs.double()):
                return f"its own forward gives another {name} than the published one on a small example"
    return None


class _Draw:
    """Small examples on a parameter's device, in its dtype; PyTorch's generators are not touched."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.like)

    def padding(self, B: int, L: int) -> Tensor:
        """[B, L]: the first sample's last position."""
        padded = torch.zeros(B, L, dtype=torch.bool, device=self.like.device)
        padded[0, -1] = True
        return padded

    def future(self, L: int) -> Tensor:
        return torch.full((L, L), -torch.inf).to(self.like).triu(1)


@contextmanager
def _set(target: Any, **attributes: Any) -> Iterator[None]:
    """These attributes for a while; a module's children are not told."""
    before = {name: getattr(target, name) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module and its children in train or eval mode for a while."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def _vocabulary_layers(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_losses: model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model) in (nn.Linear, DeferredLinear):
        return [model]
    layers = [
        layer
        for module in model.modules()
        for layer in module.children()
        if type(layer) in (nn.Linear, DeferredLinear) and layer.out_features == getattr(module, "vocab_size", None)
    ]
    if not layers:
        raise ValueError(
            f"accelerate_losses: model {type(model).__name__} has no nn.Linear with as many outputs as its vocab_size; "
            f"pass the layer that makes the logits instead"
        )
    return layers
