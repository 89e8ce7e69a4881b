"""papers.py: the papers' figures, each a command of evaluate.py.

    python evaluate.py weights              all weightings over t, and their share (DB figs. 2, 5)

Each prints a table, writes NAME.csv and, where matplotlib is installed, draws NAME.png.
"""

import csv
import math
import os

import torch
from PIL import Image

from datasets import attempt
from losses import WEIGHTS
from runs import number
from schedules import DDPM


# ---- Table, CSV, picture -------------------------------------------------------------------------

def show(args, columns, rows, panels, title=None, most=24):
    """A figure's numbers as a table on the terminal and NAME.csv, its curves as NAME.png.

    panels: one dict for each set of axes: y (names of columns), x (one name; the first column if
    absent), ylabel, title, xscale and yscale ("log" if absent), style (matplotlib's, "-").  Of a
    column "kind:label" a panel shows the label.  Prints at most `most` evenly spaced rows of each
    panel; the CSV has them all.
    """
    where = os.path.join(args.out, args.command)
    attempt(args.out, "choose another --out", os.makedirs, args.out, exist_ok=True)
    with open(f"{where}.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *([text(cell, 6) for cell in row] for row in rows)])
    step = math.ceil(len(rows) / most)
    for panel in panels:
        names = [panel.get("x", columns[0]), *panel["y"]]
        labels = [name.split(":")[-1] for name in names]
        width = [max(11, len(label) + 2) for label in labels]
        print(panel.get("title", panel["ylabel"]))
        print("".join(f"{label:>{w}}" for label, w in zip(labels, width)))
        for row in [*rows[:-1:step], rows[-1]]:
            cells = (row[columns.index(name)] for name in names)
            print("".join(f"{text(cell, 4):>{w}}" for cell, w in zip(cells, width)))
        print()
    print(f"{where}.csv" + (f" has all {len(rows)} rows" if step > 1 else ""))
    draw(f"{where}.png", columns, rows, panels, title)


def text(cell, digits):
    """A number with so many significant digits; words as they are."""
    return f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def draw(path, columns, rows, panels, title):
    """The panels side by side as a PNG, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False)
    for ax, panel in zip(axes[0], panels):
        x = panel.get("x", columns[0])
        for name in panel["y"]:
            ax.plot(*([row[columns.index(column)] for row in rows] for column in (x, name)),
                    panel.get("style", "-"), label=name.split(":")[-1])
        ax.set(xlabel=x, ylabel=panel["ylabel"], title=panel.get("title"),
               xscale=panel.get("xscale", "log"), yscale=panel.get("yscale", "log"))
        ax.grid(alpha=0.3), ax.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    Image.open(path).quantize(64).save(path, optimize=True)        # a third of the bytes
    print(path)


# ---- Weights -------------------------------------------------------------------------------------

def weights(args):
    """Each weighting over DDPM's t: on |eps_hat - eps|^2, on |x0_hat - x0|^2, and the share of the
    total that falls to the levels up to t (DB figs. 2, 5)."""
    sigma = DDPM().levels.sort().values                                           # (T,)
    x0 = {name: weight(sigma) for name, weight in WEIGHTS.items()}
    eps = {name: weight * sigma ** 2 for name, weight in x0.items()}
    share = {name: weight.cumsum(0) / weight.sum() for name, weight in eps.items()}
    kinds = {"eps": eps, "x0": x0, "share": share}
    columns = ["t", "sigma", *(f"{kind}:{name}" for kind in kinds for name in WEIGHTS)]
    rows = torch.stack([sigma, *(kinds[k][name] for k in kinds for name in WEIGHTS)], 1).tolist()
    show(args, columns, [[t, *row] for t, row in enumerate(rows, 1)], [
        dict(y=[f"eps:{name}" for name in WEIGHTS], ylabel="weight on |eps_hat - eps|^2",
             xscale="linear"),
        dict(y=[f"x0:{name}" for name in WEIGHTS], ylabel="weight on |x0_hat - x0|^2",
             xscale="linear"),
        dict(y=[f"share:{name}" for name in WEIGHTS], ylabel="share of the eps weight up to t",
             xscale="linear", yscale="linear")])


# ---- Command line --------------------------------------------------------------------------------

ARGUMENTS = {      # what a figure may be asked for; its default is the figure's own
    "run": dict(nargs="?", metavar="RUN", help="folder that train.py made (default: none)"),
    "--data": dict(help="a built-in set or a path, as train.py's"),
    "--data-dir": dict(help="where downloads and caches lie"),
    "--size": dict(type=number(int, 1), help="crop and resize images to SIZE x SIZE"),
    "--num": dict(type=number(int, 1), help="samples measured"),
    "--n": dict(type=number(int, 1), nargs="+", help="sizes of STF's reference"),
    "--levels": dict(type=number(float, 1e-6), nargs="+", help="noise levels sigma"),
    "--seed": dict(type=number(int, 0, 2 ** 32 - 1), help="of every draw"),
    "--device": dict(help="none: cuda where there is one, else cpu"),
    "--out": dict(help="folder of the CSV and the PNG"),
}
COMMON = {"--seed": 0, "--out": "plots"}

FIGURES = {        # name: (function, help, its arguments and their defaults, beside COMMON)
    "weights": (weights, "all weightings over t, their share of the total", {}),
}


def add_commands(commands):
    """The figures as sub-commands of an argparse parser."""
    for name, (_, text, arguments) in FIGURES.items():
        command = commands.add_parser(name, help=text, description=text)
        for argument, default in (arguments | COMMON).items():
            how = dict(ARGUMENTS[argument])
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            if argument != "run":
                how["help"] += f" (default: {str(shown).lower()})"
            command.add_argument(argument, default=default, **how)
