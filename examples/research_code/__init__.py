"""Stand-ins for what people train with: models and losses with the interfaces of the published CNM and CPL code.

Plain PyTorch, written for these examples from the papers and from how the published code is called. Nothing here knows
of ``cnm_kernels``; the examples, the tests and the benchmarks accelerate it from outside.
"""
