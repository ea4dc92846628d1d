// Schemas and registration of the native ops, and the only code that sees tensors: it turns them into the kernels'
// parameters. Built against the LibTorch stable ABI, so one binary serves every Python >= 3.10 and torch >= 2.11.
// Arguments arrive checked and laid out by cnm_kernels/ops.py and native.py; what would read out of bounds is checked
// here once more.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "cpu/dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_for(std::int64_t n, const cnm::ParallelBody& body) {
  torch::stable::parallel_for(0, n, 1, [&body](std::int64_t begin, std::int64_t end) { body(begin, end); });
}

cnm::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cnm::DType::kFloat32;
    case ScalarType::BFloat16: return cnm::DType::kBFloat16;
    default: STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "cnm_kernels: unsupported dtype"); return cnm::DType::kFloat16;
  }
}

template <class T = void>
const T* data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "cnm_kernels: a contiguous tensor is needed");
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = void>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <class T = void>
T* output(Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}
Tensor empty_if(bool wanted, const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType dtype) {
  return wanted ? empty(like, sizes, dtype) : empty(like, {0}, dtype);
}
// [B, H, L, d] in memory as [B, L, H, d], which is what the projection before or after the attention wants.
Tensor empty_heads(bool wanted, const Tensor& like) {
  if (!wanted) return empty(like, {0}, like.scalar_type());
  return torch::stable::transpose(empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type()), 1, 2);
}

cnm::Heads heads(const Tensor& t) {
  if (t.numel() == 0) return {};
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), "cnm_kernels: heads need a contiguous last dimension");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// ---- gaussian_mask ----

Tensor gaussian_mask_forward(const Tensor& center, const Tensor& width, std::int64_t length, double alpha, double min_width,
                             bool complement) {
  Tensor mask = empty(center, {center.numel(), length}, ScalarType::Float);
  const cnm::GaussianMaskParams p{center.numel(), int(length),  data<float>(center),  data<float>(width), float(alpha),
                                  float(min_width), complement, output<float>(mask), nullptr, nullptr, nullptr};
  CNM_DISPATCH(gaussian_mask_forward, p, parallel_for);
  return mask;
}

std::tuple<Tensor, Tensor> gaussian_mask_backward(const Tensor& grad_mask, const Tensor& center, const Tensor& width, double alpha,
                                                  double min_width, bool complement) {
  Tensor grad_center = torch::stable::empty_like(center), grad_width = torch::stable::empty_like(width);
  const cnm::GaussianMaskParams p{center.numel(), int(grad_mask.size(1)), data<float>(center), data<float>(width),
                                  float(alpha), float(min_width), complement, nullptr, data<float>(grad_mask),
                                  output<float>(grad_center), output<float>(grad_width)};
  CNM_DISPATCH(gaussian_mask_backward, p, parallel_for);
  return {grad_center, grad_width};
}

// ---- intra_video_contrastive_loss ----

// Slope of max(x, 0), one half at the kink as torch.max gives.
float hinge_slope(float x) { return x > 0 ? 1.f : x == 0 ? 0.5f : x < 0 ? 0.f : x; }

Tensor intra_video_contrastive_loss_forward(const Tensor& positive, const Tensor& hard, const Tensor& easy, double beta_1,
                                            double beta_2) {
  const float *pos = data<float>(positive), *h = data<float>(hard), *e = data<float>(easy);
  const std::int64_t B = positive.numel();
  const auto hinge = [](float x) { return x > 0 || x != x ? x : 0.f; };
  double to_hard = 0, to_easy = 0;
  for (std::int64_t b = 0; b < B; ++b) {
    to_hard += hinge(pos[b] - h[b] + float(beta_1));
    to_easy += hinge(pos[b] - e[b] + float(beta_2));
  }
  Tensor loss = empty(positive, {}, ScalarType::Float);
  *output<float>(loss) = float(to_hard / double(B)) + float(to_easy / double(B));
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> intra_video_contrastive_loss_backward(
    const Tensor& grad_loss, const Tensor& positive, const Tensor& hard, const Tensor& easy, double beta_1, double beta_2) {
  const float *pos = data<float>(positive), *h = data<float>(hard), *e = data<float>(easy);
  const std::int64_t B = positive.numel();
  Tensor grads[3] = {torch::stable::empty_like(positive), torch::stable::empty_like(hard), torch::stable::empty_like(easy)};
  float *to_positive = output<float>(grads[0]), *to_hard = output<float>(grads[1]), *to_easy = output<float>(grads[2]);
  const float share = B == 0 ? 0.f : *data<float>(grad_loss) / float(B);
  for (std::int64_t b = 0; b < B; ++b) {
    const float hard_slope = hinge_slope(pos[b] - h[b] + float(beta_1)), easy_slope = hinge_slope(pos[b] - e[b] + float(beta_2));
    to_positive[b] = share * (hard_slope + easy_slope);
    to_hard[b] = -share * hard_slope;
    to_easy[b] = -share * easy_slope;
  }
  return {grads[0], grads[1], grads[2]};
}

// ---- weighted_attention, gaussian_attention ----

cnm::AttentionParams attention_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_weight,
    const std::optional<Tensor>& center, const std::optional<Tensor>& width, double alpha, double min_width, bool complement,
    bool causal, const std::optional<Tensor>& key_lengths, double scale) {
  cnm::AttentionParams p{};
  p.dtype = dtype_of(query);
  p.B = int(query.size(0));
  p.H = int(query.size(1));
  p.Lq = int(query.size(2));
  p.d = int(query.size(3));
  p.Lk = int(key.size(2));
  STD_TORCH_CHECK(value.size(2) == p.Lk && key.size(0) == p.B && value.size(0) == p.B && key.size(3) == p.d, "attention: shapes");
  p.causal = causal;
  p.scale = float(scale);
  p.key_lengths = data<std::int64_t>(key_lengths);
  p.key_weight = data<float>(key_weight);
  p.center = data<float>(center);
  p.width = data<float>(width);
  p.alpha = float(alpha);
  p.min_width = float(min_width);
  p.complement = complement;
  p.query = heads(query);
  p.key = heads(key);
  p.value = heads(value);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_weight,
    const std::optional<Tensor>& center, const std::optional<Tensor>& width, double alpha, double min_width, bool complement,
    bool causal, const std::optional<Tensor>& key_lengths, double scale, bool return_weights) {
  cnm::AttentionParams p =
      attention_params(query, key, value, key_weight, center, width, alpha, min_width, complement, causal, key_lengths, scale);
  Tensor out = empty_heads(true, query);
  Tensor stats = empty(query, {p.B, p.H, p.Lq, 2}, ScalarType::Float);
  Tensor weights = empty_if(return_weights, query, {p.B, p.Lq, p.Lk}, ScalarType::Float);
  p.out = heads(out);
  p.stats = output<float>(stats);
  p.weights = output<float>(weights);
  if (out.numel() > 0) CNM_DISPATCH(attention_forward, p, parallel_for);
  return {out, stats, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_weights, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& key_weight, const std::optional<Tensor>& center,
    const std::optional<Tensor>& width, double alpha, double min_width, bool complement, bool causal,
    const std::optional<Tensor>& key_lengths, double scale, const Tensor& stats, bool need_query, bool need_key,
    bool need_value, bool need_weight) {
  cnm::AttentionParams p =
      attention_params(query, key, value, key_weight, center, width, alpha, min_width, complement, causal, key_lengths, scale);
  Tensor grad_query = empty_heads(need_query, query), grad_key = empty_heads(need_key, key),
         grad_value = empty_heads(need_value, value);
  Tensor grad_key_weight = empty_if(need_weight && key_weight.has_value(), query, {p.B, p.Lk}, ScalarType::Float);
  const bool need_gaussian = need_weight && center.has_value();
  Tensor grad_center = empty_if(need_gaussian, query, {p.B}, ScalarType::Float);
  Tensor grad_width = empty_if(need_gaussian, query, {p.B}, ScalarType::Float);
  p.stats = const_cast<float*>(data<float>(stats));
  p.grad_out = heads(grad_out);
  p.grad_weights = data<float>(grad_weights);
  p.grad_query = heads(grad_query);
  p.grad_key = heads(grad_key);
  p.grad_value = heads(grad_value);
  p.grad_key_weight = output<float>(grad_key_weight);
  p.grad_center = output<float>(grad_center);
  p.grad_width = output<float>(grad_width);
  if (p.B > 0) CNM_DISPATCH(attention_backward, p, parallel_for);
  return {grad_query, grad_key, grad_value, need_gaussian ? grad_center : grad_key_weight, grad_width};
}

// ---- linear_nll ----

cnm::LinearNllParams linear_nll_params(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& target,
                                       const Tensor& valid_lengths, double label_smoothing) {
  cnm::LinearNllParams p{};
  p.dtype = dtype_of(hidden);
  p.M = int(hidden.size(0));
  p.L = int(hidden.size(1));
  p.D = int(hidden.size(2));
  p.V = int(weight.size(0));
  STD_TORCH_CHECK(weight.size(1) == p.D && bias.size(0) == p.V && target.numel() == std::int64_t(p.M) * p.L, "linear_nll: shapes");
  p.label_smoothing = float(label_smoothing);
  p.hidden = data(hidden);
  p.weight = data(weight);
  p.bias = data(bias);
  p.target = data<std::int64_t>(target);
  p.valid_lengths = data<std::int64_t>(valid_lengths);
  for (int m = 0; m < p.M; ++m)
    for (std::int64_t t = 0; t < p.L && t < p.valid_lengths[m]; ++t) {
      const std::int64_t y = p.target[std::int64_t(m) * p.L + t];
      STD_TORCH_CHECK(y >= 0 && y < p.V, "linear_nll: target holds ", y, " at row ", m, ", token ", t, ", but the vocabulary has ",
                      p.V, " words");
    }
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_nll_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& target, const Tensor& valid_lengths,
    double label_smoothing, bool want_accuracy, bool want_expected) {
  cnm::LinearNllParams p = linear_nll_params(hidden, weight, bias, target, valid_lengths, label_smoothing);
  Tensor nll = empty(hidden, {p.M}, ScalarType::Float), lse = empty(hidden, {p.M, p.L}, ScalarType::Float);
  Tensor accuracy = empty_if(want_accuracy, hidden, {p.M}, ScalarType::Float);
  Tensor expected = empty_if(want_expected, hidden, {p.M, p.L, p.D}, ScalarType::Float);
  p.nll = output<float>(nll);
  p.lse = output<float>(lse);
  p.accuracy = output<float>(accuracy);
  p.expected = output<float>(expected);
  if (p.M > 0) CNM_DISPATCH(linear_nll_forward, p, parallel_for);
  return {nll, accuracy, lse, expected};
}

std::tuple<Tensor, Tensor, Tensor> linear_nll_backward(
    const Tensor& grad_nll, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& target,
    const Tensor& valid_lengths, double label_smoothing, const Tensor& lse, const Tensor& expected, bool need_hidden,
    bool need_weight, bool need_bias) {
  cnm::LinearNllParams p = linear_nll_params(hidden, weight, bias, target, valid_lengths, label_smoothing);
  Tensor grad_hidden = empty_if(need_hidden, hidden, {p.M, p.L, p.D}, hidden.scalar_type());
  Tensor grad_weight = empty_if(need_weight, weight, {p.V, p.D}, weight.scalar_type());
  Tensor grad_bias = empty_if(need_bias, bias, {p.V}, bias.scalar_type());
  p.grad_nll = data<float>(grad_nll);
  p.lse = const_cast<float*>(data<float>(lse));
  p.expected = expected.numel() == 0 ? nullptr : const_cast<float*>(data<float>(expected));
  p.grad_hidden = output(grad_hidden);
  p.grad_weight = output(grad_weight);
  p.grad_bias = output(grad_bias);
  CNM_DISPATCH(linear_nll_backward, p, parallel_for);
  return {grad_hidden, grad_weight, grad_bias};
}

// ---- dropout, dropout_add_layer_norm ----

cnm::DropoutParams dropout_params(std::int64_t threshold, double scale, const Tensor& seed, std::int64_t offset) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "dropout: seed must be one int64");
  return {static_cast<std::uint64_t>(*static_cast<const std::int64_t*>(seed.const_data_ptr())), static_cast<std::uint64_t>(offset),
          int(threshold), float(scale)};
}

Tensor dropout(const Tensor& x, std::int64_t threshold, double scale, const Tensor& seed, std::int64_t offset) {
  Tensor out = torch::stable::empty_like(x);
  const cnm::ElementwiseDropoutParams p{dtype_of(x), x.numel(), dropout_params(threshold, scale, seed, offset), data(x),
                                        out.mutable_data_ptr()};
  CNM_DISPATCH(dropout, p, parallel_for);
  return out;
}

cnm::LayerNormParams layer_norm_params(const Tensor& x, const Tensor& residual, const Tensor& weight, const cnm::DropoutParams& dropout) {
  cnm::LayerNormParams p{};
  p.dtype = dtype_of(x);
  p.weight_dtype = dtype_of(weight);
  p.D = int(x.size(x.dim() - 1));
  p.N = p.D == 0 ? 0 : x.numel() / p.D;
  p.dropout = dropout;
  p.x = data(x);
  p.residual = data(residual);
  p.weight = data(weight);
  return p;
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm_forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, std::int64_t threshold, double scale,
    const Tensor& seed, std::int64_t offset, double eps) {
  cnm::LayerNormParams p = layer_norm_params(x, residual, weight, dropout_params(threshold, scale, seed, offset));
  Tensor out = torch::stable::empty_like(x), stats = empty(x, {p.N, 2}, ScalarType::Float);
  p.bias = data(bias);
  p.eps = float(eps);
  p.out = output(out);
  p.stats = output<float>(stats);
  CNM_DISPATCH(dropout_add_layer_norm_forward, p, parallel_for);
  return {out, stats};
}

// (grad_x, grad_residual, [gradient of weight, gradient of bias])
std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& stats,
    std::int64_t threshold, double scale, const Tensor& seed, std::int64_t offset, bool need_x, bool need_residual,
    bool need_weight) {
  cnm::LayerNormParams p = layer_norm_params(x, residual, weight, dropout_params(threshold, scale, seed, offset));
  Tensor grad_x = empty_if(need_x, x, {p.N, p.D}, x.scalar_type());
  Tensor grad_residual = empty_if(need_residual, x, {p.N, p.D}, x.scalar_type());
  const std::int64_t blocks = (p.N + cnm::kLayerNormRows - 1) / cnm::kLayerNormRows;
  Tensor partial = empty_if(need_weight, x, {blocks, 2, p.D}, ScalarType::Float);
  Tensor sums = empty_if(need_weight, x, {2, p.D}, ScalarType::Float);
  p.stats = const_cast<float*>(data<float>(stats));
  p.grad_out = data(grad_out);
  p.grad_x = output(grad_x);
  p.grad_residual = output(grad_residual);
  p.partial = output<float>(partial);
  CNM_DISPATCH(dropout_add_layer_norm_backward, p, parallel_for);
  if (need_weight) {
    float* total = static_cast<float*>(sums.mutable_data_ptr());
    for (std::int64_t i = 0; i < 2 * p.D; ++i) total[i] = 0;
    for (std::int64_t block = 0; block < blocks; ++block)
      for (std::int64_t i = 0; i < 2 * p.D; ++i) total[i] += p.partial[block * 2 * p.D + i];
  }
  return {grad_x, grad_residual, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY(cnm_kernels, m) {
  m.def(
      "gaussian_mask_forward(Tensor center, Tensor width, int length, float alpha, float min_width, bool complement) "
      "-> Tensor");
  m.def(
      "gaussian_mask_backward(Tensor grad_mask, Tensor center, Tensor width, float alpha, float min_width, "
      "bool complement) -> (Tensor, Tensor)");
  m.def(
      "intra_video_contrastive_loss_forward(Tensor positive, Tensor hard, Tensor easy, float beta_1, float beta_2) "
      "-> Tensor");
  m.def(
      "intra_video_contrastive_loss_backward(Tensor grad_loss, Tensor positive, Tensor hard, Tensor easy, float beta_1, "
      "float beta_2) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_weight, Tensor? center, Tensor? width, "
      "float alpha, float min_width, bool complement, bool causal, Tensor? key_lengths, float scale, bool return_weights) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, "
      "Tensor? key_weight, Tensor? center, Tensor? width, float alpha, float min_width, bool complement, bool causal, "
      "Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, bool need_value, bool need_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_nll_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
      "float label_smoothing, bool want_accuracy, bool want_expected) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_nll_backward(Tensor grad_nll, Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
      "float label_smoothing, Tensor lse, Tensor expected, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("dropout(Tensor x, int threshold, float scale, Tensor seed, int offset) -> Tensor");
  m.def(
      "dropout_add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, int threshold, float scale, "
      "Tensor seed, int offset, float eps) -> (Tensor, Tensor)");
  m.def(
      "dropout_add_layer_norm_backward(Tensor grad_out, Tensor x, Tensor residual, Tensor weight, Tensor stats, "
      "int threshold, float scale, Tensor seed, int offset, bool need_x, bool need_residual, bool need_weight) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cnm_kernels, CPU, m) {
  m.impl("gaussian_mask_forward", TORCH_BOX(&gaussian_mask_forward));
  m.impl("gaussian_mask_backward", TORCH_BOX(&gaussian_mask_backward));
  m.impl("intra_video_contrastive_loss_forward", TORCH_BOX(&intra_video_contrastive_loss_forward));
  m.impl("intra_video_contrastive_loss_backward", TORCH_BOX(&intra_video_contrastive_loss_backward));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("linear_nll_forward", TORCH_BOX(&linear_nll_forward));
  m.impl("linear_nll_backward", TORCH_BOX(&linear_nll_backward));
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_add_layer_norm_forward", TORCH_BOX(&dropout_add_layer_norm_forward));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&dropout_add_layer_norm_backward));
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(cnm::isa_name(cnm::isa())); }

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set the kernels run on."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu() { return PyModule_Create(&module); }
