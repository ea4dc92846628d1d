"""Runs that are moved, begun beside others, or killed between two files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import synthetic_config, write_files

from cnm import checkpoint
from cnm.config import CNMConfig
from cnm.errors import InputError
from cnm.evaluation import evaluate
from cnm.training.finished import FinishedRun
from cnm.training.step import LeanStep
from cnm.training.trainer import Trainer


class Killed(Exception):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """The next run ends within this update, as if killed."""
    step = LeanStep.__call__

    def observed(self: LeanStep, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        if self.num_updates == update:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LeanStep, "__call__", observed)


def parameters(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(folder / name)["model_parameters"]
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved") / "straight"
    Trainer(synthetic_config(), folder, quiet=True).train()
    return folder


def test_what_is_drawn_before_training_does_not_change_it(straight: Path, tmp_path: Path) -> None:
    first = Trainer(synthetic_config(), tmp_path / "first", quiet=True)
    second = Trainer(synthetic_config(), tmp_path / "second", quiet=True)
    torch.rand(3)
    assert first.test_split is not None
    evaluate(first.model, first.test_split, 4)
    for trainer in (second, first):
        trainer.train()
    assert_equal(parameters(straight), parameters(tmp_path / "first"))
    assert_equal(parameters(straight), parameters(tmp_path / "second"))


def test_a_run_moved_by_its_files_goes_on(straight: Path, tmp_path: Path) -> None:
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.copy(straight / name, tmp_path / "moved")
    longer = synthetic_config(train__max_num_epochs=3)
    Trainer(longer, tmp_path / "moved", resume=True, quiet=True).train()
    assert (tmp_path / "moved/pictures/learning_curves.png").exists()
    assert (tmp_path / "moved/config.json").exists()


def test_a_run_without_its_best_model_is_refused_at_once(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    with pytest.raises(InputError, match=r"run/best\.pt: is not there, the best model of this run so far"):
        Trainer(synthetic_config(train__max_num_epochs=3), tmp_path / "run", resume=True, quiet=True)


def test_the_result_says_which_epoch_its_model_is_of(straight: Path, tmp_path: Path) -> None:
    """A kill between the writes of best.pt and last.pt leaves the former ahead."""
    shutil.copytree(straight, tmp_path / "run")
    known = checkpoint.load(tmp_path / "run/last.pt")["training"]["best"]["epoch"]
    ahead = checkpoint.load(tmp_path / "run/best.pt") | {"epoch": known + 5}
    checkpoint.save(tmp_path / "run/best.pt", ahead)
    result = Trainer(None, tmp_path / "run", resume=True, quiet=True).train()
    assert (result.checkpoint.name, result.epoch) == ("best.pt", known + 5)


def test_checkpoints_name_the_data_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads them later, of a finished run too."""
    (tmp_path / "old").mkdir()
    content: dict[str, Any] = json.loads(write_files(tmp_path / "old").read_text())
    for name, path in content["dataset"].items():
        if isinstance(path, str) and path.startswith(str(tmp_path)):
            content["dataset"][name] = Path(path).name
    content["dataset"]["cache_path"] = str(tmp_path / "cache")
    monkeypatch.chdir(tmp_path / "old")
    Trainer(CNMConfig.from_json(content), tmp_path / "run", quiet=True).train()
    monkeypatch.chdir(tmp_path)
    before = parameters(tmp_path / "run"), parameters(tmp_path / "run", "best.pt")
    Trainer(None, tmp_path / "run", resume=True, quiet=True, data_dir=Path("old")).train()
    for name, kept in zip(("last.pt", "best.pt"), before, strict=True):
        stored = checkpoint.load(tmp_path / "run" / name)
        assert stored["config"]["dataset"]["test_data"] == "old/test.json"
        assert_equal(kept, stored["model_parameters"])
    assert checkpoint.load(tmp_path / "run/last.pt")["training"]["epoch"] == 2
    assert len(FinishedRun(tmp_path / "run").split("test")) == 10


def test_a_run_does_not_end_before_the_epoch_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half of an epoch would be scored as the epoch before."""
    trainer = Trainer(synthetic_config(train__max_num_epochs=3), tmp_path / "run", quiet=True)
    per_epoch = len(trainer.loader)
    monkeypatch.setattr(trainer, "_check_stop", lambda *, logged=True: trainer._save())
    killed_at(monkeypatch, per_epoch + 1)
    with pytest.raises(Killed):
        trainer.train()
    with pytest.raises(InputError, match=r"run: has trained in epoch 2, so train\.max_num_epochs cannot be 1; give 2"):
        Trainer(synthetic_config(train__max_num_epochs=1), tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize("place", [2, -1], ids=["before a checkpoint", "after one"])
def test_rows_are_not_written_twice_where_the_file_was_moved_away(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = synthetic_config(train__max_num_epochs=2)
    Trainer(config, tmp_path / "run", quiet=True, log_every=2).train()
    (tmp_path / "run/metrics.jsonl").rename(tmp_path / "old.jsonl")
    longer = synthetic_config(train__max_num_epochs=4)
    trainer = Trainer(longer, tmp_path / "run", resume=True, quiet=True, log_every=2)
    per_epoch = len(trainer.loader)
    with monkeypatch.context() as patched:
        killed_at(patched, 2 * per_epoch + place if place > 0 else 4 * per_epoch + place)
        with pytest.raises(Killed):
            trainer.train()
    Trainer(None, tmp_path / "run", resume=True, quiet=True, log_every=2).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    places = [(row["kind"], row["epoch"], row["update"]) for row in rows]
    assert len(set(places)) == len(places)
    assert places[-1] == ("result", rows[-1]["epoch"], 4 * per_epoch)


def test_a_best_model_left_behind_is_told_where_the_data_is(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    best = checkpoint.load(tmp_path / "run/best.pt")
    best["config"]["dataset"]["cache_path"] = "old"
    checkpoint.save(tmp_path / "run/best.pt", best)
    Trainer(None, tmp_path / "run", resume=True, quiet=True).train()
    assert "cache_path" not in checkpoint.load(tmp_path / "run/best.pt")["config"]["dataset"]


def test_a_process_without_the_folder_reports_the_result_too(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several machines that share no disk only process 0's has best.pt."""
    shutil.copytree(straight, tmp_path / "run")
    trainer = Trainer(None, tmp_path / "run", resume=True, quiet=True)
    trainer.writes = False
    (tmp_path / "run/best.pt").unlink()
    assert trainer.train().epoch == trainer.best["epoch"]
