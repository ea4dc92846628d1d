// The kernels of every instruction set, and the choice between them.
#pragma once

#include "attention.h"
#include "dropout.h"
#include "gaussian_mask.h"
#include "linear_nll.h"

#define CNM_KERNELS(ISA)                                                           \
  namespace ISA {                                                                  \
  void gaussian_mask_forward(const GaussianMaskParams&, ParallelFor);              \
  void gaussian_mask_backward(const GaussianMaskParams&, ParallelFor);             \
  void attention_forward(const AttentionParams&, ParallelFor);                     \
  void attention_backward(const AttentionParams&, ParallelFor);                    \
  void linear_nll_forward(const LinearNllParams&, ParallelFor);                    \
  void linear_nll_backward(const LinearNllParams&, ParallelFor);                   \
  void dropout(const ElementwiseDropoutParams&, ParallelFor);                      \
  void dropout_add_layer_norm_forward(const LayerNormParams&, ParallelFor);        \
  void dropout_add_layer_norm_backward(const LayerNormParams&, ParallelFor);       \
  }

namespace cnm {

CNM_KERNELS(portable)
#if defined(CNM_X86)
CNM_KERNELS(avx2)
CNM_KERNELS(avx512)
CNM_KERNELS(avx512bf16)
#endif

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this CPU, or the lower one that CNM_KERNELS_CPU_ISA names.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace cnm

#if defined(CNM_X86)
#define CNM_DISPATCH(KERNEL, ...)                                               \
  do {                                                                          \
    switch (::cnm::isa()) {                                                     \
      case ::cnm::Isa::kAvx512Bf16: ::cnm::avx512bf16::KERNEL(__VA_ARGS__); break; \
      case ::cnm::Isa::kAvx512: ::cnm::avx512::KERNEL(__VA_ARGS__); break;      \
      case ::cnm::Isa::kAvx2: ::cnm::avx2::KERNEL(__VA_ARGS__); break;          \
      case ::cnm::Isa::kPortable: ::cnm::portable::KERNEL(__VA_ARGS__); break;  \
    }                                                                           \
  } while (false)
#else
#define CNM_DISPATCH(KERNEL, ...) ::cnm::portable::KERNEL(__VA_ARGS__)
#endif
