// dropout on CPU tensors.
#include "dropout.h"

#include "tensors.h"

namespace cnm {
namespace {

Tensor forward(const Tensor& x, double p, const Tensor& seed, int64_t offset) {
    const Tensor in = packed(x), out = empty_as(x, x.scalar_type());
    dropout({in.const_data_ptr(), out.mutable_data_ptr(), dtype_of(in), in.numel(), p, *seed.const_data_ptr<int64_t>(),
             offset});
    return out;
}

}  // namespace
}  // namespace cnm

STABLE_TORCH_LIBRARY_IMPL(cnm_kernels, CPU, m) { m.impl("dropout", TORCH_BOX(&cnm::forward)); }
