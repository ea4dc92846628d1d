"""Trains for thousands of steps on embedded data, in float32 and bf16: no leak, no NaN, the same bits twice.

    python tools/soak.py --steps 2000

Two models of the same seed take the same steps in turn, so that what differs shows in the step it first differs in. In
float32 a third takes the first steps on the PyTorch backend and must stay near. Prints the resident memory after a
tenth of the steps and at the end.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "")]  # installed packages first

from small_runs import synthetic_config

import cnm_kernels
from cnm import CNM
from cnm.data import BatchLoader, open_split
from cnm.models.base import PRECISIONS
from cnm.training.memory import keep_freed_memory
from cnm.training.step import STEPS

SIZES = {
    "dataset__num_videos": 64,
    "model__config__hidden_size": 64,
    "model__config__DualTransformer__d_model": 64,
    "model__config__DualTransformer__num_heads": 4,
}
STEPS_BESIDE_TORCH = 20  # rounding grows with every step; by then it is 1e-3 of a parameter at most
LEAK_MB = 8  # that the resident memory may grow by between a tenth of the steps and the end


@dataclass
class Report:
    precision: str
    steps: int
    early_mb: float  # resident after a tenth of the steps
    late_mb: float
    first_loss: float
    last_loss: float


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(precision: str, steps: int) -> Report:
    """Raises ``AssertionError`` with the step in which something was wrong."""
    keep_freed_memory()
    config = synthetic_config(**SIZES)
    loader = BatchLoader(open_split(config.dataset, "train"), config.train.batch_size, shuffle=True, seed=1)
    runs = []
    for backend in (None, None, "torch") if precision == "float32" else (None, None):
        torch.manual_seed(1)
        model = CNM(config).train()
        model.compute_dtype = PRECISIONS[precision]
        runs.append((backend, model, STEPS["lean"](model, config), torch.get_rng_state()))
    done, epoch, early, losses = 0, 0, 0.0, []
    while done < steps:
        for _, batch in loader.epoch(epoch):
            found = []
            for i, (backend, model, step, state) in enumerate(runs):
                if backend is not None and done >= STEPS_BESIDE_TORCH:
                    continue
                torch.set_rng_state(state)
                with cnm_kernels.use_backend(backend):
                    found.append(step(batch))
                runs[i] = (backend, model, step, torch.get_rng_state())
            for name, value in found[0].items():
                assert value.isfinite(), f"step {done}: {name} is {value.item()}"
                assert torch.equal(value, found[1][name]), f"step {done}: {name} differs between equal runs"
                if len(found) > 2:
                    close = torch.isclose(value, found[2][name], rtol=1e-2, atol=1e-3)
                    assert close, f"step {done}: {name} is {value.item()}, on PyTorch {found[2][name].item()}"
            losses.append(found[0]["loss/reconstruction"].item())
            done += 1
            if done == max(steps // 10, 1):
                early = resident_mb()
            if done == steps:
                break
        epoch += 1
    for (name, one), (_, other) in zip(runs[0][1].named_parameters(), runs[1][1].named_parameters(), strict=True):
        assert torch.equal(one, other), f"{name} differs between equal runs"
    late = resident_mb()
    assert late - early <= LEAK_MB, f"resident memory grew from {early:.1f} to {late:.1f} MB"
    tenth = max(len(losses) // 10, 1)
    return Report(precision, steps, early, late, sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    steps = parser.parse_args().steps
    for precision in PRECISIONS:
        report = soak(precision, steps)
        print(
            f"{precision}: {steps} steps, loss {report.first_loss:.4f} -> {report.last_loss:.4f}, resident "
            f"{report.early_mb:.1f} -> {report.late_mb:.1f} MB, equal runs equal bit for bit"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
