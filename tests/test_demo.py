"""demo.py: the stream is the video that sample.py makes, goes on without end in the same memory, and hears captions."""
import gc
import os
import signal
import socket
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

import codec
import demo
import model
import sample
import step
import viewer
from helpers import refused, run, spied
from model import Chunked
from test_sample import CAUSAL, PROMPTS, SAMPLING, STUDENT, saved
from test_viewer import looking

SAMPLERS = {"student": STUDENT, "guided": SAMPLING, "unguided": SAMPLING | {"guidance": 1.0}}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """{sampler: the folder of a causal run}."""
    folder = tmp_path_factory.mktemp("causal")
    return {name: saved(folder / name, sampler | CAUSAL) for name, sampler in SAMPLERS.items()}


def config(path, **given):
    return demo.Config(**dict(ckpt=path, prompt=PROMPTS[0], port=0, sink=0, device="cpu") | given)


def handed(cfg):
    """What demo.main hands to viewer.serve: (read, videos), and the fps."""
    served = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "serve", lambda server, *args: server.server_close() or served.append(args))
        run(demo.main, cfg)
    (caption, read, videos, fps), = served
    assert caption == cfg.prompt
    return read, videos, fps


def shown(cfg, i=0, chunks=4):
    """The first chunks of a stream, as one video."""
    read, videos, _ = handed(cfg)
    return np.concatenate([*islice(videos(i, {"read": read(cfg.prompt)}), chunks)])


def sampled(path, n=1, chunks=4, **flags):
    """The same of sample.py: n videos."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_on", lambda files, x0, coder, fps: made.append(torch.cat([*x0], 2)))
        patch.setattr(sample, "contact_sheet", lambda *_: None)
        run(sample.main, sample.Config(ckpt=path, out=f"{path}/out", prompts=PROMPTS[:1], n=n, batch=1,
                                       frames=8 * chunks - 3, device="cpu", **flags))
    return [codec.load("dct").decode(z) for z, in made]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stream_is_the_video_that_sample_makes_to_the_bit(causal, sampler):
    video, = sampled(causal[sampler])
    assert np.array_equal(shown(config(causal[sampler])), video)


@pytest.mark.slow
def test_flags_and_pages_do_what_flags_and_numbers_of_videos_do_in_sample(causal):
    usual = {}
    for flags in (dict(), dict(window=2), dict(sink=1, window=2), dict(weights="net")):
        usual[str(flags)] = shown(config(causal["student"], **flags)).tobytes()
    assert len(set(usual.values())) == 4
    for flags in (dict(sink=1, window=2), dict(weights="net")):
        assert usual[str(flags)] == sampled(causal["student"], **flags)[0].tobytes()
    pages = sampled(causal["student"], n=2, seed=1)
    assert [np.array_equal(shown(config(causal["student"], seed=1), i), pages[i]) for i in range(2)] == [True, True]


def test_without_a_cache_the_stream_is_the_same_and_says_that_it_is_slower(tmp_path, capsys):
    path = saved(tmp_path / "run", STUDENT | CAUSAL | {"tile": [2, 2, 2]})
    made = shown(config(path), chunks=2)
    assert "no cache serves --sp or tiles that slide in space" in capsys.readouterr().out
    assert np.array_equal(made, sampled(path, chunks=2)[0])


def test_a_stream_is_shown_as_fast_as_the_checkpoint_says_or_the_flag(causal):
    assert handed(config(causal["student"]))[2] == 8
    assert handed(config(causal["student"], fps=2.5))[2] == 2.5


@pytest.mark.parametrize("sampler", ["student", "guided"])
def test_a_new_caption_is_that_of_the_next_chunk_and_the_past_stays_as_it_was_seen(causal, monkeypatch, sampler):
    read, videos, _ = handed(config(causal[sampler]))
    calls = []

    def seen(_, net, cond, x0):
        calls.append((cond.text, len(cond.past)))

    def made(x0, net, sampling, cond, uncond, *noises):
        calls.append((cond.text, uncond.text, cond.past))

    spied(monkeypatch, Chunked, "see", seen)
    spied(monkeypatch, step, "at_once", made)
    old, new = read(PROMPTS[0]), read(PROMPTS[2])
    now = {"read": old}
    stream = videos(0, now)
    first = next(stream)
    now["read"] = new
    second = next(stream)
    third = next(stream)

    texts = 2 if sampler == "guided" else 1
    made_first, seen_first, made_second, seen_second, made_third = calls[0], calls[1], calls[1 + texts], \
        calls[2 + texts], calls[2 + 2 * texts]
    assert made_first[0] is old
    assert seen_first == (old, 0)
    assert made_second[0] is new
    assert seen_second == (new, 1)
    assert made_third[0] is new
    assert made_third[2][0] is made_second[2][0]        # what the first chunk left is not computed again
    if texts == 2:
        assert calls[2][0] is made_first[1] is made_third[1]    # the null text has a past of its own
    usual = islice(videos(0, {"read": old}), 3)
    assert [np.array_equal(a, b) for a, b in zip((first, second, third), usual)] == [True, False, False]


@pytest.mark.parametrize("chunks", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_number_of_chunks_takes_the_memory_of_ten(tmp_path, monkeypatch, chunks):
    small = replace(model.MODELS["tiny"], dim=24, blocks=1, heads=2, ffn=24)
    monkeypatch.setitem(model.MODELS, "tiny", small)
    shapes = {"shapes": [[24, 3, 2, 2]], "tile": [1, 99, 99], "times": [1.0]}
    read, videos, _ = handed(config(saved(tmp_path / "run", STUDENT | CAUSAL | shapes), sink=1))
    pasts = spied(monkeypatch, Chunked, "see", lambda cond, *_: len(cond.past))
    stream = videos(0, {"read": read(PROMPTS[0])})
    held = []
    for _ in range(2):
        for video in islice(stream, chunks - 10 if held else 10):
            assert np.isfinite(video).all()
        gc.collect()
        held.append(sum(x.nbytes for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)))
    assert len(pasts) == chunks - 1
    assert set(pasts[2:]) == {3}        # a sink of one, and a window of three, its own among them
    assert held[1] == held[0]


# ---- the door -------------------------------------------------------------------------------------------------------

def denied(cfg, capsys):
    """What demo.main says that refuses; it does not serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "serve", lambda server, *_: server.server_close())
        return refused(demo.main, cfg, capsys)


@pytest.mark.parametrize("flags, said", [
    (dict(fps=0.0), "--fps=0.0 is not above 0"),
    (dict(fps=-1.0), "--fps=-1.0 is not above 0"),
    (dict(fps=float("inf")), "--fps=inf is not above 0"),
    (dict(window=0), "--window=0 --sink=0: a chunk sees 1 or more"),
    (dict(sink=-1), "--window=3 --sink=-1: a chunk sees 1 or more"),
    (dict(port=70000), "--port=70000: "),
    (dict(prompt="one word more than the eight that go"), "a prompt of 8 words, and this codec takes 7"),
    (dict(vae="WAN"), "the dct codec has no weights"),
    (dict(ckpt="nowhere"), "nowhere")], ids=str)
def test_what_cannot_be_is_refused_in_one_line(causal, capsys, flags, said):
    assert said in denied(config(causal["student"], **flags), capsys)


def test_a_port_in_use_is_refused(causal, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port={port}: " in denied(config(causal["student"], port=port), capsys)


@pytest.mark.parametrize("window", [None, [3, 3, 3]])
def test_a_checkpoint_that_is_not_causal_is_refused(tmp_path, capsys, window):
    path = saved(tmp_path / "run", STUDENT | {"window": window})
    assert f"{path} is not causal, it makes a clip at once" in denied(config(path), capsys)


def test_a_sink_without_a_cache_and_wan_without_its_vae_are_refused(tmp_path, capsys):
    sliding = saved(tmp_path / "sliding", STUDENT | CAUSAL | {"tile": [2, 2, 2]})
    assert "--sink=1 needs the cache" in denied(config(sliding, sink=1), capsys)
    wan = saved(tmp_path / "wan", STUDENT | CAUSAL | {"codec": {"name": "wan", "stride": [4, 8, 8], "channels": 24}})
    assert "--vae=PATH is wanted" in denied(config(wan), capsys)


# ---- the whole ------------------------------------------------------------------------------------------------------

def test_the_page_shows_the_stream_until_ctrl_c(ctrl_c, causal, capfd, monkeypatch):
    usual = shown(config(causal["student"]), chunks=2)
    capfd.readouterr()
    seen, serve = [], viewer.serve

    def look(server):
        with looking(server) as picture:
            try:
                seen.extend(picture() for _ in usual)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(EOFError):
                for _ in range(2000):
                    picture()

    def watched(server, *args):
        monkeypatch.setattr(viewer, "serve", serve)
        printed.append(f"http://127.0.0.1:{server.server_port} shows {causal['student']}; Ctrl-C ends it\n")
        thread = threading.Thread(target=look, args=(server,))
        thread.start()
        serve(server, *args)
        thread.join()

    printed = []
    monkeypatch.setattr(viewer, "serve", watched)
    run(demo.main, config(causal["student"], fps=200.0))
    assert np.array_equal(seen, usual)
    assert capfd.readouterr() == (printed[0], "")
