"""papers/plot.py: what the papers' commands share: options, trained runs, tables, pictures.

    python -m papers.debias table --steps 750           from the repository's root

A command is a function of its arguments.  It computes rows and calls `show`, which prints a table,
writes papers/results/PAPER-COMMAND.csv and, where matplotlib is installed, draws the .png.
Options that a command does not know go to train.py's runs: on a GPU, --data cifar10 --steps N
--fid-num 50000 comes near the paper's own table.
"""

import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

import evaluate
import train
from evaluate import BadInput, Progress
from losses import stf_target

RESULTS = str(Path(__file__).parent / "results")
HELP = {"seed": "the first seed", "seeds": "number of seeds", "out": "folder of the results",
        "n": "numbers of references", "num": "number of samples or of images",
        "run": "a folder that train.py made", "runs": "folders that train.py made",
        "T": "numbers of sampling steps", "N": "numbers of time steps", "levels": "noise levels",
        "head": "training steps of a second head", "training": "training steps",
        "early": "sampling steps for the weights of earlier training steps",
        "start": "time step at which sampling starts", "batch": "samples in a mini-batch",
        "other": "vp or ve, whose sampler is changed into EDM's", "rtol": "RK45's tolerance",
        "repeats": "draws of the references", "orders": "orders of the Taylor polynomial",
        "lam": "weights of SA's second term", "K": "numbers of noise levels in SA's loss",
        "pc": "steps of PC", "ddim": "steps of DDIM", "heun": "steps of Heun's method"}


# ---- Command line --------------------------------------------------------------------------------

def main(paper, commands, argv=None):
    """The command line of a paper's file.

    commands: {name: (function, {argument: default})}.  The function gets the arguments as
    attributes, with args.paper, args.command and args.options, a dict for train.Options.
    """
    p = evaluate.Parser(prog=f"python -m papers.{paper}", description="Figures and tables of the "
                        "paper.  Options that a command does not know go to train.py's runs.")
    known = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, arguments) in commands.items():
        command = known.add_parser(name, help=function.__doc__.split("\n")[0],
                                   description=inspect.cleandoc(function.__doc__))
        for argument, default in (arguments | dict(seed=0, out=RESULTS)).items():
            add_argument(command, argument, default)
    try:
        args, rest = p.parse_known_args(argv)
        args.paper, args.options = paper, vars(train.parser().parse_args(rest))
        os.makedirs(args.out, exist_ok=True)
        commands[args.command][0](args)
        return 0
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"papers.{paper}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npapers.{paper}: stopped; finished runs are kept", file=sys.stderr)
        return 130


def add_argument(command, name, default):
    """An option whose type is that of its default; a list takes several values; None is a path."""
    several = isinstance(default, (list, tuple))
    example = default[0] if several and default else "" if several or default is None else default
    shown = " ".join(map(str, default)) if several else default
    if name in ("run", "runs"):
        shown = "the command's own, which it trains"
    text = f"{HELP.get(name, name)} (default: {shown})"
    command.add_argument(f"--{name}", type=type(example), nargs="+" if several else None,
                         default=default, metavar=name[0].upper(), help=text)


def progress(what, items):
    """The items one by one; stderr is told how many are done."""
    told = Progress(what, len(items))
    for i, item in enumerate(items):
        yield item
        told(i + 1)


# ---- Runs ----------------------------------------------------------------------------------------

def trained(given, **own):
    """The folder of a run with these options, trained now, or kept from an earlier command.

    given: options for all runs of a command; own: those of this run, which win.
    """
    options = dict(data="digits") | given | own
    key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:10]
    name = "-".join(str(options.get(n, "")) for n in ("data", "loss", "schedule", "weight", "seed"))
    folder = f"plots/runs/{name.replace('/', '_')}-{key}"
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


def compared(args, variants):
    """The runs that a command compares, args.runs or those of variants, {name: options}.

    Returns {name: denoise(x, sigma)} for held-out images x0, these x0, their labels, and the
    options of the first run.
    """
    folders = {folder: folder for folder in args.runs}
    if not folders:
        folders = {name: trained(given, seed=args.seed) for name, given in variants.items()}
    runs = [evaluate.load_run(folder, args.options.get("device")) for folder in folders.values()]
    options = runs[0][1]
    for folder, (_, own) in zip(folders.values(), runs):
        if (own.fingerprint, own.classes) != (options.fingerprint, options.classes):
            raise BadInput(f"{folder} was trained on other data or classes than the first run; "
                           "name runs that were trained on the same")
    x0, labels = evaluate.held_out(evaluate.run_data(options), options, args.num)
    denoisers = {name: partial(network, labels=labels) for name, (network, _) in zip(folders, runs)}
    return denoisers, x0, labels, options


class Judge:
    """A run's denoiser, and the distance of its samples to its data.

    run: a folder, or one of its checkpoints.  like: a Judge of a run on the same data.  Its axes
    are for `show`.
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
        label = f"Frechet distance of {self.num} samples, by {self.features[0]}"
        self.axes = dict(ylabel=label, floor=self.floor, marker="o")

    def __call__(self, sampler, steps, **how):
        """The distance, and the number of function evaluations (NFE): calls of D for a sample."""
        counted = evaluate.Counted(self.denoiser)
        distance = evaluate.run_distance(counted, self.options, self.num, self.features, self.real,
                                         sampler=sampler, steps=steps, **how)
        return distance, counted.rows / self.num


def distances(args, variants, draws):
    """How far samples of runs are from the data: {case: {name: (mean, sd, NFE)}} over the seeds.

    variants: {name: options of its runs}, trained with args.seeds seeds.  draws(name, folder):
    yields (case, the run or checkpoint to sample, Judge's arguments).  Also returns the last Judge.
    """
    found, judge = {}, None
    seeds = range(args.seed, args.seed + args.seeds)
    for name, seed in progress("runs", list(itertools.product(variants, seeds))):
        folder = trained(variants[name], seed=seed)
        for case, path, how in draws(name, folder):
            judge = Judge(args, path, judge)
            found.setdefault(case, {}).setdefault(name, []).append(judge(**how))
    for values in found.values():
        for name, pairs in values.items():
            distance, calls = zip(*pairs)
            values[name] = *mean_and_sd(distance), mean_and_sd(calls)[0]
    return found, judge


def mean_and_sd(values):
    """The mean and the standard deviation over seeds of a list of numbers; 0 for a single one."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def with_sd(names):
    """The columns of means and standard deviations: "name", "sd name" for each of the names."""
    return [column for name in names for column in (name, f"sd {name}")]


def cells(values, names):
    """What stands in these columns: values is {name: (mean, sd, ...)}."""
    return [cell for name in names for cell in values[name][:2]]


# ---- Data and noise ------------------------------------------------------------------------------

def mixture_mean(x, sigma, means, s):
    """E[x0 | x] where x0 is N(m_k, s^2 I), and each of the means m_k is as likely as any other.

        (s^2 x + sigma^2 sum_k p_k m_k)/(s^2 + sigma^2)

    p_k = softmax_k(-|x - m_k|^2/(2 (s^2 + sigma^2))): stf_target of references m_k has the sum.
    x (B, d), sigma (B, 1), means (K, d) -> (B, d).
    """
    total = s ** 2 + sigma ** 2
    return (s ** 2 * x + sigma ** 2 * stf_target(x, total.sqrt(), means)) / total


def log_density(schedule, levels):
    """The density of ln sigma in training, du/d ln sigma of training_sigma(u): (L,) -> an array."""
    u = torch.special.ndtr(torch.linspace(-6, 6, 20_001, dtype=torch.float64))
    z = schedule.training_sigma(u).log()
    return np.interp(levels.log(), z, np.gradient(u, z), left=0, right=0)


# ---- Table, CSV, picture -------------------------------------------------------------------------

def show(args, columns, rows, panels, title, **shared):
    """A result as a table on the terminal, as a CSV, and, with matplotlib, as a picture.

    rows: lists of numbers and words, one for each of columns.  panels: one dict for each set of
    axes, see `axes`; shared: what holds for all of them.  title: what is compared, on which data.
    """
    print(f"\n{title}\n")
    step = math.ceil(len(rows) / 30)
    table = [columns] + [[text(cell, 4) for cell in row] for row in [*rows[:-1:step], rows[-1]]]
    width = [max(11, 2 + max(map(len, column))) for column in zip(*table)]
    for row in table:
        print("".join(f"{cell:>{w}}" for cell, w in zip(row, width)))
    if "floor" in shared:
        print(f"\nas many real samples: {shared['floor']:.4g}")
    path = f"{args.out}/{args.paper}-{args.command}"
    with open(f"{path}.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *([text(c, 6) for c in row] for row in rows)])
    print(f"\n{path}.csv" + (f" has all {len(rows)} rows" if step > 1 else ""))
    draw(f"{path}.png", columns, rows, panels, title, **shared)


def text(cell, digits):
    """A number with so many significant digits; words as they are; nothing for None."""
    return "" if cell is None else f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def draw(path, columns, rows, panels, title, **shared):
    """The panels side by side as a PNG, if matplotlib is installed."""
    try:
        from matplotlib import figure, ticker
    except ImportError:
        print("(with matplotlib installed, a picture of this table would be drawn)")
        return
    wide = len(panels) if len(panels) < 5 else math.ceil(len(panels) / 2)
    high = math.ceil(len(panels) / wide)
    page = figure.Figure(figsize=(5.2 * wide, 4.2 * high) if len(panels) > 1 else (9, 5))
    for i, panel in enumerate(panels):
        ax = page.add_subplot(high, wide, i + 1)
        axes(ax, columns, rows, shared | panel)
        for axis, limits in (ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()):
            if axis.get_scale() == "log":                                      # 20, not 2 x 10^1
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
                axis.set_minor_formatter("{x:g}" if max(limits) < 100 * min(limits) else "")
    for ax, right in zip(page.axes, page.axes[1:]):             # one legend for the same curves
        if ax.get_legend() and words(ax) == words(right):
            ax.get_legend().remove()
    page.suptitle(title)
    page.tight_layout()
    page.savefig(path, dpi=90)
    print(path)


def words(ax):
    """The words of the legend that a set of axes would have."""
    return ax.get_legend_handles_labels()[1]


def axes(ax, columns, rows, panel):
    """One set of axes.  panel: y, columns, as a list or {column: label}; where wanted x (a column;
    else the first), where (a column and its value in the rows of this panel), by (a column: a curve
    for each of its values), spread ({column: that of its standard deviations}, if not "sd COLUMN"),
    floor (a number: what real data get), legend (False: none), marker, and what matplotlib's `set`
    has."""
    panel = dict(x=columns[0], xscale="log", yscale="log") | panel
    names = panel["y"] if isinstance(panel["y"], dict) else {name: name for name in panel["y"]}
    rows = [dict(zip(columns, row)) for row in rows]
    if "where" in panel:
        rows = [row for row in rows if row[panel["where"][0]] == panel["where"][1]]
    ax.set(xscale=panel["xscale"], yscale=panel["yscale"])     # later would undo words on an axis
    by, curves = panel.get("by"), {}
    for name, label in names.items():
        for row in rows:
            if by:
                kind = row[by] if isinstance(row[by], str) else f"{by} = {row[by]:g}"
                label = f"{names[name]}, {kind}" if len(names) > 1 else kind
            if row[panel["x"]] is not None and row[name] is not None:
                curves.setdefault((name, label), []).append(row)
    for i, ((name, label), own) in enumerate(curves.items()):
        x, y = [row[panel["x"]] for row in own], [row[name] for row in own]
        spread = panel.get("spread", {}).get(name, f"sd {name}")
        ax.errorbar(x, y, [row[spread] for row in own] if spread in columns else None, capsize=3,
                    label=label, linestyle=["-", "--", "-.", ":"][i % 4],
                    linewidth=3 - 2 * i / len(curves), marker=panel.get("marker"))
    if "floor" in panel:
        ax.axhline(panel["floor"], color="black", linewidth=0.8, linestyle=":",
                   label=f"floor: real data, {panel['floor']:.3g}")
    known = "xlabel", "ylabel", "title", "xlim", "ylim"
    ax.set(**{name: panel[name] for name in known if name in panel})
    ax.grid(alpha=0.3)
    if panel.get("legend", len(curves) + ("floor" in panel) > 1):
        beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(curves) > 4 else {}
        ax.legend(fontsize=8, **beside)


def pictures(args, ending, panels, names):
    """A second picture, of images: evaluate.save_pictures of panels with a row for each name."""
    path = f"{args.out}/{args.paper}-{args.command}-{ending}.png"
    evaluate.save_pictures(path, panels, names)
    print(path)
