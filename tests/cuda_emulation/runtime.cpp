// What csrc/cuda/runtime.cpp gives the kernels' host code on a GPU, for the emulator; and its handles for tests.
#include <cstdlib>

#include "emulator.h"
#include "runtime.h"

namespace cnm::cuda {

Stream current_stream() { return nullptr; }

Scratch::Scratch(int64_t bytes) : data_(std::aligned_alloc(256, static_cast<size_t>((bytes + 511) / 256 * 256))) {
    emulator::poison(data_, bytes);
    emulator::know_memory(data_, bytes);
}
Scratch::~Scratch() { std::free(data_); }

int most_shared_bytes() { return static_cast<int>(emulator::machine().most_shared_bytes); }

}  // namespace cnm::cuda

extern "C" {
__attribute__((visibility("default"))) void emulator_set_seed(uint64_t seed) { emulator::set_seed(seed); }
__attribute__((visibility("default"))) void emulator_set_shared_bytes(int64_t bytes) {
    emulator::machine().most_shared_bytes = static_cast<size_t>(bytes);
}
}
