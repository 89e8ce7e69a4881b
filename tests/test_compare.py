"""train.py --compare, the errors on held-out rows that every run logs, and the best checkpoint."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import evaluate
import objectives
import runs
import train

POINTS = ["--data", "two-gaussians", "--width", "16", "--batch", "16", "--ref-batch", "64",
          "--warmup", "0", "--sample-steps", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def log(run, key):
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_denoising_error_of_a_linear_denoiser_has_its_closed_form():
    """Data N(0, s^2): |a x - x0|^2 has the mean (1 - a)^2 s^2 + a^2 sigma^2 in every value."""
    x0 = 0.5 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    for a in (0.0, 0.3, 1.0):
        got = evaluate.denoising_error(lambda x, sigma: a * x, x0, None, (0.1, 2.0), batch=999)
        want = [(1 - a) ** 2 * 0.25 + a ** 2 * sigma ** 2 for sigma in (0.1, 2.0)]
        assert got == pytest.approx(want, rel=0.05)


def test_denoising_error_is_the_same_in_any_batch_and_binds_labels():
    x0, labels = torch.randn(50, 3, 4, 4), torch.arange(50) % 2
    denoise = lambda x, sigma, labels: x * labels.view(-1, 1, 1, 1)
    one = evaluate.denoising_error(denoise, x0, labels, (0.5,), batch=7)
    assert one == pytest.approx(evaluate.denoising_error(denoise, x0, labels, (0.5,)), rel=1e-9)


def test_a_run_logs_the_error_of_both_weights_on_rows_and_noise_of_no_seed(capsys):
    argv = [*POINTS, "--steps", "30", "--eval-every", "10", "--loss", "dsm"]
    assert train.main([*argv, "--out", "a"]) == 0
    lines = log("a", "held_out")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0]["levels"] == list(evaluate.LEVELS)
    denoiser, options, _ = runs.load_run("a")
    held = runs.held_out(datasets.load_data("two-gaussians"), options)
    assert lines[-1]["held_out"]["ema"] == pytest.approx(evaluate.denoising_error(denoiser, *held))
    raw, ema = lines[0]["held_out"]["raw"], lines[0]["held_out"]["ema"]
    assert raw != ema and len(raw) == len(evaluate.LEVELS)
    again = runs.held_out(datasets.load_data("two-gaussians"), options | {"seed": 7})
    assert torch.equal(held[0], again[0])


def test_compare_is_fair_and_tells_what_it_found(capsys):
    """Same first batch and weights; calls alike; errors as ratios to the first objective's."""
    argv = [*POINTS, "--steps", "20", "--compare", "dsm,antithetic,stf:ref-batch=32,dsm:batch=32",
            "--out", "c", "--seeds", "2", "--fid-num", "50"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    table = [line.split(" | ") for line in Path("c/compare.md").read_text().splitlines()]
    assert [row[1] for row in table[2:]] == ["20", "10", "20", "10"]       # equal calls of D
    assert table[2][2].startswith("1 ±") and table[2][0] == "| `dsm`"
    assert "`stf:ref-batch=32`" in out and "distance, NFE 23" in out
    starts = [torch.load(p, weights_only=True) for p in sorted(Path("c").glob("*-0/*.pt"))]
    assert {s["options"]["seed"] for s in starts} == {0} and len(starts) == 4
    assert {s["options"]["ref-batch"] for s in starts} >= {32, 64}
    rows = list(csv.reader(open("c/curves.csv")))
    assert rows[0] == ["share of calls", "dsm", "antithetic", "stf ref-batch=32", "dsm batch=32"]
    assert len(rows) == 6 and float(rows[5][0]) == 1
    error = [np.mean([np.log(line[-1]["held_out"]["ema"]).mean() for line in
                      [log(f"c/dsm-{seed}", "held_out")]]) for seed in (0, 1)]
    assert float(rows[5][1]) == pytest.approx(np.exp(error).mean(), rel=1e-3)


def test_compare_first_batches_are_the_same_but_for_the_objective():
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args(POINTS)).items()}
    data = datasets.load_data("two-gaussians")
    options = [train.resolve(train.variant(name, given), data) for name in ("dsm", "stf")]
    batches = [objectives.draw_batch(torch.from_numpy(data.x), None, o, runs.build_schedule(o), 3)
               for o in options]
    for name in ("x0", "noise", "sigma"):
        assert torch.equal(batches[0][name], batches[1][name])


@pytest.mark.parametrize("equal, names, ratio", [
    ("calls", "dsm,sa:K=3", 3), ("calls", "dsm,taylor", 2), ("calls", "dsm,dsm:batch=64", 4),
    ("calls", "dsm,stf-taylor:control=atoms:atoms=3", 4), ("steps", "dsm,taylor", 1)])
def test_costs(equal, names, ratio):
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args(POINTS)).items()}
    data = datasets.load_data("two-gaussians")
    a, b = (objectives.cost(train.resolve(train.variant(name, given), data), data, equal)
            for name in names.split(","))
    assert b / a == ratio


def test_cost_in_time_is_seconds():
    given = {k.replace("_", "-"): v for k, v in vars(train.parser().parse_args(POINTS)).items()}
    data = datasets.load_data("two-gaussians")
    assert 0 < objectives.cost(train.resolve(train.variant("stf", given), data), data, "time") < 60


@pytest.mark.parametrize("argv, sentence", [
    (["--compare", "dsm,nonsense"], "--loss"), (["--compare", "dsm:K=2"], "--K belongs"),
    (["--compare", "dsm,"], "--loss"), (["--compare", "dsm,taylor:order=1"], "--equal time"),
    (["--compare", "dsm:colour=2"], "--colour")])
def test_bad_comparisons_cost_nothing(argv, sentence, capsys):
    assert train.main([*POINTS, *argv, "--out", "c"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not Path("c").exists()


def test_distances_are_logged_with_their_count_and_the_best_checkpoint_is_kept(capsys, monkeypatch):
    values = iter([5.0, 2.0, 3.0, 3.0])                               # the last: of the report
    given = []

    def distance(denoise, options, num, features, real):
        given.append((num, features[0], real["n"]))
        return f"frechet_pixels_{num}", next(values), 0.1
    monkeypatch.setattr(evaluate, "run_distance", distance)
    argv = [*POINTS, "--steps", "6", "--fid-every", "2", "--fid-num", "30", "--keep", "1"]
    assert train.main([*argv, "--out", "run"]) == 0
    lines = log("run", "frechet_pixels_30")
    assert [(line["step"], line["frechet_pixels_30"]) for line in lines] == [(2, 5), (4, 2), (6, 3)]
    assert given == [(30, "pixels", 20_000)] * 3 + [(128, "pixels", 10_000)]
    assert [Path(p).name for p in runs.checkpoints("run")] == ["checkpoint-0000006.pt"]
    assert runs.load_checkpoint("run/best.pt")["step"] == 4
    assert runs.load_checkpoint("run")["best"] == 2.0
    assert evaluate.main(["sample", "run/best.pt", "--num", "4", "--steps", "1", "--sampler", "ddpm",
                          "--variance", "analytic"]) == 0
    assert Path("run/ddpm-1-variance-analytic.png").exists()
