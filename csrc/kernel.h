// CNM_KERNEL(name, Params) and CNM_MATRIX_KERNEL(name, Params) declare cnm::name, which runs a kernel on what it is
// given.
#pragma once

#if defined(CNM_CUDA)
#define CNM_KERNEL(name, Params) void name(const Params& params);
#define CNM_MATRIX_KERNEL(name, Params) CNM_KERNEL(name, Params)
#else
#include "cpu/isa.h"
#endif
