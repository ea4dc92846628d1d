// Numbers of cnm_kernels/constants.py that kernels need too; a test compares them.
#pragma once

namespace cnm {

constexpr float KEY_WEIGHT_EPS = 1e-10f;
constexpr double DROPOUT_LEVELS = 65536;

}  // namespace cnm
