"""One run's folder, and all that is shown of a run. Imports nothing of ours.

    config.json       flags, commit, versions, threads
    log.jsonl         one object per step logged; a resumed run cuts it back to where it goes on
    curves.png        every series of log.jsonl
    samples/          videos, by step
    wandb/            if asked for

and one live line on a terminal, plain lines in a pipe. Only the main rank writes and prints: others do nothing.

To log a number, return it in the `seen` of a loss (step.py): it is averaged over micro-batches and ranks, written to
log.jsonl, drawn in curves.png and sent to wandb. A name that ends in `_by` holds what step.binned gives; it is logged
as five numbers, from `…_by_t0` (near data) to `…_by_t4` (near noise), in a panel of their own. The live line shows
names that end as SHOWN says. Add a timing to MACHINE: those differ between runs that are otherwise identical.
"""
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

PEAKS = {  # dense bf16 TFLOP/s from the makers' data sheets; a device takes the first row whose words are in its name
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121,
}
# timings and memory: they differ between identical runs
MACHINE = ("seconds", "data_wait", "samples_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb")
SHOWN = ("loss", "grad_norm", "lr", "samples_per_s", "mfu")     # the live line shows names that end in one of these
PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "av", "tyro", "wandb", "diffusers", "transformers")


class Log:
    """log(step, loss=…, lr=…) writes numbers or tensors measured after `step` updates; non-finite ones as null.

    step, steps: the update that the run starts from, and its last. wandb: off, online or offline; a folder that has a
    wandb run continues it; see check_wandb.
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
            self.bar.update(step - self.bar.n)
            self.shown |= seen
            self.bar.set_postfix_str(words(self.shown))
        else:
            eta = ""
            if self.start < step < self.steps:
                left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
                eta = f"  eta {timedelta(seconds=round(left))}"
            print(f"step {step:{len(str(self.steps))}}/{self.steps}  {words(seen)}{eta}", flush=True)

    def holds(self, step, name):
        """Whether the log has this number at this step; other ranks, which keep no log, answer True."""
        return not self.main or any(entry["step"] == step and name in entry for entry in self.entries)

    def say(self, text):
        """Prints a line, above the live one."""
        if self.main:
            self.bar.write(text) if self.bar else print(text, flush=True)

    def stem(self, kind, step):
        """The path, without its ending, of a file of this step, out/samples/step_0000500."""
        return self.out / kind / f"step_{step:07d}"

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


# ---- time -----------------------------------------------------------------------------------------------------------

class Clock:
    """Sums, since the last line of the log, the seconds spent here and there, or other quantities.

    `with clock("data_wait"): …` adds seconds, clock.add("flops", n) any number; clock.take(steps) ends the line.
    """

    def __init__(self):
        self.sums = {}

    @contextmanager
    def __call__(self, name):
        self.add(name, 0)
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name, amount):
        self.sums[name] = self.sums.get(name, 0.0) + amount

    def take(self, steps):
        """{name: its sum over `steps`, per step}; all sums start anew, names stay."""
        means = {name: total / steps for name, total in self.sums.items()}
        self.sums = dict.fromkeys(self.sums, 0.0)
        return means


# ---- the folder -----------------------------------------------------------------------------------------------------

def circumstances():
    """Commit, CRC32 of the sources, versions, threads and command of this process; None for what cannot be read."""
    sources = {path.name: checksum(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "commit": commit(Path(__file__).parent),
        "sources": sources,
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": sys.argv,
    }


def commit(folder):
    """The commit checked out in a folder, "-dirty" if changed since; None without a repository, or without git."""
    with suppress(OSError):
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             cwd=folder, capture_output=True, text=True)
        return git.stdout.strip() or None


def checksum(path):
    with suppress(OSError):
        return zlib.crc32(path.read_bytes())


def changes(then, now):
    """Names what differs between two circumstances: source files, and versions, threads and device with their values."""
    def values(c):
        return c["versions"] | {"threads": c["threads"], "device": c["device"]}

    old, new, sources = values(then), values(now), then["sources"] | now["sources"]
    return ([name for name in sorted(sources) if then["sources"].get(name) != now["sources"].get(name)]
            + [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)])


def lines(file):
    """Yields (entry, bytes) of each line of a log opened in binary, up to one that a crash tore."""
    for line in file:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        yield entry, line


def holds(out, step, name):
    """Whether the log in a run's folder has this number at this step; asked before a Log is opened."""
    file = Path(out) / "log.jsonl"
    if not file.exists():
        return False
    with open(file, "rb") as stored:
        return any(entry["step"] == step and name in entry for entry, _ in lines(stored))


def cut_back(file, step):
    """Cuts a log (r+b) off after `step`, and at a line torn by a crash -> entries, where the last one starts."""
    entries, tail, end = [], 0, 0
    for entry, line in lines(file):
        if entry["step"] > step:
            break
        entries.append(entry)
        tail, end = end, end + len(line)
    file.seek(end)
    file.truncate()
    return entries, tail


def check_wandb(mode):
    """Raises RuntimeError if wandb is to be online and there is no login."""
    if mode == "online":
        import wandb
        if not wandb.login(prompt=False):
            raise RuntimeError("--wandb=online finds no login: `wandb login`, or WANDB_API_KEY=…, or --wandb=offline")


def start_wandb(out, config, mode, run_id):
    """Starts a wandb run, or continues run_id, with our step as the axis of every metric; never prompts."""
    import wandb
    run = wandb.init(project="nanovideo", name=out.name, dir=out, config=config, mode=mode,
                     id=run_id, resume="allow", settings=wandb.Settings(console="off"))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def number(value):
    """Converts a measurement for JSON: tensors and arrays to numbers or lists, non-finite values to None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [number(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def words(seen):
    return "  ".join(f"{name} {short(value)}" for name, value in seen.items())


def short(value):
    """A logged value as text: 0.1235, "not finite"."""
    if value is None:
        return "not finite"
    return format(value, ".4g") if isinstance(value, (int, float)) else str(value)


# ---- curves ---------------------------------------------------------------------------------------------------------

def panel(name):
    """The panel a series is drawn in: loss and val_loss share one, so do the bins loss_by_t0, loss_by_t1, …"""
    binned = re.fullmatch(r"(.+?)(?:_by)?_t\d+", name)
    return f"{binned[1]} by t" if binned else re.sub(r"^(val|train_set)_(?=loss$)", "", name)


def curves(path, entries):
    """Draws every series of a log's entries into the PNG `path`: related ones in a panel, noisy ones smoothed.

    Draws nothing if no value is finite.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((entry["step"], value))
    if not series:
        return
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
