"""The published losses of CNM and CPL, name for name, on fused cross entropies.

``cal_nll_loss``, ``rec_loss`` and ``ivc_loss`` take the published arguments, logits above all, and return the published
values and dicts. Logits that an accelerated layer has not made yet (see ``DeferredLinear``) are never made.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnm_kernels import ops
from cnm_kernels.constants import LABEL_SMOOTHING
from cnm_kernels.drop_in.attention import remembered
from cnm_kernels.drop_in.deferred import Deferred, defer
from cnm_kernels.drop_in.logits_nll import logits_nll
from cnm_kernels.drop_in.trial import Failed, differentiably, gradients, gradients_differ, random_kept, tried

Loss = tuple[Tensor, dict[str, float]]
NAMES = ("cal_nll_loss", "rec_loss", "ivc_loss")
PROBE_TOLERANCE = 1e-4  # relative; the small example is float32


class DeferredLinear(nn.Linear):
    """An ``nn.Linear`` whose result [M, L, V] is computed when it is read, if it ever is."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3 or self.bias is None:
            return super().forward(input)
        autocast = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(input.device.type) if autocast else input.dtype
        like = torch.empty(*input.shape[:-1], self.out_features, dtype=dtype, device="meta")
        # Copies: logits read after an update are those before it, whether or not the optimizer lets its changes show.
        weight, bias = self.weight.clone(), self.bias.clone()
        return defer(nn.functional.linear, like, input, weight, bias, by_row=True)


def nll_of(logits: Tensor, target: Tensor, mask: Tensor, proposals: int = 1) -> Tensor:
    """Mean nll of each row's tokens where ``mask`` is not 0. [M, L, V], [M / proposals, L] twice -> [M]

    A row's target and mask serve its ``proposals`` consecutive rows of logits.
    """
    return _shared(logits, *_for_proposals(proposals, target, mask), accuracy=False)[0]


def _shared(logits: Tensor, target: Tensor, mask: Tensor, *, accuracy: bool) -> tuple[Tensor, Tensor]:
    """``_nll_and_accuracy``, computed once as long as the logits are there: rec_loss and ivc_loss ask for the same.

    What they ask with is compared by value: some expand ids and masks anew for each. A checkpoint, which hooks what is
    kept for the backward, must find the same work when it does it again.
    """
    if not (isinstance(logits, Deferred) and logits.pending):
        return _nll_and_accuracy(logits, target, mask, accuracy=accuracy)
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if hooked or target.is_inference() or mask.is_inference():
        return _nll_and_accuracy(logits, target, mask, accuracy=accuracy)
    how = (torch.is_grad_enabled(), _loss_dtype(logits))
    remembered: list[_Answer] = vars(logits).setdefault("_nll", [])
    for answer in remembered:
        if answer.serves(target, mask, how, accuracy):
            return answer.value
    value = _nll_and_accuracy(logits, target, mask, accuracy=accuracy)
    if logits.pending:
        asked = _kept(target), _kept(mask)
        remembered.append(_Answer(asked, _versions(*asked, *value), how, accuracy, value))
    return value


def _kept(tensor: Tensor) -> Tensor:
    """What ``tensor`` holds, whatever NumPy or ``.data``, which leave no version, make of it later.

    On a GPU the tensor itself, whose version alone is looked at: NumPy does not reach it there, and comparing a copy
    with it would wait for the device.
    """
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


@dataclass(frozen=True)
class _Answer:
    """A cross entropy and what it was asked with."""

    asked: tuple[Tensor, Tensor]
    versions: tuple[int, ...]
    how: tuple[bool, torch.dtype]
    accuracy: bool
    value: tuple[Tensor, Tensor]

    def serves(self, target: Tensor, mask: Tensor, how: tuple[bool, torch.dtype], accuracy: bool) -> bool:
        if how != self.how or (accuracy and not self.accuracy):
            return False
        if self.versions != _versions(*self.asked, *self.value):  # changed in place since
            return False
        return all(
            a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
            for a, b in zip(self.asked, (target, mask), strict=True)
        )


def _for_proposals(proposals: int, *tensors: Tensor) -> Iterator[Tensor]:
    return (tensor if proposals == 1 else tensor.repeat_interleave(proposals, 0) for tensor in tensors)


def _nll_and_accuracy(
    logits: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None, *, accuracy: bool = True
) -> tuple[Tensor, Tensor]:
    """nll [M]; accuracy over all of ``mask`` (nothing in particular where it is not asked for)."""
    dtype = _loss_dtype(logits)
    if isinstance(logits, Deferred):
        row_by_row = target.shape == mask.shape == logits.shape[:-1]
        lengths = _valid_lengths(mask) if row_by_row and logits.pending and weights is None else None
        if lengths is not None:
            hidden, weight, bias = cast("tuple[Tensor, Tensor, Tensor]", logits.inputs)
            options: dict[str, Any] = {"label_smoothing": LABEL_SMOOTHING, "return_accuracy": accuracy}
            with torch.set_grad_enabled(torch.is_grad_enabled() and logits.grad_enabled):
                result = ops.linear_nll(hidden, weight, bias, target, lengths, **options)
            nll, shares = result if accuracy else (result, torch.zeros(()))
            return nll.to(dtype), (shares * lengths).sum() / lengths.sum() if accuracy else shares
        logits = logits.read()
    token_nll, correct = logits_nll(logits, target, LABEL_SMOOTHING)  # [M, L]
    token_nll = token_nll.to(dtype)
    mean_accuracy = (correct * mask).sum() / mask.sum()
    if weights is not None:
        return (token_nll * weights).sum(-1), mean_accuracy
    return token_nll.masked_fill(mask == 0, 0).sum(-1) / mask.sum(-1), mean_accuracy


def _valid_lengths(mask: Tensor) -> Tensor | None:
    """[M] where the mask is a run of ones from the start of each row, and never empty; else None."""
    valid = mask != 0
    ok = (valid[:, :-1] >= valid[:, 1:]).all() & valid[:, 0].all() & (valid == mask).all()
    return valid.sum(1) if bool(ok) else None


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of ``log_softmax``'s result: float32 under autocast, else the dtype of the logits."""
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
        return torch.float32
    return logits.dtype


def cal_nll_loss(logit: Tensor, idx: Tensor, mask: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Label-smoothed nll per row [M], over the tokens where ``mask`` is 1 or weighted by ``weights``, and the accuracy
    over all of ``mask``. logit [M, L, V]; idx, mask, weights [M, L]. Source: published, CNM and CPL."""
    if weights is None:
        return _shared(logit, idx, mask, accuracy=True)
    return _nll_and_accuracy(logit, idx, mask, weights)


def cnm_rec_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    hard_neg_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> Loss:
    """Mean nll of the positive plus that of the hard negative. Source: published CNM."""
    loss = nll_of(words_logit, words_id, words_mask).mean()
    losses = {"nll_loss": loss}
    if hard_neg_words_logit is not None:
        losses["neg_nll_loss"] = nll_of(hard_neg_words_logit, words_id, words_mask).mean()
        loss = loss + losses["neg_nll_loss"]
    return _with_numbers("final_loss", loss, losses)


def cnm_ivc_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    hard_neg_words_logit: Tensor | None = None,
    easy_neg_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> Loss:
    """The margins of ``beta_1`` to the hard and ``beta_2`` to the easy negative. Source: published CNM."""
    nll = nll_of(words_logit, words_id, words_mask)
    none = nll.new_zeros(())
    hard = easy = none
    loss = nll.mean()
    if hard_neg_words_logit is not None:
        loss = hard = _hinge(nll, nll_of(hard_neg_words_logit, words_id, words_mask), kwargs["beta_1"])
    if easy_neg_words_logit is not None:
        easy = _hinge(nll, nll_of(easy_neg_words_logit, words_id, words_mask), kwargs["beta_2"])
        loss = loss + easy
    return _with_numbers("ivc_loss", loss, {"easy_neg_loss": easy, "hard_neg_loss": hard})


def cpl_rec_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    num_props: int,
    ref_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> Loss:
    """Mean nll of the best proposal of each sentence; averaged with the reference branch's. Source: published CPL."""
    nll = nll_of(words_logit, words_id, words_mask, num_props).view(-1, num_props)
    loss = best = nll.min(dim=-1).values.mean()
    losses = {"nll_loss": best}
    if ref_words_logit is not None:
        losses["ref_nll_loss"] = nll_of(ref_words_logit, words_id, words_mask).mean()
        loss = (best + losses["ref_nll_loss"]) / 2
    return _with_numbers("final_loss", loss, losses)


def cpl_ivc_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    num_props: int,
    neg_words_logit_1: Tensor | None = None,
    neg_words_logit_2: Tensor | None = None,
    ref_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> Loss:
    """``alpha_1`` times the best proposal's margins to the reference (``margin_1``) and to its own left and right
    negatives (``margin_2``), plus ``alpha_2`` times the overlap of a sentence's proposals. Source: published CPL."""
    nll = nll_of(words_logit, words_id, words_mask, num_props)
    best, index = nll.view(-1, num_props).min(dim=-1)
    reference = negative_1 = negative_2 = nll.new_zeros(())
    rank = best.mean()
    if ref_words_logit is not None:
        rank = reference = _hinge(best, nll_of(ref_words_logit, words_id, words_mask), kwargs["margin_1"])

    def to_negative(logits: Tensor) -> Tensor:
        nll = nll_of(logits, words_id, words_mask, num_props).view(-1, num_props)
        return _hinge(best, nll.gather(-1, index.unsqueeze(-1)).squeeze(-1), kwargs["margin_2"])

    if neg_words_logit_1 is not None:
        negative_1 = to_negative(neg_words_logit_1)
        rank = rank + negative_1
    if neg_words_logit_2 is not None:
        negative_2 = to_negative(neg_words_logit_2)
        rank = rank + negative_2

    weight = kwargs["gauss_weight"].view(best.size(0), num_props, -1)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    overlap = weight @ weight.transpose(1, 2)  # [B, K, K]
    wanted = kwargs["lambda"] * torch.eye(num_props, dtype=weight.dtype, device=weight.device)
    diversity = (torch.linalg.vector_norm(wanted - overlap, dim=(1, 2)) ** 2).mean()
    loss = kwargs["alpha_1"] * rank + kwargs["alpha_2"] * diversity
    numbers = {"neg_loss_1": negative_1, "neg_loss_2": negative_2, "ref_loss": reference, "div_loss": diversity}
    return _with_numbers("ivc_loss", loss, numbers)


def _hinge(nll: Tensor, negative: Tensor, margin: float) -> Tensor:
    return torch.maximum(nll - negative + margin, torch.zeros_like(nll)).mean()


def _with_numbers(name: str, loss: Tensor, others: dict[str, Tensor]) -> Loss:
    """The loss, and it and the others as numbers: the device is waited for once."""
    numbers = torch.stack([tensor.detach().to(loss.dtype) for tensor in (loss, *others.values())]).tolist()
    return loss, dict(zip((name, *others), numbers, strict=True))


# ---- taking the published functions' place ----

CNM: dict[str, Callable[..., Any]] = {"cal_nll_loss": cal_nll_loss, "rec_loss": cnm_rec_loss, "ivc_loss": cnm_ivc_loss}
CPL: dict[str, Callable[..., Any]] = {"cal_nll_loss": cal_nll_loss, "rec_loss": cpl_rec_loss, "ivc_loss": cpl_ivc_loss}


def replace(losses: Any, stacklevel: int) -> None:
    """Puts ours in the place of each published function of ``losses``; see ``accelerate_losses``."""
    found = False
    for name in NAMES:
        theirs = getattr(losses, name, None)
        if theirs is None:
            continue
        if hasattr(theirs, "_accelerated"):
            found = True
            continue
        ours = next((family[name] for family in (CNM, CPL) if _arguments(family[name]) == _arguments(theirs)), None)
        unknown = f"its arguments {_arguments(theirs)} are neither CNM's nor CPL's"
        reason = unknown if ours is None else loss_differs(theirs, ours)
        if ours is None or reason is not None:
            within = _fused_within(theirs, losses)
            warnings.warn(
                f"accelerate_losses: {name} is left alone: {reason}{within}", RuntimeWarning, stacklevel=stacklevel
            )
            continue
        replacement = _stand_in(theirs, ours)
        _swap(losses, theirs, replacement)
        if getattr(losses, name) is replacement:
            found = True
        else:
            method = "it is a method; pass the class or module that holds the function itself"
            warnings.warn(f"accelerate_losses: {name} is left alone: {method}", RuntimeWarning, stacklevel=stacklevel)
    if not found:
        raise ValueError(
            f"accelerate_losses: {getattr(losses, '__name__', losses)!r} has none of {', '.join(NAMES)} "
            f"with the published arguments and results"
        )


def _stand_in(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Any:
    """``ours`` under the name of ``theirs``, which still answers what no trial of it could hold for.

    Those are masks that are not of zeros and ones, with a one in every row (the published losses divide by them in
    different ways), and options that its code names and the trial does not give.
    """
    untried = _named(inspect.unwrap(theirs)) - set().union(*_examples(_arguments(ours)))

    @functools.wraps(theirs)
    def replacement(*arguments: Any, **options: Any) -> Any:
        mask = arguments[2] if len(arguments) > 2 else options.get("mask", options.get("words_mask"))
        plain = not isinstance(mask, Tensor) or remembered(mask, "plain", _is_plain)
        if not plain or not untried.isdisjoint(options):
            with _without_a_gpu():
                return theirs(*arguments, **options)
        return ours(*arguments, **options)

    cast(Any, replacement)._accelerated = True
    return replacement


def _fused_within(function: Any, losses: Any) -> str:
    """Returns an addition to the warning if a function that is left alone calls a fused ``cal_nll_loss``."""
    calls = getattr(getattr(function, "__code__", None), "co_names", ())
    inner = getattr(function, "__globals__", {}).get("cal_nll_loss", getattr(losses, "cal_nll_loss", None))
    fused = "cal_nll_loss" in calls and hasattr(inner, "_accelerated")
    return "; the cal_nll_loss that it calls is still fused" if fused else ""


def _is_plain(mask: Tensor) -> bool:
    return bool((((mask == 0) | (mask == 1)).all(-1) & (mask == 1).any(-1)).all())


def _named(function: Any) -> set[str]:
    """The strings that a function's code holds, options' names among them, with those of its inner functions and of its
    module's functions that it calls, and the latter's parameters."""
    found: set[str] = set()
    waiting, seen = [function], set()
    while waiting:
        constant = waiting.pop()
        if inspect.isfunction(constant) and constant not in seen:
            seen.add(constant)
            names = constant.__code__.co_names
            called = [constant.__globals__.get(name) for name in names if name not in NAMES]
            own = [f for f in called if inspect.isfunction(f) and f.__module__ == constant.__module__]
            found.update(*(inspect.signature(f).parameters for f in own))
            waiting += [constant.__code__, *own]
        elif isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, CodeType):
            waiting += constant.co_consts
        elif isinstance(constant, tuple | frozenset):
            waiting += constant
    return found


@contextmanager
def _without_a_gpu() -> Iterator[None]:
    """Without a GPU, makes ``tensor.cuda()``, which the published losses call, return the tensor itself."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *arguments, **options: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def restore(losses: Any) -> None:
    """Puts the published functions back, everywhere."""
    for name in NAMES:
        ours: Any = getattr(losses, name, None)
        if hasattr(ours, "_accelerated"):
            _swap(losses, ours, ours.__wrapped__)


def _swap(losses: Any, old: Any, new: Any) -> None:
    for holder in (losses, *list(sys.modules.values())):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if value is old:
                setattr(holder, name, new)
            elif type(value) is staticmethod and value.__func__ is old:
                setattr(holder, name, staticmethod(new))


def _arguments(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def loss_differs(theirs: Callable[..., Any], ours: Callable[..., Any]) -> str | None:
    """Compares both on a small example: None if they give the same, else why not.

    A function that cannot run here is not replaced: its name and arguments do not say what it computes.
    """
    with differentiably(), random_kept():
        for arguments in _examples(list(inspect.signature(ours).parameters)):
            inputs = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
            try:
                expected = tried(functools.partial(theirs, **arguments), _without_a_gpu)
            except Failed as failed:
                return f"it {failed}"
            found = ours(**arguments)
            if not _alike(found, expected):
                return "it gives other results than the published one on a small example"
            if gradients_differ(gradients(found[0], inputs), gradients(expected[0], inputs), PROBE_TOLERANCE):
                return "it gives other gradients than the published one on a small example"
    return None


def _examples(parameters: list[str]) -> Iterator[dict[str, Any]]:
    words = [[1, 0, 2], [3, 4, 5]], [[1, 1, 1], [1, 1, 0]]
    yield from _examples_of(parameters, *words, scale=1)
    # Many words and large logits: what is cut off or clamped shows.
    far = [[i % 7 for i in range(64)]], [[1] * 63 + [0]]
    yield from _examples_of(parameters, *far, scale=30)


def _examples_of(
    parameters: list[str], words_id: list[list[int]], words_mask: list[list[int]], scale: float
) -> Iterator[dict[str, Any]]:
    V, K, T = 7, 2, 5
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.tensor(words_id, device=device)
    mask = torch.tensor(words_mask, dtype=torch.uint8, device=device)
    B, L = ids.shape

    def logits(rows: int) -> Tensor:
        return (scale * torch.randn(rows, L, V, generator=generator, device="cpu")).to(device)

    if "logit" in parameters:
        yield {"logit": logits(B), "idx": ids, "mask": mask}
        yield {
            "logit": logits(B),
            "idx": ids,
            "mask": mask,
            "weights": torch.rand(B, L, generator=generator, device="cpu").to(device),
        }
        return
    K = K if "num_props" in parameters else 1
    example: dict[str, Any] = {"words_logit": logits(B * K), "words_id": ids, "words_mask": mask}
    # Not the published values, and large: a margin that the original ignores shows.
    margins = {"beta_1": 1.3, "beta_2": 2.1, "margin_1": 1.1, "margin_2": 1.9, "lambda": 0.23, "alpha_1": 0.7}
    gaussians = torch.rand(B * K, T, generator=generator, device="cpu").to(device)
    example |= margins | {"alpha_2": 1.6, "gauss_weight": gaussians}
    if K > 1:
        example["num_props"] = K
    yield example
    for name in parameters:
        if name.endswith("_logit") and name != "words_logit":
            example = example | {name: logits(B if name == "ref_words_logit" else B * K)}
            yield example
    yield example | {"beta_1": 0.01, "beta_2": 0.02, "margin_1": 0.01, "margin_2": 0.02}


def _alike(ours: tuple[Any, Any], theirs: Any) -> bool:
    if not isinstance(theirs, tuple) or len(theirs) != 2:
        return False

    def close(mine: Any, other: Any) -> bool:
        mine, other = (torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (mine, other))
        return mine.shape == other.shape and torch.allclose(mine, other, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)

    if isinstance(ours[1], dict):
        if not isinstance(theirs[1], dict) or set(ours[1]) != set(theirs[1]):
            return False
        if any(isinstance(value, Tensor) for value in theirs[1].values()):  # whose gradients somebody may want
            return False
        return close(ours[0], theirs[0]) and all(close(ours[1][name], theirs[1][name]) for name in ours[1])
    return close(ours[0], theirs[0]) and close(ours[1], theirs[1])
