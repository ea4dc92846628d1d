"""The kernels of csrc/cuda alone: paths that the common samples miss, and mistakes that the emulator must notice.

The tests of every backend are in ``test_every_op.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_probe import CSRC, probe, probe_with_mistake
from emulated_backend import LOAD_ERRORS, NAME, seed
from op_checks import check_gradients, check_values, gradients_of
from op_records import DIFFERENTIABLE
from op_records.branched_attention import branched
from op_records.draw import Draw
from op_records.dropout_add_layer_norm import add_and_norm
from op_records.gaussian_attention import gaussian
from op_records.linear_nll import vocabulary
from op_records.weighted_attention import attention, weighted
from samples import run, sample, with_slow
from step_checks import assert_trains_as_torch

from cnm.training.step import STEPS

pytestmark = pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("gaussian_attention", "clips-50"),
        ("weighted_attention", "weighted-causal-lengths"),
        ("branched_attention", "frames-150"),
        ("contrastive_reconstruction_loss", "lengths-0-1-odd-over"),
        ("dropout_add_layer_norm", "published-12x256"),
        ("intra_video_contrastive_loss", "published-128"),
        ("gaussian_mask", "odd-3x5x37-complement"),
    ],
)
@on_dtypes
def test_any_order_of_threads_and_blocks_gives_the_same_bits(op: str, name: str, dtype: torch.dtype) -> None:
    inputs = sample(op, name, dtype, "cpu")

    def once(order: int) -> list[torch.Tensor]:
        seed(order)
        gradients = gradients_of(lambda **inputs: run(op, inputs, NAME), inputs, DIFFERENTIABLE[op])
        return [*run(op, inputs, NAME), *gradients.values()]

    first = once(0)
    for order in range(1, 5):
        for tensor, wanted in zip(once(order), first, strict=True):
            assert torch.equal(tensor, wanted)


MANY_TILES = {
    "three-tiles": lambda draw: weighted(draw, 1, 1, 130, 150, 16),
    "causal": lambda draw: gaussian(draw, 2, 1, 135, 135, 32, causal=True),
    "lengths": lambda draw: weighted(draw, 3, 1, 70, 200, 8, causal=True, key_lengths=draw.lengths(200, 0, 65)),
    "two-heads": lambda draw: gaussian(draw, 1, 2, 70, 130, 24),
    "head-of-128": lambda draw: gaussian(draw, 1, 1, 66, 70, 128, complement=True),
    "head-of-100": lambda draw: attention(draw, 1, 1, 66, 70, 100, causal=True),
    "enough-heads-for-one-launch": lambda draw: gaussian(draw, 66, 4, 65, 66, 8, causal=True),
}


@pytest.fixture(params=[227, 110], ids=["two-stages", "one-stage"])
def shared_memory(request: pytest.FixtureRequest) -> Iterator[int]:
    """KiB that a block may have: with few, tiles are not fetched ahead."""
    import emulated_backend

    emulated_backend.machine.emulator_set_shared_bytes(request.param << 10)
    yield request.param
    emulated_backend.machine.emulator_set_shared_bytes(227 << 10)


@pytest.mark.parametrize("name", with_slow(MANY_TILES, {"enough-heads-for-one-launch"}))
@on_dtypes
def test_attention_over_many_tiles(name: str, dtype: torch.dtype, shared_memory: int) -> None:
    if dtype == torch.float32 and name.startswith("head-of-1") and shared_memory < 140:
        pytest.skip("float32 heads of 128 want more shared memory, which the launch says")
    inputs = MANY_TILES[name](Draw(name, dtype, "cpu"))
    op = "gaussian_attention" if "center" in inputs else "weighted_attention"
    check_values(op, inputs, NAME)
    check_gradients(op, inputs, NAME)


@pytest.mark.parametrize("name", ["causal", "lengths", "two-heads"])
def test_keys_that_a_block_cannot_hold(name: str) -> None:
    """16-bit heads for whose keys a block has too little shared memory pass through it in tiles."""
    import emulated_backend

    inputs = MANY_TILES[name](Draw(name, torch.bfloat16, "cpu"))
    op = "gaussian_attention" if "center" in inputs else "weighted_attention"
    emulated_backend.machine.emulator_set_shared_bytes(40 << 10)
    try:
        check_values(op, inputs, NAME)
        check_gradients(op, inputs, NAME)
    finally:
        emulated_backend.machine.emulator_set_shared_bytes(227 << 10)


@on_dtypes
def test_branches_over_many_tiles(dtype: torch.dtype) -> None:
    inputs = branched(Draw("branches", dtype, "cpu"), 3, 2, 1, 70, 130, 16, causal=True)
    check_values("branched_attention", inputs, NAME)
    check_gradients("branched_attention", inputs, NAME)


def test_a_block_that_cannot_have_its_shared_memory_says_so() -> None:
    import emulated_backend

    inputs = attention(Draw("wide", torch.float32, "cpu"), 1, 1, 66, 70, 128)
    emulated_backend.machine.emulator_set_shared_bytes(64 << 10)
    try:
        with pytest.raises(RuntimeError, match="shared memory"):
            run("weighted_attention", inputs, NAME)
    finally:
        emulated_backend.machine.emulator_set_shared_bytes(227 << 10)


def test_a_head_too_wide_says_so() -> None:
    inputs = attention(Draw("wider", torch.float32, "cpu"), 1, 1, 3, 4, 129)
    with pytest.raises(RuntimeError, match="heads of up to 128, got 129: use_backend"):
        run("weighted_attention", inputs, NAME)


VOCABULARIES = {
    "chunks-of-columns": lambda draw: vocabulary(draw, 5, 7, 300, 50, lengths=(7, 0, 3, 6, 1), return_accuracy=True),
    "parts-of-the-vocabulary": lambda draw: vocabulary(draw, 9, 20, 24, 1030, return_accuracy=True),
    "many-words": lambda draw: vocabulary(draw, 2, 3, 16, 4200),
    "parts-of-the-tokens": lambda draw: vocabulary(draw, 60, 13, 9, 70),
    "more-than-4096-tokens-a-row": lambda draw: vocabulary(draw, 2, 4100, 8, 5),
}


@pytest.mark.parametrize("name", VOCABULARIES)
@on_dtypes
def test_linear_nll_in_parts_and_chunks(name: str, dtype: torch.dtype, shared_memory: int) -> None:
    inputs = VOCABULARIES[name](Draw(name, dtype, "cpu"))
    check_values("linear_nll", inputs, NAME)
    check_gradients("linear_nll", inputs, NAME)


def test_a_word_that_is_none_gives_nan() -> None:
    """A GPU cannot look at its words without waiting: no error can be raised, and no number made up."""
    inputs = vocabulary(Draw("words", torch.float32, "cpu"), 3, 5, 8, 11)
    inputs["target"][1, 2] = 11
    hidden = inputs["hidden"].requires_grad_()
    (nll,) = torch.ops.cnm_kernels_emulated.linear_nll(
        *(inputs[name] for name in ("hidden", "weight", "bias", "target", "valid_lengths")), 0.1, False, True
    )[:1]
    assert nll.isnan().tolist() == [False, True, False]
    assert hidden.isfinite().all()


def test_a_backward_to_hidden_wants_what_the_forward_keeps() -> None:
    inputs = vocabulary(Draw("kept", torch.float32, "cpu"), 3, 5, 8, 11)
    tensors = [inputs[name] for name in ("hidden", "weight", "bias", "target", "valid_lengths")]
    ops = torch.ops.cnm_kernels_emulated
    nll, _, *kept = ops.linear_nll(*tensors, 0.1, False, False)
    with pytest.raises(RuntimeError, match="hidden's gradient needs what a forward with keep_expected keeps"):
        ops.linear_nll_backward(nll, *tensors, 0.1, *kept, True, True, True)
    assert all(d.isfinite().all() for d in ops.linear_nll_backward(nll, *tensors, 0.1, *kept, False, True, True))


def test_rows_without_a_gradient_take_no_part_in_the_backward() -> None:
    """A row without a gradient may hold NaN."""
    inputs = vocabulary(Draw("rows", torch.float32, "cpu"), 3, 5, 8, 11)
    inputs["hidden"][1] = torch.nan
    weight = inputs["weight"].requires_grad_()
    (nll,) = run("linear_nll", inputs, NAME)
    (d_weight,) = torch.autograd.grad(nll, weight, torch.tensor([1.0, 0.0, 1.0]))
    assert d_weight.isfinite().all()


@pytest.mark.parametrize("D", [300, 700, 1500])
@on_dtypes
def test_wide_layer_norms(D: int, dtype: torch.dtype) -> None:
    """Rows of two groups a lane, of four, and such as registers do not hold."""
    inputs = add_and_norm(Draw("wide", dtype, "cpu"), 21, D)
    check_values("dropout_add_layer_norm", inputs, NAME)
    check_gradients("dropout_add_layer_norm", inputs, NAME)


def test_float32_products_are_not_tf32() -> None:
    """Three tf32 products err at most twice what plain float32 errs; one would err a thousand times as much."""
    draw = Draw("tf32", torch.float32, "cpu")
    q, k, v = (draw.normal(2, 4, 50, 64) for _ in range(3))
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    plain = torch.softmax(q @ k.mT / 8, -1) @ v
    (ours,) = run("weighted_attention", {"query": q, "key": k, "value": v}, NAME)
    assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("step", with_slow(STEPS, {"published", "recompute"}))
def test_a_training_step(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_trains_as_torch(step, NAME, monkeypatch)


# ------------------------------------------------------------------------------ the emulator must notice mistakes

MISTAKES = {
    "no barrier once the keys have arrived": (
        "attention.cu",
        "        stages == 2 ? wait_async<3>() : wait_async<1>();\n        sync_block();",
        "        stages == 2 ? wait_async<3>() : wait_async<1>();",
        "weighted_attention:weighted-causal",
    ),
    "no wait for the keys": (
        "attention.cu",
        "        stages == 2 ? wait_async<3>() : wait_async<1>();",
        "",
        "weighted_attention:weighted-plain",
    ),
    "no barrier before a tile is overwritten": (
        "attention.cu",
        "        sync_block();\n        if (stages == 1",
        "        if (stages == 1",
        "branched_attention:frames-150",
    ),
    "no barrier after delta": (
        "attention_backward.cu",
        "        arrive();  // also where no key was\n",
        "",
        "gaussian_attention:frames-200",
    ),
    "no barrier once all keys have arrived": (
        "attention_short.cu",
        "    wait_async<0>();\n    sync_block();\n",
        "    wait_async<0>();\n",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "a row's pieces not where they are read": (
        "attention_short.cu",
        "copy_piece(tile + r * D + (c ^ (r % 8)) * PER,",
        "copy_piece(tile + r * D + c * PER,",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "no barrier before delta is summed": (
        "attention_backward_short.cu",
        "        sync_block();\n        if (own >= last) continue;\n",
        "        if (own >= last) continue;\n",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "no barrier before the queries are overwritten": (
        "attention_backward_short.cu",
        "        wait_async<0>();\n        sync_block();\n",
        "        wait_async<0>();\n",
        "gaussian_attention:frames-200:bfloat16",
    ),
    "no barrier before the last dQ": (
        "attention_backward_short.cu",
        "    sync_block();\n    store_d_query",
        "    store_d_query",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "no barrier before the heads are summed": (
        "attention_backward_short.cu",
        "        if (!merged) return;\n        sync_block();\n",
        "        if (!merged) return;\n",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "one row of a gradient too many": (
        "attention_backward_short.cu",
        "return first_row + r < Lq ? row_of_head<T>(p.d_query",
        "return first_row + r <= Lq ? row_of_head<T>(p.d_query",
        "gaussian_attention:clips-50:bfloat16",
    ),
    "one row too many": (
        "attention.cu",
        "return own_row + r < p.Lq ? row_of_head<T>(p.out",
        "return own_row + r <= p.Lq ? row_of_head<T>(p.out",
        "weighted_attention:weighted-plain",
    ),
    "one word too many": (
        "linear_nll.cu",
        "return word < end ? word : -1;",
        "return word <= end ? word : -1;",
        "linear_nll:plain",
    ),
    "one element too many": (
        "dropout.cu",
        "store_group(out, first, numel, whole, values);",
        "store_group(out, first, numel + 1, whole, values);",
        "dropout:odd-1021",
    ),
    "sums that start from whatever there was": (
        "attention_backward.cu",
        "for (int i = thread(); i < n * TILE; i += threads()) d_weights[i] = 0.0f;",
        "",
        "gaussian_attention:clips-50",
    ),
    "no barrier before the warps' sums are added": (
        "dropout_add_layer_norm.cu",
        "    sync_block();\n    for (int i = thread(); i < 2 * D",
        "    for (int i = thread(); i < 2 * D",
        "dropout_add_layer_norm:published-12x256",
    ),
    "a barrier that not all threads reach": (
        "linear_nll.cu",
        "        sync_block();\n        const int first_word = static_cast<int>(blockIdx.y)",
        "        if (warp() == 0) sync_block();\n        const int first_word = static_cast<int>(blockIdx.y)",
        "linear_nll:plain",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, tmp_path: Path) -> None:
    file, right, wrong, cases = MISTAKES[mistake]
    outcome = probe_with_mistake(tmp_path, file, right, wrong, cases)
    assert outcome.returncode == 1, outcome.stderr
    assert "caught: " in outcome.stdout, outcome.stderr


def test_without_a_mistake_nothing_is_caught() -> None:
    outcome = probe(CSRC, " ".join(sorted({case for *_, case in MISTAKES.values()})))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
