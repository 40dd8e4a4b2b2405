"""evaluate.py: every figure against its definition written out, and the whole command on a teacher and its student."""
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ckpt
import distill
import evaluate
import parallel
import prepare
import train
from data import noise
from evaluate import (Clips, distances, energy, figures, interval, mcnemar, paired, recall, variety, vendi,
                      verdict)
from helpers import cheaply, copied, ranks, refused, rewrite, run


@pytest.fixture(scope="module", autouse=True)
def cheap():
    with pytest.MonkeyPatch.context() as patch:
        cheaply(patch)
        yield


def points(n, seed, shift=0.0, D=3):
    return np.random.default_rng(seed).normal(shift, 1, (n, D))


def length(a, b):
    return sum((p - q) ** 2 for p, q in zip(a, b)) ** 0.5


def test_energy_is_the_definition_without_bias():
    x, y = points(7, 0), points(5, 1)


    def mean(a, b, pairs):
        return sum(length(p, q) for p in a for q in b) / pairs

    def between(a, b):
        return energy(distances(a, a), distances(a, b), distances(b, b))

    wanted = 2 * mean(x, y, 35) - mean(x, x, 42) - mean(y, y, 20)
    assert between(x, y) == pytest.approx(wanted, abs=1e-12)
    equal = [between(points(40, 2 * i), points(40, 2 * i + 1)) for i in range(60)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / 60**0.5
    assert min(equal) < 0                                           # a biased one is never negative
    assert between(points(40, 0), points(40, 1, shift=1)) > 10 * np.std(equal)


def test_recall_is_the_share_of_real_clips_within_reach():
    x, y, k = points(12, 0), points(9, 1), 3
    reach = [sorted(length(p, q) for q in x)[k] for p in x]         # the nearest of all is the clip itself
    wanted = np.mean([any(length(p, q) <= r for p, r in zip(x, reach)) for q in y])
    assert 0.2 < recall(distances(x, x), distances(x, y), k) == wanted < 1
    two = np.concatenate([points(60, 2), points(60, 3, shift=9)])
    one = two[:60]
    assert recall(distances(two, two), distances(two, two)) == 1
    lost = recall(distances(one, one), distances(one, two))
    assert lost == pytest.approx(0.5, abs=0.02)                     # a mode that is lost


def test_vendi_counts_clips_that_differ():
    far = 100 * np.eye(6)
    assert vendi(distances(far, far)) == pytest.approx(6)
    assert vendi(np.zeros((6, 6))) == pytest.approx(1, abs=1e-6)
    twice = np.repeat(far, 2, axis=0)
    assert vendi(distances(twice, twice)) == pytest.approx(6)


def test_spread_is_the_mean_distance_between_clips_of_one_prompt():
    x = points(evaluate.PROMPTS * evaluate.SEEDS, 0)
    groups = [x[i:i + evaluate.SEEDS] for i in range(0, len(x), evaluate.SEEDS)]
    apart = [length(p, q) for same in groups for i, p in enumerate(same)
             for j, q in enumerate(same) if i != j]
    assert variety(x) == pytest.approx(np.mean(apart))


def test_a_verdict_compares_each_word():
    assert verdict(("circle", "red", "left"), "a red circle moving left") == [True] * 3
    assert verdict(("square", "red", "up"), "a red circle moving left") == [False, True, False]


def clips(n, seed, right):
    x = points(n + evaluate.PROMPTS * evaluate.SEEDS, seed, D=6)
    latents = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(x), 2, 3, 1, 1)))
    return Clips(latents, [], np.array(right), x, None)


def test_figures_of_real_clips_are_the_unit_and_joint_wants_all_three_right():
    right = [[True, True, True], [True, False, True], [True, True, False], [True, True, True]] * 5
    real, other = clips(20, 0, right), clips(20, 1, right)
    seen = figures(real, real, [other])
    assert (seen["joint"], seen["shape"], seen["colour"], seen["direction"]) == (0.5, 1, 0.75, 0.75)
    assert (seen["diversity"], seen["std"], seen["motion"]) == (1, 1, 1)
    loud = real._replace(latents=3 * real.latents, features=2 * real.features)
    seen = figures(loud, real, [other])
    assert seen["std"] == pytest.approx(3)
    assert seen["motion"] == pytest.approx(3)
    assert seen["diversity"] == pytest.approx(2)


def test_mcnemars_p_is_that_of_a_fair_coin_whatever_both_have_right_or_wrong():
    for only_a, only_b in ((5, 1), (1, 5), (0, 7), (3, 3), (0, 0)):
        a = np.repeat([True, False, True, False], [only_a, only_b, 4, 9])
        b = np.repeat([False, True, True, False], [only_a, only_b, 4, 9])
        n = only_a + only_b
        far = [k for k in range(n + 1) if abs(k - n / 2) >= abs(only_a - n / 2)]    # as uneven, or more
        assert mcnemar(a, b) == (only_a, only_b, pytest.approx(sum(comb(n, k) for k in far) / 2**n))


def test_an_interval_leaves_out_a_fortieth_at_each_end():
    assert interval(np.arange(1001) / 7) == [round(25 / 7, 3), round(975 / 7, 3)]


def test_pairs_are_told_apart_by_mcnemar_and_by_halves():
    n = 40
    a_right, b_right = np.ones((n, 3), bool), np.ones((n, 3), bool)
    a_right[:1, 0] = False          # one that b alone has right
    b_right[1:6, 2] = False         # five that a alone has right
    a, b, real, other = (clips(n, i, right) for i, right in enumerate([a_right, b_right, b_right, b_right]))
    seen = paired(a, b, real, [other])
    assert (seen["only the first right"], seen["only the second right"]) == (5, 1)
    assert seen["McNemar p"] == round(2 * (1 + 6) / 2**6, 3)
    for name in ("energy", "recall"):                                       # all of one distribution
        assert seen[name][0] < 0 < seen[name][1]
    shifted = paired(a._replace(features=a.features + 1), b, real, [other])
    assert shifted["energy"][0] > 0
    assert paired(a, a, real, [b])["McNemar p"] == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and its student, hardly trained."""
    folder = tmp_path_factory.mktemp("evaluate")
    data, teacher, student = (str(folder / name) for name in ("data", "teacher", "student"))
    run(prepare.main, prepare.Config(clips=40, out=data))
    run(train.main, train.Config(data=(data,), out=teacher, steps=2, batch=4, warmup=1, val_every=0, samples=0,
                                 first_frame=0.5))
    run(distill.main, distill.Config(pairs=0, data=data, teacher=teacher, out=student, steps=2, student_every=2,
                                     batch=4, samples=0))
    return teacher, student


@pytest.fixture
def few(monkeypatch):
    """Fewer clips of the same prompts than one would measure with."""
    monkeypatch.setattr(evaluate, "PROMPTS", 2)
    monkeypatch.setattr(evaluate, "SEEDS", 2)


@pytest.mark.slow
def test_a_student_is_measured_beside_its_teacher_and_samples_are_made_once(runs, few, capsys, monkeypatch):
    teacher, student = runs
    cfg = evaluate.Config(ckpt=student, teacher=teacher, n=12, device="cpu")
    run(evaluate.main, cfg)
    printed = capsys.readouterr().out
    report = json.loads((evaluate.Path(student) / "evaluate.json").read_text())
    systems = ["real clips", "real clips, another caption", "student, 4 steps", "teacher, 25 steps, s=1.5",
               "teacher, 4 steps, undistilled"]
    assert list(report["table"]) == systems
    assert report["table"]["real clips"]["joint"] == 1
    assert report["table"]["real clips, another caption"]["joint"] < 1
    assert list(report["paired"]) == [f"student, 4 steps against {name}" for name in systems[3:]]
    assert report["step"] == 2
    for name in systems:
        assert f"\n{name} " in printed

    monkeypatch.setattr(evaluate.step, "sample", None)      # would fail if it were asked again
    run(evaluate.main, cfg)
    assert capsys.readouterr().out == printed


def system_of(path, **given):
    """The run's first system, under a sampling block with these changes."""
    source = ckpt.stored(path)
    return evaluate.System("a system", source, ckpt.model_of(source, "ema"), source.sampling | given)


@pytest.mark.parametrize("of", [0, 1], ids=["teacher", "student"])
def test_clip_i_is_sampled_from_noise_i_under_its_caption(runs, tmp_path, monkeypatch, of):
    system, seen = system_of(runs[of]), []
    system = system._replace(saved=system.saved._replace(origin=str(tmp_path / "run/ckpt/step_0000002")))
    (tmp_path / "run").mkdir()
    K = 4 if of else 1
    captions = evaluate.CAPTIONS[:5]

    def recorded(net, draw, cond, uncond, sampling, free, see):
        assert free is None
        noises = [draw(k) for k in range(K)]
        seen.append((noises, cond.text, uncond.text))
        assert sampling == system.sampling
        return noises[-1]

    monkeypatch.setattr(evaluate.step, "sample", recorded)
    coder = evaluate.codec.load("dct")
    cfg = evaluate.Config(n=5, batch=3, seed=9)
    x0 = run(lambda cfg: evaluate.sampled(system, coder, captions, None, cfg, parallel.init("cpu")), cfg)
    assert torch.equal(x0, noise(9, "sample", K - 1, range(5), (24, 5, 8, 8)))
    for places, (noises, text, null) in zip(([0, 1, 2], [3, 4]), seen, strict=True):
        assert len(noises) == K
        for k, e in enumerate(noises):
            assert torch.equal(e, noise(9, "sample", k, places, (24, 5, 8, 8)))
        for i, row in zip(places, text):
            words, = coder.embed([captions[i]])
            assert torch.equal(row[:len(words)], words)
        assert torch.equal(null, system.saved.tensor("null").expand(len(places), -1, -1))
    file, = (tmp_path / "run/evaluate").iterdir()
    assert torch.equal(torch.from_numpy(np.load(file)), x0)


@pytest.mark.parametrize("begins", ["captions", "directions"])
def test_a_system_begins_with_the_frames_of_real_clips(runs, tmp_path, monkeypatch, begins):
    system, seen = system_of(runs[0]), []
    system = system._replace(begins=begins, saved=system.saved._replace(origin=str(tmp_path / "run/ckpt/step_2")))
    (tmp_path / "run").mkdir()
    frames, captions = noise(1, "sample", 0, range(5), (24, 5, 8, 8)), evaluate.CAPTIONS[:5]

    def recorded(net, draw, cond, uncond, sampling, free, see):
        assert not free[:, 0].any()
        assert free[:, 1:].all()
        seen.extend(cond.text)
        return draw(0)

    monkeypatch.setattr(evaluate.step, "sample", recorded)
    coder, cfg = evaluate.codec.load("dct"), evaluate.Config(n=5, batch=3, seed=9)
    x0 = run(lambda cfg: evaluate.sampled(system, coder, captions, frames, cfg, parallel.init("cpu")), cfg)
    assert torch.equal(x0[:, :, 0], frames[:, :, 0])
    assert torch.equal(x0[:, :, 1:], noise(9, "sample", 0, range(5), (24, 5, 8, 8))[:, :, 1:])
    for row, caption in zip(seen, captions, strict=True):
        said = caption if begins == "captions" else " ".join(caption.split()[-2:])
        words, = coder.embed([said])
        assert torch.equal(row[:len(words)], words)
        assert not row[len(words):].any()


def test_given_frames_are_left_out_of_std_and_motion():
    right = np.ones((20, 3), bool)
    real, other = clips(20, 0, right), clips(20, 1, right)
    odd = real._replace(latents=real.latents.clone())
    odd.latents[:, :, 0] *= 50
    seen = figures(odd, real, [other], given=True)
    assert (seen["std"], seen["motion"]) == (1, 1)
    assert figures(odd, real, [other])["std"] > 5


def test_the_jump_after_the_first_frame_is_told_from_later_ones():
    gone = np.array([[3.0, 1, 1], [5, 1, np.nan], [np.nan, 2, 1]])
    assert evaluate.jumps(gone) == {"jump": 4, "later": 1.2}
    assert np.isnan(evaluate.jumps(gone * np.nan)["jump"])


@pytest.mark.slow
def test_first_frames_add_two_rows_to_each_system_and_two_figures(runs, few, tmp_path, capsys):
    out = tmp_path / "figures.json"
    run(evaluate.main, evaluate.Config(ckpt=runs[1], n=12, first_frame=True, out=str(out), device="cpu"))
    table = json.loads(out.read_text())["table"]
    student = "student, 4 steps"
    assert list(table)[2:] == [student, f"{student}, first frame", f"{student}, first frame, moving …"]
    assert table["real clips"]["jump"] == pytest.approx(table["real clips"]["later"], abs=0.6)
    assert "jump      later" in capsys.readouterr().out


CHUNKS = dict(window=[-9, 1, 1], tile=[2, 9, 9])


@pytest.mark.parametrize("of, causal", [("teacher", {}), ("student", {}), ("student", CHUNKS)])
def test_what_was_not_trained_with_first_frames_is_not_measured_from_them(runs, tmp_path, capsys, of, causal):
    paths = {}
    for name, path in zip(("teacher", "student"), runs):
        paths[name] = str(copied(path, tmp_path / name))
        given = {"first_frame": 0.5} if name != of else {"first_frame": 0.0} | causal
        rewrite(ckpt.latest(paths[name]), lambda manifest: manifest["meta"]["sampling"].update(given))
    rewrite(ckpt.latest(paths["student"]), lambda manifest: manifest["meta"]["base"].update(
        crc32=ckpt.read_manifest(ckpt.latest(paths["teacher"]))["crc32"]))
    cfg = evaluate.Config(ckpt=paths["student"], teacher=paths["teacher"], n=12, first_frame=True, device="cpu")
    said = f"--first_frame: {ckpt.latest(paths[of])} was not trained with first frames, as train.py --first_frame=.5"
    assert said in refused(evaluate.main, cfg, capsys)


def test_another_sampler_or_seed_is_not_what_was_kept_on_disk(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.step, "sample", lambda net, draw, *rest: draw(0))
    coder, origin = evaluate.codec.load("dct"), str(tmp_path / "run/ckpt/step_0000002")
    (tmp_path / "run").mkdir()
    asked = [({}, 0), ({"steps": 3}, 0), ({}, 1), ({}, 0)]
    for given, seed in asked:
        system = system_of(runs[0], **given)
        system = system._replace(saved=system.saved._replace(origin=origin))
        draw = partial(evaluate.sampled, system, coder, evaluate.CAPTIONS[:2], None, evaluate.Config(seed=seed))
        run(lambda draw: draw(parallel.init("cpu")), draw)
    assert len(list((tmp_path / "run/evaluate").iterdir())) == 3


def test_guidance_and_steps_are_tried_in_every_combination(runs):
    source = ckpt.stored(runs[0])
    systems = evaluate.systems_of(source, None, evaluate.Config(guidance=(1.0, 2.5), steps=(2, 3)))
    assert [system.name for system in systems] == ["2 steps, s=1, ab2", "2 steps, s=2.5, ab2", "3 steps, s=1, ab2",
                                                   "3 steps, s=2.5, ab2"]
    tried = [(system.sampling["steps"], system.sampling["guidance"]) for system in systems]
    assert tried == [(2, 1.0), (2, 2.5), (3, 1.0), (3, 2.5)]
    system, = evaluate.systems_of(source, None, evaluate.Config())
    assert system.sampling == source.sampling
    first, second = evaluate.systems_of(source, None, evaluate.Config(solver=("euler", "ab2")))
    assert f"{first.name}, ab2" == second.name == system.name
    assert first.sampling == source.sampling | {"solver": "euler"}
    assert second.sampling == source.sampling


def test_what_is_asked_undistilled_has_the_students_sampler_and_the_teachers_window(runs):
    teacher, student = (ckpt.stored(path) for path in runs)
    student.manifest["meta"]["sampling"] |= {"window": [3, 1, 1]}
    asked, many, undistilled = evaluate.systems_of(student, teacher, evaluate.Config())
    assert asked.sampling == student.sampling
    assert many.sampling == teacher.sampling
    assert undistilled.sampling == student.sampling | {"window": None}
    assert undistilled.source.origin == many.source.origin != asked.source.origin


def of_few_clips(cfg):
    """What `few` does, in another process."""
    evaluate.PROMPTS = evaluate.SEEDS = 2
    evaluate.main(cfg)


@pytest.mark.slow
def test_two_ranks_print_and_write_the_figures_of_one(runs, few, tmp_path):
    newest = ckpt.latest(runs[0])
    for folder in ("one", "two"):           # without the clips that others have sampled
        shutil.copytree(newest, tmp_path / folder / "ckpt" / newest.name)
    one = evaluate.Config(ckpt=str(tmp_path / "one"), steps=(2,), n=11, device="cpu")
    run(evaluate.main, one)
    printed = ranks(2, of_few_clips, replace(one, ckpt=str(tmp_path / "two")))
    assert printed.count("11 clips each") == 1
    written = [json.loads((tmp_path / folder / "evaluate.json").read_text()) for folder in ("one", "two")]
    first, second = (report["table"] for report in written)
    for system, row in first.items():
        assert second[system] == pytest.approx(row, rel=1e-5)


def test_only_the_files_of_the_weights_and_the_null_text_are_read(runs, few, tmp_path):
    subprocess.run(["cp", "-r", runs[0], tmp_path / "run"], check=True)
    for role in ("net", "opt"):
        for file in (tmp_path / "run").glob(f"ckpt/*/rank_00000.{role}.pt"):
            file.write_bytes(b"")
    run(evaluate.main, evaluate.Config(ckpt=str(tmp_path / "run"), n=11, steps=(1,), device="cpu"))
    assert (tmp_path / "run/evaluate.json").exists()


REFUSED = [
    (dict(guidance=(2.0,)), "is a student"),
    (dict(steps=(2,)), "is a student"),
    (dict(solver=("ab2",)), "is a student"),
    (dict(n=10), "--n=10"),
    (dict(batch=0), "--batch=0"),
    (dict(ckpt="nowhere"), "nowhere"),
    (dict(steps=(0,)), "--steps .0,"),
    (dict(teacher="STUDENT"), "is not what"),
    (dict(ckpt="TEACHER", teacher="TEACHER"), "is no distilled student"),
]


@pytest.mark.parametrize("given, words", REFUSED)
def test_what_cannot_be_measured_is_refused_in_a_line(runs, capsys, given, words):
    paths = {"TEACHER": runs[0], "STUDENT": runs[1]}
    given = dict(ckpt="STUDENT", device="cpu") | given
    given = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(SystemExit) as refused:
        run(evaluate.main, evaluate.Config(**given))
    assert refused.value.code == 2
    assert re.search(f"evaluate.py: .*{words}", capsys.readouterr().err)


def test_latents_of_another_codec_are_not_judged(runs, tmp_path, capsys):
    null = torch.zeros(1, 4)
    path = ckpt.save(tmp_path, 1, {"null": parallel.Part(null, 0, (1, 4)), "ema.a": parallel.Part(null, 0, (1, 4))},
                     {"sampling": {"codec": {"name": "wan"}}})
    with pytest.raises(SystemExit):
        run(evaluate.main, evaluate.Config(ckpt=str(path or tmp_path), device="cpu"))
    assert "codec wan: the judge reads" in capsys.readouterr().err


# ---- causal ---------------------------------------------------------------------------------------------------------

CAUSAL = {"codec": {"stride": [4, 4, 4]}, "shapes": [[24, 5, 8, 8]], "window": [-9, 1, 1], "tile": [2, 99, 99]}


def asked_for(sampling=(), **flags):
    """A causal system as the flags ask for it: its sampling block."""
    system = evaluate.System("s", SimpleNamespace(origin="out/x"), None, CAUSAL | dict(sampling))
    return evaluate.longer(system, evaluate.Config(**flags)).sampling


def test_a_longer_clip_sees_as_many_chunks_as_training_had_unless_it_is_told():
    assert asked_for() == CAUSAL
    assert asked_for(frames=33) == CAUSAL | {"window": [-3, 1, 1], "sink": 0, "frames": 9}
    assert asked_for(frames=33, window=2, sink=1) == CAUSAL | {"window": [-2, 1, 1], "sink": 1, "frames": 9}
    assert asked_for(sink=1)["frames"] == 5
    for wrong in (dict(frames=34), dict(frames=13)):
        with pytest.raises(ValueError, match="frames are 1 . a multiple of 4, 5 latent ones at least"):
            asked_for(**wrong)
    for wrong in (dict(window=0), dict(sink=-1)):
        with pytest.raises(ValueError, match="a chunk sees 1 or more, its own, and a sink of 0 or more"):
            asked_for(**wrong)
    with pytest.raises(ValueError, match="out/x is not causal"):
        asked_for({"window": [3, 3, 3]}, frames=33)


@pytest.mark.slow
def test_clips_longer_than_trained_are_judged_by_their_first_frames_and_by_what_follows(few, tmp_path, capsys):
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    run(prepare.main, prepare.Config(clips=40, out=data))
    run(train.main, train.Config(data=(data,), out=out, steps=1, batch=4, val_every=0, samples=0, window=(-9, 1, 1),
                                 tile=(1, 99, 99)))
    whole = {}
    for frames in (None, 33):
        told = str(tmp_path / f"{frames}.json")
        run(evaluate.main, evaluate.Config(ckpt=out, steps=(1,), n=12, batch=16, frames=frames, out=told))
        whole[frames] = json.loads((tmp_path / f"{frames}.json").read_text())
    assert whole[None]["later"] == {}
    (later,) = whole[33]["later"].values()
    assert {"visible"} <= later.keys() <= {"visible", "late colour", "late shape", "late direction", "off the path",
                                           "end shape", "step"}
    (short,), (long,) = ([row for name, row in whole[n]["table"].items() if "real" not in name] for n in (None, 33))
    assert long == pytest.approx(short)      # of chunks of one frame the first five are the same, to rounding
    assert "later: visible" in capsys.readouterr().out
