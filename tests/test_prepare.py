"""prepare.py from each of its sources to a dataset that Latents reads. Run: pytest tests/test_prepare.py"""
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

import torch

import codec
import films
import parallel
import store
import helpers
import prepare
import shapes
from conftest import ROOT
from data import Latents, stream
from prepare import Config
from test_codec import pipeline  # noqa: F401 (a fixture)
from test_films import film, steady



def run(**flags):
    """prepare.py with these flags, in this process -> the dataset, opened."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    helpers.run(prepare.main, Config(**flags))
    return opened(flags["out"])


def refused(capsys, **flags):
    """What prepare.py says of flags that it refuses."""
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def opened(path):
    return Latents(path, seed=0, batch=1)


def stored(latents):
    """[(source, caption, latent as it is stored, text)] in an order that the writing does not change."""
    rows = []
    for line in map(json.loads, open(latents.folders[0].path / "captions.jsonl")):
        x0, text = latents.sample([line["id"]])
        rows.append((line["source"], line["caption"], x0[0] * latents.std + latents.mean, text[0]))
    return sorted(rows, key=lambda row: (row[0], row[2].flatten().tolist()))


def equal(a, b):
    return len(a) == len(b) and all(x[:2] == y[:2] and torch.allclose(x[2], y[2], atol=1e-5) and torch.equal(x[3], y[3])
                                    for x, y in zip(a, b))


def make_film(path, height=64, width=64, frames=24, rate=8, caption=None, **options):
    """A film of smooth moving colours at `rate` frames per second, and its NAME.txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t, y, x = np.ogrid[:frames, :height, :width]
    phase = sum(map(ord, path.stem))
    waves = [np.sin(phase + c + 6 * x / width * (c + 1) + 4 * y / height + t / 9) for c in range(3)]
    film(path, np.uint8(127 + 120 * np.stack(waves, -1)), [1000 * i / rate for i in range(frames)], **options)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Films of many kinds, and five files that make no clip."""
    root = tmp_path_factory.mktemp("films")
    make_film(root / "plain.mp4", caption="a plain film")
    make_film(root / "below/deeper/wide one.webm", 72, 108, encoder="libvpx-vp9", caption="a wide one, vp9\n")
    make_film(root / "été/tall é.MOV", 120, 80, rate=24, frames=72, caption="un été à la mer")
    make_film(root / "below/turned.mp4", 64, 96, rotation=90, caption="turned on its side")
    make_film(root / "listed.mkv", encoder="libx265")
    make_film(root / "below/ñandú.mp4")
    (root / "captions.jsonl").write_text("\n".join(json.dumps({"file": name, "caption": caption}) for name, caption in [
        ("listed.mkv", "its caption is listed"), (unicodedata.normalize("NFD", "below/ñandú.mp4"), "a ñandú"),
        ("not there.mp4", "listed only")]))
    make_film(root / "short.mp4", frames=9, caption="too short")
    make_film(root / "silent.mp4")
    (root / "empty.mp4").touch()
    (root / "broken.mp4").write_bytes(b"not a film " * 99)
    for name in ("empty", "broken"):
        (root / f"{name}.txt").write_text("a caption")
    (root / "notes.pdf").write_bytes(b"not for us")
    (root / "._plain.mp4").write_bytes(b"a Mac's resource fork")
    return root


MADE = {"plain.mp4": "a plain film", "below/deeper/wide one.webm": "a wide one, vp9",
        "été/tall é.MOV": "un été à la mer", "below/turned.mp4": "turned on its side",
        "listed.mkv": "its caption is listed", "below/ñandú.mp4": "a ñandú"}


# ---- moving shapes --------------------------------------------------------------------------------------------------

def test_alone_it_writes_moving_shapes_that_decode_to_their_captions(tmp_path, capsys):
    latents = run(clips=40, out=tmp_path / "set")
    assert latents.shapes == [(24, 5, 8, 8)] and latents.count == 40 and latents.manifest["fps"] == 8
    coder = codec.load(latents.manifest["codec"])
    for id in range(0, 40, 5):
        [x0], [text] = latents.sample([id])
        video = coder.decode(x0 * latents.std + latents.mean)
        assert video.shape == (17, 32, 32, 3)
        shape, colour, direction = shapes.judge(video)
        assert latents.caption(id) == f"a {colour} {shape} moving {direction}"
        [row] = coder.embed([latents.caption(id)])
        assert torch.allclose(text[:len(row)], row, atol=0.02) and not text[len(row):].any()
    assert torch.allclose(latents.null[:1], coder.embed([""])[0], atol=0.02)
    power = latents.sample(list(range(40)))[0].square().mean((0, 2, 3, 4))
    assert abs(power.mean() - 1) < 0.05 and power.max() > 10 * power.min(), "quiet channels stay quiet"
    assert "40 of 24x5x8x8" in capsys.readouterr().out


def test_moving_shapes_are_a_function_of_the_seed(tmp_path):
    a, b, c = (stored(run(clips=6, seed=seed, out=tmp_path / name)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert equal(a, b) and [row[1] for row in a] != [row[1] for row in c]


def test_short_captions_are_of_their_share_and_change_nothing_else(tmp_path, capsys):
    whole = stored(run(clips=30, out=tmp_path / "a"))
    short = stored(run(clips=30, out=tmp_path / "b", short_captions=0.3))
    said = []
    for (source, caption, z, text), (same_source, words, same_z, other_text) in zip(whole, short, strict=True):
        assert source == same_source
        assert torch.equal(z, same_z)
        said.append(stream(0, "short", int(source.split()[1])).random() < 0.3)
        assert words == (" ".join(caption.split()[-2:]) if said[-1] else caption)
        assert torch.equal(other_text, text) != said[-1]
    assert 3 < sum(said) < 15
    capsys.readouterr()
    again = stored(run(clips=30, out=tmp_path / "b"))       # their words alone are made again
    assert equal(again, whole)
    assert f"{sum(said)} captions changed" in capsys.readouterr().out
    assert "--short_captions=1.5: a share" in refused(capsys, clips=3, out=tmp_path / "c", short_captions=1.5)
    assert "does nothing for --videos" in refused(capsys, videos=tmp_path, short_captions=0.5)


def test_the_defaults_are_the_ones_that_the_readme_names():
    cfg = prepare.resolve(Config())
    assert (cfg.clips, cfg.seed, cfg.sizes, cfg.frames, cfg.fps, cfg.codec, cfg.out) == \
           (4000, 0, ("32x32",), 17, 8, "dct", "data/shapes")


def test_flags_are_read_from_a_command_line():
    cfg = tyro.cli(Config, args="--videos films --sizes 64x64 64x96 --frames=9 --cuts=all --fps 12.5".split())
    assert (cfg.videos, cfg.sizes, cfg.frames, cfg.cuts, cfg.fps) == ("films", ("64x64", "64x96"), 9, "all", 12.5)


# ---- films ----------------------------------------------------------------------------------------------------------

def test_a_folder_of_films_becomes_buckets_and_what_cannot_is_named(folder, tmp_path, capsys):
    latents = run(videos=folder, out=tmp_path / "set")
    rows = stored(latents)
    assert {row[0]: row[1] for row in rows} == MADE and len(rows) == len(MADE)
    assert latents.shapes == [(24, 5, 16, 16), (24, 5, 16, 24), (24, 5, 24, 16)]
    sizes = {row[0]: tuple(row[2].shape[2:]) for row in rows}
    assert sizes["below/deeper/wide one.webm"] == (16, 24)
    assert sizes["été/tall é.MOV"] == sizes["below/turned.mp4"] == (24, 16)
    assert sizes["plain.mp4"] == (16, 16)

    coder = codec.load("dct")
    for name, _, latent, _ in rows:
        [(video, _)] = films.read_video(folder / name, sizes=[(64, 64), (64, 96), (96, 64)], frames=17, fps=8)
        assert torch.allclose(latent, coder.encode(video), rtol=2**-8, atol=1e-5)

    out = capsys.readouterr().out
    for name, reason in {"short.mp4": "too short", "silent.mp4": "no caption", "empty.mp4": "empty",
                         "broken.mp4": "unreadable", "not there.mp4": "No such file"}.items():
        assert any(f"skipped {name}: " in line and reason in line for line in out.splitlines()), (name, out)
    assert "5 films skipped, named above" in out
    assert "notes.pdf" not in out and "._plain" not in out


def test_a_caption_can_be_given_for_films_without_one(folder, tmp_path):
    rows = {row[0]: row[1] for row in stored(run(videos=folder, out=tmp_path / "set", caption="a film"))}
    assert rows == MADE | {"silent.mp4": "a film"}


def test_a_caption_that_is_too_long_is_named(tmp_path, capsys):
    make_film(tmp_path / "films/a.mp4", caption="word " * 9)
    make_film(tmp_path / "films/b.mp4", caption="few words")
    assert run(videos=tmp_path / "films", out=tmp_path / "set", text_length=8).count == 1
    assert "skipped a.mp4: a prompt of 9 words" in capsys.readouterr().out


def test_two_captions_that_differ_are_named(tmp_path, capsys):
    root = four_films(tmp_path / "films")
    (root / "captions.jsonl").write_text("".join(json.dumps({"file": f"{name}.mp4", "caption": caption}) + "\n"
                                                 for name, caption in (("a", "film a"), ("b", "another"))))
    assert [row[0] for row in stored(run(videos=root, out=tmp_path / "set", **SMALL))] == ["a.mp4", "c.mp4", "d.mp4"]
    assert "skipped b.mp4: two captions, 'film b' in b.txt and 'another' in a list" in capsys.readouterr().out


def test_all_cuts_of_a_film_are_consecutive_clips(tmp_path):
    make_film(tmp_path / "films/long.mp4", frames=60, caption="a long film")
    rows = stored(run(videos=tmp_path / "films", out=tmp_path / "set", cuts="all", sizes=("64x64",)))
    coder = codec.load("dct")
    clips = films.read_video(tmp_path / "films/long.mp4", sizes=[(64, 64)], frames=17, fps=8, cuts="all")
    clips = [coder.encode(video) for video, _ in clips]
    assert len(rows) == len(clips) == 3
    for clip in clips:
        assert any(torch.allclose(clip, row[2], rtol=2**-8, atol=1e-5) for row in rows)


@pytest.mark.parametrize("cuts", ["first", "all"])
def test_an_interrupted_prepare_goes_on_where_it_was(folder, tmp_path, monkeypatch, cuts):
    make_film(tmp_path / "films/long.mp4", frames=60, caption="a long film")
    for name in ("plain.mp4", "listed.mkv"):
        make_film(tmp_path / f"films/{name}", caption=name)
    flags = dict(videos=tmp_path / "films", cuts=cuts, sizes=("64x64",))
    whole = stored(run(**flags, out=tmp_path / "whole"))

    encoded = []

    def load(*args, **options):
        coder = codec_load(*args, **options)

        def encode(video):
            if len(encoded) == 2:
                encoded.append("interrupted")
                raise KeyboardInterrupt
            encoded.append("clip")
            return coder.encode(video)
        return coder._replace(encode=encode)

    codec_load = codec.load
    monkeypatch.setattr(codec, "load", load)
    monkeypatch.setattr("store.monotonic", iter(range(0, 10**6, 10)).__next__)    # every sample is saved at once
    with pytest.raises(KeyboardInterrupt):
        run(**flags, out=tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        opened(tmp_path / "broken")
    assert equal(stored(run(**flags, out=tmp_path / "broken")), whole)
    assert encoded.count("clip") == len(whole), "a clip was encoded twice"


def test_a_folder_begun_by_the_keys_of_496ae65_goes_on(tmp_path, monkeypatch):
    make_film(tmp_path / "films/long.mp4", frames=60, caption="a long film")
    make_film(tmp_path / "films/other.mp4", frames=60, caption="another")
    flags = dict(videos=tmp_path / "films", cuts="all", sizes=("64x64",))
    whole = stored(run(**flags, out=tmp_path / "set"))
    journal = tmp_path / "set/journal.0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert [json.loads(line)["key"] for line in lines] == [
        f"{name}.mp4{end}" for name in ("long", "other") for end in ("#0", "#1", "#2", "")]
    # then: a film's last clip bore its name alone; the second film was interrupted after its first clip
    journal.write_text("".join([*lines[:2], lines[2].replace("long.mp4#2", "long.mp4"), lines[4]]))
    encoded = []
    load = codec.load

    def counted(*args, **options):
        coder = load(*args, **options)
        return coder._replace(encode=lambda video: encoded.append("clip") or coder.encode(video))
    monkeypatch.setattr(codec, "load", counted)
    monkeypatch.setattr(films, "read_video", lambda path, read=films.read_video, **options: read(path, **options)
                        if path.name == "other.mp4" else pytest.fail("read again"))
    assert equal(stored(run(**flags, out=tmp_path / "set")), whole)
    assert len(encoded) == 2


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "films"
    for name in ("a", "b", "c", "d", "e/e"):
        make_film(folder / f"{name}.mp4", caption=name)
    (folder / "b.txt").unlink()
    (folder / "b.txt").mkdir()

    def bad_sector(path, *args, of, **options):
        if path.name in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return of(path, *args, **options)

    def unreadable(path, of=os.scandir):
        if Path(path).name in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return of(path)
    bad = {"a.mp4", "c.txt", "e"}
    read, text = films.read_video, films.read_text
    monkeypatch.setattr(films, "read_video", lambda *args, **options: bad_sector(*args, of=read, **options))
    monkeypatch.setattr(films, "read_text", lambda *args, **options: bad_sector(*args, of=text, **options))
    monkeypatch.setattr(os, "scandir", unreadable)
    assert [row[0] for row in stored(run(videos=folder, out=tmp_path / "set"))] == ["d.mp4"]
    out = capsys.readouterr().out
    for name, reason in {"a.mp4": "Input/output error", "b.mp4": "is no file", "c.mp4": "Input/output error",
                         folder / "e": "Input/output error"}.items():
        assert any(f"skipped {name}: " in line and reason in line for line in out.splitlines()), (name, out)
    assert "3 films skipped, named above" in out

    bad.clear()         # the disk is mended, and the same command adds them
    rows = stored(run(videos=folder, out=tmp_path / "set"))
    assert [row[0] for row in rows] == ["a.mp4", "c.mp4", "d.mp4", "e/e.mp4"]


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    make_film(tmp_path / "films/a.mp4", caption="a")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(store.Writer, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(videos=tmp_path / "films", out=tmp_path / "set")


def test_films_that_come_later_are_added(tmp_path, monkeypatch):
    make_film(tmp_path / "films/a.mp4", caption="a")
    run(videos=tmp_path / "films", out=tmp_path / "set")
    make_film(tmp_path / "films/b.mp4", caption="b")
    monkeypatch.setattr(films, "read_video", lambda path, read=films.read_video, **options: read(path, **options)
                        if path.name == "b.mp4" else pytest.fail("read again"))
    assert {row[0] for row in stored(run(videos=tmp_path / "films", out=tmp_path / "set"))} == {"a.mp4", "b.mp4"}


@pytest.mark.slow
def test_two_ranks_make_the_same_dataset_as_one_and_make_it_again(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "films")
    cfg = Config(videos=str(root), out=str(tmp_path / "two"))
    whole = stored(run(videos=root, out=tmp_path / "one"))
    printed = helpers.ranks(2, prepare.main, cfg)
    assert "5 films skipped" in printed and printed.count("skipped silent.mp4") == 1
    assert {file.name for file in (tmp_path / "two").glob("journal.*")} == {"journal.0.jsonl", "journal.1.jsonl"}
    assert equal(stored(opened(tmp_path / "two")), whole)

    for name in ("plain.mp4", "été/tall é.MOV"):
        (root / name).with_suffix(".txt").write_text("another caption")
    (root / "below/turned.mp4").unlink()
    make_film(root / "below/deeper/wide one.webm", 72, 144, encoder="libvpx-vp9")
    make_film(root / "new.mp4", caption="a new one")
    printed = helpers.ranks(2, prepare.main, cfg)
    assert "2 captions changed, 1 film replaced, 1 gone, 1 new: " in printed
    assert equal(stored(opened(tmp_path / "two")), stored(run(videos=root, out=tmp_path / "fresh")))


def test_a_rank_waits_for_the_others_without_a_collective(tmp_path, monkeypatch):
    """The third rank is at work while the first sleeps 10,000 times."""
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 10_000:
            (tmp_path / "finished.2").write_text("5")
    monkeypatch.setattr(prepare.time, "sleep", sleep)
    monkeypatch.setattr(parallel, "agree", lambda *_: pytest.fail("a collective"))
    monkeypatch.setattr(parallel, "mean", lambda *_: pytest.fail("a collective"))
    (tmp_path / "finished.1").write_text("2")
    world = parallel.imagine(3)
    assert prepare.wait_for_all(tmp_path, 1, world) == [1, 2, 5] and len(slept) == 10_000
    assert (tmp_path / "finished.0").read_text() == "1", "the others wait for us"


def test_what_a_killed_run_left_does_not_count_as_finished(tmp_path, monkeypatch, capsys):
    left = [tmp_path / f"set/finished.{rank}" for rank in (0, 1, 7)]
    run(clips=2, out=tmp_path / "set")
    for file in left:
        file.write_text("9")
    seen = []
    agree = parallel.agree

    def watched(x, *here, **claimed):
        if here:        # a meeting of prepare.py itself; ckpt.claim gives its world by name
            seen.append([file for file in left if file.exists()])
        return agree(x, *here, **claimed)

    monkeypatch.setattr(parallel, "agree", watched)
    run(clips=3, out=tmp_path / "set")
    assert seen == [left, [], left[:1], []], "removed between two meetings of all ranks, at the start and at the end"
    assert "skipped" not in capsys.readouterr().out


# ---- lengths, and what would take more ------------------------------------------------------------------------------

def still(path, caption):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def mixed(tmp_path):
    """Two stills, films of 3, 5, 9 and 24 frames at 8 fps."""
    for name in ("still.png", "other.jpg"):
        still(tmp_path / "films" / name, name)
    for frames in (3, 5, 9, 24):
        tiny_film(tmp_path / f"films/{frames}.mp4", f"{frames} frames", frames=frames)
    return dict(videos=tmp_path / "films", out=tmp_path / "set", sizes=("16x16",))


def shapes_by_source(latents):
    return sorted((json.loads(line)["source"], latents.shape_of(id)[1])
                  for id, line in enumerate(open(latents.folders[0].path / "captions.jsonl")))


def test_each_film_goes_to_the_longest_length_that_it_fills(mixed):
    made = shapes_by_source(run(**mixed, frames=(17, 1, 5)))
    assert made == [("24.mp4", 5), ("3.mp4", 1), ("5.mp4", 2), ("9.mp4", 2), ("other.jpg", 1), ("still.png", 1)]


def test_all_cuts_are_each_the_longest_that_still_fits(mixed):
    made = shapes_by_source(run(**mixed, frames=(1, 5, 17), cuts="all"))
    assert made == [("24.mp4", 2), ("24.mp4", 5), ("3.mp4", 1), ("5.mp4", 2), ("9.mp4", 2),
                    ("other.jpg", 1), ("still.png", 1)]


def test_pictures_are_clips_of_one_frame(mixed):
    made = run(**mixed, frames=1)
    assert made.count == 6 and made.shapes == [(24, 1, 4, 4)]


def test_moving_shapes_have_all_lengths_in_turn(tmp_path):
    latents = run(clips=12, out=tmp_path / "set", sizes=("16x16", "16x24"), frames=(1, 5))
    assert latents.shapes == [(24, 1, 4, 4), (24, 1, 4, 6), (24, 2, 4, 4), (24, 2, 4, 6)]
    assert [bucket["count"] for bucket in latents.manifest["buckets"]] == [3, 3, 3, 3]


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_where_most_films_are_too_short_it_says_which_flags_would_take_them(tmp_path, capsys):
    root = tmp_path / "films"
    for i, frames in enumerate((9, 9, 10, 12, 40)):
        tiny_film(root / f"{i}.mp4", "a film", frames=frames)
    run(videos=root, out=tmp_path / "set", sizes=("16x16",))
    assert last_line(capsys) == ("4 of 5 films are shorter than 17 frames at 8 fps: "
                                 "--fps=16 or --frames=9 would take them")
    for flags in (dict(fps=16), dict(frames=9)):
        assert run(videos=root, out=tmp_path / str(flags), sizes=("16x16",), **flags).count == 5


def test_a_flag_that_would_take_some_says_how_many(tmp_path, capsys):
    root = tmp_path / "films"
    for i in range(20):
        tiny_film(root / f"{i:02}.mp4", "a film", frames=13 if i else 5)
    refused(capsys, videos=root, out=tmp_path / "set", sizes=("16x16",))
    with pytest.raises(SystemExit):
        run(videos=root, out=tmp_path / "set", sizes=("16x16",))
    assert capsys.readouterr().err.endswith(
        "20 of 20 films are shorter than 17 frames at 8 fps: --fps=11 would take 19 of them and "
        "--frames=13 would take 19 of them\n")
    assert run(videos=root, out=tmp_path / "fps", sizes=("16x16",), fps=11).count == 19


@pytest.mark.parametrize("harm, words", [
    (lambda path: path.with_suffix(".txt").unlink(),
     "3 of 4 films are without a caption: --caption=TEXT would take them"),
    (lambda path: path.with_suffix(".txt").write_text("word " * 70),
     "3 of 4 films are longer in their captions than --text_length=64: --text_length=71 would take them"),
    (lambda path: path.write_bytes(b"no film"), "3 of 4 films are skipped for one reason: unreadable"),
])
def test_another_reason_for_most_films_is_named_with_its_flag(tmp_path, capsys, harm, words):
    root = four_films(tmp_path / "films")
    for name in "abc":
        harm(root / f"{name}.mp4")
    run(videos=root, out=tmp_path / "set", **SMALL)
    assert last_line(capsys) == words


def test_pictures_where_clips_are_wanted_are_named_with_their_flag(tmp_path, capsys):
    for i in range(3):
        still(tmp_path / f"films/{i}.png", "a picture")
    said = refused(capsys, videos=tmp_path / "films", out=tmp_path / "set")
    assert "3 of 3 films are still pictures: --frames 1 17 would take them" in said
    assert run(videos=tmp_path / "films", out=tmp_path / "set", sizes=("16x16",), frames=(1, 17)).count == 3


def test_nothing_usable_later_leaves_the_dataset_as_it_was(tmp_path, capsys):
    root = four_films(tmp_path / "films")
    before = stored(run(videos=root, out=tmp_path / "set", **SMALL))
    for name in "abcd":
        (root / f"{name}.txt").unlink()
    refused(capsys, videos=root, out=tmp_path / "set", **SMALL)
    assert equal(stored(opened(tmp_path / "set")), before)


# ---- the dry run ----------------------------------------------------------------------------------------------------

def foretold(capsys, **flags):
    capsys.readouterr()
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    helpers.run(prepare.main, Config(**flags, dry_run=True))
    return capsys.readouterr().out


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(mixed, work, capsys):
    out = foretold(capsys, **mixed, frames=(1, 5, 17), cuts="all")
    assert not mixed["out"].exists() and len(work["decode"]) == len(work["encode"]) == 1
    counts = {shape: int(n) for n, shape in re.findall(r"^ +(\d+) of (\S+),", out, re.M)}
    made = run(**mixed, frames=(1, 5, 17), cuts="all").manifest["buckets"]
    assert counts == {"x".join(map(str, bucket["shape"])): bucket["count"] for bucket in made}
    latents = sum(n * 4096 for n in counts.values())
    assert f"disk: {latents / 1e6:,.1f} MB of latents" in out and "7 like it take" in out


def test_a_dry_run_says_what_would_be_skipped_and_why(folder, tmp_path, capsys):
    out = foretold(capsys, videos=folder, out=tmp_path / "set")
    run(videos=folder, out=tmp_path / "set")
    real = capsys.readouterr().out
    for line in real.splitlines():
        if line.startswith("skipped"):
            assert line.split(":")[0] in out, line
    assert "6 to make" in out and "5 to skip" in out and "1 skipped: too short" in out


def test_a_dry_run_of_a_dataset_that_is_there_says_what_would_change(tmp_path, capsys):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    (root / "a.txt").write_text("another caption")
    tiny_film(root / "b.mp4", seed=1)
    (root / "c.mp4").unlink()
    tiny_film(root / "e.mp4", "film e")
    assert ("1 stored as they should be, 1 to make, 1 replaced, 1 with another caption, 1 gone, 0 to skip"
            in foretold(capsys, **flags))
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    assert "frames was 5 and is now 9" in refused(capsys, **flags | dict(frames=9), dry_run=True)


# ---- a second time --------------------------------------------------------------------------------------------------

SMALL = dict(sizes=("16x16",), frames=5)


def tiny_film(path, caption=None, seed=0, frames=5):
    """A film of five small frames of noise, quickly made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    film(path, pictures, [125 * i for i in range(frames)])
    if caption:
        path.with_suffix(".txt").write_text(caption)


def four_films(root):
    for name in "abcd":
        tiny_film(root / f"{name}.mp4", f"film {name}")
    return root


@pytest.fixture
def work(monkeypatch):
    """What runs do from now on: {"encode": clips, "embed": [caption], "decode": [film], "head": [film]}."""
    done = {"encode": [], "embed": [], "decode": [], "head": []}

    def load(*args, load=codec.load, **options):
        coder = load(*args, **options)
        return coder._replace(encode=lambda video: done["encode"].append(len(video)) or coder.encode(video),
                              embed=lambda texts: done["embed"].extend(texts) or coder.embed(texts))

    def read(path, read=films.read_video, **options):
        done["decode"].append(path.name)
        return read(path, **options)

    def crc32_of(path, *most, of=prepare.crc32_of):
        done["head"].append(path.name)
        return of(path, *most)

    monkeypatch.setattr(codec, "load", load)
    monkeypatch.setattr(films, "read_video", read)
    monkeypatch.setattr(prepare, "crc32_of", crc32_of)
    return done


def told(capsys):
    """What the last run said of changes: the line before that of the buckets."""
    lines = capsys.readouterr().out.splitlines()
    *_, at = [i for i, line in enumerate(lines) if " MB" in line and " of " in line]
    return lines[at - 1].partition(": ")[2]


def listed_files(path):
    """{name: what would differ if somebody had written to it} of the files that the manifest lists."""
    names = json.loads((path / "manifest.json").read_text())["files"]
    return {name: ((path / name).stat().st_ino, (path / name).stat().st_mtime_ns, (path / name).read_bytes())
            for name in names}


def test_what_has_changed_is_made_again_and_what_is_gone_is_dropped(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    before = listed_files(tmp_path / "set")
    (root / "a.txt").write_text("another caption")
    tiny_film(root / "b.mp4", seed=1)
    (root / "c.mp4").unlink()
    tiny_film(root / "e.mp4", "film e")
    for did in work.values():
        did.clear()
    capsys.readouterr()
    again = run(**flags)
    assert told(capsys).startswith("1 caption changed, 1 film replaced, 1 gone, 1 new: a.mp4, b.mp4, c.mp4, e.mp4")
    assert work["decode"] == ["b.mp4", "e.mp4"] and len(work["encode"]) == 2
    assert work["embed"] == ["", "another caption", "film b", "film e"]
    assert set(work["head"]) == {"b.mp4", "e.mp4"}
    assert equal(stored(again), stored(run(videos=root, out=tmp_path / "fresh", **SMALL)))


def test_nothing_that_a_training_has_mapped_is_written_to(tmp_path):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    training = run(**flags)
    rows = [training.sample([id]) for id in range(4)]
    before = listed_files(tmp_path / "set")
    captions = before.pop("captions.jsonl")         # by another name from now on: this one is what people read
    (root / "a.txt").write_text("another caption")
    tiny_film(root / "b.mp4", seed=1)
    tiny_film(root / "e.mp4", "film e")
    run(**flags)
    for name, about in before.items():
        file = tmp_path / "set" / name
        assert (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) == about, name
    training.folders[0].checked[:] = False
    for id in range(4):
        assert all(torch.equal(a, b) for a, b in zip(training.sample([id]), rows[id]))
    assert training.caption(0) == "film a"
    assert "another caption" in (tmp_path / "set/captions.jsonl").read_text()


def test_a_dataset_that_is_made_again_unchanged_stays_as_it_was(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    run(videos=root, out=tmp_path / "set", **SMALL)
    before = (tmp_path / "set/manifest.json").read_bytes()
    for did in work.values():
        did.clear()
    run(videos=root, out=tmp_path / "set", **SMALL)
    assert (tmp_path / "set/manifest.json").read_bytes() == before
    assert work == {"encode": [], "embed": [""], "decode": [], "head": []}


def test_where_a_caption_alone_has_changed_no_film_is_decoded(tmp_path, capsys, work):
    root = tmp_path / "films"
    tiny_film(root / "long.mp4", "a long film", frames=16)
    tiny_film(root / "other.mp4", "another")
    flags = dict(videos=root, out=tmp_path / "set", cuts="all", **SMALL)
    before = run(**flags)
    latents = [before.sample([id])[0] for id in range(4)]
    for did in work.values():
        did.clear()
    for caption in ("the second", "the third"):
        (root / "long.txt").write_text(caption)
        after = run(**flags)
    assert told(capsys) == "1 caption changed: long.mp4"
    assert work == {"encode": [], "embed": ["", "the second", "", "the third"], "decode": [], "head": []}
    assert [after.caption(id) for id in range(4)] == ["the third"] * 3 + ["another"]
    assert all(torch.equal(after.sample([id])[0], latents[id]) for id in range(4))
    assert equal(stored(after), stored(run(**flags | dict(out=tmp_path / "fresh"))))


def test_a_film_that_was_only_touched_is_the_same(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    run(videos=root, out=tmp_path / "set", **SMALL)
    for did in work.values():
        did.clear()
    os.utime(root / "b.mp4", (1, 1))
    before = (tmp_path / "set/manifest.json").read_bytes()
    run(videos=root, out=tmp_path / "set", **SMALL)
    assert set(work["head"]) == {"b.mp4"} and not work["decode"]
    work["head"].clear()
    run(videos=root, out=tmp_path / "set", **SMALL)
    assert work["head"] == [] and (tmp_path / "set/manifest.json").read_bytes() == before


def test_a_film_of_the_same_size_and_beginning_is_known_as_another(tmp_path, capsys):
    pictures = np.random.default_rng(0).integers(0, 256, (69, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "films").mkdir()
    path = steady(tmp_path / "films/a.avi", pictures, "rawvideo")
    path.with_suffix(".txt").write_text("a film")
    flags = dict(videos=tmp_path / "films", out=tmp_path / "set", sizes=("16x16",), frames=69)
    before, size = stored(run(**flags)), path.stat().st_size
    pictures[55:] = 255 - pictures[55:]
    steady(path, pictures, "rawvideo")
    capsys.readouterr()
    assert path.stat().st_size == size
    assert not equal(stored(run(**flags)), before)
    assert "1 film replaced: a.avi" in capsys.readouterr().out


def test_an_empty_text_beside_a_film_leaves_it_the_caption_of_a_list(tmp_path):
    tiny_film(tmp_path / "films/a.mp4")
    (tmp_path / "films/a.txt").touch()
    (tmp_path / "films/captions.csv").write_text("file,caption\na.mp4,from a list\n")
    assert stored(run(videos=tmp_path / "films", out=tmp_path / "set", **SMALL))[0][1] == "from a list"


def test_a_film_that_was_replaced_by_one_that_cannot_be_used_is_dropped(tmp_path, capsys):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    tiny_film(root / "a.mp4", frames=3)
    (root / "b.mp4").write_bytes(b"not a film")
    (root / "c.txt").unlink()
    (root / "d.txt").write_text("word " * 99)
    tiny_film(root / "e.mp4", "film e")
    again = run(**flags)
    assert [row[0] for row in stored(again)] == ["e.mp4"]
    out = capsys.readouterr().out
    assert "4 gone, 1 new" in out and "4 films skipped, named above" in out


def test_what_cannot_be_read_now_is_not_gone(tmp_path, monkeypatch, capsys):
    root = four_films(tmp_path / "films")
    tiny_film(root / "below/e.mp4", "film e")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    (root / "d.mp4").unlink()

    def bad_sector(path, *args, of, **options):
        if Path(path).name in ("below", "a.txt"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return of(path, *args, **options)

    for module, name in ((os, "scandir"), (films, "read_text")):
        monkeypatch.setattr(module, name, partial(bad_sector, of=getattr(module, name)))
    capsys.readouterr()
    assert [row[0] for row in stored(run(**flags))] == ["a.mp4", "b.mp4", "below/e.mp4", "c.mp4"]
    assert told(capsys) == "1 gone: d.mp4"


@pytest.mark.parametrize("becomes, why", [("a.mp4", "the same as a.mp4"), ("nothing", "a link that leads nowhere")])
def test_a_film_that_is_now_a_link_to_another_or_to_nothing_is_gone(tmp_path, capsys, becomes, why):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    (root / "b.mp4").unlink()
    (root / "b.mp4").symlink_to(root / becomes)
    capsys.readouterr()
    assert [row[0] for row in stored(run(**flags))] == ["a.mp4", "c.mp4", "d.mp4"]
    said = capsys.readouterr().out
    assert "1 gone: b.mp4" in said
    assert f"b.mp4: {why}" in said


def test_what_a_list_names_is_used_whatever_it_is_called(tmp_path, capsys):
    root = tmp_path / "films"
    for name in ("a.mp4", ".b.mp4", "c.mp4"):
        tiny_film(root / name)
    (root / "c.mp4").rename(root / "c.m1v")
    listed = [json.dumps({"file": name, "caption": name}) for name in ("a.mp4", ".b.mp4", "c.m1v")]
    (root / "captions.jsonl").write_text("\n".join(listed))
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    assert [row[0] for row in stored(run(**flags))] == [".b.mp4", "a.mp4", "c.m1v"]
    assert "skipped" not in capsys.readouterr().out
    (root / "captions.jsonl").write_text(listed[0])
    assert [row[0] for row in stored(run(**flags))] == ["a.mp4"]
    assert "skipped" in capsys.readouterr().out


def test_a_name_like_the_key_of_a_clip_is_not_taken_for_one(tmp_path, capsys):
    root = tmp_path / "films"
    for name in ("a", "a #1", "a #2"):
        tiny_film(root / f"{name}.mp4", f"film {name}")
        (root / f"{name}.mp4").rename(root / name)
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    assert [row[0] for row in stored(run(**flags))] == ["a"]
    assert "a #1: its name ends as a clip's key does: rename it" in capsys.readouterr().out


def test_a_film_that_comes_back_is_made_again(tmp_path):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    whole = stored(run(**flags))
    (root / "b.mp4").rename(tmp_path / "b.mp4")
    assert run(**flags).count == 3
    (tmp_path / "b.mp4").rename(root / "b.mp4")
    assert equal(stored(run(**flags)), whole)


def test_a_dataset_of_an_earlier_version_is_taken_as_it_is_and_known_from_then_on(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    whole = stored(run(**flags))
    journal = tmp_path / "set/journal.0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name not in ("text", "film")} for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in old))
    for did in work.values():
        did.clear()
    (root / "a.txt").write_text("another caption")
    capsys.readouterr()
    run(**flags)
    assert told(capsys) == ("1 caption changed, 3 taken as they are, for an earlier version did not write down "
                            "what they were made from: a.mp4")
    assert not work["decode"] and not work["encode"]
    tiny_film(root / "b.mp4", seed=1)
    again = stored(run(**flags))
    assert told(capsys) == "1 film replaced: b.mp4"
    assert [row[1] for row in again] == ["another caption", "film b", "film c", "film d"]
    assert not torch.equal(again[1][2], whole[1][2])


def test_another_caption_for_films_without_one_is_given_to_them_alone(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    (root / "b.txt").unlink()
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags, caption="a film")
    encoded = len(work["encode"])
    again = run(**flags, caption="some film")
    assert told(capsys) == "1 caption changed: b.mp4" and len(work["encode"]) == encoded
    assert [row[1] for row in stored(again)] == ["film a", "some film", "film c", "film d"]


def test_another_negative_prompt_is_another_null_text(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    before = run(**flags)
    content = before.null.clone()
    encoded = len(work["encode"])
    again = run(**flags, negative="bad")
    assert told(capsys) == "another null text" and len(work["encode"]) == encoded
    [row] = codec.load("dct").embed(["bad"])
    assert torch.allclose(again.null[:2], row, atol=0.02) and torch.equal(before.null, content)
    assert opened(tmp_path / "set").content != before.content


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_after", [0, 1, 2, 3])
def test_a_second_run_that_is_interrupted_goes_on(tmp_path, monkeypatch, work, interrupted_after):
    root = tmp_path / "films"
    for name in "abc":
        tiny_film(root / f"{name}.mp4", f"film {name}", frames=10)
    flags = dict(videos=root, out=tmp_path / "set", cuts="all", **SMALL)
    before = stored(run(**flags))
    monkeypatch.setattr("store.monotonic", iter(range(0, 10**6, 10)).__next__)    # every sample is saved at once
    for name in "ab":
        tiny_film(root / f"{name}.mp4", seed=1, frames=10)
    (root / "c.txt").write_text("another caption")
    work["encode"].clear()
    add, added = store.Writer.add, []

    def interrupted(*args, **options):
        if len(added) == interrupted_after:
            raise KeyboardInterrupt
        added.append(options["key"])
        return add(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(**flags)
    assert equal(stored(opened(tmp_path / "set")), before)
    assert equal(stored(run(**flags)), stored(run(**flags | dict(out=tmp_path / "fresh"))))
    assert len(work["encode"]) - 6 == 4 + (interrupted_after < 4), "none is encoded twice but the one that was lost"


def test_compaction_frees_what_was_replaced_and_the_next_run_knows_all(tmp_path, capsys, work):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    for name in "abc":
        tiny_film(root / f"{name}.mp4", seed=1)
    (root / "d.txt").write_text("another caption")
    again = run(**flags, compact=True)
    assert "0 MB of what was replaced or dropped are free again" in capsys.readouterr().out
    assert not (tmp_path / "set/24x2x4x4.0.bin").exists() and not (tmp_path / "set/journal.0.jsonl").exists()
    assert equal(stored(again), stored(run(videos=root, out=tmp_path / "fresh", **SMALL)))
    for did in work.values():
        did.clear()
    assert run(**flags).content == again.content and work["decode"] == work["head"] == []
    (root / "a.txt").write_text("and another")
    assert [row[1] for row in stored(run(**flags))] == ["and another", "film b", "film c", "another caption"]
    assert told(capsys) == "1 caption changed: a.mp4" and work["decode"] == []


def test_fewer_moving_shapes_are_fewer(tmp_path, capsys):
    whole = stored(run(clips=6, out=tmp_path / "set", **SMALL))
    six = (tmp_path / "set/journal.0.jsonl").read_bytes()
    fewer = run(clips=4, out=tmp_path / "set", **SMALL)
    assert told(capsys) == "2 gone: 4, 5" and fewer.count == 4
    assert equal(stored(fewer), whole[:4])
    assert equal(stored(run(clips=6, out=tmp_path / "set", **SMALL)), whole)
    assert (tmp_path / "set/journal.0.jsonl").read_bytes() == six


# ---- prompts --------------------------------------------------------------------------------------------------------

def test_prompts_alone_make_a_dataset_to_distil_from(tmp_path):
    (tmp_path / "list.txt").write_text("a red circle\n\n  un été  \na red circle\n", encoding="utf-8")
    latents = run(prompts=tmp_path / "list.txt", shape=(24, 5, 8, 8), text_length=8, out=tmp_path / "set")
    assert latents.shapes == [(24, 5, 8, 8)]
    assert [latents.caption(i) for i in range(latents.count)] == ["a red circle", "un été", "a red circle"]
    [row] = codec.load("dct").embed(["un été"])
    assert torch.allclose(latents.text([1])[0, :3], row, atol=0.02)
    assert latents.text([0]).shape == (1, 8, 64)


def test_prompts_are_known_by_their_words(tmp_path, capsys, work):
    path, flags = tmp_path / "list.txt", dict(shape=(24, 5, 8, 8), text_length=8, out=tmp_path / "set")
    path.write_text("one\ntwo\nthree\ntwo\n")
    run(prompts=path, **flags)
    work["embed"].clear()
    path.write_text("zero\none\nthree\ntwo\n")
    again = run(prompts=path, **flags)
    assert told(capsys).startswith("1 prompt changed") and work["embed"] == ["", "zero"]
    assert sorted(again.caption(i) for i in range(4)) == ["one", "three", "two", "zero"]
    path.write_text("one\nthree\n")
    again = run(prompts=path, **flags)
    assert told(capsys).startswith("2 gone") and [again.caption(i) for i in range(2)] == ["one", "three"]


def test_prompts_that_an_earlier_version_numbered_are_not_made_again(tmp_path, capsys, work):
    path, flags = tmp_path / "list.txt", dict(shape=(24, 5, 8, 8), text_length=8, out=tmp_path / "set")
    path.write_text("one\ntwo\nthree\n")
    run(prompts=path, **flags)
    journal = tmp_path / "set/journal.0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for number, line in enumerate(lines, 1):
        line |= {"key": str(number)}
        del line["text"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work["embed"].clear()
    path.write_text("one\nanother\nthree\n")
    again = run(prompts=path, **flags)
    assert work["embed"] == ["", "another"] and told(capsys).startswith("1 prompt changed")
    assert sorted(again.caption(i) for i in range(3)) == ["another", "one", "three"]


def test_prompts_of_any_editor_are_read_line_by_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\u2028and more\n".encode())
    latents = run(prompts=path, shape=(24, 5, 8, 8), text_length=8, out=tmp_path / "set")
    assert [latents.caption(i) for i in range(latents.count)] == ["one", "two\u2028and more"]


# ---- wan ------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_wan_weights_encode_films_and_give_their_own_mean_and_std(pipeline, folder, tmp_path):
    folder = folder / "below"
    latents = run(videos=folder, codec="wan", vae=pipeline, text=pipeline, sizes=("64x64",), frames=5, dtype="fp32",
                  negative="bad", out=tmp_path / "set")
    coder = codec.load("wan", vae=pipeline, text=pipeline)
    assert latents.manifest["mean"] == coder.spec["mean"] and latents.manifest["std"] == coder.spec["std"]
    [null] = coder.embed(["bad"])
    assert torch.equal(latents.null[:len(null)], null) and latents.null.shape == (512, 32)
    for name, caption, latent, text in stored(latents):
        [(video, _)] = films.read_video(folder / name, sizes=[(64, 64)], frames=5, fps=16)
        assert torch.allclose(latent, coder.encode(video), atol=1e-4)
        assert latent.shape == (4, 2, 8, 8)


def other_weights(pipeline, to, part):
    """A copy of the pipeline whose text_encoder or vae has other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline, to)
    [file] = (to / part).glob("*.safetensors")
    save_file({name: x * 1.5 for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    return to


def test_other_weights_of_the_text_encoder_embed_all_again_and_nothing_else(pipeline, tmp_path, capsys, work):
    tiny_film(tmp_path / "films/a.mp4", "film a", frames=9)
    flags = dict(videos=tmp_path / "films", codec="wan", vae=pipeline, out=tmp_path / "set", cuts="all", dtype="fp32",
                 **SMALL)
    before = run(**flags, text=pipeline)
    for did in work.values():
        did.clear()
    other = other_weights(pipeline, tmp_path / "other", "text_encoder")
    again = run(**flags, text=other)
    assert told(capsys) == "1 caption embedded by other weights, another null text: a.mp4"
    assert work == {"encode": [], "embed": ["", "film a"], "decode": [], "head": []}
    for text, caption in ((again.text([0])[0], "film a"), (again.null, "")):
        [row] = codec.load("wan", text=other).embed([caption])
        assert torch.equal(text[:len(row)], row)
    assert not torch.equal(again.text([0]), before.text([0]))
    assert torch.equal(again.sample([0])[0], before.sample([0])[0])
    assert again.manifest["codec"]["text_sha256"] != before.manifest["codec"]["text_sha256"]
    content = again.content
    assert run(**flags, text=other).content == content


@pytest.mark.parametrize("damage", ['{"dtype": "fp', "{}", "[]"], ids=["cut", "empty", "a list"])
@pytest.mark.parametrize("flags", [dict(), dict(dry_run=True), dict(compact=True)], ids=["", "dry_run", "compact"])
def test_damaged_settings_of_a_dataset_are_named(damage, flags, tmp_path, capsys):
    run(clips=2, out=tmp_path / "set")
    (tmp_path / "set/spec.json").write_text(damage)
    assert "spec.json is damaged" in refused(capsys, clips=3, out=tmp_path / "set", **flags)


def test_other_weights_of_the_vae_are_refused_by_name(pipeline, tmp_path, capsys):
    tiny_film(tmp_path / "films/a.mp4", "film a")
    flags = dict(videos=tmp_path / "films", codec="wan", text=pipeline, out=tmp_path / "set", **SMALL)
    run(**flags, vae=pipeline)
    other = other_weights(pipeline, tmp_path / "other", "vae")
    assert "was begun with other settings: vae_sha256 was " in refused(capsys, vae=other, **flags)


def test_a_parquet_file_that_was_written_anew_is_made_again(pipeline, tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "old").mkdir()

    def write(name, *captions):
        rows = [parquet_row(torch.full((4, 2, 2, 2), float(i)), torch.ones(2, 32), caption=caption)
                for i, caption in enumerate(captions)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"old/{name}.parquet")

    write("a", "one", "two", "three")
    write("b", "four")
    flags = dict(parquet=tmp_path / "old", codec="wan", vae=pipeline, text=pipeline, out=tmp_path / "set")
    run(**flags)
    write("a", "one", "2")
    (tmp_path / "old/b.parquet").unlink()
    again = run(**flags)
    assert told(capsys) == "1 parquet file replaced, 1 gone: a.parquet, b.parquet"
    assert [again.caption(id) for id in range(again.count)] == ["one", "2"]
    size = (tmp_path / "old/a.parquet").stat().st_size
    write("a", "one", "3")
    assert (tmp_path / "old/a.parquet").stat().st_size == size
    assert run(**flags).caption(1) == "3"


def parquet_row(latent, text, dtype="float32", **changed):
    """A row as FastVideo's preprocessing writes it."""
    row = {"id": "0", "file_name": "film.mp4", "caption": "a caption", "media_type": "video", "fps": 16.0}
    for name, x in (("vae_latent", latent), ("text_embedding", text)):
        x = x.to(getattr(torch, dtype)).contiguous()
        row |= {f"{name}_bytes": x.view(torch.uint8).numpy().tobytes(), f"{name}_shape": list(x.shape),
                f"{name}_dtype": dtype}
    return row | changed


def test_fastvideo_parquet_is_converted_as_its_dtype_column_says(pipeline, tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "old/below").mkdir(parents=True)
    torch.manual_seed(0)
    latents, texts = torch.randn(6, 4, 2, 8, 8), [torch.randn(i + 1, 32) for i in range(6)]
    rows = [parquet_row(latents[i], texts[i], dtype, file_name=f"{i}.mp4", caption=f"caption {i}")
            for i, dtype in enumerate(["float32", "bfloat16", "float16", "float64"])]
    bad = [parquet_row(latents[4], texts[4], file_name="cut.mp4") | {"vae_latent_bytes": b"1234"},
           parquet_row(latents[4], texts[4], file_name="odd.mp4", vae_latent_dtype="int3"),
           parquet_row(latents[4][:3], texts[4], file_name="three.mp4"),
           parquet_row(latents[4], texts[4], file_name="mute.mp4", text_embedding_bytes=b"", text_embedding_shape=[])]
    last = parquet_row(latents[5], texts[5], file_name="5.mp4", caption="caption 5")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "old/a.parquet", row_group_size=3)
    pq.write_table(pa.Table.from_pylist([*bad, last]), tmp_path / "old/below/b.parquet", row_group_size=2)
    pq.write_table(pa.table({"caption": ["no more"]}), tmp_path / "old/c.parquet")
    (tmp_path / "old/d.parquet").write_bytes(b"not parquet")

    made = run(parquet=tmp_path / "old", codec="wan", vae=pipeline, text=pipeline, dtype="fp32", out=tmp_path / "set")
    found = stored(made)
    assert [row[:2] for row in found] == [(f"{i}.mp4", f"caption {i}") for i in (0, 1, 2, 3, 5)]
    for (name, _, latent, text), i in zip(found, (0, 1, 2, 3, 5)):
        dtype = getattr(torch, ["float32", "bfloat16", "float16", "float64", "", "float32"][i])
        assert torch.allclose(latent, latents[i].to(dtype).float(), atol=1e-6)
        assert torch.equal(text[:i + 1], texts[i].to(dtype).float()) and not text[i + 1:].any()
    out = capsys.readouterr().out
    for words in ("cut.mp4: vae_latent has 4 bytes", "odd.mp4: vae_latent of dtype int3; known are float64, float32",
                  "three.mp4: a latent of shape (3, 2, 8, 8), wanted is (4, F, H, W)",
                  "mute.mp4: text_embedding has 0 bytes", "skipped c.parquet: it has no column", "skipped d.parquet: ",
                  "3 parquet files skipped"):
        assert words in out, (words, out)


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (dict(videos=".", prompts="x"), "--videos and --prompts: give one of them"),
    (dict(videos="absent"), "--videos=absent: no such folder"),
    (dict(prompts="absent.txt", shape=(24, 5, 8, 8)), "--prompts=absent.txt: no such file"),
    (dict(prompts="prepare.py"), "--prompts needs --shape C F H W"),
    (dict(prompts="prepare.py", shape=(16, 5, 8, 8)), "dct latents have 24 channels"),
    (dict(prompts="prepare.py", shape=(24, 5, 7, 8)), "patches of 2 x 2"),
    (dict(prompts="prepare.py", shape=(24, 5, 8, 3)), "patches of 2 x 2"),
    (dict(prompts="prepare.py", shape=(24, 0, 8, 8)), "above 0"),
    (dict(parquet="."), "--parquet holds latents of Wan's VAE: it needs --codec=wan"),
    (dict(videos=".", clips=7), "--clips does nothing for --videos"),
    (dict(cuts="all"), "--cuts does nothing for moving shapes"),
    (dict(caption="x"), "--caption does nothing for moving shapes"),
    (dict(shape=(24, 5, 8, 8)), "--shape does nothing for moving shapes"),
    (dict(prompts="prepare.py", shape=(24, 5, 8, 8), frames=9), "--frames does nothing for --prompts"),
    (dict(vae="x"), "--vae and --text are for --codec=wan"),
    (dict(codec="wan"), "--codec=wan needs --text=PATH and --vae=PATH"),
    (dict(codec="wan", prompts="prepare.py", shape=(16, 5, 8, 8)), "--codec=wan needs --text=PATH, "),
    (dict(codec="wan", vae="absent/absent/absent", text="x/y/z"), "no folder absent/absent/absent"),
    (dict(sizes=("64",)), "--sizes 64: a size is HEIGHTxWIDTH"),
    (dict(sizes=("60x64",)), "--sizes 60x64: dct takes multiples of 8x8, such as 64x64"),
    (dict(frames=16), "--frames=16: dct takes 1 + a multiple of 4, such as 17"),
    (dict(negative="bad " * 9), "a prompt of 9 words, and this codec takes 7"),
    (dict(fps=0), "--fps=0"),
    (dict(fps=math.nan), "--fps=nan is not above 0"),
    (dict(fps=math.inf), "--fps=inf is not above 0"),
    (dict(clips=0), "--clips=0"),
    (dict(sizes=()), "--sizes takes one size or several, such as --sizes 64x64 64x96"),
    (dict(text_length=0), "--text_length=0 is not 1 or more"),
    (dict(videos="tests"), "no films in tests: their names would end in .264"),
])
def test_flags_that_cannot_be_are_refused_before_anything_is_written(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert words in refused(capsys, out=tmp_path / "set", **flags)
    assert not (tmp_path / "set").exists()


def test_a_dataset_begun_with_other_settings_is_left_alone(tmp_path, capsys):
    run(clips=3, out=tmp_path / "set")
    (tmp_path / "set/.owner").unlink()
    before = {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    assert "frames was 17 and is now 9" in refused(capsys, clips=3, out=tmp_path / "set", frames=9)
    (tmp_path / "set/.owner").unlink()
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}


def test_what_was_done_before_is_counted_without_what_is_gone(tmp_path, capsys):
    root = four_films(tmp_path / "films")
    flags = dict(videos=root, out=tmp_path / "set", **SMALL)
    run(**flags)
    (root / "a.mp4").unlink()
    capsys.readouterr()
    run(**flags)
    assert "3 of rank 0's 3 done before" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_do_not_write_one_dataset(tmp_path, capsys):
    code = f"import ckpt, time; ckpt.claim({str(tmp_path)!r}); print(flush=True); time.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()
    said = refused(capsys, clips=2, out=tmp_path)
    other.kill()
    other.wait()
    assert f"is in use by process {other.pid}" in said and not (tmp_path / "spec.json").exists()
    assert run(clips=2, out=tmp_path).count == 2


def test_a_list_of_captions_that_cannot_be_read_is_named_with_its_line(tmp_path, capsys):
    make_film(tmp_path / "films/a.mp4")
    (tmp_path / "films/captions.jsonl").write_text('{"file": "a.mp4", "caption": "fine"}\n{"name": "b.mp4"}\n')
    assert "captions.jsonl, line 2: wanted is" in refused(capsys, videos=tmp_path / "films", out=tmp_path / "set")


def test_a_folder_of_which_nothing_can_be_used_is_one_line_and_leaves_nothing(tmp_path, capsys):
    make_film(tmp_path / "films/a.mp4")
    said = refused(capsys, videos=tmp_path / "films", out=tmp_path / "set")
    assert said.splitlines()[-1] == ("prepare.py: none of the films can be used: 1 of 1 films are without a caption: "
                                     "--caption=TEXT would take them")
    assert not (tmp_path / "set").exists()
