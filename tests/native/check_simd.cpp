// Checks of csrc/cpu/simd.h on one instruction set; prints what is wrong and exits with 1.
#include "simd.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

using namespace cnm;
using namespace cnm::CNM_ISA;

namespace {

int failures = 0;

void expect(bool holds, const char* what, double at) {
    if (holds || ++failures > 20) return;
    std::printf("%s at %.9g\n", what, at);
}

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Error in units of the last place of the exact result, denormals included.
double ulps(float actual, double exact) {
    if (std::fabs(exact) > std::numeric_limits<float>::max()) return std::isinf(actual) ? 0 : 1e9;
    int exponent;
    std::frexp(exact, &exponent);
    return std::fabs(actual - exact) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

void check_exp() {
    double worst = 0;
    for (uint64_t bits = 0; bits < 0x100000000; bits += 997 * W) {
        float x[W], y[W];
        for (int i = 0; i < W; ++i) x[i] = from_bits(static_cast<uint32_t>(bits + 997u * static_cast<unsigned>(i)));
        store(y, exp(load(x)));
        for (int i = 0; i < W; ++i) {
            if (std::isnan(x[i])) {
                expect(std::isnan(y[i]), "exp(NaN) is a number", x[i]);
            } else {
                const double error = ulps(y[i], std::exp(static_cast<double>(x[i])));
                worst = std::fmax(worst, error);
                expect(error <= 1.5, "exp is off by more than 1.5 ulp", x[i]);
            }
        }
    }
    const float infinity = std::numeric_limits<float>::infinity();
    expect(hmax(exp(set1(-infinity))) == 0, "exp(-inf) is not 0", -infinity);
    expect(hmax(exp(set1(infinity))) == infinity, "exp(inf) is not inf", infinity);
    expect(hmax(exp(set1(0))) == 1, "exp(0) is not 1", 0);
    std::printf("exp: at most %.3f ulp\n", worst);
}

template <class T>
void check_conversion(const char* name, bool flushes_denormals) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // there and back
        const T original{static_cast<uint16_t>(bits)};
        const float x = to_float(original);
        T again;
        from_float(&again, x);
        const bool same = again.bits == original.bits || (std::isnan(x) && std::isnan(to_float(again))) ||
                          (flushes_denormals && std::fabs(x) < 0x1p-126f);
        expect(same, name, x);
    }
    for (uint64_t wide = 0; wide < 0x7F800000; wide += 9973) {  // to the nearest, ties to even
        const float x = from_bits(static_cast<uint32_t>(wide));
        if (flushes_denormals && x < 0x1p-126f) continue;
        T rounded;
        from_float(&rounded, x);
        const T above{static_cast<uint16_t>(rounded.bits + 1)}, below{static_cast<uint16_t>(rounded.bits - 1)};
        const auto distance = [&](T y) {
            // Beyond the largest number the next power of two stands for infinity.
            const double value = to_float(y);
            const double reach = std::is_same_v<T, f16> ? 65536.0 : 0x1p128;
            return std::fabs((std::isinf(value) ? reach : value) - x);
        };
        const double own = distance(rounded);
        const bool infinite = std::isinf(to_float(rounded));
        const auto nearer_than = [&](T y) {
            return own < distance(y) || (own == distance(y) && rounded.bits % 2 == 0);
        };
        expect((infinite || nearer_than(above)) && (rounded.bits == 0 || nearer_than(below)), name, x);
    }
}

template <class T>
void check_tails(const char* name) {
    for (int n = 0; n <= W; ++n) {
        T in[W + 2], out[W + 2];
        for (int i = 0; i < W + 2; ++i) {
            from_float(in + i, i < n ? static_cast<float>(i + 1) : std::nanf(""));
            from_float(out + i, -7);
        }
        float lanes[W];
        store(lanes, load_n(in, n));
        for (int i = 0; i < W; ++i) expect(lanes[i] == (i < n ? static_cast<float>(i + 1) : 0), name, n);
        store_n(out, load(lanes), n);
        for (int i = 0; i < W + 2; ++i) expect(to_float(out[i]) == (i < n ? static_cast<float>(i + 1) : -7), name, n);
    }
}

void check_lanes() {
    float lanes[W], out[W];
    for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(1 << i);
    expect(hsum(load(lanes)) == static_cast<float>((1 << W) - 1), "hsum", 0);
    expect(hmax(load(lanes)) == static_cast<float>(1 << (W - 1)), "hmax", 0);
    for (uint32_t bits = 0; bits < (1u << W); ++bits) {
        store(out, select(mask_bits(bits), set1(1), set1(2)));
        for (int i = 0; i < W; ++i) expect(out[i] == ((bits >> i & 1) != 0 ? 1 : 2), "mask_bits and select", bits);
    }
    Vec rows[W];
    for (int i = 0; i < W; ++i) {
        for (int j = 0; j < W; ++j) lanes[j] = static_cast<float>(i * W + j);
        rows[i] = load(lanes);
    }
    transpose(rows);
    for (int i = 0; i < W; ++i) {
        store(out, rows[i]);
        for (int j = 0; j < W; ++j) expect(out[j] == static_cast<float>(j * W + i), "transpose", i);
    }
    const float nan = std::nanf("");
    expect(std::isnan(hsum(vmax(set1(0), set1(nan)))), "vmax drops a NaN on its right", 0);
    expect(hmax(vmax(set1(nan), set1(0))) == 0, "vmax keeps a NaN on its left", 0);
    expect(std::isnan(hsum(vmin(set1(0), set1(nan)))), "vmin drops a NaN on its right", 0);
}

}  // namespace

int main() {
#if defined(__AVX512BF16__)
    constexpr bool flushes = true;
#else
    constexpr bool flushes = false;
#endif
    check_exp();
    check_conversion<bf16>("bf16 conversion", flushes);
    check_conversion<f16>("f16 conversion", false);
    check_tails<float>("float tail");
    check_tails<bf16>("bf16 tail");
    check_tails<f16>("f16 tail");
    check_lanes();
    return failures == 0 ? 0 : 1;
}
