"""papers/edm.py: Elucidating the design space (EDM): sampling and training, one choice at a time.

    python -m papers.edm solvers                        from the repository's root

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
Commands share train.py's default run, which is trained once in 2 minutes on one core; those with
--runs share that run with two seeds.  --run and --runs name others.
"""

import copy
import itertools
import math
import sys
from functools import partial
from operator import itemgetter

import torch

import evaluate
from papers import plot
from samplers import euler, heun
from schedules import EDM, VE, VP


# ---- Runs and distances --------------------------------------------------------------------------

def open_run(args):
    """The denoiser of args.run, or of the run that the commands share, and its options."""
    return plot.opened(args, args.run or plot.trained(args.options | dict(seed=args.seed)))


def shared_runs(args):
    """args.runs, or the shared runs of two seeds, and their plot.Judge."""
    seeds = args.seed, args.seed + 1
    runs = args.runs or [plot.trained(args.options | dict(seed=seed)) for seed in seeds]
    return runs, plot.Judge(args, runs[0])


# ---- Denoising -----------------------------------------------------------------------------------

def denoise(args):
    """What the ideal denoiser and a trained one make of noisy images: EDM figure 1.

    The ideal denoiser minimises the loss over the data, or over the class that it is told: it is
    losses.stf_target of all rows (appendix B.3).  A second picture has images.  Half a minute, and
    the run.
    """
    denoiser, options = open_run(args)
    data, g = evaluate.run_data(options), torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(data.x), generator=g)[:args.num]
    x0, labels = evaluate.take(data, chosen, options.device)
    labels = labels if options.classes else None
    ideal = plot.data_mean(options, labels)

    def apart(x, y):
        return (x - y).square().mean().sqrt().item()

    noise, rows, panels = torch.randn(x0.shape, generator=g).to(x0), [], []
    one = x0.new_ones(len(x0), *[1] * (x0.ndim - 1))
    mean = ideal(x0, 1e5 * one)                      # so much noise leaves nothing of x0 to be seen
    for sigma in torch.tensor(sorted(args.levels)):
        x = x0 + sigma * noise
        best, network = ideal(x, sigma * one), evaluate.in_batches(denoiser, x, sigma, labels)
        rows.append({"sigma": sigma.item(), "ideal - x0": apart(best, x0),
                     "ideal - mean": apart(best, mean), "net - ideal": apart(network, best)})
        scaled = x / (1 + (sigma / 0.5) ** 2).sqrt()           # as the paper does, to be seen
        two = torch.stack([scaled, best, network], 1)[:2].flatten(0, 1)
        panels.append((f"sigma {sigma:g}", two))
    plot.show(args, f"Distances of denoised images: {options.data}", rows,
              dict(y={"ideal - x0": "ideal denoiser to the clean image",
                      "ideal - mean": "ideal denoiser to the data's mean",
                      "net - ideal": "trained network to the ideal denoiser"}),
              ylabel="rms distance", yscale="linear", marker=".")
    if x0.ndim == 4:
        plot.pictures(args, "images", panels, ["noisy, scaled", "ideal", "network"] * len(x0[:2]))


# ---- Sampling ------------------------------------------------------------------------------------

def with_edm_steps(schedule):
    """The schedule with EDM's noise levels at its time steps, t_i = sigma^{-1}(sigma_i)."""
    def time_steps(N):
        return schedule.sigma_inv(EDM().time_steps(N))
    mixed = copy.copy(schedule)
    mixed.time_steps = time_steps
    return mixed


def solvers(args):
    """Solver, time steps and schedule of the sampler, changed one by one: EDM figure 2.

    First Euler's and Heun's method, and rk45, which chooses its steps, on VP's time steps, sigma(t)
    and s(t); then EDM's time steps; then EDM's sigma(t) = t and s(t) = 1, too.  7 minutes on one
    core, and the runs.
    """
    curves = {"Euler, VP": ("euler", VP()), "Heun, VP": ("heun", VP()),
              "Heun, VP at EDM's steps": ("heun", with_edm_steps(VP())),
              "Heun, EDM": ("heun", EDM()), "Euler, EDM": ("euler", EDM())}
    (runs, judge), rows = shared_runs(args), []
    for N in plot.progress("numbers of steps", args.N):
        row = {"NFE": 2 * N - 1}
        for name, (sampler, schedule) in curves.items():
            steps = 2 * N - 1 if sampler == "euler" else N
            row |= judge.cells({name: runs}, sampler, steps, schedule=schedule)
        rows.append(row | {"rk45, VP": None, "sd rk45, VP": None})
    for rtol in plot.progress("tolerances", args.rtol):
        mean, sd, nfe = judge(runs, "rk45", 2, schedule=VP(), rtol=rtol)
        rows.append(dict.fromkeys(row) | {"NFE": nfe, "rk45, VP": mean, "sd rk45, VP": sd})
    plot.show(args, f"Solver, time steps, schedule of the sampler: {judge.about}",
              sorted(rows, key=itemgetter("NFE")),
              dict(y=[*curves, "rk45, VP"], xlabel="NFE: calls of the network for a sample"),
              **judge.axes)


def flow_lines(sampler, schedule, sigma, starts):
    """Lines of the probability flow of data at +1 and -1, where D(x; sigma) = tanh(x/sigma^2).

    sigma (N,) falling, starts (n,) in standard deviations of x at sigma[0] -> t (N,), x (N, n).
    """
    def D(x, sigma):
        return (x / sigma ** 2).tanh()

    def keep(i, x_i):
        x.append(x_i)
    t = schedule.sigma_inv(sigma)
    x = [schedule.s(t[0]) * (1 + sigma[0] ** 2).sqrt() * starts]
    sampler(D, x[0], t, schedule, callback=keep)
    return t, torch.stack(x)


def trajectories(args):
    """The flow's lines in 1-D under three schedules, and how curved they are: EDM figure 3.

    Data at +1 and -1.  The table has the error of Euler's method, which on straight lines makes
    none: rms over levels and lines.  A second picture has the lines.  Seconds.
    """
    starts = torch.tensor([-2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64)
    schedules, tops = dict(VP=VP(), VE=VE(), EDM=EDM()), (25, 1)
    rows = [dict(steps=N) for N in (5, 10, 15, 30, 75, 150)]                  # 150's divisors
    lines, panels = [], []
    for top, (name, schedule) in itertools.product(tops, schedules.items()):
        sigma = EDM(sigma_max=top).time_steps(151)[:-1]                           # (151,)
        t, x = flow_lines(heun, schedule, sigma, starts)                          # (151, 8)
        deviation = (schedule.s(t) * (1 + sigma ** 2).sqrt())[:, None]
        for row in rows:
            k = 150 // row["steps"]
            coarse = flow_lines(euler, schedule, sigma[::k], starts)[1]
            error = (coarse - x[::k]) / deviation[::k]
            row[f"{name}, {top}"] = error.square().mean().sqrt().item()
        title = f"{name}, from sigma {top} down"
        panels.append(dict(where=("panel", title), title=title))
        for start, line in zip(starts.tolist(), x.T.tolist()):
            lines += [dict(panel=title, start=start, t=t, x=x) for t, x in zip(t.tolist(), line)]
    plot.show(args, "Euler's error under three schedules, same noise levels: data at +1 and -1",
              rows, *[dict(y={f"{name}, {top}": name for name in schedules},
                           title=f"from sigma {top} down") for top in tops],
              xlabel="steps of Euler's method", ylabel="error, in standard deviations of x",
              marker=".")
    plot.draw(f"{args.out}/edm-trajectories-lines.png",
              "Lines of the probability flow of data at +1 and -1 under three schedules", lines,
              *panels, x="t", y=["x"], by="start", xlabel="time t", ylabel="x", yscale="linear")


def churn(args):
    """Stochastic sampling with its limits on and off, beside deterministic: EDM figure 4.

    Where S_tmin <= sigma <= S_tmax, a step first raises sigma by the share gamma =
    min(S_churn/N, sqrt(2) - 1), with noise times S_noise.  all: limits and S_noise as given;
    interval: S_noise = 1; S_noise: no limits; neither: no limits, S_noise = 1.  Beside them Heun's
    method, without noise, and Euler-Maruyama (SDE), at the same NFE.  5 minutes on one core, and
    the runs.
    """
    (runs, judge), rows, panels = shared_runs(args), [], []
    interval, S_noise = dict(S_tmin=args.S_tmin, S_tmax=args.S_tmax), dict(S_noise=args.S_noise)
    settings = dict(all=interval | S_noise, interval=interval, S_noise=S_noise, neither={})
    at = f"{args.S_tmin:g} <= sigma <= {args.S_tmax:g}"
    labels = {"all": f"{at}, S_noise {args.S_noise:g}", "interval": f"{at}, S_noise 1",
              "S_noise": f"any sigma, S_noise {args.S_noise:g}", "neither": "any sigma, S_noise 1",
              "Heun": "Heun, no noise", "SDE": "Euler-Maruyama"}
    for N in plot.progress("numbers of steps", args.N):
        others = judge.cells(dict(Heun=runs), "heun", N, schedule=EDM())
        others |= judge.cells(dict(SDE=runs), "euler-maruyama", 2 * N - 1, schedule=EDM())
        for S_churn in args.S_churn:
            row = dict(N=N, S_churn=S_churn)
            for name, how in settings.items():
                row |= judge.cells({name: runs}, "edm-stochastic", N, schedule=EDM(),
                                   S_churn=S_churn, **how)
            rows.append(row | others)
        panels.append(dict(where=("N", N), title=f"{N} steps, NFE {2 * N - 1}"))
    plot.show(args, f"Fresh noise while sampling: {judge.about}", rows, *panels, x="S_churn",
              xscale="linear", y=labels, xlabel="S_churn, amount of noise", **judge.axes)


def local_errors(denoise, x, sigma, fine=16):
    """The error that one step of Euler's and of Heun's method adds, rms over x's coordinates.

    sigma (N,) falling, x (B, ...) at sigma[0].  From each sigma_i to the next, Heun's method with
    `fine` small steps gives the true x, at which the next step starts -> [{sigma, Euler, Heun}].
    """
    schedule, errors = EDM(), []
    for a, b in zip(sigma[:-1], sigma[1:]):
        small = EDM(sigma_min=b.item(), sigma_max=a.item()).time_steps(fine + 1)[:-1]
        true = heun(denoise, x, small, schedule)
        row = dict(sigma=a.item())
        for name, step in dict(Euler=euler, Heun=heun).items():
            error = step(denoise, x, torch.stack([a, b]), schedule) - true
            row[name] = error.square().mean().sqrt().item()
        errors.append(row)
        x = true
    return errors


def truncation(args):
    """The error that one step adds, by noise level, for rho = 1, 3, 7, 10: EDM figure 13.

    Rms over pixels and --num samples, against 16 small steps; and the distance of samples by Heun's
    method with this rho.  3 minutes, and the runs.
    """
    (runs, judge), rows = shared_runs(args), []
    (denoiser, options), g = plot.opened(args, runs[0]), torch.Generator().manual_seed(args.seed)
    labels = evaluate.draw_labels(range(args.num), options)
    if labels is not None:
        labels = labels.to(options.device)
    noise = torch.randn(args.num, *options.shape, generator=g).to(options.device)
    for rho in plot.progress("values of rho", args.rho):
        schedule = EDM(rho=rho)
        samples = judge.cells(dict(samples=runs), "heun", args.N, schedule=schedule)
        for errors in local_errors(partial(denoiser, labels=labels), schedule.sigma_max * noise,
                                   schedule.time_steps(args.N)[:-1]):
            rows.append(dict(rho=rho) | errors | samples)
    plot.show(args, f"Local truncation error by rho, {args.N} steps: {options.data}", rows,
              *[dict(x="sigma", y=[how], by="rho", title=f"one step of {how}'s method",
                     xlabel="noise level sigma at which the step starts", ylabel="rms error")
                for how in ("Euler", "Heun")],
              dict(judge.axes, y=["samples"], xlabel="rho", xscale="linear",
                   title="samples of Heun's method"), marker=".")


# ---- Training ------------------------------------------------------------------------------------

CONFIGS = {       # each has the options of those before it, too
    "A: VP": dict(loss="dsm", schedule="vp", lr=8e-4, ema=(3500,), mult=(1, 2, 2, 2)),
    "B: + training": dict(lr=4e-3, ema=(2000,), clip=1e9),
    "C: + capacity": dict(mult=(2, 2, 2)),
    "D: + scaling": dict(precondition="edm"),
    "E: + loss": dict(schedule="edm"),
    "F: + augmentation": dict(augment=0.12)}


def configs(args):
    """EDM's changes to training, CONFIGS A to F, one after the other, at equal steps: EDM table 2.

    Samples are by Heun's method with EDM's 18 time steps.  Left out: B's larger batch and dropout.
    13 minutes on one core.
    """
    variants, options = {}, dict(steps=400)
    for name, change in CONFIGS.items():
        options = options | change
        variants[name] = options | args.options
    (runs, judge), rows = plot.judged(args, variants), []
    for name, folders in runs.items():
        cells = judge.cells(dict(mean=folders), "heun", 18, schedule=EDM())
        rows.append(dict(config=name) | cells)
    plot.show(args, f"EDM's changes to training: {judge.about}", rows,
              dict(y=dict(mean=f"mean and sd of {args.seeds} seeds"), xscale="linear",
                   xlabel="each with all the changes before it"), **judge.axes)


def loss(args):
    """The loss by noise level before and after training, and where training looks: EDM figure 5a.

        weight(sigma) E|D(x0 + sigma eps; sigma) - x0|^2/d,    and the density of ln sigma

    on images that training did not see.  Half a minute, and the run.
    """
    denoiser, options = open_run(args)
    torch.manual_seed(options.seed)                                # so does train.py's run begin
    fresh = evaluate.build_denoiser(options).to(options.device).eval()
    x0, labels = evaluate.held_out(evaluate.run_data(options), options, args.num)
    levels = torch.logspace(math.log10(0.005), math.log10(80), 22)
    before, after = (evaluate.denoising_error(network, x0, labels, levels.tolist())
                     for network in (fresh, denoiser))
    weight = evaluate.build_weight(options)(levels)
    density = plot.log_density(evaluate.build_schedule(options), levels)
    columns = dict(sigma=levels, before=weight * torch.tensor(before),
                   after=weight * torch.tensor(after), density=density)
    plot.show(args, f"Loss by noise level, and where training looks: {options.data}, "
              f"{options.loss} loss, {options.schedule} schedule", plot.rows_of(columns),
              dict(y={"before": "before training", "after": f"after {options.step} steps"},
                   ylim=(0, None), ylabel="loss, weighted as in training", marker="."),
              dict(y=["density"], ylabel="density of ln sigma in training"), yscale="linear")


ALL, UNJUDGED = plot.options_but(), plot.options_but("fid_num")
COMMANDS = {
    "denoise": (denoise, dict(run=None, num=64, levels=[0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0,
                                                        20.0, 50.0]), UNJUDGED),
    "solvers": (solvers, dict(runs=[], N=[6, 10, 18, 32], rtol=[0.1, 0.01, 0.0001]), ALL),
    "trajectories": (trajectories, {}, ()),
    "churn": (churn, dict(runs=[], N=[8, 32], S_churn=[3.0, 10.0], S_tmin=0.05, S_tmax=1.0,
                          S_noise=1.003), ALL),
    "configs": (configs, dict(seeds=2), ALL),
    "truncation": (truncation, dict(runs=[], num=16, N=18, rho=[1.0, 3.0, 7.0, 10.0]), ALL),
    "loss": (loss, dict(run=None, num=256), UNJUDGED)}

if __name__ == "__main__":
    sys.exit(plot.main("edm", COMMANDS))
