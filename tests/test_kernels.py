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
    """The largest error of output and gradients against a dense mask in float64, over the tolerance."""
    grid, tile, window, B, N, K, rows, step = case
    generator = torch.Generator().manual_seed(0)
    metadata = build_metadata(grid, tile, window) if grid else None
    L, S = (prod(grid), prod(grid)) if grid else (tile, window)
    q, k, v, grad = (poisoned(B, n, N, K, dtype, generator) for n in (L, S, S, L))
    if B == 2:
        grad = torch.ones((), dtype=dtype).expand(q.shape)  # as .sum() hands it down
    pattern = (metadata.grid, metadata.tile, metadata.window) if grid else ((), (), ())
    for reverse in (False, True):
        jobs, _ = module._walks(*pattern, (L, S), reverse, rows, step, q.device)
        assert sum(int(table[:, -1].sum()) for _, table in jobs) * B * N <= 60, f"over 60 blocks make {case} slow"

    module._settings = lambda *xs: (tma, ((rows, step, 4, 1),) * 3)
    ours = attention(q, k, v, metadata)
    ours = ours, *torch.autograd.grad(ours, (q, k, v), grad.detach())
    q, k, v, grad = (x.detach().double().requires_grad_() for x in (q, k, v, grad))
    theirs = reference(q, k, v, metadata) if grid else torch.einsum(
        "bnls,bsnk->blnk", (torch.einsum("blnk,bsnk->bnls", q, k) / K**.5).softmax(-1), v)
    theirs = theirs, *torch.autograd.grad(theirs, (q, k, v), grad)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1) for a, b in zip(ours, theirs)]
    return (torch.stack(errors).max() / tolerance).item()


def interpret():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with nan
    failed = False
    for i, case in enumerate(CASES):
        dtype, tma = (torch.float32, torch.float16)[i % 3 == 2], i % 2 == 1
        error = interpret_case(case, dtype, tma)
        failed |= not error < 1
        print(f"{error:6.3f} of the tolerance  {case} {dtype} {'TMA' if tma else 'pointers'}", flush=True)
    return failed


class Driver:
    """Stands for a GPU of the given capability, as far as compilation asks for one."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return None

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


class Compiler:
    """Stands for a kernel: a launch compiles it, and keeps (name, masked or not, what came out)."""

    def __init__(self, kernel, built):
        self.kernel, self.built = kernel, built

    def __getitem__(self, programs):
        def launch(**arguments):
            built = self.kernel.warmup(grid=programs, **arguments)
            self.built.append((self.kernel.__name__, arguments["RAGGED"], built))
        return launch


def usage(built):
    """Registers and bytes of stack, which are those of spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))


def configurations():
    """Every shipped one on the GPU of its class, and on sm_90 those it falls back on where TMA cannot serve."""
    for (kilobytes, width), settings in module.HALF.items():
        for capability in (80, 90) if kilobytes == 163 else (GPUS[kilobytes],):
            yield kilobytes, capability, torch.bfloat16, kilobytes == 227, width, settings
    yield 99, 89, torch.float16, False, 32, module.HALF[99, 64]
    for width, settings in module.FULL.items():
        yield 99, 80, torch.float32, False, width, settings


def compile_all():
    """Runs attention's own functions on a grid with short tiles: each kernel is built with and without masks."""
    built, failed, pattern = [], False, ((21, 30, 52), (4, 4, 8), (3, 3, 3))
    for name in ("_forward_kernel", "_query_kernel", "_key_kernel"):
        setattr(module, name, Compiler(getattr(module, name), built))
    print("kernel           GPU    head  type            blocks               loads           registers  spills"
          "  shared KB  wgmma")
    for kilobytes, capability, dtype, tma, width, settings in configurations():
        triton.runtime.driver.set_active(Driver(capability))
        module._settings = lambda *xs: (tma, settings)
        q, k, v, grad = (torch.empty(1, prod(pattern[0]), 2, width, dtype=dtype) for _ in range(4))
        module._triton_backward(grad, q, k, v, *module._triton(q, k, v, *pattern), *pattern)
        for name, masked, kernel in built:
            setting = settings[("_forward_kernel", "_query_kernel", "_key_kernel").index(name)]
            registers, stack = usage(kernel)
            shared, wgmma = kernel.metadata.shared / 1024, "wgmma.mma_async" in kernel.asm["ptx"]
            wrong = stack > 0 or shared > kilobytes or wgmma != (capability == 90)
            failed |= wrong
            print(f"{name:16} sm_{capability}  {width:4}  {str(dtype):14}  {str(setting):19}  "
                  f"{'TMA' if tma else 'pointers':8} {'masked' if masked else '':6} {registers:9} {stack:7} "
                  f"{shared:10.0f}  {wgmma}{' WRONG' * wrong}", flush=True)
        assert len(built) == 6
        built.clear()
    return failed


@pytest.mark.parametrize("what", ["interpret", "compile"])
def test_the_kernels(what):
    """Interpreted, they equal a dense mask in float64; compiled, none spills, all fit and sm_90's use wgmma."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__, what], text=True, capture_output=True,
                         env=env | ({"TRITON_INTERPRET": "1"} if what == "interpret" else {}))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to run the kernels on")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid, tile, window, K", [
    ((8, 12, 24), (4, 4, 8), (1, 1, 1), 128), ((9, 14, 20), (4, 4, 8), (1, 3, 1), 64),
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
