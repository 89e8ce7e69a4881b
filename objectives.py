"""objectives.py: one training step, as the options of a run ask for it.

    (seed, step) -> indices, sigma, noise -> losses (B,) -> gradient over all ranks -> AdamW, EMA

The batch is a pure function of (seed, step): no loader, no worker, no state to save.
"""

import contextlib
import ctypes
import time
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import runs
from datasets import BadInput, gather_rows, load_rows, training_rows
from losses import (RunningBeta, antithetic_loss, augment, augment_labels, augmented_stf_target,
                    draw_augmentation, dsm_loss, head_loss, interpolate, mean_correction,
                    measure_gamma, path_noise, sa_loss, sa_tau, stf_atoms, stf_loss, stf_target,
                    stf_taylor_terms, taylor_terms)
from runs import ranks, total


# ---- Batches -------------------------------------------------------------------------------------

def generator(seed, step, stream, device="cpu"):
    """A generator that is a function of its arguments.

    torch's CPU generator keeps 32 bits of its seed: (seed << 32) + step would forget the seed.
    """
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + 4 * step + stream) % 2 ** 32)


def draw_batch(pixels, labels, options, schedule, step):
    """The batch of a step: a dict of what the objective needs.

    reference (n, ...), uint8 if images, are rows without repetition (but where the batch exceeds
    the data), the B sources of x0 among them, as likely to be any: that keeps STF unbiased.
    x0 (B, ...) are the sources in [-1, 1], augmented by a (B, 8) if asked for.
    """
    B, device, K = options["batch"], options["device"], options["K"]
    n = options["ref-batch"] if "stf" in options["loss"] else B
    rows, g = training_rows(len(pixels), options["holdout"]), generator(options["seed"], step, 0)
    N = len(rows)
    rows = rows[torch.randperm(N, generator=g)[:n] if n <= N else
                torch.randint(N, (n,), generator=g)]                              # (n,)
    u = torch.rand(B, generator=g, dtype=torch.float64).clamp_min(2.0 ** -53)
    flip = torch.rand(n, generator=g) < 0.5 if options["xflip"] else None
    if options["sigma-draw"] == "stratified":
        u = (torch.arange(B) + u) / B
    elif options["sigma-draw"] == "antithetic":
        u = torch.cat([u[:(B + 1) // 2], 1 - u[:B // 2]])
    sigma = schedule.training_sigma(u)                                            # (B,)

    classes = labels if options["cond"] else None
    own = None if classes is None else classes[rows[:B]].to(device)               # (B,)
    source = load_rows(pixels, rows[:B], None if flip is None else flip[:B], device)  # (B, ...)
    if n == N == len(pixels) and flip is None:           # the whole set: as it lies, without a copy
        reference = pixels.to(device)
    else:
        reference = gather_rows(pixels, rows, flip, device)                       # (n, ...)
        classes = None if classes is None else classes[rows]
    batch = dict(reference=reference, source=source, x0=source, labels=own, a=None,
                 reference_labels=None if classes is None else classes.to(device),
                 uniform=torch.rand(B, generator=g).to(device))
    if options["augment"]:
        g = generator(options["seed"], step, 2)
        batch["a"] = draw_augmentation(B, options["augment"], g).to(device)       # (B, 8)
        batch["x0"] = augment(batch["x0"], batch["a"])
    if options["loss"] == "stf-taylor":
        batch["low"] = sigma < options["switch-sigma"]       # on the host, which has to choose
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
    ones, batch["sigma"] = [1] * (source.ndim - 1), sigma                         # (B, 1, ..., 1)
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
    """The batch of these samples alone, a slice or indices, with the same reference."""
    shared, rank = ("reference", "reference_labels"), batch["x0"].ndim
    return {name: value if value is None or name in shared else
            value[:, rows] if value.ndim > rank else value[rows]     # sa: (K, B, ...)
            for name, value in batch.items()}


# ---- Objectives ----------------------------------------------------------------------------------

def objective(options, denoiser, batch, tools):
    """The loss of each sample, (B,), by --loss."""
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
        low, batch = batch["low"], {k: v for k, v in batch.items() if k != "low"}
        groups = [(name, on.nonzero().flatten().to(options["device"]))
                  for name, on in (("taylor", low), ("stf", ~low)) if on.any()]
        loss = torch.cat([objective(options | {"loss": name}, denoiser, part(batch, rows), tools)
                          for name, rows in groups])
        return loss[torch.cat([rows for _, rows in groups]).argsort()]
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
    small = part(batch, slice(m))
    torch.manual_seed(g.initial_seed())                  # dropout: one mask on every rank
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
        if stable and options["mean-correction"] and
        options["ref-batch"] < len(training_rows(len(pixels), options["holdout"])) else None)


def build_correction(pixels, labels, options):
    """correction(batch) -> (B, ...): mean_correction, with what it needs to know of the data.

    Once a run: the data's sums by class, and gamma from a reference of the run's size.
    """
    device, n = options["device"], options["ref-batch"]
    training = training_rows(len(pixels), options["holdout"])
    key = labels + 1 if options["cond"] else torch.zeros(len(pixels), dtype=torch.int64)  # 0: none
    mirror = (lambda x: (x + x.flip(-1)) / 2) if options["xflip"] else (lambda x: x)
    load = lambda rows: mirror(load_rows(pixels, rows, None, device))
    count = torch.bincount(key[training]).to(device).view(-1, *[1] * (pixels.ndim - 1))
    total = torch.zeros(len(count), *pixels.shape[1:], dtype=torch.float64, device=device)
    for rows in training.split(4096):
        total.index_add_(0, key[rows].to(device), load(rows).double())

    m = min(128, n)
    g = generator(options["seed"], 0, 3)
    rows = training[torch.randperm(len(training), generator=g)[:n]]
    reference = gather_rows(pixels, rows, None, device)                           # (n, ...)
    x0, classes = load_rows(pixels, rows[:m], None, device), ()
    if options["cond"]:
        classes = labels[rows[:m]].to(device), labels[rows].to(device)
    noise = torch.randn(x0.shape, generator=g).to(device)
    levels = torch.logspace(-2, 2, 17).to(device)
    gamma = interpolate(levels, measure_gamma(x0, noise, levels, reference, *classes))

    def correction(batch):
        k = 0 if batch["labels"] is None else batch["labels"] + 1
        mu = (total[k] - mirror(batch["source"])) / (count[k] - 1).clamp(min=1)
        return mean_correction(batch["source"], batch["sigma"], batch["reference"],
                               mu.to(batch["source"]), gamma, batch["labels"],
                               batch["reference_labels"])
    return correction


# ---- Gradient and update -------------------------------------------------------------------------

def backward(options, denoiser, batch, tools, scaler, step):
    """Leaves the gradient of the batch's mean loss in .grad; returns the loss of each sample, (B,).

    Each rank takes its share of the batch, `micro-batch` samples at a time: the sum over all is the
    gradient, whatever the number of either.  One all-reduce of everything comes after the backward
    pass: DDP would overlap the two, but its hooks know neither vmap nor second derivatives.
    """
    (rank, world), B = ranks(), options["batch"]
    share = range(B * rank // world, B * (rank + 1) // world)
    losses = torch.zeros(B, device=options["device"])
    for i in share[::options["micro-batch"] or B]:
        rows = slice(i, min(i + (options["micro-batch"] or B), share.stop))
        torch.manual_seed(generator(options["seed"] + i, step, 3).initial_seed())      # dropout's
        loss = objective(options, denoiser, part(batch, rows), tools)
        scaler.scale(loss.sum() / B).backward()
        losses[rows] = loss.detach()
    if world > 1:
        flat = [losses, *(p.grad for p in denoiser.parameters() if p.grad is not None)]
        everything = total(torch.cat([x.flatten() for x in flat]))
        for x, summed in zip(flat, everything.split([x.numel() for x in flat])):
            x.copy_(summed.view_as(x))
    return losses


def update(options, optimizer, scaler, parameters, step, loss):
    """One step of AdamW, clipped; none, where the loss or the gradient is not finite.

    The optimizer itself reads found_inf, on the device: the host does not wait.  Returns the norm.
    """
    optimizer.param_groups[0]["lr"] = learning_rate(options, step)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, options["clip"])
    optimizer.found_inf = (~(norm.isfinite() & loss.isfinite().all())).float()
    scaler.step(optimizer)                                # fp16's scaler puts its own found_inf
    scaler.update()
    optimizer.zero_grad()
    return norm


def learning_rate(options, step):
    """Linear warm-up over `warmup` steps; linear fall to 0 over the last share `decay` of all."""
    rise = min(1, (step + 1) / max(options["warmup"], 1))
    left = (options["steps"] - step) / max(options["decay"] * options["steps"], 1)
    return options["lr"] * rise * min(1, left)


def arrange_memory(denoiser, loss):
    """The order of images in memory, and what becomes of freed memory, as they are fastest.

    channels_last, as convolutions like it, but for losses whose vmap cannot have it.  And glibc
    keeps what is freed for the next layer: it would give large tensors back to the system, which
    clears each page before it lends it again, a tenth of DDPM++'s step on a CPU.  mallopt's -4 is
    M_MMAP_MAX, -1 M_TRIM_THRESHOLD; other systems have no mallopt, and go without.
    """
    if loss in ("dsm", "stf"):
        denoiser.to(memory_format=torch.channels_last)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)


def cost(options, data, equal):
    """What a step takes: `equal` = calls of the network, time in seconds (of five), or steps: 1."""
    if equal == "steps":
        return 1
    if equal == "calls":
        if options["order"]:
            raise BadInput("--compare: orders 1 and 2 cost more than calls; give --equal time")
        sigma = runs.build_schedule(options).training_sigma((torch.arange(1000) + 0.5) / 1000)
        low = (sigma < options["switch-sigma"]).double().mean().item()
        both = options["atoms"] if options["control"] == "atoms" else low
        calls = {"antithetic": 2, "sa": options["K"], "taylor": 2, "stf-taylor": 1 + both}
        return options["batch"] * calls.get(options["loss"], 1)
    pixels, labels = runs.on_device(data, options["device"])
    denoiser, schedule = runs.build_denoiser(options), runs.build_schedule(options)
    arrange_memory(denoiser.to(options["device"]), options["loss"])
    tools, scaler = build_tools(pixels, labels, options), torch.amp.GradScaler(enabled=False)
    times = []
    for step in range(6):                                             # the first step is warm-up
        batch = draw_batch(pixels, labels, options, schedule, step)
        backward(options, denoiser, batch, tools, scaler, step).tolist()
        times.append(time.time())
    return times[-1] - times[0]


def memory(options, denoiser, data):
    """Bytes, by what they are for, and their sum; the network's activations are not among them."""
    weights = 4 * sum(p.numel() for p in denoiser.parameters())
    B, n, row = options["batch"] // ranks()[1], options["ref-batch"], data.x[0].nbytes
    sizes = {"weights and gradients": 2 * weights, "AdamW's two moments": 2 * weights,
             "weight averages": weights * len(options["ema"].split(",")), "the data": data.x.nbytes}
    if "stf" in options["loss"]:                          # rows in their own type, 512 as float64
        sizes["STF: reference and weights"] = n * row + 16 * B * n + 512 * 12 * data.x[0].size
    return sizes | {"sum, without activations": sum(sizes.values())}
