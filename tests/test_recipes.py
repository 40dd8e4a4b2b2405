"""Every recipe, and README's own lines for real work: they are understood, and take what they say."""
import os
import re
import shlex
import subprocess
import sys

import pytest
import tyro
from torch.distributed.run import get_args_parser

import distill
import evaluate
import export
import prepare
import sample
import train
from conftest import ROOT
from helpers import told, total

ROOTS = {f"{root.__name__}.py": root for root in (prepare, train, distill, sample, evaluate, export)}

# ---- recipes --------------------------------------------------------------------------------------------------------

ON = {"lora.sh": ("1", "24"), "lora_i2v.sh": ("1", "141"), "lora_a14b.sh": ("1", "141"),
      "nodes.sh": ("32", "80"), "slurm.sh": ("32", "80")}      # others: 8 GPUs of 80 GB
STUBS = {
    "torchrun": 'printf "%s\\n" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"',
    "python": 'printf "%s\\n" "$@"',
    "srun": '"$@"',
    "scontrol": "echo node0",
}


def script_of(words):
    """What follows `torchrun`, without what is torchrun's own: the script and its flags."""
    launch = get_args_parser().parse_args(words)
    return [launch.training_script, *launch.training_script_args]


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """-> launched(recipe, *flags): the script and its flags as the launcher gets them, whose own are understood."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "node0", "NODES": "4",
           "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}
    monkeypatch.chdir(tmp_path)     # here are no data, no weights and no runs

    def launch(recipe, *flags):
        inner = []
        if recipe.name in ("nodes.sh", "slurm.sh"):
            inner = ["recipes/train_14b.sh", "--shard=8"]
        done = subprocess.run([recipe, *inner, *flags], env=env, cwd=ROOT, check=True, text=True, capture_output=True)
        words = done.stdout.split("\n")[:-1]
        if not words[0].endswith(".py"):
            assert words[0] == "600"
            words = script_of(words[1:])
        return words

    return launch


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.sh")), ids=lambda path: path.name)
def test_a_recipe_takes_what_its_first_lines_say(recipe, launched, capsys):
    script, *flags = launched(recipe, "--dry_run", *ON.get(recipe.name, ("8", "80")))
    code, lines, err = told(ROOTS[script].main, tyro.cli(ROOTS[script].Config, args=flags), capsys)
    assert code == 0, err
    text = recipe.read_text()
    memory, disk = (int(re.search(rf"(\d+) GB of {what}\b", text)[1]) for what in ("(?:each|it)", "disk"))
    assert (memory, disk) == (round(total(lines)), round(total(lines, "on disk")))


def test_flags_at_the_end_of_a_recipe_win(launched):
    script, *flags = launched(ROOT / "recipes" / "sparse.sh", "--out=elsewhere", "--window", "5", "5", "5")
    cfg = tyro.cli(train.Config, args=flags)
    assert script == "train.py"
    assert (cfg.out, cfg.window) == ("elsewhere", (5, 5, 5))


@pytest.mark.slow
def test_a_recipe_is_dry_run_as_its_first_lines_say(tmp_path):
    line = re.search(r"LAUNCH=\S+ recipes/lora.sh .*\d", (ROOT / "recipes" / "lora.sh").read_text())[0]
    done = subprocess.run(line.replace("python", sys.executable), shell=True, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "in all of 24.000" in done.stdout


# ---- README ---------------------------------------------------------------------------------------------------------


def launches_of_readme():
    """(script, flags, by torchrun) of every line in README's shell blocks that starts one of our files."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["torchrun"]:
            script, *flags = script_of(words[1:])
            yield script, flags, True
        elif words[:1] == ["python"] and words[1] in ROOTS:
            yield words[1], words[2:], False


REAL_WORK = [("train.py", "--model=wan-1.3b"), ("distill.py", "--teacher=out/wan")]


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", REAL_WORK, ids=[script for script, _ in REAL_WORK])
def test_readmes_lines_for_real_work_fit_eight_gpus_of_80_gb(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)     # here are no data, no weights and no runs
    (flags,) = [flags for name, flags, many in launches_of_readme() if many and name == script and flag in flags]
    if not any(word.startswith("--model") for word in flags):
        flags.append("--model=wan-1.3b")        # which distill.py would read from out/wan
    cfg = tyro.cli(ROOTS[script].Config, args=[*flags, "--dry_run", "8", "80"])
    code, lines, err = told(ROOTS[script].main, cfg, capsys)
    assert code == 0, err
    assert total(lines) > 10
    assert any(what.endswith("(16, 21, 60, 104)") for what in lines)


def test_every_line_of_readme_that_starts_a_root_is_understood():
    """Flags are renamed; README's are then found here, whichever root they are of."""
    launches = list(launches_of_readme())
    for script, flags, _ in launches:
        tyro.cli(ROOTS[script].Config, args=flags)
    assert {script for script, *_ in launches} >= {"prepare.py", "train.py", "distill.py", "sample.py"}
