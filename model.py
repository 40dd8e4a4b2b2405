"""The Wan 2.1 / 2.2 DiT, text and image to video, under its original parameter names. Imports attention.

B batch · C F H W latent channels, frames, rows, columns · L video tokens · S text tokens · E text width
D model width · N heads · K head width

One class serves teacher, student and critic, dense and sparse, one rank and many: what varies is an argument.
"""
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from attention import Metadata, attention, build_metadata


@dataclass(frozen=True)
class ModelConfig:
    dim: int                    # D
    blocks: int
    heads: int                  # N; the head width K = dim / heads
    ffn: int                    # hidden width of the feed-forward
    channels: int               # C of the latents, which come out
    text_dim: int               # E
    inputs: int | None = None   # channels in, the image's after the latents'; None = the latents' alone
    clip_dim: int = 0           # width of CLIP's image tokens; 0 = it takes none
    boundary: float | None = None   # t from which on the expert for high noise is asked; None = one net at all t
    freq_dim: int = 256         # sinusoids that describe t
    patch: tuple = (1, 2, 2)    # frames, rows, columns of one token
    eps: float = 1e-6

    @property
    def image(self):
        """Channels of Cond.image: 4 of the mask and those of the encoded clip; 0 = it takes no image."""
        return 0 if self.inputs is None else self.inputs - self.channels

    def conditions(self, shape):
        """{part of Cond: its shape, without B, for latents (F, H, W); None = it takes none}, but for the text."""
        return {"image": (self.image, *shape) if self.image else None,
                "clip": (CLIP_TOKENS, self.clip_dim) if self.clip_dim else None}


MODELS = {  #                       dim  blocks  heads    ffn  channels  text_dim  inputs  clip_dim  boundary
    "tiny":            ModelConfig( 128,      4,     4,   512,       24,       64),  # 1.26 M, the built-in shapes
    "wan-1.3b":        ModelConfig(1536,     30,    12,  8960,       16,     4096),  # 1.42 B
    "wan2.2-5b":       ModelConfig(3072,     30,    24, 14336,       48,     4096),  # 5.00 B
    "wan-14b":         ModelConfig(5120,     40,    40, 13824,       16,     4096),  # 14.29 B
    "wan-14b-i2v":     ModelConfig(5120,     40,    40, 13824,       16,     4096,     36,     1280),  # 16.39 B
    "wan2.2-a14b":     ModelConfig(5120,     40,    40, 13824,       16,     4096,   None,        0,    0.875),
    "wan2.2-a14b-i2v": ModelConfig(5120,     40,    40, 13824,       16,     4096,     36,        0,      0.9),
}   # the last two are either half of 28.58 B: the expert for high noise or for low

USUAL = {  # the latents (C, F, H, W) and the text tokens that each is mostly trained on
    "tiny":            ((24, 5, 8, 8), 8),          # the built-in shapes, 17 frames of 32 x 32
    "wan-1.3b":        ((16, 21, 60, 104), 512),    # 81 frames of 480 x 832
    "wan2.2-5b":       ((48, 31, 44, 80), 512),     # 121 frames of 704 x 1280
    "wan-14b":         ((16, 21, 60, 104), 512),
    "wan-14b-i2v":     ((16, 21, 60, 104), 512),
    "wan2.2-a14b":     ((16, 21, 60, 104), 512),
    "wan2.2-a14b-i2v": ((16, 21, 60, 104), 512),
}
CLIP_TOKENS = 257       # of an image: one for all of it, and 16 x 16 parts


class Cond(NamedTuple):
    """What the net is told beside x_t and t."""
    text: torch.Tensor                  # (B, S, E) with its pads
    image: torch.Tensor | None = None   # (B, 4 + C, F, H, W): which pixel frames are given, and their encoded clip
    clip: torch.Tensor | None = None    # (B, CLIP_TOKENS, clip_dim): what CLIP sees in the first frame
    past: tuple = ()                    # of a causal net, the chunks before x_t: see Chunked


# A dataset's extra tensors that hold an encoded clip, and whether its last frame is given beside its first.
IMAGES = {"image": False, "image_ends": True}


def cond_of(text, extras):
    """Cond of texts (B, S, E) and of a dataset's extra tensors {name: (B, …)}: a clip gets its mask, CLIP's tokens."""
    image = None
    for name in IMAGES.keys() & extras.keys():
        image = masked(extras[name], IMAGES[name])
    return Cond(text, image, extras.get("clip"))


def masked(y, ends=False):
    """y (B, C, F, H, W), an encoded clip, after Wan's mask of 4 channels -> (B, 4 + C, F, H, W).

    The mask is 1 for a pixel frame that is given. A latent frame stands for four of them, one to a channel; the first
    latent frame for the first pixel frame alone, four times.
    """
    mask = y.new_zeros(len(y), 4, *y.shape[2:])
    if ends:
        mask[:, -1, -1] = 1
    mask[:, :, 0] = 1
    return torch.cat((mask, y), 1)


class Seq(NamedTuple):
    """How the token axis is spread over ranks (parallel.ulysses); LOCAL is one rank that holds all of it."""
    split: Callable     # (B or 1, L, …) -> this rank's part along dim 1
    attend: Callable    # attention over the whole sequence, called with this rank's q, k, v
    join: Callable      # (B, part, …) -> (B, L, …)


LOCAL = Seq(split=lambda x: x, attend=attention, join=lambda x: x)


# ---- layers ---------------------------------------------------------------------------------------------------------
# Parameters may be bf16 or fp32, each on its own: a Linear computes in its weight's dtype, all else in fp32.


class Linear(nn.Linear):
    """Wan's Linear, with room for adapters, of which `lora` names the one that is added."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.lora = nn.ModuleDict()

    def forward(self, x, lora=None):
        x = x.to(self.weight.dtype)
        y = F.linear(x, self.weight, self.bias)
        return y + self.lora[lora](x).to(y.dtype) if lora in self.lora else y


class Adapter(nn.Module):
    """LoRA: Δ x = α / r · B A x."""

    def __init__(self, inputs, outputs, rank, alpha, device):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, inputs, device=device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x):
        return self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)


class PatchEmbedding(nn.Conv3d):
    """Wan's strided convolution as the product it is: (B, L, C·patch) -> (B, L, D)."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        affine = (self.weight.float(), self.bias.float()) if self.elementwise_affine else ()
        return F.layer_norm(x.float(), self.normalized_shape, *affine, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        x = x.float()   # written out: its backward on CPU takes half the time of F.rms_norm's
        return x * ((x * x).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.float()


def sinusoids(t, width):
    """(…) -> (…, width): cosines then sines of 1000 t at width / 2 frequencies from 1 down to 1 / 10000."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = 1000 * t.float()[..., None] * frequency                     # Wan's clock runs from 0 to 1000
    return torch.cat((angle.cos(), angle.sin()), -1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)    # a table first made while sampling must serve training too
def rope_table(grid, width, device):
    """Cosines and signed sines (1, L, 1, K) of the angles by which RoPE turns the token at (frame, row, column).

    Of the K / 2 pairs of a head, the last third turns with the column, the third before with the row, the rest with
    the frame, each from 1 radian per step down to 1 / 10000.
    """
    pairs = width // 2
    spatial = pairs // 3
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))            # (L, 3)
    angle = torch.cat([place[:, None] * 10000 ** (-torch.arange(n, dtype=torch.float64) / n)
                       for place, n in zip(places.unbind(1), (pairs - 2 * spatial, spatial, spatial))], 1)
    cos, sin = angle.cos(), angle.sin()
    tables = torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1)                              # (L, K / 2, 2)
    return tuple(rearrange(table, "L pairs two -> 1 L 1 (pairs two)").float().to(device) for table in tables)


def rope_rows(before, grid, width, device):
    """The tables of a grid that follows `before` frames, with their rows: a prefix of one that serves many lengths."""
    f, h, w = grid
    if not before:
        return rope_table(grid, width, device)
    frames = before + f
    longest = 1 << (frames - 1).bit_length()
    return tuple(table[:, :frames * h * w] for table in rope_table((longest, h, w), width, device))


def rotate(x, rope):
    """Turns the neighbouring pairs (a, b) of x (B, L, N, K), in fp32: (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    x = x.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class Attention(nn.Module):
    def __init__(self, dim, heads, eps, image=False):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if image:
            self.k_img, self.v_img, self.norm_k_img = Linear(dim, dim), Linear(dim, dim), RMSNorm(dim, eps)

    def forward(self, x, context, lora=None, rope=None, attend=attention, metadata=None, past=(), image=None,
                keep=False):
        """x (B, L, D) attends to context (B, S, D), which is x itself in self-attention, and apart to an image's tokens
        (B, S', D), by the same queries -> y, with keep (k, v) of the context, else None.

        past: [(k, v)] of chunks before x, which it attends to as well; their k are turned here, by their place: rope
        has rows for them, before x's. The k that is returned is not turned.
        """
        q, k, v = self.norm_q(self.q(x, lora)), self.norm_k(self.k(context, lora)), self.v(context, lora)
        q, k, v = (rearrange(h, "B L (N K) -> B L N K", N=self.heads) for h in (q, k, v))
        own = (k.to(v.dtype), v) if keep else None
        if past:
            keys, values = zip(*past)
            k, v = torch.cat((*(chunk.float() for chunk in keys), k), 1), torch.cat((*values, v), 1)
        if rope is not None:
            q, k = rotate(q, [table[:, -q.shape[1]:] for table in rope]), rotate(k, rope)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, metadata)
        if image is not None:
            k, v = self.norm_k_img(self.k_img(image, lora)), self.v_img(image, lora)
            k, v = (rearrange(h, "B L (N K) -> B L N K", N=self.heads) for h in (k, v))
            y = y + attend(q.to(v.dtype), k.to(v.dtype), v, metadata)
        return self.o(rearrange(y, "B L N K -> B L (N K)"), lora), own


# With remat, backward computes a block again, but not its attentions: most of a long video's work, few bytes to keep.
KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, [torch.ops.nanovideo.attend.default])


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward. To change it, see also initial, flops and ckpt.IN_BLOCK."""

    def __init__(self, config, remat):
        super().__init__()
        D, eps = config.dim, config.eps
        self.remat = remat
        self.norm1 = LayerNorm(D, eps, elementwise_affine=False)
        self.self_attn = Attention(D, config.heads, eps)
        self.norm3 = LayerNorm(D, eps)
        self.cross_attn = Attention(D, config.heads, eps, image=config.clip_dim > 0)
        self.norm2 = LayerNorm(D, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(D, config.ffn), nn.GELU(approximate="tanh"), Linear(config.ffn, D))
        self.modulation = nn.Parameter(torch.zeros(1, 6, D))

    def forward(self, *inputs):
        if self.remat and torch.is_grad_enabled():
            return checkpoint(self.layers, *inputs, use_reentrant=False, preserve_rng_state=False,
                              context_fn=KEEP_ATTENTION)
        return self.layers(*inputs)

    def layers(self, x, e, text, image, rope, attend, metadata, lora, past=(), keep=False):
        """x (B, L, D), text (B, S, D), image (B, S', D) or None, e (B, 1 or L, 6, D): what t says to all tokens, or to
        each.

        past: this block's [(k, v)] of chunks before x. keep: -> x and its own (k, v).
        """
        e = self.modulation.float()[:, None] + e
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = e.unbind(2)

        h = torch.addcmul(shift_attn, self.norm1(x), 1 + scale_attn)
        y, own = self.self_attn(h, h, lora, rope, attend, metadata, past, keep=keep)
        x = torch.addcmul(x, y.float(), gate_attn)

        y, _ = self.cross_attn(self.norm3(x), text, lora, image=image)
        x = x + y.float()

        up, gelu, down = self.ffn
        h = torch.addcmul(shift_ffn, self.norm2(x), 1 + scale_ffn)
        y = down(gelu(up(h, lora)), lora)
        x = torch.addcmul(x, y.float(), gate_ffn)
        return (x, own) if keep else x


class ImageEmbedding(nn.Module):
    """CLIP's tokens of an image to those that the blocks attend to. Its GELU is the exact one, the others' is not."""

    def __init__(self, inputs, dim):
        super().__init__()
        self.proj = nn.Sequential(LayerNorm(inputs, eps=1e-5), Linear(inputs, inputs), nn.GELU(), Linear(inputs, dim),
                                  LayerNorm(dim, eps=1e-5))

    def forward(self, clip):
        return self.proj(clip)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, config.channels * math.prod(config.patch))
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x, e):
        """x (B, L, D), e (B, 1 or L, D) -> (B, L, patch·C)."""
        shift, scale = (self.modulation.float()[:, None] + e[:, :, None]).unbind(2)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


# ---- the model ------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """Build it under torch.device("meta"), then fill every parameter from `initial` or from weights."""

    def __init__(self, config, remat=False):
        super().__init__()
        D, E = config.dim, config.text_dim
        self.config = config
        self.adapters = ()      # names that add_lora has given
        self.patch_embedding = PatchEmbedding(config.channels + config.image, D, config.patch, config.patch)
        self.text_embedding = nn.Sequential(Linear(E, D), nn.GELU(approximate="tanh"), Linear(D, D))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, D), nn.SiLU(), Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))
        if config.clip_dim:
            self.img_emb = ImageEmbedding(config.clip_dim, D)
        self.blocks = nn.ModuleList(Block(config, remat) for _ in range(config.blocks))
        self.head = Head(config)

    def islands(self):
        """The modules whose parameters stay in fp32 when the others compute in bf16."""
        return self.time_embedding, self.time_projection, self.head

    def forward(self, x, t, cond, *, metadata=None, dense_ends=0, lora=None, seq=LOCAL, keep=False):
        """x (B, C, F, H, W), t (B,) or (B, F) in [0, 1] with 1 = noise, cond: see Cond -> v like x.

        metadata: sparse attention's (None = dense), except in the first and last `dense_ends` blocks.
        lora: the name of the adapter that is added (None = the base model). seq: see Seq.
        keep: -> v and what later chunks attend to of x, which takes a place in their Cond's past.
        Raises ValueError on shapes that do not fit the config.
        """
        grid = self.door(x, t, cond, metadata, lora)
        before = self.past_door(cond.past, grid, metadata, dense_ends, seq, keep)
        p, q, r = self.config.patch
        shown = x if cond.image is None else torch.cat((x, cond.image.to(x.dtype)), 1)
        tokens = rearrange(shown, "B C (F p) (H q) (W r) -> B (F H W) (C p q r)", p=p, q=q, r=r)
        rope = rope_rows(before, grid, self.config.dim // self.config.heads, x.device)
        text = self.text_embedding(cond.text)                                           # (B, S, D)
        image = None if cond.clip is None else self.img_emb(cond.clip)
        e = self.time_embedding(sinusoids(t.reshape(len(t), -1), self.config.freq_dim))    # (B, 1 or F, D)
        e6 = rearrange(self.time_projection(e), "B F (n D) -> B F n D", n=6)

        # the tokens' order: tiles, so that a tile's tokens are neighbours; then this rank's part
        def arrange(rows):
            rows = rows if metadata is None else rows.index_select(1, metadata.order)
            return seq.split(rows)

        tokens = arrange(tokens)
        if not before:
            rope = tuple(arrange(table) for table in rope)
        if t.ndim == 2:
            e, e6 = (arrange(repeat(h, "B F ... -> B (F n) ...", n=grid[1] * grid[2])) for h in (e, e6))

        tokens = self.patch_embedding(tokens).float()   # (B, L, D): an fp32 stream drifts half as much as a bf16 one
        if torch.is_grad_enabled():
            tokens.requires_grad_()     # so that block 0 shares the compiled graph of the others, LoRA or not
        kept = []
        for i, block in enumerate(self.blocks):
            dense = min(i, len(self.blocks) - 1 - i) < dense_ends
            inputs = tokens, e6, text, image, rope, seq.attend, None if dense else metadata, lora
            if before or keep:
                tokens, own = block(*inputs, [chunk[i] for chunk in cond.past], True)
                kept.append(own)
            else:
                tokens = block(*inputs)

        tokens = seq.join(self.head(tokens, e))
        tokens = tokens if metadata is None else tokens.index_select(1, metadata.inverse)
        f, h, w = grid
        v = rearrange(tokens, "B (F H W) (p q r C) -> B C (F p) (H q) (W r)", F=f, H=h, W=w, p=p, q=q, r=r)
        return (v.to(x.dtype), kept) if keep else v.to(x.dtype)

    def door(self, x, t, cond, metadata, lora):
        """The grid of tokens (F, H, W) of inputs that fit; ValueError for others."""
        text, C, E = cond.text, self.config.channels, self.config.text_dim
        if x.ndim != 5 or x.shape[1] != C:
            raise ValueError(f"x is {tuple(x.shape)}: wants (B, {C}, F, H, W)")
        grid = token_grid(self.config, x.shape)
        if t.shape not in ((len(x),), (len(x), grid[0])):
            raise ValueError(f"t is {tuple(t.shape)}: wants ({len(x)},) or ({len(x)}, {grid[0]})")
        if text.ndim != 3 or len(text) != len(x) or text.shape[2] != E:
            raise ValueError(f"text is {tuple(text.shape)}: wants ({len(x)}, S, {E})")
        for name, wanted in self.config.conditions(x.shape[2:]).items():
            part = getattr(cond, name)
            there = None if part is None else tuple(part.shape)
            wanted = (len(x), *wanted) if wanted else None
            if there != wanted:
                raise ValueError(f"{name} is {there}: wants {wanted}")
        if metadata is not None and len(metadata.order) != math.prod(grid):
            raise ValueError(f"metadata orders {len(metadata.order)} tokens, the grid {grid} has {math.prod(grid)}")
        if lora is not None and lora not in self.adapters:
            raise ValueError(f"lora is {lora!r}: the model has {self.adapters or 'no adapters'}")
        return grid

    def past_door(self, past, grid, metadata, dense_ends, seq, keep):
        """How many frames of tokens the past has; ValueError for a past, or a pattern, that cannot be."""
        if dense_ends and metadata is not None and metadata.window[0] < 0:
            raise ValueError(f"dense_ends is {dense_ends}: dense blocks of a causal net would see the future")
        if (past or keep) and (metadata is not None or seq is not LOCAL):
            raise ValueError("a past is kept of dense attention within a chunk, on one rank: with it, metadata is "
                             "None and seq is LOCAL")
        frame = grid[1] * grid[2]
        tokens = [chunk[0][0].shape[1] for chunk in past]
        if any(len(chunk) != len(self.blocks) for chunk in past) or any(n % frame for n in tokens):
            raise ValueError(f"the past has chunks of {tokens} tokens in {[len(chunk) for chunk in past]} blocks: "
                             f"wants frames of {frame} in {len(self.blocks)}")
        return sum(tokens) // frame


def token_grid(config, shape):
    """The tokens (f, h, w) of latents (…, F, H, W); ValueError if patches do not divide them."""
    if any(n % p for n, p in zip(shape[-3:], config.patch)):
        raise ValueError(f"latents of {tuple(shape)}: their last three are to be divisible by the patch {config.patch}")
    return tuple(n // p for n, p in zip(shape[-3:], config.patch))


@dataclass(frozen=True)
class Bound:
    """A net as losses and samplers see it, net(x_t, t, cond) -> v: attention pattern, adapter and ranks are chosen."""
    net: DiT
    metadata: Metadata | None = None    # None = dense
    dense_ends: int = 0
    lora: str | None = None
    seq: Seq = LOCAL

    def __call__(self, x_t, t, cond):
        return self.net(x_t, t, cond, metadata=self.metadata, dense_ends=self.dense_ends, lora=self.lora, seq=self.seq)

    def flops(self, shape, text_length, times=1):
        """Of one sample's forward, shape (C, F, H, W); training costs three times as much. times: see `flops`."""
        return flops(self.net.config, shape, text_length, self.metadata, self.dense_ends, times)


@dataclass(frozen=True)
class Pair:
    """Two experts as one net, callable like Bound: `high` is asked at t ≥ boundary, `low` below it."""
    high: Callable
    low: Callable
    boundary: float

    def __call__(self, x_t, t, cond):
        """t: one number for the whole batch, and for all ranks. Were it chosen by sample, sharded ranks would gather
        one expert's weights on one rank and the other's on another, without an error."""
        least, most = torch.stack(t.aminmax()).tolist()
        if least != most:
            raise ValueError(f"two experts at t from {least:g} to {most:g}: they are asked at one t for all samples")
        expert = self.high if most >= np.float32(self.boundary) else self.low
        return expert(x_t, t, cond)

    def flops(self, shape, text_length, times=1):
        """Of one sample's forward, which either expert does."""
        return self.high.flops(shape, text_length, times)


def bind(net, shape, world, window=None, tile=(4, 4, 8), dense_ends=0, lora=None):
    """The net for latents (…, F, H, W) on world's ranks -> Bound. window in tiles, None = dense; tile in tokens."""
    tokens = token_grid(net.config, shape)
    metadata = None
    if window is not None:
        metadata = build_metadata(tokens, tuple(tile), tuple(window), device=world.device)
    seq = LOCAL if world.sp == 1 else Seq(*world.ulysses(attention, math.prod(tokens)))
    return Bound(net, metadata, dense_ends, lora, seq)


# ---- chunk by chunk -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunked:
    """A causal net that makes a clip chunk by chunk, and so is called: net(x_t, t, cond) -> v of one chunk.

    cond.past holds the chunks before, clean: `see` adds one, each condition has its own. With a cache a chunk is
    [(k, v)] of the blocks, k before RoPE, so that a chunk's place in the past is all that it knows of time. Where a
    cache cannot serve (ranks share a sample, tiles slide in space) it is the latents, and each call forwards all of
    them again, at t = 0, under the pattern: the same numbers, slower.
    """
    net: DiT
    bind: Callable      # latents' shape -> Bound, of the same net under the causal pattern
    chunk: int          # frames that are made at once
    window: int         # chunks that one sees, its own among them
    sink: int           # chunks at the beginning that are seen always
    cached: bool
    lora: str | None = None

    def __call__(self, x_t, t, cond):
        if self.cached:
            return self.net(x_t, t, cond, lora=self.lora)
        before = sum(x.shape[2] for x in cond.past)
        t = t.view(len(t), -1).expand(-1, x_t.shape[2])
        x_t = torch.cat((*cond.past, x_t), 2)
        v = self.bind(x_t.shape)(x_t, F.pad(t, (before, 0)), cond._replace(past=()))
        return v[:, :, before:]

    def flops(self, shape, text_length, times=1):
        """Of one forward of every chunk of a sample of shape (C, F, H, W), each beside its past's keys."""
        return self.bind(shape).flops(shape, text_length, times)

    @torch.no_grad()
    def see(self, cond, x0):
        """The condition with a clean chunk x0 (B, C, F, H, W) added to its past, and what is not seen any more gone."""
        if self.cached:
            _, own = self.net(x0, x0.new_zeros(len(x0), dtype=torch.float32), cond, lora=self.lora, keep=True)
            last = self.window - 1
        else:
            own = x0.detach()
            last = len(self.net.blocks) * (self.window - 1)     # each block looks as far back again
        past = *cond.past, own
        return cond._replace(past=past[:self.sink] + past[max(self.sink, len(past) - last):])

    def after(self, x0):
        """The net on whole clips, net(x_t, t, cond) -> v, each chunk of which has the clean ones of x0 for its past."""
        clean = x0.split(self.chunk, 2)

        def forward(x_t, t, cond):
            times = [t] * len(clean) if t.ndim == 1 else t.split(self.chunk, 1)
            parts = []
            for i, noised in enumerate(x_t.split(self.chunk, 2)):
                if i:
                    cond = self.see(cond, clean[i - 1])
                parts.append(self(noised, times[i], cond))
            return torch.cat(parts, 2)

        return forward


NO_CACHE = "no cache serves --sp or tiles that slide in space: each chunk forwards all before it again, which is slower"


def chunk_of(window, tile):
    """Frames of a causal pattern's chunk; None where the pattern is not causal."""
    return tile[0] if window is not None and window[0] < 0 else None


def causal_window(sampling, seen=None, sink=0):
    """A causal pattern's window with which a chunk sees so many, its own among them, beside a sink; None: as many as
    the clips trained on have, whose past the net knows. ValueError for numbers that cannot be."""
    window = sampling["window"]
    if seen is None:
        seen = min(-window[0], math.ceil(sampling["shapes"][0][1] / sampling["tile"][0]))
    if seen < 1 or sink < 0:
        raise ValueError(f"--window={seen} --sink={sink}: a chunk sees 1 or more, its own, and a sink of 0 or more")
    return [-seen, *window[1:]]


def caches(config, shape, window, tile, sp=1):
    """Whether a cache serves a causal pattern: all of a chunk of latents (…, F, H, W) is seen, by one rank."""
    _, h, w = token_grid(config, shape)
    return sp == 1 and build_metadata((tile[0], h, w), tuple(tile), tuple(window)).sparsity == 0


def chunked(net, shape, world, window, tile, lora=None, sink=0):
    """The causal net for clips of latents (…, F, H, W) of any length on world's ranks -> Chunked."""
    cached = caches(net.config, shape, window, tile, world.sp)
    if sink and not cached:
        raise ValueError(f"--sink={sink} needs the cache, which serves neither --sp nor tiles that slide in space")
    whole = partial(bind, net, world=world, window=window, tile=tile, lora=lora)
    return Chunked(net, whole, tile[0], -window[0], sink, cached, lora)


def lengths(config, shape, window, tile, sink=0, sp=1):
    """How many shapes compiled blocks meet while clips of latents (…, F, H, W) are made chunk by chunk; 0: at once."""
    if chunk_of(window, tile) is None:
        return 0
    chunks = math.ceil(shape[-3] / tile[0])
    if caches(config, shape, window, tile, sp):
        return 2 * (1 + min(chunks, sink - window[0]))  # each with and without what is kept, and a shorter last chunk
    return min(chunks, config.blocks * (-window[0] - 1) + 1)


# ---- around the model -----------------------------------------------------------------------------------------------


def blank(name, remat=False, lora={}):
    """The model called `name` on meta: parameters without values. lora {adapter: (rank, alpha)}: see add_lora."""
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}: there are {', '.join(MODELS)}")
    with torch.device("meta"):
        net = DiT(MODELS[name], remat)
        for adapter, (rank, alpha) in lora.items():
            add_lora(net, adapter, rank, alpha)
    return net


def shapes_of(name):
    """{parameter: shape} of the model called `name`."""
    return {key: tuple(p.shape) for key, p in blank(name).named_parameters()}


def models_of(shapes):
    """The models, by name, whose parameters have these shapes."""
    return [name for name in MODELS if shapes_of(name) == shapes]


def check_expert(name, expert):
    """ValueError unless an expert is named just where the model called `name` has two."""
    two = [other for other, config in MODELS.items() if config.boundary]
    if expert and name not in two:
        raise ValueError(f"--expert={expert}: {name} is one net at all noise levels, {' and '.join(two)} have two")
    if name in two and not expert:
        raise ValueError(f"{name} has two experts: --expert=high or --expert=low says which")


def check_first_frame(name, share):
    """ValueError where first frames cannot be given to this share of clips of the model called `name`, by a t of 0."""
    config = MODELS[name]
    if not 0 <= share <= 1:
        raise ValueError(f"--first_frame={share}: a share of the clips, in [0, 1]")
    if share and config.image:
        raise ValueError(f"--first_frame={share} does not apply: {name} is always shown the image")
    if share and config.boundary:
        raise ValueError(f"--first_frame={share} does not apply: {name}'s two experts are asked at one t for "
                         "all frames")


def check_begun(sampling, asked, path):
    """ValueError where clips of the weights at `path`, sampled so, cannot begin with a given frame."""
    alone = chunk_of(sampling["window"], sampling["tile"]) == 1     # then a first frame is a chunk as others are
    if not sampling.get("first_frame") and not alone:               # old checkpoints do not say
        raise ValueError(f"{asked}: {path} was not trained with first frames, as train.py --first_frame=.5 does")


def check_causal(name, window, dense_ends):
    """ValueError where a window is causal and cannot be: of a model that is shown an image, or has two experts, or
    beside dense blocks."""
    config = MODELS[name]
    if window is None or window[0] >= 0:
        return
    if dense_ends:
        raise ValueError(f"--dense_ends={dense_ends}: dense blocks see the future, which a causal window, "
                         f"{window[0]} along frames, hides")
    if config.image or config.boundary:
        why = "has two experts, asked at one t for all frames"
        if config.image:
            why = "is shown an image as long as the clip"
        raise ValueError(f"--window {' '.join(map(str, window))}: {name} {why}, so it cannot be causal; the window of "
                         "frames is above 0")


def fits(name, text_width, shapes, extras, sp=1, window=None, tile=(4, 4, 8)):
    """ValueError unless the model called `name` takes a dataset's texts of this width and latents of these shapes
    (C, F, H, W), and is shown just its extra tensors {name: shape, None = none}."""
    config, channels = MODELS[name], shapes[0][0]
    images = any(extras.get(image) for image in IMAGES)
    clip = extras["clip"][-1] if extras.get("clip") else 0
    taken = {other: (c.channels, c.text_dim, c.image > 0, c.clip_dim) for other, c in MODELS.items()}
    fitting = [other for other in MODELS if taken[other] == (channels, text_width, images, clip)]
    would = f"{fitting or 'no model'} would fit"
    if (channels, text_width) != (config.channels, config.text_dim):
        raise ValueError(f"the dataset has {channels} channels and text of width {text_width}; --model={name} takes "
                         f"{config.channels} and {config.text_dim}; {would}")
    if config.image and not images:
        raise ValueError(f"--model={name} begins with an image, and the dataset has none: prepare.py --image stores "
                         f"them beside the latents; without them {would}")
    if images and not config.image:
        raise ValueError(f"the dataset has images beside its latents (prepare.py --image), and --model={name} is shown "
                         f"none; {would}, and {name} takes what prepare.py stores without --image")
    if clip != config.clip_dim:
        raise ValueError(f"the dataset has CLIP's tokens of width {clip} (0: none; prepare.py --clip stores them), "
                         f"--model={name} takes {config.clip_dim}; {would}")
    if config.heads % sp:
        raise ValueError(f"--sp={sp} does not divide the {config.heads} heads of --model={name}")
    for shape in shapes:
        tokens = token_grid(config, shape)
        if window is not None:
            build_metadata(tokens, tile, window)


def initial(name, shape, rng):
    """The initial value (fp32, shape) of the parameter called `name`, drawn from the numpy Generator `rng`.

    Xavier uniform for every matrix, the head zero so that v starts at 0, and the gates of every block near 1, so that
    every layer gets gradient from the first step.
    """
    kind = name.rsplit(".", 1)[-1]
    if kind == "modulation":
        value = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
        if name.startswith("blocks."):
            value[:, [2, 5]] += 1               # the gates, 2 and 5 of shift scale gate shift scale gate
    elif kind == "bias":
        value = np.zeros(shape, np.float32)
    elif kind == "B":                           # an adapter starts as its base
        value = np.zeros(shape, np.float32)
    elif name == "head.head.weight":
        value = np.zeros(shape, np.float32)
    elif len(shape) == 1:                       # norms
        value = np.ones(shape, np.float32)
    else:
        fan_out, fan_in = shape[0], math.prod(shape[1:])
        bound = fan_in ** -0.5 if kind == "A" else (6 / (fan_in + fan_out)) ** 0.5
        value = (2 * rng.random(shape, dtype=np.float32) - 1) * np.float32(bound)
    return torch.from_numpy(value)


def flops(config, shape, text_length, metadata=None, dense_ends=0, times=1):
    """Floating-point operations of one sample's forward, 2 per multiply-add, in matrix products and attention only.

    shape (C, F, H, W); times: numbers t of a sample, 1 or F; training costs three times as much. Adapters are not
    counted.
    """
    D, S = config.dim, text_length
    L = math.prod(token_grid(config, shape))
    patch = math.prod(config.patch)
    ends = L * D * patch * (config.channels + config.image) + L * D * patch * config.channels
    time = times * (config.freq_dim * D + D * D + 6 * D * D)
    text = S * (config.text_dim * D + D * D)
    image = CLIP_TOKENS if config.clip_dim else 0
    clip = image * (config.clip_dim * config.clip_dim + config.clip_dim * D)
    S = S + image       # what the cross-attentions attend to
    block = L * (4 * D * D + 2 * D * D + 2 * D * config.ffn) + S * 2 * D * D + 2 * L * S * D
    sparse = 0 if metadata is None else max(config.blocks - 2 * dense_ends, 0)
    pairs = (config.blocks - sparse) * L * L + (sparse * metadata.pairs if sparse else 0)
    return 2 * (time + text + clip + ends + config.blocks * block + 2 * pairs * D)


def add_lora(net, name, rank, alpha):
    """Adds adapter `name` of that rank to every Linear of the blocks and freezes the base (LoRA, arXiv 2106.09685)."""
    for linear in [module for module in net.blocks.modules() if isinstance(module, Linear)]:
        linear.lora[name] = Adapter(linear.in_features, linear.out_features, rank, alpha, linear.weight.device)
    for path, parameter in net.named_parameters():
        if ".lora." not in path:
            parameter.requires_grad_(False)
    net.adapters += (name,)
