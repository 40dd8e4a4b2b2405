"""bench.py at a size that takes a second, and tests/gpu.sh where there is no GPU. Run: pytest tests/test_bench.py"""
import json
import subprocess
import sys
from statistics import median

import pytest
import torch
import torch.distributed as dist

import bench
import parallel
from attention import build_metadata
from conftest import ROOT
from data import send
from helpers import cheaply
from model import MODELS, Cond, bind, blank, flops
from step import flow_loss

SMALL = dict(shape=(24, 2, 4, 4), length=4, batch=2, device="cpu")


@pytest.fixture
def no_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_bench_data_measures_every_reader_and_writes_what_it_printed(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    cfg = bench.DataConfig(shape=(4, 3, 4, 4), width=16, length=8, samples=16, rounds=2, dir=str(tmp_path),
                           out=str(tmp_path / "out/data.json"))
    bench.main(cfg)
    written, printed = json.loads((tmp_path / "out/data.json").read_text()), capsys.readouterr().out
    assert list(written["warm"])[0] == "Latents"
    assert len(written["warm"]) == 5
    assert len(written["apart"]) == 5
    for table in (written["warm"], written["apart"]):
        assert all(name in printed and rate > 0 and cpu >= 0 for name, (rate, cpu) in table.items())
    assert written["config"]["samples"] == 16
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "the datasets were left behind"


def test_samples_that_are_no_whole_batches_are_refused():
    with pytest.raises(ValueError, match="--samples=10 is not a multiple of --batch=8"):
        bench.main(bench.DataConfig(samples=10))


# ---- step


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(window=(1, 1, 1), tile=(1, 2, 2)), dict(lora_rank=2, micro_batch=1)], ids=str)
def test_bench_step_has_a_row_per_update_whose_numbers_agree(flags, tmp_path, capsys, no_group, monkeypatch):
    monkeypatch.setattr(parallel, "on_gpu", lambda device: False)
    cheaply(monkeypatch)
    out = tmp_path / "step.json"
    bench.main(bench.StepConfig(**SMALL, **flags, steps=2, rounds=2, student_steps=2, dir=str(tmp_path), out=str(out)))
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    windows = [None, [1, 1, 1]] if "window" in flags else [None]
    whats = ["train"] * len(windows) + ["student", "critic"] * len(windows)
    assert [row["what"] for row in written["updates"]] == whats
    assert [row["window"] for row in written["updates"][:len(windows)]] == windows
    for row in written["updates"]:
        ours, waits, bare = zip(*row["rounds"])
        assert row["ms"] == pytest.approx(1000 * median(ours))
        assert row["bare_ms"] == pytest.approx(1000 * median(bare))
        assert row["overhead"] == pytest.approx(median(a / b for a, b in zip(ours, bare)) - 1)
        assert 0 <= row["data_wait_ms"] <= row["ms"]
        assert row["memory_gb"] > 0
        assert row["first_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 2 * 2 / row["ms"] * 1000)
        assert row["mfu"] is row["hfu"] is None
        assert f"{row['ms']:.2f}" in printed
    forward = flops(MODELS["tiny"], SMALL["shape"], 4)
    train = written["updates"][0]
    assert train["tflops"] * train["ms"] * 1e9 == pytest.approx((2 if "lora_rank" in flags else 3) * 2 * forward)
    for save in written["saves"].values():
        assert save["gb_per_s"] == pytest.approx(save["gb"] / save["seconds"])
        assert save["gb"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"], "dataset or saves were left behind"


def test_mfu_is_a_share_of_the_peak_and_hfu_of_what_is_executed(monkeypatch):
    monkeypatch.setattr(parallel, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "machine", lambda device: "NVIDIA H100 80GB HBM3")
    cfg = bench.StepConfig(**SMALL, precision="bf16", steps=1, rounds=3)
    update = bench.Update("train", None, lambda log, clock: None, lambda: None, 6e9, 8e9)
    row, = bench.in_turns([update], None, bench.Clock(), cfg, parallel.imagine(1)._replace(device=torch.device("cpu")))
    assert row["tflops"] == pytest.approx(6e9 / row["ms"] / 1e9)
    assert row["mfu"] == pytest.approx(row["tflops"] / bench.peak("NVIDIA H100 80GB HBM3"))
    assert row["hfu"] == pytest.approx(row["mfu"] * 8 / 6)


@pytest.mark.slow
def test_executed_flops_count_what_remat_and_attention_compute_again():
    """A backward is two forwards, less what needs no gradient, and five quarters of that for attention."""
    S, shape = 8, (24, 5, 8, 8)
    for window in (None, (1, 1, 1)):
        counted = {}
        for remat in (False, True):
            net = bind(blank("tiny", remat), shape, bench.NOWHERE, window, (2, 2, 2))
            x, t, text = torch.empty(2, *shape), torch.empty(2), torch.empty(2, S, 64)
            x, t, text = send([x, t, text], bench.NOWHERE.device)
            counted[remat] = bench.executed(lambda: flow_loss(net, x, Cond(text), t, x))
        needs, pairs = 3 * 2 * net.flops(shape, S), 80 * 80 if window is None else net.metadata.pairs
        attended = 4 * 4 * (pairs + 80 * S) * 128 * 2       # forward FLOPs, of all blocks and samples
        unwanted = 2 * 2 * (80 * 96 * 128 + S * 64 * 128 + 256 * 128)   # gradients of x_t, text and t
        assert counted[False] == needs + attended / 2 - unwanted
        blocks = counted[True] - counted[False]
        assert 0.6 < blocks / (2 * net.flops(shape, S) - attended) < 1.0


def test_what_does_not_fit_the_model_is_refused_before_a_group_is_made():
    with pytest.raises(ValueError, match="the dataset has 16 channels"):
        bench.main(bench.StepConfig(shape=(16, 2, 4, 4)))
    assert not dist.is_initialized()


# ---- attention, sparsity


def test_bench_attention_checks_then_writes_what_it_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PATTERNS", bench.PATTERNS[4:5])
    out = tmp_path / "attention.json"
    threads = torch.get_num_threads()
    bench.main(bench.AttentionConfig(device="cpu", grid=(4, 8, 8), tile=(2, 4, 4), window=(1, 1, 1), heads=2, width=16,
                                     rounds=3, threads=threads, out=str(out)))
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert 0 < written["worst error / plain PyTorch's"] < 2
    case, = written["cases"]
    metadata = build_metadata((4, 8, 8), (2, 4, 4), (1, 1, 1))
    assert case["sparsity"] == metadata.sparsity
    assert case["methods"].keys() == {"nanovideo", "dense SDPA"}
    ours, theirs = case["methods"].values()
    for name, row, pairs in (("nanovideo", ours, metadata.pairs), ("dense SDPA", theirs, 256 * 256)):
        for which, operations in (("forward", 4), ("backward", 10)):
            assert row[which]["tflops"] == pytest.approx(operations * pairs * 32 / row[which]["ms"] / 1e9)
            assert row[which]["x"] == pytest.approx(row[which]["ms"] / ours[which]["ms"])
            assert row[which]["mfu"] is None
        both = [row[which]["ms"] for which in ("forward", "backward")]
        assert row["x"] == pytest.approx(sum(both) / sum(ours[which]["ms"] for which in ("forward", "backward")))
        assert row["of the ideal"] == pytest.approx(row["x"] * metadata.pairs / pairs)
        assert name in printed


def test_bench_attention_refuses_errors_of_twice_plain_pytorchs(monkeypatch):
    monkeypatch.setattr(bench, "PATTERNS", bench.PATTERNS[4:5])
    monkeypatch.setattr(bench, "attention", lambda q, k, v, metadata: 1.1 * bench.reference(q, k, v, metadata))
    with pytest.raises(SystemExit, match="twice plain PyTorch's"):
        bench.check_attention("cpu")
    monkeypatch.setattr(bench, "attention", lambda q, k, v, metadata: bench.reference(q, k, v, metadata)
                        + 1e-6 * torch.rand(()))
    with pytest.raises(SystemExit, match="two runs differ"):
        bench.check_attention("cpu")


def test_bench_sparsity_gives_what_the_model_counts(capsys):
    bench.main(bench.SparsityConfig())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(bench.VIDEOS) * len(bench.CHOICES)
    metadata, shape = build_metadata((21, 30, 52), (4, 4, 8), (3, 3, 3)), (16, 21, 60, 104)
    faster = [flops(MODELS[name], shape, 512) / flops(MODELS[name], shape, 512, metadata)
              for name in ("wan-1.3b", "wan-14b")]
    assert lines[2] == (f"| 81 frames of 480 x 832 | 32760 | 4 4 8 | 3 3 3 | {metadata.sparsity:.1%} | "
                        f"wan-1.3b {faster[0]:.2f} x, wan-14b {faster[1]:.2f} x |")


# ---- tests/gpu.sh


def gpu_sh(*arguments):
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", str(ROOT / "tests/gpu.sh"), *arguments], env=env, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def report():
    """The report's folder, out/gpu, put back as it was."""
    folder = ROOT / "out/gpu"
    aside = folder.with_name("gpu.aside")
    if folder.exists():
        folder.rename(aside)
    yield folder
    subprocess.run(["rm", "-rf", str(folder)])
    if aside.exists():
        aside.rename(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_without_a_gpu_every_part_says_so_and_nothing_fails(report):
    code, printed = gpu_sh()
    assert code == 0, printed
    written = json.loads((report / "report.json").read_text())
    assert written["device"] == "no GPU"
    assert set(written["parts"]) == {"tests", "attention", "step", "run", "wan"}
    assert all(part["state"].startswith("no GPU") for part in written["parts"].values())
    assert (report / "report.txt").read_text().count("no GPU") == 6
    assert "no GPU" in printed
    code, printed = gpu_sh("step", "nonsense")
    assert code == 1
    assert "the parts are attention, tests" in printed


@pytest.mark.slow
def test_a_part_stops_at_nothing_and_reports_the_first_traceback(tmp_path, monkeypatch):
    import gpu
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "OUT", str(tmp_path))
    (tmp_path / "bad.py").write_text("print('begun')\nraise RuntimeError('the first')")
    (tmp_path / "good.py").write_text("import json, sys\nopen(sys.argv[1][6:], 'w').write(json.dumps({'ms': 7}))")
    (tmp_path / "long.py").write_text("import time\nprint('so far', flush=True)\ntime.sleep(600)")
    part = gpu.run(["bad.py", "good.py --out=good.json", "long.py", "good.py --out=late.json"], 5)
    bad, good, long, late = part["commands"]
    assert part["state"] == "failed"
    assert bad["code"] == 1
    assert good["results"] == {"ms": 7}
    assert long["code"] == late["code"] == "time is up"
    assert "so far" in long["printed"]
    gpu.write({"device": "a GPU", "python": "3", "parts": {"some": part, "other": {"state": "no av"}}})
    text = (tmp_path / "report.txt").read_text()
    assert "RuntimeError: the first" in text.split("The first failure: python bad.py")[1]
    assert "other      no av" in text
    assert gpu.error_in("a\n=== FAILURES ===\nb").endswith("= FAILURES ===\nb")
    assert gpu.error_in("abc") == "abc"
