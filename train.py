"""Train a Wan-class video diffusion transformer by flow matching, from a folder of latents.

    python prepare.py && python train.py                                        the built-in moving shapes, on a laptop
    torchrun --nproc_per_node=8 train.py --model=wan-1.3b --data=DIR --init=PATH --shard=-1

The same command again resumes, exactly. Reads top to bottom: flags, setup, the loop, validation.
Imports model, attention and every leaf.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width
"""
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

import ckpt
import codec
import parallel
from attention import attention, build_metadata
from data import Latents, check_batch, normal, stream
from log import Log, budget, check_wandb, room
from model import LOCAL, MODELS, USUAL, DiT, Seq, activations, add_lora, flops, initial, token_grid
from step import (BINS, adamw, ema_update, ema_weights, euler, flow_loss, grid, lr_at, sample_t, train_step, unfold)


@dataclass(frozen=True)
class Config:
    """Train a video diffusion transformer. A flag whose default is None takes the model's value in DEFAULTS."""

    # what
    model: Literal[tuple(MODELS)] = "tiny"                # size, a row of model.MODELS
    data: str = "data/shapes"                             # folder that prepare.py wrote
    out: str = "out/train"                                # the run's folder: log, curves, samples, checkpoints
    init: str | None = None                               # weights of Wan, diffusers, ComfyUI or ours; None = random
    seed: int = 0                                         # of every random number of the run

    # optimizer
    steps: int | None = None                              # updates in all
    batch: int | None = None                              # samples per update, over all ranks
    micro_batch: int | None = None                        # samples a rank forwards at once; None = batch / data ranks
    lr: float | None = None                               # peak learning rate
    warmup: int | None = None                             # updates of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] | None = None  # of the learning rate after the warm-up
    decay_steps: int | None = None                        # updates until the schedule reaches 0; None = steps
    ema: float | None = None                              # decay of the averaged weights, those that are sampled
    lora_rank: int = 0                                    # train adapters of that rank of --init's blocks; 0 = all
    lora_alpha: float | None = None                       # their scale is alpha / rank; None = rank

    # objective
    t: Literal["uniform", "logit_normal"] = "uniform"     # density of the noise level t
    shift: float | None = None                            # moves t towards noise: s t / (1 + (s - 1) t)
    text_dropout: float = 0.1                             # share of samples trained with the null text

    # sparse attention
    window: tuple[int, int, int] | None = None            # tiles seen along frames, rows, columns; None = dense
    tile: tuple[int, int, int] = (4, 4, 8)                # tokens per tile
    window_steps: int = 0                                 # updates in which it shrinks from dense; 0 = at once
    dense_ends: int = 0                                   # first and last blocks that stay dense

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"       # auto = cuda where there is one
    precision: Literal["fp32", "bf16"] | None = None      # of the blocks' compute; None = bf16 on cuda, fp32 on cpu
    shard: int = 1                                        # ranks that hold one copy of the parameters; -1 = all
    sp: int = 1                                           # ranks that share one sample's tokens
    compile: bool | None = None                           # compile each block; None = on cuda
    remat: bool = False                                   # recompute activations in backward, attention excepted

    # now and then
    log_every: int = 10                                   # updates per line of log.jsonl; 0 = none
    val_every: int | None = None                          # updates between validations, with videos; 0 = at the end
    save_every: int | None = None                         # updates between checkpoints; 0 = at the end
    keep: int = 3                                         # newest checkpoints that stay

    # validation
    val: int = 16                                         # samples held out, at most 5 % of the dataset
    samples: int = 8                                      # videos sampled at each validation
    guidance: float | None = None                         # scale s of u + s (c - u); 1 = none
    vae: str | None = None                                # Wan VAE that decodes the videos; None = latents in .npy

    # the run
    resume: str | None = None                             # checkpoint that begins a run in a new folder
    allow: tuple[str, ...] = ()                           # flags that may differ from the resumed run's
    wandb: Literal["off", "online", "offline"] = "off"    # send the log to Weights & Biases
    dry_run: tuple[int, ...] = ()                         # ranks, and GB of each: print what it takes, and stop


class Row(NamedTuple):
    """What a model's runs take unless flags say otherwise; the last line has no flags: edit it here."""
    steps: int
    batch: int
    lr: float
    warmup: int
    schedule: str
    ema: float
    shift: float
    guidance: float
    val_every: int
    save_every: int
    beta2: float            # of AdamW, the first is 0.9
    weight_decay: float     # of matrices; norms, biases and modulations are never decayed
    clip: float             # largest global gradient norm, 0 = any
    sample_steps: int       # Euler steps of a validation video
    sample_shift: float     # of their time grid


DEFAULTS = {  #      steps batch    lr warmup    schedule    ema shift guidance   val  save  beta2 decay clip sample
    "tiny":      Row( 5500,   16, 8e-3,   100,   "cosine", 0.995,  2.0,     2.0, 1500, 1500,  0.99, 0.01, 1.0, 50, 1.0),
    "wan-1.3b":  Row( 5000,   64, 1e-5,   100, "constant", 0.999,  3.0,     5.0,  250,  250, 0.999, 0.01, 1.0, 50, 3.0),
    "wan2.2-5b": Row( 5000,   64, 1e-5,   100, "constant", 0.999,  5.0,     5.0,  250,  250, 0.999, 0.01, 1.0, 50, 5.0),
    "wan-14b":   Row( 5000,   64, 1e-5,   100, "constant", 0.999,  5.0,     5.0,  250,  250, 0.999, 0.01, 1.0, 50, 5.0),
}
# flags that may change on resume: they do not alter the run
FREE = {"out", "resume", "allow", "steps", "log_every", "val_every", "save_every", "keep", "wandb", "micro_batch",
        "shard", "sp", "device", "compile", "remat", "samples", "vae", "dry_run"}
SKIPS = 20      # updates skipped in a row, for gradients that are not finite, after which a run has failed
STRATA = 10     # noise levels at which each held-out sample is validated


def main(cfg):
    with door():
        cfg = resolve(cfg)
        if cfg.dry_run:
            raise SystemExit(plan(cfg))
        row, world = DEFAULTS[cfg.model], parallel.init(cfg.device, cfg.shard, cfg.sp)
        cfg = replace(cfg, precision=cfg.precision or ("bf16" if world.device.type == "cuda" else "fp32"))
        data = Latents(cfg.data, seed=cfg.seed, batch=cfg.batch, micro_batch=cfg.micro_batch, rank=world.data_rank,
                       world=world.data_size, val=cfg.val, pin=world.device.type == "cuda")
        config = fit(MODELS[cfg.model], cfg, data)
        agree, main_rank = partial(parallel.agree, world=world), world.rank == 0
        say = print if main_rank else lambda *_: None
        adapted = ckpt.weights(cfg.init) if cfg.lora_rank else None
        base = ckpt.base_of(cfg.init, adapted) if adapted else {"path": None, "crc32": None}
        inputs = {"data": data.manifest["crc32"]} | ({"init": base["crc32"]} if adapted else {})
        found, saved = ckpt.found(cfg.out, cfg.resume, asdict(cfg), FREE | {*cfg.allow}, inputs,
                                  rank=world.rank, world=world.size, agree=agree, report=say)
        source = adapted or (ckpt.weights(cfg.init) if cfg.init and not found else None)
        codec.load(data.manifest["codec"], vae=main_rank and cfg.vae or None)   # to fail here, not at a validation
        check_wandb(main_rank and cfg.wandb)
        compiled = world.device.type == "cuda" if cfg.compile is None else cfg.compile
        if saved and saved["step"] >= cfg.steps:
            more = "--steps=N" if cfg.schedule == "constant" else "--steps=N --allow decay_steps"
            return say(f"{found} is finished, {saved['step']} of {cfg.steps} steps: {more} adds, --out= starts another")

    # the net, its average, its optimizer; then their values
    net = blank(cfg)
    parallel.prepare(net, world, precision=cfg.precision, compile=compiled,
                     shapes=len(data.shapes) * (1 + (cfg.window is not None) * 8))
    rows = parallel.local_rows(net)
    frozen = {n: rows.pop(n) for n, p in net.named_parameters() if not p.requires_grad}     # LoRA: all but the adapter
    params = [p for p, _, _ in rows.values()]
    ema = [torch.zeros_like(p) for p in params]
    opt, opt_rows = adamw(rows, (0.9, row.beta2), row.weight_decay)
    state = ({f"net.{n}": r for n, r in rows.items()} | {f"opt.{n}": r for n, r in opt_rows.items()}
             | {f"ema.{n}": (a, first, shape) for a, (n, (_, first, shape)) in zip(ema, rows.items())}
             | {"null": (data.null.clone(), 0, tuple(data.null.shape))})
    with door():
        if source:
            ckpt.fill(frozen or rows, source)
    if found:
        with door():
            ckpt.load(found, state, rank=world.rank, world=world.size, agree=agree)
        start, counts = saved["step"], saved["meta"]["counts"]
    else:
        slots = {name: i for i, name in enumerate(rows)}
        if frozen or not source:
            ckpt.fill(rows, lambda name, shape, first, last:
                      initial(name, shape, stream(cfg.seed, "init", 0, slots[name]))[first:last])
        torch._foreach_copy_(ema, params)
        start, counts = 0, {"updates": 0, "skipped": 0, "in_a_row": 0}

    sync, norm = parallel.sync(net), partial(parallel.grad_norm, net, rows, world)
    log = Log(cfg.out, asdict(cfg), step=start, steps=cfg.steps, main=main_rank, wandb=cfg.wandb)
    sampling = {name: data.manifest[name] for name in ("codec", "mean", "std", "fps", "text")} | {
        "model": cfg.model, "shapes": data.shapes, "window": cfg.window, "tile": cfg.tile, "dense_ends": cfg.dense_ends,
        "sampler": "euler", "steps": row.sample_steps, "shift": row.sample_shift, "guidance": cfg.guidance}
    meta = {"config": asdict(cfg), "inputs": inputs, "base": base, "counts": counts, "sampling": sampling}

    bind = binder(net, cfg, world)
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):      # finish the step, save, go; asked twice, go at once
        signal.signal(number, lambda number, frame: stop.append(signal.signal(number, signal.SIG_DFL)))
    clock = {"seconds": 0.0, "data_wait": 0.0}      # summed since the last line of the log

    for step in range(start, cfg.steps + 1):
        # once in a while: validate, save, stop; a resumed run has done so where it begins
        last, fresh = step == cfg.steps, step > start or step == 0
        if fresh and (last or due(step, cfg.val_every)):
            with ema_weights(params, ema):
                log(step, **validate(partial(bind, step=step), data, cfg, world))
                if step > 0 and cfg.samples:
                    show(*sample(partial(bind, step=step), data, cfg, world), step, data, cfg, world, log)
        stopping = not agree(not stop)
        if step > start and (last or stopping or due(step, cfg.save_every)):
            ckpt.save(cfg.out, step, state, meta, rank=world.rank, world=world.size, agree=agree, keep=cfg.keep)
        if last or stopping:
            log.say(f"step {step} of {cfg.steps} is saved in {cfg.out}{'' if last else '; the same command goes on'}")
            break

        # one update
        began = time.perf_counter()
        micros = data.at(step)
        clock["data_wait"] += time.perf_counter() - began
        bound, metadata = bind(micros[0].x0.shape, step)
        lr = lr_at(step, lr=cfg.lr, warmup=cfg.warmup, decay_steps=cfg.decay_steps, schedule=cfg.schedule)
        losses = [partial(loss_of, bound, micro, cfg, world.device) for micro in micros]
        seen = train_step(opt, losses, lr=lr, clip=row.clip, sync=sync, norm=norm)
        if seen["skipped"]:
            counts["skipped"], counts["in_a_row"] = counts["skipped"] + 1, counts["in_a_row"] + 1
            log.say(f"step {step}: gradient norm {seen['grad_norm']:.3g}, update skipped; "
                    f"samples {[i for micro in micros for i in micro.ids]}")
            if counts["in_a_row"] == SKIPS:
                raise RuntimeError(f"{SKIPS} updates in a row were not finite; {cfg.out}/ckpt has the last good one")
        else:
            counts["updates"], counts["in_a_row"] = counts["updates"] + 1, 0
            ema_update(ema, params, cfg.ema, counts["updates"])
        clock["seconds"] += time.perf_counter() - began

        # one line
        if due(step + 1, cfg.log_every):
            timed = min(cfg.log_every, step + 1 - start)
            seen = unfold(parallel.mean(seen | {name: total / timed for name, total in clock.items()}, world))
            rate = cfg.batch / seen["seconds"]
            forward = flops(config, micros[0].x0.shape[1:], micros[0].text.shape[1], metadata, cfg.dense_ends)
            tokens = math.prod(token_grid(config, micros[0].x0.shape))
            sparse = {} if metadata is None else {"sparsity": metadata.sparsity}
            log(step + 1, **seen | {"lr": lr, "epoch": data.epoch_of(step + 1), "skipped": counts["skipped"]}, **sparse,
                samples_per_s=rate, tokens_per_s=rate * tokens,
                **log.speed((2 if frozen else 3) * forward * rate / world.size, world.device, cfg.precision))
            clock = dict.fromkeys(clock, 0.0)
    log.close()


def blank(cfg):
    """The net on meta: names and shapes without values."""
    with torch.device("meta"):
        net = DiT(MODELS[cfg.model], remat=cfg.remat)
        if cfg.lora_rank:
            add_lora(net, "main", cfg.lora_rank, cfg.lora_alpha)
    return net


def loss_of(net, micro, cfg, device):
    """The loss of one micro-batch: text dropped here and there, t by its density, then flow matching."""
    x0, text, null, drop, u, e = (x.to(device, non_blocking=True) for x in micro[:6])
    text = torch.where((drop < cfg.text_dropout)[:, None, None], null, text)
    return flow_loss(net, x0, text, sample_t(u, cfg.t, cfg.shift), e)


def binder(net, cfg, world):
    """-> bind(shape, step) -> (net(x_t, t, text) as the losses see it for latents (…, F, H, W), its metadata)."""
    adapter = net.adapters[0] if net.adapters else None

    @cache
    def sequence(length):
        return LOCAL if world.sp == 1 else Seq(*parallel.ulysses(attention, length, world))

    def bind(shape, step):
        tokens = token_grid(net.config, shape)
        metadata = cfg.window and build_metadata(tokens, cfg.tile, window_at(step, cfg, tokens), device=world.device)
        seq = sequence(math.prod(tokens))
        return partial(net, metadata=metadata, dense_ends=cfg.dense_ends, lora=adapter, seq=seq), metadata

    return bind


def window_at(step, cfg, tokens):
    """Tiles seen per axis at update `step`: from all of them to cfg.window, in equal parts over cfg.window_steps."""
    done = min(1.0, step / cfg.window_steps) if cfg.window_steps else 1.0
    tiles = [math.ceil(n / size) for n, size in zip(tokens, cfg.tile)]
    return tuple(round(n + (min(w, n) - n) * done) for n, w in zip(tiles, cfg.window))


# ---- the door -------------------------------------------------------------------------------------------------------


@contextmanager
def door():
    """Bad input is refused in one line, exit code 2; a bug further on keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def resolve(cfg):
    """The config with None replaced by the model's defaults; ValueError for values that are impossible together."""
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    row = DEFAULTS[cfg.model]._asdict()
    cfg = replace(cfg, **{name: row[name] for name in row.keys() & asdict(cfg).keys()} | given)
    if cfg.schedule != "constant" and cfg.decay_steps is None:
        cfg = replace(cfg, decay_steps=cfg.steps)
    if cfg.lora_rank and not cfg.init:
        raise ValueError(f"--lora_rank={cfg.lora_rank}: adapters need weights to adapt, which --init names")
    if cfg.lora_alpha is not None and not (cfg.lora_rank and cfg.lora_alpha > 0):
        raise ValueError(f"--lora_alpha={cfg.lora_alpha} is above 0, and needs --lora_rank")
    if cfg.lora_rank and cfg.lora_alpha is None:
        cfg = replace(cfg, lora_alpha=float(cfg.lora_rank))
    if len(cfg.dry_run) > 2 or min(cfg.dry_run, default=1) < 1:
        raise ValueError(f"--dry_run {' '.join(map(str, cfg.dry_run))}: takes a number of ranks, perhaps GB of each")
    if unknown := set(cfg.allow) - set(asdict(cfg)):
        raise ValueError(f"--allow {' '.join(sorted(unknown))}: no such flag")
    for name, low in dict(steps=1, batch=1, lr=0, guidance=0, warmup=0, log_every=0, val_every=0, save_every=0, keep=1,
                          val=0, samples=0, window_steps=0, dense_ends=0, lora_rank=0).items():
        if not low <= asdict(cfg)[name] < math.inf:
            raise ValueError(f"--{name}={asdict(cfg)[name]} is not {low} or more")
    if not 0 < cfg.shift < math.inf:
        raise ValueError(f"--shift={cfg.shift} is not above 0")
    if not 0 <= cfg.text_dropout < 1 or not 0 <= cfg.ema < 1:
        raise ValueError(f"--text_dropout={cfg.text_dropout} --ema={cfg.ema}: both are in [0, 1)")
    if cfg.window is None and (cfg.window_steps or cfg.dense_ends):
        raise ValueError("--window_steps and --dense_ends shape --window, which is not given")
    return cfg


def fit(config, cfg, data):
    """The model's config, if the dataset fits it."""
    channels, width = data.shapes[0][0], data.manifest["text"]["width"]
    if (channels, width) != (config.channels, config.text_dim):
        fitting = [name for name, c in MODELS.items() if (c.channels, c.text_dim) == (channels, width)] or "no model"
        raise ValueError(f"{cfg.data} has {channels} channels and text of width {width}; --model={cfg.model} takes "
                         f"{config.channels} and {config.text_dim}; {fitting} would fit")
    if config.heads % cfg.sp:
        raise ValueError(f"--sp={cfg.sp} does not divide the {config.heads} heads of --model={cfg.model}")
    for shape in data.shapes:
        tokens = token_grid(config, shape)
        if cfg.window:
            build_metadata(tokens, cfg.tile, cfg.window)
    return config


def plan(cfg):
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
        fit(MODELS[cfg.model], cfg, data)
        shapes, length = data.shapes, data.manifest["text"]["length"]
    net = blank(cfg)
    takes, bind = parallel.memory(net, world, precision), binder(net, cfg, world)
    held = {"parameters": takes["parameters"], "gradients": takes["gradients"], "optimizer": 2 * takes["gradients"],
            "average": takes["gradients"], "gathered copies": takes["gathered"]}
    seen = {f"activations of {micro} x {shape}": activations(bind(shape, 0)[0], (micro, *shape), length, precision)[1]
            for shape in shapes}
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    there = (1e9 * elsewhere[0], math.inf) if elsewhere else room(device, ranks, ckpt.nearest(cfg.out))
    ways = {"--remat": not cfg.remat, "a smaller --micro_batch": micro > 1, "--shard=-1": world.mesh.size(1) < ranks,
            "--sp": cfg.sp < ranks, "--lora_rank": not cfg.lora_rank, "more ranks": True}
    return budget(f"train.py --model={cfg.model}, ranks: {ranks}", held, seen, 16 * trained, cfg.keep + 1, there, ways)


# ---- now and then ---------------------------------------------------------------------------------------------------


def due(step, every):
    return every > 0 and step % every == 0


@torch.no_grad()
def validate(bind, data, cfg, world):
    """Flow-matching loss at fixed samples, noise and levels t: held-out samples, or the first where there are none."""
    ids, name = data.held_out, "val_loss"
    if not ids:
        ids, name = range(min(cfg.val or 16, data.count)), "train_set_loss"
    total = torch.zeros(2, BINS, device=world.device)
    for i in range(world.data_rank, math.ceil(len(ids) / world.data_size) * world.data_size, world.data_size):
        j = i % len(ids)        # every rank forwards equally often, the repeated samples not counted
        x0, text = (x.to(world.device) for x in data.sample([ids[j]]))
        net, _ = bind(x0.shape)
        for strata in torch.arange(STRATA).split(cfg.micro_batch or 16):
            e = torch.stack([normal(stream(cfg.seed, "val", 0, j * STRATA + k), x0.shape[1:]) for k in strata.tolist()])
            t, n = ((strata + 0.5) / STRATA).to(world.device), len(strata)
            _, seen = flow_loss(net, x0.expand(n, -1, -1, -1, -1), text.expand(n, -1, -1), t, e.to(world.device))
            total += (i < len(ids)) * seen["loss_by"]
    total = parallel.mean({"loss": total}, world)["loss"]
    return {name: (total[0].sum() / total[1].sum()).item()} | unfold({f"{name}_by": total})


@torch.no_grad()
def sample(bind, data, cfg, world):
    """Latents (n, C, F, H, W), normalised, of fixed prompts and noise: captions of the dataset, held-out ones first."""
    shape = data.shape_of(data.held_out[0] if data.held_out else 0)
    ids = list(islice((int(i) for i in chain(data.held_out, data.train) if data.shape_of(i) == shape), cfg.samples))
    per_rank = math.ceil(len(ids) / world.data_size)            # equal, for ranks that share weights forward in step
    row, (net, _) = DEFAULTS[cfg.model], bind(shape)
    latents = torch.zeros(per_rank * world.data_size, *shape, device=world.device)
    for places in (torch.arange(per_rank) + world.data_rank * per_rank).split(cfg.micro_batch or 16):
        some = [place % len(ids) for place in places.tolist()]
        z = torch.stack([normal(stream(cfg.seed, "sample", 0, i), shape) for i in some]).to(world.device)
        _, text = data.sample([ids[i] for i in some])
        text, null = text.to(world.device), data.null.to(world.device).expand_as(text)
        latents[places] = euler(net, z, text, grid(row.sample_steps, row.sample_shift), null, cfg.guidance)
    latents = parallel.mean({"x0": latents}, world)["x0"] * world.data_size     # each rank's part, zeros elsewhere
    return latents[:len(ids)], [data.caption(i) for i in ids]


def show(latents, captions, step, data, cfg, world, log):
    """Videos of the sampled latents into the run's folder; the latents themselves where no VAE is given."""
    if world.rank > 0:
        return
    mean, std = (torch.tensor(data.manifest[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    latents = latents.cpu() * std + mean
    coder = codec.load(data.manifest["codec"], vae=cfg.vae, device=world.device)
    if not coder.decodes:
        path = log.file("samples", step, "npy")
        np.save(path, latents.numpy())
        log.say(f"step {step}: latents in {path}, for want of --vae to decode them")
        return
    path = log.file("samples", step, "mp4")
    codec.write_video(path, [coder.decode(z) for z in latents], data.manifest["fps"])
    log.video(step, path, captions)


if __name__ == "__main__":
    main(tyro.cli(Config))
    parallel.leave()
