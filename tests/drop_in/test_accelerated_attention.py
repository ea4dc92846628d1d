"""accelerate(model): one attention module, and its weights, which are computed when they are read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate_checks import (
    EVERYWHERE,
    FUTURE,
    PREFIX,
    B,
    D,
    H,
    assert_as_good,
    differentiate,
    draw,
    module_in,
)
from kept_memory import kept_bytes
from torch import Tensor, nn

import cnm_kernels
from cnm_kernels import absorption
from cnm_kernels.drop_in.attention import AcceleratedAttention
from examples.research_code.attention import MultiheadAttention
from examples.research_code.transformer import DecoderLayer

SCATTERED = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
STARVING = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "self-causal": {"attn_mask": FUTURE},
    "self-causal-gauss": {"attn_mask": FUTURE, "gauss": True},
    "self-causal-uint8-gauss": {"attn_mask": FUTURE, "key_padding_mask": PREFIX.byte(), "gauss": True},
    "self-causal-scattered": {"attn_mask": FUTURE, "key_padding_mask": SCATTERED.bool()},
    "self-causal-scattered-gauss": {"attn_mask": FUTURE, "key_padding_mask": SCATTERED.byte(), "gauss": True},
    "self-causal-starving": {"attn_mask": FUTURE, "key_padding_mask": STARVING.bool()},
    "self-starving-gauss": {"key_padding_mask": STARVING.byte(), "gauss": True},
    "self-no-mask-at-all": {"attn_mask": torch.zeros(5, 5), "key_padding_mask": torch.zeros(3, 5).bool()},
    "self-without-weights": {"attn_mask": FUTURE, "need_weights": False},
    "cross": {"sources": 2},
    "cross-prefix-bool-gauss": {"sources": 2, "key_padding_mask": PREFIX.bool(), "gauss": True},
    "cross-scattered-gauss": {"sources": 2, "key_padding_mask": SCATTERED.bool(), "gauss": True},
    "few-queries": {"sources": 2, "queries": 2},
    "few-queries-prefix-gauss": {"sources": 2, "queries": 2, "key_padding_mask": PREFIX.byte(), "gauss": True},
    "few-queries-scattered": {"sources": 2, "queries": 2, "key_padding_mask": SCATTERED.bool()},
    "few-queries-starving": {"sources": 2, "queries": 2, "key_padding_mask": STARVING.bool()},
    "few-keys": {"sources": 2, "queries": 40},
    "few-keys-prefix-gauss": {"sources": 2, "queries": 40, "key_padding_mask": PREFIX.bool(), "gauss": True},
    "few-keys-scattered-gauss": {"sources": 2, "queries": 40, "key_padding_mask": SCATTERED.byte(), "gauss": True},
    "three-sources-gauss": {"sources": 3, "gauss": True},
}

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def attention_call(
    name: str, dtype: torch.dtype, device: str, *, accelerated: bool, bias: bool = True
) -> tuple[Callable[[], Any], list[Tensor]]:
    options = dict(CALLS[name])
    module = module_in(lambda: MultiheadAttention(D, H, bias=bias), dtype, device)
    if accelerated:
        cnm_kernels.accelerate(module)
    lengths = [options.pop("queries", 5), 5, 5][: options.pop("sources", 1)]
    sources = [draw(L, B, D, seed=i).to(device, dtype).requires_grad_() for i, L in enumerate(lengths)]
    leaves = [*sources, *module.parameters()]
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"].to(device, dtype)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"].to(device)
    if options.pop("gauss", False):
        options["gauss_weight"] = draw(B, 5, seed=7).sigmoid().bfloat16().to(device, dtype).requires_grad_()
        leaves.append(options["gauss_weight"])
    arguments = {1: sources * 3, 2: [sources[0], sources[-1], sources[-1]], 3: sources}[len(sources)]
    return lambda: module(*arguments, **options), leaves


@pytest.mark.parametrize(("backend", "device", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("name", CALLS)
def test_attention(name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    plain = differentiate(*attention_call(name, dtype, device, accelerated=False))
    exact = differentiate(*attention_call(name, torch.float64, device, accelerated=False))
    with cnm_kernels.use_backend(backend), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*padding before a real key, or of all keys, is computed by PyTorch")
        found = differentiate(*attention_call(name, dtype, device, accelerated=True))
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("name", ["cross", "few-queries", "few-keys"])
def test_attention_without_biases(name: str) -> None:
    plain = differentiate(*attention_call(name, torch.float64, "cpu", accelerated=False, bias=False))
    found = differentiate(*attention_call(name, torch.float64, "cpu", accelerated=True, bias=False))
    assert_as_good(found, plain, plain)


def test_another_additive_mask_is_left_to_pytorch_and_said_once() -> None:
    mask = draw(5, 5).requires_grad_()
    x = draw(5, B, D)
    module = module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu")
    fast = cnm_kernels.accelerate(copy.deepcopy(module))
    wanted = differentiate(lambda: module(x, x, x, attn_mask=mask), [mask, *module.parameters()])
    with pytest.warns(RuntimeWarning, match="attention mask other than a causal one is computed by PyTorch"):
        found = differentiate(lambda: fast(x, x, x, attn_mask=mask), [mask, *fast.parameters()])
    assert_as_good(found, wanted, wanted)
    fast(x, x, x, attn_mask=mask)  # in silence, or the warning would be an error


def test_padding_between_real_keys_may_be_anything() -> None:
    """Its scores lead by thousands, so that the real keys' exponentials would vanish beside it."""
    module = module_in(lambda: MultiheadAttention(D, H), torch.float32, "cpu")
    fast = cnm_kernels.accelerate(copy.deepcopy(module))
    x, mask = draw(5, B, D).float(), torch.zeros(B, 5, dtype=torch.bool)
    mask[:, 1] = True
    x[1] *= 1e3
    with pytest.warns(RuntimeWarning, match="padding before a real key"):
        found = fast(x, x, x, mask)[0]
    torch.testing.assert_close(found, module(x, x, x, mask)[0])


@pytest.mark.parametrize("queries", [2, 5, 40])
def test_gradients_are_those_of_parameters_that_were_lent(queries: int) -> None:
    """functional_call gives the module its own back before the backward, which computes some of the forward again."""
    module = module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu")
    x, states = draw(queries, B, D), draw(5, B, D, seed=1)
    lent = {name: (2 * value + 0.1).detach().requires_grad_() for name, value in module.named_parameters()}

    def gradients() -> tuple[Tensor, ...]:
        out = torch.func.functional_call(module, lent, (x, states, states))[0]
        return torch.autograd.grad(out.square().sum(), list(lent.values()))

    wanted = gradients()
    cnm_kernels.accelerate(module)
    for found, value in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("queries", [2, 5, 40])
def test_parameters_may_be_frozen_or_not_by_the_time_of_the_backward(queries: int, frozen: bool) -> None:
    module = module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu")
    x, states = draw(queries, B, D).requires_grad_(), draw(5, B, D, seed=1).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        module.requires_grad_(not frozen)
        out = module(x, states, states)[0]
        module.requires_grad_(frozen)
        return torch.autograd.grad(out.square().sum(), [x, states])

    wanted = gradients()
    cnm_kernels.accelerate(module)
    torch.testing.assert_close(gradients(), wanted)


@pytest.mark.parametrize("queries", [2, 5, 40])
def test_the_backward_may_be_outside_of_the_block_that_chose_the_backend(queries: int) -> None:
    module = cnm_kernels.accelerate(module_in(lambda: MultiheadAttention(D, H), torch.float32, "cpu"))
    x, states = draw(queries, B, D).float(), draw(5, B, D, seed=1).float().requires_grad_()
    found = []
    for leaves in (False, True):
        with cnm_kernels.use_backend("torch"):
            out = module(x, states, states)[0].square().sum()
            if not leaves:
                found += torch.autograd.grad(out, states)
        if leaves:
            found += torch.autograd.grad(out, states)
    assert torch.equal(*found)


@pytest.mark.parametrize("queries", [2, 5, 40])
def test_transforms_of_functions(queries: int) -> None:
    module = module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu")
    x, states = draw(queries, B, D), draw(5, B, D, seed=1)

    def loss(states: Tensor) -> Tensor:
        out, weights = module(x, states, states)
        return out.square().sum() + weights.square().sum()

    wanted = torch.func.grad(loss)(states)
    cnm_kernels.accelerate(module)
    torch.testing.assert_close(torch.func.grad(loss)(states), wanted)


@pytest.mark.parametrize("layered", [False, True])
def test_what_is_traced_serves_other_masks(layered: bool) -> None:
    module = module_in(
        lambda: DecoderLayer(D, H, 0.0) if layered else MultiheadAttention(D, H), torch.float64, "cpu"
    ).requires_grad_(False)
    x = draw(5, B, D)

    def call(x: Tensor, mask: Tensor) -> Tensor:
        return module(x, mask)[0] if layered else module(x, x, x, mask)[0]

    wanted = call(x, PREFIX)
    cnm_kernels.accelerate(module)
    # Of torch.jit, by version of torch, and of checks of shapes.
    for kind in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
        warnings.simplefilter("ignore", kind)
    with pytest.warns(RuntimeWarning, match=r"what torch.jit traces, .*, is computed by PyTorch"):
        traced = torch.jit.trace(call, (x, torch.zeros_like(PREFIX)))
    torch.testing.assert_close(traced(x, PREFIX), wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_under_autocast_have_the_published_dtype(dtype: torch.dtype, weighted: bool) -> None:
    module = module_in(lambda: MultiheadAttention(D, H), dtype, "cpu")
    x, gauss = draw(5, B, D).to(dtype), draw(B, 5, seed=7).sigmoid().to(dtype) if weighted else None
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(module(x, x, x, gauss_weight=gauss))
        cnm_kernels.accelerate(module)
    assert [tensor.dtype for tensor in results[1]] == [tensor.dtype for tensor in results[0]]
    torch.testing.assert_close(results[1][1] + 0, results[0][1], rtol=0, atol=2**-7)


def test_weights_read_outside_of_their_autocast() -> None:
    """Queries in float32, keys in bfloat16: only autocast brings them together."""
    module = module_in(lambda: MultiheadAttention(D, H), torch.float32, "cpu")
    x, source = draw(5, B, D).float(), draw(7, B, D, seed=1).bfloat16()
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            _, weights = module(x, source, source)
        results.append(weights.detach() + 0)
        cnm_kernels.accelerate(module)
    assert results[1].dtype == results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2**-8)


def test_attention_to_nothing_is_the_bias() -> None:
    module = cnm_kernels.accelerate(module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu"))
    nn.init.ones_(module.out_proj.bias)
    nothing = draw(0, B, D)
    out = module(draw(5, B, D), nothing, nothing)[0]
    assert (out == 1).all()


def test_a_mask_that_numpy_changes_is_looked_at_again() -> None:
    module = cnm_kernels.accelerate(module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu"))
    x, numbers = draw(5, B, D), np.zeros((B, 5), dtype=np.uint8)
    mask = torch.from_numpy(numbers)
    module(x, x, x, mask)
    numbers[:, 3:] = 1
    torch.testing.assert_close(module(x, x, x, mask)[0][:3], module(x[:3], x[:3], x[:3])[0])


def test_a_mask_changed_in_place_is_looked_at_again() -> None:
    module = cnm_kernels.accelerate(module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu"))
    x, mask = draw(5, B, D), torch.zeros(B, 5, dtype=torch.uint8)
    before = module(x, x, x, mask)[0]
    mask[:, 3:] = 1
    after = module(x, x, x, mask)[0]
    cnm_kernels.restore(module)
    torch.testing.assert_close(after, module(x, x, x, mask)[0])
    assert not torch.allclose(before, after)


def test_dropout_on_the_attention_is_left_to_pytorch() -> None:
    module = module_in(lambda: MultiheadAttention(D, H, dropout=0.5), torch.float64, "cpu")
    x = draw(5, B, D)
    fast = cnm_kernels.accelerate(copy.deepcopy(module))
    with pytest.warns(RuntimeWarning, match="dropout on the attention"):
        dropped = fast(x, x, x)[1]
    assert 0.2 < (dropped == 0).double().mean() < 0.6 or (dropped < 1e-9).any()
    torch.testing.assert_close(fast.eval()(x, x, x)[0], module.eval()(x, x, x)[0])


class ReadsMasks(MultiheadAttention):
    """Reads masks that the published module does not know."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(attn_mask, -torch.inf)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.repeat_interleave(self.num_heads, 0)
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            added = key_padding_mask.unsqueeze(1).expand(-1, len(query), -1).repeat_interleave(self.num_heads, 0)
            attn_mask, key_padding_mask = (added if attn_mask is None else added + attn_mask), None
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.bool()
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": FUTURE < 0},
        {"attn_mask": draw(B, 5, 5, seed=3)},
        {"key_padding_mask": PREFIX * -1e4},
        {"key_padding_mask": torch.zeros(B, 5).masked_fill(PREFIX == 1, -torch.inf)},
        {"key_padding_mask": PREFIX * 2},
        {"key_padding_mask": PREFIX, "attn_mask": draw(5, 5, seed=3)},
    ],
    ids=["bool", "of each sample", "-1e4", "-inf", "of twos", "other"],
)
@pytest.mark.parametrize("layered", [False, True])
def test_masks_that_no_trial_knows_are_the_module_s_own_business(options: dict[str, Tensor], layered: bool) -> None:
    attention = module_in(lambda: ReadsMasks(D, H), torch.float64, "cpu")
    module = attention
    if layered:
        module = module_in(lambda: DecoderLayer(D, H, dropout=0.0), torch.float64, "cpu")
        module.self_attn = attention
    x = draw(5, B, D)

    def call() -> Any:
        padding, mask = options.get("key_padding_mask"), options.get("attn_mask")
        return module(x, padding, self_attn_mask=mask) if layered else module(x, x, x, padding, attn_mask=mask)

    wanted = call()
    cnm_kernels.accelerate(module)
    assert isinstance(attention, AcceleratedAttention)
    with pytest.warns(RuntimeWarning, match="is computed by PyTorch, without acceleration"):
        found = call()
    torch.testing.assert_close(found, wanted)


class DropsTwice(MultiheadAttention):
    """Drops the values too."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        value = nn.functional.dropout(value, self.dropout, self.training)
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


def test_dropout_stands_where_the_module_puts_it() -> None:
    module = module_in(lambda: DropsTwice(D, H, dropout=0.5), torch.float64, "cpu")
    x = draw(5, B, D)
    torch.manual_seed(1)
    wanted = module(x, x, x)
    cnm_kernels.accelerate(module)
    assert isinstance(module, AcceleratedAttention)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="dropout on the attention"):
        torch.testing.assert_close(module(x, x, x), wanted)


@pytest.mark.parametrize("shape", [(B, 4), (B, 6), (1, 5), (B + 1, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_masks_of_other_shapes_are_the_module_s_own_business(shape: tuple[int, int], padded: bool) -> None:
    class Strict(MultiheadAttention):
        def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                    static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
            assert key_padding_mask is None or key_padding_mask.shape == (key.size(1), key.size(0)), "another shape"
            return super().forward(query, key, value, key_padding_mask, None, need_weights, static_kv, attn_mask,
                                   fast_weights, gauss_weight)  # fmt: skip

    module = module_in(lambda: Strict(D, H), torch.float64, "cpu")
    cnm_kernels.accelerate(module)
    x, mask = draw(5, B, D), torch.zeros(shape, dtype=torch.uint8)
    mask[:, -1] = padded
    with (
        pytest.warns(RuntimeWarning, match="is computed by PyTorch"),
        pytest.raises(AssertionError, match="another shape"),
    ):
        module(x, x, x, mask)


def test_step_by_step_decoding_is_the_module_s_own_business() -> None:
    class Incremental(MultiheadAttention):
        def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                    static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
            if incremental_state is not None:
                return "decoded", None
            return super().forward(query, key, value, key_padding_mask, None, need_weights, static_kv, attn_mask,
                                   fast_weights, gauss_weight)  # fmt: skip

    module = cnm_kernels.accelerate(Incremental(D, H))
    x = torch.randn(5, B, D)
    assert isinstance(module, AcceleratedAttention)
    assert module(x, x, x, incremental_state={})[0] == "decoded"


@pytest.mark.parametrize(
    ("accelerated", "changed"),
    [
        (False, "in_proj_weight"),
        (False, "out_proj.weight"),  # the published code keeps a copy of gauss_weight
        (True, "in_proj_weight"),
        (True, "out_proj.weight"),
        (True, "gauss_weight"),
    ],
)
@pytest.mark.parametrize("queries", [5, 2, 40])
def test_a_change_in_place_before_the_backward_is_refused(accelerated: bool, queries: int, changed: str) -> None:
    module = MultiheadAttention(D, H)
    if accelerated:
        cnm_kernels.accelerate(module)
    source, gauss = torch.randn(5, B, D), torch.rand(B, 5)
    x = (source if queries == 5 else torch.randn(queries, B, D)).requires_grad_()
    output, _ = module(x, source, source, gauss_weight=gauss)
    with torch.no_grad():
        (gauss if changed == "gauss_weight" else module.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        output.sum().backward()


@pytest.mark.parametrize("queries", [5, 2, 40])
def test_an_optimizer_may_step_in_the_backward(queries: int) -> None:
    """As PyTorch's tutorial on optimizers in the backward has it, to keep no gradients."""
    module = module_in(lambda: MultiheadAttention(D, H), torch.float64, "cpu")
    source = draw(5, B, D)
    x = source if queries == 5 else draw(queries, B, D, seed=1)

    def updated(module: nn.Module) -> list[Tensor]:
        for parameter in module.parameters():
            optimizer = torch.optim.SGD([parameter], 1e-2)
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        module(x, source, source)[0].square().sum().backward()
        return [parameter.detach() for parameter in module.parameters()]

    wanted = updated(copy.deepcopy(module))
    torch.testing.assert_close(updated(cnm_kernels.accelerate(module)), wanted)


@pytest.mark.parametrize(("queries", "form"), [(5, None), (2, "into_queries"), (40, "into_keys")])
def test_cross_attention_spares_products_on_cpus(
    queries: int, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for absorb in (absorption.into_queries, absorption.into_keys):

        def noting(*arguments: Any, absorb: absorption.Absorb = absorb) -> Tensor:
            taken.append(absorb.__name__)
            return absorb(*arguments)

        monkeypatch.setattr(absorption, absorb.__name__, noting)
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    taken.clear()
    x, source = torch.randn(queries, B, D), torch.randn(5, B, D)
    with torch.no_grad():
        module(x, source, source)
    assert taken == ([] if form is None else [form])
    module.out_proj.register_forward_hook(lambda *_: None)  # a hook must be called
    with torch.no_grad():
        module(x, source, source)
    assert len(taken) == (form is not None)


def test_weights_are_computed_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    op = cnm_kernels.ops.attention_weights

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(True)
        return op(*arguments, **options)

    monkeypatch.setattr(cnm_kernels.ops, "attention_weights", counted)
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    x = torch.randn(5, B, D)
    asked.clear()
    output, weights = module(x, x, x)
    assert weights.shape == (B, 5, 5)
    assert weights.dtype == torch.float32
    output.sum().backward()
    assert not asked
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 5))
    assert weights.mean().item() == pytest.approx(0.2)
    assert len(asked) == 1


def hooked(x: Tensor) -> Tensor:
    view = x.view_as(x)
    view.register_hook(torch.zeros_like)
    return view


class Reversal(torch.autograd.Function):
    """Gradient reversal: the same numbers in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_x: Tensor) -> Tensor:
        return -d_x[0]


@pytest.mark.parametrize(
    "sources",
    [
        lambda x: (x, x.detach(), x.detach()),
        lambda x: (x.detach(), x, x),
        lambda x: (x, x.detach(), x),
        lambda x: (x, Reversal.apply(x), Reversal.apply(x)),
        lambda x: (x.transpose(0, 1).transpose(0, 1), x, x),
        lambda x: (x, x.view_as(x), hooked(x)),
    ],
    ids=["keys and values detached", "queries detached", "keys detached", "reversal", "views", "a hook"],
)
def test_equal_numbers_keep_gradients_of_their_own(sources: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    plain = MultiheadAttention(D, H)
    accelerated = cnm_kernels.accelerate(copy.deepcopy(plain))
    x, direction = torch.randn(5, B, D, requires_grad=True), torch.randn(5, B, D)
    expected, found = (
        torch.autograd.grad((module(*sources(x))[0] * direction).sum(), x)[0] for module in (plain, accelerated)
    )
    torch.testing.assert_close(found, expected)


def test_views_made_alike_are_projected_together(monkeypatch: pytest.MonkeyPatch) -> None:
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    x = torch.randn(B, 5, D, requires_grad=True)
    seen: list[int] = []
    attend = AcceleratedAttention.attend
    monkeypatch.setattr(
        AcceleratedAttention,
        "attend",
        lambda self, sources, *others: seen.append(len(sources)) or attend(self, sources, *others),
    )
    module(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))
    assert seen == [1]


@pytest.mark.parametrize("queries", [200, 20])
def test_unread_weights_keep_no_projection(queries: int, tmp_path: Path) -> None:
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    source = torch.randn(200, B, D)
    x = source if queries == 200 else torch.randn(queries, B, D)
    with torch.no_grad():
        without, with_weights = (
            kept_bytes(lambda needed=needed: module(x, source, source, need_weights=needed), tmp_path)
            for needed in (False, True)
        )
    states = {tensor.data_ptr(): tensor.nbytes for tensor in (x, source)}  # batch first
    parameters = 2 * D * (D + 1) * 4
    assert 0 < with_weights - without <= 1.05 * (sum(states.values()) + parameters)


@pytest.mark.parametrize("queries", [5, 2, 40])
def test_attention_may_be_read_after_the_update(queries: int) -> None:
    """Code that logs an attention map after optimizer.step() gets the map of the forward before it."""
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    source = torch.randn(5, B, D)
    x = source if queries == 5 else torch.randn(queries, B, D)
    output, weights = module(x, source, source)
    expected = module(x, source, source)[1].detach().clone()
    output.sum().backward()
    torch.optim.SGD(module.parameters(), 10.0).step()
    torch.testing.assert_close(weights.detach(), expected)
