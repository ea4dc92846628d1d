// Element types as they lie in memory; simd.h turns them into float32 vectors and back.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cnm {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

enum class Dtype : int { float32, bfloat16, float16 };

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Calls body with a null pointer of the element type: with_type(dtype, [&](auto* type) { ... }).
template <class Body>
inline void with_type(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::float32: return body(static_cast<float*>(nullptr));
        case Dtype::bfloat16: return body(static_cast<bf16*>(nullptr));
        case Dtype::float16: return body(static_cast<f16*>(nullptr));
    }
}

}  // namespace cnm
