"""How a dataset's folder is written, added to and made again; data.py says what lies in it and reads it. Imports data.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import json
import math
import os
import re
import zlib
from bisect import bisect_left
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from shutil import copyfileobj
from time import monotonic
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

import torch

from data import BLOCK, DTYPES, ceil_div, crc32_of, listed, manifest_crc32, raw, sound_manifest, stride

# ---- what was stored ------------------------------------------------------------------------------------------------

class Stored(NamedTuple):
    """What journals say last of a unit: a film, a prompt, a moving shape, a file of many."""
    edition: int = -1           # the first is 0
    live: bool = False          # whether the dataset has samples of it
    whole: bool = False         # whether it has all of them
    text: int | None = None     # see `text_crc32`
    film: list | None = None    # its file's bytes, time in ns, CRC32 of its head; None = not known


class Line(NamedTuple):
    """Where a journal's line is. Lines of one key compare by age: that of the highest edition counts."""
    edition: int
    part: int       # the number in its file's name
    start: int      # the byte where it begins


# What `Journals.samples` weighs, a row per line. said: the line that has the caption;
# row, first: of the latent and the text in their files.
SAMPLE, TEXT, GONE, MARK = range(4)
WEIGHED = [("kind", np.int8), ("edition", np.int32), ("unit", np.int64), ("key", np.int64),
           ("line_part", np.int32), ("line", np.int64),
           ("said_part", np.int32), ("said", np.int64),
           ("shape", np.int32), ("part", np.int32), ("row", np.int64),
           ("text_part", np.int32), ("first", np.int64), ("rows", np.int32)]
SPOKEN = "said_part", "said", "text_part", "first", "rows"      # those that a later text replaces


class Journals:
    """All that was ever stored in a folder. Reading it changes nothing; see `Writer` for what the lines mean.

    16 bytes for each key are kept. Two of 10⁶ keys hash alike once in 10⁷ datasets.
    """

    # a line begins with these: no more of it is parsed to find it again
    KEY = re.compile(rb'"key": ("[^"\\]*(?:\\.[^"\\]*)*")(?:, "edition": (\d+))?')

    def __init__(self, path):
        self.path, self.manifest = Path(path), None
        with suppress(FileNotFoundError, ValueError):       # a damaged one is written anew
            self.manifest = sound_manifest(self.path)
        self.spec = begun_with(self.path)
        self.compact = self.last_compact()
        self.opened = lru_cache(64)(lambda part: open(self.files()[part], "rb"))

        def places():
            for part, start, line in self.lines():
                key, edition = self.KEY.search(line).groups()
                yield hash(key), packed(int(edition or 0), part, start)

        found = np.fromiter(places(), np.dtype([("key", np.int64), ("place", np.int64)]))
        for column in ("place", "key"):                     # by key, and by place within each
            order = np.argsort(found[column], kind="stable")
            for values in ("place", "key"):                 # one by one takes less memory
                found[values] = found[values][order]
            del order
        last = np.ones(len(found), bool)                    # of its key's lines
        last[:-1] = found["key"][1:] != found["key"][:-1]
        self.keys, self.places = found["key"][last], found["place"][last]

    def last_compact(self):
        """The number of the journal that stands for all lower ones, -1 where there is none."""
        if self.manifest:
            return self.manifest.get("compact", -1)
        return max((number_of(file.name) for file in self.path.glob("compact.*.jsonl")), default=-1)

    def next_part(self):
        """The first number above those of all files that the manifest lists."""
        names = self.manifest["files"] if self.manifest else ()
        return 1 + max([self.compact, *map(number_of, names)])

    def files(self):
        """{part: journal}, the lowest first."""
        found = {number_of(file.name): file for file in self.path.glob("journal.*.jsonl")}
        found = {part: file for part, file in found.items() if part > self.compact}
        if self.compact >= 0:
            found[self.compact] = self.path / f"compact.{self.compact}.jsonl"
        return dict(sorted(found.items()))

    def lines(self):
        """Lines of all journals, part after part -> (part, where it begins in its file, line)."""
        for part, file in self.files().items():
            start = 0
            for line in whole_lines(file):
                yield part, start, line
                start += len(line)

    def find(self, key):
        """The Line that counts for a key, None where there is none."""
        wanted = hash(json.dumps(key).encode())
        i = bisect_left(self.keys, wanted)
        if i < len(self.keys) and self.keys[i] == wanted:
            return unpacked(int(self.places[i]))
        return None

    def __contains__(self, key):
        return self.find(key) is not None

    def record(self, line):
        file = self.opened(line.part)
        file.seek(line.start)
        return json.loads(file.readline())

    def stored(self, unit):
        """What is known of a unit -> Stored."""
        own, first = self.find(unit), self.find(f"{unit}#0")
        if own is None and first is None:
            return Stored()
        whole = first is None or (own is not None and own.edition >= first.edition)
        last = own if whole else first
        record = self.record(last)
        if "gone" in record:
            return Stored(last.edition)
        text = record.get("text")
        if text is None and "caption" not in record and first:
            record = record | {"caption": self.record(first)["caption"]}
        if text is None and "caption" in record:            # an earlier version's
            text = text_crc32(record["caption"], self.spec["codec"])
        return Stored(last.edition, True, whole, text, record.get("film"))

    def others(self, names):
        """Units that the dataset has samples of and that are not among these names."""
        names, others = set(names), {}                      # a dict keeps their order
        for _, _, line in self.lines():
            unit = unit_of(json.loads(self.KEY.search(line)[1]))
            if unit not in names:
                others[unit] = True
        return [unit for unit in others if self.stored(unit).live]

    def samples(self):
        """The samples that count -> ([shape], array of WEIGHED, bucket after bucket), {file: rows that were stored}."""
        found, rows = {}, Counter()
        columns = 2 + len(self.spec.get("extras", ()))      # checksums of latent, text and extra tensors
        dtype = np.dtype([*WEIGHED, ("crc", np.uint32, columns)])

        def weighed():
            for part, start, line in self.lines():
                record = json.loads(line)
                kind = kind_of(record)
                if kind == MARK:
                    continue
                shape, held, place, crc = 0, 0, (part, 0, part, 0), [0] * columns
                if kind != GONE:
                    held, crc[:len(record["crc"])] = record["rows"], record["crc"]
                    text = text_file(part)
                    latent = latent_file(record["shape"], part) if kind == SAMPLE else None
                    place = record.get("at", (part, rows[latent], part, rows[text]))
                if kind == SAMPLE:
                    shape = found.setdefault(tuple(record["shape"]), len(found))
                if kind != GONE and "at" not in record:
                    rows.update({latent: 1, text: held})
                unit, key = hash(unit_of(record["key"])), hash(record["key"])
                yield (kind, record.get("edition", 0), unit, key, part, start, part, start, shape,
                       *place, held, tuple(crc))

        samples = latest(np.fromiter(weighed(), dtype))
        there = np.unique(samples["shape"]).tolist()
        shapes = sorted(shape for shape, i in found.items() if i in there)
        place = np.empty(len(found), np.int32)              # of a shape that was found n-th
        for i, shape in enumerate(shapes):
            place[found[shape]] = i
        samples["shape"] = place[samples["shape"]]
        samples = samples[np.argsort(samples["shape"], kind="stable")]
        return [list(shape) for shape in shapes], samples, rows


def latest(lines):
    """Of all lines, those of the samples that count, each with its unit's last text.

    They are in the order of the first line of each key: a sample that is made again takes the place of what it
    replaces, and the others keep their ids.
    """
    if not lines["edition"].any():
        return lines
    spoken, number = lines["kind"] == TEXT, np.arange(len(lines))
    units, unit = np.unique(lines["unit"], return_inverse=True)
    edition = np.full(len(units), -1)                       # of each unit's samples
    np.maximum.at(edition, unit[~spoken], lines["edition"][~spoken])

    texts = number[spoken & (lines["edition"] > edition[unit])]
    texts = texts[np.argsort(lines["edition"][texts], kind="stable")]
    said = np.full(len(units), -1)                          # its last text, by number
    said[unit[texts]] = texts

    keys, key = np.unique(lines["key"], return_inverse=True)
    first = np.full(len(keys), len(lines))
    np.minimum.at(first, key, number)

    live = number[(lines["kind"] == SAMPLE) & (lines["edition"] == edition[unit])]
    live = live[np.argsort(np.where(lines["edition"][live], first[key[live]], live), kind="stable")]
    samples, said = lines[live], said[unit[live]]
    for name in SPOKEN:
        samples[name] = np.where(said < 0, samples[name], lines[name][said])
    samples["crc"][:, 1] = np.where(said < 0, samples["crc"][:, 1], lines["crc"][said, 1])
    return samples


def kind_of(record):
    """What a line is; see `Writer`."""
    if "gone" in record:
        return GONE
    if "shape" in record:
        return SAMPLE
    return TEXT if "crc" in record else MARK


def unit_of(key):
    """The unit that a key is of: a film's name, of that of its third clip NAME#2."""
    return re.sub(r"#\d+$", "", key)


def packed(edition, part, start):
    return edition << 50 | part << 35 | start               # journals of up to 32 GB


def unpacked(place):
    return Line(place >> 50, place >> 35 & 0x7fff, place & (1 << 35) - 1)


def text_crc32(caption, codec):
    """What an embedding was made from: the caption, and the text encoder's weights."""
    return zlib.crc32(json.dumps([caption, codec.get("text_sha256")]).encode())


def number_of(name):
    """The number in a file's name, 0 for a name without."""
    found = re.search(r"\.(\d+)\.\w+$", name)
    return int(found[1]) if found else 0


# ---- writing --------------------------------------------------------------------------------------------------------

class Nothing(ValueError):
    """There is no sample to make a dataset of."""


class Writer:
    """Adds samples to a dataset, by one process or several at once; interrupted and made again, it goes on.

    Each rank appends to files of its own. What its journal lists is on disk; whatever lies beyond is cut off on return.
    spec: codec (a dict, with text_width and text_length), fps, dtype "bf16" or "fp32", shape (only for a dataset of
    prompts without latents: theirs), extras (only where each sample has further tensors: {name: shape}, None = the
    latent's), and what else must not change while a dataset is filled; ValueError if it does.
    The weights of the text encoder may: `stored` then says of no unit that its text is the one wanted.
    done: the journals as they were at the start; `key in done` tells what all ranks had saved before.

    A dataset that is made again. A unit is what a source names: a film, a prompt. A line of a journal has a key, the
    unit's name or for its i-th clip name#i, an edition, 0 where none is written, and what it was made from: `text`, the
    CRC32 of the caption and the encoder, and `film`, a file's size, time and the CRC32 of its head. Nothing is taken
    back; a later edition outranks the earlier ones of its unit. A line is
      a sample (it has a shape): those of the latest edition count, and where a film was replaced, all before are dead;
      a text (it has none): of a later edition than the samples, it is the caption and embedding of all of them;
      an end ("gone"): an edition without samples;
      a mark: that all of a unit's samples are stored, and what they were made from.
    A trainer may have mapped what the manifest lists, so that none of it is written to, nor cut. A rank's files are
    numbered rank + the first number above all in the manifest: 0 for the first time, also when that is interrupted and
    resumed by other ranks. `finish` weighs all journals, writes the small files anew under new names where they differ,
    and replaces the manifest by rename. Until then the old one stands, and the next run goes on from the journals.
    `compact` copies what counts out of those files that hold dead rows, and writes one journal, compact.N.jsonl, whose
    lines say where each sample lies. With the manifest that names N, the journals below N are void; then they and all
    files that no manifest lists any more are removed.
    """

    def __init__(self, path, spec, rank=0):
        self.path, self.dtype = Path(path), DTYPES[spec["dtype"]]
        self.spec = json.loads(json.dumps(spec))            # as it is read back: lists, not tuples
        self.path.mkdir(parents=True, exist_ok=True)
        begun = begun_with(self.path)
        if begun:
            check_settings(self.path, begun, self.spec)
        else:
            with write_whole(self.path / "spec.json") as file:
                file.write(json.dumps(self.spec).encode())

        self.done = Journals(path)
        self.base = self.done.next_part()
        self.part = self.base + rank
        own = self.path / f"journal.{self.part}.jsonl"
        own.touch()
        sizes, end = Counter(), 0
        for line in whole_lines(own):
            sizes.update(self.sizes(json.loads(line)))
            end += len(line)
        self.files = {name: self.open_at(name, size) for name, size in sizes.items() if size}
        self.journal, self.pending, self.saved = self.open_at(own.name, end), [], monotonic()

    def add(self, latent, text, *, caption, source, key, edition=0, film=None, extras=MappingProxyType({})):
        """Stores a sample: latent (C, F, H, W), None for a prompt alone, and text (S_i, E); key: its name in `done`.

        In a dataset of latents, None is for a unit, key, whose latents stay and get this caption and text. edition,
        film: see above. extras {name: tensor}: those of the spec, which stand beside the latent.
        """
        length, width = self.spec["codec"]["text_length"], self.spec["codec"]["text_width"]
        if text.ndim != 2 or text.shape[1] != width or len(text) > length:
            raise ValueError(f"{source}: text of shape {tuple(text.shape)}, "
                             f"wanted at most {length} rows of {width}")
        wanted = {} if latent is None else self.extra_shapes(latent.shape)
        shapes = {name: tuple(x.shape) for name, x in extras.items()}
        if shapes != wanted:
            raise ValueError(f"{source}: extra tensors {shapes}, wanted are {wanted}")
        parts = [latent, text, *(extras[name] for name in wanted)]
        if not all(part.isfinite().all() for part in parts if part is not None):
            raise ValueError(f"{source}: a latent or text with numbers that are not finite")
        parts = [b"" if part is None else raw(part.to(self.dtype)).tobytes() for part in parts]
        record = {"caption": caption, "source": source, "rows": len(text)}
        if "shape" in self.spec:
            record["shape"] = self.spec["shape"]
        elif latent is not None:
            record["shape"] = list(latent.shape)
        record["crc"] = [zlib.crc32(part) for part in parts]
        self.note(key, edition, **record, text=self.text_crc32(caption), film=film)
        for part, (name, size) in zip(parts, self.sizes(self.pending[-1]).items()):
            if size and name not in self.files:
                self.files[name] = self.open_at(name, 0)
            if size:
                self.files[name].write(part.ljust(size, b"\0"))
        if monotonic() > self.saved + 5:    # seconds of work that a crash may cost
            self.save()

    def extra_shapes(self, shape):
        """{name: shape} of the extra tensors beside a latent of this shape."""
        return {name: tuple(shape if own is None else own)
                for name, own in self.spec.get("extras", {}).items()}

    def mark(self, key, edition=0, text=None, film=None):
        """Puts a key into the journal without a sample: that of a film, say, of which all clips are stored."""
        self.note(key, edition, text=text, film=film)

    def drop(self, unit, edition):
        """Takes a unit's samples out of the dataset. edition: one more than it has."""
        self.note(unit, edition, gone=True)

    def note(self, key, edition, **what):
        """A line for the journal."""
        line = {"rank": self.part, "key": key}
        if edition:
            line["edition"] = edition
        known = {name: value for name, value in what.items() if value is not None}
        self.pending.append(line | known)

    def text_crc32(self, caption):
        """What a unit's `Stored.text` is where its embedding is that of this caption."""
        return text_crc32(caption, self.spec["codec"])

    def save(self):
        """Puts everything on disk, the journal last."""
        for file in self.files.values():
            sync(file)
        self.journal.write(b"".join(json.dumps(record).encode() + b"\n" for record in self.pending))
        sync(self.journal)
        self.pending, self.saved = [], monotonic()

    def finish(self, null_text, mean=None, std=None, half_power=False):
        """Makes one dataset of what all ranks have saved -> its manifest. For one rank, after `save` on all of them.

        null_text (S_0, E): that of dropout and guidance. mean, std [C]: of the latents, None = measured; half_power:
        divide by k std^½ instead, the mean square over channels being 1, so that quiet channels stay quieter.
        """
        self.save()

        # 1) the samples in their final order, and the files that hold them
        shapes, samples, rows = self.done.samples()
        if not len(samples):
            raise Nothing(f"nothing was stored in {self.path}: there is no dataset to finish")
        layout = self.layout(shapes, samples, rows)
        buckets, places, sizes, _, _, text_sizes = layout

        # 2) no file is longer than it says: a rank that was killed, and is not back, has left a tail
        for name, size in (sizes | text_sizes).items():
            with self.open_at(name, size) as file:
                sync(file)

        # 3) mean and std
        if mean is None:
            mean, std = self.moments(buckets, places, half_power)

        # 4) the manifest, which makes a dataset of them
        self.about = {"null": null_text.to(self.dtype), "mean": mean, "std": std}
        return self.publish(samples, layout, self.done.compact)

    def layout(self, shapes, samples, rows):
        """Where all samples lie: what `buckets` and what `texts` says, side by side."""
        return *self.buckets(shapes, samples, rows), *self.texts(samples, rows)

    def publish(self, samples, layout, compact):
        """Writes the small files of these samples, each there whole or not at all, then the manifest -> it."""
        buckets, places, sizes, text, first, text_sizes = layout
        files = {name: {"size": size} for name, size in (sizes | text_sizes).items()}
        null = self.about["null"]
        with self.small("text.null.bin", files) as file:
            file.write(raw(null))
        with self.small("captions.jsonl", files) as file:
            starts = self.write_captions(file, samples)
        with self.small("text_off.npy", files) as file:
            np.save(file, np.stack([first, samples["rows"], starts], 1))
        with self.small("crc.npy", files) as file:
            np.save(file, samples["crc"])
        if places is not None:
            with self.small("place.npy", files) as file:
                np.save(file, places)

        if len(null):
            text["files"].append([listed({"files": files}, "text.null.bin"), len(null)])
        text["null"] = [text["rows"], len(null)]
        once = places is None and compact < 0 and all(name in files for name in SMALL)
        manifest = {"version": 1 if once else 2, "codec": self.spec["codec"],
                    "mean": self.about["mean"], "std": self.about["std"],
                    "dtype": self.spec["dtype"], "fps": self.spec["fps"], "buckets": buckets,
                    "text": text, "files": files}
        if compact >= 0:
            manifest["compact"] = compact
        before = self.done.manifest
        if compact != self.done.compact:                    # the same samples in other places
            manifest["content"] = before.get("content", before["crc32"])
        elif before and "content" in before:
            parts = before.keys() - {"content", "crc32"}
            if all(manifest.get(name) == before[name] for name in parts):
                manifest["content"] = before["content"]
        manifest["crc32"] = manifest_crc32(manifest)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items()]
        with write_whole(self.path / "manifest.json") as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
        self.done.manifest = manifest

        # captions.jsonl is what people read, whichever name the manifest has for it
        name = listed(manifest, "captions.jsonl")
        if name != "captions.jsonl":
            with write_whole(self.path / "captions.jsonl") as file:
                with open(self.path / name, "rb") as captions:
                    copyfileobj(captions, file)
        return manifest

    @contextmanager
    def small(self, name, files):
        """A small file to write, which `files` then describes. What the manifest lists is not written over."""
        new, old = self.path / numbered(name, self.done.next_part()), None
        with write_whole(new) as file:
            yield file
        about = {"size": new.stat().st_size, "crc32": crc32_of(new)}
        if self.done.manifest:
            old = listed(self.done.manifest, name)
        if old and self.done.manifest["files"][old] == about:
            old = self.path / old                           # it stays, unless it is damaged
            if not old.exists() or crc32_of(old) != about["crc32"]:
                os.replace(new, old)
            new.unlink(missing_ok=True)
            new = old
        files[new.name] = about

    def buckets(self, shapes, samples, rows):
        """The manifest's buckets, each sample's row in its bucket's files, None = all in order, {file: bytes}."""
        buckets, places, sizes, in_order = [], [], {}, True
        for i, shape in enumerate(shapes):
            here, width, first = samples["shape"] == i, stride(shape, self.dtype), 0
            files, parts, place = [], samples["part"][here], samples["row"][here]
            extras = {}
            for extra, own in self.extra_shapes(shape).items():
                extras[extra] = {"shape": list(own), "dtype": self.spec["dtype"], "files": []}
            for part in np.unique(parts).tolist():
                if "shape" in self.spec:                    # prompts have no latents
                    break
                name = latent_file(shape, part)
                n = self.held(name, rows, width)
                place[parts == part] += first
                files.append([name, n])
                sizes[name] = n * width
                for extra, about in extras.items():         # row by row beside the latents
                    name = latent_file(shape, part, extra)
                    about["files"].append([name, n])
                    sizes[name] = n * stride(about["shape"], self.dtype)
                first += n
            places.append(place)
            in_order &= not files or np.array_equal(place, np.arange(first))
            buckets.append({"shape": shape, "count": len(place), "files": files})
            if extras:
                buckets[-1]["extras"] = extras
        return buckets, None if in_order else np.concatenate(places), sizes

    def texts(self, samples, rows):
        """The manifest's text but for the null, each sample's first row in its files, {file: bytes}."""
        codec, files, total = self.spec["codec"], [], 0
        width = codec["text_width"] * self.dtype.itemsize
        first = np.where(samples["rows"], samples["first"], 0)
        for part in np.unique(samples["text_part"]).tolist():
            here = samples["text_part"] == part
            if not samples["rows"][here].any():
                continue                                    # no file: there was nothing to write
            files.append([text_file(part), self.held(text_file(part), rows, width)])
            first[here] += total
            total += files[-1][1]
        sizes = {name: n * width for name, n in files}
        text = {"width": codec["text_width"], "length": codec["text_length"], "rows": total,
                "files": files}
        return text, first, sizes

    def held(self, name, rows, width):
        """How many rows of `width` bytes a file has, dead ones too; one of before the last `compact` is as it was."""
        if name in rows:
            return rows[name]
        return (self.path / name).stat().st_size // width

    def moments(self, buckets, places, half_power):
        """Mean and divisor of each channel over all latents stored -> [C], [C]; None, None where there are none."""
        before = self.done.manifest
        if before and before["buckets"] == buckets and np.array_equal(places, self.places_before()):
            return before["mean"], before["std"]            # of the same latents
        count, total, squares, end = 0, 0, 0, 0
        for bucket in buckets:
            begin, end = end, end + bucket["count"]
            rows = np.arange(bucket["count"]) if places is None else np.sort(places[begin:end])
            for z in self.stored(bucket, rows):
                count += z.shape[0] * z.shape[2]
                for mean, square in zip(z.sum(2), z.square().sum(2)):   # the bits of a plain loop
                    total, squares = total + mean, squares + square
        if count == 0:
            return None, None
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()     # of a constant channel
        if half_power:
            std = (std * std.mean()).sqrt()
        return mean.tolist(), std.tolist()

    def places_before(self):
        name = listed(self.done.manifest, "place.npy")
        return name and np.load(self.path / name)

    def stored(self, bucket, rows):
        """These latents of a bucket, rows ascending, some MB at a time -> float64 (n, C, positions of all axes).

        They are not mapped: the system counts all pages of a map that were touched, and keeps them.
        """
        width, size = stride(bucket["shape"], self.dtype), math.prod(bucket["shape"])
        most, first = ceil_div(BLOCK, width), 0
        for name, n in bucket["files"]:
            here = rows[np.searchsorted(rows, first):np.searchsorted(rows, first + n)] - first
            first += n
            with open(self.path / name, "rb") as file:
                for run in np.split(here, np.flatnonzero(np.diff(here) != 1) + 1):
                    for i in range(0, len(run), most):
                        file.seek(run[i] * width)
                        block = np.fromfile(file, np.uint8, len(run[i:i + most]) * width)
                        block = torch.from_numpy(block).view(self.dtype)
                        block = block.view(-1, width // self.dtype.itemsize)[:, :size]
                        yield block.reshape(len(block), bucket["shape"][0], -1).double()

    def write_captions(self, file, samples):
        """Writes the line of each sample -> where each begins. Caption and source are copied from its journal's line,
        where they stand side by side as JSON: a quote within a string has a backslash before it, so none is mistaken.
        """
        starts, end = np.empty(len(samples), np.int64), 0
        with ExitStack() as stack:
            journals = {part: stack.enter_context(open(journal, "rb"))
                        for part, journal in self.done.files().items()}
            for id, (part, start) in enumerate(zip(samples["said_part"], samples["said"])):
                journal = journals[part]
                journal.seek(start)
                line = journal.readline()
                both = line[line.index(b'"caption": '):line.index(b', "rows": ')]
                starts[id] = end
                end += file.write(b'{"id": %d, %b}\n' % (id, both))
        return starts

    def remove(self):
        """Takes away all that is in the folder, for which there is no use where nothing was stored."""
        for file in (self.journal, *self.files.values()):
            file.close()
        for file in self.path.iterdir():
            if OURS.fullmatch(file.name) or file.name == "spec.json":
                file.unlink()

    def compact(self):
        """Gives back the disk that dead samples take -> bytes. After `finish`; what the manifest lists is not touched
        before another is in place, and where a file holds no dead rows, it stays.
        """
        shapes, samples, rows = self.done.samples()
        number = max(self.done.next_part(), 1 + max(self.done.files()))
        moved = self.move_texts(samples, rows, number)
        for i, shape in enumerate(shapes):
            if "shape" not in self.spec:
                moved |= self.move_latents(i, shape, samples, rows, number)
        if moved:
            self.write_journal(samples, number)
            self.publish(samples, self.layout(shapes, samples, rows), number)
            self.done.compact = number

        journals = {file.name for file in self.done.files().values()}
        keep = {"captions.jsonl"} | journals | self.done.manifest["files"].keys()
        freed = 0
        for file in self.path.iterdir():
            if OURS.fullmatch(file.name) and file.name not in keep:
                size = file.stat().st_size
                with suppress(PermissionError):     # Windows keeps a file that a trainer has open
                    file.unlink()
                    freed += size
        return freed

    def move_latents(self, i, shape, samples, rows, number):
        """Copies what counts of a bucket's files that hold dead rows into new ones -> whether there are such."""
        width, end = stride(shape, self.dtype), 0
        widths = {"": width}                                # of the latents, and of what lies beside them
        for extra, own in self.extra_shapes(shape).items():
            widths[extra] = stride(own, self.dtype)
        mine = np.flatnonzero(samples["shape"] == i)
        for part in np.unique(samples["part"][mine]).tolist():
            here = mine[samples["part"][mine] == part]
            name = latent_file(shape, part)
            if len(here) == self.held(name, rows, width):
                continue
            for extra, wide in widths.items():
                new = self.open_at(latent_file(shape, number, extra), end * wide)
                with new, open(self.path / latent_file(shape, part, extra), "rb") as old:
                    for row in samples["row"][here].tolist():
                        old.seek(row * wide)
                        new.write(old.read(wide))
                    sync(new)
            samples["part"][here] = number
            samples["row"][here] = end + np.arange(len(here))
            end += len(here)
        return end > 0

    def move_texts(self, samples, rows, number):
        """The same for embeddings, of which several samples may share one."""
        width, end = self.spec["codec"]["text_width"] * self.dtype.itemsize, 0
        for part in np.unique(samples["text_part"]).tolist():
            here = np.flatnonzero((samples["text_part"] == part) & (samples["rows"] > 0))
            first, one, which = np.unique(samples["first"][here], True, True)   # index, inverse
            n = samples["rows"][here][one].astype(np.int64)
            if not len(here) or n.sum() == self.held(text_file(part), rows, width):
                continue
            new = self.open_at(text_file(number), end * width)
            with new, open(self.path / text_file(part), "rb") as old:
                for row, count in zip(first.tolist(), n.tolist()):
                    old.seek(row * width)
                    new.write(old.read(count * width))
                sync(new)
            samples["text_part"][here] = number
            samples["first"][here] = (end + np.cumsum(n) - n)[which]
            end += int(n.sum())
        return end > 0

    def write_journal(self, samples, number):
        """compact.N.jsonl: a line for each sample, with its place, and the marks of units that are whole."""
        journals = Journals(self.path)

        def lines():
            for sample in samples:
                own = journals.record(Line(0, int(sample["line_part"]), int(sample["line"])))
                said = journals.record(Line(0, int(sample["said_part"]), int(sample["said"])))
                at = [sample[name].item() for name in ("part", "row", "text_part", "first")]
                yield {"key": own["key"], "caption": said["caption"], "source": said["source"],
                       "rows": said["rows"], "shape": own["shape"], "crc": sample["crc"].tolist(),
                       "text": said.get("text"), "film": own.get("film"), "at": at}
            for part, start, line in journals.lines():
                record = json.loads(line)
                key, is_last = record["key"], journals.find(record["key"])[1:] == (part, start)
                if kind_of(record) in (TEXT, MARK) and is_last and journals.stored(key).whole:
                    yield {"key": key, "text": record.get("text"), "film": record.get("film")}

        with write_whole(self.path / f"compact.{number}.jsonl") as file:
            for line in lines():
                known = {name: value for name, value in line.items() if value is not None}
                file.write(json.dumps(known).encode() + b"\n")

    def sizes(self, record):
        """{file: bytes} that a line of the journal stands for: its latent's, its text's, its extra tensors'."""
        if "crc" not in record:
            return {}
        text = record["rows"] * self.spec["codec"]["text_width"] * self.dtype.itemsize
        latent, name = 0, ""
        if "shape" in record:
            name = latent_file(record["shape"], self.part)
        if "shape" in record and "shape" not in self.spec:
            latent = stride(record["shape"], self.dtype)
        sizes = {name: latent, text_file(self.part): text}
        if latent:
            for extra, shape in self.extra_shapes(record["shape"]).items():
                sizes[latent_file(record["shape"], self.part, extra)] = stride(shape, self.dtype)
        return sizes

    def open_at(self, name, size):
        """Opens a file to append after its first `size` bytes."""
        file = open(self.path / name, "ab")
        if file.tell() < size:
            raise ValueError(f"{self.path / name} has {file.tell()} bytes where the journal lists "
                             f"{size}: delete {self.path} and run the same command again")
        if file.tell() > size:
            file.truncate(size)
        return file


SMALL = "text.null.bin", "captions.jsonl", "text_off.npy", "crc.npy"
OURS = re.compile(r"(\d+(x\d+)+(\.[a-z]\w*)?|text|text_off|crc|place|captions|journal|compact)"
                  r"(\.null)?(\.\d+)?\.(bin|npy|jsonl)")


def check_settings(path, begun, spec):
    """Refuses settings that are not those that a dataset was begun with, but for the text encoder's weights."""
    was, now = settings(begun), settings(json.loads(json.dumps(spec)))
    changed = [f"{key} was {was.get(key)} and is now {now.get(key)}"
               for key in sorted(was | now) if was.get(key) != now.get(key)]
    if changed:
        raise ValueError(f"{path} was begun with other settings: {'; '.join(changed)}. "
                         "Take those, choose another --out, or delete it")


def begun_with(path):
    """The settings that a dataset was begun with, {} of none; ValueError where they are damaged."""
    file = path / "spec.json"
    if not file.exists():
        return {}
    try:
        spec = json.loads(file.read_text())
        settings(spec)
        return spec
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged, it is not the settings of a dataset: take it from a copy, or delete "
                         f"{path} and run the same command again") from error


def settings(spec):
    """{name: value} of all that must stay as it was."""
    spec = spec | spec["codec"]
    return {name: value for name, value in spec.items() if name not in ("codec", "text_sha256")}


def numbered(name, number):
    """A small file's name with a number, which that of a first dataset lacks."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{number}.{ending}" if number else name


def latent_file(shape, part, extra=""):
    """The file of a rank's latents of one shape, or of the extra tensors of that name beside them."""
    between = f".{extra}" if extra else ""
    return f"{'x'.join(map(str, shape))}{between}.{part}.bin"


def text_file(part):
    return f"text.{part}.bin"


def whole_lines(path):
    """Lines of a journal, one at a time, without one that a crash cut short."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


@contextmanager
def write_whole(path):
    """A file to write that is there whole or not at all, whatever happens meanwhile."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        yield file
        sync(file)
    os.replace(part, path)


def sync(file):
    file.flush()
    os.fsync(file.fileno())
