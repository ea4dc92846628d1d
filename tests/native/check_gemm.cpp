// Checks of csrc/cpu/gemm.h on one instruction set: every packing, odd sizes, nothing read into a result or written
// that is not the operands' own. Prints what is wrong and exits with 1.
#include "gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <vector>

using namespace cnm;
using namespace cnm::CNM_ISA;

namespace {

int failures = 0;
uint32_t state = 1;

float random_value(bool long_one) {  // in [-1, 1], exact in bf16, or in twice as many bits
    state = state * 1664525 + 1013904223;
    const float value = static_cast<float>(static_cast<int>(state >> 24) - 128) / 128;
    return long_one ? value + static_cast<float>(state >> 8 & 0xFFFF) / (1 << 24) : value;
}

// The numbers that an operand's element stands for: of pairs of split ones hi and lo, whose lo lo is left out.
template <class E>
double product(float a, float b) {
    if (!std::is_same_v<E, split2>) return static_cast<double>(a) * b;
    const auto nearest = [](double x) {
        bf16 rounded;
        from_float(&rounded, static_cast<float>(x));
        return static_cast<double>(to_float(rounded));
    };
    const double a_high = nearest(a), b_high = nearest(b), a_low = nearest(a - a_high), b_low = nearest(b - b_high);
    return a_high * b_high + a_high * b_low + a_low * b_high;
}

// A buffer whose every element a test does not set is NaN, so that using one shows.
template <class T>
std::vector<T> poisoned(int64_t size) {
    std::vector<T> buffer(static_cast<size_t>(size));
    if constexpr (std::is_same_v<T, bf16x2> || std::is_same_v<T, split2>) {
        for (auto& x : buffer) x.bits = 0x7FC07FC0;
    } else {
        for (auto& x : buffer) from_float(&x, std::nanf(""));
    }
    return buffer;
}

// C = A B or C + A B with A and B given as source type S and packed as E.
template <class E, class S>
void check_packed(int64_t M, int64_t N, int64_t K, bool a_transposed, bool b_transposed, bool accumulate) {
    const bool split = std::is_same_v<E, split2>;
    const int64_t gap = 3, KE = elements_of<E>(K);
    const int64_t lda = (a_transposed ? M : K) + gap, ldb = (b_transposed ? K : N) + gap, ldc = N + gap;
    auto a = poisoned<S>((a_transposed ? K : M) * lda), b = poisoned<S>((b_transposed ? N : K) * ldb);
    const auto a_at = [&](int64_t i, int64_t k) -> S& { return a[a_transposed ? k * lda + i : i * lda + k]; };
    const auto b_at = [&](int64_t k, int64_t j) -> S& { return b[b_transposed ? j * ldb + k : k * ldb + j]; };
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t k = 0; k < K; ++k) from_float(&a_at(i, k), random_value(split));
    }
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t j = 0; j < N; ++j) from_float(&b_at(k, j), random_value(split));
    }
    const int64_t ldpa = row_of<E>((a_transposed ? M : KE) + gap), ldpb = row_of<E>(N + gap);
    auto packed_a = poisoned<E>((a_transposed ? KE : M) * ldpa), packed_b = poisoned<E>(KE * ldpb);
    if (a_transposed) {
        pack_rows(K, M, a.data(), lda, packed_a.data(), ldpa);
    } else {
        pack_a(M, K, a.data(), lda, packed_a.data(), ldpa);
    }
    if (b_transposed) {
        pack_transposed(K, N, b.data(), ldb, packed_b.data(), ldpb);
    } else {
        pack_rows(K, N, b.data(), ldb, packed_b.data(), ldpb);
    }
    auto c = poisoned<float>(M * ldc);
    for (int64_t i = 0; accumulate && i < M; ++i) std::fill_n(&c[i * ldc], N, 2.0f);
    gemm(M, N, KE, packed_a.data(), a_transposed ? 1 : ldpa, a_transposed ? ldpa : 1, packed_b.data(), ldpb, c.data(),
         ldc, accumulate);
    double worst = 0;
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < ldc; ++j) {
            const float actual = c[i * ldc + j];
            if (j >= N) {
                worst = std::isnan(actual) ? worst : 1e9;
                continue;
            }
            double exact = accumulate ? 2 : 0;
            for (int64_t k = 0; k < K; ++k) exact += product<E>(to_float(a_at(i, k)), to_float(b_at(k, j)));
            const double error = std::fabs(actual - exact);
            worst = std::isnan(error) ? 1e9 : std::max(worst, error);
        }
    }
    // Products of bf16 values and sums of up to 2^9 of them are exact in float32: any error is a defect. Of split ones
    // the sums round, by far less than any product of one element that is left out.
    if (worst > (split ? 1e-6 * static_cast<double>(K + 1) : 0) && ++failures <= 20) {
        std::printf("%dx%dx%d A^T %d B^T %d accumulate %d element %d bytes: error %g\n", static_cast<int>(M),
                    static_cast<int>(N), static_cast<int>(K), a_transposed, b_transposed, accumulate,
                    static_cast<int>(sizeof(S)), worst);
    }
}

template <class T, class S>
void check(int64_t M, int64_t N, int64_t K, int mode) {
    check_packed<Operand<T>, S>(M, N, K, mode & 1, mode & 2, mode & 4);
}

}  // namespace

int main() {
    const int64_t sizes[][3] = {{1, 1, 1},    {1, 5, 7},    {5, 1, 3},   {7, 50, 64}, {50, 50, 64},  {20, 50, 33},
                                {33, 17, 48}, {13, 64, 50}, {50, 65, 2}, {3, 200, 5}, {37, 31, 600}, {4, 4, 0}};
    for (const auto& [M, N, K] : sizes) {
        for (int mode = 0; mode < 8; ++mode) {
            check<float, float>(M, N, K, mode);
            check<bf16, bf16>(M, N, K, mode);
            check<bf16, float>(M, N, K, mode);  // what a kernel computed
            check<f16, f16>(M, N, K, mode);
            if constexpr (HAS_BF16X2) check_packed<split2, float>(M, N, K, mode & 1, mode & 2, mode & 4);
        }
    }
    return failures == 0 ? 0 : 1;
}
