"""Predictions in the submission form, and their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import with_cpl, write_files
from typer.testing import CliRunner

from cnm import checkpoint, metrics, qvhighlights
from cnm.cli import app
from cnm.config import CNMConfig, Config
from cnm.data import Sample, open_split, read_annotations
from cnm.errors import InputError
from cnm.evaluation import evaluate
from cnm.models.cnm import CNM
from cnm.models.cpl import CPL
from cnm.predictions import read_predictions, score, write_predictions

SAMPLES = [
    Sample("v", 100.0, (0.0, 10.0), "one", ((50.0, 70.0),), qid=5),
    Sample("w", 50.0, (10.0, 30.0), "two", qid="text"),
]


def published_average_precision(predicted: Any, true: Any, threshold: float) -> float:
    """moment-DETR's average precision, written down literally."""
    taken: set[int] = set()
    hits, misses = [], []
    for start, end in predicted[:10]:
        ious = []
        for first, last in true:
            shared = max(min(end, last) - max(start, first), 0)
            ious.append(shared / ((end - start) + (last - first) - shared))
        hit = 0
        for j in np.argsort(ious, kind="stable")[::-1]:  # published: any order among equals
            if ious[j] < threshold:
                break
            if int(j) not in taken:
                taken.add(int(j))
                hit = 1
                break
        hits.append(hit)
        misses.append(1 - hit)
    right, wrong = np.cumsum(hits), np.cumsum(misses)
    precision = np.hstack([[0], right / (right + wrong), [0]])
    recall = np.hstack([[0], right / len(true), [1]])
    for i in range(len(precision) - 1)[::-1]:
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.where(recall[1:] != recall[:-1])[0] + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def test_average_precision_is_the_published_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        true, predicted = (np.sort(rng.integers(0, 30, (rng.integers(1, most), 2)), axis=1) for most in (5, 14))
        true[:, 1] += 1
        predicted[:, 1] += 1
        expected = [published_average_precision(predicted, true, threshold) for threshold in qvhighlights.THRESHOLDS]
        np.testing.assert_allclose(qvhighlights.average_precision(predicted, true), expected)


def test_windows_are_written_best_first_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, SAMPLES, [[0.05, 0.6], [0.4, 0.5]], [[0.1, 0.2], [0.4, 1.5]], [[0.2, 0.7], [2, 1]])
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["qid"], first["query"], first["vid"]) == (5, "one", "v")
    np.testing.assert_allclose(first["pred_relevant_windows"], [[50, 70, 0.7], [0, 10, 0.2]])
    np.testing.assert_allclose(second["pred_relevant_windows"], [[10, 30, 2], [0, 50, 1]])
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))  # any order
    found = score(read_predictions(path, SAMPLES), SAMPLES)
    assert found == {name: pytest.approx(1) for name in (*metrics.SCORES, *qvhighlights.SCORES)}


def test_the_file_says_which_window_is_first(tmp_path: Path) -> None:
    """QVHighlights' evaluation takes the first window, and the first ten, as they stand, and ranks those by score."""
    windows = {"right": [0, 10, 0.1], "wrong": [80, 90, 0.9], "half": [50, 60, 0.5]}
    true = [(0.0, 10.0), (50.0, 70.0)]
    for names in (("right", "wrong", "half"), ("wrong", "half", "right"), ("wrong",) * 10 + ("right",)):
        predicted = [windows[name] for name in names]
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"qid": 5, "pred_relevant_windows": predicted}))
        found = score(read_predictions(path, SAMPLES[:1]), SAMPLES[:1])
        assert found["mIoU"] == pytest.approx(float(names[0] == "right"), abs=1e-6)
        ranked = [window[:2] for window in sorted(predicted[:10], key=lambda window: -window[2])]
        expected = [published_average_precision(ranked, true, threshold) for threshold in qvhighlights.THRESHOLDS]
        assert found["mAP"] == pytest.approx(np.mean(expected))


def test_predictions_for_sentences_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    """Other tools answer every line of a file, those without a moment too."""
    path = tmp_path / "p.jsonl"
    lines = [{"qid": qid, "pred_relevant_windows": [[1, 2, 1]]} for qid in (5, "gone", 7, "text")]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_predictions(path, SAMPLES, {"gone", "7"}) == [[(1.0, 2.0, 1.0)]] * 2
    with pytest.raises(InputError, match="line 3: qid 7 is not in the annotations"):
        read_predictions(path, SAMPLES, {"gone"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": 6}, "line 2: qid 6 is not in the annotations"),
        ({"qid": 5}, "line 2: qid 5 was there before"),
        ({"qid": None}, "line 2: qid is None, neither"),
        ({"vid": "x"}, "line 2: vid is 'x', but 'w' in the annotations"),
        ({"query": "x"}, "line 2: query is 'x', but 'two'"),
        ({"pred_relevant_windows": []}, "line 2: pred_relevant_windows is [], not"),
        ({"pred_relevant_windows": [[1, 2]]}, "line 2: window [1, 2] is not [start, end, score]"),
        ({"pred_relevant_windows": [[3, 2, 1]]}, "line 2: window [3, 2, 1] ends before it starts"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "p.jsonl"
    good = {"qid": 5, "pred_relevant_windows": [[1, 2, 1]]}
    wrong = {"qid": "text", "pred_relevant_windows": [[1, 2, 1]]} | change
    path.write_text(f"{json.dumps(good)}\n{json.dumps(wrong)}\n")
    with pytest.raises(InputError) as caught:
        read_predictions(path, SAMPLES)
    assert str(caught.value).startswith(f"{path}: {message}")
    path.write_text(json.dumps(good))
    with pytest.raises(InputError, match="has no prediction for qid 'text'"):
        read_predictions(path, SAMPLES)
    path.write_text(f"{json.dumps(good)}\n{json.dumps(wrong)[:-3]}")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_predictions(path, SAMPLES)


def test_the_commands_agree_with_the_evaluation(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    model = CNM(config)
    checkpoint.save(
        tmp_path / "m.pt", {"num_updates": 0, "config": config.to_dict(), "model_parameters": model.state_dict()}
    )
    arguments = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "m.pt"),
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = evaluate(model, open_split(config.dataset, "test"), 8).scores
    annotations = str(config.dataset.test_data)
    scored = CliRunner().invoke(app, ["score", str(tmp_path / "p.jsonl"), "--annotations", annotations, "--json"])
    assert scored.exit_code == 0, scored.output
    found = json.loads(scored.output)["scores"]
    assert {name: found[name] for name in metrics.SCORES} == pytest.approx(expected)
    shown = CliRunner().invoke(app, ["score", str(tmp_path / "p.jsonl"), "--annotations", annotations])
    assert f"mAP {found['mAP']:.4f}; mAP IoU=0.5 " in shown.output
    assert "is not written over" in CliRunner().invoke(app, arguments).output


def test_true_windows_score_one_on_real_lines(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "lighthouse/qvhighlights/highlight_val_release.jsonl"
    samples = read_annotations(path)[0]
    rows = [
        {"qid": s.qid, "pred_relevant_windows": [[*w, 1 - i / 99] for i, w in enumerate(s.windows)]} for s in samples
    ]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = CliRunner().invoke(app, ["score", str(tmp_path / "p.jsonl"), "--annotations", str(path)])
    assert "highlight_val_release.jsonl split, 1,550 sentences (QVHighlights, val)" in found.output
    scores = score(read_predictions(tmp_path / "p.jsonl", samples), samples)
    assert scores["R@1 IoU=0.9"] == 1
    assert 0.99 < scores["mAP"] < 1  # some sentences have more than ten windows


@pytest.mark.parametrize("split", ["train", "test"])
def test_cpls_predictions_score_what_the_evaluation_says(tmp_path: Path, split: str) -> None:
    """The proposal with the best score comes first; a sentence that training leaves out is predicted too."""
    content = json.loads(write_files(tmp_path).read_text())
    config = Config.from_json(content | with_cpl(content))
    rows = json.loads((tmp_path / "train.json").read_text())
    if split == "train":
        rows.insert(1, ["train1", 20.0, [1.0, 3.0], "xylophone zither"])
        (tmp_path / "train.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    model = CPL(config)
    checkpoint.save(
        tmp_path / "m.pt", {"num_updates": 0, "config": config.to_dict(), "model_parameters": model.state_dict()}
    )
    path = tmp_path / "p.jsonl"
    arguments = ["evaluate", "--checkpoint", tmp_path / "m.pt", "--predictions", path, "--split", split, "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    evaluated = json.loads(result.stdout)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        windows = line["pred_relevant_windows"]
        assert len({(start, end) for start, end, _ in windows}) == 3
        assert windows == sorted(windows, key=lambda window: -window[2])
    assert [line["qid"] for line in lines] == list(range(len(rows) if split == "train" else 10))
    command = ["score", str(path), "--annotations", str(tmp_path / f"{split}.json"), "--json"]
    scored = CliRunner().invoke(app, command)
    assert scored.exit_code == 0, scored.output
    found = json.loads(scored.stdout)["scores"]
    for name in metrics.SCORES:
        assert found[name] == pytest.approx(evaluated["scores"][name], abs=1e-9), name
