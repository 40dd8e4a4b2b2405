"""train.py as a user runs it: exact resume, worlds of several ranks, what goes wrong, refusals at the door."""
import json
import math
import os
import re
import shutil
import signal
import socket
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import save_file

import ckpt
import codec
import export
import parallel
import prepare
import sample
import step
import train
from data import Latents, noise, stream
from helpers import (V1_PATH, as_version_1, cheaply, close, copied, full_disk, log_of, meta, nan_at, out_of_memory,
                     ranks, refused, rewrite, run, run_killed, run_stopped, same, shapes_dataset, spied, started, state,
                     wait_until)
from log import curves
from model import MODELS, Cond, DiT, add_lora, blank

QUIET = dict(val_every=0, samples=0)    # validates at the end alone, without videos


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Videos take 3 steps instead of 50."""
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        patch.setitem(train.TINY, "sample_steps", 3)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("data") / "shapes")


def config(data, out, **flags):
    base = dict(steps=8, decay_steps=8, batch=4, log_every=1, val_every=4, save_every=3, val=2, samples=2, warmup=2)
    return train.Config(data=(data,), out=str(out), **base | flags)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody interrupts, with its curves."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("log.curves", curves)
        run(train.main, config(data, out))
    return out


def test_a_run_leaves_its_log_curves_page_videos_and_checkpoints(whole):
    lines = log_of(whole)
    assert [line["step"] for line in lines] == list(range(9))
    assert "val_loss" in lines[0]
    assert "loss" not in lines[0]
    assert {"loss", "val_loss", "lr", "grad_norm", "skipped", "epoch"} <= lines[8].keys()
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8]
    assert sorted(p.name for p in whole.glob("samples/*.mp4")) == ["step_0000004.mp4", "step_0000008.mp4"]
    assert (whole / "curves.png").stat().st_size > 1000
    assert "step_0000008.mp4" in (whole / "index.html").read_text()
    assert sorted(p.name for p in (whole / "ckpt").iterdir()) == ["step_0000003", "step_0000006", "step_0000008"]
    flags = json.loads((whole / "config.json").read_text())["flags"]
    assert (flags["lr"], flags["ema"]) == (8e-3, 0.995)     # the model's row, resolved
    held = state(whole)
    assert not torch.equal(held["net.head.head.weight"], held["ema.head.head.weight"])


# ---- causal ---------------------------------------------------------------------------------------------------------

CAUSAL = dict(window=(-9, 1, 1), tile=(2, 99, 99))      # 5 latent frames: chunks of 2, 2 and 1


def asked_of(cfg, data, step=0):
    """What the net is asked at in an update: (t, free) of its first micro-batch, whose clips have 5 frames."""
    asked = []

    def net(x, t, cond):
        asked.append(t)
        return 0 * x

    chunk = 2 if cfg.window else None
    micro, *_ = Latents(data, seed=0, batch=8, chunk=chunk).at(step)
    _, seen = train.loss_of(net, micro, cfg)
    return asked[0], micro, seen


def test_diffusion_forcing_has_a_time_for_each_chunk_the_first_being_todays(data):
    t, micro, seen = asked_of(train.Config(shift=2.0, **CAUSAL), data)
    today, same_micro, _ = asked_of(train.Config(shift=2.0), data)
    assert torch.equal(t[:, 0], today)
    assert torch.equal(micro.e, same_micro.e)
    assert torch.equal(t, t[:, [0, 0, 2, 2, 4]])
    assert all((t[:, a] != t[:, b]).all() for a, b in ((0, 2), (2, 4), (0, 4)))
    assert seen["loss_by"][1].sum() == 8 * 5


def test_clips_of_one_chunk_are_trained_on_as_today(data):
    micro, *_ = Latents(data, seed=0, batch=8, chunk=5).at(0)
    today, *_ = Latents(data, seed=0, batch=8).at(0)
    assert torch.equal(micro.u, today.u)


def test_a_clean_prefix_of_whole_chunks_is_given_to_its_share_and_has_no_part_in_the_loss(data):
    t, micro, seen = asked_of(train.Config(shift=2.0, clean_prefix=0.5, **CAUSAL), data)
    plain, _, _ = asked_of(train.Config(shift=2.0, **CAUSAL), data)
    given = (t == 0).sum(1)
    assert torch.equal(given > 0, micro.prefix < 0.5)
    assert set(given.tolist()) <= {0, 2, 4}
    assert torch.equal(t, plain * (torch.arange(5) >= given[:, None]))
    assert seen["loss_by"][1].sum() == (t > 0).sum()
    u = (torch.arange(1000) + 0.5) / 1000
    assert train.clean_prefix(u, 0.4, 5).int().bincount().tolist() == [600, 100, 100, 100, 100]


def test_a_causal_run_validates_each_chunk_behind_a_clean_past_and_shows_videos_by_chunks(data, tmp_path, monkeypatch):
    free = spied(monkeypatch, train, "flow_loss", lambda out, *args, free=None: free)
    chunks = spied(monkeypatch, step, "stepwise",
                   lambda out, draw, see, conds, chunk, *noises, free: (len(conds), chunk, out.shape))
    run(train.main, config(data, tmp_path / "run", steps=2, decay_steps=2, val_every=0, **CAUSAL))
    assert {"val_loss", "val_loss_clean_past"} <= log_of(tmp_path / "run")[-1].keys()
    asked = torch.cat([rows for rows in free if rows is not None])
    assert sorted(set(map(tuple, asked.int().tolist()))) == [(0, 0, 0, 0, 1), (0, 0, 1, 1, 0), (1, 1, 0, 0, 0)]
    assert len(asked) == 2 * train.STRATA
    assert chunks == [(2, 2, (2, 24, 5, 8, 8))]
    assert meta(tmp_path / "run")["sampling"]["window"] == [-9, 1, 1]


def test_a_first_frame_and_a_clean_prefix_go_together(data):
    t, micro, _ = asked_of(train.Config(shift=2.0, clean_prefix=0.5, first_frame=0.5, **CAUSAL), data)
    alone, _, _ = asked_of(train.Config(shift=2.0, clean_prefix=0.5, **CAUSAL), data)
    assert torch.equal(t[:, 0] == 0, (micro.prefix < 0.5) | (micro.give < 0.5))
    assert torch.equal(t[:, 1:], alone[:, 1:])
    assert not torch.equal(micro.prefix, micro.give)


@pytest.mark.slow
def test_a_causal_run_stopped_and_resumed_and_one_on_two_ranks_are_the_uninterrupted_run(data, tmp_path):
    flags = dict(steps=4, decay_steps=4, save_every=2, clean_prefix=0.5, **QUIET | CAUSAL)
    run(train.main, config(data, tmp_path / "whole", **flags))
    cfg = config(data, tmp_path / "run", **flags)
    run_stopped(train, cfg, 2)
    run(train.main, cfg)
    assert log_of(cfg.out) == log_of(tmp_path / "whole")
    assert same(state(cfg.out), state(tmp_path / "whole"))
    ranks(2, train.main, config(data, tmp_path / "two", micro_batch=1, **flags))
    both = log_of(tmp_path / "two"), log_of(tmp_path / "whole")
    close(*both, 1e-4, "loss", "grad_norm", "val_loss", "val_loss_clean_past")


@pytest.mark.parametrize("wrong, said", [
    (dict(window=(3, -3, 3)), r"window is \(3, -3, 3\)"),
    (dict(dense_ends=1, **CAUSAL), "--dense_ends=1: dense blocks see the future"),
    (dict(window_steps=3, **CAUSAL), "--window_steps=3: a causal window, -9 along frames, cannot shrink"),
    (dict(clean_prefix=0.5), "--clean_prefix=0.5 is a share"),
    (dict(clean_prefix=1.5, **CAUSAL), "--clean_prefix=1.5 is a share"),
    (dict(clean_prefix=0.5, window=(-9, 1, 1), tile=(5, 99, 99)), "no clip of .* is longer than a chunk, 5 frames")])
def test_what_a_causal_run_cannot_be_is_refused(data, tmp_path, capsys, wrong, said):
    assert re.search(said, refused(train.main, config(data, tmp_path / "run", **wrong), capsys))


# ---- nothing is lost ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(data, whole, tmp_path, capsys):
    """Stopped between two saves; where a validation is due, which the next start makes up for; at the last step."""
    cfg = config(data, tmp_path / "run")
    for step, updates in ((2, 2), (4, 2), (8, 4)):
        run_stopped(train, cfg, updates)
        assert f"step {step} of 8 is saved" in capsys.readouterr().out
        assert "val_loss" not in log_of(cfg.out)[-1]
    run(train.main, cfg)
    assert log_of(cfg.out) == log_of(whole)
    assert same(state(cfg.out), state(whole))
    assert (tmp_path / "run/samples/step_0000004.mp4").exists()
    run(train.main, cfg)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_between_save_and_validation_validates_when_it_resumes(data, whole, tmp_path):
    cfg = config(data, tmp_path / "run", save_every=4)
    for step, function in ((4, "show"), (8, "validate")):
        run_killed(train, cfg, step, function)
        assert ckpt.latest(cfg.out).name == f"step_{step:07d}"
        assert "val_loss" not in log_of(cfg.out)[-1]
    run(train.main, cfg)
    assert log_of(cfg.out) == log_of(whole)
    assert same(state(cfg.out), state(whole))
    for step in (4, 8):
        assert (tmp_path / f"run/samples/step_{step:07d}.mp4").exists()


@pytest.mark.slow
def test_a_run_that_saved_nothing_leaves_nothing_to_the_log_of_the_next(data, tmp_path):
    cfg = config(data, tmp_path / "run", steps=2, decay_steps=2, samples=0, seed=1)
    run_killed(train, replace(cfg, seed=0), 2, "validate")
    shutil.rmtree(tmp_path / "run/ckpt")
    for out in (cfg.out, str(tmp_path / "new")):
        run(train.main, replace(cfg, out=out))
    assert log_of(cfg.out) == log_of(tmp_path / "new")


def test_a_run_stopped_before_its_first_update_does_not_say_that_it_is_saved(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Clock", lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(train.main, config(data, tmp_path / "run"))
    assert "step 0 of 8 is the start: nothing is saved; the same command goes on" in capsys.readouterr().out


def test_a_run_that_went_on_until_its_folder_was_free_is_not_begun_again_from_before(
        data, whole, tmp_path, monkeypatch, capsys):
    out = copied(whole, tmp_path / "run")
    last = ckpt.step_folder(out, 8).rename(tmp_path / "last")
    claim = ckpt.claim

    def claimed(*args, **ranks):
        last.rename(ckpt.step_folder(out, 8))
        claim(*args, **ranks)

    monkeypatch.setattr(ckpt, "claim", claimed)
    assert "has gone on: the same command" in refused(train.main, config(data, out), capsys)


def test_fewer_steps_than_a_run_has_done_are_called_finished(data, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    shutil.rmtree(ckpt.step_folder(out, 8))
    run(train.main, config(data, out, steps=4))
    assert "step_0000006 is finished, 6 of 4 steps" in capsys.readouterr().out


def test_a_folder_for_videos_that_cannot_be_made_does_not_end_a_run(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").touch()
    run(train.main, config(data, tmp_path / "run", steps=1))
    assert "step_0000001.mp4 is not written (FileExistsError" in capsys.readouterr().out
    assert log_of(tmp_path / "run")[-1].keys() >= {"loss", "val_loss"}


def test_prompts_without_latents_are_refused_at_the_door(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle moving left\n")
    out = str(tmp_path / "set")
    run(prepare.main, prepare.Config(prompts=str(tmp_path / "p.txt"), shape=(24, 5, 8, 8), out=out))
    assert "prompts without latents: one can distil" in refused(train.main, config(out, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dataset_that_has_changed_is_another_and_one_that_was_compacted_is_the_same(tmp_path, capsys):
    folder = shapes_dataset(tmp_path / "set", 60)
    shapes_dataset(folder, 50)
    run(train.main, config(folder, tmp_path / "run", steps=1, decay_steps=2, **QUIET))
    run(prepare.main, prepare.Config(clips=50, out=folder, compact=True))
    capsys.readouterr()
    run(train.main, config(folder, tmp_path / "run", steps=2, decay_steps=2, **QUIET))
    assert "step 2 of 2" in capsys.readouterr().out
    shapes_dataset(folder, 40)
    assert "data" in refused(train.main, config(folder, tmp_path / "run", steps=3, decay_steps=2, **QUIET), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "load"])
def test_videos_that_fail_leave_their_latents_and_the_run_goes_on(data, tmp_path, monkeypatch, capsys, part):
    load, loads = codec.load, []

    def failing(*args, **more):
        loads.append(args)
        if part == "load" and len(loads) > 1:   # the first one is begin's, which refuses a wrong --vae
            out_of_memory()
        return load(*args, **more)._replace(decode=out_of_memory)

    monkeypatch.setattr(codec, "load", failing)
    run(train.main, config(data, tmp_path / "run", steps=2, val_every=1, save_every=1))
    printed = capsys.readouterr().out
    assert "step_0000001.npy holds latents instead of a video: RuntimeError: out of memory" in printed
    assert np.load(tmp_path / "run/samples/step_0000001.npy").shape == (2, 24, 5, 8, 8)
    assert [path.name for path in ckpt.steps(tmp_path / "run").values()] == ["step_0000001", "step_0000002"]
    assert "val_loss" in log_of(tmp_path / "run")[-1]


@pytest.mark.slow
def test_a_run_has_its_folder_alone_and_killed_without_warning_goes_on_from_its_last_save(
        data, whole, tmp_path, capsys):
    cfg = config(data, tmp_path / "run", samples=0)
    with started(1, train.main, cfg) as (group, _):
        wait_until((tmp_path / "run/ckpt/step_0000003").exists, group)
        os.kill(group.pids()[0], signal.SIGSTOP)    # so that it cannot end before
        message = refused(train.main, cfg, capsys)
    group.processes[0].join()       # killed
    assert f"is in use by process {group.pids()[0]} on {socket.gethostname()}" in message
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')     # what a later step had logged, and half a line
    run(train.main, cfg)
    assert "on from step" in capsys.readouterr().out
    assert [line["step"] for line in log_of(cfg.out)] == list(range(9))
    mine, theirs = state(cfg.out), state(whole)
    for name in theirs:     # another number of threads there: not the same bits
        assert torch.allclose(mine[name], theirs[name], atol=1e-5), name


def test_a_folder_is_claimed_before_anything_is_built(data, tmp_path, monkeypatch, capsys):
    built = spied(monkeypatch, train, "blank", lambda net, *args: args)
    monkeypatch.setattr(ckpt, "claim", full_disk)
    assert refused(train.main, config(data, tmp_path / "run"), capsys) == "train.py: the disk is full\n"
    assert built == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_skipped_and_names_the_samples_of_all_ranks(
        data, tmp_path, monkeypatch, capsys):
    """Rank 1 of 2, which itself has half of each batch."""
    def half(*args, **more):
        return Latents(*args, **more | dict(rank=1, world=2))

    monkeypatch.setattr(train, "Latents", half)
    nan_at(monkeypatch, train, "flow_loss", 1, 3)
    cfg = config(data, tmp_path / "run", steps=4, val=0, **QUIET)
    run(train.main, cfg)
    printed = capsys.readouterr().out
    latents = Latents(data, seed=0, batch=4)
    for step in (0, 2):
        _, ids = latents.batch_ids(step)
        assert f"step {step}: gradient norm nan, update skipped; samples {ids}\n" in printed
    assert printed.count("skipped; samples") == 2
    assert log_of(cfg.out)[-1]["skipped"] == 2
    assert meta(cfg.out)["counts"] == {"updates": 2, "skipped": 2, "in_a_row": 0}


@pytest.mark.slow
def test_updates_that_are_skipped_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr("step.SKIPS", 3)
    nan_at(monkeypatch, train, "flow_loss", 2, 4, 5, 6)
    with pytest.raises(RuntimeError, match="3 updates in a row held NaN") as error:
        run(train.main, config(data, tmp_path / "run", save_every=2, **QUIET))
    path = ckpt.latest(tmp_path / "run")
    assert path.name == "step_0000004"
    assert error.value.__notes__ == [f"{path} is the newest checkpoint; 1 steps after it are not saved"]


def test_a_damaged_sample_ends_the_run_with_what_is_saved(data, tmp_path):
    damaged = str(copied(data, tmp_path / "data"))
    latents = tmp_path / "data" / "24x5x8x8.0.bin"
    latents.write_bytes(bytes(latents.stat().st_size))
    cfg = config(damaged, tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match="is not what was written") as error:
        run(train.main, cfg)
    assert error.value.__notes__ == [f"nothing of the run is saved in {cfg.out}"]


@pytest.mark.slow
def test_a_run_whose_gradients_are_never_finite_says_what_is_saved_and_draws_no_curves(
        data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("step.SKIPS", 3)
    nan_at(monkeypatch, train, "flow_loss", *range(1, 9))
    cfg = config(data, tmp_path / "run", save_every=0, **QUIET)
    with pytest.raises(RuntimeError, match="3 updates in a row") as error:
        run(train.main, cfg)
    assert error.value.__notes__ == [f"nothing of the run is saved in {cfg.out}"]
    monkeypatch.setattr("log.curves", curves)
    short = replace(cfg, steps=2, decay_steps=2, out=str(tmp_path / "short"))
    run(train.main, short)
    assert (f"step 2 of 2 is saved in {short.out}, but no update was finite: the weights are those that the run "
            "began with") in capsys.readouterr().out


def test_a_flipped_sample_of_the_dataset_stops_the_run_by_name(data, tmp_path):
    copied(data, tmp_path / "data")
    file = next((tmp_path / "data").glob("24x5x8x8*.bin"))
    content = np.fromfile(file, np.uint8)
    content[::4096] ^= 1
    content.tofile(file)
    with pytest.raises(ValueError, match=file.name):
        run(train.main, config(str(tmp_path / "data"), tmp_path / "run"))


# ---- what a run goes on with ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flags_left_out_stay_as_they_were_when_the_defaults_change(data, whole, tmp_path, monkeypatch):
    """ema, lr and the others that config() does not give come from the row of the day the run began."""
    cfg = config(data, tmp_path / "run")
    run(train.main, replace(cfg, steps=3, val_every=0))
    monkeypatch.setitem(train.DEFAULTS, "tiny", train.TINY | dict(lr=1.0, ema=0.1, shift=9.0, guidance=7.0))
    run(train.main, replace(cfg, steps=8))
    assert json.loads((tmp_path / "run/config.json").read_text())["flags"]["lr"] == 8e-3
    assert same(state(cfg.out), state(whole))
    assert train.resolve(replace(cfg, allow=("lr",))).lr == 1.0
    assert train.resolve(replace(cfg, ema=0.7)).ema == 0.7


def test_a_flag_that_is_newer_than_the_run_has_the_value_of_its_time(data, whole, tmp_path, capsys):
    copied(whole, tmp_path / "run")
    rewrite(ckpt.latest(tmp_path / "run"), lambda manifest: manifest["meta"]["config"].pop("deterministic"))
    cfg = config(data, tmp_path / "run", steps=9)
    assert "--deterministic=True (was False)" in refused(train.main, replace(cfg, deterministic=True), capsys)
    run(train.main, replace(cfg, **QUIET))
    assert log_of(cfg.out)[-1]["step"] == 9


def test_every_flag_that_the_first_layout_lacks_has_a_value_before():
    """V1 was written by commit 496ae65: without this, a new flag would keep old runs from going on."""
    saved = ckpt.read_manifest(V1_PATH)["meta"]["config"]
    assert asdict(train.Config()).keys() - saved.keys() <= train.BEFORE.keys()
    assert saved.keys() - asdict(train.Config()).keys() <= train.BEFORE.keys()


@pytest.fixture(scope="module")
def old(whole, tmp_path_factory):
    """The run of 496ae65: its checkpoint at step 6, in the layout and with the flags of then."""
    out = copied(whole, tmp_path_factory.mktemp("old") / "run")
    shutil.rmtree(out / "ckpt/step_0000008")
    path = as_version_1(out / "ckpt/step_0000006")
    rewrite(path, lambda manifest: manifest["meta"]["config"].pop("deterministic"))
    return out


@pytest.mark.slow
def test_a_run_of_the_first_layout_goes_on(data, whole, old, tmp_path, capsys):
    cfg = config(data, copied(old, tmp_path / "run"))
    run(train.main, cfg)
    assert "on from step 6" in capsys.readouterr().out
    assert same(state(cfg.out), state(whole))
    assert log_of(cfg.out) == log_of(whole)


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another_of_either_layout(data, whole, old, tmp_path):
    new, first = ckpt.weights(whole / "ckpt/step_0000006"), ckpt.weights(old)
    assert all(torch.equal(new.tensor(name), first.tensor(name)) for name in new.shapes)
    for init in (whole / "ckpt/step_0000006", old):
        run(train.main, config(data, tmp_path / init.name, steps=1, init=str(init), samples=0))
    run(train.main, config(data, tmp_path / "last", steps=1, init=str(whole), samples=0))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "step_0000006")
    assert log_of(tmp_path / "last")[0]["val_loss"] == pytest.approx(log_of(whole)[-1]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_full_finetune_goes_on_when_its_init_has_gone_or_moved(data, whole, tmp_path, capsys):
    base = copied(whole, tmp_path / "base")
    cfg = config(data, tmp_path / "run", init=str(base), **QUIET)
    run(train.main, replace(cfg, steps=1))
    base.rename(tmp_path / "elsewhere")
    run(train.main, replace(cfg, steps=2))
    assert "on from step 1" in capsys.readouterr().out
    run(train.main, replace(cfg, steps=3, init=str(tmp_path / "elsewhere")))
    assert "on from step 2" in capsys.readouterr().out
    other = str(whole / "ckpt/step_0000006")
    assert "is not what" in refused(train.main, replace(cfg, steps=4, init=other), capsys)


@pytest.mark.slow
def test_a_run_begun_from_anothers_checkpoint_goes_on_by_the_same_command(data, whole, tmp_path, capsys):
    cfg = config(data, tmp_path / "run", resume=str(whole / "ckpt/step_0000003"))
    run(train.main, replace(cfg, steps=5))
    run(train.main, cfg)                                # from its own step 5, not from 3 again
    assert "on from step 5" in capsys.readouterr().out
    assert same(state(cfg.out), state(whole))
    assert [line["step"] for line in log_of(cfg.out)] == [4, 5, 6, 7, 8]
    before = (tmp_path / "run/log.jsonl").read_bytes()
    earlier = replace(cfg, resume=str(tmp_path / "run/ckpt/step_0000005"))
    assert "has gone on to step_0000008" in refused(train.main, earlier, capsys)
    assert (tmp_path / "run/log.jsonl").read_bytes() == before


def test_a_folder_of_another_run_is_refused_and_left_alone(data, whole, tmp_path, capsys):
    before = log_of(whole)
    given = {"--lr=0.001 (was 0.008)": dict(lr=1e-3), "--seed=1": dict(seed=1), "--decay_steps=9": dict(decay_steps=9)}
    for said, flags in given.items():
        message = refused(train.main, config(data, whole, **flags), capsys)
        assert said in message
        assert "--out=" in message
        assert "--allow" in message
    other = shapes_dataset(tmp_path / "data", clips=61)
    assert "data'] (is not what" in refused(train.main, config(other, whole), capsys)
    assert log_of(whole) == before


@pytest.mark.slow
def test_muon_has_its_row_and_resumes_to_the_bit(data, tmp_path):
    cfg = config(data, tmp_path / "whole", steps=4, decay_steps=4, samples=0, val_every=0)
    assert train.resolve(replace(cfg, steps=None, decay_steps=None)).steps == 3000
    assert train.resolve(replace(cfg, steps=None, decay_steps=None, optimizer="adamw")).steps == 5500
    run(train.main, cfg)
    for steps in (2, 4):
        run(train.main, replace(cfg, out=str(tmp_path / "run"), steps=steps))
    whole = state(tmp_path / "whole")
    assert same(state(tmp_path / "run"), whole)
    assert whole["opt.blocks.0.self_attn.q.weight.momentum"].abs().sum() > 0
    assert "opt.blocks.0.self_attn.q.weight.exp_avg" not in whole


def test_a_run_keeps_its_optimizer_and_another_is_refused(data, tmp_path, capsys):
    cfg = config(data, tmp_path / "run", steps=1, decay_steps=1, samples=0, val_every=0, optimizer="adamw")
    run(train.main, cfg)
    assert train.resolve(replace(cfg, optimizer=None)).optimizer == "adamw"
    assert "--optimizer=muon (was adamw)" in refused(train.main, replace(cfg, optimizer="muon", steps=2), capsys)


@pytest.mark.slow
def test_two_datasets_are_mixed_by_share_and_resumed_exactly(data, tmp_path):
    other = shapes_dataset(tmp_path / "data", clips=61)
    cfg = config(data, tmp_path / "whole", steps=4, decay_steps=4, samples=0)
    cfg = replace(cfg, data=(data, other), mix=(1.0, 3.0))
    run(train.main, cfg)
    for steps in (2, 4):
        run(train.main, replace(cfg, out=str(tmp_path / "run"), steps=steps))
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_other_datasets_or_shares_are_refused_on_resume(data, whole, tmp_path, capsys):
    other = shapes_dataset(tmp_path / "data", clips=61)
    assert "data'] (is not what" in refused(train.main, replace(config(data, whole), data=(data, other)), capsys)
    assert "--mix=[1.0]" in refused(train.main, config(data, whole, mix=(1.0,)), capsys)


# ---- first frames ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of clips and stills."""
    out = str(tmp_path_factory.mktemp("mixed") / "data")
    run(prepare.main, prepare.Config(clips=60, frames=(1, 17), out=out))
    return out


class Lost(NamedTuple):
    """What flow_loss was given and gave."""
    x0: torch.Tensor
    t: torch.Tensor
    free: torch.Tensor | None
    trained: bool
    bins: torch.Tensor


@pytest.fixture(scope="module")
def given(mixed, tmp_path_factory):
    """A run with first frames, and its losses: (folder, [Lost])."""
    def lost(out, net, x0, cond, t, e, free=None):
        return Lost(x0.clone(), t, free, torch.is_grad_enabled(), out[1]["loss_by"])

    out = tmp_path_factory.mktemp("given") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = spied(patch, train, "flow_loss", lost)
        run(train.main, config(mixed, out, first_frame=0.5, val=3))
    return out, seen


def test_a_share_of_the_clips_is_given_the_first_frame_and_no_still_is(given):
    trained = [loss for loss in given[1] if loss.trained]
    frees = []
    for step, loss in enumerate(trained):
        assert loss.t.shape == (4,)
        if loss.x0.shape[2] == 1:
            assert loss.free is None
            continue
        give = torch.tensor([stream(0, "give", step, slot).random(dtype=np.float32) for slot in range(4)])
        assert torch.equal(loss.free[:, 0], (give >= 0.5).float())
        assert loss.free[:, 1:].all()
        frees.append(loss.free[:, 0])
    assert len(trained) == 8 > len(frees) > 0
    assert set(torch.cat(frees).tolist()) == {0, 1}


def test_validation_is_without_and_with_the_frame_which_is_then_left_out(given):
    out, seen = given
    last = max(i for i, loss in enumerate(seen) if loss.trained)
    begun = [loss for loss in seen[last + 1:] if loss.free is not None]
    assert {loss.x0.shape[2] for loss in seen[last + 1:]} == {1, 5}
    assert {loss.x0.shape[2] for loss in begun} == {5}
    clips = [loss for loss in seen[last + 1:] if loss.x0.shape[2] == 5]
    assert [loss.free is None for loss in clips] == [True, False] * len(begun)      # of each, first without
    for loss in begun:
        assert not loss.free[:, 0].any()
        assert loss.free[:, 1:].all()
    sums, counts = sum(loss.bins for loss in begun)
    line = log_of(out)[-1]
    assert line["val_loss_first_frame"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)
    assert {f"val_loss_first_frame_by_t{i}" for i in range(5)} <= line.keys()


def test_validation_without_the_frame_is_the_one_of_a_run_without(mixed, given, tmp_path):
    run(train.main, config(mixed, tmp_path / "run", steps=1, val=3, **QUIET | dict(val_every=1)))
    names = [name for name in log_of(tmp_path / "run")[0] if name.startswith("val_loss")]
    assert len(names) == 6
    for name in names:
        assert log_of(tmp_path / "run")[0][name] == log_of(given[0])[0][name]


def test_a_run_with_first_frames_says_so_and_shows_both_ways(given):
    out, _ = given
    assert meta(out)["sampling"]["first_frame"] == 0.5
    shown = json.loads((out / "samples" / "captions.json").read_text())
    rows = [told["rows"] for told in shown.values()]
    assert rows == [["text alone", "first frame given"]] * 2
    assert all(len(told["captions"]) == 2 for told in shown.values())


def test_videos_begin_with_the_frames_of_the_clips_whose_captions_they_have(mixed, monkeypatch):
    monkeypatch.setattr(train, "sample", lambda net, draw, *rest: draw(0))
    monkeypatch.setattr(train.codec, "write_clips", lambda stem, x0, *rest, **more: made.append(x0))
    made, latents = [], Latents(mixed, seed=0, batch=4, val=3)
    cfg = train.resolve(config(mixed, "nowhere", first_frame=0.5))
    world = parallel.imagine(1)._replace(device=torch.device("cpu"))
    train.show(blank("tiny"), 1, latents, cfg, world, SimpleNamespace(file=lambda *of: "nowhere", say=print))
    ids = latents.for_videos(2)
    x0, z = latents.sample(ids)[0], noise(0, "sample", 0, range(2), latents.shape_of(ids[0]))
    assert torch.equal(made[0], torch.cat([z, torch.cat([x0[:, :, :1], z[:, :, 1:]], 2)]))


def test_first_frames_are_given_alike_in_batches_of_any_size(data, tmp_path):
    cfg = config(data, tmp_path / "4", steps=3, first_frame=0.5, **QUIET)
    run(train.main, cfg)
    run(train.main, replace(cfg, out=str(tmp_path / "1"), micro_batch=1))
    close(log_of(tmp_path / "1"), log_of(tmp_path / "4"), 2e-4, "loss", "grad_norm", "val_loss_first_frame")


def test_stills_alone_have_no_first_frame_to_give(tmp_path, capsys):
    run(prepare.main, prepare.Config(clips=20, frames=1, out=str(tmp_path / "data")))
    message = refused(train.main, config(str(tmp_path / "data"), tmp_path / "run", first_frame=0.5), capsys)
    assert "holds stills alone" in message


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_stop_at_a_signal_to_one_and_one_and_four_go_on_with_the_same_stream(data, whole, tmp_path):
    """What each logs, over any number of ranks, is what one rank logs."""
    cfg = config(data, tmp_path / "two", steps=10**5, keep=100, samples=0, micro_batch=1, shard=-1)
    with started(2, train.main, cfg) as (both, printed):
        wait_until(lambda: (tmp_path / "two/ckpt").exists() and len(log_of(cfg.out)) > 2, both)
        os.kill(both.pids()[1], signal.SIGTERM)
        while not both.join():
            pass
        assert "the same command goes on" in printed.read()
    assert log_of(cfg.out)[-1]["step"] <= max(ckpt.steps(cfg.out))
    first = min(ckpt.steps(cfg.out))
    assert 2 <= first <= 3
    begun = replace(cfg, steps=first + 2, resume=str(ckpt.step_folder(cfg.out, first)))
    run(train.main, replace(begun, out=str(tmp_path / "one"), shard=1))
    ranks(4, train.main, replace(begun, out=str(tmp_path / "four"), shard=2))
    for out in (tmp_path / "two", tmp_path / "four", tmp_path / "one"):
        close(log_of(out), log_of(whole), 2e-4, "loss", "grad_norm", "val_loss")


# ---- flags that reach what they are for -----------------------------------------------------------------------------


def test_a_window_that_covers_the_grid_is_dense(data, whole, tmp_path):
    run(train.main, config(data, tmp_path / "run", steps=2, window=(9, 9, 9), tile=(2, 2, 2), samples=0))
    close(log_of(tmp_path / "run")[:3], log_of(whole)[:3], 1e-4, "loss", "grad_norm")


@pytest.mark.slow
def test_a_window_shrinks_and_each_checkpoint_says_which_it_has_come_to(data, tmp_path):
    cfg = config(data, tmp_path / "run", steps=6, save_every=2, window=(1, 1, 1), tile=(2, 2, 2), window_steps=4,
                 dense_ends=1, **QUIET)
    run(train.main, cfg)
    sparsity = [line["sparsity"] for line in log_of(cfg.out) if "sparsity" in line]
    assert sparsity == sorted(sparsity)
    assert sparsity[0] == 0
    assert sparsity[-1] > 0.7
    said = {step: meta(path)["sampling"]["window"] for step, path in ckpt.steps(cfg.out).items()}
    halfway = list(train.window_at(2, cfg, (5, 4, 4)))      # tokens of a (24, 5, 8, 8) latent
    assert said == {2: halfway, 4: [1, 1, 1], 6: [1, 1, 1]}
    assert halfway == [2, 2, 2]


@pytest.mark.slow
def test_validation_forwards_no_more_than_a_micro_batch(data, tmp_path, monkeypatch):
    sizes = spied(monkeypatch, DiT, "forward", lambda v, net, x, *rest, **more: (torch.is_grad_enabled(), len(x)))
    run(train.main, config(data, tmp_path / "run", steps=1, micro_batch=2, samples=4))
    assert set(sizes) == {(True, 2), (False, 2)}


def test_deterministic_kernels_are_asked_for(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(ckpt, "newest", full_disk)
    asked = spied(monkeypatch, torch, "use_deterministic_algorithms", lambda out, mode: mode)
    try:
        for deterministic in (False, True):
            refused(train.main, config(data, tmp_path / "run", deterministic=deterministic), capsys)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True, False]


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def adapting(data, whole, out, **flags):
    base = dict(init=str(whole), lora_rank=4, lora_alpha=6.0, lr=4e-3, samples=0, val_every=8)
    return config(data, out, **base | flags)


@pytest.fixture(scope="module")
def lora(data, whole, tmp_path_factory):
    """A run that trains adapters of the one before."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run(train.main, adapting(data, whole, out))
    return out


def test_an_adapter_starts_as_its_base(whole, lora):
    first, *_, last = log_of(lora)
    assert first["val_loss"] == pytest.approx(log_of(whole)[-1]["val_loss"], rel=1e-6)
    assert last["val_loss"] != first["val_loss"]


def test_an_adapters_checkpoint_holds_it_alone_and_says_what_it_adapts(whole, lora):
    held = state(lora)
    assert {name.split(".")[0] for name in held} == {"net", "opt", "ema", "null"}
    assert all(".lora.main." in name for name in held if name != "null")
    assert len([name for name in held if name.startswith("net.")]) == 2 * 10 * MODELS["tiny"].blocks
    assert held["net.blocks.1.ffn.2.lora.main.B"].abs().max() > 0
    base = meta(lora)["base"]
    assert base["path"] == str(ckpt.latest(whole).resolve())
    assert base["crc32"] == ckpt.read_manifest(ckpt.latest(whole))["crc32"]


def test_an_adapters_alpha_is_its_rank_unless_it_is_given():
    assert train.resolve(train.Config(init="x", lora_rank=4)).lora_alpha == 4.0
    assert train.resolve(train.Config(init="x", lora_rank=4, lora_alpha=6.0)).lora_alpha == 6.0
    assert train.resolve(train.Config()).lora_alpha is None


def test_values_that_were_worked_out_when_a_run_began_stay(data, whole, lora):
    cfg = train.resolve(config(data, whole, steps=None, decay_steps=None))
    assert (cfg.steps, cfg.decay_steps, cfg.precision) == (8, 8, "fp32")
    assert train.resolve(config(data, whole, steps=9, decay_steps=None)).decay_steps == 9       # which is refused
    assert train.resolve(adapting(data, whole, lora, lora_alpha=None)).lora_alpha == 6.0


@pytest.mark.slow
def test_an_adapters_run_stopped_and_resumed_is_the_uninterrupted_one_to_the_bit(data, whole, lora, tmp_path):
    for steps in (3, 8):
        run(train.main, adapting(data, whole, tmp_path / "run", steps=steps))
    assert same(state(tmp_path / "run"), state(lora))


def test_an_adapter_goes_on_with_its_base_wherever_that_is_and_with_no_other(data, whole, lora, tmp_path, capsys):
    base, run_ = copied(whole, tmp_path / "base"), copied(lora, tmp_path / "run")
    cfg = adapting(data, base, run_, steps=9, val_every=0)
    given = {"is not what": dict(init=str(whole / "ckpt/step_0000006")), "--lora_rank=2 (was 4)": dict(lora_rank=2),
             "nowhere": dict(init=str(tmp_path / "nowhere"))}
    for said, flags in given.items():
        assert said in refused(train.main, replace(cfg, **flags), capsys)
    run(train.main, cfg)
    assert "on from step 8" in capsys.readouterr().out
    shutil.rmtree(base / "ckpt/step_0000008")           # its newest is another now
    assert "is not what" in refused(train.main, replace(cfg, steps=10), capsys)


@pytest.mark.slow
def test_an_adapter_is_sampled_as_the_weights_that_it_is_merged_into(whole, lora, tmp_path):
    export.main(export.Config(ckpt=str(lora), merge=True, format="wan", out=str(tmp_path / "merged")))
    merged, null = ckpt.weights(tmp_path / "merged"), state(lora)["null"]
    rows = {f"ema.{name}": (merged.tensor(name), 0, shape) for name, shape in merged.shapes.items()}
    ckpt.save(tmp_path / "plain", 1, rows | {"null": (null, 0, tuple(null.shape))}, meta(lora))
    videos = {}
    for name, path in {"adapter": lora, "merged": tmp_path / "plain", "base": whole}.items():
        cfg = sample.Config(ckpt=str(path), prompts=("a red circle moving left",), out=str(tmp_path / name))
        run(sample.main, cfg)
        videos[name] = (tmp_path / name / "0000_a_red_circle_moving_left.mp4").read_bytes()
    assert videos["adapter"] == videos["merged"]
    assert videos["adapter"] != videos["base"]


def test_an_adapter_beside_its_base_computes_what_the_merged_weights_do(whole, lora, tmp_path):
    def filled(net, weights, adapter=None):
        rows = {name: (p, 0, tuple(p.shape)) for name, p in net.named_parameters()}
        ckpt.fill({name: row for name, row in rows.items() if ".lora." not in name}, weights)
        if adapter:
            ckpt.fill({name: row for name, row in rows.items() if ".lora." in name}, adapter)
        return net

    adapted = DiT(MODELS["tiny"])
    add_lora(adapted, "main", 4, 6.0)
    filled(adapted, ckpt.weights(whole), ckpt.role_of(ckpt.stored(lora), "ema"))
    merged = filled(DiT(MODELS["tiny"]), ckpt.weights(lora))
    x, t, cond = torch.randn(2, 24, 5, 8, 8), torch.rand(2), Cond(torch.randn(2, 8, 64))
    with torch.no_grad():
        v = merged(x, t, cond)
        assert (adapted(x, t, cond, lora="main") - v).norm() < 1e-5 * v.norm()
        assert (adapted(x, t, cond) - v).norm() > 1e-3 * v.norm()


def lora_file(folder, alpha=None, modules=("self_attn.q", "ffn.2"), ranks=(3,)):
    """An adapter of others for some modules of the tiny model -> its path."""
    shapes, held = {name: tuple(p.shape) for name, p in blank("tiny").named_parameters()}, {}
    for i, name in enumerate(name for name in shapes if name.removesuffix(".weight").endswith(modules)):
        (outputs, inputs), rank, module = shapes[name], ranks[i % len(ranks)], name.removesuffix(".weight")
        g = torch.Generator().manual_seed(i)
        held[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=g) / 30
        held[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=g) / 30
        if alpha:
            held[f"diffusion_model.{module}.alpha"] = torch.tensor(alpha)
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "x.safetensors")
    return str(folder / "x.safetensors")


@pytest.mark.parametrize("alpha, given, runs", [(6.0, None, 6.0), (None, 1.5, 1.5)])
def test_training_goes_on_from_an_adapter_of_others_with_equal_weights(data, whole, tmp_path, alpha, given, runs):
    file = lora_file(tmp_path / "l", alpha)
    cfg = config(data, tmp_path / "run", init=str(whole), lora_init=file, lora_alpha=given, steps=1, lr=1e-12, **QUIET)
    run(train.main, cfg)
    flags = meta(cfg.out)["config"]
    assert (flags["lora_rank"], flags["lora_alpha"]) == (3, runs)
    mine, theirs = ckpt.weights(cfg.out), ckpt.folded(ckpt.weights(whole), ckpt.lora(file))
    assert all(torch.allclose(mine.tensor(name), theirs.tensor(name), atol=1e-6) for name in theirs.shapes)
    q = "blocks.0.self_attn.q.weight"
    assert (mine.tensor(q) - ckpt.weights(whole).tensor(q)).abs().max() > 1e-4
    held = state(cfg.out)
    assert held["net.blocks.0.self_attn.k.lora.main.A"].abs().max() > 0     # it can learn


def test_a_run_from_an_adapter_goes_on_without_its_file_but_from_no_other(data, whole, tmp_path, capsys):
    file = lora_file(tmp_path / "l")
    cfg = config(data, tmp_path / "run", init=str(whole), lora_init=file, steps=1, **QUIET)
    run(train.main, cfg)
    lora_file(tmp_path / "l", modules=("self_attn.v",))
    assert f"--lora_init={file} (is not what {file} was)" in refused(train.main, replace(cfg, steps=2), capsys)
    shutil.move(tmp_path / "l", tmp_path / "moved")
    run(train.main, replace(cfg, steps=2))
    assert "on from step 1" in capsys.readouterr().out


@pytest.mark.parametrize("made, flags, said", [
    (dict(), dict(lora_rank=4), "--lora_rank=4, but --lora_init=.* is of rank 3: leave the rank out"),
    (dict(ranks=(3, 5)), dict(), r"has modules of ranks \[3, 5\]: one rank is trained"),
    (dict(), dict(init=None), "adapters need weights to adapt, which --init names"),
    (dict(), dict(lora_init="nowhere"), "no weights at nowhere"),
    (dict(modules=("head.head", "ffn.2")), dict(), "no Linear of .*: diffusion_model.head.head.lora_A.weight"),
])
def test_an_adapter_that_cannot_be_gone_on_from_is_refused(data, whole, tmp_path, capsys, made, flags, said):
    cfg = config(data, tmp_path / "run", init=str(whole), lora_init=lora_file(tmp_path / "l", **made))
    assert re.search(said, refused(train.main, replace(cfg, **flags), capsys))
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_a_run_of_ours_is_gone_on_from_too(data, whole, lora, tmp_path):
    cfg = config(data, tmp_path / "run", init=str(whole), lora_init=str(lora), steps=1, lr=1e-12, **QUIET)
    run(train.main, cfg)
    mine, theirs = state(tmp_path / "run"), state(lora)
    names = [name for name in theirs if name.startswith("ema.")]
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in names)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_merged(data, lora, tmp_path):
    run(train.main, config(data, tmp_path / "next", steps=1, init=str(lora), samples=0))
    assert log_of(tmp_path / "next")[0]["val_loss"] == pytest.approx(log_of(lora)[-1]["val_loss"], rel=1e-5)


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED = [  # flags, what the message says
    (dict(batch=3, micro_batch=2), "batch"),
    (dict(data=("nowhere",)), "prepare.py"),
    (dict(mix=(1.0, 2.0)), "each of --data"),
    (dict(mix=(0.0,)), "each of --data"),
    (dict(mix=(math.nan,)), "each of --data"),
    (dict(mix=(math.inf,)), "each of --data"),
    (dict(model="wan-1.3b"), "tiny"),
    (dict(text_dropout=1.5), "text_dropout"),
    (dict(first_frame=1.5), "--first_frame=1.5: a share"),
    (dict(steps=0), "--steps=0 is not 1 or more"),
    (dict(keep=0), "--keep=0 is not 1 or more"),
    (dict(lr=math.nan), "--lr=nan"),
    (dict(ema=1.0), "--ema=1.0"),
    (dict(log_every=-1), "--log_every=-1 is not 0 or more"),
    (dict(shift=-1.0), "--shift=-1.0 is not above 0"),
    (dict(micro_batch=-2), "--micro_batch=-2 is below 1"),
    (dict(window=(0, 1, 1)), "window is .0, 1, 1."),
    (dict(window=(1, 1, 1), tile=(0, 2, 2)), "tile is .0, 2, 2."),
    (dict(sp=3), "--sp=3"),
    (dict(wandb="online"), "WANDB_API_KEY"),
    (dict(window_steps=5), "--window, which is not given"),
    (dict(resume="nowhere"), "nowhere"),
    (dict(init="nowhere"), "nowhere"),
    (dict(allow=("lrr",)), "lrr"),
    (dict(allow=("model",)), "--allow model: .*cannot change"),
    (dict(shard=3), "shard"),
    (dict(device="cuda"), "GPU|CUDA|cuda"),
    (dict(vae="x"), "--vae"),
    (dict(lora_rank=4), "--lora_rank=4: .*--init"),
    (dict(lora_rank=-1, init="x"), "--lora_rank=-1 is not 0 or more"),
    (dict(lora_alpha=4.0), "needs --lora_rank"),
    (dict(lora_rank=4, lora_alpha=0.0, init="x"), "above 0"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=[" ".join(f) for f, _ in REFUSED])
def test_bad_flags_are_refused_in_a_line_before_anything_is_written(data, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr("wandb.login", lambda **how: False)
    message = refused(train.main, replace(config(data, tmp_path / "run"), **flags), capsys)
    assert message.startswith("train.py: ")
    assert re.search(said, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"flags": {}}'])
def test_a_damaged_config_json_is_named_and_the_run_goes_on_without_it(data, tmp_path, capsys, content):
    cfg = config(data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    message = refused(train.main, cfg, capsys)
    assert message == (f"train.py: {tmp_path}/run/config.json is damaged: remove it, and the run goes on; only the id "
                       "of its run in wandb is lost\n")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_dataset_where_weights_are_wanted_is_named(data, tmp_path, capsys):
    message = refused(train.main, config(data, tmp_path / "run", init=data), capsys)
    assert f"{data} is a dataset, which --data= takes: a checkpoint or a run is wanted" in message


@pytest.mark.parametrize("flag, said", [("--guidence=3", "guidance"), ("--steps=many", "many"),
                                        ("--schedule=wavy", "cosine")])
def test_an_unknown_flag_and_a_wrong_value_exit_2_and_name_what_is_accepted(capsys, flag, said):
    with pytest.raises(SystemExit) as exit:
        tyro.cli(train.Config, args=[flag])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
