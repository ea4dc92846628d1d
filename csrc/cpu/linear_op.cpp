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

// A weight [M, K], or [G, M, K] for groups of columns, in the strides that the kernels take: a copy where it has
// others.
struct Weight {
    Tensor tensor;
    int64_t G, M, K, group, row, column;

    explicit Weight(const Tensor& given) : tensor(given) {
        const int64_t dim = given.dim();
        STD_TORCH_CHECK(dim == 2 || dim == 3, "linear: expected a weight of 2 or 3 dimensions");
        if (given.stride(dim - 1) != 1 && given.stride(dim - 2) != 1) tensor = torch::stable::contiguous(given);
        G = dim == 3 ? given.size(0) : 1;
        M = given.size(dim - 2);
        K = given.size(dim - 1);
        group = dim == 3 ? tensor.stride(0) : 0;
        row = tensor.stride(dim - 2);
        column = tensor.stride(dim - 1);
        if (column != 1 && row != 1) row = K, column = 1;  // nothing there, or one number
    }
};

// Keeps what the kernels point to.
struct Arguments {
    Weight weight;
    RowsOf x;
    std::optional<Tensor> lengths;

    Arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& lengths)
        : weight(weight),
          x(weight.dim() == 3 ? columns_together(x, this->weight) : x, this->weight.G * this->weight.K),
          lengths(packed(lengths)) {
        STD_TORCH_CHECK(!lengths.has_value() || (x.dim() >= 3 && lengths->numel() == x.size(0)),
                        "linear: the lengths do not fit x");
    }

    // [..., G, C] as [..., G C]
    static Tensor columns_together(const Tensor& given, const Weight& weight) {
        const int64_t dim = given.dim();
        STD_TORCH_CHECK(dim >= 2 && given.size(dim - 2) == weight.G, "linear: expected ", weight.G, " groups");
        return torch::stable::flatten(given, dim - 2, dim - 1);
    }

    template <class Params>
    Params params(const Tensor& given, bool split) const {
        Params p{};
        const int64_t samples = lengths.has_value() ? lengths->numel() : 0;
        static_cast<LinearInputs&>(p) = {dtype_of(given),
                                         dtype_of(weight.tensor),
                                         x.rows,
                                         weight.G,
                                         weight.M,
                                         weight.K,
                                         x.tensor.const_data_ptr(),
                                         x.ld,
                                         weight.tensor.const_data_ptr(),
                                         weight.group,
                                         weight.row,
                                         weight.column,
                                         data_or_null<int64_t>(lengths),
                                         samples == 0 ? 0 : x.rows / samples,
                                         split};
        return p;
    }
};

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
               const std::optional<Tensor>& lengths, bool split) {
    const Arguments arguments(x, weight, lengths);
    auto p = arguments.params<LinearParams>(x, split);
    const std::optional<Tensor> b = floats(bias);
    STD_TORCH_CHECK(!b.has_value() || b->numel() == p.G * p.M, "linear: weight and bias do not fit");
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = p.M;
    Tensor out = empty(sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type());
    p.bias = data_or_null<float>(b);
    p.out = out.mutable_data_ptr();
    p.relu = relu;
    linear(p);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& given_x,
                                            const Tensor& weight, const std::optional<Tensor>& out,
                                            const std::optional<Tensor>& lengths, bool split, bool need_x,
                                            bool need_weight, bool need_bias) {
    STD_TORCH_CHECK(given_x.has_value() || !need_weight, "linear: the gradient of the weight needs x");
    std::vector<int64_t> sizes(d_out.sizes().begin(), d_out.sizes().end());
    sizes.back() = weight.size(weight.dim() - 1);
    const auto like_x = [&] { return empty(sizes.data(), static_cast<int64_t>(sizes.size()), d_out.scalar_type()); };
    const Tensor d_x = need_x ? like_x() : empty({0}, d_out.scalar_type());
    const Tensor x = given_x.has_value() ? *given_x
                     : need_x            ? d_x
                                         : like_x();  // if not given, its sizes alone are read
    const Arguments arguments(x, weight, lengths);
    auto p = arguments.params<LinearBackwardParams>(x, split);
    const bool grouped = weight.dim() == 3;
    const RowsOf upstream(grouped ? Arguments::columns_together(d_out, arguments.weight) : d_out, p.G * p.M);
    const std::optional<Tensor> y = packed(out);
    const ScalarType type = weight.scalar_type();
    const Tensor d_weight = need_weight ? empty_as(weight, type) : empty({0}, type);
    const Tensor d_bias = !need_bias ? empty({0}, ScalarType::Float)
                          : grouped  ? empty({p.G, p.M}, ScalarType::Float)
                                     : empty({p.M}, ScalarType::Float);
    p.d_out = upstream.tensor.const_data_ptr();
    p.d_out_ld = upstream.ld;
    p.out = y.has_value() ? y->const_data_ptr() : nullptr;
    p.d_x = need_x ? d_x.mutable_data_ptr() : nullptr;
    p.d_weight = need_weight ? d_weight.mutable_data_ptr() : nullptr;
    p.d_bias = need_bias ? d_bias.mutable_data_ptr<float>() : nullptr;
    linear_backward(p);
    return {d_x, d_weight, d_bias};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool relu, Tensor? lengths, bool split) -> Tensor");
    m.def(
        "linear_backward(Tensor d_out, Tensor? x, Tensor weight, Tensor? out, Tensor? lengths, bool split, "
        "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("linear", TORCH_BOX(&cnm::forward));
    m.impl("linear_backward", TORCH_BOX(&cnm::backward));
}
