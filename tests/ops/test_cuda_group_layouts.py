"""wgmma: what lies where, in registers, shared memory and descriptors, against the tables of the PTX documentation.

Written down from "Asynchronous warpgroup level matrix instructions": "Register fragments" (m64nNk16), "Shared memory
matrix layout" (Swizzle<3,4,3> over the canonical layouts of the 128-byte swizzle: K-major
((8,m),(T,2k)):((8T,SBO),(1,T)), MN-major ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), in elements, T of them sixteen bytes)
and "Matrix descriptor format". What the kernels and the emulator make of them is not looked at here but run.
"""

from __future__ import annotations

import random

import pytest
from emulation_build import COMPILER, run_program

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler for the emulator")
ROWS = KEYS = 64  # of the program's tiles
PANEL = 64 * 128  # bytes from 64 columns to the next
T = 8  # numbers in sixteen bytes


def d_fragment(thread: int, i: int) -> tuple[int, int]:
    """D: row (warp % 4) * 16 + groupID, + 8 for every second pair; column 8 * (i / 4) + threadID * 2 + (i & 1)."""
    warp, lane = thread // 32, thread % 32
    return warp * 16 + (lane >> 2) + 8 * (i // 2 % 2), 8 * (i // 4) + (lane % 4) * 2 + (i & 1)


def a_fragment(thread: int, i: int) -> tuple[int, int]:
    """A: row (warp % 4) * 16 + groupID for a0, a1, a4, a5, else + 8; column threadID * 2 + (i & 1), + 8 from a4 on."""
    warp, lane = thread // 32, thread % 32
    row = warp * 16 + (lane >> 2) + (0 if i in (0, 1, 4, 5) else 8)
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def swizzle_3_4_3(address: int) -> int:
    """Three bits above the lowest four are exchanged with those three above: bits 4-6 ^= bits 7-9."""
    return address ^ ((address >> 3) & 0x70)


def k_major(row: int, k: int, sbo: int) -> int:
    """Bytes: ((8,m),(T,2k)):((8T,SBO),(1,T))."""
    elements = row % 8 * 8 * T + row // 8 * sbo // 2 + k % T + k // T * T
    return swizzle_3_4_3(2 * elements)


def mn_major(n: int, k: int, lbo: int, sbo: int) -> int:
    """Bytes: ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))."""
    elements = n % T + n // T % 8 * T + n // (8 * T) * lbo // 2 + k % 8 * 8 * T + k // 8 * sbo // 2
    return swizzle_3_4_3(2 * elements)


def fields(descriptor: int) -> dict[str, int]:
    """Bits 13-0 start, 29-16 leading and 45-32 stride (all >> 4), 51-49 base offset, 63-62 swizzle (1: 128 bytes)."""
    return {
        "start": (descriptor & 0x3FFF) << 4,
        "leading": (descriptor >> 16 & 0x3FFF) << 4,
        "stride": (descriptor >> 32 & 0x3FFF) << 4,
        "base": descriptor >> 49 & 7,
        "swizzle": descriptor >> 62,
        "rest": descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62),
    }


PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "groups.cuh"
using namespace cnm; using namespace cnm::cuda;
namespace cnm::cuda { Stream current_stream() { return nullptr; } int most_shared_bytes() { return 227 << 10; } }
constexpr int TILE = 4 * 64 * 128;
using Tile = Swizzled<64>;
static uint16_t image[2][TILE / 2];  // tiles of 64 rows and 256 columns as shared memory shall hold them
struct Case { int kind, x, y, b; };
static std::vector<Case> cases;
static void bring(char* tile, const uint16_t* from) {
    for (int i = thread(); i < TILE / 16; i += threads()) copy_async(tile + 16 * i, from + 8 * i, true);
}
static void arrive() { commit_async(); wait_async<0>(); fence_async_proxy(); sync_block(); }
static void kernel() {
    char* shared = dynamic_shared<char>();
    shared += (PATTERN_BYTES - shared_address(shared) % PATTERN_BYTES) % PATTERN_BYTES;
    const uint32_t a = shared_address(shared), b = a + TILE;
    if (thread() == 0) {
        std::printf("address %u\n", a);
        for (int column = 0; column < 256; column += 16)
            std::printf("rows %d %llu\n", column,
                        (unsigned long long)whole(Tile::rows(a, 0) + Tile::along(column)));
        for (int row = 0; row < 64; row += 16)
            std::printf("columns %d %llu\n", row,
                        (unsigned long long)whole(Tile::columns(a) + Tile::across(row)));
        for (int r = 0; r < 64; ++r) for (int piece = 0; piece < 32; ++piece)
            std::printf("place %d %d %d\n", r, piece, Tile::place(r, piece));
    }
    for (size_t n = 0; n < cases.size(); ++n) {
        const Case one = cases[n];
        sync_block();
        if (thread() == 0) {
            std::memset(image, 0, sizeof image);
            if (one.kind == 0) image[0][one.x / 2] = 0x3F80;
            image[1][one.b / 2] = 0x3F80;
        }
        sync_block();
        bring(shared, image[0]);
        bring(shared + TILE, image[1]);
        arrive();
        fence_group();
        if (one.kind == 0) {
            float c[8][4];
            multiply_group<bf16, false>(c, whole(Tile::rows(a, 0)), whole(Tile::rows(b, 0)));
            commit_group();
            wait_group<0>();
            for (int i = 0; i < 32; ++i) if (c[i / 4][i % 4] != 0) std::printf("case %zu %d %d\n", n, thread(), i);
        } else {
            float c[32][4];
            clear(c);
            uint32_t rows[4] = {};
            if (thread() == one.x) rows[one.y / 2] = 0x3F80u << (16 * (one.y % 2));
            multiply_group<bf16>(c, rows, whole(Tile::columns(b)));
            commit_group();
            wait_group<0>();
            for (int i = 0; i < 128; ++i) if (c[i / 4][i % 4] != 0) std::printf("case %zu %d %d\n", n, thread(), i);
        }
    }
}
int main() {
    Case one;
    while (std::scanf("%d %d %d %d", &one.kind, &one.x, &one.y, &one.b) == 4) cases.push_back(one);
    emulator::know_memory(image, sizeof image);
    emulator::launch(nullptr, {1, 1, 1}, {128, 1, 1}, 2 * TILE + PATTERN_BYTES, [] { kernel(); });
}
"""


def cases() -> dict[tuple[int, int, int, int], tuple[int, int] | None]:
    """What the program is told (kind, two numbers for the 1 of A, the byte of the 1 of B), and where D's 1 comes."""
    place = {d_fragment(thread, i): (thread, i) for thread in range(128) for i in range(128)}
    numbers = random.Random(0)
    found: dict[tuple[int, int, int, int], tuple[int, int] | None] = {}
    for count in range(400):
        row, k, n = numbers.randrange(64), numbers.randrange(16), numbers.randrange(64)
        k_of_b = k if count % 4 else numbers.randrange(16)
        case = (0, k_major(row, k, 1024), 0, k_major(n, k_of_b, 1024))
        found[case] = place[row, n] if k == k_of_b else None
        thread, i, n = numbers.randrange(128), numbers.randrange(8), numbers.randrange(256)
        row, k = a_fragment(thread, i)
        k_of_b = k if count % 4 else numbers.randrange(16)
        case = (1, thread, i, mn_major(n, k_of_b, PANEL, 1024))
        found[case] = place[row, n] if k == k_of_b else None
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    told = "\n".join(" ".join(map(str, case)) for case in cases())
    return run_program(tmp_path_factory.mktemp("layouts"), PROGRAM, told)


def test_products_are_of_the_documented_places(said: list[list[str]]) -> None:
    got: dict[int, list[tuple[int, int]]] = {}
    for line in said:
        if line[0] == "case":
            got.setdefault(int(line[1]), []).append((int(line[2]), int(line[3])))
    for number, (case, expected) in enumerate(cases().items()):
        assert got.get(number, []) == ([] if expected is None else [expected]), case


def test_tiles_are_copied_to_the_documented_places(said: list[list[str]]) -> None:
    lines = [list(map(int, line[1:])) for line in said if line[0] == "place"]
    assert len(lines) == 64 * 32
    for row, piece, place in lines:
        assert place == piece // 8 * PANEL + k_major(row, piece % 8 * T, 1024)
        assert place == mn_major(piece * T, row, PANEL, 1024)


def test_descriptors_have_the_documented_fields(said: list[list[str]]) -> None:
    (address,) = (int(line[1]) for line in said if line[0] == "address")
    assert address % 1024 == 0
    same = {"stride": 1024, "base": 0, "swizzle": 1, "rest": 0}
    rows = {int(line[1]): fields(int(line[2])) for line in said if line[0] == "rows"}
    columns = {int(line[1]): fields(int(line[2])) for line in said if line[0] == "columns"}
    assert len(rows) == 16
    assert len(columns) == 4
    for column, found in rows.items():  # the leading stride is not used, and assumed to be 1
        assert found == same | {"start": address + column // 64 * PANEL + column % 64 * 2, "leading": 16}
    for row, found in columns.items():
        assert found == same | {"start": address + row * 128, "leading": PANEL}
