"""Configuration files: the published ones unchanged; unknown and ill-typed fields named."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from test_cli import error_line, run

from cnm import CNMConfig, InputError, configs
from cnm.config import CONFIGS, Config
from cnm.config_fields import every_field

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


# The command and its files


def test_unknown_keys_and_wrong_values_of_set_are_named(tmp_path: Path) -> None:
    for change, words in {
        "train.bach_size=4": "unknown field train.bach_size; did you mean train.batch_size",
        "batch_size=4": "unknown field batch_size; did you mean train.batch_size?",
        "trian.batch_size=4": "unknown field trian; did you mean train?",
        "lr=1": "did you mean train.generator.lr or train.reconstructor.lr?",
        "train.batch_size=large": "train.batch_size",
        "train.batch_size": "must be key=value",
        "train.batch_size.x=3": "batch_size has no fields of its own",
        "bogus.key=1": "unknown field bogus; remove it",
    }.items():
        message = error_line(run("train", "--config", "synthetic", "--run", tmp_path / "run", "--set", change))
        assert words in message, message
        assert change in message
    assert not (tmp_path / "run").exists()


def test_a_folder_does_not_hide_a_packaged_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tacos", "train"):
        Path(name).mkdir()
    assert Config.from_json(json.loads(run("config", "tacos").stdout)) == configs.resolve("tacos")
    assert run("config", "train").stdout.startswith("train: optimizers")
    os.mkfifo("pipe")
    threading.Thread(target=Path("pipe").write_text, args=(run("config", "tacos").stdout,)).start()
    assert json.loads(run("config", "pipe").stdout) == json.loads(run("config", "tacos").stdout)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    message = error_line(run("train", "--config", "charades", "--run", tmp_path / "run"))
    assert "synthetic" in message
    assert message.endswith("; did you mean charades_i3d or charades_cpl?")
    assert "--config is missing" in error_line(run("train", "--run", tmp_path / "run"))
    (tmp_path / "broken.json").write_text('{"dataset": ')
    assert "broken.json: line 1" in error_line(run("train", "--config", tmp_path / "broken.json"))


def test_config_lists_the_packaged_ones_and_explains_every_field() -> None:
    listed = run("config").stdout
    for name in configs.names():
        assert f"  {name} " in listed
    for field in (field for config in CONFIGS.values() for field in every_field(config)):
        assert field.description, f"{field.name} has no description"
        assert field.name in listed
    assert "model.config.max_width  (number above 0; default 1.0)" in listed
    assert "train.batch_size  (whole number from 1; must be given)" in listed
    explained = run("config", "train.generator").stdout.splitlines()
    assert explained[0].startswith("train.generator: ")
    assert all("train.generator" in line or line.startswith("      ") for line in explained)
    assert "did you mean train.generator.lr or" in error_line(run("config", "train.lr"))
    assert "did you mean charades_i3d" in error_line(run("config", "charades"))
    assert "--set" in error_line(run("config", "--set", "train.seed=1"))


@pytest.mark.parametrize("name", configs.names())
def test_config_prints_what_train_takes(tmp_path: Path, name: str) -> None:
    result = run("config", name, "--set", "train.batch_size=7")
    (tmp_path / "mine.json").write_text(result.stdout)
    assert configs.resolve(tmp_path / "mine.json") == configs.resolve(name, ["train.batch_size=7"])


@pytest.mark.parametrize("name", configs.names())
def test_packaged_configurations_are_valid(name: str) -> None:
    config = configs.resolve(name)
    assert config.train.model_saved_path.endswith(name)


def test_packaged_configurations_have_the_published_values() -> None:
    charades, clip, c3d = (configs.resolve(n) for n in ("charades_i3d", "activitynet_clip", "activitynet_c3d"))
    assert (charades.dataset.vocab_size, charades.dataset.frame_dim, charades.train.max_num_epochs) == (1111, 1024, 50)
    assert (charades.model.config.alpha, charades.model.config.max_width) == (5.5, 0.45)
    assert (clip.dataset.vocab_size, clip.dataset.frame_dim, clip.train.max_num_epochs) == (8000, 512, 20)
    assert (c3d.dataset.frame_dim, c3d.train.max_num_epochs, c3d.model.config.max_width) == (500, 30, 1)
    for config in (charades, clip, c3d):
        optimizer = config.train.reconstructor
        assert (optimizer.lr, optimizer.warmup_updates, optimizer.warmup_init_lr) == (4e-4, 400, 1e-7)
        assert (config.train.batch_size, config.dataset.max_num_frames, config.dataset.max_num_words) == (128, 200, 20)
        assert (config.loss.beta_1, config.loss.beta_2) == (0.1, 0.15)
