"""Several ranks and micro-batches: the same run.  Processes with gloo, as torchrun starts them."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
import train
from test_evaluate import Small
from test_survival import interrupted, launch
from test_train import OBJECTIVES, POINTS, TINY, log, words
from train import Options

RANKS = TINY | dict(batch=8, ref_batch=16, warmup=0, cond=True)

pytestmark = pytest.mark.usefixtures("folder")


def train_all(runs):
    """Every run in float64, where sums in another order agree to 1e-16; data as well."""
    torch.set_default_dtype(torch.float64)
    to_float = evaluate.to_float
    evaluate.to_float = lambda x: to_float(x).double()
    for options in runs:
        train.run(Options(**options), brief=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def test_any_number_of_ranks_and_parts_gives_the_same_weights_after_20_steps():
    """1 to 4 ranks, every objective, to 1e-12; with dropout each part has masks of its own."""
    variants = [POINTS | dict(batch=8, cond=True, warmup=0) | more for more in OBJECTIVES]
    variants += [RANKS | dict(xflip=True, augment=0.5), RANKS | dict(dropout=0.13)]
    states = []
    for i, (world, part) in enumerate([(1, None), (1, 3), (2, 3), (3, 2), (4, None)]):
        runs = [given | dict(steps=20, micro_batch=part, out=f"{i}-{k}")
                for k, given in enumerate(variants)]
        status, _, errors = launch(train_all, runs, world)
        assert status == [0] * world, errors
        states.append([evaluate.load_checkpoint(run["out"]) for run in runs])
    for state in states[1:]:
        for given, want, found in zip(variants, states[0], state):
            kinds = [(want["model"], found["model"]),
                     *zip(want["ema"].values(), found["ema"].values())]
            away = max((a[name] - b[name]).abs().max() for a, b in kinds for name in a)
            assert away.dtype == torch.float64
            assert away > 1e-6 if "dropout" in given else away < 1e-12, (given, away)


def measure_colours(argv):
    """train.py, with the means of colours in the stead of Inception's features."""
    evaluate.Inception = Small
    return train.main(argv)


def test_two_ranks_log_draw_and_measure_as_one_does():
    """The whole command: pictures, held-out errors, distances, log and messages.

    Ranks have unequal shares of the 3 samples, and of the 3 and 37 rows of their floor.
    """
    Path("data").mkdir()
    torch.save(Small().state_dict(), Path("data", evaluate.INCEPTION))
    given = RANKS | dict(steps=4, eval_every=2, fid_every=4, fid_num=3, fid_features="inception")
    for world, out in ((1, "one"), (2, "two")):
        status, outputs, errors = launch(measure_colours, words(given | dict(out=out)), world)
        assert status == [0] * world and "Warning" not in "".join(errors), errors
    assert "on cpu x 2" in outputs[0] and outputs[1] == errors[1] == ""
    one, two = log("one"), log("two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert [line["step"] for line in one] == [1, 2, 2, 3, 4, 4, 4, 4]
    for a, b in zip(one, two):
        for name in set(a) & {"loss", "grad_norm", "fid_3", "floor"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3) and np.isfinite(a[name])
        if "held_out" in a:
            assert a["held_out"]["ema"] == pytest.approx(b["held_out"]["ema"], rel=1e-3)
    best = evaluate.load_checkpoint("two/best.pt")
    assert best["step"] == 4
    assert [best["best"]] == [line["fid_3"] for line in log("two", "fid_3")]
    pictures = (np.asarray(Image.open(f"{run}/samples-0000004.png")).astype(int)
                for run in ("one", "two"))
    assert abs(next(pictures) - next(pictures)).max() <= 1


def lose_the_data(argv):
    """train.py, whose last rank has no such file."""
    return train.main([*argv, "--data", "nowhere.zip"] if os.environ["RANK"] == "1" else argv)


def lose_the_losses(argv):
    """train.py, in which every loss is NaN in step 4, and from step 13 on."""
    calls, good = [], train.objective

    def objective(*given):
        calls.append(1)
        return good(*given) * (torch.nan if len(calls) > 12 or len(calls) == 4 else 1)
    train.objective = objective
    return train.main(argv)


def fill_the_disk(argv):
    """train.py, whose first rank finds no room for its checkpoint."""
    def full(*given):
        raise OSError(28, "No space left on device")
    torch.save = full
    return train.main(argv)


@pytest.mark.parametrize("work, more, sentence", [
    (train.main, "--width 7", "--width"), (train.main, "--batch 1", "--batch"),
    (lose_the_data, "", "nowhere.zip"), (fill_the_disk, "--checkpoint-every 1", "No space left"),
    (lose_the_losses, "--checkpoint-every 5", "ten steps in a row up to 22 had no finite loss or "
     "gradient; try a smaller --lr; the last good checkpoint: run/checkpoint-0000020.pt")])
def test_what_is_wrong_is_told_once_and_ends_all_ranks(work, more, sentence):
    """On both ranks or on one, before the first step or later; no process group is left behind."""
    argv = words(RANKS | dict(steps=30, out="run"))
    status, _, errors = launch(work, [*argv, *more.split()], 2)
    assert status == [2, 2], errors
    told, = [line for line in "".join(errors).splitlines() if not line.startswith("step: ")]
    assert told.startswith("train.py: ") and sentence in told


def test_a_signal_to_one_rank_ends_both_after_the_step_with_a_checkpoint():
    work = partial(interrupted, [signal.SIGINT])
    status, _, errors = launch(work, words(RANKS | dict(steps=30, out="run")), 2)
    assert status == [130, 130], errors
    assert evaluate.load_checkpoint("run")["step"] == 3
