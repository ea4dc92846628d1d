// gaussian_mask on tensors of the device that this is compiled for.
#include "gaussian_mask.h"

#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

Tensor forward(const Tensor& center, const Tensor& width, int64_t length, double alpha, double min_width,
               bool complement, bool normalized) {
    const OnDevice device(center);
    const Tensor c = packed(center), w = packed(width);
    std::vector<int64_t> sizes(c.sizes().begin(), c.sizes().end());
    sizes.push_back(length);
    Tensor out = empty(sizes.data(), static_cast<int64_t>(sizes.size()), c.scalar_type());
    gaussian_mask({c.const_data_ptr(), w.const_data_ptr(), out.mutable_data_ptr(), dtype_of(c), c.numel(), length,
                   static_cast<float>(alpha), static_cast<float>(min_width), complement, normalized});
    return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& d_out, const Tensor& center, const Tensor& width, double alpha,
                                    double min_width, bool complement, bool normalized) {
    const OnDevice device(center);
    const Tensor d = packed(d_out), c = packed(center), w = packed(width);
    const Tensor d_center = empty_as(c, c.scalar_type()), d_width = empty_as(w, w.scalar_type());
    gaussian_mask_backward({d.const_data_ptr(), c.const_data_ptr(), w.const_data_ptr(), d_center.mutable_data_ptr(),
                            d_width.mutable_data_ptr(), dtype_of(c), c.numel(), d.size(d.dim() - 1),
                            static_cast<float>(alpha), static_cast<float>(min_width), complement, normalized});
    return {d_center, d_width};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "gaussian_mask(Tensor center, Tensor width, int length, float alpha, float min_width, bool complement, "
        "bool normalized) -> Tensor");
    m.def(
        "gaussian_mask_backward(Tensor d_out, Tensor center, Tensor width, float alpha, float min_width, "
        "bool complement, bool normalized) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("gaussian_mask", TORCH_BOX(&cnm::forward));
    m.impl("gaussian_mask_backward", TORCH_BOX(&cnm::backward));
}
