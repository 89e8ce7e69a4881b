"""benchmark.py: what things cost, as one table of ratios within one run.  A script, not a test.

    python tests/benchmark.py            about 8 minutes on an idle machine
    python tests/benchmark.py --quick    about half a minute, smaller sizes

Each row compares this repository with another way of doing the same.  The rivals take turns, and
the least time of each counts, since other programs on the machine only add to it.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")     # as tests/conftest.py says

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
from losses import RunningBeta, stf_target

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def in_turn(repeats, *functions):
    """The least seconds of a call of each function, after one call each to warm up."""
    seconds = torch.empty(repeats + 1, len(functions))
    for repeat in range(repeats + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if GPU:
                torch.cuda.synchronize()
            seconds[repeat, i] = time.perf_counter() - start
    return seconds[1:].amin(0).tolist()


# ---- STF's target --------------------------------------------------------------------------------

def published_target(x, sigma, reference):
    """STF eq. 5 with every difference x - y_k kept, in x's precision."""
    diff = x.flatten(1)[:, None] - reference.flatten(1)[None]                     # (B, n, d)
    w = (-(diff ** 2).sum(2) / (2 * sigma.flatten(1) ** 2)).softmax(1)            # (B, n)
    return (w[..., None] * reference.flatten(1)[None]).sum(1).view_as(x)


def float32_target(x, sigma, reference):
    """losses.stf_target's matrix product in float32."""
    y = reference.flatten(1)
    logits = (x.flatten(1) @ y.T - (y ** 2).sum(1) / 2) / sigma.flatten(1) ** 2
    return (logits.softmax(1) @ y).view_as(x)


def spread_out(B, n, seed=0):
    """x, sigma log-uniform on [.002, 80], and n smooth 8-bit images in [-1, 1] as the reference."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=32, mode="bicubic").tanh()
    reference = ((smooth + 1) * 127.5).round() / 127.5 - 1
    sigma = (0.002 * 40000 ** torch.linspace(0, 1, B)).view(B, 1, 1, 1)
    noise = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return reference[:B] + sigma * noise, sigma, reference


def near_duplicates(sigma):
    """The same for one image and 63 more at distance sigma from it."""
    base, g = spread_out(1, 1, seed=2)[2], torch.Generator().manual_seed(3)
    away = F.normalize(torch.randn(63, 3, 32, 32, generator=g), dim=(1, 2, 3))
    x = base + sigma * torch.randn(1, 3, 32, 32, generator=g)
    return x, torch.full((1, 1, 1, 1), sigma), torch.cat([base, base + sigma * away])


def added_mib(target, B, n):
    """The MiB that one target adds to the peak of its process, which must be a fresh one."""
    def peak():
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib / 2 ** (20 if sys.platform == "darwin" else 10)        # macOS counts in bytes

    reference = torch.empty(n, 3, 32, 32).normal_()
    x, sigma = torch.empty(B, 3, 32, 32).normal_(), torch.ones(B, 1, 1, 1)
    target(x[:2], sigma[:2], reference[:8])                               # libraries' own buffers
    before = peak()
    target(x, sigma, reference)
    return peak() - before


def target_rows(quick):
    B, n = (16, 512) if quick else (64, 4096)
    peaks = []
    for target in (stf_target, published_target):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            peaks.append(fresh.apply(added_mib, (target, B, n)))
    yield f"stf_target, peak MiB, B {B}, n {n}, d 3072 | published form", *peaks
    inputs = [a.to(DEVICE) for a in spread_out(B, n)]
    yield "stf_target, seconds | published form", *in_turn(
        1, partial(stf_target, *inputs), partial(published_target, *inputs))
    for what, inputs in [("sigma .002 to 80", spread_out(16, 512)),
                         ("near-duplicates, sigma .002", near_duplicates(0.002))]:
        exact = published_target(*(a.double() for a in inputs)).flatten(1)

        def error(target):                                   # relative, of the worst of the batch
            difference = target(*inputs).flatten(1) - exact
            return (difference.norm(dim=1) / exact.norm(dim=1)).max().item()
        for name, target in [("published form", published_target),
                             ("float32 product", float32_target)]:
            yield f"stf_target, error, {what} | {name}", error(stf_target), error(target)


# ---- A training step -----------------------------------------------------------------------------

def training(data, memory_format=train.memory_format(DEVICE), **given):
    """A function that takes a step of train.py, as these options have it, without averages."""
    options = train.resolve(train.Options(device=DEVICE, **given), data)
    amp = torch.bfloat16 if options.amp == "bf16" else None
    denoiser = evaluate.build_denoiser(options, amp).to(DEVICE, memory_format=memory_format)
    if options.compile:
        denoiser.model.compile()
    schedule, weight = evaluate.build_schedule(options), evaluate.build_weight(options)
    pixels, labels = train.on_device(data, DEVICE)
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    beta = RunningBeta(device=DEVICE)

    def step():
        batch = train.draw_batch(pixels, labels, options, schedule, 0)
        train.objective(options, denoiser, batch, weight, denoiser.precondition,
                        beta).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def objective_rows(quick):
    ways = [dict(loss="dsm"), dict(loss="stf"), dict(loss="antithetic"), dict(loss="sa", K=2),
            dict(loss="sa", K=3), dict(loss="taylor"), dict(loss="taylor", order=1),
            dict(loss="taylor", order=2)]
    data = evaluate.load_data("digits")
    dsm, *others = in_turn(1 if quick else 5, *(training(data, **way) for way in ways))
    for way, seconds in zip(ways[1:], others):
        yield f"a training step on digits, dsm | {way}", dsm, seconds


def network_rows(quick):
    """DDPM++ on random images: its step, and on a GPU its images/s, STF's share and its memory."""
    x = np.random.default_rng(0).integers(0, 256, (8192, 3, 32, 32), np.uint8)
    ddpmpp = partial(training, evaluate.Dataset(x, None, [], "random", "", ""), arch="ddpmpp",
                     width=128 if GPU else 64)
    B = 4 if quick else 128 if GPU else 32
    ways = {"": {}, "without channels last": dict(memory_format=torch.contiguous_format)}
    if GPU:
        ways = {"": {}, "bf16": dict(amp="bf16"), "compiled": dict(compile=True),
                "bf16, compiled": dict(amp="bf16", compile=True), "--loss stf": dict(loss="stf")}
    plain = dict(batch=B, loss="dsm", amp="none")
    first, *others = in_turn(1 if quick else 3, *(ddpmpp(**plain | way) for way in ways.values()))
    for name, seconds in zip(list(ways)[1:], others):
        yield f"a step of DDPM++, batch {B} | {name}", first, seconds
        yield "    images/s", B / first, B / seconds
    for B in (128, 512) if GPU else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ddpmpp(batch=B, loss="dsm", amp="bf16")()
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        card = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
        yield f"DDPM++, bf16, micro-batch {B}, peak GiB | the card's", peak, card


PARTS = dict(target=target_rows, objectives=objective_rows, network=network_rows)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}\n\n"
          f"{'ours | the other way':72}{'ours':>10}{'other':>10}{'other/ours':>11}")
    for part in [args.only] if args.only else PARTS:
        for what, ours, other in PARTS[part](args.quick):
            print(f"{what:72}{ours:10.3g}{other:10.3g}{other / ours:11.3g}", flush=True)


if __name__ == "__main__":
    main()
