"""Configuration: the published JSON files unchanged, every field typed, unknown fields refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from cnm.config_fields import suggestion
from cnm.errors import InputError
from cnm.files import check_plain, read_json, shortened

Count = Annotated[int, Field(ge=1, lt=2**31)]
Words = Annotated[int, Field(ge=1, le=2**24)]  # as many as the loss's kernels take
MAX_WIDTH = 2**16
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]  # of a vector
Layers = Annotated[int, Field(ge=1, le=256)]
Length = Annotated[int, Field(ge=1, le=2**16)]  # of a sentence
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _fits_float32(value: float) -> float:
    if value > 1e30:
        raise ValueError(f"must be at most 1e30, got {value:g}")
    return value


def _square_fits_float32(value: float) -> float:
    if value > 1e15:
        raise ValueError(f"must be at most 1e15, got {value:g}")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_fits_float32)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_fits_float32)]
Probability = Annotated[float, Field(ge=0, lt=1)]


MAX_VALUES = 10_000  # of a configuration; ours hold fifty

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
    """The data: its files and its sizes. Paths are relative to the working directory, as published.

    ``synthetic`` needs no path: the videos are generated (``cnm.data.synthetic``) from ``seed``.
    ``custom`` is any other dataset: the files say what they are.
    """

    dataset: Literal["CharadesSTA", "ActivityNet", "synthetic", "custom"] = Field(
        description="whose files these are; custom: any others; synthetic videos are generated and need no file"
    )
    feature_path: PathText | Annotated[list[PathText], Field(min_length=1)] | None = Field(
        default=None,
        description="HDF5 file, or folder of .npz or .npy files, of the videos' features, [frames, frame_dim] each; a "
        "list of them is put side by side, cut to the shortest",
    )
    feature_pattern: Annotated[PathText, Field(pattern=r"\{video\}")] | None = Field(
        default=None, description="where in an HDF5 file a video's features are, such as test/{video}/features"
    )
    feature_manifest: PathText | None = Field(
        default=None,
        description="what `cnm features check --manifest` wrote; features that are not as it says are refused",
    )
    vocab_path: PathText | None = Field(
        default=None, description="word vectors: what `cnm vocabulary` wrote, or the published pickle"
    )
    train_data: PathText | None = Field(
        default=None,
        description="annotations to train on: published JSON rows, JSON lines as QVHighlights has them, or the files "
        "of ActivityNet Captions, TACoS or Charades-STA; moments are not needed",
    )
    val_data: PathText | None = Field(
        default=None,
        description="annotations that choose the best epoch; without them, or with the test's, or where they have no "
        "moments, it is the last",
    )
    test_data: PathText | None = Field(
        default=None, description="annotations that the result is scored on, if they have moments"
    )
    vocab_size: Words = Field(description="words kept, most frequent first; the padding comes on top")
    word_dim: Width = Field(description="width of a word vector")
    frame_dim: Width = Field(description="width of a feature")
    max_num_words: Length = Field(description="words of a sentence that are read")
    max_num_frames: Annotated[int, Field(ge=4, le=2**16)] = Field(
        description="clips T that each video is averaged to; the reconstructor sees T // 4"
    )
    target_stride: Literal[1] | None = Field(
        default=None, description="1; in the published CPL files, where no other was published"
    )
    cache_path: PathText | None = Field(
        default=None,
        description="folder for tagged sentences and averaged features; by default the user's cache folder",
    )
    seed: Seed = Field(default=8, description="of the generated videos; synthetic only")
    num_videos: Count = Field(
        default=600,
        description="training videos to generate, and a quarter as many for val and test each; synthetic only",
    )

    @field_validator("val_data", "test_data", mode="before")
    @classmethod
    def _none_as_published(cls, value: Any) -> Any:
        """Published code takes an empty name for none."""
        return None if value == "" else value

    @model_validator(mode="after")
    def _files_given(self) -> DatasetConfig:
        if self.dataset != "synthetic":
            for name in ("feature_path", "vocab_path", "train_data"):
                if not getattr(self, name):
                    raise ValueError(f"{name} is needed for dataset {self.dataset}")
            if isinstance(self.feature_path, list) and "" in self.feature_path:  # it would be the working directory
                raise ValueError("feature_path holds an empty path; name a file or a folder, or remove it")
        return self


class OptimizerConfig(_Section):
    """Adam with linear warm-up from ``warmup_init_lr`` and inverse square root decay."""

    lr: Positive = Field(description="highest learning rate, at the end of the warm-up")
    weight_decay: NonNegative = Field(default=0.0, description="of Adam")
    warmup_updates: Count = Field(
        description="updates over which the rate rises linearly; it then falls with their inverse square root"
    )
    warmup_init_lr: NonNegative = Field(description="learning rate at the start")


class TrainConfig(_Section):
    """The training options of every model; each model adds its optimizers."""

    batch_size: Count = Field(description="sentences per update")
    max_num_epochs: Count = Field(description="passes over the training sentences")
    model_saved_path: PathText = Field(description="folder of the run where --run names none")
    seed: Seed = Field(
        default=8, description="of the initial parameters, the order of the sentences, the masked words and dropout"
    )


class CNMTrainConfig(TrainConfig):
    """``generator`` trains ``fc_mask_gen``, ``reconstructor`` everything else."""

    generator: OptimizerConfig = Field(description="Adam of fc_mask_gen, the Gaussian's center and width")
    reconstructor: OptimizerConfig = Field(description="Adam of all other parameters")


class CPLTrainConfig(TrainConfig):
    """One optimizer trains everything."""

    optimizer: OptimizerConfig = Field(description="Adam of all parameters")


class TransformerConfig(_Section):
    """Sizes of the two decoders (published ``DualTransformer``)."""

    d_model: Width = Field(description="width D, equal to hidden_size")
    num_heads: Width = Field(description="heads of attention; divides d_model")
    num_decoder_layers1: Layers = Field(description="layers of the decoder of frames")
    num_decoder_layers2: Layers = Field(description="layers of the decoder of words")
    dropout: Probability = Field(default=0.0, description="in the decoders' layers")


class NetworkConfig(_Section):
    """Sizes of the network. The last four follow from the dataset section; published checkpoints carry them here."""

    hidden_size: Width = Field(description="width D of the network, even")
    use_negative: Literal[True] = Field(default=True, description="train with negative samples; always")
    dropout: Probability = Field(description="of the features and word vectors on their way in")
    DualTransformer: TransformerConfig = Field(description="the two decoders")
    max_num_words: Length | None = Field(default=None, description="dataset.max_num_words, from where it is taken")
    frames_input_size: Width | None = Field(default=None, description="dataset.frame_dim, from where it is taken")
    words_input_size: Width | None = Field(default=None, description="dataset.word_dim, from where it is taken")
    vocab_size: Words | None = Field(
        default=None, description="words of the vocabulary with the padding; by default dataset.vocab_size + 1"
    )

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

    alpha: Positive = Field(description="sharpness of the Gaussian exp(-alpha (x - center)^2 / width^2)")
    max_width: Positive = Field(default=1.0, description="largest width of the Gaussian, in videos")


class CPLNetworkConfig(NetworkConfig):
    """``num_props`` Gaussians of ``sigma`` standard deviations; ``gamma`` says how fast the negatives grow."""

    num_props: Annotated[int, Field(ge=1, le=256)] = Field(description="proposals K per sentence")
    sigma: Annotated[Positive, AfterValidator(_square_fits_float32)] = Field(
        description="standard deviations of the Gaussian in a proposal's width"
    )
    gamma: NonNegative = Field(description="how slowly the negatives grow over the epochs; 0: full size at once")
    max_epoch: Count | None = Field(
        default=None, description="epoch of the negatives' full size; by default train.max_num_epochs"
    )


class ModelConfig(_Section):
    name: str = Field(description="which model")
    config: NetworkConfig = Field(description="sizes of the network")


class CNMModelConfig(ModelConfig):
    name: Literal["CNM"] = Field(description="which model")
    config: CNMNetworkConfig = Field(description="sizes of the network")


class CPLModelConfig(ModelConfig):
    name: Literal["CPL"] = Field(description="which model")
    config: CPLNetworkConfig = Field(description="sizes of the network")


class LossConfig(_Section):
    beta_1: NonNegative = Field(
        default=0.1, description="margin between the positive and the hard negative, the whole video"
    )
    beta_2: NonNegative = Field(
        default=0.15, description="margin between the positive and the easy negative, the rest of the video"
    )


class CPLLossConfig(_Section):
    """Margins to the reference and the negatives, and the weights of ranking and diversity."""

    margin_1: NonNegative = Field(default=0.1, description="margin between the best proposal and the whole video")
    margin_2: NonNegative = Field(default=0.15, description="margin between the best proposal and each negative")
    lambda_: NonNegative = Field(alias="lambda", description="overlap of a proposal with itself that diversity aims at")
    alpha_1: NonNegative = Field(description="weight of the ranking loss")
    alpha_2: NonNegative = Field(description="weight of the diversity loss")


class Config(_Section):
    """One experiment: dataset, training, model and loss, in the published JSON layout. Each model has its own."""

    dataset: DatasetConfig = Field(
        description="where the data is and how it is cut; relative paths start from the working directory"
    )
    train: TrainConfig = Field(description="optimizers, batches and epochs")
    model: ModelConfig = Field(description="the network")

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
    def from_json(cls, source: str | Path | dict[str, Any], name: str | None = None) -> Self:
        """Reads a published configuration file (or its parsed content, which messages call ``name``): of any model, or
        on a model's own class of that one.

        Raises:
            InputError: the file is missing or no JSON, or a field is unknown, missing, ill-typed or out of range;
                the message names the file and every such field.
        """
        name = name or ("config" if isinstance(source, dict) else str(source))
        content = source if isinstance(source, dict) else read_json(source)
        check_plain(content, name, MAX_VALUES)
        chosen = _class_for(cls, content, name)
        try:
            return chosen.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{name}: {'; '.join(_describe(item, chosen) for item in error.errors())}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published layout, as plain JSON values; ``from_json`` takes it back and derives the input sizes anew."""
        return self.model_dump(exclude_none=True, by_alias=True, exclude={"model": {"config": set(DERIVED_SIZES)}})


class CNMConfig(Config):
    """An experiment with CNM."""

    train: CNMTrainConfig = Field(description="optimizers, batches and epochs")
    model: CNMModelConfig = Field(description="the network")
    loss: LossConfig = Field(default=LossConfig(), description="margins of the contrastive loss")


class CPLConfig(Config):
    """An experiment with CPL."""

    train: CPLTrainConfig = Field(description="optimizers, batches and epochs")
    model: CPLModelConfig = Field(description="the network")
    loss: CPLLossConfig = Field(description="margins and weights of the loss")


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


def _describe(item: Any, config: type[BaseModel]) -> str:
    """One pydantic error as words: the field's dotted name, what was found, what is wanted."""
    place = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        place = [part for part in place if "[" not in part]  # names of types, where a value may have several
    field = ".".join(place)
    if item["type"] == "extra_forbidden":
        return f"unknown field {field}; {suggestion(field, config) or 'remove it or correct its name'}"
    if item["type"] == "missing":
        return f"field {field} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {shortened(item['input'])}"
