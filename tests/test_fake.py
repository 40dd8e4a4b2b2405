"""What only a GPU would execute, on fake tensors whose device is meta, which stands for the GPU here.

A fake tensor has a shape, a dtype and a device but no values: a forward and a backward take no memory, and an operator
that meets tensors of two devices raises, as on a GPU. A fake cuda tensor cannot run a backward without a driver.
"""
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import attention
import ckpt
import data
import distill
import model
import parallel
import plan
import step
import train
from data import Latents
from helpers import shapes_dataset
from model import Cond

GPU = torch.device("meta")
SHAPE = (24, 5, 8, 8)
SPARSE = dict(window=(1, 1, 1), tile=(2, 2, 2), dense_ends=1)
CAUSAL = dict(window=(-9, 1, 1), tile=(2, 99, 99), first_frame=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("data"), 40)


@pytest.fixture
def gpu(monkeypatch):
    """Meta is the GPU: `on_gpu` says so, and what would wait for values of it gets stand-ins."""
    for module in (parallel, data):
        monkeypatch.setattr(module, "on_gpu", lambda device: device.type in ("meta", "cuda"))
    monkeypatch.setattr(data, "page_locked", lambda shape, dtype=torch.float32: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: 1.0)
    monkeypatch.setitem(model.MODELS, "tiny", replace(model.MODELS["tiny"], blocks=3))     # with an inner one
    monkeypatch.setattr(parallel, "mean", lambda values, world: values)
    for root in (train, distill):
        monkeypatch.setattr(root, "numbers", lambda seen: seen)
    yield parallel.imagine(1, precision="bf16")
    for cache in (attention._build, model.rope_table):      # they hold tensors of a mode that is over
        cache.cache_clear()


@contextmanager
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def net_of(cfg, lora):
    """A net as bf16 blocks see it on a GPU: what FSDP casts is bf16, islands and adapters are fp32."""
    net = model.blank("tiny", cfg.remat, lora)
    kept = {p for island in net.islands() for p in island.parameters()}
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in kept:
                half = torch.empty_like(p, dtype=torch.bfloat16)
                module._parameters[name] = torch.nn.Parameter(half, p.requires_grad)
    return net


def checked_step(me):
    """Stands for AdamW's fused kernel: all that it would be given is on the GPU."""
    def update():
        seen = [me.opt.found_inf]
        for group in me.opt.param_groups:
            for p in group["params"]:
                seen += [p, p.grad, *me.opt.state[p].values()]
        assert {x.device for x in seen} == {GPU}
    return update


def latents(folder, cfg):
    """The dataset, read outside of the fake world, its batches on the GPU."""
    def outside(read):
        def reading(*args):
            with unset_fake_temporarily():
                return read(*args)
        return reading

    with unset_fake_temporarily():
        chunk = model.chunk_of(cfg.window, cfg.tile)
        source = Latents(folder, seed=0, batch=4, micro_batch=cfg.micro_batch, val=2, chunk=chunk, device=GPU)
    for name in ("at", "sample", "text"):
        setattr(source, name, outside(getattr(source, name)))
    return source


def logged():
    lines = []

    def log(at, **seen):
        lines.append((at, seen))

    log.lines, log.file, log.say, log.video = lines, lambda kind, at: f"{kind}/{at}", print, lambda *args: None
    return log


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    dict(),
    SPARSE | dict(remat=True, window_steps=4),
    SPARSE | dict(t="logit_normal", micro_batch=2),
    dict(lora_rank=4, init="x"),
    CAUSAL | dict(clean_prefix=0.5),
], ids=str)
def test_a_training_step_its_average_and_a_copy_for_saving_stay_on_the_gpu(folder, gpu, flags):
    cfg = train.resolve(train.Config(batch=4, optimizer="adamw", **flags))
    with fake():
        net = net_of(cfg, train.adapter(cfg))
        me = train.learner(net, cfg, gpu)
        me.opt.step = checked_step(me)
        step.start_average(me)
        micros = latents(folder, cfg).at(2)
        bound = train.bound_at(2, net, micros[0].x0.shape, cfg, gpu)
        losses = [partial(train.loss_of, bound, micro, cfg) for micro in micros]
        seen = step.train_step(me, losses, lr=1e-3, clip=1.0, ema=0.9)
        assert {x.device for x in seen.values() if torch.is_tensor(x)} == {GPU}
        assert me.counts["updates"] == 1
        with step.averaged(me):
            pass
        state = ckpt.roles(net=me.rows, opt=me.opt_rows, ema=me.average)
        for part in state.values():
            assert ckpt.copied(part, 0, ckpt.count(part.shape)).device.type == "cpu"


def test_figures_of_a_line_are_computed_from_what_is_on_the_gpu(folder, gpu, monkeypatch):
    monkeypatch.setattr(train.Log, "speed", staticmethod(lambda *args: {}))
    cfg = train.resolve(train.Config(batch=4, **SPARSE))
    with fake():
        net = net_of(cfg, {})
        source = latents(folder, cfg)
        micro = source.at(0)[0]
        bound = train.bound_at(0, net, micro.x0.shape, cfg, gpu)
        me = SimpleNamespace(counts={"skipped": 0})
        seen = train.figures(0, {"seconds": 1.0}, me, bound, micro, source, cfg, gpu)
    assert seen["sparsity"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), SPARSE, CAUSAL | dict(samples=1)], ids=str)
def test_validation_forwards_and_samples_on_the_gpu(folder, gpu, monkeypatch, flags):
    written = []
    monkeypatch.setattr(train, "STRATA", 3)
    monkeypatch.setitem(train.DEFAULTS["tiny"], "sample_steps", 2)
    monkeypatch.setattr(train.codec, "write_clips", lambda stem, x0, *args, **more: written.append(x0))
    cfg = train.resolve(train.Config(**dict(batch=4, samples=3, micro_batch=2) | flags))
    with fake(), torch.no_grad():
        net = net_of(cfg, {})
        source = latents(folder, cfg)
        assert "val_loss" in train.validate(net, 1, source, cfg, gpu)
        train.show(net, 1, source, cfg, gpu, logged())
    rows = 2 if cfg.first_frame else 1
    assert written[0].shape == (cfg.samples * rows, *SHAPE)
    assert written[0].device.type == "cpu"


# ---- distillation ---------------------------------------------------------------------------------------------------


def distilling(cfg, world):
    """-> nets, student, critic, as distill.main builds them."""
    lora = distill.adapters(cfg)
    teacher = net_of(cfg, lora)
    student, critic = (teacher, teacher) if lora else (net_of(cfg, {}), net_of(cfg, {}))
    if not lora:
        teacher.requires_grad_(False)
    sampling = {"window": None, "tile": (4, 4, 8), "dense_ends": 0, "steps": 3, "shift": 1.0,
                "guidance": 2.0}
    origin = SimpleNamespace(teacher_sampling=sampling, student_sampling={}, high=None, step=0)
    nets = partial(distill.bound_nets, student, critic, (teacher, None), origin, cfg, world)
    learners = [distill.learner(role, net, distill.optimizer(cfg), cfg, world)
                for role, net in (("student", student), ("critic", critic))]
    return nets, *learners, origin


def distill_config(monkeypatch, **flags):
    monkeypatch.setattr(distill, "inherit", lambda cfg: cfg)
    given = dict(model="tiny", first_frame=0.0, pairs=0, batch=4, out="nowhere")
    cfg = distill.resolve(distill.Config(**given | flags))
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), SPARSE | dict(remat=True, guidance=1.0), dict(lora_rank=4), CAUSAL], ids=str)
def test_a_students_and_a_critics_update_stay_on_the_gpu(folder, gpu, monkeypatch, flags):
    cfg = distill_config(monkeypatch, **flags)
    with fake():
        nets, student, critic, _ = distilling(cfg, gpu)
        source = latents(folder, cfg)
        with unset_fake_temporarily():
            draws = data.Ahead(partial(distill.draw, source, cfg), {"student": 1, "critic": 1}, GPU)
            micros = {role: draws(role, 0) for role in ("student", "critic")}
        for role, me, loss in (("student", student, distill.student_loss), ("critic", critic, distill.critic_loss)):
            me.opt.step = checked_step(me)
            losses = [partial(loss, nets, micro, 2, cfg) for micro in micros[role]]
            step.train_step(me, losses, lr=1e-3, clip=1.0)
            assert me.counts["updates"] == 1


@pytest.mark.slow
def test_validation_of_a_student_shows_all_three_nets_from_the_gpu(folder, gpu, monkeypatch):
    written = []
    monkeypatch.setattr(distill.codec, "write_clips", lambda stem, x0, *args, **more: written.append(x0))
    cfg = distill_config(monkeypatch, samples=2, micro_batch=4)
    with fake(), torch.no_grad():
        nets, _, _, origin = distilling(cfg, gpu)
        log = logged()
        distill.validate(0, nets, [], latents(folder, cfg), origin, cfg, log, gpu)
    assert [x0.shape[0] for x0 in written] == [4, 6]    # two prompts: student, teacher; student and both scores
    assert log.lines[0][1].keys() == {"val_diversity", "val_motion", "val_std"}


def test_what_makes_pairs_is_on_the_gpu(folder, gpu, monkeypatch, tmp_path):
    def look(net, z, cond, times, free):
        assert [x.device for x in (z, cond.text, free)] == [GPU] * 3
        raise InterruptedError

    monkeypatch.setattr(distill, "way", look)
    cfg = distill_config(monkeypatch, pairs=8, pairs_steps=1, first_frame=0.5, out=str(tmp_path))
    with fake():
        nets, _, _, origin = distilling(cfg, gpu)
        origin.base = {"crc32": 5}
        with unset_fake_temporarily():
            source = latents(folder, cfg)
        with pytest.raises(InterruptedError):
            distill.make_pairs(nets, source, origin, cfg, gpu)


# ---- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [
    dict(sampler="euler", steps=3, shift=2.0, guidance=3.0),
    dict(sampler="euler", steps=3, shift=2.0, guidance=1.0),
    dict(sampler="rollout", times=(1.0, 0.8, 0.5)),
], ids=str)
def test_both_samplers_stay_on_the_gpu(gpu, sampling):
    cfg = SimpleNamespace(remat=False)
    with fake(), torch.no_grad():
        bound = model.bind(net_of(cfg, {}), SHAPE, gpu)
        text = torch.empty(2, 8, 64, device=GPU)
        x0 = step.sample(bound, lambda k: torch.empty(2, *SHAPE, device=GPU), Cond(text), Cond(text), sampling)
    assert x0.device == GPU
    assert x0.shape == (2, *SHAPE)


def test_a_tensor_that_was_left_on_the_cpu_raises(gpu):
    cfg = SimpleNamespace(remat=False)
    with fake(), torch.no_grad():
        bound = model.bind(net_of(cfg, {}), SHAPE, gpu)
        z, text = torch.empty(2, *SHAPE, device=GPU), torch.empty(2, 8, 64)
        with pytest.raises(RuntimeError, match="two.*devices"):
            step.sample(bound, lambda k: z, Cond(text), None, dict(sampler="rollout", times=(1.0,)))


# ---- what `on_gpu` guards -------------------------------------------------------------------------------------------


def test_batches_reach_the_gpu_through_page_locked_memory(folder, gpu, monkeypatch):
    locked = []

    def page_locked(shape, dtype=torch.float32):
        locked.append(tuple(shape))
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(data, "page_locked", page_locked)
    source = Latents(folder, seed=0, batch=4, val=2, device=GPU)
    micro = source.at(0)[0]
    assert {getattr(micro, name).device for name in ("x0", "text", "null", "drop", "u", "e")} == {GPU}
    assert (4, *SHAPE) in locked


def test_a_start_on_a_gpu_says_what_it_takes_and_decodes_a_clip_at_once(folder, gpu, monkeypatch, capsys):
    monkeypatch.setattr(plan, "memory_of", lambda device, ranks: 80e9)
    cfg = train.resolve(train.Config(batch=4, vae="somewhere"))
    source = Latents(folder, seed=0, batch=4, val=2)
    plan.start(cfg, gpu, {}, source, optimizer=train.optimizer(cfg))
    assert "of 80.0 GB a GPU" in capsys.readouterr().out

    written = []
    monkeypatch.setattr(train.codec, "write_clips", lambda stem, x0, *args, **more: written.append(x0.device.type))
    with fake():
        micro = SimpleNamespace(x0=torch.empty(2, *SHAPE, device=GPU), z=torch.empty(2, *SHAPE, device=GPU))
        train.show_first(micro, source, cfg, gpu, logged())
        distill.show_first(0, micro.z, SimpleNamespace(step=0, student_sampling={}), cfg, gpu, logged())
    assert written == ["cpu", "cpu"]
