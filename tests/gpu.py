"""Runs on one GPU what cannot be seen without it: out/gpu/report.json, and report.txt to read.

    tests/gpu.sh                    all but `tune`, within five minutes; stops at nothing
    tests/gpu.sh run wan            these parts, each with four times as long, and wan with more updates
    tests/gpu.sh --device=cpu run   the same commands at a size for a CPU

Each part is some commands in processes of their own, which share a time limit: what has compiled once is in caches
by the next run. A command's --out is read back. Exit code 0 if nothing failed, also where there is no GPU.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "out/gpu"
SHAPES = f"--data={OUT}/shapes"
STEP = "bench.py step --device={device}"
WAN = STEP + " --model={model} --batch=1 --saves=0"
TRAIN = f"train.py --device={{device}} {SHAPES} --out={OUT}/train --samples=2 --val=4"
PARTS = {   # seconds in a run of all parts, the modules that it needs, the commands
    "attention": (60, ["triton"], [
        f"bench.py attention --device={{device}} --rounds=3 {{grid}} --out={OUT}/attention.json"]),
    "tests": (60, ["pytest"], ["-m pytest -v -rs --tb=short tests/test_gpu.py -k {device}"]),
    "run": (45, ["av", "matplotlib", "tqdm"], [
        f"prepare.py --clips=100 --out={OUT}/shapes",
        f"{TRAIN} --steps=20 --warmup=2",
        f"{TRAIN} --steps=24 --warmup=2 --allow decay_steps",
        f"distill.py --device={{device}} {SHAPES} --teacher={OUT}/train --out={OUT}/few"
        " --pairs=64 --pairs_steps=20 --steps=20 --samples=1",
        f"sample.py --device={{device}} --ckpt={OUT}/few --out={OUT}/samples --prompts one two",
        f"evaluate.py --device={{device}} --ckpt={OUT}/few --n=40 --out={OUT}/evaluate.json"]),
    "step": (65, [], [
        f"{STEP} --rounds=3 --steps=4 --window 3 3 3 --tile 2 2 2 --out={OUT}/step_tiny.json",
        f"{WAN} --what=train --window 3 3 3 {{few}} --out={OUT}/step_wan.json"]),
    "wan": (65, [], [
        f"{WAN} --what=train --lora_rank=32 {{few}} --out={OUT}/step_wan_lora.json",
        f"{WAN} --what=distill --lora_rank=32 --student_steps=1 {{few}}"
        f" --out={OUT}/step_wan_dmd.json"]),
    "tune": (150, ["triton"], [
        f"bench.py attention --device={{device}} --no-check --rounds=3 --tune {{grid}}"
        f" --out={OUT}/tune.json"]),
}
SIZES = {   # what stands for {model} and {grid}
    "cuda": {"model": "wan-1.3b", "grid": "--grid 30 48 80 --tile 6 8 8 --heads=24"},
    "cpu": {"model": "tiny", "grid": "--no-check --grid 4 8 8 --tile 2 4 4 --window 1 1 1 --heads=1 --width=32"},
}
ALONE = 4       # times the limit that a part has which was asked for by name


def main(arguments):
    device = "cuda"
    if arguments[:1] in (["--device=cpu"], ["--device=cuda"]):
        device, arguments = arguments[0].partition("=")[2], arguments[1:]
    if set(arguments) - PARTS.keys():
        sys.exit(f"gpu.sh: the parts are {', '.join(PARTS)}, not {' '.join(arguments)}")
    os.chdir(ROOT)
    Path(OUT).mkdir(parents=True, exist_ok=True)
    for earlier in ("shapes", "train", "few", "samples"):       # a finished run would not run again
        shutil.rmtree(Path(OUT, earlier), ignore_errors=True)
    name = gpu() if device == "cuda" else "the CPU"
    report = {"device": name or "no GPU", "python": sys.version.split()[0], "parts": {}}
    for part in arguments or [part for part in PARTS if part != "tune"]:
        limit, needs, commands = PARTS[part]
        missing = [] if name else ["no GPU"]
        missing += [f"no {module}" for module in needs if not find_spec(module)]
        if missing:
            result = {"state": ", ".join(missing)}
        else:
            sizes = SIZES[device] | {"device": device, "few": "--steps=1 --rounds=1"}
            if arguments:
                limit, sizes = ALONE * limit, sizes | {"few": "--steps=5 --rounds=2"}
            result = run([command.format(**sizes) for command in commands], limit)
        report["parts"][part] = result
        write(report)           # whatever ends this, the report has what was before
    print(Path(OUT, "report.txt").read_text())
    return any(part["state"] == "failed" for part in report["parts"].values())


def gpu():
    """The GPU's name, None where PyTorch finds none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    return done.stdout.strip() or None


def run(commands, limit):
    """Runs all commands, also after one that failed, until the time is up -> their report."""
    end, seen = time.monotonic() + limit, []
    for command in commands:
        print(f"python {command}", flush=True)
        code, printed, seconds = execute(command, end - time.monotonic())
        entry = {"command": f"python {command}", "code": code, "seconds": round(seconds, 1)}
        if code:
            entry["error"] = error_in(printed) if code != "time is up" else printed[-2000:]
        entry["printed"] = printed[-6000:]
        out = Path(command.rpartition("--out=")[2].split()[0])
        if code == 0 and out.suffix == ".json" and out.exists():
            entry["results"] = json.loads(out.read_text())
        seen.append(entry)
    failed = any(entry["code"] for entry in seen)
    return {"state": "failed" if failed else "passed", "limit": limit, "commands": seen}


def execute(command, seconds):
    """-> (exit code or why there is none, what it printed, seconds that it took)."""
    began = time.monotonic()
    if seconds <= 0:
        return "time is up", "", 0.0
    process = subprocess.Popen([sys.executable, *command.split()], text=True, errors="replace",
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        printed, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)      # and what it has started: compilers, ranks
        printed, _ = process.communicate()
        code = "time is up"
    return code, printed, time.monotonic() - began


def error_in(printed):
    """The first traceback, or the first failure that pytest shows; else the end of what was printed."""
    for begin in ("= FAILURES =", "= ERRORS =", "Traceback (most recent call last)"):
        if begin in printed:
            return printed[printed.index(begin):][:6000]
    return printed[-2000:]


def write(report):
    """report.json, and report.txt: a line per command, the first error, then what was printed."""
    Path(OUT, "report.json").write_text(json.dumps(report, indent=1))
    head, error, printed = [f"{report['device']}, Python {report['python']}", ""], "", ""
    for name, part in report["parts"].items():
        head.append(f"{name:10} {part['state']}")
        for entry in part.get("commands", ()):
            state = {0: "passed"}.get(entry["code"], f"FAILED: {entry['code']}")
            head.append(f"{entry['seconds']:10.1f} s  {state}  {entry['command']}")
            if entry["code"] and not error:
                error = f"\n\nThe first failure: {entry['command']}\n\n{entry['error']}"
            printed += f"\n\n$ {entry['command']}\n{entry['printed'][-3000:]}"
    Path(OUT, "report.txt").write_text("\n".join(head) + error + printed + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
