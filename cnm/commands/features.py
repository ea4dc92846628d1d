"""``cnm features``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cnm.commands.common import JsonOption, SplitName
from cnm.data import read_annotations
from cnm.data.expected import agreed
from cnm.data.feature_sources import open_features
from cnm.data.manifest import Survey, differences, survey, write_manifest
from cnm.data.origin import Origin
from cnm.errors import InputError
from cnm.files import prepare_output

SHOWN = 5  # number of items of each kind that are named

features_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@features_app.callback()
def features() -> None:
    """Checks feature files.

    \b
    Example:
      cnm features check i3d_features.hdf5 --annotations train.json --annotations test.json
    """


@features_app.command()
def check(
    paths: Annotated[
        list[str], typer.Argument(metavar="FEATURES...", help="HDF5 file or folder; several are concatenated.")
    ],
    annotations: Annotated[
        list[Path], typer.Option(help="Annotations of the videos that need features; may be repeated.")
    ],
    pattern: Annotated[
        str | None, typer.Option(help="Path of a video's dataset in HDF5, as dataset.feature_pattern.")
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Replaces {split} in a path.")] = SplitName.train,
    frame_dim: Annotated[int | None, typer.Option(min=1, help="The width that features must have.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Compare with this manifest; if it does not exist, write it.")
    ] = None,
    origin: Annotated[str | None, typer.Option(help="Origin of the features, for a new manifest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Reads all features of the annotated videos once, and reports what is missing, broken or odd.

    \b
    Example:
      cnm features check clip_features slowfast_features --annotations train.jsonl --annotations val.jsonl \\
          --manifest features.json --origin "lighthouse, CLIP and SlowFast"
    """
    durations: dict[str, float] = {}
    for path in annotations:
        for sample in read_annotations(path)[0]:
            durations[sample.video] = max(sample.duration, durations.get(sample.video, 0.0))
    compared, common = manifest is not None and manifest.exists(), 0
    if manifest is not None and not compared:
        prepare_output(manifest)
    with open_features(paths, pattern, split.value) as source:
        found = survey(source, durations, progress=not as_json)
    faults = _faults(found, frame_dim)
    if manifest is not None and compared:
        agreed(manifest, Origin.of(paths, split.value))
        differing, common = differences(manifest, found)
        faults += differing
        if found.videos and not common:
            faults.append(f"{manifest}: holds none of these videos; name the manifest that was written of them")
    typer.echo(json.dumps(_content(found, faults), allow_nan=False) if as_json else _report(found, len(durations)))
    if faults:
        if not as_json:
            typer.echo("\n".join(faults))
        raise InputError(f"{' + '.join(paths)}: {len(faults)} faults, first: {faults[0]}")
    if manifest is not None and not compared:
        write_manifest(manifest, found, paths, origin, split.value)
    if manifest is not None and not as_json:
        typer.echo(f"{manifest}: {f'agrees on {common:,} of {len(found.videos):,} videos' if compared else 'written'}")


def _faults(found: Survey, frame_dim: int | None) -> list[str]:
    faults = []
    if found.missing:
        faults.append(f"{len(found.missing):,} videos have no features: {_named(found.missing)}")
    faults += found.broken.values()
    if len(found.widths) > 1:
        counted = ", ".join(f"{width} ({count:,} videos)" for width, count in found.widths.items())
        faults.append(f"widths differ: {counted}")
    elif frame_dim is not None and found.widths and frame_dim not in found.widths:
        faults.append(f"the features are {next(iter(found.widths))} wide, but {frame_dim} are expected")
    return faults


def _content(found: Survey, faults: list[str]) -> dict[str, Any]:
    return {
        "videos": len(found.videos),
        "missing": found.missing,
        "broken": found.broken,
        "widths": found.widths,
        "lengths": found.lengths,
        "clips_per_second": found.median_rate,
        "odd_rates": found.odd_rates,
        "duplicates": found.duplicates,
        "faults": faults,
    }


def _report(found: Survey, wanted: int) -> str:
    lines = [f"features of {len(found.videos):,} of {wanted:,} annotated videos"]
    if found.lengths is not None:
        fewest, median, most = found.lengths
        lines.append(f"width {', '.join(map(str, found.widths))}; clips {fewest} to {most}, median {median:g}")
        lines.append(f"clips per second: median {found.median_rate:.3g}")
    odd = [f"{video} ({rate:.3g})" for video, rate in found.odd_rates.items()]
    if odd:
        lines.append(f"note: {len(odd):,} videos have far more or fewer clips per second: {_named(odd)}")
    if found.duplicates:
        groups = [" = ".join(group) for group in found.duplicates]
        lines.append(f"note: {len(groups):,} groups of videos have the very same features: {_named(groups)}")
    return "\n".join(lines)


def _named(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (" ..." if len(items) > SHOWN else "")
