"""evaluate.py: every figure against its definition written out, and the whole command on a teacher and its student."""
import json
import re

import numpy as np
import pytest
import torch

import distill
import evaluate
import prepare
import train
from evaluate import Clips, distances, energy, figures, paired, recall, spread, vendi, verdict
from test_train import run


def points(n, seed, shift=0.0, D=3):
    return np.random.default_rng(seed).normal(shift, 1, (n, D))


def length(a, b):
    return sum((p - q) ** 2 for p, q in zip(a, b)) ** 0.5


def test_energy_is_the_definition_without_bias():
    x, y = points(7, 0), points(5, 1)
    mean = lambda a, b, pairs: sum(length(p, q) for p in a for q in b) / pairs  # noqa: E731
    wanted = 2 * mean(x, y, 35) - mean(x, x, 42) - mean(y, y, 20)
    assert energy(distances(x, x), distances(x, y), distances(y, y)) == pytest.approx(wanted, abs=1e-12)
    of = lambda a, b: energy(distances(a, a), distances(a, b), distances(b, b))  # noqa: E731
    equal = [of(points(40, 2 * i), points(40, 2 * i + 1)) for i in range(60)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / 60**0.5 and min(equal) < 0     # a biased one is never negative
    assert of(points(40, 0), points(40, 1, shift=1)) > 10 * np.std(equal)


def test_recall_is_the_share_of_real_clips_within_reach():
    x, y, k = points(12, 0), points(9, 1), 3
    reach = [sorted(length(p, q) for q in x)[k] for p in x]         # the nearest of all is the clip itself
    wanted = np.mean([any(length(p, q) <= r for p, r in zip(x, reach)) for q in y])
    assert 0.2 < recall(distances(x, x), distances(x, y), k) == wanted < 1
    of = lambda a, b: recall(distances(a, a), distances(a, b))  # noqa: E731
    two = np.concatenate([points(60, 2), points(60, 3, shift=9)])
    assert of(two, two) == 1 and of(two[:60], two) == pytest.approx(0.5, abs=0.02)  # a mode that is lost


def test_vendi_counts_clips_that_differ():
    far = 100 * np.eye(6)
    assert vendi(distances(far, far)) == pytest.approx(6) and vendi(np.zeros((6, 6))) == pytest.approx(1, abs=1e-6)
    twice = np.repeat(far, 2, axis=0)
    assert vendi(distances(twice, twice)) == pytest.approx(6)


def test_spread_is_the_mean_distance_between_clips_of_one_prompt():
    x = points(evaluate.PROMPTS * evaluate.SEEDS, 0)
    groups = [x[i:i + evaluate.SEEDS] for i in range(0, len(x), evaluate.SEEDS)]
    assert spread(x) == pytest.approx(np.mean([length(p, q) for some in groups for i, p in enumerate(some)
                                               for j, q in enumerate(some) if i != j]))


def test_a_verdict_compares_each_word():
    assert verdict(("circle", "red", "left"), "a red circle moving left") == [True] * 3
    assert verdict(("square", "red", "up"), "a red circle moving left") == [False, True, False]


def clips(n, seed, right):
    x = points(n + evaluate.PROMPTS * evaluate.SEEDS, seed, D=6)
    latents = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(x), 2, 3, 1, 1)))
    return Clips(latents, [], np.array(right), x)


def test_figures_of_real_clips_are_the_unit_and_joint_wants_all_three_right():
    right = [[True, True, True], [True, False, True], [True, True, False], [True, True, True]] * 5
    real, other = clips(20, 0, right), clips(20, 1, right)
    seen = figures(real, real, [other])
    assert (seen["joint"], seen["shape"], seen["colour"], seen["direction"]) == (0.5, 1, 0.75, 0.75)
    assert (seen["diversity"], seen["std"], seen["motion"]) == (1, 1, 1)
    loud = figures(real._replace(latents=3 * real.latents, features=2 * real.features), real, [other])
    assert loud["std"] == pytest.approx(3) and loud["motion"] == pytest.approx(3) and loud["diversity"] == pytest.approx(2)


def test_pairs_are_told_apart_by_mcnemar_and_by_halves():
    n = 40
    a_right, b_right = np.ones((n, 3), bool), np.ones((n, 3), bool)
    a_right[:1, 0], b_right[1:6, 2] = False, False      # one that b alone has right, five that a alone has
    a, b, real = clips(n, 0, a_right), clips(n, 1, b_right), clips(n, 2, b_right)
    seen = paired(a, b, real, [clips(n, 3, b_right)])
    assert (seen["only the first right"], seen["only the second right"]) == (5, 1)
    assert seen["McNemar p"] == round(2 * (1 + 6) / 2**6, 3)
    assert all(seen[name][0] < 0 < seen[name][1] for name in ("energy", "recall"))      # all of one distribution
    shifted = paired(a._replace(features=a.features + 1), b, real, [clips(n, 3, b_right)])
    assert shifted["energy"][0] > 0 and paired(a, a, real, [b])["McNemar p"] == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and its student, hardly trained."""
    data, teacher, student = (str(tmp_path_factory.mktemp("evaluate") / name) for name in ("data", "teacher", "student"))
    run(prepare.main, prepare.Config(clips=40, out=data))
    run(train.main, train.Config(data=data, out=teacher, steps=2, batch=4, warmup=1, val_every=0, samples=0))
    run(distill.main, distill.Config(data=data, teacher=teacher, out=student, steps=2, student_every=2, batch=4, samples=0))
    return teacher, student


def test_a_student_is_measured_beside_its_teacher_and_samples_are_made_once(runs, capsys, monkeypatch):
    teacher, student = runs
    monkeypatch.setattr(evaluate, "PROMPTS", 2)
    monkeypatch.setattr(evaluate, "SEEDS", 2)
    cfg = evaluate.Config(ckpt=student, teacher=teacher, n=12, device="cpu")
    run(evaluate.main, cfg)
    printed = capsys.readouterr().out
    told = json.loads((evaluate.Path(student) / "evaluate.json").read_text())
    assert list(told["table"]) == ["real clips", "real clips, another caption", "student, 4 steps", "teacher, 50 steps, s=2",
                                   "teacher, 4 steps, undistilled"]
    assert told["table"]["real clips"]["joint"] == 1 and len(told["paired"]) == 2 and "student, 4 steps" in printed
    monkeypatch.setattr(evaluate, "euler", None)        # would fail if it were asked again
    monkeypatch.setattr(evaluate, "rollout", None)
    run(evaluate.main, cfg)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("flags, said", [(dict(guidance=(2.0,)), "is a student"), (dict(n=10), "--n=10"), (dict(ckpt="nowhere"), "nowhere"),
                                         (dict(steps=(0,)), "--steps .0,"), (dict(teacher="self"), "is not what")])
def test_what_cannot_be_measured_is_refused_in_a_line(runs, capsys, flags, said):
    with pytest.raises(SystemExit) as refused:
        teacher = flags.get("teacher") and runs[1]
        run(evaluate.main, evaluate.Config(**dict(ckpt=runs[1], device="cpu") | flags | {"teacher": teacher}))
    assert refused.value.code == 2 and re.search(said, capsys.readouterr().err)


def test_a_teacher_beside_a_teacher_is_refused(runs, capsys):
    with pytest.raises(SystemExit):
        run(evaluate.main, evaluate.Config(ckpt=runs[0], teacher=runs[0], device="cpu"))
    assert "is no distilled student" in capsys.readouterr().err
