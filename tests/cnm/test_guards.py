"""Locks that another process really holds, pipes that are closed, users without a home, models that are no numbers."""

from __future__ import annotations

import json
import pwd
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import Result
from small_runs import SMALL, assignments, write_files
from typer.testing import CliRunner

from cnm import checkpoint, configs
from cnm.cli import app
from cnm.data import cache
from cnm.data.features import FeatureFile
from cnm.errors import InputError

CHANGES = [part for item in assignments(SMALL | {"train.max_num_epochs": 1}) for part in ("--set", item)]
HOLDER = """
import sys, h5py
from filelock import FileLock
for path in sys.argv[1:]:
    held = h5py.File(path, "a") if path.endswith(".hdf5") else FileLock(path).acquire()
    globals()[path] = held
print("held", flush=True)
sys.stdin.read(1)
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("guards") / "run"
    assert run("train", "--config", "synthetic", "--run", folder, *CHANGES).exit_code == 0
    return folder


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds locks until a byte is written to it."""
    started = []

    def hold(*paths: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, *map(str, paths)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        with process:
            process.kill()


def test_files_that_another_process_holds(tmp_path: Path, finished: Path, held: Callable[..., Any]) -> None:
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        file["v"] = np.ones((3, 2), np.float32)
    shutil.copytree(finished, tmp_path / "run")
    target = cache.build_once(tmp_path / "cache", {"a": 1}, lambda folder: None)
    shutil.rmtree(target)
    process = held(tmp_path / "f.hdf5", tmp_path / "run" / ".lock", Path(f"{target}.lock"))
    with pytest.raises(InputError, match=r"f\.hdf5: cannot be opened \(.*lock.*\); another program is writing it"):
        FeatureFile(tmp_path / "f.hdf5")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    line = error_line(run("train", "--resume", tmp_path / "run", "--set", "train.max_num_epochs=2"))
    assert f"{tmp_path / 'run'}: another process is training in this folder; wait for it or stop it" in line
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    built: list[Path] = []
    waiting = threading.Thread(
        target=lambda: cache.build_once(tmp_path / "cache", {"a": 1}, lambda folder: built.append(folder))
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert not built
    process.stdin.write("x")
    process.stdin.flush()
    waiting.join(60)
    assert built
    assert target.is_dir()


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, '{"a": NaN}', "", "\udcff"], ids=lambda text: text[:3])
def test_a_damaged_index_of_the_cache_is_built_again(tmp_path: Path, content: str) -> None:
    build = lambda folder: (folder / "a").write_text("a")  # noqa: E731
    folder = cache.build_once(tmp_path, {}, build)
    whole = (folder / cache.SIZES).read_text()
    (folder / cache.SIZES).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert cache.build_once(tmp_path, {}, build) == folder
    assert (folder / cache.SIZES).read_text() == whole


def test_a_closed_pipe_is_no_traceback() -> None:
    """The pipe closes before the first byte: the moment at which ``cnm config | head -1`` closes it varies."""
    command = [sys.executable, "-m", "cnm", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode in (1, 141)


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_files(tmp_path)
    content = json.loads(config.read_text())
    del content["dataset"]["cache_path"]
    config.write_text(json.dumps(content))

    def nobody(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    arguments = ("train", "--config", config, "--run", tmp_path / "run", "--set", "train.max_num_epochs=1")
    assert "there is no home folder for the cache" in error_line(run(*arguments))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "elsewhere" / "cnm-kernels").is_dir()


# Models that are no numbers


def spoilt(content: dict[str, Any], what: str) -> dict[str, Any]:
    for value in content["model_parameters"].values():
        if what == "infinite answers":
            value.mul_(1e30)
        elif what == "NaN in the model":
            value[...] = float("nan")
    if what == "NaN in the vocabulary":
        content["vocabulary"]["vectors"][1, 0] = float("nan")
    return content


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN in the model", "holds NaN or infinity"),
        ("NaN in the vocabulary", "'vocabulary.vectors': holds NaN or infinity"),
        ("infinite answers", "not a number"),
    ],
)
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_models_that_are_no_numbers(
    finished: Path, tmp_path: Path, what: str, message: str, as_json: list[str]
) -> None:
    torch.save(spoilt(checkpoint.load(finished / "last.pt"), what), tmp_path / "m.pt")
    np.save(tmp_path / "f.npy", np.ones((9, SMALL["dataset.frame_dim"]), np.float32))
    evaluate = ("evaluate", "--checkpoint", tmp_path / "m.pt", "--predictions", tmp_path / "p.jsonl")
    localize = ("localize", "--checkpoint", tmp_path / "m.pt", "--features", tmp_path / "f.npy")
    for command in (evaluate, (*localize, "--query", "the person opens the door", "--plot", tmp_path / "p.png")):
        result = run(*command, *as_json)
        line = error_line(result)
        assert any(part in line for part in message.split("|")), line
        assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy", "m.pt"]


# The state of a run


def first(state: dict[str, Any]) -> dict[str, Any]:
    """The first optimizer's state."""
    return next(value for value in state["step"].values() if isinstance(value, dict))


WRONG_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda state: state.pop("step"),
    "no optimizer": lambda state: state.update(step={}),
    "another optimizer's groups": lambda state: first(state)["param_groups"].clear(),
    "fewer parameters": lambda state: first(state)["param_groups"][0]["params"].pop(),
    "a moment of another shape": lambda state: first(state)["state"][0].update(exp_avg=torch.ones(3)),
    "a moment that is missing": lambda state: first(state)["state"][0].pop("exp_avg_sq"),
    "NaN in a moment": lambda state: first(state)["state"][0]["exp_avg"].fill_(float("nan")),
    "a negative epoch": lambda state: state.update(epoch=-1),
    "text as batch": lambda state: state.update(batch="1"),
    "random state cut short": lambda state: state["random"].update(torch=torch.zeros(9, dtype=torch.uint8)),
    "random state of floats": lambda state: state["random"].update(torch=torch.zeros(9)),
    "pending of other metrics": lambda state: state.update(pending=[torch.ones(1)]),
    "an unknown step": lambda state: state["options"].update(step="none"),
    "an unknown precision": lambda state: state["options"].update(precision="fp8"),
    "text for whether updates are skipped": lambda state: state["options"].update(skip_nonfinite="no"),
    "a batch beyond the epoch": lambda state: state.update(batch=10**9),
    "best without a score": lambda state: state.update(best={"epoch": 1, "mIoU": "high"}),
    "rows of text": lambda state: state.update(rows="2"),
    "began as text": lambda state: state.update(epoch_began="now"),
    "seconds that are no number": lambda state: state.update(seconds=float("nan")),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_wrong_training_state_is_refused(finished: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    content = checkpoint.load(folder / "last.pt")
    WRONG_STATES[case](content["training"])
    torch.save(content, folder / "last.pt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = error_line(run("train", "--resume", folder, "--set", "train.max_num_epochs=2"))
    assert str(folder / "last.pt") in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# Resuming


def test_a_run_whose_data_moved_is_resumed_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    content = json.loads(write_files(tmp_path / "data").read_text())
    for name, path in content["dataset"].items():
        if isinstance(path, str) and path.startswith(str(tmp_path)):
            content["dataset"][name] = Path(path).name
    content["dataset"]["cache_path"] = str(tmp_path / "cache")
    del content["dataset"]["val_data"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path / "data")
    started = run("train", "--config", "../config.json", "--run", "../run", "--set", "train.max_num_epochs=1")
    assert started.exit_code == 0, started.stderr
    monkeypatch.chdir(tmp_path)
    last = "train.max_num_epochs=2"
    resume = ("train", "--resume", "run", "--set", last)
    assert "glove.pkl" in error_line(run(*resume))
    resumed = run(*resume, "--data-dir", "data")
    assert resumed.exit_code == 0, resumed.stderr
    assert configs.resolve("run/config.json").dataset.train_data == "data/train.json"
    again = run("train", "--resume", "run", "--config", "config.json", "--data-dir", "data", "--set", last)
    assert again.exit_code == 0, again.stderr
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert all(row["epoch_seconds"] > 0 for row in epochs)
    assert run("evaluate", "--checkpoint", "run", "--json").exit_code == 0
    Path("data").rename("moved")  # and once more
    moved = run("train", "--resume", "run", "--set", "train.max_num_epochs=3", "--data-dir", "moved")
    assert moved.exit_code == 0, moved.stderr
    assert configs.resolve("run/config.json").dataset.train_data == "moved/train.json"
    assert run("evaluate", "--checkpoint", "run", "--data-dir", "moved", "--json").exit_code == 0
    elsewhere = run("evaluate", "--checkpoint", "run", "--data-dir", "run")
    assert "run/moved/test.json: cannot be read" in error_line(elsewhere)
    assert "--data-dir none: is not a folder" in error_line(run(*resume, "--data-dir", "none"))
