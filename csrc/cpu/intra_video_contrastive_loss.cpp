// mean relu(positive - hard + beta_1) + mean relu(positive - easy + beta_2), with the gradient 1/2 at a kink, as
// torch.maximum gives. A batch is a few hundred numbers: one thread, one pass, NaN passing through.
#include "intra_video_contrastive_loss.h"

#include "simd.h"

namespace cnm::CNM_ISA {
namespace {

inline Vec margin(Vec positive, Vec negative, float beta) { return positive - negative + set1(beta); }

// 0 below the kink, 1 above it and at NaN, 1/2 at it.
inline Vec slope(Vec margin) {
    const Vec from_zero_on = select(at_most(margin, set1(0)), set1(0.5f), set1(1));
    return select(less(margin, set1(0)), set1(0), from_zero_on);
}

template <class T>
void forward(const IntraVideoContrastiveLossParams& p) {
    const T *positive = static_cast<const T*>(p.positive), *hard = static_cast<const T*>(p.hard);
    const T* easy = static_cast<const T*>(p.easy);
    Vec hard_sum = set1(0), easy_sum = set1(0);
    for (int64_t i = 0; i < p.B; i += W) {
        const int64_t n = p.B - i;
        const Mask inside = first_n(n < W ? static_cast<int>(n) : W);
        const Vec v = load_tail(positive + i, n);
        hard_sum += select(inside, vmax(set1(0), margin(v, load_tail(hard + i, n), p.beta_1)), set1(0));
        easy_sum += select(inside, vmax(set1(0), margin(v, load_tail(easy + i, n), p.beta_2)), set1(0));
    }
    *p.loss = hsum(hard_sum) / static_cast<float>(p.B) + hsum(easy_sum) / static_cast<float>(p.B);
}

template <class T>
void backward(const IntraVideoContrastiveLossBackwardParams& p) {
    const T *positive = static_cast<const T*>(p.positive), *hard = static_cast<const T*>(p.hard);
    const T* easy = static_cast<const T*>(p.easy);
    const Vec share = set1(*p.d_loss / static_cast<float>(p.B));
    for (int64_t i = 0; i < p.B; i += W) {
        const int64_t n = p.B - i;
        const Vec v = load_tail(positive + i, n);
        const Vec to_hard = share * slope(margin(v, load_tail(hard + i, n), p.beta_1));
        const Vec to_easy = share * slope(margin(v, load_tail(easy + i, n), p.beta_2));
        store_tail(static_cast<T*>(p.d_positive) + i, to_hard + to_easy, n);
        store_tail(static_cast<T*>(p.d_hard) + i, -to_hard, n);
        store_tail(static_cast<T*>(p.d_easy) + i, -to_easy, n);
    }
}

}  // namespace

void intra_video_contrastive_loss(const IntraVideoContrastiveLossParams& p) {
    with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void intra_video_contrastive_loss_backward(const IntraVideoContrastiveLossBackwardParams& p) {
    with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace cnm::CNM_ISA
