"""What several test files share: a root run in this process or as a command line, and what a run leaves behind."""
import inspect
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import ckpt
import codec
import parallel
import prepare
from log import MACHINE
from model import MODELS

TIMINGS = set(MACHINE)      # differ between runs that are otherwise identical

# What ranks are forked with; an optimizer imports torch._dynamo.
IMPORTED = ["train", "distill", "evaluate", "pytest", "torch._dynamo"]

# A run's folder as the ckpt.save of commit 496ae65 wrote it on two ranks; its meta is of a train.py of that commit.
V1 = Path(__file__).parent / "v1"
V1_PATH = V1 / "ckpt" / "step_0000002"


def run(main, *args):
    """One process's main(cfg), in this process, which afterwards is as it was: no group, no handlers of signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return main(*args)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in kept.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def cheaply(patch):
    """Runs of the tiny model take a fifth of the time: a narrower net, no curves, their videos of one picture."""
    write = codec.write_video

    def write_first(path, videos, fps, *columns):       # which write_clips gives, sample.py does not
        write(path, [v[:1] for v in videos] if columns else videos, fps, *columns)

    patch.setitem(MODELS, "tiny", replace(MODELS["tiny"], dim=48, blocks=2, ffn=96))
    patch.setattr("log.curves", no_curves)
    patch.setattr("codec.write_video", write_first)


def store():
    """What ranks meet at, as torchrun's: it holds its port from the start, so that nobody else can take it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started(n, main, cfg):
    """n ranks of main(cfg), cheap ones, in processes forked from one with everything imported -> them, their output."""
    multiprocessing.set_forkserver_preload(IMPORTED)        # before the first is started
    with tempfile.NamedTemporaryFile("r") as printed:
        server = store()
        given = n, server.port, printed.name, main, cfg
        group = multiprocessing.start_processes(rank_of, given, n, join=False, start_method="forkserver")
        try:
            yield group, printed
        finally:
            for process in group.processes:
                process.kill()


def ranks(n, main, cfg):
    """What n `started` ranks have printed once all have ended well."""
    with started(n, main, cfg) as (group, printed):
        while not group.join():
            pass
        return printed.read()


def rank_of(rank, n, port, printed, main, cfg):
    """One rank, as torchrun starts it."""
    cheaply(pytest.MonkeyPatch())
    os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), 1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{n}", "LOCAL_WORLD_SIZE": f"{n}",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    main(cfg)
    parallel.leave()


def wait_until(happened, group):
    """Waits until happened(), while all ranks of the group live, 200 s at most."""
    deadline = time.monotonic() + 200
    while not happened() and all(map(BaseProcess.is_alive, group.processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def state(out):
    """Every tensor of a run's newest checkpoint."""
    source = ckpt.stored(out)
    return {name: source.tensor(name).clone() for name in source.shapes}


def log_of(out):
    """The lines of a run's log without what depends on the machine's speed."""
    with open(f"{out}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def same(a, b):
    """Whether two {name: tensor} are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes_dataset(folder, clips=60):
    """A dataset of moving shapes in a folder -> its path, as flags take it."""
    run(prepare.main, prepare.Config(clips=clips, out=str(folder)))
    return str(folder)


def told(main, cfg, capsys):
    """-> (exit code, {what: GB}, stderr) of a dry run."""
    with pytest.raises(SystemExit) as end:
        main(cfg)
    out, err = capsys.readouterr()
    return end.value.code, {what: float(n) for n, what in re.findall(r"^ +([\d.]+)  (.+)$", out, re.M)}, err


def total(lines, line="in all"):
    """The figure of the line that begins so."""
    return next(n for what, n in lines.items() if what.startswith(line))


def kept_in(seen, draw):
    """draw(k) that also puts what it gives into `seen`."""
    def kept(k):
        seen.append(draw(k))
        return seen[-1]

    return kept


def spied(monkeypatch, module, name, record):
    """Replaces a module's function by itself, then record(out, *args, **more) -> the list of what record returns."""
    original, seen = getattr(module, name), []

    @wraps(original)
    def told(*args, **more):
        out = original(*args, **more)
        seen.append(record(out, *args, **more))
        return out

    monkeypatch.setattr(module, name, told)
    return seen


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def run_stopped(root, cfg, update):
    """A run that gets a signal in the midst of an update, the first one being 1."""
    calls = count(1)
    with pytest.MonkeyPatch.context() as patch:
        original = root.train_step

        def interrupted(*args, **more):
            if next(calls) == update:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **more)

        patch.setattr(root, "train_step", interrupted)
        run(root.main, cfg)


def run_killed(root, cfg, step, function):
    """A run that is killed when it calls this function of its root at this step."""
    original = getattr(root, function)
    named = inspect.signature(original)

    def killed(*args):
        if named.bind(*args).arguments["step"] == step:
            raise Killed
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, function, killed)
        with pytest.raises(Killed):
            run(root.main, cfg)


def refused(main, cfg, capsys):
    """What a run that is refused says: one line on stderr, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(main, cfg)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def rewrite(path, change):
    """Changes the manifest of a checkpoint in place: change(manifest) alters it."""
    manifest = ckpt.read_manifest(path)
    change(manifest)
    ckpt.write_json(Path(path) / "manifest.json", manifest | {"crc32": ckpt.digest(manifest)})


def as_version_1(path):
    """Rewrites a checkpoint in place as commit 496ae65 wrote it: one file a rank, each tensor's rows with it."""
    path = Path(path)
    manifest = ckpt.read_manifest(path)
    tensors = ckpt.described(manifest)
    files = {}
    for rank in range(1 + max(r for t in tensors.values() for r, _, _ in t["rows"])):
        held = {}
        for file in sorted(path.glob(f"rank_{rank:05d}.*.pt")):
            held |= {name: x.clone() for name, x in torch.load(file, weights_only=True).items()}
            file.unlink()
        file = path / f"rank_{rank:05d}.pt"
        torch.save({name: held[name] for name in tensors if name in held}, file)
        files[file.name] = {"size": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
    old = {"version": 1, "step": manifest["step"], "meta": manifest["meta"], "files": files, "tensors": tensors}
    ckpt.write_json(path / "manifest.json", old | {"crc32": ckpt.digest(old)})
    return path


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


def meta(path):
    """What a checkpoint says beside its tensors; path: it, or a run's folder."""
    return ckpt.read_manifest(ckpt.latest(path) or path)["meta"]


def close(mine, theirs, rel, *names):
    """Compares these numbers of two logs at the steps that both have; each is met at least once."""
    theirs, met = {line["step"]: line for line in theirs}, set()
    for line in mine:
        for name in set(names) & line.keys() & theirs.get(line["step"], {}).keys():
            assert line[name] == pytest.approx(theirs[line["step"]][name], rel=rel), (line["step"], name)
            met.add(name)
    assert met == set(names)


def no_curves(path, entries):
    """Stands for log.curves."""


def out_of_memory(*args, **more):
    raise RuntimeError("out of memory")


def full_disk(*args, **more):
    raise OSError("the disk is full")


def nan_at(monkeypatch, root, name, *calls):
    """The loss called `name` is not a number at these of its calls with a gradient, the first one being 1."""
    original, made = getattr(root, name), []

    def broken(*args, **more):
        loss, seen = original(*args, **more)
        if torch.is_grad_enabled():
            made.append(name)
            if len(made) in calls:
                loss = loss * math.nan
        return loss, seen

    monkeypatch.setattr(root, name, broken)
