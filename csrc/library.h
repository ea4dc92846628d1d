// Under which name operators are registered, and for which device: this source is compiled for CPUs, for GPUs, and with
// the GPU's kernels emulated on a CPU, in a library of its own.
#pragma once

#if defined(CNM_EMULATED)
#define CNM_LIBRARY cnm_kernels_emulated
#define CNM_DEVICE CPU
#elif defined(CNM_CUDA)
#define CNM_LIBRARY cnm_kernels
#define CNM_DEVICE CUDA
#else
#define CNM_LIBRARY cnm_kernels
#define CNM_DEVICE CPU
#endif
