// dropout_add_layer_norm on GPUs: a warp takes a row at a time, its lanes groups of eight columns, one Philox draw
// each.
//
// The gradients of weight and bias are summed per chunk of rows, and the chunks' sums in order by a second kernel.
#include "dropout_add_layer_norm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "philox.cuh"

namespace cnm {
namespace cuda {
namespace {

constexpr int WARPS = 4;

// size (residual + dropout(x)) of one row. A lane's k-th group is computed once and kept, if k < HELD; else whenever
// asked for.
template <class T, int HELD>
struct Total {
    const T *x, *residual;
    int64_t first;  // element of the row, as dropout counts
    int D;
    uint64_t seed;
    const Dropout& dropout;
    bool aligned;
    float size;
    float held[HELD > 0 ? HELD : 1][GROUP];
    uint32_t kept[HELD > 0 ? HELD : 1];

    __device__ Total(const void* x, const void* residual, int64_t row, int64_t drawn, int64_t D, uint64_t seed,
                     const Dropout& dropout, bool aligned, float size)
        : x(static_cast<const T*>(x) + row * D),
          residual(static_cast<const T*>(residual) + row * D),
          first(drawn * D),
          D(static_cast<int>(D)),
          seed(seed),
          dropout(dropout),
          aligned(aligned),
          size(size) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            if (column(k) < this->D) compute(k, held[k], kept[k]);
        }
    }

    __device__ static int column(int k) { return (k * WARP + lane()) * GROUP; }

    __device__ void compute(int k, float (&total)[GROUP], uint32_t& keep) const {
        float values[GROUP];
        load_group(x, column(k), D, aligned, values);
        load_group(residual, column(k), D, aligned, total);
        const uint64_t element = static_cast<uint64_t>(first + column(k));
        if (element % GROUP == 0) {
            keep = keep_bits(dropout, seed, element / GROUP);
        } else {  // the row begins within a group
            const int shift = static_cast<int>(element % GROUP);
            const uint32_t low = keep_bits(dropout, seed, element / GROUP);
            keep = (low | keep_bits(dropout, seed, element / GROUP + 1) << GROUP) >> shift & 0xFF;
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            total[i] *= size;  // 1 changes nothing
            const float scale = dropout.threshold == 0 ? size : dropout.scale * size;
            if (keep >> i & 1) total[i] += values[i] * scale;
        }
    }

    __device__ uint32_t get(int k, float (&total)[GROUP]) const {
        uint32_t keep = 0;
        if constexpr (HELD > 0) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) total[i] = held[k][i];
            keep = kept[k];
        } else {
            compute(k, total, keep);
        }
        return keep;
    }
};

// Calls body(k, column) for the groups of this lane.
template <int HELD, class Body>
__device__ __forceinline__ void for_groups(int D, Body body) {
    if constexpr (HELD > 0) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int column = (k * WARP + lane()) * GROUP;
            if (column < D) body(k, column);
        }
    } else {
        for (int k = 0, column = lane() * GROUP; column < D; ++k, column += WARP * GROUP) body(k, column);
    }
}

// The row whose mask this row has.
template <class Params>
__device__ __forceinline__ int64_t drawn_row(const Params& p, int64_t row) {
    if (p.sample_indices == nullptr) return row;
    const uint32_t sample =
        static_cast<uint32_t>(row) / static_cast<uint32_t>(p.sample_rows);  // the launch checks rows
    return row + (load(p.sample_indices + sample) - sample) * p.sample_rows;
}

template <class T, int HELD>
__global__ void __launch_bounds__(WARPS* WARP, HELD == 4 ? 5 : 7)  // at one block more, registers spill
    dropout_add_layer_norm_kernel(DropoutAddLayerNormParams p, Dropout dropout, bool aligned) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp();
    if (row >= p.rows) return;
    const int D = static_cast<int>(p.D);
    const uint64_t seed = dropout.threshold == 0 ? 0 : static_cast<uint64_t>(load(p.seed));
    float size = 1.0f;
    for (;;) {
        const Total<T, HELD> total(p.x, p.residual, row, drawn_row(p, row), p.D, seed, dropout, aligned, size);
        float sum = 0, squares = 0;
        for_groups<HELD>(D, [&](int k, int column) {
            float y[GROUP];
            total.get(k, y);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) y[i] = column + i < D ? y[i] : 0.0f;
            sum += ((y[0] + y[1]) + (y[2] + y[3])) + ((y[4] + y[5]) + (y[6] + y[7]));  // of equal numbers: exact
        });
        const float mean = sum_over_lanes(sum) / static_cast<float>(D);
        for_groups<HELD>(D, [&](int k, int column) {
            float y[GROUP];
            total.get(k, y);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) squares += column + i < D ? (y[i] - mean) * (y[i] - mean) : 0.0f;
        });
        squares = sum_over_lanes(squares) / static_cast<float>(D);
        const float variance = squares + p.eps * size * size, wanted = RowSize::wanted(mean, variance);
        if (size == 1.0f && wanted != 1.0f) {
            size = wanted;
            continue;
        }
        const float inverse = 1.0f / (squares == 0.0f ? sqrtf(p.eps) * size : sqrtf(variance));
        T* const out = static_cast<T*>(p.out) + row * p.D;
        for_groups<HELD>(D, [&](int k, int column) {
            float y[GROUP], weight[GROUP], bias[GROUP];
            total.get(k, y);
            load_group(p.weight, column, D, aligned, weight);
            load_group(p.bias, column, D, aligned, bias);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) y[i] = (y[i] - mean) * inverse * weight[i] + bias[i];
            store_group(out, column, D, aligned, y);
        });
        if (lane() == 0) {
            store(p.stats + 2 * row, RowSize::kept_mean(mean, size));
            store(p.stats + 2 * row + 1, RowSize::kept_inverse(inverse, size));
        }
        return;
    }
}

// With n = (y - mean) / deviation and g = dout w: dy = (g - mean(g) - n mean(g n)) / deviation, dx = dropout'(dy).
template <class T, int HELD>
__global__ void __launch_bounds__(WARPS* WARP)
    dropout_add_layer_norm_backward_kernel(DropoutAddLayerNormBackwardParams p, Dropout dropout, bool aligned) {
    const int D = static_cast<int>(p.D), warps = threads() / WARP;
    const uint64_t seed = dropout.threshold == 0 ? 0 : static_cast<uint64_t>(load(p.seed));
    float* const sums = dynamic_shared<float>() + static_cast<int64_t>(warp()) * 2 * D;  // of this warp, [2, D]
    float d_weight[HELD > 0 ? HELD : 1][GROUP] = {}, d_bias[HELD > 0 ? HELD : 1][GROUP] = {};
    if (HELD == 0 && p.partial != nullptr) {
        for_groups<HELD>(D, [&](int, int column) {
            for (int i = 0; i < GROUP && column + i < D; ++i) sums[column + i] = sums[D + column + i] = 0.0f;
        });
    }
    const int64_t per_chunk = layer_norm_rows(p.D), begin = static_cast<int64_t>(blockIdx.x) * per_chunk;
    for (int64_t row = begin + warp(); row < begin + per_chunk && row < p.rows; row += warps) {
        const float mean = load(p.stats + 2 * row), signed_inverse = load(p.stats + 2 * row + 1);
        const float size = RowSize::of_kept(signed_inverse), inverse = fabsf(signed_inverse);
        const Total<T, HELD> total(p.x, p.residual, row, drawn_row(p, row), p.D, seed, dropout, aligned, size);
        const T* const upstream = static_cast<const T*>(p.d_out) + row * p.D;
        const T* const again = static_cast<const T*>(p.d_again) + row * p.D;
        float g_sum = 0, along = 0;
        const auto group = [&](int k, int column, float(&n)[GROUP], float(&d_out)[GROUP], float(&weight)[GROUP]) {
            const uint32_t keep = total.get(k, n);
            load_group(upstream, column, D, aligned, d_out);
            if (p.d_again != nullptr) {
                load_group(again, column, D, aligned, weight);
#pragma unroll
                for (int i = 0; i < GROUP; ++i) d_out[i] += weight[i];
            }
            load_group(p.weight, column, D, aligned, weight);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) n[i] = column + i < D ? (n[i] - mean) * inverse : 0.0f;
            return keep;
        };
        for_groups<HELD>(D, [&](int k, int column) {
            float n[GROUP], d_out[GROUP], weight[GROUP];
            group(k, column, n, d_out, weight);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                g_sum += d_out[i] * weight[i];
                along += d_out[i] * weight[i] * n[i];
                if constexpr (HELD > 0) {
                    d_weight[k][i] += d_out[i] * n[i];
                    d_bias[k][i] += d_out[i];
                } else if (p.partial != nullptr && column + i < D) {
                    sums[column + i] += d_out[i] * n[i];
                    sums[D + column + i] += d_out[i];
                }
            }
        });
        if (p.d_x == nullptr && p.d_residual == nullptr) continue;
        const float g_mean = sum_over_lanes(g_sum) / static_cast<float>(D);
        along = sum_over_lanes(along) / static_cast<float>(D);
        for_groups<HELD>(D, [&](int k, int column) {
            float n[GROUP], d_out[GROUP], weight[GROUP];
            const uint32_t keep = group(k, column, n, d_out, weight);
            float d_total[GROUP], d_x[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                d_total[i] = (d_out[i] * weight[i] - g_mean - n[i] * along) * inverse * size;
                d_x[i] = keep >> i & 1 ? (dropout.threshold == 0 ? d_total[i] : d_total[i] * dropout.scale) : 0.0f;
            }
            if (p.d_residual) store_group(static_cast<T*>(p.d_residual) + row * p.D, column, D, aligned, d_total);
            if (p.d_x) store_group(static_cast<T*>(p.d_x) + row * p.D, column, D, aligned, d_x);
        });
    }
    if (p.partial == nullptr) return;
    if constexpr (HELD > 0) {
        for_groups<HELD>(D, [&](int k, int column) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                if (column + i >= D) continue;
                sums[column + i] = d_weight[k][i];
                sums[D + column + i] = d_bias[k][i];
            }
        });
    }
    sync_block();
    for (int i = thread(); i < 2 * D; i += threads()) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += dynamic_shared<float>()[static_cast<int64_t>(w) * 2 * D + i];
        store(p.partial + static_cast<int64_t>(blockIdx.x) * 2 * D + i, sum);
    }
}

// d_weight and d_bias from the chunks' sums: a warp adds up one column, its lanes every 32nd chunk.
__global__ void __launch_bounds__(WARPS* WARP)
    layer_norm_parameters_kernel(const float* partial, int64_t chunks, int64_t D, float* d_weight, float* d_bias) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + warp();
    if (i >= 2 * D) return;
    float sum = 0;
    for (int64_t chunk = lane(); chunk < chunks; chunk += WARP) sum += load(partial + chunk * 2 * D + i);
    sum = sum_over_lanes(sum);
    if (lane() == 0) store(i < D ? d_weight + i : d_bias + (i - D), sum);
}

// Calls body(T, HELD) with how many groups of a row a lane keeps.
template <class Body>
void dispatch(Dtype dtype, int64_t D, Body body) {
    with_type(dtype, [&](auto* type) {
        if (D <= WARP * GROUP) return body(type, std::integral_constant<int, 1>());
        if (D <= 2 * WARP * GROUP) return body(type, std::integral_constant<int, 2>());
        if (D <= 4 * WARP * GROUP) return body(type, std::integral_constant<int, 4>());
        return body(type, std::integral_constant<int, 0>());
    });
}

bool all_aligned(int64_t D, std::initializer_list<const void*> pointers) {
    return D % GROUP == 0 && std::all_of(pointers.begin(), pointers.end(), aligned_to_vec16b);
}

}  // namespace
}  // namespace cuda

namespace {

// A 64-bit division would take the registers that keep a row.
void check_rows(int64_t rows, const int64_t* sample_indices) {
    if (sample_indices != nullptr && rows > UINT32_MAX) {
        throw std::runtime_error("cnm_kernels: sample_indices take up to 2^32 rows, got " + std::to_string(rows));
    }
}

}  // namespace

void dropout_add_layer_norm(const DropoutAddLayerNormParams& p) {
    if (p.rows == 0) return;
    check_rows(p.rows, p.sample_indices);
    const bool aligned = cuda::all_aligned(p.D, {p.x, p.residual, p.weight, p.bias, p.out});
    cuda::dispatch(p.dtype, p.D, [&](auto* type, auto held) {
        using T = std::remove_pointer_t<decltype(type)>;
        cuda::launch(cuda::dropout_add_layer_norm_kernel<T, held()>, {cuda::ceil_div(p.rows, cuda::WARPS)},
                     cuda::WARPS * cuda::WARP, 0, p, cuda::Dropout::of(p.p, p.offset), aligned);
    });
}

void dropout_add_layer_norm_backward(const DropoutAddLayerNormBackwardParams& p) {
    check_rows(p.rows, p.sample_indices);
    const int64_t chunks = layer_norm_chunks(p.rows, p.D);
    const bool aligned = cuda::all_aligned(p.D, {p.d_out, p.d_again, p.x, p.residual, p.weight, p.d_x, p.d_residual});
    if (chunks > 0) {
        cuda::dispatch(p.dtype, p.D, [&](auto* type, auto held) {
            using T = std::remove_pointer_t<decltype(type)>;
            const int warps =
                held() > 0 ? cuda::WARPS : 1;  // a row too wide for registers: its sums fill shared memory
            const size_t shared = p.partial ? sizeof(float) * static_cast<size_t>(warps * 2 * p.D) : 0;
            cuda::launch(cuda::dropout_add_layer_norm_backward_kernel<T, held()>, {chunks}, warps * cuda::WARP, shared,
                         p, cuda::Dropout::of(p.p, p.offset), aligned);
        });
    }
    if (p.partial && p.D > 0) {
        cuda::launch(cuda::layer_norm_parameters_kernel, {cuda::ceil_div(2 * p.D, cuda::WARPS)},
                     cuda::WARPS * cuda::WARP, 0, static_cast<const float*>(p.partial), chunks, p.D, p.d_weight,
                     p.d_bias);
    }
}

}  // namespace cnm
