// Vectors of one instruction set. Each kernel source is compiled once per instruction set, in namespace CNM_ISA, with
// CNM_VECTOR_BYTES and the matching compiler flags; nothing here is shared between the copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef CNM_ISA
#error "CNM_ISA names the instruction set this file is compiled for"
#endif

namespace cnm {
namespace CNM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t VecInt __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec select(VecInt mask, Vec a, Vec b) { return (Vec)(((VecInt)a & mask) | ((VecInt)b & ~mask)); }
inline Vec maximum(Vec a, Vec b) { return select(a > b, a, b); }

inline VecInt lanes_below(int n) {
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float sum(Vec v) {  // pairwise, in a fixed order
  float x[kLanes];
  store(x, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}
inline float highest(Vec v) {
  float x[kLanes];
  store(x, v);
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// exp(x) for x <= 0 (and small positive x), within 1 ulp; 0 below the smallest normal number; NaN stays NaN.
inline Vec exp_nonpositive(Vec x) {
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec t = x * splat(1.44269504088896341f) + magic;
  VecInt n = (VecInt)t - (VecInt)magic;
  Vec k = t - magic;
  Vec r = x - k * splat(0.693359375f);
  r = r - k * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.f);
  Vec scale = (Vec)((n + 127) << 23);
  return select(x < splat(-87.33654f), Vec{}, p * scale);
}

// kLanes x kLanes block of 32-bit elements, transposed in registers.
template <class T>
inline void transpose_block(const T* in, std::ptrdiff_t in_row, T* out, std::ptrdiff_t out_row) {
  static_assert(sizeof(T) == 4, "32-bit elements");
  VecInt x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&x[i], in + i * in_row, sizeof(VecInt));
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    VecInt low, high;  // of a pair of rows s apart: lanes whose bit s is clear from both, and those whose bit s is set
    for (int l = 0; l < kLanes; ++l) {
      low[l] = (l & s) ? kLanes + l - s : l;
      high[l] = (l & s) ? kLanes + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & s)) {
        VecInt a = x[i], b = x[i + s];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + s] = __builtin_shuffle(a, b, high);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(out + i * out_row, &x[i], sizeof(VecInt));
}

// out[c][r] = in[r][c] for r < rows, c < cols; out rows are padded with zeros up to a multiple of kLanes.
template <class T>
inline void transpose(const T* in, std::ptrdiff_t in_row, int rows, int cols, T* out, std::ptrdiff_t out_row) {
  for (int r = 0; r < rows; r += kLanes)
    for (int c = 0; c < cols; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= cols) {
        transpose_block(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
        continue;
      }
      T block[kLanes][kLanes] = {};
      for (int i = r; i < rows && i < r + kLanes; ++i)
        for (int j = c; j < cols && j < c + kLanes; ++j) block[j - c][i - r] = in[i * in_row + j];
      for (int j = c; j < cols && j < c + kLanes; ++j) std::memcpy(out + j * out_row + r, block[j - c], sizeof(VecInt));
    }
}

}  // namespace CNM_ISA
}  // namespace cnm
