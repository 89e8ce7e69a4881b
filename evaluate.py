"""evaluate.py: how good it is.  Draws samples of runs, measures losses and distances.

    python evaluate.py sample RUN --sampler heun --steps 18 --num 64
    python evaluate.py samplers RUN         each sampler's distance to the data, by steps and NFE
"""

import argparse
import json
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets import BadInput, attempt, load_data, load_rows, picture
from losses import WEIGHTS, stf_target, stf_weights
from networks import MLP, UNETS, Denoiser, UNet, target_coefficients
from samplers import (analytic_covariance, ddim, ddpm, edm_stochastic, euler, guidance, heun,
                      npr_covariance, predictor_corrector, rk45, seeded_noise, sn_covariance)
from schedules import EDM, SCHEDULES


# ---- Pictures ------------------------------------------------------------------------------------

def to_uint8(x):
    """Images in [-1, 1] -> uint8; points, (n, d), as they are.  A tensor -> an array."""
    x = x.detach().cpu()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy() if x.ndim == 4 else x.numpy()


def tile(x, columns=None, cell=64):
    """Images (n, C, H, W) uint8 -> one PIL image, pixels enlarged; columns None: nearly square."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, zoom = math.ceil(len(x) / columns), max(1, cell // x.shape[-1])
    page = np.zeros((rows * columns, *x.shape[1:]), np.uint8)
    page[:len(x)] = x
    page = page.reshape(rows, columns, *x.shape[1:]).transpose(2, 0, 3, 1, 4)
    image = picture(page.reshape(x.shape[1], rows * x.shape[2], columns * x.shape[3]))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def scatter(x, half_width=1.2, side=400):
    """Points (n, d) -> a PIL image of their first two coordinates, each within +-half_width."""
    page = Image.new("L", (side, side), 235)
    pen = ImageDraw.Draw(page)
    for a, b in (x[:, :2] * [1, -1] / half_width + 1) / 2 * side:
        pen.rectangle((a, b, a + 1, b + 1), fill=0)
    return page


def save_pictures(path, panels, names=()):
    """One PNG of captioned panels side by side: [(caption, images or points), ...].

    names: one for each row of images, as of its class; a panel then has len(names) equal rows.
    """
    parts = [(text, scatter(x) if x.ndim == 2 else tile(x, len(x) // len(names) if names else None))
             for text, x in panels]
    gap, top, font = 16, 28, ImageFont.load_default(size=16)
    left = gap + max((math.ceil(font.getlength(name)) + gap for name in names), default=0)
    width = [max(image.width, math.ceil(font.getlength(text))) for text, image in parts]
    height = max(image.height for _, image in parts)
    page = Image.new("RGB", (left + sum(width) + gap * len(parts), top + height + gap), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        pen.text((gap, top + height * (i + 0.5) / len(names)), name, "black", font, anchor="lm")
    for (text, image), w in zip(parts, width):
        pen.text((left, 5), text, "black", font)
        page.paste(image.convert("RGB"), (left, top))
        left += w + gap
    page.save(f"{path}.part", format="PNG", optimize=True)
    os.replace(f"{path}.part", path)


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


# ---- Runs ----------------------------------------------------------------------------------------
# A run is a folder: options.json, log.jsonl, checkpoint-*.pt, samples-*.png.

def new_run(out, name, root="runs"):
    """Makes the folder of a new run: `out`, or the next free root/NUMBER-name; returns its path."""
    if out is None:
        taken = [int(n.split("-")[0]) for n in os.listdir(root) if n.split("-")[0].isdigit()] \
            if os.path.isdir(root) else []
        out = f"{root}/{max(taken, default=-1) + 1:03d}-{name}"
    if os.path.isdir(out) and os.listdir(out):
        raise BadInput(f"{out} is not empty; choose another --out, or go on with --resume {out}")
    attempt(out, "choose another --out", os.makedirs, out, exist_ok=True)
    return out


def newest_run(root="runs"):
    runs = [f"{root}/{n}" for n in os.listdir(root)] if os.path.isdir(root) else []
    runs = [r for r in runs if os.path.exists(f"{r}/options.json")]
    if not runs:
        raise BadInput(f"there is no run under {root}/ to resume; start one, or name its folder")
    return max(runs, key=lambda r: os.path.getmtime(f"{r}/options.json"))


def checkpoints(run):
    """Paths of a run's checkpoints, oldest first."""
    return sorted(str(p) for p in Path(run).glob("checkpoint-*.pt"))


def read_options(run, needed=()):
    """The options a run was started with; each of `needed` must be among them."""
    def read():
        options = json.loads(Path(run, "options.json").read_text())
        [options[name] for name in needed]
        return options
    return attempt(f"{run}/options.json", "name a folder that train.py made", read)


def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.part", path)


def load_checkpoint(run, device="cpu"):
    """The newest checkpoint of a run: step, options, model, ema, optimizer.  Never unpickled."""
    paths = checkpoints(run)
    if not paths:
        raise BadInput(f"{run} has no checkpoint; name a folder that train.py made")
    try:
        state = torch.load(paths[-1], map_location=device, weights_only=True)
        state["step"], state["options"], state["model"], state["ema"], state["optimizer"]
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{paths[-1]} is damaged, or no checkpoint of train.py; remove it, and "
                       "the one before it is used") from error
    return state


def load_weights(denoiser, weights, run):
    try:
        denoiser.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:     # torch lists every name there is
        raise BadInput(f"the weights of {run} are not of this network; name another run, or build "
                       "the network as that run did") from error


def build_denoiser(options):
    """The network and preconditioning of a run, with fresh weights."""
    channels, *size = options["shape"]
    classes = len(options["classes"])
    if options["arch"] == "mlp":
        model = MLP(channels, options["width"] or 128, options["blocks"] or 3, classes,
                    options["head"] != "none")
    else:
        given = {key: options[key] for key in ("width", "blocks") if options[key]}
        if options["mult"]:
            given["mult"] = tuple(int(m) for m in options["mult"].split(","))
        given = UNETS[options["arch"]] | given
        what = f"--arch {options['arch']} at {size[0]}x{size[0]}"
        model = attempt(what, "choose another --size or --mult", lambda: UNet(
            size[0], channels, dropout=options["dropout"], classes=classes,
            label_dropout=options["label-dropout"], augment_dim=9 if options["augment"] else 0,
            head=options["head"] != "none", **given))
    return Denoiser(model, partial(precondition, options["target"], build_schedule(options)))


def precondition(target, schedule, sigma):
    """The schedule row's c_skip, c_out, c_in, c_noise; the first two are the target's, if any."""
    c_skip, c_out, c_in, c_noise = schedule.precondition(sigma)
    if target != "schedule":
        c_skip, c_out = target_coefficients(target, sigma)
    return c_skip, c_out, c_in, c_noise


def build_schedule(options):
    """The schedule row of a run."""
    if options["schedule"] == "edm":
        return EDM(P_mean=options["P-mean"], P_std=options["P-std"])
    return SCHEDULES[options["schedule"]]()


def loss_weight(options):
    """lambda(sigma), the weight on |D - x0|^2: the schedule row's own, or the named one.

    Normalised: E[lambda sigma^2] = 1 under p_train(sigma), so that weights differ in shape alone;
    the mean is taken over a million quantiles.
    """
    schedule = build_schedule(options)
    weight = schedule.weight if options["weight"] == "schedule" else WEIGHTS[options["weight"]]
    if not options["normalize-weight"]:
        return weight
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    sigma = schedule.training_sigma(u)
    mean = (weight(sigma) * sigma ** 2).mean().item()
    return lambda sigma: weight(sigma) / mean


def load_run(run, device="cpu", weights="ema"):
    """A run's denoiser in eval mode, its options, and the step of its newest checkpoint."""
    state = load_checkpoint(run, device)
    denoiser = build_denoiser(state["options"]).to(device).eval()
    load_weights(denoiser, state["ema" if weights == "ema" else "model"], run)
    return denoiser, state["options"], state["step"]


def pick_device(name):
    """The device of that name; None: cuda where there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    attempt(f"--device {name}", "choose cpu or, where there is a GPU, cuda", torch.zeros, 1,
            device=name)
    return name


# ---- Sampling ------------------------------------------------------------------------------------

SAMPLERS = ("heun", "euler", "edm-stochastic", "ddim", "ddpm", "pc", "rk45")
CHOICES = {          # of one sampler or two: (samplers, default)
    "churn": (("edm-stochastic",), 0.0), "eta": (("ddim",), 0.0), "snr": (("pc",), 0.16),
    "rtol": (("rk45",), 1e-5), "variance": (("ddpm", "ddim"), "beta_tilde")}
VARIANCES = ("beta_tilde", "beta", "analytic", "sn", "npr")


def generate(denoise, seeds, shape, sampler, schedule, steps, labels=None, batch=64, device="cpu",
             analytic=None, guide=1.0, **choices):
    """Samples, one per seed: (len(seeds), *shape), on the CPU.

    Sample i depends on seeds[i] and labels[i] alone, not on the batch it is drawn in.  denoise:
    a Denoiser, or any (x, sigma, labels) -> D.  choices: see CHOICES; analytic: analytic_moments,
    for that variance; guide: classifier-free guidance's weight.
    """
    t, samples = schedule.time_steps(steps), []
    for i in range(0, len(seeds), batch):
        own = () if labels is None else (labels[i:i + batch].to(device),)
        noise = seeded_noise(seeds[i:i + batch], shape, device)
        D = denoise if guide == 1 else guidance(denoise, denoise, guide)
        x = schedule.sigma(t[0]) * noise()                                        # (b, *shape)
        samples.append(draw(D, x, own, noise, sampler, schedule, t, analytic,
                            {name: choices.get(name, value)
                             for name, (_, value) in CHOICES.items()}).cpu())
    return torch.cat(samples)


def draw(denoise, x, labels, noise, sampler, schedule, t, analytic, choices):
    """The named sampler from x, of noise level sigma(t[0]); labels: () or one tensor (b,)."""
    sigma, start, images = schedule.sigma(t), schedule.s(t[0]) * x, x.ndim > 2
    variance, cap, kept = choices["variance"], None, {}

    def D(x, sigma):
        if choices["variance"] in ("sn", "npr"):          # one call of the network gives D and head
            D_x, kept["head"] = denoise.with_head(x, sigma, *labels)
            return D_x
        return denoise(x, sigma, *labels)

    if variance == "analytic":
        variance = analytic_covariance(*analytic)
    elif variance in ("sn", "npr"):
        covariance = sn_covariance if variance == "sn" else npr_covariance
        variance = covariance(lambda x, sigma: kept["head"])
    if callable(variance) and images:
        cap = 2.0 if sampler == "ddpm" else 1.0                       # as published
    if sampler == "euler":
        return euler(D, start, t, schedule)
    if sampler == "heun":
        return heun(D, start, t, schedule)
    if sampler == "edm-stochastic":
        return edm_stochastic(D, x, sigma, noise, S_churn=choices["churn"])
    if sampler == "ddim":
        return ddim(D, x, sigma, noise, choices["eta"], variance if callable(variance) else None,
                    cap)
    if sampler == "ddpm":
        return ddpm(D, x, sigma, noise, variance, cap)
    if sampler == "pc":
        return predictor_corrector(D, start, t, schedule, noise, choices["snr"], norms=images)
    return rk45(denoise, start, t, schedule, choices["rtol"], choices["rtol"], labels)[0]


@torch.no_grad()
def analytic_moments(run, denoiser, options, step, weights="ema", device="cpu", count=128):
    """Analytic-DPM's Gamma, (levels, E|eps_hat|^2/d at each), measured once, kept with the run.

    33 levels from .002 to 200; `count` images of the data, each with a noise and its opposite, and
    of |eps_hat|^2 only what it differs from |eps|^2 by: sigma^2 (1 - Gamma) would else be nothing
    but noise at large sigma.
    """
    path = os.path.join(run, f"analytic-{weights}-{step:07d}.json")
    if not os.path.exists(path):
        data = run_data(options)
        g = torch.Generator().manual_seed(options["seed"])
        rows = torch.randperm(len(data.x), generator=g)[:count].repeat(2)
        x0 = load_rows(torch.from_numpy(np.asarray(data.x)), rows, None, device)
        labels = torch.from_numpy(data.labels)[rows].to(device) if options["cond"] else None
        levels, moments = torch.logspace(math.log10(0.002), math.log10(200), 33).tolist(), []
        for sigma in levels:
            noise = torch.randn(x0[len(x0) // 2:].shape, generator=g).to(device)
            noise = torch.cat([noise, -noise])                                    # (2 count, ...)
            x = x0 + sigma * noise
            D = torch.cat([denoiser(x[i:i + 64], torch.tensor(sigma),
                                    None if labels is None else labels[i:i + 64])
                           for i in range(0, len(x), 64)])
            difference = ((x - D) / sigma).double() ** 2 - noise.double() ** 2
            moments.append(1 + difference.mean().item())
        write_json(path, dict(levels=levels, moments=moments, images=count))
    stored = json.loads(Path(path).read_text())
    return stored["levels"], stored["moments"]


def run_data(options):
    """The data that a run was trained on; BadInput if it has changed."""
    data = load_data(options["data"], options["data-dir"], options["size"])
    if data.fingerprint != options["fingerprint"]:
        raise BadInput(f"the run was trained on other data than {data.source}; give it back what "
                       "it had")
    return data


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

class Parser(argparse.ArgumentParser):
    """Its errors are BadInput, so that a wrong option is one sentence; no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def status(text):
    """A line that rewrites itself on a terminal; None ends it."""
    if text is None or not sys.stdout.isatty():
        print(text or "", flush=True)
    else:
        print(f"\r{text:<79}", end="", flush=True)


def number(kind, low, high=float("inf")):
    """A type for argparse: an int or float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            above = "a number above 0" if 0 < low < 1 else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not " + (
                above if high == float("inf") else f"within [{low}, {high}]"))
        return value
    parse.__name__ = kind.__name__
    return parse


def multipliers(text):
    """A type for argparse: whole numbers above 0, separated by commas."""
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", text):
        raise ValueError(text)
    return text


def even(text):
    """A type for argparse: an even number of at least 4 (sines and cosines come in pairs)."""
    if int(text) < 4 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text} is not an even number of at least 4")
    return int(text)


def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = commands.add_parser("sample", help="draw samples from a run")
    table = commands.add_parser("samplers", help="each sampler's distance to the data, by NFE")
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


class Counted:
    """A denoiser that counts the rows it is asked for: NFE = rows / samples."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x, sigma, *labels):
        return self.with_head(x, sigma, *labels)[0]

    def with_head(self, x, sigma, *labels):
        self.rows += len(x)
        return self.denoiser.with_head(x, sigma, *labels)


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
        dict(sample=sample, samplers=samplers)[args.command](args)
        return 0
    except (BadInput, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
