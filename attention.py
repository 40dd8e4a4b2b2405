"""Attention behind one door: dense, or sliding-tile over a video's tokens (STA, arXiv 2502.04507).

A grid of F x H x W tokens is cut into tiles. Per axis of n tiles, a query in tile q sees the w key tiles [s, s + w),
s = clamp(q - w//2, 0, n - w): every query sees the same number of tiles, and at a border the window shifts inward.
Queries that share s see the very same keys, so a pattern is pairs (box of queries, box of keys), each of them dense.
Along frames w may be negative: the last -w tiles up to a query's own, which makes a video causal, tile after tile.
Imports nothing of ours.

B batch · L query tokens · S key tokens · N heads · K head width
"""
from __future__ import annotations  # so that the kernels' types stay unread where there is no triton

import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: nobody but CUDA asks for it
    triton = None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels then run on CPU tensors


def ceil_div(a, b):
    return -(-a // b)


# ---- who sees whom ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Metadata:
    grid: tuple            # F, H, W in tokens
    tile: tuple            # tokens of a whole tile along each axis; the last tile may be shorter
    window: tuple          # tiles seen along each axis: the effective w; below 0 along frames: the last ones
    forward: tuple         # per axis, for each distinct window: (first query, end), (first key, end), in tokens
    reverse: tuple         # per axis, for each key tile: (first key, end), (first query that sees it, end), in tokens
    order: torch.Tensor    # (L,) raster index of the i-th token in tile order
    inverse: torch.Tensor  # (L,) place in tile order of the i-th raster token
    pairs: int             # (query, key) that see each other; the forward costs 4 B N K pairs FLOPs
    sparsity: float        # 1 - pairs / L^2


def build_metadata(grid, tile=(4, 4, 8), window=(3, 3, 3), device="cpu"):
    """The pattern of a grid (F, H, W) in tokens, a tile in tokens and a window in tiles; cached by its arguments.

    A window of k tiles reaches k//2 to each side (an even k counts as k + 1); wider than its axis, it sees all of it.
    A window of -k along frames is block-causal: a tile's frames are a chunk, which sees the last k chunks, its own
    among them; rows and columns keep their meaning.
    """
    for name, value in (("grid", grid), ("tile", tile), ("window", window)):
        if len(value) != 3 or not all(isinstance(x, int) and x > 0 for x in value if name != "window"):
            raise ValueError(f"{name} is {value}; it takes three positive integers: frames, rows, columns")
    if not all(isinstance(x, int) for x in window) or window[0] == 0 or min(window[1:]) < 1:
        raise ValueError(f"window is {window}; it takes three positive integers: frames, rows, columns; that of frames "
                         "may be negative, -k for the last k tiles")
    return _build(tuple(grid), tuple(tile), tuple(window), torch.device(device))


@lru_cache(maxsize=None)
def _build(grid, tile, window, device):
    tile = tuple(min(t, size) for t, size in zip(tile, grid))
    tiles = [ceil_div(size, t) for size, t in zip(grid, tile)]
    window = tuple(-min(-k, n) if k < 0 else min(2 * (k // 2) + 1, n) for k, n in zip(window, tiles))
    forward, reverse = zip(*(_axis(*axis) for axis in zip(grid, tile, window)))
    pairs = prod(sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in axis) for axis in forward)
    with torch.inference_mode(False):  # may be built while sampling and used while training
        raster = torch.arange(prod(grid)).view(grid)
        order = torch.cat([tokens.flatten() for frames in raster.split(tile[0], 0) for rows in frames.split(tile[1], 1)
                           for tokens in rows.split(tile[2], 2)])
        return Metadata(grid, tile, window, forward, reverse, order.to(device), order.argsort().to(device),
                        pairs, 1 - pairs / prod(grid)**2)


def _axis(size, tile, w):
    """One axis of `forward` and of `reverse`, in closed form."""
    n, r = ceil_div(size, tile), w // 2

    def span(first, end):
        return first * tile, min(end * tile, size)
    if w < 0:
        forward = [(span(i, i + 1), span(max(0, i + 1 + w), i + 1)) for i in range(n)]
        reverse = [(span(j, j + 1), span(j, min(n, j - w))) for j in range(n)]
        return tuple(forward), tuple(reverse)
    forward = [(span(s + r if s else 0, s + r + 1 if s < n - w else n), span(s, s + w)) for s in range(n - w + 1)]
    reverse = [(span(j, j + 1), span(j - r if j >= w else 0, j + r + 1 if j < n - w else n)) for j in range(n)]
    return tuple(forward), tuple(reverse)


# ---- the door --------------------------------------------------------------------------------------------------------


def attention(q, k, v, metadata=None):
    """softmax(q k^T / sqrt(K)) v for q (B, L, N, K), k and v (B, S, N, K) -> (B, L, N, K).

    With metadata, L = S = F H W tokens in tile order, x[:, metadata.order], and a query sees its window alone. Without
    it, or with a window that covers the grid, dense. Can be differentiated backward, once.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "takes (B, L, N, K) and twice (B, S, N, K)")
    if metadata is None or metadata.sparsity == 0:
        return torch.ops.nanovideo.attend(q, k, v, [], [], [])[0]
    if not q.shape[1] == k.shape[1] == prod(metadata.grid):
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys for a grid of {metadata.grid}: "
                         f"takes {prod(metadata.grid)} of each")
    return torch.ops.nanovideo.attend(q, k, v, metadata.grid, metadata.tile, metadata.window)[0]


# One opaque operator, dense when its lists are empty: torch.compile keeps it whole, selective checkpointing saves what
# it returns, its FLOPs are counted by formula. lse (B, N, L) is the log of the softmax's denominator.

torch.library.define("nanovideo::attend", "(Tensor q, Tensor k, Tensor v, int[] grid, int[] tile, int[] window)"
                     " -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("nanovideo::attend_backward", "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
                     " int[] grid, int[] tile, int[] window) -> (Tensor dq, Tensor dk, Tensor dv)",
                     tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("nanovideo::attend", ("cpu", "cuda"))
def _(q, k, v, grid, tile, window):
    return _backend(q, k, grid)[0](*map(_dense_rows, (q, k, v)), grid, tile, window)


@torch.library.impl("nanovideo::attend_backward", ("cpu", "cuda"))
def _(grad, q, k, v, out, lse, grid, tile, window):
    return _backend(q, k, grid)[1](*map(_dense_rows, (grad, q, k, v)), out, lse, grid, tile, window)


def _card(x):
    """The properties of the GPU that x is on, None on the CPU. Tests replace it."""
    return torch.cuda.get_device_properties(x.device) if x.is_cuda else None


def _backend(q, k, grid):
    """The one place that chooses: a forward and its backward. All return contiguous tensors, as register_fake says."""
    card, width = _card(q), q.shape[3]
    if card is None and not INTERPRETED:
        return (_cpu, _cpu_backward) if grid else (_cpu_dense, _cpu_dense_backward)
    if card is not None and not grid:
        narrow = q.dtype in (torch.float16, torch.bfloat16)
        if narrow and card.major >= 8 and width % 8 == 0 and width <= 128:
            # cuDNN's backward has no deterministic mode, flash's has; cuDNN refuses sequences of one token
            quick = card.major in (9, 10) and min(q.shape[1], k.shape[1]) > 1
            if quick and not torch.are_deterministic_algorithms_enabled():
                return _cudnn, _cudnn_backward
            return _flash, _flash_backward
        if q.dtype == torch.float32 and width % 4 == 0 or q.dtype == torch.float16 and width % 8 == 0:
            return _efficient, _efficient_backward
    if card is not None and card.major < 8:
        raise ValueError(f"{card.name} (sm_{card.major}{card.minor}): takes dense attention in float16 or float32; "
                         f"{'sliding tiles' if grid else f'{q.dtype}, heads of {width},'} take sm_80 or later")
    if triton is None:
        raise RuntimeError(f"attention on {q.device} takes triton: pip install triton")
    return _triton, _triton_backward


def _dense_rows(x):
    return x if x.stride(3) == 1 else x.contiguous()


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


@torch.library.register_fake("nanovideo::attend")
def _(q, k, v, grid, tile, window):
    return _empty(q)


@torch.library.register_fake("nanovideo::attend_backward")
def _(grad, q, k, v, out, lse, grid, tile, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _empty(q):
    B, L, N, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, N, L), dtype=torch.promote_types(q.dtype, torch.float32))


@register_flop_formula(torch.ops.nanovideo.attend)
def _(q, k, v, grid, tile, window, **_):
    B, L, N, K = q
    return 4 * B * N * K * (build_metadata(grid, tile, window).pairs if grid else L * k[1])


@register_flop_formula(torch.ops.nanovideo.attend_backward)
def _(grad, q, k, v, out, lse, grid, tile, window, **_):
    B, L, N, K = q
    return 10 * B * N * K * (build_metadata(grid, tile, window).pairs if grid else L * k[1])


# ---- dense: PyTorch's own kernels, called below autograd -------------------------------------------------------------

aten = torch.ops.aten
cpu_flash = aten._scaled_dot_product_flash_attention_for_cpu.default
cpu_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _heads_first(*xs):
    return [x.transpose(1, 2) for x in xs]


def _tokens_first(*xs):
    return tuple(x.transpose(1, 2).contiguous() for x in xs)


def _no_seed(q):
    """The seed and the offset of dropout, of which there is none."""
    return [torch.empty((), dtype=torch.long, device=q.device)] * 2


def _cpu_dense(q, k, v, *_):
    out, lse = cpu_flash(*_heads_first(q, k, v))
    return *_tokens_first(out), lse.contiguous()


def _cpu_dense_backward(grad, q, k, v, out, lse, *_):
    return _tokens_first(*cpu_flash_backward(*_heads_first(grad, q, k, v, out), lse, 0.0, False))


def _flash(q, k, v, *_):
    out, lse, *_ = aten._scaled_dot_product_flash_attention.default(*_heads_first(q, k, v))
    return *_tokens_first(out), lse.contiguous()


def _flash_backward(grad, q, k, v, out, lse, *_):
    return _tokens_first(*aten._scaled_dot_product_flash_attention_backward.default(
        *_heads_first(grad, q, k, v, out), lse, None, None, q.shape[1], k.shape[1], 0.0, False, *_no_seed(q)))


def _cudnn(q, k, v, *_):  # its lse is (B, N, L, 1)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(*_heads_first(q, k, v), None, True)
    return *_tokens_first(out), lse.reshape(lse.shape[:3]).contiguous()


def _cudnn_backward(grad, q, k, v, out, lse, *_):
    grad = grad.contiguous()  # PyTorch 2.11 keeps the plan of its first call, whatever grad's strides are in the next
    return _tokens_first(*aten._scaled_dot_product_cudnn_attention_backward.default(
        *_heads_first(grad, q, k, v, out), lse[..., None], *_no_seed(q), None, None, None, q.shape[1], k.shape[1], 0.0,
        False))


def _efficient(q, k, v, *_):  # its lse is padded to a multiple of 32 queries
    out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(*_heads_first(q, k, v), None, True)
    return *_tokens_first(out), lse[..., :q.shape[1]].contiguous()


def _efficient_backward(grad, q, k, v, out, lse, *_):
    lse = torch.nn.functional.pad(lse, (0, -q.shape[1] % 32), value=torch.inf)
    return _tokens_first(*aten._scaled_dot_product_efficient_attention_backward.default(
        *_heads_first(grad, q, k, v), None, *_heads_first(out), lse, *_no_seed(q), 0.0, [True, True, True, False])[:3])


# ---- CPU: each box of queries is dense over its box of keys ----------------------------------------------------------


def _strips(metadata):
    """Boxes that share frames and rows: their queries and keys, columns outermost, and each box's slices of the two."""
    place = metadata.inverse.view(metadata.grid)
    for (q_f, k_f), (q_h, k_h) in product(*metadata.forward[:2]):
        queries, keys = (place[slice(*f), slice(*h)].flatten(0, 1).T for f, h in ((q_f, q_h), (k_f, k_h)))  # (W, f h)
        m, n = queries.shape[1], keys.shape[1]
        yield queries.flatten(), keys.flatten(), [(slice(q0 * m, q1 * m), slice(k0 * n, k1 * n))
                                                  for (q0, q1), (k0, k1) in metadata.forward[2]]


def _cpu(q, k, v, *pattern):
    out, lse = _empty(q)
    for queries, keys, boxes in _strips(build_metadata(*pattern)):
        q_s, k_s, v_s = _heads_first(*(x.index_select(1, at) for x, at in ((q, queries), (k, keys), (v, keys))))
        o, l = zip(*(cpu_flash(q_s[:, :, i], k_s[:, :, j], v_s[:, :, j]) for i, j in boxes))
        out.index_copy_(1, queries, torch.cat(o, 2).transpose(1, 2))
        lse.index_copy_(2, queries, torch.cat(l, 2))
    return out, lse


def _cpu_backward(grad, q, k, v, out, lse, *pattern):
    dq, dk, dv = q.new_empty(q.shape), *(x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for queries, keys, boxes in _strips(build_metadata(*pattern)):
        grad_s, q_s, out_s = _heads_first(*(x.index_select(1, queries) for x in (grad, q, out)))
        k_s, v_s = _heads_first(*(x.index_select(1, keys) for x in (k, v)))
        lse_s, dq_s = lse.index_select(2, queries), []
        dk_s, dv_s = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_s, v_s))
        for i, j in boxes:
            a, b, c = cpu_flash_backward(grad_s[:, :, i], q_s[:, :, i], k_s[:, :, j], v_s[:, :, j], out_s[:, :, i],
                                         lse_s[:, :, i], 0.0, False)
            dq_s.append(a)
            dk_s[:, :, j] += b
            dv_s[:, :, j] += c
        dq.index_copy_(1, queries, torch.cat(dq_s, 2).transpose(1, 2))
        dk.index_add_(1, keys, dk_s.transpose(1, 2))
        dv.index_add_(1, keys, dv_s.transpose(1, 2))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ---- Triton: a program takes ROWS tokens of one box and walks through the other box, STEP tokens at a time -----------
#
# In tile order, the columns of a box that share a row of tiles lie one after the other: a run. The walk goes from run
# to run, so each address is arithmetic on three counters, no index is loaded on the way, and only the last block of a
# run can need a mask. Exponentials are to base 2: scale is log2(e) / sqrt(K), and dQ and dK take it times ln(2).

# A job is a program's work, JOB integers. Boxes are [first, end) along frames, rows and columns, in tokens:
#
#    0 f0    1 f1    2 h0    3 h1    4 w0    5 w1     the box that the program's ROWS tokens are in
#    6 i                                              the first of them, counted in raster order within the box
#    7 f             8 h0    9 h1   10 w0   11 w1     the other box, which it walks through from frame f on,
#   12 blocks                                         in so many blocks

jit = triton.jit if triton else lambda kernel: kernel
JOB = tl.constexpr(13) if triton else 13


@jit
def _rows(job, size, tile, ROWS: tl.constexpr):
    """Places in tile order of ROWS tokens, counted in raster order within the job's box, and which of them exist."""
    # volatile: when asked again after the walk they are computed again, not kept in registers all the way
    f0, f1, h0 = tl.load(job, volatile=True), tl.load(job + 1, volatile=True), tl.load(job + 2, volatile=True)
    h1, w0, w1 = tl.load(job + 3, volatile=True), tl.load(job + 4, volatile=True), tl.load(job + 5, volatile=True)
    i = tl.load(job + 6, volatile=True) + tl.arange(0, ROWS)
    f, h, w = f0 + i // ((h1 - h0) * (w1 - w0)), h0 + i // (w1 - w0) % (h1 - h0), w0 + i % (w1 - w0)
    tf, th, tw = f // tile[0] * tile[0], h // tile[1] * tile[1], w // tile[2] * tile[2]  # where the token's tile begins
    a, b, c = tl.minimum(tile[0], size[0] - tf), tl.minimum(tile[1], size[1] - th), tl.minimum(tile[2], size[2] - tw)
    place = tf * size[1] * size[2] + a * (th * size[2] + b * tw) + ((f - tf) * b + h - th) * c + w - tw
    return place, f < f1


@jit
def _at(b, row, n, stride, BK: tl.constexpr):
    token = b.to(tl.int64) * stride[0] + row.to(tl.int64) * stride[1] + n * stride[2]
    return token[:, None] + tl.arange(0, BK)[None, :]


@jit
def _start(job):
    """The walk's first frame, its rows h0 h1, its columns w0 w1 and its number of blocks."""
    return (tl.load(job + 7), tl.load(job + 8), tl.load(job + 9), tl.load(job + 10), tl.load(job + 11),
            tl.load(job + 12))


@jit
def _run(f, h, w0, w1, size, step):
    """The first token and the length of the run at frame f, row h."""
    a, b = tl.minimum(step[0], size[0] - f), tl.minimum(step[1], size[1] - h)
    return f * size[1] * size[2] + a * (h * size[2] + b * w0), a * b * (w1 - w0)


@jit
def _next(f, h, i, left, h0, h1, step, STEP: tl.constexpr):
    """On by one block: to the next one of the run, else to the next row's run, else to the next frame's."""
    h = tl.where(left <= STEP, h + step[1], h)
    i = tl.where(left <= STEP, 0, i + STEP)
    f = tl.where(h >= h1, f + step[0], f)
    return f, tl.where(h >= h1, h0, h), i


@jit
def _block(X, b, row, n, left, stride, STEP: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr,
           TMA: tl.constexpr):
    """STEP tokens from `row` on, (STEP, BK). Only `left` of them belong to the run: the caller masks the others."""
    if TMA:
        return X.load([b, row, n, 0]).reshape(STEP, BK)
    else:
        i, c = tl.arange(0, STEP)[:, None], tl.arange(0, BK)[None, :]
        x = X + (b.to(tl.int64) * stride[0] + row.to(tl.int64) * stride[1] + n * stride[2]) + (i * stride[1] + c)
        if RAGGED or WIDTH < BK:
            return tl.load(x, mask=(i < left) & (c < WIDTH), other=0.0)
        else:
            return tl.load(x)


@jit
def _forward_kernel(Q, K, V, Out, Lse, jobs, q_stride, k_stride, v_stride, out_stride, L, N, size, tile, step, scale,
                    WIDTH: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr,
                    TMA: tl.constexpr):
    job, n, b = jobs + tl.program_id(0) * JOB, tl.program_id(1), tl.program_id(2)
    row, exists = _rows(job, size, tile, ROWS)
    keep = exists[:, None] & (tl.arange(0, BK) < WIDTH)[None, :]
    q = tl.load(Q + _at(b, row, n, q_stride, BK), mask=keep, other=0.0)

    m = tl.full((ROWS,), -1e30, tl.float32)  # finite, so that a block without any key changes nothing
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BK), tl.float32)
    f, h0, h1, w0, w1, blocks = _start(job)
    h, i = h0, 0
    for _ in range(blocks):
        start, length = _run(f, h, w0, w1, size, step)
        k = _block(K, b, start + i, n, length - i, k_stride, STEP, WIDTH, BK, RAGGED, TMA)
        s = tl.dot(q, k.T, input_precision="ieee")
        if RAGGED:
            if length - i < STEP:
                s = tl.where((tl.arange(0, STEP) < length - i)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v = _block(V, b, start + i, n, length - i, v_stride, STEP, WIDTH, BK, RAGGED, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        f, h, i = _next(f, h, i, length - i, h0, h1, step, STEP)

    tl.store(Out + _at(b, row, n, out_stride, BK), (acc / l[:, None]).to(Out.dtype.element_ty), mask=keep)
    tl.store(Lse + (b * N + n) * L + row, (m + tl.log2(l)) * 0.6931471805599453, mask=exists)


@jit
def _query_kernel(Q, K, V, Out, Lse, Grad, Stats, DQ, jobs, q_stride, k_stride, v_stride, out_stride, grad_stride,
                  dq_stride, L, N, size, tile, step, scale, WIDTH: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
                  STEP: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr):
    """dQ, and in Stats for the next kernel each query's log-sum-exp, to base 2, and its sum of out * grad."""
    job, n, b = jobs + tl.program_id(0) * JOB, tl.program_id(1), tl.program_id(2)
    row, exists = _rows(job, size, tile, ROWS)
    keep = exists[:, None] & (tl.arange(0, BK) < WIDTH)[None, :]
    q = tl.load(Q + _at(b, row, n, q_stride, BK), mask=keep, other=0.0)
    grad = tl.load(Grad + _at(b, row, n, grad_stride, BK), mask=keep, other=0.0)
    out = tl.load(Out + _at(b, row, n, out_stride, BK), mask=keep, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    stat = (b * N + n) * L + row
    lse = tl.load(Lse + stat, mask=exists, other=0.0) * 1.4426950408889634
    tl.store(Stats + stat, lse, mask=exists)
    tl.store(Stats + tl.num_programs(2) * N * L + stat, delta, mask=exists)

    dq = tl.zeros((ROWS, BK), tl.float32)
    f, h0, h1, w0, w1, blocks = _start(job)
    h, i = h0, 0
    for _ in range(blocks):
        start, length = _run(f, h, w0, w1, size, step)
        k = _block(K, b, start + i, n, length - i, k_stride, STEP, WIDTH, BK, RAGGED, TMA)
        v = _block(V, b, start + i, n, length - i, v_stride, STEP, WIDTH, BK, RAGGED, TMA)
        p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
        if RAGGED:
            if length - i < STEP:
                p = tl.where((tl.arange(0, STEP) < length - i)[None, :], p, 0.0)
        ds = p * (tl.dot(grad, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        f, h, i = _next(f, h, i, length - i, h0, h1, step, STEP)

    dq *= scale * 0.6931471805599453
    tl.store(DQ + _at(b, row, n, dq_stride, BK), dq.to(DQ.dtype.element_ty), mask=keep)


@jit
def _key_kernel(Q, K, V, Grad, Stats, DK, DV, jobs, q_stride, k_stride, v_stride, grad_stride, dk_stride, dv_stride,
                L, N, size, tile, step, scale, WIDTH: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
                STEP: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr):
    """dK and dV of ROWS keys, over the box of queries that see them; scores are transposed, keys x queries."""
    job, n, b = jobs + tl.program_id(0) * JOB, tl.program_id(1), tl.program_id(2)
    row, exists = _rows(job, size, tile, ROWS)
    keep = exists[:, None] & (tl.arange(0, BK) < WIDTH)[None, :]
    k = tl.load(K + _at(b, row, n, k_stride, BK), mask=keep, other=0.0)
    v = tl.load(V + _at(b, row, n, v_stride, BK), mask=keep, other=0.0)

    dk = tl.zeros((ROWS, BK), tl.float32)
    dv = tl.zeros((ROWS, BK), tl.float32)
    f, h0, h1, w0, w1, blocks = _start(job)
    h, i = h0, 0
    for _ in range(blocks):
        start, length = _run(f, h, w0, w1, size, step)
        q = _block(Q, b, start + i, n, length - i, q_stride, STEP, WIDTH, BK, RAGGED, TMA)
        grad = _block(Grad, b, start + i, n, length - i, grad_stride, STEP, WIDTH, BK, RAGGED, TMA)
        stat = Stats + (b * N + n) * L + start + i + tl.arange(0, STEP)
        if RAGGED:  # 2^(s - inf) = 0 where there is no query
            lse = tl.load(stat, mask=tl.arange(0, STEP) < length - i, other=float("inf"))
            delta = tl.load(stat + tl.num_programs(2) * N * L, mask=tl.arange(0, STEP) < length - i, other=0.0)
        else:
            lse = tl.load(stat)
            delta = tl.load(stat + tl.num_programs(2) * N * L)
        p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        ds = p * (tl.dot(v, grad.T, input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        f, h, i = _next(f, h, i, length - i, h0, h1, step, STEP)

    row, exists = _rows(job, size, tile, ROWS)
    keep = exists[:, None] & (tl.arange(0, BK) < WIDTH)[None, :]
    dk *= scale * 0.6931471805599453
    tl.store(DK + _at(b, row, n, dk_stride, BK), dk.to(DK.dtype.element_ty), mask=keep)
    tl.store(DV + _at(b, row, n, dv_stride, BK), dv.to(DV.dtype.element_ty), mask=keep)


# A program's (ROWS, STEP, warps, stages) in the forward, dQ and dK/dV kernels, by the kind of GPU and the width of a
# head, at most. 100 is sm_100 and 90 is sm_90, 227 KB of shared memory and blocks by TMA; 80 is sm_80, 163 KB, and
# those two where TMA cannot serve; 89 is sm_86, sm_89 and sm_120, 99 KB. All are free of spills.
HALF = {(100, 64): ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        (100, 128): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        (90, 64): ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        (90, 128): ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
        (80, 64): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        (80, 128): ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        (89, 64): ((128, 32, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
        (89, 128): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2))}
FULL = {64: ((64, 16, 8, 1), (64, 32, 8, 2), (32, 32, 8, 2)), 128: ((32, 32, 8, 1), (32, 16, 8, 2), (32, 16, 4, 1))}


def _settings(*xs):
    """Whether blocks come by TMA, and the three kernels' settings."""
    x, width = xs[0], 64 if xs[0].shape[3] <= 64 else 128
    if x.shape[3] > 128 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"heads of {x.shape[3]} in {x.dtype} on {x.device}: takes up to 128, in float16, bfloat16 "
                         "or float32")
    if x.dtype == torch.float32:
        return False, FULL[width]
    card = _card(x)
    shared = card.shared_memory_per_block_optin // 1024
    if shared >= 227 and all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 < s for s in x.stride()[:3]) for x in xs):
        return True, HALF[100 if card.major >= 10 else 90, width]
    return False, HALF[80 if shared >= 163 else 89, width]


@lru_cache(maxsize=None)
def _walks(grid, tile, window, lengths, reverse, rows, block, device):
    """A kernel's jobs [(ragged, (jobs, JOB) int32)], and the frames and rows that a run spans.

    Walks whose runs are made of whole blocks go apart, free of masks. Longest first: in reverse they differ by 10 x.
    """
    if grid:
        metadata = build_metadata(grid, tile, window, device)
        axes = metadata.reverse if reverse else metadata.forward
        whole = len(metadata.forward[1]) == len(metadata.forward[2]) == 1  # all rows and columns are seen: one run
        step = metadata.tile[0], grid[1] if whole else metadata.tile[1]
    else:
        own, other = reversed(lengths) if reverse else lengths
        one = (0, 1), (0, 1)
        axes, step = ([one], [one], [((0, own), (0, other))]), (1, 1)  # a row of tokens, which is one run

    jobs = {False: [], True: []}
    for (own_f, f), (own_h, h), (own_w, w) in product(*axes):
        runs = [(min(a + step[0], f[1]) - a) * (min(b + step[1], h[1]) - b) * (w[1] - w[0])
                for a in range(*f, step[0]) for b in range(*h, step[1])]
        size = prod(end - first for first, end in (own_f, own_h, own_w))
        walk = f[0], *h, *w, sum(ceil_div(run, block) for run in runs)
        jobs[any(run % block for run in runs)] += [(*own_f, *own_h, *own_w, i, *walk) for i in range(0, size, rows)]
    return [(ragged, torch.tensor(sorted(table, key=lambda job: -job[-1]), dtype=torch.int32, device=device))
            for ragged, table in jobs.items() if table], step


def _launch(kernel, setting, tma, pattern, lengths, walked, **tensors):
    """Runs a kernel over all jobs, heads and samples; the tensors that are walked through may come by TMA."""
    rows, block, warps, stages = setting
    grid, tile, window = map(tuple, pattern)
    q = tensors["Q"]
    B, _, N, K = q.shape
    BK = max(16, triton.next_power_of_2(K))
    strides = {f"{name.lower()}_stride": x.stride()[:3] for name, x in tensors.items() if x.ndim == 4}
    if tma:
        tensors |= {name: TensorDescriptor.from_tensor(tensors[name], [1, block, 1, BK]) for name in walked}
    walks, step = _walks(grid, tile, window, lengths, kernel is _key_kernel, rows, block, q.device)
    size, tile = (grid, tile) if grid else ((1, 1, max(lengths)), (1, 1, 1))  # dense: a row of tiles of one token
    with torch.cuda.device_of(q):
        for ragged, jobs in walks:
            kernel[len(jobs), N, B](**tensors, **strides, jobs=jobs, L=lengths[0], N=N, size=size, tile=tile, step=step,
                                     scale=K**-0.5 * 1.4426950408889634, WIDTH=K, BK=BK, ROWS=rows, STEP=block,
                                     RAGGED=ragged, TMA=tma, num_warps=warps, num_stages=stages)


def _triton(q, k, v, *pattern):
    tma, (setting, _, _) = _settings(q, k, v)
    out, lse = _empty(q)
    _launch(_forward_kernel, setting, tma, pattern, (q.shape[1], k.shape[1]), ("K", "V"),
            Q=q, K=k, V=v, Out=out, Lse=lse)
    return out, lse


def _triton_backward(grad, q, k, v, out, lse, *pattern):
    tma, (_, query, key) = _settings(q, k, v, grad)
    lengths = q.shape[1], k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    stats = lse.new_empty((2, lse.numel()))
    _launch(_query_kernel, query, tma, pattern, lengths, ("K", "V"),
            Q=q, K=k, V=v, Out=out, Lse=lse, Grad=grad, Stats=stats, DQ=dq)
    _launch(_key_kernel, key, tma, pattern, lengths, ("Q", "Grad"),
            Q=q, K=k, V=v, Grad=grad, Stats=stats, DK=dk, DV=dv)
    return dq, dk, dv


# ---- the slow and obvious way ----------------------------------------------------------------------------------------


def reference(q, k, v, metadata):
    """What `attention` computes, by a dense mask written from the definition above; any float dtype, L^2 memory."""
    see = torch.ones(1, 1, dtype=torch.bool)
    for size, tile, w in zip(metadata.grid, metadata.tile, metadata.window):
        n, at = ceil_div(size, tile), torch.arange(size) // tile
        first = (at - w // 2).clamp(0, n - w)[:, None]
        sees = (first <= at) & (at < first + w)
        if w < 0:
            back = at[:, None] - at     # by how many tiles a query is later than a key
            sees = (0 <= back) & (back < -w)
        see = torch.kron(see, sees)  # raster order: the last axis is the fastest
    see = see.to(q.device)[metadata.order][:, metadata.order]
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[-1]**0.5
    return torch.einsum("bnls,bsnk->blnk", scores.masked_fill(~see, -torch.inf).softmax(-1), v)
