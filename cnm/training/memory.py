"""How training keeps its memory."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MOST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep what is freed for the next step, for the rest of the process; False where it cannot.

    Steps allocate the same large buffers over and over. By default each of them is mapped and zeroed anew by the
    system, which costs more than many of the kernels that fill them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, MOST) == 1
