// dropout: what its kernel is given.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

struct DropoutParams {
    const void* x;  // [numel]
    void* out;      // [numel]
    Dtype dtype;    // of both
    int64_t numel;
    double p;
    const int64_t* seed;  // [] where the tensors are
    int64_t offset;
};

CNM_KERNEL(dropout, DropoutParams)

}  // namespace cnm
