"""A run as one HTML page that needs nothing beside it: curves, scores, sentences, configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from cnm import metrics, plot
from cnm.data import Split
from cnm.data.known_splits import known_split
from cnm.data.split import windows_of
from cnm.errors import InputError
from cnm.html import png, spans, table, text, timeline
from cnm.training.finished import Answer, FinishedRun

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
img { max-width: 100% } table { border-collapse: collapse; width: 100% } td, th { padding: .3em .6em; text-align: left }
thead th { border-bottom: 1px solid #888; position: sticky; top: 0; background: #fff }
tbody tr { border-bottom: 1px solid #eee }
.scores td:not(:first-child), .scores th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
.scores tr:first-child td { font-weight: 600 } .sentences td:first-child { font-variant-numeric: tabular-nums }
.sentences small { color: #666 } .key i { display: inline-block; width: 1.6em; height: .55em; margin: 0 .3em 0 1em }
pre { background: #f5f5f5; padding: 1em; overflow: auto; font-size: 13px }
"""


def write_report(run: FinishedRun, split: Split, sentences: int) -> str:
    """The page, with at most so many sentences, evenly from the best to the worst, or through a split without moments.

    Raises:
        InputError: no sentence of the split has a word the model knows.
    """
    answers = list(run.answers(split))
    if split.scored:
        answers.sort(key=lambda answer: -(answer.iou or 0.0))
    if not answers:
        raise InputError(f"{run.path}: no sentence of the {split.name} split has a word the model knows")
    title = f"Run {run.path.resolve().name}"
    parts = [
        f"<h1>{text(title)}</h1><p>{text(_summary(run, split))}</p>",
        "<h2>Learning curves</h2>",
        png(plot.learning_curves(run.rows), "losses over updates and scores over epochs"),
        f"<h2>Scores on the {split.name} split</h2>{_scores(run, split, answers)}",
        f"<h2>Sentences{', best first' if split.scored else ''}</h2>{_sentences(run, split, answers, sentences)}",
        f"<h2>Configuration</h2><pre>{text(json.dumps(run.config, indent=2))}</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(run: FinishedRun, split: Split) -> str:
    updates = max([run.updates, *(row["update"] for row in run.rows)])
    epochs = max((row["epoch"] for row in run.rows), default=0)
    known = known_split(split.samples)
    name = f"{split.name} split" + ("" if known is None else f" ({known})")
    return (
        f"{run.checkpoint.name}, after {run.updates:,} of {updates:,} updates in {epochs} epochs; "
        f"{len(split):,} sentences in the {name}; "
        f"vocabulary of {len(run.localizer.vocabulary) - 1:,} words"
    )


def _scores(run: FinishedRun, split: Split, answers: Sequence[Answer]) -> str:
    """Ours above the baselines that never look at the video."""
    if not split.scored:
        return "<p>Not all of its sentences have moments, so nothing is scored.</p>"
    ours = metrics.summary([answer.iou for answer in answers if answer.iou is not None])
    vocabulary = run.localizer.vocabulary
    known = [sample for sample in split.samples if len(vocabulary.encode(sample.sentence, 1).ids)]  # not by the answers
    rows = {"this run": ours} | metrics.baselines(windows_of(known, split.name))
    left_out = len(split) - len(answers)
    note = f"<p>{left_out} sentences without a known word are left out.</p>" if left_out else ""
    cells = [[text(name), *(f"{scores[score]:.4f}" for score in metrics.SCORES)] for name, scores in rows.items()]
    return table([split.name, *metrics.SCORES], cells, "scores") + note


def _sentences(run: FinishedRun, split: Split, answers: Sequence[Answer], count: int) -> str:
    shown = np.unique(np.linspace(0, len(answers) - 1, min(count, len(answers))).astype(int))
    rows = []
    for answer in (answers[place] for place in shown):
        sample, found = answer.sample, answer.found
        unknown = f"<br><small>not known: {text(', '.join(found.unknown))}</small>" if found.unknown else ""
        true = f"<br><small>true: {spans(sample.windows)} s</small>" if sample.windows else ""
        rows.append(
            [
                "" if answer.iou is None else f"{answer.iou:.3f}",
                f"{text(sample.sentence)}{unknown}<br><small>{text(sample.video)}, {sample.duration:.1f} s</small>",
                timeline(run.localizer, found, sample.duration, sample.windows),
                f"{found.start:.1f} to {found.end:.1f} s{true}",
            ]
        )
    order = "from the best to the worst" if split.scored else "through the split"
    some = "" if len(shown) == len(answers) else f" {len(shown)} of {len(answers):,}, evenly {order}."
    key = (
        f'<p class="key">The Gaussian over the video\'s time.{some}<i style="background:{plot.BLUE}"></i>found'
        f'<i style="background:{plot.ORANGE}"></i>true</p>'
    )
    return key + table(["IoU", "sentence", "over time", "moment"], rows, "sentences")
