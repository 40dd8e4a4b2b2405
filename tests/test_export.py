"""What export.py writes: read by diffusers itself, with equal outputs; other layouts come back bit for bit."""
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

import ckpt
import export
from model import MODELS, Cond, DiT, ModelConfig, add_lora
from test_ckpt import as_version_1

SMALL = ModelConfig(dim=48, blocks=3, heads=4, ffn=80, channels=4, text_dim=16, freq_dim=32)
SAMPLING = {"model": "small", "codec": {"name": "dct"}, "mean": [0.0] * 4, "std": [1.0] * 4,
            "fps": 8, "window": None, "tile": [4, 4, 8], "sampler": "euler", "shift": 3.0, "guidance": 5.0,
            "text": {"width": 16, "length": 7}}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)


def network(seed=0, lora=False):
    torch.manual_seed(seed)
    net = DiT(SMALL)
    if lora:
        add_lora(net, "student", rank=4, alpha=6)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def run(out, net, ema=None, only="", base=None):
    """A run's folder with one checkpoint of net and its average, or of their adapters alone."""
    null = torch.zeros(7, 16)
    state = ckpt.roles(net=parts(net, only), ema=parts(ema or net, only), null=(null, 0, tuple(null.shape)))
    if base:
        base = ckpt.base_of(base, ckpt.weights(base))
    elif only:
        base = {"path": "elsewhere", "crc32": 0}
    config = {"lora_alpha": 6, "lora_rank": 4 if only else 0}
    ckpt.save(out, 10, state, {"config": config, "sampling": SAMPLING, "base": base})
    return str(out)


def parts(net, only=""):
    return {n: (p.detach(), 0, tuple(p.shape)) for n, p in net.named_parameters() if only in n}


def inputs():
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 3, 4, 6, generator=g), torch.rand(2, generator=g)
    return x, t, torch.randn(2, 7, 16, generator=g)


def ours(net, **how):
    with torch.no_grad():
        x, t, text = inputs()
        return net(x, t, Cond(text), **how)


def theirs(transformer):
    x, t, text = inputs()
    with torch.no_grad():
        return transformer(x, 1000 * t, text).sample


def near(a, b, within=1e-5):
    return ((a - b).norm() / b.norm()).item() <= within


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {key: x for file in files for key, x in load_file(file).items()}


def test_diffusers_loads_the_export_and_computes_the_same(tmp_path):
    from diffusers import WanTransformer3DModel
    net, ema = network(0), network(1)
    path = run(tmp_path / "run", net, ema)
    for role, model in (("net", net), ("ema", ema)):
        out = tmp_path / role
        export.main(export.Config(ckpt=path, out=str(out), weights=role, shard_gb=1e-4))
        index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
        files = list(out.glob("*-of-*.safetensors"))
        assert len(set(index["weight_map"].values())) == len(files) > 1
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(out).values())
        transformer, told = WanTransformer3DModel.from_pretrained(out, output_loading_info=True)
        assert not any(told.values())
        assert set(tensors(out)) == set(transformer.state_dict())
        assert len(tensors(out)) == 27 * SMALL.blocks + 15
        assert near(theirs(transformer), ours(model))
    # config.json says what diffusers' own says, and nothing else
    transformer.save_pretrained(tmp_path / "own")
    mine = json.loads((out / "config.json").read_text())
    own = json.loads((tmp_path / "own" / "config.json").read_text())
    assert mine["_class_name"] == own["_class_name"]
    for told in (mine, own):
        for key in [key for key in told if key.startswith("_")]:
            del told[key]
    assert mine == own


def test_a_diffusers_folder_comes_back_as_it_was(tmp_path):
    from diffusers import WanTransformer3DModel
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=80, num_layers=3)
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="50KB")
    net = DiT(SMALL)
    ckpt.fill(parts(net), ckpt.weights(tmp_path / "pipeline"))
    assert near(ours(net), theirs(transformer))
    export.main(export.Config(ckpt=run(tmp_path / "run", net), out=str(tmp_path / "out")))
    own = transformer.state_dict()
    assert all(torch.equal(x, own[key]) for key, x in tensors(tmp_path / "out").items())


@pytest.mark.parametrize("format", ["wan", "diffusers", "comfy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_comes_back_bit_for_bit(tmp_path, format, dtype):
    net = network()
    out = tmp_path / "mine"
    export.main(export.Config(ckpt=run(tmp_path / "run", net), out=str(out), format=format,
                              dtype=dtype, shard_gb=1e-4))
    source = ckpt.weights(out)
    assert set(source.shapes) == set(dict(net.named_parameters()))
    for name, p in net.named_parameters():
        x = source.tensor(name)
        assert x.dtype == getattr(torch, dtype) and torch.equal(x, p.detach().to(x.dtype))
    if format == "comfy":
        assert [f.name for f in sorted(out.iterdir())] == ["mine.safetensors", "nanovideo.json", "null_text.pt"]
        assert all(key.startswith("model.diffusion_model.") for key in tensors(out))
    if format == "wan":
        assert set(tensors(out)) == set(dict(net.named_parameters()))
        config = json.loads((out / "config.json").read_text())
        said = [config[key] for key in ("model_type", "dim", "num_layers", "text_len")]
        assert said == ["t2v", 48, 3, 7]
    told = json.loads((out / "nanovideo.json").read_text())
    assert told["sampling"] == SAMPLING and told["step"] == 10 and "ema" in told["checkpoint"]


def test_of_causal_weights_it_says_what_other_programs_would_make_of_them(tmp_path, monkeypatch, capsys):
    source = run(tmp_path / "plain", network())
    export.main(export.Config(ckpt=source, out=str(tmp_path / "bidirectional"), format="wan"))
    assert "These weights are causal" not in capsys.readouterr().out
    monkeypatch.setitem(SAMPLING, "window", [-9, 1, 1])
    source = run(tmp_path / "run", network())
    export.main(export.Config(ckpt=source, out=str(tmp_path / "out"), format="wan"))
    said = "a chunk of 4 latent frames sees the last 9 chunks up to its own"
    assert said in capsys.readouterr().out
    told = json.loads((tmp_path / "out/nanovideo.json").read_text())
    assert said in told["note"]
    assert told["sampling"]["window"] == [-9, 1, 1]
    assert "note" not in json.loads((tmp_path / "bidirectional/nanovideo.json").read_text())


def test_nothing_is_overwritten_and_a_failed_export_leaves_nothing(tmp_path, monkeypatch, capsys):
    path, out = run(tmp_path / "run", network()), tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(SystemExit):
        export.main(export.Config(ckpt=path, out=str(out)))
    assert "is there and not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
    (out / "mine").unlink()

    cast = export.cast
    flipped = iter([True])

    def faulty(x, dtype):
        return -cast(x, dtype) if next(flipped, False) else cast(x, dtype)

    monkeypatch.setattr(export, "cast", faulty)
    with pytest.raises(SystemExit):
        export.main(export.Config(ckpt=path, out=str(out)))
    assert "reads back otherwise" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"] and not list(out.iterdir())
    export.main(export.Config(ckpt=path, out=str(out)))
    assert ckpt.weights(out).shapes


def test_a_checkpoint_of_another_shape_than_its_model_is_refused(tmp_path, monkeypatch, capsys):
    path = run(tmp_path / "run", network())
    monkeypatch.setitem(MODELS, "small", ModelConfig(**asdict(SMALL) | {"ffn": 96}))
    with pytest.raises(SystemExit):
        export.main(export.Config(ckpt=path, out=str(tmp_path / "out")))
    says = "other than wanted: blocks.0.ffn.0.weight (80, 48) (wanted (96, 48))"
    assert says in capsys.readouterr().err


def test_only_what_is_exported_is_verified_and_read(tmp_path, monkeypatch):
    net, ema = network(0), network(1)
    path, opened, load = run(tmp_path / "run", net, ema), [], torch.load
    (tmp_path / "run" / "ckpt" / "step_0000010" / "rank_00000.net.pt").unlink()

    def spy(file, **how):
        opened.append(file.name)
        return load(file, **how)

    monkeypatch.setattr(torch, "load", spy)
    export.main(export.Config(ckpt=path, out=str(tmp_path / "out"), format="wan"))
    assert opened == ["rank_00000.null.pt", "rank_00000.ema.pt"]
    assert all(torch.equal(tensors(tmp_path / "out")[n], p) for n, p in ema.named_parameters())
    with pytest.raises(SystemExit):
        export.main(export.Config(ckpt=path, out=str(tmp_path / "net"), weights="net"))


def test_a_checkpoint_of_version_1_is_exported_alike(tmp_path):
    path = run(tmp_path / "run", network(0), network(1))
    export.main(export.Config(ckpt=path, out=str(tmp_path / "new"), format="wan"))
    as_version_1(ckpt.latest(path))
    export.main(export.Config(ckpt=path, out=str(tmp_path / "old"), format="wan"))
    new, old = tensors(tmp_path / "new"), tensors(tmp_path / "old")
    assert ckpt.read_manifest(ckpt.latest(path))["version"] == 1
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


# ---- LoRA ----------------------------------------------------------------------------------------------------------

def pipeline(transformer):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
                       scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("format", ["diffusers", "comfy"])
def test_diffusers_pipeline_loads_the_adapter_and_computes_the_same(tmp_path, format):
    from diffusers import WanTransformer3DModel
    plain, net = network(0), network(0, lora=True)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            dict(net.named_parameters())[name].copy_(p)
    export.main(export.Config(ckpt=run(tmp_path / "plain", plain), out=str(tmp_path / "base")))
    path = run(tmp_path / "run", net, only=".lora.")
    export.main(export.Config(ckpt=path, out=str(tmp_path / "lora"), lora=True, format=format))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "base")
    assert near(theirs(transformer), ours(net))
    assert not near(theirs(transformer), ours(net, lora="student"), 0.01)
    pipe = pipeline(transformer)
    pipe.load_lora_weights(tmp_path / "lora")
    per_module = 2 if format == "diffusers" else 3
    assert len(tensors(tmp_path / "lora")) == per_module * 10 * SMALL.blocks
    assert near(theirs(pipe.transformer), ours(net, lora="student"))


def test_every_tensor_of_a_file_is_aligned(tmp_path):
    held = {"odd": torch.ones(3).bfloat16(), "alpha": torch.tensor(1.5)}
    source = ckpt.in_memory(held, "memory")
    export.write_file(tmp_path / "x.safetensors", source, list(held), torch.bfloat16)
    data = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    assert size % 8 == 0
    assert header["alpha"]["data_offsets"] == [0, 4] and header["odd"]["data_offsets"] == [4, 10]


def test_alpha_stays_exact_beside_bf16_factors(tmp_path):
    net = network(0, lora=True)
    path = run(tmp_path / "run", net, only="blocks.0.self_attn.q.lora.")
    export.main(export.Config(ckpt=path, out=str(tmp_path / "lora"), lora=True, format="comfy",
                              dtype="bfloat16"))
    stem = "diffusion_model.blocks.0.self_attn.q"
    adapter = net.blocks[0].self_attn.q.lora["student"]
    found = tensors(tmp_path / "lora")
    alpha = found[f"{stem}.alpha"]
    assert list(alpha.shape) == [] and alpha.dtype == torch.float32 and alpha == 6
    assert torch.equal(found[f"{stem}.lora_down.weight"], adapter.A.detach().bfloat16())
    assert torch.equal(found[f"{stem}.lora_up.weight"], adapter.B.detach().bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["comfy", "diffusers"])
def test_a_merged_export_is_the_base_with_its_adapter_and_what_every_reader_of_the_run_gets(
        tmp_path, format):
    from diffusers import WanTransformer3DModel
    net = network(0, lora=True)
    plain = DiT(SMALL)
    plain.load_state_dict({n: p for n, p in net.state_dict().items() if ".lora." not in n})
    export.main(export.Config(ckpt=run(tmp_path / "plain", plain), out=str(tmp_path / "base"),
                              format=format))
    for name, move in (("base", False), ("plain", False), ("base", True)):
        base = tmp_path / name
        path = run(tmp_path / "run", net, only=".lora.", base=base)
        moved = base.rename(tmp_path / "moved") if move else None
        out = tmp_path / f"{base.name} {move}"
        export.main(export.Config(ckpt=path, out=str(out), merge=True, base=moved and str(moved)))
        assert near(theirs(WanTransformer3DModel.from_pretrained(out)), ours(net, lora="student"))
        if not move:
            read, mine = ckpt.weights(path), ckpt.weights(out)
            assert read.shapes == mine.shapes
            for key in read.shapes:
                assert torch.equal(read.tensor(key), mine.tensor(key))
            some = "blocks.0.ffn.0.weight", 5, 9
            assert torch.equal(read.rows(*some), mine.rows(*some))


def test_a_base_that_is_gone_or_another_one_is_refused_by_whoever_reads_the_adapter(
        tmp_path, capsys):
    plain, net = network(0), network(0, lora=True)
    path = run(tmp_path / "run", net, only=".lora.", base=run(tmp_path / "plain", plain))
    (tmp_path / "plain").rename(tmp_path / "moved")
    says = "is an adapter of weights that are not at .*plain.*: put or link them there"
    with pytest.raises(FileNotFoundError, match=says):
        ckpt.weights(path)
    run(tmp_path / "plain", network(1))
    with pytest.raises(ValueError, match="plain.* is not what .*run.* was trained on"):
        ckpt.weights(path)
    with pytest.raises(SystemExit):
        export.main(export.Config(ckpt=path, out=str(tmp_path / "out"), merge=True))
    assert "is not what" in capsys.readouterr().err and not (tmp_path / "out").exists()


def adapter_of(folder, base, seed=0):
    """A run's folder with an adapter over the weights at base."""
    return run(folder, network(seed, lora=True), only=".lora.", base=base)


def test_an_adapter_says_which_weights_it_is_for_here_and_in_the_file(tmp_path, capsys):
    plain = run(tmp_path / "plain", network())
    first = adapter_of(tmp_path / "first", plain)
    second = adapter_of(tmp_path / "second", first, seed=1)
    for path, base, says in ((first, plain, "It adapts the weights of {}\n"),
                             (second, first, "It adapts the weights of {} with its own adapter folded in, not "
                                             "those under it: python export.py --ckpt={} --merge")):
        export.main(export.Config(ckpt=path, out=f"{path}_lora", lora=True, format="comfy"))
        named = str(ckpt.latest(base))
        assert says.format(named, named) in capsys.readouterr().out
        told = json.loads((tmp_path / f"{path}_lora" / "nanovideo.json").read_text())
        assert told["base"] == {"path": named, "crc32": ckpt.read_manifest(named)["crc32"]}
    export.main(export.Config(ckpt=first, out=str(tmp_path / "whole"), merge=True))
    assert "It adapts" not in capsys.readouterr().out
    assert json.loads((tmp_path / "whole" / "nanovideo.json").read_text())["base"]["path"] == str(ckpt.latest(plain))


@pytest.mark.slow
def test_an_adapter_over_an_adapter_is_for_what_the_command_that_is_named_writes(tmp_path):
    plain = run(tmp_path / "plain", network())
    first = adapter_of(tmp_path / "first", plain)
    second = adapter_of(tmp_path / "second", first, seed=1)
    export.main(export.Config(ckpt=second, out=str(tmp_path / "lora"), lora=True))
    export.main(export.Config(ckpt=first, out=str(tmp_path / "under"), merge=True))
    together = ckpt.folded(ckpt.weights(tmp_path / "under"), ckpt.lora(tmp_path / "lora"))
    for name, x in ((name, ckpt.weights(second).tensor(name)) for name in together.shapes):
        assert near(together.tensor(name), x, 1e-6)


@pytest.mark.parametrize("format", ["wan", "diffusers", "comfy"])
def test_a_value_that_a_dtype_cannot_hold_is_refused_by_its_tensor(tmp_path, capsys, format):
    net = network()
    with torch.no_grad():
        net.blocks[1].ffn[0].weight[3, 2] = -7e4
    path, out = run(tmp_path / "run", net), tmp_path / "out"
    with pytest.raises(SystemExit) as error:
        export.main(export.Config(ckpt=path, out=str(out), format=format, dtype="float16"))
    err = capsys.readouterr().err
    assert error.value.code == 2
    assert f"{export.NAMES[format]('blocks.1.ffn.0.weight')} reaches 7e+04, which torch.float16 cannot hold" in err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    export.main(export.Config(ckpt=path, out=str(out), format=format, dtype="bfloat16"))


@pytest.mark.parametrize("alpha, settings", [(10, {}), (4, {}), (6, dict(use_rslora=True))])
def test_an_adapter_that_diffusers_wrote_adds_what_diffusers_adds(tmp_path, alpha, settings):
    from diffusers import WanPipeline, WanTransformer3DModel
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=80, num_layers=3)
    transformer.save_pretrained(tmp_path / "base")
    targets = ["to_q", "to_out.0", "ffn.net.0.proj"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False,
                                       **settings))
    WanPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer),
                                  **_collate_lora_metadata({"transformer": transformer}))
    net, plain = DiT(SMALL), DiT(SMALL)
    ckpt.fill(parts(net), ckpt.folded(ckpt.weights(tmp_path / "base"), ckpt.lora(tmp_path / "lora")))
    ckpt.fill(parts(plain), ckpt.weights(tmp_path / "base"))
    assert near(ours(net), theirs(transformer))
    assert not near(ours(plain), theirs(transformer), 0.01)


def test_the_fingerprint_of_weights_sees_every_tensor(tmp_path):
    net = network()
    source = ckpt.in_memory({n: p.detach() for n, p in net.named_parameters()}, "memory")
    seen = {ckpt.fingerprint(source)}
    for p in net.parameters():
        with torch.no_grad():
            p.view(-1)[0] += 1
        seen.add(ckpt.fingerprint(source))
    assert len(seen) == 1 + len(source.shapes)


@pytest.mark.parametrize("flags, lora, says", [
    (dict(lora=True), False, "has no adapter"),
    (dict(), True, "--lora (it alone) or --merge"),
    (dict(lora=True, merge=True), True, "--lora (it alone) or --merge"),
    (dict(lora=True, base="x"), True, "--base is for --merge"),
    (dict(merge=True, base="x"), True, "are not at x: put or link them there"),
    (dict(lora=True, format="wan"), True, "choose diffusers or comfy"),
    (dict(shard_gb=0.0), False, "--shard_gb=0.0"),
])
def test_flags_that_do_not_fit_the_run_are_refused_in_one_line(tmp_path, capsys, flags, lora, says):
    path = run(tmp_path / "run", network(lora=lora), only=".lora." if lora else "")
    with pytest.raises(SystemExit) as error:
        export.main(export.Config(ckpt=path, out=str(tmp_path / "out"), **flags))
    err = capsys.readouterr().err
    assert error.value.code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
