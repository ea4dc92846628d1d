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
inline Mask at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
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

// Pairs of rows are zipped by elements, then by pairs of elements; what is left to transpose are 4 x 4 blocks of quads.
inline void transpose(Vec (&rows)[W]) {
    __m512 t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    __m512 u[W];  // u[4 g + c]: of rows 4 g to 4 g + 3, elements c of each quad
#pragma GCC unroll 4
    for (int g = 0; g < W; g += 4) {
        const auto low = [&](int i, int j) {
            return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[j])));
        };
        const auto high = [&](int i, int j) {
            return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[j])));
        };
        u[g] = low(g, g + 2);
        u[g + 1] = high(g, g + 2);
        u[g + 2] = low(g + 1, g + 3);
        u[g + 3] = high(g + 1, g + 3);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 even_01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88),
                     odd_01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xDD);
        const __m512 even_23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88),
                     odd_23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xDD);
        rows[c].v = _mm512_shuffle_f32x4(even_01, even_23, 0x88);
        rows[4 + c].v = _mm512_shuffle_f32x4(odd_01, odd_23, 0x88);
        rows[8 + c].v = _mm512_shuffle_f32x4(even_01, even_23, 0xDD);
        rows[12 + c].v = _mm512_shuffle_f32x4(odd_01, odd_23, 0xDD);
    }
}

}  // namespace cnm::CNM_ISA
