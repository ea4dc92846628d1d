"""Configuration: the published JSON files unchanged, every field typed, unknown fields refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cnm.errors import InputError
from cnm.files import check_plain, read_json, shortened

Count = Annotated[int, Field(ge=1, lt=2**31)]
Words = Annotated[int, Field(ge=1, le=2**24)]  # as many as the loss's kernels take
Width = Annotated[int, Field(ge=1, le=2**16)]  # of a vector
Layers = Annotated[int, Field(ge=1, le=256)]
Length = Annotated[int, Field(ge=1, le=2**16)]  # of a sentence
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


MOST_VALUES = 10_000  # of a configuration; ours hold fifty

# Sizes of the network that follow from the dataset section.
DERIVED_SIZES = {"max_num_words": "max_num_words", "frames_input_size": "frame_dim", "words_input_size": "word_dim"}


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path holds no NUL")
    return text


PathText = Annotated[str, AfterValidator(_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DatasetConfig(_Section):
    """Where the data is and how it is cut. Paths are relative to the working directory, as published.

    ``synthetic`` needs no path: the videos are generated (``cnm.data.synthetic``) from ``seed``.
    ``custom`` is any other dataset: the files say what they are.
    """

    dataset: Literal["CharadesSTA", "ActivityNet", "synthetic", "custom"]
    feature_path: PathText | Annotated[list[PathText], Field(min_length=1)] | None = None  # several: side by side
    feature_pattern: Annotated[PathText, Field(pattern=r"\{video\}")] | None = None  # of datasets in HDF5
    vocab_path: PathText | None = None
    train_data: PathText | None = None
    val_data: PathText | None = None
    test_data: PathText | None = None
    vocab_size: Words  # words kept, most frequent first; the padding id 0 comes on top
    word_dim: Width
    frame_dim: Width
    max_num_words: Length
    max_num_frames: Annotated[int, Field(ge=4, le=2**16)]  # clips per video, T; the reconstructor sees T // 4
    cache_path: PathText | None = None  # default: the user's cache folder
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
    """``generator`` trains ``fc_mask_gen``, ``reconstructor`` everything else."""

    generator: OptimizerConfig
    reconstructor: OptimizerConfig
    batch_size: Count
    max_num_epochs: Count
    model_saved_path: PathText
    seed: Seed = 8


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
    alpha: Positive
    max_width: Positive = 1.0
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


class ModelConfig(_Section):
    name: Literal["CNM"]
    config: NetworkConfig


class LossConfig(_Section):
    beta_1: NonNegative = 0.1
    beta_2: NonNegative = 0.15


class CNMConfig(_Section):
    """One experiment: dataset, training, model and loss, in the published JSON layout."""

    dataset: DatasetConfig
    train: TrainConfig
    model: ModelConfig
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _fill_sizes(self) -> CNMConfig:
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
    def from_json(cls, source: str | Path | dict[str, Any], name: str | None = None) -> CNMConfig:
        """Reads a published configuration file (or its parsed content, which messages call ``name``).

        Raises:
            InputError: the file is missing or no JSON, or a field is unknown, missing, ill-typed or out of range;
                the message names the file and every such field.
        """
        name = name or ("config" if isinstance(source, dict) else str(source))
        content = source if isinstance(source, dict) else read_json(source)
        check_plain(content, name, MOST_VALUES)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{name}: {'; '.join(_describe(item) for item in error.errors())}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published layout, as plain JSON values; ``from_json`` takes it back and derives the input sizes anew."""
        return self.model_dump(exclude_none=True, exclude={"model": {"config": set(DERIVED_SIZES)}})


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
    return f"{field}: {message}, got {shortened(item['input'])}"
