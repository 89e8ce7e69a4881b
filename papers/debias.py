"""papers/debias.py: Debias: which weight should the loss have at each noise level?

    python -m papers.debias table                       from the repository's root

Source: Yu et al. 2024, "Unmasking Bias in Diffusion Model Training" (DB).  DDPM predicts the noise,
and weighs |eps_hat - eps|^2 the same at each noise level.  A prediction stands for the image

    x0_hat = x - sigma eps_hat,    so    x0_hat - x0 = sigma (eps - eps_hat)         (eq. 6, 7)

with sigma = 1/sqrt(SNR), from .01 at t = 1 to 157 at t = 1000: where sampling begins, a small error
of eps_hat is a large error of the image.  Debias takes this factor as the weight,
sigma |eps_hat - eps|^2 (eq. 8).  Runs here predict the noise, on DDPM's ladder, as the paper's do.
inverse-snr is the weight that the paper calls SNR.
"""

import sys

import torch

import evaluate
from losses import WEIGHTS
from papers import plot
from schedules import DDPM

LEVELS = DDPM().levels                                       # sigma of t = 1 ... 1000
NAMES = ("constant", "p2", "min-snr", "inverse-snr", "debias")


# ---- Weights -------------------------------------------------------------------------------------

def bound_weights(levels):
    """The variational bound's weight on |eps_hat - eps|^2, as printed and corrected: (T,), (T,).

        printed     beta_t^2 / ((1 - beta_t)(1 - ab_t))                          (DB eq. 5, 13)
        corrected   beta_t / (2 (1 - beta_t)(1 - ab_t))

    with ab the product of all 1 - beta up to t.  The paper's last line drops the factor 1/(2 v) of
    the line before it, where v is the variance of the reverse step.  DDPM has v = beta_t.
    """
    ab = 1 / (1 + levels ** 2)
    beta = 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
    printed = beta ** 2 / ((1 - beta) * (1 - ab))
    return printed, printed / (2 * beta)


def weights(args):
    """The paper's weights by t, and the variational bound's (DB figures 2 and 5, eq. 5, 8, 13).

    And the share of each weight that the levels up to t carry.  A second.
    """
    on_eps = {name: WEIGHTS[name](LEVELS) * LEVELS ** 2 for name in NAMES}
    on_eps["bound, as printed"], on_eps["bound, corrected"] = bound_weights(LEVELS)
    shares = {f"share: {name}": w.cumsum(0) / w.sum() for name, w in on_eps.items()}
    rows = torch.stack([LEVELS, *on_eps.values(), *shares.values()], 1).tolist()
    plot.show(
        args, ["t", "sigma", *on_eps, *shares], [[t, *row] for t, row in enumerate(rows, 1)],
        [dict(y=list(on_eps), ylabel="weight on |eps_hat - eps|^2"),
         dict(y=dict(zip(shares, on_eps)), ylabel="share of the weight at levels up to t",
              yscale="linear")],
        "Weights of the loss by noise level, on DDPM's ladder of 1000 levels", xlabel="time step t",
        xscale="linear")


# ---- Distances -----------------------------------------------------------------------------------

def variants(args, weights):
    """{weight: the options of its runs}: the user's, where given."""
    base = dict(loss="dsm", schedule="ddpm", eval_every=0, keep=8) | args.options
    return {weight: base | dict(weight=weight) for weight in weights}


def table(args):
    """Samples of five weights, by the number of sampling steps T (DB figures 1, 6-8, tables 1-3).

    Frechet distances to the data, mean and standard deviation over seeds; less is better.  Also in
    the course of training, in --early steps.  A second picture has images.  --sampler ddim: figure
    8.  15 minutes.
    """
    def draws(name, folder):
        for T in args.T:
            yield (T, None), folder, dict(sampler=args.sampler, steps=T)
        saved = evaluate.checkpoints(folder)
        for path in [*saved[1:-1:2], saved[-1]]:
            step = evaluate.load_checkpoint(path)["step"]
            yield (None, step), path, dict(sampler=args.sampler, steps=args.early)

    given = variants(args, args.weights)
    found, judge = plot.distances(args, given, draws)
    options = judge.options
    plot.show(
        args, ["T", "step", *plot.with_sd(args.weights)],
        [[*case, *plot.cells(values, args.weights)] for case, values in found.items()],
        [dict(x="T", xlabel="sampling steps T"),
         dict(x="step", xlabel=f"training steps, at T = {args.early}", xscale="linear")],
        f"Weight of the loss by noise level: {options.data}, {options.steps} training steps, "
        f"sampler {args.sampler}", y=args.weights, **judge.axes)
    if len(options.shape) == 3:
        runs = [plot.opened(args, plot.trained(own, seed=args.seed)) for own in given.values()]
        panels = []
        for T in args.T:
            drawn = [evaluate.generate(*run, range(4), args.sampler, T) for run in runs]
            panels.append((f"T = {T}", evaluate.to_uint8(torch.cat(drawn))))
        plot.pictures(args, "samples", panels, args.weights)


def targets(args):
    """Networks that predict eps, x0 or v, under three weights (DB table 4).

    The weights are those on |eps_hat - eps|^2, whatever the network predicts: constant is the plain
    loss of a network that predicts eps, inverse-snr of one that predicts x0.  The paper has one
    weight for x0 and v.  25 minutes.
    """
    def draws(name, folder):
        for T in args.T:
            yield T, folder, dict(sampler="ddpm", steps=T)

    given = {}
    for target in args.targets:
        change = {} if target == "eps" else dict(precondition=target)     # the schedule's is eps
        for weight, own in variants(args, args.weights).items():
            given[target, weight] = own | change
    found, judge = plot.distances(args, given, draws)
    columns, rows, panels = ["weight"], [[weight] for weight in args.weights], []
    for T, values in found.items():
        names = {f"{target}, T = {T}": target for target in args.targets}
        columns += plot.with_sd(names)
        panels.append(dict(y=names, title=f"T = {T} sampling steps"))
        for row in rows:
            row += plot.cells(values, [(target, row[0]) for target in args.targets])
    plot.show(args, columns, rows, panels, f"What the network predicts, by weight of the loss: "
              f"{judge.options.data}, {judge.options.steps} training steps", xscale="linear",
              xlabel="weight of the loss", **judge.axes)


# ---- Errors by noise level -----------------------------------------------------------------------

def errors_by_t(denoisers, x0, error, seed):
    """Rows t, sigma, error(D, x0, sigma) of each denoiser, all with the same noise."""
    g, rows = torch.Generator().manual_seed(seed), []
    for t in plot.progress("noise levels", range(1, len(LEVELS) + 1, 27)):
        sigma = x0.new_full((len(x0), *[1] * (x0.ndim - 1)), LEVELS[t - 1].item())
        x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
        errors = [error(denoise(x, sigma), x0, sigma) for denoise in denoisers.values()]
        rows.append([t, LEVELS[t - 1].item(), *errors])
    return rows


def noise_error(D, x0, sigma):
    """|eps_hat - eps|^2/d = |D - x0|^2/(d sigma^2)."""
    return (((D - x0) / sigma).double() ** 2).mean().item()


def colour_error(D, x0, sigma):
    """The distance of two images' mean colours; of points, whose coordinates are their colour."""
    apart = (D - x0).double().reshape(*x0.shape[:2], -1).mean(2)                  # (B, C)
    return apart.norm(dim=1).mean().item()


def initial(x, sigma):
    """The denoiser whose eps_hat is the network's own input, x/sqrt(1 + sigma^2)."""
    return x - sigma * x / (1 + sigma ** 2).sqrt()


def mse(args):
    """The error of eps_hat by t, of five weights and of the input x_t (DB figures 4, 10).

    The input as a guess of the noise, "initial", has, with ab = 1/(1 + sigma^2), the error

        E |x_t - eps|^2/d = ab E|x0|^2/d + (1 - sqrt(1 - ab))^2

    A minute, and the training of table.  --runs: other runs, on one set of data.
    """
    runs, x0, _, options = plot.compared(args, variants(args, NAMES))
    denoisers = dict(initial=initial) | runs
    rows = errors_by_t(denoisers, x0, noise_error, args.seed)
    rows = [[*row, *(error / row[2] for error in row[2:])] for row in rows]
    ratios = {f"{name}/initial": name for name in denoisers}
    plot.show(
        args, ["t", "sigma", *denoisers, *ratios], rows,
        [dict(y=list(denoisers), ylabel="|eps_hat - eps|^2/d"),
         dict(y=ratios, ylabel="the same over that of the input")],
        f"Error of the predicted noise, by weight of the loss: held-out {options.data}",
        xlabel="time step t", xscale="linear")


def onestep(args):
    """One-step estimates x0_hat of five weights, and the error of their colour (DB figures 3, 12).

        x0_hat = D(x0 + sigma eps; sigma),    error = |mean colour of x0_hat - that of x0|

    At large t x hardly tells of x0, and no denoiser knows the colour: the posterior mean over the
    training set shows how much is known (at small t it is the nearest image of that set).  A second
    picture has the images.  A minute, and the training of table.  --runs: as in mse.
    """
    denoisers, x0, labels, options = plot.compared(args, variants(args, NAMES))
    denoisers["posterior mean"] = plot.data_mean(options, labels)
    plot.show(
        args, ["t", "sigma", *denoisers], errors_by_t(denoisers, x0, colour_error, args.seed),
        [dict(ylabel="distance of the mean colours, in [-1, 1]"),
         dict(ylabel="the same, large t alone", yscale="linear", xlim=(600, 1000))],
        f"Colour of one-step estimates, by weight of the loss: held-out {options.data}",
        y=list(denoisers), xlabel="time step t", xscale="linear")
    if x0.ndim == 4:
        g, panels = torch.Generator().manual_seed(args.seed), []
        noise = torch.randn(x0.shape, generator=g).to(x0)
        for t in (1000, 950, 700, 500, 300, 100):
            sigma = x0.new_full((len(x0), 1, 1, 1), LEVELS[t - 1].item())
            D = [denoise(x0 + sigma * noise, sigma)[:3] for denoise in denoisers.values()]
            panels.append((f"t = {t}", evaluate.to_uint8(torch.cat([x0[:3], *D]))))
        plot.pictures(args, "images", panels, ["x0", *denoisers])


COMMANDS = {
    "weights": (weights, {}),
    "table": (table, dict(weights=NAMES, T=(2, 5, 10, 20, 50, 100), early=20, sampler="ddpm",
                          seeds=2)),
    "mse": (mse, dict(runs=[], num=64)),
    "onestep": (onestep, dict(runs=[], num=64)),
    "targets": (targets, dict(targets=("eps", "x0", "v"), T=(10, 100), seeds=2,
                              weights=("constant", "inverse-snr", "debias")))}

if __name__ == "__main__":
    sys.exit(plot.main("debias", COMMANDS))
