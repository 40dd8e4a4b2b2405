"""Measures parts of nanovideo on this machine, each beside what it replaces: a table, and the same as JSON.

    python bench.py data        samples per second: the loader, np.memmap, torch.load, parquet

Imports data.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import tyro

import torch

from data import Latents, Writer, normal, stream


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
    dir: str | None = None                                  # where the datasets go; None = the temporary folder
    out: str = "out/bench/data.json"                        # file of the results


MEMMAP, RAW = "np.memmap copy into the same batch, not normalised", "np.memmap copy of raw bf16, half the bytes"


def bench_data(cfg):
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


def report(cfg, *tables):
    """Prints {name: (samples per second, CPU ms per sample)}; writes it to cfg.out, with what it was measured on."""
    for table in tables:
        first = next(iter(table.values()))[0]
        print(f"\n{'':52} samples/s  {next(iter(table)).split(',')[0]} is x times  CPU ms/sample")
        for name, (rate, cpu) in table.items():
            print(f"{name:52} {rate:9.1f} {first / rate:17.2f} {cpu:15.2f}")
    place = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
             "threads": torch.get_num_threads()}
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(cfg), "machine": place, "rates": tables}, indent=1))
    print(f"written to {path}")


COMMANDS = {"data": (DataConfig, bench_data)}


def main(cfg):
    dict(COMMANDS.values())[type(cfg)](cfg)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()}))
