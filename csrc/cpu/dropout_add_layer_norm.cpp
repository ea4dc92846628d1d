// out = (t - mean) / std weight + bias with t = residual + dropout(x), one row after the other, and its gradients.
//
// With n = (t - mean) / std and g = d_out weight: d_residual = (g - mean(g) - n mean(g n)) / std, d_x the same through
// the mask, d_weight = sum d_out n, d_bias = sum d_out. The backward computes t again from x and residual: that reads
// as many bytes as a stored t would cost to write and read, and needs no memory. The mask is drawn again too.
//
// A chunk is a number of rows that depends on D alone; its masks are drawn in one go, or row by row where samples have
// those of others. Each chunk sums its own d_weight
// and d_bias over its rows in order, and the chunks' sums are added in order at the end.
#include "dropout_add_layer_norm.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "philox.h"

namespace cnm::CNM_ISA {
namespace {

// Calls body(j, n, slot) for the vectors of a row: n >= W lanes are there, n < W for the last. Slots 0 to 3 in turn
// let a sum run in four registers.
template <class Body>
inline void for_each_vector(int64_t D, const Body& body) {
    int64_t j = 0;
    for (; j + 4 * W <= D; j += 4 * W) {
        body(j, int64_t{W}, 0);
        body(j + W, int64_t{W}, 1);
        body(j + 2 * W, int64_t{W}, 2);
        body(j + 3 * W, int64_t{W}, 3);
    }
    for (; j < D; j += W) body(j, D - j, 0);
}

struct Sum {
    Vec parts[4] = {set1(0), set1(0), set1(0), set1(0)};
    float total() const { return hsum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// A chunk's scratch: masks, and rows in float.
struct Scratch {
    uint8_t* bits;
    float* rows[2];

    Scratch(int64_t chunk_rows, int64_t D) {
        const int64_t row_bytes = (D + W) / W * W * static_cast<int64_t>(sizeof(float));
        char* memory =
            static_cast<char*>(thread_scratch(static_cast<size_t>(2 * row_bytes + KeepBits::bytes(chunk_rows * D))));
        rows[0] = reinterpret_cast<float*>(memory);
        rows[1] = reinterpret_cast<float*>(memory + row_bytes);
        bits = reinterpret_cast<uint8_t*>(memory + 2 * row_bytes);
    }
};

// The masks of a chunk's rows, drawn when it begins; or where samples have those of others, when a row does.
template <class Params>
class Masks {
  public:
    Masks(const Params& p, const Dropout& dropout, int64_t first, int64_t end, uint8_t* memory)
        : p_(p),
          dropout_(dropout),
          first_(first),
          memory_(memory),
          keep_(dropout, first * p.D, p.p > 0 && p.sample_indices == nullptr ? (end - first) * p.D : 0, memory) {}

    // Begins a row; its elements are those of `keep` from the returned one on.
    int64_t begin(int64_t row) {
        if (p_.sample_indices == nullptr) return (row - first_) * p_.D;
        const int64_t drawn = p_.sample_indices[row / p_.sample_rows] * p_.sample_rows + row % p_.sample_rows;
        keep_ = KeepBits(dropout_, drawn * p_.D, p_.D, memory_);
        return 0;
    }

    const KeepBits& keep() const { return keep_; }

  private:
    const Params& p_;
    const Dropout& dropout_;
    int64_t first_;
    uint8_t* memory_;
    KeepBits keep_;
};

// Element j of a row of size t = size (residual + dropout(x)); in `keep` the row begins at `base`.
template <bool DROP, class T>
inline Vec sum_of(const T* x, const T* residual, const KeepBits& keep, float scale, float size, int64_t base, int64_t j,
                  int64_t n) {
    Vec dropped = load_tail(x + j, n) * set1(DROP ? scale * size : size);
    if (DROP) dropped = select(keep.lanes(base + j), dropped, set1(0));
    return load_tail(residual + j, n) * set1(size) + dropped;  // a size of 1 changes nothing
}

template <bool DROP, class T>
void forward(const DropoutAddLayerNormParams& p) {
    const int64_t D = p.D, chunk_rows = layer_norm_rows(D);
    const Dropout dropout(p.p, *p.seed, p.offset);
    const float count = static_cast<float>(D);
    const Output<T> write(p.rows * D);
    parallel_for(layer_norm_chunks(p.rows, D), [&](int64_t chunk) {
        const int64_t first = chunk * chunk_rows, end = std::min(p.rows, first + chunk_rows);
        const Scratch scratch(chunk_rows, D);
        float* t = scratch.rows[0];
        Masks masks(p, dropout, first, end, scratch.bits);
        const KeepBits& keep = masks.keep();
        for (int64_t row = first; row < end; ++row) {
            const int64_t base = DROP ? masks.begin(row) : 0;
            const T* x = static_cast<const T*>(p.x) + row * D;
            const T* residual = static_cast<const T*>(p.residual) + row * D;
            float size = 1.0f, mean = 0.0f, inverse = 0.0f;
            for (;;) {
                Sum sum, squares;
                for_each_vector(D, [&](int64_t j, int64_t n, int slot) {
                    const Vec v = sum_of<DROP>(x, residual, keep, dropout.scale, size, base, j, n);
                    store_tail(t + j, v, n);
                    sum.parts[slot] += within(v, n);
                });
                mean = sum.total() / count;
                for_each_vector(D, [&](int64_t j, int64_t n, int slot) {
                    const Vec centered = within(load_tail(t + j, n) - set1(mean), n);
                    squares.parts[slot] = fma(centered, centered, squares.parts[slot]);
                });
                const float spread = squares.total() / count, variance = spread + p.eps * size * size;
                inverse = 1.0f / (spread == 0.0f ? std::sqrt(p.eps) * size : std::sqrt(variance));
                const float wanted = RowSize::wanted(mean, variance);
                if (size != 1.0f || wanted == 1.0f) break;
                size = wanted;
            }
            T* out = static_cast<T*>(p.out) + row * D;
            for_each_vector(D, [&](int64_t j, int64_t n, int) {
                const Vec normal = (load_tail(t + j, n) - set1(mean)) * set1(inverse);
                write(out + j, fma(normal, load_tail(p.weight + j, n), load_tail(p.bias + j, n)), n);
            });
            p.stats[2 * row] = RowSize::kept_mean(mean, size);
            p.stats[2 * row + 1] = RowSize::kept_inverse(inverse, size);
        }
        write.finish();
    });
}

template <bool DROP, class T>
void backward(const DropoutAddLayerNormBackwardParams& p) {
    const int64_t D = p.D, chunk_rows = layer_norm_rows(D), chunks = layer_norm_chunks(p.rows, D);
    const Dropout dropout(p.p, *p.seed, p.offset);
    const float count = static_cast<float>(D);
    const Output<T> write(p.rows * D);
    parallel_for(chunks, [&](int64_t chunk) {
        const int64_t first = chunk * chunk_rows, end = std::min(p.rows, first + chunk_rows);
        const Scratch scratch(chunk_rows, D);
        float *normal = scratch.rows[0], *g = scratch.rows[1];
        Masks masks(p, dropout, first, end, scratch.bits);
        const KeepBits& keep = masks.keep();
        float* d_weight = p.partial == nullptr ? nullptr : p.partial + chunk * 2 * D;
        float* d_bias = d_weight + D;
        if (d_weight != nullptr) std::fill(d_weight, d_weight + 2 * D, 0.0f);
        for (int64_t row = first; row < end; ++row) {
            const int64_t base = DROP ? masks.begin(row) : 0;
            const T* x = static_cast<const T*>(p.x) + row * D;
            const T* residual = static_cast<const T*>(p.residual) + row * D;
            const T* d_out = static_cast<const T*>(p.d_out) + row * D;
            const T* d_again = p.d_again == nullptr ? nullptr : static_cast<const T*>(p.d_again) + row * D;
            const float size = RowSize::of_kept(p.stats[2 * row + 1]);
            const Vec mean = set1(p.stats[2 * row]), inverse = set1(std::abs(p.stats[2 * row + 1]));
            Sum sum_g, sum_gn;
            // Compilers find these too long to inline five times; called, they would keep sums in memory.
            for_each_vector(
                D, [&](int64_t j, int64_t n, int slot) __attribute__((always_inline)) {
                    const Vec t = sum_of<DROP>(x, residual, keep, dropout.scale, size, base, j, n);
                    const Vec normalized = (t - mean) * inverse;
                    Vec upstream = load_tail(d_out + j, n);
                    if (d_again != nullptr) upstream += load_tail(d_again + j, n);
                    const Vec product = upstream * load_tail(p.weight + j, n);  // 0 beyond the row
                    store_tail(normal + j, normalized, n);
                    store_tail(g + j, product, n);
                    sum_g.parts[slot] += product;
                    sum_gn.parts[slot] = fma(product, within(normalized, n), sum_gn.parts[slot]);
                    if (d_weight != nullptr) {
                        store_tail(d_weight + j, fma(upstream, normalized, load_tail(d_weight + j, n)), n);
                        store_tail(d_bias + j, upstream + load_tail(d_bias + j, n), n);
                    }
                });
            const Vec mean_g = set1(sum_g.total() / count), mean_gn = set1(sum_gn.total() / count);
            for_each_vector(
                D, [&](int64_t j, int64_t n, int) __attribute__((always_inline)) {
                    const Vec centered = load_tail(g + j, n) - mean_g;
                    const Vec d = fnma(load_tail(normal + j, n), mean_gn, centered) * inverse * set1(size);
                    if (p.d_residual != nullptr) write(static_cast<T*>(p.d_residual) + row * D + j, d, n);
                    if (p.d_x == nullptr) return;
                    const Vec kept = DROP ? select(keep.lanes(base + j), d * set1(dropout.scale), set1(0)) : d;
                    write(static_cast<T*>(p.d_x) + row * D + j, kept, n);
                });
        }
        write.finish();
    });
    if (p.partial == nullptr) return;
    for (int64_t j = 0; j < D; j += W) {
        Vec d_weight = set1(0), d_bias = set1(0);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            d_weight += load_tail(p.partial + 2 * chunk * D + j, D - j);
            d_bias += load_tail(p.partial + (2 * chunk + 1) * D + j, D - j);
        }
        store_tail(p.d_weight + j, d_weight, D - j);
        store_tail(p.d_bias + j, d_bias, D - j);
    }
}

}  // namespace

void dropout_add_layer_norm(const DropoutAddLayerNormParams& p) {
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        p.p > 0 ? forward<true, T>(p) : forward<false, T>(p);
    });
}

void dropout_add_layer_norm_backward(const DropoutAddLayerNormBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        p.p > 0 ? backward<true, T>(p) : backward<false, T>(p);
    });
}

}  // namespace cnm::CNM_ISA
