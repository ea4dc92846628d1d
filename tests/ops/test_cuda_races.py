"""Kernels proven free of races by a verifier that reads their PTX; a barrier or a wait left out is found by it."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import emulated_backend
import verify_races
from verify_races import Launch

REASON = verify_races.why_not()
pytestmark = pytest.mark.slow
verified = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SHORT = (
    "dropout_kernel<float>",
    "gaussian_mask_kernel<float>",
    "gaussian_mask_backward_kernel<float>",
    "intra_video_contrastive_loss_kernel<float>",
    "intra_video_contrastive_loss_backward_kernel<float>",
    "layer_norm_parameters_kernel",
)
ATTENTION = "attention_kernel<float, 64>"
OF_SHORT_ROWS = (
    "attention_short_kernel<bf16>",
    "attention_backward_short_kernel<bf16, 64, true>",
    "attention_backward_short_kernel<bf16, 64, false>",
)


@cache
def launches() -> dict[str, Launch]:
    """Of each kernel the first launch."""
    return {launch.kernel: launch for launch in reversed(verify_races.launches())}


@cache
def code() -> dict[str, str]:
    return verify_races.modules()


@pytest.mark.skipif(bool(emulated_backend.LOAD_ERRORS), reason=str(emulated_backend.LOAD_ERRORS))
def test_what_is_verified_is_launched() -> None:
    assert {*SHORT, ATTENTION, *OF_SHORT_ROWS} <= launches().keys()


@verified
@pytest.mark.parametrize("kernel", [*SHORT, ATTENTION, *OF_SHORT_ROWS])
def test_no_order_of_threads_races(kernel: str) -> None:
    assert verify_races.verdict(launches()[kernel], code()[kernel]) == "race_free"


@verified
@pytest.mark.parametrize(
    ("kernel", "instruction", "needless"),
    [
        ("gaussian_mask_backward_kernel<float>", "bar.sync", 1),  # before the first of two sums
        ("intra_video_contrastive_loss_kernel<float>", "bar.sync", 1),  # as above
        (ATTENTION, "bar.sync", 0),
        (ATTENTION, "cp.async.wait", 2),  # within a loop that these 70 keys leave early
    ],
)
def test_each_left_out_is_a_race(kernel: str, instruction: str, needless: int) -> None:
    said = [
        verify_races.verdict(launches()[kernel], ptx) for _, ptx in verify_races.without(code()[kernel], instruction)
    ]
    assert len(said) > needless
    assert said.count("potential_race") == len(said) - needless, said
