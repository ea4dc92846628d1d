"""The command line: what it prints, its exit codes, and one clear line for each kind of wrong input."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import Result
from small_runs import SMALL, assignments, write_files
from typer.testing import CliRunner

from cnm import checkpoint
from cnm.cli import COMMANDS, app
from cnm.commands.common import program
from cnm.data.data_dir import DATA_PATHS
from cnm_kernels import native

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start_process(*arguments: object, limit: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own; ``limit`` is shell code to run before."""
    command = [sys.executable, "-c", "from cnm.cli import main; main()", *map(str, arguments)]
    if limit:
        command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def changes(**more: Any) -> list[str]:
    """``--set`` options of the small synthetic run."""
    named = {key.replace("__", "."): value for key, value in more.items()}
    return [part for item in assignments(SMALL | named) for part in ("--set", item)]


def error_line(result: Result) -> str:
    """The last line of a failed command, which must be its only error."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    assert not isinstance(result.exception, Exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished synthetic run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run("train", "--config", "synthetic", "--run", folder, *changes(train__max_num_epochs=1))
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files in the published formats, and a finished run on them."""
    folder = tmp_path_factory.mktemp("files")
    config = write_files(folder)
    result = run("train", "--config", config, "--run", folder / "run", "--set", "train.max_num_epochs=1")
    assert result.exit_code == 0, result.stderr
    return folder


def test_help_explains_every_command() -> None:
    overview = run("--help")
    assert overview.exit_code == 0
    for command in (*COMMANDS, "features"):
        assert command in overview.stdout
        text = run(command, "--help").stdout
        assert f"Example:\n    cnm {command} " in text


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("cnm ")


def test_demo_at_reduced_size(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--epochs", 1, "--videos", 24)
    assert result.exit_code == 0, result.stderr
    for words in ("mIoU", "best constant [", "whole video", "random moment", "found:", "true:", "cnm localize"):
        assert words in result.stdout
    for name in ("best.pt", "last.pt", "metrics.jsonl", "config.json", "example.npy", "pictures/example.png"):
        assert (out / name).stat().st_size > 0
    again = error_line(run("demo", "--out", out))
    assert f"{out}: exists and is not written over; choose another folder for the run (--out), or" in again
    assert again.endswith(f"`cnm train --resume {out}`")


@pytest.mark.parametrize(
    ("started", "path", "printed"),
    [
        ("bin/cnm", "bin", ["cnm"]),
        ("bin/cnm", "elsewhere", ["bin/cnm"]),
        ("cnm/__main__.py", "bin", [sys.executable, "-m", "cnm"]),
    ],
)
def test_printed_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str, path: str, printed: list[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cnm").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [started])
    monkeypatch.setenv("PATH", str(tmp_path / path))
    assert program() == printed


def test_train_says_what_runs_where(tmp_path: Path) -> None:
    result = run("train", "--config", "synthetic", "--run", tmp_path / "run", *changes(train__max_num_epochs=1))
    assert "device: cpu, " in result.stderr
    assert "threads; float32; kernels: " in result.stderr
    assert ("more slowly" in result.stderr) == ("cpu" in native.LOAD_ERRORS)
    assert "sentences: train " in result.stderr
    assert re.search(r"\nepoch 1/1  update 1/4  \d\d:\d\d left\n", result.stderr), result.stderr  # from the first on
    assert re.search(r"epoch 1: \d+\.\d s of training; val mIoU", result.stderr)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = (row for row in rows if row["kind"] == "eval")
    assert 0 < evaluated["epoch_seconds"] <= rows[0]["time"]
    assert "best constant" in result.stdout


def test_train_says_why_nothing_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.LOAD_ERRORS, "cpu", "no C++ compiler: c++ is not on the PATH")
    options = [*changes(train__max_num_epochs=1), "--set", "dataset.num_videos=4"]
    result = run("train", "--config", "synthetic", "--run", tmp_path / "run", *options)
    assert result.exit_code == 0, result.stderr
    note = "note: PyTorch's operations run in place of the kernels, more slowly: no C++ compiler: c++ is not on the"
    assert note in result.stderr
    monkeypatch.setenv("CNM_KERNELS_BACKEND", "torch")
    assert "more slowly" not in run("train", "--resume", tmp_path / "run", "--set", "train.max_num_epochs=2").stderr


def test_evaluate_prints_scores_beside_baselines(finished: Path) -> None:
    result = run("evaluate", "--checkpoint", finished / "best.pt", "--split", "val")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("val split, ")
    assert len(result.stdout.splitlines()) == 5


@pytest.mark.parametrize("change", ["model.config.max_width=0.1", "loss.beta_1=1"])
def test_evaluate_changes_no_model(finished: Path, change: str) -> None:
    line = error_line(run("evaluate", "--checkpoint", finished, "--set", change))
    assert line == f"error: --set {change}: a model is scored as it was trained; change dataset or train.batch_size"


def test_evaluate_json_is_what_training_reported(finished: Path) -> None:
    result = run("evaluate", "--checkpoint", finished / "best.pt", "--json")
    found = json.loads(result.stdout)
    reported = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert reported["kind"] == "result"
    assert found["scores"]["mIoU"] == reported["mIoU"]
    assert {"whole video", "random moment"} <= set(found["baselines"])


def test_localize_a_video_in_an_hdf5_file(from_files: Path, tmp_path: Path) -> None:
    arguments = ["localize", "--checkpoint", from_files / "run" / "best.pt", "--query", "The man opens a DOOR!"]
    arguments += ["--features", f"{from_files / 'features.hdf5'}:test0"]
    fraction = json.loads(run(*arguments, "--json").stdout)
    assert 0 <= fraction["start"] < fraction["end"] <= 1
    picture = tmp_path / "found.png"
    seconds = run(*arguments, "--duration", 20, "--plot", picture)
    assert seconds.exit_code == 0, seconds.stderr
    assert seconds.stdout == f"{fraction['start'] * 20:.1f} to {fraction['end'] * 20:.1f} s\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_localize_names_the_words_it_ignores(from_files: Path) -> None:
    arguments = ["localize", "--checkpoint", from_files / "run" / "best.pt", "--query", "a zebra opens the door"]
    arguments += ["--features", f"{from_files / 'features.hdf5'}:test0"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert "zebra" in result.stderr
    assert json.loads(run(*arguments, "--json").stdout)["unknown"] == ["zebra"]


def test_localize_names_the_words_it_does_not_read(from_files: Path) -> None:
    arguments = ["localize", "--checkpoint", from_files / "run" / "best.pt", "--query", f"{'the ' * 20}door opens"]
    arguments += ["--features", f"{from_files / 'features.hdf5'}:test0"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert "note: words beyond the first 20 known ones are not read: door, opens" in result.stderr
    assert json.loads(run(*arguments, "--json").stdout)["cut"] == ["door", "opens"]


def test_localize_with_a_published_checkpoint(from_files: Path, tmp_path: Path) -> None:
    """It holds three keys and no vocabulary, which then comes from the configuration's file or from --vocab."""
    content = checkpoint.load(from_files / "run" / "best.pt")
    published = {key: content[key] for key in ("num_updates", "config", "model_parameters")}
    torch.save(published, tmp_path / "published.pt")
    features = ["--features", f"{from_files / 'features.hdf5'}:test0", "--query", "the man opens a door", "--json"]
    ours = run("localize", "--checkpoint", from_files / "run" / "best.pt", *features)
    theirs = run("localize", "--checkpoint", tmp_path / "published.pt", *features)
    assert theirs.stdout == ours.stdout
    published["config"]["dataset"]["vocab_path"] = "elsewhere/glove.pkl"
    torch.save(published, tmp_path / "moved.pt")
    moved = ["localize", "--checkpoint", tmp_path / "moved.pt", *features]
    assert "elsewhere/glove.pkl" in error_line(run(*moved))
    assert run(*moved, "--vocab", from_files / "glove.pkl").stdout == ours.stdout


def test_plant_then_train(tmp_path: Path, from_files: Path) -> None:
    output = tmp_path / "planted.hdf5"
    files = [part for name in ("train", "val", "test") for part in ("--annotations", from_files / f"{name}.json")]
    arguments = ["plant", *files, "--vocab", from_files / "glove.pkl", "--word-dim", 10, "--frame-dim", 6]
    result = run(*arguments, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "30 videos" in result.stdout
    with h5py.File(output) as file:
        assert file["test0"].shape[1] == 6
    assert "exists and is not written over" in error_line(run(*arguments, "--output", output))
    sets = [
        "--set",
        f"dataset.feature_path={output}",
        "--set",
        "dataset.frame_dim=6",
        "--set",
        "train.max_num_epochs=1",
    ]
    trained = run("train", "--config", from_files / "config.json", "--run", tmp_path / "run", *sets)
    assert trained.exit_code == 0, trained.stderr


# What the machine lacks


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            MemoryError("Unable to allocate 30. TiB"),
            "error: not enough memory (Unable to allocate 30. TiB); lower train",
        ),
        (MemoryError(), "error: not enough memory (an allocation failed); lower train.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory."), "error: not enough memory (CUDA out of memory.); lower train"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: not enough memory (DefaultCPUAllocator:"),
    ],
)
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cnm.training.trainer.build", fail)
    message = error_line(run("train", "--config", "synthetic", "--run", tmp_path / "run", *changes()))
    assert message.startswith(line)
    assert not (tmp_path / "run").exists()


def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    message = error_line(run("train", "--config", "synthetic", "--run", tmp_path / "run", "--device", "cuda"))
    assert "--device cuda" in message


# Files that are wrong


def edit_features(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with h5py.File(folder / "features.hdf5", "r+") as file:
            change(file)

    return edit


def replace_features(video: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        frames = make(file[video][:])
        del file[video]
        file[video] = frames

    return edit_features(change)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def make(frames: np.ndarray) -> np.ndarray:
        frames[3, 2] = value
        return frames

    return make


def edit_row(row: list[Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "train.json"
        rows = json.loads(path.read_text())
        rows[4] = row
        path.write_text(json.dumps(rows))

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1500])


def hostile_vocabulary(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {folder / 'ran'}",)

    (folder / "glove.pkl").write_bytes(pickle.dumps({"w2id": Hostile()}))


WRONG_FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no hdf5": (lambda folder: (folder / "features.hdf5").unlink(), ("features.hdf5",)),
    "truncated hdf5": (cut("features.hdf5"), ("features.hdf5",)),
    "video without features": (edit_features(lambda file: file.__delitem__("train3")), ("features.hdf5", "train3")),
    "feature width": (replace_features("train3", lambda frames: frames[:, :5]), ("features.hdf5", "train3", "5")),
    "nan": (replace_features("train3", with_value(np.nan)), ("features.hdf5", "train3")),
    "infinity": (replace_features("train3", with_value(np.inf)), ("features.hdf5", "train3")),
    "no annotations": (lambda folder: (folder / "train.json").unlink(), ("train.json",)),
    "truncated json": (lambda folder: (folder / "train.json").write_text('[["train0", 20.'), ("train.json", "line 1")),
    "short row": (edit_row(["train4", 20.0]), ("train.json", "row 4")),
    "start after end": (edit_row(["train4", 20.0, [9.0, 5.0], "a door"]), ("train.json", "row 4")),
    "start at end": (edit_row(["train4", 20.0, [5.0, 5.0], "a door"]), ("train.json", "row 4")),
    "duration 0": (edit_row(["train4", 0, [0.0, 5.0], "a door"]), ("train.json", "row 4")),
    "empty sentence": (edit_row(["train4", 20.0, [0.0, 5.0], "  "]), ("train.json", "row 4")),
    "no vocabulary": (lambda folder: (folder / "glove.pkl").unlink(), ("glove.pkl",)),
    "truncated vocabulary": (lambda folder: (folder / "glove.pkl").write_bytes(b"\x80\x04\x95"), ("glove.pkl",)),
    "hostile vocabulary": (hostile_vocabulary, ("glove.pkl", "system")),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_named_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    spoil, names = WRONG_FILES[case]
    config = write_files(tmp_path)
    spoil(tmp_path)
    message = error_line(run("train", "--config", config, "--run", tmp_path / "run"))
    for name in names:
        assert name in message, message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "ran").exists()


def test_what_training_mends_is_counted(tmp_path: Path) -> None:
    config = write_files(tmp_path)
    rows = json.loads((tmp_path / "train.json").read_text())
    rows[1] = ["train1", 20.0, [15.0, 23.0], "a person opens the door"]
    rows[2] = ["train2", 20.0, [1.0, 3.0], "xylophone zither"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    result = run("train", "--config", config, "--run", tmp_path / "run", "--set", "train.max_num_epochs=1")
    assert result.exit_code == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert any("1 moments end after their video" in line and "train.json" in line for line in notes)
    assert any("1 sentences hold no known word" in line and "skipped" in line for line in notes)
    assert "sentences: train 9" in result.stderr


# localize and evaluate


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"--query": "xylophone zither"}, ("query", "xylophone zither", "no word")),
        ({"--query": "   "}, ("query", "empty")),
        ({"--duration": 0}, ("--duration", "0")),
        ({"--duration": -3}, ("--duration", "-3")),
        ({"--duration": "nan"}, ("--duration", "nan")),
        ({"--features": "features.hdf5:nobody"}, ("features.hdf5", "nobody")),
        ({"--features": "none.npy"}, ("none.npy",)),
        ({"--features": "narrow.npy"}, ("narrow.npy", "5", "12")),
        ({"--features": "nan.npy"}, ("nan.npy",)),
        ({"--features": "glove.pkl"}, ("glove.pkl",)),
        ({"--checkpoint": "none.pt"}, ("none.pt",)),
        ({"--checkpoint": "glove.pkl"}, ("glove.pkl",)),
        ({"--checkpoint": "train.json"}, ("train.json", "not a checkpoint")),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_localize_refuses(
    from_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    monkeypatch.chdir(from_files)
    np.save("narrow.npy", np.zeros((9, 5), np.float32))
    np.save("nan.npy", np.full((9, 12), np.nan, np.float32))
    given = {
        "--checkpoint": "run/best.pt",
        "--features": "features.hdf5:test0",
        "--query": "a door",
        "--plot": tmp_path / "found.png",
    } | options
    message = error_line(run("localize", *(part for item in given.items() for part in item)))
    for name in names:
        assert name in message, message
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_another_vocabulary(from_files: Path, finished: Path) -> None:
    arguments = ["evaluate", "--checkpoint", from_files / "run" / "best.pt", "--config", from_files / "config.json"]
    assert run(*arguments).exit_code == 0
    message = error_line(run(*arguments, "--set", "dataset.vocab_size=5"))
    assert "vocabulary of 6 words" in message
    message = error_line(run("evaluate", "--checkpoint", finished / "best.pt", "--config", from_files / "config.json"))
    assert "vocabulary" in message
    message = error_line(run("evaluate", "--checkpoint", finished / "best.pt", "--set", "dataset.seed=9"))
    assert (
        "have other vectors than the model learnt; check dataset.vocab_path (of generated data: dataset.seed)"
        in message
    )


def test_localize_refuses_another_vocabulary(from_files: Path, tmp_path: Path) -> None:
    content = pickle.loads((from_files / "glove.pkl").read_bytes())
    content["id2vec"] = content["id2vec"] + 1
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(content))
    arguments = ["localize", "--checkpoint", from_files / "run" / "best.pt", "--query", "the man opens a door"]
    arguments += ["--features", f"{from_files / 'features.hdf5'}:test0"]
    assert run(*arguments, "--vocab", from_files / "glove.pkl").exit_code == 0
    message = error_line(run(*arguments, "--vocab", tmp_path / "other.pkl"))
    assert "have other vectors than the model learnt" in message


def test_evaluate_from_another_folder(from_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start from --data-dir; the checkpoint's own vocabulary serves where its file is not there."""
    monkeypatch.chdir(from_files)
    paths = {
        name: Path(path).name
        for name, path in json.loads((from_files / "config.json").read_text())["dataset"].items()
        if name in DATA_PATHS
    }
    sets = [part for name, path in paths.items() for part in ("--set", f"dataset.{name}={path}")]
    arguments = ["train", "--config", "config.json", "--set", "train.max_num_epochs=1"]
    assert run(*arguments, "--run", tmp_path / "run", *sets).exit_code == 0
    here = run("evaluate", "--checkpoint", tmp_path / "run" / "best.pt", "--json")
    assert here.exit_code == 0, here.stderr
    monkeypatch.chdir(tmp_path)
    assert "error: " in error_line(run("evaluate", "--checkpoint", "run/best.pt"))
    there = run("evaluate", "--checkpoint", "run/best.pt", "--data-dir", from_files, "--json")
    assert json.loads(there.stdout)["scores"] == json.loads(here.stdout)["scores"]
    absolute = [
        part
        for name, path in paths.items()
        if name != "vocab_path"
        for part in ("--set", f"dataset.{name}={from_files / path}")
    ]
    stored = run("evaluate", "--checkpoint", "run/best.pt", "--json", *absolute)
    assert stored.exit_code == 0, stored.stderr
    assert json.loads(stored.stdout)["scores"] == json.loads(here.stdout)["scores"]
    trained = run(
        *("train", "--config", from_files / "config.json", "--run", "second", "--set", "train.max_num_epochs=1"),
        *sets,
        "--data-dir",
        from_files,
    )
    assert trained.exit_code == 0, trained.stderr
    outcome = run("evaluate", "--checkpoint", "run", "--data-dir", "none")
    assert "--data-dir none: is not a folder" in error_line(outcome)


def test_a_run_folder_stands_for_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    best = run("evaluate", "--checkpoint", finished, "--json")
    assert best.stderr == f"note: {finished} is a run's folder: {finished / 'best.pt'} is taken\n"
    assert json.loads(best.stdout)["checkpoint"] == str(finished / "best.pt")
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    last = run("evaluate", "--checkpoint", tmp_path, "--json")
    assert json.loads(last.stdout)["checkpoint"] == str(tmp_path / "last.pt")
    (tmp_path / "last.pt").unlink()
    assert "is a folder without best.pt or last.pt" in error_line(run("evaluate", "--checkpoint", tmp_path))


# Interruptions


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_can_be_resumed(tmp_path: Path, signum: int, code: int) -> None:
    folder = tmp_path / "run"
    many = changes(train__max_num_epochs=100_000)
    process = start_process("train", "--config", "synthetic", "--run", folder, *many)
    try:
        while not (folder / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert f"continue with `cnm train --resume {folder}`" in errors
    updates = checkpoint.load(folder / "last.pt")["num_updates"]
    epoch = checkpoint.load(folder / "last.pt")["training"]["epoch"]
    result = run("train", "--resume", folder, "--set", f"train.max_num_epochs={epoch + 2}")
    assert result.exit_code == 0, result.stderr
    assert checkpoint.load(folder / "last.pt")["num_updates"] > updates


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """No file may grow beyond 16 blocks of 1 KiB here, so that the checkpoint does not fit."""
    folder = tmp_path / "run"
    limit = "trap '' XFSZ; ulimit -f 16"
    process = start_process("train", "--config", "synthetic", "--run", folder, *changes(), limit=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert "best.pt: cannot be written (File too large)" in errors.splitlines()[-1]
    assert not list(folder.glob("*.pt"))
    assert not list(folder.glob(".*.tmp"))
