"""What a run would take: counted on meta tensors and held against real ones; the dry run, and the start on a GPU."""
import gc
import math
import re
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import distill
import model
import parallel
import plan
import train
from attention import attention
from store import Writer
from helpers import run, shapes_dataset, told, total
from model import LOCAL, Bound, Cond, DiT, ModelConfig, Seq, add_lora
from plan import activations
from step import adamw, tensors

CONFIG = ModelConfig(dim=64, blocks=3, heads=4, ffn=160, channels=4, text_dim=24, freq_dim=32)
SHAPE, TEXT = (2, 4, 3, 4, 6), 5
RANKS = 4


def blank(remat=False, lora=False):
    """A small net on meta."""
    with torch.device("meta"):
        net = DiT(CONFIG, remat)
        if lora:
            add_lora(net, "main", 3, 3)
    return net


def allocated(work):
    """Bytes that every allocation of work() takes, and every release gives back, by torch's profiler."""
    gc.collect()            # an earlier test's net, tied in cycles, is not to be given back in between
    gc.disable()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()       # what it returns lives until all is seen
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    gc.enable()
    del kept
    return sizes


# ---- counted and real -----------------------------------------------------------------------------------------------


def inputs():
    return torch.zeros(SHAPE), torch.zeros(SHAPE[0]), Cond(torch.zeros(SHAPE[0], TEXT, CONFIG.text_dim))


def drop_grad(p):
    p.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("precision, remat, lora", (
    ("fp32", False, False), ("fp32", True, True), ("bf16", False, True), ("bf16", True, False)))
def test_activations_are_what_a_real_forward_and_backward_allocate(precision, remat, lora):
    adapter = "main" if lora else None
    kept, most = activations(Bound(blank(remat, lora), lora=adapter), SHAPE, TEXT, precision)
    net = blank(remat, lora).to_empty(device="cpu").to(parallel.DTYPES[precision])
    for island in net.islands():
        island.float()
    for p in net.parameters():
        p.detach().fill_(0.01)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(drop_grad)
    x, t, cond = inputs()
    own = x.nbytes + t.nbytes + cond.text.nbytes
    if lora:
        own -= 8 * 10 * CONFIG.blocks       # the adapters' scales, numbers that autograd keeps on the CPU
    forward = partial(Bound(net, lora=adapter), x, t, cond)

    def both():
        v = forward()
        v.backward(v.detach())
        return v

    model.rope_table.cache_clear()      # its tables are counted too, each time
    assert kept == sum(allocated(forward)) + own
    model.rope_table.cache_clear()
    real = max(accumulate(allocated(both))) + own
    assert 0.99 < real / most < 1.2      # kernels on CPU take a little inside


@pytest.mark.slow
def test_more_blocks_are_counted_from_two_of_them():
    net = blank()
    kept, most = activations(Bound(net), SHAPE, TEXT, "fp32")
    for _ in range(2):
        net.blocks.append(net.blocks[0])
    kept_more, most_more = activations(Bound(net), SHAPE, TEXT, "fp32")
    net.blocks = net.blocks[:1]
    kept_one, most_one = activations(Bound(net), SHAPE, TEXT, "fp32")
    assert kept_more - kept == kept - kept_one
    assert most_more - most == most - most_one


@pytest.mark.slow
def test_tokens_split_over_ranks_take_their_share():
    length = 3 * 2 * 3
    split = Seq(*parallel.ulysses(attention, length, parallel.imagine(2, sp=2)))
    whole, part = (activations(Bound(blank(remat=True), seq=seq), SHAPE, TEXT, "bf16")[0] for seq in (LOCAL, split))
    assert 0.5 * whole < part < 0.65 * whole        # the text, and what the head gives, are whole on every rank


@pytest.fixture
def fake():
    """Four processes of which there is one: collectives do nothing, what they work on is as large as in truth."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shard, precision, lora", (
    (1, "fp32", False), (1, "bf16", True), (2, "fp32", True), (2, "bf16", False), (4, "fp32", False),
    (4, "bf16", True)))
def test_memory_is_what_real_tensors_take(fake, shard, precision, lora):
    mesh = init_device_mesh("cpu", (RANKS // shard, shard), mesh_dim_names=("replicate", "shard"))
    world = parallel.imagine(RANKS, shard, precision=precision)
    adapter = "main" if lora else None
    takes = parallel.memory(blank(True, lora), world)
    _, most = activations(Bound(blank(True, lora), lora=adapter), SHAPE, TEXT, precision)

    net = parallel.prepare(blank(True, lora), world._replace(device=torch.device("cpu"), mesh=mesh))
    rows = parallel.local_rows(net)
    assert takes["parameters"] == sum(x.nbytes for x in tensors(rows))
    _, state = adamw(parallel.local_rows(net, trained=True), (0.9, 0.99), 0)
    assert 2 * takes["gradients"] == sum(part.tensor.nbytes for part in state.values() if part.shape)

    for x in tensors(rows):
        x.fill_(0.01)
    bound, given, sync = Bound(net, lora=adapter), inputs(), parallel.sync(net)

    def micro(last):
        sync(last)
        bound(*given).square().mean().backward()

    micro(last=True)
    net.zero_grad()
    first, last = allocated(partial(micro, False)), allocated(partial(micro, True))
    assert sum(first) == takes["gradients"]      # nobody holds more of them than its rows
    assert sum(last) == 0
    peak, counted = sum(first) + max(accumulate(last)), takes["gradients"] + takes["gathered"] + most
    # bf16 kernels on CPU add up in fp32 inside, in a buffer per thread that no GPU has: 1.025 was seen with two threads
    assert 0.6 * counted <= peak <= (1.02 if precision == "fp32" else 1.1) * counted


# ---- weighed --------------------------------------------------------------------------------------------------------


def weighed(main, size=1, *, shard=1, shapes=((24, 5, 8, 8),), length=8, **flags):
    """What a root's run takes, with what the root says of itself -> plan.Weight."""
    if main is train.main:
        cfg = train.resolve(train.Config(out="nowhere", **flags))
        lora, takes = train.adapter(cfg), dict(optimizer=train.optimizer(cfg))
    else:
        cfg = distill.resolve(distill.Config(out="nowhere", teacher="nowhere", dry_run=(1,), **flags))
        lora, takes = distill.adapters(cfg), dict(optimizer=distill.optimizer(cfg), learners=2, teacher=True)
    return plan.weigh(cfg, parallel.imagine(size, shard, cfg.sp), lora, shapes, length, **takes)


@pytest.mark.slow
def test_a_t_per_frame_is_weighed_where_first_frames_are_given():
    shape = (24, 5, 8, 8)
    alone, given = (weighed(train.main, shapes=[shape], first_frame=share) for share in (0.0, 0.5))
    still = weighed(train.main, shapes=[(24, 1, 8, 8)], first_frame=0.5)
    assert given.held == alone.held
    more = (max(given.passing.values()) - max(alone.passing.values())) / (16 * 80 * 128)
    assert more > 4 * 6 * 4         # each of 4 blocks keeps what t says to every token: 6 numbers a channel
    assert still.passing == weighed(train.main, shapes=[(24, 1, 8, 8)]).passing


NET = 4 * 1_259_744             # bytes of the tiny model in fp32
ADAPTER = 4 * (4 * 4 * (8 * 256 + 2 * 640))    # of an adapter of rank 4: per block, 8 of 128 x 128 and 2 of 128 x 512


def test_training_holds_weights_gradients_two_moments_and_an_average():
    held = weighed(train.main, optimizer="adamw").held
    assert held["frozen weights"] == 0
    assert held["trained weights"] == held["gradients of one net"] == held["average"] == NET
    assert held["optimizer"] == pytest.approx(2 * NET, rel=1e-3)      # and each parameter's count of steps


def test_adapters_hold_the_base_once_and_everything_else_of_themselves():
    held = weighed(train.main, init="x", lora_rank=4).held
    assert held["frozen weights"] == NET
    assert held["trained weights"] == held["gradients of one net"] == held["average"] == ADAPTER


def test_distillation_holds_three_nets_two_of_which_learn():
    held = weighed(distill.main, model="tiny").held
    assert held["frozen weights"] == NET
    assert held["trained weights"] == 2 * NET
    assert held["gradients of one net"] == held["average"] == NET
    assert held["optimizer"] == pytest.approx(4 * NET, rel=1e-3)


def test_distillation_of_adapters_holds_one_net_and_two_adapters():
    held = weighed(distill.main, model="tiny", lora_rank=4).held
    assert held["frozen weights"] == NET
    assert held["trained weights"] == 2 * ADAPTER
    assert held["gradients of one net"] == held["average"] == ADAPTER
    assert held["optimizer"] == pytest.approx(4 * ADAPTER, rel=0.02)


def test_sharded_weights_take_their_part():
    whole, part = (weighed(train.main, 4, shard=shard).held for shard in (1, 4))
    for what in ("trained weights", "optimizer", "average"):
        assert part[what] == pytest.approx(whole[what] / 4, rel=0.01)


@pytest.mark.parametrize("main, nets", ((train.main, 4), (distill.main, 7)))
def test_a_checkpoint_is_the_learners_their_moments_and_one_average(main, nets):
    flags = dict(model="tiny") if main is distill.main else dict(optimizer="adamw")
    assert weighed(main, **flags).checkpoint == pytest.approx(nets * NET, rel=1e-3)


def test_the_optimizers_bytes_come_from_its_rows():
    """An optimizer of one moment takes half of what AdamW does, on the GPU and on disk."""
    def one_moment(rows):
        return None, {name: part._replace(tensor=torch.empty_like(part.tensor)) for name, part in rows.items()}

    cfg = train.resolve(train.Config(out="nowhere"))
    weight = plan.weigh(cfg, parallel.imagine(1), {}, [(24, 5, 8, 8)], 8, optimizer=one_moment)
    assert weight.held["optimizer"] == NET
    assert weight.checkpoint == 3 * NET


def test_pairs_take_disk_and_an_anchor_holds_the_activations_of_two_forwards():
    cfg = distill.resolve(distill.Config(out="nowhere", teacher="nowhere", dry_run=(1,), model="tiny", student_steps=2))
    takes = dict(optimizer=distill.optimizer(cfg), learners=2, teacher=True)
    alone, beside = (plan.weigh(cfg, parallel.imagine(1), {}, [(24, 5, 8, 8)], 8, graphs=graphs, pairs=pairs, **takes)
                     for graphs, pairs in ((1, None), (2, distill.to_make(cfg))))
    assert alone.dataset == {}
    assert beside.dataset == {"pairs": 4000 * 2 * 24 * 5 * 8 * 8 * 4, "texts of pairs": 4000 * 8 * 64 * 4}
    (one,), (two,) = alone.passing.values(), beside.passing.values()
    assert 1.5 * one < two < 2 * one
    assert "32,000 forwards of the teacher" in plan.making(distill.to_make(cfg), cfg, parallel.imagine(1),
                                                            [(24, 5, 8, 8)], 8)


@pytest.mark.slow
def test_activations_and_the_vae_pass_one_at_a_time():
    shapes = [(16, 3, 8, 8), (16, 5, 16, 8)]
    weight = weighed(train.main, model="wan-1.3b", shapes=shapes, batch=4, vae="x")
    small, large, vae = weight.passing.values()
    assert list(weight.passing)[:2] == [f"activations of 1 x {shape}" for shape in shapes]
    assert small < large
    weights, each = plan.VAES[16]
    assert vae == pytest.approx(1e9 * (weights + each * 16 * 8))


@pytest.mark.slow
@pytest.mark.parametrize("flags", (dict(model="wan-1.3b", shapes=[(16, 3, 8, 8)]), dict(vae="x")))
def test_the_vae_counts_where_it_is_given_and_the_codec_has_one(flags):
    assert len(weighed(train.main, batch=4, **flags).passing) == 1


WAN_22 = dict(base_dim=160, decoder_base_dim=256, z_dim=48, in_channels=12, out_channels=12, is_residual=True,
              patch_size=2, scale_factor_spatial=16)


@pytest.mark.slow
@pytest.mark.parametrize("channels, form", ((16, {}), (48, WAN_22)), ids=("Wan 2.1", "Wan 2.2"))
def test_a_clip_is_decoded_in_what_the_plan_says(channels, form):
    with torch.device("meta"), torch.no_grad():
        vae = pytest.importorskip("diffusers").AutoencoderKLWan(**form).requires_grad_(False)
        with plan.Alive(vae.parameters()) as alive:
            vae.decode(torch.empty(1, channels, 5, 16, 16))
    weights, each = plan.VAES[channels]
    assert sum(p.nbytes for p in vae.parameters()) / 1e9 == pytest.approx(weights, rel=0.02)
    assert 0.85 * each < alive.most / 1e9 / (16 * 16) < each


# ---- --dry_run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_adds_up_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, lines, _ = told(train.main, train.Config(dry_run=(2,), device="cpu", optimizer="adamw"), capsys)
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert not dist.is_initialized()
    parts = [n for what, n in lines.items() if not what.startswith(("in all", "on disk"))]
    assert total(lines) == pytest.approx(sum(parts), abs=0.004)
    assert total(lines, "on disk") == pytest.approx(4 * 4 * NET / 1e9, abs=0.001)


@pytest.mark.slow
def test_gigabytes_are_of_gpus_which_need_not_be_here(capsys):
    base = dict(model="wan-1.3b", data=("nowhere",), device="cuda")
    _, lines, _ = told(train.main, train.Config(**base, dry_run=(1, 80)), capsys)
    assert "in all of 80.000, a tenth of which is left to kernels and fragments" in lines
    assert lines["trained weights"] == pytest.approx(4 * 1.419, abs=0.001)
    assert 2 * 1.419 < lines["gathered copies"] < 2.5 * 1.419       # bf16, and some of the gradients


def test_what_does_not_fit_is_refused_with_flags_that_would_help(capsys):
    cfg = train.Config(model="wan-1.3b", data=("nowhere",), micro_batch=4, remat=False, dry_run=(8, 80))
    code, _, err = told(train.main, cfg, capsys)
    assert code == 2
    for flag in ("--remat=True", "--micro_batch", "--shard=-1", "--sp", "--lora_rank", "more ranks"):
        assert flag in err


def test_flags_that_are_used_up_are_not_advised(capsys):
    cfg = train.Config(model="wan-1.3b", data=("nowhere",), micro_batch=4, shard=-1, sp=4, dry_run=(4, 5))
    code, _, err = told(train.main, cfg, capsys)
    assert code == 2
    assert "reduce it: --micro_batch, --lora_rank, more ranks" in err


def anywhere(**flags):
    """A resolved config, and the ranks it is for."""
    return train.resolve(train.Config(out="nowhere", **flags)), parallel.imagine(1)


@pytest.mark.parametrize("gb, code", ((89, 0), (91, 2)))
def test_a_tenth_of_the_memory_is_left_to_kernels(gb, code):
    weight = plan.Weight({"held": 60e9}, {"short": 1e9, "long": (gb - 60) * 1e9}, checkpoint=1e9)
    assert plan.show("", weight, *anywhere(), 100e9, math.inf) == code


@pytest.mark.parametrize("checkpoint, code", ((0.49e9, 0), (0.51e9, 2)))
def test_a_disk_has_room_for_what_is_kept_and_one_more(checkpoint, code, capsys):
    weight = plan.Weight({"held": 1e9}, {"passing": 1e9}, checkpoint)
    assert plan.show("", weight, *anywhere(keep=3), 100e9, 2e9) == code
    assert ("reduce --keep" in capsys.readouterr().err) == (code == 2)


def test_the_disk_is_the_one_that_the_run_will_be_on(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=7)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert plan.free_disk(str(tmp_path / "a" / "b")) == 7
    assert asked == [tmp_path]


def test_every_bucket_of_a_dataset_counts(tmp_path, capsys):
    spec = {"codec": {"name": "none", "text_width": 64, "text_length": 8}, "fps": 8, "dtype": "fp32"}
    writer = Writer(tmp_path / "set", spec)
    for i, shape in enumerate([(24, 5, 8, 8), (24, 9, 8, 16)] * 8):
        writer.add(torch.randn(shape), torch.randn(3, 64), caption="", source="", key=str(i))
    writer.finish(torch.zeros(1, 64))
    base = dict(data=(str(tmp_path / "set"),), dry_run=(1,), device="cpu")
    _, lines, _ = told(train.main, train.Config(**base), capsys)
    small, large = (n for what, n in lines.items() if what.startswith("activations of 16 x (24,"))
    assert 3 * small < large < 4 * small
    assert total(lines) > large
    code, _, err = told(train.main, train.Config(**base, model="wan-1.3b"), capsys)
    assert code == 2
    assert "24 channels" in err


# ---- the start on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """-> gpu(bytes): the plan takes any device for a GPU of so much memory."""
    def pretend(memory):
        def memory_of(device, ranks):
            return memory

        monkeypatch.setattr(plan, "parallel", SimpleNamespace(**vars(parallel) | {"on_gpu": bool}))
        monkeypatch.setattr(plan, "memory_of", memory_of)
    return pretend


def begun(rank=0, **flags):
    """The start of a run of the tiny model on the built-in shapes."""
    cfg, world = anywhere(optimizer="adamw", **flags)
    data = SimpleNamespace(shapes=[(24, 5, 8, 8)], manifest={"text": {"length": 8}})
    plan.start(cfg, world._replace(rank=rank), train.adapter(cfg), data, optimizer=train.optimizer(cfg))


HELD = 5 * NET      # and a little for the optimizer's counts


def test_a_start_on_a_cpu_says_nothing(capsys):
    begun()
    assert capsys.readouterr().out == ""


def test_a_start_on_a_gpu_says_once_what_it_takes(gpu, capsys):
    gpu(80e9)
    begun(rank=1)
    assert capsys.readouterr().out == ""
    begun()
    assert re.fullmatch(r"0.0 GB held and 0.\d GB of activations at most, of 80.0 GB a GPU\n", capsys.readouterr().out)


def test_what_is_held_and_does_not_fit_a_gpu_is_refused_with_flags_that_would_help(gpu, capsys):
    gpu(0.99 * HELD)
    with pytest.raises(ValueError, match="what is held does not fit.*: --remat=True, --micro_batch, --lora_rank"):
        begun()
    assert capsys.readouterr().out == ""


def test_activations_that_may_not_fit_are_said_and_the_run_goes_on(gpu, capsys):
    gpu(1.01 * HELD)
    begun()
    assert "the activations may not fit: --remat=True, --micro_batch, --lora_rank" in capsys.readouterr().out


def test_a_start_that_does_not_fit_ends_at_the_door_and_writes_nothing(gpu, tmp_path, capsys):
    data = shapes_dataset(tmp_path / "data", clips=20)
    gpu(1e6)
    with pytest.raises(SystemExit) as refused:
        run(train.main, train.Config(data=(data,), out=str(tmp_path / "run"), batch=4, steps=1, val=0, samples=0))
    assert refused.value.code == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("train.py: ")
    assert "what is held does not fit" in err
    assert not (tmp_path / "run").exists()
