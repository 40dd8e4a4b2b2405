"""What every root asks of its flags: refusal in one line, values left to defaults, ranges. Imports nothing of ours.

A root's Config is a frozen dataclass whose comments are its --help; beside it stands DEFAULTS, a row per model. A flag
that is None was left to the run that goes on, then to its model's row.
"""
import math
import sys
import traceback
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from opcode import opmap
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import tyro

REFUSALS = ValueError, OSError, RuntimeError, ImportError
FIXED = {"model", "lora_rank"}      # flags that give a run's tensors their shapes


@contextmanager
def door(file):
    """Refuses bad input in one line, exit code 2; an error that no `raise` of ours made is a bug: its trace is kept."""
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, (ValueError, RuntimeError)) and not raised_by_us(error):
            traceback.print_exception(error)
        print(f"{Path(file).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def raised_by_us(error):
    """Whether a `raise` in a file beside this one made the error, not something that it called."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    here = Path(code.co_filename).parent == Path(__file__).parent
    return here and code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]


def read(Config, defaults=MappingProxyType({})):
    """The command line as a Config; its --help says what a flag that is left None is in each row of `defaults`."""
    for field in fields(Config):
        rows = {}       # {value: names of the rows that have it}
        for name, row in defaults.items():
            if field.name in row:
                rows.setdefault(row[field.name], []).append(name)
        hint = None
        if field.default == ():
            hint = "none"
        if field.default is None and rows:
            hint = "; ".join(f"{', '.join(names)} {value}" for value, names in rows.items())
        if hint:
            shown = tyro.conf.arg(help_behavior_hint=f"(default: {hint})")
            Config.__annotations__[field.name] = Annotated[field.type, shown]
    return tyro.cli(Config)


def filled(cfg, *rows):
    """The config with each flag that is None taken from the first of the rows, {flag: value}, that has one."""
    found = {}
    for row in reversed(rows):
        found |= {name: value for name, value in row.items() if value is not None}
    names = {field.name for field in fields(cfg)}
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    values = {name: value for name, value in found.items() if name in names} | given
    return replace(cfg, **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def at_least(cfg, least, *names):
    """ValueError for a flag that is below `least`, or not finite."""
    for name in names:
        value = getattr(cfg, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not least <= one < math.inf:
                raise ValueError(f"--{name}={one} is not {least} or more")


def above(cfg, bound, *names):
    """ValueError for a flag that is not above `bound`, or not finite."""
    for name in names:
        if not bound < getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name}={getattr(cfg, name)} is not above {bound}")


def lora_alpha(cfg):
    """The adapters' alpha, the rank where none is given; ValueError where the two flags do not go together."""
    if cfg.lora_alpha is not None and not (cfg.lora_rank and cfg.lora_alpha > 0):
        raise ValueError(f"--lora_alpha={cfg.lora_alpha} is above 0, and needs --lora_rank")
    if cfg.lora_rank and cfg.lora_alpha is None:
        return float(cfg.lora_rank)
    return cfg.lora_alpha


def check_run(cfg):
    """ValueError for names in --allow that are no flags or cannot change, and for a --dry_run of no ranks."""
    unknown = set(cfg.allow) - {field.name for field in fields(cfg)}
    if unknown:
        raise ValueError(f"--allow {' '.join(sorted(unknown))}: no such flag")
    fixed = FIXED & set(cfg.allow)
    if fixed:
        raise ValueError(f"--allow {' '.join(sorted(fixed))}: the run's tensors have its shapes, so it cannot change: "
                         "--out= starts another run")
    if len(cfg.dry_run) > 2 or min(cfg.dry_run, default=1) < 1:
        raise ValueError(f"--dry_run {' '.join(map(str, cfg.dry_run))}: takes a number of ranks, perhaps GB of each")
