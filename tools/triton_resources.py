"""Compiles every Triton kernel as the host code would launch it, without a GPU, and prints what each needs of one.

    python tools/triton_resources.py [sm ...]     # sm_80, sm_90 and sm_100 unless named
    python tools/triton_resources.py --json FILE 90

The ops run on CPU tensors with a driver that claims to be the GPU; a launch compiles and returns. So configurations,
constants and types are those of real calls. Must not run under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

(
    attention,
    branched_attention,
    dropout,
    dropout_add_layer_norm,
    gaussian_mask,
    intra_video_contrastive_loss,
    linear_nll,
) = (
    importlib.import_module(f"cnm_kernels.triton.{name}")
    for name in (
        "attention",
        "branched_attention",
        "dropout",
        "dropout_add_layer_norm",
        "gaussian_mask",
        "intra_video_contrastive_loss",
        "linear_nll",
    )
)

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # of a block
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
NARROW, WIDE = torch.bfloat16, torch.float32


class NoGPU:
    """The parts of a driver that compiling needs."""

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def attend(Lq: int, Lk: int, d: int, dtype: torch.dtype, kind: str, causal: bool, B: int = 2, H: int = 4) -> None:
    q, k, v = (torch.zeros(B, L, H, d, dtype=dtype).transpose(1, 2) for L in (Lq, Lk, Lk))
    key_weight = torch.zeros(B, Lk) if kind == "tensor" else None
    moment = (torch.zeros(B), torch.zeros(B)) if kind in ("gaussian", "complement") else (None, None)
    weighting = (key_weight, *moment, 5.5, 0.1, kind == "complement")
    lengths = None if causal else torch.full((B,), Lk)
    out, stats, _ = attention.forward(q, k, v, *weighting, causal, lengths, 0.125, kind == "tensor")
    d_weights = torch.zeros(B, Lq, Lk, dtype=dtype) if kind == "tensor" else None
    needs = (True, True, True, kind != "none")
    attention.backward(out, d_weights, q, k, v, *weighting, causal, lengths, 0.125, stats, *needs)


def attend_branches(dtype: torch.dtype, n: int = 3, B: int = 2, L: int = 50, H: int = 4, d: int = 64) -> None:
    packed, weights = torch.zeros(B, L, 3, H, d, dtype=dtype), torch.zeros(n, B, L)
    out, stats = branched_attention.forward(packed, None, None, weights, True, None, 0.125)
    needs = (True, False, False, True)
    branched_attention.backward(out, packed, None, None, weights, True, None, 0.125, stats, *needs)


def reconstruct(V: int, D: int, dtype: torch.dtype, M: int = 128, L: int = 20) -> None:
    hidden, weight, bias = torch.zeros(M, L, D, dtype=dtype), torch.zeros(V, D), torch.zeros(V)
    target, lengths = torch.zeros(M, L, dtype=torch.int64), torch.full((M,), L)
    nll, _, stats, expected = linear_nll.forward(hidden, weight, bias, target, lengths, 0.1, True, True)
    linear_nll.backward(nll, hidden, weight, bias, target, lengths, 0.1, stats, expected, True, True, True)


def add_and_norm(D: int, dtype: torch.dtype, N: int = 512) -> None:
    x, weight, seed = torch.zeros(N, D, dtype=dtype), torch.zeros(D), torch.zeros((), dtype=torch.int64)
    out, stats = dropout_add_layer_norm.forward(x, x, weight, weight, 0.1, seed, 3, 1e-5)
    dropout_add_layer_norm.backward(out, out, x, x, weight, stats, 0.1, seed, 3, None, True, True, True)


def the_rest() -> None:
    seed = torch.zeros((), dtype=torch.int64)
    dropout.dropout(torch.zeros(25600, 256, dtype=NARROW), 0.1, seed, 3)
    moment = (torch.zeros(128), torch.zeros(128))
    for normalized in (False, True):
        mask = gaussian_mask.forward(*moment, 50, 5.5, 0.1, False, normalized)
        gaussian_mask.backward(mask, *moment, 5.5, 0.1, False, normalized)
    nll = torch.zeros(128)
    loss = intra_video_contrastive_loss.forward(nll, nll, nll, 0.1, 0.15)
    intra_video_contrastive_loss.backward(loss, nll, nll, nll, 0.1, 0.15)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """The cases to compile: the published sizes, other head dims, and longer sequences for the blocked kernels."""
    for dtype in (NARROW, torch.float16, WIDE):
        short = str(dtype).removeprefix("torch.")
        sizes = [(50, 50, 64, "gaussian", True), (20, 50, 64, "complement", False), (200, 200, 64, "none", True)]
        if dtype != torch.float16:
            sizes += [(50, 50, 64, "tensor", False), (50, 50, 32, "gaussian", True), (100, 100, 64, "gaussian", True)]
            sizes += [(50, 50, 128, "gaussian", True), (1000, 1000, 64, "gaussian", True)]
            sizes += [(1000, 1000, 128, "tensor", False), (200, 200, 64, "complement", True)]
        for Lq, Lk, d, kind, causal in sizes:
            name = f"{Lq}x{Lk} d={d} {kind}{' causal' if causal else ''} {short}"
            yield name, lambda a=(Lq, Lk, d, dtype, kind, causal): attend(*a)
        yield f"50x50 d=64 three branches {short}", lambda dtype=dtype: attend_branches(dtype)
        for V, D in [(1112, 256), (8001, 256), (1112, 512)] if dtype != torch.float16 else [(1112, 256)]:
            yield f"V={V} D={D} {short}", lambda a=(V, D, dtype): reconstruct(*a)
        yield f"D=256 {short}", lambda a=(256, dtype): add_and_norm(*a)
    yield "D=300 float32", lambda: add_and_norm(300, WIDE)
    yield "", the_rest


@contextmanager
def compiling(sm: int, seen: Callable[..., None]) -> Iterator[None]:
    """Launches compile for this GPU and go to ``seen`` instead: (kernel, compiled, arguments, options, grid)."""
    run, shared_memory = JITFunction.run, attention.shared_memory

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen(self, run(self, *args, grid=grid, warmup=True, **kwargs), args, kwargs, grid)

    driver.set_active(NoGPU(sm))
    JITFunction.run = compile_only
    attention.shared_memory = lambda tensor: SHARED_MEMORY[sm]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        JITFunction.run, attention.shared_memory = run, shared_memory  # type: ignore[attr-defined]
        if torch.cuda.is_available():  # else there is no other
            driver.reset_active()


def compiled(sm: int) -> list[dict[str, Any]]:
    """One record per distinct kernel of every case."""
    records: list[dict[str, Any]] = []
    hashes: set[str] = set()
    case = ""

    def seen(function: Any, kernel: Any, *_: Any) -> None:
        if kernel.hash not in hashes:
            hashes.add(kernel.hash)
            place = {"sm": sm, "shared_limit": SHARED_MEMORY[sm], "case": case, "kernel": name_of(function)}
            records.append(place | resources(kernel))

    with compiling(sm, seen):
        for case, call in cases():  # noqa: B007, the closure reads it
            call()
    return records


def name_of(kernel: Any) -> str:
    module = kernel.fn.__module__.rsplit(".", 1)[-1]
    return f"{module}.{kernel.fn.__name__.strip('_').removesuffix('_kernel')}"


def resources(kernel: Any) -> dict[str, Any]:
    """Registers and stack of a thread, shared memory of a block, warps, and the tensor core instructions in its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", found.stdout)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "dots": kernel.asm["ttir"].count("tt.dot "),
        "tensor_cores": sorted(name for name in TENSOR_CORES if name in ptx),
    }


def table(records: list[dict[str, Any]]) -> str:
    lines = [f"{'kernel':<40} {'case':<40} {'sm':>4} {'warps':>5} {'regs':>5} {'spill':>5} {'shared':>7}  instructions"]
    for r in records:
        lines.append(
            f"{r['kernel']:<40} {r['case']:<40} {r['sm']:>4} {r['warps']:>5} {r['registers']:>5} {r['spilled']:>5} "
            f"{r['shared']:>7}  {' '.join(r['tensor_cores'])}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sm", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = [record for sm in options.sm for record in compiled(sm)]
    if options.json:
        options.json.write_text(json.dumps(records))
    print(table(records))


if __name__ == "__main__":
    sys.exit(main())
