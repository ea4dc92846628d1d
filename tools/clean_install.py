"""Builds the wheel and the sdist and installs each into new virtual environments of several Pythons.

    python tools/clean_install.py --python python3.10 --python python3.13 --torch 2.13.0

In each: no source tree nearby, `pip check` finds nothing, the compiled CPU kernels run an op and its backward, and
`cnm demo` trains, evaluates and draws, at its smallest. The wheel is built once, by this Python, and must serve all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
ONE_OP = """
import torch, cnm_kernels
query, key, value = (torch.randn(2, 4, 7, 16, requires_grad=True) for _ in range(3))
center, width = ((0.2 + torch.rand(2)).requires_grad_() for _ in range(2))
def gradients():
    out = cnm_kernels.gaussian_attention(query, key, value, center, width, alpha=5.5)
    return torch.autograd.grad(out.square().sum(), (query, key, value, center, width))
with cnm_kernels.use_backend("native"):
    ours = gradients()
with cnm_kernels.use_backend("torch"):
    torch.testing.assert_close(ours, gradients(), rtol=1e-3, atol=1e-4)
print(sys.version.split()[0], "torch", torch.__version__)
"""


def said_by(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Runs a command outside of the source tree; returns its output, or its last lines if it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CNM_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=kept | environment, text=True, capture_output=True, errors="replace"
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def new_environment(python: str, folder: Path) -> Path:
    """Its Python."""
    said_by([python, "-m", "venv", folder], folder.parent)
    return folder / "bin" / "python"


def artifacts(folder: Path, constraints: dict[str, str]) -> list[Path]:
    """The sdist of what git has here, and a wheel built from it."""
    python = new_environment(sys.executable, folder / "builder")
    said_by([python, "-m", "pip", "install", "-q", "build"], folder)
    said_by(["git", "clone", "-q", SOURCE, folder / "source"], folder)
    said_by([python, "-m", "build", "--outdir", folder / "dist", folder / "source"], folder, **constraints)
    return sorted((folder / "dist").iterdir())


def try_out(python: str, artifact: Path, folder: Path, constraints: dict[str, str]) -> str:
    """Installs and uses an artifact in a new environment; versions and what was seen."""
    inside = new_environment(python, folder / "venv")
    said_by([inside, "-m", "pip", "install", "-q", artifact], folder, CNM_KERNELS_NATIVE="1", **constraints)
    said_by([inside, "-m", "pip", "check"], folder)
    versions = said_by([inside, "-c", f"import sys{ONE_OP}"], folder).strip()
    said_by([inside.parent / "cnm", "demo", "--out", "demo", "--epochs", "1", "--videos", "24"], folder)
    missing = {"best.pt", "metrics.jsonl"} - set(os.listdir(folder / "demo"))
    if missing:
        raise SystemExit(f"cnm demo left no {sorted(missing)}")
    return versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="may be repeated; default: the one that runs this")
    parser.add_argument("--torch", help="its version; default: pip's choice")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        constraints = {}
        if arguments.torch:
            (folder / "constraints.txt").write_text(f"torch=={arguments.torch}\n")
            constraints["PIP_CONSTRAINT"] = str(folder / "constraints.txt")
        found = artifacts(folder, constraints)
        print("built", *(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in found), flush=True)
        for python in arguments.python or [sys.executable]:
            for artifact in found:
                begun = time.monotonic()
                with tempfile.TemporaryDirectory() as room:
                    versions = try_out(python, artifact, Path(room), constraints)
                kind = "wheel" if artifact.suffix == ".whl" else "sdist"
                print(
                    f"{kind}: Python {versions}: installed, checked, used: {time.monotonic() - begun:.0f} s", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
