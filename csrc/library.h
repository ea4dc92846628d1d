// Under which name operators are registered, and for which device: this source is compiled for CPUs, for GPUs, and with
// the GPU's kernels emulated on a CPU, in a library of its own.
//
// Each op has a forward under its public name, which also returns what its backward reads, and a backward. Shapes are
// stated in cnm_kernels/ops/<op>.py.
#pragma once

#include <torch/csrc/stable/library.h>

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

// CNM_SCHEMAS(m) { m.def("..."); } states an op's schemas. A library has every schema once: the module for GPUs adds
// kernels to the schemas of the module for CPUs, which is loaded before it.
#if defined(CNM_CUDA) && !defined(CNM_EMULATED)
#define CNM_SCHEMAS(m) [[maybe_unused]] static void schemas_of_the_cpu_module(torch::stable::detail::StableLibrary& m)
#else
#define CNM_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(CNM_LIBRARY, m)
#endif
