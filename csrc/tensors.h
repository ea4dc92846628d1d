// Turns tensors into a kernel's params, for the *_op.cpp files. Only they include torch's headers.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "library.h"
#include "types.h"

#if defined(CNM_EMULATED)
#include "emulator.h"
#elif defined(CNM_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // as torch 2.11 calls it
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

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

// Every operator holds one while it runs: its tensors' device is the current one, where kernels are launched and new
// tensors made. The emulator of GPUs takes note of all tensors, so that an access outside of them is caught.
#if defined(CNM_EMULATED)
struct OnDevice {
    explicit OnDevice(const Tensor&) { emulator::forget_memory(); }
};
inline const Tensor& known(const Tensor& tensor) {
    int64_t elements = tensor.numel() > 0 ? 1 : 0;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements += (tensor.size(axis) - 1) * tensor.stride(axis);
    if (tensor.numel() > 0) emulator::know_memory(tensor.const_data_ptr(), elements * tensor.element_size());
    return tensor;
}
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index() { return 0; }
#elif defined(CNM_CUDA)
struct OnDevice : torch::stable::accelerator::DeviceGuard {
    explicit OnDevice(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
};
inline const Tensor& known(const Tensor& tensor) { return tensor; }
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline int32_t device_index() { return torch::stable::accelerator::getCurrentDeviceIndex(); }
#else
struct OnDevice {
    explicit OnDevice(const Tensor&) {}
};
inline const Tensor& known(const Tensor& tensor) { return tensor; }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index() { return 0; }
#endif

// A new tensor, not filled.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes, strides, dtype_code(type), device_type(), device_index(), &handle));
    const Tensor tensor(handle);
#if defined(CNM_EMULATED)
    if (tensor.numel() > 0) emulator::poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
#endif
    return known(tensor);
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
inline Tensor empty_as(const Tensor& like, ScalarType type) { return empty(like.sizes().data(), like.dim(), type); }

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
    return known(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
}

// Returns the tensor in another dtype, or itself if it has that dtype.
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
