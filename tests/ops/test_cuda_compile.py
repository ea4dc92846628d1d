"""The machine code of csrc/cuda, on every architecture: nothing spilled, tensor cores used, limits kept."""

from __future__ import annotations

import cuda_resources
import pytest
from cuda_resources import SHARED_BYTES, Kernel

REASON = cuda_resources.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
OPS = {
    "attention_backward_kernel",
    "attention_backward_short_kernel",
    "attention_kernel",
    "attention_short_kernel",
    "attention_weights_kernel",
    "combine_kernel",
    "dropout_add_layer_norm_backward_kernel",
    "dropout_add_layer_norm_kernel",
    "dropout_kernel",
    "finish_kernel",
    "gaussian_mask_backward_kernel",
    "gaussian_mask_kernel",
    "intra_video_contrastive_loss_backward_kernel",
    "intra_video_contrastive_loss_kernel",
    "key_weight_gradient_kernel",
    "layer_norm_parameters_kernel",
    "linear_nll_kernel",
    "linear_nll_word_gradient_kernel",
    "list_tokens_kernel",
    "prepare_kernel",
}
WITH_PRODUCTS = (
    "attention_kernel",
    "attention_short_kernel",
    "attention_weights_kernel",
    "attention_backward_kernel",
    "attention_backward_short_kernel",
    "linear_nll_kernel",
    "linear_nll_word_gradient_kernel",
)
# On GPUs whose blocks have 99 KiB, float32 heads of 128 are left out: the launch says so.
TOO_LARGE = [("sm_86", "float, 128")]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return cuda_resources.kernels()


def test_every_kernel_is_there_on_every_architecture(kernels: list[Kernel]) -> None:
    architectures = {kernel.architecture for kernel in kernels}
    assert {"sm_80", "sm_90a", "sm_100"} <= architectures
    for architecture in architectures:
        assert {kernel.op for kernel in kernels if kernel.architecture == architecture} == OPS


def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    """But up to four registers for heads of 128 (the published ones are of 64) on GPUs of 8.6."""
    spilled = {(kernel.name, kernel.architecture): kernel.stack for kernel in kernels if kernel.stack}
    for (name, architecture), stack in spilled.items():
        assert name.startswith("attention_backward_kernel"), spilled
        assert "128" in name, spilled
        assert architecture == "sm_86", spilled
        assert stack <= 16, spilled


def test_products_run_on_tensor_cores(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.tensor_instructions >= 16) == (kernel.op in WITH_PRODUCTS and not is_empty(kernel)), kernel


def is_empty(kernel: Kernel) -> bool:
    """With wgmma, on GPUs that have none."""
    return kernel.groups and kernel.architecture != "sm_90a"


def test_groups_are_compiled_for_90a_alone(kernels: list[Kernel]) -> None:
    """The host tells by the registers (has_groups in linear_nll_groups.cuh): an empty kernel takes next to none."""
    ops = {"linear_nll_kernel", "linear_nll_word_gradient_kernel"}
    assert {kernel.op for kernel in kernels if kernel.groups} == ops
    for kernel in kernels:
        if kernel.groups:
            assert (kernel.registers >= 160) == (not is_empty(kernel)), kernel
            assert kernel.registers >= 160 or kernel.registers <= 32, kernel
            assert kernel.count("HMMA|LDSM") == 0, kernel


def test_products_of_groups_stay_in_flight(kernels: list[Kernel]) -> None:
    """Where the compiler does not follow, it waits after each of them."""
    barriers = {"linear_nll_kernel": 3, "linear_nll_word_gradient_kernel": 2}
    for kernel in kernels:
        if kernel.groups and not is_empty(kernel):
            assert kernel.count("HGMMA") == 2 * 16 + 2 * 4, kernel  # of the first and of other tiles, of the last
            assert kernel.count(r"WARPGROUP\.ARRIVE") == 4, kernel
            assert kernel.count(r"WARPGROUP\.DEPBAR") == 4, kernel  # as often as the source says
            assert kernel.count("BAR") == barriers[kernel.op], kernel
            assert kernel.count(r"FENCE\.VIEW\.ASYNC") == 2, kernel


def test_shared_memory_is_what_a_block_can_have(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if not any(kernel.architecture == arch and name in kernel.name for arch, name in TOO_LARGE):
            assert kernel.shared <= SHARED_BYTES[kernel.architecture], kernel


def test_a_processor_holds_at_least_a_block(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if not any(kernel.architecture == arch and name in kernel.name for arch, name in TOO_LARGE):
            assert kernel.warps >= kernel.threads // 32, kernel


def test_no_float_is_added_to_memory_by_several_at_once(kernels: list[Kernel]) -> None:
    """Results are the same bits from run to run: no atomic instruction at all, of floats or integers."""
    for kernel in kernels:
        assert kernel.count("ATOM|RED") == 0, kernel


def test_nothing_lies_in_local_memory(kernels: list[Kernel]) -> None:
    """Spilled registers would; so would an array whose index the compiler does not know."""
    for kernel in kernels:
        if kernel.stack == 0:
            assert kernel.count("LDL|STL") == 0, kernel


def test_tiles_move_sixteen_bytes_at_a_time(kernels: list[Kernel]) -> None:
    """Into shared memory by asynchronous copies past L1, out of it by wide stores, and rows of LayerNorm both ways."""
    for kernel in kernels:
        if kernel.op in WITH_PRODUCTS and not is_empty(kernel):
            assert kernel.count(r"LDGSTS.*BYPASS.*128") >= 2, kernel
        if kernel.op.startswith("attention") and kernel.op != "attention_weights_kernel":
            # Rows may be nowhere: of the address between a row's and null the compiler need not know that it is global.
            assert kernel.count(r"\bSTG?\.E.*128") >= 1, kernel
        if kernel.op in ("dropout_add_layer_norm_kernel", "dropout_kernel"):
            assert kernel.count(r"LDG\.E.*128") >= 1, kernel
            assert kernel.count(r"STG\.E.*128") >= 1, kernel


BARRIERS = {
    "attention_kernel": 3,
    "attention_weights_kernel": 2,
    "attention_backward_kernel": 12,
    "key_weight_gradient_kernel": 4,
    "dropout_kernel": 0,
    "dropout_add_layer_norm_kernel": 0,
    "dropout_add_layer_norm_backward_kernel": 1,
    "gaussian_mask_kernel": 0,
}


def test_barriers_are_as_many_as_in_the_source(kernels: list[Kernel]) -> None:
    """One taken out, or one doubled where code was, shows here."""
    for kernel in kernels:
        if kernel.op in BARRIERS and kernel.architecture == "sm_90a":  # the others may unroll otherwise
            assert kernel.count("BAR") == BARRIERS[kernel.op], kernel


def test_no_integer_is_divided_in_a_loop_over_tiles(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.op.startswith("attention"):
            assert kernel.divisions_in_loops == 0, kernel
