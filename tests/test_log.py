"""A run's folder: what is written, what a resumed run finds, what is never written."""
import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch

import codec
import log as logs
from log import MACHINE, Clock, Log, check_wandb, circumstances, curves, holds, panel, peak, running_mean


def read(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def train(out, start, stop, steps=100, killed=False):
    """A run of 100 steps that validates every 25 and logs every 10, up to `stop`; killed: without its end."""
    log = Log(out, {"lr": 1e-3}, step=start, steps=steps)
    for step in range(start, stop + 1):
        if step % 25 == 0 and (step > start or step == 0):
            log(step, val_loss=1 / (1 + step))
        if step < stop and (step + 1) % 10 == 0:
            log(step + 1, loss=2 / (1 + step), grad_norm=torch.tensor(0.5), seconds=0.1)
    if killed:
        log.jsonl.close()
    else:
        log.close()


def test_calls_for_one_step_make_one_object(tmp_path):
    train(tmp_path, 0, 100)
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [0, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100]
    assert lines[6] == {"step": 50, "loss": 2 / 50, "grad_norm": 0.5, "seconds": 0.1, "val_loss": 1 / 51}
    log = Log(tmp_path, {}, step=100, steps=100)
    log(100, loss=0.5, grad_norm=2)     # shorter than what it replaces
    assert read(tmp_path)[-1] == {"step": 100, "loss": 0.5, "grad_norm": 2, "seconds": 0.1, "val_loss": 1 / 101}


@pytest.mark.slow
@pytest.mark.parametrize("saved, died", [(50, 50), (50, 73), (30, 73), (0, 44), (100, 100)])
def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path, saved, died):
    train(tmp_path / "whole", 0, 100)
    train(tmp_path / "resumed", 0, died, killed=True)
    train(tmp_path / "resumed", saved, 100)
    assert (tmp_path / "resumed/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("tail", [b'{"step": 60, "lo', b"\0" * 40, b'{"step": 60}\n', b'{"step": 50}'])
def test_a_line_torn_by_a_crash_is_cut_off(tmp_path, tail):
    train(tmp_path / "whole", 0, 100)
    train(tmp_path / "torn", 0, 55, killed=True)
    with open(tmp_path / "torn/log.jsonl", "ab") as file:
        file.write(tail)
    train(tmp_path / "torn", 50, 100)
    assert (tmp_path / "torn/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_what_is_not_finite_is_null_and_every_type_is_json(tmp_path):
    log = Log(tmp_path, {}, steps=1)
    log(1, loss=math.nan, grad_norm=torch.tensor(math.inf), bins=torch.tensor([1.0, math.nan]), t=np.float32(0.5),
        n=np.int64(3), lr=1e-3, skipped=True, name="x")
    log.close()
    assert read(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "bins": [1.0, None], "t": 0.5, "n": 3,
                               "lr": 1e-3, "skipped": True, "name": "x"}]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_log_knows_which_numbers_it_holds(tmp_path):
    assert not holds(tmp_path, 25, "val_loss")      # no log yet
    train(tmp_path, 0, 55, killed=True)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 60, "loss": 1.0}')    # torn: its end of line is missing
    assert holds(tmp_path, 25, "val_loss")
    assert holds(tmp_path, 50, "val_loss")
    assert holds(tmp_path, 50, "loss")
    assert not holds(tmp_path, 25, "loss")          # another number of that step
    assert not holds(tmp_path, 30, "val_loss")      # that number of another step
    assert not holds(tmp_path, 60, "loss")
    log = Log(tmp_path, {}, step=30, steps=100)
    assert holds(tmp_path, 25, "val_loss")
    assert not holds(tmp_path, 30, "val_loss")
    assert not holds(tmp_path, 50, "loss")          # cut back
    log(50, loss=math.nan)
    assert holds(tmp_path, 50, "loss")              # measured, though not finite


class Full:
    """A log on a disk that is full before the end of what is written."""

    def __init__(self, file):
        self.file, self.seek, self.truncate, self.flush = file, file.seek, file.truncate, file.flush

    def writelines(self, lines):
        self.file.write(b"".join(lines)[:-3])
        self.close()

    def close(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [{10}, {20, 25}, {25, 30}])
def test_once_a_full_disk_has_room_again_no_line_of_the_log_is_missing(tmp_path, capsys, full):
    for out in (tmp_path / "whole", tmp_path / "run"):
        log = Log(out, {}, steps=100)
        file = log.jsonl
        for step in (10, 20, 25, 30, 40):
            log.jsonl = Full(file) if step in full and out.name == "run" else file
            log(step, loss=1 / step)
            log(step, grad_norm=2.0)
        log.close()
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    assert capsys.readouterr().out.count("log.jsonl could not be written, the run goes on: [Errno 28] No space") == 1


def test_a_run_ends_well_on_a_full_disk_and_one_that_goes_on_finds_the_lines_before(tmp_path):
    log = Log(tmp_path, {}, steps=100)
    log(10, loss=1.0)
    log.jsonl = Full(log.jsonl)
    log(20, loss=0.5)
    log.close()
    log.jsonl.file.close()
    assert [entry["step"] for entry in log.entries] == [10, 20]     # for curves and page
    log = Log(tmp_path, {}, step=10, steps=100)
    assert [line["step"] for line in read(tmp_path)] == [10]


# ---- time -----------------------------------------------------------------------------------------------------------

def test_a_clock_sums_by_name_and_starts_anew(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 10.0, 16.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock("seconds"):              # 0 to 4
        with clock("data_wait"):        # 1 to 3
            pass
    with clock("seconds"):              # 10 to 16
        clock.add("flops", 6)
    clock.add("flops", 2)
    taken = clock.take(2)
    assert taken == {"seconds": 5.0, "data_wait": 1.0, "flops": 4.0}
    assert list(taken) == ["seconds", "data_wait", "flops"]     # the order in which they began
    assert clock.take(3) == {"seconds": 0.0, "data_wait": 0.0, "flops": 0.0}    # ranks average the same names


# ---- circumstances --------------------------------------------------------------------------------------------------

def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert circumstances()["commit"] is None


def test_a_folder_that_is_no_repository_has_no_commit(tmp_path):
    assert logs.commit(tmp_path) is None


def test_a_source_that_cannot_be_read_ends_nothing(monkeypatch):
    def read(path):
        if path.name == "step.py":
            raise OSError(5, "Input/output error")
        return b"text"

    monkeypatch.setattr(Path, "read_bytes", read)
    sources = circumstances()["sources"]
    assert sources["step.py"] is None
    assert isinstance(sources["log.py"], int)


def test_config_says_what_it_takes_to_run_again(tmp_path):
    Log(tmp_path, {"lr": 1e-3, "window": (3, 3, 3), "init": None}, steps=1).close()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"] == {"lr": 1e-3, "window": [3, 3, 3], "init": None}
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["threads"] == torch.get_num_threads()
    assert config["commit"] is None or len(config["commit"].removesuffix("-dirty")) == 40


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = Log(tmp_path / "run", {}, steps=10, main=False)
    log(1, loss=1.0)
    log.say("hello")
    log.video(2, tmp_path / "no.mp4")
    log.draw()
    log.close()
    assert log.speed(1e12, torch.device("cpu"), "fp32")["tflops"] == 1
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_plain_lines_with_progress_and_the_time_left(tmp_path, capsys):
    log = Log(tmp_path, {"lr": 0.1, "init": None}, step=20, steps=100)
    log(50, loss=0.123456, loss_by_t0=1.0, seconds=1.0)
    log(100, val_loss=math.nan)
    log.say("done")
    log(100, likeness=0.5)
    out, err = capsys.readouterr()
    opening, first, second, third, fourth = out.splitlines()
    assert opening == f"{tmp_path}, on from step 20: lr 0.1"
    assert first.startswith("step  50/100  loss 0.1235  eta 0:0")
    assert "\r" not in out
    assert err == ""
    assert second == "step 100/100  val_loss not finite"
    assert third == "done"
    assert fourth.endswith("likeness 0.5")


def test_a_terminal_gets_one_live_line(tmp_path, monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *fd: os.terminal_size((120, 24)))
    monkeypatch.setenv("COLUMNS", "120")
    log = Log(tmp_path, {}, step=20, steps=100)
    log(50, loss=0.5, lr=1e-3)
    log.say("a video")
    log(100, loss=0.25)
    log.close()
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["a video"]
    assert "step" not in err
    assert all(part in err for part in ("20/100", "50/100", "loss 0.5  lr 0.001", "100/100"))
    assert err.count("\n") == 1


def test_curves_show_every_series_related_ones_together(tmp_path):
    log = Log(tmp_path, {}, steps=200)
    for step in range(1, 201):
        bins = {f"loss_by_t{i}": i / step for i in range(5)}
        log(step, loss=1 / step, lr=1e-3, grad_norm=math.nan if step == 7 else 1.0, **bins)
        if step % 50 == 0:
            log(step, val_loss=1 / step, skipped=0)
    log.close()
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert panel("val_loss") == panel("train_set_loss") == panel("loss") == "loss" != panel("student_loss")
    assert panel("loss_by_t0") == panel("loss_by_t4") == "loss by t" != panel("val_loss_by_t0")


@pytest.mark.parametrize("seen", [{}, {"loss": math.nan, "bins": [1.0, 2.0]}])
def test_without_finite_values_there_are_no_curves(tmp_path, seen):
    log = Log(tmp_path, {}, steps=1)
    log(1, **seen)
    log.close()
    curves(tmp_path / "curves.png", [{"step": 1, "loss": math.inf}])    # a log by another hand
    curves(tmp_path / "curves.png", [{"step": i, "loss": 1.7e308 * (-1)**i} for i in range(60)])
    assert not (tmp_path / "curves.png").exists()


def test_the_running_mean_keeps_constants_and_removes_noise():
    assert running_mean([2.0] * 100) == pytest.approx([2.0] * 100)
    assert max(map(abs, running_mean([1.0, -1.0] * 500))) < 0.05


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA GeForce RTX 9999", None),
    ("AMD Instinct MI300X", None)])
def test_the_peak_of_a_device_is_known_or_none(name, tflops):
    assert peak(name) == tflops


def test_mfu_is_given_for_bf16_on_known_devices_only(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert Log.speed(494.5e12, device, "bf16") == {"tflops": 494.5, "mfu": 0.5, "memory_gb": 5}
    assert "mfu" not in Log.speed(494.5e12, device, "fp32")
    assert "mfu" not in Log.speed(1e12, torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "something new")
    assert "mfu" not in Log.speed(494.5e12, device, "bf16")
    assert Log.speed(1e12, device, "bf16").keys() <= set(MACHINE)


def test_a_file_of_a_step_sorts_by_step(tmp_path):
    log = Log(tmp_path, {}, steps=10)
    assert log.file("samples", 500) == tmp_path / "samples/step_0000500"
    assert (tmp_path / "samples").is_dir()


# ---- the page -------------------------------------------------------------------------------------------------------

EVIL = '<script>alert("&")</script>'


class Links(HTMLParser):
    """Every tag of a page, its src and href, its titles, and its text."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.links, self.titles, self.text = [], [], [], ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text += data


def validate(log, step, captions=("a red circle",), rows=(), suffix="mp4", kind="samples"):
    path = log.file(kind, step).with_suffix(f".{suffix}")
    path.touch()
    log(step, val_loss=1 / (1 + step), val_loss_by_t0=0.25)
    log.video(step, path, captions, rows)


def test_the_page_escapes_all_text_and_its_links_are_relative_and_exist(tmp_path):
    log = Log(tmp_path / EVIL.replace("/", "|"), {"data": EVIL, "tile": (4, 4, 8), "init": None}, steps=20)
    log.about["device"] = EVIL
    log(10, loss=0.5, note=EVIL)
    validate(log, 10, captions=[EVIL, "a \ud800 half"], rows=[EVIL], kind="<b>")
    log.close()
    page = Links(log.out / "index.html")
    assert page.tags.count("script") == 0
    assert page.tags.count("b") == 0
    assert page.text.count(EVIL) == 6       # the flag, the note, the caption, the row; the device on top and below
    assert page.titles == [EVIL, "a ? half"]
    assert "4 4 8" in page.text
    assert sorted(page.links) == ["%3Cb%3E/step_0000010.mp4", "curves.png"]
    assert all((log.out / unquote(link)).is_file() for link in page.links)


def test_the_page_shows_validations_newest_first_with_their_numbers(tmp_path):
    log = Log(tmp_path, {}, steps=100)
    for step in (9, 20, 100):
        validate(log, step)
        validate(log, step, ("a", "b"), rows=("student", "teacher"), kind="inside")
    validate(log, 100, kind="aside")
    page = Links(tmp_path / "index.html")
    shown = [(100, "samples"), (100, "aside"), (100, "inside"), (20, "samples"), (20, "inside"), (9, "samples"),
             (9, "inside")]
    assert page.links == [f"{kind}/step_{step:07d}.mp4" for step, kind in shown]
    assert "step 9 val_loss 0.1" in page.text
    assert page.text.count("val_loss_by_t0") == 1      # in the last line of the log
    assert page.text.count("studentteacher") == 3
    log.close()
    assert "curves.png" in Links(tmp_path / "index.html").links


def test_the_page_of_a_resumed_run_keeps_the_validations_before_it(tmp_path):
    log = Log(tmp_path, {}, steps=100)
    for step in (25, 50, 75):
        validate(log, step, captions=[f"clip of {step}"])
    again = Log(tmp_path, {}, step=50, steps=100)
    again.draw()
    page = Links(tmp_path / "index.html")
    assert page.links == ["samples/step_0000050.mp4", "samples/step_0000025.mp4", "curves.png"]    # 75 comes again
    assert "clip of 25" in page.text
    assert "clip of 75" not in page.text
    validate(again, 75, captions=["another"])
    page = Links(tmp_path / "index.html")
    assert page.links[0] == "samples/step_0000075.mp4"
    assert all(caption in page.text for caption in ("clip of 25", "clip of 50", "another"))


def test_the_page_shows_a_video_of_a_step_without_numbers(tmp_path):
    log = Log(tmp_path, {}, steps=100)
    path = log.file("samples", 10).with_suffix(".mp4")
    path.touch()
    log.video(10, path)
    assert Links(tmp_path / "index.html").links == ["samples/step_0000010.mp4"]


def test_the_page_says_where_latents_are_that_were_not_decoded(tmp_path, capsys):
    log = Log(tmp_path, {}, steps=100)
    sent = []
    log.wandb = SimpleNamespace(log=sent.append)
    validate(log, 10, suffix="npy")
    assert [list(seen) for seen in sent] == [["step", "val_loss", "val_loss_by_t0"]]    # wandb gets no latents
    log.wandb = None
    page = Links(tmp_path / "index.html")
    assert page.links == ["samples/step_0000010.npy"]
    assert "video" not in page.tags
    assert "latents, not decoded: samples/step_0000010.npy" in page.text
    assert "step_0000010.npy" not in capsys.readouterr().out        # codec.write_clips has said so, and why
    validate(log, 10)       # a resumed run that has the decoder
    assert Links(tmp_path / "index.html").links == ["samples/step_0000010.mp4"]
    validate(log, 10, suffix="npy")     # and one that has not
    assert Links(tmp_path / "index.html").links == ["samples/step_0000010.npy"]


def test_the_page_shows_videos_of_a_run_that_noted_no_captions(tmp_path):
    log = Log(tmp_path, {}, steps=100)
    log.file("samples", 10).with_suffix(".mp4").touch()
    log.file("samples", 10).with_suffix(".npy").touch()
    (tmp_path / "samples/captions.json").write_text("torn {")
    (tmp_path / "ckpt/step_0000010").mkdir(parents=True)
    log(10, loss=1.0)
    log.close()
    assert Links(tmp_path / "index.html").links == ["samples/step_0000010.mp4", "curves.png"]


def test_the_page_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "VALIDATIONS", 3)
    log = Log(tmp_path, {}, steps=100)
    for step in (1, 2, 3):
        validate(log, step)
    assert "newest" not in Links(tmp_path / "index.html").text
    validate(log, 4)
    page = Links(tmp_path / "index.html")
    assert page.links == [f"samples/step_000000{step}.mp4" for step in (4, 3, 2)]
    assert "The newest 3 of 4 validations" in page.text


def test_a_full_disk_costs_the_page_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, {}, steps=100)
    monkeypatch.setattr(logs, "write", full)
    validate(log, 10)
    log.close()
    assert capsys.readouterr().out.count("could not be written, the run goes on: [Errno 28] No space left on device") == 2


def test_the_page_is_replaced_at_once(tmp_path, monkeypatch):
    def broken(path, other):
        raise OSError(5, "Input/output error")

    log = Log(tmp_path, {}, steps=100)
    validate(log, 10)
    page = (tmp_path / "index.html").read_bytes()
    monkeypatch.setattr(Path, "replace", broken)
    validate(log, 20)
    assert (tmp_path / "index.html").read_bytes() == page


@pytest.mark.slow
def test_a_browser_plays_the_page_from_disk(tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here: apt-get install chromium")
    log = Log(tmp_path / "a run", {"lr": 0.1}, steps=100)
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 1, 1, 3)).astype(np.uint8)
    for step, kind in [(50, "samples"), (100, "samples"), (100, "inside")]:
        path = log.file(kind, step).with_suffix(".mp4")
        codec.write_video(path, colours.repeat(32, 2).repeat(32, 3), fps=8, columns=2)
        log(step, val_loss=0.5)
        log.video(step, path, ["a red circle", EVIL], rows=["student", "teacher"])
    log.close()
    watch = """<script>addEventListener("load", () => document.title = [...document.images].map(i => i.naturalWidth > 0)
        .concat([...document.querySelectorAll("video")].map(v => v.readyState > 1 && v.videoWidth > 64)))</script>"""
    page = log.out / "watched.html"
    page.write_text((log.out / "index.html").read_text(encoding="utf-8") + watch, encoding="utf-8")
    seen = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()], capture_output=True, text=True)
    assert "<title>true,true,true,true</title>" in seen.stdout      # the curves and three videos
    assert "CONSOLE" not in seen.stderr


# ---- wandb ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_wandb_offline_records_and_its_id_goes_on(tmp_path):
    pytest.importorskip("wandb")
    log = Log(tmp_path, {"lr": 1e-3}, steps=20, wandb="offline")
    log(10, loss=0.5)
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 100)
    log.video(10, tmp_path / "clip.mp4", ["a red circle"])
    log.close()
    again = Log(tmp_path, {"lr": 1e-3}, step=10, steps=20, wandb="offline")
    again(20, loss=math.nan)
    again.close()
    name = json.loads((tmp_path / "config.json").read_text())["wandb"]
    assert {path.name.rsplit("-", 1)[-1] for path in (tmp_path / "wandb").glob("offline-run-*")} == {name}


def test_the_id_of_a_wandb_run_outlives_a_resume_without_wandb(tmp_path):
    Log(tmp_path, {}, steps=20).close()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"wandb": "abc"}))
    Log(tmp_path, {}, steps=20).close()
    assert json.loads((tmp_path / "config.json").read_text())["wandb"] == "abc"


def test_sources_versions_and_threads_that_changed_since_the_last_start_are_named(tmp_path, capsys, monkeypatch):
    Log(tmp_path, {}, steps=20).close()
    Log(tmp_path, {}, step=10, steps=20).close()
    assert "changed since" not in capsys.readouterr().out
    before = json.loads((tmp_path / "config.json").read_text())
    before["sources"] |= {"step.py": 0, "gone.py": 1}
    before |= {"threads": 99, "versions": before["versions"] | {"torch": "1.0"}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    Log(tmp_path, {}, step=10, steps=20).close()
    now = json.loads((tmp_path / "config.json").read_text())
    assert (f"changed since the run was last started: gone.py, step.py, torch 1.0 -> {now['versions']['torch']}, "
            f"threads 99 -> {now['threads']}\n") in capsys.readouterr().out


def test_wandb_online_without_a_login_is_an_error_and_never_a_question(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = {}
    monkeypatch.setattr(wandb, "login", lambda **options: asked.update(options))
    with pytest.raises(RuntimeError, match="wandb login.*WANDB_API_KEY.*--wandb=offline"):
        check_wandb("online")
    check_wandb("offline"), check_wandb("off"), check_wandb(False)
    assert asked == {"prompt": False}
