"""evaluate.py: how good it is.  Draws samples of runs, measures losses and distances.

    python evaluate.py sample RUN --sampler heun --steps 18 --num 64
    python evaluate.py fid RUN|IMAGES       FID, KID and IS, beside those of real images
    python evaluate.py nfe RUN              each sampler's distance to the data, over NFE
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gradients
import papers
from datasets import BadInput, attempt, download, load_data, load_rows, progress
from losses import stf_target, stf_weights
from networks import Inception
from papers import draw, save_csv
from runs import (CHOICES, SAMPLERS, VARIANCES, Parser, analytic_moments, build_schedule, even,
                  generate, load_run, loss_weight, number, pick_device, ranks, run_data,
                  save_pictures, to_uint8, total)
from schedules import SCHEDULES


# ---- Features ------------------------------------------------------------------------------------

SHA256 = "6726825d"                          # of the published Inception, its first digits
INCEPTION = f"pt_inception-2015-12-05-{SHA256}.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION
KEPT = 10_000                                # features that KID is of: 160 MB of Inception's


def pixel_features(x, side=16):
    """Images (n, C, H, W) averaged down to at most side x side, or points: float64 (n, d)."""
    if x.ndim == 4 and x.shape[-1] > side:
        x = torch.nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1).double()


def extractor(kind, shape, path=None, data_dir="data", device="cpu"):
    """(name, extract) of "pixels" or "inception", whose name has its weights' sha256 in it.

    extract: images (n, *shape) uint8, or points -> features (n, d) float64 and the probabilities of
    classes (n, 1008), or None, on the CPU.  path: Inception's file; none: downloaded.
    """
    if kind == "inception" and len(shape) == 1:
        raise BadInput("Inception's features are of images; choose pixels for points")
    if kind == "pixels":
        return kind, lambda x: (pixel_features(load_rows(x, torch.arange(len(x)), None, "cpu")),
                                None)
    path = Path(path or download([INCEPTION_URL], Path(data_dir, INCEPTION), SHA256, "sha256"))
    network = Inception()
    try:
        network.load_state_dict(attempt(path, "", torch.load, path, "cpu", weights_only=True))
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is not Inception's weights, or not whole "
                       f"({type(error).__name__}); put there {INCEPTION_URL}") from error
    network.to(device)

    def extract(x):
        flags = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [flag.allow_tf32 for flag in flags]
        flags[0].allow_tf32 = flags[1].allow_tf32 = False              # it keeps 3 digits of 7
        pool3, logits = network(x.to(device).expand(-1, 3, -1, -1))    # gray: three times the same
        flags[0].allow_tf32, flags[1].allow_tf32 = before
        return pool3.cpu().double(), logits.softmax(1).cpu()
    return f"inception {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}", extract


@dataclass
class Sums:
    """n, sum x and sum x x^T of features x (d,): () and (d,) and (d, d), float64.  They add."""
    n: torch.Tensor = 0
    x: torch.Tensor = 0
    xx: torch.Tensor = 0

    def __add__(self, other):
        return Sums(self.n + other.n, self.x + other.x, self.xx + other.xx)

    def moments(self):
        """Mean (d,) and covariance (d, d), divided by n - 1, as arrays."""
        mean = self.x / self.n
        return mean.numpy(), ((self.xx - self.n * mean.outer(mean)) / (self.n - 1)).numpy()


@torch.no_grad()
def measure(batches, extract, count=0):
    """Batches -> Sums of the features of all, the first KEPT features, all class probabilities.

    Every rank brings its own batches, and gets the Sums over all ranks; the rest is its own.
    count: of the rows, to show progress.
    """
    sums, kept, classes, done = Sums(), [], [], 0
    for x in batches:
        features, p = extract(x)
        sums += Sums(torch.tensor(float(len(x))).double(), features.sum(0), features.T @ features)
        kept.append(features[:max(0, KEPT - done)])
        classes.append(p)
        done += len(x)
        if count:
            progress("measuring", done, count)
    if not sums.xx.isfinite().all():
        raise FloatingPointError("the features are not finite: damaged weights, or samples")
    sums = Sums(*(total(value) for value in (sums.n, sums.x, sums.xx)))
    return sums, torch.cat(kept), None if p is None else torch.cat(classes)


# ---- Distances -----------------------------------------------------------------------------------

def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians: FID, where the features are Inception's.

        |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2})

    With any A A^T = C1, (C1 C2)^{1/2} has the trace of (A^T C2 A)^{1/2}, and that is a symmetric
    problem: no general matrix root, no complex numbers, singular C1, C2 allowed.
    mean (d,), cov (d, d) float64 -> float, in the features' squared units.
    """
    C1, C2 = torch.as_tensor(cov1), torch.as_tensor(cov2)
    A, singular = torch.linalg.cholesky_ex(C1)                  # a tenth of an eigendecomposition
    if singular:
        values, Q = torch.linalg.eigh(C1)
        A = Q * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(A.T @ C2 @ A).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2) ** 2).sum() + C1.trace() + C2.trace() - 2 * root)


def distance_name(features, n):
    """Of n samples' Frechet distance: it falls with n, so only that of 50,000 is a FID, and others
    are fid_500, fid_2k, frechet_pixels_2k, .."""
    kind = "fid" if features.startswith("inception") else f"frechet_{features}"
    if kind == "fid" and n >= 50_000:
        return "FID"
    return f"{kind}_{n // 1000}k" if n % 1000 == 0 else f"{kind}_{n}"


def polynomial_mmd(x, y):
    """Squared maximum mean discrepancy of rows x (n, d) and y (m, d), without bias; float.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
        k(a, b) = (a.b/d + 1)^3
    """
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return (within - 2 * xy.mean()).item()


def kernel_distance(x, y, seed=0, subsets=100, most=1000):
    """KID (Binkowski et al. 2018): polynomial_mmd of random subsets, mean and sd, and their size.

    The size is at most half of either, so that subsets differ.  Its mean does not depend on n.
    """
    g = torch.Generator().manual_seed(seed)
    size = max(2, min(most, len(x) // 2, len(y) // 2))
    values = [polynomial_mmd(*(z[torch.randperm(len(z), generator=g)[:size]] for z in (x, y)))
              for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values)), f"{subsets} subsets of {size}"


def inception_score(p, splits=10):
    """exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016) of p(y|x) (n, classes), by consecutive
    splits: mean and sd, and their size.  From 1 to the number of classes; more is better."""
    parts = p.tensor_split(min(splits, len(p)))
    values = [(torch.xlogy(q, q) - torch.xlogy(q, q.mean(0))).sum(1).mean().exp().item()
              for q in (part.double() for part in parts)]
    return float(np.mean(values)), float(np.std(values)), f"{len(parts)} splits of {len(parts[-1])}"


# ---- Samples against data ------------------------------------------------------------------------

def real_statistics(data, num, features, seed=0, most=None, batch=64):
    """Of `most` random rows of the data (none: all): what samples are compared with.

    features: an extractor's name and function -> a dict, as in --save-stats: mean, cov, n, of what
    they are, and, where there are 2 num rows, the floor, num of them against the others.  Also
    what `measure` gave for these parts.  Each rank takes its share.
    """
    rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[:most]
    rank, world = ranks()

    def part(rows):
        mine = rows[rank::world]
        return measure(rows_of(data, mine, batch), features[1], len(mine))
    parts = [part(rows[:num]), part(rows[num:])] if 2 * num <= len(rows) else [part(rows)]
    mean, cov = sum((sums for sums, *_ in parts), Sums()).moments()
    floor = frechet_distance(*(m for part in parts for m in part[0].moments())) if parts[1:] \
        else np.nan
    return dict(mean=mean, cov=cov, n=len(rows), data=data.name, fingerprint=data.fingerprint,
                shape=list(data.x.shape[1:]), features=features[0],
                floor=floor, floor_n=num if parts[1:] else 0), parts


def rows_of(data, rows, batch):
    """Batches of these rows of the data, as they are."""
    return (torch.from_numpy(data.x[some.numpy()]) for some in rows.split(batch))


def drawn(denoise, seeds, shape, sampler, schedule, steps, labels=None, batch=64, *rest, **choices):
    """The samples of runs.generate in batches, images as uint8."""
    for i in range(0, len(seeds), batch):
        own = None if labels is None else labels[i:i + batch]
        yield torch.from_numpy(to_uint8(generate(denoise, seeds[i:i + batch], shape, sampler,
                                                 schedule, steps, own, batch, *rest, **choices)))


def in_turn(seeds, options):
    """Labels for sample after sample, each class as often as the others; None without classes."""
    return torch.as_tensor(seeds) % len(options["classes"]) if options["classes"] else None


def run_distance(denoise, options, num, features, real):
    """(name, Frechet distance, floor) of num samples, drawn as a run's grids are; features and
    real: as of extractor and real_statistics.  Each rank draws its share."""
    rank, world = ranks()
    seeds = range(num)[rank::world]
    batches = drawn(denoise, seeds, options["shape"], "heun", build_schedule(options),
                    options["sample-steps"], in_turn(seeds, options), device=options["device"])
    sums, *_ = measure(batches, features[1])
    distance = frechet_distance(*sums.moments(), real["mean"], real["cov"])
    return distance_name(features[0], num), distance, real["floor"]


def real_ones(options, data):
    """What run_distance compares with, as --fid-* say: count, features, the data's statistics."""
    features = extractor(options["fid-features"], options["shape"], options["inception"],
                         options["data-dir"], options["device"])
    num = options["fid-num"]
    return num, features, real_statistics(data, num, features, most=50_000)[0]


# ---- Report --------------------------------------------------------------------------------------

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)     # sigma, of the tables


@torch.no_grad()
def denoising_error(denoise, x0, labels=None, levels=LEVELS, batch=None):
    """E |D(x0 + sigma eps; sigma) - x0|^2/d at each noise level, each rank taking its share of x0.

    The noise is the same whoever asks, and the weight 1: so it compares runs of any objective.
    batch: by default 64 images or 4096 points.
    """
    (rank, world), N, batch = ranks(), len(x0), batch or (64 if x0.ndim > 2 else 4096)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    error = torch.zeros(len(levels), dtype=torch.float64, device=x0.device)
    for i in range(N * rank // world, N * (rank + 1) // world, batch):
        rows = slice(i, min(i + batch, N * (rank + 1) // world))
        own = () if labels is None else (labels[rows],)
        for k, sigma in enumerate(levels):
            D = denoise(x0[rows] + sigma * noise[rows], torch.tensor(sigma), *own)
            error[k] += ((D - x0[rows]).double() ** 2).sum()
    return (total(error) / x0.numel()).tolist()


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
    for level in LEVELS:
        sigma = torch.full((len(x0), *[1] * (x0.ndim - 1)), level, device=device)
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
    """What a person wants to know at the end, on the terminal, as a picture, and in the log.

    Every rank draws its share of the samples; the first one tells.
    """
    count, features = min(count, len(data.x) // 2), extractor("pixels", options["shape"])
    real, _ = real_statistics(data, count, features, options["seed"], most=10_000)
    _, distance, floor = run_distance(ema.eval(), options, count, features, real)
    if ranks()[0] > 0:
        return
    table, classes = noise_table(options, data, ema), options["cond"]
    print(f"{options['steps']} steps in {seconds / 60:.1f} minutes\n\n"
          "   sigma   DSM loss   STF loss   sources averaged   chance in DSM's loss,\n"
          f"{'':33}by STF (ESS){'*' * classes:7}which no network can learn")
    for sigma, dsm, stf, size in table:
        chance = 1 - stf / dsm
        print(f"{sigma:8g} {dsm:10.4f} {stf:10.4f} {size:15.1f} {chance:12.0%}   "
              + "#" * (chance > 0 and round(20 * chance)))
    if classes:
        print("* of the same class only")
    space = "pixel space" if data.x.ndim == 4 else "the points' space"
    print(f"\nFrechet distance in {space}, {count} samples (averaged weights, Heun, NFE "
          f"{2 * options['sample-steps'] - 1}): {distance:.4g}\n"
          f"{'the floor, ' + str(count) + ' real samples instead':>40}: {floor:.4g}\n"
          "both fall with the number of samples: compare the same number only\n")
    columns = ["sigma", "against x0 (DSM)", "against STF's target", "chance"]
    draw(f"{run}/where-stf-acts.png", columns, [
        [sigma, dsm, stf, 1 - stf / dsm] for sigma, dsm, stf, _ in table], [
        dict(y=columns[1:3], ylabel="weighted loss of one network"),
        dict(y=["chance"], ylabel="share of chance in DSM's loss", legend=False,
             yscale="linear", bottom=0)], f"{run}: where STF acts")
    with open(os.path.join(run, "log.jsonl"), "a") as f:
        f.write(json.dumps(dict(step=options["steps"], frechet_pixels=distance, floor=floor,
                                count=count, loss_by_sigma=table)) + "\n")


# ---- Samples of a run ----------------------------------------------------------------------------

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


class Counted:
    """A denoiser that counts the rows it is asked for: NFE = rows / samples."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x, sigma, *labels):
        return self.with_head(x, sigma, *labels)[0]

    def with_head(self, x, sigma, *labels):
        self.rows += len(x)
        return self.denoiser.with_head(x, sigma, *labels)


def open_run(args):
    """Of a run: sampled(num, sampler, steps, guide, labels, **choices), batches of samples; the
    denoiser it calls, which counts; the options; and a text that says which weights these are."""
    device = pick_device(args.device)
    denoiser, options, step = load_run(args.run, device, args.weights)
    schedule = SCHEDULES[args.schedule]() if args.schedule else build_schedule(options)
    for steps in np.atleast_1d(args.steps).tolist():
        attempt(f"--steps {steps}", "choose fewer", schedule.time_steps, steps)
    denoise, shape = Counted(denoiser), options["shape"]

    def sampled(num, sampler, steps, guide=1.0, labels=None, **choices):
        analytic, seeds = None, range(args.seed, args.seed + num)
        if choices.get("variance") == "analytic":
            analytic = analytic_moments(args.run, denoiser, options, step, args.weights, device)
        labels = in_turn(range(num), options) if labels is None else labels
        return drawn(denoise, seeds, shape, sampler, schedule, steps, labels,
                     args.batch if len(shape) > 1 else num, device, analytic, guide, **choices)
    what = f"{args.run} at step {step}" + ", averaged weights" * (args.weights == "ema")
    return sampled, denoise, options, what


def described(args, choices):
    """What was asked of a sampler, in a line: ddim, 24 steps, eta 0.5, seed 3."""
    how = args.sampler + ("" if args.sampler == "rk45" else f", {args.steps} steps")
    for name, value in [*choices.items(), ("schedule", args.schedule), ("class", args.label),
                        ("guidance", args.guidance if args.guidance != 1 else None),
                        ("seed", args.seed or None),
                        ("weights", args.weights if args.weights != "ema" else None)]:
        how += f", {name} {value}" if value is not None else ""
    return how


def sample(args):
    """evaluate.py sample: draws samples of a run and saves them."""
    sampled, denoise, options, what = open_run(args)
    classes, images = options["classes"], len(options["shape"]) > 1
    choices = choices_of(args, options)
    args.num = args.num or (64 if images else 4000)
    labels = in_turn(range(args.num), options)
    if args.label is not None:
        names = classes if args.label in classes else [str(k) for k in range(len(classes))]
        if args.label not in names:
            raise BadInput(f"--class {args.label}: " + (
                f"choose one of {', '.join(classes)}" if classes else
                "the run is not class-conditional; leave the option out"))
        labels = torch.full((args.num,), names.index(args.label))
    how = described(args, choices)
    name = how.replace(" steps", "").replace(", ", "-").replace(" ", "-")
    folder = os.path.dirname(args.run) if os.path.isfile(args.run) else args.run
    out = args.out or f"{folder}/{name}.png"
    check_output("--out", out, ".png", ".npz")
    start = time.time()
    x = torch.cat([*sampled(args.num, args.sampler, args.steps, args.guidance, labels,
                            **choices)]).numpy()
    if out.endswith(".npz"):
        save_arrays(out, images=x, **({} if labels is None else {"labels": labels.numpy()}))
    else:
        equal = args.label is None and classes and args.num % len(classes) == 0
        rows = classes if images and equal else ()
        x = x[np.argsort(labels.numpy(), kind="stable")] if rows else x       # a row for each class
        save_pictures(out, [(how, x)], rows)
    print(f"{args.num} samples of {what}, {how}, NFE {denoise.rows / args.num:g}, "
          f"{time.time() - start:.1f} s\n{out}")


def check_output(option, path, *endings):
    """BadInput where that file cannot be written: now, not after an hour's work."""
    if os.path.isdir(path) or not path.endswith(endings):
        raise BadInput(f"{option} {path} is not a file's name ending in {' or '.join(endings)}; "
                       "choose another")
    attempt(path, f"choose another {option}", lambda: open(f"{path}.part", "wb").close())
    os.remove(f"{path}.part")


def save_arrays(path, **arrays):
    with open(f"{path}.part", "wb") as file:
        np.savez(file, **arrays)
    os.replace(f"{path}.part", path)


# ---- Image quality -------------------------------------------------------------------------------

def fid(args):
    """evaluate.py fid: Frechet distance, KID and IS of samples, beside those of real images."""
    def scores(measured, mean, cov, others):            # (value, sd, sizes) of each, or None
        sums, kept, p = measured
        return [(frechet_distance(*sums.moments(), mean, cov),),
                None if others is None else kernel_distance(kept, others, args.seed),
                None if p is None else inception_score(p)]
    what, options, shape, num, batches = samples_of(args)
    kind = args.features or ("inception" if len(shape) > 1 else "pixels")
    features = extractor(kind, shape, args.inception, args.data_dir, pick_device(args.device))
    real, parts = reference(args, options, shape, num, features)
    found = measure(batches, features[1], num)
    kept = torch.cat([kept for _, kept, _ in parts])[:KEPT] if parts else None
    columns = [scores(found, real["mean"], real["cov"], kept)]
    if parts[1:]:
        columns.append(scores(parts[0], *parts[1][0].moments(), parts[1][1]))
    elif real["floor_n"] == num:
        columns.append([(real["floor"],), None, None])

    others = f" (for the floor {real['n'] - num})" * len(columns[1:])
    print(f"{what()}\nreference  {real['data']}, fingerprint {real['fingerprint']}, n {real['n']}"
          f"{others}\nfeatures   {features[0]}\n\n{'':20}{f'{num} samples':>24}"
          + f"{f'{num} real (floor)':>24}" * len(columns[1:]))
    for name, *row in zip([distance_name(features[0], num), "KID", "IS"], *columns):
        if row[0]:
            cells = [" +- ".join(f"{x:.4g}" for x in cell[:2]) if cell else "-" for cell in row]
            print(f"{name:20}" + "".join(f"{x:>24}" for x in cells) + "   ".join(["", *row[0][2:]]))
    n, d = min(num, real["n"]), len(real["mean"])
    for so, note in [
        (not columns[1:], f"no floor: it needs {2 * num} real images" + (
            "" if parts else f", or statistics saved with --num {num}")),
        (not parts, "no KID: it needs real images, not their statistics alone"),
        (n < d, f"warning: the covariance of {n} images in {d} dimensions is singular; compare "
         "numbers of the same n only"),
        (features[0] not in ("pixels", f"inception {SHA256}"), "warning: these are not the "
         "published weights; compare numbers of the same weights only")]:
        if so:
            print(note)


def samples_of(args):
    """Of the run or the images to measure: what they are, as a function; the run's options, or
    None; a sample's shape; how many there are; batches of them."""
    if os.path.isfile(f"{args.run}/options.json") or args.run.endswith(".pt"):
        sampled, denoise, options, what = open_run(args)
        choices, shape = choices_of(args, options), options["shape"]
        num = most = args.num or (2000 if len(shape) > 1 else 4000)
        batches = sampled(num, args.sampler, args.steps, args.guidance, **choices)
        text = lambda: (f"{what}, {described(args, choices)}, NFE {denoise.rows / num:g}"
                        + ", seed 0" * (args.seed == 0))
    else:
        if not args.ref:
            raise BadInput(f"{args.run} is no run; if it is images, name others with --ref, to "
                           "compare them with")
        usual, options = parser().parse_args(["fid", args.run]), None
        for name in ("sampler", "steps", "guidance", "schedule", "weights", *CHOICES):
            if getattr(args, name) != getattr(usual, name):
                raise BadInput(f"--{name} belongs to a RUN; leave it out for images")
        data = load_data(args.run, args.data_dir, args.size)
        shape, most, num = data.x.shape[1:], len(data.x), args.num or len(data.x)
        rows = torch.randperm(most, generator=torch.Generator().manual_seed(args.seed))[:num]
        batches = rows_of(data, rows, args.batch)
        text = lambda: f"{data.source}, fingerprint {data.fingerprint}, seed {args.seed}"
    if not 2 <= num <= most:
        raise BadInput(f"--num {num} is not within [2, {most}]")
    return text, options, list(shape), num, batches


def reference(args, options, shape, num, features):
    """real_statistics of --ref, else of the data of the run with these options; and its parts."""
    stored = attempt(args.ref, "name images, or what --save-stats wrote", load_statistics,
                     args.ref) if str(args.ref).endswith(".npz") else None
    for bad, sentence in [
        (stored and args.save_stats, "--save-stats needs images, and this --ref has none"),
        (stored and args.ref_num, "--ref-num needs images, and this --ref has none"),
        (options and args.size and (stored or not args.ref), "--size needs images; leave it out")]:
        if bad:
            raise BadInput(sentence)
    if args.save_stats:
        check_output("--save-stats", args.save_stats, ".npz")
    if not stored:
        data = run_data(options) if not args.ref else load_data(
            args.ref, args.data_dir, args.size or options and options["size"])
    theirs = stored or dict(features=features[0], shape=list(data.x.shape[1:]))
    if [theirs["features"], theirs["shape"]] != [features[0], shape]:
        raise BadInput(f"the reference is {theirs['features']} of {theirs['shape']}, the samples "
                       f"are {features[0]} of {shape}; choose another --ref, --size or --features")
    if stored:
        return stored, []
    real, parts = real_statistics(data, num, features, args.seed, args.ref_num, args.batch)
    if args.save_stats:
        save_arrays(args.save_stats, **real)
    return real, parts


def load_statistics(path):
    """What --save-stats wrote, or None where that is another file."""
    with np.load(path, allow_pickle=False) as file:
        if "cov" not in file.files:
            return None
        mean, cov = (file[name].astype(np.float64) for name in ("mean", "cov"))
        if not (np.isfinite(mean).all() and np.isfinite(cov).all() and cov.shape == 2 * mean.shape):
            raise ValueError("its mean and covariance are no moments of one set")
        return dict(mean=mean, cov=cov, n=int(file["n"]), floor=float(file["floor"]),
                    floor_n=int(file["floor_n"]), **{name: file[name].tolist() for name in (
                        "data", "fingerprint", "shape", "features")})


def nfe(args):
    """evaluate.py nfe: each sampler's Frechet distance over its NFE, deterministic (EDM fig. 2),
    with S_churn (EDM fig. 4) and otherwise stochastic, beside the floor of real images."""
    sampled, denoise, options, what = open_run(args)
    data, num = run_data(options), args.num or (64 if len(options["shape"]) > 1 else 4000)
    if not 2 <= num <= len(data.x) // 2:
        raise BadInput(f"--num {num} is not within [2, {len(data.x) // 2}], half of the data")
    features = extractor(args.features or "pixels", options["shape"], args.inception,
                         args.data_dir, pick_device(args.device))
    real, _ = real_statistics(data, num, features, args.seed, max(KEPT, 2 * num))
    grid = [(" ".join([sampler, *(f"{key} {x}" for key, x in more.items())]), sampler, more, steps)
            for sampler, more in [
                ("euler", {}), ("heun", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.5}),
                *(("edm-stochastic", {"churn": churn}) for churn in (1.0, 3.0, 10.0)), ("pc", {}),
                *(("ddpm", {"variance": v}) for v in ("beta_tilde", "beta", "analytic"))]
            for steps in args.steps]
    grid += [("rk45", "rk45", {"rtol": rtol}, 18) for rtol in (1e-2, 1e-3)]
    columns, rows = ["sampler", "steps", "NFE", distance_name(features[0], num)], []
    print(f"{what}\n\n{columns[0]:28}{columns[1]:>12}{columns[2]:>10}{columns[3]:>24}")
    for name, sampler, more, steps in grid:
        denoise.rows = 0
        sums, *_ = measure(sampled(num, sampler, steps, **more), features[1])
        rows.append([name, f"rtol {more['rtol']}" if sampler == "rk45" else steps,
                     denoise.rows / num,
                     frechet_distance(*sums.moments(), real["mean"], real["cov"])])
        print("{:28}{:>12}{:10.4g}{:24.4g}".format(*rows[-1]), flush=True)
    floor = f"{num} real images"
    print(f"{floor:28}{'':22}{real['floor']:24.4g}")
    rows += [[floor, "", end(row[2] for row in rows), real["floor"]] for end in (min, max)]
    print(f"\n{save_csv(args, columns, rows)}.csv")
    names = [*dict.fromkeys(row[0] for row in rows)]
    panels = {"deterministic": ["euler", "heun", "ddim eta 0.0", "rk45"],
              "S_churn": ["heun", *(name for name in names if "churn" in name)]}
    panels["other stochastic"] = set(names).difference(*panels.values())
    draw(f"{args.out}/nfe.png", ["NFE", *names], [
        [nfe, *(distance if name == own else None for own in names)]
        for name, _, nfe, distance in rows], [
        dict(y=[name for name in names if name in (*some, floor)], ylabel=columns[3], title=title,
             style=".-") for title, some in panels.items()], what)


# ---- Figures: their command line -----------------------------------------------------------------

ARGUMENTS = {      # what a figure may be asked for; its default is the figure's own
    "run": dict(nargs="?", metavar="RUN", help="folder that train.py made (default: none)"),
    "data": dict(metavar="SET", help="a built-in set or a path, as train.py's --data"),
    "--data": dict(help="a built-in set or a path, as train.py's"),
    "--data-dir": dict(help="where downloads and caches lie"),
    "--size": dict(type=number(int, 1), help="crop and resize images to SIZE x SIZE"),
    "--num": dict(type=number(int, 1), help="samples measured"),
    "--n": dict(type=number(int, 1), nargs="+", help="sizes of STF's reference"),
    "--batch": dict(type=number(int, 1), help="samples of a gradient, which share a reference"),
    "--orders": dict(type=number(int, 0, 2), nargs="+", help="of Taylor controls"),
    "--atoms": dict(type=number(int, 1), help="references in STF's control"),
    "--activation": dict(choices=["silu", "softplus", "tanh", "relu"], help="of the MLP"),
    "--width": dict(type=even, help="of the MLP"),
    "--depth": dict(type=number(int, 1), help="hidden layers of the MLP"),
    "--steps": dict(type=number(int, 0), help="training of the MLP"),
    "--levels": dict(type=number(float, 1e-6), nargs="+", help="noise levels sigma"),
    "--seed": dict(type=number(int, 0, 2 ** 32 - 1), help="of every draw"),
    "--device": dict(help="none: cuda where there is one, else cpu"),
    "--out": dict(help="folder of the CSV and the PNG"),
}
COMMON = {"--seed": 0, "--out": "plots"}
SET = {"--data": "digits", "--data-dir": "data", "--size": None}       # figures of a data set
RUN = SET | {"run": None, "--num": 64, "--device": None}               # of a RUN, or a set alone
SIGMAS = [0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0,
          15.0, 20.0, 30.0, 50.0, 80.0]

FIGURES = {        # name: (function, help, its arguments and their defaults, beside COMMON)
    "weights": (papers.weights, "all weightings over t, and their share of the total (DB figs. 2, "
                "5)", {}),
    "variance": (papers.variance, "variance of DSM's and STF's targets, by sigma (STF figs. 2, 3)",
                 SET | {"--data": "two-gaussians-64d", "--num": 2000, "--n": [16, 64, 256],
                        "--levels": SIGMAS}),
    "ess": (papers.ess, "how many references STF averages, and how often training goes there",
            SET | {"--num": 256, "--n": [256, 1024, 4096], "--levels": SIGMAS}),
    "data": (papers.describe, "what a data set says about hyper-parameters", {
        "data": None, "--data-dir": "data", "--size": None, "--num": 5000}),
    "denoise": (papers.denoise, "one-step estimates, their colour (EDM fig. 1; DB fig. 3)", RUN | {
        "--levels": [0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0]}),
    "mse": (papers.mse, "error of eps_hat by step, beside the noisy input as the guess (DB fig. 4)",
            RUN),
    "trajectories": (papers.trajectories, "the ODE's lines in 1-D under VP, VE and EDM (EDM fig. "
                     "3)", {"--levels": [25.0, 1.0]}),
    "gap": (papers.gap, "estimation gap while sampling from x_300 (SA fig. 4)", RUN),
    "gradvar": (gradients.gradvar, "variance of gradient and objective by estimator (TCV figs. "
                "2-5); of a RUN's network, or an MLP trained here; --num none: 2000 points or 32 "
                "images", gradients.TRAINED | {
                    "run": None, "--data-dir": "data", "--num": None, "--batch": 1, "--atoms": 4,
                    "--n": [256, 16, 64, 1024], "--orders": [0, 1, 2], "--device": None,
                    "--levels": [0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0]}),
}


def add_commands(commands):
    """The figures as sub-commands of an argparse parser."""
    for name, (_, about, arguments) in FIGURES.items():
        command = commands.add_parser(name, help=about, description=about)
        for argument, default in (arguments | COMMON).items():
            how = dict(ARGUMENTS[argument])
            if "type" in how:
                how["metavar"] = "X" if how["type"].__name__ == "float" else "N"
            if argument.startswith("--"):
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                how["help"] += f" (default: {str(shown).lower()})"
            command.add_argument(argument, default=default, **how)


# ---- Command line --------------------------------------------------------------------------------

def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared, sampling, ruler = (Parser(add_help=False) for _ in range(3))
    add = shared.add_argument
    add("--num", type=number(int, 1), metavar="N", help="samples (default: 64 images, 4000 points; "
        "in fid 2000 images of a RUN, or all of IMAGES)")
    add("--schedule", choices=SCHEDULES, help="whose time steps (default: the run's own)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, metavar="N",
        help="sample i has seed N + i (default: 0)")
    add("--batch", type=number(int, 1), default=64, metavar="N",
        help="samples drawn together, which changes none of them (default: 64)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, another one of --ema, or, if "
        "that has widths, any from 0.01 to 0.28, from all checkpoints kept (default: ema)")
    add("--device", metavar="NAME", help="none: cuda where there is one, else cpu")
    add = sampling.add_argument
    add("--sampler", choices=SAMPLERS, default="heun", help="how (default: heun)")
    add("--steps", type=number(int, 1), default=18, metavar="N",
        help="time steps (default: 18); rk45 chooses its own")
    add("--churn", type=number(float, 0), metavar="X", help="edm-stochastic's S_churn (default: 0)")
    add("--eta", type=number(float, 0, 1), metavar="X", help="ddim's noise, 0 to 1 (default: 0)")
    add("--snr", type=number(float, 1e-4, 1), metavar="X", help="of pc's corrector (default: 0.16)")
    add("--rtol", type=number(float, 1e-7, 1), metavar="X", help="rk45's relative and absolute "
        "tolerance (default: 1e-5)")
    add("--variance", choices=VARIANCES, help="of ddpm (default: beta_tilde) and, but for beta, of "
        "ddim; sn and npr need a run with that --head")
    add("--guidance", type=number(float, 0), default=1.0, metavar="X", help="classifier-"
        "free: away from the unconditional denoiser if above 1 (default: 1, none)")
    add = ruler.add_argument
    add("--features", choices=["inception", "pixels"], help="default: pixels for nfe and points, "
        "inception for images")
    add("--inception", metavar="PATH", help=f"of {INCEPTION}; none: 91 MB to download")
    add("--data-dir", default="data", help="where downloads lie (default: data)")

    c = commands.add_parser("sample", parents=[shared, sampling], help="draw samples from a run")
    f = commands.add_parser("fid", parents=[shared, sampling, ruler], help="FID, KID and IS of a "
                            "run's samples, or of images")
    n = commands.add_parser("nfe", parents=[shared, ruler], help="each sampler's distance by NFE")
    c.add_argument("run", metavar="RUN", help="folder that train.py made")
    c.add_argument("--class", dest="label", help="name or number of one class; none: all in turn")
    c.add_argument("--out", help="a .png grid or an .npz of arrays; none: a .png in RUN")
    f.set_defaults(label=None)
    f.add_argument("run", metavar="RUN|IMAGES", help="folder that train.py made, or any images")
    f.add_argument("--ref", help="images to compare with, or statistics; none: the RUN's data")
    f.add_argument("--ref-num", type=number(int, 2), help="so many of these; none: all")
    f.add_argument("--save-stats", metavar="X.npz", help="write their statistics, for other --ref")
    f.add_argument("--size", type=number(int, 1), help="crop and resize all to SIZE x SIZE; none: "
                   "as they are, and --ref to the size of RUN")
    n.add_argument("run", metavar="RUN", help="folder that train.py made")
    n.add_argument("--steps", type=number(int, 1), nargs="+", default=[6, 12, 24],
                   help="default: 6 12 24")
    n.add_argument("--out", default="plots", help="folder of nfe.csv, nfe.png (default: plots)")
    add_commands(commands)
    return p


def main(argv=None):
    try:
        args = parser().parse_args(argv)
        figures = {name: function for name, (function, *_) in FIGURES.items()} | dict(nfe=nfe)
        if args.command in figures:                # --out is a folder: check it before the work
            near = next(p for p in (Path(args.out), *Path(args.out).parents) if p.exists())
            if not (near.is_dir() and os.access(near, os.W_OK)):
                raise BadInput(f"--out {args.out}: {near} is no folder to write to; choose another")
        (dict(sample=sample, fid=fid) | figures)[args.command](args)
        return 0
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
