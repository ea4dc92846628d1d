#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace cnm {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best() {
#if defined(CNM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa chosen() {
  const Isa available = best();
  const char* wanted = std::getenv("CNM_KERNELS_CPU_ISA");
  if (wanted == nullptr) return available;
  for (int i = 0; i < int(available); ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return Isa(i);
  return available;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

}  // namespace cnm
