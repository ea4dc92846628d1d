"""``cnm score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cnm import metrics, qvhighlights
from cnm.commands.common import JsonOption, print_notes, print_scores, split_title
from cnm.data.annotations import load_annotations
from cnm.data.known_splits import known_split
from cnm.data.split import windows_of
from cnm.predictions import read_predictions, score


def score_command(
    predictions: Annotated[
        Path, typer.Argument(metavar="F.jsonl", help="Predictions in QVHighlights' submission form.")
    ],
    annotations: Annotated[Path, typer.Option(help="Annotations with moments, to compare with.")],
    as_json: JsonOption = False,
) -> None:
    """Scores predictions of any model: R@1 and mIoU of the first window, and QVHighlights' mAP of the first ten.

    \b
    Example:
      cnm score found.jsonl --annotations charades_test_release.jsonl     (found.jsonl by cnm evaluate --predictions)
    """
    content = load_annotations(annotations)
    samples, notes = content.samples, content.notes
    baselines = metrics.baselines(windows_of(samples, str(annotations)))
    found = score(read_predictions(predictions, samples, content.left_out), samples)
    if as_json:
        scored = {
            "predictions": str(predictions),
            "annotations": str(annotations),
            "sentences": len(samples),
            "known_as": known_split(samples),
            "scores": found,
            "baselines": baselines,
            "notes": notes,
        }
        typer.echo(json.dumps(scored, allow_nan=False))
        return
    print_notes(notes)
    print_scores(split_title(annotations.name, samples), {str(predictions): found} | baselines)
    typer.echo("; ".join(f"{name} {found[name]:.4f}" for name in qvhighlights.SCORES))
