// Dropout by itself: out = x * factor, the factor drawn from Philox in registers. Its backward is the same kernel on the
// gradient. Blocks of elements are independent; which are kept depends on (seed, offset, element) alone.

#include "dropout.h"

#include "convert.h"
#include "philox.h"

namespace cnm {
namespace CNM_ISA {

void dropout(const ElementwiseDropoutParams& p, ParallelFor parallel_for) {
  constexpr std::int64_t kBlock = 2048;  // elements: 8 KiB of float32
  const Dropout dropout{{p.dropout.seed, p.dropout.offset}, std::uint32_t(p.dropout.threshold), p.dropout.scale};
  const std::ptrdiff_t size = element_size(p.dtype);
  parallel_for((p.count + kBlock - 1) / kBlock, [&](std::int64_t begin, std::int64_t end) {
    alignas(64) float x[kBlock], factor[kBlock + 2 * kDraws];
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * kBlock;
      const int n = int(p.count - first < kBlock ? p.count - first : kBlock);
      load_as(static_cast<const char*>(p.x) + first * size, p.dtype, n, x);
      const float* keep = dropout.factors(std::uint64_t(first), n, factor);
      for (int i = 0; i < n; ++i) x[i] = keep[i] == 0 ? 0.f : x[i] * keep[i];
      store_as(static_cast<char*>(p.out) + first * size, p.dtype, x, n, 1.f);
    }
  });
}

}  // namespace CNM_ISA
}  // namespace cnm
