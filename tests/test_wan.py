"""From Wan's weights and films to what diffusers' own pipeline samples, on small random models in the real layouts."""
import json
import re
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import ckpt
import codec
import distill
import export
import prepare
import sample
import shapes
import train
from helpers import kept_in, run
from model import MODELS, ModelConfig
from test_codec import pipeline  # noqa: F401

SMALL = ModelConfig(dim=48, blocks=2, heads=4, ffn=80, channels=4, text_dim=32, freq_dim=32)
PROMPTS = ("a red circle", "the blue square, moving")
LENGTH = 26             # text tokens


@pytest.fixture(scope="module", autouse=True)
def packages():
    """Imported when a test of this file runs, not when all files are collected: they take seconds."""
    global diffusers, transformers
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def small():
    """A row for the small model in every table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        patch.setitem(train.DEFAULTS, "small", train.DEFAULTS["wan-1.3b"] | dict(
            steps=3, batch=2, lr=3e-3, warmup=0, val_every=0, save_every=0, sample_steps=3, sample_shift=3.0,
            guidance=4.0))
        patch.setitem(distill.DEFAULTS, "small", distill.DEFAULTS["wan-1.3b"] | dict(
            steps=2, batch=2, student_lr=3e-3, critic_lr=3e-3, val_every=0, save_every=0))
        yield


@pytest.fixture(scope="module")
def wan(pipeline, tmp_path_factory):  # noqa: F811
    """The folder of a whole pipeline, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers has it, its weights in several files."""
    torch.manual_seed(1)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=80, num_layers=2)
    folder = tmp_path_factory.mktemp("wan") / "Wan2.1"
    diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(pipeline / "vae"), transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                    flow_shift=3.0),
    ).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model_index.json").exists()
    assert list(folder.glob("transformer/*.index.json"))
    return str(folder)


@pytest.fixture(scope="module")
def data(wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for i, size in enumerate([(32, 32), (32, 32), (32, 48), (32, 32)]):
        video, caption = shapes.clip(np.random.default_rng(i), size=size, frames=9)
        codec.write_video(folder / f"{i}.mp4", [video], 8)
        (folder / f"{i}.txt").write_text(caption[:LENGTH - 3])
    out = folder / "set"
    run(prepare.main, prepare.Config(
        videos=str(folder), codec="wan", vae=wan, text=wan, sizes=("32x32", "32x48"), frames=5, fps=8,
        text_length=LENGTH, dtype="fp32", out=str(out)))
    return str(out)


@pytest.fixture(scope="module")
def trained(wan, data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("trained") / "run")
    run(train.main, train.Config(model="small", data=(data,), init=wan, out=out, vae=wan, samples=1, log_every=1))
    return out


class Sampled(NamedTuple):
    """What sample.py made."""
    noises: list
    latents: torch.Tensor       # normalised
    videos: list
    sampling: dict              # the checkpoint's block


def ours(path, wan, out, **more):
    """Samples the prompts in one batch -> Sampled."""
    calls, videos = [], []
    original, write = sample.step.sample, codec.write_video

    def drawn(net, draw, cond, uncond, sampling, free=None):
        noises = []
        x0 = original(net, kept_in(noises, draw), cond, uncond, sampling, free)
        calls.append((noises, x0, sampling))
        return x0

    def written(path, clips, fps):
        videos.extend(clips)
        write(path, clips, fps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.step, "sample", drawn)
        patch.setattr(codec, "write_video", written)
        run(sample.main, sample.Config(ckpt=path, vae=wan, text=wan, prompts=PROMPTS, out=str(out), **more))
    (noises, latents, sampling), = calls
    return Sampled(noises, latents, videos, sampling)


def theirs(wan, mine, transformer=None, lora=None, grid=True, image=None):
    """What diffusers' pipeline makes of the same noises, or its pipeline from an image -> its latents and pixels."""
    parts = {}
    if transformer is not None:
        parts["transformer"] = diffusers.WanTransformer3DModel.from_pretrained(transformer)
    pipe = diffusers.WanPipeline.from_pretrained(wan, **parts)
    if lora:
        pipe.load_lora_weights(lora)
    begun = {}
    if image is not None:
        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
        pipe, begun = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True), {"image": image}
    noises, sampling = mine.noises, mine.sampling
    few = "times" in sampling       # the student's sampler is diffusers' stochastic one, whose noise must be ours
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=sampling["shift"], stochastic_sampling=few)
    pipe.scheduler = scheduler
    if grid:
        ascending = type(scheduler).set_timesteps

        def descending(n, device):
            ascending(scheduler, sigmas=np.linspace(1, 1 / n, n), device=device)

        scheduler.set_timesteps = descending
    kept, fresh = [], iter([*noises[1:], noises[0]])
    _, h, w = noises[0].shape[2:]

    def keep(pipe, i, t, now):
        kept.append(now["latents"])
        return {}

    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(scheduler).__module__]
        patch.setattr(module, "randn_tensor", lambda shape, **options: next(fresh))
        pixels = pipe(
            **begun, prompt=list(PROMPTS), height=8 * h, width=8 * w, num_frames=5, latents=noises[0],
            max_sequence_length=LENGTH, guidance_scale=sampling["guidance"], callback_on_step_end=keep,
            num_inference_steps=len(sampling["times"]) if few else sampling["steps"]).frames
    return kept[-1], pixels


def near(a, b, within=1e-4):
    return ((a - b).norm() / b.norm()).item() <= within


def check_same(mine, other):
    """Latents to 1e-4, pixels to the rounding of 8 bits."""
    latents, pixels = other
    assert near(latents, mine.latents)
    for a, b in zip(pixels, mine.videos, strict=True):
        assert np.abs(255 * a - b).max() <= 1


def test_weights_and_films_become_a_model_that_diffusers_samples_alike(wan, trained, tmp_path):
    lines = [json.loads(line) for line in open(f"{trained}/log.jsonl")]
    assert {line["step"] for line in lines if "loss" in line} == {1, 2, 3}
    samples = ckpt.Path(trained) / "samples"
    assert [path.name for path in samples.glob("step_*")] == ["step_0000003.mp4"]       # decoded by --vae
    mine = ours(trained, wan, tmp_path / "s")
    export.main(export.Config(ckpt=trained, out=str(tmp_path / "export"), shard_gb=1e-4))
    check_same(mine, theirs(wan, mine, tmp_path / "export"))
    untrained, _ = theirs(wan, mine)
    assert not near(untrained, mine.latents, 1e-2)
    other_times, _ = theirs(wan, mine, tmp_path / "export", grid=False)         # diffusers' default grid is another
    assert not near(other_times, mine.latents, 1e-3)


def test_a_model_of_first_frames_begins_with_an_image_as_diffusers_pipeline_does(wan, data, tmp_path):
    """Its expand_timesteps, of Wan 2.2's 5B: a t per token, 0 in the first frame, which it puts in place at each step."""
    out = str(tmp_path / "run")
    run(train.main, train.Config(model="small", data=(data,), init=wan, out=out, samples=0, first_frame=0.5))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    mine = ours(out, wan, tmp_path / "s", image=str(tmp_path / "a.png"))
    export.main(export.Config(ckpt=out, out=str(tmp_path / "export")))
    latents, pixels = theirs(wan, mine, tmp_path / "export", image=picture)
    assert near(latents[:, :, 1:], mine.latents[:, :, 1:])
    for a, b in zip(pixels, mine.videos, strict=True):
        assert np.abs(255 * a - b).max() <= 1
    told = json.loads((tmp_path / "export/nanovideo.json").read_text())
    assert told["sampling"]["first_frame"] == 0.5
    alone, _ = theirs(wan, ours(out, wan, tmp_path / "t"), tmp_path / "export")
    assert not near(alone[:, :, 1:], mine.latents[:, :, 1:], 1e-2)


@pytest.mark.slow
def test_a_student_of_it_is_sampled_alike_by_diffusers_stochastic_sampler(wan, data, trained, tmp_path):
    out = tmp_path / "run"
    run(distill.main, distill.Config(teacher=trained, data=data, out=str(out), vae=wan, student_every=1, samples=1))
    assert len(list((out / "samples").glob("*.mp4"))) == 1
    mine = ours(str(out), wan, tmp_path / "s")
    assert len(mine.noises) == 4
    export.main(export.Config(ckpt=str(out), out=str(tmp_path / "export")))
    check_same(mine, theirs(wan, mine, tmp_path / "export"))
    undistilled, _ = theirs(wan, mine)
    assert not near(undistilled, mine.latents, 1e-2)


@pytest.mark.slow
def test_an_adapter_trained_on_the_pipeline_is_loaded_onto_it_by_diffusers(wan, data, tmp_path):
    pytest.importorskip("peft")
    out = str(tmp_path / "run")
    run(train.main, train.Config(model="small", data=(data,), init=wan, out=out, samples=0, lora_rank=3,
                                 lora_alpha=4.0))
    mine = ours(out, wan, tmp_path / "s")
    export.main(export.Config(ckpt=out, lora=True, out=str(tmp_path / "lora")))
    export.main(export.Config(ckpt=out, merge=True, out=str(tmp_path / "merged")))
    check_same(mine, theirs(wan, mine, lora=tmp_path / "lora"))
    check_same(mine, theirs(wan, mine, tmp_path / "merged"))
    base, _ = theirs(wan, mine)
    assert not near(base, mine.latents, 1e-3)


@pytest.mark.slow
def test_prompts_and_the_pipeline_alone_make_a_student_that_is_an_adapter_of_it(wan, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    run(prepare.main, prepare.Config(
        prompts=str(tmp_path / "prompts.txt"), codec="wan", vae=wan, text=wan, shape=(4, 2, 4, 4),
        text_length=LENGTH, dtype="fp32", out=str(tmp_path / "p")))
    run(distill.main, distill.Config(
        teacher=wan, model="small", data=str(tmp_path / "p"), out=str(tmp_path / "run"), student_every=1, samples=0,
        lora_rank=3))
    mine = ours(str(tmp_path / "run"), wan, tmp_path / "s")
    export.main(export.Config(ckpt=str(tmp_path / "run"), lora=True, out=str(tmp_path / "lora")))
    check_same(mine, theirs(wan, mine, lora=tmp_path / "lora"))
    base, _ = theirs(wan, mine)
    assert not near(base, mine.latents, 1e-3)


@pytest.mark.slow
def test_the_pipeline_is_sampled_as_it_comes_with_an_adapter_of_diffusers_on_top(wan, tmp_path, monkeypatch):
    from diffusers.training_utils import _collate_lora_metadata
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(sample.DEFAULTS, "small", sample.DEFAULTS["wan-1.3b"] | dict(steps=3))
    monkeypatch.setitem(sample.USUAL, "small", ((4, 2, 4, 4), LENGTH))
    mine = ours(wan, wan, tmp_path / "s", model="small")
    assert (mine.sampling["shift"], mine.sampling["guidance"]) == (3.0, 5.0)
    check_same(mine, theirs(wan, mine))

    transformer = diffusers.WanTransformer3DModel.from_pretrained(f"{wan}/transformer")
    transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "ffn.net.2"],
                                            init_lora_weights=False))
    diffusers.WanPipeline.save_lora_weights(tmp_path / "lora", peft.get_peft_model_state_dict(transformer),
                                            **_collate_lora_metadata({"transformer": transformer}))
    adapted = ours(wan, wan, tmp_path / "t", model="small", lora=str(tmp_path / "lora"))
    check_same(adapted, theirs(wan, adapted, lora=tmp_path / "lora"))
    assert not near(mine.latents, adapted.latents, 1e-2)


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Weights of the same make in other widths."""
    folder = tmp_path_factory.mktemp("others")
    diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=3).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKLWan(base_dim=4, z_dim=6, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 6,
                               latents_std=[1.0] * 6).save_pretrained(folder / "vae")
    return str(folder)


TRAIN = [  # flags, with W for the pipeline and O for the others; what the message says
    (dict(init="W/vae"), "W/vae is no Wan transformer .*: it holds"),
    (dict(init="W/text_encoder"), "W/text_encoder is no Wan transformer"),
    (dict(init="O"), r"O/transformer does not fit: .*not wanted: blocks.2.*other than wanted: "
                     r".*ffn.0.weight \(96, 48\) \(wanted \(80, 48\)\).*; no --model would fit"),
    (dict(model="tiny"), r"has 4 channels and text of width 32; --model=tiny takes 24 and 64; \['small'\] would fit"),
    (dict(vae="O"), "--vae=O has channels 6; the latents were made with 4"),
    (dict(vae="W/text_encoder"), "holds .*UMT5.*; wanted is AutoencoderKLWan"),
]


@pytest.mark.parametrize("flags, said", TRAIN, ids=[" ".join(map("=".join, f.items())) for f, _ in TRAIN])
def test_weights_that_do_not_fit_are_named_before_a_run_begins(wan, others, data, tmp_path, capsys, flags, said):
    given = dict(model="small", data=(data,), out=str(tmp_path / "run"))
    for name, value in flags.items():
        given[name] = re.sub("^W", wan, re.sub("^O", others, value))
    with pytest.raises(SystemExit) as refused:
        run(train.main, train.Config(**given))
    message = capsys.readouterr().err.replace(wan, "W").replace(others, "O")
    assert refused.value.code == 2
    assert re.search(said, message)
    for name in ("config.json", "log.jsonl", "ckpt"):
        assert not (tmp_path / "run" / name).exists()


def test_a_teacher_of_another_family_and_a_vae_of_another_width_are_refused(
        wan, others, data, trained, tmp_path, capsys):
    cfg = distill.Config(teacher=trained, data=data, student_every=1, out=str(tmp_path / "run"))
    for flags, said in ((dict(teacher=f"{wan}/vae", model="small"), "is no Wan transformer"),
                        (dict(teacher=wan), "is not a run of ours: give --model"),
                        (dict(vae=others), "has channels 6")):
        with pytest.raises(SystemExit):
            run(distill.main, replace(cfg, **flags))
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_sampling_names_the_prompt_that_is_too_long_and_the_part_that_is_missing(
        wan, others, trained, tmp_path, capsys, monkeypatch):
    cfg = sample.Config(ckpt=trained, vae=wan, text=wan, prompts=PROMPTS, out=str(tmp_path / "s"))
    for flags, said in ((dict(prompts=("x" * 40,)), f"42 tokens, and this encoder takes {LENGTH}: 'xxx"),
                        (dict(text=None), "--text=PATH is wanted"), (dict(vae=None), "--vae=PATH is wanted"),
                        (dict(vae=others), "has channels 6; the latents were made with 4"),
                        (dict(text=f"{wan}/vae"), "wanted is umt5")):
        with pytest.raises(SystemExit):
            run(sample.main, replace(cfg, **flags))
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit):
        run(sample.main, cfg)
    assert "needs transformers: pip install -r requirements-wan.txt" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_missing_package_is_named_before_training_begins(wan, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit):
        run(train.main, train.Config(model="small", data=(data,), vae=wan, out=str(tmp_path / "run")))
    assert "needs diffusers: pip install -r requirements-wan.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
