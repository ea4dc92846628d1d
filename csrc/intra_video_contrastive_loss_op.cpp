// intra_video_contrastive_loss on tensors of the device that this is compiled for.
#include "intra_video_contrastive_loss.h"

#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

Tensor forward(const Tensor& positive, const Tensor& hard, const Tensor& easy, double beta_1, double beta_2) {
    const OnDevice device(positive);
    const Tensor p = packed(positive), h = packed(hard), e = packed(easy);
    Tensor loss = empty({}, ScalarType::Float);
    intra_video_contrastive_loss({p.const_data_ptr(), h.const_data_ptr(), e.const_data_ptr(), dtype_of(p), p.numel(),
                                  static_cast<float>(beta_1), static_cast<float>(beta_2),
                                  loss.mutable_data_ptr<float>()});
    return loss;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_loss, const Tensor& positive, const Tensor& hard,
                                            const Tensor& easy, double beta_1, double beta_2) {
    const OnDevice device(positive);
    const Tensor p = packed(positive), h = packed(hard), e = packed(easy);
    const ScalarType type = p.scalar_type();
    const Tensor d_positive = empty_as(p, type), d_hard = empty_as(h, type), d_easy = empty_as(e, type);
    intra_video_contrastive_loss_backward(
        {floats(d_loss).const_data_ptr<float>(), p.const_data_ptr(), h.const_data_ptr(), e.const_data_ptr(),
         dtype_of(p), p.numel(), static_cast<float>(beta_1), static_cast<float>(beta_2), d_positive.mutable_data_ptr(),
         d_hard.mutable_data_ptr(), d_easy.mutable_data_ptr()});
    return {d_positive, d_hard, d_easy};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "intra_video_contrastive_loss(Tensor positive, Tensor hard, Tensor easy, float beta_1, float beta_2) "
        "-> Tensor");
    m.def(
        "intra_video_contrastive_loss_backward(Tensor d_loss, Tensor positive, Tensor hard, Tensor easy, "
        "float beta_1, float beta_2) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("intra_video_contrastive_loss", TORCH_BOX(&cnm::forward));
    m.impl("intra_video_contrastive_loss_backward", TORCH_BOX(&cnm::backward));
}
