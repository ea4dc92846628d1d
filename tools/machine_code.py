"""Reads kernels' machine code: their instructions as cuobjdump prints them, and how often each is executed.

How often is a linear program over the paths through the code (as worst-case timing tools do it): what enters a block
leaves it, the kernel is entered once, and instructions that the emulator counted (products, ldmatrix, copies, shuffles,
exponentials, barriers, loads, stores) are executed as often as counted. Of all ways that fit, the one with the fewest
instructions is taken, so that a branch without any counted instruction counts as not taken: a lower bound there.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cuda_resources import short_names, tool

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z0-9_.x]+)\s*([^;]*);")
COUNTED = {
    "products": r"HMMA\.16816",
    "tf32_products": r"HMMA\.1688\.F32\.TF32",
    "group_products": r"HGMMA",
    "matrix_loads": r"LDSM",
    "copies": r"LDGSTS",
    "shuffles": r"SHFL",
    "exponentials": r"MUFU\.EX2",
    "barriers": r"BAR",
    "loads": r"LDG\.|LDG$",
    "stores": r"STG",
}  # by the emulator, with what they are in machine code
ENDS = ("EXIT", "RET", "BPT", "KILL")


@dataclass
class Instruction:
    address: int
    predicate: str
    name: str  # with its modifiers
    operands: str

    @property
    def target(self) -> int | None:
        """The address a branch jumps to; None for other instructions."""
        if self.name.split(".")[0] != "BRA":
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)  # -1: the end


def functions(file: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Mangled names and code of a cubin's kernels."""
    dumper = tool("cuobjdump")
    if dumper is None:
        raise RuntimeError("cuobjdump is not here (it comes with CUDA and with triton)")
    said = subprocess.run([dumper, "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    name, code = "", []
    for line in said.splitlines():
        if "Function : " in line:
            if name:
                yield name, code
            name, code = line.split(":", 1)[1].strip(), []
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    if name:
        yield name, code


def kernels(file: Path) -> dict[str, list[Instruction]]:
    """Returns each kernel's instructions, by the names of ``cuda_resources``."""
    found = dict(functions(file))
    names = short_names(sorted(found))
    return {names[mangled]: code for mangled, code in found.items()}


def blocks(code: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by their first address. A call comes back: what it calls (slow paths of divisions) is left out."""
    leaders = {code[0].address}
    for one, after in zip(code, [*code[1:], None], strict=True):
        if one.target is not None:
            leaders.add(one.target)
        if after is not None and (one.target is not None or one.name.split(".")[0] in ENDS):
            leaders.add(after.address)
    found: dict[int, Block] = {}
    current = code[0].address
    for one, after in zip(code, [*code[1:], None], strict=True):
        if one.address in leaders:
            current = one.address
            found[current] = Block()
        block = found[current]
        block.instructions.append(one)
        ends = one.name.split(".")[0] in ENDS
        if after is not None and after.address not in leaders:
            continue
        conditional = bool(one.predicate) or bool(re.match(r"!?U?P\w", one.operands))
        if one.target is not None:
            block.next.append(one.target)
        elif ends:
            block.next.append(-1)
        if after is not None and (conditional or (one.target is None and not ends)):
            block.next.append(after.address)
    return found


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Addresses of each loop's first and last instruction: of branches back. A branch to itself ends a kernel."""
    return [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]


@dataclass(frozen=True)
class Flow:
    """How often a warp executes each block of the code, on average."""

    graph: dict[int, Block]
    times: dict[int, float]  # -1: the end
    left: dict[str, float]  # how much of each count no path explains

    def total(self, of: Callable[[Instruction], float]) -> float:
        """Of all instructions that are executed, each as much as ``of`` says."""
        ran = (often * sum(map(of, self.graph[at].instructions)) for at, often in self.times.items() if at >= 0)
        return float(sum(ran))


def flow(
    code: list[Instruction],
    counts: dict[str, float],
    counted: dict[str, Callable[[Instruction], float]],
    trust: dict[str, float],
) -> Flow:
    """Finds the way through the code that a warp's counts say, where ``counted`` says what an instruction counts.

    Kinds that no instruction counts are left out. Where they contradict each other, those of more trust (1 unless
    named) are met first.
    """
    import numpy
    from scipy.optimize import linprog

    graph = blocks(code)
    edges = [(None, code[0].address)] + [(at, to) for at, block in graph.items() for to in block.next]
    size = {at: len(block.instructions) for at, block in graph.items()}
    rows, totals = [], []
    for at in graph:
        rows.append([float(to == at) - float(here == at) for here, to in edges])
        totals.append(0.0)
    rows.append([float(here is None) for here, _ in edges])
    totals.append(1.0)
    worth = {
        kind: {at: sum(map(of, block.instructions)) for at, block in graph.items()} for kind, of in counted.items()
    }
    kinds = [kind for kind, by_block in worth.items() if any(by_block.values())]
    for kind in kinds:
        rows.append([float(worth[kind].get(to, 0.0)) for _, to in edges])
        totals.append(counts[kind])
    slack = numpy.zeros((len(rows), 2 * len(kinds)))
    for i in range(len(kinds)):
        slack[len(graph) + 1 + i, 2 * i : 2 * i + 2] = 1.0, -1.0
    length = numpy.array([size.get(to, 0) for _, to in edges], dtype=float)
    heavy = numpy.repeat([1e8 * trust.get(kind, 1.0) / max(counts[kind], 1.0) for kind in kinds], 2)
    cost = numpy.concatenate([length, heavy])
    solved = linprog(cost, A_eq=numpy.hstack([numpy.array(rows), slack]), b_eq=totals, method="highs")
    if solved.x is None:
        raise RuntimeError(f"no path through the machine code: {solved.message}")
    times: Counter[int] = Counter()
    for (_, to), often in zip(edges, solved.x, strict=False):
        times[to] += often
    of_kinds = solved.x[len(edges) :].reshape(-1, 2).sum(1)
    return Flow(graph, times, dict(zip(kinds, of_kinds.tolist(), strict=True)))


@dataclass(frozen=True)
class Executed:
    """Instructions that one warp executes, on average."""

    instructions: float
    shared: float  # plain loads and stores of shared memory
    special: float  # on the special-function unit
    off: float  # how much of the counts no path explains, relative


def matching(pattern: str) -> Callable[[Instruction], float]:
    return lambda one: float(bool(re.match(pattern, one.name)))


def execute(code: list[Instruction], counts: dict[str, float]) -> Executed:
    """Returns how often a warp executes each kind, given its counts of ``COUNTED``."""
    found = flow(code, counts, {kind: matching(pattern) for kind, pattern in COUNTED.items()}, {})
    return Executed(
        instructions=found.total(lambda _: 1.0),
        shared=found.total(matching(r"LDS\.|LDS$|STS")),
        special=found.total(matching("MUFU")),
        off=sum(found.left.values()) / max(sum(counts[kind] for kind in found.left), 1.0),
    )
