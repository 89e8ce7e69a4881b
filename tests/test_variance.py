"""Variance of targets, effective sample size, and what a set says about hyper-parameters."""

import csv
import math
from functools import partial

import numpy as np
import pytest
import torch

import datasets
import evaluate
import losses
import papers
import train
from schedules import EDM, SCHEDULES, VE

LEVELS = torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(reach=12.0, count=24_001):
    """x (count, 1) and the step between them, for integrals over the line."""
    x = torch.linspace(-reach, reach, count, dtype=torch.float64)[:, None]
    return x, (x[1] - x[0]).item()


def density(x, mean, variance):
    return torch.exp(-(x - mean) ** 2 / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def close(samples, truth, errors=4.0):
    """Their mean over the first axis is truth, within so many standard errors."""
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    return ((mean - truth).abs() <= errors * error + 1e-9).all()


# ---- The exact posteriors ------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 4.0])
def test_two_gaussians_mean_is_the_integral_over_the_posterior(sigma):
    y, step = grid(3.0)
    prior = (density(y, 0.48, 0.14 ** 2) + density(y, -0.48, 0.14 ** 2)) / 2
    for x in (-1.0, -0.1, 0.0, 0.3, 0.7):
        weight = prior * density(torch.tensor(x), y, sigma ** 2)
        truth = ((weight * y).sum() / weight.sum()).item()
        mean = papers.two_gaussians_mean(torch.tensor([[x]]), torch.tensor([[sigma]]))
        assert mean.item() == pytest.approx(truth, abs=1e-6)


def test_two_gaussians_mean_is_the_mean_of_the_set_that_datasets_draws():
    """In 64 dimensions, by the orthogonality that marks E[x0 | x]: E <x0 - mean, h(x)> = 0."""
    x0 = torch.from_numpy(datasets.points("two-gaussians-64d", 4000)[0]).double()
    for sigma in (0.2, 1.0, 4.0):
        x = x0 + sigma * normal(*x0.shape)
        error = x0 - papers.two_gaussians_mean(x, torch.full((4000, 1), sigma).double())
        for h in (x, torch.tanh(x.sum(1, keepdim=True)).expand_as(x), torch.ones_like(x)):
            assert close((error * h).sum(1), 0)


def test_posterior_of_rows_is_the_full_sum():
    rows, sigma = normal(7, 3), torch.tensor([[0.3], [2.0]]).double()
    x = normal(2, 3, seed=1)
    w = torch.softmax(-((x[:, None] - rows) ** 2).sum(2) / (2 * sigma ** 2), 1)
    y = 1 / (7 * w)
    f = torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
    mean, divergence = papers.posterior(x, sigma, rows)
    assert torch.allclose(mean, w @ rows) and torch.allclose(divergence, (w * f).sum(1))


def test_divergence_is_0_where_x_tells_nothing_and_about_n_squared_where_it_tells_the_row():
    rows = normal(9, 3)
    for sigma, truth in ((1e6, 0), (1e-3, 8 ** 2 + 8 * 8 / 27 / 9)):
        _, divergence = papers.posterior(rows, torch.full((9, 1), sigma).double(), rows)
        assert torch.allclose(divergence, torch.full((9,), truth).double(), atol=1e-9)


def test_divergence_over_a_law_is_infinite_up_to_sqrt_3_deviations():
    """E (p(x|x0)/p(x))^2 = 1/((1 - q) sqrt(1 - 4q)) per coordinate, q = s^2/(s^2 + sigma^2)."""
    def moment(sigma, reach):
        x, step = grid(reach, 1201)
        x0 = x.T
        joint = density(x0, 0.0, 1.0) * density(x, x0, sigma ** 2)                # s = 1
        return (joint * (density(x, x0, sigma ** 2) / density(x, 0.0, 1 + sigma ** 2)) ** 2
                ).sum().item() * step ** 2
    for sigma in (1.9, 3.0):
        q = 1 / (1 + sigma ** 2)
        assert moment(sigma, 30) == pytest.approx(1 / ((1 - q) * (1 - 4 * q) ** 0.5), rel=1e-3)
    assert 2 * moment(1.6, 10) < moment(1.6, 20) < moment(1.6, 30) / 2            # no end


# ---- Variance of the targets ---------------------------------------------------------------------

def test_one_reference_is_dsm_on_one_gaussian():
    """Tr Cov(x0 | x) = d s^2 sigma^2/(s^2 + sigma^2)   (STF section 3)."""
    s, x0 = 0.7, 0.7 * normal(1500, 3)
    exact = lambda x, sigma: (s ** 2 / (s ** 2 + sigma ** 2) * x, sigma[:, 0])
    V, _ = papers.target_variance(x0, normal(1500, 3, seed=1), LEVELS, [1], x0, exact,
                                  torch.Generator())
    assert close(V[:, 0], 3 * s ** 2 * LEVELS ** 2 / (s ** 2 + LEVELS ** 2))


def test_one_reference_is_dsm_on_two_gaussians():
    """The mixture's E Tr Cov(x0 | x), by integration over x and x0 in one dimension."""
    x0 = torch.from_numpy(datasets.points("two-gaussians", 20_000)[0][:, :1]).double()
    levels = torch.tensor([0.1, 0.3, 0.6, 2.0], dtype=torch.float64)
    V, _ = papers.target_variance(
        x0[:1500], normal(1500, 1, seed=1), levels, [1], x0,
        lambda x, sigma: (papers.two_gaussians_mean(x, sigma), sigma[:, 0]), torch.Generator())
    y, dy = grid(1.5, 1201)
    prior = (density(y, 0.48, 0.14 ** 2) + density(y, -0.48, 0.14 ** 2)).T / 2    # (1, x0)
    truth = []
    for sigma in levels:
        x, dx = grid(1.5 + 6 * sigma.item(), 1201)
        joint = prior * density(x, y.T, sigma ** 2)                               # (x, x0)
        mass, first, second = (joint @ torch.cat([y ** 0, y, y ** 2], 1)).T * dy
        truth.append((second - first ** 2 / mass.clamp(min=1e-300)).sum().item() * dx)
    assert close(V[:, 0], torch.tensor(truth))


def test_stf_on_two_points_by_enumeration():
    """{0, 1}, n = 2: T = (y1 + y2)/2 if they differ only by chance; summed over every case."""
    rows, sigma = torch.tensor([[0.0], [1.0]]).double(), 0.6
    x, step = grid(8.0)
    r = torch.sigmoid((x - 0.5) / sigma ** 2)                                     # p(1 | x)
    p = (density(x, 0.0, sigma ** 2) + density(x, 1.0, sigma ** 2)) / 2
    # both references 0: (1-r)/2, target 0; both 1: r/2, target 1; one of each: 1/2, target r
    truth = (p * ((1 - r) / 2 * r ** 2 + r / 2 * (1 - r) ** 2)).sum().item() * step
    x0 = rows.repeat(1000, 1)
    V, D = papers.target_variance(x0, normal(2000, 1), torch.tensor([sigma]).double(), [1, 2], rows,
                                  partial(papers.posterior, rows=rows), torch.Generator())
    assert close(V[:, 1, 0], truth) and close(V[:, 0, 0], 2 * truth)
    f = lambda y: torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
    assert close(D[:, 0], (p * (r * f(0.5 / r) + (1 - r) * f(0.5 / (1 - r)))).sum().item() * step)


def test_the_whole_set_as_reference_leaves_no_variance():
    """Then the target is E[x0 | x] itself, whichever row is x0."""
    rows, sigma = normal(20, 4), torch.full((20, 1), 0.8).double()
    x = rows + 0.8 * normal(20, 4, seed=1)
    mean, _ = papers.posterior(x, sigma, rows)
    assert torch.allclose(losses.stf_target(x, sigma, rows[torch.randperm(20)]), mean)


def test_theorem_2_high_noise_divides_the_variance_by_n():
    """Where p(x0 | x) is p0 the target is a mean of n draws: V -> Tr Cov(p0)/n, D -> V/sigma^2."""
    rows = normal(500, 2)
    V, D = papers.target_variance(
        rows.repeat(2, 1), normal(1000, 2, seed=1), torch.tensor([1e4]).double(), [1, 4, 16], rows,
        partial(papers.posterior, rows=rows), torch.Generator())
    total = rows.var(0, correction=0).sum()
    assert close(V[:, :, 0], total / torch.tensor([1, 4, 16])) and close(D[:, 0] * 1e8, total)


def test_stf_is_dsm_at_low_noise():
    rows = normal(50, 5)
    V, _ = papers.target_variance(
        rows, normal(50, 5, seed=1), torch.tensor([1e-2, 0.5]).double(), [1, 30], rows,
        partial(papers.posterior, rows=rows), torch.Generator())
    low, middle = V.mean(0).T
    assert torch.allclose(low[0], low[1], atol=1e-12) and middle[1] < middle[0]


# ---- Effective sample size -----------------------------------------------------------------------

def test_effective_size_goes_from_1_to_n_and_is_the_sum_over_weights():
    reference, noise = normal(40, 6), normal(10, 6, seed=1)
    levels = torch.tensor([1e-3, 1.0, 1e5], dtype=torch.float64)
    size = papers.effective_size(reference[:10], noise, levels, reference)
    assert size[[0, 2]].tolist() == pytest.approx([1, 40], rel=1e-6)
    w = torch.softmax(-torch.cdist(reference[:10] + noise, reference) ** 2 / 2, 1)
    assert size[1].item() == pytest.approx((1 / (w ** 2).sum(1)).mean().item())
    images = papers.effective_size(reference[:10].view(10, 1, 2, 3), noise.view(10, 1, 2, 3),
                                   levels, reference.view(40, 1, 2, 3))
    assert torch.allclose(images, size)


def test_log_density_is_each_schedules_own():
    levels = torch.logspace(-2, 1.9, 40, dtype=torch.float64)
    z = (levels.log() + 1.2) / 1.2
    edm = torch.exp(-z ** 2 / 2) / (1.2 * (2 * math.pi) ** 0.5)
    assert np.allclose(papers.log_density(EDM(), levels), edm, atol=1e-3)
    ve = np.where(levels > 0.02, 1 / math.log(5000), 0)
    assert np.allclose(papers.log_density(VE(), levels), ve, rtol=1e-6)
    fine = torch.logspace(-5, 3, 4001, dtype=torch.float64)
    for name in ("edm", "ve", "vp"):
        mass = papers.log_density(SCHEDULES[name](), fine).sum() * math.log(10) * 8 / 4000
        assert mass == pytest.approx(1, abs=0.005)


def test_share_above_is_the_tail_of_the_draw():
    """method.md section 4: EDM draws sigma > 4 in 1.6 % of samples, VE in 38 %."""
    levels = torch.tensor([1e-3, 4.0, 1e3], dtype=torch.float64)
    size = torch.tensor([1.0, 2.0, 3.0])
    share = {name: papers.share_above(2, size, levels, SCHEDULES[name]()) for name in ("edm", "ve")}
    tail = 0.5 * math.erfc((math.log(4) + 1.2) / 1.2 / 2 ** 0.5)
    assert share["edm"] == pytest.approx(tail, abs=2e-5) and round(tail, 3) == 0.016
    assert share["ve"] == pytest.approx(math.log(25) / math.log(5000), abs=2e-5)
    assert round(share["ve"], 2) == 0.38
    middle = math.log(100 / (4 * 1e3) ** 0.5) / math.log(5000)             # linear in ln sigma
    assert papers.share_above(2.5, size, levels, VE()) == pytest.approx(middle, abs=2e-5)
    assert papers.share_above(2, torch.ones(3), levels, EDM()) == 0


# ---- Hyper-parameters ----------------------------------------------------------------------------

def test_linear_gain_is_what_the_wiener_filter_takes_off_edms_loss():
    sd = torch.tensor([0.05, 0.4, 2.0], dtype=torch.float64)
    x0, noise = sd * normal(20_000, 3), normal(20_000, 3, seed=1)
    whole = (sd ** 2).mean().sqrt().item()
    edm = EDM(sigma_data=whole)
    levels = torch.tensor([0.02, 0.3, 5.0], dtype=torch.float64)
    for sigma, gain in zip(levels, papers.linear_gain(sd ** 2, levels)):
        s = sigma.expand(20_000, 1)
        untrained = lambda x, s: edm.precondition(s)[0] * x
        wiener = lambda x, s: sd ** 2 / (sd ** 2 + s ** 2) * x
        before, after = (losses.dsm_loss(D, x0, noise, s, edm.weight) for D in (untrained, wiener))
        assert close(before, 1) and close(before - after, gain)
    assert papers.linear_gain(sd ** 2, torch.tensor([1e-6, 1e6])).abs().max() < 1e-3
    assert papers.linear_gain(torch.ones(5), levels).abs().max() < 1e-6        # nothing is shared


def suggested(rows, step=0):
    table, curves = papers.suggest(rows, step, torch.Generator().manual_seed(0))
    return {item: value for item, value, _ in table}, np.array(curves)


def test_suggestions_on_a_line_of_points():
    """Rows 0, 1, .., 99 in one dimension: every distance is known."""
    found, curves = suggested(torch.arange(100.0)[:, None])
    assert found["nearest, 10 %"] == found["nearest, 90 %"] == pytest.approx(1)
    assert found["sigma_max"] == pytest.approx(99) and found["mean"] == pytest.approx(49.5)
    assert found["sigma_min"] == pytest.approx(0.1 / 2 ** 0.5)
    assert found["sigma_data"] == pytest.approx((100 * 101 / 12) ** 0.5)
    assert np.allclose(curves[[0, -1], 0], [found["sigma_min"], 99])
    level, size = curves[:, 0], curves[:, 1]
    assert size[level < 0.1].max() < 1.01 and (size[level < found["ESS 2"]] < 2).all()
    assert (size[level > found["ESS 2"]] > 2).all()
    ends = np.log([found["sigma_min"], 99])
    assert found["P_mean"] == pytest.approx(ends.mean())          # one axis: nothing is gained


def test_suggestions_scale_with_the_data():
    rows = normal(300, 4) * torch.tensor([0.1, 0.3, 1, 3])
    one, _ = suggested(rows.float())
    ten, _ = suggested(10 * rows.float())
    assert one["sigma_min"] == pytest.approx(one["nearest, 50 %"] / 8 ** 0.5 / 10)
    for name in ("sigma_data", "sigma_min", "sigma_max", "nearest, 50 %", "ESS 2"):
        assert ten[name] / one[name] == pytest.approx(10, rel=1e-3)
    assert ten["P_mean"] - one["P_mean"] == pytest.approx(math.log(10), abs=1e-3)
    assert ten["P_std"] == pytest.approx(one["P_std"], rel=1e-3)


def test_rounding_gives_sigma_min_and_what_is_duplicate_does_not():
    rows = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)).sub(0.5)
    found, _ = suggested(rows, 2 / 255)
    assert found["sigma_min"] == pytest.approx(2 / 255 / 12 ** 0.5)
    assert round(found["sigma_min"], 3) == EDM().sigma_min
    _, curves = suggested(rows[:, :, :1, :1].expand_as(rows), 2 / 255)     # 15 axes of 16: rounding
    assert curves[0, 2] == pytest.approx(1 - (15 / 2 + 1) / 16, abs=1e-3)
    points = rows.flatten(1)
    twice, _ = suggested(torch.cat([points, points, points[:1]]))
    once, _ = suggested(points)
    for name in ("sigma_min", "nearest, 90 %", "sigma_max"):
        assert twice[name] == pytest.approx(once[name], rel=0.02)


def test_wide_images_are_measured_by_their_middle():
    rows = torch.rand(40, 1, 34, 34, generator=torch.Generator().manual_seed(0))
    _, curves = suggested(rows, 2 / 255)
    rows[:, :, 0] = rows[:, :, 0] * 9                               # an edge that is left out
    assert np.allclose(suggested(rows, 2 / 255)[1][0, 2], curves[0, 2], rtol=1e-6)


# ---- The commands --------------------------------------------------------------------------------

def run(tmp_path, *argv):
    """The CSV that a command writes: its rows as dicts."""
    assert evaluate.main([*map(str, argv), "--out", str(tmp_path)]) == 0
    with open(tmp_path / f"{argv[0]}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "noise.npy"
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    x[-2:] = x[0]
    np.save(path, x)
    return path


@pytest.mark.parametrize("name", ["two-gaussians-64d", "swiss-roll", "images"])
def test_variance_command(name, images, tmp_path, capsys):
    table = run(tmp_path, "variance", "--data", images if name == "images" else name, "--num", "60",
                "--n", "4", "16", "--levels", "1000", "0.001")
    low, high = ({key: float(value) for key, value in row.items()} for row in table)
    assert [low["sigma"], high["sigma"]] == [0.001, 1000]
    assert low["V_DSM"] == pytest.approx(low["V_STF, n = 16"], rel=0.1, abs=1e-9)
    assert high["V_STF, n = 4"] < high["V_DSM"] / 2 and high["D"] < 1e-2 < low["D"]
    assert 0.4 < high["times n/V_DSM:V_STF, n = 16"] < 2
    assert high["V_DSM/sigma^2"] == pytest.approx(high["V_DSM"] / 1e6, rel=1e-4)
    assert "n V_STF/V_DSM" in capsys.readouterr().out
    if name == "two-gaussians-64d":       # by their law: 60 rows in 64 dimensions would leave 0
        assert low["V_DSM"] == pytest.approx(64 / (1 / 0.14 ** 2 + 1e6), rel=0.1)


def test_ess_command(images, tmp_path, capsys):
    table = run(tmp_path, "ess", "--data", images, "--n", "8", "500", "--num", "20", "--levels",
                "0.001", "1000")
    assert list(table[0]) == ["sigma", "n = 8", "n = 60", "EDM", "VE", "VP"]
    assert float(table[0]["n = 8"]) == 1 and float(table[1]["n = 60"]) > 59.9
    assert "share of training where ESS > 2" in capsys.readouterr().out


def test_data_command(images, tmp_path, capsys):
    table = {row["item"]: row["value"] for row in run(tmp_path, "data", images)}
    assert table["count"] == "60" and table["shape"] == "3x4x4" and table["duplicates"] == "2"
    assert float(table["sigma_data"]) == pytest.approx(np.load(images).std() / 127.5, rel=1e-3)
    assert float(table["sigma_min"]) == pytest.approx(0.00226, rel=0.01)
    assert f"P_mean for digits, {train.OPTIONS['P-mean'][1][0]}," in capsys.readouterr().out
    points = {row["item"]: row["value"]
              for row in run(tmp_path, "data", "checkerboard", "--num", "100") if row["reason"]}
    nearest = float(points["nearest, 50 %"])
    assert float(points["sigma_min"]) == pytest.approx(nearest / (2 * 2) ** 0.5 / 10, rel=1e-4)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    np.save(tmp_path / "same.npy", np.ones((5, 3), np.float32))
    assert evaluate.main(["data", str(tmp_path / "same.npy"), "--out", str(tmp_path)]) == 2
    assert "choose another set" in capsys.readouterr().err
    assert evaluate.main(["data"]) == 2 and "SET" in capsys.readouterr().err
    assert evaluate.main(["ess", "--data", "nothing"]) == 2
    assert "there is no file" in capsys.readouterr().err
