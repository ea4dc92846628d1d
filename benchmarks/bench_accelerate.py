"""Research code with the published interfaces, unedited, against itself under ``accelerate``: one training step, and
the evaluation of a batch.

CNM's step is its two updates on one batch, CPL's its joint one; both with clipping and Adam. Before anything is timed,
every contender's loss and gradients, without dropout and with the same words masked, must be those of the plain code in
float32; in bfloat16 they may err four times what the plain code under autocast errs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import cnm_kernels
from benchmarks.op_case import relative_error
from benchmarks.registry import OURS, Case, Contender, Goal, Refused, Table
from examples.research_code import cnm, cnm_losses, cpl, cpl_losses

ALLOWED = 1e-4  # ||error|| / ||gradient||, over all parameters together, beyond that of the plain code
TIMES_PLAIN = 4
MAX_NORM = 10.0
LOSS = {"beta_1": 0.1, "beta_2": 0.15, "margin_1": 0.1, "margin_2": 0.15, "lambda": 0.146, "alpha_1": 1, "alpha_2": 5}
EPOCH = 3  # CPL's negatives grow with it


@dataclass(frozen=True)
class Experiment:
    """Sizes of one training batch, as the published Charades-STA configurations have them."""

    name: str
    B: int
    L: int
    K: int  # proposals; CNM has one Gaussian
    T: int = 200
    frame_dim: int = 1024
    word_dim: int = 300
    V: int = 1112
    D: int = 256

    def model(self, dropout: float) -> nn.Module:
        transformer = {"d_model": self.D, "num_heads": 4, "num_decoder_layers1": 3, "num_decoder_layers2": 3}
        config = {
            "frames_input_size": self.frame_dim,
            "words_input_size": self.word_dim,
            "hidden_size": self.D,
            "vocab_size": self.V,
            "dropout": dropout,
            "DualTransformer": transformer | {"dropout": dropout},
        }
        torch.manual_seed(0)
        if self.K == 1:
            return cnm.CNM(config | {"alpha": 5.5})
        return cpl.CPL(config | {"num_props": self.K, "sigma": 9, "gamma": 0.5, "max_epoch": 30})

    def batch(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(max(self.L // 4, 1), self.L - self.L // 6 + 1, (self.B,), generator=generator)
        lengths[0] = self.L
        real = torch.arange(self.L) < lengths[:, None]
        batch = {
            "frames_feat": torch.randn(self.B, self.T, self.frame_dim, generator=generator),
            "frames_len": torch.full((self.B,), self.T),
            "words_id": torch.randint(1, self.V, (self.B, self.L), generator=generator) * real,
            "words_feat": torch.randn(self.B, self.L + 1, self.word_dim, generator=generator),
            "words_len": lengths,
            "weights": real.float() / lengths[:, None],
        }
        return batch if self.K == 1 else batch | {"epoch": EPOCH}

    def losses(self) -> ModuleType:
        """A copy of the module that holds the losses, so that accelerating one contender's changes no other's."""
        module = cnm_losses if self.K == 1 else cpl_losses
        copy = ModuleType(module.__name__)
        for name, value in vars(module).items():
            own = isinstance(value, FunctionType)
            setattr(copy, name, FunctionType(value.__code__, vars(copy), name, value.__defaults__) if own else value)
        return copy


CNM = Experiment("CNM", B=128, L=13, K=1)
CPL = Experiment("CPL, 8 proposals", B=32, L=20, K=8)


def tiny(experiment: Experiment) -> Experiment:
    return replace(experiment, B=3, L=7, T=16, frame_dim=12, word_dim=10, V=37, D=32)


# ---- contenders: they change the model, or the module that holds the losses ----


def plain(model: nn.Module, losses: Any) -> None:
    pass


def attention_alone(model: nn.Module, losses: Any) -> None:
    cnm_kernels.accelerate(model)


def logits_kept(model: nn.Module, losses: Any) -> None:
    cnm_kernels.accelerate(model)
    cnm_kernels.accelerate_losses(losses)


def everything(model: nn.Module, losses: Any) -> None:
    cnm_kernels.accelerate(model)
    cnm_kernels.accelerate_losses(losses, model)


CONTENDERS: dict[str, Callable[[nn.Module, Any], None]] = {
    OURS: everything,
    "itself": plain,
    "itself, compiled": plain,
    "accelerate(model) alone": attention_alone,
    "accelerate, logits kept": logits_kept,
}


class Trainer:
    """A training script's calls of model and losses, on one batch."""

    def __init__(self, experiment: Experiment, dtype: str, contender: str, dropout: float) -> None:
        self.experiment, self.contender = experiment, contender
        self.autocast = dtype == "bfloat16"
        self.model: Any = experiment.model(dropout).train()
        self.losses = experiment.losses()
        self.batch = experiment.batch()
        CONTENDERS[contender](self.model, self.losses)
        if contender == "itself, compiled":
            transformer: Any = self.model.trans
            for decoder in (transformer.decoder1, transformer.decoder2):
                decoder.compile(dynamic=False)
        self.options = LOSS if experiment.K == 1 else LOSS | {"num_props": experiment.K}
        self.optimizers: list[torch.optim.Optimizer] | None = None

    def loss(self, *names: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.model(**self.batch)
            return sum(getattr(self.losses, name)(**output, **self.options)[0] for name in names)

    def update(self, optimizer: torch.optim.Optimizer, *names: str) -> None:
        optimizer.zero_grad()
        self.loss(*names).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the losses' sum, all parameters' in one vector."""
        loss = self.loss("rec_loss", "ivc_loss")
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return {"loss": loss.detach(), "gradients": torch.cat([gradient.flatten() for gradient in gradients])}

    def __call__(self) -> None:
        if self.experiment.K > 1:
            self.optimizers = self.optimizers or [torch.optim.Adam(self.model.parameters(), 4e-4)]
            self.update(self.optimizers[0], "rec_loss", "ivc_loss")
            return
        if self.optimizers is None:
            self.optimizers = []
            for generator in (False, True):
                self.model.train_only(generator)
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                self.optimizers.append(torch.optim.Adam(trained, 4e-4))
        for generator, optimizer, name in zip((False, True), self.optimizers, ("rec_loss", "ivc_loss"), strict=True):
            self.model.train_only(generator)
            self.update(optimizer, name)

    def evaluate(self) -> dict[str, Tensor]:
        """Gaussians, and the reconstruction error where the model reconstructs in evaluation."""
        self.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.model(**self.batch)
            found = {name: output[name] for name in ("center", "width")}
            if "words_logit" in output:
                found["loss"] = self.losses.rec_loss(**output, **self.options)[0]
        return found


def case(experiment: Experiment, dtype: str, trains: bool) -> Case:
    exact: dict[str, Tensor] = {}
    plain_errors: dict[str, float] = {}

    def prepare(contender: str) -> Callable[[], Any]:
        trainer = Trainer(experiment, dtype, contender, dropout=0.1)
        return trainer if trains else trainer.evaluate

    def verify(contender: str, call: Callable[[], Any]) -> dict[str, float]:
        if not exact:
            exact.update(result("itself", "float32"))
            plain_errors.update(errors_of("itself"))
        errors = errors_of(contender)
        for key, error in errors.items():
            allowed = TIMES_PLAIN * plain_errors[key] + ALLOWED
            if not error <= allowed:
                raise Refused(f"errs by {error:.2g} in {key}, {allowed:.2g} allowed")
        return errors

    def errors_of(contender: str) -> dict[str, float]:
        found = result(contender, dtype)
        return {key: relative_error(found[key], want) for key, want in exact.items()}

    def result(contender: str, dtype: str) -> dict[str, Tensor]:
        trainer = Trainer(experiment, dtype, contender, dropout=0.0)
        torch.manual_seed(1)  # decides the words masked
        return trainer.gradients() if trains else trainer.evaluate()

    contenders = {name: Contender(change, compiled="compiled" in name) for name, change in CONTENDERS.items()}
    goals = (Goal("time", "itself", 2.6 if dtype == "float32" else 2.4), Goal("peak", "itself", round(1 / 0.45, 3)))
    name = f"{'training step' if trains else 'evaluation'}, {experiment.name}, B={experiment.B}, T={experiment.T}"
    return Case(name, dtype, contenders, prepare, verify, goals, trains=trains)


def cases(quick: bool) -> Sequence[Case]:
    experiments = [tiny(experiment) if quick else experiment for experiment in (CNM, CPL)]
    dtypes = ("float32", "bfloat16")
    return [
        case(experiment, dtype, trains) for trains in (True, False) for experiment in experiments for dtype in dtypes
    ]


TABLE = Table("accelerate", "Research code, unedited, under accelerate", cases, repeats=3)


def test_accelerate(benchmark: Any, call: Any) -> None:
    benchmark(call)
