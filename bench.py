"""Measures parts of nanovideo on this machine, each beside what it replaces: a table, and the same as JSON.

    python bench.py data        samples per second: the loader, np.memmap, torch.load, parquet
    python bench.py attention   sliding-tile attention, checked, then timed beside dense SDPA, FlexAttention and peers
    python bench.py sparsity    what tiles and windows save on Wan's grids

Imports data, attention, log and model.

B batch · C F H W latent channels, frames, rows, columns · L video tokens · S text tokens · E text width
N heads · K head width
"""
import json
import os
import platform
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Literal

import numpy as np
import tyro

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attention as sliding
from attention import attention, build_metadata, reference
from data import Latents, Writer, normal, stream
from log import peak
from model import MODELS, flops


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
        loader.pages, loader.checked[:] = pages, True       # reading alone: no new memory, no checksums
        apart["Latents, cold"] = cost(lambda ids: (loader.will_need(ids), loader.sample(ids)))
        loader = None
        evict(folder)
        apart["np.memmap, cold"] = cost(plain_readers(folder, cfg)[MEMMAP])
    report(cfg, warm, apart)


PROBE = """
import json, re, sys, time
from data import Latents, Writer
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


def bench_start(cfg, ranks=8):
    """Seconds and peak memory where a dataset has many small samples, each measured in a process of its own."""
    import subprocess
    import sys

    spec = {"codec": {"name": "random", "text_width": 8, "text_length": 8}, "fps": 16, "dtype": "bf16"}
    table = {}
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
            parquet = parquet or pq.ParquetWriter(folder / "samples.parquet", table.schema, compression="zstd")
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
    n = [-(-size // tile) for size, tile in zip(metadata.grid, metadata.tile)]
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
            "sparsity": (SparsityConfig, bench_sparsity)}


def main(cfg):
    dict(COMMANDS.values())[type(cfg)](cfg)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()}))
