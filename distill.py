"""Distil a video diffusion transformer into a few-step student by distribution matching (DMD2, arXiv 2405.14867).

    python distill.py --teacher=out/train                                       the built-in shapes, on a laptop
    torchrun --nproc_per_node=8 distill.py --teacher=PATH --model=wan-1.3b --data=DIR --shard=-1

The student's own clips, rolled out from noise and text alone, are re-noised and shown to two nets: the frozen teacher,
with guidance, and a critic that learns by flow matching what the student makes. Their difference is the student's
gradient. No discriminator, no real clips. The same command again resumes, exactly.
Imports model, attention and every leaf.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width · K student steps
"""
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import tyro

import ckpt
import codec
import parallel
from attention import attention, build_metadata
from data import Latents, check_batch, normal, stratified, stream
from log import Log, budget, check_wandb, room
from model import LOCAL, MODELS, USUAL, DiT, Seq, activations, add_lora, flops, initial, token_grid
from step import (add_noise, adamw, dmd_loss, ema_update, ema_weights, euler, flow_loss, grid, guided_x0, lr_at,
                  rollout, sample_t, to_x0, train_step, unfold)


@dataclass(frozen=True)
class Config:
    """Distil a few-step student. A flag whose default is None takes the value of the model's row in DEFAULTS."""

    # what
    teacher: str = "out/train"                            # a run of train.py, or Wan, diffusers or ComfyUI weights
    model: Literal[tuple(MODELS)] | None = None           # size of all three nets; None = the teacher run's
    data: str = "data/shapes"                             # folder that prepare.py wrote; prompts alone are enough
    out: str = "out/distill"                              # the run's folder: log, curves, samples, checkpoints
    seed: int = 0                                         # of every random number of the run

    # the student's sampler
    student_steps: int = 4                                # K forwards per video; of --times, as many as they are
    shift: float | None = None                            # of its times S(i / K): 1 .9375 .8333 .625 at shift 5
    times: tuple[float, ...] = ()                         # the times themselves, descending from 1
    start: Literal["noise", "data"] = "noise"             # of a rollout: pure noise, or a noised clip of the dataset

    # what it learns from
    guidance: float | None = None                         # the teacher's s of u + s (c - u); the student needs none
    guidance_interval: tuple[float, float] | None = None  # t from and to which the teacher is guided (arXiv 2404.07724)
    score_shift: float | None = None                      # shift of the times at which teacher and critic are asked

    # optimizers
    steps: int | None = None                              # critic updates in all
    student_every: int | None = None                      # critic updates per student update
    batch: int | None = None                              # samples per update of either net, over all ranks
    micro_batch: int | None = None                        # samples a rank forwards at once; None = batch / data ranks
    student_lr: float | None = None                       # learning rate of the student
    critic_lr: float | None = None                        # learning rate of the critic
    schedule: Literal["constant", "cosine", "linear"] | None = None  # of both: it falls to 0 at the last step, or does not
    ema: float | None = None                              # decay of the student's averaged weights, which are sampled
    lora_rank: int = 0                                    # student and critic are adapters of that rank; 0 = nets
    lora_alpha: float | None = None                       # their scale is alpha / rank; None = rank

    # the student's sparse attention; teacher and critic attend as the teacher was trained
    window: tuple[int, int, int] | None = None            # tiles seen along frames, rows, columns; None = the teacher's
    tile: tuple[int, int, int] = (4, 4, 8)                # tokens per tile
    dense_ends: int = 0                                   # first and last blocks that stay dense

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"       # auto = cuda where there is one
    precision: Literal["fp32", "bf16"] | None = None      # of the blocks' compute; None = bf16 on cuda, fp32 on cpu
    shard: int = 1                                        # ranks that hold one copy of the parameters; -1 = all
    sp: int = 1                                           # ranks that share one sample's tokens
    compile: bool | None = None                           # compile each block; None = on cuda
    remat: bool = False                                   # recompute activations in backward, attention excepted

    # now and then
    val_every: int | None = None                          # steps between videos and their figures; 0 = only at the end
    save_every: int | None = None                         # steps between checkpoints; 0 = only at the end
    keep: int = 3                                         # newest checkpoints that stay
    samples: int = 4                                      # prompts at each validation, each under 4 noises
    vae: str | None = None                                # Wan VAE that decodes the videos; None = latents in .npy

    # the run
    resume: str | None = None                             # checkpoint that begins a run in a new folder
    allow: tuple[str, ...] = ()                           # flags that may differ from the resumed run's
    wandb: Literal["off", "online", "offline"] = "off"    # send the log to Weights & Biases
    dry_run: tuple[int, ...] = ()                         # ranks, and GB of each: print what it takes, and stop


class Row(NamedTuple):
    """What a model's runs take unless flags say otherwise; the last three have no flags: edit them here."""
    steps: int
    batch: int
    student_every: int
    student_lr: float
    critic_lr: float
    schedule: str
    ema: float
    shift: float
    score_shift: float
    guidance: float
    guidance_interval: tuple
    val_every: int
    save_every: int
    rescale: float          # share of the contrast that guidance adds which is taken back
    weight_decay: float     # of matrices; norms, biases and modulations are never decayed
    clip: float             # largest global gradient norm, of each net; 0 = any


DEFAULTS = {  # steps batch every  lr of both    schedule   ema shift score guidance, in   val save rescale decay clip
    "tiny":      Row(1000,   16, 10, 3e-4, 1e-3,   "cosine", 0.95,  4.0,  4.0, 2.0, (0.6, 0.97), 500, 500, 0.6, 0.00, 10),
    "wan-1.3b":  Row(3000,   64,  5, 2e-6, 4e-7, "constant", 0.99,  5.0,  5.0, 4.0, (0.0, 1.0),  100, 100, 0.0, 0.01, 10),
    "wan2.2-5b": Row(3000,   64,  5, 2e-6, 4e-7, "constant", 0.99,  5.0,  5.0, 4.0, (0.0, 1.0),  100, 100, 0.0, 0.01, 10),
    "wan-14b":   Row(3000,   64,  5, 2e-6, 4e-7, "constant", 0.99,  5.0,  5.0, 4.0, (0.0, 1.0),  100, 100, 0.0, 0.01, 10),
}
# flags that may change on resume: they do not alter the run
FREE = {"out", "resume", "allow", "steps", "val_every", "save_every", "keep", "wandb", "micro_batch",
        "shard", "sp", "device", "compile", "remat", "samples", "vae", "dry_run"}
SKIPS = 20      # updates of a net skipped in a row, for gradients that are not finite, after which a run has failed
SEEDS = 4       # noises per prompt at validation, to see how far the clips of one prompt differ


class Trained(NamedTuple):
    """A net that learns, and what its step needs."""
    net: Callable       # a DiT of its own, or the teacher with an adapter
    rows: dict          # parallel.local_rows of what is trained
    opt: torch.optim.Optimizer
    state: dict         # rows of the optimizer's state
    lr: float
    sync: Callable      # these two are train_step's
    norm: Callable


class Draw(NamedTuple):
    """Everything random of one micro-batch."""
    text: torch.Tensor  # (B, S, E)
    null: torch.Tensor  # (S, E) what guidance leads away from
    z: torch.Tensor     # (B, C, F, H, W) where the rollout starts
    e: torch.Tensor     # (B, C, F, H, W) noise of the score's x_t
    u: torch.Tensor     # (B,) uniforms of the score's t
    noises: list        # K - 1 of (B, C, F, H, W), between the steps of the rollout


def main(cfg):
    with door():
        source, cfg = resolve(cfg)
        if cfg.dry_run:
            raise SystemExit(plan(cfg, source))
        row = DEFAULTS[cfg.model]
        world = parallel.init(cfg.device, cfg.shard, cfg.sp)
        cfg = replace(cfg, precision=cfg.precision or ("bf16" if world.device.type == "cuda" else "fp32"))
        data = Latents(cfg.data, seed=cfg.seed, batch=cfg.batch, micro_batch=cfg.micro_batch, rank=world.data_rank,
                       world=world.data_size, pin=world.device.type == "cuda")
        how, own = fit(cfg, data, source)       # sampling blocks: the student's, the teacher's
        agree, main_rank = partial(parallel.agree, world=world), world.rank == 0
        say = print if main_rank else lambda *_: None
        base = ckpt.base_of(cfg.teacher, source)
        inputs = {"data": data.manifest["crc32"], "teacher": base["crc32"]}
        free = FREE if cfg.schedule == "constant" else FREE - {"steps"}     # the learning rates fall to 0 at the last
        found, saved = ckpt.found(cfg.out, cfg.resume, asdict(cfg), free | {*cfg.allow}, inputs,
                                  rank=world.rank, world=world.size, agree=agree, report=say)
        codec.load(how["codec"], vae=main_rank and cfg.vae or None)     # to fail here, not at a validation
        check_wandb(main_rank and cfg.wandb)
        compiled = world.device.type == "cuda" if cfg.compile is None else cfg.compile
        if saved and saved["step"] >= cfg.steps:
            more = "--steps=N" if "steps" in free else "--steps=N --allow steps"
            return say(f"{found} is finished, {saved['step']} of {cfg.steps} steps: {more} adds, --out= starts another")

    # three nets of one make, all starting as the teacher; with LoRA one net, of which student and critic are adapters
    adapters = ("student", "critic") if cfg.lora_rank else ()

    def build(trainable):
        net = blank(cfg)
        parallel.prepare(net, world, precision=cfg.precision, compile=compiled, trainable=trainable,
                         shapes=2 * (1 + len(adapters)) * len(data.shapes))
        rows = parallel.local_rows(net)
        slots = {name: i for i, name in enumerate(rows)}
        new = {name: rows.pop(name) for name in slots if ".lora." in name}
        with door():
            ckpt.fill(rows, source)
        ckpt.fill(new, lambda name, shape, first, last:
                  initial(name, shape, stream(cfg.seed, "init", 0, slots[name]))[first:last])
        return net

    def learner(role, lr):
        net = teacher if adapters else build(trainable=True)
        rows = {name: r for name, r in parallel.local_rows(net).items() if not adapters or f".lora.{role}." in name}
        opt, opt_rows = adamw(rows, (0.0, 0.999), row.weight_decay)
        return Trained(partial(net, lora=role if adapters else None), rows, opt, opt_rows, lr,
                       parallel.sync(net), partial(parallel.grad_norm, net, rows, world))

    teacher = build(trainable=bool(adapters))
    learners = {"student": learner("student", cfg.student_lr), "critic": learner("critic", cfg.critic_lr)}
    student, critic = learners.values()
    params = [p for p, _, _ in student.rows.values()]
    ema = [p.clone() for p in params]
    state = ({f"net.{n}": r for n, r in student.rows.items()} | {f"opt.{n}": r for n, r in student.state.items()}
             | {f"critic.{n}": r for n, r in critic.rows.items()}
             | {f"critic_opt.{n}": r for n, r in critic.state.items()}
             | {f"ema.{n}": (a, first, shape) for a, (n, (_, first, shape)) in zip(ema, student.rows.items())}
             | {"null": (data.null.clone(), 0, tuple(data.null.shape))})
    start, counts = 0, {"student": 0, "critic": 0, "skipped": 0, "in_a_row": {"student": 0, "critic": 0}}
    if found:
        with door():
            ckpt.load(found, state, rank=world.rank, world=world.size, agree=agree)
        start, counts = saved["step"], saved["meta"]["counts"]

    log = Log(cfg.out, asdict(cfg), step=start, steps=cfg.steps, main=main_rank, wandb=cfg.wandb)
    meta = {"config": asdict(cfg), "inputs": inputs, "base": base, "counts": counts, "sampling": how}

    nets = binder(student.net, critic.net, teacher, own, cfg, world)
    draws = Ahead(partial(draw, data, cfg), {"student": cfg.student_every, "critic": 1})
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):      # finish the step, save, go; asked twice, go at once
        signal.signal(number, lambda number, frame: stop.append(signal.signal(number, signal.SIG_DFL)))
    clock = {"seconds": 0.0, "data_wait": 0.0, "flops": 0.0}    # summed since the last line of the log
    goal = None                                                 # the teacher's clips for the fixed prompts

    for step in range(start, cfg.steps + 1):
        # once in a while: validate, save, stop; a resumed run has done so where it begins
        last, fresh = step == cfg.steps, step > start or step == 0
        if fresh and cfg.samples and (last or due(step, cfg.val_every)):
            with ema_weights(params, ema):
                goal = validate(step, nets, goal, own, data, how, cfg, log, world)
        stopping = not agree(not stop)
        if step > start and (last or stopping or due(step, cfg.save_every)):
            ckpt.save(cfg.out, step, state, meta, rank=world.rank, world=world.size, agree=agree, keep=cfg.keep)
        if last or stopping:
            log.say(f"step {step} of {cfg.steps} is saved in {cfg.out}{'' if last else '; the same command goes on'}")
            break

        # the student now and then; the critic always, on what the student has become
        began, seen = time.perf_counter(), {}
        for role in who(step, cfg.student_every):
            me, exit = learners[role], counts[role] % len(cfg.times)    # the same exit on all ranks, each as often
            waiting = time.perf_counter()
            micros = draws(role, step)
            clock["data_wait"] += time.perf_counter() - waiting
            losses = [partial(loss_of, role, exit, nets, micro, cfg, world.device) for micro in micros]
            lr = lr_at(step, lr=me.lr, warmup=0, decay_steps=cfg.steps, schedule=cfg.schedule)
            measured = train_step(me.opt, losses, lr=lr, clip=row.clip, sync=me.sync, norm=me.norm) | {"lr": lr}
            if measured.pop("skipped"):
                counts["skipped"] += 1
                counts["in_a_row"][role] += 1
                log.say(f"step {step}: the {role}'s gradient norm is {measured['grad_norm']:.3g}, update skipped")
                if counts["in_a_row"][role] == SKIPS:
                    raise RuntimeError(f"{SKIPS} updates in a row were not finite; {cfg.out}/ckpt has the last good one")
            else:
                counts[role] += 1
                counts["in_a_row"][role] = 0
                if role == "student":
                    ema_update(ema, params, cfg.ema, counts["student"])
            clock["flops"] += cfg.batch * cost(role, exit, nets, micros[0], cfg)
            seen |= {f"{role}_{name}": value for name, value in measured.items()}
        clock["seconds"] += time.perf_counter() - began

        # one line, at a step that updated both
        if due(step + 1, cfg.student_every):
            timed = min(cfg.student_every, step + 1 - start)
            seen = unfold(parallel.mean(seen | {name: total / timed for name, total in clock.items()}, world))
            rate = seen.pop("flops") / seen["seconds"] / world.size
            log(step + 1, **seen, skipped=counts["skipped"], student_updates=counts["student"],
                samples_per_s=cfg.batch / seen["seconds"], **log.speed(rate, world.device, cfg.precision))
            clock = dict.fromkeys(clock, 0.0)
    log.close()


def who(step, student_every):
    """Whose update a step holds, in order: the student's every so often, then the critic's, always."""
    return ("student", "critic") if (step + 1) % student_every == 0 else ("critic",)


class Ahead:
    """draws(role, step) -> [Draw], made by a thread while the update before runs; stride: steps between a role's."""

    def __init__(self, draw, stride):
        self.draw, self.stride, self.thread, self.next = draw, stride, ThreadPoolExecutor(1), {}

    def __call__(self, role, step):
        now = self.next.pop((role, step), None) or self.thread.submit(self.draw, role, step)
        self.next[role, step + self.stride[role]] = self.thread.submit(self.draw, role, step + self.stride[role])
        return now.result()


def draw(data, cfg, role, step):
    """This rank's draws for one update -> [Draw], a pure function of role, step and each sample's slot in the batch."""
    sizes = np.array([len(ids) for ids in data.buckets])
    bucket = int(stream(cfg.seed, f"{role}_prompt", step, cfg.batch).choice(len(sizes), p=sizes / sizes.sum()))
    ids, shape, K = data.buckets[bucket], data.shapes[bucket], len(cfg.times)
    u = stratified(cfg.seed, f"{role}_score_t_perm", f"{role}_score_t", step, cfg.batch)

    def noise(purpose, slots):
        return torch.stack([normal(stream(cfg.seed, f"{role}_{purpose}", step, slot), shape) for slot in slots])

    micros = []
    for slots in data.slots:
        some = [int(ids[stream(cfg.seed, f"{role}_prompt", step, slot).integers(len(ids))]) for slot in slots]
        z, e = noise("z", slots), noise("score_noise", slots)
        if cfg.start == "data":
            x0, text = data.sample(some)
            micros.append(Draw(text, data.null, x0, e, u[slots], [z]))
        else:
            noises = [noise("renoise", [slot * K + k for slot in slots]) for k in range(K - 1)]
            micros.append(Draw(data.text(some), data.null, z, e, u[slots], noises))
    return micros


def loss_of(role, exit, nets, micro, cfg, device):
    """The student's or the critic's loss of one micro-batch, on the student's x0 at its sampler's step `exit`."""
    text, null, z, e, u, *noises = (x.to(device, non_blocking=True) for x in (*micro[:5], *micro.noises))
    student, critic, teacher = nets(z.shape)
    t = sample_t(u, "uniform", cfg.score_shift, (0.02, 0.98))
    with torch.set_grad_enabled(role == "student"):
        if cfg.start == "data":     # the clip as it would be on arriving at the exit
            z = add_noise(z, noises[0], torch.full_like(t, cfg.times[exit]))
            x0 = rollout(student, z, text, cfg.times[exit:exit + 1], [], 0)
        else:
            x0 = rollout(student, z, text, cfg.times, noises, exit)
    if role == "critic":
        return flow_loss(critic, x0, text, t, e)
    return dmd_loss(x0, teacher, critic, text, null.expand_as(text), t, e, scale_at(t, cfg), DEFAULTS[cfg.model].rescale)


def scale_at(t, cfg):
    """The teacher's guidance at each t (B,): a scale per sample, or the number 1 where there is none at any t."""
    low, high = cfg.guidance_interval
    return 1 if cfg.guidance == 1 else torch.where((low <= t) & (t <= high), cfg.guidance, 1.0)


def cost(role, exit, nets, micro, cfg):
    """FLOPs of one sample's part in an update, by what the nets need, without recompute."""
    student, critic, _ = nets(micro.z.shape)
    forward = partial(flops, MODELS[cfg.model], micro.z.shape[1:], micro.text.shape[1])
    few, own = (forward(net.keywords["metadata"], net.keywords["dense_ends"]) for net in (student, critic))
    rolled = exit if cfg.start == "noise" else 0        # forwards before the one at the exit
    learning = 2 if cfg.lora_rank else 3                # a forward and its backward, in forwards
    if role == "critic":
        return few * (rolled + 1) + own * learning
    return few * (rolled + learning) + own * (2 + (cfg.guidance != 1))


def binder(student, critic, teacher, own, cfg, world):
    """-> nets(shape) -> the three as the losses see them, net(x_t, t, text), for latents (…, F, H, W).

    The student attends as its flags say; the teacher as its own sampling block does, and the critic, born of it, too.
    """
    @cache
    def sequence(length):
        return LOCAL if world.sp == 1 else Seq(*parallel.ulysses(attention, length, world))

    def nets(shape):
        tokens = token_grid(MODELS[cfg.model], shape)
        seq = sequence(math.prod(tokens))

        def bound(net, tile, window, dense_ends):
            metadata = window and build_metadata(tokens, tuple(tile), tuple(window), device=world.device)
            return partial(net, metadata=metadata, dense_ends=dense_ends, seq=seq)

        return (bound(student, cfg.tile, cfg.window, cfg.dense_ends),
                *(bound(net, own["tile"], own["window"], own["dense_ends"]) for net in (critic, teacher)))

    return nets


def blank(cfg):
    """A net on meta, names and shapes without values; with LoRA the student and the critic are in it."""
    with torch.device("meta"):
        net = DiT(MODELS[cfg.model], remat=cfg.remat)
        for name in ("student", "critic") if cfg.lora_rank else ():
            add_lora(net, name, cfg.lora_rank, cfg.lora_alpha)
    return net


# ---- the door -------------------------------------------------------------------------------------------------------


@contextmanager
def door():
    """Bad input is refused in one line, exit code 2; a bug further on keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"distill.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def resolve(cfg):
    """The teacher's weights (None if a dry run finds none), and the config with None replaced by the defaults.

    ValueError for impossible values.
    """
    planned = cfg.dry_run and cfg.model and not Path(cfg.teacher).exists()
    source = None if planned else ckpt.weights(cfg.teacher)
    own = source and source.manifest and source.manifest["meta"]["sampling"]
    if own is None and cfg.model is None:
        raise ValueError(f"{cfg.teacher} is not a run of ours: give --model, one of {', '.join(MODELS)}")
    if own and cfg.model not in (None, own["model"]):
        raise ValueError(f"--model={cfg.model}, but {cfg.teacher} is {own['model']}")
    if own and "times" in own:
        raise ValueError(f"{cfg.teacher} is itself a few-step student: a teacher predicts velocities at all t")
    cfg = replace(cfg, model=cfg.model or own["model"])
    if own and own["window"] and not cfg.window:    # born of a sparse teacher, the student is as sparse
        cfg = replace(cfg, window=tuple(own["window"]), tile=tuple(own["tile"]), dense_ends=own["dense_ends"])
    if cfg.times and cfg.shift is not None:
        raise ValueError(f"--times are the student's times themselves, --shift={cfg.shift} does not apply")
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    row = DEFAULTS[cfg.model]._asdict()
    cfg = replace(cfg, **{name: row[name] for name in row.keys() & asdict(cfg).keys()} | given)
    for name, low in dict(student_steps=1, steps=1, student_every=1, batch=1, guidance=0, ema=0, val_every=0, save_every=0,
                          keep=1, samples=0, dense_ends=0, lora_rank=0).items():
        if not low <= asdict(cfg)[name] < math.inf:
            raise ValueError(f"--{name}={asdict(cfg)[name]} is not {low} or more")
    for name in ("shift", "score_shift", "student_lr", "critic_lr"):
        if not 0 < asdict(cfg)[name] < math.inf:
            raise ValueError(f"--{name}={asdict(cfg)[name]} is not above 0")
    if cfg.ema >= 1 or cfg.steps < cfg.student_every:
        raise ValueError(f"--ema={cfg.ema} --steps={cfg.steps} --student_every={cfg.student_every}: the student would "
                         "never change")
    times = cfg.times or tuple(grid(cfg.student_steps, cfg.shift))
    cfg = replace(cfg, times=times, student_steps=len(times))
    if cfg.times[0] != 1 or min(cfg.times) <= 0 or any(a <= b for a, b in pairwise(cfg.times)):
        raise ValueError(f"--times {' '.join(map(str, cfg.times))}: they start at 1, noise, and descend, all above 0")
    if not 0 <= cfg.guidance_interval[0] < cfg.guidance_interval[1] <= 1:
        interval = " ".join(map(str, cfg.guidance_interval))
        raise ValueError(f"--guidance_interval {interval}: from a low t to a high one, in [0, 1]")
    if len(cfg.dry_run) > 2 or min(cfg.dry_run, default=1) < 1:
        raise ValueError(f"--dry_run {' '.join(map(str, cfg.dry_run))}: takes a number of ranks, perhaps GB of each")
    if unknown := set(cfg.allow) - set(asdict(cfg)):
        raise ValueError(f"--allow {' '.join(sorted(unknown))}: no such flag")
    if cfg.window is None and cfg.dense_ends:
        raise ValueError("--dense_ends shapes --window, which is not given")
    if cfg.lora_alpha is not None and not (cfg.lora_rank and cfg.lora_alpha > 0):
        raise ValueError(f"--lora_alpha={cfg.lora_alpha} is above 0, and needs --lora_rank")
    if cfg.lora_rank and cfg.lora_alpha is None:
        cfg = replace(cfg, lora_alpha=float(cfg.lora_rank))
    return source, cfg


def fit(cfg, data, source):
    """The sampling blocks of student and teacher, if dataset and teacher fit each other and the model; else ValueError."""
    config, made = MODELS[cfg.model], data.manifest
    if (data.shapes[0][0], made["text"]["width"]) != (config.channels, config.text_dim):
        raise ValueError(f"{cfg.data} has {data.shapes[0][0]} channels and text of width {made['text']['width']}; "
                         f"--model={cfg.model} takes {config.channels} and {config.text_dim}")
    how = source.manifest["meta"]["sampling"] if source.manifest else made | {
        "steps": 50, "shift": cfg.shift, "window": None, "tile": cfg.tile, "dense_ends": 0}
    if how["text"]["length"] != made["text"]["length"]:
        raise ValueError(f"{cfg.data} pads texts to {made['text']['length']} tokens, "
                         f"{cfg.teacher} was trained with {how['text']['length']}")
    if cfg.start == "data" and (not made["mean"] or (how["mean"], how["std"]) != (made["mean"], made["std"])):
        raise ValueError(f"--start=data: {cfg.data} has no latents, or normalises them otherwise than "
                         f"{cfg.teacher}'s dataset did")
    if config.heads % cfg.sp:
        raise ValueError(f"--sp={cfg.sp} does not divide the {config.heads} heads of --model={cfg.model}")
    for shape in data.shapes:
        tokens = token_grid(config, shape)
        if cfg.window:
            build_metadata(tokens, cfg.tile, cfg.window)
    mean, std = (how[name] or made["codec"].get(name) for name in ("mean", "std"))  # of prompts alone: the VAE's own
    if not mean:
        raise ValueError(f"{cfg.data} holds prompts alone, and {cfg.teacher} does not say how to normalise its latents")
    return {"model": cfg.model, "codec": how["codec"], "mean": mean, "std": std, "fps": how["fps"],
            "shapes": data.shapes, "text": how["text"],
            "window": cfg.window, "tile": cfg.tile, "dense_ends": cfg.dense_ends,
            "sampler": "rollout", "times": cfg.times, "shift": cfg.shift, "guidance": 1.0}, how


def plan(cfg, source):
    """Prints what the run takes on the ranks of --dry_run, beside what is there -> exit code, 2 if it does not fit."""
    ranks, *elsewhere = cfg.dry_run
    world = parallel.imagine(ranks, cfg.shard, cfg.sp)
    device = torch.device("cuda") if elsewhere else parallel.pick_device(cfg.device)
    precision = cfg.precision or ("bf16" if device.type == "cuda" else "fp32")
    micro = cfg.micro_batch or max(cfg.batch // world.data_size, 1)
    check_batch(cfg.batch, micro, world.data_size)
    shapes, length = [USUAL[cfg.model][0]], USUAL[cfg.model][1]
    if Path(cfg.data).exists():
        data = Latents(cfg.data, seed=cfg.seed, batch=cfg.batch, micro_batch=micro, world=world.data_size)
        fit(cfg, data, source) if source else None
        shapes, length = data.shapes, data.manifest["text"]["length"]
    net = blank(cfg)
    takes = parallel.memory(net, world, precision)
    if cfg.lora_rank:       # one net, of which two adapters are trained
        teacher, one, gathered = takes["parameters"] - takes["gradients"], takes["gradients"] // 2, takes["gathered"]
    else:
        teacher = parallel.memory(blank(cfg), world, precision, trainable=False)["parameters"]
        one, gathered = takes["gradients"], 2 * takes["gathered"]
    held = {"teacher": teacher, "student and critic": 2 * one, "gradients of one of them": one,
            "their optimizers": 4 * one, "average of the student": one, "gathered copies": gathered}

    def most(shape):
        tokens = math.prod(token_grid(MODELS[cfg.model], shape))
        seq = LOCAL if world.sp == 1 else Seq(*parallel.ulysses(attention, tokens, world))
        bound = partial(net, lora="student" if cfg.lora_rank else None, seq=seq)
        return activations(bound, (micro, *shape), length, precision)[1]

    seen = {f"activations of {micro} x {shape}": most(shape) for shape in shapes}
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad) // (2 if cfg.lora_rank else 1)
    there = (1e9 * elsewhere[0], math.inf) if elsewhere else room(device, ranks, ckpt.nearest(cfg.out))
    ways = {"--remat": not cfg.remat, "a smaller --micro_batch": micro > 1, "--shard=-1": world.mesh.size(1) < ranks,
            "--sp": cfg.sp < ranks, "--lora_rank": not cfg.lora_rank, "more ranks": True}
    title = f"distill.py --model={cfg.model}, ranks: {ranks}"
    return budget(title, held, seen, 28 * trained, cfg.keep + 1, there, ways)


# ---- now and then ---------------------------------------------------------------------------------------------------


def due(step, every):
    return every > 0 and step % every == 0


@torch.no_grad()
def validate(step, nets, goal, own, data, how, cfg, log, world):
    """Shows few-step clips of fixed prompts beside the teacher's (goal, made once) -> goal.

    Also what critic and guided teacher make of them amid the guided noise levels: the x0 whose difference the student
    follows.
    """
    def few_steps(z, text, null, noises):
        student, _, _ = nets(z.shape)
        return rollout(student, z, text, cfg.times, noises, len(cfg.times) - 1)

    def many_steps(z, text, null, noises):
        _, _, teacher = nets(z.shape)
        return euler(teacher, z, text, grid(own["steps"], own["shift"]), null, cfg.guidance)

    drawn, text, captions = clips(few_steps, data, cfg, world)
    goal = clips(many_steps, data, cfg, world)[0] if goal is None else goal
    log(step, **likeness(drawn, goal))

    x0 = drawn[::SEEDS]
    _, critic, teacher = nets(x0.shape)
    e = torch.stack([normal(stream(cfg.seed, "val", 0, i), x0.shape[1:]) for i in range(len(x0))]).to(x0)
    t, null = x0.new_full((len(x0),), sum(cfg.guidance_interval) / 2), data.null.to(x0).expand_as(text)
    x_t = add_noise(x0, e, t)
    f = to_x0(x_t, critic(x_t, t, text), t)
    r, _ = guided_x0(teacher, x_t, t, text, null, scale_at(t, cfg), DEFAULTS[cfg.model].rescale)
    if world.rank == 0:
        show(step, "samples", [x0, goal[::SEEDS]], captions, how, cfg, log, world.device)
        show(step, "inside", [x0, f, r], captions, how, cfg, log, world.device)
    return goal


@torch.no_grad()
def clips(sampler, data, cfg, world):
    """Latents (n, C, F, H, W), normalised, of fixed prompts under SEEDS noises each; the prompts' text; their captions.

    sampler(z, text, null, noises) -> x0. Data ranks sample a part each, equally many: that keeps sharded ranks in step.
    """
    shape = data.shape_of(0)
    ids = list(islice((i for i in range(data.count) if data.shape_of(i) == shape), cfg.samples))
    total = len(ids) * SEEDS
    per_rank = math.ceil(total / world.data_size)
    latents = torch.zeros(per_rank * world.data_size, *shape, device=world.device)
    for places in (torch.arange(per_rank) + world.data_rank * per_rank).split(cfg.micro_batch or 16):
        some = [place % total for place in places.tolist()]
        z, *noises = (torch.stack([normal(stream(cfg.seed, "sample", k, i), shape) for i in some]).to(world.device)
                      for k in range(len(cfg.times)))
        text = data.text([ids[i // SEEDS] for i in some]).to(world.device)
        latents[places] = sampler(z, text, data.null.to(world.device).expand_as(text), noises)
    latents = parallel.mean({"x0": latents}, world)["x0"] * world.data_size     # each rank's part, zeros elsewhere
    return latents[:total], data.text(ids).to(world.device), [data.caption(i) for i in ids]


def likeness(student, teacher):
    """How varied, lively and contrasty the student's clips of the fixed prompts are, as ratios to the teacher's."""
    def diversity(x):
        return torch.stack([torch.pdist(some.flatten(1)).mean() for some in x.split(SEEDS)]).mean()

    def motion(x):
        return x.diff(dim=2).abs().mean()

    figures = dict(diversity=diversity, motion=motion, std=torch.std)
    return {f"val_{name}": of(student) / of(teacher) for name, of in figures.items()}


def show(step, kind, rows, captions, how, cfg, log, device):
    """A video, one row of clips under another; the latents themselves where there is no VAE to decode them."""
    mean, std = (torch.tensor(how[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    latents = torch.cat(rows).cpu() * std + mean
    coder = codec.load(how["codec"], vae=cfg.vae, device=device)
    if not coder.decodes:
        path = log.file(kind, step, "npy")
        np.save(path, latents.numpy())
        return log.say(f"step {step}: latents in {path}, for want of --vae to decode them")
    path = log.file(kind, step, "mp4")
    codec.write_video(path, [coder.decode(z) for z in latents], how["fps"], columns=len(rows[0]))
    log.video(step, path, captions)


if __name__ == "__main__":
    main(tyro.cli(Config))
    parallel.leave()
