"""train.py: the script that wires the other files together.

    python train.py                               built-in digits, STF, two cores, under 3 minutes
    python train.py --data cifar10 --xflip        photographs, downloaded once
    python train.py --data FOLDER|FILE --cond     your own images or points, class-conditional
    python train.py --resume                      go on with the newest run

One step: (seed, step) -> indices, sigma, noise -> loss (B,) -> mean -> backward -> AdamW -> EMA.
The batch is a pure function of (seed, step): no loader, no worker, no state to save.  So a run that
is killed and resumed is the run that was not, and two losses can be compared on the same noise.
"""

import argparse
import copy
import os
import sys
import time
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import runs
from datasets import BadInput, load_data, load_rows
from losses import (WEIGHTS, RunningBeta, antithetic_loss, augment, augment_labels,
                    augmented_stf_target, draw_augmentation, dsm_loss, head_loss, interpolate,
                    mean_correction, measure_gamma, path_noise, sa_loss, sa_tau, stf_atoms,
                    stf_loss, stf_target, stf_taylor_terms, taylor_terms)
from networks import UNETS
from runs import Log, even, multipliers, number, save_checkpoint, save_samples
from schedules import SCHEDULES


# ---- Options -------------------------------------------------------------------------------------

COUNT, INDEX, SHARE = number(int, 1), number(int, 0), number(float, 0, 1)

OPTIONS = {   # name: (type or choices, default or defaults for (digits, points, images), help)
    "data": (str, "digits", "digits, two-gaussians, two-gaussians-64d, checkerboard, swiss-roll, "
             "cifar10, mnist, or a path: folder of images (sub-folder = class), .zip, .npz, .npy"),
    "data-dir": (str, "data", "where downloads and caches lie"),
    "size": (COUNT, None, "centre-crop and resize the images to SIZE x SIZE"),
    "cond": (bool, (True, False, False), "class-conditional"),
    "xflip": (bool, False, "mirror each image with probability 1/2"),
    "augment": (SHARE, 0.0, "probability of each of EDM's geometric transforms, as in .12"),
    "loss": (["stf", "dsm", "antithetic", "sa", "taylor", "stf-taylor"], "stf", "objective"),
    "ref-batch": (COUNT, (1024, 1024, 4096), "size n of STF's reference, the batch included"),
    "mean-correction": (bool, True, "correct what STF's targets of a batch have in common"),
    "K": (COUNT, 2, "sa: consecutive levels"),
    "lam": (number(float, 0), None, "sa: weight of the term of K errors; by default 0, 1, .3 for K "
            "= 1, 2, 3, then .2"),
    "tau": (["unit", "window", "paper"], "unit", "sa: factors of the K errors: 1, as published; "
            "Theorem 1's, as shares of the first; Theorem 1's"),
    "level-noise": (["independent", "path"], "independent", "sa: noises of the K levels, as "
                    "published, or of one path, nearly unbiased"),
    "order": (number(int, 0, 2), 0, "of the Taylor polynomial around the clean image"),
    "trace": (["hutchinson", "exact"], "hutchinson", "how orders 1 and 2 get the Jacobian's"),
    "control": (["switch", "atoms"], "switch", "stf-taylor: a control below a noise level and STF "
                "above it, or both everywhere, the control averaged over the posterior"),
    "switch-sigma": (number(float, 1e-9), (0.1, 0.03, 0.1), "control switch: the noise level"),
    "atoms": (COUNT, 4, "control atoms: references in each control"),
    "head": (["none", "sn", "npr"], "none", "a second output, for evaluate.py sample --variance"),
    "init": (str, None, "a run to start from, its averaged weights; with --head they stay as they "
             "are, and the head alone learns"),
    "sigma-draw": (["independent", "stratified", "antithetic"], "independent", "quantiles of "
                   "a batch's noise levels: one in each B-th, or in pairs u, 1 - u"),
    "weight": (["schedule", *WEIGHTS], "schedule", "of the loss; schedule: the row's own"),
    "normalize-weight": (bool, False, "make the weight on eps 1 on average over the noise levels"),
    "target": (["schedule", "eps", "x0", "v", "F"], "schedule", "what the raw network predicts"),
    "schedule": (list(SCHEDULES), "edm", "noise levels and preconditioning"),
    "P-mean": (number(float, -10, 10), (-0.5, -1.2, -1.2), "edm trains on ln sigma ~ N(P_mean, "
               "P_std^2); digits: more noise, where their shapes are decided"),
    "P-std": (number(float, 0.01, 10), (1.0, 1.2, 1.2), "see P-mean"),
    "arch": (["mlp", *UNETS], ("unet", "mlp", "ddpmpp"), "network"),
    "width": (even, (None, 128, None), "channels at the first level; none: the arch's own"),
    "mult": (multipliers, None, "width multipliers of the levels, as in 1,2,2; none: the arch's"),
    "blocks": (COUNT, None, "blocks per level; none: the arch's own"),
    "dropout": (SHARE, 0.0, "of the network's activations"),
    "label-dropout": (SHARE, 0.0, "share of the labels hidden from the network in training"),
    "steps": (COUNT, (750, 3000, 100_000), "training steps"),
    "batch": (number(int, 1, 65_536), (16, 256, 128), "samples per step"),
    "lr": (number(float, 1e-9), (4e-3, 5e-3, 1e-3), "learning rate of AdamW"),
    "warmup": (INDEX, (20, 100, 1000), "steps over which the rate rises from 0"),
    "decay": (SHARE, (0.7, 0.8, 0.0), "last share of the steps, over which the rate falls to 0"),
    "beta2": (SHARE, (0.99, 0.99, 0.999), "AdamW's memory of squared gradients"),
    "weight-decay": (number(float, 0), 0.0, "of AdamW"),
    "clip": (number(float, 1e-9), 1.0, "limit on the gradient's norm"),
    "ema": (COUNT, (2000, 20_000, 500_000), "half-life of the weight average, in images"),
    "ema-rampup": (SHARE, 0.05, "the half-life is at most this share of the images seen"),
    "seed": (number(int, 0, 2 ** 32 - 1), 0, "of the whole run"),
    "device": (str, None, "none: cuda where there is one, else cpu"),
    "out": (str, None, "the run's folder; none: runs/NUMBER-DATA-LOSS"),
    "sample-every": (INDEX, (0, 0, 5000), "steps between sample grids; 0: only at the end"),
    "sample-steps": (COUNT, (12, 18, 18), "Heun steps of the grids"),
    "checkpoint-every": (COUNT, (100, 500, 1000), "steps between checkpoints"),
}
MAY_CHANGE = {"steps", "device", "sample-every", "sample-steps", "checkpoint-every"}   # in --resume
KINDS = ("digits", "points", "images")
BELONGS = {"mean-correction": ("stf", "stf-taylor"), "K": ("sa",), "lam": ("sa",), "tau": ("sa",),
           "level-noise": ("sa",), "order": ("taylor", "stf-taylor"), "control": ("stf-taylor",),
           "trace": ("taylor", "stf-taylor"), "switch-sigma": ("stf-taylor",),
           "atoms": ("stf-taylor",)}


def parser():
    p = runs.Parser(prog="train.py", description="Train a diffusion model.  Without options: "
                        "digits, STF, under three minutes on two idle CPU cores.")
    for name, (kind, default, text) in OPTIONS.items():
        shown = default if not isinstance(default, tuple) else ", ".join(
            f"{k} {v}" for k, v in zip(KINDS, default))
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(kind, list):
            how = dict(choices=kind)
        else:
            words = {"int": "N", "even": "N", "float": "X"}
            how = dict(type=kind, metavar=words.get(kind.__name__, name.upper()))
        p.add_argument(f"--{name}", help=f"{text} (default: {str(shown).lower()})", **how)
    p.add_argument("--resume", nargs="?", const="newest", metavar="RUN", help="go on with RUN, or "
                   f"with the newest one; may change: {', '.join(sorted(MAY_CHANGE))}")
    p.add_argument("--dry-run", action="store_true", help="print every resolved option and exit")
    return p


def resolve(given, data):
    """The options of a new run: what was given, else the default for this kind of data."""
    kind = 0 if data.name == "digits" else 1 if data.x.ndim == 2 else 2
    options = {}
    for name, (_, default, _) in OPTIONS.items():
        default = default[kind] if isinstance(default, tuple) else default
        options[name] = default if given[name] is None else given[name]
    options["device"] = runs.pick_device(options["device"])
    options["ref-batch"] = max(min(options["ref-batch"], len(data.x)), options["batch"])
    options["shape"] = list(data.x.shape[1:])
    options["classes"] = data.classes if options["cond"] else []
    options["fingerprint"] = data.fingerprint
    strange = [f"--{name} belongs to --loss {' and '.join(losses)}"
               for name, losses in BELONGS.items()
               if given[name] is not None and options["loss"] not in losses]
    taylor, atoms = "taylor" in options["loss"], options["control"] == "atoms"
    head = options["head"] != "none"
    for bad, sentence in [
        (strange, "; ".join(strange)),
        (taylor and options["target"] == "x0", "--target x0: the network's target holds no noise "
         "that a Taylor control could take out"),
        (taylor and atoms and options["order"], "--control atoms has order 0 only: its noises are "
         "not Gaussian, and the higher orders' means not known"),
        (taylor and atoms and options["augment"], "--control atoms would have to augment every "
         "reference; --control switch need not"),
        (given["switch-sigma"] is not None and atoms, "--switch-sigma belongs to --control switch"),
        (given["atoms"] is not None and not atoms, "--atoms belongs to --control atoms"),
        (given["trace"] is not None and not options["order"], "--trace belongs to --order 1 or 2"),
        (options["schedule"] != "edm" and (given["P-mean"], given["P-std"]) != (None, None),
         "--P-mean and --P-std belong to --schedule edm"),
        (head and options["init"] and given["loss"], "--loss: with --init the head learns alone; "
         "leave it out"),
        (options["loss"] == "sa" and options["K"] > 1000, "--K: the ladder has 1000 levels"),
        (head and options["dropout"] and not options["init"], "--head: dropout would add its own "
         "variance to the noise's; train the head afterwards, with --init RUN"),
        (head and options["loss"] == "sa", "--head is trained at one noise level at a time; choose "
         "another --loss than sa"),
        (options["augment"] and kind == 1, "--augment: its transforms are for images"),
        (options["cond"] and data.labels is None, f"--cond: {data.name} has no labels"),
        ((options["arch"] == "mlp") != (kind == 1), "--arch mlp is for points, and only that is; "
         f"{data.name} has shape {tuple(options['shape'])}"),
        (options["xflip"] and kind == 1, "--xflip: points cannot be mirrored"),
        (options["label-dropout"] and not options["cond"], "--label-dropout needs --cond"),
    ]:
        if bad:
            raise BadInput(sentence)
    return options


def inherit(given, stored):
    """What --init RUN fixes: network, noise levels; and its data, unless others are given."""
    fixed = ["cond", "schedule", "target", "arch", "width", "mult", "blocks", "augment"]
    fixed += ["P-mean", "P-std"] if stored["schedule"] == "edm" else []
    differ = [f"--{name} {given[name]} (was {stored[name]})" for name in fixed
              if given[name] not in (None, stored[name])]
    if differ:
        raise BadInput(f"--init {given['init']}: cannot change {', '.join(differ)}")
    return given | {name: stored[name] for name in fixed} | {
        name: stored[name] for name in ("data", "data-dir", "size") if given[name] is None}


def resume(given, stored, data, run):
    """The options of the run that goes on; what was given may differ from them in little."""
    differ = [f"--{name} {value} (was {stored[name]})" for name, value in given.items()
              if value is not None and name not in MAY_CHANGE and value != stored[name]]
    if differ:
        raise BadInput(f"--resume {run}: cannot change {', '.join(differ)}; start a new run")
    if data.fingerprint != stored["fingerprint"]:
        raise BadInput(f"--resume {run}: the run was trained on other data than {data.source}; "
                       "give it back what it had, or start a new run")
    options = stored | {name: given[name] for name in MAY_CHANGE if given[name] is not None}
    return options | {"device": runs.pick_device(options["device"])}


# ---- Batches -------------------------------------------------------------------------------------

def generator(seed, step, stream, device="cpu"):
    """A generator that is a function of its arguments.

    torch's CPU generator keeps 32 bits of its seed: (seed << 32) + step would forget the seed.
    """
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + 4 * step + stream) % 2 ** 32)


def draw_batch(pixels, labels, options, schedule, step):
    """The batch of a step: a dict of what the objective needs.

    reference (n, ...) are rows without repetition (but where the batch exceeds the data), and its
    first B the sources of x0: so --ref-batch N is the whole set, and each x0 is as likely to be any
    row of its reference, which keeps STF unbiased.  x0 (B, ...) are the sources, augmented by
    a (B, 8) if asked for.
    """
    B, N, device, K = options["batch"], len(pixels), options["device"], options["K"]
    n = options["ref-batch"] if "stf" in options["loss"] else B
    g = generator(options["seed"], step, 0)
    rows = torch.randperm(N, generator=g)[:n] if n <= N else torch.randint(N, (n,), generator=g)
    u = torch.rand(B, generator=g, dtype=torch.float64).clamp_min(2.0 ** -53)
    flip = torch.rand(n, generator=g) < 0.5 if options["xflip"] else None
    if options["sigma-draw"] == "stratified":
        u = (torch.arange(B) + u) / B
    elif options["sigma-draw"] == "antithetic":
        u = torch.cat([u[:(B + 1) // 2], 1 - u[:B // 2]])
    sigma = schedule.training_sigma(u)                                            # (B,)

    reference = load_rows(pixels, rows, flip, device)                             # (n, ...)
    label = labels[rows].to(device) if options["cond"] else None
    batch = dict(reference=reference, reference_labels=label, source=reference[:B],
                 x0=reference[:B], labels=None if label is None else label[:B], a=None,
                 uniform=torch.rand(B, generator=g).to(device))
    if options["augment"]:
        g = generator(options["seed"], step, 2)
        batch["a"] = draw_augmentation(B, options["augment"], g).to(device)       # (B, 8)
        batch["x0"] = augment(batch["x0"], batch["a"])
    if options["loss"] == "stf-taylor":
        low = sigma < options["switch-sigma"]
        batch["low"], batch["high"] = (on.nonzero().flatten().to(device) for on in (low, ~low))
    shape = batch["x0"].shape
    if options["loss"] == "sa":
        ladder = ladder_of(schedule)                                              # (T,)
        t = torch.searchsorted(ladder, sigma).clamp(max=len(ladder) - 1) + 1      # (B,)
        levels = t - torch.arange(K)[:, None]                                     # (K, B)
        sigma, shape = ladder[levels.clamp(min=1) - 1], (K, *shape)
        batch["tau"] = sa_tau(ladder, t, K, options["tau"])
    g = generator(options["seed"], step, 1, device)
    batch["noise"] = torch.randn(shape, generator=g, device=device)               # (B, ...)
    batch["probe"] = torch.randn(shape, generator=g, device=device).sign()
    ones, batch["sigma"] = [1] * (reference.ndim - 1), sigma                       # (B, 1, ..., 1)
    for name in {"sigma", "tau"} & set(batch):
        batch[name] = batch[name].to(batch["noise"]).view(*sigma.shape, *ones)
    if options["loss"] == "sa" and options["level-noise"] == "path":
        batch["noise"] = path_noise(batch["noise"], batch["sigma"])
    return batch


def ladder_of(schedule):
    """sigma_1 < ... < sigma_T: a discrete row's levels, or 1000 time steps of a continuous one."""
    if hasattr(schedule, "levels"):
        return schedule.levels.sort().values
    return schedule.sigma(schedule.time_steps(1000)[:-1]).flip(0)


def part(batch, rows):
    """The batch of these samples alone, with the same reference."""
    shared = ("reference", "reference_labels", "low", "high")
    return {name: value if value is None or name in shared else value[rows]
            for name, value in batch.items()}


# ---- Objectives ----------------------------------------------------------------------------------

def objective(options, denoiser, batch, tools):
    """The loss of each sample, (B,), by --loss; --control switch puts low noise levels first."""
    kind, denoise = options["loss"], bind(denoiser, batch)
    common = denoise, batch["x0"], batch["noise"], batch["sigma"], tools["weight"]
    if options["head"] != "none":
        loss = head_loss(bind(denoiser.with_head, batch), *common[1:4], options["head"])
        return loss if options["init"] else loss + objective(options | {"head": "none"}, denoiser,
                                                             batch, tools)
    if kind == "dsm":
        return dsm_loss(*common)
    if kind == "antithetic":
        return antithetic_loss(*common)
    if kind == "stf":
        return stf_loss(*common, partial(stable_target, batch, tools))
    if kind == "sa":
        lam = {1: 0.0, 2: 1.0, 3: 0.3}.get(options["K"], 0.2)
        return sa_loss(*common, batch["tau"], lam if options["lam"] is None else options["lam"])
    if kind == "stf-taylor" and options["control"] == "switch":
        groups = [("taylor", batch["low"]), ("stf", batch["high"])]
        return torch.cat([objective(options | {"loss": loss}, denoiser, part(batch, rows), tools)
                          for loss, rows in groups if len(rows)])
    loss, control = control_terms(options, denoise, batch, tools)
    return loss - tools["beta"](batch["sigma"]).flatten() * control


def bind(denoiser, batch):
    """denoise(x, sigma) for the batch's labels, of class and of augmentation."""
    a = None if batch["a"] is None else augment_labels(batch["a"])
    return partial(denoiser, labels=batch["labels"], augment_labels=a)


def stable_target(batch, tools, x, sigma):
    """STF's target of x, given the batch's reference, labels and augmentation."""
    given = batch["reference"], batch["labels"], batch["reference_labels"]
    correction = tools["correction"](batch) if tools["correction"] else torch.zeros_like(x)
    if batch["a"] is None:
        return stf_target(x, sigma, *given) - correction
    target = augmented_stf_target(x, sigma, batch["reference"], batch["a"], *given[1:])
    return target - augment(correction, batch["a"])


def control_terms(options, denoise, batch, tools):
    """The loss and its Taylor control, (B,) each."""
    common = (denoise, batch["x0"], batch["noise"], batch["sigma"], tools["weight"],
              tools["c_skip"])
    if options["loss"] == "stf-taylor" and options["control"] == "atoms":
        def atoms(x, sigma):
            y, mass, target = stf_atoms(x, sigma, batch["reference"], batch["uniform"],
                                        min(options["atoms"], len(batch["reference"])),
                                        batch["labels"], batch["reference_labels"])
            return y, mass, target - (tools["correction"](batch) if tools["correction"] else 0)
        return stf_taylor_terms(*common, atoms)
    probe = batch["probe"] if options["trace"] == "hutchinson" else None
    if options["order"] == 0:
        return taylor_terms(*common)
    with sdpa_kernel(SDPBackend.MATH):              # the one attention with second derivatives
        return taylor_terms(*common, options["order"], probe)


def update_beta(options, denoiser, batch, tools, step):
    """The control's coefficient for later steps, from the last layer's gradients of 16 samples."""
    m = min(16, options["batch"])
    g = generator(options["seed"], step, 3, options["device"])
    small = part(batch, torch.arange(m, device=options["device"]))
    u = torch.rand(small["sigma"].shape, generator=g, device=options["device"])
    u = (torch.arange(m, device=options["device"]).view_as(u) + u) / m
    small["sigma"] = 0.002 * 500 ** u                                             # up to 1
    small["noise"] = torch.randn(small["x0"].shape, generator=g, device=options["device"])
    loss, control = control_terms(options, bind(denoiser, small), small, tools)
    tools["beta"].update(small["sigma"], loss, control, list(denoiser.parameters())[-2:])


def build_tools(pixels, labels, options):
    """What a run's objective needs besides the batch; None where the loss has no use for it.

    A reference that is the whole set needs no correction: its mean is the data's.
    """
    schedule, stable = runs.build_schedule(options), "stf" in options["loss"]
    return dict(
        weight=runs.loss_weight(options),
        c_skip=lambda sigma: runs.precondition(options["target"], schedule, sigma)[0],
        beta=RunningBeta(device=options["device"]) if "taylor" in options["loss"] else None,
        correction=build_correction(pixels, labels, options)
        if stable and options["mean-correction"] and options["ref-batch"] < len(pixels) else None)


def build_correction(pixels, labels, options):
    """correction(batch) -> (B, ...): mean_correction, with what it needs to know of the data.

    Once a run: the data's sums by class, and gamma from a reference of the run's size.
    """
    N, device, n = len(pixels), options["device"], options["ref-batch"]
    key = labels + 1 if options["cond"] else torch.zeros(N, dtype=torch.int64)    # 0: no class
    mirror = (lambda x: (x + x.flip(-1)) / 2) if options["xflip"] else (lambda x: x)
    load = lambda rows: mirror(load_rows(pixels, rows, None, device))
    count = torch.bincount(key).to(device).view(-1, *[1] * (pixels.ndim - 1))
    total = torch.zeros(len(count), *pixels.shape[1:], dtype=torch.float64, device=device)
    for rows in torch.arange(N).split(4096):
        total.index_add_(0, key[rows].to(device), load(rows).double())

    m = min(128, n)
    rows = torch.randperm(N, generator=generator(options["seed"], 0, 3))[:n]
    reference = load_rows(pixels, rows, None, device)                             # (n, ...)
    x0, classes = reference[:m], ()
    if options["cond"]:
        classes = labels[rows[:m]].to(device), labels[rows].to(device)
    noise = torch.randn(x0.shape, generator=generator(options["seed"], 0, 3)).to(device)
    levels = torch.logspace(-2, 2, 17).to(device)
    gamma = interpolate(levels, measure_gamma(x0, noise, levels, reference, *classes))

    def correction(batch):
        k = 0 if batch["labels"] is None else batch["labels"] + 1
        mu = (total[k] - mirror(batch["source"])) / (count[k] - 1).clamp(min=1)
        return mean_correction(batch["source"], batch["sigma"], batch["reference"],
                               mu.to(batch["source"]), gamma, batch["labels"],
                               batch["reference_labels"])
    return correction


# ---- Training ------------------------------------------------------------------------------------

def train(options, data, run, state, denoiser, ema):
    """Steps state["step"] ... options["steps"]; log, grids, checkpoints go to the run's folder."""
    device, B = options["device"], options["batch"]
    schedule = runs.build_schedule(options)
    pixels, labels = torch.from_numpy(np.asarray(data.x)), data.labels
    labels = None if labels is None else torch.from_numpy(labels)
    if device.startswith("cuda") and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        pixels = pixels.to(device)
    frozen = options["head"] != "none" and options["init"]
    learned = denoiser.requires_grad_(False).model.head.requires_grad_() if frozen else denoiser
    optimizer = torch.optim.AdamW(learned.parameters(), betas=(0.9, options["beta2"]), fused=True,
                                  weight_decay=options["weight-decay"])
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    log = Log(run, state["step"], options)
    tools = build_tools(pixels, labels, options)
    if tools["beta"] and state["beta"] is not None:
        tools["beta"].sums = state["beta"]

    denoiser.train(not frozen)
    for step in range(state["step"], options["steps"]):
        torch.manual_seed(options["seed"] + step)       # dropout, too, is a function of the step
        batch = draw_batch(pixels, labels, options, schedule, step)
        loss = objective(options, denoiser, batch, tools)                         # (B,)

        optimizer.param_groups[0]["lr"] = learning_rate(options, step)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(denoiser.parameters(), options["clip"])
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, denoiser, options, (step + 1) * B)
        if tools["beta"] and step % 25 == 0:
            update_beta(options, denoiser, batch, tools, step)

        log.step(step + 1, loss.mean(), norm)
        last = step + 1 == options["steps"]
        if last or (step + 1) % options["checkpoint-every"] == 0:
            log.flush()
            save_checkpoint(run, step + 1, denoiser, ema, optimizer, options, tools)
        if last or (options["sample-every"] and (step + 1) % options["sample-every"] == 0):
            log.flush()
            save_samples(run, step + 1, denoiser, ema, options, data)
            denoiser.train(not frozen)
    log.close()


def learning_rate(options, step):
    """Linear warm-up over `warmup` steps; linear fall to 0 over the last share `decay` of all."""
    rise = min(1, (step + 1) / max(options["warmup"], 1))
    left = (options["steps"] - step) / max(options["decay"] * options["steps"], 1)
    return options["lr"] * rise * min(1, left)


@torch.no_grad()
def update_ema(ema, denoiser, options, images):
    """ema <- beta ema + (1 - beta) weights,  beta = 1/2^(batch/half-life)   (EDM's ramp-up)."""
    half_life = min(options["ema"], options["ema-rampup"] * images)
    beta = 0.5 ** (options["batch"] / max(half_life, 1e-8))
    for average, weight in zip(ema.parameters(), denoiser.parameters()):
        average.lerp_(weight, 1 - beta)


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    try:
        return run_training(vars(parser().parse_args(argv)))
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; --resume goes on from the last checkpoint, or starts again "
              "where there is none", file=sys.stderr)
        return 130


def run_training(given):
    given = {name.replace("_", "-"): value for name, value in given.items()}
    again, dry, run, stored = given.pop("resume"), given.pop("dry-run"), None, {}
    if again:
        run = runs.newest_run("runs") if again == "newest" else again
        stored = runs.read_options(run, [*OPTIONS, "shape", "classes", "fingerprint"])
    if given["init"] and not again:
        given = inherit(given, runs.read_options(given["init"], [*OPTIONS]))
    data = load_data(*(given[name] or stored.get(name, OPTIONS[name][1])
                       for name in ("data", "data-dir", "size")))
    options = resume(given, stored, data, run) if again else resolve(given, data)
    frozen = f"head-{options['head']}" if options["init"] and options["head"] != "none" else ""
    torch.manual_seed(options["seed"])
    denoiser = runs.build_denoiser(options).to(options["device"])
    size = sum(p.numel() for p in denoiser.parameters())
    print(f"data      {data.source}\nnetwork   {options['arch']}, {size / 1e6:.2f} M parameters\n"
          f"loss      {frozen or options['loss']}, schedule {options['schedule']}, "
          f"{options['steps']} steps of {options['batch']}, on {options['device']}")
    if dry:
        print("\n".join(f"  {name:18}{value}" for name, value in sorted(options.items())))
        return 0

    ema = copy.deepcopy(denoiser).requires_grad_(False)
    state = dict(step=0, optimizer=None, beta=None)
    if again and runs.checkpoints(run):
        state = runs.load_checkpoint(run, options["device"])
        runs.load_weights(denoiser, state["model"], run)
        runs.load_weights(ema, state["ema"], run)
    elif options["init"]:
        weights = runs.load_run(options["init"], options["device"])[0].state_dict()
        for network in (denoiser, ema):
            runs.load_weights(network, network.state_dict() | weights, options["init"])
    if not again:
        run = runs.new_run(options["out"], f"{data.name}-{frozen or options['loss']}")
    if state["step"] >= options["steps"]:
        raise BadInput(f"{run} has its {state['step']} steps; give --steps a larger number")
    runs.write_json(os.path.join(run, "options.json"), options)
    print(f"run       {run}" + (f", from step {state['step']}" if again else ""), flush=True)
    start = time.time()
    train(options, data, run, state, denoiser, ema)
    evaluate.report(options, data, run, ema, time.time() - start)
    print(f"samples     {run}/samples-{options['steps']:07d}.png\nlog         {run}/log.jsonl\n"
          f"checkpoint  {runs.checkpoints(run)[-1]}\n"
          f"next        python evaluate.py sample {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
