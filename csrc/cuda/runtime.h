// The kernels' host code asks its surroundings for these: a stream, scratch memory, the limits of the device.
// runtime.cpp gets it from PyTorch, the tests from the emulator.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if !defined(CNM_EMULATED)
#include <cuda_runtime.h>
#endif

namespace cnm::cuda {

#if defined(CNM_EMULATED)
using Stream = void*;
#else
using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // else the next call that asks would report this one
        throw std::runtime_error(std::string("cnm_kernels: ") + what + ": " + cudaGetErrorString(status));
    }
}
#endif

Stream current_stream();

// Scratch memory on the current device, free for others once the kernels launched so far are through.
class Scratch {
  public:
    explicit Scratch(int64_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* owner_ = nullptr;
    void* data_ = nullptr;
};

int most_shared_bytes();  // that a block of the current device can have

}  // namespace cnm::cuda
