// dropout_add_layer_norm: what its kernels are given.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "types.h"

namespace cnm {

struct DropoutAddLayerNormParams {
    const void* x;         // [rows, D]
    const void* residual;  // [rows, D]
    const float* weight;   // [D]
    const float* bias;     // [D]
    void* out;             // [rows, D]
    float* stats;          // [rows, 2]: mean and 1 / standard deviation, see RowSize
    Dtype dtype;           // of x, residual, out
    int64_t rows, D;
    double p;
    const int64_t* seed;  // [] where the tensors are
    int64_t offset;
    float eps;
    const int64_t* sample_indices;  // [rows / sample_rows]: whose masks a sample has; null: its own
    int64_t sample_rows;
};

struct DropoutAddLayerNormBackwardParams {
    const void* d_out;     // [rows, D]
    const void* d_again;   // [rows, D], the gradient of the result's second user; or null
    const void* x;         // [rows, D]
    const void* residual;  // [rows, D]
    const float* weight;   // [D]
    const float* stats;    // [rows, 2]
    void* d_x;             // [rows, D] or null: not wanted
    void* d_residual;      // [rows, D] or null
    float* partial;        // [layer_norm_chunks(rows, D), 2, D] scratch, or null: d_weight and d_bias are not wanted
    float* d_weight;       // [D] or null
    float* d_bias;         // [D] or null
    Dtype dtype;           // of d_out, d_again, x, residual, d_x, d_residual
    int64_t rows, D;
    double p;
    const int64_t* seed;  // [] where the tensors are
    int64_t offset;
    const int64_t* sample_indices;  // [rows / sample_rows] or null, as in the forward
    int64_t sample_rows;
};

CNM_KERNEL(dropout_add_layer_norm, DropoutAddLayerNormParams)
CNM_KERNEL(dropout_add_layer_norm_backward, DropoutAddLayerNormBackwardParams)

// A row whose sum or squares no float32 holds is computed at another size, a power of two times its own.
//
// For a row that was made smaller, the kernels store mean and -1 / standard deviation at the smaller size.
struct RowSize {
    static constexpr float SMALLER = 0x1p-96f, LARGER = 0x1p96f;

    // Returns the size for a row, given its statistics at its own size.
    static constexpr float wanted(float mean, float variance) {
        if (!(variance <= 0x1.fffffep127f)) return SMALLER;
        return variance < 0x1p-80f && mean < 1.0f && mean > -1.0f ? LARGER : 1.0f;
    }
    static constexpr float of_kept(float inverse) { return inverse < 0.0f ? SMALLER : 1.0f; }

    static constexpr float kept_mean(float mean, float size) { return size == LARGER ? mean * SMALLER : mean; }
    static constexpr float kept_inverse(float inverse, float size) {
        return size == LARGER ? inverse * LARGER : size == SMALLER ? -inverse : inverse;
    }
};

// Rows that one chunk takes, and whose d_weight and d_bias are summed in order.
constexpr int64_t layer_norm_rows(int64_t D) { return D > 16384 ? 1 : 16384 / (D > 0 ? D : 1); }
constexpr int64_t layer_norm_chunks(int64_t rows, int64_t D) {
    return (rows + layer_norm_rows(D) - 1) / layer_norm_rows(D);
}

}  // namespace cnm
