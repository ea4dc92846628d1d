// simd.h in plain C++ with the compiler's own 128-bit vectors: SSE2 on x86, NEON on ARM, whatever there is elsewhere.
#pragma once

#include <cmath>

namespace cnm::CNM_ISA {

constexpr int W = 4;
constexpr int VECTOR_REGISTERS = 16;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

struct Vec {
    Floats v;
};
struct Mask {
    Ints v;
};

inline Vec set1(float x) { return {Floats{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec operator^(Vec a, Vec b) { return {(Floats)((Ints)a.v ^ (Ints)b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec select(Mask mask, Vec a, Vec b) { return {(Floats)(((Ints)a.v & mask.v) | ((Ints)b.v & ~mask.v))}; }
inline Mask less(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask at_most(Vec a, Vec b) { return {a.v <= b.v}; }
inline Vec vmax(Vec a, Vec b) { return select({a.v > b.v}, a, b); }
inline Vec vmin(Vec a, Vec b) { return select({a.v < b.v}, a, b); }

// Adding 1.5 2^23 leaves no room for a fraction; right for |a| < 2^22, which is all exp needs.
inline Vec round(Vec a) {
    const Vec magic = set1(12582912.0f);
    volatile Floats shifted = a.v + magic.v;  // volatile: or the two cancel
    return {shifted - magic.v};
}

// Multiplies by two factors, so that denormals and the top binade come out right.
inline Vec scale_by_power(Vec a, Vec n) {
    const auto power = [](Ints exponent) { return (Floats)((exponent + 127) << 23); };
    const Ints whole = __builtin_convertvector(select({n.v == n.v}, n, set1(0)).v, Ints);
    const Ints half = whole >> 1;
    return {a.v * power(half) * power(whole - half)};
}

inline Mask first_n(int n) { return {Ints{0, 1, 2, 3} < Ints{n, n, n, n}}; }
inline Mask mask_bits(uint32_t bits) {
    const int32_t all = static_cast<int32_t>(bits);
    return {(Ints{all, all, all, all} & Ints{1, 2, 4, 8}) != 0};
}

inline float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float widen(f16 x) {
    // Exponent and fraction moved into place are 2^112 too small, for denormals too; infinity and NaN need theirs set.
    uint32_t bits = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude *= 0x1p112f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    if (magnitude >= 65536.0f) bits |= 0x7F800000;
    bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}
inline void narrow(float x, bf16* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t half;
    if (bits > 0x7F800000) {
        half = 0x7E00;
    } else if (bits >= 0x477FF000) {  // rounds to 65536 or more
        half = 0x7C00;
    } else if (bits >= 0x38800000) {  // a normal half
        half = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    } else {  // a denormal half: let float addition round at 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        std::memcpy(&half, &magnitude, sizeof half);
        half -= 0x3F000000;
    }
    p->bits = static_cast<uint16_t>(sign | half);
}
inline float widen(float x) { return x; }
inline void narrow(float x, float* p) { *p = x; }

template <class T>
inline Vec load_n(const T* p, int n) {
    Vec a = set1(0);
    for (int i = 0; i < n; ++i) a.v[i] = widen(p[i]);
    return a;
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
    for (int i = 0; i < n; ++i) narrow(a.v[i], p + i);
}
template <class T>
inline Vec load(const T* p) {
    return load_n(p, W);
}
template <class T>
inline void store(T* p, Vec a) {
    store_n(p, a, W);
}
inline Vec load(const float* p) {
    Vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
template <class T>
inline void stream(T* p, Vec a) {
    store(p, a);
}
inline void stream_fence() {}

inline float hsum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float hmax(Vec a) {
    const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return even > odd ? even : odd;
}

inline void transpose(Vec (&rows)[W]) {
    for (int i = 0; i < W; ++i) {
        for (int j = 0; j < i; ++j) {
            const float swapped = rows[i].v[j];
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = swapped;
        }
    }
}

}  // namespace cnm::CNM_ISA
