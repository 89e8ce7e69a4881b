"""train.py: the script that wires the other files together.

    python train.py                               built-in digits, STF, two cores, under 3 minutes
    python train.py --data cifar10 --xflip        photographs, downloaded once
    python train.py --data FOLDER|FILE --cond     your own images or points, class-conditional
    python train.py --resume                      go on with the newest run

What a step does is in objectives.py.  Its batch is a pure function of (seed, step): a run that is
killed and resumed is the run that was not, and two losses can be compared on the same noise.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

import evaluate
import papers
import runs
from averages import ema_beta, update_ema
from datasets import BadInput, attempt, load_data
from losses import WEIGHTS
from networks import UNETS
from objectives import (arrange_memory, backward, build_tools, cost, draw_batch, memory, update,
                        update_beta)
from runs import Log, even, lengths, multipliers, number, ranks, save_samples
from schedules import SCHEDULES


# ---- Presets -------------------------------------------------------------------------------------

SCORE_SDE = dict(batch=128, lr=2e-4, warmup=5000, steps=1_300_000, ema="887000", dropout=0.1,
                 xflip=True)
KARRAS = {"augment": 0.12, "batch": 512, "lr": 1e-3, "warmup": 19_531, "steps": 390_625,
          "dropout": 0.13, "ema": "500000", "clip": 1e9}                       # none
FFHQ = KARRAS | {"size": 64, "mult": "1,2,2,2", "augment": 0.15, "batch": 256, "lr": 2e-4,
                 "warmup": 39_063, "steps": 781_250, "dropout": 0.05}

PRESETS = {   # the papers' runs: (options beside the defaults, how samples are drawn, what differs)
    "digits": ({}, "heun 12 steps", "the default"),
    "toys": ({"data": "checkerboard"}, "heun 18 steps", "points"),
    "mnist": ({"data": "mnist", "width": 64, "steps": 20_000}, "heun 18 steps", "our choice"),
    "cifar10-edm-vp": ({"data": "cifar10"} | KARRAS, "heun 18 steps", "EDM config F; with STF"),
    "cifar10-edm-ve": ({"data": "cifar10", "arch": "ncsnpp"} | KARRAS, "heun 18 steps",
                       "EDM config F; with STF"),
    "cifar10-ve": ({"data": "cifar10", "arch": "ncsnpp", "schedule": "ve"} | SCORE_SDE,
                   "rk45, or pc 1000 steps", "STF; 4 blocks a level, EDM's NCSN++"),
    "cifar10-vp": ({"data": "cifar10", "schedule": "vp"} | SCORE_SDE, "rk45, or ddim 100 steps",
                   "STF; 4 blocks a level, EDM's DDPM++"),
    "cifar10-ddpm": ({"data": "cifar10", "loss": "sa", "schedule": "ddpm", "mult": "1,2,2,2",
                      "blocks": 2} | SCORE_SDE | {"steps": 500_000}, "ddim, ddpm 10 to 1000 steps",
                     "SA-2; DDPM++'s blocks for DDPM's, steps not stated"),
    "celeba64-ve": ({"size": 64, "arch": "ncsnpp", "mult": "1,2,2,2", "schedule": "ve",
                     "ref-batch": 1024} | SCORE_SDE, "rk45, or pc 1000 steps", "STF; your --data"),
    "ffhq64": (FFHQ, "heun 40 steps", "EDM config F; with STF; your --data"),
    "imagenet64-adm": ({"size": 64, "arch": "adm", "cond": True, "batch": 4096, "lr": 1e-4,
                        "warmup": 2441, "steps": 610_352, "dropout": 0.1, "ema": "50000000",
                        "clip": 1e9}, "edm-stochastic 256 steps, churn 40",
                       "EDM (its churn from .05 to 50, S_noise 1.003); with STF; your --data"),
    "ffhq256-adm": ({"size": 256, "arch": "adm", "width": 128, "mult": "1,1,2,2,4,4", "blocks": 1,
                     "attend": "16", "loss": "dsm", "weight": "debias", "schedule": "ddpm",
                     "batch": 8, "lr": 2e-5, "warmup": 0, "steps": 500_000, "ema": "55400"},
                    "ddpm 1000 steps", "Debias; your --data"),
}


# ---- Options -------------------------------------------------------------------------------------

COUNT, INDEX, SHARE = number(int, 1), number(int, 0), number(float, 0, 1)


def holdout(text):
    """A type for argparse: 0, or a number that leaves something to train on."""
    if INDEX(text) == 1:
        raise argparse.ArgumentTypeError("1 would leave nothing to train on")
    return int(text)


OPTIONS = {   # name: (type or choices, default or defaults for (digits, points, images), help)
    "data": (str, "digits", "digits, two-gaussians, two-gaussians-64d, checkerboard, swiss-roll, "
             "ring, cifar10, mnist; or a path to a folder (sub-folder = class), zip, npz or npy"),
    "data-dir": (str, "data", "where downloads and caches lie"),
    "size": (COUNT, None, "centre-crop and resize the images to SIZE x SIZE"),
    "holdout": (holdout, (0, 0, 100), "every N-th row is kept from training, for the error on "
                "held-out rows, 0: none; built-in sets draw fresh ones instead"),
    "cond": (bool, (True, False, False), "class-conditional"),
    "xflip": (bool, False, "mirror each image with probability 1/2"),
    "augment": (SHARE, 0.0, "probability of each of EDM's geometric transforms, as in .12"),
    "loss": (["stf", "dsm", "antithetic", "sa", "taylor", "stf-taylor"], "stf", "score matching "
             "with stable targets (stf), plain (dsm), on pairs of opposite noises (antithetic); "
             "sequence-aware (sa); with Taylor control variates (taylor), and STF (stf-taylor)"),
    "ref-batch": (COUNT, (1024, 1024, 4096), "size n of STF's reference, the batch included"),
    "mean-correction": (bool, True, "correct what STF's targets of a batch have in common"),
    "K": (COUNT, 2, "sa: consecutive levels"),
    "lam": (number(float, 0), None, "sa: weight of the term of K errors; by default 0, 1, .3 for K "
            "= 1, 2, 3, then .2"),
    "tau": (["unit", "window", "paper"], "unit", "sa: factors of the K errors: all 1, as "
            "published (unit); Theorem 1's (paper); these over the first of them (window)"),
    "level-noise": (["independent", "path"], "independent", "sa: noises of the K levels, as "
                    "published, or of one path, nearly unbiased"),
    "order": (number(int, 0, 2), 0, "taylor: of the polynomial around the clean image"),
    "trace": (["hutchinson", "exact"], "hutchinson", "taylor: how orders 1 and 2 get the trace of "
              "the Jacobian"),
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
    "arch": (["mlp", *UNETS], ("unet", "mlp", "ddpmpp"), "mlp: for points; unet: "
             "a small one; ddpmpp, ncsnpp, adm: as published with EDM"),
    "width": (even, (None, 128, None), "channels at the first level; none: the arch's own"),
    "mult": (multipliers, None, "width multipliers of the levels, as in 1,2,2; none: the arch's"),
    "blocks": (COUNT, None, "blocks per level; none: the arch's own"),
    "attend": (multipliers, None, "resolutions with attention, as in 16,8; none: the arch's"),
    "dropout": (SHARE, 0.0, "of the network's activations"),
    "label-dropout": (SHARE, 0.0, "share of the labels hidden from the network in training"),
    "steps": (COUNT, (750, 3000, 100_000), "training steps"),
    "batch": (number(int, 1, 65_536), (16, 256, 128), "samples per step"),
    "lr": (number(float, 1e-9), (4e-3, 5e-3, 1e-3), "learning rate of AdamW"),
    "warmup": (INDEX, (20, 100, 1000), "steps over which the rate rises, from lr/N"),
    "decay": (SHARE, (0.7, 0.8, 0.0), "last share of the steps, over which the rate falls to 0"),
    "beta2": (SHARE, (0.99, 0.99, 0.999), "AdamW's memory of squared gradients"),
    "weight-decay": (number(float, 0), 0.0, "of AdamW"),
    "clip": (number(float, 1e-9), 1.0, "limit on the gradient's norm"),
    "ema": (lengths, ("2000", "20000", "500000"), "weight averages: half-lives in images, as in "
            "500000,50000, or widths as shares of the training, as in 0.05,0.1 (any other: sample "
            "--weights, if --keep keeps all checkpoints); samples are of the first"),
    "ema-rampup": (SHARE, 0.05, "a half-life is at most this share of the images seen"),
    "amp": (["auto", "none", "bf16", "fp16"], "auto", "precision of the network alone; auto: bf16 "
            "on GPUs that have it"),
    "compile": (bool, False, "torch.compile the network"),
    "micro-batch": (COUNT, None, "samples a rank has in memory at a time; none: its whole share"),
    "seed": (number(int, 0, 2 ** 32 - 1), 0, "of weights, batches and noise"),
    "device": (str, None, "none: cuda where there is one, else cpu"),
    "out": (str, None, "the run's folder; none: runs/NUMBER-DATA-LOSS"),
    "eval-every": (INDEX, (250, 1000, 5000), "steps between the errors on held-out rows and frozen "
                   "noise; 0: never"),
    "fid-every": (INDEX, 0, "steps between Frechet distances, of which the best checkpoint is kept;"
                  " 0: never"),
    "fid-num": (number(int, 2), (500, 4000, 2048), "samples for each Frechet distance"),
    "fid-features": (["pixels", "inception"], "pixels", "of which features these distances are"),
    "inception": (str, None, "Inception's weights for these; none: downloaded"),
    "sample-every": (INDEX, (0, 0, 5000), "steps between sample grids; 0: only at the end"),
    "sample-steps": (COUNT, (12, 18, 18), "Heun steps of the grids"),
    "checkpoint-every": (COUNT, (100, 500, 1000), "steps between checkpoints"),
    "keep": (COUNT, 2, "checkpoints kept, beside the best one of --fid-every"),
}
MAY_CHANGE = {"steps", "device", "compile", "micro-batch", "eval-every", "fid-every", "fid-num",
              "fid-features", "inception", "sample-every", "sample-steps", "checkpoint-every",
              "keep"}                                                          # in --resume
ALIKE = MAY_CHANGE | {"data", "data-dir", "size", "holdout", "seed", "out"}       # in --compare
KINDS = ("digits", "points", "images")
WORDS = dict(data="SET", init="RUN", device="NAME", inception="FILE", mult="N,..", attend="N,..",
             ema="N,..")                                                       # in --help
GROUPS = {"data": "data", "loss": "objective", "sigma-draw": "noise levels and weights",
          "arch": "network", "steps": "optimisation", "amp": "machine and run",
          "eval-every": "what is watched and kept"}            # first option: heading in --help
BELONGS = {"mean-correction": ("stf", "stf-taylor"), "K": ("sa",), "lam": ("sa",), "tau": ("sa",),
           "level-noise": ("sa",), "order": ("taylor", "stf-taylor"), "control": ("stf-taylor",),
           "trace": ("taylor", "stf-taylor"), "switch-sigma": ("stf-taylor",),
           "atoms": ("stf-taylor",)}
ALL = ("dsm,dsm:batch=32,antithetic,stf,stf:no-mean-correction,sa,sa:level-noise=path,"
       "dsm:weight=debias,taylor,stf-taylor")


def parser():
    group = p = runs.Parser(
        prog="train.py", usage="python train.py [OPTION]", description="Train a diffusion model: "
        "without options digits, STF, under three minutes on two idle CPU cores.")
    p.add_argument("--preset", choices=[*PRESETS, "list"], metavar="NAME", help="a paper's run; "
                   "options beside it override its own; list: print them all")
    p.add_argument("--resume", nargs="?", const="newest", metavar="RUN", help="go on with RUN, or "
                   f"with the newest one; may change: {', '.join(sorted(MAY_CHANGE))}")
    p.add_argument("--compare", metavar="A,B,..", help="train several objectives alike and print a "
                   f"table: dsm, stf, .., with own options as in stf:ref-batch=256; or all: {ALL}")
    p.add_argument("--equal", choices=["calls", "time", "steps"], default="calls", help="what all "
                   "objectives of --compare get alike: calls of the network (default), time, steps")
    p.add_argument("--seeds", type=COUNT, default=2, metavar="N",
                   help="runs of each in --compare (default: 2)")
    p.add_argument("--dry-run", action="store_true", help="print every option, as given or by "
                   "default, and the memory it takes, and exit")
    for name, (kind, default, text) in OPTIONS.items():
        shown = default if not isinstance(default, tuple) else ", ".join(
            f"{k} {v}" for k, v in zip(KINDS, default))
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(kind, list):
            how = dict(choices=kind)
        else:
            word = {"float": "X", "str": "FOLDER"}.get(kind.__name__, "N")
            how = dict(type=kind, metavar=WORDS.get(name, word))
        group = p.add_argument_group(GROUPS[name]) if name in GROUPS else group
        group.add_argument(f"--{name}", help=f"{text} (default: {str(shown).lower()})", **how)
    return p


def resolve(given, data):
    """The options of a new run: what was given, else the default for this kind of data."""
    kind = 0 if data.name == "digits" else 1 if data.x.ndim == 2 else 2
    options = {}
    for name, (_, default, _) in OPTIONS.items():
        default = default[kind] if isinstance(default, tuple) else default
        options[name] = default if given[name] is None else given[name]
    options["device"] = runs.pick_device(options["device"])
    count = len(data.x) - (len(data.x) // options["holdout"] if options["holdout"] else 0)
    options["ref-batch"] = max(min(options["ref-batch"], count), options["batch"])
    if options["amp"] == "auto":
        bf16 = options["device"].startswith("cuda") and torch.cuda.is_bf16_supported()
        options["amp"] = "bf16" if bf16 else "none"
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
        (options["batch"] < ranks()[1], f"--batch is less than the {ranks()[1]} ranks"),
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
    differ = [f"--{name} {given[name]} (was {stored[name]})" for name in OPTIONS
              if given[name] not in (None, stored[name]) and name not in MAY_CHANGE]
    if differ:
        raise BadInput(f"--resume {run}: cannot change {', '.join(differ)}; start a new run")
    if [data.fingerprint, [*data.x.shape[1:]], data.classes if stored["cond"] else []] != [
            stored[name] for name in ("fingerprint", "shape", "classes")]:
        raise BadInput(f"--resume {run}: the run was trained on other data than {data.source}; "
                       "give it back what it had, or start a new run")
    options = stored | {name: given[name] for name in MAY_CHANGE if given[name] is not None}
    return options | {"device": runs.pick_device(options["device"])}


# ---- Training ------------------------------------------------------------------------------------

def train(options, data, run, state, denoiser, emas, real):
    """Steps state["step"] ... options["steps"]; log, grids, checkpoints go to the run's folder.

    True when they are done; False when a signal ended it early, after a checkpoint.
    """
    device, schedule = options["device"], runs.build_schedule(options)
    pixels, labels = runs.on_device(data, device)
    frozen = options["head"] != "none" and options["init"]
    learned = denoiser.requires_grad_(False).model.head.requires_grad_() if frozen else denoiser
    parameters, tools = list(learned.parameters()), build_tools(pixels, labels, options)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, options["beta2"]), fused=True,
                                  weight_decay=options["weight-decay"])
    scaler = torch.amp.GradScaler(device, enabled=options["amp"] == "fp16")
    if state["optimizer"] is not None:
        runs.load_optimizer(optimizer, scaler, state, run)
    if tools["beta"] and state["beta"] is not None:
        tools["beta"].sums = state["beta"]
    held, best = runs.held_out(data, options), state["best"]
    log, done = Log(run, options, state["step"], state["skipped"]), True

    with Signals() as signals:
        for step in range(state["step"], options["steps"]):
            denoiser.train(not frozen)
            batch = draw_batch(pixels, labels, options, schedule, step)
            loss = backward(options, denoiser, batch, tools, scaler, step)        # (B,)
            norm = update(options, optimizer, scaler, parameters, step, loss)
            for length, ema in emas.items():
                beta = ema_beta(float(length), step + 1, options["batch"], options["ema-rampup"])
                update_ema(ema, denoiser, beta)
            if tools["beta"] and step % 25 == 0:
                update_beta(options, denoiser, batch, tools, step)
            log.step(step + 1, loss, norm, batch["sigma"])

            done, stop = step + 1 == options["steps"], signals.asked()
            due = lambda name: options[name] and (done or (step + 1) % options[name] == 0)
            if done or stop or due("eval-every") or due("fid-every") or due("checkpoint-every"):
                log.flush()
            if due("eval-every"):
                log.write(step + 1, **held_out_error(denoiser, emas, held))
            improved = False
            if due("fid-every"):
                name, distance, floor = evaluate.run_distance(ema_of(emas), options, *real)
                log.write(step + 1, **{name: distance}, floor=None if math.isnan(floor) else floor)
                improved, best = distance < best, min(best, distance)
            if done or stop or improved or due("checkpoint-every"):
                save(run, options, dict(
                    step=step + 1, options=options, model=denoiser.state_dict(),
                    ema={name: ema.state_dict() for name, ema in emas.items()},
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), best=best,
                    beta=tools["beta"].sums if tools["beta"] else None, skipped=log.skipped),
                    improved)
            if due("sample-every") and not done and ranks()[0] == 0:
                save_samples(run, step + 1, denoiser, ema_of(emas), options, data)
            if stop:
                break
    log.close()
    return done


def held_out_error(denoiser, emas, held):
    """What a log line says of it: E|D - x0|^2/d at each noise level, raw and averaged weights."""
    error = {name: evaluate.denoising_error(model.eval(), *held)
             for name, model in [("raw", denoiser), ("ema", ema_of(emas))]}
    return dict(levels=evaluate.LEVELS, held_out=error)


def ema_of(emas):
    """The first of the averages, which samples and distances are of."""
    return next(iter(emas.values()))


def save(run, options, state, improved):
    """The checkpoint of this step, as the best one, too, if it improved; drops old ones."""
    if ranks()[0] == 0:
        runs.save_checkpoint(f"{run}/checkpoint-{state['step']:07d}.pt", state)
        if improved:
            runs.save_checkpoint(f"{run}/best.pt", state)
        for old in runs.checkpoints(run)[:-options["keep"]]:
            os.remove(old)


class Signals:
    """Within it, the first SIGINT or SIGTERM asks for the end of the step, a second one stops."""

    def __enter__(self):
        self.got = False
        self.old = {s: signal.signal(s, self.take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for name, handler in self.old.items():
            signal.signal(name, handler)

    def take(self, name, frame):
        if self.got:
            raise KeyboardInterrupt
        self.got = True

    def asked(self):
        """Whether any rank got one: a word among the hosts, no wait for a GPU."""
        return runs.total(torch.tensor(float(self.got))).item() > 0


# ---- Comparison ----------------------------------------------------------------------------------

COMPARED, NFE = (0.1, 0.5, 2.0, 10.0), (11, 23, 47)            # noise levels, and calls by Heun


def compare(given, names, equal, seeds):
    """Trains each objective `seeds` times from the same weights, on the same data and noise; prints
    their errors on held-out rows and frozen noise, and their distances to the data, as a table.

    All have as many calls of the network, as much time, or as many steps as the first.
    """
    data = load_data(*(given[name] or OPTIONS[name][1] for name in ("data", "data-dir", "size")))
    plans = [(name, resolve(variant(name, given), data)) for name in names]       # all, before any
    costs = [cost(options, data, equal) for _, options in plans]
    folder, table, curves = runs.new_run(given["out"], f"{data.name}-compare"), [], []
    real = evaluate.real_ones(plans[0][1], data)
    for (name, options), price in zip(plans, costs):
        steps, found = 5 * max(1, round(plans[0][1]["steps"] * costs[0] / price / 5)), []
        for seed in range(seeds):
            runs.status(f"{name}: {steps} steps, seed {seed}")
            run = f"{folder}/{re.sub('[^a-z0-9-]+', '-', name)}-{seed}"
            with contextlib.redirect_stdout(io.StringIO()):
                run_training(variant(name, given) | {
                    "out": run, "seed": seed, "steps": steps, "eval-every": steps // 5}, brief=True)
            found.append(measured(run, data, real, options["device"]))
        table.append((name, steps, torch.stack([values for values, _ in found])))
        curves.append(torch.stack([curve for _, curve in found]).mean(0).tolist())
    runs.status(None)
    num, features, of_real = real
    tell(folder, table, evaluate.distance_name(features[0], num), of_real["floor"])
    columns = [f"share of {equal}", *(name.replace(":", " ") for name in names)]
    rows = [[share, *values] for share, values in zip((0.2, 0.4, 0.6, 0.8, 1.0), zip(*curves))]
    papers.show(argparse.Namespace(out=folder, command="curves"), columns, rows, [dict(
        y=columns[1:], xscale="linear", ylabel="held-out error, geometric mean over levels")])
    return 0


def variant(name, given):
    """given, and what "LOSS:OPTION=VALUE:.." adds to it, as in stf:ref-batch=256."""
    loss, *more = name.split(":")
    for option in more:
        if re.sub("^no-|=.*", "", option) not in OPTIONS.keys() - ALIKE:
            raise BadInput(f"--compare {name}: --{option} is no option of one objective; leave it "
                           "out, or give it to all, beside --compare")
    own = vars(parser().parse_args([f"--loss={loss}", *(f"--{option}" for option in more)]))
    own = {key.replace("_", "-"): value for key, value in own.items()}
    return given | {key: own[key] for key in OPTIONS if own[key] is not None}


def measured(run, data, real, device):
    """Of a finished run, averaged weights: its errors at COMPARED and distances at NFE, in one
    tensor; and its log's five errors, each the geometric mean over the levels."""
    denoiser, options, _ = runs.load_run(run, device)
    errors = evaluate.denoising_error(denoiser, *runs.held_out(data, options, 256), COMPARED)
    distances = [evaluate.run_distance(denoiser, options | {"sample-steps": (nfe + 1) // 2},
                                       *real)[1] for nfe in NFE]
    lines = [json.loads(line) for line in open(f"{run}/log.jsonl")]
    curve = [line["held_out"]["ema"] for line in lines if "held_out" in line]
    return torch.tensor(errors + distances), torch.tensor(curve).log().mean(1).exp()


def tell(folder, table, name, floor):
    """A Markdown table, errors as ratios to those of the first objective with the same seed."""
    name_of_distance = f"distance: {name}; as many real images get {floor:.3g}"
    names = [*(f"error at {sigma:g}" for sigma in COMPARED), *(f"distance, NFE {n}" for n in NFE)]
    lines = ["| objective | steps | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for label, steps, values in table:
        values = torch.cat([values[:, :len(COMPARED)] / table[0][2][:, :len(COMPARED)],
                            values[:, len(COMPARED):]], dim=1)
        cells = [f"{v.mean():.3g}" + (f" ± {v.std():.2g}" if len(v) > 1 else "") for v in values.T]
        lines.append(f"| `{label}` | {steps} | " + " | ".join(cells) + " |")
    Path(folder, "compare.md").write_text("\n".join(lines) + "\n")
    print("error: on held-out rows, as a ratio to the first objective's with the same seed; mean "
          "and sd over seeds\n\n" + "\n".join(lines) + f"\n\n{name_of_distance}\n")


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    try:
        runs.start_ranks()
        with open(os.devnull, "w") as silence, \
                contextlib.redirect_stdout(silence if ranks()[0] else sys.stdout):
            given = runs.agree(lambda: vars(parser().parse_args(argv)))
            given = {name.replace("_", "-"): value for name, value in given.items()}
            if given["preset"] == "list":
                print("\n".join(f"{name:16}{text}; sample with {how}" + "".join(
                    f"\n{'':16}{key} {value}" for key, value in own.items())
                    for name, (own, how, text) in PRESETS.items()))
                return 0
            own = PRESETS[given["preset"] or "digits"][0]
            given |= {key: value for key, value in own.items() if given[key] is None}
            if own and not given["data"]:
                raise BadInput(f"--preset {given['preset']} needs your --data, a folder or zip")
            if given["compare"] and given["resume"]:
                raise BadInput("--compare starts new runs; leave --resume out")
            if given["compare"]:
                names = (ALL if given["compare"] == "all" else given["compare"]).split(",")
                return compare(given, names, given["equal"], given["seeds"])
            return run_training(given)
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def run_training(given, brief=False):
    """The command, with every option given, or None; brief: without samples and report."""
    again, dry, run, stored = given["resume"], given["dry-run"], None, {}
    if given["out"] and not again:
        runs.agree(lambda: runs.check_empty(given["out"]))
    if again:
        run = runs.first(lambda: runs.newest_run("runs") if again == "newest" else again)
        stored = runs.agree(lambda: runs.read_options(run, OPTIONS))
    if given["init"] and not again:
        given = runs.agree(lambda: inherit(given, runs.read_options(given["init"], OPTIONS)))
    where = [given[name] or stored.get(name, OPTIONS[name][1])
             for name in ("data", "data-dir", "size")]
    data, first = None, os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):              # the first rank of a node downloads and decodes for all
        data = runs.agree(lambda: load_data(*where) if first == turn else data)
    options = runs.agree(lambda: resume(given, stored, data, run) if again else
                         resolve(given, data))
    name = f"head-{options['head']}" if options["init"] and options["head"] != "none" else \
        options["loss"]
    torch.manual_seed(options["seed"])
    attempt(f"--sample-steps {options['sample-steps']}", "choose fewer",
            runs.build_schedule(options).time_steps, options["sample-steps"])
    denoiser = runs.agree(lambda: runs.build_denoiser(options)).to(options["device"])
    arrange_memory(denoiser, options["loss"])
    describe(options, data, denoiser, name)
    if dry:
        print("\n".join(f"  {name:18}{value}" for name, value in sorted(options.items())))
        print("\n".join(f"memory  {what:28}{size / 2 ** 20:10,.1f} MiB"
                        for what, size in memory(options, denoiser, data).items()))
        return 0

    emas = {length: copy.deepcopy(denoiser).requires_grad_(False)
            for length in options["ema"].split(",")}
    state = runs.agree(lambda: starting_state(options, denoiser, emas, run))
    real = evaluate.real_ones(options, data) if options["fid-every"] else None
    run = run or runs.first(lambda: runs.new_run(options["out"], f"{data.name}-{name}"))
    if ranks()[0] == 0:
        runs.write_json(os.path.join(run, "options.json"), options)
    print(f"run       {run}" + (f", from step {state['step']}" if again else ""), flush=True)
    denoiser.amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options["amp"])
    if options["compile"]:
        denoiser.model.compile()
    start = time.time()
    done = train(options, data, run, state, denoiser, emas, real)
    if not done:
        print(f"stopped by a signal; to go on: python train.py --resume {run}")
    elif not brief:
        evaluate.report(options, data, run, ema_of(emas), time.time() - start)
        if ranks()[0] == 0:
            save_samples(run, options["steps"], denoiser, ema_of(emas), options, data)
        step = f"{options['steps']:07d}"
        print(f"samples     {run}/samples-{step}.png\nlog         {run}/log.jsonl\n"
              f"checkpoint  {run}/checkpoint-{step}.pt\n"
              f"next        python evaluate.py sample {run}")
    return 0


def describe(options, data, denoiser, name):
    """What is going to be trained, and on what, on the terminal."""
    size = sum(p.numel() for p in denoiser.parameters())
    print(f"data      {data.source}\nnetwork   {options['arch']}, {size / 1e6:.2f} M parameters\n"
          f"loss      {name}, schedule {options['schedule']}, "
          f"{options['steps']} steps of {options['batch']}, on {options['device']}"
          + f" x {ranks()[1]}" * (ranks()[1] > 1))
    images, share = options["steps"] * options["batch"], options["ema-rampup"]
    if any(float(length) > images for length in options["ema"].split(",")):
        print(f"warning   --ema {options['ema']}: a half-life of more than the {images} images of "
              f"this run; --ema-rampup {share} keeps it below {share * images:g}")


def starting_state(options, denoiser, emas, run):
    """The state that a run starts from, its networks' weights loaded: fresh, --init's or run's."""
    state = dict(step=0, optimizer=None, beta=None, skipped=[0, 0], best=math.inf)
    if run and runs.checkpoints(run):
        state = runs.load_checkpoint(run, options["device"])
        runs.load_weights(denoiser, state["model"], run)
        for length, ema in emas.items():
            runs.load_weights(ema, state["ema"].get(length), run)
    elif options["init"]:
        weights = runs.load_run(options["init"], options["device"])[0].state_dict()
        for network in (denoiser, *emas.values()):
            runs.load_weights(network, network.state_dict() | weights, options["init"])
    drawn = os.path.exists(f"{run}/samples-{options['steps']:07d}.png")   # else a report is due
    if state["step"] + drawn > options["steps"]:
        raise BadInput(f"{run} has its {state['step']} steps; give --steps a larger number")
    return state


if __name__ == "__main__":
    sys.exit(main())
