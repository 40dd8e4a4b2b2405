"""Random numbers and training data, both as pure functions. Imports nothing of ours.

Every random number of a run is a function of (seed, purpose, step, slot), slot being a sample's index in the global
batch, and the order of the data is one of (seed, step). So a run has no loader and no generator to save: resumed, or on
another number of ranks, it meets the identical samples, noise and times.

A dataset is a folder of raw numbers that `Writer` writes and `Latents` reads:

    manifest.json            codec, mean and std, dtype, fps; shape, count and files of each bucket; sizes and checksums
    16x21x60x104.0.bin       latents of one shape by rank 0, not normalised, each on pages of its own
    text.0.bin               text embeddings by rank 0, a row per token, no padding; text.null.bin: those of no prompt
    text_off.npy             int64 (N, 3): a sample's first text row, how many, and the byte where its caption begins
    crc.npy                  uint32 (N, 2): CRC32 of a sample's latent and text, checked when they are first read
    captions.jsonl           id, caption and source of each sample
    journal.0.jsonl          what rank 0 has stored, from where an interrupted Writer goes on; spec.json: its settings

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
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np

import torch

VERSION = 1
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
            "clip")


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
    """x on the device: a tensor, or a NamedTuple or list of whatever, whose tensors are sent.

    A copy to a GPU is begun, not waited for: it joins the device's default stream, so that kernels launched once this
    has returned find it complete. Memory that is not page-locked is copied there first, else the copy would wait.
    """
    if torch.is_tensor(x):
        if on_gpu(device) and not on_gpu(x.device) and not x.is_pinned():
            x = page_locked(x.shape, x.dtype).copy_(x)
        return x.to(device, non_blocking=True)
    if isinstance(x, list):
        return [send(item, device) for item in x]
    if isinstance(x, tuple):
        return x._make(send(item, device) for item in x)
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
    u: torch.Tensor     # (B,) fp32 in [0, 1), stratified over the global batch
    e: torch.Tensor     # (B, C, F, H, W) fp32 noise
    ids: list           # of the samples in the dataset
    slots: list         # of the samples in the global batch


class Latents:
    """A dataset in training order: `at(step)` gives this rank's micro-batches, while a thread prepares the next step's.

    batch: samples per update, over all ranks; micro_batch: samples per forward, None = a rank's whole share; rank and
    world: among data ranks; val: samples to hold out of training; device: where `at` puts its tensors and where `null`
    is. All other methods give CPU tensors, page-locked where the device is a GPU: `send` copies them.
    Raises FileNotFoundError or ValueError, saying what to do, for a dataset or a sample that is not what was written.
    """

    def __init__(self, path, *, seed, batch, micro_batch=None, rank=0, world=1, val=0,
                 device="cpu"):
        micro_batch = micro_size(batch, micro_batch, world)
        self.path, self.device = Path(path), torch.device(device)
        self.seed, self.batch = seed, batch
        ours = range(rank * batch // world, (rank + 1) * batch // world)
        self.slots = [list(range(i, i + micro_batch)) for i in ours[::micro_batch]]

        self.manifest = read_manifest(path)
        allow_files(len(self.manifest["files"]))
        buckets, text = self.manifest["buckets"], self.manifest["text"]
        dtype = DTYPES[self.manifest["dtype"]]
        self.shapes = [tuple(bucket["shape"]) for bucket in buckets]
        # ids run from bucket to bucket
        self.first = np.cumsum([0] + [bucket["count"] for bucket in buckets]).tolist()
        self.count = self.first[-1]
        widths = [stride(shape, dtype) // dtype.itemsize for shape in self.shapes]
        self.latents = [Rows(path, b["files"], width, dtype) for b, width in zip(buckets, widths)]
        self.tokens = Rows(path, text["files"], text["width"], dtype)
        self.text_off = np.load(self.path / "text_off.npy", mmap_mode="r")
        self.crc = np.load(self.path / "crc.npy", mmap_mode="r")
        self.checked = np.zeros((self.count, 2), bool)
        self.mean = torch.tensor(self.manifest["mean"] or []).view(-1, 1, 1, 1)
        self.std = torch.tensor(self.manifest["std"] or []).view(-1, 1, 1, 1)

        # The same samples for every seed, so that the validation losses of two seeds compare.
        shuffled = stream(0, "held_out", 0).permutation(self.count)
        self.held_out = shuffled[:min(val, self.count // 20)].tolist()
        self.train = np.delete(np.arange(self.count), self.held_out)
        bounds = np.searchsorted(self.train, self.first)
        self.buckets = [self.train[a:b] for a, b in zip(bounds, bounds[1:])]
        self.order = Order(seed, [len(ids) for ids in self.buckets], batch)

        # One torch thread per worker, or OpenMP's pools compete with training for the cores.
        self.workers = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        self.draws = Ahead(lambda role, step: self.read(step), {"train": 1}, self.device)
        self.pages = defaultdict(list)
        self.text_shape = text["length"], text["width"]
        null, = padded([self.tokens(*text["null"])], text)
        self.null = send(null, self.device)

    def at(self, step):
        """This rank's part of a step -> [Micro] on the device, a pure function of the step."""
        return self.draws("train", step)

    def read(self, step):
        """What `at` gives, on the CPU."""
        bucket, ids = self.batch_ids(step)
        if not self.manifest["buckets"][bucket]["files"]:
            raise ValueError(f"{self.path} holds prompts without latents: "
                             "one can distil from it, not train on it")
        self.will_need([ids[slot] for slots in self.slots for slot in slots])
        u = stratified(self.seed, "t_perm", "t", step, self.batch)
        return [self.micro(step, [ids[slot] for slot in slots], slots, u[slots])
                for slots in self.slots]

    def micro(self, step, ids, slots, u):
        def fill(out, slot):                                # `noise`, shared among the workers
            stream(self.seed, "noise", step, slot).standard_normal(dtype=np.float32, out=out)

        x0, text = self.sample(ids)
        e = self.empty(*x0.shape)
        self.each(fill, e.numpy(), slots)
        drop = [stream(self.seed, "drop", step, slot).random(dtype=np.float32) for slot in slots]
        return Micro(x0, text, self.null, torch.tensor(drop), u, e, ids, slots)

    def batch_ids(self, step):
        """The global batch of a step -> (bucket, [id])."""
        bucket, positions = self.order.at(step)
        return bucket, self.buckets[bucket][positions].tolist()

    def epoch_of(self, step):
        """How many times the training samples have been gone through before this step."""
        return step * self.batch / len(self.train)

    def find(self, id):
        """Which bucket a sample is in, and its row there."""
        bucket = bisect_right(self.first, id) - 1
        return bucket, id - self.first[bucket]

    def shape_of(self, id):
        """(C, F, H, W) of a sample's latent."""
        return self.shapes[self.find(id)[0]]

    def commonest_shapes(self):
        """The buckets' shapes, that of most samples first."""
        buckets = sorted(self.manifest["buckets"], key=lambda bucket: -bucket["count"])
        return [tuple(bucket["shape"]) for bucket in buckets]

    def caption(self, id):
        """The sample's caption."""
        with open(self.captions, "rb") as lines:
            lines.seek(self.text_off[id, 2])
            return json.loads(lines.readline())["caption"]

    @cached_property
    def captions(self):
        """The file of captions. Training needs none: its checksum waits for whoever asks for the first one."""
        check_crc32(self.path, "captions.jsonl", self.manifest)
        return self.path / "captions.jsonl"

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

    def read_latent(self, id, x):
        bucket, row = self.find(id)
        z = self.latents[bucket](row)[0, :x.numel()].view(x.shape)
        self.check(id, 0, z, self.latents[bucket], row)
        # The one place where latents are normalised. torch.sub(z, mean, out=x) would give the same bits, and takes
        # longer: it makes an fp32 copy of z first.
        x.copy_(z).sub_(self.mean).div_(self.std)

    def read_text(self, id, padded):
        first, count, _ = self.text_off[id].tolist()
        rows = self.tokens(first, count)
        self.check(id, 1, rows, self.tokens, first)
        pad(rows, padded)

    def check(self, id, part, stored, source, row):
        """Compares a sample's latent (part 0) or text (1) with its checksum, the first time it is read."""
        if not self.checked[id, part]:
            if zlib.crc32(raw(stored)) != self.crc[id, part]:
                file = self.path / source.files[source.find(row)[0]]
                raise ValueError(f"{file}: sample {id} is not what was written (its checksum differs). "
                                 f"Copy the file again, or delete {self.path} and run "
                                 "the same prepare.py command")
            self.checked[id, part] = True

    def will_need(self, ids):
        """Has the system fetch all these samples from disk while the first of them is read."""
        for id in ids:
            bucket, row = self.find(id)
            self.latents[bucket].will_need(row)
            self.tokens.will_need(*self.text_off[id, :2].tolist())

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
    path, file = Path(path), Path(path) / "manifest.json"
    if not file.exists():
        if list(path.glob("journal.*.jsonl")):
            raise FileNotFoundError(f"the dataset in {path} is unfinished: "
                                    "the same prepare.py command goes on with it")
        raise FileNotFoundError(f"no dataset in {path}: `python prepare.py --out={path}` writes one of "
                                f"moving shapes, `python prepare.py --videos=DIR --out={path}` one of "
                                "your clips")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. {ANEW}") from error
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} is a dataset of version {manifest.get('version')}, and this code "
                         f"reads version {VERSION}: make it again with this prepare.py")
    if manifest.get("crc32") != manifest_crc32(manifest):
        raise ValueError(f"{file} is not what was written (its checksum differs). {ANEW}")
    for name, wanted in manifest["files"].items():      # reading a map past its file's end kills
        size = (path / name).stat().st_size if (path / name).exists() else "no"
        if size != wanted["size"]:
            way = f"Copy it again, or delete {path} and run the same prepare.py command"
            if "crc32" in wanted:
                way = ANEW
            raise ValueError(f"{path / name} has {size} bytes instead of {wanted['size']}. {way}")
        if "crc32" in wanted and name != "captions.jsonl":
            check_crc32(path, name, manifest)
    return manifest


ANEW = "Copy it again, or run the same prepare.py command again, which writes it anew"


def check_crc32(path, name, manifest):
    """Compares a small file of a dataset with its checksum in the manifest."""
    if crc32_of(path / name) != manifest["files"][name]["crc32"]:
        raise ValueError(f"{path / name} is not what was written (its checksum differs). {ANEW}")


def crc32_of(path):
    """CRC32 of a file's content, which is not held."""
    crc = 0
    with open(path, "rb") as file:
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


# ---- writing --------------------------------------------------------------------------------------------------------

class Writer:
    """Adds samples to a dataset, by one process or several at once; interrupted and made again, it goes on.

    Each rank appends to files of its own. What its journal lists is on disk; whatever lies beyond is cut off on return.
    spec: codec (a dict, with text_width and text_length), fps, dtype "bf16" or "fp32", shape (only for a dataset of
    prompts without latents: theirs), and what else must not change while a dataset is filled; ValueError if it does.
    done: the keys that all ranks had saved before.
    """

    def __init__(self, path, spec, rank=0):
        self.path, self.rank, self.dtype = Path(path), rank, DTYPES[spec["dtype"]]
        self.spec = json.loads(json.dumps(spec))            # as it is read back: lists, not tuples
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "spec.json").exists():
            begun = json.loads((self.path / "spec.json").read_text())
            changed = [f"{key} was {begun.get(key)} and is now {self.spec.get(key)}"
                       for key in sorted(begun | self.spec) if begun.get(key) != self.spec.get(key)]
            if changed:
                raise ValueError(f"{path} was begun with other settings: {'; '.join(changed)}. "
                                 "Take those, choose another --out, or delete it")
        else:
            with write_whole(self.path / "spec.json") as file:
                file.write(json.dumps(self.spec).encode())

        self.done = Keys(line for _, line in self.lines())
        own = self.path / f"journal.{rank}.jsonl"
        own.touch()
        sizes, end = Counter(), 0
        for line in whole_lines(own):
            sizes.update(self.sizes(json.loads(line)))
            end += len(line)
        self.files = {name: self.open_at(name, size) for name, size in sizes.items() if size}
        self.journal, self.pending, self.saved = self.open_at(own.name, end), [], monotonic()

    def add(self, latent, text, *, caption, source, key):
        """Stores a sample: latent (C, F, H, W), None for a prompt alone, and text (S_i, E); key: its name in `done`."""
        length, width = self.spec["codec"]["text_length"], self.spec["codec"]["text_width"]
        if text.ndim != 2 or text.shape[1] != width or len(text) > length:
            raise ValueError(f"{source}: text of shape {tuple(text.shape)}, "
                             f"wanted at most {length} rows of {width}")
        if not all(part.isfinite().all() for part in (latent, text) if part is not None):
            raise ValueError(f"{source}: a latent or text with numbers that are not finite")
        parts = [b"" if part is None else raw(part.to(self.dtype)).tobytes()
                 for part in (latent, text)]
        record = {"rank": self.rank, "key": key, "caption": caption, "source": source,
                  "rows": len(text), "shape": self.spec.get("shape") or list(latent.shape),
                  "crc": [zlib.crc32(part) for part in parts]}
        for part, (name, size) in zip(parts, self.sizes(record).items()):
            if size and name not in self.files:
                self.files[name] = self.open_at(name, 0)
            if size:
                self.files[name].write(part.ljust(size, b"\0"))
        self.pending.append(record)
        if monotonic() > self.saved + 5:    # seconds of work that a crash may cost
            self.save()

    def mark(self, key):
        """Puts a key into the journal without a sample: that of a film, say, of which all clips are stored."""
        self.pending.append({"rank": self.rank, "key": key})

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
        shapes, samples = self.samples()
        if not len(samples):
            raise ValueError(f"nothing was stored in {self.path}: there is no dataset to finish")
        buckets, sizes = self.buckets(shapes, samples)
        text, text_sizes = self.texts(samples, len(null_text))
        sizes |= text_sizes

        # 2) no file is longer than it says: a rank that was killed, and is not with us now, has left a tail
        for name, size in sizes.items():
            with self.open_at(name, size) as file:
                sync(file)

        # 3) mean and std; the files of small things, each there whole or not at all
        if mean is None:
            mean, std = self.moments(buckets, half_power)
        with write_whole(self.path / "text.null.bin") as file:
            file.write(raw(null_text.to(self.dtype)))
        with write_whole(self.path / "captions.jsonl") as file:
            starts = self.write_captions(file, samples)
        with write_whole(self.path / "text_off.npy") as file:
            np.save(file, np.stack([samples["first"], samples["rows"], starts], 1))
        with write_whole(self.path / "crc.npy") as file:
            np.save(file, samples["crc"])

        # 4) the manifest, which makes a dataset of them
        files = {name: {"size": size} for name, size in sizes.items()}
        for name in ("text.null.bin", "captions.jsonl", "text_off.npy", "crc.npy"):
            file = self.path / name
            files[name] = {"size": file.stat().st_size, "crc32": crc32_of(file)}
        manifest = {"version": VERSION, "codec": self.spec["codec"], "mean": mean, "std": std,
                    "dtype": self.spec["dtype"], "fps": self.spec["fps"], "buckets": buckets,
                    "text": text, "files": files}
        manifest["crc32"] = manifest_crc32(manifest)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items()]
        with write_whole(self.path / "manifest.json") as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return manifest

    def samples(self):
        """All that is saved -> ([shape], array of SAMPLE), bucket after bucket, and rank after rank in each."""
        found = {}

        def rows():
            first = 0
            for start, line in self.lines():
                record = json.loads(line)
                if "crc" in record:                         # else it marks a key
                    shape = found.setdefault(tuple(record["shape"]), len(found))
                    yield shape, record["rank"], start, first, record["rows"], tuple(record["crc"])
                    first += record["rows"]

        samples = np.fromiter(rows(), SAMPLE)
        shapes = sorted(found)
        place = np.empty(len(shapes), np.int32)             # of a shape that was found n-th
        for i, shape in enumerate(shapes):
            place[found[shape]] = i
        samples["shape"] = place[samples["shape"]]
        samples = samples[np.argsort(samples["shape"], kind="stable")]
        return [list(shape) for shape in shapes], samples

    def buckets(self, shapes, samples):
        """The manifest's buckets, and {file: bytes} of their latents."""
        buckets, sizes = [], {}
        for i, shape in enumerate(shapes):
            ranks, counts = np.unique(samples["rank"][samples["shape"] == i], return_counts=True)
            files = []
            if "shape" not in self.spec:                    # prompts have no latents
                files = [[latent_file(shape, rank), n]
                         for rank, n in zip(ranks.tolist(), counts.tolist())]
            sizes |= {name: n * stride(shape, self.dtype) for name, n in files}
            buckets.append({"shape": shape, "count": int(counts.sum()), "files": files})
        return buckets, sizes

    def texts(self, samples, null_rows):
        """The manifest's text, and {file: bytes} of the embeddings by rank."""
        codec, files = self.spec["codec"], []
        for rank in np.unique(samples["rank"]).tolist():
            rows = int(samples["rows"][samples["rank"] == rank].sum())
            if rows:
                files.append([text_file(rank), rows])
        sizes = {name: rows * codec["text_width"] * self.dtype.itemsize for name, rows in files}
        total = sum(rows for _, rows in files)
        if null_rows:
            files = [*files, ["text.null.bin", null_rows]]
        text = {"width": codec["text_width"], "length": codec["text_length"], "rows": total,
                "files": files, "null": [total, null_rows]}
        return text, sizes

    def moments(self, buckets, half_power):
        """Mean and divisor of each channel over all latents stored -> [C], [C]; None, None where there are none."""
        count, total, squares = 0, 0, 0
        for bucket in buckets:
            for z in self.stored(bucket):
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

    def stored(self, bucket):
        """All latents of a bucket, some MB at a time -> float64 (n, C, positions of all axes).

        They are not mapped: the system counts all pages of a map that were touched, and keeps them.
        """
        row, size = stride(bucket["shape"], self.dtype), math.prod(bucket["shape"])
        for name, left in bucket["files"]:
            with open(self.path / name, "rb") as file:
                while left:
                    n = min(left, ceil_div(BLOCK, row))
                    block = torch.from_numpy(np.fromfile(file, np.uint8, n * row)).view(self.dtype)
                    yield block.view(n, -1)[:, :size].reshape(n, bucket["shape"][0], -1).double()
                    left -= n

    def write_captions(self, file, samples):
        """Writes the line of each sample -> where each begins. Caption and source are copied from its journal's line,
        where they stand side by side as JSON: a quote within a string has a backslash before it, so none is mistaken.
        """
        starts, end = np.empty(len(samples), np.int64), 0
        with ExitStack() as stack:
            journals = {rank: stack.enter_context(open(self.path / f"journal.{rank}.jsonl", "rb"))
                        for rank in np.unique(samples["rank"]).tolist()}
            for id, (rank, start) in enumerate(zip(samples["rank"], samples["line"])):
                journal = journals[rank]
                journal.seek(start)
                line = journal.readline()
                both = line[line.index(b'"caption": '):line.index(b', "rows": ')]
                starts[id] = end
                end += file.write(b'{"id": %d, %b}\n' % (id, both))
        return starts

    def lines(self):
        """Lines of all journals, rank after rank -> (where it begins in its file, line)."""
        files = self.path.glob("journal.*.jsonl")
        for file in sorted(files, key=lambda file: int(file.name.split(".")[1])):
            start = 0
            for line in whole_lines(file):
                yield start, line
                start += len(line)

    def sizes(self, record):
        """{file: bytes} that a line of the journal stands for, first its latent's, then its text's."""
        if "crc" not in record:
            return {}
        latent = 0 if "shape" in self.spec else stride(record["shape"], self.dtype)
        text = record["rows"] * self.spec["codec"]["text_width"] * self.dtype.itemsize
        rank = record["rank"]
        return {latent_file(record["shape"], rank): latent, text_file(rank): text}

    def open_at(self, name, size):
        """Opens a file to append after its first `size` bytes."""
        file = open(self.path / name, "ab")
        if file.tell() < size:
            raise ValueError(f"{self.path / name} has {file.tell()} bytes where the journal lists "
                             f"{size}: delete {self.path} and run the same command again")
        file.truncate(size)
        return file


# A sample while `finish` is at work: where its line begins in its rank's journal, its first text row and how many.
SAMPLE = np.dtype([("shape", np.int32), ("rank", np.int32), ("line", np.int64), ("first", np.int64),
                   ("rows", np.int64), ("crc", np.uint32, 2)])


class Keys:
    """`key in keys`, of lines of journals: 8 bytes for each. Two of 10⁶ keys hash alike once in 10⁷ datasets."""

    # the line's first: no more of it is parsed
    KEY = re.compile(rb'"key": ("[^"\\]*(?:\\.[^"\\]*)*")')

    def __init__(self, lines):
        hashes = (hash(self.KEY.search(line)[1]) for line in lines)
        self.hashes = np.sort(np.fromiter(hashes, np.int64))

    def __contains__(self, key):
        wanted = hash(json.dumps(key).encode())
        i = bisect_left(self.hashes, wanted)
        return i < len(self.hashes) and self.hashes[i] == wanted


def latent_file(shape, rank):
    return f"{'x'.join(map(str, shape))}.{rank}.bin"


def text_file(rank):
    return f"text.{rank}.bin"


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
