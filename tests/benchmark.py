"""benchmark.py: what things cost, as ratios within one run.  A script, not a test.

    python tests/benchmark.py [--quick] [--only PART] [--json FILE]

"other" is the published form of the stable target, which broadcasts (B, n, d), or what is named.
Every time is a median (the network's: the least) of runs taken in turn with those of its rivals, so
that load on the machine falls on all.  Memory is what a fresh process peaks at above what it holds
with its inputs made.  Errors are relative, in norm, the largest of the batch, against float64 row
by row.  The full run needs about 7 GiB of free memory.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")     # as tests/conftest.py says

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import averages
import datasets
import evaluate
import losses
import networks
import objectives
import runs
import train
from schedules import EDM


def broadcast_target(x, sigma, reference):
    """The published form: STF eq. 5 with every difference x - y_k kept; x's precision."""
    diff = x.flatten(1)[:, None] - reference.flatten(1)[None]                     # (B, n, d)
    w = (-(diff ** 2).sum(2) / (2 * sigma.flatten(1) ** 2)).softmax(1)            # (B, n)
    return (w[..., None] * reference.flatten(1)[None]).sum(1).view_as(x)


def float32_product_target(x, sigma, reference):
    """The matrix product of losses.stf_target with its precision left at float32."""
    y = reference.flatten(1)
    logits = (x.flatten(1) @ y.T - (y ** 2).sum(1) / 2) / sigma.flatten(1) ** 2
    return (logits.softmax(1) @ y).view_as(x)


def exact_target(x, sigma, reference):
    """One row after the other, in float64."""
    rows = []
    for x_i, sigma_i in zip(x.double(), sigma.double().flatten()):
        square = torch.stack([((x_i - y.double()) ** 2).sum() for y in reference])
        w = (-square / (2 * sigma_i ** 2)).softmax(0)
        rows.append(sum(w_k * y.double() for w_k, y in zip(w, reference) if w_k > 0))
    return torch.stack(rows)


TARGETS = dict(ours=losses.stf_target, broadcast=broadcast_target)


def images(n, side, seed):
    """Smooth 8-bit images in [-1, 1]: (n, 3, side, side)."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=side, mode="bicubic").tanh()
    return ((smooth + 1) * 127.5).round() / 127.5 - 1


def problem(B, n, side=32):
    """x, sigma log-uniform on [.002, 80], reference."""
    reference = images(n, side, seed=0)
    sigma = (0.002 * 40000 ** torch.linspace(0, 1, B)).view(B, 1, 1, 1)
    noise = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(1))
    return reference[:B] + sigma * noise, sigma, reference


def near_duplicates(sigma, n, side=32):
    """The same for one image and n - 1 more at distance sigma from it."""
    base, generator = images(1, side, seed=2), torch.Generator().manual_seed(3)
    away = torch.randn(n - 1, 3, side, side, generator=generator)
    away = away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = base + sigma * torch.randn(1, 3, side, side, generator=generator)
    return x, torch.full((1, 1, 1, 1), sigma), torch.cat([base, base + sigma * away])


def error(target, inputs, exact):
    difference = (target(*inputs).double() - exact).flatten(1).norm(dim=1)
    return (difference / exact.flatten(1).norm(dim=1)).max().item()


def times_in_turn(repeats, *functions, take=statistics.median):
    """Seconds a call, after one run of each to warm up.  The functions take turns of a second or
    more each: as in training, most calls follow one of their own kind, with its memory at hand.
    take=min where a call is long and the machine is shared: what others run only adds."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times):
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < 1:
                function()
                calls += 1
            taken.append((time.perf_counter() - start) / calls)
    return [take(taken[1:]) for taken in times]


def fresh_process(worker, *arguments):
    """The numbers that WORKERS[worker](*arguments) gives in a process of its own."""
    command = [sys.executable, __file__, "--worker", worker, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.split()]


def peak_kib():
    """The process's peak resident set (macOS counts in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def memory_worker(name, B, n):
    """In a fresh process: the MiB that one target adds to the peak.

    The inputs are filled in place: a temporary of theirs would raise the peak beforehand, and hide
    as much of the target's own.
    """
    reference = torch.empty(n, 3, 32, 32).normal_()
    x, sigma = torch.empty(B, 3, 32, 32).normal_(), torch.ones(B, 1, 1, 1)
    TARGETS[name](x[:2], sigma[:2], reference[:8])                    # libraries' own buffers
    before = peak_kib()
    TARGETS[name](x, sigma, reference)
    grown = (peak_kib() - before) / 1024
    if grown <= 0:
        raise SystemExit("the peak did not grow: something before the measurement was larger")
    return [grown]


def stf_target_rows(quick):
    B, n, repeats = (16, 512, 3) if quick else (64, 4096, 3)
    size = f"B {B}, n {n}, d 3072"
    yield f"stf_target, peak MiB, {size}", *(
        fresh_process("memory", name, B, n)[0] for name in TARGETS)
    inputs = problem(B, n)
    times = times_in_turn(repeats, *(lambda f=f: f(*inputs) for f in TARGETS.values()))
    yield f"stf_target, seconds, {size}", *times
    inputs = problem(16, 512)
    exact = exact_target(*inputs)
    yield "stf_target, error", *(error(f, inputs, exact) for f in TARGETS.values())
    for sigma in (0.002, 1.0):
        inputs = near_duplicates(sigma, 64)
        exact = exact_target(*inputs)
        mine, theirs = (error(f, inputs, exact) for f in TARGETS.values())
        product = error(float32_product_target, inputs, exact)
        yield f"stf_target, error, near-duplicates at sigma {sigma}", mine, theirs
        yield "    against the product form in float32", mine, product


OBJECTIVES = ("dsm", "stf", "stf --no-mean-correction", "antithetic", "sa --K 2", "sa --K 3",
              "taylor", "taylor --order 1", "taylor --order 2", "stf-taylor",
              "stf-taylor --control atoms")


def objective_rows(quick):
    """A whole training step of the default run (draw, loss, backward, update), by objective."""
    data, steps = datasets.load_data("digits"), []
    pixels, labels = torch.from_numpy(data.x), torch.from_numpy(data.labels)
    for objective in OBJECTIVES:
        given = vars(train.parser().parse_args(["--loss", *objective.split()]))
        options = train.resolve({k.replace("_", "-"): v for k, v in given.items()}, data)
        denoiser, schedule = runs.build_denoiser(options), runs.build_schedule(options)
        tools, optimizer = objectives.build_tools(pixels, labels, options), torch.optim.AdamW(
            denoiser.parameters(), fused=True)
        numbers = itertools.count()

        def step(options=options, denoiser=denoiser, schedule=schedule, tools=tools,
                 optimizer=optimizer, numbers=numbers):
            n = next(numbers)
            batch = objectives.draw_batch(pixels, labels, options, schedule, n)
            objectives.objective(options, denoiser, batch, tools).mean().backward()
            optimizer.step(), optimizer.zero_grad()
            if tools["beta"] and n % 25 == 0:
                objectives.update_beta(options, denoiser, batch, tools, n)
        steps.append(step)
    dsm, *rest = times_in_turn(1 if quick else 5, *steps)
    for objective, seconds in zip(OBJECTIVES[1:], rest):
        yield f"training step, seconds: dsm (other: {objective})", dsm, seconds


def plain_attend(self, x):
    """networks.Block.attend for one head, every step of it written out."""
    B, C, H, W = x.shape
    q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)           # (B, C, HW)
    a = (torch.einsum("bcq,bck->bqk", q, k) / C ** 0.5).softmax(2)
    return self.proj(torch.einsum("bqk,bck->bcq", a, v).reshape(B, C, H, W))


def ddpmpp_step(way, B, device):
    """A training step of DDPM++ of base width 64 on 32x32 images: as train.py does it, or plainly.

    plain: float32 and NCHW, memory as the system has it, attention, AdamW and the weight average
    step by step.  micro: with --micro-batch 16, whose tensors a CPU's caches take more easily.
    """
    torch.manual_seed(0)
    net = networks.UNet(32, 3, **networks.UNETS["ddpmpp"] | {"width": 64})
    for block in net.modules():
        if way == "plain" and isinstance(block, networks.Block):
            block.attend = plain_attend.__get__(block)
    denoiser = networks.Denoiser(net, EDM().precondition).to(device)
    if way != "plain":
        objectives.arrange_memory(denoiser, "dsm")
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    fused = dict(fused=True) if way != "plain" else dict(foreach=False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, **fused)
    denoiser.amp = torch.bfloat16 if "bf16" in way else None
    if "compiled" in way:
        denoiser.model.compile()
    x0, noise = torch.randn(2, B, 3, 32, 32, device=device)
    sigma = torch.rand(B, 1, 1, 1, device=device) + 0.1
    weight, micro = losses.edm_weight, 16 if "micro" in way else B

    def step():
        for given in zip(x0.split(micro), noise.split(micro), sigma.split(micro)):
            (losses.dsm_loss(denoiser, *given, weight).sum() / B).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        if way != "plain":
            averages.update_ema(ema, denoiser, 0.999)
        else:
            with torch.no_grad():
                for average, new in zip(ema.parameters(), denoiser.parameters()):
                    average.mul_(0.999).add_(new, alpha=0.001)
        if device == "cuda":
            torch.cuda.synchronize()
    return step


def step_worker(way, B, device):
    """In a fresh process: the seconds of a step, the least of three turns after one to warm up."""
    torch.set_num_threads(1)
    return times_in_turn(3, ddpmpp_step(way, B, device), take=min)


def matrix_speed(dtype, device):
    """FLOP/s of a matrix product."""
    a = torch.randn(4096, 4096, device=device).to(dtype)
    seconds, = times_in_turn(4, lambda: (a @ a).sum().item(), take=min)
    return 2 * 4096 ** 3 / seconds


def network_rows(quick):
    """DDPM++'s training step, its share of the device's matrix product's speed, and STF's of it.

    Every turn is a fresh process, since train.py's settings of the allocator are the process's.
    The time is the least of all: what others run on a shared machine only adds.  train.py's and the
    plain way have the most turns.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, turns = (512, 2) if device == "cuda" else (4, 1) if quick else (32, 6)
    ways = ["train.py's", "plain", "micro", "compiled", "bf16", "compiled bf16"][:3 if quick else 6]
    seconds, mine = dict.fromkeys(ways, float("inf")), ways[0]
    for turn in range(turns):
        for way in ways if turn < 2 else ways[:2]:
            seconds[way] = min(seconds[way], *fresh_process("step", way, B, device))
    with FlopCounterMode(display=False) as counter:
        ddpmpp_step("plain", 2, "cpu")()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peak = [matrix_speed(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    share = {way: counter.get_total_flops() * B / 2 / taken / peak["bf16" in way]
             for way, taken in seconds.items()}
    for way in ways[1:]:
        what = f"DDPM++ width 64, batch {B}, seconds a step (other: {way})"
        yield what, seconds[mine], seconds[way]
        yield "    images/s", B / seconds[mine], B / seconds[way]
        yield "    share of the FLOP/s of a matrix product", share[mine], share[way]
    whole = torch.randint(256, (5000 if quick else 50_000, 3, 32, 32), dtype=torch.uint8)
    whole, x = whole.to(device), torch.randn(B, 3, 32, 32, device=device)
    sigma = torch.ones(B, 1, 1, 1, device=device)
    for rows in (whole[:4096], whole):
        target, = times_in_turn(
            3, lambda rows=rows: losses.stf_target(x, sigma, rows).sum().item(), take=min)
        yield f"    STF's target, n {len(rows)}, seconds (other: that step)", target, seconds[mine]
    torch.set_num_threads(threads)


def whole_set_rows(quick):
    """STF with a uint8 reference of CIFAR-10's size: peak memory beyond the set, time by n."""
    n = 5000 if quick else 50_000
    grown, half, whole = fresh_process("whole", 128, n)
    yield f"whole uint8 set as reference, B 128, n {n}: peak MiB (other: the limit)", grown, 400.0
    yield f"    seconds, n {n // 2} (other: n {n})", half, whole


def whole_set_worker(B, n):
    """In a fresh process: the MiB beyond the set, the seconds for half of it and for all."""
    reference = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    x, sigma = torch.randn(B, 3, 32, 32), torch.ones(B, 1, 1, 1)
    losses.stf_target(x[:2], sigma[:2], reference[:8])
    before, seconds = peak_kib(), []
    for rows in (reference[:n // 2], reference):
        start = time.perf_counter()
        losses.stf_target(x, sigma, rows)
        seconds.append(time.perf_counter() - start)
    return (peak_kib() - before) / 1024, *seconds


def sampler_rows(quick):
    """What a sampler takes beyond its calls of the default network: 64 digits, 6 steps."""
    data = datasets.load_data("digits")
    options = train.resolve(dict.fromkeys(train.OPTIONS), data)
    denoiser, schedule = runs.build_denoiser(options).eval(), runs.build_schedule(options)
    labels, inside = torch.arange(64) % 10, []

    def denoise(x, sigma, *labels):
        start = time.perf_counter()
        D = denoiser(x, sigma, *labels)
        inside.append(time.perf_counter() - start)
        return D
    for sampler in runs.SAMPLERS:
        more = {"churn": 10.0} if sampler == "edm-stochastic" else {"rtol": 0.01}
        totals, calls = [], []
        for _ in range(2 if quick else 6):
            inside.clear()
            start = time.perf_counter()
            runs.generate(denoise, range(64), options["shape"], sampler, schedule, 6, labels,
                              **more)
            totals.append(time.perf_counter() - start)
            calls.append(sum(inside))
        ratio = statistics.median(t / c for t, c in zip(totals[1:], calls[1:]))
        yield f"denoiser calls, seconds (other: {sampler}, all of it)", calls[1], ratio * calls[1]


def general_root_distance(mean1, cov1, mean2, cov2):
    """Frechet's distance by the root of C1 C2, a matrix that is not symmetric: V sqrt(L) V^-1."""
    values, V = np.linalg.eig(cov1 @ cov2)
    root = V * np.sqrt(values.astype(complex)) @ np.linalg.inv(V)
    return ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root).real


def frechet_rows(quick):
    """The Frechet distance of d features, 2048 of Inception."""
    d, rng = 256 if quick else 2048, np.random.default_rng(0)
    scale = np.arange(1, d + 1) ** -0.5
    sets = [rng.standard_normal((3 * d, d)) * scale for _ in range(2)]
    given = [m for x in sets for m in (x.mean(0), np.cov(x, rowvar=False))]
    ways = [evaluate.frechet_distance, general_root_distance]
    ours, general = (f(*given) for f in ways)
    assert abs(ours - general) < 1e-6 * general
    yield f"frechet_distance, seconds, d {d} (other: the root of C1 C2)", *times_in_turn(
        1, *(lambda f=f: f(*given) for f in ways))


WORKERS = dict(memory=memory_worker, whole=whole_set_worker, step=step_worker)
PARTS = dict(target=stf_target_rows, whole=whole_set_rows, objectives=objective_rows,
             network=network_rows, samplers=sampler_rows, frechet=frechet_rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, half a minute")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    parser.add_argument("--only", help="one part: " + ", ".join(PARTS))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        name, *given = options.worker
        return print(*WORKERS[name](*(int(v) if v.isdecimal() else v for v in given)))

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"
    print(f"{machine}\n{'what':64} {'this repo':>10} {'other':>10} {'ratio':>8}", flush=True)
    rows = []
    for name, part in PARTS.items():
        if options.only not in (None, name):
            continue
        for what, mine, other in part(options.quick):
            ratio = other / mine if mine else float("inf")
            rows.append(dict(what=what, this_repo=mine, other=other, ratio=ratio))
            print(f"{what:64} {mine:10.3g} {other:10.3g} {ratio:8.3g}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1))


if __name__ == "__main__":
    main()
