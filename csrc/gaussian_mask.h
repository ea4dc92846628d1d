// gaussian_mask: what its kernels are given.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

struct GaussianMaskParams {
    const void* center;  // [rows]
    const void* width;   // [rows]
    void* out;           // [rows, length]
    Dtype dtype;         // of all three
    int64_t rows, length;
    float alpha, min_width;
    bool complement;
    bool normalized;  // by the largest sample
};

struct GaussianMaskBackwardParams {
    const void* d_out;   // [rows, length]
    const void* center;  // [rows]
    const void* width;   // [rows]
    void* d_center;      // [rows]
    void* d_width;       // [rows]
    Dtype dtype;         // of all five
    int64_t rows, length;
    float alpha, min_width;
    bool complement;
    bool normalized;  // by the largest sample
};

CNM_KERNEL(gaussian_mask, GaussianMaskParams)
CNM_KERNEL(gaussian_mask_backward, GaussianMaskBackwardParams)

}  // namespace cnm
