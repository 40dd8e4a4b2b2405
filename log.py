"""One run's folder, and all that is shown of a run. Imports nothing of ours.

    config.json       flags, commit, versions, threads
    log.jsonl         one object per step logged; a resumed run cuts it back to where it goes on
    curves.png        every series of log.jsonl
    samples/          videos, by step
    wandb/            if asked for

and one live line on a terminal, plain lines in a pipe. Only the main rank writes and prints: others do nothing.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

PEAKS = {  # dense bf16 TFLOP/s by the words of the device's name, the first row that fits (makers' data sheets)
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121,
}
MACHINE = ("seconds", "data_wait", "samples_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb")  # never twice alike
SHOWN = ("loss", "grad_norm", "lr", "samples_per_s", "mfu")     # the line shows the names that end so
PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "av", "tyro", "wandb", "diffusers", "transformers")


class Log:
    """log(step, loss=…, lr=…) writes numbers or tensors measured after `step` updates; None stands for one not finite.

    step, steps: the update that the run starts from, and its last. wandb off|online|offline, in the folder's own wandb
    run if it had one; see check_wandb.
    """

    def __init__(self, out, config, *, step=0, steps, main=True, wandb="off"):
        self.out, self.start, self.steps, self.main = Path(out), step, steps, main
        if not main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "config.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        self.wandb = None if wandb == "off" else start_wandb(self.out, config, wandb, before.get("wandb"))
        now = {"flags": config, "wandb": self.wandb.id if self.wandb else before.get("wandb")} | circumstances()
        file.with_suffix(".tmp").write_text(json.dumps(now, indent=1) + "\n")
        file.with_suffix(".tmp").replace(file)
        (self.out / "log.jsonl").touch()
        self.jsonl = open(self.out / "log.jsonl", "r+b")
        self.entries, self.tail = cut_back(self.jsonl, step)
        self.bar, self.shown = None, {}
        if sys.stdout.isatty() and sys.stderr.isatty() and os.get_terminal_size().columns:
            form = "{n_fmt}/{total_fmt} {bar:12} {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=steps, initial=step, bar_format=form, dynamic_ncols=True)
        given = ", ".join(f"{name} {value}" for name, value in config.items() if value not in (None, ()))
        self.say(f"{out}{f', on from step {step}' if step else ''}: {given}")
        if before and (changed := changes(before, now)):
            self.say(f"changed since the run was last started: {', '.join(changed)}")
        self.began = self.drawn = time.monotonic()
        self.cost = 0.0     # seconds that the last curves took

    def __call__(self, step, **seen):
        if not self.main:
            return
        seen = {name: number(value) for name, value in seen.items()}
        if self.entries and self.entries[-1]["step"] == step:   # more about the same step: still one object
            self.entries[-1] |= seen
        else:
            self.entries.append({"step": step} | seen)
            self.tail = self.jsonl.tell()
        self.jsonl.seek(self.tail)
        self.jsonl.write(json.dumps(self.entries[-1], allow_nan=False).encode() + b"\n")
        self.jsonl.truncate()
        self.jsonl.flush()
        if self.wandb:
            self.wandb.log({"step": step} | seen)
        self.show(step, seen)
        if time.monotonic() - self.drawn > max(60, 100 * self.cost):    # at most a hundredth of the run
            self.draw()

    def show(self, step, seen):
        """The live line moves on, or a plain one is printed."""
        seen = {name: value for name, value in seen.items() if name.endswith(SHOWN)} or seen
        if self.bar:
            self.tick(step)
            self.shown |= seen
            self.bar.set_postfix_str(words(self.shown))
        else:
            eta = ""
            if self.start < step < self.steps:
                left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
                eta = f"  eta {timedelta(seconds=round(left))}"
            print(f"step {step:{len(str(self.steps))}}/{self.steps}  {words(seen)}{eta}", flush=True)

    def tick(self, step):
        """Moves the live line to `step`; cheap, for every step."""
        if self.main and self.bar:
            self.bar.update(step - self.bar.n)

    def say(self, text):
        """Prints a line, above the live one."""
        if self.main:
            self.bar.write(text) if self.bar else print(text, flush=True)

    def file(self, kind, step, suffix):
        """The path of a file of this step, out/samples/step_0000500.mp4; its folder is made."""
        path = self.out / kind / f"step_{step:07d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def video(self, step, path, captions=()):
        """Shows the mp4 that was written at `path`, in wandb under its folder's name."""
        if not self.main:
            return
        self.say(f"step {step}: videos in {path}")
        if self.wandb:
            import wandb
            clip = wandb.Video(str(path), caption=" · ".join(captions), format="mp4")
            self.wandb.log({"step": step, path.parent.name: clip})

    def draw(self):
        """curves.png from all that was logged."""
        if self.main and self.entries:
            began = time.monotonic()
            curves(self.out / "curves.png", self.entries)
            self.drawn = time.monotonic()
            self.cost = self.drawn - began

    @staticmethod
    def speed(flops_per_s, device, precision):
        """{tflops, mfu, memory_gb} of this rank, by the FLOPs its model needs in a second (3 × forward, no recompute).

        mfu is a share of the dense bf16 peak; it is left out for fp32 and where the peak is unknown. memory_gb: the
        most since the last call; on CPU, since the process began.
        """
        seen = {"tflops": flops_per_s / 1e12}
        if device.type == "cuda":
            top = peak(torch.cuda.get_device_name(device))
            if top and precision == "bf16":
                seen["mfu"] = seen["tflops"] / top
            seen["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
        elif os.name == "posix":
            import resource
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
            seen["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        return seen

    def close(self):
        """The last curves, and the end of the live line and of wandb's run."""
        if not self.main:
            return
        self.draw()
        self.jsonl.close()
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# ---- speed ----------------------------------------------------------------------------------------------------------

def peak(name):
    """Dense bf16 TFLOP/s of a device by its name, "NVIDIA H100 80GB HBM3" -> 989; None if unknown or a slice (MIG)."""
    given = set(re.split(r"[^A-Za-z0-9]+", name))
    return None if "MIG" in given else next((top for row, top in PEAKS.items() if given.issuperset(row.split())), None)


# ---- before a run ---------------------------------------------------------------------------------------------------

def room(device, ranks, folder):
    """Bytes that are here: memory for each of so many ranks (inf if nobody says), and free on a folder's disk."""
    memory = math.inf
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return memory, shutil.disk_usage(folder).free


def budget(title, held, activations, checkpoint, most, there, ways):
    """Prints what a run takes beside what is there -> its exit code: 0, or 2 where it does not fit, naming ways out.

    Bytes on a rank: held {what: n} all the time, activations {what: n} one of them at a time. Bytes on disk: `most`
    checkpoints. there: (memory of a rank, free disk). ways: {flag that would take less: whether it is left}.
    """
    memory, disk = sum(held.values()) + max(activations.values()), most * checkpoint
    of = [f" of {n / 1e9:.3f}" if n < math.inf else "" for n in there]
    print(f"{title}: GB of each, at most")
    for what, n in (held | activations | {
            f"in all{of[0]}, a tenth of which is left to kernels and fragments": memory,
            f"on disk{of[1]}: {most} checkpoints, one of them being written": disk}).items():
        print(f"{n / 1e9:12.3f}  {what}")
    if full := memory > 0.9 * there[0]:
        less = ", ".join(flag for flag, left in ways.items() if left)
        print(f"does not fit a rank's memory; less is taken with {less}", file=sys.stderr)
    if disk > there[1]:
        print("does not fit the disk; less is taken with a smaller --keep, or --out is elsewhere", file=sys.stderr)
    return 2 if full or disk > there[1] else 0


# ---- the folder -----------------------------------------------------------------------------------------------------

def circumstances():
    """Commit, CRC32 of the sources, versions, threads and command of this process."""
    sources = {path.name: zlib.crc32(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.py"))}
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "commit": git.stdout.strip() or None,
        "sources": sources,
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": sys.argv,
    }


def changes(then, now):
    """What differs between two runs' circumstances: sources by name, versions, threads and device with their values."""
    def values(c):
        return c["versions"] | {"threads": c["threads"], "device": c["device"]}

    old, new, sources = values(then), values(now), then["sources"] | now["sources"]
    return ([name for name in sorted(sources) if then["sources"].get(name) != now["sources"].get(name)]
            + [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)])


def cut_back(file, step):
    """Cuts off what a log (r+b) has of steps after `step`, and a line torn by a crash -> entries, start of the last."""
    entries, tail, end = [], 0, 0
    for line in file:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] > step or not line.endswith(b"\n"):
            break
        entries.append(entry)
        tail, end = end, end + len(line)
    file.seek(end)
    file.truncate()
    return entries, tail


def check_wandb(mode):
    """RuntimeError where wandb is to be online and there is no login."""
    if mode == "online":
        import wandb
        if not wandb.login(prompt=False):
            raise RuntimeError("--wandb=online finds no login: `wandb login`, or WANDB_API_KEY=…, or --wandb=offline")


def start_wandb(out, config, mode, run_id):
    """A wandb run, or the one called run_id again, with our step as the axis of every metric; it never asks."""
    import wandb
    run = wandb.init(project="nanovideo", name=out.name, dir=out, config=config, mode=mode,
                     id=run_id, resume="allow", settings=wandb.Settings(console="off"))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def number(value):
    """A measurement as JSON has it: tensors and arrays become numbers or lists, what is not finite becomes None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [number(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def words(seen):
    return "  ".join(f"{name} {'not finite' if x is None else format(x, '.4g')}" for name, x in seen.items())


# ---- curves ---------------------------------------------------------------------------------------------------------

def panel(name):
    """The panel a series is drawn in: loss and val_loss share one, so do the bins loss_by_t0, loss_by_t1, …"""
    binned = re.fullmatch(r"(.+?)(?:_by)?_t\d+", name)
    return f"{binned[1]} by t" if binned else re.sub(r"^(val|train_set)_(?=loss$)", "", name)


def curves(path, entries):
    """Draws every series of a log's entries, related ones in one panel, noisy ones smoothed, into the PNG `path`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                series.setdefault(name, []).append((entry["step"], value))
    panels = {}
    for name in sorted(series, key=lambda n: (n in MACHINE, panel(n) != "loss", not panel(n).endswith("by t"))):
        panels.setdefault(panel(name), []).append(name)

    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    style = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
             "axes.edgecolor": "0.6", "axes.grid": True, "grid.color": "0.92", "xtick.color": "0.4",
             "ytick.color": "0.4", "legend.frameon": False}
    with rc_context(style):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=110, layout="constrained")
        for i, (title, names) in enumerate(panels.items()):
            plot(figure.add_subplot(rows, columns, i + 1), title, {name: series[name] for name in names})
        FigureCanvasAgg(figure).print_png(path)


def plot(axes, title, series):
    """One panel: bins of t from dark (data) to light (noise); of a noisy series its running mean, raw values faint."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    binned = title.endswith("by t")
    for i, (name, points) in enumerate(sorted(series.items())):
        x, y = zip(*points)
        colour = colormaps["viridis"](0.9 * i / max(1, len(series) - 1)) if binned else f"C{i}"
        label = name.rsplit("_", 1)[-1] if binned else name
        smooth = len(y) >= 50 and not name.endswith("lr")
        if smooth:
            axes.plot(x, y, color=colour, lw=0.7, alpha=0.25)
            y = running_mean(y)
        axes.plot(x, y, color=colour, lw=1.4, label=label, marker="." if len(y) < 20 else None)
    values = [y for points in series.values() for _, y in points]
    if re.search("loss|norm", title) and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"),
                       minor_formatter=NullFormatter())
    elif min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) or 1)
    axes.set_title(title, loc="left")
    if len(series) > 1:
        axes.legend(fontsize=7)


def running_mean(values):
    """The mean of each value and its neighbours, one in 40 of all on either side."""
    sums, n, reach = [0.0, *accumulate(values)], len(values), max(2, len(values) // 40)
    spans = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]
