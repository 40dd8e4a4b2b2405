"""Makes a dataset of latents and text embeddings: the folder that train.py and distill.py read.

    python prepare.py                                                       built-in moving shapes
    python prepare.py --videos=DIR --out=data/mine                          a folder of films with captions
    python prepare.py --videos=DIR --codec=wan --vae=WAN --text=WAN         the same by Wan's VAE and UMT5
    python prepare.py --videos=DIR --image --codec=wan --vae=WAN --text=WAN     for image-to-video models
    python prepare.py --parquet=DIR --codec=wan --vae=WAN --text=WAN        latents that FastVideo made
    python prepare.py --prompts=FILE --shape 24 5 8 8                       prompts alone, to distil from

Under torchrun each rank encodes its share. Interrupted, the same command goes on where it was. Given again later, it
makes again what has changed, adds what is new and drops what is gone; of a caption that has changed, the embedding
alone. Nothing that a running training reads is touched. Imports store and leaves.

C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import json
import math
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import ckpt
import codec
import films
import flags
import parallel
import shapes
from data import DTYPES, crc32_of, listed, stream, stride
from store import Journals, Nothing, Writer, check_settings, text_crc32, unit_of, write_whole


@dataclass(frozen=True)
class Config:
    """Make a dataset of moving shapes, or of --videos, --prompts or --parquet. Flags left None take their DEFAULTS."""

    # what
    videos: str | None = None           # folder of films; captions in NAME.txt, .jsonl or .csv
    prompts: str | None = None          # file with a prompt per line, for a dataset without latents
    parquet: str | None = None          # folder of parquet files from FastVideo's preprocessing
    clips: int = 4000                   # how many moving shapes to draw, without these three
    seed: int = 0                       # random seed of the moving shapes
    short_captions: float = 0.0         # share of moving shapes whose caption says the direction alone
    out: str | None = None              # the dataset's folder; None = data/ and the source's name
    compact: bool = False               # at the end, free the disk of what was replaced or dropped
    dry_run: bool = False               # print what would be made, by the files' headers, then exit

    # clips
    sizes: tuple[str, ...] | None = None            # HEIGHTxWIDTH; films are cropped to the nearest
    frames: int | tuple[int, ...] | None = None     # of a clip; several: the most it fills; 1: stills
    fps: float | None = None                        # frames per second of clips, whatever the film's
    cuts: Literal["first", "all"] = "first"         # a film's first clip; all: the longest that fit
    caption: str | None = None                      # caption of films without one; None = skip these
    shape: tuple[int, int, int, int] | None = None  # C F H W of latents to distil from --prompts
    image: bool = False                             # store what image-to-video models are shown too
    last_frame: bool = False                        # with --image: a clip's last frame beside its first

    # codec
    codec: Literal["dct", "wan"] = "dct"            # dct is built in; wan needs --vae and --text
    vae: str | None = None                          # Wan's VAE: a diffusers folder or hub id
    text: str | None = None                         # Wan's text encoder UMT5: likewise
    clip: str | None = None                         # with --image, for Wan 2.1: CLIP, likewise
    text_length: int | None = None                  # tokens that a caption may have
    negative: str = ""                              # prompt of dropout's and guidance's null text
    dtype: Literal["bf16", "fp32"] = "bf16"         # precision of stored latents and text
    device: Literal["auto", "cpu", "cuda"] = "auto" # where the wan codec computes; dct uses the CPU


DEFAULTS = {    # of flags left None
    "shapes": dict(sizes=("32x32",), frames=17, fps=8, text_length=8),
    "dct": dict(sizes=("64x64", "64x96", "96x64"), frames=17, fps=8, text_length=64),
    "wan": dict(sizes=("480x832", "832x480"), frames=81, fps=16, text_length=512),
}
ONLY = {  # flags that do something for these sources only
    "clips": {"shapes"}, "seed": {"shapes"}, "short_captions": {"shapes"},
    "sizes": {"shapes", "videos"}, "frames": {"shapes", "videos"},
    "cuts": {"videos"}, "caption": {"videos"}, "shape": {"prompts"},
    "image": {"shapes", "videos"}, "last_frame": {"shapes", "videos"}, "clip": {"shapes", "videos"},
}


def main(cfg):
    with flags.door(__file__):
        cfg = resolve(cfg)
        world = parallel.init(cfg.device if cfg.codec == "wan" else "cpu")
        coder = codec.load(cfg.codec, vae=cfg.vae, text=cfg.text, clip=cfg.clip,
                           device=world.device, text_length=cfg.text_length)
        check_fit(cfg, coder)
        embed = lru_cache(256)(lambda caption: coder.embed([caption])[0])
        null = embed(cfg.negative)
        fidelity = []
        encoder = coder._replace(encode=partial(measured, coder, fidelity))
        kind, source = source_of(cfg)
        source = source(cfg, encoder, embed)
        if cfg.dry_run:
            if world.rank == 0:
                foretell(cfg, coder, kind, source)
            return
        ckpt.claim(cfg.out, **world.ranks)
        writer = Writer(cfg.out, spec_of(cfg, coder), world.rank)
    clear(cfg.out, world)

    # shard the full list, so that ranks agree although each has finished other names
    names = source.names(writer.done)
    mine = names[world.rank::world.size]
    todo = [work for name in mine if (work := work_on(name, source, writer.done, coder.spec))]
    before = ""
    if len(todo) < len(mine):
        before = f", {len(mine) - len(todo):,} of rank 0's {len(mine):,} done before"
    if world.rank == 0:
        todo = gone(names, source, writer.done) + todo
        for name, reason in source.passed.items():
            world.say(f"skipped {Path(cfg.videos) / name}: {reason}")
    world.say(f"{len(names):,} {kind} -> {cfg.out}{before}")

    reasons, changed = [], []
    with tqdm(total=len(mine), initial=max(len(mine) - len(todo), 0), unit=f" {kind}",
              disable=world.rank > 0, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for work in todo:
            became, reason = carry_out(work, source, embed, writer)
            if became:
                changed.append((became, work.name))
            if reason:
                bar.write(f"skipped {work.name}: {reason}")
                reasons.append(reason)
            bar.update()
    writer.save()

    reports = wait_for_all(cfg.out, {"reasons": reasons, "changed": changed}, world)
    with flags.door(__file__):
        if world.rank == 0:
            reasons = [reason for report in reports for reason in report["reasons"]]
            changed = [change for report in reports for change in report["changed"]]
            way = way_out(reasons, len(names), cfg, coder, kind)
            finish(writer, null, cfg, coder, changed, len(reasons), kind, way)
            if fidelity:
                world.say("the codec gives back a clip's frames at "
                          f"{np.median(fidelity):.1f} dB PSNR, the first {len(fidelity)} clips' median")
            if way:
                world.say(way)
    clear(cfg.out, world)


def finish(writer, null, cfg, coder, changed, skipped, kind, way):
    """Makes a dataset of what is stored, and says what it holds and what has changed since it was made last."""
    before = writer.done.manifest
    mean, std = coder.spec.get("mean"), coder.spec.get("std")
    try:
        manifest = writer.finish(null, mean, std, half_power=cfg.codec == "dct")
    except Nothing as error:
        if not before:
            writer.remove()
            abandon(Path(cfg.out))
        if not way:
            way = "the reasons are named above"
        raise ValueError(f"none of the {kind} can be used: {way}") from error
    if news := summary(changed, before, manifest, kind):
        print(f"{cfg.out}: {news}")
    if cfg.compact:
        freed = writer.compact() / 1e6
        print(f"{cfg.out}: {freed:,.0f} MB of what was replaced or dropped are free again")
        manifest = writer.done.manifest
    buckets = ", ".join(f"{b['count']:,} of {'x'.join(map(str, b['shape']))}"
                        for b in manifest["buckets"])
    size = sum(file["size"] for file in manifest["files"].values())
    missing = f"; {skipped} {kind} skipped, named above" if skipped else ""
    print(f"{cfg.out}: {buckets}, {size / 1e6:,.0f} MB{missing}")


def abandon(out):
    """Removes a folder that holds no more than what says who works in it."""
    for file in (out / ".owner", out / ".lock", *out.glob("finished.*")):
        file.unlink(missing_ok=True)
    with suppress(OSError):     # it holds other things
        out.rmdir()


# ---- what there is to do, and what has changed ----------------------------------------------------------------------

class Work(NamedTuple):
    """What is to be done for a name."""
    name: str
    what: str
    edition: int = 0    # of the lines that this will write
    reason: str = ""    # why nothing can be made


NEW, BEGUN, CAPTION, REPLACED, GONE = "new", "begun", "caption", "replaced", "gone"
# stored, and as it should be for all we know
TOUCHED, UNKNOWN, UNREADABLE = "touched", "unknown", "unreadable"
CHANGES = NEW, CAPTION, REPLACED, GONE, UNKNOWN
HEAD = 1 << 16          # bytes of a film by which it is known again


class Seen(NamedTuple):
    """What a name stands for now."""
    caption: str | None     # None = its samples have captions of their own
    source: str
    path: Path | None       # the file that it is made from


def work_on(name, source, done, spec):
    """What is to be done for a name, None where all that is stored is as it should be. Reads no more than it must."""
    here = done.stored(name)
    after = here.edition + 1
    if not here.live:
        return Work(name, NEW, after)
    try:
        seen = source.look(name)
        film = fingerprint(seen.path, here.film, source.head)
    except ValueError as reason:
        return Work(name, GONE, after, str(reason))
    except OSError as reason:
        return Work(name, UNREADABLE, after, str(reason))
    same_text = seen.caption is None or text_crc32(seen.caption, spec) == here.text
    if here.film and film[::2] != here.film[::2]:           # its size, its head
        return Work(name, REPLACED, after)
    if not here.whole:
        return Work(name, BEGUN, here.edition) if same_text else Work(name, REPLACED, after)
    if not same_text:
        return Work(name, CAPTION, after)
    if film != here.film:
        return Work(name, TOUCHED if here.film else UNKNOWN, after)
    return None


def fingerprint(path, before, head):
    """A file's size, time and the CRC32 of its head, which is as `before` where size and time are; None of no file."""
    if path is None:
        return None
    found = path.stat()
    if before and before[:2] == [found.st_size, found.st_mtime_ns]:
        return before
    return [found.st_size, found.st_mtime_ns, crc32_of(path, head)]


def gone(names, source, done):
    """What is stored and not there any more. A folder that could not be listed is no reason to think so."""
    unread = {name for name, why in source.passed.items() if why.startswith("unreadable")}
    missing = [name for name in done.others(names) if unread.isdisjoint(above(name))]
    return [Work(name, GONE, done.stored(name).edition + 1) for name in missing]


def above(name):
    """A name and the folders that it lies in."""
    return {name, "", *(folder.as_posix() for folder in Path(name).parents)}


def carry_out(work, source, embed, writer):
    """Does one piece of work -> (what of it has become, None where no one need know; why nothing was made, or "")."""
    name, what, edition, reason = work
    if what == GONE:
        writer.drop(name, edition)
        return GONE, reason
    if what == UNREADABLE:
        return None, reason
    stored, key = what == BEGUN, name
    try:
        seen, film = looked_at(name, source, writer.done.stored(name).film)
        for sample in readable(pieces(work, seen, source, embed, writer.done)):
            writer.add(**sample, edition=edition, film=film)
            stored, key = True, sample["key"]
    except ValueError as error:
        if not stored and what in (CAPTION, REPLACED):      # nothing that is stale stays
            writer.drop(name, edition)
            return GONE, str(error)
        if not stored or isinstance(error, Unreadable):     # tried again next time
            return None, str(error)
        reason = str(error)
    if key != name or what in (TOUCHED, UNKNOWN):           # its samples have keys of their own
        text = None if seen.caption is None else writer.text_crc32(seen.caption)
        writer.mark(name, edition, text, film)
    return what if what in CHANGES else None, reason


def pieces(work, seen, source, embed, done):
    """The samples that a piece of work adds; where the caption alone has changed, its embedding."""
    if work.what == CAPTION:
        yield dict(latent=None, text=embed(seen.caption), caption=seen.caption,
                   source=seen.source, key=work.name)
    elif work.what in (NEW, BEGUN, REPLACED):
        def is_stored(key):
            line = done.find(key)
            return line is not None and line.edition == work.edition

        yield from source.samples(work.name, seen.caption, is_stored)


class Unreadable(ValueError):
    """The system cannot read a film: a reason to skip it, and go on.

    What fails in writing (a full disk) is raised elsewhere, and ends the run.
    """


def readable(samples):
    """The samples of a film, or Unreadable."""
    try:
        yield from samples
    except OSError as error:
        raise Unreadable(str(error)) from error


def looked_at(name, source, before):
    """-> Seen and fingerprint of a name, or Unreadable."""
    try:
        seen = source.look(name)
        return seen, fingerprint(seen.path, before, source.head)
    except OSError as error:
        raise Unreadable(str(error)) from error


def summary(changed, before, manifest, kind):
    """What a dataset that was there before has become, in one line; "" where it is as it was."""
    names = {}
    for what, name in changed:
        names.setdefault(what, []).append(name)
    n = Counter(what for what, _ in changed)
    if kind == "prompts":                                   # a line that was corrected
        n[CAPTION] += min(n[NEW], n[GONE])
        n.subtract({what: min(n[NEW], n[GONE]) for what in (NEW, GONE)})
    texts = count_of(n[CAPTION], f"{'prompt' if kind == 'prompts' else 'caption'}") + " changed"
    if before and before["codec"].get("text_sha256") != manifest["codec"].get("text_sha256"):
        texts = f"{count_of(n[CAPTION], 'caption')} embedded by other weights"
    parts = {
        CAPTION: texts,
        REPLACED: f"{count_of(n[REPLACED], kind[:-1])} replaced",
        GONE: f"{n[GONE]:,} gone",
        NEW: f"{n[NEW]:,} new",
        UNKNOWN: f"{n[UNKNOWN]:,} taken as they are, for an earlier version did not write down "
                 "what they were made from",
    }
    if not before:
        n[NEW] = 0                                          # all of them
    said = [part for what, part in parts.items() if n[what]]
    if before and null_of(before) != null_of(manifest):
        said.append("another null text")
    first = []
    for what in (CAPTION, REPLACED, GONE, NEW):
        if n[what]:
            first += names.get(what, [])
    more = ", …" if len(first) > 8 else ""
    return ", ".join(said) + (f": {', '.join(first[:8])}{more}" if first else "")


def count_of(n, thing):
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def null_of(manifest):
    """The checksum of the null text's file."""
    return manifest["files"][listed(manifest, "text.null.bin")]["crc32"]


def way_out(reasons, total, cfg, coder, kind):
    """Where most names were skipped for one reason: that, and which flag would take how many of them; else ""."""
    if not reasons:
        return ""
    why, n = Counter(map(gist, reasons)).most_common(1)[0]
    if 2 * n <= total:
        return ""
    alike = [re.search(r"\d+", reason) for reason in reasons if gist(reason) == why]
    numbers = sorted(int(found[0]) for found in alike if found)     # each reason's first
    ways = {}
    if why == "too short":
        least, few = min(lengths(cfg)), numbers[n // 10]            # nine in ten have as many
        why = f"shorter than {least} frames at {cfg.fps:g} fps"
        fps = math.ceil((least - 1) * cfg.fps / max(few - 1, 0.1))
        frames = (few - 1) // coder.stride[0] * coder.stride[0] + 1
        if fps <= 60:
            enough = (least - 1) * cfg.fps
            ways[f"--fps={fps}"] = sum((seen - 1) * fps >= enough for seen in numbers)
        way = f"--frames={frames}" if frames > 1 else with_stills(cfg)
        ways[way] = sum(seen >= frames for seen in numbers)
    elif why == "a still picture":
        why = "still pictures"
        ways[with_stills(cfg)] = n
    elif why == "no caption":
        why = "without a caption"
        ways["--caption=TEXT"] = n
    elif why == "a prompt of":
        why = f"longer in their captions than --text_length={cfg.text_length}"
        begin = 1 if cfg.codec == "dct" else 0
        ways[f"--text_length={numbers[-1] + begin}"] = n
    else:
        return f"{n:,} of {total:,} {kind} are skipped for one reason: {why}"
    if all(taken == n for taken in ways.values()):
        said = f"{' or '.join(ways)} would take them"
    else:
        said = " and ".join(f"{way} would take {taken:,} of them" for way, taken in ways.items())
    return f"{n:,} of {total:,} {kind} are {why}: {said}"


def with_stills(cfg):
    """The flag that takes stills beside the clips that are taken."""
    return f"--frames 1 {' '.join(map(str, lengths(cfg)))}"


def gist(reason):
    """What reasons to skip have in common."""
    for why in ("too short", "a still picture", "no caption", "a prompt of"):
        if reason.startswith(why):
            return why
    return re.sub(r"\d+", "N", reason.partition(":")[0])


def wait_for_all(out, report, world):
    """Waits, for hours if need be, until each rank has stored its share -> what each of them reports.

    Each rank says so in a file: ranks that wait for one another in a collective give up after an hour.
    """
    files = [Path(out) / f"finished.{rank}" for rank in range(world.size)]
    with write_whole(files[world.rank]) as file:
        file.write(json.dumps(report).encode())
    for file in files:
        while not file.exists():
            time.sleep(1)
    return [json.loads(file.read_text()) for file in files]


def clear(out, world):
    """Removes the files by which ranks wait, once all ranks have come here."""
    parallel.agree(True, world)
    if world.rank == 0:
        for file in Path(out).glob("finished.*"):
            file.unlink(missing_ok=True)
    parallel.agree(True, world)


def measured(coder, fidelity, video):
    """Encodes a video; of the first few, adds the PSNR of decoding them, in dB, the median frame's, to fidelity."""
    z = coder.encode(video)
    if coder.decodes and len(fidelity) < 8:
        fidelity.append(float(np.median(codec.psnr(coder.decode(z), video))))
    return z


def extras_of(cfg, coder):
    """{name: shape} of the tensors that are stored beside each latent, None = the latent's own."""
    found = {}
    if cfg.image:
        found["image_ends" if cfg.last_frame else "image"] = None
    if cfg.clip:
        found["clip"] = [coder.spec["clip_tokens"], coder.spec["clip_width"]]
    return found


def beside(video, cfg, coder):
    """A clip's extra tensors: its first frame encoded with grey ones after it, and what CLIP sees in that frame."""
    found = {}
    for name in extras_of(cfg, coder):
        if name == "clip":
            found[name] = coder.see(video[0])
        else:
            found[name] = coder.show(video[0], len(video), video[-1] if cfg.last_frame else None)
    return found


# ---- sources --------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """Where samples come from. A name may give many: those have keys name#0, name#1, …"""
    names: Callable         # Journals -> [name]
    look: Callable          # name -> Seen; ValueError: it cannot be used; OSError: nobody can tell
    samples: Callable       # name, caption, (key -> whether it is stored) -> samples that are not
    clips: Callable         # name -> latent shapes of its samples, by headers alone
    passed: dict = {}       # {name: why it is not among the names}
    head: int | None = HEAD # bytes of a file by which it is known again, None = all


def source_of(cfg):
    """What the names stand for, and their source."""
    if cfg.videos:
        return "films", videos
    if cfg.prompts:
        return "prompts", prompts
    if cfg.parquet:
        return "parquet files", parquet_files
    return "clips", moving_shapes


def moving_shapes(cfg, coder, embed):
    """The built-in clips; each is a function of its number."""
    sizes, frames = parse(cfg.sizes), lengths(cfg)

    def kind(name):
        i = int(name)
        return sizes[i % len(sizes)], frames[i // len(sizes) % len(frames)]

    def look(name):
        _, caption = begin(name)
        if stream(cfg.seed, "short", int(name)).random() < cfg.short_captions:
            caption = shapes.direction_alone(caption)
        return Seen(caption, f"clip {name}", None)

    def begin(name):
        """The generator of a clip, after it has drawn the caption; a whole clip takes a hundred times as long."""
        rng = stream(cfg.seed, "clip", int(name))
        return rng, shapes.CAPTIONS[rng.integers(len(shapes.CAPTIONS))]

    def samples(name, caption, stored):
        size, length = kind(name)
        rng, whole = begin(name)
        video, _ = shapes.clip(rng, size=size, frames=length, caption=whole)
        yield dict(latent=coder.encode(video), text=embed(caption), caption=caption,
                   source=f"clip {name}", key=name, extras=beside(video, cfg, coder))

    def clips(name):
        size, length = kind(name)
        return [latent_shape(coder, length, size)]

    return Source(lambda done: [str(i) for i in range(cfg.clips)], look, samples, clips)


def videos(cfg, coder, embed):
    """The films in a folder and those below it."""
    root, sizes = Path(cfg.videos), parse(cfg.sizes)
    captions = films.captions(root)
    found, passed = films.listed(root)
    # a file that a list names is one of ours, whatever it is called; looking at those names what is missing
    passed = {name: why for name, why in passed.items() if films.compose(name) not in captions}
    found += captions.keys() - {films.compose(name) for name in found}
    for name in found:
        if unit_of(name) != name:
            passed[name] = "its name ends as a clip's key does: rename it"
    found = [name for name in found if name not in passed]
    if not found:
        others = "".join(f"; {name}: {reason}" for name, reason in list(passed.items())[:3])
        raise ValueError(f"no films in {root}: their names would end in "
                         f"{' '.join(sorted(films.FILMS | films.PICTURES))}{others}")

    def look(name):
        caption = films.caption_of(root, name, captions)
        if not caption:
            caption = cfg.caption
        if not (root / name).exists():
            raise ValueError("No such file")
        if not caption:
            raise ValueError(f"no caption in {Path(name).with_suffix('.txt').name} or captions.jsonl; "
                             "--caption=TEXT would be for such films")
        return Seen(caption, name, root / name)

    def samples(name, caption, stored):
        text = embed(caption)
        made = films.read_video(root / name, sizes=sizes, frames=lengths(cfg), fps=cfg.fps,
                                cuts=cfg.cuts, report=lambda note: tqdm.write(f"{name}: {note}"))
        for i, (video, _) in enumerate(made):
            key = f"{name}#{i}"
            if not stored(key):
                yield dict(latent=coder.encode(video), text=text, caption=caption,
                           source=name, key=key, extras=beside(video, cfg, coder))

    def clips(name):
        head = films.head(root / name)
        seconds = head.seconds
        if head.frames and head.fps:    # some leave out how long the last picture is shown
            seconds = max(seconds, head.frames / head.fps)
        seen = 1 if head.still else math.ceil(seconds * cfg.fps - 0.01)
        made = films.lengths(seen, lengths(cfg), cfg.cuts)
        if not made:
            raise ValueError(f"too short: {seen} frames at {cfg.fps:g} per second, "
                             f"{min(lengths(cfg))} are wanted")
        size = films.nearest(sizes, *head.size)
        return [latent_shape(coder, length, size) for length in made]

    return Source(lambda done: sorted(found), look, samples, clips, passed)


def prompts(cfg, coder, embed):
    """The lines of a text file, without latents. A line is known by its words, wherever it stands."""
    path = Path(cfg.prompts)
    lines = [line.strip() for line in films.read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"no prompts in {path}")
    found = {}

    def names(done):
        times = Counter()
        for i, line in enumerate(lines, 1):
            times[line] += 1
            name = f"{line[:40]} [{sha256(line.encode()).hexdigest()[:16]}.{times[line]}]"
            if done.stored(str(i)).text == text_crc32(line, coder.spec):
                name = str(i)           # an earlier version's name
            found[name] = line
        return list(found)

    def look(name):
        return Seen(found[name], path.name, None)

    def samples(name, caption, stored):
        yield dict(latent=None, text=embed(caption), caption=caption, source=path.name, key=name)

    return Source(names, look, samples, lambda name: [cfg.shape])


def parquet_files(cfg, coder, embed):
    """What FastVideo's preprocessing made for text to video, its Wan latents and text embeddings taken as they are."""
    from pyarrow import parquet     # only here is it needed

    root, channels = Path(cfg.parquet), coder.spec["channels"]
    found = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
    if not found:
        raise ValueError(f"no parquet files in {root}")
    parts = [f"{name}_{part}" for name in ("vae_latent", "text_embedding")
             for part in ("bytes", "shape", "dtype")]

    def rows(name, columns):
        try:
            file = parquet.ParquetFile(root / name)
            if missing := {"caption", "file_name", *parts} - set(file.schema_arrow.names):
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            for batch in file.iter_batches(1, columns=columns):
                yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"unreadable: {error}") from error

    def samples(name, caption, stored):
        bad = []
        for i, row in enumerate(rows(name, ["caption", "file_name", *parts])):
            key = f"{name}#{i}"
            if stored(key):
                continue
            try:
                latent, text = (tensor(row, part) for part in ("vae_latent", "text_embedding"))
                if latent.ndim != 4 or len(latent) != channels:
                    raise ValueError(f"a latent of shape {tuple(latent.shape)}, "
                                     f"wanted is ({channels}, F, H, W)")
            except ValueError as reason:
                bad.append(f"{row['file_name']}: {reason}")
            else:
                yield dict(latent=latent, text=text, caption=row["caption"],
                           source=row["file_name"], key=key)
        if bad:
            raise ValueError(f"{len(bad)} rows of it. {'; '.join(bad)}")

    def look(name):
        return Seen(None, name, root / name)

    def clips(name):
        return [tuple(row["vae_latent_shape"]) for row in rows(name, ["vae_latent_shape"])]

    return Source(lambda done: found, look, samples, clips, head=None)


def tensor(row, name):
    """A tensor as FastVideo stores it: bytes, shape, and the dtype that the bytes are of."""
    content, shape, dtype = (row[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
    known = {"float64": torch.float64, "float32": torch.float32,
             "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"{name} of dtype {dtype}; known are {', '.join(known)}")
    if not content or len(content) != math.prod(shape) * known[dtype].itemsize:
        raise ValueError(f"{name} has {len(content or b'')} bytes, "
                         f"its shape {shape} of {dtype} another number")
    return torch.frombuffer(bytearray(content), dtype=known[dtype]).view(*shape)


# ---- the dry run ----------------------------------------------------------------------------------------------------

def foretell(cfg, coder, kind, source):
    """Prints what would be made, by headers alone, and what would change where the folder is there; makes nothing."""
    done = Journals(cfg.out)
    if done.spec:
        check_settings(done.path, done.spec, spec_of(cfg, coder))
    names = source.names(done)
    todo = [work for name in names if (work := work_on(name, source, done, coder.spec))]
    lost = gone(names, source, done)
    found, examples, reasons, what = Counter(), {}, [], Counter({GONE: len(lost)})
    for work in todo:
        reason, becomes = work.reason, work.what
        try:
            if work.what in (NEW, BEGUN, REPLACED):
                source.look(work.name)
                shapes_of = source.clips(work.name)
                found.update(shapes_of)
                examples.setdefault(shapes_of[0], work.name)
        except (ValueError, OSError) as error:
            reason = str(error)
        if reason:
            becomes = GONE if becomes in (GONE, REPLACED) else UNREADABLE
            reasons.append(reason)
            print(f"skipped {work.name}: {reason}")
        what[becomes] += 1
    for name, reason in source.passed.items():
        print(f"skipped {Path(cfg.videos) / name}: {reason}")

    print(f"{len(names):,} {kind} -> {cfg.out}: "
          f"{len(names) - len(todo):,} stored as they should be, "
          f"{what[NEW] + what[BEGUN]:,} to make, {what[REPLACED]:,} replaced, "
          f"{what[CAPTION]:,} with another caption, {what[GONE]:,} gone, {len(reasons):,} to skip")
    for why, n in Counter(map(gist, reasons)).most_common():
        print(f"{n:12,} skipped: {why}")
    size = 0
    for shape, n in sorted(found.items()):
        taken = 0
        if not cfg.prompts:
            for own in [shape, *extras_of(cfg, coder).values()]:
                taken += n * stride(shape if own is None else own, DTYPES[cfg.dtype])
        print(f"{n:12,} of {'x'.join(map(str, shape))}, {taken / 1e6:,.1f} MB")
        size += taken
    token = coder.spec["text_width"] * DTYPES[cfg.dtype].itemsize
    texts = (sum(found.values()) + what[CAPTION]) * token
    print(f"disk: {size / 1e6:,.1f} MB of latents, "
          f"and {texts / 1e6:,.3f} MB for each token of a caption")
    if found:
        name = examples[max(examples, key=found.get)]
        began = time.perf_counter()
        next(source.samples(name, source.look(name).caption, lambda key: False), None)
        seconds, n = time.perf_counter() - began, sum(found.values())
        print(f"time: a clip of {name} took {seconds:.2f} s to read, encode and embed; "
              f"{n:,} like it take {n * seconds / 3600:,.2f} hours on one process")
    if way := way_out(reasons, len(names), cfg, coder, kind):
        print(way)


# ---- the door -------------------------------------------------------------------------------------------------------

def lengths(cfg):
    """The frames that a clip may have."""
    return cfg.frames if isinstance(cfg.frames, tuple) else (cfg.frames,)


def latent_shape(coder, frames, size):
    """(C, F, H, W) of the latents of a clip."""
    f, h, w = coder.stride
    return coder.spec["channels"], (frames - 1) // f + 1, size[0] // h, size[1] // w


def resolve(cfg):
    """The config with None replaced by its defaults; ValueError for flags that are impossible together."""
    sources = [name for name in ("videos", "prompts", "parquet") if asdict(cfg)[name]]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in sources)}: give one of them")
    kind = sources[0] if sources else "shapes"
    for flag, kinds in ONLY.items():
        if asdict(cfg)[flag] != asdict(Config())[flag] and kind not in kinds:
            what = "moving shapes" if kind == "shapes" else f"--{kind}"
            raise ValueError(f"--{flag} does nothing for {what}")
    if kind == "prompts" and not cfg.shape:
        raise ValueError("--prompts needs --shape C F H W, that of the latents to distil")
    if kind == "parquet" and cfg.codec != "wan":
        raise ValueError("--parquet holds latents of Wan's VAE: "
                         "it needs --codec=wan --vae=PATH --text=PATH")
    if cfg.codec == "dct" and (cfg.vae or cfg.text):
        raise ValueError("--vae and --text are for --codec=wan; dct has no weights")
    if cfg.codec == "wan" and not (cfg.text and (cfg.vae or kind == "prompts")):
        needed = "--text=PATH" if kind == "prompts" else "--text=PATH and --vae=PATH"
        raise ValueError(f"--codec=wan needs {needed}, "
                         "each a folder or hub id of a diffusers pipeline")
    if cfg.image and cfg.codec != "wan":
        raise ValueError("--image needs --codec=wan: no model is shown pictures by the dct codec")
    if (cfg.clip or cfg.last_frame) and not cfg.image:
        raise ValueError(f"{'--clip' if cfg.clip else '--last_frame'} needs --image: it adds to what that stores")
    if cfg.clip and cfg.last_frame:
        raise ValueError("--clip and --last_frame: no model here is shown CLIP's tokens of two frames")
    flags.at_least(cfg, 1, "clips")
    if not 0 <= cfg.short_captions <= 1:
        raise ValueError(f"--short_captions={cfg.short_captions}: a share of the clips, in [0, 1]")

    path = Path(asdict(cfg)[kind]) if sources else Path("shapes")
    if sources and not (path.is_file() if kind == "prompts" else path.is_dir()):
        what = "file" if kind == "prompts" else "folder"
        raise FileNotFoundError(f"--{kind}={path}: no such {what}")
    row = DEFAULTS["shapes" if kind == "shapes" and cfg.codec == "dct" else cfg.codec]
    row = row | {"out": f"data/{path.resolve().stem}"}
    cfg = replace(cfg, **{name: value for name, value in row.items() if asdict(cfg)[name] is None})
    flags.above(cfg, 0, "fps")
    flags.at_least(cfg, 1, "text_length")
    if not cfg.sizes:
        raise ValueError("--sizes takes one size or several, such as --sizes 64x64 64x96")
    frames = sorted(set(lengths(cfg)))
    if not frames:
        raise ValueError("--frames takes one number or several, such as --frames 1 17")
    return replace(cfg, frames=tuple(frames) if len(frames) > 1 else frames[0])


def parse(sizes):
    """["64x96"] -> [(64, 96)], height and width."""
    for size in sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            raise ValueError(f"--sizes {size}: a size is HEIGHTxWIDTH in pixels, such as 64x96")
    return [tuple(map(int, size.split("x"))) for size in sizes]


def check_fit(cfg, coder):
    """Sizes that the codec's strides and the model's patches of 2 x 2 do not divide are refused, naming the nearest."""
    channels = coder.spec.get("channels")           # None for wan without its VAE
    if cfg.shape and channels not in (None, cfg.shape[0]):
        raise ValueError(f"--shape {' '.join(map(str, cfg.shape))}: "
                         f"{cfg.codec} latents have {channels} channels")
    if cfg.shape and (min(cfg.shape) < 1 or cfg.shape[2] % 2 or cfg.shape[3] % 2):
        raise ValueError(f"--shape {' '.join(map(str, cfg.shape))}: C F H W above 0, H and W in multiples "
                         "of a model's patches of 2 x 2")
    if not cfg.prompts and not cfg.parquet:
        t, h, w = coder.stride[0], 2 * coder.stride[1], 2 * coder.stride[2]
        for frames in lengths(cfg):
            if (frames - 1) % t or frames < 1:
                raise ValueError(f"--frames={frames}: {cfg.codec} takes 1 + a multiple of {t}, "
                                 f"such as {max(frames, 0) // t * t + 1}")
        for height, width in parse(cfg.sizes):
            if height % h or width % w:
                near = f"{max(round(height / h), 1) * h}x{max(round(width / w), 1) * w}"
                raise ValueError(f"--sizes {height}x{width}: {cfg.codec} takes multiples of "
                                 f"{h}x{w}, such as {near}")


def spec_of(cfg, coder):
    """What must not change while a dataset is filled."""
    spec = {"codec": coder.spec, "fps": cfg.fps, "dtype": cfg.dtype}
    for name in ("videos", "prompts", "parquet", "shape"):
        if asdict(cfg)[name]:
            spec[name] = asdict(cfg)[name]
    for name in {"videos", "prompts", "parquet"} & spec.keys():
        spec[name] = str(Path(spec[name]))              # a slash at the end changes nothing
    if cfg.image:
        spec["extras"] = extras_of(cfg, coder)
    if not cfg.prompts and not cfg.parquet:
        spec |= {"sizes": cfg.sizes, "frames": cfg.frames, "cuts": cfg.cuts, "seed": cfg.seed}
    return spec


if __name__ == "__main__":
    main(flags.read(Config, DEFAULTS))
    parallel.leave()
