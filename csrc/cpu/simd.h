// Vectors of W float32 lanes: one interface over the instruction sets of isa.h.
//
//   Vec                               W lanes; + - * / and unary -
//   load, load_n(p, n)                from float, bf16, f16, unaligned; n in [0, W], lanes beyond are 0
//   store, store_n(p, v, n)           to the same, rounded to nearest even
//   stream(p, v)                      store past the caches where p is aligned; needs stream_fence() at the end
//   fma(a, b, c), fnma(a, b, c)       a b + c, c - a b
//   vmax, vmin(a, b)                  b where either is NaN
//   Mask, first_n(n), mask_bits(bits) lanes below n; lane i where bit i is set
//   less, at_most(a, b)               a < b, a <= b; not where either is NaN
//   select(mask, a, b)                a where the mask holds, else b
//   hsum, hmax                        over the lanes, in one fixed order
//   exp(v)                            within 1 ulp everywhere: 0, denormals and infinity included; NaN stays
//   transpose(rows)                   of a W x W block in registers
//   Output<T>                         store or stream, by the size of the result
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace cnm::CNM_ISA {

inline Vec operator-(Vec a) { return set1(-0.0f) ^ a; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2 in two parts, exp(r) by its minimax polynomial on
// [-ln 2 / 2, ln 2 / 2]. The clamp keeps n small and lets NaN through: its ends give infinity and 0.
inline Vec exp(Vec x) {
    x = vmin(set1(89.0f), vmax(set1(-104.5f), x));
    const Vec n = round(x * set1(1.44269504088896341f));
    const Vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return scale_by_power(p, n);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float to_float(f16 x) {
    float lanes[W];
    store(lanes, load_n(&x, 1));
    return lanes[0];
}
template <class T>
inline void from_float(T* p, float x) {
    store_n(p, set1(x), 1);
}

// Full or partial, for the tail of a row.
template <class T>
inline Vec load_tail(const T* p, int64_t n) {
    return n >= W ? load(p) : load_n(p, static_cast<int>(n));
}
template <class T>
inline void store_tail(T* p, Vec v, int64_t n) {
    if (n >= W) {
        store(p, v);
    } else {
        store_n(p, v, static_cast<int>(n));
    }
}

// Lanes from n on as 0, where they would count in a sum.
inline Vec within(Vec v, int64_t n) { return n >= W ? v : select(first_n(static_cast<int>(n)), v, set1(0)); }

// Writes a result of `count` elements: around the caches where it would not stay in them anyway, which spares reading
// every line before it is overwritten.
template <class T>
class Output {
  public:
    explicit Output(int64_t count) : streams_(count * static_cast<int64_t>(sizeof(T)) >= STREAM_BYTES) {}

    void operator()(T* p, Vec v, int64_t n) const {
        if (streams_ && n >= W) {
            stream(p, v);
        } else {
            store_tail(p, v, n);
        }
    }
    bool streams() const { return streams_; }
    // Once per thread's share, before others read it.
    void finish() const {
        if (streams_) stream_fence();
    }

  private:
    static constexpr int64_t STREAM_BYTES = 8 << 20;
    bool streams_;
};

}  // namespace cnm::CNM_ISA
