"""train.py: a batch is a function of (seed, step), a resumed run is the run, bad input is cheap."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from schedules import EDM

TINY = ["--width", "8", "--mult", "1,1", "--blocks", "1", "--batch", "4", "--ref-batch", "8",
        "--sample-steps", "1"]
POINTS = ["--data", "two-gaussians", "--width", "16", "--batch", "16", "--ref-batch", "32",
          "--sample-steps", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs go to an empty folder that also holds images.npz: 40 images, 8x8 RGB, 2 classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("images.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(40) % 2)
    return tmp_path


def options(argv, data="images.npz"):
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args(argv)).items()}
    data = evaluate.load_data(data)
    return train.resolve(given, data), data


def batch(argv, step):
    o, data = options(argv)
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    return train.draw_batch(torch.from_numpy(data.x), labels, o, EDM(), step)


def test_batch_is_a_pure_function_of_seed_and_step():
    argv = ["--batch", "8", "--ref-batch", "16", "--xflip", "--cond"]
    first, again, other = batch(argv, 3), batch(argv, 3), batch(argv, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], other[:4]))
    assert not torch.equal(first[1], batch([*argv, "--seed", "1"], 3)[1])


def test_source_is_in_its_reference_and_rows_do_not_repeat():
    x0, noise, sigma, reference, labels = batch(["--batch", "8", "--ref-batch", "40", "--cond"], 0)
    assert torch.equal(reference[:8], x0) and labels.shape == (40,)
    assert len(torch.unique(reference.flatten(1), dim=0)) == 40            # the whole set, once
    assert noise.shape == x0.shape and sigma.shape == (8, 1, 1, 1) and (sigma > 0).all()
    assert x0.min() >= -1 and x0.max() <= 1 and x0.dtype == torch.float32


def test_a_batch_larger_than_the_set_still_has_its_sources():
    x0, _, _, reference, _ = batch(["--batch", "64", "--ref-batch", "8"], 0)
    assert x0.shape[0] == 64 and torch.equal(reference, x0)


def test_xflip_mirrors_about_half_and_the_reference_with_it():
    plain, mirrored = batch(["--batch", "40"], 0)[0], batch(["--batch", "40", "--xflip"], 0)[0]
    same = (plain == mirrored).flatten(1).all(1)
    assert torch.equal(torch.where(same[:, None, None, None], plain, plain.flip(-1)), mirrored)
    assert 10 <= same.sum() <= 30


def test_dsm_and_stf_see_the_same_images_noise_and_sigma():
    stf, dsm = batch(["--batch", "8"], 5), batch(["--batch", "8", "--loss", "dsm"], 5)
    assert all(torch.equal(a, b) for a, b in zip(stf[1:3], dsm[1:3]))
    assert torch.equal(stf[0], dsm[0])


def test_generator_tells_seeds_steps_and_streams_apart():
    draws = {float(torch.rand(1, generator=train.generator(*key)))
             for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2 ** 31, 0, 0)]}
    assert len(draws) == 5


def test_learning_rate_rises_stays_and_falls():
    o = dict(lr=1.0, warmup=10, decay=0.5, steps=100)
    rate = [train.learning_rate(o, step) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9:50] == [1.0] * 41
    assert rate[75] == pytest.approx(0.5) and rate[99] == pytest.approx(0.02)
    assert train.learning_rate(dict(o, decay=0.0), 99) == 1.0


def test_ema_half_life_counts_images_and_ramps_up():
    weights, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    weights.weight.data.fill_(1.0), ema.weight.data.fill_(0.0)
    o = {"ema": 100, "ema-rampup": 1.0, "batch": 10}
    for _ in range(10):                                     # 100 images = one half-life
        train.update_ema(ema, weights, o, images=10 ** 6)
    assert ema.weight.item() == pytest.approx(0.5)
    train.update_ema(ema, weights, dict(o, ema=10 ** 9, batch=100), images=100)     # ramp: 100
    assert ema.weight.item() == pytest.approx(0.75)


def states(run):
    return [torch.load(p, weights_only=True) for p in evaluate.checkpoints(run)]


@pytest.mark.parametrize("extra", [[], ["--dropout", "0.3", "--cond", "--label-dropout", "0.2",
                                        "--xflip"]])
def test_ten_steps_are_five_and_five_bit_for_bit(extra, capsys):
    argv = ["--data", "images.npz", *TINY, "--steps", "10", "--checkpoint-every", "5", *extra]
    assert train.main([*argv, "--out", "whole"]) == 0
    shutil.copytree("whole", "killed")                      # killed between steps 5 and 10
    Path(evaluate.checkpoints("killed")[-1]).unlink()
    assert train.main(["--resume", "killed"]) == 0
    whole, killed = states("whole")[-1], states("killed")[-1]
    assert whole["step"] == killed["step"] == 10
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][k], killed[part][k]) for k in whole[part])
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
    Path(evaluate.checkpoints("killed")[-1]).unlink()
    assert train.main(["--resume", "killed"]) == 0
    a, b = states("whole")[-1]["model"], states("killed")[-1]["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_are_plain_tensors_whole_and_two(capsys):
    assert train.main([*POINTS, "--steps", "6", "--checkpoint-every", "2", "--out", "run"]) == 0
    names = sorted(p.name for p in Path("run").iterdir())
    assert names == ["checkpoint-0000004.pt", "checkpoint-0000006.pt", "log.jsonl", "options.json",
                     "samples-0000006.png"]
    state = states("run")[-1]
    assert set(state) == {"step", "options", "model", "ema", "optimizer"}
    assert json.loads(json.dumps(state["options"])) == state["options"]
    assert json.loads(Path("run/options.json").read_text()) == state["options"]


@pytest.mark.parametrize("schedule", ["vp", "ve", "iddpm", "edm", "ddpm"])
@pytest.mark.parametrize("loss", ["dsm", "stf"])
def test_every_loss_runs_in_every_schedule(loss, schedule, capsys):
    assert train.main([*POINTS, "--loss", loss, "--schedule", schedule, "--steps", "3"]) == 0
    losses = [json.loads(line)["loss"] for line in
              Path(f"runs/000-two-gaussians-{loss}/log.jsonl").read_text().splitlines()[:3]]
    assert len(losses) == 3 and np.isfinite(losses).all()


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
    x = evaluate.generate(*sampler("run"), range(500), [2], "heun", EDM(), 18)
    near = (x.abs() - 0.48).abs().max(1).values < 0.5  # 3.6 standard deviations of a component
    assert near.float().mean() > 0.9 and 0.35 < (x[:, 0] > 0).float().mean() < 0.65
    table = {row[0]: row[1:] for row in last["loss_by_sigma"]}
    assert table[5][1] < 0.2 * table[5][0]             # DSM's target is all noise there, STF's not


def sampler(run):
    state = evaluate.load_checkpoint(run)
    denoiser = evaluate.build_denoiser(state["options"]).eval()
    evaluate.load_weights(denoiser, state, "ema", run)
    return [denoiser]


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
    kept = Path(evaluate.checkpoints("run")[-1]).read_bytes()
    for argv, word in [(["--lr", "1"], "--lr 1.0 (was 0.005)"), ([], "--steps"),
                       (["--data", "checkerboard"], "--data checkerboard")]:
        assert train.main(["--resume", "run", *argv]) == 2
        assert word in capsys.readouterr().err
    assert Path(evaluate.checkpoints("run")[-1]).read_bytes() == kept
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
    path = Path(evaluate.checkpoints("run")[-1])
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert train.main(["--resume", "run", "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_nan_stops_the_run_with_a_sentence(capsys):
    assert train.main([*POINTS, "--steps", "50", "--lr", "1e30", "--clip", "1e30"]) == 2
    assert "not finite" in capsys.readouterr().err
