"""The trial of ``accelerate``: variants that only one of its examples tells from the published modules."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate_checks import generators
from torch import nn

import cnm_kernels
from cnm_kernels.drop_in.attention import AcceleratedAttention
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer
from examples.research_code.attention import MultiheadAttention
from examples.research_code.transformer import DecoderLayer

D, H = 32, 4


class Changed(DecoderLayer):
    """The published forward on a copy that ``change`` has changed."""

    def change(self, layer: DecoderLayer) -> None:
        raise NotImplementedError

    def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None, src_gauss_weight=None,
                tgt_gauss_weight=None):  # fmt: skip
        layer = copy.copy(self)
        layer._modules = dict(self._modules)
        self.change(layer)
        return DecoderLayer.forward(
            layer, x, mask, encoder_out, encoder_mask, self_attn_mask, src_gauss_weight, tgt_gauss_weight
        )


class DropsHidden(Changed):
    """Drops between its two linear layers too."""

    def change(self, layer: DecoderLayer) -> None:
        layer.fc2 = nn.Sequential(nn.Dropout(self.dropout).train(self.training), self.fc2)


class HalfRate(Changed):
    """Drops at half the rate it is said to."""

    def change(self, layer: DecoderLayer) -> None:
        layer.dropout = self.dropout / 2


@pytest.mark.parametrize("kind", [DropsHidden, HalfRate])
def test_a_layer_that_drops_elsewhere_is_left_alone(kind: type[DecoderLayer]) -> None:
    layer = kind(D, H, dropout=0.1)
    with pytest.warns(RuntimeWarning, match=f"{kind.__name__} is left alone: .* with dropout"):
        cnm_kernels.accelerate(layer)
    assert type(layer) is kind
    assert isinstance(layer.self_attn, AcceleratedAttention)


class Epsilon(MultiheadAttention):
    """Its epsilon is an attribute: instances of one class differ."""

    extra = 0.0

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        gauss_weight = None if gauss_weight is None else gauss_weight + self.extra
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


@pytest.mark.parametrize("extra", [1e-4, 1e-10])
def test_every_instance_is_tried(extra: float) -> None:
    model = nn.ModuleList([Epsilon(D, H), Epsilon(D, H)])
    model[1].extra = extra
    with pytest.warns(RuntimeWarning, match="Epsilon is left alone: its own forward gives another"):
        cnm_kernels.accelerate(model)
    assert isinstance(model[0], AcceleratedAttention)
    assert type(model[1]) is Epsilon


@pytest.mark.parametrize(("kind", "changes"), [(Epsilon, True), (MultiheadAttention, False)])
def test_a_model_without_data_is_tried_on_a_copy(kind: type[MultiheadAttention], changes: bool) -> None:
    with torch.device("meta"):
        module = kind(D, H)
    module.extra = 1e-4
    if changes:
        with pytest.warns(RuntimeWarning, match="is left alone"):
            cnm_kernels.accelerate(module)
    else:
        cnm_kernels.accelerate(module)
    assert isinstance(module, AcceleratedAttention) is not changes
    assert module.in_proj_weight.is_meta


class UsesFairseq(MultiheadAttention):
    """Imports fairseq when it runs, as the published attention does."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        from fairseq import utils

        utils.softmax(query, dim=-1)
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


class OtherWithFairseq(UsesFairseq):
    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask)


class NeedsMore(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        raise ModuleNotFoundError("No module named 'apex'")


def test_fairseq_is_not_needed() -> None:
    module = cnm_kernels.accelerate(UsesFairseq(D, H))
    x = torch.randn(5, 3, D)
    assert module(x, x, x)[0].shape == (5, 3, D)
    with pytest.warns(RuntimeWarning, match="computed by PyTorch"):
        assert module(x, x, x, attn_mask=torch.ones(5, 5))[0].shape == (5, 3, D)
    assert "fairseq" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "reason"), [(OtherWithFairseq, "another output"), (NeedsMore, "No module named 'apex'")]
)
def test_what_could_not_be_tried_or_differs_is_left_alone(kind: type[nn.Module], reason: str) -> None:
    module = kind(D, H)
    with pytest.warns(RuntimeWarning, match=reason):
        cnm_kernels.accelerate(module)
    assert type(module) is kind


def test_a_trial_changes_no_random_state_and_no_mode() -> None:
    layer = DecoderLayer(D, H, dropout=0.1).eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    cnm_kernels.accelerate(layer)
    assert torch.equal(torch.rand(4), expected)
    assert isinstance(layer, AcceleratedLayer)
    assert layer.dropout == 0.1
    assert not any(part.training for part in layer.modules())


class Detached(MultiheadAttention):
    """Its weights of keys learn nothing from it."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        gauss_weight = None if gauss_weight is None else gauss_weight.detach()
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


class DetachedLayer(DecoderLayer):
    def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None, src_gauss_weight=None,
                tgt_gauss_weight=None):  # fmt: skip
        encoder_out = None if encoder_out is None else encoder_out.detach()
        return super().forward(x, mask, encoder_out, encoder_mask, self_attn_mask, src_gauss_weight, tgt_gauss_weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: Detached(D, H), lambda: DetachedLayer(D, H, dropout=0.1)])
def test_what_stops_a_gradient_is_left_alone(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    module = make().to(dtype)
    kind = type(module)
    with pytest.warns(RuntimeWarning, match=f"{kind.__name__} is left alone: its own forward gives another gradient"):
        cnm_kernels.accelerate(module)
    assert type(module) is kind


class Relative(MultiheadAttention):
    """A bias that is learned, zero at first."""

    def __init__(self) -> None:
        super().__init__(D, H)
        self.bias = nn.Parameter(torch.zeros(100))

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        bias = self.bias[torch.arange(len(query)).unsqueeze(1) - torch.arange(len(key))]
        attn_mask = bias if attn_mask is None else bias + attn_mask
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


def test_frozen_parameters_are_tried_as_if_they_were_trained() -> None:
    module = Relative().requires_grad_(False)
    module.out_proj.requires_grad_()
    with pytest.warns(RuntimeWarning, match="Relative is left alone: its own forward gives another gradient"):
        cnm_kernels.accelerate(module)
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == {
        "out_proj.weight",
        "out_proj.bias",
    }


class Counts(MultiheadAttention):
    """Counts its calls, in place and not, and draws what nobody needs."""

    def __init__(self) -> None:
        super().__init__(D, H)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("new", torch.zeros(()))

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        self.calls += 1
        self.new = self.new + 1
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


def test_a_trial_leaves_buffers_and_generators_as_they_were() -> None:
    module = Counts()
    calls, states = module.calls, generators()
    cnm_kernels.accelerate(module)
    assert isinstance(module, AcceleratedAttention)
    assert module.calls is calls
    assert module.calls == module.new == 0
    assert generators() == states


def test_a_look_at_a_parametrized_weight_leaves_it_as_it_was() -> None:
    """Spectral norms go one step further each time their weight is read in training."""
    module = nn.utils.parametrizations.spectral_norm(MultiheadAttention(D, H), "in_proj_weight")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    cnm_kernels.accelerate(nn.ModuleList([module]))
    assert isinstance(module, AcceleratedAttention)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("other", [nn.LazyBatchNorm1d, nn.Module], ids=["lazy", "expanded"])
def test_buffers_that_cannot_be_copied_are_left_alone(other: type[nn.Module]) -> None:
    module = nn.ModuleList([MultiheadAttention(D, H), other()])
    if other is nn.Module:
        module[1].register_buffer("mask", torch.ones(1, 4).expand(3, 4))
    cnm_kernels.accelerate(module)
    assert isinstance(module[0], AcceleratedAttention)


def test_its_own_forward_runs_once() -> None:
    """Though it imports fairseq in the middle, which is found out at the first call."""
    calls = []

    class Late(MultiheadAttention):
        def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                    static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
            calls.append(attn_mask)
            from fairseq import utils

            utils.softmax(query, dim=-1)
            return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)

    module = cnm_kernels.accelerate(Late(D, H))
    x, mask = torch.randn(5, 3, D), torch.ones(5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch computes it, said once
        module(x, x, x, attn_mask=mask)
        calls.clear()
        module(x, x, x, attn_mask=mask)
    assert len(calls) == 1


def test_nothing_stays_replaced_when_something_is_raised() -> None:
    class Interrupted(MultiheadAttention):
        def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                    static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
            raise KeyboardInterrupt

    model = nn.ModuleList([MultiheadAttention(D, H), Interrupted(D, H)])
    with pytest.raises(KeyboardInterrupt):
        cnm_kernels.accelerate(model)
    assert [type(module) for module in model] == [MultiheadAttention, Interrupted]


def test_a_trial_in_inference_mode() -> None:
    module, layer = MultiheadAttention(D, H), DecoderLayer(D, H, dropout=0.1)
    with torch.inference_mode():
        made = MultiheadAttention(D, H)
        for one in (module, layer, made):
            cnm_kernels.accelerate(one)
    assert isinstance(module, AcceleratedAttention)
    assert isinstance(layer, AcceleratedLayer)
    assert isinstance(made, AcceleratedAttention)


@pytest.mark.parametrize("make", [lambda: MultiheadAttention(D, H), lambda: DecoderLayer(D, H, dropout=0.1)])
def test_the_caller_s_default_device_is_not_the_trial_s(make: Callable[[], nn.Module]) -> None:
    module = make()
    with torch.device("meta"):
        cnm_kernels.accelerate(module)
    assert isinstance(module, AcceleratedAttention | AcceleratedLayer)


@pytest.mark.parametrize("sizes", [(32, 4), (256, 4), (512, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_published_modules_of_every_width_and_dtype_are_accelerated(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention, layer = MultiheadAttention(*sizes).to(dtype), DecoderLayer(*sizes, dropout=0.1).to(dtype)
    assert isinstance(cnm_kernels.accelerate(attention), AcceleratedAttention)
    assert isinstance(cnm_kernels.accelerate(layer), AcceleratedLayer)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("sizes", [(32, 4), (256, 4)])
def test_products_in_tf32_are_no_other_attention(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    product = torch.bmm

    def rounded(x: torch.Tensor) -> torch.Tensor:
        near = ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return x + (near - x).detach()

    monkeypatch.setattr(torch, "bmm", lambda a, b: product(rounded(a), rounded(b)))
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    assert isinstance(cnm_kernels.accelerate(MultiheadAttention(*sizes)), AcceleratedAttention)


class Scored(MultiheadAttention):
    """The published attention, but for what ``changed`` makes of its scores [B * heads, Lq, Lk]."""

    changed: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        heads = [x.unflatten(-1, (H, D // H)).flatten(1, 2).transpose(0, 1) for x in self._projected(query, key)]
        scores = (heads[0] @ heads[1].transpose(1, 2)) * self.head_dim**-0.5
        attn_mask = (0 if attn_mask is None else attn_mask) + type(self).changed(scores) - scores
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)

    def _projected(self, query, key):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return [nn.functional.linear(x, w, b) for x, w, b in zip((query, key), weights, biases, strict=False)]


class KeepsTheBest(Scored):
    @staticmethod
    def changed(scores):
        least = scores.topk(min(10, scores.size(-1)), -1).values[..., -1:]
        return scores.masked_fill(scores < least, -1e30)


class LooksNearby(Scored):
    @staticmethod
    def changed(scores):
        apart = (torch.arange(scores.size(1)).unsqueeze(1) - torch.arange(scores.size(2))).abs()
        return scores.masked_fill(apart > 8, -1e30)


class Caps(Scored):
    @staticmethod
    def changed(scores):
        return 50 * torch.tanh(scores / 50)


class Clamps(Scored):
    @staticmethod
    def changed(scores):
        return scores.clamp(-10, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [KeepsTheBest, LooksNearby, Caps, Clamps])
def test_what_many_keys_or_large_scores_show_is_left_alone(kind: type[Scored], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = kind(D, H).to(dtype)
    with pytest.warns(RuntimeWarning, match=f"{kind.__name__} is left alone: its own forward gives another"):
        cnm_kernels.accelerate(module)
    assert type(module) is kind


def test_a_change_of_scores_by_nothing_is_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scored, "changed", staticmethod(lambda scores: scores), raising=False)
    assert isinstance(cnm_kernels.accelerate(Scored(D, H).double()), AcceleratedAttention)


DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": random.random,
}


class ForgetsWeights(MultiheadAttention):
    draws: Callable[[], float]

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        gauss_weight = None if self.training and self.draws() < 0.2 else gauss_weight
        return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, gauss_weight=gauss_weight)


class SkipsLayers(DecoderLayer):
    draws: Callable[[], float]

    def forward(self, x, mask, encoder_out=None, encoder_mask=None, self_attn_mask=None, src_gauss_weight=None,
                tgt_gauss_weight=None):  # fmt: skip
        out = super().forward(x, mask, encoder_out, encoder_mask, self_attn_mask, src_gauss_weight, tgt_gauss_weight)
        return (x, out[1]) if self.training and self.draws() < 0.2 else out


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("make", [lambda: ForgetsWeights(D, H), lambda: SkipsLayers(D, H, dropout=0.1)])
def test_what_happens_now_and_then_is_left_alone(make: Callable[[], nn.Module], draw: str) -> None:
    """Whatever the generators' states are, which stay as they were."""
    for seed in range(3):
        module = make()
        module.draws = DRAWS[draw]
        kind = type(module)
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        states = generators()
        with pytest.warns(RuntimeWarning, match=f"{kind.__name__} is left alone: its own forward gives another"):
            cnm_kernels.accelerate(module)
        assert type(module) is kind
        assert generators() == states
