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
import json
import os
import re
import sys
import time
from functools import partial

import numpy as np
import torch

import evaluate
from evaluate import BadInput, number
from losses import WEIGHTS, dsm_loss, stf_loss, stf_target
from networks import UNETS
from schedules import SCHEDULES


# ---- Options -------------------------------------------------------------------------------------

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


COUNT, INDEX, SHARE = number(int, 1), number(int, 0), number(float, 0, 1)

OPTIONS = {   # name: (type or choices, default or defaults for (digits, points, images), help)
    "data": (str, "digits", "digits, two-gaussians, two-gaussians-64d, checkerboard, swiss-roll, "
             "cifar10, mnist, or a path: folder of images (sub-folder = class), .zip, .npz, .npy"),
    "data-dir": (str, "data", "where downloads and caches lie"),
    "size": (COUNT, None, "centre-crop and resize the images to SIZE x SIZE"),
    "cond": (bool, (True, False, False), "class-conditional"),
    "xflip": (bool, False, "mirror each image with probability 1/2"),
    "loss": (["stf", "dsm"], "stf", "objective"),
    "ref-batch": (COUNT, (2048, 1024, 4096), "size n of STF's reference, the batch included"),
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
    "steps": (COUNT, (700, 3000, 100_000), "training steps"),
    "batch": (COUNT, (16, 256, 128), "images per step"),
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


def parser():
    p = evaluate.Parser(prog="train.py", description="Train a diffusion model.  Without options: "
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
    options["device"] = evaluate.pick_device(options["device"])
    options["ref-batch"] = max(min(options["ref-batch"], len(data.x)), options["batch"])
    options["shape"] = list(data.x.shape[1:])
    options["classes"] = data.classes if options["cond"] else []
    options["fingerprint"] = data.fingerprint
    for bad, sentence in [
        (options["cond"] and data.labels is None, f"--cond: {data.name} has no labels"),
        ((options["arch"] == "mlp") != (kind == 1), "--arch mlp is for points, and only that is; "
         f"{data.name} has shape {tuple(options['shape'])}"),
        (options["xflip"] and kind == 1, "--xflip: points cannot be mirrored"),
        (options["label-dropout"] and not options["cond"], "--label-dropout needs --cond"),
    ]:
        if bad:
            raise BadInput(sentence)
    return options


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
    return options | {"device": evaluate.pick_device(options["device"])}


# ---- Batches -------------------------------------------------------------------------------------

def generator(seed, step, stream, device="cpu"):
    """A generator that is a function of its arguments.

    torch's CPU generator keeps 32 bits of its seed: (seed << 32) + step would forget the seed.
    """
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + 2 * step + stream) % 2 ** 32)


def load_rows(pixels, rows, flip, device):
    """uint8 rows (n, C, H, W) -> float32 in [-1, 1], mirrored where flip (n,); points as is."""
    x = pixels[rows.to(pixels.device)].to(device)
    if x.dtype != torch.uint8:
        return x
    x = x.float() / 127.5 - 1
    return x if flip is None else torch.where(flip.to(device)[:, None, None, None], x.flip(-1), x)


def draw_batch(pixels, labels, options, schedule, step):
    """The batch of a step: x0, noise, sigma, and the reference, whose first rows are x0.

    Rows are drawn without repetition; so --ref-batch N is the whole set, and each x0 is as likely
    to be any row of its reference, which keeps STF unbiased.
    """
    B, n, N, device = options["batch"], options["ref-batch"], len(pixels), options["device"]
    n = n if options["loss"] == "stf" else B
    g = generator(options["seed"], step, 0)
    rows = torch.randperm(N, generator=g)[:n] if n <= N else torch.randint(N, (n,), generator=g)
    flip = torch.rand(n, generator=g) < 0.5 if options["xflip"] else None
    u = torch.rand(B, generator=g, dtype=torch.float64).clamp_min(2.0 ** -53)
    reference = load_rows(pixels, rows, flip, device)                             # (n, ...)
    x0 = reference[:B]                                                            # (B, ...)
    g = generator(options["seed"], step, 1, device)
    noise = torch.randn(x0.shape, generator=g, device=device)                     # (B, ...)
    sigma = schedule.training_sigma(u).to(noise).view(-1, *[1] * (x0.ndim - 1))   # (B, 1, ..., 1)
    return x0, noise, sigma, reference, labels[rows].to(device) if options["cond"] else None


# ---- Training ------------------------------------------------------------------------------------

def train(options, data, run, state, denoiser, ema):
    """Steps state["step"] ... options["steps"]; log, grids, checkpoints go to the run's folder."""
    device, B = options["device"], options["batch"]
    schedule, weight = evaluate.build_schedule(options), loss_weight(options)
    pixels, labels = torch.from_numpy(np.asarray(data.x)), data.labels
    labels = None if labels is None else torch.from_numpy(labels)
    if device.startswith("cuda") and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        pixels = pixels.to(device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, options["beta2"]), fused=True,
                                  weight_decay=options["weight-decay"])
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    log = Log(run, state["step"], options)

    denoiser.train()
    for step in range(state["step"], options["steps"]):
        torch.manual_seed(options["seed"] + step)       # dropout, too, is a function of the step
        x0, noise, sigma, reference, label = draw_batch(pixels, labels, options, schedule, step)
        denoise = partial(denoiser, labels=None if label is None else label[:B])
        if options["loss"] == "dsm":
            loss = dsm_loss(denoise, x0, noise, sigma, weight)                    # (B,)
        elif options["loss"] == "stf":
            loss = stf_loss(denoise, x0, noise, sigma, weight, reference,
                            None if label is None else label[:B], label)          # (B,)

        optimizer.param_groups[0]["lr"] = learning_rate(options, step)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(denoiser.parameters(), options["clip"])
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, denoiser, options, (step + 1) * B)

        log.step(step + 1, loss.mean(), norm)
        last = step + 1 == options["steps"]
        if last or (step + 1) % options["checkpoint-every"] == 0:
            log.flush()
            save_checkpoint(run, step + 1, denoiser, ema, optimizer, options)
        if last or (options["sample-every"] and (step + 1) % options["sample-every"] == 0):
            log.flush()
            save_samples(run, step + 1, denoiser, ema, options, data)
            denoiser.train()
    log.close()


def loss_weight(options):
    """lambda(sigma), the weight on |D - x0|^2: the schedule row's own, or the named one.

    Normalised: E[lambda sigma^2] = 1 under p_train(sigma), so that weights differ in shape alone;
    the mean is taken over a million quantiles.
    """
    schedule = evaluate.build_schedule(options)
    weight = schedule.weight if options["weight"] == "schedule" else WEIGHTS[options["weight"]]
    if not options["normalize-weight"]:
        return weight
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    sigma = schedule.training_sigma(u)
    mean = (weight(sigma) * sigma ** 2).mean().item()
    return lambda sigma: weight(sigma) / mean


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


def save_checkpoint(run, step, denoiser, ema, optimizer, options):
    """Plain tensors and JSON-able options, whole or not at all; the two newest are kept."""
    state = dict(step=step, options=options, model=denoiser.state_dict(), ema=ema.state_dict(),
                 optimizer=optimizer.state_dict())
    path = os.path.join(run, f"checkpoint-{step:07d}.pt")
    with open(path + ".part", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)
    for old in evaluate.checkpoints(run)[:-2]:
        os.remove(old)


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
        x = evaluate.generate(model.eval(), range(count), options["shape"], "heun",
                              evaluate.build_schedule(options), options["sample-steps"], labels,
                              batch=count if points else 64, device=options["device"])
        panels.append((f"step {step}, {name}", evaluate.to_uint8(x)))
    evaluate.save_pictures(os.path.join(run, f"samples-{step:07d}.png"), panels, names)


class Log:
    """log.jsonl, a line per step, and one status line on the terminal, at most once a second.

    Losses wait on the device until then: reading one out makes the host wait for the GPU.
    """

    def __init__(self, run, step, options):
        self.path, self.options, self.waiting = os.path.join(run, "log.jsonl"), options, []
        self.start = self.last = time.time()
        self.first, self.mean = step, None
        lines = open(self.path).read().splitlines() if os.path.exists(self.path) else []
        with open(self.path, "w") as f:         # what a killed run logged past its checkpoint goes
            f.writelines(line + "\n" for line in lines
                         if line.endswith("}") and json.loads(line)["step"] <= step)

    def step(self, step, loss, norm):
        self.waiting.append((step, loss.detach(), norm))
        if time.time() - self.last > (1 if sys.stdout.isatty() else 15):
            self.flush()

    def flush(self):
        if not self.waiting:
            return
        values = torch.stack([torch.stack([l, n]) for _, l, n in self.waiting]).tolist()
        with open(self.path, "a") as f:
            for (step, _, _), (loss, norm) in zip(self.waiting, values):
                f.write(json.dumps(dict(step=step, loss=loss, grad_norm=norm)) + "\n")
                self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
        step, self.waiting, self.last = self.waiting[-1][0], [], time.time()
        if not np.isfinite(self.mean):
            raise BadInput(f"the loss is not finite at step {step}; try a smaller --lr, then "
                           "--resume goes on from the last checkpoint")
        pace = (self.last - self.start) / (step - self.first)
        left = int(pace * (self.options["steps"] - step))
        evaluate.status(f"step {step}/{self.options['steps']}  loss {self.mean:.4f}  "
                        f"{self.options['batch'] / pace:.0f} images/s  "
                        f"{left // 60}:{left % 60:02d} left")

    def close(self):
        self.flush()
        evaluate.status(None)


# ---- Report --------------------------------------------------------------------------------------

@torch.no_grad()
def noise_table(options, data, ema, count=128):
    """Rows (sigma, DSM loss, STF loss): the same `count` images and noise at each noise level.

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
        target = stf_target(x, sigma, reference, mine, label)
        weight = lam(sigma)
        table.append((level, (weight * (D - x0) ** 2).mean().item(),
                      (weight * (D - target) ** 2).mean().item()))
    return table


def report(options, data, run, ema, seconds, count=128):
    """What a person wants to know at the end, on the terminal and as the log's last line."""
    table = noise_table(options, data, ema.eval())
    count = min(count, len(data.x) // 2)
    labels = torch.arange(count) % len(options["classes"]) if options["cond"] else None
    fake = evaluate.generate(ema, range(count), options["shape"], "heun",
                             evaluate.build_schedule(options), options["sample-steps"], labels,
                             device=options["device"])
    g = torch.Generator().manual_seed(options["seed"])
    rows = torch.randperm(len(data.x), generator=g)[:10_000].split(500)
    pixels = torch.from_numpy(data.x)
    real = np.concatenate([evaluate.pixel_features(load_rows(pixels, r, None, "cpu"))
                           for r in rows])
    reference = evaluate.moments(real[count:])
    distance, floor = (evaluate.frechet_distance(*evaluate.moments(features), *reference)
                       for features in (evaluate.pixel_features(fake), real[:count]))
    print(f"\n{options['steps']} steps in {seconds / 60:.1f} minutes\n\n"
          "   sigma   DSM loss   STF loss   target noise in DSM (chance no network can learn)")
    for sigma, dsm, stf in table:
        print(f"{sigma:8g} {dsm:10.4f} {stf:10.4f} {1 - stf / dsm:12.0%}")
    space = "pixel space" if data.x.ndim == 4 else "the points' space"
    print(f"\nFrechet distance in {space}, {count} samples (averaged weights, Heun, NFE "
          f"{2 * options['sample-steps'] - 1}): {distance:.3f}\n"
          f"{'the floor, ' + str(count) + ' real images instead':>40}: {floor:.3f}\n")
    with open(os.path.join(run, "log.jsonl"), "a") as f:
        f.write(json.dumps(dict(step=options["steps"], frechet_pixels=distance, floor=floor,
                                count=count, loss_by_sigma=table)) + "\n")


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
        run = evaluate.newest_run("runs") if again == "newest" else again
        stored = evaluate.read_options(run, [*OPTIONS, "shape", "classes", "fingerprint"])
    data = evaluate.load_data(*(given[name] or stored.get(name, OPTIONS[name][1])
                                for name in ("data", "data-dir", "size")))
    options = resume(given, stored, data, run) if again else resolve(given, data)
    torch.manual_seed(options["seed"])
    denoiser = evaluate.build_denoiser(options).to(options["device"])
    size = sum(p.numel() for p in denoiser.parameters())
    print(f"data      {data.source}\nnetwork   {options['arch']}, {size / 1e6:.2f} M parameters\n"
          f"loss      {options['loss']}, schedule {options['schedule']}, {options['steps']} steps "
          f"of {options['batch']}, on {options['device']}")
    if dry:
        print("\n".join(f"  {name:18}{value}" for name, value in sorted(options.items())))
        return 0

    ema, state = copy.deepcopy(denoiser).requires_grad_(False), dict(step=0, optimizer=None)
    if again and evaluate.checkpoints(run):
        state = evaluate.load_checkpoint(run, options["device"])
        evaluate.load_weights(denoiser, state, "model", run)
        evaluate.load_weights(ema, state, "ema", run)
    elif not again:
        run = evaluate.new_run(options["out"], f"{data.name}-{options['loss']}")
    if state["step"] >= options["steps"]:
        raise BadInput(f"{run} has its {state['step']} steps; give --steps a larger number")
    evaluate.write_json(os.path.join(run, "options.json"), options)
    print(f"run       {run}" + (f", from step {state['step']}" if again else ""), flush=True)
    start = time.time()
    train(options, data, run, state, denoiser, ema)
    report(options, data, run, ema, time.time() - start)
    print(f"samples     {run}/samples-{options['steps']:07d}.png\nlog         {run}/log.jsonl\n"
          f"checkpoint  {evaluate.checkpoints(run)[-1]}\n"
          f"next        python evaluate.py sample {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
