"""One run's folder, and all that is shown of a run. Imports nothing of ours.

    config.json       flags, commit, versions, threads
    log.jsonl         one object per step logged; a resumed run cuts it back to where it goes on
    curves.png        every series of log.jsonl
    samples/          videos, by step, and captions.json
    index.html        all of this as a page for a browser
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
from datetime import datetime, timedelta
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from string import Template
from urllib.parse import quote

import torch
from tqdm import tqdm

# dense bf16 TFLOP/s from the makers' data sheets; the first row whose words a device's name has
PEAKS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250, "H200 NVL": 835, "H200": 989,
    "GH200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121,
}
# timings and memory: they differ between identical runs
MACHINE = ("seconds", "data_wait", "samples_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb")
# the live line shows names that end in one of these
SHOWN = ("loss", "grad_norm", "lr", "samples_per_s", "mfu")
PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "av", "tyro", "wandb", "diffusers",
            "transformers")


class Log:
    """log(step, loss=…, lr=…) writes numbers or tensors measured after `step` updates; non-finite ones as null.

    step, steps: the update that the run starts from, and its last. wandb: off, online or offline; a folder that has a
    wandb run continues it; see check_wandb. signs: a function of all entries -> {cause: line}, asked at each; a line is
    said once for its cause.
    """

    def __init__(self, out, config, *, step=0, steps, main=True, wandb="off", signs=None):
        self.out, self.start, self.steps, self.main = Path(out), step, steps, main
        self.signs, self.warned = signs, set()
        if not main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        file, before = self.out / "config.json", told(self.out)
        self.wandb, wandb_id = None, before.get("wandb")
        if wandb != "off":
            self.wandb = start_wandb(self.out, config, wandb, wandb_id)
            wandb_id = self.wandb.id
        self.about = {"flags": config, "wandb": wandb_id} | circumstances()
        write(file, json.dumps(self.about, indent=1) + "\n")
        (self.out / "log.jsonl").touch()
        self.jsonl = open(self.out / "log.jsonl", "r+b")
        self.entries, self.tail = cut_back(self.jsonl, step or -1)      # nothing stays of a run that has saved nothing
        self.last = max(0, len(self.entries) - 1)   # the entry that begins at `tail`: those before it are on disk
        self.bar, self.shown = None, {}
        if sys.stdout.isatty() and sys.stderr.isatty() and os.get_terminal_size().columns:
            form = "{n_fmt}/{total_fmt} {bar:12} {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=steps, initial=step, bar_format=form, dynamic_ncols=True)
        given = [f"{name} {value}" for name, value in config.items() if value not in (None, ())]
        self.say(f"{out}{f', on from step {step}' if step else ''}: {', '.join(given)}")
        if before and (changed := changes(before, self.about)):
            self.say(f"changed since the run was last started: {', '.join(changed)}")
        self.reached = step
        self.began = self.drawn = time.monotonic()
        self.cost = 0.0     # seconds that the last curves took

    def __call__(self, step, **seen):
        if not self.main:
            return
        seen = {name: number(value) for name, value in seen.items()}
        if self.entries and self.entries[-1]["step"] == step:   # still one object per step
            self.entries[-1] |= seen
        else:
            self.entries.append({"step": step} | seen)
            self.reached = step
        with self.reported("log.jsonl"):    # its last entry may hold more now; a full disk may have kept others away
            lines = [json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in self.entries[self.last:]]
            self.jsonl.seek(self.tail)
            self.jsonl.writelines(lines)
            self.jsonl.truncate()
            self.jsonl.flush()
            self.tail = self.jsonl.tell() - len(lines[-1])
            self.last = len(self.entries) - 1
        if self.wandb:
            self.wandb.log({"step": step} | seen)
        self.show(step, seen)
        if self.signs:
            for cause, line in self.signs(self.entries).items():
                if cause not in self.warned:
                    self.warned.add(cause)
                    self.say(f"step {step}: {line}")
        if time.monotonic() - self.drawn > max(60, 100 * self.cost):    # at most 1 % of the time
            self.draw()

    def show(self, step, seen):
        """Moves the live line on, or prints a plain one."""
        seen = {name: value for name, value in seen.items() if name.endswith(SHOWN)} or seen
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.shown |= seen
            self.bar.set_postfix_str(words(self.shown))
        else:
            eta = ""
            if self.start < step < self.steps:
                per_step = (time.monotonic() - self.began) / (step - self.start)
                eta = f"  eta {timedelta(seconds=round(per_step * (self.steps - step)))}"
            width = len(str(self.steps))
            print(f"step {step:{width}}/{self.steps}  {words(seen)}{eta}", flush=True)

    def say(self, text):
        """Prints a line, above the live one."""
        if self.main:
            self.bar.write(text) if self.bar else print(text, flush=True)

    def file(self, kind, step):
        """The path, still without its suffix, for a file of this step: out/samples/step_0000500; its folder is made."""
        path = self.out / kind / f"step_{step:07d}"
        with suppress(OSError):     # whoever writes there says so
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def video(self, step, path, captions=(), rows=()):
        """Shows a grid of clips, written at `path` as mp4 or as latents (npy), on the page and in wandb.

        captions: one for each clip. rows: where each row of the grid has a name, the names; captions are then those of
        the columns.
        """
        if not self.main:
            return
        film = path.suffix == ".mp4"
        if film:
            self.say(f"step {step}: videos in {path}")
        if self.wandb and film:
            import wandb
            clip = wandb.Video(str(path), caption=" · ".join(captions), format="mp4")
            self.wandb.log({"step": step, path.parent.name: clip})
        self.reached = max(step, self.reached)
        with self.reported("the page"):
            remember(path, captions, rows)
            self.page()

    def draw(self):
        """Draws curves.png from all that was logged, and writes the page around it."""
        if self.main and self.entries:
            began = time.monotonic()
            with self.reported("curves and page"):
                curves(self.out / "curves.png", self.entries)
                self.page()
            self.drawn = time.monotonic()
            self.cost = self.drawn - began

    def page(self):
        """Writes index.html: what is in the folder, for a browser."""
        text = render(self.out, self.about, self.entries, self.reached, self.steps)
        write(self.out / "index.html", text)

    @contextmanager
    def reported(self, what):
        """Says once that a disk is full or failing instead of ending the run: `what` is written when it can be."""
        try:
            yield
            self.warned.discard(what)
        except OSError as error:
            if what not in self.warned:
                self.say(f"{what} could not be written, the run goes on: {error}")
            self.warned.add(what)

    @staticmethod
    def speed(flops_per_s, device, precision):
        """{tflops, mfu, memory_gb} of this rank; flops_per_s: what its model needs (3 × forward, no recompute).

        mfu is the share of the dense bf16 peak; fp32 and devices of unknown peak have none. memory_gb is the peak since
        the last call; on a CPU, since the process began.
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
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            seen["memory_gb"] = most * unit / 1e9
        return seen

    def close(self):
        """Draws the last curves; ends the live line and wandb's run."""
        if not self.main:
            return
        self.draw()
        with self.reported("log.jsonl"):
            self.jsonl.close()
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# ---- speed ----------------------------------------------------------------------------------------------------------

def peak(name):
    """Dense bf16 TFLOP/s of a device by its name, "NVIDIA H100 80GB HBM3" -> 989; None if unknown or a slice (MIG)."""
    given = set(re.split(r"[^A-Za-z0-9]+", name))
    if "MIG" in given:
        return None
    return next((top for row, top in PEAKS.items() if given.issuperset(row.split())), None)


# ---- time -----------------------------------------------------------------------------------------------------------

class Clock:
    """Sums what the steps since the last line of the log took.

    `with clock("data_wait"): …` adds the seconds spent inside, clock.add("flops", n) any other quantity.
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
        """{name: its sum divided by `steps`}; every sum starts again from 0, so that the names stay the same."""
        means = {name: total / steps for name, total in self.sums.items()}
        self.sums = dict.fromkeys(self.sums, 0.0)
        return means


# ---- the folder -----------------------------------------------------------------------------------------------------

def told(out):
    """What config.json of a run says, {} where there is none; ValueError where it is damaged."""
    file = Path(out) / "config.json"
    if not file.exists():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said.keys() >= {"flags", "sources", "versions", "threads", "device"}:
            return said
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged: remove it, and the run goes on; only the id of its run in wandb is lost")


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
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout
    except OSError:
        return None
    return said.strip() or None


def checksum(path):
    """CRC32 of a file, None if it cannot be read."""
    try:
        return zlib.crc32(path.read_bytes())
    except OSError:
        return None


def changes(then, now):
    """Names what differs between two circumstances: source files; versions, threads and device with their values."""
    def values(c):
        return c["versions"] | {"threads": c["threads"], "device": c["device"]}

    files = sorted(then["sources"] | now["sources"])
    changed = [name for name in files if then["sources"].get(name) != now["sources"].get(name)]
    old, new = values(then), values(now)
    for name in old | new:
        if old.get(name) != new.get(name):
            changed.append(f"{name} {old.get(name)} -> {new.get(name)}")
    return changed


def write(path, text):
    """Replaces a file at once, so that a reader sees the old one or the new one."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8", errors="replace")
    path.with_suffix(".tmp").replace(path)


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


def held(entries, step, name):
    """Whether one of a log's entries has this number at this step."""
    return any(entry["step"] == step and name in entry for entry in entries)


def holds(out, step, name):
    """Whether the log in a run's folder has this number at this step; asked before a Log is opened."""
    file = Path(out) / "log.jsonl"
    if not file.exists():
        return False
    with open(file, "rb") as stored:
        return held((entry for entry, _ in lines(stored)), step, name)


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
            raise RuntimeError("--wandb=online finds no login: `wandb login`, or WANDB_API_KEY=…, "
                               "or --wandb=offline")


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


def words(seen, between="  "):
    return between.join(f"{name} {short(value)}" for name, value in seen.items())


def short(value):
    """A logged value as text: 0.1235, "not finite"."""
    if value is None:
        return "not finite"
    return format(value, ".4g") if isinstance(value, float) else str(value)


# ---- curves ---------------------------------------------------------------------------------------------------------

def panel(name):
    """The title of a series' panel: loss and val_loss share one, and so do the bins loss_by_t0, loss_by_t1, …"""
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
            if name != "step" and isinstance(value, (int, float)) and abs(value) < 1e100:     # matplotlib adds some
                series.setdefault(name, []).append((entry["step"], value))
    if not series:
        return

    def rank(name):     # the loss first, then bins of t, then the rest, the machine last
        return name in MACHINE, panel(name) != "loss", not panel(name).endswith("by t")

    panels = {}
    for name in sorted(series, key=rank):
        panels.setdefault(panel(name), []).append(name)

    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    style = {
        "font.size": 9, "axes.titlesize": 10, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6",
        "axes.grid": True, "grid.color": "0.92", "xtick.color": "0.4", "ytick.color": "0.4",
    }
    with rc_context(style):
        sheet = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=110, layout="constrained")
        for i, (title, names) in enumerate(panels.items()):
            axes = sheet.add_subplot(rows, columns, i + 1)
            plot(axes, title, {name: series[name] for name in names})
        FigureCanvasAgg(sheet).print_png(path)


def plot(axes, title, series):
    """Draws one panel: bins of t from dark (data) to light (noise); noisy series faint under their running mean."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    binned = title.endswith("by t")
    for i, (name, points) in enumerate(sorted(series.items())):
        x, y = zip(*points)
        colour, label = f"C{i}", name
        if binned:
            colour = colormaps["viridis"](0.9 * i / max(1, len(series) - 1))
            label = name.rsplit("_", 1)[-1]
        smooth = len(y) >= 50 and not name.endswith("lr")
        if smooth:
            axes.plot(x, y, color=colour, lw=0.7, alpha=0.25)
            y = running_mean(y)
        axes.plot(x, y, color=colour, lw=1.4, label=label, marker="." if len(y) < 20 else None)
    values = [y for points in series.values() for _, y in points]
    if re.search("loss|norm", title) and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)),
                       major_formatter=StrMethodFormatter("{x:g}"), minor_formatter=NullFormatter())
    elif min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) or 1)
    axes.set_title(title, loc="left")
    if len(series) > 1:
        axes.legend(fontsize=7)


def running_mean(values):
    """Means of each value and its neighbours, 1/40 of all values on either side."""
    sums, n, reach = [0.0, *accumulate(values)], len(values), max(2, len(values) // 40)
    spans = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


# ---- the page -------------------------------------------------------------------------------------------------------

VALIDATIONS = 50    # that the page shows
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {color-scheme: light dark;
  --ground: #f5f5f2; --card: #fff; --ink: #24262b; --quiet: #70747c; --line: #e4e4df}
@media (prefers-color-scheme: dark) {
  :root {--ground: #141517; --card: #1d1f22; --ink: #e2e2df; --quiet: #92959c; --line: #2e3136}
  .curves img {filter: invert(.885) hue-rotate(180deg)}
}
* {box-sizing: border-box}
body {max-width: 88rem; margin: 0 auto; padding: 2.5rem 1.5rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere}
h1 {font-size: 1.7rem; margin: 0}
h2 {font-size: 1.1rem; margin: 2.5rem 0 .8rem}
h3 {font-size: 1rem; margin: 0; contain: inline-size}
p {margin: .2rem 0}
a {color: inherit}
p, dt, h3 span, figcaption, .rows {color: var(--quiet); font-weight: normal; font-size: .85rem}
article, .curves, dl {background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; margin: 0}
.videos, article > div {display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start}
article {max-width: 100%}
figure {margin: .6rem 0 0; width: max(18rem, calc(var(--columns) * 9rem)); max-width: 100%;
  display: grid; grid-template-columns: auto 1fr; gap: .4rem 0}
figure > * {grid-column: 2}
video {display: block; width: 100%; border-radius: 6px; background: #101010}
.rows {grid-area: 1 / 1; display: grid; grid-auto-rows: 1fr; padding-right: .4rem}
.rows span {writing-mode: vertical-rl; transform: rotate(180deg); text-align: center}
ol {display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: .2rem .6rem;
  margin: 0; padding: 0; list-style: none; font-size: .85rem; line-height: 1.3}
li {display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden}
.curves img {display: block; width: 100%}
dl {columns: 18rem; column-gap: 2.5rem}
dl div {display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: .15rem 0}
dt {flex: none}
dd {margin: 0; text-align: right; font-variant-numeric: tabular-nums}
</style>
<h1>$title</h1>
<p>$summary</p>
<h2>Videos</h2>
<p>$more</p>
<div class="videos">$videos</div>
$curves
<h2>Last line of the log</h2>
<dl>$last</dl>
<h2>Flags</h2>
<dl>$flags</dl>
<h2>Versions</h2>
<dl>$versions</dl>
</html>
""")


def remember(path, captions, rows):
    """Notes in captions.json what a video shows: a resumed run finds it there."""
    told = remembered(path.parent)
    other = path.with_suffix(".npy" if path.suffix == ".mp4" else ".mp4")
    told.pop(other.name, None)      # of this step, before the run was resumed
    told[path.name] = {"captions": list(captions), "rows": list(rows)}
    write(path.parent / "captions.json", json.dumps(told, indent=1, sort_keys=True) + "\n")


def remembered(folder):
    """{file name: {captions, rows}} of a folder's videos; {} where nothing readable is noted."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return {}


def render(out, about, entries, reached, steps):
    """The text of index.html: videos of the steps up to `reached`, newest first; curves, numbers, circumstances."""
    shown = validations(out, reached)
    more = "" if shown else "None yet."
    if len(shown) > VALIDATIONS:
        more = f"The newest {VALIDATIONS} of {len(shown)} validations; the folder has the others."
    logged = {entry["step"]: entry for entry in entries}
    cards = [card(step, shown[step], logged.get(step, {})) for step in list(shown)[:VALIDATIONS]]
    written = f"written {datetime.now():%Y-%m-%d %H:%M}"
    summary = [f"step {reached} of {steps}", about["device"], written]
    drawn = ""
    if (out / "curves.png").exists():
        drawn = '<h2>Curves</h2>\n<div class="curves"><img src="curves.png" alt="curves"></div>'
    last = entries[-1] if entries else {}
    around = {name: about[name] for name in ("commit", "device", "threads", "command")}
    return PAGE.substitute(
        title=escape(str(out)), summary=escape(" · ".join(summary)), more=more,
        videos="\n".join(cards), curves=drawn,
        last=table({name: short(value) for name, value in last.items()}),
        flags=table(about["flags"]), versions=table(about["versions"] | around))


def validations(out, reached):
    """{step: [(path, its captions and rows)]} of a folder's videos, or latents without a video; newest first.

    Leaves out steps after `reached`: a run that is resumed before them will write them again.
    """
    found = {}
    folders = {path.parent for path in out.glob("*/step_*.*")}
    for folder in sorted(folders, key=lambda path: (path.name != "samples", path.name)):
        told = remembered(folder)
        files = [file for file in folder.iterdir() if re.fullmatch(r"step_\d+\.(mp4|npy)", file.name)]
        files.sort(key=lambda file: (file.name in told, file.suffix == ".mp4"))
        for path in {file.stem: file for file in files}.values():   # of two of a step the later one
            step = int(path.stem.removeprefix("step_"))
            if step <= reached:
                found.setdefault(step, []).append((path, told.get(path.name, {})))
    return dict(sorted(found.items(), reverse=True))


def card(step, figures, entry):
    """Lays out one validation: its numbers above its videos."""
    numbers = {name: value for name, value in entry.items()
               if name.startswith(("val_", "train_set_")) and not re.search(r"_t\d+$", name)}
    title = f"<h3>step {step} <span>{escape(words(numbers, ' · '))}</span></h3>"
    films = "\n".join(figure(path, **told) for path, told in figures)
    return f"<article>{title}\n<div>{films}</div></article>"


def figure(path, captions=(), rows=()):
    """Lays out a video, or a link to latents: names of rows beside it; below it captions, arranged as its clips."""
    link = quote(f"{path.parent.name}/{path.name}")
    if path.suffix == ".mp4":
        how = 'loop muted autoplay playsinline controls preload="metadata"'
        film = f'<video src="{link}" {how}></video>'
    else:
        film = f'<p>latents, not decoded: <a href="{link}">{link}</a></p>'
    columns = len(captions) if rows else math.ceil(len(captions)**0.5)      # as in codec.grid
    names = "".join(f"<span>{escape(name)}</span>" for name in rows)
    beside = f'<div class="rows">{names}</div>' if rows else ""
    items = "".join(f'<li title="{escape(text)}">{escape(text)}</li>' for text in captions)
    return (f'<figure style="--columns: {max(1, columns)}">{beside}{film}\n'
            f"<figcaption>{escape(path.parent.name)}</figcaption><ol>{items}</ol></figure>")


def table(values):
    """Lays out names and values; None and () become a dash."""
    rows = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        text = "–" if value in (None, "") else escape(str(value))
        rows.append(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>")
    return "\n".join(rows)
