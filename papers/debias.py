"""papers/debias.py: Debias: which weight should the loss have at each noise level?

    python -m papers.debias table                       from the repository's root

Source: Yu et al. 2024, "Unmasking Bias in Diffusion Model Training" (DB).  DDPM weighs the error of
the predicted noise, |eps_hat - eps|^2, the same at each noise level.  The error of the image is

    x0_hat - x0 = sigma (eps - eps_hat)                                              (eq. 6, 7)

where sigma, 1/sqrt(SNR), is .01 at t = 1 and 157 at t = 1000, where sampling begins.  Debias takes
this sigma as the weight on |eps_hat - eps|^2 (eq. 8).  Runs here predict the noise, on DDPM's
ladder, as the paper's do.  inverse-snr is the weight that the paper calls SNR.
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
    the line before it, where v is the variance of the reverse step, DDPM's beta_t.
    """
    ab = 1 / (1 + levels ** 2)
    beta = 1 - ab / torch.cat([ab.new_ones(1), ab[:-1]])
    printed = beta ** 2 / ((1 - beta) * (1 - ab))
    return printed, printed / (2 * beta)


def weights(args):
    """The paper's weights and the variational bound's, by t (DB figures 2 and 5, eq. 5, 8, 13)."""
    on_eps = {name: WEIGHTS[name](LEVELS) * LEVELS ** 2 for name in NAMES}
    on_eps["bound, as printed"], on_eps["bound, corrected"] = bound_weights(LEVELS)
    shares = {f"share: {name}": w.cumsum(0) / w.sum() for name, w in on_eps.items()}
    columns = dict(t=torch.arange(1, len(LEVELS) + 1), sigma=LEVELS) | on_eps | shares
    plot.show(args, "Weights of the loss by noise level, on DDPM's ladder of 1000 levels",
              plot.rows_of(columns), dict(y=list(on_eps), ylabel="weight on |eps_hat - eps|^2"),
              dict(y=dict(zip(shares, on_eps)), ylabel="share of the weight at levels up to t",
                   yscale="linear"))


# ---- Distances -----------------------------------------------------------------------------------

def variants(args, weights):
    """{weight: the options of its runs}: the user's, where given."""
    base = dict(loss="dsm", schedule="ddpm", eval_every=0, keep=8) | args.options
    return {weight: base | dict(weight=weight) for weight in weights}


def table(args):
    """Distances of samples by weight and number of sampling steps T (DB figs. 1, 6-8, tables 1-3).

    Also in the course of training, in --early steps.  A second picture has images.  --sampler ddim:
    figure 8.  15 minutes.
    """
    (runs, judge), rows = plot.judged(args, variants(args, args.weights)), []
    for T in plot.progress("numbers of steps", args.T):
        rows.append(dict(T=T, step=None) | judge.cells(runs, args.sampler, T))
    saved = {name: [evaluate.checkpoints(run) for run in own] for name, own in runs.items()}
    last = len(saved[args.weights[0]][0]) - 1
    for k in plot.progress("checkpoints", [*range(1, last, 2), last]):
        early = {name: [paths[k] for paths in own] for name, own in saved.items()}
        step = evaluate.load_checkpoint(early[args.weights[0]][0])["step"]
        rows.append(dict(T=None, step=step) | judge.cells(early, args.sampler, args.early))
    plot.show(args, f"Weight of the loss by noise level: {judge.about}, sampler {args.sampler}",
              rows, dict(x="T"), dict(x="step", xlabel=f"training steps, at T = {args.early}"),
              y=args.weights, **judge.axes)
    if len(judge.options.shape) == 3:
        networks, panels = [plot.opened(args, folders[0]) for folders in runs.values()], []
        for T in args.T:
            drawn = [evaluate.generate(*run, range(4), args.sampler, T) for run in networks]
            panels.append((f"T = {T}", torch.cat(drawn)))
        plot.pictures(args, "samples", panels, args.weights)


def targets(args):
    """Distances of samples of networks that predict eps, x0 or v, by weight (DB table 4).

    The weights are those on |eps_hat - eps|^2, whatever the network predicts: constant is the plain
    loss of a network that predicts eps, inverse-snr of one that predicts x0.  25 minutes.
    """
    given = {}
    for target in args.targets:
        change = {} if target == "eps" else dict(precondition=target)     # the schedule's is eps
        for weight, own in variants(args, args.weights).items():
            given[target, weight] = own | change
    (runs, judge), rows = plot.judged(args, given), []
    for weight in plot.progress("weights", args.weights):
        row = dict(weight=weight)
        for T in args.T:
            own = {f"{target}, T = {T}": runs[target, weight] for target in args.targets}
            row |= judge.cells(own, "ddpm", T)
        rows.append(row)
    panels = [dict(y={f"{target}, T = {T}": target for target in args.targets},
                   title=f"T = {T} sampling steps") for T in args.T]
    plot.show(args, f"What the network predicts, by weight of the loss: {judge.about}", rows,
              *panels, xscale="linear", xlabel="weight of the loss", **judge.axes)


# ---- Errors by noise level -----------------------------------------------------------------------

def errors_by_t(denoisers, x0, error, seed):
    """Rows {t, sigma, name: error(D, x0, sigma) of each denoiser}, all with the same noise."""
    g, rows = torch.Generator().manual_seed(seed), []
    for t in plot.progress("noise levels", range(1, len(LEVELS) + 1, 27)):
        sigma = x0.new_full((len(x0), *[1] * (x0.ndim - 1)), LEVELS[t - 1].item())
        x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
        errors = {name: error(D(x, sigma), x0, sigma) for name, D in denoisers.items()}
        rows.append(dict(t=t, sigma=LEVELS[t - 1].item()) | errors)
    return rows


def noise_error(D, x0, sigma):
    """|eps_hat - eps|^2/d = |D - x0|^2/(d sigma^2)."""
    return (((D - x0) / sigma).double() ** 2).mean().item()


def colour_error(D, x0, sigma):
    """The distance of two images' mean colours, or of two points."""
    apart = (D - x0).double().reshape(*x0.shape[:2], -1).mean(2)                  # (B, C)
    return apart.norm(dim=1).mean().item()


def initial(x, sigma):
    """The denoiser whose eps_hat is the network's own input, x/sqrt(1 + sigma^2).  With ab =
    1/(1 + sigma^2) its error is ab E|x0|^2/d + (1 - sqrt(1 - ab))^2."""
    return x - sigma * x / (1 + sigma ** 2).sqrt()


def mse(args):
    """The error of eps_hat by t, of five weights and of the input x_t (DB figures 4, 10).

    "initial" takes the input x_t as its guess of the noise.  A minute, and the training of table.
    --runs: other runs, on one set of data.
    """
    runs, x0, _, options = plot.compared(args, variants(args, NAMES))
    denoisers = dict(initial=initial) | runs
    plot.show(args, f"Error of the predicted noise, by weight of the loss: held-out {options.data}",
              errors_by_t(denoisers, x0, noise_error, args.seed),
              dict(y=list(denoisers), ylabel="|eps_hat - eps|^2/d"))


def onestep(args):
    """One-step estimates x0_hat of five weights, and the error of their colour (DB figure 3).

    x0_hat is D(x0 + sigma eps; sigma).  The posterior mean over the training set shows how much of
    the colour x tells at large t; at small t it is the nearest image of that set.  A second picture
    has the images.  A minute, and the training of table.  --runs: as in mse.
    """
    denoisers, x0, labels, options = plot.compared(args, variants(args, NAMES))
    denoisers["posterior mean"] = plot.data_mean(options, labels)
    plot.show(args, f"Colour of one-step estimates, by weight of the loss: held-out {options.data}",
              errors_by_t(denoisers, x0, colour_error, args.seed),
              dict(ylabel="distance of the mean colours, in [-1, 1]"),
              dict(ylabel="the same, large t alone", yscale="linear", xlim=(600, 1000)),
              y=list(denoisers))
    if x0.ndim == 4:
        g, panels = torch.Generator().manual_seed(args.seed), []
        noise = torch.randn(x0.shape, generator=g).to(x0)
        for t in (1000, 950, 700, 500, 300, 100):
            sigma = x0.new_full((len(x0), 1, 1, 1), LEVELS[t - 1].item())
            D = [denoise(x0 + sigma * noise, sigma)[:3] for denoise in denoisers.values()]
            panels.append((f"t = {t}", torch.cat([x0[:3], *D])))
        plot.pictures(args, "images", panels, ["x0", *denoisers])


COMMANDS = {
    "weights": (weights, {}, ()),
    "table": (table, dict(weights=NAMES, T=(2, 5, 10, 20, 50, 100), early=20, sampler="ddpm",
                          seeds=2), plot.options_but("weight")),
    "mse": (mse, dict(runs=[], num=64), plot.options_but("weight", "fid_num")),
    "onestep": (onestep, dict(runs=[], num=64), plot.options_but("weight", "fid_num")),
    "targets": (targets, dict(targets=("eps", "x0", "v"), T=(10, 100), seeds=2,
                              weights=("constant", "inverse-snr", "debias")),
                plot.options_but("weight", "precondition"))}

if __name__ == "__main__":
    sys.exit(plot.main("debias", COMMANDS))
