"""What needs a GPU; collected everywhere, skipped without one."""

import itertools
import subprocess
import sys

import pytest
import torch

import evaluate
import losses
import train
from samplers import heun
from schedules import EDM
from test_train import log

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("folder"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DIGITS = ["--data", "digits", "--device", "cuda", "--sample-steps", "2", "--out", "run"]


@pytest.fixture(autouse=True)
def settings_are_put_back():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_sync_debug_mode("default")


def test_stf_target_equals_float64_on_the_cpu_under_tf32_and_autocast():
    torch.backends.cuda.matmul.allow_tf32 = True
    g = torch.Generator().manual_seed(0)
    y = torch.rand(300, 3, 32, 32, generator=g) * 2 - 1
    for level in (0.002, 0.2, 5.0, 80.0):
        sigma = torch.full((8, 1, 1, 1), level)
        x = y[:8] + sigma * torch.randn(8, 3, 32, 32, generator=g)
        exact = losses.stf_target(x.double(), sigma.double(), y.double())
        with torch.autocast("cuda", torch.bfloat16):
            target = losses.stf_target(x.cuda(), sigma.cuda(), y.cuda(), chunk=128).cpu()
        error = (target - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert error.max() < 1e-5


def test_micro_batches_take_less_memory():
    peaks = []
    for part in (128, 16):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train.run(train.Options(batch=128, steps=2, loss="dsm", eval_every=0, device="cuda",
                                micro_batch=part), brief=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 3


@pytest.mark.parametrize("schedule", ["edm", "vp", "ddpm"])
def test_trains_samples_and_resumes_on_the_gpu(schedule):
    argv = [*DIGITS, "--schedule", schedule, "--steps", "4", "--checkpoint-every", "2"]
    assert train.main(argv) == 0
    assert train.main(["--resume", "run", "--steps", "6"]) == 0
    for sampler in evaluate.SAMPLERS:
        assert evaluate.main(["sample", "run", "--sampler", sampler, "--steps", "3", "--num", "4",
                              *(["--S_churn", "1"] if sampler == "edm-stochastic" else [])]) == 0


@pytest.mark.parametrize("more", [
    "--loss dsm --amp none", "--loss antithetic --amp fp16", "--loss taylor --order 1",
    "--loss sa --K 3 --level-noise path --amp bf16", "--loss taylor --order 2 --amp bf16",
    "--loss stf --augment 0.5 --xflip", "--loss stf --compile", "--loss stf --arch adm --width 64"])
def test_every_objective_trains_on_the_gpu_in_every_number_type_and_compiled(more):
    assert train.main([*DIGITS, *more.split(), "--steps", "12"]) == 0
    found = [line["loss"] for line in log("run", "loss")]
    assert len(found) >= 8 and torch.tensor(found).isfinite().all()       # fp16 may skip the first
    state = evaluate.load_checkpoint("run")
    assert all(weight.dtype == torch.float32 for weight in state["model"].values())


def test_a_head_trains_on_the_gpu():
    assert train.main([*DIGITS[:-1], "first", "--steps", "4"]) == 0
    assert train.main([*DIGITS, "--head", "sn", "--init", "first", "--steps", "4"]) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_of_nccl_train_as_one_process_does():
    argv = ["--batch", "32", "--steps", "5", "--amp", "none"]
    assert train.main([*DIGITS, *argv]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, train.__file__, *DIGITS[:-1], "two", *argv], check=True)
    one, two = (evaluate.load_checkpoint(name)["model"] for name in ("run", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_the_loop_of_a_sampler_does_not_wait_for_the_gpu():
    denoiser = evaluate.build_denoiser(train.resolve(
        train.Options(device="cuda"), evaluate.load_data("digits"))).cuda().eval()
    t = EDM().time_steps(4)
    x, calls = torch.randn(2, 3, 16, 16, device="cuda") * t[0], []

    def denoise(x, sigma):                          # the only wait is after the last call
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 7 else "default")
        return denoiser(x, sigma)
    heun(denoiser, x, t, EDM())                     # first call: libraries load
    heun(denoise, x, t, EDM())
    assert len(calls) == 7


def test_the_loop_of_a_training_does_not_wait_for_the_gpu(monkeypatch):
    """From the third step to the last but one: no status line, no checkpoint falls due."""
    draw_batch, clock = train.draw_batch, itertools.count()

    def draw(*given):
        torch.cuda.set_sync_debug_mode("error" if 2 <= given[-1] < 8 else "default")
        return draw_batch(*given)
    monkeypatch.setattr(train, "draw_batch", draw)
    monkeypatch.setattr(train.time, "time", lambda: next(clock) / 1000)
    for loss in ("stf", "dsm", "sa", "taylor"):
        assert train.main([*DIGITS[:-1], loss, "--loss", loss, "--steps", "9"]) == 0
