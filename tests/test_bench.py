"""bench.py at a size that takes a second. Run: pytest tests/test_bench.py"""
import json

import pytest

import bench


def test_bench_data_measures_every_reader_and_writes_what_it_printed(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    cfg = bench.DataConfig(shape=(4, 3, 4, 4), width=16, length=8, samples=16, rounds=2, dir=str(tmp_path),
                           out=str(tmp_path / "out/data.json"))
    bench.main(cfg)
    written, printed = json.loads((tmp_path / "out/data.json").read_text()), capsys.readouterr().out
    assert list(written["warm"])[0] == "Latents" and len(written["warm"]) == 5 and len(written["apart"]) == 5
    for table in (written["warm"], written["apart"]):
        assert all(name in printed and rate > 0 and cpu >= 0 for name, (rate, cpu) in table.items())
    assert written["config"]["samples"] == 16
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "the datasets were left behind"


def test_samples_that_are_no_whole_batches_are_refused():
    with pytest.raises(ValueError, match="--samples=10 is not a multiple of --batch=8"):
        bench.main(bench.DataConfig(samples=10))
