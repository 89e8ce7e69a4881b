"""papers.py: the papers' figures, each a command of evaluate.py (FIGURES there lists them).

Each prints a table, writes NAME.csv and, where matplotlib is installed, draws NAME.png.
"""

import csv
import math
import os
from functools import partial

import numpy as np
import torch
from PIL import Image

from datasets import BadInput, attempt, load_data, load_rows
from losses import WEIGHTS, sa_tau, stf_target, stf_weights
from runs import load_run, pick_device, run_data, save_pictures, to_uint8
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

    (STF Theorem 2; section 6.1 swaps the two laws).  0 where x tells nothing, ~(N - 1)^2 where
    it tells the row.  x (B, ...), sigma (B, 1, ..., 1), rows (N, ...) -> float64 (B, d), (B,).
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
