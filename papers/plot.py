"""papers/plot.py: what the papers' commands share: options, trained runs, tables, pictures.

    python -m papers.debias table --steps 750           from the repository's root

A command is a function of its arguments.  It computes rows and calls `show`, which prints a table,
writes papers/results/PAPER-COMMAND.csv and, where matplotlib is installed, draws the .png.
Options that a command does not know go to train.py's runs: the same command with --data cifar10 and
a GPU makes the paper's own table.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

import evaluate
import train
from evaluate import BadInput, Progress, attempt

RESULTS = Path(__file__).parent / "results"


# ---- Command line --------------------------------------------------------------------------------

def main(paper, commands, argv=None):
    """The command line of a paper's file.

    commands: {name: (function, {argument: default})}; a list's default takes several values, None
    a path.  The function gets the arguments as attributes, with args.paper, args.command and
    args.options, a dict for train.Options.  Its docstring's first paragraph is its help.
    """
    p = evaluate.Parser(prog=f"python -m papers.{paper}", description=__doc__.split("\n\n")[0])
    known = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, arguments) in commands.items():
        about = function.__doc__.split("\n\n")[0]
        command = known.add_parser(name, help=about.split(".")[0], description=function.__doc__)
        for argument, default in (arguments | dict(seed=0, out=str(RESULTS))).items():
            add_argument(command, argument, default)
    try:
        args, rest = p.parse_known_args(argv)
        args.paper, args.options = paper, vars(train.parser().parse_args(rest))
        start = time.time()
        commands[args.command][0](args)
        print(f"{(time.time() - start) / 60:.1f} minutes")
        return 0
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"papers.{paper}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npapers.{paper}: stopped; finished runs are kept", file=sys.stderr)
        return 130


def add_argument(command, name, default):
    """An argument whose type is that of its default; run and runs are positional."""
    several = isinstance(default, (list, tuple))
    shown = " ".join(map(str, default)) if several else default
    how = dict(default=default)
    if name in ("run", "runs"):
        command.add_argument(name, nargs="*" if several else "?", metavar="RUN", help="folder that "
                             "train.py made", **how)
        return
    kind = type(default[0] if several else default) if default is not None else str
    command.add_argument(f"--{name}", type=kind, nargs="+" if several else None, metavar=name[0].
                         upper(), help=f"default: {shown}", **how)


# ---- Runs ----------------------------------------------------------------------------------------

def trained(given, root="plots/runs", **own):
    """The folder of a run with these options, trained now, or kept from an earlier command.

    given: options for all runs of a command; own: those of this run, which win.
    """
    options = dict(data="digits") | given | own
    key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:10]
    name = "-".join(str(options.get(n, "")) for n in ("data", "loss", "schedule", "weight", "seed"))
    folder = f"{root}/{name.replace('/', '_')}-{key}"
    wanted = train.Options(**options | dict(out=folder))
    if Path(folder, "done").is_file():
        return folder
    print(f"training {folder}", flush=True)
    if Path(folder, "options.json").is_file():
        train.run(train.resumed(folder, {}), folder, brief=True)
    else:
        train.run(wanted, brief=True)
    Path(folder, "done").touch()
    return folder


class Judge:
    """A run's denoiser, and the distance of its samples to its data.

    run: a folder, or one of its checkpoints.  like: a Judge of a run on the same data.
    """

    def __init__(self, args, run, like=None):
        self.denoiser, self.options = evaluate.load_run(run, args.options.get("device"))
        self.denoiser.requires_grad_(False)
        options, self.num = self.options, args.options.get("fid_num", 128)
        self.features = like.features if like else evaluate.extractor(
            options.fid_features, options.shape, options.data_dir, options.device)
        self.real = like.real if like else evaluate.real_statistics(
            evaluate.run_data(options), self.num, self.features)
        self.floor = self.real["floor"]
        self.name = evaluate.distance_name(self.features[0], self.num)

    def __call__(self, sampler, steps, **how):
        """The distance, and the number of function evaluations (NFE): calls of D for a sample."""
        counted = evaluate.Counted(self.denoiser)
        distance = evaluate.run_distance(counted, self.options, self.num, self.features, self.real,
                                         sampler=sampler, steps=steps, **how)
        return distance, counted.rows / self.num


def distances(args, variants, draws):
    """How far samples of runs are from the data: {case: {name: a distance for each seed}}.

    variants: {name: options of its runs}, trained with args.seeds seeds.  draws(folder): for each
    case, whose weights draw the samples of that run, and how.  Also returns the last Judge.
    """
    found, judge = {}, None
    runs = list(itertools.product(variants, range(args.seed, args.seed + args.seeds)))
    told = Progress("runs", len(runs))
    for i, (name, seed) in enumerate(runs):
        folder = trained(variants[name], seed=seed)
        for case, path, how in draws(folder):
            judge = Judge(args, path, judge)
            found.setdefault(case, {}).setdefault(name, []).append(judge(**how)[0])
        told(i + 1)
    return found, judge


# ---- Table, CSV, picture -------------------------------------------------------------------------

def show(args, columns, rows, panels, title, most=24, size=(4.8, 3.8)):
    """A result as a table on the terminal, as a CSV, and, with matplotlib, as a picture.

    rows: lists of numbers and words, one for each of columns.  panels: one dict for each set of
    axes, see `axes`.  title: one line that says what is compared, on which data.
    """
    print(f"\n{title}\n")
    width = [max(11, len(name) + 2) for name in columns]
    print("".join(f"{name:>{w}}" for name, w in zip(columns, width)))
    step = math.ceil(len(rows) / most)
    for row in [*rows[:-1:step], rows[-1]]:
        print("".join(f"{text(cell, 4):>{w}}" for cell, w in zip(row, width)))
    where = os.path.join(args.out, f"{args.paper}-{args.command}")
    attempt(args.out, "choose another --out", os.makedirs, args.out, exist_ok=True)
    with attempt(f"{where}.csv", "choose another --out", open, f"{where}.csv", "w",
                 newline="") as file:
        csv.writer(file).writerows([columns, *([text(c, 6) for c in row] for row in rows)])
    print(f"\n{where}.csv" + (f" has all {len(rows)} rows" if step > 1 else ""))
    if draw(f"{where}.png", columns, rows, panels, title, size):
        print(f"{where}.png")


def text(cell, digits):
    """A number with so many significant digits; words as they are; nothing for None."""
    return "" if cell is None else f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def draw(path, columns, rows, panels, title, size=(4.8, 3.8)):
    """The panels side by side as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib import figure
    except ImportError:
        print("(with matplotlib installed, a picture of this table would be drawn)")
        return False
    wide = len(panels) if len(panels) < 5 else math.ceil(len(panels) / 2)
    high = math.ceil(len(panels) / wide)
    page = figure.Figure(figsize=(size[0] * wide, size[1] * high))
    cells = dict(zip(columns, zip(*rows)))
    for ax, panel in zip(page.subplots(high, wide, squeeze=False).flat, panels):
        axes(ax, cells, columns[0], panel)
    page.suptitle(title)
    page.tight_layout()
    page.savefig(path, dpi=90)
    return True


def axes(ax, cells, first, panel):
    """One set of axes.  panel: y {column: label} or a list of columns, xlabel, ylabel; where wanted
    x (a column; else the first), title, xscale, yscale ("log"), xlim, ylim, spread {column: column
    of standard deviations}, floor (a number: what real data get), legend (True), marker, where (a
    column and the value that it has in the rows of this panel)."""
    x, names = panel.get("x", first), panel["y"]
    column, value = panel.get("where", (x, None))
    rows = {j for j, cell in enumerate(cells[column]) if value in (None, cell)}
    labels = names if isinstance(names, dict) else {name: name for name in names}
    for i, (name, label) in enumerate(labels.items()):
        points = [(a, b, j) for j, (a, b) in enumerate(zip(cells[x], cells[name]))
                  if j in rows and a is not None and b is not None]
        place, value, index = zip(*points) if points else ((), (), ())
        style = dict(label=label, linestyle=["-", "--", "-.", ":"][i % 4],
                     linewidth=3 - 2 * i / len(labels), marker=panel.get("marker"))
        spread = panel.get("spread", {}).get(name)
        if spread:
            ax.errorbar(place, value, [cells[spread][j] for j in index], capsize=3, **style)
        else:
            ax.plot(place, value, **style)
    if panel.get("floor") is not None:
        ax.axhline(panel["floor"], color="black", linewidth=0.8, linestyle=":",
                   label="floor: real data")
    ax.set(xlabel=panel.get("xlabel", x), ylabel=panel["ylabel"], title=panel.get("title"),
           xscale=panel.get("xscale", "log"), yscale=panel.get("yscale", "log"),
           xlim=panel.get("xlim"), ylim=panel.get("ylim"))
    ax.grid(alpha=0.3)
    if panel.get("legend", True):
        beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(labels) > 6 else {}
        ax.legend(fontsize=8, **beside)


def mean_and_sd(values):
    """The mean and the standard deviation over seeds of a list of numbers; 0 for a single one."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0
