// LayerNorm(residual + dropout(x)), forward and backward, one pass over memory each.
//
//   t = residual + dropout(x), mean, r = 1 / sqrt(var + eps), out = (t - mean) r w + b
//   g = dout w, n = (t - mean) r, dt = r (g - mean(g) - n mean(g n)); dresidual = dt, dx = dropout(dt)
//
// A row stays in the first-level cache. The backward draws the mask again and recomputes t rather than read a stored
// copy. Weight and bias gradients are summed over blocks of 128 rows, whatever the number of threads; the caller adds the
// blocks up in order.

#include <cmath>

#include "convert.h"
#include "dropout.h"
#include "philox.h"
#include "scratch.h"

namespace cnm {
namespace CNM_ISA {
namespace {

// Rows of the problem, widened to float32 and padded to whole vectors with zeros.
class Rows {
 public:
  Rows(const LayerNormParams& p, Scratch& scratch)
      : weight(scratch.take<float>(round_up(p.D, kLanes))),
        bias(scratch.take<float>(round_up(p.D, kLanes))),
        total(scratch.take<float>(round_up(p.D, kLanes))),
        gradient(scratch.take<float>(round_up(p.D, kLanes))),
        p_(p),
        x_(scratch.take<float>(round_up(p.D, kLanes))),
        factor_(scratch.take<float>(p.D + 2 * kDraws + kLanes)),
        dropout_{{p.dropout.seed, p.dropout.offset}, std::uint32_t(p.dropout.threshold), p.dropout.scale} {
    load(p.weight, p.weight_dtype, 0, weight);
    if (p.bias != nullptr) load(p.bias, p.weight_dtype, 0, bias);
    for (int i = 0; i < round_up(p.D, kLanes); ++i) total[i] = gradient[i] = x_[i] = 0;
  }

  void load(const void* rows, DType dtype, std::int64_t row, float* out) const {
    load_as(static_cast<const char*>(rows) + row * p_.D * element_size(dtype), dtype, p_.D, out);
    for (int i = p_.D; i < round_up(p_.D, kLanes); ++i) out[i] = 0;
  }

  void store(void* rows, std::int64_t row, const float* values) const {
    store_as(static_cast<char*>(rows) + row * p_.D * element_size(p_.dtype), p_.dtype, values, p_.D, 1.f);
  }

  // total <- residual + dropout(x) of a row; returns the dropout's factors, or null where there is none.
  const float* load_total(std::int64_t row) {
    load(p_.x, p_.dtype, row, x_);
    load(p_.residual, p_.dtype, row, total);
    if (p_.dropout.threshold == 0) {
      for (int i = 0; i < p_.D; ++i) total[i] += x_[i];
      return nullptr;
    }
    const float* keep = dropout_.factors(std::uint64_t(row) * p_.D, p_.D, factor_);
    for (int i = 0; i < p_.D; ++i) total[i] += keep[i] == 0 ? 0.f : x_[i] * keep[i];
    return keep;
  }

  float *weight, *bias, *total, *gradient;

 private:
  const LayerNormParams& p_;
  float *x_, *factor_;
  const Dropout dropout_;
};

// sum of f(i) over vectors i of a row, in a fixed order
template <class F>
inline float row_sum(int D, const F& f) {
  Vec sums = {};
  for (int i = 0; i < D; i += kLanes) sums += i + kLanes <= D ? f(i) : select(lanes_below(D - i), f(i), Vec{});
  return sum(sums);
}

}  // namespace

void dropout_add_layer_norm_forward(const LayerNormParams& p, ParallelFor parallel_for) {
  parallel_for((p.N + kLayerNormRows - 1) / kLayerNormRows, [&](std::int64_t begin, std::int64_t end) {
    static thread_local Scratch scratch;
    scratch.reset();
    Rows rows(p, scratch);
    const std::int64_t last = end * kLayerNormRows < p.N ? end * kLayerNormRows : p.N;
    for (std::int64_t row = begin * kLayerNormRows; row < last; ++row) {
      rows.load_total(row);
      float* t = rows.total;
      const float mean = row_sum(p.D, [&](int i) { return load(t + i); }) / float(p.D);
      const float variance = row_sum(p.D, [&](int i) {
                               const Vec centered = load(t + i) - mean;
                               return centered * centered;
                             }) / float(p.D);
      const float r = 1 / std::sqrt(variance + p.eps);
      for (int i = 0; i < p.D; i += kLanes)
        store(t + i, (load(t + i) - mean) * r * load(rows.weight + i) + load(rows.bias + i));
      rows.store(p.out, row, t);
      p.stats[2 * row] = mean;
      p.stats[2 * row + 1] = r;
    }
  });
}

void dropout_add_layer_norm_backward(const LayerNormParams& p, ParallelFor parallel_for) {
  parallel_for((p.N + kLayerNormRows - 1) / kLayerNormRows, [&](std::int64_t begin, std::int64_t end) {
    static thread_local Scratch scratch;
    scratch.reset();
    Rows rows(p, scratch);
    float* sums = scratch.take<float>(2 * std::size_t(round_up(p.D, kLanes)));
    float *to_weight = sums, *to_bias = sums + round_up(p.D, kLanes);
    for (std::int64_t block = begin; block < end; ++block) {
      std::memset(sums, 0, 2 * std::size_t(round_up(p.D, kLanes)) * sizeof(float));
      const std::int64_t last = (block + 1) * kLayerNormRows < p.N ? (block + 1) * kLayerNormRows : p.N;
      for (std::int64_t row = block * kLayerNormRows; row < last; ++row) {
        const float* keep = rows.load_total(row);
        rows.load(p.grad_out, p.dtype, row, rows.gradient);
        const float mean = p.stats[2 * row], r = p.stats[2 * row + 1];
        float *t = rows.total, *g = rows.gradient;
        for (int i = 0; i < p.D; i += kLanes) {
          const Vec normalized = (load(t + i) - mean) * r, grad = load(g + i);
          store(to_weight + i, load(to_weight + i) + grad * normalized);
          store(to_bias + i, load(to_bias + i) + grad);
          store(t + i, normalized);
          store(g + i, grad * load(rows.weight + i));
        }
        const float mean_g = row_sum(p.D, [&](int i) { return load(g + i); }) / float(p.D);
        const float mean_gn = row_sum(p.D, [&](int i) { return load(g + i) * load(t + i); }) / float(p.D);
        for (int i = 0; i < p.D; i += kLanes) store(g + i, r * (load(g + i) - mean_g - load(t + i) * mean_gn));
        if (p.grad_residual != nullptr) rows.store(p.grad_residual, row, g);
        if (p.grad_x == nullptr) continue;
        if (keep != nullptr)
          for (int i = 0; i < p.D; ++i) g[i] = keep[i] == 0 ? 0.f : g[i] * keep[i];
        rows.store(p.grad_x, row, g);
      }
      if (p.partial == nullptr) continue;
      float* out = p.partial + block * 2 * p.D;
      std::memcpy(out, to_weight, p.D * sizeof(float));
      std::memcpy(out + p.D, to_bias, p.D * sizeof(float));
    }
  });
}

}  // namespace CNM_ISA
}  // namespace cnm
