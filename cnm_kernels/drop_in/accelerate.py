"""Drop-in acceleration of published research code: ``accelerate(model)``, ``accelerate_losses(module)``, ``restore``.

Modules and functions are found by what they look like, not by where they were imported from, and each is tried beside
its replacement on a small example before it is replaced: what computes something else is left alone, and said.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from cnm_kernels.drop_in import losses as fused_losses
from cnm_kernels.drop_in.attention import AcceleratedAttention
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer, passed_over
from cnm_kernels.drop_in.losses import DeferredLinear
from cnm_kernels.drop_in.report import Row, StepTimer, table
from cnm_kernels.drop_in.trial import attention_differs, buffers_kept, layer_differs, random_kept

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


def accelerate(model: Model, *, report: bool | Callable[[], Tensor] = False) -> Model:
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

    Every module is tried beside its replacement before it is replaced: an attention in evaluation and in training, a
    layer in training with dropout and without; one whose own forward cannot run is left alone. Dropout on the attention
    and masks that no trial knows are computed by the module's own forward, without acceleration.

    Source: the published code of CNM (AAAI 2022) and CPL (CVPR 2022), as behaviour.

    Args:
        model: changed in place.
        report: True prints a table of the modules looked at: replaced by what, or why not. A function that returns the
            loss of a sample batch, ``lambda: loss(model(**batch))``, is also timed with its backward before and after,
            and the table says what share of it each module takes. Gradients, buffers and random state stay.

    Returns:
        ``model`` itself. A module left alone although it looks the part, and a model without any, give a warning.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``report`` returns something else than a loss. Whatever is raised, no module is replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    replaced: list[nn.Module] = []
    try:
        with buffers_kept(model), random_kept():  # to look at a parametrized weight may already change some
            rows = [
                Row(name, type(module).__name__, "", module)
                for name, module in model.named_modules()
                if isinstance(module, AcceleratedAttention | AcceleratedLayer)
                or _looks_like_attention(module)
                or _looks_like_layer(module)
            ]
            timer = StepTimer(model, report, [row.module for row in rows]) if callable(report) else None
            measured = [timer.measure()] if timer else []
            _replace(rows, replaced)
            measured += [timer.measure()] if timer else []
    except BaseException:  # all or nothing
        for module in replaced:
            _give_back(module)
        raise
    if report:
        for row in rows:
            row.seconds = [parts[row.module] for _, parts in measured]
        print(table(rows, [whole for whole, _ in measured]))
    if not any(isinstance(row.module, AcceleratedAttention | AcceleratedLayer) for row in rows):
        warnings.warn(
            f"accelerate: {type(model).__name__} has no attention module with the published interface; nothing changed",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def _replace(rows: list[Row], replaced: list[nn.Module]) -> None:
    """Gives modules that pass their trial their new class, notes them in ``replaced`` and every row's outcome."""
    reasons = set[str]()
    for mixin, looks_right, unsupported, differs, fused in KINDS:
        for row in rows:
            module, kind = row.module, type(row.module)
            reason = None
            if not isinstance(module, mixin):
                if not looks_right(module):
                    continue
                ours = _accelerated(mixin, cast(Any, kind))
                reason = unsupported(module) or differs(module, ours)
                if reason is None:
                    module.__class__ = ours
                    replaced.append(module)
            row.outcome = fused if reason is None else f"nothing: {reason}"
            if reason is not None:
                said = f"accelerate: {kind.__name__} is left alone: {reason}"
                if said not in reasons:
                    warnings.warn(said, RuntimeWarning, stacklevel=3)
                reasons.add(said)


def _give_back(module: Any) -> None:
    module.__class__ = type(module)._original


def accelerate_losses(losses: Any, model: nn.Module | None = None) -> None:
    """Replaces ``cal_nll_loss``, ``rec_loss`` and ``ivc_loss`` of a module by fused ones of the same signatures.

    CNM's and CPL's are told apart by their arguments; values, dicts and gradients stay the same. Every loaded module
    that imported one of these functions by name gets the new one too. Calls with an option of their own (a keyword that
    the original's code names, or functions of its module that it calls, and the published ones do not), a fractional
    mask or one with an empty row go to the original.

    Args:
        losses: the module (or any object with such attributes) that holds the functions.
        model: also give this model's layer over the vocabulary, the ``nn.Linear`` with ``model.vocab_size`` outputs (or
            pass the layer itself), results that are computed when read. These losses never read them: they fuse the
            layer with the cross entropy, and no logits are made. Logits that are read after an update are those before
            it; states that were changed in place meanwhile raise ``RuntimeError``.

    Raises:
        ValueError: nothing of that name and signature, or no such layer.
    """
    layers = [] if model is None else _vocabulary_layers(model)
    fused_losses.replace(losses, stacklevel=3)
    for layer in layers:
        layer.__class__ = DeferredLinear


def restore(target: Any) -> None:
    """Undoes ``accelerate`` on a model, or ``accelerate_losses`` on what holds the losses."""
    if not isinstance(target, nn.Module):
        fused_losses.restore(target)
        return
    for module in target.modules():
        if isinstance(module, AcceleratedAttention | AcceleratedLayer):
            _give_back(module)
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
    if not isinstance(getattr(module, "dropout", 0.0), float | int):
        return f"its dropout must be a rate, got {type(module.dropout).__name__}"
    if abs(getattr(module, "scaling", module.head_dim**-0.5) * module.head_dim**0.5 - 1) > 1e-6:
        return "its scaling is not head_dim ** -0.5"
    return None


KINDS: tuple[tuple[Any, Any, Any, Any, str], ...] = (  # the attentions first: a layer's must be accelerated before it
    (AcceleratedAttention, _looks_like_attention, _unsupported, attention_differs, "linear, weighted_attention"),
    (AcceleratedLayer, _looks_like_layer, passed_over, layer_differs, "linear, dropout_add_layer_norm"),
)


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
