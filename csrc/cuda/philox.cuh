// Dropout's masks, drawn in registers: the bits that csrc/cpu/philox.h states.
#pragma once

#include "constants.h"
#include "device.cuh"

namespace cnm::cuda {

constexpr int GROUP = 8;  // elements of a draw

struct Dropout {
    uint64_t offset;
    uint32_t threshold;  // of the 65,536 values of a draw, how many drop
    float scale;         // of what is kept

    static Dropout of(double p, int64_t offset) {
        const double threshold = std::nearbyint(p * DROPOUT_LEVELS);
        return {static_cast<uint64_t>(offset), static_cast<uint32_t>(threshold),
                static_cast<float>(DROPOUT_LEVELS / std::fmax(DROPOUT_LEVELS - threshold, 1))};
    }
};

// Bit i says whether element 8 group + i is kept.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, uint64_t seed, uint64_t group) {
    if (dropout.threshold == 0) return 0xFF;
    constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
    uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
    uint32_t c2 = static_cast<uint32_t>(dropout.offset), c3 = static_cast<uint32_t>(dropout.offset >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = multiply_high(M0, c0), low0 = M0 * c0, high1 = multiply_high(M1, c2), low1 = M1 * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += W0;
        k1 += W1;
    }
    const uint32_t words[] = {c0, c1, c2, c3};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t draw = words[i / 2] >> (16 * (i % 2)) & 0xFFFF;
        bits |= static_cast<uint32_t>(draw >= dropout.threshold) << i;
    }
    return bits;
}

// The numbers of a draw, from `column` on of a row as wide as D; zeros beyond it.
template <class T, class Index>
__device__ __forceinline__ void load_group(const T* row, Index column, Index D, bool aligned, float (&out)[GROUP]) {
    if (aligned) {
        constexpr int PER = PER_VEC16B<T>;
#pragma unroll
        for (int part = 0; part < GROUP / PER; ++part) {
            float values[PER];
            unpack(load(reinterpret_cast<const Vec16B*>(row + column) + part), values, T{});
#pragma unroll
            for (int i = 0; i < PER; ++i) out[part * PER + i] = values[i];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i) out[i] = column + i < D ? to_float(load(row + column + i)) : 0.0f;
}

template <class T, class Index>
__device__ __forceinline__ void store_group(T* row, Index column, Index D, bool aligned, const float (&values)[GROUP]) {
    if (aligned) {
        constexpr int PER = PER_VEC16B<T>;
#pragma unroll
        for (int part = 0; part < GROUP / PER; ++part) {
            float some[PER];
#pragma unroll
            for (int i = 0; i < PER; ++i) some[i] = values[part * PER + i];
            store(reinterpret_cast<Vec16B*>(row + column) + part, pack_vec16b<T>(some));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        T rounded;
        from_float(&rounded, values[i]);
        if (column + i < D) store(row + column + i, rounded);
    }
}

}  // namespace cnm::cuda
