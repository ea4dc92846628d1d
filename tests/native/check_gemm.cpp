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

float random_value() {  // in [-1, 1], exact in bf16
    state = state * 1664525 + 1013904223;
    return static_cast<float>(static_cast<int>(state >> 24) - 128) / 128;
}

// A buffer whose every element a test does not set is NaN, so that using one shows.
template <class T>
std::vector<T> poisoned(int64_t size) {
    std::vector<T> buffer(static_cast<size_t>(size));
    if constexpr (std::is_same_v<T, bf16x2>) {
        for (auto& x : buffer) x.bits = 0x7FC07FC0;
    } else {
        for (auto& x : buffer) from_float(&x, std::nanf(""));
    }
    return buffer;
}

// C = A B or C + A B with A and B given as source type S (T, or float for what a kernel computed) and packed for T.
template <class T, class S>
void check(int64_t M, int64_t N, int64_t K, bool a_transposed, bool b_transposed, bool accumulate) {
    using E = Operand<T>;
    const int64_t gap = 3, KE = packed_k<T>(K);
    const int64_t lda = (a_transposed ? M : K) + gap, ldb = (b_transposed ? K : N) + gap, ldc = N + gap;
    auto a = poisoned<S>((a_transposed ? K : M) * lda), b = poisoned<S>((b_transposed ? N : K) * ldb);
    const auto a_at = [&](int64_t i, int64_t k) -> S& { return a[a_transposed ? k * lda + i : i * lda + k]; };
    const auto b_at = [&](int64_t k, int64_t j) -> S& { return b[b_transposed ? j * ldb + k : k * ldb + j]; };
    for (int64_t i = 0; i < M; ++i) {
        for (int64_t k = 0; k < K; ++k) from_float(&a_at(i, k), random_value());
    }
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t j = 0; j < N; ++j) from_float(&b_at(k, j), random_value());
    }
    const int64_t ldpa = (a_transposed ? M : KE) + gap, ldpb = N + gap;
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
            for (int64_t k = 0; k < K; ++k) exact += static_cast<double>(to_float(a_at(i, k))) * to_float(b_at(k, j));
            const double error = std::fabs(actual - exact);
            worst = std::isnan(error) ? 1e9 : std::max(worst, error);
        }
    }
    // Products of such values and sums of up to 2^9 of them are exact in float32: any error is a defect.
    if (worst > 0 && ++failures <= 20) {
        std::printf("%dx%dx%d A^T %d B^T %d accumulate %d element %d bytes: error %g\n", static_cast<int>(M),
                    static_cast<int>(N), static_cast<int>(K), a_transposed, b_transposed, accumulate,
                    static_cast<int>(sizeof(S)), worst);
    }
}

}  // namespace

int main() {
    const int64_t sizes[][3] = {{1, 1, 1},    {1, 5, 7},    {5, 1, 3},   {7, 50, 64}, {50, 50, 64},  {20, 50, 33},
                                {33, 17, 48}, {13, 64, 50}, {50, 65, 2}, {3, 200, 5}, {37, 31, 600}, {4, 4, 0}};
    for (const auto& [M, N, K] : sizes) {
        for (int mode = 0; mode < 8; ++mode) {
            check<float, float>(M, N, K, mode & 1, mode & 2, mode & 4);
            check<bf16, bf16>(M, N, K, mode & 1, mode & 2, mode & 4);
            check<bf16, float>(M, N, K, mode & 1, mode & 2, mode & 4);
            check<f16, f16>(M, N, K, mode & 1, mode & 2, mode & 4);
        }
    }
    return failures == 0 ? 0 : 1;
}
