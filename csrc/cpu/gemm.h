// C[M x N] (+)= A[M x K] B[K x N] for the sizes of these ops: everything fits the caches, so there is no blocking beyond
// the registers. A is read one element at a time and broadcast, through any two strides, so transposed operands cost
// nothing; B and C are rows of vectors.
#pragma once

#include "convert.h"
#include "simd.h"

namespace cnm {
namespace CNM_ISA {

template <class Op>
struct Matrix;

constexpr int kTileRows = 6;                       // rows of a register tile
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;    // vectors in each row of it

// What one step of the inner loop multiplies: a float, or a pair of bfloat16 neighbours along K.
struct F32 {
  using Elem = float;
  static constexpr int kPair = 1;
  static constexpr DType kDType = DType::kFloat32;
  static Vec broadcast(const float* p) { return splat(*p); }
  static Vec load(const float* p) { return CNM_ISA::load(p); }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static void convert_row(const void* in, DType dtype, int n, int padded, float* out) {
    load_as(in, dtype, n, out);
    for (int i = n; i < padded; ++i) out[i] = 0;
  }
  static void interleave(const float*, const float*, int, float*) {}
  // A block of float32 rows as the left operand: itself, summed over columns or, with its strides swapped, over rows.
  static Matrix<F32> pack_rows(const float* block, int row, int, int, float*);
  static Matrix<F32> pack_pairs(const float* block, int row, int, int, float*);
};

#if defined(__AVX512BF16__)
struct BF16Pair {
  using Elem = std::uint32_t;
  static constexpr int kPair = 2;
  static constexpr DType kDType = DType::kBFloat16;
  static __m512bh broadcast(const std::uint32_t* p) { return (__m512bh)_mm512_set1_epi32((int)*p); }
  static __m512bh load(const std::uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec fma(__m512bh a, __m512bh b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, a, b); }
  static void convert_row(const void* in, DType, int n, int padded, std::uint32_t* out) {
    std::memcpy(out, in, n * 2);
    std::memset(reinterpret_cast<char*>(out) + n * 2, 0, (padded - n) * 2);
  }
  // out[c] = (low[c], high[c]) for two neighbouring rows; a missing one is zero.
  static void interleave(const std::uint32_t* low, const std::uint32_t* high, int n, std::uint32_t* out) {
    for (int c = 0; c < n; c += kLanes) {
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + c / 2)));
      const __m512i b = high == nullptr ? _mm512_setzero_si512()
                                        : _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + c / 2)));
      _mm512_storeu_si512(out + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
  // float32 block [rows][row] -> bfloat16, neighbours along a row (summed over columns)
  static Matrix<BF16Pair> pack_rows(const float* block, int row, int rows, int columns, std::uint32_t* out);
  // float32 block [rows][row] -> bfloat16, neighbours along a column (summed over rows)
  static Matrix<BF16Pair> pack_pairs(const float* block, int row, int rows, int columns, std::uint32_t* out);
};
#endif

// Rows of elements of Op.
template <class Op>
struct Matrix {
  const typename Op::Elem* data = nullptr;
  std::ptrdiff_t row = 0;
};

inline Matrix<F32> F32::pack_rows(const float* block, int row, int, int, float*) { return {block, row}; }
inline Matrix<F32> F32::pack_pairs(const float* block, int row, int, int, float*) { return {block, row}; }

#if defined(__AVX512BF16__)
inline __m512i widen_bf16(Vec x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

inline Matrix<BF16Pair> BF16Pair::pack_rows(const float* block, int row, int rows, int columns, std::uint32_t* out) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; c += kLanes)
      _mm256_storeu_si256((__m256i*)(out + (r * row + c) / 2), (__m256i)_mm512_cvtneps_pbh((__m512)CNM_ISA::load(block + r * row + c)));
  return {out, row / 2};
}
inline Matrix<BF16Pair> BF16Pair::pack_pairs(const float* block, int row, int rows, int columns, std::uint32_t* out) {
  for (int r = 0; r < rows; r += 2)
    for (int c = 0; c < columns; c += kLanes) {
      const float* p = block + r * row + c;
      const __m512i low = widen_bf16(CNM_ISA::load(p));
      const __m512i high = r + 1 < rows ? widen_bf16(CNM_ISA::load(p + row)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + (r / 2) * row + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  return {out, row};
}
#endif

template <class Op>
struct GemmArgs {
  const typename Op::Elem* a;
  std::ptrdiff_t a_row, a_col;  // strides of A
  const typename Op::Elem* b;
  std::ptrdiff_t b_row;
  float* c;
  std::ptrdiff_t c_row;
  int k;
};

template <class Op, int R, int V, bool Accumulate>
inline __attribute__((always_inline)) void tile(const GemmArgs<Op>& g, const typename Op::Elem* a, const typename Op::Elem* b,
                                                float* c) {
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Accumulate ? load(c + r * g.c_row + v * kLanes) : Vec{};
  for (int k = 0; k < g.k; ++k) {
    decltype(Op::load(b)) bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = Op::load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      auto av = Op::broadcast(a + r * g.a_row);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Op::fma(av, bv[v], acc[r][v]);
    }
    a += g.a_col;
    b += g.b_row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * g.c_row + v * kLanes, acc[r][v]);
}

template <class Op, int V, bool Accumulate>
void rows(const GemmArgs<Op>& g, int m, const typename Op::Elem* b, float* c) {
  int i = 0;
  for (; i + kTileRows <= m; i += kTileRows) tile<Op, kTileRows, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row);
  switch (m - i) {
    case 5: tile<Op, 5, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row); break;
    case 4: tile<Op, 4, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row); break;
    case 3: tile<Op, 3, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row); break;
    case 2: tile<Op, 2, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row); break;
    case 1: tile<Op, 1, V, Accumulate>(g, g.a + i * g.a_row, b, c + i * g.c_row); break;
    default: break;
  }
}

// m rows, n columns of which n is a multiple of kLanes.
template <class Op, bool Accumulate>
inline void gemm(const GemmArgs<Op>& g, int m, int n) {
  int vecs = n / kLanes, j = 0;
  for (; vecs >= kTileVecs; vecs -= kTileVecs, j += kTileVecs * kLanes) rows<Op, kTileVecs, Accumulate>(g, m, g.b + j, g.c + j);
  if (vecs == 3) rows<Op, 3, Accumulate>(g, m, g.b + j, g.c + j);
  if (vecs == 2) rows<Op, 2, Accumulate>(g, m, g.b + j, g.c + j);
  if (vecs == 1) rows<Op, 1, Accumulate>(g, m, g.b + j, g.c + j);
}

}  // namespace CNM_ISA
}  // namespace cnm
