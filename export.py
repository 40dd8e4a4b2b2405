"""Weights of a run for other programs: `python export.py --ckpt=out/train --format=diffusers --out=out/export`.

    --format     read by                                    with --lora by
    diffusers    WanTransformer3DModel.from_pretrained      WanPipeline.load_lora_weights
    comfy        ComfyUI, from its diffusion_models         ComfyUI, from its loras
    wan          Wan's own code, whose names are ours       (it has no LoRA)

Runs on one process, one tensor at a time, whatever number of ranks wrote the checkpoint. The folder appears once it has
been read back bit for bit; nanovideo.json in it says how to sample, null_text.pt holds the null text, which guidance
leads away from. Imports model, ckpt, flags.
"""
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import ckpt
import flags
from model import MODELS, chunk_of, shapes_of


@dataclass(frozen=True)
class Config:
    """Export the weights of a run, verified, under the names that another program reads."""

    ckpt: str = "out/train"                         # a run's folder (its newest checkpoint), or a checkpoint
    weights: Literal["ema", "net"] = "ema"          # ema: averaged weights, net: those of the last update
    format: Literal["wan", "diffusers", "comfy"] = "diffusers"      # program whose names to write
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"    # dtype of every tensor
    shard_gb: float = 5.0                           # largest file, in GB; comfy is always one file
    out: str = "out/export"                         # folder to write, new or empty

    # of a run with LoRA, one of the first two
    lora: bool = False                              # export only the adapter
    merge: bool = False                             # fold the adapter into the weights under it
    base: str | None = None                         # weights to merge into; None = the run's own

    # of one of Wan 2.2's two experts
    other: str | None = None                        # the other expert's run: both are exported


def main(cfg):
    with flags.door(__file__):
        if cfg.shard_gb <= 0:
            raise ValueError(f"--shard_gb={cfg.shard_gb}: above 0")
        made = [made_of(cfg.ckpt, cfg, Path(cfg.out).name)]
        if cfg.other:
            made = both_of(made[0], cfg)
        elif made[0].sampling.get("expert"):
            print(f"{cfg.ckpt} is the expert for {made[0].sampling['expert']} noise: --other=RUN exports both, as "
                  "pipelines want them")
        folders = {}
        for one in made:
            folders[part_of(one, cfg)] = one
        export(cfg.out, folders, DTYPES[cfg.dtype], index_of(made, cfg))

    for one in made:
        print(f"{one.origin}: {len(one.source.shapes)} tensors, read back bit for bit, in")
    for file in sorted(Path(cfg.out).rglob("*")):
        if file.is_file():
            print(f"  {file}  {file.stat().st_size / 1e6:,.1f} MB")
    for one in made:
        if "note" in one.beside["nanovideo.json"]:
            print(one.beside["nanovideo.json"]["note"])
    if cfg.lora:
        for one in made:
            print(f"It adapts {needed(one.base)}")


class Made(NamedTuple):
    """What is written of one net."""
    source: ckpt.Source     # tensors under the program's names
    stem: str               # of their files
    shard: float            # bytes of a file at most
    beside: dict            # {name: JSON} of further files
    null: torch.Tensor
    sampling: dict
    base: dict | None       # what an adapter is for
    origin: str             # for messages


def made_of(path, cfg, name):
    """A run's net, or its adapter alone, as the program reads it -> Made. name: of comfy's file."""
    whole = ckpt.stored(path, {cfg.weights, "null"})
    saved = ckpt.role_of(whole, cfg.weights)
    check(saved, cfg)
    meta, step = saved.manifest["meta"], saved.manifest["step"]
    told = {"checkpoint": saved.origin, "step": step, "sampling": saved.sampling}
    if ckpt.adapts(saved):
        told["base"] = meta["base"]     # what the adapter is for, or is folded into
    causal = chunk_of(saved.sampling["window"], saved.sampling["tile"])
    if causal:
        told["note"] = CAUSAL.format(frames=causal, chunks=-saved.sampling["window"][0])
    beside = {"nanovideo.json": told}
    stem, shard = "diffusion_pytorch_model", cfg.shard_gb * 1e9
    if cfg.format == "comfy":
        stem, shard = name, math.inf

    if cfg.lora:
        source = lora_file(saved, meta["config"]["lora_alpha"], cfg.format)
        stem, shard = "pytorch_lora_weights" if cfg.format == "diffusers" else stem, math.inf
    else:
        source = ckpt.merged(saved, cfg.base) if cfg.merge else saved
        config = MODELS[saved.sampling["model"]]
        ckpt.match(shapes_of(saved.sampling["model"]), source.shapes, source.origin)
        source = ckpt.renamed(source, NAMES[cfg.format])
        if cfg.format in CONFIG:
            beside["config.json"] = CONFIG[cfg.format](config, saved.sampling)
    origin = f"{saved.origin}, step {step}"
    return Made(source, stem, shard, beside, whole.tensor("null"), saved.sampling, meta.get("base"), origin)


def both_of(mine, cfg):
    """[Made] of two experts, that for high noise first."""
    if cfg.base:
        raise ValueError("--base is of one adapter: merge into the runs' own bases, or export one expert at a time")
    other = made_of(cfg.other, cfg, Path(cfg.out).name)
    for path, one in ((cfg.ckpt, mine), (cfg.other, other)):
        if "expert" not in one.sampling:
            raise ValueError(f"{path} is {one.sampling['model']}, not one of two experts: --other does not apply")
    made = sorted((mine, other), key=lambda one: one.sampling["expert"])
    experts = [one.sampling["expert"] for one in made]
    if experts != ["high", "low"]:
        raise ValueError(f"{cfg.ckpt} and {cfg.other} are both the expert for {experts[0]} noise")
    for name in ("model", "boundary", "times"):
        if mine.sampling.get(name) != other.sampling.get(name):
            raise ValueError(f"two experts of one {name}: {mine.sampling.get(name)} of {cfg.ckpt} and "
                             f"{other.sampling.get(name)} of {cfg.other} do not go together")
    if cfg.format == "comfy":
        made = [one._replace(stem=f"{one.stem}_{one.sampling['expert']}_noise") for one in made]
    return made


def part_of(one, cfg):
    """The folder of an expert within --out, as pipelines have it; "" where --out is that of one net."""
    if not cfg.other:
        return ""
    part = {"diffusers": 0, "wan": 1}.get(cfg.format)
    expert = one.sampling["expert"]
    return f"{expert}_noise" if part is None else ckpt.EXPERTS[expert][part]


def index_of(made, cfg):
    """{name: JSON} beside the folders of two experts: how both are sampled, and diffusers' index of its pipeline."""
    if not cfg.other:
        return {}
    sampling = {name: value for name, value in made[0].sampling.items() if name != "expert"}
    beside = {"nanovideo.json": {"sampling": sampling}}
    if cfg.format == "diffusers" and not cfg.lora:
        image = MODELS[sampling["model"]].image
        net = ["diffusers", "WanTransformer3DModel"]
        beside["model_index.json"] = {
            "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline", "_diffusers_version": "0.35.0",
            "boundary_ratio": sampling["boundary"], "expand_timesteps": False,
            "transformer": net, "transformer_2": net,
            "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
        if image:
            beside["model_index.json"] |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return beside


# ---- formats --------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CAUSAL = ("These weights are causal: a chunk of {frames} latent frames sees the last {chunks} chunks up to its own, as "
          "sample.py does. Other programs would run them bidirectionally, which they were not trained for.")
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}    # in safetensors
NAMES = {
    "wan": lambda name: name,
    "diffusers": ckpt.to_diffusers,
    "comfy": lambda name: f"model.diffusion_model.{name}",
}


def wan_config(config, sampling):
    """config.json as Wan's WanModel reads it."""
    return {"_class_name": "WanModel", "_diffusers_version": "0.30.0",
            "model_type": model_type(config),
            "dim": config.dim, "num_layers": config.blocks, "num_heads": config.heads,
            "ffn_dim": config.ffn, "freq_dim": config.freq_dim,
            "in_dim": config.channels + config.image, "out_dim": config.channels,
            "text_len": sampling["text"]["length"], "eps": config.eps}


def model_type(config):
    """Wan's word for what a model makes videos from."""
    if config.image:
        return "i2v"
    return "ti2v" if config == MODELS["wan2.2-5b"] else "t2v"


def diffusers_config(config, sampling):
    """config.json as diffusers' WanTransformer3DModel reads it."""
    return {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0",
            "num_layers": config.blocks, "num_attention_heads": config.heads,
            "attention_head_dim": config.dim // config.heads, "ffn_dim": config.ffn,
            "in_channels": config.channels + config.image, "out_channels": config.channels,
            "patch_size": list(config.patch), "text_dim": config.text_dim,
            "freq_dim": config.freq_dim, "eps": config.eps,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
            "image_dim": config.clip_dim if config.clip_dim else None,
            "added_kv_proj_dim": config.dim if config.clip_dim else None,
            "pos_embed_seq_len": None, "rope_max_seq_len": 1024}


CONFIG = {"wan": wan_config, "diffusers": diffusers_config}


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def check(saved, cfg):
    """ValueError where the flags do not fit the run."""
    if not ckpt.adapts(saved):
        if cfg.lora or cfg.merge or cfg.base:
            raise ValueError(f"{saved.origin} has no adapter: --lora, --merge and --base do not "
                             "apply")
    elif cfg.lora == cfg.merge:
        raise ValueError(f"{saved.origin} is an adapter: --lora (it alone) or --merge (folded into "
                         "the weights)")
    elif cfg.lora and cfg.base:
        raise ValueError("--base is for --merge: the adapter alone needs no weights under it")
    if cfg.lora and cfg.format == "wan":
        raise ValueError("--format=wan: Wan has no LoRA files, choose diffusers or comfy")


def needed(base):
    """What an adapter by itself is loaded over, in words."""
    path = base["path"]
    if not ckpt.flags_of(path, path).get("lora_rank"):
        return f"the weights of {path}"
    return (f"the weights of {path} with its own adapter folded in, not those under it: "
            f"python export.py --ckpt={path} --merge --out=NEW writes them")


def lora_file(saved, alpha, format):
    """The adapter as diffusers or ComfyUI have it. diffusers' files have no alpha: alpha / r is multiplied into B."""
    tensors = {}
    for full in saved.shapes:
        module, factor = re.split(r"\.lora\.\w+\.", full)
        if format == "diffusers":
            x = saved.tensor(full)
            tensors[f"transformer.{ckpt.to_diffusers(module)}.lora_{factor}.weight"] = (
                x * (alpha / x.shape[1]) if factor == "B" else x)
        else:
            side = {"A": "down", "B": "up"}[factor]
            tensors[f"diffusion_model.{module}.lora_{side}.weight"] = saved.tensor(full)
            tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(alpha))
    return ckpt.in_memory(tensors, saved.origin)


# ---- files ----------------------------------------------------------------------------------------------------------

def export(out, folders, dtype, beside):
    """Writes nets {folder within out: Made} as safetensors and their null text, and checks what it wrote.

    Several files get the index that diffusers and Wan have. beside: {name: JSON} of further files in out itself.
    out must not exist or be empty (FileExistsError) and appears only when complete and read back bit for bit.
    """
    out = Path(out)
    part = out.with_name(f"{out.name}.tmp")
    for path in (out, part):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} is there and not empty: name another --out")
    part.mkdir(parents=True, exist_ok=True)
    try:
        for folder, made in folders.items():
            write_net(part / folder, made, dtype)
        for name, value in beside.items():
            write_json(part / name, value)
        for folder in {*folders, ""}:
            torch.save(made.null.clone(), part / folder / ckpt.NULL)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_net(folder, one, dtype):
    """Writes a Made to a folder, and reads it back."""
    folder.mkdir(exist_ok=True)
    write_shards(folder, one.source, dtype, one.shard, one.stem)
    written = ckpt.files(folder)
    ckpt.match(one.source.shapes, written.shapes, folder)
    for name in one.source.shapes:
        if not same_bits(written.tensor(name), cast(one.source.tensor(name), dtype)):
            raise OSError(f"{folder}: {name} reads back otherwise than written")
    for name, value in one.beside.items():
        write_json(folder / name, value)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_shards(folder, source, dtype, limit, stem):
    """Fills one file after the other in the source's order; a tensor is never cut."""
    shards, size = [[]], 0
    for name, shape in source.shapes.items():
        n = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    if len(shards) == 1:
        return write_file(folder / f"{stem}.safetensors", source, shards[0], dtype)
    where = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, source, names, dtype)
        where |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in source.shapes.values()) * dtype.itemsize
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    (folder / f"{stem}.safetensors.index.json").write_text(index, encoding="utf-8")


def write_file(file, source, names, dtype):
    """safetensors: the header's length in 8 bytes, the header, the tensors. So one tensor at a time is in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # numbers, which are fp32, come first: so every tensor is aligned
    names = sorted(names, key=lambda name: len(source.shapes[name]) > 0)
    for name in names:
        shape, kind = source.shapes[name], dtype if source.shapes[name] else torch.float32
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            whole = source.tensor(name)
            x = cast(whole, dtype)
            if not ckpt.is_finite(x):
                raise ValueError(f"{name} reaches {whole.abs().max():.3g}, which {dtype} cannot hold: "
                                 "--dtype=bfloat16 or --dtype=float32 can")
            f.write(x.flatten().view(torch.uint8).numpy())


def cast(tensor, dtype):
    """A tensor as it is exported; a 0-d one (alpha) stays fp32."""
    return tensor.to(dtype if tensor.ndim else torch.float32).contiguous()


def same_bits(a, b):
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


if __name__ == "__main__":
    main(flags.read(Config))
