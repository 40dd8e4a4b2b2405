"""attention.py on the CPU: the pattern, the operator, and the boxes beside a dense mask in float64."""
import random
import subprocess
import sys
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import attention as module
from attention import attention, build_metadata, reference

ATTEND = torch.ops.nanovideo.attend.default
ATTEND_BACKWARD = torch.ops.nanovideo.attend_backward.default


def inputs(metadata, B=1, N=2, K=8, seed=0, dtype=torch.float64):
    """q, k, v that want gradients, and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = torch.randn(4, B, prod(metadata.grid), N, K, generator=generator, dtype=dtype)
    return *(x.requires_grad_() for x in (q, k, v)), grad


def compare(metadata, q, k, v, grad, rtol=1e-10):
    """Output and the three gradients against the dense mask; each is off by at most rtol of its largest number."""
    ours, theirs = attention(q, k, v, metadata), reference(*(x.double() for x in (q, k, v)), metadata)
    ours = ours, *torch.autograd.grad(ours, (q, k, v), grad)
    theirs = theirs, *torch.autograd.grad(theirs, (q, k, v), grad.double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        assert a.shape == b.shape, f"{name} on {metadata}"
        assert (a - b).abs().max() <= rtol * b.abs().max(), f"{name} on {metadata}"


def sees_along(size, tile, w):
    """(size, size): whether the query at q sees the key at k along one axis, from the definition."""
    n = -(-size // tile)
    first = [max(0, min(q // tile - w // 2, n - w)) for q in range(size)]
    sees = [[first[q] <= k // tile < first[q] + w for k in range(size)] for q in range(size)]
    if w < 0:
        sees = [[0 <= q // tile - k // tile <= -w - 1 for k in range(size)] for q in range(size)]
    return torch.tensor(sees)


def visible(metadata):
    """(L, L) in raster order, axis by axis from the definition."""
    see = torch.ones((1,) * 6, dtype=torch.bool)
    for axis, (size, tile, w) in enumerate(zip(metadata.grid, metadata.tile, metadata.window)):
        see = see & sees_along(size, tile, w).view([size if i % 3 == axis else 1 for i in range(6)])
    return see.reshape(prod(metadata.grid), -1)


def random_pattern(seed):
    rng = random.Random(seed)
    grid = [rng.randint(1, 9) for _ in range(3)]
    return build_metadata(grid, [rng.randint(1, 4) for _ in range(3)], [rng.randint(1, 6) for _ in range(3)])


def causal_pattern(seed):
    """Block-causal along frames; along rows and columns it slides, or sees all."""
    rng = random.Random(seed)
    grid, tile = [rng.randint(1, 9) for _ in range(3)], [rng.randint(1, 4) for _ in range(3)]
    space = rng.choice(((1, 1), (3, 1), (1, 3), (3, 3), (9, 9)))
    return build_metadata(grid, tile, (-rng.randint(1, 10), *space))


# ---- the pattern -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_query_sees_the_tiles_of_the_definition_and_as_many_as_every_other(seed):
    metadata = random_pattern(seed)
    see = visible(metadata)
    assert metadata.pairs == see.sum()
    assert metadata.sparsity == 1 - metadata.pairs / see.numel()
    q, k, v, _ = inputs(metadata, N=1)
    weights = reference(0 * q, k, torch.eye(see.shape[0], dtype=q.dtype)[None, :, None], metadata)[0, :, 0]
    assert torch.equal(weights[metadata.inverse] > 0, see[:, metadata.order])

    tiles = [range(0, size, tile) for size, tile in zip(metadata.grid, metadata.tile)]
    corner = torch.zeros(metadata.grid)
    for place in product(*tiles):
        corner[place] = 1
    assert (see.double() @ corner.double().flatten() == prod(metadata.window)).all()


@pytest.mark.parametrize("pattern", [random_pattern, causal_pattern])
@pytest.mark.parametrize("seed", range(20))
def test_both_neighbourhoods_are_the_definition_seen_from_either_side(pattern, seed):
    metadata = pattern(seed)
    for size, tile, w, forward, reverse in zip(metadata.grid, metadata.tile, metadata.window, metadata.forward,
                                               metadata.reverse):
        n, sees = -(-size // tile), sees_along(size, tile, w)
        for pairs, transposed in ((forward, False), (reverse, True)):
            built = torch.zeros_like(sees)
            for (own0, own1), (other0, other1) in pairs:
                assert not built[own0:own1].any(), "a token is in two boxes"
                built[own0:own1, other0:other1] = True
            assert torch.equal(built, sees.T if transposed else sees)
        assert len(forward) == (n if w < 0 else n - w + 1)
        assert len(reverse) == n


@pytest.mark.parametrize("seed", range(20))
def test_a_chunk_sees_the_last_ones_up_to_its_own(seed):
    metadata = causal_pattern(seed)
    see = visible(metadata)
    assert metadata.pairs == see.sum()
    q, k, _, _ = inputs(metadata, N=1)
    weights = reference(0 * q, k, torch.eye(see.shape[0], dtype=q.dtype)[None, :, None], metadata)[0, :, 0]
    assert torch.equal(weights[metadata.inverse] > 0, see[:, metadata.order])


def test_a_window_of_more_chunks_than_there_are_sees_all_earlier_ones():
    metadata = build_metadata((5, 4, 4), (2, 99, 99), (-9, 1, 1))
    assert metadata.window == (-3, 1, 1)
    assert metadata.forward[0] == (((0, 2), (0, 2)), ((2, 4), (0, 4)), ((4, 5), (0, 5)))
    assert build_metadata(metadata.grid, metadata.tile, metadata.window).forward == metadata.forward


def test_tile_order_keeps_a_tile_together_and_inverse_undoes_it():
    metadata = build_metadata((3, 5, 9), (2, 4, 4), (1, 1, 1))
    x = torch.randn(2, 135, 3)
    assert torch.equal(x[:, metadata.order][:, metadata.inverse], x)
    tile = [(f // 2, h // 4, w // 4) for f, h, w in product(range(3), range(5), range(9))]
    assert [tile[i] for i in metadata.order] == sorted(tile)
    assert metadata.order[:4].tolist() == [0, 1, 2, 3]
    assert metadata.order[4] == 9  # columns fastest within a tile


def test_windows_are_rounded_as_the_paper_does():
    assert build_metadata((8, 8, 8), (1, 1, 1), (2, 3, 6)).window == (3, 3, 7)
    assert build_metadata((8, 8, 8), (2, 2, 2), (4, 9, 1)).window == (4, 4, 1)  # 4 tiles to an axis
    assert build_metadata((2, 3, 4), (4, 4, 8), (1, 1, 1)).tile == (2, 3, 4)


def test_the_sparsity_of_the_design():
    for grid, tile, expected in (((21, 30, 52), (4, 4, 8), .908), ((21, 45, 80), (4, 4, 8), .958),
                                 ((30, 48, 80), (6, 8, 8), .910), ((21, 30, 52), (6, 8, 8), .728)):
        assert abs(build_metadata(grid, tile, (3, 3, 3)).sparsity - expected) < 5e-4


def test_metadata_is_cached_and_may_be_built_in_inference_mode():
    with torch.inference_mode():
        metadata = build_metadata([3, 6, 7], (1, 2, 3), (1, 1, 1))
    assert build_metadata((3, 6, 7), [1, 2, 3], (1, 1, 1)) is metadata
    x = torch.randn(1, 126, 2, requires_grad=True)
    x[:, metadata.order].sum().backward()


@pytest.mark.parametrize("wrong", [dict(grid=(0, 4, 4)), dict(grid=(4, 4)), dict(tile=(4, -1, 8)),
                                   dict(window=(3, 3, 1.5)), dict(window=(3, -3, 3)), dict(window=(-3, 3, -1)),
                                   dict(window=(0, 3, 3)), dict(tile=(-1, 4, 4)), dict(window=(-1.5, 1, 1))])
def test_errors_name_the_value(wrong):
    with pytest.raises(ValueError) as error:
        build_metadata(**dict(grid=(4, 4, 4)) | wrong)
    (name, value), = wrong.items()
    assert name in str(error.value)
    assert str(value) in str(error.value)


def test_shapes_that_do_not_fit_are_refused_with_their_sizes():
    x = torch.randn(1, 64, 2, 8)
    with pytest.raises(ValueError, match="65 queries.*takes 64"):
        attention(torch.randn(1, 65, 2, 8), x, x, build_metadata((4, 4, 4), (2, 2, 2), (1, 1, 1)))
    with pytest.raises(ValueError, match="1, 64, 2, 8"):
        attention(x, x, torch.randn(1, 64, 2, 4))


# ---- the CPU path ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [random_pattern, causal_pattern])
@pytest.mark.parametrize("block", range(10))
def test_output_and_gradients_are_those_of_a_dense_mask(block, pattern):
    for seed in range(100 + 22 * block, 122 + 22 * block):
        rng = random.Random(seed)
        metadata = pattern(seed)
        compare(metadata, *inputs(metadata, rng.randint(1, 2), rng.randint(1, 3), rng.choice((4, 8, 12)), seed))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrower_types_are_as_near_as_they_can_be(dtype, rtol):
    metadata = build_metadata((5, 9, 13), (2, 3, 4), (1, 3, 1))
    compare(metadata, *inputs(metadata, dtype=dtype), rtol=rtol)


def test_dense_and_cross_attention_go_through_the_same_door():
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (37, 11, 11))
    ours = attention(q, k, v)
    theirs = torch.einsum("bnls,bsnk->blnk", (torch.einsum("blnk,bsnk->bnls", q, k) / 8**.5).softmax(-1), v)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_a_window_that_covers_the_grid_is_dense():
    metadata = build_metadata((5, 6, 7), (2, 2, 2), (9, 9, 9))
    q, k, v, _ = inputs(metadata)
    assert metadata.sparsity == 0
    assert torch.equal(attention(q, k, v, metadata), attention(q, k, v))


def test_tensors_may_be_strided_views():
    metadata = build_metadata((4, 6, 5), (2, 3, 2), (1, 1, 3))
    qkv, grad = torch.randn(2, 120, 3, 2, 8, dtype=torch.float64), torch.randn(2, 120, 8, 2, dtype=torch.float64)
    strided = [qkv[:, :, i].requires_grad_() for i in range(3)]
    compare(metadata, *strided, grad.transpose(2, 3))
    compare(metadata, *strided, torch.ones(()).double().expand(2, 120, 2, 8))
    q, k, v = (torch.randn(2, n, 8, 3, dtype=torch.float64).transpose(2, 3).requires_grad_() for n in (20, 30, 30))
    theirs = attention(*(x.contiguous() for x in (q, k, v)))
    torch.testing.assert_close(attention(q, k, v), theirs)
    ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (attention(q, k, v), theirs))
    torch.testing.assert_close(ours, theirs)


def test_nothing_unseen_and_nothing_uninitialised_is_read():
    metadata = build_metadata((3, 8, 9), (2, 3, 4), (1, 1, 1))
    q, k, v, grad = inputs(metadata)
    far = ~visible(metadata)[metadata.order[0]][metadata.order]  # what the first token does not see
    torch.use_deterministic_algorithms(True)  # fills torch.empty with nan
    try:
        out = attention(q, k, v, metadata)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out, (q, k, v), grad))
        k, v = (x.masked_fill(far[:, None, None], torch.nan) for x in (k, v))
        assert torch.equal(attention(q, k, v, metadata)[0, 0], out[0, 0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max([self.size] + [x.numel() for x in tree_leaves(out) if torch.is_tensor(x)])
            return out
    from attention import _cpu, _cpu_backward
    metadata = build_metadata((8, 24, 24), (2, 4, 4), (3, 3, 3))
    q, k, v, grad = (x.detach() for x in inputs(metadata, N=1, K=4))
    with Largest() as seen:
        out, lse = _cpu(q, k, v, metadata.grid, metadata.tile, metadata.window)
        _cpu_backward(grad, q, k, v, out, lse, metadata.grid, metadata.tile, metadata.window)
    assert seen.size == q.numel()


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [((), (), ()), ((3, 5, 7), (2, 2, 3), (1, 3, 1)),
                                     ((3, 5, 7), (1, 5, 7), (-2, 1, 1))])
def test_the_operator_is_well_formed(pattern):
    q, k, v, _ = inputs(build_metadata((3, 5, 7)))
    torch.library.opcheck(ATTEND, (q, k, v, *map(list, pattern)))
    with torch.no_grad():
        out, lse = ATTEND(q, k, v, *pattern)
        torch.library.opcheck(ATTEND_BACKWARD, (out, q, k, v, out, lse, *map(list, pattern)))


def test_the_log_sum_exp_is_returned():
    metadata = build_metadata((4, 6, 5), (2, 3, 2), (1, 1, 3))
    q, k, v, _ = inputs(metadata)
    see = visible(metadata)[metadata.order][:, metadata.order]
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / 8**.5
    lse = ATTEND(q, k, v, metadata.grid, metadata.tile, metadata.window)[1]
    assert not lse.requires_grad
    torch.testing.assert_close(lse, scores.masked_fill(~see, -torch.inf).logsumexp(-1))
    torch.testing.assert_close(ATTEND(q, k, v, [], [], [])[1], scores.logsumexp(-1))


def double_and_sin(q, k, v, metadata):
    return attention(q * 2, k, v, metadata).sin()


@pytest.mark.slow
def test_compile_keeps_it_whole():
    metadata = build_metadata((3, 5, 7), (2, 2, 3), (1, 3, 1))
    causal = build_metadata((3, 5, 7), (1, 2, 9), (-2, 3, 1))
    q, k, v, grad = inputs(metadata, dtype=torch.float32)
    compiled = torch.compile(double_and_sin, fullgraph=True, backend="aot_eager")
    for pattern in (metadata, causal, None):
        ours, theirs = compiled(q, k, v, pattern), double_and_sin(q, k, v, pattern)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad)):
            torch.testing.assert_close(a, b)


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is ATTEND
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save, calls", [(True, 1), (False, 2)])
def test_selective_checkpointing_runs_the_forward_once(save, calls):
    metadata = build_metadata((3, 5, 7), (2, 2, 3), (1, 3, 1))
    q, k, v, grad = inputs(metadata)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save and op is ATTEND else CheckpointPolicy.PREFER_RECOMPUTE
    with Count() as count:
        out = checkpoint(lambda *x: attention(*(y * 2 for y in x), metadata).sin(), q, k, v, use_reentrant=False,
                         context_fn=lambda: create_selective_checkpoint_contexts(policy))
        grads = torch.autograd.grad(out, (q, k, v), grad)
    assert count.calls == calls
    expected = torch.autograd.grad(attention(*(y * 2 for y in (q, k, v)), metadata).sin(), (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_counted_by_the_pairs(device):
    metadata = build_metadata((3, 5, 7), (2, 2, 3), (1, 3, 1))
    causal = build_metadata((3, 5, 7), (1, 9, 9), (-2, 1, 1))
    q, k, v, _ = (x.detach().to(device).requires_grad_() for x in inputs(metadata, B=2, N=3))
    s = torch.randn(2, 11, 3, 8, device=device, dtype=q.dtype)
    for args, pairs in (((q, k, v, metadata), metadata.pairs), ((q, k, v, causal), 35**2 * 5),
                        ((q, k, v), 105**2), ((q, s, s), 105 * 11)):
        with FlopCounterMode(display=False) as counter:
            out = attention(*args)
            assert counter.get_total_flops() == 4 * 2 * 3 * 8 * pairs
            out.sum().backward()
        assert counter.get_total_flops() == 14 * 2 * 3 * 8 * pairs


@pytest.mark.slow
def test_it_imports_and_runs_where_there_is_no_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch; from attention import attention, build_metadata\n"
            "x = torch.randn(1, 64, 2, 8, requires_grad=True)\n"
            "attention(x, x, x, build_metadata((4, 4, 4), (2, 2, 2), (1, 1, 1))).sum().backward()")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- a GPU's dense kernels, played by the CPU ------------------------------------------------------------------------


def card(name, major, minor, kilobytes):
    return SimpleNamespace(name=name, major=major, minor=minor, shared_memory_per_block_optin=kilobytes * 1024)


CARDS = {"V100": card("Tesla V100-SXM2-16GB", 7, 0, 96), "T4": card("Tesla T4", 7, 5, 64),
         "A100": card("NVIDIA A100-SXM4-80GB", 8, 0, 163), "4090": card("NVIDIA GeForce RTX 4090", 8, 9, 99),
         "H100": card("NVIDIA H100 80GB HBM3", 9, 0, 227), "B200": card("NVIDIA B200", 10, 0, 227),
         "5090": card("NVIDIA GeForce RTX 5090", 12, 0, 99)}


def softmax_forward(kernel, query, key, value, **rest):
    """What PyTorch's forward kernels on a GPU return, on the CPU; tensors are (B, N, L, K)."""
    wanted = {} if kernel == "flash" else dict(attn_bias=None, compute_log_sumexp=True)
    assert rest == wanted, "no bias, no dropout, not causal, and a log-sum-exp"
    scores = query.double() @ key.double().mT / query.shape[3]**0.5
    out, lse, L = scores.softmax(-1) @ value.double(), scores.logsumexp(-1), query.shape[2]
    if kernel == "efficient":
        return out, torch.nn.functional.pad(lse, (0, -L % 32), value=torch.inf), None, None
    return out, lse if kernel == "flash" else lse[..., None], None, None, L, key.shape[2], None, None, None


def softmax_backward(kernel, query, key, value, out, logsumexp, philox_seed, philox_offset, dropout_p, is_causal=False,
                     attn_bias=None, max_q=None, max_k=None, grad_input_mask=None, **rest):
    """What their backward kernels return, from the numbers that they are given."""
    grad = rest.pop("grad_out_" if kernel == "efficient" else "grad_out")
    assert dropout_p == 0
    assert is_causal is False
    assert attn_bias is None
    assert set(rest.values()) <= {None}
    assert all(x.dtype == torch.long and x.numel() == 1 for x in (philox_seed, philox_offset))
    (B, N, L, K), S = query.shape, key.shape[2]
    if kernel == "efficient":
        assert grad_input_mask == [True, True, True, False]
        assert logsumexp.shape == (B, N, L + -L % 32)
        assert (logsumexp[..., L:] == torch.inf).all()
        logsumexp = logsumexp[..., :L]
    else:
        assert (max_q, max_k) == (L, S)
        assert logsumexp.shape == ((B, N, L) if kernel == "flash" else (B, N, L, 1))
        assert kernel == "flash" or grad.transpose(1, 2).is_contiguous()
        logsumexp = logsumexp.view(B, N, L)
    assert logsumexp.dtype == torch.float32
    query, key, value, out, grad = (x.double() for x in (query, key, value, out, grad))
    p = (query @ key.mT / K**0.5 - logsumexp.double()[..., None]).exp()
    ds = p * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) / K**0.5
    return (ds @ key, ds.mT @ query, p.mT @ grad) + ((None,) if kernel == "efficient" else ())


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name): from then on tensors on the CPU count as that card's. -> the list of PyTorch's kernels called since.

    Each is run by PyTorch first, on meta tensors: that checks the arguments against the operator's own schema and
    tells in which shape, type and strides results come.
    """
    calls = []

    def kernel(name):
        operator = getattr(torch.ops.aten, name).default

        def run(*args):
            promised = operator(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                                  if torch.is_tensor(x) else x for x in args))
            which = softmax_backward if name.endswith("_backward") else softmax_forward
            kind = next(kind for kind in ("flash", "cudnn", "efficient") if kind in name)
            results = which(kind, **dict(zip((argument.name for argument in operator._schema.arguments), args)))
            calls.append(name.removeprefix("_scaled_dot_product_"))
            return tuple(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(r) if torch.is_tensor(r) else r
                         for p, r in zip(promised, results, strict=True))
        return SimpleNamespace(default=run)

    def choose(name):
        monkeypatch.setattr(module, "_card", lambda x: CARDS[name])
        calls.clear()
        return calls
    kernels = [f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "cudnn", "efficient")]
    monkeypatch.setattr(module, "aten", SimpleNamespace(**{
        name: kernel(name) for forward in kernels for name in (forward, forward + "_backward")}))
    yield choose
    torch.use_deterministic_algorithms(False)


def dense(q, k, v, grad):
    """Output and gradients in float64, tensor by tensor from the definition."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[3]**0.5
    out = torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v)
    return out, *torch.autograd.grad(out, (q, k, v), grad.double())


# card, type, queries, keys, deterministic -> the kernel that serves
SERVED = [("H100", torch.bfloat16, 37, 37, False, "cudnn"), ("H100", torch.bfloat16, 64, 11, False, "cudnn"),
          ("B200", torch.float16, 45, 20, False, "cudnn"), ("H100", torch.bfloat16, 37, 1, False, "flash"),
          ("B200", torch.bfloat16, 1, 37, False, "flash"), ("H100", torch.bfloat16, 37, 11, True, "flash"),
          ("A100", torch.bfloat16, 37, 11, False, "flash"), ("4090", torch.float16, 64, 37, False, "flash"),
          ("5090", torch.bfloat16, 33, 33, False, "flash"), ("H100", torch.float32, 37, 11, False, "efficient"),
          ("A100", torch.float32, 64, 64, True, "efficient"), ("T4", torch.float16, 37, 11, False, "efficient"),
          ("T4", torch.float32, 33, 64, False, "efficient"), ("V100", torch.float16, 64, 33, False, "efficient")]


@pytest.mark.parametrize("name, dtype, L, S, deterministic, kernel", SERVED)
def test_each_card_attends_by_its_own_kernel(gpu, name, dtype, L, S, deterministic, kernel):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, n, 3, 16, generator=generator).to(dtype) for n in (L, S, S, L))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    calls = gpu(name)
    torch.use_deterministic_algorithms(deterministic)  # True fills torch.empty with nan
    ours = attention(q, k, v)
    ours = ours, *torch.autograd.grad(ours, (q, k, v), grad)
    assert calls == [f"{kernel}_attention", f"{kernel}_attention_backward"]
    rtol = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for what, a, b in zip(("out", "dq", "dk", "dv"), ours, dense(q, k, v, grad)):
        assert a.dtype == dtype, what
        assert (a - b).abs().max() <= rtol * b.abs().max().clamp_min(1e-3), what


def test_the_log_sum_exp_of_every_kernel_is_the_same(gpu):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator).half() for n in (37, 11, 11))
    lse = (torch.einsum("blnk,bsnk->bnls", q.double(), k.double()) / 4).logsumexp(-1).float()
    for name in ("H100", "A100", "T4"):
        gpu(name)
        torch.testing.assert_close(ATTEND(q, k, v, [], [], [])[1], lse)


@pytest.mark.parametrize("name, dtype, K, tiles", [
    ("T4", torch.bfloat16, 16, False), ("V100", torch.float32, 16, True), ("T4", torch.float16, 12, False)])
def test_a_card_below_ampere_is_refused_by_name(gpu, name, dtype, K, tiles):
    calls, x = gpu(name), torch.randn(1, 64, 2, K, dtype=dtype)
    with pytest.raises(ValueError) as error:
        attention(x, x, x, build_metadata((4, 4, 4), (2, 2, 2), (1, 1, 1)) if tiles else None)
    text = str(error.value)
    assert CARDS[name].name in text
    assert "sm_80" in text
    assert "\n" not in text
    assert not calls
    assert "sliding tiles" in text if tiles else str(dtype) in text


def test_what_no_kernel_of_pytorch_serves_goes_to_ours(gpu):
    pytest.importorskip("triton", reason="triton is for Linux")
    for name, (dtype, K), grid in (("A100", (torch.bfloat16, 16), [4, 4, 4]), ("H100", (torch.float32, 16), [4, 4, 4]),
                                   ("H100", (torch.bfloat16, 12), []), ("4090", (torch.float32, 6), [])):
        gpu(name)
        x = torch.randn(1, 64, 2, K, dtype=dtype)
        assert module._backend(x, x, grid) == (module._triton, module._triton_backward)


# ---- the layout that register_fake promises --------------------------------------------------------------------------

# card, type, over tiles or dense: all of the CPU's and of a GPU's kernels but ours, which test_kernels.py looks at
BACKENDS = [(None, torch.bfloat16, False), (None, torch.float64, False), (None, torch.bfloat16, True),
            ("H100", torch.bfloat16, False), ("A100", torch.bfloat16, False), ("T4", torch.float16, False)]


@pytest.mark.parametrize("name, dtype, tiles", BACKENDS)
@pytest.mark.parametrize("view", ["whole", "part", "heads first"])
def test_results_are_laid_out_as_the_compiler_is_told(gpu, name, dtype, tiles, view):
    def make():  # (2, 60, 3, 16), whichever way it lies in memory
        if view == "heads first":
            return torch.randn(2, 3, 60, 16, dtype=dtype).transpose(1, 2)
        return torch.randn(2, 60, 3, 48, dtype=dtype)[..., 16:32] if view == "part" else torch.randn(
            2, 60, 3, 16, dtype=dtype)
    if name:
        gpu(name)
    q, k, v, grad = (make() for _ in range(4))
    pattern = [[3, 4, 5], [2, 2, 2], [1, 1, 1]] if tiles else [[], [], []]

    def run(q, k, v, grad):
        out, lse = ATTEND(q, k, v, *pattern)
        return out, lse, *ATTEND_BACKWARD(grad, q, k, v, out, lse, *pattern)
    told = run(*(x.to("meta") for x in (q, k, v, grad)))
    for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(q, k, v, grad), told, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what
        assert a.is_contiguous(), what


@pytest.mark.slow
def test_compiled_code_relies_on_that_layout_and_gets_it(gpu):
    metadata = build_metadata((3, 5, 7), (2, 2, 3), (1, 3, 1))
    compiled = torch.compile(double_and_sin, fullgraph=True)
    for name, dtype, tiles in BACKENDS:
        if dtype != torch.bfloat16:
            continue
        q, k, v, grad = inputs(metadata, N=2, K=16, dtype=dtype)
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # results must not lie as q does
        if name:
            gpu(name)
        ours, theirs = (f(q, k, v, metadata if tiles else None) for f in (compiled, double_and_sin))
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad)):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
