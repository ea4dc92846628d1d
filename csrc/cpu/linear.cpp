// A linear layer, y = x W^T + b, with ReLU where wanted, and its gradients:
//
//   g = d_out, 0 where ReLU was 0; d_x = g W, d_weight = g^T x, d_bias = sum g
//
// Groups of a row's columns have a weight each. y and d_x are parallel over blocks of rows; the right operands are
// packed once per call. d_weight sums over all rows: it is cut into blocks and the rows into slices, both by the
// problem alone, and the slices' sums are added in order. Rows that do not count are left out of every block, and
// written as 0.
//
// With `split` float32 operands are multiplied as sums of two bf16 numbers, where the processor multiplies those. That
// cannot be where a number is not finite, or beyond bf16's range: a result of it is not finite then, and all is done
// again in float32.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "gemm.h"
#include "parallel.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t ROWS = 96;           // of a block of y or d_x
constexpr int64_t SUMMED_ROWS = 192;   // that d_weight takes at a time
constexpr int64_t WEIGHT_BLOCK = 256;  // rows and columns of a block of d_weight: its sums and operands fit the caches
constexpr int64_t SLICE_ROWS = 384;    // at least, of a slice: a few thousand rows make tasks enough to share evenly
constexpr int64_t MAX_SLICES = 16;
constexpr int64_t PARTIAL_ELEMENTS = 1 << 21;  // at most, of all slices' d_weight
constexpr int64_t PAD = W;  // added to rows of scratch, or rows a power of two apart would share few cache sets

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows that count, in order.
class RowList {
  public:
    explicit RowList(const LinearInputs& p) : count(p.N) {
        if (p.lengths == nullptr) return;
        buffer_ = Buffer(static_cast<size_t>(p.N) * sizeof(int64_t));
        count = 0;
        for (int64_t first = 0, b = 0; first < p.N; first += p.sample_rows, ++b) {
            for (int64_t l = 0; l < std::min(p.lengths[b], p.sample_rows); ++l) data()[count++] = first + l;
        }
    }

    const int64_t* index() const { return data(); }  // null: every row
    int64_t count;

  private:
    int64_t* data() const { return buffer_.as<int64_t>(); }
    Buffer buffer_;
};

// Rows [count, width] of x, or of g: d_out, but 0 where the output of relu is.
template <class T>
struct Rows {
    const T* data;
    int64_t ld, width;
    const T* relu;  // its output; null: there was none
    int64_t relu_ld;
    const int64_t* index;  // of the rows; null: one after the other
    int64_t count;

    int64_t at(int64_t i) const { return index == nullptr ? i : index[i]; }
    const T* row(int64_t i) const { return data + at(i) * ld; }
    bool in_place() const { return index == nullptr && relu == nullptr; }

    Rows columns(int64_t first, int64_t n) const {
        Rows some = *this;
        some.data += first;
        if (relu != nullptr) some.relu += first;
        some.width = n;
        return some;
    }

    // Copies rows to dst[r * dst_ld + j], exactly.
    void copy(int64_t begin, int64_t rows, T* dst, int64_t dst_ld) const {
        for (int64_t r = 0; r < rows; ++r, dst += dst_ld) {
            const T* from = row(begin + r);
            if (relu == nullptr) {
                std::memcpy(dst, from, static_cast<size_t>(width) * sizeof(T));
                continue;
            }
            const T* output = relu + at(begin + r) * relu_ld;
            for (int64_t j = 0; j < width; j += W) {
                const int64_t n = width - j;
                store_tail(dst + j, select(at_most(load_tail(output + j, n), set1(0)), set1(0), load_tail(from + j, n)),
                           n);
            }
        }
    }

    // The cache lines of rows from `begin` on.
    void list(int64_t begin, int64_t rows, PrefetchList& lines) const {
        rows = std::min(rows, count - begin);
        const int64_t step = index == nullptr ? rows : 1;  // rows that lie one after the other
        for (int64_t r = 0; r < rows; r += step) {
            lines.add(row(begin + r), ld, step, width);
            if (relu != nullptr) lines.add(relu + at(begin + r) * relu_ld, relu_ld, step, width);
        }
    }
    int64_t line_capacity(int64_t rows) const {
        return (relu == nullptr ? 1 : 2) * PrefetchList::capacity(rows, (width + W) * static_cast<int64_t>(sizeof(T)));
    }
};

// The list's lines, to be asked for in turn during a product of M N K steps.
Prefetch spread(PrefetchList& list, int64_t M, int64_t N, int64_t K) {
    const int64_t steps = ceil_div(M, 6) * ceil_div(N, 4 * W) * K;
    int shift = 0;
    while ((steps >> (shift + 1)) > list.size()) ++shift;
    return list.finish(shift);
}

inline Vec add_element(const float* p, int64_t n, Vec sum) { return sum + load_tail(p, n); }
#if defined(__AVX512BF16__)
inline Vec add_element(const bf16x2* p, int64_t n, Vec sum) {  // both of each pair, by products with one
    const __m512i ones = _mm512_set1_epi16(0x3F80);
    const Vec pairs = load_tail(reinterpret_cast<const float*>(p), n);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)pairs.v, (__m512bh)ones)};
}
#endif

// The sums of a right operand's rows, added to sums[width]. Sums of sums round less than one long sum.
template <class E>
void add_up_rows(const E* from, int64_t from_ld, int64_t rows, int64_t width, float* sums) {
    constexpr int NV = 8;  // vectors of a row at a time: lines are read whole
    for (int64_t first = 0; first < width; first += NV * W) {
        Vec even[NV], odd[NV];
        for (int v = 0; v < NV; ++v) even[v] = odd[v] = set1(0);
        const auto add = [&](int64_t r, Vec(&to)[NV]) {
            const E* row = from + r * from_ld + first;
            if (first + NV * W <= width) {
                for (int v = 0; v < NV; ++v) to[v] = add_element(row + v * W, W, to[v]);
            } else {
                for (int v = 0; first + v * W < width; ++v) {
                    to[v] = add_element(row + v * W, width - first - v * W, to[v]);
                }
            }
        };
        for (int64_t r = 0; r < rows; r += 2) {
            add(r, even);
            if (r + 1 < rows) add(r + 1, odd);
        }
        for (int v = 0; v < NV && first + v * W < width; ++v) {
            const int64_t j = first + v * W;
            store_tail(sums + j, load_tail(sums + j, width - j) + (even[v] + odd[v]), width - j);
        }
    }
}

// Whether all numbers that threads have seen are finite.
class Finite {
  public:
    // Checks the numbers of one thread.
    class Check {
      public:
        explicit Check(Finite& all) : all_(all) {}
        ~Check() {
            if (hsum(sum_) != 0) all_.holds_.store(false, std::memory_order_relaxed);
        }
        void operator()(Vec v) { sum_ = fma(v, set1(0), sum_); }  // NaN of what is not finite

      private:
        Finite& all_;
        Vec sum_ = set1(0);
    };
    explicit operator bool() const { return holds_.load(); }

  private:
    std::atomic<bool> holds_ = true;
};

// Each group's weight as a right operand [K, N]: packed, or where it lies.
template <class E, class S>
struct RightOperands {
    const E* data;
    int64_t ld, group;

    // Element (k, n) of a group is source[k * k_step + n * n_step], one of which is 1.
    RightOperands(int64_t G, int64_t K, int64_t N, const S* source, int64_t source_group, int64_t k_step,
                  int64_t n_step) {
        const bool transposed = n_step != 1;
        if constexpr (std::is_same_v<S, E>) {
            if (!transposed) {
                data = source;
                ld = k_step;
                group = source_group;
                return;
            }
        }
        ld = row_of<E>(round_up(N, W));
        group = elements_of<E>(K) * ld;
        buffer_ = Buffer(static_cast<size_t>(G * group) * sizeof(E));
        E* packed = buffer_.template as<E>();
        data = packed;
        constexpr int64_t STEP = 64;  // even: bf16 pairs along K
        const int64_t steps = ceil_div(K, STEP);
        parallel_for(G * steps, [&](int64_t chunk) {
            const int64_t g = chunk / steps, begin = chunk % steps * STEP, depth = std::min(STEP, K - begin);
            const S* from = source + g * source_group + begin * k_step;
            E* to = packed + g * group + elements_of<E>(begin) * ld;
            if (transposed) {
                pack_transposed(depth, N, from, n_step, to, ld);
            } else {
                pack_rows(depth, N, from, k_step, to, ld);
            }
        });
    }

  private:
    Buffer buffer_;
};

// out[N, G, columns] = x[N, G, depth] b[G][depth, columns] + bias: y from W^T, d_x from W. Says whether all products of
// split operands are finite, without which `out` is not right.
template <class T, class S, class E>
bool rows_times(int64_t G, int64_t depth, int64_t columns, const Rows<T>& x, const RightOperands<E, S>& b,
                const float* bias, T* out, bool relu) {
    constexpr bool SPLIT = std::is_same_v<E, split2>, WRITES = DIRECT<T> && !SPLIT;  // as products are computed
    Finite finite;
    const int64_t all_columns = G * columns;
    const Output<T> write(x.count * all_columns);
    const int64_t wide = round_up(columns, W) + PAD, deep = row_of<E>(round_up(depth, W) + PAD);
    const int64_t copy_ld = round_up(x.width, W) + PAD, result_ld = round_up(all_columns, W) + PAD;
    const int64_t threads = thread_count();
    struct Scratch {
        float* sums;
        T *copy, *result;
        E* packed;
        const char** lines;
        size_t bytes;

        Scratch(void* memory, const Rows<T>& x, int64_t wide, int64_t deep, int64_t copy_ld, int64_t result_ld) {
            Arena arena(memory);
            sums = arena.alloc<float>(WRITES ? 0 : ROWS * wide);
            copy = arena.alloc<T>(x.in_place() ? 0 : ROWS * copy_ld);
            result = arena.alloc<T>(WRITES && x.index != nullptr ? ROWS * result_ld : 0);
            packed = arena.alloc<E>(std::is_same_v<T, E> ? 0 : ROWS * deep);
            lines = arena.alloc<const char*>(x.line_capacity(ROWS));
            bytes = arena.bytes();
        }
    };
    const size_t bytes = Scratch(nullptr, x, wide, deep, copy_ld, result_ld).bytes;
    parallel_for(ceil_div(x.count, ROWS), [&](int64_t block) {
        const Scratch scratch(thread_scratch(bytes), x, wide, deep, copy_ld, result_ld);
        const int64_t begin = block * ROWS, rows = std::min(ROWS, x.count - begin);
        const T* source = x.row(begin);
        int64_t source_ld = x.ld;
        if (!x.in_place()) {
            x.copy(begin, rows, scratch.copy, copy_ld);
            source = scratch.copy;
            source_ld = copy_ld;
        }
        // The rows that the thread will probably take next, spread over the steps of this block's products.
        PrefetchList list(scratch.lines);
        x.list(std::min(x.count, begin + threads * ROWS), ROWS, list);
        Prefetch prefetch = spread(list, rows, columns, G * elements_of<E>(depth));
        for (int64_t g = 0; g < G; ++g) {
            const auto [a, lda] = left_rows(rows, depth, source + g * depth, source_ld, scratch.packed, deep);
            const E* right = b.data + g * b.group;
            const float* group_bias = bias == nullptr ? nullptr : bias + g * columns;
            if constexpr (WRITES) {
                T* to = x.index == nullptr ? out + begin * all_columns : scratch.result;
                const int64_t ld = x.index == nullptr ? all_columns : result_ld;
                const bool streams = x.index == nullptr && write.streams();
                const ResultOf<T> result{to + g * columns, ld, group_bias, 0, nullptr, 0, streams, &prefetch, relu};
                gemm(rows, columns, elements_of<E>(depth), a, lda, 1, right, b.ld, result);
            } else {
                float* sums = scratch.sums;
                gemm(rows, columns, elements_of<E>(depth), a, lda, 1, right, b.ld, sums, wide, false, &prefetch);
                Finite::Check check(finite);
                for (int64_t r = 0; r < rows; ++r) {
                    T* to = out + x.at(begin + r) * all_columns + g * columns;
                    for (int64_t j = 0; j < columns; j += W) {
                        const int64_t n = columns - j;
                        Vec v = load_tail(sums + r * wide + j, n);
                        if (SPLIT) check(v);
                        if (bias != nullptr) v = v + load_tail(group_bias + j, n);
                        if (relu) v = vmax(set1(0), v);
                        write(to + j, v, n);
                    }
                }
            }
        }
        for (int64_t r = 0; WRITES && x.index != nullptr && r < rows; ++r) {
            std::memcpy(out + x.index[begin + r] * all_columns, scratch.result + r * result_ld,
                        static_cast<size_t>(all_columns) * sizeof(T));
        }
        write.finish();
    });
    return static_cast<bool>(finite);
}

// Zeros in the rows that do not count.
template <class T>
void clear_padding(const LinearInputs& p, T* out, int64_t width) {
    if (p.lengths == nullptr || p.sample_rows == 0) return;
    parallel_for(p.N / p.sample_rows, [&](int64_t b) {
        const int64_t length = std::clamp<int64_t>(p.lengths[b], 0, p.sample_rows);
        std::fill(out + (b * p.sample_rows + length) * width, out + (b + 1) * p.sample_rows * width, T{});
    });
}

template <class T>
Rows<T> rows_of_x(const LinearInputs& p, const RowList& rows) {
    return {static_cast<const T*>(p.x), p.x_ld, p.G * p.K, nullptr, 0, rows.index(), rows.count};
}

template <class T, class S, class E>
bool forward_of(const LinearParams& p, const RowList& rows) {
    const RightOperands<E, S> weight(p.G, p.K, p.M, static_cast<const S*>(p.weight), p.weight_group, p.weight_column,
                                     p.weight_row);
    return rows_times(p.G, p.K, p.M, rows_of_x<T>(p, rows), weight, p.bias, static_cast<T*>(p.out), p.relu);
}

// compute(element) with null pointers of the operands' element types that are asked for, until one says that its
// results are right.
template <class T, class Compute>
void in_operands(bool split, const Compute& compute) {
    if constexpr (HAS_BF16X2 && std::is_same_v<T, float>) {
        if (split && compute(static_cast<split2*>(nullptr))) return;
    }
    compute(static_cast<Operand<T>*>(nullptr));
}

template <class T, class S>
void forward(const LinearParams& p) {
    const RowList rows(p);
    in_operands<T>(p.split,
                   [&](auto* element) { return forward_of<T, S, std::remove_pointer_t<decltype(element)>>(p, rows); });
    clear_padding(p, static_cast<T*>(p.out), p.G * p.M);
}

int64_t slices_of(int64_t rows, int64_t elements) {
    const int64_t most = std::min(MAX_SLICES, PARTIAL_ELEMENTS / std::max<int64_t>(elements, 1));
    return std::clamp<int64_t>(rows / SLICE_ROWS, 1, std::max<int64_t>(most, 1));
}

// As rows_times, it says whether products are finite.
template <class T, class S, class E>
bool weight_gradient(const LinearBackwardParams& p, const Rows<T>& g, const Rows<T>& x) {
    constexpr bool SPLIT = std::is_same_v<E, split2>, FLOAT = std::is_same_v<E, float> && std::is_same_v<T, float>;
    Finite finite;
    const int64_t size = p.G * p.M * p.K, slices = slices_of(g.count, size), steps = ceil_div(g.count, SUMMED_ROWS);
    const int64_t row_blocks = ceil_div(p.M, WEIGHT_BLOCK),
                  column_blocks = std::max<int64_t>(ceil_div(p.K, WEIGHT_BLOCK), 1);
    const int64_t blocks = p.G * row_blocks * column_blocks;
    constexpr int64_t WIDE = WEIGHT_BLOCK + PAD, PACKED_WIDE = row_of<E>(WIDE);
    const Buffer partial_buffer(p.d_weight == nullptr ? 0 : static_cast<size_t>(slices * size) * sizeof(float));
    const Buffer bias_buffer(static_cast<size_t>(slices * p.G * p.M) * sizeof(float));
    float *partial = partial_buffer.as<float>(), *partial_bias = bias_buffer.as<float>();
    // In float32 g is copied even so: its rows, a power of two apart, would share few cache sets.
    const bool copies_g = FLOAT || !g.in_place();
    struct Scratch {
        T *g, *x;
        E *packed_g, *packed_x;
        const char** lines;
        size_t bytes;

        Scratch(void* memory, const Rows<T>& rows_of_g, const Rows<T>& rows_of_x, bool copies_g) {
            Arena arena(memory);
            g = arena.alloc<T>(copies_g ? SUMMED_ROWS * WIDE : 0);
            x = arena.alloc<T>(rows_of_x.in_place() ? 0 : SUMMED_ROWS * WIDE);
            packed_g = arena.alloc<E>(FLOAT ? 0 : elements_of<E>(SUMMED_ROWS) * PACKED_WIDE);
            packed_x = arena.alloc<E>(FLOAT ? 0 : elements_of<E>(SUMMED_ROWS) * PACKED_WIDE);
            const int64_t width = WEIGHT_BLOCK;
            lines = arena.alloc<const char*>(rows_of_g.columns(0, width).line_capacity(SUMMED_ROWS) +
                                             rows_of_x.columns(0, width).line_capacity(SUMMED_ROWS));
            bytes = arena.bytes();
        }
    };
    const size_t bytes = Scratch(nullptr, g, x, copies_g).bytes;
    parallel_for(slices * blocks, [&](int64_t task) {
        const Scratch scratch(thread_scratch(bytes), g, x, copies_g);
        const int64_t slice = task / blocks, block = task % blocks;
        const int64_t group = block / (row_blocks * column_blocks);
        const int64_t row = block / column_blocks % row_blocks * WEIGHT_BLOCK,
                      height = std::min(WEIGHT_BLOCK, p.M - row);
        const int64_t column = block % column_blocks * WEIGHT_BLOCK, width = std::min(WEIGHT_BLOCK, p.K - column);
        const Rows<T> own_g = g.columns(group * p.M + row, height), own_x = x.columns(group * p.K + column, width);
        float* sums = partial + slice * size + (group * p.M + row) * p.K + column;
        float* bias = partial_bias + (slice * p.G + group) * p.M + row;
        if (column == 0) std::fill(bias, bias + height, 0.0f);
        const int64_t start = slice * steps / slices * SUMMED_ROWS;
        const int64_t end = std::min(g.count, (slice + 1) * steps / slices * SUMMED_ROWS);
        for (int64_t begin = start; begin < end; begin += SUMMED_ROWS) {
            const int64_t rows = std::min(SUMMED_ROWS, end - begin);
            const T *from_g = own_g.row(begin), *from_x = own_x.row(begin);
            int64_t g_ld = g.ld, x_ld = x.ld;
            if (copies_g) {
                own_g.copy(begin, rows, scratch.g, WIDE);
                from_g = scratch.g;
                g_ld = WIDE;
            }
            // Both are right operands: the left one is read transposed.
            const OperandRows<E> of_g = right_rows(rows, height, from_g, g_ld, scratch.packed_g, PACKED_WIDE);
            if (column == 0) {
                if constexpr (SPLIT) {
                    add_up_rows(from_g, g_ld, rows, height, bias);
                } else {
                    add_up_rows(of_g.data, of_g.ld, elements_of<E>(rows), height, bias);
                }
            }
            if (p.d_weight == nullptr) continue;
            if (!x.in_place()) {
                own_x.copy(begin, rows, scratch.x, WIDE);
                from_x = scratch.x;
                x_ld = WIDE;
            }
            PrefetchList list(scratch.lines);
            own_g.list(begin + rows, std::min(SUMMED_ROWS, end - begin - rows), list);
            own_x.list(begin + rows, std::min(SUMMED_ROWS, end - begin - rows), list);
            Prefetch prefetch = spread(list, height, width, elements_of<E>(rows));
            const OperandRows<E> of_x = right_rows(rows, width, from_x, x_ld, scratch.packed_x, PACKED_WIDE);
            gemm(height, width, elements_of<E>(rows), of_g.data, 1, of_g.ld, of_x.data, of_x.ld, sums, p.K,
                 begin > start, &prefetch);
        }
        for (int64_t m = 0; p.d_weight != nullptr && start >= end && m < height; ++m) {
            std::fill(sums + m * p.K, sums + m * p.K + width, 0.0f);
        }
    });
    const auto add_slices = [&](const float* parts, int64_t count, auto* out, bool products) {
        constexpr int64_t STEP = 4096;
        parallel_for(ceil_div(count, STEP), [&](int64_t chunk) {
            Finite::Check check(finite);
            for (int64_t j = chunk * STEP; j < std::min(count, (chunk + 1) * STEP); j += W) {
                Vec sum = load_tail(parts + j, count - j);
                for (int64_t slice = 1; slice < slices; ++slice) sum += load_tail(parts + slice * count + j, count - j);
                if (SPLIT && products) check(sum);
                store_tail(out + j, sum, count - j);
            }
        });
    };
    if (p.d_weight != nullptr) add_slices(partial, size, static_cast<S*>(p.d_weight), true);
    if (p.d_bias != nullptr) add_slices(partial_bias, p.G * p.M, p.d_bias, false);
    return static_cast<bool>(finite);
}

template <class T, class S>
void backward(const LinearBackwardParams& p) {
    const RowList rows(p);
    const int64_t width = p.G * p.M;
    const Rows<T> g{static_cast<const T*>(p.d_out),
                    p.d_out_ld,
                    width,
                    static_cast<const T*>(p.out),
                    width,
                    rows.index(),
                    rows.count};
    if (p.d_x != nullptr) {
        in_operands<T>(p.split, [&](auto* element) {
            using E = std::remove_pointer_t<decltype(element)>;
            const RightOperands<E, S> weight(p.G, p.M, p.K, static_cast<const S*>(p.weight), p.weight_group,
                                             p.weight_row, p.weight_column);
            return rows_times(p.G, p.M, p.K, g, weight, nullptr, static_cast<T*>(p.d_x), false);
        });
        clear_padding(p, static_cast<T*>(p.d_x), p.G * p.K);
    }
    if (p.d_weight != nullptr || p.d_bias != nullptr) {
        in_operands<T>(p.split, [&](auto* element) {
            return weight_gradient<T, S, std::remove_pointer_t<decltype(element)>>(p, g, rows_of_x<T>(p, rows));
        });
    }
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
