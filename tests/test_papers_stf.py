"""papers/stf.py: exact posteriors, the target's variance and bias, effective sample size, runs."""

import csv
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracles import close, randn, tensor
from papers import plot, stf
from schedules import EDM, VE


def grid(reach=12.0, count=24_001):
    """x (count, 1) and the step between them, for integrals over the line."""
    x = torch.linspace(-reach, reach, count, dtype=torch.float64)[:, None]
    return x, (x[1] - x[0]).item()


def density(x, mean, variance):
    return torch.exp(-(x - mean) ** 2 / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def has_mean(samples, truth):
    """Within four standard errors, over the first axis."""
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    return ((mean - truth).abs() <= 4 * error + 1e-9).all()


# ---- The exact posteriors ------------------------------------------------------------------------

def test_mixture_mean_is_the_integral_over_the_posterior():
    y, _ = grid(3.0)
    x, sigma = tensor([-1.0], [0.0], [0.3], [0.7]), torch.full((4, 1), 0.3).double()
    prior = density(y, 0.5, 0.14 ** 2) + density(y, -0.4, 0.14 ** 2)
    weight = (prior * density(x.T, y, sigma.T ** 2)).T                            # (4, count)
    mean = stf.mixture_mean(x, sigma, tensor([0.5], [-0.4]), 0.14)
    close(mean, weight @ y / weight.sum(1, keepdim=True), rtol=1e-6)


def test_posterior_of_rows_is_the_full_sum():
    rows, sigma = randn(7, 3), tensor([0.3], [2.0])
    x = randn(2, 3, seed=1)
    w = torch.softmax(-((x[:, None] - rows) ** 2).sum(2) / (2 * sigma ** 2), 1)
    y = 1 / (7 * w)
    f = torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
    mean, divergence = stf.posterior(x, sigma, rows)
    close(mean, w @ rows)
    close(divergence, (w * f).sum(1))


def test_divergence_over_a_law_is_infinite_up_to_sqrt_3_deviations():
    """E (p(x|x0)/p(x))^2 = 1/((1 - q) sqrt(1 - 4q)) per coordinate, q = s^2/(s^2 + sigma^2)."""
    def moment(sigma, reach):
        x, step = grid(reach, 1201)
        x0 = x.T
        joint = density(x0, 0.0, 1.0) * density(x, x0, sigma ** 2)                # s = 1
        ratio = density(x, x0, sigma ** 2) / density(x, 0.0, 1 + sigma ** 2)
        return (joint * ratio ** 2).sum().item() * step ** 2
    for sigma in (1.9, 3.0):
        q = 1 / (1 + sigma ** 2)
        assert moment(sigma, 30) == pytest.approx(1 / ((1 - q) * (1 - 4 * q) ** 0.5), rel=1e-3)
    assert 2 * moment(1.6, 10) < moment(1.6, 20) < moment(1.6, 30) / 2            # no end


# ---- Variance of the targets ---------------------------------------------------------------------

def test_one_reference_is_dsm_on_one_gaussian():
    """Tr Cov(x0 | x) = d s^2 sigma^2/(s^2 + sigma^2)   (STF section 3)."""
    s, x0 = 0.7, 0.7 * randn(1500, 3)
    levels = tensor(0.05, 0.5, 3.0)

    def exact(x, sigma):
        return s ** 2 / (s ** 2 + sigma ** 2) * x, sigma[:, 0]
    V, _ = stf.target_variance(x0, randn(1500, 3, seed=1), levels, [1], x0, exact,
                               torch.Generator())
    assert has_mean(V[:, 0], 3 * s ** 2 * levels ** 2 / (s ** 2 + levels ** 2))


def test_stf_on_two_points_by_enumeration():
    """{0, 1}, n = 2: V of DSM and of STF, summed over every case and integrated over x."""
    rows, sigma = tensor([0.0], [1.0]), 0.6
    x, step = grid(8.0)
    r = torch.sigmoid((x - 0.5) / sigma ** 2)                                     # p(1 | x)
    p = (density(x, 0.0, sigma ** 2) + density(x, 1.0, sigma ** 2)) / 2
    # both references 0: (1-r)/2, target 0; both 1: r/2, target 1; one of each: 1/2, target r
    truth = (p * ((1 - r) / 2 * r ** 2 + r / 2 * (1 - r) ** 2)).sum().item() * step
    exact = partial(stf.posterior, rows=rows)
    V, _ = stf.target_variance(rows.repeat(1000, 1), randn(2000, 1), tensor(sigma),
                               [1, 2], rows, exact, torch.Generator())
    assert has_mean(V[:, 1, 0], truth) and has_mean(V[:, 0, 0], 2 * truth)


# ---- Bias ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_source", [True, False])
def test_the_bias_on_two_points_is_0_with_the_source_and_that_of_the_enumeration_without(
        with_source):
    """{0, 1}, n = 2: the mean target is r = p(1 | x) with the source, 1/4 + r/2 without."""
    rows, sigma = tensor([0.0], [1.0]), torch.tensor(0.8).double()
    x = tensor([-0.6], [0.4], [1.5]).repeat(2000, 1)
    r = torch.sigmoid((x - 0.5) / sigma ** 2)
    square, V = stf.target_bias(x, sigma, rows, 2, 6, with_source, torch.Generator())
    truth = 0 if with_source else ((0.25 - r / 2) ** 2).mean().item()
    assert square == pytest.approx(truth, abs=0.003)      # without the source it is .024
    assert V == pytest.approx((r * (1 - r)).mean().item())


# ---- Effective sample size -----------------------------------------------------------------------

def test_effective_size_goes_from_1_to_n_and_is_the_sum_over_weights():
    reference, noise = randn(40, 6), randn(10, 6, seed=1)
    levels = tensor(1e-3, 1.0, 1e5)
    size = stf.effective_size(reference[:10], noise, levels, reference)
    assert size[[0, 2]].tolist() == pytest.approx([1, 40], rel=1e-6)
    w = torch.softmax(-torch.cdist(reference[:10] + noise, reference) ** 2 / 2, 1)
    assert size[1].item() == pytest.approx((1 / (w ** 2).sum(1)).mean().item())


def test_log_density_is_each_schedules_own():
    levels = torch.logspace(-2, 3, 50, dtype=torch.float64)
    z = (levels.log() + 1.2) / 1.2
    edm = torch.exp(-z ** 2 / 2) / (1.2 * (2 * math.pi) ** 0.5)
    assert np.allclose(plot.log_density(EDM(), levels), edm, atol=1e-3)
    ve = np.where((levels > 0.02) & (levels < 100), 1 / math.log(5000), 0)
    assert np.allclose(plot.log_density(VE(), levels), ve, rtol=1e-6)


# ---- The commands --------------------------------------------------------------------------------

def command(tmp_path, name, *argv):
    """The rows of a command's CSV, as dicts."""
    assert plot.main("stf", stf.COMMANDS, [*map(str, argv), "--out", str(tmp_path)]) == 0
    with open(tmp_path / f"stf-{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_variance_of_the_two_gaussians_law(tmp_path):
    """At sigma -> 0 Tr Cov(x0 | x) = 64/(1/.14^2 + 1/sigma^2), and STF changes nothing; 60 rows in
    64 dimensions would give 0."""
    rows = command(tmp_path, "variance-two-gaussians-64d", "variance", "--data",
                   "two-gaussians-64d", "--num", 60, "--n", 4, 16, "--levels", 1000, 0.05, 0.3, 7)
    low, _, _, high = rows
    assert float(low["V_DSM"]) == pytest.approx(64 / (1 / 0.14 ** 2 + 1 / 0.05 ** 2), rel=0.1)
    assert float(low["n = 16"]) == pytest.approx(1, abs=1e-6)
    assert float(high["n = 16"]) == pytest.approx(1 / 16, rel=0.5)
    assert [row["phase"] for row in rows] == ["1", "1", "2", "3"]
    for row in rows:
        first = float(row["1/(n - 1)"])
        assert first == pytest.approx(1 / 15) and float(row["n = 16"]) < float(row["bound"])
        assert float(row["bound"]) > first
    forms = [[float(row[f"V of {of}"]) / float(row["V_DSM"]) * float(row["sigma"]) ** power
              for row in rows] for of, power in (("D", 0), ("noise", 2), ("scores", 4))]
    assert forms == [pytest.approx([form[0]] * 4, rel=1e-4) for form in forms]


def test_variance_of_a_finite_set_vanishes_where_x_tells_the_row(tmp_path, folder):
    rows = command(tmp_path, "variance-images.npz", "variance", "--data", "images.npz", "--n", 4, 8,
                   "--levels", 0.01, 1000)
    assert float(rows[0]["V_DSM"]) < 1e-9 and rows[0]["n = 8"] == ""
    assert [row["phase"] for row in rows] == ["1", "3"]


def test_ess_bias(tmp_path, folder):
    rows = command(tmp_path, "ess", "ess", "--data", "images.npz", "--n", 8, 500, "--num", 20,
                   "--levels", 0.001, 1000)
    assert list(rows[0]) == ["sigma", "n = 8", "n = 40", "EDM", "VE", "VP"]
    assert float(rows[0]["n = 8"]) == 1 and float(rows[1]["n = 40"]) > 39.9
    row, = command(tmp_path, "bias", "bias", "--n", 2, "--levels", 3, "--repeats", 400)
    assert float(row["with 3"]) < 0.2 < float(row["without 3"])


TINY = ["--data", "ring", "--steps", 4, "--batch", 16]


def test_table(tmp_path, monkeypatch):
    """NFE: PC 2 N, DDIM N, Heun 2 N - 1; the runs are kept and serve again."""
    monkeypatch.chdir(tmp_path)
    argv = ["table", *TINY, "--seeds", 1, "--n", 16, "--rtol", 0.1, "--pc", 3, "--ddim", 3,
            "--heun", 3, "--fid-num", 16]
    rows = command(tmp_path, "table", *argv)
    assert [row["schedule"] for row in rows] == ["ve", "ve", "vp", "vp", "vp", "edm"]
    assert [row["sampler"] for row in rows if "rk45" not in row["sampler"]] == [
        "pc 6", "pc 6", "ddim 3", "heun 5"]
    assert all(row["DSM"] != row["STF"] and float(row["STF"]) > float(row["floor"])
               for row in rows)
    run, = tmp_path.glob("plots/runs/ring-dsm-edm-*")
    judge = plot.Judge(SimpleNamespace(options=dict(fid_num=16)), str(run))
    assert float(rows[-1]["DSM"]) == pytest.approx(judge([str(run)], "heun", 3)[0], rel=1e-4)
    monkeypatch.setattr("train.run", None)
    assert command(tmp_path, "table", *argv) == rows
    assert command(tmp_path, "table", *argv, "--fid-num", 20)[0]["DSM"] != rows[0]["DSM"]


def test_speed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = command(tmp_path, "speed", "speed", *TINY, "--seeds", 2, "--n", 16, "--eval-every", 2)
    assert [(row["target"], row["step"]) for row in rows] == [
        ("DSM", "2"), ("DSM", "4"), ("STF, n = 16", "2"), ("STF, n = 16", "4")]
    assert float(rows[1]["seconds"]) == pytest.approx(2 * float(rows[0]["seconds"]), rel=1e-4)
    assert rows[3]["error"] != rows[1]["error"]
    errors = []
    for seed in (0, 1):
        folder, = tmp_path.glob(f"plots/runs/ring-dsm-ve--{seed}-*")
        errors.append(stf.held_out_errors(folder)[4])
    assert float(rows[1]["error"]) == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_the_held_out_error_is_the_averaged_weights_geometric_mean_over_levels(tmp_path):
    lines = [dict(step=1, loss=0.5), dict(step=2, held_out=dict(raw=[1.0, 1.0], ema=[4.0, 9.0]))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stf.held_out_errors(tmp_path) == {2: pytest.approx(6)}
