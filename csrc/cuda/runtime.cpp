// PyTorch gives the kernels' host code two things: the current stream and scratch memory from PyTorch's own allocator.
#include "runtime.h"

#include "tensors.h"

namespace cnm::cuda {

Stream current_stream() {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index(), &stream));
    return static_cast<Stream>(stream);
}

// PyTorch's allocator hands freed memory to work that comes later on the same stream, never to what runs before.
Scratch::Scratch(int64_t bytes) {
    const Tensor* const tensor = new Tensor(empty({bytes}, ScalarType::Byte));
    owner_ = const_cast<Tensor*>(tensor);
    data_ = tensor->mutable_data_ptr();
}
Scratch::~Scratch() { delete static_cast<Tensor*>(owner_); }

int most_shared_bytes() {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index()),
          "the shared memory of a block is not known");
    return bytes;
}

}  // namespace cnm::cuda
