// What the *_op.cpp files need to turn tensors into a kernel's params. Only they include torch's headers.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "types.h"

namespace cnm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t dtype_code(ScalarType type) {
    switch (type) {
        case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
        case ScalarType::Half: return aoti_torch_dtype_float16();
        case ScalarType::Long: return aoti_torch_dtype_int64();
        case ScalarType::Byte: return aoti_torch_dtype_uint8();
        default: STD_TORCH_CHECK(type == ScalarType::Float, "cnm_kernels: no such output dtype");
    }
    return aoti_torch_dtype_float32();
}

// A new CPU tensor, not filled.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dim, sizes, strides, dtype_code(type), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// The same, contiguous.
inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) {
    std::vector<int64_t> strides(static_cast<size_t>(dim));
    for (int64_t axis = dim - 1, stride = 1; axis >= 0; --axis) {
        strides[static_cast<size_t>(axis)] = stride;
        stride *= std::max<int64_t>(sizes[axis], 1);
    }
    return empty_strided(sizes, strides.data(), dim, type);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}
// The shape of `like`, contiguous whatever its strides.
inline Tensor empty_as(const Tensor& like, ScalarType type) {
    return empty(like.sizes().data(), like.dim(), type);
}

inline Dtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::float32;
        case ScalarType::BFloat16: return Dtype::bfloat16;
        case ScalarType::Half: return Dtype::float16;
        default: STD_TORCH_CHECK(false, "cnm_kernels: expected a float32, bfloat16 or float16 tensor");
    }
    return Dtype::float32;
}

// The tensor itself if it is contiguous, else a contiguous copy.
inline Tensor packed(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// In another dtype; the tensor itself if it has that dtype.
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
    return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Contiguous float32, for the small operands that kernels take in one dtype only.
inline Tensor floats(const Tensor& tensor) { return packed(as_type(tensor, ScalarType::Float)); }

// A pointer to what there is, or null.
template <class T>
inline const T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}
inline std::optional<Tensor> floats(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(floats(*tensor)) : std::nullopt;
}
inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(packed(*tensor)) : std::nullopt;
}

}  // namespace cnm
