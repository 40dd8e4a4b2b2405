"""From Wan's weights and films to what diffusers' own pipeline samples, on small random models in the real layouts."""
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
import step
import train
from data import Latents
from films import read_video
from helpers import kept_in, no_curves, ranks, run, spied, state
from model import MODELS, DiT, ModelConfig, Pair, cond_of
from test_codec import pipeline  # noqa: F401

pytestmark = pytest.mark.slow     # all of it: imports and pipelines take most of the time

SMALL = ModelConfig(dim=48, blocks=2, heads=4, ffn=80, channels=4, text_dim=32, freq_dim=32)
KINDS = {   # of Wan, small: text to video; image to video of 2.1, by CLIP too, and of 2.2; experts
    "small": SMALL,
    "small-clip": replace(SMALL, inputs=12, clip_dim=40),
    "small-i2v": replace(SMALL, inputs=12, boundary=0.9),
    "small-pair": replace(SMALL, boundary=0.875),
}
PROMPTS = ("a red circle", "the blue square, moving")
LENGTH = 26             # text tokens


@pytest.fixture(scope="module", autouse=True)
def packages():
    """Imported when a test of this file runs, not when all files are collected: they take seconds."""
    global diffusers, transformers, PIL
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    PIL = pytest.importorskip("PIL.Image")


def add_rows(setitem):
    """A row for each small model in every table."""
    for name, config in KINDS.items():
        setitem(MODELS, name, config)
        setitem(train.DEFAULTS, name, train.DEFAULTS["wan-1.3b"] | dict(
            steps=3, batch=2, lr=3e-3, warmup=0, val_every=0, save_every=0, sample_steps=3, sample_shift=3.0,
            guidance=4.0))
        setitem(distill.DEFAULTS, name, distill.DEFAULTS["wan-1.3b"] | dict(
            steps=2, batch=2, student_lr=3e-3, critic_lr=3e-3, val_every=0, save_every=0))


@pytest.fixture(scope="module", autouse=True)
def small():
    """Runs of small models, which draw no curves: a good part of the time that they would take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("log.curves", no_curves)
        add_rows(patch.setitem)
        yield


def distil(cfg):
    """distill.main in a process that knows nothing of this one's tables."""
    add_rows(dict.__setitem__)
    distill.main(cfg)


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
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for i, size in enumerate([(32, 32), (32, 32), (32, 48), (32, 32)]):
        video, caption = shapes.clip(np.random.default_rng(i), size=size, frames=9)
        codec.write_video(folder / f"{i}.mp4", [video], 8)
        (folder / f"{i}.txt").write_text(caption[:LENGTH - 3])
    return folder


@pytest.fixture(scope="module")
def prepared(wan, films):
    """-> prepared(name, **flags): the films as a dataset of that name."""
    def make(name, **flags):
        out = str(films / name)
        given = dict(videos=str(films), codec="wan", vae=wan, text=wan, sizes=("32x32", "32x48"), frames=5, fps=8,
                     text_length=LENGTH, dtype="fp32", out=out)
        run(prepare.main, prepare.Config(**given | flags))
        return out

    return make


@pytest.fixture(scope="module")
def data(prepared):
    return prepared("set")


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


def theirs(wan, mine, transformer=None, lora=None, grid=True, image=None, pipe=None, length=LENGTH, guidance=None,
           **more):
    """What diffusers' pipeline makes of the same noises, or its pipeline from an image -> its latents and pixels."""
    parts = {}
    if transformer is not None:
        parts["transformer"] = diffusers.WanTransformer3DModel.from_pretrained(transformer)
    if pipe is None:
        pipe = diffusers.WanPipeline.from_pretrained(wan, **parts)
    if lora:
        pipe.load_lora_weights(lora)
    begun = {} if image is None else {"image": image}
    if image is not None and not isinstance(pipe, diffusers.WanImageToVideoPipeline):
        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
        pipe = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
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
            max_sequence_length=length, callback_on_step_end=keep,
            guidance_scale=sampling["guidance"] if guidance is None else guidance,
            num_inference_steps=len(sampling["times"]) if few else sampling["steps"], **more).frames
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
    """Its expand_timesteps, of Wan 2.2's 5B: a t per token, 0 in the first frame, which it puts back at each step."""
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
    (dict(model="tiny"), r"has 4 channels and text of width 32; --model=tiny takes 24 and 64; .*'small', .* would fit"),
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


# ---- image to video -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of CLIP as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers has it, beside its image processor."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(hidden_size=40, intermediate_size=64, num_hidden_layers=3,
                                           num_attention_heads=4, image_size=32, patch_size=2)
    transformers.CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                                    ).save_pretrained(folder / "image_processor")
    return str(folder)


@pytest.fixture(scope="module")
def narrow(clip, tmp_path_factory):
    """CLIP of another width."""
    folder = tmp_path_factory.mktemp("narrow")
    config = transformers.CLIPVisionConfig(hidden_size=24, intermediate_size=8, num_hidden_layers=2,
                                           num_attention_heads=2, image_size=32, patch_size=2)
    transformers.CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    shutil.copytree(f"{clip}/image_processor", folder / "image_processor")
    return str(folder)


@pytest.fixture(scope="module")
def shown(prepared, clip):
    """Datasets with images, and with what CLIP sees in them too, whose texts have the length that diffusers takes."""
    return {"small-i2v": prepared("images", image=True),
            "small-clip": prepared("clip", image=True, clip=clip, text_length=512)}


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    """A picture's file, and the picture."""
    from PIL import Image
    pixels = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("frame") / "frame.png"
    Image.fromarray(pixels).save(path)
    return str(path), Image.fromarray(pixels)


def conditions_of_diffusers(wan, video, last=None):
    """What diffusers' pipeline concatenates to the noise for a clip's first frame."""
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(wan, image_encoder=None, image_processor=None)
    def preprocessed(frame):
        return pipe.video_processor.preprocess(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255.0)

    frames, h, w, _ = video.shape
    with torch.no_grad():
        _, condition = pipe.prepare_latents(
            preprocessed(video[0]), 1, 4, h, w, frames, torch.float32, torch.device("cpu"), None, None,
            None if last is None else preprocessed(last))
    return condition


@pytest.mark.parametrize("ends", (False, True), ids=("first frame", "both ends"))
def test_an_image_and_its_mask_are_what_diffusers_concatenates(wan, films, prepared, shown, ends):
    path = prepared("ends", image=True, last_frame=True) if ends else shown["small-i2v"]
    latents = Latents(path, seed=0, batch=1)
    for id in range(latents.count):
        _, frames, h, w = latents.shape_of(id)
        (video, _), = read_video(films / f"{source_of(latents, id)}", sizes=[(8 * h, 8 * w)], frames=4 * frames - 3,
                                 fps=8)
        want = conditions_of_diffusers(wan, video, video[-1] if ends else None)
        got = cond_of(latents.text([id]), latents.extras([id])).image
        assert got.shape == (1, 8, frames, h, w)
        assert torch.equal(got[:, :4], want[:, :4])
        assert near(got, want, 1e-6)


def source_of(latents, id):
    folder, own = latents.find(id)
    folder.captions.seek(folder.text_off[own, 2])
    return json.loads(folder.captions.readline())["source"]


def test_clips_tokens_are_the_states_before_its_last_layer(clip, films, shown):
    latents = Latents(shown["small-clip"], seed=0, batch=1)
    pipe = SimpleNamespace(
        image_processor=transformers.CLIPImageProcessor.from_pretrained(f"{clip}/image_processor"),
        image_encoder=transformers.CLIPVisionModel.from_pretrained(f"{clip}/image_encoder"))
    for id in (0, latents.count - 1):
        _, _, h, w = latents.shape_of(id)
        (video, _), = read_video(films / source_of(latents, id), sizes=[(8 * h, 8 * w)], frames=5, fps=8)
        with torch.no_grad():
            want = diffusers.WanImageToVideoPipeline.encode_image(pipe, PIL.fromarray(video[0]), "cpu")
        got = latents.extras([id])["clip"]
        assert got.shape == (1, 257, 40)
        assert near(got, want, 1e-6)


def test_a_dataset_without_images_is_what_it_was(data, shown):
    plain, other = (json.loads((ckpt.Path(path) / "manifest.json").read_text()) for path in (data, shown["small-i2v"]))
    assert not any("extras" in bucket for bucket in plain["buckets"])
    assert plain["codec"] == other["codec"]
    for bucket in plain["buckets"]:
        name = bucket["files"][0][0]
        assert (ckpt.Path(data) / name).read_bytes() == (ckpt.Path(shown["small-i2v"]) / name).read_bytes()


def image_pipeline(wan, *transformers_, clip=None, boundary=None):
    """diffusers' image-to-video pipeline of these folders of transformers."""
    names = ("transformer", "transformer_2")
    parts = {name: diffusers.WanTransformer3DModel.from_pretrained(path) for name, path in zip(names, transformers_)}
    if clip:
        parts["image_encoder"] = transformers.CLIPVisionModel.from_pretrained(f"{clip}/image_encoder")
        parts["image_processor"] = transformers.CLIPImageProcessor.from_pretrained(f"{clip}/image_processor")
    plain = diffusers.WanPipeline.from_pretrained(wan, transformer=None)
    return diffusers.WanImageToVideoPipeline(
        tokenizer=plain.tokenizer, text_encoder=plain.text_encoder, vae=plain.vae, scheduler=plain.scheduler,
        boundary_ratio=boundary, **parts)


@pytest.fixture(scope="module")
def trained_clip(wan, clip, shown, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("trained") / "clip")
    run(train.main, train.Config(model="small-clip", data=(shown["small-clip"],), out=out, vae=wan, samples=1,
                                 log_every=1))
    return out


def test_a_model_that_is_shown_an_image_and_clips_tokens_is_sampled_alike_by_diffusers(
        wan, clip, trained_clip, frame, tmp_path):
    path, picture = frame
    mine = ours(trained_clip, wan, tmp_path / "s", image=path, clip=clip)
    export.main(export.Config(ckpt=trained_clip, out=str(tmp_path / "export")))
    pipe = image_pipeline(wan, tmp_path / "export", clip=clip)
    check_same(mine, theirs(wan, mine, pipe=pipe, image=picture, length=512))
    black, _ = theirs(wan, mine, pipe=pipe, image=PIL.new("RGB", (32, 32)), length=512)
    assert not near(black, mine.latents, 1e-2)


def test_a_student_of_it_is_shown_the_image_too(wan, clip, shown, trained_clip, frame, tmp_path):
    path, picture = frame
    out = str(tmp_path / "run")
    run(distill.main, distill.Config(teacher=trained_clip, data=shown["small-clip"], out=out, vae=wan, student_every=1,
                                     samples=1))
    mine = ours(out, wan, tmp_path / "s", image=path, clip=clip)
    export.main(export.Config(ckpt=out, out=str(tmp_path / "export")))
    pipe = image_pipeline(wan, tmp_path / "export", clip=clip)
    check_same(mine, theirs(wan, mine, pipe=pipe, image=picture, length=512))


def test_dropped_text_leaves_the_image_and_so_does_the_unconditional_branch(shown, trained_clip, tmp_path, monkeypatch):
    """All nets that train.py and distill.py ask are shown what the dataset holds for the sample, whatever its text."""
    asked = spied(monkeypatch, DiT, "forward", lambda out, net, x, t, cond, **more: cond)
    data = Latents(shown["small-clip"], seed=0, batch=1)
    held = [cond_of(data.text([id]), data.extras([id])) for id in range(data.count)]
    null = data.null
    dropped = train.Config(model="small-clip", data=(shown["small-clip"],), out=str(tmp_path / "t"), samples=1,
                           text_dropout=0.99)
    run(train.main, dropped)
    run(distill.main, distill.Config(teacher=trained_clip, data=shown["small-clip"], out=str(tmp_path / "d"),
                                     student_every=1, samples=1))
    nulls = 0
    for cond in asked:
        for text, image, clip in zip(cond.text, cond.image, cond.clip, strict=True):
            own = [one for one in held if one.image.shape[1:] == image.shape and torch.equal(one.image[0], image)]
            assert own
            assert torch.equal(own[0].clip[0], clip)
            nulls += torch.equal(text, null)
            assert torch.equal(text, null) or torch.equal(text, own[0].text[0])
    assert nulls > 10


IMAGES = [  # flags, with the datasets and runs of this file by name; what the message says
    (train, dict(model="small-clip", data=("D",)),
     r"--model=small-clip begins with an image, and the dataset has none: .*; without them \['small', .* would fit"),
    (train, dict(model="small", data=("I",)),
     r"has images beside its latents .*--model=small is shown none; \['small-i2v'\] would fit, and small takes"),
    (train, dict(model="small-clip", data=("I",)), "CLIP's tokens of width 0 .*--model=small-clip takes 40"),
    (train, dict(model="small-i2v", data=("C",), expert="high", samples=0),
     "tokens of width 40 .*--model=small-i2v takes 0"),
    (train, dict(model="small-clip", data=("C",), init="W"),
     r"does not fit: .* missing: img_emb.proj.0.weight.*patch_embedding.weight \(48, 4, 1, 2, 2\).*--model=small\b"),
    (distill, dict(model="small-clip", teacher="R", data="D", student_every=1),
     "begins with an image, and the dataset has none"),
    (distill, dict(teacher="R", data="P", student_every=1), "begins with an image, and the dataset has none"),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", clip="K"), "begin with an image: --image=PATH"),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", image="F"), "lacks this part: --clip=PATH is wanted"),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", image="F", clip="W"),
     "no config.json|has an image encoder|wanted is clip_vision_model"),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", image="F", clip="N"),
     "has clip_width 24; the latents were made with 40"),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", image="R/config.json", clip="K"),
     "--image=R/config.json: "),
    (sample, dict(ckpt="R", prompts=PROMPTS, vae="W", text="W", image="nowhere.png", clip="K"),
     "--image=nowhere.png: no such file"),
    (sample, dict(ckpt="T", prompts=PROMPTS, vae="W", text="W", image="F"), "T was not trained with first frames"),
    (sample, dict(ckpt="T", prompts=PROMPTS, vae="W", text="W", clip="K"), "do not apply: T is small, which is shown"),
    (train, dict(model="small-clip", data=("C",), first_frame=0.5), "--first_frame=0.5 does not apply: small-clip"),
    (prepare, dict(videos="V", image=True), "--image needs --codec=wan"),
    (prepare, dict(videos="V", codec="wan", vae="W", text="W", clip="K"), "--clip needs --image"),
    (prepare, dict(videos="V", codec="wan", vae="W", text="W", last_frame=True), "--last_frame needs --image"),
    (prepare, dict(videos="V", codec="wan", vae="W", text="W", image=True, last_frame=True, clip="K"), "of two frames"),
    (prepare, dict(prompts="V", image=True), "--image does nothing for --prompts"),
]


def check_refused(root, given, said, places, capsys):
    """A root refuses flags in a line, in which paths are called by the names of `places`, and writes nothing."""
    with pytest.raises(SystemExit) as refusal:
        run(root.main, root.Config(**given))
    message = capsys.readouterr().err       # among the bars of what is loaded before
    for name, path in places.items():
        message = message.replace(path, name)
    assert refusal.value.code == 2
    assert re.search(said, message), message
    out = Path(given["out"])
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("root, flags, said", IMAGES, ids=[f"{r.__name__} {' '.join(f)}" for r, f, _ in IMAGES])
def test_images_that_do_not_fit_are_named(root, flags, said, wan, films, data, shown, trained, trained_clip, clip,
                                          narrow, frame, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    places = dict(W=wan, V=str(films), D=data, I=shown["small-i2v"], C=shown["small-clip"], R=trained_clip, T=trained,
                  K=clip, N=narrow, F=frame[0])
    if flags.get("data") == "P":
        run(prepare.main, prepare.Config(prompts=str(tmp_path / "prompts.txt"), codec="wan", vae=wan, text=wan,
                                         shape=(4, 2, 4, 4), text_length=512, out=str(tmp_path / "p")))
        places["P"] = str(tmp_path / "p")

    def place(value):
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return re.sub("^[A-Z](?=$|/)", lambda found: places[found[0]], value) if isinstance(value, str) else value

    given = {name: place(value) for name, value in flags.items()}
    check_refused(root, given | dict(out=str(tmp_path / "run")), said, places, capsys)


# ---- causal ---------------------------------------------------------------------------------------------------------


def test_a_causal_model_and_its_student_go_from_weights_to_clips_longer_than_trained(
        wan, prepared, trained, tmp_path, monkeypatch):
    """Chunks of 2 latent frames, of which the first is a picture and 4 of them, the last may be 4 pictures alone."""
    set_, out, few = prepared("longer", frames=9), str(tmp_path / "causal"), str(tmp_path / "few")
    run(train.main, train.Config(model="small", data=(set_,), init=wan, out=out, vae=wan, samples=1, clean_prefix=0.5,
                                 window=(-9, 1, 1), tile=(2, 99, 99)))
    run(distill.main, distill.Config(teacher=trained, student=out, data=set_, out=few, vae=wan, student_every=1,
                                     samples=1))
    export.main(export.Config(ckpt=few, out=str(tmp_path / "export")))
    made = spied(monkeypatch, step, "at_once", lambda x0, *rest, **more: x0)
    films, whole = [], codec.load("wan", vae=wan)
    for path in (out, few, str(tmp_path / "export")):
        run(sample.main, sample.Config(ckpt=path, vae=wan, text=wan, prompts=PROMPTS[:1], frames=17, sink=1, window=2,
                                       out=str(tmp_path / "s")))
        assert [x0.shape[2] for x0 in made] == [2, 2, 1]
        z, = torch.cat(made, 2)
        mean, std = codec.moments(whole.spec)
        size = tuple(8 * n for n in z.shape[2:])
        (film, _), = read_video(next((tmp_path / "s").glob("*.mp4")), sizes=[size], frames=17, fps=8)
        differs = np.abs(film.astype(float) - whole.decode(z * std + mean)).mean((1, 2, 3))
        assert differs.max() < 8
        films.append(z)
        made.clear()
    assert torch.equal(films[1], films[2])
    assert not near(films[0], films[1], 1e-2)
    monkeypatch.setattr(codec, "LARGE", 700)
    with pytest.raises(SystemExit):
        run(sample.main, sample.Config(ckpt=few, vae=wan, text=wan, prompts=PROMPTS, out=str(tmp_path / "t")))
    assert not (tmp_path / "t").exists()


# ---- two experts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(wan, tmp_path_factory):
    """-> {kind: the folder of a whole pipeline with two experts}, text to video and image to video."""
    folders = {}
    for kind, inputs in (("small-pair", 4), ("small-i2v", 12)):
        folder = shutil.copytree(wan, tmp_path_factory.mktemp(kind) / "Wan2.2")
        shutil.rmtree(folder / "transformer")
        for seed, name in ((3, "transformer"), (4, "transformer_2")):
            torch.manual_seed(seed)
            diffusers.WanTransformer3DModel(
                num_attention_heads=4, attention_head_dim=12, in_channels=inputs, out_channels=4, text_dim=32,
                freq_dim=32, ffn_dim=80, num_layers=2).save_pretrained(folder / name)
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer_2"] = index["transformer"]
        (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": MODELS[kind].boundary}))
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="module")
def experts(pair, data, shown, wan, tmp_path_factory):
    """-> experts(kind, **flags): the folders of runs that train the expert for high noise and that for low."""
    def make(kind, **flags):
        out = tmp_path_factory.mktemp("experts")
        path = shown["small-i2v"] if kind == "small-i2v" else data
        for expert in ("high", "low"):
            run(train.main, train.Config(model=kind, expert=expert, data=(path,), init=pair[kind], samples=0,
                                         out=str(out / expert), **flags))
        return str(out / "high"), str(out / "low")

    return make


@pytest.fixture(scope="module")
def both(experts):
    return experts("small-pair")


def two_of_diffusers(folder, kind):
    """diffusers' pipeline of the transformers in a folder with two."""
    paths = [f"{folder}/transformer", f"{folder}/transformer_2"]
    boundary = MODELS[kind].boundary
    if kind == "small-i2v":
        return lambda wan: image_pipeline(wan, *paths, boundary=boundary)
    nets = [diffusers.WanTransformer3DModel.from_pretrained(path) for path in paths]
    return lambda wan: diffusers.WanPipeline.from_pretrained(wan, transformer=nets[0], transformer_2=nets[1],
                                                             boundary_ratio=boundary)


@pytest.mark.parametrize("kind", ("small-pair", pytest.param("small-i2v", marks=pytest.mark.slow)))
def test_two_experts_are_sampled_alike_by_diffusers(kind, wan, both, experts, frame, tmp_path):
    high, low = both if kind == "small-pair" else experts(kind)
    image = dict(image=frame[0]) if kind == "small-i2v" else {}
    mine = ours(high, wan, tmp_path / "s", other=low, guidance=(4.0, 2.0), steps=4, **image)
    export.main(export.Config(ckpt=low, other=high, out=str(tmp_path / "export")))     # in whichever order
    pipe = two_of_diffusers(tmp_path / "export", kind)
    shows = dict(image=frame[1]) if image else {}
    check_same(mine, theirs(wan, mine, pipe=pipe(wan), guidance=4.0, guidance_scale_2=2.0, **shows))
    swapped, _ = theirs(wan, mine, pipe=pipe(wan), guidance=2.0, guidance_scale_2=4.0, **shows)
    assert not near(swapped, mine.latents, 1e-3)
    again = ours(low, wan, tmp_path / "t", other=high, guidance=(4.0, 2.0), steps=4, **image)
    assert torch.equal(again.latents, mine.latents)
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["boundary_ratio"] == MODELS[kind].boundary
    whole = ours(str(tmp_path / "export"), wan, tmp_path / "u", guidance=(4.0, 2.0), steps=4, **image)
    assert torch.equal(whole.latents, mine.latents)


def test_adapters_of_two_experts_are_loaded_onto_them_by_diffusers(wan, pair, experts, tmp_path):
    pytest.importorskip("peft")
    high, low = experts("small-pair", lora_rank=3, lora_alpha=4.0)
    mine = ours(high, wan, tmp_path / "s", other=low, guidance=(4.0, 2.0), steps=4)
    export.main(export.Config(ckpt=high, other=low, lora=True, out=str(tmp_path / "lora")))
    pipe = two_of_diffusers(pair["small-pair"], "small-pair")(wan)
    pipe.load_lora_weights(tmp_path / "lora" / "transformer")
    pipe.load_lora_weights(tmp_path / "lora" / "transformer_2", load_into_transformer_2=True)
    check_same(mine, theirs(wan, mine, pipe=pipe, guidance=4.0, guidance_scale_2=2.0))


@pytest.mark.parametrize("expert", ("high", "low"))
def test_an_expert_is_trained_and_validated_on_its_own_times_alone(expert, pair, data, wan, tmp_path, monkeypatch):
    asked = spied(monkeypatch, train, "flow_loss", lambda out, net, x0, cond, t, e, free=None: t)
    videos = spied(monkeypatch, step, "ode", lambda out, net, *more: net)
    calls = spied(monkeypatch, Pair, "__call__", lambda out, net, x_t, t, cond: t)
    cfg = train.Config(model="small-pair", expert=expert, data=(data,), init=pair["small-pair"], vae=wan, samples=1,
                       out=str(tmp_path / "run"))
    run(train.main, cfg)
    t = torch.cat(asked)
    assert len(t) == 3 * 2 + 4 * 10     # updates, and the validation of all four clips
    assert ((t >= 0.875) == (expert == "high")).all()
    assert len(set(t.tolist())) == 6 + 10
    (net,) = videos
    assert {bool(x.max() >= 0.875) for x in calls} == {True, False}
    sampling = ckpt.sampling_of(str(tmp_path / "run"))
    assert (sampling["expert"], sampling["boundary"]) == (expert, 0.875)
    other = ckpt.weights(pair["small-pair"], expert=ckpt.other_of(expert))
    frozen = dict((net.low if expert == "high" else net.high).net.named_parameters())
    assert all(torch.equal(p, other.tensor(name)) for name, p in frozen.items())


@pytest.fixture(scope="module")
def students(pair, data, tmp_path_factory):
    """The high student, and the low one whose rollouts it begins; of each what its nets were asked."""
    out, seen = tmp_path_factory.mktemp("students"), {}
    given = dict(model="small-pair", teacher=pair["small-pair"], data=data, student_every=1, steps=2, samples=1)
    for expert, more in (("high", {}), ("low", dict(other=str(out / "high")))):
        with pytest.MonkeyPatch.context() as patch:
            seen[expert] = dict(
                exits=spied(patch, distill, "rollout",
                            lambda x0, net, z, cond, times, noises, exit, free=None: (exit, net)),
                scores=spied(patch, distill, "sample_t", lambda t, *more: t),
                nets=spied(patch, DiT, "forward", lambda v, net, x, t, cond, **more: (net, t)))
            run(distill.main, distill.Config(expert=expert, out=str(out / expert), **given, **more))
    return out, seen


def test_an_experts_student_ends_its_rollouts_at_its_own_times_and_its_scores_are_in_its_range(students):
    out, seen = students
    for expert, exits in (("high", [0, 1]), ("low", [2, 3])):
        trained = seen[expert]["exits"][:8]         # 2 steps of student and critic, two micro-batches each
        assert {exit for exit, _ in seen[expert]["exits"]} <= {*exits, 1}
        assert {exit for exit, _ in trained} == set(exits)
        t = torch.cat(seen[expert]["scores"])
        assert ((t >= 0.875) == (expert == "high")).all()
    high_nets = {id(net) for net, t in seen["high"]["nets"] if t.max() < 0.875}
    assert not high_nets        # no net at all is asked below the boundary


def test_the_high_student_begins_the_rollouts_of_the_low_one_and_does_not_change(students):
    out, seen = students
    pairs = [net for _, net in seen["low"]["exits"]]
    assert all(isinstance(net, Pair) for net in pairs)
    frozen = dict(pairs[0].high.net.named_parameters())
    source = ckpt.weights(str(out / "high"))
    assert all(torch.equal(p, source.tensor(name)) for name, p in frozen.items())
    asked = {id(net) for net, t in seen["low"]["nets"] if t.max() >= 0.875}
    assert asked == {id(pairs[0].high.net)}     # neither teacher nor critic nor the low student


def test_two_students_make_a_pair_that_diffusers_samples_alike(students, wan, tmp_path):
    out, _ = students
    mine = ours(str(out / "high"), wan, tmp_path / "s", other=str(out / "low"))
    export.main(export.Config(ckpt=str(out / "high"), other=str(out / "low"), out=str(tmp_path / "export")))
    check_same(mine, theirs(wan, mine, pipe=two_of_diffusers(tmp_path / "export", "small-pair")(wan)))


EXPERTS = [  # flags, with P for the pipeline of two experts, H and L for runs of each; what the message says
    (train, dict(model="small", expert="high"), "--expert=high: small is one net at all noise levels, .*small-pair"),
    (train, dict(model="small-pair"), "small-pair has two experts: --expert=high or --expert=low says which"),
    (train, dict(model="small-pair", init="P", samples=0), "small-pair has two experts"),
    (train, dict(model="small", init="P", samples=0), "P holds two experts, transformer for high noise"),
    (train, dict(model="small-pair", expert="low", init="H", samples=0), "is the expert for high noise, .* for low"),
    (train, dict(model="small-pair", expert="low", init="O", samples=0), "O holds no transformer_2, .* for low noise"),
    (train, dict(model="small-pair", expert="low"), "none for high noise lies beside --init: --other=PATH"),
    (train, dict(model="small-pair", expert="low", init="P", other="L"), "is the expert for low noise, .* for high"),
    (train, dict(model="small", other="P"), "--other=P: small is one net"),
    (train, dict(model="small-pair", expert="low", init="P", first_frame=0.5), "does not apply: small-pair's two"),
    (distill, dict(model="small-pair", teacher="P", expert="high", first_frame=0.5), "does not apply: small-pair's"),
    (train, dict(model="small", guidance=(4.0, 3.0)), "--guidance 4.0 3.0: small is one net, it takes one scale"),
    (distill, dict(model="small-pair", teacher="P"), "small-pair has two experts"),
    (distill, dict(model="small-pair", teacher="P", expert="low"), "--expert=low --other=None: the expert for high"),
    (distill, dict(model="small-pair", teacher="P", expert="high", other="H"), "--expert=high --other=H: the expert"),
    (distill, dict(model="small-pair", teacher="P", expert="low", other="H"), "H is no run that distilled the expert"),
    (distill, dict(model="small-pair", teacher="P", expert="low", other="H", times=(1.0, 0.9)),
     "--expert=low: none of the student's times 1 0.9 is its own"),
    (distill, dict(teacher="H", expert="low", other="H"), "is the expert for high noise, wanted is that for low"),
    (sample, dict(ckpt="H"), "H is the expert for high noise of two that make videos together: --other=PATH"),
    (sample, dict(ckpt="H", other="H"), "H is the expert for high noise, wanted is that for low noise too"),
    (sample, dict(ckpt="T", other="H"), "--other and --other_lora are for two experts, T is small"),
    (sample, dict(ckpt="T", guidance=(4.0, 3.0)), "--guidance 4.0 3.0: small is one net"),
    (export, dict(ckpt="H", other="H"), "H and H are both the expert for high noise"),
    (export, dict(ckpt="H", other="T"), "T is small, not one of two experts"),
]


@pytest.mark.parametrize("root, flags, said", EXPERTS, ids=[f"{r.__name__} {' '.join(f)}" for r, f, _ in EXPERTS])
def test_experts_that_do_not_fit_are_named(root, flags, said, wan, pair, both, trained, data, tmp_path, capsys):
    shutil.copytree(f"{pair['small-pair']}/transformer", tmp_path / "one" / "transformer")
    places = dict(P=pair["small-pair"], H=both[0], L=both[1], T=trained, O=str(tmp_path / "one"))
    given = dict(out=str(tmp_path / "run"))
    if root in (train, distill):
        given["data"] = (data,) if root is train else data
    if root is distill:
        given["student_every"] = 1
    if root is sample:
        given |= dict(prompts=PROMPTS, vae=wan, text=wan)
    given |= {name: places.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
    check_refused(root, given, said, places, capsys)


def test_a_low_student_of_other_times_than_the_high_ones_is_refused(students, pair, data, tmp_path, capsys):
    out, _ = students
    with pytest.raises(SystemExit):
        run(distill.main, distill.Config(
            model="small-pair", teacher=pair["small-pair"], data=data, expert="low", other=str(out / "high"),
            student_steps=3, student_every=1, out=str(tmp_path / "run")))
    assert re.search("is of model, boundary and times small-pair 0.875 1.0 .*; this run is of", capsys.readouterr().err)


def test_two_ranks_that_share_the_weights_distil_an_expert_as_one_does(students, pair, data, tmp_path):
    """Each rank has another sample, hence another t: a net that was chosen by it would be gathered from two."""
    out, _ = students
    ranks(2, distil, distill.Config(
        model="small-pair", teacher=pair["small-pair"], data=data, expert="low", other=str(out / "high"), steps=2,
        student_every=1, samples=1, shard=2, out=str(tmp_path / "two"), device="cpu"))
    one, two = state(out / "low"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith(("net.", "critic.")):
            assert torch.allclose(one[name], two[name], atol=3e-5), name
