// Dropout's masks: Philox4x32-10 (Salmon et al., SC 2011) drawn in vector registers.
//
// Elements 8i to 8i + 7 take, in order, the low and high halves of the four words of the counter (i low, i high, offset
// low, offset high) under the key (seed low, seed high); an element is kept where its 16 bits reach the threshold.
// A 32 x 32 -> 64 bit product is all a vector unit offers, so a counter's four words live in the low halves of 64-bit
// lanes; what is left in the high halves never reaches a product.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "constants.h"
#include "simd.h"

namespace cnm {

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;
constexpr int PHILOX_ROUNDS = 10;

struct Dropout {
    uint64_t offset;
    uint32_t threshold;               // of the 65,536 values of a draw, how many drop
    float scale;                      // of what is kept
    uint64_t keys[PHILOX_ROUNDS][2];  // of each round, 32 bits each; this wide, an instruction can broadcast it itself

    Dropout(double p, int64_t seed, int64_t offset)
        : offset(static_cast<uint64_t>(offset)),
          threshold(static_cast<uint32_t>(std::nearbyint(p * DROPOUT_LEVELS))),
          scale(static_cast<float>(DROPOUT_LEVELS / std::fmax(DROPOUT_LEVELS - threshold, 1))) {
        uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        for (auto& key : keys) {
            key[0] = low;
            key[1] = high;
            low += PHILOX_W0;
            high += PHILOX_W1;
        }
    }
};

namespace CNM_ISA {

// The state of Philox in 64-bit lanes, a vector of counters for each of CHAINS: a round is a product, a shift and an
// exclusive or, each waiting for the one before, and several chains in step fill the gaps.
#if defined(__AVX512F__)
constexpr int CHAINS = 6, CHAIN_COUNTERS = 8;
using Words = __m512i;

// Orders counters so that each half of a chain's bits is four counters in a row.
inline Words counter_lanes(uint64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Words all(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Words high_half(Words x) { return _mm512_srli_epi64(x, 32); }
inline Words multiply(Words x, Words y) { return _mm512_mul_epu32(x, y); }
inline Words xor3(Words x, Words y, Words z) { return _mm512_ternarylogic_epi64(x, y, z, 0x96); }

inline uint64_t keep_bits(Words c0, Words c1, Words c2, Words c3, uint32_t least) {
    const Words words01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const Words words23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    const Words threshold = _mm512_set1_epi16(static_cast<int16_t>(least));
    const uint32_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(words01, words23), threshold);
    const uint32_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(words01, words23), threshold);
    return low | static_cast<uint64_t>(high) << 32;
}
#elif defined(__AVX2__)
constexpr int CHAINS = 2, CHAIN_COUNTERS = 4;
using Words = __m256i;

// Orders counters so that each half of a chain's bits is two counters in a row.
inline Words counter_lanes(uint64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 2, 1, 3));
}
inline Words all(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Words high_half(Words x) { return _mm256_srli_epi64(x, 32); }
inline Words multiply(Words x, Words y) { return _mm256_mul_epu32(x, y); }
inline Words xor3(Words x, Words y, Words z) { return _mm256_xor_si256(_mm256_xor_si256(x, y), z); }

inline uint32_t keep_bits(Words c0, Words c1, Words c2, Words c3, uint32_t least) {
    const Words words01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const Words words23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const Words threshold = _mm256_set1_epi16(static_cast<int16_t>(least));
    const auto kept = [&](Words draws) { return _mm256_cmpeq_epi16(_mm256_max_epu16(draws, threshold), draws); };
    const Words low = kept(_mm256_unpacklo_epi64(words01, words23));
    const Words high = kept(_mm256_unpackhi_epi64(words01, words23));
    const Words bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
#else
constexpr int CHAINS = 4, CHAIN_COUNTERS = 1;
using Words = uint64_t;

inline Words counter_lanes(uint64_t first) { return first; }
inline Words all(uint64_t x) { return x; }
inline Words high_half(Words x) { return x >> 32; }
inline Words multiply(Words x, Words y) { return (x & 0xFFFFFFFF) * y; }
inline Words xor3(Words x, Words y, Words z) { return x ^ y ^ z; }

inline uint8_t keep_bits(Words c0, Words c1, Words c2, Words c3, uint32_t least) {
    unsigned bits = 0;
    const Words words[] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) {
        bits |= static_cast<unsigned>((words[i] & 0xFFFF) >= least) << (2 * i);
        bits |= static_cast<unsigned>((words[i] >> 16 & 0xFFFF) >= least) << (2 * i + 1);
    }
    return static_cast<uint8_t>(bits);
}
#endif

constexpr int COUNTERS = CHAINS * CHAIN_COUNTERS;

// Keep bits of COUNTERS counters from `first`, eight each, to COUNTERS bytes.
inline void draw(const Dropout& dropout, uint64_t first, uint8_t* out) {
    Words c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int i = 0; i < CHAINS; ++i) {
        c0[i] = counter_lanes(first + static_cast<uint64_t>(i * CHAIN_COUNTERS));
        c1[i] = high_half(c0[i]);
        c2[i] = all(dropout.offset);
        c3[i] = all(dropout.offset >> 32);
    }
#pragma GCC unroll 10
    for (const auto& key : dropout.keys) {
#pragma GCC unroll 6
        for (int i = 0; i < CHAINS; ++i) {
            const Words p0 = multiply(c0[i], all(PHILOX_M0)), p1 = multiply(c2[i], all(PHILOX_M1));
            c0[i] = xor3(high_half(p1), c1[i], all(key[0]));
            c2[i] = xor3(high_half(p0), c3[i], all(key[1]));
            c1[i] = p1;
            c3[i] = p0;
        }
    }
    for (int i = 0; i < CHAINS; ++i) {
        const auto bits = keep_bits(c0[i], c1[i], c2[i], c3[i], dropout.threshold);
        static_assert(sizeof bits == CHAIN_COUNTERS, "eight bits per counter");
        std::memcpy(out + i * CHAIN_COUNTERS, &bits, sizeof bits);
    }
}

// The mask of a run of kept elements, one bit each. Each thread has one, in memory that the caller provides.
class KeepBits {
  public:
    // The bytes that `memory` must have for `count` elements, wherever they start.
    static constexpr int64_t bytes(int64_t count) { return count / 8 + 2 + COUNTERS + 4; }

    // Draws for elements [start, start + count).
    KeepBits(const Dropout& dropout, int64_t start, int64_t count, uint8_t* memory) : bits_(memory), shift_(start % 8) {
        if (dropout.threshold >= DROPOUT_LEVELS) {  // more than 16 bits can say: everything drops
            std::memset(memory, 0, static_cast<size_t>(bytes(count)));
            return;
        }
        const int64_t counters = (shift_ + count + 7) / 8;
        for (int64_t i = 0; i < counters; i += COUNTERS) {
            draw(dropout, static_cast<uint64_t>(start / 8 + i), memory + i);
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
