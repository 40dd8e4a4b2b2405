"""Train a Wan-class video diffusion transformer by flow matching, from a folder of latents.

    python prepare.py && python train.py                                        the built-in moving shapes, on a laptop
    torchrun --nproc_per_node=8 train.py --model=wan-1.3b --data=DIR --init=PATH --shard=-1

The same command again resumes, exactly. Reads top to bottom: flags, setup in five steps, the loop, its loss,
checkpoints, validation. Imports model, plan and every leaf but shapes.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import gc
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import ckpt
import codec
import flags
import parallel
import plan
from data import Latents, holds_latents, noise, send, stream
from log import Clock, Log, check_wandb, holds, told
from model import (MODELS, Pair, bind, blank, check_causal, check_expert, check_first_frame, chunk_of, chunked, cond_of,
                   fits, initial, lengths, models_of, shapes_of, token_grid)
from step import (BINS, Learner, adamw, averaged, copies, first_given, flow_loss, lr_at, muon, numbers, place,
                  sample, sample_t, start_average, train_step)


@dataclass(frozen=True)
class Config:
    """Train a video diffusion transformer. A flag left None takes the value of the model's row in DEFAULTS."""

    # what
    model: Literal[tuple(MODELS)] = "tiny"                # model size, a row of model.MODELS
    data: tuple[str, ...] = ("data/shapes",)              # datasets: one folder that prepare.py wrote, or several
    mix: tuple[float, ...] = ()                           # share of the batches of each dataset; none: by their sizes
    out: str = "out/train"                                # folder of the run: log, curves, samples, checkpoints
    init: str | None = None                               # weights to start from: Wan, diffusers, ComfyUI or a run
    expert: Literal["high", "low"] | None = None          # which of Wan 2.2's two experts to train
    other: str | None = None                              # the other expert, for videos; None = beside --init
    seed: int = 0                                         # random seed

    # optimizer
    optimizer: Literal["adamw", "muon"] | None = None     # muon: orthogonal updates of the blocks' matrices
    steps: int | None = None                              # number of updates
    batch: int | None = None                              # samples per update, over all ranks
    micro_batch: int | None = None                        # samples a rank forwards at once; None = batch / data ranks
    lr: float | None = None                               # peak learning rate
    warmup: int | None = None                             # updates of linear learning-rate warm-up
    schedule: Literal["constant", "cosine", "linear"] | None = None  # learning rate after the warm-up
    decay_steps: int | None = None                        # updates until the schedule reaches 0; None = steps
    ema: float | None = None                              # decay of the averaged weights, which sample the videos
    lora_rank: int = 0                                    # LoRA rank; 0 trains all weights
    lora_alpha: float | None = None                       # LoRA scale is alpha / rank; None = rank
    lora_init: str | None = None                          # adapter to go on from: diffusers, ComfyUI, kohya or a run

    # objective
    t: Literal["uniform", "logit_normal"] = "uniform"     # density of the noise level t
    shift: float | None = None                            # time shift towards noise: t -> s t / (1 + (s - 1) t)
    text_dropout: float = 0.1                             # share of samples whose text is replaced by the null text
    first_frame: float = 0.0                              # share of clips begun by a given frame: image to video

    clean_prefix: float = 0.0                             # causal: share of samples whose first chunks stay clean

    # sparse attention, and causal: a window of -9 along frames sees the last 9 tiles up to its own, the chunks
    window: tuple[int, int, int] | None = None            # attention window in tiles, frames rows columns; None = dense
    tile: tuple[int, int, int] = (4, 4, 8)                # tokens of an attention tile: frames, rows, columns
    window_steps: int = 0                                 # updates in which --window shrinks from dense; 0 = at once
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
    log_every: int = 10                                   # updates per line of log.jsonl; 0 = no lines
    val_every: int | None = None                          # updates between validations, with videos; 0 = only at end
    save_every: int | None = None                         # updates between checkpoints; 0 = only at the end
    keep: int = 3                                         # how many of the newest checkpoints to keep

    # validation
    val: int = 16                                         # samples held out of training, at most 5 % of the dataset
    samples: int = 8                                      # how many videos to sample at each validation
    guidance: float | tuple[float, float] | None = None   # s of u + s (c - u) in videos, 1 = none; experts: HIGH LOW
    vae: str | None = None                                # Wan VAE that decodes videos; None = latents in .npy

    # the run
    resume: str | None = None                             # checkpoint from which a new --out goes on
    allow: tuple[str, ...] = ()                           # names of flags that may differ from the resumed run's
    wandb: Literal["off", "online", "offline"] = "off"    # send the log to Weights & Biases
    dry_run: tuple[int, ...] = ()                         # plan for this many ranks (and GB per GPU), then exit


# A row per model, and for an optimizer that asks for other values. The last block of each has no flags: edit it here.
# Only matrices are decayed.
TINY = dict(
    optimizer="muon",
    steps=3000,
    batch=16,
    lr=8e-3,
    warmup=100,
    schedule="cosine",
    ema=0.995,
    shift=2.0,
    guidance=1.5,
    remat=False,
    val_every=1000,
    save_every=1000,

    beta2=0.99,
    weight_decay=0.01,
    clip=1.0,
    sample_steps=25,
    sample_shift=1.0,
    sample_solver="ab2",
)
WAN = dict(
    optimizer="adamw",
    steps=5000,
    batch=64,
    micro_batch=1,
    lr=1e-5,
    warmup=100,
    schedule="constant",
    ema=0.999,
    shift=5.0,
    guidance=5.0,
    remat=True,
    val_every=250,
    save_every=250,

    beta2=0.999,
    weight_decay=0.01,
    clip=1.0,
    sample_steps=50,
    sample_shift=5.0,
    sample_solver="euler",
)
DEFAULTS = {
    "tiny": TINY,
    "tiny with adamw": TINY | dict(
        optimizer="adamw",
        steps=5500,
        guidance=2.0,
        val_every=1500,
        save_every=1500,
        sample_steps=50,
        sample_solver="euler",
    ),
    "wan-1.3b": WAN | dict(shift=3.0, sample_shift=3.0),
    "wan2.2-5b": WAN,
    "wan-14b": WAN,
    "wan-14b-i2v": WAN,
    "wan2.2-a14b": WAN | dict(shift=12.0, sample_shift=12.0, sample_steps=40, guidance=(4.0, 3.0)),
    "wan2.2-a14b-i2v": WAN | dict(sample_steps=40, guidance=(3.5, 3.5)),
}
# flags that may change on resume: they do not alter the run
FREE = {"out", "resume", "allow", "steps", "log_every", "val_every", "save_every", "keep", "wandb", "micro_batch",
        "shard", "sp", "device", "compile", "remat", "samples", "vae", "dry_run", "other"}
# what a flag was in runs whose config does not have it yet
BEFORE = {"deterministic": False, "lora_init": None, "mix": (), "optimizer": "adamw", "first_frame": 0.0,
          "clean_prefix": 0.0, "expert": None, "other": None}
STRATA = 10                         # noise levels at which each held-out sample is validated
CHUNK = 16                          # clips forwarded at once in validation where no --micro_batch is given


def main(cfg):
    # 1) refuse what cannot be, before anything is allocated or written
    with flags.door(__file__):
        cfg, world, data, origin = begin(cfg)
        if origin.step > cfg.steps or origin.step == cfg.steps and validated(cfg, origin.step, data, world):
            return world.say(finished(cfg, origin))

    # 2) build: on meta, then over the ranks and compiled; what of it is trained
    net = blank(cfg.model, cfg.remat, adapter(cfg))
    parallel.prepare(net, world, shapes=patterns(cfg, data.shapes))
    me = learner(net, cfg, world)
    state = ckpt.roles(net=me.rows, opt=me.opt_rows, ema=me.average, null=parallel.whole(data.null))

    # 3) values: of this run's checkpoint, of --init, or new; what adapters adapt is always --init's
    with flags.door(__file__):
        if cfg.lora_rank:
            ckpt.fill(parallel.local_rows(net, trained=False), origin.weights, **world.ranks)
        if origin.path:
            ckpt.load(origin.path, state, **world.ranks)
            me.counts = origin.counts
        elif cfg.init and not cfg.lora_rank:
            ckpt.fill(me.rows, origin.weights, **world.ranks)
            start_average(me)
        else:
            ckpt.fill(me.rows, new_values(me.rows, cfg, origin.lora), **world.ranks)
            start_average(me)
    origin = origin._replace(weights=None, lora=None)       # closes their files

    # 4) the log, and signals
    log = Log(cfg.out, asdict(cfg), step=origin.step, steps=cfg.steps, main=world.main, wandb=cfg.wandb)
    stopped, clock = parallel.stop_requested(world), Clock()

    # 5) the loop
    for step in range(origin.step, cfg.steps + 1):
        # once in a while: save, then validate; a run killed in between validates when it resumes
        last, stop = step == cfg.steps, stopped()
        if step > origin.step and (last or stop or due(step, cfg.save_every)):
            meta = about(step, me, data, cfg, origin)
            ckpt.save(cfg.out, step, state, meta, keep=cfg.keep, report=log.say, **world.ranks)
        if not stop and (last or due(step, cfg.val_every)) and not validated(cfg, step, data, world):
            with averaged(me):
                show(net, step, data, cfg, world, log)
                log(step, **validate(net, step, data, cfg, world))
        if last or stop:
            log.say(ended(step, me.counts, cfg))
            break

        # one update
        with clock("seconds"), ckpt.ending(cfg.out, step):
            with clock("data_wait"):
                micros = data.at(step)
            bound = bound_at(step, net, micros[0].x0.shape, cfg, world)
            losses = [partial(loss_of, bound, micro, cfg) for micro in micros]
            seen = train_step(me, losses, lr=rate(step, cfg), clip=row_of(cfg)["clip"], ema=cfg.ema)
        if me.counts["in_a_row"]:
            log.say(f"step {step}: gradient norm {seen['grad_norm']:.3g}, update skipped; "
                    f"samples {data.batch_ids(step)[1]}")

        # one line
        if due(step + 1, cfg.log_every):
            seen |= clock.take(min(cfg.log_every, step + 1 - origin.step))
            log(step + 1, **figures(step, seen, me, bound, micros[0], data, cfg, world))
        if step == origin.step:
            show_first(micros[0], data, cfg, world, log)
    log.close()


def loss_of(net, micro, cfg):
    """Flow matching of one micro-batch: text dropped and first frames given here and there, t by its density.

    A causal net has a t for each chunk (diffusion forcing, arXiv 2407.01392); see clean_prefix.
    """
    drop = micro.drop < cfg.text_dropout
    text = torch.where(drop[:, None, None], micro.null, micro.text)
    t = sample_t(micro.u, cfg.t, cfg.shift, part=part_of(cfg))
    free = None
    if cfg.first_frame:
        free = first_given(micro.x0, micro.give < cfg.first_frame)
    if t.ndim == 2:
        chunks = chunk_at(micro.x0, cfg)
        t = t[:, chunks]
        if cfg.clean_prefix:
            given = clean_prefix(micro.prefix, cfg.clean_prefix, 1 + chunks[-1])
            later = (given[:, None] <= chunks).float()
            free = later if free is None else later * free
    return flow_loss(net, micro.x0, cond_of(text, micro.extras), t, micro.e, free=free)


def part_of(cfg):
    """(boundary, expert) of the part of all t on which an expert is trained, None where there is one net."""
    return (MODELS[cfg.model].boundary, cfg.expert) if cfg.expert else None


def chunk_at(x0, cfg):
    """The chunk that each frame of x0 (B, C, F, H, W) belongs to: (F,)."""
    return torch.arange(x0.shape[2], device=x0.device) // chunk_of(cfg.window, cfg.tile)


def clean_prefix(u, share, chunks):
    """How many chunks of each sample stay clean, by its u (B,): from 1 to all but one for a share of them, else 0."""
    some = 1 + (u / share * (chunks - 1)).floor()
    return torch.where(u < share, some, 0)


def rate(step, cfg):
    """The learning rate of update `step`."""
    return lr_at(step, lr=cfg.lr, warmup=cfg.warmup, decay_steps=cfg.decay_steps, schedule=cfg.schedule)


def bound_at(step, net, shape, cfg, world):
    """The net as the losses see it at update `step`, for latents (…, F, H, W) -> Bound."""
    window = window_at(step, cfg, token_grid(net.config, shape))
    lora = net.adapters[0] if net.adapters else None
    return bind(net, shape, world, window, cfg.tile, cfg.dense_ends, lora)


def window_at(step, cfg, tokens):
    """Tiles seen per axis at update `step`: from all of them to --window, in equal parts over --window_steps."""
    if cfg.window is None:
        return None
    done = min(1.0, step / cfg.window_steps) if cfg.window_steps else 1.0
    tiles = [math.ceil(n / size) for n, size in zip(tokens, cfg.tile)]
    return tuple(round(n + (min(w, n) - n) * done) for n, w in zip(tiles, cfg.window))


def figures(step, seen, me, bound, micro, data, cfg, world):
    """What a line of the log holds after update `step`: measurements over all ranks, speed."""
    seen = numbers(parallel.mean(seen, world))
    samples_per_s = cfg.batch / seen["seconds"]
    tokens = math.prod(token_grid(bound.net.config, micro.x0.shape))
    times = micro.x0.shape[2] if cfg.first_frame else 1
    forward = bound.flops(micro.x0.shape[1:], micro.text.shape[1], times)
    work = forward * (2 if cfg.lora_rank else 3)        # a forward and its backward
    if bound.metadata is not None:
        seen["sparsity"] = bound.metadata.sparsity
    return seen | {
        "epoch": data.epoch_of(step + 1),
        "skipped": me.counts["skipped"],
        "samples_per_s": samples_per_s,
        "tokens_per_s": samples_per_s * tokens,
        **Log.speed(work * samples_per_s / world.size, world.device, cfg.precision),
    }


def due(step, every):
    return every > 0 and step % every == 0


# ---- setup ----------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What a run goes on from, and what it is made of."""
    path: Path | None               # the checkpoint
    step: int
    counts: dict | None
    weights: ckpt.Source | None     # of --init
    lora: ckpt.Lora | None          # of --lora_init
    base: dict | None               # what adapters adapt: where it is, and its CRC32
    inputs: dict                    # {flag: CRC32 of what it names}: what has moved is known again


def begin(cfg):
    """The resolved config, the ranks, the dataset and the run's Origin; errors for what cannot be, or exits."""
    cfg = resolve(cfg)
    if cfg.dry_run:
        raise SystemExit(plan.dry_run(__file__, cfg, adapter(cfg), optimizer=optimizer(cfg)))
    world = parallel.init(cfg.device, cfg.shard, cfg.sp, cfg.precision, cfg.compile, cfg.deterministic)
    cfg = replace(cfg, precision=world.precision)
    data = Latents(
        cfg.data,
        seed=cfg.seed,
        batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        rank=world.data_rank,
        world=world.data_size,
        val=cfg.val,
        mix=cfg.mix or None,
        chunk=chunk_of(cfg.window, cfg.tile),
        device=world.device,
    )
    if not holds_latents(data.manifest):
        raise ValueError(f"{cfg.data[0]} holds prompts without latents: one can distil from it, not train on it")
    if cfg.first_frame and all(shape[1] == 1 for shape in data.shapes):
        raise ValueError(f"--first_frame={cfg.first_frame}: {' '.join(cfg.data)} holds stills alone, of which nothing "
                         "is left to learn where the first frame is given")
    if cfg.clean_prefix and all(shape[1] <= cfg.tile[0] for shape in data.shapes):
        raise ValueError(f"--clean_prefix={cfg.clean_prefix}: no clip of {' '.join(cfg.data)} is longer than a chunk, "
                         f"{cfg.tile[0]} frames, so that all of it would stay clean")
    width = data.manifest["text"]["width"]
    fits(cfg.model, width, data.shapes, data.extra_shapes(), cfg.sp, cfg.window, cfg.tile)
    codec.load(data.manifest["codec"], vae=cfg.vae if world.main else None)     # a wrong --vae fails here
    check_wandb(cfg.wandb if world.main else "off")
    told(cfg.out)       # damaged, it fails here
    plan.start(cfg, world, adapter(cfg), data, optimizer=optimizer(cfg))

    path = ckpt.newest(cfg.out, cfg.resume, report=world.say, **world.ranks)
    weights = None
    inputs = {"data": data.content}
    # A full finetune needs --init for its first start alone: later it may be gone.
    if cfg.init and (cfg.lora_rank or not path or parallel.agree(Path(cfg.init).exists(), world)):
        weights = ckpt.weights(cfg.init, expert=cfg.expert, **world.ranks)
        ckpt.match(shapes_of(cfg.model), weights.shapes, weights.origin, models_of)
        inputs["init"] = ckpt.fingerprint(weights)
    if cfg.other and cfg.samples:
        other_expert(cfg, world)        # what is no such expert fails here
    base = ckpt.base_of(cfg.init, weights, cfg.expert) if cfg.lora_rank else None
    lora = None
    if cfg.lora_init and (not path or parallel.agree(Path(cfg.lora_init).exists(), world)):     # likewise
        lora = ckpt.lora(cfg.lora_init, **world.ranks)
        ckpt.check_lora(lora, weights.shapes)
        inputs["lora_init"] = ckpt.fingerprint(lora.source)
        world.say(f"{cfg.lora_init}: {len(lora.scales)} modules of rank {cfg.lora_rank}; others begin without change")
    step, counts = 0, None
    if path:
        saved = ckpt.read_manifest(path)
        ckpt.differences(path, saved, asdict(cfg), inputs, FREE | set(cfg.allow), BEFORE)
        step, counts = saved["step"], saved["meta"]["counts"]
        inputs = saved["meta"].get("inputs", {}) | inputs       # also of what is not there any more
    ckpt.claim(cfg.out, **world.ranks)
    if ckpt.newest(cfg.out, cfg.resume, report=lambda text: None, **world.ranks) != path:
        raise ValueError(f"--out={cfg.out} was in use until now and has gone on: the same command goes on from there")
    return cfg, world, data, Origin(path, step, counts, weights, lora, base, inputs)


def resolve(cfg):
    """The config with each None filled, from the run that goes on or the model's row; ValueError for the impossible."""
    saved = ckpt.flags_of(cfg.out, cfg.resume)
    if saved:
        saved = BEFORE | saved
    chosen = {} if "optimizer" in cfg.allow else {"optimizer": saved.get("optimizer")}
    cfg = flags.filled(cfg, chosen, {"optimizer": DEFAULTS[cfg.model]["optimizer"]})
    check_expert(cfg.model, cfg.expert)
    row = row_of(cfg)
    kept = {*row, "precision", "lora_alpha", "decay_steps"} - set(cfg.allow)
    if cfg.steps not in (None, saved.get("steps")):
        kept -= {"decay_steps"}     # another length is another decay, which is refused unless allowed
    if not cfg.lora_rank:
        kept -= {"lora_alpha"}      # the rank is what differs, and is named
    cfg = flags.filled(cfg, {name: saved.get(name) for name in kept}, row)
    if cfg.schedule != "constant" and cfg.decay_steps is None:
        cfg = replace(cfg, decay_steps=cfg.steps)
    if cfg.lora_init:
        cfg = with_rank(cfg, saved)
    if cfg.lora_rank and not cfg.init:
        raise ValueError(f"--lora_rank={cfg.lora_rank}: adapters need weights to adapt, which --init names")
    cfg = replace(cfg, lora_alpha=flags.lora_alpha(cfg))
    flags.at_least(cfg, 0, "lr", "guidance", "warmup", "val", "samples", "window_steps", "dense_ends", "lora_rank")
    flags.at_least(cfg, 0, "log_every", "val_every", "save_every")
    flags.at_least(cfg, 1, "steps", "batch", "keep")
    flags.above(cfg, 0, "shift")
    flags.check_run(cfg)
    if cfg.mix and (len(cfg.mix) != len(cfg.data) or not all(0 < share < math.inf for share in cfg.mix)):
        raise ValueError(f"--mix {' '.join(map(str, cfg.mix))}: each of --data {' '.join(cfg.data)} gets one above 0")
    if not 0 <= cfg.text_dropout < 1 or not 0 <= cfg.ema < 1:
        raise ValueError(f"--text_dropout={cfg.text_dropout} --ema={cfg.ema}: both are in [0, 1)")
    check_first_frame(cfg.model, cfg.first_frame)
    if cfg.window is None and (cfg.window_steps or cfg.dense_ends):
        raise ValueError("--window_steps and --dense_ends shape --window, which is not given")
    check_causal(cfg.model, cfg.window, cfg.dense_ends)
    causal = chunk_of(cfg.window, cfg.tile)
    if causal and cfg.window_steps:
        raise ValueError(f"--window_steps={cfg.window_steps}: a causal window, {cfg.window[0]} along "
                         "frames, cannot shrink from a dense one, which sees the future")
    if not 0 <= cfg.clean_prefix <= 1 or cfg.clean_prefix and not causal:
        raise ValueError(f"--clean_prefix={cfg.clean_prefix} is a share, in [0, 1], of the samples "
                         "of a causal run, whose --window is negative along frames")
    if isinstance(cfg.guidance, tuple) and not cfg.expert:
        raise ValueError(f"--guidance {' '.join(map(str, cfg.guidance))}: {cfg.model} is one net, it takes one scale")
    return with_other(cfg)


def with_other(cfg):
    """The config with the other expert that lies beside --init, where videos need one and none is named."""
    if cfg.other and not cfg.expert:
        raise ValueError(f"--other={cfg.other}: {cfg.model} is one net at all noise levels")
    if not cfg.expert or cfg.other or not cfg.samples:
        return cfg
    found = ckpt.beside(cfg.init, cfg.expert) if cfg.init else None
    if found is None:
        raise ValueError(f"videos need both experts, and none for {ckpt.other_of(cfg.expert)} noise lies beside "
                         "--init: --other=PATH names it, --samples=0 makes no videos")
    return replace(cfg, other=found)


def with_rank(cfg, saved):
    """The config with the rank of --lora_init, and its alpha unless one is given; a run that goes on has both."""
    rank, alpha = saved.get("lora_rank"), saved.get("lora_alpha")
    if not rank:
        lora = ckpt.lora(cfg.lora_init)
        if len(lora.ranks) > 1:
            raise ValueError(f"--lora_init={cfg.lora_init} has modules of ranks {lora.ranks}: one rank is trained")
        rank, alpha = lora.ranks[0], lora.ranks[0] * max(lora.scales.values())
    if cfg.lora_rank not in (0, rank):
        raise ValueError(f"--lora_rank={cfg.lora_rank}, but --lora_init={cfg.lora_init} is of rank {rank}: leave the "
                         "rank out")
    return replace(cfg, lora_rank=rank, lora_alpha=alpha if cfg.lora_alpha is None else cfg.lora_alpha)


def adapter(cfg):
    """{name: (rank, alpha)} of the adapter that is trained, {} where all weights are."""
    return {"main": (cfg.lora_rank, cfg.lora_alpha)} if cfg.lora_rank else {}


def row_of(cfg):
    """The defaults of a model, and of an optimizer where it has a row of its own."""
    return DEFAULTS.get(f"{cfg.model} with {cfg.optimizer}", DEFAULTS[cfg.model])


def optimizer(cfg, gather=None):
    """-> function of rows: their optimizer, and the rows of its state. gather: see step.muon."""
    row = row_of(cfg)
    given = dict(betas=(0.9, row["beta2"]), weight_decay=row["weight_decay"])
    if cfg.optimizer == "muon":
        return partial(muon, gather=gather, **given)
    return partial(adamw, **given)


def learner(net, cfg, world):
    """All that is trained of a net, its optimizer and its average, as train_step takes it."""
    rows = parallel.local_rows(net, trained=True)
    opt, opt_rows = optimizer(cfg, parallel.gatherer(world))(rows)
    return Learner(rows, opt, opt_rows, parallel.sync(net), parallel.norm(net, rows, world), copies(rows))


def new_values(rows, cfg, lora):
    """-> function for ckpt.fill: what --lora_init has, else initial values, each from a stream of its own."""
    slots = {name: slot for slot, name in enumerate(rows)}

    def value(name, shape, first, last):
        return initial(name, shape, stream(cfg.seed, "init", 0, slots[name]))[first:last]

    return ckpt.continued(lora, cfg.lora_alpha / cfg.lora_rank, value) if lora else value


def patterns(cfg, shapes):
    """How many pairs of latent shape and attention window compiled blocks will meet, dense among them."""
    count = 0
    for shape in shapes:
        tokens = token_grid(MODELS[cfg.model], shape)
        windows = {window_at(step, cfg, tokens) for step in range(cfg.window_steps + 1)}
        count += len(windows | {None})
        count += lengths(MODELS[cfg.model], shape, cfg.window, cfg.tile, sp=cfg.sp)
    return 2 * count if cfg.first_frame else count      # validated with a t per clip too


def validated(cfg, step, data, world):
    """Whether the log holds the number with which validation at this step ends: a kill may have come before."""
    return parallel.agree(not world.main or holds(cfg.out, step, loss_name(data)), world)


def ended(step, counts, cfg):
    saved = f"is saved in {cfg.out}" if step else "is the start: nothing is saved"
    if step and not counts["updates"]:
        saved += ", but no update was finite: the weights are those that the run began with"
    return f"step {step} of {cfg.steps} {saved}{'; the same command goes on' if step < cfg.steps else ''}"


def finished(cfg, origin):
    more = "--steps=N" if cfg.schedule == "constant" else "--steps=N --allow decay_steps"
    done = f"{origin.step} of {cfg.steps} steps"
    return f"{origin.path} is finished, {done}: {more} adds, --out= starts another"


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def about(step, me, data, cfg, origin):
    """What a checkpoint says beside its tensors: it stands alone."""
    return {
        "config": asdict(cfg),
        "inputs": origin.inputs,
        "base": origin.base,
        "counts": me.counts,
        "sampling": sampling_at(step, data, cfg),
    }


def sampling_at(step, data, cfg):
    """How the net of this update is sampled, by sample.py and in validation."""
    row = row_of(cfg)
    window = cfg.window
    if step < cfg.window_steps:     # still shrinking: that of the largest bucket
        windows = [window_at(step, cfg, token_grid(MODELS[cfg.model], shape)) for shape in data.shapes]
        window = max(windows, key=math.prod)
    sampling = {name: data.manifest[name] for name in ("codec", "mean", "std", "fps", "text")} | {
        "model": cfg.model,
        "shapes": data.commonest_shapes(),
        "window": window,
        "tile": cfg.tile,
        "dense_ends": cfg.dense_ends,
        "sampler": "euler",
        "steps": row["sample_steps"],
        "shift": row["sample_shift"],
        "solver": row["sample_solver"],
        "guidance": cfg.guidance,
        "first_frame": cfg.first_frame,
    }
    if cfg.expert:
        sampling |= {"expert": cfg.expert, "boundary": MODELS[cfg.model].boundary}
    return sampling


# ---- validation -----------------------------------------------------------------------------------------------------


def loss_name(data):
    return "val_loss" if data.held_out else "train_set_loss"


@torch.no_grad()
def validate(net, step, data, cfg, world):
    """Flow-matching loss at fixed samples, noise and levels t: held-out samples, or the first where there are none.

    A run with --first_frame measures it again, with the first frame given to all clips but stills, and a causal one
    with a clean past: of each sample and level one chunk is asked about, another at the next.
    """
    ids = data.held_out
    if not ids:
        ids = range(min(cfg.val or 16, data.count))
    ways = [""]
    if cfg.first_frame:
        ways.append("_first_frame")
    if chunk_of(cfg.window, cfg.tile):
        ways.append("_clean_past")
    total = torch.zeros(len(ways), 2, BINS, device=world.device)
    low, high = range_of(cfg)
    chunk = cfg.micro_batch or CHUNK
    for i, counts in parallel.share(len(ids), world):
        x0, text, extras = send([*data.sample([ids[i]]), data.extras([ids[i]])], world.device)
        bound = bound_at(step, net, x0.shape, cfg, world)
        for first in range(0, STRATA, chunk):
            levels = range(STRATA)[first:first + chunk]
            n = len(levels)
            t = torch.tensor([low + (high - low) * (k + 0.5) / STRATA for k in levels], device=world.device)
            e = noise(cfg.seed, "val", 0, [i * STRATA + k for k in levels], x0.shape[1:]).to(world.device)
            x0_n = x0.expand(n, -1, -1, -1, -1)
            beside = {name: part.expand(n, *part.shape[1:]) for name, part in extras.items()}
            cond = cond_of(text.expand(n, -1, -1), beside)
            for way, sums in zip(ways, total):
                free = None
                if way == "_first_frame":
                    free = first_given(x0_n, torch.ones_like(t))
                if way == "_clean_past":
                    chunks = chunk_at(x0, cfg)
                    asked = (i + torch.tensor(levels, device=world.device)) % (1 + chunks[-1])
                    free = (chunks == asked[:, None]).float()
                _, seen = flow_loss(bound, x0_n, cond, t, e, free=free)
                if counts and not (way and free is None):
                    sums += seen["loss_by"]
    total = parallel.mean({"loss": total}, world)["loss"]
    found, moving = {}, any(data.shape_of(i)[1] > 1 for i in ids)
    for way, (sums, counts) in zip(ways, total):
        if moving or way != "_first_frame":     # which stills have none of
            name = f"{loss_name(data)}{way}"
            found |= {name: (sums.sum() / counts.sum()).item()} | numbers({f"{name}_by": torch.stack((sums, counts))})
    return found


def range_of(cfg):
    """The lowest and highest t that the net is asked at."""
    if not cfg.expert:
        return 0.0, 1.0
    boundary = MODELS[cfg.model].boundary
    return (boundary, 1.0) if cfg.expert == "high" else (0.0, boundary)


def other_expert(cfg, world):
    """The Source of the other expert's weights."""
    source = ckpt.weights(cfg.other, expert=ckpt.other_of(cfg.expert), **world.ranks)
    ckpt.match(shapes_of(cfg.model), source.shapes, source.origin, models_of)
    return source


def pair_of(bound, cfg, world):
    """The net that makes videos: the one that is trained, and of two experts the other too, frozen and attending alike.

    It is read anew each time and gone afterwards: beside a net in training, which takes eight times as much, it would
    have to be held for hours.
    """
    if not cfg.expert:
        return bound
    fill = partial(ckpt.fill, source=other_expert(cfg, world))
    net = parallel.frozen(blank(cfg.model), world._replace(compile=False), fill)
    other = replace(bound, net=net, lora=None)
    high, low = (bound, other) if cfg.expert == "high" else (other, bound)
    return Pair(high, low, MODELS[cfg.model].boundary)


@torch.no_grad()
def show(net, step, data, cfg, world, log):
    """Videos of fixed prompts and noise into the run's folder: captions of the dataset, held-out ones first.

    A run with --first_frame adds a row of videos that begin with these clips' own first frames.
    """
    if step == 0 or cfg.samples == 0:
        return
    ids = data.for_videos(cfg.samples)
    shape = data.shape_of(ids[0])
    sampling = sampling_at(step, data, cfg)
    sampled, see = pair_of(bound_at(step, net, shape, cfg, world), cfg, world), None
    if chunk_of(cfg.window, cfg.tile):
        sampled = chunked(net, shape, world, cfg.window, cfg.tile, sampled.lora)
        see = sampled.see

    def make(given, places):
        z = noise(cfg.seed, "sample", 0, places, shape).to(world.device)
        some = [ids[i] for i in places]
        text, extras = send([data.text(some), data.extras(some)], world.device)
        cond = cond_of(text, extras)
        uncond = cond._replace(text=data.null.to(world.device).expand_as(text))
        free = None
        if given:
            x0, _ = data.sample(some)
            free = first_given(z, torch.ones(len(z), device=world.device))
            z = place(z, x0.to(world.device), free)
        return sample(sampled, lambda k: z, cond, uncond, sampling, free, see)

    rows, columns = {"text alone": False}, None
    if cfg.first_frame:
        rows, columns = rows | {"first frame given": True}, len(ids)
    made = [parallel.spread(partial(make, given), len(ids), cfg.micro_batch or CHUNK, world) for given in rows.values()]
    del make, sampled   # training needs the memory of the other expert,
    gc.collect()        # whose groups refer to one another
    if world.main:
        path = codec.write_clips(log.file("samples", step), torch.cat(made), data.manifest, vae=cfg.vae,
                                 device=world.device, columns=columns, report=log.say)
        if path:
            log.video(step, path, [data.caption(i) for i in ids], list(rows) if columns else ())


def show_first(micro, data, cfg, world, log):
    """Decodes a clip after the first update, where memory is full: what would fail at a validation is said now."""
    if world.main and cfg.vae and parallel.on_gpu(world.device):
        codec.write_clips(log.file("data", 0), micro.x0[:1].cpu(), data.manifest, vae=cfg.vae, device=world.device,
                          report=log.say)


if __name__ == "__main__":
    main(flags.read(Config, DEFAULTS))
    parallel.leave()
