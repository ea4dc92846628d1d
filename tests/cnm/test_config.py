"""Configuration files: the published ones unchanged; unknown and ill-typed fields named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cnm import CNMConfig, InputError, configs

OPTIMIZER = {"lr": 4e-4, "weight_decay": 0, "warmup_updates": 400, "warmup_init_lr": 1e-7}
PUBLISHED: dict[str, Any] = {
    "dataset": {
        "dataset": "CharadesSTA",
        "feature_path": "data/charades/i3d_features.hdf5",
        "vocab_path": "data/charades/glove.pkl",
        "vocab_size": 1111,
        "word_dim": 300,
        "frame_dim": 1024,
        "max_num_words": 20,
        "max_num_frames": 200,
        "train_data": "data/charades/train.json",
        "test_data": "data/charades/test.json",
        "val_data": "data/charades/test.json",
    },
    "train": {
        "generator": OPTIMIZER,
        "reconstructor": OPTIMIZER,
        "batch_size": 128,
        "max_num_epochs": 50,
        "model_saved_path": "checkpoints/charades/",
    },
    "model": {
        "name": "CNM",
        "config": {
            "hidden_size": 256,
            "use_negative": True,
            "alpha": 5.5,
            "max_width": 0.45,
            "dropout": 0.1,
            "DualTransformer": {
                "d_model": 256,
                "num_heads": 4,
                "num_decoder_layers1": 3,
                "num_decoder_layers2": 3,
                "dropout": 0.1,
            },
        },
    },
    "loss": {"beta_1": 0.1, "beta_2": 0.15},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(PUBLISHED)
    *sections, name = path.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[name] = value
    return content


def test_the_published_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(PUBLISHED))
    config = CNMConfig.from_json(tmp_path / "c.json")
    assert config.model.config.vocab_size == 1112
    assert config.model.config.frames_input_size == 1024
    assert CNMConfig.from_json(config.to_dict()) == config
    assert CNMConfig.from_json(json.loads(json.dumps(config.to_dict()))) == config


def test_an_empty_name_of_a_split_is_none_as_published() -> None:
    for name in ("val_data", "test_data"):
        assert getattr(CNMConfig.from_json(changed(f"dataset.{name}", "")).dataset, name) is None
    with pytest.raises(InputError, match="train_data is needed"):
        CNMConfig.from_json(changed("dataset.train_data", ""))


def test_sizes_that_a_published_checkpoint_carries_must_agree() -> None:
    content = changed("model.config.words_input_size", 300)
    assert CNMConfig.from_json(content).model.config.words_input_size == 300
    content["model"]["config"]["words_input_size"] = 50
    with pytest.raises(InputError, match=r"model\.config\.words_input_size is 50 but the dataset section says 300"):
        CNMConfig.from_json(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("loss.beta_3", 1, "unknown field loss.beta_3"),
        ("loss.two\nlines \x1b[2J", 1, r"unknown field loss.two\nlines \x1b[2J"),
        ("train.batch_size", "128", "train.batch_size: Input should be a valid integer, got '128'"),
        ("train.batch_size", 0, "train.batch_size: Input should be greater than or equal to 1, got 0"),
        ("train.generator.lr", "fast", "train.generator.lr: Input should be a valid number"),
        ("train.generator.lr", float("nan"), "lr: nan is not a number"),
        ("dataset.max_num_frames", 3, "dataset.max_num_frames: Input should be greater than or equal to 4"),
        (
            "dataset.dataset",
            "Charades",
            "dataset.dataset: Input should be 'CharadesSTA', 'ActivityNet', 'synthetic' or 'custom'",
        ),
        ("dataset.feature_path", None, "feature_path is needed for dataset CharadesSTA"),
        (
            "dataset.feature_path",
            5,
            "dataset.feature_path: Input should be a valid string, got 5; dataset.feature_path",
        ),
        ("model.config.hidden_size", 128, "hidden_size 128 must equal DualTransformer.d_model 256"),
        ("model.config.DualTransformer.num_heads", 3, "d_model 256 must be divisible by num_heads 3"),
        ("model.config.dropout", 1.0, "model.config.dropout: Input should be less than 1"),
        (
            "dataset.max_num_frames",
            2_000_000_000,
            "dataset.max_num_frames: Input should be less than or equal to 65536",
        ),
        ("dataset.frame_dim", 10**9, "dataset.frame_dim: Input should be less than or equal to 65536"),
        ("train.batch_size", 10**11, "train.batch_size: Input should be less than 2147483648"),
        ("model.config.DualTransformer.num_decoder_layers1", 10**5, "num_decoder_layers1: Input should be less than"),
        ("model", None, "model: Input should be"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(InputError) as caught:
        CNMConfig.from_json(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_field_is_named_at_once() -> None:
    content = changed("loss.gamma", 1)
    del content["train"]["batch_size"]
    with pytest.raises(InputError, match=r"field train\.batch_size is missing; unknown field loss\.gamma"):
        CNMConfig.from_json(content)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "line 1 column 2 is not JSON"), ("[]", "Input should be"), ("\xff", "not JSON")]
)
def test_what_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.json").write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=rf"c\.json: .*{message}"):
        CNMConfig.from_json(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        CNMConfig.from_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change", ["train.reconstructor.lr=1e300", "train.generator.weight_decay=1e300", "loss.beta_1=1e31"]
)
def test_numbers_that_would_overflow(change: str) -> None:
    with pytest.raises(InputError, match=rf"{change.split('=')[0]}: must be at most 1e30, got"):
        configs.resolve("charades_i3d", [change])


def test_a_sigma_whose_square_would_overflow() -> None:
    with pytest.raises(InputError, match=r"model\.config\.sigma: must be at most 1e15, got 1e\+16"):
        configs.resolve("charades_cpl", ["model.config.sigma=1e16"])
