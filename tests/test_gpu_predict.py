"""``python -m benchmarks gpu --predict``: what the emulator counts, and what machine code makes of it."""

from __future__ import annotations

import importlib.util

import cuda_resources
import machine_code
import pytest
import torch
from emulated_backend import LOAD_ERRORS

import cnm_kernels
from benchmarks import gpu_predict
from benchmarks.gpu import rows

needs_emulator = pytest.mark.skipif(bool(LOAD_ERRORS), reason="no C++ compiler for the emulator")
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")


@needs_emulator
def test_a_launch_is_counted() -> None:
    """One tile of 64 queries and keys, four warps: products, copies and barriers as the algorithm has them."""
    q, k, v = (torch.randn(2, 4, 50, 64).bfloat16() for _ in range(3))
    with gpu_predict.counting() as found:
        cnm_kernels.weighted_attention(q, k, v)
    ((name, counts),) = found
    assert name == "attention_short_kernel<bf16>"
    assert (counts["threads"], counts["blocks"], counts["blocks_run"]) == (128, 8, 8)
    a_block = {kind: number / counts["blocks_run"] for kind, number in counts.items()}
    assert a_block["products"] == 4 * 2 * 32  # warps, S and P V, 16 x 8 x 16 each
    assert a_block["tf32_products"] == 0
    assert a_block["copies"] == 2 * 64 * 64 * 2 / 16 / 32  # of keys and values, sixteen bytes a lane
    assert a_block["matrix_wavefronts"] == 4 * a_block["matrix_loads"], "banks conflict in ldmatrix"
    assert a_block["copy_wavefronts"] == 4 * a_block["copies"], "banks conflict in cp.async"
    assert a_block["bytes"] == 4 * 50 * 64 * 2 + 50 * 2 * 4  # q, k, v, out, statistics
    assert 0 <= a_block["block_bytes"] - a_block["bytes"] <= 32  # the statistics are no whole number of sectors
    assert 0 <= counts["block_bytes"] - counts["distinct_bytes"] <= 8 * 32  # blocks may share the sectors at their ends


@needs_emulator
def test_few_blocks_stand_for_all() -> None:
    """Per block the same, whatever the batch."""
    found = []
    for B in (3, 30):
        q = torch.randn(B, 1, 100, 64).bfloat16()
        with gpu_predict.counting() as launches:
            cnm_kernels.weighted_attention(q, q, q, causal=True)
        counts = launches[0][1]
        assert counts["blocks"] == 2 * B
        found.append((counts["blocks_run"], counts["products"], counts["copies"]))
    assert found[0] == found[1]


def code(*lines: str) -> list[machine_code.Instruction]:
    found = []
    for i, line in enumerate(lines):
        match = machine_code.INSTRUCTION.match(f"        /*{16 * i:04x}*/    {line} ;   /* 0x00 */")
        assert match is not None, line
        found.append(machine_code.Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return found


@needs_scipy
def test_counts_say_how_often_a_loop_runs() -> None:
    """A loop of 3 with one exponential, in a loop of 2 with one barrier; a branch over two copies is not taken."""
    program = code(
        "MOV R1, R2",
        "@P0 BRA 0x40",
        "LDGSTS.E [R1], [R2]",
        "IADD3 R1, R1, R2, RZ",
        "BAR.SYNC.DEFER_BLOCKING 0x0",  # 0x40
        "MUFU.EX2 R1, R2",  # 0x50
        "FADD R1, R1, R2",
        "@P1 BRA 0x50",
        "@P2 BRA 0x40",
        "EXIT",
        "BRA 0xa0",
    )
    counts = dict.fromkeys(machine_code.COUNTED, 0.0) | {"barriers": 2.0, "exponentials": 6.0, "copies": 1.0}
    did = machine_code.execute(program, counts)
    assert did.instructions == pytest.approx(4 + 2 * 2 + 6 * 3 + 1)
    assert did.special == pytest.approx(6)
    assert did.off == pytest.approx(0, abs=1e-6)
    assert machine_code.execute(program, counts | {"copies": 0.0}).instructions == pytest.approx(2 + 2 * 2 + 6 * 3 + 1)
    assert machine_code.execute(program, counts | {"barriers": 0.0}).off > 0.1  # the kernel cannot end without one


def test_loops_are_branches_back() -> None:
    program = code("MOV R1, R2", "FADD R1, R1, R2", "@P1 BRA 0x10", "EXIT", "BRA 0x40")
    assert machine_code.loops(program) == [(0x10, 0x20)]


@pytest.mark.slow
@needs_emulator
@needs_scipy
@pytest.mark.skipif(cuda_resources.tool("nvcc") is None, reason="nvcc is not here")
def test_a_row_is_predicted() -> None:
    row = next(row for row in rows(quick=True) if row.name.startswith("attention 50x50"))
    forward, backward = gpu_predict.predict(row, gpu_predict.Model())
    assert [launch.kernel for launch in forward] == ["attention_short_kernel<bf16>"]
    assert [launch.kernel for launch in backward] == ["attention_backward_short_kernel<bf16, 64, true>"]
    for launch in forward + backward:
        assert launch.unexplained < 0.15, launch
        assert launch.time < 10, launch
