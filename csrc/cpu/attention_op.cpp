// weighted_attention and gaussian_attention on CPU tensors.
#include "attention.h"

#include <array>
#include <tuple>

#include "tensors.h"

namespace cnm {
namespace {

using Optional = std::optional<Tensor>;

// The kernels take any strides but the last.
Tensor with_rows(const Tensor& tensor, int64_t dim) {
    STD_TORCH_CHECK(tensor.dim() == dim, "attention: expected a tensor of ", dim, " dimensions, got ", tensor.dim());
    return tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// [B, H, L, d] in memory as [B, L, H, d], which is what the projections around the attention want.
Tensor empty_heads(bool wanted, int64_t B, int64_t H, int64_t L, int64_t d, ScalarType type) {
    if (!wanted) return empty({0}, type);
    const int64_t sizes[] = {B, H, L, d}, strides[] = {L * H * d, d, H * d, 1};
    return empty_strided(sizes, strides, 4, type);
}

Heads heads(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Part i of heads packed as [B, L, parts, H, d].
Heads part(const Tensor& packed, int64_t i) {
    if (packed.numel() == 0) return {};
    const int64_t element = packed.scalar_type() == ScalarType::Float ? 4 : 2;
    char* data = static_cast<char*>(const_cast<void*>(packed.const_data_ptr())) + i * packed.stride(2) * element;
    return {data, packed.stride(0), packed.stride(3), packed.stride(1)};
}

// query, key and value: three tensors [B, H, L, d]; or query and the other two packed in `key` [B, Lk, 2, H, d]; or all
// packed in `query` [B, L, 3, H, d].
struct Operands {
    Tensor first;
    Optional second, third;
    int64_t B, H, Lq, Lk, d;

    Operands(const Tensor& query, const Optional& key, const Optional& value)
        : first(with_rows(query, key.has_value() ? 4 : 5)) {
        if (key.has_value()) second = with_rows(*key, value.has_value() ? 4 : 5);
        if (value.has_value()) third = with_rows(*value, 4);
        const bool together = !key.has_value();
        B = first.size(0);
        H = first.size(together ? 3 : 1);
        Lq = first.size(together ? 1 : 2);
        d = first.size(together ? 4 : 3);
        Lk = together ? Lq : second->size(third.has_value() ? 2 : 1);
        STD_TORCH_CHECK(first.numel() == (together ? 3 : 1) * B * H * Lq * d &&
                            (together || second->numel() == (third.has_value() ? 1 : 2) * B * H * Lk * d) &&
                            (!third.has_value() || third->numel() == B * H * Lk * d),
                        "attention: query, key and value do not fit");
        for (const Optional* other : {&second, &third}) {
            STD_TORCH_CHECK(!other->has_value() || (*other)->scalar_type() == first.scalar_type(),
                            "attention: query, key and value differ in dtype");
        }
    }

    Heads query() const { return second.has_value() ? heads(first) : part(first, 0); }
    Heads key() const { return key_of(first, second, third); }
    Heads value() const { return value_of(first, second, third); }

    static Heads key_of(const Tensor& first, const Optional& second, const Optional& third) {
        return third.has_value() ? heads(*second) : second.has_value() ? part(*second, 0) : part(first, 1);
    }
    static Heads value_of(const Tensor& first, const Optional& second, const Optional& third) {
        return third.has_value() ? heads(*third) : second.has_value() ? part(*second, 1) : part(first, 2);
    }

    // Tensors for the gradients, packed as the operands are; those not wanted are empty.
    std::array<Tensor, 3> gradients(bool need_first, bool need_second, bool need_third) const {
        const ScalarType type = first.scalar_type();
        const Tensor none = empty({0}, type);
        if (!second.has_value()) return {need_first ? empty({B, Lq, 3, H, d}, type) : none, none, none};
        const Tensor d_query = empty_heads(need_first, B, H, Lq, d, type);
        if (!third.has_value()) return {d_query, need_second ? empty({B, Lk, 2, H, d}, type) : none, none};
        return {d_query, empty_heads(need_second, B, H, Lk, d, type), empty_heads(need_third, B, H, Lk, d, type)};
    }
};

// Keeps what the kernels point to.
struct Arguments {
    Operands operands;
    Optional key_weight, center, width, key_lengths;
    double alpha, min_width, scale;
    bool complement, causal;

    Arguments(const Tensor& query, const Optional& key, const Optional& value, const Optional& key_weight,
              const Optional& center, const Optional& width, double alpha, double min_width, bool complement,
              bool causal, const Optional& key_lengths, double scale)
        : operands(query, key, value), key_weight(floats(key_weight)), center(floats(center)), width(floats(width)),
          key_lengths(packed(key_lengths)), alpha(alpha), min_width(min_width), scale(scale), complement(complement),
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
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionParams>();
    const Tensor out = empty_heads(true, p.B, p.H, p.Lq, p.d, query.scalar_type());
    const Tensor stats = empty({p.B, p.H, p.Lq, 2}, ScalarType::Float);
    const Tensor weights =
        return_weights ? empty({p.B, p.Lq, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
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
    const Arguments arguments(query, key, value, key_weight, center, width, alpha, min_width, complement, causal,
                              key_lengths, scale);
    auto p = arguments.params<AttentionBackwardParams>();
    const Tensor upstream = with_rows(d_out, 4);
    const Optional upstream_weights = floats(d_weights);
    const auto [d_first, d_second, d_third] = arguments.operands.gradients(need_query, need_key, need_value);
    const bool need_gaussian = need_weight && center.has_value(), need_given = need_weight && key_weight.has_value();
    const Tensor d_key_weight = need_given ? empty({p.B, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    const Tensor d_center = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    const Tensor d_width = empty({need_gaussian ? p.B : 0}, ScalarType::Float);
    p.d_out = heads(upstream);
    p.d_weights = data_or_null<float>(upstream_weights);
    p.stats = stats.const_data_ptr<float>();
    const bool together = !key.has_value(), pair = !together && !value.has_value();
    const Optional second = together ? Optional() : Optional(d_second);
    const Optional third = together || pair ? Optional() : Optional(d_third);
    if (need_query) p.d_query = together ? part(d_first, 0) : heads(d_first);
    if (together ? need_query : need_key) p.d_key = Operands::key_of(d_first, second, third);
    if (together ? need_query : pair ? need_key : need_value) p.d_value = Operands::value_of(d_first, second, third);
    p.d_key_weight = need_given ? d_key_weight.mutable_data_ptr<float>() : nullptr;
    p.d_center = need_gaussian ? d_center.mutable_data_ptr<float>() : nullptr;
    p.d_width = need_gaussian ? d_width.mutable_data_ptr<float>() : nullptr;
    attention_backward(p);
    const auto like = [](const Tensor& gradient, const Optional& input) {
        return input.has_value() ? as_type(gradient, input->scalar_type()) : gradient;
    };
    return {d_first, d_second, d_third, like(d_key_weight, key_weight), like(d_center, center), like(d_width, width)};
}

}  // namespace
}  // namespace cnm

STABLE_TORCH_LIBRARY_IMPL(cnm_kernels, CPU, m) {
    m.impl("attention", TORCH_BOX(&cnm::forward));
    m.impl("attention_backward", TORCH_BOX(&cnm::backward));
}
