"""``cnm vocabulary``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cnm.commands.common import JsonOption
from cnm.data import read_annotations, vocabulary_files
from cnm.data.word_vectors import count_words, read_vectors
from cnm.errors import InputError
from cnm.files import prepare_output

SHOWN = 10  # number of unknown words that are named


def vocabulary_command(
    annotations: Annotated[
        list[Path], typer.Option(help="Annotations of the training split, whose words are counted; may be repeated.")
    ],
    vectors: Annotated[Path, typer.Option(help="Word vectors as text: GloVe's, or word2vec's with a header.")],
    output: Annotated[
        Path, typer.Option(metavar="F.safetensors", help="F.safetensors, written together with F.json; must not exist.")
    ],
    most: Annotated[int | None, typer.Option(min=1, help="Number of words to keep, most frequent first.")] = None,
    word_dim: Annotated[int | None, typer.Option(min=1, help="Expected width of the vectors.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Makes the vocabulary of a dataset's sentences: all words with a vector, most frequent first.

    \b
    Example:
      cnm vocabulary --annotations train.jsonl --vectors glove.6B.300d.txt --output vocabulary.safetensors
    """
    if not vocabulary_files.is_safe(output):
        raise InputError(f"--output {output}: must end in .safetensors")
    for path in map(output.with_suffix, vocabulary_files.SAFE):
        if path.exists():
            raise InputError(f"{path}: exists and is not written over; choose another --output")
    prepare_output(output)
    counts: Counter[str] = Counter()
    for path in annotations:
        counts.update(count_words(read_annotations(path)[0]))
    found, width = read_vectors(vectors, counts, word_dim, progress=not as_json)
    kept = [(word, count) for word, count in counts.most_common() if word in found][:most]
    if not kept:
        raise InputError(
            f"{vectors}: has none of the {len(counts):,} words of the annotations; take another language's"
        )
    unknown = {word: count for word, count in counts.most_common() if word not in found}
    vocabulary_files.write(output, kept, np.stack([found[word] for word, _ in kept]), unknown, vectors.name)
    covered = sum(count for _, count in kept) / counts.total()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "output": str(output),
                    "words": len(kept),
                    "word_dim": width,
                    "counted": len(counts),
                    "covered": covered,
                    "unknown": unknown,
                }
            )
        )
        return
    typer.echo(
        f"{output}: {len(kept):,} of {len(counts):,} words, {covered:.2%} of all {counts.total():,} in the sentences"
    )
    if unknown:
        first = ", ".join(f"{word} ({count})" for word, count in list(unknown.items())[:SHOWN])
        typer.echo(f"without a vector: {len(unknown):,} words, first {first}")
    typer.echo(
        f"use it with --set dataset.vocab_path={output} --set dataset.vocab_size={len(kept)} "
        f"--set dataset.word_dim={width}"
    )
