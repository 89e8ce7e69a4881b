"""Several ranks, accumulated gradients: the same run.  Processes with gloo, as torchrun's would be."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import objectives
import runs
import train

TINY = ["--data", "images.npz", "--cond", "--width", "8", "--mult", "1,1", "--blocks", "1",
        "--batch", "8", "--ref-batch", "16", "--sample-steps", "1", "--warmup", "0"]


pytestmark = pytest.mark.usefixtures("folder")


def rank(argv, env, double, out):
    """train.py as torchrun starts it; double: in float64, where nothing but the order rounds."""
    os.environ |= env
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(f"{out}.out", "w"), open(f"{out}.err", "w")
    if double:
        torch.set_default_dtype(torch.float64)
        train.save_samples = train.evaluate.report = lambda *given: None
        objectives.load_rows = lambda *given: datasets.load_rows(*given).double()
    status = train.main(argv)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def launch(world, argv, double=False, each=None):
    """Runs `world` ranks; their exit statuses, outputs and errors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "pytest"])      # imported once
    os.environ["PYTHONPATH"] = str(Path(train.__file__).parent)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for r in range(world):
        env = dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_PORT=port,
                   MASTER_ADDR="127.0.0.1") if world > 1 else {}
        processes.append(context.Process(target=rank, args=(
            each[r] if each else argv, env, double, f"rank{r}")))
    [p.start() for p in processes]
    [p.join(120) for p in processes]
    [p.kill() for p in processes if p.is_alive()]
    texts = [[Path(f"rank{r}.{kind}").read_text() for r in range(world)] for kind in ("out", "err")]
    return [p.exitcode for p in processes], *texts


@pytest.mark.parametrize("more", [[], ["--loss", "stf-taylor", "--switch-sigma", "0.3"],
                                  ["--loss", "sa", "--schedule", "ddpm", "--augment", "0.3"]],
                         ids=["stf", "stf-taylor", "sa"])
def test_any_number_of_ranks_and_parts_gives_the_same_weights_after_20_steps(more):
    """objectives.backward, float64: 1, 2, 4 ranks, with and without accumulation, to rtol 1e-5."""
    argv = [*TINY, *more, "--steps", "20", "--eval-every", "0", "--checkpoint-every", "20"]
    ways = [(1, []), (1, ["--micro-batch", "3"]), (2, []), (4, []), (2, ["--micro-batch", "2"])]
    for i, (world, parts) in enumerate(ways if not more else ways[::4]):
        status, _, errors = launch(world, [*argv, *parts, "--out", f"run{i}"], double=True)
        assert status == [0] * world, errors
        state = runs.load_checkpoint(f"run{i}")
        if i == 0:
            want = state
        for name, weight in want["model"].items():
            torch.testing.assert_close(state["model"][name], weight, rtol=1e-5, atol=1e-9)
        assert weight.dtype == torch.float64
        for name, weight in want["ema"]["500000"].items():
            torch.testing.assert_close(state["ema"]["500000"][name], weight, rtol=1e-5, atol=1e-9)


def test_two_ranks_log_draw_and_measure_as_one_does():
    """The whole command in float32: pictures, held-out errors, distances, log and messages."""
    argv = [*TINY, "--steps", "4", "--eval-every", "2", "--fid-every", "2", "--fid-num", "10"]
    status, out, errors = launch(2, [*argv, "--out", "two"])
    assert status == [0, 0], errors
    assert "on cpu x 2" in out[0] and out[1] == "" and errors == ["", ""]
    assert train.main([*argv, "--out", "one"]) == 0
    lines = [Path(run, "log.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*(map(json.loads, each) for each in lines)):
        assert a.keys() == b.keys()
        for key in set(a) - {"levels", "held_out"}:
            if isinstance(a[key], float):
                assert a[key] == pytest.approx(b[key], rel=1e-3)
        if "held_out" in a:
            assert a["held_out"]["ema"] == pytest.approx(b["held_out"]["ema"], rel=1e-3)
    one, two = (np.asarray(Image.open(f"{run}/samples-0000004.png")).astype(int)
                for run in ("one", "two"))
    assert abs(one - two).max() <= 1


def test_bad_input_is_told_once_and_ends_all():
    status, out, errors = launch(2, [*TINY, "--steps", "2", "--width", "7", "--out", "run"])
    assert status == [2, 2] and errors[0].count("\n") == 1 and errors[1] == ""
    status, out, errors = launch(2, None, each=[
        [*TINY, "--steps", "2", "--out", "run"], [*TINY, "--steps", "2", "--out", "run",
                                                  "--data", "nowhere.zip"]])
    assert status == [2, 2] and errors[0] == "" and "nowhere.zip" in errors[1]
    assert not Path("run").exists()
