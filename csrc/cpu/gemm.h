// Matrix products of operands that fit the caches, the building block of attention and of the loss.
//
// C[M, N] = A[M, K] B[K, N], or C += A B, in float32, on one thread. A is read one element at a time, so a transposed A
// costs nothing (on AMX a transpose in registers); B is read along its rows, so B^T has to be packed first. Sums run
// over k in order, in one float32 accumulator per element of C: a result depends on the shapes alone.
//
// Elements are float, or pairs of bf16 that are neighbours along K (K then counts pairs), where HAS_BF16X2 says that
// the processor multiplies them as such. Other bf16 and all f16 operands are converted to float when they are packed.
// Code that serves both writes its operands with pack_rows and pack_transposed into Operand<T>, and calls gemm on that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "prefetch.h"
#include "simd.h"
#include "types.h"

namespace cnm::CNM_ISA {

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16X2 = true;
#else
constexpr bool HAS_BF16X2 = false;
#endif
#if defined(__AMX_TILE__) || defined(CNM_AMX_HEADER)
#define CNM_AMX  // products of pairs run on tiles
constexpr bool BF16X2_TO_BF16 = false;
#else
constexpr bool BF16X2_TO_BF16 = HAS_BF16X2;  // whether products of pairs can write bf16
#endif

// Two bf16 neighbours along K, the lower k in the lower half; beyond an odd K the upper half is 0.
struct bf16x2 {
    uint32_t bits;
};

// Pairs of bf16 numbers hi and lo whose sum stands for a float32 number x: hi is the one nearest to x, lo the one
// nearest to x - hi. A product of such operands is hi hi + hi lo + lo hi: each x y is off by 3 2^-16 |x y| at most, by
// 4e-6 |x y| in the mean. In memory a row of pairs of hi is the first half of ld elements, lo the second half. Denormal
// hi and lo count as 0; where hi is not finite, as x is not or is beyond bf16's range, no result of it is.
struct split2 {
    uint32_t bits;
};

// The type that operands of element type T are packed to.
template <class T>
using Operand = std::conditional_t<HAS_BF16X2 && std::is_same_v<T, bf16>, bf16x2, float>;

// Whether products write results of element type T themselves; others pass through a float buffer.
template <class T>
constexpr bool DIRECT = std::is_same_v<T, float> || (std::is_same_v<T, bf16> && BF16X2_TO_BF16);

// How many operands' elements E hold K numbers.
template <class E>
constexpr int64_t elements_of(int64_t K) {
    return std::is_same_v<E, float> ? K : (K + 1) / 2;
}
// How many elements of Operand<T> hold K elements of T.
template <class T>
constexpr int64_t packed_k(int64_t K) {
    return elements_of<Operand<T>>(K);
}

// How far apart rows of `width` elements E lie at least.
template <class E>
constexpr int64_t row_of(int64_t width) {
    return std::is_same_v<E, split2> ? 2 * width : width;
}

// Where a product goes: c[i * ldc + j] = scale[i * scale_step] (start[i * start_ld + j] + (A B)(i, j)), or 0 where that
// is negative and `relu`.
template <class C>
struct ResultOf {
    C* c;
    int64_t ldc;
    const float* start = nullptr;  // null: zeros
    int64_t start_ld = 0;
    const float* scale = nullptr;  // null: ones
    int64_t scale_step = 0;
    bool streams = false;  // past the caches; stream_fence() before others read it
    Prefetch* prefetch = nullptr;
    bool relu = false;
};
using Result = ResultOf<float>;

// A(i, k) = a[i * a_m + k * a_k], B(k, j) = b[k * ldb + j], C(i, j) = c[i * ldc + j]. One of a_m and a_k is 1.
void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb,
          const Result& result);
inline void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool accumulate, Prefetch* prefetch = nullptr) {
    gemm(M, N, K, a, a_m, a_k, b, ldb, Result{c, ldc, accumulate ? c : nullptr, ldc, nullptr, 0, false, prefetch});
}
#if defined(__AVX512BF16__)
template <class E>  // bf16x2 or split2
void gemm(int64_t M, int64_t N, int64_t K, const E* a, int64_t a_m, int64_t a_k, const E* b, int64_t ldb, float* c,
          int64_t ldc, bool accumulate, Prefetch* prefetch = nullptr);
// Only where BF16X2_TO_BF16.
void gemm(int64_t M, int64_t N, int64_t K, const bf16x2* a, int64_t a_m, int64_t a_k, const bf16x2* b, int64_t ldb,
          const ResultOf<bf16>& result);
#endif

// Packs X[K, N] = src[k * ld + n] for use as B (or, with strides a_m = 1 and a_k = ldd, as A = X^T):
// to float dst[k * ldd + n], or to pairs dst[k / 2 * ldd + n]. S is T, or float where T is a narrower type.
template <class T>
void pack_rows(int64_t K, int64_t N, const T* src, int64_t ld, float* dst, int64_t ldd);
template <class T>
void pack_rows(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd);
void pack_rows(int64_t K, int64_t N, const float* src, int64_t ld, split2* dst, int64_t ldd);

// Packs X[K, N] = src[n * ld + k], the transpose of what lies in memory, into the same form.
template <class T>
void pack_transposed(int64_t K, int64_t N, const T* src, int64_t ld, float* dst, int64_t ldd);
template <class T>
void pack_transposed(int64_t K, int64_t N, const T* src, int64_t ld, bf16x2* dst, int64_t ldd);
void pack_transposed(int64_t K, int64_t N, const float* src, int64_t ld, split2* dst, int64_t ldd);

// Packs A[M, K] = src[i * ld + k] row by row: to float dst[i * ldd + k], or to pairs dst[i * ldd + k / 2]. A row-major
// operand that is float already, or bf16 with even K and ld, needs no packing: use it (as_bf16x2) where it lies.
template <class T>
inline void pack_a(int64_t M, int64_t K, const T* src, int64_t ld, float* dst, int64_t ldd) {
    pack_rows(M, K, src, ld, dst, ldd);
}
template <class T>
void pack_a(int64_t M, int64_t K, const T* src, int64_t ld, bf16x2* dst, int64_t ldd);
void pack_a(int64_t M, int64_t K, const float* src, int64_t ld, split2* dst, int64_t ldd);

inline const bf16x2* as_bf16x2(const bf16* p) { return reinterpret_cast<const bf16x2*>(p); }

// Rows of a row-major operand.
template <class E>
struct OperandRows {
    const E* data;
    int64_t ld;

    OperandRows from(int64_t row) const { return {data + row * ld, ld}; }
};

// Whether rows of K elements can be multiplied where they lie.
template <class T>
inline bool usable_in_place(int64_t K, const T* src, int64_t ld) {
    if constexpr (std::is_same_v<T, Operand<T>>) return true;
    const bool whole_pairs = K % 2 == 0 && ld % 2 == 0 && reinterpret_cast<uintptr_t>(src) % alignof(bf16x2) == 0;
    return std::is_same_v<Operand<T>, bf16x2> && whole_pairs;
}

// src[i * ld + k] as a left operand: where it lies if that is possible, else packed into `buffer`.
template <class E, class S>
inline OperandRows<E> left_rows(int64_t M, int64_t K, const S* src, int64_t ld, E* buffer, int64_t ldd) {
    if constexpr (std::is_same_v<S, E>) {
        return {src, ld};
    } else {
        if constexpr (std::is_same_v<S, bf16> && std::is_same_v<E, bf16x2>) {
            if (usable_in_place(K, src, ld)) return {as_bf16x2(src), ld / 2};
        }
        pack_a(M, K, src, ld, buffer, ldd);
        return {buffer, ldd};
    }
}

// src[k * ld + n] as a right operand, or as a left one that is read transposed: where it lies if that is possible, else
// packed into `buffer`.
template <class E, class S>
inline OperandRows<E> right_rows(int64_t K, int64_t N, const S* src, int64_t ld, E* buffer, int64_t ldd) {
    if constexpr (std::is_same_v<S, E>) {
        return {src, ld};
    } else {
        pack_rows(K, N, src, ld, buffer, ldd);
        return {buffer, ldd};
    }
}

}  // namespace cnm::CNM_ISA
