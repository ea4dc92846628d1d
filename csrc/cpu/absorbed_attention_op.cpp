// absorbed_attention on CPU tensors.
#include "absorbed_attention.h"

#include <tuple>

#include "attention_arguments.h"

namespace cnm {
namespace {

// [B, L, D] as one head.
inline Heads rows_of(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), 0, tensor.stride(1)};
}

// Keeps what the kernels point to.
struct Arguments {
    Tensor query, key;
    Optional value, key_bias, key_weight, query_lengths, key_lengths;
    double scale;

    Arguments(const Tensor& query, const Tensor& key, const Optional& value, const Optional& key_bias,
              const Optional& key_weight, const Optional& query_lengths, const Optional& key_lengths, double scale)
        : query(with_rows(query, 3)),
          key(with_rows(key, 4)),
          key_bias(floats(key_bias)),
          key_weight(floats(key_weight)),
          query_lengths(packed(query_lengths)),
          key_lengths(packed(key_lengths)),
          scale(scale) {
        if (value.has_value()) this->value = with_rows(*value, 4);
        const int64_t B = query.size(0), H = key.size(1), Lk = key.size(2), D = query.size(2);
        const auto holds = [](const Optional& t, int64_t count) { return !t.has_value() || t->numel() == count; };
        STD_TORCH_CHECK(key.numel() == B * H * Lk * D && holds(value, B * H * Lk * D) && holds(key_bias, B * H * Lk) &&
                            holds(key_weight, B * Lk) && holds(query_lengths, B) && holds(key_lengths, B),
                        "absorbed_attention: query, keys, values and lengths do not fit");
        STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() &&
                            (!value.has_value() || value->scalar_type() == query.scalar_type()),
                        "absorbed_attention: query, key and value differ in dtype");
    }

    template <class Params>
    Params params() const {
        Params p{};
        static_cast<AbsorbedAttentionInputs&>(p) = {dtype_of(query),
                                                    query.size(0),
                                                    key.size(1),
                                                    query.size(1),
                                                    key.size(2),
                                                    query.size(2),
                                                    rows_of(query),
                                                    heads(key),
                                                    value.has_value() ? heads(*value) : Heads{},
                                                    static_cast<float>(scale),
                                                    data_or_null<int64_t>(query_lengths),
                                                    data_or_null<int64_t>(key_lengths),
                                                    data_or_null<float>(key_bias),
                                                    data_or_null<float>(key_weight)};
        return p;
    }
};

// [B, H, L, D] in memory as [B, L, H, D], as linear wants the gradients of what it made.
Tensor like_keys(bool wanted, const AbsorbedAttentionInputs& p, ScalarType type) {
    return empty_heads(wanted, p.B, p.H, p.Lk, p.D, type);
}

Tensor forward(const Tensor& query, const Tensor& key, const Optional& value, const Optional& key_bias,
               const Optional& key_weight, const Optional& query_lengths, const Optional& key_lengths, double scale) {
    const Arguments arguments(query, key, value, key_bias, key_weight, query_lengths, key_lengths, scale);
    auto p = arguments.params<AbsorbedAttentionParams>();
    Tensor out = empty_as(query, query.scalar_type());
    p.out = rows_of(out);
    absorbed_attention(p);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& query, const Tensor& key,
                                                            const Optional& value, const Optional& key_bias,
                                                            const Optional& key_weight, const Optional& query_lengths,
                                                            const Optional& key_lengths, double scale, bool need_query,
                                                            bool need_key, bool need_value, bool need_bias,
                                                            bool need_weight) {
    const Arguments arguments(query, key, value, key_bias, key_weight, query_lengths, key_lengths, scale);
    auto p = arguments.params<AbsorbedAttentionBackwardParams>();
    const ScalarType type = query.scalar_type();
    const Tensor upstream = with_rows(d_out, 3);
    const Tensor d_query = need_query ? empty_as(query, type) : empty({0}, type);
    const Tensor d_key = like_keys(need_key, p, type), d_value = like_keys(need_value && value.has_value(), p, type);
    const bool with_bias = need_bias && key_bias.has_value(), with_weight = need_weight && key_weight.has_value();
    const Tensor d_bias = with_bias ? empty({p.B, p.H, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    const Tensor d_weight = with_weight ? empty({p.B, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    p.d_out = rows_of(upstream);
    p.d_query = rows_of(d_query.numel() == 0 ? empty({0, 0, 0}, type) : d_query);
    p.d_key = heads(d_key);
    p.d_value = heads(d_value);
    p.d_key_bias = with_bias ? d_bias.mutable_data_ptr<float>() : nullptr;
    p.d_key_weight = with_weight ? d_weight.mutable_data_ptr<float>() : nullptr;
    absorbed_attention_backward(p);
    const auto like = [](const Tensor& gradient, const Optional& input) {
        return input.has_value() ? as_type(gradient, input->scalar_type()) : gradient;
    };
    return {d_query, d_key, d_value, like(d_bias, key_bias), like(d_weight, key_weight)};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "absorbed_attention(Tensor query, Tensor key, Tensor? value, Tensor? key_bias, Tensor? key_weight, "
        "Tensor? query_lengths, Tensor? key_lengths, float scale) -> Tensor");
    m.def(
        "absorbed_attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor? value, Tensor? key_bias, "
        "Tensor? key_weight, Tensor? query_lengths, Tensor? key_lengths, float scale, bool need_query, bool need_key, "
        "bool need_value, bool need_bias, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("absorbed_attention", TORCH_BOX(&cnm::forward));
    m.impl("absorbed_attention_backward", TORCH_BOX(&cnm::backward));
}
