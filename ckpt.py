"""Checkpoints that any number of ranks writes and any other number reads, and the weight formats of the Wan family.

Imports nothing of ours. One idea serves both: a tensor has a name and a global shape and is moved by rows (its first
dimension; a 0-d tensor is one row), so that a model never has to stand whole in a process.

    rows      {name: (tensor, first, shape)}: the tensor is rows [first, first + n) of one of that global shape
    Source    where rows are read from: a checkpoint, a file of weights, either of them renamed or merged
    agree     agree(ok) -> whether ok holds on every rank: a barrier, and the only collective

    out/ckpt/step_0001000/
        manifest.json    step, meta, every file's size and CRC32, every tensor's shape, dtype and [rank, first, last] …
        rank_00000.pt    torch.save of one flat dict {name: contiguous CPU tensor}: no other object is ever unpickled

Names in a checkpoint are "role.parameter" (net, ema, …); a file of weights is one role under its family's names.
"""
import json
import math
import os
import pickle
import re
import shutil
import sys
import zlib
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

VERSION = 1
TEMPORARY = ".tmp"  # the ending of a folder that is being written or removed: never read, cleared by the next save


# ---- save and load --------------------------------------------------------------------------------------------------

def save(out, step, rows, meta, *, rank=0, world=1, agree=bool, keep=3):
    """Writes out/ckpt/step_… -> its path. Called by all ranks, each with all that it holds.

    Ranks that hold the same rows (replicas) share the work of writing them. meta: anything that JSON takes. The folder
    gets its name when all of it is on disk, and only then do earlier ones go, but for the newest keep - 1.
    A failure on one rank, a full disk say, is an OSError on all and leaves everything as it was.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1")
    path = Path(out) / "ckpt" / f"step_{step:07d}"
    part = path.with_name(path.name + TEMPORARY)
    try:
        with together(agree, path):
            if rank == 0:
                for leftover in path.parent.glob(f"step_*{TEMPORARY}"):
                    shutil.rmtree(leftover)
                part.mkdir(parents=True)
        with together(agree, path):
            write_json(part / f"held_{rank:05d}.json", {name: [first, first + count(x.shape), kind(x), list(shape)]
                                                        for name, (x, first, shape) in rows.items()})
        with together(agree, path):
            if rank == 0:
                held = [read_json(part / f"held_{r:05d}.json") for r in range(world)]
                write_json(part / "tensors.json", divide(held))
        with together(agree, path):
            tensors = read_json(part / "tensors.json")
            write_rows(part / f"rank_{rank:05d}.pt", rows, {name: cut for name, _, cut in cuts(tensors, rank)})
        with together(agree, path):
            if rank == 0:
                seal(part, path, {"version": VERSION, "step": step, "meta": meta}, tensors, world)
    except (OSError, RuntimeError, ValueError) as error:
        free = shutil.disk_usage(nearest(path)).free / 1e9
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{path} was not saved, earlier ones are as they were ({free:.3g} GB free): {error}") from error
    with together(agree, path):
        if rank == 0:
            earlier = [p for n, p in steps(out).items() if n < step]
            for old in earlier[:len(earlier) - (keep - 1)]:
                shutil.rmtree(aside(old))
    return path


def load(path, want, *, rank=0, world=1, agree=bool):
    """Copies the checkpoint at path into the tensors of want (rows) in place -> its manifest.

    Any world size loads what any other saved. All files are checked before a tensor of them is read, and their names,
    shapes and dtypes must be just those of want: ValueError lists the differences on every rank alike.
    """
    source = stored(path, rank=rank, world=world, agree=agree)
    with together(agree, path):
        saved = {name: (t["dtype"], tuple(t["shape"])) for name, t in source.manifest["tensors"].items()}
        match({name: (kind(x), tuple(shape)) for name, (x, _, shape) in want.items()}, saved, path)
        fill(want, source)
    return source.manifest


def latest(out, *, rank=0, world=1, agree=bool, report=print):
    """The newest valid checkpoint of a run's folder, or None without any.

    A damaged one is reported and the one before it taken; ValueError if all are.
    """
    there = list(steps(out).values())
    for path in reversed(there):
        try:
            verify(path, rank=rank, world=world, agree=agree)
            return path
        except (OSError, ValueError) as error:
            report(f"{path} is damaged, looking for one before it: {error}")
    if there:
        raise ValueError(f"every checkpoint of {out} is damaged: --out= starts another run")
    return None


def found(out, resume, flags, free, inputs, *, rank=0, world=1, agree=bool, report=print):
    """The checkpoint that a run in `out` goes on from, and its manifest: its own newest, else `resume`, else None, None.

    So a run begun from another's checkpoint goes on by the same command too. flags and inputs, {flag: CRC32 of what it
    names}, are what the run keeps in its meta as "config" and "inputs"; what is named may have moved. ValueError where they
    differ from what is found, the free ones apart, and for a `resume` of its own that is not the newest: what came after
    would be lost.
    """
    if resume:
        read_manifest(resume)       # wrong is wrong, needed or not
    own = latest(out, rank=rank, world=world, agree=agree, report=report)
    if own and resume and Path(resume).resolve() != own.resolve() and Path(resume).resolve().parent == own.resolve().parent:
        verify(resume, rank=rank, world=world, agree=agree)     # newer than that, it is damaged
        raise ValueError(f"--resume={resume}: {out} has gone on to {own.name}. --out= goes on from it in another folder, "
                         "or remove what is newer")
    path = own or resume
    if not path:
        return None, None
    saved = verify(path, rank=rank, world=world, agree=agree)
    then, held = saved["meta"]["config"], saved["meta"].get("inputs", {})   # the oldest have none: their paths count
    now, known = json.loads(json.dumps(flags)), inputs.keys() & held.keys()
    differ = [f"--{name}={value} (was {then.get(name)})" for name, value in now.items()
              if name not in known | free and value != then.get(name)]
    differ += [f"--{name}={now[name]} (is not what {then[name]} was)" for name in sorted(known - free)
               if inputs[name] != held[name]]
    if differ:
        raise ValueError(f"{path} is of a run with other flags: {', '.join(differ)}. "
                         "--out= starts another run, --allow NAME ... goes on with the new values")
    return path, saved


def verify(path, *, rank=0, world=1, agree=bool):
    """The manifest of a checkpoint whose files all have the size and CRC32 they were saved with.

    File i is read by rank i mod world. FileNotFoundError or ValueError otherwise, on every rank.
    """
    with together(agree, path):
        manifest = read_manifest(path)
    with together(agree, path):
        for name, saved in list(manifest["files"].items())[rank::world]:
            file = Path(path) / name
            if not file.is_file() or file.stat().st_size != saved["size"]:
                raise ValueError(f"{file} is missing or not of {saved['size']} bytes")
            if crc32(file, file.stat().st_mtime_ns) != saved["crc32"]:
                raise ValueError(f"{file} is not what was saved: its CRC32 differs")
    return manifest


def read_manifest(path):
    """manifest.json of a checkpoint, unaltered; the tensors' files are not looked at."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; {contents(path)}")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("crc32") != digest(manifest):
        raise ValueError(f"{file} is not what was saved: its CRC32 differs")
    if manifest["version"] != VERSION:
        raise ValueError(f"{file} is of version {manifest['version']}, this code reads version {VERSION}")
    return manifest


@torch.no_grad()
def fill(rows, source):
    """Fills the tensors of rows in place, one at a time, cast to their dtype.

    source(name, shape, first, last) -> rows [first, last) of that tensor: a Source, which must hold just these names
    and shapes (ValueError lists the differences), or any function, an initial value say.
    """
    if isinstance(source, Source):
        match({name: tuple(shape) for name, (_, _, shape) in rows.items()}, source.shapes, source.origin)
    for name, (tensor, first, shape) in rows.items():
        if tensor.numel():
            value = source(name, tuple(shape), first, first + count(tensor.shape))
            if value.shape != tensor.shape:
                raise ValueError(f"{name}: got rows of shape {tuple(value.shape)}, wanted {tuple(tensor.shape)}")
            tensor.copy_(value)


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


def divide(held):
    """Who writes which rows: ranks that hold the same ones take equal parts, and the first of them a 0-d tensor.

    held: {name: [first, last, dtype, shape]} of each rank -> {name: {dtype, shape, rows: [[rank, first, last], …]}}.
    ValueError where ranks disagree on a tensor, or hold only some of its rows.
    """
    tensors, holders = {}, {}
    for rank, names in enumerate(held):
        for name, (first, last, dtype, shape) in names.items():
            t = tensors.setdefault(name, {"dtype": dtype, "shape": shape})
            if (t["dtype"], t["shape"]) != (dtype, shape):
                raise ValueError(f"{name} is {dtype} {shape} on rank {rank}, {t['dtype']} {t['shape']} on another")
            holders.setdefault(name, {}).setdefault((first, last), []).append(rank)
    for name, t in tensors.items():
        t["rows"], end = [], 0
        for (first, last), ranks in sorted(holders[name].items()):
            if first != end:
                break
            ends = [first + math.ceil((last - first) * i / len(ranks)) for i in range(len(ranks) + 1)]
            t["rows"] += [[rank, a, b] for rank, a, b in zip(ranks, ends, ends[1:]) if a < b]
            end = last
        if end != count(t["shape"]):
            raise ValueError(f"the ranks do not hold every row of {name} {t['shape']} once: {holders[name]}")
    return tensors


def cuts(tensors, rank):
    """(name, tensor's description, (first, last)) of what a rank writes, or has written."""
    return [(name, t, (first, last)) for name, t in tensors.items() for r, first, last in t["rows"] if r == rank]


def write_rows(file, rows, cuts):
    """Rows {name: (first, last)} as one flat dict in a file that is on disk on return, its size and CRC32 beside it."""
    tensors = {}
    for name, (first, last) in cuts.items():
        x, start, shape = rows[name]
        x = (x.detach()[first - start:last - start] if shape else x.detach()).cpu().contiguous()
        if x.untyped_storage().nbytes() > x.nbytes:
            x = x.clone()  # of a view, torch.save would write the storage
        tensors[name] = x
    with open(file, "wb") as f:
        counted = Counted(f)
        try:
            torch.save(tensors, counted)
        except RuntimeError as error:  # torch notices only that bytes are missing; why is in the context
            raise error.__context__ or error
        f.flush()
        os.fsync(f.fileno())
    write_json(file.with_suffix(".json"), {"size": counted.size, "crc32": counted.crc32})


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


def seal(part, path, head, tensors, world):
    """Writes the manifest of what all ranks have written, then gives the folder its name."""
    files = {f"rank_{rank:05d}.pt": read_json(part / f"rank_{rank:05d}.json") for rank in range(world)}
    manifest = {**head, "files": files, "tensors": tensors}
    for note in part.glob("*.json"):
        note.unlink()
    write_json(part / "manifest.json", manifest | {"crc32": digest(manifest)})
    sync_folder(part)
    before = aside(path) if path.exists() else None  # damaged, or saved before the run was resumed from an earlier step
    part.rename(path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)
    if before:
        shutil.rmtree(before)


def steps(out):
    """{step: path} of a run's checkpoints, valid or not, oldest first."""
    found = {int(p.name[5:]): p for p in Path(out).glob("ckpt/step_*") if re.fullmatch(r"step_\d{7,}", p.name)}
    return dict(sorted(found.items()))


def aside(path):
    """Takes its name from a checkpoint that is to be removed: killed half-way, no half of it bears one."""
    return path.rename(path.with_name(f"{path.name}.old{TEMPORARY}"))


def count(shape):
    return shape[0] if len(shape) else 1


def kind(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def nearest(path):
    """The path itself or the first folder above it that exists."""
    return next(p for p in (Path(path), *Path(path).absolute().parents) if p.is_dir())


def contents(path):
    return f"{nearest(path)} holds {', '.join(sorted(p.name for p in nearest(path).iterdir())) or 'nothing'}"


@lru_cache(maxsize=None)  # `latest`, then `load`: a file that was not touched is not read twice
def crc32(file, mtime_ns):
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def digest(manifest):
    return zlib.crc32(json.dumps({key: value for key, value in manifest.items() if key != "crc32"}).encode())


def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


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


# ---- sources --------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """Tensors that can be read by rows, whatever they come from."""
    origin: str             # for messages
    shapes: dict            # name -> global shape
    rows: Callable          # (name, first, last) -> rows [first, last), possibly a view of a mapped file
    manifest: dict | None   # of the checkpoint it comes from

    def __call__(self, name, shape, first, last):
        return self.rows(name, first, last)

    def tensor(self, name):
        """One tensor, whole."""
        return self.rows(name, 0, sys.maxsize)


def stored(path, *, rank=0, world=1, agree=bool):
    """The Source of everything in a checkpoint under its full names, verified; what is not asked for is not read."""
    manifest = verify(path, rank=rank, world=world, agree=agree)
    tensors = manifest["tensors"]

    @cache
    def opened(rank):
        file = Path(path) / f"rank_{rank:05d}.pt"
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{file} is not a dict of tensors")
        said = {name: (t["dtype"], (last - first, *t["shape"][1:]) if t["shape"] else ())
                for name, t, (first, last) in cuts(tensors, rank)}
        match(said, {name: (kind(x), tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__
                     for name, x in found.items()}, file)
        return found

    def rows(name, first, last):
        pieces = []
        for rank, a, b in tensors[name]["rows"]:
            if a < last and first < b:
                x = opened(rank)[name]
                pieces.append(x[max(first, a) - a:min(last, b) - a] if x.ndim else x)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Source(str(path), {name: tuple(t["shape"]) for name, t in tensors.items()}, rows, manifest)


def files(path):
    """The Source of a .safetensors file, or of a folder of them with its index if it has one, under their own keys."""
    path, listed = Path(path), None
    index = sorted(path.glob("*.safetensors.index.json"), key=lambda p: len(p.name))  # the plain one before a variant
    if index:
        listed = read_json(index[0])["weight_map"]
        parts = sorted({path / name for name in listed.values()})
    else:
        parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    lost = [p.name for p in parts if p.suffix != ".safetensors" or not p.is_file()]
    if lost or not parts:
        raise FileNotFoundError(f"no weights at {path}: {', '.join(lost) or '*.safetensors'} is missing, pickles are "
                                f"not read; {contents(path)}")
    where = {}
    for part in parts:
        try:
            f = safe_open(part, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{part} is damaged: {error}") from error
        twice = [key for key in f.keys() if key in where]
        if twice:
            raise ValueError(f"{path} holds {twice[0]} twice, in {part.name} too: several models? Name one file")
        where.update(dict.fromkeys(f.keys(), f))
    if listed is not None:
        match(dict.fromkeys(listed), dict.fromkeys(where), index[0])
    shapes = {key: tuple(f.get_slice(key).get_shape()) for key, f in where.items()}

    def rows(key, first, last):
        return where[key].get_slice(key)[first:last] if shapes[key] else where[key].get_tensor(key)

    return Source(str(path), shapes, rows, None)


def renamed(source, names):
    """The tensors of a source under the names that the function `names` makes of theirs."""
    old = {names(name): name for name in source.shapes}
    if len(old) < len(source.shapes):
        twice = sorted(set(source.shapes) - set(old.values()))
        raise ValueError(f"{source.origin} holds {', '.join(twice)} under another name too")
    return source._replace(shapes={new: source.shapes[name] for new, name in old.items()},
                           rows=lambda name, first, last: source.rows(old[name], first, last))


def match(want, have, origin):
    """ValueError that lists every name which is missing, too many, or otherwise than wanted."""
    wrong = {"missing": [name for name in want if name not in have],
             "not wanted": [name for name in have if name not in want],
             "other than wanted": [f"{name} {have[name]} (wanted {want[name]})" for name in want
                                   if name in have and have[name] != want[name]]}
    lines = [f"\n  {len(names)} {what}: {', '.join(names[:30])}{' …' * (len(names) > 30)}"
             for what, names in wrong.items() if names]
    if lines:
        raise ValueError(f"{origin} does not fit:" + "".join(lines))


# ---- weight formats -------------------------------------------------------------------------------------------------

# (Wan's name of a module, which is ours; diffusers'), in a block and outside of blocks. diffusers numbers a block's
# norms in the order of their use and Wan calls the only one with parameters norm3: norm2 and norm3 change places.
IN_BLOCK = [("modulation", "scale_shift_table"), ("norm2", "norm3"), ("norm3", "norm2"),
            ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
            *((f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in [("self_attn", "attn1"), ("cross_attn", "attn2")]
              for a, b in [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
                           ("norm_q", "norm_q"), ("norm_k", "norm_k")])]
OUTSIDE = [("head.modulation", "scale_shift_table"), ("head.head", "proj_out"),
           ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
           ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
           ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
           ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
           ("time_projection.1", "condition_embedder.time_proj")]


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


def weights(path, role="ema"):
    """The Source of one model's weights under our names; what path is gets sniffed.

    path: a .safetensors file; a folder of them, sharded or not; the diffusers pipeline's folder around it (of Wan2.2's
    two transformers name the second one yourself); in Wan's, diffusers' or ComfyUI's names. Or a checkpoint of ours, or
    a run's folder (its newest valid one), of which role is read, an adapter folded into the weights under it.
    FileNotFoundError or ValueError names what is there.
    """
    path = Path(path)
    if (path / "ckpt").is_dir() or (path / "manifest.json").is_file():
        return model_of(stored(latest(path) or path), role)
    source = files(path / "transformer" if (path / "transformer").is_dir() else path)
    source = renamed(source, lambda key: re.sub(r"^(model\.)?diffusion_model\.", "", key))  # ComfyUI's prefixes
    if any(re.fullmatch(r"blocks\.\d+\.attn1\.to_q\.weight", name) for name in source.shapes):
        return renamed(source, from_diffusers)
    if any(re.fullmatch(r"blocks\.\d+\.self_attn\.q\.weight", name) for name in source.shapes):
        return source
    raise ValueError(f"{source.origin} is no Wan transformer under Wan's, diffusers' or ComfyUI's names: it holds "
                     f"{len(source.shapes)} tensors such as {', '.join(sorted(source.shapes)[:5])}")


def role_of(source, role):
    """What a checkpoint holds as "role.…", without that prefix."""
    shapes = {name[len(role) + 1:]: shape for name, shape in source.shapes.items() if name.startswith(f"{role}.")}
    if not shapes:
        roles = sorted({name.split(".")[0] for name in source.shapes if "." in name})
        raise ValueError(f"{source.origin} holds no {role!r}, but {', '.join(roles)}")
    return source._replace(origin=f"{source.origin} ({role})", shapes=shapes,
                           rows=lambda name, first, last: source.rows(f"{role}.{name}", first, last))


# ---- LoRA: an adapter of module M is M.lora.NAME.A (r, inputs) and .B (outputs, r); what it adapts is named in meta --

def base_of(path, source):
    """What a run that trains adapters keeps in its meta as "base": where the weights under them are, and which."""
    return {"path": str(Path(latest(path) or path).resolve()), "crc32": fingerprint(source)}


def fingerprint(source):
    """Tells one set of weights from another: a checkpoint's CRC32, or that of the first row of every tensor."""
    if source.manifest:
        return source.manifest["crc32"]
    crc = 0
    for name in sorted(source.shapes):
        crc = zlib.crc32(source.rows(name, 0, 1).contiguous().view(torch.uint8).numpy(), crc)
    return crc


def model_of(source, role):
    """The weights that a checkpoint holds as "role.…", an adapter folded into the weights under it."""
    source = role_of(source, role)
    return merged(source) if adapts(source) else source


def adapts(source):
    """Whether these are the tensors of an adapter alone."""
    return any(".lora." in name for name in source.shapes)


def merged(adapter, base=None):
    """An adapter folded into the weights under it as they are read; base: their path, None = where the run had them."""
    meta = adapter.manifest["meta"]
    path = base or meta["base"]["path"]
    if not Path(path).exists():
        raise FileNotFoundError(f"{adapter.origin} is an adapter of weights that are not at {path}: put or link them "
                                "there")
    below = weights(path)
    if fingerprint(below) != meta["base"]["crc32"]:
        raise ValueError(f"{below.origin} is not what {adapter.origin} was trained on")
    factors = {re.sub(r"\.lora\.\w+\.A$", ".weight", A): (A, A.removesuffix("A") + "B")
               for A in adapter.shapes if A.endswith(".A")}

    def rows(name, first, last):
        weight = below.rows(name, first, last)
        if name not in factors:
            return weight
        A, B = factors[name]
        return merge(weight.float(), adapter.tensor(A), adapter.rows(B, first, last), meta["config"]["lora_alpha"])

    return adapter._replace(shapes=below.shapes, rows=rows)


def merge(weight, A, B, alpha):
    """The weight with its adapter folded in, W + α / r · B A."""
    return weight + alpha / len(A) * (B @ A)
