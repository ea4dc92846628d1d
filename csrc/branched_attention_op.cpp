// branched_attention on tensors of the device that this is compiled for.
#include "branched_attention.h"

#include <tuple>

#include "attention_arguments.h"

namespace cnm {
namespace {

// Keeps what the kernels point to.
struct Arguments {
    Operands operands;
    Tensor key_weights;
    Optional key_lengths;
    int64_t n;
    bool causal;
    double scale;

    Arguments(const Tensor& query, const Optional& key, const Optional& value, const Tensor& key_weights, bool causal,
              const Optional& key_lengths, double scale)
        : operands(query, key, value),
          key_weights(floats(key_weights)),
          key_lengths(packed(key_lengths)),
          n(key_weights.size(0)),
          causal(causal),
          scale(scale) {
        STD_TORCH_CHECK(key_weights.numel() == n * operands.B * operands.Lk,
                        "branched_attention: the key weights do not fit the keys");
        STD_TORCH_CHECK(!key_lengths.has_value() || key_lengths->numel() == operands.B,
                        "branched_attention: the lengths do not fit the keys");
    }

    template <class Params>
    Params params() const {
        Params p{};
        p.dtype = dtype_of(operands.first);
        p.B = operands.B;
        p.H = operands.H;
        p.Lq = operands.Lq;
        p.Lk = operands.Lk;
        p.d = operands.d;
        p.query = operands.query();
        p.key = operands.key();
        p.value = operands.value();
        p.causal = causal;
        p.scale = static_cast<float>(scale);
        p.key_lengths = data_or_null<int64_t>(key_lengths);
        p.key_weight = key_weights.const_data_ptr<float>();
        p.branches.n = n;
        p.branches.weights = p.B * p.Lk;
        p.branches.stats = p.B * p.H * p.Lq * 2;
        return p;
    }
};

// [n, B, H, L, d] in memory as [n, B, L, H, d]
Heads heads_of_branches(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Optional& key, const Optional& value,
                                   const Tensor& key_weights, bool causal, const Optional& key_lengths, double scale) {
    const OnDevice device(query);
    const Arguments arguments(query, key, value, key_weights, causal, key_lengths, scale);
    auto p = arguments.params<BranchedAttentionParams>();
    const int64_t sizes[] = {arguments.n, p.B, p.H, p.Lq, p.d};
    const int64_t strides[] = {p.B * p.Lq * p.H * p.d, p.Lq * p.H * p.d, p.d, p.H * p.d, 1};
    const Tensor out = empty_strided(sizes, strides, 5, query.scalar_type());
    const Tensor stats = empty({arguments.n, p.B, p.H, p.Lq, 2}, ScalarType::Float);
    p.out = heads_of_branches(out);
    p.branches.out = out.stride(0);
    p.stats = stats.mutable_data_ptr<float>();
    branched_attention(p);
    return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& query, const Optional& key,
                                                    const Optional& value, const Tensor& key_weights, bool causal,
                                                    const Optional& key_lengths, double scale, const Tensor& stats,
                                                    bool need_query, bool need_key, bool need_value,
                                                    bool need_weights) {
    const OnDevice device(query);
    const Arguments arguments(query, key, value, key_weights, causal, key_lengths, scale);
    auto p = arguments.params<BranchedAttentionBackwardParams>();
    const Tensor upstream = with_rows(d_out, 5), kept = packed(stats);
    const auto gradients = arguments.operands.gradients(need_query, need_key, need_value);
    const OperandGradients places(arguments.operands, gradients, need_query, need_key, need_value);
    const Tensor d_key_weights =
        need_weights ? empty({arguments.n, p.B, p.Lk}, ScalarType::Float) : empty({0}, ScalarType::Float);
    p.d_out = heads_of_branches(upstream);
    p.branches.out = upstream.numel() == 0 ? 0 : upstream.stride(0);
    p.stats = kept.const_data_ptr<float>();
    p.d_query = places.query;
    p.d_key = places.key;
    p.d_value = places.value;
    p.d_key_weight = need_weights ? d_key_weights.mutable_data_ptr<float>() : nullptr;
    branched_attention_backward(p);
    return {gradients[0], gradients[1], gradients[2], as_type(d_key_weights, key_weights.scalar_type())};
}

}  // namespace
}  // namespace cnm

CNM_SCHEMAS(m) {
    m.def(
        "branched_attention(Tensor query, Tensor? key, Tensor? value, Tensor key_weights, bool causal, "
        "Tensor? key_lengths, float scale) -> (Tensor, Tensor)");
    m.def(
        "branched_attention_backward(Tensor d_out, Tensor query, Tensor? key, Tensor? value, Tensor key_weights, "
        "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, "
        "bool need_value, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(CNM_LIBRARY, CNM_DEVICE, m) {
    m.impl("branched_attention", TORCH_BOX(&cnm::forward));
    m.impl("branched_attention_backward", TORCH_BOX(&cnm::backward));
}
