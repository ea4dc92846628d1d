// weighted_attention and gaussian_attention on tensors of the device that this is compiled for.
#include <tuple>

#include "attention_arguments.h"

namespace cnm {
namespace {

// Keeps what the kernels point to.
struct Arguments {
    Operands operands;
    Optional key_weight, center, width, key_lengths;
    double alpha, min_width, scale;
    bool complement, causal;

    Arguments(const Tensor& query, const Optional& key, const Optional& value, const Optional& key_weight,
              const Optional& center, const Optional& width, double alpha, double min_width, bool complement,
              bool causal, const Optional& key_lengths, double scale)
        : operands(query, key, value),
          key_weight(floats(key_weight)),
          center(floats(center)),
          width(floats(width)),
          key_lengths(packed(key_lengths)),
          alpha(alpha),
          min_width(min_width),
          scale(scale),
          complement(complement),
          causal(causal) {
        const auto holds = [](const Optional& t, int64_t count) { return !t.has_value() || t->numel() == count; };
        const int64_t B = operands.B;
        STD_TORCH_CHECK(holds(this->key_weight, B * operands.Lk) && holds(this->center, B) && holds(this->width, B) &&
                            holds(this->key_lengths, B) && center.has_value() == width.has_value(),
                        "attention: the key weights or lengths do not fit the keys");
    }

    template <class Params>
    Params params() const {
        Params p{};
        static_cast<AttentionInputs&>(p) = {dtype_of(operands.first),
                                            operands.B,
                                            operands.H,
                                            operands.Lq,
                                            operands.Lk,
                                            operands.d,
                                            operands.query(),
                                            operands.key(),
                                            operands.value(),
                                            causal,
                                            static_cast<float>(scale),
                                            data_or_null<int64_t>(key_lengths),
                                            data_or_null<float>(key_weight),
                                            data_or_null<float>(center),
                                            data_or_null<float>(width),
                                            static_cast<float>(alpha),
                                            static_cast<float>(min_width),
                                            complement};
        return p;
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Optional& key, const Optional& value,
                                           const Optional& key_weight, const Optional& center, const Optional& width,
                                           double alpha, double min_width, bool complement, bool causal,
                                           const Optional& key_lengths, double scale, bool return_weights) {
    const OnDevice device(query);
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionParams>();
    const Tensor out = empty_heads(true, p.B, p.H, p.Lq, p.d, query.scalar_type());
    const Tensor stats = empty({p.B, p.H, p.Lq, 2}, ScalarType::Float);
    const Tensor weights = return_weights ? empty({p.B, p.Lq, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    p.out = heads(out);
    p.stats = stats.mutable_data_ptr<float>();
    p.weights = return_weights ? weights.mutable_data_ptr<float>() : nullptr;
    attention(p);
    return {out, stats, as_type(weights, query.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& d_out, const Optional& d_weights, const Tensor& query, const Optional& key, const Optional& value,
    const Optional& key_weight, const Optional& center, const Optional& width, double alpha, double min_width,
    bool complement, bool causal, const Optional& key_lengths, double scale, const Tensor& stats, bool need_query,
    bool need_key, bool need_value, bool need_weight) {
    const OnDevice device(query);
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionBackwardParams>();
    const Tensor upstream = with_rows(d_out, 4), kept = packed(stats);
    const Optional upstream_weights = floats(d_weights);
    const auto gradients = arguments.operands.gradients(need_query, need_key, need_value);
    const OperandGradients places(arguments.operands, gradients, need_query, need_key, need_value);
    const bool need_gaussian = need_weight && center.has_value(), need_given = need_weight && key_weight.has_value();
    const Tensor d_key_weight = need_given ? empty({p.B, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    const Tensor d_center = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    const Tensor d_width = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    p.d_out = heads(upstream);
    p.d_weights = data_or_null<float>(upstream_weights);
    p.stats = kept.const_data_ptr<float>();
    p.d_query = places.query;
    p.d_key = places.key;
    p.d_value = places.value;
    p.d_key_weight = need_given ? d_key_weight.mutable_data_ptr<float>() : nullptr;
    p.d_center = need_gaussian ? d_center.mutable_data_ptr<float>() : nullptr;
    p.d_width = need_gaussian ? d_width.mutable_data_ptr<float>() : nullptr;
    attention_backward(p);
    const auto like = [](const Tensor& gradient, const Optional& input) {
        return input.has_value() ? as_type(gradient, input->scalar_type()) : gradient;
    };
    return {gradients[0],           gradients[1],        gradients[2], like(d_key_weight, key_weight),
            like(d_center, center), like(d_width, width)};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "attention(Tensor query, Tensor? key, Tensor? value, Tensor? key_weight, Tensor? center, Tensor? width, "
        "float alpha, float min_width, bool complement, bool causal, Tensor? key_lengths, float scale, "
        "bool return_weights) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor d_out, Tensor? d_weights, Tensor query, Tensor? key, Tensor? value, "
        "Tensor? key_weight, Tensor? center, Tensor? width, float alpha, float min_width, bool complement, "
        "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, "
        "bool need_value, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("attention", TORCH_BOX(&cnm::forward));
    m.impl("attention_backward", TORCH_BOX(&cnm::backward));
}
