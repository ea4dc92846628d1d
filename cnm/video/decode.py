"""Decodes a video and gives its frames at regular times, as a player would show them."""

from __future__ import annotations

import math
import os
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
ROUNDED = Fraction(1, 100)  # seconds, the coarsest unit of time stamps (GIF's)
LATE = 1  # seconds; sound that begins earlier than this before the pictures shifts time 0 to its begin
JUMP_BACK = 1  # seconds; frames out of order are less apart
BROADCAST = ("mpegts", "mpeg")  # containers that are joined end to end, each part with a clock of its own
JUMP_FORWARD = 10  # seconds between frames of such a container


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
        duration: seconds from time 0 to the end of the last frame; known after all frames are read. Time 0 is the start
            of the first frame, or of the file where its sound begins more than a second before.
        frames: number of frames decoded so far.

    Raises:
        InputError: the file is missing, is not a video, has no video stream, or has too large frames.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.duration = 0.0
        self.frames = 0
        self._first = 0.0  # time stamp of the first frame, seconds
        self._waited = 0.0  # seconds from time 0 to the first frame
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such video; check the path")
        av = require_av()
        self._errors: type[Exception] = av.error.FFmpegError
        with self._readable():
            self._container = av.open(os.path.abspath(path), metadata_errors="replace")  # "12:30.mkv" is no URL
        try:
            self._stream = self._container.streams.best("video")  # others are covers and previews
            if self._stream is None:
                raise InputError(f"{path}: has no video stream; give a file with pictures")
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

        Scales the short side to ``size`` (bicubic), crops the center, and turns, mirrors and widens pixels as the file
        declares. Uses the frames' time stamps, so that pictures are equally spaced even if the frame rate varies.

        Args:
            stride: p is the time of this many frames at the average rate; exact if the rate is constant.
            rate: p is 1 / rate seconds. Give one of the two.

        Raises:
            InputError: the file holds no frame, cannot be decoded to its end, ends before its declared duration, or its
                clock jumps.
        """
        assert (stride is None) != (rate is None)
        period = Fraction(stride) / self.rate if stride is not None else 1 / Fraction(rate or 0)
        slack = min(1 / (4 * self.rate), ROUNDED)  # the container rounds time stamps to its unit
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
        read = self.duration - self._waited
        if declared is not None and read < CUT_SHORT * declared - 1 / float(self.rate):
            raise InputError(
                f"{self.path}: is cut short, {read:.1f} of {declared:.1f} seconds can be read; fetch it again"
            )

    def _timed_frames(self) -> Iterator[tuple[Any, Fraction]]:
        """Yields each frame with the time in seconds at which it ends; the first frame is shown from 0."""
        usual = 1 / self.rate
        first: Fraction | None = None
        held: Any = None
        zero = start = Fraction(0)  # time 0 as a time stamp; when the held frame starts
        with self._readable():
            for frame in self._container.decode(self._stream):
                stamp = frame.pts * frame.time_base if frame.pts is not None else (first or 0) + self.frames * usual
                if first is None:
                    first, zero = stamp, self._time_zero(stamp)
                    self._first, self._waited = float(first), float(first - zero)
                    start = first - zero
                time = stamp - zero
                self._check_jump(start, time)
                if held is not None:
                    if time <= start:  # out of order or repeated: a player shows the later frame
                        held = frame
                        continue
                    yield held, time
                    start = time
                held = frame
                self.frames += 1
        if held is not None:
            end = start + (held.duration * held.time_base if held.duration else usual)
            self.duration = float(end)
            yield held, end

    def _time_zero(self, first: Fraction) -> Fraction:
        """The time stamp that players show as 0; ``first`` is that of the first frame."""
        if self._container.start_time is None:
            return first
        began = Fraction(self._container.start_time, MICROSECONDS)
        return began if first - began > LATE else first

    def _check_jump(self, start: Fraction, time: Fraction) -> None:
        """Refuses a time that cannot follow ``start``: later frames would be lost, or one be shown for hours."""
        forward = self._container.format.name in BROADCAST and time - start > JUMP_FORWARD
        if forward or start - time > max(JUMP_BACK, 4 / self.rate):
            raise InputError(
                f"{self.path}: its clock jumps from {float(start):.1f} to {float(time):.1f} seconds, it may be several "
                f"videos in one file; give them as files of their own, or write it anew with one clock"
            )

    def _declared_duration(self) -> float | None:
        """In seconds, of the pictures alone. Matroska counts from 0, not from the first of them."""
        if self._container.format.name == "avi" and self._stream.frames:  # its duration is FFmpeg's guess by size
            return float(self._stream.frames * self._stream.time_base)
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
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        return center_square(*_as_shown(image, aspect, frame.side_data.get("DISPLAYMATRIX")), size)

    def _check_size(self, width: int, height: int) -> None:
        if width * height == 0:
            raise InputError(
                f"{self.path}: its pictures' size cannot be read (FFmpeg reads no animated WebP, or it is broken); "
                f"convert it to an .mp4 or a .gif"
            )
        if width * height > MAX_PIXELS:
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


def _as_shown(image: Image.Image, aspect: Fraction, matrix: Any) -> tuple[Image.Image, Fraction]:
    """Turns by a multiple of 90 degrees, and mirrors, as a display matrix says: x' = a x + c y, y' = b x + d y.

    ``aspect``, a pixel's width by its height, is that of the stored pixels; the returned one that of the turned.
    """
    if matrix is None:
        return image, aspect
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if a * d < b * c:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turn = round(math.degrees(math.atan2(-b, a)) / 90) % 4  # counterclockwise
    return image.transpose(TURNS[turn]) if turn else image, 1 / aspect if turn % 2 else aspect


def center_square(image: Image.Image, aspect: Fraction, size: int) -> np.ndarray:
    """Scales the short side to ``size`` and crops the center: [size, size, 3] uint8.

    Gives the same pixels as first scaling the whole picture, which needs much memory for long narrow pictures.

    Args:
        aspect: width of a pixel by its height; the picture is as wide as its pixels together.
    """
    width, height = image.size
    shown = (width * aspect, Fraction(height))
    scaled = [size * side // min(shown) for side in shown]
    offset = [round((side - size) / 2) for side in scaled]
    left, top = (place * side / whole for place, side, whole in zip(offset, (width, height), scaled, strict=True))
    box = (left, top, left + size * width / scaled[0], top + size * height / scaled[1])
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))
