"""train.py and sample.py as a user runs them: exact resume, worlds of several ranks, sparse runs, refusals at the door."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ckpt
import export
import prepare
import sample
import train
from conftest import ROOT
from model import MODELS, DiT, add_lora

TIMINGS = {"seconds", "data_wait", "samples_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb"}


def run(main, cfg):
    """One process's main(cfg), in this process."""
    try:
        return main(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "shapes")
    run(prepare.main, prepare.Config(clips=60, out=out))
    return out


def config(data, out, **flags):
    base = dict(data=data, out=str(out), steps=8, decay_steps=8, batch=4, log_every=1, val_every=4, save_every=3, val=2, samples=2,
                warmup=2)
    return train.Config(**base | flags)


def shell(nproc, script, *flags, **more):
    """A command line as README has it; the caller reads .stdout."""
    launch = [sys.executable] if nproc == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, str(ROOT / script), *flags], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def signal_one_of_two(script, flags, out):
    """Two ranks, one of which is told to end once both are at work: both end, and have saved the same step."""
    both = shell(2, script, *flags)
    deadline, log = time.time() + 200, out / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 2) and both.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(both.pid), "-f", script], text=True, capture_output=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    printed, _ = both.communicate(timeout=120)
    assert both.returncode == 0 and "the same command goes on" in printed, printed
    assert log_of(out)[-1]["step"] <= ckpt.read_manifest(ckpt.latest(out))["step"]


def as_flags(cfg):
    default = type(cfg)()
    return [f"--{name}={value}" for name, value in vars(cfg).items() if value != vars(default)[name]]


def state(out):
    """Every tensor of a run's newest checkpoint."""
    source = ckpt.stored(ckpt.latest(out))
    return {name: source.tensor(name).clone() for name in source.shapes}


def log_of(out):
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(train.main, config(data, out))
    return out


def test_a_run_leaves_its_log_curves_videos_and_checkpoints(whole):
    lines = log_of(whole)
    assert [line["step"] for line in lines] == list(range(9))
    assert "val_loss" in lines[0] and "loss" not in lines[0] and {"loss", "val_loss", "lr", "grad_norm", "skipped"} <= lines[8].keys()
    assert sorted(p.name for p in (whole / "samples").iterdir()) == ["step_0000004.mp4", "step_0000008.mp4"]
    assert (whole / "curves.png").stat().st_size > 1000
    assert sorted(p.name for p in (whole / "ckpt").iterdir()) == ["step_0000003", "step_0000006", "step_0000008"]
    flags = json.loads((whole / "config.json").read_text())["flags"]
    assert flags["lr"] == 8e-3 and flags["ema"] == 0.995    # the model's row, resolved
    assert not same({"w": state(whole)["net.head.head.weight"]}, {"w": state(whole)["ema.head.head.weight"]})


def test_a_run_stopped_twice_and_resumed_is_the_uninterrupted_run_to_the_bit(data, whole, tmp_path, monkeypatch):
    """Stopped by a signal between two saves, then right after one; the last part starts from a checkpoint off the schedule."""
    steps = iter((2, 3))
    original = train.train_step

    def interrupted(*args, **more):
        interrupted.left -= 1
        if interrupted.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    monkeypatch.setattr(train, "train_step", interrupted)
    for interrupted.left in (*steps, 99):
        run(train.main, config(data, tmp_path / "run"))
    assert same(state(tmp_path / "run"), state(whole))
    assert log_of(tmp_path / "run") == log_of(whole)


def test_a_run_killed_without_warning_goes_on_from_its_last_save(data, whole, tmp_path):
    cfg = config(data, tmp_path / "run")
    process = shell(1, "train.py", *as_flags(cfg))
    deadline = time.time() + 120
    while not (tmp_path / "run/ckpt/step_0000003").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')     # what a later step had logged, and half a line
    again = shell(1, "train.py", *as_flags(cfg))
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "on from step" in printed, printed
    mine, theirs = state(tmp_path / "run"), state(whole)
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-5) for n in theirs)     # one thread there, two here: not the same bits
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(9))


def test_two_ranks_save_and_one_and_four_go_on_with_the_same_stream(data, whole, tmp_path):
    flags = as_flags(config(data, tmp_path / "run", steps=3, micro_batch=1, shard=-1))
    first = shell(2, "train.py", *flags)
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 0, printed
    subprocess.run(["cp", "-r", tmp_path / "run", tmp_path / "four"], check=True)
    flags = as_flags(config(data, tmp_path / "four", steps=6, micro_batch=1, shard=2))
    four = shell(4, "train.py", *flags)
    run(train.main, config(data, tmp_path / "run", steps=6))
    printed, _ = four.communicate(timeout=300)
    assert four.returncode == 0, printed
    want = {line["step"]: line for line in log_of(whole)}
    for out in (tmp_path / "run", tmp_path / "four"):
        for line in log_of(out):
            for name in {"loss", "grad_norm", "val_loss"} & line.keys() & want[line["step"]].keys():
                assert line[name] == pytest.approx(want[line["step"]][name], rel=2e-4), (out, line["step"], name)


def test_a_signal_to_one_of_two_ranks_stops_both_and_nothing_is_lost(data, tmp_path):
    flags = as_flags(config(data, tmp_path / "run", steps=10**5, save_every=0, val_every=0, samples=0))
    signal_one_of_two("train.py", flags, tmp_path / "run")


def test_a_window_that_covers_the_grid_is_dense_and_a_shrinking_one_arrives(data, whole, tmp_path):
    run(train.main, config(data, tmp_path / "covers", steps=2, window=(9, 9, 9), tile=(2, 2, 2)))
    want = log_of(whole)
    for a, b in zip(log_of(tmp_path / "covers"), want[:3]):
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in {"loss", "grad_norm"} & a.keys())
    run(train.main, config(data, tmp_path / "sparse", window=(1, 1, 1), tile=(2, 2, 2), window_steps=4, dense_ends=1))
    sparsity = [line["sparsity"] for line in log_of(tmp_path / "sparse") if "sparsity" in line]
    assert sparsity[0] == 0 and sparsity[-1] == max(sparsity) > 0.7 and sparsity == sorted(sparsity)


def test_updates_that_are_not_finite_are_skipped_counted_and_at_last_fatal(data, tmp_path, monkeypatch, capsys):
    original = train.flow_loss
    calls = []

    def broken(*args, **more):
        calls.append(1)
        loss, seen = original(*args, **more)
        return (loss * float("nan"), seen) if torch.is_grad_enabled() and len(calls) % 2 else (loss, seen)

    monkeypatch.setattr(train, "flow_loss", broken)
    run(train.main, config(data, tmp_path / "run", steps=4, val=0, val_every=0, samples=0))
    assert log_of(tmp_path / "run")[-1]["skipped"] == 2 and "update skipped; samples [" in capsys.readouterr().out
    monkeypatch.setattr(train, "flow_loss", lambda *args, **more: (original(*args, **more)[0] * float("nan"), {"loss": torch.zeros(())}) if torch.is_grad_enabled() else original(*args, **more))
    monkeypatch.setattr(train, "SKIPS", 3)
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        run(train.main, config(data, tmp_path / "bad", val_every=0, samples=0))


def test_a_run_starts_from_exported_weights(data, whole, tmp_path):
    run(train.main, config(data, tmp_path / "run", steps=1, init=str(whole), val_every=1))
    assert log_of(tmp_path / "run")[0]["val_loss"] == pytest.approx(log_of(whole)[-1]["val_loss"], rel=1e-5)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def adapting(data, whole, out, **flags):
    return config(data, out, **dict(init=str(whole), lora_rank=4, lora_alpha=6.0, lr=4e-3, samples=0, val_every=8) | flags)


@pytest.fixture(scope="module")
def lora(data, whole, tmp_path_factory):
    """A run that trains adapters of the one before."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run(train.main, adapting(data, whole, out))
    return out


def test_an_adapter_starts_as_its_base_and_the_checkpoint_holds_it_alone(whole, lora):
    lines, held = log_of(lora), state(lora)
    assert lines[0]["val_loss"] == pytest.approx(log_of(whole)[-1]["val_loss"], rel=1e-6) != lines[-1]["val_loss"]
    assert {name.split(".")[0] for name in held} == {"net", "opt", "ema", "null"}
    assert all(".lora.main." in name for name in held if name != "null")
    assert len([name for name in held if name.startswith("net.")]) == 2 * 10 * 4 and held["net.blocks.3.ffn.2.lora.main.B"].abs().max() > 0
    base = ckpt.read_manifest(ckpt.latest(lora))["meta"]["base"]
    assert train.resolve(train.Config(init="x", lora_rank=4)).lora_alpha == 4.0 and train.resolve(train.Config()).lora_alpha is None
    assert base["path"] == str(ckpt.latest(whole).resolve()) and base["crc32"] == ckpt.read_manifest(ckpt.latest(whole))["crc32"]


def test_an_adapters_run_stopped_and_resumed_is_the_uninterrupted_one_to_the_bit(data, whole, lora, tmp_path):
    for steps in (3, 8):
        run(train.main, adapting(data, whole, tmp_path / "run", steps=steps))
    assert same(state(tmp_path / "run"), state(lora))


def test_an_adapter_is_refused_another_base_on_resume(data, whole, tmp_path, capsys):
    base = tmp_path / "base"
    subprocess.run(["cp", "-r", whole, base], check=True)
    run(train.main, adapting(data, base, tmp_path / "run", steps=1))
    run(train.main, config(data, base, steps=9))        # the base goes on
    for flags, said in ((dict(), "is not what"), (dict(init=str(whole / "ckpt/step_0000006")), "is not what"), (dict(lora_rank=2), "--lora_rank=2 (was 4)")):
        with pytest.raises(SystemExit):
            run(train.main, adapting(data, base, tmp_path / "run", **flags))
        assert said in capsys.readouterr().err
    run(train.main, adapting(data, whole, tmp_path / "run", steps=2))       # the same weights elsewhere
    assert "on from step 1" in capsys.readouterr().out


def test_what_is_sampled_exported_and_started_from_is_the_base_with_its_adapter(data, whole, lora, tmp_path):
    export.main(export.Config(ckpt=str(lora), merge=True, format="wan", out=str(tmp_path / "merged")))
    merged, null = ckpt.weights(tmp_path / "merged"), state(lora)["null"]
    ckpt.save(tmp_path / "plain", 1, {f"ema.{n}": (merged.tensor(n), 0, s) for n, s in merged.shapes.items()} | {"null": (null, 0, tuple(null.shape))},
              ckpt.read_manifest(ckpt.latest(lora))["meta"])
    for name, path in (("a", lora), ("b", tmp_path / "plain"), ("base", whole)):
        run(sample.main, sample.Config(ckpt=str(path), prompts=("a red circle moving left",), steps=3, out=str(tmp_path / name)))
    a, b, base = ((tmp_path / name / "0000_a_red_circle_moving_left.mp4").read_bytes() for name in ("a", "b", "base"))
    assert a == b != base

    nets = {}
    for name in ("adapted", "merged"):
        nets[name] = net = DiT(MODELS["tiny"])
        if name == "adapted":
            add_lora(net, "main", 4, 6.0)
        rows = {n: (p, 0, tuple(p.shape)) for n, p in net.named_parameters()}
        adapter = {n: rows.pop(n) for n in list(rows) if ".lora." in n}
        ckpt.fill(rows, ckpt.weights(whole) if adapter else merged)
        ckpt.fill(adapter, ckpt.role_of(ckpt.stored(ckpt.latest(lora)), "ema")) if adapter else None
    x, t, text = torch.randn(2, 24, 5, 8, 8), torch.rand(2), torch.randn(2, 8, 64)
    with torch.no_grad():
        v = nets["merged"](x, t, text)
        assert (nets["adapted"](x, t, text, lora="main") - v).norm() < 1e-5 * v.norm() and (nets["adapted"](x, t, text) - v).norm() > 1e-3 * v.norm()

    run(train.main, config(data, tmp_path / "next", steps=1, init=str(lora)))
    assert log_of(tmp_path / "next")[0]["val_loss"] == pytest.approx(log_of(lora)[-1]["val_loss"], rel=1e-5)


REFUSED = [  # flags, what the message says
    (dict(batch=3, micro_batch=2), "batch"),
    (dict(data="nowhere"), "prepare.py"),
    (dict(model="wan-1.3b"), "tiny"),
    (dict(text_dropout=1.5), "text_dropout"),
    (dict(steps=0), "--steps=0 is not 1 or more"),
    (dict(lr=math.nan), "--lr=nan"),
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
    (dict(shard=3), "shard"),
    (dict(device="cuda"), "GPU|CUDA|cuda"),
    (dict(lora_rank=4), "--lora_rank=4: .*--init"),
    (dict(lora_rank=-1, init="x"), "--lora_rank=-1 is not 0 or more"),
    (dict(lora_alpha=4.0), "needs --lora_rank"),
    (dict(lora_rank=4, lora_alpha=0.0, init="x"), "above 0"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=[" ".join(f) for f, _ in REFUSED])
def test_bad_flags_are_refused_in_a_line_before_anything_is_written(data, tmp_path, capsys, monkeypatch, flags, said):
    import re
    monkeypatch.setattr("wandb.login", lambda **how: False)
    cfg = config(data, tmp_path / "run")
    with pytest.raises(SystemExit) as refused:
        run(train.main, replace(cfg, **flags))
    message = capsys.readouterr().err
    assert refused.value.code == 2 and re.search(said, message) and message.startswith("train.py: ")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_left_alone_and_a_finished_one_says_so(data, whole, tmp_path, capsys):
    before = log_of(whole)
    for flags, said in ((dict(lr=1e-3), "--lr=0.001 (was 0.008)"), (dict(seed=1), "--seed=1"), (dict(decay_steps=9), "--decay_steps=9")):
        with pytest.raises(SystemExit):
            run(train.main, replace(config(data, whole), **flags))
        message = capsys.readouterr().err
        assert said in message and "--out=" in message and "--allow" in message
    run(prepare.main, prepare.Config(clips=61, out=str(tmp_path / "data")))
    with pytest.raises(SystemExit):
        run(train.main, config(str(tmp_path / "data"), whole))
    assert "data (is not what" in capsys.readouterr().err
    run(train.main, config(data, whole))
    assert "is finished" in capsys.readouterr().out and log_of(whole) == before


def test_a_run_begun_from_anothers_checkpoint_goes_on_by_the_same_command(data, whole, tmp_path, capsys):
    cfg = config(data, tmp_path / "run", resume=str(whole / "ckpt/step_0000003"))
    run(train.main, replace(cfg, steps=5))
    run(train.main, cfg)                                # from its own step 5, not from 3 again
    assert "on from step 5" in capsys.readouterr().out and same(state(tmp_path / "run"), state(whole))
    assert [line["step"] for line in log_of(tmp_path / "run")] == [4, 5, 6, 7, 8]
    before = (tmp_path / "run/log.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(train.main, replace(cfg, resume=str(tmp_path / "run/ckpt/step_0000005")))
    assert "has gone on to step_0000008" in capsys.readouterr().err
    assert (tmp_path / "run/log.jsonl").read_bytes() == before


def test_an_unknown_flag_and_a_wrong_type_exit_2_and_name_what_is_accepted():
    for flags, said in ((["--guidence=3"], "guidance"), (["--steps=many"], "many"), (["--schedule=wavy"], "cosine")):
        process = shell(1, "train.py", *flags)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and said in printed


def test_sampling_needs_the_checkpoint_alone_and_repeats_itself(whole, tmp_path, capsys):
    cfg = sample.Config(ckpt=str(whole), prompts=("a red circle moving left", "a blue zeppelin"), steps=2, batch=1)
    run(sample.main, replace(cfg, out=str(tmp_path / "a")))
    run(sample.main, replace(cfg, out=str(tmp_path / "b"), batch=2, guidance=1.0))
    run(sample.main, replace(cfg, out=str(tmp_path / "c"), batch=2))
    assert "a/" in capsys.readouterr().out and (tmp_path / "a/sheet.png").stat().st_size > 1000
    names = sorted(p.name for p in (tmp_path / "a").glob("*.mp4"))
    assert names == ["0000_a_red_circle_moving_left.mp4", "0001_a_blue_zeppelin.mp4"]
    read = lambda folder: [(tmp_path / folder / name).read_bytes() for name in names]  # noqa: E731
    assert read("a") == read("c") != read("b")      # the noise belongs to the video, whatever the batch; guidance counts


@pytest.mark.parametrize("flags, said", [(dict(prompts=()), "prompts"), (dict(prompts=("one two three four five six seven eight",)), "words|tokens"),
                                         (dict(ckpt="nowhere"), "nowhere"), (dict(size=(16, 32, 32)), "--size 16"), (dict(vae="x"), "vae"),
                                         (dict(steps=0), "--steps=0"), (dict(shift=0.0), "--shift=0.0"),
                                         (dict(guidance=1.0, negative="a"), "--negative does nothing")])
def test_sampling_refuses_what_it_cannot_do(whole, tmp_path, capsys, flags, said):
    import re
    with pytest.raises(SystemExit) as refused:
        run(sample.main, replace(sample.Config(ckpt=str(whole), prompts=("a",), out=str(tmp_path / "s")), **flags))
    assert refused.value.code == 2 and re.search(said, capsys.readouterr().err) and not (tmp_path / "s").exists()


def test_the_largest_bucket_is_sampled_unless_a_size_is_given():
    how = {"model": "tiny", "shapes": [[24, 5, 8, 8], [24, 5, 16, 8]]}
    assert sample.latent_shape(None, how, sample.Config()) == (24, 5, 16, 8)


def test_a_flipped_sample_of_the_dataset_stops_the_run_by_name(data, tmp_path):
    subprocess.run(["cp", "-r", data, tmp_path / "data"], check=True)
    file = next((tmp_path / "data").glob("24x5x8x8*.bin"))
    content = np.fromfile(file, np.uint8)
    content[::4096] ^= 1
    content.tofile(file)
    with pytest.raises(ValueError, match=file.name):
        run(train.main, config(str(tmp_path / "data"), tmp_path / "run"))
