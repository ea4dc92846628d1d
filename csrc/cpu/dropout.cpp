// x scale where the mask keeps, else 0; the gradient is the same op on the upstream gradient.
//
// A chunk is a run of elements; its mask is drawn into a kilobyte and read back from L1.
#include "dropout.h"

#include <algorithm>

#include "parallel.h"
#include "philox.h"

namespace cnm::CNM_ISA {
namespace {

constexpr int64_t CHUNK = 32768, BLOCK = 4096;  // elements

template <class T>
void run(const DropoutParams& p) {
    const Dropout dropout(p.p, *p.seed, p.offset);
    const Vec scale = set1(dropout.scale), zero = set1(0);
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    const Output<T> write(p.numel);
    parallel_for((p.numel + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
        const int64_t end = std::min(p.numel, (chunk + 1) * CHUNK);
        for (int64_t start = chunk * CHUNK; start < end; start += BLOCK) {
            const int64_t count = std::min(BLOCK, end - start);
            uint8_t memory[KeepBits::bytes(BLOCK)];
            const KeepBits keep(dropout, start, count, memory);
            for (int64_t i = 0; i < count; i += W) {
                const Vec kept = select(keep.lanes(i), load_tail(x + start + i, count - i) * scale, zero);
                write(out + start + i, kept, count - i);
            }
        }
        write.finish();
    });
}

}  // namespace

void dropout(const DropoutParams& p) {
    with_type(p.dtype, [&](auto* type) { run<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace cnm::CNM_ISA
