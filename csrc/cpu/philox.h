// Philox4x32-10 (Salmon et al., SC 2011) in vector registers, and the dropout decisions drawn from it.
//
// Elements 8i to 8i+7 of a tensor take, in order, the low and high halves of the four words of counter
// (i low, i high, offset low, offset high) under key (seed low, seed high). A vector holds one counter in each 64-bit lane.
#pragma once

#include "simd.h"

namespace cnm {
namespace CNM_ISA {

constexpr int kCounters = kLanes / 2;       // per vector
constexpr int kDraws = 8 * kCounters;       // elements they decide
typedef std::uint64_t VecLong __attribute__((vector_size(8 * kCounters)));

// Products of the lanes' low 32 bits.
inline VecLong multiply_low(VecLong a, std::uint64_t b) {
#if defined(__AVX512F__)
  return (VecLong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)b));
#elif defined(__AVX2__)
  return (VecLong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((long long)b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

struct Philox {
  std::uint64_t seed, offset;

  // The 16-bit draws of kDraws elements, from counter `first` on.
  void draw(std::uint64_t first, std::uint16_t* out) const {
    VecLong index;
    for (int i = 0; i < kCounters; ++i) index[i] = first + i;
    // The upper halves of the lanes hold garbage between the rounds; the products do not read them.
    VecLong c0 = index, c1 = index >> 32, c2 = VecLong{} + offset, c3 = VecLong{} + (offset >> 32);
    std::uint64_t k0 = seed, k1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
      const VecLong product0 = multiply_low(c0, 0xD2511F53u), product1 = multiply_low(c2, 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ k0;
      c2 = (product0 >> 32) ^ c3 ^ k1;
      c1 = product1;
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const VecLong low = (c0 & 0xFFFFFFFFu) | (c1 << 32), high = (c2 & 0xFFFFFFFFu) | (c3 << 32);
    VecLong first_half, second_half;  // lanes interleaved: the draws in element order
    for (int i = 0; i < kCounters; ++i) {
      first_half[i] = i / 2 + (i % 2 ? kCounters : 0);
      second_half[i] = (kCounters + i) / 2 + (i % 2 ? kCounters : 0);
    }
    const VecLong a = __builtin_shuffle(low, high, first_half), b = __builtin_shuffle(low, high, second_half);
    std::memcpy(out, &a, sizeof a);
    std::memcpy(out + kDraws / 2, &b, sizeof b);
  }
};

// Dropout of consecutive elements.
struct Dropout {
  Philox philox;
  std::uint32_t threshold;  // of 65,536: draws below it drop
  float scale;              // of what is kept

  // factor[i] = 0 or scale for elements begin to begin + n - 1; factor has room for n + 2 kDraws.
  // Returns where the factors begin: counters decide eight elements, so the first may start earlier.
  const float* factors(std::uint64_t begin, int n, float* factor) const {
    const int lead = int(begin % 8);
    std::uint16_t draws[kDraws];
    for (int i = 0; i < lead + n; i += kDraws) {
      philox.draw((begin - lead + i) / 8, draws);
      for (int j = 0; j < kDraws; ++j) factor[i + j] = draws[j] >= threshold ? scale : 0.f;
    }
    return factor + lead;
  }
};

}  // namespace CNM_ISA
}  // namespace cnm
