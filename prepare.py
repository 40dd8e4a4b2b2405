"""Makes a dataset of latents and text embeddings: the folder that train.py and distill.py read.

    python prepare.py                                                       built-in moving shapes
    python prepare.py --videos=DIR --out=data/mine                          a folder of films with captions
    python prepare.py --videos=DIR --codec=wan --vae=WAN --text=WAN         the same by Wan's VAE and UMT5
    python prepare.py --parquet=DIR --codec=wan --vae=WAN --text=WAN        latents that FastVideo made
    python prepare.py --prompts=FILE --shape 24 5 8 8                       prompts alone, to distil from

Under torchrun each rank encodes its share. Interrupted, the same command goes on where it was, and where the folder has
got more films since, it adds them. Imports ckpt, codec, data, films, flags, parallel, shapes.

C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import ckpt
import codec
import films
import flags
import parallel
import shapes
from data import Writer, stream, write_whole


@dataclass(frozen=True)
class Config:
    """Make a dataset of moving shapes, or of --videos, --prompts or --parquet. Flags left None take their DEFAULTS."""

    # what
    videos: str | None = None           # folder of films; captions in NAME.txt or captions.jsonl
    prompts: str | None = None          # file with a prompt per line, for a dataset without latents
    parquet: str | None = None          # folder of parquet files from FastVideo's preprocessing
    clips: int = 4000                   # how many moving shapes to draw, without these three
    seed: int = 0                       # random seed of the moving shapes
    out: str | None = None              # the dataset's folder; None = data/ and the source's name

    # clips
    sizes: tuple[str, ...] | None = None            # HEIGHTxWIDTH; films are cropped to the nearest
    frames: int | None = None                       # frames per clip
    fps: float | None = None                        # frames per second of clips, whatever the film's
    cuts: Literal["first", "all"] = "first"         # take a film's first clip, or all, one by one
    caption: str | None = None                      # caption of films without one; None = skip these
    shape: tuple[int, int, int, int] | None = None  # C F H W of latents to distil from --prompts

    # codec
    codec: Literal["dct", "wan"] = "dct"            # dct is built in; wan needs --vae and --text
    vae: str | None = None                          # Wan's VAE: a diffusers folder or hub id
    text: str | None = None                         # Wan's text encoder UMT5: likewise
    text_length: int | None = None                  # tokens that a caption may have
    negative: str = ""                              # prompt of dropout's and guidance's null text
    dtype: Literal["bf16", "fp32"] = "bf16"         # precision of stored latents and text
    device: Literal["auto", "cpu", "cuda"] = "auto" # where the wan codec computes; dct uses the CPU


DEFAULTS = {    # of flags left None
    "shapes": dict(sizes=("32x32",), frames=17, fps=8, text_length=8),
    "dct": dict(sizes=("64x64", "64x96", "96x64"), frames=17, fps=8, text_length=64),
    "wan": dict(sizes=("480x832", "832x480"), frames=81, fps=16, text_length=512),
}
ONLY = {  # flags that do something for these sources only
    "clips": {"shapes"}, "seed": {"shapes"},
    "sizes": {"shapes", "videos"}, "frames": {"shapes", "videos"},
    "cuts": {"videos"}, "caption": {"videos"}, "shape": {"prompts"},
}


def main(cfg):
    with flags.door(__file__):
        cfg = resolve(cfg)
        world = parallel.init(cfg.device if cfg.codec == "wan" else "cpu")
        coder = codec.load(cfg.codec, vae=cfg.vae, text=cfg.text, device=world.device,
                           text_length=cfg.text_length)
        check_fit(cfg, coder)
        embed = lru_cache(256)(lambda caption: coder.embed([caption])[0])
        null = embed(cfg.negative)
        kind, source = source_of(cfg)
        fidelity = []
        encoder = coder._replace(encode=partial(measured, coder, fidelity))
        names, samples = source(cfg, encoder, embed)
        # shard the full list, so that ranks agree although each has finished other names
        count, names = len(names), names[world.rank::world.size]
        ckpt.claim(cfg.out, **world.ranks)
        writer = Writer(cfg.out, spec_of(cfg, coder), world.rank)
    todo = [name for name in names if name not in writer.done]
    clear(cfg.out, world)

    before = ""
    if len(todo) < len(names):
        before = f", {len(names) - len(todo):,} of rank 0's {len(names):,} done before"
    world.say(f"{count:,} {kind} -> {cfg.out}{before}")

    skipped = 0
    with tqdm(total=len(names), initial=len(names) - len(todo), unit=f" {kind}",
              disable=world.rank > 0, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for name in todo:
            key = None
            try:
                for sample in readable(samples(name, writer.done)):
                    writer.add(**sample)
                    key = sample["key"]
            except ValueError as reason:
                bar.write(f"skipped {name}: {reason}")
                skipped += 1
            else:
                if key != name:         # its samples have keys of their own
                    writer.mark(name)
            bar.update()
    writer.save()

    skipped = wait_for_all(cfg.out, skipped, world)
    if world.rank == 0:
        mean, std = coder.spec.get("mean"), coder.spec.get("std")
        manifest = writer.finish(null, mean, std, half_power=cfg.codec == "dct")
        buckets = ", ".join(f"{b['count']:,} of {'x'.join(map(str, b['shape']))}"
                            for b in manifest["buckets"])
        size = sum(file["size"] for file in manifest["files"].values())
        missing = f"; {skipped} {kind} skipped, named above" if skipped else ""
        world.say(f"{cfg.out}: {buckets}, {size / 1e6:,.0f} MB{missing}")
        if fidelity:
            world.say(f"the codec gives back a clip's frames at {np.median(fidelity):.1f} dB PSNR, "
                      f"the first {len(fidelity)} clips' median")
    clear(cfg.out, world)


def readable(samples):
    """The samples of a film; where the system cannot read it, ValueError: a reason to skip it, and go on.

    What fails in writing (a full disk) is raised elsewhere, and ends the run.
    """
    try:
        yield from samples
    except OSError as error:
        raise ValueError(str(error)) from error


def wait_for_all(out, skipped, world):
    """Waits, for hours if need be, until each rank has stored its share -> names skipped on all of them.

    Each rank says so in a file: ranks that wait for one another in a collective give up after an hour.
    """
    files = [Path(out) / f"finished.{rank}" for rank in range(world.size)]
    with write_whole(files[world.rank]) as file:
        file.write(str(skipped).encode())
    for file in files:
        while not file.exists():
            time.sleep(1)
    return sum(int(file.read_text()) for file in files)


def clear(out, world):
    """Removes the files by which ranks wait, once all ranks have come here."""
    parallel.agree(True, world)
    if world.rank == 0:
        for file in Path(out).glob("finished.*"):
            file.unlink(missing_ok=True)
    parallel.agree(True, world)


def measured(coder, fidelity, video):
    """Encodes a video; of the first few, adds the PSNR of decoding them, in dB, the median frame's, to fidelity."""
    z = coder.encode(video)
    if coder.decodes and len(fidelity) < 8:
        fidelity.append(float(np.median(codec.psnr(coder.decode(z), video))))
    return z


# ---- sources: each gives a list of names, and a function from a name to the samples of it that are not done ----------

def source_of(cfg):
    """What the names stand for, and their source."""
    if cfg.videos:
        return "films", videos
    if cfg.prompts:
        return "prompts", prompts
    if cfg.parquet:
        return "parquet files", parquet_files
    return "clips", moving_shapes


def moving_shapes(cfg, coder, embed):
    """The built-in clips; each is a function of its number."""
    sizes = parse(cfg.sizes)

    def samples(name, done):
        i = int(name)
        rng, size = stream(cfg.seed, "clip", i), sizes[i % len(sizes)]
        video, caption = shapes.clip(rng, size=size, frames=cfg.frames)
        yield dict(latent=coder.encode(video), text=embed(caption), caption=caption,
                   source=f"clip {i}", key=name)

    return [str(i) for i in range(cfg.clips)], samples


def videos(cfg, coder, embed):
    """The films in a folder and those below it."""
    root = Path(cfg.videos)
    listed = films.captions(root)
    found, passed = films.listed(root)
    for name, reason in passed.items():
        print(f"skipped {root / name}: {reason}")
    found += listed.keys() - {films.compose(name) for name in found}    # reading names them as missing
    if not found:
        raise ValueError(f"no films in {root}: their names would end in "
                         f"{' '.join(sorted(films.FILMS | films.PICTURES))}")

    def samples(name, done):
        beside = (root / name).with_suffix(".txt")
        caption = listed.get(films.compose(name))
        if beside.exists():
            caption = films.read_text(beside).strip()
        if not caption:
            caption = cfg.caption
        if not caption:
            raise ValueError(f"no caption in {beside.name} or captions.jsonl; "
                             "--caption=TEXT would be for such films")
        text = embed(caption)
        clips = films.read_video(root / name, sizes=parse(cfg.sizes), frames=cfg.frames,
                                 fps=cfg.fps, cuts=cfg.cuts)
        for i, (video, _) in enumerate(clips):
            key = f"{name}#{i}"
            if key not in done:
                yield dict(latent=coder.encode(video), text=text, caption=caption, source=name,
                           key=key)

    return sorted(found), samples


def prompts(cfg, coder, embed):
    """The lines of a text file, without latents."""
    path = Path(cfg.prompts)
    lines = [line.strip() for line in films.read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"no prompts in {path}")

    def samples(name, done):
        line = lines[int(name) - 1]
        yield dict(latent=None, text=embed(line), caption=line, source=path.name, key=name)

    return [str(i + 1) for i in range(len(lines))], samples


def parquet_files(cfg, coder, embed):
    """What FastVideo's preprocessing made for text to video, its Wan latents and text embeddings taken as they are."""
    from pyarrow import parquet     # only here is it needed

    root, channels = Path(cfg.parquet), coder.spec["channels"]
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
    if not names:
        raise ValueError(f"no parquet files in {root}")
    parts = [f"{name}_{part}" for name in ("vae_latent", "text_embedding")
             for part in ("bytes", "shape", "dtype")]

    def rows(name):
        try:
            file = parquet.ParquetFile(root / name)
            if missing := {"caption", "file_name", *parts} - set(file.schema_arrow.names):
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            for batch in file.iter_batches(1, columns=["caption", "file_name", *parts]):
                yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"unreadable: {error}") from error

    def samples(name, done):
        bad = []
        for i, row in enumerate(rows(name)):
            key = f"{name}#{i}"
            if key in done:
                continue
            try:
                latent, text = (tensor(row, part) for part in ("vae_latent", "text_embedding"))
                if latent.ndim != 4 or len(latent) != channels:
                    raise ValueError(f"a latent of shape {tuple(latent.shape)}, "
                                     f"wanted is ({channels}, F, H, W)")
            except ValueError as reason:
                bad.append(f"{row['file_name']}: {reason}")
            else:
                yield dict(latent=latent, text=text, caption=row["caption"],
                           source=row["file_name"], key=key)
        if bad:
            raise ValueError(f"{len(bad)} rows of it. {'; '.join(bad)}")

    return names, samples


def tensor(row, name):
    """A tensor as FastVideo stores it: bytes, shape, and the dtype that the bytes are of."""
    content, shape, dtype = (row[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
    known = {"float64": torch.float64, "float32": torch.float32,
             "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"{name} of dtype {dtype}; known are {', '.join(known)}")
    if not content or len(content) != math.prod(shape) * known[dtype].itemsize:
        raise ValueError(f"{name} has {len(content or b'')} bytes, "
                         f"its shape {shape} of {dtype} another number")
    return torch.frombuffer(bytearray(content), dtype=known[dtype]).view(*shape)


# ---- the door -------------------------------------------------------------------------------------------------------

def resolve(cfg):
    """The config with None replaced by its defaults; ValueError for flags that are impossible together."""
    sources = [name for name in ("videos", "prompts", "parquet") if asdict(cfg)[name]]
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in sources)}: give one of them")
    kind = sources[0] if sources else "shapes"
    for flag, kinds in ONLY.items():
        if asdict(cfg)[flag] != asdict(Config())[flag] and kind not in kinds:
            what = "moving shapes" if kind == "shapes" else f"--{kind}"
            raise ValueError(f"--{flag} does nothing for {what}")
    if kind == "prompts" and not cfg.shape:
        raise ValueError("--prompts needs --shape C F H W, that of the latents to distil")
    if kind == "parquet" and cfg.codec != "wan":
        raise ValueError("--parquet holds latents of Wan's VAE: "
                         "it needs --codec=wan --vae=PATH --text=PATH")
    if cfg.codec == "dct" and (cfg.vae or cfg.text):
        raise ValueError("--vae and --text are for --codec=wan; dct has no weights")
    if cfg.codec == "wan" and not (cfg.text and (cfg.vae or kind == "prompts")):
        needed = "--text=PATH" if kind == "prompts" else "--text=PATH and --vae=PATH"
        raise ValueError(f"--codec=wan needs {needed}, "
                         "each a folder or hub id of a diffusers pipeline")
    if cfg.clips < 1 or cfg.fps is not None and cfg.fps <= 0:
        raise ValueError(f"--clips={cfg.clips} --fps={cfg.fps}: both are above 0")

    path = Path(asdict(cfg)[kind]) if sources else Path("shapes")
    if sources and not (path.is_file() if kind == "prompts" else path.is_dir()):
        what = "file" if kind == "prompts" else "folder"
        raise FileNotFoundError(f"--{kind}={path}: no such {what}")
    row = DEFAULTS["shapes" if kind == "shapes" and cfg.codec == "dct" else cfg.codec]
    row = row | {"out": f"data/{path.resolve().stem}"}
    return replace(cfg, **{name: value for name, value in row.items() if asdict(cfg)[name] is None})


def parse(sizes):
    """["64x96"] -> [(64, 96)], height and width."""
    for size in sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            raise ValueError(f"--sizes {size}: a size is HEIGHTxWIDTH in pixels, such as 64x96")
    return [tuple(map(int, size.split("x"))) for size in sizes]


def check_fit(cfg, coder):
    """Sizes that the codec's strides and the model's patches of 2 x 2 do not divide are refused, naming the nearest."""
    channels = coder.spec.get("channels")           # None for wan without its VAE
    if cfg.shape and channels not in (None, cfg.shape[0]):
        raise ValueError(f"--shape {' '.join(map(str, cfg.shape))}: "
                         f"{cfg.codec} latents have {channels} channels")
    if not cfg.prompts and not cfg.parquet:
        t, h, w = coder.stride[0], 2 * coder.stride[1], 2 * coder.stride[2]
        if (cfg.frames - 1) % t or cfg.frames < 1:
            near = cfg.frames // t * t + 1
            raise ValueError(f"--frames={cfg.frames}: {cfg.codec} takes 1 + a multiple of {t}, "
                             f"such as {near}")
        for height, width in parse(cfg.sizes):
            if height % h or width % w:
                near = f"{max(round(height / h), 1) * h}x{max(round(width / w), 1) * w}"
                raise ValueError(f"--sizes {height}x{width}: {cfg.codec} takes multiples of "
                                 f"{h}x{w}, such as {near}")


def spec_of(cfg, coder):
    """What must not change while a dataset is filled."""
    spec = {"codec": coder.spec, "fps": cfg.fps, "dtype": cfg.dtype}
    for name in ("videos", "prompts", "parquet", "shape"):
        if asdict(cfg)[name]:
            spec[name] = asdict(cfg)[name]
    if not cfg.prompts and not cfg.parquet:
        spec |= {"sizes": cfg.sizes, "frames": cfg.frames, "cuts": cfg.cuts, "seed": cfg.seed}
    return spec


if __name__ == "__main__":
    main(flags.read(Config, DEFAULTS))
    parallel.leave()
