"""The fields of a checkpoint; it is checked once, when it is read."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from cnm.files import shortened

Count = Annotated[int, Field(ge=0, lt=2**63)]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _float(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATS or tensor.device.type != "cpu":
        raise ValueError(f"must hold real numbers, found {tensor.dtype} ({tensor.layout}, {tensor.device})")
    return tensor


def _real(tensor: Tensor) -> Tensor:
    if not _float(tensor).isfinite().all():
        raise ValueError("holds NaN or infinity")
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"must hold bytes, found {tensor.dtype}")
    return tensor


Float = Annotated[Tensor, AfterValidator(_float)]
Real = Annotated[Tensor, AfterValidator(_real)]
Bytes = Annotated[Tensor, AfterValidator(_bytes)]


class _Part(BaseModel):
    model_config = ConfigDict(
        strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=(), extra="ignore"
    )


class VocabularyState(_Part):
    words: list[str]
    vectors: Real

    @model_validator(mode="after")
    def _fit(self) -> VocabularyState:
        if self.vectors.dim() != 2 or len(self.vectors) != len(self.words) or not self.words:
            raise ValueError(f"{len(self.words)} words with vectors of shape {list(self.vectors.shape)}")
        return self


class AdamGroup(_Part):
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    update: Count
    params: list[int]


class AdamMoments(_Part):
    exp_avg: Real
    exp_avg_sq: Real


class AdamState(_Part):
    state: dict[int, AdamMoments]
    param_groups: list[AdamGroup]


class StepState(_Part):
    model_config = ConfigDict(extra="allow")  # each kind of step has its optimizers

    @model_validator(mode="before")
    @classmethod
    def _optimizers(cls, content: Any) -> Any:
        for value in content.values() if isinstance(content, dict) else ():
            if isinstance(value, dict):
                AdamState.model_validate(value)
        return content


class Random(_Part):
    torch: Bytes
    cuda: Bytes | None = None


class Best(_Part):
    epoch: Count | None = None
    mIoU: float | None = None


class Options(_Part):
    precision: str | None = None
    step: str | None = None
    skip_nonfinite: bool = False


class Fingerprint(_Part):
    sentences: str
    words: str
    tagger: str
    features: list[float]
    size: float


class Training(_Part):
    options: Options = Options()
    step: StepState
    epoch: Count
    batch: Count
    seconds: float
    epoch_began: float = 0.0  # earlier versions kept none
    best: Best
    rows: Count
    fingerprints: dict[str, Fingerprint] = {}  # of each split; earlier versions kept none
    metric_names: list[str]
    pending: list[Float]  # NaN in the rows of updates that were skipped
    random: Random

    @model_validator(mode="after")
    def _fit(self) -> Training:
        if any(values.shape != (len(self.metric_names),) for values in self.pending):
            raise ValueError(f"pending rows do not hold one number for each of {len(self.metric_names)} metrics")
        return self


class Checkpoint(_Part):
    """The published keys; a run's own on top. Whatever else is there is left alone."""

    num_updates: Count
    config: dict[str, Any]
    model_parameters: dict[str, Real]
    vocabulary: VocabularyState | None = None
    training: Training | None = None
    epoch: Count | None = None  # of a best model, counted from 1


def described(error: ValidationError) -> str:
    """The first thing that is wrong: its field, what was found and what is wanted."""
    item = error.errors()[0]
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"it has no {field!r}"
    problem = item["msg"].removeprefix("Value error, ")
    found = "" if item["type"] == "value_error" else f", found {shortened(item['input'])}"
    return f"{field!r}: {problem}{found}"
