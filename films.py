"""Films, pictures and captions as people have them -> clips and text. Imports nothing of ours.

`listed` names the films in a folder, `captions` and `read_text` read what people wrote of them, `head` says what a film
is, and `read_video` cuts it into training clips. What cannot be used is named with its reason.

f h w frames, rows, columns of a film · H W of a clip
A video is uint8 (f, H, W, 3) in numpy.
"""
import codecs
import csv
import io
import json
import math
import os
import posixpath
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

FILMS = set(".mp4 .m4v .mov .mkv .webm .avi .wmv .flv .mpg .mpeg .ts .mts .3gp .ogv .gif".split())
PICTURES = set(".jpg .jpeg .png .webp .bmp .tif .tiff".split())
LISTS = "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv"
FILE = "file file_name filename file_path video video_path image image_path media_path path".split()
CAPTION = "caption text prompt".split()
JSONL = '{"file": "name.mp4", "caption": "text"}'
CSV = "a header with file and caption, and as many fields in each line: a comma in a caption needs double quotes around it"
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",      # first: UTF-16's is its beginning
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
SHARP = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


# ---- folders ---------------------------------------------------------------------------------------------------------

def listed(root):
    """The films and pictures in a folder and those below it -> (sorted names as paths from it, {name: why passed})."""
    names, passed = [], {}

    def unreadable(error):
        passed[Path(error.filename).relative_to(root).as_posix()] = str(error)

    for folder, _, files in os.walk(root, onerror=unreadable):
        for file in files:
            if Path(file).suffix.lower() in FILMS | PICTURES and not file.startswith("."):
                names.append(Path(folder, file).relative_to(root).as_posix())
    return sorted(names), passed


# ---- what people wrote -----------------------------------------------------------------------------------------------

def read_text(path):
    """A text file in UTF-8 -> str without byte order marks, its lines ending in "\n": split it by that alone."""
    content = Path(path).read_bytes()
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is in {name}: save it as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes, as UTF-16 does: save it as UTF-8")
    return text.replace("\ufeff", "").replace("\r\n", "\n")


def captions(root):
    """{name below the folder, composed: caption} of its files LISTS; {} where there is none, "" where one is empty."""
    found, places = {}, {}
    for path in (Path(root) / name for name in LISTS):
        if not path.exists():
            continue
        rows, wanted = (rows_of_csv, CSV) if path.suffix == ".csv" else (rows_of_jsonl, JSONL)
        for number, row in rows(path):
            place = f"{path}, line {number}"
            file = next((row[key] for key in FILE if key in row), None)
            caption = next((row[key] or "" for key in CAPTION if key in row), None)
            if not isinstance(file, str) or not file.strip() or not isinstance(caption, str):
                raise ValueError(f"{place}: wanted is {wanted}")
            name = name_in(root, file)
            if name in places:
                raise ValueError(f"{place}: {name} has a caption already, by {places[name]}")
            found[name], places[name] = caption.strip(), place
    return found


def rows_of_jsonl(path):
    """(number, {key: value}) of each line that is not blank; {} for one that is no object."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else {}


def rows_of_csv(path):
    """(number of its last line, {column: field}) of each row; {} for one that has not as many fields as the header."""
    header = None
    lines = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True, strict=True)
    try:
        for fields in lines:
            if header is None:
                header = [field.strip().lower() for field in fields]
            elif any(fields):
                yield lines.line_num, dict(zip(header, fields)) if len(fields) == len(header) else {}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}; wanted is {CSV}") from error


def name_in(root, file):
    """A film as a list names it -> as `listed` does, composed: a path from the folder, by slashes."""
    path = Path(posixpath.normpath(file.strip().replace("\\", "/")))
    for folder in (Path(root).absolute(), Path(root).resolve()):
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
    return compose(path.as_posix())


def compose(name):
    """A name with its accents in one form: systems differ on whether an é is one letter or two."""
    return unicodedata.normalize("NFC", name)


# ---- films -----------------------------------------------------------------------------------------------------------

class Head(NamedTuple):
    frames: int | None      # pictures in it, None where the file does not say
    fps: float              # of the film, on average
    seconds: float
    size: tuple             # (h, w) as shown: turned, with square pixels
    still: bool             # one picture


def head(path):
    """A Head from a film's headers and its first picture; ValueError with the bare reason."""
    with opened(path) as (film, stream):
        picture = next(film.decode(stream), None)
        if picture is None:
            raise ValueError("no pictures in it")
        h, w = picture.height, picture.width * float(stream.sample_aspect_ratio or 1)
        if round(picture.rotation / 90) % 2:
            h, w = w, h
        seconds = float((stream.duration or 0) * stream.time_base) or (film.duration or 0) / 1e6
        rate = float(stream.average_rate or 0)
        still = stream.frames == 1 or film.format.name.endswith("_pipe")
        return Head(stream.frames or None, rate, seconds, (round(h), round(w)), still)


def lengths(count, frames, cuts="first"):
    """The clips that `count` frames make, as their lengths; frames: the lengths that a clip may have.

    cuts: "first" = one, the longest that they fill; "all" = as many of the longest as they fill, and of what is left
    likewise. A single frame is a clip only of a film that fills no longer one.
    """
    made = []
    for length in sorted(frames, reverse=True):
        while count >= length and (length > 1 or not made or max(frames) == 1):
            made.append(length)
            count -= length
            if cuts == "first" or length == 1 < max(frames):
                return made
    return made


@contextmanager
def opened(path):
    """A film and its video stream; what FFmpeg says of it becomes a ValueError with the bare reason."""
    if Path(path).stat().st_size == 0:
        raise ValueError("empty")
    try:
        with av.open(path) as film:
            stream = film.streams.best("video")
            if stream is None:
                raise ValueError("no video in it")
            yield film, stream
    except av.FFmpegError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error


def read_video(path, *, sizes, frames, fps, cuts="first", report=print):
    """Clips of a film -> yields (video uint8 (f, H, W, 3), (H, W)); the size is that of `sizes` nearest in shape.

    sizes: [(H, W)] in pixels; frames: of a clip, a number or several: see `lengths`; fps: of a clip, whatever the
    film's rate is and if it varies too; cuts: "first" = the clip at the beginning, reading no further, "all" =
    consecutive clips, dropping the rest; report: is told what was done to a film that its owner may not expect.
    A picture is turned as the file says, scaled with square pixels to cover the size, and cropped at the centre.
    Raises ValueError with the bare reason, for the caller to name the file: unreadable, empty, too short for one clip.
    """
    frames = sorted({frames} if isinstance(frames, int) else set(frames))
    longest, held, fit, made = frames[-1], [], None, False
    with opened(path) as (film, stream):
        stream.thread_type = "AUTO"
        for picture in at_rate(film.decode(stream), fps):
            if fit is None:
                size, fit = framing(picture, float(stream.sample_aspect_ratio or 1), sizes)
            held.append(fit(picture))
            if len(held) == longest:
                yield np.stack(held), size
                held, made = [], True
                if cuts == "first":
                    return
    rest = [length for length in lengths(len(held), frames, cuts) if length > 1 or not made]
    if not rest and not made:
        raise ValueError(f"too short: {len(held)} frames at {fps:g} per second, {frames[0]} are wanted")
    for length in rest:
        yield np.stack(held[:length]), size
        del held[:length]


def at_rate(pictures, fps):
    """The picture on show at 0, 1/fps, 2/fps ... seconds after the first, by timestamp, until the last one's end."""
    slack = 2e-3                            # s; files round timestamps, webm to 1 ms
    shown, count, lasts = None, 0, 1 / fps
    for picture in pictures:
        if picture.time is None:
            raise ValueError("pictures without timestamps")
        if shown is None:
            start = picture.time
        else:
            lasts = picture.time - shown.time
            while start + count / fps + slack < picture.time:
                yield shown
                count += 1
        shown = picture
    if shown is not None:
        end = shown.time + max(float(shown.duration * shown.time_base) or lasts, 2 * slack)
        while start + count / fps + slack < end:
            yield shown
            count += 1


def framing(picture, pixel_aspect, sizes):
    """A film's first picture -> the size nearest in log aspect, and the function picture -> uint8 (H, W, 3).

    pixel_aspect: how many times as wide as high a stored pixel is.
    """
    turns = round(picture.rotation / 90) % 4                    # quarter turns, counter-clockwise
    h, w = picture.height, picture.width * pixel_aspect
    if turns % 2:
        h, w = w, h
    H, W = min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(w / h)))
    cover = max(H / h, W / w)
    h, w = max(H, round(h * cover)), max(W, round(w * cover))   # as shown
    top, left = (h - H) // 2, (w - W) // 2
    width, height = (h, w) if turns % 2 else (w, h)             # as stored
    scaler = VideoReformatter()

    def fit(picture):
        rgb = scaler.reformat(picture, width, height, "rgb24", interpolation=SHARP, threads=1)
        return np.rot90(rgb.to_ndarray(), turns)[top:top + H, left:left + W]

    return (H, W), fit
