"""The codecs give back what they were given, and videos are written as browsers play them."""
import hashlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist

import av
import numpy as np
import pytest

import torch

import codec
import shapes
from test_films import noise, numbered, numbers, read

ORDER = """0000 0001 0010 0100 0002 0011 0020 1000 2000 0101 0110 0200 0003 0012 0021 0030 1001 1010 2001 2010 0102 0111
           0120 1100""".split()                                 # colour, kt, ky, kx of the 24 coefficients


# ------------------------------------------------------------------------------------------------------------------ dct

@pytest.mark.parametrize("channel", [0, 5, 9, 21, 23])
def test_a_dct_coefficient_is_the_product_of_a_colour_and_three_cosines(channel):
    video = noise(9, 8, 12, 3)
    a, kt, ky, kx = map(int, ORDER[channel])
    colour = [(1, 1, 1), (1, 0, -1), (-1, 2, -1)][a]
    scale = math.prod(math.sqrt((1 if k == 0 else 2) / 4) for k in (kt, ky, kx)) / math.sqrt(sum(c * c for c in colour))
    total = 0.0
    for t in range(4):
        for y in range(4):
            for x in range(4):                                  # the block of frames 5-8, rows 4-7, columns 8-11
                wave = math.prod(math.cos(math.pi / 4 * k * (n + 0.5)) for k, n in ((kt, t), (ky, y), (kx, x)))
                total += wave * sum(c * (p / 255 - 0.5) for c, p in zip(colour, map(float, video[5 + t, 4 + y, 8 + x])))
    z = codec.load("dct").encode(video)
    assert z.shape == (24, 3, 2, 3) and z.dtype == torch.float32 and z.is_contiguous()
    assert z[channel, 2, 1, 2].item() == pytest.approx(scale * total, abs=1e-5)


def test_all_192_coefficients_give_the_video_back_exactly():
    full = codec.load({"name": "dct", "channels": 192})
    video = noise(9, 8, 12, 3)
    assert np.array_equal(full.decode(full.encode(video)), video)


def test_the_first_frame_is_a_latent_frame_of_its_own_without_motion():
    dct = codec.load("dct")
    z = dct.encode(noise(5, 8, 8, 3))
    moving = [i for i, key in enumerate(ORDER) if key[1] != "0"]
    assert len(moving) == 8 and z[moving, 0].abs().max() < 1e-6 and z[moving, 1].abs().min() > 1e-3
    still = dct.decode(z)
    z[moving, 0] += torch.tensor([0.3, -0.2] * 4)[:, None, None]            # as a model may make them
    assert np.abs(dct.decode(z)[0] - np.int16(still[0])).max() <= 1 and np.array_equal(dct.decode(z)[1:], still[1:])


def chunked(decode_on, z, chunks):
    """A clip decoded chunk by chunk."""
    state, videos = None, []
    for chunk in z.split(chunks, 1):
        video, state = decode_on(chunk, state)
        videos.append(video)
    return np.concatenate(videos)


@pytest.mark.parametrize("chunks", [1, 2, [1, 3, 3]])
def test_chunks_decoded_one_after_another_are_the_whole_clip_to_the_bit(chunks):
    dct, z = codec.load("dct"), torch.randn(24, 7, 8, 6, generator=torch.Generator().manual_seed(0)) / 3
    assert np.array_equal(chunked(dct.decode_on, z, chunks), dct.decode(z))


def test_shapes_come_back_at_30_decibels_and_the_first_frame_at_33():
    dct, rng = codec.load("dct"), np.random.default_rng(0)
    videos = [shapes.clip(rng, caption=caption)[0] for caption in shapes.CAPTIONS]
    frames = np.mean([codec.psnr(video, dct.decode(dct.encode(video))) for video in videos], axis=0)
    assert frames.shape == (17,) and frames.mean() == pytest.approx(30.7, abs=0.3)
    assert frames[0] == pytest.approx(33.2, abs=0.4)


def test_psnr_is_of_each_frame_and_infinite_where_frames_are_equal():
    a = noise(3, 8, 8, 3) // 2
    b = a.copy()
    b[1] += 5
    assert codec.psnr(a, b).tolist() == [math.inf, pytest.approx(20 * math.log10(255 / 5)), math.inf]


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (5, 6, 8, 3), (5, 8, 6, 3)])
def test_a_video_that_the_strides_do_not_divide_is_refused(shape):
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames"):
        codec.load("dct").encode(noise(*shape))


def test_a_spec_that_went_through_json_loads_the_same_codec():
    one = codec.load("dct", text_length=40)
    two = codec.load(json.loads(json.dumps(one.spec)))
    video = noise(5, 8, 8, 3)
    assert one.spec == two.spec and two.spec["text_length"] == 40 and two.stride == (4, 4, 4) and two.decodes
    assert torch.equal(one.encode(video), two.encode(video))
    assert torch.equal(one.embed(["a red circle"])[0], two.embed(["a red circle"])[0])
    assert one.spec["channels"] == 24 and one.spec["text_width"] == 64


def test_a_codec_that_does_not_exist_and_weights_for_one_that_has_none_are_refused():
    with pytest.raises(ValueError, match="'jpeg'.*'dct' and 'wan'"):
        codec.load("jpeg")
    with pytest.raises(ValueError, match="--vae"):
        codec.load("dct", vae="models/wan")


# ---------------------------------------------------------------------------------------------------------------- words

def test_every_word_has_a_row_and_an_unknown_one_is_as_distinct_as_any():
    null, known, unknown, other = codec.load("dct").embed(["", "a red circle", "a blorp circle", "a fnord circle"])
    assert null.shape == (1, 64) and known.shape == unknown.shape == (4, 64) and known.dtype == torch.float32
    assert torch.equal(known[0], null[0]) and torch.equal(known[[1, 3]], unknown[[1, 3]])
    for a, b in ((known, unknown), (unknown, other), (known, other)):
        assert torch.cosine_similarity(a[2], b[2], dim=0) < 0.6 and (a[2] - b[2]).norm() > 8


def test_order_and_marks_count_and_case_and_accents_form_do_not():
    embed = codec.load("dct", text_length=16).embed
    a, b = embed(["a red circle", "circle red a"])
    assert not torch.equal(a, b) and torch.allclose(a.sum(0), b.sum(0), atol=1e-5)
    assert torch.equal(*embed(["A Red  circle\n", "a red circle"]))
    assert torch.equal(*embed(["caf\u00e9", "cafe\u0301"]))
    assert [len(row) for row in embed(["100 %, now!", "\u732b \U0001f408"])] == [6, 3]
    assert torch.equal(embed(["left."])[0][:2], embed(["left"])[0])


def test_a_prompt_longer_than_the_text_length_names_the_limit():
    assert len(codec.load("dct").embed(["one two three four five six seven"])[0]) == 8
    with pytest.raises(ValueError, match="8 words.*takes 7.*'one two"):
        codec.load("dct").embed(["one two three four five six seven eight"])


def test_a_word_keeps_its_vector_in_every_version_because_checkpoints_rely_on_it():
    bits = hashlib.shake_256(b"red").digest(8)
    first = NormalDist().inv_cdf((int.from_bytes(bits[:4], "little") + 0.5) / 2**32)
    place = codec.word_vector("<1>", 64)
    row = codec.load("dct").embed(["red"])[0][1]
    assert (row - place / 2)[:2].tolist() == pytest.approx([first, -1.6531], abs=1e-4)
    many = torch.stack([codec.word_vector(f"word{i}", 64) for i in range(200)])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


# ---------------------------------------------------------------------------------------------------------- video files

def test_a_written_video_is_one_that_browsers_play_and_reads_back(tmp_path):
    video, _ = shapes.clip(np.random.default_rng(0))
    codec.write_video(tmp_path / "a.mp4", [video], 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 256, 256)
        assert (stream.frames, stream.average_rate, context.colorspace, context.color_range) == (17, 8, 1, 1)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    (clip, _), = read(tmp_path / "a.mp4", sizes=[(32, 32)], frames=17)
    assert codec.psnr(clip, video).min() > 40


def test_videos_of_many_sizes_and_lengths_share_a_grid_of_whole_pixels(tmp_path):
    one, two, three = noise(5, 9, 11, 3), noise(2, 12, 8, 3, seed=1), noise(3, 4, 4, 3, seed=2)
    sheet = codec.grid([one[0], two[0], three[0]])
    zoom = 256 // 12
    assert sheet.shape == (2 * 12 * zoom + 4, 2 * 11 * zoom + 4, 3)
    assert np.array_equal(sheet[:9 * zoom:zoom, :11 * zoom:zoom], one[0])
    assert np.array_equal(sheet[:12 * zoom:zoom, 11 * zoom + 4:][:, :8 * zoom:zoom], two[0])
    assert np.array_equal(sheet[12 * zoom + 4:][:4 * zoom:zoom, :4 * zoom:zoom], three[0])
    assert codec.grid([noise(301, 303, 3)]).shape == (302, 304, 3)          # large ones stay, evened
    assert max(codec.grid([noise(32, 32, 3)] * 36).shape) <= 1300
    codec.write_video(tmp_path / "a.mp4", [numbered(5, 32, 32), numbered(2, 32, 32)], 7.5)
    (clip, _), = read(tmp_path / "a.mp4", sizes=[(256, 516)], fps=7.5)
    assert numbers(clip[:, :, :250]) == [0, 1, 2, 3, 4] and numbers(clip[:, :, 266:]) == [0, 1, 1, 1, 1]


def test_a_contact_sheet_has_a_row_of_frames_per_clip(tmp_path):
    from matplotlib.image import imread
    videos = [numbered(17, 32, 32), np.stack([np.full((240, 320, 3), (200, 60, 20), np.uint8)] * 3)]
    codec.contact_sheet(tmp_path / "a.png", videos, [r"$5 \nope $6", "a long caption " * 40])
    sheet = (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(np.uint8)
    row = sheet[6 + 26 + 64]                                    # through the middle of the first row
    greys = [int(row[12 + 64 + i * (128 + 8)][0]) for i in range(6)]
    assert greys == [20 + 4 * n for n in (0, 3, 6, 10, 13, 16)]
    assert (sheet == (200, 60, 20)).all(2).sum() > 6 * 150 * 200
    assert sheet[6:32, 12:].max() > 200                         # there is writing
    codec.contact_sheet(tmp_path / "many.png", videos[:1] * 30, ["x"] * 30)
    assert imread(tmp_path / "many.png").shape[0] < 24 * 170
    with pytest.raises(ValueError):
        codec.contact_sheet(tmp_path / "b.png", videos, ["one"])


# ---------------------------------------------------------------------------------------------------------------- clips

SAMPLING = {"codec": {"name": "dct"}, "mean": [0.5] * 24, "std": [0.25] * 24, "fps": 8}


def normalised(n=2, size=(32, 32), how=SAMPLING):
    """n clips of shapes and their latents (n, 24, F, H, W) as a model gives them."""
    videos = [shapes.clip(np.random.default_rng(i), size=size)[0] for i in range(n)]
    z = torch.stack([codec.load("dct").encode(video) for video in videos])
    return videos, (z - how["mean"][0]) / how["std"][0]


def test_clips_are_written_as_the_videos_that_their_normalised_latents_are(tmp_path):
    videos, x0 = normalised()
    said = []
    path = codec.write_clips(tmp_path / "new/step_0.5", x0.requires_grad_(), SAMPLING, columns=1, report=said.append)
    assert path == tmp_path / "new/step_0.5.mp4"
    assert [file.name for file in path.parent.iterdir()] == ["step_0.5.mp4"]
    assert said == []
    (clip, _), = read(path, sizes=[(516, 256)], frames=17)              # a column of two clips, 8 times enlarged
    dct = codec.load("dct")
    for top, video in zip((0, 260), videos):
        shown = clip[:, top:top + 256].reshape(17, 32, 8, 32, 8, 3).mean((2, 4))
        assert codec.psnr(shown, dct.decode(dct.encode(video))).min() > 35


def test_without_the_vae_that_they_need_clips_are_kept_as_latents_that_are_not_normalised(tmp_path):
    said, x0 = [], torch.randn(2, 4, 2, 3, 5)
    how = {"codec": {"name": "wan"}, "mean": [1.0, 2.0, 3.0, 4.0], "std": [5.0, 6.0, 7.0, 8.0], "fps": 8}
    path = codec.write_clips(tmp_path / "a", x0, how, report=said.append)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]
    for c, z in enumerate(np.load(path).swapaxes(0, 1)):
        assert np.allclose(z, x0[:, c] * how["std"][c] + how["mean"][c])
    assert said == [f"{path} holds latents instead of a video: no --vae is given to decode them"]


def failing(error):
    def fail(*args, **named):
        raise type(error)(*error.args)      # a new one: a traceback holds what its frames hold
    return fail


FAILURES = [(torch.OutOfMemoryError("out of\nmemory"), "OutOfMemoryError: out of memory"),
            (RuntimeError("a kernel"), "RuntimeError: a kernel"), (ValueError("a size"), "ValueError: a size"),
            (av.FFmpegError(1, "an encoder"), "FFmpegError: .*an encoder"), (OSError(28, "No space"), "No space"),
            (ImportError("no diffusers"), "ImportError: no diffusers"), (TypeError("z" * 999), r"TypeError: \.\.\.")]


@pytest.mark.parametrize("error, words", FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
@pytest.mark.parametrize("place", ["load", "decode", "write_video"])
def test_clips_that_cannot_be_decoded_or_written_are_kept_as_latents_and_nothing_is_raised(
        tmp_path, monkeypatch, place, error, words):
    said, (_, x0) = [], normalised(1)
    if place == "decode":
        dct = codec.load("dct")._replace(decode=failing(error))
        monkeypatch.setattr(codec, "load", lambda spec, **parts: dct)
    else:
        monkeypatch.setattr(codec, place, failing(error))
    path = codec.write_clips(tmp_path / "a", x0, SAMPLING, report=said.append)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]
    assert np.allclose(np.load(path), x0 * 0.25 + 0.5)
    message, = said
    assert re.search(f"a.npy holds latents instead of a video: .*{words}", message)
    assert "\n" not in message and len(message) < 300 + len(str(path)) + 50


@contextmanager
def small_files(size):
    """Inside, no file can grow beyond `size` bytes, as on a disk almost full. Pytest's own output may be one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_no_half_video_and_no_half_latents(tmp_path):
    x0, said = 4 * torch.randn(1, 24, 5, 8, 8), []                      # 31 kB of latents, a video of hundreds
    earlier = tmp_path / "earlier.mp4"
    earlier.write_text("of the run that went before")
    with small_files(60_000):
        path = codec.write_clips(tmp_path / "earlier", x0, SAMPLING, report=said.append)
    assert path == tmp_path / "earlier.npy" and np.load(path).shape == (1, 24, 5, 8, 8)
    assert earlier.read_text() == "of the run that went before"
    with small_files(10_000):
        assert codec.write_clips(tmp_path / "a", x0, SAMPLING, report=said.append) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["earlier.mp4", "earlier.npy"]
    assert len(said) == 2
    assert re.search("a.mp4 is not written .*too large.*nor are its latents .*OSError", said[1])


def test_clips_for_a_folder_that_cannot_be_are_reported(tmp_path):
    (tmp_path / "file").touch()
    said, (_, x0) = [], normalised(1)
    assert codec.write_clips(tmp_path / "file" / "a", x0, SAMPLING, report=said.append) is None
    assert len(said) == 1 and "nor are its latents" in said[0]


# ------------------------------------------------------------------------------------------------------------------ wan

@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in the layout of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, its parts tiny and random."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    vae.save_pretrained(folder / "vae")

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(piece, -2.0 - len(piece)) for piece in ["▁a", "▁red", *"▁abcdefghijklmnopqrstuvwxyzA.,&é'", '"']]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder / "tokenizer")
    config = transformers.UMT5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_wan_latents_are_the_vaes_mean_not_normalised_and_decode_as_the_vae_does(pipeline):
    from diffusers import AutoencoderKLWan
    wan, vae = codec.load("wan", vae=pipeline), AutoencoderKLWan.from_pretrained(pipeline / "vae")
    video = noise(5, 32, 48, 3)
    z = wan.encode(video)
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(z, vae.encode(x).latent_dist.mean[0], atol=1e-6)
        y = vae.decode(z[None]).sample[0]
    assert z.shape == (4, 2, 4, 6) and z.dtype == torch.float32 and not z.requires_grad and wan.decodes
    assert np.array_equal(wan.decode(z), ((y.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    with pytest.raises(ValueError, match="multiples of 8"):
        wan.encode(noise(5, 32, 44, 3))


@pytest.mark.slow
def test_wan_decodes_chunk_by_chunk_what_it_decodes_whole_also_two_clips_in_turn(pipeline, monkeypatch):
    exact = []
    monkeypatch.setattr(codec, "to_bytes", lambda x: exact.append(x) or x.numpy())
    wan = codec.load("wan", vae=pipeline)
    clips = torch.randn(2, 4, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    states, made = [None, None], [[], []]
    for some in clips.split([1, 2, 2], 2):
        for i, z in enumerate(some):
            video, states[i] = wan.decode_on(z, states[i])
            made[i].append(video)
    for z, videos in zip(clips, made):
        want = wan.decode(z)
        assert np.abs(np.concatenate(videos) - want).max() <= 1e-5 * np.abs(want).max()
    monkeypatch.setattr(codec, "LARGE", 700)
    with pytest.raises(ValueError, match="24x32 pixels.*decodes no chunks"):
        wan.decode_on(clips[0], None)


def test_one_frame_is_encoded_as_the_first_of_a_clip(pipeline):
    """So that an image can stand for the first frame of the latents that a model was trained on."""
    video = noise(9, 32, 48, 3)
    for coder in (codec.load("dct"), codec.load("wan", vae=pipeline)):
        z, first = coder.encode(video), coder.encode(video[:1])
        assert first.shape == (len(z), 1, *z.shape[2:])
        assert torch.allclose(first[:, 0], z[:, 0], atol=1e-5)
        assert not torch.allclose(first[:, 0], z[:, 1], atol=1e-1)


def test_the_wan_spec_says_what_the_vae_and_the_text_encoder_are(pipeline):
    wan = codec.load("wan", vae=str(pipeline), text=str(pipeline))
    digest = hashlib.sha256((pipeline / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert wan.spec == {
        "name": "wan", "channels": 4, "stride": [4, 8, 8], "mean": [0.1, 0.2, 0.3, 0.4], "std": [1.0, 2.0, 3.0, 4.0],
        "text_width": 32, "text_length": 512, "vae_sha256": {"diffusion_pytorch_model.safetensors": digest},
        "text_sha256": wan.spec["text_sha256"]}
    assert list(wan.spec["text_sha256"]) == ["model.safetensors"]
    again = codec.load(json.loads(json.dumps(wan.spec)), vae=pipeline / "vae", text=pipeline / "text_encoder")
    assert again.spec == wan.spec and again.stride == (4, 8, 8)


def test_a_weight_file_is_hashed_once_until_it_changes(pipeline, tmp_path, monkeypatch):
    shutil.copytree(pipeline, tmp_path / "wan")
    hashed, file_digest = [], hashlib.file_digest

    def counted(stream, kind):
        hashed.append(Path(stream.name).parent.name)
        return file_digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    specs = [codec.load("wan", vae=tmp_path / "wan", text=tmp_path / "wan").spec for _ in range(3)]
    assert hashed == ["vae", "text_encoder"]
    assert specs[0] == specs[1] == specs[2]
    file, = (tmp_path / "wan/vae").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)                                           # of the same size
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert codec.load("wan", vae=tmp_path / "wan").spec["vae_sha256"] != specs[0]["vae_sha256"]
    assert hashed == ["vae", "text_encoder", "vae"]


def test_a_codecs_weights_go_with_it(pipeline, tmp_path, monkeypatch):
    import diffusers
    import transformers
    made = []
    for kind in (diffusers.AutoencoderKLWan, transformers.UMT5EncoderModel):
        def built(*args, build=kind.from_pretrained, **named):
            net, report = build(*args, **named)
            made.append(weakref.ref(net))
            return net, report

        monkeypatch.setattr(kind, "from_pretrained", built)

    wan = codec.load("wan", vae=pipeline, text=pipeline)
    how = wan.spec | {"codec": wan.spec, "fps": 8}
    wan.embed(["a red circle"])
    wan.decode(torch.zeros(4, 1, 2, 2))
    assert len(made) == 2 and made[0]() is not None and made[1]() is not None
    del wan
    assert made[0]() is None and made[1]() is None
    assert codec.write_clips(tmp_path / "a", torch.zeros(1, 4, 2, 2, 2), how, vae=pipeline).suffix == ".mp4"
    monkeypatch.setattr(codec, "write_video", failing(RuntimeError("a kernel")))
    assert codec.write_clips(tmp_path / "a", torch.zeros(1, 4, 2, 2, 2), how, vae=pipeline).suffix == ".npy"
    assert len(made) == 4 and made[2]() is None and made[3]() is None


def test_the_vae_of_wan_2_2_has_its_own_channels_and_strides(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKLWan(base_dim=4, decoder_base_dim=4, z_dim=6, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                               is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
                               latents_mean=[0.0] * 6, latents_std=[1.0] * 6).save_pretrained(tmp_path)
    wan = codec.load("wan", vae=tmp_path)
    z = wan.encode(noise(5, 32, 48, 3))
    assert wan.stride == (4, 16, 16) and z.shape == (6, 2, 2, 3) and wan.decode(z).shape == (5, 32, 48, 3)


def test_a_large_video_goes_through_the_vae_in_tiles(pipeline, monkeypatch):
    from diffusers import AutoencoderKLWan
    wan, vae = codec.load("wan", vae=pipeline), AutoencoderKLWan.from_pretrained(pipeline / "vae")
    video = noise(1, 64, 272, 3)
    whole = wan.encode(video)
    monkeypatch.setattr(codec, "LARGE", 64 * 272 - 1)
    vae.enable_tiling()
    with torch.no_grad():
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
        z = vae.encode(x).latent_dist.mean[0]
        y = ((vae.decode(z[None]).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert torch.allclose(wan.encode(video), z, atol=1e-6) and not torch.allclose(whole, z, atol=1e-4)
    assert np.array_equal(wan.decode(z), y)


def test_wan_embeddings_are_those_of_diffusers_own_pipeline_without_the_padding(pipeline):
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel
    theirs = WanPipeline(AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
                         UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"), None, UniPCMultistepScheduler())
    prompts = ["", "a red circle", "  two\n lines\t and   spaces ", "cafÃ© <b> &amp;amp; &quot;tea&quot;", "a" * 90]
    want, _ = theirs.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = codec.load("wan", text=pipeline).embed(prompts)
    for row, padded in zip(ours, want):
        assert row.dtype == torch.float32 and not row.requires_grad
        assert torch.allclose(row, padded[:len(row)], atol=1e-5) and padded[len(row):].abs().max() == 0
    assert [len(row) for row in ours[:2]] == [1, 10]
    assert codec.clean("cafÃ© <b> &amp;amp; &quot;tea&quot; ") == 'café <b> & "tea"'


def test_a_prompt_longer_than_the_text_encoder_takes_names_the_limit(pipeline):
    wan = codec.load("wan", text=pipeline, text_length=16)
    assert len(wan.embed(["b" * 14])[0]) == 16                  # a space before and an end after
    with pytest.raises(ValueError, match="17 tokens.*takes 16.*bbb"):
        wan.embed(["a", "b" * 15])


def test_a_part_that_was_not_loaded_is_named_when_it_is_wanted(pipeline):
    words, pixels, neither = codec.load("wan", text=pipeline), codec.load("wan", vae=pipeline), codec.load("wan")
    assert not words.decodes and not neither.decodes
    for use in (lambda: words.encode(noise(5, 16, 16, 3)), lambda: neither.decode(torch.zeros(4, 2, 2, 2))):
        with pytest.raises(ValueError, match="--vae=PATH.*Wan-AI"):
            use()
    with pytest.raises(ValueError, match="--text=PATH.*Wan-AI"):
        pixels.embed(["a"])


def test_weights_of_another_family_are_named_with_what_is_wanted(pipeline, tmp_path):
    with pytest.raises(ValueError, match="UMT5EncoderModel.*wanted is AutoencoderKLWan"):
        codec.load("wan", vae=pipeline / "text_encoder")
    with pytest.raises(ValueError, match="AutoencoderKLWan.*wanted is umt5"):
        codec.load("wan", text=pipeline / "vae")
    (tmp_path / "Wan2.1_VAE.pth").touch()                       # the layout of Wan's own release
    with pytest.raises(ValueError, match="Wan2.1_VAE.pth is a file; wanted is the folder of a diffusers .* pickles"):
        codec.load("wan", vae=tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(FileNotFoundError, match="no config.json but Wan2.1_VAE.pth; wanted is a diffusers pipeline"):
        codec.load("wan", vae=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder models/of/mine"):
        codec.load("wan", vae="models/of/mine")


def test_a_damaged_config_json_of_a_part_is_named(pipeline, tmp_path):
    for part in ("vae", "text_encoder"):
        shutil.copytree(pipeline / part, tmp_path / part)
        (tmp_path / part / "config.json").write_text('{"_class_name": "Auto')
        with pytest.raises(ValueError, match=f"{part}/config.json is damaged, it is not JSON"):
            codec.load("wan", **{dict(vae="vae", text_encoder="text")[part]: tmp_path / part})


def test_weights_that_lack_a_tensor_or_a_tokenizer_are_refused(pipeline, tmp_path):
    from safetensors.torch import load_file, save_file
    for part, name, key, flag in (("vae", "diffusion_pytorch_model", "quant_conv.weight", "vae"),
                                  ("text_encoder", "model", "encoder.block.1.layer.0.SelfAttention.q.weight", "text")):
        shutil.copytree(pipeline, tmp_path / part)
        file = tmp_path / part / part / f"{name}.safetensors"
        tensors = load_file(file)
        del tensors[key]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"lacks 1 weights: {key}"):
            codec.load("wan", **{flag: tmp_path / part})
    shutil.copytree(pipeline / "text_encoder", tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        codec.load("wan", text=tmp_path / "alone")


def test_other_weights_than_the_latents_were_made_with_are_refused_or_reported(pipeline):
    spec = codec.load("wan", vae=pipeline).spec
    with pytest.raises(ValueError, match="has channels 4; the latents were made with 16"):
        codec.load(spec | {"channels": 16}, vae=pipeline)
    with pytest.warns(UserWarning, match="vae_sha256 differs"):
        codec.load(spec | {"vae_sha256": {"diffusion_pytorch_model.safetensors": "0"}}, vae=pipeline)


def test_of_a_hub_id_only_the_wanted_part_is_fetched(pipeline, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(pipeline))
    assert codec.load("wan", vae="Wan-AI/Wan2.1-T2V-1.3B-Diffusers").decodes
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ["vae/*"])]

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no folder my/weights.*not cached"):
        codec.load("wan", vae="my/weights")


@pytest.mark.parametrize("package, flag", [("diffusers", "vae"), ("transformers", "text")])
def test_a_missing_package_is_named_with_the_file_that_installs_it(pipeline, monkeypatch, package, flag):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install -r requirements-wan.txt"):
        codec.load("wan", **{flag: pipeline})


@pytest.mark.slow
def test_the_dct_codec_needs_none_of_wans_packages():
    code = "import sys, codec; codec.load('dct').embed(['a']); print([m for m in sys.modules if m in sys.argv])"
    words = ["diffusers", "transformers", "huggingface_hub", "ftfy", "matplotlib"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True,
                          cwd=Path(codec.__file__).parent)
    assert done.stdout.strip() == "[]"
