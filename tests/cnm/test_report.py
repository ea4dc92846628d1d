"""The report of a run: what the page holds, that it stands alone, that names in it are no HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_runs import assignments, write_files
from typer.testing import CliRunner

from cnm import metrics
from cnm.cli import app
from cnm.data.split import windows_of
from cnm.report import write_report
from cnm.training.finished import FinishedRun

VOID = {"meta", "img", "br", "rect", "polygon"}


class Page(HTMLParser):
    """The page's elements, and its tables as text; fails where an element is not closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "table" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on files, one of whose test sentences and videos has a name made to break pages."""
    folder = tmp_path_factory.mktemp("report")
    config = write_files(folder)
    rows = json.loads((folder / "test.json").read_text())
    rows[0][3] = "the man opens a <script>alert(1)</script> door & more."
    rows.append([rows[0][0], 20.0, [1.0, 2.0], "xylophone zither."])
    (folder / "test.json").write_text(json.dumps(rows))
    arguments = ["train", "--config", str(config), "--run", str(folder / "run"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--set", *assignments({"train.max_num_epochs": 1})])
    assert result.exit_code == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def content(run: Path) -> str:
    result = CliRunner().invoke(app, ["report", str(run), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{run / 'report.html'}: open it in a browser\n"
    return (run / "report.html").read_text()


def test_the_page_stands_alone(content: str) -> None:
    for tag, attributes in Page(content).elements:
        assert tag not in ("script", "link", "iframe")
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in content
    assert "@import" not in content


def test_scores_stand_beside_baselines(content: str, run: Path) -> None:
    scores = Page(content).tables[0]
    assert scores[0] == ["test", *(f"R@1 IoU={threshold}" for threshold in (0.1, 0.3, 0.5, 0.7, 0.9)), "mIoU"]
    assert [row[0].split(" [")[0] for row in scores[1:]] == [
        "this run",
        "best constant",
        "whole video",
        "random moment",
    ]
    assert "1 sentences without a known word are left out" in content


def test_scores_are_those_of_the_evaluation(run: Path) -> None:
    """On a split whose sentences all have known words."""
    result = CliRunner().invoke(app, ["report", str(run), "--split", "val", "--output", str(run / "val.html")])
    assert result.exit_code == 0, result.stderr
    scores = Page((run / "val.html").read_text()).tables[0]
    arguments = ["evaluate", "--checkpoint", str(run / "best.pt"), "--split", "val", "--device", "cpu", "--json"]
    evaluated = json.loads(CliRunner().invoke(app, arguments).stdout)["scores"]
    assert scores[1][1:] == [f"{value:.4f}" for value in evaluated.values()]


def test_sentences_come_best_first_with_their_gaussians(content: str) -> None:
    page = Page(content)
    rows = page.tables[1][1:]
    ious = [float(row[0]) for row in rows]
    assert len(rows) == 10
    assert ious == sorted(ious, reverse=True)
    assert sum(tag == "svg" for tag, _ in page.elements) == 10
    for kind in ("found", "true"):
        bars = [attributes for tag, attributes in page.elements if tag == "rect" and attributes.get("class") == kind]
        assert len(bars) == 10
    for row in rows:
        start, end = re.search(r"true: (\d+\.\d) to (\d+\.\d) s", row[3]).groups()  # type: ignore[union-attr]
        assert float(end) - float(start) == pytest.approx(5.0)


def test_a_true_bar_lies_where_the_moment_is(content: str) -> None:
    for label, found, true in re.findall(
        r'aria-label="([^"]*)".*?<rect class="found" x="([\d.]+)".*?<rect class="true" x="([\d.]+)"', content
    ):
        starts = [float(x) for x in re.findall(r"(?:found|true) ([\d.]+)", label)]
        assert [float(found), float(true)] == pytest.approx([360 * start / 20 for start in starts], abs=1.0)


def test_all_true_moments_are_shown(run: Path, tmp_path: Path) -> None:
    """The IoU is that with the best of them. Baselines are of the same sentences; rows may disagree on a duration."""
    config = json.loads((run / "config.json").read_text())
    rows = json.loads(Path(config["dataset"]["test_data"]).read_text())
    lines = [
        {"qid": index, "query": row[3], "vid": row[0], "duration": row[1] + index, "relevant_windows": windows}
        for index, row in enumerate(rows)
        for windows in [[[0.0, 0.5], row[2]]]
    ]
    lines.append(lines[0] | {"qid": len(lines), "duration": 2 * lines[0]["duration"]})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    finished = FinishedRun(run)
    finished.localizer.model.config.dataset.test_data = str(tmp_path / "test.jsonl")
    split = finished.split("test")
    page = Page(write_report(finished, split, 100))
    answers = list(finished.answers(split))
    assert len(answers) == len(split) - 1  # one has no word that is known
    true = [attributes for tag, attributes in page.elements if tag == "rect" and attributes.get("class") == "true"]
    assert len(true) == 2 * len(answers)
    assert all(re.search(r"true: 0\.0 to 0\.5, \d+\.\d to \d+\.\d s", row[3]) for row in page.tables[1][1:])
    for answer in answers:
        moment = metrics.moments_from_gaussian(answer.found.center, answer.found.width)
        assert answer.found.end == pytest.approx(moment[1] * answer.sample.duration)
        windows = windows_of([answer.sample], "test")[0]
        assert answer.iou == pytest.approx(max(metrics.iou(moment, window) for window in windows))
    known = [sample for sample in split.samples if sample in [answer.sample for answer in answers]]
    expected = metrics.baselines(windows_of(known, "test"))  # random moments are drawn for the split's order
    for name in ("whole video", "random moment"):
        [row] = [row for row in page.tables[0] if row[0] == name]
        assert row[1:] == [f"{expected[name][score]:.4f}" for score in metrics.SCORES]


def test_the_vocabulary_s_file_is_not_needed(run: Path, tmp_path: Path) -> None:
    finished = FinishedRun(run)
    finished.localizer.model.config.dataset.vocab_path = str(tmp_path / "gone.pkl")
    assert len(finished.split("test")) == 11


def test_names_are_no_html(content: str) -> None:
    assert "<script" not in content
    assert "&lt;script&gt;" in content


def test_fewer_sentences_reach_from_best_to_worst(content: str, run: Path) -> None:
    output = run / "few.html"
    result = CliRunner().invoke(app, ["report", str(run), "--sentences", "3", "--output", str(output)])
    assert result.exit_code == 0, result.stderr
    everything = [row[0] for row in Page(content).tables[1][1:]]
    few = [row[0] for row in Page(output.read_text()).tables[1][1:]]
    assert few == [everything[0], everything[4], everything[9]]
    assert "3 of 10, evenly from the best to the worst" in output.read_text()


def test_refusals(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for arguments, message in (
        ([tmp_path], "is not a finished run, it has neither best.pt nor last.pt"),
        ([run, "--output", tmp_path / "file" / "a.html"], "cannot be written"),
    ):
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
