"""What a run takes, counted on meta tensors: memory of a rank, disk. `--dry_run` prints it; every start on a GPU asks.

What is held all the time (weights, gradients, optimizer, average) is exact. Activations are those of eager PyTorch, an
upper bound for compiled blocks; what kernels need inside is not seen. Imports model, parallel and data.

C F H W latent channels, frames, rows, columns
"""
import copy
import math
import os
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel
from data import micro_size, read_manifest
from model import MODELS, USUAL, Cond, bind, blank, chunk_of, fits, token_grid

# {latent channels: (GB of the VAE's weights, GB of decoding one clip, per latent row and column)}. Decoding holds about
# 14 maps of 4 frames of the decoder's last and widest stage (96 channels) in fp32, the caches of its convolutions among
# them; 23 with the shortcuts of Wan 2.2's decoder (256 channels).
VAES = {
    16: (0.51, 14 * 4 * 96 * 8 * 8 * 4e-9),
    48: (2.82, 23 * 4 * 256 * 8 * 8 * 4e-9),
}


SPEED = 400e12      # floating-point operations a second


class Weight(NamedTuple):
    held: dict          # {what: bytes} on the fullest rank, all the time
    passing: dict       # {what: bytes} on top of that, one of them at a time
    checkpoint: int     # bytes on disk
    dataset: dict = {}  # {what: bytes} on disk that the run makes before it learns


class Pairs(NamedTuple):
    """A dataset of pairs that a run makes by its teacher."""
    count: int
    points: int         # latents of each
    forwards: int       # of the teacher, for each
    bytes: int          # of a number


def dry_run(file, cfg, lora, *, optimizer, learners=1, teacher=False, graphs=1, pairs=None):
    """Prints what a run takes on the ranks of --dry_run beside what is there -> exit code, 2 where it does not fit.

    The dataset's buckets where there is a dataset, else what the model is mostly trained on. See `weigh`.
    """
    ranks, *gb = cfg.dry_run
    device = torch.device("cuda") if gb else parallel.pick_device(cfg.device)
    precision = cfg.precision
    if precision is None:
        precision = "bf16" if parallel.on_gpu(device) else "fp32"
    world = parallel.imagine(ranks, cfg.shard, cfg.sp, precision)
    shape, length = USUAL[cfg.model]
    shapes, width = [shape], MODELS[cfg.model].text_dim
    extras = MODELS[cfg.model].conditions(shape[1:])
    paths = cfg.data
    if isinstance(paths, str):
        paths = [paths]
    if all(Path(path).exists() for path in paths):
        manifests = [read_manifest(path) for path in paths]
        shapes = [tuple(bucket["shape"]) for manifest in manifests for bucket in manifest["buckets"]]
        text = manifests[0]["text"]
        length, width = text["length"], text["width"]
        extras = {name: about["shape"] for name, about in manifests[0]["buckets"][0].get("extras", {}).items()}
    fits(cfg.model, width, shapes, extras, cfg.sp, cfg.window, cfg.tile)
    weight = weigh(cfg, world, lora, shapes, length, optimizer=optimizer, learners=learners, teacher=teacher,
                   graphs=graphs, pairs=pairs)

    if gb:
        memory, disk = 1e9 * gb[0], math.inf
    else:
        memory, disk = memory_of(device, ranks), free_disk(cfg.out)
    if pairs:
        print(making(pairs, cfg, world, shapes, length))
    return show(f"{Path(file).name} --model={cfg.model}, ranks: {ranks}", weight, cfg, world, memory, disk)


def making(pairs, cfg, world, shapes, length):
    """What it takes to make pairs, in words: most of them are of the largest shape, for all that is known."""
    net = blank(cfg.model)
    flops = max(bind(net, shape, world).flops(shape, length) for shape in shapes)
    in_all = pairs.count * pairs.forwards * flops
    hours = in_all / (world.size * SPEED) / 3600
    return (f"{pairs.count:,} pairs are made by {pairs.count * pairs.forwards:,} forwards of the teacher, "
            f"{in_all / 1e15:,.3g} PFLOP: {hours:.2g} h at {SPEED / 1e12:.0f} TFLOP/s a rank, an H100's in bf16")


def start(cfg, world, lora, data, *, optimizer, learners=1, teacher=False, graphs=1):
    """On a GPU, says before anything is allocated what the run takes; ValueError where what is held does not fit."""
    if not parallel.on_gpu(world.device):
        return
    length = data.manifest["text"]["length"]
    weight = weigh(cfg, world, lora, data.shapes, length, optimizer=optimizer, learners=learners, teacher=teacher,
                   graphs=graphs)
    held = sum(weight.held.values())
    most = max(weight.passing.values())
    memory = memory_of(world.device, world.size)
    line = f"{held / 1e9:.1f} GB held and {most / 1e9:.1f} GB of activations at most, of {memory / 1e9:.1f} GB a GPU"
    if held > memory:
        raise ValueError(f"{line}: what is held does not fit. These flags reduce it: {less(cfg, world)}")
    if held + most > memory:
        line += f"; the activations may not fit: {less(cfg, world)} reduce them"
    world.say(line)


def weigh(cfg, world, lora, shapes, length, *, optimizer, learners=1, teacher=False, graphs=1, pairs=None):
    """What a run takes on the fullest rank -> Weight.

    lora {adapter: (rank, alpha)}; shapes (C, F, H, W) of the buckets, length of texts. optimizer: a function of rows
    that gives (optimizer, rows of its state), as step.adamw. learners: nets that learn, adapters of one net with lora,
    the first of them averaged. teacher: whether a frozen net stands beside them. graphs: forwards of one net whose
    activations are held for one backward. pairs: the Pairs that the run makes, None where it makes none.
    """
    micro = micro_size(cfg.batch, cfg.micro_batch, world.data_size)
    net = blank(cfg.model, cfg.remat, lora)
    takes = parallel.memory(net, world)
    trained = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            trained[name] = parallel.Part(p, 0, tuple(p.shape))
    _, state = optimizer(trained)
    moments = size(state) / size(trained)           # bytes of the optimizer per byte of what it trains

    count = sum(part.tensor.numel() for part in trained.values())
    if lora:    # one frozen net; each learner is an adapter of it, an equal part of what is trained
        frozen = takes["parameters"] - takes["gradients"]
        weights = takes["gradients"]
        one = takes["gradients"] // learners
        gathered = takes["gathered"]
        count = count // learners
    else:       # a net for each learner, and perhaps a frozen one
        frozen = 0
        weights = learners * takes["parameters"]
        one = takes["gradients"]
        gathered = learners * takes["gathered"]
        if teacher:
            frozen = parallel.memory(blank(cfg.model), world, trainable=False)["parameters"]
    if cfg.other:   # of two experts the one that is not trained: it begins rollouts, or is there at validations alone
        other = parallel.memory(blank(cfg.model), world, trainable=False)
        if teacher:
            frozen += other["parameters"]
    held = {"frozen weights": frozen, "trained weights": weights, "gradients of one net": one,
            "optimizer": int(learners * moments * one), "average": one, "gathered copies": gathered}

    adapter = net.adapters[0] if lora else None
    passing = {}
    for shape in shapes:
        bound = bind(net, shape, world, cfg.window, cfg.tile, cfg.dense_ends, adapter)
        per_frame = bool(cfg.first_frame) and shape[1] > 1
        kept, most = activations(bound, (micro, *shape), length, world.precision, per_frame)
        passing[f"activations of {micro} x {shape}"] = most + (graphs - 1) * kept
        if teacher and chunk_of(cfg.window, cfg.tile):
            keys = past(net.config, shape, cfg) * micro * (2 if world.precision == "bf16" else 4)
            passing[f"activations and past of {micro} x {shape}, chunk by chunk"] = most + keys
    channels = shapes[0][0]
    if cfg.vae and channels in VAES:
        weights_gb, gb = VAES[channels]
        largest = max(H * W for _, _, H, W in shapes)
        passing["VAE that decodes a validation's clip, about"] = 1e9 * (weights_gb + gb * largest)
    if cfg.other and not teacher:
        passing["the other expert, at a validation"] = other["parameters"] + other["gathered"]
    per_weight = learners * (1 + moments) + 1       # each learner and its moments, and one average
    dataset = {}
    if pairs:
        latent, text = max(map(math.prod, shapes)), length * MODELS[cfg.model].text_dim
        dataset["pairs"] = pairs.count * pairs.points * latent * pairs.bytes
        dataset["texts of pairs"] = pairs.count * text * pairs.bytes
    return Weight(held, passing, int(4 * count * per_weight), dataset)


def past(config, shape, cfg):
    """Numbers that a causal student's rollout of one clip holds beside a whole forward's activations.

    The keys and values of all chunks; without --remat, every chunk's graph holds those before it too, side by side.
    """
    whole = 2 * config.blocks * math.prod(token_grid(config, shape)) * config.dim
    chunks = math.ceil(shape[1] / cfg.tile[0])
    return whole if cfg.remat else whole * (1 + (chunks - 1) / 2)


def size(rows):
    return sum(part.tensor.numel() * part.tensor.element_size() for part in rows.values())


def show(title, weight, cfg, world, memory, disk):
    """Prints the table -> exit code: 0, or 2 where it does not fit, naming the flags that reduce it."""
    in_all = sum(weight.held.values()) + max(weight.passing.values())
    on_disk = (cfg.keep + 1) * weight.checkpoint + sum(weight.dataset.values())
    print(f"{title}: GB of each, at most")
    for what, n in (weight.held | weight.passing).items():
        print(f"{n / 1e9:12.3f}  {what}")
    print(f"{in_all / 1e9:12.3f}  in all{of(memory)}, a tenth of which is left to kernels and fragments")
    print(f"{on_disk / 1e9:12.3f}  on disk{of(disk)}: {cfg.keep + 1} checkpoints, one of them being written"
          f"{', and pairs' if weight.dataset else ''}")
    for what, n in weight.dataset.items():
        print(f"{n / 1e9:12.3f}  of that {what}")
    if in_all > 0.9 * memory:
        print(f"does not fit a rank's memory; these flags reduce it: {less(cfg, world)}", file=sys.stderr)
    if on_disk > disk:
        print("does not fit the disk: reduce --keep, or name another --out", file=sys.stderr)
    return 2 if in_all > 0.9 * memory or on_disk > disk else 0


def of(there):
    return f" of {there / 1e9:.3f}" if there < math.inf else ""


def less(cfg, world):
    """The flags that would reduce what a run takes, and are left."""
    micro = micro_size(cfg.batch, cfg.micro_batch, world.data_size)
    ways = {
        "--remat=True": not cfg.remat,
        "--micro_batch": micro > 1,
        "--shard=-1": world.mesh.size(1) < world.size,
        "--sp": cfg.sp < world.size,
        "--lora_rank": not cfg.lora_rank,
        "more ranks": True,
    }
    return ", ".join(way for way, left in ways.items() if left)


def memory_of(device, ranks):
    """Bytes of memory for each rank; inf where nobody says."""
    if parallel.on_gpu(device):
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return math.inf


def free_disk(out):
    """Bytes free where a run's folder is or will be."""
    folders = (Path(out), *Path(out).absolute().parents)
    there = next(folder for folder in folders if folder.is_dir())
    return shutil.disk_usage(there).free


# ---- activations ----------------------------------------------------------------------------------------------------


def activations(bound, shape, length, precision, per_frame=False):
    """Bytes (kept, most) of a forward and its backward: what is kept for backward, and the most alive at once.

    bound: a model.Bound on meta, where a forward takes neither memory nor time; shape (B, C, F, H, W); precision
    fp32|bf16 of the blocks; per_frame: whether t is (B, F). All tensors count, inputs too, but for parameters and their
    gradients. Every block adds the same, so a net of one block and one of two are run.
    """
    net, dtype = bound.net, dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
    x = torch.empty(shape, device="meta")
    t = torch.empty((shape[0], shape[2]) if per_frame else shape[:1], device="meta")
    told = {name: torch.empty(shape[0], *wanted, device="meta")
            for name, wanted in net.config.conditions(shape[2:]).items() if wanted}
    cond = Cond(torch.empty(shape[0], length, net.config.text_dim, device="meta"), **told)
    seen = []
    for blocks in (1, 2):
        # a copy of the net in which the list of blocks is replaced by its beginning
        shorter = {id(net.blocks): copy.deepcopy(net.blocks[:blocks])}
        some = copy.deepcopy(net, shorter).to(dtype)
        for island in some.islands():
            island.float()
        for p in some.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(drop_grad)
        with Alive(some.parameters()) as alive:
            v = replace(bound, net=some)(x, t, cond)
            kept = alive.now
            v.backward(v)
        seen.append((kept, alive.most))
    (kept, most), (kept_two, most_two) = seen
    more = len(net.blocks) - 1
    return kept + more * (kept_two - kept), most + more * (most_two - most)


def drop_grad(p):
    p.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of meta tensors that operators meet: those alive `now`, and the `most` that were at once.

    A tensor's storage counts from the first operator that sees it until it is freed.
    """

    def __init__(self, besides):
        super().__init__()
        self.now, self.most = 0, 0
        self.met = {x.untyped_storage()._cdata for x in besides}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for x in tree_leaves((args, out)):
            if isinstance(x, torch.Tensor) and x.is_meta and x.untyped_storage()._cdata not in self.met:
                storage = x.untyped_storage()
                self.now += storage.nbytes()
                self.met.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, storage, size):
        self.now -= size
        self.met.remove(storage)
