"""What a run outlives: kills, signals, losses that are not finite; and how it goes on."""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import evaluate
import train
from test_train import POINTS, TINY, log, refused, trained, words

RUN = POINTS | dict(loss="taylor", ema=(20_000, 100), decay=0.0)

pytestmark = pytest.mark.usefixtures("folder")


def assert_same(*runs):
    """Two runs have the same weights, averages, moments of AdamW, and all else, by bits."""
    a, b = (evaluate.load_checkpoint(run) | dict(options=None) for run in runs)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def go_on(run):
    train.run(train.resumed(run, {}), run, brief=True)


# ---- Processes of their own ----------------------------------------------------------------------

def process(work, argv, env, name):
    """work(argv) in a process that is then at its end.

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


def launch(work, argv, world=1):
    """work(argv), which calls train.main, on so many ranks: their statuses, outputs and errors."""
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["train", "torch._dynamo", "pytest"])           # imported once
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for r in range(world):
        env = dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_PORT=port,
                   MASTER_ADDR="127.0.0.1") if world > 1 else {}
        started.append(context.Process(target=process, args=(work, argv, env, f"rank{r}")))
        started[-1].start()
    for one in started:
        one.join(300)
        one.kill()
    said = [[Path(f"rank{r}.{end}").read_text() for r in range(world)] for end in ("out", "err")]
    return [one.exitcode for one in started], *said


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
    while kills < 20 or not finished:
        out = f"run{finished}"
        again = ["--resume", out] if evaluate.checkpoints(out) else [*given, "--out", out]
        work = partial(die_instead_of_renaming, ".pt", draw.randint(1, 6))
        if draw.random() < 0.5:
            work = partial(die_within, draw.uniform(0.01, 0.5))
        (status,), _, error = launch(work if kills < 20 else train.main, again)
        assert status in (0, -signal.SIGVTALRM, -signal.SIGKILL), error
        kills += status != 0
        if status == 0:
            assert_same("whole", out)
            assert log(out) == whole
            finished += 1


def test_a_kill_before_the_options_are_written_does_not_block_the_folder(capsys):
    argv = words(RUN | dict(steps=1, out="run"))
    kill = partial(die_instead_of_renaming, "options.json", 1)
    assert launch(kill, argv)[0] == [-signal.SIGKILL]
    Path("run/samples-0000001.png").touch()              # of a run with --sample-every 1
    refused(["--resume", "run"], capsys)
    assert train.main(argv) == 0


def interrupted(numbers, argv):
    """train.py, which gets these signals in step 3; of two ranks the last one gets them."""
    draw_batch = train.draw_batch

    def draw(*given):
        if given[-1] == 2 and os.environ.get("RANK") != "0":
            for number in numbers:
                os.kill(os.getpid(), number)
        return draw_batch(*given)
    train.draw_batch = draw
    return train.main(argv)


@pytest.mark.parametrize("numbers, status, step, sentence", [
    ([signal.SIGINT], 130, 3, "to go on: python train.py --resume run"),
    ([signal.SIGTERM], 143, 3, "to go on: python train.py --resume run"),
    ([signal.SIGINT] * 2, 130, 2, "train.py: stopped")])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_and_a_second_one_stops_at_once(
        numbers, status, step, sentence):
    argv = words(RUN | dict(steps=5, checkpoint_every=2, out="run"))
    found, (out,), (error,) = launch(partial(interrupted, numbers), argv)
    assert found == [status] and sentence in out + error, error
    assert evaluate.load_checkpoint("run")["step"] == log("run")[-1]["step"] == step
    go_on("run")
    trained("whole", RUN, steps=5)
    assert_same("run", "whole")


def test_a_run_in_a_thread_of_a_program_trains():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(trained, "run", RUN, steps=1).result() == "run"


# ---- Losses that are not finite ------------------------------------------------------------------

@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(broken, monkeypatch):
    """Steps 3 and 5 of 6 break: no weight, moment or counter of AdamW moves in them.

    The root of |p - p| is 0, and its gradient is NaN.
    """
    seen, good = [], train.objective

    def objective(options, denoiser, *given):
        seen.append([p.clone() for p in denoiser.parameters()])
        loss = good(options, denoiser, *given)
        if len(seen) not in (3, 5):
            return loss
        if broken == "loss":
            return torch.where(torch.arange(len(loss)) == 4, torch.nan, loss)
        return loss + sum((p - p.detach()).abs().sqrt().sum() for p in denoiser.parameters())
    monkeypatch.setattr(train, "objective", objective)
    trained("r", RUN, loss="dsm", steps=6, warmup=0)
    moved = [not all(map(torch.equal, seen[i], seen[i + 1])) for i in range(5)]
    assert moved == [True, True, False, True, False]
    skipped = log("r", "skipped")
    assert [(line["step"], line["skipped"]) for line in skipped] == [(3, 1), (5, 2)]
    assert [line["step"] for line in log("r", "loss")] == [1, 2, 4, 6]
    state = evaluate.load_checkpoint("r")
    assert state["skipped"] == [2, 0]
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {4.0}


# ---- Going on ------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    dict(loss="taylor", steps=30, checkpoint_every=15), dict(amp="fp16"),
    TINY | dict(cond=True, dropout=0.3, label_dropout=0.2, xflip=True, augment=0.5)],
    ids=["control", "fp16", "images"])
def test_ten_steps_are_five_and_five_bit_for_bit(more):
    """The log as well; control's 30 steps have its coefficient updated twice."""
    given = RUN | dict(loss="stf", steps=10, checkpoint_every=5) | more
    trained("whole", given)
    shutil.copytree("whole", "killed")                      # killed between these two checkpoints
    Path(evaluate.checkpoints("killed")[-1]).unlink()
    go_on("killed")
    assert_same("whole", "killed")
    assert log("whole") == log("killed")
    assert given["loss"] != "taylor" or evaluate.load_checkpoint("whole")["beta"].any()


@pytest.mark.parametrize("left", [0, 50, None], ids=["nothing", "half of it", "all"])
def test_a_run_killed_at_its_report_has_exactly_one_when_it_has_gone_on(left, capsys):
    assert train.main(words(RUN | dict(steps=2, out="run"))) == 0
    want, path = capsys.readouterr().out.split("minutes")[1], Path("run/log.jsonl")
    *lines, report = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + report[:left])
    Path("run/samples-0000002.png").unlink()
    assert train.main(["--resume", "run"]) == 0
    assert capsys.readouterr().out.split("minutes")[1] == want
    assert path.read_text().splitlines(keepends=True) == [*lines, report]
    assert Path("run/samples-0000002.png").exists()


def test_a_run_goes_on_with_its_data_at_another_path(capsys):
    given = TINY | dict(loss="dsm", cond=True, decay=0.0, out="run")
    assert train.main(words(given | dict(steps=2))) == 0
    os.rename("images.npz", "moved.npz")
    assert "images.npz" in refused(["--resume", "run", "--steps", "3"], capsys)
    assert evaluate.main(["levels", "run", "--data", "moved.npz"]) == 0
    assert train.main(["--resume", "run", "--data", "moved.npz", "--steps", "3"]) == 0
    assert train.main(["--resume", "run", "--steps", "4"]) == 0               # the path is kept
    assert train.main(words(given | dict(steps=4, data="moved.npz", out="whole"))) == 0
    assert_same("run", "whole")


def test_resume_without_a_name_takes_the_run_that_was_started_last(capsys):
    """A run without a checkpoint is passed over.  "N steps in" counts those since it went on."""
    for _ in range(3):
        newest = trained(None, RUN, steps=1)
    Path(evaluate.checkpoints(newest)[-1]).unlink()
    os.utime("runs/001-two-gaussians-taylor-edm/options.json", (1, 1))
    assert train.main(["--resume", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "run       runs/000-two-gaussians-taylor-edm, from step 1" in out
    assert "\n1 steps in " in out


# ---- Folders -------------------------------------------------------------------------------------

HOLD = """
import fcntl
file = open("run/.lock.part", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
input(print(flush=True))
"""


def test_a_second_process_on_one_run_is_refused(capsys):
    """And this process is not kept out by a lock of its own, as of a run that failed."""
    trained("run", RUN, steps=2)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1) as other:
        other.stdout.readline()                                        # it has the lock
        assert "another process" in refused(["--resume", "run", "--steps", "3"], capsys)
        other.communicate(b"\n")
    with open("run/.lock.part", "a") as own:
        fcntl.lockf(own, fcntl.LOCK_EX)
        assert train.main(["--resume", "run", "--steps", "3", "--lr", "0.005"]) == 0  # as it was


def test_two_starts_at_once_get_two_folders(monkeypatch):
    """The second one looks before the first one has made its folder."""
    folders = [trained(None, RUN, steps=1)]
    monkeypatch.setattr(os, "listdir", lambda path: [])
    folders.append(trained(None, RUN, steps=1))
    assert folders == [f"runs/{k:03d}-two-gaussians-taylor-edm" for k in (0, 1)]
