// Converts the tensors of attention's operators into the params of their kernels.
#pragma once

#include <array>
#include <optional>

#include "attention.h"
#include "tensors.h"

namespace cnm {

using Optional = std::optional<Tensor>;

// The kernels take any strides but the last.
inline Tensor with_rows(const Tensor& tensor, int64_t dim) {
    STD_TORCH_CHECK(tensor.dim() == dim, "attention: expected a tensor of ", dim, " dimensions, got ", tensor.dim());
    return known(tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) <= 1 ? tensor : torch::stable::contiguous(tensor));
}

// [B, H, L, d] in memory as [B, L, H, d], which is what the projections around the attention want.
inline Tensor empty_heads(bool wanted, int64_t B, int64_t H, int64_t L, int64_t d, ScalarType type) {
    if (!wanted) return empty({0}, type);
    const int64_t sizes[] = {B, H, L, d}, strides[] = {L * H * d, d, H * d, 1};
    return empty_strided(sizes, strides, 4, type);
}

inline Heads heads(const Tensor& tensor) {
    if (tensor.numel() == 0) return {};
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Part i of heads packed as [B, L, parts, H, d].
inline Heads part(const Tensor& packed, int64_t i) {
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

// The gradients of `operands` as the kernels write them.
struct OperandGradients {
    Heads query, key, value;

    OperandGradients(const Operands& operands, const std::array<Tensor, 3>& gradients, bool need_first,
                     bool need_second, bool need_third) {
        const bool together = !operands.second.has_value(), pair = !together && !operands.third.has_value();
        const auto& [first, d_second, d_third] = gradients;
        const Optional second = together ? Optional() : Optional(d_second);
        const Optional third = together || pair ? Optional() : Optional(d_third);
        if (need_first) query = together ? part(first, 0) : heads(first);
        if (together ? need_first : need_second) key = Operands::key_of(first, second, third);
        if (together ? need_first : pair ? need_second : need_third) value = Operands::value_of(first, second, third);
    }
};

}  // namespace cnm
