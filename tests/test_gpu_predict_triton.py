"""``python -m benchmarks gpu --predict`` of the Triton backend: layouts, instructions, and launches that it counts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import machine_code
import pytest
import triton_ir

from benchmarks import gpu_predict_report, gpu_predict_triton

needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("triton", "scipy")), reason="needs triton and scipy"
)

# 128 threads but in the product, which 256 compute. Its 64 rows are those of four warps: four more repeat them.
TTGIR = """
#rows = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[1, 0], [0, 8], [32, 0]], lane = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], \
warp = [[8, 0], [16, 0]], block = []}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 16, 16]}>
#loc = loc("kernel.py":7:1)
#loc3 = loc("tile.py":2:1)
#loc4 = loc("k"(#loc3))
#loc5 = loc(callsite(#loc4 at #loc))
    %a = tt.load %p, %m, %o : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc5)
    %b = tt.load %p, %m, %o : tensor<64x64x!tt.ptr<bf16>, #rows> loc(#loc5)
    %c = ttg.async_copy_global_to_local %p, %b mask %m : tensor<32x64x!tt.ptr<bf16>, #rows> -> <32x64xbf16, #s> \
loc(#loc)
    %d = tt.load %p : tensor<16x!tt.ptr<f32>, #ttg.slice<{dim = 1, parent = #mma}>> loc(#loc3)
    %e = tt.load %p : tensor<16x!tt.ptr<f32>, #ttg.slice<{dim = 1, parent = #rows}>> loc(#loc3)
    tt.store %p, %v, %m : tensor<64x16x!tt.ptr<bf16>, #linear> loc(#loc)
    tt.store %p, %v : !tt.ptr<f32> loc(#loc)
    %f = ttng.warp_group_dot %h, %w, %z {isAsync = true} : !ttg.memdesc<64x256xbf16, #s, #m> * \
!ttg.memdesc<256x32xbf16, #s, #m> -> tensor<64x32xf32, #mma> loc(#loc)
    %g:2 = ttng.warp_group_dot_wait %f, %h {pendings = 0 : i32} : tensor<64x32xf32, #mma>, !ttg.memdesc<1> loc(#loc)
    %x = math.exp %y : tensor<32xf32, #ttg.slice<{dim = 0, parent = #mma}>> loc(#loc)
"""


def test_layouts_say_what_a_thread_holds() -> None:
    kernel, tile = ("kernel.py", 7), ("tile.py", 2)
    assert triton_ir.elements_per_thread(TTGIR) == {
        ("load", (tile, kernel), (64, 64)): 64 * 64 // 128,  # unrolled: each time as much
        ("load", (kernel,), (32, 64)): 32 * 64 // 128,
        ("load", (tile,), (16,)): 2 + 1,  # in two layouts
        ("store", (kernel,), (64, 16)): 8,
        ("store", (kernel,), ()): 1,
        ("product", (kernel,), (64, 32)): 2 * 64 * 32 // 256,
        ("exponential", (kernel,), (32,)): 8,  # each of a lane's columns once, whatever its rows
    }


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot read the layout #tmem"):
        triton_ir.elements_per_thread(TTGIR.replace("16x!tt.ptr<bf16>, #linear", "16x!tt.ptr<bf16>, #tmem"))


def test_a_thread_does_its_share_of_what_programs_do() -> None:
    kernel, elsewhere = (("kernel.py", 7),), (("kernel.py", 8),)
    executed = {
        (("product", kernel, (64, 32)), 256): 10,
        (("store", kernel, (64, 16)), 2): 5,
        (("store", kernel, ()), 4): 5,
        (("load", elsewhere, (64,)), 4): 5,
    }
    counts = SimpleNamespace(executed=executed, programs=5)
    launch = SimpleNamespace(kernel=SimpleNamespace(asm={"ttgir": TTGIR}), counts=counts)
    found, missing = gpu_predict_triton.of_a_thread(launch)
    assert found == {"product": 2 * 16 * 256, "load": 0, "store": 8 * 2 + 4, "exponential": 0}
    assert missing == {"product": 0, "load": 4, "store": 0, "exponential": 0}


def test_what_is_unexplained() -> None:
    wanted, missing = {"product": 100.0, "load": 0.0, "store": 50.0}, {"product": 0.0, "load": 4.0, "store": 0.0}
    assert gpu_predict_triton.unexplained(wanted, dict.fromkeys(wanted, 0.0), {"product": 10.0, "store": 0.0}) == 0.05
    assert gpu_predict_triton.unexplained(wanted, missing, {"product": 10.0, "store": 0.0}) == pytest.approx(1.1 / 3)
    assert gpu_predict_triton.unexplained(wanted, missing, {"store": 0.0}) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("line", "multiply_adds", "tensor", "shared"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, RZ", 16 * 8 * 16 / 32, 1.5, 0),
        ("HMMA.1688.F32.TF32 R4, R8, R12, RZ", 16 * 8 * 8 / 32, 0.75, 0),
        ("HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24", 64 * 128 * 16 / 128, 16, 128 * 16 * 2 / 4 / 128),
        ("HGMMA.64x16x16.F32.BF16 R88, gdesc[UR12], R88, gsb0", 64 * 16 * 16 / 128, 2, (16 * 16 * 2 + 128) / 128),
        ("LDSM.16.MT88.4 R4, [R2+UR5+0x5000]", 0, 0, 4),
        ("LDSM.16.M88 R4, [R2]", 0, 0, 1),
        ("STS.128 [R2], R4", 0, 0, 4),
        ("LDS.U16 R4, [R2]", 0, 0, 1),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R109+0x8000], desc[UR4][R24.64], P0", 0, 0, 4),
        ("SHFL.BFLY PT, R4, R2, 0x1, 0x1f", 0, 0, 1),
        ("FADD R4, R2, R3", 0, 0, 0),
    ],
)
def test_what_instructions_take(line: str, multiply_adds: float, tensor: float, shared: float) -> None:
    match = machine_code.INSTRUCTION.match(f"        /*0010*/    {line} ;   /* 0x00 */")
    assert match is not None
    one = machine_code.Instruction(int(match[1], 16), match[2] or "", match[3], match[4])
    assert gpu_predict_triton.multiply_adds(one) == multiply_adds
    assert gpu_predict_triton.tensor_cycles(one) == pytest.approx(tensor)
    assert gpu_predict_triton.shared_cycles(one) == pytest.approx(shared)


def test_loads_and_stores_have_a_width() -> None:
    widths = {"LDG.E.128": 16, "LDG.E.64": 8, "LDG.E": 4, "LDG.E.U16": 2, "STG.E.U8": 1, "LDG.E.LTC128B.64": 8}
    assert {name: gpu_predict_triton.width(name) for name in widths} == widths


def test_a_row_that_cannot_be_counted_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(row: Any) -> gpu_predict_report.Parts:
        raise ValueError("no layout\nof that name")

    class Row:
        name = "a row"

    backend = gpu_predict_report.Backend("triton", None, fails, "none")
    text, records = gpu_predict_report.section(backend, [Row()], lambda *_: [None, None])
    assert "refused: ValueError: no layout of that name" in text
    assert records == [{"row": "a row", "backend": "triton", "refused": "ValueError: no layout of that name"}]


def test_the_interpreter_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_predict_triton.why_not() == "TRITON_INTERPRET=1 keeps Triton from compiling; unset it"


# ---- launches, in a process without TRITON_INTERPRET ----

LAUNCHES = """
import json, sys
from math import prod
from unittest import mock
from benchmarks import gpu_predict, gpu_predict_triton
gpu_predict.find_tools()
import torch, cnm_kernels, triton_launches
from cnm_kernels import registry
registry.add(triton_launches.NAME, triton_launches)

def told(launch):
    if isinstance(launch, triton_launches.PyTorchLaunch):
        return {"name": launch.name, "memory": launch.memory}
    counts, found = launch.counts, {}
    for (site, size), times in counts.executed.items():
        found[site[0]] = found.get(site[0], 0) + times * size * prod(site[2])
    predicted = gpu_predict_triton.predict_launch(launch)
    return found | {"name": launch.name, "programs": launch.programs, "run": counts.programs, "memory": launch.memory,
                    "sectors": counts.sectors_of_programs, "distinct": len(counts.sectors),
                    "unexplained": predicted.unexplained, "instructions": predicted.instructions}

def pair(call, leaves):
    with triton_launches.recorded() as first:
        out = call()
    with triton_launches.recorded() as second:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return [[told(launch) for launch in launches] for launches in (first, second)]

def attention(B, causal):
    q, k, v = (torch.randn(B, 4, 50, 64).bfloat16().requires_grad_() for _ in range(3))
    return pair(lambda: cnm_kernels.weighted_attention(q, k, v, causal=causal), (q, k, v))

def with_lines_of_another_source():
    q, k, v = (torch.randn(2, 4, 50, 64).bfloat16() for _ in range(3))
    with triton_launches.recorded() as launches:
        cnm_kernels.weighted_attention(q, k, v)
    with mock.patch("triton_ir.elements_per_thread", return_value={}):
        try:
            return str(gpu_predict_triton.predict_launch(launches[0]))
        except ValueError as error:
            return str(error)

hidden, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 5, 256), (70, 256), (70,)))
loss = (hidden, weight, bias, torch.zeros(3, 5, dtype=torch.int64), torch.tensor([5, 0, 2]))
print(json.dumps({
    "attention": attention(2, False), "causal": [attention(B, True) for B in (3, 30)],
    "loss": pair(lambda: cnm_kernels.linear_nll(*loss), loss[:3]), "refused": with_lines_of_another_source(),
}))
"""


def without_interpreter(program: str) -> Any:
    """What the program prints, where Triton may compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", program]
    done = subprocess.run(  # elsewhere: in the repository its sources would hide an installed package
        command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launches() -> Any:
    return without_interpreter(LAUNCHES)


@needs_triton
def test_an_attention_is_counted(launches: Any) -> None:
    """A tile of 64 queries and keys forward; backward four tiles of 16 queries with all keys."""
    (forward,), (backward,) = launches["attention"]
    assert (forward["name"], forward["programs"], forward["run"]) == ("attention.forward", 8, 3)
    a_program = {kind: forward[kind] / 3 for kind in ("product", "load", "store", "exponential", "sectors")}
    assert a_program["product"] == 2 * 64**3  # S and P V
    assert a_program["load"] == 3 * 64 * 64 * 2  # whole tiles: lanes that are masked wait for the others
    assert a_program["store"] == 64 * 64 * 2 + 2 * 64 * 4
    assert a_program["exponential"] == 64 * 64
    asked = 4 * 50 * 64 * 2 + 50 * 2 * 4  # q, k, v, out, statistics: those that are not masked
    assert 0 <= 32 * a_program["sectors"] - asked <= 32  # the statistics are no whole number of sectors
    assert forward["memory"] == 8 * asked
    assert (backward["name"], backward["programs"], backward["run"]) == ("attention.backward", 8, 3)
    assert backward["product"] / 3 == 4 * 5 * 16 * 64 * 64


@needs_triton
def test_few_programs_stand_for_all(launches: Any) -> None:
    """Per program the same, whatever the batch."""
    few, many = launches["causal"]
    for one, other in zip(few[0] + few[1], many[0] + many[1], strict=True):
        assert other["programs"] == 10 * one["programs"]
        for kind in ("product", "load", "store", "exponential", "sectors", "run", "instructions"):
            assert other[kind] == one[kind]


@needs_triton
def test_a_loss_is_counted(launches: Any) -> None:
    """Seven tokens in one tile of 64, or backward of 32; 70 words in three tiles of 32, or backward in two of 64."""
    forward, backward = launches["loss"]
    assert [launch["name"] for launch in forward] == [
        "packed_tokens.list", "linear_nll.forward", "linear_nll.combine"
    ]  # fmt: skip
    assert forward[1]["product"] == 3 * 2 * 64 * 32 * 256  # the lengths that the first kernel packed are read
    names = [launch["name"] for launch in backward]
    assert names == ["aten.mean", "linear_nll.hidden_gradient", "packed_tokens.list", "linear_nll.word_gradient"]
    assert backward[0]["memory"] == 70 * 256 * 2 + 256 * 4
    assert backward[3]["product"] == 2 * 2 * 32 * 64 * 256


@needs_triton
def test_the_machine_code_agrees(launches: Any) -> None:
    """Layouts times what the interpreter counts is what the instructions do, but for what a pipeline loads ahead."""
    both = [*launches["attention"], *launches["loss"]]
    for launch in [launch for part in both for launch in part if "run" in launch]:
        assert launch["unexplained"] < 0.15, launch  # loops of two or three turns
        assert launch["instructions"] > 50, launch


@needs_triton
def test_counts_of_another_source_are_refused(launches: Any) -> None:
    """As Triton's cache gives them after lines have moved."""
    assert re.fullmatch(
        r"attention.forward: \d+% of what its programs do is not in its machine code", launches["refused"]
    )


ROWS = """
import json
from benchmarks import gpu, gpu_predict_triton
rows = [row for row in gpu.rows(quick=False) if row.goal and ("B=384" in row.name or "2560x1111" in row.name)]
print(json.dumps([[[vars(launch) for launch in part] for part in gpu_predict_triton.predict(row)] for row in rows]))
"""


@pytest.mark.slow
@needs_triton
def test_rows_are_predicted() -> None:
    attention, loss = without_interpreter(ROWS)
    assert [[launch["kernel"] for launch in part] for part in attention] == [
        ["attention.forward"], ["attention.backward"]
    ]  # fmt: skip
    assert len(loss[0]) == 3
    for launch in [launch for part in attention + loss for launch in part if launch["kernel"] != "aten.mean"]:
        assert launch["unexplained"] < 0.03, launch
