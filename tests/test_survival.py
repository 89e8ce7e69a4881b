"""What a run outlives: kills, signals, full disks, losses that are not finite."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import objectives
import runs
import train

POINTS = ["--data", "two-gaussians", "--width", "16", "--batch", "16", "--ref-batch", "64",
          "--sample-steps", "1", "--eval-every", "0", "--loss", "stf-taylor", "--ema", "20000,100"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(argv, output, replace_kills=0):
    """train.py in a process of its own, which dies in the midst of its n-th checkpoint, if any."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(output, "w")
    if replace_kills:
        left, replace = [replace_kills], os.replace

        def dying(old, new):
            left[0] -= str(new).endswith(".pt")
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)
        runs.os.replace = dying
    status = train.main(argv)
    sys.stdout.flush()
    os._exit(status)


def start(argv, output="output", **more):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "pytest"])      # imported once
    os.environ["PYTHONPATH"] = str(Path(train.__file__).parent)
    process = context.Process(target=run, args=(argv, output), kwargs=more)
    process.start()
    return process


def same(a, b):
    """Weights, averages, optimizer, scaler, counters and control coefficients, bit for bit."""
    a, b = (runs.load_checkpoint(name) for name in (a, b))

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        return x == y
    names = set(a) - {"options"}
    assert {"ema", "scaler", "beta", "skipped", "optimizer"} < names
    return all(equal(a[name], b[name]) for name in names)


def newest():
    return runs.checkpoints("run")[-1] if runs.checkpoints("run") else ""


def test_twenty_kills_at_random_moments_change_nothing():
    """kill -9, at times between two steps, at times while a checkpoint is written."""
    argv = [*POINTS, "--steps", "800", "--checkpoint-every", "4"]
    assert train.main([*argv, "--out", "whole"]) == 0
    random.seed(0)
    kills, steps = 0, []
    while kills < 20:
        again = ["--resume", "run"] if Path("run/options.json").exists() else [*argv, "--out", "run"]
        process = start(again, replace_kills=random.randint(1, 6) if kills % 2 else 0)
        end, first = time.time() + random.uniform(0.05, 0.6), newest()
        if not kills % 2:
            while time.time() < end and newest() == first:         # a fast machine's: soon
                time.sleep(random.uniform(0, 0.05))
            process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, Path("output").read_text()
        kills += 1
        steps += [runs.load_checkpoint("run")["step"]] if newest() else []
    assert train.main(["--resume", "run"]) == 0
    assert steps == sorted(steps) and 0 < steps[-1] < 800 and same("whole", "run")
    lines = [[json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()][:800]
             for name in ("whole", "run")]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(1, 801))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(name):
    argv = [*POINTS, "--decay", "0", "--checkpoint-every", "100000"]
    process = start([*argv, "--steps", "2000", "--out", "run"])
    while not Path("run/log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    text = Path("output").read_text()
    assert process.exitcode == 0 and "to go on: python train.py --resume run" in text, text
    step = runs.load_checkpoint("run")["step"]
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert 0 < step < 2000 and last["step"] == step
    assert train.main(["--resume", "run", "--steps", str(step + 5)]) == 0
    assert train.main([*argv, "--steps", str(step + 5), "--out", "whole"]) == 0
    assert same("run", "whole")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(broken, monkeypatch, capsys):
    """Steps 3 and 5 of 6 break: no weight, moment or counter of AdamW moves in them."""
    seen, good = [], objectives.objective

    def objective(options, denoiser, batch, tools):
        seen.append(([p.clone() for p in denoiser.parameters()]))
        loss = good(options, denoiser, batch, tools)
        if len(seen) not in (3, 5):
            return loss
        if broken == "loss":
            return torch.where(torch.arange(len(loss)) == 4, torch.nan, loss)
        return loss + 0 * sum((p.sum() * torch.inf).nan_to_num(0, 0) for p in denoiser.parameters())
    monkeypatch.setattr(objectives, "objective", objective)
    assert train.main([*POINTS, "--loss", "dsm", "--steps", "6", "--warmup", "0", "--out", "r"]) == 0
    moved = [not all(torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1])) for i in range(5)]
    assert moved == [True, True, False, True, False]
    lines = [json.loads(line) for line in Path("r/log.jsonl").read_text().splitlines()[:6]]
    skipped = [line for line in lines if "skipped" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(3, 1), (5, 2)]
    assert all("loss" in line for line in lines if line not in skipped)
    state = runs.load_checkpoint("r")
    assert state["skipped"] == [2, 0]
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {4.0}
    options = state["options"]
    data = train.load_data("two-gaussians")
    batch = objectives.draw_batch(torch.from_numpy(data.x), None, options,
                                  runs.build_schedule(options), 2)
    low, high = skipped[0]["sigma"]
    if broken == "loss":
        assert low == high == pytest.approx(batch["sigma"].flatten()[4].item())
    else:
        assert low == pytest.approx(batch["sigma"].min().item())
        assert high == pytest.approx(batch["sigma"].max().item())


def test_ten_such_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(monkeypatch, capsys):
    calls, good = [], objectives.objective

    def objective(*given):
        calls.append(1)
        return good(*given) * (torch.nan if len(calls) > 12 or len(calls) == 4 else 1)
    monkeypatch.setattr(objectives, "objective", objective)
    argv = [*POINTS, "--loss", "dsm", "--steps", "100", "--checkpoint-every", "5", "--out", "r"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "ten steps in a row up to 22" in error and "r/checkpoint-0000020.pt" in error
    assert error.count("\n") == 1


def test_fp16_scales_its_loss_and_resumes_with_its_scale(capsys):
    argv = [*POINTS, "--steps", "6", "--checkpoint-every", "3", "--amp", "fp16", "--out", "r"]
    assert train.main(argv) == 0
    state = runs.load_checkpoint("r")
    assert state["scaler"]["scale"] <= 65536 and state["options"]["amp"] == "fp16"
    Path(runs.checkpoints("r")[-1]).unlink()
    assert train.main(["--resume", "r"]) == 0
    assert runs.load_checkpoint("r")["scaler"] == state["scaler"]


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_sentence(monkeypatch, capsys):
    argv = [*POINTS, "--steps", "6", "--checkpoint-every", "3", "--out", "r"]
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        save(state, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(runs.torch, "save", full)
        assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "--resume" in error and error.count("\n") == 1
    assert [Path(p).name for p in runs.checkpoints("r")] == ["checkpoint-0000003.pt"]
    Path("file").write_text("")
    for out in ("file", "file/run"):
        assert train.main([*POINTS, "--steps", "2", "--out", out]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_keeps_averages_of_several_lengths(capsys):
    """The shorter one is nearer to the weights; each can be sampled from."""
    assert train.main([*POINTS, "--steps", "60", "--out", "r", "--ema-rampup", "1"]) == 0
    state = runs.load_checkpoint("r")
    away = [sum((state["model"][k] - average[k]).norm() ** 2 for k in average)
            for average in (state["ema"]["20000"], state["ema"]["100"])]
    assert away[0] > 2 * away[1] > 0
    short, _, _ = runs.load_run("r", weights="100")
    assert torch.equal(next(short.parameters()), next(iter(state["ema"]["100"].values())))
    with pytest.raises(runs.BadInput, match="--weights 7"):
        runs.load_run("r", weights="7")
