"""attention.py's Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs ahead of time.

The interpreter replaces the compiler for a whole process, so each has processes of its own; by hand, with what they
print, all cases or some:

    TRITON_INTERPRET=1 python tests/test_kernels.py interpret [0 14 25]
    python tests/test_kernels.py compile [100 120]
"""
import os
import re
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from types import SimpleNamespace

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
         ((5, 2, 4), (1, 2, 4), (-9, 1, 1), 1, 1, 16, 16, 16),      # causal: all earlier chunks,
         ((5, 2, 4), (2, 2, 4), (-2, 1, 1), 1, 1, 16, 16, 16),      # the last two, of which one is short,
         ((6, 3, 3), (3, 9, 9), (-9, 1, 1), 1, 1, 16, 16, 32),
         ((4, 3, 3), (1, 9, 9), (-3, 1, 1), 1, 1, 16, 16, 16),
         ((3, 3, 4), (1, 9, 9), (-1, 1, 1), 1, 1, 16, 16, 16),      # each by itself,
         ((3, 3, 4), (1, 2, 2), (-2, 1, 1), 1, 1, 16, 16, 16),      # and sliding in space
         ((5, 4, 6), (2, 2, 3), (-9, 1, 9), 1, 1, 16, 16, 16),
         ((4, 5, 6), (2, 2, 3), (-2, 3, 1), 1, 1, 16, 32, 32),
         ((5, 4, 6), (1, 2, 3), (-3, 9, 9), 1, 1, 8, 32, 32),
         ((4, 4, 8), (2, 2, 4), (-2, 1, 1), 1, 1, 64, 16, 32),
         (None, 33, 33, 1, 2, 16, 16, 16),                          # dense, queries and keys
         (None, 37, 21, 2, 1, 16, 16, 32)]
# Of each kind one or two, in both types, by TMA and by pointers: those that every run of the suite takes.
SAMPLE = 0, 1, 3, 4, 5, 6, 11, 14, 15, 21, 23, 24, 25, 26, 27, 28, 29, 30, 35, 36

KERNELS = "_forward_kernel", "_query_kernel", "_key_kernel"
KILOBYTES = {100: 227, 90: 227, 80: 163, 89: 99, 120: 99}  # of shared memory, by compute capability


def poisoned(B, L, N, K, dtype, generator):
    """A (B, L, N, K) view into a larger buffer that holds nan elsewhere, as wide as TMA wants its strides.

    Of two heads, each lies in one piece.
    """
    K8 = module.ceil_div(K, 8) * 8
    shape = (B, N + 1, L + 3, 2 * K8) if N == 2 else (B, L + 3, N + 1, 2 * K8)
    buffer = torch.full(shape, torch.nan, dtype=dtype)
    x = (buffer.transpose(1, 2) if N == 2 else buffer)[:, 1:1 + L, :N, :K]
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
    assert all(x.is_contiguous() for x in ours), "register_fake says so"
    q, k, v, grad = (x.detach().double().requires_grad_() for x in (q, k, v, grad))
    theirs = reference(q, k, v, metadata) if grid else torch.einsum(
        "bnls,bsnk->blnk", (torch.einsum("blnk,bsnk->bnls", q, k) / K**.5).softmax(-1), v)
    theirs = theirs, *torch.autograd.grad(theirs, (q, k, v), grad)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1) for a, b in zip(ours, theirs)]
    return (torch.stack(errors).max() / tolerance).item()


def interpret(cases):
    torch.use_deterministic_algorithms(True)  # fills torch.empty with nan
    failed = False
    for i in map(int, cases) if cases else range(len(CASES)):
        dtype, tma = (torch.float32, torch.float16)[i % 3 == 2], i % 2 == 1
        error = interpret_case(CASES[i], dtype, tma)
        failed |= not error < 1
        print(f"{error:6.3f} of the tolerance  {CASES[i]} {dtype} {'TMA' if tma else 'pointers'}", flush=True)
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
    """Stands for a kernel: a launch compiles it and keeps (name, masked or not, what came out)."""

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
    """(capability, type, TMA or not, width of a head, settings): all that `_settings` can choose on each GPU."""
    for capability, kilobytes in KILOBYTES.items():
        kind = {227: 80, 163: 80, 99: 89}[kilobytes]  # where TMA cannot serve
        for width in (64, 128):
            if kilobytes == 227:
                yield capability, torch.bfloat16, True, width, module.HALF[capability, width]
            yield capability, torch.bfloat16, False, width, module.HALF[kind, width]
            yield capability, torch.float32, False, width, module.FULL[width]
        if kilobytes == 99:
            yield capability, torch.float16, False, 32, module.HALF[kind, 64]


def compile_some(arguments):
    """Runs attention's own functions on a grid with short tiles: each kernel is built with and without masks.

    arguments: capabilities, all of them if none.
    """
    built, failed, pattern = [], False, ((21, 30, 52), (4, 4, 8), (3, 3, 3))
    kernels = {name: getattr(module, name) for name in KERNELS}
    print("kernel           GPU     head  type            blocks               loads           registers  spills"
          "  shared KB  wgmma  tcgen05")
    for capability, dtype, tma, width, settings in configurations():
        if arguments and str(capability) not in arguments:
            continue
        triton.runtime.driver.set_active(Driver(capability))
        module._settings = lambda *xs: (tma, settings)
        for name, kernel in kernels.items():
            setattr(module, name, Compiler(kernel, built))
        q, k, v, grad = (torch.empty(1, prod(pattern[0]), 2, width, dtype=dtype) for _ in range(4))
        module._triton_backward(grad, q, k, v, *module._triton(q, k, v, *pattern), *pattern)
        assert len(built) == 2 * len(KERNELS)
        for name, masked, kernel in built:
            setting = settings[KERNELS.index(name)]
            registers, stack = usage(kernel)
            shared, ptx, half = kernel.metadata.shared / 1024, kernel.asm["ptx"], dtype != torch.float32
            wgmma, tcgen05 = "wgmma.mma_async" in ptx, "tcgen05.mma" in ptx
            wrong = (stack > 0 or shared > KILOBYTES[capability] or getattr(kernel.metadata, "tmem_size", 0) > 512
                     or wgmma != (half and capability == 90) or tcgen05 != (half and capability == 100))
            failed |= wrong
            print(f"{name:16} sm_{capability:<4} {width:4}  {str(dtype):14}  {str(setting):19}  "
                  f"{'TMA' if tma else 'pointers':8} {'masked' if masked else '':6} {registers:9} {stack:7} "
                  f"{shared:10.0f}  {wgmma!s:5}  {tcgen05}{' WRONG' * wrong}", flush=True)
        built.clear()
    return failed


def succeeds(*command):
    """Runs this file with a command."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if command[0] == "interpret":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, __file__, *map(str, command)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=env)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_interpreted_they_equal_a_dense_mask_in_float64():
    succeeds("interpret", *SAMPLE)


@pytest.mark.slow
def test_compiled_every_kernel_fits_each_gpu_uses_its_matrix_units_and_spills_nothing():
    succeeds("compile")


@pytest.mark.parametrize("capability, aligned, chosen", [
    ((10, 0), True, 100), ((10, 3), True, 100), ((9, 0), True, 90), ((9, 0), False, 80), ((10, 0), False, 80),
    ((8, 0), True, 80), ((8, 6), True, 89), ((8, 9), True, 89), ((12, 0), True, 89)])
def test_each_gpu_gets_the_settings_of_its_kind(monkeypatch, capability, aligned, chosen):
    kilobytes = {10: 227, 9: 227, 12: 99}.get(capability[0], 163 if capability == (8, 0) else 99)
    monkeypatch.setattr(module, "_card", lambda x: SimpleNamespace(
        major=capability[0], minor=capability[1], shared_memory_per_block_optin=kilobytes * 1024))
    for width, row in ((40, 64), (128, 128)):
        x = torch.zeros(1, 8, 2, width + (not aligned), dtype=torch.bfloat16)[..., :width]
        assert module._settings(x, x, x) == (aligned and kilobytes == 227, module.HALF[chosen, row])
        assert module._settings(x.float()) == (False, module.FULL[row])


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
    ours = run(attention, q, k, v, grad)
    torch.use_deterministic_algorithms(metadata.sparsity == 0)  # dense kernels are PyTorch's, which need to be told
    try:
        again = [run(attention, q, k, v, grad) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, *others in zip(*(again if metadata.sparsity == 0 else [ours, *again])):
        assert all(torch.equal(first, other) for other in others)
    for a, b in zip(ours, run(reference, *(x.detach().double().requires_grad_() for x in (q, k, v, grad)))):
        assert (a - b).abs().max() < tolerance * b.abs().max()


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile_some}[sys.argv[1]](sys.argv[2:]))
