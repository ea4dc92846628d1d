"""The Triton backend's part of ``python -m benchmarks gpu --predict``.

Triton compiles every launch for an H100 without having one, and its interpreter runs a few of the launch's programs
(tools/triton_programs.py). How often the machine code's blocks are executed follows from what these programs multiply,
load, store and exponentiate; what the blocks take of a processor is then read from the instructions themselves.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_predict
from benchmarks.gpu_predict import MEMORY, PRODUCT_CYCLES, SECTOR, SHARED_BYTES, SPECIAL_CYCLES, Block, Prediction

ASSUMPTIONS = " ".join(
    """The same GPU as above. Programs are counted from three places along the grid's x, four along y and all along z;
    of kernels without a product all, if no more than 2,000.
    Loops and branches are taken as often as the multiply-adds say, then the bytes loaded and stored and the
    exponentials (of each thread, by Triton's layouts, with lanes that are masked), and where these leave a choice, as
    with nested loops without a product, so that the fewest instructions run. Not counted: what a pipeline loads beyond
    its loop's end. Shared memory is accessed without bank conflicts, 128 bytes in a wavefront. PyTorch's kernels take
    what their bytes take; all else of them is unexplained.""".split()
)
MULTIPLY_ADDS = 16 * 8 * 16 / 32  # of a thread, in the product whose cycles PRODUCT_CYCLES gives
MOST_UNEXPLAINED = 0.25  # of a launch's counts; more means that code and counts are not of the same source
TRUST = {"product": 10.0}  # before the others, should they contradict it


def why_not() -> str | None:
    """Why nothing can be predicted here."""
    for package in ("triton", "scipy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 keeps Triton from compiling; unset it"
    return None


# ---- instructions ----


def width(name: str) -> int:
    """Bytes that a load or store moves for each thread."""
    parts = name.split(".")
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for part, size in sizes.items() if part in parts), 4)


def multiply_adds(one: Any) -> float:
    """Of a thread: 32 share an HMMA, 128 a wgmma."""
    if match := re.match(r"HMMA\.16(8)(16|8)\.", one.name):
        return 16 * int(match[1]) * int(match[2]) / 32
    if match := re.match(r"HGMMA\.64x(\d+)x(\d+)\.", one.name):
        return 64 * int(match[1]) * int(match[2]) / 128
    return 0.0


def tensor_cycles(one: Any) -> float:
    if match := re.match(r"HGMMA\.64x(\d+)x", one.name):
        return int(match[1]) * PRODUCT_CYCLES["group_columns"]
    return multiply_adds(one) / MULTIPLY_ADDS * PRODUCT_CYCLES["products"]


def shared_cycles(one: Any) -> float:
    if match := re.match(r"HGMMA\.64x(\d+)x", one.name):
        first = one.operands.split(",")[1]  # rows, from registers or from shared memory as the columns
        rows = 0 if re.match(r"\s*R\d", first) else 16 * 16 * 2
        return (rows + 16 * int(match[1]) * 2 / 4) / SHARED_BYTES
    if re.match(r"LDSM|STSM", one.name):
        last = one.name.rsplit(".", 1)[1]
        return float(last) if last.isdigit() else 1.0
    if re.match(r"LDS\.|LDS$|STS|LDGSTS", one.name):
        return max(width(one.name) / 4, 1.0)
    return float(one.name.startswith("SHFL"))


def moved(pattern: str) -> Callable[[Any], float]:
    return lambda one: float(width(one.name)) if re.match(pattern, one.name) else 0.0


COUNTED: dict[str, Callable[[Any], float]] = {
    "product": multiply_adds,
    "load": moved(r"LDG\.|LDG$|LDGSTS"),
    "store": moved(r"STG"),
    "exponential": lambda one: float(one.name.startswith("MUFU.EX2")),
}  # what an instruction does for each thread of what the interpreter counts


# ---- launches ----


def of_a_thread(launch: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What it does of each kind: as often as the interpreter counts, each time as much as Triton's layouts say.

    Beside it, what the interpreter counts and the code does not have, of which a thread has an element at least: the
    compiler left it out, or its lines are not those that the interpreter was at.
    """
    from triton_ir import elements_per_thread

    elements = elements_per_thread(launch.kernel.asm["ttgir"])
    found, missing = dict.fromkeys(COUNTED, 0.0), dict.fromkeys(COUNTED, 0.0)
    for (site, size), times in launch.counts.executed.items():
        into = found if site in elements else missing
        into[site[0]] += times * elements.get(site, 1) * size / launch.counts.programs
    return found, missing


def unexplained(wanted: dict[str, float], missing: dict[str, float], left: dict[str, float]) -> float:
    """Of the counts, by the mean over kinds: what no path through the code explains, and what the code does not have.

    A kind is not in ``left`` if the code has no instruction of it.
    """
    shares = [
        (left.get(kind, amount) + missing[kind]) / max(amount + missing[kind], 1.0)
        for kind, amount in wanted.items()
        if amount or missing[kind] or kind in left
    ]
    return sum(shares) / max(len(shares), 1)


def predict_launch(launch: Any) -> Prediction:
    """Predicts a launch of one of our kernels.

    Raises:
        ValueError: its counts and its machine code disagree.
    """
    import machine_code
    from triton_resources import resources

    counts, warps = launch.counts, launch.kernel.metadata.num_warps
    wanted, missing = of_a_thread(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.kernel.asm["cubin"])
        file.flush()
        ((_, code),) = machine_code.functions(Path(file.name))
    did = machine_code.flow(code, wanted, COUNTED, TRUST)
    off = unexplained(wanted, missing, did.left)
    if off > MOST_UNEXPLAINED:
        raise ValueError(f"{launch.name}: {off:.0%} of what its programs do is not in its machine code")
    takes = resources(launch.kernel)
    block = Block(
        warps,
        takes["registers"],
        takes["shared"],
        did.total(lambda _: 1.0),
        tensor=did.total(tensor_cycles) * warps,
        shared=did.total(shared_cycles) * warps,
        special=did.total(machine_code.matching("MUFU")) * warps * SPECIAL_CYCLES,
        bytes=SECTOR * counts.sectors_of_programs / counts.programs,
    )
    distinct = min(SECTOR * len(counts.sectors) / counts.programs * launch.programs, launch.memory)
    return block.predict(launch.name, launch.programs, distinct, off)


def predict_pytorch(launch: Any) -> Prediction:
    memory = 1e6 * launch.memory / MEMORY
    return Prediction(launch.name, 0, 0, memory, 0.0, 0.0, 0.0, 0.0, tail=0.0, instructions=0.0, unexplained=1.0)


def predict(row: Any) -> list[list[Prediction]]:
    """The launches of the row's forward and of its backward."""
    gpu_predict.find_tools()
    import triton_launches

    from cnm_kernels import registry

    if triton_launches.NAME not in registry.BACKENDS:
        registry.add(triton_launches.NAME, triton_launches)
    forward, backward = gpu_predict.predicted_call(row)
    with triton_launches.recorded() as first:
        out = forward()
    with triton_launches.recorded() as second:
        backward(out)
    return [
        [
            predict_launch(launch) if isinstance(launch, triton_launches.Launch) else predict_pytorch(launch)
            for launch in launches
        ]
        for launches in (first, second)
    ]
