// What every CPU kernel is called with. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cnm {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

inline std::ptrdiff_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Runs body(begin, end) over disjoint ranges that cover [0, n), on several threads.
using ParallelBody = std::function<void(std::int64_t, std::int64_t)>;
using ParallelFor = void (*)(std::int64_t n, const ParallelBody& body);

}  // namespace cnm
