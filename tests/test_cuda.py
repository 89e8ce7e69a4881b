"""What needs a GPU; collected everywhere, skipped without one."""

import pytest
import torch

import datasets
import evaluate
import losses
import runs
import train
from samplers import heun
from schedules import EDM

pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


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


def test_stf_memory_is_not_b_n_d():
    B, n, d = 64, 4096, 3072
    x, y = torch.randn(B, d, device="cuda"), torch.randn(n, d, device="cuda")
    losses.stf_target(x[:2], torch.ones(2, 1, device="cuda"), y[:8])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses.stf_target(x, torch.ones(B, 1, device="cuda"), y)
    assert torch.cuda.max_memory_allocated() - before < 4 * B * n * d / 20


@pytest.mark.parametrize("schedule", ["edm", "vp", "ddpm"])
def test_trains_samples_and_resumes_on_the_gpu(schedule, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--schedule", schedule, "--cond", "--steps", "4", "--checkpoint-every", "2",
            "--sample-steps", "2", "--out", "run"]
    assert train.main(argv) == 0
    assert train.main(["--resume", "run", "--steps", "6"]) == 0
    for sampler in runs.SAMPLERS:
        assert evaluate.main(["sample", "run", "--sampler", sampler, "--steps", "3", "--num", "4",
                              *(["--churn", "1"] if sampler == "edm-stochastic" else [])]) == 0


@pytest.mark.parametrize("more", [
    "--loss dsm", "--loss antithetic", "--loss sa --K 3 --level-noise path", "--loss taylor",
    "--loss taylor --order 2", "--loss stf-taylor", "--loss stf-taylor --control atoms",
    "--loss stf --augment 0.5 --xflip", "--head sn"])
def test_every_objective_trains_on_the_gpu(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*more.split(), "--steps", "12", "--sample-steps", "2", "--out", "run"]) == 0


def test_the_loop_of_a_sampler_does_not_wait_for_the_gpu():
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args([])).items()}
    options = train.resolve(given, datasets.load_data("digits"))
    denoiser = runs.build_denoiser(options).cuda().eval()
    row = EDM()
    t = row.time_steps(4)
    x, calls = torch.randn(2, 3, 16, 16, device="cuda") * t[0], []

    def denoise(x, sigma):                          # the only wait is after the last call
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 7 else "default")
        return denoiser(x, sigma)
    heun(denoiser, x, t, row)                       # first call: libraries load
    try:
        heun(denoise, x, t, row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 7
