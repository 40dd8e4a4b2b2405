"""distill.py: who is updated when and on what, exact resume, and students that are known: a mixture's, a Gaussian's."""
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import tyro

import ckpt
import codec
import distill
import export
import parallel
import prepare
import sample
import step
import train
from data import Latents, noise, stream
from helpers import (Killed, as_version_1, cheaply, close, copied, full_disk, log_of, meta, nan_at, out_of_memory,
                     ranks, refused, rewrite, run, run_killed, run_stopped, same, shapes_dataset, spied, state)
from model import MODELS, Bound, Chunked, Cond, DiT, chunked
from step import (Learner, adamw, add_noise, averaged, copies, dmd_loss, first_given, flow_loss, grid, mean_of, ode,
                  on_free, over, place, rollout, sample_t, train_step, trajectory)

QUIET = dict(val_every=0, samples=0)    # no videos, no figures of them
LOSSES = "student_loss", "critic_loss", "student_grad_norm", "critic_grad_norm"


@pytest.fixture(scope="module", autouse=True)
def cheap():
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run whose checkpoint says that it is sampled in 3 steps instead of 50."""
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.TINY, "sample_steps", 3)
        run(train.main, train.Config(data=(data,), out=out, steps=6, batch=4, warmup=2, **QUIET))
    return out


def config(data, teacher, out, **flags):
    base = dict(pairs=0, steps=8, student_every=2, batch=4, schedule="constant", shift=5.0, val_every=4, save_every=3,
                samples=2)
    return distill.Config(data=data, teacher=teacher, out=str(out), **base | flags)


@pytest.fixture(scope="module")
def distilled(data, teacher, tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(distill.main, config(data, teacher, out))
    return out


def test_a_run_logs_both_nets_apart_and_leaves_videos_of_all_three(distilled):
    lines = log_of(distilled)
    last = lines[-1]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert {*LOSSES, "student_x0_std", "val_diversity", "val_motion", "val_std"} <= last.keys()
    assert any(name.startswith("student_matching_by_t") for name in last)
    assert any(name.startswith("critic_loss_by_t") for name in last)
    assert last["student_updates"] == 4
    for kind in ("samples", "inside"):
        assert sorted(p.name for p in (distilled / kind).glob("*.mp4")) == [f"step_{n:07d}.mp4" for n in (0, 4, 8)]
    assert "inside/step_0000008.mp4" in (distilled / "index.html").read_text()


def test_a_students_figures_are_ratios_to_the_teacher_as_its_own_run_samples_it(data, teacher, distilled, tmp_path):
    run(distill.main, config(data, teacher, tmp_path / "run", steps=2, guidance=9.0))
    first = log_of(tmp_path / "run")[0]
    assert first["val_std"] and first == log_of(distilled)[0]


@pytest.mark.parametrize("guidance, scale", [(3.0, 3.0), ((4.0, 3.0), 3.0), ([4.0, 3.0], 3.0)], ids=str)
def test_the_teachers_clips_have_the_guidance_of_its_own_run(guidance, scale, monkeypatch):
    """Of two experts' guidance the expert's own."""
    sampling = {"steps": 4, "shift": 1.0, "guidance": guidance, "boundary": 0.9}
    origin = distill.Origin(**dict.fromkeys(distill.Origin._fields))._replace(teacher_sampling=sampling)
    cfg = replace(distill.Config(guidance=9.0, model="wan2.2-a14b", expert="low"), times=(0.7, 0.4))
    z, text = torch.zeros(2, 1, 3, 2, 2), torch.zeros(2, 1, 4)
    micro = distill.Draw(text, text[0], z, None, z, None, [z], {})
    monkeypatch.setattr(step, "ode", lambda net, z, cond, times, uncond, scales, *rest: scales)
    scales = distill.many_steps(lambda places: micro, lambda shape: (None, None, None), origin, cfg, [0, 1])
    assert scales == [scale] * 3


def test_weights_that_are_no_run_of_ours_are_sampled_with_the_guidance_of_their_row(data, tmp_path):
    latents, cfg, *_ = to_learn_from(data, tmp_path, guidance=9.0)
    teacher, _ = distill.samplings(cfg, latents, ckpt.Source(**dict.fromkeys(ckpt.Source._fields)))
    assert teacher["guidance"] == distill.row_of(cfg)["guidance"]


def test_a_checkpoint_holds_student_and_critic_and_says_how_to_sample(distilled):
    roles = {name.split(".")[0] for name in state(distilled)}
    assert roles == {"net", "opt", "critic", "critic_opt", "ema", "null"}     # never the teacher
    how = meta(distilled)["sampling"]
    assert how["sampler"] == "rollout"
    assert how["times"] == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert (how["guidance"], how["shift"]) == (1, 5)
    assert meta(distilled)["counts"] == {"student": {"updates": 4, "skipped": 0, "in_a_row": 0},
                                     "critic": {"updates": 8, "skipped": 0, "in_a_row": 0}}


# ---- nothing is lost ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(data, teacher, distilled, tmp_path, capsys):
    """Stopped in a student's update and a critic's; where a validation is due; at the last step."""
    cfg = config(data, teacher, tmp_path / "run")
    for step, updates in ((2, 2), (3, 1), (4, 1), (8, 5)):      # calls of train_step: critic; student, critic; …
        run_stopped(distill, cfg, updates)
        assert f"step {step} of 8 is saved" in capsys.readouterr().out
        assert step % 2 or "val_std" not in log_of(cfg.out)[-1]
    run(distill.main, cfg)
    assert log_of(cfg.out) == log_of(distilled)
    assert same(state(cfg.out), state(distilled))
    run(distill.main, cfg)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_between_save_and_validation_validates_when_it_resumes(data, teacher, distilled, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", save_every=4)
    for step, function in ((4, "show"), (8, "validate")):
        run_killed(distill, cfg, step, function)
        assert ckpt.latest(cfg.out).name == f"step_{step:07d}"
        assert "val_std" not in log_of(cfg.out)[-1]
    run(distill.main, cfg)
    assert log_of(cfg.out) == log_of(distilled)
    assert same(state(cfg.out), state(distilled))
    for kind in ("samples", "inside"):
        assert sorted(p.name for p in (tmp_path / "run" / kind).glob("*.mp4")) == [
            f"step_{n:07d}.mp4" for n in (0, 4, 8)]


@pytest.mark.slow
def test_videos_that_fail_leave_their_latents_and_the_run_goes_on(data, teacher, tmp_path, monkeypatch, capsys):
    load = codec.load
    monkeypatch.setattr(codec, "load", lambda *args, **more: load(*args, **more)._replace(decode=out_of_memory))
    run(distill.main, config(data, teacher, tmp_path / "run", steps=2, samples=1))
    printed = capsys.readouterr().out
    for kind, clips in (("samples", 2), ("inside", 3)):
        file = tmp_path / "run" / kind / "step_0000002.npy"
        assert f"{file} holds latents instead of a video: RuntimeError: out of memory" in printed
        assert np.load(file).shape == (clips, 24, 5, 8, 8)
    assert ckpt.latest(tmp_path / "run").name == "step_0000002"
    assert "val_std" in log_of(tmp_path / "run")[-1]


def test_a_folder_is_claimed_before_anything_is_built(data, teacher, tmp_path, monkeypatch, capsys):
    built = spied(monkeypatch, distill, "blank", lambda net, *args: args)
    monkeypatch.setattr(ckpt, "claim", full_disk)
    assert refused(distill.main, config(data, teacher, tmp_path / "run"), capsys) == "distill.py: the disk is full\n"
    assert built == []
    assert not (tmp_path / "run").exists()


def test_the_ranks_share_the_work_of_verifying_the_teacher(data, teacher, tmp_path, monkeypatch):
    asked = spied(monkeypatch, ckpt, "weights", lambda out, path, expert, **ranks: set(ranks))
    run(distill.begin, config(data, teacher, tmp_path / "run"))
    assert asked == [{"rank", "world", "agree"}]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_no_file_of_the_teacher_is_open_while_the_student_learns(data, teacher, tmp_path, monkeypatch, lora_rank):
    files = str(Path(teacher).resolve())
    began, fill = [], ckpt.fill

    def filling(rows, source, **ranks):
        fill(rows, source, **ranks)
        began.append(files in Path("/proc/self/maps").read_text())

    monkeypatch.setattr(ckpt, "fill", filling)
    held = spied(monkeypatch, distill, "train_step", lambda *a, **m: files in Path("/proc/self/maps").read_text())
    run(distill.main, config(data, teacher, tmp_path / "run", steps=1, student_every=1, lora_rank=lora_rank, **QUIET))
    assert began[0]             # a mapped file is seen there
    assert held == [False, False]


def test_an_update_that_is_not_finite_is_skipped_and_counted_and_names_the_prompts_of_all_ranks(
        data, teacher, tmp_path, monkeypatch, capsys):
    """Rank 1 of 2, which itself has half of each batch."""
    def half(*args, **more):
        return Latents(*args, **more | dict(rank=1, world=2))

    monkeypatch.setattr(distill, "Latents", half)
    nan_at(monkeypatch, distill, "dmd_loss", 1)
    nan_at(monkeypatch, distill, "flow_loss", 2, 3)
    cfg = config(data, teacher, tmp_path / "run", steps=4, **QUIET)
    run(distill.main, cfg)
    printed, latents = capsys.readouterr().out, Latents(data, seed=0, batch=4)
    for role, step in (("student", 1), ("critic", 1), ("critic", 2)):
        _, ids = distill.prompts(latents, distill.resolve(cfg), role, step)
        assert len(ids) == 4
        assert f"step {step}: the {role}'s gradient norm is nan, update skipped; samples {ids}\n" in printed
    assert printed.count("skipped; samples") == 3
    assert meta(cfg.out)["counts"] == {"student": {"updates": 1, "skipped": 1, "in_a_row": 0},
                                       "critic": {"updates": 2, "skipped": 2, "in_a_row": 0}}
    assert log_of(cfg.out)[-1]["skipped"] == 3


def test_a_student_that_cannot_be_updated_ends_the_run_whatever_the_critic_does(data, teacher, tmp_path, monkeypatch):
    nan_at(monkeypatch, distill, "dmd_loss", 1, 2, 3)
    monkeypatch.setattr("step.SKIPS", 3)
    with pytest.raises(RuntimeError, match="3 updates in a row held NaN") as error:
        run(distill.main, config(data, teacher, tmp_path / "run", **QUIET))
    assert "steps after it are not saved" in error.value.__notes__[0]


# ---- pairs of the teacher -------------------------------------------------------------------------------------------

PAIRS = dict(student_steps=2, pairs=11, pairs_steps=3, anchor=0.5, steps=4, val_every=3, save_every=2, samples=1)


def told_by_text(shape):
    """In place of three nets, a teacher that takes noise z straight to m z, m being 2 + the mean of the text."""
    def teacher(x, t, cond):
        t = over(t)
        m = 2 + cond.text.mean((1, 2)).view(-1, 1, 1, 1, 1)
        return (1 - m) * x / (t + (1 - t) * m)

    return None, None, teacher


def to_learn_from(data, out, **flags):
    """What distill.pairs_of wants, with `told_by_text` as teacher -> (Latents, config, origin, world)."""
    cfg = distill.resolve(distill.Config(data=data, teacher="nowhere", model="tiny", out=str(out),
                                         **dict(student_steps=3, pairs=40, anchor=1.0, batch=8, shift=3.0) | flags))
    origin = distill.Origin(**dict.fromkeys(distill.Origin._fields))._replace(step=0, base={"crc32": 5})
    world = parallel.imagine(1)._replace(device=torch.device("cpu"))
    return Latents(data, seed=cfg.seed, batch=cfg.batch), cfg, origin, world


@pytest.mark.parametrize("first_frame", [0.0, 0.5])
def test_each_pair_is_of_its_own_noise_caption_time_and_first_frame(data, tmp_path, first_frame):
    """x0 is what the way from its number's noise leads to under its text, x_t a point on it; K times take turns."""
    latents, cfg, origin, world = to_learn_from(data, tmp_path, first_frame=first_frame)
    pairs = distill.pairs_of(told_by_text, latents, origin, cfg, world)
    noises = noise(cfg.seed, "pair", 0, range(cfg.pairs), latents.shapes[0])
    seen, met = [], []
    for step in range(10):
        (pair,) = pairs(step)
        assert sorted(pair.t.unique().tolist()) == pytest.approx(sorted(cfg.times))
        assert (pair.free is None) == (first_frame == 0)
        frees = [None] * 8 if pair.free is None else pair.free
        for x0, e, t, text, free in zip(*pair[:4], frees, strict=True):
            t = t.view(1)
            m = 2 + text.mean()
            number = (noises - x0 / m)[:, :, 1:].abs().flatten(1).mean(1).argmin().item()
            _, prompt = distill.pair_prompt(latents, cfg, number)
            assert torch.equal(text, latents.text([prompt])[0])
            begins = 0      # the first frame that the teacher makes
            if first_frame:
                begins = int(stream(cfg.seed, "pair_give", 0, number).random(dtype=np.float32) < first_frame)
                assert free.tolist() == [1 - begins, 1, 1, 1, 1]
                clip, _ = latents.sample([prompt])
                assert torch.allclose(x0[:, :begins], clip[0, :, :begins])
            made = noises[number][:, begins:]
            assert torch.allclose(x0[:, begins:] / m, made, atol=2e-3)
            x_t = add_noise(x0[None], e[None], t)
            assert torch.allclose(x_t[0, :, begins:], (t + (1 - t) * m) * made, atol=2e-3)
            seen.append(number)
            met.append(begins)
    assert sorted(seen) == sorted(list(range(cfg.pairs)) * 2)       # 10 batches of 8 are two passes over 40 pairs
    assert set(met) == ({0, 1} if first_frame else {0})


def test_the_teachers_way_has_the_students_times_among_eight_or_more_steps():
    def times(**flags):
        cfg = distill.Config(teacher="nowhere", model="tiny", **flags)
        return distill.resolve(cfg).times, distill.ode_times(distill.resolve(cfg))

    for K, n in ((1, 8), (2, 8), (3, 9), (8, 8), (10, 10)):
        own, way = times(student_steps=K, shift=3.0)
        assert way == pytest.approx(grid(n, 3.0))
        assert set(own) <= set(way)
    own, way = times(times=(1.0, 0.7, 0.33))
    assert set(own) <= set(way)
    assert way == sorted(way, reverse=True)
    assert min(a - b for a, b in zip(way, way[1:])) > 0.01


def test_pairs_that_were_killed_go_on_and_are_those_of_one_run(data, tmp_path, monkeypatch, capsys):
    latents, cfg, origin, world = to_learn_from(data, tmp_path / "whole", micro_batch=4)
    whole = distill.pairs_of(told_by_text, latents, origin, cfg, world)
    cut, add = replace(cfg, out=str(tmp_path / "cut")), distill.Writer.add

    def killed(writer, *args, **more):
        if more["source"] == 21:
            raise Killed
        add(writer, *args, **more)
        writer.save()

    monkeypatch.setattr(distill.Writer, "add", killed)
    with pytest.raises(Killed):
        distill.pairs_of(told_by_text, latents, origin, cut, world)
    monkeypatch.setattr(distill.Writer, "add", add)
    again = distill.pairs_of(told_by_text, latents, origin, cut, world)
    assert "19 of 40 pairs of the teacher to be made" in capsys.readouterr().out
    for step in range(5):
        for mine, theirs in zip(again(step), whole(step), strict=True):
            assert all(map(torch.equal, mine[:4], theirs[:4]))
    distill.pairs_of(told_by_text, latents, origin, cut, world)
    assert "to be made" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["manifest.json", "crc.npy", "captions.jsonl"])
def test_pairs_whose_small_files_are_damaged_are_mended_by_the_same_command(data, tmp_path, capsys, name):
    latents, cfg, origin, world = to_learn_from(data, tmp_path, pairs=8)
    before = distill.pairs_of(told_by_text, latents, origin, cfg, world)(0)
    file = tmp_path / "pairs" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-20] + b"?" + whole[-19:])
    (after,) = distill.pairs_of(told_by_text, latents, origin, cfg, world)(0)
    assert "0 of 8 pairs of the teacher to be made" in capsys.readouterr().out
    assert file.read_bytes() == whole
    assert all(map(torch.equal, before[0][:4], after[:4]))


def test_pairs_whose_clips_are_damaged_are_to_be_deleted_and_made_again(data, tmp_path, capsys):
    latents, cfg, origin, world = to_learn_from(data, tmp_path, pairs=8)
    before = distill.pairs_of(told_by_text, latents, origin, cfg, world)(0)
    (file,) = (tmp_path / "pairs").glob("[0-9]*.bin")
    whole = file.read_bytes()
    file.unlink()       # others have it mapped
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=f"or delete {tmp_path}/pairs and run the command that made it$"):
        distill.pairs_of(told_by_text, latents, origin, cfg, world)(0)
    file.unlink()
    file.write_bytes(whole[:-1])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        distill.pairs_of(told_by_text, latents, origin, cfg, world)
    assert f"delete {tmp_path}/pairs and run the same command again\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "pairs")
    (after,) = distill.pairs_of(told_by_text, latents, origin, cfg, world)(0)
    assert all(map(torch.equal, before[0][:4], after[:4]))


def test_pairs_of_another_teacher_are_refused_in_a_line(data, tmp_path, capsys):
    latents, cfg, origin, world = to_learn_from(data, tmp_path)
    distill.pairs_of(told_by_text, latents, origin, cfg, world)
    with pytest.raises(SystemExit) as exit:
        distill.pairs_of(told_by_text, latents, origin._replace(base={"crc32": 6}), cfg, world)
    assert exit.value.code == 2
    assert "teacher was 5 and is now 6" in capsys.readouterr().err


def test_pairs_with_another_share_of_first_frames_are_refused_in_a_line(data, tmp_path, capsys):
    latents, cfg, origin, world = to_learn_from(data, tmp_path, pairs=8, first_frame=0.5)
    distill.pairs_of(told_by_text, latents, origin, cfg, world)
    with pytest.raises(SystemExit):
        distill.pairs_of(told_by_text, latents, origin, replace(cfg, first_frame=0.0), world)
    assert "first_frame was 0.5 and is now None" in capsys.readouterr().err


def test_of_pairs_of_clips_and_stills_the_clips_alone_begin_with_frames(tmp_path):
    run(prepare.main, prepare.Config(clips=40, frames=(1, 17), out=str(tmp_path / "data")))
    latents, cfg, origin, world = to_learn_from(str(tmp_path / "data"), tmp_path, first_frame=0.5)
    pairs, frames = distill.pairs_of(told_by_text, latents, origin, cfg, world), set()
    for step in range(8):
        (pair,) = pairs(step)
        frames.add(pair.x0.shape[2])
        assert (pair.free is None) == (pair.x0.shape[2] == 1)
        assert pair.e.isfinite().all()
    assert frames == {1, 5}


@pytest.fixture(scope="module")
def paired(data, teacher, tmp_path_factory):
    """A run with both stages that nobody interrupts."""
    out = tmp_path_factory.mktemp("paired") / "run"
    run(distill.main, config(data, teacher, out, **PAIRS))
    return out


def test_a_run_with_pairs_logs_both_stages_and_validates_in_both(paired):
    lines = {line["step"]: line for line in log_of(paired)}
    assert list(lines) == [0, 3, 5, 6, 7]
    assert {"pairs_loss", "pairs_loss_by_t0", "pairs_loss_by_t1", "val_std"} <= lines[3].keys()
    assert not any(name.startswith("critic") for name in lines[3])
    assert {"student_pairs_loss", "student_pairs_loss_by_t1", "critic_loss"} <= lines[5].keys()
    assert 0 < lines[7]["student_anchor_share"] < 1
    assert "val_std" in lines[6]
    assert (lines[3]["student_updates"], lines[7]["student_updates"]) == (3, 2)


@pytest.mark.slow
def test_after_the_pairs_all_but_the_average_begins_anew(data, teacher, paired, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(paired / "pairs", out / "pairs")
    cfg = config(data, teacher, out, **PAIRS | QUIET)
    run_stopped(distill, cfg, 2)
    assert meta(out)["stage"] == "pairs"
    run_stopped(distill, cfg, 1)
    held, first = state(out), ckpt.weights(teacher)
    assert meta(out)["stage"] == "matching"
    assert meta(out)["counts"]["student"]["updates"] == 0
    for name, value in held.items():
        role, rest = name.split(".", 1) if "." in name else (name, "")
        if role in ("opt", "critic_opt"):
            assert not value.any()
        if role == "net":
            assert torch.equal(value, held[f"ema.{rest}"])
            assert torch.equal(held[f"critic.{rest}"], first.tensor(rest))
    assert not all(torch.equal(held[f"net.{name}"], held[f"critic.{name}"]) for name in first.shapes)


@pytest.mark.slow
def test_a_run_with_pairs_stopped_in_either_stage_is_the_uninterrupted_one_to_the_bit(
        data, teacher, paired, tmp_path, capsys):
    cfg = config(data, teacher, tmp_path / "run", **PAIRS)
    shutil.copytree(paired / "pairs", tmp_path / "run" / "pairs")
    for step, updates in ((1, 1), (3, 2), (4, 1), (5, 1)):
        run_stopped(distill, cfg, updates)
        assert f"step {step} of 7 is saved" in capsys.readouterr().out
    run(distill.main, cfg)
    assert log_of(cfg.out) == log_of(paired)
    assert same(state(cfg.out), state(paired))


@pytest.mark.slow
def test_a_student_of_one_step_learns_pairs_by_muon_stopped_or_on_two_ranks(data, teacher, tmp_path):
    flags = PAIRS | QUIET | dict(student_steps=1)
    whole = config(data, teacher, tmp_path / "whole", **flags)
    run(distill.main, whole)
    stopped, two = replace(whole, out=str(tmp_path / "stopped")), replace(whole, out=str(tmp_path / "two"), shard=2)
    for cfg in (stopped, two):
        shutil.copytree(tmp_path / "whole/pairs", Path(cfg.out) / "pairs")
    run_stopped(distill, stopped, 2)
    assert any(name.startswith("opt.blocks.") and name.endswith("weight.momentum") for name in state(stopped.out))
    run_stopped(distill, stopped, 1)
    assert not any(name.endswith("momentum") for name in state(stopped.out))
    run(distill.main, stopped)
    assert same(state(stopped.out), state(whole.out))
    ranks(2, distill.main, two)
    close(log_of(two.out), log_of(whole.out), 1e-3, "pairs_loss", "student_pairs_loss", *LOSSES)


@pytest.mark.slow
def test_two_ranks_make_pairs_and_learn_from_them_as_one_does(data, teacher, paired, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", shard=2, **PAIRS)
    ranks(2, distill.main, cfg)
    close(log_of(cfg.out), log_of(paired), 1e-3, "pairs_loss", "student_pairs_loss", *LOSSES)


@pytest.mark.slow
def test_an_adapter_learns_from_pairs_of_prompts_alone_and_a_run_may_end_there(data, teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\na blue square moving up\n")
    texts = str(tmp_path / "texts")
    run(prepare.main, prepare.Config(prompts=str(prompts), shape=(24, 5, 8, 8), text_length=8, out=texts))
    cfg = config(texts, teacher, tmp_path / "run", lora_rank=4, **PAIRS | dict(steps=0, samples=0))
    run(distill.main, cfg)
    assert log_of(cfg.out)[-1]["step"] == 3
    assert {name.split(".")[0] for name in state(cfg.out)} == {"net", "opt", "critic", "critic_opt", "ema", "null"}


@pytest.mark.parametrize("K, row", [(1, "tiny K=1"), (2, "tiny K=2"), (3, "tiny K=4"), (4, "tiny K=4"),
                                    (9, "tiny K=4")])
def test_defaults_are_of_the_students_number_of_steps_or_of_the_next_larger(K, row):
    for flags in (dict(student_steps=K), dict(times=tuple(1 - i / K for i in range(K)))):
        cfg = distill.resolve(distill.Config(teacher="nowhere", model="tiny", **flags))
        assert distill.row_of(cfg) is distill.DEFAULTS[row]
        assert cfg.score_shift == distill.DEFAULTS[row]["score_shift"]
    if not cfg.pairs:
        assert (cfg.pairs_steps, cfg.anchor) == (0, 0)


@pytest.mark.parametrize("flags, row", [
    (dict(student="nowhere"), "tiny causal K=4"),
    (dict(student="nowhere", student_steps=1), "tiny causal K=2"),
    (dict(student="nowhere", pairs=0), "tiny"),
    (dict(), "tiny")])
def test_a_causal_students_defaults_have_pairs_where_it_starts_from_a_causal_net(flags, row):
    cfg = distill.resolve(distill.Config(teacher="nowhere", model="tiny", **CHUNKS, **flags))
    assert distill.row_of(cfg) is distill.DEFAULTS[row]


@pytest.mark.slow
def test_a_run_of_few_steps_from_before_pairs_goes_on_without_them(data, teacher, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", student_steps=2, pairs=0, steps=2, **QUIET)
    run(distill.main, cfg)

    def change(manifest):
        for name in ("pairs", "pairs_steps", "anchor"):
            manifest["meta"]["config"].pop(name)

    rewrite(ckpt.latest(cfg.out), change)
    run(distill.main, replace(cfg, pairs=None, steps=4))
    assert log_of(cfg.out)[-1]["step"] == 4


# ---- what a run goes on with ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flags_left_out_stay_as_they_were_when_the_defaults_change(data, teacher, distilled, tmp_path, monkeypatch):
    cfg = config(data, teacher, tmp_path / "run", samples=0)
    run(distill.main, replace(cfg, steps=4))
    new = distill.TINY | dict(student_lr=1.0, critic_lr=1.0, ema=0.1, guidance=7.0, score_shift=1.0)
    monkeypatch.setitem(distill.DEFAULTS, "tiny", new)
    run(distill.main, cfg)
    assert same(state(cfg.out), state(distilled))
    assert distill.resolve(replace(cfg, allow=("ema",))).ema == 0.1
    assert distill.resolve(replace(cfg, ema=0.7)).ema == 0.7


def test_values_that_were_worked_out_when_a_run_began_stay(data, teacher, distilled):
    cfg = distill.resolve(config(data, teacher, distilled, steps=None, shift=None))
    assert (cfg.steps, cfg.shift, cfg.precision) == (8, 5.0, "fp32")


@pytest.mark.slow
def test_a_run_from_before_a_flag_goes_on_and_one_with_a_flag_that_is_gone_is_refused(
        data, teacher, distilled, tmp_path, capsys):
    cfg = config(data, teacher, copied(distilled, tmp_path / "run"), steps=10, samples=0)

    def change(start):
        def changed(manifest):
            manifest["meta"]["config"].pop("deterministic", None)
            manifest["meta"]["config"]["start"] = start
        rewrite(ckpt.latest(cfg.out), changed)

    change("data")
    assert "--start=data (there is only noise now)" in refused(distill.main, cfg, capsys)
    change("noise")
    assert "--deterministic=True (was False)" in refused(distill.main, replace(cfg, deterministic=True), capsys)
    run(distill.main, cfg)
    assert log_of(cfg.out)[-1]["step"] == 10


@pytest.mark.slow
def test_a_run_of_the_first_layout_goes_on(data, teacher, distilled, tmp_path, capsys):
    """As 496ae65 wrote it: one file a rank, and one count of what both nets skipped."""
    cfg = config(data, teacher, copied(distilled, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/ckpt/step_0000008")

    def then(manifest):
        manifest["meta"]["counts"] = {"student": 3, "critic": 6, "skipped": 5, "in_a_row": {"student": 0, "critic": 0}}
        manifest["meta"]["config"].pop("deterministic")
        manifest["meta"]["config"]["start"] = "noise"

    rewrite(as_version_1(ckpt.latest(cfg.out)), then)
    run(distill.main, cfg)
    assert "on from step 6" in capsys.readouterr().out
    assert same(state(cfg.out), state(distilled))
    assert log_of(cfg.out)[-1] == log_of(distilled)[-1] | {"skipped": 5}
    assert meta(cfg.out)["counts"]["critic"]["updates"] == 8


def test_counts_of_the_first_layout_are_told_apart():
    saved = {"student": 3, "critic": 9, "skipped": 2, "in_a_row": {"student": 1, "critic": 2}}
    student, critic = distill.counts_of({"meta": {"counts": saved}})
    assert student == {"updates": 3, "skipped": 2, "in_a_row": 1}
    assert critic == {"updates": 9, "skipped": 0, "in_a_row": 2}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["first layout", "wan"])
def test_teachers_of_any_form_teach_the_same(data, teacher, distilled, tmp_path, form):
    other, more = tmp_path / "other", {}
    if form == "wan":
        export.main(export.Config(ckpt=teacher, format="wan", out=str(other)))
        more = dict(model="tiny")
    else:
        as_version_1(ckpt.latest(copied(teacher, other)))
    run(distill.main, config(data, str(other), tmp_path / "run", steps=2, **QUIET, **more))
    close(log_of(tmp_path / "run"), log_of(distilled), 1e-6, *LOSSES)


def test_a_teacher_is_known_by_its_content_and_no_student_is_one(data, teacher, distilled, tmp_path, capsys):
    other = tmp_path / "other"
    run(train.main, train.Config(data=(data,), out=str(other), steps=1, batch=4, warmup=2, **QUIET))
    moved = copied(teacher, tmp_path / "moved")
    assert "other (is not what" in refused(distill.main, config(data, str(other), distilled), capsys)
    for cfg in (config(data, str(moved), distilled), config(data, str(other), distilled, allow=("teacher",))):
        run(distill.main, cfg)
        assert "is finished" in capsys.readouterr().out
    clips = shapes_dataset(tmp_path / "data", clips=61)
    assert "data (is not what" in refused(distill.main, config(clips, teacher, distilled), capsys)
    student = config(data, str(distilled), tmp_path / "run")
    assert "itself a few-step student" in refused(distill.main, student, capsys)
    export.main(export.Config(ckpt=str(distilled), out=str(tmp_path / "exported")))
    student = replace(student, teacher=str(tmp_path / "exported"), model="tiny")
    assert "itself a few-step student" in refused(distill.main, student, capsys)


@pytest.mark.slow
def test_an_exported_teacher_attends_as_it_was_trained_and_so_does_its_student(data, tmp_path):
    run(train.main, train.Config(data=(data,), out=str(tmp_path / "t"), steps=1, batch=4, window=(1, 1, 1),
                                 tile=(1, 2, 2), **QUIET))
    export.main(export.Config(ckpt=str(tmp_path / "t"), out=str(tmp_path / "e")))
    for name in "te":
        cfg = config(data, str(tmp_path / name), tmp_path / f"of {name}", steps=1, student_every=1, **QUIET)
        run(distill.main, cfg)
    assert same(state(tmp_path / "of e"), state(tmp_path / "of t"))
    assert ckpt.sampling_of(tmp_path / "of e") == ckpt.sampling_of(tmp_path / "of t")


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_distil_as_one_does(data, teacher, distilled, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", micro_batch=1, shard=-1)
    ranks(2, distill.main, cfg)
    close(log_of(cfg.out), log_of(distilled), 2e-4, *LOSSES, "val_diversity")


# ---- who is updated when, and on what -------------------------------------------------------------------------------


class Rolled(NamedTuple):
    net: Bound
    times: tuple
    exit: int
    grad: bool          # whether gradients were enabled
    graph: bool         # whether x0 has a graph
    x0: torch.Tensor
    free: torch.Tensor | None


class Student(NamedTuple):
    teacher: Bound
    critic: Bound
    t: torch.Tensor
    scale: Any
    matching: torch.Tensor      # sums over fifths of t
    guidance: torch.Tensor
    grads: list                 # the gradients that teacher and critic have
    free: torch.Tensor | None


class Critic(NamedTuple):
    net: Bound
    x0: torch.Tensor
    t: torch.Tensor
    free: torch.Tensor | None


class Averaged(NamedTuple):
    updates: int


def told(monkeypatch, cfg):
    """A run whose rollouts, losses and averages tell what they were given -> these events, in order."""
    events = []

    def rolled(x0, net, z, cond, times, noises, exit, free):
        events.append(Rolled(net, times, exit, torch.is_grad_enabled(), x0.requires_grad, x0.detach().clone(), free))

    def student(out, x0, teacher, critic, cond, uncond, t, e, scale, rescale, free):
        grads = [p.grad for bound in (teacher, critic) for p in bound.net.parameters()]
        _, seen = out
        sums = seen["matching_by"][0], seen["guidance_by"][0]
        events.append(Student(teacher, critic, t, scale, *sums, grads, free))

    def critic(out, net, x0, cond, t, e, free):
        events.append(Critic(net, x0, t, free))

    def average(out, me, decay):
        events.append(Averaged(me.counts["updates"]))

    spied(monkeypatch, distill, "rollout", rolled)
    spied(monkeypatch, distill, "dmd_loss", student)
    spied(monkeypatch, distill, "flow_loss", critic)
    spied(monkeypatch, step, "ema_update", average)
    run(distill.main, cfg)
    return events


@pytest.fixture(scope="module")
def events(data, teacher, tmp_path_factory):
    """Of 24 steps, the student's every 3rd."""
    out = tmp_path_factory.mktemp("told") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return told(patch, config(data, teacher, out, steps=24, student_every=3, score_shift=3.0, **QUIET))


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def rollouts(events, kind):
    """The rollouts whose clips went into losses of a kind."""
    return [rolled for rolled, loss in zip(events, events[1:]) if isinstance(loss, kind)]


def test_the_student_is_updated_every_third_step_before_the_critic_which_always_is(events):
    losses = [type(event) for event in events if isinstance(event, (Student, Critic))]
    assert losses == ([Critic] * 2 + [Student, Critic]) * 8


def test_the_average_follows_each_update_of_the_student_and_no_other(events):
    assert [event.updates for event in of_kind(events, Averaged)] == list(range(1, 9))


def test_both_nets_train_at_each_exit_of_the_sampler_equally_often_by_their_own_counts(events):
    assert [rolled.exit for rolled in rollouts(events, Student)] == [0, 1, 2, 3] * 2
    assert [rolled.exit for rolled in rollouts(events, Critic)] == [0, 1, 2, 3] * 6


def test_the_student_learns_through_its_rollout_and_the_critic_from_finished_clips(events):
    assert {(rolled.grad, rolled.graph) for rolled in rollouts(events, Student)} == {(True, True)}
    assert {(rolled.grad, rolled.graph) for rolled in rollouts(events, Critic)} == {(False, False)}
    for rolled, loss in zip(rollouts(events, Critic), of_kind(events, Critic), strict=True):
        assert torch.equal(loss.x0, rolled.x0)


def test_the_three_nets_are_three_and_the_teacher_and_critic_get_no_gradient_from_the_student(events):
    students, (teacher, *_) = {rolled.net.net for rolled in of_kind(events, Rolled)}, of_kind(events, Student)
    assert students.isdisjoint({teacher.teacher.net, teacher.critic.net})
    assert {loss.net.net for loss in of_kind(events, Critic)} == {teacher.critic.net}
    assert teacher.teacher.net is not teacher.critic.net
    assert not any(p.requires_grad for p in teacher.teacher.net.parameters())
    assert all(grad is None for loss in of_kind(events, Student) for grad in loss.grads)


def test_the_teacher_is_guided_inside_its_interval_alone(events):
    inside = []
    for loss in of_kind(events, Student):
        inside.append((0.6 <= loss.t) & (loss.t <= 0.97))
        assert torch.equal(loss.scale, torch.where(inside[-1], 2.0, 1.0))
    assert set(torch.cat(inside).tolist()) == {True, False}


def test_the_scores_times_are_shifted_once_clamped_and_drawn_per_slot(data, events):
    cfg = replace(distill.Config(batch=4), times=(1.0,))
    losses = of_kind(events, Critic)
    for step in (0, 7):
        micro, = distill.draw(Latents(data, seed=0, batch=4), cfg, "critic", step)
        assert torch.allclose(losses[step].t, (3 * micro.u / (1 + 2 * micro.u)).clamp(0.02, 0.98))
    assert losses[0].t.dtype == torch.float32
    assert len(losses[0].t.unique()) == 4


def test_student_critic_and_teacher_begin_as_one_so_that_the_matching_part_is_zero(
        data, teacher, tmp_path, monkeypatch):
    events = told(monkeypatch, config(data, teacher, tmp_path / "run", steps=1, student_every=1, **QUIET))
    first, = of_kind(events, Student)
    assert first.matching.sum() == 0
    assert first.guidance.sum() > 0


def test_every_draw_belongs_to_a_role_a_step_and_a_slot(data):
    cfg = replace(distill.Config(seed=3, batch=8), times=(1.0, 0.9, 0.5), first_frame=0.5)

    def draws(role, step, **rank):
        return distill.draw(Latents(data, seed=3, batch=8, **rank), cfg, role, step)

    one, = draws("student", 4)
    four = [micro for rank in range(2) for micro in draws("student", 4, rank=rank, world=2, micro_batch=2)]
    for name in ("text", "z", "free", "e", "u"):
        assert torch.equal(torch.cat([getattr(micro, name) for micro in four]), getattr(one, name)), name
    for k in range(2):
        assert torch.equal(torch.cat([micro.noises[k] for micro in four]), one.noises[k])

    critic, later = draws("critic", 4)[0].z, draws("student", 9)[0].z
    fields = [*one.z, *one.e, *one.noises[0], *one.noises[1], *critic, *later]
    assert len({tuple(x.flatten()[-4:].tolist()) for x in fields}) == len(fields)        # no two alike
    bound = 5 / math.sqrt(one.z[0].numel())
    assert all(abs((a * b).mean()) < bound for i, a in enumerate(fields[:8]) for b in fields[8:16])


@pytest.mark.slow
def test_both_learning_rates_fall_to_0_at_the_last_step_which_then_is_no_free_flag(
        data, teacher, tmp_path, monkeypatch, capsys):
    used = spied(monkeypatch, distill, "train_step", lambda out, *args, lr, **more: lr)
    rates = dict(student_lr=4e-4, critic_lr=1e-3, schedule="linear")
    cfg = config(data, teacher, tmp_path / "run", steps=4, samples=0, **rates)
    run_stopped(distill, cfg, 3)
    assert "step 2 of 4 is saved" in capsys.readouterr().out
    run(distill.main, cfg)
    # critic; student, critic; critic; student, critic
    assert used == pytest.approx([1e-3, 3e-4, 7.5e-4, 5e-4, 1e-4, 2.5e-4])
    assert log_of(cfg.out)[-1]["student_lr"] == pytest.approx(1e-4)
    assert "--steps=8 (was 4)" in refused(distill.main, replace(cfg, steps=8), capsys)


@pytest.mark.slow
def test_accumulation_is_the_large_batch(data, teacher, distilled, tmp_path):
    run(distill.main, config(data, teacher, tmp_path / "run", micro_batch=1, steps=4, samples=0))
    close(log_of(tmp_path / "run"), log_of(distilled), 1e-4, *LOSSES)


@pytest.mark.slow
def test_validation_forwards_no_more_than_a_micro_batch(data, teacher, tmp_path, monkeypatch):
    sizes = spied(monkeypatch, DiT, "forward", lambda v, net, x, *rest, **more: len(x))
    run(distill.main, config(data, teacher, tmp_path / "run", steps=2, micro_batch=2, val_every=0))
    assert set(sizes) == {2}


@pytest.mark.slow
def test_the_samples_are_of_the_averaged_weights_and_beside_the_teachers(data, teacher, distilled):
    """The last validation's figures, made again from the checkpoints alone."""
    cfg = distill.resolve(config(data, teacher, distilled))
    latents, how = Latents(data, seed=0, batch=4), meta(teacher)["sampling"]
    shape = latents.shape_of(0)
    ids = [i for i in range(latents.count) if latents.shape_of(i) == shape][:2]
    text = latents.text([i for i in ids for _ in range(4)])

    def net_of(held):
        net = DiT(MODELS["tiny"])
        net.load_state_dict({name: held[f"ema.{name}"] for name in net.state_dict()})
        return net

    with torch.no_grad():
        z, *noises = [noise(0, "sample", k, list(range(8)), shape) for k in range(4)]
        student = rollout(net_of(state(distilled)), z, Cond(text), cfg.times, noises, 3)
        cond, uncond, times = Cond(text), Cond(latents.null.expand_as(text)), grid(how["steps"], how["shift"])
        clips = ode(net_of(state(teacher)), z, cond, times, uncond, how["guidance"], how["solver"])
    for name, value in distill.likeness(student, clips).items():
        assert log_of(distilled)[-1][name] == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.slow
def test_a_teacher_that_learned_sparse_is_asked_sparse_and_so_are_critic_and_student(data, tmp_path, monkeypatch):
    sparse = dict(window=(1, 1, 1), tile=(2, 2, 2), dense_ends=1)
    run(train.main, train.Config(data=(data,), out=str(tmp_path / "t"), steps=1, batch=4, warmup=0, **QUIET, **sparse))
    for event in told(monkeypatch, config(data, str(tmp_path / "t"), tmp_path / "run", steps=2, **QUIET)):
        for bound in of_kind(event, Bound):
            assert bound.metadata.tile == (2, 2, 2)
            assert bound.dense_ends == 1
    how = meta(tmp_path / "run")["sampling"]
    assert (how["window"], how["tile"], how["dense_ends"]) == ([1, 1, 1], [2, 2, 2], 1)


@pytest.mark.slow
def test_a_sparse_student_beside_dense_teacher_and_critic(data, teacher, tmp_path, monkeypatch):
    sparse = dict(window=(1, 1, 1), tile=(2, 2, 2), remat=True)
    events = told(monkeypatch, config(data, teacher, tmp_path / "run", steps=2, **QUIET, **sparse))
    assert all(rolled.net.metadata.sparsity > 0.7 for rolled in of_kind(events, Rolled))
    assert all(loss.net.metadata is None for loss in of_kind(events, Critic))
    assert all(loss.teacher.metadata is None for loss in of_kind(events, Student))
    assert all(loss.critic.metadata is None for loss in of_kind(events, Student))
    cfg = sample.Config(ckpt=str(tmp_path / "run"), prompts=("a red circle moving left",), out=str(tmp_path / "s"))
    run(sample.main, cfg)
    assert (tmp_path / "s/sheet.png").exists()


@pytest.mark.slow
def test_prompts_alone_are_enough(data, teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\na blue square moving up\na white triangle moving down\n")
    cfg = prepare.Config(prompts=str(prompts), shape=(24, 5, 8, 8), text_length=8, out=str(tmp_path / "p"))
    run(prepare.main, cfg)
    run(distill.main, config(str(tmp_path / "p"), teacher, tmp_path / "run", steps=2, batch=2, val_every=0, samples=1))
    assert {"critic_loss", "val_std"} <= log_of(tmp_path / "run")[-1].keys()


# ---- first frames ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def framed(data, tmp_path_factory):
    """A teacher that learned with first frames."""
    out = str(tmp_path_factory.mktemp("framed") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.TINY, "sample_steps", 3)
        cfg = train.Config(data=(data,), out=out, steps=2, batch=4, warmup=1, first_frame=0.5, **QUIET)
        run(train.main, cfg)
    return out


@pytest.mark.slow
def test_student_and_scores_get_first_frames_of_the_prompts_own_clips(data, framed, tmp_path, monkeypatch):
    other = shapes_dataset(tmp_path / "data", clips=20)     # whose mean and std are not the teacher's
    cfg = config(other, framed, tmp_path / "run", steps=4, val_every=0, samples=1)
    events = told(monkeypatch, cfg)
    latents, (mean, std) = Latents(other, seed=0, batch=4), codec.moments(meta(framed)["sampling"])
    met = []
    for role, kind, steps in (("student", Student, (1, 3)), ("critic", Critic, range(4))):
        for at, rolled, loss in zip(steps, rollouts(events, kind), of_kind(events, kind), strict=True):
            give = torch.tensor([stream(0, f"{role}_give", at, slot).random(dtype=np.float32) for slot in range(4)])
            free = step.first_given(rolled.x0, give < 0.5)
            assert torch.equal(rolled.free, free)
            assert torch.equal(loss.free, free)
            _, ids = distill.prompts(latents, cfg, role, at)
            x0, _ = latents.sample(ids)
            frames = ((x0 * latents.std + latents.mean - mean) / std)[:, :, 0]
            assert torch.allclose(rolled.x0[:, :, 0][give < 0.5], frames[give < 0.5], atol=1e-5)
            met += (give < 0.5).tolist()
    assert set(met) == {True, False}

    # validated without and with
    assert [rolled.free is None for rolled in of_kind(events, Rolled)[-3:]] == [True, False, True]
    assert not of_kind(events, Rolled)[-2].free[:, 0].any()
    names = {f"val_{figure}{way}" for figure in ("diversity", "std", "motion") for way in ("", "_first_frame")}
    assert names <= log_of(cfg.out)[-1].keys()
    assert meta(cfg.out)["sampling"]["first_frame"] == 0.5


@pytest.mark.slow
def test_two_ranks_make_pairs_with_first_frames_and_learn_from_them_as_one_does(data, framed, tmp_path):
    run(distill.main, config(data, framed, tmp_path / "one", **PAIRS))
    ranks(2, distill.main, config(data, framed, tmp_path / "two", shard=2, **PAIRS))
    close(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-3, "pairs_loss", "student_pairs_loss", *LOSSES)


def test_clips_differ_by_what_is_in_their_quarters():
    """A spot that wanders within a quarter, beside one that goes from quarter to quarter: no number is more alike."""
    student, clips = torch.zeros(2, 8, 1, 3, 4, 4)
    for i in range(8):
        y, x = divmod(i % 4, 2)
        student[i, 0, 1, y, x] = 1
        clips[i, 0, 1, 3 * y, 3 * x] = 1
    figures = distill.likeness(student, clips)
    assert figures["val_diversity"] == 0
    assert figures["val_std"] == figures["val_motion"] == 1
    apart = distill.likeness(clips, 3 * clips)
    assert apart["val_diversity"].item() == pytest.approx(1 / 3)


def test_likeness_leaves_a_given_frame_out():
    student, clips = torch.randn(2, 8, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = distill.likeness(student[:, :, 1:], clips[:, :, 1:])
    student[:, :, 0] *= 100
    found = distill.likeness(student, clips, given=True)
    assert found == {f"{name}_first_frame": ratio for name, ratio in wanted.items()}


def test_first_frames_need_a_teacher_and_a_dataset_that_have_them(data, teacher, framed, tmp_path, capsys):
    message = refused(distill.main, config(data, teacher, tmp_path / "run", first_frame=0.5), capsys)
    assert "--first_frame=0.5" in message and "trained without" in message
    message = refused(distill.main, config(data, framed, tmp_path / "run", first_frame=2.0), capsys)
    assert "--first_frame=2.0: a share" in message
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n" * 4)
    prompts = str(tmp_path / "p")
    run(prepare.main, prepare.Config(prompts=str(tmp_path / "prompts.txt"), shape=(24, 5, 8, 8), text_length=8,
                                     out=prompts))
    message = refused(distill.main, config(prompts, framed, tmp_path / "run"), capsys)
    assert "--first_frame=0.5" in message and "holds prompts alone" in message
    run(distill.main, config(prompts, framed, tmp_path / "run", first_frame=0.0, steps=2, batch=2, **QUIET))
    assert meta(tmp_path / "run")["sampling"]["first_frame"] == 0


def test_a_causal_student_that_never_saw_first_frames_is_refused_for_them(data, framed, causal, tmp_path, capsys):
    cfg = config(data, framed, tmp_path / "run", student=causal)
    message = refused(distill.main, cfg, capsys)
    assert f"--first_frame=0.5: --student={causal} was not trained with first frames" in message
    assert distill.resolve(replace(cfg, first_frame=0.0)).first_frame == 0


# ---- LoRA: student and critic are adapters of the one teacher -------------------------------------------------------


LORA = dict(lora_rank=4, student_lr=1e-3)


@pytest.fixture(scope="module")
def adapters(data, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters") / "run"
    run(distill.main, config(data, teacher, out, val_every=8, samples=1, **LORA))
    return out


def test_three_roles_are_one_set_of_weights_and_begin_as_one(data, teacher, tmp_path, monkeypatch):
    flags = dict(steps=1, student_every=1, guidance_interval=(0.0, 1.0))
    events = told(monkeypatch, config(data, teacher, tmp_path / "run", **QUIET, **LORA, **flags))
    score, = of_kind(events, Student)
    base = score.teacher.net
    assert {(rolled.net.net, rolled.net.lora) for rolled in of_kind(events, Rolled)} == {(base, "student")}
    assert {(loss.net.net, loss.net.lora) for loss in of_kind(events, Critic)} == {(base, "critic")}
    assert (score.critic.net, score.critic.lora) == (base, "critic")
    assert score.teacher.lora is None
    assert score.matching.sum() == 0        # the student is the teacher, the critic too
    assert score.guidance.sum() > 0


@pytest.mark.slow
def test_adapters_are_all_that_their_checkpoint_holds(adapters):
    held = state(adapters)
    assert meta(adapters)["config"]["lora_alpha"] == 4.0
    assert {name.split(".")[0] for name in held} == {"net", "opt", "critic", "critic_opt", "ema", "null"}
    whose = dict(net="student", ema="student", opt="student", critic="critic", critic_opt="critic")
    for role, adapter in whose.items():
        names = [name for name in held if name.startswith(f"{role}.")]
        assert len(names) == 2 * 10 * MODELS["tiny"].blocks * (3 if "opt" in role else 1)
        assert all(f".lora.{adapter}." in name for name in names)
        if "opt" not in role:
            assert held[f"{role}.blocks.0.ffn.0.lora.{adapter}.B"].abs().max() > 0
    student, critic = (held[f"{role}.blocks.0.ffn.0.lora.{whose[role]}.A"] for role in ("net", "critic"))
    assert not torch.equal(student, critic)


@pytest.mark.slow
def test_adapters_stopped_and_resumed_are_the_uninterrupted_ones_to_the_bit(data, teacher, adapters, tmp_path):
    for steps in (3, 8):
        run(distill.main, config(data, teacher, tmp_path / "run", steps=steps, samples=0, **LORA))
    assert same(state(tmp_path / "run"), state(adapters))


@pytest.mark.slow
def test_two_ranks_distil_adapters_as_one_does(data, teacher, adapters, tmp_path):
    cfg = config(data, teacher, tmp_path / "run", steps=2, micro_batch=1, shard=-1, samples=0, **LORA)
    ranks(2, distill.main, cfg)
    close(log_of(cfg.out), log_of(adapters), 2e-4, *LOSSES)


@pytest.mark.slow
def test_a_student_that_is_an_adapter_is_sampled_merged_and_exported_alone(teacher, adapters, tmp_path):
    cfg = sample.Config(ckpt=str(adapters), prompts=("a red circle moving left",), out=str(tmp_path / "s"))
    run(sample.main, cfg)
    assert (tmp_path / "s/sheet.png").exists()
    export.main(export.Config(ckpt=str(adapters), lora=True, out=str(tmp_path / "lora")))
    assert len(ckpt.files(tmp_path / "lora").shapes) == 2 * 10 * MODELS["tiny"].blocks
    export.main(export.Config(ckpt=str(adapters), merge=True, format="wan", out=str(tmp_path / "merged")))
    merged, base = ckpt.weights(tmp_path / "merged"), ckpt.weights(teacher)
    changed = {name for name in base.shapes if not torch.equal(base.tensor(name), merged.tensor(name))}
    layers = ["ffn.0", "ffn.2", *(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo")]
    assert changed == {f"blocks.{i}.{layer}.weight" for i in range(MODELS["tiny"].blocks) for layer in layers}


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED = [  # flags, what the message says
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
    (dict(steps=0), "--steps=0 is not 1 or more"),
    (dict(pairs=-1), "--pairs=-1 is not 0 or more"),
    (dict(pairs_steps=5), "--pairs_steps=5 needs pairs of the teacher: --pairs=N"),
    (dict(anchor=0.1), "--anchor=0.1 needs pairs of the teacher: --pairs=N"),
    (dict(student_steps=2, pairs=0, anchor=0.2), "--anchor=0.2 needs pairs"),
    (dict(pairs=9, pairs_steps=0, anchor=0.0), "--pairs=9, but .* nothing learns from them"),
    (dict(pairs=9, anchor=-1.0), "--anchor=-1.0 is not 0 or more"),
    (dict(pairs=9, steps=-1), "--steps=-1 is not 0 or more"),
    (dict(micro_batch=-2), "--micro_batch=-2 is below 1"),
    (dict(times=(1.0, 0.5)), "--shift=5.0 does not apply"),
    (dict(window=(0, 1, 1)), "window is .0, 1, 1."),
    (dict(sp=3), "--sp=3"),
    (dict(vae="x"), "--vae"),
    (dict(allow=("lrr",)), "lrr"),
    (dict(wandb="online"), "WANDB_API_KEY"),
    (dict(lora_alpha=4.0), "needs --lora_rank"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=[" ".join(f) for f, _ in REFUSED])
def test_bad_flags_are_refused_in_a_line_before_anything_is_written(
        data, teacher, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr("wandb.login", lambda **how: False)
    message = refused(distill.main, replace(config(data, teacher, tmp_path / "run"), **flags), capsys)
    assert message.startswith("distill.py: ")
    assert re.search(said, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, said", [("--start=data", "start"), ("--student_steps=few", "few"),
                                        ("--schedule=wavy", "cosine")])
def test_an_unknown_flag_and_a_wrong_value_exit_2_and_name_what_is_accepted(capsys, flag, said):
    with pytest.raises(SystemExit) as exit:
        tyro.cli(distill.Config, args=[flag])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


# ---- a student that is known: two nets that learn, an exact teacher, a mixture of Gaussians in two dimensions -------

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
SPREAD = 0.3


def mixture(x, t, cond):
    """The velocity that flow matching learns from equal Gaussians of std SPREAD at MEANS, in closed form."""
    point, t = x.flatten(1), t.view(-1, 1, 1)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2                                  # (B, 1, 1)
    off = point[:, None] - (1 - t) * MEANS                                      # (B, modes, 2)
    share = (-(off**2).sum(2, keepdim=True) / (2 * variance)).softmax(1)
    v = share * (-MEANS + (t - (1 - t) * SPREAD**2) / variance * off)
    return v.sum(1).view(x.shape)


class Corrected(torch.nn.Module):
    """The exact teacher plus a correction that starts at zero: student and critic, as in a real run, begin as it."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(5, 64), torch.nn.SiLU(),
                torch.nn.Linear(64, 64), torch.nn.SiLU(),
                torch.nn.Linear(64, 2),
            )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t, cond):
        features = torch.cat([x.flatten(1), t[:, None], torch.cos(3 * t)[:, None], torch.sin(3 * t)[:, None]], 1)
        return mixture(x, t, cond) + self.layers(features).view(x.shape)


def learner(net):
    """The net as train_step takes it, in a process of its own."""
    rows = {name: parallel.Part(p.detach(), 0, tuple(p.shape)) for name, p in net.named_parameters()}
    opt, opt_rows = adamw(rows, (0.0, 0.999), 0.0)

    def norm():
        parallel.collect(net, rows)
        return torch.nn.utils.get_total_norm([part.tensor.grad for part in rows.values()])

    return Learner(rows, opt, opt_rows, lambda last: None, norm, copies(rows))


@pytest.mark.slow
def test_a_one_step_student_of_a_mixture_finds_its_modes():
    """One step from noise: undistilled it lands on the mixture's mean, where no sample is; distilled on the modes."""
    rng = torch.Generator().manual_seed(0)
    student, critic = Corrected(1), Corrected(2)
    me, other = learner(student), learner(critic)

    def randn(n):
        return torch.randn(n, 2, 1, 1, 1, generator=rng)

    def generate(n):
        return rollout(student, randn(n), None, [1.0], [], 0)

    def from_a_mode(x):
        return torch.cdist(x.flatten(1), MEANS).min(1).values

    def share_of_modes(x):
        return torch.cdist(x.flatten(1), MEANS).argmin(1).bincount(minlength=3) / len(x)

    assert from_a_mode(generate(500)).median() > 1.0
    for step in range(1800):
        t = sample_t(torch.rand(256, generator=rng), "uniform", 1.0, (0.02, 0.98))
        if (step + 1) % 5 == 0:
            e = randn(256)
            train_step(me, [lambda: dmd_loss(generate(256), mixture, critic, None, None, t, e, None)], lr=3e-3,
                       clip=10.0, ema=0.95)
        with torch.no_grad():
            x0 = generate(256)
        train_step(other, [lambda: flow_loss(critic, x0, None, t, randn(256))], lr=3e-3, clip=10.0)
    with averaged(me), torch.no_grad():
        x = generate(1500)
        true = ode(mixture, randn(1500), None, grid(50, 1.0))
    assert (share_of_modes(x) - 1 / 3).abs().max() < 0.1                        # their sampling error is 0.012
    assert from_a_mode(true).median() == pytest.approx(SPREAD * 1.18, rel=0.1)  # the sampler's floor: Rayleigh's median
    assert from_a_mode(x).median() < 0.8                                        # of 2 from the mean to any mode


def gaussian(mean, std):
    """The velocity of N(mean, std²): what flow matching learns from it; cond, if given, is the mean."""
    def net(x, t, cond):
        t, m = t.view(-1, 1, 1, 1, 1), mean if cond is None else cond
        return -m + (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * m)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_student_beside_an_exact_critic_becomes_the_guided_gaussian(scale):
    """Conditional N(1, .5²), unconditional N(.2, .5²): of equal spreads u + s (c - u) is exactly N(.2 + .8 s, .5²)."""
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(x, requires_grad=True, dtype=torch.float64) for x in (-0.5, 1.2))
    opt = torch.optim.Adam([mean, std], lr=0.05, betas=(0.0, 0.99))
    cond, uncond, teacher = torch.tensor(1.0).double(), torch.tensor(0.2).double(), gaussian(None, 0.5)
    for step in range(800):
        z, e = (torch.randn(256, 1, 1, 1, 1, generator=rng, dtype=torch.float64) for _ in range(2))
        t = sample_t(torch.rand(256, generator=rng), "uniform", 2.0, (0.02, 0.98)).double()
        exact = gaussian(mean.detach(), std.detach())

        def critic(x, t, cond):
            return exact(x, t, None)

        guidance = None if scale == 1 else torch.full((256,), scale).double()
        loss, _ = dmd_loss(mean + std * z, teacher, critic, cond, uncond, t, e, guidance)
        for group in opt.param_groups:
            group["lr"] = 0.05 * (1 - step / 800)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert mean.item() == pytest.approx(0.2 + scale * 0.8, abs=0.03)
    assert std.item() == pytest.approx(0.5, abs=0.03)


# ---- causal students -------------------------------------------------------------------------------------------------

CHUNKS = dict(window=(-9, 1, 1), tile=(2, 99, 99))      # 5 latent frames: chunks of 2, 2 and 1


@pytest.fixture(scope="module")
def causal(data, teacher, tmp_path_factory):
    """The teacher, trained on as a causal net for a step."""
    out = str(tmp_path_factory.mktemp("causal") / "run")
    run(train.main, train.Config(data=(data,), out=out, init=teacher, steps=1, batch=4, warmup=0, **QUIET, **CHUNKS))
    return out


class Whole(NamedTuple):
    """A student and what its roll and its sampler take."""
    net: Any
    cond: Cond
    noises: list


@pytest.fixture
def rolling(causal):
    source = ckpt.stored(causal, ["ema"])
    net = DiT(MODELS["tiny"])
    ckpt.fill(parallel.local_rows(net), ckpt.model_of(source, "ema"))
    world = parallel.imagine(1)._replace(device=torch.device("cpu"))
    student = chunked(net, (24, 5, 8, 8), world, **CHUNKS)
    cond = Cond(torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)))
    return Whole(student, cond, [noise(0, "sample", k, range(2), (24, 5, 8, 8)) for k in range(3)])


def micro_of(cond, z, noises, free=None):
    return distill.Draw(cond.text, cond.text[0], z, free, e=None, u=None, noises=noises, extras={})


def test_what_a_causal_student_is_trained_on_is_what_is_sampled_from_it_to_the_bit(rolling):
    """The second clip's first frame is given."""
    cfg = distill.Config(times=(1.0, 0.8, 0.5))
    student, cond, (z, *noises) = rolling
    free = step.first_given(z, torch.tensor([False, True]))
    trained = distill.roll(student, cond, micro_of(cond, z, noises, free), 2, cfg)
    sampling = dict(sampler="rollout", times=cfg.times, guidance=1.0, tile=CHUNKS["tile"])
    with torch.no_grad():
        sampled = step.sample(student, rolling.noises.__getitem__, cond, None, sampling, free, student.see)
    assert torch.equal(trained, sampled)
    assert trained.requires_grad
    assert [torch.equal(x0, e) for x0, e in zip(trained[:, :, 0], z[:, :, 0])] == [False, True]


@pytest.mark.parametrize("frames", [5, 4, 2])
def test_a_causal_students_flops_count_the_frames_that_it_sees_clean_and_not_the_last_chunk(
        rolling, monkeypatch, frames):
    cfg = distill.Config(times=(1.0, 0.8, 0.5), **CHUNKS)
    seen = spied(monkeypatch, Chunked, "see", lambda cond, net, past, x0: x0.shape[2])
    z, *noises = [noise[:, :, :frames] for noise in rolling.noises]
    micro = micro_of(rolling.cond, z, noises)
    with torch.no_grad():
        distill.roll(rolling.net, rolling.cond, micro, 2, cfg)
    forward = rolling.net.flops(z.shape[1:], 8)
    found = distill.critic_flops(lambda shape: (rolling.net, rolling.net.bind(shape), None), micro, 2, cfg)
    assert found / forward == pytest.approx(2 + 1 + sum(seen) / frames + 3)
    assert distill.sees(z, replace(cfg, window=None)) == 0


@pytest.mark.parametrize("exit", range(3))
def test_each_chunk_of_a_rollout_is_its_own_behind_a_clean_past_that_has_no_gradient(rolling, exit):
    cfg = distill.Config(times=(1.0, 0.8, 0.5))
    student, cond, (z, *noises) = rolling
    x0 = distill.roll(student, cond, micro_of(cond, z, noises), exit, cfg)
    chunks = x0.split(2, 2)
    grads = []
    for i, chunk in enumerate(chunks):
        past = cond
        for before in chunks[:i]:
            past = student.see(past, before)
        own = slice(2 * i, 2 * i + 2)
        alone = rollout(student, z[:, :, own], past, cfg.times, [e[:, :, own] for e in noises], exit)
        assert torch.equal(chunk, alone)
        student.net.zero_grad()
        alone.square().sum().backward()
        grads.append({name: p.grad for name, p in student.net.named_parameters()})
    student.net.zero_grad()
    x0.square().sum().backward()
    for name, p in student.net.named_parameters():
        want = sum(grad[name] for grad in grads)
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item()), name


@pytest.mark.parametrize("first_frame", [0.0, 1.0])
def test_a_causal_students_pairs_are_its_own_ways_chunk_by_chunk(data, causal, rolling, tmp_path, first_frame):
    latents, cfg, origin, world = to_learn_from(data, tmp_path, pairs=2, batch=2, student_steps=2, student=causal,
                                                **CHUNKS)
    cfg = replace(cfg, first_frame=first_frame)
    student, z = rolling.net, noise(0, "pair", 0, range(2), (24, 5, 8, 8))
    prompts = [distill.pair_prompt(latents, cfg, number)[1] for number in range(2)]
    text, frees = latents.text(prompts), [None] * 3
    if first_frame:
        free = first_given(z, torch.ones(2))
        z, frees = place(z, latents.sample(prompts)[0], free), free.split(2, 1)
    (pair,) = distill.pairs_of(lambda shape: (student, None, None), latents, origin._replace(inputs={"student": 7}),
                               cfg, world)(0)
    past, ways = Cond(text), []
    for some, free in zip(z.split(2, 2), frees):
        ways.append(list(trajectory(student, some, past, distill.ode_times(cfg), solver="ab2", free=free)))
        past = student.see(past, ways[-1][-1])
    ways = dict(zip([*distill.ode_times(cfg)[1:], 0.0], (torch.cat(chunks, 2) for chunks in zip(*ways)))) | {1.0: z}
    for x0, e, t, _ in zip(*pair[:4]):
        number = (ways[0.0] - x0).abs().flatten(1).mean(1).argmin().item()
        point = next(x for time, x in ways.items() if time == pytest.approx(t.item()))
        assert torch.allclose(x0, ways[0.0][number], atol=1e-5)
        x_t = add_noise(x0[None], e[None], t.view(1))[0]
        assert torch.allclose(x_t[:, int(first_frame):], point[number][:, int(first_frame):], atol=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["", "first frame"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_causal_student_learns_each_chunk_of_a_pair_behind_the_pairs_own_clean_ones(rolling, cached, given):
    student, cond, (e, x0, _) = rolling
    student, t = replace(student, cached=cached), torch.tensor([0.8, 0.5])
    free = first_given(x0, torch.tensor([True, False])) if given else None
    asked = on_free(t, free)
    noised, parts = add_noise(x0, e, asked), []
    for i in range(3):
        past, frames = cond, slice(2 * i, 2 * i + 2)
        for before in x0.split(2, 2)[:i]:
            past = student.see(past, before)
        parts.append(student(noised[:, :, frames], asked[:, frames] if given else t, past))
    v = torch.cat(parts, 2)
    want = (t.square() * mean_of((v - (e - x0)).square(), free)).mean()
    pair = distill.Point(x0, e, t, cond.text, free)
    loss, _ = distill.pairs_loss(lambda shape: (student, None, None), pair, distill.Config(times=(0.8, 0.5)))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_a_causal_student_stopped_and_resumed_is_the_uninterrupted_one_to_the_bit(
        data, teacher, causal, tmp_path, capsys, lora):
    flags = dict(steps=4, student=causal, lora_rank=lora, remat=lora > 0, **QUIET)
    if lora:
        flags |= dict(student_steps=2, pairs=5, pairs_steps=2, anchor=0.5)
    run(distill.main, config(data, teacher, tmp_path / "whole", **flags))
    cfg = config(data, teacher, tmp_path / "run", **flags)
    run_stopped(distill, cfg, 3)
    if lora:
        (tmp_path / "run" / "pairs").rename(tmp_path / "away")
        assert "does not hold the pairs" in refused(distill.main, cfg, capsys)
        (tmp_path / "away").rename(tmp_path / "run" / "pairs")
    run(distill.main, cfg)
    assert log_of(cfg.out) == log_of(tmp_path / "whole")
    assert same(state(cfg.out), state(tmp_path / "whole"))
    how = meta(cfg.out)["sampling"]
    assert (how["window"], how["tile"]) == ([-9, 1, 1], [2, 99, 99])


@pytest.mark.slow
def test_two_ranks_make_a_causal_student_as_one_does(data, teacher, causal, tmp_path):
    flags = dict(steps=2, student=causal, **QUIET)
    run(distill.main, config(data, teacher, tmp_path / "one", **flags))
    ranks(2, distill.main, config(data, teacher, tmp_path / "two", micro_batch=1, **flags))
    close(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-3, *LOSSES)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_student_starts_from_its_own_weights_and_the_critic_from_the_teachers(
        data, teacher, causal, tmp_path, monkeypatch, lora):
    begun = {}

    def look(nets, micro, exit, cfg):
        student, critic, teacher = nets(micro.z.shape)
        begun.update(student=student, critic=critic, teacher=teacher)
        raise InterruptedError

    monkeypatch.setattr(distill, "student_loss", look)
    with pytest.raises(InterruptedError):
        run(distill.main, config(data, teacher, tmp_path / "run", student=causal, lora_rank=lora, student_every=1,
                                 val_every=0, samples=0))
    for role, path in (("student", causal), ("critic", teacher), ("teacher", teacher)):
        want = ckpt.model_of(ckpt.stored(path, ["ema"]), "ema")
        held = dict(begun[role].net.named_parameters())
        assert all(torch.equal(held[name], want.tensor(name)) for name in want.shapes), role
    assert isinstance(begun["student"], Chunked)
    assert begun["critic"].metadata is None
    assert begun["teacher"].metadata is None


def test_beside_a_teacher_that_is_no_run_the_student_still_says_how_it_attends(causal):
    cfg = distill.inherit(distill.Config(teacher="elsewhere", model="tiny", student=causal))
    assert (cfg.window, cfg.tile) == ((-9, 1, 1), (2, 99, 99))


def test_a_student_that_starts_from_a_few_step_student_is_refused(data, teacher, distilled, tmp_path, capsys):
    said = refused(distill.main, config(data, teacher, tmp_path / "run", student=str(distilled)), capsys)
    assert f"--student={distilled} is itself a few-step student: wanted is one that predicts" in said
    assert not (tmp_path / "run").exists()


def test_a_student_of_other_latents_than_the_teachers_is_refused(data, teacher, causal, tmp_path, capsys):
    other = copied(Path(causal), tmp_path / "other")
    rewrite(ckpt.latest(other), lambda manifest: manifest["meta"]["sampling"]["std"].__setitem__(3, 2.0))
    said = refused(distill.main, config(data, teacher, tmp_path / "run", student=str(other)), capsys)
    assert re.search("other was trained on latents normalised otherwise .* their std is another", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong, said", [
    (dict(dense_ends=1, **CHUNKS), "--dense_ends=1: dense blocks see the future"),
    (dict(pairs=8, **CHUNKS), "which --student=RUN names"),
    (dict(window=(1, -2, 1)), "window is")])
def test_what_a_causal_student_cannot_be_is_refused(data, teacher, tmp_path, capsys, wrong, said):
    assert said in refused(distill.main, config(data, teacher, tmp_path / "run", **wrong), capsys)
