"""Early signs that a distillation goes wrong, read from its log: the table says which, and which flag to turn.

Imports nothing of ours. Entries are the objects of log.jsonl, the last one new.
"""
from typing import Callable, NamedTuple

UPDATES = 20    # of the student, before which nothing is concluded: until then all figures move
LINES = 10      # of the log, over which what differs from batch to batch is averaged


class Sign(NamedTuple):
    cause: str
    figure: Callable    # entries -> number, None where it cannot be told
    least: float        # the figure of a good run is within these two
    most: float
    says: str           # with the figure in place of {}


def signs(entries):
    """{cause: line} of all that the last entry shows to be wrong."""
    if last(entries, "student_updates", 0) < UPDATES:
        return {}
    found = {}
    for sign in SIGNS:
        figure = sign.figure(entries)
        if figure is not None and not sign.least <= figure <= sign.most:
            found[sign.cause] = f"{sign.cause}: {sign.says.format(format(figure, '.2g'))}"
            if sign.cause == FROZEN:        # whatever else is wrong was so from the start
                break
    return found


def last(entries, name, otherwise=None):
    """The newest value of a name within some lines."""
    return next((entry[name] for entry in reversed(entries[-LINES:]) if entry.get(name) is not None), otherwise)


def critic_share(entries):
    """|f - c|, what the critic knows of the student, as a share of the guidance |r - c|, where there is guidance."""
    matching = guidance = 0.0
    for entry in entries[-LINES:]:
        for t in range(5):
            pulled = entry.get(f"student_guidance_by_t{t}")
            if pulled:
                guidance += pulled
                matching += entry[f"student_matching_by_t{t}"]
    return matching / guidance if guidance else None


def contrast(entries):
    """The student's std as a ratio to the teacher's, at a validation."""
    return entries[-1].get("val_std")


def variety(entries):
    """How far the student's clips of one prompt are apart, beside the teacher's, if both had one contrast.

    None while it grows from validation to validation: few steps of the teacher itself have little of it.
    """
    if not entries[-1].get("val_std"):
        return None
    validated = [entry["val_diversity"] / entry["val_std"] for entry in entries if entry.get("val_std")]
    grows = len(validated) > 1 and validated[-1] > 1.05 * validated[-2]
    return None if grows else validated[-1]


def moved(entries):
    """How much the figures of a validation have changed since the run's first one."""
    first, seen = next((entry for entry in entries if entry.get("val_std")), None), entries[-1]
    if first in (None, seen) or not seen.get("val_std"):
        return None
    return max(abs(seen[name] / first[name] - 1) for name in ("val_std", "val_diversity"))


def pull(entries):
    """The largest gradient norm of the student lately."""
    norms = [entry["student_grad_norm"] for entry in entries[-LINES:] if entry.get("student_grad_norm") is not None]
    return max(norms, default=None)


ANY = float("inf")
FROZEN = "the student is frozen"
SIGNS = (
    # one update at a learning rate that does anything moves them by more
    Sign(FROZEN, moved, 0.002, ANY,
         "its clips have changed by {} since the first validation. Raise --student_lr, or lower --ema"),
    # good runs: .01 and more, whatever the model
    Sign(FROZEN, pull, 1e-6, ANY,
         "its gradient is {}: teacher and critic agree. Raise --guidance or --critic_lr"),
    # good runs on the shapes: .7 to 1.3; guidance 6: .27; a frozen critic: 0
    Sign("the critic is behind", critic_share, 0.3, ANY,
         "what it knows of the student, |f - c|, is {} of the guidance, in good runs .7 or more. Raise --critic_lr or "
         "--student_every, or lower --guidance"),
    # good runs: .92 to 1.06; guidance 5: 1.18; a frozen critic: 1.6
    Sign("over-saturation", contrast, 0.0, 1.15,
         "the student's clips have {} times the teacher's contrast, in good runs 1.1 at most. Lower --guidance, narrow "
         "--guidance_interval or raise --student_every"),
    # good runs: .84 and more, by four prompts; guidance 5 without pairs: .55
    Sign("loss of variety", variety, 0.7, ANY,
         "clips of one prompt differ {} times as much as the teacher's, in good runs .8 or more. Make --pairs, or more "
         "of them, raise --anchor or lower --guidance"),
)
