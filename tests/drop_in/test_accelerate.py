"""accelerate(model): published interfaces, the same results and gradients, and nothing else of the model changed.

The research code of ``examples/research_code`` runs beside an accelerated copy of itself, without dropout, from one
seed. Bounds on ||difference|| / ||value||: float64 1e-9; float32 1e-5 against the plain copy in float64 (it may be
nearer to it than the plain copy in float32 is); in bfloat16 four times what the plain copy errs against float64.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from samples import targets
from torch import Tensor, nn

import cnm_kernels
from benchmarks.bench_accelerate import CNM, CPL, LOSS, tiny
from cnm_kernels.drop_in import attention
from cnm_kernels.drop_in.attention import AcceleratedAttention
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer
from cnm_kernels.drop_in.deferred import Deferred
from examples.research_code import cnm_losses, cpl_losses
from examples.research_code.attention import MultiheadAttention
from examples.research_code.transformer import DecoderLayer

D, H, B = 32, 4, 3
BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}
TIMES_PLAIN = 4
EXPERIMENTS = {"CNM": tiny(CNM), "CPL": tiny(CPL)}
EVERYWHERE = targets("weighted_attention", (torch.float64, torch.float32, torch.bfloat16))


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention._said.clear()
        yield


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest ||found - wanted|| / ||wanted||."""
    return max(
        ((mine.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()
        for mine, other in zip(found, wanted, strict=True)
    )


def assert_as_good(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """``found`` is what ``plain`` is, and near enough to ``exact``, the same in float64."""
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in plain]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    dtype = plain[0].dtype
    if dtype in BOUND:
        assert error(found, exact) <= BOUND[dtype]
    else:
        rounding = torch.finfo(dtype).eps
        for mine, other, want in zip(found, plain, exact, strict=True):
            assert error([mine], [want]) <= TIMES_PLAIN * error([other], [want]) + rounding


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def module_in(kind: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return kind().bfloat16().to(device, dtype)


def differentiate(call: Callable[[], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs (attention included) and the gradients of all of them to ``inputs``."""
    outputs = [output for output in call() if output is not None]
    upstream = [draw(*output.shape, seed=9).to(output) for output in outputs]
    found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [*(output.detach() for output in outputs), *(d for d in found if d is not None)]


# ---- one attention module ----

FUTURE = torch.full((5, 5), -torch.inf).triu(1)
PREFIX = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
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
    "three-sources-gauss": {"sources": 3, "gauss": True},
}


def attention_call(
    name: str, dtype: torch.dtype, device: str, *, accelerated: bool, bias: bool = True
) -> tuple[Callable[[], Any], list[Tensor]]:
    options = dict(CALLS[name])
    module = module_in(lambda: MultiheadAttention(D, H, bias=bias), dtype, device)
    if accelerated:
        cnm_kernels.accelerate(module)
    sources = [draw(5, B, D, seed=i).to(device, dtype).requires_grad_() for i in range(options.pop("sources", 1))]
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
    with cnm_kernels.use_backend(backend):
        found = differentiate(*attention_call(name, dtype, device, accelerated=True))
    assert_as_good(found, plain, exact)


def test_attention_without_biases() -> None:
    plain = differentiate(*attention_call("cross", torch.float64, "cpu", accelerated=False, bias=False))
    found = differentiate(*attention_call("cross", torch.float64, "cpu", accelerated=True, bias=False))
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


# ---- attention that is read when somebody reads it ----


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


def test_attention_may_be_read_after_the_update() -> None:
    """What logs an attention map after optimizer.step() gets the map the step was made with."""
    module = cnm_kernels.accelerate(MultiheadAttention(D, H))
    x = torch.randn(5, B, D)
    output, weights = module(x, x, x)
    expected = module(x, x, x)[1].detach().clone()
    output.sum().backward()
    torch.optim.SGD(module.parameters(), 10.0).step()
    torch.testing.assert_close(weights.detach(), expected)


# ---- decoder layers ----


def layer_call(dtype: torch.dtype, device: str, *, accelerated: bool, cross: bool) -> tuple[Any, list[Tensor]]:
    layer = module_in(lambda: DecoderLayer(D, H, dropout=0.0), dtype, device)
    with torch.no_grad():
        for norm in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm):
            norm.weight.copy_((1 + draw(D, seed=3) / 8).bfloat16())
            norm.bias.copy_(draw(D, seed=4) / 8)
    if accelerated:
        cnm_kernels.accelerate(layer)
        assert isinstance(layer, AcceleratedLayer)
    x, source = (draw(5, B, D, seed=seed).to(device, dtype).requires_grad_() for seed in (1, 2))
    weight = draw(B, 5, seed=7).sigmoid().bfloat16().to(device, dtype).requires_grad_()
    padding, future = PREFIX.byte().to(device), FUTURE.to(device, dtype)
    arguments = (x, padding, source, padding, future, weight, None) if cross else (x, padding, None, None, future)
    options = {} if cross else {"tgt_gauss_weight": weight}
    return lambda: layer(*arguments, **options), [x, source, weight, *layer.parameters()]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("backend", "device", "dtype"), EVERYWHERE)
def test_decoder_layer(backend: str, device: str, dtype: torch.dtype, cross: bool) -> None:
    plain = differentiate(*layer_call(dtype, device, accelerated=False, cross=cross))
    exact = differentiate(*layer_call(torch.float64, device, accelerated=False, cross=cross))
    with cnm_kernels.use_backend(backend):
        found = differentiate(*layer_call(dtype, device, accelerated=True, cross=cross))
    assert_as_good(found, plain, exact)


def test_a_layer_s_dropout_follows_the_seed_the_rate_and_the_mode() -> None:
    layer = cnm_kernels.accelerate(DecoderLayer(D, H, dropout=0.4))
    x = torch.randn(5, B, D)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x, None)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(layer(x, None)[0], layer(x, None)[0])
    layer.eval()
    assert torch.equal(run(1), run(2))


def test_a_layer_drops_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three sublayers, with masks of its own."""
    drawn: list[tuple[float, Any, int]] = []
    op = cnm_kernels.ops.dropout_add_layer_norm

    def recorded(*arguments: Any, seed: Any, offset: int, **options: Any) -> Tensor:
        drawn.append((arguments[4], int(seed), offset))
        return op(*arguments, seed=seed, offset=offset, **options)

    layer = cnm_kernels.accelerate(DecoderLayer(D, H, dropout=0.4))
    monkeypatch.setattr(cnm_kernels.ops, "dropout_add_layer_norm", recorded)
    x = torch.randn(5, B, D)
    for _ in range(2):
        layer(x, None, x)
    assert [rate for rate, _, _ in drawn] == [0.4] * 6
    assert len({(seed, offset) for _, seed, offset in drawn}) == 6
    drawn.clear()
    layer.eval()(x, None, x)
    assert [rate for rate, _, _ in drawn] == [0.0] * 3


def test_a_hooked_layer_calls_its_parts() -> None:
    layer = DecoderLayer(D, H, dropout=0.0).double()
    cnm_kernels.accelerate(layer)
    x = draw(5, B, D)
    expected = layer(x, None)[0]
    seen: list[torch.Size] = []
    layer.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(layer(x, None)[0], expected)
    assert seen == [torch.Size([5, B, 2 * D])]


# ---- whole models with their losses ----


def train_once(name: str, dtype: torch.dtype, *, accelerated: str, autocast: bool = False) -> list[Tensor]:
    """Both losses, everything the model returns that is small, and all gradients in one vector."""
    experiment = EXPERIMENTS[name]
    losses = cnm_losses if name == "CNM" else cpl_losses
    model = experiment.model(dropout=0.0).bfloat16().to(dtype)
    if accelerated:
        cnm_kernels.accelerate(model)
    if accelerated == "with losses":
        cnm_kernels.accelerate_losses(losses)
    elif accelerated == "without logits":
        cnm_kernels.accelerate_losses(losses, model)
    options = LOSS if name == "CNM" else LOSS | {"num_props": experiment.K}
    batch = {
        key: value.bfloat16().to(dtype) if key in ("frames_feat", "words_feat") else value
        for key, value in experiment.batch().items()
    }
    batch["frames_len"] = batch["frames_len"] - torch.arange(experiment.B)
    try:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch)
            results = [getattr(losses, loss)(**output, **options) for loss in ("rec_loss", "ivc_loss")]
    finally:
        cnm_kernels.restore(losses)
    total = results[0][0] + results[1][0]
    gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    if accelerated == "without logits":
        assert isinstance(output["words_logit"], Deferred)
        assert output["words_logit"].pending
    numbers = torch.tensor([results[i][1][key] for i in range(2) for key in sorted(results[i][1])])
    tensors = [total, numbers, *(output[key] for key in ("center", "width", "attn_weight", "words_logit"))]
    return [*(tensor.detach().to(dtype) for tensor in tensors), torch.cat([d.flatten() for d in gradients])]


@pytest.mark.parametrize("accelerated", ["model", "with losses", "without logits"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), (None, torch.float32)]
)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_training_step(name: str, backend: str | None, dtype: torch.dtype, accelerated: str) -> None:
    exact, plain = (train_once(name, kind, accelerated="") for kind in (torch.float64, dtype))
    with cnm_kernels.use_backend(backend):
        found = train_once(name, dtype, accelerated=accelerated)
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_training_step_in_bfloat16(name: str, autocast: bool) -> None:
    """All gradients together against float64. (Single losses are a matter of luck: which proposal is the best.)"""
    dtype = torch.float32 if autocast else torch.bfloat16
    exact, plain, found = (
        train_once(name, kind, accelerated=how, autocast=autocast and kind != torch.float64)[-1]
        for kind, how in ((torch.float64, ""), (dtype, ""), (dtype, "without logits"))
    )
    if autocast:
        assert found.dtype == plain.dtype == torch.float32
    assert error([found], [exact]) <= TIMES_PLAIN * error([plain], [exact]) + torch.finfo(torch.bfloat16).eps


# ---- what accelerate must not disturb ----


@pytest.fixture
def model() -> nn.Module:
    return EXPERIMENTS["CNM"].model(dropout=0.0)


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model.train()(**EXPERIMENTS["CNM"].batch())["words_logit"].detach()


def test_every_attention_and_layer_is_found(model: nn.Module) -> None:
    assert cnm_kernels.accelerate(model) is model
    kinds = [type(module) for module in model.modules()]
    assert sum(issubclass(kind, AcceleratedAttention) for kind in kinds) == 12
    assert sum(issubclass(kind, AcceleratedLayer) for kind in kinds) == 6
    assert all(isinstance(module, MultiheadAttention) for module in model.modules() if hasattr(module, "in_proj_bias"))
    cnm_kernels.accelerate(model)  # a second time changes nothing
    assert [type(module) for module in model.modules()] == kinds


def test_restore_undoes_everything(model: nn.Module) -> None:
    before = [type(module) for module in model.modules()]
    expected = run(model)
    cnm_kernels.accelerate(model)
    cnm_kernels.accelerate_losses(cnm_losses, model)
    assert [type(module) for module in model.modules()] != before
    cnm_kernels.restore(model)
    cnm_kernels.restore(cnm_losses)
    assert [type(module) for module in model.modules()] == before
    assert torch.equal(run(model), expected)


def test_state_dict_parameters_and_modes(model: nn.Module) -> None:
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    cnm_kernels.accelerate(model)
    cnm_kernels.accelerate_losses(cnm_losses, model)
    cnm_kernels.restore(cnm_losses)
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    model.load_state_dict(state)
    assert model.training
    assert not any(module.training for module in model.eval().modules())
    assert set(model(**EXPERIMENTS["CNM"].batch())) == {"center", "width"}
    assert {parameter.dtype for parameter in model.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "replicas"])
def test_copies_are_accelerated_and_stand_alone(model: nn.Module, how: str) -> None:
    cnm_kernels.accelerate(model)
    expected = run(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:  # what DataParallel makes of a module for each device
        layer = model.trans.decoder1.decoder_layers[0].self_attn
        replica = layer._replicate_for_data_parallel()
        replica.in_proj_weight = torch.zeros_like(layer.in_proj_weight)
        replica.in_proj_bias, replica.out_proj = layer.in_proj_bias, layer.out_proj
        x = torch.randn(5, B, D)
        assert not torch.allclose(replica(x, x, x)[0], layer(x, x, x)[0])
        return
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(other), expected)


def test_ddp() -> None:
    """One process, the gradient hooks of DistributedDataParallel in place."""
    model, plain = (EXPERIMENTS["CPL"].model(dropout=0.0) for _ in range(2))
    cnm_kernels.accelerate(model)
    batch = EXPERIMENTS["CPL"].batch()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for each in (parallel, plain):
            torch.manual_seed(1)
            each(**batch)["words_logit"].square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    pairs = [(mine.grad, other.grad) for mine, other in zip(model.parameters(), plain.parameters(), strict=True)]
    pairs = [(mine, other) for mine, other in pairs if other is not None and other.norm() > 0]
    assert len(pairs) > 50
    assert error([mine for mine, _ in pairs], [other for _, other in pairs]) < 1e-4


def test_torch_compile_takes_it() -> None:
    layer = cnm_kernels.accelerate(DecoderLayer(D, H, dropout=0.0))
    x, padding = torch.randn(5, B, D), PREFIX.byte()
    expected = layer(x, padding, None, None, FUTURE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        found = torch.compile(layer, backend="aot_eager")(x, padding, None, None, FUTURE)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].read())


def test_inference_mode(model: nn.Module) -> None:
    cnm_kernels.accelerate(model.eval())
    batch = EXPERIMENTS["CNM"].batch()
    expected = model(**batch)["center"]
    with torch.inference_mode():
        assert torch.equal(model(**batch)["center"], expected)


# ---- what accelerate leaves alone ----


class Other(MultiheadAttention):
    """The interface, but not the formula."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        output, weights = super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask)
        return (output, weights) if gauss_weight is None else (output, weights * gauss_weight.unsqueeze(1))


class NeedsFairseq(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        raise ModuleNotFoundError("No module named 'fairseq'")


class Broken(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        raise ZeroDivisionError("of its own")


class NoisyLayer(DecoderLayer):
    """Does something of its own in training."""

    def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None, src_gauss_weight=None,
                tgt_gauss_weight=None):  # fmt: skip
        x = x + torch.rand_like(x) if self.training else x
        return super().forward(x, mask, encoder_out, encoder_mask, self_attn_mask, src_gauss_weight, tgt_gauss_weight)


class CoarseEps(MultiheadAttention):
    """Another epsilon: only small weights show it."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        gauss_weight = None if gauss_weight is None else gauss_weight + 1e-7
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


class DropsTwice(MultiheadAttention):
    """Drops before the weights are applied too, in training."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        value = nn.functional.dropout(value, self.dropout, self.training)
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


class Unweighted(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None):  # fmt: skip
        return super().forward(query, key, value, key_padding_mask, need_weights=need_weights, attn_mask=attn_mask)


class UnweightedLayer(DecoderLayer):
    """The family's ancestor: no weights anywhere."""

    def __init__(self) -> None:
        super().__init__(D, H, dropout=0.0)
        self.self_attn, self.encoder_attn = Unweighted(D, H), Unweighted(D, H)

    def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None):
        update, attention = self.self_attn(x, x, x, mask, attn_mask=self_attn_mask)
        x = self.self_attn_layer_norm(x + nn.functional.dropout(update, self.dropout, self.training))
        if encoder_out is not None:
            update, attention = self.encoder_attn(x, encoder_out, encoder_out, encoder_mask)
            x = self.encoder_attn_layer_norm(x + nn.functional.dropout(update, self.dropout, self.training))
        update = self.fc2(torch.relu(self.fc1(x)))
        return self.final_layer_norm(x + nn.functional.dropout(update, self.dropout, self.training)), attention


@pytest.mark.parametrize("hooked", [False, True])
def test_layers_without_weights(hooked: bool) -> None:
    layer = UnweightedLayer().double()
    x, source = draw(5, B, D), draw(6, B, D, seed=1)
    arguments = (x, PREFIX.byte(), source, None, FUTURE.double())
    wanted = layer(*arguments)
    cnm_kernels.accelerate(layer)
    assert isinstance(layer, AcceleratedLayer)
    assert isinstance(layer.self_attn, AcceleratedAttention)
    if hooked:
        layer.fc1.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(*arguments)[0], wanted[0])


def test_a_layer_passed_over_is_named() -> None:
    class ModuleDropout(DecoderLayer):
        def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None, src_gauss_weight=None,
                    tgt_gauss_weight=None):  # fmt: skip
            raise AssertionError("not called")

    layer = ModuleDropout(D, H, dropout=0.0)
    del layer.dropout
    layer.dropout = nn.Dropout(0.1)
    with pytest.warns(RuntimeWarning, match="ModuleDropout is left alone: its dropout must be a rate, got Dropout"):
        cnm_kernels.accelerate(layer)
    assert isinstance(layer.self_attn, AcceleratedAttention)


def test_a_mask_for_each_sample_and_head() -> None:
    module = MultiheadAttention(D, H).double()
    x, mask = draw(5, B, D), draw(B * H, 5, 5, seed=3)
    wanted = module(x, x, x, attn_mask=mask)
    cnm_kernels.accelerate(module)
    with pytest.warns(RuntimeWarning, match="other than a causal one"):
        found = module(x, x, x, attn_mask=mask)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CoarseEps, "another output"),
        (DropsTwice, "in training"),
        (Other, "gives another output"),
        (Broken, r"fails on a small example \(ZeroDivisionError"),
    ],
)
def test_another_formula_is_left_alone_and_said(kind: type[nn.Module], reason: str) -> None:
    module = kind(D, H)
    with pytest.warns(RuntimeWarning) as said:
        cnm_kernels.accelerate(module)
    assert type(module) is kind
    assert any(reason.replace("\\", "") in str(warning.message) for warning in said)


def test_a_layer_with_ideas_of_its_own_is_left_alone_but_not_its_attention() -> None:
    layer = NoisyLayer(D, H, dropout=0.0)
    with pytest.warns(RuntimeWarning, match="NoisyLayer is left alone: its own forward gives another output"):
        cnm_kernels.accelerate(layer)
    assert type(layer) is NoisyLayer
    assert isinstance(layer.self_attn, AcceleratedAttention)


def test_a_learned_extra_key_is_left_alone() -> None:
    module = MultiheadAttention(D, H)
    module.bias_k = module.bias_v = nn.Parameter(torch.zeros(1, 1, D))
    with pytest.warns(RuntimeWarning) as said:
        cnm_kernels.accelerate(module)
    assert type(module) is MultiheadAttention
    assert "bias_k" in str(said[0].message)


def test_fairseq_is_not_needed() -> None:
    module = cnm_kernels.accelerate(NeedsFairseq(D, H))
    x = torch.randn(5, B, D)
    assert module(x, x, x)[0].shape == (5, B, D)


def test_torch_s_own_attention_is_not_taken_for_it() -> None:
    model = nn.TransformerEncoderLayer(D, H)
    with pytest.warns(RuntimeWarning, match="has no attention module with the published interface; nothing changed"):
        cnm_kernels.accelerate(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got dict"):
        cnm_kernels.accelerate({})  # type: ignore[type-var]
