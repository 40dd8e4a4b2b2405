"""How well are the captions followed, and how much of the data's variety is left? Measured on the built-in shapes.

    python evaluate.py --ckpt=out/train --guidance 1 2                a trained model at two guidance scales
    python evaluate.py --ckpt=out/distill --teacher=out/train         a student, its teacher, that in its sampler

Every system draws the same captions from the same noise, next to real clips through the codec (the ceiling) and to real
clips under another's caption (chance). Accuracy is read back from pixels by shapes.judge; the rest compares features of
clips (where, how large, how fast, how bright) or latents with those of real ones. Imports model and leaves.

C F H W latent channels, frames, rows, columns · n clips
"""
import json
import sys
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import comb
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import ckpt
import codec
import parallel
from attention import build_metadata
from data import normal, stream
from model import MODELS, DiT, token_grid
from shapes import CAPTIONS, clip, features, judge
from step import euler, grid, rollout

REAL_SETS = 4           # real sets that each system is compared with; against each other they give a figure's floor
PROMPTS, SEEDS = 8, 16  # diversity: clips of the same prompt under many noises
NEAREST = 5             # recall: a clip reaches as far as its 5th neighbour


@dataclass(frozen=True)
class Config:
    """Measure a checkpoint that was trained on the built-in shapes."""

    ckpt: str = "out/train"                               # a run's folder (its newest checkpoint) or one checkpoint
    weights: Literal["ema", "net"] = "ema"                # averaged weights, or those of the last update
    teacher: str | None = None                            # the checkpoint it was distilled from, measured beside it
    guidance: tuple[float, ...] = ()                      # scales to try; () = the checkpoint's own
    steps: tuple[int, ...] = ()                           # numbers of sampling steps to try; () = the checkpoint's own
    n: int = 300                                          # clips per system, the 96 captions in turn
    seed: int = 0                                         # of noise and real clips
    batch: int = 50                                       # clips sampled at once
    device: Literal["auto", "cpu", "cuda"] = "auto"       # auto = cuda where there is one
    out: str | None = None                                # JSON of all figures; None = evaluate.json in the run


def main(cfg):
    with door():
        world = parallel.init(cfg.device)
        student, teacher = load(cfg.ckpt), cfg.teacher and load(cfg.teacher)
        how = student.manifest["meta"]["sampling"]
        if cfg.n <= 2 * NEAREST or min(cfg.batch, *cfg.steps, 1) < 1 or how["codec"]["name"] != "dct":
            raise ValueError(f"--n={cfg.n} --batch={cfg.batch} --steps {cfg.steps}, codec {how['codec']['name']}: the judge "
                             f"reads more than {2 * NEAREST} clips of the built-in shapes, made by the dct codec")
        systems = [(name, saved, ckpt.model_of(saved, cfg.weights), how)
                   for name, saved, how in plan(student, teacher, cfg)]

    # asked of every system: n clips of all captions in turn, then a few captions under many noises
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(cfg.n)]
    captions += [CAPTIONS[i * len(CAPTIONS) // PROMPTS] for i in range(PROMPTS) for _ in range(SEEDS)]
    coder = codec.load(how["codec"])
    real, *others = (measure(real_clips(coder, how, captions, cfg.seed, i), coder, how, captions, cfg.n)
                     for i in tqdm(range(REAL_SETS + 1), desc="real clips", leave=False, disable=None))
    rest = [captions[i] for i in stream(cfg.seed, "val", 0).permutation(cfg.n)]
    chance = real._replace(right=np.array([verdict(seen, caption) for seen, caption in zip(real.seen, rest)]))

    table, clips = {}, {}
    for name, saved, source, how in systems:
        clips[name] = measure(sampled(saved, source, how, coder, captions, cfg, world), coder, how, captions, cfg.n)
    for name, some in {"real clips": real, "real clips, another caption": chance, **clips}.items():
        table[name] = figures(some, real, others)
    names = list(next(iter(table.values())))
    print(f"{cfg.n} clips each" + " " * 17 + "".join(f"{name:>11}" for name in names))
    for system, row in table.items():
        print(f"{system:<28}" + "".join(f"{row[name]:11.3f}" for name in names))
    first, *rest = clips
    pairs = {f"{first} against {name}": paired(clips[first], clips[name], real, others) for name in rest}
    for pair, seen in pairs.items():
        print(f"{pair}: {seen}")
    out = Path(cfg.out) if cfg.out else folder(cfg.ckpt) / "evaluate.json"
    told = {"flags": asdict(cfg), "step": student.manifest["step"], "table": table, "paired": pairs}
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(f"written to {out}")


@contextmanager
def door():
    """Bad input is refused in one line, exit code 2; a bug further on keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def load(path):
    """All that a checkpoint, or a run's newest one, holds."""
    return ckpt.stored(ckpt.latest(path) or path)


def folder(path):
    """The run's folder, of a checkpoint too."""
    return Path(path) if (Path(path) / "ckpt").is_dir() else Path(path).parent.parent


def plan(student, teacher, cfg):
    """[(name, checkpoint, sampling block)]: the checkpoint at each guidance and step count, or beside its teacher."""
    how = student.manifest["meta"]["sampling"]
    if "times" in how:
        if cfg.guidance or cfg.steps:
            raise ValueError(f"{cfg.ckpt} is a student: it has its own times {how['times']} and no guidance")
        few = f"{len(how['times'])} steps"
        systems = [(f"student, {few}", student, how)]
        if teacher:
            base = student.manifest["meta"]["base"]
            if teacher.manifest["crc32"] != base["crc32"]:
                raise ValueError(f"{cfg.teacher} is not what {cfg.ckpt} was distilled from: that was {base['path']}")
            own = teacher.manifest["meta"]["sampling"]
            systems += [(f"teacher, {own['steps']} steps, s={own['guidance']:g}", teacher, own),
                        (f"teacher, {few}, undistilled", teacher,
                         how | {name: own[name] for name in ("window", "tile", "dense_ends")})]
        return systems
    if teacher:
        raise ValueError(f"{cfg.ckpt} is no distilled student, so --teacher={cfg.teacher} is not its teacher")
    return [(f"{steps} steps, s={scale:g}", student, how | {"steps": steps, "guidance": scale})
            for steps in cfg.steps or (how["steps"],) for scale in cfg.guidance or (how["guidance"],)]


# ---- clips ----------------------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    latents: torch.Tensor       # (n + PROMPTS SEEDS, C, F, H, W), normalised
    seen: list                  # (shape, colour, direction) that the judge saw in each of the first n
    right: np.ndarray           # (n, 3) of these, whether each is the caption's
    features: np.ndarray        # (n + PROMPTS SEEDS, 6), see shapes.features


def real_clips(coder, how, captions, seed, i):
    """The i-th set of clips of these captions, from seeds that no dataset has -> normalised latents."""
    (_, F, H, W), (f, h, w) = how["shapes"][0], coder.stride
    mean, std = (torch.tensor(how[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    size, frames = (H * h, W * w), (F - 1) * f + 1
    videos = (clip(stream(seed, "val", i, slot), size, frames, caption)[0] for slot, caption in enumerate(captions))
    return torch.stack([(coder.encode(video) - mean) / std for video in videos])


def sampled(saved, source, how, coder, captions, cfg, world):
    """What a checkpoint shows for these captions, clip i from noise i -> normalised latents, which are kept on disk."""
    key = zlib.crc32(json.dumps([how, saved.manifest["crc32"], cfg.weights, captions, cfg.seed]).encode())
    file = Path(saved.origin).parent.parent / "evaluate" / f"{key:08x}.npy"
    if file.exists():
        return torch.from_numpy(np.load(file))
    with torch.device("meta"):
        net = DiT(MODELS[how["model"]])
    parallel.prepare(net, world, precision="fp32", trainable=False)
    ckpt.fill(parallel.local_rows(net), source)
    shape, text = tuple(how["shapes"][0]), torch.zeros(len(captions), how["text"]["length"], how["text"]["width"])
    for padded, row in zip(text, coder.embed(captions)):
        padded[:len(row)] = row
    tokens = token_grid(net.config, shape)
    metadata = how["window"] and build_metadata(tokens, tuple(how["tile"]), tuple(how["window"]), device=world.device)
    net = partial(net, metadata=metadata, dense_ends=how["dense_ends"])
    latents = []
    for places in tqdm(torch.arange(len(captions)).split(cfg.batch), desc="sampling", leave=False, disable=None):
        noises = [torch.stack([normal(stream(cfg.seed, "sample", k, i), shape) for i in places.tolist()])
                  .to(world.device) for k in range(len(how.get("times", "1")))]
        words, null = text[places].to(world.device), saved.tensor("null").to(world.device).expand(len(places), -1, -1)
        with torch.no_grad():
            if "times" in how:
                x0 = rollout(net, noises[0], words, how["times"], noises[1:], len(how["times"]) - 1)
            else:
                x0 = euler(net, noises[0], words, grid(how["steps"], how["shift"]), null, how["guidance"])
        latents.append(x0.cpu())
    file.parent.mkdir(exist_ok=True)
    np.save(file.with_suffix(".tmp.npy"), torch.cat(latents).numpy())
    file.with_suffix(".tmp.npy").replace(file)
    return torch.cat(latents)


def measure(latents, coder, how, captions, n):
    """Decoded, judged against the captions, and described."""
    mean, std = (torch.tensor(how[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    videos = [coder.decode(z * std + mean) for z in latents]
    seen = [judge(video) for video in videos[:n]]
    right = [verdict(s, c) for s, c in zip(seen, captions)]
    return Clips(latents, seen, np.array(right), np.array([features(video) for video in videos]))


def verdict(seen, caption):
    """Whether shape, colour and direction are the caption's."""
    _, colour, shape, _, direction = caption.split()
    return [saw == said for saw, said in zip(seen, (shape, colour, direction))]


# ---- figures --------------------------------------------------------------------------------------------------------


def figures(clips, real, others):
    """Every figure of one system; real clips of `others` are what it is compared with, real's spread the unit."""
    n, unit = len(clips.right), real.features.std(0)
    x, sets = clips.features[:n] / unit, [other.features[:n] / unit for other in others]
    xx, pairs = distances(x, x), [(distances(x, y), distances(y, y)) for y in sets]
    return {"joint": clips.right.all(1).mean(), "shape": clips.right[:, 0].mean(), "colour": clips.right[:, 1].mean(),
            "direction": clips.right[:, 2].mean(), "energy": np.mean([energy(xx, xy, yy) for xy, yy in pairs]),
            "recall": np.mean([recall(xx, xy) for xy, _ in pairs]), "vendi": vendi(xx),
            "diversity": spread(clips.features[n:] / unit) / spread(real.features[n:] / unit),
            "std": (clips.latents.std() / real.latents.std()).item(),
            "motion": motion(clips.latents) / motion(real.latents)}


def distances(x, y):
    """Of each of x (n, D) from each of y (m, D): (n, m)."""
    return np.linalg.norm(x[:, None] - y[None], axis=2)


def energy(xx, xy, yy):
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| without bias: 0 on average for equal distributions."""
    n, m = xy.shape
    return 2 * xy.mean() - xx.sum() / (n * (n - 1)) - yy.sum() / (m * (m - 1))


def recall(xx, xy, k=NEAREST):
    """Share of the real y that lies within some x's distance to its k-th neighbour (arXiv 1904.06991, eq. 1-2)."""
    radius = np.sort(xx, 1)[:, k]
    return (xy <= radius[:, None]).any(0).mean()


def vendi(xx):
    """Effective number of distinct clips: exp of the entropy of a Gaussian kernel's spectrum (arXiv 2210.02410)."""
    p = np.linalg.eigvalsh(np.exp(-xx**2 / 2) / len(xx)).clip(1e-12)
    return np.exp(-(p * np.log(p)).sum())


def spread(x):
    """Mean distance between clips of the same prompt."""
    return np.mean([distances(some, some).sum() / (SEEDS * (SEEDS - 1)) for some in np.split(x, PROMPTS)])


def motion(latents):
    """Mean absolute change from frame to frame."""
    return latents.diff(dim=2).abs().mean().item()


def paired(a, b, real, others, draws=200):
    """a against b on the same captions and noises: McNemar's exact p of joint, 95 % intervals of a - b in the others.

    The intervals are of halves drawn without replacement: those vary as much as the whole does between samples, and hold
    no clip twice, which recall would take for a neighbour.
    """
    n, unit = len(a.right), real.features.std(0)
    only_a, only_b = (a.right.all(1) & ~b.right.all(1)).sum(), (b.right.all(1) & ~a.right.all(1)).sum()
    flips = int(only_a + only_b)
    p = min(1.0, 2 * sum(comb(flips, i) for i in range(min(only_a, only_b) + 1)) / 2**flips)
    rng, (x, y, z) = stream(0, "val", 0), (some.features[:n] / unit for some in (a, b, others[0]))
    pairs, gaps = [distances(*two) for two in ((x, x), (x, z), (y, y), (y, z), (z, z))], {"energy": [], "recall": []}
    for _ in range(draws):
        i = rng.permutation(n)[:n // 2]
        xx, xz, yy, yz, zz = (d[np.ix_(i, i)] for d in pairs)
        gaps["energy"].append(energy(xx, xz, zz) - energy(yy, yz, zz))
        gaps["recall"].append(recall(xx, xz) - recall(yy, yz))
    intervals = {name: [round(float(q), 3) for q in np.quantile(gap, (0.025, 0.975))] for name, gap in gaps.items()}
    return intervals | {"only the first right": int(only_a), "only the second right": int(only_b),
                        "McNemar p": round(float(p), 3)}


if __name__ == "__main__":
    main(tyro.cli(Config))
    parallel.leave()
