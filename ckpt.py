"""Checkpoints that any number of ranks writes and any other number reads, and the weight formats of the Wan family.

Imports nothing of ours. One idea serves both halves: a tensor is known by its name and global shape and is moved by
rows (first dimension; a 0-d tensor is one row), so that no process ever needs a whole model.

    rows      {name: (tensor, first_row, global_shape)}: what this rank holds, tensor = rows [first_row, first_row + n)
    source    source(name, global_shape, first, last) -> rows [first, last), from a checkpoint, a weights file, an init
    agree     agree(ok) -> True if ok is true on every rank: the only collective, and a barrier

    out/ckpt/step_0001000/
        manifest.json    step, meta, size and CRC32 of every file, each tensor's shape, dtype and [rank, first, last]s
        rank_00000.pt    torch.save of one flat dict {name: contiguous CPU tensor}: tensors only, nothing is unpickled

Names in a checkpoint are "role.parameter": net, ema, adam_m … A weights file is one role under its own key names.
"""
import json
import math
import os
import re
import shutil
import zlib
from collections import defaultdict
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open

VERSION = 1
TEMPORARY = ".tmp"  # a folder of this ending is what a killed save left behind: never read, removed by the next save


# --- saving and loading -----------------------------------------------------------------------------------------------

def save(out, step, rows, meta, *, rank=0, world=1, agree=bool, keep=3):
    """Write out/ckpt/step_{step} and return its path; all ranks call it, with everything they hold.

    Ranks that hold the same rows (replicas) share the writing of them. meta: anything JSON takes. Nothing bears the
    final name before all of it is on disk, and only then are all but the newest `keep` up to this step removed.
    A failure on any rank (a full disk) raises OSError on all of them and leaves the earlier checkpoints as they were.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 checkpoint must stay")
    path = Path(out) / "ckpt" / f"step_{step:07d}"
    part = path.with_name(path.name + TEMPORARY)
    try:
        with together(agree, path):
            if rank == 0:
                for leftover in path.parent.glob(f"*{TEMPORARY}"):
                    shutil.rmtree(leftover)
                part.mkdir(parents=True)
        with together(agree, path):
            held = {name: [first, first + count(x), list(shape), kind(x)] for name, (x, first, shape) in rows.items()}
            write_json(part / f"held_{rank:05d}.json", held)
        with together(agree, path):
            if rank == 0:
                write_json(part / "tensors.json", divide(read_json(part / f"held_{r:05d}.json") for r in range(world)))
        with together(agree, path):
            tensors = read_json(part / "tensors.json")
            write_rows(part / f"rank_{rank:05d}.pt", rows, tensors, rank)
        with together(agree, path):
            if rank == 0:
                seal(part, path, {"version": VERSION, "step": step, "meta": meta}, tensors, world)
    except (OSError, RuntimeError, ValueError) as error:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(out).free / 1e9 if Path(out).exists() else math.nan
        raise OSError(f"{path} was not saved ({free:.1f} GB free there; earlier checkpoints are as they were): {error}") \
            from error
    if rank == 0:
        for old in [p for p in steps(out) if p.name <= path.name][:-keep]:
            discard(old)
    return path


def load(path, want, *, rank=0, world=1, agree=bool):
    """Copy the checkpoint at `path` into the tensors of `want` (rows) in place and return its manifest.

    Any world size loads what any other saved. Every file is checked against its CRC32 before one tensor of it is read;
    names, global shapes and dtypes must be just those wanted, or ValueError lists the differences.
    """
    source = stored(path, rank=rank, world=world, agree=agree)
    with together(agree, path):
        saved = {name: f"{t['dtype']} {tuple(t['shape'])}" for name, t in source.manifest["tensors"].items()}
        match({name: f"{kind(x)} {tuple(shape)}" for name, (x, _, shape) in want.items()}, saved, path)
        fill(want, source)
    return source.manifest


def latest(out, *, rank=0, world=1, agree=bool, report=print):
    """The newest valid checkpoint of a run's folder, or None; a damaged one is reported and the one before it tried."""
    for path in reversed(steps(out)):
        try:
            verify(path, rank=rank, world=world, agree=agree)
            return path
        except (OSError, ValueError) as error:
            report(f"{path} is damaged, the one before it is used: {error}")
    return None


def verify(path, *, rank=0, world=1, agree=bool):
    """The manifest of a checkpoint whose every file has the size and CRC32 it had when saved; file i is rank i mod world's."""
    with together(agree, path):
        manifest = read_manifest(path)
    with together(agree, path):
        for name, file in list(manifest["files"].items())[rank::world]:
            size = (Path(path) / name).stat().st_size
            if size != file["size"]:
                raise ValueError(f"{Path(path) / name} has {size} bytes, its manifest says {file['size']}")
            if crc32_of(Path(path) / name) != file["crc32"]:
                raise ValueError(f"{Path(path) / name} is not what was saved: its CRC32 differs from the manifest's")
    return manifest


def read_manifest(path):
    """manifest.json of a checkpoint, complete and unaltered; FileNotFoundError lists what is there instead."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        near = next(p for p in (Path(path), *Path(path).absolute().parents) if p.is_dir())
        raise FileNotFoundError(f"{file} does not exist; {near} holds {sorted(p.name for p in near.iterdir()) or 'nothing'}")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != digest(manifest):
        raise ValueError(f"{file} is not what was saved: its CRC32 differs")
    if manifest["version"] != VERSION:
        raise ValueError(f"{file} is of version {manifest['version']}, this code reads version {VERSION}")
    return manifest


class Source(NamedTuple):
    """Tensors to be read by rows: callable as any source, and it knows what it holds, so `fill` can refuse a misfit."""
    origin: str                 # for messages
    shapes: dict                # name -> global shape
    rows: Callable              # (name, first, last) -> tensor
    manifest: dict | None       # of one of our checkpoints

    def __call__(self, name, shape, first, last):
        return self.rows(name, first, last)

    def tensor(self, name):
        """All rows of one tensor."""
        return self.rows(name, 0, self.shapes[name][0] if self.shapes[name] else 1)


def stored(path, *, rank=0, world=1, agree=bool):
    """A Source over a checkpoint, verified first; files are memory-mapped, so what is not asked for is not read."""
    manifest = verify(path, rank=rank, world=world, agree=agree)
    tensors = manifest["tensors"]

    @cache
    def contents(rank):
        file = Path(path) / f"rank_{rank:05d}.pt"
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        expected = {name: (t["dtype"], part_shape(t["shape"], last - first)) for name, t in tensors.items()
                    for r, first, last in t["rows"] if r == rank}
        match(expected, {name: (kind(x), tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__
                         for name, x in found.items()}, file)
        return {name: (found[name], first) for name, t in tensors.items() for r, first, _ in t["rows"] if r == rank}

    def rows(name, first, last):
        pieces = []
        for rank, a, b in tensors[name]["rows"]:
            if a < last and first < b:
                x, start = contents(rank)[name]
                pieces.append(x[max(first, a) - start:min(last, b) - start] if x.ndim else x)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Source(str(path), {name: tuple(t["shape"]) for name, t in tensors.items()}, rows, manifest)


@torch.no_grad()
def fill(rows, source):
    """Fill the tensors of `rows` in place from `source`, one tensor at a time, cast to their dtype; each rank its rows."""
    if isinstance(source, Source):
        match({name: tuple(shape) for name, (_, _, shape) in rows.items()}, source.shapes, source.origin)
    for name, (tensor, first, shape) in rows.items():
        if tensor.numel():
            value = source(name, tuple(shape), first, first + count(tensor))
            if value.shape != tensor.shape:
                raise ValueError(f"{name}: got rows of shape {tuple(value.shape)}, wanted {tuple(tensor.shape)}")
            tensor.copy_(value)


# --- the parts of a save, in order ------------------------------------------------------------------------------------

@contextmanager
def together(agree, path):
    """Run the body on every rank; what fails on one of them raises on all of them, so that none waits for another."""
    failure = None
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        failure = error
    if not agree(failure is None):
        raise failure or OSError(f"{path}: another rank failed, its message says why")


def divide(held):
    """Who writes which rows: ranks that hold the same rows split them evenly (a 0-d tensor goes to the first).

    held: per rank {name: [first, last, shape, dtype]} -> {name: {shape, dtype, rows: [[rank, first, last], …]}};
    ValueError where ranks disagree about a tensor or its rows are not covered exactly once.
    """
    shapes, holders = {}, defaultdict(lambda: defaultdict(list))
    for rank, names in enumerate(held):
        for name, (first, last, *shape_dtype) in names.items():
            if shapes.setdefault(name, shape_dtype) != shape_dtype:
                raise ValueError(f"rank {rank} holds {name} as {shape_dtype}, another as {shapes[name]}")
            holders[name][first, last].append(rank)
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        rows = []
        for (first, last), ranks in sorted(holders[name].items()):
            cuts = [first - (first - last) * i // len(ranks) for i in range(len(ranks) + 1)]
            rows += [[rank, a, b] for rank, a, b in zip(ranks, cuts, cuts[1:]) if a < b]
        if [0, *(b for _, _, b in rows)] != [*(a for _, a, _ in rows), shape[0] if shape else 1]:
            raise ValueError(f"{name} {tuple(shape)} is not covered once by [rank, first, last] {rows}")
        tensors[name] = {"shape": shape, "dtype": dtype, "rows": rows}
    return tensors


def write_rows(file, rows, tensors, rank):
    """This rank's share as one flat dict of CPU tensors in `file`, on disk, with its size and CRC32 beside it as JSON."""
    share = {}
    for name, t in tensors.items():
        for r, first, last in t["rows"]:
            if r == rank:
                x, start, _ = rows[name]
                x = x.detach()[first - start:last - start] if x.ndim else x.detach()
                whole = x.untyped_storage().nbytes() == x.nbytes  # torch.save writes the storage behind a view
                share[name] = x.cpu().contiguous() if whole else x.cpu().clone(memory_format=torch.contiguous_format)
    with open(file, "wb") as f:
        counted = Counted(f)
        try:
            torch.save(share, counted)
        except RuntimeError as error:  # torch reports a failed write as a wrong position; the reason is its context
            raise error.__context__ or error
        counted.flush()
    write_json(file.with_suffix(".json"), {"size": counted.size, "crc32": counted.crc32})


class Counted:
    """What torch.save writes to: passes the bytes on to a file and keeps their number and CRC32."""

    def __init__(self, file):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data):
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return self.file.write(data)

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())


def seal(part, path, head, tensors, world):
    """Write the manifest, then give the folder its name: the moment at which the checkpoint comes to be."""
    files = {f"rank_{r:05d}.pt": read_json(part / f"rank_{r:05d}.json") for r in range(world)}
    for file in part.glob("*.json"):
        file.unlink()
    manifest = {**head, "files": files, "tensors": tensors}
    write_json(part / "manifest.json", {**manifest, "crc32": digest(manifest)})
    sync_folder(part)
    if path.exists():  # a damaged one, or the same step of a run resumed from an earlier one
        discard(path)
    part.rename(path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def steps(out):
    """Paths of a run's checkpoints, oldest first, valid or not."""
    found = [p for p in Path(out).glob("ckpt/step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def discard(path):
    """Remove a checkpoint such that, killed half-way, no half of it bears its name."""
    doomed = path.with_name(path.name + ".old" + TEMPORARY)
    path.rename(doomed)
    shutil.rmtree(doomed)


def count(tensor):
    return tensor.shape[0] if tensor.ndim else 1


def kind(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def part_shape(shape, n):
    return (n, *shape[1:]) if shape else ()


def match(want, have, origin):
    """ValueError that lists every name that is missing, unknown, or described differently; else nothing."""
    wrong = {"missing": [name for name in want if name not in have],
             "not wanted": [name for name in have if name not in want],
             "different": [f"{name} {have[name]}, wanted {want[name]}" for name in want if name in have and have[name] != want[name]]}
    if any(wrong.values()):
        raise ValueError(f"{origin} does not fit" + "".join(
            f"\n  {len(names)} {what}: {', '.join(names[:20])}{' …' * (len(names) > 20)}" for what, names in wrong.items() if names))


def crc32_of(file):
    """CRC32 of a file; asked again for an unaltered one (`latest`, then `load`), it is remembered."""
    stat = os.stat(file)
    return read_crc32(file, stat.st_size, stat.st_mtime_ns)


@lru_cache
def read_crc32(file, size, mtime_ns):
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def digest(manifest):
    return zlib.crc32(json.dumps(manifest).encode())


def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(value))
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path):
    if os.name == "posix":  # a name is on disk when its folder is; elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# --- weight formats ---------------------------------------------------------------------------------------------------

# Wan's own module names (ours) and diffusers', inside a block and outside, matched whole. diffusers counts the norms in
# order of use, Wan the affine one last, so that norm2 and norm3 change places.
BLOCK = [("modulation", "scale_shift_table"), ("norm2", "norm3"), ("norm3", "norm2"),
         ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
         *((f"{a}.{x}", f"{b}.{y}") for a, b in [("self_attn", "attn1"), ("cross_attn", "attn2")]
           for x, y in [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                        ("norm_k", "norm_k"), ("k_img", "add_k_proj"), ("v_img", "add_v_proj"),
                        ("norm_k_img", "norm_added_k")])]
OUTSIDE = [("head.modulation", "scale_shift_table"), ("head.head", "proj_out"),
           ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
           ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
           ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
           ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
           ("time_projection.1", "condition_embedder.time_proj"),
           ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
           ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
           ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
           ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
           ("img_emb.proj.4", "condition_embedder.image_embedder.norm2")]
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI's, in front of Wan's names


def to_diffusers(name):
    """diffusers' name of one of our parameters; from_diffusers is its inverse."""
    return rename(name, [(ours, theirs) for ours, theirs in BLOCK], [(ours, theirs) for ours, theirs in OUTSIDE])


def from_diffusers(name):
    return rename(name, [(theirs, ours) for ours, theirs in BLOCK], [(theirs, ours) for ours, theirs in OUTSIDE])


def rename(name, block, outside):
    stem, rest = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
    for old, new in block if stem else outside:
        if rest == old or rest.startswith(old + "."):
            return stem + new + rest[len(old):]
    return name


def weights(path, role="ema"):
    """A Source of one model's weights under our names, read by rows from `path`, whose kind is sniffed.

    path: a .safetensors file; a folder of them, sharded with an index or not, or the diffusers pipeline folder above it;
    in Wan's, diffusers' or ComfyUI's names; or a checkpoint of ours, or a run's folder (its newest valid one), of which
    `role` is read: ema, net, student, … Raises FileNotFoundError or ValueError that names what was found.
    """
    path = Path(path)
    if (path / "ckpt").is_dir():
        path = latest(path) or path / "ckpt"
    if (path / "manifest.json").is_file():
        return one_role(stored(path), role)
    where = locate(path)  # key -> file
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in where)), "")
    bare = {key.removeprefix(prefix): key for key in where}
    if "condition_embedder.text_embedder.linear_1.weight" in bare:
        keys = {from_diffusers(name): key for name, key in bare.items()}
    elif "text_embedding.0.weight" in bare:
        keys = bare
    else:
        raise ValueError(f"{path} holds no Wan transformer, in Wan's, diffusers' or ComfyUI's names: "
                         f"{len(where)} tensors such as {', '.join(sorted(where)[:5])}")
    opened = cache(lambda file: safe_open(file, framework="pt"))
    part = lambda key: opened(where[key]).get_slice(key)
    shapes = {name: tuple(part(key).get_shape()) for name, key in keys.items()}
    return Source(str(path), shapes, lambda name, first, last: part(keys[name])[first:last], None)


def one_role(source, role):
    """The tensors "role.*" of a checkpoint, the role's name taken off."""
    shapes = {name[len(role) + 1:]: shape for name, shape in source.shapes.items() if name.startswith(role + ".")}
    if not shapes:
        raise ValueError(f"{source.origin} holds no role {role!r}, but {sorted({n.split('.')[0] for n in source.shapes})}")
    return Source(f"{source.origin} ({role})", shapes,
                  lambda name, first, last: source.rows(f"{role}.{name}", first, last), source.manifest)


def locate(path):
    """{key: file} of a safetensors file or folder, by its index where it has one."""
    if path.is_file() and path.suffix == ".safetensors":
        files, listed = [path], None
    else:
        if (path / "transformer").is_dir():
            path = path / "transformer"
        index = sorted(path.glob("*.safetensors.index.json"))
        listed = read_json(index[0])["weight_map"] if index else None
        files = sorted({path / file for file in listed.values()} if index else path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lacks {', '.join(missing)}, which {index[0].name} lists")
    if not files:
        found = sorted(p.name for p in path.iterdir()) if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path}: no .safetensors file and no checkpoint of ours ({found}); pickles are not read")
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            for key in f.keys():
                if key in where:
                    raise ValueError(f"{key} is in {where[key].name} and in {file.name}: several models? Name one file")
                where[key] = file
    if listed is not None:
        match(dict.fromkeys(listed), dict.fromkeys(where), index[0])
    return where
