"""Attention behind one door: dense, or sliding-tile over a video's tokens (STA, arXiv 2502.04507). Imports nothing of ours.

A grid of F x H x W tokens is cut into tiles. Per axis of n tiles, a query in tile q sees the w key tiles [s, s + w),
s = clamp(q - w//2, 0, n - w): every query sees the same number of tiles, at a border the window shifts inward. Queries
that share s see the very same keys, so a pattern is a list of pairs (box of queries, box of keys), each of them dense.

B batch · L query tokens · S key tokens · N heads · K head width
"""
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from einops import rearrange
from torch.utils.flop_counter import register_flop_formula


# ---- who sees whom ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Metadata:
    grid: tuple           # F, H, W in tokens
    tile: tuple           # tokens of a whole tile along each axis; the last one may be shorter
    window: tuple         # tiles seen along each axis, the effective w
    forward: tuple        # per axis, for every distinct key window: (first query, end), (first key, end), in tokens
    reverse: tuple        # per axis, for every key tile: (first key, end), (first query, end), in tokens
    order: torch.Tensor   # (L,) raster index of the i-th token in tile order
    inverse: torch.Tensor  # (L,) place in tile order of the i-th raster token
    pairs: int            # query-key pairs that see each other; the forward costs 4 B N K pairs FLOPs
    sparsity: float       # 1 - pairs / L^2


def build_metadata(grid, tile=(4, 4, 8), window=(3, 3, 3), device="cpu"):
    """The pattern of a grid (F, H, W) in tokens, a tile in tokens and a window in tiles; cached by its arguments.

    Even windows count one tile more (STA's rule: k//2 tiles to each side); a window wider than its axis sees all of it.
    """
    for name, value in (("grid", grid), ("tile", tile), ("window", window)):
        if len(value) != 3 or not all(isinstance(x, int) and x > 0 for x in value):
            raise ValueError(f"{name} is {value}; it takes three positive integers: frames, rows, columns")
    return _build(tuple(grid), tuple(tile), tuple(window), torch.device(device))


@lru_cache(maxsize=None)
def _build(grid, tile, window, device):
    tile = tuple(min(t, size) for t, size in zip(tile, grid))
    window = tuple(min(2 * (k // 2) + 1, -(-size // t)) for k, size, t in zip(window, grid, tile))
    forward, reverse = zip(*(_axis(*axis) for axis in zip(grid, tile, window)))

    with torch.inference_mode(False):  # built while sampling, used while training
        raster = torch.arange(prod(grid)).view(grid)
        tiles = (c for a in raster.split(tile[0], 0) for b in a.split(tile[1], 1) for c in b.split(tile[2], 2))
        order = torch.cat([tokens.flatten() for tokens in tiles])
        pairs = prod(sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in axis) for axis in forward)
        return Metadata(grid, tile, window, forward, reverse, order.to(device), order.argsort().to(device),
                        pairs, 1 - pairs / prod(grid)**2)


def _axis(size, tile, w):
    """Forward and reverse neighbourhoods along one axis, in closed form, as spans of tokens."""
    n, r = -(-size // tile), w // 2

    def span(first, end):
        return first * tile, min(end * tile, size)
    forward = [(span(s + r if s else 0, s + r + 1 if s < n - w else n), span(s, s + w)) for s in range(n - w + 1)]
    reverse = [(span(j, j + 1), span(j - r if j >= w else 0, j + r + 1 if j < n - w else n)) for j in range(n)]
    return tuple(forward), tuple(reverse)


# ---- the door ---------------------------------------------------------------------------------------------------


def attention(q, k, v, metadata=None):
    """softmax(q k^T / sqrt(K)) v for q (B, L, N, K), k and v (B, S, N, K) -> (B, L, N, K).

    With metadata, L = S = F H W tokens in tile order (x[:, metadata.order]), and each query sees its window only.
    Without, or with a window that covers the grid, dense. Backward once; no forward-mode derivative.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "takes (B, L, N, K) and twice (B, S, N, K)")
    if metadata is None or metadata.sparsity == 0:
        return torch.ops.nanovideo.attend(q, k, v, [], [], [])[0]
    if not q.shape[1] == k.shape[1] == prod(metadata.grid):
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys on a grid of {metadata.grid}: "
                         f"takes {prod(metadata.grid)} of each")
    return torch.ops.nanovideo.attend(q, k, v, metadata.grid, metadata.tile, metadata.window)[0]


# One opaque operator for every backend: torch.compile keeps it whole, selective checkpointing can name it, and its FLOPs
# are counted by formula. lse (B, N, L) is the natural log of the softmax's denominator.

torch.library.define("nanovideo::attend", "(Tensor q, Tensor k, Tensor v, int[] grid, int[] tile, int[] window)"
                     " -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("nanovideo::attend_backward", "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
                     " int[] grid, int[] tile, int[] window) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("nanovideo::attend")
def _(q, k, v, grid, tile, window):
    B, L, N, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, N, L), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("nanovideo::attend_backward")
def _(grad, q, k, v, out, lse, grid, tile, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.pattern = inputs[3:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return *torch.ops.nanovideo.attend_backward(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None


torch.library.register_autograd("nanovideo::attend", _backward, setup_context=_save)


@register_flop_formula(torch.ops.nanovideo.attend)
def _(q, k, v, grid, tile, window, *, out_shape=None, **_):
    B, L, N, K = q
    return 4 * B * N * K * (build_metadata(grid, tile, window).pairs if grid else L * k[1])


@register_flop_formula(torch.ops.nanovideo.attend_backward)
def _(grad, q, k, v, out, lse, grid, tile, window, *, out_shape=None, **_):
    B, L, N, K = q
    return 10 * B * N * K * (build_metadata(grid, tile, window).pairs if grid else L * k[1])


# ---- CPU: one dense call per box -----------------------------------------------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.impl("nanovideo::attend", "CPU")
def _(q, k, v, grid, tile, window):
    if not grid:
        out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), lse.contiguous()
    return _cpu(q, k, v, build_metadata(grid, tile, window))


@torch.library.impl("nanovideo::attend_backward", "CPU")
def _(grad, q, k, v, out, lse, grid, tile, window):
    if not grid:
        grads = _flash_backward(*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse, 0.0, False)
        return tuple(x.transpose(1, 2) for x in grads)
    return _cpu_backward(grad, q, k, v, out, lse, build_metadata(grid, tile, window))


def _raster(x, metadata):
    return x[:, metadata.inverse].unflatten(1, metadata.grid)


def _strips(metadata):
    for (q_f, k_f), (q_h, k_h) in product(*metadata.forward[:2]):
        yield (slice(None), slice(*q_f), slice(*q_h)), (slice(None), slice(*k_f), slice(*k_h))


def _columns(x):
    """A strip (B, f, h, W, N, K) with its columns outermost, (B, N, W, f h, K): any range of columns is then one slice."""
    return rearrange(x, "B f h W N K -> B N W (f h) K").contiguous()


def _cpu(q, k, v, metadata):
    """q, k, v (B, L, N, K) in tile order -> out, lse. Keys are copied once per strip, so memory does not grow with L^2."""
    q, k, v = (_raster(x, metadata) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in _strips(metadata):
        q_s, k_s, v_s = (_columns(x) for x in (q[queries], k[keys], v[keys]))
        for (q0, q1), (k0, k1) in metadata.forward[2]:
            o, l = _flash(q_s[:, :, q0:q1].flatten(2, 3), k_s[:, :, k0:k1].flatten(2, 3), v_s[:, :, k0:k1].flatten(2, 3))
            f, h = q[queries].shape[1:3]
            out[queries][:, :, :, q0:q1] = rearrange(o, "B N (w f h) K -> B f h w N K", f=f, h=h)
            lse[queries][:, :, :, q0:q1] = rearrange(l, "B N (w f h) -> B f h w N", f=f, h=h)
    return out.flatten(1, 3)[:, metadata.order], rearrange(lse.flatten(1, 3)[:, metadata.order], "B L N -> B N L").contiguous()


def _cpu_backward(grad, q, k, v, out, lse, metadata):
    grad, q, k, v, out = (_raster(x, metadata) for x in (grad, q, k, v, out))
    lse = _raster(rearrange(lse, "B N L -> B L N"), metadata)
    dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    for queries, keys in _strips(metadata):
        grad_s, q_s, out_s, k_s, v_s = (_columns(x) for x in (grad[queries], q[queries], out[queries], k[keys], v[keys]))
        lse_s = rearrange(lse[queries], "B f h W N -> B N W (f h)").contiguous()
        dk_s, dv_s = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_s, v_s))
        f, h = q[queries].shape[1:3]
        for (q0, q1), (k0, k1) in metadata.forward[2]:
            box = [x[:, :, a:b].flatten(2, 3) for x, a, b in ((grad_s, q0, q1), (q_s, q0, q1), (k_s, k0, k1), (v_s, k0, k1),
                                                             (out_s, q0, q1), (lse_s, q0, q1))]
            a, b, c = _flash_backward(*box, 0.0, False)
            dq[queries][:, :, :, q0:q1] = rearrange(a, "B N (w f h) K -> B f h w N K", f=f, h=h)
            dk_s[:, :, k0:k1] += b.unflatten(2, (k1 - k0, -1))
            dv_s[:, :, k0:k1] += c.unflatten(2, (k1 - k0, -1))
        f, h = k[keys].shape[1:3]
        dk[keys] += rearrange(dk_s, "B N W (f h) K -> B f h W N K", f=f, h=h)
        dv[keys] += rearrange(dv_s, "B N W (f h) K -> B f h W N K", f=f, h=h)
    return tuple(x.flatten(1, 3)[:, metadata.order].to(q.dtype) for x in (dq, dk, dv))


# ---- the slow and obvious way ----------------------------------------------------------------------------------------


def reference(q, k, v, metadata):
    """What `attention` computes, with a dense mask written from the definition; any float dtype, L^2 memory."""
    see = torch.ones(1, 1, dtype=torch.bool)
    for size, tile, w in zip(metadata.grid, metadata.tile, metadata.window):
        n, at = -(-size // tile), torch.arange(size) // tile
        first = (at - w // 2).clamp(0, n - w)
        axis = (first[:, None] <= at) & (at < first[:, None] + w)
        see = torch.kron(see, axis)  # raster order: the last axis is the fastest
    see = see.to(q.device)[metadata.order][:, metadata.order]
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[-1]**0.5
    return torch.einsum("bnls,bsnk->blnk", scores.masked_fill(~see, -torch.inf).softmax(-1), v)
