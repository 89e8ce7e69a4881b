"""evaluate.py: how good it is.  Draws samples of runs, measures losses and distances.

    python evaluate.py sample RUN --sampler heun --steps 18 --num 64
    python evaluate.py samplers RUN         each sampler's distance to the data, by steps and NFE
"""

import json
import os
import sys
import time

import numpy as np
import torch

from datasets import BadInput, attempt, load_rows
from losses import stf_target, stf_weights
from papers import FIGURES, add_commands
from runs import (CHOICES, SAMPLERS, VARIANCES, Counted, Parser, analytic_moments, build_schedule,
                  generate, load_run, loss_weight, number, pick_device, run_data, save_pictures,
                  to_uint8)
from schedules import SCHEDULES


# ---- Distances -----------------------------------------------------------------------------------

def pixel_features(x, side=16):
    """Images (n, C, H, W) averaged down to at most side x side, or points: float64 (n, d)."""
    if x.ndim == 4 and x.shape[-1] > side:
        x = torch.nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1).double().cpu().numpy()


def moments(features):
    """(n, d) -> mean (d,) and covariance (d, d), float64."""
    return features.mean(0), np.cov(features, rowvar=False, dtype=np.float64).reshape(
        features.shape[1], features.shape[1])


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians: FID, where the features are Inception's.

        |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2})

    (C1 C2)^{1/2} has the trace of (A C2 A)^{1/2}, A = C1^{1/2}, and that is a symmetric problem:
    two eigendecompositions, no general matrix root, no complex numbers, singular C1, C2 allowed.
    mean (d,), cov (d, d) float64 -> float, in the features' squared units.
    """
    values, Q = np.linalg.eigh(cov1)
    A = (Q * np.sqrt(values.clip(0))) @ Q.T
    root = np.sqrt(np.linalg.eigvalsh(A @ cov2 @ A).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


# ---- Report --------------------------------------------------------------------------------------

def real_features(data, seed, count=10_000):
    """pixel_features of random rows of the data."""
    rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[:count]
    pixels = torch.from_numpy(data.x)
    return np.concatenate([pixel_features(load_rows(pixels, r, None, "cpu"))
                           for r in rows.split(500)])


@torch.no_grad()
def noise_table(options, data, ema, count=128):
    """Rows (sigma, DSM loss, STF loss, ESS): the same `count` images and noise at each level.

    Both score the same D, against x0 and against its posterior mean given the reference.  The
    difference is the variance of DSM's target: noise that no network can learn, and where STF acts.
    """
    lam, device = loss_weight(options), options["device"]
    g = torch.Generator().manual_seed(options["seed"])
    rows = torch.randperm(len(data.x), generator=g)[:max(options["ref-batch"], count)]
    reference = load_rows(torch.from_numpy(data.x), rows, None, device)
    label = torch.from_numpy(data.labels)[rows].to(device) if options["cond"] else None
    x0, mine = reference[:count], None if label is None else label[:count]
    noise = torch.randn(x0.shape, generator=g).to(device)
    table = []
    for level in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        sigma = torch.full((len(x0), *[1] * (x0.ndim - 1)), float(level), device=device)
        x = x0 + sigma * noise
        D = torch.cat([ema(x[i:i + 64], sigma[i:i + 64], None if mine is None else mine[i:i + 64])
                       for i in range(0, len(x), 64)])
        w = stf_weights(x, sigma, reference, mine, label)                         # (count, n)
        target = stf_target(x, sigma, reference, mine, label)
        weight = lam(sigma)
        table.append((level, (weight * (D - x0) ** 2).mean().item(),
                      (weight * (D - target) ** 2).mean().item(),
                      (1 / (w ** 2).sum(1)).mean().item()))
    return table


def report(options, data, run, ema, seconds, count=128):
    """What a person wants to know at the end, on the terminal and as the log's last line."""
    table = noise_table(options, data, ema.eval())
    count = min(count, len(data.x) // 2)
    labels = torch.arange(count) % len(options["classes"]) if options["cond"] else None
    fake = generate(ema, range(count), options["shape"], "heun", build_schedule(options),
                    options["sample-steps"], labels, device=options["device"])
    real = real_features(data, options["seed"])
    reference = moments(real[count:])
    distance, floor = (frechet_distance(*moments(features), *reference)
                       for features in (pixel_features(fake), real[:count]))
    print(f"{options['steps']} steps in {seconds / 60:.1f} minutes\n\n"
          "   sigma   DSM loss   STF loss   sources averaged  target noise in DSM\n"
          "                                 by STF (ESS)      (chance no network can learn)")
    for sigma, dsm, stf, size in table:
        print(f"{sigma:8g} {dsm:10.4f} {stf:10.4f} {size:15.1f} {1 - stf / dsm:12.0%}")
    space = "pixel space" if data.x.ndim == 4 else "the points' space"
    print(f"\nFrechet distance in {space}, {count} samples (averaged weights, Heun, NFE "
          f"{2 * options['sample-steps'] - 1}): {distance:.3f}\n"
          f"{'the floor, ' + str(count) + ' real samples instead':>40}: {floor:.3f}\n")
    with open(os.path.join(run, "log.jsonl"), "a") as f:
        f.write(json.dumps(dict(step=options["steps"], frechet_pixels=distance, floor=floor,
                                count=count, loss_by_sigma=table)) + "\n")


# ---- Command line --------------------------------------------------------------------------------

def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = commands.add_parser("sample", help="draw samples from a run")
    table = commands.add_parser("samplers", help="each sampler's distance to the data, by NFE")
    add_commands(commands)
    for command in (c, table):
        command.add_argument("run", metavar="RUN", help="folder that train.py made")
        command.add_argument("--num", type=number(int, 1),
                             help="default: 64 images, or 4000 points")
        command.add_argument("--schedule", choices=SCHEDULES, help="default: the run's own")
        command.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
                             help="sample i has seed SEED + i (default: 0)")
        command.add_argument("--batch", type=number(int, 1), default=64,
                             help="default: 64; changes no image")
        command.add_argument("--weights", choices=["ema", "raw"], default="ema",
                             help="default: ema")
        command.add_argument("--device", help="none: cuda where there is one, else cpu")
    table.add_argument("--steps", type=number(int, 1), nargs="+", default=[6, 12, 24, 48],
                       help="default: 6 12 24 48")
    c.add_argument("--sampler", choices=SAMPLERS, default="heun", help="default: heun")
    c.add_argument("--steps", type=number(int, 1), default=18,
                   help="default: 18; rk45 chooses its own")
    c.add_argument("--churn", type=number(float, 0), help="edm-stochastic's S_churn (default: 0)")
    c.add_argument("--eta", type=number(float, 0, 1), help="ddim's noise, 0 to 1 (default: 0)")
    c.add_argument("--snr", type=number(float, 1e-4, 1), help="of pc's corrector (default: 0.16)")
    c.add_argument("--rtol", type=number(float, 1e-7, 1),
                   help="rk45's relative and absolute tolerance (default: 1e-5)")
    c.add_argument("--variance", choices=VARIANCES, help="of ddpm (default: beta_tilde) and, but "
                   "for beta, of ddim; sn and npr need a run with that --head")
    c.add_argument("--guidance", type=number(float, 0), default=1.0,
                   help="classifier-free: away from the unconditional denoiser if above 1 "
                   "(default: 1, none)")
    c.add_argument("--class", dest="label", help="name or number of one class; none: all in turn")
    c.add_argument("--out", help="a .png grid or an .npz of arrays; none: a .png in RUN")
    return p


def choices_of(args, options):
    """generate's choices out of the command line; BadInput where one has no meaning."""
    given = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    for name in given:
        if args.sampler not in CHOICES[name][0]:
            raise BadInput(f"--{name} belongs to --sampler {' and '.join(CHOICES[name][0])}")
    variance = given.get("variance")
    for bad, sentence in [
        (variance == "beta" and args.sampler == "ddim", "--variance beta belongs to --sampler "
         "ddpm"),
        (variance in ("sn", "npr") and options["head"] != variance, f"--variance {variance}: the "
         f"run has no such head; train one with train.py --head {variance} --init {args.run}"),
        (variance in ("sn", "npr") and args.guidance != 1, "--guidance: the head knows the "
         "conditional denoiser's covariance only; choose another --variance"),
        (args.guidance != 1 and not options["label-dropout"], "--guidance needs a run trained "
         "with --cond and --label-dropout, which has an unconditional denoiser too"),
    ]:
        if bad:
            raise BadInput(sentence)
    return given


def sample(args):
    """evaluate.py sample: draws samples of a run and saves them."""
    device = pick_device(args.device)
    denoiser, options, step = load_run(args.run, device, args.weights)
    schedule = SCHEDULES[args.schedule]() if args.schedule else build_schedule(options)
    classes, images = options["classes"], len(options["shape"]) > 1
    choices = choices_of(args, options)
    args.num = args.num or (64 if images else 4000)
    attempt(f"--steps {args.steps}", "choose fewer", schedule.time_steps, args.steps)
    labels = None
    if args.label is not None:
        names = classes if args.label in classes else [str(k) for k in range(len(classes))]
        if args.label not in names:
            raise BadInput(f"--class {args.label}: " + (
                f"choose one of {', '.join(classes)}" if classes else
                "the run is not class-conditional; leave the option out"))
        labels = torch.full((args.num,), names.index(args.label))
    elif classes:
        labels = torch.arange(args.num) % len(classes)
    how = args.sampler + ("" if args.sampler == "rk45" else f", {args.steps} steps")
    for name, value in [*choices.items(), ("schedule", args.schedule), ("class", args.label),
                        ("guidance", args.guidance if args.guidance != 1 else None),
                        ("seed", args.seed or None), ("raw", args.weights == "raw" or None)]:
        how += f", {name} {value}" if value is not None else ""
    name = how.replace(" steps", "").replace(", ", "-").replace(" ", "-")
    out = args.out or f"{args.run}/{name}.png"
    if os.path.isdir(out) or not out.endswith((".png", ".npz")):
        raise BadInput(f"--out {out} is not a file's name ending in .png or .npz; choose another")
    attempt(out, "choose another --out", lambda: open(f"{out}.part", "wb").close())
    os.remove(f"{out}.part")

    analytic = None
    if choices.get("variance") == "analytic":
        analytic = analytic_moments(args.run, denoiser, options, step, args.weights, device)
    start, denoise = time.time(), Counted(denoiser)
    x = to_uint8(generate(denoise, range(args.seed, args.seed + args.num), options["shape"],
                          args.sampler, schedule, args.steps, labels,
                          args.batch if images else args.num, device, analytic, args.guidance,
                          **choices))
    if out.endswith(".npz"):
        with open(f"{out}.part", "wb") as file:
            np.savez(file, images=x, **({} if labels is None else {"labels": labels.numpy()}))
        os.replace(f"{out}.part", out)
    else:
        equal = args.label is None and classes and args.num % len(classes) == 0
        rows = classes if images and equal else ()
        x = x[np.argsort(labels.numpy(), kind="stable")] if rows else x       # a row for each class
        save_pictures(out, [(how, x)], rows)
    print(f"{args.num} samples of {args.run} at step {step}, {args.weights} weights, {how}, "
          f"NFE {denoise.rows / args.num:g}, "
          f"{time.time() - start:.1f} s\n{out}")


def samplers(args):
    """evaluate.py samplers: a table of sampler, steps, NFE and Frechet distance in pixel space."""
    device = pick_device(args.device)
    denoiser, options, step = load_run(args.run, device, args.weights)
    schedule = SCHEDULES[args.schedule]() if args.schedule else build_schedule(options)
    args.num = args.num or (64 if len(options["shape"]) > 1 else 4000)
    for steps in args.steps:
        attempt(f"--steps {steps}", "choose fewer", schedule.time_steps, steps)
    real = real_features(run_data(options), options["seed"])
    if not 2 <= args.num <= len(real) // 2:
        raise BadInput(f"--num {args.num} is not within [2, {len(real) // 2}], half of the data")
    reference, classes = moments(real[args.num:]), options["classes"]
    labels = torch.arange(args.num) % len(classes) if classes else None
    analytic = analytic_moments(args.run, denoiser, options, step, args.weights, device)
    grids = [(name, steps, more) for steps in args.steps for name, more in [
        ("euler", {}), ("heun", {}), ("edm-stochastic", {"churn": 10.0}), ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.5}), ("ddpm", {"variance": "beta_tilde"}),
        ("ddpm", {"variance": "beta"}), ("ddpm", {"variance": "analytic"}), ("pc", {})]]
    grids += [("rk45", 18, {"rtol": rtol}) for rtol in (1e-2, 1e-3, 1e-4)]
    floor = frechet_distance(*moments(real[:args.num]), *reference)
    print(f"{args.run} at step {step}, {args.weights} weights, {args.num} samples; "
          f"{args.num} real ones: {floor:.3f}\n\n"
          f"{'sampler':32}{'steps':>6}{'NFE':>8}{'distance':>10}", flush=True)
    for name, steps, more in grids:
        denoise = Counted(denoiser)
        x = generate(denoise, range(args.seed, args.seed + args.num), options["shape"], name,
                     schedule, steps, labels, args.batch, device, analytic, **more)
        distance = frechet_distance(*moments(pixel_features(x)), *reference)
        called = f"{name} " + " ".join(f"{key} {value}" for key, value in more.items())
        print(f"{called:32}{steps if name != 'rk45' else '':>6}{denoise.rows / args.num:8g}"
              f"{distance:10.3f}", flush=True)


def main(argv=None):
    try:
        args = parser().parse_args(argv)
        figures = {name: function for name, (function, *_) in FIGURES.items()}
        (dict(sample=sample, samplers=samplers) | figures)[args.command](args)
        return 0
    except (BadInput, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
