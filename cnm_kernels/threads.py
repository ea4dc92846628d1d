"""How long idle threads spin before they sleep: briefly, so that a loaded machine costs no more than its load.

The threads that share an op's work meet at its end. By default GNU OpenMP, which PyTorch's CPU builds use, lets those
that wait spin for milliseconds. On a machine that other processes use too, such a thread keeps a core from the very
thread it waits for. The library reads its setting once, when torch loads it: hence this module comes before torch, and
where torch was imported first, the setting is the user's to make (``GOMP_SPINCOUNT=10000 python ...``).
"""

from __future__ import annotations

import os
import sys

SPIN_VARIABLE = "GOMP_SPINCOUNT"
POLICY_VARIABLE = "OMP_WAIT_POLICY"
SPIN_COUNT = 10_000  # longer than the pauses between ops of one step, much shorter than a time slice


def spin_briefly() -> None:
    """Sets the variable that GNU OpenMP reads, unless torch is loaded already or the user has decided."""
    decided = SPIN_VARIABLE in os.environ or POLICY_VARIABLE in os.environ
    if "torch" not in sys.modules and not decided:
        os.environ[SPIN_VARIABLE] = str(SPIN_COUNT)


spin_briefly()
