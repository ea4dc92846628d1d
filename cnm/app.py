"""A page to try runs in: choose a run and a video, type a sentence, see the moment. Needs the extra ``[app]``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnm.data import Sample, Split
from cnm.errors import InputError
from cnm.html import text, timeline
from cnm.localizer import LocalizedMoment, Video
from cnm.plot import BLUE, GREY, ORANGE
from cnm.training.finished import FinishedRun
from cnm.video.suffixes import VIDEO_SUFFIXES

UPLOAD, SAMPLE = "a video file", "a sample of a split"
KEPT_RUNS, KEPT_VIDEOS = 4, 16  # in memory, the latest
MAX_SAMPLES = 500  # in the list to choose from, evenly over the split
WIDTH = 900  # of the picture of time, pixels
# A click on the picture of time sets the player there; so does the button, at the found moment.
SEEK = "const v = document.querySelector('#player video'); if (v) {{ v.currentTime = {time}; v.play(); }}"


class Answerer:
    """Answers the requests of the page; independent of the page itself.

    Args:
        runs: folders of runs.
        videos: a folder of the splits' video files, named as their videos; they are played, not read.
    """

    def __init__(self, runs: Sequence[Path], videos: Path | None, device: torch.device | str) -> None:
        self.runs = {str(run): run for run in runs}
        self.videos = videos
        self.device = device
        self.run = lru_cache(KEPT_RUNS)(self._open)
        self.split = lru_cache(KEPT_RUNS)(lambda name, split: self.run(name).split(split))
        self._encoded = lru_cache(KEPT_VIDEOS)(self._encode)

    def _open(self, name: str) -> FinishedRun:
        run = FinishedRun(self.runs[name], self.device)
        self.split.cache_clear()  # they may hold what an older checkpoint of this run made
        self._encoded.cache_clear()
        return run

    def samples(self, run: str, split: str) -> list[tuple[str, str]]:
        """Sentences of a split to choose from; the value of each says what it belongs to, see ``belongs_to``."""
        data: Split = self.split(run, split)
        places = np.unique(np.linspace(0, len(data) - 1, min(MAX_SAMPLES, len(data))).astype(int))
        rows = [(data.samples[place], json.dumps([run, split, int(place)])) for place in places]
        return [(f"{sample.video}: {sample.sentence}", value) for sample, value in rows]

    def video_file(self, run: str, split: str, place: int) -> str | None:
        """The file to play for a sample, where there is one."""
        if self.videos is None:
            return None
        name = self.split(run, split).samples[place].video
        candidates = [self.videos / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES]
        return next((str(path) for path in candidates if path.is_file()), None)

    def answer(self, run: str | None, query: str, source: Path | tuple[str, int] | None) -> str:
        """Returns the moment of the sentence in a video file or a split's video, or an error message, as HTML."""
        try:
            if run is None:
                raise InputError("choose a run first")
            if source is None:
                raise InputError("choose a video first")
            sample = None if isinstance(source, Path) else self.split(run, source[0]).samples[source[1]]
            video = self._encoded(run, source)
            [found] = self.run(run).localizer.find(video, [query])
        except InputError as error:
            return f'<p class="error">{text(error)}</p>'
        return self._page(run, found, video, sample)

    def _encode(self, run: str, source: Path | tuple[str, int]) -> Video:
        finished: FinishedRun = self.run(run)
        if isinstance(source, Path):
            return finished.localizer.encode_video(source)
        return finished.encode(self.split(run, source[0]), source[1])

    def _page(self, run: str, found: LocalizedMoment, video: Video, sample: Sample | None) -> str:
        duration = video.duration or 1.0
        annotated = sample is not None and sample.sentence == found.query
        true = sample.windows if sample is not None and annotated else ()
        picture = timeline(self.run(run).localizer, found, duration, true, width=WIDTH, height=130)
        clicked = SEEK.format(time=f"(event.clientX - r.left) / r.width * {duration:.3f}")
        clicked = f"const r = event.currentTarget.querySelector('svg').getBoundingClientRect(); {clicked}"
        ticks = "".join(f"<span>{part * duration:.1f} s</span>" for part in (0, 0.25, 0.5, 0.75, 1))
        jump = SEEK.format(time=f"{found.start:.3f}")
        keys = [(BLUE, "found")] + [(GREY, "other proposals")] * (len(found.proposals) > 1)
        keys += [(ORANGE, "true")] * bool(true)
        key = "".join(f'<span style="color:{colour}">&#9632;</span> {name} &nbsp; ' for colour, name in keys)
        unknown = f"<p>not known, so ignored: {text(', '.join(found.unknown))}</p>" if found.unknown else ""
        longest = self.run(run).localizer.model.config.dataset.max_num_words
        beyond = f"beyond the first {longest} known words, so not read: {text(', '.join(found.cut))}"
        cut = f"<p>{beyond}</p>" if found.cut else ""
        return (
            f'<p><b class="moment">{found.start:.1f} to {found.end:.1f} s</b> of {duration:.1f} s '
            f'<button class="jump" onclick="{jump}">&#9654; jump there</button></p>'
            f'<div class="timeline" style="cursor:pointer" onclick="{clicked}">{picture}</div>'
            f'<div style="display:flex;justify-content:space-between;width:{WIDTH}px">{ticks}</div>'
            f"<p>{key}</p>{unknown}{cut}"
        )


def belongs_to(value: str) -> tuple[str, str, int]:
    """Run, split and place of a sample that was chosen; the boxes beside it may already show others."""
    run, split, place = json.loads(value)
    return run, split, place


def build(answerer: Answerer) -> Any:
    """The page, a ``gradio.Blocks``.

    Raises:
        InputError: gradio is not installed.
    """
    gradio = require_gradio()
    runs = list(answerer.runs)

    def on_source(kind: str) -> list[Any]:
        return [gradio.update(visible=kind == SAMPLE), gradio.update(visible=kind == SAMPLE), gradio.update(value=None)]

    def on_split(run: str, split: str) -> Any:
        try:
            choices = answerer.samples(run, split)
        except InputError as error:
            gradio.Warning(str(error))
            choices = []
        return gradio.update(choices=choices, value=None)

    def on_sample(value: str | None) -> list[Any]:
        if value is None:
            return [gradio.update(), gradio.update()]
        run, split, place = belongs_to(value)
        return [answerer.split(run, split).samples[place].sentence, answerer.video_file(run, split, place)]

    def on_find(run: str, kind: str, path: str | None, value: str | None, query: str) -> str:
        if kind == SAMPLE and value is not None:
            run, split, place = belongs_to(value)
            return answerer.answer(run, query, (split, place))
        return answerer.answer(run, query, None if kind == SAMPLE or path is None else Path(path))

    with gradio.Blocks(title="cnm", analytics_enabled=False) as page:
        gradio.Markdown("# When does it happen?")
        with gradio.Row():
            run = gradio.Dropdown(runs, value=runs[0], label="run", elem_id="run")
            kind = gradio.Radio([UPLOAD, SAMPLE], value=UPLOAD, label="video", elem_id="kind")
        with gradio.Row():
            split = gradio.Dropdown(
                ["train", "val", "test"], value="test", label="split", visible=False, elem_id="split"
            )
            sample = gradio.Dropdown([], label="sample", visible=False, elem_id="sample", scale=3)
        player = gradio.Video(sources=["upload"], label="player", elem_id="player", height=320)
        with gradio.Row():
            query = gradio.Textbox(label="sentence", placeholder="a person opens the door", elem_id="query", scale=5)
            find = gradio.Button("Find", variant="primary", elem_id="find")
        result = gradio.HTML(elem_id="answer")
        kind.change(on_source, [kind], [split, sample, player]).then(on_split, [run, split], [sample])
        for changed in (run, split):
            changed.change(on_split, [run, split], [sample])
        sample.change(on_sample, [sample], [query, player])
        for asked in (find.click, query.submit):
            asked(on_find, [run, kind, player, sample, query], [result])
    return page


def serve(answerer: Answerer, port: int | None, *, wait: bool = True, open_browser: bool = False) -> str:
    """Serves the page on this machine alone; returns its address where it does not ``wait`` for Ctrl-C."""
    gradio = require_gradio()
    page = build(answerer)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing from elsewhere
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=not wait,
            inbrowser=open_browser,
            quiet=not wait,
            share=False,
            theme=theme,
            footer_links=[],
            allowed_paths=[] if answerer.videos is None else [str(answerer.videos)],
        )
    except OSError as error:
        raise InputError(f"--port {port}: cannot be served ({' '.join(str(error).split())}); choose another") from None
    return str(address)


def require_gradio() -> Any:
    """The module ``gradio``, which is told to report to nobody.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the app needs gradio ({error}): pip install 'cnm-kernels[app]'") from None
    return gradio


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders that are runs, and the runs right inside those that are not.

    Raises:
        InputError: one holds no run.
    """
    found = []
    for folder in folders:
        candidates = [folder, *(sorted(folder.iterdir()) if folder.is_dir() else [])]
        runs = [path for path in candidates if any((path / name).is_file() for name in ("best.pt", "last.pt"))]
        if not runs:
            raise InputError(f"{folder}: holds no run (no best.pt or last.pt); give a folder that cnm train wrote")
        found += runs[:1] if runs[0] == folder else runs
    return found
