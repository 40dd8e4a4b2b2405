"""Checkpoints that any number of ranks writes and any other number reads, and the weight formats of the Wan family.

Imports nothing of ours. One idea serves both: a tensor has a name and a global shape and is moved by rows (its first
dimension; a 0-d tensor is one row), so that a model never has to stand whole in a process.

    rows      {name: (tensor, first, shape)}: the tensor is rows [first, first + n) of one of that global shape
    Source    where rows are read from: a checkpoint, a file of weights, either of them renamed or merged
    agree     agree(x) -> the least x over all ranks, a bool or an int: a barrier, and the only collective
    **ranks   rank=0, world=1, agree=identity, wherever all ranks must call a function together

    out/ckpt/step_0001000/
        manifest.json        version 2, step, meta; every file's size and CRC32; every tensor's shape, dtype and the
                             number of an entry of "rows", [[rank, first, last], ...]: tensors cut alike share one
        rank_00000.ema.pt    what rank 0 wrote of a role: torch.save of one flat dict {name: contiguous CPU tensor}; no
                             other object is ever unpickled

A name in a checkpoint is "role.parameter" (net, ema, ...) or a role by itself (null). Whoever needs the average alone
reads and verifies its files alone. Version 1 held all roles of a rank in one rank_00000.pt, and each tensor's own rows.
A file of weights is one role under its family's names.
"""
import errno
import json
import math
import os
import pickle
import re
import secrets
import shutil
import socket
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

VERSION = 2
# what a run says of how to sample
SAMPLING = {"model", "codec", "mean", "std", "fps", "shapes", "text", "window", "tile",
            "dense_ends", "sampler", "shift", "guidance"}
NULL = "null_text.pt"   # an export's null text: guidance leads away from it
TEMPORARY = ".tmp"  # ends the name of a folder that is being written or removed: it is never read


def identity(x):
    return x


# ---- save and load --------------------------------------------------------------------------------------------------

def roles(**rows):
    """One state from several: roles(net=rows, null=part) -> {"net.…": …, "null": part}."""
    state = {}
    for role, held in rows.items():
        if isinstance(held, dict):
            state |= {f"{role}.{name}": part for name, part in held.items()}
        else:
            state[role] = held
    return state


def save(out, step, rows, meta, *, keep=3, report=print, rank=0, world=1, agree=identity):
    """Writes out/ckpt/step_… -> its path. Called by all ranks, each with all that it holds.

    All ranks name the same tensors, of which one may hold no row; those that hold the same rows (replicas) share the
    work of writing them. meta: anything that JSON takes. The folder gets its name when all of it is on disk, and only
    then do earlier ones go, but for the newest keep - 1. A failure on one rank, a full disk say, is an OSError on all
    and leaves everything as it was; what cannot be removed is reported.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1")
    path = step_folder(out, step)
    part = path.with_name(path.name + TEMPORARY)
    about = {name: [kind(x), list(shape)] for name, (x, _, shape) in rows.items()}
    try:
        with together(agree, path):
            if rank == 0:
                for leftover in path.parent.glob(f"step_*{TEMPORARY}"):
                    remove(leftover, report)
                part.mkdir(parents=True, exist_ok=True)
        # Rank 0 reads a note of every rank: a description travels only where it says something new.
        same = alike(crc_of(about), agree)
        with together(agree, path):
            note = spans_of(rows)
            if rank == 0 or not same:
                note["about"] = about
            write_json(part / f"held_{rank:05d}.json", note)
        with together(agree, path):
            if rank == 0:
                notes = [read_json(part / f"held_{r:05d}.json") for r in range(world)]
                write_json(part / "tensors.json", divide(notes))
        with together(agree, path):
            layout = {"version": VERSION} | read_json(part / "tensors.json")
            write_rank(part, rows, layout, rank)
        with together(agree, path):
            if rank == 0:
                seal(part, path, {"step": step, "meta": meta}, layout, world, report)
    except (OSError, RuntimeError, ValueError) as error:
        free = shutil.disk_usage(nearest(path)).free / 1e9
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{path} was not saved, earlier ones are as they were ({free:.3g} GB free): "
                      f"{error}") from error
    if rank == 0:
        prune(out, step, keep, report)
    return path


def load(path, want, **ranks):
    """Copies the checkpoint at path into the tensors of want (rows) in place -> its manifest.

    Any world size loads what any other saved. All files are checked before a tensor of them is read, and their names,
    shapes and dtypes must be just those of want: ValueError lists the differences on every rank alike.
    """
    source = stored(path, **ranks)
    with together(ranks.get("agree", identity), path):
        tensors = described(source.manifest)
        saved = {name: (t["dtype"], tuple(t["shape"])) for name, t in tensors.items()}
        wanted = {name: (kind(x), tuple(shape)) for name, (x, _, shape) in want.items()}
        match(wanted, saved, path)
        fill(want, source)
    return source.manifest


def latest(out, *, roles=None, report=print, **ranks):
    """The newest valid checkpoint of a run's folder, the same one on every rank, or None without any.

    One that is damaged, or that some rank does not see, is reported and the one before it taken; ValueError if none is
    left. roles: the only ones whose files must be valid.
    """
    agree = ranks.get("agree", identity)
    with together(agree, out):
        there = steps(out)
    below = math.inf
    while True:
        mine = max((step for step in there if step < below), default=-1)
        seen_by_all, below = agree(mine), -agree(-mine)     # least and greatest of all ranks
        if below < 0:
            break
        path = step_folder(out, below)
        if seen_by_all < below:
            report(f"{path} is not seen by every rank, looking for one before it")
            continue
        try:
            verify(path, roles, **ranks)
            return path
        except (OSError, ValueError) as error:
            report(f"{path} is damaged, looking for one before it: {error}")
    if -agree(-len(there)) > 0:
        raise ValueError(f"every checkpoint of {out} is damaged: --out= starts another run")
    return None


def newest(out, resume, *, report=print, **ranks):
    """The checkpoint that a run in `out` goes on from: its own newest, else `resume`, else None.

    So a run begun from another's checkpoint goes on by the same command too. ValueError for a `resume` of its own that
    is not the newest: what came after would be lost.
    """
    if resume:
        manifest_of(resume, **ranks)    # a wrong path is refused even if it is not needed
    own = latest(out, report=report, **ranks)
    if own and resume:
        asked, have = Path(resume).resolve(), own.resolve()
        if asked != have and asked.parent == have.parent:
            verify(resume, **ranks)     # if it is newer than what was found, this names its damage
            raise ValueError(f"--resume={resume}: {out} has gone on to {own.name}. --out= goes on "
                             "from it in another folder, or remove what is newer")
    if own or not resume:
        return own
    verify(resume, **ranks)
    return Path(resume)


def differences(path, saved, flags, inputs, free, before=None):
    """ValueError where a run's flags are not those that the checkpoint at path, of manifest `saved`, was made with.

    flags and inputs, {flag: CRC32 of what it names}, are what the run keeps in its meta as "config" and "inputs". Where
    both know a flag's CRC32, that counts and not the path: what is named may have moved. free: flags that may differ,
    among them those of which nothing is read any more, such as the --init of a full finetune that has begun.
    before: {flag: value}, of newer flags what they were when the saved config lacks them (else None), and of flags that
    are gone the value that today's code reproduces.
    """
    held = saved["meta"].get("inputs", {})      # old checkpoints lack inputs: compare paths
    now = json.loads(json.dumps(flags))
    before = json.loads(json.dumps(before or {}))
    then = before | saved["meta"]["config"]
    by_content = inputs.keys() & held.keys()
    differ = [f"--{name}={value} (was {then.get(name)})" for name, value in now.items()
              if name not in by_content | free and value != then.get(name)]
    differ += [f"--{name}={now[name]} (is not what {then.get(name)} was)"
               for name in sorted(by_content - free) if inputs[name] != held[name]]
    differ += [f"--{name}={then[name]} (there is only {before[name]} now)"
               for name in before.keys() - now.keys() - free if then[name] != before[name]]
    if differ:
        raise ValueError(f"{path} is of a run with other flags: {', '.join(differ)}. "
                         "--out= starts another run, --allow NAME ... goes on with the new values")


def flags_of(out, resume=None):
    """The flags of the run that `newest` would go on from, {} if none. See meta_of."""
    return meta_of(out, resume).get("config", {})


def sampling_of(path):
    """How to sample from a run's newest checkpoint, a checkpoint (see meta_of), or what export.py wrote of one.

    None of other weights. ValueError where the file that an export has for it does not say it.
    """
    beside = folder_of(path) / "nanovideo.json"
    if is_ours(path) or not beside.is_file():
        return meta_of(path, path).get("sampling")
    told = read_json(beside)
    sampling = told.get("sampling") if isinstance(told, dict) else None
    if not isinstance(sampling, dict) or not sampling.keys() >= SAMPLING:
        raise ValueError(f"{beside} is not what export.py writes: it lacks how to sample")
    return sampling


def folder_of(path):
    """A folder itself, or that of a file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def null_of(path, **ranks):
    """The null text that a run or an export of it was trained with, None of other weights."""
    beside = folder_of(path) / NULL
    if is_ours(path):
        return stored(path, ["null"], **ranks).tensor("null")
    return torch.load(beside, weights_only=True) if beside.is_file() else None


def meta_of(out, other=None):
    """The meta of a run's newest checkpoint whose manifest can be read, else of the checkpoint `other`, else {}.

    No file of tensors is looked at, so that this may come before anything else; what is damaged is found later.
    """
    for path in [*reversed(steps(out).values()), other]:
        try:
            return read_manifest(path)["meta"] if path else {}
        except (OSError, ValueError):
            continue
    return {}


def verify(path, roles=None, *, rank=0, world=1, agree=identity):
    """The manifest of a checkpoint whose files, of these roles or all, have the size and CRC32 they were saved with.

    File i is read by rank i mod world. FileNotFoundError or ValueError otherwise, on every rank.
    """
    manifest = manifest_of(path, rank=rank, world=world, agree=agree)
    with together(agree, path):
        for name in files_of(manifest, roles)[rank::world]:
            file, saved = Path(path) / name, manifest["files"][name]
            if not file.is_file() or file.stat().st_size != saved["size"]:
                raise ValueError(f"{file} is missing or not of {saved['size']} bytes")
            if crc32(file, file.stat().st_mtime_ns) != saved["crc32"]:
                raise ValueError(f"{file} is not what was saved: its CRC32 differs")
    return manifest


def manifest_of(path, *, rank=0, world=1, agree=identity):
    """manifest.json of a checkpoint, once all ranks have read the same one."""
    with together(agree, path):
        manifest = read_manifest(path)
    if not alike(manifest["crc32"], agree):
        raise ValueError(f"{path} is not the same checkpoint on every rank")
    return manifest


def read_manifest(path):
    """manifest.json of a checkpoint, unaltered; the tensors' files are not looked at."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; {contents(path)}")
    manifest = read_json(file)
    if isinstance(manifest, dict) and "buckets" in manifest:
        raise ValueError(f"{path} is a dataset, which --data= takes: a checkpoint or a run is "
                         "wanted")
    if not isinstance(manifest, dict) or manifest.get("crc32") != digest(manifest):
        raise ValueError(f"{file} is not what was saved: its CRC32 differs")
    if manifest["version"] not in range(1, VERSION + 1):
        raise ValueError(f"{file} is of version {manifest['version']}, this code reads versions "
                         f"up to {VERSION}")
    return manifest


@torch.no_grad()
def fill(rows, source, *, rank=0, world=1, agree=identity):
    """Fills the tensors of rows in place, one at a time, cast to their dtype.

    source(name, shape, first, last) -> rows [first, last) of that tensor: a Source, which must hold just these names
    and shapes (ValueError lists the differences), or any function, an initial value say. Where ranks fill rows of their
    own, what one cannot read is an error on all.
    """
    with together(agree, "the weights"):
        if isinstance(source, Source):
            wanted = {name: tuple(shape) for name, (_, _, shape) in rows.items()}
            match(wanted, source.shapes, source.origin)
        for name, (tensor, first, shape) in rows.items():
            if tensor.numel():
                value = source(name, tuple(shape), first, first + count(tensor.shape))
                if value.shape != tensor.shape:
                    raise ValueError(f"{name}: got rows of shape {tuple(value.shape)}, "
                                     f"wanted {tuple(tensor.shape)}")
                tensor.copy_(value)


@contextmanager
def ending(out, step):
    """Adds to an error that ends a run in update `step` what of it is saved in its folder, and what is not."""
    try:
        yield
    except (RuntimeError, ValueError) as error:     # a sample of a damaged dataset among them
        last, path = max(steps(out).items(), default=(0, None))
        kept = f"nothing of the run is saved in {out}"
        if path:
            kept = f"{path} is the newest checkpoint; {step - last} steps after it are not saved"
        error.add_note(kept)
        raise


# ---- how a checkpoint comes to be -----------------------------------------------------------------------------------

@contextmanager
def together(agree, path):
    """Runs the body on every rank; what fails on one raises on all, so that none is left waiting for it."""
    failure = None
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        failure = error
    if not agree(failure is None):
        raise failure or OSError(f"{path}: failed on another rank, whose message says why")


def alike(number, agree):
    """Whether the number is the same on every rank."""
    least, greatest = agree(number), -agree(-number)    # each rank must call both
    return least == greatest


def spans_of(rows):
    """{"spans": [[first, last], …], "which": [the number of its span, of each tensor]}: most share a few."""
    spans, which = {}, []
    for x, first, _ in rows.values():
        which.append(spans.setdefault((first, first + count(x.shape)), len(spans)))
    return {"spans": list(spans), "which": which}


def divide(notes):
    """Who writes which rows: ranks that hold the same ones take equal parts, and the first of them a 0-d tensor.

    notes: each rank's spans_of, with "about": {name: [dtype, shape]} of rank 0 and of those that differ from it
    -> {"tensors": {name: {dtype, shape, rows: i}}, "rows": [[[rank, first, last], …], …]}.
    ValueError where ranks disagree on a tensor, or hold only some of its rows.
    """
    about = notes[0]["about"]
    for rank, note in enumerate(notes):
        other = note.get("about", about)
        for name in about | other:
            here, there = about.get(name), other.get(name)
            if here != there:
                raise ValueError(f"{name} is {there} on rank {rank}, {here} on rank 0")
        if list(other) != list(about):
            which = dict(zip(other, note["which"]))
            note["which"] = [which[name] for name in about]
    tensors, rows, numbers = {}, [], {}
    for name, *which in zip(about, *(note["which"] for note in notes)):
        dtype, shape = about[name]
        cut = (count(shape), *which)
        if cut not in numbers:
            numbers[cut] = len(rows)
            spans = [tuple(note["spans"][i]) for note, i in zip(notes, which)]
            rows.append(shares(name, count(shape), spans))
        tensors[name] = {"dtype": dtype, "shape": shape, "rows": numbers[cut]}
    return {"tensors": tensors, "rows": rows}


def shares(name, n, spans):
    """[[rank, first, last], …] that cover rows [0, n) once; spans: (first, last) of what each rank holds."""
    holders, parts, end = {}, [], 0
    for rank, span in enumerate(spans):
        holders.setdefault(span, []).append(rank)
    for (first, last), ranks in sorted(holders.items()):
        if first != end:
            break
        ends = [first + math.ceil((last - first) * i / len(ranks)) for i in range(len(ranks) + 1)]
        parts += [[rank, a, b] for rank, a, b in zip(ranks, ends, ends[1:]) if a < b]
        end = last
    if end != n:
        raise ValueError(f"the ranks do not hold every row of {name}, {n} in all, once: {holders}")
    return parts


def described(manifest):
    """{name: {dtype, shape, rows: [[rank, first, last], …]}} of a manifest of any version."""
    if manifest["version"] == 1:
        return manifest["tensors"]
    rows = manifest["rows"]
    return {name: t | {"rows": rows[t["rows"]]} for name, t in manifest["tensors"].items()}


def role_in(name):
    """The role of a tensor, "net" of "net.head.weight"; a bare name is one."""
    return name.partition(".")[0]


def file_of(version, rank, role):
    """The name of the file that holds what a rank wrote of a role."""
    return f"rank_{rank:05d}.pt" if version == 1 else f"rank_{rank:05d}.{role}.pt"


def files_of(manifest, roles=None):
    """Names of the files that hold these roles, None = all."""
    if roles is None or manifest["version"] == 1:
        return list(manifest["files"])
    return [file for file in manifest["files"] if file.split(".")[1] in roles]


def write_rank(folder, rows, layout, rank):
    """Writes a rank's share, a file for each role of which it has rows, and a note of their sizes and CRC32."""
    mine, written = {}, {}
    for name, t in described(layout).items():
        for writer, first, last in t["rows"]:
            if writer == rank:
                mine.setdefault(role_in(name), {})[name] = first, last
    for role, cuts in mine.items():
        file = file_of(VERSION, rank, role)
        tensors = {name: copied(rows[name], *cut) for name, cut in cuts.items()}
        written[file] = write_rows(folder / file, tensors)
    write_json(folder / f"written_{rank:05d}.json", written)


def copied(part, first, last):
    """Rows [first, last) as a contiguous CPU tensor; a copy only where it must be one."""
    x, start, shape = part
    x = x.detach()
    if shape:
        x = x[first - start:last - start]
    x = x.cpu().contiguous()
    if x.untyped_storage().nbytes() > x.nbytes:
        x = x.clone()   # torch.save would write all of the storage under a view
    return x


def write_rows(file, tensors):
    """Writes tensors to a file that is on disk on return -> {size, crc32} of it."""
    with open(file, "wb") as f, no_other_crc32():
        counted = Counted(f)
        try:
            torch.save(tensors, counted)
        except RuntimeError as error:   # torch says that bytes are missing; why is in the context
            raise error.__context__ or error
        f.flush()
        os.fsync(f.fileno())
    return {"size": counted.size, "crc32": counted.crc32}


@contextmanager
def no_other_crc32():
    """Keeps torch.save from computing CRC32s of its own, for `zipfile` and `unzip`: torch.load reads none of them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class Counted:
    """A file for torch.save that keeps the number and the CRC32 of the bytes that went through it."""

    def __init__(self, file):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data):
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def seal(part, path, head, layout, world, report):
    """Writes the manifest of what all ranks have written, then gives the folder its name."""
    files = {}
    for rank in range(world):
        files |= read_json(part / f"written_{rank:05d}.json")
    manifest = {"version": layout["version"], **head, "files": files, **layout}
    with reported(report, f"notes in {part} are not needed any more, but not removed"):
        for note in part.glob("*.json"):
            note.unlink()
    write_json(part / "manifest.json", manifest | {"crc32": digest(manifest)})
    sync_folder(part)
    before = None
    if path.exists():   # damaged, or saved before the run was resumed from an earlier step
        before = aside(path)
    part.rename(path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)
    if before:
        remove(before, report)


def prune(out, step, keep, report):
    """Removes the checkpoints before that of `step`, but for the newest keep - 1."""
    with reported(report, f"earlier checkpoints of {out} are not removed"):
        earlier = [path for n, path in steps(out).items() if n < step]
        for old in earlier[:max(0, len(earlier) - (keep - 1))]:
            with reported(report, f"{old} is not removed"):
                remove(aside(old), report)


def steps(out):
    """{step: path} of a run's checkpoints, valid or not, oldest first."""
    paths = Path(out).glob("ckpt/step_*")
    found = {int(p.name[5:]): p for p in paths if re.fullmatch(r"step_\d{7,}", p.name)}
    return dict(sorted(found.items()))


def step_folder(out, step):
    return Path(out) / "ckpt" / f"step_{step:07d}"


def aside(path):
    """Renames a checkpoint before it is removed: a kill leaves no half checkpoint under a valid name."""
    return path.rename(path.with_name(f"{path.name}.{time.time_ns()}{TEMPORARY}"))


def remove(folder, report):
    """Removes a folder; what cannot be removed (NFS keeps files that are in use) is left to the next save."""
    with reported(report, f"{folder} is not removed, the next save tries again"):
        shutil.rmtree(folder)


@contextmanager
def reported(report, what):
    """Runs the body; an OSError is reported and the run goes on."""
    try:
        yield
    except OSError as error:
        report(f"{what}: {error}")


def count(shape):
    return shape[0] if len(shape) else 1


def kind(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def nearest(path):
    """The path itself or the first folder above it that exists."""
    return next(p for p in (Path(path), *Path(path).absolute().parents) if p.is_dir())


def contents(path):
    names = sorted(p.name for p in nearest(path).iterdir())
    more = f", ... {len(names)} in all" if len(names) > 20 else ""
    return f"{nearest(path)} holds {', '.join(names[:20]) or 'nothing'}{more}"


@lru_cache(maxsize=None)    # `latest`, then `load`: a file that was not touched is not read twice
def crc32(file, mtime_ns):
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def digest(manifest):
    return crc_of({key: value for key, value in manifest.items() if key != "crc32"})


def crc_of(value):
    return zlib.crc32(json.dumps(value).encode())


def read_json(file):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, it is not JSON: {error}") from error


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as f:
        json.dump(value, f)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# ---- whose a folder is ----------------------------------------------------------------------------------------------

# Where flock is not supported, its owner touches the lock every BEAT seconds and is gone after STALE without.
BEAT, STALE = 10, 60
PATIENCE = 60   # seconds that a rank waits for rank 0's file: NFS remembers that there was none
LOCKS = {}      # {folder: the open file of its lock}: the kernel frees it with the process


def claim(out, *, report=print, rank=0, world=1, agree=identity):
    """Keeps the folder out for this run as long as rank 0 lives. Called by all ranks before anything is written there.

    ValueError where another process works in it, or where it is not one and the same folder on every rank's machine.
    """
    out, token = Path(out), sys.maxsize
    with together(agree, out):
        if rank == 0:
            token = hold(out, report)
    token = agree(token)
    if world > 1:
        with together(agree, out):
            until = time.monotonic() + PATIENCE
            while owner(out).get("token") != token:
                if time.monotonic() > until:
                    raise ValueError(f"--out={out} is another folder for rank {rank} on "
                                     f"{socket.gethostname()} than for rank 0: "
                                     "name one that all nodes share")
                time.sleep(0.1)


def hold(out, report):
    """Locks the folder and writes who did to out/.owner -> the token in that file, a random number."""
    out.mkdir(parents=True, exist_ok=True)
    lock, mine = out / ".lock", LOCKS.get(out.resolve())
    if mine is None or not is_open(mine, lock):
        LOCKS[out.resolve()] = locked(lock, report)
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": start,
          "token": secrets.randbits(62)}
    write_json(out / ".owner.tmp", me)
    os.replace(out / ".owner.tmp", out / ".owner")
    return me["token"]


def is_open(file, path):
    """Whether the open file is the one at path, which may have been removed and made anew."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def owner(out):
    """Who holds a folder: {host, pid, start, token}, {} where that cannot be read."""
    try:
        return read_json(out / ".owner")
    except (OSError, ValueError):
        return {}


def locked(lock, report):
    """The open file of a lock that is now ours; ValueError where it is another process's.

    By flock, which ends with the process; where it is not supported (Windows, some Lustre and NFS), by the file's age.
    """
    try:
        file, left = open(lock, "x"), False
    except FileExistsError:
        file, left = open(lock, "a"), True
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no flock on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise in_use(lock.parent) from None
    except OSError:
        if left:
            outlive(lock, report)
        os.utime(lock)
        threading.Thread(target=beat, args=(lock,), daemon=True).start()
    return file


def in_use(out):
    who = {"host": "?", "pid": "?", "start": "?"} | owner(out)
    return ValueError(f"--out={out} is in use by process {who['pid']} on {who['host']} since "
                      f"{who['start']}: wait for it, stop it, or name another --out=")


def outlive(lock, report):
    """Returns when nobody has touched the file for STALE seconds; ValueError as soon as somebody does."""
    clock = lock.with_name(f".clock_{os.getpid()}")     # the disk's clock, not this machine's
    clock.touch()
    touched = lock.stat().st_mtime_ns
    age = (clock.stat().st_mtime_ns - touched) / 1e9
    clock.unlink()
    if age < STALE:
        report(f"{lock} was touched {age:.0f} s ago: waiting until {STALE}, if its owner lives")
    until = time.monotonic() + STALE - age
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        if lock.stat().st_mtime_ns != touched:
            raise in_use(lock.parent)


def beat(lock):
    while lock.exists():
        try:
            os.utime(lock)
        except OSError:
            pass    # the next one may succeed
        time.sleep(BEAT)


# ---- sources --------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """Tensors that can be read by rows, whatever they come from."""
    origin: str             # for messages
    shapes: dict            # name -> global shape
    rows: Callable          # (name, first, last) -> rows [first, last), maybe of a mapped file
    manifest: dict | None   # of the checkpoint it comes from

    def __call__(self, name, shape, first, last):
        return self.rows(name, first, last)

    def tensor(self, name):
        """One tensor, whole."""
        return self.rows(name, 0, sys.maxsize)

    @property
    def sampling(self):
        """How to sample from it, as its run has saved it; None of weights that are not from a run."""
        return self.manifest["meta"].get("sampling") if self.manifest else None


def stored(path, roles=None, *, rank=0, world=1, agree=identity):
    """The Source of these roles of a checkpoint, None = all, under their full names.

    path: a checkpoint, or a run's folder (its newest valid one). The files of the roles are verified, other files are
    not read, and a file stays open for no longer than the Source lives.
    """
    ranks = {"rank": rank, "world": world, "agree": agree}
    path = latest(path, roles=roles, report=print if rank == 0 else identity, **ranks) or Path(path)
    manifest = verify(path, roles, **ranks)
    tensors, version = described(manifest), manifest["version"]
    lost = sorted(set(roles or ()) - set(map(role_in, tensors)))
    if lost:
        raise no_role(path, lost[0], manifest)
    files, said = set(files_of(manifest, roles)), {}
    for name, t in tensors.items():
        for writer, first, last in t["rows"]:
            file = file_of(version, writer, role_in(name))
            if file in files:
                shape = (last - first, *t["shape"][1:]) if t["shape"] else ()
                said.setdefault(file, {})[name] = t["dtype"], shape

    @cache
    def opened(name):
        file = path / name
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{file} is not a dict of tensors")
        holds = {key: type(x).__name__ for key, x in found.items()}
        holds |= {key: (kind(x), tuple(x.shape)) for key, x in found.items() if torch.is_tensor(x)}
        match(said[name], holds, file)
        return found

    def rows(name, first, last):
        pieces = []
        for writer, a, b in tensors[name]["rows"]:
            if a < last and first < b:
                file = file_of(version, writer, role_in(name))
                x = opened(file)[name]
                x = x[max(first, a) - a:min(last, b) - a] if x.ndim else x
                pieces.append(finite(x, path / file, name))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    shapes = {name: tuple(t["shape"]) for name, t in tensors.items()
              if roles is None or role_in(name) in roles}
    return Source(str(path), shapes, rows, manifest)


def in_memory(tensors, origin):
    """The Source of tensors {name: tensor} that are here."""
    def rows(name, first, last):
        return tensors[name][first:last] if tensors[name].ndim else tensors[name]

    return Source(origin, {name: tuple(x.shape) for name, x in tensors.items()}, rows, None)


def files(path):
    """The Source of a .safetensors file, or of a folder of them with its index if it has one, under their own keys.

    FileNotFoundError or ValueError says why there is none, and what to do.
    """
    path, listed = Path(path), None
    # prefer the index without a variant suffix
    index = sorted(path.glob("*.safetensors.index.json"), key=lambda p: len(p.name))
    if path.name.endswith(".index.json"):
        index = [path]
    if index:
        listed = weight_map(index[0])
        parts = sorted(set(listed.values()))
        lost = [part.name for part in parts if not part.is_file()]
        if lost:
            raise FileNotFoundError(f"no weights at {path}: {index[0].name} names {some_of(lost)}, "
                                    f"which is missing: download it too; {contents(path)}")
    else:
        parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        check_parts(path, parts)
    where = {}
    for part in parts:
        f = opened_file(part)
        twice = [key for key in f.keys() if key in where]
        if twice:
            raise ValueError(f"{path} holds {twice[0]} twice, in {where[twice[0]][1].name} and in "
                             f"{part.name}: several models, or Wan 2.2's two experts, of which a "
                             "run takes one. Name one file")
        where.update(dict.fromkeys(f.keys(), (f, part)))
    if listed is not None:
        match(dict.fromkeys(listed), dict.fromkeys(where), index[0])
    shapes = {key: tuple(f.get_slice(key).get_shape()) for key, (f, _) in where.items()}

    def rows(key, first, last):
        f, part = where[key]
        x = f.get_slice(key)[first:last] if shapes[key] else f.get_tensor(key)
        return finite(x, part, key)

    return Source(str(path), shapes, rows, None)


def weight_map(index):
    """{key: file} of an index of safetensors; a file is looked for under its path there, else beside the index."""
    told = read_json(index)
    named = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} has no weight_map {{tensor: file}}: download it again; without "
                         "it, all of the .safetensors beside it are read")
    where = {}
    for key, name in named.items():
        file = index.parent / name.replace("\\", "/")
        where[key] = file if file.is_file() else index.parent / file.name
    return where


# what is often named where weights are wanted, by its ending, and what to do
QUANTIZED = "take the .safetensors in bf16, fp16 or fp8"
CONVERT = ('python -c "import sys, torch, safetensors.torch as s; '
           's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" OLD NEW.safetensors')
PICKLE = f"a pickle, which can run any code and is not opened. Convert one that you trust: {CONVERT}"
UNREAD = {".gguf": f"quantized for inference (GGUF) and is not read: {QUANTIZED}",
          **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), PICKLE)}


def check_parts(path, parts):
    """Raises where a path without an index is not one or several whole files of safetensors."""
    if not parts or not all(part.suffix == ".safetensors" and part.is_file() for part in parts):
        beside = [path]
        if path.is_dir():
            beside = sorted(path.iterdir())
        for file in beside:
            if file.is_file() and file.suffix.lower() in UNREAD:
                raise FileNotFoundError(f"no weights at {path}: {file.name} is "
                                        f"{UNREAD[file.suffix.lower()]}")
        raise FileNotFoundError(f"no weights at {path}: a .safetensors file or a folder of them is "
                                f"wanted; {contents(path)}")
    for part in parts:
        cut = re.fullmatch(r"(.*)-\d+-of-(\d+)", part.stem)
        if cut and sum(other.stem.startswith(f"{cut[1]}-") for other in parts) < int(cut[2]):
            raise FileNotFoundError(f"{part} is one of {int(cut[2])} files of a model, and not all "
                                    "of them are named: name their folder, and download all; "
                                    f"{contents(part.parent)}")


def opened_file(part):
    """An open file of safetensors; ValueError says what it is instead."""
    try:
        return safe_open(part, framework="pt")
    except (SafetensorError, OSError) as error:
        with open(part, "rb") as f:
            head = f.read(64)
        what = f"damaged: download it again ({error})"
        if head.startswith(b"version https://git-lfs"):
            what = "a pointer of Git LFS, not the weights themselves: git lfs pull"
        elif head.lstrip().startswith(b"<"):
            what = "a web page, not weights: the download was refused, perhaps for want of a login"
        elif head.startswith((b"PK\3\4", b"\x80\2\x8a")):
            what = PICKLE
        elif head.startswith(b"GGUF"):
            what = UNREAD[".gguf"]
        raise ValueError(f"{part} is {what}") from error


def finite(x, file, name):
    """The tensor itself; ValueError where it holds NaN or infinity, which would spread to all that is computed."""
    if x.is_floating_point() and not is_finite(x):
        raise ValueError(f"{file}: {name} holds NaN or infinity, so the run or the conversion that "
                         "wrote it had failed: take an earlier checkpoint, or other weights")
    return x


def is_finite(x):
    """Whether all of a tensor's values are finite; in a tenth of the time that isfinite takes on a CPU."""
    x = x.float() if x.dtype.itemsize == 1 else x
    return x.numel() == 0 or torch.stack(x.aminmax()).isfinite().all().item()


def renamed(source, names):
    """The tensors of a source under the names that the function `names` makes of theirs."""
    old = {names(name): name for name in source.shapes}
    if len(old) < len(source.shapes):
        twice = sorted(set(source.shapes) - set(old.values()))
        raise ValueError(f"{source.origin} holds {', '.join(twice)} under another name too")
    return source._replace(shapes={new: source.shapes[name] for new, name in old.items()},
                           rows=lambda name, first, last: source.rows(old[name], first, last))


def match(want, have, origin, models_of=None):
    """ValueError that lists what is missing, too many, or otherwise than wanted, {name: shape}.

    models_of: function from shapes to the names of the models that have them.
    """
    wrong = {"missing": [name for name in want if name not in have],
             "not wanted": [name for name in have if name not in want],
             "other than wanted": [f"{name} {have[name]} (wanted {want[name]})" for name in want
                                   if name in have and have[name] != want[name]]}
    parts = []
    for what, names in wrong.items():
        if names:
            more = " …" if len(names) > 5 else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:5])}{more}")
    if not parts:
        return
    if models_of:
        fitting = " or ".join(f"--model={name}" for name in models_of(have))
        parts.append(f"{fitting or 'no --model'} would fit")
    raise ValueError(f"{origin} does not fit: {'; '.join(parts)}")


# ---- weight formats -------------------------------------------------------------------------------------------------

# (Wan's name of a module, which is ours; diffusers'), in a block and outside of blocks. diffusers numbers a block's
# norms in the order of their use and Wan calls the only one with parameters norm3: norm2 and norm3 change places.
IN_BLOCK = [("modulation", "scale_shift_table"), ("norm2", "norm3"), ("norm3", "norm2"),
            ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
            *((f"{ours}.{a}", f"{theirs}.{b}")
              for ours, theirs in [("self_attn", "attn1"), ("cross_attn", "attn2")]
              for a, b in [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
                           ("norm_q", "norm_q"), ("norm_k", "norm_k"), ("k_img", "add_k_proj"),
                           ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")])]
OUTSIDE = [("head.modulation", "scale_shift_table"), ("head.head", "proj_out"),
           ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
           ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
           ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
           ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
           ("time_projection.1", "condition_embedder.time_proj"),
           *((f"img_emb.proj.{i}", f"condition_embedder.image_embedder.{theirs}") for i, theirs in
             [(0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2")])]


def to_diffusers(name):
    """diffusers' name of a parameter of ours; from_diffusers is its inverse."""
    return rename(name, ours=0, theirs=1)


def from_diffusers(name):
    return rename(name, ours=1, theirs=0)


def rename(name, ours, theirs):
    block, rest = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
    for pair in IN_BLOCK if block else OUTSIDE:
        if f"{rest}.".startswith(f"{pair[ours]}."):
            return block + pair[theirs] + rest[len(pair[ours]):]
    return name


def weights(path, role="ema", expert=None, **ranks):
    """The Source of one model's weights under our names; detects the format.

    path: a .safetensors file; a folder of them, sharded or not; the diffusers pipeline's folder around it, or its id on
    the Hugging Face hub; in Wan's, diffusers' or ComfyUI's names, with what trainers put before and between them; in
    fp8 too, with scales or without. Or a checkpoint of ours, or a run's folder (its newest valid one), of which role is
    read, an adapter folded into the weights under it.
    expert high|low: that of Wan 2.2's two, in a folder that holds both; a run of the other one is refused.
    FileNotFoundError or ValueError names what is there.
    """
    if is_ours(path):
        source = model_of(stored(path, {role}, **ranks), role, **ranks)
        trained = source.sampling.get("expert") if source.sampling else None
        if expert and trained not in (None, expert):
            raise ValueError(f"{source.origin} is the expert for {trained} noise, wanted is that for {expert}")
        return source
    with together(ranks.get("agree", identity), path):
        return imported(path, expert)


def is_ours(path):
    """Whether a path is a run's folder or a checkpoint, not other weights."""
    return (Path(path) / "ckpt").is_dir() or (Path(path) / "manifest.json").is_file()


def imported(path, expert=None):
    """The Source of a Wan transformer's safetensors under our names."""
    folder = one_expert(fetched(path, expert), expert)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    source = dequantized(unwrapped(files(folder)))
    # diffusers' first conversions of image-to-video models hold norms that no layer has
    kept = {name: shape for name, shape in source.shapes.items() if ".norm_added_q." not in name}
    source = source._replace(shapes=kept)
    if any(re.fullmatch(r"blocks\.\d+\.attn1\.to_q\.weight", name) for name in source.shapes):
        return renamed(source, from_diffusers)
    if any(re.fullmatch(r"blocks\.\d+\.self_attn\.q\.weight", name) for name in source.shapes):
        return source
    some = some_of(sorted(source.shapes))
    if any("lora" in name for name in source.shapes):
        raise ValueError(f"{source.origin} is a LoRA file, not a model: it holds {some}. train.py "
                         "takes it as --lora_init=, sample.py as --lora=, beside the weights that "
                         "it changes")
    raise ValueError(f"{source.origin} is no Wan transformer under Wan's, diffusers' or ComfyUI's "
                     f"names: it holds {some}")


def fetched(path, expert=None):
    """A path that is there; of an id on the Hugging Face hub the folder to which its transformer is downloaded."""
    folder = Path(path)
    if folder.exists():
        return folder
    missing = f"no weights at {path}; {contents(folder)}"
    parts = folder.parts
    if len(parts) != 2 or folder.is_absolute() or Path(parts[0]).exists():
        raise FileNotFoundError(missing)
    missing += ". If it is a name on the Hugging Face hub"
    try:
        from huggingface_hub import snapshot_download
        small = ["model_index.json", "*config.json"]    # their * takes a / as well
        folder = Path(snapshot_download(str(path), allow_patterns=small))
        part = one_expert(folder, expert)
        wanted = dict(allow_patterns="*.safetensors*", ignore_patterns="*/*")
        if part != folder:
            wanted = dict(allow_patterns=f"{part.name}/*")
        elif (folder / "transformer").is_dir():
            wanted = dict(allow_patterns="transformer/*")
        return Path(snapshot_download(str(path), **wanted))
    except ImportError as error:
        raise FileNotFoundError(f"{missing}, pip install -r requirements-wan.txt, or download it "
                                f"first and name its folder ({error})") from error
    except OSError as error:
        why = " ".join(str(error).split())
        raise FileNotFoundError(f"{missing}, download it first and name its folder: it could not "
                                f"be fetched now ({why})") from error


EXPERTS = {"high": ("transformer", "high_noise_model"), "low": ("transformer_2", "low_noise_model")}


def one_expert(folder, expert=None):
    """A folder, of Wan 2.2's two experts in it that one's; ValueError where none is named, or the named is missing."""
    listed = {}
    if (folder / "model_index.json").is_file():
        listed = read_json(folder / "model_index.json")
    for high, low in zip(EXPERTS["high"], EXPERTS["low"]):
        # a part that a pipeline lacks is [null, null] in its index
        there = [(folder / name).is_dir() or any(listed.get(name) or ()) for name in (high, low)]
        if not any(there):
            continue
        if expert:
            name = high if expert == "high" else low
            if not there[expert == "low"]:
                raise ValueError(f"{folder} holds no {name}, the expert for {expert} noise")
            return folder / name
        if all(there):
            raise ValueError(f"{folder} holds two experts, {high} for high noise and {low} for low. One net at all "
                             f"noise levels would be neither: name one, {folder / high} or {folder / low}")
    return folder


def other_of(expert):
    return "low" if expert == "high" else "high"


def beside(path, expert):
    """The path of the other expert in the pipeline that holds this one, or this one's folder; None of a run of ours,
    or where there is none."""
    folder = Path(path)
    if is_ours(folder):
        return None
    if not folder.exists():
        return str(path)        # on the hub, where both are
    for mine, its in zip(EXPERTS[expert], EXPERTS[other_of(expert)]):
        for whole in (folder, folder.parent):
            if (whole / mine).is_dir() and (whole / its).is_dir() and folder in (whole, whole / mine):
                return str(whole / its)
    return None


WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"    # of PyTorch's
WRAPPED = re.compile(rf"(?<![^.])(?:{WRAPPERS})\.")


def unwrapped(source):
    """The tensors of a source without what programs put before their names, and without wrappers anywhere in them."""
    names = {key: WRAPPED.sub("", key) for key in source.shapes}
    first = re.compile(r"(.*\.)?patch_embedding\.weight")  # what stands before it stands before all
    fronts = {found[1] or "" for found in map(first.fullmatch, names.values()) if found}
    if len(fronts) > 1:
        raise ValueError(f"{source.origin} holds several models, under {', '.join(sorted(fronts))}"
                         ": write the one that is wanted to a file of its own")
    front = "".join(fronts)
    return renamed(source, lambda key: names[key].removeprefix(front))


# what quantizers write beside weights: bitsandbytes; GPTQ, AWQ and nunchaku; quanto; nvfp4, blocks
QUANTIZERS = re.compile(r".*\.(absmax|quant_map|nested_\w+|quant_state\..*|SCB|weight_format"
                        r"|qweight|qzeros|g_idx|wscales|wzeros|smooth\w*"
                        r"|_data|_scale|weight_scale_2|weight_scale_inv)")
SCALE = re.compile(r"(.*)\.(?:scale_weight|weight_scale)")     # ComfyUI's names, older and newer
BESIDE_SCALES = re.compile(r"scaled_fp8|.*\.(?:scale_input|input_scale|comfy_quant)")


def dequantized(source):
    """The tensors of a source in fp8 as fp32, times the scales that ComfyUI and musubi-tuner keep beside them.

    ValueError for what is quantized in other ways.
    """
    found = {name: SCALE.fullmatch(name) for name in source.shapes}
    scales = {f"{stem[1]}.weight": name for name, stem in found.items() if stem}
    scales = {name: scale for name, scale in scales.items() if name in source.shapes}
    beside = {*scales.values(), *filter(BESIDE_SCALES.fullmatch, source.shapes)}
    shapes = {name: shape for name, shape in source.shapes.items() if name not in beside}
    dtypes = {name: source.rows(name, 0, 1).dtype for name in source.shapes}
    unread = f"{source.origin} is quantized in a way that is not read"

    strange = [f"{name} in {dtypes[name]}" for name in shapes
               if QUANTIZERS.fullmatch(name) or not dtypes[name].is_floating_point]
    if strange:
        raise ValueError(f"{unread} ({some_of(strange)}): {QUANTIZED}")
    bare = [name for name in shapes if dtypes[name].itemsize == 1 and name not in scales]
    if beside and bare:
        raise ValueError(f"{source.origin} is in scaled fp8, and the scale of {some_of(bare)} is "
                         "missing: get the file again")
    for name, scale in scales.items():
        shape = source.shapes[scale]
        if dtypes[scale].itemsize == 1 or not scales_rows(shape, shapes[name]):
            raise ValueError(f"{unread} ({scale} is of shape {shape}, {name} of {shapes[name]}): "
                             f"{QUANTIZED}")

    def rows(name, first, last):
        x = source.rows(name, first, last)
        if name in scales:
            return scaled(x.float(), source.tensor(scales[name]).float(), first, last)
        return x.float() if x.dtype.itemsize == 1 else x

    return source._replace(shapes=shapes, rows=rows)


def scales_rows(scale, shape):
    """Whether a scale of one shape fits a weight of another: a number, or for each row one or one for equal parts."""
    if math.prod(scale) == 1:
        return True
    parts = math.prod(scale[1:])
    return scale[0] == shape[0] and math.prod(shape[1:]) % parts == 0 and math.prod(scale[2:]) == 1


def scaled(x, scale, first, last):
    """Rows [first, last) of a weight times its scale, see scales_rows."""
    if scale.numel() == 1:
        return x * scale.reshape(())
    scale = scale.flatten(1) if scale.ndim > 1 else scale[:, None]
    return (x.unflatten(1, (scale.shape[1], -1)) * scale[first:last, :, None]).flatten(1)


def role_of(source, role):
    """What a checkpoint holds as "role.…", without that prefix."""
    shapes = {name[len(role) + 1:]: shape for name, shape in source.shapes.items()
              if name.startswith(f"{role}.")}
    if not shapes:
        raise no_role(source.origin, role, source.manifest)
    def rows(name, first, last):
        return source.rows(f"{role}.{name}", first, last)

    return source._replace(origin=f"{source.origin} ({role})", shapes=shapes, rows=rows)


def no_role(origin, role, manifest):
    there = sorted(set(map(role_in, manifest["tensors"])))
    return ValueError(f"{origin} holds no {role!r}, but {', '.join(there)}")


# ---- LoRA: an adapter of module M is M.lora.NAME.A (r, inputs) and .B (outputs, r); meta names what it adapts -----

class Lora(NamedTuple):
    """An adapter by itself: it adds scales[M] · B A to M.weight, where source holds A and B as M.A and M.B."""
    source: Source
    scales: dict

    @property
    def ranks(self):
        """The ranks that its modules have."""
        return sorted({self.source.shapes[f"{module}.A"][0] for module in self.scales})


def base_of(path, source, expert=None):
    """What a run that trains adapters keeps in its meta as "base": where the weights under them are, and which."""
    if (Path(path) / "ckpt").is_dir():      # the newest may be another one by now
        path = step_folder(path, source.manifest["step"])
    if Path(path).exists():     # else a name on the hub, whose files are links to others without .safetensors
        path = os.path.abspath(path)
    base = {"path": str(path), "crc32": fingerprint(source)}
    return base | {"expert": expert} if expert else base


def fingerprint(source):
    """Tells one set of weights from another: a checkpoint's CRC32, or that of the first row of every tensor."""
    if source.manifest:
        return source.manifest["crc32"]
    crc = 0
    for name in sorted(source.shapes):
        crc = zlib.crc32(source.rows(name, 0, 1).contiguous().view(torch.uint8).numpy(), crc)
    return crc


def model_of(source, role, **ranks):
    """The weights that a checkpoint holds as "role.…", an adapter folded into the weights under it."""
    source = role_of(source, role)
    return merged(source, **ranks) if adapts(source) else source


def adapts(source):
    """Whether these are the tensors of an adapter alone."""
    return any(".lora." in name for name in source.shapes)


def merged(adapter, base=None, **ranks):
    """An adapter folded into the weights under it as they are read; base: their path, None = where the run had them."""
    meta = adapter.manifest["meta"]
    path = base
    if path is None:
        path = meta["base"]["path"]
    try:
        below = weights(path, expert=meta["base"].get("expert"), **ranks)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{adapter.origin} is an adapter of weights that are not at "
                                f"{path}: put or link them there ({error})") from error
    if fingerprint(below) != meta["base"]["crc32"]:
        raise ValueError(f"{below.origin} is not what {adapter.origin} was trained on")
    whole = folded(below, own_lora(adapter))
    return whole._replace(origin=adapter.origin, manifest=adapter.manifest)


def folded(below, lora, strength=1.0):
    """Weights with an adapter folded in as they are read, W + strength · α / r · B A."""
    check_lora(lora, below.shapes)
    scales = {f"{module}.weight": strength * scale for module, scale in lora.scales.items()}

    def rows(name, first, last):
        weight = below.rows(name, first, last)
        if name not in scales:
            return weight
        module = name.removesuffix(".weight")
        A, B = lora.source.tensor(f"{module}.A"), lora.source.rows(f"{module}.B", first, last)
        return weight.float() + scales[name] * (B.float() @ A.float())

    return below._replace(origin=f"{below.origin} with {lora.source.origin}", rows=rows)


def check_lora(lora, shapes):
    """ValueError unless an adapter changes just weights that are there, {name: shape}."""
    wrong = []
    for module in lora.scales:
        (_, inputs) = lora.source.shapes[f"{module}.A"]
        (outputs, _) = lora.source.shapes[f"{module}.B"]
        there = shapes.get(f"{module}.weight")
        if there != (outputs, inputs):
            wrong.append(f"{module} {(outputs, inputs)} where {there} is")
    if wrong:
        raise ValueError(f"{lora.source.origin} is an adapter of another model: {some_of(wrong)}")


def some_of(names):
    """The first of many names, and how many there are."""
    more = f", ... {len(names)} in all" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def lora(path, **ranks):
    """The Lora in a file of diffusers', PEFT's, ComfyUI's or kohya's names, a folder that holds one, or a run of ours.

    FileNotFoundError or ValueError says what is wrong, and names what is changed that is no Linear of our blocks.
    """
    if is_ours(path):
        source = role_of(stored(path, {"ema"}, **ranks), "ema")
        if not adapts(source):
            raise ValueError(f"{source.origin} holds whole weights, not an adapter")
        return own_lora(source)
    with together(ranks.get("agree", identity), path):
        return foreign_lora(path)


def own_lora(source):
    """The Lora that a run of ours holds."""
    source = renamed(source, lambda name: re.sub(r"\.lora\.\w+\.", ".", name))
    alpha = source.manifest["meta"]["config"]["lora_alpha"]
    ranks = {name[:-2]: shape[0] for name, shape in source.shapes.items() if name.endswith(".A")}
    return Lora(source, {module: alpha / rank for module, rank in ranks.items()})


# {a block's Linear as diffusers or Wan call it, with dots or kohya's underscores: ours}
LINEARS = {written: ours for ours, theirs in IN_BLOCK if re.search(r"\.([qkvo02]|[kv]_img)$", ours)
           for name in (ours, theirs) for written in (name, name.replace(".", "_"))}
FRONTS = (r"(?:base_model|model|diffusion_model|transformer|unet|pipe|dit|net)\."
          r"|(?:lora_unet|lycoris)_")
IN_A_BLOCK = re.compile(rf"(?:{FRONTS})*blocks[._](\d+)[._](.+)")
FACTOR = re.compile(r"(.+)\.(?:lora[._](A|B|down|up)(?:\.[\w-]+?)??(?:\.weight)?|(alpha))")


def foreign_lora(path):
    """The Lora in files of others."""
    source, settings = files(path), lora_settings(Path(path))
    names, alphas, strange = {}, {}, []
    for key in source.shapes:
        part = FACTOR.fullmatch(WRAPPED.sub("", key))
        block = part and IN_A_BLOCK.fullmatch(part[1])
        if not block or block[2] not in LINEARS:
            strange.append(key)
            continue
        module = f"blocks.{block[1]}.{LINEARS[block[2]]}"
        if part[3]:
            if math.prod(source.shapes[key]) != 1:
                raise ValueError(f"{source.origin}: {key} is of shape {source.shapes[key]}, "
                                 "an alpha is a number")
            alphas[module] = source.tensor(key).item()
        else:
            names[key] = f"{module}.{dict(down='A', up='B').get(part[2], part[2])}"
    if not names:
        raise ValueError(f"{source.origin} is no LoRA file: it holds "
                         f"{some_of(strange) or 'nothing'}")
    if strange:
        raise ValueError(f"{source.origin} changes what is no Linear of a block's attention or "
                         f"feed-forward here: {some_of(strange)}")

    source = source._replace(shapes={key: source.shapes[key] for key in names})
    source = renamed(source, names.get)
    modules = sorted({name[:-2] for name in source.shapes})
    both = [f"{module}.{factor}" for module in modules for factor in "AB"]
    match(dict.fromkeys(both), dict.fromkeys(source.shapes), source.origin)
    scales = {}
    for module in modules:
        A, B = source.shapes[f"{module}.A"], source.shapes[f"{module}.B"]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] == 0:
            raise ValueError(f"{source.origin}: {module} has A of shape {A}, B of shape {B}")
        usual = settings.get("lora_alpha", A[0])
        if settings.get("use_rslora"):
            usual *= A[0] ** 0.5
        scales[module] = alphas.get(module, usual) / A[0]
    return Lora(source, scales)


def lora_settings(path):
    """What PEFT says of an adapter, in adapter_config.json or, as diffusers writes it, in the file's own header."""
    parts = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    config = parts[0].with_name("adapter_config.json")
    alone = len(list(parts[0].parent.glob("*.safetensors"))) == 1      # under whatever name
    header = opened_file(parts[0]).metadata() or {}
    where = f"lora_adapter_metadata of {parts[0]}"
    text = header.get("lora_adapter_metadata", "{}")
    if config.is_file() and (alone or parts[0].name == "adapter_model.safetensors"):
        where, text = config, config.read_text(encoding="utf-8-sig")
    try:
        told = json.loads(text)
        told = {name.removeprefix("transformer."): value for name, value in told.items()}
        float(told.get("lora_alpha", 1))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where} is damaged, it is not the JSON of PEFT's settings: "
                         f"{error}") from error
    for name in ("alpha_pattern", "use_dora"):
        if told.get(name):
            raise ValueError(f"{path} has {name} {told[name]}, which is not read here")
    return told


def continued(lora, scale, values):
    """-> function for fill: an adapter's values, for training at another scale; `values` gives those that it lacks."""
    def value(name, shape, first, last):
        module, factor = re.split(r"\.lora\.\w+\.", name)
        if module not in lora.scales:
            return values(name, shape, first, last)
        x = lora.source.rows(f"{module}.{factor}", first, last)
        return x.float() * (lora.scales[module] / scale) if factor == "B" else x

    return value
