"""Videos from a checkpoint and a few words: `python sample.py --ckpt=out/train --prompts "a red circle moving left"`.

A checkpoint stands alone: model, codec, normalisation, null text, sampler and its times are in it. Weights of others,
and what export.py wrote, are sampled by `--ckpt=FILE_OR_FOLDER --model=wan-1.3b --vae=WAN --text=WAN`, and any of them
with an adapter on top by `--lora=FILE`. What was trained with first frames begins with a picture by `--image=FILE`, or
with each of a folder, which have captions of their own. Many GPUs share the videos, which are the same whatever their
number: `torchrun --nproc_per_node=8 -- sample.py …` (without --, torchrun takes --n for a flag of its own). Imports
model and leaves.

B batch · C F H W latent channels, frames, rows, columns · S text tokens · E text width · K sampling steps
"""
import math
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import ckpt
import codec
import films
import flags
import parallel
import step
from data import long_noise, padded
from model import (MODELS, NO_CACHE, USUAL, Pair, bind, blank, caches, causal_window, check_begun, chunk_of, chunked,
                   cond_of, lengths, models_of, shapes_of, token_grid)


@dataclass(frozen=True)
class Config:
    """Sample videos from a checkpoint. A sampling flag that is None takes the checkpoint's own value."""

    ckpt: str = "out/train"                             # a run, a checkpoint, an export, or weights of others
    other: str | None = None                            # the other of two experts, likewise; None: beside --ckpt
    weights: Literal["ema", "net"] = "ema"              # ema: averaged weights, net: those of the last update
    model: Literal[tuple(MODELS)] | None = None         # model size, of weights that are not ours
    lora: str | None = None                             # adapter to add: a run of ours, or a file of any trainer
    other_lora: str | None = None                       # the same for --other
    lora_scale: float = 1.0                             # strength of --lora and --other_lora
    prompts: tuple[str, ...] = ()                       # prompts, each in quotes
    file: str | None = None                             # text file with more prompts, one per line
    negative: str | None = None                         # prompt to guide away from; None: training's null text
    image: str | None = None                            # picture or film whose first frame begins each video; a folder
    last_image: str | None = None                       # picture with which a model of 36 channels is to end
    n: int = 1                                          # videos per prompt
    out: str = "out/samples"                            # folder for the videos
    seed: int = 0                                       # random seed; video i gets the same noise in every run

    steps: int | None = None                            # number of sampling steps
    guidance: float | tuple[float, float] | None = None # s in u + s (c - u); 1: none; of two experts: HIGH LOW
    shift: float | None = None                          # shift of the sampling times towards noise
    solver: Literal["euler", "ab2"] | None = None       # ab2: second order, as good in a third of the steps
    size: tuple[int, int, int] | None = None            # frames, height, width in pixels; None: most clips' size

    frames: int | None = None                           # of a causal model: pixel frames, as many as you like
    window: int | None = None                           # causal: chunks seen, its own among them; None: as trained
    sink: int = 0                                       # causal: first chunks that are seen always, beside these

    batch: int | None = None                            # videos that a rank samples at once; None: what 8 GB hold
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is a GPU
    precision: Literal["fp32", "bf16"] | None = None    # what the net computes in; None: bf16 on a GPU, else fp32
    vae: str | None = None                              # folder or hub id of the Wan VAE; codec wan only
    text: str | None = None                             # folder or hub id of the UMT5 text encoder; codec wan only
    clip: str | None = None                             # folder or hub id of CLIP; Wan 2.1 image-to-video only


# How weights are sampled that do not say it themselves; the VAE says the rest.
WAN = dict(
    steps=50,
    shift=5.0,
    guidance=5.0,
    first_frame=0.0,
    fps=16,
    stride=[4, 8, 8],
)
DEFAULTS = {
    "wan-1.3b": WAN | dict(shift=3.0),
    "wan2.2-5b": WAN | dict(fps=24, stride=[4, 16, 16], first_frame=0.5),   # it takes first frames
    "wan-14b": WAN,
    "wan-14b-i2v": WAN,
    "wan2.2-a14b": WAN | dict(steps=40, shift=12.0, guidance=(4.0, 3.0)),
    "wan2.2-a14b-i2v": WAN | dict(steps=40, guidance=(3.5, 3.5)),
}


def main(cfg):
    with flags.door(__file__):
        world = parallel.init(cfg.device, precision=cfg.precision)
        captions, images = asked_of(cfg)
        mine = range(world.rank, len(captions), world.size)
        sources, null, sampling = found(cfg, world)
        sampling = chosen(sampling, cfg)
        shapes = latent_shapes(images, sampling, cfg)
        prompts = [captions[i] for i in mine]
        negative = cfg.negative
        if not negative and null is None:
            negative = ""
        if negative is not None:
            prompts.append(negative)
        texts = embedded(prompts, sampling, cfg, world.device)
        if negative is not None:
            null = texts[negative]
        torch.cuda.empty_cache()    # the text encoder is gone before the VAE and the net come
        coder = codec.load(sampling["codec"], vae=cfg.vae, device=world.device, decodes=True)
        if chunk_of(sampling["window"], sampling["tile"]):
            for shape in set(shapes):
                codec.check_chunks(coder.spec, shape)
        mean, std = codec.moments(coder.spec | sampling)
        eyes, begun = codec.load(sampling["codec"], clip=cfg.clip, device=world.device), {}
        for i in mine:
            if images[i] and images[i] not in begun:
                begun[images[i]] = begin_with(images[i], shapes[i], sampling, coder, eyes, cfg)
        del eyes        # CLIP is gone before the net comes
        config, pattern = MODELS[sampling["model"]], (sampling["window"], sampling["tile"])
        met = sum(1 + lengths(config, shape, *pattern, cfg.sink) for shape in set(shapes))
        fills = [partial(ckpt.fill, source=source) for source in sources]
        nets = [parallel.frozen(blank(sampling["model"]), world, fill, met) for fill in fills]
        if chunk_of(*pattern) and not chunked(nets[0], shapes[0], world, *pattern, sink=cfg.sink).cached:
            world.say(NO_CACHE)

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / file_name(i, caption) for i, caption in enumerate(captions)]
    hidden = True if world.rank > 0 else None       # None: on a terminal only
    for places in tqdm(batches_of(mine, shapes, config, sampling, cfg), unit="batch", disable=hidden):
        shape = shapes[places[0]]
        free, extras = None, {}
        if cfg.image:
            extras = stacked([begun[images[i]] for i in places], world.device)
        if "first" in extras:
            given = extras.pop("first")
            free = step.first_given(given.expand(-1, -1, shape[1], -1, -1), torch.ones(len(given), device=world.device))

        def draw(k, begin, end):
            """Frames [begin, end) of noise k; the image is in place in the first frame of noise 0."""
            count, piece = step.noises_of(sampling), tuple(sampling["shapes"][0])
            if piece[2:] != shape[2:] or chunk_of(*pattern) is None:
                piece = shape
            e = long_noise(cfg.seed, "sample", k, count, places, piece, begin, end).to(world.device)
            if k > 0 or begin > 0 or free is None:
                return e
            return step.place(e, given.expand_as(e), free[:, :end])

        text = padded([texts[captions[i]] for i in places], sampling["text"])
        uncond = padded([null] * len(places), sampling["text"])
        cond = cond_of(text.to(world.device), extras)
        uncond = cond._replace(text=uncond.to(world.device))
        some = [files[i] for i in places]
        with torch.no_grad():
            if chunk_of(*pattern):
                causal = chunked(nets[0], shape, world, *pattern, sink=cfg.sink)
                chunks = by_chunks(causal, draw, cond, uncond, shape, sampling, free)
                write_on(some, (x0.cpu() * std + mean for x0 in chunks), coder, sampling["fps"])
                continue
            bound = bound_to(nets, shape, sampling, world)
            x0 = step.sample(bound, partial(draw, begin=0, end=shape[1]), cond, uncond, sampling, free)
        for file, z in zip(some, x0.cpu() * std + mean):
            codec.write_video(file, [coder.decode(z)], sampling["fps"])

    parallel.agree(True, world)     # all ranks have written theirs
    if world.rank == 0:
        contact_sheet(out / "sheet.png", files, captions, shapes, coder.stride, sampling["fps"])
        print(f"{len(files)} videos and sheet.png are in {out}/")
        others = sorted(file.name for file in set(out.glob("[0-9][0-9][0-9][0-9]_*.mp4")) - set(files))
        if others:
            print(f"there too from before, not on the sheet: {ckpt.some_of(others)}")


def by_chunks(net, draw, cond, uncond, shape, sampling, free):
    """Yields x0 (B, C, f, H, W) of the next chunk of these videos, of shape (C, F, H, W), until they are whole."""
    def cut():
        for begin in range(0, shape[1], net.chunk):
            end = min(begin + net.chunk, shape[1])
            given = None if free is None or begin > 0 else free[:, :end]
            yield given, *[draw(k, begin, end) for k in range(step.noises_of(sampling))]

    def made(cond, uncond, free, z, *noises):
        return step.at_once(net, sampling, cond, uncond, z, *noises, free=free)

    if sampling["guidance"] == 1:
        uncond = None       # nobody asks for it, so it need not see
    return step.by_chunks(made, net.see, (cond, uncond), cut())


def write_on(files, chunks, coder, fps):
    """Writes the videos of latents that come chunk by chunk, (B, C, f, H, W) not normalised, holding one chunk."""
    with ExitStack() as opened:
        films = [opened.enter_context(codec.film(file, fps)) for file in files]
        states = [None] * len(files)
        for chunk in chunks:
            for i, z in enumerate(chunk):
                video, states[i] = coder.decode_on(z, states[i])
                for picture in video:
                    films[i](codec.grid([picture]))


def found(cfg, world):
    """What is sampled: [Source] of its weights, of two experts that for high noise first, the null text, None where
    that is the empty prompt, and how.

    An adapter of ours is sampled as its run was, whatever the weights under it say.
    """
    if cfg.lora_scale != 1 and not cfg.lora and not cfg.other_lora:
        raise ValueError(f"--lora_scale={cfg.lora_scale} needs --lora")
    if not math.isfinite(cfg.lora_scale):
        raise ValueError(f"--lora_scale={cfg.lora_scale}: a finite number")
    source, null, sampling = net_of(cfg.ckpt, cfg.lora, cfg.model, None, cfg, world)
    model = sampling["model"]
    if cfg.model not in (None, model):
        raise ValueError(f"--model={cfg.model}, but {cfg.ckpt} is {model}")
    boundary = MODELS[model].boundary
    if not boundary:
        if cfg.other or cfg.other_lora:
            raise ValueError(f"--other and --other_lora are for two experts, {cfg.ckpt} is {model}")
        return [source], null, sampling
    expert = sampling.get("expert", "high")
    path = other_path(cfg, expert)
    other, _, its = net_of(path, cfg.other_lora, model, ckpt.other_of(expert), cfg, world)
    check_together(cfg.ckpt, sampling, path, its)
    both = [source, other] if expert == "high" else [other, source]
    return both, null, sampling | {"boundary": boundary}


def net_of(path, lora, model, expert, cfg, world):
    """A net: the Source of its weights, with an adapter folded in, the null text beside them, and how to sample it.

    model: for weights that do not say it. expert: which of two it must be, None = whichever it is, else "high".
    """
    own = ckpt.sampling_of(lora) if lora else None
    if own and expert is None:
        expert = own.get("expert")
    if is_a_run(path, cfg):
        saved = ckpt.stored(path, [cfg.weights, "null"], **world.ranks)
        source, null, sampling = ckpt.model_of(saved, cfg.weights), saved.tensor("null"), saved.sampling
    elif cfg.weights != "ema" and path == cfg.ckpt:
        raise ValueError(f"--weights={cfg.weights}: {path} is no run of ours, it holds one net")
    else:
        beside = ckpt.sampling_of(path)
        if beside is None:
            beside = {"model": model}
        if expert is None and beside["model"] in MODELS and MODELS[beside["model"]].boundary:
            expert = beside.get("expert", "high")
        source, sampling = ckpt.weights(path, expert=expert, **world.ranks), told(path, model)
        null = ckpt.null_of(path, **world.ranks)
    for named, told_by in ((path, sampling), (lora, own)):
        if expert and told_by and told_by.get("expert", expert) != expert:
            raise ValueError(f"{named} is the expert for {told_by['expert']} noise, wanted is that for {expert} noise "
                             "too: both make a video")
    ckpt.match(shapes_of(sampling["model"]), source.shapes, source.origin, models_of)
    if lora:
        source = ckpt.folded(source, ckpt.lora(lora, **world.ranks), cfg.lora_scale)
    if own and "times" not in sampling:     # a student's adapter makes it a student; a student stays one
        sampling, null = own, ckpt.null_of(lora, **world.ranks)
    return source, null, sampling


def is_a_run(path, cfg):
    """Whether a path is a run or checkpoint of ours, or was meant to be one."""
    return ckpt.is_ours(path) or not Path(path).exists() and cfg.model is None


def other_path(cfg, expert):
    """Where the other expert is: --other, else beside --ckpt."""
    other = cfg.other
    if other is None and not is_a_run(cfg.ckpt, cfg):
        other = ckpt.beside(cfg.ckpt, expert)
    if other is None:
        raise ValueError(f"{cfg.ckpt} is the expert for {expert} noise of two that make videos together: --other=PATH "
                         f"names that for {ckpt.other_of(expert)} noise")
    return other


def check_together(path, sampling, other_path, other):
    """ValueError where one of two experts is a few-step student and the other none, or one of other times."""
    times = [some.get("times", "of any grid") for some in (sampling, other)]
    if times[0] != times[1]:
        raise ValueError(f"two experts sample at the same times: those of {path} are {times[0]}, of {other_path} "
                         f"{times[1]}")


def bound_to(nets, shape, sampling, world):
    """The net, or the two experts as one, for latents of this shape, attending as it was trained."""
    how = [sampling[name] for name in ("window", "tile", "dense_ends")]
    bounds = [bind(net, shape, world, *how) for net in nets]
    return bounds[0] if len(bounds) == 1 else Pair(*bounds, sampling["boundary"])


def told(path, model):
    """How to sample weights that are in no checkpoint: as export.py wrote beside them, else by the model's row."""
    sampling = ckpt.sampling_of(path)
    if sampling is not None:
        return sampling
    if model not in DEFAULTS:
        raise ValueError(f"{path} does not say what it is, as checkpoints do and what export.py writes with its "
                         f"nanovideo.json: give --model, one of {', '.join(DEFAULTS)}")
    row, (shape, length) = DEFAULTS[model], USUAL[model]
    return {
        "model": model,
        "codec": {"name": "wan", "channels": shape[0], "stride": row["stride"], "text_length": length},
        "shapes": [shape],
        "fps": row["fps"],
        "text": {"length": length, "width": MODELS[model].text_dim},
        "window": None,
        "tile": (4, 4, 8),
        "dense_ends": 0,
        "sampler": "euler",
        "steps": row["steps"],
        "shift": row["shift"],
        "guidance": row["guidance"],
        "first_frame": row["first_frame"],
    }


def asked_of(cfg):
    """The caption of each video, every prompt n times, and the image that it begins with, None without --image."""
    prompts = list(cfg.prompts)
    if cfg.file:
        prompts += films.read_text(cfg.file).split("\n")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    images = [cfg.image] * len(prompts)
    if cfg.image and Path(cfg.image).is_dir():
        if prompts:
            raise ValueError(f"--image={cfg.image} is a folder, whose images have captions of their own: leave "
                             "--prompts and --file out, or give one image")
        images, prompts = captioned(cfg.image)
    elif cfg.image and not Path(cfg.image).exists():
        raise FileNotFoundError(f"--image={cfg.image}: no such file or folder")
    if not prompts or cfg.n < 1 or (cfg.batch is not None and cfg.batch < 1):
        raise ValueError(f"{len(prompts)} prompts, --n={cfg.n}, --batch={cfg.batch}: "
                         "give --prompts \"…\" or --file, and 1 or more of each")
    return [[x for x in some for _ in range(cfg.n)] for some in (prompts, images)]


def captioned(folder):
    """The images and films of a folder and those below it, and the caption of each."""
    names, passed = films.listed(folder)
    if passed or not names:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(passed.items())[:3])
        raise ValueError(f"--image={folder}: {why if passed else 'no images in it'}")
    lists, captions = films.captions(folder), []
    for name in names:
        caption = films.caption_of(folder, name, lists)
        if not caption:
            raise ValueError(f"--image={folder}: {name} has no caption in {Path(name).stem}.txt or captions.jsonl")
        captions.append(caption)
    return [str(Path(folder) / name) for name in names], captions


def chosen(sampling, cfg):
    """The checkpoint's sampling block with what the flags change; a student keeps the times it was trained for."""
    given = dict(steps=cfg.steps, guidance=cfg.guidance, shift=cfg.shift, solver=cfg.solver)
    given = {name: value for name, value in given.items() if value is not None}
    if "times" in sampling and given:
        raise ValueError(f"{cfg.ckpt} is a student distilled for times {sampling['times']} "
                         f"without guidance: {', '.join(given)} cannot be chosen")
    sampling = sampling | given
    steps, shift, guidance = sampling.get("steps", 1), sampling["shift"], sampling["guidance"]
    scales = guidance if isinstance(guidance, (tuple, list)) else [guidance]
    if steps < 1 or not 0 < shift < math.inf or not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(f"--steps={steps} --shift={shift} --guidance={guidance}: "
                         "steps are 1 or more, the shift is above 0, the guidance not below")
    if len(scales) > 1 and not MODELS[sampling["model"]].boundary:
        raise ValueError(f"--guidance {' '.join(map(str, scales))}: {sampling['model']} is one net, it takes one scale")
    if cfg.negative and all(scale == 1 for scale in scales):
        raise ValueError("--negative does nothing without guidance")
    return sampling | {"window": window_of(sampling, cfg)}


def window_of(sampling, cfg):
    """The pattern's window, of a causal one as the flags say."""
    if chunk_of(sampling["window"], sampling["tile"]):
        return causal_window(sampling, cfg.window, cfg.sink)
    if (cfg.frames, cfg.window, cfg.sink) != (None, None, 0):
        raise ValueError(f"--frames={cfg.frames} --window={cfg.window} --sink={cfg.sink}: {cfg.ckpt} is not causal, it "
                         "makes a clip at once; --size has its frames")
    return sampling["window"]


def latent_shape(sampling, cfg):
    """(C, F, H, W) of the latents to sample; training lists the bucket with the most clips first."""
    channels, strides = sampling["codec"]["channels"], sampling["codec"]["stride"]
    if cfg.size is None:
        usual = tuple(sampling["shapes"][0])
        if cfg.frames is None:
            return usual
        if cfg.frames < 1 or (cfg.frames - 1) % strides[0]:
            raise ValueError(f"--frames={cfg.frames}: they are 1 + a multiple of {strides[0]}")
        return (channels, (cfg.frames - 1) // strides[0] + 1, *usual[2:])
    if cfg.frames is not None:
        raise ValueError(f"--frames={cfg.frames}: --size has frames too, give one of them")
    f, h, w = cfg.size
    steps = [s * p for s, p in zip(strides, MODELS[sampling["model"]].patch)]
    if (f - 1) % strides[0] or h % steps[1] or w % steps[2] or min(cfg.size) < 1:
        raise ValueError(f"--size {f} {h} {w}: frames are 1 + a multiple of {strides[0]}, "
                         f"height of {steps[1]}, width of {steps[2]}")
    return (channels, (f - 1) // strides[0] + 1, h // strides[1], w // strides[2])


def latent_shapes(images, sampling, cfg):
    """(C, F, H, W) of each video; with an image, that of the shapes trained on which is nearest to it in aspect."""
    usual = latent_shape(sampling, cfg)
    is_shown = MODELS[sampling["model"]].image > 0
    if (cfg.last_image or cfg.clip) and not is_shown:
        raise ValueError(f"--last_image and --clip do not apply: {cfg.ckpt} is {sampling['model']}, which is shown no "
                         "images beside its latents")
    if is_shown and not cfg.image:
        raise ValueError(f"{cfg.ckpt} is {sampling['model']}, which makes videos that begin with an image: "
                         "--image=PATH names it")
    if not cfg.image:
        return [usual] * len(images)
    if not is_shown:
        check_begun(sampling, f"--image={cfg.image}", cfg.ckpt)
    choice = {}
    for C, F, H, W in [usual] if cfg.size else sampling["shapes"]:
        frames = usual[1] if cfg.frames and F > 1 else F
        if frames > 1:
            choice.setdefault((H, W), (C, frames, H, W))
    if not choice:
        raise ValueError(f"--image={cfg.image}: after an image, a video has more frames than one, and {cfg.ckpt} is "
                         "asked for one")
    found = {}
    for image in images:
        if image not in found:
            with named(image):
                found[image] = choice[films.nearest(choice, *films.head(image).size)]
    return [found[image] for image in images]


@torch.no_grad()
def begin_with(image, shape, sampling, coder, eyes, cfg):
    """What an image is to the net {name: tensor}: a latent frame of its own ("first"), or what a model that is shown
    images has beside its latents, under the names of a dataset's extra tensors."""
    config = MODELS[sampling["model"]]
    video = picture(image, shape, coder.stride)
    if not config.image:
        mean, std = codec.moments(coder.spec | sampling)
        return {"first": (coder.encode(video) - mean) / std}
    last = None
    if cfg.last_image:
        last = picture(cfg.last_image, shape, coder.stride, "last_image")[0]
    name = "image" if last is None else "image_ends"
    extras = {name: coder.show(video[0], (shape[1] - 1) * coder.stride[0] + 1, last)}
    if config.clip_dim:
        extras["clip"] = eyes.see(video[0])
        width = extras["clip"].shape[-1]
        if width != config.clip_dim:
            raise ValueError(f"--clip={cfg.clip} sees tokens of width {width}, {sampling['model']} takes "
                             f"{config.clip_dim}")
    return extras


def stacked(rows, device):
    """[{name: tensor}] of videos -> {name: (B, …)} on the device."""
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def picture(image, shape, stride, flag="image"):
    """An image, or a film's first frame, cropped to the size of latents (C, F, H, W) -> video of one frame."""
    with named(image, flag):
        video, _ = next(films.read_video(image, sizes=[(shape[2] * stride[1], shape[3] * stride[2])], frames=1, fps=1,
                                         report=lambda note: print(f"{image}: {note}")))
    return video


@contextmanager
def named(image, flag="image"):
    """Says which image it is that cannot be read."""
    try:
        yield
    except (ValueError, OSError) as reason:
        raise ValueError(f"--{flag}={image}: {reason}") from reason


def batches_of(mine, shapes, config, sampling, cfg):
    """The places of the videos that are sampled at once, all of one shape -> [[place]]."""
    batches = []
    for shape in dict.fromkeys(shapes[i] for i in mine):
        places = [i for i in mine if shapes[i] == shape]
        at_once = cfg.batch
        if at_once is None:
            given = bool(cfg.image) and not config.image
            at_once = batch_size(config, shape, sampling, given, cfg.sink)
        batches += [places[i:i + at_once] for i in range(0, len(places), at_once)]
    return batches


def embedded(prompts, sampling, cfg, device):
    """{prompt: (S_i, E)}. The text encoder is loaded here and freed on return.

    Prompts are embedded one by one: rows embedded together differ in the last bits with what they are padded to.
    """
    coder = codec.load(sampling["codec"], text=cfg.text, device=device)
    rows = {}
    for prompt in dict.fromkeys(prompts):
        rows[prompt], = coder.embed([prompt])
        if len(rows[prompt]) > sampling["text"]["length"]:
            raise ValueError(f"{prompt!r} has {len(rows[prompt])} tokens, "
                             f"the model was trained with {sampling['text']['length']} at most")
    return rows


def batch_size(config, shape, sampling, given=False, sink=0):
    """As many videos as 8 GB hold beside the weights, from 1 to 8; given: whether their first frames are.

    In bf16, a forward without gradient holds at most 40 bytes per token and model channel (Wan's models 34 to 38), in
    fp32 at most 64, and 52 more where frames are given, for a t per token. 81 frames of 480 x 832 are 32,760 tokens:
    2.0 GB a video of wan-1.3b, so 3 at once; 6.7 GB of wan-14b, whose weights are 29 GB. Of a causal model it is a
    chunk's tokens, and the past's k and v in bf16, twice where there is guidance: 0.29 GB for each latent frame of
    wan-1.3b's 480 x 832.
    """
    f, h, w = token_grid(config, shape)
    pattern = sampling["window"], sampling["tile"]
    chunk = chunk_of(*pattern)
    each = 92 if given else 40
    held = each * f * h * w * config.dim
    if chunk and caches(config, shape, *pattern):
        past = min(f, (sink - pattern[0][0]) * chunk) * h * w
        texts = 1 if sampling["guidance"] == 1 else 2
        held = each * min(f, chunk) * h * w * config.dim + texts * 4 * config.blocks * past * config.dim
    return min(max(1, int(8e9 / held)), 8)


def file_name(i, caption):
    """0003_a_red_circle.mp4"""
    words = re.sub(r"\W+", "_", caption.lower())[:60].strip("_")
    return f"{i:04d}_{words}.mp4"


def contact_sheet(path, files, captions, shapes, stride, fps):
    """A picture of six frames of each video. They are read back from the files: in memory they would not all fit."""
    strips, shown = [], []
    for file, caption, shape in zip(files, captions, shapes):
        frames, h, w = (shape[1] - 1) * stride[0] + 1, shape[2] * stride[1], shape[3] * stride[2]
        size = round(h * min(1, 160 / h)), round(w * min(1, 160 / h))
        if file.exists():       # nodes that share no disk keep their own
            (video, _), = films.read_video(file, sizes=[size], frames=frames, fps=fps)
            strips.append(video[[round(i * (frames - 1) / 5) for i in range(6)]])
            shown.append(caption)
    codec.contact_sheet(path, strips, shown)


if __name__ == "__main__":
    main(flags.read(Config))
    parallel.leave()
