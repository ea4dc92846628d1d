"""``python -m cnm_kernels.triton.autotune``: times configurations of every kernel on this GPU and keeps the best."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from cnm_kernels.triton import configurations
from cnm_kernels.triton.configurations import TABLE, Configuration, Key

WARPS, STAGES = (4, 8), (1, 2, 3)
ROWS = {"attention": (16, 32, 64), "attention_backward": (16, 32, 64)}
TILES = (16, 32, 64, 128)  # rows and columns to try, for kernels that have both
Call = Callable[[], None]


def candidates(kernel: str) -> list[Configuration]:
    """The configurations to try; the table's is one of them."""
    sides = [(rows, 0) for rows in ROWS[kernel]] if kernel in ROWS else list(itertools.product(TILES, TILES))
    return [Configuration(*side, *launch) for side in sides for launch in itertools.product(WARPS, STAGES)]


def calls(device: str) -> Iterator[tuple[str, tuple[Key, Key], tuple[Call, Call]]]:
    """Yields (name, classes of forward and backward kernel, the two calls) at the published sizes."""
    attention = importlib.import_module("cnm_kernels.triton.attention")
    linear_nll = importlib.import_module("cnm_kernels.triton.linear_nll")
    for dtype in (torch.bfloat16, torch.float32):
        for B, L, weighted in ((384, 50, True), (128, 200, False)):
            q = torch.randn(B, L, 3, 4, 64, device=device).to(dtype)
            moment = (torch.rand(B, device=device), torch.rand(B, device=device)) if weighted else (None, None)
            shared = (None, *moment, 5.5, 0.1, False, True, None, 0.125)
            out, stats, _ = attention.forward(q, None, None, *shared, False)
            needs = (True, False, False, weighted)
            keys = tuple(
                configurations.class_of(*attention.kernel_and_size(name, q[:, :, 0].transpose(1, 2), weighted))
                for name in ("attention", "attention_backward")
            )

            def forward(q: torch.Tensor = q, shared: tuple = shared) -> None:
                attention.forward(q, None, None, *shared, False)

            def backward(
                q: torch.Tensor = q,
                out: torch.Tensor = out,
                stats: torch.Tensor = stats,
                shared: tuple = shared,
                needs: tuple = needs,
            ) -> None:
                attention.backward(out, None, q, None, None, *shared, stats, *needs)

            yield f"attention {L}x{L} {dtype}", keys, (forward, backward)  # type: ignore[misc]
        hidden = torch.randn(384, 20, 256, device=device).to(dtype)
        weight, bias = torch.randn(8001, 256, device=device).to(dtype), torch.zeros(8001, device=device)
        target = torch.randint(8001, (384, 20), device=device)
        lengths = torch.full((384,), 20, device=device)
        nll, _, stats, expected = linear_nll.forward(hidden, weight, bias, target, lengths, 0.1, False, True)
        words = (hidden, weight, bias, target, lengths, 0.1)

        def forward_loss(words: tuple = words) -> None:
            linear_nll.forward(*words, False, True)

        def backward_loss(
            words: tuple = words,
            kept: tuple = (nll, stats, expected),
        ) -> None:
            linear_nll.backward(kept[0], *words, kept[1], kept[2], True, True, True)

        keys = tuple(
            configurations.class_of(name, hidden, hidden.size(-1)) for name in ("linear_nll", "linear_nll_backward")
        )
        yield f"loss {dtype}", keys, (forward_loss, backward_loss)  # type: ignore[misc]


def best(key: Key, call: Call, time: Callable[[Call], float]) -> tuple[Configuration, float]:
    """Returns the fastest candidate of a class and its time; skips candidates that do not fit the GPU."""
    classes = TABLE[key[:2]]
    place = next(index for index, (most, _) in enumerate(classes) if most == key[2])
    own = classes[place]
    times: dict[Configuration, float] = {}
    try:
        for candidate in dict.fromkeys([own[1], *candidates(key[0])]):
            classes[place] = (key[2], candidate)
            try:
                times[candidate] = time(call)
            except Exception as error:  # too many registers, too much shared memory, or a tile that Triton refuses
                if candidate is own[1]:
                    raise
                print(f"  {candidate}: {type(error).__name__}", file=sys.stderr)
    finally:
        classes[place] = own
    chosen = min(times, key=lambda candidate: times[candidate])
    return chosen, times[chosen]


def write(path: Path, found: dict[Key, Configuration]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    table = [[*key, asdict(chosen)] for key, chosen in found.items()]
    temporary.write_text(json.dumps({"format": configurations.FORMAT, "table": table}, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cnm_kernels.triton.autotune", description=__doc__)
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("autotune: needs an NVIDIA GPU", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    device = torch.cuda.get_device_name()
    path = configurations.tuned_path(device)
    found: dict[Key, Configuration] = {}
    with configurations.tuning():
        for name, keys, pair in calls("cuda"):
            for key, call in zip(keys, pair, strict=True):
                found[key], milliseconds = best(key, call, lambda call: float(do_bench(call)))
                print(f"{name}, {key[0]}: {found[key]}, {1e3 * milliseconds:.1f} us", flush=True)
    write(path, found)
    configurations.tuned.cache_clear()
    print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
