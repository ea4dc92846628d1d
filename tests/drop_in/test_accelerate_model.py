"""accelerate(model): what it must not disturb: parameters, modes, copies, DDP, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate_checks import EXPERIMENTS, FUTURE, PREFIX, B, D, H, error
from torch import Tensor, nn

import cnm_kernels
from cnm_kernels.drop_in.attention import AcceleratedAttention
from cnm_kernels.drop_in.decoder_layer import AcceleratedLayer
from examples.research_code import cnm_losses
from examples.research_code.attention import MultiheadAttention
from examples.research_code.transformer import DecoderLayer

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


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
