// linear on CPU tensors.
#include "linear.h"

#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

// A tensor [..., width] as rows a fixed number of elements apart; a copy where its strides do not allow it.
struct RowsOf {
    Tensor tensor;
    int64_t rows, ld;

    RowsOf(const Tensor& given, int64_t width) : tensor(given) {
        const int64_t dim = given.dim();
        STD_TORCH_CHECK(dim >= 1 && given.size(dim - 1) == width, "linear: expected rows of ", width);
        rows = 1;
        for (int64_t axis = 0; axis + 1 < dim; ++axis) rows *= given.size(axis);
        ld = dim >= 2 ? given.stride(dim - 2) : width;
        bool regular = width <= 1 || given.stride(dim - 1) == 1;
        for (int64_t axis = dim - 3, expected = dim >= 2 ? ld * given.size(dim - 2) : 0; axis >= 0; --axis) {
            regular = regular && (given.size(axis) == 1 || given.stride(axis) == expected);
            expected *= given.size(axis);
        }
        if (regular && ld >= width) return;
        tensor = torch::stable::contiguous(given);
        ld = width;
    }
};

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
    const Tensor w = packed(weight);
    STD_TORCH_CHECK(w.dim() == 2, "linear: expected a weight of 2 dimensions");
    const int64_t M = w.size(0), K = w.size(1);
    const RowsOf rows(x, K);
    const std::optional<Tensor> b = floats(bias);
    STD_TORCH_CHECK(!b.has_value() || b->numel() == M, "linear: weight and bias do not fit");
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = M;
    const Tensor out = empty(sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type());
    linear({dtype_of(x), dtype_of(w), rows.rows, M, K, rows.tensor.const_data_ptr(), rows.ld, w.const_data_ptr(),
            data_or_null<float>(b), out.mutable_data_ptr(), relu});
    return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& out, bool need_x, bool need_weight,
                                            bool need_bias) {
    const Tensor w = packed(weight);
    const int64_t M = w.size(0), K = w.size(1);
    const RowsOf upstream(d_out, M), rows(x, K);
    const std::optional<Tensor> y = packed(out);
    const Tensor d_x = need_x ? empty_as(x, x.scalar_type()) : empty({0}, x.scalar_type());
    const Tensor d_weight = need_weight ? empty_as(w, w.scalar_type()) : empty({0}, w.scalar_type());
    const Tensor d_bias = empty({need_bias ? M : 0}, ScalarType::Float);
    linear_backward({dtype_of(x), dtype_of(w), rows.rows, M, K, upstream.tensor.const_data_ptr(), upstream.ld,
                     y.has_value() ? y->const_data_ptr() : nullptr, rows.tensor.const_data_ptr(), rows.ld,
                     w.const_data_ptr(), need_x ? d_x.mutable_data_ptr() : nullptr,
                     need_weight ? d_weight.mutable_data_ptr() : nullptr,
                     need_bias ? d_bias.mutable_data_ptr<float>() : nullptr});
    return {d_x, d_weight, as_type(d_bias, w.scalar_type())};
}

}  // namespace
}  // namespace cnm

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("linear", TORCH_BOX(&cnm::forward));
    m.impl("linear_backward", TORCH_BOX(&cnm::backward));
}
