"""Films and pictures of every kind come in as the clips that a player would show; captions as they were written."""
import math
from fractions import Fraction

import av
import numpy as np
import pytest

import codec
import films


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(count, height=48, width=64):
    """Pictures of one grey each, from which `numbers` tells them apart after any lossy codec."""
    return np.stack([np.full((height, width, 3), 20 + 4 * i, np.uint8) for i in range(count)])


def numbers(clip):
    return ((clip.mean((1, 2, 3)) - 20) / 4).round().astype(int).tolist()


def film(path, pictures, times, encoder="libx264", aspect=None, rotation=0):
    """A real video file: pictures on show from `times`, in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=1000, options={"preset": "ultrafast"} if "26" in encoder else {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.colorspace = 1
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(pictures, times):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, sizes=((48, 64),), frames=5, fps=8, cuts="first"):
    return list(films.read_video(path, sizes=sizes, frames=frames, fps=fps, cuts=cuts))


@pytest.mark.parametrize("name, encoder", [("a b.mp4", "libx264"), ("é.mov", "libx265"), ("c.webm", "libvpx-vp9"),
                                           ("d.mkv", "libx264"), ("e.mp4", "libx265"), ("f.m4v", "libx264")])
def test_frames_of_a_variable_rate_are_picked_by_timestamp(tmp_path, name, encoder):
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    times = [0, 30, 100, 124, 126, 300, 330, 340, 350, 360, 900, 1100]
    path = film(tmp_path / name, numbered(len(times)), times, encoder)
    (clip, size), = read(path, frames=9)
    assert clip.shape == (9, 48, 64, 3) and clip.dtype == np.uint8 and size == (48, 64)
    shown = [max(i for i, time in enumerate(times) if time <= 1000 * n / 8 + 2) for n in range(9)]
    assert numbers(clip) == shown == [0, 4, 4, 9, 9, 9, 9, 9, 10]


@pytest.mark.parametrize("name, encoder", [("a.webm", "libvpx-vp9"), ("a.mp4", "libx264")])
def test_a_film_at_the_wanted_rate_gives_each_picture_once_though_its_times_are_rounded(tmp_path, name, encoder):
    for fps in (16, 24, 30):
        path = film(tmp_path / f"{fps}_{name}", numbered(40), [round(1000 * i / fps) for i in range(40)], encoder)
        (clip, _), = read(path, frames=37, fps=fps)
        assert numbers(clip) == list(range(37))


def test_slower_and_faster_films_are_resampled(tmp_path):
    path = film(tmp_path / "fast.mp4", numbered(50), [1000 * i // 25 for i in range(50)])
    assert numbers(read(path, frames=15, fps=8)[0][0]) == [math.floor(i * 25 / 8) for i in range(15)]
    path = film(tmp_path / "slow.mp4", numbered(6), [200 * i for i in range(6)])
    assert numbers(read(path, frames=9, fps=10)[0][0]) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_time_counts_from_the_first_picture(tmp_path):
    path = film(tmp_path / "late.mkv", numbered(10), [5000 + 125 * i for i in range(10)])
    assert numbers(read(path)[0][0]) == [0, 1, 2, 3, 4]


def test_the_last_picture_is_on_show_for_as_long_as_the_file_says(tmp_path):
    codec.write_video(tmp_path / "a.mp4", [numbered(5)], 8)
    (clip, _), = read(tmp_path / "a.mp4", frames=20, fps=32)
    assert numbers(clip) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    with pytest.raises(ValueError, match="20 frames"):
        read(tmp_path / "a.mp4", frames=21, fps=32)
    path = film(tmp_path / "b.mp4", numbered(2), [0, 500])                  # the second lasts 1 ms
    assert numbers(read(path, frames=5)[0][0]) == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="5 frames"):
        read(path, frames=6)


def test_all_cuts_are_consecutive_and_the_rest_is_dropped(tmp_path):
    path = film(tmp_path / "a.mp4", numbered(13), [125 * i for i in range(13)])
    assert [numbers(clip) for clip, _ in read(path, cuts="all")] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_the_first_cut_does_not_decode_the_rest_of_a_film(tmp_path, monkeypatch):
    path = film(tmp_path / "long.mp4", np.tile(numbered(1), (400, 1, 1, 1)), [125 * i for i in range(400)])
    decoded, at_rate = [], films.at_rate

    def counted(pictures):
        for picture in pictures:
            decoded.append(picture.pts)
            yield picture

    monkeypatch.setattr(films, "at_rate", lambda pictures, fps: at_rate(counted(pictures), fps))
    assert len(read(path)) == 1 and len(decoded) < 10
    assert len(read(path, cuts="all")) == 80 and len(decoded) > 400


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_film_is_turned_as_its_display_matrix_says(tmp_path, rotation):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = (240, 40, 40), (40, 200, 40), (40, 40, 240)
    upright = np.rot90(picture, rotation // 90)
    for name in ("a.mp4", "a.mov"):
        path = film(tmp_path / name, [picture] * 5, range(0, 625, 125), rotation=rotation)
        (clip, size), = read(path, sizes=[(48, 64), (64, 48)])
        assert size == upright.shape[:2]
        assert codec.psnr(clip, np.stack([upright] * 5)).min() > 25


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = film(tmp_path / "wide.mp4", numbered(5, 64, 64), range(0, 625, 125), aspect=Fraction(2, 1))
    assert read(path, sizes=[(32, 32), (32, 64), (64, 32)])[0][1] == (32, 64)
    path = film(tmp_path / "turned.mp4", numbered(5, 64, 64), range(0, 625, 125), aspect=Fraction(2, 1), rotation=90)
    assert read(path, sizes=[(32, 32), (32, 64), (64, 32)])[0][1] == (64, 32)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 16:48] = 255                                     # shown, 64 px wide of 128: all that a square crop keeps
    path = film(tmp_path / "stripes.mp4", [stripes] * 5, range(0, 625, 125), aspect=Fraction(2, 1))
    assert read(path, sizes=[(64, 64)])[0][0].mean() > 250


def test_a_clip_takes_the_size_of_nearest_shape_covers_it_and_is_cut_at_the_centre(tmp_path):
    thirds = np.zeros((96, 288, 3), np.uint8)
    thirds[:, :96], thirds[:, 96:192], thirds[:, 192:] = (240, 40, 40), (40, 200, 40), (40, 40, 240)
    path = film(tmp_path / "wide.mp4", [thirds] * 5, range(0, 625, 125))
    assert read(path, sizes=[(32, 32), (32, 64), (64, 32)])[0][1] == (32, 64)
    for size in ((32, 32), (128, 128)):                         # smaller and larger than the film
        clip = read(path, sizes=[size])[0][0]
        assert clip.shape == (5, *size, 3)
        assert abs(np.median(clip, (1, 2)) - (40, 200, 40)).max() < 6
        assert abs(clip.mean((1, 2)) - (40, 200, 40)).max() < 20
    path = film(tmp_path / "tall.mp4", [np.rot90(thirds).copy()] * 5, range(0, 625, 125))
    clip, size = read(path, sizes=[(32, 32), (64, 32)])[0]
    assert size == (64, 32) and abs(np.median(clip[:, :12], (1, 2)) - (40, 40, 240)).max() < 12
    assert abs(np.median(clip[:, -12:], (1, 2)) - (240, 40, 40)).max() < 12


def test_a_file_that_makes_no_clip_says_why(tmp_path):
    empty, text, sound, cut = (tmp_path / name for name in ("empty.mp4", "text.mp4", "sound.mp4", "cut.mp4"))
    empty.touch()
    text.write_text("no film at all " * 100)
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    whole = film(tmp_path / "whole.mp4", numbered(9), range(0, 1125, 125))
    cut.write_bytes(whole.read_bytes()[:-400])
    for path, reason in ((empty, "^empty"), (text, "^unreadable: Invalid data"), (sound, "^no video"),
                         (cut, "^unreadable")):
        with pytest.raises(ValueError, match=reason):
            read(path)
    assert len(read(whole, frames=9)) == 1
    for cuts in ("first", "all"):
        with pytest.raises(ValueError, match="^too short: 9 frames at 8 per second, 10 are wanted"):
            read(whole, frames=10, cuts=cuts)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.mp4")
