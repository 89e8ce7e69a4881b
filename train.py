"""train.py: trains a diffusion model.  A script to be read from top to bottom.

    python train.py                                         digits, STF, two minutes on a CPU
    python train.py --data photos/ --size 64 --cond         your own images; sub-folder = class
    torchrun --nproc-per-node 8 train.py --loss stf --data cifar10
    python train.py --resume                                go on with the newest run

A step, as the loop in `run` has it:

    (seed, step) -> Batch -> loss of each sample -> mean -> backward -> clip -> AdamW -> averages

The batch is a pure function of (seed, step): there is no loader and no sampler state.  So a run
that is killed and resumed takes the same steps as one that is not, ranks and micro-batches only
share out the rows of a batch, and two losses see the same images and (but for sa, which needs K
noises) the same noise.

At a first reading, begin at `draw_batch`, then read `objective` and the loop in `run`.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import timeit
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import evaluate
from evaluate import BadInput, Progress, attempt, ranks, total
from losses import (LOSSES, STABLE_LOSSES, WEIGHTS, RunningBeta, augment, augment_labels,
                    augmented_stf_target, draw_augmentation, head_loss, path_noise, sa_loss,
                    sa_tau, stf_target, taylor_terms)
from networks import UNETS, Denoiser
from schedules import SCHEDULES


# ---- Options -------------------------------------------------------------------------------------

def option(default, text, low=None, high=math.inf, choices=None):
    """A field of Options: its default, its help, and the values that it may have."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high,
                                                            choices=choices))


@dataclass
class Options:
    """What can be chosen of a run.  None: by the kind of data (see KINDS), or as the help says."""

    # data; used in evaluate.load_data and draw_batch
    data: str = option("digits", "digits, two-gaussians, two-gaussians-64d, ring, cifar10 or "
                       "mnist; or the path of a folder (sub-folder = class), .zip, .npz or .npy")
    data_dir: str = option("data", "folder of downloads")
    size: int = option(None, "crop and resize the images to N x N", 1)
    holdout: int = option(None, "hold out every N-th row, to measure the error on; 0: none; "
                          "built-in sets draw new rows instead", 0)
    cond: bool = option(None, "tell the network the class of each image")
    xflip: bool = option(False, "mirror each image with probability 1/2")
    augment: float = option(0.0, "probability of each of EDM's geometric transforms", 0, 1)
    # objective; used in draw_batch and objective
    loss: str = option("stf", "score matching with stable targets (stf), with plain targets (dsm), "
                       "on pairs of opposite noises (antithetic), with a Taylor control variate "
                       "(taylor); or sequence-aware (sa)",
                       choices=(*STABLE_LOSSES, *LOSSES, "sa", "taylor"))
    ref_batch: int = option(None, "number of STF's reference rows, the batch among them; at most "
                            "all rows", 1)
    K: int = option(2, "sa: number of consecutive noise levels", 1, 1000)
    lam: float = option(None, "sa: weight of the term of K errors (default: 0, 1, .3 for K = 1, 2, "
                        "3, else .2)", 0)
    tau: str = option("unit", "sa: factors of the K errors: 1, as published (unit), Theorem 1's "
                      "tau (paper), or tau over the highest level's (window)",
                      choices=("unit", "window", "paper"))
    level_noise: str = option("independent", "sa: a noise for each level, as published "
                              "(independent), or those of one forward path, less biased (path)",
                              choices=("independent", "path"))
    windows: str = option("down", "sa: the highest of the K levels is one of 1 to T, as in the "
                          "authors' code (down), or of 0 to T+K-1, as in their paper (up); only "
                          "levels from 1 to T count", choices=("down", "up"))
    order: int = option(0, "taylor: order of the polynomial around the clean image", 0, 2)
    head: str = option("none", "add an output to --init's network, for the variance of a sampling "
                       "step (evaluate.py sample --variance), and train it alone",
                       choices=("none", "sn", "npr"))
    init: str = option(None, "a run whose averaged weights the run starts from")
    # noise levels, weight, preconditioning; used in evaluate.build_schedule, build_weight, ...
    schedule: str = option(None, "noise levels to train on", choices=tuple(SCHEDULES))
    P_mean: float = option(None, "edm: mean of ln sigma in training", -10, 10)
    P_std: float = option(None, "edm: standard deviation of ln sigma in training", 0.01, 10)
    weight: str = option("schedule", "weight of the loss by noise level; schedule: the schedule's "
                         "own", choices=("schedule", *WEIGHTS))
    precondition: str = option("schedule", "scaling around the network: that of --schedule "
                               "(schedule), of another, or to predict eps, x0 or v",
                               choices=("schedule", *SCHEDULES, "eps", "x0", "v"))
    # network; used in evaluate.build_denoiser
    arch: str = option(None, "mlp for points; unet, a small one; ddpmpp, ncsnpp or adm, as "
                       "published with EDM", choices=("mlp", *UNETS))
    width: int = option(None, "channels at the first level (default: as the arch has it)", 4, 4096)
    mult: tuple = option(None, "channels at each level, as multiples of --width, as in 1,2,2 "
                         "(default: as the arch has it)", 1, 64)
    blocks: int = option(None, "blocks at each level (default: as the arch has it)", 1, 64)
    attend: tuple = option(None, "image sizes at which there is attention, as in 16,8 (default: as "
                           "the arch has it)", 1, 4096)
    dropout: float = option(0.0, "share of activations that are dropped in training", 0, 0.99)
    label_dropout: float = option(0.0, "share of labels hidden in training, for evaluate.py sample "
                                  "--guidance", 0, 0.99)
    # optimisation; used in run, learning_rate and ema_beta
    steps: int = option(None, "number of training steps", 1)
    batch: int = option(None, "samples in a step, over all ranks", 1, 65_536)
    lr: float = option(None, "learning rate of AdamW", 1e-9, 10)
    warmup: int = option(None, "number of steps over which the learning rate rises", 0)
    decay: float = option(None, "share of the steps, at the end, in which the learning rate falls "
                          "to 0", 0, 1)
    beta2: float = option(None, "AdamW's beta2, by which it averages squared gradients", 0,
                          0.999999)
    clip: float = option(1.0, "limit of the gradient's norm", 1e-9)
    ema: tuple = option(None, "half-lives of the averages of the weights, in images, as in "
                        "500000,50000; samples use the first average", 1)
    ema_rampup: float = option(0.05, "a half-life is at most this share of the images seen", 0, 1)
    # machine; used in run
    amp: str = option("auto", "number type inside the network; auto: bf16 on a GPU that has it, "
                      "else none", choices=("auto", "none", "bf16", "fp16"))
    compile: bool = option(False, "compile the network with torch.compile")
    micro_batch: int = option(None, "samples in memory at a time, on each rank (default: all)", 1)
    seed: int = option(0, "seed of weights, batches and noise", 0, 2 ** 31 - 1)
    device: str = option(None, "cpu or cuda (default: cuda where there is one)")
    out: str = option(None, "folder of the run (default: runs/NUMBER-DATA-LOSS-SCHEDULE)")
    # what is watched and kept; used at the end of a step in run, and in report
    eval_every: int = option(None, "steps between errors at each noise level; 0: none", 0)
    fid_every: int = option(0, "steps between distances to the data, by which best.pt is kept; 0: "
                           "none", 0)
    fid_num: int = option(None, "samples drawn for each of these distances", 2)
    fid_features: str = option(None, "what distances are measured on: pixels, or the features of "
                               "Inception, which is downloaded", choices=("pixels", "inception"))
    sample_every: int = option(None, "steps between pictures of samples; 0: only at the end", 0)
    sample_steps: int = option(None, "steps of Heun's method for pictures and distances", 1, 500)
    checkpoint_every: int = option(None, "steps between checkpoints", 1)
    keep: int = option(2, "number of checkpoints kept, beside best.pt", 1)
    # facts about the data, filled in by `resolve`: not on the command line
    shape: tuple = ()
    classes: tuple = ()
    counts: tuple = ()
    fingerprint: str = ""


CHOSEN = {field.name: field for field in dataclasses.fields(Options) if field.metadata}
MAY_CHANGE = ("data", "data_dir", "steps", "device", "compile", "micro_batch", "eval_every",
              "fid_every", "fid_num", "fid_features", "sample_every", "sample_steps",
              "checkpoint_every", "keep")                                          # in --resume

KINDS = {     # the defaults that depend on the kind of data, and for images on the machine
    "digits": dict(holdout=0, cond=True, ref_batch=1024, schedule="edm", P_mean=-0.5, P_std=1.0,
                   arch="unet", steps=750, batch=16, lr=4e-3, warmup=20, decay=0.7, beta2=0.99,
                   ema=(2000,), eval_every=250, fid_num=500, fid_features="pixels", sample_every=0,
                   sample_steps=12, checkpoint_every=100),
    "points": dict(holdout=0, cond=False, ref_batch=1024, schedule="edm", P_mean=-1.2, P_std=1.2,
                   arch="mlp", steps=3000, batch=256, lr=5e-3, warmup=100, decay=0.8, beta2=0.99,
                   ema=(20_000,), eval_every=1000, fid_num=4000, fid_features="pixels",
                   sample_every=0, sample_steps=18, checkpoint_every=500),
    "images": dict(holdout=100, cond=False, ref_batch=4096, schedule="edm", P_mean=-1.2, P_std=1.2,
                   arch="ddpmpp", steps=100_000, batch=128, lr=1e-3, warmup=1000, decay=0.0,
                   beta2=0.999, ema=(500_000,), eval_every=5000, fid_num=2048,
                   fid_features="inception", sample_every=5000, sample_steps=18,
                   checkpoint_every=1000),
    "images without a GPU": dict(                                      # as images, but for these
        arch="unet", steps=2000, batch=16, lr=2e-3, warmup=50, decay=0.7, beta2=0.99, ema=(5000,),
        eval_every=500, sample_every=500, checkpoint_every=200)}

# The papers' runs, and mnist: batch, rates, dropout, augmentation, averages, steps as published.
SCORE_SDE = dict(batch=128, lr=2e-4, warmup=5000, steps=1_300_000, ema=(887_000,), dropout=0.1,
                 xflip=True, clip=1.0, beta2=0.999, decay=0.0)
KARRAS = dict(schedule="edm", augment=0.12, batch=512, lr=1e-3, warmup=19_531, steps=390_625,
              dropout=0.13, ema=(500_000,), clip=1e9, beta2=0.999, decay=0.0, fid_every=10_000,
              fid_num=50_000)
CIFAR = dict(data="cifar10", arch="ddpmpp", fid_every=10_000, fid_num=10_000)
PRESETS = {
    "mnist": dict(data="mnist", schedule="edm", arch="ddpmpp", width=64, steps=20_000),
    # EDM, config F, its target replaced by STF's; sampled with heun, 18 steps
    "cifar10-edm-vp": CIFAR | KARRAS,
    "cifar10-edm-ve": CIFAR | KARRAS | dict(arch="ncsnpp"),
    # STF; sampled with rk45, or pc with 1000 steps (VE), ddim with 100 (VP)
    "cifar10-ve": CIFAR | SCORE_SDE | dict(arch="ncsnpp", schedule="ve", ema=(88_700,)),
    "cifar10-vp": CIFAR | SCORE_SDE | dict(schedule="vp"),
    "celeba64-ve": SCORE_SDE | dict(size=64, arch="ncsnpp", mult=(1, 2, 2, 2), schedule="ve",
                                    ema=(88_700,), ref_batch=1024),
    # SA-2; DDPM++'s blocks for DDPM's, and a number of steps that the paper does not state
    "cifar10-ddpm": CIFAR | SCORE_SDE | dict(loss="sa", schedule="ddpm", mult=(1, 2, 2, 2),
                                             blocks=2, steps=500_000),
    # EDM at 64x64; FFHQ sampled with heun, 40 steps; ImageNet with edm-stochastic, 256 steps,
    # S_churn 40, S_tmin .05, S_tmax 50, S_noise 1.003
    "ffhq64": KARRAS | dict(size=64, arch="ddpmpp", mult=(1, 2, 2, 2), augment=0.15, batch=256,
                            lr=2e-4, warmup=39_063, steps=781_250, dropout=0.05),
    "imagenet64-adm": KARRAS | dict(size=64, arch="adm", cond=True, augment=0.0, batch=4096,
                                    lr=1e-4, warmup=2441, steps=610_352, dropout=0.1,
                                    ema=(50_000_000,)),
    # Debias; sampled with ddpm, 1000 steps
    "ffhq256-adm": dict(size=256, arch="adm", width=128, mult=(1, 1, 2, 2, 4, 4), blocks=1,
                        attend=(16,), loss="dsm", weight="debias", schedule="ddpm", batch=8,
                        lr=2e-5, warmup=0, steps=500_000, ema=(55_400,), decay=0.0, beta2=0.999,
                        fid_every=50_000, fid_num=10_000)}
# Each of these options has an effect only if another option has this value.
BELONGS = dict(K=("loss", "sa"), lam=("loss", "sa"), tau=("loss", "sa"),
               level_noise=("loss", "sa"), windows=("loss", "sa"), order=("loss", "taylor"),
               P_mean=("schedule", "edm"), P_std=("schedule", "edm"))
FOR_IMAGES = ("xflip", "augment", "mult", "attend", "dropout", "label_dropout")
NOT_FOR_HEADS = ("loss", "weight", "ref_batch", "dropout")


def word(name):
    """An option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def check(options):
    """BadInput where an option has a value that it may not have."""
    for name, field in CHOSEN.items():
        value = getattr(options, name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if value is None:
            continue
        kind = (int, float) if field.type is float else field.type
        if not isinstance(value, kind):
            raise BadInput(f"{word(name)} {value!r} is not of type {field.type.__name__}")
        values = value if kind is tuple else (value,)
        if choices and value not in choices:
            raise BadInput(f"{word(name)} {value} is none of {', '.join(choices)}")
        if low is not None and not all(low <= v <= high for v in values):
            limits = f"at least {low}" if high == math.inf else f"within [{low}, {high}]"
            raise BadInput(f"{word(name)} {','.join(map(str, values))} is not {limits}")
    if options.compile and options.order:
        raise BadInput("--compile: torch.compile has no second derivatives, which --order 1 and 2 "
                       "need; leave one of them out")


def resolve(options, data):
    """The options of a new run on this data: KINDS fills in what is None.

    BadInput where options contradict each other, or where one would have no effect.
    """
    options, points = dataclasses.replace(options), data.x.ndim == 2
    options.device = evaluate.pick_device(options.device)
    kind = "digits" if options.data == "digits" else "points" if points else "images"
    if kind == "images" and options.device == "cpu":
        kind = "images without a GPU"
    given = [name for name, field in CHOSEN.items() if getattr(options, name) != field.default]
    for name, value in (KINDS["images"] | KINDS[kind]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    unused = [f"{word(name)} belongs to --{other} {value}"
              for name, (other, value) in BELONGS.items()
              if name in given and getattr(options, other) != value]
    for_images = [word(name) for name in FOR_IMAGES if name in given]
    not_for_heads = [word(name) for name in NOT_FOR_HEADS if name in given]
    few = ("ref_batch" in given and options.ref_batch < options.batch
           and options.loss in STABLE_LOSSES)
    if options.amp == "auto":
        bf16 = options.device.startswith("cuda") and torch.cuda.is_bf16_supported(
            including_emulation=False)
        options.amp = "bf16" if bf16 else "none"
    options.shape, options.fingerprint = tuple(data.x.shape[1:]), data.fingerprint
    if options.cond and data.classes:
        options.classes = tuple(data.classes)
        options.counts = tuple(np.bincount(data.labels).tolist())
    levels = len(options.mult or UNETS.get(options.arch, {}).get("mult", ()))
    sizes = [options.shape[-1] >> level for level in range(levels)]
    for bad, sentence in [
        (unused, "; ".join(unused)),
        (points and for_images, f"{' and '.join(for_images)}: not for points; leave it out"),
        ((options.arch == "mlp") != points, "--arch mlp is for points, and only that is; "
         f"{data.name} has shape {options.shape}"),
        (options.attend and not set(options.attend) <= set(sizes),
         f"--attend: the sizes in this network are {sizes}"),
        (options.width and options.width % 2, "--width is not even; choose an even number"),
        (options.cond and data.labels is None, f"--cond: {data.name} has no labels; leave "
         "it out, or put the images into a sub-folder for each class"),
        (options.label_dropout and not options.cond, "--label-dropout needs --cond"),
        (options.loss == "taylor" and options.precondition == "x0", "--precondition x0: the "
         "network's target holds no noise that a Taylor control could take out"),
        (options.head != "none" and not options.init, "--head needs --init RUN, the run whose "
         "network gets it"),
        (options.head != "none" and not_for_heads, f"{' and '.join(not_for_heads)}: a head has its "
         "own loss, and no dropout; leave it out"),
        (few, "--ref-batch is less than --batch, whose rows are among the references; choose more"),
        (options.holdout == 1, "--holdout 1 would leave nothing to train on"),
        (options.holdout and options.data in evaluate.DRAWN, "--holdout: the error on "
         f"{options.data} is measured on new rows; leave it out"),
    ]:
        if bad:
            raise BadInput(sentence)
    return options


def resumed(folder, given):
    """The options of a run that goes on: those it was started with, and what may change."""
    if os.path.isfile(folder):
        raise BadInput(f"--resume: {folder} is a file; name the folder of the run")
    options = Options(**evaluate.load_checkpoint(folder)["options"])
    differ = [f"{word(name)} {value} (was {getattr(options, name)})"
              for name, value in given.items()
              if value != getattr(options, name) and name not in MAY_CHANGE]
    if differ:
        raise BadInput(f"--resume {folder}: cannot change {', '.join(differ)}; start a new run")
    options = dataclasses.replace(options, **given)
    options.device = evaluate.pick_device(options.device)
    return options


def inherit(options):
    """The options, with the network and the noise levels of --init's run."""
    stored = evaluate.load_checkpoint(options.init)["options"]
    options = dataclasses.replace(options)
    for name in ("cond", "schedule", "precondition", "arch", "width", "mult", "blocks", "attend",
                 "augment", "P_mean", "P_std"):
        value = getattr(options, name)
        if value not in (CHOSEN[name].default, stored[name]):
            raise BadInput(f"--init {options.init}: cannot change {word(name)} {value} "
                           f"(was {stored[name]})")
        unused = name in ("P_mean", "P_std") and stored["schedule"] != "edm"
        setattr(options, name, None if unused else stored[name])
    return options


# ---- The batch of a step -------------------------------------------------------------------------

@dataclass
class Batch:
    """What a step draws.  B samples; STF's n references; SA's K noise levels."""
    x0: torch.Tensor                 # (B, ...) clean, images in [-1, 1], augmented if asked for
    noise: torch.Tensor              # (B, ...); SA: (K, B, ...)
    sigma: torch.Tensor              # (B, 1, ..., 1); SA: (K, B, 1, ..., 1)
    labels: torch.Tensor = None      # (B,) int64 on the CPU: classes
    a: torch.Tensor = None           # (B, 8) on the CPU: parameters of the augmentation
    reference: torch.Tensor = None   # STF: (n, ...), uint8 if images, the B sources among them
    reference_labels: torch.Tensor = None      # STF: (n,) int64 on the CPU
    tau: torch.Tensor = None         # SA: (K, B, 1, ..., 1)
    probe: torch.Tensor = None       # Taylor: (B, ...) random signs

    def rows(self, rows):
        """The batch of these samples alone, a slice, with the same reference."""
        part = {}
        for name in ("x0", "noise", "sigma", "labels", "a", "tau", "probe"):
            value = getattr(self, name)
            if value is not None:
                levels = value.ndim > self.x0.ndim                    # SA: (K, B, ...)
                part[name] = value[:, rows] if levels else value[rows]
        return dataclasses.replace(self, **part)


def generator(seed, step, stream, device="cpu"):
    """A generator that is a function of its arguments.  Streams: 0 rows; 1 noise and probe; 2
    augmentation; 3 dropout and beta; 4 noise levels and mirroring.

    Its seeds are even and those of samples odd, so that neither has the other's noise.  torch's CPU
    generator keeps 32 bits of its seed: (seed << 32) + step would forget the seed.
    """
    number = (seed * 0x9E3779B1 + 8 * step + stream) % 2 ** 31
    return torch.Generator(device).manual_seed(2 * number)


def draw_rows(N, n, g):
    """n of the numbers 0 to N - 1, distinct if n <= N.  A smaller n gives the first of the same."""
    if n > N:
        return torch.randint(N, (n,), generator=g)
    if N <= 100_000:
        return torch.randperm(N, generator=g)[:n]
    drawn = {}                            # in O(n) for n far below N; a dict keeps their order
    while len(drawn) < n:
        drawn |= dict.fromkeys(torch.randint(N, (n,), generator=g).tolist())
    return torch.tensor(list(drawn)[:n])


def draw_batch(pixels, labels, options, schedule, step):
    """The Batch of a step, from the data's rows (N, ...) and labels (N,), or None.

    The references are distinct rows, unless the batch exceeds the data; and all rows, if the data
    has fewer than --ref-batch.  The first of them are the sources, from which the batch is made.
    Each reference is as likely as any other to be a source: that keeps STF unbiased.
    """
    B, K, device, stf = options.batch, options.K, options.device, options.loss in STABLE_LOSSES
    N = len(pixels)
    if options.holdout:
        N -= N // options.holdout                              # rows to train on
    n = max(B, min(options.ref_batch, N)) if stf else B
    rows = draw_rows(N, n, generator(options.seed, step, 0))
    if options.holdout:
        rows = rows + rows // (options.holdout - 1)            # passes over every holdout-th row
    g = generator(options.seed, step, 4)
    u = torch.rand(B, generator=g, dtype=torch.float64).clamp_min(2.0 ** -53)
    sigma = schedule.training_sigma(u)                                            # (B,)

    x = pixels[rows.to(pixels.device, non_blocking=True)].to(device, non_blocking=True)
    if options.xflip:
        flip = (torch.rand(n, generator=g) < 0.5).to(device, non_blocking=True)
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    batch = Batch(x0=evaluate.to_float(x[:B]), noise=None, sigma=None)            # these: below
    if options.cond:
        batch.labels = labels[rows[:B]]
    if stf:
        batch.reference = x                                                       # (n, ...)
        if options.cond:
            batch.reference_labels = labels[rows]
    if options.augment:
        batch.a = draw_augmentation(B, options.augment, generator(options.seed, step, 2))
        batch.x0 = augment(batch.x0, batch.a)

    shape = batch.x0.shape
    if options.loss == "sa":
        ladder = ladder_of(schedule)
        T, shape = len(ladder), (K, *shape)
        if options.windows == "up":
            t = (u * (T + K)).long()                                    # (B,) in 0..T+K-1
        else:
            t = torch.searchsorted(ladder, sigma).clamp(max=T - 1) + 1  # (B,) in 1..T
        numbers = (t - torch.arange(K)[:, None]).clamp(1, T)                      # (K, B)
        sigma = ladder[numbers - 1]
        batch.tau = on(device, sa_tau(ladder, t, K, options.tau), batch.x0)
    batch.sigma = on(device, sigma, batch.x0)                     # (B, 1, ..), SA: (K, B, 1, ..)
    g = generator(options.seed, step, 1, device)
    batch.noise = torch.randn(shape, generator=g, device=device)
    if options.loss == "taylor":
        batch.probe = torch.randn(shape, generator=g, device=device).sign()
    if options.loss == "sa" and options.level_noise == "path":
        batch.noise = path_noise(batch.noise, batch.sigma)
    return batch


def on(device, values, x):
    """values (.., B) -> (.., B, 1, ..., 1) for x (B, ...), of x's type, on the device."""
    values = values.to(x.dtype).to(device, non_blocking=True)
    return values.view(*values.shape, *[1] * (x.ndim - 1))


def ladder_of(schedule):
    """sigma_1 < ... < sigma_T: a ladder's levels, or a continuous schedule's at 1000 time steps."""
    if hasattr(schedule, "levels"):
        return schedule.levels
    return schedule.sigma(schedule.time_steps(1000)[:-1]).flip(0)


# ---- The objective -------------------------------------------------------------------------------

def objective(options, denoiser, batch, weight, precondition, beta):
    """The loss of each sample, (B,), by --loss, or of --head.

    weight: sigma -> lambda; precondition: the denoiser's; beta: a RunningBeta, for taylor.
    """
    denoise, x0, noise, sigma = bind(denoiser, batch), batch.x0, batch.noise, batch.sigma
    if options.head != "none":
        return head_loss(partial(denoise, head=True), x0, noise, sigma, options.head)
    if options.loss in LOSSES:
        return LOSSES[options.loss](denoise, x0, noise, sigma, weight)
    if options.loss in STABLE_LOSSES:
        target = partial(stable_target, batch)
        return STABLE_LOSSES[options.loss](denoise, x0, noise, sigma, weight, target)
    if options.loss == "sa":
        lam = options.lam
        if lam is None:                                           # as published for K = 2, 3, 4
            lam = {1: 0.0, 2: 1.0, 3: 0.3}.get(options.K, 0.2)
        return sa_loss(denoise, x0, noise, sigma, weight, batch.tau, lam)
    loss, control = controlled(options, denoise, batch, weight, precondition)     # taylor
    return loss - beta(sigma).flatten() * control


def bind(denoiser, batch):
    """denoise(x, sigma) for the batch's classes and augmentation."""
    labels, a, device = batch.labels, batch.a, batch.x0.device
    labels = None if labels is None else labels.to(device, non_blocking=True)
    a = None if a is None else augment_labels(a).to(device, non_blocking=True)
    return partial(denoiser, labels=labels, augment_labels=a)


def stable_target(batch, x, sigma):
    """STF's target of x, given the batch's reference, classes and augmentation."""
    classes = () if batch.labels is None else (batch.labels, batch.reference_labels)
    if batch.a is not None:
        return augmented_stf_target(x, sigma, batch.reference, batch.a, *classes)
    classes = [labels.to(x.device, non_blocking=True) for labels in classes]
    return stf_target(x, sigma, batch.reference, *classes)


def controlled(options, denoise, batch, weight, precondition):
    """dsm_loss and its Taylor control, (B,) each; the trace is exact in up to 8 dimensions."""
    arguments = denoise, batch.x0, batch.noise, batch.sigma, weight, precondition, options.order
    if options.order == 0:
        return taylor_terms(*arguments)
    probe = batch.probe if batch.x0[0].numel() > 8 else None
    with sdpa_kernel(SDPBackend.MATH):           # the only attention with second derivatives
        return taylor_terms(*arguments, probe)


def update_beta(options, denoiser, batch, weight, beta, step):
    """Updates beta, for later steps, by the last layer's gradients of up to 16 samples."""
    m, device = min(16, options.batch), options.device
    small, g = batch.rows(slice(m)), generator(options.seed, step, 3, device)
    torch.manual_seed(g.initial_seed())                  # dropout: the same mask on every rank
    u = torch.rand(small.sigma.shape, generator=g, device=device)
    u = (torch.arange(m, device=device).view_as(u) + u) / m
    small.sigma = 0.002 * 500 ** u                                                # .002 to 1
    small.noise = torch.randn(small.x0.shape, generator=g, device=device)
    loss, control = controlled(options, bind(denoiser, small), small, weight,
                               denoiser.precondition)
    beta.update(small.sigma, loss, control, list(denoiser.parameters())[-2:])


def learning_rate(options, step):
    """Linear warm-up over `warmup` steps; linear fall over the last share `decay`, to near 0."""
    rise = min(1, (step + 1) / max(options.warmup, 1))
    left = (options.steps - step) / max(options.decay * options.steps, 1)
    return options.lr * rise * min(1, left)


def ema_beta(half_life, options, step):
    """The factor beta of update_averages   (EDM's code).

        beta = 1/2^(batch/h),    h = min(half_life, ema_rampup images seen)
    """
    h = min(half_life, options.ema_rampup * step * options.batch)
    return 0.5 ** (options.batch / max(h, 1e-8))


@torch.no_grad()
def update_averages(averages, denoiser, options, step):
    """average <- beta average + (1 - beta) weights, for each half-life, after `step` steps."""
    weights = list(denoiser.parameters())
    for half_life, average in averages.items():
        beta = ema_beta(float(half_life), options, step)
        torch._foreach_lerp_(list(average.parameters()), weights, 1 - beta)


# ---- Ranks ---------------------------------------------------------------------------------------
# torchrun starts one process for each GPU, or several on CPUs; without it there is one, rank 0.

NEVER_FREED = []    # freeing DDP hangs, if a thread of gloo waits just then to free a tensor


def start_ranks():
    """Joins torchrun's process group, if there is one; the first rank alone prints."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if ranks()[0] > 0:
            sys.stdout = open(os.devnull, "w")


def agree(call):
    """call() on every rank; BadInput on one of them is raised on all."""
    world = ranks()[1]
    if world == 1:
        return call()
    result, error = None, None
    try:
        result = call()
    except BadInput as bad:
        error = str(bad)
    errors = [None] * world
    dist.all_gather_object(errors, error)
    for error in errors:
        if error:
            raise BadInput(error)
    return result


def in_turn(load):
    """load() on the first rank of each machine, which may download; then on the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    early = agree(load if first else lambda: None)
    late = agree(load if not first else lambda: None)
    return early if first else late


def highest(*numbers):
    """The largest of each of these whole numbers over the ranks, by gloo: no GPU waits."""
    largest = torch.tensor([int(number) for number in numbers])
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(call):
    """Rank 0's call(), told to all ranks."""
    told = [agree(call if ranks()[0] == 0 else lambda: None)]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


# ---- A run ---------------------------------------------------------------------------------------

def run(options, folder=None, brief=False):
    """Trains, and returns the run's folder.

    folder: that of a run that goes on, with the options of `resumed`; None: a new one.  brief:
    without report and pictures.
    """
    start_ranks()
    rank, world = ranks()
    agree(partial(check, options))
    data = in_turn(partial(evaluate.run_data, options))
    if not folder:
        options = agree(partial(resolve, inherit(options) if options.init else options, data))
    if min(options.batch, options.fid_num, len(data.x) // 2) < world:
        raise BadInput("--batch, --fid-num and half the number of images or points must each be at "
                       f"least the number of ranks, {world}")
    memory = agree(partial(memory_needed, options))
    device, schedule = options.device, evaluate.build_schedule(options)

    # The network, its averages, the optimizer; and their state, where a run goes on.
    torch.manual_seed(options.seed)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.amp)
    denoiser = agree(partial(evaluate.build_denoiser, options, amp))
    denoiser = denoiser.to(device, memory_format=memory_format(device))
    emas = {str(length): copy.deepcopy(denoiser).requires_grad_(False) for length in options.ema}
    ema = emas[str(options.ema[0])]                       # the average that samples use
    if options.head != "none":
        denoiser.requires_grad_(False)
        denoiser.model.head.requires_grad_()
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, options.beta2),
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=options.amp == "fp16")
    beta = RunningBeta(device=device) if options.loss == "taylor" else None
    first, skipped, best = agree(partial(load_state, options, folder, denoiser, emas, optimizer,
                                         scaler, beta))
    if options.fid_every:
        features = in_turn(partial(evaluate.extractor, options.fid_features, options.shape,
                                   options.data_dir, device))
        name = evaluate.distance_name(features[0], options.fid_num)
        real = evaluate.real_statistics(data, options.fid_num, features)
    folder = folder or from_first(partial(new_folder, options, data))
    lock = agree(partial(claim, folder, options))
    describe(options, data, denoiser, folder, first, memory)

    # What a step needs.
    net = denoiser                                        # what the objective calls: same weights
    if options.compile:                                   # for training; the rest is not compiled
        net = Denoiser(torch.compile(denoiser.model), denoiser.precondition, amp)
    if world > 1:
        net = DistributedDataParallel(net)
        NEVER_FREED.append(net)
    weight, held = evaluate.build_weight(options), evaluate.held_out(data, options)
    pixels, labels = on_device(data, device)
    threads = torch.get_num_threads()
    if device == "cpu" and threads > 1:
        choose_threads(denoiser, options)
    share = range(options.batch * rank // world, options.batch * (rank + 1) // world)
    size = options.micro_batch or len(share)
    parts = [slice(i, min(i + size, share.stop))
             for i in range(share.start, share.stop, size)]
    log, start, done = Log(folder, options, first, skipped), time.time(), first == options.steps

    with Signals() as signals:
        for step in range(first, options.steps):
            # The gradient of the batch's mean loss, from this rank's share of the rows.
            denoiser.train(options.head == "none")          # beside a head, no dropout
            batch = draw_batch(pixels, labels, options, schedule, step)
            losses = torch.zeros(options.batch, device=device)
            for rows in parts:
                torch.manual_seed(generator(options.seed + rows.start, step, 3).initial_seed())
                wait = world > 1 and rows != parts[-1]          # ranks add gradients once a step
                with net.no_sync() if wait else contextlib.nullcontext():
                    loss = objective(options, net, batch.rows(rows), weight, denoiser.precondition,
                                     beta)
                    mean = loss.sum() / options.batch
                    scaler.scale(mean * world).backward()       # DDP divides by the ranks
                losses[rows] = loss.detach()
            losses = total(losses)                                                # (B,)

            # The update.  The optimizer skips it where found_inf is 1, which it reads on the
            # device: the host does not wait.  fp16's scaler sets a found_inf of its own.
            optimizer.param_groups[0]["lr"] = learning_rate(options, step)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.found_inf = (~(norm.isfinite() & losses.isfinite().all())).float()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            update_averages(emas, denoiser, options, step + 1)
            if beta and step % 25 == 0:
                update_beta(options, denoiser, batch, weight, beta, step)
            log.step(step + 1, losses, norm)

            # What is watched and kept.
            done = step + 1 == options.steps
            stop, tell = highest(signals.got, log.wants_to_tell(step + 1))
            if tell:
                log.flush()

            def due(every):
                return every and (done or (step + 1) % every == 0)
            improved = False
            if due(options.eval_every):
                log.write(step + 1, levels=evaluate.LEVELS, held_out=dict(
                    raw=evaluate.denoising_error(denoiser.eval(), *held),
                    ema=evaluate.denoising_error(ema.eval(), *held)))
            if due(options.fid_every):
                distance = evaluate.run_distance(ema.eval(), options, range(options.fid_num),
                                                 features, real, steps=options.sample_steps)
                improved, best = distance < best, min(best, distance)
            if done or stop or improved or due(options.checkpoint_every):
                log.flush()                                     # before log.skipped is stored
                agree(partial(save, folder, options, improved, dict(
                    step=step + 1, options=dataclasses.asdict(options), model=denoiser.state_dict(),
                    ema={length: average.state_dict() for length, average in emas.items()},
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), best=best,
                    beta=beta.sums if beta else None, skipped=log.skipped)))
            if due(options.fid_every):
                log.write(step + 1, **{name: distance}, floor=real["floor"])
                log.told.end_line()
                print(f"distance  {name} {distance:.4g} at step {step + 1}", flush=True)
            if due(options.sample_every) and not done and rank == 0:
                save_samples(folder, step + 1, denoiser, ema, options, data)
            if stop:
                break
    log.flush()
    if done and not brief:
        report(folder, options, data, denoiser, ema, log, time.time() - start)
    total(torch.zeros(1))                                 # no rank leaves before the report is done
    lock.close()
    torch.set_num_threads(threads)                        # sampling may be faster with more
    if not done:
        launcher = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
        print(f"stopped by a signal; to go on: {launcher} train.py --resume "
              f"{shlex.quote(folder)}")
        sys.exit(128 + stop)
    return folder


def load_state(options, folder, denoiser, emas, optimizer, scaler, beta):
    """Loads a run's newest checkpoint, or --init's weights, into these; (step, skipped, best)."""
    if folder and evaluate.checkpoints(folder):
        state = evaluate.load_checkpoint(folder)            # on the CPU: a GPU holds weights once
        evaluate.load_weights(denoiser, state["model"], folder)
        for length, average in emas.items():
            evaluate.load_weights(average, state["ema"].get(length), folder)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if beta:
            beta.sums = state["beta"].to(options.device)
        reported = os.path.exists(f"{folder}/samples-{options.steps:07d}.png")
        if state["step"] > options.steps or (state["step"] == options.steps and reported):
            raise BadInput(f"{folder} has taken {state['step']} steps; to go on, give "
                           "--steps a larger number")
        before = state["options"]["fid_num"], state["options"]["fid_features"]
        same = before == (options.fid_num, options.fid_features)     # else distances do not compare
        return state["step"], state["skipped"], state["best"] if same else math.inf
    if options.init:
        state = evaluate.load_checkpoint(options.init)
        classes, weights = state["options"]["classes"], next(iter(state["ema"].values()))
        if classes != options.classes:
            raise BadInput(f"--init {options.init} has the classes {', '.join(classes)}, "
                           f"and the data have {', '.join(options.classes)}; both must be the same")
        for network in (denoiser, *emas.values()):       # a head keeps its own fresh weights
            evaluate.load_weights(network, network.state_dict() | weights, options.init)
    return 0, [0, 0], math.inf


def on_device(data, device):
    """Rows and labels as tensors; the rows on a GPU, if a quarter of its free memory has room."""
    pixels, labels = torch.from_numpy(np.asarray(data.x)), data.labels
    if device.startswith("cuda") and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        pixels = pixels.to(device)
    return pixels, None if labels is None else torch.from_numpy(labels)


@torch.no_grad()
def choose_threads(denoiser, options):
    """Takes one thread where several are slower: for small networks, and where other programs use
    the cores, so that the threads wait for each other."""
    x = torch.ones(options.batch, *options.shape)
    sigma, seconds = torch.ones(len(x), *[1] * len(options.shape)), {}
    many = torch.get_num_threads()
    for threads in (many, 1):
        torch.set_num_threads(threads)
        first, second = timeit.repeat(partial(denoiser, x, sigma), number=5, repeat=2)
        seconds[threads] = second                         # the first calls prepare their kernels
    if seconds[1] < seconds[many]:
        print(f"threads   1, which is faster here than {many}")
    else:
        torch.set_num_threads(many)


def memory_format(device):
    """The order of images in memory: CPU's convolutions are faster with channels last.  On a GPU
    GroupNorm gives channels first, so that each convolution would have to reorder its input."""
    return torch.channels_last if device == "cpu" else torch.contiguous_format


# ---- A run's folder ------------------------------------------------------------------------------

def new_folder(options, data):
    """Makes the folder of a new run: --out, or the next free runs/NUMBER-DATA-LOSS-SCHEDULE."""
    loss = options.loss if options.head == "none" else f"head-{options.head}"
    if options.out is not None:
        # A start that failed before its first checkpoint does not block the next one.
        left = os.listdir(options.out) if os.path.isdir(options.out) else []
        passing = r"samples-\d+\.png|options\.json|log\.jsonl|.*\.part"
        if not all(re.fullmatch(passing, name) for name in left):
            raise BadInput(f"{options.out} is not empty; choose another --out, or go on with "
                           f"--resume {options.out}")
        attempt(options.out, "choose another --out", os.makedirs, options.out, exist_ok=True)
        return options.out
    os.makedirs("runs", exist_ok=True)
    taken = [int(name[:3]) for name in os.listdir("runs") if name[:3].isdigit()]
    for number in itertools.count(max(taken, default=-1) + 1):
        out = f"runs/{number:03d}-{data.name}-{loss}-{options.schedule}"
        with contextlib.suppress(FileExistsError):       # two starts at once get two folders
            os.mkdir(out)
            return out


def claim(folder, options):
    """Locks a run's folder and writes options.json, for people to read.

    The lock lasts until the returned file is closed or the process ends.
    """
    file = open(f"{folder}/.lock.part", "a")
    if ranks()[0] > 0:
        return file
    if sys.platform != "win32":
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{folder} is being trained by another process") from None
    text = json.dumps(dataclasses.asdict(options), indent=1) + "\n"
    evaluate.whole(f"{folder}/options.json", lambda file: file.write(text.encode()))
    return file


def newest_run():
    """The folder under runs/ that was started or resumed last, of those with a checkpoint."""
    written = Path("runs").glob("*/options.json")
    found = [path for path in written if evaluate.checkpoints(path.parent)]
    if not found:
        raise BadInput("there is no run under runs/ to resume; start one, or name its folder")
    return str(max(found, key=os.path.getmtime).parent)


def save(folder, options, improved, state):
    """Writes the checkpoint, also as best.pt if the distance improved; removes old ones."""
    if ranks()[0] == 0:
        evaluate.whole(f"{folder}/checkpoint-{state['step']:07d}.pt", partial(torch.save, state))
        if improved:
            evaluate.whole(f"{folder}/best.pt", partial(torch.save, state))
        for old in evaluate.checkpoints(folder)[:-options.keep]:
            os.remove(old)


def save_samples(folder, step, denoiser, ema, options, data):
    """A picture of the same samples from the raw and from the averaged weights; and of the data,
    where these are points."""
    points = data.x.ndim == 2
    count = 4000 if points else 8 * len(options.classes[:10]) or 64
    labels, names = evaluate.class_grid(options, count)
    panels = [("data", data.x[:count])] if points else []
    for name, model in [("raw weights", denoiser), ("averaged weights (EMA)", ema)]:
        x = evaluate.generate(model.eval(), options, range(count), "heun", options.sample_steps,
                              labels, batch=count if points else 64)
        panels.append((f"step {step}, {name}", x))
    evaluate.save_pictures(os.path.join(folder, f"samples-{step:07d}.png"), panels, names)


class Log:
    """log.jsonl, a line for each step, and the status line.

    Losses wait on the device until a status line is due, for reading them out makes the host wait.
    skipped: how many steps were skipped, and how many in a row up to now.  Every rank reads the
    same numbers after the same steps, so that ten skipped steps in a row stop all ranks.
    """

    def __init__(self, folder, options, step, skipped):
        self.folder, self.options, self.begin, self.skipped = folder, options, step, list(skipped)
        self.waiting, self.mean = [], None
        self.path = f"{folder}/log.jsonl" if ranks()[0] == 0 else os.devnull
        self.told = Progress("step", options.steps, begin=step)
        self.start = self.last = time.time()
        kept = attempt(self.path, "mend it, or move it away", self.lines_up_to, step)
        Path(self.path).write_text("".join(kept))

    def lines_up_to(self, step):
        """The log's lines up to a checkpoint: a killed run may have logged more steps."""
        lines = Path(self.path).read_text().splitlines() if os.path.isfile(self.path) else []
        kept = []
        for line in lines:
            if line.endswith("}"):                            # else a kill cut it off
                values = json.loads(line)
                again = "report" in values and values["step"] == self.options.steps
                if values["step"] <= step and not again:      # the report is written again
                    kept.append(line + "\n")
        return kept

    def step(self, step, losses, norm):
        """losses (B,) and norm () on the device."""
        self.waiting.append((step, torch.stack([losses.mean(), norm])))
        if step == self.begin + 1:
            self.second = time.time()                     # when the second step begins

    def wants_to_tell(self, step):
        """Whether this rank would like to read out what waits, after this step."""
        return time.time() - self.last > (1 if self.told.live else 15) or step == self.begin + 10

    def flush(self):
        """Reads out what waits, writes it, and tells where the run stands."""
        if not self.waiting:
            return
        values = torch.stack([value for _, value in self.waiting]).tolist()
        for (step, _), (loss, norm) in zip(self.waiting, values):
            if not math.isfinite(loss + norm):
                self.skipped = [self.skipped[0] + 1, self.skipped[1] + 1]
                self.line(step=step, skipped=self.skipped[0])
            else:
                self.skipped[1] = 0
                self.line(step=step, loss=loss, grad_norm=norm)
                self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
            if self.skipped[1] == 10:
                last = (evaluate.checkpoints(self.folder) or ["none"])[-1]
                raise BadInput(f"ten steps in a row up to {step} had no finite loss or gradient; "
                               f"try a smaller --lr; the last good checkpoint: {last}")
        self.waiting, self.last = [], time.time()
        pace, timed = self.last - self.start, step - self.begin - 1
        if timed:                                         # the first step compiles, and takes long
            pace = (self.last - self.second) / timed
        days = pace * (self.options.steps - step) / 86_400
        if days > 1 and step == self.begin + 10:
            print(f"warning   the run takes {days:.1f} days more at this rate; to shorten "
                  "it, press Ctrl-C and choose fewer --steps, a smaller --arch or --width, or a "
                  "GPU", flush=True)
        self.told(step, f", loss {self.mean or math.nan:.4f}, {self.options.batch / pace:.0f} "
                  f"samples/s, {self.skipped[0]} steps skipped")

    def write(self, step, **values):
        """A line of its own, after those of the steps that wait."""
        self.flush()
        self.line(step=step, **values)

    def line(self, **values):
        values = {name: v for name, v in values.items() if v == v}       # a floor may be NaN
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


class Signals:
    """Within it, the first SIGINT or SIGTERM ends the run after its step, a second at once."""

    def __enter__(self):
        self.got, self.old = 0, {}
        if threading.current_thread() is threading.main_thread():      # others may not take signals
            self.old = {s: signal.signal(s, self.take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def take(self, number, frame):
        if self.got:
            raise KeyboardInterrupt
        self.got = number


# ---- Report --------------------------------------------------------------------------------------

def describe(options, data, denoiser, folder, first, memory):
    """What is going to be trained, on what, and what may be wrong with it, on the terminal."""
    world, size = ranks()[1], sum(p.numel() for p in denoiser.parameters())
    loss = options.loss if options.head == "none" else f"of the head {options.head} alone"
    weight = "" if options.weight == "schedule" else f", weight {options.weight}"
    untold = ""
    if data.classes and not options.cond and not options.init and first == 0:
        untold = "; --cond would tell the network the class"
    print(f"data      {data.source}{untold}\n"
          f"network   {options.arch}, {size / 1e6:.2f} M parameters\n"
          f"loss      {loss}, schedule {options.schedule}{weight}, {options.steps} steps of "
          f"{options.batch}, on {options.device} x {world}\n"
          f"run       {folder}, from step {first}\n"
          f"memory    about {memory:,.2f} GiB for the activations of the samples that each rank "
          "takes at a time (--micro-batch)", flush=True)
    rows = torch.linspace(0, len(data.x) - 1, min(len(data.x), 4096)).long()
    deviation = evaluate.take(data, rows)[0].std().item()
    if not 0.1 < deviation < 2:
        print(f"warning   the data's standard deviation is {deviation:.3g}, and the noise levels "
              f"are made for 0.5: divide the data by {2 * deviation:.3g}, or set sigma_max in "
              f"schedules.py to about {160 * deviation:.3g}")


def memory_needed(options):
    """GiB of activations on a rank, an estimate; BadInput where they exceed the machine's."""
    at_once = min(options.micro_batch or options.batch, math.ceil(options.batch / ranks()[1]))
    copies = dict(antithetic=2, sa=options.K, taylor=2).get(options.loss, 1)
    needed, there = copies * at_once * activation_bytes(options) / 2 ** 30, math.inf
    if options.device.startswith("cuda"):
        there = torch.cuda.mem_get_info(options.device)[1] / 2 ** 30
    elif hasattr(os, "sysconf"):                          # not on Windows
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    if needed > there:
        fit = math.floor(at_once * there / needed)
        cure = f"--micro-batch of at most {fit}" if fit else "smaller --width or --size"
        raise BadInput(f"the activations of {at_once} samples take about {needed:,.0f} GiB, and "
                       f"{options.device} has {there:,.0f}; choose a {cure}")
    return needed


def activation_bytes(options):
    """Bytes that a forward pass keeps for the backward pass, for one sample: an estimate.

    A network on torch's device "meta", without data, tells which tensors autograd saves.
    """
    with torch.device("meta"):
        network, x = evaluate.build_denoiser(options), torch.empty(1, *options.shape)
        sigma = torch.ones(1, *[1] * len(options.shape))
    own, sizes = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def note(x):
        sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, note):
        network(x, sigma)
    share = 0.8 if options.amp in ("bf16", "fp16") else 1     # GroupNorm keeps float32
    return share * sum(size for key, size in sizes.items() if key not in own)


def report(folder, options, data, denoiser, ema, log, seconds):
    """What a person wants to know at the end: on the terminal, as pictures, and in the log.

    Every rank draws its share of the samples for the distance; the first one tells.
    """
    count = min(128, len(data.x) // 2)
    print(f"drawing {count} samples", flush=True)
    features = evaluate.extractor("pixels", options.shape)
    real = evaluate.real_statistics(data, count, features, options.seed, 10_000)
    distance = evaluate.run_distance(ema.eval(), options, range(count), features, real,
                                     steps=options.sample_steps)
    if ranks()[0] > 0:
        return
    table = evaluate.noise_table(ema, options, data)
    print(f"\n{options.steps - log.begin} steps in {int(seconds) // 60}:{int(seconds) % 60:02d} "
          "minutes\n")
    evaluate.print_levels(table, options, data)
    kind, space = ("images", "pixels") if data.x.ndim == 4 else ("points", "coordinates")
    print(f"\nFrechet distance to the data in {space}, smaller is better:\n"
          f"{distance:10.4g}  {count} samples (averaged weights, Heun, "
          f"{2 * options.sample_steps - 1} network calls each)\n"
          f"{real['floor']:10.4g}  {count} real {kind}, the floor\n")
    log.write(options.steps, report=dict(frechet_pixels=distance, floor=real["floor"], count=count,
                                         loss_by_sigma=table))
    evaluate.draw_run(folder, table)
    save_samples(folder, options.steps, denoiser, ema, options, data)
    how = "" if options.head == "none" else f" --sampler ddpm --variance {options.head}"
    print(f"samples     {folder}/samples-{options.steps:07d}.png\nlog         {folder}/log.jsonl\n"
          f"checkpoint  {folder}/checkpoint-{options.steps:07d}.pt\n"
          f"next        python evaluate.py sample {shlex.quote(folder)}{how}")


# ---- Command line --------------------------------------------------------------------------------

def numbers(text):
    """A type for argparse: whole numbers separated by commas."""
    return tuple(int(part) for part in text.split(","))


def default_text(field):
    """An option's default in words, as it is typed; by the kind of data where that decides."""
    own = {kind: values[field.name] for kind, values in KINDS.items() if field.name in values}
    if field.default is not None or not own:
        return str(field.default).lower()
    shown = [f"{kind} {','.join(map(str, v)) if isinstance(v, tuple) else v}"
             for kind, v in own.items()]
    return "; ".join(shown).replace("True", "true").replace("False", "false")


def parser():
    """A parser made from Options; it returns only what was typed."""
    p = evaluate.Parser(
        prog="train.py", usage="python train.py [OPTION]", argument_default=argparse.SUPPRESS,
        description="Train a diffusion model; without options, one of coloured digits.",
        epilog="""\
examples:
  python train.py --data photos/ --size 64 --cond
  python train.py --loss sa --schedule ddpm --K 3
  torchrun --nproc-per-node 8 train.py --preset cifar10-edm-vp""")
    p.add_argument("--preset", choices=PRESETS, metavar="NAME", help="mnist or a paper's run, one "
                   f"of {', '.join(PRESETS)}; options beside it override its own")
    p.add_argument("--resume", nargs="?", const="newest", metavar="RUN", help="go on with RUN, or "
                   "with the newest run")
    for name, field in CHOSEN.items():
        text = field.metadata["help"]
        if "(default" not in text:
            text += f" (default: {default_text(field)})"
        how = dict(type=numbers if field.type is tuple else field.type,
                   metavar={int: "N", float: "X", tuple: "N,.."}.get(field.type),
                   choices=field.metadata["choices"])
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        p.add_argument(word(name), dest=name, help=text.replace("%", "%%"), **how)
    return p


def command(argv=None):
    """Reads the command line, and trains."""
    start_ranks()
    given = vars(agree(partial(parser().parse_args, argv)))
    preset, again = given.pop("preset", None), given.pop("resume", None)
    if again is not None:
        if preset:
            raise BadInput("--resume: a run goes on with its own options; leave out --preset")
        folder = from_first(newest_run) if again == "newest" else again
        run(agree(partial(resumed, folder, given)), folder)
        return
    chosen = PRESETS.get(preset, {}) | given
    if preset and "data" not in chosen:
        raise BadInput(f"--preset {preset} needs your --data; name a folder or a .zip")
    run(Options(**chosen))


def main(argv=None):
    cure = ("give --micro-batch a smaller number than the samples of each rank, or choose a "
            "smaller --size, --width or --ref-batch")
    try:
        return evaluate.status("train.py", partial(command, argv), cure)
    finally:
        if dist.is_initialized():                  # a rank that leaves without it may abort
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    if "RANK" in os.environ:        # DDP leaves gloo's threads, which abort if Python ends first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
