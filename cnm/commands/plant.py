"""``cnm plant``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnm.data import Vocabulary, plant
from cnm.errors import InputError

ALL_WORDS = 1_000_000  # more words than any vocabulary file has


def plant_command(
    annotations: Annotated[list[Path], typer.Option(help="An annotation file; repeat for train and test.")],
    vocab: Annotated[Path, typer.Option(help="Word vectors: glove.pkl, or a file that `cnm vocabulary` wrote.")],
    output: Annotated[Path, typer.Option(help="The HDF5 file to write; must not exist.")],
    frame_dim: Annotated[int, typer.Option(min=1, help="Width of a feature, as in dataset.frame_dim.")] = 256,
    word_dim: Annotated[int, typer.Option(min=1, help="Width of a word vector, as in dataset.word_dim.")] = 300,
    signal: Annotated[float, typer.Option(min=0, help="Strength of the signal; the noise has strength 1.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random vectors and the noise.")] = 0,
) -> None:
    """Writes artificial features of annotated videos, for training without the real features.

    Each annotated moment carries a signal made from the content words of its sentence, plus noise.

    \b
    Example:
      cnm plant --annotations data/charades/train.json --annotations data/charades/test.json \\
          --vocab data/charades/glove.pkl --output planted.hdf5
      cnm train --config charades_i3d --set dataset.feature_path=planted.hdf5 --set dataset.frame_dim=256
    """
    if output.exists():
        raise InputError(f"{output}: exists and is not written over; choose another --output")
    vocabulary = Vocabulary.from_file(vocab, ALL_WORDS, word_dim)
    count = plant(annotations, vocabulary, output, frame_dim=frame_dim, signal=signal, seed=seed, progress=True)
    typer.echo(
        f"{output}: features of {count:,} videos; train on them with --set dataset.feature_path={output} "
        f"--set dataset.frame_dim={frame_dim}"
    )
