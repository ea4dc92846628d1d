"""``python -m benchmarks gpu --launches``: kernels of one training step on a GPU, counted without one.

The step runs on meta tensors, which have shapes and no values, along the way that it takes on a GPU; a dispatch mode
sees every operation that would launch kernels there. Our operators are counted as their host code launches (held to the
emulator by tests), PyTorch's as ``KERNELS`` says: one each, but for those named. Assumed: a product is one kernel
(cuBLAS may split one and add its parts), and no kernel is left out for being empty in a library. What would break a
capture raises (a value read by the host, a shape that depends on one) or is listed (memory of the host).

Whether launches are what a step's time goes into is told by the least time that its kernels take on an H100: of each
operation the bytes of its operands and results, or its products, whichever takes longer, at the rates of
``gpu_predict`` and ``PRODUCTS_PER_SECOND``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import cnm_kernels
from benchmarks import bench_cpl, bench_step, gpu_predict
from benchmarks.report import markdown
from cnm.models.base import PRECISIONS
from cnm.training.base import ModelStep
from cnm.training.cuda_graph import GraphedStep
from cnm.training.steps import make_step
from cnm_kernels import native

GOAL = 220  # of CNM's whole step
ENOUGH_BLOCKS, TILE = 264, 64  # csrc/cuda: attention_backward.cu, tiles.cuh
# PyTorch's multi-tensor kernels: elements of a chunk; of a launch the chunks, and the tensors by how many lists it has
CHUNK, CHUNKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)
CAT_TENSORS = 128  # of a launch of cat
SORT = 4  # values and places copied, two kernels of a segmented sort
INDEX_PUT = 8  # that accumulates: the places are sorted first
# An H100's floating-point operations by the bytes of an operand: guesses, 65% and 90% of what its data sheet says.
PRODUCTS_PER_SECOND = {2: 0.65 * 989e12, 4: 0.9 * 67e12}
HEADER = ["model", "precision", "eager", "ours", "products", "casts", "other", "with a graph: in it", "launched",
          "kernels take, ms", "launches take, ms"]  # fmt: skip


# ---- kernels of one operation ----


def multi_tensor(tensors: Sequence[Tensor], lists: int) -> int:
    """Launches of PyTorch's multi-tensor kernels over so many lists of tensors like these."""
    launches = held = blocks = 0
    for place, tensor in enumerate(tensors):
        chunks = -(-tensor.numel() // CHUNK)
        held += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (held == TENSORS[lists - 1] and last) or blocks == CHUNKS or (place == len(tensors) - 1 and last):
                launches, blocks, held = launches + 1, 0, 0 if last else 1
    return launches


KERNELS: dict[str, Callable[..., int]] = {
    "_fused_adam_": lambda parameters, *_: multi_tensor(parameters, 4),
    "_foreach_copy_": lambda to, *_: multi_tensor(to, 2),
    "_foreach_mul_": lambda tensors, *_: multi_tensor(tensors, 1),
    "_foreach_zero_": lambda tensors, *_: multi_tensor(tensors, 1),
    "_foreach_add_": lambda tensors, *_: multi_tensor(tensors, 2),
    "_foreach_norm": lambda tensors, *_: 2 + multi_tensor(tensors, 1),  # zeros, partial norms, norms
    "cat": lambda tensors, *_: -(-len(tensors) // CAT_TENSORS),
    "stack": lambda tensors, *_: -(-len(tensors) // CAT_TENSORS),
    "sort": lambda *_: SORT,
    "select_backward": lambda *_: 2,  # zeros, and a copy into them
    "slice_backward": lambda *_: 2,
    "index_put": lambda _, __, ___, accumulate=False: 1 + (INDEX_PUT if accumulate else 1),  # the copy, and itself
    "index_add": lambda *_: 2,
}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation"}


def _backward_passes(B: int, H: int, Lq: int, Lk: int) -> int:
    return 1 if B * H >= ENOUGH_BLOCKS or max(Lq, Lk) <= TILE else 2


def _sizes(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[int, int, int, int]:
    B, H, Lq, Lk, _ = cnm_kernels.autograd.attention.sizes(query, key, value)
    return B, H, Lq, Lk


def _attention(*arguments: Any) -> int:
    return 1 + bool(arguments[-1])  # the weights of all heads


def _attention_backward(d_out: Tensor, d_weights: Tensor | None, *others: Any) -> int:
    return _backward_passes(*_sizes(*others[:3])) + bool(others[-1])


def _branched_attention_backward(d_out: Tensor, *others: Any) -> int:
    return _backward_passes(*_sizes(*others[:3])) + bool(others[-1])


def _linear_nll_backward(*arguments: Any) -> int:
    need_hidden, need_weight, need_bias = arguments[-3:]
    of_words = bool(need_weight or need_bias)
    return of_words + 2 * bool(need_hidden or of_words)  # products; what comes before and after them


OURS: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "branched_attention": lambda *_: 1,
    "branched_attention_backward": _branched_attention_backward,
    "linear_nll": lambda *_: 3,  # tokens listed, products, parts combined
    "linear_nll_backward": _linear_nll_backward,
    "intra_video_contrastive_loss": lambda *_: 1,
    "intra_video_contrastive_loss_backward": lambda *_: 1,
    "dropout": lambda *_: 1,
    "dropout_add_layer_norm": lambda *_: 1,
    "dropout_add_layer_norm_backward": lambda *arguments: 1 + bool(arguments[-1]),  # the parameters' parts summed
    "gaussian_mask": lambda *_: 1,
    "gaussian_mask_backward": lambda *_: 1,
}


def copies(name: str, arguments: Sequence[Any]) -> tuple[int, int]:
    """Copies that one of our ops has PyTorch do first: operands made contiguous, and operands or results cast."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor) and argument.numel() > 0]
    attends = "attention" in name
    heads = [tensor for tensor in tensors if attends and tensor.dim() >= 4]  # of which any strides will do but the last
    others = [tensor for tensor in tensors if not any(tensor is head for head in heads)]
    packed = sum(head.stride(-1) != 1 and head.size(-1) > 1 for head in heads)
    packed += sum(not tensor.is_contiguous() for tensor in others)
    cast = 0
    if attends:
        narrow = sum(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in others)  # weights of keys
        cast = narrow * 2 if name.endswith("_backward") and arguments[-1] else narrow
    elif name.startswith("linear_nll"):
        first = 1 if name.endswith("_backward") else 0
        hidden, weight, bias = arguments[first : first + 3]
        cast = (weight.dtype != hidden.dtype) + (bias.dtype != hidden.dtype)
        if name.endswith("_backward") and arguments[-1]:
            cast += bias.dtype != torch.float32
    return packed, cast


def _bytes_of(tensor: Tensor) -> int:
    """What an operation moves of it: an expanded dimension is read once."""
    elements = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 else min(size, 1)
    return elements


def least_seconds(function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    """The least time of an operation on an H100: that of its bytes, in from memory and out once, or of its products."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    touched = {id(tensor): _bytes_of(tensor) for tensor in given + returned}
    written = [
        leaf
        for place, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and place < len(args)
        for leaf in tree_leaves(args[place])
    ]
    moved = sum(touched.values()) + sum(map(_bytes_of, written))
    name, products, width = function._schema.name.partition("::")[2], 0, given[0].element_size() if given else 4
    if function._overloadpacket in flop_registry:
        products = flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
    elif name.startswith("linear_nll"):  # of logits and with them, forward and backward
        hidden, weight = args[1:3] if name.endswith("_backward") else args[:2]
        products, width = 4 * hidden.numel() * weight.size(0), hidden.element_size()
    return max(moved / gpu_predict.MEMORY, products / PRODUCTS_PER_SECOND.get(width, PRODUCTS_PER_SECOND[4]))


class Launches(TorchDispatchMode):
    """Counts, by operation, the kernels that a GPU would be given.

    Attributes:
        kernels: by "aten.name" or "ours.name"; casts and copies for ours are PyTorch's.
        seconds: by the same, the least time of the operations on an H100.
        of_host: operations that touch the host's memory, which a CUDA graph would hold as it was at capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.of_host: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        kwargs = kwargs or {}
        # The update in place has no meta kernel, and nothing to compute without values.
        result = None if name == "_fused_adam_" else function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        touched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + outputs
        if any(tensor.device.type == "cpu" for tensor in touched):
            self.of_host.append(str(function))
        before = self.total()
        if namespace.startswith("cnm_kernels"):
            packed, cast = copies(name, args)
            self.kernels[f"ours.{name}"] += OURS[name](*args)
            self.kernels["aten.clone"] += packed
            self.kernels["aten._to_copy"] += cast
        elif not function.is_view and name not in FREE and (not outputs or any(map(Tensor.numel, outputs))):
            self.kernels[f"aten.{name}"] += KERNELS[name](*args) if name in KERNELS else 1
        if self.total() > before:
            owner = "ours" if namespace.startswith("cnm_kernels") else "aten"
            self.seconds[f"{owner}.{name}"] += least_seconds(function, args, kwargs, result)
        return result

    def total(self) -> int:
        return self.kernels.total()


# ---- a training step ----


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Meta tensors take the way of a GPU's: our kernels, and PyTorch's multi-tensor ones."""
    like_cuda = mock.patch.dict(native.OPS, meta=native.OPS["cuda"])
    supported = "_get_foreach_kernels_supported_devices"
    together = mock.patch.object(_foreach_utils, supported, return_value=["cuda", "meta"])
    with like_cuda, together:
        yield


class Replay:
    """Stands for a captured graph: one launch."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@dataclass(frozen=True)
class Count:
    """Kernels of one training step.

    Attributes:
        eager: launched one by one.
        by_operation: the same, by operation.
        in_graph: held by the CUDA graph.
        launched: by the host where the graph is replayed: its launch, the batch's copies, the rates, the metrics.
        seconds: of the kernels in the graph, by operation, the least that an H100 takes.
        of_host: operations on the host's memory, which no graph may hold.
    """

    model: str
    precision: str
    eager: int
    by_operation: dict[str, int]
    in_graph: int
    launched: int
    seconds: dict[str, float]
    of_host: list[str]

    @property
    def launch_seconds(self) -> float:
        """What the launches within the graph take besides."""
        return self.in_graph * gpu_predict.NEXT_LAUNCH

    def share(self, kind: str) -> int:
        """Number of launches of a kind in ``eager``: "ours", "products" or "casts"."""
        names = {"products": {f"aten.{name}" for name in PRODUCTS}, "casts": {"aten._to_copy"}}
        return sum(
            number
            for name, number in self.by_operation.items()
            if (name.startswith("ours.") if kind == "ours" else name in names[kind])
        )


def meta_step(model_name: str, precision: str, step_name: str = "lean") -> tuple[ModelStep, Any]:
    """A step as ``GraphedStep`` runs it, and its batch, on meta tensors."""
    step, batch = model_step(model_name, precision, "meta", step_name)
    step.fixed_gradients = True
    return step, batch


def model_step(model_name: str, precision: str, device: str, step_name: str = "lean") -> tuple[ModelStep, Any]:
    """A step and its batch, at the published sizes of Charades-STA."""
    dtype = PRECISIONS[precision]
    if model_name == "CNM":
        experiment: Any = bench_step.CHARADES
        model: Any = bench_step.CNM(experiment.config())
    else:
        experiment = bench_cpl.CHARADES
        model = bench_cpl.CPL(experiment.cpl_config())
    model = model.to(device).train()
    model.compute_dtype = dtype
    batch = experiment.batch(dtype or torch.float32)
    batch = type(batch)(**{field.name: getattr(batch, field.name).to(device) for field in fields(batch)})
    return make_step(step_name, model, model.config), batch


def count(make: Callable[[], tuple[ModelStep, Any]], model_name: str, precision: str) -> Count:
    """Counts a step that has run before: all but the first are alike."""
    with as_on_a_gpu():
        step, batch = make()
        with Launches():
            metrics = step(batch)
        with Launches() as eager:
            step(batch)
        with Launches() as in_graph:
            step.run(batch)
        graphed, replay = GraphedStep(step), Replay()
        shapes = tuple(getattr(batch, field.name).shape for field in fields(batch))
        graphed.graphs[shapes] = replay, batch, metrics
        with Launches() as around:
            graphed(batch)
    return Count(
        model_name,
        precision,
        eager.total(),
        dict(eager.kernels.most_common()),
        in_graph.total(),
        around.total() + replay.replays,
        dict(sorted(in_graph.seconds.items(), key=lambda item: -item[1])),
        in_graph.of_host,
    )


# ---- reporting ----


def text(counts: Sequence[Count]) -> str:
    lines = [HEADER]
    for found in counts:
        shares = [found.share(kind) for kind in ("ours", "products", "casts")]
        numbers = (found.eager, *shares, found.eager - sum(shares), found.in_graph, found.launched)
        times = (f"{1e3 * seconds:.2f}" for seconds in (sum(found.seconds.values()), found.launch_seconds))
        lines.append([found.model, found.precision, *map(str, numbers), *times])
    said = [markdown(lines), f"\nGoal: {GOAL} kernels in CNM's step."]
    for found in counts:
        if found.model == "CNM":
            verdict = "met" if found.eager <= GOAL else f"MISSED by {found.eager - GOAL}"
            said.append(f"CNM, {found.precision}: {verdict}; with a graph the host launches {found.launched}.")
        if found.of_host:
            said.append(f"{found.model}, {found.precision}: no graph may hold {', '.join(sorted(set(found.of_host)))}")
    for found in counts:
        most = list(found.by_operation.items())[:12]
        said.append(f"{found.model}, {found.precision}, most: " + ", ".join(f"{n} {name}" for name, n in most))
        longest = ", ".join(f"{1e6 * seconds:.0f} us {name}" for name, seconds in list(found.seconds.items())[:12])
        said.append(f"{found.model}, {found.precision}, longest: {longest}")
    said.append("Times are of an H100, by bytes and products alone; nothing was measured.")
    return "\n".join(said)


def main(output: Path) -> int:
    """Exit code 0: counted; 1: it cannot be here."""
    if "cpu" in native.LOAD_ERRORS:
        print(f"launches are counted by the compiled operators' schemas, and {native.LOAD_ERRORS['cpu']}")
        return 1
    counts = [
        count(partial(meta_step, model, precision), model, precision)
        for model in ("CNM", "CPL")
        for precision in PRECISIONS
    ]
    print(text(counts))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "gpu_launches.json"
    path.write_text(json.dumps({"goal": GOAL, "counts": [asdict(found) for found in counts]}, indent=1) + "\n")
    print(f"\nWritten: {path}")
    return 0
