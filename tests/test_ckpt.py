"""Checkpoints and weight formats: what is saved comes back on any number of ranks, what was altered never does."""
import errno
import json
import os
import signal
import threading
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckpt


def state(seed=0):
    """What a run saves: fp32 and bf16, odd sizes, one row, no row, one number."""
    g = torch.Generator().manual_seed(seed)
    return {"net.w": torch.randn(10, 3, generator=g), "net.modulation": torch.randn(1, 6, 4, generator=g),
            "net.bias": torch.randn(7, generator=g).bfloat16(), "ema.w": torch.randn(10, 3, generator=g),
            "empty": torch.zeros(0, 3), "updates": torch.tensor(7 + seed)}


def shard(tensors, index=0, parts=1):
    """Rows as FSDP deals them: parts of ceil(n / parts), the last ones smaller or empty; a number is everywhere."""
    rows = {}
    for name, x in tensors.items():
        if x.ndim == 0:
            rows[name] = (x.clone(), 0, ())
        else:
            n = -(-len(x) // parts)
            rows[name] = (x[index * n:(index + 1) * n].clone(), min(index * n, len(x)), tuple(x.shape))
    return rows


def blank(rows):
    return {name: (torch.full_like(x, 99), first, shape) for name, (x, first, shape) in rows.items()}


def on_ranks(world, work):
    """[work(rank, agree)] of `world` threads that share an `agree`; an exception is returned in place of a result."""
    barrier, oks, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

    def run(rank):
        def agree(ok):
            oks[rank] = bool(ok)
            barrier.wait()
            together = all(oks)
            barrier.wait()
            return together
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
    return all(torch.equal(x, tensors[name]) and x.dtype == tensors[name].dtype for name, (x, _, _) in rows.items())


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# ---- any world size ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world, parts", [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (3, 3)])
def test_any_world_size_reads_what_any_other_wrote(tmp_path, world, parts):
    full = state()
    saved = on_ranks(world, lambda rank, agree: ckpt.save(
        tmp_path, 5, shard(full, rank % parts, parts), {"lr": 0.1}, rank=rank, world=world, agree=agree))
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
    full = {"w": torch.randn(64, 100), "n": torch.tensor(1)}
    on_ranks(world, lambda rank, agree: ckpt.save(
        tmp_path, 1, shard(full, rank % parts, parts), {}, rank=rank, world=world, agree=agree))
    files = [torch.load(f, weights_only=True) for f in sorted(tmp_path.glob("ckpt/*/rank_*.pt"))]
    assert [len(f["w"]) for f in files] == [16] * 4
    assert ["n" in f for f in files] == [True, False, False, False]


def test_a_view_does_not_take_its_storage_along(tmp_path):
    x = torch.randn(1000, 100)
    path = ckpt.save(tmp_path, 1, {"w": (x[:10], 0, (10, 100))}, {})
    assert (path / "rank_00000.pt").stat().st_size < 10_000


@pytest.mark.parametrize("held, says", [
    ([(0, 4, (10,)), (5, 10, (10,))], "every row of w"),                    # a hole
    ([(0, 6, (10,)), (5, 10, (10,))], "every row of w"),                    # an overlap
    ([(0, 5, (10,)), (0, 5, (10,))], "every row of w"),                     # the end is missing
    ([(0, 5, (10,)), (5, 10, (12,))], "on rank 1"),                         # two opinions on the shape
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
    for file in (path / "rank_00000.pt", path / "manifest.json"):
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
    file = path / "rank_00000.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="rank_00000.pt is missing or not of"):
        loads(path, state(2))
    file.unlink()
    with pytest.raises(ValueError, match="rank_00000.pt is missing or not of"):
        loads(path, state(2))
    assert ckpt.latest(tmp_path, report=lambda _: None) == before


def test_a_run_never_starts_again_over_its_damaged_checkpoints_nor_passes_over_the_one_that_is_asked_for(tmp_path):
    def found(**more):
        return ckpt.found(tmp_path, flags={"lr": 1}, free=set(), inputs={}, report=lambda _: None, **more)

    for step in (1, 2):
        ckpt.save(tmp_path, step, shard(state(step)), {"config": {"lr": 1}, "inputs": {}})
    first, second = ckpt.steps(tmp_path).values()
    with pytest.raises(ValueError, match="has gone on to step_0000002"):
        found(resume=first)
    (second / "rank_00000.pt").unlink()
    assert found(resume=None)[0] == first == found(resume=first)[0]
    with pytest.raises(ValueError, match="rank_00000.pt is missing"):
        found(resume=second)
    (first / "rank_00000.pt").unlink()
    with pytest.raises(ValueError, match="every checkpoint of .* is damaged"):
        found(resume=None)


def test_all_ranks_fall_back_when_only_one_of_them_sees_the_damage(tmp_path):
    full = state()
    paths = [on_ranks(2, lambda rank, agree: ckpt.save(
        tmp_path, step, shard(full, rank, 2), {}, rank=rank, world=2, agree=agree))[0] for step in (1, 2)]
    flip(paths[1] / "rank_00001.pt", 700)
    said = [[], []]
    found = on_ranks(2, lambda rank, agree: ckpt.latest(
        tmp_path, rank=rank, world=2, agree=agree, report=said[rank].append))
    assert found == [paths[0], paths[0]]
    assert "rank_00001.pt" in said[1][0] and "another rank" in said[0][0]
    errors = on_ranks(2, lambda rank, agree: ckpt.load(
        paths[1], blank(shard(full, rank, 2)), rank=rank, world=2, agree=agree))
    assert isinstance(errors[0], OSError) and isinstance(errors[1], ValueError)


def test_the_files_are_checked_before_they_are_opened(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    flip(path / "rank_00000.pt", 700)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ValueError, match="CRC32"):
        loads(path, state(1))


def forge(path, content):
    """Puts other content into a checkpoint's file and makes size and CRC32 agree with it, as somebody hostile would."""
    torch.save(content, path / "rank_00000.pt")
    data = (path / "rank_00000.pt").read_bytes()
    manifest = ckpt.read_manifest(path)
    manifest["files"]["rank_00000.pt"] = {"size": len(data), "crc32": zlib.crc32(data)}
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
def test_a_file_that_holds_anything_but_the_manifests_tensors_is_refused(tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    forge(path, change(torch.load(path / "rank_00000.pt", weights_only=True)))
    with pytest.raises(ValueError, match=says):
        loads(path, state(1))
    assert not os.path.exists("evil")


# ---- saves that do not end -----------------------------------------------------------------------------------------

KILLS = {"among the bytes": (ckpt.Counted, "write"), "before the manifest": (ckpt, "digest"),
         "before the name": (ckpt, "sync_folder"), "before pruning": (ckpt, "steps"),
         "amid pruning": (ckpt.shutil, "rmtree")}


@pytest.mark.parametrize("when", KILLS)
def test_a_save_killed_at_any_point_leaves_a_valid_latest_and_no_trace_after_the_next(tmp_path, when):
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
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [f"step_000000{expected}", "step_0000004"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_full_disk_on_one_rank_fails_on_all_and_loses_nothing(tmp_path, monkeypatch, bad):
    full, write = state(), ckpt.Counted.write
    first = on_ranks(2, lambda rank, agree: ckpt.save(
        tmp_path, 1, shard(full, rank, 2), {}, rank=rank, world=2, agree=agree, keep=1))[0]

    def limited(self, data):
        if self.file.name.endswith(f"rank_{bad:05d}.pt") and self.size + len(data) > 600:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(ckpt.Counted, "write", limited)
    errors = on_ranks(2, lambda rank, agree: ckpt.save(
        tmp_path, 2, shard(full, rank, 2), {}, rank=rank, world=2, agree=agree, keep=1))
    assert all(isinstance(e, OSError) and "0000002 was not saved" in str(e) and "GB free" in str(e) for e in errors)
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
    monkeypatch.setattr(ckpt, "aside", lambda path: there.append(set(ckpt.steps(tmp_path))) or aside(path))
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
    (path / "rank_00000.pt").unlink()
    assert save(tmp_path, 1) == path and loads(path, state(1))
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_0000001"]


# ---- what does not fit ---------------------------------------------------------------------------------------------

def test_a_missing_path_is_an_error_that_lists_what_is_there(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*step_0000009.*step_0000001"):
        loads(tmp_path / "ckpt" / "step_0000009", state(1))
    assert ckpt.latest(tmp_path / "nothing") is None


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path):
    path, other = save(tmp_path, 1), state(1)
    del other["net.w"]
    other |= {"net.v": torch.zeros(2), "net.modulation": torch.zeros(1, 2, 4), "net.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as error:
        loads(path, other)
    for line in ("1 missing: net.v", "1 not wanted: net.w", "2 other than wanted: net.modulation", "bfloat16"):
        assert line in str(error.value)


def test_a_manifest_of_another_version_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(ckpt, "VERSION", 2)
    with pytest.raises(ValueError, match="is of version 1, this code reads version 2"):
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
    shapes = {"patch_embedding": (8, 4, 1, 2, 2), "text_embedding.0": (8, 6), "text_embedding.2": (8, 8),
              "time_embedding.0": (8, 4), "time_embedding.2": (8, 8), "time_projection.1": (48, 8),
              "head.head": (16, 8)}
    names = {f"{n}.{w}": s if w == "weight" else s[:1] for n, s in shapes.items() for w in ("weight", "bias")}
    names["head.modulation"] = (1, 2, 8)
    for b in range(blocks):
        names[f"blocks.{b}.modulation"] = (1, 6, 8)
        for w in ("weight", "bias"):
            names[f"blocks.{b}.norm3.{w}"] = (8,)
            for n, s in (("ffn.0", (12, 8)), ("ffn.2", (8, 12))):
                names[f"blocks.{b}.{n}.{w}"] = s if w == "weight" else s[:1]
            for a in ("self_attn", "cross_attn"):
                names |= {f"blocks.{b}.{a}.{x}.{w}": (8, 8) if w == "weight" else (8,) for x in "qkvo"}
        names |= {f"blocks.{b}.{a}.norm_{x}.weight": (8,) for a in ("self_attn", "cross_attn") for x in "qk"}
    return {name: torch.randn(shape, generator=g) for name, shape in names.items()}


def test_names_are_those_of_diffusers_own_conversion_and_come_back():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    ours = wan(12)
    theirs = convert_wan_transformer_to_diffusers({name: x.clone() for name, x in ours.items()})
    assert len(ours) == 27 * 12 + 15
    assert set(theirs) == {ckpt.to_diffusers(name) for name in ours}
    assert all(torch.equal(theirs[ckpt.to_diffusers(name)], x) for name, x in ours.items())
    assert all(ckpt.from_diffusers(ckpt.to_diffusers(name)) == name for name in ours)
    for name in ("blocks.3.norm1.weight", "blocks.3.norm30.weight", "blocks.3.ffn.20.bias", "head.header", "x.norm3"):
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
        save_file({"x": torch.zeros(1)}, tmp_path / "another.safetensors")     # not in the index: not ours to read
    else:
        folder.mkdir(exist_ok=True)
        save_file(theirs, folder / "model.safetensors")
    source = ckpt.weights(folder / "model.safetensors" if layout == "file" else tmp_path)
    rows = {name: (torch.zeros(len(x) - len(x) // 2, *x.shape[1:]).bfloat16(), len(x) // 2, tuple(x.shape))
            for name, x in ours.items()}
    ckpt.fill(rows, source)
    assert all(torch.equal(x, ours[name][first:].bfloat16()) for name, (x, first, _) in rows.items())


def test_only_the_rows_asked_for_are_read(tmp_path):
    save_file(wan(), tmp_path / "model.safetensors")
    source = ckpt.weights(tmp_path)
    assert source.rows("blocks.0.ffn.0.weight", 3, 5).shape == (2, 8)
    assert torch.equal(source.rows("blocks.0.ffn.0.weight", 3, 5), wan()["blocks.0.ffn.0.weight"][3:5])


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
    save_file(ours | {"diffusion_model.head.modulation": torch.zeros(1, 2, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="head.modulation under another name too"):
        ckpt.weights(tmp_path)


def test_other_files_are_refused_by_what_they_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing"):
        ckpt.weights(tmp_path / "nothing")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "model.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickles are not read.*model.pth"):
        ckpt.weights(tmp_path / "pickle")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="no Wan transformer.*1 tensors such as transformer_blocks.0.attn.to_q.weight"):
        ckpt.weights(tmp_path / "flux.safetensors")
    save_file(wan(), tmp_path / "a.safetensors")
    save_file(wan(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="twice.*several models"):
        ckpt.weights(tmp_path)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="c.safetensors is damaged"):
        ckpt.weights(tmp_path / "c.safetensors")


def test_a_shard_that_is_missing_or_disagrees_with_the_index_is_named(tmp_path):
    save_file(wan(), tmp_path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(wan(), "model-1.safetensors") | {"more": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="no weights at .*: model-2.safetensors is missing"):
        ckpt.weights(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="1 missing: more\n  1 not wanted: other"):
        ckpt.weights(tmp_path)


def test_a_run_or_a_checkpoint_gives_the_weights_of_a_role(tmp_path):
    full = state(1) | {"null": torch.ones(2, 3)}
    path = save(tmp_path, 1, full)
    for where in (tmp_path, path):
        net, ema = ckpt.weights(where, "net"), ckpt.weights(where)
        assert set(net.shapes) == {"w", "modulation", "bias"} and ema.shapes == {"w": (10, 3)}
        assert torch.equal(net.tensor("w"), full["net.w"]) and torch.equal(ema.rows("w", 2, 4), full["ema.w"][2:4])
        assert ema.manifest["meta"] == {"note": "step 1"}
    assert torch.equal(ckpt.stored(path).tensor("null"), full["null"])
    with pytest.raises(ValueError, match="holds no 'critic', but ema, net"):
        ckpt.weights(tmp_path, "critic")
    flip(path / "rank_00000.pt", 700)
    with pytest.raises(ValueError, match="CRC32"):
        ckpt.weights(path)
