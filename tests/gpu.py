"""Runs on one GPU what cannot be seen without: out/gpu/report.json, and report.txt to read. Exit code 0 if all passed.

    tests/gpu.sh                    all but `tune` within five minutes; stops at nothing
    tests/gpu.sh run wan            these parts, each with four times as long
    tests/gpu.sh --device=cpu run   the same commands at a size for a CPU

Each part is some commands in processes of their own, which share a time limit. A command's --out is read back.
"""
import json
import os
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
FEW = "--steps=10 --rounds=1"
PARTS = {   # seconds in a run of all parts, the modules that it needs, the commands
    "tests": (60, ["pytest"], ["-m pytest -q -rs tests/test_gpu.py -k {device}"]),
    "attention": (60, ["triton"], [
        f"bench.py attention --device={{device}} --rounds=3 {{grid}} --out={OUT}/attention.json"]),
    "step": (70, [], [
        f"{STEP} --rounds=3 --window 3 3 3 --tile 2 2 2 --out={OUT}/step_tiny.json",
        f"{WAN} --what=train --window 3 3 3 {FEW} --out={OUT}/step_wan.json"]),
    "run": (50, ["av", "matplotlib", "tqdm"], [
        f"prepare.py --clips=100 --out={OUT}/shapes",
        f"train.py --device={{device}} {SHAPES} --out={OUT}/train --steps=20 --warmup=2 --samples=2 --val=4",
        f"train.py --device={{device}} {SHAPES} --out={OUT}/train --steps=24 --allow decay_steps --samples=2",
        f"distill.py --device={{device}} {SHAPES} --teacher={OUT}/train --out={OUT}/few --steps=20 --samples=1",
        f"sample.py --device={{device}} --ckpt={OUT}/few --out={OUT}/samples --prompts one two",
        f"evaluate.py --device={{device}} --ckpt={OUT}/few --n=40 --out={OUT}/evaluate.json"]),
    "wan": (60, [], [
        f"{WAN} --what=train --lora_rank=32 --window 3 3 3 {FEW} --out={OUT}/step_wan_lora.json",
        f"{WAN} --what=distill --lora_rank=32 --steps=4 --rounds=1 --out={OUT}/step_wan_dmd.json"]),
    "tune": (150, ["triton"], [
        f"bench.py attention --device={{device}} --no-check --rounds=3 --tune {{grid}} --out={OUT}/tune.json"]),
}
SIZES = {   # what stands for {model} and {grid}
    "cuda": {"model": "wan-1.3b", "grid": "--grid 30 48 80 --tile 6 8 8 --heads=24"},
    "cpu": {"model": "tiny", "grid": "--no-check --grid 4 8 8 --tile 2 4 4 --heads=1 --width=32"},
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
    name = gpu() if device == "cuda" else "the CPU"
    report = {"device": name or "no GPU", "python": sys.version.split()[0], "parts": {}}
    for part in arguments or [part for part in PARTS if part != "tune"]:
        limit, needs, commands = PARTS[part]
        missing = [] if name else ["no GPU"]
        missing += [f"no {module}" for module in needs if not find_spec(module)]
        if missing:
            result = {"state": ", ".join(missing)}
        else:
            limit *= ALONE if arguments else 1
            result = run([command.format(device=device, **SIZES[device]) for command in commands], limit)
        report["parts"][part] = result
        write(report)           # after each part: whatever ends this, the report has what was before
    print(Path(OUT, "report.txt").read_text())
    return any(part["state"] == "failed" for part in report["parts"].values())


def gpu():
    """The GPU's name, None where PyTorch finds none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    return done.stdout.strip() or None


def run(commands, limit):
    """Runs all commands, also after one that failed, until the time is up -> what the report says of them."""
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
    return {"state": "failed" if any(entry["code"] for entry in seen) else "passed", "limit": limit, "commands": seen}


def execute(command, seconds):
    """-> (exit code or why there is none, what it printed, seconds that it took)."""
    began = time.monotonic()
    if seconds <= 0:
        return "time is up", "", 0.0
    process = subprocess.Popen([sys.executable, *command.split()], text=True, start_new_session=True,
                               errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
