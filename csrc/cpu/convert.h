// float32, bfloat16 and float16 in memory <-> float32 in registers; rounding to nearest even.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace cnm {
namespace CNM_ISA {

inline float bf16_to_float(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline std::uint16_t float_to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return std::uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// out[i] = in[i], i < n
inline void load_as(const void* in, DType dtype, int n, float* out) {
  const auto* half = static_cast<const std::uint16_t*>(in);
  int i = 0;
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, in, n * sizeof(float));
      return;
    case DType::kBFloat16:
      for (; i < n; ++i) out[i] = bf16_to_float(half[i]);
      return;
    case DType::kFloat16:
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
#endif
      for (; i < n; ++i) {
        _Float16 x;
        std::memcpy(&x, half + i, 2);
        out[i] = float(x);
      }
      return;
  }
}

// out[i] = in[i] * factor, i < n
inline void store_as(void* out, DType dtype, const float* in, int n, float factor) {
  auto* single = static_cast<float*>(out);
  auto* half = static_cast<std::uint16_t*>(out);
  int i = 0;
  switch (dtype) {
    case DType::kFloat32:
      for (; i < n; ++i) single[i] = in[i] * factor;
      return;
    case DType::kBFloat16:
      for (; i < n; ++i) half[i] = float_to_bf16(in[i] * factor);
      return;
    case DType::kFloat16:
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(half + i),
                         _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(in + i), _mm256_set1_ps(factor)), 0));
#endif
      for (; i < n; ++i) {
        const _Float16 x = _Float16(in[i] * factor);
        std::memcpy(half + i, &x, 2);
      }
      return;
  }
}

}  // namespace CNM_ISA
}  // namespace cnm
