"""accelerate(model): what it leaves alone, and says so."""

from __future__ import annotations

import pytest
import torch
from accelerate_checks import FUTURE, PREFIX, B, D, H, draw
from torch import nn

import cnm_kernels
from cnm_kernels.drop_in.attention import AcceleratedAttention
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer
from examples.research_code.attention import MultiheadAttention
from examples.research_code.transformer import DecoderLayer

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


class Other(MultiheadAttention):
    """The interface, but not the formula."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        output, weights = super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask)
        return (output, weights) if gauss_weight is None else (output, weights * gauss_weight.unsqueeze(1))


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


class DropsValues(MultiheadAttention):
    """Drops in training whatever its rate is."""

    def forward(self, query, key, value, key_padding_mask=None, incremental_state=None, need_weights=True,
                static_kv=False, attn_mask=None, fast_weights=None, gauss_weight=None):  # fmt: skip
        value = nn.functional.dropout(value, 0.5, self.training)
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


class ModuleDropout(MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(D, H)
        self.dropout = nn.Dropout(0.1)  # type: ignore[assignment]


def test_an_attention_whose_dropout_is_a_module_is_left_alone() -> None:
    model = nn.ModuleList([MultiheadAttention(D, H), ModuleDropout()])
    with pytest.warns(RuntimeWarning, match="ModuleDropout is left alone: its dropout must be a rate, got Dropout"):
        cnm_kernels.accelerate(model)
    assert isinstance(model[0], AcceleratedAttention)
    assert type(model[1]) is ModuleDropout


def test_a_mask_for_each_sample_and_head() -> None:
    module = MultiheadAttention(D, H).double()
    x, mask = draw(5, B, D), draw(B * H, 5, 5, seed=3)
    wanted = module(x, x, x, attn_mask=mask)
    cnm_kernels.accelerate(module)
    with pytest.warns(RuntimeWarning, match="other than a causal one") as said:
        found = module(x, x, x, attn_mask=mask)
    assert said[0].filename == __file__  # the line that calls the module
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CoarseEps, "another output"),
        (DropsValues, "in training"),
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


def test_torch_s_own_attention_is_not_taken_for_it() -> None:
    model = nn.TransformerEncoderLayer(D, H)
    with pytest.warns(RuntimeWarning, match="has no attention module with the published interface; nothing changed"):
        cnm_kernels.accelerate(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got dict"):
        cnm_kernels.accelerate({})  # type: ignore[type-var]
