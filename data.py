"""Random numbers and training data, both as pure functions. Imports nothing of ours.

Every random number of a run is a function of (seed, purpose, step, slot), slot being a sample's index in the global
batch, and the order of the data is one of (seed, step). So a run has no loader and no generator to save: resumed, or on
another number of ranks, it meets the identical samples, noise and times.

A dataset is a folder of raw numbers that store.py writes and `Latents` reads:

    manifest.json            codec, mean and std, dtype, fps; shape, count and files of each bucket; sizes and checksums
    16x21x60x104.0.bin       latents of one shape by rank 0, not normalised, each on pages of its own
    16x21x60x104.image.0.bin  extra tensors called "image" that stand beside them, row by row, as nets take them
    text.0.bin               text embeddings by rank 0, a row per token, no padding; text.null.bin: those of no prompt
    text_off.npy             int64 (N, 3): a sample's first text row, how many, and the byte where its caption begins
    crc.npy                  uint32 (N, 2): CRC32 of a sample's latent and text, then a column for each of its extra
                             tensors; checked when they are first read
    captions.jsonl           id, caption and source of each sample
    place.npy                int64 (N,): a sample's row in its bucket's files; not there where that is its order
    journal.0.jsonl          what rank 0 has stored, from where an interrupted Writer goes on; spec.json: its settings

A dataset that is made again gets files beside these, with higher numbers: see store.Writer.
Nothing here holds a whole dataset's records: of millions of samples, each costs a rank some 25 bytes.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import json
import math
import mmap
import os
import re
import warnings
import weakref
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

import torch

VERSIONS = 1, 2                     # 2: made again, so that files and samples lie otherwise
PAGE = 4096
WORKERS = min(4, os.cpu_count())    # threads that read and draw noise
BLOCK = 1 << 22                     # bytes read at once of a file that is read from end to end
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ceil_div(a, b):
    return -(-a // b)


# ---- random streams -------------------------------------------------------------------------------------------------

# Appended to, never reordered: the position is part of the key.
PURPOSES = ("order", "epoch", "held_out", "init", "t_perm", "t", "noise", "drop", "val", "sample",
            "student_prompt", "student_z", "student_renoise",
            "student_score_t_perm", "student_score_t", "student_score_noise",
            "critic_prompt", "critic_z", "critic_renoise",
            "critic_score_t_perm", "critic_score_t", "critic_score_noise",
            "clip", "give", "student_give", "critic_give", "short", "pair", "pair_prompt", "clean_prefix",
            "pair_give")


def stream(seed, purpose, step, slot=0):
    """The numpy Generator of one purpose at one step and slot: distinct arguments give distinct counters of Philox."""
    philox = np.random.Philox(key=[seed, PURPOSES.index(purpose)], counter=[0, 0, slot, step])
    return np.random.Generator(philox)


def normal(rng, shape):
    """N(0, 1) -> fp32 tensor of this shape."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def noise(seed, purpose, step, slots, shape):
    """N(0, 1), each slot from a stream of its own -> fp32 (len(slots), *shape)."""
    return torch.stack([normal(stream(seed, purpose, step, slot), shape) for slot in slots])


def uniform(seed, purpose, step, slots):
    """A number of [0, 1) for each slot, from a stream of its own -> fp32 (len(slots),)."""
    return torch.tensor([stream(seed, purpose, step, slot).random(dtype=np.float32) for slot in slots])


def long_noise(seed, purpose, k, count, slots, shape, first, last):
    """Frames [first, last) of noise k of `count` for clips that may be longer than shape (C, F, H, W).

    Drawn in pieces of F frames, of which the first is `noise`: a longer clip begins as a shorter one does.
    """
    frames = shape[1]
    begin = first // frames
    pieces = [noise(seed, purpose, k + count * i, slots, shape) for i in range(begin, ceil_div(last, frames))]
    return torch.cat(pieces, 2)[:, :, first - begin * frames:last - begin * frames]


def stratified(seed, perm_purpose, xi_purpose, step, batch, chunk=0):
    """u_j = (π(j) + ξ_j) / B, one number in each B-th of [0, 1) -> fp32 (B,); π is drawn per step, ξ_j per slot.

    chunk: of the clips, where each has a u of its own; its slots follow those of the chunks before.
    """
    perm = stream(seed, perm_purpose, step, chunk).permutation(batch)
    xi = np.array([stream(seed, xi_purpose, step, chunk * batch + slot).random() for slot in range(batch)])
    below_one = np.nextafter(np.float32(1), np.float32(0))  # fp32 rounds the last 2⁻²⁵ up to 1
    return torch.from_numpy(np.minimum((perm + xi) / batch, below_one).astype(np.float32))


# ---- order ----------------------------------------------------------------------------------------------------------

class Order:
    """Which samples make a step's batch. Buckets hold counts[b] samples; one batch is of one bucket.

    A bucket is an endless concatenation of its permutations ("passes"), cut into batches of B; a batch may straddle two
    passes, so that each sample comes exactly once per pass even where a bucket is smaller than a batch. Epoch i holds
    ⌊(i+1) N_b / B⌋ − ⌊i N_b / B⌋ batches of bucket b, shuffled among those of the others. takes: what an epoch takes
    from each bucket instead of its N_b samples, whole or Fractions; see `shares`.
    """

    def __init__(self, seed, counts, batch, takes=None):
        self.seed, self.counts, self.batch = seed, list(counts), batch
        self.takes = self.counts if takes is None else takes
        # 15 M samples take a second to permute: keep each bucket's current pass and the one that a batch reaches into.
        self.permutation = lru_cache(2 * len(self.counts))(self.permutation)
        self.interleaved = lru_cache(2)(self.interleaved)

    def before(self, epoch):
        """Batches of each bucket in all earlier epochs."""
        return [epoch * n // self.batch for n in self.takes]

    def epoch(self, step):
        """The epoch that holds the step, by bisection; an epoch of a small dataset may hold none."""
        beyond = (step + len(self.takes)) * self.batch // sum(self.takes) + 1
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
        parts = []
        for i in range(first // n, ceil_div(last, n)):      # the passes that the batch reaches into
            here = slice(max(first - i * n, 0), last - i * n)
            parts.append(self.permutation(bucket, i)[here])
        return bucket, np.concatenate(parts)

    def interleaved(self, epoch):
        """The bucket of each batch of an epoch."""
        counts = np.subtract(self.before(epoch + 1), self.before(epoch))
        buckets = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        return stream(self.seed, "epoch", epoch).permutation(buckets)

    def permutation(self, bucket, i):
        """The order of a bucket's samples in its pass i."""
        return stream(self.seed, "order", i, bucket).permutation(self.counts[bucket])


def shares(counts, mix):
    """What an epoch takes from each bucket, so that every dataset gets its share of the batches -> [[Fraction]].

    counts: the buckets' sizes, a list per dataset; mix: a weight for each dataset, above 0. A dataset's buckets keep
    their proportions, and an epoch is as long as without.
    """
    whole = sum(map(sum, counts))
    weights = [Fraction(weight) / sum(map(Fraction, mix)) for weight in mix]
    return [[weight * whole * n / sum(sizes) for n in sizes] for weight, sizes in zip(weights, counts, strict=True)]


# ---- a step ahead, and to the GPU -----------------------------------------------------------------------------------

class Ahead:
    """ahead(role, step) -> draw(role, step) on the device. A thread draws a role's next step while this one is used.

    draw: a pure function that gives [NamedTuple of CPU tensors]; stride: {role: steps from one of its draws to the
    next}. The default device copies nothing.
    """

    def __init__(self, draw, stride, device=torch.device("cpu")):
        self.draw, self.stride, self.device = draw, stride, device
        self.thread = ThreadPoolExecutor(1)
        self.next = {}                                      # {role: (step, its future)}

    def __call__(self, role, step):
        expected, future = self.next.pop(role, (None, None))
        if step != expected:                                # the first, or not the next
            future = self.begin(role, step)
        after = step + self.stride[role]
        self.next[role] = after, self.begin(role, after)
        return future.result()

    def begin(self, role, step):
        return self.thread.submit(lambda: send(self.draw(role, step), self.device))


def send(x, device):
    """x on the device: a tensor, or a NamedTuple, tuple, list or dict of whatever, whose tensors are sent.

    A copy to a GPU is begun, not waited for: it joins the device's default stream, so that kernels launched once this
    has returned find it complete. Memory that is not page-locked is copied there first, else the copy would wait.
    """
    if torch.is_tensor(x):
        if on_gpu(device) and not on_gpu(x.device) and not x.is_pinned():
            x = page_locked(x.shape, x.dtype).copy_(x)
        return x.to(device, non_blocking=True)
    if isinstance(x, (list, tuple)):
        make = getattr(x, "_make", type(x))
        return make(send(item, device) for item in x)
    if isinstance(x, dict):
        return {name: send(item, device) for name, item in x.items()}
    return x


def on_gpu(device):
    """Whether a device wants page-locked memory. Tests replace this and the next one."""
    return device.type == "cuda"


def page_locked(shape, dtype=torch.float32):
    """Memory that a GPU copies from by itself. PyTorch reuses it once the copies from it are done."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


# ---- reading --------------------------------------------------------------------------------------------------------

class Micro(NamedTuple):
    """What one rank forwards at once."""
    x0: torch.Tensor    # (B, C, F, H, W) fp32, normalised
    text: torch.Tensor  # (B, S, E) fp32, zeros after the last token
    null: torch.Tensor  # (S, E) fp32, the text of dropout and guidance
    drop: torch.Tensor  # (B,) fp32 in [0, 1): the text is dropped where it is < p
    u: torch.Tensor     # (B,) fp32 in [0, 1), stratified over the global batch; (B, chunks) where clips have chunks
    e: torch.Tensor     # (B, C, F, H, W) fp32 noise
    give: torch.Tensor  # (B,) fp32 in [0, 1): the first frame is given where it is < p
    prefix: torch.Tensor    # (B,) fp32 in [0, 1): where it is < p, the first chunks stay clean
    ids: list           # of the samples in the dataset
    slots: list         # of the samples in the global batch
    extras: dict        # {name: (B, …) fp32} of the dataset's extra tensors, as they were stored


class Folder:
    """A dataset's samples as they were stored, by id: 0 … count − 1, bucket after bucket."""

    def __init__(self, path):
        self.path, self.manifest = Path(path), read_manifest(path)
        allow_files(len(self.manifest["files"]))
        buckets, text = self.manifest["buckets"], self.manifest["text"]
        dtype = DTYPES[self.manifest["dtype"]]
        self.shapes = [tuple(bucket["shape"]) for bucket in buckets]
        self.first = np.cumsum([0] + [bucket["count"] for bucket in buckets]).tolist()
        self.count = self.first[-1]
        # what a run knows it by
        self.content = self.manifest.get("content", self.manifest["crc32"])
        widths = [stride(shape, dtype) // dtype.itemsize for shape in self.shapes]
        self.latents = [Rows(path, b["files"], width, dtype) for b, width in zip(buckets, widths)]
        self.tokens = Rows(path, text["files"], text["width"], dtype)
        self.extras = []        # of each bucket {name: (shape, Rows)}
        for bucket in buckets:
            found = {}
            for name, about in bucket.get("extras", {}).items():
                wide = stride(about["shape"], DTYPES[about["dtype"]]) // DTYPES[about["dtype"]].itemsize
                found[name] = tuple(about["shape"]), Rows(path, about["files"], wide, DTYPES[about["dtype"]])
            self.extras.append(found)
        self.text_off = self.array("text_off.npy")
        self.crc = self.array("crc.npy")
        self.place = self.array("place.npy")
        # opened now, for prepare.py may give its name to another while we train
        self.lines = open(self.path / listed(self.manifest, "captions.jsonl"), "rb")
        self.checked = np.zeros((self.count, 2 + len(self.extras[0])), bool)

    def array(self, name):
        """A small file of numbers, mapped; None where the dataset has none of that name."""
        name = listed(self.manifest, name)
        return name and np.load(self.path / name, mmap_mode="r")

    def find(self, id):
        """Which bucket a sample is in, and its row there."""
        bucket = bisect_right(self.first, id) - 1
        if self.place is None:
            return bucket, id - self.first[bucket]
        return bucket, int(self.place[id])

    def latent(self, id):
        """(C, F, H, W) as stored, mapped."""
        bucket, row = self.find(id)
        shape = self.shapes[bucket]
        z = self.latents[bucket](row)[0, :math.prod(shape)].view(shape)
        self.check(id, 0, z, self.latents[bucket], row)
        return z

    def text(self, id):
        """(S_i, E) as stored, mapped."""
        first, count, _ = self.text_off[id].tolist()
        rows = self.tokens(first, count)
        self.check(id, 1, rows, self.tokens, first)
        return rows

    def extra(self, id, name):
        """One of a sample's extra tensors as stored, mapped."""
        bucket, row = self.find(id)
        shape, rows = self.extras[bucket][name]
        x = rows(row)[0, :math.prod(shape)].view(shape)
        self.check(id, 2 + list(self.extras[bucket]).index(name), x, rows, row)
        return x

    def null(self):
        """(S_0, E), the text of no prompt."""
        return self.tokens(*self.manifest["text"]["null"])

    def caption(self, id):
        return self.said(id)["caption"]

    def said(self, id):
        """A sample's caption and source."""
        self.captions.seek(self.text_off[id, 2])
        return json.loads(self.captions.readline())

    @cached_property
    def captions(self):
        """The file of captions. Training needs none: its checksum waits for whoever asks for the first one."""
        name = listed(self.manifest, "captions.jsonl")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.lines.fileno()), (self.path / name).stat()):
                check_crc32(self.path, name, self.manifest)
        return self.lines

    def check(self, id, part, stored, source, row):
        """Compares a sample's latent (part 0), text (1) or extra tensor with its checksum, when it is first read."""
        if not self.checked[id, part]:
            if zlib.crc32(raw(stored)) != self.crc[id, part]:
                file = self.path / source.files[source.find(row)[0]]
                raise ValueError(f"{file}: sample {id} is not what was written (its checksum differs). "
                                 f"Copy the file again, or delete {self.path} and run the command that made it")
            self.checked[id, part] = True

    def will_need(self, id):
        """Has the system fetch a sample from disk meanwhile."""
        bucket, row = self.find(id)
        self.latents[bucket].will_need(row)
        for _, rows in self.extras[bucket].values():
            rows.will_need(row)
        self.tokens.will_need(*self.text_off[id, :2].tolist())


class Latents:
    """Datasets in training order: `at(step)` gives this rank's micro-batches, while a thread prepares the next step's.

    path: a folder, or several of one codec, whose ids follow one another; latents of all are normalised as the first's
    that is not of stills alone.
    mix: each one's share of the batches, in any unit; None = by their sizes. batch: samples per update, over all ranks;
    micro_batch: samples per forward, None = a rank's whole share; rank and world: among data ranks; val: samples to
    hold out of training; chunk: latent frames that have a t of their own, None = all together. device: where `at` puts
    its tensors and where `null` is; all other methods give CPU tensors, page-locked where the device is a GPU: `send`
    copies them.
    Raises FileNotFoundError or ValueError, saying what to do, for a dataset or a sample that is not what was written.
    """

    def __init__(self, path, *, seed, batch, micro_batch=None, rank=0, world=1, val=0, mix=None,
                 chunk=None, device="cpu"):
        micro_batch = micro_size(batch, micro_batch, world)
        self.device = torch.device(device)
        self.seed, self.batch, self.chunk = seed, batch, chunk
        ours = range(rank * batch // world, (rank + 1) * batch // world)
        self.slots = [list(range(i, i + micro_batch)) for i in ours[::micro_batch]]

        paths = [path] if isinstance(path, str | Path) else list(path)
        self.folders = [Folder(path) for path in paths]
        # channels of motion are constant in stills: divided by their std, clips would be enormous
        moving = [folder for folder in self.folders if any(shape[1] > 1 for shape in folder.shapes)]
        self.manifest = (moving + self.folders)[0].manifest
        for i, other in enumerate(self.folders[1:], 1):
            check_alike(self.folders[0], other)
            if other.content in [folder.content for folder in self.folders[:i]]:
                raise ValueError(f"{other.path} is given twice: --mix takes the share of each dataset")
        self.begin = np.cumsum([0] + [folder.count for folder in self.folders]).tolist()
        self.count = self.begin[-1]
        self.shapes = [shape for folder in self.folders for shape in folder.shapes]
        self.first = [0]                    # id of each bucket's first sample
        for begin, folder in zip(self.begin, self.folders):
            self.first += [begin + first for first in folder.first[1:]]
        self.content = self.folders[0].content
        if len(paths) > 1:
            self.content = zlib.crc32(json.dumps([folder.content for folder in self.folders]).encode())
        self.mean = torch.tensor(self.manifest["mean"] or []).view(-1, 1, 1, 1)
        self.std = torch.tensor(self.manifest["std"] or []).view(-1, 1, 1, 1)

        self.held_out = held_out(self.folders, self.begin, val, mix)
        self.train = np.delete(np.arange(self.count), self.held_out)
        bounds = np.searchsorted(self.train, self.first)
        self.buckets = [self.train[a:b] for a, b in zip(bounds, bounds[1:])]
        counts, takes = [len(ids) for ids in self.buckets], None
        if mix is not None:
            sizes, rest = [], iter(counts)
            for folder in self.folders:
                sizes.append([next(rest) for _ in folder.shapes])
            takes = sum(shares(sizes, mix), [])
        self.order = Order(seed, counts, batch, takes)

        # One torch thread per worker, or OpenMP's pools compete with training for the cores.
        self.workers = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        self.draws = Ahead(lambda role, step: self.read(step), {"train": 1}, self.device)
        self.pages = defaultdict(list)
        text = self.manifest["text"]
        self.text_shape = text["length"], text["width"]
        null, = padded([self.folders[0].null()], text)
        self.null = send(null, self.device)

    def at(self, step):
        """This rank's part of a step -> [Micro] on the device, a pure function of the step."""
        return self.draws("train", step)

    def read(self, step):
        """What `at` gives, on the CPU."""
        _, ids = self.batch_ids(step)
        folder, _ = self.find(ids[0])
        if not holds_latents(folder.manifest):
            raise ValueError(f"{folder.path} holds prompts without latents: "
                             "one can distil from it, not train on it")
        self.will_need([ids[slot] for slots in self.slots for slot in slots])
        u = self.uniforms(step, self.shape_of(ids[0])[1])
        return [self.micro(step, [ids[slot] for slot in slots], slots, u[slots])
                for slots in self.slots]

    def uniforms(self, step, frames):
        """u of the global batch (B,), or of each of its chunks (B, chunks): the first one's is the same."""
        if self.chunk is None or self.chunk >= frames:
            return stratified(self.seed, "t_perm", "t", step, self.batch)
        return torch.stack([stratified(self.seed, "t_perm", "t", step, self.batch, chunk)
                            for chunk in range(ceil_div(frames, self.chunk))], 1)

    def micro(self, step, ids, slots, u):
        def fill(out, slot):                                # `noise`, shared among the workers
            stream(self.seed, "noise", step, slot).standard_normal(dtype=np.float32, out=out)

        x0, text = self.sample(ids)
        e = self.empty(*x0.shape)
        self.each(fill, e.numpy(), slots)
        drop, give, prefix = (uniform(self.seed, purpose, step, slots) for purpose in ("drop", "give", "clean_prefix"))
        return Micro(x0, text, self.null, drop, u, e, give, prefix, ids, slots, self.extras(ids))

    def batch_ids(self, step):
        """The global batch of a step -> (bucket, [id])."""
        bucket, positions = self.order.at(step)
        return bucket, self.buckets[bucket][positions].tolist()

    def epoch_of(self, step):
        """How many times as many samples have been taken before this step as there are to train on."""
        return step * self.batch / len(self.train)

    def find(self, id):
        """Which Folder a sample is in, and its id there."""
        i = bisect_right(self.begin, id) - 1
        return self.folders[i], id - self.begin[i]

    def bucket_of(self, id):
        return bisect_right(self.first, id) - 1

    def shape_of(self, id):
        """(C, F, H, W) of a sample's latent."""
        return self.shapes[self.bucket_of(id)]

    def commonest_shapes(self):
        """The buckets' shapes, that of most samples first, stills last."""
        counts = Counter()
        for bucket, shape in enumerate(self.shapes):
            counts[shape] += self.first[bucket + 1] - self.first[bucket]
        return sorted(counts, key=lambda shape: (shape[1] == 1, -counts[shape]))

    def for_videos(self, n):
        """Ids of the first n samples of one bucket, those held out first; stills only where there is nothing else."""
        longest = max(shape[1] for shape in self.shapes)
        moving = [b for b, shape in enumerate(self.shapes) if shape[1] > 1 or longest == 1]
        held = [id for id in self.held_out if self.bucket_of(id) in moving]
        bucket = self.bucket_of(held[0]) if held else moving[0]
        ids = [id for id in held if self.bucket_of(id) == bucket]
        return (ids + self.buckets[bucket][:n].tolist())[:n]

    def caption(self, id):
        """The sample's caption."""
        folder, id = self.find(id)
        return folder.caption(id)

    def sample(self, ids):
        """Samples of one bucket -> x0 (B, C, F, H, W) fp32 normalised, text (B, S, E) fp32."""
        def fill(id, x, padded):
            self.read_latent(id, x)
            self.read_text(id, padded)

        x0 = self.empty(len(ids), *self.shape_of(ids[0]))
        text = self.empty(len(ids), *self.text_shape)
        self.each(fill, ids, x0, text)
        return x0, text

    def text(self, ids):
        """Text of samples of any bucket -> (B, S, E) fp32."""
        text = self.empty(len(ids), *self.text_shape)
        self.each(self.read_text, ids, text)
        return text

    def extra_shapes(self):
        """{name: shape} of the extra tensors of the first bucket's samples; all others have those names too."""
        return {name: shape for name, (shape, _) in self.folders[0].extras[0].items()}

    def extras(self, ids):
        """Extra tensors of samples of one bucket -> {name: (B, …) fp32}, as they were stored."""
        def fill(id, name, out):
            folder, id = self.find(id)
            out.copy_(folder.extra(id, name))

        found = {}
        folder, own = self.find(ids[0])
        for name, (shape, _) in folder.extras[folder.find(own)[0]].items():
            found[name] = self.empty(len(ids), *shape)
            self.each(fill, ids, [name] * len(ids), found[name])
        return found

    def will_need(self, ids):
        """Has the system fetch all these samples from disk while the first of them is read."""
        for id in ids:
            folder, id = self.find(id)
            folder.will_need(id)

    def read_latent(self, id, x):
        folder, id = self.find(id)
        # The one place where latents are normalised. torch.sub(z, mean, out=x) would give the same bits, and takes
        # longer: it makes an fp32 copy of z first.
        x.copy_(folder.latent(id)).sub_(self.mean).div_(self.std)

    def read_text(self, id, padded):
        folder, id = self.find(id)
        pad(folder.text(id), padded)

    def each(self, function, *lists):
        """Calls function on the first of each list, the second and so on, shared among the workers; errors surface."""
        items = list(zip(*lists))
        shares = [items[i::WORKERS] for i in range(min(WORKERS, len(items)))]
        list(self.workers.map(lambda share: [function(*item) for item in share], shares))

    def empty(self, *shape):
        """An fp32 tensor that reuses a freed batch's memory: page-faulting new memory costs more than the read."""
        if on_gpu(self.device):
            return page_locked(shape)

        # malloc gives blocks of this size back to the system as soon as they are freed, and the next batch would fault
        # in every page anew. So the pages stay with us, and each tensor gets a view of them: when the last tensor on
        # that view has gone, the view goes, and its finalizer puts the pages on the list for the next batch.
        free = self.pages[math.prod(shape)]
        try:
            pages = free.pop()
        except IndexError:
            pages = np.empty(math.prod(shape), np.float32)
        view = pages[:]
        weakref.finalize(view, free.append, pages).atexit = False
        return torch.from_numpy(view).view(shape)


class Rows:
    """Rows of equal width that continue from file to file, memory-mapped: rows(first, count) -> (count, width)."""

    def __init__(self, path, files, width, dtype):
        self.files = [name for name, _ in files]
        self.first = np.cumsum([0] + [count for _, count in files]).tolist()
        self.row_bytes, self.maps, self.tensors = width * dtype.itemsize, [], []
        for name in self.files:
            with open(Path(path) / name, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")             # of read-only memory: nothing writes
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self.tensors.append(torch.frombuffer(self.maps[-1], dtype=dtype).view(-1, width))

    def find(self, first):
        i = bisect_right(self.first, first) - 1
        return i, first - self.first[i]

    def __call__(self, first, count=1):
        i, row = self.find(first)
        return self.tensors[i][row:row + count]

    def will_need(self, first, count=1):
        i, row = self.find(first)
        begin = row * self.row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):                  # not on Windows
            self.maps[i].madvise(mmap.MADV_WILLNEED, begin, (row + count) * self.row_bytes - begin)


def held_out(folders, begin, val, mix):
    """Ids that are not trained on: of each dataset its share of `val`, 1 in 20 at most.

    The same samples for every seed, so that the validation losses of two seeds compare.
    """
    if mix is None:
        mix = [folder.count for folder in folders]
    ids = []
    for first, folder, weight in zip(begin, folders, mix):
        n = min(round(val * weight / sum(mix)), folder.count // 20)
        shuffled = stream(0, "held_out", 0).permutation(folder.count)
        ids += (first + shuffled[:n]).tolist()
    return ids


def holds_latents(manifest):
    """Whether a dataset has latents, not prompts alone."""
    return all(bucket["files"] for bucket in manifest["buckets"])


def check_alike(first, other):
    """Refuses a dataset that cannot be mixed with the first."""
    def described(folder):
        about = {"codec": folder.manifest["codec"], "text length": folder.manifest["text"]["length"],
                 "null text (--negative)": zlib.crc32(raw(folder.null())), "latents": holds_latents(folder.manifest),
                 "extra tensors": sorted(folder.extras[0])}
        if all(any(frames > 1 for _, frames, _, _ in some.shapes) for some in (first, other)):
            about["fps"] = folder.manifest["fps"]       # of stills it says nothing
        return about

    wanted, found = described(first), described(other)
    for name, value in found.items():
        if value != wanted[name]:
            raise ValueError(f"{other.path} and {first.path} do not go together: the {name} of one is {value}, "
                             f"of the other {wanted[name]}")


def stride(shape, dtype):
    """Bytes from one latent to the next: whole pages, so that reading one touches no other."""
    return ceil_div(math.prod(shape) * dtype.itemsize, PAGE) * PAGE


def pad(rows, out):
    """Rows, then zeros. Wan attends to these: they are part of its input."""
    out[:len(rows)].copy_(rows)
    out[len(rows):].zero_()
    return out


def padded(embeddings, text):
    """[(S_i, E)] -> fp32 (B, S, E), zeros after each one's last token. text: a manifest's block of that name."""
    shape = text["length"], text["width"]
    return torch.stack([pad(rows, torch.empty(shape)) for rows in embeddings])


def raw(tensor):
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy()


def micro_size(batch, micro_batch, world):
    """Samples that a rank forwards at once; micro_batch: as asked for, None = a rank's whole share of the batch.

    A batch that world x micro_batch does not divide is refused, naming those that work.
    """
    if micro_batch is None:
        micro_batch = max(batch // world, 1)
    if micro_batch < 1:
        raise ValueError(f"--micro_batch={micro_batch} is below 1")
    unit = world * micro_batch
    if batch < 1 or batch % unit:
        micro = [f"--micro_batch={n}" for n in range(1, batch + 1) if batch % (world * n) == 0]
        below = batch // unit * unit
        whole = [f"--batch={n}" for n in (below, below + unit) if n > 0]
        raise ValueError(f"--batch={batch} does not divide into micro-batches of {micro_batch} on "
                         f"{world} data ranks; these do: {', '.join(micro + whole)}")
    return micro_batch


def read_manifest(path):
    """The manifest of a dataset. Compares its checksum, all files' sizes, and checksums of small files but captions."""
    path = Path(path)
    if not (path / "manifest.json").exists():
        if list(path.glob("journal.*.jsonl")):
            raise FileNotFoundError(f"the dataset in {path} is unfinished: "
                                    "the same prepare.py command goes on with it")
        raise FileNotFoundError(f"no dataset in {path}: `python prepare.py --out={path}` writes one of "
                                f"moving shapes, `python prepare.py --videos=DIR --out={path}` one of "
                                "your clips")
    manifest = sound_manifest(path)
    for name, wanted in manifest["files"].items():      # reading a map past its file's end kills
        size = (path / name).stat().st_size if (path / name).exists() else "no"
        if size != wanted["size"]:
            way = f"Copy it again, or delete {path} and run the same prepare.py command"
            if "crc32" in wanted:
                way = ANEW
            raise ValueError(f"{path / name} has {size} bytes instead of {wanted['size']}. {way}")
        if "crc32" in wanted and name != listed(manifest, "captions.jsonl"):
            check_crc32(path, name, manifest)
    return manifest


def sound_manifest(path):
    """The manifest of a dataset, by its own checksum."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. {ANEW}") from error
    if manifest.get("version") not in VERSIONS:
        raise ValueError(f"{path} is a dataset of version {manifest.get('version')}, and this code reads "
                         f"version {' and '.join(map(str, VERSIONS))}: make it again with this prepare.py")
    if manifest.get("crc32") != manifest_crc32(manifest):
        raise ValueError(f"{file} is not what was written (its checksum differs). {ANEW}")
    return manifest


def listed(manifest, name):
    """The small file that a manifest lists as `name`, which may have got a number; None where it lists none."""
    return next((file for file in manifest["files"] if re.sub(r"\.\d+", "", file) == name), None)


ANEW = "Copy it again, or run the command that made it again, which writes it anew"


def check_crc32(path, name, manifest):
    """Compares a small file of a dataset with its checksum in the manifest."""
    if crc32_of(path / name) != manifest["files"][name]["crc32"]:
        raise ValueError(f"{path / name} is not what was written (its checksum differs). {ANEW}")


def crc32_of(path, most=None):
    """CRC32 of a file's content, which is not held, or of its first `most` bytes and a page from each 16th of it."""
    crc = 0
    with open(path, "rb") as file:
        if most is not None:
            crc, size = zlib.crc32(file.read(most)), os.fstat(file.fileno()).st_size
            for i in range(1, 17):      # films of a constant rate may begin alike and be as long
                file.seek(max(most, (size - PAGE) * i // 16))
                crc = zlib.crc32(file.read(PAGE), crc)
            return crc
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def allow_files(more):
    """Lets this process open so many files more, if the system allows: Python keeps a mapped file open."""
    # Windows has no such limit; some systems give less than they say.
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def manifest_crc32(manifest):
    return zlib.crc32(json.dumps(manifest | {"crc32": None}, sort_keys=True).encode())
