"""train.py: a batch is a function of (seed, step), a resumed run is the run, bad input is cheap."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import losses
import objectives
import runs
import train
from losses import WEIGHTS
from schedules import SCHEDULES

TINY = ["--width", "8", "--mult", "1,1", "--blocks", "1", "--batch", "4", "--ref-batch", "8",
        "--sample-steps", "1"]
POINTS = ["--data", "two-gaussians", "--width", "16", "--batch", "16", "--ref-batch", "32",
          "--sample-steps", "2"]


pytestmark = pytest.mark.usefixtures("folder")


def options(argv, data="images.npz"):
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args(argv)).items()}
    data = datasets.load_data(data)
    return train.resolve(given, data), data


def batch(argv, step):
    o, data = options(argv)
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    schedule = runs.build_schedule(o)
    return objectives.draw_batch(torch.from_numpy(data.x), labels, o, schedule, step)


def test_batch_is_a_pure_function_of_seed_and_step():
    argv = ["--batch", "8", "--ref-batch", "16", "--xflip", "--cond"]
    first, again, other = batch(argv, 3), batch(argv, 3), batch(argv, 4)
    drawn = [name for name, value in first.items() if value is not None]
    assert {"x0", "noise", "sigma", "reference", "labels", "uniform"} <= set(drawn)
    assert all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert not torch.equal(first["noise"], batch([*argv, "--seed", "1"], 3)["noise"])


@pytest.mark.parametrize("n", [20, 40])
def test_source_is_in_its_reference_and_rows_do_not_repeat(n):
    """n = 40 is the whole set, once, as it lies; its images stay uint8 until they are used."""
    b = batch(["--batch", "8", "--ref-batch", str(n), "--cond", "--holdout", "0"], 0)
    x0, noise, sigma, raw = (b[name] for name in ("x0", "noise", "sigma", "reference"))
    reference = next(losses.rows(raw, x0)).view_as(raw)
    distance, k = (x0.flatten(1)[:, None] - reference.flatten(1)).abs().amax(-1).min(1)
    assert (distance == 0).all() and raw.dtype == torch.uint8 and len(raw) == n
    assert torch.equal(b["reference_labels"][k], b["labels"])
    assert len(torch.unique(raw.flatten(1), dim=0)) == n
    assert noise.shape == x0.shape and sigma.shape == (8, 1, 1, 1) and (sigma > 0).all()
    assert x0.min() >= -1 and x0.max() <= 1 and x0.dtype == torch.float32


def test_a_batch_larger_than_the_set_still_has_its_sources():
    b = batch(["--batch", "64", "--ref-batch", "8"], 0)
    assert torch.equal(next(losses.rows(b["reference"], b["x0"])), b["x0"].flatten(1))
    assert len(b["x0"]) == 64


def test_xflip_mirrors_about_half_and_the_reference_with_it():
    plain, mirrored = (batch(["--batch", "40", *flip], 0)["x0"] for flip in ([], ["--xflip"]))
    same = (plain == mirrored).flatten(1).all(1)
    assert torch.equal(torch.where(same[:, None, None, None], plain, plain.flip(-1)), mirrored)
    assert 10 <= same.sum() <= 30


def test_rows_held_out_are_not_trained_on():
    """Every 4th of 42 rows, 10 of them; built-in sets draw fresh rows, which are in no batch."""
    rows = datasets.training_rows(42, 4)
    assert sorted([*rows.tolist(), *range(3, 42, 4)]) == list(range(42))
    o, data = options(["--holdout", "4", "--data", "images.npz"])
    held, _ = runs.held_out(data, o)
    seen = [losses.rows(batch(["--holdout", "4", "--ref-batch", "30"], s)["reference"], held)
            for s in range(3)]
    near = torch.cdist(held.flatten(1), torch.cat([next(r) for r in seen])).min(1).values
    assert held.shape == (10, 3, 8, 8) and near.min() > 0.1
    o, data = options(["--data", "two-gaussians"], "two-gaussians")
    held, _ = runs.held_out(data, o)
    assert not set(map(tuple, held.tolist())) & set(map(tuple, data.x.tolist()))
    assert held.shape == (1000, 2)


@pytest.mark.parametrize("loss", ["dsm", "antithetic", "taylor", "stf-taylor", "sa"])
def test_every_loss_sees_the_same_images_noise_and_sigma(loss):
    argv = ["--batch", "8", "--xflip"]
    stf, other = batch(argv, 5), batch([*argv, "--loss", loss], 5)
    assert torch.equal(stf["x0"], other["x0"])
    if loss != "sa":                                           # which has K levels of a ladder
        assert torch.equal(stf["noise"], other["noise"])
        assert torch.equal(stf["sigma"], other["sigma"])


def test_sa_batch_is_k_consecutive_levels_of_the_ladder_and_masked_below():
    argv = ["--batch", "8", "--loss", "sa", "--K", "3", "--schedule", "ddpm"]
    o, data = options(argv)
    schedule = runs.build_schedule(o)
    b = objectives.draw_batch(torch.from_numpy(data.x), None, o, schedule, 0)
    assert b["noise"].shape == (3, 8, 3, 8, 8) and b["sigma"].shape == b["tau"].shape == (
        3, 8, 1, 1, 1)
    level = (schedule.levels - b["sigma"].double().view(3, 8, 1)).abs().argmin(-1)
    assert (level[0] - level[1] == 1).all() and (level[1] - level[2] == 1).all()
    assert (b["tau"] == 1).all() and b["noise"][0].var() == pytest.approx(1, abs=0.1)
    alike = [(noise[0] * noise[1]).mean() for noise in (b["noise"], objectives.draw_batch(
        torch.from_numpy(data.x), None, o | {"level-noise": "path"}, schedule, 0)["noise"])]
    assert abs(alike[0]) < 0.1 and alike[1] > 0.9
    schedule.training_sigma = lambda _: schedule.levels[:1].repeat(8)            # t = 1
    b = objectives.draw_batch(torch.from_numpy(data.x), None, o, schedule, 0)
    assert b["tau"].view(3, 8)[:, 0].tolist() == [1, 0, 0] and (b["sigma"] == b["sigma"][0]).all()


@pytest.mark.parametrize("how", ["stratified", "antithetic"])
def test_sigma_draws_keep_the_distribution_and_cover_it(how):
    """Each of 8 strata holds one sigma; antithetic quantiles are u and 1 - u."""
    argv = ["--batch", "8", "--sigma-draw", how, "--P-mean", "0", "--P-std", "1"]
    everything = []
    for step in range(200):
        u = torch.special.ndtr(batch(argv, step)["sigma"].flatten().double().log())
        everything.append(u)
        if how == "stratified":
            assert (u * 8).floor().sort().values.tolist() == list(range(8))
        else:
            torch.testing.assert_close(u[4:], 1 - u[:4], rtol=0, atol=1e-6)
    everything = torch.cat(everything)
    assert abs(everything.mean() - 0.5) < 0.03 and abs(everything.var() - 1 / 12) < 0.006


def test_switch_parts_the_batch_by_noise_level():
    b = batch(["--batch", "40", "--loss", "stf-taylor", "--switch-sigma", "0.3", "--cond"], 0)
    low, high = objectives.part(b, b["low"]), objectives.part(b, ~b["low"])
    assert (low["sigma"] < 0.3).all() and (high["sigma"] >= 0.3).all()
    assert 0 < len(low["x0"]) < 40 and len(low["x0"]) + len(high["x0"]) == 40
    assert len(low["labels"]) == len(low["x0"]) and low["reference"] is b["reference"]


def test_generator_tells_seeds_steps_and_streams_apart():
    draws = {float(torch.rand(1, generator=objectives.generator(*key)))
             for key in [(0, 0, 0), (0, 0, 1), (0, 0, 3), (0, 1, 0), (1, 0, 0), (2 ** 31, 0, 0)]}
    assert len(draws) == 6


def test_learning_rate_rises_stays_and_falls():
    o = dict(lr=1.0, warmup=10, decay=0.5, steps=100)
    rate = [objectives.learning_rate(o, step) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9:50] == [1.0] * 41
    assert rate[75] == pytest.approx(0.5) and rate[99] == pytest.approx(0.02)
    assert objectives.learning_rate(dict(o, decay=0.0), 99) == 1.0


def states(run):
    return [torch.load(p, weights_only=True) for p in runs.checkpoints(run)]


@pytest.mark.parametrize("extra", [[], ["--dropout", "0.3", "--cond", "--label-dropout", "0.2",
                                        "--xflip"]])
def test_ten_steps_are_five_and_five_bit_for_bit(extra, capsys):
    argv = ["--data", "images.npz", *TINY, "--steps", "10", "--checkpoint-every", "5", *extra]
    assert train.main([*argv, "--out", "whole"]) == 0
    shutil.copytree("whole", "killed")                      # killed between steps 5 and 10
    Path(runs.checkpoints("killed")[-1]).unlink()
    assert train.main(["--resume", "killed"]) == 0
    whole, killed = states("whole")[-1], states("killed")[-1]
    assert whole["step"] == killed["step"] == 10
    for a, b in ((whole["model"], killed["model"]), (whole["ema"]["500000"], killed["ema"]["500000"])):
        assert all(torch.equal(a[k], b[k]) for k in a)
    for a, b in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    log = [Path(run, "log.jsonl").read_text().splitlines()[:10] for run in ("whole", "killed")]
    assert log[0] == log[1] and [json.loads(line)["step"] for line in log[0]] == list(range(1, 11))
    assert Path("whole/samples-0000010.png").read_bytes() == \
        Path("killed/samples-0000010.png").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_again(capsys):
    argv = [*POINTS, "--steps", "4", "--out", "whole"]
    assert train.main(argv) == 0
    shutil.copytree("whole", "killed")
    Path(runs.checkpoints("killed")[-1]).unlink()
    assert train.main(["--resume", "killed"]) == 0
    a, b = states("whole")[-1]["model"], states("killed")[-1]["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_are_plain_tensors_whole_and_two(capsys):
    assert train.main([*POINTS, "--steps", "6", "--checkpoint-every", "2", "--out", "run"]) == 0
    names = sorted(p.name for p in Path("run").iterdir() if p.name != "where-stf-acts.png")
    assert names == ["checkpoint-0000004.pt", "checkpoint-0000006.pt", "log.jsonl", "options.json",
                     "samples-0000006.png"]
    state = states("run")[-1]
    assert set(state) == {"step", "options", "model", "ema", "optimizer", "scaler", "beta", "skipped",
                          "best"}
    assert json.loads(json.dumps(state["options"])) == state["options"]
    assert json.loads(Path("run/options.json").read_text()) == state["options"]


@pytest.mark.parametrize("argv", ["", "--cond", "--xflip", "--cond --xflip --augment 0.3",
                                  "--no-mean-correction"])
def test_stable_targets_of_a_run_are_unbiased_and_their_batch_mean_is_corrected(argv):
    """E[target - x0] = 0 over 600 batches at high noise; by the way, how much its mean varies."""
    argv = ["--batch", "8", "--ref-batch", "16", "--P-mean", "3", "--P-std", "0.5", *argv.split()]
    o, data = options(argv)
    pixels, labels = torch.from_numpy(data.x), torch.from_numpy(data.labels)
    schedule, tools = runs.build_schedule(o), objectives.build_tools(pixels, labels, o)
    error, varies = [], []
    for step in range(300 if o["augment"] else 600):
        b = objectives.draw_batch(pixels, labels, o, schedule, step)
        target = objectives.stable_target(b, tools, b["x0"] + b["sigma"] * b["noise"], b["sigma"])
        error.append((target - b["x0"]).mean(0).flatten())
        varies.append(target.mean(0).flatten())
    error, varies = torch.stack(error), torch.stack(varies)
    z = error.mean(0) / error.std(0) * len(error) ** 0.5
    assert 0.7 < (z ** 2).mean() < 1.35
    spread = varies.var(0).mean() / (pixels / 127.5 - 1).var(0).mean() * 16
    assert spread > 0.4 if not o["mean-correction"] else spread < 0.15


@pytest.mark.parametrize("argv", ["", "--xflip", "--cond"])
def test_a_runs_correction_has_mean_zero_given_its_sources(argv):
    """Over 4,000 references around the same source, mirrored or not."""
    o, data = options(["--batch", "4", "--ref-batch", "8", *argv.split()])
    pixels, labels = torch.from_numpy(data.x), torch.from_numpy(data.labels)
    correction, g = objectives.build_tools(pixels, labels, o)["correction"], torch.Generator()
    x = datasets.load_rows(pixels, torch.arange(40), None, "cpu")
    source = x[:1].flip(-1) if o["xflip"] else x[:1]
    total, square = 0, 0
    for seed in range(4000):
        others = 1 + torch.randperm(39, generator=g.manual_seed(seed))[:4]
        flip = torch.rand(4, generator=g) < 0.5 if o["xflip"] else None
        rows = datasets.load_rows(pixels, others, flip, "cpu")
        key = (labels[:1], torch.cat([labels[:1], labels[others]])) if o["cond"] else (None, None)
        b = dict(source=source, sigma=torch.full((1, 1, 1, 1), 50.0), labels=key[0],
                 reference=torch.cat([source, rows]), reference_labels=key[1])
        total, square = total + correction(b), square + correction(b) ** 2
    z = total / square.sqrt()
    assert square.sum() > 0 and (z ** 2).mean() < 1.5


LOSSES = train.OPTIONS["loss"][0]


def three_steps(argv, data="images.npz"):
    """The losses of three steps, each (B,), as train.train makes them."""
    o, data = options(argv, data)
    pixels = torch.from_numpy(np.asarray(data.x))
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    torch.manual_seed(0)
    denoiser, schedule = runs.build_denoiser(o), runs.build_schedule(o)
    tools, losses = objectives.build_tools(pixels, labels, o), []
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    for step in range(3):
        b = objectives.draw_batch(pixels, labels, o, schedule, step)
        losses.append(objectives.objective(o, denoiser, b, tools))
        optimizer.zero_grad()
        losses[-1].mean().backward()
        gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
        optimizer.step()
        if tools["beta"]:
            objectives.update_beta(o, denoiser, b, tools, step)
            assert tools["beta"].sums.isfinite().all() and tools["beta"].sums[2].sum() > 0
    assert all(x.shape == (o["batch"],) and x.isfinite().all() for x in losses)
    return losses


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("weight", ["schedule", *WEIGHTS])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_weight_and_schedule_run_three_steps(loss, weight, schedule):
    three_steps([*POINTS, "--loss", loss, "--weight", weight, "--schedule", schedule],
                "two-gaussians")


@pytest.mark.parametrize("target", ["eps", "x0", "v", "F"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_target_run_on_images_with_classes_augmented_and_dropout(loss, target):
    argv = [*TINY, "--cond", "--loss", loss, "--target", target, "--augment", "0.5", "--xflip",
            "--dropout", "0.1", "--label-dropout", "0.2"]
    if "taylor" in loss and target == "x0":
        with pytest.raises(datasets.BadInput, match="holds no noise"):
            three_steps(argv)
    else:
        three_steps(argv)


@pytest.mark.parametrize("more", [
    "--loss sa --K 4 --level-noise path --tau window", "--loss sa --K 3 --lam 0.7 --tau paper",
    "--loss taylor --order 1", "--loss taylor --order 2", "--loss stf-taylor --order 1",
    "--loss stf-taylor --control atoms --atoms 3", "--loss stf --no-mean-correction",
    "--loss stf-taylor --switch-sigma 100", "--loss stf-taylor --switch-sigma 1e-6"])
def test_variants_of_the_losses_run_on_images(more):
    three_steps([*TINY, "--cond", *more.split()])


def test_exact_trace_runs_on_points():
    three_steps([*POINTS, "--loss", "taylor", "--order", "2", "--trace", "exact"], "two-gaussians")


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_from_end_to_end_in_every_schedule(loss, schedule, capsys):
    assert train.main([*POINTS, "--loss", loss, "--schedule", schedule, "--steps", "3"]) == 0
    losses = [json.loads(line)["loss"] for line in
              Path(f"runs/000-two-gaussians-{loss}/log.jsonl").read_text().splitlines()[:3]]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize("argv, sentence", [
    ("--loss dsm --K 3", "--K belongs to --loss sa"),
    ("--loss sa --no-mean-correction", "--mean-correction belongs to --loss stf and stf-taylor"),
    ("--loss stf --order 1", "--order belongs to --loss taylor and stf-taylor"),
    ("--loss sa --K 1001", "--K: the ladder has 1000 levels"),
    ("--loss stf-taylor --control atoms --switch-sigma 1", "belongs to --control switch"),
    ("--loss stf-taylor --atoms 2", "--atoms belongs to --control atoms"),
    ("--loss taylor --trace exact", "--trace belongs to --order 1 or 2"),
    ("--schedule ddpm --P-mean 0", "--P-mean and --P-std belong to --schedule edm"),
    ("--loss sa --lam inf", "inf is not at least 0"), ("--switch-sigma 0", "not a number above 0"),
    ("--batch 3000000000", "not within [1, 65536]"), ("--init nowhere", "nowhere"),
    ("--loss stf-taylor --control atoms --order 1", "--control atoms has order 0 only"),
    ("--loss stf-taylor --control atoms --augment 0.1", "--control atoms would have to augment"),
    ("--data two-gaussians --augment 0.1", "--augment: its transforms are for images")])
def test_combinations_without_meaning_are_refused_with_a_reason(argv, sentence, capsys):
    argv = argv if "--data" in argv else "--data images.npz " + argv
    assert train.main([*argv.split(), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not Path("runs").exists()


def test_stf_taylor_switched_off_is_stf_and_stf_on_one_image_is_dsm():
    stf = three_steps([*TINY, "--loss", "stf"])
    switched = three_steps([*TINY, "--loss", "stf-taylor", "--switch-sigma", "1e-9"])
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(stf, switched))
    np.savez("same.npz", images=np.repeat(np.load("images.npz")["images"][:1], 8, 0))
    stf, dsm = (three_steps([*TINY, "--loss", loss], "same.npz") for loss in ("stf", "dsm"))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(stf, dsm))


def test_init_takes_network_and_noise_levels_of_the_run_and_its_data(capsys):
    """So that the hint "train.py --head npr --init RUN" is enough; the trunk stays bit for bit."""
    argv = [*POINTS, "--schedule", "vp", "--loss", "dsm", "--steps", "5", "--out", "first"]
    assert train.main(argv) == 0
    assert train.main(["--head", "npr", "--init", "first", "--steps", "5", "--warmup", "0",
                       "--sample-steps", "1", "--weight-decay", "50", "--out", "head"]) == 0
    assert "loss      head-npr, schedule vp" in capsys.readouterr().out
    first, head = states("first")[-1], states("head")[-1]
    assert head["options"]["schedule"] == "vp" and head["options"]["data"] == "two-gaussians"
    for name, weight in first["ema"]["20000"].items():
        assert torch.equal(weight, head["ema"]["20000"][name])
        assert torch.equal(weight, head["model"][name])
    for change in (["--schedule", "edm"], ["--target", "x0"], ["--width", "8"]):
        assert train.main(["--head", "npr", "--init", "first", *change]) == 2
        assert "--init first: cannot change" in capsys.readouterr().err
    assert train.main(["--head", "npr", "--init", "first", "--loss", "stf"]) == 2
    assert train.main(["--data", "images.npz", "--init", "first"]) == 2
    assert capsys.readouterr().err.count("\n") == 2 and not Path("runs").exists()


def test_a_resumed_run_has_its_control_coefficients(capsys):
    argv = [*POINTS, "--loss", "taylor", "--checkpoint-every", "20"]
    assert train.main([*argv, "--steps", "40", "--decay", "0", "--out", "whole"]) == 0
    assert train.main([*argv, "--steps", "20", "--decay", "0", "--out", "half"]) == 0
    assert train.main(["--resume", "half", "--steps", "40"]) == 0
    whole, half = states("whole")[-1], states("half")[-1]
    assert torch.equal(whole["beta"], half["beta"]) and whole["beta"].any()
    assert all(torch.equal(whole["model"][k], half["model"][k]) for k in whole["model"])


def test_a_run_killed_before_its_report_gets_it_on_resume(capsys):
    assert train.main([*POINTS, "--steps", "2", "--out", "run"]) == 0
    want = capsys.readouterr().out.split("minutes")[1]
    log = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    Path("run/samples-0000002.png").unlink()
    Path("run/log.jsonl").write_text("".join(log[:-1]))
    assert train.main(["--resume", "run"]) == 0
    assert capsys.readouterr().out.split("minutes")[1] == want
    assert Path("run/log.jsonl").read_text().splitlines(keepends=True) == log
    assert train.main(["--resume", "run"]) == 2 and "--steps" in capsys.readouterr().err


def test_a_half_life_beyond_the_run_is_told(capsys):
    for half_life, told in (("64,8", False), ("65,8", True)):
        argv = [*POINTS, "--steps", "2", "--batch", "32", "--ema", half_life, "--dry-run"]
        assert train.main(argv) == 0
        assert ("more than the 64 images" in capsys.readouterr().out) == told


@pytest.mark.parametrize("arch", ["unet", "ddpmpp", "ncsnpp", "adm"])
def test_every_arch_trains_on_images(arch, capsys):
    assert train.main(["--data", "images.npz", "--arch", arch, *TINY, "--steps", "2"]) == 0
    assert "Frechet distance" in capsys.readouterr().out


def test_training_learns_the_data(capsys):
    """300 steps on two Gaussians: samples far nearer to the data than noise of its moments."""
    assert train.main(["--data", "two-gaussians", "--width", "64", "--steps", "300", "--batch",
                       "128", "--ref-batch", "256", "--warmup", "20", "--out", "run"]) == 0
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last["frechet_pixels"] < 0.02               # 0.5 for all samples at one of the two means
    denoiser, schedule = runs.load_run("run")[0], SCHEDULES["edm"]()
    x = runs.generate(denoiser, range(500), [2], "heun", schedule, 18)
    near = (x.abs() - 0.48).abs().max(1).values < 0.5  # 3.6 standard deviations of a component
    assert near.float().mean() > 0.9 and 0.35 < (x[:, 0] > 0).float().mean() < 0.65
    table = {row[0]: row[1:] for row in last["loss_by_sigma"]}
    assert table[5][1] < 0.2 * table[5][0]             # DSM's target is all noise there, STF's not


def test_dry_run_prints_every_option_and_writes_nothing(folder, capsys):
    assert train.main(["--data", "images.npz", "--width", "8", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in train.OPTIONS)
    assert [p.name for p in folder.iterdir()] == ["images.npz"]


BAD = {
    "unknown option": ["--los", "dsm"],
    "unknown loss": ["--loss", "gan"],
    "unknown data": ["--data", "imagenet"],
    "missing file": ["--data", "nothing.zip"],
    "corrupt zip": ["--data", "corrupt.zip"],
    "batch 0": ["--batch", "0"],
    "steps not a number": ["--steps", "many"],
    "rate below 0": ["--lr", "-1"],
    "deviation 0": ["--P-std", "0"],
    "odd width": ["--width", "3"],
    "dropout above 1": ["--dropout", "1.5"],
    "cond without labels": ["--data", "checkerboard", "--cond"],
    "xflip of points": ["--data", "checkerboard", "--xflip"],
    "size of points": ["--data", "checkerboard", "--size", "8"],
    "mlp of images": ["--data", "images.npz", "--arch", "mlp"],
    "unet of points": ["--data", "checkerboard", "--arch", "unet"],
    "mult not numbers": ["--data", "images.npz", "--mult", "1,x"],
    "mult of zero": ["--data", "images.npz", "--mult", "0,1"],
    "size not divisible": ["--data", "images.npz", "--mult", "1,1,1,1,1"],
    "label dropout without labels": ["--data", "images.npz", "--label-dropout", "0.1"],
    "unknown device": ["--data", "images.npz", "--device", "abacus"],
    "no such run": ["--resume", "nowhere"],
    "nothing to resume": ["--resume"],
    "folder in use": ["--data", "images.npz", "--width", "8", "--out", "used"],
}


@pytest.mark.parametrize("argv", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_costs_nothing(argv, folder, capsys):
    Path("corrupt.zip").write_bytes(b"PK\x03\x04 not a zip")
    Path("used").mkdir()
    Path("used/precious").write_text("thesis")
    before = sorted(str(p) for p in folder.rglob("*"))
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and len(error) > 30
    assert sorted(str(p) for p in folder.rglob("*")) == before
    assert Path("used/precious").read_text() == "thesis"


def test_resume_refuses_what_would_not_be_the_same_run(capsys):
    assert train.main([*POINTS, "--steps", "2", "--out", "run"]) == 0
    capsys.readouterr()
    kept = Path(runs.checkpoints("run")[-1]).read_bytes()
    for argv, word in [(["--lr", "1"], "--lr 1.0 (was 0.005)"), ([], "--steps"),
                       (["--data", "checkerboard"], "--data checkerboard")]:
        assert train.main(["--resume", "run", *argv]) == 2
        assert word in capsys.readouterr().err
    assert Path(runs.checkpoints("run")[-1]).read_bytes() == kept
    assert train.main(["--resume", "run", "--steps", "3"]) == 0


def test_resume_refuses_data_that_has_changed(capsys):
    argv = ["--data", "images.npz", *TINY, "--steps", "1", "--out", "run"]
    assert train.main(argv) == 0
    np.savez("images.npz", images=np.zeros((40, 8, 8, 3), np.uint8))
    capsys.readouterr()
    assert train.main(["--resume", "run", "--steps", "2"]) == 2
    assert "other data" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(capsys):
    assert train.main([*POINTS, "--steps", "2", "--out", "run"]) == 0
    path = Path(runs.checkpoints("run")[-1])
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert train.main(["--resume", "run", "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_nan_stops_the_run_with_a_sentence(capsys):
    assert train.main([*POINTS, "--steps", "50", "--lr", "1e30", "--clip", "1e30"]) == 2
    assert "ten steps in a row" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_layer():
    """64 MiB, made and freed: every page of it is faulted in each time, or the first time only."""
    code = """if True:
        import resource, torch, objectives
        def faults():
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(1 << 24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
        print(min(faults() for _ in range(9)))
        objectives.arrange_memory(torch.nn.Linear(1, 1), "dsm")
        print(min(faults() for _ in range(9)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(train.__file__).parent)
    before, after = map(int, done.stdout.split())
    assert before >= 32 and after < before / 4                   # 32: where pages have 2 MiB
