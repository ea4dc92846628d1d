// The one place where kernels meet the GPU: what has no meaning in plain C++ is here, twice. Kernels include nothing
// else of CUDA, so that the tests compile the very same .cu files as C++ and run them on
// tests/cuda_emulation/emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"
#include "types.h"

#if defined(CNM_EMULATED)
#include "emulator.h"
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::machine().current->thread)
#define blockIdx (emulator::machine().block)
#define gridDim (emulator::machine().grid)
#define blockDim (emulator::machine().threads)
#endif

namespace cnm::cuda {

constexpr int WARP = 32;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / WARP; }
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }

// Sixteen bytes, as they move at once.
struct alignas(16) Vec16B {
    uint32_t word[4];
};

// ------------------------------------------------------------------------------------------------ primitives

#if defined(CNM_EMULATED)

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(emulator::machine().shared.data());
}
inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::sync_warp(); }
inline void keep_order() {}
inline void renew(int&) {}
inline float shuffle_xor(float value, int mask) { return emulator::shuffle_xor(value, mask); }
inline bool any_lane(bool value) { return emulator::any_lane(value); }

// Global memory.
template <class T>
T load(const T* from) {
    emulator::check_global(from, sizeof(T), "read");
    return *from;
}
template <class T>
void store(T* to, T value) {
    emulator::check_global(to, sizeof(T), "write");
    *to = value;
}

inline void copy_async(void* shared, const void* global, bool inside) {
    emulator::copy_async(shared, global, inside, 16);
}
inline void copy_pair_async(float* shared, const float* global, bool inside) {
    emulator::copy_async(shared, global, inside, 8);
}
inline void commit_async() { emulator::commit_async(); }
template <int PENDING>
void wait_async() {
    emulator::wait_async(PENDING);
}

inline void load_matrix(uint32_t (&r)[4], const void* row) {
    const auto words = emulator::load_matrix(row, false);
    std::memcpy(r, words.word, sizeof r);
}
inline void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    const auto words = emulator::load_matrix(row, true);
    std::memcpy(r, words.word, sizeof r);
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float rounded_product(float a, float b) {
    volatile float product = a * b;  // no compiler fuses it
    return product;
}
inline float exponential(float x) {
    emulator::note_exponential();
    return std::exp(x);
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return static_cast<float>(half);
}
inline void from_float(float* to, float x) { *to = x; }
inline void from_float(bf16* to, float x) {
    const uint32_t bits = bits_of(x);
    to->bits = std::isnan(x) ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void from_float(f16* to, float x) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(to, &half, 2);
}
template <class T>
uint32_t pack(float low, float high) {
    T parts[2];
    from_float(&parts[0], low);
    from_float(&parts[1], high);
    return parts[0].bits | static_cast<uint32_t>(parts[1].bits) << 16;
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply<8>("mma.tf32", c, a, b, [](uint32_t word, int) { return float_of(word & 0xFFFFE000); });
}
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply<16>("mma.16", c, a, b,
                           [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> (16 * i))}); });
}

#else

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    return reinterpret_cast<T*>(shared_memory);
}
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Tells the compiler not to fetch from memory what comes later, where registers are scarce.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }
// Makes x a new number to the compiler, which then derives others from it again and not before a loop, where they would
// hold registers.
__device__ __forceinline__ void renew(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xFFFFFFFFu, value) != 0; }

template <class T>
__device__ __forceinline__ T load(const T* from) {
    return *from;
}
template <class T>
__device__ __forceinline__ void store(T* to, T value) {
    *to = value;
}

// Sixteen bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// The same of two floats.
__device__ __forceinline__ void copy_pair_async(float* shared, const float* global, bool inside) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], const void* row) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
// exp(x) for x at most 0 or slightly above; its error is two units in the last place plus |x| / 2^24, relative.
__device__ __forceinline__ float exponential(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 1.4426950408889634f));
    return out;
}
// Never fused with a sum, so that a score less the largest of them is exactly 0 where it is the largest.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
}
__device__ __forceinline__ void from_float(float* to, float x) { *to = x; }
__device__ __forceinline__ void from_float(bf16* to, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
__device__ __forceinline__ void from_float(f16* to, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
// Two numbers rounded and packed, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// ------------------------------------------------------------------------------------------------ built from them

template <class T>
constexpr int PER_VEC16B = 16 / static_cast<int>(sizeof(T));  // numbers in sixteen bytes

// Sixteen bytes as numbers and back.
__device__ __forceinline__ void unpack(const Vec16B& words, float (&out)[4], float) {
    for (int i = 0; i < 4; ++i) out[i] = float_of(words.word[i]);
}
template <class T>
__device__ __forceinline__ void unpack(const Vec16B& words, float (&out)[8], T) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out[i] = to_float(T{static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)))});
    }
}

template <class T>
__device__ __forceinline__ Vec16B pack_vec16b(const float (&values)[PER_VEC16B<T>]) {
    Vec16B words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            words.word[i] = bits_of(values[i]);
        } else {
            words.word[i] = pack<T>(values[2 * i], values[2 * i + 1]);
        }
    }
    return words;
}

// Sums over lanes whose numbers differ in the bits of `lanes` - 1: 4 for the lanes that share a row of an accumulator.
template <int LANES = WARP>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}
template <int LANES = WARP>
__device__ __forceinline__ float max_over_lanes(float x) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// The sum over a block, in a fixed order, to all its threads; `scratch` has a float for each warp.
__device__ __forceinline__ float sum_over_block(float x, float* scratch) {
    x = sum_over_lanes(x);
    sync_block();  // whoever still reads the scratch of a sum before this one
    if (lane() == 0) scratch[warp()] = x;
    sync_block();
    float total = 0;
    for (int i = 0; i < (threads() + WARP - 1) / WARP; ++i) total += scratch[i];
    return total;
}

// ------------------------------------------------------------------------------------------------ on the host

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned_to_vec16b(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec16B) == 0;
}

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

#if defined(CNM_EMULATED)

template <class... Params, class... Arguments>
void launch(void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes, const Arguments&... arguments) {
    const std::tuple<Params...> given(arguments...);
    emulator::launch(
        reinterpret_cast<const void*>(kernel),
        {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)},
        {static_cast<unsigned>(threads), 1, 1}, shared_bytes, [&] { std::apply(kernel, given); },
        emulator::bytes_of(given));
}

#else

template <class... Params, class... Arguments>
void launch(void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes, const Arguments&... arguments) {
    if (shared_bytes > 48 << 10) {
        const int most = most_shared_bytes();
        if (shared_bytes > static_cast<size_t>(most)) {
            throw std::runtime_error("cnm_kernels: a block of this GPU has too little shared memory: " +
                                     std::to_string(most) + " bytes, " + std::to_string(shared_bytes) + " wanted");
        }
        // Not what this launch wants: another thread's launch of the same kernel may come in between.
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most),
              "a kernel's shared memory could not be set");
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    // clang-format would take the launch apart.
    // clang-format off
    kernel<<<blocks, threads, shared_bytes, current_stream()>>>(arguments...);
    // clang-format on
    check(cudaGetLastError(), "a kernel could not be launched");
}

#endif

}  // namespace cnm::cuda
