"""Pairs of videos and sentences without any moment: all that training needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from small_runs import cpl_config, write_files
from typer.testing import CliRunner

from cnm import checkpoint
from cnm.cli import app
from cnm.config import Config
from cnm.data import open_split
from cnm.errors import InputError
from cnm.evaluation import evaluate
from cnm.training.trainer import Trainer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def write_pairs(folder: Path) -> None:
    """The annotations of ``write_files`` as JSON lines without windows, ``pairs_train.jsonl`` and so on."""
    for name in ("train", "val", "test"):
        rows = json.loads((folder / f"{name}.json").read_text())
        lines = [{"qid": index, "query": row[3], "vid": row[0], "duration": row[1]} for index, row in enumerate(rows)]
        (folder / f"pairs_{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def changed(config: Path, **dataset: Any) -> Path:
    content = json.loads(config.read_text())
    content["dataset"] |= dataset
    path = config.with_name("_".join(["config", *dataset]) + ".json")
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, a run on them (``scored``), and one on pairs alone, with no other split (``alone``)."""
    folder = tmp_path_factory.mktemp("pairs")
    config = write_files(folder)
    write_pairs(folder)
    succeeded("train", "--config", config, "--run", folder / "scored", "--set", "dataset.val_data=null")
    alone = changed(config, train_data=str(folder / "pairs_train.jsonl"), val_data=None, test_data=None)
    said = succeeded("train", "--config", alone, "--run", folder / "alone").stderr
    assert "no validation split is configured: the last epoch is the result" in said
    assert "no test split is configured: the result is not scored" in said
    assert said.rstrip().endswith(f"the result is {folder / 'alone/last.pt'} (epoch 2)")
    return folder


def test_training_reads_no_moments(folder: Path) -> None:
    ours, theirs = (checkpoint.load(folder / name / "last.pt")["model_parameters"] for name in ("alone", "scored"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_its_run_is_whole(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "alone/metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "epoch", "result"}
    assert rows[-1] == {"kind": "result", "epoch": 2, "update": rows[-2]["update"], "checkpoint": "last.pt"}
    assert not (folder / "alone/best.pt").exists()
    for name in ("learning_curves", "localizations"):
        assert (folder / f"alone/pictures/{name}.png").stat().st_size > 0


def test_it_is_resumed(folder: Path, tmp_path: Path) -> None:
    """Two epochs and two more are four."""
    config = Config.from_json(json.loads((folder / "alone/config.json").read_text()))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_num_epochs": 4})})
    Trainer(longer, tmp_path / "four", quiet=True).train()
    Trainer(config, tmp_path / "two", quiet=True).train()
    result = Trainer(longer, tmp_path / "two", resume=True, quiet=True).train()
    assert (result.scores, result.baselines) == ({}, {})
    parameters = (checkpoint.load(tmp_path / name / "last.pt")["model_parameters"] for name in ("four", "two"))
    whole, resumed = parameters
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_found_can_be_written(folder: Path, tmp_path: Path, as_json: bool) -> None:
    """Of a test split whose moments others keep, as QVHighlights' makers do."""
    pairs = changed(folder / "config.json", test_data=str(folder / "pairs_test.jsonl"))
    command = ["evaluate", "--checkpoint", folder / "scored", "--config"]
    assert "not all of its sentences have moments, so nothing can be scored; --pred" in refused(*command, pairs)
    ours, scored = tmp_path / "ours.jsonl", tmp_path / "scored.jsonl"
    options = ["--json"] if as_json else []
    said = succeeded(*command, pairs, "--predictions", ours, *options).stdout
    succeeded(*command, folder / "config.json", "--predictions", scored)
    assert ours.read_text() == scored.read_text()
    if as_json:
        content = json.loads(said)
        assert (content["scores"], content["baselines"], content["sentences"]) == ({}, {}, 10)
    else:
        assert said == f"{ours}: moments of 10 sentences; the test split lacks some to score with\n"
    assert "pairs_test.jsonl: its sentences have no moments" in refused(
        "score", ours, "--annotations", folder / "pairs_test.jsonl"
    )


def test_several_proposals_are_written_too(folder: Path, tmp_path: Path) -> None:
    files = changed(folder / "config.json", test_data=str(folder / "pairs_test.jsonl"))
    content = cpl_config().to_dict() | {"dataset": json.loads(files.read_text())["dataset"]}
    del content["model"]["config"]["vocab_size"]
    config = Config.from_json(content)
    trainer = Trainer(config, tmp_path / "run", quiet=True)
    assert trainer.train().scores == {}
    found = evaluate(trainer.model, trainer.test_split, 4)  # type: ignore[arg-type]
    assert (found.scores, found.by_selection, found.centers.shape) == ({}, {}, (10, 3))
    output = tmp_path / "found.jsonl"
    succeeded("evaluate", "--checkpoint", tmp_path / "run", "--seeds", 3, "--predictions", output)
    assert len(json.loads(output.read_text().splitlines()[0])["pred_relevant_windows"]) == 3


def test_epochs_are_not_chosen_on_a_split_without_moments(folder: Path, tmp_path: Path) -> None:
    pairs = changed(folder / "config.json", val_data=str(folder / "pairs_val.jsonl"))
    trainer = Trainer(Config.from_json(json.loads(pairs.read_text())), tmp_path / "run", quiet=True)
    assert [split.name for split in trainer.splits] == ["train", "test"]
    result = trainer.train()
    assert result.checkpoint.name == "last.pt"
    assert result.scores["mIoU"] > 0
    file = str(folder / "pairs_val.jsonl")
    both = changed(folder / "config.json", val_data=file, test_data=file)
    assert Trainer(Config.from_json(json.loads(both.read_text())), tmp_path / "other", quiet=True).val_split is None


def test_its_report_shows_sentences_without_scores(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert "has no dataset.test_data" in refused("report", folder / "alone", "--output", page)
    succeeded("report", folder / "alone", "--split", "train", "--output", page)
    content = page.read_text()
    assert "Not all of its sentences have moments, so nothing is scored." in content
    assert "<h2>Sentences</h2>" in content
    assert "true: " not in content
    assert content.count('class="found"') == 10


def test_a_split_has_moments_or_none(folder: Path, tmp_path: Path) -> None:
    rows = json.loads((folder / "test.json").read_text())
    rows[3][2] = None
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(rows))
    dataset = Config.from_json(json.loads((folder / "config.json").read_text())).dataset
    with pytest.raises(InputError, match=r"mixed\.json: 1 of 10 sentences have no moment, '.*' the first; scores need"):
        open_split(dataset.model_copy(update={"test_data": str(mixed)}), "test")
    split = open_split(dataset.model_copy(update={"train_data": str(mixed)}), "train")
    assert not split.scored
    with pytest.raises(InputError, match="train split: 1 of 10 sentences have no moment"):
        _ = split.windows


def test_nothing_is_planted_without_a_moment(folder: Path, tmp_path: Path) -> None:
    sizes = ["--vocab", folder / "glove.pkl", "--word-dim", 10, "--frame-dim", 6]
    output = tmp_path / "features.hdf5"
    said = refused("plant", "--annotations", folder / "pairs_train.jsonl", *sizes, "--output", output)
    assert "pairs_train.jsonl: 'a person opens the door.' has no moment to plant it in" in said
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_s_validation_split_keeps_its_moments(folder: Path, tmp_path: Path) -> None:
    """Else the epoch that it chose would not count, and nobody would be told."""
    config = Config.from_json(json.loads((folder / "config.json").read_text()))
    for name in ("val", "moved"):
        (tmp_path / name).mkdir()
    (tmp_path / "val/val.json").write_text((folder / "val.json").read_text())
    rows = [[*row[:2], None, row[3]] for row in json.loads((folder / "val.json").read_text())]
    (tmp_path / "moved/val.json").write_text(json.dumps(rows))
    dataset = config.dataset.model_copy(update={"val_data": str(tmp_path / "val/val.json")})
    Trainer(config.model_copy(update={"dataset": dataset}), tmp_path / "run", quiet=True).train()
    (tmp_path / "val/val.json").unlink()
    with pytest.raises(InputError, match="not trained with this data, the val split has lost or gained its moments"):
        Trainer(None, tmp_path / "run", resume=True, quiet=True, data_dir=tmp_path / "moved")
