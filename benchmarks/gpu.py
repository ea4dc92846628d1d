"""``python -m benchmarks gpu``: the ops on an NVIDIA GPU against every rival, beside their goals and floors.

Times are of a CUDA graph that holds one call, so that they are the kernels' and not Python's: the median of many
replays, with the L2 cache flushed before each (cold) and not (warm). Forward and backward are captured apart. Launches
are kernels of one call as the profiler counts them. Every contender is held to float64 first. Floors are the bytes that
any implementation moves, each input read and each output written once, at an H100's 3.35 TB/s. Where there is no GPU
the table says what was skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnm_kernels
from benchmarks import gpu_launches, gpu_predict_report, gpu_step, rivals
from benchmarks.bench_attention import ALPHA
from benchmarks.op_case import ROUNDINGS_OURS, ROUNDINGS_RIVAL, TIMES_REFERENCE, normal_like, relative_error, rounding
from benchmarks.report import markdown
from cnm_kernels import registry
from cnm_kernels.constants import KEY_WEIGHT_EPS, LABEL_SMOOTHING

Inputs = dict[str, Any]
REPLAYS = 50
FLUSH_BYTES = 256 << 20  # several times any L2
NO_GPU = "needs an NVIDIA GPU"
HEADER = ["contender", "forward us cold (warm)", "backward us cold (warm)", "launches", "verdict"]


@dataclass(frozen=True)
class Row:
    """One op at one size. Floors and goals are microseconds on an H100, forward and backward (or both together)."""

    name: str
    inputs: Callable[[str], Inputs]
    differentiable: tuple[str, ...]
    ours: Callable[..., Any]
    rivals: dict[str, Callable[..., Any]]
    floor: tuple[float, ...]
    goal: tuple[float, ...]


@dataclass
class Result:
    """One contender's outcome."""

    row: str
    contender: str
    status: str = "measured"
    reason: str = ""
    forward: tuple[float, float] | None = None  # us, cold and warm
    backward: tuple[float, float] | None = None
    launches: tuple[int, int] | None = None
    errors: dict[str, float] = field(default_factory=dict)


# ---- rows ----


def attention_inputs(B: int, Lq: int, Lk: int, causal: bool, weighted: bool, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": Lq, "key": Lk, "value": Lk}
    # As a model hands them over: [B, L, H, d] in memory.
    heads = {
        name: torch.randn(B, L, 4, 64, generator=generator).to(device, dtype).transpose(1, 2)
        for name, L in shapes.items()
    }
    if not weighted:
        return heads | {"causal": causal}
    moment = {"center": torch.rand(B, generator=generator), "width": 0.15 + 0.85 * torch.rand(B, generator=generator)}
    return heads | {name: value.to(device) for name, value in moment.items()} | {"alpha": ALPHA, "causal": causal}


def loss_inputs(branches: int, V: int, dtype: torch.dtype, device: str, B: int = 128, L: int = 20) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = {
        "hidden": torch.randn(branches, B, L, 256, generator=generator).to(dtype),
        "weight": (torch.randn(V, 256, generator=generator) / 16).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "target": torch.randint(V, (B, L), generator=generator),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def our_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Mean nll [branches, B], or with three branches the contrastive loss."""
    lengths = torch.full(target.shape[:1], target.size(1), device=target.device)
    if hidden.size(0) == 3:
        return cnm_kernels.contrastive_reconstruction_loss(hidden, weight, bias, target, lengths)[0]
    return cnm_kernels.linear_nll(hidden[0], weight, bias, target, lengths)[None]


def rival_loss(
    token_nll: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
) -> Tensor:
    words = target.flatten().repeat(hidden.size(0))
    nll = token_nll(hidden.flatten(0, 2), weight, bias, words).view(hidden.shape[:3]).float().mean(-1)
    return rivals.contrast(nll)[0] if hidden.size(0) == 3 else nll


def eager_nll(hidden: Tensor, weight: Tensor, bias: Tensor, words: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, words, reduction="none", label_smoothing=LABEL_SMOOTHING)


def linear_cross_entropy_nll(hidden: Tensor, weight: Tensor, bias: Tensor, words: Tensor) -> Tensor:
    """R2."""
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": LABEL_SMOOTHING}
    return F.linear_cross_entropy(hidden, weight, words, linear_bias=bias, **options)


def cut_cross_entropy_nll(hidden: Tensor, weight: Tensor, bias: Tensor, words: Tensor) -> Tensor:
    """Apple's, without gradient filter; the bias as a column, the smoothing in closed form."""
    from cut_cross_entropy import linear_cross_entropy

    ones = hidden.new_zeros(hidden.size(0), 8).index_fill_(1, torch.zeros(1, dtype=torch.long, device=hidden.device), 1)
    with_bias = torch.cat([weight, F.pad(bias[:, None], (0, 7))], 1)
    nll = linear_cross_entropy(torch.cat([hidden, ones], 1), with_bias, words, reduction="none", filter_eps=None)
    target_logit = (hidden * F.embedding(words, weight)).sum(-1) + bias[words]
    return nll + LABEL_SMOOTHING * (target_logit - hidden @ weight.mean(0) - bias.mean())


def liger_nll(hidden: Tensor, weight: Tensor, bias: Tensor, words: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    result = Liger.apply(hidden, weight, words, bias, None, -100, 0.0, LABEL_SMOOTHING, "none")
    return result[0] if isinstance(result, tuple) else result


def flex_attention(query: Tensor, key: Tensor, value: Tensor, **weighting: Any) -> Tensor:
    """FlexAttention with log(m + 1e-10) added to the scores."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    causal = weighting["causal"]
    modification = None
    if "center" in weighting:
        mask = rivals.gaussian(weighting["center"], weighting["width"], key.size(2), weighting["alpha"])
        bias = torch.log(mask + KEY_WEIGHT_EPS)

        def modification(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[b, j]

    past = create_block_mask(lambda b, h, i, j: i >= j, None, None, query.size(2), key.size(2)) if causal else None
    return flex(query, key, value, score_mod=modification, block_mask=past)


def rows(quick: bool) -> list[Row]:
    gaussian: dict[str, Callable[..., Any]] = {
        "eager": rivals.eager_gaussian_attention,
        "compile": torch.compile(rivals.eager_gaussian_attention, dynamic=False),
        "SDPA, mask": rivals.sdpa_gaussian_attention,
        "R1": rivals.augmented_gaussian_attention,
        "FlexAttention": torch.compile(flex_attention, dynamic=False),
    }
    plain: dict[str, Callable[..., Any]] = {
        "SDPA": rivals.sdpa_attention,
        "eager": rivals.eager_attention,
        "compile": torch.compile(rivals.eager_attention, dynamic=False),
        "FlexAttention": torch.compile(flex_attention, dynamic=False),
    }
    losses: dict[str, Callable[..., Any]] = {
        "eager": partial(rival_loss, eager_nll),
        "compile": torch.compile(partial(rival_loss, eager_nll), dynamic=False),
        "R2": partial(rival_loss, linear_cross_entropy_nll),
        "Liger": partial(rival_loss, liger_nll),
        "CCE, exact": partial(rival_loss, cut_cross_entropy_nll),
    }
    qkv, moment = ("query", "key", "value"), ("center", "width")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        narrow = dtype == torch.bfloat16  # for which floors and goals are stated
        label = str(dtype).removeprefix("torch.")
        for name, shape, weighted, floor, goal in (
            ("attention 200x200 causal, B=128", (128, 200, 200, True), False, (15.8, 27.5), (20, 38)),
            ("attention 50x50 causal, Gaussian, B=128", (128, 50, 50, True), True, (3.9, 6.9), (6, 10)),
            ("attention 20x50, Gaussian, B=128", (128, 20, 50, False), True, (2.8, 5.1), (5, 8)),
            ("attention 50x50 causal, Gaussian, B=384", (384, 50, 50, True), True, (11.8, 20.6), (15, 27)),
        ):
            found.append(
                Row(
                    f"{name}, {label}",
                    partial(attention_inputs, *(2 if quick else shape[0], *shape[1:]), weighted, dtype),
                    (*qkv, *moment) if weighted else qkv,
                    cnm_kernels.gaussian_attention if weighted else cnm_kernels.weighted_attention,
                    gaussian if weighted else plain,
                    floor if narrow else (),
                    goal if narrow else (),
                )
            )
        for branches, V, floor_both, goal_both in (
            (1, 1111, 5.9, 18),
            (1, 8000, 42.4, 80),
            (3, 1111, 17.7, 32),
            (3, 8000, 127, 220),
        ):
            found.append(
                Row(
                    f"loss {branches * 2560}x{V}, {label}",
                    partial(loss_inputs, branches, 37 if quick else V, dtype),
                    ("hidden", "weight", "bias"),
                    our_loss,
                    losses,
                    (floor_both,) if narrow else (),
                    (goal_both,) if narrow else (),
                )
            )
    return found


# ---- measuring ----


def contenders(row: Row) -> Iterator[tuple[str, Callable[..., Any], str | None]]:
    """(name, function, backend of ours or None); ours first."""
    for backend in ("triton", "native"):
        yield f"ours, {backend}", row.ours, backend
    for name, function in row.rivals.items():
        yield name, function, None


def unavailable(name: str, backend: str | None) -> str | None:
    """Why a contender cannot run on this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return NO_GPU
    if backend is not None:
        return registry.unavailable("gaussian_attention", backend, "cuda", torch.bfloat16)
    package = {"Liger": "liger_kernel", "CCE, exact": "cut_cross_entropy"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return rivals.LINEAR_CROSS_ENTROPY_MISSING if name == "R2" else None


def leaves_of(row: Row, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs, differentiable ones as leaves; in another dtype where one is given."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.to(dtype or value.dtype)
        found[name] = value.detach().requires_grad_() if name in row.differentiable else value
    return found


def forward_and_gradients(row: Row, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    out = function(**inputs)
    return [out, *torch.autograd.grad(out, [inputs[name] for name in row.differentiable], normal_like(out))]


def verify(row: Row, function: Callable[..., Any], backend: str | None, device: str) -> dict[str, float]:
    """Relative errors against float64. Raises ``AssertionError`` where they exceed the budget of ``op_case``."""
    inputs = row.inputs(device)
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    with cnm_kernels.use_backend("torch"):
        exact = forward_and_gradients(row, row.ours, leaves_of(row, inputs, torch.float64))
        plain = forward_and_gradients(row, row.ours, leaves_of(row, inputs))
    with cnm_kernels.use_backend(backend):
        got = forward_and_gradients(row, function, leaves_of(row, inputs))
    errors = {}
    roundings = ROUNDINGS_RIVAL if backend is None else ROUNDINGS_OURS
    for name, mine, theirs, want in zip(("output", *row.differentiable), got, plain, exact, strict=True):
        error = errors[name] = relative_error(mine, want)
        allowed = TIMES_REFERENCE * relative_error(theirs, want) + roundings * rounding(first.dtype)
        assert error <= allowed, f"errs by {error:.2g} in {name}, {allowed:.2g} allowed"
    return errors


def measure(row: Row, name: str, function: Callable[..., Any], backend: str | None) -> Result:
    result = Result(row.name, name)
    reason = unavailable(name, backend)
    if reason is not None:
        result.status, result.reason = "skipped", reason
        return result
    try:
        result.errors = verify(row, function, backend, "cuda")
        with cnm_kernels.use_backend(backend):
            time_on_gpu(row, function, result)
    except AssertionError as error:
        result.status, result.reason = "refused", str(error)
    except Exception as error:  # the other rows are still worth having
        result.status, result.reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return result


def time_on_gpu(row: Row, function: Callable[..., Any], result: Result) -> None:
    """Fills in forward, backward and launches."""
    inputs = leaves_of(row, row.inputs("cuda"))
    leaves = [inputs[name] for name in row.differentiable]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs a backward where its forward ran: capture both here
        upstream = normal_like(function(**inputs))

        def forward() -> Tensor:
            return function(**inputs)

        for _ in range(3):
            out = forward()
            torch.autograd.grad(out, leaves, upstream)
        out = forward()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        backward()
        result.forward, result.backward = times(forward, stream), times(backward, stream)
        result.launches = launches(forward), launches(backward)
    torch.cuda.current_stream().wait_stream(stream)


def times(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[float, float]:
    """Median microseconds of a replay, the L2 cache cold and warm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    medians = []
    for cold in (True, False):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
        for start, end in events:
            if cold:
                flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        medians.append(1e3 * statistics.median(start.elapsed_time(end) for start, end in events))
    return medians[0], medians[1]


def launches(call: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def measured_times(row: Row, backend: str) -> list[float | None]:
    """us of our forward and backward with a cold L2; None where it does not run."""
    result = measure(row, f"ours, {backend}", row.ours, backend)
    return [None if pair is None else pair[0] for pair in (result.forward, result.backward)]


# ---- reporting ----


def verdict(row: Row, result: Result) -> str:
    """Against the goal, which is stated for ours on an H100 with a cold L2."""
    if result.forward is None or result.backward is None:
        return f"{result.status}: {result.reason}"
    if not result.contender.startswith("ours") or not row.goal:
        return ""
    taken = (result.forward[0], result.backward[0])
    taken = taken if len(row.goal) == 2 else (sum(taken),)  # type: ignore[assignment]
    return "met" if all(us <= goal for us, goal in zip(taken, row.goal, strict=True)) else "MISSED"


def text(row: Row, results: list[Result]) -> str:
    goal = " / ".join(f"{us:g}" for us in row.goal) or "none set"
    floor = " / ".join(f"{us:g}" for us in row.floor) or "not stated"
    lines = [HEADER]
    for result in results:
        cells = ["" if pair is None else f"{pair[0]:.1f} ({pair[1]:.1f})" for pair in (result.forward, result.backward)]
        counted = "" if result.launches is None else " + ".join(map(str, result.launches))
        lines.append([result.contender, *cells, counted, verdict(row, result)])
    return f"### {row.name}\n\ngoal {goal} us, floor {floor} us (H100, forward / backward)\n\n{markdown(lines)}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: all that could run was measured; 1: a contender was wrong or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="WORDS", default="", help="rows whose name holds this")
    parser.add_argument("--quick", action="store_true", help="small batches: shows that everything works")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--predict", action="store_true", help="by counting, without a GPU; measured beside, with one")
    parser.add_argument("--launches", action="store_true", help="of one training step, by counting, without a GPU")
    parser.add_argument("--step", action="store_true", help="training steps instead, with and without CUDA graphs")
    options = parser.parse_args(arguments)
    if options.step:
        return gpu_step.main(options.output)
    if options.launches:
        return gpu_launches.main(options.output)
    if options.predict:
        chosen = [row for row in rows(options.quick) if row.goal and options.only in row.name]
        return gpu_predict_report.main(chosen, options.output, measured_times)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: every row is skipped"
    print(f"GPU: {device}; torch {torch.__version__}, CUDA {torch.version.cuda}")
    records = []
    for row in rows(options.quick):
        if options.only not in row.name:
            continue
        results = [measure(row, *contender) for contender in contenders(row)]
        print(f"\n{text(row, results)}", flush=True)
        records += [asdict(result) for result in results]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gpu.json"
    path.write_text(json.dumps({"gpu": device, "torch": torch.__version__, "results": records}, indent=1) + "\n")
    print(f"\nWritten: {path}", file=sys.stderr)
    return int(any(record["status"] in ("refused", "failed") for record in records))
