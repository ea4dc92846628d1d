// dropout: what its kernel is given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace cnm {

struct DropoutParams {
    const void* x;  // [numel]
    void* out;      // [numel]
    Dtype dtype;    // of both
    int64_t numel;
    double p;
    int64_t seed, offset;
};

CNM_KERNEL(dropout, DropoutParams)

}  // namespace cnm
