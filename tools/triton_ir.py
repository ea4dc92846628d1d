"""Reads Triton's intermediate code of a GPU (TTGIR): how many elements of an operation's tensor each thread holds.

Threads are laid out over a tensor as its layout says; where they are more than its elements, several hold the same one
(and several warps compute the same products).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

Stack = tuple[tuple[str, int], ...]  # file and line, those of the innermost function first
Site = tuple[str, Stack, tuple[int, ...]]  # kind, place in the source, shape
Sides = list[tuple[int, int, int]]  # of each dimension: elements of a thread, threads of a warp, warps

LAYOUT = re.compile(r"^(#\w+) = #ttg\.(blocked|linear|nvidia_mma)<\{(.*)\}>", re.M)
SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$")
LOCATION = re.compile(
    r"^(#loc\d*) = loc\((?:callsite\((#loc\d*) at (#loc\d*)\)|\"([^\"]*)\"(?::(\d+):\d+|\((#loc\d*)\))|unknown)", re.M
)
OPERATION = re.compile(
    r"(tt\.load|ttg\.async_copy_global_to_local|tt\.store|math\.exp2?|tt\.dot|ttng\.warp_group_dot) [^\n]*"
    r"(?<=: |> )(?:tensor<((?:\d+x)+)(?:!tt\.ptr<\w+>|\w+), (#[^\n]*?)>|!tt\.ptr<\w+>|f32)(?: -> <[^\n]*)? "
    r"loc\((#loc\d*)\)"
)  # with the last tensor's shape and layout, which of a product is the result
KINDS = {
    "tt.load": "load",
    "ttg.async_copy_global_to_local": "load",
    "tt.store": "store",
    "math.exp": "exponential",
    "math.exp2": "exponential",
    "tt.dot": "product",
    "ttng.warp_group_dot": "product",
}


def elements_per_thread(code: str) -> dict[Site, int]:
    """Of every load, store and exponential in the code, and of every product's result.

    One that the compiler computes in several layouts, rather than move it from one to another, counts in each. Copies
    of one by unrolling and pipelining are one.
    """
    layouts = {name: _sides(kind, fields) for name, kind, fields in LAYOUT.findall(code)}
    stacks = _Stacks(code)
    found: dict[Site, dict[str, int]] = defaultdict(dict)
    for name, sides, layout, location in OPERATION.findall(code):
        shape = tuple(int(side) for side in sides.split("x")[:-1])
        own = math.prod(map(_own, _of(layout, layouts), shape)) if shape else 1
        found[KINDS[name], stacks.of(location), shape][layout] = own
    return {site: sum(by_layout.values()) for site, by_layout in found.items()}


def _own(sides: tuple[int, int, int], size: int) -> int:
    """A thread's elements along a dimension of this size, over which the layout is repeated."""
    elements, lanes, warps = sides
    return max(min(elements, size), size // (lanes * warps))


def _of(layout: str, layouts: dict[str, Sides]) -> Sides:
    sliced = SLICE.match(layout)
    if sliced is not None:
        parent = _of(sliced[2], layouts)
        return [sides for i, sides in enumerate(parent) if i != int(sliced[1])]
    if layout not in layouts:
        raise ValueError(f"triton_ir: cannot read the layout {layout}")
    return layouts[layout]


def _sides(kind: str, fields: str) -> Sides:
    if kind == "linear":  # each step of an element, a lane or a warp leads along one dimension
        parts = [re.search(rf"{part} = \[(.*?)\](?:, \w+ = |$)", fields) for part in ("register", "lane", "warp")]
        steps = [[list(map(int, step.split(","))) for step in re.findall(r"\[([\d, ]+)\]", part[1])]
                 for part in parts if part is not None]  # fmt: skip
        rank = max(len(step) for part in steps for step in part)
        return [tuple(1 << sum(step[side] > 0 for step in part) for part in steps) for side in range(rank)]
    numbers = {name: list(map(int, values.split(","))) for name, values in re.findall(r"(\w+) = \[([\d, ]+)\]", fields)}
    if kind == "blocked":
        return list(zip(numbers["sizePerThread"], numbers["threadsPerWarp"], numbers["warpsPerCTA"], strict=True))
    rows, columns = numbers["instrShape"][:2]  # eight rows of four lanes with two neighbours each, repeated
    down, across = numbers["warpsPerCTA"]
    return [(rows // 8, 8, down), (columns // 4, 4, across)]


class _Stacks:
    """The source lines that locations stand for."""

    def __init__(self, code: str) -> None:
        self.locations = {found[0]: found[1:] for found in LOCATION.findall(code)}

    def of(self, location: str) -> Stack:
        called, caller, file, line, named = self.locations[location]
        if caller:
            return self.of(called) + self.of(caller)
        if line:
            return ((file, int(line)),)
        return self.of(named) if named else ()
