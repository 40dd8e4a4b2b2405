"""Videos from a checkpoint and a few words: `python sample.py --ckpt=out/train --prompts "a red circle moving left"`.

A checkpoint stands alone: model, codec, normalisation, null text, sampler and its times are in it. Imports model and
leaves.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width · K sampling steps
"""
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import ckpt
import codec
import parallel
from attention import build_metadata
from data import normal, stream
from model import MODELS, DiT, token_grid
from step import euler, grid, rollout


@dataclass(frozen=True)
class Config:
    """Sample videos from a checkpoint. A flag whose default is None takes the checkpoint's own value."""

    ckpt: str = "out/train"                               # a run's folder (its newest checkpoint) or one checkpoint
    weights: Literal["ema", "net"] = "ema"                # averaged weights, or those of the last update
    prompts: tuple[str, ...] = ()                         # what to show, each in quotes
    file: str | None = None                               # more prompts, one per line
    negative: str | None = None                           # what guidance leads away from; None = training's null
    n: int = 1                                            # videos per prompt
    out: str = "out/samples"                              # folder of the videos
    seed: int = 0                                         # of the noise; video i has the same noise in every run

    steps: int | None = None                              # sampling steps
    guidance: float | None = None                         # scale s of u + s (c - u); 1 = none
    shift: float | None = None                            # shift of the time grid towards noise
    size: tuple[int, int, int] | None = None              # frames, height, width in pixels; None = the largest bucket's

    batch: int = 8                                        # videos sampled at once
    device: Literal["auto", "cpu", "cuda"] = "auto"       # auto = cuda where there is one
    precision: Literal["fp32", "bf16"] | None = None      # None = bf16 on cuda, fp32 on cpu
    vae: str | None = None                                # folder or hub id of the Wan VAE, for latents of it
    text: str | None = None                               # the same of the UMT5 text encoder


def main(cfg):
    with door():
        world = parallel.init(cfg.device)
        prompts = list(cfg.prompts) + (Path(cfg.file).read_text().splitlines() if cfg.file else [])
        prompts = [p for p in prompts if p.strip()]
        if not prompts or min(cfg.n, cfg.batch) < 1:
            raise ValueError(f"{len(prompts)} prompts, --n={cfg.n}, --batch={cfg.batch}: give --prompts \"…\" or --file, "
                             "and 1 or more of each")
        saved = ckpt.stored(ckpt.latest(cfg.ckpt) or cfg.ckpt)
        how = sampling(saved.manifest["meta"]["sampling"], cfg)
        coder = codec.load(how["codec"], vae=cfg.vae, text=cfg.text, device=world.device)
        text = embed(coder, prompts, how)
        null = embed(coder, [cfg.negative], how) if cfg.negative else saved.tensor("null")[None]
        shape = latent_shape(coder, how, cfg)
        source = ckpt.model_of(saved, cfg.weights)

    with torch.device("meta"):
        net = DiT(MODELS[how["model"]])
    precision = cfg.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    parallel.prepare(net, world, precision=precision, trainable=False)
    ckpt.fill(parallel.local_rows(net), source)
    tokens = token_grid(net.config, shape)
    metadata = how["window"] and build_metadata(tokens, tuple(how["tile"]), tuple(how["window"]), device=world.device)
    net = partial(net, metadata=metadata, dense_ends=how["dense_ends"])

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    mean, std = (torch.tensor(how[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    videos, captions = [], [prompt for prompt in prompts for _ in range(cfg.n)]
    for places in tqdm(torch.arange(len(captions)).split(cfg.batch), unit="batch", disable=None):
        some = text[places // cfg.n].to(world.device)
        noises = [torch.stack([normal(stream(cfg.seed, "sample", k, i), shape) for i in places.tolist()])
                  .to(world.device) for k in range(len(how.get("times", "1")))]
        with torch.no_grad():
            x0 = draw(net, noises, some, null.to(world.device).expand_as(some), how)
        for i, z in zip(places.tolist(), x0.cpu() * std + mean):
            videos.append(coder.decode(z))
            name = re.sub(r"\W+", "_", captions[i].lower())[:60].strip("_")
            codec.write_video(out / f"{i:04d}_{name}.mp4", [videos[-1]], how["fps"])
    codec.contact_sheet(out / "sheet.png", videos, captions)
    print(f"{len(videos)} videos and sheet.png are in {out}/")


@contextmanager
def door():
    """Bad input is refused in one line, exit code 2; a bug further on keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def sampling(how, cfg):
    """The checkpoint's sampling block with what the flags change; a student keeps the times it was trained for."""
    given = dict(steps=cfg.steps, guidance=cfg.guidance, shift=cfg.shift)
    given = {name: value for name, value in given.items() if value is not None}
    if "times" in how and given:
        raise ValueError(f"{cfg.ckpt} is a student distilled for times {how['times']} without guidance: "
                         f"{', '.join(given)} cannot be chosen")
    how = how | given
    if how.get("steps", 1) < 1 or not 0 < how["shift"] < math.inf or not 0 <= how["guidance"] < math.inf:
        raise ValueError(f"--steps={how['steps']} --shift={how['shift']} --guidance={how['guidance']}: steps are 1 or "
                         "more, the shift above 0, the guidance not below")
    if cfg.negative and how["guidance"] == 1:
        raise ValueError("--negative does nothing without guidance")
    return how


def embed(coder, prompts, how):
    """Prompts -> (n, S, E), padded with zeros as in training."""
    rows = coder.embed(prompts)
    text = torch.zeros(len(rows), how["text"]["length"], how["text"]["width"])
    for padded, row, prompt in zip(text, rows, prompts):
        if len(row) > len(padded):
            raise ValueError(f"{prompt!r} has {len(row)} tokens, the model was trained with {len(padded)} at most")
        padded[:len(row)] = row
    return text


def latent_shape(coder, how, cfg):
    """(C, F, H, W) of the latents to sample."""
    if cfg.size is None:
        return tuple(max(how["shapes"], key=math.prod))
    strides, patch = coder.stride, MODELS[how["model"]].patch
    f, h, w = cfg.size
    steps = [s * p for s, p in zip(strides, patch)]
    if (f - 1) % strides[0] or h % steps[1] or w % steps[2] or min(cfg.size) < 1:
        raise ValueError(f"--size {f} {h} {w}: frames are 1 + a multiple of {strides[0]}, height of {steps[1]}, "
                         f"width of {steps[2]}")
    return (coder.spec["channels"], (f - 1) // strides[0] + 1, h // strides[1], w // strides[2])


def draw(net, noises, text, null, how):
    """x0 by the checkpoint's sampler: Euler with guidance, or the student's few steps, each with fresh noise."""
    if "times" in how:
        return rollout(net, noises[0], text, how["times"], noises[1:], len(how["times"]) - 1)
    return euler(net, noises[0], text, grid(how["steps"], how["shift"]), null, how["guidance"])


if __name__ == "__main__":
    main(tyro.cli(Config))
    parallel.leave()
