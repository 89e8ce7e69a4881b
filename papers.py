"""papers.py: the papers' figures, each a command of evaluate.py; FIGURES, at the end, lists them.

Each prints a table, writes NAME.csv and, where matplotlib is installed, draws NAME.png.
"""

import csv
import math
import os
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from datasets import BadInput, attempt, load_data, load_rows, progress
from losses import (WEIGHTS, antithetic_loss, dsm_loss, mean_correction, measure_gamma, sa_tau,
                    stf_atoms, stf_loss, stf_target, stf_taylor_terms, stf_weights, taylor_terms)
from networks import MLP, Denoiser
from runs import (even, load_run, loss_weight, number, pick_device, run_data, save_pictures,
                  to_uint8)
from samplers import ddpm, euler, heun, seeded_noise
from schedules import DDPM, EDM, VE, VP


# ---- Table, CSV, picture -------------------------------------------------------------------------

def show(args, columns, rows, panels, most=24):
    """A figure's numbers as a table on the terminal and NAME.csv, its curves as NAME.png.

    panels: one dict for each set of axes: y (names of columns) and ylabel; where wanted, x (a name;
    else the first column), title, xscale ("linear" over t, else "log"), yscale ("log"), bottom (of
    y), xlim, style (matplotlib's), legend (True).  Of a column "kind:label" a panel shows the
    label.  Prints at most `most` evenly spaced rows of each panel; the CSV has all.
    """
    where = save_csv(args, columns, rows)
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
    of = getattr(args, "run", None) or getattr(args, "data", None)         # a run's or a set's
    draw(f"{where}.png", columns, rows, panels, of)


def save_csv(args, columns, rows):
    """Writes the folder's NAME.csv; returns its path up to the dot."""
    where, cure = os.path.join(args.out, args.command), "choose another --out"
    attempt(args.out, cure, os.makedirs, args.out, exist_ok=True)
    with attempt(f"{where}.csv", cure, open, f"{where}.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *([text(c, 6) for c in row] for row in rows)])
    return where


def text(cell, digits):
    """A number with so many significant digits; words as they are."""
    return f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def draw(path, columns, rows, panels, title=None):
    """The panels side by side as a PNG, where matplotlib is installed."""
    try:
        from matplotlib import figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    wide = len(panels) if len(panels) < 5 else 3
    high = math.ceil(len(panels) / wide)
    page, cells = figure.Figure(figsize=(4.8 * wide, 3.8 * high)), dict(zip(columns, zip(*rows)))
    for ax, panel in zip(page.subplots(high, wide, squeeze=False).flat, panels):
        x = panel.get("x", columns[0])
        xlabel = x.split(":")[-1]
        for i, name in enumerate(panel["y"]):      # dashed, and thinner: all that coincide are seen
            ax.plot(cells[x], cells[name], panel.get("style", ["-", "--", "-.", ":"][i % 4]),
                    linewidth=1.5 if "style" in panel else 3 - 2 * i / len(panel["y"]),
                    label=name.split(":")[-1])
        ax.set(xlabel=xlabel, ylabel=panel["ylabel"], title=panel.get("title"),
               xscale=panel.get("xscale", "linear" if xlabel == "t" else "log"),
               yscale=panel.get("yscale", "log"), xlim=panel.get("xlim"))
        ax.set_ylim(bottom=panel.get("bottom"))
        ax.grid(alpha=0.3)
        if panel.get("legend", True):
            beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(panel["y"]) > 6 else {}
            ax.legend(fontsize=8, **beside)
    page.suptitle(title)
    page.tight_layout()
    page.savefig(path, dpi=100)
    Image.open(path).quantize(64).save(path, optimize=True)        # a third of the bytes
    print(path)


# ---- Weights -------------------------------------------------------------------------------------

def weights(args):
    """Each weighting over DDPM's t: on |eps_hat - eps|^2, on |x0_hat - x0|^2, and the share of the
    total that falls to the levels up to t (DB figs. 2, 5)."""
    sigma = DDPM().levels[:, None]                                                # (T, 1)
    x0 = torch.cat([weight(sigma) for weight in WEIGHTS.values()], 1)             # (T, W)
    eps = x0 * sigma ** 2
    kinds = {"eps": "weight on |eps_hat - eps|^2", "x0": "weight on |x0_hat - x0|^2",
             "share": "share of the eps weight up to t"}
    columns = ["t", "sigma", *(f"{kind}:{name}" for kind in kinds for name in WEIGHTS)]
    rows = torch.cat([sigma, eps, x0, eps.cumsum(0) / eps.sum(0)], 1).tolist()
    show(args, columns, [[t, *row] for t, row in enumerate(rows, 1)], [
        dict(y=[f"{kind}:{name}" for name in WEIGHTS], ylabel=label,
             yscale="linear" if kind == "share" else "log") for kind, label in kinds.items()])


# ---- Variance and effective sample size ----------------------------------------------------------

def some_rows(args, count):
    """At most `count` rows of args.data, in random order; the set; the generator that drew them."""
    data, g = load_data(args.data, args.data_dir, args.size), torch.Generator()
    rows = torch.randperm(len(data.x), generator=g.manual_seed(args.seed))[:count]
    return load_rows(torch.from_numpy(data.x), rows, None, "cpu"), data, g


def posterior(x, sigma, rows):
    """E[x0 | x], and how far p(x0 | x) is from p0, for p0 the uniform law on N rows.

        D_f = sum_k w_k f(1/(N w_k)),    f(y) = (1/y - 1)^2 (y < 1.5), 8y/27 - 1/3 (y >= 1.5)

    (STF Theorem 2; section 6.1 swaps the two laws): 0 where x tells nothing, about (N - 1)^2 where
    it tells the row.
    x (B, ...), sigma (B, 1, ..., 1), rows (N, ...) -> (B, d), (B,), both float64.
    """
    w, N = stf_weights(x, sigma, rows), len(rows)                                 # (B, N)
    f = torch.where(N * w > 2 / 3, w * (N * w - 1) ** 2, 8 / 27 / N - w / 3)
    return w @ rows.flatten(1).double(), f.sum(1)


def two_gaussians_mean(x, sigma, m=0.48, s=0.14):
    """E[x0 | x] for the law that datasets.points draws from: N(m, s^2) or N(-m, s^2), all d alike.

        (s^2 x + sigma^2 m (2p - 1))/(s^2 + sigma^2),   2p - 1 = tanh(m sum(x)/(s^2 + sigma^2))

    with p the probability of the first.  x (B, d), sigma (B, 1) -> (B, d).
    """
    total = s ** 2 + sigma ** 2
    return (s ** 2 * x + sigma ** 2 * m * torch.tanh(m * x.sum(1, keepdim=True) / total)) / total


@torch.no_grad()
def target_variance(x0, noise, levels, sizes, pool, exact, g):
    """V_STF = E_x Tr Cov(stf_target) by reference size and level (STF section 5.2); D (sec. 6.1).

    The target's mean given x is E[x0 | x] for every n (see stf_target), so V is its mean square
    distance from that.  Where x = x0 + sigma noise, x0 is a draw of p(x0 | x): the first reference;
    the others come from the rows of pool, anew for each x0.  n = 1 is V_DSM (section 3).
    For D-form targets; / sigma^2 gives that of noise targets, / sigma^4 that of scores.

    x0, noise (m, ...), levels (L,), pool (N, ...), exact(x, sigma) -> E[x0 | x] (L, d), D (L,);
    returns (m, len(sizes), L) and (m, L), to be averaged over x0.
    """
    sigma, V, D = levels.view(-1, *[1] * (x0.ndim - 1)), [], []                   # (L, 1, ..., 1)
    for i in range(len(x0)):
        x = x0[i] + sigma * noise[i]                                              # (L, ...)
        mean, divergence = exact(x, sigma)
        others = pool[torch.randint(len(pool), (max(sizes) - 1,), generator=g)]
        reference = torch.cat([x0[i:i + 1], others])                              # (n, ...)
        errors = [stf_target(x, sigma, reference[:n]).flatten(1) - mean for n in sizes]
        V.append(torch.stack(errors).square().sum(2))
        D.append(divergence)
    return torch.stack(V), torch.stack(D)


def variance(args):
    """V_DSM, V_STF, n V_STF/V_DSM, and D beside V_DSM of noise targets, by sigma (STF figs. 2, 3).

    p0 is uniform on --num rows, or, for the two Gaussians, their law; but D is over the rows there,
    too: over the law it is infinite up to sigma = sqrt(3) 0.14.  Once p(x0 | x) is like p0, V_STF
    is V_DSM/n (Theorem 2: about V_DSM/(n - 1)).  The paper scales V_DSM and D to a maximum of 1.
    """
    law = args.data in ("two-gaussians", "two-gaussians-64d")
    pool, _, g = some_rows(args, None if law else args.num)
    pool = pool.double()                                                          # (N, ...)
    rows = pool[:args.num]

    def exact(x, sigma):
        mean, divergence = posterior(x, sigma, rows)
        return two_gaussians_mean(x, sigma) if law else mean, divergence

    levels = torch.tensor(sorted(args.levels), dtype=torch.float64)
    noise = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    V, D = target_variance(rows, noise, levels, [1, *args.n], pool, exact, g)
    V = V.mean(0)                                                                 # (1 + S, L)
    floor = 1e-3 * V.max().item()                                    # below it a few rare x decide
    left = torch.where(V[:1] > floor, V[1:] / V[:1], torch.nan) * torch.tensor(args.n)[:, None]
    names = [f"V_STF, n = {n}" for n in args.n]
    columns = ["sigma", "V_DSM", *names, *(f"times n/V_DSM:{name}" for name in names),
               "V_DSM/sigma^2", "D"]
    table = torch.cat([levels[None], V, left, V[:1] / levels ** 2, D.mean(0)[None]]).T
    show(args, columns, table.tolist(), [
        dict(y=["V_DSM", *names], ylabel="variance of the target (D-form)", bottom=floor),
        dict(y=columns[2 + len(names):-2], ylabel="n V_STF/V_DSM"),
        dict(y=["V_DSM/sigma^2", "D"], ylabel="variance of noise targets; D", bottom=1e-3)])


@torch.no_grad()
def effective_size(x0, noise, levels, reference):
    """Mean of 1/sum_k w_k^2, w = stf_weights: how many references STF averages, by noise level.

    1 where sigma -> 0, n where sigma -> infinity.  x0, noise (m, ...), levels (L,), reference
    (n, ...), x0 among its rows -> (L,) float64.
    """
    sizes = []
    for level in levels:
        sigma = level.to(x0).expand(len(x0), *[1] * (x0.ndim - 1))
        w = stf_weights(x0 + sigma * noise, sigma, reference)                     # (m, n)
        sizes.append((1 / (w ** 2).sum(1)).mean())
    return torch.stack(sizes)


def log_density(schedule, levels):
    """The density of ln sigma in training, du/d ln sigma of training_sigma(u): (L,) -> an array."""
    u = torch.special.ndtr(torch.linspace(-6, 6, 20_001, dtype=torch.float64))
    z = schedule.training_sigma(u).log()
    return np.interp(levels.log(), z, np.gradient(u, z), left=0, right=0)


def share_above(limit, size, levels, schedule):
    """The share of a schedule's training samples at levels where size, (L,), is above limit."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z = schedule.training_sigma(u).log()
    return (np.interp(z, levels.log(), size) > limit).mean()


def ess(args):
    """STF's effective sample size over sigma, beside the densities that training draws sigma from.
    Where it is 1, the target is x0 and nothing is won."""
    reference, _, g = some_rows(args, max(args.n))
    x0, levels = reference[:args.num], torch.tensor(sorted(args.levels))
    noise, sizes = torch.randn(x0.shape, generator=g), {min(n, len(reference)) for n in args.n}
    curves = {f"n = {n}": effective_size(x0[:n], noise[:n], levels, reference[:n])
              for n in sorted(sizes)}
    schedules = {"EDM": EDM(), "VE": VE(), "VP": VP()}
    print("share of training where ESS > 2\n" + " " * 11 + "".join(f"{s:>11}" for s in schedules))
    for name, size in curves.items():
        print(f"{name:>11}" + "".join(f"{share_above(2, size, levels, schedule):11.1%}"
                                      for schedule in schedules.values()))
    print()
    density = {name: log_density(schedule, levels) for name, schedule in schedules.items()}
    show(args, ["sigma", *curves, *density],
         np.stack([levels, *curves.values(), *density.values()], 1).tolist(), [
        dict(y=list(curves), ylabel="effective sample size"),
        dict(y=list(density), ylabel="density of ln sigma in training", yscale="linear")])


def linear_gain(variances, levels):
    """What the best linear denoiser takes off EDM's loss, which is 1 at each level before training.

        g(sigma) = 1 - (mean_i v_i/(v_i + sigma^2))/(v/(v + sigma^2)),    v = mean_i v_i

    v_i (d,) are the data's variances along its principal axes; levels (L,) -> (L,), within [0, 1).
    Near 0 where noise is less than the finest detail, and where the coarsest drowns in it.
    """
    v, square = variances.mean(), levels[:, None] ** 2
    return 1 - (variances / (variances + square)).mean(1) * (1 + square[:, 0] / v)


@torch.no_grad()
def suggest(rows, step, g):
    """Hyper-parameters that a set asks for, to start from: [(item, value, reason)]; curves.

    sigma_max: so large that noise joins any two rows (Song & Ermon 2020, technique 1).
    sigma_min: the deviation that rounding to `step` has left in the data, step/sqrt(12).  Points
    are not rounded (step 0): a tenth of the finest deviation s that they resolve; two draws of
    N(., s^2) are about s sqrt(2 d) apart, and so far, in the median, are nearest neighbours.
    P_mean, P_std: mean and half the deviation of ln sigma under a density like linear_gain, within
    these ends: EDM's reason, to train where the loss can fall.  Half, for 95 % of the draws to lie
    within one deviation; on CIFAR-10 that comes out near EDM's choice.  What is not linear, as a
    spiral, is not seen: for points in the plane P_std is too small.

    rows (N, ...), all against all: O(N^2 d).  Images wider than 32 enter linear_gain by their
    middle 32 x 32.  Curves, by level: sigma, ESS at n = N, gain, density suggested, EDM's.
    """
    x, d = rows.flatten(1).double(), rows[0].numel()
    distance, rounding = torch.cdist(x, x), 1e-6 * x.norm(dim=1).max()            # (N, N)
    far = distance.max().item()
    if far <= rounding:
        raise BadInput("the rows measured are all the same; choose another set, or a larger --num")
    nearest = distance.masked_fill_(distance <= rounding, torch.inf).amin(1)      # (N,)
    quantiles = nearest.quantile(torch.tensor([0.1, 0.5, 0.9]).to(x)).tolist()
    low = step / 12 ** 0.5 or quantiles[1] / (2 * d) ** 0.5 / 10
    levels = torch.logspace(math.log10(low), math.log10(far), 32, dtype=torch.float64)
    middle = (rows.shape[-1] - 32) // 2 if rows.ndim == 4 else 0
    if middle > 0:
        x = rows[:, :, middle:middle + 32, middle:middle + 32].flatten(1).double()
    covariance = torch.cov(x.T).reshape(x.shape[1], -1)
    variances = torch.linalg.eigvalsh(covariance).clamp(min=0) + step ** 2 / 12
    gain = linear_gain(variances, levels)
    z, share = levels.log(), (gain + 1e-9) / (gain + 1e-9).sum()     # no gain at all: the middle
    mean = (share * z).sum().item()
    std = (share * (z - mean) ** 2).sum().sqrt().item() / 2
    x0 = rows[:128]
    size = effective_size(x0, torch.randn(x0.shape, generator=g), levels, rows)
    two = math.exp(np.interp(math.log(2), size.log(), z))
    table = [
        ("mean", rows.mean().item(), "of all values; EDM's formulas take it for 0"),
        ("sigma_data", rows.std().item(), "standard deviation of all values"),
        *((f"nearest, {q} %", value, "quantile of the distance to the nearest different row")
          for q, value in zip((10, 50, 90), quantiles)),
        ("ESS 2", two, f"sigma above which STF averages sources, n = {len(rows)}"),
        ("P_mean", mean, "ln sigma where a linear denoiser gains, mean"),
        ("P_std", std, "half the width of that gain"),
        ("sigma_min", low, "what rounding to 8 bits has left" if step else
         "a tenth of the nearest rows' distance, per coordinate"),
        ("sigma_max", far, "largest distance between rows")]
    densities = [log_density(EDM(P_mean=m, P_std=s), levels) for m, s in ((mean, std), (-1.2, 1.2))]
    return table, np.stack([levels, size, gain, *densities], 1).tolist()


def describe(args):
    """What a data set says about hyper-parameters, as a table; and the curves behind it."""
    rows, data, g = some_rows(args, args.num)
    table, curves = suggest(rows, 2 / 255 if data.x.dtype == np.uint8 else 0, g)
    same = len(data.x) - len({hash(row.tobytes()) for row in data.x})
    table = [("count", len(data.x), f"{len(rows)} of them measured"),
             ("shape", "x".join(map(str, data.x.shape[1:])), "of one row"),
             ("duplicates", same, "rows equal to an earlier one"), *table]
    where = save_csv(args, ["item", "value", "reason"], table)
    for item, value, reason in table:
        print(f"{item:16}{text(value, 4):>10}  {reason}")
    print("\nvalues to start from; EDM's for CIFAR-10: sigma_data 0.5, P_mean -1.2, P_std 1.2,\n"
          "sigma_min 0.002, sigma_max 80.  P_mean and P_std are a rule from second moments alone;\n"
          "train.py's default P_mean for digits, -0.5, was chosen by looking at samples\n\n"
          f"{where}.csv")
    names = ["linear gain", "suggested draw", "EDM's draw"]
    draw(f"{where}.png", ["sigma", "ESS", *names], curves, [
        dict(y=["ESS"], ylabel=f"effective sample size, n = {len(rows)}"),
        dict(y=names, ylabel="share of the loss; density of ln sigma", yscale="linear")], data.name)


# ---- Denoising and trajectories ------------------------------------------------------------------

def denoisers(args):
    """Clean rows x0 (num, ...) of the data, what denoises them, and a generator for their noise.

    "ideal": the posterior mean over the whole data set, which minimises the loss (EDM App. B.3);
    "network": the RUN's, if any.  Where it is class-conditional, both know the class of each x0.
    """
    if args.run and (args.data != "digits" or args.size):
        raise BadInput("a RUN brings its own data; leave --data and --size out")
    device, g, labels, own = pick_device(args.device), torch.Generator(), None, None
    if args.run:
        network, options, _ = load_run(args.run, device)
    data = run_data(options) if args.run else load_data(args.data, args.data_dir, args.size)
    pixels = torch.from_numpy(data.x)
    rows = torch.randperm(len(pixels), generator=g.manual_seed(args.seed))[:args.num]
    if args.run and options["cond"]:
        labels = torch.from_numpy(data.labels).to(device)
        own = labels[rows]

    def ideal(x, sigma):
        return stf_target(x, sigma.to(x).expand(len(x), *[1] * (x.ndim - 1)), pixels, own, labels)
    sources = {"ideal": ideal} | ({"network": partial(network, labels=own)} if args.run else {})
    return load_rows(pixels, rows, None, device), sources, g


@torch.no_grad()
def denoise(args):
    """One-step estimates x0_hat = D(x0 + sigma noise): pictures at rising sigma (EDM fig. 1), and
    how far their mean colour is from that of x0, by DDPM's t (DB fig. 3).  At high t no denoiser
    knows the colour, as x hardly tells of x0: what counts is how far the network's is from the
    ideal's.  (Points have no pixels: each coordinate is a colour.)"""
    (x0, sources, g), rows, panels = denoisers(args), [], []
    colour = lambda x: x.flatten(2).mean(2) if x.ndim > 2 else x                  # (num, C)
    apart = lambda x, y: (colour(x) - colour(y)).norm(dim=1).mean().item()
    for t in range(1, 1001, 27):
        sigma = DDPM().levels[t - 1]
        x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
        D = [source(x, sigma) for source in sources.values()]
        rows.append([t, sigma.item(), *(apart(y, x0) for y in D), *(apart(y, D[0]) for y in D[1:])])
    names = [*sources, *(f"{name} to ideal" for name in [*sources][1:])]
    show(args, ["t", "sigma", *names], rows, [
        dict(y=names, ylabel="distance of the mean colours", bottom=1e-3)])
    noise, path = torch.randn(x0.shape, generator=g).to(x0), f"{args.out}/denoise-images.png"
    for sigma in torch.tensor(args.levels if x0.ndim == 4 else []):
        x = x0 + sigma * noise
        scaled = x / (1 + (sigma / 0.5) ** 2).sqrt()               # as EDM does: noise saturates
        shown = [scaled, *(D(x, sigma) for D in sources.values())]
        panels.append((f"sigma {sigma:g}", to_uint8(torch.stack(shown, 1)[:2].flatten(0, 1))))
    if panels:
        save_pictures(path, panels, ["noisy, scaled", *sources] * len(x0[:2]))
        print(path)


@torch.no_grad()
def mse(args):
    """|eps_hat - eps|^2/d by DDPM's t (DB fig. 4), and x_t itself as the guess of eps, "initial":

        E|x_t - eps|^2/d = ab E|x0|^2/d + (1 - sqrt(1 - ab))^2,      ab = 1/(1 + sigma^2)

    At high t that is little, and a network trained under constant weights may be worse (DB: where
    t > 950).  The ideal denoiser has no error at low t: it knows the very images."""
    (x0, sources, g), rows = denoisers(args), []
    for t in range(1, 1001, 27):
        sigma = DDPM().levels[t - 1]
        x, ab = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0), 1 / (1 + sigma ** 2)
        error = [(ab * (x0 ** 2).mean().cpu() + (1 - (1 - ab).sqrt()) ** 2).item()]
        error += [(((D(x, sigma) - x0) / sigma) ** 2).mean().item() for D in sources.values()]
        rows.append([t, sigma.item(), *error, *(e / error[0] for e in error)])
    names = ["initial", *sources]
    ratios = [f"ratio:{name}" for name in names]
    show(args, ["t", "sigma", *names, *ratios], rows, [
        dict(y=names, ylabel="|eps_hat - eps|^2/d", bottom=1e-6),
        dict(y=ratios, ylabel="as a share of the initial guess's", bottom=0.01)])


def flow_lines(sampler, schedule, sigma, starts):
    """Lines of the probability flow of data at +1 and -1, where D(x; sigma) = tanh(x/sigma^2).

    sigma (N,) falling, starts (n,) in standard deviations of x at sigma[0] -> t (N,), x (N, n).
    """
    t = schedule.sigma_inv(sigma)
    x = [schedule.s(t[0]) * (1 + sigma[0] ** 2).sqrt() * starts]
    sampler(lambda x, sigma: (x / sigma ** 2).tanh(), x[0], t, schedule,
            callback=lambda i, x_i: x.append(x_i))
    return t, torch.stack(x)


def trajectories(args):
    """flow_lines under VP, VE and EDM over their t, up to sigma = each of --levels (EDM fig. 3).
    Beside the name, how curved they are: the error of 15 steps of Euler's method, with the same
    sigmas in all three, rms over levels and starts, in standard deviations of x."""
    starts = torch.tensor([-2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64)
    columns, cells, panels = [], [], []
    for top in args.levels:
        sigma = EDM(sigma_max=top).time_steps(151)[:-1]                           # (151,)
        for schedule in (VP(), VE(), EDM()):
            t, x = flow_lines(heun, schedule, sigma, starts)                      # (151, 8)
            coarse = flow_lines(euler, schedule, sigma[::10], starts)[1]
            deviation = (schedule.s(t) * (1 + sigma ** 2).sqrt())[::10, None]
            error = ((coarse - x[::10]) / deviation).square().mean().sqrt()
            name = f"{type(schedule).__name__} to sigma {top:g}"
            names = [f"{name}:{label}" for label in ("t", *starts.tolist())]
            columns, cells = columns + names, [*cells, t, *x.T]
            panels.append(dict(x=names[0], y=names[1:], title=f"{name}; Euler's error {error:.3f}",
                               ylabel="x", yscale="linear", style="-", legend=False))
    show(args, columns, torch.stack(cells, 1).tolist(), panels, most=6)


@torch.no_grad()
def estimation_gap(denoise, x0, ladder, noise):
    """How far errors of eps_hat have led sampling astray, step by step (SA Theorem 1, fig. 4).

        d_t = sum_{i>t} tau_i (eps_hat(x_i) - eps_i),     eps_i = (x_i - x0)/sigma_i

    x_T = x0 + sigma_T noise(); the x_i below are ancestral sampling's own states, and eps_i is the
    noise that is in them.  Then d_1 is the x_1 of the true reverse process, which knows x0, less
    the model's from the same noise (in DDPM's frame); d_t is what the first steps, down to t, add
    to that.  Some of it is chance, which the ideal denoiser has, too: x_T does not tell all of x0.

    denoise of x0's batch, ladder (T,), noise() -> (B, ...).  -> (T - 1, 2), t = T-1 ... 1: rms of
    d_t over samples and coordinates; the same if errors of different steps were unrelated.
    """
    d, squares, found = 0, 0, []
    tau = iter(sa_tau(ladder, torch.arange(len(ladder), 1, -1), 1, "paper")[0])

    def watched(x, sigma):
        nonlocal d, squares
        D = denoise(x, sigma)
        error = next(tau) * (x0 - D) / sigma                             # tau (eps_hat - eps)
        d, squares = d + error, squares + error.square().mean()
        found.append(torch.stack([d.square().mean(), squares]).sqrt())
        return D
    ddpm(watched, x0 + ladder[-1] * noise(), ladder.flip(0), noise)
    return torch.stack(found)


def gap(args):
    """estimation_gap from x_300 on (SA fig. 4): at x_1, as Theorem 1 has it, and at the state just
    reached, x_t.  The paper leaves open which of them it shows, and which x_i and eps_i it takes.
    Where errors of different steps agree (SA fig. 1 a), the gap is above "if unrelated"."""
    (x0, sources, _), ladder = denoisers(args), DDPM().levels[:300]
    decay = ladder ** 2 / (1 + ladder ** 2).sqrt()               # of a gap at x_t, down to x_1
    columns, cells = ["t"], [torch.arange(299, 0, -1.0)]
    for name, D in sources.items():
        noise = seeded_noise(range(args.seed, args.seed + len(x0)), x0.shape[1:], x0.device)
        d = estimation_gap(D, x0, ladder, noise).double().cpu().T                 # (2, 299)
        columns += [f"{at}:{name}{how}" for at in ("x_t", "x_1") for how in ("", ", if unrelated")]
        cells += [*(d * (decay / decay[0])[:-1].flip(0)), *d]
    panels = [dict(y=[name for name in columns if name.startswith(at)], yscale=yscale,
                   ylabel=f"gap at {at} (rms)", xlim=(300, 0))
              for at, yscale in (("x_t", "linear"), ("x_1", "log"))]
    show(args, columns, torch.stack(cells, 1).tolist(), panels, most=12)


# ---- Variance of objective and gradient ----------------------------------------------------------
# A share is what one gradient is of: a sample, or a mini-batch, and the reference it has.  A batch
# holds many of them, `copies`; b is a dict of all that is drawn for it.

EXACT = 8        # coordinates up to which Taylor controls take the exact trace, above it one probe


def own_parameters(denoiser, copies):
    """denoise(x, sigma, labels) with parameters of its own, all equal, for each share of a batch;
    and these, (copies, ...) each: the gradient of a sum then holds one gradient for each share."""
    theta = {name: p.detach().expand(copies, *p.shape).requires_grad_()
             for name, p in denoiser.named_parameters()}
    one = lambda theta, *given: torch.func.functional_call(denoiser, theta, given)

    def own(x, sigma, labels):
        shares = (a.unflatten(0, (copies, -1)) for a in (x, sigma, labels))
        return torch.vmap(one)(theta, *shares).flatten(0, 1)
    return own, list(theta.values())


def share_gradients(values, theta):
    """Of each of m values (B,), the gradients of its mean over a share: (m, copies, p) float64."""
    out = []
    for value in values:
        mean = value.unflatten(0, (len(theta[0]), -1)).mean(1)
        g = torch.autograd.grad(mean.sum(), theta, retain_graph=True, materialize_grads=True)
        out.append(torch.cat([a.flatten(1) for a in g], dim=1).double())
    return torch.stack(out)


def draw_shares(denoiser, pool, labels, n, args, g):
    """Batches, until there are args.num shares: n rows of the pool (N, ...), with labels (N,), are
    a share's reference, and the first args.batch of these its samples."""
    copies = max(1, 2 ** 18 // sum(p.numel() for p in denoiser.parameters()))     # caches hold it
    copies = min(copies, args.num)
    means = torch.stack([pool[labels == k].mean(0) for k in range(labels.max() + 1)])
    for _ in range(math.ceil(args.num / copies)):
        rows = torch.randint(len(pool), (copies, n), generator=g)
        mine = rows[:, :args.batch].flatten()                                     # (B,)
        noise, probe = torch.randn(2, len(mine), *pool.shape[1:], generator=g).to(pool)
        own, theta = own_parameters(denoiser, copies)
        yield dict(theta=theta, D=partial(own, labels=labels[mine]), x0=pool[mine], noise=noise,
                   probe=probe.sign(), uniform=torch.rand(len(mine), generator=g).to(pool),
                   labels=labels[mine], mu=means[labels[mine]], reference=pool[rows],
                   reference_labels=labels[rows])


def by_share(function, b, n, *args, out_dims=0):
    """function(*args, n references, labels, the references' labels) on each share of args."""
    split = lambda a: a.unflatten(0, (len(b["reference"]), -1))
    return torch.vmap(function, out_dims=out_dims)(
        *map(split, args), b["reference"][:, :n], split(b["labels"]), b["reference_labels"][:, :n])


def loss_estimates(D, b, sigma, weight, gamma, sizes):
    """{name: (B,)}, all of one mean: DSM, antithetic pairs, STF with references of these sizes; and
    STF with the first and the mean_correction by gamma, a number, or antithetic pairs."""
    x0, noise, n = b["x0"], b["noise"], sizes[0]
    correct = lambda x0, s, mu, y, *label: mean_correction(x0, s, y, mu, lambda s: gamma, *label)
    shift = by_share(correct, b, n, x0, sigma, b["mu"]).flatten(0, 1)

    def stf(n, noise=noise, shift=0):
        target = lambda x, s: by_share(stf_target, b, n, x, s).flatten(0, 1) - shift
        return stf_loss(D, x0, noise, sigma, weight, target)
    return {"dsm": dsm_loss(D, x0, noise, sigma, weight),
            "antithetic": antithetic_loss(D, x0, noise, sigma, weight),
            **{f"stf {n}": stf(n) for n in sizes},
            "stf, corrected": stf(n, shift=shift), "stf, antithetic": (stf(n) + stf(n, -noise)) / 2}


def control_estimates(D, b, sigma, weight, c_skip, orders, n, K):
    """{name: (B,)}, all of mean 0: Taylor controls, and STF's at K atoms of n references."""
    def atoms(x, s):
        one = lambda x, s, u, y, *label: stf_atoms(x, s, y, u, K, *label)
        y, mass, target = by_share(one, b, n, x, s, b["uniform"], out_dims=(1, 1, 0))
        return y.flatten(1, 2), mass.flatten(1, 2), target.flatten(0, 1)
    given = D, b["x0"], b["noise"], sigma, weight, c_skip
    probe = b["probe"] if b["x0"][0].numel() > EXACT else None
    with sdpa_kernel(SDPBackend.MATH):              # the one attention with second derivatives
        return {f"order {k}": taylor_terms(*given, k, probe)[1] for k in orders} | {
            "atoms": stf_taylor_terms(*given, atoms)[1]}


def covariances(denoiser, pool, labels, sigma, weight, gamma, adam, args, g):
    """The names of m estimates, and {kind: (m, m)} of each two of them: the trace of the covariance
    of their gradients; of these times `adam`, (p,); the covariance of their values.

    Values are less what no parameter moves: the same estimate with F = 0.
    """
    values, square, mean, N = [], {}, {}, 0
    c_skip = lambda s: denoiser.precondition(s)[0]
    for b in draw_shares(denoiser, pool, labels, max(args.n), args, g):
        s = torch.full_like(b["uniform"], sigma).view(-1, *[1] * (pool.ndim - 1))
        losses = loss_estimates(b["D"], b, s, weight, gamma, args.n)
        still = loss_estimates(lambda x, s: c_skip(s) * x, b, s, weight, gamma, args.n)
        controls = control_estimates(b["D"], b, s, weight, c_skip, {0, *args.orders}, args.n[0],
                                     args.atoms)
        G = share_gradients([*losses.values(), *controls.values()], b["theta"])
        for kind in ("gradient", "Adam"):
            square[kind] = square.get(kind, 0) + G.flatten(1) @ G.flatten(1).T
            mean[kind] = mean.get(kind, 0) + G.sum(1)
            G *= adam
        part = torch.stack([*(losses[name] - still[name] for name in losses), *controls.values()])
        values.append(part.detach().double().unflatten(1, (G.shape[1], -1)).mean(2))
        N += G.shape[1]
    cov = {kind: square[kind] / N - mean[kind] @ mean[kind].T / N ** 2 for kind in square}
    return [*losses, *controls], cov | {"objective": torch.cov(torch.cat(values, 1), correction=0)}


def adam_scale(denoiser, pool, labels, weight, args, g):
    """What Adam's step multiplies a gradient by, 1/sqrt(E g^2), for the gradients g of DSM at the
    noise levels that EDM trains on.  (p,)"""
    square = []
    for b in draw_shares(denoiser, pool, labels, args.batch, args, g):
        u = torch.rand(len(b["x0"]), generator=g, dtype=torch.float64)
        s = EDM().training_sigma(u).to(pool).view(-1, *[1] * (pool.ndim - 1))
        loss = dsm_loss(b["D"], b["x0"], b["noise"], s, weight)
        square.append(share_gradients([loss], b["theta"])[0].square().mean(0))
    return 1 / (torch.stack(square).mean(0).sqrt() + 1e-8)


def reduction(names, cov, loss, control=None):
    """Var(loss - beta control)/Var(dsm), and the beta that makes it least."""
    i, j, dsm = names.index(loss), names.index(control or loss), names.index("dsm")
    beta = cov[i, j] / cov[j, j] if control else cov.new_zeros(())
    return ((cov[i, i] - beta * cov[i, j]) / cov[dsm, dsm]).item(), beta.item()


def trained_mlp(args, pool, g):
    """The MLP of --width, --depth and --activation behind EDM's row, after --steps on STF's target:
    on DSM's, its own error would be larger than the noise that is measured at small sigma."""
    torch.manual_seed(args.seed)
    activation = getattr(torch.nn.functional, args.activation)
    model = MLP(pool.shape[1], args.width, args.depth, activation=activation)
    model.out.reset_parameters()                    # zeros: no gradient behind them at --steps 0
    if args.activation in ("tanh", "softplus"):     # from torch's small start they stay at F = 0
        for layer in model.hidden:
            torch.nn.init.kaiming_normal_(layer.weight)
    net = Denoiser(model, EDM().precondition).to(pool.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.steps, 1))
    for _ in range(args.steps):
        reference = pool[torch.randint(len(pool), (1024,), generator=g)]
        x0, sigma = reference[:256], 0.002 * 1e4 ** torch.rand(256, 1, generator=g).to(pool)
        noise = torch.randn(x0.shape, generator=g).to(pool)
        target = partial(stf_target, reference=reference)
        loss = stf_loss(net, x0, noise, sigma, EDM().weight, target).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), decay.step()
    return net


def measured(args, g):
    """A denoiser, rows it was trained on, their labels, and lambda: the RUN's, or trained_mlp's."""
    device = pick_device(args.device)
    if args.run:
        net, options, _ = load_run(args.run, device)
        data, weight = run_data(options), loss_weight(options)
    else:
        data, weight = load_data(args.data, args.data_dir), EDM().weight
        if data.x.ndim > 2:
            raise BadInput("images need a network that train.py made; name a RUN, or points")
    rows = torch.randperm(len(data.x), generator=g)[:20_000]
    pool, labels = load_rows(torch.from_numpy(data.x), rows, None, device), torch.zeros_like(rows)
    if not args.run:
        net = trained_mlp(args, pool, g)
    elif options["cond"]:
        labels = torch.from_numpy(data.labels)[rows]
    return net.requires_grad_(False), pool, labels.to(device), weight


def methods(args, d):
    """{name: (loss, its control or None, cost in evaluations of D and products with its J)}."""
    stf, trace = f"stf {args.n[0]}", d if d <= EXACT else 1
    return {"dsm": ("dsm", None, "1"),
            **{f"order {k}": ("dsm", f"order {k}", f"2 + {trace + 2 * k - 1} J" if k else "2")
               for k in args.orders},
            "antithetic": ("antithetic", None, "2"),
            **{f"stf {n}": (f"stf {n}", None, "1") for n in sorted(args.n)},
            f"{stf}, corrected": ("stf, corrected", None, "1"),
            f"{stf}, order 0": (stf, "order 0", "2"),
            f"{stf}, {args.atoms} atoms": (stf, "atoms", f"{args.atoms + 1}"),
            f"{stf}, antithetic": ("stf, antithetic", None, "2")}


def print_totals(table, rows):
    """Each method's variance over the levels that EDM trains on, DSM's being 1, and its cost."""
    share = log_density(EDM(), torch.tensor([row["sigma"] for row in rows]))
    print("variance over the levels that EDM trains on; cost in evaluations of D and products\n"
          f"with its Jacobian J\n{'':22}{'gradient':>12}{'Adam':>12}{'objective':>12}{'cost':>12}")
    for name, (_, _, cost) in table.items():
        print(f"{name:22}", end="")
        for kind in ("gradient", "Adam", "objective"):
            dsm = share * [row[f"{kind} variance:dsm"] for row in rows]           # (L,)
            print(f"{dsm @ [row[f'{kind}:{name}'] for row in rows] / dsm.sum():12.3f}", end="")
        print(f"{cost:>12}")
    print()


def gradvar(args):
    """Variance of the gradient, of Adam's step and of the objective over plain DSM's, by noise
    level, and beta, what a control is best multiplied by (TCV figs. 2, 4, 5; of a RUN: 3).

    Of single samples, each with a reference of its own; with --batch B, of mini-batches that share
    one.  beta is a regression coefficient, of the very samples it serves: one number from --num of
    them hardly overfits.  The first of --n is STF's reference where STF is combined.
    """
    if min(args.n) < args.batch or args.n[0] < args.atoms:
        raise BadInput("a reference has to hold the batch and the atoms; give larger --n")
    for name in ("data", "activation", "width", "depth", "steps"):
        if args.run and getattr(args, name) != FIGURES["gradvar"][2][f"--{name}"]:
            raise BadInput(f"--{name} is for the network trained here; leave it out for a RUN")
    g = torch.Generator().manual_seed(args.seed)
    net, pool, labels, weight = measured(args, g)
    args.num = args.num or (2000 if pool.ndim == 2 else 32)
    table, levels = methods(args, pool[0].numel()), torch.tensor(sorted(args.levels))
    noise = torch.randn(pool[:128].shape, generator=g).to(pool)
    gammas = measure_gamma(pool[:128], noise, levels, pool[:1024], labels[:128], labels[:1024])
    adam, rows = adam_scale(net, pool, labels, weight, args, g), []
    for sigma, gamma in zip(levels.tolist(), gammas.tolist()):
        names, covs = covariances(net, pool, labels, sigma, weight, gamma, adam, args, g)
        row = {"sigma": sigma}
        for kind, cov in covs.items():
            row[f"{kind} variance:dsm"] = cov[0, 0].item()
            for name, (loss, control, _) in table.items():
                row[f"{kind}:{name}"], beta = reduction(names, cov, loss, control)
                row |= {f"{kind} beta:{name}": beta} if control else {}
        rows.append(row)
        progress("noise levels", len(rows), len(levels))
    print_totals(table, rows)
    panel = lambda kind, names, title: dict(y=[f"{kind}:{name}" for name in names], title=title,
                                            ylabel="variance over plain DSM's")
    names, k = list(table), 2 + len(args.orders)
    taylor, sizes, joint = names[1:k], names[k:-3], [f"stf {args.n[0]}", *names[-3:]]
    show(args, list(row), [list(row.values()) for row in rows], [
        panel("gradient", taylor, "gradient: controls"),
        panel("gradient", sizes, "gradient: STF by reference size"),
        panel("gradient", joint, "gradient: STF with controls"),
        dict(title="best beta", y=[column for column in row if column.startswith("gradient beta")],
             ylabel="best beta of the gradient", yscale="linear"),
        panel("Adam", taylor, "Adam's step: controls"),
        panel("objective", taylor, "objective: controls")])


# ---- Command line --------------------------------------------------------------------------------

ARGUMENTS = {      # what a figure may be asked for; its default is the figure's own
    "run": dict(nargs="?", metavar="RUN", help="folder that train.py made (default: none)"),
    "data": dict(metavar="SET", help="a built-in set or a path, as train.py's --data"),
    "--data": dict(help="a built-in set or a path, as train.py's"),
    "--data-dir": dict(help="where downloads and caches lie"),
    "--size": dict(type=number(int, 1), help="crop and resize images to SIZE x SIZE"),
    "--num": dict(type=number(int, 1), help="samples measured"),
    "--n": dict(type=number(int, 1), nargs="+", help="sizes of STF's reference"),
    "--batch": dict(type=number(int, 1), help="samples of a gradient, which share a reference"),
    "--orders": dict(type=number(int, 0, 2), nargs="+", help="of Taylor controls"),
    "--atoms": dict(type=number(int, 1), help="references in STF's control"),
    "--activation": dict(choices=["silu", "softplus", "tanh", "relu"], help="of the MLP"),
    "--width": dict(type=even, help="of the MLP"),
    "--depth": dict(type=number(int, 1), help="hidden layers of the MLP"),
    "--steps": dict(type=number(int, 0), help="training of the MLP"),
    "--levels": dict(type=number(float, 1e-6), nargs="+", help="noise levels sigma"),
    "--seed": dict(type=number(int, 0, 2 ** 32 - 1), help="of every draw"),
    "--device": dict(help="none: cuda where there is one, else cpu"),
    "--out": dict(help="folder of the CSV and the PNG"),
}
COMMON = {"--seed": 0, "--out": "plots"}
SET = {"--data": "digits", "--data-dir": "data", "--size": None}       # figures of a data set
RUN = SET | {"run": None, "--num": 64, "--device": None}               # of a RUN, or a set alone
SIGMAS = [0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0,
          15.0, 20.0, 30.0, 50.0, 80.0]

FIGURES = {        # name: (function, help, its arguments and their defaults, beside COMMON)
    "weights": (weights, "all weightings over t, and their share of the total (DB figs. 2, 5)", {}),
    "variance": (variance, "variance of DSM's and STF's targets, by sigma (STF figs. 2, 3)", SET | {
        "--data": "two-gaussians-64d", "--num": 2000, "--n": [16, 64, 256], "--levels": SIGMAS}),
    "ess": (ess, "how many references STF averages, and how often training goes there", SET | {
        "--num": 256, "--n": [256, 1024, 4096], "--levels": SIGMAS}),
    "data": (describe, "what a data set says about hyper-parameters", {
        "data": None, "--data-dir": "data", "--size": None, "--num": 5000}),
    "denoise": (denoise, "one-step estimates, their colour (EDM fig. 1; DB fig. 3)", RUN | {
        "--levels": [0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0]}),
    "mse": (mse, "error of eps_hat by step, beside the noisy input as the guess (DB fig. 4)", RUN),
    "trajectories": (trajectories, "the ODE's lines in 1-D under VP, VE and EDM (EDM fig. 3)",
                     {"--levels": [25.0, 1.0]}),
    "gap": (gap, "estimation gap while sampling from x_300 (SA fig. 4)", RUN),
    "gradvar": (gradvar, "variance of gradient and objective by estimator (TCV figs. 2-5); of a "
                "RUN's network, or an MLP trained here; --num none: 2000 points or 32 images", {
        "run": None, "--data": "ring", "--data-dir": "data", "--num": None, "--batch": 1,
        "--n": [256, 16, 64, 1024], "--orders": [0, 1, 2], "--atoms": 4,
        "--levels": [0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0],
        "--activation": "silu", "--width": 64, "--depth": 2, "--steps": 4000, "--device": None}),
}


def add_commands(commands):
    """The figures as sub-commands of an argparse parser."""
    for name, (_, about, arguments) in FIGURES.items():
        command = commands.add_parser(name, help=about, description=about)
        for argument, default in (arguments | COMMON).items():
            how = dict(ARGUMENTS[argument])
            if argument.startswith("--"):
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                how["help"] += f" (default: {str(shown).lower()})"
            command.add_argument(argument, default=default, **how)
