"""How well are the captions followed, and how much of the data's variety is left? Measured on the built-in shapes.

    python evaluate.py --ckpt=out/train --guidance 1 2                a trained model at two guidance scales
    python evaluate.py --ckpt=out/distill --teacher=out/train         a student, its teacher, that in its sampler
    python evaluate.py --ckpt=out/causal --frames=33                  a causal model, in clips longer than trained
    python evaluate.py --ckpt=out/train --first_frame                 beside that, from given first frames

Every system draws the same captions from the same noise, next to real clips through the codec (the ceiling) and to real
clips under another's caption (chance). Accuracy is read back from pixels by shapes.judge; the rest compares features of
clips (where, how large, how fast, how bright) or latents with those of real ones. With --first_frame each system also
begins from the first frames of other real clips: shape and colour are to be the frame's, the direction the caption's,
which says all three or "moving left" alone. Imports model and leaves.

C F H W latent channels, frames, rows, columns · n clips
"""
import json
import math
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import ckpt
import codec
import flags
import parallel
import step
from data import long_noise, padded, stream
from model import Cond, bind, blank, causal_window, check_begun, chunk_of, chunked
from shapes import CAPTIONS, clip, direction_alone, features, judge, judge_late, moves

REAL_SETS = 4           # real sets that each system is compared with; against each other they give a figure's floor
PROMPTS, SEEDS = 8, 16  # diversity: clips of the same prompt under many noises
NEAREST = 5             # recall: a clip reaches as far as its 5th neighbour
HALVES = 200            # random halves of the clips, from which two systems' intervals are read


@dataclass(frozen=True)
class Config:
    """Measure a checkpoint that was trained on the built-in shapes."""

    ckpt: str = "out/train"                             # run folder (its newest checkpoint) or checkpoint
    weights: Literal["ema", "net"] = "ema"              # ema: averaged weights, net: those of the last update
    teacher: str | None = None                          # checkpoint that a student was distilled from
    guidance: tuple[float, ...] = ()                    # guidance scales to try; none: the checkpoint's own
    steps: tuple[int, ...] = ()                         # numbers of sampling steps to try; none: the checkpoint's own
    solver: tuple[Literal["euler", "ab2"], ...] = ()    # solvers to try; none: the checkpoint's own
    first_frame: bool = False                           # measure each system from given first frames too
    frames: int | None = None                           # causal: frames of a clip; the first are judged as ever
    window: int | None = None                           # causal: chunks seen, its own among them; None: all of training
    sink: int = 0                                       # causal: first chunks that are seen always, beside these
    n: int = 300                                        # clips per system; the 96 captions take turns
    seed: int = 0                                       # random seed of noise and real clips
    batch: int = 50                                     # clips a rank samples at once
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is a GPU
    out: str | None = None                              # JSON file for all figures; None: evaluate.json in the run


def main(cfg):
    with flags.door(__file__):
        world = parallel.init(cfg.device, precision="fp32")
        roles = [cfg.weights, "null"]
        student, teacher = ckpt.stored(cfg.ckpt, roles, **world.ranks), None
        if cfg.teacher:
            teacher = ckpt.stored(cfg.teacher, roles, **world.ranks)
        sampling = student.sampling
        made_by = sampling["codec"]["name"]
        least = min(cfg.batch, *cfg.steps, 1)
        if cfg.n <= 2 * NEAREST or least < 1 or made_by != "dct":
            raise ValueError(f"--n={cfg.n} --batch={cfg.batch} --steps {cfg.steps}, codec {made_by}: the judge "
                             f"reads more than {2 * NEAREST} clips of the built-in shapes, made by the dct codec")
        systems = [longer(system, cfg) for system in systems_of(student, teacher, cfg)]
        if cfg.first_frame:
            if sampling["shapes"][0][1] == 1:
                raise ValueError(f"--first_frame: {cfg.ckpt} was trained on stills")
            if cfg.frames:
                raise ValueError(f"--first_frame begins clips as long as real ones, --frames={cfg.frames} does not")
            systems = [begun for system in systems for begun in (system, *from_frames(system))]

    # asked of every system: n clips of all captions in turn, then a few captions under many noises
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(cfg.n)]
    for i in range(PROMPTS):
        captions += [CAPTIONS[i * len(CAPTIONS) // PROMPTS]] * SEEDS
    coder = codec.load(sampling["codec"])
    frames, latents = None, {}
    if cfg.first_frame:
        frames = real_clips(coder, sampling, captions, cfg.seed, REAL_SETS + 1)
    for system in systems:
        latents[system.name] = sampled(system, coder, captions, frames, cfg, world)
    if world.rank > 0:
        return

    # what they show, beside real clips under their captions and under others'
    seen = partial(measure, coder=coder, sampling=sampling, captions=captions, n=cfg.n)
    sets = []
    for i in tqdm(range(REAL_SETS + 1), desc="real clips", leave=False, disable=None):
        sets.append(seen(real_clips(coder, sampling, captions, cfg.seed, i)))
    real, *others = sets
    clips = {"real clips": real, "real clips, another caption": mistaken(real, captions, cfg)}
    given = {system.name for system in systems if system.begins}
    for name, z in latents.items():
        clips[name] = seen(z[:, :, :sampling["shapes"][0][1]])

    # a row for each, and the first system beside every other
    table = {}
    for name, measured in clips.items():
        table[name] = figures(measured, real, others, name in given)
        if cfg.first_frame:
            table[name] |= jumps(measured.moves)
    later = {}
    for name, z in latents.items():
        if cfg.frames:
            later[name] = late(z[:cfg.n], coder, sampling, captions)
    names, width = list(table["real clips"]), max(28, *(len(name) + 1 for name in table))
    print(f"{cfg.n} clips each".ljust(width) + "".join(f"{name:>11}" for name in names))
    for name, row in table.items():
        print(name.ljust(width) + "".join(f"{row[figure]:11.3f}" for figure in names))
    for name, row in later.items():
        print(f"{name}, later:", ", ".join(f"{figure} {value:.3f}" for figure, value in row.items()))
    pairs, (first, *rest) = {}, systems
    for other in rest:
        pair = f"{first.name} against {other.name}"
        pairs[pair] = paired(clips[first.name], clips[other.name], real, others)
        print(f"{pair}: {pairs[pair]}")

    out = folder(cfg.ckpt) / "evaluate.json"
    if cfg.out:
        out = Path(cfg.out)
    report = dict(
        flags=asdict(cfg),
        step=student.manifest["step"],
        table=table,
        later=later,
        paired=pairs,
    )
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


def folder(path):
    """The run's folder, of a checkpoint too."""
    if (Path(path) / "ckpt").is_dir():
        return Path(path)
    return Path(path).parent.parent


class System(NamedTuple):
    """What is measured: a checkpoint's weights in a sampler."""
    name: str
    saved: ckpt.Source      # the checkpoint
    source: ckpt.Source     # its weights, of role --weights
    sampling: dict
    begins: str = ""        # what it is asked with a first frame: "captions", or "directions" alone; "": it gets none


def systems_of(student, teacher, cfg):
    """[System]: the checkpoint at each guidance and number of steps, or a student beside its teacher."""
    sampling, weights = student.sampling, ckpt.model_of(student, cfg.weights)
    if "times" not in sampling:
        if teacher:
            raise ValueError(f"{cfg.ckpt} is no distilled student, so --teacher={cfg.teacher} "
                             "is not its teacher")
        systems = []
        ways = product(cfg.solver or [sampling.get("solver", "euler")],
                       cfg.steps or [sampling["steps"]],
                       cfg.guidance or [sampling["guidance"]])
        for solver, steps, scale in ways:
            name, tried = f"{steps} steps, s={scale:g}", sampling | {"steps": steps, "guidance": scale}
            if solver != "euler":
                name = f"{name}, {solver}"
            if solver != sampling.get("solver", "euler"):
                tried = tried | {"solver": solver}
            systems.append(System(name, student, weights, tried))
        return systems

    if cfg.guidance or cfg.steps or cfg.solver:
        raise ValueError(f"{cfg.ckpt} is a student: it has its own times {sampling['times']} "
                         "and no guidance")
    few = f"{len(sampling['times'])} steps"
    systems = [System(f"student, {few}", student, weights, sampling)]
    if teacher:
        base = student.manifest["meta"]["base"]
        if teacher.manifest["crc32"] != base["crc32"]:
            raise ValueError(f"{cfg.teacher} is not what {cfg.ckpt} was distilled from: "
                             f"that was {base['path']}")
        many, weights = teacher.sampling, ckpt.model_of(teacher, cfg.weights)
        name = f"teacher, {many['steps']} steps, s={many['guidance']:g}"
        undistilled = sampling | {key: many[key] for key in ("window", "tile", "dense_ends")}
        systems += [System(name, teacher, weights, many),
                    System(f"teacher, {few}, undistilled", teacher, weights, undistilled)]
    return systems


def longer(system, cfg):
    """The system with the pattern and the length that are asked of a causal one."""
    sampling = system.sampling
    chunk = chunk_of(sampling["window"], sampling["tile"])
    if cfg.frames is None and cfg.window is None and cfg.sink == 0:
        return system
    told = f"--frames={cfg.frames} --window={cfg.window} --sink={cfg.sink}"
    if chunk is None:
        raise ValueError(f"{told}: {system.saved.origin} is not causal, it makes a clip at once")
    usual, stride = sampling["shapes"][0][1], sampling["codec"]["stride"][0]
    frames = cfg.frames
    if frames is None:
        frames = (usual - 1) * stride + 1
    made = (frames - 1) // stride + 1       # latent frames
    if (frames - 1) % stride or made < usual:
        raise ValueError(f"{told}: frames are 1 + a multiple of {stride}, {usual} latent ones at least")
    asked = dict(
        window=causal_window(sampling, cfg.window, cfg.sink),
        sink=cfg.sink,
        frames=made,
    )
    return system._replace(sampling=sampling | asked)


def from_frames(system):
    """The system again, begun from first frames, by whole captions and by their directions alone."""
    check_begun(system.sampling, "--first_frame", system.saved.origin)
    ways = {"captions": "first frame", "directions": "first frame, moving …"}
    return [system._replace(name=f"{system.name}, {said}", begins=way) for way, said in ways.items()]


# ---- clips ----------------------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    latents: torch.Tensor       # (n + PROMPTS SEEDS, C, F, H, W), normalised
    seen: list                  # (shape, colour, direction) that the judge saw in each of the first n
    right: np.ndarray           # (n, 3) of these, whether each is the caption's
    features: np.ndarray        # (n + PROMPTS SEEDS, 6), see shapes.features
    moves: np.ndarray           # (n, frames - 1), see shapes.moves


def real_clips(coder, sampling, captions, seed, i):
    """The i-th set of clips of these captions, from seeds that no dataset has -> normalised latents."""
    _, F, H, W = sampling["shapes"][0]
    f, h, w = coder.stride
    size, frames = (H * h, W * w), (F - 1) * f + 1
    mean, std = codec.moments(sampling)
    latents = []
    for slot, caption in enumerate(captions):
        video, _ = clip(stream(seed, "val", i, slot), size, frames, caption)
        latents.append((coder.encode(video) - mean) / std)
    return torch.stack(latents)


def sampled(system, coder, captions, frames, cfg, world):
    """What a system shows for these captions, clip i from noise i -> normalised latents on rank 0, None elsewhere.

    frames: clips whose first frames are given, where the system begins so. The ranks share the clips. Rank 0 keeps them
    on disk, for the next time that they are asked for.
    """
    _, saved, source, sampling, begins = system
    if begins == "directions":
        captions = [direction_alone(caption) for caption in captions]
    asked = [sampling, saved.manifest["crc32"], cfg.weights, captions, cfg.seed]
    if begins:
        asked.append("first frame")
    key = zlib.crc32(json.dumps(asked).encode())
    file = Path(saved.origin).parent.parent / "evaluate" / f"{key:08x}.npy"
    if parallel.agree(file.exists(), world):
        return torch.from_numpy(np.load(file))

    with flags.door(__file__):      # weights are read here
        net = parallel.frozen(blank(sampling["model"]), world, partial(ckpt.fill, source=source))
    shape, see = tuple(sampling["shapes"][0]), None
    pattern = sampling["window"], sampling["tile"]
    if chunk_of(*pattern):
        net = chunked(net, shape, world, *pattern, sink=sampling.get("sink", 0))
        see = net.see
    else:
        net = bind(net, shape, world, *pattern, sampling["dense_ends"])
    length, count = sampling.get("frames", shape[1]), step.noises_of(sampling)
    text = padded(coder.embed(captions), sampling["text"])
    null = saved.tensor("null").to(world.device)
    hidden = True if world.rank > 0 else None
    bar = tqdm(total=len(captions), desc="sampling", leave=False, disable=hidden)

    @torch.no_grad()
    def clips(places):
        free = None
        if begins:
            given = frames[places].to(world.device)
            free = step.first_given(given, torch.ones(len(places), device=world.device))

        def draw(k):
            e = long_noise(cfg.seed, "sample", k, count, places, shape, 0, length).to(world.device)
            if k > 0 or not begins:
                return e
            return step.place(e, given, free)

        cond = Cond(text[places].to(world.device))
        uncond = Cond(null.expand_as(cond.text))
        bar.update(len(places) * world.size)
        return step.sample(net, draw, cond, uncond, sampling, free, see)

    latents = parallel.spread(clips, len(captions), cfg.batch, world)
    bar.close()
    if world.rank == 0:
        file.parent.mkdir(exist_ok=True)
        np.save(file.with_suffix(".tmp.npy"), latents.numpy())
        file.with_suffix(".tmp.npy").replace(file)
    return latents


def measure(latents, coder, sampling, captions, n):
    """Decoded, judged against the captions, and described -> Clips."""
    mean, std = codec.moments(sampling)
    videos = [coder.decode(z * std + mean) for z in latents]
    seen = [judge(video) for video in videos[:n]]
    right = [verdict(saw, caption) for saw, caption in zip(seen, captions)]
    described = [features(video) for video in videos]
    gone = [moves(video) for video in videos[:n]]
    return Clips(latents, seen, np.array(right), np.array(described), np.array(gone))


def late(latents, coder, sampling, captions):
    """What shapes.judge_late reads after training's frames: the mean of each figure over the clips that have it."""
    mean, std = codec.moments(sampling)
    first = (sampling["shapes"][0][1] - 1) * coder.stride[0] + 1
    seen = [judge_late(coder.decode(z * std + mean), first, caption) for z, caption in zip(latents, captions)]
    values = {}
    for clip in seen:
        for name, value in clip.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(some)) for name, some in values.items()}


def mistaken(real, captions, cfg):
    """Real clips judged against each other's captions: what chance gives."""
    order = stream(cfg.seed, "val", 0).permutation(cfg.n)
    right = [verdict(saw, captions[i]) for saw, i in zip(real.seen, order)]
    return real._replace(right=np.array(right))


def verdict(seen, caption):
    """Whether shape, colour and direction are the caption's."""
    _, colour, shape, _, direction = caption.split()
    return [saw == said for saw, said in zip(seen, (shape, colour, direction))]


# ---- figures --------------------------------------------------------------------------------------------------------


def figures(clips, real, others, given=False):
    """Every figure of one system; real clips of `others` are what it is compared with, real's spread the unit.

    given: whether its first frames are, which std and motion then leave out.
    """
    first = int(given)
    latents, real_latents = clips.latents[:, :, first:], real.latents[:, :, first:]
    n, unit = len(clips.right), real.features.std(0)
    x = clips.features[:n] / unit
    sets = [other.features[:n] / unit for other in others]
    xx = distances(x, x)
    pairs = [(distances(x, y), distances(y, y)) for y in sets]
    shape, colour, direction = clips.right.mean(0)
    return {
        "joint": clips.right.all(1).mean(),
        "shape": shape,
        "colour": colour,
        "direction": direction,
        "energy": np.mean([energy(xx, xy, yy) for xy, yy in pairs]),
        "recall": np.mean([recall(xx, xy) for xy, _ in pairs]),
        "vendi": vendi(xx),
        "diversity": variety(clips.features[n:] / unit) / variety(real.features[n:] / unit),
        "std": (latents.std() / real_latents.std()).item(),
        "motion": motion(latents) / motion(real_latents),
    }


def jumps(gone):
    """How far objects go from frame 0 to 1, and between later frames, in px: moves (n, frames - 1) -> their means."""
    means = {}
    for name, some in {"jump": gone[:, 0], "later": gone[:, 1:]}.items():
        visible = some[np.isfinite(some)]
        means[name] = float(visible.mean()) if len(visible) else math.nan
    return means


def distances(x, y):
    """Of each of x (n, D) from each of y (m, D): (n, m)."""
    return np.linalg.norm(x[:, None] - y[None], axis=2)


def energy(xx, xy, yy):
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| without bias: 0 on average for equal distributions."""
    n, m = xy.shape
    within_x = xx.sum() / (n * (n - 1))     # without the zeros on the diagonal
    within_y = yy.sum() / (m * (m - 1))
    return 2 * xy.mean() - within_x - within_y


def recall(xx, xy, k=NEAREST):
    """Share of the real y that lies within some x's distance to its k-th neighbour (arXiv 1904.06991, eq. 1-2)."""
    radius = np.sort(xx, 1)[:, k]
    return (xy <= radius[:, None]).any(0).mean()


def vendi(xx):
    """Effective number of distinct clips: exp of the entropy of a Gaussian kernel's spectrum (arXiv 2210.02410)."""
    kernel = np.exp(-xx**2 / 2) / len(xx)
    p = np.linalg.eigvalsh(kernel).clip(1e-12)
    return np.exp(-(p * np.log(p)).sum())


def variety(x):
    """Mean distance between clips of the same prompt."""
    sums = [distances(same, same).sum() for same in np.split(x, PROMPTS)]
    return np.mean(sums) / (SEEDS * (SEEDS - 1))


def motion(latents):
    """Mean absolute change from frame to frame."""
    return latents.diff(dim=2).abs().mean().item()


def paired(a, b, real, others):
    """a against b on the same captions and noises: McNemar's test of joint, 95 % intervals of a - b in the rest.

    The intervals are of halves drawn without replacement: those vary as much as the whole does between samples, and
    hold no clip twice, which recall would take for a neighbour.
    """
    n, unit = len(a.right), real.features.std(0)
    x, y, z = (clips.features[:n] / unit for clips in (a, b, others[0]))
    xx, xz = distances(x, x), distances(x, z)
    yy, yz = distances(y, y), distances(y, z)
    zz = distances(z, z)
    rng = stream(0, "val", 0)
    energies, recalls = [], []
    for _ in range(HALVES):
        picked = rng.permutation(n)[:n // 2]
        half = np.ix_(picked, picked)
        energy_a = energy(xx[half], xz[half], zz[half])
        energy_b = energy(yy[half], yz[half], zz[half])
        energies.append(energy_a - energy_b)
        recalls.append(recall(xx[half], xz[half]) - recall(yy[half], yz[half]))
    only_a, only_b, p = mcnemar(a.right.all(1), b.right.all(1))
    return {
        "energy": interval(energies),
        "recall": interval(recalls),
        "only the first right": only_a,
        "only the second right": only_b,
        "McNemar p": round(p, 3),
    }


def mcnemar(a, b):
    """McNemar's exact test of two systems on the same captions, a, b (n,) where each is right.

    -> (captions that a alone has right, b alone, two-sided p): a fair coin would choose between the two.
    """
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    tosses = only_a + only_b
    tail = sum(math.comb(tosses, i) for i in range(min(only_a, only_b) + 1)) / 2**tosses
    return only_a, only_b, min(1.0, 2 * tail)


def interval(values):
    """The middle 95 % of the values."""
    return [round(float(q), 3) for q in np.quantile(values, (0.025, 0.975))]


if __name__ == "__main__":
    main(flags.read(Config))
    parallel.leave()
