"""``python -m cnm_kernels``: what runs here, on which backend, and why."""

import torch

from cnm_kernels import registry

print(
    f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}, "
    f"CUDA {'available' if torch.cuda.is_available() else 'not available'}"
)
print(registry.table())
