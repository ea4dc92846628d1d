"""Lanes that hold the operands of mma.sync and ldmatrix, against the tables of the PTX documentation.

The tables are those of "Warp-level matrix instructions", sections "Matrix fragments for mma.m16n8k16 with floating
point type", "... mma.m16n8k8" (.tf32) and "ldmatrix", written down lane by lane as their formulas: groupID = lane >> 2,
threadID_in_group = lane % 4. What the kernels and the emulator make of fragments is not looked at here but run.
"""

from __future__ import annotations

import pytest
from emulation_build import COMPILER, run_program

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler for the emulator")


def a_16(lane: int, i: int) -> tuple[int, int]:
    """m16n8k16, A: row groupID for a0, a1, a4, a5, else groupID + 8; column threadID * 2 + (i & 1), + 8 from a4 on."""
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_16(lane: int, i: int) -> tuple[int, int]:
    """m16n8k16, B: row threadID * 2 + (i & 1), + 8 from b2 on; column groupID."""
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    """m16n8k8 .tf32, A: row groupID for a0 and a2, else groupID + 8; column threadID for a0, a1, else threadID + 4."""
    return (lane >> 2) + (0 if i in (0, 2) else 8), lane % 4 + (0 if i in (0, 1) else 4)


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    """m16n8k8 .tf32, B: row threadID for b0, threadID + 4 for b1; column groupID."""
    return lane % 4 + 4 * i, lane >> 2


def c_float(lane: int, i: int) -> tuple[int, int]:
    """Both, C and D: row groupID for c0 and c1, groupID + 8 for c2 and c3; column threadID * 2 + (i & 1)."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def ldmatrix(lane: int, half: int) -> tuple[int, int]:
    """A lane holds of each 8x8 matrix row lane / 4, columns 2 (lane % 4) and the next; transposed, they swap."""
    return lane // 4, 2 * (lane % 4) + half


PROGRAM = r"""
#include <cstdio>
#include "device.cuh"
using namespace cnm; using namespace cnm::cuda;
namespace cnm::cuda { Stream current_stream() { return nullptr; } int most_shared_bytes() { return 227 << 10; } }
static int which;
// One number of A and one of B is 1: where C becomes 1 shows their rows and columns.
static void products() {
    for (int tf32 = 0; tf32 < 2; ++tf32) {
        const int as = tf32 ? 4 : 8, bs = tf32 ? 2 : 4;
        for (int place = 0; place < 32 * as * 32 * bs; ++place) {
            const int ib = place % bs, lb = place / bs % 32, ia = place / bs / 32 % as, la = place / bs / 32 / as;
            if ((la * 7 + ia + lb + ib) % 5 != 0) continue;
            uint32_t a[4] = {}, b[2] = {};
            float c[4] = {};
            if (lane() == la) { if (tf32) a[ia] = bits_of(1.0f); else a[ia / 2] = 0x3F80u << (16 * (ia % 2)); }
            if (lane() == lb) { if (tf32) b[ib] = bits_of(1.0f); else b[ib / 2] = 0x3F80u << (16 * (ib % 2)); }
            if (tf32) mma_tf32(c, a, b); else mma<bf16>(c, a, b);
            for (int i = 0; i < 4; ++i) if (c[i] != 0)
                std::printf("mma %d %d %d %d %d %d %d\n", tf32, la, ia, lb, ib, lane(), i);
        }
    }
}
static void matrices() {
    uint16_t* const shared = dynamic_shared<uint16_t>();
    for (int i = lane(); i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);  // matrix, row, column
    sync_warp();
    uint32_t r[4];
    for (int transposed = 0; transposed < 2; ++transposed) {
        transposed ? load_matrix_transposed(r, shared + 8 * lane()) : load_matrix(r, shared + 8 * lane());
        for (int m = 0; m < 4; ++m) for (int h = 0; h < 2; ++h)
            std::printf("ldmatrix %d %d %d %d %d\n", transposed, lane(), m, h,
                        static_cast<int>(r[m] >> (16 * h) & 0xFFFF));
    }
}
static void kernel() { which == 0 ? products() : matrices(); }
int main() {
    for (which = 0; which < 2; ++which) emulator::launch(nullptr, {1, 1, 1}, {32, 1, 1}, 512, [] { kernel(); });
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return run_program(tmp_path_factory.mktemp("layouts"), PROGRAM)


@pytest.mark.parametrize(
    ("tf32", "a", "b", "numbers"), [(0, a_16, b_16, (8, 4)), (1, a_tf32, b_tf32, (4, 2))], ids=["bf16", "tf32"]
)
def test_products_are_of_the_documented_fragments(tf32: int, a, b, numbers, said: list[list[str]]) -> None:
    place = {c_float(lane, i): (lane, i) for lane in range(32) for i in range(4)}
    expected = set()
    for la in range(32):
        for ia in range(numbers[0]):
            for lb in range(32):
                for ib in range(numbers[1]):
                    (row, k), (k_of_b, column) = a(la, ia), b(lb, ib)
                    if (la * 7 + ia + lb + ib) % 5 == 0 and k == k_of_b:
                        expected.add((la, ia, lb, ib, *place[row, column]))
    got = {tuple(map(int, line[2:])) for line in said if line[0] == "mma" and int(line[1]) == tf32}
    assert len(expected) > 200
    assert got == expected


def test_matrices_are_loaded_as_documented(said: list[list[str]]) -> None:
    lines = [list(map(int, line[1:])) for line in said if line[0] == "ldmatrix"]
    assert len(lines) == 2 * 32 * 4 * 2
    for transposed, lane, matrix, half, got in lines:
        row, column = ldmatrix(lane, half)
        if transposed:
            row, column = column, row
        assert got == 64 * matrix + 8 * row + column
