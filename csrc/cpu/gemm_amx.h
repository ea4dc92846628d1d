// The bf16 product of gemm.h on AMX tiles: C in 2 x 2 tiles of 16 x 16, which stay in registers over a block of K.
//
// A tile of B takes packed pairs as they are. A tile of A wants the pairs of a row next to each other: a transposed A
// is turned into such rows first, a block of 32 rows at a time. Tiles at the edge of C are
// configured smaller; what is missing of the last 16 pairs of K is filled with zeros, since a new configuration would
// clear the tiles. Of split pairs all three products are added up while the tiles of C are at hand.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "transpose.h"

#if defined(CNM_AMX_HEADER)  // tests emulate the instructions on machines without them
#include CNM_AMX_HEADER
#else
#include <immintrin.h>
#endif

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t TILE = 16;         // rows, and 32-bit columns
constexpr int64_t BLOCK = 2 * TILE;  // rows and columns of C at a time
constexpr int64_t BLOCK_K = 256;     // pairs of K at a time

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};

    // Tiles 0 to 3 are C (left to right, top to bottom), 4 and 5 A (top, bottom), 6 and 7 B (left, right).
    TileConfig(int64_t top, int64_t bottom, int64_t left, int64_t right) {
        const int64_t heights[] = {top, top, bottom, bottom, top, bottom, TILE, TILE};
        const int64_t widths[] = {left, right, left, right, TILE, TILE, left, right};
        for (int i = 0; i < 8; ++i) {
            const bool used = heights[i] > 0 && widths[i] > 0;
            rows[i] = static_cast<uint8_t>(used ? heights[i] : 0);
            column_bytes[i] = static_cast<uint16_t>(used ? widths[i] * 4 : 0);
        }
    }
};

// dst[i * ldd + k] = src[i * a_m + k * a_k], where one of the strides is 1.
inline void pack_block(int64_t rows, int64_t K, const bf16x2* src, int64_t a_m, int64_t a_k, bf16x2* dst, int64_t ldd) {
    const float* from = reinterpret_cast<const float*>(src);  // 32 bits to be moved, whatever they mean
    float* to = reinterpret_cast<float*>(dst);
    if (a_k == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t k = 0; k < K; k += W) {
                store_tail(to + i * ldd + k, load_tail(from + i * a_m + k, K - k), K - k);
            }
        }
        return;
    }
    transpose_blocks(
        K, rows, [&](int64_t k, int64_t i, int count) { return load_tail(from + k * a_k + i, count); },
        [&](int64_t i, int64_t k, Vec v, int count) { store_tail(to + i * ldd + k, v, count); });
}

// Pairs in rows `ld` elements apart, and how far from them the low halves of split pairs lie.
struct Pairs {
    const bf16x2* at;
    int64_t ld, low;

    Pairs from(int64_t offset) const { return {at + offset, ld, low}; }
    Pairs low_half() const { return {at + low, ld, low}; }
};

// One block of C over K pairs, a multiple of 16 of them from a and b and, if there are, 16 more from the padded copies.
template <bool SPLIT>
inline void tile_block(int64_t K, const Pairs& a, const Pairs& b, const Pairs& a_rest, const Pairs& b_rest, bool rest,
                       float* c, int64_t ldc, bool accumulate, bool bottom, bool right) {
    const auto stride_c = static_cast<size_t>(ldc) * 4;
    // GCC's tile loads, and the load of their configuration, do not say what memory they read.
    asm volatile("" ::: "memory");
    if (accumulate) {
        _tile_loadd(0, c, stride_c);
        if (right) _tile_loadd(1, c + TILE, stride_c);
        if (bottom) _tile_loadd(2, c + TILE * ldc, stride_c);
        if (right && bottom) _tile_loadd(3, c + TILE * ldc + TILE, stride_c);
    } else {
        _tile_zero(0);
        if (right) _tile_zero(1);
        if (bottom) _tile_zero(2);
        if (right && bottom) _tile_zero(3);
    }
    const auto multiply = [&](const Pairs& x, const Pairs& y) {
        _tile_loadd(4, x.at, static_cast<size_t>(x.ld) * 4);
        _tile_loadd(6, y.at, static_cast<size_t>(y.ld) * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
            _tile_loadd(7, y.at + TILE, static_cast<size_t>(y.ld) * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (bottom) {
            _tile_loadd(5, x.at + TILE * x.ld, static_cast<size_t>(x.ld) * 4);
            _tile_dpbf16ps(2, 5, 6);
            if (right) _tile_dpbf16ps(3, 5, 7);
        }
    };
    const auto step = [&](const Pairs& x, const Pairs& y) {
        multiply(x, y);
        if (!SPLIT) return;
        multiply(x, y.low_half());
        multiply(x.low_half(), y);
    };
    for (int64_t k = 0; k < K; k += TILE) step(a.from(k), b.from(k * b.ld));
    if (rest) step(a_rest, b_rest);
    _tile_stored(0, c, stride_c);
    if (right) _tile_stored(1, c + TILE, stride_c);
    if (bottom) _tile_stored(2, c + TILE * ldc, stride_c);
    if (right && bottom) _tile_stored(3, c + TILE * ldc + TILE, stride_c);
}

template <class E>
inline void gemm_tiles(int64_t M, int64_t N, int64_t K, const E* a_elements, int64_t a_m, int64_t a_k,
                       const E* b_elements, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    constexpr bool SPLIT = std::is_same_v<E, split2>;
    constexpr int HALVES = SPLIT ? 2 : 1;
    const auto *a = reinterpret_cast<const bf16x2*>(a_elements), *b = reinterpret_cast<const bf16x2*>(b_elements);
    const int64_t low_a = (a_k == 1 ? a_m : a_k) / 2, low_b = ldb / 2;
    alignas(64) bf16x2 a_block[HALVES][BLOCK * BLOCK_K], a_rest[HALVES][BLOCK * TILE], b_rest[HALVES][TILE * BLOCK];
    int64_t configured[4] = {-1, -1, -1, -1};
    for (int64_t k0 = 0; k0 < std::max<int64_t>(K, 1); k0 += BLOCK_K) {
        const int64_t depth = std::min(BLOCK_K, K - k0), whole = depth / TILE * TILE, rest = depth - whole;
        for (int64_t i0 = 0; i0 < M; i0 += BLOCK) {
            const int64_t rows = std::min(BLOCK, M - i0);
            const bf16x2* a_at = a + i0 * a_m + k0 * a_k;
            if (rest > 0) std::memset(static_cast<void*>(a_rest), 0, sizeof a_rest);
            for (int half = 0; half < HALVES; ++half) {
                const bf16x2* from = a_at + half * low_a;
                if (a_k != 1) pack_block(rows, whole, from, a_m, a_k, a_block[half], BLOCK_K);
                if (rest > 0) pack_block(rows, rest, from + whole * a_k, a_m, a_k, a_rest[half], TILE);
            }
            const Pairs a_whole = a_k == 1 ? Pairs{a_at, a_m, low_a} : Pairs{a_block[0], BLOCK_K, BLOCK * BLOCK_K};
            for (int64_t j0 = 0; j0 < N; j0 += BLOCK) {
                const int64_t columns = std::min(BLOCK, N - j0);
                const int64_t shape[] = {std::min(rows, TILE), rows - std::min(rows, TILE), std::min(columns, TILE),
                                         columns - std::min(columns, TILE)};
                if (!std::equal(shape, shape + 4, configured)) {
                    std::copy(shape, shape + 4, configured);
                    const TileConfig config(shape[0], shape[1], shape[2], shape[3]);
                    asm volatile("" ::"r"(&config) : "memory");
                    _tile_loadconfig(&config);
                }
                const bf16x2* b_at = b + k0 * ldb + j0;
                if (rest > 0) std::memset(static_cast<void*>(b_rest), 0, sizeof b_rest);
                for (int half = 0; rest > 0 && half < HALVES; ++half) {
                    pack_block(rest, columns, b_at + whole * ldb + half * low_b, ldb, 1, b_rest[half], BLOCK);
                }
                tile_block<SPLIT>(whole, a_whole, {b_at, ldb, low_b}, {a_rest[0], TILE, BLOCK * TILE},
                                  {b_rest[0], BLOCK, TILE * BLOCK}, rest > 0, c + i0 * ldc + j0, ldc,
                                  accumulate || k0 > 0, shape[1] > 0, shape[3] > 0);
            }
        }
    }
    _tile_release();
}

}  // namespace
}  // namespace cnm::CNM_ISA
