// The emulator's stand-in for csrc/cuda/runtime.cpp, and its handles for tests.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <string>

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
// How many arguments the launch had; fills its grid [3].
__attribute__((visibility("default"))) int64_t emulator_arguments(int64_t launch, int64_t* grid) {
    const auto& counts = emulator::machine().ledger.launches.at(static_cast<size_t>(launch));
    std::copy(counts.grid, counts.grid + 3, grid);
    return static_cast<int64_t>(counts.arguments.size());
}
// The argument's size; copies it unless `out` is null.
__attribute__((visibility("default"))) int64_t emulator_argument(int64_t launch, int64_t place, char* out) {
    const auto& counts = emulator::machine().ledger.launches.at(static_cast<size_t>(launch));
    const std::string& argument = counts.arguments.at(static_cast<size_t>(place));
    if (out != nullptr) argument.copy(out, argument.size());
    return static_cast<int64_t>(argument.size());
}
// How many words of its arguments point into tensors or scratch; copies them unless `out` is null.
__attribute__((visibility("default"))) int64_t emulator_pointers(int64_t launch, uint64_t* out) {
    const auto& pointers = emulator::machine().ledger.launches.at(static_cast<size_t>(launch)).pointers;
    if (out != nullptr) std::copy(pointers.begin(), pointers.end(), out);
    return static_cast<int64_t>(pointers.size());
}
}
