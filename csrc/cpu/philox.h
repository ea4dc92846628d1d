// Dropout's masks: Philox4x32-10 (Salmon et al., SC 2011) drawn in vector registers.
//
// Elements 8i to 8i + 7 take, in order, the low and high halves of the four words of the counter (i low, i high, offset
// low, offset high) under the key (seed low, seed high); an element is kept where its 16 bits are at least the threshold.
// A 32 x 32 -> 64 bit product is all a vector unit offers, so a counter's four words live in the low halves of 64-bit
// lanes; what is left in the high halves never reaches a product.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace cnm {

constexpr double DROPOUT_LEVELS = 65536;  // as in cnm_kernels/constants.py

struct Dropout {
    uint64_t seed = 0, offset = 0;
    uint32_t threshold = 0;  // of the 65,536 values of a draw, how many drop; 0 draws nothing
    float scale = 1;         // of what is kept

    Dropout(double p, int64_t seed, int64_t offset)
        : seed(static_cast<uint64_t>(seed)),
          offset(static_cast<uint64_t>(offset)),
          threshold(static_cast<uint32_t>(std::nearbyint(p * DROPOUT_LEVELS))),
          scale(static_cast<float>(DROPOUT_LEVELS / std::fmax(DROPOUT_LEVELS - threshold, 1))) {}
};

namespace CNM_ISA {

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

#if defined(__AVX512F__)
constexpr int COUNTERS = 8;

inline uint64_t draw(const Dropout& dropout, uint64_t first) {
    // In the order that makes each half of the result below four counters in a row.
    const __m512i index =
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c0 = index, c1 = _mm512_srli_epi64(index, 32);
    __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(dropout.offset)), c3 = _mm512_srli_epi64(c2, 32);
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    const __m512i m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        constexpr int XOR3 = 0x96;
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), XOR3);
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), XOR3);
        c1 = p1;
        c3 = p0;
    }
    const __m512i words01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i words23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
    const uint32_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(words01, words23), threshold);
    const uint32_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(words01, words23), threshold);
    return low | static_cast<uint64_t>(high) << 32;
}
#elif defined(__AVX2__)
constexpr int COUNTERS = 4;

inline uint32_t draw(const Dropout& dropout, uint64_t first) {
    // In the order that makes each half of the result below two counters in a row.
    const __m256i index =
        _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 2, 1, 3));
    __m256i c0 = index, c1 = _mm256_srli_epi64(index, 32);
    __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(dropout.offset)), c3 = _mm256_srli_epi64(c2, 32);
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    const __m256i m0 = _mm256_set1_epi64x(PHILOX_M0), m1 = _mm256_set1_epi64x(PHILOX_M1);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
        c1 = p1;
        c3 = p0;
    }
    const __m256i words01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i words23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold));
    const auto kept = [&](__m256i draws) { return _mm256_cmpeq_epi16(_mm256_max_epu16(draws, threshold), draws); };
    const __m256i low = kept(_mm256_unpacklo_epi64(words01, words23));
    const __m256i high = kept(_mm256_unpackhi_epi64(words01, words23));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
#else
constexpr int COUNTERS = 1;

inline uint8_t draw(const Dropout& dropout, uint64_t first) {
    uint32_t c0 = static_cast<uint32_t>(first), c1 = static_cast<uint32_t>(first >> 32);
    uint32_t c2 = static_cast<uint32_t>(dropout.offset), c3 = static_cast<uint32_t>(dropout.offset >> 32);
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * PHILOX_M0, p1 = static_cast<uint64_t>(c2) * PHILOX_M1;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
    }
    unsigned bits = 0;
    const uint32_t words[] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) {
        bits |= static_cast<unsigned>((words[i] & 0xFFFF) >= dropout.threshold) << (2 * i);
        bits |= static_cast<unsigned>((words[i] >> 16) >= dropout.threshold) << (2 * i + 1);
    }
    return static_cast<uint8_t>(bits);
}
#endif

// Which of a run of elements are kept, one bit each. One per thread: the bits lie in memory the caller gives.
class KeepBits {
   public:
    // What `memory` must hold for `count` elements, wherever they start.
    static constexpr int64_t bytes(int64_t count) { return count / 8 + 2 + COUNTERS + 4; }

    // Draws for elements [start, start + count).
    KeepBits(const Dropout& dropout, int64_t start, int64_t count, uint8_t* memory)
        : bits_(memory), shift_(start % 8) {
        if (dropout.threshold >= DROPOUT_LEVELS) {  // more than 16 bits can say: everything drops
            std::memset(memory, 0, static_cast<size_t>(bytes(count)));
            return;
        }
        const int64_t counters = (shift_ + count + 7) / 8;
        for (int64_t i = 0; i < counters; i += COUNTERS) {
            const auto drawn = draw(dropout, static_cast<uint64_t>(start / 8 + i));
            std::memcpy(memory + i, &drawn, sizeof drawn);
        }
    }

    // The lanes of elements start + i to start + i + W.
    Mask lanes(int64_t i) const {
        uint32_t word;  // W + 7 bits at most
        std::memcpy(&word, bits_ + (shift_ + i) / 8, sizeof word);
        return mask_bits(word >> ((shift_ + i) % 8));
    }

   private:
    const uint8_t* bits_;
    int64_t shift_;
};

}  // namespace CNM_ISA
}  // namespace cnm
