// weighted_attention and gaussian_attention on CPU tensors.
#include "attention.h"

#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

using Optional = std::optional<Tensor>;

// The kernels take any strides but the last.
Tensor with_rows(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4, "attention: expected a tensor of 4 dimensions, got ", tensor.dim());
    return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// [B, H, L, d] in memory as [B, L, H, d], which is what the projections around the attention want.
Tensor empty_heads(bool wanted, const Tensor& like) {
    if (!wanted) return empty({0}, like.scalar_type());
    const int64_t B = like.size(0), H = like.size(1), L = like.size(2), d = like.size(3);
    const int64_t sizes[] = {B, H, L, d}, strides[] = {L * H * d, d, H * d, 1};
    return empty_strided(sizes, strides, 4, like.scalar_type());
}

Heads heads(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Keeps what the kernels point to.
struct Arguments {
    Tensor query, key, value;
    Optional key_weight, center, width, key_lengths;
    double alpha, min_width, scale;
    bool complement, causal;

    Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& key_weight, const Optional& center,
              const Optional& width, double alpha, double min_width, bool complement, bool causal,
              const Optional& key_lengths, double scale)
        : query(with_rows(q)), key(with_rows(k)), value(with_rows(v)), key_weight(floats(key_weight)),
          center(floats(center)), width(floats(width)), key_lengths(packed(key_lengths)), alpha(alpha),
          min_width(min_width), scale(scale), complement(complement), causal(causal) {
        const int64_t B = q.size(0), Lk = k.size(2);
        for (const Tensor* other : {&key, &value}) {
            STD_TORCH_CHECK(other->size(0) == B && other->size(1) == q.size(1) && other->size(2) == Lk &&
                                other->size(3) == q.size(3) && other->scalar_type() == q.scalar_type(),
                            "attention: query, key and value do not fit");
        }
        const auto holds = [](const Optional& t, int64_t count) { return !t.has_value() || t->numel() == count; };
        STD_TORCH_CHECK(holds(this->key_weight, B * Lk) && holds(this->center, B) && holds(this->width, B) &&
                            holds(this->key_lengths, B) && center.has_value() == width.has_value(),
                        "attention: the key weights or lengths do not fit the keys");
    }

    template <class Params>
    Params params() const {
        Params p{};
        static_cast<AttentionInputs&>(p) = {dtype_of(query),
                                            query.size(0),
                                            query.size(1),
                                            query.size(2),
                                            key.size(2),
                                            query.size(3),
                                            heads(query),
                                            heads(key),
                                            heads(value),
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

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Optional& key_weight, const Optional& center, const Optional& width,
                                           double alpha, double min_width, bool complement, bool causal,
                                           const Optional& key_lengths, double scale, bool return_weights) {
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionParams>();
    const Tensor out = empty_heads(true, query), stats = empty({p.B, p.H, p.Lq, 2}, ScalarType::Float);
    const Tensor weights =
        return_weights ? empty({p.B, p.Lq, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    p.out = heads(out);
    p.stats = stats.mutable_data_ptr<float>();
    p.weights = return_weights ? weights.mutable_data_ptr<float>() : nullptr;
    attention(p);
    return {out, stats, as_type(weights, query.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& d_out, const Optional& d_weights, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& key_weight, const Optional& center, const Optional& width, double alpha, double min_width,
    bool complement, bool causal, const Optional& key_lengths, double scale, const Tensor& stats, bool need_query,
    bool need_key, bool need_value, bool need_weight) {
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionBackwardParams>();
    const Tensor upstream = with_rows(d_out);
    const Optional upstream_weights = floats(d_weights);
    const Tensor d_query = empty_heads(need_query, query), d_key = empty_heads(need_key, key);
    const Tensor d_value = empty_heads(need_value, value);
    const bool need_gaussian = need_weight && center.has_value(), need_given = need_weight && key_weight.has_value();
    const Tensor d_key_weight = need_given ? empty({p.B, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    const Tensor d_center = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    const Tensor d_width = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    p.d_out = heads(upstream);
    p.d_weights = data_or_null<float>(upstream_weights);
    p.stats = stats.const_data_ptr<float>();
    p.d_query = heads(d_query);
    p.d_key = heads(d_key);
    p.d_value = heads(d_value);
    p.d_key_weight = need_given ? d_key_weight.mutable_data_ptr<float>() : nullptr;
    p.d_center = need_gaussian ? d_center.mutable_data_ptr<float>() : nullptr;
    p.d_width = need_gaussian ? d_width.mutable_data_ptr<float>() : nullptr;
    attention_backward(p);
    const auto like = [](const Tensor& gradient, const Optional& input) {
        return input.has_value() ? as_type(gradient, input->scalar_type()) : gradient;
    };
    return {d_query, d_key, d_value, like(d_key_weight, key_weight), like(d_center, center), like(d_width, width)};
}

}  // namespace
}  // namespace cnm

STABLE_TORCH_LIBRARY_IMPL(cnm_kernels, CPU, m) {
    m.impl("attention", TORCH_BOX(&cnm::forward));
    m.impl("attention_backward", TORCH_BOX(&cnm::backward));
}
