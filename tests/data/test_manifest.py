"""Faults that `cnm features check` finds in features, and the manifest it compares them with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cnm.cli import app
from cnm.data.feature_sources import FeatureFolder
from cnm.data.manifest import survey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "f").mkdir()
    rng = np.random.default_rng(0)
    for video in "abcd":
        np.save(tmp_path / "f" / f"{video}.npy", rng.standard_normal((20, 3)).astype(np.float16))
    rows = [[video, 10.0, [1, 2], "text"] for video in "abcd"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return tmp_path


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["features", "check", str(folder / "f"), "--annotations", str(folder / "a.json"), *arguments]
    )


def test_faultless_features_and_their_manifest(folder: Path) -> None:
    manifest = folder / "m.json"
    first = run(folder, "--manifest", str(manifest), "--origin", "a test", "--frame-dim", "3")
    assert first.exit_code == 0, first.output
    assert "features of 4 of 4 annotated videos" in first.output
    assert "width 3; clips 20 to 20, median 20\nclips per second: median 2" in first.output
    content = json.loads(manifest.read_text())
    assert content["origin"] == "a test"
    assert content["videos"]["a"]["shape"] == [20, 3]
    assert "m.json: agrees on 4 of 4 videos" in run(folder, "--manifest", str(manifest)).output
    frames = np.load(folder / "f/c.npy")
    frames[3, 1] += 1
    np.save(folder / "f/c.npy", frames)
    np.save(folder / "f/d.npy", frames[:15])
    changed = run(folder, "--manifest", str(manifest))
    assert changed.exit_code == 2
    assert "video 'c' has other values than the manifest says" in changed.output
    assert "video 'd' has shape [15, 3], the manifest says [20, 3]" in changed.output
    assert json.loads(manifest.read_text()) == content
    manifest.write_text("{}")
    assert "is not a manifest" in run(folder, "--manifest", str(manifest)).output


def test_a_manifest_of_other_videos_vouches_for_nothing(folder: Path) -> None:
    manifest = folder / "deep/m.json"
    assert run(folder, "--manifest", str(manifest)).exit_code == 0
    content = json.loads(manifest.read_text())
    others = {f"other {name}": entry for name, entry in content["videos"].items()}
    manifest.write_text(json.dumps(content | {"videos": others}))
    outcome = run(folder, "--manifest", str(manifest))
    assert outcome.exit_code == 2
    assert "m.json: holds none of these videos" in outcome.output
    manifest.write_text(json.dumps(content | {"videos": others | {"a": content["videos"]["a"]}}))
    assert "m.json: agrees on 1 of 4 videos" in run(folder, "--manifest", str(manifest)).output


def test_every_fault_is_found_in_one_pass(folder: Path) -> None:
    (folder / "f/a.npy").unlink()
    np.save(folder / "f/b.npy", np.full((20, 3), np.nan))
    np.save(folder / "f/c.npy", np.ones((20, 4)))
    result = run(folder, "--manifest", str(folder / "m.json"))
    assert result.exit_code == 2
    assert "1 videos have no features: a\n" in result.output
    assert "b.npy: the features hold NaN" in result.output
    assert "widths differ: 4 (1 videos), 3 (1 videos)" in result.output
    assert not (folder / "m.json").exists()
    assert "are 3 wide, but 5 are expected" not in result.output
    found = json.loads(run(folder, "--json").output.splitlines()[0])
    assert (found["missing"], list(found["broken"]), len(found["faults"])) == (["a"], ["b"], 3)


def test_odd_rates_and_duplicates(folder: Path) -> None:
    np.save(folder / "f/a.npy", np.load(folder / "f/b.npy"))
    np.save(folder / "f/d.npy", np.ones((4, 3)))
    found = survey(FeatureFolder(folder / "f"), dict.fromkeys("abcd", 10.0))
    assert found.duplicates == [["a", "b"]]
    assert found.odd_rates == {"d": 0.4}
    output = run(folder).output
    assert "1 videos have far more or fewer clips per second: d (0.4)" in output
    assert "1 groups of videos have the very same features: a = b" in output
    assert "are 3 wide, but 5 are expected" in run(folder, "--frame-dim", "5").output
