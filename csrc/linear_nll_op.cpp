// linear_nll: schemas and binding. This file is compiled once for each device.
#include "linear_nll.h"

#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

// Owns the tensors whose memory the kernels read.
struct Arguments {
    Tensor hidden, weight, bias, target, valid_lengths;
    double label_smoothing;

    Arguments(const Tensor& h, const Tensor& w, const Tensor& b, const Tensor& y, const Tensor& n, double smoothing)
        : hidden(packed(h)),
          weight(packed(as_type(w, h.scalar_type()))),
          bias(floats(b)),
          target(packed(y)),
          valid_lengths(packed(n)),
          label_smoothing(smoothing) {
        const int64_t M = h.size(0), L = h.size(1), V = w.size(0);
        STD_TORCH_CHECK(w.size(1) == h.size(2) && b.numel() == V && y.numel() == M * L && n.numel() == M,
                        "linear_nll: hidden, weight, bias, target and valid_lengths do not fit");
        STD_TORCH_CHECK(V < (1 << 24), "linear_nll: at most 2^24 words, got ", V);
#if defined(CNM_CUDA)  // which counts tokens in float32
        STD_TORCH_CHECK(M * L <= (1 << 24), "linear_nll: GPUs take at most 2^24 tokens at once, got ", M * L,
                        ": split the batch");
#else  // reading words on a GPU would synchronise; its kernels give NaN for wrong words
        const LinearNllInputs p = params<LinearNllInputs>();
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t t = 0; t < p.valid(m); ++t) {
                const int64_t word = p.target[m * L + t];
                STD_TORCH_CHECK(word >= 0 && word < V, "linear_nll: target holds ", word, " at row ", m, ", token ", t,
                                ", but the vocabulary has ", V, " words");
            }
        }
#endif
    }

    template <class Params>
    Params params() const {
        Params p{};
        static_cast<LinearNllInputs&>(p) = {dtype_of(hidden),
                                            hidden.size(0),
                                            hidden.size(1),
                                            hidden.size(2),
                                            weight.size(0),
                                            static_cast<float>(label_smoothing),
                                            hidden.const_data_ptr(),
                                            weight.const_data_ptr(),
                                            bias.const_data_ptr<float>(),
                                            target.const_data_ptr<int64_t>(),
                                            valid_lengths.const_data_ptr<int64_t>()};
        return p;
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                                   const Tensor& target, const Tensor& valid_lengths,
                                                   double label_smoothing, bool return_accuracy, bool keep_expected) {
    const OnDevice device(hidden);
    const Arguments arguments(hidden, weight, bias, target, valid_lengths, label_smoothing);
    auto p = arguments.params<LinearNllParams>();
    const Tensor nll = empty({p.M}, ScalarType::Float), stats = empty({2, p.M, p.L}, ScalarType::Float);
    const Tensor accuracy = empty({return_accuracy ? p.M : 0}, ScalarType::Float);
    const Tensor expected = keep_expected ? empty({p.M, p.L, p.D}, ScalarType::Float) : empty({0}, ScalarType::Float);
    p.nll = nll.mutable_data_ptr<float>();
    p.accuracy = return_accuracy ? accuracy.mutable_data_ptr<float>() : nullptr;
    p.stats = stats.mutable_data_ptr<float>();
    p.expected = keep_expected ? expected.mutable_data_ptr<float>() : nullptr;
    linear_nll(p);
    return {nll, accuracy, stats, expected};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_nll, const Tensor& hidden, const Tensor& weight,
                                            const Tensor& bias, const Tensor& target, const Tensor& valid_lengths,
                                            double label_smoothing, const Tensor& stats, const Tensor& expected,
                                            bool need_hidden, bool need_weight, bool need_bias) {
    const OnDevice device(hidden);
    const Arguments arguments(hidden, weight, bias, target, valid_lengths, label_smoothing);
#if defined(CNM_CUDA)  // which computes no logits for it
    STD_TORCH_CHECK(!need_hidden || expected.numel() == hidden.numel(),
                    "linear_nll: hidden's gradient needs what a forward with keep_expected keeps");
#endif
    auto p = arguments.params<LinearNllBackwardParams>();
    const Tensor upstream = floats(d_nll), kept_stats = packed(stats), kept_expected = packed(expected);
    const auto like = [](bool wanted, const Tensor& tensor) {
        return wanted ? empty_as(tensor, tensor.scalar_type()) : empty({0}, tensor.scalar_type());
    };
    const Tensor d_hidden = like(need_hidden, hidden), d_weight = like(need_weight, weight);
    const Tensor d_bias = empty({need_bias ? p.V : 0}, ScalarType::Float);
    p.d_nll = upstream.const_data_ptr<float>();
    p.stats = kept_stats.const_data_ptr<float>();
    p.expected = expected.numel() == 0 ? nullptr : kept_expected.const_data_ptr<float>();
    p.d_hidden = need_hidden ? d_hidden.mutable_data_ptr() : nullptr;
    p.d_weight = need_weight ? d_weight.mutable_data_ptr() : nullptr;
    p.d_bias = need_bias ? d_bias.mutable_data_ptr<float>() : nullptr;
    p.d_weight_dtype = dtype_of(weight);
    linear_nll_backward(p);
    return {d_hidden, d_weight, as_type(d_bias, bias.scalar_type())};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "linear_nll(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
        "float label_smoothing, bool return_accuracy, bool keep_expected) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_nll_backward(Tensor d_nll, Tensor hidden, Tensor weight, Tensor bias, Tensor target, "
        "Tensor valid_lengths, float label_smoothing, Tensor stats, Tensor expected, bool need_hidden, "
        "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("linear_nll", TORCH_BOX(&cnm::forward));
    m.impl("linear_nll_backward", TORCH_BOX(&cnm::backward));
}
