"""flags.py: what is refused and how that is said, and where the value of a flag that was not given comes from."""
import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch

import ckpt
import distill
import flags
import step
import train
from conftest import ROOT
from model import MODELS


@dataclass(frozen=True)
class Config:
    lr: float | None = None
    steps: int | None = None
    window: tuple | None = None
    keep: int = 3
    lora_rank: int = 0
    lora_alpha: float | None = None
    allow: tuple = ()
    dry_run: tuple = ()


# ---- the door -------------------------------------------------------------------------------------------------------


def refused(capsys, work, *args):
    """What the door says of an error."""
    with pytest.raises(SystemExit) as end:
        with flags.door("/somewhere/train.py"):
            work(*args)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_we_refuse_is_said_in_one_line(capsys):
    said = refused(capsys, step.sample_t, torch.zeros(1), "cosmap")
    assert said == "train.py: t density 'cosmap': it is uniform or logit_normal\n"


def test_a_refusal_that_takes_several_lines_of_code_is_still_ours(capsys):
    """Its first line is what a trace shows."""
    assert refused(capsys, distill.resolve, distill.Config(dry_run=(1,), model="tiny", times=(0.5, 1.0), out="nowhere",
                                                           teacher="nowhere")).count("\n") == 1
    said = refused(capsys, flags.check_run, Config(allow=("lrr",)))
    assert said == "train.py: --allow lrr: no such flag\n"


def test_a_file_that_is_not_there_is_said_in_one_line(capsys):
    said = refused(capsys, open, "/nowhere/at all")
    assert said == "train.py: [Errno 2] No such file or directory: '/nowhere/at all'\n"


def test_a_module_that_is_not_there_is_said_in_one_line(capsys):
    assert refused(capsys, __import__, "nomodule") == "train.py: No module named 'nomodule'\n"


def in_ours(x):
    """An error that torch raises below a line of ours."""
    return step.flow_loss(lambda x_t, t, cond: x_t, x, None, torch.zeros(2), torch.zeros(3, 1, 1, 1, 1))


def library(text):
    return int(text)


@pytest.mark.parametrize("work, given, error", (
    (library, "many", "ValueError: invalid literal"),
    (in_ours, torch.zeros(2, 1, 1, 1, 1), "RuntimeError: The size of tensor"),
))
def test_an_error_that_nobody_raised_on_purpose_keeps_its_trace(capsys, work, given, error):
    said = refused(capsys, work, given)
    assert said.startswith("Traceback")
    assert f"in {work.__name__}" in said
    assert error in said
    assert said.splitlines()[-1].startswith("train.py: ")


@pytest.mark.parametrize("error", (KeyError, TypeError, AssertionError, IndexError, ZeroDivisionError))
def test_what_is_never_bad_input_passes_the_door(error):
    with pytest.raises(error):
        with flags.door("train.py"):
            raise error("a bug")


@pytest.mark.parametrize("code", (0, 2, 7))
def test_an_exit_passes_the_door_with_its_code(code):
    with pytest.raises(SystemExit) as end:
        with flags.door("train.py"):
            raise SystemExit(code)
    assert end.value.code == code


# ---- values ---------------------------------------------------------------------------------------------------------


def test_a_flag_is_what_was_given_else_the_runs_else_the_models():
    saved, row = {"steps": 7, "window": None}, {"steps": 100, "lr": 0.5, "window": [3, 3, 3], "beta2": 0.99}
    assert flags.filled(Config(steps=1), saved, row) == Config(steps=1, lr=0.5, window=(3, 3, 3))
    assert flags.filled(Config(), saved, row) == Config(steps=7, lr=0.5, window=(3, 3, 3))
    assert flags.filled(Config(), {}, row) == Config(steps=100, lr=0.5, window=(3, 3, 3))


def test_a_flag_that_has_a_value_of_its_own_is_not_filled():
    assert flags.filled(Config(lr=0.0, keep=0), {"keep": 9, "lr": 1.0}) == Config(lr=0.0, keep=0)


@pytest.fixture
def resumed(monkeypatch):
    """A run that goes on: its checkpoint says these flags."""
    def flags_of(out, resume):
        return {"lr": 1e-3, "steps": 7, "ema": None, "decay_steps": 7}

    monkeypatch.setattr(ckpt, "flags_of", flags_of)


def test_train_takes_the_saved_runs_values_before_its_models_row(resumed):
    cfg = train.resolve(train.Config(steps=9))
    assert (cfg.steps, cfg.lr, cfg.ema) == (9, 1e-3, train.DEFAULTS["tiny"]["ema"])


def test_a_flag_that_is_allowed_to_differ_is_not_taken_from_the_saved_run(resumed):
    cfg = train.resolve(train.Config(allow=("lr", "decay_steps")))
    assert (cfg.steps, cfg.lr) == (7, train.DEFAULTS["tiny"]["lr"])


@pytest.mark.parametrize("root", (train, distill), ids=("train", "distill"))
@pytest.mark.parametrize("model", MODELS)
def test_every_models_row_fills_what_it_is_to_fill(root, model):
    """The rows have the same flags, but for micro_batch, and what is no flag is read by the root."""
    row, names = root.DEFAULTS[model], {field.name for field in fields(root.Config)}
    assert row.keys() | {"micro_batch"} == root.WAN.keys()
    filled = flags.filled(root.Config(), row)
    assert all(getattr(filled, name) == value for name, value in row.items() if name in names)
    source = (ROOT / f"{root.__name__}.py").read_text()
    assert not [name for name in row.keys() - names if f'["{name}"]' not in source]


@pytest.mark.parametrize("root", (train, distill), ids=("train", "distill"))
def test_the_tables_of_flags_name_flags(root):
    names = {field.name for field in fields(root.Config)}
    assert root.FREE <= names
    assert root.BEFORE.keys() - names <= {"start"}      # a flag of version 1, gone


# ---- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (0, 5, 0.5))
def test_what_is_in_range_passes(value):
    flags.at_least(SimpleNamespace(x=value, y=7), 0, "x", "y")
    flags.above(SimpleNamespace(x=value), -1, "x")


@pytest.mark.parametrize("value", (-1, -1e-9, math.nan, math.inf))
def test_what_is_below_the_least_or_not_finite_is_refused_by_name(value):
    with pytest.raises(ValueError, match=f"^--y={value} is not 0 or more$"):
        flags.at_least(SimpleNamespace(x=1, y=value), 0, "x", "y")


@pytest.mark.parametrize("value", (0, -2.0, math.nan, math.inf))
def test_what_is_not_above_a_bound_or_not_finite_is_refused_by_name(value):
    with pytest.raises(ValueError, match=f"^--y={value} is not above 0$"):
        flags.above(SimpleNamespace(x=1, y=value), 0, "x", "y")


@pytest.mark.parametrize("rank, alpha, want", ((0, None, None), (4, None, 4.0), (4, 6.0, 6.0)))
def test_alpha_is_the_rank_unless_it_is_given(rank, alpha, want):
    assert flags.lora_alpha(Config(lora_rank=rank, lora_alpha=alpha)) == want


@pytest.mark.parametrize("rank, alpha", ((0, 4.0), (4, 0.0), (4, -1.0), (0, 0.0)))
def test_an_alpha_that_nothing_uses_or_that_turns_the_adapter_off_is_refused(rank, alpha):
    with pytest.raises(ValueError, match=f"--lora_alpha={alpha} is above 0, and needs --lora_rank"):
        flags.lora_alpha(Config(lora_rank=rank, lora_alpha=alpha))


def test_flags_that_may_differ_are_flags():
    flags.check_run(Config(allow=("lr", "steps")))
    with pytest.raises(ValueError, match="--allow lrr wave: no such flag"):
        flags.check_run(Config(allow=("wave", "lr", "lrr")))


@pytest.mark.parametrize("names", (("model",), ("lr", "lora_rank"), ("model", "lora_rank")))
def test_a_flag_that_gives_tensors_their_shapes_cannot_be_allowed_to_differ(names):
    fixed = " ".join(sorted({"model", "lora_rank"} & {*names}))
    with pytest.raises(ValueError, match=f"--allow {fixed}: the run's tensors have its shapes"):
        flags.check_run(train.Config(allow=names))


@pytest.mark.parametrize("ranks", ((), (1,), (8, 80)))
def test_a_dry_run_takes_ranks_and_perhaps_their_gigabytes(ranks):
    flags.check_run(Config(dry_run=ranks))


@pytest.mark.parametrize("ranks", ((0,), (8, 80, 1), (-1,), (8, 0)))
def test_a_dry_run_of_what_is_no_number_of_ranks_is_refused(ranks):
    with pytest.raises(ValueError, match=f"--dry_run {' '.join(map(str, ranks))}: takes a number of ranks"):
        flags.check_run(Config(dry_run=ranks))


@pytest.mark.parametrize("change, said", (
    (dict(text_dropout=1.0), "--text_dropout=1.0 .*: both are in"),
    (dict(ema=1.0), "--ema=1.0: both are in"),
    (dict(dense_ends=1), "--window_steps and --dense_ends shape --window"),
    (dict(lora_rank=4), "--lora_rank=4: adapters need weights"),
    (dict(steps=0), "--steps=0 is not 1 or more"),
    (dict(lr=math.nan), "--lr=nan is not 0 or more"),
))
def test_train_refuses_flags_that_do_not_go_together(change, said):
    with pytest.raises(ValueError, match=said):
        train.resolve(train.Config(out="nowhere", **change))


@pytest.mark.parametrize("change, said", (
    (dict(times=(1.0, 0.5), shift=3.0), "--times are the student's times themselves"),
    (dict(times=(0.9, 0.5)), "--times 0.9 0.5: they start at 1"),
    (dict(times=(1.0, 0.5, 0.5)), "and descend"),
    (dict(times=(1.0, 0.0)), "all above 0"),
    (dict(guidance_interval=(0.5, 0.5)), "--guidance_interval 0.5 0.5: from a low t to a high one"),
    (dict(pairs=0, steps=3, student_every=5), "the student would never change"),
    (dict(ema=1.0), "the student would never change"),
    (dict(dense_ends=1), "--dense_ends shapes --window"),
    (dict(critic_lr=0.0), "--critic_lr=0.0 is not above 0"),
))
def test_distill_refuses_flags_that_do_not_go_together(change, said):
    cfg = distill.Config(out="nowhere", teacher="nowhere", model="tiny", dry_run=(1,))
    distill.resolve(cfg)
    with pytest.raises(ValueError, match=said):
        distill.resolve(replace(cfg, **change))
