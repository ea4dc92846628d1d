"""Side-by-side measurements of the ops against the strongest things PyTorch offers; see README.md."""

import cnm_kernels  # noqa: F401  # before torch, whose threads it sets
