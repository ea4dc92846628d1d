// Finds the best instruction set; see isa.h.
#include "isa.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace cnm {
namespace {

#if defined(__x86_64__)
bool has_amx_bf16() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // CPUID leaf 7, EDX
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
    // Tile registers are large; Linux hands them to a process only when it asks.
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) {
        return Isa::portable;
    }
    constexpr unsigned F16C = 1u << 29;  // CPUID leaf 1, ECX; not every compiler's __builtin_cpu_supports knows it
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & F16C) == 0) return Isa::portable;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
        return Isa::avx2;
    }
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx_bf16() ? Isa::amx : Isa::avx512bf16;
#else
    return Isa::portable;
#endif
}

struct Vendor {
    char name[13] = "";

    Vendor() {
#if defined(__x86_64__)
        unsigned eax, ebx, ecx, edx;
        if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return;
        const unsigned words[] = {ebx, edx, ecx};
        std::memcpy(name, words, sizeof words);
#endif
    }
};

Isa& chosen_isa() {
    static Isa chosen = best_isa();
    return chosen;
}

}  // namespace

const char* vendor() {
    static const Vendor found;
    return found.name;
}

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa isa() { return chosen_isa(); }

void set_isa(Isa chosen) { chosen_isa() = chosen; }

}  // namespace cnm
