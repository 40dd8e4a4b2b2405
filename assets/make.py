"""Makes the pictures of README from its own runs: `python assets/make.py`, after train.py and distill.py.

    clips.webp      eight captioned clips of out/train
    long.webp       clips of twice as many frames, by the causal student out/stream
    steps.webp      the same prompts by the teacher (50 network calls), undistilled in 4 steps, by the student in 4
    curves.png      of out/train
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ckpt
import codec
import parallel
from data import long_noise, padded
from model import Cond, bind, blank, causal_window, chunk_of, chunked
from step import noises_of, sample

CAPTIONS = ["a red circle moving left", "a blue square moving up", "a green triangle moving right",
            "a yellow circle moving down", "a purple square moving left", "a cyan triangle moving up",
            "a orange circle moving right", "a white square moving down"]
ZOOM, LABEL, GAP, APART = 4, 20, 8, 28      # screen pixels: of a clip's, of a caption, around, between columns
INK, PAPER = (40, 40, 40), (255, 255, 255)


def clips(folder, captions, world, sampling=None, times=1):
    """Clips (n, F, H, W, 3) uint8 of a run's newest checkpoint, by its own sampler or another; times: how long."""
    saved = ckpt.stored(ROOT / folder, ["ema", "null"])
    sampling = sampling or saved.sampling
    coder = codec.load(sampling["codec"])
    fill = partial(ckpt.fill, source=ckpt.model_of(saved, "ema"))
    net = parallel.frozen(blank(sampling["model"]), world, fill)
    shape = tuple(sampling["shapes"][0])
    pattern, see = (sampling["window"], sampling["tile"]), None
    if chunk_of(*pattern):
        net = chunked(net, shape, world, causal_window(sampling), pattern[1])
        see = net.see
    else:
        net = bind(net, shape, world, *pattern, sampling["dense_ends"])
    text = padded(coder.embed(captions), sampling["text"])
    uncond = Cond(saved.tensor("null").expand_as(text))
    frames, count, places = times * (shape[1] - 1) + 1, noises_of(sampling), range(len(captions))

    def draw(k):
        return long_noise(0, "sample", k, count, places, shape, 0, frames)

    with torch.no_grad():
        x0 = sample(net, draw, Cond(text), uncond, sampling, see=see)
    mean, std = codec.moments(sampling)
    return np.stack([coder.decode(z * std + mean) for z in x0])


def animate(path, rows, columns, names=None, fps=8):
    """A looping picture: rows [[(clip, label)]], each clip (F, H, W, 3) enlarged, its label under it."""
    frames, h, w, _ = rows[0][0][0].shape
    left = 0 if names is None else 150
    cell_w, cell_h = w * ZOOM + APART, h * ZOOM + LABEL + GAP
    font = ImageFont.load_default(11)
    pages = []
    for f in range(frames):
        page = Image.new("RGB", (left + columns * cell_w + GAP, len(rows) * cell_h + GAP), PAPER)
        pen = ImageDraw.Draw(page)
        for i, row in enumerate(rows):
            top = GAP + i * cell_h
            if names is not None:
                pen.multiline_text((GAP, top + h * ZOOM // 2 - 14), names[i], INK, font)
            for j, (clip, label) in enumerate(row):
                picture = Image.fromarray(clip[f]).resize((w * ZOOM, h * ZOOM), Image.NEAREST)
                x = left + GAP + j * cell_w
                page.paste(picture, (x, top))
                pen.text((x, top + h * ZOOM + 3), label.removeprefix("a ").removeprefix("an "), INK, font)
        pages.append(page)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 // fps, loop=0, quality=80, method=6)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def main():
    here, world = ROOT / "assets", parallel.init("cpu")
    teacher = clips("out/train", CAPTIONS, world)
    pairs = list(zip(teacher, CAPTIONS))
    animate(here / "clips.webp", [pairs[:4], pairs[4:]], 4)

    long = clips("out/stream", CAPTIONS[:4], world, times=2)
    animate(here / "long.webp", [list(zip(long, CAPTIONS))], 4)

    student = ckpt.stored(ROOT / "out/distill", ["null"]).sampling
    few = clips("out/train", CAPTIONS[:4], world, student)
    distilled = clips("out/distill", CAPTIONS[:4], world)
    names = ["teacher\n50 network calls", "teacher\nin the student's 4 steps", "student\n4 network calls"]
    rows = [list(zip(some, CAPTIONS)) for some in (teacher[:4], few, distilled)]
    animate(here / "steps.webp", rows, 4, names)
    curves = Image.open(ROOT / "out/train/curves.png").convert("RGB").quantize(64)
    curves.save(here / "curves.png", optimize=True)


if __name__ == "__main__":
    main()
    parallel.leave()
