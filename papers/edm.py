"""papers/edm.py: Elucidating the design space (EDM): sampling and training, one choice at a time.

    python -m papers.edm solvers                        from the repository's root

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
Commands share train.py's default run, which is trained once in 2 minutes on one core; those with
--runs share that run with two seeds.  --run and --runs name others.  Distances are Frechet
distances of 128 samples of each run (--fid-num): smaller is better, and real images get the floor.
"""

import copy
import math
import sys
from functools import partial
from operator import itemgetter

import torch

import evaluate
from evaluate import BadInput
from papers import plot
from samplers import euler, heun
from schedules import EDM, VE, VP


# ---- Runs and distances --------------------------------------------------------------------------

def open_run(args):
    """The denoiser of args.run, or of the run that the commands share, and its options."""
    return plot.opened(args, args.run or plot.trained(args.options, seed=args.seed))


def judge_of(args):
    """A plot.Judge of args.runs, or of the shared runs of two seeds."""
    runs = args.runs or [plot.trained(args.options, seed=args.seed + k) for k in (0, 1)]
    return plot.Judge(args, runs)


def pooled(found):
    """The standard deviation over runs, pooled over Judge's answers: two runs give a poor one."""
    return math.sqrt(sum(sd ** 2 for _, sd, _ in found) / len(found))


# ---- Denoising -----------------------------------------------------------------------------------

def denoise(args):
    """What the ideal denoiser and a trained one make of noisy images: EDM figure 1.

        D(x; sigma) = sum_k w_k y_k,    w = softmax_k(-|x - y_k|^2/(2 sigma^2)),    all rows y_k

    is ideal: it minimises the loss over the data, or over the class that it is told (appendix B.3).
    The table has rms distances to the clean image and to the mean of the data.  A second picture
    has images.  Half a minute, and the run.
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
    for sigma in torch.tensor(args.levels):
        x = x0 + sigma * noise
        best, network = ideal(x, sigma * one), evaluate.in_batches(denoiser, x, sigma, labels)
        rows.append([sigma.item(), apart(best, x0), apart(best, mean), apart(network, x0),
                     apart(network, mean), apart(network, best)])
        scaled = x / (1 + (sigma / 0.5) ** 2).sqrt()           # as the paper does, to be seen
        two = torch.stack([scaled, best, network], 1)[:2].flatten(0, 1)
        panels.append((f"sigma {sigma:g}", evaluate.to_uint8(two)))
    goals = "to the clean image", "to the data's mean", "to the ideal denoiser"
    ideals, nets = ["ideal - x0", "ideal - mean"], ["net - x0", "net - mean", "net - ideal"]
    plot.show(
        args, ["sigma", *ideals, *nets], rows,
        [dict(y=dict(zip(ideals, goals)), title="ideal denoiser"),
         dict(y=dict(zip(nets, goals)), title="trained network")],
        f"How far denoised images are from the clean image and from the mean: {options.data}",
        xlabel="noise level sigma", ylabel="rms distance", yscale="linear", marker=".")
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

    Distance by NFE of one network.  euler: --other's sampler (vp or ve), Euler's method with its
    own time steps, sigma(t) and s(t); heun: Heun's method instead; + t_i: and EDM's time steps;
    + sigma, s: and EDM's sigma(t) = t, s(t) = 1; euler edm: these with Euler's method; rk45: the
    adaptive solver on --other's schedule.  7 minutes on one core, and the runs.
    """
    if args.other not in ("vp", "ve"):
        raise BadInput(f"--other {args.other} is not vp or ve")
    other, name, judge = dict(vp=VP, ve=VE)[args.other](), args.other.upper(), judge_of(args)
    curves = {
        "euler": ("euler", other, f"Euler, {name}'s time steps and schedule"),
        "heun": ("heun", other, f"Heun, {name}'s time steps and schedule"),
        "+ t_i": ("heun", with_edm_steps(other), f"Heun, EDM's time steps, {name}'s schedule"),
        "+ sigma, s": ("heun", EDM(), "Heun, EDM's time steps and schedule"),
        "euler edm": ("euler", EDM(), "Euler, EDM's time steps and schedule")}
    rows = []
    for N in plot.progress("numbers of steps", args.N):
        found = [judge(sampler, 2 * N - 1 if sampler == "euler" else N, schedule=schedule)
                 for sampler, schedule, _ in curves.values()]
        rows.append([found[0][2], *(mean for mean, _, _ in found), None, pooled(found)])
    for rtol in plot.progress("tolerances", args.rtol):
        mean, sd, nfe = judge("rk45", 2, schedule=other, rtol=rtol)
        rows.append([nfe, *[None] * len(curves), mean, sd])
    labels = {column: label for column, (_, _, label) in curves.items()}
    labels["rk45"] = f"adaptive rk45, {name}'s schedule"
    plot.show(args, ["NFE", *labels, "sd"], sorted(rows, key=itemgetter(0)),
              [dict(y=labels, xlabel="NFE: calls of the network for a sample")],
              f"Solver, time steps, schedule of the sampler: {judge.options.data}",
              spread=dict.fromkeys(labels, "sd"), **judge.axes)


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

    Data at +1 and -1; nothing is trained.  The table has the error of Euler's method, which on
    straight lines makes none, with the same noise levels under each schedule: rms over levels and
    lines.  A second picture has the lines.  Seconds.
    """
    starts = torch.tensor([-2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64)
    schedules, errors, lines, panels = dict(VP=VP(), VE=VE(), EDM=EDM()), {}, [], []
    tops, steps = (25, 1), (5, 10, 15, 30, 75, 150)                           # 150's divisors
    for top in tops:
        sigma = EDM(sigma_max=top).time_steps(151)[:-1]                           # (151,)
        for name, schedule in schedules.items():
            t, x = flow_lines(heun, schedule, sigma, starts)                      # (151, 8)
            deviation = (schedule.s(t) * (1 + sigma ** 2).sqrt())[:, None]
            errors[f"{name}, {top}"] = own = []
            for N in steps:
                coarse = flow_lines(euler, schedule, sigma[::150 // N], starts)[1]
                error = (coarse - x[::150 // N]) / deviation[::150 // N]
                own.append(error.square().mean().sqrt().item())
            title = f"{name}, from sigma {top} down"
            panels.append(dict(where=("panel", title), title=title))
            for start, line in zip(starts.tolist(), x.T.tolist()):
                lines += [[title, start, *point] for point in zip(t.tolist(), line)]
    plot.show(args, ["steps", *errors], list(zip(steps, *errors.values())),
              [dict(y={f"{name}, {top}": name for name in schedules},
                    title=f"from sigma {top} down") for top in tops],
              "Euler's error under three schedules, same noise levels: data at +1 and -1",
              xlabel="steps of Euler's method", ylabel="error, in standard deviations of x",
              marker=".")
    plot.draw(f"{args.out}/edm-trajectories-lines.png", ["panel", "start", "t", "x"], lines, panels,
              "Lines of the probability flow of data at +1 and -1 under three schedules", x="t",
              y=["x"], by="start", xlabel="time t", ylabel="x", xscale="linear", yscale="linear")


def churn(args):
    """Stochastic sampling with its limits on and off, beside deterministic: EDM figure 4.

    Where S_tmin <= sigma <= S_tmax, a step first adds noise, S_noise times what raises sigma by the
    share gamma = min(S_churn/N, sqrt(2) - 1).  Columns: all: limits and S_noise as given; interval:
    S_noise = 1; S_noise: no limits; neither: no limits and S_noise = 1; SDE: Euler-Maruyama.  sd:
    over runs, of all but SDE.  5 minutes on one core, and the runs.
    """
    judge, rows, panels = judge_of(args), [], []
    interval, S_noise = dict(S_tmin=args.S_tmin, S_tmax=args.S_tmax), dict(S_noise=args.S_noise)
    at = f"{args.S_tmin:g} <= sigma <= {args.S_tmax:g}"
    labels = {"all": f"{at}, S_noise {args.S_noise:g}", "interval": f"{at}, S_noise 1",
              "S_noise": f"any sigma, S_noise {args.S_noise:g}", "neither": "any sigma, S_noise 1"}
    for N in plot.progress("numbers of steps", args.N):
        plain, sd, nfe = judge("heun", N, schedule=EDM())
        sde = judge("euler-maruyama", 2 * N - 1, schedule=EDM())[0]
        rows.append([N, 0.0, *[plain] * 4, sde, sd])
        for S_churn in args.S_churn:
            found = [judge("edm-stochastic", N, schedule=EDM(), S_churn=S_churn, **setting)
                     for setting in (interval | S_noise, interval, S_noise, {})]
            rows.append([N, S_churn, *(mean for mean, _, _ in found), sde, pooled(found)])
        panels.append(dict(where=("N", N), title=f"{N} steps, NFE {nfe:g}"))
    plot.show(args, ["N", "S_churn", *labels, "SDE", "sd"], rows, panels,
              f"Fresh noise while sampling: {judge.options.data}", x="S_churn", xscale="linear",
              y=labels | {"SDE": "Euler-Maruyama, equal NFE"}, spread=dict.fromkeys(labels, "sd"),
              xlabel="S_churn, amount of noise (0: Heun, deterministic)", **judge.axes)


def local_errors(denoise, x, sigma, fine=16):
    """The error that one step of Euler's and of Heun's method adds, rms over x's coordinates.

    sigma (N,) falling, x (B, ...) at sigma[0].  From each sigma_i to the next, Heun's method with
    `fine` small steps gives the true x, at which the next step starts -> [[sigma_i, Euler, Heun]].
    """
    schedule, errors = EDM(), []
    for a, b in zip(sigma[:-1], sigma[1:]):
        small = EDM(sigma_min=b.item(), sigma_max=a.item()).time_steps(fine + 1)[:-1]
        true = heun(denoise, x, small, schedule)
        one = [step(denoise, x, torch.stack([a, b]), schedule) for step in (euler, heun)]
        errors.append([a.item(), *((y - true).square().mean().sqrt().item() for y in one)])
        x = true
    return errors


def truncation(args):
    """The error that one step adds, by noise level, for rho = 1, 3, 7, 10: EDM figure 13.

        sigma_i = (sigma_max^(1/rho) + i/(N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Rms over pixels and --num samples of a trained network, against 16 small steps; and the distance
    of samples by Heun's method with this rho.  3 minutes, and the runs.
    """
    judge, rows = judge_of(args), []
    (denoiser, options), g = judge.runs[0], torch.Generator().manual_seed(args.seed)
    classes = evaluate.draw_labels(range(args.num), options)
    own = None if classes is None else classes.to(options.device)
    noise = torch.randn(args.num, *options.shape, generator=g).to(options.device)
    for rho in plot.progress("values of rho", args.rho):
        schedule = EDM(rho=rho)
        mean, sd, _ = judge("heun", args.N, schedule=schedule)
        for errors in local_errors(partial(denoiser, labels=own), schedule.sigma_max * noise,
                                   schedule.time_steps(args.N)[:-1]):
            rows.append([rho, *errors, mean, sd])
    plot.show(
        args, ["rho", "sigma", "Euler", "Heun", "samples", "sd samples"], rows,
        [*(dict(x="sigma", y=[how], by="rho", title=f"one step of {how}'s method",
                xlabel="noise level sigma at which the step starts", ylabel="rms error")
           for how in ("Euler", "Heun")),
         dict(judge.axes, x="rho", y=["samples"], xlabel="rho", xscale="linear",
              title="samples of Heun's method")],
        f"Local truncation error by rho, {args.N} steps: {options.data}", marker=".")


# ---- Training ------------------------------------------------------------------------------------

CONFIGS = {       # each has the options of those before it, too
    "A: VP": dict(loss="dsm", schedule="vp", lr=8e-4, ema=(3500,), mult=(1, 2, 2, 2)),
    "B: + training": dict(lr=4e-3, ema=(2000,), clip=1e9),
    "C: + capacity": dict(mult=(2, 2, 2)),
    "D: + scaling": dict(precondition="edm"),
    "E: + loss": dict(schedule="edm"),
    "F: + augmentation": dict(augment=0.12)}


def configs(args):
    """EDM's changes to training, one after the other, at equal steps: EDM table 2.

    A  Score-SDE's VP: its noise levels, weight 1/sigma^2, a network that predicts the noise
    B  + hyperparameters: learning rate times 5, no clipping, in long runs a shorter average
    C  + capacity: without the lowest resolution, more channels at the highest
    D  + preconditioning: D = c_skip x + c_out F(c_in x), VP's noise levels and weight as before
    E  + loss: ln sigma ~ N(P_mean, P_std^2), weight 1/c_out^2
    F  + augmentation, of which the network is told

    Sampled as in the paper by Heun's method with EDM's 18 time steps.  Left out at this scale: B's
    larger batch and its dropout.  13 minutes on one core.
    """
    def draws(name, folder):
        yield "heun", folder, dict(sampler="heun", steps=18, schedule=EDM())

    variants, options = {}, dict(steps=400)
    for name, change in CONFIGS.items():
        options = options | change
        variants[name] = options | args.options
    found, judge = plot.distances(args, variants, draws)
    rows = [[name, *found["heun"][name][:2]] for name in CONFIGS]
    plot.show(args, ["config", "mean", "sd"], rows,
              [dict(y=dict(mean="mean of two seeds, and sd"), spread=dict(mean="sd"),
                    xlabel="each with all the changes before it", xscale="linear")],
              f"EDM's changes to training: {judge.options.data}, {judge.options.steps} steps each",
              **judge.axes)


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
    density = torch.from_numpy(plot.log_density(evaluate.build_schedule(options), levels))
    rows = torch.stack([levels, weight * torch.tensor(before), weight * torch.tensor(after),
                        density.float()], 1).tolist()
    plot.show(
        args, ["sigma", "before", "after", "density"], rows,
        [dict(y={"before": "before training", "after": f"after {options.step} steps"},
              ylim=(0, None), ylabel="loss, weighted as in training", marker="."),
         dict(y=["density"], ylabel="density of ln sigma in training")],
        f"Loss by noise level, and where training looks: {options.data}, {options.loss} loss, "
        f"{options.schedule} schedule", xlabel="noise level sigma", yscale="linear")


COMMANDS = {
    "denoise": (denoise, dict(run=None, num=64, levels=[0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0,
                                                        20.0, 50.0])),
    "solvers": (solvers, dict(runs=[], N=[6, 10, 18, 32], rtol=[0.1, 0.01, 0.0001],
                              other="vp")),
    "trajectories": (trajectories, {}),
    "churn": (churn, dict(runs=[], N=[8, 32], S_churn=[3.0, 10.0], S_tmin=0.05, S_tmax=1.0,
                          S_noise=1.003)),
    "configs": (configs, dict(seeds=2)),
    "truncation": (truncation, dict(runs=[], num=16, N=18, rho=[1.0, 3.0, 7.0, 10.0])),
    "loss": (loss, dict(run=None, num=256))}

if __name__ == "__main__":
    sys.exit(plot.main("edm", COMMANDS))
