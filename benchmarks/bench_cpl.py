"""CPL's training step, and scoring a batch's proposals: the published formulation against ours, as in ``bench_step``.

The published formulation evaluates in full too: negatives and reference with the proposals.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_step import (
    AUTOCAST,
    COMPILED,
    HIGH_PRECISION,
    PRODUCTS,
    RECOMPUTED,
    Experiment,
    Make,
    in_high_precision,
    make_case,
    masked_words,
    products_of,
)
from benchmarks.registry import OURS, Case, Goal, Table
from cnm import configs
from cnm.config import CPLConfig
from cnm.models.base import PRECISIONS, Scoring
from cnm.models.cpl import CPL
from cnm.training.cpl_step import STEPS

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where the published formulation is written down
import published
import published_cpl

ALLOWED = {"float32": 1e-4, "bfloat16": 6e-2}  # narrow Gaussians magnify the rounding of centers and widths
EPOCH = 10  # of 30: the negatives have grown by half
LOSSES = ("loss/total", "loss/reconstruction", "loss/contrastive", "loss/diversity")


@dataclass(frozen=True)
class CPLExperiment(Experiment):
    """An experiment with K proposals, configured by the packaged ``config_name``."""

    config_name: str = "charades_cpl"
    K: int = 8

    def cpl_config(self) -> CPLConfig:
        sizes = {
            "dataset.frame_dim": self.frame_dim,
            "dataset.word_dim": self.word_dim,
            "dataset.vocab_size": self.V - 1,
            "dataset.max_num_frames": self.T,
            "dataset.max_num_words": self.L,
            "model.config.num_props": self.K,
        }
        config = configs.resolve(self.config_name, [f"{name}={value}" for name, value in sizes.items()])
        assert isinstance(config, CPLConfig)
        return config


CHARADES = CPLExperiment("Charades-STA, I3D", 32, 200, 1024, 13, 1112)
ACTIVITYNET = CPLExperiment("ActivityNet, C3D", 32, 200, 500, 20, 8001, config_name="activitynet_cpl")
TINY = {
    CHARADES: CPLExperiment("Charades-STA, I3D", 3, 16, 12, 7, 37, K=3),
    ACTIVITYNET: CPLExperiment("ActivityNet, C3D", 3, 16, 8, 9, 61, config_name="activitynet_cpl", K=3),
}


def _ours(experiment: Any, dtype: str, dropout: bool) -> CPL:
    torch.manual_seed(0)
    model = CPL(experiment.cpl_config()).train(dropout)
    model.compute_dtype = PRECISIONS["bf16" if dtype == "bfloat16" else "float32"]
    return model


def our_step(experiment: Any, dtype: str, dropout: bool, step_name: str = "lean") -> Callable[[], Any]:
    model = _ours(experiment, dtype, dropout)
    batch = experiment.batch(getattr(torch, dtype))
    step = STEPS[step_name](model, model.config)
    step.begin_epoch(EPOCH)
    masked = masked_words(batch)
    return lambda: step(batch, masked_words=[masked])


def our_recomputing_step(experiment: Any, dtype: str, dropout: bool) -> Callable[[], Any]:
    return our_step(experiment, dtype, dropout, "recompute")


def our_scoring(experiment: Any, dtype: str, dropout: bool) -> Callable[[], Any]:
    """The proposals' errors, best first. Weights of one and zero make one draw of words of it, the published ones."""
    model, batch = _ours(experiment, dtype, False), experiment.batch(getattr(torch, dtype))
    batch = dataclasses.replace(batch, mask_weights=masked_words(batch)[:, 1:].float())
    return lambda: (model.proposals(batch, scoring=Scoring(published=True)).score,)


def products_alone(experiment: Any, dtype: str, dropout: bool) -> Callable[[], Any]:
    return products_of(our_step(experiment, dtype, dropout), dtype)


def _published(experiment: Any, dropout: bool) -> published_cpl.PublishedCPL:
    ours = _ours(experiment, "float32", False)
    network = ours.config.model.config
    sizes = published_cpl.Sizes(
        experiment.frame_dim,
        experiment.word_dim,
        experiment.V,
        d_model=256,
        num_heads=4,
        num_props=network.num_props,
        sigma=network.sigma,
        gamma=network.gamma,
        max_epoch=ours.config.train.max_num_epochs,
        dropout=ours.dropout if dropout else 0.0,
    )
    model = published_cpl.PublishedCPL(sizes)
    model.load_state_dict(ours.state_dict())
    return model.train(dropout)


def _inputs(experiment: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    batch = experiment.batch()
    inputs = (batch.frames, batch.frame_lengths, batch.words, batch.word_ids, batch.word_lengths)
    return inputs, masked_words(batch)


def published_step(experiment: Any, dtype: str, dropout: bool, compiled: bool = False) -> Callable[[], Any]:
    model, (inputs, masked) = _published(experiment, dropout), _inputs(experiment)
    config = experiment.cpl_config()
    optimizer, loss = config.train.optimizer, config.loss
    step = published_cpl.PublishedCPLStep(
        model,
        published.Schedule(optimizer.lr, optimizer.warmup_updates, optimizer.warmup_init_lr),
        published_cpl.Loss(loss.lambda_, loss.alpha_1, loss.alpha_2, loss.margin_1, loss.margin_2),
    )
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)

    def call() -> dict[str, Tensor]:
        with torch.autocast("cpu", AUTOCAST[dtype], enabled=AUTOCAST[dtype] is not None):
            return step(inputs, masked, EPOCH)

    return call


def compiled_step(experiment: Any, dtype: str, dropout: bool) -> Callable[[], Any]:
    return published_step(experiment, dtype, dropout, compiled=True)


def published_scoring(experiment: Any, dtype: str, dropout: bool) -> Callable[[], Any]:
    model, (inputs, masked) = _published(experiment, False), _inputs(experiment)

    def call() -> tuple[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", AUTOCAST[dtype], enabled=AUTOCAST[dtype] is not None):
            return (-model(*inputs, masked, EPOCH).positive.sort(1).values,)

    return call


def step_case(experiment: Experiment, dtype: str, compiled: bool = True) -> Case:
    narrow = dtype == "bfloat16"
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_step, dtype),
        RECOMPUTED: (our_recomputing_step, dtype),
        **({} if narrow else {HIGH_PRECISION: (in_high_precision(our_step), dtype)}),
        "published": (published_step, "float32"),
        **({"published, autocast": (published_step, dtype)} if narrow else {}),
        **({COMPILED: (compiled_step, dtype)} if compiled else {}),
        PRODUCTS: (products_alone, dtype),
    }
    goals = [Goal("time", "published", 9 if narrow else 5), Goal("peak", "published", 5)]
    return make_case("CPL training step", experiment, dtype, makers, goals, trains=True, losses=LOSSES, allowed=ALLOWED)


def scoring_case(experiment: Experiment, dtype: str) -> Case:
    makers: dict[str, tuple[Make, str]] = {
        OURS: (our_scoring, dtype),
        "published": (published_scoring, "float32"),
        **({"published, autocast": (published_scoring, dtype)} if dtype == "bfloat16" else {}),
    }
    goals = [Goal("time", "published", 5)]
    return make_case("CPL evaluation", experiment, dtype, makers, goals, trains=False, losses=("nll",))


def cases(quick: bool) -> Sequence[Case]:
    experiments = [TINY[experiment] if quick else experiment for experiment in (CHARADES, ACTIVITYNET)]
    larger = [dataclasses.replace(experiment, B=4 if quick else 128) for experiment in experiments]
    dtypes = ("float32", "bfloat16")
    return [
        *(
            make(experiment, dtype)
            for experiment in experiments
            for make in (step_case, scoring_case)
            for dtype in dtypes
        ),
        *(step_case(experiment, dtype, compiled=False) for experiment in larger for dtype in dtypes),
    ]


TABLE = Table("cpl", "CPL: the whole training step, and evaluation of a batch", cases, repeats=3)


def test_cpl(benchmark: Any, call: Any) -> None:
    benchmark(call)
