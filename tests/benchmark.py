"""benchmark.py: what things cost, as one table of ratios within one run.  A script, not a test.

    python tests/benchmark.py            about 10 minutes on an idle machine
    python tests/benchmark.py --quick    about half a minute, smaller sizes

Each row compares this repository with another way of doing the same.  The rivals take turns, and
the least time of each counts, since other programs on the machine only add to it.  A row whose
process got less than 80 % of a core while it ran is marked "busy".  Memory is what a fresh process
peaks at above what its inputs take.  Errors are relative, in norm, the largest of the batch,
against float64 row by row.
"""

import argparse
import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")     # as tests/conftest.py says

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import losses
import networks
import train
from samplers import heun
from schedules import EDM

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


# ---- Measuring -----------------------------------------------------------------------------------

def in_turn(repeats, *functions):
    """The least seconds of a call of each function, after one call each to warm up; and whether
    the machine was busy."""
    least, cpu, wall = [float("inf")] * len(functions), time.process_time(), time.perf_counter()
    for repeat in range(repeats + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if GPU:
                torch.cuda.synchronize()
            if repeat > 0:
                least[i] = min(least[i], time.perf_counter() - start)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return *least, share < 0.8 and not GPU


def fresh_process(worker, *arguments):
    """The numbers that WORKERS[worker](*arguments) prints in a process of its own."""
    command = [sys.executable, __file__, "--worker", worker, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.split()]


def peak_mib():
    """The process's peak of resident memory (macOS counts in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


# ---- STF's target --------------------------------------------------------------------------------

def broadcast_target(x, sigma, reference):
    """The published form: STF eq. 5 with every difference x - y_k kept, in x's precision."""
    diff = x.flatten(1)[:, None] - reference.flatten(1)[None]                     # (B, n, d)
    w = (-(diff ** 2).sum(2) / (2 * sigma.flatten(1) ** 2)).softmax(1)            # (B, n)
    return (w[..., None] * reference.flatten(1)[None]).sum(1).view_as(x)


def float32_target(x, sigma, reference):
    """losses.stf_target's matrix product in float32."""
    y = reference.flatten(1)
    logits = (x.flatten(1) @ y.T - (y ** 2).sum(1) / 2) / sigma.flatten(1) ** 2
    return (logits.softmax(1) @ y).view_as(x)


def split_target(x, sigma, reference):
    """The same with each factor split into 12 leading bits and the rest: three float32 products."""
    y, q = reference.flatten(1), x.flatten(1)
    (q1, q2), (y1, y2) = halves(q), halves(y)
    product = (q1 @ y1.T).double() + (q1 @ y2.T).double() + (q2 @ y.T).double()
    logits = (product - (y.double() ** 2).sum(1) / 2) / sigma.flatten(1).double() ** 2
    return (logits.softmax(1).to(y) @ y).view_as(x)


def halves(x):
    """x as a number of 12 leading bits and what is left."""
    step = 2.0 ** (x.abs().log2().floor() - 11)
    high = (x / step).round() * step
    return high, x - high


def exact_target(x, sigma, reference):
    """One row after the other, in float64."""
    rows = []
    for x_i, sigma_i in zip(x.double(), sigma.double().flatten()):
        square = ((x_i - reference.double()) ** 2).flatten(1).sum(1)
        w = (-square / (2 * sigma_i ** 2)).softmax(0)
        rows.append((w @ reference.double().flatten(1)).view_as(x_i))
    return torch.stack(rows)


TARGETS = dict(ours=losses.stf_target, broadcast=broadcast_target)


def images(n, seed=0):
    """Smooth 8-bit images in [-1, 1]: (n, 3, 32, 32)."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=32, mode="bicubic").tanh()
    return ((smooth + 1) * 127.5).round() / 127.5 - 1


def problem(B, n):
    """x, sigma log-uniform on [.002, 80], reference."""
    reference = images(n)
    sigma = (0.002 * 40000 ** torch.linspace(0, 1, B)).view(B, 1, 1, 1)
    noise = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return reference[:B] + sigma * noise, sigma, reference


def near_duplicates(sigma, n=64):
    """The same for one image and n - 1 more at distance sigma from it."""
    base, g = images(1, seed=2), torch.Generator().manual_seed(3)
    away = torch.randn(n - 1, 3, 32, 32, generator=g)
    away = away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = base + sigma * torch.randn(1, 3, 32, 32, generator=g)
    return x, torch.full((1, 1, 1, 1), sigma), torch.cat([base, base + sigma * away])


def error(target, inputs, exact):
    difference = (target(*inputs).double() - exact).flatten(1).norm(dim=1)
    return (difference / exact.flatten(1).norm(dim=1)).max().item()


def memory_worker(name, B, n):
    """The MiB that one target adds to the process's peak, whose inputs are filled in place."""
    reference = torch.empty(n, 3, 32, 32).normal_()
    x, sigma = torch.empty(B, 3, 32, 32).normal_(), torch.ones(B, 1, 1, 1)
    TARGETS[name](x[:2], sigma[:2], reference[:8])                    # libraries' own buffers
    before = peak_mib()
    TARGETS[name](x, sigma, reference)
    print(peak_mib() - before)


def target_rows(quick):
    B, n = (16, 512) if quick else (64, 4096)
    size = f"B {B}, n {n}, d 3072"
    yield f"stf_target, peak MiB, {size} | published form", *(
        fresh_process("memory", name, B, n)[0] for name in TARGETS), False
    inputs = [a.to(DEVICE) for a in problem(B, n)]
    yield f"stf_target, seconds, {size} | published form", *in_turn(
        1, *(partial(f, *inputs) for f in TARGETS.values()))
    for what, inputs in [("sigma .002 to 80", problem(16, 512)),
                         ("near-duplicates, sigma .002", near_duplicates(0.002)),
                         ("near-duplicates, sigma 1", near_duplicates(1.0))]:
        exact = exact_target(*inputs)
        for name, target in (("published form", broadcast_target), ("float32 product",
                             float32_target), ("three float32 products", split_target)):
            yield f"stf_target, error, {what} | {name}", error(losses.stf_target, inputs, exact), \
                error(target, inputs, exact), False


# ---- A training step -----------------------------------------------------------------------------

def training(given):
    """A function that takes train.py's next step (batch, loss, backward, update) on the digits."""
    data = evaluate.load_data("digits")
    options = train.resolve(train.Options(device=DEVICE, **given), data)
    denoiser = evaluate.build_denoiser(options).to(
        DEVICE, memory_format=train.memory_format(DEVICE))
    schedule, weight = evaluate.build_schedule(options), evaluate.build_weight(options)
    pixels, labels = train.on_device(data, DEVICE)
    optimizer, beta = torch.optim.AdamW(denoiser.parameters(), fused=True), None
    if options.loss == "taylor":
        beta = losses.RunningBeta(device=DEVICE)

    def step():
        batch = train.draw_batch(pixels, labels, options, schedule, 0)
        train.objective(options, denoiser, batch, weight, denoiser.precondition,
                        beta).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def objective_rows(quick):
    given = [dict(loss="dsm"), dict(loss="stf"), dict(loss="antithetic"), dict(loss="sa", K=2),
             dict(loss="sa", K=3), dict(loss="taylor"), dict(loss="taylor", order=1),
             dict(loss="taylor", order=2)]
    *seconds, busy = in_turn(1 if quick else 5, *(training(own) for own in given))
    for own, other in zip(given[1:], seconds[1:]):
        text = " ".join(f"--{name} {value}" for name, value in own.items())
        yield f"a training step on digits, dsm | {text}", seconds[0], other, busy


def plain_attend(self, x):
    """networks.Block.attend for one head, every step of it written out."""
    B, C, H, W = x.shape
    q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)           # (B, C, HW)
    a = (torch.einsum("bcq,bck->bqk", q, k) / C ** 0.5).softmax(2)
    return self.proj(torch.einsum("bqk,bck->bcq", a, v).reshape(B, C, H, W))


def ddpmpp(way, B):
    """A training step of DDPM++ of width 64 (a GPU: 128): as train.py does it, or in a plain way.

    way: words among plain (float32, memory as it comes, attention, AdamW and average written out),
    bf16, compiled.
    """
    torch.manual_seed(0)
    net = networks.UNet(32, 3, **networks.UNETS["ddpmpp"] | {"width": 128 if GPU else 64})
    plain = "plain" in way
    for block in net.modules():
        if plain and isinstance(block, networks.Block):
            block.attend = plain_attend.__get__(block)
    denoiser = networks.Denoiser(net, EDM().precondition, torch.bfloat16 if "bf16" in way else None)
    denoiser = denoiser.to(DEVICE)
    if not plain:
        denoiser.to(memory_format=train.memory_format(DEVICE))
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    how = dict(foreach=False) if plain else dict(fused=True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, **how)
    if "compiled" in way:
        denoiser.model.compile()
    x0, noise = torch.randn(2, B, 3, 32, 32, device=DEVICE)
    sigma = torch.rand(B, 1, 1, 1, device=DEVICE) + 0.1

    def step():
        losses.dsm_loss(denoiser, x0, noise, sigma, losses.edm_weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if not plain:
                torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 0.001)
                return
            for average, new in zip(ema.parameters(), denoiser.parameters()):
                average.mul_(0.999).add_(new, alpha=0.001)
    return step


def network_rows(quick):
    """DDPM++'s step, its share of a matrix product's speed, and what STF's target adds to it."""
    B = (512 if GPU else 32) if not quick else 4
    ways = ["ours", "plain"] + (["bf16", "compiled", "bf16 compiled"] if GPU else [])
    *seconds, busy = in_turn(1 if quick else 3, *(ddpmpp(way, B) for way in ways))
    for way, other in zip(ways[1:], seconds[1:]):
        yield f"DDPM++ step, batch {B} | {way}", seconds[0], other, busy
        yield f"    images/s | {way}", B / seconds[0], B / other, busy
    with FlopCounterMode(display=False) as counter:
        ddpmpp("ours", 2)()
    a = torch.randn(2048, 2048, device=DEVICE)
    product, busy = in_turn(3, partial(torch.mm, a, a))
    peak, flops = 2 * 2048 ** 3 / product, counter.get_total_flops() * B / 2
    yield "    FLOP/s | of a float32 matrix product", flops / seconds[0], peak, busy
    x, sigma = torch.randn(B, 3, 32, 32, device=DEVICE), torch.ones(B, 1, 1, 1, device=DEVICE)
    for n in (512,) if quick else (4096, 50_000):
        reference = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
        target, busy = in_turn(1, partial(losses.stf_target, x, sigma, reference))
        yield f"    STF's target, n {n}, seconds | that step", target, seconds[0], busy


def large_set_rows(quick):
    """Drawing a batch from a memory map of 64x64 images, by the number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        for N in (20_000,) if quick else (20_000, 1_280_000):
            x = np.lib.format.open_memmap(f"{folder}/{N}.npy", "w+", np.uint8, (N, 3, 64, 64))
            data = evaluate.Dataset(x, None, [], "map", "a memory map", "")   # a file of zeros
            options = train.resolve(train.Options(device=DEVICE, arch="unet", batch=128), data)
            pixels, schedule = torch.from_numpy(x), EDM()
            draw = partial(train.draw_batch, pixels, None, options, schedule, 0)
            everything = partial(torch.randperm, N)
            batch = draw()
            target = partial(losses.stf_target, batch.x0, batch.sigma, batch.reference)
            mine, other, stf, busy = in_turn(1 if quick else 3, draw, everything, target)
            name = f"a batch, its 4096 references of {N:,} 64x64 images | randperm"
            yield name, mine, other, busy
            yield "    drawing it, seconds | STF's target for it", mine, stf, busy


def gpu_rows(quick):
    """Sampling and memory on a GPU."""
    if not GPU:
        return
    net = networks.UNet(32, 3, **networks.UNETS["ddpmpp"])
    denoiser = networks.Denoiser(net, EDM().precondition, torch.bfloat16).cuda().eval()
    B = 64 if quick else 512
    x = torch.randn(B, 3, 32, 32, device="cuda") * 80
    sample = partial(heun, denoiser, x, EDM().time_steps(18), EDM())
    seconds, busy = in_turn(1, sample)
    yield "sampling, 35 NFE, images/s | seconds", B / seconds, seconds, busy
    for B in (64,) if quick else (64, 128, 256, 512):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ddpmpp("bf16", B)()
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        card = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
        yield f"DDPM++, bf16, micro-batch {B}, peak GiB | the card's", peak, card, False


WORKERS = dict(memory=memory_worker)
PARTS = dict(target=target_rows, objectives=objective_rows, network=network_rows,
             large=large_set_rows, gpu=gpu_rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, half a minute")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        name, *given = args.worker
        return WORKERS[name](*(int(v) if v.isdecimal() else v for v in given))
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    stated = "half a minute" if args.quick else "10 minutes"
    print(f"torch {torch.__version__}, {name}; about {stated} on an idle machine\n\n"
          f"{'ours | the other way':66}{'ours':>10}{'other':>10}{'other/ours':>11}")
    start = time.time()
    for part, rows in PARTS.items():
        if args.only not in (None, part):
            continue
        print(f"  .. {part}, {time.time() - start:.0f} s so far", file=sys.stderr, flush=True)
        for what, mine, other, busy in rows(args.quick):
            note = "  busy" if busy else ""
            print(f"{what:66}{mine:10.3g}{other:10.3g}{other / mine:11.3g}{note}", flush=True)


if __name__ == "__main__":
    main()
