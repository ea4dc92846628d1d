// A linear layer, y = x W^T + b, with ReLU where wanted, and its gradients:
//
//   g = d_out, 0 where ReLU was 0; d_x = g W, d_weight = g^T x, d_bias = sum g
//
// y and d_x are parallel over blocks of rows; the right operand is packed once per call. d_weight sums over all rows: it
// is cut into blocks of columns and the rows into slices, both by the problem alone, and the slices' sums are added in
// order.
#include "linear.h"

#include <algorithm>

#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t ROWS = 96;             // of a block of y or d_x
constexpr int64_t SUMMED_ROWS = 192;     // that d_weight takes at a time
constexpr int64_t WEIGHT_COLUMNS = 256;  // of a block of d_weight
constexpr int64_t SLICE_ROWS = 1024;     // at least, of a slice
constexpr int64_t MOST_SLICES = 16;
constexpr int64_t PARTIAL_ELEMENTS = 1 << 21;  // at most, of all slices' d_weight
constexpr int64_t PAD = W;  // added to rows of scratch, or rows a power of two apart would share few cache sets

// Rows [N, width] of x, or of g: d_out where `positive` is above 0.
template <class T>
struct Rows {
    const T* data;
    int64_t ld;
    const T* positive = nullptr;  // [N, width], or null: everywhere
    int64_t width;

    const T* row(int64_t i) const { return data + i * ld; }

    // To dst[r * dst_ld + j]; exact, since what is written was read.
    void masked(int64_t begin, int64_t rows, T* dst, int64_t dst_ld) const {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < width; j += W) {
                const int64_t n = width - j;
                Vec v = load_tail(row(begin + r) + j, n);
                if (positive != nullptr) {
                    v = select(less(set1(0), load_tail(positive + (begin + r) * width + j, n)), v, set1(0));
                }
                store_tail(dst + r * dst_ld + j, v, n);
            }
        }
    }

    // The sums of rows of `from`, added to sums[width]. Sums of sums round less than one long sum.
    void add_up(const T* from, int64_t from_ld, int64_t rows, float* sums) const {
        for (int64_t j = 0; j < width; j += W) {
            const int64_t n = width - j;
            Vec even = set1(0), odd = set1(0);
            for (int64_t r = 0; r < rows; r += 2) {
                even += load_tail(from + r * from_ld + j, n);
                if (r + 1 < rows) odd += load_tail(from + (r + 1) * from_ld + j, n);
            }
            store_tail(sums + j, load_tail(sums + j, n) + (even + odd), n);
        }
    }
};

// out[N, columns] = x[N, width] b[width, columns] + bias: y from W^T, d_x from W.
template <class T>
void rows_times(int64_t N, int64_t columns, const Rows<T>& x, const Operand<T>* b, int64_t ldb, const float* bias, T* out,
                bool relu) {
    using E = Operand<T>;
    // Whether the product writes the result itself.
    constexpr bool DIRECT = std::is_same_v<T, float> || (std::is_same_v<T, bf16> && PAIRS_TO_BF16);
    const Output<T> write(N * columns);
    const int64_t wide = round_up(columns, W) + PAD, deep = round_up(x.width, W) + PAD;
    const int64_t threads = thread_count();
    struct Scratch {
        float* sums;
        T* masked;
        E* packed;
        const char** lines;
        size_t bytes;

        Scratch(void* memory, const Rows<T>& x, int64_t wide, int64_t deep) {
            Layout layout(memory);
            sums = layout.take<float>(DIRECT ? 0 : ROWS * wide);
            masked = layout.take<T>(x.positive == nullptr ? 0 : ROWS * deep);
            packed = layout.take<E>(std::is_same_v<T, E> ? 0 : ROWS * deep);
            lines = layout.take<const char*>(PrefetchList::capacity(ROWS, x.width * static_cast<int64_t>(sizeof(T))));
            bytes = layout.bytes();
        }
    };
    const size_t bytes = Scratch(nullptr, x, wide, deep).bytes;
    parallel_for((N + ROWS - 1) / ROWS, [&](int64_t block) {
        const Scratch scratch(thread_scratch(bytes), x, wide, deep);
        float* sums = scratch.sums;
        const int64_t begin = block * ROWS, rows = std::min(ROWS, N - begin);
        const T* source = x.row(begin);
        int64_t source_ld = x.ld;
        if (x.positive != nullptr) {
            x.masked(begin, rows, scratch.masked, deep);
            source = scratch.masked;
            source_ld = deep;
        }
        const auto [a, lda] = left_rows(rows, x.width, source, source_ld, scratch.packed, deep);
        // The rows that the thread will probably take next, spread over the steps of this block's product.
        const int64_t next = std::min(N, begin + threads * ROWS);
        PrefetchList list(scratch.lines);
        list.add(x.row(next), x.ld, std::min(ROWS, N - next), x.width);
        const int64_t steps = (rows + 5) / 6 * ((columns + 4 * W - 1) / (4 * W)) * packed_k<T>(x.width);
        int shift = 0;
        while ((steps >> (shift + 1)) > list.size()) ++shift;
        Prefetch prefetch = list.finish(shift);
        if constexpr (DIRECT) {
            const ResultOf<T> to{out + begin * columns, columns, bias, 0, nullptr, 0, write.streams(), &prefetch, relu};
            gemm(rows, columns, packed_k<T>(x.width), a, lda, 1, b, ldb, to);
        } else {
            gemm(rows, columns, packed_k<T>(x.width), a, lda, 1, b, ldb, sums, wide, false, &prefetch);
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t j = 0; j < columns; j += W) {
                    const int64_t n = columns - j;
                    Vec v = load_tail(sums + r * wide + j, n);
                    if (bias != nullptr) v = v + load_tail(bias + j, n);
                    if (relu) v = vmax(set1(0), v);
                    write(out + (begin + r) * columns + j, v, n);
                }
            }
        }
        write.finish();
    });
}

// W^T (or W) as a right operand: packed, or where it lies.
template <class T, class S>
struct RightOperand {
    using E = Operand<T>;
    const E* data;
    int64_t ld;

    RightOperand(int64_t K, int64_t N, const S* source, int64_t source_ld, bool transposed) {
        if constexpr (std::is_same_v<S, E>) {
            if (!transposed) {
                data = source;
                ld = source_ld;
                return;
            }
        }
        ld = round_up(N, W);
        buffer_ = Buffer(static_cast<size_t>(packed_k<T>(K) * ld) * sizeof(E));
        E* packed = buffer_.template as<E>();
        data = packed;
        constexpr int64_t STEP = 64;  // even: bf16 pairs along K
        parallel_for((K + STEP - 1) / STEP, [&](int64_t chunk) {
            const int64_t begin = chunk * STEP, depth = std::min(STEP, K - begin);
            E* to = packed + packed_k<T>(begin) * ld;
            if (transposed) {
                pack_transposed(depth, N, source + begin, source_ld, to, ld);
            } else {
                pack_rows(depth, N, source + begin * source_ld, source_ld, to, ld);
            }
        });
    }

   private:
    Buffer buffer_;
};

template <class T, class S>
void forward(const LinearParams& p) {
    const RightOperand<T, S> weight(p.K, p.M, static_cast<const S*>(p.weight), p.K, true);
    const Rows<T> x{static_cast<const T*>(p.x), p.x_ld, nullptr, p.K};
    rows_times<T>(p.N, p.M, x, weight.data, weight.ld, p.bias, static_cast<T*>(p.out), p.relu);
}

int64_t slices_of(int64_t N, int64_t M, int64_t K) {
    const int64_t most = std::min(MOST_SLICES, PARTIAL_ELEMENTS / std::max<int64_t>(M * K, 1));
    return std::clamp<int64_t>(N / SLICE_ROWS, 1, std::max<int64_t>(most, 1));
}

template <class T, class S>
void weight_gradient(const LinearBackwardParams& p, const Rows<T>& g) {
    using E = Operand<T>;
    constexpr bool FLOAT = std::is_same_v<T, float>;
    const T* x = static_cast<const T*>(p.x);
    const int64_t slices = slices_of(p.N, p.M, p.K), blocks = std::max<int64_t>((p.K + WEIGHT_COLUMNS - 1) / WEIGHT_COLUMNS, 1);
    const int64_t slice_rows = round_up((p.N + slices - 1) / slices, SUMMED_ROWS);
    const int64_t wide = round_up(p.M, W) + PAD, deep = WEIGHT_COLUMNS + PAD;
    const Buffer partial_buffer(p.d_weight == nullptr ? 0 : static_cast<size_t>(slices * p.M * p.K) * sizeof(float));
    const Buffer bias_buffer(static_cast<size_t>(slices * p.M) * sizeof(float));
    float *partial = partial_buffer.as<float>(), *partial_bias = bias_buffer.as<float>();
    struct Scratch {
        T* masked;  // rows of g: masked, and in float32 not a power of two apart
        E *packed, *columns;
        size_t bytes;

        Scratch(void* memory, bool masks, int64_t wide, int64_t deep) {
            Layout layout(memory);
            masked = layout.take<T>(masks ? SUMMED_ROWS * wide : 0);
            packed = layout.take<E>(FLOAT ? 0 : packed_k<T>(SUMMED_ROWS) * wide);
            columns = layout.take<E>(FLOAT ? 0 : packed_k<T>(SUMMED_ROWS) * deep);
            bytes = layout.bytes();
        }
    };
    const bool masks = FLOAT || g.positive != nullptr;
    const size_t bytes = Scratch(nullptr, masks, wide, deep).bytes;
    parallel_for(slices * blocks, [&](int64_t task) {
        const Scratch scratch(thread_scratch(bytes), masks, wide, deep);
        const int64_t slice = task / blocks, block = task % blocks;
        const int64_t column = block * WEIGHT_COLUMNS, width = std::min(WEIGHT_COLUMNS, p.K - column);
        float* sums = partial + slice * p.M * p.K + column;
        float* bias = partial_bias + slice * p.M;
        if (block == 0) std::fill(bias, bias + p.M, 0.0f);
        const int64_t end = std::min(p.N, (slice + 1) * slice_rows);
        for (int64_t begin = slice * slice_rows; begin < end; begin += SUMMED_ROWS) {
            const int64_t rows = std::min(SUMMED_ROWS, end - begin);
            const T* rows_of_g = g.row(begin);
            int64_t g_ld = g.ld;
            if (masks) {
                g.masked(begin, rows, scratch.masked, wide);
                rows_of_g = scratch.masked;
                g_ld = wide;
            }
            if (block == 0) g.add_up(rows_of_g, g_ld, rows, bias);
            if (p.d_weight == nullptr) continue;
            const bool old = begin > slice * slice_rows;
            const T* source = x + begin * p.x_ld + column;
            if constexpr (FLOAT) {
                gemm(p.M, width, rows, rows_of_g, 1, g_ld, source, p.x_ld, sums, p.K, old);
            } else {
                pack_rows(rows, p.M, rows_of_g, g_ld, scratch.packed, wide);
                pack_rows(rows, width, source, p.x_ld, scratch.columns, deep);
                gemm(p.M, width, packed_k<T>(rows), scratch.packed, 1, wide, scratch.columns, deep, sums, p.K, old);
            }
        }
        if (p.d_weight != nullptr && slice * slice_rows >= end) {
            for (int64_t m = 0; m < p.M; ++m) std::fill(sums + m * p.K, sums + m * p.K + width, 0.0f);
        }
    });
    const auto add_up = [&](const float* parts, int64_t size, auto* out) {
        constexpr int64_t STEP = 4096;
        parallel_for((size + STEP - 1) / STEP, [&](int64_t chunk) {
            for (int64_t j = chunk * STEP; j < std::min(size, (chunk + 1) * STEP); j += W) {
                Vec sum = load_tail(parts + j, size - j);
                for (int64_t slice = 1; slice < slices; ++slice) sum += load_tail(parts + slice * size + j, size - j);
                store_tail(out + j, sum, size - j);
            }
        });
    };
    if (p.d_weight != nullptr) add_up(partial, p.M * p.K, static_cast<S*>(p.d_weight));
    if (p.d_bias != nullptr) add_up(partial_bias, p.M, p.d_bias);
}

template <class T, class S>
void backward(const LinearBackwardParams& p) {
    const Rows<T> g{static_cast<const T*>(p.d_out), p.d_out_ld, static_cast<const T*>(p.out), p.M};
    if (p.d_x != nullptr) {
        const RightOperand<T, S> weight(p.M, p.K, static_cast<const S*>(p.weight), p.K, false);
        rows_times<T>(p.N, p.K, g, weight.data, weight.ld, nullptr, static_cast<T*>(p.d_x), false);
    }
    if (p.d_weight != nullptr || p.d_bias != nullptr) weight_gradient<T, S>(p, g);
}

template <class Params, class Run>
void dispatch(const Params& p, const Run& run) {
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (p.weight_dtype == Dtype::float32) return run(type, static_cast<float*>(nullptr));
        if constexpr (!std::is_same_v<T, float>) run(type, type);  // else they are one type
    });
}

}  // namespace

void linear(const LinearParams& p) {
    dispatch(p, [&](auto* type, auto* weight_type) {
        forward<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(weight_type)>>(p);
    });
}

void linear_backward(const LinearBackwardParams& p) {
    dispatch(p, [&](auto* type, auto* weight_type) {
        backward<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(weight_type)>>(p);
    });
}

}  // namespace cnm::CNM_ISA
