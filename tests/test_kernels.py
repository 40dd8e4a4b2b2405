"""attention.py's Triton kernels without a GPU: run by Triton's interpreter, and compiled for three GPUs ahead of time.

The interpreter replaces the compiler for a whole process, so each has one of its own; by hand, with what it prints:

    TRITON_INTERPRET=1 python tests/test_kernels.py interpret
    python tests/test_kernels.py compile
"""
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention as module
from attention import attention, build_metadata, reference

triton = pytest.importorskip("triton", reason="triton is for Linux")

# grid, tile, window, B, N, K, then ROWS and STEP of all three kernels
CASES = [((2, 4, 8), (2, 2, 4), (1, 1, 1), 1, 1, 16, 16, 16),       # whole blocks only: the path free of masks
         ((2, 4, 8), (2, 2, 4), (1, 1, 1), 2, 2, 16, 32, 16),
         ((3, 4, 8), (1, 2, 4), (3, 1, 1), 1, 1, 32, 16, 32),
         ((5, 4, 4), (2, 2, 4), (1, 1, 1), 1, 1, 16, 16, 16),       # a short tile at the end of frames,
         ((2, 7, 4), (2, 3, 4), (1, 1, 1), 1, 1, 16, 32, 16),       # rows,
         ((2, 4, 11), (2, 2, 4), (1, 1, 1), 1, 1, 16, 16, 32),      # columns,
         ((3, 5, 7), (2, 2, 3), (1, 1, 1), 1, 1, 16, 16, 16),       # and all three
         ((3, 5, 7), (2, 2, 3), (1, 1, 1), 1, 1, 8, 64, 32),
         ((5, 7, 9), (2, 3, 4), (1, 1, 1), 1, 1, 16, 32, 64),
         ((2, 5, 6), (2, 1, 2), (1, 3, 1), 1, 1, 16, 32, 32),
         ((1, 5, 9), (1, 2, 2), (1, 3, 3), 1, 1, 16, 32, 32),
         ((1, 8, 10), (1, 2, 2), (1, 2, 2), 1, 1, 16, 16, 32),      # even windows
         ((5, 3, 4), (1, 2, 2), (2, 1, 1), 1, 1, 16, 16, 16),
         ((4, 5, 6), (2, 2, 3), (1, 1, 9), 1, 1, 16, 16, 16),       # a window over all columns,
         ((5, 4, 6), (2, 2, 3), (1, 9, 9), 1, 1, 16, 16, 16),       # over all rows too, which makes one run of them
         ((4, 5, 6), (2, 2, 3), (1, 9, 1), 1, 1, 16, 16, 16),
         ((4, 4, 6), (2, 2, 3), (9, 1, 1), 1, 1, 16, 16, 16),
         ((1, 1, 50), (1, 1, 7), (1, 1, 3), 1, 1, 16, 16, 16),      # a line,
         ((1, 8, 9), (1, 4, 4), (1, 1, 1), 1, 1, 16, 16, 16),       # a picture
         ((9, 2, 2), (2, 1, 1), (3, 1, 1), 1, 1, 16, 16, 16),       # tiles smaller than a block
         ((2, 2, 3), (1, 1, 1), (1, 1, 1), 1, 2, 16, 16, 16),       # of one token
         ((3, 4, 5), (2, 2, 2), (1, 1, 1), 1, 1, 12, 16, 16),       # heads that are padded
         ((3, 4, 5), (2, 2, 2), (1, 1, 1), 1, 2, 40, 32, 16),
         ((4, 4, 8), (2, 4, 8), (1, 1, 1), 1, 1, 64, 32, 64),
         ((4, 8, 4), (4, 4, 2), (1, 1, 1), 1, 1, 128, 32, 32),
         (None, 33, 33, 1, 2, 16, 16, 16),                          # dense, queries and keys
         (None, 37, 21, 2, 1, 16, 16, 32)]
# shared memory in KB -> compute capability of the GPU that stands for its class
GPUS = {227: 90, 163: 80, 99: 89}


def poisoned(B, L, N, K, dtype, generator):
    """A (B, L, N, K) view into a larger buffer that holds nan elsewhere, as wide as TMA wants its strides."""
    buffer = torch.full((B, L + 3, N + 1, 2 * (-(-K // 8) * 8)), torch.nan, dtype=dtype)
    x = buffer[:, 1:1 + L, :N, :K]
    return x.copy_(torch.randn(x.shape, generator=generator)).requires_grad_()


def interpret_case(case, dtype, tma):
    """Compares output and gradients with the dense mask in float64; returns the largest error, in units of the tolerance."""
    grid, tile, window, B, N, K, rows, step = case
    generator = torch.Generator().manual_seed(0)
    metadata = build_metadata(grid, tile, window) if grid else None
    L, S = (prod(grid), prod(grid)) if grid else (tile, window)
    q, k, v, grad = (poisoned(B, n, N, K, dtype, generator) for n in (L, S, S, L))
    pattern = (metadata.grid, metadata.tile, metadata.window) if grid else ((), (), ())
    for reverse in (False, True):
        jobs, _ = module._walks(*pattern, (L, S), reverse, rows, step, q.device)
        assert sum(int(table[:, -1].sum()) for _, table in jobs) * B * N <= 60, f"more than 60 blocks make {case} too slow"

    module._settings = lambda *xs: (tma, ((rows, step, 4, 1),) * 3)
    ours = attention(q, k, v, metadata)
    ours = ours, *torch.autograd.grad(ours, (q, k, v), grad.detach())
    q, k, v, grad = (x.detach().double().requires_grad_() for x in (q, k, v, grad))
    theirs = reference(q, k, v, metadata) if grid else torch.einsum(
        "bnls,bsnk->blnk", (torch.einsum("blnk,bsnk->bnls", q, k) / K**.5).softmax(-1), v)
    theirs = theirs, *torch.autograd.grad(theirs, (q, k, v), grad)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1) / tolerance).item() for a, b in zip(ours, theirs))


def interpret():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with nan
    failed = False
    for i, case in enumerate(CASES):
        dtype, tma = (torch.float32, torch.float16)[i % 3 == 2], i % 2 == 1
        error = interpret_case(case, dtype, tma)
        failed |= not error < 1
        print(f"{error:6.3f} of the tolerance  {case} {dtype} {'TMA' if tma else 'pointers'}", flush=True)
    return failed


def ahead_of_time(kernel, capability, setting, dtype, tma, width, BK, ragged):
    """Registers, bytes of stack (spills), shared memory and wgmma or not of one kernel compiled for one GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    rows, step, warps, stages = setting
    fixed = dict(WIDTH=width, BK=BK, ROWS=rows, STEP=step, RAGGED=ragged, TMA=tma)
    walked = ("Q", "Grad") if kernel is module._key_kernel else ("K", "V")
    types, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            types[name] = "constexpr"
        elif name in ("L", "N"):
            types[name] = "i32"
        elif name == "scale":
            types[name] = "fp32"
        elif name in ("size", "tile", "step"):
            types[name] = ("i32",) * (2 if name == "step" else 3)
        elif name.endswith("_stride"):
            types[name] = ("i32",) * 3
            divisible |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif tma and name in walked:
            types[name] = f"tensordesc<{dtype}[1, {step}, 1, {BK}]>"
        else:
            types[name] = "*i32" if name == "jobs" else "*fp32" if name in ("Lse", "Stats") else f"*{dtype}"
            divisible[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in fixed.items()}, divisible)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                           options=dict(num_warps=warps, num_stages=stages))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return registers, stack, built.metadata.shared, "wgmma.mma_async" in built.asm["ptx"]


def configurations():
    """Every shipped one on the GPU of its class, and those that other GPUs fall back on."""
    for (kilobytes, width), settings in module.HALF.items():
        for capability in {GPUS[kilobytes], 90 if kilobytes == 163 else GPUS[kilobytes]}:  # 163 serves sm_90 without TMA
            yield kilobytes, capability, "bf16", kilobytes == 227, width, width, settings
    yield 227, 90, "bf16", True, 80, 128, module.HALF[227, 128]      # heads that are padded
    yield 99, 89, "fp16", False, 32, 32, module.HALF[99, 64]
    for width, settings in module.FULL.items():
        yield 99, 80, "fp32", False, width, width, settings


def compile_all():
    failed = False
    print("kernel           GPU    head      type  blocks         blocks by   registers  spills  shared KB  wgmma")
    for kilobytes, capability, dtype, tma, width, BK, settings in configurations():
        kernels = module._forward_kernel, module._query_kernel, module._key_kernel
        for (kernel, setting), ragged in product(zip(kernels, settings), (False, True)):
            registers, stack, shared, wgmma = ahead_of_time(kernel, capability, setting, dtype, tma, width, BK, ragged)
            wrong = stack > 0 or shared > kilobytes * 1024 or wgmma != (capability == 90 and dtype != "fp32")
            failed |= wrong
            print(f"{kernel.__name__:16} sm_{capability}  {width:3}/{BK:3}  {dtype}  {'{}x{} w{} s{}'.format(*setting):14} "
                  f"{'TMA' if tma else 'pointers':8} {'masked' if ragged else '':6} {registers:5} {stack:7} {shared / 1024:9.0f}"
                  f"   {wgmma}{'   WRONG' * wrong}", flush=True)
    return failed


@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_the_kernels(what):
    """Interpreted, they equal a dense mask in float64; compiled, none spills, all fit and sm_90's use wgmma."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, what], text=True, capture_output=True,
                         env=env | ({"TRITON_INTERPRET": "1"} if what == "interpret" else {}))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels are interpreted and compiled only")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid, tile, window, K", [((8, 12, 24), (4, 4, 8), (1, 1, 1), 128), ((9, 14, 20), (4, 4, 8), (1, 3, 1), 64),
                                                   ((12, 8, 16), (6, 8, 8), (1, 1, 1), 128), ((7, 9, 11), (2, 3, 4), (3, 1, 1), 80),
                                                   ((5, 6, 7), (2, 2, 3), (9, 9, 9), 128)])
def test_a_gpu_agrees_with_a_dense_mask_and_with_itself(grid, tile, window, K, dtype, tolerance):
    metadata = build_metadata(grid, tile, window, "cuda")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (poisoned(2, prod(grid), 3, K, dtype, generator).detach().cuda().requires_grad_() for _ in range(4))

    def run(function, q, k, v, grad):
        out = function(q, k, v, metadata)
        return out, *torch.autograd.grad(out, (q, k, v), grad.detach())
    ours, again = run(attention, q, k, v, grad), run(attention, q, k, v, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    for a, b in zip(ours, run(reference, *(x.detach().double().requires_grad_() for x in (q, k, v, grad)))):
        assert (a - b).abs().max() < tolerance * b.abs().max()


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile_all}[sys.argv[1]]())
