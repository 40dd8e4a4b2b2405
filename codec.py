"""Pixels and words to latents and text embeddings, and back to an mp4: the only file that knows any of the three.

`load` gives a Codec, a handful of plain functions: "dct" is built in and needs no weights; "wan" is Wan's VAE and UMT5,
from a folder or the Hugging Face hub. `write_video`, `write_clips` and `contact_sheet` show clips to people. Imports
nothing of ours.

C F H W latent channels, frames, rows, columns · f h w the same in pixels · S text tokens · E text width
A video is uint8 (f, h, w, 3) in numpy; latents z are fp32 (C, F, H, W), not normalised.
"""
import hashlib
import html
import json
import math
import re
import textwrap
import unicodedata
import warnings
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from statistics import NormalDist
from typing import Callable, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

import torch
from einops import rearrange


class Codec(NamedTuple):
    spec: dict          # all that `load` needs to build this codec again; manifests and checkpoints carry it
    stride: tuple       # pixels per latent along frames, rows and columns; the first frame is a latent frame of its own
    encode: Callable    # video -> z
    decode: Callable    # z -> video
    decode_on: Callable     # a clip's next chunk z, state (None at its first) -> video, state: joined, as decode's
    embed: Callable     # [prompt] -> [fp32 (S_i, E)], S_i <= spec["text_length"]; "" is the unconditional prompt
    decodes: bool       # whether `decode` works: wan without its VAE cannot
    show: Callable      # first picture, frames, last picture or None -> y like z, *normalised*: what an image-to-video
                        # model is shown, a clip of these pictures and grey ones; a picture is (h, w, 3), wan alone
    see: Callable       # picture -> fp32 (tokens, width): what CLIP sees in it, wan alone


def load(spec, *, vae=None, text=None, clip=None, device="cpu", text_length=None, decodes=False):
    """A Codec from its name, "dct" or "wan", or from the spec that a manifest or a checkpoint carries.

    vae, text, clip: for wan, a local folder or a hub id of a diffusers pipeline; each may be None if it is not needed.
    text_length: the most tokens of a prompt, None = the codec's own (dct 8, wan 512). decodes: it must.
    The weights are freed with the Codec: load the text encoder, embed, drop it, then load the VAE.
    Raises ValueError or FileNotFoundError for weights that are not what is wanted, ImportError for a missing package.
    """
    spec = {"name": spec} if isinstance(spec, str) else spec
    if text_length is not None:
        spec = spec | {"text_length": text_length}
    if decodes and spec["name"] == "wan" and not vae:
        raise ValueError("--vae=PATH is wanted: the VAE that the model's latents were made with")
    if spec["name"] == "wan":
        return wan(spec, vae, text, clip, device)
    if spec["name"] != "dct":
        raise ValueError(f"no codec is called {spec['name']!r}: there are 'dct' and 'wan'")
    if vae or text or clip:
        raise ValueError("the dct codec has no weights: --vae, --text and --clip are for wan")
    return dct(spec)


def to_bytes(x):
    """Pixels, a float tensor (f, h, w, 3) of which [0, 1] is kept -> video."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def check_video(video, stride):
    """Refuses a video that the strides do not divide."""
    (frames, height, width, _), (f, h, w) = video.shape, stride
    if (frames - 1) % f or height % h or width % w:
        raise ValueError(f"{frames} frames of {height}x{width} pixels: this codec takes 1 + a multiple of {f} frames, "
                         f"rows in multiples of {h} and columns in multiples of {w}")


def check_chunks(spec, shape):
    """ValueError for latents (C, F, H, W) that this codec cannot decode chunk by chunk."""
    height, width = (n * stride for n, stride in zip(shape[2:], spec["stride"][1:]))
    if "vae_sha256" in spec and height * width > LARGE:
        raise ValueError(f"{height}x{width} pixels: above {LARGE} the VAE works in tiles of a whole clip, and so "
                         "decodes no chunks")


def moments(sampling):
    """mean and std of latents (C, 1, 1, 1), from a checkpoint's sampling block or a manifest: z = x0 std + mean."""
    mean, std = (torch.tensor(sampling[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    return mean, std


def psnr(a, b):
    """Peak signal-to-noise ratio of each frame, in dB: two videos -> (f,), inf where they are equal."""
    mse = np.square(np.float64(a) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / mse)


# ----------------------------------------------------------------------------------------------------------------------
# dct: a block of 4 frames x 4 rows x 4 columns x 3 colours becomes its first C cosines, and nothing is learned

DCT = {"name": "dct", "channels": 24, "stride": [4, 4, 4], "text_width": 64, "text_length": 8}


def dct(spec):
    spec = DCT | spec
    f, h, w = spec["stride"]
    basis = torch.from_numpy(dct_basis(spec["channels"], f, h, w))                  # (C, 3 f h w), orthonormal rows

    def encode(video):
        check_video(video, spec["stride"])
        x = torch.from_numpy(video).float() / 255 - 0.5
        x = torch.cat([x[:1].expand(f - 1, -1, -1, -1), x])                         # the first frame fills a group
        blocks = rearrange(x, "(F f) (H h) (W w) c -> F H W (c f h w)", f=f, h=h, w=w)
        return rearrange(blocks @ basis.T, "F H W C -> C F H W").contiguous()

    def decode(z):
        return decode_on(z, None)[0]

    def decode_on(z, state):
        blocks = rearrange(z.cpu().float(), "C F H W -> F H W C") @ basis
        x = rearrange(blocks, "F H W (c f h w) -> (F f) (H h) (W w) c", c=3, f=f, h=h, w=w)
        if state is None:
            x = torch.cat([x[:f].mean(0, keepdim=True), x[f:]])
        return to_bytes(x + 0.5), "begun"

    def embed(prompts):
        return [embed_words(prompt, spec["text_width"], spec["text_length"]) for prompt in prompts]

    def never(*_):
        raise ValueError("no model is shown pictures by the dct codec: they are for wan")

    return Codec(spec, tuple(spec["stride"]), encode, decode, decode_on, embed, True, never, never)


def dct_basis(channels, f, h, w):
    """The first `channels` products of an opponent colour and three DCT-II cosines, lowest frequencies first.

    Sorted by kt + ky + kx + 2 [chroma], then kt, colour, ky, kx -> fp32 (channels, 3 f h w), its rows orthonormal.
    """
    def cosines(n):
        k, x = np.arange(n)[:, None], np.arange(n) + 0.5
        return np.cos(np.pi / n * k * x) * np.where(k == 0, 1, 2**0.5) / n**0.5             # (frequency, place)

    opponent = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])    # grey, red-blue, green
    basis = np.einsum("ac,if,jh,kw->aijkcfhw", opponent, cosines(f), cosines(h), cosines(w))
    order = sorted(np.ndindex(3, f, h, w), key=lambda q: (sum(q[1:]) + 2 * (q[0] > 0), q[1], q[0], q[2:]))
    return np.float32([basis[q].ravel() for q in order[:channels]])


def embed_words(prompt, width, length):
    """One row per word or mark, after a row for the beginning: the word's vector + half the place's -> (S, width)."""
    words = ["<bos>"] + re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", prompt).lower())
    if len(words) > length:
        raise ValueError(f"a prompt of {len(words) - 1} words, and this codec takes {length - 1}: {prompt!r}")
    return torch.stack([word_vector(word, width) + 0.5 * word_vector(f"<{place}>", width)
                        for place, word in enumerate(words)])


@lru_cache(maxsize=None)
def word_vector(word, width):
    """(width,) N(0, 1) numbers that depend on the word alone, so that a new word is as distinct as any other."""
    bits = np.frombuffer(hashlib.shake_256(word.encode()).digest(4 * width), "<u4")
    return torch.tensor([NormalDist().inv_cdf((int(n) + 0.5) / 2**32) for n in bits])


# ----------------------------------------------------------------------------------------------------------------------
# wan: diffusers' AutoencoderKLWan and transformers' UMT5, each loaded only when it is asked for

PIPELINE = "a diffusers pipeline such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CLIP_PIPELINE = "a diffusers pipeline such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
LARGE = 1280 * 720      # pixels per frame above which the VAE works in tiles


def wan(spec, vae, text, clip, device):
    spec = {"name": "wan", "text_length": 512} | spec

    def absent(*_, flag, pipeline=PIPELINE):
        raise ValueError(f"the wan codec lacks this part: {flag}=PATH is wanted, a folder of {pipeline}")

    encode = decode = decode_on = show = partial(absent, flag="--vae")
    embed, see = partial(absent, flag="--text"), partial(absent, flag="--clip", pipeline=CLIP_PIPELINE)
    if vae:
        found, encode, decode, decode_on, show = wan_vae(vae, device)
        spec = agree(spec, found, f"--vae={vae}")
    if text:
        found, embed = wan_text(text, spec["text_length"], device)
        spec = agree(spec, found, f"--text={text}")
    if clip:
        found, see = wan_clip(clip, device)
        spec = agree(spec, found, f"--clip={clip}")
    return Codec(spec, tuple(spec.get("stride", ())), encode, decode, decode_on, embed, bool(vae), show, see)


def wan_vae(path, device):
    """-> what the VAE adds to the spec, encode, decode, decode_on, show. Latents are the posterior's mean, fp32."""
    folder = part_of(path, "vae")
    check_family(folder, "_class_name", "AutoencoderKLWan")
    vae, report = need("diffusers").AutoencoderKLWan.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True)
    check_keys(folder, report)
    vae = vae.to(device).eval().requires_grad_(False)
    config = vae.config
    stride = [config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial]
    spec = {"channels": config.z_dim, "stride": stride, "vae_sha256": sha256(folder),
            "mean": list(config.latents_mean), "std": list(config.latents_std)}

    def pixels(video):
        return torch.from_numpy(video).to(device).float() / 127.5 - 1

    def latents(x):
        check_video(x, stride)
        vae.use_tiling = x.shape[1] * x.shape[2] > LARGE
        return vae.encode(rearrange(x, "f h w c -> 1 c f h w")).latent_dist.mode()[0].cpu()

    def encode(video):
        return latents(pixels(video))

    def show(first, frames, last=None):
        x = torch.zeros(frames, *first.shape, device=device)    # grey, which no byte is
        if last is not None:
            x[-1] = pixels(last)
        x[0] = pixels(first)
        mean, std = moments(spec)
        return (latents(x) - mean) / std

    def seen(x):
        return to_bytes(rearrange(x, "1 c f h w -> f h w c") / 2 + 0.5)

    def decode(z):
        vae.use_tiling = z.shape[2] * stride[1] * z.shape[3] * stride[2] > LARGE
        return seen(vae.decode(z[None].to(device).float()).sample)

    @torch.no_grad()
    def decode_on(z, state):
        """As vae.decode, frame by frame; state: what its convolutions hold of the frames before."""
        check_chunks(spec, z.shape)
        vae.clear_cache()
        held, first = list(vae._feat_map), state is None
        if state is not None:
            held = list(state)
        x = vae.post_quant_conv(z[None].to(device).float())
        frames = []
        for frame in x.split(1, 2):
            begins = dict(first_chunk=True) if first else {}
            frames.append(vae.decoder(frame, feat_cache=held, feat_idx=[0], **begins))
            first = False
        x = torch.cat(frames, 2)
        if config.patch_size is not None:
            x = need("diffusers.models.autoencoders.autoencoder_kl_wan").unpatchify(x, patch_size=config.patch_size)
        return seen(x.clamp(-1, 1)), held

    return spec, encode, decode, decode_on, show


def wan_clip(path, device):
    """-> what CLIP adds to the spec, see: the states before its last layer, by which Wan 2.1 is told the first frame.

    Pictures are resized and cropped as the pipeline's own image processor says.
    """
    folder, eyes = part_of(path, "image_encoder"), part_of(path, "image_processor")
    check_family(folder, "model_type", "clip_vision_model", CLIP_PIPELINE)
    if not (eyes / "preprocessor_config.json").exists():
        eyes = folder.parent / "image_processor"
    if not (eyes / "preprocessor_config.json").exists():
        raise FileNotFoundError(f"{path} has an image encoder and no image processor; wanted is {CLIP_PIPELINE}")
    processor = need("transformers").CLIPImageProcessor.from_pretrained(eyes)
    encoder, report = need("transformers").CLIPVisionModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    check_keys(folder, report)
    encoder = encoder.to(device).eval().requires_grad_(False)
    config = encoder.config
    spec = {"clip_tokens": (config.image_size // config.patch_size)**2 + 1, "clip_width": config.hidden_size,
            "clip_sha256": sha256(folder)}

    def see(picture):
        x = processor(images=picture, return_tensors="pt").pixel_values.to(device)
        return encoder(x, output_hidden_states=True).hidden_states[-2][0].float().cpu()

    return spec, see


def wan_text(path, length, device):
    """-> what the text encoder adds to the spec, embed. It runs in bf16 on a GPU, fp32 on a CPU; padding is cut off."""
    folder, words = part_of(path, "text_encoder"), part_of(path, "tokenizer")
    check_family(folder, "model_type", "umt5")
    if not (words / "tokenizer_config.json").exists():
        words = folder.parent / "tokenizer"
    if not (words / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"{path} has a text encoder and no tokenizer; wanted is {PIPELINE}")
    tokenizer = need("transformers").AutoTokenizer.from_pretrained(words)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    encoder, report = need("transformers").UMT5EncoderModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True)
    check_keys(folder, report)
    encoder = encoder.to(device).eval().requires_grad_(False)
    spec = {"text_width": encoder.config.d_model, "text_length": length, "text_sha256": sha256(folder)}

    def embed(prompts):
        tokens = tokenizer([clean(prompt) for prompt in prompts], padding=True, return_tensors="pt")
        sizes = tokens.attention_mask.sum(1).tolist()
        for prompt, size in zip(prompts, sizes):
            if size > length:
                raise ValueError(f"a prompt of {size} tokens, and this encoder takes {length}: {prompt[:80]!r} ...")
        states = encoder(**tokens.to(device)).last_hidden_state.float().cpu()
        return [row[:size].clone() for row, size in zip(states, sizes)]

    return spec, embed


def clean(prompt):
    """Mended Unicode, no HTML entities, single spaces: what Wan's own pipelines do before the tokenizer."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(need("ftfy").fix_text(prompt)))).strip()


def need(package):
    """An optional package, imported now."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"the wan codec needs {package}: pip install -r requirements-wan.txt ({error})") from error


def part_of(path, part):
    """The folder of one part of a diffusers pipeline: path/part, or path itself; of a hub id, that part is fetched."""
    folder = Path(path)
    if not folder.exists():
        missing = f"no folder {path}; wanted is {PIPELINE}, downloaded or by that name"
        if len(folder.parts) != 2 or folder.is_absolute():
            raise FileNotFoundError(missing)
        try:
            folder = Path(need("huggingface_hub").snapshot_download(str(path), allow_patterns=[f"{part}/*"]))
        except OSError as error:
            raise FileNotFoundError(f"{missing} ({error})") from error
    if folder.is_file():
        raise ValueError(f"{path} is a file; wanted is the folder of {PIPELINE}. Wan's own .pth files are pickles, "
                         "which are not read: the pipeline has the same weights")
    return folder / part if (folder / part).is_dir() else folder


def check_family(folder, key, wanted, pipeline=PIPELINE):
    """Refuses a folder whose config.json is absent or names another class of model."""
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} has no config.json but {found}; wanted is {pipeline}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged, it is not JSON: {error}") from error
    if config.get(key) != wanted:
        found = config.get("_class_name") or config.get("architectures") or config.get("model_type")
        raise ValueError(f"{folder} holds {found}; wanted is {wanted}, as in {pipeline}")


def check_keys(folder, report):
    """Refuses a file that lacks weights, which the libraries fill with random numbers."""
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights: {', '.join(missing[:8])}")


def sha256(folder):
    """{file: digest} of the weight files in a folder."""
    digests = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        seen = file.stat()
        digests[file.name] = digest(file, seen.st_size, seen.st_mtime_ns)
    return digests


@lru_cache(maxsize=None)
def digest(file, size, mtime_ns):
    """A file's sha256, computed once: every validation loads the VAE again, and Wan2.2's has 2.8 GB."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def agree(spec, found, source):
    """The spec with what the weights say; a contradiction is an error, other bytes of the same make are a warning."""
    for key in found:
        if key in spec and spec[key] != found[key]:
            if not key.endswith("sha256"):
                raise ValueError(f"{source} has {key} {found[key]}; the latents were made with {spec[key]}")
            warnings.warn(f"{source}: not the very files that the latents were made with ({key} differs)")
    return spec | found


# ----------------------------------------------------------------------------------------------------------------------
# video files

SHARP = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


@contextmanager
def film(path, fps):
    """An mp4 that browsers play (H.264, yuv420p), as a function: add(picture) puts one (h, w, 3) at its end."""
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.pix_fmt, stream.colorspace, stream.color_range = "yuv420p", 1, 1     # BT.709, limited: not a guess

        def add(picture):
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            picture = av.VideoFrame.from_ndarray(picture, format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709", interpolation=SHARP)))

        yield add
        file.mux(stream.encode())


def write_video(path, videos, fps, columns=None):
    """One mp4 of a grid of videos, a short one resting on its last frame."""
    with film(path, fps) as add:
        for i in range(max(map(len, videos))):
            add(grid([video[min(i, len(video) - 1)] for video in videos], columns))


def write_clips(stem, x0, sampling, *, vae=None, device="cpu", columns=None, report=print):
    """Clips as one video stem.mp4, or their latents as stem.npy -> the path, None if neither could be written.

    x0 (n, C, F, H, W), normalised; sampling: a checkpoint's block of that name, or a dataset's manifest; columns: of
    the grid; vae, device: see `load`.
    Latents are kept, not normalised, where the codec needs a VAE that is not given, and where decoding or writing fails
    (out of memory, ffmpeg, a full disk). `report` is told in one line. Raises nothing, so that training goes on.
    """
    mean, std = moments(sampling)
    latents = x0.detach().cpu() * std + mean
    film, kept = Path(f"{stem}.mp4"), Path(f"{stem}.npy")
    try:
        coder = load(sampling["codec"], vae=vae, device=device)
        if coder.decodes:
            with whole_file(film) as part:
                write_video(part, [coder.decode(z) for z in latents], sampling["fps"], columns)
            return film
        reason = "no --vae is given to decode them"
    except Exception as error:
        reason = in_a_line(error)
    try:
        with whole_file(kept) as part, open(part, "wb") as file:
            np.save(file, latents.numpy())
    except Exception as error:
        report(f"{film} is not written ({reason}), nor are its latents ({in_a_line(error)})")
        return None
    report(f"{kept} holds latents instead of a video: {reason}")
    return kept


@contextmanager
def whole_file(path):
    """A temporary name to write under, which becomes `path` at the end; after an exception nothing is left of it."""
    part = Path(f"{path}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def in_a_line(error):
    """An exception's kind and message, without line breaks and not endless."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def grid(pictures, columns=None, gap=4):
    """Pictures (h, w, 3) in rows of `columns`, None = a near-square, small ones enlarged -> (H, W, 3), H and W even."""
    if columns is None:
        columns = math.ceil(len(pictures)**0.5)
    h, w = np.max([picture.shape[:2] for picture in pictures], axis=0)
    zoom = max(1, min(256 // max(h, w), 1280 // (columns * w)))     # 32 px are shown at 256, a wall of them at 1280
    pictures = [picture.repeat(zoom, 0).repeat(zoom, 1) for picture in pictures]
    h, w, rows = h * zoom + gap, w * zoom + gap, math.ceil(len(pictures) / columns)
    sheet = np.full((rows * h - gap, columns * w - gap, 3), 16, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * h, i % columns * w
        sheet[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    return np.pad(sheet, [(0, len(sheet) % 2), (0, sheet.shape[1] % 2), (0, 0)], constant_values=16)


def contact_sheet(path, videos, captions):
    """A PNG of each clip's caption over six of its frames, first to last; a row per clip, 24 rows to a column."""
    from matplotlib.figure import Figure                        # slow to import, and only pictures need it

    label, gap = 26, 6                                          # px of the sheet
    strips, sizes = [], []
    for video in videos:
        tall = video.shape[1]
        zoom = 128 // tall if tall <= 128 else 160 / tall       # by whole pixels, or large ones to a height of 160
        picked = video[np.linspace(0, len(video) - 1, 6).round().astype(int)]
        picked = np.pad(picked, [(0, 0), (0, 0), (0, math.ceil(gap / zoom)), (0, 0)], constant_values=16)
        strips.append(rearrange(picked, "n h w c -> h (n w) c"))
        sizes.append([round(n * zoom) for n in strips[-1].shape[:2]])

    rows = min(len(videos), 24)
    h, w = np.max(sizes, axis=0) + [label + gap, 3 * gap]       # of a cell
    height, width = rows * h + gap, math.ceil(len(videos) / rows) * w
    sheet = Figure((width / 100, height / 100), dpi=100, facecolor="#101010")
    for i, (strip, size, caption) in enumerate(zip(strips, sizes, captions, strict=True)):
        left, top = i // rows * w + 2 * gap, height - i % rows * h - gap
        caption = textwrap.shorten(caption, size[1] // 7, placeholder=" ...")
        sheet.text(left / width, (top - label / 2) / height, caption, color="#d8d8d8", size=9, va="center",
                   parse_math=False)
        axes = sheet.add_axes([left / width, (top - label - size[0]) / height, size[1] / width, size[0] / height])
        axes.imshow(strip, aspect="auto")
        axes.axis("off")
    sheet.savefig(path)
