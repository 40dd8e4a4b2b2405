"""sample.py: a checkpoint and words become videos, the same over any number of ranks, in bounded memory."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ckpt
import codec
import export
import films
import parallel
import plan
import sample
import step
from conftest import ROOT
from data import noise, padded
from helpers import cheaply, kept_in, refused, run, shapes_dataset, spied
from model import MODELS, Chunked, Cond, blank, chunked, token_grid

PROMPTS = ("a red circle moving left", "a blue zeppelin", "a green square moving up")
NAMES = ["0000_a_red_circle_moving_left.mp4", "0001_a_blue_zeppelin.mp4",
         "0002_a_green_square_moving_up.mp4"]
SAMPLING = {
    "codec": codec.load("dct").spec, "mean": [0.1] * 24, "std": [0.2] * 24, "fps": 8, "model": "tiny",
    "shapes": [[24, 2, 4, 4], [24, 5, 8, 8]], "text": {"length": 8, "width": 64}, "window": None,
    "tile": [4, 4, 8], "dense_ends": 0, "sampler": "euler", "steps": 2, "shift": 1.0, "guidance": 2.0}
STUDENT = {name: value for name, value in SAMPLING.items() if name != "steps"} | {
    "sampler": "rollout", "times": [1.0, 0.75, 0.5], "guidance": 1.0}


TINY, GRID = MODELS["tiny"], codec.grid     # as they are, before `cheap`


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Runs take a third of the time: a narrower net, pictures twice as large, not 8 times, sheets of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        patch.setattr("codec.grid", lambda pictures, *columns: pictures[0].repeat(2, 0).repeat(2, 1))
        patch.setattr("codec.contact_sheet", lambda path, clips, captions:
                      path.write_bytes(b"".join(map(bytes, clips))))
        yield


def saved(out, sampling):
    """A run's folder with one checkpoint of random weights, as a trainer leaves it."""
    rows = {}
    for i, role in enumerate(("net", "ema", "opt")):
        rng = torch.Generator().manual_seed(i)
        for name, p in blank("tiny").named_parameters():
            value = torch.randn(p.shape, generator=rng) * 0.05
            rows[f"{role}.{name}"] = parallel.Part(value, 0, tuple(p.shape))
    null = torch.randn(8, 64, generator=rng)
    rows["null"] = parallel.Part(null, 0, tuple(null.shape))
    ckpt.save(out, 3, rows, {"sampling": json.loads(json.dumps(sampling)), "config": {}}, keep=1)
    return str(out)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("teacher") / "run", SAMPLING)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("student") / "run", STUDENT)


def config(path, out, **given):
    given = dict(prompts=PROMPTS, device="cpu") | given
    return sample.Config(ckpt=path, out=str(out), **given)


def videos(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


@pytest.fixture
def asked(monkeypatch):
    """What the sampler was asked for: a list of (net, noises, cond, uncond, sampling)."""
    calls, original = [], sample.step.sample

    def recorded(net, draw, cond, uncond, sampling, free=None):
        noises = []
        calls.append((net, noises, cond, uncond, sampling))
        return original(net, kept_in(noises, draw), cond, uncond, sampling, free)

    monkeypatch.setattr(sample.step, "sample", recorded)
    return calls


# ---- what is sampled ------------------------------------------------------------------------------------------------


def test_sampling_needs_the_checkpoint_alone_and_repeats_itself(teacher, tmp_path, capsys):
    cfg = config(teacher, tmp_path / "a", batch=1)
    run(sample.main, cfg)
    assert f"3 videos and sheet.png are in {tmp_path / 'a'}/" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*NAMES, "sheet.png"]
    run(sample.main, replace(cfg, out=str(tmp_path / "b"), batch=2))
    assert videos(tmp_path / "b") == videos(tmp_path / "a")     # the noise belongs to the video
    run(sample.main, replace(cfg, out=str(tmp_path / "c"), guidance=1.0))
    assert videos(tmp_path / "c").keys() == videos(tmp_path / "a").keys()
    for name, content in videos(tmp_path / "c").items():
        assert content != videos(tmp_path / "a")[name]


def test_each_video_gets_its_own_noise_prompt_and_the_null_text(teacher, tmp_path, asked):
    run(sample.main, config(teacher, tmp_path / "s", n=2, prompts=PROMPTS[:2], batch=3, seed=7))
    words, shape = codec.load("dct").embed(PROMPTS[:2]), (24, 2, 4, 4)
    null = ckpt.stored(teacher).tensor("null")
    assert len(asked) == 2
    for places, (_, noises, cond, uncond, sampling) in zip(([0, 1, 2], [3]), asked):
        assert len(noises) == 1
        assert torch.equal(noises[0], noise(7, "sample", 0, places, shape))
        assert type(cond) is Cond and cond.text.shape == (len(places), 8, 64)
        for i, text in zip(places, cond.text):
            row = words[i // 2]
            assert torch.equal(text[:len(row)], row)
            assert not text[len(row):].any()
        assert torch.equal(uncond.text, null.expand(len(places), 8, 64))
        assert sampling == SAMPLING


def test_a_student_gets_a_noise_for_each_of_its_times(student, tmp_path, asked):
    run(sample.main, config(student, tmp_path / "s", batch=8))
    (_, noises, _, _, sampling), = asked
    assert len(noises) == 3
    for k, e in enumerate(noises):
        assert torch.equal(e, noise(0, "sample", k, range(3), (24, 2, 4, 4)))
    assert sampling == STUDENT


def test_a_video_is_what_the_codec_makes_of_the_latents_without_their_normalisation(
        teacher, tmp_path, monkeypatch):
    x0 = torch.randn(2, 24, 2, 4, 4)
    shown, write = [], codec.write_video

    def watched(path, clips, fps):
        assert fps == 8
        shown.extend(clips)
        write(path, clips, fps)

    monkeypatch.setattr(sample.step, "sample", lambda *args: x0)
    monkeypatch.setattr(codec, "write_video", watched)
    run(sample.main, config(teacher, tmp_path / "s", prompts=PROMPTS[:2]))
    for video, z in zip(shown, x0, strict=True):
        assert np.array_equal(video, codec.load("dct").decode(z * 0.2 + 0.1))


def test_flags_change_the_sampler_and_a_negative_prompt_takes_the_place_of_null(
        teacher, tmp_path, asked):
    run(sample.main, config(teacher, tmp_path / "s", prompts=PROMPTS[:1], steps=3, guidance=4.0, shift=2.0,
               negative="a blue square"))
    (_, _, _, uncond, sampling), = asked
    assert sampling == SAMPLING | dict(steps=3, guidance=4.0, shift=2.0)
    row, = codec.load("dct").embed(["a blue square"])
    assert torch.equal(uncond.text[0, :len(row)], row)
    assert not uncond.text[0, len(row):].any()


def test_prompts_come_from_a_file_too_and_empty_lines_do_not(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{PROMPTS[1]}\r\n\n  \n{PROMPTS[2]}\n".encode())
    cfg = config(teacher, "", prompts=PROMPTS[:1], file=str(tmp_path / "prompts.txt"), n=2)
    assert sample.asked_of(cfg) == [[prompt for prompt in PROMPTS for _ in range(2)], [None] * 6]


def test_the_first_bucket_is_sampled_unless_a_size_is_given():
    assert sample.latent_shape(SAMPLING, sample.Config()) == (24, 2, 4, 4)      # not the largest
    assert sample.latent_shape(SAMPLING, sample.Config(size=(9, 24, 40))) == (24, 3, 6, 10)


REFUSED = [
    (dict(prompts=()), "0 prompts"),
    (dict(n=0), "--n=0"),
    (dict(batch=0), "--batch=0"),
    (dict(prompts=("one two three four five six seven eight",)), "8 words"),
    (dict(ckpt="nowhere"), "nowhere"),
    (dict(file="nowhere.txt"), "nowhere.txt"),
    (dict(size=(16, 32, 32)), "--size 16 32 32: frames are 1 . a multiple of 4, height of 8"),
    (dict(size=(17, 36, 32)), "--size 17 36"),
    (dict(vae="x"), "--vae"),
    (dict(text="x"), "--text"),
    (dict(steps=0), "--steps=0"),
    (dict(shift=0.0), "--shift=0.0"),
    (dict(guidance=math.inf), "--guidance=inf"),
    (dict(guidance=1.0, negative="a"), "--negative does nothing"),
]


@pytest.mark.parametrize("given, words", REFUSED, ids=[" ".join(given) for given, _ in REFUSED])
def test_what_cannot_be_sampled_is_refused_in_a_line(teacher, tmp_path, capsys, given, words):
    with pytest.raises(SystemExit) as refused:
        run(sample.main, replace(config(teacher, tmp_path / "s"), **given))
    assert refused.value.code == 2
    assert re.search(f"sample.py: .*{words}", capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


def test_a_students_times_cannot_be_chosen(student, tmp_path, capsys):
    for given in (dict(steps=3), dict(guidance=2.0), dict(shift=2.0), dict(solver="ab2")):
        with pytest.raises(SystemExit):
            run(sample.main, config(student, tmp_path / "s", **given))
        message = capsys.readouterr().err
        assert f"without guidance: {', '.join(given)} cannot be chosen" in message


def test_a_prompt_longer_than_the_model_was_trained_with_is_refused(tmp_path, capsys):
    path = saved(tmp_path / "run", SAMPLING | {"text": {"length": 4, "width": 64}})
    with pytest.raises(SystemExit):
        run(sample.main, config(path, tmp_path / "s"))
    message = capsys.readouterr().err
    assert "'a red circle moving left' has 6 tokens, the model was trained with 4 at most" in message


# ---- over ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(r, n, cfg): what rank r of n does, in this process, the others being imagined."""
    start = parallel.init

    def play(rank, size, cfg):
        monkeypatch.setattr(parallel, "init", lambda *args, **named:
                            start(*args, **named)._replace(rank=rank, size=size))
        monkeypatch.setattr(parallel, "agree", lambda x, world: x)
        run(sample.main, cfg)

    return play


def test_ranks_divide_the_videos_and_embed_no_others(teacher, tmp_path, as_rank, monkeypatch):
    run(sample.main, config(teacher, tmp_path / "one"))
    embedded, load = [], codec.load

    def watched(spec, **parts):
        coder = load(spec, **parts)
        return coder._replace(embed=lambda prompts: embedded.extend(prompts) or coder.embed(prompts))

    monkeypatch.setattr(codec, "load", watched)
    monkeypatch.setattr(ckpt, "verify", lambda path, *args, **ranks: ckpt.read_manifest(path))
    for rank in (3, 2, 1, 0):
        before = videos(tmp_path / "four").keys()
        as_rank(rank, 4, config(teacher, tmp_path / "four"))
        new = videos(tmp_path / "four").keys() - before
        assert new == {*NAMES[rank:rank + 1]}
        assert embedded == [*PROMPTS[rank:rank + 1]]
        embedded.clear()
    assert videos(tmp_path / "four") == videos(tmp_path / "one")
    sheets = [(tmp_path / name / "sheet.png").read_bytes() for name in ("one", "four")]
    assert sheets[0] == sheets[1]


@pytest.mark.slow
def test_two_ranks_of_torchrun_make_the_videos_of_one(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)       # what a command of its own has
    monkeypatch.setattr("codec.grid", GRID)
    teacher = saved(tmp_path / "run", SAMPLING)
    run(sample.main, config(teacher, tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    flags = [f"--ckpt={teacher}", f"--out={tmp_path / 'two'}", "--n=1", "--device=cpu", "--prompts", *PROMPTS]
    done = subprocess.run([*launch, str(ROOT / "sample.py"), *flags], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 videos and sheet.png") == 1
    assert videos(tmp_path / "two") == videos(tmp_path / "one")
    assert (tmp_path / "two/sheet.png").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_only_the_files_of_the_weights_and_the_null_text_are_read(teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", teacher, folder], check=True)
    for role in ("net", "opt"):
        file, = folder.glob(f"ckpt/*/rank_00000.{role}.pt")
        file.write_bytes(b"")
    cfg = config(str(folder), tmp_path / "s", prompts=PROMPTS[:1])
    run(sample.main, cfg)
    with pytest.raises(SystemExit):
        run(sample.main, replace(cfg, weights="net"))
    assert "rank_00000.net.pt" in capsys.readouterr().out


# ---- weights that are in no checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    """The teacher's weights as export.py writes them."""
    out = tmp_path_factory.mktemp("exported") / "e"
    export.main(export.Config(ckpt=teacher, format="comfy", out=str(out)))
    return out


def test_an_export_is_sampled_like_its_checkpoint(teacher, exported, tmp_path):
    flags = dict(prompts=PROMPTS[:2], steps=1)      # away from the null text, which is no prompt's here
    run(sample.main, config(teacher, tmp_path / "run", **flags))
    run(sample.main, config(str(exported), tmp_path / "folder", **flags))
    run(sample.main, config(str(exported / "e.safetensors"), tmp_path / "file", model="tiny", **flags))
    assert videos(tmp_path / "folder") == videos(tmp_path / "run")
    assert videos(tmp_path / "file") == videos(tmp_path / "run")


def test_weights_without_a_null_text_are_guided_away_from_the_empty_prompt(exported, tmp_path, asked):
    copy = shutil.copytree(exported, tmp_path / "e")
    (copy / "null_text.pt").unlink()
    run(sample.main, config(str(copy), tmp_path / "s", prompts=PROMPTS[:1], steps=1))
    (_, _, _, uncond, sampling), = asked
    empty, = codec.load("dct").embed([""])
    assert torch.equal(uncond.text[0, :len(empty)], empty)
    assert not uncond.text[0, len(empty):].any()
    assert sampling == SAMPLING | {"steps": 1}


def test_an_adapter_is_added_at_its_scale_times_the_one_asked_for(teacher, exported, tmp_path, asked):
    rng = torch.Generator().manual_seed(9)
    A, B = torch.randn(2, 48, generator=rng) / 9, torch.randn(48, 2, generator=rng) / 9
    stem = "lora_unet_blocks_0_self_attn_q"
    save_file({f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(1.0)},
              tmp_path / "x.safetensors")
    flags = dict(lora=str(tmp_path / "x.safetensors"), lora_scale=3.0, prompts=PROMPTS[:1])
    for i, path in enumerate((teacher, exported)):
        run(sample.main, config(str(path), tmp_path / f"{i}", **flags))
    plain = ckpt.weights(teacher).tensor("blocks.0.self_attn.q.weight")
    for net, *_ in asked:
        assert torch.allclose(net.net.blocks[0].self_attn.q.weight, plain + 3 / 2 * B @ A, atol=1e-6)


def adapter_run(out, base, sampling):
    """A run's folder with one checkpoint of an adapter alone, over the weights at base."""
    rng, role = torch.Generator().manual_seed(9), {}
    for factor, shape in (("A", (2, 48)), ("B", (48, 2))):
        x = torch.randn(shape, generator=rng) / 9
        role[f"blocks.0.self_attn.q.lora.main.{factor}"] = parallel.Part(x, 0, shape)
    null = torch.randn(8, 64, generator=rng)
    rows = ckpt.roles(net=role, ema=role, null=parallel.Part(null, 0, (8, 64)))
    meta = {"sampling": sampling, "config": {"lora_alpha": 3.0, "lora_rank": 2},
            "base": ckpt.base_of(base, ckpt.weights(base))}
    ckpt.save(out, 1, rows, meta)
    return str(out)


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize("how", [STUDENT, SAMPLING | dict(window=[1, 1, 1], tile=[1, 1, 2])])
def test_an_adapter_of_ours_over_weights_is_sampled_as_its_run_is(teacher, tmp_path, kind, how):
    path = lora = adapter_run(tmp_path / "a", teacher, json.loads(json.dumps(how)))
    if kind == "export":
        lora = str(tmp_path / "e")
        export.main(export.Config(ckpt=path, lora=True, out=lora))
    run(sample.main, config(path, tmp_path / "own", prompts=PROMPTS[:1]))
    run(sample.main, config(teacher, tmp_path / "over", prompts=PROMPTS[:1], lora=lora))
    assert videos(tmp_path / "over") == videos(tmp_path / "own")


def test_an_adapter_on_a_student_leaves_its_times(student, teacher, tmp_path, asked):
    run(sample.main, config(student, tmp_path / "s", prompts=PROMPTS[:1],
                            lora=adapter_run(tmp_path / "a", teacher, SAMPLING)))
    assert asked[0][-1]["times"] == STUDENT["times"]


@pytest.fixture(scope="module")
def bare(exported, tmp_path_factory):
    """The same weights, and nothing that says how to sample them."""
    return str(shutil.copy(exported / "e.safetensors", tmp_path_factory.mktemp("bare")))


BAD_WEIGHTS = [  # flags, B for bare weights and E for exported ones; what the message says
    (dict(ckpt="B"), "does not say what it is.*give --model, one of wan-1.3b, wan2.2-5b, wan-14b"),
    (dict(ckpt="B", model="tiny"), "give --model, one of wan"),
    (dict(ckpt="E", model="wan-14b"), "--model=wan-14b, but .* is tiny"),
    (dict(ckpt="E", weights="net"), "--weights=net: .* is no run of ours"),
    (dict(ckpt="E", lora_scale=2.0), "--lora_scale=2.0 needs --lora"),
    (dict(ckpt="E", lora="nowhere", lora_scale=math.nan), "--lora_scale=nan: a finite number"),
    (dict(ckpt="E", lora="nowhere", lora_scale=math.inf), "--lora_scale=inf: a finite number"),
    (dict(ckpt="E", lora="B"), "is no LoRA file: it holds"),
    (dict(ckpt="E", lora="nowhere"), "no weights at nowhere"),
    (dict(ckpt="nowhere/at/all"), "no checkpoint at nowhere"),
]


@pytest.mark.parametrize("flags, said", BAD_WEIGHTS, ids=[" ".join(map(str, f.values())) for f, _ in BAD_WEIGHTS])
def test_weights_that_cannot_be_sampled_are_refused_in_a_line(exported, bare, tmp_path, capsys, flags, said):
    flags = {name: {"B": bare, "E": str(exported)}.get(value, value) for name, value in flags.items()}
    message = refused(sample.main, replace(config("", tmp_path / "s"), **flags), capsys)
    assert re.search(said, message)
    assert not (tmp_path / "s").exists()


def test_an_adapter_alone_a_dataset_and_a_damaged_description_are_refused_by_their_cause(
        exported, tmp_path, capsys):
    out = config("", tmp_path / "s")
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 48), "blocks.0.ffn.0.lora_B.weight": torch.ones(96, 2)},
              tmp_path / "x.safetensors")
    message = refused(sample.main, replace(out, ckpt=str(tmp_path / "x.safetensors"), model="tiny"), capsys)
    assert "is a LoRA file, not a model" in message
    data = shapes_dataset(tmp_path / "data", 20)
    assert f"{data} is a dataset, which --data= takes" in refused(sample.main, replace(out, ckpt=data), capsys)
    shutil.copytree(exported, tmp_path / "e")
    model = json.dumps({"sampling": SAMPLING | {"model": "huge"}})
    for content, said in (("{", "nanovideo.json is damaged, it is not JSON"), ("{}", "lacks how to sample"),
                          ("[]", "lacks how to sample"), ('{"sampling": []}', "lacks how to sample"),
                          ('{"sampling": {"model": "tiny"}}', "lacks how to sample"),
                          (model, "no model is called 'huge': there are tiny")):
        (tmp_path / "e" / "nanovideo.json").write_text(content)
        assert said in refused(sample.main, replace(out, ckpt=str(tmp_path / "e")), capsys)


def test_weights_that_are_not_finite_are_refused_in_a_line(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "e")
    held = load_file(tmp_path / "e" / "e.safetensors")
    held["model.diffusion_model.head.head.weight"][-1, -1] = math.nan
    save_file(held, tmp_path / "e" / "e.safetensors")
    message = refused(sample.main, config(str(tmp_path / "e"), tmp_path / "s"), capsys)
    assert "e.safetensors: model.diffusion_model.head.head.weight holds NaN" in message


def test_videos_of_an_earlier_run_are_named_beside_the_new_sheet(teacher, tmp_path, capsys):
    run(sample.main, config(teacher, tmp_path / "s", steps=1))
    assert "from before" not in capsys.readouterr().out
    run(sample.main, config(teacher, tmp_path / "s", steps=1, prompts=PROMPTS[1:2]))
    said = capsys.readouterr().out
    assert f"there too from before, not on the sheet: {', '.join(NAMES)}\n" in said


@pytest.mark.parametrize("content, said", [
    ("\ufeffa red circle\r\n\r\n a blue\x0bsquare \n".encode(), None),
    ("a red circle".encode("utf-16"), "UTF-16"),
    ("a r\u00e9d circle".encode("latin-1"), "save it as UTF-8")])
def test_a_file_of_prompts_is_read_as_people_write_it_or_refused(tmp_path, capsys, content, said):
    (tmp_path / "p.txt").write_bytes(content)
    cfg = config("nowhere", tmp_path / "s", prompts=(), file=str(tmp_path / "p.txt"))
    if said:
        assert said in refused(sample.main, cfg, capsys)
    else:
        assert sample.asked_of(cfg)[0] == ["a red circle", " a blue\x0bsquare "]


def test_the_text_encoder_is_freed_before_the_vae_and_the_net_come(teacher, tmp_path, monkeypatch):
    events, load, prepare = [], codec.load, parallel.prepare

    class Encoder:
        def __init__(self, embed):
            self.embed = embed

        def __call__(self, prompts):
            events.append("embed")
            return self.embed(prompts)

    def loaded(spec, *, vae=None, text=None, clip=None, device="cpu", decodes=False):
        events.append(f"load vae={vae} text={text}")
        coder = load(spec)
        if text:
            encoder = Encoder(coder.embed)
            weakref.finalize(encoder, events.append, "text encoder freed")
            coder = coder._replace(embed=encoder)
        return coder

    monkeypatch.setattr(codec, "load", loaded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("memory given back"))
    monkeypatch.setattr(parallel, "prepare", lambda *args, **named:
                        events.append("net") or prepare(*args, **named))
    run(sample.main, config(teacher, tmp_path / "s", vae="V", text="T", prompts=PROMPTS[:2], negative="a"))
    assert events == ["load vae=None text=T", "embed", "embed", "embed", "text encoder freed",
                      "memory given back", "load vae=V text=None", "load vae=None text=None", "net"]     # CLIP's: none


def test_one_video_is_in_memory_at_a_time_and_the_sheet_has_six_frames_of_each(
        teacher, tmp_path, monkeypatch):
    shown, alive = [], []
    write, sheet = codec.write_video, codec.contact_sheet

    def watched(path, clips, fps):
        assert not any(video() is not None for video in alive)
        alive.extend(weakref.ref(video) for video in clips)
        shown.extend(video[[0, 3, 6, 10, 13, 16]].copy() for video in clips)
        write(path, clips, fps)

    def strips(path, clips, captions):
        assert captions == [*PROMPTS]
        for strip, frames in zip(clips, shown, strict=True):
            assert codec.psnr(strip, frames).min() > 30
        sheet(path, clips, captions)

    monkeypatch.setattr(codec, "write_video", watched)
    monkeypatch.setattr(codec, "contact_sheet", strips)
    run(sample.main, config(teacher, tmp_path / "s", size=(17, 32, 32)))
    assert len(shown) == 3


def test_the_sheet_reads_large_videos_small(tmp_path, monkeypatch):
    video = np.random.default_rng(0).integers(0, 256, (5, 320, 480, 3), dtype=np.uint8)
    codec.write_video(tmp_path / "a.mp4", [video], 8)
    seen = []
    monkeypatch.setattr(codec, "contact_sheet", lambda path, clips, captions: seen.extend(clips))
    files = [tmp_path / "a.mp4", tmp_path / "on another node.mp4"]
    sample.contact_sheet(tmp_path / "s.png", files, ["a", "b"], [(16, 2, 40, 60)] * 2, (4, 8, 8), 8)
    assert [strip.shape for strip in seen] == [(6, 160, 240, 3)]


# ---- from an image --------------------------------------------------------------------------------------------------


FRAMED = {"first_frame": 0.5, "shapes": [[24, 3, 4, 4], [24, 1, 4, 8], [24, 2, 4, 8], [24, 3, 4, 8]]}
RED, BLUE = (200, 60, 40), (30, 60, 180)


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("framed") / "run", SAMPLING | FRAMED)


@pytest.fixture
def made(monkeypatch):
    """What the sampler made: a list of (x0, noises)."""
    def record(x0, net, draw, *rest):
        return x0, draw(0)

    return spied(monkeypatch, sample.step, "sample", record)


def image_at(path, h, w, colour):
    """A picture of one colour, or a film that begins with it and goes on in grey."""
    frames = np.full((5, h, w, 3), 128, np.uint8)
    frames[0] = colour
    if path.suffix == ".mp4":
        codec.write_video(path, [frames], 8)
    else:
        Image.fromarray(frames[0]).save(path)
    return str(path)


def begins_with(x0, colour):
    """Whether the clip's first frame has the colour all over, as far as codecs keep it."""
    mean, std = codec.moments(SAMPLING)
    frame = codec.load("dct").decode(x0 * std + mean)[0]
    return np.abs(frame - np.float32(colour)).max() < 8


@pytest.mark.parametrize("sampler", [SAMPLING, STUDENT], ids=["teacher", "student"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "mp4"])
def test_a_video_begins_with_the_image_in_the_bucket_of_its_aspect(tmp_path, made, ending, sampler):
    run_folder = saved(tmp_path / "run", sampler | FRAMED)
    image = image_at(tmp_path / f"a.{ending}", 60, 110, RED)
    run(sample.main, config(run_folder, tmp_path / "s", image=image, prompts=PROMPTS[:2]))
    (x0, z), = made
    assert x0.shape == (2, 24, 2, 4, 8)     # of this aspect, most clips were of two frames
    assert torch.equal(x0[:, :, 0], z[:, :, 0])
    assert torch.equal(z[:, :, 1:], noise(0, "sample", 0, [0, 1], (24, 2, 4, 8))[:, :, 1:])
    assert all(begins_with(clip, RED) for clip in x0)
    assert len(videos(tmp_path / "s")) == 2


def test_a_folder_of_images_has_captions_of_its_own(framed, tmp_path, made, asked):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    image_at(folder / "b.png", 40, 40, BLUE)
    image_at(folder / "more/a.jpg", 30, 64, RED)
    (folder / "b.txt").write_text("a blue square moving up\n")
    (folder / "captions.jsonl").write_text('{"file": "more/a.jpg", "caption": "a red circle moving left"}\n')
    run(sample.main, config(framed, tmp_path / "s", image=str(folder), prompts=(), n=2))
    assert [x0.shape for x0, _ in made] == [(2, 24, 3, 4, 4), (2, 24, 2, 4, 8)]
    for (x0, z), colour, places in zip(made, (BLUE, RED), ([0, 1], [2, 3]), strict=True):
        assert all(begins_with(clip, colour) for clip in x0)
        assert torch.equal(z[:, :, 1:], noise(0, "sample", 0, places, x0.shape[1:])[:, :, 1:])
    words = codec.load("dct").embed(["a blue square moving up"])[0]
    assert torch.equal(asked[0][2].text[1, :len(words)], words)
    assert sorted(videos(tmp_path / "s")) == [
        "0000_a_blue_square_moving_up.mp4", "0001_a_blue_square_moving_up.mp4",
        "0002_a_red_circle_moving_left.mp4", "0003_a_red_circle_moving_left.mp4"]


def test_a_size_is_chosen_for_an_image_too(framed, tmp_path, made):
    image = image_at(tmp_path / "a.png", 60, 110, RED)
    run(sample.main, config(framed, tmp_path / "s", image=image, size=(9, 16, 16), prompts=PROMPTS[:1]))
    (x0, _), = made
    assert x0.shape == (1, 24, 3, 4, 4)
    assert begins_with(x0[0], RED)


def test_an_image_that_cannot_begin_a_video_is_refused_in_a_line(teacher, framed, tmp_path, capsys):
    image = image_at(tmp_path / "a.png", 16, 16, RED)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    image_at(tmp_path / "folder/a.png", 16, 16, RED)

    def said(run_folder, image, **more):
        return refused(sample.main, config(run_folder, tmp_path / "s", image=image, **more), capsys)

    assert "was not trained with first frames" in said(teacher, image)
    assert "no such file or folder" in said(framed, str(tmp_path / "nowhere.png"))
    assert re.search("broken.png: unreadable", said(framed, str(tmp_path / "broken.png")))
    assert "more frames than one" in said(framed, image, size=(1, 16, 16))
    assert "captions of their own" in said(framed, str(tmp_path / "folder"))
    assert "a.png has no caption" in said(framed, str(tmp_path / "folder"), prompts=())
    assert not (tmp_path / "s").exists()


def test_a_t_per_frame_takes_more_memory_and_fewer_videos_are_sampled_at_once(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    net, shape = blank("tiny").to(torch.bfloat16), (24, 5, 8, 8)
    for island in net.islands():
        island.float()
    x, t, text = (torch.empty(*size, device="meta") for size in ((1, *shape), (1, 5), (1, 8, 64)))
    with torch.no_grad(), plan.Alive(net.parameters()) as alive:
        net(x, t, Cond(text))
    assert 86 < alive.most / math.prod(token_grid(net.config, shape)) / net.config.dim < 92
    assert sample.batch_size(MODELS["wan-1.3b"], (16, 21, 60, 104), SAMPLING) == 3
    assert sample.batch_size(MODELS["wan-1.3b"], (16, 21, 60, 104), SAMPLING, given=True) == 1


AT_ONCE = [("tiny", (24, 5, 8, 8), 8), ("wan-1.3b", (16, 21, 60, 104), 3),
           ("wan2.2-5b", (48, 31, 44, 80), 2), ("wan-14b", (16, 21, 60, 104), 1),
           ("wan-14b", (16, 21, 90, 160), 1)]


@pytest.mark.parametrize("name, shape, videos", AT_ONCE)
def test_as_many_videos_are_sampled_at_once_as_8_gb_hold(monkeypatch, name, shape, videos):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    config = MODELS[name]
    assert sample.batch_size(config, shape, SAMPLING) == videos
    monkeypatch.setitem(MODELS, name, replace(config, blocks=2))    # without gradient, a block leaves nothing behind
    net = blank(name)
    net.to(torch.bfloat16)
    for island in net.islands():
        island.float()
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    text = torch.empty(1, 8 if name == "tiny" else 512, config.text_dim, device="meta")
    with torch.no_grad(), plan.Alive(net.parameters()) as alive:
        net(x, t, Cond(text))
    tokens = math.prod(token_grid(config, shape))
    assert 33 < alive.most / tokens / config.dim < 40.2
    if name != "tiny":
        assert videos == 1 or videos * alive.most < 8e9


def test_the_default_batch_is_the_sizes(teacher, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(sample, "batch_size", lambda config, shape, *rest: shape[1])
    run(sample.main, config(teacher, tmp_path / "s", prompts=PROMPTS * 2, size=(13, 16, 16)))
    assert [len(noises[0]) for _, noises, *_ in asked] == [4, 2]


def test_precision_and_compilation_are_the_worlds(teacher, tmp_path, asked, monkeypatch):
    start, compiled = parallel.init, []
    monkeypatch.setattr(parallel, "init", lambda *args, **named:
                        start(*args, **named)._replace(compile=True))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **how: compiled.append(net))
    run(sample.main, config(teacher, tmp_path / "s", prompts=PROMPTS[:1], precision="bf16"))
    net = asked[0][0].net
    assert compiled == [*net.blocks]
    assert {p.dtype for p in net.blocks.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("window", [None, [1, 1, 1]])
def test_the_net_attends_as_it_was_trained(tmp_path, asked, window):
    path = saved(tmp_path / "run", SAMPLING | dict(window=window, tile=[1, 1, 2], dense_ends=1))
    run(sample.main, config(path, tmp_path / "s", prompts=PROMPTS[:1]))
    bound = asked[0][0]
    assert (bound.metadata is None) == (window is None)
    assert bound.dense_ends == 1
    if window:
        assert bound.metadata.sparsity == 0.75


# ---- causal ---------------------------------------------------------------------------------------------------------

CAUSAL = dict(shapes=[[24, 5, 8, 8]], window=[-9, 1, 1], tile=[2, 99, 99])


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("causal") / "run", STUDENT | CAUSAL)


def by_chunks(ckpt, out, **flags):
    """The latents that are decoded, by chunk and clip, and how many pictures were in the films before each."""
    decoded, written = [], []
    with pytest.MonkeyPatch.context() as patch:
        coder, film = codec.load("dct"), codec.film

        def decode_on(z, state):
            decoded.append((z, state, len(written)))
            return coder.decode_on(z, state)

        @contextmanager
        def counted(path, fps):
            with film(path, fps) as add:
                yield lambda picture: written.append(path) or add(picture)

        patch.setattr(codec, "load", lambda *args, **more: coder._replace(decode_on=decode_on))
        patch.setattr(codec, "film", counted)
        run(sample.main, sample.Config(ckpt=ckpt, out=str(out), prompts=PROMPTS[:1], n=2, **flags))
    return decoded, written


def clip_of(decoded, i):
    """The i-th of two videos, whole."""
    return torch.cat([z for z, _, _ in decoded[i::2]], 1)


def test_a_causal_clip_goes_chunk_by_chunk_into_its_file_and_a_longer_one_begins_as_a_shorter_one(causal, tmp_path):
    short, _ = by_chunks(causal, tmp_path / "short")
    long, written = by_chunks(causal, tmp_path / "long", frames=37)     # 10 latent frames
    assert [z.shape[1] for z, _, _ in short[::2]] == [2, 2, 1]
    assert [z.shape[1] for z, _, _ in long[::2]] == [2] * 5
    assert [state for _, state, _ in long[:4]] == [None, None, "begun", "begun"]
    assert [before for _, _, before in long[::2]] == [0, 2 * 5, 2 * 13, 2 * 21, 2 * 29]    # nothing is kept to the end
    for i in range(2):
        assert torch.equal(clip_of(long, i)[:, :4], clip_of(short, i)[:, :4])
        assert not torch.equal(clip_of(long, i)[:, 5:], clip_of(long, i)[:, :5])
    (video, _), = films.read_video(tmp_path / f"long/{NAMES[0]}", sizes=[(256, 256)], frames=37, fps=8)
    assert len(video) == 37
    with av.open(tmp_path / f"long/{NAMES[0]}") as file:
        assert file.streams.video[0].width == 2 * 32        # by codec.grid
    assert len(written) == 2 * 37


def test_what_a_causal_clip_is_made_of_is_what_the_sampler_makes_at_once(causal, tmp_path):
    """step.sample, which evaluate.py uses, from the same noises: the cache sees all of 5 frames."""
    short, _ = by_chunks(causal, tmp_path / "out")
    source = ckpt.stored(causal, ["ema"])
    net = blank("tiny").to_empty(device="cpu")
    ckpt.fill(parallel.local_rows(net), ckpt.model_of(source, "ema"))
    world = parallel.imagine(1)._replace(device=torch.device("cpu"))
    bound = chunked(net, (24, 5, 8, 8), world, (-9, 1, 1), (2, 99, 99))
    text = padded(codec.load("dct").embed(list(PROMPTS[:1])), SAMPLING["text"]).expand(2, -1, -1)
    with torch.no_grad():
        x0 = step.sample(bound, lambda k: noise(0, "sample", k, range(2), (24, 5, 8, 8)), Cond(text), None,
                         STUDENT | CAUSAL, see=bound.see)
    for i in range(2):
        assert torch.equal(clip_of(short, i), x0[i] * 0.2 + 0.1)


@pytest.mark.parametrize("flags, window, sink", [({}, 3, 0), (dict(window=2, sink=1), 2, 1), (dict(window=7), 7, 0)])
def test_a_chunk_sees_as_many_as_in_training_or_what_the_flags_say(causal, tmp_path, monkeypatch, flags, window, sink):
    seen = spied(monkeypatch, sample, "chunked", lambda net, *args, **more: net)
    by_chunks(causal, tmp_path / "out", frames=17, **flags)
    assert (seen[0].window, seen[0].sink) == (window, sink)


@pytest.mark.parametrize("sampler, texts", [(STUDENT, 1), (SAMPLING, 2), (SAMPLING | {"guidance": 1.0}, 1)],
                         ids=("student", "guided", "unguided"))
def test_the_null_text_has_a_past_where_it_guides_and_none_where_nobody_asks_for_it(
        sampler, texts, tmp_path, monkeypatch):
    calls = []
    see = Chunked.see
    monkeypatch.setattr(Chunked, "see", lambda net, cond, x0: calls.append(len(cond.past)) or see(net, cond, x0))
    by_chunks(saved(tmp_path / "run", sampler | CAUSAL), tmp_path / "out")
    assert calls == [0] * texts + [1] * texts


def test_an_image_is_the_first_chunk_of_one_frame_untrained_and_of_more_after_training_alone(causal, tmp_path, capsys):
    image = image_at(tmp_path / "a.png", 60, 60, RED)
    for name, more in (("one", {"tile": [1, 99, 99]}), ("two", {"first_frame": 0.5})):
        run_folder = saved(tmp_path / name, STUDENT | CAUSAL | more)
        decoded, _ = by_chunks(run_folder, tmp_path / f"{name}_out", image=image)
        assert begins_with((decoded[0][0] - 0.1) / 0.2, RED)
        assert not torch.equal(clip_of(decoded, 0)[:, 1], clip_of(decoded, 1)[:, 1])
    longer, _ = by_chunks(run_folder, tmp_path / "longer", image=image, frames=33)
    assert clip_of(longer, 0).shape[1] == 9
    assert begins_with((longer[0][0] - 0.1) / 0.2, RED)
    for path, said in ((causal, "was not trained with first frames"), (run_folder, "more frames than one")):
        cfg = sample.Config(ckpt=path, prompts=PROMPTS[:1], image=image, frames=1)
        assert said in refused(sample.main, cfg, capsys)


@pytest.mark.parametrize("flags, said", [
    (dict(frames=18), "--frames=18: they are 1 + a multiple of 4"),
    (dict(frames=9, size=(9, 32, 32)), "--size has frames too"),
    (dict(window=0), "--window=0 --sink=0: a chunk sees 1 or more"),
    (dict(sink=-1), "--sink=-1: a chunk sees 1 or more")])
def test_lengths_and_windows_that_cannot_be_are_refused(causal, capsys, flags, said):
    assert said in refused(sample.main, sample.Config(ckpt=causal, prompts=PROMPTS[:1], **flags), capsys)


def test_a_model_that_is_not_causal_takes_no_length_beyond_its_size(student, capsys):
    for flags in (dict(frames=33), dict(window=2), dict(sink=1)):
        said = refused(sample.main, sample.Config(ckpt=student, prompts=PROMPTS[:1], **flags), capsys)
        assert "is not causal, it makes a clip at once; --size has its frames" in said


def test_without_a_cache_it_says_so_and_a_sink_is_refused(tmp_path, capsys):
    sliding = saved(tmp_path / "run", STUDENT | CAUSAL | {"tile": [2, 2, 2]})
    decoded, _ = by_chunks(sliding, tmp_path / "out", frames=9)
    assert "no cache serves --sp or tiles that slide in space" in capsys.readouterr().out
    assert [z.shape[1] for z, _, _ in decoded[::2]] == [2, 1]
    cfg = sample.Config(ckpt=sliding, prompts=PROMPTS[:1], sink=1)
    assert "--sink=1 needs the cache" in refused(sample.main, cfg, capsys)


def test_a_causal_video_of_wan_takes_a_chunk_and_its_past_of_the_8_gb():
    causal = dict(window=[-3, 1, 1], tile=[3, 99, 99], guidance=1.0)
    shape = (16, 201, 60, 104)
    assert sample.batch_size(MODELS["wan-1.3b"], shape, causal) == 2       # 0.3 GB of activations, 2.6 GB of past
    assert sample.batch_size(MODELS["wan-1.3b"], shape, causal | dict(guidance=5.0)) == 1
