"""Proves kernels of csrc/cuda free of races, by SentryWard, which reads the PTX that nvcc makes of them.

    pip install sentryward        (Linux, x86-64; 0.1.1 is alpha)
    python tools/verify_races.py

The emulator of the tests runs ops on small inputs; what it was given at each launch (grid, shared memory, arguments)
goes to the verifier with the kernel's PTX for sm_100a. A verdict holds for that launch, in every order of its threads,
and for any content of the tensors. ``unsupported`` is no verdict: kernels whose control flow reads tensors are beyond
it, and so are the instructions of sm_90a alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_resources import short_names, tool

sys.path.append(str(Path(__file__).resolve().parents[1]))  # installed packages first

import cnm_kernels
from benchmarks import gpu_predict

SECONDS = 600  # that the verifier may take for a launch

PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>\w+)\s+(?P<pointer>\.ptr\s+)?(?:\.align\s+\d+\s+)?"
    r"(?P<name>[\w$]+)(?:\[(?P<size>\d+)\])?"
)


@dataclass(frozen=True)
class Launch:
    """One launch as the emulator saw it."""

    kernel: str  # with its template arguments
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[bytes, ...]
    pointers: frozenset[int]  # words among the arguments that point into a tensor or scratch


def why_not() -> str | None:
    """Why nothing can be verified here."""
    gpu_predict.find_tools()
    if importlib.util.find_spec("sentryward") is None:
        return "sentryward is not installed"
    if tool("nvcc") is None:
        return "nvcc is needed for the PTX"
    import emulated_backend

    return "the emulator wants a C++ compiler" if emulated_backend.LOAD_ERRORS else None


# ---- launches ----


def heads(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype).requires_grad_()


def ops() -> Iterator[torch.Tensor]:
    """Results of ops whose forward and backward kernels are to be verified."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (heads(1, 1, 70, 64, dtype=dtype) for _ in range(3))
        yield cnm_kernels.weighted_attention(q, k, v, causal=True)
        q, k, v = heads(1, 2, 20, 64, dtype=dtype), heads(1, 2, 50, 64, dtype=dtype), heads(1, 2, 50, 64, dtype=dtype)
        center, width = (torch.tensor([0.5], requires_grad=True) for _ in range(2))
        yield cnm_kernels.gaussian_attention(q, k, v, center, width, alpha=5.5)
    x, residual = heads(9, 256, dtype=torch.float32), heads(9, 256, dtype=torch.float32)
    weight, bias = torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True)
    # Nothing is dropped, for that would decide on branches.
    yield cnm_kernels.dropout_add_layer_norm(x, residual, weight, bias, p=0.0, seed=1)
    yield cnm_kernels.dropout(x, p=0.1, seed=1)
    nll = [torch.rand(37, requires_grad=True) for _ in range(3)]
    yield cnm_kernels.intra_video_contrastive_loss(*nll, beta_1=0.1, beta_2=0.15)
    for B, form in ((3, {"alpha": 5.5}), (4, {"sigma": 9.0})):
        yield cnm_kernels.gaussian_mask(*(torch.rand(B, requires_grad=True) for _ in range(2)), 50, **form)


def launches() -> list[Launch]:
    """What ``ops`` launch, forward and backward, each kernel and size once."""
    with gpu_predict.counting() as counted:
        for result in ops():
            result.float().sum().backward()
        arguments = list(_arguments())
    found = [
        Launch(kernel, grid, int(counts["threads"]), int(counts["shared_bytes"]), given, pointers)
        for (kernel, counts), (grid, given, pointers) in zip(counted, arguments, strict=True)
    ]
    return list({(one.kernel, one.grid): one for one in found}.values())


def _arguments() -> Iterator[tuple[tuple[int, int, int], tuple[bytes, ...], frozenset[int]]]:
    import emulated_backend

    library = emulated_backend.machine
    count = ctypes.c_int64
    for ask in (library.emulator_launches, library.emulator_arguments, library.emulator_argument):
        ask.restype = count
    library.emulator_pointers.restype = count
    for launch in map(count, range(library.emulator_launches())):
        grid = (count * 3)()
        given = []
        for place in map(count, range(library.emulator_arguments(launch, grid))):
            content = ctypes.create_string_buffer(library.emulator_argument(launch, place, None))
            library.emulator_argument(launch, place, content)
            given.append(content.raw)
        words = (ctypes.c_uint64 * library.emulator_pointers(launch, None))()
        library.emulator_pointers(launch, words)
        yield (grid[0], grid[1], grid[2]), tuple(given), frozenset(words)


# ---- PTX ----


def kernels(source: Path) -> dict[str, str]:
    """PTX modules of one kernel each, by its name, of nvcc's."""
    head, *entries = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", source.read_text())
    names = [re.search(r"\.entry\s+([^\s(]+)", entry) for entry in entries]
    mangled = [name[1] for name in names if name is not None]
    readable = short_names(mangled)
    return {readable[name]: head + entry for name, entry in zip(mangled, entries, strict=True)}


def modules() -> dict[str, str]:
    """PTX modules of one kernel each, by its name, of all sources."""
    return {name: ptx for source in gpu_predict.compiled("sm_100a", "ptx") for name, ptx in kernels(source).items()}


def parameters(ptx: str) -> list[tuple[str, str, bool]]:
    """Of the parameters of a module's kernel the name, the type, and whether it is a structure."""
    listed = re.search(r"\.entry\s+[^\s(]+\((.*?)\)", ptx, re.S)
    found = []
    for line in listed[1].split(",") if listed is not None else []:
        part = PARAMETER.search(line)
        if part is not None:
            kind = "pointer" if part["pointer"] else part["type"]
            found.append((part["name"], kind, part["size"] is not None))
    return found


def described(launch: Launch, ptx: str) -> dict[str, Any]:
    """The verifier's input: pointers are declared, anything else has the value of the launch."""
    arguments: list[dict[str, Any]] = []
    declarations: list[dict[str, Any]] = []
    for (name, kind, structure), content in zip(parameters(ptx), launch.arguments, strict=True):
        for offset in range(0, len(content), 8):
            part = content[offset : offset + 8]
            place: dict[str, Any] = {"parameter": name} | ({"offset": offset} if structure else {})
            word = int.from_bytes(part, "little")
            if word in launch.pointers and len(part) == 8:
                declarations.append(place | {"type": "pointer"})
            elif kind == "pointer":
                arguments.append(place | {"type": kind, "value": None})
            else:
                arguments.append(place | {"type": f"u{8 * len(part)}" if structure else kind, "value": word})
    return {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": list(launch.grid),
            "block_dim": [launch.threads, 1, 1],
            "dynamic_shared_bytes": launch.shared_bytes,
        },
        "arguments": arguments,
        "declarations": declarations,
    }


def verdict(launch: Launch, ptx: str) -> str:
    """``race_free``, ``potential_race``, or why there is none."""
    import sentryward

    with tempfile.TemporaryDirectory() as folder:
        kernel, given = Path(folder, "kernel.ptx"), Path(folder, "input.json")
        kernel.write_text(ptx)
        given.write_text(json.dumps(described(launch, ptx)))
        found = sentryward.verify(kernel, input=given, timeout_seconds=SECONDS)
    reasons = ", ".join(str(said["code"]) for said in found["diagnostics"])
    return (
        str(found["result"]) if found["result"] in ("race_free", "potential_race") else f"{found['result']}: {reasons}"
    )


def without(ptx: str, pattern: str) -> Iterator[tuple[int, str]]:
    """The module without each instruction that matches, one at a time, and the number of its line."""
    lines = ptx.split("\n")
    for number, line in enumerate(lines):
        if re.search(pattern, line):
            yield number + 1, "\n".join(lines[:number] + lines[number + 1 :])


def main() -> int:
    if (reason := why_not()) is not None:
        print(f"nothing was verified: {reason}", file=sys.stderr)
        return 2
    races = 0
    code = modules()
    for launch in launches():
        said = verdict(launch, code[launch.kernel])
        races += said == "potential_race"
        print(f"{launch.kernel}, grid {launch.grid}: {said}", flush=True)
    return 1 if races else 0


if __name__ == "__main__":
    sys.exit(main())
