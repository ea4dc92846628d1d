"""torchrun with 2 and 3 processes does what one process does, evaluates every sentence once, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import synthetic_config

from cnm import checkpoint
from cnm.data import open_split
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.evaluation import evaluate
from cnm.models.cnm import CNM
from cnm.training.trainer import Interrupted, Trainer

NO_DROPOUT = {"model__config__dropout": 0.0, "model__config__DualTransformer__dropout": 0.0}
UNDRAWN = str(Path(__file__).parents[1] / "undrawn.py")
EPOCHS = 7  # of 3 updates: 12 videos give 24 sentences


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    changes = {"train__max_num_epochs": EPOCHS, "dataset__cache_path": str(folder / "cache")}
    config = synthetic_config(**NO_DROPOUT, **changes)
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    return path


def command(processes: int, *arguments: str, drawn: bool = False) -> list[str]:
    program = ["-m", "cnm"] if drawn else [UNDRAWN]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *program, "train", *arguments, "--device", "cpu"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def train(processes: int, *arguments: str, drawn: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments, drawn=drawn),
        env=environment(),
        cwd=tempfile.gettempdir(),  # not the source tree, where python -m would look first
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(config_file: Path) -> Path:
    run = config_file.parent / "alone"
    done = train(1, "--config", str(config_file), "--run-folder", str(run))
    assert done.returncode == 0, done.stderr
    return run


def rows(run: Path, kind: str) -> list[dict[str, float]]:
    return [row for line in open(run / "metrics.jsonl") if (row := json.loads(line))["kind"] == kind]


def assert_same_parameters(run: Path, other: Path) -> None:
    """All but the keys' biases: they shift a query's scores alike, so that nothing depends on them, and their gradients
    are rounding alone, of which Adam makes steps."""
    mine, theirs = (checkpoint.load(path / "last.pt")["model_parameters"] for path in (run, other))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        ours = mine[name]
        if name.endswith("in_proj_bias"):
            (ours, _, ours_value), (value, _, value_value) = ours.chunk(3), value.chunk(3)
            ours, value = torch.cat([ours, ours_value]), torch.cat([value, value_value])
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_do_what_one_does(processes: int, config_file: Path, alone: Path) -> None:
    """Batches of 8 among 3 are uneven, and one process writes."""
    run = config_file.parent / f"of-{processes}"
    done = train(processes, "--config", str(config_file), "--run-folder", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test split") == 1
    assert checkpoint.load(run / "last.pt")["num_updates"] == checkpoint.load(alone / "last.pt")["num_updates"] >= 20
    assert_same_parameters(run, alone)
    for kind in ("train", "eval", "result"):
        for mine, theirs in zip(rows(run, kind), rows(alone, kind), strict=True):
            for name, value in theirs.items():
                if isinstance(value, float) and name not in ("time", "samples_per_second", "epoch_seconds"):
                    assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (kind, name)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config_file: Path, alone: Path) -> None:
    run = config_file.parent / "resumed"
    short = train(2, "--config", str(config_file), "--run-folder", str(run), "--set", "train.max_num_epochs=3")
    assert short.returncode == 0, short.stderr[-3000:]
    long = train(1, "--resume", str(run), "--set", f"train.max_num_epochs={EPOCHS}")
    assert long.returncode == 0, long.stderr[-3000:]
    assert_same_parameters(run, alone)


def stopped(config_file: Path, run: Path, stop: Callable[[subprocess.Popen[bytes]], None]) -> tuple[int, bytes]:
    """Exit code and messages of a job of two, to which ``stop`` was done after its first checkpoint; it resumes."""
    arguments = ("--config", str(config_file), "--run-folder", str(run), "--set", "train.max_num_epochs=400")
    place = tempfile.gettempdir()
    job = subprocess.Popen(command(2, *arguments), env=environment(), cwd=place, stdout=-1, stderr=-1)
    try:
        deadline = time.monotonic() + 120
        while not (run / "last.pt").exists():
            assert time.monotonic() < deadline
            assert job.poll() is None, job.communicate()[1][-3000:]
            time.sleep(0.1)
        stop(job)
        _, said = job.communicate(timeout=120)
    finally:
        job.kill()
    epoch = checkpoint.load(run / "last.pt")["training"]["epoch"]
    done = train(2, "--resume", str(run), "--set", f"train.max_num_epochs={epoch + 1}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.load(run / "last.pt")["training"]["epoch"] == epoch + 1
    return job.returncode, said


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_run_resumes(config_file: Path) -> None:
    def kill_one(job: subprocess.Popen[bytes]) -> None:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)

    code, said = stopped(config_file, config_file.parent / "killed", kill_one)
    assert code != 0
    assert b"lost another process of the job" in said or b"Signal 9 (SIGKILL)" in said


@pytest.mark.slow
def test_sigterm_stops_all_after_the_same_update(config_file: Path) -> None:
    code, said = stopped(config_file, config_file.parent / "stopped", lambda job: job.send_signal(signal.SIGTERM))
    assert code != 0
    assert b"lost another process of the job" not in said  # nobody was left waiting


class Voting(Group):
    """One process of a job: the others do what it does, but ``vote`` may change what each update's vote finds."""

    def __init__(self, vote: Callable[[int, bool], bool]) -> None:
        super().__init__(0, 1)
        self.vote, self.votes = vote, 0

    def sum(self, tensors, share):
        return list(tensors)

    def any(self, flag, device):
        self.votes += 1
        return self.vote(self.votes, flag)

    def gather(self, value):
        return [value]

    def share_parameters(self, model):
        pass


@pytest.mark.parametrize("moment", ["during a vote", "after another's", "twice, as a launcher passes it on"])
def test_no_process_stops_alone(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes when its process has voted counts in the next vote, and in none where all stop anyway."""

    def signal_self() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def vote(number: int, flag: bool) -> bool:
        if number == 2 and moment != "after another's":
            signal_self()
            if moment != "during a vote":
                signal_self()
        return flag or (number == 3 and moment == "after another's")

    trainer = Trainer(synthetic_config(), tmp_path / "run", quiet=True, group=Voting(vote))
    if moment == "after another's":
        save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", lambda *arguments: (signal_self(), save(*arguments)))
    with pytest.raises(Interrupted) as stopped:
        trainer.train()
    assert stopped.value.signum == signal.SIGTERM
    assert checkpoint.load(tmp_path / "run" / "last.pt")["num_updates"] == 3


def test_machines_with_other_states_are_refused(tmp_path: Path) -> None:
    class Elsewhere(Voting):
        def gather(self, value):
            return [value, value | {"updates": 40}]

    trainer = Trainer(synthetic_config(), tmp_path / "run", quiet=True, group=Elsewhere(lambda number, flag: flag))
    with pytest.raises(
        InputError, match=r"process 1 of the job has updates 40, process 0 0; give all machines the same"
    ):
        trainer.train()


@pytest.mark.parametrize(("count", "size"), [(8, 2), (8, 3), (5, 3), (1, 3)])
def test_every_sample_has_one_process(count: int, size: int) -> None:
    groups = [Group(rank, size) for rank in range(size)]
    counted = [row for group in groups if group.share(count) for row in group.rows(count)]
    assert sorted(counted) == list(range(count))
    assert sum(group.share(count) for group in groups) == pytest.approx(1)
    assert all(len(group.rows(count)) > 0 for group in groups)  # nobody stands idle, which would change random numbers


class Found(Exception):
    """Ends a process of a pretended group once its part is noted."""


class Pretend(Group):
    """The processes of a group one after the other: the last one gathers what all of them found."""

    found: list

    def gather(self, value):
        self.found.append(value)
        if len(self.found) < self.size:
            raise Found
        return self.found


@pytest.mark.parametrize("size", [2, 3, 50])
def test_evaluation_counts_every_sentence_once(size: int, tmp_path: Path) -> None:
    """Also where some processes have nothing to do."""
    trainer = Trainer(synthetic_config(), tmp_path / "run", quiet=True)
    model, split = trainer.model, trainer.test_split
    assert isinstance(model, CNM)
    whole = evaluate(model, split, 4)
    Pretend.found = []
    for rank in range(size - 1):
        with pytest.raises(Found):
            evaluate(model, split, 4, group=Pretend(rank, size))
    together = evaluate(model, split, 4, group=Pretend(size - 1, size))
    np.testing.assert_allclose(together.center, whole.center, atol=1e-6)
    assert together.scores == pytest.approx(whole.scores, abs=1e-6)
    assert len(open_split(synthetic_config().dataset, "test")) == len(together.center)
