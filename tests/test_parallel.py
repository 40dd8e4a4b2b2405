"""One spawn of four gloo ranks walks through every mesh and writes down what it got; tests compare it with one rank."""
import math
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import multiprocessing, nn

import parallel
from attention import attention, build_metadata
from conftest import ROOT
from helpers import IMPORTED, ranks, started, store, wait_until
from model import LOCAL, Cond, DiT, ModelConfig, Seq, add_lora
from step import adamw, muon

# Rows that nothing divides: ffn has 27; modulations have 1, so that some ranks hold none.
CONFIG = ModelConfig(dim=32, blocks=2, heads=4, ffn=27, channels=3, text_dim=8, freq_dim=8)
GRID = (3, 1, 3)        # 9 tokens: neither 2 nor 4 ranks divide them
ALONE = (1, 1, 1)       # processes, --shard, --sp
MESHES = [(2, 1, 1), (2, -1, 1), (2, 1, 2), (4, 2, 2), (4, -1, 4)]
HALF = [(2, 1, 1), (2, -1, 1), (4, 2, 2)]       # on which dtypes are looked at: whole, split, both and shared


def build(world, precision="fp32", adapters=(), compile=False, **more):
    """The net with the same values on every mesh, and its rows."""
    world = world._replace(precision=precision, compile=compile)
    with torch.device("meta"):
        net = DiT(CONFIG)
        for name in adapters:
            add_lora(net, name, rank=3, alpha=6)    # some ranks hold no row of A
    parallel.prepare(net, world, **more)
    rows = parallel.local_rows(net)
    for name, (tensor, first, shape) in rows.items():
        whole = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        tensor.copy_(whole[first:first + len(tensor)])
    return net, rows


def batch(world, sparse=True):
    """This rank's samples of a global batch of four, with the metadata and Seq that go with them."""
    draw = torch.Generator().manual_seed(0)
    mine = torch.arange(4).chunk(world.data_size)[world.data_rank]
    x, t = torch.randn(4, 3, 3, 2, 6, generator=draw), torch.rand(4, generator=draw)
    text = torch.randn(4, 5, 8, generator=draw)
    seq = LOCAL if world.sp == 1 else Seq(*world.ulysses(attention, 9))
    metadata = build_metadata(GRID, (2, 1, 2), (1, 1, 1)) if sparse else None
    return (x[mine], t[mine], Cond(text[mine])), dict(metadata=metadata, seq=seq)


def objective(v):
    return (v - 0.3).square().mean()


def backward(net, rows, world, loss):
    """-> {loss, norm, and the gradient of each of this rank's rows}."""
    loss.backward()
    parallel.collect(net, rows)
    norm = parallel.grad_norm(rows, world)
    return {"loss": parallel.mean({"loss": loss.item()}, world)["loss"], "norm": norm.item(),
            "grads": {name: (p.grad, first, shape) for name, (p, first, shape) in rows.items()}}


def trained(world, micros, precision="fp32", steps=2, orthogonal=False, **kind):
    """Losses and norms of some updates by AdamW, or Muon, each rank's samples in so many micro-batches."""
    net, rows = build(world, precision)
    (x, t, cond), more = batch(world, **kind)
    opt, _ = adamw(rows, (0.9, 0.999), 0.01)
    if orthogonal:
        opt, _ = muon(rows, (0.9, 0.999), 0.01, parallel.gatherer(world))
    opt.found_inf = torch.zeros(())
    for group in opt.param_groups:
        group["lr"] = 1e-3
    sync, history = parallel.sync(net), []
    for _ in range(steps):
        losses = []
        texts = map(Cond, cond.text.chunk(micros))
        for i, some in enumerate(zip(x.chunk(micros), t.chunk(micros), texts), 1):
            sync(i == micros)
            losses.append(objective(net(*some, **more)) / micros)
            losses[-1].backward()
        parallel.collect(net, rows)
        norm = parallel.grad_norm(rows, world)
        opt.step()
        history.append((parallel.mean({"loss": sum(losses).item()}, world)["loss"], norm.item()))
    return torch.tensor(history, dtype=torch.float64)


def swapped(world):
    """Losses before, while and after other weights are in the net, as validation with EMA weights does."""
    net, rows = build(world)
    inputs, more = batch(world)
    losses = []
    for scale, grad in ((1, True), (0.5, False), (2, False), (1, True)):
        torch._foreach_mul_([p for p, _, _ in rows.values()], scale)
        with torch.set_grad_enabled(grad):
            losses.append(objective(net(*inputs, **more)))
        if grad:
            losses[-1].backward()
    return torch.tensor([parallel.mean({"loss": loss.item()}, world)["loss"] for loss in losses])


def interleaved(world):
    """A gradient through a forward after which the net was called without one, as a LoRA student and its teacher do."""
    net, rows = build(world)
    (x, t, cond), more = batch(world)
    v = net(x, t, cond, **more)
    with torch.no_grad():
        target = net(x + 1, t, cond, **more)
    return backward(net, rows, world, (v - target).square().mean())


def adapted(world, precision):
    """Two adapters of one frozen net, each learning from what the other and the net say, as distill.py calls them."""
    net, rows = build(world, precision, adapters=("student", "critic"))
    (x, t, cond), more = batch(world)
    seen = {"stored": {n: p.dtype for n, (p, _, _) in rows.items()},
            "plain": [n for n, p in net.named_parameters() if type(p) is nn.Parameter]}
    for me, other in (("student", "critic"), ("critic", "student")):
        v = net(x, t, cond, lora=me, **more)
        with torch.no_grad():
            target = net(x + 1, t, cond, **more) - net(x + 1, t, cond, lora=other, **more)
        mine = {n: r for n, r in rows.items() if f".lora.{me}." in n}
        seen[me] = backward(net, mine, world, (v - target).square().mean())
        seen["left over"] = [n for n, p in net.named_parameters() if p.grad is not None]
    return seen


def dtypes(world):
    """The dtypes a bf16 net stores, computes and reduces in; and what a frozen one stores."""
    net, rows = build(world, "bf16")
    seen = {}
    for name in ("blocks.1.ffn.0", "head.head", "time_embedding.0", "text_embedding.0"):
        net.get_submodule(name).register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
    inputs, more = batch(world)
    grads = backward(net, rows, world, objective(net(*inputs, **more)))["grads"]
    sums = [g for name, (g, _, _) in grads.items() if name.startswith("blocks.0.ffn") and len(g)]
    teacher, frozen = build(world, "bf16", trainable=False)
    with torch.no_grad():
        out = objective(teacher(*inputs, **more)).item()
    return {"compute": seen, "stored": {p.dtype for p, _, _ in rows.values()},
            "grads": {p.grad.dtype for p, _, _ in rows.values()},
            "frozen": {name: p.dtype for name, (p, _, _) in frozen.items()},
            "teacher": parallel.mean({"loss": out}, world)["loss"],
            "rounded": all(torch.equal(g, g.bfloat16()) for g in sums) if sums else None,
            "trainable": [name for name, p in teacher.named_parameters() if p.requires_grad]}


def eagerly():
    """Blocks are traced as for the compiler, and the graph is run as it is."""
    plain = nn.Module.compile
    return mock.patch.object(nn.Module, "compile", lambda self, **options: plain(self, backend="eager", **options))


def compiled(world):
    """Rank 0 alone compiles: the other's plain blocks take part in the same exchanges."""
    with eagerly():
        net, rows = build(world, compile=world.main)
        inputs, more = batch(world)
        return backward(net, rows, world, objective(net(*inputs, **more)))


def report(world, mesh):
    """All that the tests want to know of one mesh, from one rank."""
    net, rows = build(world)
    inputs, more = batch(world)
    seen = {"rows": rows, "names": [n for n, _ in net.named_parameters()],
            "step": backward(net, rows, world, objective(net(*inputs, **more)))}
    micros = 1 if world.size == 1 else 2        # alone all four samples at once
    if mesh in (ALONE, (2, 1, 2)):
        seen["dense"] = trained(world, micros, sparse=False)
    if mesh in (ALONE, (2, -1, 1), (4, 2, 2)):
        seen["muon"] = trained(world, micros, orthogonal=True)      # gathers what is split
    seen |= {"sparse": trained(world, micros), "swapped": swapped(world), "interleaved": interleaved(world),
             "adapted": adapted(world, "fp32")}
    if mesh in (ALONE, *HALF):
        seen |= {"bf16": trained(world, micros, "bf16"), "half_adapted": adapted(world, "bf16"),
                 "dtypes": dtypes(world)}
    if (world.size, world.sp) == (2, 2):
        seen["compiled"] = compiled(world)
    seen["mean"] = parallel.mean({"a": float(world.rank), "b": torch.tensor([world.rank, 1.0])}, world)
    seen["agree"] = [parallel.agree(ok, world) for ok in (True, world.rank != world.size - 1, False)]
    seen["least"] = [parallel.agree(x, world) for x in (2**60 + world.rank, -world.rank)]
    seen["spread"] = {n: gathered(world, n) for n in COUNTS}
    if world.size > 1:
        seen["cards"] = [shared(world, *uuids) for uuids in (range(4), (0, 1, 1, 2), (5, 5, 5, 5))]
    return seen


COUNTS = (1, 3, 8, 9)       # clips: fewer than ranks, and what they do not divide


def made(places):
    """Stands for a sampler; values that bf16 would round."""
    return torch.tensor(places, dtype=torch.float32)[:, None, None].add(torch.tensor([0.1, 1 / 3])).mul(math.pi)


def gathered(world, n):
    """-> what spread(made) gives, the places of each call, the bytes that were sent and to whom."""
    calls, sent, send = [], [], torch.distributed.send

    def make(places):
        calls.append(places)
        return made(places)

    def spy(tensor, to):
        sent.append((tensor.numel() * tensor.element_size(), to))
        send(tensor, to)

    with mock.patch.object(parallel.dist, "send", spy):
        return parallel.spread(make, n, 2, world), calls, sent


def shared(world, *uuids):
    """What a rank says to the GPUs of all."""
    card = mock.Mock(uuid=f"GPU-{uuids[world.rank]}")
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: card):
        try:
            parallel.check_cards(torch.device("cuda", 0), world.size)
        except RuntimeError as refused:
            return str(refused)


def walk(rank, folder, ports):
    torch.set_num_threads(1)
    for mesh, port in zip([ALONE, *MESHES], ports):
        size, shard, sp = mesh
        if rank < size:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
            torch.save(report(parallel.init("cpu", shard, sp), mesh), folder / f"{mesh} {rank}")
            parallel.close()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{mesh: [report of each rank]}"""
    folder = tmp_path_factory.mktemp("ranks")
    servers = [store() for _ in [ALONE, *MESHES]]
    ports = [server.port for server in servers]
    multiprocessing.set_forkserver_preload(IMPORTED)
    multiprocessing.start_processes(walk, (folder, ports), nprocs=4, start_method="forkserver")
    return {mesh: [torch.load(folder / f"{mesh} {rank}", weights_only=False) for rank in range(mesh[0])]
            for mesh in [ALONE, *MESHES]}


def assembled(parts):
    """Whole tensors from each rank's rows; replicas must agree to the bit."""
    whole = {}
    for rows in parts:
        for name, (tensor, first, shape) in rows.items():
            if tensor is None:
                continue
            whole.setdefault(name, torch.full(shape, torch.nan))
            old = whole[name][first:first + len(tensor)]
            assert old.isnan().all() or torch.equal(old, tensor), name
            old.copy_(tensor)
    return whole


def same_gradient(reports, alone):
    for seen in reports:
        assert seen["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert seen["norm"] == pytest.approx(alone["norm"], rel=1e-6)
    grads = assembled([seen["grads"] for seen in reports])
    wanted = assembled([alone["grads"]])
    assert grads.keys() == wanted.keys()
    assert grads
    for name, g in wanted.items():
        assert (grads[name] - g).norm() <= 1e-5 * g.norm() + 1e-7 * alone["norm"], name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_has_the_loss_the_norm_and_the_gradient_of_one_rank(ran, mesh):
    alone = ran[ALONE][0]
    same_gradient([r["step"] for r in ran[mesh]], alone["step"])
    same_gradient([r["interleaved"] for r in ran[mesh]], alone["interleaved"])
    for adapter in ("student", "critic"):
        same_gradient([r["adapted"][adapter] for r in ran[mesh]], alone["adapted"][adapter])


def test_compiled_blocks_exchange_heads_in_one_graph(ran):
    same_gradient([r["compiled"] for r in ran[2, 1, 2]], ran[ALONE][0]["step"])


def test_the_norm_is_that_of_the_whole_gradient(ran):
    step = ran[ALONE][0]["step"]
    whole = torch.cat([g.double().flatten() for g, _, _ in step["grads"].values()])
    assert step["norm"] == pytest.approx(whole.norm().item(), rel=1e-6)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_training_is_the_same_on_every_mesh_and_in_micro_batches(ran, mesh):
    alone = ran[ALONE][0]
    for r in ran[mesh]:
        torch.testing.assert_close(r["sparse"], alone["sparse"], rtol=2e-6, atol=1e-6)
        if "muon" in r:
            torch.testing.assert_close(r["muon"], alone["muon"], rtol=1e-5, atol=1e-6)
        if "dense" in r:
            torch.testing.assert_close(r["dense"], alone["dense"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_all_ranks_hold_the_same_norm_to_the_bit(ran, mesh):
    for r in ran[mesh]:
        assert torch.equal(r["sparse"], ran[mesh][0]["sparse"])


@pytest.mark.parametrize("mesh", HALF, ids=str)
def test_every_world_size_takes_the_same_dtypes(ran, mesh):
    alone = ran[ALONE][0]["dtypes"]
    half, full = torch.bfloat16, torch.float32
    assert alone["compute"] == {"blocks.1.ffn.0": half, "text_embedding.0": half,
                                "head.head": full, "time_embedding.0": full}
    assert alone["stored"] == alone["grads"] == {full}
    assert {name for name, dtype in alone["frozen"].items() if dtype == full} == \
           {name for name in alone["frozen"] if name.startswith(("time_", "head."))}
    assert alone["trainable"] == []
    for r in ran[mesh]:
        assert all(r["dtypes"][kind] == alone[kind] for kind in ("compute", "stored", "grads", "frozen", "trainable"))
        assert not r["dtypes"]["rounded"]       # a sum over ranks in bf16 would be
        assert r["dtypes"]["teacher"] == pytest.approx(alone["teacher"], rel=1e-3)
        torch.testing.assert_close(r["bf16"], ran[ALONE][0]["bf16"], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("mesh", [ALONE, *HALF], ids=str)
def test_what_is_frozen_is_stored_in_what_it_computes_in(ran, mesh):
    for r in ran[mesh]:
        half = r["half_adapted"]
        assert {name for name, dtype in half["stored"].items() if dtype == torch.float32} == \
               {name for name in half["stored"] if name.startswith(("time_", "head.")) or ".lora." in name}
        for adapter in ("student", "critic"):
            assert half[adapter]["norm"] == pytest.approx(ran[ALONE][0]["half_adapted"][adapter]["norm"], rel=2e-2) != 0
            grads = half[adapter]["grads"]
            assert len(grads) == 2 * 10 * CONFIG.blocks
            assert all(g.dtype == torch.float32 for g, _, _ in grads.values())


@pytest.mark.parametrize("mesh", [ALONE, *HALF], ids=str)
def test_fsdp_keeps_no_second_copy_of_a_base_that_every_rank_holds_whole(ran, mesh):
    for r in ran[mesh]:
        half = r["half_adapted"]
        base = [name for name in half["stored"] if ".lora." not in name]
        assert half["plain"] == (base if mesh[1] == 1 else [])
        assert half["left over"] == []


@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_weights_that_were_swapped_in_and_out_are_what_the_net_computes_with(ran, mesh):
    first, halved, restored, again = ran[mesh][0]["swapped"].tolist()
    assert first == pytest.approx(again, rel=1e-6) == restored
    assert halved != pytest.approx(first, rel=1e-2)
    torch.testing.assert_close(ran[mesh][0]["swapped"], ran[ALONE][0]["swapped"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_rows_of_all_ranks_make_the_net_under_clean_names(ran, mesh):
    whole, alone = assembled([r["rows"] for r in ran[mesh]]), assembled([ran[ALONE][0]["rows"]])
    with torch.device("meta"):
        names = [name for name, _ in DiT(CONFIG).named_parameters()]
    assert list(whole) == ran[mesh][0]["names"] == names
    assert all(torch.equal(whole[name], alone[name]) for name in names)
    none = [name for r in ran[mesh] for name, (tensor, _, _) in r["rows"].items() if len(tensor) == 0]
    assert bool(none) == (mesh[1] != 1)     # a rank without rows is part of what is tested


@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_means_and_agreement_are_over_all_ranks(ran, mesh):
    mean = (mesh[0] - 1) / 2
    for r in ran[mesh]:
        assert r["mean"]["a"] == mean
        assert r["mean"]["b"].tolist() == [mean, 1.0]
        assert r["agree"] == [True, False, False]
        assert all(type(ok) is bool for ok in r["agree"])
        assert r["least"] == [2**60, 1 - mesh[0]]
        assert all(type(x) is int for x in r["least"])


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_what_ranks_make_together_is_on_rank_0_and_nothing_else_travels(ran, mesh, n):
    reports = [r["spread"][n] for r in ran[mesh]]
    results, calls, _ = reports[0]
    assert torch.equal(results, made(range(n)))
    assert results.dtype == torch.float32
    assert all(result is None for result, _, _ in reports[1:])
    for _, others, _ in reports:        # sharded ranks forward in step, at most two places at once
        assert [len(places) for places in others] == [len(places) for places in calls]
        assert all(1 <= len(places) <= 2 and 0 <= min(places) <= max(places) < n for places in others)
    for rank, (_, others, _) in enumerate(reports):
        assert others == reports[rank // mesh[2] * mesh[2]][1]      # those that share a sample make the same
    of_rank_0 = sum(map(len, calls))
    sent = [message for _, _, messages in reports for message in messages]
    assert sum(size for size, _ in sent) == (n - of_rank_0) * 2 * 4
    assert all(to == 0 for _, to in sent)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_two_ranks_on_one_gpu_are_named(ran, mesh):
    host = socket.gethostname()
    for r in ran[mesh]:
        apart, two, one = r["cards"]
        assert apart is None
        assert two == (f"ranks 1 and 2 share {host}'s GPU GPU-1: start one process per GPU" if mesh[0] == 4 else None)
        together = " and ".join(map(str, range(mesh[0])))
        assert one == f"ranks {together} share {host}'s GPU GPU-5: start one process per GPU"


# ---- one process ----------------------------------------------------------------------------------------------------

@contextmanager
def one_process():
    yield parallel.init("cpu")
    parallel.close()


@pytest.mark.slow
def test_shapes_compile_to_one_graph_each_for_all_blocks_however_few_torch_allows():
    counted = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    allowed = torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)      # 8 and 256, by itself
    with one_process() as world, eagerly(), allowed:
        net, _ = build(world, "bf16", compile=True, shapes=2)
        before = counted["unique_graphs"]
        for frames in (1, 2):
            inputs = torch.randn(1, 3, frames, 2, 2), torch.rand(1), Cond(torch.randn(1, 5, 8))
            net(*inputs).sum().backward()
            with torch.no_grad():
                net(*inputs)
        assert counted["unique_graphs"] - before == 4


def done_and_tidied(_):
    parallel.init("cpu")
    util.Finalize(None, print, ("tidied",), exitpriority=0)     # at the end of a forked process, as atexit elsewhere
    print("done")
    parallel.leave()


@pytest.mark.slow
def test_a_run_leaves_with_what_it_printed_and_past_what_python_would_tidy_up():
    assert ranks(1, done_and_tidied, None) == "done\n"


def test_one_fp32_process_is_left_unwrapped():
    with one_process() as world:
        net, rows = build(world)
        assert type(net) is DiT
        assert type(net.blocks[0]).__name__ == "Block"
        assert all(rows[name][0].data_ptr() == p.data_ptr() for name, p in net.named_parameters())


@pytest.mark.parametrize("flag, value", [("shard", 3), ("shard", 0), ("shard", -2), ("sp", 3), ("sp", -1), ("sp", 8)])
def test_sizes_that_do_not_divide_the_world_are_refused_with_the_choices(monkeypatch, flag, value):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=rf"--{flag}={value} .* 4 processes: choose 1, 2, 4"):
        parallel.init("cpu", **{flag: value})


def no_gpu_works(monkeypatch, built):
    """A machine with an NVIDIA device that PyTorch cannot use, built with CUDA or not."""
    def broken():
        if not built:
            raise AssertionError("Torch not compiled with CUDA enabled")
        raise RuntimeError("The NVIDIA driver on your system is too old")
    monkeypatch.setattr(parallel, "nvidia_present", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", broken)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_is_there_and_does_not_work_is_an_error_with_the_reason(monkeypatch, device):
    no_gpu_works(monkeypatch, built=True)
    with pytest.raises(RuntimeError, match="driver on your system is too old.*--device=cpu"):
        parallel.pick_device(device)
    assert parallel.pick_device("cpu").type == "cpu"


def test_a_pytorch_without_cuda_says_so_once_a_machine_and_takes_the_cpu(monkeypatch, capsys):
    no_gpu_works(monkeypatch, built=False)
    assert [parallel.pick_device("auto", rank, 2).type for rank in range(2)] == ["cpu", "cpu"]
    build = f"PyTorch {torch.__version__} is a build without CUDA"
    assert capsys.readouterr().out == f"this machine has a GPU, but {build}: running on the CPU\n"
    with pytest.raises(RuntimeError, match="not compiled with CUDA.*--device=cpu"):
        parallel.pick_device("cuda")
    monkeypatch.setattr(parallel, "nvidia_present", lambda: False)
    assert parallel.pick_device("auto").type == "cpu"
    assert capsys.readouterr().out == ""


def with_gpus(monkeypatch, count):
    """-> the numbers of the GPUs that will be taken, of `count` that this process sees."""
    taken = []
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_more_local_ranks_than_gpus_are_an_error(monkeypatch):
    with_gpus(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="3 processes on a machine with 2 GPUs: use --nproc_per_node=2"):
        parallel.pick_device("cuda", local_rank=0, local_size=3)


@pytest.mark.parametrize("count, local_rank, index", [(1, 0, 0), (1, 3, 0), (4, 0, 0), (4, 3, 3), (8, 3, 3)])
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_sees(monkeypatch, count, local_rank, index):
    taken = with_gpus(monkeypatch, count)
    assert parallel.pick_device("cuda", local_rank, local_size=4) == torch.device("cuda", index)
    assert taken == [index]


@pytest.mark.parametrize("device, nccl, size, wanted", [
    ("cpu", True, 2, "gloo"), ("cuda", True, 1, "cpu:gloo,cuda:nccl"), ("cuda", True, 2, "cpu:gloo,cuda:nccl"),
    ("cuda", False, 1, "gloo")])
def test_flags_travel_by_gloo_and_one_process_needs_no_nccl(monkeypatch, device, nccl, size, wanted):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert parallel.backend(torch.device(device), size) == wanted
    if not nccl:
        with pytest.raises(RuntimeError, match="2 processes on GPUs need NCCL"):
            parallel.backend(torch.device(device), 2)


def on_a_card(monkeypatch, device, capability):
    """parallel.init finds this device, and a GPU of this capability."""
    monkeypatch.setattr(parallel, "pick_device", lambda *_: torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")


def test_a_card_before_ampere_is_refused_bf16_by_name(monkeypatch):
    on_a_card(monkeypatch, "cuda", (7, 5))
    with pytest.raises(RuntimeError, match="Tesla T4 does not compute in bf16: --precision=fp32"):
        parallel.init("cuda", precision="bf16")


@pytest.mark.parametrize("device, capability, size, asked, became", [
    ("cpu", (0, 0), 1, (None, None), ("fp32", False)), ("cuda", (9, 0), 1, (None, None), ("bf16", True)),
    ("cuda", (7, 5), 1, (None, None), ("fp32", True)),
    ("cpu", (0, 0), 2, ("bf16", True), ("bf16", True)), ("cuda", (7, 5), 2, ("fp32", False), ("fp32", False))])
def test_a_gpu_brings_bf16_and_the_compiler_unless_told_otherwise(monkeypatch, device, capability, size, asked, became):
    calls = mock.Mock()
    on_a_card(monkeypatch, device, capability)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for owner, name in ((parallel, "check_cards"), (torch.distributed, "init_process_group"),
                        (parallel, "init_device_mesh")):
        monkeypatch.setattr(owner, name, getattr(calls, name))
    for name, value in dict(RANK=0, WORLD_SIZE=size).items():
        monkeypatch.setenv(name, str(value))
    world = parallel.init(device, 1, 1, *asked)
    assert (world.precision, world.compile) == became
    assert world.device.type == device
    checked = ["check_cards"] if (device, size) == ("cuda", 2) else []      # when there is a group, before any NCCL
    assert [name for name, _, _ in calls.mock_calls] == ["init_process_group", *checked, "init_device_mesh"]


def test_64_ranks_that_make_8_clips_move_8():
    """Ranks one after another in this process; rank 0 last, for it receives."""
    for n, sp in ((8, 1), (8, 2), (100, 1), (100, 4), (1, 64)):
        sent, lengths = {}, set()
        worlds = [parallel.imagine(64, sp=sp)._replace(rank=rank) for rank in range(64)]

        def make(places):
            lengths.add(len(places))
            return made(places).double()
        for world in reversed(worlds):
            with mock.patch.object(parallel.dist, "send", lambda x, to: sent.update({world.rank: x.clone()})), \
                    mock.patch.object(parallel.dist, "recv", lambda x, rank: x.copy_(sent.pop(rank))):
                if world.rank == 0:
                    assert sum(map(len, sent.values())) == n - math.ceil(n / world.data_size)
                results = parallel.spread(make, n, 100, world)
        assert torch.equal(results, made(range(n)))
        assert results.dtype == torch.float32
        assert not sent
        assert len(lengths) == 1


@pytest.mark.parametrize("size, sp", [(1, 1), (4, 1), (4, 2), (64, 1)])
def test_shares_are_equally_long_and_count_each_thing_once(size, sp):
    worlds = [parallel.imagine(size, sp=sp)._replace(rank=rank) for rank in range(size)]
    for n in (0, 1, 2, 7, 64, 65):
        shares = [parallel.share(n, world) for world in worlds]
        assert len({len(share) for share in shares}) == 1
        assert all(0 <= i < n for share in shares for i, _ in share)
        assert sorted(i for share in shares[::sp] for i, counts in share if counts) == list(range(n))
        assert all(shares[rank] == shares[rank // sp * sp] for rank in range(size))


def test_heads_that_sp_does_not_divide_are_refused():
    world = parallel.World(rank=0, size=3, device=torch.device("cpu"), mesh=None, sp=3, ring=None)
    _, attend, _ = world.ulysses(attention, 9)
    with pytest.raises(ValueError, match="4 heads .* --sp=3"):
        attend(*torch.zeros(3, 1, 3, 4, 8))


# ---- being asked to stop ------------------------------------------------------------------------

# PyTorch's collectives wait in C, where no handler runs: so does a lock that is taken twice.
PRELUDE = """
import ctypes, os, signal, time
import parallel
parallel.BEAT, parallel.PATIENCE, parallel.ECHO = 0.2, 4.0, 0.5

def wait_in_c():
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)

world = parallel.init("cpu")
stopped = parallel.stop_requested(world)
print("ready", flush=True)
"""


def carry_out(code):
    """One rank's work: the prelude and code."""
    exec(PRELUDE + code, {})


@pytest.mark.slow
def test_ranks_agree_to_stop_when_one_is_asked():
    code = """
seen = [stopped()]
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
seen += [stopped(), stopped()]
time.sleep(3 * parallel.PATIENCE)       # a long save; the rank that was asked looks for signs of life all the while
print(f"rank {world.rank} {seen}\\n", end="", flush=True)     # in one write: both ranks share the file
"""
    printed = ranks(2, carry_out, code)
    for rank in range(2):
        assert f"rank {rank} [False, True, True]" in printed


@pytest.mark.slow
def test_a_rank_does_not_outlive_a_dead_one_for_long(tmp_path):
    """Under torchrun, which has 600 s of patience as in recipes."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + """
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
wait_in_c()
""")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*torchrun, str(script)], env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        printed, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True).stdout.split()
        for pid in [process.pid, *map(int, children)]:
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"still there: {process.communicate()[0]}")
    assert process.returncode == 1, printed
    assert "rank 0 ends: ranks [1] have given no sign of life for 4 s" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("number, waiting", [(signal.SIGTERM, "wait_in_c()"),
                                             (signal.SIGINT, "while True:\n    time.sleep(0.1)")])
def test_a_second_signal_ends_a_run_at_once_and_the_first_does_not(number, waiting):
    with started(1, carry_out, waiting) as (group, printed):
        (process,) = group.processes
        wait_until(lambda: Path(printed.name).read_text() == "ready\n", group)
        for _ in range(2):      # an echo, as of a SLURM that tells torchrun and its ranks, whom torchrun tells too
            os.kill(process.pid, number)
            time.sleep(0.1)
        process.join(1)
        assert process.is_alive()
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode not in (0, None)


@pytest.mark.slow
def test_one_process_is_asked_to_stop():
    code = """
assert stopped() is False
os.kill(os.getpid(), signal.SIGINT)
assert stopped() is True
"""
    assert ranks(1, carry_out, code) == "ready\n"
