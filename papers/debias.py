"""papers/debias.py: the weight of the loss by noise level, after Debias.

    python -m papers.debias table          from the repository's root

DB = Yu et al. 2024, "Unmasking Bias in Diffusion Model Training".  DDPM predicts the noise, and
weighs |eps_hat - eps|^2 the same at each noise level.  The image that a prediction stands for is

    x0_hat = x - sigma eps_hat,    so    x0_hat - x0 = sigma (eps - eps_hat)         (eq. 6, 7)

with sigma = 1/sqrt(SNR), from .01 at t = 1 to 157 at t = 1000: where sampling begins, a small error
of eps_hat is a large error of the image.  Debias takes this factor as the weight,
sigma |eps_hat - eps|^2 (eq. 8).  Runs here predict the noise, on DDPM's ladder, as the paper's do.
inverse-snr is the weight that the paper calls SNR.
"""

import itertools
import sys
from functools import partial

import torch

import evaluate
from evaluate import BadInput, Progress, load_run, run_data
from losses import WEIGHTS, stf_target
from papers.plot import distances, main, mean_and_sd, show, trained
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

    Left: the weight w on |eps_hat - eps|^2; w/sigma^2 is the same as a weight on |x0_hat - x0|^2.
    Right: the share of w that the levels up to t carry.  A second.
    """
    on_eps = {name: WEIGHTS[name](LEVELS) * LEVELS ** 2 for name in NAMES}
    on_eps["bound, printed"], on_eps["bound"] = bound_weights(LEVELS)
    shares = {f"share: {name}": w.cumsum(0) / w.sum() for name, w in on_eps.items()}
    rows = torch.stack([LEVELS, *on_eps.values(), *shares.values()], 1).tolist()
    shared = dict(xlabel="t", xscale="linear")
    panels = [dict(shared, y=list(on_eps), ylabel="weight on |eps_hat - eps|^2", legend=False),
              dict(shared, y=dict(zip(shares, on_eps)), ylabel="share of it up to t",
                   yscale="linear")]
    show(args, ["t", "sigma", *on_eps, *shares], [[t, *row] for t, row in enumerate(rows, 1)],
         panels, "Weights of the loss by noise level, on DDPM's ladder of 1000 levels")


# ---- Distances -----------------------------------------------------------------------------------

def base(args):
    """The options that all runs here share, but for those that the user gives."""
    return dict(loss="dsm", schedule="ddpm", eval_every=0, keep=8) | args.options


def table(args):
    """Samples of five weights, by the number of sampling steps T (DB figures 1, 6-8, tables 1-3).

    Frechet distances to the data, mean and standard deviation over seeds; less is better.  The
    right half of the picture has samples in --early steps in the course of training.  The paper
    says that Debias is best for all T, most of all in few steps.  On digits it is by far in 5 and
    10 steps (at T = 10 constant 469, p2 56, Debias 36, floor 13), but p2 is from 20 steps on (at
    T = 50 24 and 37).  --sampler ddim: figure 8.  15 minutes.
    """
    def draws(folder):
        for T in args.T:
            yield (T, None), folder, dict(sampler=args.sampler, steps=T)
        saved = evaluate.checkpoints(folder)
        for path in [*saved[1:-1:2], saved[-1]]:
            step = evaluate.load_checkpoint(path)["step"]
            yield (None, step), path, dict(sampler=args.sampler, steps=args.early)

    variants = {name: base(args) | dict(weight=name) for name in args.weights}
    found, judge = distances(args, variants, draws)
    options, floor = judge.options, judge.floor
    rows = [[*case, *(x for name in args.weights for x in mean_and_sd(values[name]))]
            for case, values in found.items()]
    spread = {name: f"sd {name}" for name in args.weights}
    columns = ["T", "step", *itertools.chain(*spread.items())]
    shared = dict(y=args.weights, spread=spread, marker="o", floor=floor,
                  ylabel=judge.name)
    panels = [dict(shared, x="T", xlabel="sampling steps T", legend=False),
              dict(shared, x="step", xlabel=f"training steps, at T = {args.early}",
                   xscale="linear")]
    show(args, columns, rows, panels, f"Weight of the loss by noise level: {options.data}, "
         f"{options.steps} training steps, sampler {args.sampler}, floor {floor:.4g}")
    if len(options.shape) == 3:
        captions, path = [], f"{args.out}/debias-table-samples.png"
        for T in args.T:
            captions.append((f"T = {T}", samples(args, T)))
        evaluate.save_pictures(path, captions, args.weights)
        print(path)


def samples(args, T, each=4):
    """Samples of the first seed's runs, the same noise for all: uint8 (weights each, C, H, W)."""
    drawn = []
    for name in args.weights:
        folder = trained(base(args), weight=name, seed=args.seed)
        drawn.append(evaluate.generate(*load_run(folder, args.options.get("device")), range(each),
                                       args.sampler, T))
    return evaluate.to_uint8(torch.cat(drawn))


def targets(args):
    """Networks that predict eps, x0 or v, under three weights (DB table 4).

    The weights are those on |eps_hat - eps|^2, whatever the network predicts: constant is the plain
    loss of a network that predicts eps, inverse-snr of one that predicts x0.  Distances as in
    table.  The paper has one weight for x0 and v, and finds Debias with eps best.  25 minutes.
    """
    def draws(folder):
        for T in args.T:
            yield T, folder, dict(sampler="ddpm", steps=T)

    variants = {}
    for target, weight in itertools.product(args.targets, args.weights):
        own = {} if target == "eps" else dict(precondition=target)   # eps: the schedule's, as above
        variants[target, weight] = base(args) | dict(own, weight=weight)
    found, judge = distances(args, variants, draws)
    options, floor = judge.options, judge.floor
    columns, rows, panels = ["weight"], [[weight] for weight in args.weights], []
    for T, values in found.items():
        names = {f"{target}, T = {T}": target for target in args.targets}
        spread = {name: f"sd {name}" for name in names}
        columns += itertools.chain(*spread.items())
        for row in rows:
            row += [x for target in args.targets for x in mean_and_sd(values[target, row[0]])]
        panels.append(dict(y=names, spread=spread, marker="o", floor=floor, xscale="linear",
                           xlabel="weight of the loss", title=f"T = {T} sampling steps",
                           ylabel=judge.name))
    show(args, columns, rows, panels, f"What the network predicts, by weight of the loss: "
         f"{options.data}, {options.steps} training steps, floor {floor:.4g}")


# ---- Errors by noise level -----------------------------------------------------------------------

def compared(args):
    """The runs that a command compares, {name: (network, options)}, held-out x0, their labels.

    Without args.runs these are the table's, of the first seed, trained where they are not yet.
    """
    folders = {folder: folder for folder in args.runs} or {
        name: trained(base(args), weight=name, seed=args.seed) for name in NAMES}
    runs = {name: load_run(folder, args.options.get("device")) for name, folder in folders.items()}
    (first, (_, options)), *others = runs.items()
    for name, (_, own) in others:
        if (own.fingerprint, own.classes) != (options.fingerprint, options.classes):
            raise BadInput(f"{name} was trained on other data or classes than {first}; name runs "
                           "that were trained on the same")
    return runs, *evaluate.held_out(run_data(options), options, args.num)


@torch.no_grad()
def errors_by_t(denoisers, x0, error, seed, each=27):
    """Rows t, sigma, error(D, x0, sigma) of each denoiser, all with the same noise."""
    g, rows, levels = torch.Generator().manual_seed(seed), [], range(1, len(LEVELS) + 1, each)
    told = Progress("noise levels", len(levels))
    for t in levels:
        sigma = x0.new_full((len(x0), *[1] * (x0.ndim - 1)), LEVELS[t - 1].item())
        x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
        errors = [error(denoise(x, sigma), x0, sigma) for denoise in denoisers.values()]
        rows.append([t, LEVELS[t - 1].item(), *errors])
        told(len(rows))
    return rows


def noise_error(D, x0, sigma):
    """|eps_hat - eps|^2/d = |D - x0|^2/(d sigma^2)."""
    return (((D - x0) / sigma).double() ** 2).mean().item()


def colour_error(D, x0, sigma):
    """The distance of two images' mean colours; of points, whose coordinates are their colour."""
    apart = (D - x0).double()
    if apart.ndim > 2:
        apart = apart.flatten(2).mean(2)                                          # (B, C)
    return apart.norm(dim=1).mean().item()


def initial(x, sigma):
    """The denoiser whose eps_hat is the network's own input, x/sqrt(1 + sigma^2)."""
    return x - sigma * x / (1 + sigma ** 2).sqrt()


def mse(args):
    """The error of eps_hat by t, of five weights and of the input x_t (DB figures 4, 10).

    The input as a guess of the noise, "initial", has, with ab = 1/(1 + sigma^2), the error

        E |x_t - eps|^2/d = ab E|x0|^2/d + (1 - sqrt(1 - ab))^2

    The paper says: at t > 950 a network under constant weights does worse, under Debias better;
    inverse-snr is as good as Debias there, but bad at small t.  On digits constant does worse from
    t = 700 on, and Debias does, too, from 800 on: a seventh of the error of constant at t = 1000,
    but 32 times that of the input.  The images are held out.  A minute, and the training of table.
    RUN: other runs, on one set of data.
    """
    runs, x0, labels = compared(args)
    denoisers = {"initial": initial}
    for name, (network, options) in runs.items():
        denoisers[name] = partial(network, labels=labels)
    rows = errors_by_t(denoisers, x0, noise_error, args.seed)
    rows = [[*row, *(error / row[2] for error in row[2:])] for row in rows]
    ratios = {f"{name}/initial": name for name in denoisers}
    shared = dict(xlabel="t", xscale="linear")
    panels = [dict(shared, y=list(denoisers), ylabel="|eps_hat - eps|^2/d"),
              dict(shared, y=ratios, ylabel="the same over that of the input", legend=False)]
    show(args, ["t", "sigma", *denoisers, *ratios], rows, panels,
         f"Error of the predicted noise, by weight of the loss: held-out {options.data}")


def onestep(args):
    """One-step estimates x0_hat of five weights, and the error of their colour (DB figures 3, 12).

        x0_hat = D(x0 + sigma eps; sigma),    error = |mean colour of x0_hat - that of x0|

    At large t x hardly tells of x0, and no denoiser knows the colour: the posterior mean over the
    training set shows how much is known (at small t it is the nearest image of that set).  The
    paper says that constant weights shift the colour at t > 950, and Debias does not.  On digits
    the errors at t = 1000 are 12 and 2, where .3 is possible.  -images.png: x0_hat by t;
    -sampling.png: x0_hat of each sampling step.  A minute, and the training of table.  RUN: as in
    mse.
    """
    runs, x0, labels = compared(args)
    denoisers = {}
    for name, (network, options) in runs.items():
        denoisers[name] = partial(network, labels=labels)
    data = run_data(options)
    classes = None if labels is None else torch.from_numpy(data.labels).to(x0.device)
    denoisers["posterior mean"] = partial(stf_target, reference=torch.from_numpy(data.x),
                                          labels=labels, reference_labels=classes)
    rows = errors_by_t(denoisers, x0, colour_error, args.seed)
    shared = dict(y=list(denoisers), xlabel="t", xscale="linear")
    panels = [dict(shared, ylabel="distance of the mean colours, in [-1, 1]"),
              dict(shared, yscale="linear", xlim=(600, 1000), ylabel="the same, large t alone")]
    show(args, ["t", "sigma", *denoisers], rows, panels,
         f"Colour of one-step estimates, by weight of the loss: held-out {options.data}")
    if x0.ndim == 4:
        path = f"{args.out}/debias-onestep"
        evaluate.save_pictures(f"{path}-images.png", one_step_panels(denoisers, x0, args.seed),
                               ["x0", *denoisers])
        evaluate.save_pictures(f"{path}-sampling.png", sampling_panels(runs, args.T), list(runs))
        print(f"{path}-images.png\n{path}-sampling.png")


@torch.no_grad()
def one_step_panels(denoisers, x0, seed, shown=3):
    """For each of some t: x0, and its one-step estimates, a row for each denoiser."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    panels = []
    for t in (1000, 950, 700, 500, 300, 100):
        sigma = x0.new_full((len(x0), 1, 1, 1), LEVELS[t - 1].item())
        D = [denoise(x0 + sigma * noise, sigma)[:shown] for denoise in denoisers.values()]
        panels.append((f"t = {t}", evaluate.to_uint8(torch.cat([x0[:shown], *D]))))
    return panels


def sampling_panels(runs, T, shown=2):
    """For each step of ancestral sampling: the estimates x0_hat, a row for each network."""
    estimates = []

    def watched(network, x, sigma, *labels):
        estimates.append(network(x, sigma, *labels))
        return estimates[-1]

    for network, options in runs.values():
        evaluate.generate(partial(watched, network), options, range(shown), "ddpm", T,
                          schedule=DDPM())
    t = torch.searchsorted(LEVELS, DDPM().time_steps(T)[:-1]) + 1
    return [(f"t = {number}", evaluate.to_uint8(torch.cat(estimates[i::T])))
            for i, number in enumerate(t.tolist())]


COMMANDS = {
    "weights": (weights, {}),
    "table": (table, dict(weights=NAMES, T=(2, 5, 10, 20, 50, 100), early=20, sampler="ddpm",
                          seeds=2)),
    "mse": (mse, dict(runs=[], num=64)),
    "onestep": (onestep, dict(runs=[], num=64, T=10)),
    "targets": (targets, dict(targets=("eps", "x0", "v"), T=(10, 100), seeds=2,
                              weights=("constant", "inverse-snr", "debias")))}

if __name__ == "__main__":
    sys.exit(main("debias", COMMANDS))
