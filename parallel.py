"""Many processes as one: the only file that says torch.distributed. Imports nothing of ours.

One mechanism serves every scale. `fully_shard` on a mesh (replicate, shard):

    --shard=1    data parallel: whole parameters on each rank, gradients all-reduced (what DDP does)
    --shard=n    HSDP: parameters sharded over n ranks, replicated over the others
    --shard=-1   FSDP2: sharded over all

A single process is a group of one, so that dtypes, names and code paths are the same at every world size. What comes
after backward (clipping, optimizer, EMA, checkpoints) works on plain local shards: `local_rows` and `collect` lead from
DTensors to them.

With --sp=n, n neighbouring ranks share each sample and split its tokens (Ulysses). Gradients are still averaged over
all ranks: `ulysses` makes that mean the gradient.

B batch · L video tokens · D model width · N heads · K head width
"""
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRAPHS = 8          # per compiled shape: with and without gradient, 3 batch sizes, 2 to spare
STOP = signal.SIGTERM, signal.SIGINT
BEAT = 5.0          # seconds between two signs of life of a rank
PATIENCE = 60.0     # seconds without one, after a signal, that mean its death
ECHO = 3.0          # seconds in which signals are one: SLURM signals torchrun and its ranks, torchrun them too


class Part(NamedTuple):
    """This rank's rows [first, first + len(tensor)) of a tensor of global shape `shape`."""
    tensor: torch.Tensor
    first: int
    shape: tuple


class World(NamedTuple):
    """Who we are among how many. Ranks that share a sample (--sp) have one data_rank, and so get the same batch."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | torch.Tensor     # (replicate, shard); the ranks' numbers where none is real
    sp: int                             # ranks that share a sample
    ring: dist.ProcessGroup | None      # those ranks; None where each has its own
    precision: str = "fp32"             # fp32|bf16: what blocks compute in
    compile: bool = False

    @property
    def data_rank(self):
        return self.rank // self.sp

    @property
    def data_size(self):
        return self.size // self.sp

    @property
    def main(self):
        return self.rank == 0

    @property
    def ranks(self):
        """Who we are, as ckpt.py asks for it."""
        return {"rank": self.rank, "world": self.size, "agree": partial(agree, world=self)}

    def say(self, text):
        """Prints a line, once for all ranks."""
        if self.main:
            print(text, flush=True)

    def ulysses(self, attention, length):
        return ulysses(attention, length, self)


# ---- beginning and end ---------------------------------------------------------------------------

def init(device="auto", shard=1, sp=1, precision=None, compile=None, deterministic=False):
    """Joins the processes that torchrun started, or makes a group of one -> World.

    device auto|cpu|cuda. shard: ranks that hold one copy of the parameters, -1 = all. sp: ranks that share a sample.
    precision fp32|bf16, None = bf16 on a GPU (fp32 before Ampere), fp32 elsewhere. compile: None = on a GPU.
    deterministic: replaces kernels that add up in varying order.
    Raises ValueError for sizes that do not divide the world, RuntimeError for a GPU that is there but does not work.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shard = imagine(size, shard, sp).mesh.size(1)
    device = pick_device(device, local_rank, local_size)
    old = on_gpu(device) and torch.cuda.get_device_capability(device)[0] < 8       # before Ampere: no bf16
    if precision is None:
        precision = "bf16" if on_gpu(device) and not old else "fp32"
    if precision == "bf16" and old:
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} does not compute in bf16: --precision=fp32")
    if compile is None:
        compile = on_gpu(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS asks for it, before it starts
        torch.use_deterministic_algorithms(True)

    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    hour = timedelta(minutes=60)    # validation videos and saves take a while
    dist.init_process_group(backend(device, size), timeout=hour, **alone)
    if on_gpu(device) and size > 1:
        check_cards(device, size)
    grid = partial(init_device_mesh, device.type)
    mesh = grid((size // shard, shard), mesh_dim_names=("replicate", "shard"))
    ring = None
    if sp > 1:
        ring = grid((size // sp, sp), mesh_dim_names=("data", "sp")).get_group("sp")
    return World(rank, size, device, mesh, sp, ring, precision, compile)


def imagine(size, shard=1, sp=1, precision="fp32"):
    """A World for planning: rank 0 of `size` processes, none of them real. Raises ValueError as `init`."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    choices = f"{size} processes: choose {', '.join(map(str, divisors))}"
    if shard != -1 and shard not in divisors:
        raise ValueError(f"--shard={shard} does not divide {choices} or -1 (all)")
    if sp not in divisors:
        raise ValueError(f"--sp={sp} does not divide {choices}")
    mesh = torch.arange(size).view(-1, size if shard == -1 else shard)
    return World(0, size, torch.device("meta"), mesh, sp, None, precision)


def on_gpu(device):
    """Whether `device` is a GPU. Nothing else asks for the kind of a device: tests let another stand for it."""
    return device.type == "cuda"


def pick_device(name, local_rank=0, local_size=1):
    """The device called auto|cpu|cuda of this process, and never a quiet CPU run beside a GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device={name}: choose auto, cpu or cuda")
    if name == "auto":
        there = torch.cuda.is_available() or nvidia_present()
        name = "cuda" if there and torch.backends.cuda.is_built() else "cpu"
        if there and name == "cpu" and local_rank == 0:
            build = f"PyTorch {torch.__version__} is a build without CUDA"
            print(f"this machine has a GPU, but {build}: running on the CPU")
    if name == "cpu":
        return torch.device("cpu")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as reason:  # AssertionError: torch was built without CUDA
        advice = "--device=cpu runs without it"
        raise RuntimeError(f"the GPU cannot be used: {reason}. {advice}") from reason
    count = torch.cuda.device_count()
    if 1 < count < local_size:
        advice = f"use --nproc_per_node={count}"
        raise RuntimeError(f"{local_size} processes on a machine with {count} GPUs: {advice}")
    index = local_rank if count > 1 else 0      # some launchers show each process a GPU of its own
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def backend(device, size):
    """Names the backends: flags and numbers for the log travel by gloo, so that they never wait for the GPU's queue."""
    if not on_gpu(device):
        return "gloo"
    if dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    if size > 1:
        raise RuntimeError(f"{size} processes on GPUs need NCCL, which this PyTorch lacks: run 1")
    return "gloo"


def check_cards(device, size):
    """Raises RuntimeError where two ranks have one GPU. Numbers do not tell: each process may see one as number 0."""
    cards = [None] * size
    uuid = torch.cuda.get_device_properties(device).uuid
    dist.all_gather_object(cards, f"{socket.gethostname()}'s GPU {uuid}")
    for card in cards:
        ranks = [rank for rank, other in enumerate(cards) if other == card]
        if len(ranks) > 1:
            ranks = " and ".join(map(str, ranks))
            raise RuntimeError(f"ranks {ranks} share {card}: start one process per GPU")


def nvidia_present():
    """Whether this machine has an NVIDIA device, whatever torch says."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    smi = shutil.which("nvidia-smi")
    return bool(smi) and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout


def close():
    """Ends the group, when all ranks have come here; on success only: after an exception it would wait for ever."""
    dist.barrier()
    dist.destroy_process_group()


def leave():
    """Ends the group and, with exit code 0, the process, past Python's own tidying up.

    DTensor's caches keep the mesh, and so gloo's threads, alive; one that lets go of a tensor while Python is tidying
    up aborts the process ("terminate called without an active exception").
    """
    close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- a net over the mesh -------------------------------------------------------------------------

def prepare(net, world, *, trainable=True, shapes=1):
    """Casts, compiles, shards and allocates a net built on meta, in place, its values still to be filled -> the net.

    Expects net.blocks (one group each) and net.islands() (modules kept in fp32, groups of their own). What is trained
    is stored, and its gradients are reduced, in fp32; what is frozen is stored in world.precision: all of the net with
    trainable=False, the base of a LoRA. shapes: how many input shapes (buckets x windows x adapters) blocks will meet.
    """
    cast(net, world, trainable)
    if world.compile:
        compile_blocks(net, shapes)
    shard(net, world)
    return net.to_empty(device=world.device)


def frozen(net, world, fill, shapes=1):
    """A net built on meta, for forwards alone, with the values that fill(rows, rank=…, world=…, agree=…) reads."""
    prepare(net, world, trainable=False, shapes=shapes)
    fill(local_rows(net), **world.ranks)
    return net


def cast(net, world, trainable=True):
    """Gives parameters the dtype they are stored in; trainable=False freezes all."""
    kept = {p for island in net.islands() for p in island.parameters()}
    for p in net.parameters():
        p.requires_grad_(trainable and p.requires_grad)
        if not p.requires_grad and p not in kept:
            p.data = p.data.to(DTYPES[world.precision])


def compile_blocks(net, shapes):
    """Compiles each block, one graph per shape: what a dynamic graph computes depends on the shapes seen before."""
    # dynamo's limit of 8 graphs is reached at the second bucket
    torch._dynamo.config.recompile_limit += GRAPHS * shapes
    torch._dynamo.config.accumulated_recompile_limit += GRAPHS * shapes
    for block in net.blocks:    # in place: torch.compile(block) would prefix every name
        block.compile(fullgraph=True, dynamic=False)


def shard(net, world):
    """Wraps blocks, islands and the rest as FSDP groups over the mesh, where any parameter needs it."""
    plain = unwrapped(net, world)
    if len(plain) == len(list(net.parameters())):
        return
    fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = replace(fp32, param_dtype=DTYPES[world.precision])
    groups = [(island, fp32) for island in net.islands()]
    groups += [(block, mixed) for block in net.blocks]
    groups += [(net, mixed)]
    for module, policy in groups:
        fully_shard(module, mesh=world.mesh, mp_policy=policy, ignored_params=plain,
                    reshard_after_forward=world.mesh.size(1) > 1)
    net.register_forward_hook(reshard_after_inference)
    # a Linear's 3-D output, which is never written to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def unwrapped(net, world):
    """Parameters that skip FSDP: they need no cast, gather or reduction. It would copy a LoRA's base a second time."""
    if world.mesh.size(1) > 1:
        return set()
    alone = world.size == 1 and world.precision == "fp32"
    return {p for p in net.parameters() if alone or not p.requires_grad}


def memory(net, world, trainable=True):
    """Bytes on the fullest rank, {parameters, gradients, gathered}, of a net on meta that `prepare` would be given.

    parameters: what is stored. gradients: of what is trained, fp32; each of AdamW's two moments and an average take
    as much. gathered, at most: the copies that are computed with, of all, or of what is outside of blocks and of three
    blocks (one computes, one arrives, one leaves), and a block's gradients as computed and as reduced.
    """
    cast(net, world, trainable)
    plain, dtype = unwrapped(net, world), DTYPES[world.precision]
    parts, parameters = world.mesh.size(1), list(net.parameters())
    kept = {p for island in net.islands() for p in island.parameters()}

    def rows(p):
        return math.ceil(p.shape[0] / parts) * p[:1].numel()

    def copies(some):
        return sum(p.numel() * (4 if p in kept else dtype.itemsize) for p in some if p not in plain)

    block = list(net.blocks[0].parameters())
    gathered = copies(parameters)
    if parts > 1:
        gathered -= (len(net.blocks) - 3) * copies(block)
    learning = [p for p in block if p not in plain and p.requires_grad]
    reduced = sum(p.numel() * (dtype.itemsize + 4) for p in learning)
    return {"parameters": sum(rows(p) * p.element_size() for p in parameters),
            "gradients": sum(rows(p) * 4 for p in parameters if p.requires_grad),
            "gathered": gathered + reduced}


def reshard_after_inference(net, args, out):
    """Frees the gathered copies, as backward would have: weights swapped in later (EMA) would not reach them."""
    if not torch.is_grad_enabled():
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(x):
    """This rank's part of x, a plain tensor on the same storage."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def whole(tensor):
    """A tensor that all ranks hold whole, as a Part of its own."""
    return Part(tensor.cpu().clone(), 0, tuple(tensor.shape))


def local_rows(net, trained=None):
    """{name: Part} of every parameter; trained: only those that are trained (True), or are not (False).

    The tensors are plain and share the net's storage: what an optimizer writes there is what the net computes with.
    Rows are split as torch.chunk does, so that a small parameter leaves the last ranks without any.
    """
    rows = {}
    for name, p in net.named_parameters():
        if trained is not None and p.requires_grad != trained:
            continue
        first = 0
        if isinstance(p, DTensor):
            rank, size = p.device_mesh.get_local_rank("shard"), p.device_mesh.size(1)
            first = min(rank * math.ceil(p.shape[0] / size), p.shape[0])
        rows[name] = Part(local(p), first, tuple(p.shape))
    return rows


# ---- every step ----------------------------------------------------------------------------------

def sync(net):
    """-> call(last), before each micro-batch's backward: gradients are added up here, averaged over ranks on the last.

    Where parameters are sharded, gradients are scattered at once, and only replicas wait: whole ones, in fp32, would
    take what sharding saves.
    """
    if not isinstance(net, FSDPModule):
        return lambda last: None
    whole = next(p for p in net.parameters() if isinstance(p, DTensor)).device_mesh.size(1) == 1
    return net.set_requires_gradient_sync if whole else net.set_requires_all_reduce


def collect(net, rows):
    """Moves net's reduced gradients to the tensors of rows (None where there is none); rows of all that is trained."""
    for name, part in rows.items():
        p = net.get_parameter(name)
        part.tensor.grad = None if p.grad is None else local(p.grad)
        p.grad = None


def grad_norm(rows, world):
    """The norm of the whole gradient, 0-d fp32, the same on all ranks; rows as `collect` left them.

    Local squares are summed over the shard dimension; replicas hold the same.
    """
    grads = [part.tensor.grad for part in rows.values() if part.tensor.grad is not None]
    squares = torch.nn.utils.get_total_norm(grads).to(world.device, torch.float32).square()
    if world.size > 1:
        dist.all_reduce(squares, group=world.mesh.get_group("shard"))
    return squares.sqrt()


def gatherer(world):
    """-> function of [this rank's rows of a matrix] and the number of all its rows: the matrices, stacked whole.

    What step.muon asks for: matrices of one shape, split as `local_rows` says, are gathered over the shard dimension.
    """
    def gather(parts, rows):
        size = world.mesh.size(1)
        if size == 1:
            return torch.stack(parts)
        most = math.ceil(rows / size)
        ours = torch.stack([F.pad(part, (0, 0, 0, most - len(part))) for part in parts])
        every = ours.new_empty(size * len(parts), most, ours.shape[2])
        dist.all_gather_into_tensor(every, ours, group=world.mesh.get_group("shard"))
        return rearrange(every, "(s n) r c -> n (s r) c", s=size)[:, :rows]
    return gather


def norm(net, rows, world):
    """-> function: `collect`, then `grad_norm`; what step.Learner asks for."""
    def collected_norm():
        collect(net, rows)
        return grad_norm(rows, world)
    return collected_norm


def mean(values, world):
    """{name: number or tensor} -> the same averaged over ranks, which must all hold the same names and shapes."""
    parts = [torch.as_tensor(v, dtype=torch.float64).cpu() for v in values.values()]
    numbers = torch.cat([part.flatten() for part in parts])
    if world.size > 1:
        dist.all_reduce(numbers)
    means = (numbers / world.size).split([part.numel() for part in parts])
    return {name: m.view(v.shape).to(v) if torch.is_tensor(v) else m.item()
            for (name, v), m in zip(values.items(), means)}


def agree(x, world):
    """-> the least x over all ranks, a bool or an int; also a barrier."""
    if world.size == 1:
        return x
    least = torch.tensor(int(x))
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return type(x)(least.item())


# ---- shared work ---------------------------------------------------------------------------------

def share(n, world):
    """-> [(i, whether i counts)]: this data rank's part of range(n), equally long on all; repeats do not count."""
    size = world.data_size
    return [(i % n, i < n) for i in range(world.data_rank, math.ceil(n / size) * size, size)]


def spread(make, n, chunk, world):
    """Makes n results on all ranks -> (n, ...) fp32 on the CPU of rank 0, None on the others.

    make(places) -> (len(places), ...) for a list of at most `chunk` places < n. Data ranks call it equally often with
    equally many places, for sharded ranks forward in step: some repeat a place. Only the n results travel.
    """
    each = math.ceil(n / world.data_size)
    places = [i % n for i in range(world.data_rank * each, (world.data_rank + 1) * each)]
    made = [make(places[i:i + chunk]).to("cpu", torch.float32) for i in range(0, each, chunk)]
    made = torch.cat(made)
    if world.rank > 0:
        first, last = wanted(n, world.rank, world)
        if last > first:
            dist.send(made[:last - first], 0)
        return None
    results = made.new_empty(n, *made.shape[1:])
    results[:each] = made
    for rank in range(1, world.size):
        first, last = wanted(n, rank, world)
        if last > first:
            dist.recv(results[first:last], rank)
    return results


def wanted(n, rank, world):
    """-> (first, last): the places of `spread` whose results come from `rank`, one of those that share a sample."""
    if rank % world.sp:
        return n, n
    each = math.ceil(n / world.data_size)
    data_rank = rank // world.sp
    return min(data_rank * each, n), min((data_rank + 1) * each, n)


# ---- being asked to stop -------------------------------------------------------------------------

def stop_requested(world):
    """-> stopped(), to be called once a step: True on all ranks once one of them got SIGTERM or SIGINT. Also a barrier.

    A second signal, more than ECHO seconds later, ends the process at once. So does, after a signal, the death of
    another rank, for which this one might wait an hour: see `watch`.
    """
    asked = []
    store = None
    if world.size > 1:
        store = dist.PrefixStore("beats", dist.distributed_c10d._get_default_store().clone())
        store.add(str(world.rank), 1)
        agree(True, world)      # from here on each rank finds a beat of all
    inbox, outbox = socket.socketpair()
    outbox.setblocking(False)
    signal.set_wakeup_fd(outbox.fileno())
    threading.Thread(target=watch, args=(world, store, inbox, outbox), daemon=True).start()
    for number in STOP:
        signal.signal(number, lambda number, frame: asked.append(number))
    return lambda: not agree(not asked, world)


def watch(world, store, inbox, outbox):
    """Ends the process at a signal's second coming, or, after a signal, when a rank has not beaten for PATIENCE.

    A thread's work, because a main thread that waits in a collective runs no handler: signals come by inbox. Every rank
    counts its beats in the store, however long its step, validation or save takes; a rank that no longer does is dead.
    """
    if store is not None:
        inbox.settimeout(BEAT)
    ranks = [str(rank) for rank in range(world.size)]
    signals, until = b"", math.inf
    beats = [b""] * world.size
    missed = [0] * world.size   # polls in a row without a new beat; seconds would count suspensions
    while True:
        try:
            new = inbox.recv(64)
            if time.monotonic() > until and any(number in signals for number in new):
                os._exit(1)
            signals, until = signals + new, min(until, time.monotonic() + ECHO)
        except TimeoutError:
            pass
        if store is None:
            continue
        try:
            store.add(str(world.rank), 1)
            heard = store.multi_get(ranks) if signals else beats
        except RuntimeError:        # whoever served the store is gone
            heard = beats
        if not signals:
            continue
        missed = [n + 1 if new == old else 0 for n, new, old in zip(missed, heard, beats)]
        beats = heard
        silent = [rank for rank, n in enumerate(missed) if n * BEAT > PATIENCE]
        if silent:
            reason = f"ranks {silent} have given no sign of life for {PATIENCE:g} s"
            print(f"rank {world.rank} ends: {reason}", file=sys.stderr, flush=True)
            os._exit(1)


# ---- sequence parallel ---------------------------------------------------------------------------

@lru_cache(maxsize=None)  # the same functions for the same length: compiled blocks know them again
def ulysses(attention, length, world):
    """-> (split, attend, join): the three places where a model of `length` tokens meets the ranks sharing its sample.

    split  (B, L, ...) -> (B, l, ...)    own slice along dim 1, zero-padded, l = ceil(L / sp)
    attend q, k, v (B, l, N, K) -> same  attention(q, k, v, metadata) of all L tokens, each rank for N / sp of the heads
    join   (B, l, ...) -> (B, L, ...)    all slices, pads cut

    Each rank goes on to the same loss over all tokens. join's backward adds the slices' gradients of all sp ranks (sp
    times its own), split's puts the slice among zeros: each rank then holds sp times its tokens' share, and the mean
    over the world is the gradient. Raises ValueError for heads that sp does not divide.
    """
    sp, part = world.sp, math.ceil(length / world.sp)

    def exchange(x):  # (sp, ...) -> (sp, ...): row i goes to rank i, row i comes from it
        x = x.contiguous()
        if world.ring is None:
            return x.clone()
        return all_to_all_single_autograd(x, None, None, world.ring)

    def pad(x):
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, sp * part - length))

    def split(x):
        own = world.rank % sp
        return pad(x)[:, own * part:(own + 1) * part]

    def attend(q, k, v, metadata=None):
        if q.shape[2] % sp:
            raise ValueError(f"{q.shape[2]} heads do not divide over --sp={sp} ranks")
        qkv = rearrange(torch.stack((q, k, v)), "three B l (s n) K -> s three B l n K", s=sp)
        q, k, v = rearrange(exchange(qkv), "s three B l n K -> three B (s l) n K")[:, :, :length]
        out = pad(attention(q, k, v, metadata))
        out = exchange(rearrange(out, "B (s l) n K -> s B l n K", s=sp))
        return rearrange(out, "s B l n K -> B l (s n) K")

    def join(x):
        return rearrange(exchange(x.expand(sp, *x.shape)), "s B l ... -> B (s l) ...")[:, :length]

    return split, attend, join
