"""papers/edm.py: Elucidating the design space (EDM): sampling and training, one choice at a time.

    python -m papers.edm solvers                        from the repository's root

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
Commands without a RUN train train.py's default run, 2 minutes on one core, and share it; those that
take several RUNs train it with two seeds.  Distances are Frechet distances of 128 samples of each
run (--fid-num), smaller is better; the floor is that of as many real images.
"""

import copy
import math
import sys
from functools import partial

import torch

import evaluate
from evaluate import BadInput, Progress
from losses import stf_target
from papers import plot
from samplers import euler, heun
from schedules import EDM, SCHEDULES, VE, VP


# ---- Runs and distances --------------------------------------------------------------------------

def shared_run(args, seed):
    """The run of this seed that the commands share, with what the user gave in args.options."""
    return plot.trained(args.options, seed=seed)


def open_run(args, run):
    """A run's denoiser, which needs no gradients, and its options."""
    denoiser, options = evaluate.load_run(run, args.options.get("device"))
    return denoiser.requires_grad_(False), options


def judges_of(args):
    """A plot.Judge of each RUN, or of the shared runs of two seeds."""
    runs = args.runs or [shared_run(args, seed) for seed in (args.seed, args.seed + 1)]
    return [plot.Judge(args, run) for run in runs]


def over_runs(judges, methods):
    """For methods [(sampler, steps, how)]: the mean distance and the NFE of each, over the runs.

    And one standard deviation over the runs, pooled over the methods: two runs give a poor one.
    """
    means, deviations, nfes = [], [], []
    for sampler, steps, how in methods:
        found = [judge(sampler, steps, **how) for judge in judges]
        mean, sd = plot.mean_and_sd([distance for distance, _ in found])
        means.append(mean)
        deviations.append(sd ** 2)
        nfes.append(plot.mean_and_sd([nfe for _, nfe in found])[0])
    return means, math.sqrt(sum(deviations) / len(deviations)), nfes


# ---- Figure 1 ------------------------------------------------------------------------------------

def ideal_denoiser(data, options, labels):
    """The denoiser that minimises the loss over the whole data set   (EDM appendix B.3).

        D(x; sigma) = sum_k w_k y_k,    w = softmax_k(-|x - y_k|^2/(2 sigma^2)),    all rows y_k

    labels (B,): the classes of x; of a run that is told the class, only rows of that class count.
    """
    rows, classes = torch.from_numpy(data.x), ()
    if options.classes:
        classes = labels, torch.from_numpy(data.labels).to(options.device)

    def ideal(x, sigma):
        return stf_target(x, sigma.expand(len(x), *[1] * (x.ndim - 1)), rows, *classes)
    return ideal


def denoise(args):
    """What the ideal denoiser and a trained one make of noisy images: EDM figure 1.

    The paper: with rising noise the result of the ideal denoiser goes from the clean image to the
    mean of the data.  The table has rms distances to both, by noise level, and that of the network
    from the ideal; of a run that is told the class, the mean is that of the class.  A second
    picture shows the images.  Half a minute, and the run.
    """
    denoiser, options = open_run(args, args.run or shared_run(args, args.seed))
    data, g = evaluate.run_data(options), torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(data.x), generator=g)[:args.num]
    x0, labels = evaluate.take(data, rows, options.device)
    ideal, table, panels = ideal_denoiser(data, options, labels), [], []
    noise = torch.randn(x0.shape, generator=g).to(x0)
    mean = ideal(x0, torch.tensor(1e5))              # so much noise leaves nothing of x0 to be seen

    def apart(x, y):
        return (x - y).square().mean().sqrt().item()
    for sigma in torch.tensor(args.levels):
        x = x0 + sigma * noise
        best = ideal(x, sigma)
        network = evaluate.in_batches(denoiser, x, sigma, labels if options.classes else None)
        table.append([sigma.item(), apart(best, x0), apart(best, mean), apart(network, x0),
                      apart(network, mean), apart(network, best)])
        scaled = x / (1 + (sigma / 0.5) ** 2).sqrt()           # as the paper does, to be seen
        two = torch.stack([scaled, best, network], 1)[:2].flatten(0, 1)
        panels.append((f"sigma {sigma:g}", evaluate.to_uint8(two)))
    axes = dict(xlabel="noise level sigma", ylabel="rms distance", yscale="linear", marker=".")
    columns = ["sigma", "ideal - x0", "ideal - mean", "net - x0", "net - mean", "net - ideal"]
    plot.show(args, columns, table, [
        axes | dict(y={"ideal - x0": "to the clean image", "ideal - mean": "to the data's mean"},
                    title="ideal denoiser"),
        axes | dict(y={"net - x0": "to the clean image", "net - mean": "to the data's mean",
                       "net - ideal": "to the ideal denoiser"}, title="trained network")],
        f"How far denoised images are from the clean image and from the mean: {options.data}")
    if x0.ndim == 4:
        path = f"{args.out}/{args.paper}-{args.command}-images.png"
        evaluate.save_pictures(path, panels, ["noisy, scaled", "ideal", "network"] * len(x0[:2]))
        print(path)


# ---- Figure 2 ------------------------------------------------------------------------------------

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
    adaptive solver on --other's schedule.  Euler's method takes 2N - 1 steps where Heun's takes N.
    The paper: each change lowers FID at equal NFE.  sd: over runs.  7 minutes on one core, and the
    runs.
    """
    if args.other not in ("vp", "ve"):
        raise BadInput(f"--other {args.other} is not vp or ve")
    other, name, judges = SCHEDULES[args.other](), args.other.upper(), judges_of(args)
    curves = {
        "euler": ("euler", other, f"Euler, {name}'s time steps and schedule"),
        "heun": ("heun", other, f"Heun, {name}'s time steps and schedule"),
        "+ t_i": ("heun", with_edm_steps(other), f"Heun, EDM's time steps, {name}'s schedule"),
        "+ sigma, s": ("heun", EDM(), "Heun, EDM's time steps and schedule"),
        "euler edm": ("euler", EDM(), "Euler, EDM's time steps and schedule")}
    rows, told = [], Progress("rows of the table", len(args.N) + len(args.rtol))
    for N in args.N:
        means, sd, nfes = over_runs(judges, [
            (sampler, 2 * N - 1 if sampler == "euler" else N, dict(schedule=schedule))
            for sampler, schedule, _ in curves.values()])
        rows.append([nfes[0], *means, None, sd])
        told(len(rows))
    for rtol in args.rtol:
        means, sd, nfes = over_runs(judges, [("rk45", 2, dict(schedule=other, rtol=rtol))])
        rows.append([nfes[0], *[None] * len(curves), *means, sd])
        told(len(rows))
    labels = {column: label for column, (_, _, label) in curves.items()}
    labels["rk45"] = f"adaptive rk45, {name}'s schedule"
    plot.show(args, ["NFE", *labels, "sd"], sorted(rows), [
        dict(y=labels, spread={column: "sd" for column in labels}, floor=judges[0].floor,
             xlabel="NFE: calls of the network for a sample", ylabel=judges[0].name, marker=".")],
        f"Solver, time steps, schedule: {judges[0].options.data}, real data at "
        f"{judges[0].floor:.3g}", size=(7.5, 5.5))


# ---- Figure 3 ------------------------------------------------------------------------------------

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
    straight lines makes none, with the same noise levels under VP, VE and EDM: rms over levels and
    lines, in standard deviations of x.  The paper: EDM's lines are the straightest.  A second
    picture shows the lines.  Seconds.
    """
    if any(150 % N for N in args.N):
        raise BadInput("--N: give numbers that 150 is divisible by")
    starts = torch.tensor([-2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64)
    schedules, columns, errors, lines, panels = dict(VP=VP(), VE=VE(), EDM=EDM()), [], [], {}, []
    for top in args.levels:
        sigma = EDM(sigma_max=top).time_steps(151)[:-1]                           # (151,)
        for name, schedule in schedules.items():
            t, x = flow_lines(heun, schedule, sigma, starts)                      # (151, 8)
            deviation = (schedule.s(t) * (1 + sigma ** 2).sqrt())[:, None]
            columns.append(f"{name}, {top:g}")
            errors.append([])
            for N in args.N:
                coarse = flow_lines(euler, schedule, sigma[::150 // N], starts)[1]
                error = (coarse - x[::150 // N]) / deviation[::150 // N]
                errors[-1].append(error.square().mean().sqrt().item())
            own = [f"{columns[-1]}, {start}" for start in starts.tolist()]
            lines |= {columns[-1]: t.tolist()} | dict(zip(own, x.T.tolist()))
            panels.append(dict(x=columns[-1], y=own, title=f"{name}, up to sigma {top:g}",
                               xlabel="time t", xscale="linear", ylabel="x", yscale="linear",
                               legend=False))
    plot.show(args, ["steps", *columns], list(zip(args.N, *errors)), [
        dict(y={f"{name}, {top:g}": name for name in schedules}, title=f"from sigma {top:g} down",
             xlabel="steps of Euler's method", ylabel="error, in standard deviations of x",
             marker=".") for top in args.levels],
        "Euler's error under three schedules, same noise levels: data at +1 and -1")
    path = f"{args.out}/{args.paper}-{args.command}-lines.png"
    if plot.draw(path, list(lines), list(zip(*lines.values())), panels,
                 "Lines of the probability flow of data at +1 and -1 under three schedules"):
        print(path)


# ---- Figure 4 ------------------------------------------------------------------------------------

def churn(args):
    """Stochastic sampling with its limits on and off, beside deterministic: EDM figure 4.

    Each step first adds noise, gamma = min(S_churn/N, sqrt(2) - 1) of sigma, where sigma is within
    [S_tmin, S_tmax], of standard deviation S_noise.  The settings are all; interval: S_noise is 1;
    S_noise: at all sigma; neither.  S_churn 0 is Heun's method, deterministic.  SDE: Euler-Maruyama
    with as many NFE.  The paper: with all on, noise helps at a large NFE and harms at a small one;
    Euler-Maruyama is far behind.  sd: over runs, of all but SDE.  8 minutes on one core, and the
    runs.
    """
    judges, rows, panels = judges_of(args), [], []
    interval, S_noise = dict(S_tmin=args.S_tmin, S_tmax=args.S_tmax), dict(S_noise=args.S_noise)
    at = f"{args.S_tmin:g} <= sigma <= {args.S_tmax:g}"
    noisy = {"all": f"{at}, S_noise {args.S_noise:g}", "interval": f"{at}, S_noise 1",
             "S_noise": f"any sigma, S_noise {args.S_noise:g}", "neither": "any sigma, S_noise 1"}
    labels = noisy | {"SDE": "Euler-Maruyama, equal NFE"}
    told = Progress("rows of the table", len(args.N) * (1 + len(args.S_churn)))
    for k, N in enumerate(args.N):
        (plain,), sd, nfes = over_runs(judges, [("heun", N, dict(schedule=EDM()))])
        (sde,), _, _ = over_runs(judges, [("euler-maruyama", 2 * N - 1, dict(schedule=EDM()))])
        left, right = [None] * k, [None] * (len(args.N) - k - 1)
        rows.append([*left, 0.0, *right, *[plain] * 4, sde, sd])
        for S_churn in args.S_churn:
            means, sd, _ = over_runs(judges, [
                ("edm-stochastic", N, setting | dict(schedule=EDM(), S_churn=S_churn))
                for setting in (interval | S_noise, interval, S_noise, {})])
            rows.append([*left, S_churn, *right, *means, sde, sd])
            told(len(rows))
        panels.append(dict(x=f"S_churn, {N}", y=labels, spread={name: "sd" for name in noisy},
                           floor=judges[0].floor, title=f"{N} steps, NFE {nfes[0]:g}",
                           xlabel="S_churn (0: Heun, deterministic)", ylabel=judges[0].name,
                           xscale="linear", marker=".", legend=k == 0))
    plot.show(args, [*(f"S_churn, {N}" for N in args.N), *labels, "sd"], rows, panels,
              f"Fresh noise while sampling: {judges[0].options.data}, real data at "
              f"{judges[0].floor:.3g}", size=(5.2, 4.4))


# ---- Table 2 -------------------------------------------------------------------------------------

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
    B  + hyperparameters: learning rate times 5, a shorter average of the weights, no clipping
    C  + capacity: without the lowest resolution, more channels at the highest
    D  + preconditioning: D = c_skip x + c_out F(c_in x), VP's noise levels and weight as before
    E  + loss: ln sigma ~ N(P_mean, P_std^2), weight 1/c_out^2
    F  + augmentation, of which the network is told

    Sampled as in the paper by Heun's method with EDM's 18 time steps (NFE 35), with which FID falls
    from A to F.  Not to be had at this scale: B's batch four times as large, for at equal steps
    these would be four times the images; its dropout, and F's gain, which are against overfitting,
    but 6,400 images overfit nothing.  sd: over two seeds.  16 minutes on one core.
    """
    rows, options, told = [], {}, Progress("rows of the table", len(CONFIGS))
    for name, change in CONFIGS.items():
        options |= change
        own = {key: value for key, value in options.items() if key not in args.options}
        distances = []
        for seed in (args.seed, args.seed + 1):
            given = dict(steps=400) | args.options
            run = plot.trained(given, **own, seed=seed)
            judge = plot.Judge(args, run)
            distances.append(judge("heun", 18, schedule=EDM())[0])
        rows.append([name, *plot.mean_and_sd(distances), *distances])
        told(len(rows))
    plot.show(args, ["config", "mean", "sd", "one seed", "another"], rows, [
        dict(y=dict(mean="mean of two seeds, and sd"), spread=dict(mean="sd"), floor=judge.floor,
             xlabel="each with all the changes before it", ylabel=judge.name, xscale="linear",
             marker="o")],
        f"EDM's changes to training: {judge.options.data}, {judge.options.steps} steps each, "
        f"real data at {judge.floor:.3g}", size=(9, 4.5))


# ---- Local truncation error ----------------------------------------------------------------------

def local_errors(denoise, x, sigma, fine=16):
    """The error that one step of Euler's and of Heun's method adds, rms over x's coordinates.

    sigma (N,) falling, x (B, ...) at sigma[0].  From each sigma_i to the next, Heun's method with
    `fine` small steps gives the true x, at which the next step starts -> [(sigma_i, Euler, Heun)].
    """
    schedule, errors = EDM(), []
    for a, b in zip(sigma[:-1], sigma[1:]):
        small = EDM(sigma_min=b.item(), sigma_max=a.item()).time_steps(fine + 1)[:-1]
        true = heun(denoise, x, small, schedule)
        one = [step(denoise, x, torch.stack([a, b]), schedule) for step in (euler, heun)]
        errors.append((a.item(), *((y - true).square().mean().sqrt().item() for y in one)))
        x = true
    return errors


def truncation(args):
    """The error that one step adds, by noise level, for rho = 1, 3, 7, 10: EDM figure 13.

        sigma_i = (sigma_max^(1/rho) + i/(N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Rms over pixels and --num samples of a trained network, against 16 small steps.  The paper: rho
    = 3 nearly equalises the errors, but 5 to 10 give better images: errors at little noise cost
    more.  Printed: the largest error over the smallest, and the distance of samples that Heun's
    method draws with this rho, +- sd over runs.  3 minutes on one core, and the runs.
    """
    judges, rows, rhos, both = judges_of(args), [], args.rho, ("Euler", "Heun")
    options, told = judges[0].options, Progress("values of rho", len(rhos))
    classes = evaluate.draw_labels(range(args.num), options)
    own = None if classes is None else classes.to(options.device)
    g, curves = torch.Generator().manual_seed(args.seed), {how: {} for how in both}
    noise = torch.randn(args.num, *options.shape, generator=g).to(options.device)
    for rho in rhos:
        schedule = EDM(rho=rho)
        found = local_errors(partial(judges[0].denoiser, labels=own), schedule.sigma_max * noise,
                             schedule.time_steps(args.N)[:-1])
        means, sd, _ = over_runs(judges, [("heun", args.N, dict(schedule=schedule))])
        for how, errors in zip(both, list(zip(*found))[1:]):
            curves[how][f"{how}, {rho:g}"] = f"rho = {rho:g}"
            print(f"rho {rho:g}: largest over smallest error of {how}'s method, "
                  f"{max(errors) / min(errors):.3g}")
        curves["Heun"][f"Heun, {rho:g}"] += f": samples at {means[0]:.3g} +- {sd:.1g}"
        print(f"rho {rho:g}: distance of samples {means[0]:.4g} +- {sd:.2g}")
        for sigma, *pair in found:
            rows.append([sigma, *(error if other == rho else None for error in pair
                                  for other in rhos)])
        told(len(curves["Heun"]))
    plot.show(args, ["sigma", *curves["Euler"], *curves["Heun"]], rows, [
        dict(y=curves[how], title=f"one step of {how}'s method", ylabel="rms error", marker=".",
             xlabel="noise level sigma at which the step starts") for how in both],
        f"Local truncation error, {args.N} steps: {options.data}, real data at "
        f"{judges[0].floor:.3g}", size=(5.4, 4))


# ---- Figure 5a -----------------------------------------------------------------------------------

def log_density(schedule, levels, count=100_000):
    """The density of ln sigma in training at levels (L,), evenly spaced in ln sigma: (L,).

    The share of `count` evenly drawn sigmas that is within half a space of the level, by space.
    """
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn, centre = schedule.training_sigma(u).log(), levels.double().log()
    space = (centre[-1] - centre[0]) / (len(levels) - 1)
    near = (drawn - centre[:, None]).abs() < space / 2                            # (L, count)
    return near.double().mean(1) / space


def loss(args):
    """The loss by noise level before and after training, and where training looks: EDM figure 5a.

        weight(sigma) E|D(x0 + sigma eps; sigma) - x0|^2/d,    and the density of ln sigma

    on images that training did not see.  The paper: under EDM's preconditioning and weight the loss
    begins near 1 at every level, and falls at middle levels alone.  At low noise there is too
    little noise to be seen, at high noise too little else; so training goes to the middle.
    Half a minute, and the run.
    """
    denoiser, options = open_run(args, args.run or shared_run(args, args.seed))
    torch.manual_seed(options.seed)                                # so does train.py's run begin
    fresh = evaluate.build_denoiser(options).to(options.device).eval()
    x0, labels = evaluate.held_out(evaluate.run_data(options), options, args.num)
    levels = torch.logspace(math.log10(0.005), math.log10(80), 22)
    before, after = (evaluate.denoising_error(network, x0, labels, levels.tolist())
                     for network in (fresh, denoiser))
    weight = evaluate.build_weight(options)(levels)
    density = log_density(evaluate.build_schedule(options), levels)
    rows = torch.stack([levels, weight * torch.tensor(before), weight * torch.tensor(after),
                        density.float()], 1).tolist()
    plot.show(args, ["sigma", "before", "after", "density"], rows, [
        dict(y={"before": "before training", "after": f"after {options.step} steps"}, marker=".",
             yscale="linear", ylim=(0, None), xlabel="noise level sigma",
             ylabel="loss, weighted as in training"),
        dict(y=["density"], yscale="linear", xlabel="noise level sigma", legend=False,
             ylabel="density of ln sigma in training")],
        f"Loss by noise level, and where training looks: {options.data}, {options.loss} loss, "
        f"{options.schedule} schedule")


COMMANDS = {
    "denoise": (denoise, dict(run=None, num=64, levels=[0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0,
                                                        20.0, 50.0])),
    "solvers": (solvers, dict(runs=[], N=[6, 10, 18, 32], rtol=[0.1, 0.01, 0.0001],
                              other="vp")),
    "trajectories": (trajectories, dict(levels=[25.0, 1.0], N=[5, 10, 15, 30, 75, 150])),
    "churn": (churn, dict(runs=[], N=[8, 32], S_churn=[1.0, 3.0, 10.0], S_tmin=0.05, S_tmax=1.0,
                          S_noise=1.003)),
    "configs": (configs, {}),
    "truncation": (truncation, dict(runs=[], num=16, N=18, rho=[1.0, 3.0, 7.0, 10.0])),
    "loss": (loss, dict(run=None, num=256)),
}

if __name__ == "__main__":
    sys.exit(plot.main("edm", COMMANDS))
