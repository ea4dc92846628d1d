"""What an H100 would take for our kernels, without one: the model, and the kernels of csrc/cuda.

Every kernel of csrc/cuda is executed by the emulator of tests/cuda_emulation, which counts what a few of its blocks ask
for; the counts are scaled to all blocks. How often instructions are executed follows from them and the machine code
(tools/machine_code.py), registers and shared memory say how many warps are resident. A kernel takes as long as the
busiest of memory, tensor cores, issue, shared memory and special functions, plus a launch and the last blocks' tail.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import cnm_kernels

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = [
    "threads", "shared_bytes", "blocks", "memory", "blocks_run", "products", "tf32_products", "matrix_loads",
    "matrix_wavefronts", "copy_wavefronts", "group_products", "group_columns", "group_bytes", "bytes", "block_bytes",
    "distinct_bytes", "loads", "stores", "copies", "exponentials", "shuffles", "barriers",
]  # as tests/cuda_emulation/counts.h gives them  # fmt: skip
PER_LAUNCH = ("threads", "shared_bytes", "blocks", "memory", "blocks_run")

# An H100 SXM. What is not from its data sheet is a guess, to be corrected by the first measurement.
PROCESSORS, CLOCK = 132, 1.755e9
MEMORY = 3.35e12 * 0.92  # bytes a second that copies reach
L2 = 5.5e12
PRODUCT_CYCLES = {
    "products": 1.5, "tf32_products": 1.5,  # a processor's, of mma.sync at two thirds of the peak
    "group_columns": 1 / 8,  # of wgmma at the peak: a warp's 16 x n x 16 take n / 8
}  # fmt: skip
SHARED_BYTES = 128  # a cycle, which wgmma reads its operands by
SECTOR = 32  # bytes that global memory moves at least
ISSUED = 4.0  # instructions a cycle and processor
CYCLES_PER_INSTRUCTION = 2.5  # between two of one warp, where others cannot fill the gap
SPECIAL_CYCLES = 2.0  # 16 lanes a cycle
FIRST_LAUNCH, NEXT_LAUNCH = 2.0e-6, 1.2e-6  # of a graph's first kernel, of each after it

ASSUMPTIONS = " ".join(
    """132 processors at 1.755 GHz; 92% of 3.35 TB/s, cold L2; L2 5.5 TB/s; mma.sync at two thirds of the tensor
    peak, wgmma at all of it; 4 instructions a cycle, one warp at most every 2.5 cycles; one shared wavefront a
    cycle (plain loads and stores: one each, wgmma's operands 128 bytes); 16 special functions a cycle; 2 us for the
    first launch, 1.2 us for each next; half a block's time of tail. Guessed: 92%, two thirds, 2.5 cycles, launches,
    tail. Counted from three places along the grid's x, four along y and all along z, times all blocks over those
    run; kernels with little shared memory and at most 2,000 blocks whole. Branches without a counted instruction
    count as not taken.""".split()
)


@dataclass(frozen=True)
class Prediction:
    """One launch's predicted times, in us."""

    kernel: str
    blocks: int
    warps: int  # resident on a processor
    memory: float
    tensor: float
    issue: float
    shared: float
    special: float
    tail: float
    instructions: float  # of a warp
    unexplained: float  # of its counts

    @property
    def bound(self) -> str:
        return max(("memory", "tensor", "issue", "shared", "special"), key=lambda part: getattr(self, part))

    @property
    def time(self) -> float:
        return float(getattr(self, self.bound)) + self.tail


@dataclass(frozen=True)
class Block:
    """What one block of a launch takes of a processor."""

    warps: int
    registers: int  # of a thread
    shared_bytes: int
    instructions: float  # of a warp
    tensor: float  # cycles, as the next two
    shared: float
    special: float
    bytes: float  # read and written, in whole sectors

    def predict(self, name: str, blocks: int, distinct: float, unexplained: float) -> Prediction:
        """Of so many blocks, which together touch so many distinct bytes."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = (228 << 10) // (self.shared_bytes + 1024)
        resident = max(1, min(by_registers, by_shared, 64 // self.warps, 32, -(-blocks // PROCESSORS)))
        share = max(blocks / PROCESSORS, 1.0)  # blocks of a processor
        if blocks < PROCESSORS * resident:
            share = -(-blocks // PROCESSORS)
        rate = min(ISSUED, resident * self.warps / CYCLES_PER_INSTRUCTION)
        cycles = {
            "tensor": self.tensor,
            "issue": self.instructions * self.warps / rate,
            "shared": self.shared,
            "special": self.special,
        }
        memory = max(distinct / MEMORY, self.bytes * blocks / L2)
        busy = {part: 1e6 * share * taken / CLOCK for part, taken in cycles.items()}
        longest = max(*busy.values(), 1e6 * memory)
        tail = 0.5 * longest / share * resident if blocks > PROCESSORS * resident else 0.0
        return Prediction(
            name, blocks, resident * self.warps, 1e6 * memory, **busy, tail=tail, instructions=self.instructions,
            unexplained=unexplained,
        )  # fmt: skip


def find_tools() -> None:
    """The emulator and the readers of machine code are the repository's, not the package's."""
    for folder in ("tools", "tests", "tests/cuda_emulation"):
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))


def why_not() -> str | None:
    """Why nothing can be predicted here."""
    find_tools()
    import cuda_resources
    import emulated_backend

    if emulated_backend.LOAD_ERRORS:
        return "the emulator wants a C++ compiler"
    if cuda_resources.tool("nvcc") is None or cuda_resources.tool("cuobjdump") is None:
        return "nvcc and cuobjdump are needed for the machine code"
    with contextlib.suppress(ImportError):
        import scipy  # noqa: F401

        return None
    return "scipy is needed: pip install scipy"


@contextlib.contextmanager
def counting() -> Iterator[list[tuple[str, dict[str, float]]]]:
    """Fills the list with kernels' names and counts, launch by launch, when left."""
    import emulated_backend

    from cnm_kernels import registry

    if emulated_backend.NAME not in registry.BACKENDS:
        registry.add(emulated_backend.NAME, emulated_backend)
    library = emulated_backend.machine
    library.emulator_counts.restype = ctypes.c_int64
    library.emulator_launches.restype = ctypes.c_int64
    found: list[tuple[str, dict[str, float]]] = []
    library.emulator_count(1)
    try:
        with cnm_kernels.use_backend(emulated_backend.NAME):
            yield found
        names = symbols(str(emulated_backend.library))
        numbers = (ctypes.c_double * len(NUMBERS))()
        for i in range(library.emulator_launches()):
            place = library.emulator_counts(ctypes.c_int64(i), numbers)
            found.append((names[place], dict(zip(NUMBERS, numbers, strict=True))))
    finally:
        library.emulator_count(0)


def symbols(library: str) -> dict[int, str]:
    """Kernels by their place in the emulator's library."""
    from cuda_resources import short_names

    said = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    places = {int(parts[0], 16): parts[2] for line in said.splitlines() if len(parts := line.split()) == 3}
    places = {place: name for place, name in places.items() if "_kernel" in name}
    names = short_names(sorted(set(places.values())))
    return {place: names[name] for place, name in places.items()}


def compiled(architecture: str, kind: str) -> list[Path]:
    """nvcc's results, ``cubin`` or ``ptx``, per source, compiled once per content of the source and the headers."""
    from cuda_resources import CUDA, tool

    headers = sorted([*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *CUDA.parent.glob("*.h")])
    common = b"".join(path.read_bytes() for path in headers)
    content = {path: hashlib.sha256(common + path.read_bytes()).hexdigest()[:16] for path in sorted(CUDA.glob("*.cu"))}
    folder = Path(tempfile.gettempdir()) / f"cnm_kernels_compiled_{os.getuid()}"
    folder.mkdir(exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}-{content[source]}-{architecture}.{kind}"
        unfinished = target.with_name(f"{target.name}.part")
        command = [str(tool("nvcc")), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DCNM_CUDA", f"-I{CUDA.parent}",
                   f"-I{CUDA}", f"-arch={architecture}", f"-{kind}", str(source), "-o", str(unfinished)]  # fmt: skip
        with FileLock(f"{target}.lock"):  # of processes beside this one, which would compile it too
            if not target.exists():
                subprocess.run(command, check=True)
                unfinished.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, content))


class Model:
    """Predicts launches from their counts."""

    def __init__(self) -> None:
        import cuda_resources
        import machine_code as reader

        self.code: dict[str, list[Any]] = {}
        self.registers: dict[str, int] = {}
        for file in compiled("sm_90a", "cubin"):
            self.code |= reader.kernels(file)
            self.registers |= {kernel.name: kernel.registers for kernel in cuda_resources.read(file)}
        self.execute = reader.execute
        self.counted = tuple(reader.COUNTED)

    def predict(self, name: str, counts: dict[str, float]) -> Prediction:
        per_block = {k: v / counts["blocks_run"] for k, v in counts.items() if k not in PER_LAUNCH}
        warps, blocks = -(-int(counts["threads"]) // 32), counts["blocks"]
        did = self.execute(self.code[name], {kind: per_block[kind] / warps for kind in self.counted})
        block = Block(
            warps, self.registers[name], int(counts["shared_bytes"]), did.instructions,
            tensor=sum(per_block[kind] * taken for kind, taken in PRODUCT_CYCLES.items()),
            shared=per_block["matrix_wavefronts"] + per_block["copy_wavefronts"] + per_block["shuffles"]
            + did.shared * warps + per_block["group_bytes"] / SHARED_BYTES,
            special=did.special * warps * SPECIAL_CYCLES,
            bytes=per_block["block_bytes"],
        )  # fmt: skip
        distinct = min(counts["distinct_bytes"] / counts["blocks_run"] * blocks, counts["memory"])
        return block.predict(name, int(blocks), distinct, did.off)


def predicted_call(row: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The row's forward and backward. A loss's upstream gradient is ones, so that every row takes part."""
    inputs = row.inputs("cpu")
    for name in row.differentiable:
        inputs[name] = inputs[name].detach().requires_grad_()
    leaves = [inputs[name] for name in row.differentiable]

    def forward() -> Any:
        if "hidden" not in inputs:
            return row.ours(**inputs)
        hidden, words = inputs["hidden"], inputs["target"]
        words = words.repeat(hidden.size(0), 1)
        lengths = torch.full(words.shape[:1], words.size(1))
        return cnm_kernels.linear_nll(hidden.flatten(0, 1), inputs["weight"], inputs["bias"], words, lengths)

    return forward, lambda out: torch.autograd.grad(out, leaves, torch.ones_like(out))


def predict(row: Any, model: Model) -> list[list[Prediction]]:
    """The native backend's launches, of the row's forward and of its backward."""
    forward, backward = predicted_call(row)
    with counting() as first:
        out = forward()
    with counting() as second:
        backward(out)
    return [[model.predict(*launch) for launch in launches] for launches in (first, second)]


def total(launches: list[Prediction]) -> float:
    """us of a graph that holds them."""
    waits = 1e6 * (FIRST_LAUNCH + NEXT_LAUNCH * (len(launches) - 1)) if launches else 0.0
    return waits + sum(launch.time for launch in launches)
