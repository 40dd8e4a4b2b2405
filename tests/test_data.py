"""Random streams, order, reading and writing of data.py. Run: pytest tests/test_data.py"""
import gc
import json
import os
import shutil
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import torch

import data
import store
from data import Ahead, Latents, Order, noise, normal, send, shares, stratified, stream
from helpers import Killed
from store import Journals, Writer

SMALL, WIDE = (4, 3, 2, 2), (4, 3, 2, 4)
CODEC = {"name": "none", "text_width": 8, "text_length": 5}


def spec(**changed):
    return {"codec": CODEC, "fps": 8, "dtype": "bf16"} | changed


def fill(writer, indices, shapes=(SMALL, WIDE, SMALL)):
    """Sample i: latents N(1, 3²), 1 to 4 text rows; every third is wide."""
    for i in indices:
        if f"key {i}" not in writer.done:
            rng = stream(0, "sample", i)
            latent, text = 3 * normal(rng, shapes[i % len(shapes)]) + 1, normal(rng, (i % 4 + 1, 8))
            writer.add(latent, text, caption=f"caption {i}", source=f"{i}.mp4", key=f"key {i}")
    return writer


NULL = torch.arange(16.).view(2, 8)


def make(path, count=60, shapes=(SMALL, WIDE, SMALL), **changed):
    fill(Writer(path, spec(**changed)), range(count), shapes).finish(NULL)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "set")


def damage(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def by_slot(path, steps, world=1, **options):
    """{(step, slot): (id, x0, text, e, u, drop, give)} of all ranks."""
    seen = {}
    for rank in range(world):
        latents = Latents(path, seed=3, batch=8, rank=rank, world=world, **options)
        for step in steps:
            for m in latents.at(step):
                for i, slot in enumerate(m.slots):
                    assert (step, slot) not in seen, "two ranks took one slot"
                    seen[step, slot] = m.ids[i], *(x[i] for x in (m.x0, m.text, m.e, m.u, m.drop, m.give))
    return seen


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k][0] == b[k][0] and all(torch.equal(x, y) for x, y in zip(a[k][1:], b[k][1:])) for k in a)


# ---- random streams -------------------------------------------------------------------------------------------------

def test_each_seed_purpose_step_and_slot_has_a_stream_of_its_own():
    arguments = [(0, "noise", 0, 0), (1, "noise", 0, 0), (2**40, "noise", 0, 0), (0, "t", 0, 0), (0, "noise", 1, 0),
                 (0, "noise", 2**40, 0), (0, "noise", 0, 1), (0, "noise", 0, 2**40)]
    first = [stream(*a).integers(2**63) for a in arguments]
    assert len(set(first)) == len(first)
    assert first == [stream(*a).integers(2**63) for a in arguments]


def test_no_stream_runs_into_the_next():
    a, b = (set(stream(0, "noise", 0, slot).integers(2**63, size=10_000).tolist()) for slot in (0, 1))
    assert not a & b


def test_purposes_keep_their_places():
    assert data.PURPOSES[:10] == ("order", "epoch", "held_out", "init", "t_perm", "t", "noise", "drop", "val", "sample")
    assert data.PURPOSES[10:22] == tuple(f"{net}_{use}" for net in ("student", "critic") for use in (
        "prompt", "z", "renoise", "score_t_perm", "score_t", "score_noise"))


def test_normal_is_fp32_of_mean_0_and_variance_1():
    x = normal(stream(0, "noise", 0), (200, 500))
    assert x.dtype == torch.float32 and x.shape == (200, 500)
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.01


def test_noise_is_a_function_of_its_slots_alone():
    x = noise(3, "val", 5, [7, 2, 9], (4, 2))
    assert x.shape == (3, 4, 2) and x.dtype == torch.float32
    for row, slot in zip(x, (7, 2, 9)):
        assert torch.equal(row, normal(stream(3, "val", 5, slot), (4, 2)))
    assert torch.equal(x[1:], noise(3, "val", 5, [2, 9], (4, 2)))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_stratified_puts_one_number_in_each_stratum(batch):
    u = stratified(0, "t_perm", "t", 5, batch)
    assert u.dtype == torch.float32 and sorted((u * batch).int().tolist()) == list(range(batch))
    if batch > 1:
        assert not torch.equal(u, stratified(0, "t_perm", "t", 6, batch))
        assert not torch.equal(u, u.sort().values), "slots must not be sorted by t"
        assert len(set((u * batch % 1).tolist())) == batch, "each slot has its own place in its stratum"


def test_each_chunk_of_the_clips_has_strata_of_its_own_in_slots_of_its_own_after_the_first_ones():
    chunks = [stratified(0, "t_perm", "t", 5, 8, chunk) for chunk in range(3)]
    assert torch.equal(chunks[0], stratified(0, "t_perm", "t", 5, 8))
    for chunk, u in enumerate(chunks):
        assert sorted((u * 8).int().tolist()) == list(range(8))
        xi = [stream(0, "t", 5, chunk * 8 + slot).random() for slot in range(8)]
        assert (u * 8 % 1).tolist() == pytest.approx(xi, abs=1e-5)
    orders = [(u * 8).int().tolist() for u in chunks]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_noise_of_a_longer_clip_begins_as_a_shorter_ones_and_does_not_depend_on_where_it_is_cut():
    shape, slots = (2, 5, 4, 4), [3, 7]
    whole = data.long_noise(0, "sample", 1, 3, slots, shape, 0, 12)
    assert torch.equal(whole[:, :, :5], data.noise(0, "sample", 1, slots, shape))
    assert torch.equal(whole[:, :, 5:10], data.noise(0, "sample", 4, slots, shape))     # noise 1 of 3, once more
    for first, last in ((0, 3), (3, 6), (4, 12), (5, 7), (11, 12)):
        assert torch.equal(data.long_noise(0, "sample", 1, 3, slots, shape, first, last), whole[:, :, first:last])


def test_stratified_stays_below_1(monkeypatch):
    class Highest:
        def permutation(self, n):
            return np.arange(n)

        def random(self):
            return 1 - 2**-53
    monkeypatch.setattr(data, "stream", lambda *a: Highest())
    assert stratified(0, "t_perm", "t", 0, 8).max() < 1


# ---- order ----------------------------------------------------------------------------------------------------------

COUNTS, BATCH = [3, 10, 40, 0], 8


def test_every_sample_comes_exactly_once_per_pass():
    order, positions = Order(0, COUNTS, BATCH), {b: [] for b in range(len(COUNTS))}
    for step in range(400):
        bucket, batch = order.at(step)
        assert len(batch) == BATCH
        positions[bucket].extend(batch.tolist())
    for bucket, n in enumerate(COUNTS):
        passes = [positions[bucket][i:i + n] for i in range(0, len(positions[bucket]) - n + 1, n or 1)] if n else []
        assert all(sorted(p) == list(range(n)) for p in passes)
        assert len(passes) > 50 or n == 0
        assert n < 10 or len(set(map(tuple, passes))) == len(passes), "each pass is shuffled anew"


def test_epochs_hold_each_bucket_by_its_share_in_mixed_order():
    order, step = Order(0, [16, 40, 44], 4), 0
    plans = []
    for epoch in range(6):
        counts = [(epoch + 1) * n // 4 - epoch * n // 4 for n in (16, 40, 44)]
        plan = [order.at(step + i)[0] for i in range(sum(counts))]
        assert [plan.count(b) for b in range(3)] == counts
        assert sum(a != b for a, b in zip(plan, plan[1:])) > 5, "buckets come one after the other"
        plans.append(tuple(plan))
        step += sum(counts)
    assert len(set(plans)) == 6


@pytest.mark.parametrize("counts, batch", [(COUNTS, BATCH), ([1], 16), ([1, 2], 16), ([1000, 7], 3), ([64], 64)])
def test_the_epoch_of_a_step_is_found(counts, batch):
    order = Order(0, counts, batch)
    for step in (*range(60), 1234, 10**9):
        epoch = order.epoch(step)
        assert sum(order.before(epoch)) <= step < sum(order.before(epoch + 1))


def test_every_dataset_gets_its_share_of_the_batches_and_its_buckets_keep_their_proportions():
    takes = shares([[10_000], [60, 40]], (0.3, 0.7))
    order = Order(0, [10_000, 60, 40], 16, sum(takes, []))
    steps = Counter(order.at(step)[0] for step in range(sum(order.before(2))))
    share = [steps[b] / steps.total() for b in range(3)]
    assert share == pytest.approx([0.3, 0.42, 0.28], abs=0.002)


def test_a_small_dataset_that_is_mixed_in_still_comes_once_per_pass():
    order = Order(0, [10_000, 60], 16, sum(shares([[10_000], [60]], (1, 1)), []))
    batches = [order.at(step) for step in range(600)]
    seen = np.concatenate([batch for bucket, batch in batches if bucket == 1])
    passes = seen[:len(seen) // 60 * 60].reshape(-1, 60)
    assert len(passes) > 50
    assert (np.sort(passes, 1) == np.arange(60)).all()


def test_shares_like_the_sizes_are_the_order_without():
    alone, mixed = Order(0, [100, 60], 16), Order(0, [100, 60], 16, sum(shares([[100], [60]], (5, 3)), []))
    for step in range(100):
        bucket, batch = alone.at(step)
        assert mixed.at(step)[0] == bucket
        assert np.array_equal(mixed.at(step)[1], batch)


def test_another_seed_is_another_order():
    assert not np.array_equal(Order(0, [500], 64).at(0)[1], Order(1, [500], 64).at(0)[1])


def test_millions_of_samples_are_permuted_once_per_pass(monkeypatch):
    made = Counter()
    monkeypatch.setattr(data, "stream", lambda *a: made.update([a[1]]) or stream(*a))
    order = Order(0, [2_000_000, 1_000_000], 1000)
    for step in [*range(50), *range(3 * 10**9, 3 * 10**9 + 50)]:
        order.at(step)
    assert made["order"] <= 8 and made["epoch"] <= 4


# ---- several datasets -----------------------------------------------------------------------------------------------

STILL = (4, 1, 2, 2)


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    """60 clips of two shapes, and 300 stills."""
    return [dataset, make(tmp_path_factory.mktemp("data") / "stills", 300, (STILL,))]


def test_ids_of_several_datasets_follow_one_another_and_are_normalised_as_the_first(two):
    both, (clips, stills) = opened(two), map(opened, two)
    assert both.count == 360
    assert both.shapes == [SMALL, WIDE, STILL]
    for id in (0, 41, 59):
        assert torch.equal(both.sample([id])[0], clips.sample([id])[0])
    z = stills.sample([7])[0] * stills.std + stills.mean
    assert torch.allclose(both.sample([67])[0], (z - clips.mean) / clips.std, atol=1e-5)
    assert torch.equal(both.text([67]), stills.text([7]))
    assert both.caption(67) == stills.caption(7)
    assert both.shape_of(59) == WIDE
    assert both.shape_of(60) == STILL


def test_clips_are_not_normalised_as_stills_whichever_dataset_comes_first(two):
    turned, clips = opened(two[::-1]), opened(two[0])
    assert torch.equal(turned.sample([300])[0], clips.sample([0])[0])
    assert turned.manifest == clips.manifest


def test_a_dataset_that_is_given_twice_is_refused(two, tmp_path):
    copy = shutil.copytree(two[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="copy is given twice: --mix"):
        opened([*two, copy])


def test_each_of_several_datasets_gets_its_share_of_the_batches(two):
    for mix, share in ((None, 300 / 360), ((3, 1), 1 / 4)):
        both = opened(two, mix=mix)
        stills = [both.batch_ids(step)[1][0] >= 60 for step in range(200)]
        assert sum(stills) / 200 == pytest.approx(share, abs=0.02)


def test_any_world_sees_the_same_stream_of_several_datasets(two):
    alone = by_slot(two, range(6), mix=(1, 1))
    assert same(alone, by_slot(two, range(6), 2, mix=(1, 1), micro_batch=2))


def test_each_dataset_holds_out_its_share_whatever_the_seed(two):
    held = opened(two, val=12, mix=(1, 3), seed=5).held_out
    assert held == opened(two, val=12, mix=(1, 3)).held_out
    assert sum(id >= 60 for id in held) == 9
    assert set(held).isdisjoint(opened(two, val=12, mix=(1, 3)).train)


def test_clips_are_shown_rather_than_stills_whichever_dataset_comes_first(two):
    for paths in (two, two[::-1]):
        both = opened(paths, val=10)
        assert all(both.shape_of(id) != STILL for id in both.for_videos(4))
        assert both.commonest_shapes()[-1] == STILL


def test_what_a_run_knows_several_datasets_by_changes_with_each_and_with_their_order(two, dataset):
    contents = {opened(paths).content for paths in (dataset, two[1], two, two[::-1])}
    assert len(contents) == 4
    assert opened(two).content == opened(two).content


@pytest.mark.parametrize("change, said", [
    (dict(codec=CODEC | {"name": "other"}), "the codec of one"),
    (dict(codec=CODEC | {"text_length": 6}), "the codec of one"),
    (dict(fps=16), "the fps of one is 16"),
    (dict(shape=[4, 3, 2, 2]), "the latents of one is False"),
])
def test_datasets_that_do_not_go_together_are_named(dataset, tmp_path, change, said):
    writer = Writer(tmp_path / "other", spec(**change))
    latent = None if "shape" in change else torch.zeros(SMALL)
    writer.add(latent, torch.ones(1, 8), caption="a", source="a.mp4", key="a")
    writer.finish(NULL)
    with pytest.raises(ValueError, match=f"other and .*set do not go together: {said}"):
        opened([dataset, tmp_path / "other"])


def test_datasets_of_two_null_texts_are_refused(dataset, tmp_path):
    fill(Writer(tmp_path / "other", spec()), range(3)).finish(NULL + 1)
    with pytest.raises(ValueError, match="the null text"):
        opened([dataset, tmp_path / "other"])


# ---- a step ahead, and to the GPU -----------------------------------------------------------------------------------

class Draw(NamedTuple):
    x: torch.Tensor
    noises: list
    ids: list


@pytest.fixture
def gpu(monkeypatch):
    """Has the device `meta` stand for a GPU -> [shape] of all page-locked memory that was asked for."""
    locked = []

    def page_locked(shape, dtype=torch.float32):
        locked.append(tuple(shape))
        return torch.empty(shape, dtype=dtype)
    monkeypatch.setattr(data, "on_gpu", lambda device: device.type == "meta")
    monkeypatch.setattr(data, "page_locked", page_locked)
    return locked


def test_the_next_draw_and_its_copy_begin_before_they_are_asked_for(gpu):
    drawn = []

    def draw(role, step):
        drawn.append((role, step))
        return [Draw(torch.full((2,), float(step)), [torch.ones(3), torch.ones(4)], [step])]
    draws = Ahead(draw, {"student": 5, "critic": 1}, torch.device("meta"))
    [first] = draws("student", 10)
    draws.thread.submit(int).result()               # what was begun before has ended
    assert drawn == [("student", 10), ("student", 15)]
    assert gpu == [(2,), (3,), (4,)] * 2, "a copy to a GPU begins from page-locked memory, before the draw is asked for"
    assert first.x.device.type == first.noises[1].device.type == "meta" and first.ids == [10]
    for step in (10, 11, 12):
        assert draws("critic", step)[0].ids == [step]
    assert draws("student", 15)[0].ids == [15]
    draws.thread.submit(int).result()
    assert len(drawn) == len(set(drawn)), "something was drawn twice"
    assert draws("student", 3)[0].ids == [3] and draws("student", 8)[0].ids == [8]
    assert drawn.count(("student", 8)) == 1
    draws.thread.shutdown()                         # what it draws ahead is not the next test's


def test_on_a_cpu_nothing_is_copied():
    x = torch.ones(2)
    sent = send(Draw(x, [x], [1]), torch.device("cpu"))
    assert sent.x is x and sent.noises[0] is x and sent.ids == [1] and type(sent) is Draw


def test_batches_of_a_gpu_are_read_into_page_locked_memory_and_null_is_sent_once(dataset, gpu):
    latents = Latents(dataset, seed=0, batch=8, micro_batch=4, device="meta")
    assert latents.null.device.type == "meta" and gpu == [(5, 8)]
    micros = latents.at(0)
    latents.draws.thread.submit(int).result()
    for micro in micros:
        assert {x.device.type for x in micro if torch.is_tensor(x)} == {"meta"}
        assert micro.null is latents.null
    cpu = Latents(dataset, seed=0, batch=8, micro_batch=4)
    wanted = [(5, 8)]
    for step in (0, 1):
        for micro in cpu.at(step):
            wanted += [micro.x0.shape, micro.text.shape, micro.e.shape]     # read into it
            wanted += [micro.x0.shape, micro.text.shape, *[(4,)] * 4, micro.e.shape]       # `meta` is never pinned
    assert Counter(gpu) == Counter(map(tuple, wanted))
    assert latents.sample([0])[0].device.type == latents.text([0]).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_what_a_cpu_gets(dataset):
    ours, theirs = (Latents(dataset, seed=0, batch=8, micro_batch=4, device=device) for device in ("cuda", "cpu"))
    assert ours.sample([0])[0].is_pinned()
    for step in range(20):
        for a, b in zip(ours.at(step), theirs.at(step)):
            assert a.null is ours.null
            for x, y in zip(a, b):
                assert torch.equal(x.cpu(), y) and x.is_cuda if torch.is_tensor(x) else x == y


# ---- reading --------------------------------------------------------------------------------------------------------

def test_any_world_and_micro_batch_see_the_same_stream(dataset):
    steps = (0, 1, 2, 7)
    alone = by_slot(dataset, steps)
    assert {slot for _, slot in alone} == set(range(8))
    for world, micro_batch in ((1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
        assert same(alone, by_slot(dataset, steps, world, micro_batch=micro_batch))


def test_a_resumed_run_goes_on_with_the_same_stream(dataset):
    whole = by_slot(dataset, range(12))
    resumed = {}
    for start, end in ((0, 4), (4, 6), (6, 12)):     # twice within one epoch
        resumed |= by_slot(dataset, range(start, end))
    assert same(whole, resumed)


def test_no_two_slots_or_steps_share_noise_or_time(dataset):
    seen = by_slot(dataset, range(4), world=2).values()
    for column in (3, 4, 5):    # e, u, drop
        assert len({s[column].numpy().tobytes() for s in seen}) == len(seen)


def test_epochs_differ_in_order_and_batches(dataset):
    latents = Latents(dataset, seed=0, batch=5)
    steps = len(latents.train) // 5
    epochs = [[frozenset(latents.batch_ids(step)[1]) for step in range(i * steps, (i + 1) * steps)] for i in (0, 1)]
    assert not set(epochs[0]) & set(epochs[1])
    assert latents.epoch_of(steps) == 1


def test_dropout_has_its_rate_and_drops_others_in_the_next_epoch(dataset):
    latents = Latents(dataset, seed=0, batch=6)
    dropped = Counter()
    for step in range(400):
        [m] = latents.at(step)
        dropped.update(id for id, drop in zip(m.ids, m.drop) if drop < 0.25)
    assert 0.2 < sum(dropped.values()) / 2400 < 0.3
    assert len(dropped) == latents.count, "some captions are always dropped, or never"
    assert max(dropped.values()) < 25


def test_latents_are_stored_as_they_are_and_normalised_once(tmp_path):
    latents = Latents(make(tmp_path / "set", shapes=(SMALL,), dtype="fp32"), seed=0, batch=4)
    z = torch.stack([3 * normal(stream(0, "sample", i), SMALL) + 1 for i in range(60)])
    raw = np.fromfile(tmp_path / "set/4x3x2x2.0.bin", np.float32).reshape(60, -1)[:, :z[0].numel()]
    assert np.array_equal(raw, z.flatten(1).numpy())
    x0, _ = latents.sample(list(range(60)))
    mean, std = (torch.tensor(latents.manifest[key]).view(-1, 1, 1, 1) for key in ("mean", "std"))
    assert torch.equal(x0, (z - mean) / std)
    flat = x0.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-5)
    assert torch.allclose(flat.std(1), torch.ones(4), atol=2e-3)
    [m] = latents.at(0)
    assert torch.equal(m.x0, x0[m.ids]) and torch.equal(m.e, noise(0, "noise", 0, m.slots, SMALL))


def test_bf16_rounds_once(tmp_path):
    latents = Latents(make(tmp_path / "set", shapes=(SMALL,)), seed=0, batch=4)
    z = (3 * normal(stream(0, "sample", 7), SMALL) + 1).bfloat16().float()
    assert torch.equal(latents.sample([7])[0][0], (z - latents.mean) / latents.std)


def test_text_is_padded_with_zeros(dataset):
    latents = Latents(dataset, seed=0, batch=4)
    for id in range(latents.count):
        i = int(latents.caption(id).split()[1])
        _, [text] = latents.sample([id])
        rng = stream(0, "sample", i)
        normal(rng, WIDE if i % 3 == 1 else SMALL)
        assert text.shape == (5, 8) and text.dtype == torch.float32
        assert torch.equal(text[:i % 4 + 1], normal(rng, (i % 4 + 1, 8)).bfloat16().float())
        assert not text[i % 4 + 1:].any()


def test_the_null_text_is_the_one_that_was_given(dataset):
    latents = Latents(dataset, seed=0, batch=4)
    assert torch.equal(latents.null[:2], NULL) and not latents.null[2:].any()
    assert all(m.null is latents.null for m in latents.at(0))


def test_held_out_samples_are_never_trained_on(dataset):
    latents = Latents(dataset, seed=0, batch=6, val=2)
    assert len(latents.held_out) == 2 and len(latents.train) == 58
    assert latents.held_out == Latents(dataset, seed=1, batch=6, val=2).held_out, "seeds must compare"
    seen = {id for step in range(60) for id in latents.batch_ids(step)[1]}
    assert seen == set(latents.train.tolist()) == set(range(60)) - set(latents.held_out)
    assert sum(latents.order.counts) == 58


STILL = (4, 1, 2, 2)


def test_videos_are_of_one_bucket_held_out_samples_first_and_no_stills(tmp_path):
    make(tmp_path, shapes=(STILL, STILL, STILL, SMALL, WIDE, WIDE))
    for val in (0, 2, 3):
        latents = opened(tmp_path, val=val)
        ids = latents.for_videos(8)
        [shape] = {latents.shape_of(id) for id in ids}
        held = [id for id in latents.held_out if latents.shape_of(id) == shape]
        assert shape in (SMALL, WIDE) and len(ids) == len(set(ids)) == 8
        assert ids[:len(held)] == held and not set(ids[len(held):]) & set(latents.held_out)
        if any(latents.shape_of(id) != STILL for id in latents.held_out):
            assert held, "a held-out sample could have been shown"
    assert opened(tmp_path).commonest_shapes() == [WIDE, SMALL, STILL]
    assert len(opened(tmp_path).for_videos(99)) == 10


def test_where_all_are_stills_they_are_shown(tmp_path):
    latents = opened(make(tmp_path, shapes=(STILL,)), val=3)
    assert latents.for_videos(4)[:3] == latents.held_out and latents.commonest_shapes() == [STILL]


@pytest.mark.parametrize("val, expected", [(0, 0), (1, 1), (3, 3), (16, 3)])
def test_at_most_a_twentieth_is_held_out(dataset, val, expected):
    assert len(Latents(dataset, seed=0, batch=4, val=val).held_out) == expected


def test_a_batch_that_is_held_is_not_written_over(dataset):
    latents = Latents(dataset, seed=0, batch=8)
    held, copies = [], []
    for step in range(12):
        m = latents.at(step)[0]
        if step % 3 == 0:
            held.append(m.x0[2:4])                  # a part keeps the whole
            copies.append(m.x0[2:4].clone())
    assert all(torch.equal(a, b) for a, b in zip(held, copies))
    del held, m
    gc.collect()
    assert sum(map(len, latents.pages.values())) > 0, "memory that was let go of is not used again"


def test_training_keeps_its_threads(dataset):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    latents = Latents(dataset, seed=0, batch=8)
    latents.at(0)
    assert torch.get_num_threads() == 2
    assert latents.workers.submit(torch.get_num_threads).result() == 1
    torch.set_num_threads(threads)


# ---- what is refused ------------------------------------------------------------------------------------------------

def opened(path, **options):
    return Latents(path, **{"seed": 0, "batch": 4} | options)


@pytest.mark.parametrize("options, named", [
    ({"batch": 12, "micro_batch": 4, "world": 2}, ["--batch=12", "micro-batches of 4", "2 data ranks",
                                                   "--micro_batch=3", "--micro_batch=6", "--batch=8", "--batch=16"]),
    ({"batch": 3, "world": 2}, ["--batch=3", "--batch=2", "--batch=4"]),
    ({"batch": 0}, ["--batch=0", "--batch=1"]),
])
def test_a_batch_that_does_not_divide_names_those_that_do(dataset, options, named):
    with pytest.raises(ValueError) as error:
        opened(dataset, **options)
    assert all(word in str(error.value) for word in named), error.value


def test_the_choices_named_do_divide(dataset):
    with pytest.raises(ValueError) as error:
        opened(dataset, batch=12, micro_batch=4, world=2)
    for choice in str(error.value).split(": ")[1].split(", "):
        name, value = choice.removeprefix("--").split("=")
        opened(dataset, **{"batch": 12, "micro_batch": 4, "world": 2} | {name: int(value)})


def test_a_missing_dataset_gives_the_command_that_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python prepare.py --videos=DIR --out=\S*absent"):
        opened(tmp_path / "absent")


def test_an_unfinished_dataset_says_so(tmp_path):
    fill(Writer(tmp_path, spec()), range(5)).save()
    with pytest.raises(FileNotFoundError, match="unfinished.*same prepare.py command"):
        opened(tmp_path)


def test_a_dataset_of_another_version_is_refused(tmp_path):
    path = make(tmp_path / "set")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 7}))
    with pytest.raises(ValueError, match="version 7.*reads version 1.*make it again"):
        opened(path)


@pytest.mark.parametrize("name", ["4x3x2x2.0.bin", "4x3x2x4.0.bin", "text.0.bin", "text.null.bin",
                                  "text_off.npy", "crc.npy", "captions.jsonl"])
@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_file_of_another_size_is_named(tmp_path, name, harm):
    path = make(tmp_path / "set")
    if harm == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} has (\d+|no) bytes instead of \d+. Copy it again, or"):
        opened(path)


def test_captions_are_read_and_checked_when_one_is_asked_for(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(data, "crc32_of", lambda path, of=data.crc32_of: read.append(path.name) or of(path))
    path = make(tmp_path / "set")
    read.clear()
    latents = opened(path)
    latents.at(0)
    assert sorted(read) == ["crc.npy", "text.null.bin", "text_off.npy"]
    for id in range(3):
        latents.caption(id)
    assert read.count("captions.jsonl") == 1

    damage(path / "captions.jsonl", -20)
    with pytest.raises(ValueError, match="captions.jsonl is not what was written.* again, which writes it anew"):
        opened(path).caption(0)
    fill(Writer(path, spec()), range(60)).finish(NULL)
    assert opened(path).caption(0) == "caption 0"


def test_more_files_than_the_system_lets_open_at_first_are_opened(tmp_path):
    resource = pytest.importorskip("resource")
    writers = [fill(Writer(tmp_path, spec(), rank), [rank], [SMALL]) for rank in range(40)]
    for writer in writers:
        writer.save()
    writers[0].finish(NULL)
    del writers, writer
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/dev/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
        assert opened(tmp_path).at(0)[0].x0.isfinite().all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["manifest.json", "text.null.bin", "text_off.npy", "crc.npy"])
def test_a_flipped_bit_in_a_small_file_is_found_at_once(tmp_path, name):
    path = make(tmp_path / "set")
    before = (path / name).read_bytes()
    damage(path / name, -20)
    with pytest.raises(ValueError, match=rf"{name} is (damaged|not what was written).* again, which writes it anew"):
        opened(path)
    fill(Writer(path, spec()), range(60)).finish(NULL)
    assert (path / name).read_bytes() == before


@pytest.mark.parametrize("name, at", [("4x3x2x2.0.bin", 5 * 4096 + 11), ("text.0.bin", 100)])
def test_a_flipped_bit_in_a_sample_is_found_when_it_is_read(tmp_path, name, at):
    path = make(tmp_path / "set")
    damage(path / name, at)
    latents = opened(path, batch=1)
    bad = 5 if name.startswith("4x3") else next(id for id in range(60) if latents.folders[0].text_off[id, 0] * 16 <= at
                                                < latents.folders[0].text_off[id, :2].sum() * 16)
    for step in range(60):
        if bad in latents.batch_ids(step)[1]:
            with pytest.raises(ValueError, match=rf"{name}: sample {bad} is not what was written.*that made it"):
                latents.at(step)
            break
        latents.at(step)        # the sample before the bad one is given out, though the next is read meanwhile
    else:
        pytest.fail("the sample was not drawn")


def test_prompts_alone_cannot_be_trained_on(tmp_path):
    writer = Writer(tmp_path, spec(shape=list(SMALL)))
    for i in range(40):
        writer.add(None, normal(stream(0, "sample", i), (2, 8)), caption=f"{i}", source="p.txt", key=f"{i}")
    writer.finish(NULL)
    latents = opened(tmp_path)
    assert latents.shapes == [SMALL] and latents.count == 40 and latents.batch_ids(0)[0] == 0
    assert latents.text([0, 1]).shape == (2, 5, 8)
    with pytest.raises(ValueError, match="prompts without latents"):
        latents.at(0)


# ---- writing --------------------------------------------------------------------------------------------------------

def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_interrupted_writer_ends_with_the_same_files(tmp_path):
    whole, broken = make(tmp_path / "whole"), tmp_path / "broken"
    writer = fill(Writer(broken, spec()), range(20))
    writer.save()
    fill(writer, range(20, 27))                     # on disk, and not in the journal
    for file in writer.files.values():
        file.write(b"half a sam")
    writer.journal.write(b'{"key": "half a li')
    for file in (*writer.files.values(), writer.journal):
        file.close()
    writer = Writer(broken, spec())
    assert [i for i in range(60) if f"key {i}" in writer.done] == list(range(20))
    fill(writer, range(60)).finish(NULL)
    assert contents(whole) == contents(broken)


def test_a_finished_dataset_can_grow(tmp_path):
    make(tmp_path, 20)
    before = contents(tmp_path)
    fill(Writer(tmp_path, spec()), range(60)).finish(NULL)
    assert opened(tmp_path).count == 60
    new = {"manifest.json", "captions.jsonl"}       # the one people read
    assert {name: text for name, text in before.items() if name not in new}.items() <= contents(tmp_path).items()


def test_ranks_write_parts_that_are_joined_without_copying(tmp_path):
    writers = [Writer(tmp_path, spec(), rank) for rank in range(3)]
    for i in range(40):
        fill(writers[i % 3], [i])
    for writer in writers:
        writer.save()
    writers = [Writer(tmp_path, spec(), rank) for rank in range(2)]     # interrupted, and resumed by fewer
    for i in range(40, 60):
        fill(writers[i % 2], [*range(40), i])
    writers[1].save()
    writers[0].finish(NULL)
    latents = opened(tmp_path)
    assert latents.count == 60 and latents.shapes == [SMALL, WIDE]
    assert [len(bucket["files"]) for bucket in latents.manifest["buckets"]] == [3, 2]
    for id in range(60):
        i = int(latents.caption(id).split()[1])
        [x0], [text] = latents.sample([id])
        rng = stream(0, "sample", i)
        z = (3 * normal(rng, x0.shape) + 1).bfloat16().float()
        assert torch.equal(x0, (z - latents.mean) / latents.std)
        assert torch.equal(text[:i % 4 + 1], normal(rng, (i % 4 + 1, 8)).bfloat16().float())
    assert {latents.caption(id) for id in range(60)} == {f"caption {i}" for i in range(60)}


def test_a_dataset_is_what_version_1_was_from_the_first(tmp_path):
    manifest = fill(Writer(tmp_path, spec()), range(60)).finish(NULL, mean=[1.] * 4, std=[3.] * 4)
    assert manifest["crc32"] == 459342440      # by 496ae65
    assert zlib.crc32((tmp_path / "captions.jsonl").read_bytes()) == manifest["files"]["captions.jsonl"]["crc32"]


def test_what_ranks_that_did_not_come_back_left_beyond_their_journals_is_cut_off(tmp_path):
    writers = [fill(Writer(tmp_path, spec(), rank), range(10 * rank, 10 * rank + 10)) for rank in range(4)]
    for rank, writer in enumerate(writers):
        writer.save()
        for file in writer.files.values():          # killed while it was writing, unless it is rank 1
            file.write(b"half a sample" if rank != 1 else b"")
        writer.journal.write(b'{"key": "half a li')
        for file in (*writer.files.values(), writer.journal):
            file.close()
    manifest = Writer(tmp_path, spec(), rank=0).finish(NULL)
    latents = opened(tmp_path)
    assert latents.count == 40
    for name, file in manifest["files"].items():
        assert (tmp_path / name).stat().st_size == file["size"], name
    for id in range(40):
        i = int(latents.caption(id).split()[1])
        rng = stream(0, "sample", i)
        z = (3 * normal(rng, latents.shape_of(id)) + 1).bfloat16().float()
        assert torch.equal(latents.sample([id])[0][0], (z - latents.mean) / latents.std)


def test_a_file_that_lost_what_another_ranks_journal_lists_is_named(tmp_path):
    for rank in range(2):
        fill(Writer(tmp_path, spec(), rank), range(10 * rank, 10 * rank + 10)).save()
    os.truncate(tmp_path / "text.1.bin", 100)
    with pytest.raises(ValueError, match=r"text.1.bin has 100 bytes where the journal lists \d+"):
        Writer(tmp_path, spec(), rank=0).finish(NULL)
    assert not (tmp_path / "manifest.json").exists()


def test_a_marked_key_is_done_and_no_sample(tmp_path):
    writer = fill(Writer(tmp_path, spec()), range(5))
    writer.mark('a film "of" five \\ clips, "key": "one"')
    writer.save()
    writer = Writer(tmp_path, spec(), rank=1)
    assert 'a film "of" five \\ clips, "key": "one"' in writer.done and "key 4" in writer.done
    assert "one" not in writer.done and "a film " not in writer.done and "key 5" not in writer.done
    writer.finish(NULL)
    assert opened(tmp_path).count == 5 and opened(tmp_path).caption(4) == "caption 4"
    assert "key 4" in Writer(tmp_path, spec()).done


def test_captions_that_look_like_a_journal_stay_themselves(tmp_path):
    writer = Writer(tmp_path, spec())
    captions = ['", "rows": 3', '\\", "caption": "x', "un été\n\u2028", "", '{"caption": "y", "rows": 1}', "caption"]
    for i, caption in enumerate(captions):
        writer.add(torch.zeros(SMALL), torch.zeros(1, 8), caption=caption, source=f'"{i}".mp4', key=caption)
    writer.finish(NULL)
    assert [opened(tmp_path).caption(i) for i in range(6)] == captions
    lines = [json.loads(line) for line in open(tmp_path / "captions.jsonl")]
    assert lines == [{"id": i, "caption": caption, "source": f'"{i}".mp4'} for i, caption in enumerate(captions)]
    assert all(caption in Writer(tmp_path, spec()).done for caption in captions)


def test_mean_and_std_are_the_same_bits_whatever_is_read_at_once(tmp_path, monkeypatch):
    def manifest(path):
        for rank in range(2):
            fill(Writer(path, exact, rank), range(30 * rank, 30 * rank + 30)).save()
        return Writer(path, exact).finish(NULL)
    exact = spec(dtype="fp32")      # sums of bf16 are exact in float64, in any order
    whole = manifest(tmp_path / "a")
    total = squares = 0
    for bucket, files in ((SMALL, ("4x3x2x2.0", "4x3x2x2.1")), (WIDE, ("4x3x2x4.0", "4x3x2x4.1"))):
        for file in files:
            rows = torch.from_numpy(np.fromfile(tmp_path / f"a/{file}.bin", np.float32)).view(-1, 1024)
            for row in rows:
                z = row[:np.prod(bucket)].view(4, -1).double()
                total, squares = total + z.sum(1), squares + z.square().sum(1)
    n = 40 * 12 + 20 * 24
    assert whole["mean"] == (total / n).tolist()
    assert whole["std"] == (squares / n - (total / n).square()).sqrt().tolist()
    monkeypatch.setattr(data, "BLOCK", 3 * 4096)        # 20 and 10 samples in each file
    assert manifest(tmp_path / "b") == whole


@pytest.mark.slow
def test_many_samples_take_little_memory(tmp_path, monkeypatch):
    """Bytes for each. At 496ae65: 1349 of a Writer's start, on every rank, 1639 of `finish`, 135 of Latents."""
    monkeypatch.setattr(data, "BLOCK", 1 << 16)
    make(tmp_path / "before", 3)        # what is imported at the first time is no sample's
    count, prompts = 20_000, spec(shape=list(SMALL))
    line = {"rank": 1, "key": "", "caption": "a dozen words " * 6, "source": "film.mp4", "rows": 2,
            "shape": list(SMALL), "crc": [0, zlib.crc32(bytes(32))]}
    tmp_path.joinpath("journal.1.jsonl").write_text("".join(json.dumps(line | {"key": f"{i}"}) + "\n"
                                                            for i in range(count)))
    with open(tmp_path / "text.1.bin", "wb") as file:
        file.truncate(count * 32)

    def peak(function):
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        result = function()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return (most - before) / count, result

    each, writer = peak(lambda: Writer(tmp_path, prompts))
    assert each < 40
    assert peak(lambda: writer.finish(NULL))[0] < 200
    assert peak(lambda: opened(tmp_path, val=16))[0] < 80


# ---- a second time --------------------------------------------------------------------------------------------------

def sample_of(i, seed=0):
    """Latent and text of a sample called i."""
    rng = stream(seed, "sample", i)
    return 3 * normal(rng, (SMALL, WIDE, SMALL)[i % 3]) + 1, normal(rng, (i % 4 + 1, 8))


def change(writer):
    """Of samples 0 to 5, 1 and 4 get another text, 2 another latent and text, 3 is gone; 20 is new."""
    def put(i, edition, latent=True, seed=0):
        if writer.done.stored(f"key {i}").edition < edition:
            z, text = sample_of(i, seed)
            writer.add(z if latent else None, text, caption=f"caption {i}.{edition}", source=f"{i}.mp4",
                       key=f"key {i}", edition=edition)
    put(1, 1, latent=False, seed=1)
    put(2, 1, seed=1)
    if writer.done.stored("key 3").live:
        writer.drop("key 3", 1)
    put(4, 1, latent=False, seed=1)
    put(20, 0)
    writer.save()
    return writer


def held(path):
    """{caption: (latent as stored, text)} of a dataset, all of it read and checked."""
    latents, found = opened(path), {}
    for id in range(latents.count):
        [x0], [text] = latents.sample([id])
        found[latents.caption(id)] = (x0 * latents.std + latents.mean, text)
    return found


def alike(a, b):
    return a.keys() == b.keys() and all(
        torch.allclose(x, y, atol=1e-4) for name in a for x, y in zip(a[name], b[name]))


def wanted_after_change():
    """What `held` gives then."""
    found = {}
    for i in (0, 1, 2, 3, 4, 5, 20):
        latent, text = sample_of(i, seed=int(i == 2))
        if i in (1, 4):
            text = sample_of(i, seed=1)[1]
        name = f"caption {i}" + {1: ".1", 2: ".1", 4: ".1", 20: ".0"}.get(i, "")
        padded = torch.zeros(5, 8)
        padded[:len(text)] = text.bfloat16().float()
        found[name] = latent.bfloat16().float(), padded
    del found["caption 3"]
    return found


def test_samples_that_are_made_again_take_the_places_of_those_they_replace(tmp_path):
    make(tmp_path, 6)
    before = [opened(tmp_path).caption(id) for id in range(6)]
    change(Writer(tmp_path, spec())).finish(NULL)
    assert alike(held(tmp_path), wanted_after_change())
    after = [opened(tmp_path).caption(id).partition(".")[0] for id in range(6)]
    before.remove("caption 3")
    assert [name for name in after if name != "caption 20"] == before


def test_an_edition_outranks_the_one_before_in_whichever_journal_it_is(tmp_path):
    make(tmp_path, 6)
    change(Writer(tmp_path, spec(), rank=1))                        # interrupted, and gone on with by rank 0 alone
    writer = change(Writer(tmp_path, spec(), rank=0))
    writer.add(*sample_of(1, seed=2), caption="the last", source="1.mp4", key="key 1", edition=2)
    writer.finish(NULL)
    assert len(held(tmp_path)) == 6 and "the last" in held(tmp_path) and "caption 1.1" not in held(tmp_path)


@pytest.mark.slow
def test_an_interruption_anywhere_loses_nothing(tmp_path, monkeypatch):
    """At the first, second, … time that something is put on disk, renamed or removed; compaction is a part of it."""
    old, new = held(make(tmp_path / "once", 6)), wanted_after_change()
    left = []

    def dying(of):
        def call(*args, **options):
            if not left:
                return of(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return of(*args, **options)
        return call

    monkeypatch.setattr(store, "sync", dying(lambda file: file.flush()))
    monkeypatch.setattr(store.os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    ends, kills = [], 0
    while True:
        path = shutil.copytree(tmp_path / "once", tmp_path / f"killed {kills}")
        left[:] = [kills + 1]
        try:
            writer = change(Writer(path, spec()))
            writer.finish(NULL)
            writer.compact()
        except Killed:
            left.clear()
            found = held(path)
            assert alike(found, old) or alike(found, new), kills
            ends.append(alike(found, new))
            writer = change(Writer(path, spec()))
            writer.finish(NULL)
            writer.compact()
            assert alike(held(path), new), kills
            assert not Journals(path).stored("key 3").live
            kills += 1
        else:
            break
    assert kills > 30 and ends == sorted(ends), "first the old dataset, from one point on the new"


def test_compaction_leaves_what_counts(tmp_path):
    make(tmp_path, 6)
    writer = change(Writer(tmp_path, spec()))
    before = writer.finish(NULL)
    captions = [opened(tmp_path).caption(id) for id in range(6)]
    training = opened(tmp_path)
    assert writer.compact() > 3 * 4096
    assert [opened(tmp_path).caption(id) for id in range(6)] == captions
    assert alike(held(tmp_path), wanted_after_change())
    assert training.caption(5) == captions[5] and torch.equal(training.sample([5])[0], opened(tmp_path).sample([5])[0])
    after = opened(tmp_path).manifest
    for bucket in after["buckets"]:
        assert bucket["count"] == sum(n for _, n in bucket["files"])
    assert {file.name for file in tmp_path.iterdir()} - after["files"].keys() == {
        "manifest.json", "spec.json", "captions.jsonl", f"compact.{after['compact']}.jsonl"}
    assert writer.compact() == 0
    content = opened(tmp_path).content
    Writer(tmp_path, spec()).finish(NULL)
    assert opened(tmp_path).content == content == before["crc32"]


def test_a_rank_that_starts_late_leaves_the_files_of_others_alone(tmp_path):
    other = fill(Writer(tmp_path, spec(), rank=1), range(5))
    other.save()
    fill(other, range(5, 9))
    for file in other.files.values():
        file.flush()                                # ahead of its journal
    before = contents(tmp_path)
    Writer(tmp_path, spec(), rank=0)
    assert before == {name: content for name, content in contents(tmp_path).items() if name in before}


def test_a_dataset_is_filled_with_one_setting(tmp_path):
    fill(Writer(tmp_path, spec()), range(5)).save()
    with pytest.raises(ValueError, match="fps was 8 and is now 16"):
        Writer(tmp_path, spec(fps=16))


@pytest.mark.parametrize("latent, text, reason", [
    (torch.full(SMALL, float("nan")), torch.zeros(2, 8), "film.mp4: a latent or text with numbers that are not finite"),
    (torch.zeros(SMALL), torch.full((2, 8), torch.inf), "film.mp4: a latent or text with numbers that are not finite"),
    (torch.zeros(SMALL), torch.zeros(2, 9), r"film.mp4: text of shape \(2, 9\), wanted at most 5 rows of 8"),
    (torch.zeros(SMALL), torch.zeros(6, 8), r"film.mp4: text of shape \(6, 8\), wanted at most 5 rows of 8"),
])
def test_a_sample_that_does_not_fit_is_refused(tmp_path, latent, text, reason):
    writer = Writer(tmp_path, spec())
    with pytest.raises(ValueError, match=reason):
        writer.add(latent, text, caption="", source="film.mp4", key="0")
    writer.save()
    assert not writer.files and (tmp_path / "journal.0.jsonl").read_bytes() == b""


def test_half_power_keeps_quiet_channels_quiet(tmp_path):
    writer = Writer(tmp_path, spec())
    loud = torch.tensor([4., 2., 1., 0.]).view(4, 1, 1, 1)      # the last channel is constant
    for i in range(200):
        writer.add(normal(stream(0, "sample", i), SMALL) * loud, torch.ones(1, 8), caption="", source="", key=f"{i}")
    writer.finish(NULL, half_power=True)
    x0, _ = opened(tmp_path).sample(list(range(200)))
    power = x0.square().mean((0, 2, 3, 4))
    assert abs(power.mean() - 1) < 0.01
    assert torch.allclose(power[0] / power[1], torch.tensor(2.), rtol=0.1) and power[3] < 1e-3


def test_a_constant_mean_and_std_are_kept(tmp_path):
    manifest = fill(Writer(tmp_path, spec()), range(5)).finish(NULL, mean=[1., 2., 3., 4.], std=[1., 1., 2., 2.])
    assert manifest["mean"] == [1, 2, 3, 4] and manifest["std"] == [1, 1, 2, 2]


def test_nothing_stored_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="nothing was stored"):
        Writer(tmp_path, spec()).finish(NULL)


# ---- extra tensors --------------------------------------------------------------------------------------------------

EXTRAS = {"image": None, "clip": [3, 5]}        # one like the latent, one of a shape of its own


def with_extras(writer, indices, edition=0):
    """Samples as `fill` makes them, and beside each latent what `extras_of` gives."""
    for i in indices:
        rng = stream(edition, "sample", i)
        latent, text = 3 * normal(rng, (SMALL, WIDE)[i % 2]) + 1, normal(rng, (i % 4 + 1, 8))
        writer.add(latent, text, caption=f"caption {i}", source=f"{i}.mp4", key=f"key {i}", edition=edition,
                   extras=extras_of(i, edition))
    return writer


def extras_of(i, edition=0):
    rng = stream(edition, "noise", i)
    return {"image": normal(rng, (SMALL, WIDE)[i % 2]).bfloat16(), "clip": normal(rng, (3, 5)).bfloat16()}


def check_extras(path, editions):
    """Every sample's extra tensors are those that were made for it, whatever files they lie in."""
    latents = opened(path)
    assert latents.extra_shapes() == {"image": SMALL, "clip": (3, 5)}
    for id in range(latents.count):
        i = int(latents.caption(id).split()[1])
        found = latents.extras([id])
        assert all(torch.equal(found[name][0], x.float()) for name, x in extras_of(i, editions[i]).items())
    assert latents.count == len(editions)


def test_extra_tensors_come_as_they_were_stored_beside_their_latents(tmp_path):
    with_extras(Writer(tmp_path, spec(extras=EXTRAS)), range(40)).finish(NULL)
    check_extras(tmp_path, [0] * 40)
    [micro] = opened(tmp_path).at(0)
    assert {name: x.shape for name, x in micro.extras.items()} == {"image": micro.x0.shape, "clip": (4, 3, 5)}
    for n, id in enumerate(micro.ids):
        i = int(opened(tmp_path).caption(id).split()[1])
        assert torch.equal(micro.extras["image"][n], extras_of(i)["image"].float())


def test_samples_without_extra_tensors_have_none(dataset):
    assert opened(dataset).at(0)[0].extras == {}
    assert opened(dataset).extra_shapes() == {}


def test_extra_tensors_of_several_ranks_are_joined_and_tails_cut(tmp_path):
    writers = [Writer(tmp_path, spec(extras=EXTRAS), rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        with_extras(writer, range(rank, 40, 2)).save()
    for file in writers[1].files.values():
        file.write(b"half a sam")
        file.close()
    Writer(tmp_path, spec(extras=EXTRAS)).finish(NULL)
    check_extras(tmp_path, [0] * 40)


def test_extra_tensors_of_samples_made_again_replace_the_old_also_when_compacted(tmp_path):
    with_extras(Writer(tmp_path, spec(extras=EXTRAS)), range(40)).finish(NULL)
    writer = with_extras(Writer(tmp_path, spec(extras=EXTRAS)), range(10, 20), edition=1)
    writer.finish(NULL)
    editions = [int(10 <= i < 20) for i in range(40)]
    check_extras(tmp_path, editions)
    assert writer.compact() > 10 * 3 * 4096
    check_extras(tmp_path, editions)
    assert {name for name in contents(tmp_path) if ".image." in name or ".clip." in name} <= set(
        opened(tmp_path).manifest["files"])


@pytest.mark.parametrize("name", ["4x3x2x2.image.0.bin", "4x3x2x2.clip.0.bin"])
def test_a_flipped_bit_in_an_extra_tensor_is_found_when_it_is_read(tmp_path, name):
    with_extras(Writer(tmp_path, spec(extras=EXTRAS)), range(40)).finish(NULL)
    damage(tmp_path / name, 5 * 4096 + 3)
    latents = opened(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: sample 5 is not what was written"):
        latents.extras([5])
    latents.extras([4])


@pytest.mark.parametrize("extras, said", [
    ({}, r"extra tensors \{\}, wanted are \{'image': \(4, 3, 2, 2\), 'clip': \(3, 5\)\}"),
    ({"image": torch.zeros(SMALL), "clip": torch.zeros(5, 3)}, r"'clip': \(5, 3\)\}, wanted"),
    ({"image": torch.zeros(SMALL), "clip": torch.full((3, 5), torch.nan)}, "not finite"),
])
def test_a_sample_without_its_extra_tensors_is_refused(tmp_path, extras, said):
    writer = Writer(tmp_path, spec(extras=EXTRAS))
    with pytest.raises(ValueError, match=said):
        writer.add(torch.zeros(SMALL), torch.zeros(1, 8), caption="c", source="s", key="k", extras=extras)


def test_datasets_with_and_without_extra_tensors_are_not_mixed(dataset, tmp_path):
    with_extras(Writer(tmp_path / "other", spec(extras=EXTRAS)), range(40)).finish(NULL)
    with pytest.raises(ValueError, match=r"the extra tensors of one is \['clip', 'image'\], of the other \[\]"):
        opened([dataset, tmp_path / "other"])
