// simd.h on AVX-512 (F, BW, DQ, VL). With bfloat16 instructions, conversion to bf16 flushes denormals to zero.
#pragma once

#include <immintrin.h>

namespace cnm::CNM_ISA {

constexpr int W = 16;
constexpr int VECTOR_REGISTERS = 32;

struct Vec {
    __m512 v;
};
using Mask = __mmask16;

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec operator^(Vec a, Vec b) { return {_mm512_xor_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Mask first_n(int n) { return static_cast<Mask>((1u << n) - 1); }
inline Mask mask_bits(uint32_t bits) { return static_cast<Mask>(bits); }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec select(Mask mask, Vec a, Vec b) { return {_mm512_mask_blend_ps(mask, b.v, a.v)}; }

inline Vec widen(__m256i bits, bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m256i bits, f16) { return {_mm512_cvtph_ps(bits)}; }
inline __m256i narrow(Vec a, f16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(Vec a, bf16) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    const Mask nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_n(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_n(n), a.v); }
inline void stream(float* p, Vec a) {
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) {
        _mm512_stream_ps(p, a.v);
    } else {
        store(p, a);
    }
}
template <class T>
inline Vec load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Vec load_n(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first_n(n), p), T{});
}
template <class T>
inline void store(T* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
    _mm256_mask_storeu_epi16(p, first_n(n), narrow(a, T{}));
}
template <class T>
inline void stream(T* p, Vec a) {
    if (reinterpret_cast<uintptr_t>(p) % 32 == 0) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
    } else {
        store(p, a);
    }
}
inline void stream_fence() { _mm_sfence(); }

inline float hsum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Four rounds of zipping row i with row i + 8.
inline void transpose(Vec (&rows)[W]) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (int round = 0; round < 4; ++round) {
        Vec zipped[W];
        for (int i = 0; i < W / 2; ++i) {
            zipped[2 * i].v = _mm512_permutex2var_ps(rows[i].v, low, rows[i + W / 2].v);
            zipped[2 * i + 1].v = _mm512_permutex2var_ps(rows[i].v, high, rows[i + W / 2].v);
        }
        for (int i = 0; i < W; ++i) rows[i] = zipped[i];
    }
}

}  // namespace cnm::CNM_ISA
