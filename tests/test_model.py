"""model.py against diffusers' Wan, against itself in other arrangements, and against counted operations."""
import math
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import parallel
from attention import attention, build_metadata, reference
from model import (LOCAL, MODELS, USUAL, Bound, Cond, DiT, ModelConfig, Pair, Seq, add_lora, bind, blank, chunked, fits,
                   flops, initial, lengths, models_of, rope_rows, rope_table, shapes_of)

ops = torch.ops
SMALL = ModelConfig(dim=48, blocks=3, heads=4, ffn=80, channels=6, text_dim=20)
GRID = (3, 4, 6)        # tokens of the latents that `batch` makes


def build(config=SMALL, remat=False, adapters=()):
    """A model in which no parameter is all zeros or ones, so that none can be left out unseen."""
    with torch.device("meta"):
        net = DiT(config, remat)
        for name in adapters:
            add_lora(net, name, rank=2, alpha=3)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in net.named_parameters():
            rng = np.random.default_rng(list(name.encode()))     # adapters do not shift the others
            p.copy_(initial(name, p.shape, rng) + 0.03 * torch.from_numpy(rng.standard_normal(p.shape, np.float32)))
    return net


def batch(config=SMALL, B=2, shape=(3, 8, 12), S=5, frames=False):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(B, config.channels, *shape, generator=rng)
    t = torch.rand((B, shape[0]) if frames else B, generator=rng)
    cond = Cond(torch.randn(B, S, config.text_dim, generator=rng))
    shown = {name: torch.randn(B, *wanted, generator=rng)
             for name, wanted in config.conditions(shape).items() if wanted}
    return x, t, cond._replace(**shown)


def run(net, x, t, cond, **kwargs):
    """The output and the gradients of a weighted sum of it, by name."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    v = net(x, t, cond, **kwargs)
    if isinstance(v, tuple):    # diffusers'
        v = v[0]
    (v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum().backward()
    return {"v": v.detach(), "x": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def assert_close(got, want, limit=1e-5):
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= limit, {n: e for n, e in errors.items() if e > limit}


# ---- Wan ------------------------------------------------------------------------------------------------------------

RENAMES = (
    (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"cross_attn\.([kv])_img", r"attn2.add_\1_proj"),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.head", "proj_out"),
    (r"^head\.modulation", "scale_shift_table"),
    (r"\.modulation", ".scale_shift_table"),
    (r"\.norm3", ".norm2"),
    (r"self_attn", "attn1"),
    (r"cross_attn", "attn2"),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", r".to_out.0."),
    (r"ffn\.0", "ffn.net.0.proj"),
    (r"ffn\.2", "ffn.net.2"),
)


def diffusers_name(name):
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("frames", (False, True), ids=("one t per sample", "one t per frame"))
@pytest.mark.parametrize("config, B, shape, S", (
    (SMALL, 2, (3, 8, 12), 5),
    (ModelConfig(dim=64, blocks=1, heads=2, ffn=48, channels=16, text_dim=32), 3, (1, 6, 4), 3),
    (ModelConfig(dim=256, blocks=4, heads=2, ffn=320, channels=4, text_dim=24, eps=1e-3), 1, (5, 4, 10), 9),
), ids=("width 12", "width 32", "width 128"))
def test_outputs_and_gradients_equal_those_of_diffusers(config, B, shape, S, frames):
    diffusers = pytest.importorskip("diffusers")
    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads, ffn_dim=config.ffn,
        num_layers=config.blocks, in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim,
        eps=config.eps)
    net = build(config)
    wan.load_state_dict({diffusers_name(name): value for name, value in net.state_dict().items()})

    x, t, cond = batch(config, B, shape, S, frames)
    got = {diffusers_name(name): value for name, value in run(net, x, t, cond).items()}
    if frames:
        t = t.repeat_interleave(shape[1] * shape[2] // 4, 1)        # diffusers takes one t per token
    assert_close(got, run(wan, x, 1000 * t, cond.text, return_dict=False))


@pytest.mark.slow
@pytest.mark.parametrize("clip_dim", (0, 40), ids=("Wan 2.2", "Wan 2.1 with CLIP"))
def test_image_to_video_equals_that_of_diffusers(clip_dim):
    config = replace(SMALL, inputs=16, clip_dim=clip_dim)
    kind = pytest.importorskip("diffusers").WanTransformer3DModel
    clip = dict(image_dim=clip_dim, added_kv_proj_dim=config.dim) if clip_dim else {}
    wan = kind(num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads, ffn_dim=config.ffn,
               num_layers=config.blocks, in_channels=16, out_channels=6, text_dim=20, eps=config.eps, **clip)
    net = build(config)
    wan.load_state_dict({diffusers_name(name): value for name, value in net.state_dict().items()})
    x, t, cond = batch(config, S=512)       # diffusers takes the last 512 tokens for text
    got = {diffusers_name(name): value for name, value in run(net, x, t, cond).items()}

    x.requires_grad_()
    out = wan(torch.cat((x, cond.image), 1), 1000 * t, cond.text, cond.clip, return_dict=False)[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    want = {"v": out.detach(), "x": x.grad} | {name: p.grad for name, p in wan.named_parameters()}
    assert_close(got, want)
    assert ("condition_embedder.image_embedder.norm1.bias" in want) == (clip_dim > 0)


@pytest.mark.parametrize("name, keys", (("wan-14b", 1095), ("wan2.2-a14b", 1095), ("wan2.2-a14b-i2v", 1095),
                                        ("wan-14b-i2v", 1303)))
def test_the_large_presets_have_the_keys_of_diffusers(name, keys):
    kind, config = pytest.importorskip("diffusers").WanTransformer3DModel, MODELS[name]
    clip = dict(image_dim=1280, added_kv_proj_dim=5120) if name == "wan-14b-i2v" else {}
    with torch.device("meta"):
        wan = kind(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40, text_dim=4096,
                   in_channels=36 if "i2v" in name else 16, out_channels=16, **clip)
    ours = {diffusers_name(key): shape for key, shape in shapes_of(name).items()}
    assert ours == {key: tuple(x.shape) for key, x in wan.state_dict().items()}
    assert len(ours) == keys
    assert config.conditions((21, 60, 104)) == {
        "image": (20, 21, 60, 104) if "i2v" in name else None,
        "clip": (257, 1280) if name == "wan-14b-i2v" else None}


@pytest.mark.parametrize("name, parameters", (
    ("tiny", 1_259_744), ("wan-1.3b", 1_418_996_800), ("wan2.2-5b", 4_999_787_712), ("wan-14b", 14_288_491_584),
    ("wan-14b-i2v", 16_394_878_784), ("wan2.2-a14b", 14_288_491_584), ("wan2.2-a14b-i2v", 14_288_901_184)))
def test_the_presets_have_their_sizes_and_no_buffer(name, parameters):
    with torch.device("meta"):
        net = DiT(MODELS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert not list(net.buffers())


def test_initial_values_follow_the_recipe_and_depend_on_name_shape_and_stream_only():
    def draw(name, *shape):
        value = initial(name, shape, np.random.default_rng(7))
        assert value.shape == shape
        assert value.dtype == torch.float32
        assert torch.equal(value, initial(name, shape, np.random.default_rng(7)))
        return value

    for name, shape, fans in (("blocks.1.ffn.0.weight", (300, 200), 500), ("text_embedding.0.weight", (300, 200), 500),
                              ("patch_embedding.weight", (300, 25, 1, 2, 2), 400)):
        weight, bound = draw(name, *shape), (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3 ** 0.5) - 1) < 0.02
        assert abs(weight.mean()) < 0.02 * bound
    for name in ("head.head.weight", "blocks.0.self_attn.q.lora.student.B"):
        assert draw(name, 30, 20).eq(0).all()
    for name in ("blocks.0.cross_attn.norm_q.weight", "blocks.0.norm3.weight"):
        assert draw(name, 40).eq(1).all()
    for name in ("blocks.0.norm3.bias", "head.head.bias"):
        assert draw(name, 40).eq(0).all()

    A = draw("blocks.0.self_attn.q.lora.student.A", 80, 400)
    assert A.abs().max() <= 400 ** -0.5
    assert abs(A.std() / (1 / 1200 ** 0.5) - 1) < 0.02      # kaiming uniform, a = √5

    rows = draw("blocks.3.modulation", 1, 6, 10_000)[0]
    assert (rows.std(1) * 100 - 1).abs().max() < 0.05
    assert (rows.mean(1) - torch.tensor([0, 0, 1, 0, 0, 1])).abs().max() < 1e-3
    assert draw("head.modulation", 1, 2, 10_000).mean().abs() < 1e-3


def test_a_new_model_says_zero():
    net = build()
    rng = np.random.default_rng(0)
    for name, p in net.named_parameters():
        p.data = initial(name, p.shape, rng)
    assert net(*batch()).eq(0).all()


# ---- the order of tokens --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", (False, True))
def test_any_order_of_tokens_gives_the_same_output(frames):
    order = torch.randperm(math.prod(GRID), generator=torch.Generator().manual_seed(0))
    shuffled = SimpleNamespace(order=order, inverse=order.argsort(), sparsity=0)        # 0: attention is dense
    net, inputs = build(), batch(frames=frames)
    assert_close(run(net, *inputs, metadata=shuffled), run(net, *inputs))


def test_a_window_in_tile_order_is_a_mask_in_raster_order():
    metadata = build_metadata(GRID, tile=(2, 2, 2), window=(1, 1, 3))
    assert metadata.sparsity > 0.5
    assert not torch.equal(metadata.order, metadata.order.sort().values)

    def masked(q, k, v, _):
        q, k, v = (x[:, metadata.order] for x in (q, k, v))
        return reference(q, k, v, metadata)[:, metadata.inverse]

    net, inputs = build(), batch(frames=True)
    in_raster_order = run(net, *inputs, seq=LOCAL._replace(attend=masked))
    assert_close(run(net, *inputs, metadata=metadata), in_raster_order)
    assert error(in_raster_order["v"], net(*inputs)) > 1e-2


@pytest.mark.parametrize("ends, sparse", ((0, [1, 1, 1]), (1, [0, 1, 0]), (2, [0, 0, 0])))
def test_the_first_and_last_blocks_stay_dense(ends, sparse):
    metadata, seen = build_metadata(GRID, tile=(2, 2, 2), window=(1, 1, 1)), []

    def attend(q, k, v, metadata):
        seen.append(metadata)
        return attention(q, k, v, metadata)

    build()(*batch(), metadata=metadata, dense_ends=ends, seq=LOCAL._replace(attend=attend))
    assert seen == [metadata if s else None for s in sparse]


@pytest.mark.parametrize("frames", (False, True))
def test_a_padded_sequence_gives_the_same_output(frames):
    L, pad = math.prod(GRID), 5
    padded = Seq(split=lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)),
                 attend=lambda q, k, v, m: F.pad(attention(q[:, :L], k[:, :L], v[:, :L], m), (0, 0, 0, 0, 0, pad)),
                 join=lambda x: x[:, :L])
    net, inputs = build(), batch(frames=frames)
    for metadata in (None, build_metadata(GRID, tile=(2, 2, 2), window=(3, 1, 1))):
        assert_close(run(net, *inputs, metadata=metadata, seq=padded), run(net, *inputs, metadata=metadata))


# ---- precision, memory, speed ---------------------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    """Counts the operators that work on numbers, and apart those of them that are given bf16."""

    def __init__(self):
        super().__init__()
        self.all, self.bf16 = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.all[op] += 1
        if not op.is_view and op is not ops.aten._to_copy.default:
            self.bf16[op] += any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args)
        return op(*args, **(kwargs or {}))


def halve(net, names=("",)):
    """Puts what FSDP would gather in bf16, or the parameters that have one of these words in their names, in bf16."""
    kept = set() if names != ("",) else {p for module in net.islands() for p in module.parameters()}
    for name, p in net.named_parameters():
        if p not in kept and any(word in name for word in names):
            p.data = p.data.bfloat16()
    return net


def test_only_matrix_products_attention_and_gelu_see_bf16():
    net, inputs = halve(build()), batch(frames=True)
    with torch.no_grad(), Calls() as calls:
        assert net(*inputs).dtype == torch.float32
    outside = 3     # the patch embedding's and the text's; time and head are fp32
    assert +calls.bf16 == {ops.aten.addmm.default: 10 * SMALL.blocks + outside,
                           ops.nanovideo.attend.default: 2 * SMALL.blocks, ops.aten.gelu.default: SMALL.blocks + 1}
    assert net(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16       # v is like x


def test_bf16_drifts_little_from_fp32():
    config = replace(SMALL, blocks=12)
    inputs = batch(config)
    got, want = run(halve(build(config)), *inputs), run(build(config), *inputs)
    assert error(got["v"], want["v"]) < 1.5e-2
    assert np.median([error(got[name], want[name]) for name in want]) < 1.5e-2


@pytest.mark.parametrize("part", ("norm", "modulation", "ffn", "self_attn.v", "cross_attn", "embedding", "head"))
def test_any_part_may_be_bf16(part):
    net, inputs = build(), batch()
    want = net(*inputs)
    assert 0 < error(halve(net, (part,))(*inputs), want) < 2e-2


def test_remat_changes_nothing_and_runs_attention_once():
    metadata = build_metadata(GRID, tile=(2, 2, 2), window=(1, 3, 1))
    plain, remat = (build(remat=remat) for remat in (False, True))
    with Calls() as once:
        want = run(plain, *batch(), metadata=metadata, dense_ends=1)
    with Calls() as twice:
        assert_close(run(remat, *batch(), metadata=metadata, dense_ends=1), want, limit=0)
    again = twice.all - once.all
    assert once.all[ops.nanovideo.attend.default] == 2 * SMALL.blocks
    assert again[ops.nanovideo.attend.default] == 0
    assert again[ops.aten.addmm.default] == 10 * SMALL.blocks


@pytest.mark.slow
@pytest.mark.parametrize("remat", (False, True))
def test_blocks_compile_whole_and_into_one_graph(remat):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, inputs = build(remat=remat, adapters=("student",)), batch()

    def grads():
        net.zero_grad()
        net(*inputs, lora="student").square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}

    want = grads()
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(grads(), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1     # block 0 too, above frozen embeddings


def test_a_model_that_has_sampled_can_train():
    rope_table.cache_clear()
    net, inputs = build(), batch()
    with torch.inference_mode():
        net(*inputs)
    run(net, *inputs)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ends", (None, 0, 1, 3))
def test_flops_are_those_that_torch_counts(name, ends):
    config = replace(MODELS[name], blocks=4)
    sparse = {}
    if ends is not None:
        metadata = build_metadata((5, 8, 12), tile=(2, 4, 4), window=(1, 1, 3), device="meta")
        sparse = dict(metadata=metadata, dense_ends=ends)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, t, cond = batch(config, 3, (5, 16, 24), 7)
        bound = Bound(DiT(config), **sparse)
        cond = Cond(*(part.to("meta") if torch.is_tensor(part) else part for part in cond))
        bound(x.to("meta"), t.to("meta"), cond)
    assert 3 * bound.flops(x.shape[1:], 7) == counter.get_total_flops()
    with counter:
        bound(x, torch.empty(3, 5, device="meta"), cond)
    assert 3 * bound.flops(x.shape[1:], 7, times=5) == counter.get_total_flops()


def test_flops_of_wan_at_480p():
    assert flops(MODELS["wan-1.3b"], (16, 21, 60, 104), 512) == pytest.approx(283.0e12, rel=1e-3)


# ---- chunk by chunk --------------------------------------------------------------------------------------------------

ALONE = parallel.imagine(1)._replace(device=torch.device("cpu"))


def long_batch(frames, B=2):
    """Latents, a t per frame and a condition."""
    return batch(B=B, shape=(frames, 8, 12), frames=True)


def in_turn(net, x, t, cond, chunk):
    """What a Chunked net says of each chunk of x at t, all before it being clean x: side by side."""
    vs = []
    for part, times in zip(x.split(chunk, 2), t.split(chunk, 1)):
        vs.append(net(part, times, cond))
        cond = net.see(cond, part)
    return torch.cat(vs, 2)


def under_pattern(net, x, t, cond, window, tile):
    """The same without a past: the i-th chunk of an uncached forward in which all before are at t = 0."""
    chunk, vs = tile[0], []
    for first in range(0, x.shape[2], chunk):
        times = t.clone()
        times[:, :first] = 0
        seen = slice(0, first + chunk)
        bound = bind(net, x[:, :, seen].shape, ALONE, window, tile)
        vs.append(bound(x[:, :, seen], times[:, seen], cond)[:, :, first:])
    return torch.cat(vs, 2)


@pytest.mark.parametrize("chunk, window", [(1, 9), (2, 9), (3, 9), (1, 2), (1, 3), (2, 2), (3, 1)])
def test_with_a_cache_each_chunk_is_the_one_of_the_pattern_without(chunk, window):
    net, (x, t, cond) = build(), long_batch(7)      # at least three chunks, the last of 2 and of 3 shorter
    pattern = (-window, 1, 1), (chunk, 99, 99)
    causal = chunked(net, x.shape, ALONE, *pattern)
    assert causal.cached
    with torch.no_grad():
        assert error(in_turn(causal, x, t, cond, chunk), under_pattern(net, x, t, cond, *pattern)) < 1e-6


@pytest.mark.parametrize("window, tile", [((-9, 1, 3), (1, 2, 2)), ((-2, 1, 1), (2, 2, 3))])
def test_where_tiles_slide_in_space_the_past_is_clean_latents_and_gives_the_same(window, tile):
    net, (x, t, cond) = build(), long_batch(5)
    causal = chunked(net, x.shape, ALONE, window, tile)
    assert not causal.cached
    assert causal.see(cond, x[:, :, :tile[0]]).past[0].equal(x[:, :, :tile[0]])
    with torch.no_grad():
        got = in_turn(causal, x, t, cond, tile[0])
        assert error(got, under_pattern(net, x, t, cond, window, tile)) < 1e-6


def test_without_a_cache_a_past_longer_than_a_net_looks_back_is_dropped_and_changes_nothing():
    net, (x, t, cond) = build(), long_batch(9)
    slow, quick = (replace(chunked(net, x.shape, ALONE, (-2, 1, 1), (1, 99, 99)), cached=way) for way in (False, True))
    with torch.no_grad():
        assert error(in_turn(slow, x, t, cond, 1), in_turn(quick, x, t, cond, 1)) < 1e-6
        for part in x.split(1, 2):
            cond = slow.see(cond, part)
    assert len(cond.past) == SMALL.blocks


@pytest.mark.parametrize("window, sink, kept", [(9, 0, "012345"), (3, 0, "45"), (3, 1, "045"), (1, 0, ""), (1, 2, "01"),
                                                (2, 5, "012345"), (5, 2, "012345"), (4, 2, "01345")])
def test_of_the_past_the_first_and_the_last_chunks_stay(window, sink, kept):
    net, (x, _, cond) = build(), long_batch(6, B=1)
    causal, full = (chunked(net, x.shape, ALONE, (-n, 1, 1), (1, 99, 99), sink=sink) for n in (window, 9))
    own = []
    with torch.no_grad():
        for part in x.split(1, 2):
            before = cond
            cond = causal.see(before, part)
            own.append(net(part, torch.zeros(1), before, keep=True)[1])
    assert len(cond.past) == len(kept)
    for chunk, name in zip(cond.past, kept):
        assert torch.equal(chunk[1][0], own[int(name)][1][0])


def test_each_condition_has_the_past_of_its_own_text():
    net, (x, t, cond) = build(), long_batch(3)
    causal = chunked(net, x.shape, ALONE, (-9, 1, 1), (1, 99, 99))
    null = Cond(torch.zeros_like(cond.text))
    with torch.no_grad():
        for one in (cond, null):
            want = under_pattern(net, x, t, one, (-9, 1, 1), (1, 99, 99))
            assert error(in_turn(causal, x, t, one, 1), want) < 1e-6
        assert error(causal(x[:, :, 2:], t[:, 2:], causal.see(cond, x[:, :, :2])._replace(text=null.text)),
                     causal(x[:, :, 2:], t[:, 2:], causal.see(null, x[:, :, :2]))) > 1e-3


def test_the_past_has_no_graph_and_is_in_the_dtype_of_the_blocks():
    net, (x, t, cond) = halve(build(), ("blocks",)), long_batch(3)
    seen = chunked(net, x.shape, ALONE, (-9, 1, 1), (1, 99, 99)).see(cond, x.requires_grad_())
    assert [len(chunk) for chunk in seen.past] == [SMALL.blocks]
    assert {h.dtype for k, v in seen.past[0] for h in (k, v)} == {torch.bfloat16}
    assert not any(h.requires_grad for pair in seen.past[0] for h in pair)


@pytest.mark.parametrize("cached", [True, False])
def test_remat_changes_no_gradient_of_a_chunk_with_a_past(cached):
    x, t, cond = long_batch(4)
    grads = []
    for remat in (False, True):
        net = build(remat=remat, adapters=("student",))
        causal = replace(chunked(net, x.shape, ALONE, (-2, 1, 1), (1, 99, 99), lora="student"), cached=cached)
        seen = causal.see(causal.see(cond, x[:, :, :1]), x[:, :, 1:2])
        causal(x[:, :, 2:3], t[:, 2:3], seen).square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_close(*grads, limit=0)
    assert all(".lora.student." in name for name in grads[0])


def test_a_chunk_and_what_is_kept_of_it_are_of_the_adapter_that_is_named():
    net, (x, t, cond) = build(adapters=("student",)), long_batch(3)
    pattern = (-9, 1, 1), (1, 99, 99)
    for lora in ("student", None):
        causal = chunked(net, x.shape, ALONE, *pattern, lora=lora)
        bound = bind(net, x.shape, ALONE, *pattern, lora=lora)
        times = t * torch.tensor([0, 0, 1.0])
        with torch.no_grad():
            got = in_turn(causal, x, times, cond, 1)
            assert error(got, bound(x, times, cond)) < 1e-6


def test_rows_of_a_longer_clip_are_a_prefix_of_a_table_that_serves_many_lengths():
    rope_table.cache_clear()
    tables = [rope_rows(before, (2, 4, 6), 12, torch.device("cpu")) for before in range(2, 6)]
    for before, (cos, sin) in zip(range(2, 6), tables):
        want = rope_table((before + 2, 4, 6), 12, torch.device("cpu"))
        assert torch.equal(cos, want[0])
        assert torch.equal(sin, want[1])
    assert tables[1][0].data_ptr() == tables[3][0].data_ptr()      # 5 frames and 7


@pytest.mark.slow
@pytest.mark.parametrize("frames, window, tile, sink", [(7, -3, 2, 0)])
def test_blocks_compile_into_one_graph_per_length_of_the_past(frames, window, tile, sink):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, (x, t, cond) = build(), long_batch(frames)
    causal = chunked(net, x.shape, ALONE, (window, 1, 1), (tile, 99, 99), sink=sink)
    with torch.no_grad():
        want = in_turn(causal, x, t, cond, tile)
        for block in net.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        assert error(in_turn(causal, x, t, cond, tile), want) < 1e-6
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= lengths(SMALL, x.shape, (window, 1, 1), (tile, 99, 99), sink)


def test_a_past_that_cannot_be_is_refused():
    net, (x, t, cond) = build(), batch()
    sparse = build_metadata(GRID, (1, 2, 2), (-9, 1, 1))
    seen = chunked(net, x.shape, ALONE, (-9, 1, 1), (1, 99, 99)).see(cond, x)
    elsewhere = LOCAL._replace(join=lambda x: x)
    with pytest.raises(ValueError, match="dense_ends is 1.*future"):
        net(x, t, cond, metadata=sparse, dense_ends=1)
    for wrong in (dict(metadata=sparse), dict(seq=elsewhere)):
        with pytest.raises(ValueError, match="metadata is None and seq is LOCAL"):
            net(x, t, seen, **wrong)
        with pytest.raises(ValueError, match="metadata is None and seq is LOCAL"):
            net(x, t, cond, keep=True, **wrong)
    with pytest.raises(ValueError, match="wants frames of 24 in 3"):
        net(x, t, cond._replace(past=(seen.past[0][:2],)))
    with pytest.raises(ValueError, match="--sink=1 needs the cache"):
        chunked(net, x.shape, ALONE, (-9, 1, 1), (1, 2, 2), sink=1)
    with pytest.raises(ValueError, match="--sink=1 needs the cache"):
        chunked(net, x.shape, parallel.imagine(2, sp=2)._replace(device=torch.device("cpu")), (-9, 1, 1), (1, 9, 9),
                sink=1)


# ---- bound ----------------------------------------------------------------------------------------------------------

def test_a_bound_net_is_the_net_with_its_arguments():
    metadata = build_metadata(GRID, tile=(2, 2, 2), window=(1, 1, 1))
    net, inputs = build(adapters=("student",)), batch()
    bound = Bound(net, metadata, 1, "student")
    want = net(*inputs, metadata=metadata, dense_ends=1, lora="student")
    assert torch.equal(bound(*inputs), want)
    assert not torch.equal(bound(*inputs), Bound(net, metadata, 0, "student")(*inputs))
    assert not torch.equal(bound(*inputs), Bound(net, metadata, 1)(*inputs))
    assert not torch.equal(bound(*inputs), Bound(net)(*inputs))


def test_binding_makes_the_pattern_of_the_latents_tokens():
    world = parallel.imagine(1)._replace(device=torch.device("cpu"))
    latents = batch()[0]
    bound = bind(build(), latents.shape, world, window=[1, 1, 1], tile=[2, 2, 2], dense_ends=2, lora="main")
    assert bound.metadata is build_metadata(GRID, (2, 2, 2), (1, 1, 1))      # lists, as checkpoints have them, do
    assert (bound.dense_ends, bound.lora, bound.seq) == (2, "main", LOCAL)
    assert bind(build(), latents.shape, world).metadata is None


def test_binding_for_ranks_that_share_a_sample_splits_its_tokens():
    world = parallel.imagine(2, sp=2)._replace(device=torch.device("cpu"))
    bound = bind(build(), (6, 3, 8, 12), world)
    assert bound.seq.split(torch.zeros(1, math.prod(GRID), 48)).shape == (1, math.prod(GRID) // 2, 48)


def test_a_blank_net_is_on_meta_with_its_adapters():
    net = blank("tiny", remat=True, lora={"student": (2, 3.0), "critic": (4, 4.0)})
    assert all(p.is_meta for p in net.parameters())
    assert net.adapters == ("student", "critic")
    assert all(block.remat for block in net.blocks)
    assert net.blocks[0].ffn[0].lora["critic"].A.shape == (4, 128)
    assert net.blocks[0].ffn[0].lora["student"].scale == 1.5


@pytest.mark.parametrize("message, change", (
    (r"24 channels and text of width 64; --model=wan-1.3b takes 16 and 4096; \['tiny'\] would", dict(name="wan-1.3b")),
    ("no model would fit", dict(shapes=[(7, 5, 8, 8)])),
    (r"16 channels .* takes 24 and 64; \['wan-1.3b', 'wan-14b', 'wan2.2-a14b'\] would fit",
     dict(shapes=[(16, 5, 8, 8)], text_width=4096)),
    (r"16 channels .* takes 24 and 64; \['wan-14b-i2v'\] would fit",
     dict(shapes=[(16, 5, 8, 8)], text_width=4096, extras={"image_ends": (16, 5, 8, 8), "clip": (257, 1280)})),
    (r"images beside its latents .* --model=tiny is shown none; no model would fit, and tiny takes what .* --image",
     dict(extras={"image": (24, 5, 8, 8)})),
    ("--sp=3 does not divide the 4 heads", dict(sp=3)),
    (r"latents of \(24, 5, 7, 8\)", dict(shapes=[(24, 5, 8, 8), (24, 5, 7, 8)])),
    ("window", dict(window=(0, 1, 1))),
    ("tile", dict(window=(1, 1, 1), tile=(0, 1, 1))),
))
def test_a_model_that_a_dataset_does_not_fit_is_refused(message, change):
    fitting = dict(name="tiny", text_width=64, shapes=[(24, 5, 8, 8)], extras={}, sp=2, window=(3, 3, 3))
    fits(**fitting)
    with pytest.raises(ValueError, match=message):
        fits(**fitting | change)


@pytest.mark.parametrize("name, extras, message", (
    ("wan-14b-i2v", {}, r"--image stores them .*; without them \['wan-1.3b', 'wan-14b', 'wan2.2-a14b'\] would fit"),
    ("wan-14b-i2v", {"image": (16, 5, 8, 8)}, r"prepare.py --clip .* takes 1280; \['wan2.2-a14b-i2v'\] would fit"),
    ("wan-14b", {"image": (16, 5, 8, 8)},
     r"is shown none; \['wan2.2-a14b-i2v'\] would fit, and wan-14b takes what prepare.py stores without --image"),
))
def test_of_what_a_model_is_shown_the_ways_out_are_those_that_the_dataset_leaves(name, extras, message):
    with pytest.raises(ValueError, match=message):
        fits(name, 4096, [(16, 5, 8, 8)], extras)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_what_it_is_mostly_trained_on(name):
    shape, length = USUAL[name]
    fits(name, MODELS[name].text_dim, [shape], MODELS[name].conditions(shape[1:]))
    assert length > 0


# ---- LoRA -----------------------------------------------------------------------------------------------------------

def adapted(B=None):
    """A model with two adapters; B of both is zero, as in a new one, unless a scale is given."""
    net = build(adapters=("student", "critic"))
    for name, p in net.named_parameters():
        if name.endswith(".B"):
            p.data *= B or 0
    return net


def test_a_new_adapter_changes_nothing():
    net, inputs = adapted(), batch()
    for name in (None, "student", "critic"):
        assert torch.equal(net(*inputs, lora=name), build()(*inputs))


def test_adapters_are_on_the_images_keys_and_values_too():
    net = build(replace(SMALL, clip_dim=40), adapters=("a",))
    adapted = {name.removesuffix(".lora.a.A") for name, _ in net.named_parameters() if name.endswith(".lora.a.A")}
    assert {name for name in adapted if "img" in name} == {
        f"blocks.{i}.cross_attn.{part}_img" for i in range(SMALL.blocks) for part in "kv"}


def test_a_model_is_known_by_its_parameters(monkeypatch):
    monkeypatch.setattr("model.shapes_of", cache(shapes_of))        # builds every model, a second in all
    for name in ("tiny", "wan-1.3b"):
        assert models_of(shapes_of(name)) == [name]
        assert models_of(shapes_of(name) | {"more": (1,)}) == []


def test_each_adapter_is_the_merged_model_and_learns_alone():
    net, inputs = adapted(B=0.3), batch()
    assert error(net(*inputs, lora="student"), net(*inputs, lora="critic")) > 1e-2
    assert torch.equal(net(*inputs), build()(*inputs))
    for adapter in ("student", "critic"):
        parts = dict(net.named_parameters())
        merged = build()
        for name, p in merged.named_parameters():
            path = name.removesuffix("weight") + f"lora.{adapter}."
            if path + "A" in parts:
                A, B = parts[path + "A"], parts[path + "B"]
                p.data = (p + 3 / len(A) * (B @ A)).detach()
        got = run(net, *inputs, lora=adapter)
        assert error(got["v"], merged(*inputs)) < 1e-5
        assert set(got) == {"v", "x"} | {n for n in parts if f".lora.{adapter}." in n}
    assert sum("lora.critic.A" in n for n in parts) == 10 * SMALL.blocks
    assert parts["blocks.2.ffn.0.lora.critic.A"].shape == (2, 48)
    assert parts["blocks.2.ffn.0.lora.critic.B"].shape == (80, 2)


def test_adapters_are_on_every_layer_of_the_blocks_and_train_alone():
    net = build(adapters=("a",))
    trained = {re.sub(r"\d+", "N", n, count=1) for n, p in net.named_parameters() if p.requires_grad}
    layers = [f"{kind}.{layer}" for kind in ("self_attn", "cross_attn") for layer in "qkvo"] + ["ffn.0", "ffn.2"]
    assert trained == {f"blocks.N.{layer}.lora.a.{matrix}" for layer in layers for matrix in "AB"}


# ---- the door -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("message, change", (
    (r"latents of \(2, 6, 3, 8, 11\).*\(1, 2, 2\)", dict(x=torch.zeros(2, 6, 3, 8, 11))),
    (r"x is \(2, 5, 3, 8, 12\).*\(B, 6, F, H, W\)", dict(x=torch.zeros(2, 5, 3, 8, 12))),
    (r"x is \(2, 6, 8, 12\)", dict(x=torch.zeros(2, 6, 8, 12))),
    (r"t is \(2, 8\): wants \(2,\) or \(2, 3\)", dict(t=torch.zeros(2, 8))),
    (r"t is \(1,\)", dict(t=torch.zeros(1))),
    (r"text is \(2, 5, 21\): wants \(2, S, 20\)", dict(cond=Cond(torch.zeros(2, 5, 21)))),
    (r"text is \(1, 5, 20\): wants \(2, S, 20\)", dict(cond=Cond(torch.zeros(1, 5, 20)))),
    (r"image is \(2, 10, 3, 8, 12\): wants None", dict(cond=Cond(torch.zeros(2, 5, 20), torch.zeros(2, 10, 3, 8, 12)))),
    (r"clip is \(2, 257, 9\): wants None", dict(cond=Cond(torch.zeros(2, 5, 20), clip=torch.zeros(2, 257, 9)))),
    (r"metadata orders 60 tokens, the grid \(3, 4, 6\) has 72", dict(metadata=build_metadata((3, 4, 5)))),
    (r"lora is 'critic': the model has \('student',\)", dict(lora="critic")),
))
def test_what_does_not_fit_is_named(message, change):
    inputs = dict(zip(("x", "t", "cond"), batch()))
    with pytest.raises(ValueError, match=message):
        build(adapters=("student",))(**inputs | change)


@pytest.mark.parametrize("message, change", (
    (r"image is None: wants \(2, 10, 3, 8, 12\)", dict(image=None)),
    (r"image is \(2, 6, 3, 8, 12\): wants \(2, 10, 3, 8, 12\)", dict(image=torch.zeros(2, 6, 3, 8, 12))),
    (r"clip is None: wants \(2, 257, 40\)", dict(clip=None)),
    (r"clip is \(2, 257, 20\): wants \(2, 257, 40\)", dict(clip=torch.zeros(2, 257, 20))),
))
def test_an_image_that_does_not_fit_is_named(message, change):
    config = replace(SMALL, inputs=16, clip_dim=40)
    x, t, cond = batch(config)
    with pytest.raises(ValueError, match=message):
        build(config)(x, t, cond._replace(**change))


# ---- two experts ----------------------------------------------------------------------------------------------------

def test_of_two_experts_one_is_asked_at_each_t():
    pair = Pair(lambda x, t, cond: "high", lambda x, t, cond: "low", 0.9)
    edge = torch.tensor(0.9)
    asked = {t.item(): pair(None, t.expand(3), None) for t in (edge, edge + 0.01, edge - 0.01, torch.ones(()))}
    assert set(asked.values()) == {"high", "low"}
    assert [t for t, expert in asked.items() if expert == "low"] == [(edge - 0.01).item()]
    assert pair(None, torch.nextafter(edge, torch.zeros(())).expand(3), None) == "low"


def test_of_two_experts_none_is_chosen_by_a_samples_own_t():
    pair = Pair(lambda x, t, cond: "high", lambda x, t, cond: "low", 0.9)
    with pytest.raises(ValueError, match="two experts at t from 0.1 to 0.95: they are asked at one t for all samples"):
        pair(None, torch.tensor([0.95, 0.1]), None)
