"""Many processes as one: the only file that says torch.distributed. Imports nothing of ours.

One mechanism serves every scale. `fully_shard` on a mesh (replicate, shard):

    --shard=1    data parallel: whole parameters on each rank, gradients all-reduced (what DDP does)
    --shard=n    HSDP: parameters sharded over n ranks, replicated over the others
    --shard=-1   FSDP2: sharded over all

A single process is a group of one, so that dtypes, names and code paths are the same at every world size. What comes
after backward (clipping, optimizer, EMA, checkpoints) works on plain local shards: `local_rows` and `grad_norm` are the
door from DTensors to them.

With --sp=n, n neighbouring ranks share each sample and split its tokens (Ulysses). Gradients are still averaged over all
ranks: `ulysses` makes that mean the gradient.

B batch · L video tokens · D model width · N heads · K head width
"""
import math
import os
import shutil
import subprocess
import sys
import warnings
from datetime import timedelta
from functools import lru_cache
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


class World(NamedTuple):
    """Who we are among how many. Ranks that share a sample (--sp) have one data_rank, and so get the same batch."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | torch.Tensor     # (replicate, shard), all ranks; of a world that is only imagined, their numbers
    sp: int                             # ranks that share a sample
    ring: dist.ProcessGroup | None      # those ranks; None where each has its own

    @property
    def data_rank(self):
        return self.rank // self.sp

    @property
    def data_size(self):
        return self.size // self.sp


# ---- beginning and end ----------------------------------------------------------------------------------------------

def init(device="auto", shard=1, sp=1):
    """Joins the processes that torchrun started, or makes a group of one -> World.

    device auto|cpu|cuda. shard: ranks that hold one copy of the parameters, -1 = all. sp: ranks that share a sample.
    Raises ValueError for sizes that do not divide the world, RuntimeError for a GPU that is there but does not work.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shard = imagine(size, shard, sp).mesh.size(1)
    device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    # Two backends: flags and numbers for the log travel by gloo, so that they never wait for the GPU's queue.
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=60), **alone)  # validation videos and saves take a while
    mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    ring = None
    if sp > 1:
        ring = init_device_mesh(device.type, (size // sp, sp), mesh_dim_names=("data", "sp")).get_group("sp")
    return World(rank, size, device, mesh, sp, ring)


def imagine(size, shard=1, sp=1):
    """The World of `size` processes that nobody started, as its first sees it: to plan with. ValueError as `init`."""
    choices = [n for n in range(1, size + 1) if size % n == 0]
    for flag, n, also in (("shard", shard, " or -1 (all)"), ("sp", sp, "")):
        if n not in choices and not (flag == "shard" and n == -1):
            choices = ", ".join(map(str, choices))
            raise ValueError(f"--{flag}={n} does not divide {size} processes: choose {choices}{also}")
    return World(0, size, torch.device("meta"), torch.arange(size).view(-1, size if shard == -1 else shard), sp, None)


def pick_device(name, local_rank=0, local_size=1):
    """The device called auto|cpu|cuda of this process, and never a quiet CPU run beside a GPU that does not work."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device={name}: choose auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() or nvidia_present() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as reason:  # AssertionError: torch was built without CUDA
        raise RuntimeError(f"the GPU cannot be used: {reason}. --device=cpu runs without it") from reason
    if local_size > (count := torch.cuda.device_count()):
        raise RuntimeError(f"{local_size} processes on a machine with {count} GPUs: use --nproc_per_node={count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


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

    DTensor's caches keep the mesh, and so gloo's threads, alive; one that lets go of a tensor while Python is tidying up
    aborts the process ("terminate called without an active exception").
    """
    close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- a net over the mesh --------------------------------------------------------------------------------------------

def prepare(net, world, *, precision, compile=False, trainable=True, shapes=1):
    """Compiles, shards and allocates a net built on meta, in place, its values still to be filled -> the net.

    Expects net.blocks (one group each) and net.islands() (modules kept in fp32, groups of their own). precision
    fp32|bf16 is what the blocks compute in. What is trained is stored, and its gradients are reduced, in fp32; what is
    frozen is stored in what it computes in: all of the net with trainable=False, the base of a LoRA. shapes: how many
    input shapes (buckets x windows x adapters) compiled blocks will meet.
    """
    dtype, plain = store(net, world, precision, trainable)
    if compile:
        # A graph per shape, each with and without gradient, in training, validation and sampling batches: the default of
        # 8 would be met by the second bucket. Not dynamic, or what a graph computes would depend on the shapes before it.
        torch._dynamo.config.recompile_limit += 8 * shapes
        torch._dynamo.config.accumulated_recompile_limit += 8 * shapes
        for block in net.blocks:
            block.compile(fullgraph=True, dynamic=False)  # in place: torch.compile(block) would prefix every name

    if len(plain) < len(list(net.parameters())):
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module, policy in [*((m, fp32) for m in net.islands()), *((m, mixed) for m in net.blocks), (net, mixed)]:
            fully_shard(module, mesh=world.mesh, mp_policy=policy, ignored_params=plain,
                        reshard_after_forward=world.mesh.size(1) > 1)
        net.register_forward_hook(reshard_after_inference)
        # a Linear's 3-D output, which is never written to
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    return net.to_empty(device=world.device)


def store(net, world, precision, trainable=True):
    """Gives parameters the dtype they are stored in -> (what the blocks compute in, parameters that are left plain).

    Plain are those with nothing to cast, to gather or to reduce; of a LoRA's base, FSDP would keep a second copy.
    """
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
    kept = {p for island in net.islands() for p in island.parameters()}
    for p in net.parameters():
        p.requires_grad_(trainable and p.requires_grad)
        if not p.requires_grad and p not in kept:
            p.data = p.data.to(dtype)
    whole, alone = world.mesh.size(1) == 1, world.size == 1 and precision == "fp32"
    return dtype, {p for p in net.parameters() if whole and (alone or not p.requires_grad)}


def memory(net, world, precision, trainable=True):
    """Bytes on the fullest rank, {parameters, gradients, gathered}, of a net on meta that `prepare` would be given.

    parameters: what is stored. gradients: of what is trained, fp32; each of AdamW's two moments and an average take
    as much. gathered, at most: the copies that are computed with, of all, or of what is outside of blocks and of three
    blocks (one computes, one arrives, one leaves), and a block's gradients as computed and as reduced.
    """
    dtype, plain = store(net, world, precision, trainable)
    shard, parameters = world.mesh.size(1), list(net.parameters())
    kept = {p for island in net.islands() for p in island.parameters()}

    def rows(p):
        return math.ceil(p.shape[0] / shard) * p[:1].numel()

    def copies(some):
        return sum(p.numel() * (4 if p in kept else dtype.itemsize) for p in some if p not in plain)

    block = list(net.blocks[0].parameters())
    gathered = copies(parameters) - (len(net.blocks) - 3) * copies(block) * (shard > 1)
    reduced = sum(p.numel() * (dtype.itemsize + 4) for p in block if p not in plain and p.requires_grad)
    return {"parameters": sum(rows(p) * p.element_size() for p in parameters),
            "gradients": sum(rows(p) * 4 for p in parameters if p.requires_grad),
            "gathered": gathered + reduced}


def reshard_after_inference(net, args, out):
    """Frees the gathered copies, which backward would have done: weights swapped in later (EMA) would not reach them."""
    if not torch.is_grad_enabled():
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(x):
    """This rank's part of x, a plain tensor on the same storage."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def local_rows(net):
    """{name: (tensor, first, shape)}: this rank's rows [first, first + len) of every parameter, of global shape `shape`.

    The tensors are plain and share the net's storage: what an optimizer writes there is what the net computes with.
    Rows are split as torch.chunk does, so that a small parameter leaves the last ranks without any.
    """
    rows = {}
    for name, p in net.named_parameters():
        first = 0
        if isinstance(p, DTensor):
            rank, size = p.device_mesh.get_local_rank("shard"), p.device_mesh.size(1)
            first = min(rank * math.ceil(p.shape[0] / size), p.shape[0])
        rows[name] = (local(p), first, tuple(p.shape))
    return rows


# ---- every step -----------------------------------------------------------------------------------------------------

def sync(net):
    """-> call(last), before each micro-batch's backward: gradients are added up here, averaged over ranks on the last.

    Where parameters are sharded, gradients are scattered at once, and only replicas wait: whole ones, in fp32, would
    take what sharding saves.
    """
    if not isinstance(net, FSDPModule):
        return lambda last: None
    whole = next(p for p in net.parameters() if isinstance(p, DTensor)).device_mesh.size(1) == 1
    return net.set_requires_gradient_sync if whole else net.set_requires_all_reduce


def grad_norm(net, rows, world):
    """Moves net's reduced gradients to rows' tensors (None where there is none) -> their global norm, 0-d fp32.

    rows: of all that is trained here. The norm of the whole gradient on any mesh: local squares are summed over the shard
    dimension, replicas hold the same.
    """
    for name, (tensor, _, _) in rows.items():
        p = net.get_parameter(name)
        tensor.grad, p.grad = None if p.grad is None else local(p.grad), None
    grads = [tensor.grad for tensor, _, _ in rows.values() if tensor.grad is not None]
    squares = torch.nn.utils.get_total_norm(grads).to(world.device, torch.float32).square()
    if world.size > 1:
        dist.all_reduce(squares, group=world.mesh.get_group("shard"))
    return squares.sqrt()


def mean(values, world):
    """{name: number or tensor} -> the same averaged over ranks, which must all hold the same names and shapes."""
    parts = [torch.as_tensor(v, dtype=torch.float64).cpu() for v in values.values()]
    numbers = torch.cat([part.flatten() for part in parts])
    if world.size > 1:
        dist.all_reduce(numbers)
    means = (numbers / world.size).split([part.numel() for part in parts])
    return {name: m.view(v.shape).to(v) if torch.is_tensor(v) else m.item()
            for (name, v), m in zip(values.items(), means)}


def agree(ok, world):
    """Whether ok holds on every rank; also a barrier."""
    flag = torch.tensor(int(ok))
    if world.size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


# ---- sequence parallel ----------------------------------------------------------------------------------------------

@lru_cache(maxsize=None)  # the same length gives the same functions, so that compiled blocks know them again
def ulysses(attention, length, world):
    """-> (split, attend, join): the three places where a model of `length` tokens meets the ranks that share its sample.

    split  (B, L, ...) -> (B, l, ...)    own slice along dim 1, zero-padded, l = ceil(L / sp)
    attend q, k, v (B, l, N, K) -> same  attention(q, k, v, metadata) of all L tokens, each rank for N / sp of the heads
    join   (B, l, ...) -> (B, L, ...)    all slices, pads cut

    Each rank goes on to the same loss over all tokens. join's backward adds the slices' gradients of all sp ranks (sp
    times its own), split's puts the slice among zeros: each rank then holds sp times its tokens' share, and the mean over
    the world is the gradient. Raises ValueError for heads that sp does not divide.
    """
    sp, part = world.sp, math.ceil(length / world.sp)

    def exchange(x):  # (sp, ...) -> (sp, ...): the i-th row goes to rank i, the i-th received comes from it
        x = x.contiguous()
        return x.clone() if world.ring is None else all_to_all_single_autograd(x, None, None, world.ring)

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
        return rearrange(exchange(rearrange(out, "B (s l) n K -> s B l n K", s=sp)), "s B l n K -> B l (s n) K")

    def join(x):
        return rearrange(exchange(x.expand(sp, *x.shape)), "s B l ... -> B (s l) ...")[:, :length]

    return split, attend, join
