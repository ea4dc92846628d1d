"""The published ``MultiheadAttention``, computed by ``weighted_attention``.

Time-first tensors, a packed input projection, key padding masks, an additive attention mask and a weight per key, as
in the published CNM and CPL code. ``AcceleratedAttention`` is mixed into the class of a module that has this interface
(see ``accelerate``) and replaces its ``forward``; parameters, state_dict and everything else stay the module's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from cnm_kernels import absorption, ops
from cnm_kernels.absorption import Absorb, Projections, Source
from cnm_kernels.drop_in.deferred import defer, is_traced, versions
from cnm_kernels.drop_in.fairseq import fairseq
from cnm_kernels.registry import requested, use_backend

_importing: set[type] = set()  # classes whose own forward imports fairseq, where that is not installed


class AcceleratedAttention:
    """``forward`` of the published interface. Mixed in before the module's own class, whose attributes it reads."""

    _original: ClassVar[type[nn.Module]]  # the module's own class
    num_heads: int
    head_dim: int
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        fast_weights: Any = None,
        gauss_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [Lq, B, D], attention averaged over heads [B, Lq, Lk] or None); the latter computed when read.

        Args:
            query: [Lq, B, D].
            key, value: [Lk, B, D].
            key_padding_mask: [B, Lk] uint8 or bool, 1 where a key is padding.
            incremental_state, static_kv: step-by-step decoding, left to the module's own class.
            need_weights: give the attention too.
            attn_mask: [Lq, Lk], added to the scores; -inf above the diagonal is recognised as causal.
            fast_weights: not read, as published.
            gauss_weight: [B, Lk], a weight per key.

        Masks of other values, dtypes or shapes, padding before a real key or of all keys, and dropout on the attention
        are left to the module's own class too: forks differ in what they make of them. So is what torch.jit traces,
        which is to serve other masks.
        """
        if incremental_state is not None or getattr(self, "onnx_trace", False):
            options = (key_padding_mask, incremental_state, need_weights, static_kv, attn_mask, fast_weights)
            return self._by_its_own((query, key, value), *options, gauss_weight=gauss_weight)
        sources = _batch_first(query, key, value)
        out, weights = self.attend(sources, key_padding_mask, attn_mask, gauss_weight, need_weights)
        return out.transpose(0, 1).contiguous(), weights

    def attend(
        self,
        sources: tuple[Tensor, ...],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        gauss_weight: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward``, batch first: (output [B, Lq, D], attention).

        ``sources`` [B, L, D]: the source of query, key and value; or query's and that of key and value; or of each.
        """
        Lq, Lk = sources[0].size(1), sources[-1].size(1)
        seen, padding = "all", _Padding(reason="what torch.jit traces, whose masks may be others later,")
        if not torch.jit.is_tracing():
            seen = _seen(attn_mask, Lq, Lk)
            padding = _padding(key_padding_mask, seen == "past", (sources[0].size(0), Lk))
        dropout = getattr(self, "dropout", 0.0) if cast(nn.Module, self).training else 0.0
        reason = "dropout on the attention" if dropout > 0 else padding.reason
        reason = "an attention mask other than a causal one" if seen == "other" else reason
        if reason is not None:
            _say_once(f"{reason} is computed by PyTorch, without acceleration")
            each = tuple(source.transpose(0, 1).contiguous() for source in sources)  # as they were given
            options = (key_padding_mask, None, need_weights, False, attn_mask, None)
            out, weights = self._by_its_own((*each, each[-1], each[-1])[:3], *options, gauss_weight=gauss_weight)
            return out.transpose(0, 1), weights

        wide = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
        key_weight = None if gauss_weight is None else gauss_weight.to(wide)
        causal = seen == "past"
        absorb = None if causal else _absorbs(self, sources)
        # The module may hold others by the time of the backward, which computes this again (functional_call).
        weight, bias = (_for_both_times(tensor) for tensor in (self.in_proj_weight, self.in_proj_bias))
        assert weight is not None
        projections = None if absorb is None else _projections(self, weight, bias)
        # No more than it reads: an optimizer that steps in the backward has changed the output projection by then.
        read = (weight, bias) if projections is None else projections.parameters()
        others = (key_weight, padding.lengths, *read)

        def compute(*sources: Tensor) -> Tensor:
            if absorb is not None and projections is not None:
                return absorb(projections, sources[0], Source(sources[1], padding.lengths, key_weight), None)
            packed = self._project(sources, weight, bias)
            return ops.weighted_attention(*packed, key_weight, causal=causal, key_lengths=padding.lengths)

        out = _computed_again(compute, sources, others)
        if absorb is None:
            out = _output(self, out.transpose(1, 2).flatten(2))
        if not need_weights:
            return out, None
        keys = Source(sources[0] if len(sources) == 1 else sources[1], padding.lengths, key_weight)
        dtype = out.dtype if gauss_weight is None else torch.promote_types(out.dtype, gauss_weight.dtype)
        return out, _weights_of(self, dtype, sources[0], keys, causal)

    def _by_its_own(
        self, sources: tuple[Tensor, ...], *options: Any, gauss_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the module's own class computes of sources, time first, and the options in their order."""
        own = cast("Callable[..., tuple[Tensor, Tensor | None]]", super().forward)  # type: ignore[misc]
        some = () if gauss_weight is None else (gauss_weight,)  # others have no such argument
        arguments = (*sources, *options, *some)
        if type(self) not in _importing:
            try:
                return own(*arguments)
            except ModuleNotFoundError as error:
                if error.name != "fairseq" or options[1] is not None:  # what it did to the state would be done twice
                    raise
            _importing.add(type(self))
        with fairseq():
            return own(*arguments)

    def _project(
        self, sources: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The operands of ``weighted_attention``, packed where two or three share a source."""
        D = sources[0].size(-1)

        def heads(x: Tensor, start: int, end: int) -> Tensor:
            """x [B, L, D] through rows ``start`` to ``end`` of the input projection: [B, L, parts, H, d]."""
            whole = end - start == weight.size(0)
            rows = weight if whole else weight[start:end]
            shift = bias if whole or bias is None else bias[start:end]
            return ops.linear(x, rows, shift).unflatten(-1, (-1, self.num_heads, self.head_dim))

        if len(sources) == 1:
            return heads(sources[0], 0, 3 * D), None, None
        query = heads(sources[0], 0, D)[:, :, 0].transpose(1, 2)  # [B, H, Lq, d]
        if len(sources) == 2:
            return query, heads(sources[1], D, 3 * D), None
        key, value = heads(sources[1], D, 2 * D), heads(sources[2], 2 * D, 3 * D)
        return query, key[:, :, 0].transpose(1, 2), value[:, :, 0].transpose(1, 2)


def _computed_again(
    compute: Callable[..., Tensor], sources: tuple[Tensor, ...], others: tuple[Tensor | None, ...]
) -> Tensor:
    """``compute(*sources)``, of which on CPUs the backward keeps the sources alone; ``others``: what it reads besides.

    Projections are up to three times as wide as what they are made from, and are made anew faster than PyTorch's were
    made once. (On a GPU the launches would cost more than the memory is worth.)
    """
    if not _is_computed_again(sources[0].device):
        return compute(*sources)
    before, backend = versions(others), requested()

    def unchanged(*sources: Tensor) -> Tensor:
        if versions(others) != before:  # PyTorch says so of what it keeps; this is not kept
            raise RuntimeError(
                "parameters or weights of an accelerated attention were changed in place between forward and backward; "
                "call backward() before optimizer.step()"
            )
        with nullcontext() if requested() == backend else use_backend(backend):
            return compute(*sources)

    return cast(Tensor, checkpoint(unchanged, *sources, use_reentrant=False, preserve_rng_state=False))


def _is_computed_again(device: torch.device) -> bool:
    return torch.is_grad_enabled() and device.type == "cpu" and not is_traced()


def _for_both_times(parameter: Tensor | None) -> Tensor | None:
    """The parameter, for what is computed again: it may be frozen, or no longer, by then."""
    if parameter is None or not _is_computed_again(parameter.device):
        return parameter
    return parameter.view_as(parameter) if parameter.requires_grad else parameter.detach()


def _output(module: AcceleratedAttention, joined: Tensor) -> Tensor:
    """The output projection of joined heads [B, Lq, D]."""
    layer = module.out_proj
    if is_unmodified(layer, nn.Linear):
        return ops.linear(joined, layer.weight, layer.bias)  # type: ignore[arg-type]
    return cast(Tensor, layer(joined.transpose(0, 1).contiguous())).transpose(0, 1)


def _absorbs(module: AcceleratedAttention, sources: tuple[Tensor, ...]) -> Absorb | None:
    """How a cross attention spares products, on a processor that they keep busy; None: not at all."""
    x, states = sources[0], sources[-1]
    square = is_unmodified(module.out_proj, nn.Linear) and module.out_proj.weight.shape == (x.size(2), x.size(2))
    if len(sources) != 2 or x.device.type != "cpu" or not square:
        return None
    return absorption.cheapest(x.size(2), module.num_heads, x.size(1), states.size(1))


def _projections(module: AcceleratedAttention, weight: Tensor, bias: Tensor | None) -> Projections:
    layer = cast(nn.Linear, module.out_proj)
    out_weight, out_bias = (_for_both_times(tensor) for tensor in (layer.weight, layer.bias))
    assert out_weight is not None
    return Projections(module.num_heads, weight, bias, out_weight, out_bias)


def _weights_of(module: AcceleratedAttention, dtype: torch.dtype, x: Tensor, source: Source, causal: bool) -> Tensor:
    """The attention [B, Lq, Lk] of x's queries, made from the states when it is read: projections kept for that would
    take twice their memory. Read after an update, it is still that of the parameters before it."""
    H, bias = module.num_heads, module.in_proj_bias

    def averaged(*inputs: Tensor | None) -> Tensor:
        x, states, weight, bias, key_weight, lengths = inputs
        assert x is not None
        assert states is not None
        assert weight is not None
        biases = (None, None) if bias is None else bias.chunk(2)
        query, key = (
            ops.linear(side, W, b).unflatten(-1, (H, -1)).transpose(1, 2)
            for side, W, b in zip((x, states), weight.chunk(2), biases, strict=True)
        )
        return ops.attention_weights(query, key, key_weight, causal=causal, key_lengths=lengths).to(dtype)

    like = torch.empty(x.size(0), x.size(1), source.states.size(1), dtype=dtype, device="meta")
    D = x.size(2)
    copies = module.in_proj_weight[: 2 * D].clone(), None if bias is None else bias[: 2 * D].clone()
    return defer(averaged, like, x, source.states, *copies, source.weighting, source.lengths)


def _batch_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """[L, B, D] each -> [B, L, D], each source once. Copied before it is projected: projections are wider."""
    sources = [query, key, value]
    if _same(key, value):
        sources = [query] if _same(query, key) else [query, key]
    return tuple(source.transpose(0, 1).contiguous() for source in sources)


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module has exactly this class and no hooks or forward of its own: its parameters determine its
    result."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


@dataclass(frozen=True)
class _Padding:
    """What a padding mask says."""

    lengths: Tensor | None = None  # [B] int64, of the real keys; None: all
    reason: str | None = None  # why lengths do not say it


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two views of the same numbers, made by the same operation of the same tensor."""
    if a is b:
        return True
    if is_traced() or a.shape != b.shape or a.stride() != b.stride():
        return False
    if a.data_ptr() != b.data_ptr() or a.requires_grad != b.requires_grad or a._backward_hooks or b._backward_hooks:
        return False
    if not a.requires_grad:
        return True
    made, also = a.grad_fn, b.grad_fn
    if made is None or also is None or isinstance(made, torch._C._FunctionBase):
        return False  # leaves of their own, or somebody's autograd.Function, which may do anything to gradients
    return made is also or (type(made) is type(also) and made.next_functions == also.next_functions)


_facts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.compiler.disable
def remembered(mask: Tensor, question: Any, answer: Callable[[Tensor], Any]) -> Any:
    """``answer(mask)``, which on a GPU waits for the device, asked once there per mask: layers share their masks.

    Views of one tensor that are made anew for every layer are known by the tensor they view.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose replays could not look at their masks.
    """
    if mask.device.type == "cpu" or mask.is_inference():  # NumPy may have changed what lies there
        return answer(mask)
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cnm_kernels.accelerate: masks decide which kernels run, so a CUDA graph would replay those of this mask "
            "for all; capture without masks, or the model as it was (cnm_kernels.restore)"
        )
    whole = mask if mask._base is None else mask._base
    view = (question, mask._version, mask.dtype, mask.storage_offset(), tuple(mask.shape), mask.stride())
    facts: dict[Any, Any] = _facts.setdefault(whole, {})
    if view not in facts:
        if len(facts) >= 16:  # a mask that is changed in place time and again
            facts.clear()
        facts[view] = answer(mask)
    return facts[view]


def _seen(attn_mask: Tensor | None, Lq: int, Lk: int) -> str:
    """Classifies the keys that a query sees under the additive mask: "all", the "past" and itself, or "other"."""
    if attn_mask is None:
        return "all"

    def classify(mask: Tensor) -> str:
        if mask.requires_grad or mask.shape != (Lq, Lk) or not mask.is_floating_point():
            return "other"
        future = torch.full_like(mask, -torch.inf).triu(1)
        if Lq == Lk and torch.equal(mask, future):
            return "past"
        return "other" if mask.any() else "all"

    return cast(str, remembered(attn_mask, "seen", classify))


def _padding(mask: Tensor | None, causal: bool, shape: tuple[int, int]) -> _Padding:
    """``mask`` [B, Lk] (``shape``), 1 where padded and 0 elsewhere, understood."""
    if mask is None or mask.dim() == 0:
        return _Padding()

    def classify(mask: Tensor) -> _Padding:
        padded = mask == 1
        if padded.shape != shape or mask.requires_grad:
            return _Padding(reason="a key_padding_mask that is learned, or not [B, Lk],")
        if padded.size(1) == 0:
            return _Padding()
        starving = padded[:, 0] if causal else padded.all(1)
        broken = padded[:, :-1] > padded[:, 1:]
        other = ~padded & (mask != 0)
        some, breaks, starves, others = torch.stack([x.any() for x in (padded, broken, starving, other)]).tolist()
        if others:
            return _Padding(reason="a key_padding_mask of other values than 0 and 1")
        if starves or breaks:
            return _Padding(reason="padding before a real key, or of all keys,")
        return _Padding((~padded).sum(1) if some else None)

    return cast(_Padding, remembered(mask, ("padding", causal, shape), classify))


_said: set[str] = set()


@contextmanager
def in_silence() -> Iterator[None]:
    """Suppresses warnings for a while; warnings that are given once can be given afterwards."""
    before = set(_said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _said.clear()
        _said.update(before)


def _say_once(what: str) -> None:
    if what not in _said:
        _said.add(what)
        warnings.warn(f"cnm_kernels.accelerate: {what}", RuntimeWarning, stacklevel=6)
