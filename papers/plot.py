"""papers/plot.py: what the papers' commands share: options, trained runs, tables, pictures.

A command is a function of its arguments.  It computes rows and calls `show`, which prints a table,
writes papers/results/PAPER-COMMAND.csv and, where matplotlib is installed, draws the .png.
"""

import csv
import hashlib
import inspect
import itertools
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

import evaluate
import train
from evaluate import BadInput, progress
from losses import stf_target

RESULTS = str(Path(__file__).parent / "results")
AXES = {            # what columns have if they are x
    "sigma": dict(xlabel="noise level sigma"),
    "t": dict(xlabel="time step t", xscale="linear"),
    "T": dict(xlabel="sampling steps T"),
    "step": dict(xlabel="training steps", xscale="linear")}


# ---- Command line --------------------------------------------------------------------------------

def main(paper, commands, argv=None):
    """The command line of a paper's file: commands {name: (function, {argument: default}, passed)}.

    The type of an option is that of its default; a list takes several values; None is a path.  A
    function gets args.paper, args.command and args.options, a dict for train.Options, as well.
    passed: the names of train.py's options that have an effect on the command.
    """
    p = evaluate.Parser(prog=f"python -m papers.{paper}", description="Figures and tables of the "
                        "paper.  Distances are Frechet distances of samples to the data: less is "
                        "better.  Other options are train.py's, for the runs.")
    known = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, arguments, _) in commands.items():
        own = known.add_parser(name, help=function.__doc__.split("\n")[0],
                               description=inspect.cleandoc(function.__doc__))
        for argument, default in (arguments | dict(seed=0, out=RESULTS)).items():
            several = isinstance(default, (list, tuple))
            values = default if several else [default]
            kind, shown = str, "the command's own"
            if values not in ([], [None]):
                kind, shown = type(values[0]), " ".join(map(str, values))
            if kind is int:
                kind = evaluate.number(int, min(1, *values))
            own.add_argument(f"--{argument}", default=default, nargs="+" if several else None,
                             type=kind, metavar=argument[0].upper(), help=f"default: {shown}")

    def command():
        args, rest = p.parse_known_args(argv)
        args.paper, args.options = paper, vars(train.parser().parse_args(rest))
        function, _, passed = commands[args.command]
        if getattr(args, "run", None) or getattr(args, "runs", None):        # they are trained
            passed = {"device", "fid_num"} & set(passed)
        strange = [train.word(name) for name in args.options if name not in passed]
        if strange:
            raise BadInput(f"{', '.join(strange)}: no effect on this command; leave it out")
        os.makedirs(args.out, exist_ok=True)
        function(args)
    return evaluate.status(f"papers.{paper}", command, "choose a smaller --batch or --num")


def options_but(*names):
    """The names of train.py's options but for these, which a command sets or does not use."""
    return [name for name in train.CHOSEN if name not in names]


# ---- Runs ----------------------------------------------------------------------------------------

def trained(options):
    """The folder of a run with these options, trained now, or kept from an earlier command."""
    options = dict(data="digits") | options
    own = {name: value for name, value in options.items() if name not in ("fid_num", "device")}
    key = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:10]
    name = "-".join(str(options.get(n, "")) for n in ("data", "loss", "schedule", "weight", "seed"))
    folder = f"plots/runs/{name.replace('/', '_')}-{key}"
    if Path(folder, "done").is_file():
        return folder
    print(f"training {folder}", flush=True)
    if evaluate.checkpoints(folder):
        train.run(train.resumed(folder, {}), folder, brief=True)
    else:
        train.run(train.Options(**options | dict(out=folder)), brief=True)
    Path(folder, "done").touch()
    return folder


def judged(args, variants):
    """Runs of the options {name: options}, args.seeds of each, as {name: folders}; their Judge."""
    runs = {name: [] for name in variants}
    seeds = range(args.seed, args.seed + args.seeds)
    for name, seed in progress("runs", list(itertools.product(variants, seeds))):
        runs[name].append(trained(variants[name] | dict(seed=seed)))
    return runs, Judge(args, runs[name][0])


def opened(args, run):
    """The denoiser of a run, or of one of its checkpoints, and its options."""
    denoiser, options = evaluate.load_run(run, args.options.get("device"))
    return denoiser.requires_grad_(False), options


def compared(args, variants):
    """The runs that a command compares: args.runs, or those of variants, {name: options}.

    Returns {name: denoise(x, sigma)} for held-out images x0, these x0, their labels, and the
    options of the first run.
    """
    folders = {folder: folder for folder in args.runs}
    if not folders:
        folders = {name: trained(own | dict(seed=args.seed)) for name, own in variants.items()}
    runs = {name: opened(args, folder) for name, folder in folders.items()}
    options = next(iter(runs.values()))[1]
    for name, (_, own) in runs.items():
        if (own.fingerprint, own.classes) != (options.fingerprint, options.classes):
            raise BadInput(f"{name} was trained on other data or classes than the first run; "
                           "name runs that were trained on the same")
    x0, labels = evaluate.held_out(evaluate.run_data(options), options, args.num)
    denoisers = {name: partial(network, labels=labels) for name, (network, _) in runs.items()}
    return denoisers, x0, labels, options


class Judge:
    """The distance of samples of runs to the data of one of them, run.  For `show` it has the axes,
    and `about`, the end of a title."""

    def __init__(self, args, run):
        _, options = opened(args, run)
        self.args, self.options, self.num = args, options, args.options.get("fid_num", 128)
        self.features = evaluate.extractor(options.fid_features, options.shape, options.data_dir,
                                           options.device)
        self.real = evaluate.real_statistics(evaluate.run_data(options), self.num, self.features)
        label = f"Frechet distance of {self.num} samples, by {self.features[0]}"
        self.axes = dict(ylabel=label, floor=self.real["floor"], marker="o")
        self.about = f"{options.data}, {options.steps} training steps"

    def __call__(self, runs, sampler, steps, **how):
        """Over the runs, folders or checkpoints: the distance's mean and standard deviation; the
        number of function evaluations (NFE), calls of D for a sample."""
        distances, calls = [], []
        for run in runs:
            denoiser, options = opened(self.args, run)
            counted = evaluate.Counted(denoiser)
            distances.append(evaluate.run_distance(
                counted, options, range(self.num), self.features, self.real, sampler=sampler,
                steps=steps, **how))
            calls.append(evaluate.total(torch.tensor(float(counted.rows))).item() / self.num)
        return *mean_and_sd(distances), mean_and_sd(calls)[0]

    def cells(self, runs, sampler, steps, **how):
        """{name: mean, "sd name": standard deviation}, cells of a row; runs: {name: folders}."""
        cells = {}
        for name, own in runs.items():
            cells[name], cells[f"sd {name}"], _ = self(own, sampler, steps, **how)
        return cells


def mean_and_sd(values):
    """The mean and the standard deviation over seeds of a list of numbers; None for one seed."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else None


# ---- Posterior means, and levels in training -----------------------------------------------------

def data_mean(options, labels):
    """denoise(x, sigma) = E[x0 | x] over all rows of a run's data, or those of x's classes."""
    data = evaluate.run_data(options)
    classes = None if labels is None else torch.from_numpy(data.labels).to(labels.device)
    return partial(stf_target, reference=torch.from_numpy(data.x), labels=labels,
                   reference_labels=classes)


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

def rows_of(columns):
    """The rows of a table out of {column: (n,) numbers}; NaN gives an empty cell."""
    table = torch.stack([torch.as_tensor(column) for column in columns.values()], 1).tolist()
    table = [[None if math.isnan(cell) else cell for cell in row] for row in table]
    return [dict(zip(columns, row)) for row in table]


def show(args, title, rows, *panels, **shared):
    """A result as a table on the terminal, as a CSV, and, with matplotlib, as a picture.

    title: what is compared, on which data.  rows: {column: number, word or None}, all with the same
    columns.  panels: the arguments of `axes` for each set of axes; shared: those for all of them.
    """
    print(f"\n{title}\n")
    step = math.ceil(len(rows) / 30)
    table = [[text(cell, 4) for cell in row.values()] for row in [*rows[:-1:step], rows[-1]]]
    table.insert(0, list(rows[0]))
    width = [max(11, 2 + max(map(len, column))) for column in zip(*table)]
    for row in table:
        print("".join(f"{cell:>{w}}" for cell, w in zip(row, width)))
    if "floor" in shared:
        print(f"\nas many real samples: {shared['floor']:.4g}")
    path = f"{args.out}/{args.paper}-{args.command}"
    with open(f"{path}.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([text(c, 6) for c in row.values()] for row in rows)])
    print(f"\n{path}.csv" + (f" has all {len(rows)} rows" if step > 1 else ""))
    draw(f"{path}.png", title, rows, *panels, **shared)


def text(cell, digits):
    """A number with so many significant digits; words as they are; nothing for None."""
    return "" if cell is None else f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def draw(path, title, rows, *panels, **shared):
    """The panels as a PNG, at most three side by side, if matplotlib is installed."""
    try:
        from matplotlib import figure, ticker
    except ImportError:
        print("(with matplotlib installed, a picture of this table would be drawn)")
        return
    wide, high = min(len(panels), 3), math.ceil(len(panels) / 3)
    page = figure.Figure(figsize=(max(9, 5.2 * wide), 4.2 * high))
    for i, panel in enumerate(panels):
        ax = page.add_subplot(high, wide, i + 1)
        given = shared | panel
        x = given.pop("x", next(iter(rows[0])))
        axes(ax, rows, x, **AXES.get(x, {}) | given)
        for axis, limits in (ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()):
            if axis.get_scale() == "log":                                      # 20, not 2 x 10^1
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
                axis.set_minor_formatter("{x:g}" if max(limits) < 100 * min(limits) else "")
    words = [ax.get_legend_handles_labels()[1] for ax in page.axes]
    for ax, own, right in zip(page.axes, words, [*words[1:], None]):
        if len(own) > 1 and own != right:                       # one legend for the same curves
            beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(ax.containers) > 4 else {}
            ax.legend(fontsize=8, **beside)
    page.suptitle(title)
    page.tight_layout()
    page.savefig(path, dpi=90)
    print(path)


def axes(ax, rows, x, y, where=None, by=None, floor=None, marker=None, xscale="log", yscale="log",
         **words):
    """One set of axes, with a curve for each of the columns y, a list or {column: label}.

    x: a column; if not given, the first.  where: a column and its value in the rows to be drawn.
    by: a column; each of its values has a curve.  A column "sd COLUMN" has standard deviations.
    floor: what real data get.  words: what matplotlib's `set` takes.
    """
    names = y if isinstance(y, dict) else {name: name for name in y}
    curves = {}
    for name, label in names.items():
        for row in rows:
            if by:
                kind = row[by] if isinstance(row[by], str) else f"{by} = {row[by]:g}"
                label = f"{names[name]}, {kind}" if len(names) > 1 else kind
            wanted = where is None or row[where[0]] == where[1]
            if wanted and row[x] is not None and row[name] is not None:
                curves.setdefault((name, label), []).append(row)
    ax.set(xscale=xscale, yscale=yscale)                       # later would undo words on an axis
    for i, ((name, label), own) in enumerate(curves.items()):
        sd = [row.get(f"sd {name}") for row in own]
        style = "none" if isinstance(own[0][x], str) else ["-", "--", "-.", ":"][i % 4]
        ax.errorbar([row[x] for row in own], [row[name] for row in own],
                    None if None in sd else sd, capsize=3, label=label, linestyle=style,
                    linewidth=3 - 2 * i / len(curves), marker=marker)
    if floor is not None:
        ax.axhline(floor, color="black", linewidth=0.8, linestyle=":",
                   label=f"floor: real data, {floor:.3g}")
    ax.set(**words)
    ax.grid(alpha=0.3)


def pictures(args, ending, panels, names):
    """A second picture, of images: evaluate.save_pictures of panels with a row for each name."""
    path = f"{args.out}/{args.paper}-{args.command}-{ending}.png"
    evaluate.save_pictures(path, panels, names)
    print(path)
