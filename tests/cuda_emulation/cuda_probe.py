"""Runs ``probe.py`` on other sources than the project's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = Path(__file__).with_name("probe.py")


def probe(csrc: Path, cases: str) -> subprocess.CompletedProcess[str]:
    """The outcome for ``<op>:<sample>[:<dtype>]`` cases, with spaces between them."""
    path = os.pathsep.join([str(PROBE.parent), str(PROBE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CNM_EMULATION_CSRC": str(csrc), "PYTHONPATH": path}
    command = [sys.executable, str(PROBE), *cases.split()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
