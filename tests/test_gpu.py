"""What only a GPU can show; the same code runs on the CPU at its size. Run: pytest tests/test_gpu.py [-k cuda]"""
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import attention as module
import bench
import ckpt
import parallel
import train
from attention import attention, build_metadata
from data import Latents
from helpers import run, same, shapes_dataset, state
from model import bind
from step import copies, train_step

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS reads it once, for --deterministic
NONE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
DEVICES = [pytest.param("cuda", marks=NONE), "cpu"]
PAIRS = [*(("cuda", pair) for pair in ("cudnn", "flash", "efficient", "triton")), ("cpu", "cpu_dense")]
WAYS = [{}, {"window": (1, 1, 1)}, {"remat": True}, {"rank": 4}]
SM = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@pytest.fixture
def world():
    """-> function that makes a world as parallel.init does."""
    yield parallel.init
    if dist.is_initialized():
        dist.destroy_process_group()


def errors(function, exact, tensors, dtype):
    """Largest errors of output and gradients, against float64, over those of `exact` in this dtype."""
    def run(function, dtype):
        *qkv, grad = (x.to(dtype) for x in tensors)
        qkv = [x.clone().requires_grad_() for x in qkv]
        out = function(*qkv)
        return out, *torch.autograd.grad(out, qkv, grad)
    best, plain, ours = run(exact, torch.float64), run(exact, dtype), run(function, dtype)
    return [((a - e).abs().max() / (b - e).abs().max().clamp_min(2e-6 * e.abs().max())).item()
            for a, b, e in zip(ours, plain, best)]


def dense(q, k, v):
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[3]**0.5
    return torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v)


# ---- attention


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_sliding_tiles_are_as_exact_as_plain_pytorch(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(bench, "PATTERNS", bench.PATTERNS[4:5])
    assert bench.check_attention(device) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device, pair", PAIRS)
def test_a_dense_pair_is_as_exact_as_plain_pytorch(device, pair, dtype, monkeypatch):
    if device == "cuda":
        if not SM:
            pytest.skip("no GPU that PyTorch can use")
        if pair in ("cudnn", "flash") and (dtype == torch.float32 or SM < 8):
            pytest.skip(f"{pair} takes bf16 and fp16, from sm_80 on")
        if pair == "cudnn" and SM not in (9, 10):
            pytest.skip("attention.py asks cuDNN on sm_90 and sm_100 alone")
    both = getattr(module, f"_{pair}"), getattr(module, f"_{pair}_backward")
    monkeypatch.setattr(module, "_backend", lambda q, k, grid: both)
    for L, S, width in ((200, 77, 64), (333, 333, 128)):        # lengths that no block divides
        generator = torch.Generator(device).manual_seed(0)
        shapes = (2, L, 3, width), (2, S, 3, width), (2, S, 3, width), (2, L, 3, width)
        tensors = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
        tensors = [x.to(dtype) for x in tensors]
        assert max(errors(attention, dense, tensors, dtype)) < 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_door_takes_views_and_expanded_gradients_and_gives_contiguous_tensors(device, dtype):
    metadata = build_metadata((3, 5, 7), (2, 2, 3), (1, 1, 1), device)
    for pattern in (None, metadata):
        qkv = torch.randn(1, 105, 3, 2, 64, device=device, dtype=dtype)
        q, k, v = (x.requires_grad_() for x in qkv.unbind(2))
        out = attention(q, k, v, pattern)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        for x in (out, *grads):
            assert x.is_contiguous()
            assert x.isfinite().all()
            assert x.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
def test_sliding_tiles_are_right_at_full_size(device):
    grid, heads, width = ((21, 30, 52), 12, 128) if device == "cuda" else ((4, 8, 8), 2, 32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = torch.randn(3, 1, torch.tensor(grid).prod(), heads, width, device=device, dtype=dtype)
    bench.check_rows(build_metadata(grid, (4, 4, 8), (3, 3, 3), device), *qkv)


# ---- the step


def learnt(world, device, precision, compile, window=None, remat=False, rank=0):
    """Losses and gradient norms of three updates of the tiny model on one batch, and the learner."""
    here = world(device, precision=precision, compile=compile)
    cfg = SimpleNamespace(model="tiny", remat=remat)
    lora = {"main": (rank, rank)} if rank else {}
    net = bench.build(cfg, here, lora, [window])
    ckpt.fill(parallel.local_rows(net), bench.values)
    me = bench.learner(net, "main" if rank else None, here)
    me.average = copies(me.rows)
    bound = bind(net, (24, 3, 8, 8), here, window, (2, 2, 2), lora="main" if rank else None)
    generator = torch.Generator().manual_seed(0)
    x0, e = torch.randn(2, 4, 24, 3, 8, 8, generator=generator).to(here.device)
    text = torch.randn(4, 8, 64, generator=generator).to(here.device)
    u = torch.tensor([0.1, 0.4, 0.6, 0.9], device=here.device)
    micro = SimpleNamespace(x0=x0, e=e, text=text, null=text[0], u=u, drop=u)
    losses = [partial(bench.flow, bound, micro)] * 2
    seen = [train_step(me, losses, lr=1e-3, clip=1.0, ema=0.9) for _ in range(3)]
    return [[one[name].item() for one in seen] for name in ("loss", "grad_norm")], me


@pytest.mark.parametrize("flags", WAYS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_updates_in_bf16_lower_the_loss_as_those_in_fp32_do(device, flags, world):
    exact, _ = learnt(world, device, "fp32", False, **flags)
    dist.destroy_process_group()
    (losses, norms), me = learnt(world, device, "bf16", False, **flags)
    assert losses[2] < losses[0]
    assert me.counts == {"updates": 3, "skipped": 0, "in_a_row": 0}
    assert losses == pytest.approx(exact[0], rel=2e-2)
    assert norms == pytest.approx(exact[1], rel=0.2)


@NONE
@pytest.mark.parametrize("flags", WAYS, ids=str)
@pytest.mark.parametrize("device", ["cuda"])
def test_compiled_updates_are_those_of_eager_blocks(device, flags, world):
    eager, _ = learnt(world, device, "bf16", False, **flags)
    dist.destroy_process_group()
    compiled, _ = learnt(world, device, "bf16", True, **flags)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-2)
    assert compiled[1] == pytest.approx(eager[1], rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_on_the_device_are_those_of_the_cpu(device, tmp_path):
    cfg = bench.StepConfig(shape=(24, 3, 4, 4), length=8, batch=4)
    bench.write_random(tmp_path, cfg)
    there, here = (Latents(tmp_path, seed=0, batch=4, micro_batch=2, device=name)
                   for name in (device, "cpu"))
    for step in (0, 1, 2, 7):
        for a, b in zip(there.at(step), here.at(step)):
            assert a.x0.device.type == a.null.device.type == device
            assert all(torch.equal(x.cpu(), y) for x, y in zip(a[:6], b[:6]))
            assert a.ids == b.ids


# ---- a run


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_deterministic_run_in_bf16_resumes_to_the_bit(device, tmp_path):
    def trained(out, steps):
        run(train.main, replace(cfg, out=str(tmp_path / out), steps=steps))
        return state(tmp_path / out)

    data = shapes_dataset(tmp_path / "data", 20)
    cfg = train.Config(data=(data,), device=device, precision="bf16", deterministic=True, batch=2,
                       warmup=1, val=1, samples=0, val_every=0, compile=False, schedule="constant",
                       window=(1, 1, 1), tile=(2, 2, 2))
    try:
        whole = trained("whole", 2)
        trained("parts", 1)
        assert same(whole, trained("parts", 2))
    finally:
        torch.use_deterministic_algorithms(False)
