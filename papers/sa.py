"""papers/sa.py: SA-DPM: losses on sequences of noise levels.

    python -m papers.sa table                           from the repository's root

Source: Nguyen et al. 2024, "On Inference Stability for Diffusion Models" (SA).  The errors of all
steps of a sampler add up, to d.  dsm, plain score matching, asks that each error be small.  SA-K
(losses.sa_loss) also asks that K consecutive ones cancel:

    d = sum_i tau_i (eps_hat_i - eps_i)                                              (Theorem 1)
    L = |eps_hat_t - eps_t|^2 + lam |1/K sum_s tau_s (eps_hat_s - eps_s)|^2          (sec. 3.2)

Runs have constant weights, DDPM's ladder and equal numbers of steps, as the paper's; a step of SA-K
costs about K steps of dsm.  train.py's --tau, --level-noise and --windows apply to SA-K alone.
"""

import itertools
import sys

import torch

import evaluate
import train
from losses import sa_tau
from papers import plot
from samplers import analytic_covariance, ddpm, seeded_noise
from schedules import DDPM

LEVELS = DDPM().levels                                       # sigma of t = 1 ... 1000
LOSSES = {"dsm": dict(loss="dsm"), "SA-2": dict(loss="sa", K=2, lam=1.0),
          "SA-3": dict(loss="sa", K=3, lam=0.3), "SA-4": dict(loss="sa", K=4, lam=0.2)}


# ---- Distances -----------------------------------------------------------------------------------

def given(args, loss):
    """The options of a run with this loss: the user's, where they apply to it."""
    options = dict(schedule="ddpm", weight="constant", steps=400, eval_every=0)
    for name, value in args.options.items():
        if train.BELONGS.get(name) in (None, ("loss", loss)):
            options[name] = value
    return options


def variants(args):
    """{name: the options of its runs} for each of LOSSES."""
    return {name: given(args, own["loss"]) | own for name, own in LOSSES.items()}


def ways(args, folders, name):
    """[(run, variance), ...]: how one of table's samplers draws from a loss's runs of all seeds."""
    if name == "analytic":
        found = [evaluate.analytic_moments(*plot.opened(args, folder)) for folder in folders]
        return [(folder, analytic_covariance(*own)) for folder, own in zip(folders, found)]
    if name in ("sn", "npr"):
        plain = given(args, None) | dict(head=name, steps=args.head)
        for option in train.NOT_FOR_HEADS:
            plain.pop(option, None)
        return [(plot.trained(plain | dict(init=folder, seed=seed)), name)
                for seed, folder in enumerate(folders, args.seed)]
    variance = name if name in evaluate.VARIANCES else None
    return [(folder, variance) for folder in folders]


def table(args):
    """Distances of samples after dsm and SA-2, -3, -4, by sampler and steps T (SA tables 1, 3).

    The samplers analytic, sn and npr are ddpm with another variance: Analytic-DPM's, SN-DPM's and
    NPR-DPM's, whose second heads are trained afterwards in --head steps.  20 minutes on two cores.
    """
    (runs, judge), rows = plot.judged(args, variants(args)), []
    for name in plot.progress("samplers", args.samplers):
        sampler = "ddpm" if name in evaluate.VARIANCES else name
        own = {loss: ways(args, folders, name) for loss, folders in runs.items()}
        for T in args.T:
            row = dict(sampler=name, T=T)
            for loss, pairs in own.items():
                found = [judge([run], sampler, T, variance=variance)[0] for run, variance in pairs]
                row[loss], row[f"sd {loss}"] = plot.mean_and_sd(found)
            rows.append(row)
    panels = [dict(where=("sampler", name), title=f"sampler {name}") for name in args.samplers]
    plot.show(args, f"Sequence-aware losses, by sampler: {judge.about}", rows, *panels, x="T",
              y=list(LOSSES), **judge.axes)


def ablation(args):
    """Distances of samples by ddpm, by the weight lam of SA-K's second term (SA table 4).

    25 minutes, beside those of table.
    """
    losses = dict(dsm=given(args, "dsm") | LOSSES["dsm"])
    for K, lam in itertools.product(args.K, args.lam):
        losses[K, lam] = given(args, "sa") | dict(loss="sa", K=K, lam=lam)
    (runs, judge), rows = plot.judged(args, losses), []
    for T, lam in plot.progress("rows", list(itertools.product(args.T, args.lam))):
        own = dict(dsm=runs["dsm"]) | {f"SA-{K}": runs[K, lam] for K in args.K}
        rows.append(dict(T=T, lam=lam) | judge.cells(own, "ddpm", T))
    panels = [dict(where=("T", T), title=f"T = {T} sampling steps") for T in args.T]
    plot.show(args, f"Weight of SA's second term: {judge.about}", rows, *panels, x="lam",
              y=list(own), xlabel="lam, weight of the second term", **judge.axes)


# ---- Estimation gap ------------------------------------------------------------------------------

def estimation_gap(denoise, x0, ladder, noise):
    """How far errors of eps_hat have led sampling astray, step by step (SA Theorem 1, fig. 4).

        d_t = sum_{i>t} tau_i (eps_hat(x_i) - eps_i),     eps_i = (x_i - x0)/sigma_i

    x_i are ancestral sampling's own states from x_T = x0 + sigma_T noise().  d_1 is the x_1 of the
    true reverse process, which knows x0, less the model's from the same noise, in DDPM's frame.
    d_t is the gap as it will be at x_1.  At x_t it is larger: a step from i shrinks it by
    (sigma_{i-1}/sigma_i)^2.

    ladder (T,), noise() -> (B, ...).  Returns (T - 1, 3), t = T-1 ... 1: the gap's mean at x_t over
    samples and coordinates, its rms, and the rms that unrelated errors would give.
    """
    found, d, squares = [], 0, 0
    tau = iter(sa_tau(ladder, torch.arange(len(ladder), 1, -1), 1, "paper")[0])

    def watched(x, sigma):
        nonlocal d, squares
        D = denoise(x, sigma)
        error = next(tau) * (x0 - D) / sigma                             # tau (eps_hat - eps)
        d, squares = d + error, squares + error.square().mean()
        found.append(torch.stack([d.mean(), d.square().mean().sqrt(), squares.sqrt()]))
        return D

    ddpm(watched, x0 + ladder[-1] * noise(), ladder.flip(0), noise)
    carried = ladder ** 2 / (1 + ladder ** 2).sqrt()
    back = (carried / carried[0])[:-1].flip(0)                           # t = T-1 ... 1
    return back[:, None] * torch.stack(found).double().cpu()


def gap(args):
    """How far sampling from x_300 is led astray, of dsm and SA-2, -3, -4 (SA figures 1, 4).

    At each x_t, over images and pixels: the gap's mean with its sign, as in the authors' code; its
    rms; and the ratio of that rms to the rms of unrelated errors: above 1 the errors of the steps
    add up, below 1 they cancel.  3 minutes, and the training of table.  --runs: other runs, on one
    set of data.
    """
    denoisers, x0, _, options = plot.compared(args, variants(args))
    columns, panels = dict(t=torch.arange(args.start - 1, 0, -1.0)), []
    for name in plot.progress("runs", denoisers):
        noise = seeded_noise(range(args.seed, args.seed + len(x0)), x0.shape[1:], x0.device)
        d = estimation_gap(denoisers[name], x0, LEVELS[:args.start], noise)
        mean, rms, unrelated = d.T
        columns |= {f"{name}: mean": mean, f"{name}: rms": rms, f"{name}: ratio": rms / unrelated}
    for kind, label in [("mean", "gap at x_t, mean with sign"), ("rms", "gap at x_t, rms"),
                        ("ratio", "rms over that of unrelated errors")]:
        panels.append(dict(y={f"{name}: {kind}": name for name in denoisers}, ylabel=label))
    plot.show(args, f"Sampling of {len(x0)} held-out images of {options.data} from x_{args.start}: "
              "how far the steps' errors have led it astray", plot.rows_of(columns), *panels,
              yscale="linear", xlim=(args.start, 0))


# ---- Factors and bias ----------------------------------------------------------------------------

def gaussian_factor(levels, K, lam, path):
    """How much of the noise SA-K's minimiser predicts, of what it should, by t: (T,).

    Data N(0, 1) and predictors eps_hat_s = c_s x_s.  The loss is quadratic in c, with the moments,
    for s < r,  E x_s x_r = 1 + [sigma_s^2],  E x_s eps_r = [sigma_s^2/sigma_r],  E x_r eps_s =
    [sigma_s]: a bracket counts for noises of one path, and is 0 for independent noises, which share
    x0 alone.  The factor is c_s over that of E[eps_s | x_s], sigma_s/(1 + sigma_s^2).
    """
    row, column = levels[:, None], levels
    low, high = torch.minimum(row, column), torch.maximum(row, column)
    xx, xe = 1 + low ** 2, row * low / high
    if not path:
        xx, xe = 1 + torch.diag(levels ** 2), torch.diag(levels)
    together = torch.zeros_like(xx)                                    # windows with both levels
    for t in range(1, len(levels) + 1):
        window = slice(max(t - K, 0), t)
        together[window, window] += lam / K ** 2
    A = torch.diag(1 + levels ** 2) + together * xx
    c = torch.linalg.solve(A, levels + (together * xe).sum(1))
    return c * (1 + levels ** 2) / levels


def tau(args):
    """Theorem 1's factors tau, and how noises bias SA-K's minimiser (SA Theorem 1).

    Left: tau, by which an error of eps_hat at t moves the sample at the end.  Right: the noise that
    SA-K's minimiser predicts on data N(0, 1), with tau = 1, over the best prediction.  Seconds.
    """
    found = sa_tau(LEVELS, torch.arange(1, len(LEVELS) + 1), 1, "paper")[0]
    found[0] = torch.nan                                     # tau_1 = 0, not on a log scale
    columns = dict(t=torch.arange(1, len(LEVELS) + 1), sigma=LEVELS, tau=found)
    for K, lam, noises in [(2, 1.0, "independent"), (3, 0.3, "independent"),
                           (4, 0.2, "independent"), (2, 1.0, "path")]:
        factor = gaussian_factor(LEVELS, K, lam, noises == "path")
        columns[f"SA-{K}, {noises}"] = factor
    plot.show(args, "SA-K: factors of the errors, and the bias of its minimiser on data N(0, 1)",
              plot.rows_of(columns), dict(y=["tau"], ylabel="tau of Theorem 1"),
              dict(y=list(columns)[3:], yscale="linear", ylim=(0.6, 1.02),
                   ylabel="predicted noise/best prediction"), xscale="log")


SET = "loss", "K", "lam", "order", "P_mean", "P_std"
PASSED = plot.options_but(*SET)
COMMANDS = {
    "table": (table, dict(samplers=("ddpm", "ddim", "analytic", "sn", "npr"), T=(10, 20, 50, 100),
                          head=150, seeds=2), PASSED),
    "ablation": (ablation, dict(K=(2, 3, 4), lam=(0.2, 0.3, 1.0), T=(10, 50), seeds=2), PASSED),
    "gap": (gap, dict(runs=[], num=64, start=300), plot.options_but(*SET, "fid_num")),
    "tau": (tau, {}, ())}

if __name__ == "__main__":
    sys.exit(plot.main("sa", COMMANDS))
