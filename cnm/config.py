"""Configuration: the published JSON files unchanged, every field typed, unknown fields refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from cnm.errors import InputError

Count = Annotated[int, Field(ge=1, lt=2**31)]
Words = Annotated[int, Field(ge=1, le=2**24)]  # as many as the loss's kernels take
Width = Annotated[int, Field(ge=1, le=2**16)]  # of a vector
Layers = Annotated[int, Field(ge=1, le=256)]
Length = Annotated[int, Field(ge=1, le=2**16)]  # of a sentence
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


# Sizes of the network that follow from the dataset section.
DERIVED_SIZES = {"max_num_words": "max_num_words", "frames_input_size": "frame_dim", "words_input_size": "word_dim"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DatasetConfig(_Section):
    """Where the data is and how it is cut. Paths are relative to the working directory, as published.

    ``synthetic`` needs no path: the videos are generated (``cnm.data.synthetic``) from ``seed``.
    """

    dataset: Literal["CharadesSTA", "ActivityNet", "synthetic"]
    feature_path: str | None = None
    vocab_path: str | None = None
    train_data: str | None = None
    val_data: str | None = None
    test_data: str | None = None
    vocab_size: Words  # words kept, most frequent first; the padding id 0 comes on top
    word_dim: Width
    frame_dim: Width
    max_num_words: Length
    max_num_frames: Annotated[int, Field(ge=4, le=2**16)]  # clips per video, T; the reconstructor sees T // 4
    target_stride: Literal[1] | None = None  # in the published CPL files; no other was published
    cache_path: str | None = None  # default: the user's cache folder
    seed: Seed = 8  # synthetic only
    num_videos: Count = 600  # synthetic only: training videos; each of val and test has a quarter as many

    @model_validator(mode="after")
    def _files_given(self) -> DatasetConfig:
        if self.dataset != "synthetic":
            for name in ("feature_path", "vocab_path", "train_data", "test_data"):
                if not getattr(self, name):
                    raise ValueError(f"{name} is needed for dataset {self.dataset}")
        return self


class OptimizerConfig(_Section):
    """Adam with linear warm-up from ``warmup_init_lr`` and inverse square root decay."""

    lr: Positive
    weight_decay: NonNegative = 0.0
    warmup_updates: Count
    warmup_init_lr: NonNegative


class TrainConfig(_Section):
    """What every model's training section says; the optimizers are the model's own."""

    batch_size: Count
    max_num_epochs: Count
    model_saved_path: str
    seed: Seed = 8


class CNMTrainConfig(TrainConfig):
    """``generator`` trains ``fc_mask_gen``, ``reconstructor`` everything else."""

    generator: OptimizerConfig
    reconstructor: OptimizerConfig


class CPLTrainConfig(TrainConfig):
    """One optimizer trains everything."""

    optimizer: OptimizerConfig


class TransformerConfig(_Section):
    """Sizes of the two decoders (published ``DualTransformer``)."""

    d_model: Width
    num_heads: Width
    num_decoder_layers1: Layers
    num_decoder_layers2: Layers
    dropout: Probability = 0.0


class NetworkConfig(_Section):
    """Sizes of the network. The last four follow from the dataset section; published checkpoints carry them here."""

    hidden_size: Width
    use_negative: Literal[True] = True
    dropout: Probability
    DualTransformer: TransformerConfig
    max_num_words: Length | None = None
    frames_input_size: Width | None = None
    words_input_size: Width | None = None
    vocab_size: Words | None = None  # padding id 0 included

    @model_validator(mode="after")
    def _sizes_fit(self) -> NetworkConfig:
        transformer = self.DualTransformer
        if transformer.d_model != self.hidden_size:
            raise ValueError(f"hidden_size {self.hidden_size} must equal DualTransformer.d_model {transformer.d_model}")
        if transformer.d_model % transformer.num_heads:
            raise ValueError(
                f"DualTransformer.d_model {transformer.d_model} must be divisible by num_heads {transformer.num_heads}"
            )
        if self.hidden_size < 4 or self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even and at least 4 (sinusoidal positions)")
        return self


class CNMNetworkConfig(NetworkConfig):
    """One Gaussian of sharpness ``alpha``, no wider than ``max_width``."""

    alpha: Positive
    max_width: Positive = 1.0


class CPLNetworkConfig(NetworkConfig):
    """``num_props`` Gaussians of ``sigma`` standard deviations; ``gamma`` says how fast the negatives grow."""

    num_props: Annotated[int, Field(ge=1, le=256)]
    sigma: Positive
    gamma: NonNegative
    max_epoch: Count | None = None  # of the negatives' growth; default: train.max_num_epochs


class ModelConfig(_Section):
    name: str
    config: NetworkConfig


class CNMModelConfig(ModelConfig):
    name: Literal["CNM"]
    config: CNMNetworkConfig


class CPLModelConfig(ModelConfig):
    name: Literal["CPL"]
    config: CPLNetworkConfig


class LossConfig(_Section):
    beta_1: NonNegative = 0.1
    beta_2: NonNegative = 0.15


class CPLLossConfig(_Section):
    """Margins to the reference and the negatives, and the weights of ranking and diversity."""

    margin_1: NonNegative = 0.1
    margin_2: NonNegative = 0.15
    lambda_: NonNegative = Field(alias="lambda")
    alpha_1: NonNegative
    alpha_2: NonNegative


class Config(_Section):
    """One experiment: dataset, training, model and loss, in the published JSON layout. Each model has its own."""

    dataset: DatasetConfig
    train: TrainConfig
    model: ModelConfig

    @model_validator(mode="after")
    def _fill_sizes(self) -> Self:
        """The network's input sizes follow from the dataset section; where both are given they must agree."""
        network, dataset = self.model.config, self.dataset
        for name, source in DERIVED_SIZES.items():
            given, size = getattr(network, name), getattr(dataset, source)
            if given is None:
                setattr(network, name, size)
            elif given != size:
                raise ValueError(f"model.config.{name} is {given} but the dataset section says {size}")
        if network.vocab_size is None:
            network.vocab_size = dataset.vocab_size + 1
        return self

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> Self:
        """Reads a published configuration file (or its parsed content): of any model, on a model's class of that one.

        Raises:
            InputError: the file is missing or no JSON, or a field is unknown, missing, ill-typed or out of range;
                the message names the file and every such field.
        """
        name = "config" if isinstance(source, dict) else str(source)
        content = source if isinstance(source, dict) else read_json(source)
        try:
            return _class_for(cls, content, name).model_validate(content)
        except ValidationError as error:
            raise InputError(f"{name}: {'; '.join(_describe(item) for item in error.errors())}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published layout, as plain JSON values; ``from_json`` takes it back and derives the input sizes anew."""
        return self.model_dump(exclude_none=True, by_alias=True, exclude={"model": {"config": set(DERIVED_SIZES)}})


class CNMConfig(Config):
    """An experiment with CNM."""

    train: CNMTrainConfig
    model: CNMModelConfig
    loss: LossConfig = LossConfig()


class CPLConfig(Config):
    """An experiment with CPL."""

    train: CPLTrainConfig
    model: CPLModelConfig
    loss: CPLLossConfig


CONFIGS: dict[str, type[Config]] = {"CNM": CNMConfig, "CPL": CPLConfig}  # by model.name


def _class_for(cls: type[Config], content: Any, source: str) -> Any:
    """The class that reads this content: ``cls``, or where that is every model's, the one of its ``model.name``."""
    if cls is not Config:
        return cls
    model = content.get("model") if isinstance(content, dict) else None
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return CNMConfig  # whose fields say what is missing
    if name not in CONFIGS:
        raise InputError(f"{source}: model.name: no such model, choose one of {', '.join(CONFIGS)}; got {name!r}")
    return CONFIGS[name]


def read_json(path: str | Path) -> Any:
    """Parses a JSON file.

    Raises:
        InputError: the file cannot be read or is no JSON; the message names it and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text in UTF-8, so no JSON; check the path") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} column {error.colno} is no JSON ({error.msg})") from None


def _describe(item: Any) -> str:
    """One pydantic error as words: the field's dotted name, what was found, what is wanted."""
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown field {field}; remove it or correct its name"
    if item["type"] == "missing":
        return f"field {field} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {item['input']!r}"
