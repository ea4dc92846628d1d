// gemm.h. C is cut into tiles that stay in registers over all of K: NV vectors wide, MR rows high, MR NV accumulators
// and NV vectors of B beside one broadcast of A. A panel of B is read from L1 by all rows of A.
#include "gemm.h"

#include <algorithm>

#include "transpose.h"

#if defined(CNM_AMX)
#include "gemm_amx.h"
#endif

#define CNM_UNROLL _Pragma("GCC unroll 16")  // or the accumulators end up in memory

namespace cnm::CNM_ISA {
namespace {

// Rows of a tile that is nv vectors wide: what the registers hold, less B's vectors and one broadcast.
constexpr int tile_rows(int nv) {
    if (VECTOR_REGISTERS == 16) return nv == 1 ? 8 : 6;
    return nv <= 2 ? 12 : nv == 3 ? 8 : 6;
}
constexpr int MAX_NV = VECTOR_REGISTERS == 32 ? 4 : 2;

inline Vec broadcast(const float* p) { return set1(*p); }
inline Vec load_b(const float* p) { return load(p); }
inline Vec load_b_n(const float* p, int n) { return load_n(p, n); }
inline Vec multiply_add(Vec a, Vec b, Vec c, const float*) { return fma(a, b, c); }

#if defined(__AVX512BF16__)
inline Vec broadcast(const bf16x2* p) { return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(p->bits)))}; }
inline Vec load_b(const bf16x2* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_b_n(const bf16x2* p, int n) { return {_mm512_maskz_loadu_ps(first_n(n), p)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c, const bf16x2*) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline const bf16x2* as_pairs(const split2* p) { return reinterpret_cast<const bf16x2*>(p); }
inline Vec broadcast(const split2* p) { return broadcast(as_pairs(p)); }
inline Vec load_b(const split2* p) { return load_b(as_pairs(p)); }
inline Vec load_b_n(const split2* p, int n) { return load_b_n(as_pairs(p), n); }
inline Vec multiply_add(Vec a, Vec b, Vec c, const split2* p) { return multiply_add(a, b, c, as_pairs(p)); }
// Two vectors that are neighbours, as one line.
inline void put_two(bf16* p, Vec first, Vec second, bool streams) {
    const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
    if (streams && reinterpret_cast<uintptr_t>(p) % 64 == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
    } else {
        _mm512_storeu_si512(p, line);
    }
}
#endif

// The products of bf16 numbers that one of operands E stands for.
template <class E>
constexpr int PRODUCTS = std::is_same_v<E, split2> ? 3 : 1;

// One tile, whose first row is row i of the result and whose first column is column j. `tail` is how many lanes of its
// last vector there are; FULL says all.
template <class E, class C, int MR, int NV, bool FULL>
void tile(int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, int64_t ldb, const ResultOf<C>& to, int64_t row,
          int64_t column, int tail) {
    const bool fetches = to.prefetch != nullptr && (K >> to.prefetch->shift) < Prefetch::PADDING;
    const char* nothing = reinterpret_cast<const char*>(a);
    const char* const* lines = fetches ? to.prefetch->take(K) : &nothing;
    constexpr int NEVER = 62;  // beyond any k
    const int shift = fetches ? to.prefetch->shift : NEVER;
    Vec sums[MR][NV];
    CNM_UNROLL
    for (int i = 0; i < MR; ++i) {
        CNM_UNROLL
        for (int j = 0; j < NV; ++j) sums[i][j] = set1(0);
    }
    const int64_t low_a = (a_m == 1 ? a_k : a_m) / 2, low_b = ldb / 2;  // from an operand's high half to its low one
    for (int product = 0; product < PRODUCTS<E>; ++product) {
        const E *left = product == 2 ? a + low_a : a, *right = product == 1 ? b + low_b : b;
        const int one_in = product == 0 ? shift : NEVER;
        for (int64_t k = 0; k < K; ++k, left += a_k, right += ldb) {
            __builtin_prefetch(lines[k >> one_in], 0, 2);
            Vec values[NV];
            CNM_UNROLL
            for (int j = 0; j < NV; ++j) {
                values[j] = FULL || j + 1 < NV ? load_b(right + j * W) : load_b_n(right + j * W, tail);
            }
            CNM_UNROLL
            for (int i = 0; i < MR; ++i) {
                const Vec element = broadcast(left + i * a_m);
                CNM_UNROLL
                for (int j = 0; j < NV; ++j) sums[i][j] = multiply_add(element, values[j], sums[i][j], right);
            }
        }
    }
    if (to.start != nullptr) {  // added last: a sum of sums rounds less than one long sum
        CNM_UNROLL
        for (int i = 0; i < MR; ++i) {
            const float* p = to.start + (row + i) * to.start_ld + column;
            CNM_UNROLL
            for (int j = 0; j < NV; ++j) sums[i][j] += FULL || j + 1 < NV ? load(p + j * W) : load_n(p + j * W, tail);
        }
    }
    if (to.scale != nullptr) {
        CNM_UNROLL
        for (int i = 0; i < MR; ++i) {
            const Vec scale = set1(to.scale[(row + i) * to.scale_step]);
            CNM_UNROLL
            for (int j = 0; j < NV; ++j) sums[i][j] *= scale;
        }
    }
    if (to.relu) {
        CNM_UNROLL
        for (int i = 0; i < MR; ++i) {
            CNM_UNROLL
            for (int j = 0; j < NV; ++j) sums[i][j] = vmax(set1(0), sums[i][j]);  // NaN stays
        }
    }
    CNM_UNROLL
    for (int i = 0; i < MR; ++i) {
        C* p = to.c + (row + i) * to.ldc + column;
        if constexpr (FULL && NV % 2 == 0 && std::is_same_v<C, bf16>) {
            CNM_UNROLL
            for (int j = 0; j < NV; j += 2) put_two(p + j * W, sums[i][j], sums[i][j + 1], to.streams);
        } else {
            CNM_UNROLL
            for (int j = 0; j < NV; ++j) {
                if (!FULL && j + 1 == NV) {
                    store_n(p + j * W, sums[i][j], tail);
                } else if (to.streams) {
                    stream(p + j * W, sums[i][j]);
                } else {
                    store(p + j * W, sums[i][j]);
                }
            }
        }
    }
}

template <class E, class C>
using Tile = void (*)(int64_t, const E*, int64_t, int64_t, const E*, int64_t, const ResultOf<C>&, int64_t, int64_t,
                      int);

template <class E, class C, int NV, bool FULL, int... ROWS>
constexpr Tile<E, C> pick(int rows, std::integer_sequence<int, ROWS...>) {
    constexpr Tile<E, C> tiles[] = {tile<E, C, ROWS + 1, NV, FULL>...};
    return tiles[rows - 1];
}

template <class E, class C, int NV>
void panel(int64_t M, int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, int64_t ldb, const ResultOf<C>& to,
           int64_t column, int tail) {
    constexpr int MR = tile_rows(NV);
    const int64_t tiles = (M + MR - 1) / MR;
    for (int64_t t = 0, i = 0; t < tiles; ++t) {  // tiles of even height: a last one of a row or two would crawl
        const int rows = static_cast<int>((M - i + tiles - t - 1) / (tiles - t));
        using Heights = std::make_integer_sequence<int, MR>;
        const Tile<E, C> run =
            tail == W ? pick<E, C, NV, true>(rows, Heights{}) : pick<E, C, NV, false>(rows, Heights{});
        run(K, a + i * a_m, a_m, a_k, b, ldb, to, i, column, tail);
        i += rows;
    }
}

template <class E, class C>
void blocked(int64_t M, int64_t N, int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, int64_t ldb,
             const ResultOf<C>& to) {
    const int64_t vectors = (N + W - 1) / W;
    const int64_t panels = (vectors + MAX_NV - 1) / MAX_NV;
    for (int64_t p = 0, j = 0; p < panels; ++p) {
        const int64_t wide = (vectors - j / W + panels - p - 1) / (panels - p);
        const int tail = static_cast<int>(std::min<int64_t>(N - j - (wide - 1) * W, W));
        const auto run = [&](auto nv) { panel<E, C, decltype(nv)::value>(M, K, a, a_m, a_k, b + j, ldb, to, j, tail); };
        switch (wide) {
            case 1: run(std::integral_constant<int, 1>{}); break;
            case 2: run(std::integral_constant<int, 2>{}); break;
            case 3: run(std::integral_constant<int, std::min(3, MAX_NV)>{}); break;
            case 4: run(std::integral_constant<int, std::min(4, MAX_NV)>{}); break;
        }
        j += wide * W;
    }
}

template <class T>
void transposed_to_float(int64_t K, int64_t N, const T* src, int64_t ld, float* dst, int64_t ldd) {
    transpose_blocks(
        N, K, [&](int64_t n, int64_t k, int count) { return load_tail(src + n * ld + k, count); },
        [&](int64_t k, int64_t n, Vec v, int count) { store_tail(dst + k * ldd + n, v, count); });
}

template <class T>
void rows_to_float(int64_t M, int64_t K, const T* src, int64_t ld, float* dst, int64_t ldd) {
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t k = 0; k < K; k += W) store_tail(dst + i * ldd + k, load_tail(src + i * ld + k, K - k), K - k);
    }
}

#if defined(__AVX512BF16__)
// The part of a number that is packed, rounded to bf16: the number, or the rest that its rounding leaves.
struct Whole {
    Vec operator()(Vec x) const { return x; }
};
struct Rest {
    Vec operator()(Vec x) const { return x - widen(narrow(x, bf16{}), bf16{}); }
};

// The bf16 values 0, 16, 1, 17, ... of a vector: pairs from its two halves.
inline Vec zip_halves(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))};
}
// Sixteen pairs of n elements of two rows, the lower half from the first; a null row is zeros.
template <class Part>
inline Vec zip_rows(const float* low, const float* high, int n, Part part) {
    const Vec upper = high == nullptr ? set1(0) : part(load_n(high, n));
    return zip_halves((__m512i)_mm512_cvtne2ps_pbh(upper.v, part(load_n(low, n)).v));
}
inline Vec zip_rows(const bf16* low, const bf16* high, int n, Whole) {
    const __m256i upper = high == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(first_n(n), high);
    const __m512i lower = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first_n(n), low));
    return zip_halves(_mm512_inserti64x4(lower, upper, 1));
}
// Pairs of neighbours along a row: up to 2 W elements from p.
inline Vec row_pairs(const bf16* p, int64_t n, Whole) {
    if (n >= 2 * W) return {_mm512_loadu_ps(p)};
    const int count = static_cast<int>(std::min<int64_t>(n, 2 * W));
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(count == 32 ? ~0u : (1u << count) - 1, p))};
}
template <class Part>
inline Vec row_pairs(const float* p, int64_t n, Part part) {
    if (n >= 2 * W) return {(__m512)_mm512_cvtne2ps_pbh(part(load(p + W)).v, part(load(p)).v)};
    const int first = static_cast<int>(std::min<int64_t>(n, W));
    const int second = static_cast<int>(std::min<int64_t>(n - first, W));
    return {(__m512)_mm512_cvtne2ps_pbh(part(load_n(p + first, second)).v, part(load_n(p, first)).v)};
}

template <class T, class Part>
void rows_to_pairs(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd, Part part) {
    for (int64_t k = 0; k < K; k += 2) {
        const T *low = src + k * ld, *high = k + 1 < K ? low + ld : nullptr;
        float* out = reinterpret_cast<float*>(dst + k / 2 * ldd);
        int64_t n = 0;
        for (; high != nullptr && n + W <= N; n += W) store(out + n, zip_rows(low + n, high + n, W, part));
        for (; n < N; n += W) {
            const int count = static_cast<int>(std::min<int64_t>(W, N - n));
            store_tail(out + n, zip_rows(low + n, high == nullptr ? nullptr : high + n, count, part), count);
        }
    }
}

template <class T, class Part>
void transposed_to_pairs(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd, Part part) {
    float* out = reinterpret_cast<float*>(dst);
    const bool whole = K % 2 == 0;
    transpose_blocks(
        N, (K + 1) / 2,
        [&](int64_t n, int64_t k, int count) {
            return row_pairs(src + n * ld + 2 * k, count == W && whole ? 2 * W : K - 2 * k, part);
        },
        [&](int64_t k, int64_t n, Vec v, int count) { store_tail(out + k * ldd + n, v, count); });
}

template <class T, class Part>
void a_to_pairs(int64_t M, int64_t K, const T* src, int64_t ld, bf16x2* dst, int64_t ldd, Part part) {
    for (int64_t i = 0; i < M; ++i) {
        float* out = reinterpret_cast<float*>(dst + i * ldd);
        for (int64_t k = 0; k < K; k += 2 * W) {
            store_tail(out + k / 2, row_pairs(src + i * ld + k, K - k, part), (K - k + 1) / 2);
        }
    }
}
#endif

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb,
          const Result& result) {
    blocked(M, N, K, a, a_m, a_k, b, ldb, result);
}

template <class T>
void pack_rows(int64_t K, int64_t N, const T* src, int64_t ld, float* dst, int64_t ldd) {
    rows_to_float(K, N, src, ld, dst, ldd);
}
template <class T>
void pack_transposed(int64_t K, int64_t N, const T* src, int64_t ld, float* dst, int64_t ldd) {
    transposed_to_float(K, N, src, ld, dst, ldd);
}
template void pack_rows(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void pack_rows(int64_t, int64_t, const bf16*, int64_t, float*, int64_t);
template void pack_rows(int64_t, int64_t, const f16*, int64_t, float*, int64_t);
template void pack_transposed(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void pack_transposed(int64_t, int64_t, const bf16*, int64_t, float*, int64_t);
template void pack_transposed(int64_t, int64_t, const f16*, int64_t, float*, int64_t);

#if defined(__AVX512BF16__)
template <class E>
void gemm(int64_t M, int64_t N, int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate, [[maybe_unused]] Prefetch* prefetch) {
#if defined(CNM_AMX)
    gemm_tiles(M, N, K, a, a_m, a_k, b, ldb, c, ldc, accumulate);
#else
    blocked(M, N, K, a, a_m, a_k, b, ldb, Result{c, ldc, accumulate ? c : nullptr, ldc, nullptr, 0, false, prefetch});
#endif
}
template void gemm(int64_t, int64_t, int64_t, const bf16x2*, int64_t, int64_t, const bf16x2*, int64_t, float*, int64_t,
                   bool, Prefetch*);
template void gemm(int64_t, int64_t, int64_t, const split2*, int64_t, int64_t, const split2*, int64_t, float*, int64_t,
                   bool, Prefetch*);

#if !defined(CNM_AMX)
void gemm(int64_t M, int64_t N, int64_t K, const bf16x2* a, int64_t a_m, int64_t a_k, const bf16x2* b, int64_t ldb,
          const ResultOf<bf16>& result) {
    blocked(M, N, K, a, a_m, a_k, b, ldb, result);
}
#endif

template <class T>
void pack_rows(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd) {
    rows_to_pairs(K, N, src, ld, dst, ldd, Whole{});
}
template <class T>
void pack_transposed(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd) {
    transposed_to_pairs(K, N, src, ld, dst, ldd, Whole{});
}
template <class T>
void pack_a(int64_t M, int64_t K, const T* src, int64_t ld, bf16x2* dst, int64_t ldd) {
    a_to_pairs(M, K, src, ld, dst, ldd, Whole{});
}
// Both parts of a few rows at a time: what the first reads is at hand for the second.
void pack_rows(int64_t K, int64_t N, const float* src, int64_t ld, split2* dst, int64_t ldd) {
    bf16x2* pairs = reinterpret_cast<bf16x2*>(dst);
    for (int64_t k = 0; k < K; k += 2) {
        const int64_t rows = std::min<int64_t>(2, K - k);
        rows_to_pairs(rows, N, src + k * ld, ld, pairs + k / 2 * ldd, ldd, Whole{});
        rows_to_pairs(rows, N, src + k * ld, ld, pairs + k / 2 * ldd + ldd / 2, ldd, Rest{});
    }
}
void pack_transposed(int64_t K, int64_t N, const float* src, int64_t ld, split2* dst, int64_t ldd) {
    bf16x2* pairs = reinterpret_cast<bf16x2*>(dst);
    for (int64_t n = 0; n < N; n += W) {
        const int64_t rows = std::min<int64_t>(W, N - n);
        transposed_to_pairs(K, rows, src + n * ld, ld, pairs + n, ldd, Whole{});
        transposed_to_pairs(K, rows, src + n * ld, ld, pairs + n + ldd / 2, ldd, Rest{});
    }
}
void pack_a(int64_t M, int64_t K, const float* src, int64_t ld, split2* dst, int64_t ldd) {
    bf16x2* pairs = reinterpret_cast<bf16x2*>(dst);
    for (int64_t i = 0; i < M; ++i) {
        a_to_pairs(1, K, src + i * ld, ld, pairs + i * ldd, ldd, Whole{});
        a_to_pairs(1, K, src + i * ld, ld, pairs + i * ldd + ldd / 2, ldd, Rest{});
    }
}
template void pack_rows(int64_t, int64_t, const float*, int64_t, bf16x2*, int64_t);
template void pack_rows(int64_t, int64_t, const bf16*, int64_t, bf16x2*, int64_t);
template void pack_transposed(int64_t, int64_t, const float*, int64_t, bf16x2*, int64_t);
template void pack_transposed(int64_t, int64_t, const bf16*, int64_t, bf16x2*, int64_t);
template void pack_a(int64_t, int64_t, const float*, int64_t, bf16x2*, int64_t);
template void pack_a(int64_t, int64_t, const bf16*, int64_t, bf16x2*, int64_t);
#endif

}  // namespace cnm::CNM_ISA
