// The tensor cores' asynchronous products (wgmma), which four warps, a group, start together: compiled for 9.0a alone,
// and for the emulator. Operands lie in shared memory in the 128-byte swizzle and are named by descriptors; a group's
// 64 rows may come from registers. Accumulators lie as those of mma.sync: a warp's rows are 16 of the group's 64.
//
// Order: what threads wrote to shared memory is fenced (fence_async_proxy) before the barrier behind which a group
// reads it; accumulators and rows in registers are fenced (fence_group) before the products that use them, and are not
// touched until these were waited for.
#pragma once

#include "tiles.cuh"

#if defined(CNM_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CNM_GROUPS 1
#endif

#if defined(CNM_EMULATED)
#include "groups.h"
#endif

namespace cnm::cuda {

constexpr int GROUP_WARPS = 4, GROUP_ROWS = 64;
constexpr int SWIZZLED_BYTES = 128, SWIZZLE_ROWS = 8;         // of a row of the pattern, and its rows
constexpr int PATTERN_BYTES = SWIZZLED_BYTES * SWIZZLE_ROWS;  // which start at a multiple of themselves

// ------------------------------------------------------------------------------------------------ primitives

#if defined(CNM_EMULATED)

inline uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }
inline void fence_async_proxy() { emulator::fence_async_proxy(); }
inline void fence_group() { emulator::fence_group(); }
inline void commit_group() { emulator::commit_group(); }
template <int PENDING>
void wait_group() {
    emulator::wait_group(PENDING);
}
template <class Numbers>
void settle(Numbers&) {}
template <class T>
auto element_of() {
    return [](uint16_t bits) { return to_float(T{bits}); };
}
template <class T, bool ADD>
void multiply_group(float (&c)[8][4], uint64_t a, uint64_t b) {
    emulator::multiply_group("wgmma.m64n64k16", &c[0][0], 64, nullptr, a, b, false, ADD, element_of<T>());
}
template <class T>
void multiply_group(float (&c)[32][4], const uint32_t (&a)[4], uint64_t b) {
    emulator::multiply_group("wgmma.m64n256k16", &c[0][0], 256, a, 0, b, true, true, element_of<T>());
}

#elif defined(CNM_GROUPS)

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving what these are made of, or used for, across this place.
template <int N>
__device__ __forceinline__ void settle(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
    }
}
__device__ __forceinline__ void settle(uint32_t& number) { asm volatile("" : "+r"(number)); }
template <int N>
__device__ __forceinline__ void settle(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
    }
}

// clang-format off
#define CNM_FOUR(how, c, n) how(c[n][0]), how(c[n][1]), how(c[n][2]), how(c[n][3])
#define CNM_SIXTEEN(how, c, n) CNM_FOUR(how, c, n), CNM_FOUR(how, c, n + 1), CNM_FOUR(how, c, n + 2), CNM_FOUR(how, c, n + 3)
#define CNM_REGISTERS_32                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CNM_REGISTERS_128                                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                    \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// c [64, 64] = a [64, 16] b [64, 16]^T, or += if ADD
template <class T, bool ADD>
__device__ __forceinline__ void multiply_group(float (&c)[8][4], uint64_t a, uint64_t b);
// c [64, 256] += a [64, 16], as a warp's rows lie in registers, b [16, 256]
template <class T>
__device__ __forceinline__ void multiply_group(float (&c)[32][4], const uint32_t (&a)[4], uint64_t b);

#define CNM_GROUP_PRODUCTS(T, NAME)                                                                          \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_group<T, false>(float(&c)[8][4], uint64_t a, uint64_t b) {      \
        asm volatile(                                                                                        \
            "{.reg .pred p; setp.ne.b32 p, 0, 0; "                                                           \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" CNM_REGISTERS_32                \
            "}, %32, %33, p, 1, 1, 0, 0;}"                                                                   \
            : CNM_SIXTEEN("=f", c, 0), CNM_SIXTEEN("=f", c, 4)                                               \
            : "l"(a), "l"(b));                                                                               \
    }                                                                                                        \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_group<T, true>(float(&c)[8][4], uint64_t a, uint64_t b) {       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" CNM_REGISTERS_32       \
                     "}, %32, %33, 1, 1, 1, 0, 0;"                                                           \
                     : CNM_SIXTEEN("+f", c, 0), CNM_SIXTEEN("+f", c, 4)                                      \
                     : "l"(a), "l"(b));                                                                      \
    }                                                                                                        \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_group<T>(float(&c)[32][4], const uint32_t(&a)[4], uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" CNM_REGISTERS_128     \
                     "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"                                        \
                     : CNM_SIXTEEN("+f", c, 0), CNM_SIXTEEN("+f", c, 4), CNM_SIXTEEN("+f", c, 8),            \
                       CNM_SIXTEEN("+f", c, 12), CNM_SIXTEEN("+f", c, 16), CNM_SIXTEEN("+f", c, 20),         \
                       CNM_SIXTEEN("+f", c, 24), CNM_SIXTEEN("+f", c, 28)                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                  \
    }
CNM_GROUP_PRODUCTS(bf16, "bf16")
CNM_GROUP_PRODUCTS(f16, "f16")

#endif

// ------------------------------------------------------------------------------------------------ built from them

#if defined(CNM_GROUPS)

// A matrix in the 128-byte swizzle, `leading` and `stride` bytes from pattern to pattern: the low word of a descriptor.
__device__ __forceinline__ uint32_t descriptor(uint32_t address, int leading) {
    return (address & 0x3FFFF) >> 4 | static_cast<uint32_t>(leading >> 4) << 16;
}
// The whole of it, with the pattern's own bytes as its stride.
__device__ __forceinline__ uint64_t whole(uint32_t low) {
    return low | static_cast<uint64_t>(PATTERN_BYTES >> 4) << 32 | uint64_t{1} << 62;
}

#endif

// A tile of ROWS rows in panels of 64 columns, whose rows are those of the pattern; its address is a multiple of the
// pattern's bytes.
template <int ROWS>
struct Swizzled {
    static constexpr int PANEL_COLUMNS = 64, PANEL_BYTES = ROWS * SWIZZLED_BYTES;

    static constexpr int bytes(int columns) { return columns / PANEL_COLUMNS * PANEL_BYTES; }

#if defined(CNM_GROUPS)
    // Where sixteen bytes of row r lie: those that start at column 8 piece.
    __device__ static int place(int r, int piece) {
        constexpr int PIECES = SWIZZLED_BYTES / 16;
        return piece / PIECES * PANEL_BYTES + r * SWIZZLED_BYTES + (piece % PIECES ^ r % SWIZZLE_ROWS) * 16;
    }

    // Rows from `row` on, a multiple of eight, summed over their first sixteen columns; more of them by `along`.
    __device__ static uint32_t rows(uint32_t tile, int row) {
        return descriptor(tile + static_cast<uint32_t>(row * SWIZZLED_BYTES), 16);
    }
    __device__ static uint32_t along(int column) {
        return static_cast<uint32_t>(column / PANEL_COLUMNS * PANEL_BYTES + column % PANEL_COLUMNS * 2) >> 4;
    }

    // All columns, summed over their first sixteen rows; more of them by `across`.
    __device__ static uint32_t columns(uint32_t tile) { return descriptor(tile, PANEL_BYTES); }
    __device__ static uint32_t across(int row) { return static_cast<uint32_t>(row * SWIZZLED_BYTES) >> 4; }
#endif
};

#if defined(CNM_GROUPS)

// Starts to copy ROWS rows of up to 256 numbers, aligned to sixteen bytes: row r is row index_of(r) of `from`, or zeros
// where that is below 0. Eight warps take part.
template <int ROWS, class T, class IndexOf>
__device__ __forceinline__ void copy_swizzled(char* tile, const T* from, int columns, IndexOf index_of) {
    constexpr int WARPS = 8;  // so that a lane's swizzle is the same in all of its rows
    int index[ROWS / WARPS];
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) index[i] = index_of(warp() + WARPS * i);
    char* const to = tile + Swizzled<ROWS>::place(warp(), lane());
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
        const bool inside = index[i] >= 0 && 8 * lane() < columns;
        copy_async(to + i * PATTERN_BYTES, inside ? from + int64_t{index[i]} * columns + 8 * lane() : nullptr, inside);
    }
}

#endif

}  // namespace cnm::cuda
