"""signs.py: each cause is seen in a log that shows it and in no other; distill.py says it once."""
import re

import pytest

from log import Log
from signs import LINES, UPDATES, signs

GOOD = {"student_updates": UPDATES, "student_grad_norm": 0.3,
        "student_guidance_by_t3": 0.1, "student_matching_by_t3": 0.08,
        "student_guidance_by_t0": 0.0, "student_matching_by_t0": 0.05}
VALIDATED = {"val_std": 1.05, "val_diversity": 1.0}


def log_with(*last, lines=LINES, **more):
    """A first validation, lines of a good run with `more` in them, and an end."""
    first = {"step": 0, "val_std": 0.8, "val_diversity": 0.7}
    return [first, *({"step": i} | GOOD | more for i in range(lines)), *({"step": lines} | some for some in last)]


BAD = [
    ("the critic is behind", log_with(student_matching_by_t3=0.02), "0.2 of the guidance.*--critic_lr"),
    ("over-saturation", log_with(GOOD | {"val_std": 1.18, "val_diversity": 1.2}), "1.2 times.*--guidance"),
    ("loss of variety", log_with(GOOD | {"val_std": 1.0, "val_diversity": 0.65}), "0.65 times.*--pairs"),
    ("the student is frozen", log_with(GOOD | {"val_std": 0.8001, "val_diversity": 0.7}), "--student_lr"),
    ("the student is frozen", log_with(student_grad_norm=0.0), "gradient is 0.*--guidance"),
]


@pytest.mark.parametrize("cause, entries, said", BAD, ids=[f"{cause}: {said}" for cause, _, said in BAD])
def test_a_log_that_shows_a_cause_has_it_named_alone_with_its_figure_and_a_flag(cause, entries, said):
    (found, line), = signs(entries).items()
    assert found == cause
    assert re.search(said, line)


@pytest.mark.parametrize("entries", [
    log_with(), log_with(GOOD | VALIDATED), [{"step": 0} | VALIDATED],
    log_with(student_guidance_by_t3=0.0), log_with(lines=1)], ids=["", "validated", "start", "no guidance", "begun"])
def test_a_log_of_a_good_run_shows_nothing(entries):
    assert signs(entries) == {}


def test_nothing_is_concluded_before_the_student_has_moved():
    early = {"student_updates": UPDATES - 1, "student_grad_norm": 0.0}
    assert signs(log_with(**early)) == {}


def test_a_batch_that_differs_is_no_sign():
    assert signs(log_with(GOOD | {"student_matching_by_t3": 0.01})) == {}


def test_a_cause_is_said_once(tmp_path, capsys):
    log = Log(tmp_path, {}, steps=9, signs=lambda entries: {"tired": "tired: sleep"})
    for step in (1, 2):
        log(step, loss=1.0)
    log.close()
    assert capsys.readouterr().out.count("step 1: tired: sleep\n") == 1


def test_variety_that_still_grows_is_no_loss():
    assert signs(log_with({"val_std": 1.0, "val_diversity": 0.3}, GOOD | {"val_std": 1.0, "val_diversity": 0.5})) == {}
