"""Measures parts of nanovideo on this machine, each beside what it replaces: a table, and the same as JSON.

    python bench.py data        samples per second: the loader, np.memmap, torch.load, parquet
    python bench.py attention   sliding-tile attention, checked, then timed beside dense SDPA, FlexAttention and peers
    python bench.py step        one update of training and of distillation beside the bare model's, and a save
    python bench.py sparsity    what tiles and windows save on Wan's grids

`step` repeats a few lines of the roots, which never import each other; all else is theirs too. Imports every leaf but
codec, shapes and flags; attention and model.

B batch · C F H W latent channels, frames, rows, columns · L video tokens · S text tokens · E text width
N heads · K head width
"""
import gc
import io
import json
import os
import platform
import re
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import count, cycle, product
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Callable, Literal, NamedTuple

import numpy as np
import tyro

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

import attention as sliding
import ckpt
import parallel
from attention import attention, build_metadata, reference
from data import Ahead, Latents, ceil_div, noise, normal, send, stratified, stream
from log import Clock, Log, peak
from model import MODELS, USUAL, Cond, bind, blank, fits, flops, initial, token_grid
from step import (Learner, adamw, copies, dmd_loss, flow_loss, grid, numbers, rollout, sample_t, train_step)
from store import Writer


# ---- data -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    """Reading speed of the loader, in one run beside a plain np.memmap copy, torch.load per sample and parquet."""
    shape: tuple[int, int, int, int] = (16, 21, 60, 104)    # latent C F H W; 81 frames of 480 x 832 pixels in Wan's
    width: int = 4096                                       # of text embeddings; UMT5's
    length: int = 512                                       # text rows after padding
    samples: int = 64                                       # of the dataset, in three formats: 20 MB of disk each
    batch: int = 8                                          # samples per read
    rounds: int = 7                                         # times that each method reads everything; medians are shown
    group: int = 8                                          # samples per parquet row group, as in FastVideo's example
    start: int = 0                                          # time instead how a dataset of so many samples starts
    dir: str | None = None                                  # where the datasets go; None = the temporary folder
    out: str = "out/bench/data.json"                        # file of the results


MEMMAP, RAW = "np.memmap copy into the same batch, not normalised", "np.memmap copy of raw bf16, half the bytes"


def bench_data(cfg):
    if cfg.start:
        return bench_start(cfg)
    if cfg.samples % cfg.batch:
        raise ValueError(f"--samples={cfg.samples} is not a multiple of --batch={cfg.batch}")
    order = stream(0, "order", 0).permutation(cfg.samples).reshape(-1, cfg.batch).tolist()

    def cost(read):
        """Samples per second of one pass over all samples, and CPU milliseconds per sample, of all threads."""
        wall, cpu = perf_counter(), process_time()
        for batch in order:
            read(batch)
        return cfg.samples / (perf_counter() - wall), 1000 * (process_time() - cpu) / cfg.samples

    with tempfile.TemporaryDirectory(dir=cfg.dir) as folder:
        folder = Path(folder)
        write_formats(folder, cfg)
        loader = Latents(folder / "latents", seed=0, batch=cfg.batch)
        apart = {"Latents, first touch: checksums of all bytes": cost(loader.sample)}
        readers = {"Latents": loader.sample, **plain_readers(folder, cfg)}
        costs = {name: [] for name in readers}
        for n in range(cfg.rounds):             # in turns, so that a busy moment of the machine is everybody's
            for name, read in readers.items():
                if n == 0 or costs[name][0][0] > 20:
                    costs[name].append(cost(read))
        warm = {name: np.median(each, axis=0).tolist() for name, each in costs.items()}

        apart["noise alone, one thread"] = cost(lambda ids: normal(stream(0, "noise", 0), (cfg.batch, *cfg.shape)))
        steps = iter(range(len(order)))
        apart["Latents.at: reading, noise, t, dropout"] = cost(lambda ids: loader.read(next(steps)))
        pages = loader.pages
        readers = loader = None                 # pages of files that are mapped stay in memory
        evict(folder)
        loader = Latents(folder / "latents", seed=0, batch=cfg.batch)
        loader.pages, loader.folders[0].checked[:] = pages, True    # reading alone: no new memory, no checksums

        def read_cold(ids):
            loader.will_need(ids)
            loader.sample(ids)

        apart["Latents, cold"] = cost(read_cold)
        loader = None
        evict(folder)
        apart["np.memmap, cold"] = cost(plain_readers(folder, cfg)[MEMMAP])
    report(cfg, warm, apart)


PROBE = """
import json, re, sys, time
from data import Latents
from store import Writer
import torch

def peak():     # MB; what the system's getrusage says would count the parent's
    return int(re.search("VmHWM:\\s*(.*) kB", open("/proc/self/status").read())[1]) / 1024

path, spec, null = sys.argv[1], json.loads(sys.argv[2]), torch.zeros(1, 8)
imported = peak()
{before}
began, busy = time.perf_counter(), time.process_time()
{measured}
print(json.dumps([time.perf_counter() - began, time.process_time() - busy, peak(), imported]))
"""
OPEN = "latents = Latents(path, seed=0, batch=8, val=16)"
STARTS = {  # what is measured: (what runs before, what runs), on one rank
    "Writer, where all is done but finish": ("", "Writer(path, spec)"),
    "finish, mean and std given": ("writer = Writer(path, spec)", "writer.finish(null, [0.] * 4, [1.] * 4)"),
    "finish, mean and std measured": ("writer = Writer(path, spec)", "writer.finish(null)"),
    "Latents": ("", OPEN),
    "Latents, and its first batch": ("", f"{OPEN}; latents.at(0)"),
    "its first caption": (OPEN, "latents.caption(0)"),
}


def bench_start(cfg):
    """Seconds and peak memory where a dataset has many small samples, each measured in a process of its own."""
    import subprocess
    import sys

    ranks, table = 8, {}
    spec = {"codec": {"name": "random", "text_width": 8, "text_length": 8}, "fps": 16, "dtype": "bf16"}
    with tempfile.TemporaryDirectory(dir=cfg.dir) as folder:
        write_many(Path(folder), cfg.start, ranks)
        print(f"{cfg.start:,} samples of {ranks} ranks: one rank's   seconds  of a CPU  peak MB  of imports")
        for name, (before, measured) in STARTS.items():
            code = PROBE.format(before=before, measured=measured)
            done = subprocess.run([sys.executable, "-c", code, folder, json.dumps(spec)], check=True, text=True,
                                  stdout=subprocess.PIPE, cwd=Path(__file__).parent)
            table[name] = json.loads(done.stdout)
            print("{:45} {:10.2f} {:9.2f} {:8.0f} {:11.0f}".format(name, *table[name]))
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(cfg), "seconds, of a CPU, peak MB, of imports": table}, indent=1))
    print(f"written to {path}")


def write_many(folder, samples, ranks):
    """What ranks of Writer leave behind of samples that are all zeros: journals, and files with holes."""
    import zlib

    shapes, rows = [(4, 3, 2, 2), (4, 3, 2, 4), (4, 3, 4, 2)], 2
    for rank in range(ranks):
        sizes = dict.fromkeys([f"text.{rank}.bin"] + ["x".join(map(str, s)) + f".{rank}.bin" for s in shapes], 0)
        with open(folder / f"journal.{rank}.jsonl", "w") as journal:
            for i in range(rank, samples, ranks):
                shape = shapes[i % 3]
                sizes["x".join(map(str, shape)) + f".{rank}.bin"] += 4096
                sizes[f"text.{rank}.bin"] += rows * 16
                record = {"rank": rank, "key": f"film number {i}.mp4",
                          "caption": f"what can be seen in the film number {i}, in a dozen words or so",
                          "source": f"film number {i}.mp4", "rows": rows, "shape": shape,
                          "crc": [zlib.crc32(bytes(2 * prod(shape))), zlib.crc32(bytes(rows * 16))]}
                journal.write(json.dumps(record) + "\n")
        for name, size in sizes.items():
            with open(folder / name, "wb") as file:
                file.truncate(size)


def write_formats(folder, cfg):
    """The same random numbers three times: ours, a .pt file per sample, parquet as FastVideo stores it (fp32, zstd)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    codec = {"name": "random", "text_width": cfg.width, "text_length": cfg.length}
    writer = Writer(folder / "latents", {"codec": codec, "fps": 16, "dtype": "bf16"})
    latent = normal(stream(0, "sample", 0), cfg.shape).bfloat16()
    parquet = None
    for i in range(cfg.samples):
        rng = stream(0, "sample", 1, i)
        rows = min(int(rng.gamma(4, cfg.length / 16)) + 1, cfg.length)      # a quarter of the length on average
        latent, text = latent.roll(1, 0), normal(rng, (rows, cfg.width)).bfloat16()
        writer.add(latent, text, caption=f"caption {i}", source=f"{i}.mp4", key=str(i))
        torch.save({"latent": latent, "text": text}, folder / f"{i}.pt")
        if i % cfg.group == 0:
            group = []
        row = {}
        for name, x in (("vae_latent", latent), ("text_embedding", text)):
            row |= {f"{name}_bytes": x.float().numpy().tobytes(), f"{name}_shape": x.shape, f"{name}_dtype": "float32"}
        group.append(row)
        if len(group) == cfg.group or i + 1 == cfg.samples:
            table = pa.Table.from_pylist(group)
            if parquet is None:
                parquet = pq.ParquetWriter(folder / "samples.parquet", table.schema, compression="zstd")
            parquet.write_table(table)
    parquet.close()
    writer.finish(torch.zeros(1, cfg.width))


def plain_readers(folder, cfg):
    """{name: function of ids that fills a batch made beforehand}, each the shortest code that does it."""
    import pyarrow.parquet as pq

    size = int(np.prod(cfg.shape))
    name = f"latents/{'x'.join(map(str, cfg.shape))}.0.bin"
    latents = np.memmap(folder / name, np.int16, "c").reshape(cfg.samples, -1)
    tokens = np.memmap(folder / "latents/text.0.bin", np.int16, "c").reshape(-1, cfg.width)
    off = np.load(folder / "latents/text_off.npy")
    raw_x, raw_text = np.empty((cfg.batch, size), np.int16), np.empty((cfg.batch, cfg.length, cfg.width), np.int16)
    x0, text = torch.empty(cfg.batch, *cfg.shape), torch.empty(cfg.batch, cfg.length, cfg.width)
    table = pq.ParquetFile(folder / "samples.parquet")

    def raw_memmap(ids):
        for j, i in enumerate(ids):
            first, rows, _ = off[i]
            raw_x[j] = latents[i, :size]
            raw_text[j, :rows] = tokens[first:first + rows]
            raw_text[j, rows:] = 0

    def fill(j, z, rows):
        x0[j] = z.view(cfg.shape)
        text[j, :len(rows)] = rows.view(-1, cfg.width)
        text[j, len(rows):] = 0

    def memmap(ids):
        for j, i in enumerate(ids):
            first, rows, _ = off[i]
            fill(j, torch.from_numpy(latents[i, :size]).view(torch.bfloat16),
                 torch.from_numpy(tokens[first:first + rows]).view(torch.bfloat16))

    def torch_load(ids):
        for j, i in enumerate(ids):
            sample = torch.load(folder / f"{i}.pt", weights_only=True)
            fill(j, sample["latent"], sample["text"])

    def parquet(ids):
        for j, i in enumerate(ids):
            group = table.read_row_group(i // cfg.group).to_pydict()
            z, rows = (torch.frombuffer(bytearray(group[f"{name}_bytes"][i % cfg.group]), dtype=torch.float32)
                       for name in ("vae_latent", "text_embedding"))
            fill(j, z, rows.view(-1, cfg.width))

    return {MEMMAP: memmap, RAW: raw_memmap, "torch.load per sample": torch_load,
            "parquet row group per sample": parquet}


def evict(folder):
    """Drops the folder's files from the page cache, so that they are read from disk."""
    gc.collect()    # a Latents and its thread hold one another, and pages that are mapped stay
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(cfg, warm, apart):
    """Prints {name: (samples per second, CPU ms per sample)}; writes it to cfg.out, with what it was measured on."""
    ours = warm["Latents"][0]
    for title, table in (("warm, read before", warm), ("apart", apart)):
        print(f"\n{title:52} samples/s   warm Latents over it   CPU ms/sample")
        for name, (rate, cpu) in table.items():
            print(f"{name:52} {rate:9.1f} {ours / rate:22.2f} {cpu:15.2f}")
    place = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
             "threads": torch.get_num_threads()}
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(cfg), "machine": place, "warm": warm, "apart": apart}, indent=1))
    print(f"written to {path}")


# ---- attention ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AttentionConfig:
    """Sliding-tile attention beside dense SDPA, FlexAttention with the same mask, and what peers are installed."""
    check: bool = True                                      # compare with float64 first, and stop where it differs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grid: tuple[int, int, int] | None = None                # tokens F H W; None = CASES of the device
    tile: tuple[int, int, int] = (4, 4, 8)                  # tokens, with --grid
    window: tuple[int, int, int] = (3, 3, 3)                # tiles, with --grid
    heads: int = 12                                         # with --grid
    width: int = 128                                        # of a head, with --grid
    rounds: int = 7                                         # times that each method runs; the median is shown
    threads: int = 2                                        # on a CPU
    tune: bool = False                                      # also time other blocks than those of attention.HALF
    out: str = "out/bench/attention.json"                   # file of the results


CASES = {                                                   # grid, tile, window, heads, width
    "cuda": [((30, 48, 80), (6, 8, 8), (3, 3, 3), 24, 128), ((30, 48, 80), (6, 8, 8), (3, 3, 5), 24, 128),
             ((30, 48, 80), (6, 8, 8), (5, 5, 5), 24, 128), ((21, 30, 52), (4, 4, 8), (3, 3, 3), 12, 128),
             ((21, 30, 52), (4, 4, 8), (3, 3, 3), 40, 128), ((21, 45, 80), (4, 4, 8), (3, 3, 3), 12, 128),
             ((21, 45, 80), (4, 4, 8), (3, 3, 3), 40, 128)],
    "cpu": [((16, 48, 64), (4, 4, 8), (3, 3, 3), 1, 64)]}
PATTERNS = [((8, 16, 16), (4, 4, 8), (1, 3, 1)), ((9, 18, 20), (4, 4, 8), (1, 1, 1)),
            ((7, 11, 13), (2, 4, 4), (3, 1, 3)), ((12, 16, 24), (6, 8, 8), (1, 1, 1)),
            ((3, 5, 7), (2, 2, 3), (1, 1, 1)), ((5, 9, 17), (2, 3, 4), (9, 9, 9))]
BLOCKS = {"forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (64, 128, 4, 2),
                      (64, 64, 4, 2)],
          "dQ": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)],
          "dK/dV": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 32, 8, 2)]}


def bench_attention(cfg):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    torch.set_num_threads(cfg.threads)
    name, dtype = f"CPU, {cfg.threads} threads", torch.float32
    if device == "cuda":
        name, dtype = torch.cuda.get_device_name(), torch.bfloat16
    print(f"{name}, {dtype}, torch {torch.__version__}")
    results = {"device": name, "torch": torch.__version__, "config": asdict(cfg),
               "worst error / plain PyTorch's": check_attention(device) if cfg.check else None, "cases": []}

    cases = [(cfg.grid, cfg.tile, cfg.window, cfg.heads, cfg.width)] if cfg.grid else CASES[device]
    for i, (grid, tile, window, heads, width) in enumerate(cases):
        metadata, L = build_metadata(grid, tile, window, device), prod(grid)
        generator = torch.Generator(device).manual_seed(0)
        tensors = [torch.randn(1, L, heads, width, device=device, dtype=dtype, generator=generator) for _ in range(4)]
        print(f"\n{grid}, tile {tile}, window {window}: {L} tokens, {heads} heads of {width}, "
              f"{metadata.sparsity:.2%} sparse, 1/density {1 / (1 - metadata.sparsity):.2f}")
        if cfg.check:
            check_rows(metadata, *tensors[:3])
        dense = not any(case[0] == grid and case[3:] == (heads, width) for case in cases[:i])   # once per grid
        methods = contenders(metadata, dense, device)
        rows = rates(times(methods, *tensors, cfg.rounds), methods, heads * width, peak(name))
        results["cases"].append({"grid": grid, "tile": tile, "window": window, "heads": heads, "width": width,
                                 "sparsity": metadata.sparsity, "methods": rows})
        if cfg.tune:
            tune(metadata, *tensors, cfg.rounds)
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


def contenders(metadata, dense, device):
    """{name: (function of q, k, v (B, L, N, K), pairs of queries and keys that its FLOPs count)}, ours first."""
    grid, tile, L = metadata.grid, metadata.tile, prod(metadata.grid)
    methods = {"nanovideo": (lambda q, k, v: attention(q, k, v, metadata), metadata.pairs)}

    def sdpa(backend):
        def run(q, k, v):
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)
        return heads_first(run), L * L
    if device == "cpu":                                     # FlexAttention has no backward there
        return methods | ({"dense SDPA": sdpa(None)} if dense else {})

    if dense:
        methods["dense SDPA, flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        methods["dense SDPA, cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    mask = create_block_mask(visible(metadata), None, None, L, L, device=device, BLOCK_SIZE=128, _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    methods["FlexAttention"] = heads_first(lambda q, k, v: flex(q, k, v, block_mask=mask)), metadata.pairs
    if dense and find_spec("flash_attn"):
        from flash_attn import flash_attn_func
        methods["dense flash-attn"] = flash_attn_func, L * L
    if dense and find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as flash_attn_3
        methods["dense flash-attn 3"] = flash_attn_3, L * L
    if all(size % t == 0 for size, t in zip(grid, tile)):
        if find_spec("natten"):                             # its windows slide by tiles too, over raster order
            from natten import na3d
            near = partial(na3d, kernel_size=tuple(w * t for w, t in zip(metadata.window, tile)), stride=tile)
            methods["NATTEN"] = lambda *qkv: near(*(x.unflatten(1, grid) for x in qkv)).flatten(1, 3), metadata.pairs
        if find_spec("fastvideo_kernel") and tile == (6, 8, 8):
            from fastvideo_kernel import sliding_tile_attention
            shape = "x".join(map(str, grid))
            methods["FastVideo, no backward"] = heads_first(lambda q, k, v: sliding_tile_attention(
                q, k, v, [metadata.window] * q.shape[1], 0, False, shape)), metadata.pairs
    return methods


def heads_first(function):
    return lambda *qkv: function(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def visible(metadata):
    """Whether query i sees key j, places in tile order: a mask for FlexAttention, with its unused batch and head."""
    at = [x // tile for x, tile in zip(torch.unravel_index(metadata.order, metadata.grid), metadata.tile)]
    n = [ceil_div(size, tile) for size, tile in zip(metadata.grid, metadata.tile)]
    first = [(x - w // 2).clamp(0, n - w) for x, n, w in zip(at, n, metadata.window)]

    def see(b, h, i, j):
        axes = [(first[a][i] <= at[a][j]) & (at[a][j] < first[a][i] + metadata.window[a]) for a in range(3)]
        return axes[0] & axes[1] & axes[2]
    return see


def check_attention(device):
    """The largest error of outputs and gradients; 1 is that of plain PyTorch in the same type, 2 is refused.

    All against float64; two runs must agree bit for bit.
    """
    print(f"\nerrors; plain PyTorch's in the same type are 1 {'':38} out      dq      dk      dv")
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if device == "cuda" else [torch.bfloat16, torch.float32]
    patterns = [pattern for pattern in PATTERNS if device == "cuda" or prod(pattern[0]) < 2000]
    worst = 0
    for (grid, tile, window), width, dtype in product(patterns, (128, 64, 80), dtypes):
        metadata = build_metadata(grid, tile, window, device)
        generator = torch.Generator(device).manual_seed(1)
        tensors = torch.randn(4, 2, prod(grid), 3, width, device=device, generator=generator).to(dtype)

        def run(function, dtype=dtype):
            q, k, v, grad = (x.to(dtype).clone().requires_grad_() for x in tensors)
            out = function(q, k, v, metadata)
            return out, *torch.autograd.grad(out, (q, k, v), grad)
        exact, theirs, ours = run(reference, torch.float64), run(reference), run(attention)
        if not all(torch.equal(a, b) for a, b in zip(ours, run(attention))):
            raise SystemExit(f"two runs differ: {grid} {tile} {window}, heads of {width}, {dtype}")
        errors = [((a - e).abs().max() / (b - e).abs().max().clamp_min(2e-6 * e.abs().max())).item()
                  for a, b, e in zip(ours, theirs, exact)]
        worst = max(worst, *errors)
        print(f"{f'{grid} {tile} {window}, heads of {width}, {dtype}':76}" + " ".join(f"{x:7.2f}" for x in errors))
        if not all(error < 2 for error in errors):
            raise SystemExit("an error of twice plain PyTorch's, or more")
    return worst


def check_rows(metadata, q, k, v, rows=64):
    """The forward at full size, some rows of the first head against float64."""
    at = torch.linspace(0, q.shape[1] - 1, rows, device=q.device).long()
    see = visible(metadata)(None, None, at[:, None], torch.arange(q.shape[1], device=q.device))
    scores = q[0, at, 0].double() @ k[0, :, 0].double().T / q.shape[3]**0.5
    exact = scores.masked_fill(~see, -torch.inf).softmax(-1) @ v[0, :, 0].double()
    error = ((attention(q, k, v, metadata)[0, at, 0] - exact).abs().max() / exact.abs().max()).item()
    print(f"  forward off by {error:.1e} of the largest value, on {rows} rows")
    if not error < (1e-5 if q.dtype == torch.float32 else 2e-2):
        raise SystemExit("too much")


def times(methods, q, k, v, grad, rounds):
    """{name: [forward ms, backward ms or None]}, medians of runs in turns: a busy moment is everybody's."""
    def clock(run):
        if not q.is_cuda:
            begin = perf_counter()
            return run(), 1000 * (perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        return result, begin.elapsed_time(end)

    spent = {name: ([], []) for name in methods}
    for n in range(-2 if q.is_cuda else 0, rounds):         # two to compile and warm up
        for name, (function, _) in methods.items():
            inputs = [x.detach().requires_grad_("no backward" not in name) for x in (q, k, v)]
            out, forward = clock(lambda: function(*inputs))
            backward = clock(lambda: torch.autograd.grad(out, inputs, grad))[1] if out.requires_grad else None
            if n >= 0:
                spent[name][0].append(forward)
                spent[name][1].append(backward)
    return {name: [median(ms) if ms[0] else None for ms in both] for name, both in spent.items()}


def rates(spent, methods, width, top):
    """Prints and returns ms, TFLOP/s (4 pairs N K / s forward, 10 backward), MFU and how many times ours is faster.

    The share of the ideal is that number for both over the number of pairs that ours does without.
    """
    rows = {}
    print(f"  {'':22}" + "".join(f"{which:>10} ms  TFLOP/s    MFU     x" for which in ("forward", "backward"))
          + "   both x  of the ideal")
    for name, both in spent.items():
        rows[name], line, pairs = {}, f"  {name:22}", methods[name][1]
        for which, operations, ms, ours in zip(("forward", "backward"), (4, 10), both, spent["nanovideo"]):
            if ms:
                rate = operations * pairs * width / ms / 1e9
                rows[name][which] = {"ms": ms, "tflops": rate, "mfu": top and rate / top, "x": ms / ours}
                line += f"{ms:13.3f} {rate:8.3f} {f'{rate / top:.1%}' if top else '':>6} {ms / ours:5.2f}"
        if all(both):
            faster = sum(both) / sum(spent["nanovideo"])
            ideal = pairs / methods["nanovideo"][1]
            rows[name] |= {"x": faster, "of the ideal": faster / ideal}
            line += f" {faster:8.2f} {faster / ideal:13.2f}"
        print(line)
    return rows


def tune(metadata, q, k, v, grad, rounds):
    """Times our kernels with other blocks, one kernel at a time: the fastest belong into attention.HALF."""
    _, shipped = sliding._settings(q, k, v)
    key = next(key for key, blocks in sliding.HALF.items() if blocks is shipped)
    ours = {"nanovideo": (lambda q, k, v: attention(q, k, v, metadata), metadata.pairs)}
    for i, (kernel, blocks) in enumerate(BLOCKS.items()):
        for block in blocks:
            sliding.HALF[key] = *shipped[:i], block, *shipped[i + 1:]
            forward, backward = times(ours, q, k, v, grad, rounds)["nanovideo"]
            print(f"  {kernel:8} {block}: {forward if kernel == 'forward' else backward:8.3f} ms")
    sliding.HALF[key] = shipped


# ---- step -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class StepConfig:
    """One update of train.py and of distill.py beside the bare model's, dense and with --window, and a save."""
    what: Literal["train", "distill", "both"] = "both"      # distill: one update of the student and one of its critic
    model: Literal[tuple(MODELS)] = "tiny"                  # model size, a row of model.MODELS
    shape: tuple[int, int, int, int] | None = None          # latent C F H W; None = what the model is mostly trained on
    length: int | None = None                               # text tokens; None = the same
    batch: int | None = None                                # samples per update; None = 16 for tiny, else 1
    micro_batch: int | None = None                          # samples forwarded at once; None = batch
    window: tuple[int, int, int] | None = None              # tiles; timed beside dense. In distill.py the student's
    tile: tuple[int, int, int] = (4, 4, 8)                  # tokens of a tile
    lora_rank: int = 0                                      # LoRA rank; 0 trains all weights
    student_steps: int = 4                                  # sampling steps of the student, whose mean is shown
    remat: bool | None = None                               # recompute activations; None = for all but tiny
    device: Literal["auto", "cpu", "cuda"] = "auto"         # auto = cuda where there is a GPU
    precision: Literal["fp32", "bf16"] | None = None        # None = bf16 on a GPU, else fp32
    compile: bool | None = None                             # compile the blocks; None = on a GPU
    steps: int = 10                                         # updates in a row; the student's are whole rounds of steps
    rounds: int = 5                                         # times that each takes its turn; medians are shown
    saves: int = 1                                          # checkpoints to write, 0 = none; the median is shown
    dir: str | None = None                                  # where dataset and saves go; None = the temporary folder
    out: str = "out/bench/step.json"                        # file of the results


EVERY = 10          # updates to a line of the log


class Update(NamedTuple):
    """An update as its root makes it, and the bare model's that does the same work."""
    what: str           # train, student or critic
    window: tuple | None
    ours: Callable      # update(log, clock)
    bare: Callable      # update()
    needs: float        # FLOPs that the model needs for it: a backward is twice its forward
    runs: float         # FLOPs that are executed: also what is computed again
    turn: int = 1       # updates of which only the mean counts


class Random(NamedTuple):
    """Everything random of one micro-batch of distillation."""
    text: torch.Tensor
    null: torch.Tensor
    z: torch.Tensor
    e: torch.Tensor
    u: torch.Tensor
    noises: list


def bench_step(cfg):
    shape, length = USUAL[cfg.model]
    cfg = replace(cfg, shape=cfg.shape or shape, length=cfg.length or length,
                  batch=cfg.batch or (16 if cfg.model == "tiny" else 1),
                  remat=cfg.model != "tiny" if cfg.remat is None else cfg.remat)
    if MODELS[cfg.model].image:
        raise ValueError(f"--model={cfg.model} is shown images, of which bench.py has none: wan-14b is as large")
    fits(cfg.model, MODELS[cfg.model].text_dim, [cfg.shape], {}, 1, cfg.window, cfg.tile)
    world = parallel.init(cfg.device, precision=cfg.precision, compile=cfg.compile)
    cfg = replace(cfg, micro_batch=cfg.micro_batch or cfg.batch, precision=world.precision,
                  compile=world.compile)
    name = machine(world.device)
    how = cfg.precision
    if cfg.compile:
        how += ", compiled"
    if cfg.remat:
        how += ", remat"
    print(f"{name}, torch {torch.__version__}, {how}: {cfg.model}, batch {cfg.batch} of {cfg.shape}, "
          f"{cfg.length} text tokens")
    results = {"device": name, "torch": torch.__version__, "config": asdict(cfg), "updates": [],
               "saves": {}}
    with tempfile.TemporaryDirectory(dir=cfg.dir) as folder:
        folder = Path(folder)
        write_random(folder / "latents", cfg)
        data = Latents(folder / "latents", seed=0, batch=cfg.batch, micro_batch=cfg.micro_batch,
                       device=world.device)
        for what, make in (("train", training), ("distill", distillation)):
            if cfg.what in (what, "both"):
                updates, state = make(cfg, data, world)
                log, clock = quiet(Log, folder / what, asdict(cfg), steps=10**6), Clock()
                results["updates"] += in_turns(updates, log, clock, cfg, world)
                results["saves"][what] = save_times(folder / what, state, cfg)
                quiet(log.close)
                updates = state = log = None            # the next one needs their memory
                gc.collect()
                torch.cuda.empty_cache()
        data = None
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


def machine(device):
    """The name of what computes."""
    if parallel.on_gpu(device):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def write_random(path, cfg):
    """A dataset of random latents and texts, four batches of it."""
    width = MODELS[cfg.model].text_dim
    codec = {"name": "random", "text_width": width, "text_length": cfg.length}
    writer = Writer(path, {"codec": codec, "fps": 16, "dtype": "bf16"})
    for i in range(4 * cfg.batch):
        rng = stream(0, "sample", 0, i)
        rows = int(rng.integers(1, cfg.length + 1))
        latent, text = normal(rng, cfg.shape), normal(rng, (rows, width))
        writer.add(latent, text, caption=f"{i}", source=f"{i}", key=f"{i}")
    writer.finish(torch.zeros(1, width))


def training(cfg, data, world):
    """-> [Update] of train.py, dense and with the window, and the state that it saves."""
    lora = {"main": (cfg.lora_rank, cfg.lora_rank)} if cfg.lora_rank else {}
    adapter = "main" if lora else None
    net = build(cfg, world, lora, windows(cfg))
    ckpt.fill(parallel.local_rows(net), values)
    me = learner(net, adapter, world)
    me.average = copies(me.rows)
    steps, updates = count(), []
    for window in windows(cfg):
        def losses_of(micros, bound):
            return [partial(flow, bound, micro) for micro in micros]

        def ours(log, clock, bound):
            step = next(steps)
            with clock("seconds"):
                with clock("data_wait"):
                    micros = data.at(step)
                seen = train_step(me, losses_of(micros, bound), lr=1e-6, clip=1.0, ema=0.999)
            line(log, step, seen, clock, world)

        bound, some = bind(net, cfg.shape, world, window, cfg.tile, lora=adapter), data.at(0)
        forward = bound.flops(cfg.shape, cfg.length)
        meta = blank(cfg.model, cfg.remat, lora)
        meta = bind(meta, cfg.shape, NOWHERE, window, cfg.tile, lora=adapter)
        runs = executed(flow, meta, send(some[0], NOWHERE.device)) * len(some)
        bare = partial(bare_update, me, bound, [], [(m.x0, m.u, Cond(m.text)) for m in some])
        updates.append(Update("train", window, partial(ours, bound=bound), bare,
                              (2 if lora else 3) * forward * cfg.batch, runs))
    return updates, ckpt.roles(net=me.rows, opt=me.opt_rows, ema=me.average)


def flow(net, micro):
    """train.py's loss."""
    drop = micro.drop < 0.1
    text = torch.where(drop[:, None, None], micro.null, micro.text)
    return flow_loss(net, micro.x0, Cond(text), sample_t(micro.u, "uniform", 3.0), micro.e)


def distillation(cfg, data, world):
    """-> [Update] of distill.py, student and critic, dense and with the window, and the state that it saves."""
    K, lora = cfg.student_steps, cfg.lora_rank
    adapters = dict.fromkeys(("student", "critic"), (lora, lora)) if lora else {}
    names = ("student", "critic", None) if lora else (None, None, None)
    base = build(cfg, world, adapters, windows(cfg), trainable=bool(lora))
    ckpt.fill(parallel.local_rows(base), values)
    nets = [base if lora else build(cfg, world, {}, windows(cfg)) for _ in names[:2]] + [base]
    student, critic = (learner(net, name, world) for net, name in zip(nets, names[:2]))
    if not lora:
        source = parallel.local_rows(base)
        for me in (student, critic):
            ckpt.fill(me.rows, lambda name, shape, first, last: source[name].tensor)
    student.average = copies(student.rows)
    draws = Ahead(partial(draw, data, cfg), {"student": 1, "critic": 1}, world.device)
    steps, updates, times = {"student": count(), "critic": count()}, [], grid(K, 5.0)
    for window in windows(cfg):
        def ours(log, clock, role, me, loss, bounds):
            step = next(steps[role])
            with clock("seconds"):
                with clock("data_wait"):
                    micros = draws(role, step)
                losses = [partial(loss, bounds, micro, times, step % K) for micro in micros]
                seen = train_step(me, losses, lr=1e-6, clip=10.0, ema=0.99 if me.average else None)
            line(log, step, seen, clock, world)

        patterns = window, None, None
        bounds = bound_all(nets, names, patterns, cfg, world)
        blanks = [blank(cfg.model, cfg.remat, adapters) for _ in nets[:1 if lora else 3]]
        meta = bound_all(blanks * 3 if lora else blanks, names, patterns, cfg, NOWHERE)
        some = draw(data, cfg, "critic", 0)
        fixed = [send([m.z, m.u, Cond(m.text)], world.device) for m in some]
        s, full = (bound.flops(cfg.shape, cfg.length) for bound in bounds[:2])
        learning, micro = 2 if lora else 3, send(some[0], NOWHERE.device)
        more = (K - 1) / 2 * s * cfg.batch      # forwards of the student that the mean exit adds to exit 0
        scores = [bounds[1], bounds[2], bounds[2]]
        for role, me, loss, needs, at, others in (
                ("student", student, student_loss, s * learning + 3 * full, 0, scores),
                ("critic", critic, critic_loss, s + full * learning, 1, [bounds[0]])):
            runs = more + len(some) * executed(loss, meta, micro, times, 0)
            exits = cycle(range(K))
            bare = partial(bare_update, me, bounds[at], others, fixed, bounds[0], exits)
            update = partial(ours, role=role, me=me, loss=loss, bounds=bounds)
            updates.append(Update(role, window, update, bare, needs * cfg.batch + more, runs, K))
    return updates, ckpt.roles(net=student.rows, opt=student.opt_rows, ema=student.average,
                               critic=critic.rows, critic_opt=critic.opt_rows)


def bound_all(nets, names, patterns, cfg, world):
    return [bind(net, cfg.shape, world, window, cfg.tile, lora=name)
            for net, name, window in zip(nets, names, patterns)]


def draw(data, cfg, role, step):
    """What distill.py draws for one update."""
    K, micros = cfg.student_steps, []
    u = stratified(0, f"{role}_score_t_perm", f"{role}_score_t", step, cfg.batch)
    for slots in data.slots:
        text = data.text([(step * cfg.batch + slot) % data.count for slot in slots])
        z, e = (noise(0, f"{role}_{kind}", step, slots, cfg.shape) for kind in ("z", "score_noise"))
        noises = [noise(0, f"{role}_renoise", step, [slot * K + k for slot in slots], cfg.shape)
                  for k in range(K - 1)]
        micros.append(Random(text, data.null, z, e, u[slots], noises))
    return micros


def student_loss(nets, micro, times, exit):
    """distill.py's loss of the student, with guidance at every t."""
    student, critic, teacher = nets
    cond, uncond = Cond(micro.text), Cond(micro.null.expand_as(micro.text))
    x0 = rollout(student, micro.z, cond, times, micro.noises, exit)
    t = sample_t(micro.u, "uniform", 5.0, (0.02, 0.98))
    return dmd_loss(x0, teacher, critic, cond, uncond, t, micro.e, torch.full_like(t, 4.0))


def critic_loss(nets, micro, times, exit):
    """distill.py's loss of the critic."""
    student, critic, _ = nets
    cond = Cond(micro.text)
    with torch.no_grad():
        x0 = rollout(student, micro.z, cond, times, micro.noises, exit)
    return flow_loss(critic, x0, cond, sample_t(micro.u, "uniform", 5.0, (0.02, 0.98)), micro.e)


NOWHERE = parallel.imagine(1)       # where FLOPs are counted: on meta


def windows(cfg):
    return [None, cfg.window] if cfg.window else [None]


def build(cfg, world, lora, patterns, trainable=True):
    net = blank(cfg.model, cfg.remat, lora)
    shapes = 2 * (1 + len(lora)) * len(patterns)
    return parallel.prepare(net, world, trainable=trainable, shapes=shapes)


def learner(net, adapter, world):
    """A whole net, or one adapter of it, as train_step takes it."""
    rows = parallel.local_rows(net, trained=True)
    if adapter:
        rows = {name: part for name, part in rows.items() if f".lora.{adapter}." in name}
    opt, opt_rows = adamw(rows, (0.9, 0.999), 0.01)
    return Learner(rows, opt, opt_rows, parallel.sync(net), parallel.norm(net, rows, world))


def values(name, shape, first, last):
    """An initial value, but for the head's, which is 0 there: GPUs multiply zeros faster."""
    return initial(name.replace("head.head", "head"), shape, stream(0, "init", 0))[first:last]


def executed(loss, *inputs):
    """The FLOPs of a loss and its backward, counted operator by operator on meta."""
    with FlopCounterMode(display=False) as counter:
        loss(*inputs)[0].backward()
    return counter.get_total_flops()


def bare_update(me, net, others, inputs, student=None, exits=None):
    """Forward, backward and AdamW on fixed inputs, after the forwards without gradient that a distillation needs."""
    extra = [student] * next(exits) if exits else []
    for i, (x, t, cond) in enumerate(inputs, 1):
        with torch.no_grad():
            for other in (*extra, *others):
                other(x, t, cond)
        me.sync(i == len(inputs))
        (net(x, t, cond).square().mean() / len(inputs)).backward()
    parallel.collect(net.net, me.rows)
    me.opt.found_inf = None
    me.opt.step()
    me.opt.zero_grad(set_to_none=True)


def line(log, step, seen, clock, world):
    """A line of the log, as often as train.py writes one."""
    if (step + 1) % EVERY == 0:
        quiet(log, step + 1, **numbers(parallel.mean(seen | clock.sums, world)))


def quiet(function, *args, **more):
    """Calls it without what it prints."""
    with redirect_stdout(io.StringIO()):
        return function(*args, **more)


def in_turns(updates, log, clock, cfg, world):
    """Prints and returns a row per update: a busy moment of the machine is everybody's."""
    cuda = parallel.on_gpu(world.device)

    def turn(run, steps):
        """Seconds of one update, when all that they began is done."""
        began = perf_counter()
        for _ in range(steps):
            run()
        if cuda:
            torch.cuda.synchronize()
        return (perf_counter() - began) / steps

    spent = [[] for _ in updates]       # per round (seconds, those of them that data took, the bare one's)
    first, memory, empty = [], [0.0] * len(updates), lambda: None
    for update in updates:              # compiles, and fills caches
        first.append(turn(partial(update.ours, log, clock), update.turn) * update.turn)
        turn(update.bare, update.turn)
    for _ in range(cfg.rounds):
        for i, update in enumerate(updates):
            steps, waits = ceil_div(cfg.steps, update.turn) * update.turn, Clock()
            turn(empty, 1)
            Log.speed(0, world.device, cfg.precision)       # the peak starts anew
            waits.add("data_wait", 0)
            ours = turn(partial(update.ours, log, waits), steps)
            used = Log.speed(0, world.device, cfg.precision)
            memory[i] = max(memory[i], used.get("memory_gb", 0.0))
            spent[i].append((ours, waits.take(steps)["data_wait"], turn(update.bare, steps)))

    top = peak(machine(world.device)) if cuda and cfg.precision == "bf16" else None
    tokens = prod(token_grid(MODELS[cfg.model], cfg.shape)) * cfg.batch
    print(f"  {'update':8}{'window':>9}{'ms':>10}{'bare ms':>10}{'loop':>8}{'data ms':>9}"
          f"{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}{'HFU':>7}{'peak GB':>9}{'first s':>9}")
    rows = []
    for update, seconds, start, gb in zip(updates, spent, first, memory):
        ours, wait, bare = (median(each) for each in zip(*seconds))
        rate = update.needs / ours / 1e12
        mfu, hfu = (rate / top, rate / top * update.runs / update.needs) if top else (None, None)
        row = {
            "what": update.what,
            "window": update.window,
            "ms": 1000 * ours,
            "bare_ms": 1000 * bare,
            "overhead": median(a / b for a, _, b in seconds) - 1,
            "data_wait_ms": 1000 * wait,
            "tokens_per_s": tokens / ours,
            "tflops": rate,
            "executed": update.runs / update.needs,
            "mfu": mfu,
            "hfu": hfu,
            "memory_gb": gb,
            "first_s": start,
            "of_updates": update.turn,
            "rounds": seconds,
        }
        rows.append(row)
        window = " ".join(map(str, update.window)) if update.window else "dense"
        share = "".join(f"{f'{x:.1%}' if top else '':>7}" for x in (mfu or 0, hfu or 0))
        print("  {what:8}".format(**row) + f"{window:>9}" +
              "{ms:10.2f}{bare_ms:10.2f}{overhead:8.1%}{data_wait_ms:9.2f}{tokens_per_s:11.0f}"
              "{tflops:9.3f}".format(**row) + share + "{memory_gb:9.2f}{first_s:9.2f}".format(**row))
    return rows


def save_times(out, state, cfg):
    """How long a save of the state blocks training -> {seconds, gb, gb_per_s}, None where --saves=0."""
    seconds = []
    for step in range(cfg.saves):
        began = perf_counter()
        path = ckpt.save(out, step, state, {}, keep=1)
        seconds.append(perf_counter() - began)
    if not seconds:
        return None
    gb = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    row = {"seconds": median(seconds), "gb": gb, "gb_per_s": gb / median(seconds)}
    print("  a save blocks training for {seconds:.2f} s: {gb:.3f} GB, {gb_per_s:.2f} GB/s".format(**row))
    return row


# ---- sparsity -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SparsityConfig:
    """What tiles and windows save on Wan's grids: sparsity, and FLOPs of a whole step, dense over sparse."""
    dense_ends: int = 0                                     # first and last blocks that stay dense


VIDEOS = {"81 frames of 480 x 832": ((21, 30, 52), ["wan-1.3b", "wan-14b"]),
          "81 frames of 720 x 1280": ((21, 45, 80), ["wan-1.3b", "wan-14b"]),
          "121 frames of 704 x 1280": ((31, 22, 40), ["wan2.2-5b"])}
CHOICES = [((4, 4, 8), (3, 3, 3)), ((4, 4, 8), (3, 3, 5)), ((4, 4, 8), (3, 5, 5)), ((4, 4, 8), (5, 5, 5)),
           ((6, 8, 8), (3, 3, 3)), ((6, 8, 8), (3, 3, 5))]


def bench_sparsity(cfg):
    print("| video | tokens | tile | window | sparsity | a step is faster by, at best |\n|---|---|---|---|---|---|")
    for (video, (grid, models)), (tile, window) in product(VIDEOS.items(), CHOICES):
        metadata, faster = build_metadata(grid, tile, window), []
        for name in models:
            shape = MODELS[name].channels, grid[0], 2 * grid[1], 2 * grid[2]    # of the latents, which patches halve
            dense, sparse = (flops(MODELS[name], shape, 512, x, cfg.dense_ends) for x in (None, metadata))
            faster.append(f"{name} {dense / sparse:.2f} x")
        print(f"| {video} | {prod(grid)} | {' '.join(map(str, tile))} | {' '.join(map(str, window))} | "
              f"{metadata.sparsity:.1%} | {', '.join(faster)} |")


COMMANDS = {"data": (DataConfig, bench_data), "attention": (AttentionConfig, bench_attention),
            "step": (StepConfig, bench_step), "sparsity": (SparsityConfig, bench_sparsity)}


def main(cfg):
    dict(COMMANDS.values())[type(cfg)](cfg)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()})
    main(chosen)
    if type(chosen) is StepConfig:
        parallel.leave()
