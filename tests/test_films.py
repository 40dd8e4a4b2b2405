"""Films and pictures of every kind come in as the clips that a player would show; captions as they were written."""
import json
import math
import os
import shutil
import subprocess
import unicodedata
import weakref
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

import codec
import films


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(count, height=48, width=64):
    """Pictures of one grey each, from which `numbers` tells them apart after any lossy codec."""
    return np.stack([np.full((height, width, 3), 20 + 4 * i, np.uint8) for i in range(count)])


def numbers(clip):
    return ((clip.mean((1, 2, 3)) - 20) / 4).round().astype(int).tolist()


def film(path, pictures, times, encoder="libx264", aspect=None, rotation=0, matrix=None, options=None):
    """A real video file: pictures on show from `times`, in milliseconds."""
    fast = {"preset": "ultrafast"} if "26" in encoder else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=1000, options=fast | (options or {}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.colorspace = 1
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        for picture, time in zip(pictures, times):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady(path, pictures, encoder="libx264", rate=8, times=None, options=None, **container_options):
    """A real video file of a steady rate, or of `times` counted in frames of it."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(encoder, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for i, picture in zip(times or range(len(pictures)), pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, sizes=((48, 64),), frames=5, fps=8, cuts="first", report=pytest.fail):
    return list(films.read_video(path, sizes=sizes, frames=frames, fps=fps, cuts=cuts, report=report))


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
    seen, decoded = [], films.decoded

    def counted(*film):
        for picture in decoded(*film):
            seen.append(picture.pts)
            yield picture

    monkeypatch.setattr(films, "decoded", counted)
    assert len(read(path)) == 1 and len(seen) < 10
    assert len(read(path, cuts="all")) == 80 and len(seen) > 400


CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (240, 40, 40), (40, 200, 40), (40, 40, 240)
MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1),     # EXIF's orientations 1 to 8
            (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)]


def by_matrix(picture, matrix):
    """Each pixel where the matrix says that it is shown: x to a x + c y, y to b x + d y."""
    a, b, c, d = matrix
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    shown = np.zeros((down.max() + 1, across.max() + 1, 3), np.uint8)
    shown[down, across] = picture
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_film_is_turned_and_mirrored_as_its_display_matrix_says(tmp_path, matrix):
    a, b, c, d = (65536 * n for n in matrix)
    expected = by_matrix(CORNERS, matrix)
    for name in ("a.mp4", "a.mov"):
        path = film(tmp_path / name, [CORNERS] * 5, range(0, 625, 125), matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
        (clip, size), = read(path, sizes=[(48, 64), (64, 48)])
        assert size == expected.shape[:2] == films.head(path).size
        assert codec.psnr(clip, np.stack([expected] * 5)).min() > 25
    if ffmpeg := shutil.which("ffmpeg"):
        command = [ffmpeg, "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        theirs = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
        assert codec.psnr(clip[:1], theirs.reshape(1, *size, 3)).min() > 25


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_and_mirrored_as_its_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(CORNERS).save(tmp_path / name, exif=exif)
    (clip, size), = read(tmp_path / name, sizes=[(48, 64), (64, 48)], frames=1)
    expected = by_matrix(CORNERS, MATRICES[orientation - 1])
    assert size == expected.shape[:2] == films.head(tmp_path / name).size
    assert codec.psnr(clip, expected[None]).min() > 25


@pytest.mark.parametrize("rotation, orientation", [(0, 1), (90, 8), (-90, 6), (180, 3), (-180, 3)])
def test_of_a_film_with_side_data_that_pyav_does_not_know_the_rotation_is_taken(rotation, orientation):
    class Picture:
        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    picture, film = Picture(), SimpleNamespace(format=SimpleNamespace(name="mov"))
    picture.rotation = rotation
    assert films.turn_of(picture, film) == films.EXIF.get(orientation, films.Turn())


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
    for path, reason in ((empty, "^empty"), (text, "^unreadable: Invalid data"), (sound, "^no video in it$"),
                         (cut, "^unreadable")):
        with pytest.raises(ValueError, match=reason):
            read(path)
    assert len(read(whole, frames=9)) == 1
    for cuts in ("first", "all"):
        with pytest.raises(ValueError, match="^too short: 9 frames at 8 per second, 10 are wanted"):
            read(whole, frames=10, cuts=cuts)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.mp4")


def plain(path, codes, size=(32, 32), encoder="ffv1", kind="yuv420p", space=2, curve=2, primaries=2, full=0):
    """A film of which each frame is areas side by side, each of one Y, U and V; its tags as FFmpeg numbers them."""
    width = size[1] * len(codes)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=8)
        stream.height, stream.width, stream.pix_fmt = size[0], width, kind
        frame = av.VideoFrame(width, size[0], kind)
        for to in (stream.codec_context, frame):
            to.colorspace, to.color_trc, to.color_primaries, to.color_range = space, curve, primaries, full
        deep = frame.format.components[0].bits > 8
        for i, plane in enumerate(frame.planes):
            row = np.repeat([code[i] for code in codes], plane.width // len(codes))
            area = np.zeros((plane.height, plane.line_size // (1 + deep)), np.uint16 if deep else np.uint8)
            area[:, :len(row)] = row
            plane.update(area.tobytes())
        for i in range(5):
            frame.pts, frame.time_base = i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def areas(clip, count):
    """The middle of each of `count` areas side by side."""
    width = clip.shape[2] // count
    return np.int16(clip[0, clip.shape[1] // 2, width // 2::width])


def rgb_of(y, u, v, kr, kb, full):
    """The colour of 8 bits that Y, U and V are, by BT.601's or BT.709's weights of red and blue."""
    if full:
        y, u, v = y / 255, (u - 128) / 255, (v - 128) / 255
    else:
        y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return [255 * c for c in (red, (y - kr * red - kb * blue) / (1 - kr - kb), blue)]


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


@pytest.mark.parametrize("size, space, full, expected", [
    ((32, 64), 2, 0, BT601), ((576, 64), 2, 0, BT601), ((32, 1264), 2, 0, BT601), ((592, 64), 2, 0, BT709),
    ((32, 1280), 2, 0, BT709), ((32, 64), 1, 0, BT709), ((32, 64), 1, 2, BT709), ((592, 64), 5, 0, BT601),
    ((592, 64), 6, 0, BT601), ((592, 64), 2, 2, BT709), ((32, 64), 6, 2, BT601)])
def test_colours_are_those_of_the_tags_and_without_tags_those_that_players_show(tmp_path, size, space, full, expected):
    path = plain(tmp_path / "a.mkv", [(120, 100, 150)], size, space=space, full=full)
    [(clip, _)] = read(path, sizes=[(32, 32)])
    assert abs(areas(clip, 1)[0] - rgb_of(120, 100, 150, *expected, full == 2)).max() <= 1


# ----------------------------------------------------------------------------------------------------------------- HDR

PQ, HLG = 16, 18


def code_of(nits, curve):
    """The code of 10 bits, of limited range, of a grey of so many nits; HLG's for a display of 1,000."""
    if curve == PQ:
        y = (nits / 10000)**0.1593017578125
        signal = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y))**78.84375
    else:
        scene = (nits / 1000)**(1 / 1.2)
        signal = math.sqrt(3 * scene)
        if scene > 1 / 12:
            signal = 0.17883277 * math.log(12 * scene - 0.28466892) + 0.55991073
    return round(64 + 876 * signal) if nits else 64


NITS = [0, 1, 10, 50, 100, 150, 203, 300, 400, 600, 800, 1000]


@pytest.mark.parametrize("encoder, name", [("ffv1", "a.mkv"), ("libx265", "a.mp4")])
@pytest.mark.parametrize("curve", [PQ, HLG])
def test_hdr_becomes_sdr_by_one_curve_without_clipping_below_1000_nits(tmp_path, curve, encoder, name):
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    chart = [(code_of(nits, curve), 512, 512) for nits in NITS]
    path = plain(tmp_path / name, chart, encoder=encoder, kind="yuv420p10le", space=9, curve=curve, primaries=9,
                 full=1)
    [(clip, _)] = read(path, sizes=[(32, 32 * len(NITS))])
    greys = areas(clip, len(NITS))
    assert (greys.max(1) - greys.min(1)).max() <= 1
    light = [0.00522305 * (min(n, 100) + max(n - 100, 0) / (1 + 0.01083287 * max(n - 100, 0))) for n in NITS]
    assert abs(greys[:, 0] - [255 * y**(1 / 2.4) for y in light]).max() <= 2
    assert greys[0].max() == 0
    assert 0.87 < greys[NITS.index(203), 0] / 255 < 0.93
    assert (np.diff(greys[:, 0]) > 0).all()
    assert greys.max() < 254


def test_the_curve_of_hdr_is_monotone_and_ends_at_10000_nits():
    sdr = films.tone(np.float32([-5, 0, *range(1, 10001)]))
    assert (np.diff(sdr[1:]) > 0).all()
    assert sdr[0] == sdr[1] == 0
    assert sdr[-1] == pytest.approx(1, abs=1e-5)
    assert films.tone(np.float32(20000)) <= 1       # as BT.2020's red has in BT.709


@pytest.mark.parametrize("primaries, space", [(9, 9), (2, 2), (1, 9)])
def test_hdr_colours_go_from_the_primaries_of_bt2020_to_those_of_bt709(tmp_path, primaries, space):
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    chart = []
    for rgb in np.eye(3):
        light = 150 * (rgb if primaries == 1 else to_2020 @ rgb)
        red, green, blue = (code_of(max(nits, 0), PQ) - 64 for nits in light)
        y = 0.2627 * red + 0.6780 * green + 0.0593 * blue
        chart.append([round(64 + y), round(512 + (blue - y) / 1.8814 * 224 / 219),
                      round(512 + (red - y) / 1.4746 * 224 / 219)])
    path = plain(tmp_path / "a.mkv", chart, kind="yuv444p10le", space=space, curve=PQ, primaries=primaries,
                 full=1)
    [(clip, _)] = read(path, sizes=[(32, 96)])
    assert abs(areas(clip, 3) - np.eye(3) * 255 * films.tone(150)).max() < 12


# -------------------------------------------------------------------------------------------------------- transparency

def glass(i):
    """Red: a third solid, a third half transparent, a third invisible."""
    picture = np.full((48, 96, 4), (200, 40, 40, 255), np.uint8)
    picture[:, 32:64, 3], picture[:, 64:, 3] = 128, 0
    return picture


def glass_film(path, encoder, kind, options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 96, kind
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(glass(i), format="rgba").reformat(format=kind)
            frame.pts, frame.time_base = i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name, encoder, kind, options", [
    ("a.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
    ("b.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}), ("b.mov", "qtrle", "argb", {}),
    ("a.apng", "apng", "rgba", {})])
def test_what_is_transparent_in_a_film_is_shown_over_black_and_said_once(tmp_path, name, encoder, kind, options):
    said = []
    glass_film(tmp_path / name, encoder, kind, options)
    [(clip, _)] = read(tmp_path / name, sizes=[(48, 96)], report=said.append)
    assert abs(areas(clip, 3) - [(200, 40, 40), (100, 20, 20), (0, 0, 0)]).max() <= 4
    assert said == ["transparent: shown over black"]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "palette.png"])
def test_what_is_transparent_in_a_picture_is_shown_over_black_and_said(tmp_path, name):
    said, picture = [], Image.fromarray(glass(0))
    if name == "palette.png":
        picture = picture.quantize(8)
    picture.save(tmp_path / name, lossless=True)
    [(clip, _)] = read(tmp_path / name, sizes=[(48, 96)], frames=1, report=said.append)
    assert abs(areas(clip, 3) - [(200, 40, 40), (100, 20, 20), (0, 0, 0)]).max() <= 2
    assert said == ["transparent: shown over black"]


# ------------------------------------------------------------------------------------------------------------ pictures

def animation(path, count=5, ms=125):
    pictures = [Image.fromarray(picture) for picture in numbered(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=ms, lossless=True)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.gif"])
def test_a_still_picture_is_a_clip_of_one_frame_and_named_where_none_is_wanted(tmp_path, name):
    Image.fromarray(CORNERS).save(tmp_path / name)
    for cuts in ("first", "all"):
        [(clip, size)] = read(tmp_path / name, frames=(1, 17), fps=60, cuts=cuts)
        assert size == (48, 64)
        assert codec.psnr(clip, CORNERS[None]).min() > 25
    assert len(read(tmp_path / name, frames=1, fps=60, cuts="all")) == 1
    assert films.head(tmp_path / name) == films.Head(1, 0, 0, (48, 64), True)
    with pytest.raises(ValueError, match="^a still picture, and clips of 5 frames are wanted"):
        read(tmp_path / name, frames=(5, 17))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.apng"])
def test_an_animated_picture_is_a_film(tmp_path, name):
    animation(tmp_path / "a.png").rename(tmp_path / name) if name == "a.apng" else animation(tmp_path / name)
    [(clip, _)] = read(tmp_path / name)
    assert numbers(clip) == [0, 1, 2, 3, 4]
    [(clip, _)] = read(tmp_path / name, frames=1)
    assert numbers(clip) == [0]
    head = films.head(tmp_path / name)
    assert (head.still, head.size, head.seconds) == (False, (48, 64), pytest.approx(0.625, abs=0.03))


def test_an_animation_that_states_no_times_shows_ten_pictures_a_second_as_browsers_do(tmp_path):
    [(clip, _)] = read(animation(tmp_path / "a.webp", ms=0), fps=10)
    assert numbers(clip) == [0, 1, 2, 3, 4]


def test_pictures_of_every_kind_of_pixel_have_their_colours(tmp_path):
    grey = np.tile(np.uint8([[20, 120, 250]]).repeat(32, 1), (48, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    Image.fromarray(np.uint16(grey) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "grey.jpg", "deep.png"):
        [(clip, _)] = read(tmp_path / name, sizes=[(48, 96)], frames=1)
        assert abs(areas(clip, 3) - np.int16([[20], [120], [250]])).max() <= 1, name
    picture = Image.fromarray(np.dstack([grey, grey[:, ::-1], 0 * grey]))
    picture.quantize(8).save(tmp_path / "palette.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name in ("palette.png", "cmyk.jpg"):
        [(clip, _)] = read(tmp_path / name, sizes=[(48, 96)], frames=1)
        assert abs(areas(clip, 3) - [(20, 250, 0), (120, 120, 0), (250, 20, 0)]).max() <= 3, name


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_half_a_picture_is_named(tmp_path, name):
    Image.fromarray(noise(96, 96, 3)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="^unreadable: "):
        read(tmp_path / name, frames=1)


def test_a_second_picture_in_a_jpeg_is_not_of_a_film(tmp_path):
    first, second = (Image.fromarray(picture) for picture in (CORNERS, CORNERS[:24, :32]))
    first.save(tmp_path / "telephone.jpg", format="MPO", save_all=True, append_images=[second])
    [(clip, _)] = read(tmp_path / "telephone.jpg", frames=1)
    assert codec.psnr(clip, CORNERS[None]).min() > 25


def test_sound_with_a_cover_picture_is_no_film_and_a_film_with_one_is_the_film(tmp_path):
    cover = tmp_path / "cover.jpg"
    Image.fromarray(noise(96, 96, 3)).save(cover)
    image = b"\0image/jpeg\0\3\0" + cover.read_bytes()
    tag = b"APIC" + len(image).to_bytes(4, "big") + b"\0\0" + image
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    with av.open(str(tmp_path / "plain.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        for i in range(9):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1152 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    song = tmp_path / "song.mp3"
    song.write_bytes(b"ID3\3\0\0" + size + tag + (tmp_path / "plain.mp3").read_bytes())
    for use in (read, films.head):
        with pytest.raises(ValueError, match="^no video in it but a cover picture$"):
            use(song)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        attached = container.add_stream("mjpeg", rate=1)
        attached.height, attached.width, attached.pix_fmt = 96, 96, "yuvj420p"
        attached.disposition = Disposition.attached_pic
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i, picture in enumerate(numbered(5)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        packet = av.Packet(cover.read_bytes())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = attached, 0, 0, True
        container.mux(packet)
    assert numbers(read(tmp_path / "a.mp4")[0][0]) == [0, 1, 2, 3, 4]


def test_of_two_videos_in_a_file_the_one_that_players_show_is_taken(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream, disposition in zip(streams, (Disposition(0), Disposition.default)):
            stream.height, stream.width, stream.pix_fmt, stream.disposition = 48, 64, "yuv420p", disposition
        for i, picture in enumerate(numbered(5)):
            for stream, shown in zip(streams, (255 - picture, picture)):
                frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert numbers(read(tmp_path / "a.mkv")[0][0]) == [0, 1, 2, 3, 4]


def test_a_heic_picture_is_named(tmp_path):
    path = film(tmp_path / "a.mp4", numbered(5), range(0, 625, 125))
    path.write_bytes(path.read_bytes().replace(b"ftypisom", b"ftypheic", 1))
    with pytest.raises(ValueError, match="^a HEIC picture: save it as jpg or png"):
        read(path)


def test_the_lines_of_two_fields_become_pictures_of_one_time(tmp_path):
    def bar(left):
        picture = np.full((64, 96, 3), 40, np.uint8)
        picture[:, left:left + 16] = 220
        return picture

    woven = []
    for i in range(8):
        picture = bar(8 + 8 * i)
        picture[1::2] = bar(12 + 8 * i)[1::2]
        woven.append(picture)
    for name, options in (("woven.mp4", {"x264-params": "tff=1", "crf": "5"}), ("whole.mp4", {"crf": "5"})):
        path = film(tmp_path / name, woven, [125 * i for i in range(8)], options=options)
        [(clip, _)] = read(path, sizes=[(64, 96)], frames=8)
        combs = np.abs(np.int16(clip[:, 20:40:2]) - clip[:, 21:41:2]).mean()
        assert combs < 1 if name == "woven.mp4" else combs > 8
        shown = clip[:, 30, :, 0].argmax(1)
        assert abs(shown - [8 + 8 * i for i in range(8)]).max() <= 8


# ------------------------------------------------------------------------------------------------------- films and time

@pytest.mark.parametrize("name, encoder", [("a.ts", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_recording_joined_to_another_goes_on_where_that_ended(tmp_path, name, encoder):
    parts = [steady(tmp_path / f"{i}{name}", numbered(16)[8 * i:8 * i + 8], encoder) for i in range(2)]
    (tmp_path / name).write_bytes(b"".join(part.read_bytes() for part in parts))
    assert numbers(read(tmp_path / name, frames=16)[0][0]) == list(range(16))


def test_joined_recordings_of_two_shapes_are_each_scaled_to_the_size_of_the_first(tmp_path):
    wide = film(tmp_path / "wide.ts", [CORNERS] * 5, range(0, 625, 125))
    tall = film(tmp_path / "tall.ts", [np.rot90(CORNERS).copy()] * 5, range(0, 625, 125))
    (tmp_path / "a.ts").write_bytes(wide.read_bytes() + tall.read_bytes())
    [(clip, _)] = read(tmp_path / "a.ts", frames=9)
    assert codec.psnr(clip[:1], CORNERS[None]).min() > 25
    assert abs(np.median(clip[-1, :16, :24], (0, 1)) - (40, 200, 40)).max() < 12


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_gap_of_an_hour_in_a_recording_is_left_out(tmp_path, name):
    for options in ({"bf": "2"}, {"bf": "0"}):      # of which one states that the picture before lasts an hour
        path = steady(tmp_path / name, numbered(9), times=[0, *range(28800, 28808)], options=options)
        assert numbers(read(path, frames=18, fps=16, report=str)[0][0]) == [i // 2 for i in range(18)]
        path = steady(tmp_path / name, numbered(9), times=[0, 1, 2, 3, *range(28800, 28805)], options=options)
        assert numbers(read(path, frames=9, report=str)[0][0]) == list(range(9))
        assert len(read(path, frames=1, cuts="all", report=str)) == 9


def test_a_gap_is_said_once(tmp_path):
    path, said = steady(tmp_path / "a.mp4", numbered(5), times=[0, 1, 1000, 1001, 2000]), []
    list(films.read_video(path, sizes=[(64, 96)], frames=5, fps=8, report=said.append))
    assert said == ["a picture that stays for 125 s is taken as a gap, and left out"]


def test_a_last_picture_whose_end_is_not_stated_lasts_as_long_as_the_one_before(tmp_path):
    path = steady(tmp_path / "a.flv", numbered(5), "flv")
    assert numbers(read(path, frames=10, fps=16)[0][0]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_picture_may_stay_for_nine_seconds(tmp_path):
    path = film(tmp_path / "a.mp4", numbered(3), [0, 125, 9000])
    assert numbers(read(path, frames=73)[0][0]) == [0] + [1] * 71 + [2]


@pytest.mark.parametrize("name, encoder", [("a.h264", "libx264"), ("a.hevc", "libx265")])
def test_pictures_without_timestamps_last_as_long_as_the_stream_says(tmp_path, name, encoder):
    steady(tmp_path / name, numbered(20), encoder)
    assert numbers(read(tmp_path / name, frames=20)[0][0]) == list(range(20))
    assert films.head(tmp_path / name).seconds == pytest.approx(2.5)


def test_an_avi_of_pictures_that_are_stored_in_another_order_is_read_in_theirs(tmp_path):
    steady(tmp_path / "a.avi", numbered(30), options={"bf": "3", "b_strategy": "0"})
    assert numbers(read(tmp_path / "a.avi", frames=30)[0][0]) == list(range(30))


def test_a_film_goes_to_the_longest_length_that_it_fills(tmp_path):
    path = film(tmp_path / "a.mp4", numbered(12), [125 * i for i in range(12)])
    for frames, expected in (((1, 5, 9, 17), 9), ((17, 5), 5), ((1, 17), 1), (11, 11)):
        [(clip, _)] = read(path, frames=frames)
        assert numbers(clip) == list(range(expected))
    assert [numbers(clip) for clip, _ in read(path, frames=(3, 5), cuts="all")] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [len(clip) for clip, _ in read(path, frames=(1, 7, 4), cuts="all")] == [7, 4]
    with pytest.raises(ValueError, match="^too short: 12 frames at 8 per second, 17 are wanted"):
        read(path, frames=(17, 33))


@pytest.mark.parametrize("count, frames, cuts, expected", [
    (40, 17, "first", [17]), (40, 17, "all", [17, 17]), (16, 17, "all", []), (40, (17, 5), "all", [17, 17, 5]),
    (40, (1, 17), "all", [17, 17]), (9, (1, 17), "all", [1]), (3, 1, "all", [1, 1, 1]), (3, (1,), "first", [1]),
    (0, (1, 5), "all", []), (12, (17, 5), "first", [5])])
def test_lengths_of_clips_are_the_ones_that_films_are_cut_to(tmp_path, count, frames, cuts, expected):
    assert films.lengths(count, frames, cuts) == expected
    if count > 1 and expected:
        path = film(tmp_path / "a.mp4", np.tile(numbered(1), (count, 1, 1, 1)), [125 * i for i in range(count)])
        assert [len(clip) for clip, _ in read(path, frames=frames, cuts=cuts)] == expected


def test_a_film_is_never_held_whole(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", np.tile(numbered(1), (100, 1, 1, 1)), [125 * i for i in range(100)])
    alive, most, fit = weakref.WeakSet(), [], films.fit

    class Frame(np.ndarray):        # which can be counted
        __hash__ = object.__hash__

    def counted(*args):
        frame = fit(*args).view(Frame)
        alive.add(frame)
        most.append(len(alive))
        return frame

    monkeypatch.setattr(films, "fit", counted)
    for clip, _ in films.read_video(path, sizes=[(48, 64)], frames=(5, 7), fps=8, cuts="all"):
        del clip
    assert len(most) >= 98 and max(most) <= 9


def test_the_head_of_a_film_says_what_it_is(tmp_path):
    times = [125 * i for i in range(17)]
    path = film(tmp_path / "a.mp4", numbered(17), times, rotation=90, aspect=Fraction(2, 1))
    head = films.Head(17, pytest.approx(8, rel=0.1), pytest.approx(2.001, abs=0.01), (128, 48), False)
    assert films.head(path) == head
    for live in ("0", "1"):                 # as browsers record: without a duration
        steady(tmp_path / "a.webm", numbered(16), "libvpx", live=live)
        assert films.head(tmp_path / "a.webm") == films.Head(None, 8, pytest.approx(2), (48, 64), False)
    steady(tmp_path / "a.webm", numbered(3), "libvpx", times=[0, 1, 40], live="1")
    assert films.head(tmp_path / "a.webm").seconds >= 5
    (tmp_path / "text.mp4").write_text("no film " * 99)
    with pytest.raises(ValueError, match="^unreadable: "):
        films.head(tmp_path / "text.mp4")


def test_a_name_may_hold_what_ffmpeg_takes_for_a_protocol(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4", numbered(5), range(0, 625, 125)).rename(tmp_path / "http:b.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read("http:b.mp4")) == 1


# ------------------------------------------------------------------------------------------------------------- folders

def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_films_and_pictures_of_a_folder_are_listed_and_what_looks_like_one_is_named(tmp_path):
    used = ["a.mp4", "below/b.MOV", "below/deeper/c.gif", "d.jpg", "e.PNG", "folder.mp4/f.webm", "g.h264"]
    touch(tmp_path, *used, "a.txt", "a.json", "a.wav", "captions.jsonl", "notes.pdf", "Thumbs.db", ".DS_Store",
          "._a.mp4", "README.txt", ".git/config")
    touch(tmp_path, ".hidden.mp4", ".trash/x/y.mkv", "below/.cache/z.webp", "photo.heic", "below/metadata.csv")
    names, passed = films.listed(tmp_path)
    assert names == sorted(used)
    assert passed == {
        ".hidden.mp4": "a hidden file", ".trash": "a hidden folder, with films in it",
        "below/.cache": "a hidden folder, with films in it",
        "photo.heic": "not of an ending that is read: save it as mp4, jpg or png",
        "below/metadata.csv": "not read: captions of all films are in the folder itself"}


def test_a_file_of_another_ending_is_a_film_if_the_caption_beside_it_is_its_own(tmp_path):
    touch(tmp_path, "a.vid", "a.txt", "noending", "noending.txt", "song.mp3", "song.txt", "b.mp4", "b.txt", "b.wav",
          "b.vid", "c.json", "c.txt", "d.mp3", "e.npy", "e.txt")
    names, passed = films.listed(tmp_path)
    assert names == ["a.vid", "b.mp4", "noending", "song.mp3"]
    assert passed == {}


def test_links_are_followed_and_nothing_is_listed_twice(tmp_path):
    touch(tmp_path, "root/a.mp4", "root/z/b.mp4", "elsewhere/c.mp4", "elsewhere/d.mp4")
    root = tmp_path / "root"
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "a_far").symlink_to(root / "z")                     # before z in the alphabet
    (root / "z/loop").symlink_to(root)
    (root / "again.mp4").symlink_to(root / "z/b.mp4")
    (root / "one.mp4").symlink_to(tmp_path / "elsewhere/c.mp4")
    (root / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    (root / "itself.mp4").symlink_to(root / "itself.mp4")
    os.link(root / "a.mp4", root / "z/hard.mp4")
    os.mkfifo(root / "pipe.mp4")
    names, passed = films.listed(root)
    assert names == ["a.mp4", "far/c.mp4", "far/d.mp4", "z/b.mp4"]
    assert passed.pop("a_far") == "the same as z"
    assert passed.pop("z/loop") == f"the same as {root}"
    assert passed.pop("again.mp4") == "the same as z/b.mp4"
    assert passed.pop("z/hard.mp4") == "the same as a.mp4"
    assert passed.pop("gone.mp4") == "No such file or directory"
    assert "symbolic links" in passed.pop("itself.mp4")
    assert passed.pop("pipe.mp4") == "neither a file nor a folder"
    assert passed == {"one.mp4": "the same as far/c.mp4"}


def test_a_name_that_is_not_in_utf_8_is_named(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        open(name, "wb").close()
    except OSError:
        pytest.skip("this disk takes no such name")
    names, passed = films.listed(tmp_path)
    assert names == []
    assert list(passed.values()) == ["its name is not in UTF-8"]
    assert list(passed)[0].isascii()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4", "below/b.mp4")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert films.listed(tmp_path) == (["a.mp4"], {"below": "Permission denied"})


# ------------------------------------------------------------------------------------------------------------ captions

@pytest.mark.parametrize("name, text", [
    ("captions.jsonl", '{"file": "a.mp4", "caption": " one "}\n\n'
                       '{"file": "b/\\u00e9.mp4", "caption": "two\\nlines"}\n'),
    ("metadata.jsonl", '\ufeff{"file_name": "./a.mp4", "text": "one"}\r\n'
                       '{"file_name": "b/e\\u0301.mp4", "text": "two\\nlines"}'),
    ("captions.jsonl", '{"video_path": "ROOT/a.mp4", "caption": "one"}\n'
                       '{"image_path": "b\\\\\\u00e9.mp4", "caption": "two\\nlines"}'),
    ("captions.csv", '\nvideo,score,prompt\na.mp4,1,one\n\nb/é.mp4,2,"two\nlines"\n'),
    ("metadata.csv", '\ufeffFile_Name, Text\r\na.mp4, one\r\nb/é.mp4, "two\r\nlines"\r\n')])
def test_lists_of_captions_are_read_with_the_keys_of_others(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.replace("ROOT", str(tmp_path)).encode())
    assert films.captions(tmp_path) == {"a.mp4": "one", unicodedata.normalize("NFC", "b/é.mp4"): "two\nlines"}


def test_a_folder_may_have_several_lists_or_none(tmp_path):
    assert films.captions(tmp_path) == {}
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.mp4", "caption": None}))
    (tmp_path / "metadata.csv").write_text("file,caption\nb.mp4,\nc.mp4,see\n")
    assert films.captions(tmp_path) == {"a.mp4": "", "b.mp4": "", "c.mp4": "see"}


@pytest.mark.parametrize("name, text, words", [
    ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n\n{"name": "b"}', 'jsonl, line 3: wanted is {"file"'),
    ("captions.jsonl", '{"file": "a.mp4", "caption": "x"', "line 1: wanted is"),
    ("captions.jsonl", '["a.mp4", "x"]', "line 1: wanted is"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": ["x"]}', "line 1: wanted is"),
    ("captions.jsonl", '{"file": "", "caption": "x"}', "line 1: wanted is"),
    ("captions.csv", "file,caption\na.mp4,red, then blue\n", "captions.csv, line 2: wanted is a header such as file,"),
    ("captions.csv", "name,words\na.mp4,red\n", "line 2: wanted is a header"),
    ("captions.csv", 'file,caption\na.mp4,"red\n', "captions.csv, line 2: unexpected end of data; wanted is a header"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": "./a.mp4", "caption": "y"}',
     "captions.jsonl, line 2: a.mp4 has a caption already, by .*captions.jsonl, line 1"),
    ("metadata.csv", "file,caption\né.mp4,x\ne\u0301.mp4,y\n", "line 3: é.mp4 has a caption already, by .*line 2")])
def test_a_wrong_line_of_a_list_is_named_by_its_number(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        films.captions(tmp_path)


def test_a_film_in_two_lists_is_named_with_both(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x"}')
    (tmp_path / "metadata.csv").write_text("file,caption\na.mp4,x\n")
    with pytest.raises(ValueError, match="metadata.csv, line 2: a.mp4 .* by .*captions.jsonl, line 1"):
        films.captions(tmp_path)


def test_text_has_no_mark_and_only_line_feeds_end_its_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\x85\x0b\x0c\r\n\ufefftwo é\r\n".encode())
    assert films.read_text(tmp_path / "a.txt").split("\n") == ["one\u2028still one\x85\x0b\x0c", "two é", ""]
    (tmp_path / "a.txt").write_bytes("\ufeff".encode())
    assert films.read_text(tmp_path / "a.txt") == ""


@pytest.mark.parametrize("encoding, words", [
    ("utf-16", "a.txt is in UTF-16: save it as UTF-8"), ("utf-32", "a.txt is in UTF-32: save it as UTF-8"),
    ("utf-16-le", "a.txt holds zero bytes, as UTF-16 does: save it as UTF-8"),
    ("latin-1", "a.txt, byte 7: not UTF-8: save it as UTF-8")])
def test_text_in_another_encoding_is_named_with_what_to_do(tmp_path, encoding, words):
    text = "a film of a caf" if encoding == "utf-16-le" else "un bel été"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=words):
        films.read_text(tmp_path / "a.txt")
