"""Distil a video diffusion transformer into a few-step student by distribution matching (DMD2, arXiv 2405.14867).

    python distill.py --teacher=out/train                                       the built-in shapes, on a laptop
    torchrun --nproc_per_node=8 distill.py --teacher=PATH --model=wan-1.3b --data=DIR --shard=-1

    python distill.py --teacher=out/train --student=out/causal                  a causal one: self-forcing

The student's own clips, rolled out from noise and text alone, are re-noised and shown to two nets: the frozen teacher,
with guidance, and a critic that learns by flow matching what the student makes. Their difference is the student's
gradient. No discriminator, no real clips. With --pairs the student first learns where the unguided teacher's ODE leads
from known noise, which keeps its variety. A causal student rolls out chunk by chunk, each after its own clean ones; the
other two see whole clips. The same command again resumes, exactly.
Reads top to bottom: flags, setup in five steps, the loop, the losses, draws, pairs, checkpoints, validation.
Imports model, plan and every leaf but shapes.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width · K student steps
"""
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import ckpt
import codec
import flags
import parallel
import plan
from data import (DTYPES, Ahead, Latents, check_crc32, holds_latents, listed, noise, read_manifest, send, stratified,
                  stream, uniform)
from log import Clock, Log, check_wandb, holds, told
from model import (MODELS, NO_CACHE, Chunked, Cond, Pair, bind, blank, caches, check_begun, check_causal,
                   check_expert, check_first_frame, chunk_of, chunked, cond_of, fits, initial, lengths, models_of,
                   shapes_of)
from signs import signs
from step import (Learner, adamw, add_noise, averaged, copies, dmd_loss, first_given, flow_loss, grid, guided_ode,
                  guided_x0, is_high, lr_at, muon, numbers, over, place, rollout, sample_t, shifted, start_again,
                  start_average, stepwise, to_x0, train_step, trajectory, within)
from store import Writer


@dataclass(frozen=True)
class Config:
    """Distil a few-step student. A flag left None takes its value from DEFAULTS, by model and --student_steps."""

    # what
    teacher: str = "out/train"                            # teacher: a run of train.py, or weights as --init of train.py
    student: str | None = None                            # what the student starts from, a causal run; None = teacher
    model: Literal[tuple(MODELS)] | None = None           # model size of all three nets; None = the teacher run's
    expert: Literal["high", "low"] | None = None          # which of Wan 2.2's two experts to distil: high first
    other: str | None = None                              # for --expert=low: the run of its high student
    data: str = "data/shapes"                             # dataset: a folder that prepare.py wrote; prompts are enough
    out: str = "out/distill"                              # folder of the run: log, curves, samples, checkpoints
    seed: int = 0                                         # random seed

    # the student's sampler
    student_steps: int = 4                                # number of sampling steps K of the student
    shift: float | None = None                            # time shift of the student; 5 gives t 1 .9375 .8333 .625
    times: tuple[float, ...] = ()                         # the student's times, from 1 down; given instead of --shift

    # what it learns from
    guidance: float | None = None                         # the teacher's guidance scale s of u + s (c - u)
    guidance_interval: tuple[float, float] | None = None  # lowest and highest t with guidance (arXiv 2404.07724)
    score_shift: float | None = None                      # time shift of the t at which teacher and critic are asked
    first_frame: float | None = None                      # share of clips begun by a given frame; None = the teacher's

    # before that, and beside it
    pairs: int | None = None                              # clips of the unguided teacher from known noise; 0 = none
    pairs_steps: int | None = None                        # updates of the student on these pairs, before --steps
    anchor: float | None = None                           # weight of the pairs' loss beside distribution matching

    # optimizers
    steps: int | None = None                              # number of critic updates
    student_every: int | None = None                      # critic updates per student update
    batch: int | None = None                              # samples per update of either net, over all ranks
    micro_batch: int | None = None                        # samples a rank forwards at once; None = batch / data ranks
    student_lr: float | None = None                       # learning rate of the student
    critic_lr: float | None = None                        # learning rate of the critic
    schedule: Literal["constant", "cosine", "linear"] | None = None  # shape of both learning rates over the run
    ema: float | None = None                              # decay of the student's average, which samples the videos
    lora_rank: int = 0                                    # LoRA rank of student and critic; 0 trains full copies
    lora_alpha: float | None = None                       # LoRA scale is alpha / rank; None = rank

    # the student's sparse attention; teacher and critic attend as the teacher was trained
    window: tuple[int, int, int] | None = None            # its window in tiles; None = as --student or the teacher has
    tile: tuple[int, int, int] = (4, 4, 8)                # tokens of the student's tile: frames, rows, columns
    dense_ends: int = 0                                   # how many blocks at either end stay dense

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"       # what to run on; auto = cuda where there is a GPU
    precision: Literal["fp32", "bf16"] | None = None      # dtype blocks compute in; None = bf16 on a GPU, else fp32
    shard: int = 1                                        # ranks that share one copy of the weights; -1 = all (FSDP)
    sp: int = 1                                           # ranks that share one sample's tokens (sequence parallel)
    compile: bool | None = None                           # compile the blocks; None = on a GPU
    remat: bool | None = None                             # recompute activations in backward, except attention
    deterministic: bool = False                           # use deterministic GPU kernels only: resume to the bit

    # now and then
    val_every: int | None = None                          # steps between validations, with videos; 0 = only at end
    save_every: int | None = None                         # steps between checkpoints; 0 = only at the end
    keep: int = 3                                         # how many of the newest checkpoints to keep
    samples: int = 4                                      # prompts sampled at each validation, each from 4 noises
    vae: str | None = None                                # Wan VAE that decodes videos; None = latents in .npy

    # the run
    resume: str | None = None                             # checkpoint from which a new --out goes on
    allow: tuple[str, ...] = ()                           # names of flags that may differ from the resumed run's
    wandb: Literal["off", "online", "offline"] = "off"    # send the log to Weights & Biases
    dry_run: tuple[int, ...] = ()                         # plan for this many ranks (and GB per GPU), then exit


# A row per model, and for a student's number of steps; see `row_of`. The last block of each has no flags: edit it here.
# rescale is the share of the contrast added by guidance that is taken back; only matrices are decayed; pairs_… is how
# the student learns from pairs, and the dtype that they are stored in.
TINY = dict(
    steps=1000,
    batch=16,
    student_every=10,
    student_lr=3e-4,
    critic_lr=1e-3,
    schedule="cosine",
    ema=0.95,
    shift=4.0,
    score_shift=4.0,
    guidance=2.0,
    guidance_interval=(0.6, 0.97),
    pairs=0,
    pairs_steps=1000,
    anchor=0.3,
    remat=False,
    val_every=500,
    save_every=500,

    rescale=0.6,
    weight_decay=0.0,
    clip=10,
    pairs_optimizer="adamw",
    pairs_lr=3e-3,
    pairs_betas=(0.9, 0.999),
    pairs_ema=0.99,
    pairs_warmup=20,
    pairs_dtype="fp32",
)
TINY_PAIRS = TINY | dict(
    steps=120,
    student_every=2,
    shift=2.0,
    score_shift=2.0,
    guidance=1.5,
    guidance_interval=(0.0, 1.0),
    pairs=4000,
)
TINY_1 = TINY_PAIRS | dict(
    steps=200,
    student_lr=6e-4,
    score_shift=0.7,
    pairs=12000,
    pairs_steps=2400,

    pairs_optimizer="muon",
    pairs_lr=4e-3,
)
WAN = dict(
    steps=3000,
    batch=64,
    micro_batch=1,
    student_every=5,
    student_lr=2e-6,
    critic_lr=4e-7,
    schedule="constant",
    ema=0.99,
    shift=5.0,
    score_shift=5.0,
    guidance=4.0,
    guidance_interval=(0.0, 1.0),
    pairs=0,
    pairs_steps=3000,
    anchor=0.3,
    remat=True,
    val_every=100,
    save_every=100,

    rescale=0.0,
    weight_decay=0.01,
    clip=10,
    pairs_optimizer="adamw",
    pairs_lr=2e-6,
    pairs_betas=(0.9, 0.999),
    pairs_ema=0.99,
    pairs_warmup=20,
    pairs_dtype="bf16",
)
TINY_CAUSAL = TINY_PAIRS | dict(
    pairs=2000,
    pairs_steps=500,
)
DEFAULTS = {
    "tiny": TINY,
    "tiny K=4": TINY_PAIRS,
    "tiny K=2": TINY_PAIRS,
    "tiny K=1": TINY_1,
    "tiny causal K=4": TINY_CAUSAL,
    "tiny causal K=2": TINY_CAUSAL,
    "wan-1.3b": WAN,
    "wan2.2-5b": WAN,
    "wan-14b": WAN,
    "wan-14b-i2v": WAN,
    "wan2.2-a14b": WAN,
    "wan2.2-a14b-i2v": WAN | dict(guidance=3.5),
}
# flags that may change on resume: they do not alter the run
FREE = {"out", "resume", "allow", "steps", "val_every", "save_every", "keep", "wandb", "micro_batch",
        "shard", "sp", "device", "compile", "remat", "samples", "vae", "dry_run"}
# what a flag was in runs whose config does not have it yet, or must have been where there is none any more
BEFORE = {"deterministic": False, "start": "noise", "first_frame": 0.0, "pairs": 0, "pairs_steps": 0, "anchor": 0.0,
          "expert": None, "other": None, "student": None}
BETAS = (0.0, 0.999)    # of student and critic
ODE_STEPS = 8           # least number of steps in which the teacher makes a pair
PAIRS_LOG = 10          # updates on pairs from one line of the log to the next
USUAL_STEPS = 4         # of the student, for which a model's own row was made
CLAMP = (0.02, 0.98)    # of the t at which teacher and critic are asked
SEEDS = 4               # noises per prompt at validation, to see how far the clips of one prompt differ
CHUNK = 16              # clips sampled at once where no --micro_batch is given


class Draw(NamedTuple):
    """Everything random of one micro-batch."""
    text: torch.Tensor  # (B, S, E)
    null: torch.Tensor  # (S, E) what guidance leads away from
    z: torch.Tensor     # (B, C, F, H, W) where the rollout starts: noise, and the first frames that are given
    free: torch.Tensor | None   # (B, F) 0 in frames that are given, None without --first_frame
    e: torch.Tensor     # (B, C, F, H, W) noise of the score's x_t
    u: torch.Tensor     # (B,) uniforms of the score's t
    noises: list        # K - 1 of (B, C, F, H, W), between the steps of the rollout
    extras: dict        # {name: (B, …)} what an image-to-video model is shown


def main(cfg):
    # 1) refuse what cannot be, before anything is allocated or written
    with flags.door(__file__):
        cfg, world, data, origin = begin(cfg)
        if origin.step > end_of(cfg) or origin.step == end_of(cfg) and validated(cfg, origin.step, world):
            return world.say(finished(cfg, origin))

    # 2) build: three nets of one make; with LoRA student and critic are adapters, of one net where they start alike
    teacher_net = build(cfg, data, world, trainable=cfg.lora_rank > 0)
    student_net = teacher_net if one_net(cfg) else build(cfg, data, world)
    critic_net = teacher_net if cfg.lora_rank else build(cfg, data, world)
    student = learner("student", student_net, optimizer_at(origin.step, cfg, world), cfg, world)
    critic = learner("critic", critic_net, optimizer(cfg), cfg, world)
    student.average = copies(student.rows)

    # 3) values: the teacher's; student's and critic's of this run's checkpoint, new adapters', or the teacher's too
    with flags.door(__file__):
        fill_frozen(teacher_net, student_net, origin, world)
        if origin.path:
            ckpt.load(origin.path, state_of(student, critic, data), **world.ranks)
            student.counts, critic.counts = origin.counts
        elif cfg.lora_rank:
            ckpt.fill(student.rows | critic.rows, new_values(parallel.local_rows(critic_net), cfg.seed), **world.ranks)
            start_average(student)
        else:
            ckpt.fill(student.rows, origin.begins, **world.ranks)
            ckpt.fill(critic.rows, origin.weights, **world.ranks)
            start_average(student)
    origin = origin._replace(weights=None, begins=None)     # closes their files

    # 4) the teacher's pairs, if any, the log, and signals
    nets = partial(bound_nets, student_net, critic_net, (teacher_net, high_net(origin, cfg, world)), origin, cfg, world)
    pairs = pairs_of(nets, data, origin, cfg, world)
    log = Log(cfg.out, asdict(cfg), step=origin.step, steps=end_of(cfg), main=world.main, wandb=cfg.wandb, signs=signs)
    stopped, clock = parallel.stop_requested(world), Clock()

    # 5) the loop
    draws = Ahead(partial(draw, data, cfg), {"student": cfg.student_every, "critic": 1}, world.device)
    exits, clip = exits_of(cfg), row_of(cfg)["clip"]
    goal = []       # the teacher's clips, from the first validation on
    for step in range(origin.step, end_of(cfg) + 1):
        # once in a while: save, then validate; a run killed in between validates when it resumes
        last, stop = step == end_of(cfg), stopped()
        if step > origin.step and (last or stop or due(step, cfg.save_every)):
            meta = about(step, student, critic, cfg, origin)
            state = state_of(student, critic, data)
            ckpt.save(cfg.out, step, state, meta, keep=cfg.keep, report=log.say, **world.ranks)
        if not stop and (last or due(step, cfg.val_every)) and not validated(cfg, step, world):
            with averaged(student):
                validate(step, nets, goal, data, origin, cfg, log, world)
        if last or stop:
            log.say(ended(step, student.counts, cfg))
            break

        # at first the student alone learns the teacher's pairs
        n = step - cfg.pairs_steps
        if n < 0:
            regress(step, student, nets, pairs, origin, cfg, world, clock, log)
            continue

        # the student follows the teacher, now and then
        seen = {}
        if due(n + 1, cfg.student_every):
            with clock("seconds"), ckpt.ending(cfg.out, step):
                exit = exits[student.counts["updates"] % len(exits)]    # the same on all ranks, and each as often
                with clock("data_wait"):
                    micros = draws("student", n)
                losses = [partial(student_loss, nets, micro, exit, cfg) for micro in micros]
                losses = anchored(losses, pairs, n, nets, cfg)
                lr = rate(n, cfg.student_lr, cfg)
                seen |= named("student", train_step(student, losses, lr=lr, clip=clip, ema=cfg.ema))
            clock.add("flops", cfg.batch * student_flops(nets, micros[0], exit, cfg))

        # the critic follows the student, always
        with clock("seconds"), ckpt.ending(cfg.out, step):
            exit = exits[critic.counts["updates"] % len(exits)]
            with clock("data_wait"):
                micros = draws("critic", n)
            losses = [partial(critic_loss, nets, micro, exit, cfg) for micro in micros]
            lr = rate(n, cfg.critic_lr, cfg)
            seen |= named("critic", train_step(critic, losses, lr=lr, clip=clip))
        clock.add("flops", cfg.batch * critic_flops(nets, micros[0], exit, cfg))
        say_skipped(step, student, critic, seen, data, cfg, log)

        # one line, at a step that updated both
        if due(n + 1, cfg.student_every):
            seen |= clock.take(min(cfg.student_every, step + 1 - origin.step))
            log(step + 1, **figures(seen, [student, critic], cfg, world))
        show_first(step, micros[0].z, origin, cfg, world, log)
    log.close()


def regress(step, student, nets, pairs, origin, cfg, world, clock, log):
    """An update of the student on the teacher's pairs: plain flow matching, at the student's own times.

    After the last of them the student is its average, and nothing else of this stage is left.
    """
    row = row_of(cfg)
    with clock("seconds"), ckpt.ending(cfg.out, step):
        with clock("data_wait"):
            micros = pairs(step)
        losses = [partial(pairs_loss, nets, micro, cfg) for micro in micros]
        lr = lr_at(step, lr=row["pairs_lr"], warmup=row["pairs_warmup"], decay_steps=cfg.pairs_steps,
                   schedule="cosine")
        seen = named("pairs", train_step(student, losses, lr=lr, clip=row["clip"], ema=row["pairs_ema"]))
    clock.add("flops", cfg.batch * pairs_flops(nets, micros[0], cfg))
    if student.counts["in_a_row"]:
        log.say(f"step {step}: the student's gradient norm on pairs is {seen['pairs_grad_norm']:.3g}, update skipped")
    if due(step + 1, PAIRS_LOG) or step + 1 == cfg.pairs_steps:
        seen |= clock.take(min(step % PAIRS_LOG, step - origin.step) + 1)
        log(step + 1, **figures(seen, [student], cfg, world))
    if step + 1 == cfg.pairs_steps:
        start_again(student, optimizer(cfg))
    show_first(step, micros[0].e, origin, cfg, world, log)


def pairs_loss(nets, pair, cfg):
    """Flow matching on pairs, by the error of x0: that of the point x_t on the ODE's way is its end.

    A causal student has the pair's own clean chunks for its past.
    """
    student, _, _ = nets(pair.x0.shape)
    if isinstance(student, Chunked):
        student = student.after(pair.x0)
    weight = pair.t.square()
    return flow_loss(student, pair.x0, Cond(pair.text), pair.t, pair.e, weight, pair.free, cfg.times)


def student_loss(nets, micro, exit, cfg):
    """Distribution matching on what the student's sampler gives at its step `exit`, with its graph."""
    student, critic, teacher = nets(micro.z.shape)
    cond, uncond = conds_of(micro)
    x0 = roll(student, cond, micro, exit, cfg)
    t = sample_t(micro.u, "uniform", cfg.score_shift, CLAMP, part_of(cfg))
    rescale = row_of(cfg)["rescale"]
    return dmd_loss(x0, teacher, critic, cond, uncond, t, micro.e, scale_at(t, cfg), rescale, micro.free)


def anchored(losses, pairs, n, nets, cfg):
    """The student's losses of step n, each with that of the teacher's pairs beside it in the weight --anchor.

    anchor_share: what the pairs' gradient on the student's x0 is of both, by their root mean squares.
    """
    def both(loss_of, pair):
        loss, seen = loss_of()
        beside, of_pairs = pairs_loss(nets, pair, cfg)
        anchor = 2 * cfg.anchor * of_pairs["loss"].sqrt()
        matching = (2 * seen["loss"]).sqrt()
        seen |= named("pairs", of_pairs) | {"anchor_share": anchor / (anchor + matching)}
        return loss + cfg.anchor * beside, seen

    if not cfg.anchor:
        return losses
    micros = pairs(cfg.pairs_steps + n // cfg.student_every)
    return [partial(both, loss_of, pair) for loss_of, pair in zip(losses, micros, strict=True)]


def critic_loss(nets, micro, exit, cfg):
    """Flow matching on the student's clips: train.py's own loss."""
    student, critic, _ = nets(micro.z.shape)
    cond, _ = conds_of(micro)
    with torch.no_grad():
        x0 = roll(student, cond, micro, exit, cfg)
    t = sample_t(micro.u, "uniform", cfg.score_shift, CLAMP, part_of(cfg))
    return flow_loss(critic, x0, cond, t, micro.e, free=micro.free)


def roll(student, cond, micro, exit, cfg):
    """The student's clip, predicted at its step `exit`; of a causal one each chunk is (Self Forcing, arXiv 2506.08009).

    A chunk's graph is that of its own forward at `exit`: the chunks before it are seen without gradient.
    """
    def draw(cond, free, z, *noises):
        return rollout(student, z, cond, cfg.times, noises, exit, free)

    if not isinstance(student, Chunked):
        return draw(cond, micro.free, micro.z, *micro.noises)
    return stepwise(draw, student.see, (cond,), student.chunk, micro.z, *micro.noises, free=micro.free)


def conds_of(micro):
    """What the nets are told of a micro-batch's prompts, and what guidance leads away from -> two Cond."""
    cond = cond_of(micro.text, micro.extras)
    return cond, cond._replace(text=micro.null.expand_as(micro.text))


def part_of(cfg):
    """(boundary, expert) of the part of all t that one of two experts has, None where there is one net."""
    return (MODELS[cfg.model].boundary, cfg.expert) if cfg.expert else None


def exits_of(cfg):
    """The steps of the student's sampler after which a rollout may end: of an expert, those that it makes itself."""
    return [k for k, t in enumerate(cfg.times) if is_own(t, cfg)]


def is_own(t, cfg):
    """Whether t is in the part of all t that the expert has, or there is one net."""
    return not cfg.expert or is_high(t, MODELS[cfg.model].boundary) == (cfg.expert == "high")


def scale_at(t, cfg):
    """The teacher's guidance at each t (B,), or None where there is none at any t."""
    low, high = cfg.guidance_interval
    if cfg.guidance == 1:
        return None
    return torch.where((low <= t) & (t <= high), cfg.guidance, 1.0)


def student_flops(nets, micro, exit, cfg):
    """FLOPs of one sample's part in a student update, by what the nets need, without recompute."""
    graphs = 2 if cfg.anchor else 1
    scores = 2 if cfg.guidance == 1 else 3      # forwards of critic and teacher
    return flops_of(nets, micro, exit + graphs * (learning(cfg) + sees(micro.z, cfg)), scores)


def critic_flops(nets, micro, exit, cfg):
    """The same of a critic update."""
    return flops_of(nets, micro, exit + 1 + sees(micro.z, cfg), learning(cfg))


def pairs_flops(nets, pair, cfg):
    """The same of an update on pairs."""
    student, _, _ = nets(pair.x0.shape)
    forward = student.flops(pair.x0.shape[1:], pair.text.shape[1], times_of(pair.free))
    return forward * (learning(cfg) + sees(pair.x0, cfg))


def flops_of(nets, micro, students, critics):
    """Of so many forwards of the student and of the critic."""
    student, critic, _ = nets(micro.z.shape)
    sizes = micro.z.shape[1:], micro.text.shape[1], times_of(micro.free)
    return students * student.flops(*sizes) + critics * critic.flops(*sizes)


def times_of(free):
    """How many t a net is told of a clip: one, or one for each frame."""
    return 1 if free is None else free.shape[1]


def learning(cfg):
    """Forwards that one and its backward take."""
    return 2 if cfg.lora_rank else 3


def sees(x0, cfg):
    """The share of its frames that a causal student sees clean, in forwards of their own: all but the last chunk's."""
    frames, chunk = x0.shape[2], cfg.tile[0]
    return (frames - 1) // chunk * chunk / frames if causal(cfg) else 0


def bound_nets(student, critic, frozen, origin, cfg, world, shape):
    """The three nets as the losses see them, for latents (…, F, H, W) -> (student, critic, teacher), each a Bound.

    A causal student is a model.Chunked. It attends as its flags say, the teacher as it was trained, and so does the
    critic, its copy. Where the expert for low noise is distilled, the student is a Pair, in whose rollouts `high` makes
    the first steps.
    """
    (teacher, high), teacher_sampling = frozen, origin.teacher_sampling
    adapters = ("student", "critic") if cfg.lora_rank else (None, None)
    full = [teacher_sampling[name] for name in ("window", "tile", "dense_ends")]
    if causal(cfg):
        few = chunked(student, shape, world, cfg.window, cfg.tile, adapters[0])
    else:
        few = bind(student, shape, world, cfg.window, cfg.tile, cfg.dense_ends, adapters[0])
    if high is not None:
        told = [origin.high.sampling[name] for name in ("window", "tile", "dense_ends")]
        few = Pair(bind(high, shape, world, *told), few, MODELS[cfg.model].boundary)
    return (
        few,
        bind(critic, shape, world, *full, adapters[1]),
        bind(teacher, shape, world, *full),
    )


def rate(n, lr, cfg):
    """The learning rate n critic updates after the start."""
    return lr_at(n, lr=lr, warmup=0, decay_steps=cfg.steps, schedule=cfg.schedule)


def named(role, seen):
    return {f"{role}_{name}": value for name, value in seen.items()}


def say_skipped(step, student, critic, seen, data, cfg, log):
    """A line for an update that was not finite, with the samples of all ranks whose prompts it took."""
    for role, me in (("student", student), ("critic", critic)):
        norm = seen.get(f"{role}_grad_norm")
        if norm is not None and me.counts["in_a_row"]:
            _, ids = prompts(data, cfg, role, step - cfg.pairs_steps)
            log.say(f"step {step}: the {role}'s gradient norm is {norm:.3g}, update skipped; samples {ids}")


def figures(seen, learners, cfg, world):
    """What a line of the log holds: measurements over all ranks, speed."""
    seen = numbers(parallel.mean(seen, world))
    flops_per_s = seen.pop("flops") / seen["seconds"] / world.size
    return seen | {
        "skipped": sum(me.counts["skipped"] for me in learners),
        "student_updates": learners[0].counts["updates"],
        "samples_per_s": cfg.batch / seen["seconds"],
        **Log.speed(flops_per_s, world.device, cfg.precision),
    }


def due(step, every):
    return every > 0 and step % every == 0


# ---- draws ----------------------------------------------------------------------------------------------------------


def draw(data, cfg, role, step):
    """This rank's draws for one update -> [Draw], a pure function of role, step and each sample's slot in the batch."""
    bucket, ids = prompts(data, cfg, role, step)
    shape = data.shapes[bucket]
    K = len(cfg.times)
    u = stratified(cfg.seed, f"{role}_score_t_perm", f"{role}_score_t", step, cfg.batch)
    micros = []
    for slots in data.slots:
        some = [ids[slot] for slot in slots]
        z, free = noise(cfg.seed, f"{role}_z", step, slots, shape), None
        if cfg.first_frame:
            z, free = begun(z, some, given_at(cfg, role, step, slots), data)
        e = noise(cfg.seed, f"{role}_score_noise", step, slots, shape)
        noises = []
        for k in range(K - 1):
            noises.append(noise(cfg.seed, f"{role}_renoise", step, [slot * K + k for slot in slots], shape))
        micros.append(Draw(data.text(some), data.null, z, free, e, u[slots], noises, data.extras(some)))
    return micros


def given_at(cfg, role, step, slots):
    """Which clips of these slots begin with a given frame: (B,)."""
    return uniform(cfg.seed, f"{role}_give", step, slots) < cfg.first_frame


def begun(z, ids, give, data):
    """Noise z that begins with the first frame of these samples where give (B,) is true, and its free."""
    free = first_given(z, give)
    x0, _ = data.sample(ids)
    return place(z, x0, free), free


def prompts(data, cfg, role, step):
    """The bucket of an update and the samples whose prompts its global batch takes -> (bucket, [id])."""
    # the slot after the last draws the bucket
    bucket = drawn_bucket(data, stream(cfg.seed, f"{role}_prompt", step, cfg.batch))
    ids = []
    for slot in range(cfg.batch):
        ids.append(int(stream(cfg.seed, f"{role}_prompt", step, slot).choice(data.buckets[bucket])))
    return bucket, ids


def drawn_bucket(data, rng):
    """A bucket, each as likely as it has samples."""
    sizes = np.array([len(ids) for ids in data.buckets])
    return int(rng.choice(len(sizes), p=sizes / sizes.sum()))


# ---- pairs ----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Clips of the teacher, and points on the way to them from their noise, as the student takes them at once."""
    x0: torch.Tensor    # (B, C, F, H, W) where the teacher's ODE ends
    e: torch.Tensor     # (B, C, F, H, W) the noise that takes x0 to the point: where the ODE began, for t = 1
    t: torch.Tensor     # (B,) of the student's times, that of the point
    text: torch.Tensor  # (B, S, E)
    free: torch.Tensor | None   # (B, F) 0 in frames that are given, None without --first_frame


def pairs_of(nets, data, origin, cfg, world):
    """-> function of a step that gives this rank's [Point] on the device; None where the run needs none any more.

    They are made first, where out/pairs does not hold them yet.
    """
    if not cfg.anchor and origin.step >= cfg.pairs_steps:
        return None
    with flags.door(__file__):
        folder = make_pairs(nets, data, origin, cfg, world)
        stored = latents_of(folder, cfg, world)
    number = np.array([stored.folders[0].said(id)["source"] for id in range(stored.count)])
    ids = [some[np.argsort(number[some])] for some in stored.buckets]   # in one order, whichever ranks made them
    draws = Ahead(partial(draw_pairs, stored, number, ids, cfg), {"pairs": 1}, world.device)
    return partial(draws, "pairs")


def draw_pairs(stored, number, ids, cfg, role, step):
    """This rank's pairs for one update, each at one of the student's times -> [Point], a pure function of the step."""
    bucket, positions = stored.order.at(step)
    u = stratified(cfg.seed, "t_perm", "t", step, cfg.batch)
    K = len(cfg.times)
    pairs = []
    for slots in stored.slots:
        some = ids[bucket][positions[slots]].tolist()
        latents, text = stored.sample(some)
        x0, *points = latents.chunk(K, 1)
        places, free = number[some].tolist(), None
        z = noise(cfg.seed, "pair", 0, places, x0.shape[1:])
        if cfg.first_frame:
            free = first_given(x0, given_at(cfg, "pair", 0, places))
        which = (u[slots] * K).long()
        x_t = torch.stack([z, *points], 1)[torch.arange(len(some)), which]
        t = torch.tensor(cfg.times)[which]
        e = (x_t - over(1 - t) * x0) / over(t)
        pairs.append(Point(x0.contiguous(), e, t, text, free))
    return pairs


def make_pairs(nets, data, origin, cfg, world):
    """Makes --pairs clips of the unguided teacher by an ODE of second order -> their folder, a dataset, out/pairs.

    A causal student's are made by itself as it begins, chunk by chunk: its teacher's clips are not of such a past.
    A sample has the channels of the clip and of the points of its way at times[1:], all normalised. Its source is its
    number, of which its noise, its bucket, its prompt and whether its first frame is given are functions. Made once, by
    all ranks; killed, it goes on.
    """
    folder, spec, times = Path(cfg.out) / "pairs", pairs_spec(data, origin, cfg), ode_times(cfg)
    agree = world.ranks["agree"]
    chunk = cfg.micro_batch or CHUNK
    if parallel.agree(finished_with(folder, spec), world):
        return folder
    if causal(cfg) and origin.step:
        raise ValueError(f"{folder} does not hold the pairs whole, which {cfg.student} made before step 0: copy them "
                         "from where they are, or --out= starts another run")
    with ckpt.together(agree, folder):
        writer = Writer(folder, spec, world.rank)
    drawn = [pair_prompt(data, cfg, number) for number in range(cfg.pairs)]
    left = [number for number in range(cfg.pairs) if str(number) not in writer.done]
    world.say(f"{len(left)} of {cfg.pairs} pairs of the teacher to be made, in {len(times)} steps each -> {folder}")
    for bucket, shape in enumerate(data.shapes):
        student, _, teacher = nets(shape)
        maker = student if causal(cfg) else teacher
        todo = [number for number in left if drawn[number][0] == bucket]
        mine = parallel.share(len(todo), world)     # as many on all ranks, for sharded ones forward in step
        for i in range(0, len(mine), chunk):
            some = [todo[place] for place, _ in mine[i:i + chunk]]
            prompts = [drawn[number][1] for number in some]
            z, free = noise(cfg.seed, "pair", 0, some, shape), None
            if cfg.first_frame:
                z, free = begun(z, prompts, given_at(cfg, "pair", 0, some), data)
            z, free, text = send((z, free, data.text(prompts)), world.device)
            points = dict(zip([*times[1:], 0.0], way(maker, z, Cond(text), times, free)))
            made = torch.cat([points[t] for t in (0.0, *cfg.times[1:])], 1).cpu()
            for latent, number, prompt, (_, counts) in zip(made, some, prompts, mine[i:i + chunk]):
                if counts and world.rank % world.sp == 0:
                    at, id = data.find(prompt)
                    writer.add(latent, at.text(id), caption=at.caption(id), source=number, key=str(number))
    with ckpt.together(agree, folder):
        writer.save()
    with ckpt.together(agree, folder):
        if world.main:
            channels = len(cfg.times) * data.shapes[0][0]
            writer.finish(data.folders[0].null(), [0.0] * channels, [1.0] * channels)
    return folder


@torch.no_grad()
def way(net, z, cond, times, free):
    """The points of a net's ODE from noise z, without guidance, at times[1:] and at 0 -> [x like z]."""
    if not isinstance(net, Chunked):
        return list(trajectory(net, z, cond, times, solver="ab2", free=free))
    ways = []

    def draw(cond, free, z):
        ways.append(list(trajectory(net, z, cond, times, solver="ab2", free=free)))
        return ways[-1][-1]

    stepwise(draw, net.see, (cond,), net.chunk, z, free=free)
    return [torch.cat(chunks, 2) for chunks in zip(*ways)]


def pairs_spec(data, origin, cfg):
    """What pairs are made of: a folder that was begun with other settings is refused."""
    made, maker = data.manifest, {"teacher": origin.base["crc32"]}
    if causal(cfg):
        maker = {"teacher": origin.inputs["student"], "window": list(cfg.window), "tile": list(cfg.tile)}
    if cfg.first_frame:
        maker["first_frame"] = cfg.first_frame
    return {
        "codec": {
            "name": "pairs",
            **maker,
            "data": data.content,
            "seed": cfg.seed,
            "pairs": cfg.pairs,
            "times": list(cfg.times),
            "ode": ode_times(cfg),
            "text_width": made["text"]["width"],
            "text_length": made["text"]["length"],
        },
        "fps": made["fps"],
        "dtype": row_of(cfg)["pairs_dtype"],
    }


def to_make(cfg):
    """The run's pairs as its plan counts them, or None."""
    if not cfg.pairs:
        return None
    dtype = DTYPES[row_of(cfg)["pairs_dtype"]]
    return plan.Pairs(cfg.pairs, len(cfg.times), len(ode_times(cfg)), dtype.itemsize)


def finished_with(folder, spec):
    """Whether a folder holds a whole dataset of these settings; a Writer mends what it can of a damaged one."""
    with suppress(FileNotFoundError, ValueError):
        manifest = read_manifest(folder)
        check_crc32(folder, listed(manifest, "captions.jsonl"), manifest)
        return manifest["codec"] == spec["codec"]
    return False


def ode_times(cfg):
    """The times at which a pair's ODE is solved: the student's, and those of a grid of ODE_STEPS steps or more.

    The grid's points that are next to one of the student's are left out: the step after a very short one would carry v
    too far.
    """
    n = math.ceil(ODE_STEPS / len(cfg.times)) * len(cfg.times)
    own = [shifted(t, 1 / cfg.shift) for t in cfg.times]
    times = list(cfg.times)
    for i in range(1, n + 1):
        if min(abs(i / n - u) for u in own) > 0.25 / n:
            times.append(shifted(i / n, cfg.shift))
    return sorted(times, reverse=True)


def pair_prompt(data, cfg, number):
    """-> (bucket, id of the sample whose prompt it takes) of a pair."""
    rng = stream(cfg.seed, "pair_prompt", number)
    bucket = drawn_bucket(data, rng)
    return bucket, int(rng.choice(data.buckets[bucket]))


# ---- setup ----------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What a run goes on from, and what it is made of."""
    path: Path | None               # the checkpoint
    step: int
    counts: tuple | None            # of student and critic
    weights: ckpt.Source | None     # of the teacher
    begins: ckpt.Source | None      # of the student at the start: --student's, or the teacher's
    base: dict                      # where these are, and their CRC32
    inputs: dict                    # {flag: CRC32 of what it names}: what has moved is known again
    teacher_sampling: dict          # sampling block of the teacher
    student_sampling: dict          # and of the student
    high: ckpt.Source | None        # of --other


def begin(cfg):
    """The resolved config, the ranks, the dataset and the run's Origin; errors for what cannot be, or exits."""
    cfg = resolve(cfg)
    takes = dict(optimizer=optimizer(cfg), learners=2, teacher=True, graphs=2 if cfg.anchor else 1)
    if cfg.dry_run:
        raise SystemExit(plan.dry_run(__file__, cfg, adapters(cfg), **takes, pairs=to_make(cfg)))
    world = parallel.init(cfg.device, cfg.shard, cfg.sp, cfg.precision, cfg.compile, cfg.deterministic)
    cfg = replace(cfg, precision=world.precision)
    data = latents_of(cfg.data, cfg, world)
    weights = ckpt.weights(cfg.teacher, expert=cfg.expert, **world.ranks)
    teacher_sampling, student_sampling = samplings(cfg, data, weights)
    if cfg.first_frame:     # first frames are normalised as the teacher knows them
        data.mean, data.std = codec.moments(student_sampling)
    codec.load(teacher_sampling["codec"], vae=cfg.vae if world.main else None)  # a wrong --vae fails here
    check_wandb(cfg.wandb if world.main else "off")
    told(cfg.out)       # damaged, it fails here
    plan.start(cfg, world, adapters(cfg), data, **takes)

    ckpt.match(shapes_of(cfg.model), weights.shapes, weights.origin, models_of)
    base = ckpt.base_of(cfg.teacher, weights, cfg.expert)
    inputs = {"data": data.content, "teacher": base["crc32"]}
    begins = weights
    if cfg.student:
        begins = ckpt.weights(cfg.student, **world.ranks)
        ckpt.match(shapes_of(cfg.model), begins.shapes, begins.origin, models_of)
        inputs["student"] = ckpt.fingerprint(begins)
    high = None
    if cfg.other:
        high = ckpt.weights(cfg.other, **world.ranks)
        check_high(high, cfg)
        inputs["other"] = ckpt.fingerprint(high)
    pattern = cfg.window, cfg.tile
    if causal(cfg) and not all(caches(MODELS[cfg.model], shape, *pattern, cfg.sp) for shape in data.shapes):
        world.say(NO_CACHE)
    path = ckpt.newest(cfg.out, cfg.resume, report=world.say, **world.ranks)
    step, counts = 0, None
    if path:
        saved = ckpt.read_manifest(path)
        ckpt.differences(path, saved, asdict(cfg), inputs, may_change(cfg), BEFORE)
        step, counts = saved["step"], counts_of(saved)
    if row_steps(cfg) != cfg.student_steps:
        kind = " of a causal student" if causal(cfg) else ""
        world.say(f"--model={cfg.model} has no row of defaults for {cfg.student_steps} steps{kind}: "
                  f"those of {row_steps(cfg)} are taken")
    ckpt.claim(cfg.out, **world.ranks)
    if ckpt.newest(cfg.out, cfg.resume, report=lambda text: None, **world.ranks) != path:
        raise ValueError(f"--out={cfg.out} was in use until now and has gone on: the same command goes on from there")
    origin = Origin(path, step, counts, weights, begins, base, inputs, teacher_sampling, student_sampling, high)
    return cfg, world, data, origin


def latents_of(path, cfg, world):
    """A dataset, in batches of this run over its ranks."""
    return Latents(
        path,
        seed=cfg.seed,
        batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        rank=world.data_rank,
        world=world.data_size,
        device=world.device,
    )


def resolve(cfg):
    """The config with each None filled, from the run that goes on or the model's row; ValueError for the impossible."""
    cfg = inherit(cfg)
    check_expert(cfg.model, cfg.expert)
    check_first_frame(cfg.model, cfg.first_frame)
    check_causal(cfg.model, cfg.window, cfg.dense_ends)
    if cfg.expert and cfg.student:
        raise ValueError(f"--student={cfg.student} does not apply to --expert={cfg.expert}: an expert's student starts "
                         "from its teacher")
    if (cfg.expert == "low") != (cfg.other is not None):
        raise ValueError(f"--expert={cfg.expert} --other={cfg.other}: the expert for high noise is distilled first and "
                         "alone, then that for low with --other=RUN, the high student's, which begins its rollouts")
    if cfg.times and cfg.shift is not None:
        raise ValueError(f"--times are the student's times themselves, --shift={cfg.shift} does not apply")
    if cfg.times:
        cfg = replace(cfg, student_steps=len(cfg.times))
    flags.at_least(cfg, 1, "student_steps")
    given, row = cfg, row_of(cfg)
    saved = ckpt.flags_of(cfg.out, cfg.resume)
    if saved:
        saved = BEFORE | saved
    kept = {*row, "precision", "lora_alpha"} - set(cfg.allow)
    if not cfg.lora_rank:
        kept -= {"lora_alpha"}      # the rank is what differs, and is named
    cfg = flags.filled(cfg, {name: saved.get(name) for name in kept}, row)
    cfg = replace(cfg, lora_alpha=flags.lora_alpha(cfg))
    flags.at_least(cfg, 0, "guidance", "ema", "val_every", "save_every", "samples", "dense_ends", "lora_rank",
                   "pairs", "pairs_steps", "anchor")
    flags.at_least(cfg, 1, "student_every", "batch", "keep")
    flags.above(cfg, 0, "shift", "score_shift", "student_lr", "critic_lr")
    flags.check_run(cfg)
    for name in ("pairs_steps", "anchor"):
        if getattr(given, name) and not cfg.pairs:
            raise ValueError(f"--{name}={getattr(given, name)} needs pairs of the teacher: --pairs=N makes N")
    if not cfg.pairs:
        cfg = replace(cfg, pairs_steps=0, anchor=0.0)
    elif not cfg.pairs_steps and not cfg.anchor:
        raise ValueError(f"--pairs={cfg.pairs}, but --pairs_steps and --anchor are 0: nothing learns from them")
    elif causal(cfg) and not cfg.student:
        raise ValueError(f"--pairs={cfg.pairs}: a causal student's are made by the causal net that it starts from, "
                         "which --student=RUN names")
    elif cfg.expert or MODELS[cfg.model].image:
        raise ValueError(f"--pairs={cfg.pairs}: pairs come from one net that is told texts alone, {cfg.model} is "
                         "another")
    flags.at_least(cfg, int(not cfg.pairs_steps), "steps")
    if cfg.ema >= 1 or cfg.steps < cfg.student_every and not cfg.pairs_steps:
        raise ValueError(f"--ema={cfg.ema} --steps={cfg.steps} --student_every={cfg.student_every}: the student would "
                         "never change")
    times = cfg.times
    if not times:
        times = tuple(grid(cfg.student_steps, cfg.shift))
    if times[0] != 1 or min(times) <= 0 or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"--times {' '.join(map(str, times))}: they start at 1, noise, and descend, all above 0")
    if not exits_of(replace(cfg, times=times)):
        raise ValueError(f"--expert={cfg.expert}: none of the student's times {' '.join(f'{t:.4g}' for t in times)} is "
                         f"its own, they lie on the other's side of {MODELS[cfg.model].boundary}")
    if not 0 <= cfg.guidance_interval[0] < cfg.guidance_interval[1] <= 1:
        interval = " ".join(map(str, cfg.guidance_interval))
        raise ValueError(f"--guidance_interval {interval}: from a low t to a high one, in [0, 1]")
    if cfg.window is None and cfg.dense_ends:
        raise ValueError("--dense_ends shapes --window, which is not given")
    return replace(cfg, times=times, student_steps=len(times))


def row_of(cfg):
    """The row of defaults: of the student's number of steps, or the next larger one, else the model's own."""
    return rows_of(cfg).get(row_steps(cfg), DEFAULTS[cfg.model])


def row_steps(cfg):
    """The student's number of steps for which its row of defaults was made."""
    return min((K for K in rows_of(cfg) if K >= cfg.student_steps), default=USUAL_STEPS)


def rows_of(cfg):
    """{number of steps: row} of a student that learns pairs, which a causal one does where --student says from what."""
    if cfg.pairs == 0 or causal(cfg) and not cfg.student:
        return {}
    kind = f"{cfg.model} causal" if causal(cfg) else cfg.model
    names = {K: f"{kind} K={K}" for K in range(1, USUAL_STEPS + 1)}
    return {K: DEFAULTS[name] for K, name in names.items() if name in DEFAULTS}


def causal(cfg):
    return chunk_of(cfg.window, cfg.tile) is not None


def inherit(cfg):
    """The config with what a teacher of ours decides: the model's size, and unless they are given the student's window
    and the share of first frames. The window is that of --student, where that is a run of ours too.
    """
    sampling = ckpt.sampling_of(cfg.teacher)
    own = ckpt.sampling_of(cfg.student) if cfg.student else None
    begins = sampling if own is None else own
    if sampling is None and cfg.model is None:
        raise ValueError(f"{cfg.teacher} is not a run of ours: give --model, one of {', '.join(MODELS)}")
    for path, its in ((cfg.teacher, sampling), (f"--student={cfg.student}", begins)):
        if its and "times" in its:
            raise ValueError(f"{path} is itself a few-step student: wanted is one that predicts velocities at all t")
    known = {"first_frame": 0.0}
    if sampling is not None:
        if cfg.model not in (None, sampling["model"]):
            raise ValueError(f"--model={cfg.model}, but {cfg.teacher} is {sampling['model']}")
        # of old checkpoints: they lack both
        known = {"first_frame": sampling.get("first_frame", 0.0), "expert": sampling.get("expert")}
        if cfg.first_frame and not known["first_frame"]:
            raise ValueError(f"--first_frame={cfg.first_frame}, but {cfg.teacher} was trained without: train.py "
                             "--first_frame first")
        cfg = replace(cfg, model=sampling["model"])
    cfg = flags.filled(cfg, {}, known)
    if begins is None:
        return cfg
    if own is not None and cfg.first_frame:
        check_begun(own, f"--first_frame={cfg.first_frame}", f"--student={cfg.student}")
    if begins["model"] != cfg.model:
        raise ValueError(f"--student={cfg.student} is {begins['model']}, the teacher is {cfg.model}")
    if begins["window"] and not cfg.window:
        window, tile = tuple(begins["window"]), tuple(begins["tile"])
        cfg = replace(cfg, window=window, tile=tile, dense_ends=begins["dense_ends"])
    return cfg


def samplings(cfg, data, weights):
    """The sampling blocks of teacher and student; ValueError unless dataset, teacher and model fit each other."""
    made = data.manifest
    width = made["text"]["width"]
    fits(cfg.model, width, data.shapes, data.extra_shapes(), cfg.sp, cfg.window, cfg.tile)
    if cfg.first_frame and (not holds_latents(made) or all(shape[1] == 1 for shape in data.shapes)):
        held = "stills" if holds_latents(made) else "prompts"
        raise ValueError(f"--first_frame={cfg.first_frame} takes first frames of clips, and {cfg.data} holds {held} "
                         "alone: give --data of clips, or --first_frame=0")
    teacher = weights.sampling or ckpt.sampling_of(cfg.teacher)
    if teacher is None:
        teacher = made | {
            "window": None,
            "tile": cfg.tile,
            "dense_ends": 0,
            "steps": 50,
            "shift": cfg.shift,
            "guidance": row_of(cfg)["guidance"],
        }
    if teacher["text"]["length"] != made["text"]["length"]:
        raise ValueError(f"{cfg.data} pads texts to {made['text']['length']} tokens, "
                         f"{cfg.teacher} was trained with {teacher['text']['length']}")
    begins = ckpt.sampling_of(cfg.student) if cfg.student else None
    for name in ("mean", "std"):
        if begins and teacher[name] and begins[name] != teacher[name]:
            raise ValueError(f"--student={cfg.student} was trained on latents normalised otherwise than those of "
                             f"{cfg.teacher}, their {name} is another: train.py --data of the teacher's dataset first")
    # A dataset of prompts alone has no statistics of latents: the VAE's own are taken.
    mean, std = teacher["mean"], teacher["std"]
    if not mean:
        mean, std = made["codec"].get("mean"), made["codec"].get("std")
    if not mean:
        raise ValueError(f"{cfg.data} holds prompts alone, and {cfg.teacher} does not say how to normalise its latents")
    student = {
        "model": cfg.model,
        "codec": teacher["codec"],
        "mean": mean,
        "std": std,
        "fps": teacher["fps"],
        "shapes": data.commonest_shapes(),
        "text": teacher["text"],
        "window": cfg.window,
        "tile": cfg.tile,
        "dense_ends": cfg.dense_ends,
        "sampler": "rollout",
        "times": cfg.times,
        "shift": cfg.shift,
        "guidance": 1.0,
        "first_frame": cfg.first_frame,
    }
    if cfg.expert:
        student |= {"expert": cfg.expert, "boundary": MODELS[cfg.model].boundary}
    return teacher, student


def check_high(high, cfg):
    """ValueError unless a Source is of the high student that goes before: of the same model, times and boundary."""
    sampling = high.sampling
    if sampling is None or sampling.get("expert") != "high" or "times" not in sampling:
        raise ValueError(f"--other={cfg.other} is no run that distilled the expert for high noise")
    found = [sampling["model"], sampling["boundary"], *sampling["times"]]
    wanted = [cfg.model, MODELS[cfg.model].boundary, *cfg.times]
    if found != wanted:
        raise ValueError(f"--other={cfg.other} is of model, boundary and times {' '.join(map(str, found))}; this run "
                         f"is of {' '.join(map(str, wanted))}: the two experts sample together")


def high_net(origin, cfg, world):
    """The frozen net of --other, None where the student makes all steps of its rollouts."""
    if origin.high is None:
        return None
    fill = partial(ckpt.fill, source=origin.high)
    shapes = 2 * len(origin.student_sampling["shapes"])
    with flags.door(__file__):
        return parallel.frozen(blank(cfg.model), world, fill, shapes)


def adapters(cfg):
    """{name: (rank, alpha)} of the two adapters that are trained, {} where two nets are."""
    return dict.fromkeys(("student", "critic"), (cfg.lora_rank, cfg.lora_alpha)) if cfg.lora_rank else {}


def optimizer(cfg):
    """-> function of rows: their optimizer, and the rows of its state."""
    return partial(adamw, betas=BETAS, weight_decay=row_of(cfg)["weight_decay"])


def optimizer_at(step, cfg, world):
    """The same of the student, which has another while it learns from pairs alone."""
    row = row_of(cfg)
    if step >= cfg.pairs_steps:
        return optimizer(cfg)
    given = dict(betas=row["pairs_betas"], weight_decay=row["weight_decay"])
    if row["pairs_optimizer"] == "muon":
        return partial(muon, gather=parallel.gatherer(world), **given)
    return partial(adamw, **given)


def build(cfg, data, world, trainable=True):
    """A net of the teacher's make, over the ranks and compiled, its values still to be filled."""
    lora = adapters(cfg)
    net = blank(cfg.model, cfg.remat, lora)
    ways = 2 * (1 + len(lora)) * len(data.shapes)   # a block's: dense or sparse, by the base or with an adapter
    for shape in data.shapes:
        ways += lengths(net.config, shape, cfg.window, cfg.tile, sp=cfg.sp)
    if cfg.first_frame:
        ways *= 2                   # with a t per frame, and per clip
    parallel.prepare(net, world, trainable=trainable, shapes=ways)
    return net


def one_net(cfg):
    """Whether student and critic are adapters of the teacher itself."""
    return cfg.lora_rank > 0 and cfg.student is None


def fill_frozen(teacher_net, student_net, origin, world):
    """The teacher's values, and those that an adapter of a student of its own adapts."""
    ckpt.fill(parallel.local_rows(teacher_net, trained=False), origin.weights, **world.ranks)
    frozen = parallel.local_rows(student_net, trained=False)
    if frozen and student_net is not teacher_net:
        ckpt.fill(frozen, origin.begins, **world.ranks)


def learner(role, net, optimizer, cfg, world):
    """A whole net, or its adapter called `role`, and its optimizer, as train_step takes it."""
    rows = parallel.local_rows(net, trained=True)
    if cfg.lora_rank:
        rows = {name: part for name, part in rows.items() if f".lora.{role}." in name}
    opt, opt_rows = optimizer(rows)
    return Learner(rows, opt, opt_rows, parallel.sync(net), parallel.norm(net, rows, world))


def new_values(rows, seed):
    """-> function for ckpt.fill: initial values, each parameter's from a stream of its own."""
    slots = {name: slot for slot, name in enumerate(rows)}

    def value(name, shape, first, last):
        return initial(name, shape, stream(seed, "init", 0, slots[name]))[first:last]

    return value


def may_change(cfg):
    """Flags that may change on resume; not --steps where the learning rates fall to 0 at the last one."""
    names = FREE if cfg.schedule == "constant" else FREE - {"steps"}
    return names | set(cfg.allow)


def validated(cfg, step, world):
    """Whether there is nothing to validate at this step, or the log holds a number with which validation ends."""
    done = not cfg.samples or not world.main or holds(cfg.out, step, "val_std")
    return parallel.agree(done, world)


def end_of(cfg):
    """The run's last step."""
    return cfg.pairs_steps + cfg.steps


def state_of(student, critic, data):
    """What a checkpoint holds: never the teacher."""
    return ckpt.roles(
        net=student.rows,
        opt=student.opt_rows,
        ema=student.average,
        critic=critic.rows,
        critic_opt=critic.opt_rows,
        null=parallel.whole(data.null),
    )


def ended(step, counts, cfg):
    saved = f"is saved in {cfg.out}" if step else "is the start: nothing is saved"
    if counts["skipped"] and not counts["updates"]:
        saved += ", but no update was finite: the weights are those that the run began with"
    return f"step {step} of {end_of(cfg)} {saved}{'; the same command goes on' if step < end_of(cfg) else ''}"


def finished(cfg, origin):
    more = "--steps=N" if "steps" in may_change(cfg) else "--steps=N --allow steps"
    done = f"{origin.step} of {end_of(cfg)} steps"
    return f"{origin.path} is finished, {done}: {more} adds, --out= starts another"


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def about(step, student, critic, cfg, origin):
    """What a checkpoint says beside its tensors: it stands alone."""
    return {
        "stage": "pairs" if step < cfg.pairs_steps else "matching",
        "config": asdict(cfg),
        "inputs": origin.inputs,
        "base": origin.base,
        "counts": {"student": student.counts, "critic": critic.counts},
        "sampling": origin.student_sampling,
    }


def counts_of(saved):
    """Counts of student and critic in a checkpoint; those of version 1 share one count of skipped updates."""
    counts = saved["meta"]["counts"]
    if "in_a_row" not in counts:
        return counts["student"], counts["critic"]
    in_a_row = counts["in_a_row"]
    student = {"updates": counts["student"], "skipped": counts["skipped"], "in_a_row": in_a_row["student"]}
    critic = {"updates": counts["critic"], "skipped": 0, "in_a_row": in_a_row["critic"]}
    return student, critic


# ---- validation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(step, nets, goal, data, origin, cfg, log, world):
    """Few-step clips of fixed prompts beside the teacher's (goal, made once), their figures, and what the scores see.

    A run with --first_frame shows and measures these clips again with their first frames given.
    """
    ids = data.for_videos(cfg.samples)
    n = len(ids) * SEEDS
    ways = {"": False}
    if cfg.first_frame:
        ways[" from the first frame"] = True
    draws = [partial(draw_fixed, ids, given, data, cfg, world) for given in ways.values()]
    spread = partial(parallel.spread, chunk=cfg.micro_batch or CHUNK, world=world)
    student = [spread(partial(few_steps, draw, nets, cfg), n) for draw in draws]
    if not goal:
        goal += [spread(partial(many_steps, draw, nets, origin, cfg), n) for draw in draws]
    scores = spread(partial(inside, draws[0], nets, cfg), len(ids))
    if world.main:
        captions = [data.caption(id) for id in ids]
        rows, figures = {}, {}
        for (way, given), made, wanted in zip(ways.items(), student, goal):
            rows |= {f"student{way}": made[::SEEDS], f"teacher{way}": wanted[::SEEDS]}
            figures |= likeness(made, wanted, given)
        show(step, "samples", rows, captions, origin, cfg, log, world)
        rows = dict(zip(("student", "critic's x0", "teacher's x0"), scores.unbind(1)))
        show(step, "inside", rows, captions, origin, cfg, log, world)
        log(step, **figures)


def draw_fixed(ids, given, data, cfg, world, places):
    """The Draw of clips of the fixed prompts: that at place i is of prompt i // SEEDS; given: with its first frame."""
    which = [place // SEEDS for place in places]
    some = [ids[i] for i in which]
    shape = data.shape_of(some[0])
    z, *noises = [noise(cfg.seed, "sample", k, places, shape) for k in range(len(cfg.times))]
    free = None
    if given:
        z, free = begun(z, some, torch.ones(len(z)), data)
    e = noise(cfg.seed, "val", 0, which, shape)
    return send(Draw(data.text(some), data.null, z, free, e, None, noises, data.extras(some)), world.device)


def few_steps(draw, nets, cfg, places):
    """The student's clips, by its own sampler."""
    micro = draw(places)
    student, _, _ = nets(micro.z.shape)
    cond, _ = conds_of(micro)
    return roll(student, cond, micro, exits_of(cfg)[-1], cfg)


def many_steps(draw, nets, origin, cfg, places):
    """The teacher's clips, by its own sampler; an expert's on its part of the way, after the high student's.

    Guided as its run samples it, or as its row of defaults says, not by --guidance: too much of that is to be seen.
    """
    micro = draw(places)
    z, first = micro.z, exits_of(cfg)[0]
    student, _, teacher = nets(z.shape)
    sampling = origin.teacher_sampling
    times = [t for t in grid(sampling["steps"], sampling["shift"]) if is_own(t, cfg)]
    cond, uncond = conds_of(micro)
    if first > 0:           # where the high student ends, noised to where the low teacher begins
        x0 = roll(student, cond, micro, first - 1, cfg)
        z = add_noise(x0, micro.noises[first - 1], z.new_full((len(z),), times[0]))
    return guided_ode(teacher, sampling, z, cond, times, uncond, micro.free)


def inside(draw, nets, cfg, prompts):
    """The student's clips, and critic's and guided teacher's x0 amid the guided noise levels -> (B, 3, C, F, H, W)."""
    micro = draw([prompt * SEEDS for prompt in prompts])
    student, critic, teacher = nets(micro.z.shape)
    cond, uncond = conds_of(micro)
    x0 = roll(student, cond, micro, exits_of(cfg)[-1], cfg)
    low, high = cfg.guidance_interval
    if cfg.expert:
        low, high = within(torch.tensor([low, high]), *part_of(cfg)).tolist()
    t = x0.new_full((len(x0),), (low + high) / 2)
    x_t = add_noise(x0, micro.e, t)
    f = to_x0(x_t, critic(x_t, t, cond), t)
    r, _ = guided_x0(teacher, x_t, t, cond, uncond, scale_at(t, cfg), row_of(cfg)["rescale"])
    return torch.stack([x0, f, r], 1)


def show(step, kind, rows, captions, origin, cfg, log, world):
    """A video of clips, {name: row} under one another."""
    path = codec.write_clips(
        log.file(kind, step),
        torch.cat(list(rows.values())),
        origin.student_sampling,
        vae=cfg.vae,
        device=world.device,
        columns=len(captions),
        report=log.say,
    )
    if path:
        log.video(step, path, captions, list(rows))


def likeness(student, teacher, given=False):
    """How varied, lively and contrasty the student's clips of the fixed prompts are, as ratios to the teacher's.

    Varied: how far clips of one prompt are apart by the quarters of their mean frame. Number by number, clips of things
    that do not overlap are as far apart as can be, wherever they are. given: whether the first frame is, which is then
    left out.
    """
    way = ""
    if given:
        way, student, teacher = "_first_frame", student[:, :, 1:], teacher[:, :, 1:]

    def diversity(x):
        quarters = torch.nn.functional.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1)
        return torch.stack([torch.pdist(some).mean() for some in quarters.split(SEEDS)]).mean()

    def motion(x):
        return x.diff(dim=2).abs().mean()

    seen = {"val_diversity": diversity(student) / diversity(teacher), "val_std": student.std() / teacher.std()}
    if student.shape[2] > 1:        # stills do not move
        seen["val_motion"] = motion(student) / motion(teacher)
    return {f"{name}{way}": ratio for name, ratio in seen.items()}


def show_first(step, z, origin, cfg, world, log):
    """Decodes a clip after the first update, where memory is full: what would fail at a validation is said now."""
    if step == origin.step and world.main and cfg.vae and parallel.on_gpu(world.device):
        codec.write_clips(log.file("noise", 0), z[:1].cpu(), origin.student_sampling, vae=cfg.vae,
                          device=world.device, report=log.say)


if __name__ == "__main__":
    main(flags.read(Config, DEFAULTS))
    parallel.leave()
