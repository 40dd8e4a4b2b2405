"""distill.py: who is updated when and on what, exact resume, and a Gaussian mixture whose student is known."""
import json
import math
import os
import re
import signal
import subprocess
from dataclasses import replace

import pytest
import torch

import ckpt
import distill
import export
import parallel
import prepare
import sample
import train
from data import Latents
from model import MODELS, DiT
from step import adamw, dmd_loss, ema_update, euler, flow_loss, grid, rollout, sample_t, train_step
from test_train import as_flags, log_of, run, same, shell, signal_one_of_two, state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "shapes")
    run(prepare.main, prepare.Config(clips=60, out=out))
    return out


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    run(train.main, train.Config(data=data, out=out, steps=6, batch=4, warmup=2, val_every=0, samples=0))
    return out


def config(data, teacher, out, **flags):
    base = dict(data=data, teacher=teacher, out=str(out), steps=8, student_every=2, batch=4, schedule="constant", shift=5.0, val_every=4, save_every=3, samples=2)
    return distill.Config(**base | flags)


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(distill.main, config(data, teacher, out))
    return out


def test_a_run_logs_both_nets_apart_and_leaves_videos_of_all_three(whole):
    lines = log_of(whole)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert {"student_loss", "student_grad_norm", "critic_loss", "critic_grad_norm", "student_x0_std", "student_updates", "val_diversity",
            "val_motion", "val_std"} <= lines[-1].keys()
    assert any(name.startswith("student_matching_by_t") for name in lines[-1]) and any(name.startswith("critic_loss_by_t") for name in lines[-1])
    for kind in ("samples", "inside"):
        assert sorted(p.name for p in (whole / kind).iterdir()) == [f"step_{n:07d}.mp4" for n in (0, 4, 8)]
    assert lines[-1]["student_updates"] == 4
    roles = {name.split(".")[0] for name in state(whole)}
    assert roles == {"net", "opt", "critic", "critic_opt", "ema", "null"}     # never the teacher
    how = ckpt.read_manifest(ckpt.latest(whole))["meta"]["sampling"]
    assert how["times"] == pytest.approx([1, 0.9375, 5 / 6, 0.625]) and how["guidance"] == 1 and how["shift"] == 5


def test_a_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(data, teacher, whole, tmp_path, monkeypatch):
    original = distill.train_step

    def interrupted(*args, **more):
        interrupted.left -= 1
        if interrupted.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    monkeypatch.setattr(distill, "train_step", interrupted)
    for interrupted.left in (2, 4, 99):
        run(distill.main, config(data, teacher, tmp_path / "run"))
    assert same(state(tmp_path / "run"), state(whole)) and log_of(tmp_path / "run") == log_of(whole)


def test_two_ranks_distil_as_one_does(data, teacher, whole, tmp_path):
    two = shell(2, "distill.py", *as_flags(config(data, teacher, tmp_path / "run", steps=4, micro_batch=1, shard=-1)))
    printed, _ = two.communicate(timeout=300)
    assert two.returncode == 0, printed
    for mine, theirs in zip(log_of(tmp_path / "run"), log_of(whole)):
        for name in {"student_loss", "critic_loss", "student_grad_norm", "critic_grad_norm", "val_diversity"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4), name


def test_a_signal_to_one_of_two_ranks_stops_both_and_nothing_is_lost(data, teacher, tmp_path):
    flags = as_flags(config(data, teacher, tmp_path / "run", steps=10**4, save_every=0, val_every=0, samples=0))
    signal_one_of_two("distill.py", flags, tmp_path / "run")


def spied(monkeypatch, cfg):
    """A run whose losses, rollouts and EMA tell what they were given, in order."""
    seen = []

    def spy(name, *keep):
        original = getattr(distill, name)

        def told(*args, **more):
            out = original(*args, **more)
            seen.append((name, *keep[0](args, out)))
            return out
        monkeypatch.setattr(distill, name, told)

    spy("rollout", lambda a, out: (a[0], a[5], torch.is_grad_enabled(), out.requires_grad, a[3], out.detach().clone()))
    spy("dmd_loss", lambda a, out: (a[1], a[2], a[5], a[7]))
    spy("flow_loss", lambda a, out: (a[0], a[1], a[3], torch.is_grad_enabled()))
    spy("ema_update", lambda a, out: (a[3],))
    spy("add_noise", lambda a, out: ())
    run(distill.main, cfg)
    return seen


def test_each_net_is_updated_on_its_clock_from_the_students_own_clips(data, teacher, tmp_path, monkeypatch):
    seen = spied(monkeypatch, config(data, teacher, tmp_path / "run", steps=40, student_every=5, val_every=0, samples=0))
    losses = [event[0] for event in seen if event[0] in ("dmd_loss", "flow_loss")]
    assert losses == (["flow_loss"] * 4 + ["dmd_loss", "flow_loss"]) * 8       # student first in the 5th step, critic always
    assert [event[1] for event in seen if event[0] == "ema_update"] == list(range(1, 9))     # with the student, never else
    exits, guided = {"dmd_loss": [], "flow_loss": []}, set()
    for rolled, loss in zip(seen, seen[1:]):
        if loss[0] in exits:
            name, net, exit, enabled, has_graph, times, x0 = rolled
            exits[loss[0]].append(exit)
            assert name == "rollout" and enabled == has_graph == (loss[0] == "dmd_loss")
            t = loss[3]
            assert t.dtype == torch.float32 and t.min() >= 0.02 and t.max() <= 0.98 and len(t.unique()) > 1
            if loss[0] == "flow_loss":
                assert torch.equal(loss[2], x0) and not loss[2].requires_grad and loss[4]      # on the student's clips, without its graph
                assert loss[1].func is not net.func                         # the critic, not the student
            else:
                teacher_net, critic_net = loss[1].func, loss[2].func
                assert len({teacher_net, critic_net, net.func}) == 3
                inside = (0.6 <= t) & (t <= 0.97)               # where alone the teacher is guided
                assert torch.equal(loss[4], torch.where(inside, 2.0, 1.0))
                guided |= set(inside.tolist())
                assert not any(p.requires_grad for p in teacher_net.parameters())
                assert all(p.grad is None for n in (teacher_net, critic_net) for p in n.parameters())
    assert guided == {True, False}
    assert exits["dmd_loss"] == [0, 1, 2, 3] * 2 and exits["flow_loss"] == [0, 1, 2, 3] * 10     # each net's own count, stratified


def test_the_scores_times_are_shifted_once_and_drawn_per_slot(data, teacher, tmp_path, monkeypatch):
    cfg = config(data, teacher, tmp_path / "run", steps=1, student_every=1, val_every=0, samples=0, score_shift=3.0)
    seen = spied(monkeypatch, cfg)
    latents = Latents(data, seed=0, batch=4)
    _, cfg = distill.resolve(cfg)
    (micro,) = distill.draw(latents, cfg, "critic", 0)
    t = next(event[3] for event in seen if event[0] == "flow_loss")
    assert torch.allclose(t, (3 * micro.u / (1 + 2 * micro.u)).clamp(0.02, 0.98))


def test_every_draw_belongs_to_a_role_a_step_and_a_slot(data):
    cfg = replace(distill.Config(seed=3, batch=8), times=(1.0, 0.9, 0.5))
    draws = lambda role, step, **rank: distill.draw(Latents(data, seed=3, batch=8, **rank), cfg, role, step)  # noqa: E731
    (one,) = draws("student", 4)
    four = [m for rank in range(2) for m in draws("student", 4, rank=rank, world=2, micro_batch=2)]
    for name in ("text", "z", "e", "u"):
        assert torch.equal(torch.cat([vars_of(m)[name] for m in four]), vars_of(one)[name])
    assert all(torch.equal(torch.cat([m.noises[k] for m in four]), one.noises[k]) for k in range(2))
    numbers = [*one.z, *one.e, *one.noises[0], *one.noises[1], *draws("critic", 4)[0].z, *draws("student", 9)[0].z]
    assert len({tuple(x.flatten()[:4].tolist()) for x in numbers}) == len(numbers)      # no two alike
    bound = 5 / math.sqrt(one.z[0].numel())
    assert all(abs((a * b).mean()) < bound for i, a in enumerate(numbers[:8]) for b in numbers[8:16])


def vars_of(draw):
    return draw._asdict()


def test_both_learning_rates_fall_to_0_at_the_last_step_which_then_is_no_free_flag(data, teacher, tmp_path, monkeypatch, capsys):
    used, original = [], distill.train_step

    def interrupted(*args, lr, **more):
        used.append(lr)
        if len(used) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, lr=lr, **more)

    monkeypatch.setattr(distill, "train_step", interrupted)
    cfg = config(data, teacher, tmp_path / "run", steps=4, student_every=2, student_lr=4e-4, critic_lr=1e-3, schedule="linear", samples=0)
    for start in (0, 2):
        run(distill.main, cfg)
        assert f"step {start + 2} of 4 is saved" in capsys.readouterr().out
    assert used == pytest.approx([1e-3, 3e-4, 7.5e-4, 5e-4, 1e-4, 2.5e-4])     # critic; student, critic; critic; student, critic
    assert log_of(tmp_path / "run")[-1]["student_lr"] == pytest.approx(1e-4)
    with pytest.raises(SystemExit):
        run(distill.main, replace(cfg, steps=8))
    assert "--steps=8 (was 4)" in capsys.readouterr().err


def test_accumulation_is_the_large_batch(data, teacher, whole, tmp_path):
    run(distill.main, config(data, teacher, tmp_path / "run", micro_batch=1, steps=4))
    for mine, theirs in zip(log_of(tmp_path / "run"), log_of(whole)):
        assert all(mine[n] == pytest.approx(theirs[n], rel=1e-4) for n in {"student_grad_norm", "critic_loss"} & mine.keys())


def test_the_student_starts_as_the_teacher_so_that_the_matching_part_is_zero(data, teacher, tmp_path, monkeypatch):
    measured = []
    original = distill.dmd_loss
    monkeypatch.setattr(distill, "dmd_loss", lambda *a: measured.append(original(*a)) or measured[-1])
    run(distill.main, config(data, teacher, tmp_path / "run", steps=1, student_every=1, val_every=0, samples=0))
    assert measured[0][1]["matching_by"][0].sum() == 0 and measured[0][1]["guidance_by"][0].sum() > 0


def test_a_student_that_cannot_be_updated_fails_whatever_the_critic_does(data, teacher, tmp_path, monkeypatch):
    original = distill.dmd_loss
    monkeypatch.setattr(distill, "dmd_loss", lambda *a: (original(*a)[0] * math.nan, {}))
    monkeypatch.setattr(distill, "SKIPS", 3)
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        run(distill.main, config(data, teacher, tmp_path / "run", val_every=0, samples=0))


def test_the_samples_are_of_the_averaged_weights_and_beside_the_teachers(data, teacher, whole, monkeypatch):
    """The last validation's figures, made again from the checkpoints alone."""
    few = distill.resolve(config(data, teacher, whole))[1]
    how = ckpt.read_manifest(ckpt.latest(teacher))["meta"]["sampling"]
    latents, saved = Latents(data, seed=0, batch=4), state(whole)

    def net(role, held):
        net = DiT(MODELS["tiny"])
        net.load_state_dict({name: held[f"{role}.{name}"] for name in net.state_dict()})
        return lambda x, t, text: net(x, t, text)

    def student(z, text, null, noises):
        return rollout(net("ema", saved), z, text, few.times, noises, 3)

    def many_steps(z, text, null, noises):
        return euler(net("ema", state(teacher)), z, text, grid(how["steps"], how["shift"]), null, 2.0)

    def figures(cfg):
        world = parallel.init("cpu")
        return distill.likeness(*(distill.clips(sampler, latents, cfg, world)[0] for sampler in (student, many_steps)))

    for name, value in run(figures, few).items():
        assert log_of(whole)[-1][name] == pytest.approx(value.item(), rel=1e-4)


def test_a_teacher_that_learned_sparse_is_asked_sparse_and_so_are_critic_and_student(data, tmp_path, monkeypatch):
    sparse = dict(window=(1, 1, 1), tile=(2, 2, 2), dense_ends=1)
    run(train.main, train.Config(data=data, out=str(tmp_path / "t"), steps=2, batch=4, val_every=0, samples=0, **sparse))
    cfg = config(data, str(tmp_path / "t"), tmp_path / "run", steps=2, val_every=0, samples=0)
    for name, *what in spied(monkeypatch, cfg):
        for net in [net for net in what[:2] if callable(net)]:
            assert net.keywords["metadata"].tile == (2, 2, 2) and net.keywords["dense_ends"] == 1
    how = ckpt.read_manifest(ckpt.latest(tmp_path / "run"))["meta"]["sampling"]
    assert (how["window"], how["tile"], how["dense_ends"]) == ([1, 1, 1], [2, 2, 2], 1)


def test_a_sparse_student_beside_dense_teacher_and_critic(data, teacher, tmp_path, monkeypatch):
    cfg = config(data, teacher, tmp_path / "run", steps=2, window=(1, 1, 1), tile=(2, 2, 2), remat=True, val_every=0, samples=0)
    seen = spied(monkeypatch, cfg)
    for name, *what in seen:
        if name == "rollout":
            assert what[0].keywords["metadata"].sparsity > 0.7
        if name in ("dmd_loss", "flow_loss"):
            assert all(net.keywords["metadata"] is None for net in what[:2] if callable(net))
    run(sample.main, sample.Config(ckpt=str(tmp_path / "run"), prompts=("a red circle moving left",), out=str(tmp_path / "s")))
    assert (tmp_path / "s/sheet.png").exists()


def test_a_rollout_from_data_starts_at_its_exit(data, teacher, tmp_path, monkeypatch):
    seen = spied(monkeypatch, config(data, teacher, tmp_path / "run", steps=8, val_every=0, samples=0, start="data"))
    times = [event[5] for event in seen if event[0] == "rollout"]
    assert {len(t) for t in times} == {1} and {t[0] for t in times} == {1.0, 0.9375, 5 / 6, 0.625}


def test_prompts_alone_are_enough(data, teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moving left\na blue square moving up\na white triangle moving down\n")
    run(prepare.main, prepare.Config(prompts=str(tmp_path / "prompts.txt"), shape=(24, 5, 8, 8), text_length=8, out=str(tmp_path / "p")))
    run(distill.main, config(str(tmp_path / "p"), teacher, tmp_path / "run", steps=2, batch=2))
    assert "critic_loss" in log_of(tmp_path / "run")[-1]


# ---- LoRA: student and critic are adapters of the one teacher -------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(data, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters") / "run"
    run(distill.main, config(data, teacher, out, lora_rank=4, student_lr=1e-3, val_every=8, samples=1))
    return out


def test_three_roles_are_one_set_of_weights_and_begin_as_one(data, teacher, adapters, tmp_path, monkeypatch):
    seen = spied(monkeypatch, config(data, teacher, tmp_path / "run", steps=2, student_every=1, val_every=0, samples=0, lora_rank=4,
                                     guidance_interval=(0.0, 1.0)))
    calls = [event for event in seen if event[0] in ("rollout", "dmd_loss", "flow_loss")]
    nets = {}
    for name, *what in calls:
        for role, net in zip(dict(rollout=["student"], dmd_loss=["teacher", "critic"], flow_loss=["critic"])[name], what):
            nets.setdefault(role, set()).add((net.func, net.keywords.get("lora")))
    (base, _), = nets["teacher"]
    assert nets == {"student": {(base, "student")}, "critic": {(base, "critic")}, "teacher": {(base, None)}}
    first = log_of(tmp_path / "run")[0]
    assert all(first[name] == 0 for name in first if name.startswith("student_matching_by"))
    assert all(first[name] > 0 for name in first if name.startswith("student_guidance_by"))

    held = state(adapters)
    assert ckpt.read_manifest(ckpt.latest(adapters))["meta"]["config"]["lora_alpha"] == 4.0
    assert {name.split(".")[0] for name in held} == {"net", "opt", "critic", "critic_opt", "ema", "null"}
    for role, adapter in (("net", "student"), ("ema", "student"), ("opt", "student"), ("critic", "critic"), ("critic_opt", "critic")):
        names = [name for name in held if name.startswith(f"{role}.")]
        assert len(names) in (80, 240) and all(f".lora.{adapter}." in name for name in names)
    for name in ("net.blocks.0.ffn.0.lora.student.B", "critic.blocks.0.ffn.0.lora.critic.B", "ema.blocks.0.ffn.0.lora.student.B"):
        assert held[name].abs().max() > 0
    assert not torch.equal(held["net.blocks.0.ffn.0.lora.student.A"], held["critic.blocks.0.ffn.0.lora.critic.A"])


def test_adapters_stopped_and_resumed_are_the_uninterrupted_ones_to_the_bit(data, teacher, adapters, tmp_path):
    for steps in (3, 8):
        run(distill.main, config(data, teacher, tmp_path / "run", steps=steps, lora_rank=4, student_lr=1e-3, samples=0))
    assert same(state(tmp_path / "run"), state(adapters))


def test_two_ranks_distil_adapters_as_one_does(data, teacher, adapters, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", steps=4, micro_batch=1, shard=-1, lora_rank=4, student_lr=1e-3, samples=0)
    two = shell(2, "distill.py", *as_flags(cfg))
    printed, _ = two.communicate(timeout=300)
    assert two.returncode == 0, printed
    logs = ([line for line in log_of(out) if "critic_loss" in line] for out in (tmp_path / "run", adapters))
    for mine, theirs in zip(*logs):
        for name in ("student_loss", "critic_loss", "student_grad_norm", "critic_grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4), name


def test_a_student_that_is_an_adapter_is_sampled_merged_and_exported_alone(teacher, adapters, tmp_path):
    run(sample.main, sample.Config(ckpt=str(adapters), prompts=("a red circle moving left",), out=str(tmp_path / "s")))
    export.main(export.Config(ckpt=str(adapters), lora=True, out=str(tmp_path / "lora")))
    export.main(export.Config(ckpt=str(adapters), merge=True, format="wan", out=str(tmp_path / "merged")))
    assert (tmp_path / "s/sheet.png").exists() and len(ckpt.files(tmp_path / "lora").shapes) == 80
    merged, base = ckpt.weights(tmp_path / "merged"), ckpt.weights(teacher)
    changed = {name for name in base.shapes if not torch.equal(base.tensor(name), merged.tensor(name))}
    assert changed == {f"blocks.{i}.{m}.weight" for i in range(4) for m in (
        "ffn.0", "ffn.2", *(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"))}


REFUSED = [
    (dict(teacher="nowhere"), "nowhere"),
    (dict(model="wan-1.3b"), "--model=wan-1.3b, but"),
    (dict(times=(1.0, 0.5, 0.7), shift=None), "descend"),
    (dict(times=(0.9, 0.5), shift=None), "start at 1"),
    (dict(batch=3, micro_batch=2), "batch"),
    (dict(student_every=0), "student_every"),
    (dict(dense_ends=1), "--window, which is not given"),
    (dict(guidance_interval=(0.9, 0.5)), "--guidance_interval 0.9 0.5"),
    (dict(lora_rank=-1), "is not 0 or more"),
    (dict(student_steps=0), "--student_steps=0 is not 1 or more"),
    (dict(shift=0.0), "--shift=0.0 is not above 0"),
    (dict(score_shift=-1.0), "--score_shift=-1.0 is not above 0"),
    (dict(student_lr=-1.0), "--student_lr=-1.0"),
    (dict(guidance=math.nan), "--guidance=nan"),
    (dict(ema=1.0), "never change"),
    (dict(steps=5, student_every=6), "never change"),
    (dict(micro_batch=-2), "--micro_batch=-2 is below 1"),
    (dict(times=(1.0, 0.5)), "--shift=5.0 does not apply"),
    (dict(window=(0, 1, 1)), "window is .0, 1, 1."),
    (dict(sp=3), "--sp=3"),
    (dict(wandb="online"), "WANDB_API_KEY"),
    (dict(lora_alpha=4.0), "needs --lora_rank"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=[" ".join(f) for f, _ in REFUSED])
def test_bad_flags_are_refused_in_a_line_before_anything_is_written(data, teacher, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr("wandb.login", lambda **how: False)
    with pytest.raises(SystemExit) as refused:
        run(distill.main, replace(config(data, teacher, tmp_path / "run"), **flags))
    assert refused.value.code == 2 and re.search(said, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_another_teacher_on_resume_and_a_student_as_teacher_are_refused(data, teacher, whole, tmp_path, capsys):
    run(train.main, train.Config(data=data, out=str(tmp_path / "other"), steps=2, batch=4, val_every=0, samples=0))
    with pytest.raises(SystemExit):
        run(distill.main, config(data, str(tmp_path / "other"), whole))
    assert "other (is not what" in capsys.readouterr().err
    subprocess.run(["cp", "-r", teacher, tmp_path / "moved"], check=True)
    for other in (config(data, str(tmp_path / "moved"), whole), config(data, str(tmp_path / "other"), whole, allow=("teacher",))):
        run(distill.main, other)
        assert "is finished" in capsys.readouterr().out
    run(prepare.main, prepare.Config(clips=61, out=str(tmp_path / "data")))
    with pytest.raises(SystemExit):
        run(distill.main, config(str(tmp_path / "data"), teacher, whole))
    assert "data (is not what" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(distill.main, config(data, str(whole), tmp_path / "run"))
    assert "itself a few-step student" in capsys.readouterr().err


# ---- a student that is known: two nets that learn, an exact teacher, a mixture of Gaussians in two dimensions


MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
SPREAD = 0.3


def mixture(x, t, text):
    """The velocity that flow matching learns from the mixture of equal Gaussians at MEANS of std SPREAD (distill.md's closed form)."""
    point, t = x.flatten(1), t.view(-1, 1, 1)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2                                  # (B, 1, 1)
    off = point[:, None] - (1 - t) * MEANS                                      # (B, modes, 2)
    share = (-(off**2).sum(2, keepdim=True) / (2 * variance)).softmax(1)
    v = share * (-MEANS + (t - (1 - t) * SPREAD**2) / variance * off)
    return v.sum(1).view(x.shape)


class Learner(torch.nn.Module):
    """The exact teacher plus a correction that starts at zero: student and critic, as in a real run, begin as the teacher."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t, text):
        features = torch.cat([x.flatten(1), t[:, None], torch.cos(3 * t)[:, None], torch.sin(3 * t)[:, None]], 1)
        return mixture(x, t, text) + self.layers(features).view(x.shape)


def test_a_one_step_student_of_a_mixture_finds_its_modes():
    """One step from noise: undistilled it lands on the mixture's mean, where no sample is; distilled it lands on the modes."""
    rng = torch.Generator().manual_seed(0)
    randn = lambda n: torch.randn(n, 2, 1, 1, 1, generator=rng)  # noqa: E731
    nets = {}
    for role, seed in (("student", 1), ("critic", 2)):
        net = Learner(seed)
        rows = {n: (p.detach(), 0, tuple(p.shape)) for n, p in net.named_parameters()}
        nets[role] = net, rows, adamw(rows, (0.0, 0.999), 0.0)[0]

    def update(role, loss, lr):
        net, rows, opt = nets[role]

        def norm():
            for n, p in net.named_parameters():
                rows[n][0].grad, p.grad = p.grad, None
            return torch.nn.utils.get_total_norm([r[0].grad for r in rows.values()])
        train_step(opt, [loss], lr=lr, clip=10.0, sync=lambda last: None, norm=norm)

    student, critic = nets["student"][0], nets["critic"][0]
    times = [1.0]
    far = lambda x: torch.cdist(x.flatten(1), MEANS).min(1).values  # noqa: E731
    assert far(rollout(student, randn(500), None, times, [], 0)).median() > 1.0
    ema = [r[0].clone() for r in nets["student"][1].values()]
    for step in range(1800):
        t = sample_t(torch.rand(256, generator=rng), "uniform", 1.0, (0.02, 0.98))
        if (step + 1) % 5 == 0:
            update("student", lambda: dmd_loss(rollout(student, randn(256), None, times, [], 0), mixture, critic, None, None, t, randn(256), 1.0), 3e-3)
            ema_update(ema, [r[0] for r in nets["student"][1].values()], 0.95, step)
        with torch.no_grad():
            x0 = rollout(student, randn(256), None, times, [], 0)
        update("critic", lambda: flow_loss(critic, x0, None, t, randn(256)), 3e-3)
    with torch.no_grad():
        for p, a in zip(student.parameters(), ema):
            p.copy_(a)
        x = rollout(student, randn(1500), None, times, [], 0)
        true = euler(mixture, randn(1500), None, grid(50, 1.0))
    counts = lambda x: torch.cdist(x.flatten(1), MEANS).argmin(1).bincount(minlength=3) / len(x)  # noqa: E731
    assert (counts(x) - 1 / 3).abs().max() < 0.1, counts(x)                     # all three modes; their sampling error is 0.012
    assert far(true).median() == pytest.approx(SPREAD * 1.18, rel=0.1)          # the sampler's floor: Rayleigh's median
    assert far(x).median() < 0.8, far(x).median()                               # of 2 from the mean to any mode


def gaussian(mean, std):
    """The velocity of N(mean, std²): what flow matching learns from it."""
    def net(x, t, text):
        t, m = t.view(-1, 1, 1, 1, 1), mean if text is None else text
        return -m + (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * m)
    return net


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_student_beside_an_exact_critic_becomes_the_guided_gaussian(scale):
    """Conditional N(1, .5²), unconditional N(.2, .5²): equal spreads, where u + s (c - u) is exactly N(.2 + .8 s, .5²)."""
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(x, requires_grad=True, dtype=torch.float64) for x in (-0.5, 1.2))
    opt = torch.optim.Adam([mean, std], lr=0.05, betas=(0.0, 0.99))
    text, null = torch.tensor(1.0).double(), torch.tensor(0.2).double()
    for step in range(1500):
        z, e = (torch.randn(256, 1, 1, 1, 1, generator=rng, dtype=torch.float64) for _ in range(2))
        t = sample_t(torch.rand(256, generator=rng), "uniform", 2.0, (0.02, 0.98)).double()
        critic = lambda x, t, _: gaussian(mean.detach(), std.detach())(x, t, None)  # noqa: E731
        loss, _ = dmd_loss(mean + std * z, gaussian(None, 0.5), critic, text, null, t, e, scale)
        for group in opt.param_groups:
            group["lr"] = 0.05 * (1 - step / 1500)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert mean.item() == pytest.approx(0.2 + scale * 0.8, abs=0.03) and std.item() == pytest.approx(0.5, abs=0.03)
