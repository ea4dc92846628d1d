// The emulator's stand-in for csrc/cuda/runtime.cpp, and its handles for tests.
#include <dlfcn.h>

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
// Whether there is wgmma, as on GPUs of 9.0.
__attribute__((visibility("default"))) void emulator_set_groups(int32_t on) {
    emulator::machine().has_groups = on != 0;
}
// Counts of the launches from here on, from few of their blocks; 0 stops.
__attribute__((visibility("default"))) void emulator_count(int32_t on) {
    emulator::machine().ledger.on = on != 0;
    emulator::machine().ledger.launches.clear();
}
__attribute__((visibility("default"))) int64_t emulator_launches() {
    return static_cast<int64_t>(emulator::machine().ledger.launches.size());
}
// The kernel's place in this library, then LaunchCounts::numbers().
__attribute__((visibility("default"))) int64_t emulator_counts(int64_t launch, double* out) {
    const auto& counts = emulator::machine().ledger.launches.at(static_cast<size_t>(launch));
    counts.numbers(out);
    Dl_info info;
    if (dladdr(counts.kernel, &info) == 0) return 0;
    return static_cast<const char*>(counts.kernel) - static_cast<const char*>(info.dli_fbase);
}
}
