"""Checkpoints and weight formats: what is saved comes back on any number of ranks, what was altered never does."""
import errno
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import ckpt
from conftest import ROOT
from helpers import V1, V1_PATH, as_version_1


def state(seed=0):
    """What a run saves: fp32 and bf16, odd sizes, one row, no row, one number."""
    g = torch.Generator().manual_seed(seed)
    return {"net.w": torch.randn(10, 3, generator=g),
            "net.modulation": torch.randn(1, 6, 4, generator=g),
            "net.bias": torch.randn(7, generator=g).bfloat16(),
            "ema.w": torch.randn(10, 3, generator=g),
            "empty": torch.zeros(0, 3), "updates": torch.tensor(7 + seed)}


def shard(tensors, index=0, parts=1):
    """Rows as FSDP deals them: parts of ceil(n / parts), the last ones smaller or empty; a number is everywhere."""
    rows = {}
    for name, x in tensors.items():
        if x.ndim == 0:
            rows[name] = (x.clone(), 0, ())
        else:
            n = -(-len(x) // parts)
            first = min(index * n, len(x))
            rows[name] = (x[first:first + n].clone(), first, tuple(x.shape))
    return rows


def blank(rows):
    return {name: (torch.full_like(x, 99), *where) for name, (x, *where) in rows.items()}


def on_ranks(world, work):
    """[work(rank, agree)] of `world` threads that share an `agree`; an exception is returned in place of a result."""
    barrier, said, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

    def run(rank):
        def agree(x):
            said[rank] = x
            barrier.wait()
            least = min(said)
            barrier.wait()
            return least
        try:
            results[rank] = work(rank, agree)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return results


def save(out, step, tensors=None, **how):
    tensors = tensors or state(step)
    return ckpt.save(out, step, shard(tensors), {"note": f"step {step}"}, **how)


def loads(path, tensors):
    rows = blank(shard(tensors))
    ckpt.load(path, rows)
    return holds(rows, tensors)


def holds(rows, tensors):
    """Whether whole tensors have the values, and the dtypes, of others."""
    return all(torch.equal(x, tensors[name]) and x.dtype == tensors[name].dtype
               for name, (x, _, _) in rows.items())


def saved_by(world, out, step, full, parts=None, meta=None, **how):
    """[what ckpt.save returns] of ranks that hold tensors in `parts` parts, one each if None."""
    return on_ranks(world, lambda rank, agree: ckpt.save(
        out, step, shard(full, rank % (parts or world), parts or world), meta or {}, rank=rank,
        world=world, agree=agree, **how))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# ---- any world size ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world, parts", [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (3, 3)])
def test_any_world_size_reads_what_any_other_wrote(tmp_path, world, parts):
    full = state()
    saved = saved_by(world, tmp_path, 5, full, parts, {"lr": 0.1})
    assert saved == [tmp_path / "ckpt" / "step_0000005"] * world
    for readers in (1, 2, 4):
        def read(rank, agree):
            want = blank(shard(full, rank, readers))
            manifest = ckpt.load(saved[0], want, rank=rank, world=readers, agree=agree)
            for name, (x, first, shape) in shard(full, rank, readers).items():
                assert torch.equal(want[name][0], x) and want[name][0].dtype == x.dtype
            return manifest["step"], manifest["meta"]
        assert on_ranks(readers, read) == [(5, {"lr": 0.1})] * readers


@pytest.mark.parametrize("world, parts", [(4, 1), (4, 2)])
def test_replicas_share_the_writing_and_each_row_is_written_once(tmp_path, world, parts):
    full = {"net.w": torch.randn(64, 100), "net.n": torch.tensor(1)}
    saved_by(world, tmp_path, 1, full, parts)
    paths = sorted(tmp_path.glob("ckpt/*/rank_*.net.pt"))
    files = [torch.load(path, weights_only=True) for path in paths]
    assert [len(f["net.w"]) for f in files] == [16] * 4
    assert ["net.n" in f for f in files] == [True, False, False, False]


def test_what_only_the_order_of_names_tells_apart_is_the_same(tmp_path):
    full = state()

    def work(rank, agree):
        rows = shard(full, rank, 2)
        rows = dict(reversed(rows.items())) if rank else rows
        return ckpt.save(tmp_path, 1, rows, {}, rank=rank, world=2, agree=agree)

    assert loads(on_ranks(2, work)[0], full)


def test_what_rank_0_reads_and_the_manifest_holds_stays_small(tmp_path, monkeypatch):
    """Names travel once, and tensors that are cut alike share their rows."""
    full = {f"net.{i}": torch.zeros(8 + 8 * (i % 2), 2) for i in range(100)}
    read, notes = ckpt.read_json, {}
    monkeypatch.setattr(ckpt, "read_json", lambda f: notes.setdefault(Path(f).name, read(f)))
    path = saved_by(4, tmp_path, 1, full)[0]
    held = [notes[f"held_{rank:05d}.json"] for rank in range(4)]
    assert ["about" in note for note in held] == [True] + [False] * 3
    for r, note in enumerate(held):
        assert note["spans"] == [[2 * r, 2 * r + 2], [4 * r, 4 * r + 4]]
    manifest = read(path / "manifest.json")
    assert manifest["rows"] == [[[r, n * r, n * r + n] for r in range(4)] for n in (2, 4)]
    assert loads(path, full)


def test_a_view_does_not_take_its_storage_along(tmp_path):
    x = torch.randn(1000, 100)
    path = ckpt.save(tmp_path, 1, {"w": (x[:10], 0, (10, 100))}, {})
    assert (path / "rank_00000.w.pt").stat().st_size < 10_000


@pytest.mark.parametrize("held, says", [
    ([(0, 4, (10,)), (5, 10, (10,))], "every row of w"),    # a hole
    ([(0, 6, (10,)), (5, 10, (10,))], "every row of w"),    # an overlap
    ([(0, 5, (10,)), (0, 5, (10,))], "every row of w"),                     # the end is missing
    ([(0, 5, (10,)), (5, 10, (12,))], "on rank 1"),     # two opinions on the shape
])
def test_rows_that_do_not_make_a_tensor_are_refused(tmp_path, held, says):
    def work(rank, agree):
        first, last, shape = held[rank]
        rows = {"w": (torch.zeros(last - first), first, shape)}
        return ckpt.save(tmp_path, 1, rows, {}, rank=rank, world=2, agree=agree)
    errors = on_ranks(2, work)
    assert all(isinstance(e, OSError) for e in errors) and says in str(errors[0])
    assert list((tmp_path / "ckpt").iterdir()) == []


# ---- damage --------------------------------------------------------------------------------------------------------

def test_a_manifest_that_was_edited_is_refused(tmp_path):
    path = save(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 1', '"step": 7'))
    with pytest.raises(ValueError, match="manifest.json is not what was saved"):
        loads(path, state(1))


def test_a_flipped_byte_anywhere_is_refused_and_the_checkpoint_before_is_used(tmp_path):
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    for file in (path / "rank_00000.net.pt", path / "manifest.json"):
        for share in (0.0, 0.3, 0.6, 0.999):
            at = int(share * file.stat().st_size)
            flip(file, at)
            os.utime(file, ns=(0, at))              # the clock ticks too slowly for a test
            with pytest.raises(ValueError):
                loads(path, state(2))
            said = []
            assert ckpt.latest(tmp_path, report=said.append) == before
            assert len(said) == 1 and str(path) in said[0]
            flip(file, at)
            os.utime(file, ns=(0, at + 1))
    assert ckpt.latest(tmp_path) == path and loads(path, state(2))


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    file = path / "rank_00000.ema.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="rank_00000.ema.pt is missing or not of"):
        loads(path, state(2))
    file.unlink()
    with pytest.raises(ValueError, match="rank_00000.ema.pt is missing or not of"):
        loads(path, state(2))
    assert ckpt.latest(tmp_path, report=lambda _: None) == before


def test_all_ranks_fall_back_when_only_one_of_them_sees_the_damage(tmp_path):
    full = state()
    paths = [saved_by(2, tmp_path, step, full)[0] for step in (1, 2)]
    bad = list(ckpt.read_manifest(paths[1])["files"])[3]            # file i is read by rank i mod 2
    flip(paths[1] / bad, 700)
    said = [[], []]
    found = on_ranks(2, lambda rank, agree: ckpt.latest(
        tmp_path, rank=rank, world=2, agree=agree, report=said[rank].append))
    assert found == [paths[0], paths[0]]
    assert bad in said[1][0] and "another rank" in said[0][0]
    errors = on_ranks(2, lambda rank, agree: ckpt.load(
        paths[1], blank(shard(full, rank, 2)), rank=rank, world=2, agree=agree))
    assert isinstance(errors[0], OSError) and isinstance(errors[1], ValueError)


def test_the_files_are_checked_before_they_are_opened(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    flip(path / "rank_00000.net.pt", 700)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ValueError, match="CRC32"):
        loads(path, state(1))


def forge(path, content):
    """Puts other content into a checkpoint's file and makes size and CRC32 agree with it, as somebody hostile would."""
    torch.save(content, path / "rank_00000.net.pt")
    data = (path / "rank_00000.net.pt").read_bytes()
    manifest = ckpt.read_manifest(path)
    manifest["files"]["rank_00000.net.pt"] = {"size": len(data), "crc32": zlib.crc32(data)}
    ckpt.write_json(path / "manifest.json", manifest | {"crc32": ckpt.digest(manifest)})


class Evil:
    """An object that makes a folder of that name when it is unpickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return os.mkdir, (self.name,)


@pytest.mark.parametrize("change, says", [
    (lambda x: x | {"more": torch.zeros(1)}, "1 not wanted: more"),
    (lambda x: x | {"net.w": 3}, "net.w int"),
    (lambda x: x | {"net.w": x["net.w"].double()}, "net.w .*float64"),
    (lambda x: x | {"net.w": x["net.w"][:9]}, r"net.w .*\(9, 3\)"),
    (lambda x: {k: v for k, v in x.items() if k != "net.w"}, "1 missing: net.w"),
    (lambda x: x | {"net.w": Evil("evil")}, "is not a dict of tensors"),
    (lambda x: list(x.values()), "is not a dict of tensors"),
])
def test_a_file_that_holds_anything_but_the_manifests_tensors_is_refused(
        tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    forge(path, change(torch.load(path / "rank_00000.net.pt", weights_only=True)))
    with pytest.raises(ValueError, match=says):
        loads(path, state(1))
    assert not os.path.exists("evil")


# ---- saves that do not end -----------------------------------------------------------------------------------------

KILLS = {"among the bytes": (ckpt.Counted, "write"), "before the manifest": (ckpt, "digest"),
         "before the name": (ckpt, "sync_folder"), "before pruning": (ckpt, "steps"),
         "amid pruning": (ckpt.shutil, "rmtree")}


@pytest.mark.parametrize("when", KILLS)
def test_a_save_killed_at_any_point_leaves_a_valid_latest_and_no_trace_after_the_next(
        tmp_path, when):
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, keep=2)
    pid = os.fork()
    if pid == 0:                                                    # pragma: no cover
        setattr(*KILLS[when], lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        save(tmp_path, 3, keep=2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    expected = 3 if "pruning" in when else 2
    path = ckpt.latest(tmp_path, report=pytest.fail)
    assert path.name == f"step_000000{expected}" and loads(path, state(expected))
    save(tmp_path, 4, keep=2)
    left = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    assert left == [f"step_000000{expected}", "step_0000004"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_full_disk_on_one_rank_fails_on_all_and_loses_nothing(tmp_path, monkeypatch, bad):
    full, write = state(), ckpt.Counted.write
    first = saved_by(2, tmp_path, 1, full, keep=1)[0]

    def limited(self, data):
        if self.file.name.endswith(f"rank_{bad:05d}.net.pt") and self.size + len(data) > 600:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(ckpt.Counted, "write", limited)
    errors = saved_by(2, tmp_path, 2, full, keep=1)
    for error in errors:
        assert isinstance(error, OSError)
        assert "0000002 was not saved" in str(error) and "GB free" in str(error)
    assert "No space left on device" in str(errors[bad]) and "another rank" in str(errors[1 - bad])
    assert list((tmp_path / "ckpt").iterdir()) == [first] and loads(first, full)
    monkeypatch.undo()
    assert save(tmp_path, 2).exists()


def test_a_disk_that_is_full_when_the_manifest_is_written_loses_nothing(tmp_path, monkeypatch):
    first = save(tmp_path, 1, keep=1)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ckpt, "sync_folder", full)
    with pytest.raises(OSError, match="step_0000002 was not saved.*No space left"):
        save(tmp_path, 2, keep=1)
    assert list((tmp_path / "ckpt").iterdir()) == [first] and loads(first, state(1))


def test_the_newest_stay_and_nothing_goes_before_the_new_one_has_its_name(tmp_path, monkeypatch):
    aside, there = ckpt.aside, []

    def spy(path):
        there.append(set(ckpt.steps(tmp_path)))
        return aside(path)

    monkeypatch.setattr(ckpt, "aside", spy)
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert list(ckpt.steps(tmp_path)) == [2, 10] and there == [{1, 2, 10}]
    save(tmp_path, 11, keep=1)
    assert list(ckpt.steps(tmp_path)) == [11] and loads(ckpt.latest(tmp_path), state(11))
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 12, keep=0)


def test_pruning_leaves_what_is_newer_than_the_step_saved(tmp_path):
    for step in (1, 5, 2):
        save(tmp_path, step, keep=1)
    assert list(ckpt.steps(tmp_path)) == [2, 5]


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path):
    path = save(tmp_path, 1)
    (path / "rank_00000.net.pt").unlink()
    assert save(tmp_path, 1) == path and loads(path, state(1))
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_0000001"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", range(1, 11))
def test_just_the_newest_stay_however_many_are_kept(tmp_path, keep):
    for step in range(1, 13):
        ckpt.save(tmp_path, step, {"n": (torch.tensor(step), 0, ())}, {}, keep=keep)
        assert list(ckpt.steps(tmp_path)) == list(range(max(1, step - keep + 1), step + 1))


def busy(*_, **__):
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize("what", ["rmtree", "aside", "steps"])
def test_what_cannot_be_pruned_is_reported_and_goes_with_a_later_save(tmp_path, monkeypatch, what):
    save(tmp_path, 1)
    said = []
    monkeypatch.setattr(*{"rmtree": (shutil, "rmtree", busy)}.get(what, (ckpt, what, busy)))
    path = save(tmp_path, 2, keep=1, report=said.append)
    assert len(said) == 1 and "resource busy" in said[0] and str(tmp_path) in said[0]
    save(tmp_path, 3, keep=1, report=said.append)       # with the leftovers of the first
    monkeypatch.undo()
    assert what == "rmtree" or loads(path, state(2))
    assert save(tmp_path, 4, keep=1, report=pytest.fail).exists()
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_0000004"]


def test_one_that_cannot_be_pruned_keeps_no_other(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    aside, said = ckpt.aside, []
    monkeypatch.setattr(ckpt, "aside", lambda p: busy() if p.name == "step_0000001" else aside(p))
    save(tmp_path, 3, keep=1, report=said.append)
    assert list(ckpt.steps(tmp_path)) == [1, 3] and "step_0000001 is not removed" in said[0]


def test_a_step_is_saved_over_leftovers_that_cannot_be_removed(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    part = path.with_name("step_0000001.tmp")
    part.mkdir()
    (part / "rank_00000.net.pt").write_bytes(b"old")
    (part / "held_00007.json").write_text("[]")
    said = []
    monkeypatch.setattr(shutil, "rmtree", busy)
    for _ in range(2):      # twice: the ones set aside need names of their own
        assert save(tmp_path, 1, state(5), report=said.append) == path
    assert len(said) == 4 and "step_0000001.tmp" in said[0]
    assert loads(path, state(5)) and not (path / "held_00007.json").exists()


def test_notes_that_cannot_be_removed_and_files_of_others_do_no_harm(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Path, "unlink", busy)
    path = save(tmp_path, 1, report=said.append)
    assert len(said) == 1 and (path / "held_00000.json").exists()
    monkeypatch.undo()
    (path / "notes.json").write_text("{not json")
    (path / "rank_00007.net.pt").write_bytes(b"")
    (path / "folder.pt").mkdir()
    (path.parent / "step_0000009").write_text("")       # no folder
    (path.parent / "step_best").mkdir()
    said.clear()
    assert ckpt.latest(tmp_path, report=said.append) == path and "step_0000009" in said[0]
    assert loads(path, state(1)) and ckpt.weights(path, "ema").shapes == {"w": (10, 3)}
    assert save(tmp_path, 10, keep=1, report=said.append).exists()


def test_a_failure_to_prune_on_rank_0_fails_no_rank(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", busy)
    said = [[], []]
    paths = on_ranks(2, lambda rank, agree: ckpt.save(
        tmp_path, 2, shard(state(), rank, 2), {}, keep=1, report=said[rank].append,
        rank=rank, world=2, agree=agree))
    assert paths == [tmp_path / "ckpt" / "step_0000002"] * 2 and [len(x) for x in said] == [1, 0]


def test_torch_computes_no_crc32_of_its_own_and_goes_on_to_afterwards(tmp_path, monkeypatch):
    real, during = torch.save, []

    def spy(*args):
        during.append(torch.serialization.get_crc32_options())
        real(*args)

    torch.serialization.set_crc32_options(True)
    monkeypatch.setattr(torch, "save", spy)
    path = save(tmp_path, 1)
    assert during and not any(during) and torch.serialization.get_crc32_options()
    assert loads(path, state(1))
    monkeypatch.setattr(torch, "save", busy)
    with pytest.raises(OSError, match="busy"):
        save(tmp_path, 2)
    assert torch.serialization.get_crc32_options()


# ---- a file for each role ------------------------------------------------------------------------------------------

def run_state():
    roles = ("net", "ema", "critic_opt")
    full = {f"{role}.{name}": x for role in roles for name, x in wan(1).items()}
    return full | {"null": torch.ones(2, 3)}


@pytest.fixture
def two_ranks(tmp_path):
    """A checkpoint that two ranks wrote."""
    return saved_by(2, tmp_path, 1, run_state())[0]


def test_each_role_has_a_file_of_each_rank_that_holds_its_names(two_ranks):
    roles = ("net", "ema", "critic_opt", "null")
    files = {f"rank_{r:05d}.{role}.pt" for r in range(2) for role in roles}
    assert {p.name for p in two_ranks.iterdir()} == files | {"manifest.json"}
    for file in files:
        names = torch.load(two_ranks / file, weights_only=True)
        assert names and {name.split(".")[0] for name in names} == {file.split(".")[1]}
    manifest = ckpt.read_manifest(two_ranks)
    assert manifest["version"] == 2 and manifest["files"].keys() == files


def test_only_the_roles_asked_for_are_verified_opened_and_there(two_ranks, monkeypatch):
    run, opened, load = two_ranks.parent.parent, [], torch.load
    for file in two_ranks.glob("*.net.pt"):
        flip(file, 700)
    (two_ranks / "rank_00001.critic_opt.pt").unlink()

    def spy(file, **how):
        opened.append(file.name)
        return load(file, **how)

    monkeypatch.setattr(torch, "load", spy)
    for where in (two_ranks, run):
        source = ckpt.stored(where, {"ema", "null"})
        assert {name.split(".")[0] for name in source.shapes} == {"ema", "null"}
        assert torch.equal(source.tensor("null"), torch.ones(2, 3))
        ema = ckpt.model_of(source, "ema")
        assert all(torch.equal(ema.tensor(name), x) for name, x in wan(1).items())
        assert ckpt.weights(where).shapes == ema.shapes
        with pytest.raises(ValueError, match="net.pt is not what was saved|damaged"):
            ckpt.weights(where, "net")
    assert set(opened) == {f"rank_{r:05d}.{role}.pt" for r in range(2) for role in ("ema", "null")}
    with pytest.raises(ValueError, match="every checkpoint"):      # a resume needs all
        ckpt.latest(run, report=lambda _: None)
    with pytest.raises(ValueError, match="net.pt is not what was saved"):
        ckpt.load(two_ranks, shard(run_state()))


def test_ranks_share_the_verification_of_what_they_need(two_ranks, monkeypatch):
    read = [[], []]
    seen = threading.local()

    def crc32(file, mtime_ns):
        read[seen.rank].append(file.name)
        return ckpt.read_manifest(two_ranks)["files"][file.name]["crc32"]

    def work(rank, agree):
        seen.rank = rank
        return ckpt.stored(two_ranks, {"ema", "null"}, rank=rank, world=2, agree=agree)

    monkeypatch.setattr(ckpt, "crc32", crc32)
    for source in on_ranks(2, work):
        assert "null" in source.shapes
    assert [len(x) for x in read] == [2, 2] and not set(read[0]) & set(read[1])
    read[0].clear(), read[1].clear()

    def weigh(rank, agree):
        seen.rank = rank
        return ckpt.weights(two_ranks, "net", rank=rank, world=2, agree=agree)

    for source in on_ranks(2, weigh):
        assert source.shapes == {name: tuple(x.shape) for name, x in wan(1).items()}
    assert [len(x) for x in read] == [1, 1]


def test_a_role_that_is_not_there_is_named_with_those_that_are(two_ranks):
    run = two_ranks.parent.parent
    for ask in (lambda: ckpt.stored(two_ranks, {"critic"}), lambda: ckpt.weights(run, "critic"),
                lambda: ckpt.model_of(ckpt.stored(two_ranks), "critic")):
        with pytest.raises(ValueError, match="holds no 'critic', but critic_opt, ema, net, null"):
            ask()


def test_roles_name_the_tensors_of_one_state():
    a, b, null = (torch.zeros(2), 0, (2,)), (torch.zeros(3), 0, (3,)), (torch.zeros(4), 0, (4,))
    state = ckpt.roles(net={"w": a}, opt={"w.step": b}, null=null)
    assert state == {"net.w": a, "opt.w.step": b, "null": null}


def mapped(folder):
    """Files below a folder that this process has open or mapped."""
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    maps = Path("/proc/self/maps").read_text()
    held |= {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
    return sorted(x for x in held if x.startswith(f"{folder}/"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_no_file_of_a_source_stays_open_after_it_is_dropped(two_ranks, tmp_path, kind):
    where = two_ranks
    if kind == "safetensors":
        where = tmp_path / "wan.safetensors"
        save_file(wan(1), where)
    source = ckpt.weights(where)
    rows = blank(shard(wan(1)))
    ckpt.fill(rows, source)
    assert mapped(tmp_path)                             # the test sees what it looks for
    del source
    gc.collect()
    assert mapped(tmp_path) == []
    assert holds(rows, wan(1))


def test_a_source_of_tensors_in_memory_reads_like_any_other():
    held = {"w": torch.randn(4, 3), "n": torch.tensor(2.0)}
    source = ckpt.in_memory(held, "memory")
    assert source.shapes == {"w": (4, 3), "n": ()}
    assert source.origin == "memory" and source.sampling is None
    assert torch.equal(source.rows("w", 1, 3), held["w"][1:3]) and source.tensor("n") == 2
    rows = blank(shard(held))
    ckpt.fill(rows, source)
    assert holds(rows, held)


def test_a_source_says_how_to_sample_from_it(tmp_path):
    for step, meta in ((1, {"sampling": {"fps": 8}}), (2, {})):
        path = ckpt.save(tmp_path, step, shard(state(1)), meta)
        assert ckpt.weights(path).sampling == ckpt.stored(path).sampling == meta.get("sampling")


def test_a_base_is_the_checkpoint_that_was_read_though_a_newer_one_has_come(tmp_path):
    first = save(tmp_path, 1)
    source = ckpt.weights(tmp_path)
    save(tmp_path, 2)
    assert ckpt.base_of(tmp_path, source)["path"] == str(first.resolve())
    assert ckpt.base_of(first, source)["crc32"] == ckpt.read_manifest(first)["crc32"]


# ---- which checkpoint ----------------------------------------------------------------------------------------------

def on_nodes(work, *folders):
    """As on_ranks, work(rank, its folder, its three keywords): rank i sees the folder i."""
    return on_ranks(len(folders), lambda rank, agree: work(
        rank, folders[rank], {"rank": rank, "world": len(folders), "agree": agree}))


def test_ranks_take_the_newest_that_all_of_them_see(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "a", step)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "ckpt" / "step_0000003")
    shutil.rmtree(tmp_path / "a" / "ckpt" / "step_0000002")
    said = [[], []]
    found = on_nodes(lambda rank, out, ranks: ckpt.latest(out, report=said[rank].append, **ranks),
                     tmp_path / "a", tmp_path / "b")
    assert [path.name for path in found] == ["step_0000001"] * 2
    for lines in said:
        assert ["not seen by every rank" in line for line in lines] == [True, True]
        assert "step_0000003" in lines[0] and "step_0000002" in lines[1]


def test_a_step_of_which_ranks_see_different_checkpoints_is_not_taken(tmp_path):
    for out in ("a", "b"):
        save(tmp_path / out, 1, state(1))
        ckpt.save(tmp_path / out, 2, shard(state(2)), {"node": out})
    said = [[], []]
    folders = tmp_path / "a", tmp_path / "b"
    found = on_nodes(lambda rank, out, ranks: ckpt.latest(out, report=said[rank].append, **ranks),
                     *folders)
    assert [path.name for path in found] == ["step_0000001"] * 2
    for lines in said:
        assert "step_0000002 is not the same checkpoint on every rank" in lines[0]
    paths = [out / "ckpt" / "step_0000002" for out in folders]
    for work in (lambda rank, path, ranks: ckpt.load(path, shard(state(2)), **ranks),
                 lambda rank, path, ranks: ckpt.stored(path, {"ema"}, **ranks),
                 lambda rank, path, ranks: ckpt.newest(tmp_path / "none", path, **ranks)):
        assert all("not the same checkpoint" in str(e) for e in on_nodes(work, *paths))


def test_a_run_that_some_rank_does_not_see_is_not_begun_again(tmp_path):
    save(tmp_path / "a", 1)
    def work(rank, out, ranks):
        return ckpt.newest(out, None, report=lambda _: None, **ranks)

    errors = on_nodes(work, tmp_path / "a", tmp_path / "b")
    assert all(isinstance(e, ValueError) for e in errors)
    assert on_nodes(work, tmp_path / "b", tmp_path / "b") == [None, None]


def test_weights_that_one_rank_does_not_see_fail_on_all(tmp_path):
    save_file(wan(), tmp_path / "wan.safetensors")
    errors = on_nodes(lambda rank, path, ranks: ckpt.weights(path, **ranks),
                      tmp_path / "wan.safetensors", tmp_path / "none.safetensors")
    assert "another rank" in str(errors[0]) and "no weights at" in str(errors[1])


def test_a_run_goes_on_from_its_own_newest_or_from_the_one_asked_for(tmp_path):
    def newest(out, resume=None):
        return ckpt.newest(out, resume, report=lambda _: None)

    a, b = tmp_path / "a", tmp_path / "b"
    other = save(a, 7)
    assert newest(b) is None and newest(b, other) == other and newest(b, str(other)) == other
    first, second = save(b, 1), save(b, 2)
    assert newest(b) == newest(b, other) == newest(b, second) == second
    with pytest.raises(ValueError, match="has gone on to step_0000002.*--out="):
        newest(b, first)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing"):
        newest(b, tmp_path / "nothing")     # a wrong path is refused even if it is not needed
    (second / "rank_00000.net.pt").unlink()
    assert newest(b) == newest(b, first) == first
    with pytest.raises(ValueError, match="rank_00000.net.pt is missing"):
        newest(b, second)                   # never passes over the one that is asked for
    (first / "rank_00000.net.pt").unlink()
    with pytest.raises(ValueError, match="every checkpoint of .* is damaged"):
        newest(b, other)
    flip(other / "rank_00000.ema.pt", 700)
    with pytest.raises(ValueError, match="ema.pt is not what was saved"):
        newest(tmp_path / "c", other)


def differs(flags, inputs=None, free=(), before=None, held=None):
    """What `differences` says of flags beside those of a saved run, "" if nothing."""
    saved = {"meta": {"config": {"lr": 1, "tile": [4, 4], "init": "a", "steps": 5}}}
    if held is not None:
        saved["meta"]["inputs"] = held
    try:
        ckpt.differences("PATH", saved, flags, inputs or {}, set(free), before)
    except ValueError as error:
        assert "PATH is of a run with other flags" in str(error) and "\n" not in str(error)
        return str(error)
    return ""


def test_flags_that_differ_from_the_saved_run_are_named_and_free_ones_are_not():
    same = {"lr": 1, "tile": (4, 4), "init": "a", "steps": 5}
    assert differs(same) == ""
    assert "--lr=2 (was 1)" in differs(same | {"lr": 2})
    assert differs(same | {"lr": 2, "steps": 9}, free={"lr", "steps"}) == ""
    said = differs(same | {"lr": 2, "steps": 9}, free={"lr"})
    assert "--steps=9 (was 5)" in said and "lr" not in said


def test_a_flag_that_the_saved_run_did_not_have_had_the_value_of_its_time():
    same = {"lr": 1, "tile": (4, 4), "init": "a", "steps": 5}
    assert differs(same | {"image": None, "causal": False, "crop": (1, 2)},
                   before={"causal": False, "crop": (1, 2)}) == ""
    assert "--causal=True (was False)" in differs(same | {"causal": True}, before={"causal": False})
    assert "--image=x (was None)" in differs(same | {"image": "x"})
    assert differs(same, before={"lr": 3}) == ""        # what is saved counts, not what others had


def test_what_is_named_may_move_but_not_change():
    same = {"lr": 1, "tile": (4, 4), "init": "b", "steps": 5}
    assert "--init=b (was a)" in differs(same)
    assert "--init=b (was a)" in differs(same, inputs={"init": 7})  # an old run knows no CRC32
    assert "--init=b (was a)" in differs(same, held={"init": 7})    # b is gone: the path counts
    assert differs(same, inputs={"init": 7}, held={"init": 7}) == ""
    said = differs(same | {"init": "a"}, inputs={"init": 8}, held={"init": 7})
    assert "--init=a (is not what a was)" in said
    # a full finetune reads its --init once: its root names it among the free flags
    assert differs(same, inputs={"init": 8}, held={"init": 7}, free={"init"}) == ""


def test_the_flags_of_a_run_are_those_of_its_newest_readable_manifest(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert ckpt.flags_of(a, None) == {}
    for step in (1, 2):
        ckpt.save(a, step, shard(state(step)), {"config": {"lr": step}})
    first, second = ckpt.steps(a).values()
    (second / "rank_00000.net.pt").unlink()             # of the manifest alone
    assert ckpt.flags_of(a, None) == ckpt.flags_of(a, first) == {"lr": 2}
    assert ckpt.flags_of(b, first) == {"lr": 1}
    (second / "manifest.json").write_text("{")
    assert ckpt.flags_of(a, None) == {"lr": 1}
    assert ckpt.flags_of(b, tmp_path / "nowhere") == {}     # `newest` refuses it


# ---- whose a folder is ---------------------------------------------------------------------------------------------

class Elsewhere:
    """Another process that claims a folder: `said` is "mine" or why not; it lives until it is killed."""

    def __init__(self, out):
        mine, its = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:                                           # pragma: no cover
            ckpt.LOCKS.clear()                                      # the fork's inheritance
            try:
                ckpt.claim(out)
                os.write(its, b"mine")
            except ValueError as error:
                os.write(its, str(error).encode())
            finally:
                while True:
                    time.sleep(60)
        os.close(its)
        self.said = os.read(mine, 10_000).decode()
        os.close(mine)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def elsewhere():
    """Starts processes that end with the test."""
    started = []
    yield lambda out: started.append(Elsewhere(out)) or started[-1]
    for process in started:
        try:
            process.kill()
        except ProcessLookupError:
            pass


def test_a_folder_is_one_processes_until_it_is_killed(tmp_path, elsewhere):
    out = tmp_path / "new" / "out"
    other = elsewhere(out)
    assert other.said == "mine"
    with pytest.raises(ValueError) as error:
        ckpt.claim(out)
    who = json.loads((out / ".owner").read_text())
    whose = f"process {other.pid} on {os.uname().nodename} since {who['start']}"
    assert f"--out={out} is in use by {whose}" in str(error.value)
    assert "\n" not in str(error.value)
    ckpt.claim(tmp_path / "another")
    other.kill()
    ckpt.claim(out)
    ckpt.claim(out)                                     # what is ours stays ours
    assert f"process {os.getpid()}" in elsewhere(out).said
    shutil.rmtree(out)                                  # and is claimed anew where it was removed
    ckpt.claim(out)
    assert f"process {os.getpid()}" in elsewhere(out).said


def no_flock(monkeypatch, system):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    without = SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=flock)
    monkeypatch.setattr(ckpt, "fcntl", {"Lustre": without, "Windows": None}[system])
    monkeypatch.setattr(ckpt, "BEAT", 0.05)
    monkeypatch.setattr(ckpt, "STALE", 10)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["Lustre", "Windows"])
def test_where_flock_is_not_supported_a_lock_that_is_touched_holds(
        tmp_path, monkeypatch, elsewhere, system):
    no_flock(monkeypatch, system)
    other, said = elsewhere(tmp_path), []
    assert other.said == "mine"
    with pytest.raises(ValueError, match=f"in use by process {other.pid} on "):
        ckpt.claim(tmp_path, report=said.append)
    os.kill(other.pid, signal.SIGSTOP)
    os.waitpid(other.pid, os.WUNTRACED)
    os.utime(tmp_path / ".lock", (time.time() - 8,) * 2)
    ckpt.claim(tmp_path, report=said.append)            # nobody touches it until STALE seconds
    other.kill()
    assert len(said) == 2 and "waiting until 10, if its owner lives" in said[1]
    assert f"process {os.getpid()}" in elsewhere(tmp_path).said


def test_a_lock_that_was_left_long_ago_is_taken_at_once(tmp_path, monkeypatch):
    no_flock(monkeypatch, "Lustre")
    (tmp_path / ".lock").touch()
    left = time.time() - 11
    os.utime(tmp_path / ".lock", (left, left))
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    ckpt.claim(tmp_path, report=pytest.fail)
    assert (tmp_path / ".lock").stat().st_mtime > left + 5      # touched: ours from now on


def claims(*folders):
    return on_nodes(lambda rank, out, ranks: ckpt.claim(out, **ranks), *folders)


def test_a_folder_that_nodes_do_not_share_is_found_at_the_start(tmp_path, monkeypatch):
    assert claims(tmp_path / "a", tmp_path / "a", tmp_path / "a") == [None] * 3
    monkeypatch.setattr(ckpt, "PATIENCE", 0.2)
    for _ in range(2):      # the second time b is there, with the file of a run of its own
        ours, theirs = claims(tmp_path / "a", tmp_path / "b")
        assert isinstance(ours, OSError) and "another rank" in str(ours)
        assert isinstance(theirs, ValueError) and "\n" not in str(theirs)
        where = f"rank 1 on {os.uname().nodename}"
        assert f"--out={tmp_path / 'b'} is another folder for {where}" in str(theirs)
        claims(tmp_path / "b")


def test_a_rank_waits_until_it_sees_what_rank_0_wrote(tmp_path, monkeypatch):
    owner, late = ckpt.owner, iter([{}, {"token": 1}])
    monkeypatch.setattr(ckpt, "owner", lambda out: next(late, None) or owner(out))
    assert claims(tmp_path, tmp_path) == [None, None]


def test_a_folder_in_use_is_refused_on_all_ranks(tmp_path, elsewhere):
    elsewhere(tmp_path)
    ours, theirs = claims(tmp_path, tmp_path)
    assert "in use by process" in str(ours) and "another rank" in str(theirs)


# ---- version 1 -----------------------------------------------------------------------------------------------------


def v1_state():
    """What is saved in V1."""
    shapes = {"blocks.0.self_attn.q.weight": (10, 3), "blocks.0.modulation": (1, 6, 4),
              "head.head.bias": (7,)}
    state = {f"net.{name}": shape for name, shape in shapes.items()}
    for name, shape in shapes.items():
        state[f"opt.{name}.step"] = ()
        state |= {f"opt.{name}.{moment}": shape for moment in ("exp_avg", "exp_avg_sq")}
    state |= {f"ema.{name}": shape for name, shape in shapes.items()} | {"null": (2, 5)}
    return {name: numbers(name, shape) for name, shape in state.items()}


def numbers(name, shape):
    start = zlib.crc32(name.encode()) % 1000
    return ((torch.arange(math.prod(shape)) + start) / 8).reshape(shape)


@pytest.fixture(params=["496ae65", "rewritten"])
def old(request, tmp_path):
    """A run's folder of version 1: that commit's own, and what as_version_1 makes."""
    if request.param == "496ae65":
        return V1
    meta = ckpt.read_manifest(V1_PATH)["meta"]
    as_version_1(saved_by(2, tmp_path, 2, v1_state(), meta=meta)[0])
    return tmp_path


def test_a_rewritten_checkpoint_is_laid_out_as_the_old_code_did(tmp_path):
    meta = ckpt.read_manifest(V1_PATH)["meta"]

    def work(rank, agree):
        rows = shard(v1_state(), rank, 2) | {"null": (v1_state()["null"], 0, (2, 5))}   # on both
        return ckpt.save(tmp_path, 2, rows, meta, rank=rank, world=2, agree=agree)

    path = as_version_1(on_ranks(2, work)[0])
    ours, theirs = ckpt.read_manifest(path), ckpt.read_manifest(V1_PATH)
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in V1_PATH.iterdir())
    assert list(ours) == list(theirs) and list(ours["files"]) == list(theirs["files"])
    for part in ("version", "step", "meta", "tensors"):
        assert ours[part] == theirs[part]
    assert list(ours["tensors"]) == list(theirs["tensors"])
    for file in theirs["files"]:
        a, b = (torch.load(folder / file, weights_only=True) for folder in (path, V1_PATH))
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in b)


def test_version_1_resumes_on_any_number_of_ranks(old):
    assert ckpt.newest(old, None, report=pytest.fail) == old / "ckpt" / "step_0000002"
    for world in (1, 2, 3):
        def read(rank, agree):
            want = blank(shard(v1_state(), rank, world))
            path = ckpt.newest(old, None, rank=rank, world=world, agree=agree)
            manifest = ckpt.load(path, want, rank=rank, world=world, agree=agree)
            for name, (x, _, _) in shard(v1_state(), rank, world).items():
                assert torch.equal(want[name][0], x)
            return manifest["step"], manifest["meta"]["counts"]["updates"]
        assert on_ranks(world, read) == [(2, 2)] * world


def test_version_1_gives_its_weights_and_how_to_sample_from_them(old):
    for where in (old, old / "ckpt" / "step_0000002"):
        source = ckpt.stored(where, {"ema", "null"})
        assert {name.split(".")[0] for name in source.shapes} == {"ema", "null"}
        assert source.sampling["model"] == "tiny" and source.sampling["sampler"] == "euler"
        assert torch.equal(source.tensor("null"), v1_state()["null"])
        for role in ("ema", "net"):
            full = {name.removeprefix(f"{role}."): x for name, x in v1_state().items()
                    if name.startswith(f"{role}.")}
            rows, weights = blank(shard(full)), ckpt.weights(where, role)
            ckpt.fill(rows, weights)
            assert holds(rows, full)
        assert ckpt.base_of(where, weights)["crc32"] == ckpt.fingerprint(weights)
    with pytest.raises(ValueError, match="holds no 'critic', but ema, net, null, opt"):
        ckpt.weights(old, "critic")


def test_the_flags_of_version_1_are_compared_as_any(old):
    saved = ckpt.read_manifest(old / "ckpt" / "step_0000002")
    flags, inputs = ckpt.flags_of(old, None), saved["meta"]["inputs"]
    assert flags["lr"] == 0.008 and flags["tile"] == [4, 4, 8]
    ckpt.differences(old, saved, flags | {"tile": (4, 4, 8), "new": 0}, inputs, set(), {"new": 0})
    with pytest.raises(ValueError, match="--new=1 .was 0."):
        ckpt.differences(old, saved, flags | {"new": 1}, inputs, set(), {"new": 0})


def test_damage_to_version_1_is_found(old, tmp_path):
    shutil.copytree(old / "ckpt", tmp_path / "copy" / "ckpt")
    path = tmp_path / "copy" / "ckpt" / "step_0000002"
    flip(path / "rank_00001.pt", 1000)
    with pytest.raises(ValueError, match="rank_00001.pt is not what was saved"):
        ckpt.stored(path, {"null"})
    with pytest.raises(ValueError, match="every checkpoint"):
        ckpt.latest(tmp_path / "copy", report=lambda _: None)


# ---- what does not fit ---------------------------------------------------------------------------------------------

def test_a_missing_path_is_an_error_that_lists_what_is_there(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*step_0000009.*step_0000001"):
        loads(tmp_path / "ckpt" / "step_0000009", state(1))
    assert ckpt.latest(tmp_path / "nothing") is None


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path):
    path, other = save(tmp_path, 1), state(1)
    del other["net.w"]
    other |= {"net.v": torch.zeros(2), "net.modulation": torch.zeros(1, 2, 4),
              "net.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as error:
        loads(path, other)
    for line in ("1 missing: net.v", "1 not wanted: net.w", "2 other than wanted: net.modulation",
                 "bfloat16"):
        assert line in str(error.value)


def test_a_manifest_of_another_version_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(ckpt, "VERSION", 1)
    with pytest.raises(ValueError, match="is of version 2, this code reads versions up to 1"):
        loads(path, state(1))


def test_fill_takes_each_ranks_rows_casts_them_and_refuses_other_shapes():
    asked = []

    def source(name, shape, first, last):
        asked.append((name, shape, first, last))
        return torch.arange(first, last, dtype=torch.float64)[:, None].expand(-1, 3)

    rows = {"w": (torch.zeros(2, 3), 4, (10, 3)), "none": (torch.zeros(0, 3), 10, (10, 3))}
    ckpt.fill(rows, source)
    assert asked == [("w", (10, 3), 4, 6)] and rows["w"][0].tolist() == [[4.0] * 3, [5.0] * 3]
    with pytest.raises(ValueError, match=r"w: got rows of shape \(1, 3\), wanted \(2, 3\)"):
        ckpt.fill({"w": rows["w"]}, lambda *_: torch.zeros(1, 3))


# ---- weights -------------------------------------------------------------------------------------------------------

def wan(blocks=2):
    """A small Wan model's tensors under Wan's own names, written from its source."""
    g = torch.Generator().manual_seed(0)
    shapes = {"patch_embedding": (8, 4, 1, 2, 2),
              "text_embedding.0": (8, 6), "text_embedding.2": (8, 8),
              "time_embedding.0": (8, 4), "time_embedding.2": (8, 8), "time_projection.1": (48, 8),
              "head.head": (16, 8)}
    names = {f"{n}.{w}": s if w == "weight" else s[:1]
             for n, s in shapes.items() for w in ("weight", "bias")}
    names["head.modulation"] = (1, 2, 8)
    for b in range(blocks):
        names[f"blocks.{b}.modulation"] = (1, 6, 8)
        for w in ("weight", "bias"):
            names[f"blocks.{b}.norm3.{w}"] = (8,)
            for n, s in (("ffn.0", (12, 8)), ("ffn.2", (8, 12))):
                names[f"blocks.{b}.{n}.{w}"] = s if w == "weight" else s[:1]
            for a in ("self_attn", "cross_attn"):
                shape = (8, 8) if w == "weight" else (8,)
                names |= {f"blocks.{b}.{a}.{x}.{w}": shape for x in "qkvo"}
        names |= {f"blocks.{b}.{a}.norm_{x}.weight": (8,)
                  for a in ("self_attn", "cross_attn") for x in "qk"}
    return {name: torch.randn(shape, generator=g) for name, shape in names.items()}


@pytest.mark.slow
def test_names_are_those_of_diffusers_own_conversion_and_come_back():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    ours = wan(12)
    theirs = convert_wan_transformer_to_diffusers({name: x.clone() for name, x in ours.items()})
    assert len(ours) == 27 * 12 + 15
    assert set(theirs) == {ckpt.to_diffusers(name) for name in ours}
    assert all(torch.equal(theirs[ckpt.to_diffusers(name)], x) for name, x in ours.items())
    assert all(ckpt.from_diffusers(ckpt.to_diffusers(name)) == name for name in ours)
    for name in ("blocks.3.norm1.weight", "blocks.3.norm30.weight", "blocks.3.ffn.20.bias",
                 "head.header", "x.norm3"):
        assert ckpt.to_diffusers(name) == name      # nothing that only begins or ends like one


@pytest.mark.parametrize("names", [lambda n: n, ckpt.to_diffusers, lambda n: f"diffusion_model.{n}",
                                   lambda n: f"model.diffusion_model.{n}"])
@pytest.mark.parametrize("layout", ["file", "folder", "pipeline", "sharded"])
def test_weights_are_recognised_by_their_names(tmp_path, names, layout):
    ours = wan()
    theirs = {names(name): x for name, x in ours.items()}
    folder = tmp_path / "transformer" if layout == "pipeline" else tmp_path
    if layout == "sharded":
        where = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(theirs)}
        for file in set(where.values()):
            save_file({key: x for key, x in theirs.items() if where[key] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        # not in the index: not ours to read
        save_file({"x": torch.zeros(1)}, tmp_path / "another.safetensors")
    else:
        folder.mkdir(exist_ok=True)
        save_file(theirs, folder / "model.safetensors")
    source = ckpt.weights(folder / "model.safetensors" if layout == "file" else tmp_path)
    rows = {name: (torch.zeros_like(x[len(x) // 2:]).bfloat16(), len(x) // 2, tuple(x.shape))
            for name, x in ours.items()}
    ckpt.fill(rows, source)
    for name, (x, first, _) in rows.items():
        assert torch.equal(x, ours[name][first:].bfloat16())


def test_only_the_rows_asked_for_are_read(tmp_path):
    save_file(wan(), tmp_path / "model.safetensors")
    some = ckpt.weights(tmp_path).rows("blocks.0.ffn.0.weight", 3, 5)
    assert some.shape == (2, 8) and torch.equal(some, wan()["blocks.0.ffn.0.weight"][3:5])


def test_a_key_too_many_or_too_few_is_listed(tmp_path):
    ours = wan()
    rows = shard(ours)
    changed = {k: v for k, v in ours.items() if k != "blocks.1.ffn.0.bias"} | {
        "vace_blocks.0.weight": torch.zeros(2), "head.modulation": torch.zeros(1, 3, 8)}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        ckpt.fill(rows, ckpt.weights(tmp_path))
    for line in ("1 missing: blocks.1.ffn.0.bias", "1 not wanted: vace_blocks.0.weight",
                 "1 other than wanted: head.modulation (1, 3, 8) (wanted (1, 2, 8))"):
        assert line in str(error.value)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    ours = wan()
    twice = ours | {"module.head.modulation": torch.zeros(1, 2, 8)}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="head.modulation under another name too"):
        ckpt.weights(tmp_path)


def test_other_files_are_refused_by_what_they_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing"):
        ckpt.weights(tmp_path / "nothing")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "model.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no weights at .*model.pth is a pickle.*save_file"):
        ckpt.weights(tmp_path / "pickle")
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file({name: torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=f"no Wan transformer.*it holds {name}"):
        ckpt.weights(tmp_path / "flux.safetensors")
    save_file(wan(), tmp_path / "a.safetensors")
    save_file(wan(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="twice, in a.safetensors and in b.safetensors: several models"):
        ckpt.weights(tmp_path)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="c.safetensors is damaged"):
        ckpt.weights(tmp_path / "c.safetensors")


def test_a_shard_that_is_missing_or_disagrees_with_the_index_is_named(tmp_path):
    save_file(wan(), tmp_path / "model-1.safetensors")
    where = dict.fromkeys(wan(), "model-1.safetensors") | {"more": "model-2.safetensors"}
    index = {"weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="names model-2.safetensors, which is missing: download"):
        ckpt.weights(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="1 missing: more; 1 not wanted: other"):
        ckpt.weights(tmp_path)


def test_a_run_or_a_checkpoint_gives_the_weights_of_a_role(tmp_path):
    full = state(1) | {"null": torch.ones(2, 3)}
    path = save(tmp_path, 1, full)
    for where in (tmp_path, path):
        net, ema = ckpt.weights(where, "net"), ckpt.weights(where)
        assert set(net.shapes) == {"w", "modulation", "bias"} and ema.shapes == {"w": (10, 3)}
        assert torch.equal(net.tensor("w"), full["net.w"])
        assert torch.equal(ema.rows("w", 2, 4), full["ema.w"][2:4])
        assert ema.manifest["meta"] == {"note": "step 1"}
    assert torch.equal(ckpt.stored(path).tensor("null"), full["null"])
    flip(path / "rank_00000.ema.pt", 700)
    with pytest.raises(ValueError, match="CRC32"):
        ckpt.weights(path)


# ---- weights as others leave them ----------------------------------------------------------------------------------


def reads(path, wanted):
    """Whether a path gives just these tensors, whole and in parts."""
    source = ckpt.weights(path)
    assert source.shapes == {name: tuple(x.shape) for name, x in wanted.items()}
    for name, x in wanted.items():
        half = len(x) // 2
        part = source.rows(name, half, half + 1)
        if not torch.equal(source.tensor(name), x) or not torch.equal(part, x[half:half + 1]):
            return False
    return True


@pytest.mark.parametrize("change", [
    lambda n: f"model.{n}", lambda n: f"module.{n}", lambda n: f"_orig_mod.{n}", lambda n: f"transformer.{n}",
    lambda n: f"pipe.dit.{n}", lambda n: f"module._orig_mod.module.{n}", lambda n: f"module.model.diffusion_model.{n}",
    lambda n: f"_fsdp_wrapped_module.{n}", lambda n: f"generator_ema.model.{n}",
    lambda n: n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    lambda n: "model." + n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._orig_mod.")
                          .replace(".ffn", ".module.ffn"),
])
@pytest.mark.parametrize("names", [lambda n: n, ckpt.to_diffusers])
def test_what_trainers_put_before_and_into_names_is_taken_off(tmp_path, change, names):
    save_file({change(names(name)): x for name, x in wan().items()}, tmp_path / "a.safetensors")
    assert reads(tmp_path, wan())


def test_two_models_in_one_file_are_refused_by_their_prefixes(tmp_path):
    both = {f"{front}.{name}": x for front in ("generator", "critic") for name, x in wan().items()}
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"several models, under critic\., generator\.: write the one"):
        ckpt.weights(tmp_path)


def test_a_tensor_that_is_only_called_alike_gives_no_prefix(tmp_path):
    alike = {"vace_patch_embedding.weight": torch.ones(2), "submodule.weight": torch.ones(2)}
    save_file(wan() | alike, tmp_path / "a.safetensors")
    assert set(ckpt.weights(tmp_path).shapes) == {*wan(), *alike}


def experts(folder, *names, pipeline=None):
    for name in names:
        (folder / name).mkdir(parents=True)
        save_file(wan(), folder / name / "a.safetensors")
    if pipeline:
        (folder / "model_index.json").write_text(json.dumps(pipeline))


def test_two_experts_are_refused_by_both_names(tmp_path):
    experts(tmp_path / "diffusers", "transformer", "transformer_2")
    with pytest.raises(ValueError, match="holds two experts, transformer for high .* transformer_2 .*/transformer_2$"):
        ckpt.weights(tmp_path / "diffusers")
    experts(tmp_path / "wan", "high_noise_model", "low_noise_model")
    with pytest.raises(ValueError, match="holds two experts, high_noise_model for high noise and low_noise_model"):
        ckpt.weights(tmp_path / "wan")
    experts(tmp_path / "half", "transformer", pipeline={"transformer": ["d", "W"], "transformer_2": ["d", "W"]})
    with pytest.raises(ValueError, match="holds two experts"):      # one of them was not downloaded
        ckpt.weights(tmp_path / "half")
    experts(tmp_path / "comfy", "x")
    for name in ("high", "low"):
        save_file(wan(), tmp_path / "comfy" / f"wan2.2_{name}_noise_14B.safetensors")
    with pytest.raises(ValueError, match="wan2.2_high_noise_14B.safetensors and in wan2.2_low_noise_14B.*experts"):
        ckpt.weights(tmp_path / "comfy")
    assert reads(tmp_path / "diffusers" / "transformer_2", wan())
    assert reads(tmp_path / "comfy" / "wan2.2_low_noise_14B.safetensors", wan())


def test_of_two_experts_the_one_that_is_named_is_read(tmp_path):
    for high, low in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        folder = tmp_path / high
        experts(folder, high, low)
        save_file({name: x + 1 for name, x in wan().items()}, folder / low / "a.safetensors")
        for expert, name in (("high", high), ("low", low)):
            source = ckpt.weights(folder, expert=expert)
            assert source.origin == str(folder / name)
            assert all(torch.equal(source.tensor(key), x + (expert == "low")) for key, x in wan().items())
            assert ckpt.beside(folder, expert) == str(folder / (low if expert == "high" else high))
            assert ckpt.beside(folder / name, expert) == ckpt.beside(folder, expert)


def test_an_expert_that_is_not_there_is_named(tmp_path):
    experts(tmp_path, "transformer", pipeline={"transformer": ["d", "W"], "transformer_2": [None, None]})
    with pytest.raises(ValueError, match="holds no transformer_2, the expert for low noise"):
        ckpt.weights(tmp_path, expert="low")
    assert ckpt.beside(tmp_path, "high") is None


def test_the_images_keys_and_values_have_names_in_files_of_adapters_too():
    for theirs, ours in (("attn2.add_k_proj", "k"), ("cross_attn.v_img", "v"), ("cross_attn_k_img", "k"),
                         ("attn2_add_v_proj", "v")):
        assert ckpt.LINEARS[theirs] == f"cross_attn.{ours}_img"


def test_norms_that_no_layer_has_are_passed_over(tmp_path):
    stray = {"blocks.0.cross_attn.norm_added_q.weight": torch.ones(2)}
    save_file(wan() | stray, tmp_path / "a.safetensors")
    assert set(ckpt.weights(tmp_path).shapes) == set(wan())


def test_a_pipeline_of_one_expert_is_read(tmp_path):
    experts(tmp_path, "transformer", pipeline={"transformer": ["d", "W"], "transformer_2": [None, None]})
    assert reads(tmp_path, wan())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_refused_by_file_and_tensor_as_it_passes(tmp_path, value, dtype):
    ours = {name: x.to(dtype) for name, x in wan().items()}
    ours["blocks.1.ffn.0.weight"][-1, -1] = value
    for name in ("good", "bad"):
        some = {key: x for key, x in ours.items() if (key == "blocks.1.ffn.0.weight") == (name == "bad")}
        save_file(some, tmp_path / f"{name}.safetensors")
    source = ckpt.weights(tmp_path)
    source.rows("blocks.1.ffn.0.weight", 0, 3)
    with pytest.raises(ValueError, match="/bad.safetensors: blocks.1.ffn.0.weight holds NaN or infinity"):
        ckpt.fill(blank(shard(wan())), source)


def test_what_one_rank_cannot_read_fails_on_all():
    rows = {"w": (torch.zeros(2), 0, (2,))}
    with pytest.raises(OSError, match="the weights: failed on another rank"):
        ckpt.fill(rows, ckpt.in_memory({"w": torch.ones(2)}, "memory"), rank=0, world=2, agree=lambda fine: False)


@pytest.mark.parametrize("root", ["train", "distill", "sample", "evaluate"])
def test_the_roots_fill_nets_on_all_ranks_together(root):
    calls = re.findall(r".*ckpt\.fill[(,].*", (ROOT / f"{root}.py").read_text())
    assert calls and all("**world.ranks)" in call or "partial(ckpt.fill, source=" in call for call in calls)
    assert "fill(local_rows(net), **world.ranks)" in (ROOT / "parallel.py").read_text()     # to whom they give these


def test_a_value_of_fp8_that_is_not_a_number_is_refused(tmp_path):
    ours = wan() | {"blocks.0.ffn.0.weight": torch.full((12, 8), math.nan).to(torch.float8_e4m3fn)}
    save_file(ours, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="blocks.0.ffn.0.weight holds NaN"):
        ckpt.weights(tmp_path)


def test_large_values_are_finite_whatever_their_sum(tmp_path):
    ours = wan() | {"blocks.0.ffn.0.weight": torch.full((12, 8), 6e4, dtype=torch.float16)}
    save_file(ours, tmp_path / "a.safetensors")
    assert reads(tmp_path, ours)


def test_a_checkpoint_that_holds_nan_is_refused_by_file_and_tensor(tmp_path):
    bad = state(1)
    bad["net.w"][3, 1] = math.nan
    path = save(tmp_path, 1, bad)
    with pytest.raises(ValueError, match="step_0000001/rank_00000.net.pt: net.w holds NaN or infinity"):
        loads(path, state(1))
    with pytest.raises(ValueError, match="net.w holds NaN"):
        ckpt.weights(tmp_path, "net").tensor("w")
    assert torch.equal(ckpt.weights(tmp_path, "ema").tensor("w"), bad["ema.w"])


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("text, says", [
    ('{"weight_map": {"a": "b.saf', "index.json is damaged, it is not JSON"),
    ("", "index.json is damaged, it is not JSON"),
    ('{"metadata": {}}', "has no weight_map .*download it again"),
    ("[]", "has no weight_map"),
    ('{"weight_map": ["a.safetensors"]}', "has no weight_map"),
    ('{"weight_map": {"a": 1}}', "has no weight_map"),
])
def test_a_faulty_index_is_named_and_what_to_do(tmp_path, text, says):
    save_file(wan(), tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=says):
        ckpt.weights(tmp_path)


@pytest.mark.parametrize("front", ["transformer/", "./", "C:\\models\\wan\\", "/home/x/", ""])
def test_an_index_whose_paths_have_folders_in_front_finds_the_files_beside_it(tmp_path, front):
    save_file(wan(), tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(wan(), f"{front}a.safetensors")}))
    assert reads(tmp_path, wan())
    assert reads(tmp_path / INDEX, wan())


def test_an_index_of_files_in_folders_finds_them_there(tmp_path):
    experts(tmp_path, "shards")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(wan(), "shards/a.safetensors")}))
    assert reads(tmp_path, wan())


@pytest.mark.parametrize("there, asked", [
    (["a-00001-of-00002.safetensors"], ""), (["a-00001-of-00002.safetensors"], "a-00001-of-00002.safetensors"),
    (["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], "a-00002-of-00002.safetensors")])
def test_some_of_several_files_of_a_model_are_refused(tmp_path, there, asked):
    for name in there:
        save_file(wan(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is one of 2 files of a model, and not all of them are named"):
        ckpt.weights(tmp_path / asked)


@pytest.mark.parametrize("name, says", [
    ("a.gguf", "a.gguf is quantized for inference .GGUF.*take the .safetensors in bf16"), ("a.pt", "a.pt is a pickle"),
    ("a.PTH", "a.PTH is a pickle"), ("a.bin", "a.bin is a pickle"), ("a.ckpt", "a.ckpt is a pickle"),
    ("a.txt", "a .safetensors file or a folder of them is wanted")])
@pytest.mark.parametrize("asked", ["folder", "file"])
def test_files_of_other_kinds_are_refused_by_their_cause(tmp_path, name, says, asked):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=says):
        ckpt.weights(tmp_path if asked == "folder" else tmp_path / name)


@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS.*git lfs pull"),
    (b"\n<!doctype html>", "is a web page"), (b"PK\x03\x04 and more", "is a pickle"),
    (b"GGUF and more", "is quantized"),
    (b"", "is damaged: download it again"), (b"x" * 100, "is damaged: download it again")])
def test_what_is_no_safetensors_inside_is_refused_by_its_cause(tmp_path, content, says):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.safetensors {says}"):
        ckpt.weights(tmp_path)


# ---- eight bits ----------------------------------------------------------------------------------------------------


def in_fp8(scales, marker=True, names=lambda name: name, suffix="scale_weight"):
    """wan() with its matrices in scaled fp8 -> what is in the file, what it stands for. scales(weight) -> its scale."""
    held, meant = {}, {}
    for name, x in wan().items():
        if not name.endswith("weight") or x.ndim != 2:
            held[names(name)] = meant[name] = x
            continue
        scale = scales(x)
        parts = scale.flatten(1).shape[1] if scale.ndim > 1 else 1
        wide = scale.reshape(len(x), parts).repeat_interleave(x.shape[1] // parts, 1) if scale.numel() > 1 else scale
        held[names(name)] = (x / wide).to(torch.float8_e4m3fn)
        held[names(name).removesuffix("weight") + suffix] = scale
        held[names(name).removesuffix("weight") + "scale_input"] = torch.ones(())
        meant[name] = held[names(name)].float() * wide
    if marker:
        held["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return held, meant


@pytest.mark.slow
@pytest.mark.parametrize("scales", [
    lambda x: torch.tensor(.25), lambda x: torch.tensor([.5]), lambda x: torch.tensor(.5).bfloat16(),
    lambda x: torch.arange(1., len(x) + 1) / 64, lambda x: torch.arange(1., len(x) + 1)[:, None] / 64,
    lambda x: torch.rand(len(x), 2, 1) + .1], ids=["number", "one", "bf16", "rows", "columns", "blocks"])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("names", [lambda n: n, lambda n: f"model.diffusion_model.{n}"])
def test_scaled_fp8_is_read_with_its_scales(tmp_path, scales, suffix, names):
    held, meant = in_fp8(scales, suffix == "scale_weight", names, suffix)
    if suffix == "weight_scale":
        held[names("blocks.0.ffn.0.comfy_quant")] = torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
    save_file(held, tmp_path / "a.safetensors")
    assert reads(tmp_path, meant)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_read(tmp_path, dtype):
    eight = {name: x.to(dtype) for name, x in wan().items()}
    save_file(eight, tmp_path / "a.safetensors")
    assert reads(tmp_path, {name: x.float() for name, x in eight.items()})


def test_scaled_fp8_without_one_of_its_scales_is_refused(tmp_path):
    held, _ = in_fp8(lambda x: torch.tensor(.25))
    del held["blocks.1.ffn.2.scale_weight"]
    save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="in scaled fp8, and the scale of blocks.1.ffn.2.weight is missing"):
        ckpt.weights(tmp_path)


@pytest.mark.parametrize("more, says", [
    ({"blocks.0.ffn.0.weight": torch.ones(12, 8, dtype=torch.int8)}, "blocks.0.ffn.0.weight in torch.int8"),
    ({"blocks.0.ffn.0.weight": torch.ones(12, 8, dtype=torch.int8), "blocks.0.ffn.0.weight_scale": torch.ones(12, 1)},
     "int8"),
    ({"blocks.0.ffn.0.weight": torch.ones(96, 1, dtype=torch.uint8), "blocks.0.ffn.0.weight.absmax": torch.ones(2)},
     "weight.absmax in"),
    ({"blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4": torch.ones(2)}, "bitsandbytes__nf4"),
    ({"blocks.0.ffn.0.SCB": torch.ones(12)}, "SCB"), ({"blocks.0.ffn.0.qweight": torch.ones(12)}, "qweight"),
    ({"blocks.0.ffn.0.wscales": torch.ones(12)}, "wscales"),
    ({"blocks.0.ffn.0.weight._scale": torch.ones(12)}, "_scale"),
    ({"blocks.0.ffn.0.weight_scale": torch.ones(2, 2)}, r"weight_scale is of shape \(2, 2\), blocks.0.ffn.0.weight of"),
    ({"blocks.0.ffn.0.weight_scale": torch.ones(12, 3)}, r"weight_scale is of shape \(12, 3\)"),
    ({"blocks.0.ffn.0.weight_scale": torch.ones(12, 2, 2)}, r"weight_scale is of shape \(12, 2, 2\)"),
    ({"blocks.0.ffn.0.weight_scale": torch.ones(12, 2).to(torch.float8_e4m3fn)}, "weight_scale is of shape"),
])
def test_what_is_quantized_in_other_ways_is_refused(tmp_path, more, says):
    save_file(wan() | more, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"quantized in a way that is not read .*{says}.*take the .safetensors in"):
        ckpt.weights(tmp_path)


# ---- the hub -------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub: a folder of repositories, of which it makes copies of what is asked for."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked = folder, []
        monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=self.download))

    def download(self, name, allow_patterns=(), ignore_patterns=()):
        repo, cache = self.folder / name, self.folder / "cache" / name
        if not repo.exists():
            raise OSError("no\nsuch repository")
        allowed, ignored = (p if isinstance(p, list) else [p] for p in (allow_patterns, ignore_patterns or "|"))
        for file in (file for file in repo.rglob("*") if file.is_file()):
            inside = str(file.relative_to(repo))
            if any(fnmatch(inside, p) for p in allowed) and not any(fnmatch(inside, p) for p in ignored):
                self.asked.append(inside)
                (cache / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / inside)
        return str(cache)


def test_a_name_on_the_hub_is_fetched_and_no_more_of_it_than_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    experts(tmp_path / "hub" / "wan" / "pipeline", "transformer", "text_encoder", "vae")
    experts(tmp_path / "hub" / "wan" / "plain", "text_encoder")
    for repo, parts in (("pipeline", ["transformer", "text_encoder", "vae"]), ("plain", ["."])):
        for part in parts:
            (tmp_path / "hub" / "wan" / repo / part / "config.json").write_text("{}")
    save_file(wan(), tmp_path / "hub" / "wan" / "plain" / "model.safetensors")
    assert reads("wan/pipeline", wan())
    assert {name for name in hub.asked if name.endswith("safetensors")} == {"transformer/a.safetensors"}
    hub.asked.clear()
    assert reads("wan/plain", wan())
    assert {name for name in hub.asked if name.endswith("safetensors")} == {"model.safetensors"}
    assert ckpt.base_of("wan/plain", ckpt.weights("wan/plain"))["path"] == "wan/plain"


def test_two_experts_on_the_hub_are_refused_before_they_are_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    pipeline = {"transformer": ["d", "W"], "transformer_2": ["d", "W"]}
    experts(tmp_path / "hub" / "wan" / "two", "transformer", "transformer_2", pipeline=pipeline)
    (tmp_path / "hub" / "wan" / "two" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds two experts"):
        ckpt.weights("wan/two")
    assert {*hub.asked} == {"model_index.json", "transformer/config.json"}


def test_what_is_neither_here_nor_on_the_hub_is_to_be_downloaded_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub", monkeypatch)
    with pytest.raises(FileNotFoundError, match="no weights at wan/none; .*download it first .*no such repository.$"):
        ckpt.weights("wan/none")
    (tmp_path / "out").mkdir()
    for path in ("out/none", "none", "a/b/c", tmp_path / "none" / "x"):     # these are no names of the hub
        with pytest.raises(FileNotFoundError, match=r"no weights at .* holds [\w, ]+$"):
            ckpt.weights(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="requirements-wan.txt, or download it first"):
        ckpt.weights("wan/none")
    assert hub.asked == []


def test_a_base_that_is_a_link_is_known_by_the_links_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(wan(), tmp_path / "blob")
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    assert ckpt.base_of("a.safetensors", ckpt.weights("a.safetensors"))["path"] == str(tmp_path / "a.safetensors")


# ---- LoRA files of others ------------------------------------------------------------------------------------------

MODULES = [f"blocks.{b}.{m}" for b in range(2) for m in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
OTHERS = {      # how a factor of a module is named
    "diffusers": lambda m, f: f"transformer.{ckpt.to_diffusers(m)}.lora_{f}.weight",
    "peft": lambda m, f: f"base_model.model.{ckpt.to_diffusers(m)}.lora_{f}.weight",
    "peft in a model": lambda m, f: f"pipe.dit.{m}.lora_{f}.default.weight",
    "comfy": lambda m, f: f"diffusion_model.{m}.lora_{dict(A='down', B='up')[f]}.weight",
    "comfy and peft": lambda m, f: f"diffusion_model.{m}.lora_{f}.weight",
    "old": lambda m, f: f"{m}.lora.{dict(A='down', B='up')[f]}.weight",
    "kohya": lambda m, f: f"lora_unet_{m.replace('.', '_')}.lora_{dict(A='down', B='up')[f]}.weight",
    "wrapped": lambda m, f: f"module._orig_mod.{m}.lora_{f}.weight",
}


def factors(rank=3):
    """{module: (A, B)} for some modules of wan()."""
    g, ours = torch.Generator().manual_seed(5), wan()
    shapes = {m: ours[f"{m}.weight"].shape for m in MODULES}
    return {m: (torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g)) for m, (o, i) in shapes.items()}


def lora_file(path, form, alpha=None, rank=3, **more):
    held = {OTHERS[form](m, f): x for m, both in factors(rank).items() for f, x in zip("AB", both)}
    if alpha is not None:
        held |= {re.sub(r"\.lora.*", ".alpha", name): torch.tensor(float(alpha)) for name in held}
    path.parent.mkdir(exist_ok=True)
    save_file(held | more, path)
    return path


def folds(path, scale):
    """Whether the weights with the adapter at a path are W + scale B A, whole and in parts."""
    (path.parent / "base").mkdir(exist_ok=True)
    save_file(wan(), path.parent / "base" / "a.safetensors")
    source = ckpt.folded(ckpt.weights(path.parent / "base"), ckpt.lora(path))
    meant = wan()
    for m, (A, B) in factors().items():
        meant[f"{m}.weight"] = meant[f"{m}.weight"] + scale * (B @ A)
    assert source.shapes == {name: tuple(x.shape) for name, x in meant.items()}
    whole = all(torch.allclose(source.tensor(name), x, atol=1e-6) for name, x in meant.items())
    return whole and all(torch.allclose(source.rows(name, 1, 3), x[1:3], atol=1e-6) for name, x in meant.items())


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("alpha, scale", [(None, 1), (6, 2), (1.5, .5)])
def test_an_adapter_of_others_is_read_at_its_own_scale(tmp_path, form, alpha, scale):
    assert folds(lora_file(tmp_path / "l" / "x.safetensors", form, alpha), scale)


@pytest.mark.parametrize("settings, scale", [
    ({"lora_alpha": 6, "r": 3}, 2), ({"lora_alpha": 6, "r": 3, "use_rslora": True}, 6 / 3**.5), ({}, 1)])
def test_the_scale_that_peft_and_diffusers_write_beside_the_tensors_counts(tmp_path, settings, scale):
    path = lora_file(tmp_path / "l" / "adapter_model.safetensors", "peft")
    (tmp_path / "l" / "adapter_config.json").write_text(json.dumps(settings))
    assert folds(path, scale)
    told = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    held = {OTHERS["diffusers"](m, f): x for m, both in factors().items() for f, x in zip("AB", both)}
    save_file(held, tmp_path / "l" / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": told})
    assert folds(tmp_path / "l" / "pytorch_lora_weights.safetensors", scale)


def test_an_alpha_beside_the_tensors_counts_before_what_the_file_says(tmp_path):
    path = lora_file(tmp_path / "l" / "adapter_model.safetensors", "comfy", 6)
    (tmp_path / "l" / "adapter_config.json").write_text('{"lora_alpha": 30}')
    assert folds(path, 2)


def test_an_adapter_in_a_folder_and_one_of_a_run_of_ours_are_read(tmp_path):
    path = lora_file(tmp_path / "l" / "x.safetensors", "comfy", 6)
    read = ckpt.lora(path.parent)
    assert read.ranks == [3] and set(read.scales.values()) == {2.0}
    own = {f"ema.{m}.lora.main.{f}": x for m, both in factors().items() for f, x in zip("AB", both)}
    ckpt.save(tmp_path / "run", 1, shard(own), {"config": {"lora_alpha": 6}})
    mine = ckpt.lora(tmp_path / "run")
    assert mine.scales == read.scales
    assert all(torch.equal(mine.source.tensor(name), read.source.tensor(name)) for name in read.source.shapes)
    with pytest.raises(ValueError, match="holds whole weights, not an adapter"):
        save(tmp_path / "whole", 1)
        ckpt.lora(tmp_path / "whole")


@pytest.mark.parametrize("more, says", [
    ({"text_embedding.0.lora_A.weight": torch.ones(3, 6)}, "text_embedding.0.lora_A.weight"),
    ({"diffusion_model.blocks.0.norm3.diff": torch.ones(8)}, "diffusion_model.blocks.0.norm3.diff"),
    ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(3, 8)}, "transformer_2"),
    ({"lora_te_text_model_blocks_0_self_attn_q.lora_down.weight": torch.ones(3, 8)}, "lora_te_text"),
    ({"blocks.0.self_attn.q.dora_scale": torch.ones(8)}, "blocks.0.self_attn.q.dora_scale"),
    ({"blocks.0.self_attn.q.hada_w1_a": torch.ones(8, 3)}, "hada_w1_a")])
def test_targets_that_are_not_ours_are_named_and_refused(tmp_path, more, says):
    path = lora_file(tmp_path / "l" / "x.safetensors", "comfy", **more)
    with pytest.raises(ValueError, match=f"changes what is no Linear of a block's attention .* here: .*{says}"):
        ckpt.lora(path)


def test_adapters_that_are_none_or_not_whole_are_refused(tmp_path):
    save_file(wan(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is no LoRA file: it holds .* 69 in all"):
        ckpt.lora(tmp_path / "model.safetensors")
    path = lora_file(tmp_path / "l" / "x.safetensors", "comfy")
    with pytest.raises(ValueError, match="x.safetensors is a LoRA file, not a model: .*--lora_init=.*--lora="):
        ckpt.weights(path)
    held = {f"blocks.0.ffn.0.lora_{f}.weight": x for f, x in zip("AB", factors()["blocks.0.ffn.0"])}
    save_file({name: x for name, x in held.items() if "_A" in name}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="half.safetensors does not fit: 1 missing: blocks.0.ffn.0.B"):
        ckpt.lora(tmp_path / "half.safetensors")
    save_file(held | {"blocks.0.ffn.0.lora_B.weight": torch.ones(12, 4)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="blocks.0.ffn.0 has A of shape .3, 8., B of shape .12, 4"):
        ckpt.lora(tmp_path / "odd.safetensors")
    save_file({name: x[:, :3].clone() for name, x in held.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"adapter of another model: blocks.0.ffn.0 \(12, 3\) where \(12, 8\) is"):
        ckpt.folded(ckpt.weights(tmp_path / "model.safetensors"), ckpt.lora(tmp_path / "other.safetensors"))
    A, B = held.values()
    down, up = held
    for odd, says in (({down: A, up: B[:, 0]}, "B of shape .12,"), ({down: A[:0], up: B[:, :0]}, "A of shape .0, 8"),
                      ({down: A[..., None], up: B[..., None]}, "A of shape .3, 8, 1"),
                      (held | {"blocks.0.ffn.0.alpha": torch.ones(2)}, "alpha is of shape .2,.*an alpha is a number")):
        save_file({name: x.clone(memory_format=torch.contiguous_format) for name, x in odd.items()},
                  tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=says):
            ckpt.lora(tmp_path / "odd.safetensors")
    held["blocks.0.ffn.0.lora_A.weight"][0, 0] = math.nan
    save_file(held, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="nan.safetensors: blocks.0.ffn.0.lora_A.weight holds NaN"):
        ckpt.lora(tmp_path / "nan.safetensors").source.tensor("blocks.0.ffn.0.A")


@pytest.mark.parametrize("told", [{"alpha_pattern": {"q": 3}}, {"use_dora": True}])
def test_settings_of_an_adapter_that_are_not_read_are_refused(tmp_path, told):
    lora_file(tmp_path / "l" / "adapter_model.safetensors", "peft")
    (tmp_path / "l" / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"has {next(iter(told))} .*not read"):
        ckpt.lora(tmp_path / "l")


@pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": null}', '{"lora_alpha": "x"}'])
def test_damaged_settings_of_an_adapter_are_named(tmp_path, text):
    lora_file(tmp_path / "l" / "adapter_model.safetensors", "peft")
    (tmp_path / "l" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json is damaged, it is not the JSON of PEFT's settings"):
        ckpt.lora(tmp_path / "l")
    held = {OTHERS["diffusers"](m, f): x for m, both in factors().items() for f, x in zip("AB", both)}
    save_file(held, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="lora_adapter_metadata of .*x.safetensors is damaged"):
        ckpt.lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("asked", ["folder", "file"])
def test_settings_beside_the_only_file_of_a_folder_count_under_any_name(tmp_path, asked):
    path = lora_file(tmp_path / "l" / "my style.safetensors", "peft")
    (path.parent / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3}')
    assert set(ckpt.lora(path.parent if asked == "folder" else path).scales.values()) == {2.0}
    lora_file(path.with_name("another.safetensors"), "peft")
    assert set(ckpt.lora(path).scales.values()) == {1.0}


def test_training_goes_on_from_an_adapter_at_another_scale_with_equal_weights(tmp_path):
    read = ckpt.lora(lora_file(tmp_path / "l" / "x.safetensors", "comfy", 6))
    rows = {f"{m}.lora.main.{f}": (torch.zeros_like(x), 0, tuple(x.shape))
            for m, both in factors().items() for f, x in zip("AB", both)}
    rows["blocks.0.self_attn.k.lora.main.A"] = (torch.zeros(3, 8), 0, (3, 8))     # not in the file
    ckpt.fill(rows, ckpt.continued(read, .5, lambda name, shape, first, last: torch.full(shape, 7.)))
    for m, (A, B) in factors().items():
        A2, B2 = (rows[f"{m}.lora.main.{f}"][0] for f in "AB")
        assert torch.allclose(.5 * B2 @ A2, 2 * B @ A, atol=1e-5)
    assert (rows["blocks.0.self_attn.k.lora.main.A"][0] == 7).all()
    del rows["blocks.0.self_attn.k.lora.main.A"]
    ckpt.fill(rows, ckpt.continued(read, 2.0, None))      # at its own scale, to the bit
    assert all(torch.equal(rows[f"{m}.lora.main.B"][0], B) for m, (_, B) in factors().items())
