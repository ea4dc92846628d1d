"""Decodes a video and gives its frames at regular times, as a player would show them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from cnm.errors import InputError

MAX_PIXELS = 1 << 26  # of a frame, 8192 x 8192; a tiny file can declare huge frames
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
MATROSKA_DURATION = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")  # a track's, of .mkv and .webm
MICROSECONDS = 1_000_000  # FFmpeg's unit of a file's duration
CUT_SHORT = 0.9  # a file is broken if its frames last less than this part of its declared duration


def require_av() -> Any:
    """Imports the module ``av``.

    Raises:
        InputError: PyAV is not installed.
    """
    try:
        import av
        import av.logging
    except ImportError as error:
        raise InputError(f"reading videos needs PyAV ({error}): pip install 'cnm-kernels[video]'") from None
    av.logging.set_level(av.logging.PANIC)  # our errors say what is wrong with a file
    return av


class VideoFile:
    """An open video; its frames are read once, from start to end.

    Args:
        path: a file in any format that FFmpeg reads.

    Attributes:
        rate: declared average frames per second.
        duration: seconds from the start of the first frame to the end of the last; known after all frames are read.
        frames: number of frames decoded so far.

    Raises:
        InputError: the file is missing, is not a video, has no video stream, or has too large frames.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.duration = 0.0
        self.frames = 0
        self._first = 0.0  # time stamp of the first frame, seconds
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such video; check the path")
        av = require_av()
        self._errors: type[Exception] = av.error.FFmpegError
        with self._readable():
            self._container = av.open(str(path), metadata_errors="replace")
        try:
            if not self._container.streams.video:
                raise InputError(f"{path}: has no video stream; give a file with pictures")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            self._check_size(self._stream.width, self._stream.height)
            self.rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def images(self, size: int, *, stride: int | None = None, rate: float | None = None) -> Iterator[np.ndarray]:
        """Yields the pictures at the times 0, p, 2p, ... of the video: [size, size, 3] uint8 each, RGB.

        Scales the short side to ``size`` (bicubic), crops the center, and applies the rotation that the file declares.
        Uses the frames' time stamps, so that pictures are equally spaced even if the frame rate varies.

        Args:
            stride: p is the time of this many frames at the average rate; exact if the rate is constant.
            rate: p is 1 / rate seconds. Give one of the two.

        Raises:
            InputError: the file holds no frame, cannot be decoded to its end, or ends before its declared duration.
        """
        assert (stride is None) != (rate is None)
        period = Fraction(stride) / self.rate if stride is not None else 1 / Fraction(rate or 0)
        slack = 1 / (4 * self.rate)  # the container rounds time stamps to its unit
        count = 0
        for frame, end in self._timed_frames():
            image = None
            while count * period + slack < end:
                image = self._picture(frame, size) if image is None else image
                yield image
                count += 1
        if self.frames == 0:
            raise InputError(f"{self.path}: holds no frame that can be decoded; it is empty or broken, fetch it again")
        declared = self._declared_duration()
        if declared is not None and self.duration < CUT_SHORT * declared - 1 / float(self.rate):
            raise InputError(
                f"{self.path}: is cut short, {self.duration:.1f} of {declared:.1f} seconds can be read; fetch it again"
            )

    def _timed_frames(self) -> Iterator[tuple[Any, Fraction]]:
        """Yields each frame with the time in seconds at which it ends; the first frame starts at 0."""
        usual = 1 / self.rate
        first: Fraction | None = None
        held: Any = None
        start = Fraction(0)
        with self._readable():
            for frame in self._container.decode(self._stream):
                time = frame.pts * frame.time_base if frame.pts is not None else (first or 0) + self.frames * usual
                if first is None:
                    first = time
                    self._first = float(first)
                if held is not None:
                    if time - first <= start:  # out of order or repeated: a player shows the later frame
                        held = frame
                        continue
                    yield held, time - first
                    start = time - first
                held = frame
                self.frames += 1
        if held is not None:
            end = start + (held.duration * held.time_base if held.duration else usual)
            self.duration = float(end)
            yield held, end

    def _declared_duration(self) -> float | None:
        """In seconds, of the pictures alone. Matroska counts from 0, not from the first of them."""
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        tag = MATROSKA_DURATION.fullmatch(self._stream.metadata.get("DURATION", ""))
        if tag:
            return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - self._first
        alone = len(self._container.streams) == 1  # else the file's duration may be that of its sound
        return self._container.duration / MICROSECONDS - self._first if alone and self._container.duration else None

    def _picture(self, frame: Any, size: int) -> np.ndarray:
        self._check_size(frame.width, frame.height)
        with self._readable():
            image = frame.to_image()
        turn = round(frame.rotation / 90) % 4  # counterclockwise
        if turn:
            image = image.transpose(TURNS[turn])
        return center_square(image, size)

    def _check_size(self, width: int, height: int) -> None:
        if not 0 < width * height <= MAX_PIXELS:
            raise InputError(
                f"{self.path}: frames are {width} x {height} pixels, {MAX_PIXELS} pixels are the most; scale it down "
                f"first"
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{self.path}: is not a readable video ({reason}); fetch it again") from None


def center_square(image: Image.Image, size: int) -> np.ndarray:
    """Scales the short side to ``size`` and crops the center: [size, size, 3] uint8.

    Gives the same pixels as first scaling the whole picture, which needs much memory for long narrow pictures.
    """
    width, height = image.size
    short = min(width, height)
    scaled = [size * side // short for side in (width, height)]
    offset = [round((side - size) / 2) for side in scaled]
    left, top = (place * side / whole for place, side, whole in zip(offset, (width, height), scaled, strict=True))
    box = (left, top, left + size * width / scaled[0], top + size * height / scaled[1])
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))
