"""Films, pictures and captions as people have them -> clips and text. Imports nothing of ours.

`listed` names the films in a folder, `captions` and `read_text` read what people wrote of them, `head` says what a film
is, and `read_video` cuts it into training clips. What cannot be used is named with its reason.

h w rows and columns of a film as it is shown · f H W frames, rows, columns of a clip
A video is uint8 (f, H, W, 3) in numpy.
"""
import codecs
import csv
import io
import json
import math
import mimetypes
import os
import posixpath
import stat
import unicodedata
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

FILMS = set((".mp4 .m4v .mov .qt .mkv .webm .avi .divx .wmv .asf .flv .f4v .mpg .mpeg .m2v .vob .ts "
             ".mts .m2ts .3gp .3g2 .ogv .ogm .mxf .rm .rmvb .dv .y4m .ivf .h264 .264 .h265 .265 .hevc "
             ".gif .apng").split())
PICTURES = set(".jpg .jpeg .png .webp .bmp .tif .tiff".split())


# ---- folders ---------------------------------------------------------------------------------------------------------

def listed(root):
    """The films and pictures in a folder and those below it -> (sorted names as paths from it, {name: why passed}).

    Links are followed, and each folder and file is listed once. A file of another ending is a film if it has a caption
    beside it which is no other's. Hidden folders and files with films, and films that are not read, are named.
    """
    names, passed, seen = [], {}, {}
    todo, links = [""], []      # links come last, so that what they lead to keeps its own name
    while todo or links:
        name = todo.pop() if todo else links.pop()
        try:
            name.encode()
            found = os.stat(Path(root, name))
            other = seen.setdefault((found.st_dev, found.st_ino), name)
            if other != name:
                raise ValueError(f"the same as {other or root}")
            if stat.S_ISREG(found.st_mode):
                names.append(name)
                continue
            if not stat.S_ISDIR(found.st_mode):
                raise ValueError("neither a file nor a folder")
            entries = sorted(os.scandir(Path(root, name)), key=lambda entry: entry.name)
        except UnicodeEncodeError:
            passed[ascii(name)] = "its name is not in UTF-8"
            continue
        except FileNotFoundError:
            passed[name] = "a link that leads nowhere"
            continue
        except OSError as error:
            passed[name] = f"unreadable: {error.strerror}"      # what lies there may be as it was
            continue
        except ValueError as reason:
            passed[name] = str(reason)
            continue
        films = films_among([entry.name for entry in entries])
        for entry in reversed(entries):
            below = posixpath.join(name, entry.name)
            linked = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if linked else entry.is_dir()
            if is_folder and entry.name.startswith("."):
                if any(looks(file) for _, _, files in os.walk(entry.path) for file in files):
                    passed[below] = "a hidden folder, with films in it"
            elif is_folder or entry.name in films:
                (links if linked else todo).append(below)
            elif entry.name.startswith("._"):       # a Mac's notes on a file
                continue
            elif looks(entry.name):
                passed[below] = "a hidden file"
            elif (mimetypes.guess_type(entry.name)[0] or "").startswith(("video/", "image/")):
                passed[below] = "not of an ending that is read: save it as mp4, jpg or png"
            elif name and entry.name in LISTS:
                passed[below] = "not read: captions of all films are in the folder itself"
    return sorted(names), passed


def films_among(files):
    """Which files of one folder are films."""
    visible = [name for name in files if not name.startswith(".")]
    films = {name for name in visible if looks(name)}
    stems = {Path(name).stem for name in visible if name.endswith(".txt")}
    stems -= {Path(name).stem for name in films}
    return films | {name for name in visible
                    if Path(name).stem in stems and Path(name).suffix.lower() not in TEXTS}


def looks(name):
    """Whether a file looks like a film or a picture that is read."""
    return Path(name).suffix.lower() in FILMS | PICTURES


# ---- what people wrote -----------------------------------------------------------------------------------------------

TEXTS = set(".txt .json .jsonl .csv .tsv .md .srt .vtt .npy .npz .pt .safetensors .parquet".split())
LISTS = "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv"
FILE = "file file_name filename file_path video video_path image image_path media_path path".split()
CAPTION = "caption text prompt".split()
JSONL = '{"file": "name.mp4", "caption": "text"}'
CSV = "a header such as file,caption and its fields in each line, quoted where they hold commas"
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",      # UTF-16's begins so too
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_text(path):
    """A text file in UTF-8 -> str without byte order marks, its lines ending in "\n": split it by that alone."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file: a text file is wanted")
    content = Path(path).read_bytes()
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is in {name}: save it as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8: save it as UTF-8") from error
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


def caption_of(root, name, lists):
    """A film's caption, by NAME.txt beside it or by the lists of `captions`; None or "" where it has none."""
    beside = (Path(root) / name).with_suffix(".txt")
    caption = lists.get(compose(name))
    if beside.exists():
        other, caption = caption, read_text(beside).strip() or caption
        if other and caption != other:
            raise ValueError(f"two captions, {caption!r} in {beside.name} and {other!r} in a list")
    return caption


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
            if not any(fields):
                continue
            if header is None:
                header = [field.strip().lower() for field in fields]
            else:
                whole = len(fields) == len(header)
                yield lines.line_num, dict(zip(header, fields)) if whole else {}
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

GAP = 10.0              # s; a picture that stays for longer is a gap in the recording
SLACK = 2e-3            # s; files round timestamps, webm to 1 ms
SHARP = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
COVER = Disposition.attached_pic | Disposition.timed_thumbnails
Image.MAX_IMAGE_PIXELS = None           # Pillow takes a panorama for an attack


class Head(NamedTuple):
    frames: int | None      # pictures in it, None where the file does not say
    fps: float              # the film's own, 0 where the file does not say
    seconds: float          # 0 for a still picture
    size: tuple             # (h, w) as shown: turned, with square pixels
    still: bool             # one picture, which makes a clip of one frame


def head(path):
    """A Head by the file's headers and its first picture; ValueError with the bare reason."""
    with opened(path) as (film, stream):
        pictures, still = first_of(film, stream)
        picture = next(pictures)
        h, w = shown(picture, turn_of(picture, film), float(stream.sample_aspect_ratio or 1))
        rate = float(stream.guessed_rate or stream.average_rate or 0)
        seconds = float((stream.duration or 0) * stream.time_base)
        if not seconds:
            seconds = (film.duration or 0) / av.time_base
    if still:
        return Head(1, 0.0, 0.0, (round(h), round(w)), True)
    return Head(stream.frames or None, rate, seconds or measured(path), (round(h), round(w)), False)


def measured(path):
    """The seconds of a film whose headers do not say, as browsers record it: all is read, and not decoded."""
    with opened(path) as (film, stream):
        parts = webp(film.name) if film.format.name == "webp_pipe" else film.demux(stream)
        starts, total = [0.0], 0.0
        for part in parts:
            total += float((part.duration or 0) * (part.time_base or 0))
            if part.pts is not None:
                starts.append(float(part.pts * part.time_base))
    return max(total, max(starts) - min(starts))


def lengths(count, frames, cuts="first"):
    """The clips that `count` frames of a film make, as their lengths; frames: a length, or several to choose from.

    cuts: "first" = one, of the longest length that they fill; "all" = as many of that as they fill, and likewise with
    what is left. Beside longer lengths, one frame is a clip only of a film that fills none of them, and one only.
    """
    choice = sorted([frames] if isinstance(frames, int) else set(frames), reverse=True)
    made = []
    for length in choice:
        if length > 1 or choice == [1]:
            made += [length] * (count // length)
            count %= length
    if not made and count and choice[-1] == 1:
        made = [1]
    return made[:1] if cuts == "first" else made


@contextmanager
def opened(path):
    """A film and its video stream; what FFmpeg says of the file becomes a ValueError with the bare reason."""
    if Path(path).stat().st_size == 0:
        raise ValueError("empty")
    try:
        with av.open(os.path.abspath(path)) as film:    # FFmpeg takes a in a:b.mp4 for a protocol
            streams = [stream for stream in film.streams.video if not stream.disposition & COVER]
            if not streams:
                cover = " but a cover picture" if film.streams.video else ""
                raise ValueError(f"no video in it{cover}")
            if film.metadata.get("major_brand", "")[:3] in ("hei", "mif", "msf"):   # of many tiles
                raise ValueError("a HEIC picture: save it as jpg or png")
            best = film.streams.best("video")
            yield film, best if best in streams else streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"unreadable: {error.strerror}") from error


def is_still_format(film):
    """Whether a file is of a format of pictures, some of which may move."""
    return film.format.name.endswith("_pipe") or film.format.name in ("image2", "apng")


def is_picture(film):
    """Whether its format holds one picture; a second one in the file is a telephone's depth map or the like."""
    return is_still_format(film) and film.format.name not in ("webp_pipe", "apng")


def first_of(film, stream):
    """The pictures of a film, of which there is one at least, and whether there is one only."""
    pictures = parted(decoded(film, stream), stream)
    first = list(islice(pictures, 1 if is_picture(film) else 2))
    if not first:
        raise ValueError("no pictures in it")
    return chain(first, pictures if len(first) == 2 else []), len(first) == 1


def decoded(film, stream):
    """The pictures of a film in the order in which they are shown."""
    alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if film.format.name == "webp_pipe":
        yield from webp(film.name)
    elif alpha and stream.metadata.get("alpha_mode") == "1":    # FFmpeg's own decoders leave it out
        decoder = av.CodecContext.create(alpha, "r")
        for packet in film.demux(stream):
            yield from decoder.decode(packet)
    else:
        if stream.codec_context.name == "mjpeg" and is_picture(film):
            stream.codec_context.options = {"err_detect": "explode"}    # half a file is no picture
        for picture in film.decode(stream):
            if film.format.name == "avi":       # its times are of decoding, whatever FFmpeg says
                picture.pts = picture.dts
            yield picture


def parted(pictures, stream):
    """Pictures of two fields, taken one after the other, become pictures of one time; the others are as they were."""
    first = next(pictures, None)
    pictures = chain([first] if first else [], pictures)
    if first is None or not first.interlaced_frame:
        yield from pictures
        return
    graph = av.filter.Graph()
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(graph.add_buffer(template=stream), bwdif, graph.add("buffersink")).configure()
    for picture in chain(pictures, [None]):
        graph.vpush(picture)
        while True:
            try:
                yield graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                break


def webp(path):
    """The pictures of a webp file, animated or not: FFmpeg does not read animated ones."""
    time = 0
    try:
        with Image.open(path) as image:
            for i in range(image.n_frames):
                image.seek(i)
                rgba = np.asarray(image.convert("RGBA"))
                picture = av.VideoFrame.from_ndarray(rgba, format="rgba")
                picture.pts, picture.time_base = time, Fraction(1, 1000)
                picture.duration = int(image.info.get("duration") or 100)
                time += picture.duration
                yield picture
    except (OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"unreadable: {error}") from error


def read_video(path, *, sizes, frames, fps, cuts="first", report=print):
    """Clips of a film -> yields (video uint8 (f, H, W, 3), (H, W)); the size is that of `sizes` nearest in shape.

    sizes: [(H, W)] in pixels; frames, cuts: see `lengths`; fps: of a clip, whatever the film's rate is and if it varies
    too; report: is told in a line what was done to a film that its owner may not expect. "first" reads no further.
    A picture is turned and mirrored as the file says, scaled with square pixels to cover the size, and cropped at the
    centre; HDR becomes SDR, what is transparent becomes black.
    Raises ValueError with the bare reason, for the caller to name the file: unreadable, empty, too short for one clip.
    """
    choice = sorted([frames] if isinstance(frames, int) else set(frames))
    held, made, last, scaler = [], False, None, VideoReformatter()
    with opened(path) as (film, stream):
        stream.thread_type = "AUTO"
        pictures, still = first_of(film, stream)
        first = next(pictures)
        turn, aspect = turn_of(first, film), float(stream.sample_aspect_ratio or 1)
        h, w = shown(first, turn, aspect)
        size = nearest(sizes, h, w)
        if still and choice[0] > 1:
            raise ValueError(f"a still picture, and clips of {choice[0]} frames are wanted")
        usual = 1 / float(stream.guessed_rate or fps)
        timeline = [first] if still else at_rate(timed(chain([first], pictures), usual, report), fps)
        reported = False
        for picture in timeline:
            if picture is not last:
                flat, clear = over_black(picture)
                frame = fit(flat, size, turn, aspect, scaler)
                last = picture
                if clear and not reported:
                    report("transparent: shown over black")
                    reported = True
            held.append(frame)
            if len(held) == choice[-1]:
                yield np.stack(held), size
                held, made = [], True
                if cuts == "first":
                    return
    rest = [length for length in lengths(len(held), choice, cuts) if length > 1 or not made]
    if not rest and not made:
        raise ValueError(f"too short: {len(held)} frames at {fps:g} per second, "
                         f"{choice[0]} are wanted")
    for length in rest:
        yield np.stack(held[:length]), size
        del held[:length]


def nearest(sizes, h, w):
    """The size (H, W) that is nearest in log aspect to a picture of h rows and w columns."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(w / h)))


def timed(pictures, usual, report):
    """Each picture and for how long it is on show, in seconds, by its timestamp and that of the next.

    Where timestamps begin again (recordings that were joined), are missing, or leave a GAP, a picture lasts as long as
    the file states, else as long as the one before it; usual: s, for the first. The first gap is reported.
    """
    before, clock, reported = None, 0.0, False
    for picture in chain(pictures, [None]):
        if before is not None:
            lasts = float(before.duration * before.time_base) or usual
            if lasts > GAP:
                lasts = min(usual, GAP)
            if picture is None:
                lasts = max(lasts, 2 * SLACK)
            elif picture.time is not None and 0 <= picture.time - clock <= GAP:
                lasts = picture.time - clock
            elif picture.time is not None and picture.time > clock and not reported:
                report(f"a picture that stays for {picture.time - clock:.0f} s is taken as a gap, and left out")
                reported = True
            yield before, lasts
            clock += lasts
            usual = lasts or usual
        if picture is not None and picture.time is not None:
            clock = picture.time
        before = picture


def at_rate(timeline, fps):
    """The picture on show at 0, 1/fps, 2/fps ... seconds after the first, until the last one's end."""
    end, count = 0.0, 0
    for picture, lasts in timeline:
        end += lasts
        while count / fps + SLACK < end:
            yield picture
            count += 1


# ---- pictures --------------------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    swap: bool = False      # rows become columns, first of all
    across: int = 1         # -1 = then left and right change places
    down: int = 1           # -1 = top and bottom


EXIF = {2: Turn(across=-1), 3: Turn(False, -1, -1), 4: Turn(down=-1),
        5: Turn(True), 6: Turn(True, -1, 1), 7: Turn(True, -1, -1), 8: Turn(True, 1, -1)}


def turn_of(picture, film):
    """How a picture is turned and mirrored to be shown: by the film's display matrix, or by a picture's EXIF."""
    if is_still_format(film):
        try:
            with Image.open(film.name) as image:
                return EXIF.get(image.getexif().get(0x112), Turn())
        except OSError:     # a format that FFmpeg alone knows
            return Turn()
    try:
        matrix = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:      # PyAV lists none where there is a kind that it does not know
        turns = round(picture.rotation / 90) % 4                        # counter-clockwise
        return [Turn(), EXIF[8], EXIF[3], EXIF[6]][turns]
    if matrix is None:
        return Turn()
    a, b, _, c, d = map(int, np.frombuffer(matrix, np.int32)[:5])   # x -> a x + c y, y -> b x + d y
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    if swap:
        a, d = c, b
    return Turn(swap, -1 if a < 0 else 1, -1 if d < 0 else 1)


def shown(picture, turn, aspect):
    """h and w of a picture as it is shown, with square pixels; aspect: a stored pixel's width by its height."""
    h, w = picture.height, picture.width * aspect
    return (w, h) if turn.swap else (h, w)


def fit(picture, size, turn, aspect, scaler):
    """A picture scaled to cover the size, turned, cropped at the centre -> uint8 (H, W, 3)."""
    H, W = size
    h, w = shown(picture, turn, aspect)
    cover = max(H / h, W / w)
    h, w = max(H, round(h * cover)), max(W, round(w * cover))
    top, left = (h - H) // 2, (w - W) // 2
    if turn.swap:
        h, w = w, h
    hdr = picture.color_trc in (PQ, HLG)
    rgb = scaler.reformat(picture, w, h, "rgb48le" if hdr else "rgb24", interpolation=SHARP,
                          src_colorspace=space_of(picture), threads=1).to_ndarray()
    if turn.swap:
        rgb = rgb.swapaxes(0, 1)
    rgb = rgb[::turn.down, ::turn.across][top:top + H, left:left + W]
    return to_sdr(rgb, picture) if hdr else rgb


def space_of(picture):
    """The matrix of a picture's colours, numbered as FFmpeg does; of one that does not say, what players take."""
    unknown, bt709, bt601, bt2020 = 2, 1, 5, 9
    if picture.colorspace != unknown:
        return picture.colorspace
    if picture.color_trc in (PQ, HLG):
        return bt2020
    return bt709 if picture.width >= 1280 or picture.height > 576 else bt601


def over_black(picture):
    """A picture with what is transparent in it black, and whether anything is."""
    kind = picture.format
    if not kind.has_palette and not any(part.is_alpha for part in kind.components):
        return picture, False
    rgba = picture.reformat(format="rgba", interpolation=SHARP, threads=1,
                            src_colorspace=space_of(picture)).to_ndarray()
    alpha = np.uint16(rgba[..., 3:])
    if alpha.min() == 255:
        return picture, False
    rgb = np.uint8((rgba[..., :3] * alpha + 127) // 255)
    flat = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    flat.color_trc, flat.color_primaries = picture.color_trc, picture.color_primaries
    return flat, True


# ---- HDR -------------------------------------------------------------------------------------------------------------

PQ, HLG = 16, 18                                            # as FFmpeg numbers them
BT709 = np.float32([[1.660491, -0.587641, -0.072850],       # of light in BT.2020
                    [-0.124550, 1.132900, -0.008349],
                    [-0.018151, -0.100579, 1.118730]])
LUMA = np.float32([0.2627, 0.6780, 0.0593])


def to_sdr(rgb, picture):
    """HDR (H, W, 3) of 16 bits, of a picture -> uint8: to light, to BT.709's primaries, and to SDR by one curve."""
    if picture.format.is_rgb:
        white = 65535
    else:
        white = 65472 if picture.color_range == 2 else 65280    # as swscale writes it
    nits = decode(picture.color_trc, white)[rgb]
    if picture.color_trc == HLG:    # the OOTF of a display of 1,000 nits
        nits = 1000 * nits * (nits @ LUMA)[..., None]**np.float32(0.2)
    if picture.color_primaries != 1:
        nits = nits @ BT709.T
    return np.uint8(np.round(255 * tone(nits)))


@lru_cache(maxsize=4)
def decode(curve, white):
    """Of each code of 16 bits, `white` and above being 1: nits for PQ, for HLG the light of the scene in [0, 1]."""
    x = np.minimum(np.arange(65536) / white, 1)
    if curve == PQ:                                         # SMPTE ST 2084
        x = x**(32 / 2523)
        y = np.maximum(x - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * x)
        return np.float32(10000 * y**(8192 / 1305))
    a, b, c = 0.17883277, 0.28466892, 0.55991073            # BT.2100
    return np.float32(np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12))


def tone(nits):
    """Nits -> SDR in [0, 1], as BT.1886 shows it: straight in light to 100, then bent, 0.9 at 203, 1 at 10,000."""
    bent = np.maximum(nits - 100, 0)
    shown = 0.00522305 * (np.clip(nits, 0, 100) + bent / (1 + 0.01083287 * bent))
    return np.minimum(shown, 1)**np.float32(1 / 2.4)
