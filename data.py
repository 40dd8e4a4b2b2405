"""Random numbers and training data, both as pure functions. Imports nothing of ours.

Every random number of a run is a function of (seed, purpose, step, slot), slot being the sample's index in the global
batch, and so is the order of the data. A run thus has no loader or generator state to save: a resumed run, or one on
another number of ranks, trains on the identical stream of samples, noise and times.

A dataset is a folder of raw latents and text embeddings, written by `Writer` and read by `Latents`:

    manifest.json            what the latents are (codec, mean, std, dtype, fps), shape and files of each bucket, checksums
    16x21x60x104.0.bin       latents of one shape as rank 0 wrote them, not normalised, sample i at i x stride (4 KiB-aligned)
    text.0.bin               text embeddings, one row per token, no padding; text.null.bin: those of no text at all
    text_off.npy             int64 (N, 3): first text row and number of rows of each sample, byte of its line in captions.jsonl
    crc.npy                  uint32 (N, 2): CRC32 of each sample's latent and text, checked when it is first read
    captions.jsonl           id, caption and source of each sample
    journal.0.jsonl          what rank 0 has stored so far; an interrupted writer goes on from here

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import io
import json
import math
import mmap
import os
import warnings
import weakref
import zlib
from bisect import bisect_right
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np

import torch

VERSION = 1
PAGE = 4096
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---- random streams -------------------------------------------------------------------------------------------------

# Appended to, never reordered: the position is part of the key.
PURPOSES = ("order", "epoch", "held_out", "init", "t_perm", "t", "noise", "drop", "val", "sample",
            "student_prompt", "student_z", "student_renoise", "student_score_t_perm", "student_score_t", "student_score_noise",
            "critic_prompt", "critic_z", "critic_renoise", "critic_score_t_perm", "critic_score_t", "critic_score_noise")


def stream(seed, purpose, step, slot=0):
    """The numpy Generator of one purpose at one step and slot: distinct arguments give distinct counters of Philox."""
    return np.random.Generator(np.random.Philox(key=[seed, PURPOSES.index(purpose)], counter=[0, 0, slot, step]))


def normal(rng, shape):
    """N(0, 1) -> fp32 tensor of this shape."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def stratified(seed, perm_purpose, xi_purpose, step, batch):
    """u_j = (π(j) + ξ_j) / B, one number in each B-th of [0, 1) -> fp32 (B,); π is drawn per step, ξ_j per slot."""
    perm = stream(seed, perm_purpose, step).permutation(batch)
    xi = np.array([stream(seed, xi_purpose, step, slot).random() for slot in range(batch)])
    below_one = np.nextafter(np.float32(1), np.float32(0))  # fp32 rounds the last 2⁻²⁵ up to 1
    return torch.from_numpy(np.minimum((perm + xi) / batch, below_one).astype(np.float32))


# ---- order ----------------------------------------------------------------------------------------------------------

class Order:
    """Which samples make a step's batch. Buckets hold counts[b] samples; one batch is of one bucket.

    A bucket is an endless concatenation of its permutations ("passes"), cut into batches of B; a batch may straddle two
    passes, so that each sample comes exactly once per pass even where a bucket is smaller than a batch. Epoch i holds
    ⌊(i+1) N_b / B⌋ − ⌊i N_b / B⌋ batches of bucket b, shuffled among those of the others.
    """

    def __init__(self, seed, counts, batch):
        self.seed, self.counts, self.batch = seed, list(counts), batch
        # 15 M samples take a second to permute: keep each bucket's current pass and the one that a batch reaches into.
        self.permutation = lru_cache(2 * len(self.counts))(self.permutation)
        self.interleaved = lru_cache(2)(self.interleaved)

    def before(self, epoch):
        """Batches of each bucket in all earlier epochs."""
        return [epoch * n // self.batch for n in self.counts]

    def epoch(self, step):
        """The epoch that holds the step, by bisection; an epoch of a small dataset may hold none."""
        beyond = (step + len(self.counts)) * self.batch // sum(self.counts) + 1
        return bisect_right(range(beyond + 1), step, key=lambda epoch: sum(self.before(epoch))) - 1

    def at(self, step):
        """-> (bucket, int64 (B,) positions in [0, N_b) of the global batch's samples)."""
        epoch = self.epoch(step)
        before = self.before(epoch)
        plan, row = self.interleaved(epoch), step - sum(before)
        bucket = int(plan[row])
        n = self.counts[bucket]
        first = (before[bucket] + np.count_nonzero(plan[:row] == bucket)) * self.batch
        last = first + self.batch
        return bucket, np.concatenate([self.permutation(bucket, i)[max(first - i * n, 0):last - i * n]
                                       for i in range(first // n, -(-last // n))])

    def interleaved(self, epoch):
        counts = np.subtract(self.before(epoch + 1), self.before(epoch))
        return stream(self.seed, "epoch", epoch).permutation(np.repeat(np.arange(len(counts), dtype=np.uint16), counts))

    def permutation(self, bucket, i):
        return stream(self.seed, "order", i, bucket).permutation(self.counts[bucket])


# ---- reading --------------------------------------------------------------------------------------------------------

class Micro(NamedTuple):
    """What one rank forwards at once."""
    x0: torch.Tensor    # (B, C, F, H, W) fp32, normalised
    text: torch.Tensor  # (B, S, E) fp32, padded with zeros
    null: torch.Tensor  # (S, E) fp32, the text of dropout and guidance
    drop: torch.Tensor  # (B,) fp32 in [0, 1): the text is dropped where it is < p
    u: torch.Tensor     # (B,) fp32 in [0, 1), stratified over the global batch
    e: torch.Tensor     # (B, C, F, H, W) fp32 noise
    ids: list           # of the samples in the dataset
    slots: list         # of the samples in the global batch


class Latents:
    """A dataset in training order: `at(step)` gives this rank's micro-batches, while a thread prepares the next step's.

    batch: samples per update over all ranks; micro_batch: samples per forward, None = a rank's whole share; rank, world:
    among data ranks; val: how many samples to hold out of training; pin: batches go to page-locked memory, for a GPU.
    Raises FileNotFoundError or ValueError, saying what to do, for a dataset or a sample that is not what was written.
    """

    def __init__(self, path, *, seed, batch, micro_batch=None, rank=0, world=1, val=0, pin=False):
        micro_batch = micro_batch or max(batch // world, 1)
        check_batch(batch, micro_batch, world)
        self.path, self.seed, self.batch, self.pin = Path(path), seed, batch, pin
        self.slots = [list(range(i, i + micro_batch))
                      for i in range(rank * batch // world, (rank + 1) * batch // world, micro_batch)]

        self.manifest = read_manifest(path)
        buckets, text, dtype = self.manifest["buckets"], self.manifest["text"], DTYPES[self.manifest["dtype"]]
        self.shapes = [tuple(bucket["shape"]) for bucket in buckets]
        self.first = np.cumsum([0] + [bucket["count"] for bucket in buckets]).tolist()  # ids go through bucket after bucket
        self.count = self.first[-1]
        self.latents = [Rows(path, b["files"], stride(b["shape"], dtype) // dtype.itemsize, dtype) for b in buckets]
        self.tokens = Rows(path, text["files"], text["width"], dtype)
        self.text_off = np.load(self.path / "text_off.npy", mmap_mode="r")
        self.crc = np.load(self.path / "crc.npy", mmap_mode="r")
        self.checked = np.zeros((self.count, 2), bool)
        self.mean, self.std = (torch.tensor(self.manifest[key] or []).view(-1, 1, 1, 1) for key in ("mean", "std"))

        # Held out without regard to the seed, so that the validation losses of two seeds compare.
        self.held_out = stream(0, "held_out", 0).permutation(self.count)[:min(val, self.count // 20)].tolist()
        self.train = np.delete(np.arange(self.count), self.held_out)
        bounds = np.searchsorted(self.train, self.first)
        self.buckets = [self.train[a:b] for a, b in zip(bounds, bounds[1:])]
        self.order = Order(seed, [len(ids) for ids in self.buckets], batch)

        # One torch thread in each: they would otherwise raise teams of their own against the training's.
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count()), initializer=torch.set_num_threads, initargs=(1,))
        self.loader, self.ahead = ThreadPoolExecutor(1), {}
        self.free = defaultdict(list)
        self.null = self.pad([self.tokens(*text["null"])])[0]

    def at(self, step):
        """This rank's micro-batches of a step -> [Micro]. A pure function of the step."""
        now = self.ahead.get(step) or self.loader.submit(self.read, step)
        micros = now.result()
        self.ahead = {step + 1: self.loader.submit(self.read, step + 1)}
        return micros

    def read(self, step):
        bucket, ids = self.batch_ids(step)
        self.will_need([ids[slot] for slots in self.slots for slot in slots])
        u = stratified(self.seed, "t_perm", "t", step, self.batch)
        return [self.micro(step, [ids[slot] for slot in slots], slots, u[slots]) for slots in self.slots]

    def micro(self, step, ids, slots, u):
        x0, text = self.sample(ids)
        drop = torch.tensor([stream(self.seed, "drop", step, slot).random(dtype=np.float32) for slot in slots])
        e = self.empty(x0.shape)
        self.each(lambda out, slot: stream(self.seed, "noise", step, slot).standard_normal(dtype=np.float32, out=out),
                  e.numpy(), slots)
        return Micro(x0, text, self.null, drop, u, e, ids, slots)

    def batch_ids(self, step):
        """The global batch of a step -> (bucket, [id])."""
        bucket, positions = self.order.at(step)
        return bucket, self.buckets[bucket][positions].tolist()

    def epoch_of(self, step):
        """How many times the training samples have been gone through before this step."""
        return step * self.batch / len(self.train)

    def sample(self, ids):
        """Samples of one bucket -> x0 (B, C, F, H, W) fp32 normalised, text (B, S, E) fp32."""
        bucket = bisect_right(self.first, ids[0]) - 1
        rows, first, shape = self.latents[bucket], self.first[bucket], self.shapes[bucket]
        if not self.manifest["buckets"][bucket]["files"]:
            raise ValueError(f"{self.path} holds prompts without latents: one can distil from it, not train on it")
        x0 = self.empty((len(ids), *shape))

        def fill(x, id):
            z = rows(id - first)[0, :x.numel()].view(shape)
            self.check(id, 0, z, rows.name(id - first))
            x.copy_(z).sub_(self.mean).div_(self.std)

        self.each(fill, x0, ids)
        return x0, self.text(ids)

    def will_need(self, ids):
        """Has the system fetch samples from disk all at once, while the first of them is being read."""
        for id in ids:
            bucket = bisect_right(self.first, id) - 1
            self.latents[bucket].will_need(id - self.first[bucket])
            self.tokens.will_need(*self.text_off[id, :2].tolist())

    def text(self, ids):
        """Text of samples of any bucket -> (B, S, E) fp32."""
        rows = []
        for id in ids:
            first, count, _ = self.text_off[id].tolist()
            rows.append(self.tokens(first, count))
            self.check(id, 1, rows[-1], self.tokens.name(first))
        return self.pad(rows)

    def prompts(self, step, purpose, slots):
        """Text of training samples drawn at random for these slots -> (B, S, E) fp32."""
        return self.text([self.train[stream(self.seed, purpose, step, slot).integers(len(self.train))] for slot in slots])

    def shape_of(self, id):
        """(C, F, H, W) of a sample's latent."""
        return self.shapes[bisect_right(self.first, id) - 1]

    def caption(self, id):
        """The sample's caption."""
        with open(self.path / "captions.jsonl", "rb") as lines:
            lines.seek(self.text_off[id, 2])
            return json.loads(lines.readline())["caption"]

    def pad(self, rows):
        """[(S_i, E)] -> (B, S, E) fp32 followed by zeros, which Wan attends to: they are part of the input."""
        text = self.empty((len(rows), self.manifest["text"]["length"], self.manifest["text"]["width"]))

        def fill(padded, row):
            padded[:len(row)].copy_(row)
            padded[len(row):].zero_()

        self.each(fill, text, rows)
        return text

    def check(self, id, what, tensor, file):
        """Compares a sample's latent (what=0) or text (1) with its checksum, the first time it is read."""
        if not self.checked[id, what]:
            if crc32(tensor) != self.crc[id, what]:
                raise ValueError(f"{self.path / file}: sample {id} is not what was written (its checksum differs). "
                                 f"Copy the file again, or delete {self.path} and run the same prepare.py command")
            self.checked[id, what] = True

    def each(self, function, *lists):
        """Calls the function on each tuple of the lists, in parallel; its errors surface here."""
        list(self.pool.map(function, *lists))

    def empty(self, shape):
        """An fp32 tensor, where possible in pages that a former batch has let go of: new ones cost more than the reading."""
        if self.pin:
            return torch.empty(shape, pin_memory=True)      # torch recycles page-locked memory by itself
        size = math.prod(shape)
        pages = self.free[size].pop() if self.free[size] else np.empty(size, np.float32)
        view = pages[:]                                     # lives as long as any tensor on it
        weakref.finalize(view, self.free[size].append, pages).atexit = False
        return torch.from_numpy(view).view(shape)


class Rows:
    """Rows of equal width that continue from file to file, memory-mapped: rows(first, count) -> (count, width)."""

    def __init__(self, path, files, width, dtype):
        self.files = [name for name, _ in files]
        self.first = np.cumsum([0] + [count for _, count in files]).tolist()
        self.row_bytes, self.maps, self.tensors = width * dtype.itemsize, [], []
        for name in self.files:
            with open(Path(path) / name, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")             # torch has no read-only tensors and says so; nothing writes here
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self.tensors.append(torch.frombuffer(self.maps[-1], dtype=dtype).view(-1, width))

    def __call__(self, first, count=1):
        i = bisect_right(self.first, first) - 1
        return self.tensors[i][first - self.first[i]:][:count]

    def name(self, first):
        return self.files[bisect_right(self.first, first) - 1]

    def will_need(self, first, count=1):
        i = bisect_right(self.first, first) - 1
        begin, end = ((first - self.first[i] + n) * self.row_bytes for n in (0, count))
        begin -= begin % mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):                  # not on Windows
            self.maps[i].madvise(mmap.MADV_WILLNEED, begin, end - begin)


def stride(shape, dtype):
    """Bytes from one sample to the next: whole pages, so that a sample can be read without touching another's."""
    return -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE


def crc32(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())


def check_batch(batch, micro_batch, world):
    """A global batch that world x micro_batch does not divide is refused, naming choices that work."""
    unit = world * micro_batch
    if batch < 1 or batch % unit:
        share, rest = divmod(batch, world)
        micro = [] if rest else [f"--micro_batch={n}" for n in range(1, share + 1) if share % n == 0]
        below = batch // unit * unit
        whole = [f"--batch={n}" for n in (below, below + unit) if n > 0]
        raise ValueError(f"--batch={batch} does not divide into micro-batches of {micro_batch} on {world} data ranks; "
                         f"these do: {', '.join(micro + whole)}")


def read_manifest(path):
    """The manifest of a dataset whose files are all there, of the sizes and checksums that it gives."""
    path = Path(path)
    if not (path / "manifest.json").exists():
        if list(path.glob("journal.*.jsonl")):
            raise FileNotFoundError(f"the dataset in {path} is unfinished: run the same prepare.py command again, it goes on")
        raise FileNotFoundError(f"no dataset in {path}. `python prepare.py --out={path}` writes one of moving shapes, "
                                f"`python prepare.py --videos=DIR --out={path}` one of your clips")
    again = f"Copy {path} again, or run the same prepare.py command again"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"{path / 'manifest.json'} is damaged: {error}. {again}") from error
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} is a dataset of version {manifest.get('version')}, this code reads version {VERSION}: "
                         "make it again with this code's prepare.py")
    if manifest["crc32"] != manifest_crc32(manifest):
        raise ValueError(f"{path / 'manifest.json'} is not what was written (its checksum differs). {again}")
    for name, file in manifest["files"].items():            # before mapping: reading past the end of a file kills the process
        size = (path / name).stat().st_size if (path / name).exists() else "no"
        if size != file["size"]:
            raise ValueError(f"{path / name} has {size} bytes instead of {file['size']}. {again}")
        if "crc32" in file and zlib.crc32((path / name).read_bytes()) != file["crc32"]:
            raise ValueError(f"{path / name} is not what was written (its checksum differs). {again}")
    return manifest


def manifest_crc32(manifest):
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


# ---- writing --------------------------------------------------------------------------------------------------------

class Writer:
    """Adds samples to a dataset, by one process or several at once; interrupted and made again, it goes on.

    Each rank appends to files of its own. What its journal lists is on disk; anything beyond is cut off at the start.
    spec: codec (a dict, with text_width and text_length), fps, dtype "bf16" or "fp32", shape (for a dataset of prompts
    without latents: theirs), and whatever else must not change while a dataset is being filled; ValueError if it does.
    """

    def __init__(self, path, spec, rank=0):
        self.path, self.rank, self.dtype = Path(path), rank, DTYPES[spec["dtype"]]
        self.spec = json.loads(json.dumps(spec))
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "spec.json").exists():
            begun = json.loads((self.path / "spec.json").read_text())
            changed = [f"{key} was {begun.get(key)}, now {self.spec.get(key)}"
                       for key in sorted(begun | self.spec) if begun.get(key) != self.spec.get(key)]
            if changed:
                raise ValueError(f"{path} was begun with other settings: {'; '.join(changed)}. "
                                 "Give those again, choose another --out, or delete it")
        else:
            write_whole(self.path / "spec.json", json.dumps(self.spec).encode())

        journals = self.journals()
        self.done = {record["key"] for records in journals.values() for record in records}
        sizes = defaultdict(int)
        for record in journals.get(rank, []):
            sizes[self.text_name(rank)] += self.text_bytes(record["rows"])
            if "shape" not in spec:
                sizes[self.name(record["shape"], rank)] += stride(record["shape"], self.dtype)
        self.files = {name: self.open_at(name, size) for name, size in sizes.items()}
        journal = self.path / f"journal.{rank}.jsonl"
        self.journal = self.open_at(journal.name, journal.read_bytes().rfind(b"\n") + 1 if journal.exists() else 0)
        self.pending, self.saved = [], monotonic()

    def add(self, latent, text, *, caption, source, key):
        """Stores a sample: latent (C, F, H, W), None for a prompt alone, and text (S_i, E); key: its name in `done`."""
        length, width = self.spec["codec"]["text_length"], self.spec["codec"]["text_width"]
        if text.ndim != 2 or text.shape[1] != width or len(text) > length:
            raise ValueError(f"{source}: text of shape {tuple(text.shape)}, wanted at most {length} rows of {width}")
        crc, shape = 0, self.spec.get("shape")
        if shape is None:
            if not latent.isfinite().all():
                raise ValueError(f"{source}: its latent has numbers that are not finite")
            latent, shape = latent.to(self.dtype), list(latent.shape)
            crc = crc32(latent)
            self.append(self.name(shape, self.rank), latent, stride(shape, self.dtype))
        text = text.to(self.dtype)
        self.append(self.text_name(self.rank), text, self.text_bytes(len(text)))
        self.pending.append({"key": key, "caption": caption, "source": source, "shape": shape, "rows": len(text),
                             "crc": [crc, crc32(text)]})
        self.done.add(key)
        if monotonic() > self.saved + 5:    # seconds of work that a crash may cost
            self.save()

    def append(self, name, tensor, size):
        if name not in self.files:
            self.files[name] = self.open_at(name, 0)
        self.files[name].write(tensor.contiguous().view(torch.uint8).numpy().tobytes().ljust(size, b"\0"))

    def save(self):
        """Puts everything on disk, the journal last."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.journal.write(b"".join(json.dumps(record).encode() + b"\n" for record in self.pending))
        self.journal.flush()
        os.fsync(self.journal.fileno())
        self.pending, self.saved = [], monotonic()

    def finish(self, null_text, mean=None, std=None, half_power=False):
        """Makes a dataset of what all ranks have saved -> its manifest. For one rank, after `save` on all of them.

        null_text (S_0, E): that of dropout and guidance. mean, std [C]: of the latents, None = measured; half_power: then
        divide by k std^½, k such that the mean square over channels is 1, so that quiet channels stay quiet.
        """
        self.save()
        rows, texts, records = 0, [], []
        for rank, part in self.journals().items():
            for record in part:
                records.append(record | {"rank": rank, "first": rows})
                rows += record["rows"]
            texts.append([self.text_name(rank), sum(record["rows"] for record in part)])
        if not records:
            raise ValueError(f"nothing was stored in {self.path}: there is no dataset to finish")
        null_text = null_text.to(self.dtype)
        texts.append(["text.null.bin", len(null_text)])
        records.sort(key=lambda record: (record["shape"], record["rank"]))

        buckets = []
        for shape, bucket in groupby(records, lambda record: record["shape"]):
            files = [[self.name(shape, rank), len(list(part))] for rank, part in groupby(bucket, lambda record: record["rank"])]
            buckets.append({"shape": shape, "count": sum(n for _, n in files), "files": [] if "shape" in self.spec else files})
        if mean is None:
            mean, std = self.moments(buckets, half_power)

        lines = [json.dumps({"id": id, "caption": record["caption"], "source": record["source"]}).encode() + b"\n"
                 for id, record in enumerate(records)]
        starts = np.cumsum([0] + [len(line) for line in lines])
        small = {"text.null.bin": null_text.contiguous().view(torch.uint8).numpy().tobytes(),
                 "text_off.npy": npy([[r["first"], r["rows"], start] for r, start in zip(records, starts)], np.int64),
                 "crc.npy": npy([record["crc"] for record in records], np.uint32),
                 "captions.jsonl": b"".join(lines)}
        for name, data in small.items():
            write_whole(self.path / name, data)

        large = {name: n * stride(b["shape"], self.dtype) for b in buckets for name, n in b["files"]}
        large |= {name: self.text_bytes(n) for name, n in texts}
        manifest = {"version": VERSION, "codec": self.spec["codec"], "mean": mean, "std": std, "dtype": self.spec["dtype"],
                    "fps": self.spec["fps"], "text": {"width": null_text.shape[1], "length": self.spec["codec"]["text_length"],
                                                      "rows": rows, "files": [t for t in texts if t[1]],
                                                      "null": [rows, len(null_text)]},
                    "buckets": buckets, "files": {name: {"size": size} for name, size in large.items() if size}
                    | {name: {"size": len(data), "crc32": zlib.crc32(data)} for name, data in small.items()}}
        manifest["crc32"] = manifest_crc32(manifest)
        write_whole(self.path / "manifest.json", json.dumps(manifest, indent=1).encode())
        return manifest

    def moments(self, buckets, half_power):
        """Mean and divisor of each channel, over all stored latents."""
        count, total, squares = 0, 0, 0
        for bucket in buckets:
            shape = bucket["shape"]
            rows = Rows(self.path, bucket["files"], stride(shape, self.dtype) // self.dtype.itemsize, self.dtype)
            for i in range(bucket["count"]):
                z = rows(i)[0, :math.prod(shape)].view(shape[0], -1).double()
                count, total, squares = count + z.shape[1], total + z.sum(1), squares + z.square().sum(1)
        if count == 0:
            return None, None
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()     # a channel may be constant
        return mean.tolist(), ((std * std.mean()).sqrt() if half_power else std).tolist()

    def journals(self):
        """{rank: [record of each sample that it has saved]}; a line that a crash cut short is left out."""
        files = sorted(self.path.glob("journal.*.jsonl"), key=lambda file: int(file.name.split(".")[1]))
        return {int(file.name.split(".")[1]): [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
                for file in files}

    def open_at(self, name, size):
        """Opens a file to append after its first `size` bytes."""
        file = open(self.path / name, "ab")
        if file.tell() < size:
            raise ValueError(f"{self.path / name} has {file.tell()} bytes, the journal lists {size}: "
                             f"delete {self.path} and run the same command again")
        file.truncate(size)
        return file

    def text_bytes(self, rows):
        return rows * self.spec["codec"]["text_width"] * self.dtype.itemsize

    def name(self, shape, rank):
        return f"{'x'.join(map(str, shape))}.{rank}.bin"

    def text_name(self, rank):
        return f"text.{rank}.bin"


def npy(rows, dtype):
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, np.array(rows, dtype))
    return file.getvalue()


def write_whole(path, data):
    """Writes a file that is there whole or not at all, whatever happens meanwhile."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
