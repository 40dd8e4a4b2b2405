"""A page on which a causal model's video goes on for as long as one looks: `python demo.py --ckpt=out/distill`.

A caption typed there is that of every chunk that is begun from then on. The video goes on from the same past: keys and
values of earlier chunks stay as they were computed, under the caption of their time, until the window has left them.
Page i shows video i of `sample.py --n` from the same seed, from its first frame. Nothing grows with the length: the
past has as many chunks as window and sink, whose places there are all that they know of time. Imports model and leaves.
"""
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

import torch

import ckpt
import codec
import flags
import parallel
import step
import viewer
from data import long_noise, padded
from model import NO_CACHE, Cond, blank, causal_window, chunk_of, chunked, lengths


@dataclass(frozen=True)
class Config:
    """Look at the video of a causal checkpoint while it is made, in a browser on this machine."""

    ckpt: str = "out/distill"                           # run folder (its newest checkpoint) or checkpoint, causal
    weights: Literal["ema", "net"] = "ema"              # ema: averaged weights, net: those of the last update
    prompt: str = "a red circle moving left"            # caption until another one is typed
    window: int | None = None                           # chunks seen, its own among them; None: as trained
    sink: int = 1                                       # first chunks that are seen always; 0: what is shown may leave
    seed: int = 0                                       # random seed; page i gets the same noise in every run
    fps: float | None = None                            # frames a second at most; None: the checkpoint's own
    port: int = 8000                                    # port of the page on 127.0.0.1; 0: any that is free
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is a GPU
    vae: str | None = None                              # folder or hub id of the Wan VAE; codec wan only
    text: str | None = None                             # folder or hub id of the UMT5 text encoder; codec wan only


def main(cfg):
    with flags.door(__file__):
        world = parallel.init(cfg.device)
        saved = ckpt.stored(cfg.ckpt, [cfg.weights, "null"], **world.ranks)
        sampling = saved.sampling
        if not chunk_of(sampling["window"], sampling["tile"]):
            raise ValueError(f"{cfg.ckpt} is not causal, it makes a clip at once: sample.py makes its clips")
        cfg = flags.filled(cfg, {"fps": sampling["fps"]})
        flags.above(cfg, 0, "fps")
        window, tile = causal_window(sampling, cfg.window, cfg.sink), sampling["tile"]
        server = viewer.opened(cfg.port)

        coder = codec.load(sampling["codec"], vae=cfg.vae, text=cfg.text, device=world.device, decodes=True)

        def embed(caption):
            return padded(coder.embed([caption]), sampling["text"]).to(world.device)

        embed(cfg.prompt)       # refused here, not when a page asks
        null = padded([saved.tensor("null")], sampling["text"]).to(world.device)
        channels, _, *size = sampling["shapes"][0]
        endless = channels, 1 << 30, *size
        net = blank(sampling["model"])
        shapes = 1 + lengths(net.config, endless, window, tile, cfg.sink)
        weights = ckpt.model_of(saved, cfg.weights, **world.ranks)
        parallel.frozen(net, world, partial(ckpt.fill, source=weights), shapes)
        causal = chunked(net, endless, world, window, tile, sink=cfg.sink)
    if not causal.cached:
        world.say(NO_CACHE)
    world.say(f"http://127.0.0.1:{server.server_port} shows {cfg.ckpt}; Ctrl-C ends it")
    made = partial(videos, causal, coder, sampling, null, cfg.seed)
    viewer.serve(server, cfg.prompt, embed, made, cfg.fps)


@torch.no_grad()
def videos(net, coder, sampling, null, seed, i, now):
    """Yields the videos of stream i's chunks, without end, each made, and then seen, under the text in now["read"]."""
    mean, std = codec.moments(coder.spec | sampling)
    shape, noises, state = sampling["shapes"][0], step.noises_of(sampling), None
    cond, uncond = Cond(now["read"]), Cond(null)
    for begin in count(0, net.chunk):
        drawn = []
        for k in range(noises):
            e = long_noise(seed, "sample", k, noises, [i], shape, begin, begin + net.chunk)
            drawn.append(e.to(null.device))
        cond = cond._replace(text=now["read"])
        x0 = step.at_once(net, sampling, cond, uncond, *drawn)
        video, state = coder.decode_on(x0[0].cpu() * std + mean, state)
        yield video
        cond = net.see(cond, x0)
        if sampling["guidance"] != 1:       # else nobody asks for it
            uncond = net.see(uncond, x0)


if __name__ == "__main__":
    main(flags.read(Config))
    parallel.leave()
