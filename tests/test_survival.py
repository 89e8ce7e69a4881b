"""What a run outlives: kills, signals, full disks, losses that are not finite; and how it goes on.

`same` compares two runs bit for bit: weights, averages, AdamW's moments, the scaler, the counters,
and the control's coefficients.
"""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evaluate
import train
from schedules import EDM
from test_train import POINTS, TINY, log, refused, words
from train import Options

RUN = POINTS | dict(loss="taylor", ema=(20_000, 100), decay=0.0)

pytestmark = pytest.mark.usefixtures("folder")


def same(a, b):
    a, b = (evaluate.load_checkpoint(name) for name in (a, b))

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        return x == y
    names = set(a) - {"options"}
    assert names == {"step", "model", "ema", "optimizer", "scaler", "beta", "skipped", "best"}
    return all(equal(a[name], b[name]) for name in names)


def trained(out, **given):
    return train.run(Options(**RUN | given | dict(out=out)), brief=True)


def drop_newest(run):
    Path(evaluate.checkpoints(run)[-1]).unlink()


# ---- A process of its own ------------------------------------------------------------------------

def process(work, argv, env, name):
    """work(argv), as train.main or what calls it, in a process that is then at its end.

    Status 99: the process group of several ranks was left behind.
    """
    os.environ |= env
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(f"{name}.out", "w"), open(f"{name}.err", "w")
    status = 1
    try:
        status = work(argv)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(99 if dist.is_initialized() else status)


def start(work, argv, env={}, name="rank0"):
    """Starts such a process; what it says is in NAME.out and NAME.err."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "pytest"])           # imported once
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = context.Process(target=process, args=(work, argv, env, name))
    started.start()
    return started


def ended(started, name="rank0"):
    """Its exit status and what it said."""
    started.join(300)
    started.kill()
    return started.exitcode, Path(f"{name}.out").read_text(), Path(f"{name}.err").read_text()


def die_within(seconds, argv):
    """train.py, killed after so much of its own time, wherever it is then."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    return train.main(argv)


def die_instead_of_renaming(ending, count, argv):
    """train.py, killed when it would give the count-th file with this ending its name."""
    replace, left = os.replace, [count]

    def dying(old, new):
        left[0] -= str(new).endswith(ending)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    os.replace = dying
    return train.main(argv)


def test_twenty_kills_at_random_moments_change_nothing():
    """Half of them at any time, half in the midst of a checkpoint; a run that ends is the run."""
    given = words(RUN | dict(steps=60, checkpoint_every=3))
    assert train.main([*given, "--out", "whole"]) == 0
    whole = log("whole")
    draw, kills, finished = random.Random(0), 0, 0
    for _ in range(60):
        out = f"run{finished}"
        again = ["--resume", out] if Path(out, "options.json").exists() else [*given, "--out", out]
        work = partial(die_instead_of_renaming, ".pt", draw.randint(1, 6))
        if draw.random() < 0.5:
            work = partial(die_within, draw.uniform(0.01, 0.5))
        status, _, error = ended(start(work if kills < 20 else train.main, again))
        assert status in (0, -signal.SIGVTALRM, -signal.SIGKILL), error
        kills += status != 0
        if status == 0:
            assert same("whole", out) and log(out) == whole
            finished += 1
        if kills >= 20 and finished:
            return
    assert kills >= 20


def test_a_kill_before_the_options_are_written_does_not_block_the_folder(capsys):
    for out in (["--out", "run"], []):
        argv = [*words(RUN | dict(steps=1)), *out]
        kill = partial(die_instead_of_renaming, "options.json", 1)
        assert ended(start(kill, argv))[0] == -signal.SIGKILL
        refused(["--resume", *(["run"] if out else [])], capsys)
        assert train.main(argv) == 0


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(name, status):
    argv = words(RUN | dict(steps=100_000, checkpoint_every=100_000, out="run"))
    started = start(train.main, argv)
    while not Path("run/log.jsonl").exists() or not log("run"):
        time.sleep(0.02)
    os.kill(started.pid, getattr(signal, name))
    found, out, error = ended(started)
    assert found == status and "to go on: python train.py --resume run" in out, error
    step = evaluate.load_checkpoint("run")["step"]
    assert 0 < step < 100_000 and log("run")[-1]["step"] == step
    assert train.main(["--resume", "run", "--steps", str(step + 5)]) == 0
    trained("whole", steps=step + 5)
    assert same("run", "whole")


def sleep_in_step_3(argv):
    draw_batch = train.draw_batch

    def slow(*given):
        if given[-1] == 2:
            Path("asleep").touch()
            time.sleep(60)
        return draw_batch(*given)
    train.draw_batch = slow
    return train.main(argv)


def test_a_second_signal_stops_at_once_and_the_first_does_not():
    started = start(sleep_in_step_3, words(RUN | dict(steps=5, checkpoint_every=1, out="run")))
    while not Path("asleep").exists():
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGINT)
    started.join(0.5)
    assert started.exitcode is None
    os.kill(started.pid, signal.SIGINT)
    status, _, error = ended(started)
    assert status == 130 and "--resume goes on from the last checkpoint" in error
    assert evaluate.load_checkpoint("run")["step"] == 2


def test_a_run_in_a_thread_of_a_program_trains():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(trained, "run", steps=1).result() == "run"


# ---- Losses that are not finite ------------------------------------------------------------------

@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(broken, monkeypatch):
    """Steps 3 and 5 of 6 break: no weight, moment or counter of AdamW moves in them."""
    seen, good = [], train.objective

    def objective(options, denoiser, *given):
        seen.append([p.clone() for p in denoiser.parameters()])
        loss = good(options, denoiser, *given)
        if len(seen) not in (3, 5):
            return loss
        if broken == "loss":
            return torch.where(torch.arange(len(loss)) == 4, torch.nan, loss)
        return loss + 0 * sum((p.sum() * torch.inf).nan_to_num(0, 0) for p in denoiser.parameters())
    monkeypatch.setattr(train, "objective", objective)
    trained("r", loss="dsm", steps=6, warmup=0)
    moved = [not all(map(torch.equal, seen[i], seen[i + 1])) for i in range(5)]
    assert moved == [True, True, False, True, False]
    skipped = log("r", "skipped")
    assert [(line["step"], line["skipped"]) for line in skipped] == [(3, 1), (5, 2)]
    assert [line["step"] for line in log("r", "loss")] == [1, 2, 4, 6]
    state = evaluate.load_checkpoint("r")
    assert state["skipped"] == [2, 0]
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {4.0}
    rows, (_, options) = torch.from_numpy(evaluate.load_data("two-gaussians").x), \
        evaluate.load_run("r")
    sigma = train.draw_batch(rows, None, options, EDM(), 2).sigma.flatten()
    bad = sigma[4:5] if broken == "loss" else sigma         # of the gradient it may be any sample
    assert skipped[0]["sigma"] == pytest.approx([bad.min().item(), bad.max().item()])


def test_ten_such_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(monkeypatch,
                                                                                capsys):
    calls, good = [], train.objective

    def objective(*given):
        calls.append(1)
        return good(*given) * (torch.nan if len(calls) > 12 or len(calls) == 4 else 1)
    monkeypatch.setattr(train, "objective", objective)
    argv = words(RUN | dict(loss="dsm", steps=100, checkpoint_every=5, out="r"))
    error = refused(argv, capsys)
    assert "ten steps in a row up to 22" in error and "r/checkpoint-0000020.pt" in error


# ---- Going on ------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    dict(loss="taylor"), dict(amp="fp16"), dict(checkpoint_every=20),
    TINY | dict(cond=True, dropout=0.3, label_dropout=0.2, xflip=True, augment=0.5)],
    ids=["control", "fp16", "before the first checkpoint", "images"])
def test_ten_steps_are_five_and_five_bit_for_bit(more):
    """The log as well; control's 30 steps have its coefficient updated twice."""
    steps = 30 if more == dict(loss="taylor") else 10
    trained("whole", **dict(loss="stf", steps=steps, checkpoint_every=steps // 2) | more)
    shutil.copytree("whole", "killed")                      # killed between these two checkpoints
    drop_newest("killed")
    train.run(train.resumed("killed", {}), "killed", brief=True)
    assert same("whole", "killed") and log("whole") == log("killed")
    assert [line["step"] for line in log("killed", "loss")] == list(range(1, steps + 1))
    state = evaluate.load_checkpoint("whole")
    if steps == 30:
        assert state["beta"].any()
    if more == dict(amp="fp16"):
        assert state["scaler"]["scale"] <= 65536 and state["options"]["amp"] == "fp16"


@pytest.mark.parametrize("left", ["nothing", "half of it", "all"])
def test_a_run_killed_at_its_report_has_exactly_one_when_it_has_gone_on(left, capsys):
    assert train.main(words(RUN | dict(steps=2, out="run"))) == 0
    want, path = capsys.readouterr().out.split("minutes")[1], Path("run/log.jsonl")
    *lines, report = path.read_text().splitlines(keepends=True)
    length = {"nothing": 0, "half of it": 50, "all": None}[left]
    path.write_text("".join(lines) + report[:length])
    Path("run/samples-0000002.png").unlink()
    assert train.main(["--resume", "run"]) == 0
    assert capsys.readouterr().out.split("minutes")[1] == want
    assert path.read_text().splitlines(keepends=True) == [*lines, report]
    assert Path("run/samples-0000002.png").exists()


def test_a_run_goes_on_with_its_data_at_another_path_and_with_no_other_data(capsys):
    given = TINY | dict(loss="dsm", cond=True, decay=0.0, out="run")
    assert train.main(words(given | dict(steps=2))) == 0
    os.rename("images.npz", "moved.npz")
    assert "images.npz" in refused(["--resume", "run", "--steps", "3"], capsys)
    assert evaluate.main(["levels", "run", "--data", "moved.npz"]) == 0
    assert train.main(["--resume", "run", "--data", "moved.npz", "--steps", "3"]) == 0
    assert train.main(["--resume", "run", "--steps", "4"]) == 0               # the path is kept
    assert train.main(words(given | dict(steps=4, data="moved.npz", out="whole"))) == 0
    assert same("run", "whole")
    with np.load("moved.npz") as kept:
        np.savez("images.npz", images=kept["images"], labels=1 - kept["labels"])
    error = refused(["--resume", "run", "--data", "images.npz", "--steps", "5"], capsys)
    assert "other data" in error


def test_resume_refuses_what_would_not_be_the_same_run(capsys):
    trained("run", steps=2)
    kept = {path: path.read_bytes() for path in Path("run").iterdir()}
    for line, sentence in [("--lr 1", "--lr 1.0 (was 0.005)"), ("--steps 1", "--steps"),
                           ("--loss dsm", "--loss dsm (was taylor)"),
                           ("--out other", "--out other"),
                           ("--data ring", "other data"), ("--device abacus", "--device"),
                           ("--micro-batch 0", "--micro-batch"), ("--keep 0", "--keep")]:
        argv = ["--resume", "run", "--steps", "3", *line.split()]
        assert sentence in refused(argv, capsys)
        assert {path: path.read_bytes() for path in Path("run").iterdir()} == kept
    assert train.main(["--resume", "run", "--steps", "3", "--lr", "0.005"]) == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used_once_it_is_gone(capsys):
    trained("run", steps=4, checkpoint_every=2)
    path = Path(evaluate.checkpoints("run")[-1])
    for damage in (path.read_bytes()[:100], b"", b"\0" * 1000):
        path.write_bytes(damage)
        assert str(path) in refused(["--resume", "run", "--steps", "5"], capsys)
    path.unlink()
    assert train.main(["--resume", "run", "--steps", "4"]) == 0
    trained("whole", steps=4)
    assert same("run", "whole")


def test_resume_without_a_name_takes_the_run_that_was_started_last(capsys):
    """And the steps of the minutes that it tells are those since it went on."""
    for k in range(2):
        train.run(Options(**RUN | dict(steps=1)), brief=True)
    os.utime("runs/001-two-gaussians-taylor-edm/options.json", (1, 1))
    assert train.main(["--resume", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "run       runs/000-two-gaussians-taylor-edm, from step 1" in out
    assert "\n1 steps in " in out


# ---- Disks and folders ---------------------------------------------------------------------------

def test_a_full_disk_is_one_sentence_and_the_last_whole_checkpoint_stays(monkeypatch, capsys):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        save(state, file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    argv = words(RUN | dict(steps=6, checkpoint_every=3, out="r"))
    assert "No space left" in refused(argv, capsys)
    assert [Path(p).name for p in evaluate.checkpoints("r")] == ["checkpoint-0000003.pt"]
    assert train.main(["--resume", "r"]) == 0
    Path("file").write_text("")
    for out in ("file", "file/run"):
        refused([*argv, "--out", out], capsys)


def test_a_second_process_on_one_run_is_refused(capsys):
    trained("run", steps=2)
    with open("run/.lock.part", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in refused(["--resume", "run", "--steps", "3"], capsys)
    assert train.main(["--resume", "run", "--steps", "3"]) == 0


def test_two_starts_at_once_get_two_folders(monkeypatch):
    """The second one looks before the first one has made its folder."""
    folders = [train.run(Options(**RUN | dict(steps=1)), brief=True)]
    monkeypatch.setattr(os, "listdir", lambda path: [])
    folders.append(train.run(Options(**RUN | dict(steps=1)), brief=True))
    assert folders == [f"runs/{k:03d}-two-gaussians-taylor-edm" for k in (0, 1)]
