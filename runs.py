"""runs.py: what a run is.  Its folder, checkpoints, network, log, samples and pictures.

A run is a folder that train.py makes: options.json, log.jsonl (a line per step), checkpoint-*.pt
(plain tensors, never unpickled), samples-*.png and, with matplotlib, where-stf-acts.png.
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
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from averages import reconstruct
from datasets import POINT_SETS, BadInput, attempt, load_data, load_rows, picture
from losses import WEIGHTS
from networks import MLP, UNETS, Denoiser, UNet, target_coefficients
from samplers import (analytic_covariance, ddim, ddpm, edm_stochastic, euler, guidance, heun,
                      npr_covariance, predictor_corrector, rk45, seeded_noise, sn_covariance)
from schedules import EDM, SCHEDULES


# ---- Command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Its errors are BadInput, so that a wrong option is one sentence; no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f"{message}; see --help")

    def parse_args(self, *args):
        given = super().parse_args(*args)
        for name, value in vars(given).items():
            if value == "":                        # --resume "$RUN" must not start another run
                self.error(f"{name.replace('_', '-')} is empty, as a variable that was never set")
        return given


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
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers as in 1,2,2")
    return text


def lengths(text):
    """A type for argparse: different half-lives (whole numbers) or widths (0.01 to 0.28)."""
    items = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,11}|0\.\d{1,4}", item) and (
            float(item) >= 1 or 0.01 <= float(item) <= 0.28) for item in items) or \
            len({*map(float, items)}) < len(items):
        raise argparse.ArgumentTypeError(f"{text} is no list of half-lives in images, as in "
                                         "500,50, or widths from 0.01 to 0.28, no two alike")
    return text


def even(text):
    """A type for argparse: an even number of at least 4 (sines and cosines come in pairs)."""
    if int(text) < 4 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text} is not an even number of at least 4")
    return int(text)


# ---- Ranks ---------------------------------------------------------------------------------------
# torchrun starts one process for each GPU, or several on CPUs; without it there is one, rank 0.

def start_ranks():
    """Joins torchrun's process group, if there is one."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def ranks():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x):
    """The sum of the ranks' tensors x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def agree(call):
    """call() on every rank.  BadInput on one ends all; only the first of these says so."""
    (rank, world), result, error = ranks(), None, None
    try:
        result = call()
    except BadInput as bad:
        error = bad
    errors = [error and str(error)] * world
    if world > 1:
        dist.all_gather_object(errors, errors[0])
    if any(errors):
        if rank == errors.index(next(filter(None, errors))):
            raise error
        sys.exit(2)
    return result


def first(call):
    """Rank 0's call(), told to all ranks."""
    told = [agree(lambda: call() if ranks()[0] == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


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


# ---- Folders and checkpoints ---------------------------------------------------------------------

SAVED = {"step": int, "options": dict, "model": dict, "ema": dict, "optimizer": dict,
         "scaler": dict, "beta": object, "skipped": list, "best": float}       # in a checkpoint


def check_empty(out):
    if os.path.isdir(out) and os.listdir(out):
        raise BadInput(f"{out} is not empty; choose another --out, or go on with --resume {out}")


def new_run(out, name, root="runs"):
    """Makes the folder of a new run: `out`, or the next free root/NUMBER-name; returns its path."""
    if out is None:
        taken = [int(n.split("-")[0]) for n in os.listdir(root) if n.split("-")[0].isdigit()] \
            if os.path.isdir(root) else []
        out = f"{root}/{max(taken, default=-1) + 1:03d}-{name}"
    check_empty(out)
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


def read_options(run, kinds):
    """The options a run was started with; each must be of its kind, as in train.OPTIONS."""
    path = f"{run}/options.json"

    def read():
        options = json.loads(Path(path).read_text())
        [options[name] for name in ("shape", "classes", "fingerprint")]
        for name, (kind, default, _) in kinds.items():
            value = options[name]
            if value is None and "None" in str(default):
                continue
            fit = kind if isinstance(kind, list) else (True, False) if kind is bool else \
                [attempt(f"{name} in {path}", "mend it", kind, str(value))]
            if value not in fit:
                raise ValueError(f"{name} is {value}")
        return options
    return attempt(path, "mend it, or name a folder that train.py made", read)


def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.part", path)


def save_checkpoint(path, state):
    """Plain tensors and JSON-able options, whole or not at all."""
    def write():
        with open(path + ".part", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)
    attempt(path, "make room there, and go on with --resume", write)


def load_checkpoint(run, device="cpu"):
    """A checkpoint, or the newest of a run, as train.py's `train` saved it.  Never unpickled."""
    path = run if os.path.isfile(run) else (checkpoints(run) or [None])[-1]
    if path is None:
        raise BadInput(f"{run} has no checkpoint; name a folder that train.py made")
    try:
        state = attempt(path, "", torch.load, path, map_location=device, weights_only=True)
        if not all(isinstance(state[name], kind) for name, kind in SAVED.items()):
            raise TypeError
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is damaged, or no checkpoint of train.py; name another, or move it "
                       "away, and the one before it is used") from error
    return state


def load_weights(denoiser, weights, run):
    try:
        denoiser.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:     # torch lists every name there is
        raise BadInput(f"the weights of {run} are not of this network; name another run, or build "
                       "the network as that run did") from error


def load_optimizer(optimizer, scaler, state, run):
    def load():
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for p, own in optimizer.state.items():      # its kernels would read beyond a small tensor
            if any(value.ndim and value.shape != p.shape for value in own.values()):
                raise ValueError("it is of another network")
    attempt(f"the optimizer's state of {run}", "move its newest checkpoint away", load)


def build_denoiser(options):
    """The network and preconditioning of a run, with fresh weights."""
    channels, *size = options["shape"]
    classes = len(options["classes"])
    if options["arch"] == "mlp":
        build = partial(MLP, channels, options["width"] or 128, options["blocks"] or 3, classes,
                        options["head"] != "none")
    else:
        given = {key: options[key] for key in ("width", "blocks") if options[key]}
        given |= {key: tuple(int(m) for m in options[key].split(","))
                  for key in ("mult", "attend") if options[key]}
        given = UNETS[options["arch"]] | given
        build = partial(
            UNet, size[0], channels, dropout=options["dropout"], classes=classes,
            label_dropout=options["label-dropout"], augment_dim=9 if options["augment"] else 0,
            head=options["head"] != "none", **given)
    model = attempt(f"--arch {options['arch']} for shape {options['shape']}",
                    "choose another --size, --width or --mult", build)
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
    """A run's denoiser in eval mode, its options, and the step of its newest checkpoint.

    weights: "raw", "ema" (the first of --ema's averages), another of these by its name, or any
    width, where --ema has widths.
    """
    state = load_checkpoint(run, device)
    options, averages = state["options"], state["ema"]
    denoiser = attempt(f"the options of {run}", "name another run", build_denoiser, options)
    name = next(iter(averages), None) if weights == "ema" else weights
    if name != "raw" and name not in averages:
        cure = f"choose raw, ema, one of {', '.join(averages)}, or, if these are widths, any width"
        averages[name] = attempt(f"--weights {name}", cure, lambda: reconstruct(
            checkpoints(run) or [run], partial(load_checkpoint, device=device), float(name)))
    load_weights(denoiser, state["model"] if name == "raw" else averages[name], run)
    return denoiser.to(device).eval(), options, state["step"]


def pick_device(name):
    """The device of that name; None: cuda where there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    attempt(f"--device {name}", "choose cpu or, where there is a GPU, cuda", torch.zeros, 1,
            device=name)
    return name


# ---- Data of a run -------------------------------------------------------------------------------

def run_data(options):
    """The data that a run was trained on; BadInput if it has changed."""
    data = load_data(options["data"], options["data-dir"], options["size"])
    if data.fingerprint != options["fingerprint"]:
        raise BadInput(f"the run was trained on other data than {data.source}; give it back what "
                       "it had")
    return data


def on_device(data, device):
    """The rows and labels as tensors, on a GPU if a quarter of its free memory has room."""
    pixels, labels = torch.from_numpy(np.asarray(data.x)), data.labels
    if device.startswith("cuda") and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        pixels = pixels.to(device)
    return pixels, None if labels is None else torch.from_numpy(labels)


def held_out(data, options, count=None):
    """(x0, labels) that training does not see, on the device; 64 images or 1000 points by default.

    Fresh draws of a set that is drawn here, else every `holdout`-th row; training rows where that
    option is 0, or beyond the size of the set.
    """
    count, k = count or (64 if data.x.ndim == 4 else 1000), options["holdout"]
    if options["data"] in ("digits", *POINT_SETS):
        data = load_data(options["data"], options["data-dir"], options["size"], fresh=count)
        k = 0
    N = len(data.x)
    rows = torch.arange(k - 1, N, k) if 0 < k <= N else torch.arange(N)
    rows = rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
    labels = torch.from_numpy(data.labels)[rows].to(options["device"]) if options["cond"] else None
    return load_rows(torch.from_numpy(np.asarray(data.x)), rows, None, options["device"]), labels


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
    folder = os.path.dirname(run) if os.path.isfile(run) else run
    path = os.path.join(folder, f"analytic-{weights}-{step:07d}.json")
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

    def read():
        stored = json.loads(Path(path).read_text())
        return tuple([*map(float, stored[name])] for name in ("levels", "moments"))
    return attempt(path, "delete it, and it is measured again", read)


def save_samples(run, step, denoiser, ema, options, data):
    """One picture of the same samples from the raw and the averaged weights, classes in rows.

    Points are cheap: 4,000 of them, beside the data.
    """
    points = data.x.ndim == 2
    names = [] if points else options["classes"][:10]
    count = 4000 if points else 8 * len(names) if names else 64
    labels = torch.arange(count) % len(names or options["classes"]) if options["cond"] else None
    labels = labels.sort().values if names else labels                # a row for each class
    panels = [("data", data.x[:count])] if points else []
    for name, model in [("raw weights", denoiser), ("averaged weights (EMA)", ema)]:
        x = generate(model.eval(), range(count), options["shape"], "heun", build_schedule(options),
                     options["sample-steps"], labels, batch=count if points else 64,
                     device=options["device"])
        panels.append((f"step {step}, {name}", to_uint8(x)))
    save_pictures(os.path.join(run, f"samples-{step:07d}.png"), panels, names)


# ---- Log -----------------------------------------------------------------------------------------

class Log:
    """log.jsonl, a line per step, and one status line on the terminal, at most once a second.

    Losses wait on the device until then: reading one out makes the host wait for the GPU.  Every
    rank reads the same ones, and stops after ten steps in a row that had to be skipped; the first
    writes.  skipped: how many were, and how many of these in a row up to now.
    """

    def __init__(self, run, options, step, skipped):
        self.run, self.options, self.waiting = run, options, []
        self.path = os.path.join(run, "log.jsonl") if ranks()[0] == 0 else os.devnull
        self.start = self.last = time.time()
        self.begin, self.mean, self.skipped = step, None, list(skipped)

        def kept():                             # what a killed run logged past its checkpoint goes
            lines = Path(self.path).read_text().splitlines() if os.path.exists(self.path) else []
            return [line + "\n" for line in lines
                    if line.endswith("}") and json.loads(line)["step"] <= step]
        kept = attempt(self.path, "mend it, or move it away", kept)       # before it is overwritten
        with open(self.path, "w") as f:
            f.writelines(kept)

    def step(self, step, loss, norm, sigma):
        """loss (B,), norm (), sigma (B, 1, ..), or sa's (K, B, ..): of them, what went wrong."""
        bad = ~loss.isfinite()
        bad = bad | (~norm.isfinite() & ~bad.any())     # the gradient alone: any sample's
        sigma = sigma.flatten()[:len(loss)]
        low, high = torch.where(bad, sigma, torch.inf).min(), torch.where(bad, sigma, 0).max()
        self.waiting.append((step, torch.stack([loss.mean(), norm, low, high])))
        if time.time() - self.last > (1 if sys.stdout.isatty() else 15):
            self.flush()

    def flush(self):
        if not self.waiting:
            return
        values = torch.stack([value for _, value in self.waiting]).tolist()
        for (step, _), (loss, norm, low, high) in zip(self.waiting, values):
            if high:
                self.skipped = [self.skipped[0] + 1, self.skipped[1] + 1]
                self.write(step, skipped=self.skipped[0], sigma=[low, high])
            else:
                self.skipped[1] = 0
                self.write(step, loss=loss, grad_norm=norm)
                self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
            if self.skipped[1] == 10:
                raise BadInput(f"ten steps in a row up to {step} had no finite loss or gradient, "
                               f"at noise levels {low:.3g} to {high:.3g}; try a smaller --lr; the "
                               f"last good checkpoint: {(checkpoints(self.run) or ['none'])[-1]}")
        step, self.waiting, self.last = self.waiting[-1][0], [], time.time()
        pace = (self.last - self.start) / (step - self.begin)
        left = int(pace * (self.options["steps"] - step))
        status(f"step {step}/{self.options['steps']}  loss {self.mean or math.nan:.4f}  "
               + f"{self.skipped[0]} skipped  " * bool(self.skipped[0]) +
               f"{self.options['batch'] / pace:.0f} samples/s  "
               f"{left // 60}:{left % 60:02d} left")

    def write(self, step, **values):
        with open(self.path, "a") as f:
            f.write(json.dumps(dict(step=step, **values)) + "\n")

    def close(self):
        self.flush()
        status(None)
