"""The published optimizer: Adam with epsilon before bias correction, linear warm-up, inverse square root decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnm.config import OptimizerConfig

MAX_GRADIENT_NORM = 10.0


class Adam(torch.optim.Optimizer):
    """step = lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps); weight decay shrinks the parameters directly.

    ``torch.optim.Adam`` adds eps after bias correction, which differs by up to a factor of 30 in the first updates for
    small gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "update": 0})
        # Each group's next step: its rate with both bias corrections, and the factor that weight decay leaves.
        self._sizes: dict[int, Tensor] = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("Adam.step takes no closure")
        self.advance()
        self.apply()

    def advance(self) -> None:
        """The host's part of an update: counts it, and puts its step size where ``apply`` finds it on the device."""
        for group in self.param_groups:
            group["update"] += 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            correction = math.sqrt(1 - beta2 ** group["update"]) / (1 - beta1 ** group["update"])
            sizes = self._sizes.setdefault(id(group), group["params"][0].new_empty(2))
            sizes[0].fill_(lr * correction)
            sizes[1].fill_(1 - group["weight_decay"] * lr)

    @torch.no_grad()
    def apply(self) -> None:
        """The device's part: the same kernels every time, so that a CUDA graph can hold it."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            (beta1, beta2), (rate, shrink) = group["betas"], self._sizes[id(group)].unbind()
            if group["weight_decay"] != 0:
                torch._foreach_mul_(parameters, shrink)
            # step = inf disables PyTorch's bias corrections: ours are in the rate.
            forever = torch.full((), math.inf, device=rate.device)
            torch._fused_adam_(
                parameters,
                [_laid_out_like(parameter, parameter.grad) for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                [forever] * len(parameters),
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's order of memory: the fused kernel takes both as they lie and never asks."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def learning_rate(config: OptimizerConfig, updates: int) -> float:
    """The learning rate after ``updates`` updates: linear from ``warmup_init_lr``, then lr sqrt(warmup / updates)."""
    if updates < config.warmup_updates:
        return config.warmup_init_lr + updates * (config.lr - config.warmup_init_lr) / config.warmup_updates
    return config.lr * math.sqrt(config.warmup_updates / updates)


class ScheduledAdam:
    """Adam on one group of parameters, its learning rate following the published schedule."""

    def __init__(self, parameters: Sequence[Tensor], config: OptimizerConfig) -> None:
        self.parameters = parameters
        self.config = config
        self.adam = Adam(parameters, learning_rate(config, 0), weight_decay=config.weight_decay)

    @property
    def updates(self) -> int:
        return int(self.adam.param_groups[0]["update"])

    @property
    def learning_rate(self) -> float:
        """The rate the next update will use."""
        return learning_rate(self.config, self.updates)

    def advance(self) -> None:
        """Begins update n, which runs at ``learning_rate(n - 1)``."""
        self.adam.param_groups[0]["lr"] = self.learning_rate
        self.adam.advance()

    def apply(self) -> None:
        """Applies the parameters' gradients."""
        self.adam.apply()

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave.

        Raises:
            ValueError: it is another optimizer's.
        """
        self.adam.load_state_dict(state)
        for parameter, moments in self.adam.state.items():
            for name, value in moments.items():
                if value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(value.shape)}, its parameter {list(parameter.shape)}")
