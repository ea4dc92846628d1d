"""The few lines that README and ``cnm.localizer`` show run as they stand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import write_files

import cnm
from cnm import checkpoint, localizer
from cnm.config import CNMConfig
from cnm.data import Vocabulary
from cnm.data.vocabulary import PADDING

ROOT = Path(__file__).parents[2]


def shown(source: str) -> str:
    """The example's code."""
    if source == "cnm.localizer":
        assert localizer.__doc__ is not None
        return textwrap.dedent(localizer.__doc__.split("::\n\n")[1])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    ours = [block for block in blocks if "Localizer" in block]
    if not ours:
        pytest.skip("README.md shows no Localizer")
    return ours[0]


@pytest.mark.parametrize("source", ["cnm.localizer", "README.md"])
def test_the_lines_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = shown(source)
    paths = [path for path in re.findall(r'"([^"\n]*\.(?:pt|npy))"', code) if "F." not in path]
    words = sorted(set(" ".join(re.findall(r'"([a-z ]+)"', code)).split()))
    config = CNMConfig.from_json(write_files(tmp_path)).to_dict()
    config["dataset"]["vocab_size"] = config["model"]["config"]["vocab_size"] = len(words)
    config["model"]["config"]["vocab_size"] += 1
    made = CNMConfig.from_json(config)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    vocabulary = Vocabulary([PADDING, *words], rng.standard_normal((len(words) + 1, 10)))
    content = {"num_updates": 1, "config": config, "model_parameters": cnm.CNM(made).state_dict()}
    features = rng.standard_normal((30, 12)).astype(np.float32)
    monkeypatch.chdir(tmp_path)
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            checkpoint.save(path, content | {"vocabulary": vocabulary.state()})
        elif path.suffix == ".npy":
            np.save(path, features)
    # Other tests read video files; this one takes features of the model's width.
    monkeypatch.setattr(cnm.Localizer, "encode_video", lambda self, path: self.encode(features, duration=30.0))
    exec(compile(code, source, "exec"), {"features": features})
    assert re.search(r"\d\.\d", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["localize", "extract", "report", "app"])
def test_help_shows_an_example(command: str) -> None:
    from typer.testing import CliRunner

    from cnm.cli import app

    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n    cnm {command} " in result.stdout
