// dropout_add_layer_norm on tensors of the device that this is compiled for.
#include "dropout_add_layer_norm.h"

#include <optional>
#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

int64_t rows_of_sample(int64_t rows, const std::optional<Tensor>& sample_indices) {
    return sample_indices && sample_indices->numel() > 0 ? rows / sample_indices->numel() : 1;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                   double p, const Tensor& seed, int64_t offset, double eps,
                                   const std::optional<Tensor>& sample_indices) {
    const OnDevice device(x);
    const Tensor in = packed(x), r = packed(residual), w = floats(weight), b = floats(bias);
    const int64_t D = w.numel(), rows = D == 0 ? 0 : in.numel() / D;
    std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
    const std::optional<Tensor> indices = packed(sample_indices);
#if !defined(CNM_CUDA)  // reading indices on a GPU would synchronise
    for (int64_t i = 0; indices && i < indices->numel(); ++i) {
        const int64_t index = indices->const_data_ptr<int64_t>()[i];
        STD_TORCH_CHECK(index >= 0, "dropout_add_layer_norm: sample_indices must be >= 0, got ", index, " for sample ",
                        i);
    }
#endif
    const Tensor out = empty_as(in, in.scalar_type());
    sizes.back() = 2;
    const Tensor stats = empty(sizes.data(), static_cast<int64_t>(sizes.size()), ScalarType::Float);
    dropout_add_layer_norm({in.const_data_ptr(), r.const_data_ptr(), w.const_data_ptr<float>(),
                            b.const_data_ptr<float>(), out.mutable_data_ptr(), stats.mutable_data_ptr<float>(),
                            dtype_of(in), rows, D, p, packed(seed).const_data_ptr<int64_t>(), offset,
                            static_cast<float>(eps), data_or_null<int64_t>(indices), rows_of_sample(rows, indices)});
    return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& d_again,
                                                    const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                    const Tensor& stats, double p, const Tensor& seed, int64_t offset,
                                                    const std::optional<Tensor>& sample_indices, bool need_x,
                                                    bool need_residual, bool need_weights) {
    const OnDevice device(x);
    const Tensor d = packed(d_out), in = packed(x), r = packed(residual), w = floats(weight), kept = packed(stats);
    const int64_t D = w.numel(), rows = D == 0 ? 0 : in.numel() / D;
    const std::optional<Tensor> indices = packed(sample_indices), again = packed(d_again);
    const Tensor d_x = need_x ? empty_as(in, in.scalar_type()) : empty({0}, in.scalar_type());
    const Tensor d_residual = need_residual ? empty_as(in, in.scalar_type()) : empty({0}, in.scalar_type());
    const Tensor d_weight = empty({need_weights ? D : 0}, ScalarType::Float);
    const Tensor d_bias = empty({need_weights ? D : 0}, ScalarType::Float);
    const Tensor partial = empty({need_weights ? layer_norm_chunks(rows, D) * 2 * D : 0}, ScalarType::Float);
    float none[1];  // stands for a scratch of no chunks, which is wanted all the same
    float* scratch = rows == 0 ? none : partial.mutable_data_ptr<float>();
    dropout_add_layer_norm_backward(
        {d.const_data_ptr(), again ? again->const_data_ptr() : nullptr, in.const_data_ptr(), r.const_data_ptr(),
         w.const_data_ptr<float>(), kept.const_data_ptr<float>(), need_x ? d_x.mutable_data_ptr() : nullptr,
         need_residual ? d_residual.mutable_data_ptr() : nullptr, need_weights ? scratch : nullptr,
         d_weight.mutable_data_ptr<float>(), d_bias.mutable_data_ptr<float>(), dtype_of(in), rows, D, p,
         packed(seed).const_data_ptr<int64_t>(), offset, data_or_null<int64_t>(indices),
         rows_of_sample(rows, indices)});
    return {d_x, d_residual, as_type(d_weight, weight.scalar_type()), d_bias};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float p, Tensor seed, "
        "int offset, float eps, Tensor? sample_indices) -> (Tensor, Tensor)");
    m.def(
        "dropout_add_layer_norm_backward(Tensor d_out, Tensor? d_again, Tensor x, Tensor residual, Tensor weight, "
        "Tensor stats, float p, Tensor seed, int offset, Tensor? sample_indices, bool need_x, bool need_residual, "
        "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("dropout_add_layer_norm", TORCH_BOX(&cnm::forward));
    m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&cnm::backward));
}
