// Selects the instruction set of the kernels; a kernel source is compiled to one function per instruction set.
//
// setup.py compiles every kernel source once per instruction set, with -DCNM_ISA=<name> and that set's flags; the
// source puts its code into namespace cnm::CNM_ISA. CNM_KERNEL(name, Params) declares them all, and cnm::name, which
// calls the one the processor can run. A set is a fixed list of features, so kernels ask nothing at run time.
#pragma once

namespace cnm {

enum class Isa : int {
    portable,    // plain C++ with 128-bit vectors
    avx2,        // + FMA, F16C
    avx512,      // F, BW, DQ, VL
    avx512bf16,  // + bfloat16 dot products
    amx,         // + bfloat16 tiles
};

const char* vendor();  // of the processor, as it names itself: GenuineIntel, AuthenticAMD; empty where unknown
Isa best_isa();        // what this processor and operating system can run
Isa isa();             // what kernels run on: the best, unless set_isa said otherwise
void set_isa(Isa chosen);

}  // namespace cnm

#define CNM_DECLARE_IN(isa_name, name, Params) \
    namespace isa_name {                       \
    void name(const Params& params);           \
    }

#if defined(__x86_64__)
#define CNM_KERNEL(name, Params)             \
    CNM_DECLARE_IN(portable, name, Params)   \
    CNM_DECLARE_IN(avx2, name, Params)       \
    CNM_DECLARE_IN(avx512, name, Params)     \
    inline void name(const Params& params) { \
        if (isa() >= Isa::avx512) {          \
            avx512::name(params);            \
        } else if (isa() == Isa::avx2) {     \
            avx2::name(params);              \
        } else {                             \
            portable::name(params);          \
        }                                    \
    }
// For kernels that multiply matrices: compiled for the bfloat16 sets too (MATRIX_ONLY in setup.py).
#define CNM_MATRIX_KERNEL(name, Params)                            \
    CNM_DECLARE_IN(portable, name, Params)                         \
    CNM_DECLARE_IN(avx2, name, Params)                             \
    CNM_DECLARE_IN(avx512, name, Params)                           \
    CNM_DECLARE_IN(avx512bf16, name, Params)                       \
    CNM_DECLARE_IN(amx, name, Params)                              \
    inline void name(const Params& params) {                       \
        switch (isa()) {                                           \
            case Isa::portable: return portable::name(params);     \
            case Isa::avx2: return avx2::name(params);             \
            case Isa::avx512: return avx512::name(params);         \
            case Isa::avx512bf16: return avx512bf16::name(params); \
            case Isa::amx: return amx::name(params);               \
        }                                                          \
    }
#else
#define CNM_KERNEL(name, Params)           \
    CNM_DECLARE_IN(portable, name, Params) \
    inline void name(const Params& params) { portable::name(params); }
#define CNM_MATRIX_KERNEL(name, Params) CNM_KERNEL(name, Params)
#endif
