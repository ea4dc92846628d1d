"""The whole training step, both updates, and localization: the published formulation against ours.

Every contender starts from the same parameters and is checked before it is timed: without dropout, with the same words
masked, its losses (or centers) must be the published formulation's in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import rivals
from benchmarks.registry import OURS, Case, Contender, Goal, Refused, Table
from cnm import CNM, configs
from cnm.config import CNMConfig
from cnm.data.batch import Batch
from cnm.models.base import PRECISIONS
from cnm.precision import HIGH
from cnm.precision import products_of as float32_products_of
from cnm.training.step import STEPS
from cnm_kernels.constants import KEY_WEIGHT_EPS, LABEL_SMOOTHING

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where the published formulation is written down
import published

RECOMPUTED = "ours, --step recompute"
HIGH_PRECISION = "ours, --precision high"
COMPILED, PRODUCTS = "published, compiled", "products alone"
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2}  # error, of the largest of the results compared
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Experiment:
    """Sizes of one training batch, as the published configurations have them."""

    name: str
    B: int
    T: int
    frame_dim: int
    L: int
    V: int
    word_dim: int = 300

    def batch(self, dtype: torch.dtype = torch.float32) -> Batch:
        """``dtype`` of the frames: as the loader reads them for a model that computes in it."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(max(self.L // 4, 1), self.L - self.L // 6 + 1, (self.B,), generator=generator)
        lengths[0] = self.L
        real = torch.arange(self.L) < lengths[:, None]
        return Batch(
            frames=torch.randn(self.B, self.T, self.frame_dim, generator=generator).to(dtype),
            frame_lengths=torch.full((self.B,), self.T),
            words=torch.randn(self.B, self.L + 1, self.word_dim, generator=generator),
            word_ids=torch.randint(1, self.V, (self.B, self.L), generator=generator) * real,
            word_lengths=lengths,
            mask_weights=real.float() / lengths[:, None],
        )

    def config(self) -> CNMConfig:
        sizes = {
            "dataset.frame_dim": self.frame_dim,
            "dataset.word_dim": self.word_dim,
            "dataset.vocab_size": self.V - 1,  # padding not counted
            "dataset.max_num_frames": self.T,
            "dataset.max_num_words": self.L,
        }
        config = configs.resolve("charades_i3d", [f"{name}={value}" for name, value in sizes.items()])
        assert isinstance(config, CNMConfig)
        return config


CHARADES = Experiment("Charades-STA, I3D", 128, 200, 1024, 13, 1112)
ACTIVITYNET = Experiment("ActivityNet, CLIP", 128, 200, 512, 20, 8001)
TINY = {
    CHARADES: Experiment("Charades-STA, I3D", 3, 16, 12, 7, 37),
    ACTIVITYNET: Experiment("ActivityNet, CLIP", 3, 16, 8, 9, 61),
}

# ---- contenders: (experiment, dtype, dropout) -> a call that trains on the same batch, or localizes it ----

Make = Callable[[Experiment, str, bool], Callable[[], Any]]


def _ours(experiment: Experiment, dtype: str, dropout: bool) -> CNM:
    torch.manual_seed(0)
    model = CNM(experiment.config()).train(dropout)
    model.compute_dtype = PRECISIONS["bf16" if dtype == "bfloat16" else "float32"]
    return model


def masked_words(batch: Batch) -> Tensor:
    """The first third of each sentence."""
    place = torch.arange(batch.words.size(1))
    return (place > 0) & (place <= (batch.word_lengths // 3).clamp_min(1)[:, None])


def our_step(experiment: Experiment, dtype: str, dropout: bool, step_name: str = "lean") -> Callable[[], Any]:
    model = _ours(experiment, dtype, dropout)
    batch = experiment.batch(getattr(torch, dtype))
    step = STEPS[step_name](model, model.config)
    masked = masked_words(batch)
    return lambda: step(batch, masked_words=(masked, masked))


def our_recomputing_step(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    return our_step(experiment, dtype, dropout, "recompute")


def in_high_precision(make: Make) -> Make:
    """Ours with float32 products as ``--precision high`` has them: on CPUs without AMX the same once more."""

    def made(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
        step = make(experiment, dtype, dropout)

        def call() -> Any:
            with float32_products_of(HIGH):
                return step()

        return call

    return made


def our_localization(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    model, batch = _ours(experiment, dtype, False), experiment.batch(getattr(torch, dtype))
    return lambda: model.localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)


def _published(experiment: Experiment, dropout: bool) -> published.PublishedCNM:
    ours = _ours(experiment, "float32", False)
    sizes = published.Sizes(
        experiment.frame_dim,
        experiment.word_dim,
        experiment.V,
        d_model=256,
        num_heads=4,
        alpha=ours.alpha,
        max_width=ours.max_width,
        input_dropout=ours.input_dropout if dropout else 0.0,
        dropout=ours.dropout if dropout else 0.0,
    )
    model = published.PublishedCNM(sizes)
    model.load_state_dict(ours.state_dict())
    return model.train(dropout)


def _published_step(
    experiment: Experiment, dtype: str, dropout: bool, change: Callable[[published.PublishedCNM], None] | None = None
) -> Callable[[], Any]:
    model, batch = _published(experiment, dropout), experiment.batch()
    config = experiment.config()
    reconstructor, generator = (
        published.Schedule(group.lr, group.warmup_updates, group.warmup_init_lr)
        for group in (config.train.reconstructor, config.train.generator)
    )
    step = published.PublishedStep(model, reconstructor, generator, config.loss.beta_1, config.loss.beta_2)
    if change is not None:
        change(model)
    masked = masked_words(batch)
    inputs = (batch.frames, batch.frame_lengths, batch.words, batch.word_ids, batch.word_lengths)

    def call() -> dict[str, Tensor]:
        with torch.autocast("cpu", AUTOCAST[dtype], enabled=AUTOCAST[dtype] is not None):
            return step(inputs, (masked, masked))

    return call


def published_step(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    return _published_step(experiment, dtype, dropout)


def compiled_step(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    def change(model: published.PublishedCNM) -> None:
        model.forward = torch.compile(model.forward, dynamic=False)

    return _published_step(experiment, dtype, dropout, change)


def composed_step(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    """The same with PyTorch's fused parts: SDPA without weights, R1 with them, R2 for the loss."""

    def change(model: published.PublishedCNM) -> None:
        for module in model.modules():
            if isinstance(module, published.Attention):
                module.__class__ = ComposedAttention
        model.__class__ = ComposedCNM

    return _published_step(experiment, dtype, dropout, change)


def published_localization(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    model, batch = _published(experiment, False), experiment.batch()

    def call() -> Any:
        with torch.no_grad(), torch.autocast("cpu", AUTOCAST[dtype], enabled=AUTOCAST[dtype] is not None):
            return model.localize(batch.frames, batch.frame_lengths, batch.words, batch.word_lengths)

    return call


class ComposedAttention(published.Attention):
    def forward(
        self, query: Tensor, source: Tensor, source_real: Tensor, key_weight: Tensor | None, causal: bool
    ) -> Tensor:
        H = self.num_heads
        if query is source:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            D = query.size(-1)
            q = F.linear(query, self.in_proj_weight[:D], self.in_proj_bias[:D])
            k, v = F.linear(source, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (q, k, v))
        # Padding lies at the end: causal attention never lets it in, and a bias keeps it out elsewhere.
        weight = source_real.to(k.dtype) if key_weight is None else key_weight * source_real
        if key_weight is None and (causal or bool(source_real.all())):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            out = rivals.sdpa_with_key_bias(q, k, v, torch.log(weight.float() + KEY_WEIGHT_EPS), causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ComposedCNM(published.PublishedCNM):
    def branch_nll(self, state: Tensor, word_ids: Tensor, word_real: Tensor) -> Tensor:
        weight, bias = (parameter.to(state.dtype) for parameter in (self.fc_rec.weight, self.fc_rec.bias))
        token = F.linear_cross_entropy(
            state.flatten(0, 1),
            weight,
            word_ids.flatten(),
            linear_bias=bias,
            reduction="none",
            label_smoothing=LABEL_SMOOTHING,
        ).view(word_ids.shape)
        return (token.float() * word_real).sum(dim=1) / word_real.sum(dim=1)


def products_alone(experiment: Experiment, dtype: str, dropout: bool) -> Callable[[], Any]:
    """The matrix products of our step and nothing else, by PyTorch's own routines on operands that lie ready."""
    return products_of(our_step(experiment, dtype, dropout), dtype)


def products_of(step: Callable[[], Any], dtype: str) -> Callable[[], Any]:
    """The products alone of a call."""
    with Products() as products:
        step()
    calls = products.calls(torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    def call() -> None:
        for multiply in calls:
            multiply()

    return call


class Products(TorchDispatchMode):
    """Records the products that our ops stand for: (batch, M, N, K) each."""

    LEFT_TO_PYTORCH = ("mm", "addmm")  # of ``linear``, where its library is faster

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removesuffix(".default")
        namespace, _, op = name.partition(".")
        handler = getattr(self, op, None) if namespace == "cnm_kernels" or op in self.LEFT_TO_PYTORCH else None
        if handler is not None:
            handler(*args)
        return function(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Any, relu: bool, lengths: Tensor | None, split: bool) -> None:
        groups, rows, M, K = self._linear(x, weight, lengths)
        self.shapes.append((groups, rows, M, K))

    def linear_backward(
        self, d_out: Tensor, x: Any, weight: Tensor, out: Any, lengths: Tensor | None, split: bool, *needs: bool
    ) -> None:
        groups, rows, M, K = self._linear(d_out, weight, lengths)
        need_x, need_weight, _ = needs
        self.shapes += [(groups, rows, K, M)] * need_x + [(groups, M, K, rows)] * need_weight

    def mm(self, a: Tensor, b: Tensor) -> None:
        self.shapes.append((1, a.size(0), b.size(1), a.size(1)))

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor) -> None:
        self.mm(a, b)

    def _linear(self, x: Tensor, weight: Tensor, lengths: Tensor | None) -> tuple[int, int, int, int]:
        """Of x, or of the gradient of its product."""
        M, K = weight.shape[-2:]
        groups = weight.size(0) if weight.dim() == 3 else 1
        width = groups * x.size(-1)
        rows = x.numel() // width if lengths is None else int(lengths.clamp(max=x.size(1)).sum())
        return groups, rows, M, K

    def absorbed_attention(self, query: Tensor, key: Tensor, *others: Any) -> None:
        B, queries, keys, D = self._absorbed(query, key, *others)
        self.shapes += [(B, queries, keys, D), (B, queries, D, keys)]

    def absorbed_attention_backward(self, d_out: Tensor, query: Tensor, key: Tensor, *others: Any) -> None:
        B, queries, keys, D = self._absorbed(query, key, *others)
        need_query, need_key, need_value = others[6:9]
        self.shapes += [(B, queries, keys, D)] * 2 + [(B, queries, D, keys)] * need_query
        self.shapes += [(B, keys, D, queries)] * (2 if others[0] is None else need_key + need_value)

    def _absorbed(self, query: Tensor, key: Tensor, *others: Any) -> tuple[int, int, int, int]:
        """Counts in every sample as many queries and keys as are valid on average."""
        query_lengths, key_lengths = others[3:5]
        B, H, Lk, D = key.shape
        queries = query.size(1) if query_lengths is None else round(float(query_lengths.float().mean()))
        keys = Lk if key_lengths is None else round(float(key_lengths.clamp(max=Lk).float().mean()))
        return B, queries, H * keys, D

    def _attention(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[int, int, int, int]:
        if key is None:
            B, L, _, H, d = query.shape
            return B * H, L, L, d
        B, H, Lq, d = query.shape
        return B * H, Lq, key.size(1 if value is None else 2), d

    def attention(self, query: Tensor, key: Tensor | None, value: Tensor | None, *_: Any) -> None:
        heads, Lq, Lk, d = self._attention(query, key, value)
        self.shapes += [(heads, Lq, Lk, d), (heads, Lq, d, Lk)]

    def attention_backward(self, d_out: Tensor, d_weights: Any, query: Tensor, key: Any, value: Any, *_: Any) -> None:
        heads, Lq, Lk, d = self._attention(query, key, value)
        self.shapes += [(heads, Lq, Lk, d), (heads, Lq, d, Lk), (heads, Lk, d, Lq), (heads, Lk, d, Lq)]

    def linear_nll(self, hidden: Tensor, weight: Tensor, bias: Any, target: Any, lengths: Tensor, *_: Any) -> None:
        self.shapes.append((1, int(lengths.sum()), *weight.shape))

    def linear_nll_backward(
        self, d_nll: Tensor, hidden: Tensor, weight: Tensor, bias: Any, target: Any, lengths: Tensor, *others: Any
    ) -> None:
        (V, D), rows = weight.shape, int(lengths.sum())
        need_hidden, need_weight, _ = others[-3:]
        self.shapes += [(1, rows, D, V)] * need_hidden + [(1, V, D, rows)] * need_weight

    def calls(self, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
        """One call per product; equal shapes share operands."""
        made: dict[tuple[int, int, int, int], Callable[[], Tensor]] = {}
        for shape in self.shapes:
            if shape not in made:
                batch, M, N, K = shape
                a, b = torch.randn(batch, M, K).to(dtype), torch.randn(batch, N, K).to(dtype).mT
                out = torch.empty(batch, M, N, dtype=dtype)
                if batch == 1:
                    made[shape] = partial(torch.mm, a[0], b[0], out=out[0])
                else:
                    made[shape] = partial(torch.bmm, a, b, out=out)
        return [made[shape] for shape in self.shapes]

    def flops(self) -> float:
        return float(sum(2 * batch * M * N * K for batch, M, N, K in self.shapes))


# ---- cases ----


def make_case(
    name: str,
    experiment: Experiment,
    dtype: str,
    makers: dict[str, tuple[Make, str]],
    goals: Sequence[Goal],
    *,
    trains: bool,
    losses: Sequence[str] = ("loss/reconstruction", "loss/contrastive"),
    allowed: dict[str, float] = ALLOWED,
) -> Case:
    """``makers``: contender -> how it is made and its dtype; ours first, "published" the one that is right.

    ``losses`` are what of a step's results is compared; of a call that gives tensors, all of them."""
    contenders = {
        key: Contender(make, bound=key == PRODUCTS, compiled=key == COMPILED) for key, (make, _) in makers.items()
    }

    def tensors(found: Any) -> tuple[Tensor, ...]:
        return tuple(found[key] for key in losses) if isinstance(found, dict) else tuple(found)

    def prepare(contender: str) -> Callable[[], Any]:
        make, own_dtype = makers[contender]
        return make(experiment, own_dtype, True)

    def result(contender: str) -> tuple[Tensor, ...]:
        make, own_dtype = makers[contender]
        return tensors(make(experiment, own_dtype, False)())

    expected: list[tuple[Tensor, ...]] = []

    def verify(contender: str, call: Callable[[], Any]) -> dict[str, float]:
        if contenders[contender].bound:
            return {}
        if not expected:
            make = makers["published"][0]
            expected.append(tensors(make(experiment, "float32", False)()))
        errors = {}
        largest = max(float(want.abs().max()) for want in expected[0])
        for key, got, want in zip(losses, result(contender), expected[0], strict=True):
            error = errors[key] = float((got.double() - want.double()).abs().max()) / largest
            if not error <= allowed[makers[contender][1]]:
                raise Refused(f"errs by {error:.2g} in {key}, {allowed[makers[contender][1]]:.2g} allowed")
        return errors

    title = f"{name}, {experiment.name}, B={experiment.B}"
    return Case(title, dtype, contenders, prepare, verify, tuple(goals), trains=trains)


def step_case(experiment: Experiment, dtype: str) -> Case:
    """bfloat16 is held against the published formulation in float32, which is what it replaces."""
    narrow = dtype == "bfloat16"
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_step, dtype),
        RECOMPUTED: (our_recomputing_step, dtype),
        **({} if narrow else {HIGH_PRECISION: (in_high_precision(our_step), dtype)}),
        "published": (published_step, "float32"),
        **({"published, autocast": (published_step, dtype)} if narrow else {}),
        COMPILED: (compiled_step, dtype),
        "published, SDPA + R1 + R2": (composed_step, dtype),
        PRODUCTS: (products_alone, dtype),
    }
    goals = [
        Goal("time", "published", 8 if narrow else 3),
        Goal("time", PRODUCTS, round(1 / (1.7 if narrow else 1.25), 3)),
        Goal("peak", "published", 4),
        Goal("time", "published", 8 if narrow else 3, of=RECOMPUTED),
        Goal("peak", "published", 4, of=RECOMPUTED),
    ]
    return make_case("training step", experiment, dtype, makers, goals, trains=True)


def localization_case(experiment: Experiment, dtype: str) -> Case:
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_localization, dtype),
        "published": (published_localization, "float32"),
        **({"published, autocast": (published_localization, dtype)} if dtype == "bfloat16" else {}),
    }
    goals = [Goal("time", "published", 6 if dtype == "bfloat16" else 2)]
    return make_case("localization", experiment, dtype, makers, goals, trains=False)


def cases(quick: bool) -> Sequence[Case]:
    experiments = [TINY[experiment] if quick else experiment for experiment in (CHARADES, ACTIVITYNET)]
    return [
        make(experiment, dtype)
        for experiment in experiments
        for make in (step_case, localization_case)
        for dtype in ("float32", "bfloat16")
    ]


TABLE = Table("step", "The whole training step and localization", cases, repeats=3)


def test_step(benchmark: Any, call: Any) -> None:
    benchmark(call)
