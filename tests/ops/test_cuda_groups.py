"""linear_nll on wgmma: against float64, in parts, at edges; and mistakes that the emulator must notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_probe import CSRC, probe, probe_with_mistake
from emulated_backend import LOAD_ERRORS, NAME, seed
from op_checks import check_gradients, check_values, gradients_of
from op_records import DIFFERENTIABLE
from op_records.draw import Draw, misaligned
from op_records.linear_nll import extreme_vocabulary, float32_parameters, vocabulary
from samples import run

from benchmarks import gpu_predict

pytestmark = pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")
on_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])

CASES = {
    "one-tile-of-words": lambda draw: vocabulary(draw, 5, 7, 256, 50, lengths=(7, 0, 3, 6, 1), return_accuracy=True),
    "a-word": lambda draw: vocabulary(draw, 2, 3, 256, 1),
    "tiles-of-words-and-tokens": lambda draw: vocabulary(draw, 7, 20, 256, 330, return_accuracy=True),
    "parts-of-words": lambda draw: vocabulary(draw, 3, 5, 136, 1030, return_accuracy=True),
    "parts-of-tokens": lambda draw: vocabulary(draw, 60, 13, 256, 70),
    "rows-narrower-than-tiles": lambda draw: vocabulary(draw, 3, 50, 248, 200),
    "huge-logits": lambda draw: extreme_vocabulary(vocabulary(draw, 3, 5, 256, 130)),
    "smoothing-of-none": lambda draw: vocabulary(draw, 3, 5, 256, 130, label_smoothing=0.0),
}


@pytest.mark.parametrize("name", CASES)
@on_dtypes
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    inputs = CASES[name](Draw(name, dtype, "cpu"))
    check_values("linear_nll", inputs, NAME)
    check_gradients("linear_nll", inputs, NAME)


def kernels_of(inputs: dict[str, object]) -> set[str]:
    """The kernels of products that a forward and backward launches."""
    with gpu_predict.counting() as found:
        gradients_of(lambda **inputs: run("linear_nll", inputs, NAME), inputs, DIFFERENTIABLE["linear_nll"])
    return {name for name, _ in found if "<" in name and name.startswith("linear_nll")}


def groups(dtype: str) -> set[str]:
    return {f"linear_nll_kernel<{dtype}, 256, true>", f"linear_nll_word_gradient_kernel<{dtype}, 256, true>"}


def test_rows_of_up_to_256_aligned_halves_take_groups() -> None:
    draw = Draw("which", torch.bfloat16, "cpu")
    assert kernels_of(vocabulary(draw, 2, 3, 256, 70)) == groups("bf16")
    assert kernels_of(vocabulary(draw, 2, 3, 136, 70)) == groups("bf16")
    assert kernels_of(vocabulary(Draw("which", torch.float16, "cpu"), 2, 3, 256, 70)) == groups("f16")
    others = [vocabulary(draw, 2, 3, 132, 70), vocabulary(draw, 2, 3, 264, 70), vocabulary(draw, 2, 3, 128, 70)]
    others.append(vocabulary(Draw("which", torch.float32, "cpu"), 2, 3, 256, 70))
    others.append(misaligned(vocabulary(draw, 2, 3, 256, 70)))
    for inputs in others:
        assert not kernels_of(inputs) & (groups("bf16") | groups("float")), inputs["hidden"].shape


@pytest.fixture
def older_gpu() -> Iterator[None]:
    import emulated_backend

    emulated_backend.machine.emulator_set_groups(0)
    yield
    emulated_backend.machine.emulator_set_groups(1)


@pytest.mark.usefixtures("older_gpu")
def test_gpus_without_groups_take_mma_sync() -> None:
    inputs = CASES["tiles-of-words-and-tokens"](Draw("older", torch.bfloat16, "cpu"))
    assert not kernels_of(inputs) & groups("bf16")
    check_values("linear_nll", inputs, NAME)
    check_gradients("linear_nll", inputs, NAME)


def test_a_kernel_without_gradients_takes_mma_sync() -> None:
    """Nothing is weighted there."""
    inputs = CASES["tiles-of-words-and-tokens"](Draw("forward", torch.bfloat16, "cpu"))
    with gpu_predict.counting() as found:
        run("linear_nll", inputs, NAME)
    assert not {name for name, _ in found} & groups("bf16")


def test_any_order_of_threads_and_blocks_gives_the_same_bits() -> None:
    inputs = CASES["tiles-of-words-and-tokens"](Draw("order", torch.bfloat16, "cpu"))

    def once(order: int) -> list[torch.Tensor]:
        seed(order)
        gradients = gradients_of(lambda **inputs: run("linear_nll", inputs, NAME), inputs, DIFFERENTIABLE["linear_nll"])
        return [*run("linear_nll", inputs, NAME), *gradients.values()]

    first = once(0)
    for order in range(1, 4):
        for tensor, wanted in zip(once(order), first, strict=True):
            assert torch.equal(tensor, wanted)


def test_weight_gradients_in_float32() -> None:
    inputs = float32_parameters(CASES["one-tile-of-words"](Draw("wide", torch.bfloat16, "cpu")))
    check_gradients("linear_nll", inputs, NAME)


# ------------------------------------------------------------------------------ the emulator must notice mistakes

GROUPS, TILES = "groups.cuh", "linear_nll_groups.cuh"
WAIT = "            wait_group<0>();  // the sum of the tile before reads `weights` until it is done\n"
MISTAKES = {
    "no wait for the keys": (TILES, "                wait_async<0>();\n", "", "waited for"),
    "no fence of what was copied": (
        TILES,
        "                fence_async_proxy();\n                sync_block();",
        "                sync_block();",
        "fenced",
    ),
    "a fence before the copies arrive": (
        TILES,
        "                wait_async<0>();\n                fence_async_proxy();\n",
        "                fence_async_proxy();\n                wait_async<0>();\n",
        "fenced",
    ),
    "no barrier behind the copies": (
        TILES,
        "                sync_block();  // tile + 1 has arrived, and nobody reads tile - 2 any more\n",
        "",
        "synchronised|no barrier since|still reads",
    ),
    "too few tiles in flight": (TILES, "KEYS = 64, STAGES = 4", "KEYS = 64, STAGES = 3", "still read"),
    "no fence of the accumulators": (
        TILES,
        "            settle(weights);\n            fence_group();\n",
        "            settle(weights);\n",
        "wgmma.fence",
    ),
    "no wait for the last sum": (
        TILES,
        "        wait_group<0>();\n        settle(out);\n        settle(weights);\n    }\n};",
        "        settle(out);\n        settle(weights);\n    }\n};",
        "in flight",
    ),
    "no wait for the products": (TILES, WAIT, "", "is not what|in flight"),
    "rows are written while they are read": (TILES, WAIT, WAIT.replace("<0>", "<1>"), "of its rows were written"),
    "a wait that some warps leave out": (
        TILES,
        WAIT,
        "            if (any_lane(lane() + warp() == 0)) wait_group<2>();\n" + WAIT,
        "warps of a group issue different ones",
    ),
    "no commit": (TILES, "        commit_group();\n    }", "    }", "is not what|other bits|in flight"),
    "no swizzle": (GROUPS, "(piece % PIECES ^ r % SWIZZLE_ROWS) * 16", "piece % PIECES * 16", "is not what"),
    "a tile that begins anywhere": (
        TILES,
        "rows = shared + (PATTERN_BYTES - shared_address(shared) % PATTERN_BYTES) % PATTERN_BYTES;",
        "rows = shared;",
        "is not what",
    ),
    "another leading stride": (
        GROUPS,
        "return descriptor(tile, PANEL_BYTES); }",
        "return descriptor(tile, PATTERN_BYTES); }",
        "is not what",
    ),
    "a descriptor without its swizzle": (GROUPS, "<< 32 | uint64_t{1} << 62", "<< 32", "128-byte swizzle"),
    "one warp that stays away": (
        TILES,
        "            commit_group();\n            if (later) keep",
        "            if (warp() != 5) commit_group();\n            if (later) keep",
        "warps of a group issue different ones",
    ),
}
PROBED = "linear_nll:published-13x256x1112:bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, tmp_path: Path) -> None:
    file, right, wrong, how = MISTAKES[mistake]
    outcome = probe_with_mistake(tmp_path, file, right, wrong, PROBED)
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert any(word in outcome.stdout for word in how.split("|")), outcome.stdout


def test_without_a_mistake_nothing_is_caught() -> None:
    outcome = probe(CSRC, " ".join([PROBED, *(f"linear_nll:{case}-logits:bfloat16" for case in ("rising", "falling"))]))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
