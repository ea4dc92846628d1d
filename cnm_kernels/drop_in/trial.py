"""Tries a published module beside its replacement on small examples, chosen to tell published variants apart."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from cnm_kernels import ops
from cnm_kernels.drop_in.attention import in_silence
from cnm_kernels.drop_in.decoder_layer import SEEDS
from cnm_kernels.drop_in.fairseq import fairseq

# ||ours - theirs|| / ||theirs|| on the small example: far above rounding, far below another formula.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}  # wrong: 1
DROPOUT = 0.5  # of a layer's trial
TRIES = 24  # of a call with random numbers: what happens at a probability of 0.2 is missed by 0.8 ** 24 < 0.01
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Failed(Exception):
    """A published function failed in a trial; the message continues a sentence that begins with its name."""


def tried(theirs: Callable[[], Any], around: Callable[[], Any]) -> Any:
    """The result of a published function, called within ``around()``; raises ``Failed`` whatever it raises."""
    try:
        with _numbers(), around():
            return theirs()
    except Exception as error:
        said = f"({type(error).__name__}: {error})"
        if not torch.cuda.is_available() and ("CUDA" in str(error) or "NVIDIA" in str(error)):
            raise Failed(f"cannot be tried without a GPU {said}") from error
        raise Failed(f"fails on a small example {said}") from error


def _numbers() -> AbstractContextManager[Any]:
    """Tensors made where none is said hold numbers, though the caller's default device be meta."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def attention_differs(module: Any, ours: Any) -> str | None:
    """None if ``ours`` gives what the attention's own class gives, in evaluation and in training, or else why not."""
    module = _real(module)
    draw = _Draw(module.in_proj_weight)
    L, B, D = 4, 2, module.in_proj_weight.size(1)
    x, source = draw(L, B, D), draw(L + 1, B, D)
    calls: list[Call] = [
        ((x, x, x, draw.padding(B, L)), {"attn_mask": draw.future(L), "gauss_weight": draw(B, L).sigmoid()}),
        ((x, source, source), {"gauss_weight": draw(B, L + 1).sigmoid()}),
    ]
    # Weights near the eps tell its size and place; float16 has no such numbers, and squares of few small ones.
    small = 1e-1 if x.dtype == torch.float16 else 1e-9
    faint = draw(B, L).sigmoid() * small
    faint[:, 1] = 0
    calls += [((x, x, x), {"gauss_weight": faint}), ((x, x, x), {})]
    long = draw(64, B, D)  # more keys than are kept where only the best or the nearest are
    extreme: list[Call] = [((long, long, long), {"gauss_weight": draw(B, 64).sigmoid()})]
    if _is_fine(x):
        extreme.append(((8 * x, 8 * x, 8 * x), {}))  # scores that a cap or a clamp changes
    with _mode(module, training=False):
        reason = _differs(module, ours, calls + extreme)
    if reason is not None:
        return reason
    # With dropout its own forward runs; whatever else it does in training shows.
    dropout = {"dropout": 0.0} if hasattr(module, "dropout") else {}
    with _mode(module, training=True), _set(module, **dropout):
        reason = _differs(module, ours, calls)
    return reason and f"{reason}, in training"


def _is_fine(x: Tensor) -> bool:
    """Whether PyTorch multiplies ``x`` finely enough for large scores, of which much is rounding otherwise."""
    switches: Any = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    of_float32 = x.dtype == torch.float32 and switches.matmul.fp32_precision not in ("tf32", "bf16")
    return of_float32 or x.dtype == torch.float64


def layer_differs(module: Any, ours: Any) -> str | None:
    """None if ``ours`` gives what the layer's own class gives, with dropout and without, or else why not."""
    module = _real(module)
    draw = _Draw(module.fc1.weight)
    L, B, D = 4, 2, module.fc1.weight.size(1)
    x, source = draw(L, B, D), draw(L + 1, B, D)
    alone: Call = ((x, draw.padding(B, L), None, None, draw.future(L), None, draw(B, L).sigmoid()), {})
    reading: Call = (
        (x, draw.padding(B, L), source, draw.padding(B, L + 1), draw.future(L), draw(B, L + 1).sigmoid(), None),
        {},
    )
    with (
        _set(module.self_attn, training=False),
        _set(module.encoder_attn, training=False),
        _set(module, training=True, dropout=0.0),  # whatever else it does in training shows
    ):
        reason = _differs(module, ours, [alone, reading])
        if reason is None:
            with _set(module, dropout=DROPOUT):
                for call, offsets in ((alone, (0, 2)), (reading, (0, 1, 2))):
                    reason = reason or _differs(module, ours, [call], partial(_OurMasks, offsets))
            reason = reason and f"{reason}, with dropout"
    return reason


def _differs(module: nn.Module, ours: Any, calls: list[Call], around: Callable[[], Any] = in_silence) -> str | None:
    """Says how the results of the calls differ, or None; the module's own forward runs within ``around()``.

    A call in which it draws random numbers is tried again with others: what it does now and then shows.
    """
    known = list(inspect.signature(type(module).forward).parameters)[1:]
    calls = [
        (arguments[: len(known)], {name: value for name, value in options.items() if name in known})
        for arguments, options in calls
    ]
    for call in calls:
        for seed in range(TRIES):
            reason, by_chance = _differs_once(module, ours, call, around, seed)
            if reason is not None:
                return reason
            if not by_chance:
                break
    return None


def _differs_once(
    module: nn.Module, ours: Any, call: Call, around: Callable[[], Any], seed: int
) -> tuple[str | None, bool]:
    """How the results of a call differ, or None, and whether the module's own forward draws what ours does not."""
    own = type(module)
    inputs: list[Tensor] = []
    with differentiably(module.parameters()), _unfrozen(module), fairseq():
        arguments, options = (_leaves(part, inputs) for part in call)
        seed_all(seed)
        try:
            expected = tried(partial(own.forward, module, *arguments, **options), around)
        except Failed as failed:
            return f"its own forward {failed}", False
        drawn = _generators(module)
        inputs += [parameter for parameter in module.parameters() if parameter.requires_grad]
        theirs_of_it = gradients(expected[0] if isinstance(expected, tuple) else None, inputs)
        with _set(module, __class__=ours):
            seed_all(seed)
            found = ours.forward(module, *arguments, **options)
            by_chance = drawn != _generators(module)
            ours_of_it = gradients(found[0], inputs)
    if not isinstance(expected, tuple) or len(expected) != len(found):
        return "its own forward does not return an output and its attention", by_chance
    for name, mine, theirs in zip(("output", "attention"), found, expected, strict=True):
        if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
            return f"its own forward returns another {name} than the published one on a small example", by_chance
        difference = torch.linalg.vector_norm(mine.double() - theirs.double())
        if not difference <= TOLERANCE[mine.dtype] * torch.linalg.vector_norm(theirs.double()):
            return f"its own forward gives another {name} than the published one on a small example", by_chance
    if gradients_differ(ours_of_it, theirs_of_it, GRADIENT_TOLERANCE[found[0].dtype]):
        return "its own forward gives another gradient than the published one on a small example", by_chance
    return None, by_chance


@contextmanager
def differentiably(parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Autograd records whatever the caller's mode is; not where parameters cannot be differentiated by."""
    recorded = not any(parameter.is_inference() for parameter in parameters)
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """The module's buffers are afterwards what they were."""
    kept = [
        (part._buffers, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.inference_mode():  # there tensors of either mode may be changed in place
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer
                if torch._debug_has_internal_overlap(buffer) != 1:  # an expanded one, which nothing can write to
                    buffer.copy_(value)


@contextmanager
def random_kept() -> Iterator[None]:
    """The states of PyTorch's, Python's and NumPy's generators are afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_all(seed: int) -> None:
    """Seeds PyTorch's, Python's and NumPy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _generators(module: nn.Module) -> tuple[Any, ...]:
    """The states of the generators that a call of the module may draw from, to be compared."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device) for device in {x.device for x in module.parameters() if x.is_cuda}]
    return random.getstate(), numpy[1].tobytes(), numpy[2:], [state.tolist() for state in states]


@contextmanager
def _unfrozen(module: nn.Module) -> Iterator[None]:
    """Parameters that are frozen have gradients for a while: somebody may train them later."""
    parameters = list(module.parameters()) if torch.is_grad_enabled() else []
    frozen = [parameter for parameter in parameters if parameter.is_floating_point() and not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradients(result: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a result along one direction, float64; zero where the input has none."""
    none = torch.zeros((), dtype=torch.float64, device="cpu")
    if not isinstance(result, Tensor) or not result.requires_grad:
        return [none] * len(inputs)
    direction = torch.randn(result.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(result)
    found = torch.autograd.grad(result, inputs, direction, allow_unused=True)
    return [none if x is None else x.double().cpu() for x in found]


def gradients_differ(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether a gradient differs from theirs by more than ``tolerance`` of its norm."""
    norm = torch.linalg.vector_norm
    pairs = zip(ours, theirs, strict=True)
    return any(not norm(mine - other) <= tolerance * norm(other) + tolerance**2 for mine, other in pairs)


def _leaves(value: Any, found: list[Tensor]) -> Any:
    """A copy of tuples and dicts whose floating tensors require a gradient, but for masks of -inf; noted in ``found``.

    What was one tensor is one tensor.
    """
    known: dict[int, Tensor] = {}

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in known:
            known[id(x)] = x.detach().clone()
            if x.is_floating_point() and not x.isinf().any() and torch.is_grad_enabled():
                found.append(known[id(x)].requires_grad_())
        return known[id(x)]

    return tree_map(leaf, value)


def _real(module: nn.Module) -> nn.Module:
    """The module; of one without data (meta tensors), a copy with random parameters."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    copied = copy.deepcopy(module).to_empty(device="cpu")
    draw = _Draw(next(copied.parameters()))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_(draw(*parameter.shape) / 4)
    return copied


class _OurMasks(TorchFunctionMode):
    """Dropout draws the masks that ``AcceleratedLayer`` draws from the same state of PyTorch's generator.

    So a layer that drops elsewhere, or at another rate, gives another result. Drops are numbered as they come.
    """

    def __init__(self, offsets: tuple[int, ...]) -> None:
        super().__init__()
        self.offsets = iter(offsets)
        self.seed: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.dropout, torch.dropout):
            return func(*args, **(kwargs or {}))
        names = ("input", "p", "training") if func is F.dropout else ("input", "p", "train")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        x, p, training = given["input"], given.get("p", 0.5), given.get(names[2], True)
        if not training or p == 0:
            return x
        if self.seed is None:
            self.seed = torch.randint(SEEDS, (), device=x.device)
        batch_first = x.transpose(0, 1).contiguous()
        return ops.dropout(batch_first, p, seed=self.seed, offset=next(self.offsets, -1)).transpose(0, 1)


class _Draw:
    """Small examples on a parameter's device, in its dtype; PyTorch's generators are not touched."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.like)

    def padding(self, B: int, L: int) -> Tensor:
        """[B, L]: the first sample's last position."""
        padded = torch.zeros(B, L, dtype=torch.bool, device=self.like.device)
        padded[0, -1] = True
        return padded

    def future(self, L: int) -> Tensor:
        return torch.full((L, L), -torch.inf, device="cpu").to(self.like).triu(1)


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
