"""Runs ``probe.py`` on other sources than the project's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROBE = Path(__file__).with_name("probe.py")
CSRC = PROBE.parents[2] / "csrc"


def probe(csrc: Path, cases: str) -> subprocess.CompletedProcess[str]:
    """The outcome for ``<op>:<sample>[:<dtype>]`` cases, with spaces between them."""
    path = os.pathsep.join([str(PROBE.parent), str(PROBE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CNM_EMULATION_CSRC": str(csrc), "PYTHONPATH": path}
    command = [sys.executable, str(PROBE), *cases.split()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def probe_with_mistake(folder: Path, file: str, right: str, wrong: str, cases: str) -> subprocess.CompletedProcess[str]:
    """``probe`` of a copy of the sources in which one place of a file of csrc/cuda has changed."""
    shutil.copytree(CSRC, folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{file} no longer holds what this test takes away"
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    return probe(folder / "csrc", cases)
