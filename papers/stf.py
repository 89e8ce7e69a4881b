"""papers/stf.py: Stable Target Field (STF): is its target less noisy, and does that help training?

    python -m papers.stf variance                       from the repository's root

Source: Xu et al. 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion
Models" (STF).  Its training target for x = x0 + sigma noise is an average over n references y_k,
sum_k w_k y_k (losses.stf_target), where denoising score matching (DSM) has x0 alone, n = 1.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import evaluate
import train
from losses import stf_target, stf_weights
from papers import plot
from papers.plot import mixture_mean
from schedules import EDM, VE, VP

SIGMAS = [0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0,
          15.0, 20.0, 30.0, 50.0, 80.0]


# ---- Exact posteriors ----------------------------------------------------------------------------

def random_rows(args, name, count=None):
    """`count` rows of a data set in random order, float64, None: all; and the generator used."""
    data = evaluate.load_data(name, args.options.get("size"), args.options.get("data_dir", "data"))
    g = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(data.x), generator=g)[:count]
    return evaluate.take(data, rows)[0].double(), g


def posterior(x, sigma, rows):
    """E[x0 | x], and how far p(x0 | x) is from p0, where p0 is the uniform law on N rows.

        D_f = sum_k w_k f(1/(N w_k)),    f(y) = (1/y - 1)^2 (y < 1.5), 8y/27 - 1/3 (y >= 1.5)

    STF Theorem 2; section 6.1 prints the two laws the other way round.  D_f is 0 where x tells
    nothing of x0, and about (N - 1)^2 where x tells the row.
    x (B, ...), sigma (B, 1, ..., 1), rows (N, ...) -> float64 (B, d), (B,).
    """
    w, N = stf_weights(x, sigma, rows), len(rows)                                 # (B, N)
    f = torch.where(N * w > 2 / 3, w * (N * w - 1) ** 2, 8 / 27 / N - w / 3)
    return w @ rows.flatten(1).double(), f.sum(1)


# ---- Variance of the target ----------------------------------------------------------------------

@torch.no_grad()
def target_variance(x0, noise, levels, sizes, pool, exact, g):
    """V_STF = E_x Tr Cov(stf_target) by reference size and level (STF section 5.2); D (sec. 6.1).

    The target's mean given x is E[x0 | x] for every n, so V is its mean square distance from that.
    The first reference is x0, a draw of p(x0 | x); the others are rows of the pool, drawn anew for
    each x0.  n = 1 is V_DSM (STF eq. 4).
    x0, noise (m, ...), levels (L,), pool (N, ...), exact(x, sigma) -> E[x0 | x] (L, d), D (L,);
    returns (m, len(sizes), L) and (m, L), to be averaged over x0.
    """
    sigma, V, D = levels.view(-1, *[1] * (x0.ndim - 1)), [], []                   # (L, 1, ..., 1)
    for i in plot.progress("noisy samples", range(len(x0))):
        x = x0[i] + sigma * noise[i]                                              # (L, ...)
        mean, divergence = exact(x, sigma)
        others = pool[torch.randint(len(pool), (max(sizes) - 1,), generator=g)]
        reference = torch.cat([x0[i:i + 1], others])                              # (n, ...)
        errors = [stf_target(x, sigma, reference[:n]).flatten(1) - mean for n in sizes]
        V.append(torch.stack(errors).square().sum(2))
        D.append(divergence)
    return torch.stack(V), torch.stack(D)


def variance(args):
    """How much the training target varies, for DSM and for STF (STF figs. 2b, 3; Theorem 2).

        V = E_x Tr Cov(target | x) of targets for D;  V/sigma^2: of noise;  V/sigma^4: of scores

    Theorem 2 is  V_STF <= (V_DSM + sqrt(3) d sigma^2 sqrt(D))/(n - 1) + O(1/n^2),  where D(sigma) =
    E_x D_f measures how far p(x0 | x) is from the data's law.  Phase 1 is here where p(x0 | x) has
    less than a tenth of the data's variance, phase 3 where more than nine tenths.  The data are
    --num rows; but for two Gaussians V is that of their true law.  The D of that law is infinite up
    to sigma = sqrt(3) 0.14, so D is that of the rows.  Half a minute.
    """
    levels, n = torch.tensor(sorted(args.levels), dtype=torch.float64), args.n[-1]
    for name in args.data:
        law = name.startswith("two-gaussians")
        pool, g = random_rows(args, name, None if law else args.num)
        rows, d = pool[:args.num], pool[0].numel()
        means = 0.48 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, d)

        def exact(x, sigma):
            mean, divergence = posterior(x, sigma, rows)
            return mixture_mean(x, sigma, means, 0.14) if law else mean, divergence

        noise = torch.randn(rows.shape, generator=g, dtype=torch.float64)
        V, D = target_variance(rows, noise, levels, [1, *args.n], pool, exact, g)
        (dsm, *stf), D = V.mean(0), D.mean(0)
        seen = torch.where(dsm > 1e-4 * dsm.max(), dsm, torch.nan)    # a few x decide what is less
        whole = pool.flatten(1).var(0, correction=0).sum()            # the data's own variance
        phase = 1.0 + (dsm > 0.1 * whole).double() + (dsm > 0.9 * whole).double()
        columns = {"V of D": dsm, "V of noise": dsm / levels ** 2,
                   "V of scores": dsm / levels ** 4, "D(sigma)": D}
        columns = {form: curve / curve.max() for form, curve in columns.items()}
        columns |= {f"n = {size}": V_n / seen for size, V_n in zip(args.n, stf)}
        columns |= {"1/(n - 1)": torch.full_like(dsm, 1 / (n - 1)),
                    "bound": (1 + 3 ** 0.5 * d * levels ** 2 * D.sqrt() / seen) / (n - 1),
                    "phase": phase}
        middle = levels[phase == 2].tolist() or [math.nan]
        args.command = f"variance-{Path(name).name}"
        plot.show(
            args, f"{name}: how much the training target varies, by noise level; {args.num} noisy "
            "samples", plot.rows_of(dict(sigma=levels, V_DSM=dsm) | columns),
            dict(y={"V of D": "target for D", "V of noise": "target for noise",
                    "V of scores": "target for score", "D(sigma)": "D(sigma)"},
                 ylim=(1e-4, 5), ylabel="V and D, each over its maximum",
                 title=f"DSM's target; phase 2: sigma {middle[0]:g} to {middle[-1]:g}"),
            dict(y=[f"n = {size}" for size in args.n], ylabel="V_STF/V_DSM",
                 title="variance that n references leave"),
            dict(y={"bound": "Theorem 2's bound", "1/(n - 1)": "its first term, 1/(n - 1)",
                    f"n = {n}": "V_STF"}, ylabel="over V_DSM", title=f"Theorem 2, n = {n}"))


# ---- Effective sample size -----------------------------------------------------------------------

@torch.no_grad()
def effective_size(x0, noise, levels, reference):
    """Mean of 1/sum_k w_k^2, w = stf_weights: how many references STF averages, by noise level.

    x0, noise (m, ...), levels (L,), reference (n, ...), x0 among its rows -> (L,) float64.
    """
    sizes = []
    for level in levels:
        sigma = level.expand(len(x0), *[1] * (x0.ndim - 1))
        w = stf_weights(x0 + sigma * noise, sigma, reference)                     # (m, n)
        sizes.append((1 / (w ** 2).sum(1)).mean())
    return torch.stack(sizes)


def ess(args):
    """How many references STF averages, beside how often each schedule trains there (STF sec. 3).

    Their number is 1/sum_k w_k^2.  Where it is 1, the target is x0, as DSM's.  A few seconds.
    """
    reference, g = random_rows(args, args.data, max(args.n))
    x0, levels = reference[:args.num], torch.tensor(sorted(args.levels), dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    sizes = sorted({min(n, len(reference)) for n in args.n})
    curves = {f"n = {n}": effective_size(x0[:n], noise[:n], levels, reference[:n]) for n in sizes}
    schedules = dict(EDM=EDM(), VE=VE(), VP=VP())
    density = {name: plot.log_density(schedule, levels) for name, schedule in schedules.items()}
    plot.show(
        args, f"{args.data}: where STF averages references, and where training is",
        plot.rows_of(dict(sigma=levels) | curves | density),
        dict(y={name: f"reference of {name}" for name in curves}, title="where STF acts",
             ylabel="references averaged: 1/sum w^2"),
        dict(y=list(density), ylabel="density of ln sigma", yscale="linear",
             title="where each schedule trains"))


# ---- Bias ----------------------------------------------------------------------------------------

@torch.no_grad()
def target_bias(x, sigma, rows, n, repeats, with_source, g):
    """(E|E[target | x] - E[x0 | x]|^2, V_DSM) for p0 uniform on rows (N, d), at the x (m, d).

    Two halves of the repeats have independent errors, so the product of their mean errors has the
    bias's square for its mean.  With the source, the first reference is a draw of p(x0 | x).
    """
    m, s = len(x), sigma.expand(len(x), 1)
    w = stf_weights(x, s, rows)                                                   # (m, N)
    mean = w @ rows
    halves = torch.zeros(2, m, rows.shape[1], dtype=torch.float64)
    for r in range(repeats):
        index = torch.randint(len(rows), (m, n), generator=g)
        if with_source:
            index[:, 0] = torch.multinomial(w, 1, generator=g)[:, 0]
        target = torch.vmap(stf_target)(x[:, None], s[:, None], rows[index])      # (m, 1, d)
        halves[r % 2] += (target[:, 0] - mean) / (repeats // 2)
    V = (w @ rows.square().sum(1) - mean.square().sum(1)).mean()
    return (halves[0] * halves[1]).sum(1).mean().item(), V.item()


def bias(args):
    """The mean of STF's target against E[x0 | x], with and without the source (STF eq. 7, Thm. 1).

    losses.stf_target says why there is no bias with the source.  The bias is in units of the
    standard deviation of DSM's target.  About 1 minute.
    """
    rows, g = random_rows(args, args.data, 1000)
    rows, table = rows.flatten(1), []
    noise = torch.randn(args.num, rows.shape[1], generator=g).double()
    for n in plot.progress("reference sizes", args.n):
        row = dict(n=n)
        for level, with_source in itertools.product(args.levels, (True, False)):
            sigma = torch.tensor(level, dtype=torch.float64)
            x = rows[:args.num] + sigma * noise
            square, V = target_bias(x, sigma, rows, n, args.repeats, with_source, g)
            row[f"{'with' if with_source else 'without'} {level:g}"] = abs(square / V) ** 0.5
        table.append(row)
    plot.show(
        args, f"{args.data}: bias of STF's target, over the standard deviation of DSM's", table,
        *[dict(y={f"without {level:g}": "source left out", f"with {level:g}":
                  "source among them: 0, but for this error of measuring"},
               title=f"sigma = {level:g}") for level in args.levels],
        xlabel="number n of references", ylabel="bias/standard deviation", marker="o")


# ---- Trained runs --------------------------------------------------------------------------------

def table(args):
    """Distances of samples to the data after DSM and after STF (STF tables 1, 2).

    --rtol is RK45's tolerance (the paper's: 1e-5).  26 minutes on one core.
    """
    both = dict(rk45=dict(steps=2, rtol=args.rtol), pc=dict(steps=args.pc))
    samplers = dict(ve=both, vp=both | dict(ddim=dict(steps=args.ddim)),
                    edm=dict(heun=dict(steps=args.heun)))

    variants = {}
    for schedule in args.schedules:
        given = dict(cond=False) | args.options | dict(schedule=schedule)
        variants[schedule, "DSM"] = given | dict(loss="dsm")
        variants[schedule, "STF"] = given | dict(loss="stf", ref_batch=args.n)
    (runs, judge), rows = plot.judged(args, variants), []
    for schedule in plot.progress("schedules", args.schedules):
        for sampler, how in samplers[schedule].items():
            dsm, dsm_sd, calls = judge(runs[schedule, "DSM"], sampler, **how)
            stf, stf_sd, _ = judge(runs[schedule, "STF"], sampler, **how)
            rows.append({"schedule": schedule, "sampler": f"{sampler} {calls:.0f}", "DSM": dsm,
                         "sd DSM": dsm_sd, "STF": stf, "sd STF": stf_sd,
                         "floor": judge.axes["floor"]})
    plot.show(
        args, f"Samples after DSM and after STF: {judge.options.data}; mean and sd of {args.seeds} "
        "runs", rows,
        *[dict(where=("schedule", name), title=name.upper()) for name in args.schedules],
        x="sampler", y=dict(DSM="DSM", STF=f"STF, n = {args.n}"), xscale="linear",
        xlabel="sampler, and network calls for a sample", **judge.axes)


def seconds_a_step(run):
    """The shortest time, over 30 steps, of a batch, its loss and its gradient in a run."""
    denoiser, options = evaluate.load_run(run)
    schedule, weight = evaluate.build_schedule(options), evaluate.build_weight(options)
    pixels, labels = train.on_device(evaluate.run_data(options), options.device)
    times = []
    for step in range(30):
        start = time.perf_counter()
        batch = train.draw_batch(pixels, labels, options, schedule, step)
        loss = train.objective(options, denoiser, batch, weight, denoiser.precondition, None)
        loss.mean().backward()
        next(denoiser.parameters()).grad.sum().item()           # waits until a GPU is done
        times.append(time.perf_counter() - start)
    return min(times)


def held_out_errors(run):
    """{step: E|D - x0|^2/d} of rows that training does not see, averaged weights: the geometric
    mean over the noise levels of evaluate.LEVELS."""
    errors = {}
    for line in map(json.loads, Path(run, "log.jsonl").read_text().splitlines()):
        if "held_out" in line:
            errors[line["step"]] = math.exp(np.log(line["held_out"]["ema"]).mean())
    return errors


def speed(args):
    """Held-out error over steps and over time, and at the end by n (STF figs. 4, 5).

    The error is E|D - x0|^2/d, as a geometric mean over noise levels from .02 to 50.  The time is
    that of batch, loss and gradient, measured apart from training.  Runs on VE, as in the paper,
    but on a ring of 8 Gaussians.  About 3 minutes.
    """
    given = dict(data="ring", schedule="ve", batch=64, eval_every=150, cond=False) | args.options
    rows = []
    for n in plot.progress("numbers of references", [1, *args.n]):
        own = dict(loss="stf", ref_batch=n) if n > 1 else dict(loss="dsm")
        runs = [plot.trained(given | own | dict(seed=args.seed + k)) for k in range(args.seeds)]
        errors, seconds = [held_out_errors(run) for run in runs], seconds_a_step(runs[-1])
        for step in errors[0]:
            mean, sd = plot.mean_and_sd([error[step] for error in errors])
            rows.append({"n": n, "target": f"STF, n = {n}" if n > 1 else "DSM", "step": step,
                         "seconds": step * seconds, "error": mean, "sd error": sd})
    plot.show(
        args, f"{given['data']}: held-out error in training by DSM and by STF, {args.seeds} runs "
        "each", rows, dict(x="step", by="target", title="over steps"),
        dict(x="seconds", by="target", xlabel="seconds of training", title="over time"),
        dict(where=("step", step), xlabel="number n of references (1: DSM)", marker="o",
             title="at the end"), y=["error"], ylabel="held-out error, averaged weights")


DATA = "size", "data_dir"
COMMANDS = {
    "variance": (variance, dict(data=["two-gaussians-64d", "digits"], num=1000, n=[16, 64, 256],
                                levels=SIGMAS), DATA),
    "ess": (ess, dict(data="digits", num=256, n=[256, 1024, 4096], levels=SIGMAS), DATA),
    "bias": (bias, dict(data="two-gaussians-64d", num=16, n=[1, 2, 4, 8, 16, 32, 64],
                        levels=[1.0, 3.0, 10.0], repeats=2000), DATA),
    "table": (table, dict(schedules=["ve", "vp", "edm"], n=1024, seeds=2, rtol=1e-3, pc=50, ddim=50,
                          heun=18), plot.options_but("loss", "schedule", "ref_batch")),
    "speed": (speed, dict(n=[64, 256, 1024, 4096], seeds=2),
              plot.options_but("loss", "ref_batch", "fid_num"))}

if __name__ == "__main__":
    sys.exit(plot.main("stf", COMMANDS))
