"""Training runs: what they leave behind, and that an interrupted run continues bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from small_runs import cpl_config, synthetic_config, write_files

from cnm import checkpoint, files, metrics
from cnm.config import CNMConfig
from cnm.errors import InputError
from cnm.training import trainer
from cnm.training.step import LeanStep
from cnm.training.trainer import Interrupted, Trainer

LOG_EVERY = 3  # updates; an epoch of the small run has 4 or 5, so that rows and epochs end at different places
TIMES = ("time", "samples_per_second", "epoch_seconds")


def start(config: CNMConfig, folder: Path) -> Trainer:
    return Trainer(config, folder, log_every=LOG_EVERY, quiet=True)


def resume(folder: Path, config: CNMConfig | None = None) -> Trainer:
    return Trainer(config, folder, resume=True, log_every=LOG_EVERY, quiet=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors within nested dicts and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found: dict[str, torch.Tensor] = {}
    for key, part in parts:
        found |= tensors(part, f"{name}/{key}")
    return found


def assert_same_runs(one: Path, other: Path) -> None:
    """Same metrics, same models, same optimizer and random states, bit for bit."""
    assert rows(one) == rows(other)
    for name in ("last.pt", "best.pt"):
        left, right = (tensors(checkpoint.load(folder / name)) for folder in (one, other))
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), key


def at_update(monkeypatch: pytest.MonkeyPatch, update: int, action: Callable[[], None]) -> None:
    """Calls ``action`` within the given update of the next run."""
    step = LeanStep.__call__

    def observed(self: LeanStep, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = step(self, *args, **kwargs)
        if self.num_updates == update:
            action()
        return found

    monkeypatch.setattr(LeanStep, "__call__", observed)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    start(synthetic_config(), folder).train()
    return folder


def test_a_run_leaves_everything_behind(straight: Path) -> None:
    kinds = [row["kind"] for row in rows(straight)]
    assert kinds.count("eval") == 2
    assert kinds[-1] == "result"
    train = next(row for row in rows(straight) if row["kind"] == "train")
    assert {"epoch", "update", "loss/reconstruction", "loss/contrastive", "nll/positive", "learning_rate"} <= set(train)
    written = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert set(TIMES) <= {name for row in written for name in row}
    result = rows(straight)[-1]
    assert set(metrics.SCORES) <= set(result)
    assert result["checkpoint"] == "best.pt"
    for picture in ("learning_curves.png", "localizations.png"):
        assert (straight / "pictures" / picture).read_bytes().startswith(b"\x89PNG")
    config = CNMConfig.from_json(straight / "config.json")
    assert config == CNMConfig.from_json(checkpoint.load(straight / "last.pt")["config"])
    assert config.model.config.vocab_size == len(checkpoint.load(straight / "best.pt")["vocabulary"]["words"])


def test_the_result_is_the_epoch_best_on_validation(straight: Path) -> None:
    evaluations = [row for row in rows(straight) if row["kind"] == "eval"]
    assert {row["split"] for row in evaluations} == {"val"}
    best = max(evaluations, key=lambda row: row["mIoU"])
    assert rows(straight)[-1]["epoch"] == best["epoch"]
    assert checkpoint.load(straight / "best.pt")["num_updates"] == best["update"]


def test_the_same_seed_gives_the_same_run_and_another_does_not(straight: Path, tmp_path: Path) -> None:
    start(synthetic_config(), tmp_path / "again").train()
    assert_same_runs(straight, tmp_path / "again")
    start(synthetic_config(train__seed=9), tmp_path / "other").train()
    assert rows(tmp_path / "other")[0] != rows(straight)[0]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("update", [1, 2, 3, "last of epoch", "last"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, update: int | str
) -> None:
    per_epoch = next(row["update"] for row in rows(straight) if row["kind"] == "eval")
    update = {"last of epoch": per_epoch, "last": 2 * per_epoch}.get(update, update)
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_update(patched, update, send(signum))
        with pytest.raises(Interrupted) as stopped:
            start(synthetic_config(), folder).train()
    assert stopped.value.signum == signum
    assert checkpoint.load(folder / "last.pt")["num_updates"] == update
    torch.rand(3)  # the process that resumes has a random state of its own
    resume(folder).train()
    assert_same_runs(straight, folder)


def test_interrupted_during_evaluation(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        evaluate = trainer.evaluate

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        patched.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            start(synthetic_config(), folder).train()
    assert "eval" not in [row["kind"] for row in rows(folder)]
    resume(folder).train()
    assert_same_runs(straight, folder)


def test_interrupted_in_the_last_evaluation_keeps_the_last_state(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the model is the best epoch's, which last.pt must not take for the last one's."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        evaluate = trainer.evaluate

        def interrupted(model: Any, split: Any, *args: Any, **kwargs: Any) -> Any:
            if split.name == "test":
                with torch.no_grad():
                    next(model.parameters()).add_(1)  # the best epoch may be the last
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(model, split, *args, **kwargs)

        patched.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            start(synthetic_config(), folder).train()
    resume(folder).train()
    assert_same_runs(straight, folder)


@pytest.mark.parametrize("torn", ["a later row", "the first row after the checkpoint"])
def test_after_a_crash_rows_newer_than_the_checkpoint_are_dropped(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    def crash() -> None:
        raise RuntimeError("power failure")

    folder = tmp_path / "run"
    last = rows(straight)[-1]["update"]
    with monkeypatch.context() as patched:
        at_update(patched, last, crash)
        with pytest.raises(RuntimeError, match="power failure"):
            start(synthetic_config(), folder).train()
    saved = checkpoint.load(folder / "last.pt")
    assert max(row["update"] for row in rows(folder)) > saved["num_updates"]
    if torn == "a later row":
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"kind": "tra')  # the line that was under way
    else:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = saved["training"]["rows"]
        (folder / "metrics.jsonl").write_text("".join(lines[:kept]) + lines[kept][:13])
    resume(folder).train()
    assert_same_runs(straight, folder)


def test_a_finished_run_can_be_made_longer(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(synthetic_config(train__max_num_epochs=1), folder).train()
    resume(folder, synthetic_config()).train()
    assert rows(folder) == rows(straight)


def test_a_longer_run_of_cpl_goes_on_with_grown_negatives(tmp_path: Path) -> None:
    """The first plan says when they are grown, also when the run is made longer a second time."""
    folder = tmp_path / "run"
    start(cpl_config(train__max_num_epochs=1), folder).train()
    for epochs in (2, 4):
        longer = resume(folder, cpl_config(train__max_num_epochs=epochs))
        assert (longer.step.max_epoch, longer.config.train.max_num_epochs) == (1, epochs)
        if epochs == 2:
            longer.train()
    assert json.loads((folder / "config.json").read_text())["model"]["config"]["max_epoch"] == 1


def test_a_second_signal_stops_at_once_without_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    at_update(monkeypatch, 2, twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts out ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            start(synthetic_config(), tmp_path / "run").train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_an_existing_folder_is_not_written_over(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{straight}: exists and is not written over; .*--resume"):
        start(synthetic_config(), straight)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"choose another folder for the run \(--run\)$"):
        start(synthetic_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_what_is_no_run(tmp_path: Path, straight: Path) -> None:
    with pytest.raises(InputError, match=r"no run to resume, it has no last\.pt"):
        resume(tmp_path)
    content = checkpoint.load(straight / "best.pt")
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(InputError, match=r"last\.pt: holds a model alone"):
        resume(tmp_path)


def test_a_resumed_run_keeps_its_configuration(straight: Path) -> None:
    with pytest.raises(InputError, match=r"--resume: the run was started with train\.batch_size = 8, not 4"):
        resume(straight, synthetic_config(train__batch_size=4))


def test_a_vocabulary_that_does_not_fit_the_checkpoint(straight: Path, tmp_path: Path) -> None:
    content = checkpoint.load(straight / "last.pt")
    content["vocabulary"]["words"][3] = "unheard"
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(InputError, match=r"word 3 is .* but the model learnt it as 'unheard'"):
        resume(tmp_path)
    content = checkpoint.load(straight / "last.pt")
    content["vocabulary"]["vectors"][3] += 1
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(InputError, match=r"1 of its words, '.*' the first, have other vectors than the model learnt"):
        resume(tmp_path)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(synthetic_config(train__max_num_epochs=1), folder).train()
    before = (folder / "metrics.jsonl").read_bytes()
    run = resume(folder)
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="another process is training in this folder"):
        run.train()
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    start(synthetic_config(train__max_num_epochs=1), folder).train()
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = resume(folder, synthetic_config())
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        run.train()
    assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
    assert not list(folder.glob(".*.tmp"))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"became (nan|inf) in update 2 \(epoch 1, batch 2\); lower train\.rec"):
        start(synthetic_config(train__reconstructor__lr=1e30, train__max_num_epochs=4), tmp_path / "run").train()


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is due after every update here, a metrics row is not."""
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    config = synthetic_config(train__reconstructor__lr=1e30, train__max_num_epochs=4)
    with pytest.raises(InputError, match="in update 2"):
        start(config, tmp_path / "run").train()
    assert checkpoint.load(tmp_path / "run" / "last.pt")["num_updates"] == 1


def poison(monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    """Makes the reconstruction loss of these updates NaN."""
    plain = LeanStep.reconstruction_loss

    def poisoned(self: LeanStep, *args: Any) -> torch.Tensor:
        return plain(self, *args) * (math.nan if self.num_updates in updates else 1.0)

    monkeypatch.setattr(LeanStep, "reconstruction_loss", poisoned)


def test_updates_that_are_no_numbers_can_be_skipped_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 5})
    folder = tmp_path / "run"
    Trainer(synthetic_config(), folder, log_every=2, quiet=True, skip_nonfinite=True).train()
    trained = [row for row in rows(folder) if row["kind"] == "train"]
    assert sum(row["skipped"] for row in trained) == 2
    assert all(math.isfinite(value) for row in trained for value in row.values() if isinstance(value, float))
    model = checkpoint.load(folder / "last.pt")["model_parameters"]
    assert all(value.isfinite().all() for value in model.values())


def test_a_skipped_update_changes_nothing_but_the_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer_ = Trainer(synthetic_config(), tmp_path / "run", quiet=True, skip_nonfinite=True)
    batches = [batch for _, batch in trainer_.loader.epoch(0)]
    trainer_.step(batches[0])
    names = [name for name, _ in trainer_.model.named_parameters() if not name.startswith("fc_mask_gen")]
    before = {name: value.clone() for name, value in trainer_.model.state_dict().items()}
    poison(monkeypatch, {2})
    found = trainer_.step(batches[1])
    assert found["grad_norm/reconstructor"].isnan()
    assert found["grad_norm/generator"].isfinite()
    assert trainer_.step.num_updates == 2
    after = trainer_.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert all(parameter.grad is None for parameter in trainer_.step.optimizers["reconstructor"].parameters)


@pytest.mark.parametrize("update", [2, 3])
def test_interrupted_after_a_skipped_update(update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metrics row is of three updates."""
    folder = tmp_path / "run"
    options: dict[str, Any] = {"log_every": 3, "quiet": True, "skip_nonfinite": True}
    poison(monkeypatch, {update})
    with monkeypatch.context() as patched:
        at_update(patched, update, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            Trainer(synthetic_config(), folder, **options).train()
    assert checkpoint.load(folder / "last.pt")["num_updates"] == update
    Trainer(None, folder, resume=True, log_every=3, quiet=True).train()  # skips as the run did
    Trainer(synthetic_config(), tmp_path / "unbroken", **options).train()
    assert_same_runs(tmp_path / "unbroken", folder)
    assert sum(row["skipped"] for row in rows(folder) if row["kind"] == "train") == 1


def test_a_resumed_run_can_begin_and_cease_to_skip(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(synthetic_config(), folder, quiet=True).train()
    asked_and_kept = ((None, False), (True, True), (None, True), (False, False), (None, False))
    for epochs, (asked, kept) in enumerate(asked_and_kept, start=3):
        longer = synthetic_config(train__max_num_epochs=epochs)
        resumed = Trainer(longer, folder, resume=True, skip_nonfinite=asked, quiet=True)
        assert resumed.step.skip_nonfinite is kept
        resumed.train()


def test_a_skipped_update_does_not_end_a_run_that_skips_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, {2})
        at_update(patched, 2, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            Trainer(synthetic_config(), folder, log_every=3, quiet=True, skip_nonfinite=True).train()
    Trainer(None, folder, resume=True, log_every=3, quiet=True, skip_nonfinite=False).train()


def test_a_short_row_of_skipped_updates_joins_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of an epoch is of what is left of it."""
    trainer_ = Trainer(synthetic_config(), tmp_path / "run", log_every=3, quiet=True, skip_nonfinite=True)
    per_epoch = len(trainer_.loader)
    assert per_epoch % 3 == 1
    poison(monkeypatch, {per_epoch})
    trainer_.train()
    trained = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert per_epoch not in [row["update"] for row in trained]
    assert sum(row["skipped"] for row in trained) == 1


def test_gradients_whose_norm_overflows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is finite, but the clip would make all of them 0 and Adam move the parameters all the same."""
    plain = LeanStep.reconstruction_loss
    trainer_ = Trainer(synthetic_config(), tmp_path / "run", quiet=True, skip_nonfinite=True)
    _, batch = next(iter(trainer_.loader.epoch(0)))
    trainer_.step(batch)
    monkeypatch.setattr(LeanStep, "reconstruction_loss", lambda self, *args: plain(self, *args) * 1e25)
    names = [name for name, _ in trainer_.model.named_parameters() if not name.startswith("fc_mask_gen")]
    before = {name: value.clone() for name, value in trainer_.model.state_dict().items()}
    trainer_.step(batch)
    after = trainer_.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_skipped_updates_of_the_last_short_row_count_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_ = Trainer(synthetic_config(), tmp_path / "run", log_every=3, quiet=True, skip_nonfinite=True)
    last = 2 * len(trainer_.loader)
    assert last % 3 == 2
    poison(monkeypatch, {last - 1, last})  # the whole row
    trainer_.train()
    found = rows(tmp_path / "run")
    assert (found[-1]["kind"], found[-1]["skipped"]) == ("result", 2)
    assert sum(row.get("skipped", 0) for row in found) == 2


def test_a_step_that_fails_half_way_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = start(synthetic_config(), tmp_path / "run").step

    def fails(self: LeanStep, *args: Any) -> Any:
        raise RuntimeError("out of memory")

    wanted = [parameter.requires_grad for parameter in step.model.parameters()]
    monkeypatch.setattr(LeanStep, "contrastive_loss", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(next(iter(start(synthetic_config(), tmp_path / "other").loader.epoch(0)))[1])
    assert [parameter.requires_grad for parameter in step.model.parameters()] == wanted


def test_of_two_that_begin_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one, other = start(synthetic_config(), folder), start(synthetic_config(train__seed=7), folder)
    one.train()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match="exists and is not written over"):
        other.train()
    assert (folder / "config.json").read_bytes() == before


def test_a_checkpoint_replaced_before_the_lock_is_not_gone_back_behind(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    longer = synthetic_config(train__max_num_epochs=3)
    late = resume(folder, longer)
    resume(folder, longer).train()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="another process trained on in this folder meanwhile; resume once more"):
        late.train()
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_whose_every_update_is_skipped_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(InputError, match=r"became nan in update 1 \(epoch 1, batch 1\)"):
        Trainer(synthetic_config(), tmp_path / "run", log_every=2, quiet=True, skip_nonfinite=True).train()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/proc/self/run: cannot be written .*; free disk space or choose another"):
        Trainer(synthetic_config(), Path("/proc/self/run"), quiet=True).train()


def test_features_replaced_while_training_do_not_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come from the cache, which was made of the file as it was; the next run sees the new file."""
    config = CNMConfig.from_json(write_files(tmp_path))
    Trainer(config, tmp_path / "whole", quiet=True).train()
    features = tmp_path / "features.hdf5"

    def replace() -> None:
        content = features.read_bytes()
        features.write_bytes(content[: len(content) // 2])

    at_update(monkeypatch, 2, replace)
    Trainer(config, tmp_path / "run", quiet=True).train()
    assert_same_runs(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        Trainer(config, tmp_path / "next", quiet=True)
    assert not (tmp_path / "next").exists()


def test_resuming_removes_what_killed_writes_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(synthetic_config(train__max_num_epochs=1), folder).train()
    left = [folder / ".last.pt.123.tmp", folder / "pictures" / ".localizations.png.123.tmp"]
    for path in left:
        path.write_bytes(b"half")
    resume(folder, synthetic_config()).train()
    assert not any(path.exists() for path in left)


def test_without_a_validation_split_the_last_epoch_is_the_result(tmp_path: Path) -> None:
    content = json.loads(write_files(tmp_path).read_text())
    del content["dataset"]["val_data"]
    run = start(CNMConfig.from_json(content), tmp_path / "run")
    assert run.val_split is None
    result = run.train()
    assert (result.checkpoint.name, result.epoch) == ("last.pt", 2)
    assert "eval" not in [row["kind"] for row in rows(tmp_path / "run")]


def test_the_test_split_chooses_nothing(tmp_path: Path) -> None:
    """The published Charades-STA configuration validates on the test file."""
    content = json.loads(write_files(tmp_path).read_text())
    content["dataset"]["val_data"] = content["dataset"]["test_data"]
    run = start(CNMConfig.from_json(content), tmp_path / "run")
    assert not run.chooses_best
    result = run.train()
    assert (result.checkpoint.name, result.epoch) == ("last.pt", 2)
    assert not (tmp_path / "run" / "best.pt").exists()
    evaluations = [row for row in rows(tmp_path / "run") if row["kind"] == "eval"]
    assert [row["split"] for row in evaluations] == ["test", "test"]
    assert evaluations[-1]["mIoU"] == result.scores["mIoU"]


def test_nothing_is_written_when_the_data_is_wrong(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "features.hdf5").write_bytes(b"")
    with pytest.raises(InputError, match=r"features\.hdf5"):
        start(CNMConfig.from_json(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bf16_trains_and_resumes_as_itself(tmp_path: Path) -> None:
    """Parameters and optimizer states stay float32; a resumed run keeps its precision, and refuses another."""
    trainer = Trainer(synthetic_config(), tmp_path / "run", precision="bf16", quiet=True)
    assert all(split.dtype == torch.bfloat16 for split in trainer.splits)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    rows = [row for row in trainer.run.rows() if row["kind"] == "train"]
    assert all(math.isfinite(row["loss/reconstruction"]) for row in rows)
    again = Trainer(None, tmp_path / "run", resume=True, quiet=True)
    assert again.options == {"precision": "bf16", "step": "lean", "skip_nonfinite": False}
    assert again.model.compute_dtype == torch.bfloat16
    with pytest.raises(InputError, match="was trained with precision bf16, not float32"):
        Trainer(None, tmp_path / "run", resume=True, precision="float32", quiet=True)


def test_both_steps_give_the_same_run_without_dropout(tmp_path: Path) -> None:
    config = synthetic_config(model__config__dropout=0.0, model__config__DualTransformer__dropout=0.0)
    curves = []
    for step in ("lean", "published"):
        trainer = Trainer(config, tmp_path / step, step=step, quiet=True)
        trainer.train()
        curves.append([row["loss/reconstruction"] for row in trainer.run.rows() if row["kind"] == "train"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision 'fp8': unknown; choose one of float32, bf16"):
        Trainer(synthetic_config(), tmp_path / "run", precision="fp8", quiet=True)
    assert not (tmp_path / "run").exists()
