// dropout on tensors of the device that this is compiled for.
#include "dropout.h"

#include "tensors.h"

namespace cnm {
namespace {

Tensor forward(const Tensor& x, double p, const Tensor& seed, int64_t offset) {
    const OnDevice device(x);
    const Tensor in = packed(x);
    Tensor out = empty_as(x, x.scalar_type());
    dropout({in.const_data_ptr(), out.mutable_data_ptr(), dtype_of(in), in.numel(), p,
             packed(seed).const_data_ptr<int64_t>(), offset});
    return out;
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) { m.def("dropout(Tensor x, float p, Tensor seed, int offset) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) { m.impl("dropout", TORCH_BOX(&cnm::forward)); }
