"""The compiled CUDA kernels (csrc/cuda/module.cpp); importing registers them with torch."""
